"""The journals of a sweep: new ones, and those that go on, as far as they may change.

The rule to know: nothing is written before nothing can be refused any more, and a sweep is there
with all its members or not at all.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsetune.cluster.tuner import check_cluster
from sparsetune.machine import hardware, versions
from sparsetune.space import config, networks
from sparsetune.space.member import Member, Sweep
from sparsetune.space.resolve import check_machine
from sparsetune.store.journal import Journal, Record
from sparsetune.store.layout import inside, member_folders, resume_command
from sparsetune.store.lines import Event, exists, home
from sparsetune.store.lock import SweepLock
from sparsetune.store.paths import S3Path
from sparsetune.sweeps import unchanged
from sparsetune.sweeps.status import is_done


@dataclass
class Writable:
    """A member whose journal this process may write."""

    member: Member
    journal: Journal

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def record(self) -> Record:
        return self.journal.record

    @property
    def folder(self) -> Path:
        return self.journal.path.parent


@contextmanager
def created(sweep: Sweep, command: str, words: Sequence[str]) -> Iterator[list[Writable]]:
    """The members of a new sweep, ours to write until the end of the `with`.

    The journals keep the command and its words. ValueError where the name is taken.
    """
    folder = sweep.storage / sweep.name
    taken = (
        f"name: '{sweep.name}' exists already in {sweep.storage}; go on with it by: "
        f"{resume_command(folder)}, or take another name"
    )
    if folder.exists():
        raise ValueError(taken)
    headers = _headers(sweep, [command, *words])
    with ExitStack() as stack:
        if isinstance(folder, S3Path):
            # Nothing can be renamed there: whoever holds the lock writes the first member last.
            lock = stack.enter_context(SweepLock(folder))
            if any(map(exists, inside(folder))):
                raise ValueError(taken)
            journals = _create(folder, dict(reversed(headers.items())), stack)
        else:
            with ExitStack() as closing:
                journals = _create_at_once(folder, headers, taken, closing)
                lock = stack.enter_context(SweepLock(folder))
                stack.push(closing.pop_all())  # journals are closed before the lock is let go
        for journal in journals.values():
            journal.guard = lock.check
        yield [Writable(member, journals[member_stem(member)]) for member in sweep.members]


def _headers(sweep: Sweep, argv: list[str]) -> dict[str, Event]:
    """The first event of each member's journal, by the folder that it is to have."""
    common = {
        "sweep_id": uuid.uuid4().hex,
        "command": argv[0],
        "argv": argv,
        "members": [member.name for member in sweep.members],
        "versions": versions(),
        "hardware": hardware(),
    }
    datasets = unchanged.datasets(sweep.members)
    return {
        member_stem(member): common
        | {
            "order": order,
            "trials": member.settings.trials,
            "data": dataset.fingerprint,
            "network": networks.to_header(member, dataset),
            "code": unchanged.code(member),
            "member": member.to_header(),
        }
        for order, (member, dataset) in enumerate(zip(sweep.members, datasets, strict=True))
    }


def _create(folder: Path, headers: Mapping[str, Event], stack: ExitStack) -> dict[str, Journal]:
    journals = {}
    for stem, header in headers.items():
        journals[stem] = Journal.create(folder / stem, header)
        stack.callback(journals[stem].close)
    return journals


def _create_at_once(
    folder: Path, headers: Mapping[str, Event], taken: str, stack: ExitStack
) -> dict[str, Journal]:
    """Made under another name and then renamed: the folder is there with all members or not."""
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        scratch.mkdir(parents=True)
        journals = _create(scratch, headers, stack)
        scratch.rename(folder)
    except OSError as error:
        if folder.exists():
            raise ValueError(taken) from error
        raise ValueError(
            f"storage: '{folder.parent}' cannot be written ({error.strerror}); "
            "give storage=FOLDER or set SPARSETUNE_STORAGE"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for stem, journal in journals.items():
        journal.path = home(folder / stem)
    return journals


def undo(members: list[Writable]) -> bool:
    """Takes a new sweep away again, unless a trial has begun; is it gone?"""
    if any(writable.record.trials for writable in members):
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


def member_stem(member: Member) -> str:
    """`set@0.05` of the member `mnist/set@0.05`: its folder in the sweep's."""
    return member.name.partition("/")[2]


@dataclass(frozen=True)
class Extension:
    """What a sweep that goes on is asked for besides what its journals lack."""

    trials: int | None = None  # of each member
    places: Mapping[str, Any] = field(default_factory=dict)  # where trials run, for this time alone
    settings: Mapping[str, Any] = field(default_factory=dict)  # that it should have already
    allow_wider: bool = False  # ranges that `settings` only widen become those of the search
    retry_failed: bool = False


@contextmanager
def opened(storage: Path, name: str, wanted: Extension | None = None) -> Iterator[list[Writable]]:
    """The members of sweep `name`, or one member, ours to write until the end of the `with`.

    ValueError, before anything is written, where they cannot go on as is `wanted`, and
    ClusterError where the Ray that would train them cannot be used.
    """
    wanted = wanted or Extension()
    folders = member_folders(storage, name)
    with ExitStack() as stack:
        lock = stack.enter_context(SweepLock(folders[0].parent))
        journals = []
        for path in folders:
            journal = Journal.open(path)
            journal.guard = lock.check
            stack.callback(journal.close)
            journals.append(journal)
        members = [_placed(journal, wanted.places) for journal in journals]
        more = wanted.trials is not None or wanted.retry_failed
        if members[0].record.header["command"] == "sweep" and (
            more or not all(is_done(journal.record) for journal in journals)
        ):
            check_cluster(members[0].member.settings.ray, folders[0].parent)
        _extend(members, wanted)
        yield [_placed(journal, wanted.places) for journal in journals]


def _placed(journal: Journal, places: Mapping[str, Any]) -> Writable:
    member = Member.from_header(journal.record.header["member"])
    settings = config.replaced(member.settings, places)
    check_machine(settings)
    return Writable(dataclasses.replace(member, settings=settings), journal)


def _extend(members: list[Writable], wanted: Extension) -> None:
    """Writes what is wanted into the journals, once nothing of it can be refused."""
    datasets = unchanged.datasets(writable.member for writable in members)
    for writable, dataset in zip(members, datasets, strict=True):
        unchanged.check_unchanged(writable.member, writable.record.header, dataset.fingerprint)
        asked = writable.record.asked
        if wanted.trials is not None and wanted.trials < asked:
            raise ValueError(
                f"trials: {writable.name} was asked for {asked} already; give trials={asked} or "
                "more"
            )
    spaces = unchanged.wider(
        [writable.member for writable in members], wanted.settings, wanted.allow_wider
    )
    for writable, space in zip(members, spaces, strict=True):
        record = writable.record
        event: Event = {"type": "extend", "trials": wanted.trials or record.asked}
        if space is not None:
            event["member"] = record.header["member"] | {"space": space.to_dict()}
        if space is not None or event["trials"] > record.asked:
            writable.journal.append(event)
        failed = [trial.number for trial in record.trials.values() if trial.status == "failed"]
        for number in failed if wanted.retry_failed else ():
            writable.journal.append({"type": "retry", "number": number})


def note_driver(members: list[Writable]) -> None:
    """Writes that this process drives the sweep now."""
    for writable in members:
        writable.journal.append(
            {
                "type": "driver",
                "generation": writable.record.generation + 1,
                "pid": os.getpid(),
                "host": os.uname().nodename,
                "versions": versions(),
            }
        )
