"""Slots in which many trials of one structure train together, an epoch at a time.

The rule to know: a slot's results depend on its own settings and seed alone, never on its
neighbours, its number or the moment it joined. A trial enters and leaves at the end of an epoch,
as a `Snapshot`, so it may go on in another slot, backend or process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple, Protocol

from sparsetune import checkpoint, data, trainer
from sparsetune.checkpoint import Snapshot
from sparsetune.engine.solo import Solo
from sparsetune.settings import TrialSettings, to_dict
from sparsetune.trainer import Metrics, Setup, TrialState


class Backend(Protocol):
    """How the slots of a pool are trained. Made with the number of slots there may be."""

    def attach(self, slot: int, setup: Setup, start: Snapshot | None) -> None:
        """A trial enters the free slot: at its beginning, or where the snapshot was taken."""

    def advance(self) -> dict[int, Metrics]:
        """One epoch of every slot, and what `trainer.train_epoch` reports of each. A slot that has
        diverged says so and stays; whoever holds the pool detaches it. The `device_seconds` of all
        slots add up to the seconds that the call took."""

    def snapshot(self, slot: int) -> Snapshot: ...

    def detach(self, slot: int) -> None: ...


class Choice(NamedTuple):
    name: str
    make: Callable[[int], Backend]
    slots: int  # that it does well with
    reason: str  # one line for people


def choose(engine: str, setup: Setup) -> Choice:
    """The backend for trials like this one; ValueError where the one asked for cannot train it."""
    if engine in ("auto", "solo"):
        return Choice("solo", Solo, 1, "the plain trainer, one trial after another")
    raise ValueError(f"engine: '{engine}' is unknown; known: auto, solo")


def structure(settings: TrialSettings) -> str:
    """What all trials of a pool share, as text: everything that is no number of one trial."""
    whole = to_dict(settings)
    optimizer = {key: whole["optimizer"][key] for key in ("name", "nesterov")}
    shared = ("method", "variant", "dense_layers", "data", "model", "train")
    return json.dumps({key: whole[key] for key in shared} | {"optimizer": optimizer})


class Pool:
    """`slots` places for trials of one structure, that of the first one attached."""

    def __init__(self, slots: int, device: str = "auto", engine: str = "auto") -> None:
        self.slots = slots
        self.choice: Choice | None = None
        self._device = trainer.choose_device(device)
        self._engine = engine
        self._structure = ""
        self._dataset: data.Dataset | None = None
        self._backend: Backend | None = None
        self._held: dict[Hashable, tuple[int, Setup]] = {}

    def __len__(self) -> int:
        """Trials attached."""
        return len(self._held)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def attach(
        self, key: Hashable, settings: TrialSettings, start: TrialState | Snapshot | None = None
    ) -> None:
        """The trial, named by `key`, takes a free slot; an older one of the same key leaves.

        ValueError for bad settings, another structure, or no free slot.
        """
        if key in self._held:
            self.detach(key)
        if len(self) == self.slots:
            raise ValueError(f"all {self.slots} slots are taken; detach a trial first")
        if self._structure not in ("", structure(settings)):
            raise ValueError(
                f"{structure(settings)} does not fit this pool, whose trials share "
                f"{self._structure}; use another pool"
            )
        setup = trainer.prepare(settings, self._device, self._dataset)
        if self._backend is None:
            self.choice = choose(self._engine, setup)
            self._backend = self.choice.make(self.slots)
            self._structure, self._dataset = structure(settings), setup.dataset
        taken = {slot for slot, _ in self._held.values()}
        slot = next(number for number in range(self.slots) if number not in taken)
        if isinstance(start, TrialState):
            start = checkpoint.encode(start)
        self._backend.attach(slot, setup, start)
        self._held[key] = slot, setup

    def advance(self) -> dict[Hashable, Metrics]:
        """One more epoch of every trial attached: {key: its metrics}."""
        if self._backend is None or not self._held:
            return {}
        results = self._backend.advance()
        return {key: results[slot] for key, (slot, _) in self._held.items()}

    def snapshot(self, key: Hashable) -> Snapshot:
        """The trial as it is, ready for `checkpoint.save` or another pool's `attach`."""
        assert self._backend is not None
        return self._backend.snapshot(self._held[key][0])

    def state(self, key: Hashable) -> TrialState:
        """The trial as the solo trainer holds it, dense."""
        return checkpoint.decode(self._held[key][1], self.snapshot(key))

    def detach(self, key: Hashable) -> None:
        """Frees the trial's slot."""
        assert self._backend is not None
        slot, _ = self._held.pop(key)
        self._backend.detach(slot)


def train(
    trials: Iterable[TrialSettings], slots: int = 16, device: str = "auto", engine: str = "auto"
) -> list[list[Metrics]]:
    """The records of all epochs of each trial, trained `slots` at a time.

    Trials may differ in structure: there is one pool for each, one after another.
    """
    trials = list(trials)
    records: list[list[Metrics]] = [[] for _ in trials]
    for shared in dict.fromkeys(map(structure, trials)):
        pool = Pool(slots, device, engine)
        waiting = [n for n, settings in enumerate(trials) if structure(settings) == shared]
        while waiting or len(pool):
            while waiting and len(pool) < slots:
                pool.attach(waiting[0], trials[waiting[0]])
                waiting.pop(0)
            for key, metrics in pool.advance().items():
                assert isinstance(key, int)
                records[key].append(metrics)
                if metrics["diverged"] or metrics["epoch"] >= trials[key].epochs:
                    pool.detach(key)
    return records
