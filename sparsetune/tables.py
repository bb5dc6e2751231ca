"""A comparison as tables in a terminal. The rule to know: readers get percent and sparsity."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from sparsetune.comparison import Cell, Comparison, Interval, Line
from sparsetune.status import wide_console

STYLES = {"broken": "bold red", "holds": "green", "does not apply": "dim"}


def print_comparison(comparison: Comparison) -> None:
    """Accuracies and costs per density, pairs, the rules, and the ranking or why there is none."""
    console = wide_console()
    cells = {cell.name: cell for cell in comparison.cells}
    apart = [cell for cell in comparison.cells if cell.density is None]
    for level, names in comparison.levels.items():
        at = [cells[name] for name in names]
        at.sort(key=lambda cell: -cell.mean.value if cell.mean else 0.0)
        title = f"{1 - float(level):.4g} sparsity (density {level})"
        if comparison.match == "flops":
            title = f"FLOPs as at density {level}"
        _print_cells(console, title, at)
    if apart:
        _print_cells(console, "no density asked for", apart)
    _print_pairs(console, comparison)
    _print_rules(console, comparison)
    for note in comparison.notes:
        console.print(f"  {note}", style="dim", highlight=False, soft_wrap=True)
    _print_ranking(console, comparison)


def percent(interval: Interval | None) -> str:
    """97.31 [97.10, 97.52]; one with no estimate is a dash."""
    if interval is None:
        return "-"
    value, low, high = (100 * each for each in interval)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def number(value: float | None) -> str:
    """Three digits that matter, with a unit of thousands."""
    if value is None:
        return "-"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def _print_cells(console: Console, title: str, cells: list[Cell]) -> None:
    results = _table(
        ("method", "test %", "IQM %", "paper's %", "density", "of sparse", "weights", "note"),
        left=("method", "note"),
    )
    costs = _table(
        ("method", "FLOPs/image", "training", "gradient", "trials", "epochs", "device-s",
         "stopped", "diverged", "failed", "confirm-s"),
        left=("method", "gradient"),
    )  # fmt: skip
    for cell in cells:
        line = cell.chosen
        density = [_share(line, "density"), _share(line, "density_sparse")]
        state = "" if cell.state == "confirmed" else cell.state
        results.add_row(
            cell.space, percent(cell.mean), percent(cell.iqm), percent(cell.paper_mean),
            *density, number(line.parameters if line else None), state,
        )  # fmt: skip
        tuning = cell.tuning
        costs.add_row(
            cell.space, number(line.flops_inference if line else None),
            number(line.flops_train if line else None),
            {"never": "sparse", "at_update": "dense at updates", "always": "dense"}[
                cell.dense_gradient
            ],
            str(tuning.asked), str(tuning.epochs), f"{tuning.device_seconds:.0f}",
            *(str(tuning.trials[s]) for s in ("stopped", "diverged", "failed")),
            f"{line.device_seconds:.0f}" if line else "-",
        )  # fmt: skip
    console.print(f"[bold]{title}[/bold]")
    console.print(results)
    console.print(costs)
    console.print()


def _table(headings: Iterable[str], left: Iterable[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    return table


def _share(line: Line | None, name: str) -> str:
    value: float | None = getattr(line, name, None)
    return "-" if value is None else f"{value:.4f}"


def _print_pairs(console: Console, comparison: Comparison) -> None:
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
    console.print("[bold]pairs, by seed, 95 % intervals[/bold]")
    console.print(table)
    if all(pair.p is None for pair in comparison.pairs):
        console.print("Below 6 seeds there are intervals only: no test could tell two apart.")
    console.print()


def _print_rules(console: Console, comparison: Comparison) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("", "rule", "", "figure"):
        table.add_column(heading, overflow="fold")
    for rule in comparison.rules:
        state = f"[{STYLES[rule.state]}]{rule.state}[/]"
        table.add_row(str(rule.number), rule.title, state, rule.figure)
    console.print(table, highlight=False)
    console.print()


def _print_ranking(console: Console, comparison: Comparison) -> None:
    broken = [rule for rule in comparison.rules if rule.state == "broken"]
    for rule in broken:
        if rule.forbids:
            console.print(f"[bold red]No ranking[/]: rule {rule.number}, {rule.title}, is broken:")
            console.print(f"  {rule.figure}", highlight=False, soft_wrap=True)
            console.print(f"  Mend it: {rule.mend}", highlight=False, soft_wrap=True)
    cells = {(level, cells.space): cells for level, cells in _at(comparison)}
    for level, order in (comparison.ranking or {}).items():
        shown = ", ".join(
            f"{place}. {space} {100 * mean.value:.2f}"
            for place, space in enumerate(order, start=1)
            if (mean := cells[level, space].mean)
        )
        console.print(f"[bold]At density {level}[/]: {shown or 'nothing to rank'}", soft_wrap=True)


def _at(comparison: Comparison) -> Iterable[tuple[str, Cell]]:
    cells = {cell.name: cell for cell in comparison.cells}
    for level, names in comparison.levels.items():
        for name in names:
            yield level, cells[name]
