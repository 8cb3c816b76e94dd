"""What measures the weights on real scans, and what looks for leaks: by hand, and on a few small scans."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from benchmarks import int8, nnunet, peers, phantom_accuracy, real_accuracy, reproducibility, scaling, soak, stacked
from benchmarks.kills import write_scans
from benchmarks.networks import FUSED, Recorder
from benchmarks.real_accuracy import blind, ellipsoid, figures, summary
from inference.hybrid.config import HybridConfig
from inference.pipeline import Pipeline
from inference.unet import UNet
from inference.volume import read_volume, write_mask
from inference.weights import read_manifest
from training.phantom import Scanner, make_phantom


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


def test_phantoms_are_judged_by_network(random_weights: Path, tmp_path: Path) -> None:
    """Weights that know nothing, on a healthy and a diseased phantom; of its lesions those of 1 ml on are counted."""
    pipeline = Recorder(str(random_weights))
    cases = [phantom_accuracy.judge(pipeline, 3901, healthy, tmp_path) for healthy in (True, False)]
    phantom = make_phantom(3901, healthy=False, scanner=phantom_accuracy.scanner(3901))
    _, sizes = np.unique(ndimage.label(phantom.lesions, np.ones((3, 3, 3)))[0], return_counts=True)
    large = int((sizes[1:] * np.prod(phantom.spacing_mm) >= 1000).sum())
    told = phantom_accuracy.summary(cases)
    assert large > 0
    assert (cases[0]["large"], cases[1]["large"], told["large_lesions"]) == (0, large, large)
    assert all(0 <= found <= large for found in told["large_found"].values())
    for network, mean in told["mean_dice"].items():
        assert mean == pytest.approx((cases[0]["dice"][network] + cases[1]["dice"][network]) / 2, abs=1e-4)
        assert told["mean_dice_diseased"][network] == cases[1]["dice"][network]
        assert told["healthy_with_false_positive"][network] == 1 - cases[0]["dice"][network]


def test_phantoms_that_were_judged_are_not_judged_again(random_weights: Path, tmp_path: Path, monkeypatch) -> None:
    """Two runs into one file, overlapping, the second broken off and done again; then other weights."""
    judged = []

    def judge(pipeline: Recorder, seed: int, healthy: bool, folder: Path) -> dict:
        if seed == 3904 and 3904 not in judged:
            judged.append(seed)
            raise KeyboardInterrupt
        judged.append(seed)
        said = {"fused": 1.0 if healthy else 0.5}
        return {"seed": seed, "healthy": healthy, "dice": said, "large": 1, "large_found": {"fused": 1}}

    monkeypatch.setattr(phantom_accuracy, "judge", judge)
    out, weights = tmp_path / "phantoms.json", tmp_path / "weights"
    shutil.copytree(random_weights, weights)

    def run(first: int, count: int, healthy: int) -> dict:
        phantom_accuracy.main(phantom_accuracy.Settings(str(weights), out, first, count, healthy))
        return json.loads(out.read_text())

    assert run(3901, 2, 2)["mean_dice"] == {"fused": 1}
    with pytest.raises(KeyboardInterrupt):
        run(3902, 4, 1)
    assert [case["seed"] for case in json.loads(out.read_text())["cases"]] == [3901, 3902, 3903]
    told = run(3902, 4, 1)
    assert judged == [3901, 3902, 3903, 3904, 3904, 3905]
    assert [case["seed"] for case in told["cases"]] == [3901, 3902, 3903, 3904, 3905]
    assert (told["mean_dice"], told["large_lesions"]) == ({"fused": 0.7}, 5)
    assert [run["command"].split(maxsplit=3)[3] for run in told["runs"]] == [
        "--first-seed 3901 --count 2 --healthy 2",
        "--first-seed 3902 --count 4 --healthy 1",
    ]
    with pytest.raises(ValueError, match=r"seed 3901 with another --healthy.*another --out"):
        run(3901, 1, 0)
    manifest = weights / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(ValueError, match=r"other weights.*another --out"):
        run(3901, 1, 1)


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


def test_the_dataset_for_nnunet_holds_no_label_of_a_scan_to_predict(tmp_path: Path) -> None:
    for folder, end in (("images", "_0000"), ("labels", "")):
        (tmp_path / "sts" / folder).mkdir(parents=True)
        for name in "ABC":
            (tmp_path / "sts" / folder / f"{name}{end}.nii.gz").write_text(name)
    (tmp_path / "splits.json").write_text(json.dumps({"sts": {"train": ["A", "B"], "val": ["C"]}}))
    raw = tmp_path / "raw"
    for _ in range(2):  # again over an older one
        nnunet.write_dataset(tmp_path, raw)
    found = {folder: sorted(path.name for path in (raw / folder).iterdir()) for folder in ("imagesTr", "labelsTr")}
    assert found == {"imagesTr": ["A_0000.nii.gz", "B_0000.nii.gz"], "labelsTr": ["A.nii.gz", "B.nii.gz"]}
    assert [path.read_text() for path in (raw / "imagesTs").iterdir()] == ["C"]
    (tmp_path / "sts" / "labels" / "B.nii.gz").unlink()
    for data, told_of in (
        (tmp_path / "gone", "gone/splits.json: cannot be read"),
        (tmp_path, "B.nii.gz: no such file"),
    ):
        with pytest.raises(ValueError, match=told_of):
            nnunet.write_dataset(data, raw)
    told = json.loads((raw / "dataset.json").read_text())
    assert (told["numTraining"], told["labels"], told["file_ending"]) == (2, {"background": 0, "lesion": 1}, ".nii.gz")


def test_drift_by_hand() -> None:
    """Peaks of the ten cases after the first 20 are 100 MiB, of the last ten 102; a file more. Not the rest."""
    looks = [soak.Look(done, mib, 5) for done in range(50) for mib in (60.0, 100.0 if done < 30 else 500.0)]
    looks += [soak.Look(done, mib, 6) for done in range(50, 60) for mib in (102.0, 50.0, 50.0)]
    told = soak.drift([*looks, soak.Look(60, 700.0, 6)], 60)
    assert told == {"early_mib": 100, "late_mib": 102, "drift_percent": 2, "more_files": 1}
    for cases in (0, 39):
        with pytest.raises(ValueError, match=f"--cases {cases}: too few"):
            soak.Settings(cases)
    with pytest.raises(RuntimeError, match="was not looked at"):
        soak.drift(looks[:10], 60)


def test_a_short_soak(random_weights: Path, tmp_path: Path) -> None:
    soak.main(soak.Settings(60, str(random_weights), tmp_path / "soak.json"))
    told = json.loads((tmp_path / "soak.json").read_text())
    assert told["early_mib"] > 50
    assert told["more_files"] <= 1
    assert (tmp_path / "soak.png").stat().st_size > 5000


def test_ratios_and_more_slices_by_hand() -> None:
    found = {"small": {"seconds": 10.0, "peak_mib": 500.0}, "nnU-Net": {"seconds": 35.0, "peak_mib": 2000.0}}
    assert peers.ratios(found) == {"small": {"seconds": 1, "peak_mib": 1}, "nnU-Net": {"seconds": 3.5, "peak_mib": 4}}
    few, more = {"seconds": 30.0, "peak_mib": 7}, {"seconds": 50.0, "peak_mib": 8, "ram_mib_s": 400.0}
    told = peers.continued(few, more, slices=4, all_slices=100)  # 5 s a slice, and 10 for the start
    assert told == {"seconds": 510.0, "peak_mib_of_few": 8}


def test_what_differs_between_two_runs_is_counted(random_weights: Path, tmp_path: Path) -> None:
    write_scans(tmp_path / "in", [(40, 36, 4), (30, 36, 5)])
    scans = sorted((tmp_path / "in").iterdir())
    plain, again = (reproducibility.masks(Pipeline, random_weights, scans, tmp_path / name) for name in "ab")
    told = reproducibility.compare(scans, plain, again)
    assert (told["same_bytes"], told["least_dsc"], told["voxels"]) == (2, 1, 0)
    volume = read_volume(scans[0])
    for mask, voxels in ((plain[0], 3), (again[0], 2)):
        write_mask(np.arange(volume.hu.size).reshape(volume.hu.shape) < voxels, volume.geometry, mask)
    told = reproducibility.compare(scans[:1], plain[:1], again[:1])
    assert told == {"same_bytes": 0, "least_dsc": 0.8, "voxels": 1, "of": 3}  # 2 · 2 / (3 + 2)


def test_a_process_is_measured_by_itself(random_weights: Path, tmp_path: Path) -> None:
    write_scans(tmp_path / "in", [(40, 36, 4)])
    ballast = np.ones(2**27)  # 1 GiB that is not the program's
    told = scaling.measure(tmp_path / "in", tmp_path / "out", str(random_weights))
    assert 0.5 < told["seconds"] < 100
    assert 50 < told["peak_mib"] < ballast.nbytes / 2**20
    with pytest.raises(RuntimeError, match="the program ended with 2"):
        scaling.measure(tmp_path / "gone", tmp_path / "out", str(random_weights))


def test_a_stack_computes_less_than_its_windows(tmp_path: Path) -> None:
    """Three slices: a stack of seven, or three windows of five."""
    config = HybridConfig(32, 4, 2, 0, cnn_width=4, prompt_dim=16)
    settings = stacked.Settings(targets=3, rounds=1, out=tmp_path / "x.json")
    told = stacked.measure(config, settings)
    assert told["stack"]["gmac"] < told["windows"]["gmac"] < told["five passes"]["gmac"]
    found = stacked.ways(config, settings)
    assert [part.shape[:2] for part in found["windows"].parts] == [(1, 5)] * 3
    assert found["stack"].run().shape == (3, 256, 256)


def test_eight_bits_are_compared_with_float(random_weights: Path) -> None:
    """Of random weights: near to what it was, but not the same; a network beside itself is the same."""
    manifest = read_manifest(random_weights)
    content = manifest.read("unet")
    scan = make_phantom(3, healthy=False, scanner=Scanner((8, 40, 48), (6.0, 8.0, 7.0), top_mm=100.0))
    plain, listening = (UNet(content, manifest.unet) for _ in range(2))
    listening.session = heard = int8.Listening(content)
    np.testing.assert_array_equal(int8.ask(listening, scan).grid, int8.ask(plain, scan).grid)
    assert heard.shown
    eight = UNet(int8.in_eight_bits(content, heard.shown[:2]), manifest.unet)
    told = int8.compare({"float32": plain, "int8": eight}, scan, rounds=1)
    assert 0 < told["largest_difference"] < 0.2
    same = int8.compare({"one": plain, "other": listening}, scan, rounds=2)
    assert (same["dice"], same["largest_difference"]) == (1, 0)
    assert same["times_faster"] == pytest.approx(same["seconds"]["one"] / same["seconds"]["other"], rel=0.1)
