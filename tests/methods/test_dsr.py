"""DSR's rule and variants on networks small enough to check by eye.

All expected values are worked out by hand from the paper, with the working beside them; none was
taken from the code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from helpers.rows import Layers, active, first, occurrences, padded, row, sizes
from torch import Tensor

from sparsetune.methods import METHODS, update
from sparsetune.methods.contract import UpdateSchedule, make_variant

torch.set_num_threads(1)


def small_and_large(num_small: int, num_large: int, size: int) -> Tensor:
    """Weights of .25 (below H = .5), then of 1, then absent ones."""
    return padded(size, [0.25] * num_small + [1.0] * num_large)


def dsr_threshold(
    small: Sequence[int], large: Sequence[int], hp: dict[str, float], mode: str = "adaptive"
) -> float:
    """H after one update with H = .5, over layers with so many weights below it and above."""
    params = {
        f"l{i}": small_and_large(s, g, 4 * (s + g))
        for i, (s, g) in enumerate(zip(small, large, strict=True))
    }
    masks = {n: weight != 0 for n, weight in params.items()}
    after, _, _, state = update(
        METHODS["dsr"], params, masks, hp={"threshold": 0.5, **hp}, variant={"threshold_mode": mode}
    )
    for name, g in zip(params, large, strict=True):
        assert int((after[name] == 1).sum()) == g  # what is above H stays, new weights are zero
        assert int((after[name] != 0).sum()) == g
    num = sum(small) + sum(large)
    assert float(state.dropped) == pytest.approx(sum(small) / num)
    return float(state.threshold)


@pytest.mark.parametrize(
    ("small", "hp", "expected"),
    [
        # 20 active, target .5: Np = 10; H stays from 9 to 11, bounds included
        ((8, 0), {"target": 0.5}, 1.0),  # 8 < 9, though the first layer lost 8 of 12
        ((4, 4), {"target": 0.5}, 1.0),
        ((9, 0), {"target": 0.5}, 0.5),  # exactly .9
        ((5, 4), {"target": 0.5}, 0.5),
        ((5, 5), {"target": 0.5}, 0.5),
        ((10, 1), {"target": 0.5}, 0.5),  # exactly 1.1
        ((6, 6), {"target": 0.5}, 0.25),  # 12 > 11
        ((11, 1), {"target": 0.5}, 0.25),
        ((4, 4), {"target": 0.5, "gain": 4.0}, 2.0),
        ((6, 6), {"target": 0.5, "gain": 4.0}, 0.125),
        ((4, 4), {"target": 0.5, "tolerance": 0.5}, 0.5),  # 5 to 15
        ((2, 2), {"target": 0.5, "tolerance": 0.5}, 1.0),
        ((1, 0), {"target": 0.05, "tolerance": 0.0}, 0.5),  # exactly 1
        ((0, 0), {"target": 0.0}, 0.5),
        ((1, 0), {"target": 0.0}, 0.25),
    ],
)
def test_dsr_has_one_threshold_that_doubles_stays_or_halves(
    small: tuple[int, int], hp: dict[str, float], expected: float
) -> None:
    large = (12 - small[0], 8 - small[1])
    assert dsr_threshold(small, large, hp) == expected
    assert dsr_threshold(small, large, hp, mode="fixed") == 0.5


@pytest.mark.parametrize("target", [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8])
def test_dsr_stays_at_both_bounds_whatever_the_rounding(target: float) -> None:
    # Of 200, Np = 200 * target, a multiple of 20: .9 and 1.1 of it are whole numbers.
    goal = round(200 * target)
    for num, expected in (
        (goal * 9 // 10, 0.5),
        (goal * 11 // 10, 0.5),
        (goal * 9 // 10 - 1, 1.0),
        (goal * 11 // 10 + 1, 0.25),
    ):
        assert dsr_threshold((num,), (200 - num,), {"target": target}) == expected


def test_dsr_prunes_by_the_old_threshold_and_moves_it_for_the_next_update() -> None:
    # H = .375 drops .25 alone (strictly below), 1 of 4 where 2 +- .2 are asked: H doubles.
    params, masks, _, state = update(
        METHODS["dsr"], {"a": padded(8, [0.25, 0.375, -0.5, 1])}, {"a": first(4, 8)},
        hp={"threshold": 0.375, "target": 0.5},
    )  # fmt: skip
    assert sorted(params["a"][masks["a"]].tolist()) == [-0.5, 0, 0.375, 1]
    assert float(state.threshold) == 0.75
    # H = .75 drops the new zero, .375 and -.5: 3 of 4, above 2.2: H halves.
    params, masks, _, state = update(
        METHODS["dsr"], params, masks, state=state, hp={"threshold": 0.375, "target": 0.5}
    )
    assert sorted(params["a"][masks["a"]].tolist()) == [0, 0, 0, 1]
    assert float(state.threshold) == 0.375


# Survivors 2, 4, 6 (of value 1) and dropped 4, 4, 4 (of .25) in layers of 20 positions.
THREE: Layers = {f"l{n}": small_and_large(4, n, 20) for n in (2, 4, 6)}


def means(values: tuple[float, float, float]) -> Layers:
    """|value| alike at the survivors, signs mixed; 100 wherever none may look."""
    out = {}
    for (name, weight), value in zip(THREE.items(), values, strict=True):
        sign = torch.where(torch.arange(20) % 2 == 0, 1.0, -1.0)
        out[name] = torch.where(weight == 1, value * sign, 100.0)
    return out


@pytest.mark.parametrize(
    ("growth", "values", "grown"),
    [
        # 12 to place; survivors 2 : 4 : 6
        ("nonzero", (3, 2, 1), [2, 4, 6]),
        # mean |g| 3 : 2 : 1, whatever the number of survivors
        ("gradient", (3, 2, 1), [6, 4, 2]),
        ("momentum", (1, 4, 1), [2, 8, 2]),
        # 12 * (5, 2, 1) / 8 = 7.5, 3, 1.5: floors 7, 3, 1; the tie of .5 goes to the earlier
        ("gradient", (5, 2, 1), [8, 3, 1]),
        # room is 20 - 6 = 14, 20 - 8 = 12, 20 - 10 = 10; a layer without gradient gets nothing
        ("gradient", (1, 0, 1), [6, 0, 6]),
        # all 12 wanted by the last, which has room for 10: 2 go by room 14 : 12 = 1.08 : .92
        ("momentum", (0, 0, 1), [1, 1, 10]),
        # all zero: by survivors
        ("gradient", (0, 0, 0), [2, 4, 6]),
        ("momentum", (0, 0, 0), [2, 4, 6]),
    ],
)
def test_dsr_hands_out_over_three_layers(
    growth: str, values: tuple[float, float, float], grown: list[int]
) -> None:
    momenta = means(values) if growth == "momentum" else None
    grads = means(values) if growth == "gradient" else None
    params, masks, _, _ = update(
        METHODS["dsr"], THREE, {n: w != 0 for n, w in THREE.items()}, momenta, grads,
        hp={"threshold": 0.5}, variant={"growth": growth},
    )  # fmt: skip
    assert sizes(masks) == [2 + grown[0], 4 + grown[1], 6 + grown[2]]
    for name, weight in THREE.items():
        assert torch.equal(params[name], (weight == 1).float())  # survivors, and zeros


def test_dsr_does_not_overshoot() -> None:
    # Shares .5, .5, 0 and 3 to place: 1.5, 1.5, 0. The published loop grows 2 + 2.
    params = {
        "a": small_and_large(0, 2, 8), "b": small_and_large(0, 2, 8), "c": small_and_large(3, 2, 8)
    }  # fmt: skip
    grads = {"a": row(*[1] * 8), "b": row(*[-1] * 8), "c": row(*[0] * 8)}
    masks = update(
        METHODS["dsr"], params, {n: w != 0 for n, w in params.items()}, grads=grads,
        hp={"threshold": 0.5}, variant={"growth": "gradient"},
    )[1]  # fmt: skip
    assert sizes(masks) == [4, 3, 2]


def test_dsr_full_layers_take_back_what_they_dropped() -> None:
    # No position is absent: the two dropped come back, as zeros.
    params, masks, _, _ = update(
        METHODS["dsr"], {"a": row(0.25, 1, -0.25, 1)}, {"a": first(4, 4)}, hp={"threshold": 0.5}
    )
    assert active(masks["a"]) == [0, 1, 2, 3]
    assert params["a"].tolist() == [[0, 1, 0, 1]]


def test_dsr_takes_back_dropped_positions_only_when_no_other_is_left() -> None:
    # a: full, drops 2 of 4. b: 3 of 4, none below H; its one place goes first, whatever the
    # shares (2 : 3), then one of a's two.
    params = {"a": row(0.25, 1, 0.25, 1), "b": row(1, 1, 1, 0)}
    masks = {"a": first(4, 4), "b": first(3, 4)}
    after = update(METHODS["dsr"], params, masks, hp={"threshold": 0.5})[1]
    assert sizes(after) == [3, 4]
    assert {1, 3} <= set(active(after["a"]))


def test_dsr_grows_uniformly_and_never_where_it_has_just_dropped() -> None:
    # 0 and 1 drop; 2 of the 5 absent positions 3 .. 7 grow.
    found = occurrences(
        "dsr", row(0.25, 0.25, 1, 0, 0, 0, 0, 0), first(3, 8), {"threshold": 0.5}, 300
    )
    assert found[:3] == [0, 0, 300]
    # 120 expected at each, deviation sqrt(300 * .4 * .6) = 8.5.
    assert sum(found[3:]) == 600
    assert all(abs(num - 120) < 4 * 8.5 for num in found[3:])


def test_dsrs_guard_keeps_the_largest_weight() -> None:
    # All of a lies below H = .5; the public code would keep .125, the first.
    params = {"a": padded(10, [0.125, -0.375, 0.25]), "b": padded(10, [1, 1])}
    masks = {"a": first(3, 10), "b": first(2, 10)}
    after, new_masks, _, state = update(
        METHODS["dsr"], params, masks, hp={"threshold": 0.5, "target": 0.4}
    )
    assert after["a"][0, 1] == -0.375
    assert after["a"].count_nonzero() == 1
    # 2 dropped, survivors 1 : 2: .67 and 1.33: 0 + 1, the unit left for the larger remainder
    assert sizes(new_masks) == [2, 3]
    assert float(state.dropped) == 0.4  # 2 of 5, so H stays
    assert float(state.threshold) == 0.5


def test_dsr_zeroes_absent_momenta() -> None:
    momentum = row(*range(1, 9))
    masks, momenta = update(
        METHODS["dsr"], {"a": row(0.25, 1, 1, 0, 0, 0, 0, 0)}, {"a": first(3, 8)},
        {"a": momentum}, hp={"threshold": 0.5},
    )[1:3]  # fmt: skip
    assert momenta is not None
    assert momenta["a"].tolist() == [[0, 2, 3, 0, 0, 0, 0, 0]]
    assert sizes(masks) == [3]


def test_dsrs_words_and_numbers_are_those_of_the_paper() -> None:
    fields = dataclasses.fields(METHODS["dsr"].Variant)
    assert {f.name: f.metadata["allowed"] for f in fields} == {
        "growth": ("nonzero", "gradient", "momentum"),  # the first is the default
        "threshold_mode": ("adaptive", "fixed"),
    }
    numbers = dataclasses.fields(METHODS["dsr"].Hyperparameters)
    expected = {"threshold": 1e-3, "target": 0.1, "tolerance": 0.1, "gain": 2.0}
    assert {f.name: f.default for f in numbers} == expected
    # WRN-28-2: 100, 200, 400, 800 steps at epochs 0, 25, 80, 140 of 200; stop at 190
    assert METHODS["dsr"].schedule == UpdateSchedule(100, 0.0, 0.95, (0.125, 0.4, 0.7))
    for growth, needs in (("nonzero", []), ("gradient", ["gradient"]), ("momentum", ["momentum"])):
        variant = make_variant(METHODS["dsr"], {"growth": growth})
        assert METHODS["dsr"].needs(variant) == {*needs}
        assert METHODS["dsr"].dense_gradient(variant) == "never"
        assert METHODS["dsr"].keeps_count(variant)
