"""SM's rule and variants on networks small enough to check by eye.

All expected values are worked out by hand from the paper, with the working beside them; none was
taken from the code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.rows import Layers, active, counting, first, padded, row, sizes

from sparsetune.methods import METHODS, update
from sparsetune.methods.contract import UpdateSchedule, make_variant
from sparsetune.testing.examples import SHAPES, Example, example, num_active, run, variants

torch.set_num_threads(1)


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


def test_sms_words_and_numbers_are_those_of_the_paper() -> None:
    fields = dataclasses.fields(METHODS["sm"].Variant)
    assert {f.name: f.metadata["allowed"] for f in fields} == {
        "growth": ("momentum", "gradient", "random"),  # the first is the default
        "redistribution": ("momentum", "magnitude", "nonzero", "none"),
        "regrown": ("keep", "zero"),
        "decay": ("cosine", "linear", "none"),
    }
    numbers = dataclasses.fields(METHODS["sm"].Hyperparameters)
    assert {f.name: f.default for f in numbers} == {"prune_fraction": 0.5}
    assert METHODS["sm"].schedule == UpdateSchedule()


@pytest.mark.parametrize(
    ("growth", "redistribution", "needs", "dense"),
    [
        ("momentum", "momentum", {"momentum"}, "always"),
        ("momentum", "none", {"momentum"}, "always"),
        ("gradient", "momentum", {"gradient", "momentum"}, "at_update"),
        ("gradient", "nonzero", {"gradient"}, "at_update"),
        ("random", "momentum", {"momentum"}, "never"),
        ("random", "magnitude", set(), "never"),
    ],
)
def test_what_sm_reads(growth: str, redistribution: str, needs: set[str], dense: str) -> None:
    words = {"growth": growth, "redistribution": redistribution}
    variant = make_variant(METHODS["sm"], words)
    assert METHODS["sm"].needs(variant) == needs
    assert METHODS["sm"].dense_gradient(variant) == dense
    if dense == "always":
        e = example(1)
        assert torch.equal(run(METHODS["sm"], words, e)[2]["fc1.weight"], e.momenta["fc1.weight"])


def after_training(
    given: Example, params: Layers, masks: Layers, momenta: Layers, seed: int
) -> Example:
    """The next example: grown weights have moved off zero, momenta and gradients are others."""
    other = example(seed)
    return Example(
        {n: torch.where(masks[n], params[n] + 0.1 * other.params[n], 0.0) for n in given.params},
        masks,
        {n: momenta[n] + other.momenta[n] for n in momenta},
        other.grads,
    )


@pytest.mark.parametrize(
    "words", variants(METHODS["sm"])[::3], ids=lambda words: "-".join(words.values())
)
def test_sm_stays_within_the_number_of_layers_and_the_carried_correction(
    words: dict[str, str],
) -> None:
    for density in (0.02, 0.3):
        e, state, carried = example(3, density), None, 0.0
        baseline = sum(num_active(e.masks).values())
        for number in range(5):
            params, masks, momenta, state = run(
                METHODS["sm"], words, e, {"prune_fraction": 0.4}, state,
                progress=number / 10, number=number,
            )  # fmt: skip
            missed = sum(num_active(masks).values()) - baseline
            assert abs(missed) <= len(SHAPES) + abs(carried), (density, number)
            if words["redistribution"] == "none":
                assert missed == 0  # each layer regrows what it lost
                assert num_active(masks) == num_active(e.masks)
            carried = float(state.correction)
            e = after_training(e, params, masks, momenta, seed=10 + number)
