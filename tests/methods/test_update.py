"""`update`, one update to look at: what it takes and refuses, and the streams of its randomness."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from sparsetune.methods import METHODS, update
from sparsetune.methods.contract import make_variant
from sparsetune.methods.update import Keys, update_keys
from sparsetune.testing.examples import SHAPES, Example, example, numbers, run, variants

torch.set_num_threads(1)

CASES = [
    pytest.param(name, words, id="-".join([name, *words.values()]))
    for name, method in METHODS.items()
    for words in variants(method)
    if words.get("decay", "none") == "none"  # a decay is one factor of the rate
]


@pytest.mark.parametrize(("name", "words"), CASES)
def test_a_rule_asks_for_the_momenta_and_gradients_that_it_reads(
    name: str, words: dict[str, str]
) -> None:
    method, e = METHODS[name], example()
    needs = method.needs(make_variant(method, words))
    for argument, what in (("momenta", "momentum"), ("grads", "gradient")):
        given: dict[str, Any] = {"momenta": e.momenta, "grads": e.grads}
        del given[argument]
        if what in needs:
            with pytest.raises(ValueError, match=argument):
                update(method, e.params, e.masks, variant=words, **given)
        else:
            out = update(method, e.params, e.masks, variant=words, **given)
            assert out[1].keys() == e.masks.keys()
            assert (out[2] is None) == (argument == "momenta")


@pytest.mark.parametrize(("name", "words"), CASES)
def test_masks_of_zeros_and_ones_and_parameters_are_taken(name: str, words: dict[str, str]) -> None:
    method, e = METHODS[name], example(1)
    hp = numbers(method, words, 0.35)
    expected = run(method, words, e, hp)
    other = Example(
        {n: torch.nn.Parameter(p) for n, p in e.params.items()},
        {n: m.to(torch.float32) for n, m in e.masks.items()},
        {n: m.clone().requires_grad_() for n, m in e.momenta.items()},
        e.grads,
    )
    params, masks, momenta, state = run(method, words, other, hp)
    assert all(mask.dtype == torch.bool for mask in masks.values())
    for mine, theirs in ((params, expected[0]), (masks, expected[1])):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[n], theirs[n]) for n in theirs)
    # And no graph is left behind.
    assert all(t.grad_fn is None for t in pytree.tree_leaves((params, momenta, state)))
    assert not any(t.requires_grad for t in pytree.tree_leaves(state))


@pytest.mark.parametrize(("name", "words"), CASES)
def test_what_is_no_sparse_layer_is_handed_through(name: str, words: dict[str, str]) -> None:
    e = example(1)
    bias, buffer = torch.ones(3), torch.full((3,), 2.0)
    e.params["bias"], e.momenta["bias"], e.grads["bias"] = bias, buffer, torch.ones(3)
    params, masks, momenta, _ = run(METHODS[name], words, e)
    assert masks.keys() == SHAPES.keys()
    assert torch.equal(params["bias"], torch.ones(3))
    assert torch.equal(momenta["bias"], torch.full((3,), 2.0))


def test_tensors_that_do_not_fit_are_named() -> None:
    w, two = torch.ones(2, 3), {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}
    for argument in ("momenta", "grads"):
        given = {"momenta": two, "grads": two, argument: {"a": w}}
        method, words = METHODS["sm"], {"growth": "gradient", "redistribution": "momentum"}
        with pytest.raises(ValueError, match=rf"^{argument}: .* with b$"):
            update(method, two, two, variant=words, **given)
        given[argument] = {"a": w, "b": torch.ones(6)}
        with pytest.raises(
            ValueError, match=rf"^{argument}: 'b' has shape \[6\] and its .* \[2, 3\]"
        ):
            update(method, two, two, variant=words, **given)
    with pytest.raises(ValueError, match=r"^masks: 'c' is none of params, which has a, b"):
        update(METHODS["set"], two, {"c": w})
    with pytest.raises(ValueError, match=r"^masks: 'a' has shape"):
        update(METHODS["set"], two, {"a": torch.ones(3, 2)})


@pytest.mark.parametrize("name", ["set", "dsr", "sm", "rigl"])
def test_a_layer_without_a_weight_gives_no_nan(name: str) -> None:
    """No update empties a layer, but a user may hand one in."""
    w, mask = torch.ones(2, 3), torch.zeros(2, 3)
    out = update(METHODS[name], {"w": w}, {"w": mask}, {"w": w}, {"w": w})
    assert bool(torch.stack([t.isfinite().all() for t in out[3]]).all()), out[3]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("dense", "dst")])
def test_absent_weights_are_zero_whatever_came_in(name: str, bad: float) -> None:
    w = torch.tensor([[1.0, bad, -1.0, 0.5, bad, bad, 2.0, 3.0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1]]).bool()
    zeros = {"w": torch.zeros_like(w)}
    hp = {"density": 0.25} if name == "gmp" else {}
    params, masks, _, _ = update(
        METHODS[name], {"w": w}, {"w": mask}, zeros, zeros, hp=hp, progress=1.0
    )
    assert bool((params["w"][~masks["w"]] == 0).all())


def test_keys_name_the_layer_the_purpose_the_number_and_the_seed() -> None:
    masks = {"a": torch.ones(2, dtype=torch.bool), "b": torch.ones(2, dtype=torch.bool)}
    drawn: list[Keys] = []
    for seed, number in itertools.product((0, 1), (0, 1)):
        drawn += update_keys(masks, seed, number).values()
    every = [int(key) for keys in drawn for key in keys]
    assert len(set(every)) == len(every) == 16
