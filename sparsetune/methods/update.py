"""One topology update on dense tensors: a method's decision, then growth.

The rule to know: this is the reference that every backend's update is tested against, and it
lifts: `update_layers` under `torch.vmap` is the update of many trials, equal to that of each.
`update` is the public form on plain dicts, for checking a rule on a worked example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsetune.methods import noise
from sparsetune.methods.contract import (
    Active,
    Growth,
    Layers,
    Method,
    Noise,
    Shapes,
    make_hyperparameters,
    make_variant,
)
from sparsetune.methods.distribution import counts
from sparsetune.methods.ops import lowest

NEW_WEIGHT_DEVIATION = 0.1  # SET's authors' sparse code: randn / 10


class Keys(NamedTuple):
    """Random streams of one layer in one update, int64 0-d tensors."""

    choose: Tensor
    value: Tensor


def update_keys(masks: Layers, seed: int, number: int) -> dict[str, Keys]:
    """The streams of update `number` of the trial with this seed, for each layer."""
    made = {}
    for name, mask in masks.items():
        streams = (noise.key(seed, purpose, number, name) for purpose in Keys._fields)
        made[name] = Keys(*(torch.tensor(stream, device=mask.device) for stream in streams))
    return made


def seeded_noise(seed: int, purpose: str, device: torch.device | str) -> Noise:
    """Uniform noise per layer, for a method's `init`."""
    return lambda layer, num: noise.uniform(
        noise.key(seed, purpose, 0, layer), torch.arange(num, device=device)
    )


def activate(params: Layers, masks: Layers, momenta: Layers, grads: Layers) -> dict[str, Active]:
    """What a decision may see of each sparse layer, flat."""
    return {
        name: Active(*(t.reshape(-1) for t in (params[name], momenta[name], grads[name], mask)))
        for name, mask in masks.items()
    }


def _grow(growth: Growth, layer: Active, keep: Tensor, num: Tensor, keys: Keys) -> Tensor:
    """[N] bool: the `num` positions that grow."""
    if growth.score == "random":
        places = torch.arange(layer.valid.shape[0], device=keys.choose.device)
        order = noise.uniform(keys.choose, places)
    else:
        order = -{"gradient": layer.gradient, "momentum": layer.momentum}[growth.score].abs()
    if growth.regrow_dropped:
        return lowest(order, ~keep, num)
    absent = ~layer.valid
    first = lowest(order, absent, num)
    more = num - torch.minimum(num, absent.sum())
    return first | lowest(order, layer.valid & ~keep, more)


def update_layers(
    method: Method,
    params: Layers,
    masks: Layers,
    momenta: Layers,
    grads: Layers,
    state: Any,
    variant: Any,
    hp: Any,
    progress: Tensor,
    keys: dict[str, Keys],
    alone: bool = False,
) -> tuple[Layers, Layers, dict[str, Tensor], Any]:
    """(changed params, masks, where{name: bool} moments are to be zero, state).

    Only weights of sparse layers are returned. Nothing passed in is changed. `alone`: of one model,
    where shapes may depend on values; it decides on the active weights alone, as a truly sparse
    backend does, which at density 0.1 is a tenth of the work.
    """
    assert method.decide is not None
    active = seen = activate(params, masks, momenta, grads)
    shapes: Shapes = {name: mask.shape for name, mask in masks.items()}
    places: Layers = {}
    if alone:
        places = {name: layer.valid.nonzero().squeeze(1) for name, layer in active.items()}
        seen = {name: Active(*(t[places[name]] for t in layer)) for name, layer in active.items()}
    keep, grow, state = method.decide(seen, shapes, state, hp, progress, variant)
    growth = method.growth(variant)
    new_params, new_masks, reset = {}, {}, {}
    for name, layer in active.items():
        stays = keep[name]
        if alone:
            stays = torch.zeros_like(layer.valid).index_put_((places[name],), stays)
        mask = kept = layer.valid & stays
        survivors, new = kept, torch.zeros((), dtype=layer.value.dtype, device=kept.device)
        if growth is not None:
            grown = _grow(growth, layer, kept, grow[name], keys[name])
            mask = kept | grown
            if growth.new_value == "normal":
                drawn = noise.normal_where(keys[name].value, grown)
                new = drawn.mul_(NEW_WEIGHT_DEVIATION).to(layer.value.dtype)
            elif growth.new_value == "keep":
                survivors = mask & layer.valid
        shape = shapes[name]
        # Not a product: what is NaN or infinite must not stay where a weight is absent.
        new_params[name] = (layer.value.masked_fill(~survivors, 0) + new).view(shape)
        new_masks[name] = mask.view(shape)
        # A dense gradient at every step fills the moments of absent weights, on purpose.
        if method.dense_gradient(variant) != "always":
            reset[name] = ~kept.view(shape)
    return new_params, new_masks, reset, state


def _check_given(method: Method, variant: Any, params: Any, masks: Any, **given: Any) -> None:
    """`given`: momentum and gradient. ValueError for what is missing or has another shape."""
    for name, mask in masks.items():
        if name not in params:
            raise ValueError(f"masks: '{name}' is none of params, which has {', '.join(params)}")
        _check_shape("masks", name, mask, params)
    for what, argument in (("gradient", "grads"), ("momentum", "momenta")):
        tensors = given[what] or {}
        for name in tensors.keys() & params.keys():
            _check_shape(argument, name, tensors[name], params)
        missing = [name for name in masks if name not in tensors]
        if what in method.needs(variant) and missing:
            raise ValueError(
                f"{argument}: method '{method.name}' with this variant reads the {what} of each "
                f"layer; give {argument}={{layer: tensor}} with {', '.join(missing)}"
            )


def _check_shape(argument: str, name: str, tensor: Tensor, params: Any) -> None:
    if tensor.shape != params[name].shape:
        raise ValueError(
            f"{argument}: '{name}' has shape {list(tensor.shape)} and its parameter "
            f"{list(params[name].shape)}; give both the same"
        )


@torch.no_grad()
def update(
    method: Method,
    params: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    momenta: Mapping[str, Tensor] | None = None,
    grads: Mapping[str, Tensor] | None = None,
    state: Any = None,
    variant: Mapping[str, Any] | None = None,
    hp: Mapping[str, float] | None = None,
    progress: float = 0.0,
    number: int = 0,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor] | None, Any]:
    """One topology update of `method`: (params, masks, momenta, state), nothing changed in place.

    `params` and `momenta` are tensors of any float dtype by name, `masks` (bool, or 0 and 1) names
    the sparse layers, `grads` are the last batch's. Momenta and gradients are asked for only where
    the rule reads them (ValueError names which). `state=None` makes a fresh one from the masks as
    they are. `hp` and `variant` hold what departs from the method's defaults; for a method that
    begins dense, `hp` may hold `density`, the uniform density of each layer that it prunes to.
    `progress` is the share of the time in which the topology changes; `number` and `seed` key the
    random numbers. For DST: `masks` of params["<weight>.threshold"], after the collapse guard.
    """
    if not masks:
        raise ValueError("masks: names no sparse layer; give masks={layer: tensor}")
    numbers = dict(hp or {})
    density = float(numbers.pop("density", 1.0))
    choices = make_variant(method, variant or {})
    _check_given(method, choices, params, masks, momentum=momenta, gradient=grads)
    device = next(iter(params.values())).device
    settings = make_hyperparameters(method, numbers, choices, device)
    new_params, new_masks = dict(params), {k: m.to(torch.bool) for k, m in masks.items()}
    shapes: Shapes = {name: mask.shape for name, mask in new_masks.items()}
    zeros = {name: torch.zeros_like(params[name]) for name in new_masks}

    if state is None:
        targets = _targets(method, new_masks, density)
        values = activate(new_params, new_masks, zeros, zeros)
        seeded = seeded_noise(seed, "init", device)
        state, extra = method.init(values, shapes, targets, settings, seeded, choices)
        new_params = extra | new_params

    reset: Layers = {}
    if method.decide is not None:
        changed, new_masks, reset, state = update_layers(
            method,
            new_params,
            new_masks,
            {**zeros, **(momenta or {})},
            {**zeros, **(grads or {})},
            state,
            choices,
            settings,
            torch.tensor(progress, dtype=torch.float64, device=device),
            update_keys(new_masks, seed, number),
            alone=True,
        )
    elif method.after_step is not None:
        changed, _, reset = method.after_step(new_params, state, settings, choices)
    elif method.begins == "sparse":
        reset = {name: ~mask for name, mask in new_masks.items()}
        changed = {name: new_params[name].masked_fill(reset[name], 0) for name in reset}
    else:
        changed = {}
    new_params |= changed
    if method.masks_of is not None:
        new_masks = method.masks_of(new_params)
    new_momenta = None
    if momenta is not None:
        new_momenta = {
            name: moment.masked_fill(reset[name], 0) if name in reset else moment
            for name, moment in momenta.items()
        }
    return new_params, new_masks, new_momenta, state


def _targets(method: Method, masks: Layers, density: float) -> Layers:
    """Counts for `init`: those of the masks, or of this uniform density where it prunes to one."""
    num = {name: int(mask.sum()) for name, mask in masks.items()}
    if method.closes:
        size = sum(mask.numel() for mask in masks.values())
        num = counts({k: m.shape for k, m in masks.items()}, round(density * size), "uniform")
    like = next(iter(masks.values()))
    return {k: torch.tensor(n, dtype=torch.float64, device=like.device) for k, n in num.items()}
