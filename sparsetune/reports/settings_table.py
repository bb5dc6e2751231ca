"""The settings as people look them up: a table of all, or what is known of one.

The rule to know: nothing is said here that does not stand at a field of `settings.py`, or at one of
a method's.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from sparsetune.methods import METHODS
from sparsetune.settings import Key, SweepSettings, group_of
from sparsetune.space import config, keys
from sparsetune.sweeps.unchanged import PLACES
from sparsetune.terminal import wide_console

KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}
KINDS |= {list[int]: "list of whole numbers", list[float]: "list of numbers"}
KINDS |= {list[str]: "list of words", dict[str, float]: "number"}


class Row(NamedTuple):
    key: str
    allowed: str
    default: str
    meaning: str


def rows(key: str = "") -> list[Row]:
    """Of all settings; or of the one that `key` names, or of those in the group of that name.

    ValueError, with the nearest ones, where there is none.
    """
    settings = [_row(name, known) for name, known in config.KEYS.items()]
    if not key:
        return settings
    named = [row for row in (*settings, *_of_methods()) if f"{row.key}.".startswith(f"{key}.")]
    group = (config.open_key(key) or ("",))[0]
    if not named and group not in ("hp", "variant"):  # a name there is the user's
        named = [row for row in settings if row.key == f"{group}.NAME"]
    if not named:
        raise ValueError(f"{key}: no such key; {config.nearest(key)}")
    return named


def _row(key: str, known: Key) -> Row:
    if known.choices:
        allowed = " | ".join(known.choices)
    else:
        kind = "" if known.kind is str and known.allowed else KINDS.get(known.kind, "")
        allowed = ", ".join(filter(None, (kind, known.allowed)))
    name = f"{key}.NAME" if key in config.OPEN else key
    return Row(name, allowed, _written(known.default), known.meaning)


def _of_methods() -> list[Row]:
    own = []
    for method in METHODS.values():
        for field in dataclasses.fields(method.Variant):
            allowed = " | ".join(field.metadata["allowed"])
            own.append(Row(f"variant.{field.name}", allowed, str(field.default), method.name))
        for field in dataclasses.fields(method.Hyperparameters):
            bounds = field.metadata
            allowed = f"number, {bounds['low']:g} to {bounds['high']:g}"
            meaning = f"{method.name}: {bounds['meaning']}"
            own.append(Row(f"hp.{field.name}", allowed, f"{field.default:g}", meaning))
    return own


def _written(value: Any) -> str:
    """A default as one would write it."""
    if isinstance(value, str) or value == {}:
        return value or ""
    return json.dumps(value)


def markdown(key: str = "") -> str:
    lines = [Row._fields, ("---",) * len(Row._fields)]
    lines += [(f"`{row.key}`", *row[1:]) for row in rows(key)]
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


def print_settings(key: str = "") -> None:
    """The table; of a single setting all that is known, line by line."""
    console, chosen = wide_console(), rows(key)
    alone = key in config.KEYS and key not in config.OPEN
    table = Table(box=None, header_style="bold", pad_edge=False, show_header=not alone)
    if alone:
        (row,) = chosen
        console.print(Text(f"{key}: {row.meaning}"))
        table.add_row("allowed", Text(row.allowed))
        table.add_row("default", Text(row.default or "empty"))
        table.add_row("belongs to", Text(_belongs(key)))
    else:
        top = {field.name for field in dataclasses.fields(SweepSettings)}
        group = group_of(SweepSettings, key) if key in top else None
        if group is not None:
            console.print(Text(str(group.__doc__)))
        for heading in Row._fields:
            table.add_column(heading, overflow="fold")
        for row in chosen:
            table.add_row(*map(Text, row))
    console.print(table)


def _belongs(key: str) -> str:
    if not config.is_trial_key(key):
        changed = ", and resume may change it" if key in (*PLACES, "trials") else ""
        return f"a sweep: no result of a trial depends on it{changed}"
    if keys.same_for_all(key):
        return "a trial: its result depends on it; the same for all trials of a search"
    short = {full: name for name, full in keys.SHORT.items()}.get(key)
    return (
        f"a trial: its result depends on it; a space may search it{f', as {short}' * bool(short)}"
    )
