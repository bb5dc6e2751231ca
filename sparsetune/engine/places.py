"""A trial in an engine: what it waits for, what it has, and what is written for it.

The rule to know: the training thread alone changes a place, but for `asked` and `heard`, which are
what its trial says. Checkpoints are written here. Storage that is away makes no trial fail: the
engine waits for some seconds and goes on without the checkpoint, so that the driver, which says so
and waits for as long as it takes, comes to write what is reported. A trial has ended when its last
checkpoint is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from sparsetune.settings import TrialSettings
from sparsetune.store.paths import AWAY_SECONDS, StorageAway, insist, why
from sparsetune.training import checkpoint
from sparsetune.training.checkpoint import Snapshot
from sparsetune.training.trainer import Metrics

T = TypeVar("T")
SAVE_SECONDS = 10.0  # how long an engine waits for storage that is away
AHEAD = 2  # epochs that may be trained before a trial has reported the first of them
# Slots of csr in different epochs have a matrix of batches each, which costs about as much as one
# more trial. In a simulation of ASHA with these times (20 to 100 epochs, 16 slots), waiting for
# company gives 1.2 to 1.3 times the trial-epochs, and five sixths of the slots stay filled.
GROUPS = 3  # epochs under way at once, from which on a trial waits for others to begin with
COHORT = 4  # a quarter of the slots is company enough, and a quarter of its epochs long enough


class Storage:
    """Does what needs the storage; StorageAway where that stays away."""

    def __init__(self) -> None:
        self._patience = SAVE_SECONDS

    def __call__(self, action: Callable[[], T]) -> T:
        try:
            result = insist(action, self._trouble)
        except OSError as error:
            self._patience = 1.0  # the next action need not wait for so long
            raise StorageAway(f"storage: {why(error)}") from error
        self._patience = SAVE_SECONDS
        return result

    def _trouble(self, error: OSError, waited: float) -> None:
        if waited > self._patience:
            raise error


@dataclass
class Place:
    """A trial in this engine, from its `attach` to its `detach`.

    It waits to `begin`, is in a pool (perhaps parked while another trial is trained alone), gets a
    record at the `end_epoch` of each epoch, and is `over` with the last one, or when it has failed.
    """

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

    def begin(self, storage: Storage) -> Snapshot | None:
        """Where training goes on: where the trial was parked, or its newest checkpoint, whose
        records it then has."""
        if self.suspect and storage(self.alone.exists):
            storage(self.alone.unlink)
            raise RuntimeError("training this trial, and no other, killed its engine")
        snapshot, self.parked = self.parked, None
        if snapshot is None:
            snapshot, self.records = storage(lambda: checkpoint.newest(self.folder))
        return snapshot

    def train_alone(self, storage: Storage) -> None:
        with contextlib.suppress(StorageAway):
            storage(lambda: self.folder.mkdir(parents=True, exist_ok=True))
            storage(self.alone.touch)

    def end_epoch(
        self,
        storage: Storage,
        metrics: Metrics,
        snapshot: Snapshot | None,
        since: float | None = None,
    ) -> None:
        """The trial gets its record, after the checkpoint with it, if one is due.

        While storage is away a trial has its record all the same, as a later checkpoint will hold
        it, but not its last one: that stays here until it is saved (tried `since`). As its trial
        stays, too, there are no more of them than trials at a time; if it dies, it is trained to it
        again.
        """
        records, self.unsaved = [*self.records, metrics], None
        try:
            if snapshot is not None:
                storage(lambda: checkpoint.save(self.folder, snapshot, records))
            if self.suspect:
                storage(lambda: self.alone.unlink(missing_ok=True))
        except StorageAway:
            since = since or time.monotonic()
            late = time.monotonic() - since > AWAY_SECONDS
            if snapshot is not None and self.ends(metrics) and not late:
                self.unsaved = metrics, snapshot, since
                return
        except Exception:  # noqa: BLE001 - whatever it is, it is this trial's
            self.fail(storage)
            return
        self.suspect, self.records = False, records

    def fail(self, storage: Storage) -> None:
        """The trial cannot be trained, because of the exception that is being handled."""
        self.error = traceback.format_exc()
        if self.suspect:
            with contextlib.suppress(StorageAway):
                storage(lambda: self.alone.unlink(missing_ok=True))


def wait_for_company(waiting: list[Place], inside: list[Place], slots: int) -> bool:
    """Are these trials to wait for more that begin with them, rather than begin now?"""
    groups = {(place.settings.order_seed, len(place.records)) for place in inside}
    return (
        len(groups) >= GROUPS
        and min(len(waiting), slots - len(inside)) < slots // COHORT
        and all(place.waited < place.settings.epochs // COHORT for place in waiting)
    )
