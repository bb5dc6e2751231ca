"""The plain trainer as a backend: slots one after another. The reference, and right for networks
that fill a device alone."""

from __future__ import annotations

from sparsetune.training import checkpoint, trainer
from sparsetune.training.checkpoint import Snapshot
from sparsetune.training.setup import Setup
from sparsetune.training.trainer import Metrics, TrialState


class Solo:
    """See `pool.Backend`."""

    @staticmethod
    def unfit(setup: Setup) -> str:
        return ""

    def __init__(self, slots: int) -> None:
        self._slots: dict[int, tuple[Setup, TrialState]] = {}

    def attach(self, slot: int, setup: Setup, start: Snapshot | None) -> None:
        state = trainer.begin(setup) if start is None else checkpoint.decode(setup, start)
        self._slots[slot] = setup, state

    def advance(self) -> dict[int, Metrics]:
        results = {}
        for slot, (setup, state) in self._slots.items():
            state, results[slot] = trainer.train_epoch(setup, state)
            self._slots[slot] = setup, state
        return results

    def snapshot(self, slot: int) -> Snapshot:
        return checkpoint.encode(self._slots[slot][1])

    def detach(self, slot: int) -> None:
        del self._slots[slot]
