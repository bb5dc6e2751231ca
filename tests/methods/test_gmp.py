"""GMP's rule and variants on networks small enough to check by eye.

All expected values are worked out by hand from the paper, with the working beside them; none was
taken from the code.
"""

from __future__ import annotations

import pytest
import torch
from helpers.rows import active, counting, first, sizes

from sparsetune.methods import METHODS, update
from sparsetune.testing.examples import example, num_active, run

torch.set_num_threads(1)


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


@pytest.mark.parametrize("density", [0.011, 0.1, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("begin", [0.0, 0.5])
def test_gmp_ends_at_its_exact_target(density: float, begin: float) -> None:
    # Uniform: within one of density * size, 288 * density in all (.011: 3.168, one in each layer).
    e = example(0, density=1.0)
    masks = run(METHODS["gmp"], {}, e, {"density": density, "begin": begin}, progress=1.0)[1]
    found = num_active(masks)
    assert sum(found.values()) == round(288 * density)
    sizes = {name: mask.numel() for name, mask in e.masks.items()}  # 120, 108, 60
    assert all(abs(num - density * sizes[n]) < 1 or num == 1 for n, num in found.items())


def test_gmp_alone_closes() -> None:
    assert METHODS["gmp"].schedule.every == 100
    assert [name for name, method in METHODS.items() if method.closes] == ["gmp"]
