"""RigL's rule and variants on networks small enough to check by eye.

All expected values are worked out by hand from the paper, with the working beside them; none was
taken from the code.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.rows import active, counting, first, row

from sparsetune.methods import METHODS, update
from sparsetune.methods.contract import UpdateSchedule
from sparsetune.testing.examples import example, num_active, run

torch.set_num_threads(1)


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


def test_rigls_numbers_are_those_of_the_paper() -> None:
    method = METHODS["rigl"]
    assert {f.name: f.default for f in dataclasses.fields(method.Hyperparameters)} == {
        "prune_fraction": 0.3
    }
    assert method.schedule == UpdateSchedule(100, 0.0, 0.75)
    assert method.dense_gradient(method.Variant()) == "at_update"
    assert method.needs(method.Variant()) == {"gradient"}


@pytest.mark.parametrize("density", [0.001, 0.02, 0.3, 0.97, 1.0])
def test_rigl_keeps_each_layers_count(density: float) -> None:
    e = example(0, density)
    for fraction in (0.15, 0.9, 1.0):
        masks = run(METHODS["rigl"], {}, e, {"prune_fraction": fraction})[1]
        assert num_active(masks) == num_active(e.masks)
