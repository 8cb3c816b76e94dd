"""What costs points, judged on runs and masks made by hand; images themselves are run in tests/container."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from eval.containers import Container, Run
from eval.docker_client import load_archive, loaded_names
from eval.efficiency import CaseEfficiency, Measurement
from eval.findings import (
    Finding,
    device_settings,
    differ,
    is_root,
    judge_image,
    judge_masks,
    judge_name,
    judge_runs,
    scan_grid,
    team_name,
)
from eval.masks import Mask, read_mask
from eval.sampler import Sample
from eval.submission import MEMORY_CHECK, NETWORK_CHECK, Settings, find_restriction, judge_restrictions
from eval.usage import usage_of

AFFINE = np.array([[-0.8, 0, 0, 100], [0, -0.8, 0, 90], [0, 0, 5, -300], [0, 0, 0, 1.0]])


def save(path: Path, voxels: Any, affine: Any = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(np.asarray(voxels), affine), path)
    return path


def case(name: str = "a", gpu_mib: float | None = 1000.0, **changes: Any) -> CaseEfficiency:
    """A case with nothing amiss, but for the changes."""
    samples = (Sample(0.0, gpu_mib, 1.0, 1.0),)
    idle_mib = None if gpu_mib is None else 300.0
    plain: dict[str, Any] = {"exit_code": 0, "time_s": 10.0, "mask": Path("a.nii.gz"), "mask_s": 9.0, "stray": ()}
    run = Run(command="", samples=samples, idle_gpu_mib=idle_mib, output="", **{**plain, **changes})
    return CaseEfficiency(f"{name}_0000.nii.gz", run, usage_of(samples, idle_mib))


def faults(findings: list[Finding]) -> dict[str, tuple[str, ...]]:
    """Of those that cost points."""
    return {finding.check: finding.faults for finding in findings if finding.faults}


def test_name_of_the_team() -> None:
    names = {"team.tar.gz": "team", "Team_A.v2.tar.gz": "team_a", "folder.d/TEAM.tgz": "team"}
    assert {path: team_name(Path(path)) for path in names} == names
    with pytest.raises(ValueError, match=r"NAME\.tar\.gz"):
        team_name(Path("x/.tar.gz"))


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("Loaded image: team:latest\n", ["team:latest"]),
        ("a1b2: Loading layer\nLoaded image: team:latest\nLoaded image: team:v2\n", ["team:latest", "team:v2"]),
        ("Loaded image: docker.io/library/team:latest", ["team:latest"]),  # podman
        ("Loaded image: docker.io/library/team:latest,localhost/x:1", ["team:latest", "localhost/x:1"]),
        ("Loaded image: docker.io/group/team:latest", ["group/team:latest"]),
        ("Loaded image ID: sha256:0123\n", ["sha256:0123"]),
        ("", []),
    ],
)
def test_names_that_an_archive_held(said: str, names: list[str]) -> None:
    assert loaded_names(said) == names


def test_wrong_image_name() -> None:
    assert judge_name("team", ["other:1", "team:latest"]).verdict == "PASS"
    for loaded in (["Team:latest"], ["team:v1"], ["localhost/team:latest"], ["sha256:0123"], []):
        finding = judge_name("team", loaded)
        assert finding.verdict == "COSTS POINTS"
        assert all(name in str(finding) for name in loaded)


def test_users() -> None:
    assert all(is_root(user) for user in ("", "root", "0", "0:0", "root:users"))
    assert not any(is_root(user) for user in ("1000", "app", "1000:0", "rooted"))


def test_a_good_image() -> None:
    config = {"User": "", "Env": ["PATH=/bin", "NVIDIA_VISIBLE_DEVICES=all"], "WorkingDir": "/workspace"}
    findings = judge_image(config, "#!/bin/sh\nexec python -m inference\n")
    assert {finding.verdict for finding in findings} == {"PASS"}


def test_a_bad_image() -> None:
    found = faults(judge_image({"User": "app", "Env": ["CUDA_VISIBLE_DEVICES=1"]}, None))
    assert len(found) == 3
    assert "/ holds none" in found["predict.sh is in the working folder"][0]
    assert found["CUDA_VISIBLE_DEVICES is left alone"] == ("the image sets CUDA_VISIBLE_DEVICES=1",)


@pytest.mark.parametrize(
    ("line", "sets"),
    [
        ("export CUDA_VISIBLE_DEVICES=0", True),
        ("CUDA_VISIBLE_DEVICES=0 python run.py", True),
        ("env CUDA_VISIBLE_DEVICES= python run.py", True),
        ("# export CUDA_VISIBLE_DEVICES=0", False),
        ("python run.py  # not CUDA_VISIBLE_DEVICES=0", False),
        ('echo "$CUDA_VISIBLE_DEVICES"', False),
        ("unset CUDA_VISIBLE_DEVICES", False),
        ("MY_CUDA_VISIBLE_DEVICES=0", False),
    ],
)
def test_cuda_visible_devices_in_predict_sh(line: str, sets: bool) -> None:
    found = device_settings({"Env": None}, f"#!/bin/sh\n{line}\n")
    assert found == (["line 2 of predict.sh sets it"] if sets else [])


def test_runs_with_nothing_amiss() -> None:
    assert {finding.verdict for finding in judge_runs([case("a"), case("b")])} == {"PASS"}


def test_missing_masks() -> None:
    none = {"mask": None, "mask_s": None}
    cases = [case("a", exit_code=7, **none), case("b", **none), case("c", exit_code=None, **none), case("d")]
    found = faults(judge_runs(cases))["every case has its mask"]
    assert found == ("a: exit code 7", "b: no mask", "c: timeout")


def test_stray_outputs() -> None:
    found = faults(judge_runs([case("a"), case("b", stray=("log.txt", "b.npz"))]))
    assert found == {"nothing but the masks is left in outputs/": ("b: log.txt, b.npz",)}


def test_time_limits() -> None:
    cases = [case("a", time_s=45.0), case("b", time_s=45.1), case("c", time_s=60.1), case("d", exit_code=None)]
    found = faults(judge_runs(cases))
    assert [fault[0] for fault in found["a case takes at most 45 s"]] == ["b", "c", "d"]
    assert found["a case takes at most 60 s"] == ("c: 60.1 s", "d: 10.0 s and killed")


def test_gpu_memory() -> None:
    found = faults(judge_runs([case("a", gpu_mib=4096.0), case("b", gpu_mib=4097.0)]))
    assert found == {
        "a case takes at most 4096 MiB of GPU memory": ("b: 4097 MiB, 300 MiB of them in use before the start",)
    }
    (memory,) = [finding for finding in judge_runs([case(gpu_mib=None)]) if "GPU" in finding.check]
    assert memory.verdict == "NOT CHECKED"


def test_masks_with_nothing_amiss(tmp_path: Path) -> None:
    scan = save(tmp_path / "a_0000.nii.gz", np.full((4, 3, 2), -1000, np.int16))
    mask = read_mask(save(tmp_path / "a.nii.gz", np.ones((4, 3, 2), np.uint8)))
    assert {finding.verdict for finding in judge_masks({"a": mask}, {"a": scan_grid(scan)})} == {"PASS"}


def test_masks_with_faults(tmp_path: Path) -> None:
    zeros, shifted = np.zeros((4, 3, 2)), AFFINE.copy()
    shifted[0, 3] += 0.5
    masks: dict[str, Mask | str] = {
        "two": read_mask(save(tmp_path / "two.nii.gz", (zeros + 2).astype(np.uint8))),
        "minus": read_mask(save(tmp_path / "minus.nii.gz", (zeros - 1).astype(np.int16))),
        "float": read_mask(save(tmp_path / "float.nii.gz", zeros.astype(np.float32))),
        "half": read_mask(save(tmp_path / "half.nii.gz", (zeros + 0.5).astype(np.float32))),
        "shape": read_mask(save(tmp_path / "shape.nii.gz", np.zeros((3, 4, 2), np.uint8))),
        "shift": read_mask(save(tmp_path / "shift.nii.gz", zeros.astype(np.uint8), shifted)),
        "broken": "broken.nii.gz: cannot be read",
    }
    grid = scan_grid(save(tmp_path / "scan.nii.gz", zeros.astype(np.int16)))
    found = faults(judge_masks(masks, dict.fromkeys(masks, grid)))
    assert found["masks can be read"] == ("broken.nii.gz: cannot be read",)
    assert [fault.split(":")[0] for fault in found["labels are 0 and 1"]] == ["two", "minus"]
    assert [fault.split(":")[0] for fault in found["voxels are integers"]] == ["float", "half"]
    assert found["masks lie on their scan's grid"] == (
        "shape: (3, 4, 2) voxels, the scan has (4, 3, 2)",
        "shift: up to 0.50 mm off the scan's grid",
    )


def test_no_masks_at_all() -> None:
    assert {finding.verdict for finding in judge_masks({}, {})} == {"NOT CHECKED"}


def test_masks_differ_where_lesions_do(tmp_path: Path) -> None:
    voxels = np.zeros((10, 10, 2), np.uint8)
    voxels[:5] = 1  # 100 voxels
    nearly, half = voxels.copy(), voxels.copy()
    nearly[0, :5, 0] = 0  # Dice 2·95 / 195 = 0.974
    half[:, 5:] = 0
    full = read_mask(save(tmp_path / "full.nii.gz", voxels))
    assert not differ(full, read_mask(save(tmp_path / "nearly.nii.gz", nearly)))
    assert differ(full, read_mask(save(tmp_path / "half.nii.gz", half)))
    empty = read_mask(save(tmp_path / "empty.nii.gz", np.zeros_like(voxels)))
    assert not differ(empty, empty)
    assert differ(full, empty)
    assert differ(empty, read_mask(save(tmp_path / "small.nii.gz", np.zeros((10, 10, 1), np.uint8))))


def test_which_restriction_breaks_it() -> None:
    asked: list[str] = []

    def trial(broken: str, *, together: bool = False) -> dict[str, tuple[str, ...]]:
        def run(label: str, changes: dict[str, Any]) -> str:
            asked.append(label)
            return "fails" if broken in changes and (not together or len(changes) == 2) else ""

        return faults(find_restriction(run))

    assert trial("nothing") == {}
    assert asked == ["both"]  # one more run is all that a good image costs
    assert trial("network") == {NETWORK_CHECK: ("fails",)}
    assert trial("shared_memory") == {MEMORY_CHECK: ("fails",)}
    assert set(trial("network", together=True)) == {NETWORK_CHECK, MEMORY_CHECK}


def test_findings_read_well() -> None:
    assert str(Finding("it runs")) == "PASS          it runs"
    assert str(Finding("it runs", not_checked="no GPU")) == "NOT CHECKED   it runs: no GPU"
    many = Finding("it runs", ("a: 1", "b: 2", "c: 3", "d: 4", "e: 5"))
    assert str(many) == "COSTS POINTS  it runs: a: 1; b: 2; c: 3; and 2 more"
    assert many.to_dict()["faults"] == ["a: 1", "b: 2", "c: 3", "d: 4", "e: 5"]


def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "inputs"
    folder.mkdir()
    save(folder / "a_0000.nii.gz", np.zeros((4, 3, 2), np.int16))
    return folder


def test_no_archive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"team\.tar\.gz: no such file"):
        Settings(tmp_path / "team.tar.gz", scans(tmp_path), cpu_only=True).run()


def test_a_scan_that_cannot_be_read(tmp_path: Path) -> None:
    folder = scans(tmp_path)
    (folder / "b_0000.nii.gz").write_bytes(b"no scan")
    (tmp_path / "team.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b_0000\.nii\.gz: cannot be read"):
        Settings(tmp_path / "team.tar.gz", folder, cpu_only=True).run()


def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Puts a `docker` that is this shell script first on PATH."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_a_client_that_takes_no_gzip_gets_the_archive_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = '[ "$2" = -i ] && { echo no gzip >&2; exit 1; }; echo "Loaded image: $(cat):latest"'
    client(tmp_path, monkeypatch, refuses)
    archive = tmp_path / "team.tar.gz"
    archive.write_bytes(gzip.compress(b"team"))
    assert load_archive(archive) == ["team:latest"]
    archive.write_bytes(gzip.compress(os.urandom(1 << 16))[:-100])
    with pytest.raises(ValueError, match=r"team\.tar\.gz: its gzip data are damaged or cut short"):
        load_archive(archive)
    archive.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"team\.tar\.gz: docker load fails \(no gzip\)"):
        load_archive(archive)


def test_restricted_runs_of_another_case_than_last_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a team mends the case that was the first to be done. The client here copies scans, and runs nothing."""
    client = tmp_path / "docker"
    client.write_text(
        "#!/bin/sh\nfor word; do case $word in */:/workspace/inputs/) from=${word%/:*};; "
        "*/:/workspace/outputs/) to=${word%/:*};; esac; done\n"
        'for scan in "$from"/*; do cp "$scan" "$to/$(basename "$scan" _0000.nii.gz).nii.gz"; done\n'
    )
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "in").mkdir()
    for name in "ab":
        save(tmp_path / "in" / f"{name}_0000.nii.gz", np.ones((2, 2, 2), np.uint8))
    runner = Container("team:latest", None)
    official = Measurement("team", runner, tmp_path / "in", tmp_path / "out", None, 60)
    for one in official.run():
        assert [finding.verdict for finding in judge_restrictions(official, runner, one)] == ["PASS", "PASS"]
    assert [path.name for path in (tmp_path / "out/restricted/both/masks").iterdir()] == ["b.nii.gz"]
