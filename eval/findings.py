"""What would cost a submission points: pure judgements on what its image, its runs and its masks were found to be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from .efficiency import CaseEfficiency
from .masks import FOURTH_AXIS, GRID_TOLERANCE_MM, UNREADABLE, Mask, grid_distance_mm
from .usage import HARD_STOP_S, MEMORY_LIMIT_MIB, TIME_LIMIT_S

SHOWN = 3  # faults printed of one check; submission.json holds all
SAME_MASK_DICE = 0.95  # arithmetic on a GPU may turn a voxel at an edge from one run to the next, not a lesion
SETS_DEVICES = re.compile(r"\bCUDA_VISIBLE_DEVICES=")


@dataclass(frozen=True)
class Finding:
    """One check. faults: what is amiss, in words; not_checked: why nothing can be said; note: what is good to know."""

    check: str
    faults: tuple[str, ...] = ()
    not_checked: str = ""
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.faults:
            return "COSTS POINTS"
        return "NOT CHECKED" if self.not_checked else "PASS"

    def __str__(self) -> str:
        more = len(self.faults) - SHOWN
        said = [*self.faults[:SHOWN], *([f"and {more} more"] if more > 0 else [])] or [self.not_checked or self.note]
        return f"{self.verdict:12}  {self.check}" + (f": {'; '.join(said)}" if any(said) else "")

    def to_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, **vars(self), "faults": list(self.faults)}


def team_name(archive: Path) -> str:
    """The image's name that graders derive: the archive's up to its first dot, in lower case. ValueError if empty."""
    name = archive.name.split(".")[0].lower()
    if not name:
        raise ValueError(f"{archive}: no name before the first dot: call it NAME.tar.gz")
    return name


def judge_name(name: str, loaded: Sequence[str]) -> Finding:
    """loaded: what the archive held, as NAME:TAG."""
    held = ", ".join(loaded) or "nothing with a name"
    fault = (
        ()
        if f"{name}:latest" in loaded
        else (f"the archive holds {held}: docker tag it, and docker save {name}:latest",)
    )
    return Finding(f"the archive holds {name}:latest", fault)


def judge_image(config: Mapping[str, Any], script: str | None) -> list[Finding]:
    """config: the image's `Config`; script: the text of predict.sh in its working folder, None where there is none."""
    folder, user = config.get("WorkingDir") or "/", config.get("User") or "root"
    missing = () if script is not None else (f"{folder} holds none, so `sh predict.sh` cannot start",)
    outsider = () if is_root(user) else (f"it is {user}, who cannot write into outputs/, which root owns (mode 0755)",)
    return [
        Finding("predict.sh is in the working folder", missing),
        Finding("the default user is root", outsider),
        Finding("CUDA_VISIBLE_DEVICES is left alone", tuple(device_settings(config, script or ""))),
    ]


def is_root(user: str) -> bool:
    """`Config.User` as USER or USER:GROUP, by name or number; empty is root."""
    return user.partition(":")[0] in ("", "0", "root")


def device_settings(config: Mapping[str, Any], script: str) -> list[str]:
    """Where the image's environment or its predict.sh sets CUDA_VISIBLE_DEVICES; a comment sets nothing."""
    found = [f"the image sets {line}" for line in config.get("Env") or () if SETS_DEVICES.match(line)]
    lines = enumerate(script.splitlines(), 1)
    return found + [f"line {n} of predict.sh sets it" for n, line in lines if SETS_DEVICES.search(_code(line))]


def _code(line: str) -> str:
    return re.split(r"(?:^|\s)#", line)[0]


def judge_runs(cases: Sequence[CaseEfficiency]) -> list[Finding]:
    """From the official runs: masks there, nothing else, time, memory of the GPU."""
    return [
        Finding("every case has its mask", tuple(f"{case.case}: {_missing(case)}" for case in cases if _missing(case))),
        Finding(
            "nothing but the masks is left in outputs/",
            tuple(f"{case.case}: {', '.join(case.run.stray)}" for case in cases if case.run.stray),
        ),
        _judge_time(cases, TIME_LIMIT_S),
        _judge_time(cases, HARD_STOP_S),
        _judge_memory(cases),
    ]


def _missing(case: CaseEfficiency) -> str:
    return "" if case.run.mask else {"failed": f"exit code {case.run.exit_code}"}.get(case.run.status, case.run.status)


def _judge_time(cases: Sequence[CaseEfficiency], limit_s: float) -> Finding:
    slow = (case for case in cases if case.run.time_s > limit_s or case.run.timed_out)
    faults = (f"{case.case}: {case.run.time_s:.1f} s{' and killed' * case.run.timed_out}" for case in slow)
    longest = max(case.run.time_s for case in cases)
    return Finding(
        f"a case takes at most {limit_s:g} s", tuple(faults), note=f"{longest:.1f} s at most on this machine"
    )


def _judge_memory(cases: Sequence[CaseEfficiency]) -> Finding:
    check = f"a case takes at most {MEMORY_LIMIT_MIB:g} MiB of GPU memory"
    peaks = {case.case: case.usage.max_gpu_mib for case in cases if case.usage.max_gpu_mib is not None}
    if not peaks:
        return Finding(check, not_checked="no GPU was measured")
    idle = max(case.run.idle_gpu_mib or 0 for case in cases)
    before = f", {idle:.0f} MiB of them in use before the start" if idle >= 1 else ""
    faults = (f"{case}: {peak:.0f} MiB{before}" for case, peak in peaks.items() if peak > MEMORY_LIMIT_MIB)
    return Finding(check, tuple(faults), note=f"{max(peaks.values()):.0f} MiB at most{before}")


@dataclass(frozen=True)
class Grid:
    """Of a scan: its voxels along (i, j, k), and the affine (4, 4) from voxel indices to RAS mm."""

    shape: tuple[int, ...]
    affine: NDArray[np.float64]


def scan_grid(scan: Path) -> Grid:
    """The grid in a scan's header. ValueError where it cannot be read."""
    try:
        image = nib.Nifti1Image.from_filename(scan)
    except UNREADABLE as error:
        raise ValueError(f"{scan}: cannot be read as a NIfTI scan: replace it, or leave it out") from error
    return Grid(tuple(image.shape[:3]), np.asarray(image.affine, float))


def judge_masks(masks: Mapping[str, Mask | str], grids: Mapping[str, Grid]) -> list[Finding]:
    """masks: by case, or the sentence that says why one cannot be read; grids: of the scans, by case."""
    if not masks:
        checks = ("masks can be read", "masks lie on their scan's grid", "labels are 0 and 1", "voxels are integers")
        return [Finding(check, not_checked="there is no mask") for check in checks]
    read = {case: mask for case, mask in masks.items() if isinstance(mask, Mask)}
    notes = [(case, note) for case, mask in read.items() for note in mask.notes if note != FOURTH_AXIS]
    apart = ((case, _off_grid(mask, grids[case])) for case, mask in read.items())
    return [
        Finding("masks can be read", tuple(mask for mask in masks.values() if isinstance(mask, str))),
        Finding("masks lie on their scan's grid", tuple(f"{case}: {fault}" for case, fault in apart if fault)),
        Finding("labels are 0 and 1", tuple(f"{case}: {note}" for case, note in notes if "labels" in note)),
        Finding("voxels are integers", tuple(f"{case}: {note}" for case, note in notes if "labels" not in note)),
    ]


def _off_grid(mask: Mask, grid: Grid) -> str:
    if mask.voxels.shape != grid.shape:
        return f"{mask.voxels.shape} voxels, the scan has {grid.shape}"
    if FOURTH_AXIS in mask.notes:
        return FOURTH_AXIS
    apart_mm = grid_distance_mm(mask.affine, grid.affine, grid.shape)
    return "" if apart_mm <= GRID_TOLERANCE_MM else f"up to {apart_mm:.2f} mm off the scan's grid"


def differ(mask: Mask, other: Mask) -> bool:
    """Whether two masks of one scan disagree by more than a run's own noise."""
    if mask.voxels.shape != other.voxels.shape:
        return True
    a, b = mask.voxels > 0, other.voxels > 0
    return 2 * int((a & b).sum()) < SAME_MASK_DICE * (int(a.sum()) + int(b.sum()))
