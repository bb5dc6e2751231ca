"""Run a sweep: a new Tuner over the journals' open and new trials, each time it is started.

The rule to know: launch, resume and extend are one path. `create` writes the members' journals;
`run` reads whatever journals there are and does what they lack. Ray Tune's own snapshots are
scratch and are thrown away.
"""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsetune.cluster.nodes import needs, users_modules
from sparsetune.cluster.tuner import check_cluster, tune_all
from sparsetune.cluster.watch import Watch
from sparsetune.engine.pool import Choice, structure
from sparsetune.search.study import MemberStudy
from sparsetune.settings import to_dict
from sparsetune.space.member import Scheduling, scheduling_of
from sparsetune.space.resolve import engine_choice
from sparsetune.space.space import Point
from sparsetune.store.layout import resume_command
from sparsetune.store.paths import S3Path
from sparsetune.sweeps.alone import train_alone
from sparsetune.sweeps.create import Writable, note_driver
from sparsetune.sweeps.progress import Progress
from sparsetune.sweeps.recording import Recording, wandb_folder
from sparsetune.sweeps.status import is_done, print_members, sweep_status
from sparsetune.sweeps.unchanged import datasets


def run(members: list[Writable]) -> dict[str, Any]:
    """Trains what the journals lack; prints and returns what came of it (`status.sweep_status`).

    ClusterError where the Ray that was asked for cannot be used.
    """
    folder = members[0].folder.parent
    command = members[0].record.header["command"]
    if command == "sweep" and not _all_done(members):
        check_cluster(members[0].member.settings.ray, folder)
    note_driver(members)
    recording = Recording(members, wandb_folder(members[0]))
    with Progress({m.name: (m.member, m.record) for m in members}) as progress:
        watch = Watch(recording.send, progress)
        for writable in members:
            writable.journal.trouble = watch.trouble
        if command == "train":
            train_alone(members[0], watch, progress)
        elif not _all_done(members):
            tune(members, scheduling_of(folder), watch)
    recording.send(last=True)
    return _close(folder, members, recording)


def tune(
    members: list[Writable],
    stopping: Scheduling,
    watch: Watch,
    runs: list[list[Point]] | None = None,
) -> None:
    """Trains, under Ray, what the members' journals lack: of a search, or, for each member, of the
    `runs` that there are to be."""
    seed = members[0].member.settings.seed
    choices = _choices(members, None)

    def slots(on_gpu: bool | None) -> int:
        return _slots(members, choices if on_gpu is None else _choices(members, on_gpu))

    with watch.signals(), _needs(members) as (needed, sent):
        studies = []
        for number, (writable, choice) in enumerate(zip(members, choices, strict=True)):
            points = None if runs is None else runs[number]
            group = structure(writable.member.trial_settings({}, {}), choice.name)
            studies.append(MemberStudy(writable.member, writable.journal, seed, points, group))
        tune_all(studies, stopping, slots, needed, sent, watch)


def _choices(members: list[Writable], on_gpu: bool | None) -> list[Choice]:
    """Which engine each member has."""
    own = [writable.member for writable in members]
    return [engine_choice(*pair, on_gpu) for pair in zip(own, datasets(own), strict=True)]


def _slots(members: list[Writable], choices: list[Choice]) -> int:
    """What an engine does well with; prints which engine each member has."""
    for choice in dict.fromkeys(choices):
        names = [m.name for m, other in zip(members, choices, strict=True) if other == choice]
        print(f"Engine for {', '.join(names)}: {choice.name} ({choice.reason}).", file=sys.stderr)
    return max(choice.slots for choice in choices)


@contextmanager
def _needs(members: list[Writable]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What a cluster's nodes must have, and what Ray sends them; of this machine nothing."""
    settings = [writable.member.settings for writable in members]
    if not settings[0].ray.cluster:
        yield {}, {}
        return
    methods = sorted({own.method for own in settings})
    named = {name for own in settings for name in (own.data.name, own.model.name)}
    paths = sorted(path for path in named | {*methods} if ":" in path)
    sent: dict[str, Any] = {"py_modules": users_modules(paths)} if paths else {}
    token = members[0].folder.parent / ".seen"
    if isinstance(token, S3Path):
        sent["env_vars"] = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
    token.write_text(uuid.uuid4().hex)
    models = [to_dict(own.model) for own in settings]
    data = [to_dict(own.data) for own in settings]
    prints = [writable.record.header["data"] for writable in members]
    try:
        yield needs(token, methods, models, list(zip(data, prints, strict=True))), sent
    finally:
        with contextlib.suppress(OSError):
            token.unlink()


def _all_done(members: list[Writable]) -> bool:
    return all(is_done(writable.record) for writable in members)


def _close(folder: Path, members: list[Writable], recording: Recording) -> dict[str, Any]:
    upload = recording.tracker.close()
    for problem in recording.tracker.problems:
        print(problem, file=sys.stderr)
    result = sweep_status([writable.folder for writable in members], driven=False)
    print_members(result.get("members", [result]))
    if upload:
        print(f"W&B records are offline; upload them by: {upload}")
    if not _all_done(members):
        print(f"Interrupted. Go on by: {resume_command(folder)}")
        return result
    failed = [
        f"{writable.name} trial {trial.number}: {trial.error}"
        for writable in members
        for trial in writable.record.trials.values()
        if trial.status == "failed"
    ]
    for line in failed:
        print(f"failed: {line} (traceback in its folder's error.txt)", file=sys.stderr)
    if failed:
        again = f"{resume_command(folder)} --retry-failed"
        print(f"Try them again, from their checkpoints, by: {again}", file=sys.stderr)
    return result
