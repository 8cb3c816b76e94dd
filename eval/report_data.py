"""What a report says of a run, gathered from the JSON of `accuracy` and `efficiency`: no HTML, no figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from .cases import MASK_SUFFIX, SCAN_SUFFIX
from .overlays import image_size
from .results import DONE, check_folder, read_accuracy, read_efficiency

NONE = "–"
SHOWN_CASES = 3  # worst, and as many best


@dataclass(frozen=True)
class Run:
    """What is known of a run: the JSON of both commands, either None, and the folder of the scans, where known."""

    accuracy: dict[str, Any] | None
    efficiency: dict[str, Any] | None
    scans: Path | None

    def scan(self, case: str) -> Path | None:
        return self.scans / f"{case}{SCAN_SUFFIX}" if self.scans else None

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The cases of the efficiency run that ended with a mask: those of the official table."""
        return [case for case in self.efficiency["cases"] if case["status"] == DONE] if self.efficiency else []

    @property
    def has_gpu(self) -> bool:
        return self.efficiency is not None and self.efficiency["gpu"] is not None

    @property
    def name(self) -> str:
        if self.efficiency:
            return str(self.efficiency["name"])
        return Path(self.accuracy["predictions"]).name if self.accuracy else ""


@dataclass(frozen=True)
class Case:
    """A case's rows of both commands, either None, and what is amiss with it, a phrase each."""

    name: str
    accuracy: dict[str, Any] | None
    efficiency: dict[str, Any] | None
    faults: tuple[str, ...]
    over: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def amiss(self) -> bool:
        return bool(self.faults or self.over)

    @property
    def gravity(self) -> tuple[bool, str]:
        """Sorting key: what is missing or failed before what is only over a limit."""
        return not self.faults, self.name

    @property
    def remarks(self) -> tuple[str, ...]:
        """For a cell of a table: the faults cut short, told in full above all tables, and notes on the values."""
        return (*(fault.partition(": ")[0] for fault in self.faults), *self.notes)

    @property
    def worst_first(self) -> tuple[float, float, float, str]:
        """Sorting key: what could not be scored, then by DSC and NSD, then the costliest."""
        dsc, nsd = (self.accuracy["dsc"], self.accuracy["nsd"]) if self.accuracy else (-1.0, -1.0)
        return dsc, nsd, -(self.efficiency["time_s"] or 0.0) if self.efficiency else 0.0, self.name


def read_run(folder: Path, inputs: Path | None) -> Run:
    """Read what the two commands left in `folder`; `inputs` names the scans where they were moved since."""
    check_folder(folder)
    accuracy, efficiency = read_accuracy(folder), read_efficiency(folder)
    if accuracy is None and efficiency is None:
        raise ValueError(f"{folder}: holds no accuracy.json or efficiency.json: let one of the commands write there")
    if inputs is not None and not inputs.is_dir():
        raise ValueError(f"{inputs}: no such folder: name the one that holds the scans, or leave --inputs out")
    recorded = Path(efficiency["inputs"]) if efficiency else None
    return Run(accuracy, efficiency, inputs or recorded)


def collect(run: Run) -> list[Case]:
    """All cases that either command met, worst first."""
    accuracy = {case["case"]: case for case in run.accuracy["cases"]} if run.accuracy else {}
    efficiency = {case["case"]: case for case in run.efficiency["cases"]} if run.efficiency else {}
    errors = {name: _shorter(error, run) for name, error in run.accuracy["errors"].items()} if run.accuracy else {}
    cases = []
    for name in {*accuracy, *efficiency, *errors}:
        scored, measured = accuracy.get(name), efficiency.get(name)
        faults = (*_accuracy_faults(scored, errors.get(name)), *_efficiency_faults(measured, run.efficiency))
        notes = tuple(scored["notes"]) if scored else ()
        cases.append(Case(name, scored, measured, faults, _over_limits(measured, run.efficiency), notes))
    return sorted(cases, key=lambda case: case.worst_first)


def _shorter(error: str, run: Run) -> str:
    """A sentence with the files by folder and name: the header tells where the folders lie."""
    for folder in (run.accuracy["predictions"], run.accuracy["references"]) if run.accuracy else ():
        error = error.replace(f"{Path(folder).parent}/", "")
    return error


def _accuracy_faults(scored: dict[str, Any] | None, error: str | None) -> Iterator[str]:
    if error:
        yield f"could not be scored and is in no mean: {error}"
    if scored and scored["missing"]:
        yield "no prediction; counted as DSC 0 and NSD 0"


def _efficiency_faults(measured: dict[str, Any] | None, run: dict[str, Any] | None) -> Iterator[str]:
    if not measured or not run:
        return
    status, code = measured["status"], measured["exit_code"]
    if status == "timeout":
        yield f"the container was stopped after {run['timeout_s']:g} s"
    elif status != DONE:
        what = "the container wrote no mask" if status == "no mask" else f"the container {status}"
        yield what if code is None else f"{what} (exit code {code})"
    if measured["stray"]:
        yield f"stray files in outputs: {', '.join(measured['stray'])}"


def _over_limits(measured: dict[str, Any] | None, run: dict[str, Any] | None) -> tuple[str, ...]:
    if not measured or not run:
        return ()
    over = []
    if measured["over_time_s"]:
        over.append(f"{measured['over_time_s']:.1f} s over {run['time_limit_s']:g} s")
    if measured["over_gpu_mib"]:
        over.append(f"{measured['over_gpu_mib']:.0f} MiB over {run['memory_limit_mib']:g} MiB of GPU memory")
    return tuple(over)


def facts(run: Run) -> list[tuple[str, str]]:
    """What was measured, when, and on what: label and value."""
    rows = []
    if run.accuracy:
        rows += [("Predictions", run.accuracy["predictions"]), ("References", run.accuracy["references"])]
        rows += [("NSD tolerance", f"{run.accuracy['tolerance_mm']:g} mm")]
        rows += [("Accuracy measured", moment(run.accuracy["date"]))]
    if run.efficiency:
        machine = run.efficiency["machine"]
        rows += [("Container", run.efficiency["name"]), ("Scans", run.efficiency["inputs"])]
        rows += [("Efficiency measured", moment(run.efficiency["date"]))]
        rows += [(_label(key), _machine_value(key, value)) for key, value in machine.items() if value is not None]
        rows += [("GPU measured", f"index {run.efficiency['gpu']}" if run.has_gpu else "none: host memory is shown")]
    return [(label, str(value)) for label, value in rows]


def _label(key: str) -> str:
    """`gpu_mib` → `GPU memory`."""
    words = {"gpu": "GPU", "cpu": "CPU", "ram": "RAM", "mib": ""}
    text = " ".join(words.get(word, word) for word in key.split("_")).strip()
    return f"{text} memory" if key == "gpu_mib" else text[:1].upper() + text[1:]


def _machine_value(key: str, value: Any) -> str:
    return f"{value / 1024:.1f} GiB" if key.endswith("_mib") else str(value)


def moment(date: str) -> str:
    """An ISO date as a reader likes it; what is none stays as it is."""
    try:
        when = datetime.fromisoformat(date)
    except ValueError:
        return date
    return f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".strip()


def key_figures(run: Run) -> list[tuple[str, str, str]]:
    """Label, value and detail of what a reader looks for first."""
    return [*_accuracy_figures(run.accuracy), *_efficiency_figures(run)]


def _accuracy_figures(accuracy: dict[str, Any] | None) -> Iterator[tuple[str, str, str]]:
    if not accuracy:
        return
    summary, cases = accuracy["summary"], accuracy["cases"]
    for key in ("dsc", "nsd"):
        if values := summary[key]:
            low, high, median = (percent(values[name]) for name in ("low", "high", "median"))
            detail = f"95 % interval of the mean {low} to {high}; median {median}"
            yield f"{key.upper()}, mean of {len(cases)}", f"{percent(values['mean'])} %", detail
    found, lesions = (sum(case[key] for case in cases) for key in ("found", "lesions"))
    detail = f"{found} of {lesions} found; precision {fixed(summary['lesion_precision'], 2)}"
    yield "Lesion sensitivity", fixed(summary["lesion_sensitivity"], 2), detail
    yield "False positives a scan", fixed(summary["false_positives_per_scan"], 2), "predicted lesions that touch none"
    rate = fixed(summary["healthy_false_positive_rate"], 2)
    yield "False-positive rate, healthy", rate, f"of {summary['healthy_scans']} healthy scans"


def _efficiency_figures(run: Run) -> Iterator[tuple[str, str, str]]:
    measured = run.measured
    if not run.efficiency or not measured:
        return
    times = [case["time_s"] for case in measured]
    yield "Running time, mean", f"{fmean(times):.2f} s", f"longest {max(times):.2f} s; {len(times)} cases with a mask"
    memory, area = (present(measured, key) for key in ("max_gpu_mib", "auc_gpu_mib_s"))
    if memory:
        yield "GPU memory, highest", f"{max(memory):.0f} MiB", f"mean {fmean(memory):.0f} MiB"
    if area:
        yield "GPU area, mean", f"{fmean(area):.0f} MiB·s", f"highest {max(area):.0f} MiB·s"


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.2f}"


def fixed(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int) -> str:
    """With a sign, a true minus; 0 without."""
    if value is None:
        return NONE
    text = f"{abs(value):.{digits}f}"
    return text if not float(text) else f"{'+' if value > 0 else '−'}{text}"


def means(run: Run) -> dict[str, float | None]:
    """Mean of each graded efficiency column over the cases with a mask."""
    values = {key: present(run.measured, key) for key in ("time_s", "max_gpu_mib", "auc_gpu_mib_s")}
    return {key: fmean(found) if found else None for key, found in values.items()}


def present(cases: Sequence[dict[str, Any]], key: str) -> list[float]:
    """The values that are not None."""
    return [case[key] for case in cases if case[key] is not None]


def sizes(run: Run, cases: Sequence[Case]) -> dict[str, str]:
    """`512 × 512 × 97` by case, from the header of the scan, or else of a mask."""
    found = {}
    for case in cases:
        paths = [path for path in (run.scan(case.name), *masks(run, case.name)) if path]
        shape = image_size(*paths)
        found[case.name] = " × ".join(map(str, shape)) if shape else NONE
    return found


def masks(run: Run, case: str) -> tuple[Path, ...]:
    """Prediction and reference."""
    folders = (run.accuracy["predictions"], run.accuracy["references"]) if run.accuracy else ()
    return tuple(Path(folder) / f"{case}{MASK_SUFFIX}" for folder in folders)


def extremes(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Worst (worst first) and best cases (best first) that there is something to draw of: no case is both."""
    drawable = [case for case in cases if case.accuracy and _drawable(case.accuracy)]
    best = min(SHOWN_CASES, len(drawable) // 2)
    return drawable[: min(SHOWN_CASES, len(drawable) - best)], drawable[len(drawable) - best :][::-1]


def _drawable(scored: dict[str, Any]) -> bool:
    return not scored["missing"] and scored["reference_ml"] + scored["prediction_ml"] > 0
