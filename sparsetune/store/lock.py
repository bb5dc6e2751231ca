"""The lock of a sweep: one driver at a time may write its journals.

The rule to know: whoever holds the lock says so every ten seconds. A holder whose process is gone
from this machine, or that has been silent for a minute elsewhere, has lost it. The clocks of
machines that share a storage must agree to within that minute. A holder that has been silent for
half of it looks, before it writes again, whether the lock is still its own (`SweepLock.check`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from sparsetune.store.paths import S3Path, place

LOCK_FILE = "sweep.lock"
HEARTBEAT_SECONDS = 10.0
OVERDUE_SECONDS = 30.0
STALE_SECONDS = 60.0  # six missed heartbeats: the holder is gone, or cannot reach the storage
SETTLE_SECONDS = 2.0  # longer than a request to an object store takes


class SweepHeld(RuntimeError):
    """Another driver holds the sweep."""


@dataclass
class Holder:
    """Who holds a sweep: the text of its lock file."""

    token: str
    pid: int
    started: str  # tells a process from a later one with the same pid
    host: str
    machine: str  # host, boot and pid namespace: where `pid` means something
    since: float
    heartbeat: float
    settled: bool = True  # False: it may yet turn out that another one was first

    def alive(self) -> bool:
        if self.machine == _machine():
            return _started(self.pid) == self.started
        return time.time() - self.heartbeat < STALE_SECONDS


def holder(folder: Path | str) -> Holder | None:
    """The driver that holds the sweep in `folder` now, or None."""
    path = _path(folder)
    if isinstance(path, S3Path):
        return next((h for _, h in reversed(_entries(path)) if h.settled and h.alive()), None)
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        with _exclusive(fd, fcntl.LOCK_SH):
            found = _holder(fd)
    finally:
        os.close(fd)
    return found if found is not None and found.alive() else None


def _path(folder: Path | str) -> Path:
    return place(folder) / LOCK_FILE


class SweepLock:
    """The right to write a sweep's journals, from construction until `close`."""

    def __init__(self, folder: Path | str, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
        self.path = _path(folder)
        pid, now = os.getpid(), time.time()
        self._me = Holder(
            uuid.uuid4().hex, pid, _started(pid) or "", socket.gethostname(), _machine(), now, now
        )
        self._lost: Holder | None = None
        self._closing = threading.Event()
        self._one_at_a_time = threading.Lock()
        lock = _ObjectLock if isinstance(self.path, S3Path) else _FileLock
        self._lock: _FileLock | _ObjectLock = lock(self.path, self._me)
        self._thread = threading.Thread(target=self._beat, args=(heartbeat_seconds,), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises SweepHeld when another driver has taken the sweep over meanwhile.

        Costs nothing while the heart beats. After a silence, as of a machine that slept or a
        storage that was away, it asks the storage, and OSError says that this cannot be done."""
        if time.time() - self._me.heartbeat > OVERDUE_SECONDS:
            self._beat_once()
        if self._lost is not None:
            raise SweepHeld(
                f"{_held(self.path, self._lost)}; it has taken the sweep over while this driver "
                "was silent, and this one stops"
            )

    def close(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # without storage the lock ends with the heartbeat
            self._lock.release(self._me)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _beat(self, seconds: float) -> None:
        while self._lost is None and not self._closing.wait(seconds):
            # Storage that is away for a while: the next heartbeat tries again.
            with contextlib.suppress(OSError):
                self._beat_once()

    def _beat_once(self) -> None:
        with self._one_at_a_time:
            if self._lost is None:
                now = time.time()
                self._lost = self._lock.beat(dataclasses.replace(self._me, heartbeat=now))
                self._me.heartbeat = now


class _FileLock:
    """A local file, or one on NFS, that stays for ever and is rewritten in place.

    A file that is deleted and made again can be taken by two drivers that both saw it stale. Where
    the file system has no flock, two drivers that start within the same moment could both get it;
    the heartbeat then tells one.
    """

    def __init__(self, path: Path, me: Holder) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with _exclusive(self._fd, fcntl.LOCK_EX):
                other = _holder(self._fd)
                if other is not None and other.alive():
                    raise _held(path, other)
                self._put(me)
        except (SweepHeld, OSError):
            os.close(self._fd)
            raise

    def beat(self, me: Holder) -> Holder | None:
        """Writes the heartbeat; returns the other driver where it is not ours any more."""
        with _exclusive(self._fd, fcntl.LOCK_EX):
            now = _holder(self._fd)
            if now is not None and now.token != me.token:
                return now
            self._put(me)
        return None

    def release(self, me: Holder) -> None:
        with _exclusive(self._fd, fcntl.LOCK_EX):
            now = _holder(self._fd)
            if now is not None and now.token == me.token:
                os.ftruncate(self._fd, 0)
        os.close(self._fd)

    def _put(self, me: Holder) -> None:
        # Of constant length, so that one write replaces all of the text before it.
        os.pwrite(self._fd, json.dumps(asdict(me)).ljust(1023).encode() + b"\n", 0)
        os.fsync(self._fd)


class _ObjectLock:
    """Objects `sweep.lock/GEN-TOKEN.json`, of which the highest GEN that is alive holds the sweep.

    Objects know no exclusive creation here. So a driver that sees nobody alive puts its object with
    the next GEN, waits for what others may have put in the same moment, and looks again: the lowest
    (GEN, token) holds it from then on, and says so, which those that come late see. This asks that
    a listing or a put takes less than SETTLE_SECONDS.
    """

    def __init__(self, folder: Path, me: Holder) -> None:
        self._folder = folder
        before = _entries(folder)
        self._refuse(other for _, other in before if other.alive())
        self._generation = 1 + max((generation for generation, _ in before), default=0)
        self._path = _entry(folder, self._generation, me)
        self._put(dataclasses.replace(me, settled=False))
        try:
            time.sleep(SETTLE_SECONDS)
            mine, others = (self._generation, me.token), _entries(folder)
            self._refuse(
                other
                for generation, other in others
                if other.alive()
                and other.token != me.token
                and (other.settled or (generation, other.token) < mine)
            )
            self._put(me)
        except (SweepHeld, OSError):
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            raise
        for generation, other in others:  # whoever they were finds their object gone
            if not other.alive():
                _entry(folder, generation, other).unlink(missing_ok=True)

    def beat(self, me: Holder) -> Holder | None:
        entries = _entries(self._folder)
        newer = [other for number, other in entries if number > self._generation and other.settled]
        if newer:
            return newer[-1]
        if not self._path.exists():
            return dataclasses.replace(me, pid=0, host="an unknown host")
        self._put(me)
        return None

    def release(self, me: Holder) -> None:
        self._path.unlink(missing_ok=True)

    def _put(self, me: Holder) -> None:
        # Of constant length: whoever reads asks for the size first, and it may be put in between.
        self._path.write_text(json.dumps(asdict(me)).ljust(1023))

    def _refuse(self, others: Iterable[Holder]) -> None:
        for other in others:
            raise _held(self._folder, other)


def _entry(folder: Path, generation: int, holder: Holder) -> Path:
    return folder / f"{generation:04d}-{holder.token}.json"


def _entries(folder: Path) -> list[tuple[int, Holder]]:
    """(generation, holder) of each object, the oldest generation first."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            found.append((int(path.name.partition("-")[0]), Holder(**json.loads(path.read_text()))))
    return sorted(found, key=lambda entry: (entry[0], entry[1].token))


def _held(path: Path, other: Holder) -> SweepHeld:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(other.since))
    return SweepHeld(f"{path}: held by process {other.pid} on {other.host} since {since}")


def _holder(fd: int) -> Holder | None:
    text = os.pread(fd, 4096, 0)
    try:
        return Holder(**json.loads(text)) if text.strip() else None
    except (ValueError, TypeError):  # half written: nobody can be named, but the time is known
        touched = os.fstat(fd).st_mtime
        return Holder("", 0, "", "an unknown host", "", touched, touched)


@contextlib.contextmanager
def _exclusive(fd: int, kind: int) -> Iterator[None]:
    with contextlib.suppress(OSError):  # no flock on this file system
        fcntl.flock(fd, kind)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)


def _started(pid: int) -> str | None:
    """When the process started, in the kernel's ticks; "" where only its life is known."""
    try:
        # The name in parentheses may hold blanks; the state is next, the start time is field 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def _machine() -> str:
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux alone has these
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)
