"""Rank-then-aggregate: which team comes first, how sure that is, and which differences are more than chance.

    python -m eval rank TEAM=DIR TEAM=DIR … --out ranking

Teams are ranked on every case for every metric, ties sharing the smallest rank; a team's score is the weighted mean of
all its ranks. A case without a mask counts as DSC 0 and NSD 0, and ranks behind every mask in time and area.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from .cases import printable, write_json, write_table, write_whole
from .results import (
    ACCURACY,
    EFFICIENCY,
    check_folder,
    find,
    not_scored,
    read_accuracy,
    read_column,
    read_efficiency,
    without_mask,
)
from .statistics import bootstrap_means, holm, wilcoxon_p

DIGITS = 9  # values that agree so far are tied; beyond, only the order of summation differs, or a float's last bits
SIGNIFICANT = 0.05
LARGEST_WEIGHT = 1e6


@dataclass(frozen=True)
class Metric:
    """A column of a table that teams are ranked by; `worst` is what a case without a mask counts as."""

    key: str
    label: str
    table: str
    column: str
    unit: str
    higher_is_better: bool
    worst: float
    highest: float


METRICS = (
    Metric("dsc", "DSC", ACCURACY, "Lesion_DSC", "", True, 0.0, 1.0),
    Metric("nsd", "NSD", ACCURACY, "Lesion_NSD", "", True, 0.0, 1.0),
    Metric("time", "Time", EFFICIENCY, "Time", "s", False, np.inf, np.inf),
    Metric("area", "GPU area", EFFICIENCY, "AUC_GPU_Time", "MiB·s", False, np.inf, np.inf),
)


@dataclass(frozen=True)
class Team:
    """What a team's tables hold: by metric key, a value a case.

    no_mask: cases of which its JSON files, where it has them, know that there is no mask; unscored: of which they know
    that the mask could not be measured.
    """

    name: str
    values: Mapping[str, Mapping[str, float]]
    no_mask: frozenset[str] = frozenset()
    unscored: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Board:
    """values (metric, case, team), NaN where a team has none; missed: cases without a mask, by team."""

    teams: tuple[str, ...]
    metrics: tuple[Metric, ...]
    cases: tuple[str, ...]
    values: NDArray[np.float64]
    missed: dict[str, tuple[str, ...]]

    def filled(self) -> NDArray[np.float64]:
        """The values with the worst one in place of NaN."""
        worst = np.array([metric.worst for metric in self.metrics])[:, None, None]
        return np.where(np.isnan(self.values), worst, self.values)


@dataclass(frozen=True)
class Ranking:
    """Arrays over teams in the board's order; `ranks` is (metric, case, team), `shares` (team, place).

    mean_ranks: weighted over metrics; low, high: 95 % bootstrap interval of the place, rounded outwards;
    shares: part of the resamples in which the team takes that place.
    """

    ranks: NDArray[np.int64]
    mean_ranks: NDArray[np.float64]
    places: NDArray[np.int64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]
    shares: NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """Two teams by one metric: cases in which `team` is better or worse than `other`, and the two-sided p-value."""

    metric: str
    team: str
    other: str
    better: int
    worse: int
    p: float
    p_holm: float


def min_ranks(values: NDArray[np.float64], higher_is_better: bool) -> NDArray[np.int64]:
    """Ranks from 1 along the last axis; equal values share the smallest rank, which the next one then skips."""
    signed = values if higher_is_better else -values
    return 1 + (signed[..., None, :] > signed[..., :, None]).sum(axis=-1)


def assemble(teams: Sequence[Team], metrics: Sequence[Metric]) -> Board:
    """Bring teams together on the union of their cases: those of the accuracy tables, where these are ranked."""
    leading = metrics[0].key  # METRICS lists accuracy first
    cases = sorted(set().union(*(team.values[leading] for team in teams)))
    values = np.full((len(metrics), len(cases), len(teams)), np.nan)
    missed = {}
    for t, team in enumerate(teams):
        missed[team.name] = tuple(case for case in cases if case not in team.values[leading] or case in team.no_mask)
        for (m, metric), (c, case) in itertools.product(enumerate(metrics), enumerate(cases)):
            if case not in missed[team.name]:
                values[m, c, t] = team.values[metric.key].get(case, np.nan)
    return Board(tuple(team.name for team in teams), tuple(metrics), tuple(cases), values, missed)


def rank(board: Board, weights: Mapping[str, float], resamples: int = 1000, seed: int = 0) -> Ranking:
    """Rank-then-aggregate with equal cases and weighted metrics; cases are resampled for the places' stability."""
    filled = board.filled()
    ranks = np.stack([min_ranks(filled[m], metric.higher_is_better) for m, metric in enumerate(board.metrics)])
    share = np.array([weights[metric.key] for metric in board.metrics], np.float64)
    per_case = np.tensordot(share / share.sum(), ranks, axes=1)
    mean_ranks = per_case.mean(axis=0).round(DIGITS)
    drawn = min_ranks(bootstrap_means(per_case, resamples, seed).round(DIGITS), higher_is_better=False)
    low = np.percentile(drawn, 2.5, axis=0, method="lower")
    high = np.percentile(drawn, 97.5, axis=0, method="higher")
    shares = np.stack([(drawn == place).mean(axis=0) for place in range(1, len(board.teams) + 1)], axis=1)
    return Ranking(ranks, mean_ranks, min_ranks(mean_ranks, higher_is_better=False), low, high, shares)


def compare(board: Board) -> list[Pair]:
    """Wilcoxon's signed-rank test of every two teams by every metric, corrected after Holm within a metric."""
    filled = board.filled()
    teams = list(itertools.combinations(range(len(board.teams)), 2))
    pairs = []
    for m, metric in enumerate(board.metrics):
        signed = filled[m] if metric.higher_is_better else -filled[m]
        p_values = [wilcoxon_p(differences(signed[:, a], signed[:, b])) for a, b in teams]
        for (a, b), p, p_holm in zip(teams, p_values, holm(p_values), strict=True):
            better, worse = (int((signed[:, x] > signed[:, y]).sum()) for x, y in ((a, b), (b, a)))
            pairs.append(Pair(metric.key, board.teams[a], board.teams[b], better, worse, p, p_holm))
    return pairs


def differences(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of paired values, those that differ; 0.8 − 0.7 is as much as 0.5 − 0.4.

    Infinite values stand for missed cases: the difference of one is the largest of all, of two it is none.
    """
    differs = first != second
    found = (first[differs] - second[differs]).round(DIGITS)
    return found[found != 0]


def parse_weights(settings: Sequence[str]) -> dict[str, float]:
    """`("time=0.5",)` → a weight for each metric, 1 where none is named."""
    weights = {metric.key: 1.0 for metric in METRICS}
    for setting in settings:
        key, _, number = setting.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if key not in weights or not 0 <= weight <= LARGEST_WEIGHT:
            raise ValueError(f"--weights {setting}: write METRIC=NUMBER, the metric one of {', '.join(weights)}")
        weights[key] = weight
    if not any(weights.values()):
        raise ValueError("--weights: all are 0: leave one metric in")
    return weights


def parse_teams(settings: Sequence[str]) -> dict[str, Path]:
    """`("A=runs/a",)` → folders by team."""
    teams: dict[str, Path] = {}
    for setting in settings:
        name, _, folder = setting.partition("=")
        if not name or not folder:
            raise ValueError(f"{setting}: write TEAM=DIR, a name and the folder of its tables")
        if printable(name) != name:
            raise ValueError(f"{printable(setting)}: the team's name is not UTF-8: write it otherwise")
        if name in teams:
            raise ValueError(f"{setting}: the team {name} is named twice: give each team a name of its own")
        teams[name] = Path(folder)
    if len(teams) < 2:
        raise ValueError("a ranking needs two teams or more: write TEAM=DIR for each")
    return teams


def read_team(name: str, folder: Path, metrics: Sequence[Metric]) -> Team:
    """Read the tables that these metrics need; ValueError that names the folder where one is not there."""
    check_folder(folder)
    files = {ACCURACY: "accuracy.csv", EFFICIENCY: "*_Efficiency.csv"}
    values = {}
    for metric in metrics:
        table = find(folder, metric.table, files[metric.table])
        if table is None:
            zero = " ".join(f"{other.key}=0" for other in METRICS if other.table == metric.table)
            raise ValueError(
                f"{folder}: holds no {files[metric.table]}: let `python -m eval {metric.table}` write it there, or "
                f"rank without it (--weights {zero})"
            )
        values[metric.key] = read_column(table, metric.column, metric.highest)
    accuracy, efficiency = read_accuracy(folder), read_efficiency(folder)
    return Team(name, values, frozenset(without_mask(accuracy, efficiency)), frozenset(not_scored(accuracy)))


def without_empty(teams: Sequence[Team], metrics: Sequence[Metric]) -> tuple[list[Metric], list[str]]:
    """The metrics that every team has values of, and a sentence for each one left out."""
    kept, notes = [], []
    for metric in metrics:
        lacking = [team.name for team in teams if not team.values[metric.key]]
        if lacking:
            notes.append(f"{metric.label} is left out: no value of {metric.column} from {', '.join(lacking)}.")
        else:
            kept.append(metric)
    if not kept:
        raise ValueError("no metric is left to rank by: measure the teams again, or weigh other metrics")
    return kept, notes


def remarks(board: Board, teams: Sequence[Team]) -> list[str]:
    """What is uneven between the teams, a sentence each."""
    notes = []
    for t, team in enumerate(board.teams):
        missed = board.missed[team]
        for kept, what in ((False, "has no mask of"), (True, "was not scored, as accuracy.json tells, in")):
            if some := [case for case in missed if (case in teams[t].unscored) == kept]:
                notes.append(
                    f"{team} {what} {_some(some, len(board.cases))}: DSC and NSD count 0 there, and time and area rank "
                    "behind every team that has one."
                )
        for m, metric in enumerate(board.metrics):
            absent = [case for c, case in enumerate(board.cases) if np.isnan(board.values[m, c, t])]
            if rest := [case for case in absent if case not in missed]:
                notes.append(f"{team} has no {metric.column} of {_some(rest, len(board.cases))}: it ranks last there.")
    everything = {case for team in teams for metric in board.metrics for case in team.values[metric.key]}
    if unscored := sorted(everything - set(board.cases)):
        notes.append(f"Without a row in any accuracy table, and left out: {', '.join(unscored)}.")
    return notes


def _some(cases: Sequence[str], total: int) -> str:
    shown = ", ".join(cases[:5]) + (", …" if len(cases) > 5 else "")
    return f"{len(cases)} of the {total} cases ({shown})"


@dataclass(frozen=True)
class Settings:
    """Rank teams over DSC, NSD, time and GPU memory-time area, with the places' stability and paired tests."""

    teams: tyro.conf.Positional[tuple[str, ...]]  # TEAM=DIR each, DIR with accuracy.csv and NAME_Efficiency.csv
    out: Path = Path("ranking")  # folder for the tables, ranking.json and ranking.png
    weights: tuple[str, ...] = ()  # e.g. dsc=1 nsd=1 time=0.5 area=0.5; 1 where not named, 0 leaves a metric out
    resamples: int = 1000  # of the cases, for the intervals of the places
    seed: int = 0  # of the resampling

    def run(self) -> int:
        folders, weights = parse_teams(self.teams), parse_weights(self.weights)
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: give 0 or more")
        wanted = [metric for metric in METRICS if weights[metric.key]]
        teams = [read_team(name, folder, wanted) for name, folder in folders.items()]
        metrics, notes = without_empty(teams, wanted)
        board = assemble(teams, metrics)
        notes += remarks(board, teams)
        ranking = rank(board, weights, self.resamples, self.seed)
        self._write(board, ranking, compare(board), weights, notes)
        tell(board, ranking, notes, self.out)
        return 1 if any(board.missed.values()) else 0

    def _write(
        self, board: Board, ranking: Ranking, pairs: list[Pair], weights: dict[str, float], notes: list[str]
    ) -> None:
        from . import figures  # matplotlib: slow to import, and only drawing needs it

        self.out.mkdir(parents=True, exist_ok=True)
        rows, cases = team_rows(board, ranking), case_rows(board, ranking)
        write_table(self.out / "ranking.csv", rows, rows[0])
        write_table(self.out / "ranking_cases.csv", cases, cases[0])
        write_table(self.out / "ranking_pairs.csv", [asdict(pair) for pair in pairs], Pair.__dataclass_fields__)
        values = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "folders": {name: str(folder.resolve()) for name, folder in parse_teams(self.teams).items()},
            "weights": {metric.key: weights[metric.key] for metric in board.metrics},
            "resamples": self.resamples,
            "seed": self.seed,
            "cases": list(board.cases),
            "missed": {team: list(missed) for team, missed in board.missed.items()},
            "notes": notes,
            "ranking": rows,
            "pairs": [{**asdict(pair), "significant": pair.p_holm < SIGNIFICANT} for pair in pairs],
        }
        write_json(self.out / "ranking.json", values)
        write_whole(self.out / "ranking.png", figures.places_and_ranks(board, ranking, weights))


def standing(board: Board, ranking: Ranking) -> list[int]:
    """Indices of the teams, best first; tied ones by name."""
    return sorted(range(len(board.teams)), key=lambda t: (ranking.mean_ranks[t], board.teams[t]))


def team_rows(board: Board, ranking: Ranking) -> list[dict[str, Any]]:
    """A row a team, first place first: place and interval, mean ranks and values, and the share of each place.

    Mean values are over the cases that have one, but a missed case counts 0 in DSC and NSD.
    """
    rows = []
    for t in standing(board, ranking):
        row: dict[str, Any] = {"team": board.teams[t], "place": int(ranking.places[t])}
        row |= {"place_low": int(ranking.low[t]), "place_high": int(ranking.high[t])}
        row |= {"mean_rank": round(float(ranking.mean_ranks[t]), 4), "missed": len(board.missed[board.teams[t]])}
        for m, metric in enumerate(board.metrics):
            row[f"rank_{metric.key}"] = round(float(ranking.ranks[m, :, t].mean()), 4)
            row[f"mean_{metric.key}"] = _finite_mean(board.filled()[m, :, t])
        row |= {f"share_place_{place}": float(share) for place, share in enumerate(ranking.shares[t], 1)}
        rows.append(row)
    return rows


def _finite_mean(values: NDArray[np.float64]) -> float | None:
    finite = values[np.isfinite(values)]
    return round(float(finite.mean()), 4) if len(finite) else None


def case_rows(board: Board, ranking: Ranking) -> list[dict[str, Any]]:
    """A row a case and team: what was measured, None where nothing was, and the ranks."""
    rows = []
    for (c, case), (t, team) in itertools.product(enumerate(board.cases), enumerate(board.teams)):
        row: dict[str, Any] = {"case": case, "team": team, "missed": case in board.missed[team]}
        for m, metric in enumerate(board.metrics):
            value = float(board.values[m, c, t])
            row |= {metric.key: None if np.isnan(value) else value, f"rank_{metric.key}": int(ranking.ranks[m, c, t])}
        rows.append(row)
    return rows


def tell(board: Board, ranking: Ranking, notes: Sequence[str], out: Path) -> None:
    """The places on stdout, what is uneven on stderr."""
    for note in notes:
        print(note, file=sys.stderr)
    for row in team_rows(board, ranking):
        ranks = ", ".join(f"{metric.label} {row[f'rank_{metric.key}']:.2f}" for metric in board.metrics)
        interval = f"95 % interval {row['place_low']} to {row['place_high']}"
        print(f"{row['place']}. {row['team']}: mean rank {row['mean_rank']:.3f} ({ranks}), {interval}")
    print(f"{len(board.cases)} cases; tables and plot in {out}")
