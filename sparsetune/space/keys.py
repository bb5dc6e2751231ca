"""The keys that a search space may hold: short names and dotted ones, their defaults and values.

The rule to know: which keys there are depends on the method. `zeta` is `hp.zeta` of a method that
has it; `lr` is `optimizer.lr` for all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sparsetune.methods import Method
from sparsetune.methods.contract import check_number, make_variant
from sparsetune.names import suggestion
from sparsetune.settings import TrialSettings
from sparsetune.space import config
from sparsetune.space.config import KEYS

SHORT = {name: f"optimizer.{name}" for name in ("lr", "weight_decay", "momentum")}
# Trials that differ in one of these cannot be compared.
SAME_FOR_ALL = ("method", "epochs", "seed", "order_seed", "density_over", "dense_layers")


class SpaceError(ValueError):
    """A space that cannot be searched; says file, key, what is allowed."""


def own(method: Method) -> dict[str, str]:
    """Short name -> dotted key, of the method's hyperparameters and variants."""
    hp = {f.name: f"hp.{f.name}" for f in dataclasses.fields(method.Hyperparameters)}
    return hp | {f.name: f"variant.{f.name}" for f in dataclasses.fields(method.Variant)}


def dotted(method: Method, key: str) -> str | None:
    """The full name of a key, short or dotted; None where trials of this method have none."""
    short = SHORT | own(method)
    if key in short:
        return short[key]
    if key.startswith(("hp.", "variant.")):
        return key if key in short.values() else None
    return key if config.is_trial_key(key) else None


def canonical(method: Method, key: str, place: str) -> str:
    """`dotted`; SpaceError, opening with the place, where there is no such key."""
    full = dotted(method, key)
    if full is not None:
        return full
    if key in KEYS or key.startswith("constraint."):
        raise SpaceError(
            f"{place}: '{key}' is no setting of a single trial; give it on the command line, as "
            f"{key}=..."
        )
    near = suggestion(key.rpartition(".")[2], [*own(method), *SHORT]) or suggestion(key, KEYS)
    has = ", ".join(own(method)) or "none of its own"
    raise SpaceError(
        f"{place}: '{key}' is no hyperparameter of {method.name}{near}{'' if near else ';'} "
        f"it has: {has}; besides: {', '.join(SHORT)}, and settings such as update.every"
    )


def default(method: Method, key: str) -> Any:
    """The value of a dotted key that nobody set; None for a key without one."""
    group, _, name = key.partition(".")
    if group in ("hp", "variant"):
        cls = method.Hyperparameters if group == "hp" else method.Variant
        return next(f.default for f in dataclasses.fields(cls) if f.name == name)
    return config.flatten(dataclasses.asdict(TrialSettings(method=method.name))).get(key)


def check_value(method: Method, key: str, value: Any) -> Any:
    """The value as its key's type; ValueError, opening with the key, for one not allowed."""
    group, _, name = key.partition(".")
    if group == "hp":
        return check_number(method, name, value)
    if group == "variant":
        return getattr(make_variant(method, {name: value}), name)
    return config.check_value(key, value)


def same_for_all(key: str) -> bool:
    """Must all trials of a search share it?"""
    return key in SAME_FOR_ALL or (key.startswith("data.") and key != "data.augment")
