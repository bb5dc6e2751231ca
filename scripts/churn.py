"""What a sweep of many short trials costs its driver, and whether any of them is lost.

`python scripts/churn.py [--trials 1000] [--slots 32] [--kills 40] [--seed 0]`: toy trials of up to
4 epochs. ASHA stops most of them, learning rates up to 1e6 make some diverge, and trial processes
and engines are ended by SIGKILL at random moments. Printed: how the trials ended, what was lost or
doubled, the places that engines still held at the end, and what the driver's process took (CPU of
all its threads, resident memory) as trials went by. Exit status 1 where a count is wrong.

`python scripts/churn.py --scale [--trials 5000] [--restart 5000]`: one epoch each, random search,
no kills; then a journal of `--restart` trials, made of those just recorded, is resumed: the time
from the command to the first new suggestion.

The sweep is a child of this script; it listens on loopback, and only its own processes are ended.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve()
sys.path.append(str(HERE.parents[1] / "tests"))

from helpers import processes  # noqa: E402

from sparsetune.store import journal  # noqa: E402
from sparsetune.store.lines import FILE  # noqa: E402

SPACE = """\
method: set
fixed: {prune: signwise, new_value: zero, decay: none}
search:
  zeta: {low: 0.05, high: 0.6}
  lr: {low: 0.001, high: 1e6, log: true}
"""
TOY = ["data.limit=200", "model.widths=[16]", "train.batch_size=32", "density=0.2"]
ENGINES = 1 / 8  # the share of engines among the processes that are killed
TITLES = {"engine": "ray::EngineActor", "trial": "ray::ImplicitFunc"}  # of processes
TICK = os.sysconf("SC_CLK_TCK")


# The child ----------------------------------------------------------------------------------------


def drive(report: str, words: list[str]) -> None:
    """The command line; before Ray ends, its engines are asked what they hold."""
    import ray

    from sparsetune.cli import main

    shutdown = ray.shutdown

    def held() -> dict[str, int]:
        engines = [name for name in ray.util.list_named_actors() if name.startswith("engine-")]
        actors: dict[str, Any] = {name: ray.get_actor(name) for name in engines}
        return {name: ray.get(actor.held.remote()) for name, actor in actors.items()}

    def ask_and_shut_down() -> None:
        if ray.is_initialized():
            deadline = time.monotonic() + 10
            while any((found := held()).values()) and time.monotonic() < deadline:
                time.sleep(0.1)
            Path(report).write_text(json.dumps(found))
        shutdown()

    ray.shutdown = ask_and_shut_down
    sys.argv[1:] = words
    main()


# The parent ---------------------------------------------------------------------------------------


class Mark(NamedTuple):
    ended: int  # trials
    seconds: float
    cpu: float  # seconds of the driver's process
    driver: float  # MB
    engine: float  # MB


@dataclass
class Result:
    """Of one sweep."""

    status: int = -1  # the command's
    ended: Counter[str] = field(default_factory=Counter)
    doubled: int = 0
    lost: int = 0
    held: dict[str, int] = field(default_factory=dict)
    killed: Counter[str] = field(default_factory=Counter)
    marks: list[Mark] = field(default_factory=list)
    closing: float = 0.0  # seconds from the last trial's end to the driver's
    output: str = ""

    def wrong(self) -> list[str]:
        """What should not be; empty for a sweep as it ought to be."""
        found = [f"exit status {self.status}"] * (self.status not in (0, 1))
        found += [f"{self.lost} trials lost"] * (self.lost != 0)
        found += [f"{self.doubled} trials ended twice"] * (self.doubled != 0)
        found += ["no engine answered at the end"] * (not self.held)
        return found + [f"{name} holds {number}" for name, number in self.held.items() if number]


def sweep(
    folder: Path, words: list[str], trials: int, kills: int, seed: int, steps: Sequence[int] = ()
) -> Result:
    """Runs it, watches it from outside with a mark at so many trials, counts in its journal."""
    result, rng, steps = Result(), random.Random(seed), [*steps, trials]
    (folder / "churn.yaml").write_text(SPACE)
    command = [sys.executable, str(HERE), "--drive", str(folder / "held.json"), "sweep"]
    command += ["churn.yaml", "name=churn", f"trials={trials}", f"seed={seed}", *TOY, *words]
    # A kill is due when so many trials have ended.
    due = sorted(rng.sample(range(trials // 20, trials - trials // 20), kills))
    began = time.monotonic()
    with (folder / "out").open("wb") as out:
        driver = subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=environment()
        )
    try:
        seen, ended, last = 0, 0, began
        while driver.poll() is None:
            time.sleep(0.05)
            path = next(folder.glob(f"sweeps/churn/*/{FILE}"), None)
            if path is None:
                continue
            with path.open("rb") as file:
                file.seek(seen)
                new = file.read()
            whole = new.rfind(b"\n") + 1
            seen, ended = seen + whole, ended + new[:whole].count(b'"type":"end"')
            if len(result.marks) < len(steps) and ended >= steps[len(result.marks)]:
                last = time.monotonic()
                result.marks.append(mark(driver.pid, ended, last - began))
            if due and ended >= due[0] and (killed := kill_one(driver.pid, rng)):
                result.killed[killed] += 1
                due.pop(0)
        result.status, result.closing = driver.wait(), time.monotonic() - last
    finally:
        if driver.poll() is None:
            driver.terminate()  # it finishes its epochs and takes its processes with it
            driver.wait(60)
    result.output = (folder / "out").read_text()
    count(folder, trials, result)
    return result


def count(folder: Path, trials: int, result: Result) -> None:
    paths = folder.glob(f"sweeps/churn/*/{FILE}")
    events = [event for path in paths for event in journal.read(path.parent)]
    ends = Counter(event["number"] for event in events if event["type"] == "end")
    result.ended = Counter(event["status"] for event in events if event["type"] == "end")
    result.doubled = sum(ends.values()) - len(ends)
    result.lost = trials - len(ends)
    with contextlib.suppress(OSError):
        result.held = json.loads((folder / "held.json").read_text())


def kill_one(driver: int, rng: random.Random) -> str:
    """Ends a random process of a trial, or of an engine; "" where there is none at present."""
    kind = "engine" if rng.random() < ENGINES else "trial"
    found = processes.below(driver, TITLES[kind])
    if not found:
        return ""
    with contextlib.suppress(ProcessLookupError):
        os.kill(rng.choice(found), signal.SIGKILL)
    return kind


def mark(driver: int, ended: int, seconds: float) -> Mark:
    def megabytes(pid: int) -> float:
        with contextlib.suppress(OSError):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        return 0.0

    fields = Path(f"/proc/{driver}/stat").read_text().rpartition(")")[2].split()
    cpu = (int(fields[11]) + int(fields[12])) / TICK
    engines = sum(map(megabytes, processes.below(driver, TITLES["engine"])))
    return Mark(ended, seconds, cpu, megabytes(driver), engines)


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(HERE.parents[1]), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}


def print_result(result: Result) -> None:
    print("ended:", ", ".join(f"{n} {status}" for status, n in sorted(result.ended.items())))
    print(f"killed: {result.killed['trial']} trial processes, {result.killed['engine']} engines")
    print(f"lost: {result.lost}   doubled: {result.doubled}")
    print("places still held:", ", ".join(f"{k} {n}" for k, n in result.held.items()) or "unknown")
    print("trials        seconds  driver CPU ms/trial  driver MB  KB/trial  engine MB")
    for a, b in itertools.pairwise(result.marks):
        if num := b.ended - a.ended:
            print(
                f"{a.ended:5} -{b.ended:5} {b.seconds - a.seconds:8.0f}  "
                f"{1000 * (b.cpu - a.cpu) / num:19.1f}  {b.driver:9.0f}  "
                f"{1000 * (b.driver - a.driver) / num:8.1f}  {b.engine:9.0f}"
            )
    for line in result.output.splitlines():
        if line.startswith("failed: "):
            print(line)
    print(f"from the last trial's end to the command's: {result.closing:.1f} s", flush=True)


def extended(source: Path, folder: Path, trials: int) -> None:
    """A journal of so many trials in `folder`, the ones of `source` again and again."""
    events = journal.read(source)
    pattern: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        if "number" in event:
            pattern.setdefault(event["number"], []).append(event)
    head = {k: v for k, v in events[0].items() if k not in ("type", "format", "seq", "time")}
    head["trials"] = trials
    head["member"]["settings"] |= {"name": folder.parent.name, "trials": trials}
    head["member"]["member"] = f"{folder.parent.name}/{folder.name}"
    writer = journal.Journal.create(folder, head)
    for number in range(trials):
        for event in pattern[number % len(pattern)]:
            new = {k: v for k, v in event.items() if k not in ("seq", "time")}
            writer.append(new | {"number": number}, durable=False)
    writer.close()


def restart(folder: Path, trials: int) -> tuple[float, float]:
    """Seconds from `resume` to the first suggestion, and to the end of the 8 trials asked for."""
    [path] = folder.glob(f"sweeps/churn/*/{FILE}")
    target = folder / "sweeps/again" / path.parent.name
    extended(path.parent, target, trials)
    command = [sys.executable, "-m", "sparsetune.cli", "resume", "again", f"trials={trials + 8}"]
    began, first = time.monotonic(), 0.0
    with (folder / "out").open("wb") as out:
        driver = subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=environment()
        )
    try:
        with (target / FILE).open("rb") as file:
            file.seek(0, os.SEEK_END)
            while driver.poll() is None:
                time.sleep(0.02)
                if not first and b'"type":"suggest"' in file.read():
                    first = time.monotonic() - began
    finally:
        if driver.poll() is None:
            driver.terminate()
            driver.wait(60)
    assert driver.returncode == 0, (folder / "out").read_text()
    assert len(journal.load(target).trials) == trials + 8
    return first, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, help="1000, or 5000 with --scale")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", action="store_true", help="many trials, no kills; restart")
    parser.add_argument("--restart", type=int, default=5000, help="trials in the resumed journal")
    parser.add_argument("--words", nargs="*", default=[], help="further key=value for the sweep")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {platform.machine()}; Python {platform.python_version()}")
    words = [f"resources.slots={options.slots}", f"concurrency={options.slots}"]
    words += ["resources.engines=1", "wandb.mode=disabled"]
    if options.scale:
        trials, kills = options.trials or 5000, 0
        words += ["epochs=1", "sampler.name=random", "scheduler.name=none"]
        steps = [100, 500, 1000, 2000]
    else:
        trials, kills = options.trials or 1000, options.kills
        words += ["epochs=4", "sampler.name=random"]
        steps = [40, 100, 300, 1000]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        began = time.monotonic()
        steps = [step for step in steps if step < trials]
        result = sweep(folder, [*words, *options.words], trials, kills, options.seed, steps)
        print(f"{trials} trials, {options.slots} slots: {time.monotonic() - began:.0f} s")
        print_result(result)
        if wrong := result.wrong():
            sys.exit(f"wrong: {'; '.join(wrong)}\n{result.output[-3000:]}")
        if options.scale:
            first, whole = restart(folder, options.restart)
            print(
                f"\nresume of {options.restart} trials: {first:.1f} s to the first new suggestion, "
                f"{whole:.1f} s with 8 more trials"
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drive"]:
        drive(sys.argv[2], sys.argv[3:])
    else:
        main()
