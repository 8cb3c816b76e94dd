"""What an upload would lose points for, before it is uploaded.

    python -m eval submission NAME.tar.gz --inputs DIR

Loads the archive, runs its image on every scan as graders do, once more on one scan without network and with 64 MB of
shared memory, and lists what would cost points. The image stays loaded.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tyro

from . import accuracy
from .cases import files_by_case, read_json, write_json
from .containers import Container
from .docker_client import check_docker, file_in_image, image_config, load_archive
from .efficiency import CaseEfficiency, Measurement, check_timeout, chosen_gpu
from .findings import (
    Finding,
    Grid,
    differ,
    judge_image,
    judge_masks,
    judge_name,
    judge_runs,
    scan_grid,
    team_name,
)
from .masks import Mask, read_mask
from .usage import HARD_STOP_S

NETWORK_CHECK = "it runs without network"
MEMORY_CHECK = "it runs with 64 MB of shared memory"

Trial = Callable[[str, dict[str, Any]], str]  # label, changes to the official run → what broke, or ""


@dataclass(frozen=True)
class Settings:
    """Load an archive, run it as graders do, and list what would cost points."""

    archive: tyro.conf.Positional[Path]  # NAME.tar.gz, of docker save NAME:latest
    inputs: Path  # folder of scans, X_0000.nii.gz
    references: Path | None = None  # folder of X.nii.gz, to score the masks against
    out: Path | None = None  # folder for submission.json and all that `efficiency` writes; as a rule NAME_check
    gpu: int | None = None  # index of the GPU to use and to measure; as a rule 0, where there is one
    cpu_only: bool = False  # neither use nor measure a GPU
    timeout_s: float = HARD_STOP_S  # a case that runs longer is killed

    def run(self) -> int:
        check_timeout(self.timeout_s)
        if not self.archive.is_file():
            raise ValueError(f"{self.archive}: no such file: docker save NAME:latest | gzip > NAME.tar.gz")
        name = team_name(self.archive)
        grids = {case: scan_grid(scan) for case, scan in files_by_case(self.inputs, "scan").items()}
        if self.references is not None:
            files_by_case(self.references, "reference")
        gpu = chosen_gpu(self.gpu, self.cpu_only)
        check_docker()
        print(f"{self.archive}: loading", file=sys.stderr)
        loaded = load_archive(self.archive)
        image = _image_to_run(name, loaded, self.archive)
        runner = Container(image, None if gpu is None else gpu.index)
        official = Measurement(name, runner, self.inputs, self.out or Path(f"{name}_check"), gpu, self.timeout_s)
        (official.out / "submission.json").unlink(missing_ok=True)  # an earlier one must not pass for this run's
        findings = [judge_name(name, loaded), *_look_at(image), *self._run(official, runner, grids)]
        return self._report(official, image, findings)

    def _run(self, official: Measurement, runner: Container, grids: dict[str, Grid]) -> list[Finding]:
        cases = official.run()
        masks = {case.case: _read(official.mask(case.case)) for case in cases if case.run.mask is not None}
        first = next((case for case in cases if case.run.status == "done"), cases[0])
        findings = [*judge_runs(cases), *judge_masks(masks, grids), *judge_restrictions(official, runner, first)]
        if self.references is not None:
            findings.append(_score(official, self.references, bool(masks)))
        return findings

    def _report(self, official: Measurement, image: str, findings: list[Finding]) -> int:
        amiss = sum(bool(finding.faults) for finding in findings)
        values = {
            "archive": str(self.archive.resolve()),
            "name": official.name,
            "image": image,
            "inputs": str(self.inputs.resolve()),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "passed": not amiss,
            "findings": [finding.to_dict() for finding in findings],
        }
        write_json(official.out / "submission.json", values)
        print(*findings, sep="\n")
        print(f"{amiss} of {len(findings)} checks cost points; results in {official.out}")
        return 1 if amiss else 0


def _image_to_run(name: str, loaded: list[str], archive: Path) -> str:
    """The image that graders would run, or else the archive's first, so that the rest can be checked too."""
    if not loaded:
        raise ValueError(f"{archive}: docker load names no image in it: docker save {name}:latest")
    return f"{name}:latest" if f"{name}:latest" in loaded else loaded[0]


def _look_at(image: str) -> list[Finding]:
    config = image_config(image)
    folder = (config.get("WorkingDir") or "/").rstrip("/")
    return judge_image(config, file_in_image(image, f"{folder}/predict.sh"))


def _read(mask: Path) -> Mask | str:
    try:
        return read_mask(mask)
    except ValueError as error:
        return str(error)


def judge_restrictions(official: Measurement, runner: Container, first: CaseEfficiency) -> list[Finding]:
    """One more run of a case that is done, without network and with the engine's own 64 MB of shared memory.

    Where that breaks it, one run for each restriction tells which.
    """
    if first.run.status != "done":
        why = "no case is done with both"
        return [Finding(NETWORK_CHECK, not_checked=why), Finding(MEMORY_CHECK, not_checked=why)]

    def trial(label: str, changes: dict[str, Any]) -> str:
        return _broken_by(official, dataclasses.replace(runner, **changes), label, first)

    return find_restriction(trial)


def find_restriction(trial: Trial) -> list[Finding]:
    """Both restrictions at once, then each alone where that fails."""
    no_network, small_memory = {"network": "none"}, {"shared_memory": None}
    both = trial("both", no_network | small_memory)
    if not both:
        return [Finding(NETWORK_CHECK), Finding(MEMORY_CHECK)]
    faults = {NETWORK_CHECK: trial("network", no_network), MEMORY_CHECK: trial("shared_memory", small_memory)}
    if not any(faults.values()):
        faults = dict.fromkeys(faults, f"{both} with both restrictions at once, though with neither alone")
    return [Finding(check, (fault,) if fault else ()) for check, fault in faults.items()]


def _broken_by(official: Measurement, restricted: Container, label: str, first: CaseEfficiency) -> str:
    """Run the first case restricted; what is different from the official run, or "" where nothing is."""
    again = dataclasses.replace(official, runner=restricted, out=official.out / "restricted" / label, cases=[])
    shutil.rmtree(again.out, ignore_errors=True)  # of an earlier run, which may have begun with another case
    again.prepare([first.case])
    print(f"{first.name}: once more, restricted ({label})", file=sys.stderr)
    done = again.measure(official.inputs / first.name)
    if done.run.status != "done":
        return f"{first.case}: {done.run.status}, see {again.log(first.case)}"
    before, now = _read(official.mask(first.case)), _read(again.mask(first.case))
    if isinstance(before, Mask) and (isinstance(now, str) or differ(before, now)):
        return f"{first.case}: another mask, see {again.mask(first.case)}"
    return ""


def _score(official: Measurement, references: Path, any_mask: bool) -> Finding:
    """Score the masks into the same folder, as `accuracy` does."""
    check = "masks can be scored against the references"
    if not any_mask:
        return Finding(check, not_checked="there is no mask")
    accuracy.Settings(official.out / "masks", references, out=official.out).run()
    scored = read_json(official.out / "accuracy.json")
    means = {key: (scored["summary"][key] or {}).get("mean") for key in ("dsc", "nsd")}
    note = ", ".join(f"{key.upper()} {mean:.4f}" for key, mean in means.items() if mean is not None)
    return Finding(check, tuple(scored["errors"].values()), note=note)
