"""Members of sweeps beside each other: who is compared with whom, and what it says.

The rule to know: a ranking is printed only where no rule that forbids one is broken
(`fairness.py`). The journals are all that is read, and nothing is written.
"""

from __future__ import annotations

import itertools
import re
import shlex
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from sparsetune.comparison import intervals
from sparsetune.comparison.cells import Source, sources
from sparsetune.comparison.fairness import rules
from sparsetune.comparison.values import Cell, Comparison, Level, Line, Pair, told_apart
from sparsetune.space.words import storage_folder

Match = Literal["density", "flops"]
ENOUGH = 6  # seeds for a test: at 5 the smallest p of a sign test is 0.06
NEAR = 0.1  # FLOPs so close, relatively, count as equal (`--match flops`)


def compare(*names: str, match: Match = "density", storage: str | Path | None = None) -> Comparison:
    """The members of these sweeps beside each other, as `sparsetune compare` prints them.

    `storage`: where the sweeps are, as on the command line. ValueError for a name that does not
    exist, or stands there twice.
    """
    folder = storage_folder(storage)
    if not names:
        raise ValueError("name: give one or more sweeps, or SWEEP/MEMBER")
    named = [source for name in names for source in sources(folder, name)]
    named.sort(key=lambda source: (source.density is None, source.density or 0.0))
    spaces = told_apart([(s.member.name.partition("/")[0], s.space) for s in named])
    compared = [replace(s, space=space) for s, space in zip(named, spaces, strict=True)]
    cells = {source.cell.name: source.cell for source in compared}
    if len(cells) < len(compared):
        raise ValueError(f"name: {' '.join(names)} names a member twice; give each once")
    levels, notes = _levels([*cells.values()], match)
    checked = rules(compared, levels, match)
    forbidden = any(rule.forbids and rule.state == "broken" for rule in checked)
    standing = {
        level: [cells[name] for name in at if cells[name].state == "confirmed"]
        for level, at in levels.items()
    }
    lines = [cell.chosen for cell in cells.values() if cell.chosen]
    return Comparison(
        names=[*names],
        match=match,
        seeds=sorted({seed for line in lines for seed in line.seeds}),
        cells=[*cells.values()],
        levels=levels,
        pairs=[pair for level, at in standing.items() for pair in _pairs(level.density, at)],
        rules=checked,
        ranking=None if forbidden else {level: _ranked(at) for level, at in standing.items()},
        notes=[*notes, *_notes(cells.values())],
        about=_about(compared),
    )


def _ranked(cells: list[Cell]) -> list[str]:
    means = {cell.space: cell.mean.value for cell in cells if cell.mean is not None}
    return sorted(means, key=lambda space: -means[space])


def _notes(cells: Iterable[Cell]) -> Iterable[str]:
    for cell in cells:
        if cell.note:
            yield f"{cell.name}: {cell.note}"
        if cell.chosen and cell.chosen.layers and cell.chosen.parameters is None:
            yield f"{cell.name}: its journal does not say what its network costs"


# Levels and pairs ---------------------------------------------------------------------------------


def _levels(cells: list[Cell], match: Match) -> tuple[dict[Level, list[str]], list[str]]:
    """Which cells are compared with each other: at one density, or at nearly equal FLOPs of
    inference, those that the median method has at that density."""
    stands: dict[Level, list[Cell]] = {}
    for cell in cells:
        if cell.density is not None:
            stands.setdefault(Level(cell.density, cell.multiplier), []).append(cell)
    levels: dict[Level, list[str]] = {}
    notes = []
    for level in sorted(stands, key=lambda level: (level.multiplier, level.density)):
        at = stands[level]
        alike = [c for c in cells if c.multiplier == level.multiplier and c.density is not None]
        spaces = dict.fromkeys(cell.space for cell in alike)
        if match == "density":
            levels[level] = [cell.name for cell in at]
            lacking = [space for space in spaces if space not in {cell.space for cell in at}]
            notes += [f"{space} was not searched at density {level.density:g}" for space in lacking]
            continue
        known = [flops for cell in at if (flops := _flops(cell)) is not None]
        if not known:
            continue
        aim = statistics.median(known)
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
    able = [(cell.space, cell.chosen) for cell in cells if cell.mean and cell.chosen]
    both = list(itertools.combinations(able, 2))
    ps = {
        place: intervals.paired_p(a.accuracies, b.accuracies)
        for place, ((_, a), (_, b)) in enumerate(both)
        if _paired(a, b) and len(a.accuracies) >= ENOUGH
    }
    adjusted = dict(zip(ps, intervals.holm([*ps.values()]), strict=True))
    pairs = []
    for place, ((first, a), (second, b)) in enumerate(both):
        improvement = intervals.improvement(a.accuracies, b.accuracies)
        difference = intervals.difference(a.accuracies, b.accuracies) if _paired(a, b) else None
        p = adjusted.get(place)
        different = None if p is None else intervals.different(improvement, p)
        pairs.append(Pair(density, first, second, improvement, difference, p, different))
    return pairs


def _paired(a: Line, b: Line) -> bool:
    """Has every seed an accuracy of both?"""
    return a.seeds == b.seeds and None not in (*a.test, *b.test)


# About --------------------------------------------------------------------------------------------


def _about(compared: list[Source]) -> dict[str, Any]:
    """What a reader needs to run it again: rule 14."""
    first = compared[0].member.settings
    records = [source.record for source in compared]
    records += [source.runs for source in compared if source.runs]
    ends = (trial.ended or 0.0 for record in records for trial in record.trials.values())

    def different(key: str) -> list[Any]:
        values = [record.header.get(key) for record in records]
        return [value for n, value in enumerate(values) if value and value not in values[:n]]

    return {
        "versions": different("versions"),
        "hardware": different("hardware"),
        "commands": [" ".join(["sparsetune", *map(_typed, argv)]) for argv in different("argv")],
        "network": first.model.name if first.model.name != "mlp" else f"mlp {first.model.widths}",
        "data": first.data.name,
        "epochs": first.epochs,
        "sampler": first.sampler.name,
        "seed": first.seed,
        "scheduler": compared[0].scheduling.reason,
        "spaces": {source.cell.name: source.member.space.to_dict() for source in compared},
        "newest": max(ends, default=0.0),
    }


def _typed(word: str) -> str:
    """As a shell takes it."""
    return shlex.quote(word) if re.search(r"[\s\"'$]", word) else word
