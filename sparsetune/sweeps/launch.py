"""Begin a sweep, or go on with one: what the commands do, and what Python calls.

The rule to know: words -> settings -> spaces -> members -> journals -> `run`, once and in this
order. Whatever is wrong with the words is `Refused` before anything is written or started.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from sparsetune.cluster.fleet import ClusterError
from sparsetune.cluster.tuner import check_cluster
from sparsetune.search.sampler import examples
from sparsetune.settings import to_dict
from sparsetune.space.member import Sweep, scheduling
from sparsetune.space.resolve import Command, resolve
from sparsetune.space.words import as_words, named, said, split
from sparsetune.store.layout import resume_command, sweeps
from sparsetune.store.lock import SweepHeld
from sparsetune.store.paths import CheckpointLost, StorageAway
from sparsetune.sweeps import run
from sparsetune.sweeps.create import Extension, Writable, created, opened, undo
from sparsetune.sweeps.unchanged import PLACES
from sparsetune.sweeps.warm_start import warmed

Result = dict[str, Any]
"""What `sparsetune status --json` prints of a sweep."""


class Refused(ValueError):
    """Something that was asked for cannot be; nothing was written or started."""


def sweep(
    spaces: str | Path | Sequence[str | Path],
    *,
    name: str,
    density: float | Sequence[float] | None = None,
    storage: str | Path | None = None,
    **settings: Any,
) -> Result:
    """Searches the settings of one or several spaces, as `sparsetune sweep` does.

    sweep("set", name="first", density=[0.02, 0.05], trials=40, optimizer={"momentum": 0.9})

    `spaces`: names of shipped ones, or paths of yaml files. `settings`: the keys of the command
    line, nested or dotted: `**{"search.zeta.high": 0.7}`. Comes back when the sweep has ended or
    was interrupted, which its "state" says. ValueError for what cannot be, before Ray starts.
    """
    specs = [spaces] if isinstance(spaces, str | Path) else spaces
    common = said({"name": name, "density": density, "storage": storage})
    return begin("sweep", as_words(*specs, **common, **settings))


def resume(
    name: str,
    *,
    trials: int | None = None,
    storage: str | Path | None = None,
    retry_failed: bool = False,
    allow_wider: bool = False,
    **settings: Any,
) -> Result:
    """Goes on with a sweep, or a member of one, as `sparsetune resume` does.

    `settings`: where trials run, such as `device="cuda"`, and with `allow_wider` ranges that become
    wider, `**{"search.zeta.high": 0.7}`; whatever else is given must be what the sweep has.
    """
    words = as_words(name, **said({"trials": trials, "storage": storage}), **settings)
    return go_on(words, retry_failed, allow_wider)


def begin(command: Command, words: Sequence[str]) -> Result:
    """What the command does that these words follow."""
    with ExitStack() as stack:
        with refusals():
            asked = _resolved(command, words)
            if command == "sweep":
                check_cluster(asked.settings.ray, asked.storage)
                print(f"Early stopping: {scheduling(asked.members).reason}.", file=sys.stderr)
            members = stack.enter_context(created(asked, command, words))
        return _drive(members, new=True)


def go_on(words: Sequence[str], retry_failed: bool = False, allow_wider: bool = False) -> Result:
    """What `sparsetune resume` does that these words follow."""
    with ExitStack() as stack:
        with refusals():
            names, _ = split(words)
            spaces = names if any(word.startswith("name=") for word in words) else names[1:]
            if spaces:
                raise ValueError(
                    f"resume: '{spaces[0]}': a sweep goes on with the spaces that it began with; "
                    "give its name, and wider ranges as search.KEY.high=B with --allow-wider"
                )
            name, settings = named(words, allowed=None)
            storage, trials = settings.pop("storage"), settings.pop("trials", None)
            if not name:
                known = ", ".join(sweeps(storage)) or "none"
                raise ValueError(f"resume: give the name of a sweep; there are: {known}")
            places = {key: settings.pop(key) for key in PLACES if key in settings}
            wanted = Extension(trials, places, settings, allow_wider, retry_failed)
            members = stack.enter_context(opened(storage, name, wanted))
        return _drive(members)


def preview(words: Sequence[str]) -> str:
    """The settings of each member as yaml, and the trials that would come first."""
    with refusals():
        members = _resolved("sweep", words).members
    lines = []
    for member in members:
        lines += [f"# {member.name}", yaml.safe_dump(to_dict(member.settings), sort_keys=False)]
        points, trials = member.space.points(), member.settings.trials
        for number, point in enumerate(points[:trials]):
            values = point.params | point.fixed
            lines.append(f"# trial {number}, start point {point.name}: {values}")
        further = range(len(points), min(len(points) + 3, trials))
        for number, params in zip(further, examples(member, len(further)), strict=True):
            lines.append(f"# trial {number}, such as: {params}")
        lines.append("")
    lines.append(f"# Early stopping: {scheduling(members).reason}.")
    return "\n".join([*lines, "# Dry run: nothing was started."])


def _resolved(command: Command, words: Sequence[str]) -> Sweep:
    spaces, settings = split(words)
    return warmed(resolve(spaces, settings, command))


def _drive(members: list[Writable], new: bool = False) -> Result:
    again = resume_command(members[0].folder.parent)
    with going_on(again):
        try:
            return run.run(members)
        except ClusterError as error:
            if new and undo(members):
                raise Refused(
                    f"{error}\nNothing was begun; the same command can be given again."
                ) from error
            raise


@contextmanager
def refusals() -> Iterator[None]:
    """Within it whatever is wrong is the user's to change."""
    try:
        yield
    except (ValueError, SweepHeld, StorageAway) as error:
        raise Refused(str(error)) from error


@contextmanager
def going_on(command: str) -> Iterator[None]:
    """Has what ends a driver, and is no bug, say how to go on."""
    try:
        yield
    except (CheckpointLost, ClusterError, StorageAway) as error:
        error.add_note(f"Go on by: {command}")
        raise
