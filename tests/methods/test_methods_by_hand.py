"""Every rule and variant on networks small enough to check by eye.

All expected values are worked out by hand from `methods.md`, with the working beside them; none was
taken from the code. Weights are mostly multiples of a power of two, exact in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsetune.methods import METHODS, dst, noise, update
from sparsetune.methods.contract import UpdateSchedule, make_hyperparameters, make_variant

torch.set_num_threads(1)

Layers = dict[str, Tensor]


def row(*values: float) -> Tensor:
    """A layer of one neuron."""
    return torch.tensor([list(values)], dtype=torch.float32)


def first(num: int, size: int) -> Tensor:
    """A mask of one neuron: the first `num` of `size` weights are active."""
    return (torch.arange(size) < num)[None]


def padded(size: int, values: Sequence[float], absent: float = 0.0) -> Tensor:
    """`values` first, then `absent`."""
    return row(*values, *[absent] * (size - len(values)))


def active(mask: Tensor) -> list[int]:
    return mask.flatten().nonzero().flatten().tolist()


def sizes(masks: Layers) -> list[int]:
    return [int(mask.sum()) for mask in masks.values()]


def zeros_of(weight: Tensor) -> list[int]:
    return active(weight == 0)


# SET ----------------------------------------------------------------------------------------------


def set_drops(
    weights: Sequence[float], hp: dict[str, float], variant: dict[str, str], progress: float = 0.0
) -> list[int]:
    """Positions that SET drops of a full layer: all grow again there, as zeros."""
    weight = row(*weights)
    params, masks, _, state = update(
        METHODS["set"], {"a": weight}, {"a": first(len(weights), len(weights))},
        variant={"new_value": "zero", **variant}, hp=hp, progress=progress,
    )  # fmt: skip
    assert bool(masks["a"].all())
    dropped = zeros_of(params["a"])
    kept = [i for i in range(len(weights)) if i not in dropped]
    assert torch.equal(params["a"][:, kept], weight[:, kept])
    assert float(state.dropped) == pytest.approx(len(dropped) / len(weights))
    return dropped


# methods.md 1.1: 4 positive, 6 negative, unequal scales.
PAPER = [0.6, 0.7, 0.8, 0.9, -0.05, -0.1, -0.2, -0.3, -0.4, -0.5]
# Three zeros (one of them -0.), three positive, three negative.
ZEROS = [0.0, 0.25, 0.5, 0.75, -0.0, -0.25, -0.5, -0.75, 0.0]
ONE_SIGN = [0.5, 0.25, 1.0, 0.75, 2.0]
TEN = [0.1 * n for n in range(1, 11)]


@pytest.mark.parametrize(
    ("weights", "zeta", "variant", "expected"),
    [
        # .5 of 4 positive: 2, of 6 negative: 3: "0.6, 0.7, -0.05, -0.1, -0.2"
        pytest.param(PAPER, 0.5, {}, [0, 1, 4, 5, 6], id="signwise"),
        # 5 smallest |w|: "-0.05, -0.1, -0.2, -0.3, -0.4"
        pytest.param(PAPER, 0.5, {"prune": "magnitude"}, [4, 5, 6, 7, 8], id="magnitude"),
        # .25 of 4: 1; .25 of 6: 1.5, half to even: 2
        pytest.param(PAPER, 0.25, {}, [0, 4, 5], id="half-to-even-up"),
        # .5 of 5: 2.5, half to even: 2
        pytest.param(ONE_SIGN, 0.5, {}, [0, 1], id="half-to-even-down-and-one-sign"),
        # .5 of one weight: .5, half to even: 0
        pytest.param([0.5], 0.5, {}, [], id="the-only-weight"),
        # all zeros go and count for no sign: .5 of 3 is 1.5, so 2 of each
        pytest.param(ZEROS, 0.5, {}, [0, 1, 2, 4, 5, 6, 8], id="zeros-first"),
        pytest.param(ZEROS, 0.0, {}, [0, 4, 8], id="zeros-even-at-zeta-0"),
        pytest.param(PAPER, 0.0, {}, [], id="nothing"),
        pytest.param(PAPER, 1.0, {}, list(range(10)), id="everything"),
        # ties by position: .5 of four equal weights
        pytest.param([0.5] * 4, 0.5, {}, [0, 1], id="ties"),
        pytest.param([-0.5] * 4, 0.5, {}, [0, 1], id="negative-ties"),
        pytest.param([0.5, -0.5, 0.5, -0.5], 0.5, {"prune": "magnitude"}, [0, 1], id="tied-sizes"),
    ],
)
def test_set_drops_by_fraction(
    weights: list[float], zeta: float, variant: dict[str, str], expected: list[int]
) -> None:
    assert set_drops(weights, {"zeta": zeta}, variant) == expected


@pytest.mark.parametrize(
    ("weights", "threshold", "max_prune", "unit", "expected"),
    [
        # strict: .25 is not below .25
        pytest.param([0.125, -0.1875, 0.25, -0.5], 0.25, 0.9, "absolute", [0, 1], id="strict"),
        pytest.param([0.0, 0.25, -0.5], 0.125, 0.9, "absolute", [0], id="zeros-are-below"),
        pytest.param([0.5, 0.25, -0.5], 0.0, 0.9, "absolute", [], id="nothing-is-below-0"),
        # all ten lie below 100, at most .9 of ten: the largest stays
        pytest.param(TEN, 100.0, 0.9, "absolute", list(range(9)), id="cap"),
        pytest.param(TEN, 100.0, 0.5, "absolute", list(range(5)), id="cap-drops-the-smallest"),
        # at most 1 of 10 per update would empty the layer: one stays
        pytest.param(TEN, 100.0, 1.0, "absolute", list(range(9)), id="never-all"),
        pytest.param([0.25], 100.0, 1.0, "absolute", [], id="never-the-only-one"),
        # below the cap the threshold alone decides: 4 of 10 lie below .45
        pytest.param(TEN, 0.45, 0.5, "absolute", [0, 1, 2, 3], id="cap-does-not-bind"),
        # deviation of 1, 1, 3, 3 (each sign): sqrt(5) = 2.24 (2.39 by n - 1): t is 1.1 to 1.2
        pytest.param([1, -1, 3, -3] * 2, 0.5, 0.9, "std", [0, 1, 4, 5], id="std"),
        # 10 .. 13 deviate by 1.1 (1.3 by n - 1) from 11.5: nothing lies below; root mean square
        # is 11.6 and would drop two
        pytest.param([10, 11, 12, 13], 1.0, 0.9, "std", [], id="std-is-about-the-mean"),
        pytest.param([2, 2, 2], 1.0, 0.9, "std", [], id="no-deviation-no-drop"),
    ],
)
def test_set_drops_by_threshold(
    weights: list[float], threshold: float, max_prune: float, unit: str, expected: list[int]
) -> None:
    hp = {"threshold": threshold, "max_prune": max_prune}
    variant = {"prune": "threshold", "threshold_unit": unit}
    assert set_drops(weights, hp, variant) == expected


def test_sets_deviation_is_that_of_the_active_weights() -> None:
    # Active 1, -1, 3, -3 as above; absent positions hold 1000 and must not count.
    weight = row(1, -1, 3, -3, 1000, 1000)
    params, masks, _, state = update(
        METHODS["set"], {"a": weight}, {"a": first(4, 6)},
        variant={"prune": "threshold", "new_value": "zero"}, hp={"threshold": 0.5},
    )  # fmt: skip
    assert float(state.dropped) == 0.5
    assert params["a"][0, 2:4].tolist() == [3, -3]
    assert sizes(masks) == [4]


@pytest.mark.parametrize(
    ("progress", "num"),
    [(0.0, 4), (1 / 3, 3), (0.5, 2), (1.0, 0)],  # .4 * (1 + cos(180 progress)) / 2 of 10
)
@pytest.mark.parametrize("prune", ["signwise", "magnitude"])
def test_sets_zeta_decays_by_a_cosine(progress: float, num: int, prune: str) -> None:
    hp, variant = {"zeta": 0.4}, {"prune": prune, "decay": "cosine"}
    assert set_drops(TEN, hp, variant, progress) == list(range(num))
    assert set_drops(TEN, hp, {"prune": prune}, progress) == [0, 1, 2, 3]  # decay: none


def test_set_grows_new_values_without_momentum() -> None:
    # 1.0 of both signs: all four drop, four of eight positions grow.
    weight, momentum = row(1, 2, -3, -4, 9, 9, 9, 9), row(*range(1, 9))
    args: dict[str, Any] = {"hp": {"zeta": 1.0}, "number": 3}
    masks_before = {"a": first(4, 8)}
    for new_value in ("normal", "zero"):
        params, masks, momenta, _ = update(
            METHODS["set"], {"a": weight}, masks_before, {"a": momentum},
            variant={"new_value": new_value}, **args,
        )  # fmt: skip
        assert momenta is not None
        assert sizes(masks) == [4]
        assert not bool(momenta["a"].any())  # dropped, absent or new: all zero
        grown = params["a"][masks["a"]]
        if new_value == "zero":
            assert grown.tolist() == [0, 0, 0, 0]
        else:
            assert bool((grown != 0).all())
            assert bool((grown.abs() < 0.6).all())  # six deviations
            assert len(set(grown.tolist())) == 4


def test_sets_new_values_are_keyed_by_seed_number_and_layer() -> None:
    # .1 * normal of the stream (seed, "value", number, layer), at the grown position.
    for seed, number, layer in ((0, 0, "a"), (3, 0, "a"), (3, 5, "a"), (3, 5, "b")):
        params, masks, _, _ = update(
            METHODS["set"], {layer: row(1, 2, -3, -4, 0, 0, 0, 0)}, {layer: first(4, 8)},
            hp={"zeta": 1.0}, seed=seed, number=number,
        )  # fmt: skip
        drawn = noise.normal(noise.key(seed, "value", number, layer), torch.arange(8))
        expected = (0.1 * drawn).float() * masks[layer]
        torch.testing.assert_close(params[layer], expected, rtol=1e-6, atol=0)


def test_set_survivors_keep_value_and_momentum() -> None:
    # zeta .5: 1 of (1, 2) and -3 of (-3, -4) drop, 2 and -4 stay.
    weight, momentum = row(1, 2, -3, -4, 0, 0), row(1, 2, 3, 4, 5, 6)
    for number in range(5):
        params, masks, momenta, _ = update(
            METHODS["set"], {"a": weight}, {"a": first(4, 6)}, {"a": momentum},
            hp={"zeta": 0.5}, number=number,
        )  # fmt: skip
        assert momenta is not None
        assert {1, 3} <= set(active(masks["a"]))
        assert params["a"][0, [1, 3]].tolist() == [2, -4]
        assert momenta["a"].tolist() == [[0, 2, 0, 4, 0, 0]]


def occurrences(
    name: str, weight: Tensor, mask: Tensor, hp: dict[str, float], num: int
) -> list[int]:
    """How often each position is active after an update, over `num` updates."""
    found = torch.zeros(weight.numel(), dtype=torch.int64)
    for number in range(num):
        masks = update(METHODS[name], {"a": weight}, {"a": mask}, hp=hp, number=number)[1]
        found += masks["a"].flatten()
    return found.tolist()


def test_set_grows_uniformly_over_all_inactive_positions_the_dropped_included() -> None:
    # 4 stays of four positive; 1, 2, 3 (round(.75 * 4) = 3) and four absent make 7 places for 3.
    found = occurrences("set", row(1, 2, 3, 4, 0, 0, 0, 0), first(4, 8), {"zeta": 0.75}, 350)
    assert found[3] == 350
    others = found[:3] + found[4:]
    assert sum(others) == 3 * 350
    # 150 expected at each, deviation sqrt(350 * 3/7 * 4/7) = 9.3.
    assert all(abs(num - 150) < 4 * 9.3 for num in others)


# DSR ----------------------------------------------------------------------------------------------


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


# SM -----------------------------------------------------------------------------------------------


def counting(num: int, size: int) -> Tensor:
    """1, 2, .., num, then absent ones."""
    return padded(size, list(range(1, num + 1)))


def sm(
    params: Layers, masks: Layers, momenta: Layers | None = None, **more: Any
) -> tuple[Layers, list[int], Any]:
    """(params, active per layer, state) after an update with constant rate."""
    variant = {"decay": "none", **more.pop("variant", {})}
    after, new_masks, new_momenta, state = update(
        METHODS["sm"], params, masks, momenta, variant=variant, **more
    )
    if momenta is not None and variant.get("growth", "momentum") == "momentum":
        assert new_momenta is not None
        assert all(torch.equal(new_momenta[n], momenta[n]) for n in params)  # never reset
    return after, sizes(new_masks), state


def level(masks: Layers, values: Sequence[float], absent: float = 100.0) -> Layers:
    """Momenta with |m| alike at a layer's active weights, signs mixed, and large elsewhere."""
    out = {}
    for (name, mask), value in zip(masks.items(), values, strict=True):
        sign = torch.where(torch.arange(mask.numel()) % 2 == 0, 1.0, -1.0).view(mask.shape)
        out[name] = torch.where(mask, value * sign, absent)
    return out


def test_sm_overgrows_and_carries_the_correction_over_three_updates() -> None:
    masks: Layers = {"a": first(4, 10), "b": first(6, 10)}
    state = None
    expected = [
        # shares .75, .25 throughout (mean |m| of ACTIVE weights 3 and 1), baseline 10.
        # n 4, 6: K = 2 + 3 = 5; ceil(3.75) = 4, ceil(1.25) = 2: 6 grown for 5.
        # r = 10 - 11 = -1; a = .25 * 0 + .75 * -1 + -1
        ([6, 5], -1.75),
        # K = 3 + ceil(2.5) = 6; of 6 - 1.75 = 4.25: ceil(3.1875) = 4, ceil(1.0625) = 2.
        # n 7, 4: r = -1; a = .25 * -1.75 + .75 * -1 + (-1 - 1) / 2
        ([7, 4], -2.1875),
        # K = ceil(3.5) + 2 = 6; of 3.8125: ceil(2.859) = 3, ceil(.953) = 1.
        # n 6, 3: r = 1; a = .25 * -2.1875 + .75 + (-1 - 1 + 1) / 3
        ([6, 3], -0.546875 + 0.75 - 1 / 3),
    ]
    for number, (counts, correction) in enumerate(expected):
        params = {n: torch.where(mask, 1.0, 0.0) for n, mask in masks.items()}
        _, masks, _, state = update(
            METHODS["sm"], params, masks, level(masks, (3, 1)), state=state,
            variant={"decay": "none"}, hp={"prune_fraction": 0.5}, number=number,
        )  # fmt: skip
        assert sizes(masks) == counts
        assert float(state.correction) == pytest.approx(correction, abs=1e-12)
    assert state is not None
    assert float(state.baseline) == 10


def test_sm_prunes_the_ceil_of_the_smallest_and_grows_by_momentum() -> None:
    # One layer: share 1. n = 5 of 10: K = ceil(2.5) = 3: 1, -2 and 3 drop (positions 4, 1, 2).
    # Inactive by |m|: 1 (9, just dropped), 8 (-8), 6 (7), 2 (6), ...: three grow.
    weight = row(4, -2, 3, 5, 1, 0, 0, 0, 0, 0)
    momentum = row(0, 9, 6, 0, 1, 0, 7, 0.5, -8, 2)
    args: dict[str, Any] = {"hp": {"prune_fraction": 0.5}}
    for regrown, value in (("keep", -2), ("zero", 0)):
        after, new_masks, momenta, state = update(
            METHODS["sm"], {"a": weight}, {"a": first(5, 10)}, {"a": momentum},
            variant={"decay": "none", "regrown": regrown}, **args,
        )  # fmt: skip
        assert active(new_masks["a"]) == [0, 1, 3, 6, 8]
        assert after["a"].tolist() == [[4, value, 0, 5, 0, 0, 0, 0, 0, 0]]
        assert momenta is not None
        assert torch.equal(momenta["a"], momentum)
        assert float(state.dropped) == 0.6


def test_sm_grows_by_gradient_or_at_random() -> None:
    weight, grads = row(4, 1, 0, 0, 0, 0), row(0, 1, 2, -5, 3, 4)
    # K = 1 of 2 (position 1); largest |g| among the inactive: position 3.
    after, masks, momenta, _ = update(
        METHODS["sm"], {"a": weight}, {"a": first(2, 6)}, {"a": row(1, 2, 3, 4, 5, 6)},
        {"a": grads}, variant={"decay": "none", "growth": "gradient"},
    )  # fmt: skip
    assert active(masks["a"]) == [0, 3]
    assert after["a"].tolist() == [[4, 0, 0, 0, 0, 0]]
    # No dense gradient at every step: absent and new momenta are zero.
    assert momenta is not None
    assert momenta["a"].tolist() == [[1, 0, 0, 0, 0, 0]]
    found = set()
    for number in range(40):
        masks = update(
            METHODS["sm"], {"a": weight}, {"a": first(2, 6)}, number=number,
            variant={"decay": "none", "growth": "random", "redistribution": "none"},
        )[1]  # fmt: skip
        assert sizes(masks) == [2]
        found |= set(active(masks["a"]))
    assert found == {0, 1, 2, 3, 4, 5}  # just dropped ones may come back


def test_sms_nearly_dense_guard() -> None:
    # a: 9 of 10, sparsity .1 < .2, share .75 > 1/2: rate min(.1, .5), K = ceil(.9) = 1.
    # b: 4 of 10: K = 2. Of 3: ceil(2.25) = 3, ceil(.75) = 1.
    # caps .99 * (1 + 1) = 1.98 and .99 * (6 + 2): 1.02 over the first, b gets 2.02.
    # floors 1 and 2: total 13 as before.
    masks: Layers = {"a": first(9, 10), "b": first(4, 10)}
    params = {"a": counting(9, 10), "b": counting(4, 10)}
    _, counts, state = sm(params, masks, level(masks, (3, 1)), hp={"prune_fraction": 0.5})
    assert float(state.dropped) == pytest.approx(3 / 13)
    assert counts == [9, 4]
    assert float(state.correction) == 0


def test_sms_guard_is_for_layers_that_would_grow() -> None:
    # a: 9 of 10, but its share is .25: K = ceil(4.5) = 5. b: 2. Of 7: ceil(1.75) = 2, ceil(5.25)
    # = 6: n = 9 - 5 + 2, 4 - 2 + 6; r = 13 - 14.
    masks: Layers = {"a": first(9, 10), "b": first(4, 10)}
    params = {"a": counting(9, 10), "b": counting(4, 10)}
    _, counts, state = sm(params, masks, level(masks, (1, 3)), hp={"prune_fraction": 0.5})
    assert counts == [6, 8]
    assert float(state.correction) == -1.75


def test_sms_guard_begins_below_a_sparsity_of_a_fifth() -> None:
    # a: 8 of 10: sparsity .2 is not below .2, so K = 4. b: 4 of 10: K = 2.
    # Of 6: ceil(4.5) = 5 (cap .99 * 6 = 5.94), ceil(1.5) = 2: n = 8 - 4 + 5, 4 - 2 + 2.
    masks: Layers = {"a": first(8, 10), "b": first(4, 10)}
    params = {"a": counting(8, 10), "b": counting(4, 10)}
    _, counts, state = sm(params, masks, level(masks, (3, 1)), hp={"prune_fraction": 0.5})
    assert float(state.dropped) == 0.5
    assert counts == [9, 4]


def test_sms_guard_leaves_equal_shares_alone() -> None:
    # Three layers of 8 of 9 (sparsity .11) with the same mean |m|, 8 * .29 / 8: no share is above
    # 1/3 (in float64 .29 / (.29 + .29 + .29) is), so K = 4 each and 4 grow in each.
    masks: Layers = {name: first(8, 9) for name in "abc"}
    params = {name: counting(8, 9).double() for name in "abc"}
    momenta = {name: torch.zeros(1, 9, dtype=torch.float64) for name in "abc"}
    for momentum in momenta.values():
        momentum[0, 7] = 8 * 0.29
    _, counts, state = sm(params, masks, momenta, hp={"prune_fraction": 0.5})
    assert float(state.dropped) == 0.5
    assert counts == [8, 8, 8]


def test_sms_ceil_of_a_whole_number_is_that_number() -> None:
    # K = 12 + 13 = 25, shares 14 : 11, so 14 and 11 (in float64 14 / 25 * 25 is above 14).
    masks: Layers = {"a": first(24, 100), "b": first(26, 100)}
    params = {"a": counting(24, 100), "b": counting(26, 100)}
    _, counts, state = sm(params, masks, level(masks, (14, 11)), hp={"prune_fraction": 0.5})
    assert counts == [24 - 12 + 14, 26 - 13 + 11]
    assert float(state.correction) == 0


def test_sm_fills_layers_to_99_percent_and_spreads_the_rest_equally() -> None:
    # a: 60 of 120, b: 40 of 400, c: 20 of 400, all of the momentum in a. K = 30 + 20 + 10 = 60:
    # ceil(1 * 60) = 60 for a, below its cap .99 * (60 + 30) = 89.1: all grow there.
    masks: Layers = {"a": first(60, 120), "b": first(40, 400), "c": first(20, 400)}
    params = {n: torch.where(mask, 1.0, 0.0) for n, mask in masks.items()}
    _, counts, _ = sm(params, masks, level(masks, (1, 0, 0)), hp={"prune_fraction": 0.5})
    assert counts == [90, 20, 10]
    # Now a has 60 of 70: sparsity .143, share 1 > 1/3: rate 10/70, K = ceil(8.57) = 9.
    # K = 9 + 20 + 10 = 39 for a, cap .99 * (10 + 9) = 18.81: 20.19 over, 10.095 for b and c.
    # floors 18, 10, 10.
    masks["a"] = first(60, 70)
    params["a"] = torch.where(masks["a"], 1.0, 0.0)
    _, counts, state = sm(params, masks, level(masks, (1, 0, 0)), hp={"prune_fraction": 0.5})
    assert counts == [60 - 9 + 18, 20 + 10, 10 + 10]
    assert float(state.correction) == 1.75  # one weight is missing: r = 1


# a: 5 of 40, mean |w| 3; b: 15 of 40, mean |w| (7 * 1.5 + 7 * .5 + 1) / 15 = 1.
# After pruning those means would be 3.75 and 1.5.
TWO: Layers = {
    "a": padded(40, [2, -2.5, 3, -3.5, 4]),
    "b": padded(40, [1.5, -1.5] * 3 + [1.5] + [0.5, -0.5] * 3 + [0.5] + [1]),
}


@pytest.mark.parametrize(
    ("redistribution", "momenta", "counts"),
    [
        # K = ceil(2.5) = 3 and ceil(7.5) = 8: 11.
        pytest.param("none", (1, 1), [5, 15], id="none-each-regrows-what-it-lost"),
        # 5 : 15 before pruning: ceil(2.75) = 3, ceil(8.25) = 9
        pytest.param("nonzero", (1, 1), [5, 16], id="nonzero"),
        # 3 : 1 before pruning: ceil(8.25) = 9, ceil(2.75) = 3
        pytest.param("magnitude", (1, 1), [11, 10], id="magnitude"),
        # 1 : 1: ceil(5.5) = 6 each
        pytest.param("momentum", (1, 1), [8, 13], id="momentum"),
        # 1 : 7: ceil(1.375) = 2, ceil(9.625) = 10
        pytest.param("momentum", (1, 7), [4, 17], id="momentum-1-to-7"),
        # 0 : 1: none, 11
        pytest.param("momentum", (0, 1), [2, 18], id="momentum-of-one-layer"),
        # all zero: by number
        pytest.param("momentum", (0, 0), [5, 16], id="no-momentum-at-all"),
    ],
)
@pytest.mark.parametrize("growth", ["momentum", "random"])
def test_sm_redistributes(
    redistribution: str, momenta: tuple[float, float], counts: list[int], growth: str
) -> None:
    masks: Layers = {n: w != 0 for n, w in TWO.items()}
    variant = {"redistribution": redistribution, "growth": growth}
    _, found, state = sm(TWO, masks, level(masks, momenta), variant=variant)
    assert found == counts
    assert float(state.dropped) == 0.55  # 11 of 20


def test_sm_redistributes_by_number_when_all_weights_are_zero() -> None:
    masks: Layers = {n: w != 0 for n, w in TWO.items()}
    zeros = {n: torch.zeros_like(w) for n, w in TWO.items()}
    _, found, _ = sm(zeros, masks, level(masks, (1, 1)), variant={"redistribution": "magnitude"})
    assert found == [5, 16]


@pytest.mark.parametrize(
    ("decay", "progress", "num"),
    [
        # of 400 weights, p = .5
        ("cosine", 0.0, 200),
        ("cosine", 0.5, 101),  # .005 + .495 / 2 = .2525
        ("cosine", 1.0, 2),  # .005
        ("linear", 0.0, 200),
        ("linear", 0.5, 100),
        ("linear", 1.0, 0),
        ("none", 0.0, 200),
        ("none", 1.0, 200),
    ],
)
def test_sms_rate_decays(decay: str, progress: float, num: int) -> None:
    mask = first(400, 1000)
    after, masks, _, state = update(
        METHODS["sm"], {"a": counting(400, 1000)}, {"a": mask}, {"a": torch.zeros(1, 1000)},
        variant={"decay": decay, "regrown": "zero"}, progress=progress,
    )  # fmt: skip
    assert after["a"].count_nonzero() == 400 - num
    assert after["a"][0, num:400].tolist() == list(range(num + 1, 401))  # the smallest went
    assert float(state.dropped) == num / 400
    assert sizes(masks) == [400]


def test_sm_as_in_the_founding_description() -> None:
    # 50 % of every layer, no decay, random growth, by mean |m|, new weights zero.
    masks: Layers = {"a": first(4, 40), "b": first(8, 40)}
    params = {"a": counting(4, 40), "b": counting(8, 40)}
    variant = {"decay": "none", "growth": "random", "regrown": "zero"}
    # K = 2 + 4 = 6, shares 5 : 1: 5 and 1
    after, counts, _ = sm(
        params, masks, level(masks, (5, 1)), variant=variant, hp={"prune_fraction": 0.5},
        progress=0.9,
    )  # fmt: skip
    assert counts == [4 - 2 + 5, 8 - 4 + 1]
    assert after["a"][after["a"] != 0].tolist() == [3, 4]
    assert after["b"][after["b"] != 0].tolist() == [5, 6, 7, 8]


def test_sm_never_prunes_a_whole_layer() -> None:
    # ceil(1 * 4) would be all; one stays, the largest. ceil(.5 * 1) likewise.
    for num, fraction, stays in ((4, 1.0, [4]), (1, 0.5, [1])):
        after, counts, _ = sm(
            {"a": counting(num, 10)}, {"a": first(num, 10)}, {"a": torch.zeros(1, 10)},
            variant={"regrown": "zero"}, hp={"prune_fraction": fraction},
        )  # fmt: skip
        assert after["a"][after["a"] != 0].tolist() == stays
        assert counts == [num]


# DST ----------------------------------------------------------------------------------------------

NAME = "w.threshold"


@pytest.mark.parametrize(
    ("x", "expected"),
    [(0, 2), (0.2, 1.2), (0.4, 0.4), (0.7, 0.4), (1, 0.4), (1.01, 0), (50, 0)],
)
def test_dsts_derivative(x: float, expected: float) -> None:
    for sign in (1, -1):
        got = dst.step_derivative(torch.tensor([sign * x], dtype=torch.float64))
        assert got.tolist() == pytest.approx([expected], abs=1e-12)


def numbers_of(hp: dict[str, float]) -> Any:
    return make_hyperparameters(METHODS["dst"], hp, make_variant(METHODS["dst"], {}))


def gates_of(params: Layers) -> Layers:
    return {name: dst.gate(params[name], t) for name, t in dst.thresholds(params).items()}


def sparsified(params: Layers) -> Layers:
    variant = make_variant(METHODS["dst"], {})
    return dst.METHOD.sparsify(params, gates_of(params), (), numbers_of({}), variant)


def pulled_back(grads: Layers, params: Layers, alpha: float) -> Layers:
    """Gradients of all that is trained; fails where params or gates are written to."""
    given = {name: grad.clone() for name, grad in grads.items()}  # which are used up
    gates = gates_of(params)
    before = [{name: t.clone() for name, t in layers.items()} for layers in (params, gates)]
    assert dst.METHOD.pull_back is not None
    out: Layers = dst.METHOD.pull_back(
        given, params, gates, numbers_of({"alpha": alpha}), make_variant(METHODS["dst"], {})
    )
    for layers, copies in zip((params, gates), before, strict=True):
        assert layers.keys() == copies.keys()
        assert all(torch.equal(layers[name], copies[name]) for name in copies)
    return out


def test_dst_masks_at_every_forward_pass() -> None:
    weight = row(0.25, -0.5, 0.75, -1, 0)
    for t, expected in [
        (0.0, [0.25, -0.5, 0.75, -1, 0]),
        (0.25, [0, -0.5, 0.75, -1, 0]),  # |w| = t is masked
        (0.6, [0, 0, 0.75, -1, 0]),
        (-0.5, [0.25, -0.5, 0.75, -1, 0]),
        (2.0, [0, 0, 0, 0, 0]),
    ]:
        params = {"w": weight, NAME: torch.tensor([t]), "bias": row(7)}
        forward = sparsified(params)
        assert forward["w"].tolist() == [expected]
        # A threshold below zero leaves the zero active.
        gate = [float(e != 0 or t < 0) for e in expected]
        assert gates_of(params)["w"].tolist() == [gate]
        assert dst.masks_of(params)["w"].tolist() == [[g == 1 for g in gate]]
        assert torch.equal(forward["bias"], row(7))
        assert torch.equal(params["w"], weight)  # the latent weight stays


def test_dsts_update_gives_the_masks_of_the_thresholds() -> None:
    # Two neurons with thresholds .25 and .5: |w| = t is masked.
    params = {
        "w": torch.tensor([[0.25, -0.5, 1], [0.25, -0.5, 1]]),
        NAME: torch.tensor([0.25, 0.5]),
    }
    before = {"w": torch.ones(2, 3, dtype=torch.bool)}
    after, masks, _, _ = update(METHODS["dst"], params, before)
    assert masks["w"].tolist() == [[False, True, True], [False, False, True]]
    assert torch.equal(after["w"], params["w"])
    assert torch.equal(after[NAME], params[NAME])
    # A threshold below zero leaves a row dense, its zeros included.
    params = {"w": row(0, 0.5), NAME: torch.tensor([-0.1])}
    _, masks, _, _ = update(METHODS["dst"], params, {"w": first(2, 2)})
    assert masks["w"].tolist() == [[True, True]]


# Every piece of H, both signs, exact zero, |w| = t; t = .5.
PIECES = [0.0, 0.5, -0.5, 0.6, -0.3, 0.95, -1.3, 1.6, -2.0]


def h_by_hand(x: float) -> float:
    return 2 - 4 * abs(x) if abs(x) <= 0.4 else 0.4 if abs(x) <= 1 else 0.0


@pytest.mark.parametrize("granularity", ["scalar", "neuron", "weight"])
@pytest.mark.parametrize("shape", [(3, 9), (3, 1, 3, 3)])
def test_dsts_gradients_are_the_closed_form(granularity: str, shape: tuple[int, ...]) -> None:
    # methods.md 4.1: dL/dW = G M + G W H(|W| - t) sign(W); dL/dt = -sum G W H(|W| - t)
    weight = torch.tensor([PIECES, PIECES[::-1], PIECES], dtype=torch.float64)
    t = {
        "scalar": torch.tensor(0.5),
        "neuron": torch.tensor([0.5, 0.1, 0.9]),
        "weight": 0.5 + 0.01 * torch.arange(27).view(3, 9),
    }[granularity].double()
    g = torch.linspace(-2, 3, 27, dtype=torch.float64).view(3, 9)
    w_grad, t_terms = torch.zeros(3, 9).double(), torch.zeros(3, 9).double()
    for i in range(3):
        for j in range(9):
            own = {"scalar": t, "neuron": t[i] if t.dim() else t, "weight": t}[granularity]
            own = own[i, j] if granularity == "weight" else own
            w, x = float(weight[i, j]), abs(float(weight[i, j])) - float(own)
            sign = (w > 0) - (w < 0)
            w_grad[i, j] = g[i, j] * (x > 0) + g[i, j] * w * h_by_hand(x) * sign
            t_terms[i, j] = -g[i, j] * w * h_by_hand(x)
    t_grad = {"scalar": t_terms.sum(), "neuron": t_terms.sum(1), "weight": t_terms}[granularity]

    params = {"w": weight.view(shape), NAME: t.view(shape) if granularity == "weight" else t}
    grads = {"w": g.view(shape), "bias": row(7)}
    # alpha * sum exp(-t) in the loss adds -alpha * exp(-t), methods.md 4.1 again
    for alpha in (0.0, 0.25):
        got = pulled_back(grads, {**params, "bias": row(1)}, alpha)
        assert got.keys() == {"w", NAME, "bias"}
        assert torch.equal(got["bias"], row(7))
        torch.testing.assert_close(got["w"], w_grad.view(shape), rtol=0, atol=1e-12)
        push = torch.tensor([math.exp(-x) for x in t.flatten()], dtype=torch.float64)
        expected = t_grad - alpha * push.view(t.shape)
        assert got[NAME].shape == params[NAME].shape
        torch.testing.assert_close(got[NAME].view(t.shape), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("granularity", ["scalar", "neuron", "weight"])
def test_dsts_gradients_are_those_of_a_straight_through_step(
    granularity: str, dtype: torch.dtype
) -> None:
    # With x = |w| - t and its value `level`: where(level > 0, w, 0) + (x - level) H(level) w has
    # the value of the masked weight and the derivative that equation 6 gives the step.
    g = torch.Generator().manual_seed(3)
    params: Layers = {"bias": torch.randn(6, generator=g, dtype=dtype)}
    of_masked: Layers = {}
    for name, shape in {"w": (6, 11), "v": (5, 3, 3, 2)}.items():
        params[name] = torch.randn(shape, generator=g, dtype=dtype)
        own = {"scalar": (), "neuron": shape[:1], "weight": shape}[granularity]
        params[name + ".threshold"] = 0.2 + 0.6 * torch.rand(own, generator=g, dtype=dtype)
        of_masked[name] = torch.randn(shape, generator=g, dtype=dtype)

    def network_loss(masked: Layers) -> Tensor:
        terms = [(masked[name].tanh() * of_masked[name]).sum() for name in of_masked]
        return torch.stack([*terms, masked["bias"].sin().sum()]).sum()

    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    masked, penalty = {"bias": leaves["bias"]}, torch.zeros((), dtype=dtype)
    for name in of_masked:
        w, t = leaves[name], leaves[name + ".threshold"]
        x = w.abs() - (t.view(-1, *[1] * (w.dim() - 1)) if granularity == "neuron" else t)
        level, size = x.detach(), x.detach().abs()
        h = torch.where(size <= 0.4, 2 - 4 * size, torch.full_like(size, 0.4) * (size <= 1))
        assert all(bool(part.any()) for part in (level > 0, level < 0, size < 0.4, size > 1))
        masked[name] = torch.where(level > 0, w, 0) + (x - level) * h * w
        penalty = penalty + 0.3 * torch.exp(-t).sum()
    loss = network_loss(masked) + penalty
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    forward = sparsified(params)
    assert all(torch.equal(forward[name], masked[name].detach()) for name in masked)
    ends = {name: forward[name].clone().requires_grad_() for name in masked}
    grads = torch.autograd.grad(network_loss(ends), list(ends.values()))
    got = pulled_back(dict(zip(ends, grads, strict=True)), params, 0.3)
    assert got.keys() == expected.keys()
    exact = dtype == torch.float64
    for name, grad in expected.items():  # dtypes and shapes too: those of the parameters
        torch.testing.assert_close(
            got[name], grad, rtol=0 if exact else 1e-5, atol=1e-12 if exact else 1e-5
        )


def test_dsts_penalty_pushes_thresholds_up() -> None:
    # -alpha exp(-t) = -.1 * (1, .5, 4), where the loss gives no gradient.
    params: Layers = {
        "w": torch.ones(2, 3).double(), "v": torch.ones(2, 2).double(), "bias": torch.ones(2),
        NAME: torch.tensor([0, math.log(2)], dtype=torch.float64),
        "v.threshold": torch.tensor(-math.log(4), dtype=torch.float64),
    }  # fmt: skip
    zeros = {name: torch.zeros_like(params[name]) for name in ("w", "v", "bias")}
    got = pulled_back(zeros, params, 0.1)
    assert got[NAME].tolist() == pytest.approx([-0.1, -0.05])
    assert float(got["v.threshold"]) == pytest.approx(-0.4)
    assert not any(bool(got[name].any()) for name in zeros)


def test_dst_brings_a_masked_weight_back() -> None:
    # L = -(masked w), so G = -1: dw = -w H(w - t), dt = w H(w - t). Steps of .5.
    weight = torch.tensor([[0.1]], dtype=torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64)
    steps = [
        # w .1, t .3: x = -.2, H = 1.2: w + .5 * .12, t - .5 * .12
        (0.0, 0.16, 0.24),
        # x = -.08, H = 1.68, w H = .2688
        (0.0, 0.2944, 0.1056),
        # active: x = .1888, H = 1.2448, w H = .36646912; dw = -1 - .36646912
        (0.2944, 0.2944 + 0.68323456, 0.1056 - 0.18323456),
    ]
    for value, next_weight, next_t in steps:
        params = {"w": weight, NAME: t}
        assert float(sparsified(params)["w"]) == pytest.approx(value, abs=1e-12)
        grads = pulled_back({"w": -torch.ones_like(weight)}, params, 0.0)
        weight, t = weight - 0.5 * grads["w"], t - 0.5 * grads[NAME]
        assert float(weight) == pytest.approx(next_weight, abs=1e-12)
        assert float(t) == pytest.approx(next_t, abs=1e-12)
    _, masks, _, _ = update(METHODS["dst"], {"w": weight, NAME: t}, {"w": first(1, 1)})
    assert active(masks["w"]) == [0]


@pytest.mark.parametrize("guard", ["on", "off"])
def test_dsts_guard_resets_a_collapsed_layer_and_its_momentum(guard: str) -> None:
    # Of 100 weights .01 .. 1.00, t = .995 leaves 1 (mean .01: collapsed), t = .985 leaves 2.
    weight = torch.arange(1, 101).view(10, 10) / 100
    params = {
        "w": weight, NAME: torch.full((10,), 0.995),
        "v": weight, "v.threshold": torch.full((10,), 0.985),
        "u": weight, "u.threshold": torch.tensor(5.0),
    }  # fmt: skip
    momenta = {name: torch.ones_like(p) for name, p in params.items()}
    masks_before = {name: torch.ones(10, 10, dtype=torch.bool) for name in "wvu"}
    after, masks, new_momenta, _ = update(
        METHODS["dst"], params, masks_before, momenta, variant={"guard": guard}
    )
    assert new_momenta is not None
    if guard == "on":
        assert not bool(after[NAME].any())
        assert float(after["u.threshold"]) == 0
        assert not bool(new_momenta[NAME].any())
        assert float(new_momenta["u.threshold"]) == 0
        assert sizes(masks) == [100, 2, 100]
    else:
        assert torch.equal(after[NAME], params[NAME])
        assert torch.equal(new_momenta[NAME], momenta[NAME])
        assert sizes(masks) == [1, 2, 0]
    for name in ("w", "v", "u"):
        assert torch.equal(after[name], weight)
        assert torch.equal(new_momenta[name], torch.ones(10, 10))
    assert torch.equal(after["v.threshold"], params["v.threshold"])
    assert torch.equal(new_momenta["v.threshold"], torch.ones(10))
    # The same by the step, with gates that say what the masks say.
    assert dst.METHOD.after_step is not None
    changed, gates, reset = dst.METHOD.after_step(
        params, (), numbers_of({}), make_variant(METHODS["dst"], {"guard": guard})
    )
    assert changed.keys() == reset.keys() == {NAME, "v.threshold", "u.threshold"}
    for name in ("w", "v", "u"):
        assert torch.equal(gates[name], masks[name].float())
        t_name = name + ".threshold"
        assert torch.equal(changed[t_name], after[t_name])
        expected = torch.full(params[t_name].shape, guard == "on" and name != "v")
        assert torch.equal(reset[t_name], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dsts_guard_counts_beyond_the_whole_numbers_of_half_floats(dtype: torch.dtype) -> None:
    # 1,001 of 100,000 are left, just above the guard's 1 %; bfloat16 cannot hold 1,001.
    weight = torch.full((100_000, 1), 0.125, dtype=dtype)
    weight[:1001] = 1
    params = {"w": weight, NAME: torch.tensor(0.5, dtype=dtype)}
    after, masks, _, _ = update(
        METHODS["dst"], params, {"w": first(1, 1).expand(100_000, 1)},
        variant={"granularity": "scalar"}, state=(),
    )  # fmt: skip
    assert float(after[NAME]) == 0.5
    assert sizes(masks) == [1001]


def test_dsts_guard_leaves_zeros_masked() -> None:
    # t = 0 masks |w| = 0 still.
    params = {"w": row(0, 0.5, -0.5), NAME: torch.tensor([9.0])}
    _, masks, _, _ = update(METHODS["dst"], params, {"w": first(3, 3)})
    assert masks["w"].tolist() == [[False, True, True]]


# 1/8 .. 10/8, in two neurons.
LADDER = torch.tensor([[1, -3, 5, -7, 9], [2, -4, 6, -8, 10]]) / 8


def dst_thresholds(variant: dict[str, str], threshold: float, seed: int = 0) -> Tensor:
    params, _, _, _ = update(
        METHODS["dst"], {"w": LADDER}, {"w": torch.ones(2, 5, dtype=torch.bool)},
        variant=variant, hp={"threshold": threshold}, seed=seed,
    )  # fmt: skip
    assert params[NAME].dtype == torch.float32
    return params[NAME]


SHAPES = {"scalar": (), "neuron": (2,), "weight": (2, 5)}


@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize(
    ("init", "unit", "threshold", "expected"),
    [
        ("zero", "share", 0.5, 0.0),
        ("zero", "absolute", 0.5, 0.0),
        ("constant", "absolute", 0.375, 0.375),
        ("constant", "share", 0.0, 0.0),
        ("constant", "share", 0.5, 0.625),  # the 5th smallest of ten
        ("constant", "share", 0.3, 0.375),
        ("constant", "share", 0.9, 1.125),
    ],
)
def test_dsts_thresholds_at_the_start(
    granularity: str, init: str, unit: str, threshold: float, expected: float
) -> None:
    variant = {"granularity": granularity, "threshold_init": init, "threshold_unit": unit}
    t = dst_thresholds(variant, threshold)
    assert tuple(t.shape) == SHAPES[granularity]
    assert set(t.flatten().tolist()) == {expected}
    masks = update(
        METHODS["dst"], {"w": LADDER, NAME: t}, {"w": torch.ones(2, 5, dtype=torch.bool)}
    )[1]
    if unit == "share" and init == "constant":
        assert sizes(masks) == [10 - round(10 * threshold)]  # the share of the layer masked


@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize(
    ("unit", "threshold", "top"), [("absolute", 0.5, 0.5), ("share", 0.5, 0.625)]
)
def test_dsts_uniform_thresholds(granularity: str, unit: str, threshold: float, top: float) -> None:
    variant = {"granularity": granularity, "threshold_init": "uniform", "threshold_unit": unit}
    drawn = torch.cat([dst_thresholds(variant, threshold, s).flatten() for s in range(60)])
    assert bool(((drawn >= 0) & (drawn < top)).all())
    assert len(set(drawn.tolist())) == len(drawn)
    # Mean top / 2, deviation top / sqrt(12 n).
    assert abs(float(drawn.mean()) - top / 2) < 4 * top / math.sqrt(12 * len(drawn))
    assert torch.equal(dst_thresholds(variant, threshold, 3), dst_thresholds(variant, threshold, 3))


def test_dst_guards_at_the_start() -> None:
    # An absolute threshold of 2 masks all ten: the guard gives 0, without it 2 stays.
    variant = {"threshold_init": "constant", "threshold_unit": "absolute"}
    assert dst_thresholds(variant, 2.0).tolist() == [0, 0]
    assert dst_thresholds({**variant, "guard": "off"}, 2.0).tolist() == [2, 2]


def test_dsts_convolutions_have_a_threshold_per_filter() -> None:
    weight = torch.arange(1, 37).view(4, 1, 3, 3) / 64
    params, masks, _, _ = update(
        METHODS["dst"], {"w": weight}, {"w": torch.ones(4, 1, 3, 3, dtype=torch.bool)}
    )
    assert params[NAME].tolist() == [0, 0, 0, 0]
    params[NAME] = torch.tensor([0.0, 0.25, 0.5, 0.0])
    # Filters hold 1..9, 10..18, 19..27, 28..36 of 64ths: above 16 are 2, above 32 none.
    masks = update(METHODS["dst"], params, masks)[1]
    assert masks["w"].flatten(1).sum(1).tolist() == [9, 2, 0, 9]


def test_dsts_weight_decay_reaches_thresholds_when_shared() -> None:
    for words, expected in (("shared", True), ("none", False)):
        variant = make_variant(METHODS["dst"], {"threshold_decay": words})
        assert METHODS["dst"].decays(NAME, variant) is expected
        assert METHODS["dst"].decays("w", variant) is True


# RigL ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num", "fraction", "progress", "dropped"),
    [
        (10, 0.3, 0.0, 3),
        (9, 0.3, 0.0, 2),  # 2.7
        (3, 0.3, 0.0, 0),  # .9
        (20, 0.3, 0.5, 3),  # .15 * 20
        (10, 0.3, 0.5, 1),  # 1.5
        (20, 0.3, 1 / 3, 4),  # .3 * .75 * 20 = 4.5
        (20, 0.3, 1.0, 0),
        (10, 1.0, 0.0, 10),
        (100, 0.29, 0.0, 29),
        (90, 0.7, 0.0, 63),
    ],
)
def test_rigl_drops_the_floor_and_regrows_as_many(
    num: int, fraction: float, progress: float, dropped: int
) -> None:
    # Gradients grow along the layer, so the last absent positions grow.
    after, masks, _, _ = update(
        METHODS["rigl"], {"a": counting(num, 3 * num)}, {"a": first(num, 3 * num)},
        grads={"a": counting(3 * num, 3 * num)}, hp={"prune_fraction": fraction},
        progress=progress,
    )  # fmt: skip
    stays = list(range(dropped, num))
    assert active(after["a"] != 0) == stays
    assert active(masks["a"]) == stays + list(range(3 * num - dropped, 3 * num))


def test_rigl_grows_by_gradient_and_may_take_back_what_it_dropped() -> None:
    # Of 4, .5 drops 1 and -2 (positions 0, 1). Inactive by |g|: 1 (-9), 5 (8), 0 (3), 4 (1).
    # The largest, at position 2, is active and does not count.
    params, masks, momenta, _ = update(
        METHODS["rigl"], {"a": row(1, -2, 3, 4, 7, 7)}, {"a": first(4, 6)},
        {"a": row(1, 2, 3, 4, 5, 6)}, {"a": row(3, -9, 50, 0, 1, 8)},
        hp={"prune_fraction": 0.5},
    )  # fmt: skip
    assert momenta is not None
    assert active(masks["a"]) == [1, 2, 3, 5]
    assert params["a"].tolist() == [[0, 0, 3, 4, 0, 0]]  # new value zero, also where it was -2
    assert momenta["a"].tolist() == [[0, 0, 3, 4, 0, 0]]


# GMP ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begin", "progress", "left"),
    [
        # 20 + 80 (1 - u)^3 of 100
        (0.0, 0.0, 100),
        (0.0, 0.25, 54),  # 20 + 33.75
        (0.0, 0.5, 30),
        (0.0, 0.75, 21),  # 21.25
        (0.0, 1.0, 20),
        (0.5, 0.25, 100),
        (0.5, 0.5, 100),
        (0.5, 0.75, 30),  # u = .25 / .5
        (0.5, 1.0, 20),
    ],
)
def test_gmps_cubic_schedule(begin: float, progress: float, left: int) -> None:
    weight = torch.arange(1, 101).view(10, 10) * torch.tensor([1.0, -1.0]).repeat(5)
    params, masks, momenta, state = update(
        METHODS["gmp"], {"a": weight}, {"a": torch.ones(10, 10, dtype=torch.bool)},
        {"a": torch.ones(10, 10)}, hp={"density": 0.2, "begin": begin}, progress=progress,
    )  # fmt: skip
    assert momenta is not None
    assert active(masks["a"]) == list(range(100 - left, 100))  # the largest |w|
    assert torch.equal(params["a"], weight * masks["a"])
    assert torch.equal(momenta["a"], masks["a"].float())
    assert float(state.density) == left / 100


def test_gmp_goes_on_from_its_state_and_what_is_pruned_stays_pruned() -> None:
    params, masks = {"a": counting(8, 8)}, {"a": first(8, 8)}
    # 2 + 6 * .125 = 2.75: 3 left at the half, 6, 7 and 8.
    params, masks, _, state = update(
        METHODS["gmp"], params, masks, hp={"density": 0.25}, progress=0.5
    )
    assert active(masks["a"]) == [5, 6, 7]
    # The absent ones are given large values: they must not come back.
    params = {"a": torch.where(masks["a"], params["a"], 100.0)}
    params, masks, _, _ = update(METHODS["gmp"], params, masks, state=state, progress=1.0)
    assert active(masks["a"]) == [6, 7]
    assert params["a"].tolist() == [[0, 0, 0, 0, 0, 0, 7, 8]]


def test_gmp_prunes_each_layer_to_its_share() -> None:
    # .25 of 8 and of 16; at least one of 2.
    params = {"a": counting(8, 8), "b": counting(16, 16), "c": counting(2, 2)}
    masks = update(
        METHODS["gmp"], params, {n: w != 0 for n, w in params.items()},
        hp={"density": 7 / 26}, progress=1.0,
    )[1]  # fmt: skip
    assert sizes(masks) == [2, 4, 1]


# When ---------------------------------------------------------------------------------------------


def due(
    schedule: UpdateSchedule, num_steps: int, epoch: int = 4, closes: bool = False
) -> list[int]:
    return [s for s in range(1, num_steps + 1) if schedule.is_due(s, num_steps, epoch, closes)]


@pytest.mark.parametrize(
    ("schedule", "num_steps", "expected"),
    [
        pytest.param(UpdateSchedule(), 12, [4, 8], id="epochs-but-the-last"),
        pytest.param(UpdateSchedule(), 4, [], id="one-epoch"),
        pytest.param(UpdateSchedule(every=3), 10, [3, 6, 9], id="every-3"),
        pytest.param(UpdateSchedule(every=3), 9, [3, 6], id="never-after-the-last-step"),
        pytest.param(UpdateSchedule(every=1), 3, [1, 2], id="every-step"),
        pytest.param(UpdateSchedule(every=100), 12, [], id="longer-than-training"),
        pytest.param(UpdateSchedule(every=2, first=0.5), 10, [6, 8], id="first-at-step-5"),
        pytest.param(UpdateSchedule(every=2, stop=0.5), 12, [2, 4, 6], id="stop-at-step-6"),
        # 0.07 * 100 is 7.000000000000001
        pytest.param(UpdateSchedule(every=7, first=0.07, stop=0.2), 100, [7, 14], id="first-at-7"),
        pytest.param(
            UpdateSchedule(every=7, doublings=(0.07,), stop=0.3), 100, [14, 28], id="doubles-at-7"
        ),
        pytest.param(UpdateSchedule(every=1, stop=0.0), 12, [], id="stop-0-every-step"),
        pytest.param(UpdateSchedule(every=2, stop=0.0), 12, [], id="stopped-at-once"),
        # every 2; from step 8 every 4
        pytest.param(
            UpdateSchedule(every=2, doublings=(0.5,)), 16, [2, 4, 6, 8, 12], id="one-doubling"
        ),
        # every step; from 4 every 2; from 8 every 4
        pytest.param(
            UpdateSchedule(every=1, doublings=(0.25, 0.5)), 16, [1, 2, 3, 4, 6, 8, 12], id="two"
        ),
        # an epoch is 4 steps; from step 12 two epochs are 8
        pytest.param(UpdateSchedule(doublings=(0.5,)), 24, [4, 8, 16], id="doubled-epochs"),
        # .57 of 100 is step 57, though .57 * 100 is 56.99999999999999 in float64
        pytest.param(UpdateSchedule(every=19, stop=0.57), 100, [19, 38, 57], id="share-of-steps"),
    ],
)
def test_updates_are_due(schedule: UpdateSchedule, num_steps: int, expected: list[int]) -> None:
    assert due(schedule, num_steps) == expected


@pytest.mark.parametrize(
    ("schedule", "num_steps", "expected"),
    [
        pytest.param(UpdateSchedule(every=4, stop=0.5), 16, [4, 8], id="stop-is-on-the-way"),
        pytest.param(UpdateSchedule(every=4, stop=0.75), 8, [4, 6], id="stop-is-not"),
        pytest.param(UpdateSchedule(every=4), 10, [4, 8, 10], id="even-after-the-last-step"),
        pytest.param(UpdateSchedule(), 8, [4, 8], id="epochs"),
        pytest.param(UpdateSchedule(stop=0.75), 4, [3], id="one-epoch"),
        pytest.param(UpdateSchedule(every=100, stop=0.75), 14, [10], id="stop-between-two-steps"),
        pytest.param(UpdateSchedule(every=100, stop=0.0), 14, [1], id="as-soon-as-possible"),
        pytest.param(UpdateSchedule(every=4, first=0.9, stop=0.5), 16, [8], id="first-after-stop"),
    ],
)
def test_a_method_that_closes_always_updates_at_stop(
    schedule: UpdateSchedule, num_steps: int, expected: list[int]
) -> None:
    assert due(schedule, num_steps, closes=True) == expected


@pytest.mark.parametrize(
    ("stop", "step", "progress"), [(1.0, 0, 0.0), (1.0, 5, 0.25), (0.5, 5, 0.5), (0.5, 15, 1.0)]
)
def test_progress_is_the_share_of_the_time_to_stop(stop: float, step: int, progress: float) -> None:
    assert UpdateSchedule(stop=stop).progress(step, 20) == progress


@pytest.mark.parametrize("num_steps", [1, 2, 14, 100, 101])
@pytest.mark.parametrize("stop", [0.0, 0.57, 0.75, 1.0])
def test_progress_is_1_at_the_closing_update(num_steps: int, stop: float) -> None:
    # "GMP always updates at stop", so that its density there is the target exactly: 14 steps and
    # stop .75 close after step 10 (10.5), where progress is 1, not 10 / 10.5.
    schedule = UpdateSchedule(every=10_000, stop=stop)
    (closing,) = due(schedule, num_steps, closes=True)
    assert schedule.progress(closing, num_steps) == 1.0


def test_schedules_of_the_papers() -> None:
    assert METHODS["set"].schedule == UpdateSchedule()
    assert METHODS["sm"].schedule == UpdateSchedule()
    # WRN-28-2: 100, 200, 400, 800 steps at epochs 0, 25, 80, 140 of 200; stop at 190
    assert METHODS["dsr"].schedule == UpdateSchedule(100, 0.0, 0.95, (0.125, 0.4, 0.7))
    assert METHODS["rigl"].schedule == UpdateSchedule(100, 0.0, 0.75)
    assert METHODS["gmp"].schedule.every == 100
    assert [name for name, method in METHODS.items() if method.closes] == ["gmp"]
