"""Intervals and tests for a handful of accuracies; each function takes one value per seed.

The rule to know: five to ten seeds are few, so an interval is used only if it was seen to cover its
true value in 93-97 % of simulated draws at that size (tests/comparison/test_intervals.py). The
percentile bootstrap of rliable (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264), whose
interquartile mean and probability of improvement these are, is not used: at 5 seeds it covers 90 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit

from sparsetune.comparison.values import Interval

Values = Sequence[float]
_ALPHA = 0.05


def mean(values: Values) -> Interval:
    """The mean with Student's t interval. Two values at least, or nothing is known of the spread.

    Two or three seeds give an interval that may go beyond 0 and 1; it is not cut, as it says how
    little they tell.
    """
    x = _enough(values)
    return _t_interval(float(x.mean()), float(x.std(ddof=1)) / sqrt(len(x)), len(x) - 1)


def iqm(values: Values) -> Interval:
    """The interquartile mean: without the lowest and the highest quarter, rounded down.

    The interval of Tukey and McLaughlin (1963) in Yuen's form (1974,
    https://doi.org/10.1093/biomet/61.1.165): a t interval with the spread of the winsorized values
    and as many degrees of freedom as values are kept, less one. It covers 93-94 % for 4 to 10.
    """
    x = np.sort(_enough(values))
    n, cut = len(x), len(x) // 4
    kept = n - 2 * cut
    winsorized = x.clip(x[cut], x[n - 1 - cut])
    error = sqrt((n - 1) * float(winsorized.var(ddof=1)) / (kept * (kept - 1)))
    return _t_interval(float(x[cut : n - cut].mean()), error, kept - 1)


def improvement(a: Values, b: Values) -> Interval:
    """P(A > B) + P(A = B) / 2 for one run of each: the share of all pairs that a wins.

    The interval is method 5 of Newcombe (2006, https://doi.org/10.1002/sim.2324): every theta that
    is within 1.96 standard errors of that share, with the error taken at theta. It covers 94-97 %
    for 5 to 10 runs and true values up to 0.99, more with many ties or with seeds that move a and b
    together, 92-95 % where one spreads twice as wide; and it has a width where a wins all pairs.
    The logit interval of Brunner and Munzel (2000) has none there, and covers 69-99 %.
    """
    above = np.asarray(a)[:, None] - np.asarray(b)[None, :]
    share = float((above > 0).mean() + (above == 0).mean() / 2)
    return Interval(share, _lowest(share, *above.shape), 1 - _lowest(1 - share, *above.shape))


def difference(a: Values, b: Values) -> Interval:
    """The mean of a - b, seed by seed, with Student's t interval."""
    return mean(_paired(a, b).tolist())


def paired_p(a: Values, b: Values) -> float:
    """The p-value of the paired t test, on both sides; 1 where all pairs are equal."""
    x = _enough(_paired(a, b))
    if (x == x[0]).all():  # no spread to divide by
        return 1.0 if x[0] == 0 else 0.0
    t = float(x.mean()) / (float(x.std(ddof=1)) / sqrt(len(x)))
    return 2 * float(stdtr(len(x) - 1, -abs(t)))


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979), in the given order.

    That one of equal pairs is below 0.05 has a probability of 0.05 at most, however many are equal
    and however the tests depend on each other.
    """
    adjusted, least = [0.0] * len(ps), 0.0
    for done, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, min(1.0, (len(ps) - done) * ps[index]))
        adjusted[index] = least
    return adjusted


def different(better: Interval, adjusted_p: float) -> bool:
    """Whether two methods are called different: by their Holm-adjusted test and by `improvement`.

    Both, because seeds shared by two methods make a difference sure that is far below what two runs
    of one method differ by. Equal methods are called different in 1-4 % of simulations.
    """
    return adjusted_p < _ALPHA and not better.low <= 0.5 <= better.high


def best_of(values: Values) -> list[float]:
    """The expected best of k of these values, for k = 1 .. all: what k trials would have found.

    Drawn without replacement, which is unbiased; Dodge et al. (2019) draw with it, which is too low
    (Tang et al. 2020, https://aclanthology.org/2020.acl-main.246). All trials must be in it: one
    that diverged with the value it is worth.
    """
    x = np.sort(np.asarray(values, dtype=float))[::-1]
    n = len(x)
    fewer = np.arange(n - 1, 0, -1)  # how many values are below the 1st, 2nd, ... from the top
    best = []
    for k in range(1, n + 1):
        # The chance that the i-th smallest is the best of k is C(i-1, k-1) / C(n, k): k / n for
        # i = n, and that of i - 1 is (i - k) / (i - 1) of that of i. No binomial overflows.
        chance = k / n * np.cumprod(np.append(1.0, np.maximum(0, fewer + 1 - k) / fewer))
        best.append(float(chance @ x))
    return best


def _t_interval(value: float, error: float, freedom: int) -> Interval:
    half = float(stdtrit(freedom, 1 - _ALPHA / 2)) * error
    return Interval(value, value - half, value + half)


def _lowest(share: float, m: int, n: int) -> float:
    """The lower limit of Newcombe's method 5; the upper is its mirror, as the error is at theta."""
    k, z = (m + n) / 2 - 1, float(ndtri(1 - _ALPHA / 2))
    outside, inside = 0.0, share
    for _ in range(60):
        t = (outside + inside) / 2
        variance = t * (1 - t) * (1 + k * ((1 - t) / (2 - t) + t / (1 + t))) / (m * n)
        if (share - t) ** 2 > z * z * variance:
            outside = t
        else:
            inside = t
    return inside


def _paired(a: Values, b: Values) -> np.ndarray:
    assert len(a) == len(b), "one value per seed of each"
    return np.asarray(a) - np.asarray(b)


def _enough(values: Values | np.ndarray) -> np.ndarray:
    assert len(values) >= 2, "an interval needs two values"
    return np.asarray(values, dtype=float)
