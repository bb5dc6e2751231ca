"""The lock of a sweep: one driver at a time may write its journals.

The rule to know: whoever holds the lock says so every ten seconds. A holder whose process is gone
from this machine, or that has been silent for a minute elsewhere, has lost it. The clocks of
machines that share a storage must agree to within that minute.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

LOCK_FILE = "sweep.lock"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # six missed heartbeats: the holder is gone, or cannot reach the storage


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

    def alive(self) -> bool:
        if self.machine == _machine():
            return _started(self.pid) == self.started
        return time.time() - self.heartbeat < STALE_SECONDS


def holder(folder: Path | str) -> Holder | None:
    """The driver that holds the sweep in `folder` now, or None."""
    try:
        fd = os.open(Path(folder) / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        with _exclusive(fd, fcntl.LOCK_SH):
            found = _holder(fd)
    finally:
        os.close(fd)
    return found if found is not None and found.alive() else None


class SweepLock:
    """The right to write a sweep's journals, from construction until `close`.

    The file stays for ever and is rewritten in place: a file that is deleted and made again can be
    taken by two drivers that both saw it stale. Where the file system has no flock, two drivers
    that start within the same moment could both get it; the heartbeat then tells one (`check`).
    """

    def __init__(self, folder: Path | str, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
        self.path = Path(folder) / LOCK_FILE
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        pid, now = os.getpid(), time.time()
        me = Holder(
            uuid.uuid4().hex, pid, _started(pid) or "", socket.gethostname(), _machine(), now, now
        )
        self._me = me
        self._lost: Holder | None = None
        self._closing = threading.Event()
        try:
            with _exclusive(self._fd, fcntl.LOCK_EX):
                other = _holder(self._fd)
                if other is not None and other.alive():
                    raise _held(self.path, other)
                self._put()
        except (SweepHeld, OSError):
            os.close(self._fd)
            raise
        self._thread = threading.Thread(target=self._beat, args=(heartbeat_seconds,), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises SweepHeld when another driver has taken the sweep over meanwhile."""
        if self._lost is not None:
            raise _held(self.path, self._lost)

    def close(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        with _exclusive(self._fd, fcntl.LOCK_EX):
            now = _holder(self._fd)
            if now is not None and now.token == self._me.token:
                os.ftruncate(self._fd, 0)
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _beat(self, seconds: float) -> None:
        while not self._closing.wait(seconds):
            # Storage that is away for a while: the next heartbeat tries again.
            with contextlib.suppress(OSError), _exclusive(self._fd, fcntl.LOCK_EX):
                now = _holder(self._fd)
                if now is not None and now.token != self._me.token:
                    self._lost = now
                    return
                self._me.heartbeat = time.time()
                self._put()

    def _put(self) -> None:
        # Of constant length, so that one write replaces all of the text before it.
        os.pwrite(self._fd, json.dumps(asdict(self._me)).ljust(1023).encode() + b"\n", 0)
        os.fsync(self._fd)


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
