"""The promises of `methods/contract.py`, over all methods and their variants, and its own parts.

A method joins by being in METHODS: what is tried comes from the method itself.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch

from sparsetune.methods import METHODS, update
from sparsetune.methods.contract import (
    UpdateSchedule,
    choice,
    faults,
    hyperparameters,
    make_hyperparameters,
    make_variant,
    number,
)
from sparsetune.testing import CHECKS, Check, broken_promise
from sparsetune.testing.examples import example

torch.set_num_threads(1)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_keeps_its_promises(name: str, check: Check) -> None:
    broken = broken_promise(METHODS[name], check)
    assert not broken, broken


# Choices and numbers ------------------------------------------------------------------------------


def test_methods_are_called_by_their_names_and_have_no_faults() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert faults(method) == []
        numbers = make_hyperparameters(method, {}, make_variant(method, {}))
        assert all(t.dtype == torch.float64 and t.shape == () for t in vars(numbers).values())


@pytest.mark.parametrize(
    ("name", "variant", "hp", "message"),
    [
        ("set", {"prunes": "magnitude"}, {}, r"variant\.prunes: .*did you mean 'prune'"),
        ("set", {"prune": "size"}, {}, r"variant\.prune: 'size' .*signwise, magnitude, threshold"),
        ("dst", {"guard": 3}, {}, r"variant\.guard"),
        ("static", {"prune": "magnitude"}, {}, r"'static' has no 'prune'"),
        ("set", {}, {"zetta": 0.3}, r"hp\.zetta: .*did you mean 'zeta'"),
        ("set", {}, {"zeta": 1.5}, r"hp\.zeta: 1\.5 .*0 to 1"),
        ("sm", {}, {"prune_fraction": -0.1}, r"hp\.prune_fraction"),
        ("sm", {}, {"prune_fraction": math.nan}, r"hp\.prune_fraction"),
        ("sm", {}, {"prune_fraction": "half"}, r"hp\.prune_fraction: 'half' is no number"),
        ("sm", {}, {"prune_fraction": True}, r"hp\.prune_fraction"),
    ],
)
def test_what_a_method_does_not_have_is_refused(
    name: str, variant: dict[str, Any], hp: dict[str, Any], message: str
) -> None:
    e = example()
    with pytest.raises(ValueError, match=message):
        update(METHODS[name], e.params, e.masks, e.momenta, e.grads, variant=variant, hp=hp)


def test_yaml_reads_the_guards_words_as_booleans() -> None:
    assert make_variant(METHODS["dst"], {"guard": False}).guard == "off"
    assert make_variant(METHODS["dst"], {"guard": True}).guard == "on"


@dataclasses.dataclass(frozen=True)
class Plain:
    zeta: float = 0.3


@dataclasses.dataclass(frozen=True)
class Unregistered:
    zeta: float = number(0.3, 0.0, 1.0, "share")


@hyperparameters
class Outside:
    zeta: float = number(2.0, 0.0, 1.0, "share")


class NoDataclass:
    prune: str = choice("magnitude")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "my method"}, r"name: 'my method'; use letters"),
        ({"paper": None}, r"paper: None"),
        ({"begins": "empty"}, r"begins: 'empty'; allowed: sparse, dense"),
        ({"decide": "largest"}, r"decide: 'largest'; give a function"),
        ({"needs": frozenset()}, r"needs: frozenset\(\); give a function"),
        ({"sparsify": None}, r"sparsify: None; give a function"),
        ({"schedule": 100}, r"schedule: 100; give an UpdateSchedule"),
        ({"Variant": NoDataclass}, r"Variant: .*NoDataclass.*@dataclass"),
        ({"Variant": Plain}, r"Variant\.zeta: is no choice; write zeta: str = choice"),
        ({"Hyperparameters": Plain}, r"Hyperparameters\.zeta: write zeta: float = number\("),
        ({"Hyperparameters": Outside}, r"Hyperparameters\.zeta: .*the default from low to high"),
        ({"Hyperparameters": Unregistered}, r"Hyperparameters: vmap .*@hyperparameters"),
    ],
)
def test_a_field_that_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    [said] = faults(METHODS["rigl"]._replace(**changes))
    assert re.match(message, said), said


def test_what_is_no_method_is_told_what_it_lacks() -> None:
    assert faults(METHODS["set"].decide)[0].startswith("it is a function without name, paper, beg")
    assert faults(METHODS)[0].startswith("it is a dict without name")


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
