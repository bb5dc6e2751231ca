"""Run a sweep: a new Tuner over the journals' open and new trials, each time it is started.

The rule to know: launch, resume and extend are one path. `create` writes the members' journals;
`run` reads whatever journals there are and does what they lack. Ray Tune's own snapshots are
scratch and are thrown away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsetune.cluster.nodes import needs, users_modules
from sparsetune.cluster.trial import trial_folder, write_error
from sparsetune.cluster.tuner import check_cluster, tune_all
from sparsetune.cluster.watch import Watch
from sparsetune.engine.pool import Choice, structure
from sparsetune.machine import hardware
from sparsetune.search.study import MemberSearch, SearchMember
from sparsetune.settings import to_dict
from sparsetune.space import config
from sparsetune.space.member import Member, Scheduling, Sweep, check_machine, engine_choice
from sparsetune.space.space import Space
from sparsetune.store.journal import Journal, SweepLock, Trial, exists
from sparsetune.store.paths import S3Path, StorageAway, place
from sparsetune.sweeps import unchanged
from sparsetune.sweeps.alone import epochs
from sparsetune.sweeps.progress import Progress
from sparsetune.sweeps.status import inside, is_done, member_folders, print_result
from sparsetune.sweeps.tracking import Tracker
from sparsetune.training.data import Dataset
from sparsetune.training.data import load as load_data


@dataclass
class OpenMember:
    """A member whose journal this process may write."""

    member: Member
    journal: Journal

    @property
    def folder(self) -> Path:
        return self.journal.path.parent


def create(sweep: Sweep, command: str) -> Path:
    """The folder of a new sweep with a journal per member. ValueError where the name is taken.

    The folder is made under another name and then renamed, so that a sweep is there with all its
    members or not at all.
    """
    folder = sweep.storage / sweep.name
    taken = (
        f"name: '{sweep.name}' exists already in {sweep.storage}; go on with it by: "
        f"{resume_command(folder)}, or take another name"
    )
    if folder.exists():
        raise ValueError(taken)
    common = {
        "sweep_id": uuid.uuid4().hex,
        "command": command,
        "argv": sys.argv[1:],
        "members": [member.name for member in sweep.members],
        "versions": versions(),
        "hardware": hardware(),
    }
    headers = {}
    prints = unchanged.fingerprints(sweep.members)
    for order, (member, fingerprint) in enumerate(zip(sweep.members, prints, strict=True)):
        headers[member_stem(member)] = common | {
            "order": order,
            "trials": member.settings.trials,
            "data": fingerprint,
            "code": unchanged.code(member),
            "member": member.to_header(),
        }
    if isinstance(folder, S3Path):
        # Nothing can be renamed there: whoever holds the lock writes the first member last.
        with SweepLock(folder):
            if any(map(exists, inside(folder))):
                raise ValueError(taken)
            for stem, header in reversed(headers.items()):
                Journal.create(folder / stem, header).close()
        return folder
    scratch = sweep.storage / f".{sweep.name}.{uuid.uuid4().hex[:8]}"
    try:
        scratch.mkdir(parents=True)
        for stem, header in headers.items():
            Journal.create(scratch / stem, header).close()
        scratch.rename(folder)
    except OSError as error:
        if folder.exists():
            raise ValueError(taken) from error
        raise ValueError(
            f"storage: '{sweep.storage}' cannot be written ({error.strerror}); "
            "give storage=FOLDER or set SPARSETUNE_STORAGE"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def undo(members: list[OpenMember]) -> bool:
    """Takes a new sweep away again, unless a trial has begun; is it gone?"""
    if any(one.journal.record.trials for one in members):
        return False
    folder = members[0].folder.parent
    try:
        if isinstance(folder, S3Path):
            folder.rmtree()
        else:
            scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
            shutil.rmtree(folder.rename(scratch), ignore_errors=True)
    except OSError:
        return False
    return True


def resume_command(folder: Path, verb: str = "resume", member: str = "") -> str:
    """What to type for a sweep, or that member of it; with its storage where it is not found
    without."""
    given = place(os.environ.get("SPARSETUNE_STORAGE", "./sweeps")).resolve()
    words = "" if given == folder.parent.resolve() else f" storage={folder.parent}"
    return f"sparsetune {verb} {member or folder.name}{words}"


def member_stem(member: Member) -> str:
    """`set@0.05` of the member `mnist/set@0.05`: its folder in the sweep's."""
    return member.name.partition("/")[2]


@dataclass(frozen=True)
class Extension:
    """What a sweep that goes on is asked for besides what its journals lack."""

    trials: int | None = None  # of each member
    places: Mapping[str, Any] = field(default_factory=dict)  # where trials run, for this time alone
    specs: list[str] = field(default_factory=list)  # spaces and key=value words, which should say
    words: list[str] = field(default_factory=list)  # what the journals say
    allow_wider: bool = False  # ranges that these only widen become those of the search
    retry_failed: bool = False


@contextmanager
def opened(storage: Path, name: str, wanted: Extension | None = None) -> Iterator[list[OpenMember]]:
    """The members of sweep `name`, or one member, ours to write until the end of the `with`.

    ValueError, before anything is written, where they cannot go on as is `wanted`.
    """
    wanted = wanted or Extension()
    folders = member_folders(storage, name)
    with ExitStack() as stack:
        lock = stack.enter_context(SweepLock(folders[0].parent))
        journals = []
        for path in folders:
            writer = Journal.open(path)
            writer.guard = lock.check
            stack.callback(writer.close)
            journals.append(writer)
        _extend([_placed(each, wanted.places) for each in journals], wanted)
        yield [_placed(each, wanted.places) for each in journals]


def _placed(writer: Journal, places: Mapping[str, Any]) -> OpenMember:
    member = Member.from_header(writer.record.header["member"])
    settings = config.replaced(member.settings, places)
    check_machine(settings)
    return OpenMember(dataclasses.replace(member, settings=settings), writer)


def _extend(members: list[OpenMember], wanted: Extension) -> None:
    """Writes what is wanted into the journals, once nothing of it can be refused."""
    spaces: list[Space | None] = [None] * len(members)
    prints = unchanged.fingerprints(one.member for one in members)
    for one, fingerprint in zip(members, prints, strict=True):
        unchanged.check_unchanged(one.member, one.journal.record.header, fingerprint)
        asked = one.journal.record.asked
        if wanted.trials is not None and wanted.trials < asked:
            raise ValueError(
                f"trials: {one.member.name} was asked for {asked} already; give trials={asked} or "
                "more"
            )
    if wanted.specs or wanted.words:
        then = [one.member for one in members]
        header = members[0].journal.record.header
        now = unchanged.asked_again(then, header, wanted.specs, wanted.words)
        spaces = [
            unchanged.wider(*pair, wanted.allow_wider) for pair in zip(then, now, strict=True)
        ]
    for one, space in zip(members, spaces, strict=True):
        record = one.journal.record
        event: dict[str, Any] = {"type": "extend", "trials": wanted.trials or record.asked}
        if space is not None:
            event["member"] = record.header["member"] | {"space": space.to_dict()}
        if space is not None or event["trials"] > record.asked:
            one.journal.append(event)
        failed = [trial.number for trial in record.trials.values() if trial.status == "failed"]
        for number in failed if wanted.retry_failed else ():
            one.journal.append({"type": "retry", "number": number})


def search_member(one: OpenMember, scheduling: Scheduling) -> SearchMember:
    """The member as the searcher sees it; trials are told where they live."""
    settings = one.member.settings

    def configure(params: dict[str, Any], fixed: dict[str, Any], number: int) -> dict[str, Any]:
        about = {
            "folder": str(trial_folder(one.folder, number)),
            "decisions": scheduling.decisions(settings.epochs),
            "save_every": settings.checkpoint.every,
            "generation": one.journal.record.generation,
            "failures": settings.failures,
        }
        return one.member.configure(params, fixed, number) | {"trial": about}

    return dataclasses.replace(one.member.search_member(one.journal), configure=configure)


def note_driver(members: list[OpenMember]) -> None:
    """Writes that this process drives the sweep now."""
    for one in members:
        one.journal.append(
            {
                "type": "driver",
                "generation": one.journal.record.generation + 1,
                "pid": os.getpid(),
                "host": os.uname().nodename,
                "versions": versions(),
            }
        )


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for package in ("sparsetune", "torch", "ray", "optuna", "wandb"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Recording:
    """Sends the journals' events to W&B: what it lacks at the start, then what comes.

    It reads the journals and nothing else, so after any interruption the same code back-fills.
    """

    def __init__(self, members: list[OpenMember], folder: Path) -> None:
        header = members[0].journal.record.header
        self.tracker = Tracker(members[0].member.settings.wandb, header["sweep_id"], folder)
        self._members = members
        self._sent: dict[str, dict[int, int]] = {one.member.name: {} for one in members}
        self._first_open = {one.member.name: 0 for one in members}

    def send(self, last: bool = False) -> None:
        """As much as W&B can take for now, and the `last` time all."""
        if self.tracker.mode == "disabled":
            return
        for one in self._members:
            record, sent = one.journal.record, self._sent[one.member.name]
            start = self._first_open[one.member.name]
            for number in range(start, len(record.trials)):
                if self.tracker.behind and not last:
                    return
                self._send_trial(one, number, sent)
                # Ended and sent trials at the front need not be looked at again.
                if number == self._first_open[one.member.name] and sent.get(number) == -1:
                    self._first_open[one.member.name] += 1

    def _send_trial(self, one: OpenMember, number: int, sent: dict[int, int]) -> None:
        trial, name = one.journal.record.trials[number], one.member.name
        if sent.get(number) == -1:
            return
        about = self.about(one, trial)
        if about is None:
            return
        if number not in sent:
            recorded = self.tracker.recorded(name, number, len(trial.failures))
            if trial.status != "running" and recorded == trial.status:
                sent[number] = -1
                return
            group, job_type = about
            self.tracker.start(
                name,
                number,
                name=one.member.run_name(trial.params | trial.fixed, number),
                group=group,
                job_type=job_type,
                config=one.member.configure(trial.params, trial.fixed, number)
                | {"member": name, "trial": number},
            )
            sent[number] = 0
        for epoch, metrics, _ in trial.reports[sent[number] :]:
            self.tracker.log(name, number, epoch, metrics)
            sent[number] = epoch
        if trial.status != "running" and self.complete(one, trial):
            found = summary(one.member, trial)
            self.tracker.finish(name, number, trial.status, found, len(trial.failures))
            sent[number] = -1

    def about(self, one: OpenMember, trial: Trial) -> tuple[str, str] | None:
        """(group, job type) of the trial's run; None where that is not known yet."""
        return one.member.name.partition("/")[0], one.member.settings.method

    def complete(self, one: OpenMember, trial: Trial) -> bool:
        """Has a trial that has ended all that its run is to hold?"""
        return True


def summary(member: Member, trial: Trial) -> dict[str, float]:
    """The best value that each objective had in any epoch of the trial, and what it does on the
    test images where they were read, for reading in W&B."""
    found = dict(trial.test or {})
    for name, direction in zip(member.objectives, member.directions, strict=True):
        values = [r.metrics[name] for r in trial.reports if math.isfinite(r.metrics[name])]
        if values:
            found[f"best/{name}"] = max(values) if direction == "maximize" else min(values)
    return found


def run(members: list[OpenMember]) -> int:
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
            train_alone(members[0], watch)
        elif not _all_done(members):
            scheduling = Sweep("", Path(), [one.member for one in members]).scheduling
            tune(members, [search_member(one, scheduling) for one in members], scheduling, watch)
    recording.send(last=True)
    return _close(folder, members, recording)


def tune(
    members: list[OpenMember], searches: list[SearchMember], scheduling: Scheduling, watch: Watch
) -> None:
    """Trains, under Ray, what the members' journals lack of `searches`."""
    choices = _choices(members, None)
    for search, one, choice in zip(searches, members, choices, strict=True):
        search.group = structure(one.member.trial_settings({}, {}), choice.name)

    def slots(on_gpu: bool | None) -> int:
        return _slots(members, choices if on_gpu is None else _choices(members, on_gpu))

    with _needs(members) as (needed, sent):
        settings = members[0].member.settings
        tune_all(searches, settings, scheduling, slots, needed, sent, watch)


def wandb_folder(one: OpenMember) -> Path:
    """Where W&B's own files go: beside the journals, or, as W&B writes local files alone, below the
    working directory. Whoever resumes elsewhere has all epochs back-filled from the journals; so of
    several such folders upload the last one, which is complete, or rows stand twice."""
    if not isinstance(one.folder, S3Path):
        return one.folder.parent
    name = f"{one.folder.parent.name}-{one.journal.record.header['sweep_id'][:8]}"
    folder = Path("wandb", name).absolute()
    if one.member.settings.wandb.mode != "disabled":
        print(f"W&B's files go to {folder}.", file=sys.stderr)
    return folder


def _choices(members: list[OpenMember], on_gpu: bool | None) -> list[Choice]:
    """Which engine each member has."""
    datasets: dict[str, Dataset] = {}  # most sweeps have one, and reading it takes a while
    choices = []
    for one in members:
        settings = one.member.settings.data
        if repr(settings) not in datasets:
            datasets[repr(settings)] = load_data(settings)
        choices.append(engine_choice(one.member, datasets[repr(settings)], on_gpu))
    return choices


def _slots(members: list[OpenMember], choices: list[Choice]) -> int:
    """What an engine does well with; prints which engine each member has."""
    for choice in dict.fromkeys(choices):
        names = [o.member.name for o, c in zip(members, choices, strict=True) if c == choice]
        print(f"Engine for {', '.join(names)}: {choice.name} ({choice.reason}).", file=sys.stderr)
    return max(choice.slots for choice in choices)


@contextmanager
def _needs(members: list[OpenMember]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
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


def _all_done(members: list[OpenMember]) -> bool:
    return all(is_done(one.journal.record) for one in members)


def _close(folder: Path, members: list[OpenMember], recording: Recording) -> int:
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


def train_alone(one: OpenMember, watch: Watch) -> None:
    """The open and new trials of a member one after another in this process, without Ray."""
    settings, record = one.member.settings, one.journal.record
    scheduling = Sweep("", Path(), [one.member]).scheduling
    search = MemberSearch(search_member(one, scheduling), settings.seed)
    with watch.signals():
        while not is_done(record) and watch.leaving_since is None:
            running = [trial for trial in record.trials.values() if trial.status == "running"]
            trial = running[0] if running else search.suggest()
            trial_settings = one.member.trial_settings(trial.params, trial.fixed)
            folder = trial_folder(one.folder, trial.number)
            metrics: dict[str, float] = {}
            records = epochs(
                trial_settings, settings.device, folder, settings.checkpoint.every, watch.trouble
            )
            while watch.leaving_since is None:
                try:
                    if (found := next(records, None)) is None:
                        break
                except StorageAway:
                    raise
                except Exception as error:  # noqa: BLE001 - recorded as in a sweep, not as a result
                    search.end(trial.number, "failed", error=write_error(folder, error))
                    break
                metrics = found
                if metrics["epoch"] > len(trial.reports):
                    search.report(trial.number, int(metrics["epoch"]), metrics, "CONTINUE")
                watch.progress.epoch(one.member.name, metrics, trial_settings.epochs)
                watch.send()
            if trial.status == "failed":
                continue
            if metrics.get("diverged"):
                search.end(trial.number, "diverged")
            elif len(trial.reports) == trial_settings.epochs:
                search.end(trial.number, "finished")
