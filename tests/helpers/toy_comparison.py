"""A comparison to draw: told sweeps, whose curves are given the shape that training gives them."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers.told_sweep import confirmed, told
from sparsetune.comparison.compare import compare
from sparsetune.comparison.values import Comparison, Line
from sparsetune.space.member import Member
from sparsetune.store.journal import Trial

ALL = ("set", "dsr", "sm", "dst", "rigl", "gmp", "static", "small_dense", "dense")
LOSS = {"set": 0.02, "dsr": 0.017, "sm": 0.015, "dst": 0.02, "rigl": 0.016, "gmp": 0.012,
        "static": 0.035, "small_dense": 0.05, "dense": 0.0}  # fmt: skip


def tell(one: Member, trial: Trial, role: str) -> dict[str, float] | str:
    """Better with more weights and a learning rate near 0.1; one that is far too high diverges."""
    chance = random.Random(f"{one.name} {trial.number} {role}")
    config = trial.params | trial.fixed
    if role == "search" and config.get("optimizer.lr", 0.1) > 0.4:
        return "diverged"
    density = one.density or 1.0
    away = math.log10(config.get("optimizer.lr", 0.1) / 0.1)
    value = 0.985 - LOSS[one.space.name] * (0.1 / (density + 0.05)) - 0.01 * away**2
    value += chance.gauss(0, 0.0012)
    metrics = {"val/accuracy": value, "test/accuracy": value - 0.002}
    if one.method.emergent:  # at the lowest density it never gets below its bound
        reached = 0.06 if density < 0.06 else density * chance.uniform(0.75, 1.02)
        metrics |= {"density/all": reached, "density/sparse": reached}
    return metrics


def toy(
    folder: Path, spaces: tuple[str, ...] = ALL, trials: int = 24, seeds: int = 5, epochs: int = 8
) -> Comparison:
    """Three densities; DST is infeasible at the lowest, and the last space is not confirmed."""
    words = ["name=toy", "density=0.05,0.1,0.2", f"trials={trials}", f"epochs={epochs}"]
    path = told(folder, spaces, *words, tell=tell)
    confirmed(path, f"seeds={seeds}", "top=2", tell=tell)
    return curved(compare("toy", storage=folder))


def curved(comparison: Comparison) -> Comparison:
    cells = [
        replace(cell, chosen=_curved(cell.chosen, cell.name) if cell.chosen else None)
        for cell in comparison.cells
    ]
    return replace(comparison, cells=cells)


def _curved(line: Line, name: str) -> Line:
    curves: dict[str, Any] = {}
    for metric, runs in line.curves.items():
        curves[metric] = [list(map(float, run)) for run in runs]
        for run, seed in zip(curves[metric], line.seeds, strict=False):
            chance = random.Random(f"{name} {metric} {seed}")
            for n, value in enumerate(run):
                late = 1 - 0.6 ** (n + 1)
                if metric == "val/accuracy":
                    run[n] = value - 0.15 * (1 - late) + chance.gauss(0, 0.003)
                elif metric == "train/loss":
                    run[n] = 0.8 * (1 - late) + 0.03 + abs(chance.gauss(0, 0.01))
                elif not name.startswith(("toy/static", "toy/small_dense", "toy/dense")):
                    factor = {"fc1.weight": 0.8, "fc2.weight": 1.5, "fc3.weight": 4.0}
                    run[n] = min(1.0, value * (1 + late * (factor.get(metric[14:], 1.0) - 1)))
    return replace(line, curves=curves)
