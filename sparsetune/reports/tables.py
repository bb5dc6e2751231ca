"""A comparison as tables, in a terminal or in markdown. The rule to know: readers get percent and
sparsity."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparsetune.comparison.values import SLACK, Cell, Comparison, Interval, Line
from sparsetune.terminal import wide_console

STYLES = {"broken": "bold red", "holds": "green", "does not apply": "dim"}


class Section(NamedTuple):
    """What readers get below one title."""

    title: str
    tables: list[Table]
    lines: list[str]


def sections(comparison: Comparison) -> list[Section]:
    """Accuracies and costs per density, pairs, the rules, and the ranking or why there is none."""
    found = [_cells(title, cells) for title, cells in by_level(comparison).items()]
    return [*found, *_pairs(comparison), _rules(comparison), _ranking(comparison)]


def print_comparison(comparison: Comparison) -> None:
    console = wide_console()
    for title, tables, lines in sections(comparison):
        console.print(Text(title, style="bold"))
        for table in tables:
            console.print(table, highlight=False)
        for line in lines:
            console.print(Text(f"  {line}"), soft_wrap=True)
        console.print()


def markdown(section: Section) -> str:
    parts = [f"## {section.title}"]
    for table in section.tables:
        columns = [[column.header, "---", *column.cells] for column in table.columns]
        rows = zip(*([_plain(str(cell)) for cell in column] for column in columns), strict=True)
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join([*parts, *(_plain(escape(line)) for line in section.lines)])


def _plain(markup: str) -> str:
    """Without rich's styles, and without what markdown would take for its own."""
    return re.sub(r"([\\`*_|<>])", r"\\\1", Text.from_markup(markup).plain)


def by_level(comparison: Comparison) -> dict[str, list[Cell]]:
    """The cells that are compared with each other, by a title, the best first; then those that no
    density was asked of."""
    cells = {cell.name: cell for cell in comparison.cells}
    found = {}
    for level, names in comparison.levels.items():
        longer = f", {level.multiplier}x epochs" if level.multiplier > 1 else ""
        asked = f"density {level.density:g}{longer}"
        title = f"{100 * (1 - level.density):.4g} % sparse ({asked})"
        if comparison.match == "flops":
            title = f"FLOPs as at {asked}"
        at = [cells[name] for name in names]
        found[title] = sorted(at, key=lambda cell: -cell.mean.value if cell.mean else 0.0)
    standing = {name for names in comparison.levels.values() for name in names}
    if apart := [cell for cell in comparison.cells if cell.density is None]:
        found["no density asked for"] = apart
    if lone := [c for c in comparison.cells if c.density is not None and c.name not in standing]:
        found["beside the levels"] = lone
    return found


def percent(interval: Interval | None) -> str:
    """97.31 ±0.21, of an interval that is as wide on either side; without an estimate a dash."""
    if interval is None:
        return "-"
    return f"{100 * interval.value:.2f} ±{50 * (interval.high - interval.low):.2f}"


def number(value: float | None) -> str:
    """Three digits that matter, with a unit of thousands."""
    if value is None:
        return "-"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def _cells(title: str, cells: list[Cell]) -> Section:
    results = _table(
        (
            "method",
            "test, ± 95 %",
            "IQM, ± 95 %",
            "paper's",
            "density",
            "of sparse",
            "weights",
            "note",
        ),
        left=("method", "note"),
    )
    costs = _table(
        ("method", "FLOPs/image", "train", "gradient", "trials", "stopped/div./failed",
         "epochs", "device-s", "confirm-s"),
        left=("method", "gradient"),
    )  # fmt: skip
    denser = [cell for cell in cells if _is_denser(cell)]
    for cell in cells:
        line = cell.chosen
        paper = percent(cell.paper_mean) + "*" * (cell in denser)
        density = [_share(line, "density"), _share(line, "density_sparse")]
        state = "" if cell.state == "confirmed" else cell.state
        results.add_row(
            escape(cell.space), percent(cell.mean), percent(cell.iqm), paper,
            *density, number(line.parameters if line else None), state,
        )  # fmt: skip
        tuning = cell.tuning
        costs.add_row(
            escape(cell.space), number(line.flops_inference if line else None),
            number(line.flops_train if line else None),
            _gradient(cell),
            str(tuning.asked),
            "/".join(str(tuning.trials[s]) for s in ("stopped", "diverged", "failed")),
            str(tuning.epochs), f"{tuning.device_seconds:.0f}",
            f"{line.device_seconds:.0f}" if line else "-",
        )  # fmt: skip
    lines = [
        f"* {cell.space} with the settings of its paper, untuned, keeps "
        f"{_share(cell.paper, 'density')} of the weights, more than was asked for"
        for cell in denser
    ]
    return Section(title, [results, costs], lines)


def _is_denser(cell: Cell) -> bool:
    """Does its paper's point, which nothing binds, keep more weights than were asked for?"""
    kept = cell.paper.density if cell.paper else None
    return bool(kept and cell.density and kept > cell.density * (1 + SLACK))


def _table(headings: Iterable[str], left: Iterable[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    return table


def _gradient(cell: Cell) -> str:
    """Of how many weights training needs the gradient."""
    if cell.method == "dense":
        return "dense"
    kinds = {"never": "sparse", "at_update": "dense at updates", "always": "dense"}
    dense_first = cell.begins == "dense" and cell.dense_gradient == "never"
    return "dense at first" if dense_first else kinds[cell.dense_gradient]


def _share(line: Line | None, name: str) -> str:
    value: float | None = getattr(line, name, None)
    return "-" if value is None else f"{value:.4f}"


def _pairs(comparison: Comparison) -> Iterable[Section]:
    if not comparison.pairs:
        return
    table = _table(
        ("density", "pair", "difference, points", "P(first better)", "p", ""), ("pair", "")
    )
    for pair in comparison.pairs:
        gap = "-" if pair.difference is None else percent(pair.difference)
        better, low, high = pair.improvement
        verdict = {None: "", True: "different", False: "not told apart"}[pair.different]
        table.add_row(
            f"{pair.density:g}", f"{pair.a} - {pair.b}", gap,
            f"{better:.2f} [{low:.2f}, {high:.2f}]",
            "-" if pair.p is None else f"{pair.p:.3f}", verdict,
        )  # fmt: skip
    few = all(pair.p is None for pair in comparison.pairs)
    why = ["Below 6 seeds there are intervals only: no test could tell two apart."] if few else []
    yield Section("pairs, by seed, 95 % intervals", [table], why)


def _rules(comparison: Comparison) -> Section:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("", "rule", "", "figure"):
        table.add_column(heading, overflow="fold")
    for rule in comparison.rules:
        state = f"[{STYLES[rule.state]}]{rule.state}[/]"
        table.add_row(str(rule.number), rule.title, state, escape(rule.figure))
    return Section("rules of a fair comparison", [table], comparison.notes)


def _ranking(comparison: Comparison) -> Section:
    cells = {cell.name: cell for cell in comparison.cells}
    why = [
        line
        for rule in comparison.rules
        if rule.forbids and rule.state == "broken"
        for line in (
            f"Rule {rule.number}, {rule.title}, is broken: {rule.figure}",
            f"Mend it: {rule.mend}",
        )
    ]
    for level, order in (comparison.ranking or {}).items():
        means = {cells[name].space: cells[name].mean for name in comparison.levels[level]}
        shown = ", ".join(
            f"{place}. {space} {100 * mean.value:.2f}"
            for place, space in enumerate(order, start=1)
            if (mean := means[space])
        )
        why.append(f"At density {level}: {shown or 'nothing to rank'}")
    return Section("No ranking" if comparison.ranking is None else "ranking", [], why)
