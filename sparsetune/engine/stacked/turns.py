"""Many trials on a CPU: each slot in turn takes some steps on batches that all of them share.

The rule to know: on a CPU the matrix products of one trial already keep a core busy, and its
weights stay in the cache when it takes several steps in a row; stacking trials into larger
products is slower. What is gained comes from preparing a batch once for all slots and from
compiling the step whole. No slot's tensors are ever part of an operation of another's. Not
compiled, a slot is the solo trainer to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsetune.engine.stacked import step
from sparsetune.methods import noise
from sparsetune.training import checkpoint, trainer
from sparsetune.training.checkpoint import Snapshot
from sparsetune.training.setup import Setup, batches, batches_key, inputs, is_due
from sparsetune.training.trainer import Metrics, TrialState

STEPS_PER_TURN = 16  # their batches fit a cache; fewer would fetch a slot's weights more often

Batch = tuple[Tensor, Tensor]  # images [B, c, h, w] float32, labels [B]


class Compiled:
    """The step of a pool's trials, compiled whole when it is first called."""

    def __init__(self, setup: Setup) -> None:
        self._pure = step.make(setup)
        self._code: Callable[..., Any] | None = None

    @torch.no_grad()
    def __call__(self, fixed: Fixed, numbers: Tensor, batch: Batch) -> None:
        """One step, in place."""
        varying = (numbers, *batch)
        if self._code is None:
            self._code = step.compiled(self._in_place, (*fixed.args, *varying))
        self._code(fixed.leaves, varying)

    def _in_place(self, running: step.Running, *rest: Any) -> tuple[()]:
        after, _ = self._pure(running, *rest)
        for old, new in zip(pytree.tree_leaves(running), pytree.tree_leaves(after), strict=True):
            if new is not old:
                old.copy_(new)
        return ()


class Fixed:
    """What a slot's steps take besides numbers and batch, until its next topology update."""

    def __init__(self, *args: Any) -> None:
        self.args = args  # running, method state, hp
        self.leaves = pytree.tree_leaves(args)


class Run:
    """One slot's way through one epoch, steered turn by turn."""

    def __init__(self, setup: Setup, state: TrialState, compiled: Compiled | None) -> None:
        self.setup, self.before, self.state = setup, state, state
        self._compiled = compiled
        self._gates = trainer.gates_of(setup, state)
        self._active = trainer.num_active(self.setup, self._gates)
        self._sums = torch.zeros(1 + len(self._active), dtype=torch.float64)  # see step.Running
        self._fixed: Fixed | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(noise.key(self.setup.settings.seed, "forward", self.state.epoch))
            self._random = torch.get_rng_state()

    def turn(self, batches: list[Batch]) -> None:
        self.setup.model.train()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random)
            for batch in batches:
                if self._compiled is None or is_due(self.setup, self.state.step + 1):
                    self._step(batch)
                else:
                    self._compiled_step(self._compiled, batch)
            self._random = torch.get_rng_state()

    def _step(self, batch: Batch) -> None:
        self._sums[1:] += self._active
        held = self._gates
        self.state, self._gates, loss = trainer.train_step(
            self.setup, self.state, self._gates, *batch
        )
        self._sums[0] += loss
        if self._gates is not held:
            self._active = trainer.num_active(self.setup, self._gates)
            self._fixed = None

    def _compiled_step(self, compiled: Compiled, batch: Batch) -> None:
        setup, state = self.setup, self.state
        if self._fixed is None:
            running = step.Running(
                state.params, state.buffers, *state.moments, self._gates, self._sums
            )
            self._fixed = Fixed(running, state.method, step.hyperparameters(setup))
        if not setup.moves_masks:
            self._sums[1:] += self._active
        compiled(self._fixed, torch.tensor(setup.step_numbers(state.step + 1)), batch)
        self.state = state._replace(step=state.step + 1)

    def end(self) -> tuple[TrialState, Metrics]:
        loss, *active = self._sums / self.setup.steps_per_epoch
        return trainer.end_epoch(self.setup, self.before, self.state, float(loss), active)


class Turns:
    """See `pool.Backend`. `compiles`: None where there is a compiler. Without one a slot costs what
    it costs alone, less its share of preparing the batches."""

    @staticmethod
    def unfit(setup: Setup) -> str:
        return ""

    def __init__(self, slots: int, compiles: bool | None = None) -> None:
        self._compiles = step.has_compiler() if compiles is None else compiles
        self._compiled: Compiled | None = None
        # The states' tensors are the slots' own and change in place.
        self._slots: dict[int, tuple[Setup, TrialState]] = {}

    def attach(self, slot: int, setup: Setup, start: Snapshot | None) -> None:
        if self._compiles and self._compiled is None and not step.draws(setup):
            self._compiled = Compiled(setup)
        state = trainer.begin(setup) if start is None else checkpoint.decode(setup, start)
        self._slots[slot] = setup, trainer.copied(state)

    def advance(self) -> dict[int, Metrics]:
        began = time.perf_counter()
        groups: dict[Hashable, dict[int, Run]] = {}
        for number, (setup, state) in self._slots.items():
            run = Run(setup, state, self._compiled)
            groups.setdefault(batches_key(setup, state.epoch), {})[number] = run
        for runs in groups.values():
            self._train(list(runs.values()))
        results = {}
        for runs in groups.values():
            for number, run in runs.items():
                state, results[number] = run.end()
                self._slots[number] = run.setup, state
        seconds = (time.perf_counter() - began) / max(len(results), 1)
        return {n: results[n] | {"device_seconds": seconds} for n in self._slots}

    def _train(self, runs: list[Run]) -> None:
        """One epoch of slots whose batches are equal."""
        setup = runs[0].setup
        epoch = batches(setup, runs[0].state.epoch)
        for places in epoch.places.split(STEPS_PER_TURN):
            turn = list(zip(*inputs(setup, epoch, places), strict=True))
            for run in runs:
                run.turn(turn)

    def snapshot(self, slot: int) -> Snapshot:
        return checkpoint.encode(trainer.copied(self._slots[slot][1]))

    def detach(self, slot: int) -> None:
        del self._slots[slot]
