"""Summaries of per-case scores and the corrections that a comparison of several teams needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

INTERVAL_PERCENT = 95.0
# Bootstrap indices drawn at once; bounds the memory of a resampling of thousands of cases to some tens of MiB.
CHUNK_DRAWS = 2_000_000
EXACT_CASES = 50  # up to so many, Wilcoxon's p-value is exact; beyond, the normal distribution is close


@dataclass(frozen=True)
class Spread:
    """How one score is spread over the cases; ``low`` and ``high`` bound the 95 % bootstrap interval of the mean."""

    mean: float
    sd: float
    median: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """The five numbers by name, ready for JSON."""
        return asdict(self)


def spread(values: Sequence[float], resamples: int = 1000, seed: int = 0) -> Spread | None:
    """Mean, sample standard deviation (n - 1; 0 for one value), median, and 95 % interval of the mean.

    The interval is the percentile bootstrap over the values. None for no values, so that a mean over nothing is
    shown as absent and never as 0. A value that is not finite is a ``ValueError``: it would turn all five into NaN.
    """
    scores = np.asarray(values, dtype=np.float64).ravel()
    if scores.size == 0:
        return None
    if not np.isfinite(scores).all():
        raise ValueError("A score that is not a finite number cannot be averaged; leave such cases out beforehand.")
    low, high = interval_of(bootstrap_means(scores, resamples, seed))
    return Spread(
        mean=float(scores.mean()),
        sd=float(scores.std(ddof=1)) if scores.size > 1 else 0.0,
        median=float(np.median(scores)),
        low=float(low),
        high=float(high),
    )


def bootstrap_means(scores: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means over cases of resampled cases.

    ``scores`` is (cases,) or (cases, columns); rows are drawn together, so that columns stay paired. Returns
    (resamples,) or (resamples, columns) float64.
    """
    if resamples < 1:
        raise ValueError(f"A bootstrap needs at least 1 resample, not {resamples}.")
    generator = np.random.default_rng(seed)
    cases = scores.shape[0]
    rows = max(1, CHUNK_DRAWS // scores.size)
    parts = []
    for start in range(0, resamples, rows):
        drawn = generator.integers(0, cases, size=(min(rows, resamples - start), cases))
        parts.append(scores[drawn].mean(axis=1))
    return np.concatenate(parts)


def interval_of(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bound of the central 95 % of the samples along axis 0 (linear between order statistics)."""
    tail = (100.0 - INTERVAL_PERCENT) / 2
    low, high = np.percentile(samples, [tail, 100.0 - tail], axis=0)
    return low, high


def wilcoxon_p(differences: NDArray[np.float64]) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test of paired differences, none of them zero; 1 where there is none.

    Exact, ties included, up to 50 cases (SciPy's exact distribution knows no ties). An infinite difference is a large
    one.
    """
    from scipy.stats import rankdata, wilcoxon  # slow to import, and only ranking needs it

    if len(differences) == 0:
        return 1.0
    if len(differences) > EXACT_CASES:
        return float(wilcoxon(differences).pvalue)
    doubled = (2 * rankdata(np.abs(differences))).astype(int)  # ranks of ties end in a half
    chances = np.ones(1)  # of each sum of the ranks that are positive, where every sign is as likely
    for rank in doubled:
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    positive = int(doubled[differences > 0].sum())
    return float(min(1.0, 2 * min(chances[: positive + 1].sum(), chances[positive:].sum())))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given.

    The i-th smallest of n (counting from 0) is multiplied by n - i; adjusted values never fall along that order and
    never exceed 1. Holm, Scand J Stat 6 (1979) 65-70.
    """
    given = np.asarray(p_values, dtype=np.float64)
    if given.size and not ((given >= 0) & (given <= 1)).all():
        raise ValueError("A p-value must lie between 0 and 1.")
    order = np.argsort(given, kind="stable")
    stepped = given[order] * np.arange(given.size, 0, -1)
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return [float(value) for value in adjusted]
