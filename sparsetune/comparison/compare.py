"""From journals to a comparison: what was spent, what it came to, and which rules were kept.

The rule to know: accuracies come from confirmation runs alone, and a ranking is printed only where
no rule that forbids one is broken (`fairness.py`). This module reads; it trains and writes nothing.
"""

from __future__ import annotations

import itertools
import math
import statistics as standard
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sparsetune.comparison import intervals
from sparsetune.comparison.fairness import Entry, rules
from sparsetune.comparison.values import (
    SLACK,
    Cell,
    Comparison,
    Line,
    Pair,
    Rule,
    Tuning,
    density_of,
    told_apart,
)
from sparsetune.comparison.winners import (
    called,
    candidates,
    command_for,
    confirmations,
    excess,
    group_of,
    role,
    seed_of,
    serving,
    winner,
)
from sparsetune.methods.contract import make_variant
from sparsetune.settings import TrialSettings
from sparsetune.space.member import Member, load_member, scheduling
from sparsetune.store import journal
from sparsetune.store.journal import ENDED, Trial
from sparsetune.store.layout import member_folders, resume_command
from sparsetune.sweeps.status import is_done
from sparsetune.training import data, models
from sparsetune.training.flops import forward_flops

Match = Literal["density", "flops"]
CURVES = ("train/loss", "val/accuracy", "density/all")
ENOUGH = 6  # seeds for a test: at 5 the smallest p of a sign test is 0.06
NEAR = 0.1  # FLOPs so close, relatively, count as equal (`--match flops`)


@dataclass(frozen=True)
class _Costs:
    """Of a network: forward FLOPs per image and sizes of each layer with weights, and the number
    of weights that a density is a share of."""

    flops: dict[str, float]
    sizes: dict[str, int]
    whole: int


def compare(storage: Path, names: list[str], match: Match = "density") -> Comparison:
    """The members of these sweeps beside each other. ValueError for a name that does not exist."""
    entries = [entry for name in names for entry in _entries(storage, name)]
    entries.sort(key=lambda e: (e.cell.density is None, e.cell.density or 0.0))
    known: dict[str, Any] = {}
    called_apart = told_apart([(entry.cell.sweep, entry.cell.space) for entry in entries])
    cells = [
        replace(_costed(entry, known), space=space)
        for entry, space in zip(entries, called_apart, strict=True)
    ]
    entries = [replace(entry, cell=cell) for entry, cell in zip(entries, cells, strict=True)]
    if len({cell.name for cell in cells}) < len(cells):
        raise ValueError(f"name: {' '.join(names)} names a member twice; give each once")
    levels, notes = _levels(cells, match)
    checked = rules(entries, levels, match)
    found = {cell.name: cell for cell in cells}
    standing = {
        level: [found[name] for name in at if found[name].state == "confirmed"]
        for level, at in levels.items()
    }
    notes += [f"{cell.name}: {cell.note}" for cell in cells if cell.note]
    return Comparison(
        names=names,
        match=match,
        seeds=sorted({seed for cell in cells if cell.chosen for seed in cell.chosen.seeds}),
        cells=cells,
        levels=levels,
        pairs=[pair for level, at in standing.items() for pair in _pairs(density_of(level), at)],
        rules=checked,
        ranking=None if _forbidden(checked) else {k: _ranked(at) for k, at in standing.items()},
        notes=notes,
        about=_about(entries),
    )


def _forbidden(checked: list[Rule]) -> bool:
    return any(rule.forbids and rule.state == "broken" for rule in checked)


def _ranked(cells: list[Cell]) -> list[str]:
    able = [cell for cell in cells if cell.mean is not None]
    return [cell.space for cell in sorted(able, key=lambda cell: -cell.mean.value)]  # type: ignore[union-attr]


# Cells --------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """Where a cell comes from."""

    folder: Path
    member: Member
    record: journal.Record  # of the search
    runs: journal.Record | None  # of the confirmation
    target: float | None
    multiplier: int

    @property
    def winner(self) -> int | None:
        if self.runs is None or str(self.target) not in self.runs.header["confirm"]["candidates"]:
            return None
        return winner(self.member, self.runs, self.target)


def _entries(storage: Path, name: str) -> list[Entry]:
    # A member's scheduling follows from all members of its sweep, named here or not.
    everybody = member_folders(storage, name.partition("/")[0])
    headers = [journal.header(folder)["member"] for folder in everybody]
    stopping = scheduling([Member.from_header(header) for header in headers])
    entries = []
    for folder in member_folders(storage, name):
        member, record = load_member(folder)
        confirmed: dict[int, Path | None] = {**confirmations(folder)}
        for multiplier, path in (confirmed or {1: None}).items():
            runs = journal.load(path) if path else None
            served = runs.header["confirm"]["densities"] if runs else [member.density]
            for target in served:
                tuning = _tuning(member, record, target, len(served))
                cell = _cell(_Source(folder, member, record, runs, target, multiplier), tuning)
                entries.append(Entry(cell, folder, member, record, runs, stopping))
    return entries


def _cell(source: _Source, tuning: Tuning) -> Cell:
    """The cell with its lines, but without what networks cost."""
    _, member, record, runs, target, multiplier = source
    state, note = _state(source)
    chosen = paper = None
    variant: Any = member.settings.variant
    if runs is not None and (number := source.winner) is not None:
        chosen = _line(member, record, runs, serving(runs), number)
        for trial in record.trials.values():
            if trial.origin == "start:paper":
                untuned = _line(member, record, runs, "paper", trial.number)
                paper = untuned or (chosen if trial.number == number else None)
        trial = record.trials[number]
        variant = member.trial_settings(trial.params, trial.fixed).variant
        over = _over(member, chosen, target)
        if state == "confirmed" and over > SLACK:
            state = "infeasible"
            note = f"its runs are {over:.1%} above the density that was asked for"
    method = member.method
    values = [value for value in chosen.test if value is not None] if chosen else []
    papers = [value for value in paper.test if value is not None] if paper else []
    name = called(member.name, multiplier)
    if target is not None and member.density is None:
        name += f"@{target:g}"
    return Cell(
        name=name,
        space=called(member.space.name, multiplier),
        sweep=member.name.partition("/")[0],
        member=member.name,
        method=method.name,
        density=target,
        state=state,
        note=note,
        dense_gradient=method.dense_gradient(make_variant(method, variant)),  # type: ignore[arg-type]
        begins=method.begins,  # type: ignore[arg-type]
        tuning=tuning,
        chosen=chosen,
        paper=paper,
        mean=intervals.mean(values) if len(values) > 1 else None,
        iqm=intervals.iqm(values) if len(values) > 1 else None,
        paper_mean=intervals.mean(papers) if len(papers) > 1 else None,
        multiplier=multiplier,
    )


State = Literal["confirmed", "infeasible", "unconfirmed", "unfinished"]


def _state(source: _Source) -> tuple[State, str]:
    folder, member, record, runs, target, multiplier = source
    sweep = folder.parent
    if not is_done(record):
        num = sum(trial.status != "running" for trial in record.trials.values())
        return "unfinished", (
            f"{num} of {record.asked} trials of its search have ended; finish it by: "
            f"{resume_command(sweep)}"
        )
    try:
        found = candidates(member, record, 1, target)
    except ValueError as error:
        return "unconfirmed", str(error)
    again = command_for(sweep, multiplier)
    if not found:
        ended = [t.reports[-1].metrics for t in record.trials.values() if t.status == "finished"]
        if any(excess(member, metrics, target) <= 0 for metrics in ended):
            return "infeasible", (
                "its finished trials are start points that change what all methods share"
            )
        reached = min((m["density/all"] for m in ended if "density/all" in m), default=None)
        if reached is None:
            how = Counter(trial.status for trial in record.trials.values())
            counts = ", ".join(f"{num} {status}" for status, num in how.items())
            return "infeasible", f"none of its trials was trained to the end ({counts})"
        return "infeasible", (
            f"none of its {len(ended)} finished trials is within its bounds; lowest density "
            f"{reached:.4f}"
        )
    if runs is None:
        return "unconfirmed", f"its best trials were not trained on fresh seeds; do so by: {again}"
    if runs.header["confirm"]["trials"] != len(record.trials):
        return "unconfirmed", (
            f"it was confirmed after {runs.header['confirm']['trials']} trials, and the search has "
            f"{len(record.trials)} by now"
        )
    mine = (serving(runs), source.winner)
    served = [trial for trial in runs.trials.values() if role(trial) == mine]
    untested = any(trial.test is None and trial.status == "finished" for trial in served)
    if not served or untested or not is_done(runs):
        return "unfinished", f"its confirmation is not complete; go on by: {again}"
    return "confirmed", ""


def _over(member: Member, line: Line | None, target: float | None) -> float:
    """How far the runs of a method whose density emerges are above their bound, relatively."""
    if line is None or line.density is None or not member.method.emergent:
        return 0.0
    bounds = member.settings.constraint
    return excess(member, dict.fromkeys(bounds, -math.inf) | {"density/all": line.density}, target)


def _line(
    member: Member, record: journal.Record, runs: journal.Record, name: str, number: int
) -> Line | None:
    """The runs of a setting under this role, and beside them those that ranked it."""

    def of(name: str) -> list[Trial]:
        found = [trial for trial in runs.trials.values() if role(trial) == (name, number)]
        return sorted(found, key=seed_of)

    served, ranked = of(name), of("rank")
    if not served:
        return None
    last = [trial.reports[-1].metrics for trial in served if trial.status == "finished"]
    mean = {key: standard.fmean(each[key] for each in last) for key in (last[0] if last else {})}
    trial = record.trials[number]
    return Line(
        trial=number,
        group=group_of(member, runs, name, number),
        config=trial.params | trial.fixed,
        seeds=[seed_of(each) for each in served],
        statuses=[each.status for each in served],
        test=[(each.test or {}).get("test/accuracy") for each in served],
        validation=[_last(each, "val/accuracy") for each in ranked],
        density=mean.get("density/all"),
        density_sparse=mean.get("density/sparse"),
        layers={
            key.removeprefix("density/layer/"): value
            for key, value in mean.items()
            if key.startswith("density/layer/")
        },
        parameters=None,
        flops_train=mean.get("flops/total"),
        flops_inference=None,
        device_seconds=sum(
            report.metrics.get("device_seconds", 0.0)
            for each in {t.number: t for t in [*served, *ranked]}.values()
            for report in each.reports
        ),
        curves=_curves(served, ranked),
    )


def _last(trial: Trial, metric: str) -> float | None:
    return trial.reports[-1].metrics.get(metric) if trial.status == "finished" else None


def _curves(served: list[Trial], ranked: list[Trial]) -> dict[str, list[list[float]]]:
    curves = {}
    names = {key for trial in served for report in trial.reports[:1] for key in report.metrics}
    layers = sorted(name for name in names if name.startswith("density/layer/"))
    for metric in (*CURVES, *layers):
        runs = served if metric in names else ranked
        if runs and all(metric in report.metrics for t in runs for report in t.reports):
            curves[metric] = [[report.metrics[metric] for report in t.reports] for t in runs]
    return curves


def _tuning(member: Member, record: journal.Record, target: float | None, served: int) -> Tuning:
    """What the search spent, of which each has a share where it serves several densities; the
    trials are counted whole."""
    trials = record.trials.values()

    def worth(trial: Trial) -> float:
        """What the search would have to show had it been this trial alone."""
        last = trial.reports[-1].metrics if trial.reports else {}
        lost = trial.status in ("diverged", "failed") or excess(member, last, target) > 0
        return 0.0 if lost else last.get("val/accuracy", 0.0)

    return Tuning(
        asked=record.asked // served,
        trials={s: sum(t.status == s for t in trials) for s in (*ENDED, "running")},
        epochs=sum(len(trial.reports) for trial in trials) // served,
        device_seconds=sum(
            report.metrics.get("device_seconds", 0.0) for t in trials for report in t.reports
        )
        / served,
        best_of=intervals.best_of([worth(t) for t in trials if t.status != "running"]),
    )


# Costs, levels, pairs -----------------------------------------------------------------------------


def _costed(entry: Entry, known: dict[str, Any]) -> Cell:
    """The cell with parameters and FLOPs, of the network as a whole where it was made smaller."""
    cell = entry.cell

    def costed(line: Line | None) -> Line | None:
        if line is None or not line.layers:
            return line
        trial = entry.record.trials[line.trial]
        settings = entry.member.trial_settings(trial.params, trial.fixed)
        costs = _costs(settings, known)
        if costs is None:  # a smaller network's density is a share of another one's weights
            return replace(line, density=None) if settings.model.match_density else line
        parameters = sum(line.layers[name] * size for name, size in costs.sizes.items())
        flops = sum(line.layers.get(name, 1.0) * each for name, each in costs.flops.items())
        smaller = costs.whole != sum(costs.sizes.values())
        density = parameters / costs.whole if smaller else line.density
        return replace(line, parameters=parameters, flops_inference=flops, density=density)

    return replace(cell, chosen=costed(cell.chosen), paper=costed(cell.paper))


def _costs(settings: TrialSettings, known: dict[str, Any]) -> _Costs | None:
    key = repr((settings.data, settings.model))
    if key not in known:
        images = repr(settings.data)
        if images not in known:
            try:
                dataset = data.load(settings.data)
                known[images] = dataset.input_shape, dataset.num_classes
            except ValueError:
                known[images] = None
        known[key] = None
        if known[images] is not None:
            shape, classes = known[images]
            full = replace(settings.model, match_density=0.0)
            sizes = [
                {k: s.numel() for k, s in models.weights(models.probe(m, shape, classes)).items()}
                for m in (settings.model, full)
            ]
            flops = forward_flops(settings.model, shape, classes)
            known[key] = _Costs(flops, sizes[0], sum(sizes[1].values()))
    costs: _Costs | None = known[key]
    return costs


def _levels(cells: list[Cell], match: Match) -> tuple[dict[str, list[str]], list[str]]:
    """Which cells are compared with each other: at one density, or at nearly equal FLOPs of
    inference, those that the median method has at that density."""
    stands: dict[tuple[int, float], list[Cell]] = {}
    for cell in cells:
        if cell.density is not None:
            stands.setdefault((cell.multiplier, cell.density), []).append(cell)
    levels: dict[str, list[str]] = {}
    notes = []
    for (multiplier, density), at in sorted(stands.items(), key=lambda item: item[0]):
        level = called(f"{density:g}", multiplier)
        alike = [c for c in cells if c.multiplier == multiplier and c.density is not None]
        spaces = dict.fromkeys(cell.space for cell in alike)
        if match == "density":
            levels[level] = [cell.name for cell in at]
            lacking = [space for space in spaces if space not in {cell.space for cell in at}]
            notes += [f"{space} was not searched at density {density:g}" for space in lacking]
            continue
        known = [f for c in at if (f := _flops(c)) is not None]
        if not known:
            continue
        aim = standard.median(known)
        levels[level] = []
        for space in spaces:
            able = [(abs(f / aim - 1), c) for c in alike if c.space == space and (f := _flops(c))]
            if able and (nearest := min(able, key=lambda pair: pair[0]))[0] <= NEAR:
                levels[level].append(nearest[1].name)
            else:
                notes.append(f"{space} has no cell within {NEAR:.0%} of {aim:.3g} FLOPs ({level})")
    return levels, notes


def _flops(cell: Cell) -> float | None:
    return cell.chosen.flops_inference if cell.chosen and cell.state == "confirmed" else None


def _pairs(density: float, cells: list[Cell]) -> list[Pair]:
    pairs, ps = [], []
    for first, second in itertools.combinations([c for c in cells if c.mean is not None], 2):
        assert first.chosen is not None and second.chosen is not None
        lines = first.chosen, second.chosen
        a, b = ([value for value in line.test if value is not None] for line in lines)
        paired = lines[0].seeds == lines[1].seeds and len(a) == len(b) == len(lines[0].seeds)
        difference = intervals.difference(a, b) if paired else None
        tested = paired and len(a) >= ENOUGH
        ps += [intervals.paired_p(a, b)] if tested else []
        improvement = intervals.improvement(a, b)
        pairs.append(
            Pair(
                density,
                first.space,
                second.space,
                improvement,
                difference,
                0.0 if tested else None,
                None,
            )
        )
    adjusted = iter(intervals.holm(ps))
    return [
        pair
        if pair.p is None
        else replace(
            pair, p=(p := next(adjusted)), different=intervals.different(pair.improvement, p)
        )
        for pair in pairs
    ]


# About --------------------------------------------------------------------------------------------


def _about(entries: list[Entry]) -> dict[str, Any]:
    """What a reader needs to run it again: rule 14."""
    first = entries[0].member.settings

    headers = [entry.record.header for entry in entries]
    headers += [entry.runs.header for entry in entries if entry.runs]

    def each(key: str) -> list[Any]:
        found = [header.get(key) for header in headers]
        return [value for n, value in enumerate(found) if value and value not in found[:n]]

    return {
        "versions": each("versions"),
        "hardware": each("hardware"),
        "commands": [" ".join(["sparsetune", *argv]) for argv in each("argv")],
        "network": first.model.name if first.model.name != "mlp" else f"mlp {first.model.widths}",
        "data": first.data.name,
        "epochs": first.epochs,
        "sampler": first.sampler.name,
        "seed": first.seed,
        "scheduler": entries[0].scheduling.reason,
        "spaces": {entry.cell.name: entry.member.space.to_dict() for entry in entries},
        "newest": max((entry.newest for entry in entries), default=0.0),
    }


# As a table for scripts ---------------------------------------------------------------------------
