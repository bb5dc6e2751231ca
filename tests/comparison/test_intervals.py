"""Published examples with their working, scipy, and simulations of what the intervals promise.

Simulated accuracies are normal with a deviation of 0.002 and rounded to 1e-4, as those of 10,000
test images are, so there are ties.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import combinations
from math import sqrt

import numpy as np
import pytest
from scipy import stats

from sparsetune.comparison.intervals import (
    best_of,
    difference,
    different,
    holm,
    improvement,
    iqm,
    mean,
    paired_p,
)
from sparsetune.comparison.values import Interval

# Hours of sleep gained by ten patients with two drugs: Student (1908), section IX.
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
DEVIATION = 0.002


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def accuracies(seed: int, *shape: int, shared: float = 0.0) -> np.ndarray:
    """Unrounded accuracies [..., methods, seeds]; `shared` of their variance is the seed's."""
    random = np.random.default_rng(seed)
    common = random.standard_normal((*shape[:-2], 1, shape[-1]))
    own = random.standard_normal(shape)
    return 0.98 + DEVIATION * (sqrt(shared) * common + sqrt(1 - shared) * own)


def coverage(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([i.low <= truth <= i.high for i in intervals]))


def test_paired_difference_of_students_sleep_data() -> None:
    # Differences 1.2 2.4 1.3 1.3 0 1.0 1.8 0.8 4.6 1.4: mean 1.58, deviation 1.230, t = 1.58 /
    # (1.230 / sqrt(10)) = 4.0621 with 9 degrees of freedom. R's t.test(paired = TRUE) on its data
    # set `sleep`: p = 0.002833, interval 0.7001142 to 2.4598858.
    assert difference(DRUG_2, DRUG_1) == pytest.approx((1.58, 0.7001142, 2.4598858), abs=1e-7)
    assert paired_p(DRUG_2, DRUG_1) == pytest.approx(0.002833, abs=1e-6)
    assert paired_p(DRUG_1, DRUG_2) == pytest.approx(stats.ttest_rel(DRUG_2, DRUG_1).pvalue)


def test_mean_has_students_interval() -> None:
    x = accuracies(1, 1, 7)[0]
    low, high = stats.t.interval(0.95, 6, x.mean(), stats.sem(x))
    assert mean(x.tolist()) == pytest.approx((x.mean(), low, high))


def test_interquartile_mean_by_hand() -> None:
    # One of five is cut on each side: (2 + 3 + 4) / 3 = 3. Winsorized 2 2 3 4 4: variance
    # (1 + 1 + 0 + 1 + 1) / 4 = 1, error sqrt(4 x 1 / (3 x 2)) = 0.8165; t(0.975; 2) = 4.3027.
    assert iqm([100, 2, 1, 4, 3]) == pytest.approx((3, 3 - 3.5131, 3 + 3.5131), abs=1e-4)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 10, 11, 19])
def test_interquartile_mean_is_scipys_trimmed_mean_with_yuens_interval(n: int) -> None:
    """Yuen's test of two samples is one of a single sample where the other has no spread."""
    x = accuracies(n, 1, n)[0]
    yuen = stats.ttest_ind(x, [0.0] * n, equal_var=False, trim=0.25).confidence_interval()
    assert iqm(x.tolist()) == pytest.approx((stats.trim_mean(x, 0.25), yuen.low, yuen.high))


def test_improvement_counts_ties_half() -> None:
    # Hanley and McNeil (1982), table I: CT images of 58 normal and 51 abnormal cases, rated 1 to 5.
    normal = np.repeat([1, 2, 3, 4, 5], [33, 6, 6, 11, 2]).tolist()
    abnormal = np.repeat([1, 2, 3, 4, 5], [3, 2, 2, 11, 33]).tolist()
    # 3 x 16.5 + 2 x (33 + 3) + 2 x (39 + 3) + 11 x (45 + 5.5) + 33 x (56 + 1) = 2642 of 2958
    # pairs: 0.893, as they have it.
    found = improvement(abnormal, normal)
    assert found.value == pytest.approx(2642 / 2958)
    u = stats.mannwhitneyu(abnormal, normal).statistic
    assert found.value == pytest.approx(u / (58 * 51))
    for limit in found[1:]:  # Newcombe (2006), method 5: (58 + 51) / 2 - 1 = 53.5
        spread = 1 + 53.5 * ((1 - limit) / (2 - limit) + limit / (1 + limit))
        error = sqrt(limit * (1 - limit) * spread / (58 * 51))
        assert abs(limit - found.value) == pytest.approx(1.959964 * error)


def test_improvement_where_one_wins_all_pairs() -> None:
    # At 0.6427: 0.6427 x 0.3573 x (1 + 4 (0.3573 / 1.3573 + 0.6427 / 1.6427)) / 25 = 0.03323,
    # and 1.96 x sqrt(0.03323) = 0.3573 = 1 - 0.6427.
    a, b = [6.0, 7, 8, 9, 10], [1.0, 2, 3, 4, 5]
    assert improvement(a, b) == pytest.approx((1, 0.6427, 1), abs=1e-4)
    assert improvement(b, a) == pytest.approx((0, 0, 0.3573), abs=1e-4)


def test_improvement_takes_samples_of_two_sizes() -> None:
    found, mirror = improvement([1, 4, 5], [2, 3]), improvement([2, 3], [1, 4, 5])
    assert found.value == pytest.approx(4 / 6)
    assert found == pytest.approx((1 - mirror.value, 1 - mirror.high, 1 - mirror.low))


def test_equal_values_have_no_spread() -> None:
    x = [0.9812] * 6
    assert mean(x) == pytest.approx((0.9812,) * 3)
    assert iqm(x) == pytest.approx((0.9812,) * 3)
    assert difference(x, x) == (0, 0, 0)
    assert paired_p(x, x) == 1
    assert paired_p([1.5, 2.5], [1, 2]) == 0
    found = improvement(x, x)
    assert found.value == 0.5 and found.low == pytest.approx(1 - found.high) and found.low < 0.25
    assert not different(found, 1.0)


def test_two_values_are_the_fewest() -> None:
    # 1 and 3: error sqrt(2) / sqrt(2) = 1, t(0.975; 1) = 12.706
    assert mean([1, 3]) == pytest.approx((2, 2 - 12.706, 2 + 12.706), abs=1e-3)
    assert iqm([1, 3]) == pytest.approx(mean([1, 3]))
    for function in (mean, iqm):
        with pytest.raises(AssertionError):
            function([1.0])


def test_holm_by_hand() -> None:
    # The example of pingouin's documentation: 5 x 0.0003, 4 x 0.003, 3 x 0.054, 2 x 0.32, and
    # 1 x 0.5, which is raised to the one before.
    found = holm([0.5, 0.003, 0.32, 0.054, 0.0003])
    assert found == pytest.approx([0.64, 0.012, 0.64, 0.162, 0.0015])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([]) == []


def test_different_asks_for_both() -> None:
    assert different(Interval(0.9, 0.6, 1), 0.04)
    assert different(Interval(0.1, 0, 0.4), 0.04)
    assert not different(Interval(0.9, 0.6, 1), 0.05)
    assert not different(Interval(0.8, 0.5, 0.9), 0.01)


def test_best_of_is_the_mean_over_all_draws() -> None:
    x = [0.3, 0.9, 0.1, 0.9, 0.4, 0.7]
    drawn = [np.mean([max(some) for some in combinations(x, k)]) for k in range(1, 7)]
    assert best_of(x) == pytest.approx(drawn)
    assert best_of([0.5]) == [0.5]
    assert best_of([]) == []


def test_best_of_many() -> None:
    """The best of k of 1 .. n is k (n + 1) / (k + 1) on average."""
    expected = [k * 1001 / (k + 1) for k in range(1, 1001)]
    assert best_of(list(range(1, 1001))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("function", [mean, iqm])
def test_intervals_cover(function: Callable[[list[float]], Interval], n: int) -> None:
    draws = accuracies(n, 2000, 1, n).round(4)
    found = coverage([function(x.tolist()) for x in draws[:, 0]], 0.98)
    assert 0.93 <= found <= 0.97


@pytest.mark.parametrize("n", [5, 10])
def test_intervals_of_differences_cover(n: int) -> None:
    draws = accuracies(n, 2000, 2, n, shared=0.5).round(4)
    assert 0.93 <= coverage([difference(*x.tolist()) for x in draws], 0) <= 0.97


@pytest.mark.parametrize("truth", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("n", [5, 10])
def test_intervals_of_improvement_cover(n: int, truth: float) -> None:
    draws = accuracies(n, 2000, 2, n)
    draws[:, 0] += stats.norm.ppf(truth) * sqrt(2) * DEVIATION  # a - b deviates by sqrt(2) as much
    found = coverage([improvement(*x.tolist()) for x in draws.round(4)], truth)
    assert 0.93 <= found <= 0.97


def test_the_percentile_bootstrap_is_not_used_because_it_covers_too_little() -> None:
    random = np.random.default_rng(5)
    covered = 0
    for x in accuracies(5, 2000, 1, 5)[:, 0]:
        again = np.sort(x[random.integers(0, 5, (1000, 5))])
        low, high = np.percentile(again[:, 1:4].mean(1), [2.5, 97.5])
        covered += low <= 0.98 <= high
    assert covered / 2000 < 0.92


def called_different(x: np.ndarray) -> int:
    """How many pairs of methods [methods, seeds] are called different, all pairs adjusted for."""
    pairs = list(combinations(x.round(4).tolist(), 2))
    adjusted = zip(pairs, holm([paired_p(*pair) for pair in pairs]), strict=True)
    # The interval is slow, and not asked for by far the most.
    return sum(different(improvement(*pair), p) for pair, p in adjusted if p < 0.05)


@pytest.mark.parametrize("shared", [0.0, 0.5])
@pytest.mark.parametrize("n", [6, 8, 10])
def test_two_equal_methods_are_seldom_called_different(n: int, shared: float) -> None:
    draws = accuracies(n, 1000, 2, n, shared=shared)
    assert sum(called_different(x) > 0 for x in draws) <= 50


@pytest.mark.parametrize("n", [6, 8, 10])
def test_seven_equal_methods_are_seldom_called_different(n: int) -> None:
    """Any two of them, which is the error that Holm's correction of the 21 tests is for."""
    draws = accuracies(n, 1000, 7, n)
    assert sum(called_different(x) > 0 for x in draws) <= 50


@pytest.mark.parametrize(("n", "power"), [(6, 0.7), (8, 0.9), (10, 0.95)])
def test_two_methods_that_differ_by_two_deviations_are_mostly_called_different(
    n: int, power: float
) -> None:
    draws = accuracies(n, 1000, 2, n)
    draws[:, 1] += 2 * DEVIATION
    assert sum(map(called_different, draws)) >= 1000 * power
