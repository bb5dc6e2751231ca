"""Sweeps whose processes are killed at random moments, and whether anything was lost.

`python scripts/chaos.py --data FOLDER [--kills 30] [--sweeps 6] [--seed 0] [--cluster 2]`: sweeps
on MNIST (FOLDER holds its parquet files), several members each, packed, ASHA, offline W&B. While
one runs, its driver, an engine, a trial's process or a worker node is killed with SIGKILL; a dead
driver is followed by `sparsetune resume`. The last `--cluster` sweeps run on a cluster of three
node processes on this machine, where a killed node is replaced by a new one. Then the sweep's files
are read: trials lost or doubled, gaps, W&B's runs, whether ASHA would decide the same again. And at
each kill: how many epochs that were reported must be trained again, against `checkpoint.every`.

Prints a table; the exit status is 1 where anything is wrong. With a cluster all of it runs in a
process and network namespace, where there is nothing but loopback; what it started ends with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from helpers import local_cluster, processes  # noqa: E402
from helpers.wandb_files import read_runs  # noqa: E402

from sparsetune.search.scheduler import Asha, Rungs  # noqa: E402
from sparsetune.search.study import MemberStudy  # noqa: E402
from sparsetune.space.member import Member, scheduling  # noqa: E402
from sparsetune.store import journal  # noqa: E402
from sparsetune.store.layout import trial_folder  # noqa: E402
from sparsetune.store.lines import FILE, JournalError  # noqa: E402
from sparsetune.training import checkpoint  # noqa: E402

TITLES = {"engine": "ray::EngineActor", "trial": "ray::ImplicitFunc"}
WAIT_SECONDS = (1.0, 12.0)  # between the first report after a start or a kill, and the next kill
DEADLINE_SECONDS = 600.0  # for one sweep to end after its last kill


@dataclass
class Outcome:
    name: str
    every: int
    kills: dict[str, int] = field(default_factory=dict)
    repeated: int = 0  # epochs at most that one trial had reported and had to train again
    seconds: float = 0.0
    trials: int = 0
    wrong: list[str] = field(default_factory=list)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Cluster:
    """A head and two workers on this machine, each with a core of its own."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as Nodes

        self._nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1})
        self._workers = [self._nodes.add_node(num_cpus=1) for _ in range(2)]
        self.address = self._nodes.address

    def lose_a_node(self, rng: random.Random) -> None:
        """One dies without a word, another joins."""
        lost = self._workers.pop(rng.randrange(len(self._workers)))
        self._nodes.remove_node(lost, allow_graceful=False)
        self._workers.append(self._nodes.add_node(num_cpus=1))

    def close(self) -> None:
        for node in self._nodes.list_all_nodes():  # gently it would take half a minute each
            self._nodes.remove_node(node, allow_graceful=False)


class Chaos:
    """One sweep, killed so often."""

    def __init__(self, folder: Path, name: str, options: argparse.Namespace, seed: int) -> None:
        self.rng = random.Random(seed)
        self.folder, self.name = folder, name
        self.outcome = Outcome(name, every=1 + seed % 2)
        self.cluster: Cluster | None = None
        spaces = [["set", "dsr"], ["set", "static", "rigl"], ["sm", "dst"]][seed % 3]
        self.words = [
            "sweep", *spaces, "density=0.1", f"name={name}", f"trials={options.trials}",
            f"epochs={options.epochs}", f"seed={seed}", f"checkpoint.every={self.outcome.every}",
            "data.name=mnist", f"data.path={options.data}", f"data.limit={options.limit}",
            "model.name=lenet300100", "wandb.mode=offline", "scheduler.name=asha",
        ]  # fmt: skip
        self.driver: subprocess.Popen[bytes] | None = None

    @property
    def members(self) -> list[Path]:
        return sorted(path.parent for path in (self.folder / "sweeps").glob("*/*/journal.jsonl"))

    def start(self) -> None:
        words = ["resume", self.name] if self.members else list(self.words)
        if self.cluster is not None:
            words.append(f"ray.address={self.cluster.address}")
        self.driver = subprocess.Popen(
            [sys.executable, "-m", "sparsetune.cli", *words],
            cwd=self.folder,
            stdout=(self.folder / "out.txt").open("ab"),
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        )

    def reports(self) -> int:
        return sum(
            path.read_bytes().count(b'"type":"report"')
            for path in (self.folder / "sweeps").glob("*/*/journal.jsonl")
        )

    def running(self) -> bool:
        assert self.driver is not None
        return self.driver.poll() is None

    def wait_for_report(self) -> None:
        before, deadline = self.reports(), time.monotonic() + 180
        while self.running() and self.reports() == before and time.monotonic() < deadline:
            time.sleep(0.1)

    def kill_one(self) -> bool:
        """Kills something once the sweep is under way; False where it was over before that."""
        self.wait_for_report()
        until = time.monotonic() + self.rng.uniform(*WAIT_SECONDS)
        while self.running() and time.monotonic() < until:
            time.sleep(0.05)
        if not self.running():
            return False
        assert self.driver is not None
        kinds = ["driver", "engine", "trial"] + (["node"] if self.cluster is not None else [])
        kind = self.rng.choice(kinds)
        if kind == "driver":
            left = processes.below(self.driver.pid)
            kill(self.driver.pid)
            self.driver.wait()
            time.sleep(2.0)  # Ray's processes follow; what does not is ended here
            for pid in left:
                kill(pid)
        elif kind == "node":
            assert self.cluster is not None
            self.cluster.lose_a_node(self.rng)
        else:
            pids = processes.below(os.getpid(), TITLES[kind])
            if not pids:
                return True
            kill(self.rng.choice(pids))
        self.outcome.kills[kind] = self.outcome.kills.get(kind, 0) + 1
        if kind != "trial":
            self.note_repeated()
        if kind == "driver":
            self.start()
        return True

    def note_repeated(self) -> None:
        """What has been reported of a running trial and is in no checkpoint is trained again."""
        for member in self.members:
            for trial in journal.load(member).trials.values():
                if trial.status == "running":
                    saved = checkpoint.saved_epochs(trial_folder(member, trial.number))
                    lost = len(trial.reports) - max(saved, default=0)
                    self.outcome.repeated = max(self.outcome.repeated, lost)

    def finish(self) -> None:
        """Lets the sweep end."""
        assert self.driver is not None
        try:
            status = self.driver.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            self.outcome.wrong.append(f"did not end in {DEADLINE_SECONDS:.0f} s")
        else:
            if status:
                self.outcome.wrong.append(f"exit status {status}")

    def check(self, trials: int) -> None:
        """Reads what the sweep has left behind."""
        wrong, num_trials = self.outcome.wrong, 0
        for member in self.members:
            try:
                events, record = journal.read(member), journal.load(member)  # refuses gaps
            except JournalError as error:
                wrong.append(str(error))
                continue
            name = member.name
            num_trials += len(record.trials)
            if len(record.trials) != trials:
                wrong.append(f"{name}: {len(record.trials)} trials of {trials}")
            ends = [event["number"] for event in events if event["type"] == "end"]
            if sorted(ends) != list(range(trials)):
                wrong.append(f"{name}: ends {sorted(ends)}")
            for trial in record.trials.values():
                if trial.status == "failed":
                    wrong.append(f"{name} trial {trial.number} failed: {trial.error}")
            wrong += self.check_decisions(member)
        self.outcome.trials = num_trials
        self.check_wandb()
        if self.outcome.repeated > self.outcome.every:
            wrong.append(f"{self.outcome.repeated} epochs repeated, every {self.outcome.every}")

    def check_decisions(self, folder: Path) -> list[str]:
        """ASHA is asked again from the beginning, on a copy of the journal."""
        with tempfile.TemporaryDirectory() as copy:
            shutil.copy(folder / FILE, copy)
            opened = journal.Journal.open(copy)
            member = Member.from_header(opened.record.header["member"])
            stopping = scheduling([member])
            search = MemberStudy(member, opened, member.settings.seed)
            if stopping.name != "asha":
                return []
            asha = Asha(stopping.grace, stopping.reduction)
            found = Rungs(search, member.settings.epochs, asha).replay()
            opened.close()
            return found

    def check_wandb(self) -> None:
        wrong = self.outcome.wrong
        expected = {
            (member.name, trial.number): len(trial.reports)
            for member in self.members
            for trial in journal.load(member).trials.values()
        }
        runs = read_runs(self.folder / "sweeps" / self.name)
        if len(runs) != len(expected):
            wrong.append(f"{len(runs)} W&B runs of {len(expected)} trials")
        lengths = sorted(expected.values())
        if sorted(len(run.steps) for run in runs) != lengths:
            wrong.append("W&B's runs have other lengths than the trials")
        wrong += [
            f"W&B run {run.id}: steps {run.steps}"
            for run in runs
            if run.steps != list(range(1, len(run.steps) + 1))
        ]

    def close(self) -> None:
        if self.driver is not None and self.running():
            left = processes.below(self.driver.pid)
            for pid in [self.driver.pid, *left]:
                kill(pid)
            self.driver.wait()
        if self.cluster is not None:
            self.cluster.close()


def one_sweep(
    number: int, kills: int, on_cluster: bool, options: argparse.Namespace
) -> tuple[Outcome, Path]:
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    chaos = Chaos(folder, f"chaos{number}", options, options.seed + number)
    began = time.monotonic()
    try:
        if on_cluster:
            chaos.cluster = Cluster()
        chaos.start()
        while sum(chaos.outcome.kills.values()) < kills and chaos.kill_one():
            pass
        chaos.finish()
        chaos.check(options.trials)
    finally:
        chaos.close()
    chaos.outcome.seconds = time.monotonic() - began
    return chaos.outcome, folder


def row(outcome: Outcome, where: str) -> str:
    kills = " ".join(f"{number} {kind}" for kind, number in sorted(outcome.kills.items()))
    state = "as it should be" if not outcome.wrong else "; ".join(outcome.wrong)
    return (
        f"{outcome.name:8} {where:8} {outcome.trials:6} {kills:38} {outcome.repeated:8} "
        f"{outcome.every:5} {outcome.seconds:6.0f}  {state}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of MNIST's parquet files")
    parser.add_argument("--kills", type=int, default=30, help="in all")
    parser.add_argument("--sweeps", type=int, default=6, help="at least")
    parser.add_argument("--cluster", type=int, default=2, help="of them, on three nodes")
    parser.add_argument("--trials", type=int, default=12, help="of each member")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--limit", type=int, default=0, help="training images; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="a JSON object per sweep")
    options = parser.parse_args()
    options.data = str(Path(options.data).resolve())
    if options.cluster and "SPARSETUNE_CHAOS" not in os.environ:
        if not local_cluster.permitted():
            parser.error("--cluster needs namespaces (unshare), which are not permitted here")
        os.environ["SPARSETUNE_CHAOS"] = "inside"
        local_cluster.enter(Path(__file__).resolve(), *sys.argv[1:])
    if not options.json:
        print(
            f"{'sweep':8} {'where':8} {'trials':>6} {'kills':38} {'repeated':>8} {'every':>5} "
            f"{'s':>6}",
            flush=True,
        )
    done, number, bad = 0, 0, False
    while done < options.kills or number < options.sweeps:
        share = -(-(options.kills - done) // max(1, options.sweeps - number))
        on_cluster = number >= options.sweeps - options.cluster
        outcome, folder = one_sweep(number, share, on_cluster, options)
        done, number = done + sum(outcome.kills.values()), number + 1
        if outcome.wrong:
            bad = True
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
        where = "cluster" if on_cluster else "here"
        shown = (
            json.dumps(vars(outcome) | {"where": where}) if options.json else row(outcome, where)
        )
        print(shown, flush=True)
    print(f"{done} kills, {number} sweeps: {'SOMETHING IS WRONG' if bad else 'nothing lost'}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
