"""The sparse training methods: `METHODS`, the one list, and `update`, one update to look at.

Adding a method is its file, a line here, a search space and a test.
"""

from __future__ import annotations

from sparsetune.methods import dense, dsr, dst, gmp, rigl, set, sm, static
from sparsetune.methods.contract import Method
from sparsetune.methods.update import update

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD for module in (set, dsr, sm, dst, rigl, gmp, static, dense)
}

__all__ = ["METHODS", "Method", "update"]
