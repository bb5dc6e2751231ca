"""Train one trial alone: the reference that every engine backend is tested against.

The rule to know: `prepare` turns settings into a `Setup` that never changes, `begin` makes the
first `TrialState`, and `train_epoch` maps a state to the next one and its metrics. Nothing passed
in is changed, nothing is drawn from a global generator, and inside an epoch the host waits for the
device only at topology updates.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sparsetune.methods import METHODS, Method, noise
from sparsetune.methods.contract import (
    Active,
    Layers,
    Shapes,
    UpdateSchedule,
    make_hyperparameters,
    make_variant,
)
from sparsetune.methods.distribution import counts, random_masks, split_layers, total_for
from sparsetune.methods.update import activate, seeded_noise, update_alone, update_keys
from sparsetune.settings import TrialSettings
from sparsetune.training import data, models, optim
from sparsetune.training.flops import forward_flops, trial_flops

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
    epoch: int
    step: int
    updates: int
    flops: float  # of all training so far
    diverged: bool


class Setup(NamedTuple):
    """What `prepare` derives from a trial's settings, once."""

    settings: TrialSettings
    device: torch.device
    method: Method
    variant: Any
    hp: Any
    schedule: UpdateSchedule
    model: nn.Module  # on the meta device: its forward is called with the state's params
    names: tuple[str, ...]  # of the model's parameters; a method may train others besides
    sparse: Shapes
    dense: Shapes
    targets: dict[str, int]  # active weights per sparse layer that the density asks for
    flops: dict[str, float]  # forward, dense, per sample, by weight name
    dataset: data.Dataset  # on the device
    train_index: Tensor
    validation_index: Tensor

    @property
    def steps_per_epoch(self) -> int:
        return data.steps_per_epoch(len(self.train_index), self.settings.train.batch_size)

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.settings.epochs

    @property
    def masks_gradients(self) -> bool:
        """Only active weights learn; False where absent ones collect momentum (SM) or all train."""
        return self.fixes_weights and self.method.dense_gradient(self.variant) != "always"

    @property
    def fixes_weights(self) -> bool:
        """Absent weights are zero, not merely masked in the forward pass."""
        return self.method.reaches_density

    @property
    def moves_masks(self) -> bool:
        """Every step moves the masks, not topology updates (DST)."""
        return self.method.masks_of is not None


def choose_device(name: str) -> torch.device:
    """auto: a GPU where there is one. ValueError for a device that this machine lacks."""
    check_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: '{name}' asked for, but torch sees no GPU; use device=cpu")
    return device


def check_device(name: str) -> None:
    """ValueError for what is no name of a device that we train on."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"device: '{name}' is unknown; allowed: auto, cpu, cuda, cuda:N")


def update_schedule(method: Method, settings: TrialSettings) -> UpdateSchedule:
    """The method's schedule with what the settings replace; ValueError for what cannot be."""
    given = {k: v for k, v in vars(settings.update).items() if v is not None}
    if "doublings" in given:
        given["doublings"] = tuple(given["doublings"])
    schedule = method.schedule
    schedule = UpdateSchedule(**{**vars(schedule), **given})
    every = schedule.every
    if every != "epoch" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(f"update.every: '{every}' is neither 'epoch' nor a number of steps")
    for name, share in (("first", schedule.first), ("stop", schedule.stop)):
        if not 0 <= share <= 1:
            raise ValueError(f"update.{name}: {share} is no share of training from 0 to 1")
    if schedule.first > schedule.stop:
        raise ValueError(
            f"update.first: {schedule.first} comes after update.stop, {schedule.stop}, so the "
            "topology would never change; give a smaller one, or use the space static"
        )
    return schedule


def layers_of(
    settings: TrialSettings, method: Method, weights: Shapes
) -> tuple[Shapes, Shapes, dict[str, int]]:
    """(sparse layers, dense layers, active weights per sparse layer at the asked density)."""
    sparse, dense = split_layers(weights, settings.dense_layers)
    if not method.reaches_density:
        return sparse, dense, {name: shape.numel() for name, shape in sparse.items()}
    if not sparse:
        raise ValueError(
            f"dense_layers: {', '.join(settings.dense_layers)} leaves every layer dense, so "
            "nothing can be sparse; leave one out"
        )
    total = total_for(sparse, dense, settings.density, settings.density_over)
    return sparse, dense, counts(sparse, total, settings.distribution)


def prepare(
    settings: TrialSettings, device: torch.device, dataset: data.Dataset | None = None
) -> Setup:
    """The setup of a trial; `dataset` where it is loaded already. ValueError for bad settings."""
    method = METHODS[settings.method]
    variant = make_variant(method, settings.variant)
    if dataset is None:
        dataset = data.load(settings.data)
    with torch.device("meta"):
        model = models.build(settings.model, dataset.input_shape, dataset.num_classes)
    sparse, dense, targets = layers_of(settings, method, models.weights(model))
    train_index, validation_index = data.split(
        len(dataset.train.labels), settings.data.validation, settings.seed
    )
    dataset = dataset._replace(
        train=data.Arrays(*(t.to(device) for t in dataset.train)),
        mean=dataset.mean.to(device),
        deviation=dataset.deviation.to(device),
    )
    return Setup(
        settings=settings,
        device=device,
        method=method,
        variant=variant,
        hp=make_hyperparameters(method, settings.hp, variant, device),
        schedule=update_schedule(method, settings),
        model=model,
        names=tuple(name for name, _ in model.named_parameters()),
        sparse=sparse,
        dense=dense,
        targets=targets,
        flops=forward_flops(settings.model, dataset.input_shape, dataset.num_classes),
        dataset=dataset,
        train_index=train_index.to(device),
        validation_index=validation_index.to(device),
    )


def begin(setup: Setup) -> TrialState:
    """The state before the first step: a function of the settings and the seed."""
    settings, method, device = setup.settings, setup.method, setup.device

    def drawn(purpose: str, name: str, num: int) -> Tensor:
        return noise.uniform(noise.key(settings.seed, purpose, 0, name), torch.arange(num))

    params, buffers = models.initial_params(
        settings.model, setup.dataset.input_shape, setup.dataset.num_classes, settings.seed, drawn
    )
    if method.begins == "sparse":
        masks = random_masks(setup.sparse, setup.targets, settings.seed)
        params |= {name: params[name] * mask for name, mask in masks.items()}
    else:
        masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in setup.sparse.items()}
    params, buffers, masks = (
        {name: t.to(device) for name, t in tensors.items()} for tensors in (params, buffers, masks)
    )
    zeros = {name: torch.zeros_like(params[name]) for name in masks}
    state, extra = begin_method(setup, activate(params, masks, zeros, zeros))
    params |= extra
    if method.masks_of is not None:
        masks = method.masks_of(params)
    return TrialState(
        params,
        buffers,
        optim.begin(settings.optimizer, params),
        masks,
        dict(masks),
        state,
        epoch=0,
        step=0,
        updates=0,
        flops=0.0,
        diverged=False,
    )


def begin_method(setup: Setup, values: dict[str, Active]) -> tuple[Any, Layers]:
    """The method's own state before the first step, and the parameters that it adds."""
    device = setup.device
    targets = {
        name: torch.tensor(num, dtype=torch.float64, device=device)
        for name, num in setup.targets.items()
    }
    seeded = seeded_noise(setup.settings.seed, "init", device)
    return setup.method.init(values, setup.sparse, targets, setup.hp, seeded, setup.variant)


def copied(state: TrialState) -> TrialState:
    """A state whose tensors this epoch may change in place."""
    first, second = ({k: t.clone() for k, t in moment.items()} for moment in state.moments)
    return state._replace(
        params={k: t.clone() for k, t in state.params.items()},
        buffers={k: t.clone() for k, t in state.buffers.items()},
        moments=optim.Moments(first, second),
    )


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
    changed, masks, reset, method_state = update_alone(
        setup.method,
        state.params,
        state.masks,
        momenta,
        grads,
        state.method,
        setup.variant,
        setup.hp,
        torch.tensor(
            setup.schedule.progress(state.step, setup.num_steps),
            dtype=torch.float64,
            device=setup.device,
        ),
        update_keys(state.masks, setup.settings.seed, state.updates),
    )
    for name, value in changed.items():
        state.params[name].copy_(value)
    _reset(state.moments, reset)
    ever = {name: seen | masks[name] for name, seen in state.ever.items()}
    return state._replace(masks=masks, ever=ever, method=method_state, updates=state.updates + 1)


def _reset(moments: optim.Moments, where: Layers) -> None:
    for moment in moments:
        for name in where:
            if name in moment:
                moment[name].masked_fill_(where[name], 0)


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
    settings, method = setup.settings, setup.method
    step = state.step + 1
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
        optim.apply_step(
            settings.optimizer,
            state.params,
            grads,
            state.moments,
            {name: method.decays(name, setup.variant) for name in state.params},
            optim.learning_rate(
                settings.schedule, settings.optimizer.lr, state.step, setup.num_steps
            ),
            step,
        )
        if setup.fixes_weights and not setup.masks_gradients:
            for name, gate in gates.items():
                state.params[name].mul_(gate)
        state = state._replace(step=step)
        if method.after_step is not None:
            changed, gates, reset = method.after_step(
                state.params, state.method, setup.hp, setup.variant
            )
            for name, value in changed.items():
                state.params[name].copy_(value)
            _reset(state.moments, reset)
        if due:
            state = topology_update(setup, state, dense)
            gates = gates_of(setup, state)
    return state, gates, loss.detach()


def is_due(setup: Setup, step: int) -> bool:
    """Is the topology updated after the trial's optimizer step number `step`, counted from 1?"""
    method = setup.method
    return method.decide is not None and setup.schedule.is_due(
        step, setup.num_steps, setup.steps_per_epoch, method.closes
    )


def gates_of(setup: Setup, state: TrialState) -> Layers:
    """Masks as 0 and 1 in float, what weights or gradients are multiplied by; none for dense."""
    if not setup.fixes_weights and not setup.moves_masks:
        return {}
    return {name: mask.to(state.params[name].dtype) for name, mask in state.masks.items()}


class Batches(NamedTuple):
    """The batches of one epoch."""

    places: Tensor  # [steps, batch] int64, positions in the data set
    offsets: data.Offsets | None  # what augmentation does to each image of the data set


def batches_key(setup: Setup, epoch: int) -> tuple[int | None, int, int]:
    """Trials of one structure with equal keys have equal batches: (split, order, epoch)."""
    settings = setup.settings
    order_seed = settings.seed if settings.order_seed is None else settings.order_seed
    return settings.seed if settings.data.validation else None, order_seed, epoch


def batches(setup: Setup, epoch: int) -> Batches:
    """Which images are in which batch of the epoch that follows `epoch` epochs."""
    settings, dataset = setup.settings, setup.dataset
    _, order_seed, _ = batches_key(setup, epoch)
    num, steps = len(setup.train_index), setup.steps_per_epoch
    order = data.epoch_order(num, order_seed, epoch).to(setup.device)
    size = min(settings.train.batch_size, num)
    height, width = dataset.train.images.shape[-2:]
    offsets = data.augmentation(
        settings.data.augment, len(dataset.train.labels), order_seed, epoch, (height, width)
    )
    return Batches(
        setup.train_index[order[: steps * size]].view(steps, size),
        offsets if offsets is None else offsets.to(setup.device),
    )


def inputs(setup: Setup, epoch: Batches, places: Tensor) -> tuple[Tensor, Tensor]:
    """The network's input and labels of a part of `epoch.places`, [*n, c, h, w] and [*n]."""
    train, flat = setup.dataset.train, places.flatten()
    images = data.augment(train.images[flat], epoch.offsets, flat)
    x = data.to_input(
        images, setup.dataset.mean, setup.dataset.deviation, setup.settings.data.normalize
    )
    return x.view(*places.shape, *x.shape[1:]), train.labels[places]


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
    step_flops = epoch_flops(setup, active, state.updates - before.updates)
    size = min(setup.settings.train.batch_size, len(setup.train_index))
    state = state._replace(
        epoch=state.epoch + 1, flops=state.flops + step_flops * setup.steps_per_epoch * size
    )
    metrics = {"epoch": state.epoch, "train/loss": loss}
    metrics |= measure(setup, state, before.masks)
    metrics |= {"flops/train": step_flops, "flops/total": state.flops}
    state = state._replace(diverged=has_diverged(state.params, metrics))
    metrics["diverged"] = float(state.diverged)
    return state, metrics


def has_diverged(params: Layers, metrics: Metrics) -> bool:
    # Validation may look finite (a ReLU turns NaN into 0 on some devices), so weights are asked.
    finite = all(math.isfinite(metrics[k]) for k in ("train/loss", "val/loss") if k in metrics)
    return not (finite and all(bool(p.isfinite().all()) for p in params.values()))


def epoch_flops(setup: Setup, active: Iterable[Tensor], updates: int) -> float:
    """FLOPs per sample and step, given the epoch's mean active weights of each sparse layer."""
    density = {
        name: float(num) / shape.numel()
        for (name, shape), num in zip(setup.sparse.items(), active, strict=True)
    }
    density = {name: density.get(name, 1.0) for name in setup.flops}
    kind = setup.method.dense_gradient(setup.variant)
    interval = setup.steps_per_epoch / updates if updates else math.inf
    return trial_flops(setup.flops, density, kind, interval)


@torch.no_grad()
def evaluate(setup: Setup, state: TrialState, arrays: data.Arrays) -> tuple[float, float]:
    """(mean cross entropy, share classified right) of uint8 images on any device."""
    setup.model.eval()
    params = _forward_params(setup, state, gates_of(setup, state))
    loss = torch.zeros((), dtype=torch.float64, device=setup.device)
    right = torch.zeros((), dtype=torch.int64, device=setup.device)
    for images, labels in zip(arrays.images.split(1000), arrays.labels.split(1000), strict=True):
        x = data.to_input(
            images.to(setup.device),
            setup.dataset.mean,
            setup.dataset.deviation,
            setup.settings.data.normalize,
        )
        labels = labels.to(setup.device)
        logits = _logits(setup, params, state.buffers, x)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        right += (logits.argmax(1) == labels).sum()
    num = len(arrays.labels)
    return float(loss) / num, float(right) / num


def measure(setup: Setup, state: TrialState, earlier: Layers) -> Metrics:
    """Validation and density of a state; `earlier` masks are those of the epoch before.

    `val/loss`, `val/accuracy` (share; where images are held out), what `density_metrics` has and
    the method's own scalars as `method/<name>`.
    """
    metrics: Metrics = {}
    if len(setup.validation_index):
        train = setup.dataset.train
        held_out = data.Arrays(*(t[setup.validation_index] for t in train))
        metrics["val/loss"], metrics["val/accuracy"] = evaluate(setup, state, held_out)
    metrics |= density_metrics(
        setup,
        active={name: int(mask.count_nonzero()) for name, mask in state.masks.items()},
        seen=sum(int(mask.count_nonzero()) for mask in state.ever.values()),
        new=sum(int((mask & ~earlier[k]).count_nonzero()) for k, mask in state.masks.items()),
    )
    own = setup.method.metrics(state.params, state.method, setup.hp)
    return metrics | {f"method/{name}": float(value) for name, value in own.items()}


def density_metrics(setup: Setup, active: dict[str, int], seen: int, new: int) -> Metrics:
    """Shares, from numbers of weights: `active` in each sparse layer; of all sparse layers those
    `seen` active at any time, and those `new` since the epoch before.

    `density/all` (active share of all weights), `density/sparse` (of the sparse layers),
    `density/ever` (of those, ever active), `density/layer/<name>`, and `method/churn` (share of
    active weights that were absent before) for methods that move them.
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
    return metrics
