"""Processes of this machine, from /proc."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    parent: int
    title: str  # the words of its command, each with a NUL behind it; Ray's have one word


def living() -> dict[int, Process]:
    """{pid: process} of those that have not ended; one that its parent has yet to note has."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                found[int(entry.name)] = Process(int(parent), (entry / "cmdline").read_text())
    return found


def below(root: int, title: str = "") -> list[int]:
    """Those that descend from process `root` and whose title begins so."""
    known = living()

    def descends(pid: int) -> bool:
        while pid in known and pid != root:
            pid = known[pid].parent
        return pid == root

    return [p for p in known if p != root and known[p].title.startswith(title) and descends(p)]
