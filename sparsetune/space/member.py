"""Members of a sweep: one search space at one density, resolved from a command line.

The rule to know: `resolve` finds everything a user got wrong, with the data at hand and the network
on the meta device, and writes nothing. What a member is fits into its journal's header, so a sweep
goes on without the yaml files it began with. Over 350 lines: a third of them are the checks and
their sentences, which belong beside what they check.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import optuna

from sparsetune.methods import Method, find
from sparsetune.search.study import NSGAII, SearchMember, StartPoint
from sparsetune.settings import DIRECTIONS, SweepSettings, TrialSettings, to_dict
from sparsetune.space import config
from sparsetune.space.space import Space
from sparsetune.space.traits import Traits, traits_of
from sparsetune.store.journal import Journal

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

    @property
    def start_points(self) -> list[StartPoint]:
        return [StartPoint(*point) for point in self.space.points()]

    def ask(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        return self.space.suggest(trial)

    def make_sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        """A fresh sampler. None gets a constraints_func: `MemberStudy` sets constraints itself."""
        name, startup = self.settings.sampler.name, self.settings.sampler.startup
        if name == "random":
            return optuna.samplers.RandomSampler(seed)
        if name == "gp":
            return optuna.samplers.GPSampler(
                seed=seed, n_startup_trials=startup, warn_independent_sampling=False
            )
        if name == "nsga2":
            return NSGAII(seed=seed)
        return optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed, constant_liar=True)

    def trial_settings(self, params: Mapping[str, Any], fixed: Mapping[str, Any]) -> TrialSettings:
        """A trial's settings: the member's, with what is searched and what the trial fixes.

        The seed is the sweep's for all trials: they share the split, the batches and the start.
        """
        names = [f.name for f in dataclasses.fields(TrialSettings)]
        base = TrialSettings(**{name: getattr(self.settings, name) for name in names})
        return config.replaced(base, {**params, **fixed})

    def configure(
        self, params: Mapping[str, Any], fixed: Mapping[str, Any], number: int
    ) -> dict[str, Any]:
        return to_dict(self.trial_settings(params, fixed))

    def constraint(self, metrics: Mapping[str, float]) -> float:
        """How far the bounds are passed, in sum; 0 without any, NaN where a metric is missing."""
        over = [
            metrics.get(name, math.nan) - bound for name, bound in self.settings.constraint.items()
        ]
        return sum((0.0 if each <= 0 else each for each in over), 0.0)

    def search_member(self, journal: Journal) -> SearchMember:
        """What the searcher needs to know of this member."""
        return SearchMember(
            name=self.name,
            journal=journal,
            ask=self.ask,
            start_points=self.start_points,
            make_sampler=self.make_sampler,
            configure=self.configure,
            objectives=self.objectives,
            directions=self.directions,
            constraint=self.constraint if self.settings.constraint else None,
        )

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

    @property
    def scheduling(self) -> Scheduling:
        """Early stopping, the same for all members, or the comparison would not be fair."""
        chosen = self.settings.scheduler
        name, reason = chosen.name, f"scheduler.name={chosen.name} was asked for"
        if name == "auto":
            why = self._against_asha()
            name = "none" if why else "asha"
            reason = f"none, because {why}" if why else "ASHA, the default"
        grace = chosen.grace or config.quarter_of(self.settings.epochs)
        return Scheduling(name, grace, chosen.reduction, reason)

    def _against_asha(self) -> str:
        for member in self.members:
            if member.traits.begins == "dense":
                return (
                    f"{member.space.name} begins dense, and early accuracy would favour the trials "
                    "that are slow to become sparse"
                )
        for member in self.members:
            if member.settings.constraint:
                return f"{member.name} has a constraint, which early epochs cannot judge"
        if len(config.objectives(self.settings)) > 1:
            return "several objectives have no single order"
        return ""


# From words to a sweep ----------------------------------------------------------------------------


# Checks -------------------------------------------------------------------------------------------
