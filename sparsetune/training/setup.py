"""What a trial's settings come to before its first step: devices, layers, schedule, batches.

The rule to know: `prepare` turns settings into a `Setup` that never changes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsetune.methods import Method, find
from sparsetune.methods.contract import Shapes, UpdateSchedule, make_hyperparameters, make_variant
from sparsetune.methods.distribution import counts, split_layers, total_for
from sparsetune.settings import (
    DataSettings,
    TrialSettings,
    check_group,
    check_trial,
    check_value,
    from_dict,
)
from sparsetune.training import data, models, optim
from sparsetune.training.flops import forward_flops

DATASETS = 8  # that stay in a process; a search over more of them reads some again
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT = 1 << 30  # bytes; larger tensors than this still go back to the system


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
    def batch_size(self) -> int:
        """Images in a batch: the settings' number, or all where there are fewer."""
        return min(self.settings.train.batch_size, len(self.train_index))

    @property
    def steps_per_epoch(self) -> int:
        return data.steps_per_epoch(len(self.train_index), self.settings.train.batch_size)

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.settings.epochs

    def step_numbers(self, step: int) -> list[float]:
        """`optim.step_numbers` of the trial's optimizer step `step`, counted from 1."""
        settings = self.settings
        return optim.step_numbers(settings.optimizer, settings.schedule, step, self.num_steps)

    def progress(self, step: int) -> Tensor:
        """`UpdateSchedule.progress` after that step, as methods are told it."""
        share = self.schedule.progress(step, self.num_steps)
        return torch.tensor(share, dtype=torch.float64, device=self.device)

    def to_input(self, images: Tensor) -> Tensor:
        """`data.to_input` of images on the device."""
        own = self.dataset
        return data.to_input(images, own.mean, own.deviation, self.settings.data.normalize)

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
    check_value("device", name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: '{name}' asked for, but torch sees no GPU; use device=cpu")
    return device


def update_schedule(method: Method, settings: TrialSettings) -> UpdateSchedule:
    """The method's schedule with what the settings replace; ValueError for what cannot be."""
    check_group("update", settings.update)
    own = {k: v for k, v in vars(settings.update).items() if v is not None}
    if "doublings" in own:
        own["doublings"] = tuple(own["doublings"])
    schedule = dataclasses.replace(method.schedule, **own)
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
    check_trial(settings)
    method = find(settings.method)
    variant = make_variant(method, settings.variant)
    if dataset is None:
        dataset = data.load(settings.data)
    with torch.device("meta"):
        model = models.build(settings.model, dataset.input_shape, dataset.num_classes)
    sparse, dense, targets = layers_of(settings, method, models.weights(model))
    train_index, validation_index = data.split(
        len(dataset.train.labels), settings.data.validation, settings.seed
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
        dataset=dataset.to(device),
        train_index=train_index.to(device),
        validation_index=validation_index.to(device),
    )


def is_due(setup: Setup, step: int) -> bool:
    """Is the topology updated after the trial's optimizer step number `step`, counted from 1?"""
    method = setup.method
    return method.decide is not None and setup.schedule.is_due(
        step, setup.num_steps, setup.steps_per_epoch, method.closes
    )


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
    steps, size = setup.steps_per_epoch, setup.batch_size
    order = data.epoch_order(len(setup.train_index), order_seed, epoch).to(setup.device)
    height, width = dataset.train.images.shape[-2:]
    offsets = data.augmentation(
        settings.data.augment, len(dataset.train.labels), order_seed, epoch, (height, width)
    )
    return Batches(
        setup.train_index[order[: steps * size]].view(steps, size),
        offsets if offsets is None else offsets.to(setup.device),
    )


def inputs(
    setup: Setup, epoch: Batches, places: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The network's input and labels of a part of `epoch.places`, [*n, c, h, w] and [*n]. `rows`:
    which of the offsets are theirs, where that is not those at the places."""
    train, flat = setup.dataset.train, places.flatten()
    rows = flat if rows is None else rows.flatten()
    x = setup.to_input(data.augment(train.images[flat], epoch.offsets, rows))
    return x.view(*places.shape, *x.shape[1:]), train.labels[places]


# Setups of a process that trains many trials -----------------------------------------------------


def setup_of(settings: TrialSettings, device: str) -> Setup:
    """`prepare`, with data that are read and moved to the device once in a process."""
    keep_freed_memory()
    chosen = choose_device(device)
    return prepare(settings, chosen, dataset_of(json.dumps(vars(settings.data)), chosen))


@functools.lru_cache(maxsize=DATASETS)
def dataset_of(settings: str, device: torch.device) -> data.Dataset:
    """The data set of `DataSettings` as json; `dataset_of.cache_clear()` lets all of them go."""
    return data.load(from_dict(DataSettings, json.loads(settings))).to(device)


@functools.cache
def keep_freed_memory() -> None:
    """Once in a process that trains; does nothing where there is no glibc.

    glibc gives what is freed above a threshold back to the system, and the next request pays for
    fresh pages; as a CPU step frees and asks for the same megabytes hundreds of times, that made
    single operations up to ten times slower (0.16 against 1.9 ms for a masked weight of
    LeNet-300-100, torch 2.13). Results do not change.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)
