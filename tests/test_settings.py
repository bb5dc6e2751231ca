"""Fields of the settings: what they take, and that it stands there alone."""

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsetune import settings
from sparsetune.settings import DataSettings, SweepSettings, check_group, check_value, keys_of
from sparsetune.space import config

KEYS = keys_of(SweepSettings)


def test_they_need_the_standard_library_alone() -> None:
    nodes = list(ast.walk(ast.parse(Path(settings.__file__).read_text())))
    used = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    used |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    assert {str(name).partition(".")[0] for name in used} <= sys.stdlib_module_names


@pytest.mark.parametrize("key", KEYS)
def test_a_default_is_allowed(key: str) -> None:
    value: Any = SweepSettings()
    for part in key.split("."):
        value = getattr(value, part)
    check_value(key, value)


BOUNDED = [key for key, known in KEYS.items() if "float" in str(known.kind) and key != "hp"]


@pytest.mark.parametrize("key", BOUNDED)
def test_nan_is_outside_all_bounds(key: str) -> None:
    value: Any = [math.nan] if KEYS[key].kind == list[float] else math.nan
    key = f"{key}.density/all" if key in config.OPEN else key
    with pytest.raises(ValueError, match=f"^{key}: .*nan"):
        config.check_value(key, value)


def test_bounds_in_words() -> None:
    for key, value, words in (
        ("trials", 0, "1 or more"),
        ("data.validation", 1.0, "0 or more and below 1"),
        ("optimizer.lr", 0.0, "above 0, up to 1e30"),
        ("optimizer.weight_decay", -1.0, "0 to 1e30"),
        ("order_seed", -1, "0 or more, or null"),
        ("update.doublings", [0.5, 2.0], "shares of training, 0 to 1, or null"),
        ("update.every", True, "epoch, or a number of steps, or null"),
    ):
        with pytest.raises(ValueError, match=f"^{key}: .* is out of range; allowed: ") as caught:
            check_value(key, value)
        assert str(caught.value).endswith(words)
    with pytest.raises(ValueError, match=r"^data.limit: -1 is out of range"):
        check_group("data", DataSettings(limit=-1))


def test_a_method_of_ones_own_is_not_looked_for_here() -> None:
    assert config.check_value("method", "nowhere.rules:METHOD") == "nowhere.rules:METHOD"
