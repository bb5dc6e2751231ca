"""One device's slots behind a Ray actor: trials attach, receive their records, and detach.

The rule to know: a thread trains, an epoch at a time; between two epochs trials enter and leave.
After an epoch at which the scheduler may stop trials, it waits until each of them has asked for
more or has left, so a stopped trial costs no epoch more; elsewhere it goes on while they report.
Checkpoints are written here. Storage that is away makes no trial fail: the engine waits for some
seconds and goes on without the checkpoint, so that the driver, which says so and waits for as long
as it takes, comes to write what is reported. A trial has ended when its last checkpoint is written.

An actor that was killed comes back empty, and its trials attach again and go on from their
checkpoints. Those that have seen two engines die without an epoch in between are suspects: each is
trained alone until it has an epoch, and one that kills its engine then has failed. An exception in
training finds its trial in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from sparsetune.engine.pool import Pool, choose, structure
from sparsetune.names import work_in
from sparsetune.settings import TrialSettings, from_dict
from sparsetune.store import paths
from sparsetune.store.paths import AWAY_SECONDS, StorageAway, insist, why
from sparsetune.training import checkpoint
from sparsetune.training.checkpoint import Snapshot
from sparsetune.training.setup import setup_of
from sparsetune.training.trainer import Metrics

T = TypeVar("T")
POLL_SECONDS = 20.0  # how long an answer may take; the trial then asks again, which shows it lives
LEASE_SECONDS = 90.0  # a trial that asked nothing for so long has lost its process
PATIENCE_SECONDS = 2.0  # how long the next epoch waits for trials that are undecided
SAVE_SECONDS = 10.0  # how long an engine waits for storage that is away
WRITERS = 8  # checkpoints that are written at once
AHEAD = 2  # epochs that may be trained before a trial has reported the first of them
# Slots of csr in different epochs have a matrix of batches each, which costs about as much as one
# more trial. In a simulation of ASHA with these times (20 to 100 epochs, 16 slots), waiting for
# company gives 1.2 to 1.3 times the trial-epochs, and five sixths of the slots stay filled.
GROUPS = 3  # epochs under way at once, from which on a trial waits for others to begin with
COHORT = 4  # a quarter of the slots is company enough, and a quarter of its epochs long enough


@dataclass
class Place:
    """A trial in this engine, from its `attach` to its `detach`."""

    key: str
    token: int  # tells an attachment from an earlier one of the same trial
    settings: TrialSettings
    folder: Path
    save_every: int
    decisions: frozenset[int]  # epochs after which the scheduler may stop the trial
    suspect: bool  # it was there when engines died, so it is trained alone until it has an epoch
    arrived: asyncio.Event
    records: list[Metrics] = field(default_factory=list)
    asked: int = 0  # epochs whose records the trial has
    heard: float = field(default_factory=time.monotonic)
    error: str = ""  # a traceback: this trial cannot be trained
    parked: Snapshot | None = None  # where it is while another one is trained alone
    unsaved: tuple[Metrics, Snapshot, float] | None = None  # its end, since when storage is away
    waited: int = 0  # epochs of the others, for company
    structure: str = ""  # of its pool; "" until it is known

    @property
    def over(self) -> bool:
        """Is there nothing left to train?"""
        return bool(self.error or self.unsaved or (self.records and self.ends(self.records[-1])))

    def ends(self, metrics: Metrics) -> bool:
        """Is this epoch the trial's last one?"""
        return bool(metrics["diverged"] or metrics["epoch"] >= self.settings.epochs)

    def saves(self, metrics: Metrics) -> bool:
        """Is a checkpoint due after this epoch?"""
        return self.ends(metrics) or metrics["epoch"] % self.save_every == 0

    @property
    def undecided(self) -> bool:
        """Is the next epoch to wait for what the trial has to say of the last ones?"""
        epoch = len(self.records)
        return self.asked < epoch and (epoch in self.decisions or self.asked < epoch - AHEAD)

    @property
    def alone(self) -> Path:
        """A file that is there while the trial is trained alone: whoever finds it knows that the
        trial has killed an engine by itself."""
        return self.folder / "alone"


def wait_for_company(waiting: list[Place], inside: list[Place], slots: int) -> bool:
    """Are these trials to wait for more that begin with them, rather than begin now?"""
    groups = {(place.settings.order_seed, len(place.records)) for place in inside}
    return (
        len(groups) >= GROUPS
        and min(len(waiting), slots - len(inside)) < slots // COHORT
        and all(place.waited < place.settings.epochs // COHORT for place in waiting)
    )


class Engine:
    """The actor. Its coroutines look at and change `_places` alone; the thread owns the rest."""

    def __init__(
        self, device: str, engine: str, slots: int, threads: int, share: float, path: str
    ) -> None:
        """`share` of the device's free memory is this engine's; `path` is the folder where users'
        modules and relative paths are looked for."""
        work_in(path)
        torch.set_num_threads(threads)
        self._device, self._engine, self._slots, self._share = device, engine, slots, share
        self._places: dict[str, Place] = {}
        self._inside: dict[str, Place] = {}  # in a pool
        self._pools: dict[str, Pool] = {}  # by structure
        self._tokens = 0
        self._patience = SAVE_SECONDS
        self._writers = ThreadPoolExecutor(WRITERS)
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        threading.Thread(target=self._work, name="training", daemon=True).start()

    # What trials call ----------------------------------------------------------------------------

    async def attach(
        self,
        key: str,
        config: dict[str, Any],
        folder: str,
        save_every: int,
        decisions: list[int],
        suspect: bool,
    ) -> int:
        """A trial enters at the next epoch; an older attachment of it leaves. Returns its token."""
        self._loop = asyncio.get_running_loop()
        settings = from_dict(TrialSettings, config)
        with self._changed:
            self._tokens += 1
            self._places[key] = Place(
                key,
                self._tokens,
                settings,
                paths.place(folder),
                save_every,
                frozenset(decisions),
                suspect,
                asyncio.Event(),
            )
            self._changed.notify_all()
            return self._tokens

    async def after(self, key: str, token: int, epoch: int) -> list[Metrics]:
        """The records after `epoch`; waits for one, and after a while returns none.

        RuntimeError where the trial cannot be trained, with the traceback; KeyError where the
        attachment is not known, as after a restart of the engine: attach again.
        """
        place = self._known(key, token)
        with self._changed:
            place.asked, place.heard = epoch, time.monotonic()
            self._changed.notify_all()
        if len(place.records) <= epoch and not place.error:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(place.arrived.wait(), POLL_SECONDS)
        place = self._known(key, token)
        place.arrived.clear()
        if place.error:
            raise RuntimeError(place.error)
        return place.records[epoch:]

    async def detach(self, key: str, token: int = 0) -> None:
        """The trial leaves, if this attachment (0: any) is the one that is here."""
        with self._changed:
            place = self._places.get(key)
            if place is not None and token in (0, place.token):
                del self._places[key]
                self._changed.notify_all()

    async def held(self) -> int:
        """Trials that are attached or have a slot."""
        return len(self._places.keys() | self._inside.keys())

    def _known(self, key: str, token: int) -> Place:
        place = self._places.get(key)
        if place is None or place.token != token:
            raise KeyError(f"{key} is not attached here")
        return place

    # The thread ----------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            here = self._gather()
            for key, place in list(self._inside.items()):
                if here.get(key) is not place:
                    self._take_out(place)
            for place in here.values():
                if place.unsaved:
                    self._save(place, *place.unsaved)
                    self._tell(place)
                if place.unsaved:
                    break  # the others could not be saved either
            entering = [p for key, p in here.items() if key not in self._inside]
            entering = [p for p in entering if not p.over and self._knows_pool_of(p)]
            suspects = [p for p in here.values() if p.suspect and not p.over]
            if suspects:
                for place in list(self._inside.values()):
                    place.parked = self._pool_of(place).snapshot(place.key)
                    self._take_out(place)
                entering = suspects[:1]
            else:
                entering = self._in_company(entering)
            for place in entering:
                self._enter(place)
            for pool in list(self._pools.values()):
                self._advance(pool)

    def _gather(self) -> dict[str, Place]:
        """Who is here for the next epoch, once there is anyone and nobody inside is undecided."""
        patience = time.monotonic() + PATIENCE_SECONDS
        with self._changed:
            while True:
                now = time.monotonic()
                for key, place in list(self._places.items()):
                    if now - place.heard > LEASE_SECONDS:
                        del self._places[key]
                stay = [p for key, p in self._inside.items() if self._places.get(key) is p]
                waiting = [place for place in stay if place.undecided]
                wanted = any(not p.over or p.unsaved for p in self._places.values())
                # Who has left gives his slot back at once, also where nobody else is here.
                if (wanted or len(stay) < len(self._inside)) and (not waiting or now > patience):
                    return dict(self._places)
                self._changed.wait(0.05 if waiting else 1.0)

    def _knows_pool_of(self, place: Place) -> bool:
        """False, and told to the trial, where its settings fit none."""
        if not place.structure:
            try:
                setup = setup_of(place.settings, self._device)
                backend = choose(self._engine, setup).name
                place.structure = structure(place.settings, backend)
            except Exception:  # noqa: BLE001 - whatever it is, it is this trial's, and it is told
                self._tell(place, error=traceback.format_exc())
        return bool(place.structure)

    def _pool_of(self, place: Place) -> Pool:
        if place.structure not in self._pools:
            pool = Pool(self._slots, self._device, self._engine, self._share)
            self._pools[place.structure] = pool
        return self._pools[place.structure]

    def _in_company(self, waiting: list[Place]) -> list[Place]:
        """Those of them that enter now; see `wait_for_company`."""
        entering, of_a_pool = [], dict[str, list[Place]]()
        for place in waiting:
            of_a_pool.setdefault(place.structure, []).append(place)
        for these in of_a_pool.values():
            pool = self._pool_of(these[0])
            inside = [place for key, place in self._inside.items() if key in pool]
            shares_batches = pool.choice is not None and pool.choice.name == "csr"
            if shares_batches and wait_for_company(these, inside, pool.slots):
                for place in these:
                    place.waited += 1
            else:
                entering += these
        return entering

    def _take_out(self, place: Place) -> None:
        self._pool_of(place).detach(place.key)
        del self._inside[place.key]

    def _enter(self, place: Place) -> None:
        """The trial goes on where it was parked or its newest checkpoint left it."""
        try:
            pool = self._pool_of(place)
            if len(pool) == pool.slots:
                return
            if place.suspect and self._stored(place.alone.exists):
                self._stored(place.alone.unlink)
                raise RuntimeError("training this trial, and no other, killed its engine")
            snapshot = place.parked
            if snapshot is None:
                snapshot, place.records = self._stored(lambda: checkpoint.newest(place.folder))
                self._tell(place)
            place.parked = None
            if place.over:
                return
            pool.attach(place.key, place.settings, snapshot)
            self._inside[place.key] = place
            if place.suspect:
                with contextlib.suppress(StorageAway):
                    self._stored(lambda: place.folder.mkdir(parents=True, exist_ok=True))
                    self._stored(place.alone.touch)
        except StorageAway:
            return  # it enters at the next epoch, or when there is a storage
        except Exception:  # noqa: BLE001 - whatever it is, it is this trial's, and it is told
            self._tell(place, error=traceback.format_exc())

    def _advance(self, pool: Pool) -> None:
        places = [place for key, place in self._inside.items() if key in pool]
        if not places:
            return
        try:
            results = pool.advance()
        except Exception as error:  # noqa: BLE001 - which of the trials it was is found out
            # What an exception leaves of a backend is not to be trusted.
            for place in places:
                del self._inside[place.key]
            self._pools = {k: each for k, each in self._pools.items() if each is not pool}
            if isinstance(error, torch.OutOfMemoryError) and len(places) > 1:
                self._slots = max(1, len(places) // 2)
            elif len(places) == 1:
                text = traceback.format_exc()
                with contextlib.suppress(StorageAway):
                    self._stored(lambda: places[0].alone.unlink(missing_ok=True))
                self._tell(places[0], error=text)
            else:
                for place in places:
                    place.suspect = True
            return
        # Side by side, since an object store takes its time for each; not all at once, since each
        # is a copy of its trial.
        for start in range(0, len(places), WRITERS):
            saved = places[start : start + WRITERS]
            latest = [results[place.key] for place in saved]
            snapshots = [
                pool.snapshot(place.key) if place.saves(metrics) else None
                for place, metrics in zip(saved, latest, strict=True)
            ]
            saving = self._writers.map(self._save, saved, latest, snapshots)
            for place, _ in zip(saved, saving, strict=True):
                self._tell(place)
                if place.over:
                    self._take_out(place)

    def _save(
        self, place: Place, metrics: Metrics, snapshot: Snapshot | None, since: float | None = None
    ) -> None:
        """While storage is away a trial has its record all the same, as a later checkpoint will
        hold it, but not its last one: that stays here until it is saved. As its trial stays, too,
        there are no more of them than trials at a time; if it dies, it is trained to it again."""
        records, place.unsaved = [*place.records, metrics], None
        try:
            if snapshot is not None:
                self._stored(lambda: checkpoint.save(place.folder, snapshot, records))
            if place.suspect:
                self._stored(lambda: place.alone.unlink(missing_ok=True))
        except StorageAway:
            since = since or time.monotonic()
            late = time.monotonic() - since > AWAY_SECONDS
            if snapshot is not None and place.ends(metrics) and not late:
                place.unsaved = metrics, snapshot, since
                return
        place.suspect, place.records = False, records

    def _stored(self, action: Callable[[], T]) -> T:
        """Does what needs the storage; StorageAway where that stays away."""
        try:
            result = insist(action, self._trouble)
        except OSError as error:
            self._patience = 1.0  # the next one need not wait for so long
            raise StorageAway(f"storage: {why(error)}") from error
        self._patience = SAVE_SECONDS
        return result

    def _trouble(self, error: OSError, waited: float) -> None:
        if waited > self._patience:
            raise error

    def _tell(self, place: Place, error: str = "") -> None:
        """Wakes the trial, which finds new records, or that it cannot be trained."""
        place.error = error
        assert self._loop is not None
        self._loop.call_soon_threadsafe(place.arrived.set)
