"""What a folder says of its scans, and the arrays that are made of them."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from inference.unet import UNetConfig
from training.anatomy import Organ
from training.cache import place, prepare
from training.data import COLUMNS, load_case, read_folder, split
from training.hybrid_data import StackSampler, slice_cases
from training.organs import UNKNOWN
from training.unet_data import PatchSampler, grid_cases


@pytest.fixture
def own(folder, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


def write_rows(folder: Path, **rows: str) -> None:
    """cases.csv; a row is "annotated healthy lesion_type"."""
    with (folder / "cases.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([name, *row.split()] for name, row in rows.items())


def test_cases_are_found_and_aligned(folder) -> None:
    entries = read_folder(folder)
    assert [entry.name for entry in entries] == [f"c{i}" for i in range(6)]
    assert all(entry.annotated == "complete" and not entry.healthy for entry in entries)
    case = load_case(entries[1])
    assert case.hu[case.label > 0].min() > 90 > case.hu[case.label == 0].max()
    with pytest.raises(ValueError, match="imagesTr"):
        read_folder(folder / "labelsTr")


def test_organs_are_known_or_said_not_to_be(folder) -> None:
    entries = read_folder(folder)
    assert set(np.unique(load_case(entries[1]).organs)) == {Organ.LIVER, Organ.SPLEEN}
    assert set(np.unique(load_case(entries[5]).organs)) == {UNKNOWN}


def test_unlabelled_scans_are_there_but_teach_nothing(own) -> None:
    (own / "labelsTr" / "c1.nii.gz").unlink()
    entries = {entry.name: entry for entry in read_folder(own)}
    assert entries["c1"].annotated == "none"
    assert not entries["c1"].teaches
    write_rows(own, c0="partial 0 liver", c1="none 1 none", c2="1 0 lung")
    entries = {entry.name: entry for entry in read_folder(own)}
    assert [(entries[name].annotated, entries[name].complete) for name in ("c0", "c1", "c2", "c3")] == [
        ("partial", False), ("none", True), ("complete", True), ("complete", True)
    ]  # fmt: skip
    assert entries["c1"].teaches
    assert not load_case(entries["c1"]).label.any()


def test_every_bad_case_is_listed(own) -> None:
    (own / "labelsTr" / "c1.nii.gz").unlink()
    write_rows(own, c0="some 0 liver", c1="complete 0 liver", c2="partial 1 none", c3="1 no x", c9="1 0 liver")
    with pytest.raises(ValueError) as error:  # noqa: PT011  every line is looked at below
        read_folder(own)
    said = str(error.value).splitlines()
    assert str(own) in said[0]
    assert [line.strip().split(":")[0] for line in said[1:]] == ["c9", "c0", "c1", "c2", "c3"]
    (own / "cases.csv").write_text("case,healthy\n")
    with pytest.raises(ValueError, match="no column annotated, lesion_type"):
        read_folder(own)


def test_whole_patients_are_kept_for_validation(folder, own) -> None:
    """c4 and c5 are one patient in one of the two folders: three cases to keep are two of each folder, at least."""
    rows = [f"c{i},complete,0,liver,{'twin' if i > 3 else ''}" for i in range(6)]
    (own / "cases.csv").write_text("\n".join([",".join([*COLUMNS, "patient"]), *rows]) + "\n")
    training, held_out = split((folder, own), 3)
    assert [entry.name for entry in training] == ["c0", "c1", "c2", "c3"] * 2
    assert [entry.name for entry in held_out] == ["c4", "c5"] * 2
    assert [entry.name for entry in split((own,), 1)[1]] == ["c4", "c5"]
    assert [entry.name for entry in split((own,), 3)[1]] == ["c3", "c4", "c5"]
    with pytest.raises(ValueError, match="too few to keep 6"):
        split((folder,), 6)


def test_who_judges_in_one_folder_is_not_trained_on_in_another(folder, own) -> None:
    """Lesions drawn into scans of c1 and c5, of whom c5 is kept out of the other folder."""
    rows = [f"c{i},complete,0,liver,{patient}" for i, patient in enumerate(("c1", "c5", "c5", "c1", "c9", "c9"))]
    (own / "cases.csv").write_text("\n".join([",".join([*COLUMNS, "patient"]), *rows]) + "\n")
    training, held_out = split((folder, own), 2)
    assert [(e.source.name, e.name) for e in held_out] == [(folder.name, "c5"), ("own", "c4"), ("own", "c5")]
    assert [e.name for e in training if e.source.name == "own"] == ["c0", "c3"]
    assert [e.name for e in training if e.source.name != "own"] == ["c0", "c1", "c2", "c3", "c4"]
    training, _ = split((own, folder), 2)
    assert [e.name for e in training if e.source.name == "own"] == ["c0", "c3"]


def test_beyond_an_unknown_organ_map_nothing_is_known(folder, own, tmp_path) -> None:
    """A patch that hangs over the edge has air there, or nothing that is told where the scan's organs are unknown."""
    (own / "organsTr" / "c1.nii.gz").unlink()
    entries = [read_folder(root)[1] for root in (folder, own)]
    config = UNetConfig()
    for entry, outside in zip(entries, (Organ.AIR, UNKNOWN), strict=True):
        cases = grid_cases([entry], tmp_path / "grid", config)
        assert max(cases[0].organs.shape) < 128
        drawn = PatchSampler(cases, config, seed=0).batch(0, range(2), (16, 128, 128)).organs
        assert set(np.unique(drawn)) <= {outside, *np.unique(cases[0].organs)}
        assert (drawn == outside).any()
        sampler = StackSampler(slice_cases([entry], tmp_path / "slices", ("axial", "square", 0)), 2, 2, seed=4)
        assert (sampler.batch(0, range(8)).organs == UNKNOWN).all() == (outside == UNKNOWN)


def test_a_folder_that_teaches_nothing_is_named(folder, own, tmp_path) -> None:
    for label in (own / "labelsTr").iterdir():
        image = nib.load(label)
        nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), label)
    write_rows(own, **{f"c{i}": "partial 0 liver" for i in range(6)})
    cases = slice_cases([*read_folder(folder), *read_folder(own)], tmp_path / "cache", ("axial", "square", 0))
    with pytest.raises(ValueError, match=r"own: no scan has a lesion, or is known to have none: leave this folder out"):
        StackSampler(cases, 2, 2, 0, (1.0, 1.0))


def arrays_of(case) -> dict[str, np.ndarray]:
    return {"hu": case.hu, "label": case.label}


def test_the_cache_is_made_once_and_again_where_a_file_changes(own, tmp_path) -> None:
    entries = read_folder(own)
    first = dict(prepare(entries, tmp_path / "cache", arrays_of))
    assert isinstance(first[entries[0]]["hu"], np.memmap)
    made = place(tmp_path / "cache", entries[0]).stat().st_mtime_ns
    list(prepare(entries, tmp_path / "cache", arrays_of))
    assert place(tmp_path / "cache", entries[0]).stat().st_mtime_ns == made
    shutil.copy(own / "labelsTr" / "c1.nii.gz", own / "labelsTr" / "c0.nii.gz")
    changed = dict(prepare(read_folder(own), tmp_path / "cache", arrays_of, jobs=2))
    assert np.array_equal(changed[entries[0]]["label"], first[entries[1]]["label"])
    assert len(list((tmp_path / "cache").iterdir())) == 7


def test_the_cache_lists_every_case_that_cannot_be_read(own, tmp_path) -> None:
    write_rows(own, c0="none 1 none")
    for name in ("c2", "c4"):
        (own / "imagesTr" / f"{name}_0000.nii.gz").write_bytes(b"no scan")
    with pytest.raises(ValueError) as error:  # noqa: PT011  every line is looked at below
        list(prepare(read_folder(own), tmp_path / "cache", arrays_of))
    said = str(error.value).splitlines()
    assert [line.strip().split(":")[0] for line in said[1:]] == ["c0", "c2", "c4"]
    assert "calls healthy" in said[1]
    assert sorted(path.name[:2] for path in (tmp_path / "cache").iterdir()) == ["c1", "c3", "c5"]


def test_the_classifier_learns_only_from_slices_whose_truth_is_known(own, tmp_path) -> None:
    write_rows(own, **{f"c{i}": "partial 0 liver" for i in range(5)}, c5="none 1 none")
    cases = slice_cases(read_folder(own), tmp_path / "cache", ("axial", "square", 0))
    sampler = StackSampler(cases, 3, 2, seed=0)
    ((only_healthy,),) = sampler.healthy
    assert (only_healthy.organs == UNKNOWN).any()  # c5 alone has no organs
    stacks = sampler.batch(0, range(24))
    present = stacks.label.flatten(2).any(2)
    assert stacks.known[present].all()
    healthy = (stacks.organs == UNKNOWN).flatten(1).any(1)
    assert stacks.known[healthy].all()
    assert not stacks.known[~healthy][~present[~healthy]].any()


def test_lung_lesions_are_also_seen_in_the_lung_window(own, tmp_path) -> None:
    """Outside the lesion the scan has 0 HU: 200 / 500 of the tissue window, 1300 / 1600 of the lung window."""
    write_rows(own, **{f"c{i}": "1 0 lung" for i in range(4)}, c4="none 1 none", c5="none 1 none")
    (case,) = slice_cases(read_folder(own)[:1], tmp_path / "cache", ("axial", "square", 0))
    body = (case.organs == Organ.SPLEEN) & (case.tissue > 0)
    assert np.median(case.tissue[body]) == pytest.approx(255 * 200 / 500, abs=3)
    assert np.median(case.lung[body]) == pytest.approx(255 * 1300 / 1600, abs=3)
    sampler = StackSampler([case], 3, 2, seed=0)
    medians = [float(stack[stack > 0].median()) for stack in sampler.batch(0, range(40)).image]
    assert 0.3 < np.mean(np.array(medians) > 0.65) < 0.7


def test_a_member_of_a_batch_is_the_same_whoever_asks(folder, tmp_path) -> None:
    sampler = StackSampler(slice_cases(read_folder(folder), tmp_path / "cache", ("axial", "square", 0)), 2, 2, seed=4)
    whole, odd = sampler.batch(7, range(4)), sampler.batch(7, range(1, 4, 2))
    assert all((a[1::2] == b).all() for a, b in zip(whole, odd, strict=True))
    assert not (sampler.batch(8, range(4)).image == whole.image).all()
