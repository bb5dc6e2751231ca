"""From the journals of a member to its cells: what was spent, and what it came to.

The rule to know: the journals are all that is read. Accuracies come from confirmation runs alone;
of its search a cell has what it cost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsetune.comparison import intervals, winners
from sparsetune.comparison.values import SLACK, Cell, Line, State, Tuning, called
from sparsetune.comparison.winners import DENSITY_METRIC, Role, role, seed_of
from sparsetune.settings import TrialSettings
from sparsetune.space.member import Member, Scheduling, load_member, scheduling_of
from sparsetune.space.networks import network_of
from sparsetune.store import journal
from sparsetune.store.journal import ENDED, Record, Trial
from sparsetune.store.layout import member_folders, resume_command
from sparsetune.sweeps.status import is_done

CURVES = ("train/loss", "val/accuracy", DENSITY_METRIC)
LAYER = "density/layer/"


@dataclass(frozen=True)
class Source:
    """What a cell is made from."""

    space: str  # what tables call it
    folder: Path  # of the member
    member: Member
    record: Record  # of the search
    runs: Record | None  # of the confirmation
    scheduling: Scheduling  # of the sweep
    density: float | None  # that it is to stand at
    served: int  # densities that the search serves
    multiplier: int

    @cached_property
    def cell(self) -> Cell:
        member, number = self.member, self.winner
        state, note = _state(self)
        chosen = paper = None
        variant: dict[str, Any] = member.settings.variant
        if self.runs is not None and number is not None:
            chosen = _line(self, Role(winners.serving(self.runs), number))
            variant = self.of_trial(number).variant
            untuned = winners.paper_trial(self.record)
            if untuned is not None:
                paper = _line(self, Role("paper", untuned))
                paper = paper or (chosen if untuned == number else None)
            over = _over(self, chosen)
            if state == "confirmed" and over > SLACK:
                state = "infeasible"
                note = f"its runs are {over:.1%} above the density that was asked for"
        values = chosen.accuracies if chosen else []
        papers = paper.accuracies if paper else []
        name = called(member.name, self.multiplier)
        if self.density is not None and member.density is None:
            name += f"@{self.density:g}"
        return Cell(
            name=name,
            space=self.space,
            sweep=member.name.partition("/")[0],
            member=member.name,
            method=member.traits.name,
            density=self.density,
            state=state,
            note=note,
            dense_gradient=member.traits.dense_gradient(variant),  # type: ignore[arg-type]
            begins=member.traits.begins,  # type: ignore[arg-type]
            tuning=_tuning(self),
            chosen=chosen,
            paper=paper,
            mean=intervals.mean(values) if len(values) > 1 else None,
            iqm=intervals.iqm(values) if len(values) > 1 else None,
            paper_mean=intervals.mean(papers) if len(papers) > 1 else None,
            multiplier=self.multiplier,
        )

    @cached_property
    def winner(self) -> int | None:
        """The number of its trial in the search."""
        return winners.winner(self.member, self.runs, self.density) if self.runs else None

    @cached_property
    def settings(self) -> TrialSettings:
        """Those that were confirmed; the member's where none were."""
        line = self.cell.chosen
        return self.of_trial(line.trial) if line else self.member.trial_settings({}, {})

    def of_trial(self, number: int) -> TrialSettings:
        trial = self.record.trials[number]
        return self.member.trial_settings(trial.params, trial.fixed)

    def in_role(self, wanted: Role) -> list[Trial]:
        """The runs of that role, by seed."""
        runs = self.runs.trials.values() if self.runs else ()
        return sorted((trial for trial in runs if role(trial) == wanted), key=seed_of)

    @property
    def confirm(self) -> str:
        """What to type to confirm it."""
        return winners.command_for(self.folder.parent, self.multiplier)


def sources(storage: Path, name: str) -> list[Source]:
    """Of a sweep, or of one member: one for each density at which it was confirmed."""
    stopping = scheduling_of(storage / name.partition("/")[0])
    made = []
    for folder in member_folders(storage, name):
        member, record = load_member(folder)
        confirmed: dict[int, Path | None] = {**winners.confirmations(folder)}
        for multiplier, path in (confirmed or {1: None}).items():
            runs = journal.load(path) if path else None
            space = called(member.space.name, multiplier)
            served = runs.header["confirm"]["densities"] if runs else [member.density]
            head = space, folder, member, record, runs, stopping
            made += [Source(*head, density, len(served), multiplier) for density in served]
    return made


def _state(source: Source) -> tuple[State, str]:
    member, record, runs = source.member, source.record, source.runs
    if not is_done(record):
        num = sum(trial.status != "running" for trial in record.trials.values())
        return "unfinished", (
            f"{num} of {record.asked} trials of its search have ended; finish it by: "
            f"{resume_command(source.folder.parent)}"
        )
    try:
        able = winners.candidates(member, record, 1, source.density)
    except ValueError as error:
        return "unconfirmed", str(error)
    if not able:
        return "infeasible", _why_infeasible(source)
    if runs is None:
        return "unconfirmed", (
            f"its best trials were not trained on fresh seeds; do so by: {source.confirm}"
        )
    if runs.header["confirm"]["trials"] != len(record.trials):
        return "unconfirmed", (
            f"it was confirmed after {runs.header['confirm']['trials']} trials, and the search has "
            f"{len(record.trials)} by now"
        )
    number = source.winner
    served = [] if number is None else source.in_role(Role(winners.serving(runs), number))
    untested = any(trial.test is None and trial.status == "finished" for trial in served)
    if not served or untested or not is_done(runs):
        return "unfinished", f"its confirmation is not complete; go on by: {source.confirm}"
    return "confirmed", ""


def _why_infeasible(source: Source) -> str:
    trials = source.record.trials.values()
    ended = [trial.reports[-1].metrics for trial in trials if trial.status == "finished"]
    if any(winners.excess(source.member, metrics, source.density) <= 0 for metrics in ended):
        return "its finished trials are start points that change what all methods share"
    reached = min((m[DENSITY_METRIC] for m in ended if DENSITY_METRIC in m), default=None)
    if reached is None:
        counts = Counter(trial.status for trial in trials)
        listed = ", ".join(f"{num} {status}" for status, num in counts.items())
        return f"none of its trials was trained to the end ({listed})"
    return (
        f"none of its {len(ended)} finished trials is within its bounds; lowest density "
        f"{reached:.4f}"
    )


def _over(source: Source, line: Line | None) -> float:
    """How far the runs of a method whose density emerges are above their bound, relatively."""
    if line is None or line.density is None or not source.member.traits.emergent:
        return 0.0
    metrics = dict.fromkeys(source.member.settings.constraint, -math.inf)
    return winners.excess(source.member, metrics | {DENSITY_METRIC: line.density}, source.density)


def _line(source: Source, wanted: Role) -> Line | None:
    """The runs of a setting under this role, and beside them those that ranked it."""
    served, ranked = source.in_role(wanted), source.in_role(Role("rank", wanted.number))
    if not served or source.runs is None:
        return None
    last = [trial.reports[-1].metrics for trial in served if trial.status == "finished"]
    mean = winners.mean_metrics(last) if last else {}
    layers = {key.removeprefix(LAYER): mean[key] for key in mean if key.startswith(LAYER)}
    settings, trial = source.of_trial(wanted.number), source.record.trials[wanted.number]
    density, parameters, flops = mean.get(DENSITY_METRIC), None, None
    if layers:
        network = network_of(source.record.header, settings.model)
        if network is not None:
            parameters = sum(layers[name] * size for name, size in network.sizes.items())
            flops = sum(layers.get(name, 1.0) * dense for name, dense in network.flops.items())
            if network.whole != sum(network.sizes.values()):
                density = parameters / network.whole
        elif settings.model.match_density:  # it is a share of another network's weights
            density = None
    return Line(
        trial=wanted.number,
        group=winners.group_of(source.member, source.runs, wanted),
        config=trial.params | trial.fixed,
        seeds=[seed_of(run) for run in served],
        statuses=[run.status for run in served],
        test=[(run.test or {}).get("test/accuracy") for run in served],
        validation=[
            run.reports[-1].metrics.get("val/accuracy") if run.status == "finished" else None
            for run in ranked
        ],
        density=density,
        density_sparse=mean.get("density/sparse"),
        layers=layers,
        parameters=parameters,
        flops_train=mean.get("flops/total"),
        flops_inference=flops,
        device_seconds=_device_seconds({t.number: t for t in [*served, *ranked]}.values()),
        curves=_curves(served, ranked),
    )


def _device_seconds(trials: Iterable[Trial]) -> float:
    reports = (report for trial in trials for report in trial.reports)
    return sum(report.metrics.get("device_seconds", 0.0) for report in reports)


def _curves(served: list[Trial], ranked: list[Trial]) -> dict[str, list[list[float]]]:
    curves = {}
    names = {key for trial in served for report in trial.reports[:1] for key in report.metrics}
    layers = sorted(name for name in names if name.startswith(LAYER))
    for metric in (*CURVES, *layers):
        runs = served if metric in names else ranked
        if runs and all(metric in report.metrics for t in runs for report in t.reports):
            curves[metric] = [[report.metrics[metric] for report in t.reports] for t in runs]
    return curves


def _tuning(source: Source) -> Tuning:
    """What the search spent, of which each has a share where it serves several densities; the
    trials are counted whole."""
    trials, served = source.record.trials.values(), source.served

    def worth(trial: Trial) -> float:
        """What the search would have to show had it been this trial alone."""
        last = trial.reports[-1].metrics if trial.reports else {}
        lost = trial.status in ("diverged", "failed")
        lost = lost or winners.excess(source.member, last, source.density) > 0
        return 0.0 if lost else last.get("val/accuracy", 0.0)

    return Tuning(
        asked=source.record.asked // served,
        trials={s: sum(t.status == s for t in trials) for s in (*ENDED, "running")},
        epochs=sum(len(trial.reports) for trial in trials) // served,
        device_seconds=_device_seconds(trials) / served,
        best_of=intervals.best_of([worth(t) for t in trials if t.status != "running"]),
    )
