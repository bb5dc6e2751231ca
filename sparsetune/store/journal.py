"""The journal of a member: an append-only row of events, the only truth about a search.

The rule to know: what is not in the journal has not happened. `Journal.append` is the only way in;
it writes an event and applies it to `Journal.record`, with the function that also replays a file,
so the state of a running sweep and the state read back from disk cannot differ.

One line is one event: eight hex digits (CRC-32 of the rest), a blank, a JSON object with its
number `seq`, the wall-clock `time` and a `type`:

    sweep    format, trials, and whatever else the caller wants to remember of the sweep
    suggest  number, params, distributions, origin, fixed, in_study, attrs (the sampler's notes)
    report   number, epoch, metrics, decision      epochs of a trial are 1, 2, 3, without a gap
    end      number, status, attempt, error        the last word about a trial
    extend   trials, member, confirm               the new total; what the header says from now on
                                                   of the member, where its ranges are wider, and
                                                   of the confirmation, where seeds are added
    retry    number                                a failed trial is open again, where it was
    test     number, metrics                       what a finished trial does on the test images,
                                                   which are read once, after the search
    driver   generation, pid, host, versions       a process that took the sweep over

Where the lines lie, one file or segments on an object store, is `lines.py`'s matter.

Floats may be NaN or Infinity, which Python's json reads and strict JSON does not know.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sparsetune.store.lines import (
    Event,
    JournalError,
    LineFile,
    Part,
    Segments,
    decode,
    encode,
    first_file,
    home,
    parts,
)
from sparsetune.store.lock import SweepHeld
from sparsetune.store.paths import S3Path, StorageAway, Trouble, give_up, insist, place, why

FORMAT = 1
ENDED = ("finished", "stopped", "diverged", "failed")


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
    failures: list[str | None] = field(default_factory=list)  # errors of ends that were retried
    test: dict[str, float] | None = None


@dataclass
class Record:
    """What the events of one journal add up to."""

    header: Event
    asked: int  # trials in all
    trials: dict[int, Trial] = field(default_factory=dict)  # in number order
    order: list[tuple[int, int]] = field(default_factory=list)  # (number, epoch) as reported
    generation: int = 0
    widened: bool = False  # trials may have been suggested from narrower ranges


def _replay(lines: Iterable[tuple[Event, str]], source: Path) -> Record:
    """The state after events that come with their file and line."""
    record: Record | None = None
    for event, where in lines:
        try:
            if record is None:
                record = _begin(event)
            else:
                _check(record, event)
                _apply(record, event)
        except (JournalError, KeyError) as error:
            reason = f"the event lacks {error}" if isinstance(error, KeyError) else str(error)
            raise JournalError(f"{where}: {reason}") from error
    if record is None:
        raise JournalError(
            f"{source}: no complete event, so this search never began; delete its folder"
        )
    return record


def read(folder: Path | str) -> list[Event]:
    """All events, also while a sweep writes: a torn or incomplete last line is left out."""
    return [event for event, _ in _parse(parts(place(folder)))[0]]


def load(folder: Path | str) -> Record:
    """The state of the journal in `folder`, for readers."""
    folder = place(folder)
    return _replay(_parse(parts(folder))[0], home(folder))


class Journal:
    """One writer's hold on a journal. `record` is its state and is kept up to date.

    `guard` is called before anything is written; what it raises ends the writing. `trouble` is told
    of each OSError and decides whether to try again (`paths.insist`).
    """

    def __init__(self, path: Path, lines: LineFile | Segments, record: Record, seq: int) -> None:
        """Not for callers: see `create` and `open`."""
        self.path, self.record = path, record
        self.guard: Callable[[], None] = lambda: None
        self.trouble: Trouble = give_up
        self._lines, self._seq = lines, seq
        self._dirty = self._closed = False
        self._synced = time.monotonic()

    @classmethod
    def create(cls, folder: Path | str, header: Event) -> Journal:
        """A new journal whose first event is `header` (which must have `trials`)."""
        path = home(place(folder))
        # A file without one whole line is what a driver killed in this very call leaves behind.
        if path.exists() and (isinstance(path, S3Path) or b"\n" in path.read_bytes()):
            raise JournalError(f"{path}: exists already; resume it, or take another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        event = json.loads(json.dumps({"type": "sweep", "format": FORMAT, **header}))
        record = _begin({"seq": 0, "time": time.time(), **event})
        lines = Segments(path, []) if isinstance(path, S3Path) else LineFile(path, 0)
        journal = cls(path, lines, record, 0)
        try:
            journal._write(record.header, durable=True)
            lines.keep_name()
        except OSError:
            journal.close()
            raise
        return journal

    @classmethod
    def open(cls, folder: Path | str) -> Journal:
        """The existing journal, ready for more; a torn last line is cut off the file."""
        path = home(place(folder))
        found = parts(path.parent)
        events, sizes = _parse(found)
        record = _replay(events, path)
        if isinstance(path, S3Path):
            before = [(part.path, size) for part, size in zip(found, sizes, strict=True)]
            return cls(path, Segments(path, before), record, len(events))
        return cls(path, LineFile(path, sizes[0]), record, len(events))

    def append(self, event: Event, durable: bool = True) -> None:
        """Writes the event and applies it to `record`; refuses one that does not fit there.

        `durable`: on disk before this returns. Otherwise within a second, given `sync`, which is
        enough for reports, because training reproduces them."""
        event = {"seq": self._seq, "time": time.time(), **event, **self._lines.opening()}
        # Through JSON first, so that `record` holds what a reader will find: lists, not tuples.
        event = json.loads(json.dumps(event))
        try:
            _check(self.record, event)
        except JournalError as error:
            raise JournalError(f"{self.path}:{self._seq + 1}: {error}") from error
        self._write(event, durable)
        _apply(self.record, event)

    def sync(self, older_than: float = 0.0) -> None:
        """Puts waiting reports on disk, if the last time was `older_than` seconds ago."""
        if self._dirty and time.monotonic() - self._synced >= older_than:
            self._insist(self._lines.sync)
            self._dirty, self._synced = False, time.monotonic()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self.sync()
        finally:
            self._lines.close()

    def _write(self, event: Event, durable: bool) -> None:
        line = encode(event)
        late = time.monotonic() - self._synced >= 1.0

        def write() -> None:
            self._lines.append(line)
            if durable or late:
                try:
                    self._lines.sync()
                except OSError:
                    self._lines.cut(len(line))  # whole or not at all, also if this was the last try
                    raise

        self._insist(write)
        self._dirty = not (durable or late)
        if not self._dirty:
            self._synced = time.monotonic()
        self._seq += 1

    def _insist(self, write: Callable[[], None]) -> None:
        def guarded() -> None:
            self.guard()
            write()

        try:
            insist(guarded, self.trouble)
        except (SweepHeld, StorageAway, KeyboardInterrupt):
            self._dirty = False  # `close` need not try, and wait, again
            raise


def _begin(event: Event) -> Record:
    if event.get("type") != "sweep":
        raise JournalError(f"the first event is '{event.get('type')}'; it must be 'sweep'")
    if event.get("format") != FORMAT:
        raise JournalError(
            f"journal format {event.get('format')!r}; this version of sparsetune reads {FORMAT}"
        )
    return Record(header=event, asked=event["trials"])


def _check(record: Record, event: Event) -> None:
    kind = event.get("type")
    if kind == "suggest":
        if event["number"] != len(record.trials):
            raise JournalError(f"trial {event['number']} suggested after {len(record.trials)}")
    elif kind in ("report", "end"):
        trial = record.trials.get(event["number"])
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
    elif kind == "retry":
        trial = record.trials.get(event["number"])
        if trial is None or trial.status != "failed":
            raise JournalError(f"'retry' of trial {event['number']}, which has not failed")
    elif kind == "test":
        trial = record.trials.get(event["number"])
        if trial is None or trial.status != "finished" or trial.test is not None:
            raise JournalError(f"'test' of trial {event['number']}, which is not due for one")
    elif kind == "extend":
        if event["trials"] < record.asked:
            raise JournalError(f"extended from {record.asked} to {event['trials']} trials")
    elif kind != "driver":
        raise JournalError(f"unknown event '{kind}'")


def _apply(record: Record, event: Event) -> None:
    kind = event["type"]
    if kind == "suggest":
        record.trials[event["number"]] = Trial(
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
        record.trials[event["number"]].reports.append(report)
        record.order.append((event["number"], event["epoch"]))
    elif kind == "end":
        trial = record.trials[event["number"]]
        trial.status, trial.ended = event["status"], event["time"]
        trial.attempts, trial.error = event.get("attempt", 1), event.get("error")
    elif kind == "retry":
        trial = record.trials[event["number"]]
        trial.failures.append(trial.error)
        trial.status, trial.attempts, trial.error, trial.ended = "running", 1, None, None
    elif kind == "test":
        record.trials[event["number"]].test = event["metrics"]
    elif kind == "extend":
        record.asked = event["trials"]
        changed = {key: event[key] for key in ("member", "confirm") if key in event}
        record.header = record.header | changed
        record.widened |= "member" in event
    elif kind == "driver":
        record.generation = event["generation"]


def _parse(found: list[Part]) -> tuple[list[tuple[Event, str]], list[int]]:
    """The events, each with its file and line, and how much of each part they fill."""
    events: list[tuple[Event, str]] = []
    sizes = []
    for part in found:
        last = part is found[-1]
        *lines, rest = part.data.split(b"\n")  # `rest` follows the last newline: empty, or torn
        if rest and not last:
            raise JournalError(
                f"{part.path}:{len(lines) + 1}: the line is cut short, and events follow; restore "
                "the file from a copy"
            )
        size = 0
        for number, line in enumerate(lines, start=1):
            event = decode(line)
            if event is None:
                if last and number == len(lines) and not rest:
                    break  # the last line, so it is a torn one that happened to get its newline
                raise JournalError(
                    f"{part.path}:{number}: the checksum does not fit the line, and events follow; "
                    "the file was damaged, restore it from a copy"
                )
            if event.get("seq") != len(events):
                raise JournalError(
                    f"{part.path}:{number}: event {event.get('seq')} where {len(events)} should "
                    "be; lines are missing or doubled, restore the file from a copy"
                )
            events.append((event, f"{part.path}:{number}"))
            size += len(line) + 1
        sizes.append(size)
    return events, sizes


def header(folder: Path | str) -> Event:
    """The first event of the journal in `folder`; reads no more than that line's file."""
    path = first_file(place(folder))
    try:
        with path.open("rb") as file:
            first = decode(file.readline().rstrip(b"\n"))
    except OSError as error:
        raise JournalError(f"{path}: no journal here ({why(error)})") from error
    if first is None:
        return load(folder).header  # says what is wrong
    try:
        return _begin(first).header
    except (JournalError, KeyError) as error:
        raise JournalError(f"{path}:1: {error}") from error
