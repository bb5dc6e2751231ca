"""sparsetune: search the hyperparameters of sparse training methods, and compare them fairly."""

from __future__ import annotations

from typing import Any

__all__ = ["load", "trainable"]


def __getattr__(name: str) -> Any:
    # Late, so that `import sparsetune.methods` needs no more than torch and no Ray.
    if name == "trainable":
        from sparsetune.sweeps.alone import trainable

        return trainable
    if name == "load":
        from sparsetune.reports.frames import load

        return load
    raise AttributeError(f"module 'sparsetune' has no attribute '{name}'")
