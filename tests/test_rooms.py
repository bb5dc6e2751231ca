"""A house of rooms: a folder imports only from rooms below its own, and none grows too large."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsetune

ROOT = Path(sparsetune.__file__).parent
ROOMS = [  # from the roof to the ground; what stands beside them is the package's own ground floor
    "reports",
    "comparison",
    "sweeps",
    "cluster",
    "search",
    "space",
    "engine",
    "training",
    "methods",
    "store",
]
ROOF = {"__init__", "cli", "testing"}
GROUND = {"settings", "names", "terminal", "machine"}
HEAVY = {  # library -> rooms that may import it
    "ray": {"cluster", "search", "sweeps"},
    "optuna": {"search", "space", "reports"},
    "wandb": {"sweeps/tracking.py", "reports/wandb_report.py"},
    "omegaconf": {"space"},
    "torch": {"reports", "comparison", "sweeps", "space", "engine", "training", "methods"},
}
MODULES, LINES, ROOM_LINES = 14, 450, 2_500


def modules() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))


def imported(file: str) -> Iterator[str]:
    """Dotted names of what the module imports, anywhere in it."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level(head: str) -> int:
    """Of a room, or of a module beside them: 0 is the roof."""
    assert head in {*ROOMS, *ROOF, *GROUND}, f"{head} is in no room"
    return ROOMS.index(head) + 1 if head in ROOMS else 0 if head in ROOF else len(ROOMS) + 1


@pytest.mark.parametrize("file", modules())
def test_imports_point_downwards(file: str) -> None:
    room = file.partition("/")[0].removesuffix(".py")
    for name in imported(file):
        package, *rest = name.split(".")
        if package in HEAVY and room not in ROOF | GROUND:
            allowed = HEAVY[package]
            assert room in allowed or file in allowed, f"{file} may not import {package}"
        if (
            package == "sparsetune"
            and rest
            and (ROOT / f"{rest[0]}.py").exists() | (ROOT / rest[0]).is_dir()
        ):
            assert rest[0] == room or level(rest[0]) > level(room), f"{file} imports {name}"


def test_no_room_is_too_large() -> None:
    lines = {file: len((ROOT / file).read_text().splitlines()) for file in modules()}
    assert {file: n for file, n in lines.items() if n > LINES} == {}
    for folder in {(ROOT / file).parent for file in modules()}:
        assert len(list(folder.glob("*.py"))) <= MODULES, folder
    for room in ROOMS:
        assert sum(n for file, n in lines.items() if file.startswith(f"{room}/")) <= ROOM_LINES


def test_a_trials_process_needs_no_torch() -> None:
    """It gets the engine's actor by name, which imports the actor's class, and reports."""
    heavy = ["torch", "numpy", "pyarrow", "optuna", "wandb", "omegaconf"]
    code = f"import sys, sparsetune.cluster.trial; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
