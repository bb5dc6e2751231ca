"""Many trials on a CPU: each slot in turn takes some steps on batches that all of them share.

The rule to know: on a CPU the matrix products of one trial already keep a core busy, and its
weights stay in the cache when it takes several steps in a row; stacking trials into larger
products is slower. What is gained comes from preparing a batch once for all slots, and from
compiling the step whole. No slot's tensors are ever part of an operation of another's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsetune import checkpoint, optim, trainer
from sparsetune.checkpoint import Snapshot
from sparsetune.engine import step
from sparsetune.methods import noise
from sparsetune.trainer import Metrics, Setup, TrialState

STEPS_PER_TURN = 16  # their batches fit a cache; fewer would fetch a slot's weights more often


class Slot(NamedTuple):
    setup: Setup
    state: TrialState  # its tensors are the slot's own and change in place


class Run:
    """One slot's way through one epoch, steered turn by turn."""

    def __init__(self, slot: Slot, compiled: Callable[..., None] | None) -> None:
        self.setup, self.before = slot
        self.state = slot.state
        self.gates = trainer.gates_of(*slot)
        self.active = trainer.num_active(self.setup, self.gates)
        self.sums = torch.zeros(1 + len(self.active), dtype=torch.float64)  # see `step.Running`
        self.compiled = compiled
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(noise.key(self.setup.settings.seed, "forward", self.state.epoch))
            self.random = torch.get_rng_state()

    def turn(self, images: Tensor, labels: Tensor) -> None:
        """Steps on batches [n, B, c, h, w] and [n, B]."""
        self.setup.model.train()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.random)
            for batch in zip(images, labels, strict=True):
                self.step(*batch)
            self.random = torch.get_rng_state()

    def step(self, images: Tensor, labels: Tensor) -> None:
        if self.compiled is not None and not trainer.is_due(self.setup, self.state.step + 1):
            self._compiled_step(images, labels)
            return
        self.sums[1:] += self.active
        held = self.gates
        self.state, self.gates, loss = trainer.train_step(
            self.setup, self.state, self.gates, images, labels
        )
        self.sums[0] += loss
        if self.gates is not held:
            self.active = trainer.num_active(self.setup, self.gates)

    def _compiled_step(self, images: Tensor, labels: Tensor) -> None:
        assert self.compiled is not None
        settings, state = self.setup.settings, self.state
        if not self.setup.moves_masks:
            self.sums[1:] += self.active
        numbers = optim.step_numbers(
            settings.optimizer, settings.schedule, state.step + 1, self.setup.num_steps
        )
        self.compiled(
            step.Running(
                state.params,
                state.buffers,
                *state.moments,
                self.gates,
                self.sums,
            ),
            state.method,
            self.setup.hp,
            torch.tensor(numbers),
            images,
            labels,
        )
        self.state = state._replace(step=state.step + 1)

    def end(self) -> tuple[TrialState, Metrics]:
        loss, *active = self.sums / self.setup.steps_per_epoch
        return trainer.end_epoch(self.setup, self.before, self.state, float(loss), active)
        

class Turns:
    """See `pool.Backend`."""

    def __init__(self, compiles: bool) -> None:
        self._compiles = compiles
        self._compiled: Callable[..., None] | None = None
        self._slots: dict[int, Slot] = {}

    def attach(self, slot: int, setup: Setup, start: Snapshot | None) -> None:
        if self._compiles and self._compiled is None:
            self._compiled = compiled(setup)
        state = trainer.begin(setup) if start is None else checkpoint.decode(setup, start)
        self._slots[slot] = Slot(setup, trainer.copied(state))

    def advance(self) -> dict[int, Metrics]:
        began = time.perf_counter()
        groups: dict[Any, dict[int, Run]] = {}
        for number, slot in self._slots.items():
            key = trainer.batches_key(slot.setup, slot.state.epoch)
            groups.setdefault(key, {})[number] = Run(slot, self._compiled)
        for runs in groups.values():
            _train(list(runs.values()))
        results = {}
        for runs in groups.values():
            for number, run in runs.items():
                state, results[number] = run.end()
                self._slots[number] = Slot(run.setup, state)
        seconds = (time.perf_counter() - began) / len(results)
        return {n: results[n] | {"device_seconds": seconds} for n in self._slots}

    def snapshot(self, slot: int) -> Snapshot:
        return checkpoint.encode(trainer.copied(self._slots[slot].state))

    def detach(self, slot: int) -> None:
        del self._slots[slot]


def _train(runs: list[Run]) -> None:
    """One epoch of slots whose batches are equal."""
    setup = runs[0].setup
    epoch = trainer.batches(setup, runs[0].state.epoch)
    for places in epoch.places.split(STEPS_PER_TURN):
        images, labels = trainer.inputs(setup, epoch, places)
        for run in runs:
            run.turn(images, labels)


def compiled(setup: Setup) -> Callable[..., None]:
    """The step, compiled whole; what it returns in `Running` it writes into what it was given."""
    pure = step.make(setup)

    def in_place(
        running: step.Running, state: Any, hp: Any, numbers: Tensor, images: Tensor, labels: Tensor
    ) -> None:
        after, _ = pure(running, state, hp, numbers, images, labels)
        for old, new in zip(step.tensors(running), step.tensors(after), strict=True):
            if new is not old:
                old.copy_(new)

    whole = torch.compile(in_place, dynamic=False, fullgraph=True)
    return torch.no_grad()(whole)
