"""One self-contained HTML file about a run: tables beside the published ones, figures, worst and best cases.

    python -m eval report DIR

The page carries its images itself, needs neither network nor scripts, and prints.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from . import published
from .cases import write_whole
from .overlays import cut_overlay
from .report_data import (
    Case,
    Run,
    collect,
    extremes,
    facts,
    fixed,
    key_figures,
    masks,
    means,
    percent,
    read_run,
    signed,
    sizes,
)

REPORT = "report.html"
TEMPLATE = "report.html.j2"
AXIS_MARGIN = 1.2  # free space beyond a limit's line, for its label
GPU, RAM = 1, 2  # columns of a curve's rows


@dataclass(frozen=True)
class Picture:
    """An image as a data URI with what it shows in words; `src` is None where there is only something to say."""

    title: str
    caption: str
    src: str | None = None
    alt: str = ""


@dataclass(frozen=True)
class Settings:
    """Write one HTML file about a run: tables beside the published ones, figures, worst and best cases."""

    folder: tyro.conf.Positional[Path]  # holds accuracy.json, efficiency.json or both, or folders named so with them
    inputs: Path | None = None  # folder of the scans X_0000.nii.gz; the one that efficiency recorded, if not given
    out: Path | None = None  # the file to write; FOLDER/report.html if not given

    def run(self) -> int:
        run = read_run(self.folder, self.inputs)
        try:
            cases = collect(run)
            page = render(run, cases)
        except KeyError as error:
            raise ValueError(
                f"{self.folder}: its JSON files lack {error}: let the commands write them again"
            ) from error
        out = self.out or self.folder / REPORT
        out = out / REPORT if out.is_dir() else out
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, page.encode())
        amiss = sum(case.amiss for case in cases)
        print(f"{out}: {len(cases)} cases, {amiss} with something amiss")
        return 1 if amiss else 0


def render(run: Run, cases: Sequence[Case]) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "fixed": fixed, "signed": signed}
    worst, best = ([_slice(run, case) for case in some] for some in extremes(cases))
    return environment.get_template(TEMPLATE).render(
        run=run,
        cases=cases,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        facts=facts(run),
        key_figures=key_figures(run),
        published=published,
        means=means(run),
        sizes=sizes(run, cases) if run.efficiency else {},
        measured=sorted((case for case in cases if case.efficiency), key=_slowest_first),
        scores=_score_pictures(cases),
        curves=list(_curves(run, cases)),
        slices=[("Worst cases", worst), ("Best cases", best)],
        legend=_data_uri(_figures().contour_legend()),
    )


def _figures() -> Any:
    from . import figures  # matplotlib: slow to import, and only drawing needs it

    return figures


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _slowest_first(case: Case) -> tuple[float, str]:
    return -(case.efficiency["time_s"] or 0.0) if case.efficiency else 0.0, case.name


def _score_pictures(cases: Sequence[Case]) -> list[Picture]:
    """Box plots, and DSC against volume where any reference holds lesion."""
    scored = [case.accuracy for case in cases if case.accuracy]
    pictures = []
    if scored:
        scores = {name: [case[name.lower()] for case in scored] for name in ("DSC", "NSD")}
        pictures.append(
            Picture(
                "DSC and NSD",
                f"All {len(scored)} scored cases. Box: quartiles, thick line: median, diamond: mean, whiskers: "
                "farthest case within 1.5 box lengths.",
                _data_uri(_figures().boxes(scores)),
                "Box plots of DSC and NSD; their figures are in the tables.",
            )
        )
    lesion = [case for case in scored if case["reference_ml"] > 0]
    if lesion:
        columns = ([case[key] for case in lesion] for key in ("reference_ml", "dsc", "missing"))
        caption = f"The {len(lesion)} cases with lesion in the reference; volume on a logarithmic axis."
        src, alt = (
            _data_uri(_figures().scatter(*columns)),
            "DSC against reference volume; figures in the table of cases.",
        )
        pictures.append(Picture("DSC against lesion volume", caption, src, alt))
    return pictures


def _curves(run: Run, cases: Sequence[Case]) -> Iterator[Picture]:
    """Memory over time of each case, those that cost most first, all on the same axes."""
    if not run.efficiency:
        return
    column, key = (GPU, "auc_gpu_mib_s") if run.has_gpu else (RAM, "auc_ram_mib_s")
    measured = sorted((case.efficiency for case in cases if case.efficiency), key=lambda case: -(case[key] or 0))
    drawn = {case["case"]: [row for row in case["curve"] if row[column] is not None] for case in measured}
    limits = (run.efficiency["time_limit_s"], run.efficiency["memory_limit_mib"])
    ends = _axis_ends([row for rows in drawn.values() for row in rows], column, limits)
    for case in tqdm(measured, desc="curves", unit="case", disable=None):
        yield _curve(case, drawn[case["case"]], run.has_gpu, limits, ends)


def _axis_ends(rows: Sequence[Sequence[float]], column: int, limits: tuple[float, float]) -> tuple[float, float]:
    """Ends of the time and memory axes: beyond the limits and every sample; the memory limit is the GPU's alone."""
    times, memory = [limits[0], *(row[0] for row in rows)], [row[column] for row in rows]
    if column == GPU or not memory:
        memory.append(limits[1])
    return max(times) * AXIS_MARGIN, max(memory) * AXIS_MARGIN


def _curve(
    case: Mapping[str, Any],
    rows: Sequence[Sequence[float]],
    gpu: bool,
    limits: tuple[float, float],
    ends: tuple[float, float],
) -> Picture:
    peak, area = ("max_gpu_mib", "auc_gpu_mib_s") if gpu else ("max_ram_mib", "auc_ram_mib_s")
    caption = f"{fixed(case['time_s'], 2)} s, at most {fixed(case[peak], 0)} MiB, area {fixed(case[area], 0)} MiB·s"
    title = case["case"] if case["status"] == "done" else f"{case['case']} ({case['status']})"
    if not rows:
        return Picture(title, "no samples of this case")
    of = "GPU memory" if gpu else "Host RAM"
    return Picture(
        title, caption, _data_uri(_figures().curve(rows, gpu, limits, ends)), f"{of} over time of {title}: {caption}"
    )


def _slice(run: Run, case: Case) -> Picture:
    """The case's slice with both contours, or why it cannot be drawn."""
    assert case.accuracy is not None
    scores = f"DSC {fixed(case.accuracy['dsc'], 4)}, NSD {fixed(case.accuracy['nsd'], 4)}"
    volumes = " and ".join(f"{fixed(case.accuracy[f'{key}_ml'], 2)} ml {key}" for key in ("reference", "prediction"))
    prediction, reference = masks(run, case.name)
    try:
        drawn = cut_overlay(prediction, reference, run.scan(case.name))
    except (ValueError, OSError) as error:
        return Picture(case.name, f"{scores}. Cannot be drawn: {error}")
    where = f"axial slice {drawn.slice_number} of {drawn.slices}"
    if drawn.hu is None:
        where += "; masks alone, " + (f"no usable scan in {run.scans}" if run.scans else "--inputs names no scans")
    alt = f"Reference and predicted contour of {case.name}, whole slice and enlarged"
    return Picture(case.name, f"{scores}; {volumes}; {where}", _data_uri(_figures().overlay(drawn)), alt)
