"""The operations under the rules, noise and initial counts, against plain Python and by hand.

References are written in exact arithmetic (`Fraction`) or as the published loop; nothing expected
here was taken from the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsetune.methods import distribution, noise, ops
from sparsetune.settings import TrialSettings, keys_of

torch.set_num_threads(1)
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)

NAN = math.nan
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def vec(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def num(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


def positions(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


# lowest -------------------------------------------------------------------------------------------


def lowest_by_hand(score: Sequence[float], eligible: Sequence[bool], count: int) -> list[int]:
    """Positions, in order of (NaN or not, score, position)."""
    allowed = [i for i, ok in enumerate(eligible) if ok]
    numbers = sorted((i for i in allowed if not math.isnan(score[i])), key=lambda i: (score[i], i))
    order = numbers + [i for i in allowed if math.isnan(score[i])]
    return sorted(order[: max(count, 0)])


LOWEST_CASES = [
    # score, eligible, count, expected positions
    pytest.param([3, 1, 2], [1, 1, 1], 2, [1, 2], id="two-of-three"),
    pytest.param([3, 1, 2], [1, 0, 1], 1, [2], id="the-lowest-is-not-eligible"),
    pytest.param([1, 1, 1, 1], [1, 1, 1, 1], 2, [0, 1], id="ties-go-to-the-lower-position"),
    pytest.param([2, 1, 2, 0, 2], [1, 1, 1, 1, 1], 4, [0, 1, 2, 3], id="ties-at-the-boundary"),
    pytest.param([0.0, -0.0, 0.0], [1, 1, 1], 1, [0], id="minus-zero-ties-with-zero"),
    pytest.param([NAN, 5, NAN, 7], [1, 1, 1, 1], 3, [0, 1, 3], id="nan-is-the-highest"),
    pytest.param([NAN, NAN], [1, 1], 1, [0], id="all-nan"),
    pytest.param([-math.inf, math.inf, 0], [1, 1, 1], 2, [0, 2], id="infinities"),
    pytest.param([3, 1, 2], [1, 1, 1], 0, [], id="none"),
    pytest.param([3, 1, 2], [1, 1, 1], -1, [], id="a-negative-count-is-none"),
    pytest.param([3, 1, 2], [1, 1, 0], 2, [0, 1], id="all-eligible"),
    pytest.param([3, 1, 2], [0, 1, 1], 99, [1, 2], id="more-than-there-are"),
    pytest.param([3, 1, 2], [0, 0, 0], 2, [], id="none-eligible"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("score", "eligible", "count", "expected"), LOWEST_CASES)
def test_lowest(
    score: list[float], eligible: list[int], count: int, expected: list[int], dtype: torch.dtype
) -> None:
    scores, allowed = torch.tensor(score, dtype=dtype), torch.tensor(eligible, dtype=torch.bool)
    assert positions(ops.lowest(scores, allowed, num(count))) == expected
    lifted = torch.vmap(ops.lowest)(scores[None], allowed[None], num(count)[None])
    assert positions(lifted[0]) == expected


@st.composite
def lowest_inputs(draw: st.DrawFn) -> tuple[list[list[float]], list[list[bool]], list[int]]:
    size, slots = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    # Few distinct values, so that ties are common; halves are exact in every dtype.
    value = st.integers(-4, 4).map(lambda n: n / 2) | st.just(NAN)
    rows = st.lists(st.lists(value, min_size=size, max_size=size), min_size=slots, max_size=slots)
    flags = st.lists(
        st.lists(st.booleans(), min_size=size, max_size=size), min_size=slots, max_size=slots
    )
    counts = st.lists(st.integers(0, size + 2), min_size=slots, max_size=slots)
    return draw(rows), draw(flags), draw(counts)


@quick
@given(lowest_inputs(), st.sampled_from(DTYPES))
def test_lowest_equals_sorting_alone_and_lifted_with_a_count_per_slot(
    inputs: tuple[list[list[float]], list[list[bool]], list[int]], dtype: torch.dtype
) -> None:
    scores, flags, counts = inputs
    score, eligible = torch.tensor(scores, dtype=dtype), torch.tensor(flags)
    count = torch.tensor(counts, dtype=torch.float64)
    expected = [lowest_by_hand(*row) for row in zip(scores, flags, counts, strict=True)]
    alone = [positions(ops.lowest(*row)) for row in zip(score, eligible, count, strict=True)]
    assert alone == expected
    assert [positions(row) for row in torch.vmap(ops.lowest)(score, eligible, count)] == expected


@pytest.mark.parametrize("levels", [0, 30], ids=["distinct", "ties"])
@pytest.mark.parametrize("order", ["random", "rising", "falling"])
@pytest.mark.parametrize("wanted", [1, 7, 400, 4_000, 19_999])
def test_lowest_of_many_is_what_sorting_gives(levels: int, order: str, wanted: int) -> None:
    # A sample guesses where the last one lies, and the sorted orders make it guess badly.
    score = torch.rand(80_000, generator=torch.Generator().manual_seed(0))
    score = (score * levels).floor() if levels else score
    if order != "random":
        score = score.sort(descending=order == "falling").values
    eligible = torch.arange(len(score)) % 5 > 0
    expected = torch.zeros_like(eligible)
    expected[score.masked_fill(~eligible, math.inf).argsort(stable=True)[:wanted]] = True
    assert torch.equal(ops.lowest(score, eligible, num(wanted)), expected)


def test_lowest_lifted_over_one_argument_at_a_time() -> None:
    score, eligible = vec(3, 1, 2, 1), torch.tensor([True, True, True, False])
    # counts 0, 1, 2, 3 of the order 1, 2, 0
    by_count = torch.vmap(ops.lowest, in_dims=(None, None, 0))(score, eligible, vec(0, 1, 2, 3))
    assert [positions(row) for row in by_count] == [[], [1], [1, 2], [0, 1, 2]]
    columns = torch.stack([score, -score], 1)  # the slot axis comes second
    by_score = torch.vmap(ops.lowest, in_dims=(1, None, None))(columns, eligible, num(1))
    assert [positions(row) for row in by_score] == [[1], [0]]
    flags = torch.tensor([[True, False, True, False], [False, False, False, True]])
    by_flag = torch.vmap(ops.lowest, in_dims=(None, 0, None))(score, flags, num(1))
    assert [positions(row) for row in by_flag] == [[2], [3]]


def test_lowest_leaves_its_inputs_and_takes_parameters() -> None:
    weight = torch.nn.Parameter(vec(NAN, 2, 1))
    eligible = torch.ones(3, dtype=torch.bool)
    assert positions(ops.lowest(weight, eligible, num(2))) == [1, 2]
    assert torch.isnan(weight[0])
    assert bool(eligible.all())


# Shares to counts ---------------------------------------------------------------------------------


def fill_by_hand(
    shares: Sequence[Fraction], amount: Fraction, caps: Sequence[Fraction]
) -> list[Fraction]:
    """min(cap, x * share) with the sum `amount`, by handing the overflow on until none is left."""
    given_out = [Fraction(0)] * len(shares)
    open_layers = [i for i, share in enumerate(shares) if share > 0]
    left = amount
    while open_layers and left > 0:
        sharing = sum(shares[i] for i in open_layers)
        full = [i for i in open_layers if shares[i] * left / sharing >= caps[i]]
        if not full:
            for i in open_layers:
                given_out[i] = shares[i] * left / sharing
            break
        for i in full:
            given_out[i] = caps[i]
            left -= caps[i]
        open_layers = [i for i in open_layers if i not in full]
    return given_out


def quotas_by_hand(shares: Sequence[int], amount: int, caps: Sequence[int]) -> list[Fraction]:
    """What each layer would get if weights could be split; then the rest goes by room."""
    amount = min(amount, sum(caps))
    limits = [Fraction(cap) for cap in caps]
    fill = fill_by_hand([Fraction(share) for share in shares], Fraction(amount), limits)
    room = [cap - got for cap, got in zip(limits, fill, strict=True)]
    more = fill_by_hand(room, amount - sum(fill, Fraction(0)), room)
    return [a + b for a, b in zip(fill, more, strict=True)]


APPORTION_CASES = [
    # shares, amount, caps, expected
    pytest.param([1, 1], 4, [9, 9], [2, 2], id="even"),
    # 7 * (5, 3, 2) / 10 = 3.5, 2.1, 1.4: floors 3, 2, 1, one unit left for the remainder .5
    pytest.param([5, 3, 2], 7, [9, 9, 9], [4, 2, 1], id="largest-remainder"),
    # .5/.5/0 with 3 to place: 1.5, 1.5, 0; DSR's published rounding gives 2 + 2
    pytest.param([1, 1, 0], 3, [9, 9, 9], [2, 1, 0], id="no-overshoot-tie-to-the-earlier"),
    # 1 each over three layers, 2 to place: .67 each, the earlier two
    pytest.param([1, 1, 1], 2, [9, 9, 9], [1, 1, 0], id="three-way-tie"),
    # 10 * (8, 1, 1) / 10 = 8, 1, 1, but the first holds 4: 6 left for two equal shares
    pytest.param([8, 1, 1], 10, [4, 9, 9], [4, 3, 3], id="a-cap-hands-on"),
    # first round 6, 3, 1 of caps 2, 3.. -> full at 2; 8 left as 3:1 = 6, 2; second full at 3;
    # 5 left for the third
    pytest.param([6, 3, 1], 10, [2, 3, 9], [2, 3, 5], id="two-caps-in-turn"),
    # only the first has a share and holds 2; 4 left go by room 6 : 2 = 3, 1
    pytest.param([1, 0, 0], 6, [2, 6, 2], [2, 3, 1], id="rest-goes-by-room-to-zero-shares"),
    pytest.param([0, 0], 4, [6, 2], [3, 1], id="no-shares-at-all-go-by-room"),
    pytest.param([1, 2], 99, [3, 4], [3, 4], id="more-than-all-room"),
    pytest.param([1, 2], 0, [3, 4], [0, 0], id="nothing"),
    pytest.param([1, 2], 2, [0, 0], [0, 0], id="no-room"),
    pytest.param([5], 3, [9], [3], id="one-layer"),
    # 2 * (6, 1, 1, 1, 1) / 10 = 1.2, .2, .2, .2, .2: one unit left, every remainder is .2
    pytest.param([6, 1, 1, 1, 1], 2, [9] * 5, [2, 0, 0, 0, 0], id="tie-of-1.2-and-.2"),
]


@pytest.mark.parametrize(("shares", "amount", "caps", "expected"), APPORTION_CASES)
def test_apportion(shares: list[int], amount: int, caps: list[int], expected: list[int]) -> None:
    assert ops.apportion(vec(*shares), num(amount), vec(*caps)).tolist() == expected


def test_apportion_gives_equal_remainders_to_the_earlier_layer() -> None:
    # 4 * 9/14 = 2 + 4/7, 4 * 2/14 = 4/7, 4 * 3/14 = 6/7: two units, to the third and the first.
    assert ops.apportion(vec(9, 2, 3), num(4), vec(5, 25, 9)).tolist() == [3, 0, 1]


def test_below_is_the_same_alone_and_lifted() -> None:
    for dtype in DTYPES:
        values, threshold = torch.tensor([0.7, 0.5], dtype=dtype), num(0.7)
        assert ops.below(values, threshold).tolist() == [False, True]
        lifted = torch.vmap(ops.below)(values[None], threshold[None])
        assert lifted.tolist() == [[False, True]]


LAYERS = st.integers(1, 6)


@st.composite
def share_inputs(draw: st.DrawFn) -> tuple[list[int], int, list[int]]:
    layers = draw(LAYERS)
    shares = draw(st.lists(st.integers(0, 50), min_size=layers, max_size=layers))
    caps = draw(st.lists(st.integers(0, 40), min_size=layers, max_size=layers))
    return shares, draw(st.integers(0, sum(caps) + 5)), caps


@quick
@given(share_inputs())
def test_apportion_is_exact_within_caps_and_by_largest_remainder(
    inputs: tuple[list[int], int, list[int]],
) -> None:
    shares, amount, caps = inputs
    got = [int(n) for n in ops.apportion(vec(*shares), num(amount), vec(*caps)).tolist()]
    assert sum(got) == min(amount, sum(caps))
    assert all(0 <= n <= cap for n, cap in zip(got, caps, strict=True))
    quotas = quotas_by_hand(shares, amount, caps)
    extra = [n - math.floor(q) for n, q in zip(got, quotas, strict=True)]
    assert set(extra) <= {0, 1}, (got, quotas)
    remainder = [q - math.floor(q) for q in quotas]
    given_one = [r for r, e in zip(remainder, extra, strict=True) if e == 1]
    given_none = [r for r, e in zip(remainder, extra, strict=True) if e == 0]
    assert min(given_one, default=Fraction(1)) >= max(given_none, default=Fraction(0))


@quick
@given(share_inputs())
def test_proportional_equals_handing_the_overflow_on(
    inputs: tuple[list[int], int, list[int]],
) -> None:
    shares, amount, caps = inputs
    fractions = [[Fraction(n) for n in row] for row in (shares, caps)]
    expected = fill_by_hand(fractions[0], Fraction(amount), fractions[1])
    got = ops.proportional(vec(*shares), num(amount), vec(*caps)).tolist()
    assert got == pytest.approx([float(x) for x in expected], abs=1e-9)


PROPORTIONAL_CASES = [
    pytest.param([1, 3], 8, [9, 9], [2, 6], id="no-cap-binds"),
    pytest.param([1, 3], 8, [9, 3], [5, 3], id="one-cap-binds"),
    pytest.param([1, 3], 8, [1, 3], [1, 3], id="all-full-the-rest-is-left-over"),
    pytest.param([0, 3], 8, [9, 9], [0, 8], id="no-share-nothing"),
    pytest.param([0, 3], 8, [9, 2], [0, 2], id="no-share-nothing-even-when-the-other-is-full"),
    pytest.param([0, 0], 8, [9, 2], [0, 0], id="no-shares"),
    pytest.param([0.25, 0.75], 2, [9, 9], [0.5, 1.5], id="fractions"),
    pytest.param([1, 1], 4, [0, 9], [0, 4], id="a-layer-without-room"),
]


@pytest.mark.parametrize(("shares", "amount", "caps", "expected"), PROPORTIONAL_CASES)
def test_proportional(
    shares: list[float], amount: float, caps: list[float], expected: list[float]
) -> None:
    got = ops.proportional(vec(*shares), num(amount), vec(*caps))
    assert got.tolist() == pytest.approx(expected, abs=1e-12)


def published_overflow(wanted: Sequence[float], caps: Sequence[float]) -> list[float]:
    """sparse_learning's `calc_growth_redistribution`, methods.md 3.1 step 4, without rounding."""
    grow, add = list(wanted), 0.0
    for _ in range(1000):
        residual = 0.0
        for i, cap in enumerate(caps):
            grow[i] += add
            if grow[i] > cap:
                residual += grow[i] - cap
                grow[i] = cap
        if residual == 0:
            break
        add = residual / len(grow)
    return grow


WATER_CASES = [
    pytest.param([3, 4], [9, 9], [3, 4], id="no-overflow"),
    # 2 over; half of it bounces back again and again, all of it ends in the second
    pytest.param([5, 4], [3, 9], [3, 6], id="all-to-the-other"),
    # 6 over the first, 3 to each of the others
    pytest.param([10, 1, 5], [4, 9, 9], [4, 4, 8], id="equal-parts"),
    # 6 over; the third takes 1 of its 3 and is full, so the second takes 5
    pytest.param([10, 1, 5], [4, 9, 6], [4, 6, 6], id="a-second-layer-fills-up"),
    pytest.param([10, 10], [4, 5], [4, 5], id="more-than-all-room"),
    pytest.param([0, 0, 0], [0, 2, 2], [0, 0, 0], id="nothing"),
]


@pytest.mark.parametrize(("wanted", "caps", "expected"), WATER_CASES)
def test_water_fill(wanted: list[float], caps: list[float], expected: list[float]) -> None:
    assert ops.water_fill(vec(*wanted), vec(*caps)).tolist() == pytest.approx(expected, abs=1e-12)
    assert published_overflow(wanted, caps) == pytest.approx(expected, abs=1e-6)


@st.composite
def water_inputs(draw: st.DrawFn) -> tuple[list[int], list[float]]:
    layers = draw(LAYERS)
    wanted = draw(st.lists(st.integers(0, 60), min_size=layers, max_size=layers))
    sizes = draw(st.lists(st.integers(0, 80), min_size=layers, max_size=layers))
    return wanted, [0.99 * size for size in sizes]


@quick
@given(water_inputs())
def test_water_fill_equals_the_published_loop(inputs: tuple[list[int], list[float]]) -> None:
    wanted, caps = inputs
    got = ops.water_fill(vec(*wanted), vec(*caps)).tolist()
    assert got == pytest.approx(published_overflow(wanted, caps), abs=1e-6)


# The small ones -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "start", "end", "progress", "expected"),
    [
        ("cosine", 0.5, 0.005, 0.0, 0.5),
        ("cosine", 0.5, 0.005, 0.5, 0.2525),  # .005 + .495 * (1 + 0) / 2
        ("cosine", 0.5, 0.005, 1.0, 0.005),
        ("cosine", 0.4, 0.0, 1 / 3, 0.3),  # cos(60 degrees) = .5: .4 * 1.5 / 2
        ("cosine", 0.4, 0.0, 2.0, 0.0),  # past the end stays there
        ("cosine", 0.4, 0.0, -1.0, 0.4),
        ("linear", 0.5, 0.0, 0.0, 0.5),
        ("linear", 0.5, 0.0, 0.25, 0.375),
        ("linear", 0.5, 0.0, 1.0, 0.0),
        ("linear", 0.5, 0.0, 1.5, 0.0),
        ("none", 0.5, 0.0, 0.7, 0.5),
    ],
)
def test_annealed(kind: str, start: float, end: float, progress: float, expected: float) -> None:
    got = ops.annealed(kind, num(start), end, num(progress))
    assert got.dtype == torch.float64
    assert float(got) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("keep", "value", "valid", "expected"),
    [
        ([0, 1, 0], [5, 1, 9], [1, 1, 1], [1]),  # not empty: nothing changes
        ([0, 0, 0], [5, -7, 9], [1, 1, 0], [1]),  # the largest is absent, so the next: |-7|
        ([0, 0, 0], [2, -2, 2], [0, 1, 1], [1]),  # a tie, the lower position
        ([0, 0, 0], [NAN, 1, 2], [1, 1, 1], [2]),  # NaN is not large
        ([0, 0, 0], [NAN, NAN, NAN], [0, 1, 1], [1]),
        ([0, 0, 0], [1, 2, 3], [0, 0, 0], []),  # nothing there to keep
    ],
)
def test_keep_one(
    keep: list[int], value: list[float], valid: list[int], expected: list[int]
) -> None:
    args = torch.tensor(keep).bool(), vec(*value), torch.tensor(valid).bool()
    assert positions(ops.keep_one(*args)) == expected


@pytest.mark.parametrize(
    ("values", "selected", "expected"),
    [
        ([1, -3, 100], [1, 1, 0], 2.0),
        ([1, -3, NAN], [1, 1, 0], 2.0),  # what is not selected does not count
        ([1, 2, 3], [0, 0, 0], 0.0),  # the mean of nothing is no NaN
        ([1, NAN, 3], [1, 1, 1], 0.0),
        ([1, math.inf, 3], [1, 1, 1], 0.0),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_magnitude(
    values: list[float], selected: list[int], expected: float, dtype: torch.dtype
) -> None:
    got = ops.mean_magnitude(torch.tensor(values, dtype=dtype), torch.tensor(selected).bool())
    assert got.dtype == torch.float64
    assert float(got) == expected


def test_mean_magnitude_of_many_half_precision_values_does_not_overflow() -> None:
    values = torch.full((1000,), 1000.0, dtype=torch.float16)  # the sum, 1e6, is above 65504
    assert float(ops.mean_magnitude(values, torch.ones(1000, dtype=torch.bool))) == 1000.0


def slots(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


SHARES: list[list[float]] = [[5, 3, 2], [1, 1, 0], [0, 0, 0], [8, 1, 1], [0.1, 0.2, 0.7]]
CAPS: list[list[float]] = [[9, 9, 9], [9, 9, 9], [6, 2, 0], [4, 9, 9], [30, 30, 1]]
AMOUNTS = [7.0, 3.0, 4.0, 10.0, 40.0]
LIFTED: list[tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]] = [
    ("apportion", ops.apportion, (slots(SHARES), vec(*AMOUNTS), slots(CAPS))),
    ("proportional", ops.proportional, (slots(SHARES), vec(*AMOUNTS), slots(CAPS))),
    ("water_fill", ops.water_fill, (slots(SHARES) * 9, slots(CAPS))),
    ("cosine", lambda a, p: ops.annealed("cosine", a, 0.005, p), (vec(0.5, 0.3), vec(0, 0.7))),
    ("linear", lambda a, p: ops.annealed("linear", a, 0.0, p), (vec(0.5, 0.3), vec(0, 0.7))),
    ("none", lambda a, p: ops.annealed("none", a, 0.0, p), (vec(0.5, 0.3), vec(0, 0.7))),
    (
        "keep_one",
        ops.keep_one,
        (
            torch.tensor([[False, False], [True, False], [False, False]]),
            slots([[1, 2], [1, 2], [NAN, 2]]),
            torch.tensor([[True, True], [True, True], [True, False]]),
        ),
    ),
    (
        "mean_magnitude",
        ops.mean_magnitude,
        (slots([[1, -2], [NAN, 3], [4, 5]]), torch.tensor([[True] * 2, [True] * 2, [False] * 2])),
    ),
]


@pytest.mark.parametrize(("function", "args"), [pytest.param(f, a, id=n) for n, f, a in LIFTED])
def test_lifted_equals_alone(function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> None:
    alone = torch.stack([function(*row) for row in zip(*args, strict=True)])
    assert torch.equal(torch.vmap(function)(*args), alone)


# Noise --------------------------------------------------------------------------------------------

MANY = 20_000


def stream(*names: object) -> Tensor:
    return torch.tensor(noise.key(*names))  # type: ignore[arg-type]


def test_uniform_is_splitmix64() -> None:
    # The first three outputs of SplitMix64 from seed 0, as published with it; top 53 bits.
    published = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    assert noise.uniform(0, torch.arange(3)).tolist() == [(z >> 11) * 2.0**-53 for z in published]


def test_a_key_is_its_four_names() -> None:
    names = [(s, p, n, layer) for s in (0, 1) for p in "ab" for n in (0, 1) for layer in "xy"]
    keys = [noise.key(*name) for name in names]
    assert len(set(keys)) == len(names)
    assert keys == [noise.key(*name) for name in names]
    assert all(-(2**63) <= key < 2**63 for key in keys)


@pytest.mark.parametrize("seed", range(3))
def test_uniform_is_uniform(seed: int) -> None:
    u = noise.uniform(stream(seed, "choose", 0, "fc1"), torch.arange(MANY))
    assert u.dtype == torch.float64
    assert bool(((u >= 0) & (u < 1)).all())
    # Mean 1/2 and variance 1/12; their deviations are sqrt(1/12n) and sqrt(1/180n).
    assert abs(float(u.mean()) - 0.5) < 4 / math.sqrt(12 * MANY)
    assert abs(float(u.var()) - 1 / 12) < 4 / math.sqrt(180 * MANY)
    # Kolmogorov-Smirnov: sqrt(n) * D is above 2 once in 1,500 times.
    expected = (torch.arange(MANY, dtype=torch.float64) + 0.5) / MANY
    assert float((u.sort().values - expected).abs().max()) * math.sqrt(MANY) < 2
    assert abs(correlation(u[:-1], u[1:])) < 4 / math.sqrt(MANY)  # neighbours


@pytest.mark.parametrize("seed", range(3))
def test_normal_is_normal(seed: int) -> None:
    z = noise.normal(stream(seed, "value", 0, "fc1"), torch.arange(MANY))
    assert bool(z.isfinite().all())
    assert abs(float(z.mean())) < 4 / math.sqrt(MANY)
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / MANY)
    expected = (torch.arange(MANY, dtype=torch.float64) + 0.5) / MANY
    share_below = torch.special.ndtr(z.sort().values)
    assert float((share_below - expected).abs().max()) * math.sqrt(MANY) < 2
    assert abs(correlation(z[:-1], z[1:])) < 4 / math.sqrt(MANY)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


@pytest.mark.parametrize(
    "other",
    [
        (1, "choose", 0, "fc1"),
        (0, "value", 0, "fc1"),
        (0, "choose", 1, "fc1"),
        (0, "choose", 0, "x"),
    ],
)
def test_streams_of_different_keys_are_unrelated(other: tuple[int, str, int, str]) -> None:
    places = torch.arange(MANY)
    ours = noise.uniform(stream(0, "choose", 0, "fc1"), places)
    theirs = noise.uniform(stream(*other), places)
    assert not bool((ours == theirs).any())
    assert abs(correlation(ours, theirs)) < 4 / math.sqrt(MANY)


@pytest.mark.parametrize("draw", [noise.uniform, noise.normal])
def test_same_key_same_numbers_in_chunks_in_shapes_and_lifted(
    draw: Callable[[Tensor, Tensor], Tensor],
) -> None:
    streams = torch.stack([stream(seed, "value", 3, "fc1") for seed in range(3)])
    places = torch.arange(1000)
    whole = draw(streams[0], places)
    assert torch.equal(draw(streams[0], places), whole)
    chunks = [draw(streams[0], chunk) for chunk in torch.split(places, 77)]
    assert torch.equal(torch.cat(chunks), whole)
    assert torch.equal(draw(streams[0], places.view(10, 100)), whole.view(10, 100))
    few = torch.tensor([999, 0, 500, 0])
    assert torch.equal(draw(streams[0], few), whole[few])
    assert torch.equal(draw(int(streams[0]), places), whole)  # type: ignore[arg-type]
    lifted = torch.vmap(draw, in_dims=(0, None))(streams, places)
    assert torch.equal(lifted, torch.stack([draw(key, places) for key in streams]))
    assert torch.equal(places, torch.arange(1000))


def test_numbers_far_along_a_stream_fit_its_beginning() -> None:
    # A truly sparse layer of 4e8 positions and more: no overflow, no repetition.
    far = torch.tensor([0, 4 * 10**8, 2**31, 2**32, 2**40])
    drawn = noise.uniform(stream(0, "choose"), far)
    assert len(set(drawn.tolist())) == 5
    assert bool(((drawn >= 0) & (drawn < 1)).all())


def test_normal_where_is_normal_at_the_positions_and_zero_elsewhere() -> None:
    streams = torch.stack([stream(seed, "value") for seed in range(3)])
    where = torch.tensor([[1, 0, 0, 1, 1], [0] * 5, [1] * 5]).bool()
    whole = [noise.normal(key, torch.arange(5)) for key in streams]
    expected = [drawn * w for drawn, w in zip(whole, where, strict=True)]
    alone = [noise.normal_where(key, w) for key, w in zip(streams, where, strict=True)]
    assert torch.equal(torch.stack(alone), torch.stack(expected))
    lifted = torch.vmap(noise.normal_where)(streams, where)
    assert torch.equal(lifted, torch.stack(expected))
    shared = torch.vmap(noise.normal_where, in_dims=(None, 0))(streams[0], where)
    assert torch.equal(shared[0], expected[0])
    assert not bool(shared[1].any())


# Distributions ------------------------------------------------------------------------------------


def shapes_of(*shapes: tuple[int, ...]) -> dict[str, torch.Size]:
    return {f"layer{i}": torch.Size(shape) for i, shape in enumerate(shapes)}


COUNT_CASES = [
    pytest.param("uniform", [(300, 784), (100, 300), (10, 100)], 26_620, [23_520, 3_000, 100]),
    # er: (in + out) / (in * out) of in * out positions is in + out: 30 and 15
    pytest.param("er", [(20, 10), (10, 5)], 45, [30, 15]),
    # x * 12 = 20 fills the first; at x = 5 the second has 1000
    pytest.param("er", [(10, 2), (100, 100)], 1020, [20, 1000]),
    # er takes a kernel's first two sides: (4 + 3) / 12 of 108 positions is 63, against 15
    pytest.param("er", [(4, 3, 3, 3), (10, 5)], 26, [21, 5]),
    # erk takes all four: 13 against 15
    pytest.param("erk", [(4, 3, 3, 3), (10, 5)], 28, [13, 15]),
    pytest.param("uniform", [(2, 3), (4, 5)], 26, [6, 20]),  # everything
    pytest.param("uniform", [(2, 3), (4, 5)], 2, [1, 1]),  # one each
    # .06 of 10 and 100 positions: .6 is less than one weight and gets one, the rest is 5
    pytest.param("uniform", [(2, 5), (10, 10)], 6, [1, 5]),
    # A tenth of 1 x 10, 15 and 95 positions is .1 x 10, 1.5 and 9.5. Ten layers need a whole
    # weight, and that leaves 2 for the last two: one each, since no layer may be empty.
    pytest.param("uniform", [(1, 1)] * 10 + [(15, 1), (95, 1)], 12, [1] * 12),
]


@pytest.mark.parametrize(("kind", "shapes", "total", "expected"), COUNT_CASES)
def test_counts(kind: str, shapes: list[tuple[int, ...]], total: int, expected: list[int]) -> None:
    assert list(distribution.counts(shapes_of(*shapes), total, kind).values()) == expected


@st.composite
def networks(draw: st.DrawFn) -> tuple[dict[str, torch.Size], int]:
    side, kernel = st.integers(1, 40), st.integers(1, 5)
    linear = st.tuples(side, side)
    conv = st.tuples(side, side, kernel, kernel)
    shapes = shapes_of(*draw(st.lists(linear | conv, min_size=1, max_size=12)))
    size = sum(shape.numel() for shape in shapes.values())
    # Both ends matter: hardly anything, and nearly all.
    low = st.integers(len(shapes), min(size, 3 * len(shapes)))
    return shapes, draw(low | st.integers(len(shapes), size))


@settings(quick, max_examples=200)
@given(networks(), st.sampled_from(keys_of(TrialSettings)["distribution"].choices))
def test_counts_are_exact_with_no_layer_empty_or_above_its_size(
    network: tuple[dict[str, torch.Size], int], kind: str
) -> None:
    shapes, total = network
    counts = distribution.counts(shapes, total, kind)
    assert list(counts) == list(shapes)
    assert sum(counts.values()) == total
    assert all(1 <= counts[name] <= shape.numel() for name, shape in shapes.items())


@quick
@given(networks())
def test_uniform_counts_are_within_one_of_the_density(
    network: tuple[dict[str, torch.Size], int],
) -> None:
    shapes, total = network
    density = Fraction(total, sum(shape.numel() for shape in shapes.values()))
    fair = {name: density * shape.numel() for name, shape in shapes.items()}
    if min(fair.values()) < 1:
        return  # then some layers give to those that would be empty
    counts = distribution.counts(shapes, total, "uniform")
    assert all(abs(counts[name] - fair[name]) < 1 for name in shapes)


@pytest.mark.parametrize("total", [0, 1, 27])
def test_counts_refuses_what_does_not_fit(total: int) -> None:
    with pytest.raises(ValueError, match=r"2 sparse layers of 26"):
        distribution.counts(shapes_of((2, 3), (4, 5)), total, "uniform")


SPARSE, DENSE = {"a": torch.Size((10, 10))}, {"b": torch.Size((4, 5))}


@pytest.mark.parametrize(
    ("density", "over", "expected"),
    [
        (0.25, "all", 10),  # 30 of 120, of which the dense layer has 20
        (0.25, "sparse", 25),
        (1.0, "all", 100),
        (1.0, "sparse", 100),
        (0.175, "all", 1),  # the minimum: 21 of 120
        (0.01, "sparse", 1),
    ],
)
def test_total_for(density: float, over: str, expected: int) -> None:
    assert distribution.total_for(SPARSE, DENSE, density, over) == expected


@pytest.mark.parametrize(
    ("density", "over", "minimum"),
    [
        (0.17, "all", "0.175"),  # 20.4 of 120, round 20: nothing left for the sparse layer
        (0.0, "all", "0.175"),
        (-1.0, "all", "0.175"),
        (1.01, "all", "0.175"),
        (0.004, "sparse", "0.01"),
    ],
)
def test_an_unreachable_density_is_refused_with_the_minimum(
    density: float, over: str, minimum: str
) -> None:
    with pytest.raises(ValueError, match=rf"density.*allows {minimum} to 1"):
        distribution.total_for(SPARSE, DENSE, density, over)


def test_the_minimum_in_the_message_can_be_used() -> None:
    # 3,000,018 of 23,000,017 weights is .13043546; six digits of that are 3,000,007 weights.
    sparse, dense = {"a": torch.Size((20_000_000, 1))}, {"b": torch.Size((3_000_017, 1))}
    with pytest.raises(ValueError, match="allows") as refused:
        distribution.total_for(sparse, dense, 0.0, "all")
    minimum = float(str(refused.value).split("allows ")[1].split()[0])
    assert 1 <= distribution.total_for(sparse, dense, minimum, "all") < 100


def test_random_masks_have_their_counts_and_follow_the_seed() -> None:
    shapes = shapes_of((20, 30), (4, 3, 5, 5))
    wanted = {"layer0": 100, "layer1": 299}
    masks = distribution.random_masks(shapes, wanted, seed=1)
    assert {name: mask.shape for name, mask in masks.items()} == shapes
    assert {name: int(mask.sum()) for name, mask in masks.items()} == wanted
    again = distribution.random_masks(shapes, wanted, seed=1)
    other = distribution.random_masks(shapes, wanted, seed=2)
    assert all(torch.equal(again[name], masks[name]) for name in shapes)
    # Of 100 active of 600, some 17 fall on the same position by chance.
    common = int((other["layer0"] & masks["layer0"]).sum())
    assert 3 <= common <= 40


LENET = {
    "conv1.weight": torch.Size((20, 1, 5, 5)),
    "fc1.weight": torch.Size((300, 784)),
    "fc2.weight": torch.Size((10, 300)),
}


@pytest.mark.parametrize(
    ("words", "dense"),
    [
        ([], []),
        (["first"], ["conv1.weight"]),
        (["last"], ["fc2.weight"]),
        (["conv"], ["conv1.weight"]),
        (["fc1"], ["fc1.weight"]),
        (["fc1.weight", "last"], ["fc1.weight", "fc2.weight"]),
        (["last", "fc2"], ["fc2.weight"]),
    ],
)
def test_split_layers(words: list[str], dense: list[str]) -> None:
    sparse, whole = distribution.split_layers(LENET, words)
    assert list(whole) == dense
    assert list(sparse) == [name for name in LENET if name not in dense]


def test_split_layers_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"dense_layers: 'fc9'.*conv1\.weight"):
        distribution.split_layers(LENET, ["fc9"])
