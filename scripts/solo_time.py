"""How long a finished sweep trained, and how long it would have with one process per trial.

python scripts/solo_time.py NAME [--storage sweeps] [--processes 2]

Run where the sweep's data set is found. So many processes of one thread each, which stand for the
cores of a small machine, train two epochs of each member's best setting at the same time with the
solo trainer; the second one is timed. Times the epochs in the journals (searched, confirmed) that
is the estimate, without the start of processes and without slots that wait. Beside it: the time
between the journals' events, pauses of over two minutes left out, when nobody trained.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from sparsetune.comparison.winners import confirmations
from sparsetune.engine.solo import Solo
from sparsetune.machine import processor
from sparsetune.settings import TrialSettings
from sparsetune.space.member import Member, load_member
from sparsetune.store import journal
from sparsetune.store.layout import member_folders
from sparsetune.training import data
from sparsetune.training.setup import keep_freed_memory, prepare

PAUSE = 120  # seconds without any event


def serve(connection: Connection) -> None:
    """Trains two epochs of each setting that comes, and answers with the second one's seconds."""
    torch.set_num_threads(1)
    keep_freed_memory()
    known: dict[str, data.Dataset] = {}
    while (settings := connection.recv()) is not None:
        if repr(settings.data) not in known:
            known[repr(settings.data)] = data.load(settings.data)
        pool = Solo(1)
        source = known[repr(settings.data)]
        pool.attach(0, prepare(settings, torch.device("cpu"), source), None)
        pool.advance()
        connection.send("ready")
        connection.recv()
        began = time.perf_counter()
        pool.advance()
        connection.send(time.perf_counter() - began)


def seconds_per_epoch(connections: list[Connection], settings: TrialSettings) -> float:
    for connection in connections:
        connection.send(settings)
    for connection in connections:
        connection.recv()
    for connection in connections:
        connection.send("go")
    return sum(connection.recv() for connection in connections) / len(connections)


def best(member: Member, record: journal.Record) -> TrialSettings:
    done = [trial for trial in record.trials.values() if trial.status == "finished"]
    chosen = max(done, key=lambda trial: trial.reports[-1].metrics.get("val/accuracy", 0.0))
    return member.trial_settings(chosen.params, chosen.fixed)


def trained(times: Iterable[float]) -> float:
    gaps = (b - a for a, b in itertools.pairwise(sorted(times)))
    return sum(gap for gap in gaps if gap < PAUSE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("--storage", type=Path, default=Path("sweeps"))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    connections = []
    for _ in range(options.processes):
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs,), daemon=True).start()
        connections.append(ours)

    print(f"{processor()}, {os.cpu_count()} cores; torch {torch.__version__}")
    print(f"{'member':32} {'epochs':>7} {'packed, s':>10} {'solo, s':>8} {'times':>6}")
    times: dict[str, list[float]] = {"search": [], "confirm": []}
    total = [0.0, 0.0]
    for folder in member_folders(options.storage, options.name):
        member, record = load_member(folder)
        events: list[Any] = []
        for part, folders in (("search", [folder]), ("confirm", confirmations(folder).values())):
            reports = [e for each in folders for e in journal.read(each) if e["type"] == "report"]
            times[part] += [report["time"] for report in reports]
            events += reports
        packed = sum(event["metrics"]["device_seconds"] for event in events)
        solo = len(events) * seconds_per_epoch(connections, best(member, record))
        total = [total[0] + packed, total[1] + solo]
        print(f"{member.name:32} {len(events):7} {packed:10.0f} {solo:8.0f} {solo / packed:6.1f}")
    packed, solo = total
    print(f"{'all':32} {'':7} {packed:10.0f} {solo:8.0f} {solo / packed:6.1f}")
    for part, moments in times.items():
        print(f"{part}: {trained(moments) / 60:.0f} min")
    hours = solo / options.processes / 3600
    print(f"solo, {options.processes} at once: about {hours:.1f} h")


if __name__ == "__main__":
    main()
