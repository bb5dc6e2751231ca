"""The journals of a sweep: new ones, and those that go on, as far as they may change.

The rule to know: nothing is written before nothing can be refused any more, and a sweep is there
with all its members or not at all.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsetune.machine import hardware, versions
from sparsetune.space import config, networks
from sparsetune.space.member import Member, Sweep
from sparsetune.space.resolve import check_machine
from sparsetune.space.space import Space
from sparsetune.store.journal import Journal, SweepLock, exists
from sparsetune.store.layout import inside, member_folders, resume_command
from sparsetune.store.paths import S3Path
from sparsetune.sweeps import unchanged


@dataclass
class Writable:
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
    datasets = unchanged.datasets(sweep.members)
    for order, (member, dataset) in enumerate(zip(sweep.members, datasets, strict=True)):
        headers[member_stem(member)] = common | {
            "order": order,
            "trials": member.settings.trials,
            "data": dataset.fingerprint,
            "network": networks.to_header(member, dataset),
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


def undo(members: list[Writable]) -> bool:
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
def opened(storage: Path, name: str, wanted: Extension | None = None) -> Iterator[list[Writable]]:
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


def _placed(writer: Journal, places: Mapping[str, Any]) -> Writable:
    member = Member.from_header(writer.record.header["member"])
    settings = config.replaced(member.settings, places)
    check_machine(settings)
    return Writable(dataclasses.replace(member, settings=settings), writer)


def _extend(members: list[Writable], wanted: Extension) -> None:
    """Writes what is wanted into the journals, once nothing of it can be refused."""
    spaces: list[Space | None] = [None] * len(members)
    datasets = unchanged.datasets(one.member for one in members)
    for one, dataset in zip(members, datasets, strict=True):
        unchanged.check_unchanged(one.member, one.journal.record.header, dataset.fingerprint)
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


def note_driver(members: list[Writable]) -> None:
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
