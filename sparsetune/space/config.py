"""Words and yaml as settings: keys by their dotted names, values as their keys' types.

The rule to know: everywhere a setting has one flat, dotted name (`optimizer.lr`, `hp.zeta`,
`constraint.density/all`), from yaml and command line to the journal and W&B. A value is checked
as soon as it is read, so that what is wrong is said with its key before anything starts; what is
allowed stands at the fields of `settings.py`.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsetune import settings as fields
from sparsetune.methods import METHODS
from sparsetune.names import suggestion
from sparsetune.settings import DIRECTIONS, SweepSettings, TrialSettings, keys_of, unknown
from sparsetune.store.paths import SCHEME, place

Settings = TypeVar("Settings", bound=TrialSettings)
Words = TypeVar("Words")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # one component of a path, on any system
NO_SUCH = {int: "no whole number", float: "no number", bool: "neither true nor false"}


# Keys ---------------------------------------------------------------------------------------------

TRIAL_KEYS = keys_of(TrialSettings)
"""Everything that a trial's result depends on."""
KEYS = keys_of(SweepSettings)
OPEN = tuple(key for key, known in KEYS.items() if typing.get_origin(known.kind) is dict)
"""hp, variant, model.args, constraint: what comes after `hp.` is no key of ours, but a method's."""


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
    raise ValueError(f"{key}: no such key; {nearest(key)}")


def _is_group(key: str) -> bool:
    return key in OPEN or any(name.startswith(f"{key}.") for name in KEYS)


def nearest(key: str) -> str:
    """What somebody may have meant by a key that does not exist, or else all groups of keys."""
    full = [name for name in KEYS if name not in OPEN]
    for method in METHODS.values():
        full += [f"hp.{field.name}" for field in dataclasses.fields(method.Hyperparameters)]
        full += [f"variant.{field.name}" for field in dataclasses.fields(method.Variant)]
    # `lr` is as good a slip for optimizer.lr as `optimizer.lrr`: compare with and without group.
    named = {name.rpartition(".")[2]: name for name in full} | {name: name for name in full}
    for written in (key, key.rpartition(".")[2]):
        if near := difflib.get_close_matches(written, named, n=3):
            return f"did you mean {' or '.join(dict.fromkeys(named[name] for name in near))}?"
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
    if opened := open_key(key):
        return _open_value(*opened, value)
    if key == "method" and ":" not in str(value) and value not in METHODS:
        raise unknown(key, value, METHODS)
    return _field_value(SweepSettings, key, value)


def _open_value(group: str, name: str, value: Any) -> Any:
    """A value of a dict, such as hp; its name may hold dots, as a layer's does."""
    key = f"{group}.{name}"
    if group in ("hp", "constraint"):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if group == "constraint" and not (is_number and math.isfinite(value)):
            raise ValueError(f"{key}: '{value}' is no bound; give a number, such as 0.1")
        if not is_number:
            raise ValueError(f"{key}: '{value}' is no number")
        return float(value)
    try:
        return OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=True)["value"]  # type: ignore
    except OmegaConfBaseException as error:
        raise ValueError(f"{key}: {_why(Any, value, error)}") from error


def _field_value(cls: type, key: str, value: Any) -> Any:
    """The value as this field of `cls` takes it. ValueError for one that it does not take."""
    kind = keys_of(cls)[key].kind
    # OmegaConf takes yes and no for numbers, and so does Python.
    if isinstance(value, bool) and kind in (int, float):
        raise ValueError(f"{key}: '{value}' is {NO_SUCH[kind]}")
    if kind is float and isinstance(value, int):
        value = float(value)
    scratch = _scratch(cls)
    try:
        OmegaConf.update(scratch, key, value, merge=False)
        taken = OmegaConf.select(scratch, key)
    except OmegaConfBaseException as error:
        raise ValueError(f"{key}: {_why(kind, value, error)}") from error
    taken = OmegaConf.to_container(taken) if OmegaConf.is_config(taken) else taken
    fields.check_value(key, taken, cls)
    return taken


@cache
def _scratch(cls: type) -> Any:
    """Typed by the dataclass: a value assigned to it comes out as its key's type, or raises."""
    scratch = OmegaConf.structured(cls)
    OmegaConf.set_readonly(scratch, False)  # as it is where the dataclass is frozen
    return scratch


def trial_settings(nested: Mapping[str, Any]) -> TrialSettings:
    """A trial's settings from a nested (or dotted) dict, such as `settings.to_dict` makes."""
    flat = flatten(nested)
    for key in flat:
        check_key(key)
        if not is_trial_key(key):
            raise ValueError(f"{key}: belongs to a sweep, not to a trial")
    return replaced(TrialSettings(), flat)


def _why(kind: Any, value: Any, error: Exception) -> str:
    if kind in NO_SUCH:
        return f"'{value}' is {NO_SUCH[kind]}"
    if _is_list(kind):
        what = "words" if kind == list[str] else "numbers"
        return f"'{value}' is no list of {what}; write [a, b]"
    return f"'{value}' does not fit: {str(error).splitlines()[0]}"


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) is list


def objectives(settings: SweepSettings) -> list[str]:
    """The metrics that are searched for; their directions are in `DIRECTIONS`."""
    objective = settings.objective
    return [objective] if isinstance(objective, str) else list(objective)


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
        kind = KEYS[key].kind if key in KEYS else Any
        given |= {
            k: _listed(word, k, v)
            for k, v in flatten({key: _typed(word, key, value, kind)}).items()
        }
    return given


def read(cls: type[Words], words: Iterable[str]) -> Words:
    """The dataclass of a command's own words, such as `seeds=5`, which are its fields."""
    given, known = {}, keys_of(cls)  # type: ignore[arg-type]
    for word in words:
        key, value = _split(word)
        given[key] = _field_value(cls, key, _typed(word, key, value, known[key].kind))
    return cls(**given)


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


def _typed(word: str, key: str, value: str, kind: Any) -> Any:
    """A string's value is taken as typed: name=2024 and name=1e3 stay what they are."""
    if kind is str:
        return value.strip()
    if value.lstrip().startswith(("[", "null")):
        return _value(word, value)
    if _is_list(kind) or (key in ("density", "objective") and "," in value):
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
    values = value if isinstance(value, list) else [value]
    densities = [check_value(key, density) for density in values]
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
    if storage.startswith("s3:/") and not storage.startswith(SCHEME):  # pathlib's one slash of two
        storage = SCHEME + storage.removeprefix("s3:/")
    if storage.startswith(SCHEME) and storage[len(SCHEME) :].strip("/"):
        return place(storage.rstrip("/"))
    if "://" in storage:
        raise ValueError(
            f"storage: '{storage}' is no place for sweeps; give a folder or s3://BUCKET/PATH"
        )
    try:
        folder = Path(storage).expanduser()
        folder.resolve()
        folder.is_dir()  # neither answer matters here, only what they raise
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a null byte
        raise ValueError(
            f"storage: '{storage[:120]}' cannot be a folder ({error}); give storage=FOLDER, or set "
            "SPARSETUNE_STORAGE"
        ) from error
    return folder
