"""One device's slots behind a Ray actor: trials attach, receive their records, and detach.

The rule to know: a thread trains, an epoch at a time; between two epochs trials enter and leave.
It does not begin the next epoch before every trial of the last one has asked for more or has left,
so a trial that the scheduler stops costs no epoch more, and a trial that stays silent is left
behind after a while. Checkpoints are written here. An actor that was killed comes back empty, and
its trials attach again and go on from their checkpoints.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsetune import checkpoint
from sparsetune.engine.pool import Pool, structure
from sparsetune.memory import keep_freed_memory
from sparsetune.settings import TrialSettings, from_dict
from sparsetune.trainer import Metrics

POLL_SECONDS = 20.0  # how long an answer may take; the trial then asks again, which shows it lives
LEASE_SECONDS = 90.0  # a trial that asked nothing for so long has lost its process
PATIENCE_SECONDS = 2.0  # how long the next epoch waits for trials that have not asked for it


@dataclass
class Place:
    """A trial in this engine, from its `attach` to its `detach`."""

    key: str
    token: int  # tells an attachment from an earlier one of the same trial
    settings: TrialSettings
    folder: Path
    save_every: int
    arrived: asyncio.Event
    records: list[Metrics] = field(default_factory=list)
    asked: int = 0  # epochs whose records the trial has
    heard: float = field(default_factory=time.monotonic)
    error: str = ""  # a traceback: this trial cannot be trained

    @property
    def over(self) -> bool:
        last = self.records[-1] if self.records else None
        return bool(
            self.error or (last and (last["diverged"] or last["epoch"] >= self.settings.epochs))
        )


class Engine:
    """The actor. Its coroutines only look at and change `_places`; the thread owns the pools."""

    def __init__(self, device: str, engine: str, slots: int, threads: int, path: str) -> None:
        """`path` is the folder where users' modules are found."""
        sys.path.append(path)
        torch.set_num_threads(threads)
        keep_freed_memory()
        self._device, self._engine, self._slots = device, engine, slots
        self._places: dict[str, Place] = {}
        self._pools: dict[str, Pool] = {}
        self._tokens = 0
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        threading.Thread(target=self._work, name="training", daemon=True).start()

    # What trials call ----------------------------------------------------------------------------

    async def attach(self, key: str, config: dict[str, Any], folder: str, save_every: int) -> int:
        """A trial enters at the next epoch; an older attachment of it leaves. Returns its token."""
        self._loop = asyncio.get_running_loop()
        with self._changed:
            self._tokens += 1
            self._places[key] = Place(
                key,
                self._tokens,
                from_dict(TrialSettings, config),
                Path(folder),
                save_every,
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

    def _known(self, key: str, token: int) -> Place:
        place = self._places.get(key)
        if place is None or place.token != token:
            raise KeyError(f"{key} is not attached here")
        return place

    # The thread ----------------------------------------------------------------------------------

    def _work(self) -> None:
        inside: dict[str, Place] = {}  # in a pool
        while True:
            here = self._gather(inside)
            for key in [key for key, place in inside.items() if here.get(key) is not place]:
                self._pool_of(inside.pop(key)).detach(key)
            for key, place in here.items():
                if key not in inside and not place.over and self._enter(place):
                    inside[key] = place
            for pool in self._pools.values():
                self._advance(pool, inside)

    def _gather(self, inside: dict[str, Place]) -> dict[str, Place]:
        """Who is here for the next epoch, once there is anyone and all inside have spoken."""
        patience = time.monotonic() + PATIENCE_SECONDS
        with self._changed:
            while True:
                now = time.monotonic()
                for key, place in list(self._places.items()):
                    if now - place.heard > LEASE_SECONDS:
                        del self._places[key]
                waiting = [
                    place
                    for key, place in inside.items()
                    if self._places.get(key) is place and place.asked < len(place.records)
                ]
                if any(not place.over for place in self._places.values()) and (
                    not waiting or now > patience
                ):
                    return dict(self._places)
                self._changed.wait(0.05 if waiting else 1.0)

    def _pool_of(self, place: Place) -> Pool:
        shared = structure(place.settings)
        if shared not in self._pools:
            self._pools[shared] = Pool(self._slots, self._device, self._engine)
        return self._pools[shared]

    def _enter(self, place: Place) -> bool:
        """Attaches the trial where its newest checkpoint left it, and tells it what that holds."""
        try:
            snapshot, records = checkpoint.newest(place.folder)
            pool = self._pool_of(place)
            pool.attach(place.key, place.settings, snapshot)
        except Exception:  # noqa: BLE001 - whatever it is, it is this trial's, and it is told
            self._tell(place, error=traceback.format_exc())
            return False
        self._tell(place, records)
        if place.over:
            pool.detach(place.key)
        return not place.over

    def _advance(self, pool: Pool, inside: dict[str, Place]) -> None:
        if not len(pool):
            return
        try:
            results = pool.advance()
            for key, metrics in results.items():
                place = inside[str(key)]
                records = [*place.records, metrics]
                ends = metrics["diverged"] or metrics["epoch"] >= place.settings.epochs
                if metrics["epoch"] % place.save_every == 0 or ends:
                    checkpoint.save(place.folder, pool.snapshot(key), records)
                self._tell(place, [metrics])
                if ends:
                    pool.detach(key)
                    del inside[str(key)]
        except Exception:  # noqa: BLE001 - told to those who were in it
            text = traceback.format_exc()
            for key, place in list(inside.items()):
                if key in pool:
                    self._tell(place, error=text)
                    pool.detach(key)
                    del inside[key]

    def _tell(self, place: Place, records: list[Metrics] | None = None, error: str = "") -> None:
        place.records = [*place.records, *(records or [])]
        place.error = error
        assert self._loop is not None
        self._loop.call_soon_threadsafe(place.arrived.set)
