"""Where the lines of a journal lie: in one local file, or in segments on an object store.

The rule to know: a line counts when it is whole and in order. A local file grows in place. An
object can only be put whole, so there a journal is `journal/GEN-SEQ.jsonl`: the last segment is put
again with every sync until it has SEGMENT_BYTES, and each driver begins a GEN of its own. The first
event of a GEN says which older segments it `accepts` and how much of each. That fences off an older
driver that goes on writing: nobody reads beyond those sizes, or a segment that is not listed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from sparsetune.store.paths import S3Path, why

FILE = "journal.jsonl"
SEGMENTS = "journal"
SEGMENT_BYTES = 256 * 1024
SEGMENT_NAME = re.compile(r"(\d{4,})-(\d{4,})\.jsonl")

Event = dict[str, Any]


class JournalError(ValueError):
    """A journal that cannot be trusted or must not be written; says file, line and why."""


class Part(NamedTuple):
    """A file of a journal, or as much of it as counts."""

    path: Path
    data: bytes


def encode(event: Event) -> bytes:
    text = json.dumps(event, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode(line: bytes) -> Event | None:
    """The event; None where the checksum does not fit."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    event = json.loads(text)
    return event if isinstance(event, dict) else None


def home(folder: Path) -> Path:
    """The file or folder that a journal is."""
    return folder / (SEGMENTS if isinstance(folder, S3Path) else FILE)


def first_file(folder: Path) -> Path:
    """The file whose first line is the journal's."""
    path = home(folder)
    return path / _segment(0, 0) if isinstance(path, S3Path) else path


def exists(folder: Path) -> bool:
    return home(folder).exists()


def parts(folder: Path) -> list[Part]:
    """What the journal in `folder` consists of, in order. JournalError where a part is missing."""
    path = home(folder)
    try:
        return _segments(path) if isinstance(path, S3Path) else [Part(path, path.read_bytes())]
    except OSError as error:
        raise JournalError(f"{path}: no journal here ({why(error)})") from error


def _segments(folder: Path) -> list[Part]:
    found = [match for path in folder.iterdir() if (match := SEGMENT_NAME.fullmatch(path.name))]
    if not found:
        raise FileNotFoundError(2, "no segments")
    newest = max(int(match[1]) for match in found)
    last = max(int(match[2]) for match in found if int(match[1]) == newest)
    own = [_segment(newest, number) for number in range(last + 1)]
    first = decode(_read(folder / own[0]).partition(b"\n")[0])
    if first is None:
        raise JournalError(
            f"{folder / own[0]}:1: the checksum does not fit the line; the segment was damaged, "
            "restore it from a copy"
        )
    sizes: dict[str, int | None] = {**dict(first.get("accepts", [])), **dict.fromkeys(own)}
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda name: _read(folder / name), sizes))
    result = []
    for (name, size), text in zip(sizes.items(), texts, strict=True):
        if size is not None and len(text) < size:
            raise JournalError(
                f"{folder / name}:{text.count(10) + 1}: the segment ends here, but had "
                f"{size - len(text)} bytes more; restore it from a copy"
            )
        result.append(Part(folder / name, text[:size]))
    return result


def _segment(generation: int, number: int) -> str:
    return f"{generation:04d}-{number:04d}.jsonl"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise JournalError(
            f"{path}:1: the segment is missing, and others follow; restore it from a copy"
        ) from error


class LineFile:
    """A local file. After an OSError nothing of the line counts that was to be written."""

    def __init__(self, path: Path, size: int) -> None:
        """`size`: of what counts; the rest is cut off."""
        self._path, self._size, self._torn = path, size, False
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if size < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)

    def opening(self) -> Event:
        """What the next event has to say besides."""
        return {}

    def append(self, line: bytes) -> None:
        self._heal()  # an earlier write failed, and the cut after it did, too
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            self.cut(0)
            raise
        self._size += len(line)

    def cut(self, size: int) -> None:
        """Takes the last `size` bytes back, and what a failed write left of a line.

        A full disk takes part of a line. Cut off, the file stays valid and may be appended to once
        there is room; if even that fails, a reader sees no more than a torn tail.
        """
        self._size -= size
        self._torn = True
        with contextlib.suppress(OSError):
            self._heal()

    def _heal(self) -> None:
        if self._torn:
            os.ftruncate(self._fd, self._size)
            self._torn = False

    def sync(self) -> None:
        os.fsync(self._fd)

    def keep_name(self) -> None:
        """Makes the name of a new file last, too."""
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        os.close(self._fd)


class Segments:
    """A generation of segments on an object store, by the methods of a LineFile."""

    def __init__(self, folder: Path, before: list[tuple[Path, int]]) -> None:
        """`before`: the segments that are there, and how much of each counts."""
        self._folder = folder
        self._accepts = [(path.name, size) for path, size in before if size]
        self._generation = 1 + int(before[-1][0].name.partition("-")[0]) if before else 0
        self._number = 0
        self._text = b""

    def opening(self) -> Event:
        first = self._accepts and not self._text and not self._number
        return {"accepts": self._accepts} if first else {}

    def append(self, line: bytes) -> None:
        if self._text and len(self._text) + len(line) > SEGMENT_BYTES:
            self.sync()
            self._number, self._text = self._number + 1, b""
        self._text += line

    def cut(self, size: int) -> None:
        self._text = self._text[: len(self._text) - size]

    def sync(self) -> None:
        if self._text:
            (self._folder / _segment(self._generation, self._number)).write_bytes(self._text)

    def keep_name(self) -> None:
        pass

    def close(self) -> None:
        pass
