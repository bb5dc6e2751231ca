"""Train one trial alone: the reference that every engine backend is tested against.

The rule to know: `setup.prepare` turns settings into a `Setup` that never changes, `begin` makes
the first `TrialState`, and `train_epoch` maps a state to the next one and its metrics. Nothing
passed in is changed but `setup.model`'s mode (training or not), which whoever calls the model sets
first; nothing is drawn from a global generator, and inside an epoch the host waits for the device
only at topology updates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from sparsetune.methods import noise
from sparsetune.methods.contract import Layers
from sparsetune.methods.distribution import random_masks
from sparsetune.methods.update import activate, seeded_noise, update_keys, update_layers
from sparsetune.training import data, models, optim
from sparsetune.training.flops import trial_flops
from sparsetune.training.setup import Setup, batches, inputs, is_due

Metrics = dict[str, float]


class TrialState(NamedTuple):
    """Everything a trial is between two epochs; a checkpoint holds this and nothing else of it.

    Tensors by name: `params` (trained, thresholds included), `buffers` (BatchNorm), the
    optimizer's `moments`, `masks` and `ever` (bool, weights ever active) of the sparse layers.
    `method` is the method's own state. `epoch`, `step` and `updates` count what is done.
    """

    params: Layers
    buffers: Layers
    moments: optim.Moments
    masks: Layers
    ever: Layers
    method: Any
    epoch: int = 0
    step: int = 0
    updates: int = 0
    flops: float = 0.0  # of all training so far
    diverged: bool = False


def begin(setup: Setup) -> TrialState:
    """The state before the first step: a function of the settings and the seed."""
    settings, method, device = setup.settings, setup.method, setup.device
    params, buffers = models.initial_params(
        settings.model, setup.dataset.input_shape, setup.dataset.num_classes, settings.seed
    )
    if method.begins == "sparse":
        masks = random_masks(setup.sparse, setup.targets, settings.seed)
        params |= {name: params[name] * mask for name, mask in masks.items()}
    else:
        masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in setup.sparse.items()}
    params, buffers, masks = (
        {name: t.to(device) for name, t in tensors.items()} for tensors in (params, buffers, masks)
    )
    state, extra = begin_method(setup, params, masks)
    params |= extra
    if method.masks_of is not None:
        masks = method.masks_of(params)
    moments = optim.begin(settings.optimizer, params)
    return TrialState(params, buffers, moments, masks, dict(masks), state)


def begin_method(setup: Setup, params: Layers, masks: Layers) -> tuple[Any, Layers]:
    """The method's own state before the first step, and the parameters that it adds."""
    device = setup.device
    zeros = {name: torch.zeros_like(params[name]) for name in masks}
    values = activate(params, masks, zeros, zeros)
    targets = {
        name: torch.tensor(num, dtype=torch.float64, device=device)
        for name, num in setup.targets.items()
    }
    seeded = seeded_noise(setup.settings.seed, "init", device)
    return setup.method.init(values, setup.sparse, targets, setup.hp, seeded, setup.variant)


def copied(state: TrialState) -> TrialState:
    """A state whose tensors this epoch may change in place."""
    changing = ("params", "buffers", "moments")
    copies = {kind: pytree.tree_map(torch.clone, getattr(state, kind)) for kind in changing}
    return state._replace(**copies)


def _forward_params(setup: Setup, state: TrialState, gates: Layers) -> Layers:
    """The params that the network computes with."""
    params = setup.method.sparsify(state.params, gates, state.method, setup.hp, setup.variant)
    return {name: params[name] for name in setup.names}


def _logits(setup: Setup, params: Layers, buffers: Layers, images: Tensor) -> Tensor:
    """[n, classes], float32."""
    half = setup.settings.train.precision == "bfloat16"
    with torch.autocast("cuda", torch.bfloat16, enabled=half and setup.device.type == "cuda"):
        logits: Tensor = functional_call(setup.model, params | buffers, (images,))
    return logits.float()


def topology_update(setup: Setup, state: TrialState, grads: Layers) -> TrialState:
    """The state after one prune-and-grow event, with the batch's dense gradients."""
    momenta = optim.momentum_of(setup.settings.optimizer, state.moments)
    changed, masks, reset, method_state = update_layers(
        setup.method,
        state.params,
        state.masks,
        momenta,
        grads,
        state.method,
        setup.variant,
        setup.hp,
        setup.progress(state.step),
        update_keys(state.masks, setup.settings.seed, state.updates),
        alone=True,
    )
    _take(state, changed, reset)
    ever = {name: seen | masks[name] for name, seen in state.ever.items()}
    return state._replace(masks=masks, ever=ever, method=method_state, updates=state.updates + 1)


def _take(state: TrialState, changed: Layers, reset: Layers) -> None:
    """Writes what a method has changed into the state; moments are zero where they are `reset`."""
    for name, value in changed.items():
        state.params[name].copy_(value)
    for moment in state.moments:
        for name in reset.keys() & moment.keys():
            moment[name].masked_fill_(reset[name], 0)


def num_active(setup: Setup, gates: Layers) -> Tensor:
    """Active weights of each sparse layer, float64 [L]."""
    counts = [
        gates[name].flatten(1).sum(1).sum(dtype=torch.float64)
        if name in gates
        else torch.tensor(float(shape.numel()), dtype=torch.float64, device=setup.device)
        for name, shape in setup.sparse.items()
    ]
    return torch.stack(counts) if counts else torch.zeros(0, dtype=torch.float64)


def train_step(
    setup: Setup, state: TrialState, gates: Layers, images: Tensor, labels: Tensor
) -> tuple[TrialState, Layers, Tensor]:
    """One optimizer step and what follows it: (state, gates, cross entropy).

    Changes tensors in place; `gates` come back as the same object where no mask changed.
    """
    method, step = setup.method, state.step + 1
    params = _forward_params(setup, state, gates)
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    loss = F.cross_entropy(_logits(setup, leaves, state.buffers, images), labels)
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    due = is_due(setup, step)
    with torch.no_grad():
        # The update reads the dense gradient, which masking and the optimizer's step overwrite.
        dense = {name: grads[name].clone() for name in gates} if due else {}
        if method.pull_back is not None:
            grads = method.pull_back(grads, state.params, gates, setup.hp, setup.variant)
        if setup.masks_gradients:
            for name, gate in gates.items():
                grads[name].mul_(gate)
        decays = {name: method.decays(name, setup.variant) for name in state.params}
        numbers, optimizer = setup.step_numbers(step), setup.settings.optimizer
        optim.apply_step(optimizer, state.params, grads, state.moments, decays, numbers)
        if setup.fixes_weights and not setup.masks_gradients:
            for name, gate in gates.items():
                state.params[name].mul_(gate)
        state = state._replace(step=step)
        if method.after_step is not None:
            changed, gates, reset = method.after_step(
                state.params, state.method, setup.hp, setup.variant
            )
            _take(state, changed, reset)
        if due:
            state = topology_update(setup, state, dense)
            gates = gates_of(setup, state)
    return state, gates, loss.detach()


def gates_of(setup: Setup, state: TrialState) -> Layers:
    """Masks as 0 and 1 in float, what weights or gradients are multiplied by; none for dense."""
    if not setup.fixes_weights and not setup.moves_masks:
        return {}
    return {name: mask.to(state.params[name].dtype) for name, mask in state.masks.items()}


def train_epoch(setup: Setup, state: TrialState) -> tuple[TrialState, Metrics]:
    """The state after one more epoch, and its metrics (`measure` says which)."""
    began = time.perf_counter()
    before = state
    state = copied(state)
    epoch = batches(setup, state.epoch)
    setup.model.train()
    gates = gates_of(setup, state)
    active = num_active(setup, gates)
    active_sum = torch.zeros_like(active)
    losses = torch.zeros((), dtype=torch.float64, device=setup.device)
    with torch.random.fork_rng(devices=[setup.device] if setup.device.type == "cuda" else []):
        # Dropout and the like in a user's own network draw from the global generator.
        torch.manual_seed(noise.key(setup.settings.seed, "forward", state.epoch))
        for places in epoch.places:
            active_sum += active
            held = gates
            state, gates, loss = train_step(setup, state, gates, *inputs(setup, epoch, places))
            losses += loss
            if gates is not held:
                active = num_active(setup, gates)
    num = setup.steps_per_epoch
    state, metrics = end_epoch(setup, before, state, float(losses) / num, active_sum / num)
    if setup.device.type == "cuda":
        torch.cuda.synchronize(setup.device)
    metrics["device_seconds"] = time.perf_counter() - began
    return state, metrics


def end_epoch(
    setup: Setup, before: TrialState, state: TrialState, loss: float, active: Iterable[Tensor]
) -> tuple[TrialState, Metrics]:
    """What follows an epoch's last step: its state, and all of its metrics but `device_seconds`.

    `before` is where the epoch began (its masks and `updates` are read), `loss` the mean over its
    steps, `active` that of the active weights of each sparse layer.
    """
    if setup.method.masks_of is not None:
        # Such masks move at every step and are looked at once an epoch: each look costs as much
        # as a twentieth of a step.
        masks = setup.method.masks_of(state.params)
        ever = {name: state.ever[name] | mask for name, mask in masks.items()}
        state = state._replace(masks=masks, ever=ever)
    measured = measure(setup, state, before.masks)
    metrics = epoch_metrics(setup, state, state.updates - before.updates, loss, active, measured)
    state = state._replace(
        epoch=state.epoch + 1, flops=metrics["flops/total"], diverged=bool(metrics["diverged"])
    )
    return state, metrics


def epoch_metrics(
    setup: Setup, state: Any, updates: int, loss: float, active: Iterable[Tensor], measured: Metrics
) -> Metrics:
    """All metrics of an epoch but `device_seconds`.

    `state` is a TrialState, or what an engine has instead, whose `epoch` and `flops` are those of
    the epoch's beginning; in the epoch were so many `updates`. `measured` is what `measure` gives.
    """
    density = {
        name: float(num) / shape.numel()
        for (name, shape), num in zip(setup.sparse.items(), active, strict=True)
    }
    interval = setup.steps_per_epoch / updates if updates else math.inf
    kind = setup.method.dense_gradient(setup.variant)
    flops = trial_flops(setup.flops, density, kind, interval)
    total = state.flops + flops * setup.steps_per_epoch * setup.batch_size
    metrics = {"epoch": state.epoch + 1, "train/loss": loss} | measured
    metrics |= {"flops/train": flops, "flops/total": total}
    finite = all(math.isfinite(metrics[k]) for k in ("train/loss", "val/loss") if k in metrics)
    # Validation may look finite (a ReLU turns NaN into 0 on some devices), so weights are asked.
    finite = finite and all(bool(p.isfinite().all()) for p in state.params.values())
    return metrics | {"diverged": float(not finite)}


@torch.no_grad()
def evaluate(setup: Setup, state: TrialState, arrays: data.Arrays) -> tuple[float, float]:
    """(mean cross entropy, share classified right) of uint8 images on any device."""
    setup.model.eval()
    params = _forward_params(setup, state, gates_of(setup, state))
    loss = torch.zeros((), dtype=torch.float64, device=setup.device)
    right = torch.zeros((), dtype=torch.int64, device=setup.device)
    for images, labels in zip(arrays.images.split(1000), arrays.labels.split(1000), strict=True):
        labels = labels.to(setup.device)
        logits = _logits(setup, params, state.buffers, setup.to_input(images.to(setup.device)))
        loss += F.cross_entropy(logits, labels, reduction="sum")
        right += (logits.argmax(1) == labels).sum()
    num = len(arrays.labels)
    return float(loss) / num, float(right) / num


def measure(setup: Setup, state: TrialState, earlier: Layers) -> Metrics:
    """Validation and density of a state; `earlier` masks are those of the epoch before.

    `val/loss`, `val/accuracy` (share; where images are held out), and what `weight_metrics` has.
    """
    metrics: Metrics = {}
    if len(setup.validation_index):
        train = setup.dataset.train
        held_out = data.Arrays(*(t[setup.validation_index] for t in train))
        metrics["val/loss"], metrics["val/accuracy"] = evaluate(setup, state, held_out)
    return metrics | weight_metrics(
        setup,
        state,
        active={name: int(mask.count_nonzero()) for name, mask in state.masks.items()},
        seen=sum(int(mask.count_nonzero()) for mask in state.ever.values()),
        new=sum(int((mask & ~earlier[k]).count_nonzero()) for k, mask in state.masks.items()),
    )


def weight_metrics(
    setup: Setup, state: Any, active: dict[str, int], seen: int, new: int
) -> Metrics:
    """Shares, from numbers of weights: `active` in each sparse layer; of all sparse layers those
    `seen` active at any time, and those `new` since the epoch before.

    `density/all` (active share of all weights), `density/sparse` (of the sparse layers),
    `density/ever` (of those, ever active), `density/layer/<name>`, `method/churn` (share of active
    weights that were absent before) for methods that move them, and of the method's own scalars
    `method/<name>`.
    """
    sizes = {name: shape.numel() for name, shape in setup.sparse.items()}
    whole = sum(shape.numel() for shape in setup.dense.values())
    size, num = sum(sizes.values()), sum(active.values())
    metrics = {
        "density/all": (num + whole) / (size + whole),
        "density/sparse": num / size if size else 1.0,
        "density/ever": seen / size if size else 1.0,
    }
    for name, shape in (setup.sparse | setup.dense).items():
        metrics[f"density/layer/{name}"] = active.get(name, shape.numel()) / shape.numel()
    if setup.method.decide is not None or setup.method.emergent:
        metrics["method/churn"] = new / max(num, 1)
    own = setup.method.metrics(state.params, state.method, setup.hp)
    return metrics | {f"method/{name}": float(value) for name, value in own.items()}
