"""What may change of a sweep when it goes on: where it runs, how many trials, and wider ranges.

The rule to know: trials that were trained by other code, on other data or from another space belong
to another search. So whatever a result depends on is compared with the journal, and a difference is
refused line by line, as it was and as it would be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from sparsetune.settings import to_dict
from sparsetune.space import config
from sparsetune.space.member import Member
from sparsetune.space.resolve import reworded
from sparsetune.space.space import Space
from sparsetune.store.lines import Event
from sparsetune.sweeps import source_code
from sparsetune.training.data import Dataset
from sparsetune.training.data import load as load_data

PLACES = (
    "concurrency", "device", "engine", "failures", "ray.address", "resources.engines",
    "resources.slots", "resources.threads_per_engine", "wandb.mode",
)  # fmt: skip
"""Settings that no result depends on, so that a sweep may go on elsewhere."""
ELSEWHERE = "or begin a sweep under another name; warm_start={} makes it try this one's best first"


def code(member: Member) -> dict[str, dict[str, str]]:
    """The texts or hashes of the code that the member's results depend on, for its header."""
    settings = member.settings
    named = [settings.data.name, settings.model.name, settings.method]
    for values in (member.space.fixed, *member.space.start.values()):
        named.append(str(values.get("model.name", "")))
    if "model.name" in member.space.search:
        named += map(str, member.space.search["model.name"].choices)
    return {
        "users": source_code.users(dict.fromkeys(named)),
        "method": source_code.of_method(settings.method),
    }


def datasets(members: Iterable[Member]) -> list[Dataset]:
    """Each member's images, which are read once where members share them."""
    settings = [member.settings.data for member in members]
    different = {repr(own): own for own in settings}
    loaded = {key: load_data(own) for key, own in different.items()}
    return [loaded[repr(own)] for own in settings]


def check_unchanged(member: Member, header: Event, fingerprint: str) -> None:
    """ValueError where the code or the data, now of this fingerprint, is not what the search began
    with."""
    sweep = member.name.partition("/")[0]
    now, then = code(member), header.get("code", {})
    if "users" in then and (lines := source_code.changes(then["users"], now["users"])):
        raise ValueError(
            f"code: your modules have changed since '{member.name}' began:\n{lines}\n"
            f"put the old code back, {ELSEWHERE.format(sweep)}"
        )
    if "method" in then and (lines := source_code.changes(then["method"], now["method"])):
        version = header.get("versions", {}).get("sparsetune", "?")
        name = member.settings.method
        rule = "part of every method" if ":" in name else name
        raise ValueError(
            f"code: sparsetune's own {rule} has changed since '{member.name}' began "
            f"with version {version}:\n{lines}\ninstall that version, {ELSEWHERE.format(sweep)}"
        )
    if header["data"] != fingerprint:
        raise ValueError(
            f"data: the images of {member.settings.data.name} have changed since '{member.name}' "
            f"began (fingerprint {header['data'][:12]}, now {fingerprint[:12]}); put the old data "
            f"back, {ELSEWHERE.format(sweep)}"
        )


def wider(members: list[Member], settings: Mapping[str, Any], allowed: bool) -> list[Space | None]:
    """The wider space of each member that the settings ask for; None where they ask for what there
    is. ValueError for every other difference, and for wider ranges that were not `allowed`."""
    if not settings:
        return [None] * len(members)
    asked = reworded(members, settings)
    return [_wider(then, now, allowed) for then, now in zip(members, asked, strict=True)]


def _wider(then: Member, now: Member, allowed: bool) -> Space | None:
    old, new = _described(then), _described(now)
    differences = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if not differences:
        return None
    lines = [f"  {k}: {_shown(old.get(k))} -> {_shown(new.get(k))}" for k in differences]
    about = "\n".join([f"space: '{then.name}' has begun with other settings:", *lines])
    end = f"leave them as they were, {ELSEWHERE.format(then.name.partition('/')[0])}"
    if not all(_widens(key, then.space, now.space) for key in differences):
        if any(key.endswith(".choices") for key in differences):
            end = f"Optuna cannot search other choices in a study that has begun; {end}"
        raise ValueError(f"{about}\n{end}")
    if not allowed:
        raise ValueError(f"{about}\nranges may become wider: add --allow-wider, or {end}")
    # Start points stay what they are, those of a warm start among them.
    return dataclasses.replace(then.space, search=now.space.search)


def _described(member: Member) -> dict[str, Any]:
    """Dotted key -> value of all that the search depends on."""
    settings = config.flatten(to_dict(member.settings))
    without = (*PLACES, "name", "storage", "trials")
    described = {k: v for k, v in settings.items() if k not in without}
    for key, dimension in member.space.search.items():
        described |= {f"search.{key}.{word}": v for word, v in dimension.to_dict().items()}
    for name, values in member.space.start.items():
        if not name.startswith("warm-"):
            described |= {f"start.{name}.{key}": value for key, value in values.items()}
    return described


def _widens(key: str, then: Space, now: Space) -> bool:
    """Is this a bound that moved outwards, with all old values still possible?"""
    searched, _, word = key.removeprefix("search.").rpartition(".")
    if not key.startswith("search.") or word not in ("low", "high"):
        return False
    old, new = then.search.get(searched), now.search.get(searched)
    if old is None or new is None or None in (old.low, old.high, new.low, new.high):
        return False
    assert old.high is not None and new.high is not None
    return type(old.low) is type(new.low) and old.low in new and old.high <= new.high


def _shown(value: Any) -> str:
    return "-" if value in (None, "") else str(value)
