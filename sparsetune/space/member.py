"""Members of a sweep: one search space at one density, and what all of them share.

The rule to know: a member is a value, and fits into its journal's header. So a sweep goes on
without the yaml files it began with (`resolve.py` makes members from a command line).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from sparsetune.methods import Method, find
from sparsetune.settings import DIRECTIONS, SweepSettings, TrialSettings, to_dict
from sparsetune.space import config
from sparsetune.space.space import Space
from sparsetune.space.traits import Traits, traits_of
from sparsetune.store import journal
from sparsetune.store.journal import Record
from sparsetune.store.layout import member_folders

DENSITY_BOUND = "constraint.density/all"


@dataclass(frozen=True)
class Member:
    """One search of a sweep. `density` is what its name says; None where the name has none."""

    name: str  # "mnist/set@0.05"
    space: Space
    settings: SweepSettings
    density: float | None
    said: Traits | None = field(default=None, compare=False)  # by its journal

    @property
    def traits(self) -> Traits:
        return self.said or traits_of(self.method)

    @property
    def method(self) -> Method:
        return find(self.settings.method)

    @property
    def objectives(self) -> list[str]:
        return config.objectives(self.settings)

    @property
    def directions(self) -> list[Literal["maximize", "minimize"]]:
        return [DIRECTIONS[name] for name in self.objectives]

    def trial_settings(self, params: Mapping[str, Any], fixed: Mapping[str, Any]) -> TrialSettings:
        """A trial's settings: the member's, with what is searched and what the trial fixes.

        The seed is the sweep's for all trials: they share the split, the batches and the start.
        """
        names = [f.name for f in dataclasses.fields(TrialSettings)]
        base = TrialSettings(**{name: getattr(self.settings, name) for name in names})
        return config.replaced(base, {**params, **fixed})

    def constraint(self, metrics: Mapping[str, float]) -> float:
        """How far the bounds are passed, in sum; 0 without any, NaN where a metric is missing."""
        over = [
            metrics.get(name, math.nan) - bound for name, bound in self.settings.constraint.items()
        ]
        return sum((0.0 if excess <= 0 else excess for excess in over), 0.0)

    def run_name(self, params: Mapping[str, Any], number: int) -> str:
        """Readable, such as set-d0.05-zeta0.31-s0; not unique, which W&B does not ask for.

        `params` are dotted keys; a trial's own fixed ones may be among them.
        """
        own = {key: value for key, value in params.items() if key.startswith("hp.")}
        if not own:  # a control: its trials differ in what all methods share
            own = {key: params[key] for key in ("optimizer.lr",) if key in params}
        density = params.get("density", self.density)
        parts = [self.space.name, *([] if density is None else [f"d{density:.3g}"])]
        parts += [f"{key.rpartition('.')[2]}{value:.2g}" for key, value in own.items()]
        return "-".join([*parts, f"s{params.get('seed', self.settings.seed)}"])

    def to_header(self) -> dict[str, Any]:
        """For the journal's first event; `from_header` makes the same member of it."""
        return {
            "member": self.name,
            "density": self.density,
            "space": self.space.to_dict(),
            "settings": to_dict(self.settings),
            "method": self.traits._asdict(),
        }

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Self:
        settings = config.build(config.flatten(header["settings"]))
        space = Space.from_dict(header["space"])
        said = Traits(**header["method"]) if "method" in header else None
        return cls(header["member"], space, settings, header["density"], said)


def load_member(folder: Path) -> tuple[Member, Record]:
    """The member whose journal lies in `folder`, and what has come of it."""
    record = journal.load(folder)
    return Member.from_header(record.header["member"]), record


class Scheduling(NamedTuple):
    name: str  # asha | none
    grace: int  # epochs
    reduction: float
    reason: str  # one sentence

    def decisions(self, epochs: int) -> list[int]:
        """Epochs after which a trial may be stopped: ASHA's rungs, grace * reduction^k."""
        rungs = []
        if self.name == "asha":
            rung = float(self.grace)
            while rung < epochs:
                rungs.append(math.ceil(rung))
                rung *= self.reduction
        return rungs


@dataclass(frozen=True)
class Sweep:
    name: str
    storage: Path
    members: list[Member]

    @property
    def settings(self) -> SweepSettings:
        """Of the first member: all that is no matter of one member is the same in each."""
        return self.members[0].settings


def scheduling(members: Sequence[Member]) -> Scheduling:
    """Early stopping, the same for all members of a sweep, or the comparison would not be fair."""
    settings = members[0].settings
    chosen = settings.scheduler
    name, reason = chosen.name, f"scheduler.name={chosen.name} was asked for"
    if name == "auto":
        why = _against_asha(members)
        name = "none" if why else "asha"
        reason = f"none, because {why}" if why else "ASHA, the default"
    grace = chosen.grace or config.quarter_of(settings.epochs)
    return Scheduling(name, grace, chosen.reduction, reason)


def scheduling_of(sweep: Path) -> Scheduling:
    """Early stopping of the sweep in this folder, whichever of its members are asked for."""
    folders = member_folders(sweep.parent, sweep.name)
    return scheduling([Member.from_header(journal.header(path)["member"]) for path in folders])


def _against_asha(members: Sequence[Member]) -> str:
    for member in members:
        if member.traits.begins == "dense":
            return (
                f"{member.space.name} begins dense, and early accuracy would favour the trials "
                "that are slow to become sparse"
            )
    for member in members:
        if member.settings.constraint:
            return f"{member.name} has a constraint, which early epochs cannot judge"
    if len(members[0].objectives) > 1:
        return "several objectives have no single order"
    return ""
