"""Time, memory and load of a container, case by case, as the graders measure them.

    python -m eval efficiency --image NAME --inputs DIR --out DIR
    python -m eval efficiency --command "sh predict.sh" --inputs DIR --out DIR

One start a case: a copy of one scan in a fresh inputs folder, a fresh outputs folder, and device, host memory and CPU
sampled until the start has ended. A local command gets the two folders as its last arguments. Results are written anew
after every case, so that whatever breaks the run off leaves those before it.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .cases import MASK_SUFFIX, case_of, files_by_case, write_json, write_table
from .containers import Container, Run, Runner, container, local_command, run_case
from .machine import Gpu, describe, find_gpu
from .sampler import PERIOD_S, Sample, system_readers
from .usage import HARD_STOP_S, MEMORY_LIMIT_MIB, OFFICIAL_COLUMNS, TIME_LIMIT_S, Usage, official_row, usage_of

OFFICIAL_SUFFIX = "_Efficiency.csv"
DETAILS = (
    "case",
    "name",
    "status",
    "exit_code",
    "time_s",
    "max_gpu_mib",
    "auc_gpu_mib_s",
    "auc_gpu_trapezoid_mib_s",
    "idle_gpu_mib",
    "max_cpu_percent",
    "auc_cpu",
    "max_ram_mib",
    "auc_ram_mib_s",
    "over_time_s",
    "over_gpu_mib",
    "auc_gpu_over_mib_s",
    "first_gpu_s",
    "mask_s",
    "stray",
)


@dataclass(frozen=True)
class CaseEfficiency:
    """One start on one scan: the file `name`, what the run left, and what its samples come to."""

    name: str
    run: Run
    usage: Usage

    @property
    def case(self) -> str:
        return case_of(self.name)

    @property
    def official(self) -> dict[str, Any]:
        return official_row(self.name, self.run.time_s, self.usage)

    def to_dict(self) -> dict[str, Any]:
        """As efficiency.json holds it: DETAILS, and the curve of [t_s, gpu_mib or None, ram_mib, cpu_percent]."""
        values = {**vars(self.run), **vars(self.usage), "case": self.case, "name": self.name, "status": self.run.status}
        values |= {"over_time_s": max(0.0, self.run.time_s - TIME_LIMIT_S), "stray": list(self.run.stray)}
        details = {key: _short(values[key]) for key in DETAILS}
        return details | {"curve": [_point(sample) for sample in self.run.samples]}


def _short(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


def _point(sample: Sample) -> list[float | None]:
    return [_short(value) for value in (sample.t_s, sample.gpu_mib, sample.ram_mib, sample.cpu_percent)]


@dataclass
class Measurement:
    """What is started (`runner`, called `name`) on which scans, where results go; `cases` fill as it runs."""

    name: str
    runner: Runner
    inputs: Path
    out: Path
    gpu: Gpu | None
    timeout_s: float
    cases: list[CaseEfficiency] = field(default_factory=list)

    def run(self) -> list[CaseEfficiency]:
        """Measure every scan. ValueError where the folders cannot be used; OSError where a reader or the disk fails."""
        scans = files_by_case(self.inputs, "scan")
        if isinstance(self.runner, Container) and ":" in str(self.out.resolve()):
            raise ValueError(f"{self.out}: docker cannot mount a path with a colon: give another --out")
        self.prepare(scans)
        with tqdm(scans.values(), unit="case", disable=None) as bar:
            for scan in bar:
                bar.set_postfix_str(scan.name)
                done = self.measure(scan)
                self.cases.append(done)
                self.write()
                if done.run.status != "done":
                    bar.write(f"{scan.name}: {self._why(done.run)}: see {self.log(done.case)}", file=sys.stderr)
        return self.cases

    def measure(self, scan: Path) -> CaseEfficiency:
        """One scan: its mask goes to masks/, what was printed to logs/."""
        with tempfile.TemporaryDirectory(prefix=".run-", dir=self.out, ignore_cleanup_errors=True) as work:
            run = run_case(self.runner, scan, Path(work), system_readers(self.gpu), self.timeout_s)
            done = CaseEfficiency(scan.name, run, usage_of(run.samples, run.idle_gpu_mib))
            self.log(done.case).write_text(f"$ {run.command}\n{run.output}")
            if run.mask is not None:
                shutil.move(run.mask, self.mask(done.case))
        return done

    def mask(self, case: str) -> Path:
        return self.out / "masks" / f"{case}{MASK_SUFFIX}"

    def log(self, case: str) -> Path:
        return self.out / "logs" / f"{case}.txt"

    def _why(self, run: Run) -> str:
        if run.timed_out:
            return f"ran over {self.timeout_s:g} s and was killed"
        return "wrote no mask" if not run.exit_code else f"failed with exit code {run.exit_code} and wrote no mask"

    def prepare(self, cases: Collection[str]) -> None:
        """Make the folders; what an earlier run left must not pass for this one's. ValueError if it is another's."""
        for folder in (self.out / "masks", self.out / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        masks = {self.mask(case).name for case in cases}
        others = [path.name for path in self.out.glob(f"*{OFFICIAL_SUFFIX}") if path.name != self._table]
        others += [
            f"masks/{path.name}" for path in (self.out / "masks").glob(f"[!.]*{MASK_SUFFIX}") if path.name not in masks
        ]
        if others:
            raise ValueError(f"{self.out}: holds another run's {others[0]}: give another --out")
        tables = [self.out / name for name in (self._table, "efficiency_details.csv", "efficiency.json")]
        for stale in [*tables, *(path for case in cases for path in (self.mask(case), self.log(case)))]:
            stale.unlink(missing_ok=True)

    @property
    def _table(self) -> str:
        return f"{self.name}{OFFICIAL_SUFFIX}"

    def write(self) -> None:
        """Write all cases so far; each file whole, so that a kill cannot leave half of one."""
        official, details = [case.official for case in self.cases], [case.to_dict() for case in self.cases]
        rows = [{**case, "stray": "; ".join(case["stray"])} for case in details]
        write_table(self.out / self._table, official, OFFICIAL_COLUMNS)
        write_table(self.out / "efficiency_details.csv", rows, DETAILS)
        write_json(self.out / "efficiency.json", {**self._head(), "cases": details})

    def _head(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "inputs": str(self.inputs.resolve()),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe(self.gpu),
            "gpu": None if self.gpu is None else self.gpu.index,
            "period_s": PERIOD_S,
            "timeout_s": self.timeout_s,
            "memory_limit_mib": MEMORY_LIMIT_MIB,
            "time_limit_s": TIME_LIMIT_S,
        }


def image_name(image: str) -> str:
    """The team's name in an image's: without registry, folders and tag."""
    return re.split("[:@]", image.rpartition("/")[2])[0]


def chosen_gpu(gpu: int | None, cpu_only: bool) -> Gpu | None:
    """The device to measure and to hand on. ValueError where both are asked for, or the GPU asked for is missing."""
    if cpu_only and gpu is not None:
        raise ValueError(f"--gpu {gpu} and --cpu-only: leave one of them out")
    return None if cpu_only else find_gpu(gpu)


def check_timeout(timeout_s: float) -> None:
    if not 0 < timeout_s < 1e6:
        raise ValueError(f"--timeout-s {timeout_s:g}: give seconds above 0")


@dataclass(frozen=True)
class Settings:
    """Measure time, memory and load of an image or a local command, one start a case, as the graders do."""

    inputs: Path  # folder of scans, X_0000.nii.gz
    out: Path  # folder for NAME_Efficiency.csv, efficiency_details.csv, efficiency.json, masks/ and logs/
    image: str | None = None  # NAME of a loaded image, run as NAME:latest with the graders' command
    command: str | None = None  # instead of an image: a local command, which gets INPUTS and OUTPUTS as last arguments
    name: str | None = None  # NAME in the results; as a rule the image's, or "local"
    gpu: int | None = None  # index of the GPU to use and to measure; as a rule 0, where there is one
    cpu_only: bool = False  # neither use nor measure a GPU
    timeout_s: float = HARD_STOP_S  # a start that runs longer is killed

    def run(self) -> int:
        if (self.image is None) == (self.command is None):
            raise ValueError("name either an --image or a --command")
        if self.name is not None and Path(self.name).name != self.name:
            raise ValueError(f"--name {self.name!r}: a file is called by it: give one without a slash")
        check_timeout(self.timeout_s)
        gpu = chosen_gpu(self.gpu, self.cpu_only)
        index = None if gpu is None else gpu.index
        runner: Runner
        if self.image is not None:
            runner, name = container(self.image, index), image_name(self.image)
        else:
            runner, name = local_command(self.command or "", index), "local"
        cases = Measurement(self.name or name, runner, self.inputs, self.out, gpu, self.timeout_s).run()
        tell(cases, self.out)
        return 0 if all(case.run.status == "done" for case in cases) else 1


def tell(cases: list[CaseEfficiency], out: Path) -> None:
    """The figures in a few lines on stdout."""
    counts = {status: sum(case.run.status == status for case in cases) for status in ("failed", "timeout", "no mask")}
    amiss = "".join(f", {count} {status}" for status, count in counts.items() if count)
    times_s = [case.run.time_s for case in cases]
    print(
        f"{len(cases)} cases{amiss}; time {sum(times_s) / len(times_s):.2f} s on average, {max(times_s):.2f} s at most"
    )
    peaks = [case.usage.max_gpu_mib for case in cases if case.usage.max_gpu_mib is not None]
    areas = [case.usage.auc_gpu_mib_s for case in cases if case.usage.auc_gpu_mib_s is not None]
    if peaks:
        print(f"GPU memory {max(peaks):.0f} MiB at most, {sum(areas) / len(areas):.0f} MiB·s on average")
    for case in cases:
        if case.run.stray:
            print(f"{case.name}: left in outputs besides the mask: {', '.join(case.run.stray)}", file=sys.stderr)
    print(f"tables, masks and logs in {out}")
