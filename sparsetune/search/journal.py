"""The journal of a member: an append-only file of events, the only truth about a search.

The rule to know: what is not in the journal has not happened. `Journal.append` is the only way in;
it writes an event and applies it to `Journal.record`, with the function that also replays a file,
so the state of a running sweep and the state read back from disk cannot differ.

One line is one event: eight hex digits (CRC-32 of the rest), a blank, a JSON object with its
number `seq`, the wall-clock `time` and a `type`:

    sweep    format, trials, and whatever else the caller wants to remember of the sweep
    suggest  number, params, distributions, origin, fixed, in_study, attrs (the sampler's notes)
    report   number, epoch, metrics, decision      epochs of a trial are 1, 2, 3, without a gap
    end      number, status, attempt, error        the last word about a trial
    extend   trials                                the new total
    driver   generation, pid, host, versions       a process that took the sweep over

Floats may be NaN or Infinity, which Python's json reads and strict JSON does not know.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sparsetune.search.lock import Holder, SweepHeld, SweepLock, holder

__all__ = [
    "ENDED",
    "FILE",
    "FORMAT",
    "Event",
    "Holder",
    "Journal",
    "JournalError",
    "Member",
    "Report",
    "SweepHeld",
    "SweepLock",
    "Trial",
    "holder",
    "load",
    "read",
    "replay",
]

FORMAT = 1
FILE = "journal.jsonl"
ENDED = ("finished", "stopped", "diverged", "failed")

Event = dict[str, Any]


class JournalError(ValueError):
    """A journal that cannot be trusted or must not be written; says file, line and why."""


class Report(NamedTuple):
    epoch: int
    metrics: dict[str, float]
    decision: str  # "CONTINUE" | "STOP": the scheduler's


@dataclass
class Trial:
    number: int
    params: dict[str, Any]  # searched keys, dotted -> value
    distributions: dict[str, str]  # Optuna's JSON, one per searched key
    origin: str  # "sampler" | "start:NAME"
    fixed: dict[str, Any]  # further keys that this trial alone fixes
    in_study: bool
    suggested: float  # wall-clock time
    attrs: dict[str, Any] = field(default_factory=dict)
    reports: list[Report] = field(default_factory=list)  # epochs 1, 2, 3, ...
    status: str = "running"
    attempts: int = 1
    error: str | None = None
    ended: float | None = None


@dataclass
class Member:
    """What the events of one journal add up to."""

    header: Event
    asked: int  # trials in all
    trials: dict[int, Trial] = field(default_factory=dict)  # in number order
    order: list[tuple[int, int]] = field(default_factory=list)  # (number, epoch) as reported
    generation: int = 0


def replay(events: Iterable[Event], source: Path | str = FILE) -> Member:
    """The state after `events`; `source` is the file named in an error."""
    member: Member | None = None
    for event in events:
        try:
            if member is None:
                member = _begin(event)
            else:
                _check(member, event)
                _apply(member, event)
        except (JournalError, KeyError) as error:
            why = f"the event lacks {error}" if isinstance(error, KeyError) else str(error)
            raise JournalError(f"{source}:{event.get('seq', 0) + 1}: {why}") from error
    if member is None:
        raise JournalError(
            f"{source}: no complete event, so this search never began; delete its folder"
        )
    return member


def read(folder: Path | str) -> list[Event]:
    """All events, also while a sweep writes: a torn or incomplete last line is left out."""
    path = Path(folder) / FILE
    return _parse(_bytes(path), path)[0]


def load(folder: Path | str) -> Member:
    """The state of the journal in `folder`, for readers."""
    return replay(read(folder), Path(folder) / FILE)


class Journal:
    """One writer's hold on a journal. `record` is its state and is kept up to date."""

    def __init__(self, path: Path, fd: int, size: int, record: Member, seq: int) -> None:
        """Not for callers: see `create` and `open`."""
        self.path, self.record = path, record
        self._fd, self._size, self._seq = fd, size, seq
        self._dirty = self._torn = False
        self._synced = time.monotonic()

    @classmethod
    def create(cls, folder: Path | str, header: Event) -> Journal:
        """A new journal whose first event is `header` (which must have `trials`)."""
        path = Path(folder) / FILE
        # A file without one whole line is what a driver killed in this very call leaves behind.
        if path.exists() and b"\n" in path.read_bytes():
            raise JournalError(f"{path}: exists already; resume it, or take another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        event = json.loads(json.dumps({"type": "sweep", "format": FORMAT, **header}))
        record = _begin({"seq": 0, "time": time.time(), **event})
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        journal = cls(path, fd, 0, record, 0)
        try:
            journal._write(record.header, durable=True)
            folder_fd = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder_fd)  # the file's name must last, too
            finally:
                os.close(folder_fd)
        except OSError:
            journal.close()
            raise
        return journal

    @classmethod
    def open(cls, folder: Path | str) -> Journal:
        """The existing journal, ready for more; a torn last line is cut off the file."""
        path = Path(folder) / FILE
        data = _bytes(path)
        events, size = _parse(data, path)
        record = replay(events, path)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        if size < len(data):
            os.ftruncate(fd, size)
            os.fsync(fd)
        return cls(path, fd, size, record, len(events))

    def append(self, event: Event, durable: bool = True) -> None:
        """Writes the event and applies it to `record`; refuses one that does not fit there.

        `durable`: on disk before this returns. Otherwise within a second, given `sync`, which is
        enough for reports, because training reproduces them."""
        # Through JSON first, so that `record` holds what a reader will find: lists, not tuples.
        event = json.loads(json.dumps({"seq": self._seq, "time": time.time(), **event}))
        try:
            _check(self.record, event)
        except JournalError as error:
            raise JournalError(f"{self.path}:{self._seq + 1}: {error}") from error
        self._write(event, durable)
        _apply(self.record, event)

    def sync(self, older_than: float = 0.0) -> None:
        """Puts waiting reports on disk, if the last time was `older_than` seconds ago."""
        if self._dirty and time.monotonic() - self._synced >= older_than:
            os.fsync(self._fd)
            self._dirty, self._synced = False, time.monotonic()

    def close(self) -> None:
        if self._fd >= 0:
            try:
                self.sync()
            finally:
                os.close(self._fd)
                self._fd = -1

    def _write(self, event: Event, durable: bool) -> None:
        text = json.dumps(event, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        try:
            if self._torn:  # an earlier write failed, and the cut after it did, too
                os.ftruncate(self._fd, self._size)
                self._torn = False
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            self._dirty = True
            self.sync(older_than=0.0 if durable else 1.0)
        except OSError:
            # A full disk takes part of a line. Cut off, the file stays valid and may be appended
            # to once there is room; if even that fails, a reader sees no more than a torn tail.
            self._torn = True
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
                self._torn = False
            raise
        self._size += len(line)
        self._seq += 1


def _begin(event: Event) -> Member:
    if event.get("type") != "sweep":
        raise JournalError(f"the first event is '{event.get('type')}'; it must be 'sweep'")
    if event.get("format") != FORMAT:
        raise JournalError(
            f"journal format {event.get('format')!r}; this version of sparsetune reads {FORMAT}"
        )
    return Member(header=event, asked=event["trials"])


def _check(member: Member, event: Event) -> None:
    kind = event.get("type")
    if kind == "suggest":
        if event["number"] != len(member.trials):
            raise JournalError(f"trial {event['number']} suggested after {len(member.trials)}")
    elif kind in ("report", "end"):
        trial = member.trials.get(event["number"])
        if trial is None:
            raise JournalError(f"'{kind}' of trial {event['number']}, which was never suggested")
        if trial.status != "running":
            raise JournalError(f"'{kind}' of trial {trial.number}, which has {trial.status}")
        if kind == "report" and event["epoch"] != len(trial.reports) + 1:
            raise JournalError(
                f"trial {trial.number} reports epoch {event['epoch']} after {len(trial.reports)}"
            )
        if kind == "end" and event["status"] not in ENDED:
            raise JournalError(f"status '{event['status']}' is none of {', '.join(ENDED)}")
    elif kind == "extend":
        if event["trials"] < member.asked:
            raise JournalError(f"extended from {member.asked} to {event['trials']} trials")
    elif kind != "driver":
        raise JournalError(f"unknown event '{kind}'")


def _apply(member: Member, event: Event) -> None:
    kind = event["type"]
    if kind == "suggest":
        member.trials[event["number"]] = Trial(
            number=event["number"],
            params=event["params"],
            distributions=event["distributions"],
            origin=event["origin"],
            fixed=event["fixed"],
            in_study=event["in_study"],
            suggested=event["time"],
            attrs=event.get("attrs", {}),
        )
    elif kind == "report":
        report = Report(event["epoch"], event["metrics"], event["decision"])
        member.trials[event["number"]].reports.append(report)
        member.order.append((event["number"], event["epoch"]))
    elif kind == "end":
        trial = member.trials[event["number"]]
        trial.status, trial.ended = event["status"], event["time"]
        trial.attempts, trial.error = event.get("attempt", 1), event.get("error")
    elif kind == "extend":
        member.asked = event["trials"]
    elif kind == "driver":
        member.generation = event["generation"]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise JournalError(f"{path}: no journal here ({error.strerror})") from error


def _parse(data: bytes, path: Path) -> tuple[list[Event], int]:
    """The events, and the size of the file up to the end of the last of them."""
    *lines, rest = data.split(b"\n")  # `rest` is what follows the last newline: empty, or torn
    events: list[Event] = []
    size = 0
    for index, line in enumerate(lines):
        event = _decode(line)
        if event is None:
            if index == len(lines) - 1 and not rest:
                break  # the last line, so it is a torn one that happened to get its newline
            raise JournalError(
                f"{path}:{index + 1}: the checksum does not fit the line, and events follow; the "
                "file was damaged, restore it from a copy"
            )
        if event.get("seq") != index:
            raise JournalError(
                f"{path}:{index + 1}: event {event.get('seq')} where {index} should be; lines are "
                "missing or doubled, restore the file from a copy"
            )
        events.append(event)
        size += len(line) + 1
    return events, size


def _decode(line: bytes) -> Event | None:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    event = json.loads(text)
    return event if isinstance(event, dict) else None


def header(folder: Path | str) -> Event:
    """The first event of the journal in `folder`; reads no more than that line."""
    path = Path(folder) / FILE
    try:
        with path.open("rb") as file:
            first = _decode(file.readline().rstrip(b"\n"))
    except OSError as error:
        raise JournalError(f"{path}: no journal here ({error.strerror})") from error
    if first is None:
        return replay(_parse(_bytes(path), path)[0], path).header  # says what is wrong
    try:
        return _begin(first).header
    except (JournalError, KeyError) as error:
        raise JournalError(f"{path}:1: {error}") from error
