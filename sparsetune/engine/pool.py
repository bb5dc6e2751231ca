"""Slots in which many trials of one structure train together, an epoch at a time.

The rule to know: a slot's results depend on its own settings and seed alone, never on its
neighbours, its number or the moment it joined. A trial enters and leaves at the end of an epoch,
as a `Snapshot`, so it may go on in another slot, backend or process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from sparsetune.engine.csr.backend import Csr
from sparsetune.engine.solo import Solo
from sparsetune.engine.stacked.lifted import Lifted
from sparsetune.engine.stacked.step import has_compiler
from sparsetune.engine.stacked.turns import Turns
from sparsetune.settings import TrialSettings, check_value, to_dict
from sparsetune.training import checkpoint
from sparsetune.training.checkpoint import Snapshot
from sparsetune.training.setup import Setup, dataset_of, setup_of
from sparsetune.training.trainer import Metrics, TrialState


class Backend(Protocol):
    """How the slots of a pool are trained. Made with the number of slots there may be."""

    @staticmethod
    def unfit(setup: Setup) -> str:
        """Why trials like this one cannot be trained, in one sentence; "" where they can."""

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


# At this density of the sparse layers csr is as fast as solo on a CPU (scripts/bench_engine.py);
# on a GPU dense tensors are faster at any density that is trained.
CSR_DENSITY = 0.25
CSR_SLOTS, STACKED_SLOTS, GPU_SLOTS = 16, 8, 64
# Compiling takes 5 to 20 s where nothing is cached and saves a third of a step: not for trials of
# less (some 10 s of a core). Told by the settings, not by the clock, for the numbers differ.
COMPILE_FLOPS = 3e11
# Parameter, two moments, gradient in float32 and positions: what a value costs at most, in bytes.
CSR_BYTES, DENSE_BYTES = 60, 24


def choose(engine: str, setup: Setup) -> Choice:
    """The backend for trials like this one; ValueError where the one asked for cannot train it."""
    check_value("engine", engine)
    if engine == "auto":
        return _automatic(setup)
    backends = {"solo": Solo, "stacked": Lifted if _on_gpu(setup) else Turns, "csr": Csr}
    stacked = GPU_SLOTS if _on_gpu(setup) else STACKED_SLOTS
    slots = {"solo": 1, "stacked": stacked, "csr": CSR_SLOTS}
    if why := backends[engine].unfit(setup):
        raise ValueError(f"engine: {engine} cannot train this: {why}; use auto")
    return Choice(engine, backends[engine], slots[engine], "asked for")


def _automatic(setup: Setup) -> Choice:
    if _on_gpu(setup):
        if why := Lifted.unfit(setup):
            return Choice("solo", Solo, 1, why)
        return Choice("stacked", Lifted, GPU_SLOTS, "all slots in one operation on a GPU")
    size = sum(shape.numel() for shape in setup.sparse.values())
    density = sum(setup.targets.values()) / max(size, 1)
    why = Csr.unfit(setup)
    if not why and density <= CSR_DENSITY:
        return Choice("csr", Csr, CSR_SLOTS, f"sparse layers of density {density:.3g} on a CPU")
    not_csr = f"not csr: {why or f'density {density:.3g}'}"
    flops = 3 * sum(setup.flops.values()) * setup.batch_size * setup.num_steps
    if flops < COMPILE_FLOPS:
        return Choice("solo", Solo, 1, f"too short a training to compile it; {not_csr}")
    if has_compiler():
        return Choice("stacked", Turns, STACKED_SLOTS, f"compiled; {not_csr}")
    return Choice("solo", Solo, 1, f"no C++ compiler; {not_csr}")


def _on_gpu(setup: Setup) -> bool:
    return setup.device.type == "cuda"


def slot_bytes(choice: Choice, setup: Setup) -> int:
    """What a slot takes of the device's memory, about, activations left out."""
    sparse = sum(shape.numel() for shape in setup.sparse.values())
    dense = sum(p.numel() for p in setup.model.parameters()) - sparse
    if choice.name == "csr":
        return CSR_BYTES * (sum(setup.targets.values()) + dense)
    return DENSE_BYTES * (sparse + dense)


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
        return 1024 * int(text.partition("MemAvailable:")[2].split()[0])
    except (OSError, IndexError):  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def structure(settings: TrialSettings, backend: str) -> str:
    """What trials must have in common to share a pool of this backend, as text.

    csr trains them by one step, whatever their method: a method acts on a trial's own values, at
    updates. The others run the method's code for all slots in every step.
    """
    whole = to_dict(settings)
    optimizer = {key: whole["optimizer"][key] for key in ("name", "nesterov")}
    shared = ["data", "model", "train"]
    shared += [] if backend == "csr" else ["method", "variant", "dense_layers"]
    common = {key: whole[key] for key in shared}
    return json.dumps({"backend": backend, "optimizer": optimizer} | common)


class Pool:
    """`slots` places for trials that one backend trains together, that of the first one attached;
    fewer where `share` of the device's free memory does not hold as many."""

    def __init__(
        self, slots: int, device: str = "auto", engine: str = "auto", share: float = 0.8
    ) -> None:
        self.slots = slots
        self._share = share
        self.choice: Choice | None = None
        self._device = device
        self._engine = engine
        self._structure = ""
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
        setup = setup_of(settings, self._device)
        choice = choose(self.choice.name if self.choice else self._engine, setup)
        shared = structure(settings, choice.name)
        if self._structure not in ("", shared):
            raise ValueError(
                f"{shared} does not fit this pool, whose trials share {self._structure}; use "
                "another pool"
            )
        if self._backend is None:
            room = self._share * free_bytes(setup.device) / slot_bytes(choice, setup)
            self.slots = max(1, min(self.slots, int(room)))
            self._backend = choice.make(self.slots)
            self._structure, self.choice = shared, choice
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
    dataset_of.cache_clear()  # what is read may have changed since an earlier call
    trials = list(trials)
    records: list[list[Metrics]] = [[] for _ in trials]
    waiting: dict[str, list[int]] = {}
    for number, settings in enumerate(trials):
        choice = choose(engine, setup_of(settings, device))
        waiting.setdefault(structure(settings, choice.name), []).append(number)
    for numbers in waiting.values():
        pool = Pool(slots, device, engine)
        while numbers or len(pool):
            while numbers and len(pool) < pool.slots:
                pool.attach(numbers[0], trials[numbers[0]])
                numbers.pop(0)
            for key, metrics in pool.advance().items():
                assert isinstance(key, int)
                records[key].append(metrics)
                if metrics["diverged"] or metrics["epoch"] >= trials[key].epochs:
                    pool.detach(key)
    return records
