"""What a trial is: one configuration, as plain dataclasses.

The rule to know: a trial is a value. Two trials with equal `TrialSettings` give equal metrics,
so everything that can change a result is a field here, and nothing else is. This module needs the
standard library alone, because the trainer runs on machines without OmegaConf; `config.py` reads
yaml and the command line into these classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeVar


@dataclass
class DataSettings:
    """Which data, and what is done to it. Without `path`: by name, embedded or from the hub."""

    name: str = "digits"
    path: str = ""
    validation: float = 0.1  # share of the training images held out, split by the seed
    limit: int = 0  # use only the first N training images; 0: all
    augment: str = "none"  # none | shift | crop+flip
    normalize: bool = True  # subtract the training mean, divide by the deviation, per channel


@dataclass
class ModelSettings:
    """Which network. `widths` are the hidden ones of `mlp`; `args` go to a class of the user's."""

    name: str = "mlp"
    widths: list[int] = field(default_factory=lambda: [300, 100])
    match_density: float = 0.0  # above 0: scale the hidden widths to this share of the weights
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainSettings:
    batch_size: int = 128
    precision: str = "float32"  # float32 | bfloat16 (autocast, CUDA only)


@dataclass
class OptimizerSettings:
    """As in torch.optim.SGD and torch.optim.AdamW; for AdamW `momentum` is its first beta."""

    name: str = "sgd"  # sgd | adamw
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    beta2: float = 0.999
    eps: float = 1e-8


@dataclass
class ScheduleSettings:
    """The learning rate over training; `milestones` are shares of training (step only)."""

    name: str = "cosine"  # constant | step | cosine
    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75])
    gamma: float = 0.1


@dataclass
class UpdateSettings:
    """When the topology is updated. None: the method's own schedule (`methods/contract.py`)."""

    every: Any = None  # "epoch" or a number of steps
    first: float | None = None  # share of training before which nothing is updated
    stop: float | None = None  # share of training after which nothing is updated
    doublings: list[float] | None = None  # shares of training at which the interval doubles


@dataclass
class TrialSettings:
    """One trial. `order_seed` fixes the order of batches (None: the trial's own seed)."""

    method: str = "set"
    hp: dict[str, float] = field(default_factory=dict)
    variant: dict[str, Any] = field(default_factory=dict)
    density: float = 0.1
    density_over: str = "all"  # all | sparse: what `density` is a share of
    distribution: str = "uniform"  # uniform | er | erk
    dense_layers: list[str] = field(default_factory=list)
    epochs: int = 10
    seed: int = 0
    order_seed: int | None = None
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    update: UpdateSettings = field(default_factory=UpdateSettings)


WANDB_MODES = ("auto", "online", "offline", "disabled")


@dataclass
class WandbSettings:
    """Where W&B records go; here, because no result depends on them and `wandb` loads slowly."""

    mode: str = "auto"  # auto (online if logged in, else offline) | online | offline | disabled
    project: str = "sparsetune"
    entity: str = ""
    tags: list[str] = field(default_factory=list)


Settings = TypeVar("Settings")


def from_dict(cls: type[Settings], given: Mapping[str, Any], where: str = "") -> Settings:
    """Settings from a nested dict; ValueError names an unknown key, with the nearest known one."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in given.items():
        if key not in fields:
            close = get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean '{where}{close[0]}'?" if close else ""
            raise ValueError(f"{where}{key}: unknown key{hint} known: {', '.join(fields)}")
        nested = fields[key].default_factory
        if dataclasses.is_dataclass(nested) and isinstance(nested, type):
            value = from_dict(nested, value, f"{where}{key}.")
        values[key] = value
    return cls(**values)


def to_dict(settings: Any) -> dict[str, Any]:
    """The nested plain dict of any settings dataclass, ready for JSON."""
    return dataclasses.asdict(settings)
