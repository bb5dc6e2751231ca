"""What reaches W&B, with the real client: offline, killed, unreachable, and a loopback server."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
from helpers.logged_out import KEY, nobody  # noqa: F401 - a fixture
from helpers.wandb_files import Run, read_runs, records
from helpers.wandb_server import WandbServer

from sparsetune.sweeps import tracking
from sparsetune.sweeps.tracking import (
    Tracker,
    WandbSettings,
    read_back,
    resolve_mode,
    run_id,
)

MEMBER = "mnist/set@0.05"
CONFIG = {"method": "set", "density": 0.05, "seed": 0, "hp": {"zeta": 0.31}}
CONFIG |= {"optimizer": {"lr": 0.1, "momentum": 0.9}}


def tracker(folder: Path, mode: str = "offline") -> Tracker:
    return Tracker(WandbSettings(mode=mode, tags=["t"]), "5w33p", folder)


def start(tracker: Tracker, number: int = 0) -> None:
    name = f"set-d0.05-zeta0.31-s{number}"
    tracker.start(MEMBER, number, name=name, group="mnist", job_type="set", config=CONFIG)


def log(tracker: Tracker, number: int, epochs: range) -> None:
    for epoch in epochs:
        metrics = {"val/accuracy": epoch / 10, "density/layer/fc1.weight": 0.05}
        tracker.log(MEMBER, number, epoch, metrics)


def replay(tracker: Tracker, number: int = 0, epochs: int = 8) -> None:
    """What the caller does after a restart: all of the trial, from its journal."""
    start(tracker, number)
    log(tracker, number, range(1, epochs + 1))
    tracker.finish(MEMBER, number, "finished", {"best/val/accuracy": epochs / 10})


def steps(run: Run) -> list[int]:
    assert [row["epoch"] for row in run.history] == run.steps
    return run.steps


def test_run_id() -> None:
    ids = [run_id(s, m, n) for s in "ab" for m in ("x/set@0.5", "x/set-0.5") for n in (1, 11)]
    assert len(set(ids)) == 8
    assert run_id("s", MEMBER, 42).startswith("mnist-set-0-05-42-")
    for long in (run_id("s", "Ümläut/" * 30, 123456789), run_id("s", "@", 1), *ids):
        assert len(long) <= 64
        assert set(long) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_mode(WandbSettings()) == "offline"
    assert resolve_mode(WandbSettings(mode="online")) == "offline"  # instead of asking for a key
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine example.org login user password {KEY}\n")
    assert resolve_mode(WandbSettings()) == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://example.org")
    assert resolve_mode(WandbSettings()) == "online"
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert resolve_mode(WandbSettings()) == "online"
    assert resolve_mode(WandbSettings(mode="offline")) == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode(WandbSettings()) == "disabled"
    with pytest.raises(ValueError, match=r"wandb.mode.*'onlin'.*auto, online, offline, disabled"):
        resolve_mode(WandbSettings(mode="onlin"))


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    off = tracker(tmp_path / "w", "disabled")
    replay(off)
    assert off.close() is None
    assert off.problems == []
    assert not (tmp_path / "w").exists()


def test_what_is_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ours = tracker(tmp_path)
    for number, status in enumerate(("finished", "stopped", "diverged", "failed", "")):
        start(ours, number)
        log(ours, number, range(1, 4))
        if status:
            ours.finish(MEMBER, number, status, {"best/val/accuracy": 0.2})
    command = ours.close()
    assert command is not None
    assert command.endswith(f"sync {shlex.quote(str(tmp_path / 'wandb'))}")
    assert ours.problems == []
    assert capfd.readouterr() == ("", "")
    runs = {run.id: run for run in read_runs(tmp_path)}
    assert len(runs) == 5
    expected = {"finished": 0, "stopped": 0, "diverged": 0, "failed": 1, "interrupted": 130}
    for number, (status, exit_code) in enumerate(expected.items()):
        run = runs[run_id("5w33p", MEMBER, number)]
        assert steps(run) == [1, 2, 3]
        assert (run.group, run.job_type, run.project, run.tags) == (
            "mnist",
            "set",
            "sparsetune",
            ["t"],
        )
        assert run.name == f"set-d0.05-zeta0.31-s{number}"
        assert run.config == CONFIG
        assert run.history[1]["val/accuracy"] == 0.2
        assert run.summary["status"] == status
        assert run.exit_code == exit_code
        assert run.summary["val/accuracy"] == 0.3
        assert run.summary["density/layer/fc1.weight"] == 0.05
        interrupted = status == "interrupted"
        assert run.summary.get("best/val/accuracy") == (None if interrupted else 0.2)
        assert ours.recorded(MEMBER, number) == ("" if interrupted else status)

    again = tracker(tmp_path)
    assert again.recorded(MEMBER, 1) == "stopped"
    assert again.recorded(MEMBER, 4) == ""
    replay(again, 4)
    again.close()
    run = next(run for run in read_runs(tmp_path) if run.id == run_id("5w33p", MEMBER, 4))
    assert steps(run) == list(range(1, 9))
    assert run.summary["status"] == "finished"
    assert len(run.files) == 2
    assert run.exit_code == 0


def killed(folder: Path, last: int) -> None:
    """A driver that replays up to epoch `last`, goes on, and is killed soon after it."""
    program = f"""
import sys, time
sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:3]]}
import test_tracking
from pathlib import Path
tracker = test_tracking.tracker(Path(sys.argv[1]))
test_tracking.start(tracker)
test_tracking.log(tracker, 0, range(1, {last}))
while tracker._queue.qsize() or not tracker._open: time.sleep(.01)
for epoch in range({last}, 1000):
    test_tracking.log(tracker, 0, range(epoch, epoch + 1))
    time.sleep(.1)
    print(epoch, flush=True)
"""
    command = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        assert line == b"%d\n" % last, process.stderr.read().decode()


def test_kill(tmp_path: Path) -> None:
    killed(tmp_path, 3)
    (run,) = read_runs(tmp_path)
    assert steps(run)[:3] == [1, 2, 3]  # what was logged a tenth of a second before is there
    first = run.files[0]
    os.truncate(first, first.stat().st_size - 20)  # as if killed amid a write
    killed(tmp_path, 5)
    (run,) = read_runs(tmp_path)
    assert len(run.files) == 2
    assert steps(run)[:5] == [1, 2, 3, 4, 5]
    folder = f"offline-run-20200101_000000-{run.id}"
    empty = tmp_path / "wandb" / folder / f"run-{run.id}.wandb"
    empty.parent.mkdir()
    empty.write_bytes(first.read_bytes()[:7])  # as if killed before anything was written
    (tmp_path / "wandb-recorded.jsonl").write_text('{"id": "a", "status": "fin')
    ours = tracker(tmp_path)
    replay(ours)
    ours.close()
    (run,) = read_runs(tmp_path)
    assert steps(run) == list(range(1, 9))
    assert ours.problems == []
    assert run.summary["status"] == "finished"
    assert run.summary["val/accuracy"] == 0.8
    assert not empty.exists()  # `wandb sync` would stop at it
    assert tracker(tmp_path).recorded(MEMBER, 0) == "finished"


def test_read_back_agrees_with_wandb(tmp_path: Path) -> None:
    ours = tracker(tmp_path)
    start(ours)
    for epoch in range(1, 60):  # several blocks of 32 KiB
        ours.log(MEMBER, 0, epoch, {f"density/layer/{i}": epoch / (i + 3) for i in range(100)})
    ours.close()
    (run,) = read_runs(tmp_path)
    (file,) = run.files
    assert run.steps == list(range(1, 60))
    assert read_back(file) == (59, file.stat().st_size, True)
    content = file.read_bytes()
    assert len(content) > 5 * 32768
    for size in range(len(content) - 1, 8000, -len(content) // 9):
        file.write_bytes(content[:size])
        seen = [record["num"] for record in records(file)]
        history = [record for record in records(file) if record["type"] == "history"]
        step, whole, ended = read_back(file)
        assert step == len(history)
        assert whole <= size
        assert not ended
        file.write_bytes(content[:whole])
        assert [record["num"] for record in records(file)] == seen


def test_server_unreachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    begun = time.monotonic()
    ours = tracker(tmp_path, "online")
    for number in range(3):
        replay(ours, number)
    assert time.monotonic() - begun < 1.0  # the driver does not wait
    command = ours.close()
    assert time.monotonic() - begun < 20.0
    assert command is not None
    assert capfd.readouterr() == ("", "")
    (problem,) = ours.problems
    assert problem.startswith("W&B: not reachable, recording offline")
    assert "\n" not in problem
    runs = [run for run in read_runs(tmp_path) if run.history]
    assert [steps(run) for run in runs] == 3 * [list(range(1, 9))]


def test_one_failure_is_not_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init, bad = wandb.init, run_id("5w33p", MEMBER, 1)

    def failing(**given: Any) -> Any:
        if given["id"] == bad:
            raise RuntimeError("no space\nleft")
        return init(**given)

    monkeypatch.setattr(wandb, "init", failing)
    ours = tracker(tmp_path)
    for number in range(3):
        replay(ours, number)
    ours.close()
    assert ours.problems == ["W&B: a trial's record is incomplete (RuntimeError: no space left)"]
    assert [ours.recorded(MEMBER, number) for number in range(3)] == ["finished", "", "finished"]
    assert len(read_runs(tmp_path)) == 2


def test_full_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver goes on; a trial that lacks an epoch is whole after it is replayed."""
    monkeypatch.setattr(tracking, "QUEUED", 4)
    gate, begin = threading.Event(), Tracker._start

    def slow(self: Tracker, run: str, given: dict[str, Any]) -> None:
        gate.wait()
        begin(self, run, given)

    monkeypatch.setattr(Tracker, "_start", slow)
    ours = tracker(tmp_path)
    began = time.monotonic()
    replay(ours)
    assert time.monotonic() - began < 1.0
    assert "resume completes" in ours.problems[0]
    gate.set()
    while ours._queue.qsize():
        time.sleep(0.01)
    ours._queue.maxsize = 0
    replay(ours)
    ours.close()
    (run,) = read_runs(tmp_path)
    assert steps(run) == list(range(1, 9))
    assert ours.recorded(MEMBER, 0) == "finished"


def test_online_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        ours = tracker(tmp_path, "auto")
        start(ours)
        log(ours, 0, range(1, 5))
        assert ours.close() is None
        assert ours.problems == []
        run = server.runs[run_id("5w33p", MEMBER, 0)]
        assert run.steps == [1, 2, 3, 4]
        assert run.summary["status"] == "interrupted"
        ours = tracker(tmp_path, "auto")
        replay(ours)
        assert ours.close() is None
        assert ours.problems == []
        assert run.steps == list(range(1, 9))
        assert run.exit_code == 0
        assert (run.group, run.job_type) == ("mnist", "set")
        assert run.summary["status"] == "finished"
        assert run.summary["best/val/accuracy"] == 0.8
        wandb.teardown()
    # Rows of one run by two ways would be stored twice: it waits for the server.
    ours = tracker(tmp_path, "offline")
    replay(ours, 0, 9)
    replay(ours, 1)
    ours.close()
    assert "begun online" in ours.problems[0]
    assert [len(run.history) for run in read_runs(tmp_path)] == [8, 8]


@pytest.mark.slow
def test_a_server_that_is_busy_gets_each_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "30")  # tracking's own
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        server.busy = 3
        ours = tracker(tmp_path, "auto")
        begun = time.monotonic()
        for number in range(3):
            replay(ours, number)
        assert time.monotonic() - begun < 1.0  # the driver does not wait
        ours.close()
        assert server.busy == 0
        assert ours.problems == []
        assert [run.steps for run in server.runs.values()] == 3 * [list(range(1, 9))]
        wandb.teardown()


@pytest.mark.slow
def test_a_server_that_goes_away_midway_is_caught_up_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        ours = tracker(tmp_path, "auto")
        start(ours)
        log(ours, 0, range(1, 5))
        deadline = time.monotonic() + 30
        while not server.runs or len(next(iter(server.runs.values())).steps) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.away = True
        log(ours, 0, range(5, 9))
        replay(ours, 1)
        ours.close()
        assert ours.problems
        assert ours.recorded(MEMBER, 0) == ""  # so that a resume replays it
        wandb.teardown()
        server.away = False
        ours = tracker(tmp_path, "auto")
        replay(ours)
        replay(ours, 1)
        ours.close()
        first = server.runs[run_id("5w33p", MEMBER, 0)]
        assert first.steps == list(range(1, 9))
        assert first.summary["status"] == "finished"
        wandb.teardown()


@pytest.mark.slow
def test_sync_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several runs, one of them in three files after two kills: all rows arrive, once."""
    folder = tmp_path / "with a space"
    killed(folder, 3)
    (file,) = read_runs(folder)[0].files
    os.truncate(file, file.stat().st_size - 20)
    killed(folder, 5)
    ours = tracker(folder)
    for number in range(3):
        replay(ours, number)
    command = ours.close()
    assert command is not None
    with WandbServer() as server:
        env = os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=env, capture_output=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert len(server.runs) == 3
        for run in server.runs.values():
            assert run.steps == list(range(1, 9))
            assert run.exit_code == 0
            assert run.summary["status"] == "finished"
            assert run.group == "mnist"
            assert run.config["hp"] == {"value": {"zeta": 0.31}}
    assert tracker(folder).close() is None  # nothing left to upload
