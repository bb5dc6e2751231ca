"""Journals, locks and whole sweeps on an object store, and storage that is full or away."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import json
import os
import pickle
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click.testing
import optuna
import pytest
from helpers.command import TOY, check_complete, reports, run, start
from helpers.events import end, report, suggest
from helpers.s3_server import BUCKET, S3Server
from helpers.told_sweep import EPOCHS, told
from helpers.wandb_files import read_runs

import sparsetune
from sparsetune.cli import main
from sparsetune.cluster.fleet import ClusterError
from sparsetune.cluster.watch import Watch
from sparsetune.engine import actor, places
from sparsetune.reports.dashboard import Copy
from sparsetune.settings import TrialSettings, to_dict
from sparsetune.store import journal, lines, lock, paths
from sparsetune.store.journal import Journal, load, read
from sparsetune.store.layout import member_folders, sweeps
from sparsetune.store.lines import FILE, JournalError, exists
from sparsetune.store.lock import SweepHeld, SweepLock, holder
from sparsetune.store.paths import S3Path, StorageAway, insist, place, write_whole
from sparsetune.sweeps import run as sweep
from sparsetune.sweeps.create import Writable, note_driver
from sparsetune.training import checkpoint


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    server.make_bucket()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        paths._s3.cache_clear()
        yield server
    paths._s3.cache_clear()
    server.close()


@pytest.fixture
def folder(server: S3Server) -> Path:
    return place(f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.3)


# Paths --------------------------------------------------------------------------------------------


def test_a_url_is_a_path(folder: Path) -> None:
    path = folder / "set@0.05" / "trials" / "e0001.pt"
    assert str(path) == f"s3://{BUCKET}/{folder.name}/set@0.05/trials/e0001.pt"
    assert (path.name, path.parent.name, path.suffix) == ("e0001.pt", "trials", ".pt")
    assert place(str(path)) == path == pickle.loads(pickle.dumps(path)) == path.resolve()
    assert isinstance(path.parent, S3Path)
    assert hash(place(str(path))) == hash(path)
    assert not isinstance(place("/tmp/x"), S3Path)
    assert not folder.exists()
    assert list(folder.iterdir()) == []
    with write_whole(path) as file:
        file.write(b"abc")
    (folder / "other").write_text("öther")
    assert path.read_bytes() == path.open("rb").read() == b"abc"
    assert folder.exists()
    assert folder.is_dir()
    assert not path.is_dir()
    assert sorted(each.name for each in folder.iterdir()) == ["other", "set@0.05"]
    assert (folder / "other").read_text() == "öther"
    path.unlink()
    path.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        path.read_bytes()
    with pytest.raises(AssertionError):  # nothing falls back to the local disk
        path.stat()
    with pytest.raises(StorageAway, match=r"^s3://nowhere/x: .*NO_SUCH_BUCKET"):
        place("s3://nowhere/x").write_bytes(b"")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in (b"first", b"second"):
        with write_whole(path) as file:
            file.write(text)
    with pytest.raises(ZeroDivisionError), write_whole(path) as file:
        file.write(b"third")
        1 / 0  # noqa: B018
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


# Journals on an object store ----------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "journal").iterdir())


def written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A journal of two drivers in small segments; their names."""
    monkeypatch.setattr(lines, "SEGMENT_BYTES", 900)
    Journal.create(folder, {"trials": 3, "order": 0}).close()
    for generation in (1, 2):
        with contextlib.closing(Journal.open(folder)) as one:
            number = generation - 1
            one.append({"type": "driver", "generation": generation})
            one.append(suggest(number))
            for epoch in (1, 2, 3):
                one.append(report(number, epoch), durable=False)
            one.append(end(number))
    return names(folder)


def test_segments_hold_what_was_appended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = written(folder, monkeypatch)
    assert found[0] == "0000-0000.jsonl"
    assert {name.partition("-")[0] for name in found} == {"0000", "0001", "0002"}
    assert len(found) == 5
    member = load(folder)
    assert [trial.status for trial in member.trials.values()] == ["finished", "finished"]
    assert (member.generation, journal.header(folder)["trials"]) == (2, 3)
    events = read(folder)
    assert [event["seq"] for event in events] == list(range(13))
    openings = [event for event in events if "accepts" in event]
    assert [event["generation"] for event in openings] == [1, 2]
    sizes = {name: len((folder / "journal" / name).read_bytes()) for name in found}
    older = [[name, sizes[name]] for name in found if name < "0002"]
    assert openings[1]["accepts"] == older
    assert max(sizes.values()) <= 900
    with pytest.raises(JournalError, match="exists already"):
        Journal.create(folder, {"trials": 1})


def test_suggestions_are_there_at_once_and_reports_after_a_sync(folder: Path) -> None:
    Journal.create(folder, {"trials": 3}).close()
    one = Journal.open(folder)
    one.append(suggest(0))
    assert len(load(folder).trials) == 1
    one.append(report(0, 1), durable=False)
    one.sync(older_than=1.0)
    assert load(folder).trials[0].reports == []
    one._synced -= 1.0
    one.sync(older_than=1.0)
    assert len(load(folder).trials[0].reports) == 1
    one.append(report(0, 2), durable=False)
    one.close()
    assert repr(load(folder)) == repr(one.record)
    with pytest.raises(JournalError, match="no journal here"):
        load(folder / "nowhere")


def test_an_older_driver_that_goes_on_writing_is_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "SEGMENT_BYTES", 900)
    Journal.create(folder, {"trials": 3}).close()
    old, new = Journal.open(folder), None
    old.append(suggest(0))
    new = Journal.open(folder)
    new.append({"type": "driver", "generation": 2})
    new.append(report(0, 1))
    for epoch in range(1, 9):  # into the segment that was accepted, and then into another one
        old.append(report(0, epoch))
    assert names(folder)[1:3] == ["0001-0000.jsonl", "0001-0001.jsonl"]
    assert repr(load(folder)) == repr(new.record)
    assert len(new.record.trials[0].reports) == 1
    new.close()
    third = Journal.open(folder)
    third.append(report(0, 2))
    assert [each.epoch for each in load(folder).trials[0].reports] == [1, 2]
    assert "0001-0001.jsonl" not in str(read(folder)[-1]["accepts"])


def test_damaged_and_missing_segments_are_refused_with_file_and_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = written(folder, monkeypatch)
    place = folder / "journal"
    for name in found[:-1]:
        whole = (place / name).read_bytes()
        (place / name).unlink()
        with pytest.raises(JournalError, match=rf"{name}:1: the segment is missing"):
            Journal.open(folder)
        (place / name).write_bytes(whole.replace(b'"time"', b'"tyme"', 1))
        with pytest.raises(JournalError, match=rf"{name}:1: the checksum does not fit"):
            load(folder)
        (place / name).write_bytes(whole[:-3])
        with pytest.raises(JournalError, match=rf"{name}:\d+: the (line is cut|segment ends)"):
            load(folder)
        (place / name).write_bytes(whole)
    last = (place / found[-1]).read_bytes()
    (place / found[-1]).write_bytes(last[:-3])  # nothing follows it: torn, and dropped
    assert len(read(folder)) == 12
    unknown = lines.encode({"seq": 0, "type": "sweep", "format": 99, "trials": 1})
    (folder / "x/journal/0000-0000.jsonl").write_bytes(unknown)
    with pytest.raises(JournalError, match=r"0000-0000.jsonl:1: journal format 99"):
        load(folder / "x")


@pytest.mark.parametrize("kind", ["objects", "file"])
def test_storage_that_is_away_costs_no_event_and_doubles_none(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue("folder") if kind == "objects" else tmp_path / "member"
    monkeypatch.setattr(lines, "SEGMENT_BYTES", 900)
    Journal.create(folder, {"trials": 9}).close()
    one = Journal.open(folder)
    kinds = (S3Path, "write_bytes") if kind == "objects" else (os, "fsync")
    real, fails, waited = getattr(*kinds), [0], []

    def flaky(*args: Any) -> Any:
        if fails[0]:
            fails[0] -= 1
            if fails[0] % 2:
                real(*args)  # it arrived, and only the answer did not
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(*kinds, flaky)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match="No space"):
        fails[0] = 1
        one.append(suggest(0))
    assert len(one.record.trials) == 0
    one.trouble = lambda error, seconds: waited.append(error)
    for number in range(3):
        fails[0] = 3
        one.append(suggest(number))
        for epoch in (1, 2):
            fails[0] = 3
            one.append(report(number, epoch), durable=epoch == 2)
    assert len(waited) >= 18
    one.close()
    assert repr(load(folder)) == repr(one.record)
    assert [event["seq"] for event in read(folder)] == list(range(10))


def test_members_are_found_once_all_are_there(folder: Path) -> None:
    Journal.create(folder / "s" / "second", {"trials": 3, "order": 1}).close()
    assert sweeps(folder) == ["s"]
    with pytest.raises(ValueError, match=r"creating 's' in .* was cut short"):
        member_folders(folder, "s")
    Journal.create(folder / "s" / "third", {"trials": 3, "order": 0}).close()
    assert [path.name for path in member_folders(folder, "s")] == ["third", "second"]
    assert member_folders(folder, "s/second") == [folder / "s" / "second"]
    with pytest.raises(ValueError, match=f"no sweep 't' in {folder}; there are: s"):
        member_folders(folder, "t")


# The lock -----------------------------------------------------------------------------------------


def test_one_driver_at_a_time_and_the_others_are_told_who(folder: Path, quick: None) -> None:
    assert holder(folder) is None
    with SweepLock(folder) as first:
        found = holder(folder)
        assert found is not None
        assert found.pid == os.getpid()
        who = rf"held by process {os.getpid()} on {found.host} since"
        with pytest.raises(SweepHeld, match=who):
            SweepLock(folder)
        first.check()
    assert holder(folder) is None
    SweepLock(folder).close()


def test_two_that_start_at_the_same_moment(folder: Path, quick: None) -> None:
    for attempt in range(4):
        barrier, got, refused = threading.Barrier(3), [], []

        def contend(folder: Path = folder / str(attempt)) -> None:
            barrier.wait()  # noqa: B023
            try:
                got.append(SweepLock(folder))  # noqa: B023
            except SweepHeld as error:
                refused.append(str(error))  # noqa: B023

        threads = [threading.Thread(target=contend) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(got), len(refused)) == (1, 2)
        got[0].close()


def test_a_silent_driver_is_replaced_and_stops(
    folder: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal.create(folder / "set", {"trials": 3}).close()
    first = SweepLock(folder, heartbeat_seconds=60)
    old = Journal.open(folder / "set")
    old.guard = first.check
    old.append(suggest(0))
    monkeypatch.setattr(lock, "_machine", lambda: "another host")
    with pytest.raises(SweepHeld):
        SweepLock(folder)
    silent = dataclasses.replace(first._me, heartbeat=time.time() - 61)
    first._lock._put(silent)
    second = SweepLock(folder)
    first._me.heartbeat = silent.heartbeat  # it slept; now it wakes up and reports
    before = read(folder / "set")
    for _ in range(2):
        with pytest.raises(SweepHeld, match="has taken the sweep over"):
            old.append(report(0, 1))
    old.close()
    first.close()
    assert read(folder / "set") == before
    found = holder(folder)
    assert found is not None
    assert found.token == second._me.token
    second.check()
    second.close()
    assert holder(folder) is None


def test_a_driver_that_sleeps_on_a_shared_folder_stops_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal.create(tmp_path / "set", {"trials": 3}).close()
    first = SweepLock(tmp_path, heartbeat_seconds=60)
    old = Journal.open(tmp_path / "set")
    old.guard = first.check
    old.append(suggest(0))
    monkeypatch.setattr(lock, "_machine", lambda: "another host")
    silent = dataclasses.replace(first._me, heartbeat=time.time() - 61)
    first._lock._put(silent)
    first._me.heartbeat = silent.heartbeat
    with SweepLock(tmp_path):
        before = (tmp_path / "set" / FILE).read_bytes()
        with pytest.raises(SweepHeld, match="has taken the sweep over"):
            old.append(report(0, 1))
        old.close()
        assert (tmp_path / "set" / FILE).read_bytes() == before
        first.close()


def test_one_that_slept_alone_goes_on(tmp_path: Path) -> None:
    with SweepLock(tmp_path, heartbeat_seconds=60) as first:
        first._me.heartbeat = time.time() - 100
        first.check()
        assert time.time() - first._me.heartbeat < 10


# Patience -----------------------------------------------------------------------------------------


class Notes:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def update(self) -> None:
        pass


def test_a_sweep_waits_for_its_storage_and_gives_up_at_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    progress: Any = Notes()
    watch = Watch(lambda: None, progress)
    back_at = [20.0]

    def action() -> str:
        if now[0] < back_at[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return "done"

    assert insist(action, watch.trouble) == "done"
    watch.tick()
    assert progress.notes == ["waiting for storage (No space left on device)", "storage is back"]
    back_at[0] = 10_000.0
    with pytest.raises(StorageAway, match=r"away for 30. seconds .No space left"):
        insist(action, watch.trouble)
    watch.leaving_since = now[0] - 30  # Ctrl-C, and the patience after it is over
    with pytest.raises(KeyboardInterrupt):
        insist(action, watch.trouble)


@pytest.mark.parametrize("comes_back", [True, False])
def test_checkpoints_that_cannot_be_written_fail_no_trial(
    comes_back: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading them waits; writing them waits, and is then left out, but for the last one."""
    settings = TrialSettings(method="set", density=0.5, epochs=3)
    settings.data.limit, settings.model.widths = 200, [16]
    monkeypatch.setattr(places, "SAVE_SECONDS", 0.4)
    monkeypatch.setattr(places, "AWAY_SECONDS", 60.0 if comes_back else 0.0)
    engine = actor.Engine("cpu", "solo", 4, 1, 0.5, str(tmp_path))
    newest, save, read, written = checkpoint.newest, checkpoint.save, [], []

    def read_late(folder: Path) -> Any:
        read.append(folder)
        if len(read) < 4:
            raise OSError(errno.EIO, "Input/output error")
        return newest(folder)

    def write_late(folder: Path, snapshot: Any, records: Any) -> Any:
        written.append(len(records))
        if not comes_back or written.count(3) < 5:
            raise OSError(errno.EIO, "Input/output error")
        return save(folder, snapshot, records)

    monkeypatch.setattr(checkpoint, "newest", read_late)
    monkeypatch.setattr(checkpoint, "save", write_late)

    async def trial() -> list[float]:
        token = await engine.attach("x", to_dict(settings), str(tmp_path / "x"), 1, [1], False)
        records: list[Any] = []
        while len(records) < 3:
            new = await engine.after("x", token, len(records))
            records += new
            assert not new or len(records) < 3 or not comes_back or written.count(3) == 5
        await engine.detach("x", token)
        return [record["epoch"] for record in records]

    assert asyncio.run(trial()) == [1, 2, 3]
    assert {1, 2, 3} == set(written)
    assert checkpoint.saved_epochs(tmp_path / "x") == [3] * comes_back
    assert not comes_back or len(newest(tmp_path / "x")[1]) == 3


# Sweeps -------------------------------------------------------------------------------------------


def test_storage_that_cannot_be_used_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    words = ["sweep", "set", "name=x", *TOY]
    done = run(tmp_path, *words, "storage=gs://bucket/x", check=2)
    assert "give a folder or s3://BUCKET/PATH" in done.stderr
    done = run(tmp_path, *words, "storage=s3://bucket/x", check=2)
    assert "storage: s3://bucket/x cannot be written to" in done.stderr
    done = run(tmp_path, "status", "storage=s3://bucket/x", check=2)
    assert "sparsetune: s3://bucket/x: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["objects", "folder"])
def test_a_sweep_whose_cluster_cannot_be_used_has_not_been(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = request.getfixturevalue("folder") if kind == "objects" else tmp_path
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.3)
    words = ["sweep", "set", "static", "density=0.2", "name=x", f"storage={storage}", *TOY]
    done: list[Any] = []

    def run(members: list[Writable]) -> dict[str, Any]:
        done.append(note_driver(members))
        if len(done) == 3:
            members[0].journal.append(suggest(0))
        raise ClusterError("the cluster's nodes are not alike")

    monkeypatch.setattr(sweep, "run", run)
    for _ in range(2):
        said = click.testing.CliRunner().invoke(main, words)
        assert (said.exit_code, "Nothing was begun; the same" in said.output) == (2, True)
        assert sweeps(storage) == []
        assert not (storage / "x").exists()
    said = click.testing.CliRunner().invoke(main, words)
    assert (said.exit_code, "Go on by: sparsetune resume x" in said.output) == (2, True)
    assert sweeps(storage) == ["x"]
    assert [path.name for path in storage.iterdir()] == ["x"]


def wait_for(process: subprocess.Popen[bytes], there: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, "the sweep is over"
        assert time.monotonic() < deadline
        time.sleep(0.1)


Begin = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """`test_sweep.start`, and what it started ends with the test."""
    begun: list[subprocess.Popen[bytes]] = []

    def begin(*given: Any) -> subprocess.Popen[bytes]:
        begun.append(start(*given))
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_sweep_on_an_object_store_is_killed_and_resumed(
    folder: Path, tmp_path: Path, server: S3Server, begin: Begin
) -> None:
    """kill -9 of the driver, the server away for a while, then complete; seen from elsewhere."""
    words = ["sweep", "set", "static", "density=0.2", "name=cut", "trials=4", "epochs=30"]
    words += TOY[1:]
    process = begin(tmp_path, *words, f"storage={folder}", "scheduler.name=none")
    members = [folder / "cut" / name for name in ("set@0.2", "static@0.2")]

    def epochs() -> int:
        found = [load(one) for one in members if exists(one)]
        return sum(len(trial.reports) for one in found for trial in one.trials.values())

    wait_for(process, lambda: epochs() >= 10)
    refused = run(tmp_path, "resume", "cut", f"storage={folder}", check=2)
    assert f"held by process {process.pid} on" in refused.stderr
    process.kill()
    process.wait()
    (tmp_path / "elsewhere").mkdir()
    before = epochs()
    process = begin(tmp_path / "elsewhere", "resume", "cut", f"storage={folder}")
    wait_for(process, lambda: epochs() >= before + 10)
    os.kill(server.process.pid, signal.SIGSTOP)
    time.sleep(8)
    os.kill(server.process.pid, signal.SIGCONT)
    assert process.wait(200) == 0, (tmp_path / "elsewhere/out").read_text()
    for one in members:
        check_complete(one, trials=4, epochs=30)
    status = json.loads(run(tmp_path, "status", "cut", f"storage={folder}", "--json").stdout)
    assert status["state"] == "finished"
    runs = read_runs(next((tmp_path / "elsewhere/wandb").glob("cut-*")))
    assert len(runs) == 8  # all, though some ended before this driver began
    assert all(one.steps == list(range(1, 31)) for one in runs)
    taken = run(tmp_path, *words, f"storage={folder}", check=2)
    assert f"sparsetune resume cut storage={folder}" in taken.stderr


@pytest.mark.slow
def test_a_driver_whose_sweep_was_taken_over_stops(tmp_path: Path, begin: Begin) -> None:
    process = begin(tmp_path, "sweep", "set", "name=two", "trials=40", "epochs=400", *TOY[1:])
    wait_for(process, lambda: reports(tmp_path) >= 5)
    path = tmp_path / "sweeps/two" / lock.LOCK_FILE
    other = json.loads(path.read_text()) | {"token": "other", "host": "elsewhere", "pid": 7}
    path.write_text(json.dumps(other).ljust(1023))
    assert process.wait(60) == 1, (tmp_path / "out").read_text()
    said = (tmp_path / "out").read_text()
    assert "held by process 7 on elsewhere since" in said
    assert "Traceback" not in said
    assert json.loads(path.read_text())["token"] == "other"


@pytest.mark.slow
def test_a_full_disk_stops_no_trial(tmp_path: Path, begin: Begin) -> None:
    """A disk of 3 MB is filled while a sweep runs, and has room again some seconds later."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "sparsetune-test", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        words = ["sweep", "set", "static", "density=0.2", "name=full", "trials=4", "epochs=40"]
        words += [*TOY[1:-1], "wandb.mode=disabled", "scheduler.name=none", f"storage={disk}"]
        process = begin(tmp_path, *words)
        wait_for(process, lambda: reports(disk) >= 20)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(b"\0" * 4096):
                pass
        wait_for(process, lambda: "waiting for storage" in (tmp_path / "out").read_text())
        time.sleep(3)
        (disk / "filler").unlink()
        assert process.wait(200) == 0, (tmp_path / "out").read_text()
        said = (tmp_path / "out").read_text()
        assert "waiting for storage (No space left on device)" in said
        assert "storage is back" in said
        for member in ("set@0.2", "static@0.2"):
            check_complete(disk / "full" / member, trials=4, epochs=40)
            trials = load(disk / "full" / member).trials.values()
            assert {trial.attempts for trial in trials} == {1}
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_sweep_on_s3_is_loaded(folder: Path, quick: None) -> None:
    path = told(folder, ["static"], "density=0.2", "trials=2", "name=a")
    frame = sparsetune.load("a", str(folder))
    assert list(frame["epoch"]) == [*range(1, EPOCHS + 1)] * 2
    memory = optuna.storages.InMemoryStorage()
    Copy(path / "static@0.2", memory).update()
    [study] = memory.get_all_studies()
    assert len(memory.get_all_trials(study._study_id)) == 2
