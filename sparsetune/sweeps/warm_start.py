"""A sweep that starts from another one: the best settings found there are tried first here.

The rule to know: settings go over, values do not. A value measured on other data or at another
density is no value of this search, and Optuna would compare the two; so each setting is trained
again, is one of the sweep's trials, and stands in its header among the start points: the earlier
sweep is not needed any more once this one has begun.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from sparsetune.space.member import Member, Sweep, load_member
from sparsetune.space.resolve import check_members
from sparsetune.store import journal
from sparsetune.store.layout import member_folders
from sparsetune.sweeps.status import feasible, front

BEST = 5  # settings taken over; an earlier search has more to say only where nothing has changed


def warmed(sweep: Sweep) -> Sweep:
    """The sweep with start points warm-1, warm-2, ... where its `warm_start` asks for them."""
    name = sweep.settings.warm_start
    if not name:
        return sweep
    try:
        earlier = [load_member(folder) for folder in member_folders(sweep.storage, name)]
    except ValueError as error:
        raise ValueError(f"warm_start: {error}") from error
    members = [_warmed(member, name, earlier) for member in sweep.members]
    check_members(members)
    return dataclasses.replace(sweep, members=members)


def _warmed(member: Member, name: str, earlier: list[tuple[Member, journal.Record]]) -> Member:
    same = [pair for pair in earlier if pair[0].traits.name == member.traits.name]
    if not same:
        methods = ", ".join(dict.fromkeys(other.traits.name for other, _ in earlier))
        raise ValueError(
            f"warm_start: '{name}' searched {methods}, and {member.name} is about "
            f"{member.traits.name}; name a sweep or member of that method"
        )

    def distance(pair: tuple[Member, journal.Record]) -> tuple[bool, float]:
        other, _ = pair
        factor = (other.density or 1.0) / (member.density or 1.0)
        return other.space.name != member.space.name, abs(math.log(factor))

    source, record = min(same, key=distance)
    if source.objectives != member.objectives:
        raise ValueError(
            f"warm_start: {source.name} was searched for {', '.join(source.objectives)}, and "
            f"{member.name} is for {', '.join(member.objectives)}; its best would be others, so "
            "give the same objective, or leave warm_start out"
        )
    best = front(source, record)
    if len(source.objectives) == 1:
        sign = 1 if source.directions[0] == "maximize" else -1
        metric = source.objectives[0]
        best = sorted(feasible(source, record), key=lambda t: -sign * t.reports[-1].metrics[metric])
    points: dict[str, dict[str, Any]] = {}
    for trial in best:
        values = {k: v for k, v in trial.params.items() if k in member.space.search}
        # What a start point fixed besides belongs to its setting, and the space has it anyway.
        fits = trial.in_study and member.space.point("warm", values).in_study
        if fits and values not in points.values():
            points[f"warm-{len(points) + 1}"] = values
    if not points:
        raise ValueError(
            f"warm_start: {source.name} has {len(best)} finished trials that keep its constraint, "
            f"and none lies in the ranges of {member.space.file}; "
            + ("widen them by search.KEY.low=..., .high=..., " if best else "let it finish some, ")
            + "or leave warm_start out"
        )
    start = member.space.start | dict(list(points.items())[:BEST])
    return dataclasses.replace(member, space=dataclasses.replace(member.space, start=start))
