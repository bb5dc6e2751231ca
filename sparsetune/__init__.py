"""sparsetune: search the hyperparameters of sparse training methods, and compare them fairly.

The rule to know: a name is imported when it is asked for, so that looking at a method needs torch
alone, and reading a sweep no Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsetune.comparison.compare import compare
    from sparsetune.comparison.launch import confirm
    from sparsetune.engine.pool import train
    from sparsetune.methods import METHODS, Method, update
    from sparsetune.reports.frames import load
    from sparsetune.reports.page import report
    from sparsetune.settings import TrialSettings
    from sparsetune.sweeps.alone import trainable
    from sparsetune.sweeps.launch import resume, sweep

    __version__: str

__all__ = [
    "sweep",
    "resume",
    "confirm",
    "compare",
    "report",
    "load",
    "train",
    "TrialSettings",
    "METHODS",
    "Method",
    "update",
    "trainable",
    "__version__",
]

PLACES = {
    "sweep": "sweeps.launch",
    "resume": "sweeps.launch",
    "confirm": "comparison.launch",
    "compare": "comparison.compare",
    "report": "reports.page",
    "load": "reports.frames",
    "train": "engine.pool",
    "TrialSettings": "settings",
    "METHODS": "methods",
    "Method": "methods",
    "update": "methods",
    "trainable": "sweeps.alone",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sparsetune")
    if name not in PLACES:
        raise AttributeError(f"module 'sparsetune' has no attribute '{name}'")
    return getattr(importlib.import_module(f"sparsetune.{PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
