"""Numbers and settings as people read them, and the console that shows them."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console


def shown(value: Any) -> str:
    """A number as a reader wants it: four digits that matter."""
    if isinstance(value, list):
        return " / ".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def short(key: str) -> str:
    """Without its group, where the rest says enough by itself."""
    return key.partition(".")[2] if key.startswith(("hp.", "variant.", "optimizer.")) else key


def settings_shown(config: dict[str, Any]) -> str:
    return " ".join(f"{short(key)}={shown(value)}" for key, value in config.items())


def wide_console(stderr: bool = False) -> Console:
    """As wide as the terminal, and in a file or a pipe as wide as what is printed."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=10_000)
