"""Wall time of a whole sweep: our engines against one process per trial, and a plain Tune script.

`python scripts/bench_sweep.py --data FOLDER [--seeds 3] [--variants auto solo plain]`: 64 trials of
up to 8 epochs, ASHA, SET at 95 % sparsity, MNIST, LeNet-300-100, offline W&B; from the start of the
command to its end, Ray's start included. The variants run one after another for each seed. Printed
beside the time: trial-epochs trained, the best accuracy among trials that were trained to the end,
seconds to the first result, how many slots were in use over the middle half of the sweep, and how
many epochs were under way at once, of both engines together.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sparsetune.store import journal
from sparsetune.store.lines import Event

HERE = Path(__file__).parent


def ours(engine: str, options: argparse.Namespace, seed: int, folder: Path) -> dict[str, float]:
    words = [
        "sweep", "set", "density=0.05", "name=bench", f"trials={options.trials}", "epochs=8",
        f"seed={seed}", "data.name=mnist", f"data.path={Path(options.data).resolve()}",
        "model.name=lenet300100", "wandb.mode=offline", f"engine={engine}", *options.words,
    ]  # fmt: skip
    began = time.time()
    command = [sys.executable, "-m", "sparsetune.cli", *words]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=environment())
    seconds = time.time() - began
    events = journal.read(folder / "sweeps/bench/set@0.05")
    reports = [event for event in events if event["type"] == "report"]
    finished = {e["number"] for e in events if e["type"] == "end" and e["status"] == "finished"}
    last = {event["number"]: event["metrics"] for event in reports}
    filled, epochs = occupancy(events)
    return {
        "seconds": seconds,
        "epochs": len(reports),
        "best": max(last[number]["val/accuracy"] for number in finished),
        "first": reports[0]["time"] - began,
        "filled": filled,
        "epochs at once": epochs,
    }


def occupancy(events: list[Event]) -> tuple[float, float]:
    """Slots in use, and epochs under way at once (of all engines together): means over the middle
    half of the time between the first suggestion and the last end.

    A trial is in its slot from one epoch's usual time before its first report; before that its
    process starts, or it waits to begin with others.
    """
    times: dict[int, list[float]] = {}
    for event in events:
        if event["type"] == "report":
            times.setdefault(event["number"], []).append(event["time"])
    gaps = [b - a for each in times.values() for a, b in itertools.pairwise(each)]
    usual = statistics.median(gaps)
    begin = min(event["time"] for event in events if event["type"] == "suggest")
    end = max(event["time"] for event in events if event["type"] == "end")
    moments = [begin + (end - begin) * (0.25 + 0.5 * n / 1000) for n in range(1000)]
    filled, epochs = 0, 0
    for moment in moments:
        done = [
            sum(time <= moment for time in each)
            for each in times.values()
            if each[0] - usual <= moment < each[-1]
        ]
        filled, epochs = filled + len(done), epochs + len(set(done))
    return filled / len(moments), epochs / len(moments)


def plain(options: argparse.Namespace, seed: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, str(HERE / "plain_tune.py"), "--data", options.data]
    command += ["--trials", str(options.trials), "--seed", str(seed)]
    began = time.time()
    done = subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True, env=environment()
    )
    words = done.stdout.strip().splitlines()[-1].split()
    found = dict(zip(words[::2], map(float, words[1::2]), strict=True))
    return {"seconds": time.time() - began, "epochs": found["epochs"], "best": found["best"]}


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(HERE.parent)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with the MNIST parquet files")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=["auto", "solo", "plain"])
    parser.add_argument("--words", nargs="*", default=[], help="further key=value for our sweeps")
    options = parser.parse_args()
    options.data = str(Path(options.data).resolve())
    print(f"{os.cpu_count()} cores, {platform.machine()}; Python {platform.python_version()}")
    print("seed  variant  seconds  trial-epochs  best     first s  slots used  epochs at once")
    times: dict[str, list[float]] = {name: [] for name in options.variants}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in options.variants:
            with tempfile.TemporaryDirectory() as folder:
                got = (
                    plain(options, seed, Path(folder))
                    if name == "plain"
                    else ours(name, options, seed, Path(folder))
                )
            times[name].append(got["seconds"])
            shown = (
                f"{got['first']:7.1f}  {got['filled']:10.1f}  {got['epochs at once']:14.1f}"
                if "first" in got
                else ""
            )
            print(
                f"{seed:4}  {name:7}  {got['seconds']:7.0f}  {got['epochs']:12.0f}  "
                f"{got['best']:.4f}  {shown}",
                flush=True,
            )
    base = times[options.variants[0]]
    for name in options.variants[1:]:
        ratios = [other / own for other, own in zip(times[name], base, strict=True)]
        print(
            f"{options.variants[0]} is {statistics.median(ratios):.1f} times as fast as {name} "
            f"({min(ratios):.1f}-{max(ratios):.1f}, {len(ratios)} seeds)"
        )


if __name__ == "__main__":
    main()
