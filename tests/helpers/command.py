"""The command line in a process of its own, at toy size, and what its journals hold then."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from sparsetune.store import journal
from sparsetune.store.lines import FILE

TOY = [
    "epochs=3",
    "data.limit=200",
    "model.widths=[16]",
    "train.batch_size=32",
    "wandb.mode=offline",
]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "sparsetune.cli", *words]


def run(folder: Path, *words: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*words), cwd=folder, capture_output=True, text=True, timeout=300, env=environment()
    )
    assert check is None or done.returncode == check, done.stdout + done.stderr
    return done


def environment() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "SPARSETUNE_STORAGE"))}
    return env | {"PYTHONPATH": str(Path(__file__).parents[2])}


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(*words),
        cwd=folder,
        env=environment(),
        stdout=(folder / "out").open("ab"),
        stderr=subprocess.STDOUT,
    )


def reports(folder: Path) -> int:
    """How many epochs all journals below the folder hold; 0 before there is one."""
    return sum(path.read_bytes().count(b'"type":"report"') for path in folder.rglob(FILE))


def wait_for_reports(folder: Path, process: subprocess.Popen[bytes], num: int) -> None:
    deadline = time.monotonic() + 120
    while reports(folder) < num and process.poll() is None:
        assert time.monotonic() < deadline, (folder / "out").read_text()
        time.sleep(0.02)


def check_complete(member: Path, trials: int, epochs: int) -> journal.Record:
    """The asked number of trials, each ended, its epochs 1, 2, 3, ... (`load` refuses gaps)."""
    record = journal.load(member)
    assert [t.number for t in record.trials.values()] == list(range(trials))
    assert all(t.status in ("finished", "diverged") for t in record.trials.values())
    for one in record.trials.values():
        if one.status == "finished":
            assert [r.epoch for r in one.reports] == list(range(1, epochs + 1))
    return record
