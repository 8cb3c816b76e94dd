"""What measures the weights on real scans, and what looks for leaks: by hand, and on a few small scans."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from benchmarks import real_accuracy, soak
from benchmarks.networks import FUSED
from benchmarks.real_accuracy import blind, ellipsoid, figures, summary


def test_ellipsoid_by_hand() -> None:
    """Half axes 20, 15 and 10 voxels; one of the whole size touches all six faces and no corner."""
    volume = 4 / 3 * np.pi * 20 * 15 * 10
    assert ellipsoid((80, 60, 40), 0.5).sum() == pytest.approx(volume, rel=0.01)
    whole = ellipsoid((9, 7, 5), 1.0)
    assert whole[0].any()
    assert whole[:, :, -1].any()
    assert not whole[0, 0, 0]


def test_the_blind_ellipsoid_suits_all_scans_best() -> None:
    labels = {name: ellipsoid(shape, 0.6) for name, shape in (("a", (40, 50, 60)), ("b", (30, 30, 30)))}
    size, masks = blind(labels)
    assert size == pytest.approx(0.6)
    assert all((masks[name] == label).all() for name, label in labels.items())


def test_figures_by_hand() -> None:
    """Two lesions of 8 and 1 voxels of 0.5 ml: the first found with four voxels more, the second missed, one false."""
    label, mask = np.zeros((2, 8, 12, 12), np.uint8)
    label[2:4, 2:4, 2:4] = label[6, 9, 9] = 1
    mask[2:5, 2:4, 2:4] = mask[0, 11, 0] = 1
    told = figures(mask, label, (5.0, 10.0, 10.0))
    assert told["dsc"] == pytest.approx(2 * 8 / (9 + 13), abs=1e-4)
    assert (told["lesions"], told["found"], told["false"], told["outside_ml"]) == (2, 1, 1, 2.5)
    missed = figures(0 * mask, label, (5.0, 10.0, 10.0))
    assert (missed["dsc"], missed["nsd"], missed["found"]) == (0, 0, 0)
    row = summary({"x": {FUSED: told}, "y": {FUSED: missed}})[FUSED]
    assert row["dsc"] == pytest.approx(told["dsc"] / 2, abs=1e-4)
    assert (row["lesions"], row["found"], row["false_a_scan"], row["outside_ml_a_scan"]) == (4, 1, 0.5, 1.25)


def test_real_scans_are_judged_by_network(random_weights: Path, tmp_path: Path) -> None:
    """Anisotropic scans in a folder laid out as the real ones; the picture and the figures of every network come."""
    affine = np.diag([-4.0, -4.0, 9.0, 1.0])
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / "some" / folder).mkdir(parents=True)
    for name in "ABC":
        hu = rng.normal(0, 20, (30, 24, 10)).astype(np.int16)
        label = ellipsoid(hu.shape, 0.5)
        nib.save(nib.Nifti1Image(hu, affine), tmp_path / "some" / "images" / f"{name}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), tmp_path / "some" / "labels" / f"{name}.nii.gz")
    (tmp_path / "splits.json").write_text(json.dumps({"some": {"train": ["C"], "val": ["A", "B"]}}))
    out = tmp_path / "out" / "real.json"
    real_accuracy.main(real_accuracy.Settings(tmp_path, str(random_weights), out))
    told = json.loads(out.read_text())["some"]
    assert sorted(told["cases"]) == ["A", "B"]
    assert set(told["cases"]["A"]) == {FUSED, "hybrid", "unet", "ellipsoid"}
    assert told["ellipsoid"]["dsc"] == 1
    assert told["ellipsoid_size"] == 0.5
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_drift_by_hand() -> None:
    """A tenth of the 40 cases after the first 20 is 4: 100 MiB, then 102; a file more. Not the rest."""
    looks = [soak.Look(done, 100.0 if done < 24 else 500.0, 5) for done in range(56)]
    looks += [soak.Look(done, mib, 6) for done, mib in ((56, 101.0), (58, 102.0), (60, 103.0))]
    told = soak.drift(looks, 60)
    assert told == {"early_mib": 100, "late_mib": 102, "drift_percent": 2, "more_files": 1}
    with pytest.raises(ValueError, match="too few"):
        soak.drift(looks[:10], 60)


def test_a_short_soak(random_weights: Path, tmp_path: Path) -> None:
    soak.main(soak.Settings(60, str(random_weights), tmp_path / "soak.json"))
    told = json.loads((tmp_path / "soak.json").read_text())
    assert told["early_mib"] > 50
    assert told["more_files"] <= 1
    assert (tmp_path / "soak.png").stat().st_size > 5000
