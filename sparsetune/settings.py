# ruff: noqa: RUF009 - the calls make fields
"""What a trial and a sweep are, as plain dataclasses; what each field takes stands at the field.

The rule to know: a trial is a value. Two trials with equal `TrialSettings` give equal metrics, so
everything that can change a result is a field there, and nothing else is; what a sweep adds changes
which trials there are and where they run. This module needs the standard library alone, because the
trainer runs on machines without OmegaConf; `space/config.py` reads yaml and the command line.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

# Fields -------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """What is known of one setting."""

    kind: Any  # the type of its value, without None
    meaning: str
    default: Any  # a text where it depends on the machine
    choices: tuple[str, ...] = ()
    allowed: str = ""  # in words, where there are no choices; empty: all of its kind
    fits: Callable[[Any], bool] = lambda value: True


def setting(default: Any, meaning: str, shown: str | None = None, **limits: Any) -> Any:
    """A field, with what `Key` says of it. `default` may be a list, a dict or a function; `shown`
    is what people read in its place."""
    known = {"meaning": meaning, "default": default if shown is None else shown, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=partial(copy.copy, default), metadata=known)
    if callable(default):
        return field(default_factory=default, metadata=known)
    return field(default=default, metadata=known)


def choice(*choices: str, meaning: str) -> Any:
    """A field that takes one of these words; the first is the default."""
    return setting(choices[0], meaning, choices=choices)


def number(
    default: Any,
    meaning: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    of: str = "",
    note: str = "",
) -> Any:
    """A field of a number within bounds, or of a list of such; NaN is outside all of them.

    The bounds in words open with `of` and end with `note`. None is allowed where it is the default.
    """
    least_text, most_text = (str(bound).replace("+", "") for bound in (least, most))
    if above is not None:
        words = f"above {above}, up to {most_text}"
    elif below is not None:
        words = f"{least_text} or more and below {below}"
    else:
        words = f"{least_text} or more" if most is None else f"{least_text} to {most_text}"

    def inside(value: Any) -> bool:
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and (above is None or value > above)
            and (least is None or value >= least)
            and (most is None or value <= most)
            and (below is None or value < below)
        )

    def fits(value: Any) -> bool:
        if value is None:
            return default is None
        return all(map(inside, value)) if isinstance(value, (list, tuple)) else inside(value)

    null = ", or null" if default is None else ""
    return setting(default, meaning, allowed=f"{of}{words}{note}{null}", fits=fits)


share = partial(number, least=0, most=1, of="a share of training, ")
shares = partial(number, least=0, most=1, of="shares of training, ")


def _epoch_or_steps(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value in (None, "epoch") or (whole and value >= 1)


# A trial ------------------------------------------------------------------------------------------


@dataclass
class DataSettings:
    """Which data, and what is done to it."""

    name: str = setting(
        "digits", "a known data set, by name embedded or from the hub; or package.module:function"
    )
    path: str = setting("", "folder that holds it")
    validation: float = number(0.1, "share of the training images held out", least=0, below=1)
    limit: int = number(0, "use only the first N training images; 0: all", least=0)
    augment: str = choice("none", "shift", "crop+flip", meaning="how images are moved, mirrored")
    normalize: bool = setting(True, "subtract the training mean, divide by the deviation")


@dataclass
class ModelSettings:
    """Which network."""

    name: str = setting("mlp", "a known network; or package.module:Class, of torch.nn.Module")
    widths: list[int] = number(
        [300, 100], "hidden widths of mlp", least=1, most=10**6, of="every width must be "
    )
    match_density: float = number(
        0.0, "scale the widths to this share of weights", least=0, most=1, note="; 0 turns it off"
    )
    args: dict[str, Any] = setting({}, "argument of a class of your own")


@dataclass
class TrainSettings:
    """How the network is trained."""

    batch_size: int = number(128, "images in a batch", least=1)
    precision: str = choice("float32", "bfloat16", meaning="bfloat16 is autocast, CUDA only")


@dataclass
class OptimizerSettings:
    """As in torch.optim.SGD and torch.optim.AdamW."""

    name: str = choice("sgd", "adamw", meaning="which optimizer")
    lr: float = number(0.1, "learning rate, the largest of its schedule", above=0, most=1e30)
    momentum: float = number(0.9, "momentum; for adamw its first beta", least=0, below=1)
    nesterov: bool = setting(False, "Nesterov's momentum (sgd)")
    weight_decay: float = number(5e-4, "weight decay; decoupled for adamw", least=0, most=1e30)
    beta2: float = number(0.999, "second beta (adamw)", least=0, below=1)
    eps: float = number(1e-8, "added to the root of the second moment (adamw)", above=0, most=1e30)


@dataclass
class ScheduleSettings:
    """The learning rate over training."""

    name: str = choice("cosine", "constant", "step", meaning="how the learning rate falls")
    milestones: list[float] = shares([0.5, 0.75], "where it falls (step)")
    gamma: float = number(0.1, "what it is multiplied by there (step)", above=0, most=1)


@dataclass
class UpdateSettings:
    """When the topology is updated; null: as the method's own schedule has it."""

    every: Any = setting(
        None,
        "steps between topology updates",
        allowed="epoch, or a number of steps, or null",
        fits=_epoch_or_steps,
    )
    first: float | None = share(None, "before it nothing is updated")
    stop: float | None = share(None, "after it nothing is updated")
    doublings: list[float] | None = shares(None, "where the interval doubles")


@dataclass
class TrialSettings:
    """One trial: all that its result depends on."""

    method: str = setting(
        "set",
        "how the network is trained sparse",
        allowed="a name that `sparsetune methods` lists, or package.module:METHOD",
    )
    hp: dict[str, float] = setting({}, "hyperparameter of the method, see `sparsetune methods`")
    variant: dict[str, Any] = setting({}, "variant of the method, see `sparsetune methods`")
    density: float = number(0.1, "share of the weights that are active", above=0, most=1)
    density_over: str = choice(
        "all", "sparse", meaning="the weights that density is a share of: all, or of sparse layers"
    )
    distribution: str = choice("uniform", "er", "erk", meaning="how layers share active weights")
    dense_layers: list[str] = setting([], "weights left dense, by name, or first, last, conv")
    epochs: int = number(10, "passes over the training images", least=1)
    seed: int = number(0, "of initialisation, split, masks and batches", least=0)
    order_seed: int | None = number(None, "of batches and augmentation; null: seed", least=0)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    update: UpdateSettings = field(default_factory=UpdateSettings)


# A sweep ------------------------------------------------------------------------------------------

DIRECTIONS: dict[str, typing.Literal["maximize", "minimize"]] = {
    "val/accuracy": "maximize",
    "val/loss": "minimize",
    "train/loss": "minimize",
    "density/all": "minimize",
    "density/sparse": "minimize",
    "density/ever": "minimize",
    "flops/train": "minimize",
    "flops/total": "minimize",
    "device_seconds": "minimize",
}
"""The metrics that can be searched for, each with what is better."""


@dataclass
class CheckpointSettings:
    """What an interrupted trial goes on from."""

    every: int = number(1, "epochs between checkpoints", least=1)


KEEPS = ": ASHA that keeps less than a third at an early look drops settings that would have won"


@dataclass
class SchedulerSettings:
    """Early stopping."""

    name: str = choice(
        "auto", "asha", "none", meaning="auto: ASHA where early epochs can judge all members"
    )
    grace: int = number(0, "epochs that every trial gets; 0: a quarter, the least", least=0)
    reduction: float = number(
        3.0, "1 / reduction of the trials go on at each look", above=1, most=3, note=KEEPS
    )


@dataclass
class SamplerSettings:
    """What suggests trials."""

    name: str = choice("tpe", "random", "gp", "nsga2", meaning="which of Optuna's samplers")
    startup: int = number(10, "random trials at first (tpe, gp)", least=0)


@dataclass
class WandbSettings:
    """Where Weights & Biases records go."""

    mode: str = choice(
        "auto", "online", "offline", "disabled", meaning="auto: online if logged in, else offline"
    )
    project: str = setting("sparsetune", "W&B project")
    entity: str = setting("", "W&B user or team; empty: your default")
    tags: list[str] = setting([], "tags of all runs")


@dataclass
class RaySettings:
    """Which Ray runs the trials."""

    address: str = setting("", "of a cluster; empty: $RAY_ADDRESS, or a Ray of this machine's own")

    @property
    def cluster(self) -> str:
        return self.address or os.environ.get("RAY_ADDRESS", "")


@dataclass
class ResourceSettings:
    """What trains: engines, each a process with one device and slots for trials."""

    engines: int = number(0, "how many; 0: as many as the machines have room for", least=0)
    slots: int = number(0, "slots of each engine; 0: as many as it does well with", least=0)
    threads_per_engine: int = number(0, "CPU threads of each engine; 0: one", least=0)


@dataclass
class SweepSettings(TrialSettings):
    """A member of a sweep: its trials' common settings, and how they are searched."""

    name: str = setting("", "of the sweep, and of its folder in storage")
    storage: str = setting(
        lambda: os.environ.get("SPARSETUNE_STORAGE", "./sweeps"),
        "where sweeps lie",
        shown="$SPARSETUNE_STORAGE, or ./sweeps",
        allowed="a folder's path or s3://BUCKET/PATH",
        fits=bool,
    )
    trials: int = number(20, "trials of each member", least=1)
    warm_start: str = setting("", "a sweep, or a member of one, whose best settings go first")
    objective: Any = setting(
        "val/accuracy",
        "what is searched for, of the last epoch",
        allowed=f"a metric, or a list of them: {', '.join(DIRECTIONS)}",
    )
    constraint: dict[str, float] = setting({}, "upper bound of the metric NAME")
    concurrency: int = number(0, "trials at once; 0: a quarter of them, if there is room", least=0)
    failures: int = number(3, "of a trial's own, after which it has failed", least=1)
    device: str = setting(
        "auto",
        "where trials are trained; auto: a GPU where there is one",
        allowed="auto, cpu, cuda, cuda:N",
        fits=lambda name: re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is not None,
    )
    engine: str = choice(
        "auto", "solo", "stacked", "csr", meaning="how trials share a process; auto: the fastest"
    )
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    wandb: WandbSettings = field(default_factory=WandbSettings)
    ray: RaySettings = field(default_factory=RaySettings)
    resources: ResourceSettings = field(default_factory=ResourceSettings)


# Keys and checks ----------------------------------------------------------------------------------

Settings = TypeVar("Settings")


def group_of(cls: type, name: str) -> type | None:
    """The dataclass of the settings that a field of `cls` groups; None where it is a setting."""
    factory = {f.name: f.default_factory for f in dataclasses.fields(cls)}[name]
    return factory if isinstance(factory, type) and dataclasses.is_dataclass(factory) else None


@cache
def keys_of(cls: type, prefix: str = "") -> dict[str, Key]:
    """Dotted key -> what is known of it, of all fields of `cls` and of the groups in it."""
    known: dict[str, Key] = {}
    kinds = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if group := group_of(cls, f.name):
            known |= keys_of(group, f"{prefix}{f.name}.")
        else:
            parts = [part for part in typing.get_args(kinds[f.name]) if part is not type(None)]
            optional = type(None) in typing.get_args(kinds[f.name])
            known[prefix + f.name] = Key(parts[0] if optional else kinds[f.name], **f.metadata)
    return known


def check_value(key: str, value: Any, cls: type = SweepSettings) -> None:
    """ValueError, with the key and what is allowed, for a value that this field does not take."""
    known = keys_of(cls)[key]
    if known.choices and value not in known.choices:
        raise unknown(key, value, known.choices)
    if not known.fits(value):
        shown = f"'{value}'" if isinstance(value, str) else str(value)
        shown = "an empty value" if value == "" else shown
        wrong = "unknown" if known.kind is str and value else "out of range"
        raise ValueError(f"{key}: {shown} is {wrong}; allowed: {known.allowed}")


def unknown(key: str, value: Any, known: Iterable[str]) -> ValueError:
    near = _nearest(str(value), known)
    return ValueError(f"{key}: '{value}' is unknown{near}; known: {', '.join(known)}")


def _nearest(name: str, known: Iterable[str], where: str = "") -> str:
    close = get_close_matches(name, known, n=1)
    return f"; did you mean '{where}{close[0]}'?" if close else ""


def check_group(name: str, group: Any) -> None:
    """`check_value` of every field of a group of settings, such as `data`."""
    for field_name, value in vars(group).items():
        check_value(f"{name}.{field_name}", value)


def check_trial(settings: TrialSettings) -> None:
    """`check_value` of all that a trial has, but of dicts: what they hold is a method's."""
    for name, value in vars(settings).items():
        if dataclasses.is_dataclass(value):
            check_group(name, value)
        elif not isinstance(value, dict):
            check_value(name, value)


# As dicts -----------------------------------------------------------------------------------------


def from_dict(cls: type[Settings], given: Mapping[str, Any], where: str = "") -> Settings:
    """Settings from a nested dict; ValueError names an unknown key, with the nearest known one."""
    fields = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values = {}
    for name, value in given.items():
        if name not in fields:
            near = _nearest(str(name), fields, where)
            raise ValueError(f"{where}{name}: unknown key{near} known: {', '.join(fields)}")
        group = group_of(cls, name)
        values[name] = from_dict(group, value, f"{where}{name}.") if group else value
    return cls(**values)


def to_dict(settings: Any) -> dict[str, Any]:
    """The nested plain dict of any settings dataclass, ready for JSON."""
    return dataclasses.asdict(settings)
