"""SET's rule and variants on networks small enough to check by eye.

All expected values are worked out by hand from the paper, with the working beside them; none was
taken from the code.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.rows import active, first, occurrences, row, sizes, zeros_of

from sparsetune.methods import METHODS, noise, update
from sparsetune.methods.contract import UpdateSchedule, make_variant
from sparsetune.testing.examples import difference, example, num_active, numbers, run, variants

torch.set_num_threads(1)


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


def test_set_grows_uniformly_over_all_inactive_positions_the_dropped_included() -> None:
    # 4 stays of four positive; 1, 2, 3 (round(.75 * 4) = 3) and four absent make 7 places for 3.
    found = occurrences("set", row(1, 2, 3, 4, 0, 0, 0, 0), first(4, 8), {"zeta": 0.75}, 350)
    assert found[3] == 350
    others = found[:3] + found[4:]
    assert sum(others) == 3 * 350
    # 150 expected at each, deviation sqrt(350 * 3/7 * 4/7) = 9.3.
    assert all(abs(num - 150) < 4 * 9.3 for num in others)


def test_sets_words_and_numbers_are_those_of_the_paper() -> None:
    fields = dataclasses.fields(METHODS["set"].Variant)
    assert {f.name: f.metadata["allowed"] for f in fields} == {
        "prune": ("signwise", "magnitude", "threshold"),  # the first is the default
        "new_value": ("normal", "zero"),
        "decay": ("none", "cosine"),
        "threshold_unit": ("std", "absolute"),
    }
    numbers = dataclasses.fields(METHODS["set"].Hyperparameters)
    assert {f.name: f.default for f in numbers} == {"zeta": 0.3, "max_prune": 0.9, "threshold": 0.3}
    assert METHODS["set"].schedule == UpdateSchedule()


@pytest.mark.parametrize(
    "words", variants(METHODS["set"]), ids=lambda words: "-".join(words.values())
)
def test_set_keeps_each_layers_count_and_reads_weights_alone(words: dict[str, str]) -> None:
    variant = make_variant(METHODS["set"], words)
    assert METHODS["set"].dense_gradient(variant) == "never"
    assert METHODS["set"].needs(variant) == set()
    for density, share in itertools.product((0.001, 0.02, 0.3, 0.97, 1.0), (0.1, 0.85)):
        e = example(0, density)
        masks = run(METHODS["set"], words, e, numbers(METHODS["set"], words, share))[1]
        assert num_active(masks) == num_active(e.masks)


def test_sets_threshold_has_no_unit_where_there_is_no_threshold() -> None:
    e = example(1)
    for prune in ("signwise", "magnitude"):
        std, absolute = (
            run(METHODS["set"], {"prune": prune, "threshold_unit": unit}, e, {"zeta": 0.35})
            for unit in ("std", "absolute")
        )
        assert difference(std, absolute) == ""


@pytest.mark.parametrize("prune", ["signwise", "magnitude", "threshold"])
def test_set_draws_new_values_from_another_stream_than_positions(prune: str) -> None:
    # One draw for both would give the chosen, lowest uniforms a mean of -.13.
    e = example(0, density=0.2, shapes={"a": (200, 200)})
    hp = {"zeta": 1.0, "threshold": 100.0, "max_prune": 1.0}
    params, masks, _, _ = run(METHODS["set"], {"prune": prune}, e, hp)
    new = params["a"][masks["a"] & ~e.masks["a"]].double()
    # 8,000 dropped, .8 of them grow elsewhere; deviations of mean and deviation are
    # .1 / sqrt(6400) = .00125 and .1 / sqrt(12800) = .0009.
    assert len(new) > 6000
    assert abs(float(new.mean())) < 4 * 0.00125
    assert abs(float(new.std()) - 0.1) < 4 * 0.0009
