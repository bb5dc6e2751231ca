"""Pictures of a comparison: accuracies, costs, learning curves, densities, what a search was worth.

The rule to know: all but "best of k" come from confirmation runs alone; every figure says in its
caption from which runs it is, and how many seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from sparsetune.comparison.values import Cell, Comparison, Interval, Level
from sparsetune.reports.svg import PENTAGON, Axis, Chart, Look, around, looks
from sparsetune.reports.tables import percent, with_unit

SMALL = (132.0, 190.0)  # height and width of the pictures of single members


class Figure(NamedTuple):
    """Pictures under one heading, with what they show and from which runs. `css`: of their grid."""

    title: str
    pictures: list[str]
    caption: str
    css: str = ""


class Results:
    """A comparison with what its pictures share: how each series looks, and from which runs."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.looks = {c.name: look_of(comparison, c.space, _space(c)) for c in comparison.cells}
        self.by_space = {cell.space: self.looks[cell.name] for cell in comparison.cells}
        self.series: dict[Look, list[Cell]] = {}
        for cell in comparison.cells:
            self.series.setdefault(self.looks[cell.name], []).append(cell)
        self.dense = [cell for cell in comparison.cells if _stays_dense(cell)]
        counts = {len(cell.chosen.seeds) for cell in comparison.cells if cell.chosen} or {0}
        many = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
        listed = ", ".join(map(str, comparison.seeds))
        self.runs = f"Confirmation runs, {many} seeds each ({listed})."

    def figures(self) -> list[Figure]:
        return [self._flops(), self._curves(), self._layers(), self._best_of()]

    def at(self, level: Level) -> list[Cell]:
        """Those that stand at this level, and the dense ones beside them."""
        names = self.comparison.levels[level]
        return [c for c in self.comparison.cells if c.name in names] + self.dense

    def level(self, level: Level) -> str:
        flops = self.comparison.match == "flops"
        said = sparse(level.density) + (f", {level.multiplier}x" if level.multiplier > 1 else "")
        return f"FLOPs as at {said}" if flops else said

    def main(self) -> Figure:
        """Accuracy against density."""
        drawn = [c for c in self.comparison.cells if c.mean and c.chosen and c.chosen.density]
        chart = self._accuracies(drawn) if drawn else None
        caption = (
            f"Test accuracy against sparsity, mean and 95 % interval. {self.runs} Each method at "
            "the density it has at the end of training; points are moved aside a little, so that "
            "intervals do not hide each other. Lighter lines: the start point of the paper, "
            "untuned. The band is the dense network."
        )
        if chart and chart.below:
            caption += " An arrow at the lower edge: below the picture."
        if any(cell.state != "confirmed" for cell in drawn):
            caption += " Hollow: infeasible or not confirmed."
        pictures = [chart.svg()] if chart else []
        return Figure("Accuracy against density", pictures, caption, "one")

    def _accuracies(self, drawn: list[Cell]) -> Chart:
        means = [cell.mean.value for cell in drawn if cell.mean]
        papers = [cell.paper_mean.value for cell in drawn if cell.paper_mean]
        asked = sorted({cell.density for cell in drawn if cell.density is not None})
        sparser = [cell for cell in drawn if cell not in self.dense]
        ways = [_density(cell) for cell in sparser]
        ways += [_density(cell, "paper") for cell in sparser if cell.paper_mean]
        x = around(ways or [1.0], log=True, room=0.1)
        x = Axis(x.high, x.low, "sparsity of all weights (log of density)", True, sparsity, asked)
        ends = [end for cell in drawn if cell.mean for end in (cell.mean.low, cell.mean.high)]
        y = window(means, [*ends, *papers], "test accuracy, %")
        chart = Chart(x, y, "", [look.name for look in self.series], height=250)
        for cell in self.dense:
            if cell.mean:
                look, across = self.looks[cell.name], (x.low, x.high)
                value, low, high = cell.mean
                chart.band(look, across, (low,) * 2, (high,) * 2, data_low=low, data_high=high)
                chart.line(look, across, (value,) * 2, label=look.name)
        lines = {look: cells for look, cells in self.series.items() if cells[0] not in self.dense}
        for place, (look, cells) in enumerate(lines.items()):
            shift = (place - (len(lines) - 1) / 2) * 1.6
            for kind in ("paper", ""):
                known = [cell for cell in cells if _mean(cell, kind)]
                known.sort(key=lambda cell: -_density(cell, kind))
                able = [cell for cell in known if cell.state == "confirmed"]
                values = [mean.value for cell in able if (mean := _mean(cell, kind))]
                at = [_density(cell, kind) for cell in able]
                chart.line(look, at, values, kind, "" if kind else look.name, shift)
                for cell in known:
                    _point(chart, look, cell, kind, shift)
        return chart

    def _flops(self) -> Figure:
        drawn = [cell for cell in self.comparison.cells if cell.mean and cell.chosen]
        pictures = []
        for name, title in (("flops_inference", "inference, FLOPs per image"),
                            ("flops_train", "training of one seed, FLOPs")):  # fmt: skip
            cost = attrgetter(f"chosen.{name}")
            able = [cell for cell in drawn if cost(cell)]
            if not able:
                continue
            y = window([c.mean.value for c in able if c.mean], [], "test accuracy, %")
            x = around([cost(cell) for cell in able], title, log=True, form=with_unit)
            chart = Chart(x, y, "", [look.name for look in self.series])
            for look, cells in self.series.items():
                known = sorted((cell for cell in cells if cell in able), key=cost)
                means = [cell.mean for cell in known if cell.mean]
                values = [mean.value for mean in means]
                chart.line(look, [cost(cell) for cell in known], values, label=look.name)
                for cell, mean in zip(known, means, strict=True):
                    says = f"{cell.name}: {percent(mean)}, {with_unit(cost(cell))} FLOPs"
                    kind = "" if cell.state == "confirmed" else "hollow"
                    chart.point(look, cost(cell), mean.value, says, kind, 3.2, *mean[1:])
            pictures.append(chart.svg())
        return Figure(
            "Accuracy against FLOPs", pictures,
            f"Test accuracy, mean and 95 % interval, against what the network costs. {self.runs} "
            "FLOPs of masked layers count nonzero weights; for methods that need dense gradients "
            "training counts them. A line joins the densities of a method.",
        )  # fmt: skip

    def _curves(self) -> Figure:
        pictures = []
        for metric, title, log in (("val/accuracy", "validation accuracy, %", False),
                                   ("train/loss", "training loss", True)):  # fmt: skip
            for level in self.comparison.levels:
                curves = {
                    self.looks[cell.name]: _spread(cell.chosen.curves[metric])
                    for cell in self.at(level)
                    if cell.chosen and cell.chosen.curves.get(metric)
                }
                ends = [mean for means, _ in curves.values() for mean in means]
                if not ends:
                    continue
                early = [m for means, _ in curves.values() for m in means[len(means) // 4 :]]
                y = around(ends, title, log=True) if log else window(early, [], title)
                x = Axis(1, max(2, *(len(means) for means, _ in curves.values())), "epoch")
                chart = Chart(x, y, self.level(level), [look.name for look in curves])
                for look, (means, sds) in curves.items():
                    ways = range(1, len(means) + 1)
                    pairs = list(zip(means, sds, strict=True))
                    lows = [max(m - s, y.low) if log else m - s for m, s in pairs]
                    chart.band(look, ways, lows, [m + s for m, s in pairs])
                    chart.line(look, ways, means, label=look.name)
                pictures.append(chart.svg())
        return Figure(
            "Learning curves", pictures,
            f"Mean over seeds and one standard deviation to each side. {self.runs} Validation "
            "accuracy comes from the runs that ranked the candidates, which hold images out.",
        )  # fmt: skip

    def _layers(self) -> Figure:
        pictures, still, depth = [], [], 0
        for cell in (cell for cells in self.series.values() for cell in cells):
            curves = cell.chosen.curves if cell.chosen else {}
            layers = {
                key.removeprefix("density/layer/"): means
                for key, runs in curves.items()
                if key.startswith("density/layer/") and (means := _spread(runs)[0])
            }
            if all(max(v) - min(v) < 1e-3 * max(v) for v in layers.values()):
                still += [cell.name] if layers else []
                continue
            depth = max(depth, len(layers))
            y = around([v for values in layers.values() for v in values], "", True, as_percent)
            x = Axis(1, max(2, *(len(values) for values in layers.values())))
            names = [name.removesuffix(".weight") for name in layers]
            title = titled(self.looks[cell.name], cell.density)
            chart = Chart(x, y, title, names if len(names) < 9 else [], *SMALL)
            for place, (name, values) in enumerate(layers.items()):
                look = Look(name, f"depth{round(6 * place / max(1, len(layers) - 1))}")
                called = names[place] if len(names) < 9 else ""
                chart.line(look, range(1, len(values) + 1), values, label=called)
            pictures.append(chart.svg())
        kept = f" The same throughout: {', '.join(still)}." if still else ""
        more = " Light to dark: from the input to the output." if depth > 8 else ""
        return Figure(
            "Density per layer over training", pictures,
            "Share of nonzero weights in each layer, %, on a log scale, by epoch; mean over seeds. "
            f"{self.runs}{more}{kept}", "small",
        )  # fmt: skip

    def _best_of(self) -> Figure:
        pictures = []
        for level in self.comparison.levels:
            searched = [cell for cell in self.at(level) if cell.tuning.best_of]
            lists = {self.looks[cell.name]: cell.tuning.best_of for cell in searched}
            if not lists:
                continue
            late = [v for values in lists.values() for v in values[len(values) // 6 :]]
            y = window(late, [], "expected best, %")
            x = Axis(1, max(2, *map(len, lists.values())), "trials")
            chart = Chart(x, y, self.level(level), [look.name for look in lists])
            for look, values in lists.items():
                chart.line(look, range(1, len(values) + 1), values, label=look.name)
            pictures.append(chart.svg())
        return Figure(
            "Best of k against k", pictures,
            "What a search of k trials would have found, on average (one seed; the maximum of a "
            "search is biased by its size, so none of these is a result). Search runs; a trial "
            "that diverged, failed or was above its bound counts as 0.",
        )  # fmt: skip


def look_of(comparison: Comparison, name: str, space: str) -> Look:
    """Of a series called `name`: its space's name, or "set 2x", or "mnist/set" where several sweeps
    have one. Spaces have colours and marks by order of appearance; the dense network has the ink's.
    """
    spaces = dict.fromkeys(map(_space, comparison.cells))
    dense = next((_space(cell) for cell in comparison.cells if _stays_dense(cell)), "")
    sweep, _, own = name.rpartition("/")
    first = comparison.names[0].partition("/")[0]
    coloured = [known for known in spaces if known != dense]
    colour, mark = ("ink", PENTAGON) if space == dense else looks(coloured.index(space))
    return Look(name, colour, mark, own != space or sweep not in ("", first))


def _space(cell: Cell) -> str:
    return cell.member.partition("/")[2].partition("@")[0]


def _stays_dense(cell: Cell) -> bool:
    """Is it the network as it is, with all of its weights?"""
    never = cell.begins == "dense" and cell.dense_gradient == "never" and cell.density is None
    return never and (cell.chosen is None or cell.chosen.density in (None, 1.0))


def titled(look: Look, density: float | None) -> str:
    return look.name if density is None else f"{look.name}, {sparse(density)}"


def sparse(density: float) -> str:
    return f"{sparsity(density)} sparse"


def sparsity(density: float) -> str:
    return f"{100 * (1 - density):.4g} %"


def as_percent(share: float) -> str:
    return f"{100 * share:.4g}"


def _point(chart: Chart, look: Look, cell: Cell, kind: str, shift: float) -> None:
    mean = _mean(cell, kind)
    assert mean is not None
    says = f"{cell.name}{', paper, untuned' if kind else ''}: {percent(mean)}"
    says += "" if cell.state == "confirmed" else f" ({cell.state}: {cell.note})"
    css = kind if cell.state == "confirmed" else f"{kind} hollow".strip()
    low, high = (None, None) if kind else mean[1:]
    chart.point(look, _density(cell, kind), mean.value, says, css, 2.4, low, high, shift)


def _density(cell: Cell, kind: str = "") -> float:
    line = cell.paper if kind else cell.chosen
    return line.density if line and line.density else cell.density or 1.0


def _mean(cell: Cell, kind: str) -> Interval | None:
    return cell.paper_mean if kind else cell.mean


def window(values: Sequence[float], more: Sequence[float], label: str) -> Axis:
    """An axis of accuracies, which a few very low ones cannot stretch; `more` if it is near."""
    known = [value for value in values if math.isfinite(value)] or [0.0]
    top, middle = max(known), statistics.median(known)
    reach = 3 * max(top - middle, 0.005)
    near = [*known, *(v for v in more if math.isfinite(v))]
    least = max(min(near), middle - reach)
    most = min(max(near), top + reach, max(top, 1.0))
    return around([least, most], label, form=as_percent)


def _spread(runs: list[list[float]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by epoch, of the runs that came so far and did not diverge."""
    means, sds = [], []
    for epoch in range(max(map(len, runs), default=0)):
        values = [run[epoch] for run in runs if epoch < len(run) and math.isfinite(run[epoch])]
        means.append(statistics.fmean(values) if values else math.nan)
        sds.append(statistics.stdev(values) if len(values) > 1 else 0.0)
    return means, sds
