"""One device's slots behind a Ray actor: trials attach, receive their records, and detach.

The rule to know: a thread trains, an epoch at a time; between two epochs trials enter and leave.
After an epoch at which the scheduler may stop trials, it waits until each of them has asked for
more or has left, so a stopped trial costs no epoch more; elsewhere it goes on while they report.

An actor that was killed comes back empty, and its trials attach again and go on from their
checkpoints. Those that have seen two engines die without an epoch in between are suspects: each is
trained alone until it has an epoch, and one that kills its engine then has failed. An exception in
training finds its trial in the same way; one that can be no single trial's is told to all of them
and ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from sparsetune.engine.places import Place, Storage, wait_for_company
from sparsetune.engine.pool import Pool, choose, structure
from sparsetune.names import work_in
from sparsetune.settings import TrialSettings, from_dict
from sparsetune.store import paths
from sparsetune.store.paths import StorageAway
from sparsetune.training.checkpoint import Snapshot
from sparsetune.training.setup import setup_of
from sparsetune.training.trainer import Metrics

POLL_SECONDS = 20.0  # how long an answer may take; the trial then asks again, which shows it lives
LEASE_SECONDS = 90.0  # a trial that asked nothing for so long has lost its process
PATIENCE_SECONDS = 2.0  # how long the next epoch waits for trials that are undecided
WRITERS = 8  # checkpoints that are written at once
GOODBYE_SECONDS = 1.0  # how long trials have to hear why the engine ends


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
        self._storage = Storage()
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
        """What is a trial's fault it is told further down. Without this thread trials would wait
        for ever, so whatever else is raised ends the process; Ray starts another one."""
        try:
            while True:
                self._train_one_epoch()
        finally:
            try:
                self._say_goodbye(traceback.format_exc())
            finally:
                os._exit(1)

    def _say_goodbye(self, error: str) -> None:
        print(error, file=sys.stderr, flush=True)
        with self._changed:
            for place in self._places.values():
                place.error = error
                self._tell(place)
        time.sleep(GOODBYE_SECONDS)

    def _train_one_epoch(self) -> None:
        here = self._gather()
        for key, place in list(self._inside.items()):
            if here.get(key) is not place:
                self._take_out(place)
        for place in here.values():
            if place.unsaved:
                place.end_epoch(self._storage, *place.unsaved)
                self._tell(place)
            if place.unsaved:
                break  # the others could not be saved either
        entering = [place for key, place in here.items() if key not in self._inside]
        entering = [place for place in entering if not place.over and self._knows_pool_of(place)]
        suspects = [place for place in here.values() if place.suspect and not place.over]
        if suspects:
            for place in list(self._inside.values()):
                place.parked = self._snapshot(place)
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
            except Exception:  # noqa: BLE001 - whatever it is, it is this trial's
                self._fail(place)
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
        pool = self._pool_of(place)
        if len(pool) == pool.slots:
            return
        try:
            snapshot = place.begin(self._storage)
            self._tell(place)
            if place.over:
                return
            pool.attach(place.key, place.settings, snapshot)
            self._inside[place.key] = place
            if place.suspect:
                place.train_alone(self._storage)
        except StorageAway:
            return  # it enters at the next epoch, or when there is a storage
        except Exception:  # noqa: BLE001 - whatever it is, it is this trial's
            self._fail(place)

    def _snapshot(self, place: Place) -> Snapshot | None:
        """None, and the trial has failed, where there is none to be had."""
        try:
            return self._pool_of(place).snapshot(place.key)
        except Exception:  # noqa: BLE001 - whatever it is, it is this trial's
            self._fail(place)
            return None

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
            self._pools = {key: other for key, other in self._pools.items() if other is not pool}
            if isinstance(error, torch.OutOfMemoryError) and len(places) > 1:
                self._slots = max(1, len(places) // 2)
            elif len(places) == 1:
                self._fail(places[0])
            else:
                for place in places:
                    place.suspect = True
            return
        # Side by side, since an object store takes its time for each; not all at once, since each
        # is a copy of its trial.
        for start in range(0, len(places), WRITERS):
            writing = []
            for place in places[start : start + WRITERS]:
                metrics = results[place.key]
                snapshot = self._snapshot(place) if place.saves(metrics) else None
                if not place.error:
                    work = self._writers.submit(place.end_epoch, self._storage, metrics, snapshot)
                    writing.append((place, work))
            for place, work in writing:
                work.result()
                self._tell(place)
        for place in places:
            if place.over:
                self._take_out(place)

    def _fail(self, place: Place) -> None:
        place.fail(self._storage)
        self._tell(place)

    def _tell(self, place: Place) -> None:
        """Wakes the trial, which finds new records, or that it cannot be trained."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(place.arrived.set)
