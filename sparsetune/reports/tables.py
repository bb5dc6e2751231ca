"""A comparison as tables: what readers see in a terminal, in markdown and on the page.

The rule to know: a table is rows of plain text, percent and sparsity; each of its readers (the
console and markdown here, the page by its template) sets it in its own way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import rich.table
from rich.text import Text

from sparsetune.comparison.values import SLACK, Cell, Comparison, Interval, Line, Pair
from sparsetune.terminal import wide_console

STYLES = {"broken": "bold red", "holds": "green", "does not apply": "dim"}


class Column(NamedTuple):
    """`kind`: method has names of series, which have a mark; state a rule's; text is long."""

    heading: str
    side: Literal["left", "right"] = "right"
    kind: Literal["", "method", "state", "text"] = ""


class Table(NamedTuple):
    columns: list[Column]
    rows: list[list[str]]

    def split(self) -> list[Table]:
        """One for each value of the first column, which the heading of the second then names."""
        _, second, *others = self.columns
        return [
            Table(
                [second._replace(heading=f"{second.heading} at {value}"), *others],
                [row[1:] for row in self.rows if row[0] == value],
            )
            for value in dict.fromkeys(row[0] for row in self.rows)
        ]


class Section(NamedTuple):
    """What readers get below one title. On the page, `css` is of the grid, and `lead` above it."""

    title: str
    tables: list[Table]
    notes: Sequence[str] = ()
    css: str = ""
    lead: str = ""


def sections(comparison: Comparison) -> list[Section]:
    """Accuracies and costs per density, pairs, and the rules."""
    levels = [at_level(title, cells) for title, cells in by_level(comparison).items()]
    return [*levels, *([pairs(comparison)] if comparison.pairs else []), rules(comparison)]


def print_comparison(comparison: Comparison) -> None:
    console = wide_console()
    for section in [*sections(comparison), ranking(comparison)]:
        console.print(Text(section.title, style="bold"))
        for table in section.tables:
            console.print(_for_terminal(table), highlight=False)
        for note in section.notes:
            console.print(Text(f"  {note}"), soft_wrap=True)
        console.print()


def _for_terminal(table: Table) -> rich.table.Table:
    made = rich.table.Table(box=None, header_style="bold", pad_edge=False)
    for heading, side, kind in table.columns:
        if kind == "text":
            made.add_column(heading, justify=side, overflow="fold")
        else:
            made.add_column(heading, justify=side, no_wrap=True)
    styles = [STYLES if column.kind == "state" else {} for column in table.columns]
    for row in table.rows:
        made.add_row(*(Text(cell, of.get(cell, "")) for cell, of in zip(row, styles, strict=True)))
    return made


def markdown(section: Section) -> str:
    parts = [f"## {section.title}"]
    for columns, rows in section.tables:
        head = [[column.heading for column in columns], ["---"] * len(columns)]
        body = [[_escaped(content) for content in row] for row in rows]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in [*head, *body]))
    return "\n\n".join([*parts, *map(_escaped, section.notes)])


def _escaped(content: str) -> str:
    """Without what markdown would take for its own."""
    return re.sub(r"([\\`*_|<>])", r"\\\1", content)


def by_level(comparison: Comparison) -> dict[str, list[Cell]]:
    """The cells that are compared with each other, by a title, the best first; then those that no
    density was asked of."""
    cells = {cell.name: cell for cell in comparison.cells}
    levels = {}
    for level, names in comparison.levels.items():
        longer = f", {level.multiplier}x epochs" if level.multiplier > 1 else ""
        asked = f"density {level.density:g}{longer}"
        title = f"{100 * (1 - level.density):.4g} % sparse ({asked})"
        if comparison.match == "flops":
            title = f"FLOPs as at {asked}"
        levels[title] = best_first(cells[name] for name in names)
    standing = {name for names in comparison.levels.values() for name in names}
    if apart := [cell for cell in comparison.cells if cell.density is None]:
        levels["no density asked for"] = apart
    if lone := [c for c in comparison.cells if c.density is not None and c.name not in standing]:
        levels["beside the levels"] = lone
    return levels


def best_first(cells: Iterable[Cell]) -> list[Cell]:
    return sorted(cells, key=lambda cell: -cell.mean.value if cell.mean else 0.0)


def percent(interval: Interval | None) -> str:
    """97.31 ±0.21, of an interval that is as wide on either side; without an estimate a dash."""
    if interval is None:
        return "-"
    return f"{100 * interval.value:.2f} ±{50 * (interval.high - interval.low):.2f}"


def with_unit(value: float | None) -> str:
    """Three digits that matter, with a unit of thousands."""
    if value is None:
        return "-"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


METHOD = Column("method", "left", "method")
RESULTS = [
    METHOD,
    *map(Column, ("test, ± 95 %", "IQM, ± 95 %", "paper's", "density", "of sparse", "weights")),
    Column("note", "left", "state"),
]
COSTS = [
    METHOD,
    *map(Column, ("FLOPs/image", "train")),
    Column("gradient", "left"),
    *map(Column, ("trials", "stopped/div./failed", "epochs", "device-s", "confirm-s")),
]
PAIRS = [
    Column("density"),
    Column("pair", "left"),
    *map(Column, ("difference, points", "P(first better)", "p")),
    Column("", "left"),
]
RULES = [Column("", "left"), Column("rule", "left", "text"), Column("", "left", "state")]
RULES.append(Column("figure", "left", "text"))


def at_level(title: str, cells: list[Cell]) -> Section:
    denser = [cell for cell in cells if _is_denser(cell)]
    notes = [
        f"* {cell.space} with the settings of its paper, untuned, keeps "
        f"{_share(cell.paper, 'density')} of the weights, more than was asked for"
        for cell in denser
    ]
    results = [_result(cell, percent(cell.paper_mean) + "*" * (cell in denser)) for cell in cells]
    return Section(title, [Table(RESULTS, results), Table(COSTS, [*map(_costs, cells)])], notes)


def _is_denser(cell: Cell) -> bool:
    """Does its paper's point, which nothing binds, keep more weights than were asked for?"""
    kept = cell.paper.density if cell.paper else None
    return bool(kept and cell.density and kept > cell.density * (1 + SLACK))


def _result(cell: Cell, paper: str) -> list[str]:
    line = cell.chosen
    return [
        cell.space, percent(cell.mean), percent(cell.iqm), paper,
        _share(line, "density"), _share(line, "density_sparse"),
        with_unit(line.parameters if line else None),
        "" if cell.state == "confirmed" else cell.state,
    ]  # fmt: skip


def _costs(cell: Cell) -> list[str]:
    line, tuning = cell.chosen, cell.tuning
    return [
        cell.space,
        with_unit(line.flops_inference if line else None),
        with_unit(line.flops_train if line else None),
        _gradient(cell),
        str(tuning.asked),
        "/".join(str(tuning.trials[status]) for status in ("stopped", "diverged", "failed")),
        str(tuning.epochs),
        f"{tuning.device_seconds:.0f}",
        f"{line.device_seconds:.0f}" if line else "-",
    ]


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


def pairs(comparison: Comparison) -> Section:
    few = all(pair.p is None for pair in comparison.pairs)
    why = ["Below 6 seeds there are intervals only: no test could tell two apart."] if few else []
    table = Table(PAIRS, [_pair(pair) for pair in comparison.pairs])
    return Section("pairs, by seed, 95 % intervals", [table], why)


def _pair(pair: Pair) -> list[str]:
    better, low, high = pair.improvement
    return [
        f"{pair.density:g}",
        f"{pair.a} - {pair.b}",
        percent(pair.difference),
        f"{better:.2f} [{low:.2f}, {high:.2f}]",
        "-" if pair.p is None else f"{pair.p:.3f}",
        {None: "", True: "different", False: "not told apart"}[pair.different],
    ]


def rules(comparison: Comparison) -> Section:
    rows = [[str(rule.number), rule.title, rule.state, rule.figure] for rule in comparison.rules]
    return Section("rules of a fair comparison", [Table(RULES, rows)], comparison.notes)


def ranking(comparison: Comparison) -> Section:
    """The ranking, or why there is none."""
    cells = {cell.name: cell for cell in comparison.cells}
    why = []
    for rule in comparison.rules:
        if rule.forbids and rule.state == "broken":
            why.append(f"Rule {rule.number}, {rule.title}, is broken: {rule.figure}")
            why.append(f"Mend it: {rule.mend}")
    for level, order in (comparison.ranking or {}).items():
        means = {cells[name].space: cells[name].mean for name in comparison.levels[level]}
        shown = ", ".join(
            f"{place}. {space} {100 * mean.value:.2f}"
            for place, space in enumerate(order, start=1)
            if (mean := means[space])
        )
        why.append(f"At density {level}: {shown or 'nothing to rank'}")
    return Section("No ranking" if comparison.ranking is None else "ranking", [], why)
