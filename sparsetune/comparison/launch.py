"""Begin a confirmation, or go on with one: what the command does, and what Python calls.

The rule to know: as in `sweeps/launch.py`, whatever is wrong is `Refused` before anything starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sparsetune.comparison import confirm as confirmation
from sparsetune.space.words import as_words, named, said, split
from sparsetune.sweeps.create import Extension
from sparsetune.sweeps.launch import going_on, refusals
from sparsetune.sweeps.unchanged import PLACES


def confirm(
    name: str,
    *,
    seeds: int | None = None,
    top: int | None = None,
    full: bool | None = None,
    multiplier: int = 1,
    density: float | Sequence[float] | None = None,
    storage: str | Path | None = None,
    retry_failed: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Trains the best of a finished search on fresh seeds and reads the winner's test accuracy.

    As `sparsetune confirm` does. `settings`: where runs are trained, such as `device="cuda"`. Of
    each member the dict has how its runs ended, and the test accuracies by the number of the
    setting that won. ValueError for what cannot be confirmed, before Ray starts.
    """
    asked: dict[str, Any] = {"seeds": seeds, "top": top, "full": full, "storage": storage}
    asked |= {"multiplier": None if multiplier == 1 else multiplier, "density": density}
    return carry_out(as_words(name, **said(asked), **settings), retry_failed)


def carry_out(words: Sequence[str], retry_failed: bool = False) -> dict[str, Any]:
    """What `sparsetune confirm` does that these words follow."""
    with ExitStack() as stack:
        with refusals():
            names, settings = split(words)
            own = [word for word in settings if word.partition("=")[0] in confirmation.KEYS]
            asked = confirmation.parse(own)
            rest = [word for word in settings if word not in own]
            name, places = named([*names, *rest], PLACES)
            storage = places.pop("storage")
            if not name:
                raise ValueError("confirm: give the name of a sweep, or SWEEP/MEMBER")
            wanted = Extension(places=places, retry_failed=retry_failed)
            begun = confirmation.begun(storage, name, asked, wanted, words)
            confirmations = stack.enter_context(begun)
        with going_on(confirmation.command(confirmations)):
            return confirmation.run(confirmations)
