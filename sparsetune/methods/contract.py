"""What a method is: decisions as pure functions over the active weights of one model.

The rule to know: a method says what to drop and how many to grow in each layer; growing belongs
to the backend (`update.py` for dense tensors). So one text of a rule runs on dense tensors, under
`torch.vmap` for many trials, and on the values of a truly sparse layer. Inside these functions
there is no `.item()`, no branch on a tensor, no boolean indexing and no random call.

What costs an author time, once and for all hooks (`sparsetune.testing.check_method` finds each):

- `hp`, `progress` and counts are float64 tensors of no dimension. Before a number meets weights
  it is cast, `hp.x.to(layer.value.dtype)`: alone PyTorch computes in the weights' dtype without
  it, and in another one where many trials are lifted.
- Nothing that is passed in may be changed, or handed on as part of a state: `hp.x.clone()`.
- A branch may ask `variant`, which is words; whatever is a tensor takes `torch.where`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # of a method: it is part of files' names
Layers = dict[str, Tensor]  # one tensor for each sparse layer, in the order of the network
Shapes = dict[str, torch.Size]
Noise = Callable[[str, int], Tensor]  # (layer, how many) -> uniform float64 in [0, 1)


class Active(NamedTuple):
    """One layer, flat: its active weights, or all N positions of it with `valid` as the mask.

    Both must come to the same, so whatever is summed or ranked is restricted to `valid` first, and
    a layer's size is that of its shape. `momentum` is the SGD buffer, or m / (sqrt(v) + eps) under
    AdamW; `gradient` is that of the last batch's loss, without weight decay. A hook may read them
    where `Method.needs` names them, and at valid positions only, whatever `dense_gradient` says:
    that of absent weights is for growth, by the backend.
    """

    value: Tensor
    momentum: Tensor
    gradient: Tensor
    valid: Tensor


class Growth(NamedTuple):
    """How a backend grows: the absent positions with the largest score."""

    score: str  # random | gradient | momentum
    regrow_dropped: bool  # False: positions dropped in this update come last
    new_value: str  # zero | normal | keep (a dropped and regrown weight keeps its value)


def _steps(share: float, num_steps: int) -> int:
    """Whole steps in a share of all; 0.57 of 100 is 57, though 0.57 * 100 is a little less."""
    return math.floor((share + 1e-9) * num_steps)


def _steps_before(share: float, num_steps: int) -> int:
    """Steps that lie before a share of all; 0.07 of 100 has 6, though 0.07 * 100 is above 7."""
    return math.ceil((share - 1e-9) * num_steps) - 1


@dataclass(frozen=True)
class UpdateSchedule:
    """When the topology is updated. Shares are of all steps of the training.

    After the last step nothing is updated, except by a method that closes (`Method.closes`):
    such a method always updates at `stop`, so that it ends at its density.
    """

    every: str | int = "epoch"
    first: float = 0.0
    stop: float = 1.0
    doublings: tuple[float, ...] = ()

    def last(self, num_steps: int) -> int:
        """The step at `stop`, at least 1."""
        return max(1, _steps(self.stop, num_steps))

    def interval(self, step: int, num_steps: int, steps_per_epoch: int) -> int:
        """Steps between updates at `step`."""
        every = steps_per_epoch if self.every == "epoch" else int(self.every)
        return every << sum(step > _steps_before(share, num_steps) for share in self.doublings)

    def is_due(self, step: int, num_steps: int, steps_per_epoch: int, closes: bool = False) -> bool:
        """Is the topology updated after optimizer step `step` (1 .. num_steps)?"""
        if closes and step == self.last(num_steps):
            return True
        if step <= _steps_before(self.first, num_steps) or step > _steps(self.stop, num_steps):
            return False
        if step == num_steps:
            return False
        return step % self.interval(step, num_steps, steps_per_epoch) == 0

    def progress(self, step: int, num_steps: int) -> float:
        """Share done of the time in which the topology changes: 0 at the start, 1 at `stop`."""
        return min(1.0, step / self.last(num_steps))


class Init(Protocol):
    """What a trial begins with: (state, extra parameters by name, {} for none).

    The state is () or a NamedTuple whose fields are tensors of fixed shape and dtype, [] or [L]
    where it remembers numbers: checkpoints hold its fields, and lifting stacks them.
    """

    def __call__(
        self,
        values: dict[str, Active],  # momenta and gradients are zero
        shapes: Shapes,
        targets: Layers,  # {layer: the count of active weights that the density asks for}
        hp: Any,
        noise: Noise,
        variant: Any,
        /,
    ) -> tuple[Any, Layers]: ...


class Decide(Protocol):
    """One topology update: (keep {layer: bool, as `value` is}, grow {layer: count}, state).

    Counts are whole float64 numbers of no dimension, at most what is absent once the others are
    dropped (more are not grown). What is returned as the state has the form of `init`'s.
    `progress` is 0 at the start of training and 1 at the schedule's `stop`, not at the end.
    """

    def __call__(
        self,
        active: dict[str, Active],
        shapes: Shapes,
        state: Any,
        hp: Any,
        progress: Tensor,
        variant: Any,
        /,
    ) -> tuple[Layers, Layers, Any]: ...


class Sparsify(Protocol):
    """The params of the forward pass. Gates are the masks as 0 and 1 of the params' dtype."""

    def __call__(
        self, params: Layers, gates: Layers, state: Any, hp: Any, variant: Any, /
    ) -> Layers: ...


class PullBack(Protocol):
    """Gradients of all that is trained, from those of the loss at the params of the forward pass
    (`grads`, which may be used up); terms that the method adds to the loss included.

    In closed form, because autograd takes twice as long over it, and an autograd.Function cannot be
    compiled under vmap. `gates` belong to `params`.
    """

    def __call__(
        self, grads: Layers, params: Layers, gates: Layers, hp: Any, variant: Any, /
    ) -> Layers: ...


class AfterStep(Protocol):
    """After each optimizer step: (changed params, gates, where{param: bool} the backend resets the
    optimizer's moments, whichever the optimizer has)."""

    def __call__(
        self, params: Layers, state: Any, hp: Any, variant: Any, /
    ) -> tuple[Layers, Layers, Layers]: ...


class Scalars(Protocol):
    """{name: 0-d tensor}, in the log as `method/<name>`: the rate that the last update had, the
    share it dropped. They come from the state, so what is worth seeing belongs into it."""

    def __call__(self, params: Layers, state: Any, hp: Any, /) -> Layers: ...


@dataclass(frozen=True)
class NoChoices:
    """The variant of a method that has none."""


class Method(NamedTuple):
    """A sparse training method. Only the first three fields have no default."""

    name: str
    paper: str
    begins: str
    """sparse | dense. What begins dense has all masks true at the start, and its density emerges
    (dense, DST) or is reached by `closes` (GMP)."""

    Variant: type = NoChoices
    """Frozen dataclass of `choice` fields: equal for all slots of a pool."""

    Hyperparameters: type = NoChoices
    """Frozen dataclass of `number` fields: one value per trial, float64 0-d tensors inside."""

    at_most: Callable[[Any], dict[str, float]] = lambda variant: {}
    """variant -> upper bounds of hyperparameters that hold for it alone."""

    dense_gradient: Callable[[Any], str] = lambda variant: "never"
    """variant -> never | at_update | always: when gradients of absent weights are needed. Unless
    always, the momenta of absent weights are zero in every backend."""

    needs: Callable[[Any], frozenset[str]] = lambda variant: frozenset()
    """variant -> which of {"momentum", "gradient"} `decide` and `growth` read."""

    growth: Callable[[Any], Growth | None] = lambda variant: None
    """variant -> where a backend grows what `decide` counts; None: a method that only drops."""

    keeps_count: Callable[[Any], bool] = lambda variant: True
    """variant -> does an update grow exactly as many weights as it drops, over all layers? False:
    about as many (SM). Of methods that begin sparse."""

    init: Init = lambda *_: ((), {})
    decide: Decide | None = None
    sparsify: Sparsify = lambda params, gates, state, hp, variant: params
    pull_back: PullBack | None = None  # None: the gradients as they are
    after_step: AfterStep | None = None

    masks_of: Callable[[Layers], Layers] | None = None
    """params -> masks (bool), for methods with `after_step`: what their gates say."""

    metrics: Scalars = lambda params, state, hp: {}

    decays: Callable[[str, Any], bool] = lambda name, variant: True
    """(parameter name, variant) -> does weight decay apply to it?"""

    schedule: UpdateSchedule = UpdateSchedule()
    emergent: bool = False
    """Density is a result of training: compared at the density reached, never stopped early."""

    @property
    def closes(self) -> bool:
        """Ends at a density it did not begin with, so it must update at the schedule's stop."""
        return self.begins == "dense" and self.decide is not None

    @property
    def reaches_density(self) -> bool:
        """Does the trial's density fix the number of weights at the end?"""
        return self.begins == "sparse" or self.closes


def faults(method: Any) -> list[str]:
    """What is wrong with the fields of a method, each with what to write; [] where nothing is."""
    if not isinstance(method, Method):
        lacks = [name for name in ("name", "paper", "begins") if not hasattr(method, name)]
        what = " without ".join([type(method).__name__, *([", ".join(lacks)] if lacks else [])])
        return [f'it is a {what}; write METHOD = Method(name="...", paper="...", begins="sparse")']
    wrong = []
    if not isinstance(method.name, str) or not NAME.fullmatch(method.name):
        wrong.append(f"name: {method.name!r}; use letters, digits, '.', '_' and '-'")
    if not isinstance(method.paper, str):
        wrong.append(f"paper: {method.paper!r}; give one line of text")
    if method.begins not in ("sparse", "dense"):
        wrong.append(f"begins: {method.begins!r}; allowed: sparse, dense")
    if not isinstance(method.schedule, UpdateSchedule):
        wrong.append(f"schedule: {method.schedule!r}; give an UpdateSchedule(...)")
    for name, default in Method._field_defaults.items():
        hook = getattr(method, name)
        is_hook = default is None or (callable(default) and not isinstance(default, type))
        if is_hook and not callable(hook) and hook is not default:
            wrong.append(f"{name}: {hook!r}; give a function")
    return wrong + _wrong_settings(method.Variant, method.Hyperparameters)


def _wrong_settings(variant: Any, numbers: Any) -> list[str]:
    for name, cls in (("Variant", variant), ("Hyperparameters", numbers)):
        if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
            above = "@dataclass(frozen=True)" if name == "Variant" else "@hyperparameters"
            return [f"{name}: {cls!r}; give a class with {above} above it"]
    wrong = [
        f"Variant.{field.name}: is no choice; write {field.name}: str = choice(...)"
        for field in dataclasses.fields(variant)
        if "allowed" not in field.metadata
    ]
    wrong += [
        f"Hyperparameters.{field.name}: write {field.name}: float = number(default, low, high, "
        "meaning), the default from low to high"
        for field in dataclasses.fields(numbers)
        if "low" not in field.metadata
        or not field.metadata["low"] <= field.default <= field.metadata["high"]
    ]
    if not wrong and numbers is not NoChoices and numbers not in pytree.SUPPORTED_NODES:
        wrong.append("Hyperparameters: vmap cannot take it apart; write @hyperparameters above it")
    return wrong


def choice(*allowed: str) -> Any:
    """A field of a Variant: one of these words, the first is the default."""
    return dataclasses.field(default=allowed[0], metadata={"allowed": allowed})


def number(default: float, low: float, high: float, meaning: str) -> Any:
    """A field of Hyperparameters: a number from `low` to `high`, both included."""
    return dataclasses.field(
        default=default, metadata={"low": low, "high": high, "meaning": meaning}
    )


Class = TypeVar("Class")


def hyperparameters(cls: type[Class]) -> type[Class]:
    """Frozen dataclass that `torch.vmap` takes apart, so that one call serves many settings."""
    frozen: type[Class] = dataclass(frozen=True)(cls)
    torch.export.register_dataclass(frozen)
    return frozen


def _field(method: Method, kind: str, name: str) -> dataclasses.Field[Any]:
    cls = method.Variant if kind == "variant" else method.Hyperparameters
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if name not in fields:
        close = get_close_matches(name, fields, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ValueError(
            f"{kind}.{name}: method '{method.name}' has no '{name}'; {hint}"
            f"it has: {', '.join(fields) or 'none'}"
        )
    return fields[name]


def make_variant(method: Method, given: Mapping[str, Any]) -> Any:
    """The method's Variant from words; ValueError names the key and what is allowed."""
    words = {}
    for name, word in given.items():
        allowed = _field(method, "variant", name).metadata["allowed"]
        # yaml reads the words on and off as booleans.
        word = {True: "on", False: "off"}.get(word, word) if isinstance(word, bool) else word
        if word not in allowed:
            raise ValueError(f"variant.{name}: '{word}' is not one of: {', '.join(allowed)}")
        words[name] = word
    return method.Variant(**words)


def check_number(method: Method, name: str, value: Any) -> float:
    """A hyperparameter's value as float; ValueError where it is no number or out of range."""
    bounds = _field(method, "hp", name).metadata
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"hp.{name}: '{value}' is no number")
    if not bounds["low"] <= value <= bounds["high"]:
        raise ValueError(
            f"hp.{name}: {value} is out of range for method '{method.name}'; "
            f"allowed: {bounds['low']:g} to {bounds['high']:g} ({bounds['meaning']})"
        )
    return float(value)


def make_hyperparameters(
    method: Method, given: Mapping[str, Any], variant: Any, device: torch.device | str = "cpu"
) -> Any:
    """The method's Hyperparameters as float64 0-d tensors, defaults where none is given.

    ValueError for a value out of range, of the hyperparameter or of the `variant`."""
    values: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(method.Hyperparameters)}
    for name, value in given.items():
        values[name] = check_number(method, name, value)
    for name, most in method.at_most(variant).items():
        if values[name] > most:
            raise ValueError(
                f"hp.{name}: {values[name]} is out of range for method '{method.name}' with this "
                f"variant; allowed: 0 to {most:g}"
            )
    return method.Hyperparameters(
        **{k: torch.tensor(v, dtype=torch.float64, device=device) for k, v in values.items()}
    )
