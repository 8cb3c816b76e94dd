"""Figures of the ranking and of the report. The only module that imports matplotlib, which is slow: import it late.

Drawn on `Figure` objects without pyplot, so that nothing depends on a display or leaves global state behind.
Colours are Okabe and Ito's, told apart by colour-blind readers; where two lines meet, their style differs as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MultipleLocator
from numpy.typing import NDArray

from .overlays import Overlay
from .ranking import Board, Ranking, standing

BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#009E73", "#AA4488", "#E69F00"
CIRCLE = "#9cc7e3"
INK, GREY, PALE = "#1f2933", "#6b7680", "#d9dee3"
REFERENCE, PREDICTION = "#56C8FF", "#FFB000"  # on grey CT
MARKERS = (("o", BLUE), ("s", GREEN), ("^", VERMILION), ("D", PURPLE))
WINDOW_HU = (-160.0, 240.0)  # soft tissue
ZOOM_MIN_MM, ZOOM_MARGIN_MM = 60.0, 15.0
DPI = 200
OVERLAY_INCHES = 3.4
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Liberation Sans", "Arial", "Helvetica", "DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def to_png(figure: Figure, dpi: int = DPI) -> bytes:
    buffer = BytesIO()
    # Without the software's name the same figure gives the same bytes.
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def boxes(scores: Mapping[str, Sequence[float]]) -> bytes:
    """Box plots of scores 0 … 1, one a name, every case as a dot beside its box. PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 3.4), layout="constrained")
        axes = figure.subplots()
        for position, (name, values) in enumerate(scores.items()):
            _box(axes, position, values, BLUE if position == 0 else GREEN)
            axes.annotate(
                f"median {np.median(values):.2f}", (position, 1.04), ha="center", color=GREY, annotation_clip=False
            )
            axes.plot([], [], label=name)
        axes.set_xticks(range(len(scores)), list(scores))
        axes.set(ylim=(-0.03, 1.1), xlim=(-0.6, len(scores) - 0.4), ylabel="score of a case")
        axes.yaxis.set_major_locator(MultipleLocator(0.2))
        axes.grid(axis="y", color=PALE, linewidth=0.6)
        return to_png(figure)


def _box(axes: Axes, position: int, values: Sequence[float], colour: str) -> None:
    axes.boxplot(
        [values],
        positions=[position],
        widths=0.34,
        showfliers=False,  # every case is drawn as a dot
        showmeans=True,
        patch_artist=True,
        boxprops={"facecolor": colour + "22", "edgecolor": colour},
        medianprops={"color": colour, "linewidth": 1.8},
        whiskerprops={"color": colour},
        capprops={"color": colour},
        meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": colour, "markersize": 5},
        manage_ticks=False,
    )
    jitter = np.random.default_rng(0).uniform(0.24, 0.4, len(values))
    axes.scatter(position + jitter, values, s=10, color=colour, alpha=0.6, linewidths=0)


def scatter(volumes_ml: Sequence[float], dsc: Sequence[float], missing: Sequence[bool]) -> bytes:
    """DSC against reference lesion volume (ml, logarithmic) of the cases that hold lesion. PNG."""
    volume, score, absent = np.asarray(volumes_ml), np.asarray(dsc), np.asarray(missing, bool)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.scatter(volume[~absent], score[~absent], s=26, color=BLUE, alpha=0.75, linewidths=0, label="predicted")
        if absent.any():
            axes.scatter(volume[absent], score[absent], s=30, marker="x", color=VERMILION, label="no prediction")
            axes.legend(frameon=False, loc="upper left")
        axes.set_xscale("log")
        axes.set(ylim=(-0.03, 1.1), xlabel="lesion volume in the reference (ml)", ylabel="DSC")
        axes.set_xlim(volume.min() / 1.6, volume.max() * 1.6)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_locator(MultipleLocator(0.2))
        axes.grid(color=PALE, linewidth=0.6)
        return to_png(figure)


def curve(
    samples: Sequence[Sequence[float | None]], gpu: bool, limits: tuple[float, float], ends: tuple[float, float]
) -> bytes:
    """Memory over time of one case. PNG.

    samples: rows (t_s, gpu_mib, ram_mib, …); gpu: draw the device's memory, else the host's; limits: (s, MiB) that are
    tolerated, the second of the GPU; ends: (s, MiB) of both axes, the same for all cases so that they compare by eye.
    """
    time_s = np.array([row[0] for row in samples], np.float64)
    used_gib = np.array([row[1 if gpu else 2] for row in samples], np.float64) / 1024
    colour = BLUE if gpu else GREEN
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.3, 2.0), layout="constrained")
        axes = figure.subplots()
        axes.fill_between(time_s, used_gib, color=colour, alpha=0.18, linewidth=0)
        axes.plot(time_s, used_gib, color=colour, linewidth=1.3)
        axes.set(xlim=(0, ends[0]), ylim=(0, ends[1] / 1024), xlabel="time from start (s)")
        axes.set_ylabel("GPU memory (GiB)" if gpu else "host RAM (GiB)")
        axes.axvline(limits[0], color=VERMILION, linewidth=1, linestyle="--")
        tag: dict[str, Any] = {"color": VERMILION, "fontsize": 8, "textcoords": "offset points"}
        axes.annotate(f"{limits[0]:g} s", (limits[0], ends[1] / 1024), (3, -1), va="top", **tag)
        if gpu:
            axes.axhline(limits[1] / 1024, color=VERMILION, linewidth=1, linestyle="--")
            axes.annotate(f"{limits[1] / 1024:g} GB", (0, limits[1] / 1024), (4, 2), va="bottom", **tag)
        return to_png(figure)


def overlay(drawn: Overlay) -> bytes:
    """An axial slice with both contours, whole and enlarged around them. PNG.

    As a radiologist sees it: the patient's right on the left of the picture, front at the top.
    """
    rows_mm, columns_mm = (size * mm for size, mm in zip(drawn.reference.shape, drawn.spacing_mm, strict=True))
    height = rows_mm / columns_mm  # of the whole slice at a width of 1; the enlarged square below it is 1 high
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(OVERLAY_INCHES, OVERLAY_INCHES * (height + 1)))
        share = 1 / (height + 1)
        whole, near = figure.add_axes((0, share, 1, 1 - share)), figure.add_axes((0, 0, 1, share - 0.005))
        box = zoom_mm(drawn)
        for axes in (whole, near):
            _draw_slice(axes, drawn, 0.9 if axes is whole else 1.6)
        whole.add_patch(Rectangle(box[:2], box[2], box[2], fill=False, edgecolor="white", linewidth=0.7))
        near.set(xlim=(box[0], box[0] + box[2]), ylim=(box[1] + box[2], box[1]))
        _scale_bar(near, box)
        return to_png(figure, dpi=180)


def zoom_mm(drawn: Overlay) -> tuple[float, float, float]:
    """Left, top and side (mm) of the square around both masks with a margin."""
    rows, columns = np.nonzero(drawn.reference | drawn.prediction)
    low = np.array([columns.min() * drawn.spacing_mm[1], rows.min() * drawn.spacing_mm[0]])
    high = np.array([(columns.max() + 1) * drawn.spacing_mm[1], (rows.max() + 1) * drawn.spacing_mm[0]])
    side = max(float((high - low).max()) + 2 * ZOOM_MARGIN_MM, ZOOM_MIN_MM)
    left, top = (low + high) / 2 - side / 2
    return float(left), float(top), side


def _draw_slice(axes: Axes, drawn: Overlay, linewidth: float) -> None:
    (rows, columns), (row_mm, column_mm) = drawn.reference.shape, drawn.spacing_mm
    extent = (0.0, columns * column_mm, rows * row_mm, 0.0)
    if drawn.hu is None:
        image: NDArray[Any] = np.zeros((rows, columns))
    else:
        image = np.clip((drawn.hu - WINDOW_HU[0]) / (WINDOW_HU[1] - WINDOW_HU[0]), 0, 1)
    axes.set_facecolor("black")
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="bilinear", aspect="auto")
    x_mm, y_mm = (np.arange(columns) + 0.5) * column_mm, (np.arange(rows) + 0.5) * row_mm
    for mask, colour, style in ((drawn.reference, REFERENCE, "solid"), (drawn.prediction, PREDICTION, "dashed")):
        if mask.any():
            axes.contour(x_mm, y_mm, mask, levels=[0.5], colors=colour, linewidths=linewidth, linestyles=style)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _scale_bar(axes: Axes, box: tuple[float, float, float]) -> None:
    left, top, side = box
    x, y = left + 0.05 * side, top + 0.94 * side
    axes.plot([x, x + 10], [y, y], color="white", linewidth=2, solid_capstyle="butt")
    axes.text(x + 5, y - 0.02 * side, "10 mm", color="white", ha="center", va="bottom", fontsize=7.5)


def places_and_ranks(board: Board, ranking: Ranking, weights: Mapping[str, float]) -> bytes:
    """Two panels, best team on top: how often each takes each place, and its mean rank in each metric. PNG."""
    order = standing(board, ranking)
    count = len(board.teams)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 1.4 + 0.52 * count), layout="constrained")
        places, metrics = figure.subplots(1, 2, sharey=True, width_ratios=(1.15, 1))
        _draw_places(places, ranking, order)
        _draw_metric_ranks(metrics, board, ranking, order, weights)
        places.set_yticks(range(count), [board.teams[t] for t in order], parse_math=False)  # "$" is no formula
        places.set_ylim(count - 0.4, -0.6)
        for axes in (places, metrics):
            axes.set_xlim(0.4, count + 0.6)
            axes.xaxis.set_major_locator(MultipleLocator(1 if count <= 12 else 5, 0))
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        figure.legend(*metrics.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        return to_png(figure)


def _draw_places(axes: Axes, ranking: Ranking, order: Sequence[int]) -> None:
    """A circle a place, its area the share of the resamples; below it the 95 % interval."""
    largest = min(480.0, 480.0 * 8 / len(order))
    for row, t in enumerate(order):
        axes.axhline(row, color=PALE, linewidth=0.6, zorder=0)
        ends, below = [ranking.low[t], ranking.high[t]], [row + 0.4] * 2
        axes.plot(ends, below, color=INK, linewidth=1.2, marker="|", markersize=6, zorder=1)
        for place, share in enumerate(ranking.shares[t], 1):
            if share:
                axes.scatter(
                    place, row, s=largest * share, facecolor="#9cc7e3", edgecolor=BLUE, linewidth=0.8, zorder=2
                )
            if share >= 0.005:  # beside a circle that is too small to hold it
                up = 0 if share >= 0.15 else 0.26
                axes.text(place, row - up, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5, zorder=3)
    axes.set_title("Place: % of resamples; line: 95 % interval", loc="left", fontsize=9.5)
    axes.set_xlabel("place")


def _draw_metric_ranks(
    axes: Axes, board: Board, ranking: Ranking, order: Sequence[int], weights: Mapping[str, float]
) -> None:
    for row in range(len(order)):
        axes.axhline(row, color=PALE, linewidth=0.6, zorder=0)
    offsets = np.linspace(-0.24, 0.24, len(board.metrics)) if len(board.metrics) > 1 else [0.0]
    for m, (metric, (marker, colour)) in enumerate(zip(board.metrics, MARKERS, strict=False)):
        means = ranking.ranks[m].mean(axis=0)[order]
        rows = np.arange(len(order)) + offsets[m]
        axes.scatter(means, rows, marker=marker, s=30, color=colour, label=f"{metric.label} (×{weights[metric.key]:g})")
    rows = np.arange(len(order))
    axes.scatter(ranking.mean_ranks[order], rows, marker="|", s=320, color=INK, linewidth=2, label="weighted mean")
    axes.set_title("Mean rank", loc="left", fontsize=9.5)
    axes.set_xlabel("rank (1 is best)")


def contour_legend() -> bytes:
    """The key of the contours' colours and styles. PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.0, 0.3))
        lines = [Line2D([], [], color=REFERENCE, lw=1.8), Line2D([], [], color=PREDICTION, lw=1.8, ls="--")]
        figure.legend(lines, ["reference", "prediction"], loc="center", ncols=2, frameon=False)
        return to_png(figure)
