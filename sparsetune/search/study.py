"""A member's Optuna study, made from its journal and kept in step with it.

The rule to know: the journal decides, Optuna is told. A suggestion is in the journal before it is
given out, the study is made from the journal whenever a driver starts, and every ask uses a fresh
sampler seeded by (sweep seed, member, number). So there is no random state to save, and a search
that was interrupted suggests what the uninterrupted one would have suggested.

Optuna hears the truth: stopped is PRUNED with what was seen of it, diverged and failed are FAIL,
and nothing is left RUNNING when a search is over.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.trial import TrialState

from sparsetune.search.sampler import make_sampler
from sparsetune.settings import to_dict
from sparsetune.space.member import Member
from sparsetune.space.space import Point
from sparsetune.store.journal import Journal, Record, Trial
from sparsetune.store.layout import trial_folder
from sparsetune.store.lines import Event

STATES = {
    "running": TrialState.RUNNING,
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "diverged": TrialState.FAIL,
    "failed": TrialState.FAIL,
}
ASKS = 5  # suggestions of a sampler that may all be repetitions; then chance is asked instead
CHANCES = 10  # draws that may all be repetitions; then one is accepted, as nothing else is left


class MemberStudy:
    """A member's study. Its methods are the only ones that write trials into its journal."""

    def __init__(
        self,
        member: Member,
        journal: Journal,
        seed: int,
        runs: list[Point] | None = None,
        group: str = "",
    ) -> None:
        """`runs`: all the trials that there are to be (None: the space's start points, and then
        what the sampler suggests). Members of one `group` have trials that share a pool."""
        self.member, self.journal, self.group = member, journal, group
        self._points = member.space.points() if runs is None else runs
        self._samples = runs is None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(directions=member.directions)
        self._seed = seed
        # The sweep's name must not matter: the same search under another name is the same search.
        self._seed_name = member.name.rpartition("/")[2]
        self._asked: dict[int, optuna.trial.Trial] = {}  # running trials, by our number
        self._seen: set[str] = set()
        for trial in self.record.trials.values():
            self._seen.add(_key(trial.params))
            if not trial.in_study:
                continue
            if trial.status == "running":
                self._asked[trial.number] = self._again(trial)
            else:
                self.study.add_trial(frozen(member, self.record, trial))

    @property
    def record(self) -> Record:
        return self.journal.record

    @property
    def wants_more(self) -> bool:
        """Are there trials to begin?"""
        num = len(self.record.trials)
        return num < self.record.asked and (self._samples or num < len(self._points))

    def config(self, trial: Trial) -> dict[str, Any]:
        """What the trainable gets: the trial's settings, and who it is and where it lives."""
        settings = self.member.settings
        about = {
            "member": self.member.name,
            "number": trial.number,
            "folder": str(trial_folder(self.journal.path.parent, trial.number)),
            "save_every": settings.checkpoint.every,
            "generation": self.record.generation,
            "failures": settings.failures,
        }
        return to_dict(self.member.trial_settings(trial.params, trial.fixed)) | {"trial": about}

    def suggest(self) -> Trial:
        """The next new trial, which is in the journal when this returns."""
        number = len(self.record.trials)
        if number < len(self._points):
            point = self._points[number]
            origin, fixed, in_study = f"start:{point.name}", point.fixed, point.in_study
            asked = None
            if in_study:
                self.study.enqueue_trial(point.params)
                asked = self._ask(number, 0)
            params = point.params
        else:
            origin, fixed, in_study = "sampler", {}, True
            asked = self._sampled(number)
            params = asked.params
        ranges = {} if asked is None else asked.distributions
        event = {
            "type": "suggest",
            "number": number,
            "params": params if asked is None else asked.params,
            "distributions": {name: distribution_to_json(kind) for name, kind in ranges.items()},
            "origin": origin,
            "fixed": fixed,
            "in_study": in_study,
        }
        attrs = {} if asked is None else self._notes(asked)
        self.journal.append(event | ({"attrs": attrs} if attrs else {}))
        if asked is not None:
            self._asked[number] = asked
        self._seen.add(_key(params))
        return self.record.trials[number]

    def report(self, number: int, epoch: int, metrics: dict[str, float], decision: str) -> None:
        self.journal.append(
            {
                "type": "report",
                "number": number,
                "epoch": epoch,
                "metrics": metrics,
                "decision": decision,
            },
            durable=False,
        )
        if number in self._asked and len(self.member.objectives) == 1:
            value = metrics.get(self.member.objectives[0], math.nan)
            self._asked[number].report(value, step=epoch)

    def end(self, number: int, status: str, attempt: int = 1, error: str | None = None) -> None:
        event: Event = {"type": "end", "number": number, "status": status, "attempt": attempt}
        self.journal.append(event | ({"error": error} if error is not None else {}))
        asked = self._asked.pop(number, None)
        if asked is not None:
            trial = self.record.trials[number]
            for key, violation in _constraints(self.member, trial).items():
                asked.set_constraint(key, violation)
            self.study.tell(asked, _values(self.member, trial), STATES[status])

    def finite(self, metrics: dict[str, float]) -> bool:
        """Whether every objective is a number; a trial where one is not has diverged."""
        missing = [name for name in self.member.objectives if name not in metrics]
        if missing:
            raise ValueError(
                f"{self.member.name}: the objective {', '.join(missing)} is not reported; "
                f"there are {', '.join(sorted(metrics))}"
            )
        return all(math.isfinite(metrics[name]) for name in self.member.objectives)

    def _sampled(self, number: int) -> optuna.trial.Trial:
        for attempt in range(ASKS + CHANCES):
            asked = self._ask(number, attempt)
            last = attempt == ASKS + CHANCES - 1
            if last or not asked.params or _key(asked.params) not in self._seen:
                break
            # Optuna has no way to withdraw a question. No sampler looks at trials that failed.
            self.study.tell(asked, state=TrialState.FAIL)
        return asked

    def _notes(self, asked: optuna.trial.Trial) -> dict[str, Any]:
        """What the sampler wrote on the trial and reads again, such as NSGA-II's generation."""
        attrs = self.study.get_trials(deepcopy=False)[asked.number].system_attrs
        return {
            key: value
            for key, value in attrs.items()
            if key != "fixed_params" and ":relative_params" not in key  # both repeat `params`
        }

    def _again(self, trial: Trial) -> optuna.trial.Trial:
        """An open trial, asked once more with the answer it had."""
        # What Study.enqueue_trial does, but with the sampler's notes (NSGA-II's generation).
        waiting = optuna.trial.create_trial(
            state=TrialState.WAITING, system_attrs={"fixed_params": trial.params, **trial.attrs}
        )
        self.study.add_trial(waiting)
        asked = self.study.ask(fixed_distributions=_distributions(self.member, self.record, trial))
        for epoch, value in _intermediate(self.member, trial).items():
            asked.report(value, step=epoch)
        return asked

    def _ask(self, number: int, attempt: int) -> optuna.trial.Trial:
        self.study.sampler = self._sampler(number, attempt)
        asked = self.study.ask()
        params = self.member.space.suggest(asked)
        # The study is rebuilt from what is journalled, so that must be what Optuna holds.
        assert params == asked.params, f"{self.member.name}: {params} is not {asked.params}"
        return asked

    def _sampler(self, number: int, attempt: int) -> optuna.samplers.BaseSampler:
        text = f"{self._seed} {self._seed_name} {number} {attempt}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        if attempt >= ASKS:
            return optuna.samplers.RandomSampler(seed)
        return make_sampler(self.member.settings.sampler, seed)


def frozen(member: Member, record: Record, trial: Trial) -> optuna.trial.FrozenTrial:
    """The trial as Optuna would hold it had it been there from the start."""
    intermediate = _intermediate(member, trial)
    values = _values(member, trial)
    if trial.status == "stopped" and intermediate:
        values = [intermediate[len(trial.reports)]]
    return optuna.trial.create_trial(
        state=STATES[trial.status],
        values=values,
        params=trial.params,
        distributions=_distributions(member, record, trial),
        system_attrs=dict(trial.attrs),
        intermediate_values=intermediate,
        constraints=_constraints(member, trial),
    )


def _intermediate(member: Member, trial: Trial) -> dict[int, float]:
    """Epoch -> value; nothing for several objectives, of which Optuna takes no such values."""
    if len(member.objectives) > 1:
        return {}
    name = member.objectives[0]
    return {epoch: metrics.get(name, math.nan) for epoch, metrics, _ in trial.reports}


def _distributions(member: Member, record: Record, trial: Trial) -> dict[str, BaseDistribution]:
    """As they were when it was suggested, or as wide as they are now: TPE would leave a key
    whose ranges differ out of what it searches jointly."""
    if not record.widened or not trial.in_study:
        return {name: json_to_distribution(text) for name, text in trial.distributions.items()}
    return member.space.distributions(trial.params)


def _values(member: Member, trial: Trial) -> list[float] | None:
    if trial.status != "finished":
        return None
    return [trial.reports[-1].metrics[name] for name in member.objectives]


def _constraints(member: Member, trial: Trial) -> dict[str, float]:
    """Where Optuna 5 reads feasibility (its `constraints_func` argument is deprecated)."""
    if not member.settings.constraint or trial.status not in ("finished", "stopped"):
        return {}
    violation = member.constraint(trial.reports[-1].metrics)
    return {"constraint": math.inf if math.isnan(violation) else violation}


def _key(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)
