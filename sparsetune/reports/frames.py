"""Sweeps as pandas frames, for whoever analyses them.

The rule to know: one row is one epoch of one trial, and every column has one type, so that
`df.groupby(["method", "density"])` and plots work without preparation. It is read from the journals
alone, as `status` does, so it works while a sweep runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetune.comparison.winners import confirmations, role
from sparsetune.settings import to_dict
from sparsetune.space import config
from sparsetune.space.member import Member, load_member
from sparsetune.space.words import storage_folder
from sparsetune.store import journal
from sparsetune.store.layout import member_folders

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
Part = tuple[str, journal.Record, Member]  # kind, what its journal says, its settings
WORDS = ("sweep", "member", "space", "method", "kind", "role", "status")
COUNTS = ("trial", "seed", "epoch")
FIRST = [*WORDS[:4], "density", "trial", *WORDS[4:], "seed", "epoch"]  # the order of columns


def load(name: str, storage: str | Path | None = None) -> pd.DataFrame:
    """All trials and epochs of a sweep, or of one member `NAME/set@0.05`, one row per epoch.

    `storage`: where the sweep is, as on the command line. ValueError where there is no such sweep.

    sweep, member, space, method; density (asked for; 1 where dense, NaN where none was)
    trial     its number in the search; for a run of the confirmation, of the trial it repeats
    kind      search, or confirm (confirm-2x) for the runs of `sparsetune confirm`
    role      where a trial of the search came from (sampler, start:paper, ...), and what a run of
              the confirmation is for (rank, final, paper)
    status    finished, stopped, diverged, failed, running
    seed, epoch; a trial that has no epoch yet is one row, whose epoch is <NA>
    METRIC    such as val/accuracy; test/accuracy stands in the last epoch of runs that were tested
    config.KEY  every key that any of the trials searches or fixes, of all trials
    """
    import pandas as pd

    folders = member_folders(storage_folder(storage), name)
    parts = [part for folder in folders for part in _parts(folder)]
    asked = {key for _, _, member in parts for key in member.space.fixed}
    trials = [trial for _, record, _ in parts for trial in record.trials.values()]
    asked |= {key for trial in trials for key in trial.params | trial.fixed}
    keys = sorted(filter(config.is_trial_key, asked))
    rows = [row for part in parts for row in _rows(*part, keys)]
    named = dict.fromkeys(key for row in rows for key in row)  # in the order in which they came
    metrics = [key for key in named if key not in FIRST and not key.startswith("config.")]
    configs = [f"config.{key}" for key in keys]
    # Objects first: pandas would take whole numbers with gaps for floats.
    frame = pd.DataFrame(rows, columns=[*FIRST, *metrics, *configs], dtype=object)
    types = dict.fromkeys(WORDS, "string") | dict.fromkeys(COUNTS, "Int64")
    types |= dict.fromkeys(["density", *metrics], "float64")
    return frame.astype(types | {key: _type(frame[key].dropna()) for key in configs})


def _parts(folder: Path) -> Iterator[Part]:
    """The member's search, then its confirmations."""
    for path in [folder, *confirmations(folder).values()]:
        member, record = load_member(path)
        yield "search" if path == folder else path.name, record, member


def _rows(kind: str, record: journal.Record, member: Member, keys: list[str]) -> Iterator[Row]:
    settings = config.flatten(to_dict(member.settings))
    settings["epochs"] *= record.header.get("confirm", {}).get("multiplier", 1)
    whole = member.traits.name == "dense" and member.density is None
    for trial in record.trials.values():
        own = settings | trial.params | trial.fixed
        origin, number = (trial.origin, trial.number) if kind == "search" else role(trial)
        row = {
            "sweep": member.name.partition("/")[0],
            "member": member.name,
            "space": member.space.name,
            "method": member.traits.name,
            "density": 1.0 if whole else member.density,
            "trial": number,
            "kind": kind,
            "role": origin,
            "status": trial.status,
            "seed": own["seed"],
        }
        for key in keys:  # what can be grouped by: a list as its text
            value = own.get(key)
            row[f"config.{key}"] = str(value) if isinstance(value, (list, dict)) else value
        for epoch, metrics, _ in trial.reports:
            tested = (trial.test or {}) if epoch == len(trial.reports) else {}
            yield row | metrics | tested | {"epoch": epoch}
        if not trial.reports:
            yield row


def _type(values: pd.Series[Any]) -> str:
    kinds = {type(value) for value in values}
    if kinds and kinds <= {int, float}:
        return "float64" if float in kinds else "Int64"
    return "boolean" if kinds == {bool} else "string"
