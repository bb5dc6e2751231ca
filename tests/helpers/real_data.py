"""The real images, where they lie; a test that needs them is skipped elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparsetune.settings import DataSettings

REAL = Path(os.environ.get("SPARSETUNE_DATA") or Path(__file__).parents[2] / "../shared/data")


def real(name: str) -> DataSettings:
    if not (REAL / name).is_dir():
        pytest.skip(f"no {name} parquet in {REAL}; set SPARSETUNE_DATA to a folder that has it")
    return DataSettings(name=name, path=str(REAL))
