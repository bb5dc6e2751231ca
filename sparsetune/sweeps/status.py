"""What a sweep's journals add up to, for people and for scripts. Reads only; needs no Ray.

The rule to know: best is the best FINISHED trial that keeps the constraint, by its last epoch.
A trial that was stopped early is never best, whatever it had reached.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from sparsetune.space.member import Member, load_member
from sparsetune.store import journal
from sparsetune.store.journal import Trial
from sparsetune.store.layout import member_folders, sweeps
from sparsetune.store.lock import holder
from sparsetune.terminal import settings_shown, shown, wide_console

STATUSES = ("finished", "running", "stopped", "diverged", "failed")


def is_done(record: journal.Record) -> bool:
    """Has every trial that was asked for ended?"""
    return len(record.trials) >= record.asked and all(
        trial.status != "running" for trial in record.trials.values()
    )


def feasible(member: Member, record: journal.Record) -> list[Trial]:
    """Finished trials that keep the constraint."""
    finished = (trial for trial in record.trials.values() if trial.status == "finished")
    return [t for t in finished if member.constraint(t.reports[-1].metrics) <= 0]


def front(member: Member, record: journal.Record) -> list[Trial]:
    """The best feasible trial, or for several objectives those that no other one beats in all."""
    signs = [1 if direction == "maximize" else -1 for direction in member.directions]

    def scores(trial: Trial) -> list[float]:
        metrics = trial.reports[-1].metrics
        return [sign * metrics[name] for sign, name in zip(signs, member.objectives, strict=True)]

    # Whoever beats a trial comes before it in this order, and so does one that nobody beats.
    ordered = sorted(
        ((scores(trial), trial) for trial in feasible(member, record)),
        key=lambda scored: (scored[0], -scored[1].number),
        reverse=True,
    )
    if len(signs) == 1:
        return [trial for _, trial in ordered[:1]]
    best: list[tuple[list[float], Trial]] = []
    for mine, trial in ordered:
        if not any(
            other != mine and all(a >= b for a, b in zip(other, mine, strict=True))
            for other, _ in best
        ):
            best.append((mine, trial))
    return sorted((trial for _, trial in best), key=lambda trial: trial.number)


def _described(member: Member, trial: Trial) -> dict[str, Any]:
    last = trial.reports[-1].metrics
    values = [last[name] for name in member.objectives]
    return {
        "trial": trial.number,
        "value": values[0] if len(values) == 1 else values,
        "config": trial.params | trial.fixed,
    }


def counted(record: journal.Record) -> dict[str, int]:
    """{"total": those asked for, "finished": ..., ...}"""
    statuses = [trial.status for trial in record.trials.values()]
    return {"total": record.asked} | {status: statuses.count(status) for status in STATUSES}


def summary(folder: Path, driven: bool = True) -> dict[str, Any]:
    """One member: the keys that `sparsetune status --json` promises.

    `driven=False` says that whoever holds the sweep's lock is about to let go.
    """
    member, record = load_member(folder)
    trials = record.trials.values()
    best = [_described(member, trial) for trial in front(member, record)]
    state = "finished" if is_done(record) else "interrupted"
    if state == "interrupted" and driven and holder(folder.parent) is not None:
        state = "running"
    result: dict[str, Any] = {
        "name": member.name,
        "state": state,
        "trials": counted(record),
        "epochs_trained": sum(len(trial.reports) for trial in trials),
        "best": (best if len(member.objectives) > 1 else best[0]) if best else None,
        "device_seconds": round(
            sum(r.metrics.get("device_seconds", 0.0) for t in trials for r in t.reports), 3
        ),
    }
    if not best:
        reached = [
            trial.reports[-1].metrics["density/all"]
            for trial in trials
            if trial.status == "finished" and "density/all" in trial.reports[-1].metrics
        ]
        result["lowest_density"] = min(reached, default=None)
    return result


def sweep_status(folders: list[Path], driven: bool = True) -> dict[str, Any]:
    """A sweep of one member is that member itself; several stand in `members`."""
    members = [summary(folder, driven) for folder in folders]
    if len(members) == 1:
        return members[0]
    states = {member["state"] for member in members}
    state = next(s for s in ("running", "interrupted", "finished") if s in states)
    return {"name": folders[0].parent.name, "state": state, "members": members}


def all_status(storage: Path) -> dict[str, Any]:
    """Every sweep of a storage; one that cannot be read says why instead."""
    result = []
    for name in sweeps(storage):
        try:
            result.append(sweep_status(member_folders(storage, name)))
        except ValueError as error:  # JournalError, or settings that this version does not know
            result.append({"name": name, "state": "unreadable", "error": str(error)})
    return {"sweeps": result}


def print_members(members: list[dict[str, Any]]) -> None:
    """The table of members: trials by how they ended, the best one; below it the settings."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("member", "state", "done", "stopped", "diverged", "failed", "best", "trial"):
        left = heading in ("member", "state")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    notes = []
    for member in members:
        trials = member["trials"]
        ended = sum(trials[key] for key in ("finished", "stopped", "diverged", "failed"))
        row = [member["name"], member["state"], f"{ended}/{trials['total']}"]
        row += [str(trials[key]) for key in ("stopped", "diverged", "failed")]
        front = member["best"] if isinstance(member["best"], list) else [member["best"]]
        if front[0] is None:
            lowest = member.get("lowest_density")
            if lowest is not None:
                notes.append(f"{member['name']}: none feasible, lowest density {lowest:.4f}")
            table.add_row(*row, "-", "-")
        for best in filter(None, front):
            table.add_row(*row, shown(best["value"]), str(best["trial"]))
            notes.append(
                f"{member['name']} trial {best['trial']}: {settings_shown(best['config'])}"
            )
            row = [""] * len(row)  # further trials of a front stand below the first
    console = wide_console()
    console.print(table)
    for note in notes:
        console.print(f"  {note}", style="dim", highlight=False, soft_wrap=True)
