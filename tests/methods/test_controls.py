"""The controls change no mask."""

from __future__ import annotations

import dataclasses

import torch

from sparsetune.methods import METHODS
from sparsetune.testing.examples import difference, example, run

torch.set_num_threads(1)


def test_dense_changes_nothing() -> None:
    e = example(17)
    assert (
        difference(run(METHODS["dense"], {}, e, progress=0.5)[:3], tuple(vars(e).values())[:3])
        == ""
    )


def test_static_clears_what_is_absent_whatever_came_in() -> None:
    e = example(17)
    params, masks, momenta, _ = run(METHODS["static"], {}, e, progress=0.5)
    assert difference(masks, e.masks) == ""
    assert difference(params, {k: v * e.masks[k] for k, v in e.params.items()}) == ""
    assert difference(momenta, {k: v * e.masks[k] for k, v in e.momenta.items()}) == ""


def test_controls_have_nothing_to_set() -> None:
    for name in ("static", "dense"):
        method = METHODS[name]
        assert not dataclasses.fields(method.Variant) + dataclasses.fields(method.Hyperparameters)
