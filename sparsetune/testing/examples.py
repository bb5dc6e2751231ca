"""What a method is tried on: examples of layers, all its choices, numbers up to their bounds.

The rule to know: all of it comes from the method itself, so whoever hands a method in has enrolled
it, and nothing here lists what one of them does.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsetune.methods import noise, update
from sparsetune.methods.contract import Active, Layers, Method, make_hyperparameters, make_variant
from sparsetune.methods.distribution import counts
from sparsetune.methods.update import activate, update_keys

Words = dict[str, str]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = {"fc1.weight": (12, 10), "conv.weight": (4, 3, 3, 3), "fc2.weight": (5, 12)}
# Of four trials that are lifted together: density, progress, and where their numbers lie.
SLOTS = ((0.05, 0.0, 0.1), (0.3, 0.3, 0.35), (0.6, 0.75, 0.6), (0.95, 1.0, 0.85))


@dataclasses.dataclass
class Example:
    """What an update is given, by layer."""

    params: Layers
    masks: Layers
    momenta: Layers
    grads: Layers


def example(
    seed: int = 0,
    density: float | tuple[float, ...] = 0.3,
    dtype: torch.dtype = torch.float32,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
) -> Example:
    """Normal weights at `density` (of each layer), at least one in a layer, and something at
    absent positions."""
    densities = density if isinstance(density, tuple) else (density,) * len(shapes)
    drawn: list[Layers] = [{} for _ in range(4)]
    for number, (name, shape) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(seed + 1000 * number)
        order = torch.rand(math.prod(shape), generator=generator).argsort()
        drawn[1][name] = (order < max(1, round(densities[number] * len(order)))).view(shape)
        for which in (0, 2, 3):
            drawn[which][name] = torch.randn(shape, generator=generator).to(dtype)
    return Example(*drawn)


def _filled(value: float, *fields: str, every: int = 1) -> Example:
    """With one value in all tensors of these fields, or in each so many-th place."""
    made = example(9)
    for tensor in (t for field in fields for t in getattr(made, field).values()):
        tensor.view(-1)[::every] = value
    return made


ALL = ("params", "momenta", "grads")
BIG = {"a": (40, 50), "b": (6, 5, 3, 3), "c": (3, 4)}
FINITE: dict[str, Callable[[], Example]] = {
    "2, 1 and 1 weights in large layers": lambda: example(4, 0.001, shapes=BIG),
    "one weight in each layer": lambda: example(5, 0.0),
    "full layers": lambda: example(7, 1.0),
    "a full layer and one of a single weight": lambda: example(8, (0.3, 0.0, 1.0)),
    "one absent position in each layer": lambda: example(7, (119 / 120, 107 / 108, 59 / 60)),
    "momenta and gradients of zero": lambda: _filled(0.0, "momenta", "grads"),
    "weights of zero": lambda: _filled(0.0, "params"),
    "equal weights, momenta and gradients": lambda: _filled(0.25, *ALL),
    "a network of one weight": lambda: example(12, 1.0, shapes={"a": (1, 1)}),
}
DIVERGED: dict[str, Callable[[], Example]] = {
    "NaN in some weights": lambda: _filled(math.nan, "params", every=3),
    "NaN everywhere": lambda: _filled(math.nan, *ALL),
    "infinite weights, momenta and gradients": lambda: _filled(math.inf, *ALL, every=4),
    "weights of minus infinity": lambda: _filled(-math.inf, "params", every=3),
}


def variants(method: Method) -> list[Words]:
    """All combinations of the method's choices, the defaults first."""
    fields = {f.name: f.metadata["allowed"] for f in dataclasses.fields(method.Variant)}
    return [dict(zip(fields, words, strict=True)) for words in itertools.product(*fields.values())]


def numbers(method: Method, words: Words, share: float) -> dict[str, float]:
    """Hyperparameters at this share of their range, or of 1 where that is less."""
    spans = {f.name: f.metadata for f in dataclasses.fields(method.Hyperparameters)}
    hp = {n: s["low"] + share * min(s["high"] - s["low"], 1) for n, s in spans.items()}
    return _within(method, words, hp)


def extremes(method: Method, words: Words) -> list[dict[str, float]]:
    """Hyperparameters at their bounds: the lower ones, the upper ones, and by turns."""
    fields = dataclasses.fields(method.Hyperparameters)
    turns = [("low", "low"), ("high", "high"), ("low", "high"), ("high", "low")]
    made = [{f.name: f.metadata[turn[k % 2]] for k, f in enumerate(fields)} for turn in turns]
    return [_within(method, words, hp) for k, hp in enumerate(made) if hp not in made[:k]]


def _within(method: Method, words: Words, hp: dict[str, float]) -> dict[str, float]:
    most = method.at_most(make_variant(method, words))
    return {name: min(value, most.get(name, value)) for name, value in hp.items()}


def run(
    method: Method,
    words: Words,
    given: Example,
    hp: dict[str, float] | None = None,
    state: Any = None,
    **more: Any,
) -> tuple[Layers, Layers, Layers, Any]:
    """`update` of the example: (params, masks, momenta, state). A method that prunes to a density
    is told one of .2, or of one weight in each layer."""
    if method.closes:
        size = sum(mask.numel() for mask in given.masks.values())
        hp = {"density": max(0.2, len(given.masks) / size)} | (hp or {})
    params, masks, momenta, after = update(
        method, given.params, given.masks, given.momenta, given.grads,
        state=state, variant=words, hp=hp, **more,
    )  # fmt: skip
    assert momenta is not None
    return params, masks, momenta, after


def num_active(masks: Layers) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def difference(got: Any, expected: Any, rtol: float = 1e-12) -> str:
    """How two trees of tensors differ, in a few words; "" where they do not. `rtol` is that of
    float64, the others are to be equal."""
    if pytree.tree_structure(got) != pytree.tree_structure(expected):
        return f"{pytree.tree_structure(got)} instead of {pytree.tree_structure(expected)}"
    leaves = pytree.tree_flatten_with_path(got)[0]
    for (path, leaf), other in zip(leaves, pytree.tree_leaves(expected), strict=True):
        if not isinstance(leaf, Tensor):
            continue
        shown = [f"{t.dtype} {list(t.shape)}" for t in (leaf, other)]
        if shown[0] == shown[1]:
            exact = leaf.dtype != torch.float64
            leaf, other = leaf.double(), other.double()
            if torch.allclose(leaf, other, 0 if exact else rtol, 0, equal_nan=True):
                continue
            at = int((leaf - other).abs().argmax())
            shown = [f"{t.flatten()[at]:.9g}" for t in (leaf, other)]
        return f"{pytree.keystr(path)} is {shown[0]} instead of {shown[1]}"
    return ""


class Hooks:
    """A method's functions as a backend calls them, on one of four examples."""

    def __init__(self, method: Method, words: Words, slot: int, dtype: torch.dtype) -> None:
        density, progress, share = SLOTS[slot]
        self.method, self.variant = method, make_variant(method, words)
        self.numbers, self.slot = numbers(method, words, share), slot
        self.given = example(slot, density, dtype)
        self.shapes = {name: mask.shape for name, mask in self.given.masks.items()}
        goal = num_active(self.given.masks)
        if method.closes:
            goal = counts(self.shapes, round(share * 288), "uniform")
        self.targets = {n: torch.tensor(num, dtype=torch.float64) for n, num in goal.items()}
        self.init_keys = {n: torch.tensor(noise.key(slot, "init", 0, n)) for n in goal}
        self.keys = update_keys(self.given.masks, seed=100 + slot, number=slot)
        # What has no field is nothing that vmap takes apart.
        self.hp: Any = self.numbers and make_hyperparameters(method, self.numbers, self.variant)
        self.progress = torch.tensor(progress, dtype=torch.float64)
        self.state, extra = self.begin(
            self.given.params, self.given.masks, self.targets, self.hp, self.init_keys
        )
        self.given.params = self.given.params | extra

    def begin(self, params: Layers, masks: Layers, targets: Layers, hp: Any, keys: Layers) -> Any:
        """`init` on dense tensors."""
        zeros = {name: torch.zeros_like(params[name]) for name in masks}

        def drawn(layer: str, num: int) -> Tensor:
            return noise.uniform(keys[layer], torch.arange(num))

        values = activate(params, masks, zeros, zeros)
        return self.method.init(values, self.shapes, targets, hp, drawn, self.variant)

    def active(self) -> tuple[dict[str, Active], dict[str, Active]]:
        """What `decide` sees on dense tensors, and on active weights alone."""
        given = self.given
        dense = activate(given.params, given.masks, given.momenta, given.grads)
        return dense, {n: Active(*(t[a.valid] for t in a)) for n, a in dense.items()}

    def decide(self, active: dict[str, Active]) -> tuple[Layers, Layers, Any]:
        assert self.method.decide is not None
        args = (active, self.shapes, self.state, self.hp, self.progress, self.variant)
        return self.method.decide(*args)

    def step(self, params: Layers, masks: Layers, grads: Layers, state: Any, hp: Any) -> Any:
        """All that happens beside updates."""
        method, variant = self.method, self.variant
        masks = masks if method.masks_of is None else method.masks_of(params)
        gates = {name: mask.to(params[name].dtype) for name, mask in masks.items()}
        done: list[Any] = [masks, method.sparsify(params, gates, state, hp, variant)]
        if method.pull_back is not None:
            grads = {name: grad.clone() for name, grad in grads.items()}
            done.append(method.pull_back(grads, params, gates, hp, variant))
        if method.after_step is not None:
            done.append(method.after_step(params, state, hp, variant))
        return [*done, method.metrics(params, state, hp)]

    def tensors(self) -> tuple[Any, ...]:
        """What `step` is given."""
        return self.given.params, self.given.masks, self.given.grads, self.state, self.hp


def hooks(
    method: Method,
    words: Words,
    dtype: torch.dtype = torch.float32,
    slots: Iterable[int] = range(len(SLOTS)),
) -> list[Hooks]:
    return [Hooks(method, words, slot, dtype) for slot in slots]
