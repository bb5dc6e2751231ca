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
from sparsetune.space.member import Scheduling, scheduling
from sparsetune.space.resolve import engine_choice
from sparsetune.space.space import Point
from sparsetune.store.layout import resume_command
from sparsetune.store.paths import S3Path
from sparsetune.sweeps.alone import train_alone
from sparsetune.sweeps.create import Writable, note_driver
from sparsetune.sweeps.progress import Progress
from sparsetune.sweeps.recording import Recording, wandb_folder
from sparsetune.sweeps.status import is_done, print_result
from sparsetune.training.data import Dataset
from sparsetune.training.data import load as load_data


def run(members: list[Writable]) -> int:
    """Trains what the journals lack. Exit status: 0 done, 1 trials failed, 130 interrupted.

    ClusterError where the Ray that was asked for cannot be used.
    """
    folder = members[0].folder.parent
    command = members[0].journal.record.header["command"]
    if command == "sweep" and not _all_done(members):
        check_cluster(members[0].member.settings.ray, folder)
    note_driver(members)
    recording = Recording(members, wandb_folder(members[0]))
    with Progress({one.member.name: (one.member, one.journal.record) for one in members}) as bar:
        watch = Watch(recording.send, bar)
        for one in members:
            one.journal.trouble = watch.trouble
        if command == "train":
            train_alone(members[0], watch, bar)
        elif not _all_done(members):
            tune(members, scheduling([one.member for one in members]), watch)
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
    settings = members[0].member.settings
    choices = _choices(members, None)
    studies = []
    for number, (one, choice) in enumerate(zip(members, choices, strict=True)):
        group = structure(one.member.trial_settings({}, {}), choice.name)
        points = None if runs is None else runs[number]
        studies.append(MemberStudy(one.member, one.journal, settings.seed, points, group))

    def slots(on_gpu: bool | None) -> int:
        return _slots(members, choices if on_gpu is None else _choices(members, on_gpu))

    with _needs(members) as (needed, sent):
        tune_all(studies, settings, stopping, slots, needed, sent, watch)


def _choices(members: list[Writable], on_gpu: bool | None) -> list[Choice]:
    """Which engine each member has."""
    datasets: dict[str, Dataset] = {}  # most sweeps have one, and reading it takes a while
    choices = []
    for one in members:
        settings = one.member.settings.data
        if repr(settings) not in datasets:
            datasets[repr(settings)] = load_data(settings)
        choices.append(engine_choice(one.member, datasets[repr(settings)], on_gpu))
    return choices


def _slots(members: list[Writable], choices: list[Choice]) -> int:
    """What an engine does well with; prints which engine each member has."""
    for choice in dict.fromkeys(choices):
        names = [o.member.name for o, c in zip(members, choices, strict=True) if c == choice]
        print(f"Engine for {', '.join(names)}: {choice.name} ({choice.reason}).", file=sys.stderr)
    return max(choice.slots for choice in choices)


@contextmanager
def _needs(members: list[Writable]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What a cluster's nodes must have, and what Ray sends them; of this machine nothing."""
    settings = [one.member.settings for one in members]
    if not settings[0].ray.cluster:
        yield {}, {}
        return
    paths = {path for each in settings for path in (each.data.name, each.model.name) if ":" in path}
    sent: dict[str, Any] = {"py_modules": users_modules(sorted(paths))} if paths else {}
    token = members[0].folder.parent / ".seen"
    if isinstance(token, S3Path):
        sent["env_vars"] = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
    token.write_text(uuid.uuid4().hex)
    models = [to_dict(each.model) for each in settings]
    data = [to_dict(each.data) for each in settings]
    prints = [one.journal.record.header["data"] for one in members]
    try:
        yield needs(token, models, list(zip(data, prints, strict=True))), sent
    finally:
        with contextlib.suppress(OSError):
            token.unlink()


def _all_done(members: list[Writable]) -> bool:
    return all(is_done(one.journal.record) for one in members)


def _close(folder: Path, members: list[Writable], recording: Recording) -> int:
    command = recording.tracker.close()
    for problem in recording.tracker.problems:
        print(problem, file=sys.stderr)
    print_result([one.folder for one in members])
    if command:
        print(f"W&B records are offline; upload them by: {command}")
    if not _all_done(members):
        print(f"Interrupted. Go on by: {resume_command(folder)}")
        return 130
    failed = [
        f"{one.member.name} trial {trial.number}: {trial.error}"
        for one in members
        for trial in one.journal.record.trials.values()
        if trial.status == "failed"
    ]
    for line in failed:
        print(f"failed: {line} (traceback in its folder's error.txt)", file=sys.stderr)
    if failed:
        again = f"{resume_command(folder)} --retry-failed"
        print(f"Try them again, from their checkpoints, by: {again}", file=sys.stderr)
    return 1 if failed else 0
