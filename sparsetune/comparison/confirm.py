"""Confirmation: the best trials of a search on fresh seeds, and the winner on the test images.

The rule to know: the best of a search is the best of many draws, so nothing of it is a result. Its
best trials are ranked again, on seeds that the search never saw, by images held out; the winner is
trained once more per seed on all training images, and its test accuracy is read once per seed. A
seed varies initialisation, order, split and mask together and is the same for all members, which
pairs them.

All of it lies in the member's `confirm/`, a journal of the search's own form whose trials are the
runs. `origin` says what a run is for: `start:rank 12` ranks trial 12 of the search, `start:final
12` trains the winner, `start:paper 0` the start point `paper`, untuned. The winner is computed from
the rankings and stays what it is: seeds that are added later are added to it alone.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetune.cluster.tuner import check_cluster
from sparsetune.cluster.watch import Watch
from sparsetune.comparison.winners import (
    accuracy_name,
    candidates,
    command_for,
    folder_of,
    group_of,
    is_front,
    role,
    seed_of,
    serving,
    winner,
)
from sparsetune.machine import versions
from sparsetune.space.config import replaced
from sparsetune.space.member import Member, Scheduling
from sparsetune.space.space import Point
from sparsetune.store import journal
from sparsetune.store.journal import Journal, Trial
from sparsetune.store.layout import resume_command, trial_folder
from sparsetune.store.paths import CheckpointLost, insist
from sparsetune.sweeps.create import Extension, Writable, note_driver, opened
from sparsetune.sweeps.progress import Progress
from sparsetune.sweeps.recording import Recording, wandb_folder
from sparsetune.sweeps.run import tune
from sparsetune.sweeps.status import is_done
from sparsetune.training import checkpoint, data, trainer
from sparsetune.training.setup import setup_of

FIRST_SEED = 1001
LEAST = {"seeds": 2, "top": 1, "multiplier": 1}
KEYS = (*LEAST, "full", "density")
NO_STOPPING = Scheduling("none", 1, 2.0, "confirmation stops no run early")


@dataclass(frozen=True)
class Asked:
    """What a confirmation was asked for; None: as it was begun, else the default."""

    seeds: int | None = None
    top: int | None = None
    full: bool | None = None
    multiplier: int = 1
    density: tuple[float, ...] = ()  # that a search for a front of densities is to stand at


def parse(words: Iterable[str]) -> Asked:
    """What `seeds=5`, `top=3`, `full=true`, `multiplier=2` ask for. ValueError for other values."""
    given: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key == "full":
            if value.lower() not in ("true", "false"):
                raise ValueError(f"full: '{value}' is neither true nor false")
            given[key] = value.lower() == "true"
        elif key == "density":
            try:
                given[key] = tuple(sorted({float(each) for each in value.split(",")}))
            except ValueError:
                raise ValueError(f"density: '{value}' is no list such as 0.02,0.05") from None
            if not all(0 < each <= 1 for each in given[key]):
                raise ValueError(f"density: '{value}' has something that is not in (0, 1]")
        elif not value.isdecimal() or int(value) < LEAST[key]:
            raise ValueError(f"{key}: '{value}' is no whole number of {LEAST[key]} or more")
        else:
            given[key] = int(value)
    return Asked(**given)


@dataclass
class Confirmation:
    """A member's confirmation, which this process may write."""

    search: Writable
    runs: Writable
    seeds: int

    @property
    def header(self) -> dict[str, Any]:
        asked: dict[str, Any] = self.runs.journal.record.header["confirm"]
        return asked


# What a journal says of roles and winners; for readers too ----------------------------------------


# The plan: which runs, in which order -------------------------------------------------------------


def _planned(one: Writable, asked: Asked) -> dict[str, Any]:
    """What the member's confirmation is, or is to be. ValueError where it cannot be as is asked."""
    member, record = one.member, one.journal.record
    folder = folder_of(one.folder, asked.multiplier)
    if journal.exists(folder):
        header: dict[str, Any] = journal.header(folder)["confirm"]
        _check_same(one, header, asked, folder)
        return header
    top, num = asked.top or 3, asked.seeds or 5
    first = FIRST_SEED if abs(member.settings.seed - FIRST_SEED) > num else FIRST_SEED + 1000
    served: list[float | None] = [*asked.density] if is_front(member) else [member.density]
    if not served:
        raise ValueError(
            f"density: {member.name} was searched for a front of accuracy and density; say "
            "where on it the method is to be compared, such as density=0.02,0.05"
        )
    found = {str(t): [c.number for c in candidates(member, record, top, t)] for t in served}
    return {
        "seeds": list(range(first, first + num)),
        "top": top,
        "full": asked.full is not False,
        "multiplier": asked.multiplier,
        "trials": len(record.trials),
        "densities": served,
        "candidates": {target: numbers for target, numbers in found.items() if numbers},
    }


def _begin(one: Writable, planned: dict[str, Any], asked: Asked, stack: ExitStack) -> Confirmation:
    """Opens the member's confirmation, or creates it."""
    folder = folder_of(one.folder, asked.multiplier)
    if journal.exists(folder):
        writer = Journal.open(folder)
    else:
        kept = ("sweep_id", "order", "members", "data", "code", "member")
        header = {key: value for key, value in one.journal.record.header.items() if key in kept}
        header |= {"command": "confirm", "argv": sys.argv[1:], "trials": 0}
        writer = Journal.create(folder, header | {"versions": versions(), "confirm": planned})
    stack.callback(writer.close)
    writer.guard = one.journal.guard
    had = {seed_of(trial) for trial in writer.record.trials.values()}
    had |= set(writer.record.header["confirm"]["seeds"])
    return Confirmation(
        one,
        Writable(_runs_member(one, asked.multiplier), writer),
        max(asked.seeds or 0, len(had)),
    )


def _check_same(one: Writable, header: dict[str, Any], asked: Asked, folder: Path) -> None:
    if header["trials"] != len(one.journal.record.trials):
        raise ValueError(
            f"confirm: {one.member.name} was confirmed after {header['trials']} trials and has "
            f"{len(one.journal.record.trials)} now; the test images may have been read for the "
            f"best of the first ones. To confirm anew, {_moved(folder)}"
        )
    for key in ("top", "full"):
        wanted = getattr(asked, key)
        if wanted is not None and wanted != header[key]:
            raise ValueError(
                f"{key}: {one.member.name} is being confirmed with {key}={header[key]}; leave it "
                f"out to go on, or begin anew: {_moved(folder)}"
            )
    if is_front(one.member) and asked.density and [*asked.density] != header["densities"]:
        raise ValueError(
            f"density: {one.member.name} is being confirmed at {header['densities']}; leave it out "
            f"to go on, or begin anew: {_moved(folder)}"
        )
    own, first = one.member.settings.seed, header["seeds"][0]
    if first <= own < first + (asked.seeds or 0):
        raise ValueError(
            f"seeds: {asked.seeds} from {first} on have {own}, by which {one.member.name} was "
            f"searched; at most seeds={own - first}"
        )


def _moved(folder: Path) -> str:
    return f"move {folder} out of the sweep, and say so in your report"


def _runs_member(one: Writable, multiplier: int) -> Member:
    """The member as its runs see it: nothing is bounded or decided by their values.

    With a multiplier they are as many times longer. Schedules are shares of training and stretch
    with it; the interval of topology updates stays, as in RigL's tables of longer training.
    """
    settings = replaced(
        one.member.settings,
        {
            "epochs": one.member.settings.epochs * multiplier,
            "scheduler.name": "none",
            "objective": "train/loss",  # without images held out there is no other
        },
    )
    settings.constraint.clear()
    name = f"{one.member.name}/{folder_of(Path(), multiplier).name}"
    return dataclasses.replace(one.member, name=name, settings=settings)


def _wanted(one: Confirmation) -> list[Point]:
    """The runs that are there, and after them those that are missing, as far as is known yet."""
    record, asked = one.runs.journal.record, one.header
    begun = [
        Point(trial.origin.removeprefix("start:"), trial.params, trial.fixed, in_study=False)
        for trial in record.trials.values()
    ]
    first = asked["seeds"][0]
    seeds, candidates = range(first, first + one.seeds), asked["candidates"]
    winners = _winners(one)
    wanted: list[Point] = []
    ranked = [
        number
        for numbers in candidates.values()
        for number in numbers
        if len(numbers) > 1 or not asked["full"]
    ]
    for seed in seeds:  # seeds outside, since runs of one seed share their batches
        for number in dict.fromkeys(ranked):
            if seed in asked["seeds"] or (not asked["full"] and number in winners):
                wanted.append(_run(one, "rank", number, seed))
    if None not in winners:
        searched = one.search.journal.record.trials.values()
        paper = [t for t in searched if t.origin == "start:paper" and t.number not in winners]
        for seed in seeds:
            finals = sorted({int(number) for number in winners if number is not None})
            wanted += [_run(one, "final", number, seed) for number in finals if asked["full"]]
            wanted += [_run(one, "paper", trial.number, seed) for trial in paper]
    return begun + [point for point in wanted if point not in begun]


def _target(key: str) -> float | None:
    return None if key == "None" else float(key)


def _run(one: Confirmation, name: str, number: int, seed: int) -> Point:
    trial = one.search.journal.record.trials[number]
    fixed = trial.fixed | {"seed": seed, "order_seed": seed}
    if name != "rank" and one.header["full"]:
        fixed["data.validation"] = 0.0
    return Point(f"{name} {number}", trial.params, fixed, in_study=False)


# Running it ---------------------------------------------------------------------------------------


class _Recording(Recording):
    """Confirmation runs in W&B: one per seed, with the test accuracy in its summary."""

    def __init__(self, confirmations: list[Confirmation]) -> None:
        self._confirmations = {one.runs.member.name: one for one in confirmations}
        first = confirmations[0]
        runs = [one.runs for one in confirmations]
        super().__init__(runs, wandb_folder(first.search))

    def about(self, one: Writable, trial: Trial) -> tuple[str, str] | None:
        confirmation = self._confirmations[one.member.name]
        name, number = role(trial)
        result = name != "rank"
        if not result and not confirmation.header["full"]:
            winners = _winners(confirmation)
            if None in winners:
                return None  # whether it serves as a final run is not known before
            result = number in winners
        record = confirmation.runs.journal.record
        group = group_of(confirmation.search.member, record, name, number)
        return group, "confirm" if result else "rank"

    def complete(self, one: Writable, trial: Trial) -> bool:
        tested = trial.test is not None or trial.status != "finished"
        return tested or (self.about(one, trial) or ("", ""))[1] == "rank"


def _winners(one: Confirmation) -> set[int | None]:
    record = one.runs.journal.record
    return {winner(one.search.member, record, _target(key)) for key in one.header["candidates"]}


def _tested(one: Confirmation) -> list[Trial]:
    """The finished runs whose test accuracy is to be read."""
    record = one.runs.journal.record
    mine = {(serving(record), number) for number in _winners(one)}
    return [
        trial
        for trial in record.trials.values()
        if trial.status == "finished" and (role(trial)[0] == "paper" or role(trial) in mine)
    ]


@contextmanager
def begun(
    storage: Path, name: str, asked: Asked, wanted: Extension
) -> Iterator[list[Confirmation]]:
    """The confirmations of a finished sweep, or of one member, ours to write until the end.

    `wanted`: where runs are trained, for this time alone, and whether failed ones are tried again.
    ValueError for what cannot be confirmed, or not as is asked.
    """
    with ExitStack() as stack:
        here = dataclasses.replace(wanted, retry_failed=False)
        members = stack.enter_context(opened(storage, name, here))
        for one in members:
            _check(one)
        if asked.density and not any(is_front(one.member) for one in members):
            raise ValueError(
                f"density: {name} was searched at densities of its own; it is for a search for a "
                "front of accuracy and density. To confirm some members, name them: SWEEP/MEMBER"
            )
        planned = [_planned(one, asked) for one in members]
        able = []
        for one, plan in zip(members, planned, strict=True):
            if plan["candidates"]:
                able.append((one, plan))
            else:
                print(f"{one.member.name}: infeasible, no finished trial within its bounds")
        if not able:
            raise ValueError(f"confirm: there is no trial of {name} that could be confirmed")
        confirmations = [_begin(one, plan, asked, stack) for one, plan in able]
        for each in confirmations if wanted.retry_failed else ():
            _retry(each)
        yield confirmations


def _check(one: Writable) -> None:
    record, member = one.journal.record, one.member
    if record.header["command"] != "sweep":
        raise ValueError(f"confirm: '{member.name}' is no search; confirm a sweep")
    if not is_done(record):
        ended = sum(trial.status != "running" for trial in record.trials.values())
        raise ValueError(
            f"confirm: {member.name} has {ended} of {record.asked} trials; finish the search by: "
            f"{resume_command(one.folder.parent)}"
        )
    accuracy_name(member)


def _retry(one: Confirmation) -> None:
    """Opens failed runs again; not rankings that the winner was chosen over already."""
    trials, winners = list(one.runs.journal.record.trials.values()), _winners(one)
    chosen = any(role(trial)[0] == "final" or trial.test is not None for trial in trials)
    for trial in trials:
        name, number = role(trial)
        settled = chosen and name == "rank" and (one.header["full"] or number not in winners)
        if trial.status == "failed" and not settled:
            one.runs.journal.append({"type": "retry", "number": trial.number})


def run(confirmations: list[Confirmation]) -> int:
    """Trains the runs that are missing and reads what is to be tested.

    Exit status: 0 done, 1 runs failed, 130 interrupted. ClusterError as in `sweep.run`.
    """
    folder = confirmations[0].search.folder.parent
    settings = confirmations[0].search.member.settings
    check_cluster(settings.ray, folder)
    note_driver([one.runs for one in confirmations])
    recording = _Recording(confirmations)
    shown = {one.runs.member.name: (None, one.runs.journal.record) for one in confirmations}
    with Progress(shown) as bar:
        watch = Watch(recording.send, bar)
        for one in confirmations:
            one.runs.journal.trouble = watch.trouble
        # First the rankings, then the winners, whom nobody knows before.
        while watch.leaving_since is None and (due := [o for o in confirmations if _extend(o)]):
            runs = [_wanted(one) for one in due]
            tune([one.runs for one in due], NO_STOPPING, watch, runs)
        for one in confirmations if watch.leaving_since is None else ():
            read_tests(one, watch)
    recording.send(last=True)
    upload = recording.tracker.close()
    for problem in recording.tracker.problems:
        print(problem, file=sys.stderr)
    return _close(folder, confirmations, upload, watch.leaving_since is not None)


def command(confirmations: list[Confirmation]) -> str:
    """What to type to go on."""
    first = confirmations[0]
    whole = first.search.journal.record.header["members"]
    member = first.search.member.name if len(confirmations) == 1 < len(whole) else ""
    words = command_for(first.search.folder.parent, first.header["multiplier"], member)
    seeds = max(one.seeds for one in confirmations)
    return words + (f" seeds={seeds}" if seeds > len(first.header["seeds"]) else "")


def _extend(one: Confirmation) -> bool:
    """Has the confirmation runs to train? Those that are known by now are asked for."""
    record = one.runs.journal.record
    # More seeds may have been asked for before, of which no run was begun.
    while (num := len(_wanted(one))) < record.asked and None not in _winners(one):
        one.seeds += 1
    if num > record.asked:
        one.runs.journal.append({"type": "extend", "trials": num})
    return not is_done(record)


def read_tests(one: Confirmation, watch: Watch) -> None:
    """Reads the test accuracy of each run that is due for it: once, says the journal."""
    for trial in _tested(one):
        if trial.test is not None or watch.leaving_since is not None:
            continue
        settings = one.runs.member.trial_settings(trial.params, trial.fixed)
        folder = trial_folder(one.runs.folder, trial.number)
        setup = setup_of(settings, one.search.member.settings.device)
        state, _ = insist(lambda: checkpoint.restore(setup, folder), watch.trouble)  # noqa: B023
        if state.epoch != settings.epochs:
            raise CheckpointLost(
                f"{folder}: the checkpoint of epoch {settings.epochs} is missing; restore it from "
                f"a copy, or begin anew: {_moved(one.runs.folder)}"
            )
        loss, accuracy = trainer.evaluate(setup, state, data.load_test(settings.data))
        metrics = {"test/accuracy": accuracy, "test/loss": loss}
        one.runs.journal.append({"type": "test", "number": trial.number, "metrics": metrics})
        watch.tick()


def _close(folder: Path, confirmations: list[Confirmation], upload: str | None, left: bool) -> int:
    failed = False
    for one in confirmations:
        record, name = one.runs.journal.record, one.search.member.name
        for number in sorted(each for each in _winners(one) if each is not None):
            found = [t.test for t in _tested(one) if t.test and role(t)[1] == number]
            if tests := [test["test/accuracy"] for test in found]:
                mean = statistics.fmean(tests)
                print(f"{name}: trial {number}, test accuracy {mean:.2%} over {len(tests)} seeds")
        for trial in record.trials.values():
            if trial.status == "failed":
                failed = True
                print(f"failed: {one.runs.member.name} trial {trial.number}: {trial.error}")
    if upload:
        print(f"W&B records are offline; upload them by: {upload}")
    if left:
        print(f"Interrupted. Go on by: {command(confirmations)}")
        return 130
    if failed:
        print(f"Try failed runs again by: {command(confirmations)} --retry-failed")
    print(f"Compare by: {resume_command(folder, 'compare')}")
    return 1 if failed else 0
