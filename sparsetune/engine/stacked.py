"""Any network, any method, many slots: dense tensors and masks. See `turns` (CPU), `lifted` (GPU)."""

from __future__ import annotations

import functools

import torch

from sparsetune.checkpoint import Snapshot
from sparsetune.engine.turns import Turns
from sparsetune.trainer import Metrics, Setup


@functools.cache
def has_compiler() -> bool:
    """Can torch.compile make code for this CPU: is there a working C++ compiler?"""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError):
        return False
    return True


class Stacked:
    def __init__(self, slots: int, compiles: bool | None = None) -> None:
        self._backend = Turns(has_compiler() if compiles is None else compiles)

    def attach(self, slot: int, setup: Setup, start: Snapshot | None) -> None:
        self._backend.attach(slot, setup, start)

    def advance(self) -> dict[int, Metrics]:
        return self._backend.advance()

    def snapshot(self, slot: int) -> Snapshot:
        return self._backend.snapshot(slot)

    def detach(self, slot: int) -> None:
        self._backend.detach(slot)
