"""Any network, any method: dense tensors and masks, K trials at once.

The rule to know: a GPU wants all slots in one operation (`lifted`), a CPU wants them one after
another (`turns`); the step is the same text (`step`). On a CPU without a C++ compiler nothing can
be compiled and a slot costs what it costs alone, less its share of preparing the batches.
"""

from __future__ import annotations

import functools

import torch
from torch.utils._triton import has_triton

from sparsetune.engine.stacked import step
from sparsetune.engine.stacked.lifted import Lifted
from sparsetune.engine.stacked.turns import Turns
from sparsetune.training.checkpoint import Snapshot
from sparsetune.training.setup import Setup
from sparsetune.training.trainer import Metrics


@functools.cache
def has_compiler() -> bool:
    """Can torch make code for this CPU: is there a C++ compiler, and does it work?"""
    try:
        step.compiled(torch.add, (torch.ones(16), torch.ones(16)))
    except (RuntimeError, OSError):  # Inductor's own errors are RuntimeErrors
        return False
    return True


def unfit(setup: Setup) -> str:
    """Why trials like this one cannot be trained here, in a sentence; "" where they can.

    A CPU can train all that the solo trainer can. A GPU cannot train a user's network that draws
    random numbers in its forward pass, or that torch.vmap refuses.
    """
    if setup.device.type == "cpu" or ":" not in setup.settings.model.name:
        return ""
    name = setup.settings.model.name
    if step.draws(setup):
        return f"{name} draws random numbers in its forward pass, which differ in a stack of trials"
    try:
        probe = Lifted(1, compiles=False)
        probe.attach(0, setup, None)
        probe.try_step()
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        return f"{name} cannot be lifted over trials by torch.vmap: {reason}"
    return ""


class Stacked:
    """See `pool.Backend`. `compiles`: None decides by what there is to compile with."""

    def __init__(self, slots: int, compiles: bool | None = None) -> None:
        self._slots, self._compiles = slots, compiles
        self._backend: Turns | Lifted | None = None

    def attach(self, slot: int, setup: Setup, start: Snapshot | None) -> None:
        if self._backend is None:
            on_cpu, compiles = setup.device.type == "cpu", self._compiles
            if compiles is None:
                compiles = has_compiler() if on_cpu else has_triton()
            self._backend = Turns(compiles) if on_cpu else Lifted(self._slots, compiles)
        self._backend.attach(slot, setup, start)

    def advance(self) -> dict[int, Metrics]:
        return {} if self._backend is None else self._backend.advance()

    def snapshot(self, slot: int) -> Snapshot:
        assert self._backend is not None
        return self._backend.snapshot(slot)

    def detach(self, slot: int) -> None:
        assert self._backend is not None
        self._backend.detach(slot)
