"""Accuracy of a folder of masks against references: the official table, and what it leaves out.

    python -m eval accuracy PREDICTIONS REFERENCES --out DIR

Unlike the official script, which lists the prediction folder, a reference without a prediction is a row with 0, 0.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from .cases import MASK_SUFFIX, case_of, files_by_case, write_json, write_table
from .interrupts import held, leave_to_parent
from .lesions import Detection, detect
from .masks import WHOLE_FLOATS, Mask, check_same_grid, check_same_shape, read_mask
from .scores import TOLERANCE_MM, Score, score
from .statistics import spread

OFFICIAL_COLUMNS = ("Name", "Lesion_DSC", "Lesion_NSD")
LARGEST_TOLERANCE_MM = 1000.0
UNREAD = (".nii", ".mha", ".nrrd")  # what masks are written as, too
OF_REFERENCE = "reference: "  # begins the notes that are no fault of the prediction


@dataclass(frozen=True)
class CaseAccuracy:
    """One row. Volumes in ml; `error_ml` is prediction − reference; the counts are `lesions.Detection`'s."""

    case: str
    name: str
    dsc: float
    nsd: float
    missing: bool
    healthy: bool
    reference_ml: float
    prediction_ml: float
    error_ml: float
    lesions: int
    found: int
    predicted_lesions: int
    false_positives: int
    notes: list[str] = field(default_factory=list)

    @property
    def official(self) -> dict[str, Any]:
        return dict(zip(OFFICIAL_COLUMNS, (self.name, self.dsc, self.nsd), strict=True))

    @property
    def costs_points(self) -> bool:
        """Whether there is no mask, or graders read another one than was meant."""
        return self.missing or any(note != WHOLE_FLOATS and not note.startswith(OF_REFERENCE) for note in self.notes)


def measure(prediction: Path | None, reference: Path, tolerance_mm: float, ignore_geometry: bool) -> CaseAccuracy:
    """Score one case; `prediction` is None where it is missing. ValueError that names both files where grids differ."""
    truth = read_mask(reference)
    found = _empty_like(truth) if prediction is None else read_mask(prediction)
    if ignore_geometry:
        check_same_shape(found, truth)
    else:
        check_same_grid(found, truth)
    scored = Score(0.0, 0.0)
    if prediction is not None:
        scored = score(found.voxels, truth.voxels, truth.spacing_mm, tolerance_mm)
    return _row(scored, found, truth, missing=prediction is None)


def _empty_like(mask: Mask) -> Mask:
    return Mask(mask.path, np.zeros_like(mask.voxels), mask.spacing_mm, mask.affine)


def _row(scored: Score, found: Mask, truth: Mask, missing: bool) -> CaseAccuracy:
    prediction, reference = found.voxels == 1, truth.voxels == 1
    detection: Detection = detect(prediction, reference)
    ml = [round(float(mask.sum()) * truth.voxel_ml, 4) for mask in (reference, prediction)]
    return CaseAccuracy(
        case=case_of(truth.path.name),
        name=truth.path.name,
        dsc=scored.dsc,
        nsd=scored.nsd,
        missing=missing,
        healthy=not reference.any(),
        reference_ml=ml[0],
        prediction_ml=ml[1],
        error_ml=round(ml[1] - ml[0], 4),
        lesions=detection.lesions,
        found=detection.found,
        predicted_lesions=detection.predicted,
        false_positives=detection.false,
        notes=[*found.notes, *(f"{OF_REFERENCE}{note}" for note in truth.notes)],
    )


def summarise(cases: list[CaseAccuracy]) -> dict[str, Any]:
    """Means, spreads and detection rates over all cases; None where a rate has no denominator."""
    healthy = [case for case in cases if case.healthy]
    predicted = sum(case.predicted_lesions for case in cases)
    false = sum(case.false_positives for case in cases)
    spreads = {key: spread([getattr(case, key) for case in cases]) for key in ("dsc", "nsd")}
    return {
        **{key: None if value is None else value.to_dict() for key, value in spreads.items()},
        "lesion_sensitivity": _ratio(sum(case.found for case in cases), sum(case.lesions for case in cases)),
        "lesion_precision": _ratio(predicted - false, predicted),
        "false_positives_per_scan": _ratio(false, len(cases)),
        "healthy_scans": len(healthy),
        "healthy_false_positive_rate": _ratio(sum(case.prediction_ml > 0 for case in healthy), len(healthy)),
    }


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


@dataclass(frozen=True)
class Settings:
    """Score masks against references: DSC and NSD as the official script, and lesion-wise detection."""

    predictions: tyro.conf.Positional[Path]  # folder of X.nii.gz
    references: tyro.conf.Positional[Path]  # folder of X.nii.gz; label 1 is lesion
    tolerance_mm: float = TOLERANCE_MM  # of the NSD
    out: Path = Path("accuracy")  # folder for accuracy.csv, accuracy_details.csv and accuracy.json
    jobs: int = 0  # processes, each with one case in memory; 0: one a core
    ignore_geometry: bool = False  # compare voxels by index, as the official script does

    def run(self) -> int:
        if not 0 <= self.tolerance_mm <= LARGEST_TOLERANCE_MM:
            raise ValueError(
                f"--tolerance-mm {self.tolerance_mm:g}: give a distance from 0 to {LARGEST_TOLERANCE_MM:g} mm"
            )
        if self.jobs < 0:
            raise ValueError(f"--jobs {self.jobs}: give 1 or more, or 0 for one a core")
        references = files_by_case(self.references, "reference")
        predictions = files_by_case(self.predictions, "prediction")
        self.out.mkdir(parents=True, exist_ok=True)
        cases: dict[str, CaseAccuracy] = {}
        errors: dict[str, str] = {}
        try:
            with closing(self._results(references, predictions)) as results:
                for case, result in results:
                    if isinstance(result, CaseAccuracy):
                        cases[case] = result
                    else:
                        errors[case] = result
        finally:  # what was measured is kept, whatever broke the run off, and does not pass for all
            for case in references.keys() - cases.keys() - errors.keys():
                errors[case] = f"{references[case]}: not measured, as the run was broken off: run it again"
            write_results(self, [cases[case] for case in references if case in cases], errors)
        extra = sorted(set(predictions) - set(references))
        tell([cases[case] for case in sorted(cases)], errors, extra, self.predictions, self.out)
        return 1 if errors or any(case.costs_points for case in cases.values()) else 0

    def _results(
        self, references: dict[str, Path], predictions: dict[str, Path]
    ) -> Generator[tuple[str, CaseAccuracy | str]]:
        """Each case's row, or the sentence that says why there is none, as they are done.

        Where it is broken off, so is what its processes are at: it would be measured for nothing.
        """
        work = partial(measure, tolerance_mm=self.tolerance_mm, ignore_geometry=self.ignore_geometry)
        jobs = min(self.jobs or len(os.sched_getaffinity(0)), len(references))
        pool = ProcessPoolExecutor(jobs, initializer=leave_to_parent)
        try:
            with held():  # amid the start of its threads and processes, an interrupt would leave some behind
                futures = {pool.submit(work, predictions.get(case), path): case for case, path in references.items()}
            for future in tqdm(as_completed(futures), total=len(futures), unit="case", disable=None):
                case = futures[future]
                try:
                    yield case, future.result()
                except (ValueError, OSError) as error:
                    yield case, str(error)
                except (BrokenProcessPool, MemoryError):
                    yield case, f"{references[case]}: a process ran out of memory: try fewer --jobs"
        except BaseException:
            for child in multiprocessing.active_children():
                child.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def write_results(settings: Settings, cases: list[CaseAccuracy], errors: dict[str, str]) -> None:
    """Write the three files into `settings.out`."""
    write_table(settings.out / "accuracy.csv", (case.official for case in cases), OFFICIAL_COLUMNS)
    rows = [{**asdict(case), "notes": "; ".join(case.notes)} for case in cases]
    write_table(settings.out / "accuracy_details.csv", rows, CaseAccuracy.__dataclass_fields__)
    values = {
        "predictions": str(settings.predictions.resolve()),
        "references": str(settings.references.resolve()),
        "tolerance_mm": settings.tolerance_mm,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "summary": summarise(cases),
        "missing": [case.name for case in cases if case.missing],
        "errors": errors,
        "cases": [asdict(case) for case in cases],
    }
    write_json(settings.out / "accuracy.json", values)


def of_another_format(predictions: Path, case: CaseAccuracy) -> str:
    """What a folder holds of a case without a mask, for the end of a sentence; "" where it is nothing."""
    other = next((name for end in UNREAD if (predictions / (name := f"{case.case}{end}")).is_file()), None)
    return f" ({other} is there, but graders read {MASK_SUFFIX} alone)" if other else ""


def tell(cases: list[CaseAccuracy], errors: dict[str, str], extra: list[str], predictions: Path, out: Path) -> None:
    """Say what was found: figures on stdout, what is amiss on stderr."""
    for sentence in errors.values():
        print(sentence, file=sys.stderr)
    for case in cases:
        if case.missing:
            print(f"{case.name}: no prediction, counted as 0{of_another_format(predictions, case)}", file=sys.stderr)
        elif case.notes:
            print(f"{case.name}: {'; '.join(case.notes)}", file=sys.stderr)
    for name in extra:
        print(f"{name}{MASK_SUFFIX}: has no reference and was not scored", file=sys.stderr)
    print(f"{len(cases)} cases scored, {len(errors)} could not be; tables in {out}")
    summary = summarise(cases)
    for key in ("dsc", "nsd"):
        if values := summary[key]:
            print(
                f"{key.upper()} {values['mean']:.4f} ± {values['sd']:.4f}, median {values['median']:.4f}, "
                f"95 % interval of the mean {values['low']:.4f} to {values['high']:.4f}"
            )
    print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in summary.items() if key not in ("dsc", "nsd")))
