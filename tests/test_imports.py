"""A module imports only from lines below its own, so that the package reads in one direction."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sparsetune

ROOT = Path(sparsetune.__file__).parent
ORDER = [
    {"cli"},
    {"compare", "report", "wandb_report"},
    {"searches"},
    {"pictures"},
    {"charts"},
    {"fairness", "frames", "export", "dashboard"},
    {"confirm"},
    {"sweep"},
    {"cluster"},
    {"fleet"},
    {"nodes"},
    {"watch"},
    {"progress", "tables", "warm"},
    {"status", "changes"},
    {"member"},
    {"alone", "trial", "tracking", "search.scheduler"},
    {"search.searcher"},
    {"search.study"},
    {"search.journal"},
    {"search.lines", "search.lock"},
    {"space"},
    {"config"},
    {"engine.actor"},
    {"engine.pool"},
    {"engine.solo", "engine.stacked", "engine.csr"},
    {"engine.csr_pack", "engine.lifted", "engine.turns"},
    {"engine.csr_trial", "engine.csr_optim", "engine.step"},
    {"engine.csr_index", "engine.linear"},
    {"checkpoint"},
    {"trainer"},
    {"optim", "flops"},
    {"models", "data"},
    {"data_files"},
    {"methods", "sources"},
    {"statistics"},
    {"comparison", "files", "imports", "machine", "memory", "settings"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
HEAVY = {"ray", "optuna", "wandb", "omegaconf"}
ALLOWED = {  # who may import what the trainer's machine may lack
    "ray": {"cluster", "fleet", "trial", "alone", "search.searcher", "search.scheduler"},
    "optuna": {"cli", "dashboard", "member", "searches", "space", "search.study"},
    "wandb": {"tracking", "wandb_report"},
    "omegaconf": {"config", "space"},
}


def test_a_trials_process_needs_no_torch() -> None:
    """It gets the engine's actor by name, which imports the actor's class, and reports."""
    heavy = ["torch", "numpy", "pyarrow", "optuna", "wandb", "omegaconf"]
    code = f"import sys, sparsetune.trial; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def modules() -> list[tuple[str, str, set[str]]]:
    """(line of ORDER, file, imported dotted names) of each module."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = "methods" if parts[0] == "methods" else ".".join(parts)
        if name.endswith("__init__"):
            continue
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} imports relatively"
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
        found.append((name, str(path.relative_to(ROOT)), imported))
    return found


@pytest.mark.parametrize(("name", "file", "imported"), modules(), ids=[m[1] for m in modules()])
def test_imports_point_downwards(name: str, file: str, imported: set[str]) -> None:
    assert name in LEVEL, f"{file} has no line in ORDER; give it one"
    for other in imported:
        head, *rest = other.split(".")
        if head in HEAVY:
            assert name in ALLOWED[head], f"{file} may not import {head}"
        if head != "sparsetune" or not rest:
            continue
        target = "methods" if rest[0] == "methods" else ".".join(rest)
        while target not in LEVEL and "." in target:
            target = target.rpartition(".")[0]
        if target == name or target not in LEVEL:
            continue
        assert LEVEL[target] > LEVEL[name], f"{file} imports {other}, which is not below it"
