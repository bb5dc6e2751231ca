"""`check_method` on methods with a mistake in each: what is said names it and how to mend it."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sparsetune.methods import METHODS
from sparsetune.methods.contract import (
    Active,
    Growth,
    Layers,
    Method,
    UpdateSchedule,
    choice,
    hyperparameters,
    number,
)
from sparsetune.methods.ops import count, lowest, snapped
from sparsetune.testing import check_method

torch.set_num_threads(1)


@dataclass(frozen=True)
class Variant:
    order: str = choice("size", "gradient")


@hyperparameters
class Hyperparameters:
    share: float = number(0.3, 0.0, 0.9, "share of each layer dropped")
    weight: float = number(0.5, 0.0, 1.0, "of the gradient")


class State(NamedTuple):
    share: Tensor


Drop = Callable[[Active, Any, Any], Tensor]


def dropped(layer: Active, hp: Any, num: Tensor) -> Tensor:
    weight = hp.weight.to(layer.value.dtype)
    score = layer.value.abs() + weight * layer.gradient.abs()
    return lowest(score, layer.valid, num)


def decide_with(
    drop: Drop = dropped,
    grown: Callable[[Tensor], Tensor] = lambda num: num,
    after: Callable[[Any, Any], Any] = lambda state, hp: State(hp.share.clone()),
) -> Any:
    def decide(
        active: dict[str, Active], shapes: Any, state: Any, hp: Any, progress: Tensor, variant: Any
    ) -> tuple[Layers, Layers, Any]:
        keep, grow = {}, {}
        for name, layer in active.items():
            num = torch.floor(snapped(hp.share * count(layer.valid)))
            keep[name], grow[name] = layer.valid & ~drop(layer, hp, num), grown(num)
        return keep, grow, after(state, hp)

    return decide


RIGHT = Method(
    name="right",
    paper="none",
    begins="sparse",
    Hyperparameters=Hyperparameters,
    needs=lambda variant: frozenset({"gradient"}),
    growth=lambda variant: Growth("random", regrow_dropped=True, new_value="zero"),
    init=lambda values, shapes, targets, hp, noise, variant: (State(hp.share.clone()), {}),
    decide=decide_with(),
    metrics=lambda params, state, hp: {"share": state.share},
    schedule=UpdateSchedule(every=3),
)


def without_cast(layer: Active, hp: Any, num: Tensor) -> Tensor:
    return lowest(layer.value.abs() + hp.weight * layer.gradient.abs(), layer.valid, num)


def compared_without_cast(layer: Active, hp: Any, num: Tensor) -> Tensor:
    return lowest(layer.value.abs(), layer.valid & (layer.gradient.abs() < 9 + hp.weight), num)


def with_item(layer: Active, hp: Any, num: Tensor) -> Tensor:
    return lowest(layer.value.abs() * (1 if num.item() > 3 else 2), layer.valid, num)


def in_place(layer: Active, hp: Any, num: Tensor) -> Tensor:
    return lowest(layer.value.abs_(), layer.valid, num)


def of_all_positions(layer: Active, hp: Any, num: Tensor) -> Tensor:
    size = layer.value.abs()
    return lowest(torch.where(size < size.mean(), size, -size), layer.valid, num)


def by_chance(layer: Active, hp: Any, num: Tensor) -> Tensor:
    return lowest(layer.value.abs() + random.random() * layer.value, layer.valid, num)


def one_more(layer: Active, hp: Any, num: Tensor) -> Tensor:
    return lowest(layer.value.abs(), layer.valid, num + 1)


def all_of_small_layers(layer: Active, hp: Any, num: Tensor) -> Tensor:
    return layer.valid & (count(layer.valid) < 7)


class Listed(NamedTuple):
    shares: Any


COUNTER = [0.0]


def counted(layer: Active, hp: Any, num: Tensor) -> Tensor:
    COUNTER[0] += 1
    return lowest(layer.value.abs() if COUNTER[0] % 7 else -layer.value, layer.valid, num)


def halved(params: Layers, gates: Layers, state: Any, hp: Any, variant: Any) -> Layers:
    return {name: p * hp.weight if name in gates else p for name, p in params.items()}


UNSEEN = {"metrics": METHODS["static"].metrics}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a number without a cast": (
        {"decide": decide_with(without_cast)},
        r"numbers_are_cast: .*\n  a float64 number meets float32 weights in _*r?mul_* "
        r"\(.*test_testing\.py:\d+: .*hp\.weight.*write number\.to\(layer\.value\.dtype\)",
    ),
    "a comparison without a cast": (
        {"decide": decide_with(compared_without_cast)},
        r"numbers_are_cast: .*\n  .*test_testing\.py",
    ),
    "a forward pass without a cast": ({"sparsify": halved}, r"numbers_are_cast: .*\n  .*weight"),
    "an item": (
        {"decide": decide_with(with_item)},
        r"lifted_updates_equal_those_alone: .*\n  RuntimeError at .*test_testing\.py:\d+: "
        r"[^\0]*no \.item\(\), branch on a tensor",
    ),
    "a change in place": (
        {"decide": decide_with(in_place)},
        r"nothing_given_is_changed: .*\n  .*leave out the underscore",
    ),
    "a sum over absent weights": (
        {"decide": decide_with(of_all_positions)},
        r"decisions_have_their_form: .*\n  on all positions with their mask .*layer\.valid",
    ),
    "a random call": (
        {"decide": decide_with(by_chance)},
        r"seed_and_number_alone_decide_what_is_random: .*\n  called again, .*; draw nothing",
    ),
    "a memory outside of the state": (
        {"decide": decide_with(counted)},
        r"\n  (called again|resumed), ",
    ),
    "one dropped and not grown": (
        {"decide": decide_with(one_more)},
        r"the_number_of_weights_is_kept: .*\n  .* grow as many as keep drops",
    ),
    "a layer that empties": (
        {"decide": decide_with(all_of_small_layers, lambda num: 0 * num)},
        r"hard_cases_end_well: .*\n  a layer is empty with .*ops\.keep_one",
    ),
    "counts of int64": (
        {"decide": decide_with(grown=lambda num: num.long())},
        r"grow\['fc1.weight'\] is torch\.int64; count in float64",
    ),
    "counts of halves": (
        {"decide": decide_with(grown=lambda num: num / 2 + 0.25)},
        r"give whole numbers from 0 to the \d+ free",
    ),
    "a gradient that needs does not name": (
        {"needs": lambda variant: frozenset()},
        r"what_is_read_is_named: .*\n  without the gradient .*needs gives set\(\)",
    ),
    "growth by a gradient that is not there": (
        {"growth": lambda variant: Growth("gradient", True, "zero")},
        r"declarations_are_known: .*\n  grows by the gradient of absent weights; dense_gradient",
    ),
    "growth by a word of its own": (
        {"growth": lambda variant: Growth("largest", True, "zero")},
        r"declarations_are_known: .*\n  growth gives .*see Growth",
    ),
    "nothing that grows": (
        {"growth": lambda variant: None},
        r"nothing grows what decide drops; give growth=lambda variant: Growth",
    ),
    "a dictionary as state": (
        {"init": lambda v, s, t, hp, n, w: ({"share": hp.share.clone()}, {}), **UNSEEN},
        r"init_makes_a_state_of_its_own: .*\n  the state is dict; use a NamedTuple",
    ),
    "a list in the state": (
        {"init": lambda v, s, t, hp, n, w: (Listed([hp.share.clone()]), {}), **UNSEEN},
        r"init_makes_a_state_of_its_own: .*\n  shares is a list, no tensor",
    ),
    "a number in the state that is not a copy": (
        {"init": lambda v, s, t, hp, n, w: (State(hp.share), {})},
        r"init_makes_a_state_of_its_own: .*\n  \.share is a tensor that was given; return a copy",
    ),
    "a state that changes its form": (
        {"decide": decide_with(after=lambda state, hp: State(hp.share.float()))},
        r"decisions_have_their_form: .*\n  the state was .*, and after decide ",
    ),
    "metrics of many numbers": (
        {"metrics": lambda params, state, hp: {"shares": state.share.expand(3)}},
        r"lifted_steps_equal_those_alone: .*\n  metrics: shares has shape \[3\]; give a mean",
    ),
    "metrics that are NaN": (
        {"metrics": lambda params, state, hp: {"shares": state.share / (state.share * 0)}},
        r"hard_cases_end_well: .*\n  metrics gives ",
    ),
    "nothing is ever dropped": (
        {"decide": decide_with(lambda layer, hp, num: layer.valid & False, lambda num: 0 * num)},
        r"seed_and_number_.*\n  no update moved a mask with \[",
    ),
}  # fmt: skip


def test_a_right_method_passes() -> None:
    check_method(RIGHT)
    check_method(RIGHT._replace(Variant=Variant))  # a choice that is read nowhere is no fault


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str) -> None:
    changes, message = MISTAKES[mistake]
    with pytest.raises(AssertionError) as raised:
        check_method(RIGHT._replace(**changes))
    said = str(raised.value)
    assert re.search(message, said), said
    assert re.match(r"right breaks \d+ of 14 promises of methods/contract\.py\n\n", said)


def test_all_broken_promises_are_listed_with_their_variants() -> None:
    wrong = RIGHT._replace(
        Variant=Variant, decide=decide_with(one_more), metrics=lambda p, s, hp: {"a": s.share[None]}
    )
    with pytest.raises(AssertionError) as raised:
        check_method(wrong)
    said = str(raised.value)
    assert "the_number_of_weights_is_kept: What begins sparse keeps its number of weights" in said
    assert "lifted_steps_equal_those_alone: " in said
    assert "    variant order: size (and 1 more variants)" in said


def test_what_is_no_method_is_refused_at_once() -> None:
    with pytest.raises(
        AssertionError, match=r"^no method: begins: 'empty'; allowed: sparse, dense"
    ):
        check_method(RIGHT._replace(begins="empty"))


def test_it_needs_torch_and_neither_ray_nor_pytest() -> None:
    code = (
        "import sys; import sparsetune.testing; heavy = ['ray', 'optuna', 'wandb', 'omegaconf', "
        "'pytest']; print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
