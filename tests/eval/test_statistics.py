"""Summaries and Holm's correction, against numbers derived by hand and SciPy's bootstrap."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from eval.statistics import CHUNK_DRAWS, EXACT_CASES, bootstrap_means, holm, spread, wilcoxon_p


def test_spread_by_hand() -> None:
    result = spread([4.0, 1.0, 2.0, 3.0])
    assert result is not None
    assert (result.mean, result.median) == (2.5, 2.5)
    assert result.sd == pytest.approx(math.sqrt((1.5**2 + 0.5**2 + 0.5**2 + 1.5**2) / 3))
    assert 1.0 <= result.low < 2.5 < result.high <= 4.0


def test_spread_of_two_values_reaches_both() -> None:
    # Resampling 0 and 1 gives the means 0, 0.5 and 1 with probability 1/4, 1/2, 1/4: both tails are wider than 2.5 %.
    result = spread([0.0, 1.0])
    assert result is not None
    assert (result.low, result.high) == (0.0, 1.0)
    assert result.sd == pytest.approx(math.sqrt(0.5))


def test_spread_of_one_value_and_of_none() -> None:
    result = spread([0.25])
    assert result is not None
    assert result.to_dict() == {"mean": 0.25, "sd": 0.0, "median": 0.25, "low": 0.25, "high": 0.25}
    assert spread([]) is None


def test_interval_agrees_with_scipys_bootstrap() -> None:
    values = np.random.default_rng(7).beta(2, 3, 60)
    result = spread(values.tolist(), resamples=20_000, seed=1)
    independent = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=2)
    assert result is not None
    # Of 20 000 resamples a bound's own error is about 2 % of the mean's standard error (0.026): 0.0005.
    assert result.low == pytest.approx(independent.confidence_interval.low, abs=0.002)
    assert result.high == pytest.approx(independent.confidence_interval.high, abs=0.002)


def test_spread_is_repeatable_and_seeded() -> None:
    values = np.random.default_rng(3).random(25).tolist()
    assert spread(values) == spread(values)
    assert spread(values, seed=1) != spread(values, seed=2)


def test_spread_becomes_json() -> None:
    result = spread(np.array([0.1, 0.7], np.float32).tolist())
    assert result is not None
    assert set(json.loads(json.dumps(result.to_dict()))) == {"mean", "sd", "median", "low", "high"}


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(odd: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        spread([0.5, odd])


def test_bootstrap_keeps_columns_paired_across_chunks() -> None:
    values = np.random.default_rng(0).random(3000)
    assert values.size * 2 * 800 > CHUNK_DRAWS  # so that it is drawn in parts
    means = bootstrap_means(np.stack([values, 1 - values], axis=1), resamples=800, seed=5)
    assert means.shape == (800, 2)
    np.testing.assert_allclose(means.sum(axis=1), 1)  # only if each resample takes the same rows of both columns
    assert means[:, 0].std() == pytest.approx(values.std() / math.sqrt(3000), rel=0.1)
    assert len(np.unique(means[:, 0])) == 800


def test_bootstrap_needs_a_resample() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        bootstrap_means(np.array([1.0]), resamples=0, seed=0)


def test_holm_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04; the last may not fall below 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_never_exceeds_one_and_leaves_one_test_alone() -> None:
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_holm_with_ties_by_hand() -> None:
    assert holm([0.02, 0.02, 0.5]) == pytest.approx([0.06, 0.06, 0.5])


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_holm_refuses_what_is_no_probability(p: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, p])


def test_wilcoxon_with_ties_counts_every_way_to_sign_the_ranks() -> None:
    """Of 1, −1, 1, 2, 2, 3, by hand: ranks 2, 2, 2, 4.5, 4.5, 6, of which the negative one is 2."""
    ranks, observed = np.array([2, 2, 2, 4.5, 4.5, 6]), 19.0
    sums = np.array([ranks @ signs for signs in itertools.product((0, 1), repeat=6)])
    expected = 2 * (sums >= observed).mean()  # the distribution is symmetric
    assert wilcoxon_p(np.array([1.0, -1, 1, 2, 2, 3])) == pytest.approx(expected) == 8 / 64
    assert wilcoxon_p(-np.array([1.0, -1, 1, 2, 2, 3])) == pytest.approx(expected)
    assert wilcoxon_p(np.array([1.0, -1])) == 1.0


@pytest.mark.parametrize("count", [1, 4, 13, EXACT_CASES, EXACT_CASES + 1])
def test_wilcoxon_without_ties_is_scipys(count: int) -> None:
    differences = np.random.default_rng(count).normal(0.3, 1, count)
    assert wilcoxon_p(differences) == pytest.approx(stats.wilcoxon(differences).pvalue)


def test_wilcoxon_with_ties_is_scipys_enumeration() -> None:
    differences = np.random.default_rng(0).choice([-0.2, -0.1, 0.1, 0.2, 0.3], 12)
    expected = stats.wilcoxon(differences, method=stats.PermutationMethod()).pvalue
    assert wilcoxon_p(differences) == pytest.approx(expected)
