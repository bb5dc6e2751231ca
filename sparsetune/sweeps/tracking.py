"""What a sweep sends to Weights & Biases: one run per trial, one row per epoch.

The rule to know: W&B is a copy, the journal is the truth. Nothing here may fail or slow a trial:
the driver only enqueues, one thread does what can wait, and errors end in `Tracker.problems`.

Each epoch once: after a restart the caller replays every epoch of a trial from its journal, and
those already recorded are dropped here. Which ones is asked of the record itself, never of a note
of our own: a kill could leave that ahead of the record (an epoch lost) or behind it (one doubled,
since `wandb sync` appends what a file holds, whatever the server has). Online the server says where
a run goes on; offline its `.wandb` files are read back. And a run stays in the mode it began in.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
import queue
import re
import shlex
import shutil
import struct
import sys
import threading
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2
from wandb.sdk import wandb_setup
from wandb.sdk.lib import wbauth

from sparsetune.settings import WandbSettings, check_value

QUEUED = 20_000  # events waiting at most, some 40 MB; what comes on top is left to the next resume
UPLOAD_SECONDS = 3600  # for a file
FLUSH_SECONDS = 0.05  # wandb-core dies at once with its driver and loses what it has not flushed
Config = dict[str, Any]


def resolve_mode(settings: WandbSettings) -> str:
    """online, offline or disabled. Asks nobody: `online` without a login is offline, too."""
    check_value("wandb.mode", settings.mode)
    os.environ.setdefault("WANDB_SILENT", "true")  # no line of wandb's own amid our table
    known = wandb_setup.singleton().settings  # has what `wandb offline` and `wandb login` set
    mode = settings.mode if settings.mode != "auto" else os.environ.get("WANDB_MODE", known.mode)
    if mode in ("offline", "disabled"):
        return mode
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    host = os.environ.get("WANDB_BASE_URL", known.base_url)
    with contextlib.suppress(wandb.Error):  # a malformed key: `wandb.init` will say so
        return "online" if known.api_key or wbauth.read_netrc_auth(host=host) else "offline"
    return "online"


def run_id(sweep_id: str, member: str, number: int) -> str:
    """The W&B id of a trial: the same in every process, at most 64 of [a-z0-9-]."""
    digest = hashlib.sha256(f"{sweep_id}\n{member}\n{number}".encode()).hexdigest()[:12]
    readable = re.sub(r"[^a-z0-9]+", "-", member.lower()).strip("-")[-36:].strip("-")
    return f"{readable or 'trial'}-{number}-{digest}"


def read_back(file: Path) -> tuple[int, int, bool]:
    """Of a `.wandb` file: the last step (-1: no row), the size of its whole part, whether it ended.

    LevelDB's log: blocks of 32 KiB; records of checksum, length, type (1 whole, 2-4 first to last).
    """
    data, record, step, ended = file.read_bytes(), b"", -1, False
    position = whole = 7  # after the file's own header
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:  # too short for a header: padding
            position += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        content = data[position + 7 : position + 7 + length]
        if len(content) < length or zlib.crc32(content, zlib.crc32(bytes([kind]))) != checksum:
            break
        position += 7 + length
        record = content if kind in (1, 2) else record + content
        if kind in (1, 4):
            whole = position
            parsed = wandb_internal_pb2.Record.FromString(record)  # type: ignore[attr-defined]
            ended |= parsed.HasField("exit")
            step = max(step, parsed.history.step.num if parsed.HasField("history") else -1)
    return step, whole, ended


@dataclass
class _Open:
    run: wandb.Run
    last_epoch: int  # the last epoch that W&B has
    last: dict[str, float] = field(default_factory=dict)  # last value of every metric


class Tracker:
    """Records trials in W&B; `folder` gets `wandb/` and a list of the completely recorded ones.

    `problems`: what went wrong, a line each. A trial hit stays incomplete, as `recorded` says,
    until it is started and replayed again, in this process or after a resume.
    """

    def __init__(self, settings: WandbSettings, sweep_id: str, folder: Path) -> None:
        self.settings, self.sweep_id, self.folder = settings, sweep_id, folder
        self.mode = resolve_mode(settings)
        self.problems: list[str] = []
        self._recorded: dict[str, tuple[str, int]] = {}  # run -> status, retries before it
        self._recorded_file = folder / "wandb-recorded.jsonl"
        self._left_out: set[str] = set()  # the driver's: runs that lack an epoch, so any later one
        self._open: dict[str, _Open] = {}  # the thread's
        self._queue: queue.Queue[tuple[Any, ...]] = queue.Queue(QUEUED)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        if self.mode == "disabled":
            return
        if settings.mode == "online" and self.mode == "offline":
            self._problem("not logged in (wandb login), recording offline")
        logging.getLogger("wandb").propagate = False  # it logs each run's life at INFO
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._recorded_file.touch()  # an unwritable folder is known now
            for line in self._recorded_file.read_text().splitlines():
                if line.endswith("}"):  # a kill may have torn the last one
                    done = json.loads(line)
                    self._recorded[done["id"]] = done["status"], done.get("retries", 0)
        except (OSError, ValueError, KeyError) as error:  # costs a replay, not more
            self._problem(f"{self._recorded_file.name} cannot be used", error)
        self._thread.start()

    @property
    def behind(self) -> bool:
        """Is so much waiting that the rest had better stay where it comes from for now?"""
        return self._queue.qsize() >= QUEUED // 10

    def recorded(self, member: str, number: int, retries: int = 0) -> str:
        """The status with which the trial's record is complete in W&B after so many retries of
        it; "" while it is not."""
        status, after = self._recorded.get(run_id(self.sweep_id, member, number), ("", 0))
        return status if after == retries else ""

    def start(
        self, member: str, number: int, *, name: str, group: str, job_type: str, config: Config
    ) -> None:
        """A trial begins, or goes on and has all its epochs logged again from the first."""
        self._left_out.discard(run_id(self.sweep_id, member, number))
        given = {"name": name, "group": group, "job_type": job_type}
        self._put(self._start, member, number, given | {"config": copy.deepcopy(config)})

    def log(self, member: str, number: int, epoch: int, metrics: dict[str, float]) -> None:
        self._put(self._log, member, number, epoch, dict(metrics))

    def finish(
        self, member: str, number: int, status: str, summary: dict[str, float], retries: int = 0
    ) -> None:
        """`status` is finished, stopped, diverged or failed; `summary` is added to the run's."""
        self._put(self._finish, member, number, status, dict(summary), retries)

    def close(self, timeout: float = 120.0) -> str | None:
        """Waits for what is queued; runs still open end as interrupted. Returns the shell command
        that uploads what was recorded offline, None when there is nothing to upload."""
        if self.mode == "disabled":
            return None
        deadline = time.monotonic() + timeout
        with contextlib.suppress(queue.Full):
            self._queue.put((None, ""), timeout=timeout)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._problem(f"not everything recorded in {timeout:.0f} s; a resume completes it")
        files = (self.folder / "wandb").glob("offline-run-*/run-*.wandb")
        if all(file.with_suffix(".wandb.synced").exists() for file in files):
            return None
        return sync_command(self.folder / "wandb")

    def _put(self, action: Any, member: str, number: int, *given: Any) -> None:
        run = run_id(self.sweep_id, member, number)
        if self.mode == "disabled" or run in self._left_out:
            return
        try:
            self._queue.put((action, run, *given), timeout=0 if self._left_out else 0.2)
        except queue.Full:
            self._left_out.add(run)
            self._problem("slower than the sweep; a resume completes the trials left out")

    def _problem(self, what: str, error: Exception | None = None) -> None:
        reason = f" ({type(error).__name__}: {str(error).strip()[:120]})" if error else ""
        line = " ".join(f"W&B: {what}{reason}".split())
        if line not in self.problems and len(self.problems) < 20:
            self.problems.append(line)

    def _work(self) -> None:
        while (event := self._queue.get())[0] is not None:
            self._guard(*event)
        for run in list(self._open):
            self._guard(self._finish, run, "interrupted", {})

    def _guard(self, action: Any, run: str, *given: Any) -> None:
        if action != self._start and run not in self._open:
            return  # it failed before
        try:
            action(run, *given)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other runs go on
            self._open.pop(run, None)
            self._problem("a trial's record is incomplete", error)

    def _start(self, run: str, given: dict[str, Any]) -> None:
        if run in self._open:
            return
        last = {"run": -1, "offline": -1}  # how a run's folder begins, online and offline
        # With the id in the folder's pattern, no other run's folder is looked into.
        for file in (self.folder / "wandb").glob(f"*run-*-{run}*/run-{run}.wandb"):
            kind = file.parent.name.split("-")[0]
            step, whole, _ = read_back(file)
            last[kind] = max(last[kind], step)
            os.truncate(file, whole)  # `wandb sync` stops at a torn or empty file, and leaves
            if step < 0:  # out the later ones of the same run
                file.unlink()
        if self.mode == "online" and last["offline"] < 0:
            try:
                opened = self._init(run, "online", given)
                self._open[run] = _Open(opened, opened.starting_step - 1)
                return
            except Exception as error:  # noqa: BLE001 - no network, no server, a refused key
                self._problem("not reachable, recording offline", error)
                self.mode = "offline"
                if not self._open:  # wandb-core holds on to the failed run's id
                    wandb.teardown()
        if last["offline"] < 0 <= last["run"]:
            raise RuntimeError("begun online; a resume that reaches the server completes it")
        self._open[run] = _Open(self._init(run, "offline", given), last["offline"])

    def _init(self, run: str, mode: Any, given: dict[str, Any]) -> wandb.Run:
        return _init(self.settings, self.folder, mode, given | {"id": run, "resume": "allow"})

    def _log(self, run: str, epoch: int, metrics: dict[str, float]) -> None:
        opened = self._open[run]
        opened.last |= (row := metrics | {"epoch": epoch})
        if epoch > opened.last_epoch:
            opened.run.log(row, step=epoch, commit=True)
            opened.last_epoch = epoch

    def _finish(self, run: str, status: str, found: dict[str, float], retries: int = 0) -> None:
        opened = self._open.pop(run)
        # A resumed client knows no earlier row.
        opened.run.summary.update(opened.last | {"status": status} | found)
        opened.run.finish(exit_code={"failed": 1, "interrupted": 130}.get(status, 0))
        written = Path(opened.run.dir).parent / f"run-{run}.wandb"
        deadline = time.monotonic() + 5
        while not read_back(written)[2]:  # wandb-core writes the end some ms after this `finish`
            if time.monotonic() > deadline:
                raise TimeoutError("its .wandb file has no end")
            time.sleep(0.005)
        if status != "interrupted":  # noted last: a kill before it costs one replay
            with self._recorded_file.open("a") as file:
                noted = {"id": run, "status": status} | ({"retries": retries} if retries else {})
                file.write("\n" + json.dumps(noted))
            self._recorded[run] = status, retries


def log_file(
    settings: WandbSettings, folder: Path, file: Path, called: str, about: Config, given: Config
) -> str:
    """Logs `file` as an artifact that is `called` so, by a run of its own; says where it is.

    ValueError where W&B is disabled or does not take it.
    """
    mode = resolve_mode(settings)
    if mode == "disabled":
        raise ValueError("wandb: is disabled for this sweep; give wandb.mode=online or offline")
    artifact = wandb.Artifact(re.sub(r"[^\w.-]+", "-", called), "model", metadata=about)
    artifact.add_file(str(file))
    try:
        run = _init(settings, folder, mode, given)
        with run:
            logged = run.log_artifact(artifact)
            if mode == "online":
                logged.wait(timeout=UPLOAD_SECONDS)
    except (wandb.Error, TimeoutError) as error:
        raise ValueError(f"wandb: the artifact was not taken ({error})") from error
    if mode == "online":
        return f"in W&B as {logged.qualified_name}"
    return f"recorded offline; upload it by: {sync_command(Path(run.dir).parent)}"


def sync_command(runs: Path) -> str:
    program = "wandb" if shutil.which("wandb") else str(Path(sys.executable).with_name("wandb"))
    return f"{shlex.quote(program)} sync {shlex.quote(str(runs))}"


def _init(settings: WandbSettings, folder: Path, mode: Any, given: Config) -> wandb.Run:
    wait = float(os.environ.get("WANDB_INIT_TIMEOUT") or 30)
    chosen: dict[str, Any] = {"silent": True, "console": "off", "disable_git": True}
    chosen |= {"init_timeout": wait, "finish_timeout": wait, "finish_timeout_raises": True}
    chosen |= {"x_disable_stats": True, "x_disable_meta": True, "x_save_requirements": False}
    chosen |= {"x_transaction_log_flush_interval": FLUSH_SECONDS}
    known = wandb.Settings.model_fields  # x_ settings come and go with versions
    chosen = {key: chosen[key] for key in chosen if key in known}
    given = given | {"reinit": "create_new", "mode": mode, "dir": str(folder)}
    given |= {"project": settings.project, "entity": settings.entity or None}
    given |= {"tags": settings.tags or None}
    return wandb.init(settings=wandb.Settings(**chosen), allow_val_change=True, **given)
