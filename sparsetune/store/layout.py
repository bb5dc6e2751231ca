"""Where sweeps, their members and trials lie, and what to type for them.

The rule to know: a sweep is a folder of member folders, each with a journal; whoever looks for one
asks here.
"""

from __future__ import annotations

import os
from pathlib import Path

from sparsetune.store import journal
from sparsetune.store.lines import exists, home
from sparsetune.store.paths import S3Path, place


def member_folders(storage: Path, name: str) -> list[Path]:
    """The folders of the members of sweep `name`, or of one member `name/space@density`.

    In the order in which they were asked for. ValueError where there is no such sweep.
    """
    if name.count("/") > 1:
        raise ValueError(f"name: '{name}' is neither a sweep nor a member, such as mnist/set@0.05")
    folder = storage / name
    members = [folder] if exists(folder) else []
    members = members or [path for path in inside(folder) if exists(path)]
    if not members:
        known = ", ".join(sweeps(storage)) or "none"
        raise ValueError(f"name: there is no sweep '{name}' in {storage}; there are: {known}")
    headers = {path: journal.header(path) for path in members}
    orders = {path: header["order"] for path, header in headers.items()}
    whole_sweep = members != [folder]
    if whole_sweep and isinstance(folder, S3Path) and 0 not in orders.values():  # is written last
        raise ValueError(
            f"name: creating '{name}' in {storage} was cut short, nothing was trained; delete it, "
            "or begin under another name"
        )
    names = next(iter(headers.values())).get("members", [])
    for member in names if whole_sweep else ():
        path = folder / member.partition("/")[2]
        if path not in headers:
            raise ValueError(
                f"{home(path)}: no journal here, and the sweep has this member; restore "
                f"it from a copy, or name a member: {name}/{members[0].name}"
            )
    return sorted(members, key=lambda path: (orders[path], path.name))


def inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def sweeps(storage: Path) -> list[str]:
    """Names of the sweeps in a storage."""
    folders = [path for path in inside(storage) if not path.name.startswith(".")]
    return sorted(path.name for path in folders if any(map(exists, inside(path))))


def trial_folder(member_folder: Path, number: int) -> Path:
    return member_folder.resolve() / "trials" / f"{number:05d}"


def resume_command(folder: Path, verb: str = "resume", member: str = "") -> str:
    """What to type for a sweep, or that member of it; with its storage where it is not found
    without."""
    usual = place(os.environ.get("SPARSETUNE_STORAGE", "./sweeps")).resolve()
    words = "" if usual == folder.parent.resolve() else f" storage={folder.parent}"
    return f"sparsetune {verb} {member or folder.name}{words}"
