"""The journal: what is written is read again, what is broken is refused or, at the end, dropped."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from helpers.events import end, report, suggest

from sparsetune.store import lock as lock_module
from sparsetune.store.journal import Journal, Report, load, read
from sparsetune.store.lines import FILE, JournalError
from sparsetune.store.lock import SweepHeld, SweepLock, holder


def written(folder: Path) -> Path:
    """A journal of six events: the sweep, trial 0 with three reports, and its end."""
    journal = Journal.create(folder, {"trials": 3, "config": {"method": "set"}})
    journal.append(suggest(0))
    for epoch in (1, 2, 3):
        journal.append(report(0, epoch), durable=False)
    journal.append(end(0))
    journal.close()
    return folder / FILE


def line(event: dict[str, Any]) -> bytes:
    text = json.dumps(event).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def test_what_is_appended_is_what_is_read(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "set@0.05", {"trials": 3, "config": {"lr": 0.1}})
    journal.append({"type": "driver", "generation": 1, "pid": 1, "host": "here", "versions": {}})
    journal.append(suggest(0))
    journal.append(suggest(1, origin="start:paper", fixed={"hp.zeta": 0.9}, in_study=False))
    journal.append(report(1, 1), durable=False)
    journal.append(report(0, 1), durable=False)
    journal.append({**report(1, 2), "metrics": {"val/loss": float("nan")}}, durable=False)
    journal.append(end(1, "failed", attempt=3, error="MemoryError"))
    journal.append({"type": "extend", "trials": 5})
    # Readers need not wait for the writer to close, nor for reports to reach the disk.
    member = load(tmp_path / "set@0.05")
    assert repr(member) == repr(journal.record)  # repr, because nan is not nan
    journal.close()

    assert member.header["config"] == {"lr": 0.1}
    assert (member.asked, member.generation) == (5, 1)
    assert member.order == [(1, 1), (0, 1), (1, 2)]
    first, second = member.trials[0], member.trials[1]
    assert first.status == "running"
    assert first.params == {"hp.zeta": 0.1 + 0.2, "schedule.milestones": [0.5, 0.75]}
    assert first.reports == [Report(1, {"epoch": 1.0, "val/accuracy": 0.6}, "CONTINUE")]
    assert (second.status, second.attempts, second.error) == ("failed", 3, "MemoryError")
    assert (second.origin, second.fixed, second.in_study) == (
        "start:paper",
        {"hp.zeta": 0.9},
        False,
    )
    events = read(tmp_path / "set@0.05")
    assert [event["seq"] for event in events] == list(range(9))
    assert all(abs(event["time"] - time.time()) < 60 for event in events)


def test_a_failed_trial_is_open_again_and_a_member_described_anew(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, {"trials": 1, "member": {"space": "narrow"}})
    journal.append(suggest(0))
    journal.append(report(0, 1))
    journal.append(end(0, "failed", attempt=3, error="OSError"))
    journal.append({"type": "retry", "number": 0})
    trial = journal.record.trials[0]
    assert (trial.status, trial.attempts, trial.error, trial.ended) == ("running", 1, None, None)
    journal.append(report(0, 2))
    journal.append(end(0))
    assert not journal.record.widened
    journal.append({"type": "extend", "trials": 1, "member": {"space": "wide"}})
    journal.close()
    member = load(tmp_path)
    assert (member.trials[0].status, member.trials[0].failures) == ("finished", ["OSError"])
    assert member.order == [(0, 1), (0, 2)]
    assert (member.header["member"], member.widened) == ({"space": "wide"}, True)
    assert (member.asked, member.header["trials"]) == (1, 1)


def test_a_second_journal_is_not_created_over_the_first(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    with pytest.raises(JournalError, match="exists already"):
        Journal.create(tmp_path, {"trials": 1})
    assert path.read_bytes() == before


def test_create_replaces_what_a_killed_create_left(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"12345678 {")
    with pytest.raises(JournalError, match="never began"):
        Journal.open(tmp_path)
    Journal.create(tmp_path, {"trials": 1}).close()
    assert load(tmp_path).asked == 1


def test_torn_tail_is_ignored_by_readers_and_cut_off_by_the_writer(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for size in range(last + 1, len(whole)):  # the last event, torn at every byte
        path.write_bytes(whole[:size])
        assert len(read(tmp_path)) == 5
        assert path.stat().st_size == size
    for torn in (whole[: last + 9] + b"\0" * 50, whole[:-5] + b"\0\0\0\0\n"):
        path.write_bytes(torn)
        assert len(read(tmp_path)) == 5
    journal = Journal.open(tmp_path)
    assert path.read_bytes() == whole[:last]
    assert journal.record.trials[0].status == "running"
    journal.append(end(0))
    journal.close()
    assert load(tmp_path).trials[0].status == "finished"


@pytest.mark.parametrize("index", range(5))
def test_torn_middle_is_refused_with_file_and_line(tmp_path: Path, index: int) -> None:
    path = written(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    broken = lines[index].replace(b'"time"', b'"tyme"')
    path.write_bytes(b"".join([*lines[:index], broken, *lines[index + 1 :]]))
    for call in (read, load, Journal.open):
        with pytest.raises(JournalError, match=rf"{FILE}:{index + 1}: the checksum"):
            call(tmp_path)


def test_a_missing_or_doubled_line_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))
    with pytest.raises(JournalError, match=rf"{FILE}:3: event 3 where 2"):
        read(tmp_path)
    path.write_bytes(b"".join(lines[:3] + lines[2:]))
    with pytest.raises(JournalError, match=rf"{FILE}:4: event 2 where 3"):
        read(tmp_path)


def test_other_versions_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE
    with pytest.raises(JournalError, match="no journal here"):
        load(tmp_path)
    path.write_bytes(line({"seq": 0, "type": "sweep", "format": 99, "trials": 1}))
    with pytest.raises(JournalError, match=rf"{FILE}:1: journal format 99"):
        load(tmp_path)
    path.write_bytes(line({"seq": 0, "type": "driver", "generation": 1}))
    with pytest.raises(JournalError, match=rf"{FILE}:1: the first event is 'driver'"):
        Journal.open(tmp_path)


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([suggest(1)], "trial 1 suggested after 0"),
        ([report(0, 1)], "never suggested"),
        ([suggest(0), report(0, 2)], "epoch 2 after 0"),
        ([suggest(0), report(0, 1), report(0, 1)], "epoch 1 after 1"),
        ([suggest(0), end(0), end(0)], "which has finished"),
        ([suggest(0), end(0), report(0, 1)], "which has finished"),
        ([suggest(0), end(0, "gone")], "'gone' is none of"),
        ([{"type": "extend", "trials": 1}], "extended from 2 to 1"),
        ([{"type": "retrial"}], "unknown event"),
        ([{"type": "retry", "number": 0}], "'retry' of trial 0, which has not failed"),
        ([suggest(0), end(0), {"type": "retry", "number": 0}], "which has not failed"),
        ([suggest(0), end(0, "failed"), {"type": "retry", "number": 0}, end(0), end(0)], "has fin"),
        ([suggest(0), {"type": "report", "number": 0}], "lacks 'epoch'"),
    ],
)
def test_events_that_contradict_the_journal_are_refused(
    events: list[dict[str, Any]], why: str, tmp_path: Path
) -> None:
    header = {"seq": 0, "type": "sweep", "format": 1, "trials": 2}
    numbered = [{**e, "time": 0.0, "seq": i} for i, e in enumerate(events, start=1)]
    (tmp_path / FILE).write_bytes(b"".join(map(line, [header, *numbered])))
    with pytest.raises(JournalError, match=rf"{FILE}:{len(events) + 1}: .*{why}"):
        load(tmp_path)


def test_the_writer_refuses_them_before_they_are_written(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    journal = Journal.open(tmp_path)
    with pytest.raises(JournalError, match=rf"{FILE}:7: .*which has finished"):
        journal.append(end(0))
    journal.append(suggest(1))
    journal.close()
    assert path.read_bytes().startswith(before)
    assert len(load(tmp_path).trials) == 2


@pytest.mark.parametrize("cut", [True, False])
def test_a_full_disk_leaves_a_valid_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    journal = Journal.open(tmp_path)
    write, truncate = os.write, os.ftruncate

    def full(fd: int, data: memoryview) -> int:
        monkeypatch.setattr(os, "write", nothing_left)
        return write(fd, bytes(data)[:20])  # a disk that fills up takes a part of the line

    def nothing_left(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def away(fd: int, size: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", full)
    if not cut:
        monkeypatch.setattr(os, "ftruncate", away)
    with pytest.raises(OSError, match="No space left"):
        journal.append(suggest(1))
    assert len(journal.record.trials) == 1
    assert len(read(tmp_path)) == 6
    assert (path.read_bytes() == before) is cut
    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "ftruncate", truncate)
    journal.append(suggest(1))  # there is room again
    journal.close()
    assert [event["type"] for event in read(tmp_path)][5:] == ["end", "suggest"]


def test_reports_reach_the_disk_once_a_second_and_the_rest_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path)
    journal = Journal.open(tmp_path)
    synced: list[int] = []
    now = [time.monotonic()]
    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    journal.append(suggest(1))
    assert len(synced) == 1
    for epoch in range(1, 6):
        now[0] += 0.1
        journal.append(report(1, epoch), durable=False)
    journal.sync(older_than=1.0)
    assert len(synced) == 1
    now[0] += 1.0
    journal.sync(older_than=1.0)
    journal.sync(older_than=0.0)  # nothing is waiting any more
    assert len(synced) == 2
    journal.append(report(1, 6), durable=False)
    journal.close()
    assert len(synced) == 3


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with SweepLock(tmp_path) as lock:
        found = holder(tmp_path)
        assert found is not None
        assert found.pid == os.getpid()
        with pytest.raises(
            SweepHeld, match=rf"held by process {os.getpid()} on {found.host} since"
        ):
            SweepLock(tmp_path)
        lock.check()
    assert holder(tmp_path) is None
    SweepLock(tmp_path).close()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import sys, time; from sparsetune.store.lock import SweepLock;"
        "lock = SweepLock(sys.argv[1]); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(SweepHeld, match=f"process {process.pid}"):
            SweepLock(tmp_path)
        process.kill()
        process.wait()
        assert holder(tmp_path) is None
        SweepLock(tmp_path).close()


def test_the_lock_of_another_host_is_taken_over_when_its_heart_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = SweepLock(tmp_path, heartbeat_seconds=0.05)
    monkeypatch.setattr(lock_module, "_machine", lambda: "another host")
    # The pid means nothing here, the heartbeat does.
    with pytest.raises(SweepHeld):
        SweepLock(tmp_path)
    first._closing.set()
    first._thread.join()
    text = json.loads(first.path.read_text())
    first.path.write_text(json.dumps(text | {"heartbeat": time.time() - 59}))
    with pytest.raises(SweepHeld):
        SweepLock(tmp_path)
    first.path.write_text(json.dumps(text | {"heartbeat": time.time() - 61}))
    second = SweepLock(tmp_path)
    # The first was only slow. Its next heartbeat tells it, and it leaves the lock alone.
    first._closing.clear()
    first._beat(0.01)
    with pytest.raises(SweepHeld):
        first.check()
    first.close()
    assert holder(tmp_path) is not None
    second.check()
    second.close()


def test_the_heart_beats(tmp_path: Path) -> None:
    with SweepLock(tmp_path, heartbeat_seconds=0.02):
        before = holder(tmp_path)
        assert before is not None
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            now = holder(tmp_path)
            assert now is not None
            if now.heartbeat > before.heartbeat:
                return
            time.sleep(0.01)
    raise AssertionError("no heartbeat in five seconds")


def test_a_half_written_lock_holds_until_it_is_old(tmp_path: Path) -> None:
    path = tmp_path / "sweep.lock"
    path.write_text('{"token": "ab')
    with pytest.raises(SweepHeld, match="unknown host"):
        SweepLock(tmp_path)
    os.utime(path, (time.time() - 61, time.time() - 61))
    SweepLock(tmp_path).close()
