"""What a sweep is: its settings as dataclasses, and the command line's `key=value` words.

The rule to know: everywhere a setting has one flat, dotted name (`optimizer.lr`, `hp.zeta`,
`constraint.density/all`), from yaml and command line to the journal and W&B. A value is checked
here as soon as it is read, so that what is wrong is said with its key before anything starts.
Over 350 lines: the settings, their limits and how they are written are one table to its readers.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import os
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsetune.methods import METHODS
from sparsetune.methods.distribution import DISTRIBUTIONS
from sparsetune.names import suggestion
from sparsetune.settings import WANDB_MODES, TrialSettings, WandbSettings
from sparsetune.store.paths import SCHEME, place
from sparsetune.training.data import AUGMENTS


@dataclass
class CheckpointSettings:
    every: int = 1  # epochs


@dataclass
class SchedulerSettings:
    """Early stopping. `grace` 0: a quarter of the epochs; 1 / `reduction` of the trials go on."""

    name: str = "auto"  # auto | asha | none
    grace: int = 0
    reduction: float = 3.0


@dataclass
class SamplerSettings:
    """What suggests trials. The first `startup` of them are random (tpe, gp)."""

    name: str = "tpe"  # tpe | random | gp | nsga2
    startup: int = 10


@dataclass
class RaySettings:
    address: str = ""  # empty: $RAY_ADDRESS (a job has it), or a Ray of our own on this machine

    @property
    def cluster(self) -> str:
        return self.address or os.environ.get("RAY_ADDRESS", "")


@dataclass
class ResourceSettings:
    """What trains: engines, each a process with one device and places for trials. 0: as many as
    the machines have room for (engines), as the engine does well with (slots, threads)."""

    engines: int = 0
    slots: int = 0  # of each engine
    threads_per_engine: int = 0


@dataclass
class SweepSettings(TrialSettings):
    """A member of a sweep: its trials' common settings, and how they are searched."""

    name: str = ""
    storage: str = field(default_factory=lambda: os.environ.get("SPARSETUNE_STORAGE", "./sweeps"))
    trials: int = 20  # of each member
    warm_start: str = ""  # an earlier sweep, or a member of one, whose best settings go first
    objective: Any = "val/accuracy"  # a metric of the last epoch, or a list of them
    constraint: dict[str, float] = field(default_factory=dict)  # metric -> its upper bound
    concurrency: int = 0  # trials at once; 0: as many as there are slots
    failures: int = 3  # of a trial's own, under one driver, after which it has failed
    device: str = "auto"
    engine: str = "auto"  # auto | solo | stacked | csr
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    wandb: WandbSettings = field(default_factory=WandbSettings)
    ray: RaySettings = field(default_factory=RaySettings)
    resources: ResourceSettings = field(default_factory=ResourceSettings)


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
CHOICES: dict[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "density_over": ("all", "sparse"),
    "distribution": DISTRIBUTIONS,
    "data.augment": AUGMENTS,
    "train.precision": ("float32", "bfloat16"),
    "optimizer.name": ("sgd", "adamw"),
    "schedule.name": ("constant", "step", "cosine"),
    "engine": ("auto", "solo", "stacked", "csr"),
    "scheduler.name": ("auto", "asha", "none"),
    "sampler.name": ("tpe", "random", "gp", "nsga2"),
    "wandb.mode": WANDB_MODES,
}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# What a value must be, in words and as a test. Written so that NaN fails each of them.
LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("epochs", "train.batch_size", "trials", "checkpoint.every", "failures"),
        ("1 or more", lambda value: value >= 1),
    ),
    **dict.fromkeys(
        (
            "concurrency",
            "data.limit",
            "scheduler.grace",
            "sampler.startup",
            "seed",
            "resources.engines",
            "resources.slots",
            "resources.threads_per_engine",
        ),
        ("0 or more", lambda value: value >= 0),
    ),
    "order_seed": ("0 or more, or null", lambda value: value is None or value >= 0),
    **dict.fromkeys(
        ("optimizer.lr", "optimizer.eps"),
        ("above 0, up to 1e30", lambda value: 0 < value <= 1e30),
    ),
    "optimizer.weight_decay": ("0 to 1e30", lambda value: 0 <= value <= 1e30),
    **dict.fromkeys(
        ("optimizer.momentum", "optimizer.beta2", "data.validation"),
        ("0 or more and below 1", lambda value: 0 <= value < 1),
    ),
    "schedule.gamma": ("above 0, up to 1", lambda value: 0 < value <= 1),
    "density": ("above 0, up to 1", lambda value: 0 < value <= 1),
    "model.match_density": ("0 to 1; 0 turns it off", lambda value: 0 <= value <= 1),
    **dict.fromkeys(
        ("update.first", "update.stop"),
        ("a share of training, 0 to 1", lambda value: value is None or 0 <= value <= 1),
    ),
    **dict.fromkeys(
        ("update.doublings", "schedule.milestones"),
        (
            "shares of training, 0 to 1",
            lambda value: value is None or all(0 <= share <= 1 for share in value),
        ),
    ),
    "update.every": (
        "epoch, or a number of steps",
        lambda value: value in (None, "epoch") or (_whole(value) and value >= 1),
    ),
    "storage": ("a folder's path or s3://BUCKET/PATH", lambda value: bool(value)),
    "scheduler.reduction": (
        "above 1, up to 3: ASHA that keeps less than a third at an early look "
        "drops settings that would have won",
        lambda value: 1 < value <= 3,
    ),
}
Settings = TypeVar("Settings", bound=TrialSettings)
TYPE_NAMES = {int: "whole number", float: "number", bool: "true or false"}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # one component of a path, on any system


# Keys ---------------------------------------------------------------------------------------------


def _keys(cls: Any, prefix: str = "") -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            keys |= _keys(kind, f"{prefix}{name}.")
        else:
            keys[prefix + name] = kind
    return keys


TRIAL_KEYS = _keys(TrialSettings)
"""Dotted key -> type of its value, of everything that a trial's result depends on."""
KEYS = _keys(SweepSettings)
OPEN = ("hp", "variant", "model.args", "constraint")
"""Dicts: what comes after `hp.` is no key of ours, but a method's."""


def open_key(key: str) -> tuple[str, str] | None:
    """("hp", "zeta") of hp.zeta; None for a key that is a field of its own."""
    for prefix in OPEN:
        if key.startswith(f"{prefix}.") and len(key) > len(prefix) + 1:
            return prefix, key[len(prefix) + 1 :]
    return None


def is_trial_key(key: str) -> bool:
    """Does the key belong to a trial (and not to the search for good ones)?"""
    opened = open_key(key)
    return (key in TRIAL_KEYS and key not in OPEN) if opened is None else opened[0] in TRIAL_KEYS


def check_key(key: str) -> None:
    """ValueError with the nearest keys for one that does not exist."""
    if open_key(key) is not None or (key in KEYS and key not in OPEN):
        return
    if _is_group(key):
        inside = [name for name in KEYS if name.startswith(f"{key}.")]
        raise ValueError(f"{key}: holds other keys; write {', '.join(inside) or key + '.NAME=...'}")
    raise ValueError(f"{key}: no such key; {_nearest(key)}")


def _is_group(key: str) -> bool:
    return key in OPEN or any(name.startswith(f"{key}.") for name in KEYS)


def _nearest(key: str) -> str:
    full = [name for name in KEYS if name not in OPEN]
    full += [
        f"hp.{f.name}" for m in METHODS.values() for f in dataclasses.fields(m.Hyperparameters)
    ]
    full += [f"variant.{f.name}" for m in METHODS.values() for f in dataclasses.fields(m.Variant)]
    # `lr` is as good a slip for optimizer.lr as `optimizer.lrr`: compare with and without group.
    last = key.rpartition(".")[2]
    named = {name: name for name in full} | {name.rpartition(".")[2]: name for name in full}
    near = [
        *difflib.get_close_matches(key, full, n=3),
        *difflib.get_close_matches(last, named, n=3),
    ]
    known = list(dict.fromkeys(named[name] for name in near))[:3]
    if known:
        return f"did you mean {' or '.join(known)}?"
    groups = dict.fromkeys(
        f"{k.split('.')[0]}{'.*' if '.' in k or k in OPEN else ''}" for k in KEYS
    )
    return f"there are: {', '.join(groups)}"


def flatten(given: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested, dotted or mixed keys as dotted ones; which of them exist is not looked at."""
    flat: dict[str, Any] = {}
    for name, value in given.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and _is_group(key):
            flat |= flatten(value, f"{key}.")
        else:
            flat[key] = value
    return flat


# Values -------------------------------------------------------------------------------------------


@cache
def _scratch() -> Any:
    """Typed by the dataclasses: a value assigned to it comes out as its key's type, or raises."""
    return OmegaConf.structured(SweepSettings)


def build(given: Mapping[str, Any]) -> SweepSettings:
    """The settings with these dotted keys set; ValueError for a bad key or a value out of range."""
    return replaced(SweepSettings(), given)


def replaced(settings: Settings, given: Mapping[str, Any]) -> Settings:
    """A copy with these dotted keys set, each checked."""
    settings = copy.deepcopy(settings)
    for key, value in given.items():
        checked = check_value(key, value)
        group, name = open_key(key) or key.rpartition(".")[::2]
        holder: Any = settings
        for part in group.split(".") if group else ():
            holder = getattr(holder, part)
        if isinstance(holder, dict):
            holder[name] = checked
        else:
            setattr(holder, name, checked)
    return settings


def check_value(key: str, value: Any) -> Any:
    """The value as its key's type (1 becomes 1.0 for a number)."""
    check_key(key)
    opened = open_key(key)
    kind = float if opened and opened[0] in ("hp", "constraint") else KEYS.get(key, Any)
    # OmegaConf takes yes and no for numbers, and so does Python.
    if isinstance(value, bool) and kind in (int, float):
        raise ValueError(f"{key}: '{value}' is no {TYPE_NAMES[kind]}")
    if kind is float and isinstance(value, int):
        value = float(value)
    if opened and opened[0] == "constraint" and not _bounds(value):
        raise ValueError(f"{key}: '{value}' is no bound; give a number, such as 0.1")
    if opened and kind is float and not isinstance(value, float):
        raise ValueError(f"{key}: '{value}' is no number")
    scratch = _scratch()
    try:
        if opened is None:
            OmegaConf.update(scratch, key, value, merge=False)
            found = OmegaConf.select(scratch, key)
        else:  # what follows may hold dots, as a layer's name does
            group = OmegaConf.select(scratch, opened[0])
            group[opened[1]] = value
            found = group[opened[1]]
    except OmegaConfBaseException as error:
        raise ValueError(f"{key}: {_why(kind, value, error)}") from error
    found = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
    if opened is None:
        _check_limits(key, found)
    return found


def _bounds(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def trial_settings(nested: Mapping[str, Any]) -> TrialSettings:
    """A trial's settings from a nested (or dotted) dict, such as `settings.to_dict` makes."""
    flat = flatten(nested)
    for key in flat:
        check_key(key)
        if not is_trial_key(key):
            raise ValueError(f"{key}: belongs to a sweep, not to a trial")
    return replaced(TrialSettings(), flat)


def _why(kind: Any, value: Any, error: Exception) -> str:
    if kind in TYPE_NAMES:
        return f"'{value}' is no {TYPE_NAMES[kind]}"
    if _is_list(kind):
        return (
            f"'{value}' is no list of {'words' if 'str' in str(kind) else 'numbers'}; write [a, b]"
        )
    return f"'{value}' does not fit: {str(error).splitlines()[0]}"


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) is list or any(
        typing.get_origin(each) is list for each in typing.get_args(kind)
    )


def _check_limits(key: str, value: Any) -> None:
    users_own = key == "method" and ":" in value  # found, or not, where it is used
    if key in CHOICES and value not in CHOICES[key] and not users_own:
        raise ValueError(
            f"{key}: '{value}' is unknown{suggestion(str(value), CHOICES[key])}; "
            f"known: {', '.join(CHOICES[key])}"
        )
    if key in LIMITS and not LIMITS[key][1](value):
        shown = "an empty value" if value == "" else value
        raise ValueError(f"{key}: {shown} is out of range; allowed: {LIMITS[key][0]}")


def objectives(settings: SweepSettings) -> list[str]:
    """The metrics that are searched for; their directions are in `DIRECTIONS`."""
    given = settings.objective
    return [given] if isinstance(given, str) else list(given)


def check(settings: SweepSettings) -> None:
    """ValueError for what single values do not show: metrics, and early stopping."""
    names = objectives(settings) if isinstance(settings.objective, (str, list)) else []
    if not names or len(set(map(str, names))) < len(names):
        raise ValueError(
            f"objective: {settings.objective} names no metric, or one twice; "
            f"known: {', '.join(DIRECTIONS)}"
        )
    for name in names:
        if not isinstance(name, str) or name not in DIRECTIONS:
            near = suggestion(str(name), DIRECTIONS)
            raise ValueError(f"objective: no metric '{name}'{near}; known: {', '.join(DIRECTIONS)}")
    for name in settings.constraint:
        if name not in DIRECTIONS and not name.startswith(("density/layer/", "method/")):
            raise ValueError(
                f"constraint: no metric '{name}'{suggestion(name, DIRECTIONS)}; known: "
                f"{', '.join(DIRECTIONS)}, density/layer/NAME, method/NAME"
            )
    for name in (*names, *settings.constraint):
        if name.startswith("val/") and not settings.data.validation:
            raise ValueError(
                f"data.validation: 0 leaves no images to measure {name} on; give a share to hold "
                "out, such as data.validation=0.1"
            )
    if settings.scheduler.name == "asha" and len(names) > 1:
        raise ValueError(
            f"scheduler.name: asha compares trials by one objective, and there are {len(names)}; "
            "use scheduler.name=none"
        )
    quarter = quarter_of(settings.epochs)
    grace = settings.scheduler.grace
    if grace and not quarter <= grace <= settings.epochs:
        raise ValueError(
            f"scheduler.grace: {grace} of {settings.epochs} epochs; allowed: {quarter} to "
            f"{settings.epochs}, a quarter or more, because earlier accuracies misrank trials; "
            "0 takes the quarter"
        )


def quarter_of(epochs: int) -> int:
    return max(1, math.ceil(epochs / 4))


# Words --------------------------------------------------------------------------------------------


def parse_words(words: Iterable[str]) -> dict[str, Any]:
    """`key=value` words of a command line as dotted key -> value; the last of a key wins.

    Keys of `search.*` and `start` pass unchecked. `density` comes out as a list of numbers.
    """
    given: dict[str, Any] = {}
    for word in words:
        key, value = _split(word)
        if key == "start" or key.startswith("search."):
            given[key] = _value(word, value) if key != "start" else value
            continue
        given |= {
            k: _listed(word, k, v) for k, v in flatten({key: _typed(word, key, value)}).items()
        }
    return given


def _split(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    key = key.strip()
    if word.startswith("+"):
        raise ValueError(f"'{word}': keys exist already and need no +; write {word.lstrip('+')}")
    if word.startswith("~"):
        raise ValueError(f"'{word}': a key cannot be taken away; write key=value to change it")
    if word.startswith("{"):
        raise ValueError(f"'{word}': no mapping here; write each key alone, as optimizer.lr=0.1")
    if not equals or not key:
        raise ValueError(f"'{word}': write key=value, such as optimizer.lr=0.1")
    if "${" in value:
        raise ValueError(f"'{word}': values cannot refer to others by ${{...}}; write the value")
    return key, value


def _typed(word: str, key: str, value: str) -> Any:
    """A string's value is taken as typed: name=2024 and name=1e3 stay what they are."""
    if KEYS.get(key) is str:
        return value.strip()
    if value.lstrip().startswith(("[", "null")):
        return _value(word, value)
    if _is_list(KEYS.get(key)) or (key in ("density", "objective") and "," in value):
        value = f"[{value}]"
    return _value(word, value)


def _value(word: str, text: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"x={text}"]))["x"]  # type: ignore
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        why = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"'{word}': the value cannot be read: {why}; quote or close it") from error


def _listed(word: str, key: str, value: Any) -> Any:
    if key != "density":
        check_key(key)
        return value if value is None and key not in KEYS else check_value(key, value)
    densities = [check_value(key, each) for each in (value if isinstance(value, list) else [value])]
    if not densities or len(set(densities)) < len(densities):
        raise ValueError(f"'{word}': give each density once, as density=0.02,0.05")
    return densities


def check_name(name: str) -> None:
    """ValueError for what cannot be a folder's name everywhere."""
    if not NAME.fullmatch(name) or name.endswith(".") or len(name) > 100:
        raise ValueError(
            f"name: '{name[:120]}' is no name for a sweep; use up to 100 letters, digits, '.', '_' "
            "and '-', beginning with a letter or digit, as name=mnist-1"
        )


def storage_folder(storage: str) -> Path:
    """The folder (or the s3:// prefix) that holds sweeps; ValueError for what can be none."""
    if storage.startswith(SCHEME) and storage[len(SCHEME) :].strip("/"):
        return place(storage.rstrip("/"))
    if "://" in storage:
        raise ValueError(
            f"storage: '{storage}' is no place for sweeps; give a folder or s3://BUCKET/PATH"
        )
    try:
        folder = Path(storage).expanduser()
        folder.resolve(), folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a null byte
        raise ValueError(
            f"storage: '{storage[:120]}' cannot be a folder ({error}); give storage=FOLDER, or set "
            "SPARSETUNE_STORAGE"
        ) from error
    return folder
