"""What a confirmation's journal says: roles of runs, candidates, the winner. Reads only.

The rule to know: the winner is computed from the rankings and stays what it is; seeds that are
added later are added to it alone.
"""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path
from typing import NamedTuple

from sparsetune.comparison.values import SLACK, called
from sparsetune.space.config import replaced
from sparsetune.space.member import Member
from sparsetune.store import journal
from sparsetune.store.journal import Trial
from sparsetune.store.layout import inside, resume_command
from sparsetune.store.lines import exists

DENSITY_METRIC = "density/all"


def folder_of(member: Path, multiplier: int = 1) -> Path:
    return member / ("confirm" if multiplier == 1 else f"confirm-{multiplier}x")


def confirmations(member: Path) -> dict[int, Path]:
    """The folders that `folder_of` calls so and that have a journal, by their multiplier."""
    folders = {}
    for path in inside(member):
        named = re.fullmatch(r"confirm(?:-([2-9]|[1-9]\d+)x)?", path.name)
        if named and exists(path):
            folders[int(named[1] or 1)] = path
    return dict(sorted(folders.items()))


def command_for(sweep: Path, multiplier: int, member: str = "") -> str:
    """What to type to confirm a sweep, or that member of it."""
    words = resume_command(sweep, "confirm", member)
    return words + (f" multiplier={multiplier}" if multiplier > 1 else "")


class Role(NamedTuple):
    """What a run is for; after `start:` it is the run's `origin` in the journal.

    `rank 12` ranks trial 12 of the search, `final 12` trains it as the winner, and `paper 0` is the
    start point `paper`, untuned.
    """

    name: str  # rank | final | paper
    number: int  # of its trial in the search

    def __str__(self) -> str:
        return f"{self.name} {self.number}"


def role(run: Trial) -> Role:
    name, _, number = run.origin.removeprefix("start:").partition(" ")
    return Role(name, int(number))


def serving(runs: journal.Record) -> str:
    """The name of the role of the runs that the winner is judged by."""
    return "final" if runs.header["confirm"]["full"] else "rank"


def seed_of(run: Trial) -> int:
    return int(run.fixed["seed"])


def accuracy_name(member: Member) -> tuple[str, int]:
    """The objective that candidates are chosen by, and 1 where more of it is better, else -1."""
    for name, direction in zip(member.objectives, member.directions, strict=True):
        if name.startswith("val/"):
            return name, 1 if direction == "maximize" else -1
    raise ValueError(
        f"objective: {member.name} was searched by {', '.join(member.objectives)}; a comparison "
        "selects by validation, objective=val/accuracy"
    )


def paper_trial(record: journal.Record) -> int | None:
    """The trial of a search that is the start point `paper`."""
    return next((t.number for t in record.trials.values() if t.origin == "start:paper"), None)


def is_front(member: Member) -> bool:
    """Was a front of accuracy and density searched, so that it may serve several densities?"""
    return DENSITY_METRIC in member.objectives and member.density is None


def excess(member: Member, metrics: dict[str, float], target: float | None) -> float:
    """How far bounds are passed, relatively; 0 where all are kept, infinite for a NaN."""
    bounds = dict(member.settings.constraint)
    if is_front(member) and target is not None:
        bounds[DENSITY_METRIC] = target
    over = [0.0]
    for name, bound in bounds.items():
        value = metrics.get(name, math.nan)
        over.append((value - bound) / abs(bound) if bound else value)
    return math.inf if any(map(math.isnan, over)) else max(over)


def candidates(
    member: Member, record: journal.Record, top: int, target: float | None
) -> list[Trial]:
    """The best trials of a search that a method may be judged by, the best first.

    Trained to the end, within the bounds, or, if there is none, within SLACK of them. A start point
    that changes what the methods share (schedule, initial distribution, a learning rate outside of
    the range) is none: other methods had no such choice. ValueError without a validation objective.
    """
    name, sign = accuracy_name(member)
    finished = [trial for trial in record.trials.values() if trial.status == "finished"]
    able = [trial for trial in finished if not _changes_what_is_shared(member, trial)]
    over = {t.number: excess(member, t.reports[-1].metrics, target) for t in able}
    kept = [t for t in able if over[t.number] <= 0] or [t for t in able if over[t.number] <= SLACK]
    return sorted(kept, key=lambda t: (-sign * t.reports[-1].metrics[name], t.number))[:top]


def _changes_what_is_shared(member: Member, trial: Trial) -> bool:
    base = member.trial_settings(trial.params, {})
    shared = {k: v for k, v in trial.fixed.items() if not k.startswith(("hp.", "variant."))}
    return replaced(base, shared) != base


def winner(member: Member, runs: journal.Record, target: float | None) -> int | None:
    """The number of the trial that does best over the ranking seeds.

    None before all have ended, and where the search has none that could win. A trial that diverged
    on a seed comes after all that did not, and one that is above its density in the mean after all
    that keep it.
    """
    asked = runs.header["confirm"]
    numbers = asked["candidates"].get(str(target), [])
    if not numbers:
        return None
    if len(numbers) == 1 and asked["full"]:
        return int(numbers[0])  # nobody to be ranked against
    name, sign = accuracy_name(member)
    scores = []
    for number in numbers:
        ranked = [
            run
            for run in runs.trials.values()
            if role(run) == ("rank", number) and seed_of(run) in asked["seeds"]
        ]
        if len(ranked) < len(asked["seeds"]) or any(run.status == "running" for run in ranked):
            return None
        last = [run.reports[-1].metrics for run in ranked if run.status == "finished"]
        gone = len(ranked) - len(last)
        mean = statistics.fmean(sign * metrics[name] for metrics in last) if last else -math.inf
        over = excess(member, mean_metrics(last), target) if last else math.inf
        scores.append((gone, over > SLACK, -mean, number))
    return int(min(scores)[-1])


def mean_metrics(metrics: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.fmean(last[key] for last in metrics) for key in metrics[0]}


def by_density(member: Member, runs: journal.Record) -> dict[float | None, int | None]:
    """The winner at each density that has candidates."""
    keys = runs.header["confirm"]["candidates"]
    targets = [None if key == "None" else float(key) for key in keys]
    return {target: winner(member, runs, target) for target in targets}


def group_of(member: Member, runs: journal.Record, purpose: Role) -> str:
    """The W&B group of runs of this role: what they serve, such as mnist/set@0.05.

    A setting that a front chooses at several densities serves them all: mnist/dst@0.02,0.05.
    """
    asked = runs.header["confirm"]
    whole = called(member.name, asked["multiplier"])
    if purpose.name == "paper":
        return f"{whole} paper"
    if not is_front(member) or purpose.name != serving(runs):
        return whole
    best = by_density(member, runs)
    served = [f"{target:g}" for target, number in best.items() if number == purpose.number]
    return f"{whole}@{','.join(served)}" if served else whole
