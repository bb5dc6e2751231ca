"""Pictures of searches: history, parallel coordinates, and the importance of what was searched.

The rule to know: a search is one seed per trial, and its best is the best of many draws, so nothing
here is a result; the captions say so.
"""

from __future__ import annotations

import math
import statistics
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna

from sparsetune.comparison.values import Comparison, told_apart
from sparsetune.reports.figures import SMALL, Figure, as_percent, look_of, titled, window
from sparsetune.reports.svg import CROSS, Axis, Chart, Look, bars, parallel
from sparsetune.space.member import Member, load_member
from sparsetune.space.space import Dimension
from sparsetune.store import journal
from sparsetune.store.journal import Trial
from sparsetune.store.layout import member_folders
from sparsetune.terminal import settings_shown, short, shown

ENOUGH = 10  # finished trials, for an importance
GOOD = 0.25  # of a search's trials count as good ones


@dataclass(frozen=True)
class Search:
    """A member's search: its journal, and how it looks."""

    member: Member
    record: journal.Record
    look: Look

    @property
    def title(self) -> str:
        return titled(self.look, self.member.density)

    @cached_property
    def done(self) -> list[Trial]:
        """Trials that ran to their end, the best last."""
        ended = (trial for trial in self.record.trials.values() if trial.status == "finished")
        return sorted((t for t in ended if math.isfinite(accuracy(t))), key=accuracy)


def accuracy(trial: Trial) -> float:
    """Of validation, at its last epoch."""
    return trial.reports[-1].metrics.get("val/accuracy", math.nan) if trial.reports else math.nan


def load(comparison: Comparison, storage: Path) -> list[Search]:
    folders = [path for name in comparison.names for path in member_folders(storage, name)]
    loaded = [load_member(folder) for folder in folders]
    names = told_apart([(m.name.partition("/")[0], m.space.name) for m, _ in loaded])
    return [
        Search(member, record, look_of(comparison, name, member.space.name))
        for (member, record), name in zip(loaded, names, strict=True)
    ]


def figures(searches: list[Search]) -> list[Figure]:
    by_look: dict[Look, list[Search]] = {}
    for search in searches:
        by_look.setdefault(search.look, []).append(search)
    return [
        Figure(
            "Search history", [*map(_history, searches)],
            "Validation accuracy of each trial at its last epoch, %, by its number, and the best "
            "so far. Search runs, one seed each: no results. Hollow: stopped early, still running, "
            "or above the bound on density; cross: diverged or failed; arrow: below the picture; "
            "dark edge: a start point.", "small",
        ),
        Figure(
            "Parallel coordinates", [*map(_parallel, by_look.values())],
            "Each line is a trial, from what was searched to its validation accuracy; the best "
            "quarter of each search is in colour. A line is broken where a setting does not "
            "apply. Search runs of all densities of a method, one seed each; trials that ran to "
            "their end.",
        ),
        Figure(
            "Importance of what was searched", [*map(_importance, by_look.values())],
            f"PED-ANOVA: how much each setting decides whether a trial is among the best "
            f"{GOOD:.0%} of its search by validation accuracy, in shares of 1; bars are means over "
            f"densities, points the densities. Search runs; members with {ENOUGH} finished trials "
            "or more. With few trials this is a rough guide.",
        ),
    ]  # fmt: skip


def _history(search: Search) -> str:
    trials = search.record.trials.values()
    values = [value for value in map(accuracy, trials) if math.isfinite(value)]
    if not values:
        return ""
    x = Axis(-0.7, search.record.asked - 0.3)
    chart = Chart(x, window(values, [], ""), search.title, [], *SMALL)
    best, steps = -math.inf, list[tuple[float, float]]()
    for trial in trials:
        value = accuracy(trial)
        last = trial.reports[-1].metrics if trial.reports else {}
        kept = search.member.constraint(last) <= 0
        lost = trial.status in ("diverged", "failed") or not math.isfinite(value)
        if trial.status == "finished" and kept and not lost and value > best:
            steps += [(trial.number, best)] if steps else []
            best = value
        if math.isfinite(best):
            steps.append((trial.number, best))
        kind = "" if trial.status == "finished" and kept else "hollow"
        kind += " start" if trial.origin.startswith("start:") else ""
        says = f"trial {trial.number} ({trial.origin}), {trial.status}: {as_percent(value)}; "
        says += settings_shown(trial.params | trial.fixed)
        place = chart.y.low if lost else value
        mark = CROSS if lost else ""
        chart.point(search.look, trial.number, place, says, kind.strip(), 2.0, mark=mark)
    chart.line(search.look, [x for x, _ in steps], [y for _, y in steps], "step")
    return chart.svg()


def _parallel(searches: list[Search]) -> str:
    dimensions = searches[0].member.space.search
    known = [accuracy(trial) for search in searches for trial in search.done]
    if not known or not dimensions:
        return ""
    axes = [_axis(key, dimension) for key, dimension in dimensions.items()]
    axes.append(window(known, [], "validation accuracy, %"))
    lines: list[tuple[Look, list[float | None], str, str]] = []
    for search in searches:
        first_good = len(search.done) - max(1, round(GOOD * len(search.done)))
        for place, trial in enumerate(search.done):
            values = [_place(d, trial.params.get(key)) for key, d in dimensions.items()]
            says = f"{search.title}, trial {trial.number}: {as_percent(accuracy(trial))}; "
            says += settings_shown(trial.params)
            kind = "good" if place >= first_good else "rest"
            lines.append((search.look, [*values, accuracy(trial)], kind, says))
    lines.sort(key=lambda line: line[2], reverse=True)  # the good ones above
    return parallel(searches[0].look.name, axes, lines)


def _axis(key: str, dimension: Dimension) -> Axis:
    if dimension.choices:
        names = [shown(choice) for choice in dimension.choices]
        ends = -0.1 * len(names), 1.1 * len(names) - 1  # some room for lines side by side
        return Axis(*ends, short(key), False, lambda n: names[round(n)], range(len(names)))
    assert dimension.low is not None and dimension.high is not None
    return Axis(dimension.low, dimension.high, short(key), dimension.log)


def _place(dimension: Dimension, value: Any) -> float | None:
    if value is None:
        return None
    return float(dimension.choices.index(value)) if dimension.choices else float(value)


def importance(search: Search) -> dict[str, float]:
    """Searched key -> its share; {} where there are too few trials, or nothing was searched."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for trial in (trial for trial in search.done if trial.in_study):
        study.add_trial(
            optuna.trial.create_trial(
                params=trial.params,
                distributions=search.member.space.distributions(trial.params),
                value=accuracy(trial),
            )
        )
    if len(study.trials) < ENOUGH or not search.member.space.search:
        return {}
    # Without `target` it heeds the study's direction; with one it takes low for good.
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=GOOD)
    experimental = optuna.exceptions.ExperimentalWarning
    with warnings.catch_warnings(category=experimental, action="ignore"):
        return optuna.importance.get_param_importances(study, evaluator=evaluator)


def _importance(searches: list[Search]) -> str:
    rows: dict[str, list[tuple[str, float]]] = {}
    for search in searches:
        for key, value in importance(search).items():
            rows.setdefault(short(key), []).append((search.title, value))
    if not rows:
        return ""
    ordered = dict(sorted(rows.items(), key=lambda row: -statistics.fmean(v for _, v in row[1])))
    return bars(searches[0].look, ordered)
