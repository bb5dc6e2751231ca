"""Confirmation: the best trials of a search on fresh seeds, and the winner on the test images.

The rule to know: the best of a search is the best of many draws, so nothing of it is a result. Its
best trials are ranked again, on seeds that the search never saw, by images held out; the winner is
trained once more per seed on all training images, and its test accuracy is read once per seed. A
seed varies initialisation, order, split and mask together and is the same for all members, which
pairs them.

All of it lies in the member's `confirm/`, a journal of the search's own form whose trials are the
runs; `winners.py` says how it is read.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetune import settings as fields
from sparsetune.cluster.tuner import check_cluster
from sparsetune.cluster.watch import Watch
from sparsetune.comparison import winners
from sparsetune.comparison.winners import Role, role, seed_of
from sparsetune.machine import versions
from sparsetune.space import config
from sparsetune.space.member import Member, Scheduling
from sparsetune.space.space import Point
from sparsetune.store import journal
from sparsetune.store.journal import Journal, Record, Trial
from sparsetune.store.layout import resume_command, trial_folder
from sparsetune.store.lines import exists
from sparsetune.store.paths import CheckpointLost, insist
from sparsetune.sweeps.create import Extension, Writable, note_driver, opened
from sparsetune.sweeps.progress import Progress
from sparsetune.sweeps.recording import Recording, wandb_folder
from sparsetune.sweeps.run import tune
from sparsetune.sweeps.status import counted, is_done
from sparsetune.training import checkpoint, data, trainer
from sparsetune.training.setup import setup_of

FIRST_SEED = 1001
NO_STOPPING = Scheduling("none", 1, 2.0, "confirmation stops no run early")


@dataclass(frozen=True)
class Asked:
    """What a confirmation was asked for; null: as it was begun, else the default."""

    seeds: int | None = fields.number(None, "fresh seeds of each winner; at first 5", least=2)
    top: int | None = fields.number(None, "trials that are ranked again; at first 3", least=1)
    full: bool | None = fields.setting(None, "train the winner on all training images, too")
    multiplier: int = fields.number(1, "how many times longer than the search", least=1)
    density: list[float] = fields.number(  # noqa: RUF009 - makes a field
        [], "where on a searched front to stand", above=0, most=1, of="each "
    )


KEYS = tuple(fields.keys_of(Asked))


def parse(words: Iterable[str]) -> Asked:
    """What `seeds=5`, `top=3`, `full=true`, `multiplier=2` ask for. ValueError for other values."""
    asked = config.read(Asked, words)
    return dataclasses.replace(asked, density=sorted(set(asked.density)))


@dataclass
class Confirmation:
    """A member's confirmation, which this process may write."""

    search: Writable
    runs: Writable

    @property
    def record(self) -> Record:
        return self.runs.journal.record

    @property
    def header(self) -> dict[str, Any]:
        return dict(self.record.header["confirm"])

    @property
    def num_seeds(self) -> int:
        """Seeds of its runs, those that were added to the winner's included."""
        begun = {seed_of(run) for run in self.record.trials.values()} | {*self.header["seeds"]}
        return int(self.header.get("num_seeds", len(begun)))

    def set_seeds(self, num: int) -> None:
        about = {"trials": self.record.asked, "confirm": self.header | {"num_seeds": num}}
        self.runs.journal.append({"type": "extend", **about})

    @property
    def winners(self) -> set[int | None]:
        return set(winners.by_density(self.search.member, self.record).values())


# The plan: which runs, in which order -------------------------------------------------------------


def _planned(search: Writable, asked: Asked) -> dict[str, Any]:
    """What the member's confirmation is, or is to be. ValueError where it cannot be as is asked."""
    member, record = search.member, search.record
    folder = winners.folder_of(search.folder, asked.multiplier)
    if exists(folder):
        header: dict[str, Any] = journal.header(folder)["confirm"]
        _check_same(search, header, asked, folder)
        return header
    top, num = asked.top or 3, asked.seeds or 5
    first = FIRST_SEED if abs(member.settings.seed - FIRST_SEED) > num else FIRST_SEED + 1000
    served: list[float | None] = [*asked.density] if winners.is_front(member) else [member.density]
    if not served:
        raise ValueError(
            f"density: {member.name} was searched for a front of accuracy and density; say "
            "where on it the method is to be compared, such as density=0.02,0.05"
        )
    able = {str(target): winners.candidates(member, record, top, target) for target in served}
    return {
        "seeds": list(range(first, first + num)),  # by which candidates are ranked
        "num_seeds": num,
        "top": top,
        "full": asked.full is not False,
        "multiplier": asked.multiplier,
        "trials": len(record.trials),
        "densities": served,
        "candidates": {key: [t.number for t in trials] for key, trials in able.items() if trials},
    }


def _begin(
    search: Writable, plan: dict[str, Any], asked: Asked, words: list[str], stack: ExitStack
) -> Confirmation:
    """Opens the member's confirmation, or creates it."""
    folder = winners.folder_of(search.folder, asked.multiplier)
    if exists(folder):
        writer = Journal.open(folder)
    else:
        kept = ("sweep_id", "order", "members", "data", "network", "code", "member")
        header = {key: value for key, value in search.record.header.items() if key in kept}
        header |= {"command": "confirm", "argv": ["confirm", *words], "trials": 0}
        writer = Journal.create(folder, header | {"versions": versions(), "confirm": plan})
    stack.callback(writer.close)
    writer.guard = search.journal.guard
    runs = Writable(_runs_member(search.member, asked.multiplier), writer)
    confirmation = Confirmation(search, runs)
    if asked.seeds and asked.seeds > confirmation.num_seeds:
        confirmation.set_seeds(asked.seeds)
    return confirmation


def _check_same(search: Writable, header: dict[str, Any], asked: Asked, folder: Path) -> None:
    name, num = search.member.name, len(search.record.trials)
    if header["trials"] != num:
        raise ValueError(
            f"confirm: {name} was confirmed after {header['trials']} trials and has {num} now; the "
            "test images may have been read for the best of the first ones. To confirm anew, "
            f"{_moved(folder)}"
        )
    choose = f"leave it out to go on, or begin anew: {_moved(folder)}"
    for key in ("top", "full"):
        wanted = getattr(asked, key)
        if wanted is not None and wanted != header[key]:
            raise ValueError(f"{key}: {name} is being confirmed with {key}={header[key]}; {choose}")
    if winners.is_front(search.member) and asked.density and asked.density != header["densities"]:
        raise ValueError(f"density: {name} is being confirmed at {header['densities']}; {choose}")
    own, first = search.member.settings.seed, header["seeds"][0]
    if first <= own < first + (asked.seeds or 0):
        raise ValueError(
            f"seeds: {asked.seeds} from {first} on have {own}, by which {name} was searched; at "
            f"most seeds={own - first}"
        )


def _moved(folder: Path) -> str:
    return f"move {folder} out of the sweep, and say so in your report"


def _runs_member(member: Member, multiplier: int) -> Member:
    """The member as its runs see it: nothing is bounded or decided by their values.

    With a multiplier they are as many times longer. Schedules are shares of training and stretch
    with it; the interval of topology updates stays, as in RigL's tables of longer training.
    """
    epochs = member.settings.epochs * multiplier
    # Without images held out there is no other objective.
    changed = {"epochs": epochs, "scheduler.name": "none", "objective": "train/loss"}
    settings = config.replaced(member.settings, changed)
    settings.constraint.clear()
    name = f"{member.name}/{winners.folder_of(Path(), multiplier).name}"
    return dataclasses.replace(member, name=name, settings=settings)


def _wanted(confirmation: Confirmation) -> list[Point]:
    """The runs that are there, and after them those that are missing, as far as is known yet."""
    search, asked = confirmation.search.record, confirmation.header
    best, full = confirmation.winners, asked["full"]
    begun = [
        Point(str(role(run)), run.params, run.fixed, in_study=False)
        for run in confirmation.record.trials.values()
    ]
    seeds = range(asked["seeds"][0], asked["seeds"][0] + confirmation.num_seeds)
    rivals = [numbers for numbers in asked["candidates"].values() if len(numbers) > 1 or not full]
    wanted = [
        (seed, Role("rank", number))
        for seed in seeds  # outside, since runs of one seed share their batches
        for number in dict.fromkeys(itertools.chain(*rivals))
        if seed in asked["seeds"] or (not full and number in best)
    ]
    if None not in best:
        known = sorted(number for number in best if number is not None)
        roles = [Role("final", number) for number in known] if full else []
        paper = winners.paper_trial(search)
        roles += [Role("paper", paper)] if paper is not None and paper not in best else []
        wanted += itertools.product(seeds, roles)
    points = []
    for seed, purpose in wanted:
        trial = search.trials[purpose.number]
        fixed = trial.fixed | {"seed": seed, "order_seed": seed}
        if purpose.name != "rank" and full:
            fixed["data.validation"] = 0.0
        points.append(Point(str(purpose), trial.params, fixed, in_study=False))
    return begun + [point for point in points if point not in begun]


# Running it ---------------------------------------------------------------------------------------


class _Recording(Recording):
    """Confirmation runs in W&B: one per seed, with the test accuracy in its summary."""

    def __init__(self, confirmations: list[Confirmation]) -> None:
        self._confirmations = {c.runs.member.name: c for c in confirmations}
        folder = wandb_folder(confirmations[0].search)
        super().__init__([confirmation.runs for confirmation in confirmations], folder)

    def about(self, writable: Writable, trial: Trial) -> tuple[str, str] | None:
        confirmation = self._confirmations[writable.member.name]
        purpose = role(trial)
        result = purpose.name != "rank"
        if not result and not confirmation.header["full"]:
            if None in (best := confirmation.winners):
                return None  # whether it serves as a final run is not known before
            result = purpose.number in best
        group = winners.group_of(confirmation.search.member, confirmation.record, purpose)
        return group, "confirm" if result else "rank"

    def complete(self, writable: Writable, trial: Trial) -> bool:
        tested = trial.test is not None or trial.status != "finished"
        return tested or (self.about(writable, trial) or ("", ""))[1] == "rank"


def _tested(confirmation: Confirmation) -> list[Trial]:
    """The finished runs whose test accuracy is to be read."""
    judged = {(winners.serving(confirmation.record), number) for number in confirmation.winners}
    return [
        run
        for run in confirmation.record.trials.values()
        if run.status == "finished" and (role(run).name == "paper" or role(run) in judged)
    ]


@contextmanager
def begun(
    storage: Path, name: str, asked: Asked, wanted: Extension, words: Sequence[str] = ()
) -> Iterator[list[Confirmation]]:
    """The confirmations of a finished sweep, or of one member, ours to write until the end.

    `wanted`: where runs are trained, for this time alone, and whether failed ones are tried again.
    A new one's journals keep the `words`. ValueError for what cannot be confirmed as is asked,
    ClusterError as in `sweeps.create.opened`.
    """
    with ExitStack() as stack:
        here = dataclasses.replace(wanted, retry_failed=False)
        searches = stack.enter_context(opened(storage, name, here))
        for search in searches:
            _check(search)
        if asked.density and not any(winners.is_front(search.member) for search in searches):
            raise ValueError(
                f"density: {name} was searched at densities of its own; it is for a search for a "
                "front of accuracy and density. To confirm some members, name them: SWEEP/MEMBER"
            )
        planned = [(search, _planned(search, asked)) for search in searches]
        for search, plan in planned:
            if not plan["candidates"]:
                print(f"{search.member.name}: infeasible, no finished trial within its bounds")
        able = [(search, plan) for search, plan in planned if plan["candidates"]]
        if not able:
            raise ValueError(f"confirm: there is no trial of {name} that could be confirmed")
        check_cluster(searches[0].member.settings.ray, searches[0].folder.parent)
        confirmations = [_begin(search, plan, asked, [*words], stack) for search, plan in able]
        for confirmation in confirmations if wanted.retry_failed else ():
            _retry(confirmation)
        yield confirmations


def _check(search: Writable) -> None:
    record, member = search.record, search.member
    if record.header["command"] != "sweep":
        raise ValueError(f"confirm: '{member.name}' is no search; confirm a sweep")
    if not is_done(record):
        ended = sum(trial.status != "running" for trial in record.trials.values())
        raise ValueError(
            f"confirm: {member.name} has {ended} of {record.asked} trials; finish the search by: "
            f"{resume_command(search.folder.parent)}"
        )
    winners.accuracy_name(member)


def _retry(confirmation: Confirmation) -> None:
    """Opens failed runs again; not rankings that the winner was chosen over already."""
    runs, best = [*confirmation.record.trials.values()], confirmation.winners
    chosen = any(role(run).name == "final" or run.test is not None for run in runs)
    for run in runs:
        serves = not confirmation.header["full"] and role(run).number in best
        settled = chosen and role(run).name == "rank" and not serves
        if run.status == "failed" and not settled:
            confirmation.runs.journal.append({"type": "retry", "number": run.number})


def run(confirmations: list[Confirmation]) -> dict[str, Any]:
    """Trains the runs that are missing, reads what is to be tested; prints and returns what came
    of it."""
    note_driver([confirmation.runs for confirmation in confirmations])
    recording = _Recording(confirmations)
    with Progress({c.runs.member.name: (None, c.record) for c in confirmations}) as bar:
        watch = Watch(recording.send, bar)
        for confirmation in confirmations:
            confirmation.runs.journal.trouble = watch.trouble
        # First the rankings, then the winners, whom nobody knows before.
        while watch.leaving_since is None and (due := [c for c in confirmations if _extend(c)]):
            wanted = [_wanted(confirmation) for confirmation in due]
            tune([confirmation.runs for confirmation in due], NO_STOPPING, watch, wanted)
        for confirmation in confirmations if watch.leaving_since is None else ():
            read_tests(confirmation, watch)
    recording.send(last=True)
    upload = recording.tracker.close()
    for problem in recording.tracker.problems:
        print(problem, file=sys.stderr)
    return _close(confirmations, upload, watch.leaving_since is not None)


def command(confirmations: list[Confirmation]) -> str:
    """What to type to go on."""
    first = confirmations[0]
    whole = first.search.record.header["members"]
    member = first.search.member.name if len(confirmations) == 1 < len(whole) else ""
    words = winners.command_for(first.search.folder.parent, first.header["multiplier"], member)
    seeds = max(confirmation.num_seeds for confirmation in confirmations)
    return words + (f" seeds={seeds}" if seeds > len(first.header["seeds"]) else "")


def _extend(confirmation: Confirmation) -> bool:
    """Has the confirmation runs to train? Those that are known by now are asked for."""
    record = confirmation.record
    if "num_seeds" not in confirmation.header and None not in confirmation.winners:
        # Journals of version 0.1.0 say how many runs were asked for, and not of how many seeds.
        while len(_wanted(confirmation)) < record.asked:
            confirmation.set_seeds(confirmation.num_seeds + 1)
    num = len(_wanted(confirmation))
    if num > record.asked:
        confirmation.runs.journal.append({"type": "extend", "trials": num})
    running = any(run.status == "running" for run in record.trials.values())
    return running or len(record.trials) < num


def read_tests(confirmation: Confirmation, watch: Watch) -> None:
    """Reads the test accuracy of each run that is due for it: once, says the journal."""
    runs = confirmation.runs
    for run in _tested(confirmation):
        if run.test is not None or watch.leaving_since is not None:
            continue
        settings = runs.member.trial_settings(run.params, run.fixed)
        folder = trial_folder(runs.folder, run.number)
        setup = setup_of(settings, confirmation.search.member.settings.device)
        restore = functools.partial(checkpoint.restore, setup, folder)
        state, _ = insist(restore, watch.trouble)
        if state.epoch != settings.epochs:
            raise CheckpointLost(
                f"{folder}: the checkpoint of epoch {settings.epochs} is missing; restore it from "
                f"a copy, or begin anew: {_moved(runs.folder)}"
            )
        loss, accuracy = trainer.evaluate(setup, state, data.load_test(settings.data))
        metrics = {"test/accuracy": accuracy, "test/loss": loss}
        runs.journal.append({"type": "test", "number": run.number, "metrics": metrics})
        watch.tick()


def _close(confirmations: list[Confirmation], upload: str | None, left: bool) -> dict[str, Any]:
    folder = confirmations[0].search.folder.parent
    members: list[dict[str, Any]] = []
    for confirmation in confirmations:
        name, tested = confirmation.search.name, _tested(confirmation)
        accuracies = {}
        for number in sorted(number for number in confirmation.winners if number is not None):
            tests = [t.test["test/accuracy"] for t in tested if t.test and role(t).number == number]
            if tests:
                accuracies[number] = tests
                mean = statistics.fmean(tests)
                print(f"{name}: trial {number}, test accuracy {mean:.2%} over {len(tests)} seeds")
        for run in confirmation.record.trials.values():
            if run.status == "failed":
                print(f"failed: {confirmation.runs.name} trial {run.number}: {run.error}")
        trials = counted(confirmation.record)
        members.append({"name": name, "trials": trials, "test/accuracy": accuracies})
    if upload:
        print(f"W&B records are offline; upload them by: {upload}")
    if left:
        print(f"Interrupted. Go on by: {command(confirmations)}")
        return {"name": folder.name, "state": "interrupted", "members": members}
    if any(member["trials"]["failed"] for member in members):
        print(f"Try failed runs again by: {command(confirmations)} --retry-failed")
    print(f"Compare by: {resume_command(folder, 'compare')}")
    return {"name": folder.name, "state": "finished", "members": members}
