"""The rules of a fair comparison, each checked by machine.

The rule to know: a rule holds, is broken, or does not apply, and says by what figure; where one is
broken, it also says what mends it, and 1-4 and 8-12 forbid a ranking then. Sources: 1, 2 AlgoPerf
(Dahl et al. 2023, arXiv:2306.07179); 3 Dodge et al. 2019, arXiv:1909.03004; 4, 13 Bouthillier et
al. 2021, arXiv:2103.03098; 5 Agarwal et al. 2021, arXiv:2108.13264; 6, 7 Blalock et al. 2020,
arXiv:2003.03033; 8 Sundar and Dwaraknath 2021, arXiv:2109.12508; 9 Dettmers and Zettlemoyer 2019,
arXiv:1907.04840, whose figure moves by 4 points with the layers that are left dense.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsetune.comparison.values import SLACK, Cell, Rule
from sparsetune.comparison.winners import (
    DENSITY,
    accuracy_name,
    command_for,
    folder_of,
    is_front,
    role,
)
from sparsetune.settings import TrialSettings, to_dict
from sparsetune.space.config import flatten
from sparsetune.space.member import Member, Scheduling
from sparsetune.store import journal
from sparsetune.store.layout import resume_command
from sparsetune.sweeps.status import is_done

SPREAD = 0.25  # of epochs spent in searching, the most over the fewest, less one
FLOOR, WANTED = 3, 5  # confirmation seeds
SMALL_DENSE = 0.1  # a dense network of whole neurons cannot meet every number of weights
SHARED = ("optimizer.lr", "optimizer.weight_decay", "optimizer.beta2", "optimizer.eps")
CONTROLS = ("dense", "small_dense", "static", "gmp")
State = Literal["holds", "broken", "does not apply"]


@dataclass(frozen=True)
class Entry:
    """A cell and what it was made from."""

    cell: Cell
    folder: Path  # of the member
    member: Member
    record: journal.Record  # of the search
    runs: journal.Record | None  # of the confirmation
    scheduling: Scheduling

    @property
    def settings(self) -> TrialSettings:
        """The winner's; the member's where there is none."""
        line = self.cell.chosen
        trial = self.record.trials[line.trial] if line else None
        return self.member.trial_settings(*((trial.params, trial.fixed) if trial else ({}, {})))

    @property
    def confirm(self) -> str:
        """What to type to confirm it."""
        return command_for(self.folder.parent, self.cell.multiplier)

    @property
    def newest(self) -> float:
        """When its last run or trial ended."""
        records = [self.record, *([self.runs] if self.runs else [])]
        return max((t.ended or 0.0 for each in records for t in each.trials.values()), default=0.0)


class _Found(Exception):
    """A rule is broken: the figure, and what mends it."""

    def __init__(self, figure: str, mend: str) -> None:
        self.figure, self.mend = figure, mend
        super().__init__(figure)


def rules(entries: list[Entry], levels: dict[str, list[str]], match: str) -> list[Rule]:
    """All sixteen, in their order."""
    confirmed = [e for e in entries if e.cell.state == "confirmed"]
    checks: list[tuple[str, bool, Callable[[], str]]] = [
        ("equal tuning budgets, one policy", True, lambda: _budgets(entries)),
        ("selection on validation, the test set read once", True, lambda: _selection(entries)),
        ("winners trained again on fresh seeds", True, lambda: _fresh(entries)),
        ("at least 5 seeds (3 is the floor)", True, lambda: _seeds(confirmed)),
        ("intervals, not points", False, lambda: _intervals(confirmed)),
        ("several densities, with controls", False, lambda: _controls(entries)),
        ("nonzero parameters and FLOPs", False, lambda: _costs(confirmed)),
        ("matched by one quantity, one initial distribution", True,
         lambda: _matched(entries, levels, match)),
        ("same network, data, epochs and dense layers", True, lambda: _same(entries)),
        ("realised density, measured at the end", True, lambda: _realised(confirmed)),
        ("no early-stopped run among the results", True, lambda: _stopped(confirmed)),
        ("failed, diverged and killed runs counted", True, lambda: _lost(entries, confirmed)),
        ("paired by seed, Holm's correction", False, lambda: _paired(confirmed)),
        ("spaces, costs, versions, commands are given", False, lambda: _reported(entries)),
        ("emergent density: at the density reached", False, lambda: _emergent(entries)),
        ("methods that need dense gradients are marked", False, lambda: _gradients(entries)),
    ]  # fmt: skip
    found = []
    for number, (title, forbids, check) in enumerate(checks, start=1):
        state: State = "holds"
        mend = ""
        try:
            figure = check()
            if not figure:
                state, figure = "does not apply", "nothing to check"
        except _Found as error:
            state, figure, mend = "broken", error.figure, error.mend
        found.append(Rule(number, title, state, figure, mend, forbids))
    return found


# What each finds: a figure; "" where it does not apply; _Found where it is broken -----------------


def _budgets(entries: list[Entry]) -> str:
    fewest = min(entries, key=lambda e: e.cell.tuning.asked)
    served = fewest.record.asked // max(1, fewest.cell.tuning.asked)
    trials = max(e.cell.tuning.asked for e in entries) * served
    for what, of, mend in (
        ("trials per member and density", lambda e: e.cell.tuning.asked,
         f"give all the same: {resume_command(fewest.folder.parent)} trials={trials}"),
        ("maximum epochs", lambda e: e.member.settings.epochs, _together(entries)),
        ("scheduler", lambda e: _scheduler(e.scheduling), _together(entries)),
        ("sampler", lambda e: _sampler(e.member), _together(entries)),
        ("seed of the search", lambda e: e.member.settings.seed, _together(entries)),
        ("start points tried first", _start, "start all warm or none: leave warm_start out, or "
         "give it for all members"),
        ("ranges of what is searched for all, or its value", _shared, "search the same for all "
         "members: search_spaces/base.yaml has it"),
    ):  # fmt: skip
        _equal(entries, what, of, mend)
    spent = {e.cell.name: e.cell.tuning.epochs for e in entries}
    least, most = min(spent.values()), max(spent.values())
    spread = most / least - 1 if least else float("inf")
    tuning = entries[0].cell.tuning
    figure = (
        f"{tuning.asked} trials each, up to {entries[0].member.settings.epochs} epochs; epochs "
        f"spent {least} to {most} (spread {spread:.0%})"
    )
    if spread > SPREAD:
        stopping = any(e.scheduling.name != "none" for e in entries)
        raise _Found(
            f"{figure}: {_key(spent, most)} has spent more than {_key(spent, least)}",
            "search all without early stopping: scheduler.name=none"
            if stopping
            else "trials that diverge spend less: search all without the settings at which they "
            "do, such as search.lr.high=0.1",
        )
    return figure


def _selection(entries: list[Entry]) -> str:
    for entry in entries:
        try:
            accuracy_name(entry.member)
        except ValueError as error:
            raise _Found(str(error), "search it by objective=val/accuracy") from None
        if entry.member.settings.data.validation == 0:
            raise _Found(
                f"{entry.cell.name}: no images were held out to select by",
                "search it with data.validation=0.1",
            )
        if entry.runs is None:
            continue
        tested = {role(t) for t in entry.runs.trials.values() if t.test is not None}
        chosen = {number for name, number in tested if name != "paper"}
        if len(chosen) > len(entry.runs.header["confirm"]["candidates"]):
            raise _Found(
                f"{entry.cell.name}: the test set was read for {len(chosen)} settings",
                "search and confirm it under another name, too, and report both",
            )
    held_out = sorted({entry.member.settings.data.validation for entry in entries})
    return f"{' or '.join(f'{share:.0%}' for share in held_out)} held out; one setting each tested"


def _fresh(entries: list[Entry]) -> str:
    for entry in entries:
        cell = entry.cell
        if not _selects(entry.member):
            continue  # rule 2 says so
        if cell.state in ("unconfirmed", "unfinished"):
            raise _Found(f"{cell.name}: {cell.note}", _mend_state(entry))
        if cell.chosen and entry.member.settings.seed in cell.chosen.seeds:
            raise _Found(
                f"{cell.name}: seed {entry.member.settings.seed} is that of its search",
                _anew(entry),
            )
    _equal(
        (entry for entry in entries if entry.runs), "way of confirming",
        lambda e: {key: e.runs and e.runs.header["confirm"][key] for key in ("top", "full")},
        "search one of them under another name, and confirm both alike",
    )  # fmt: skip
    num = len([entry for entry in entries if entry.cell.state == "confirmed"])
    return f"{num} of {len(entries)} confirmed, {len(entries) - num} infeasible" if num else ""


def _selects(member: Member) -> bool:
    return any(name.startswith("val/") for name in member.objectives)


def _mend_state(entry: Entry) -> str:
    if not is_done(entry.record):
        return resume_command(entry.folder.parent)
    if entry.runs is None:
        return entry.confirm + (" density=D,..." if is_front(entry.member) else "")
    grown = entry.runs.header["confirm"]["trials"] != len(entry.record.trials)
    return _anew(entry) if grown else entry.confirm


def _anew(entry: Entry) -> str:
    moved = folder_of(entry.folder, entry.cell.multiplier)
    return f"move {moved} out of the sweep, say so in your report, and: {entry.confirm}"


def _seeds(confirmed: list[Entry]) -> str:
    if not confirmed:
        return ""
    least = min(confirmed, key=_num_seeds)
    fewest = _num_seeds(least)
    if fewest < FLOOR:
        raise _Found(f"{least.cell.name} has {fewest}", f"{least.confirm} seeds={WANTED}")
    return f"{fewest} seeds" + (
        "" if fewest >= WANTED else f", below {WANTED}: {FLOOR} is the floor"
    )


def _num_seeds(entry: Entry) -> int:
    return len(set(entry.cell.chosen.seeds)) if entry.cell.chosen else 0


def _intervals(confirmed: list[Entry]) -> str:
    if not confirmed:
        return ""
    if missing := [entry for entry in confirmed if entry.cell.mean is None]:
        first = missing[0]
        raise _Found(
            f"{first.cell.name} has fewer than 2 accuracies", f"{first.confirm} seeds={WANTED}"
        )
    return "95 % intervals of mean, interquartile mean and probability of improvement"


def _controls(entries: list[Entry]) -> str:
    densities = {entry.cell.density for entry in entries} - {None}
    spaces = {entry.member.space.name for entry in entries}
    missing = [name for name in CONTROLS if name not in spaces]
    if len(densities) < 2 or missing:
        lacking = f"; no {', '.join(missing)}" if missing else ""
        raise _Found(
            f"{len(densities)} densities{lacking}",
            "name members at several densities, and the controls dense, small_dense, static, gmp",
        )
    return f"{len(densities)} densities; {', '.join(CONTROLS)}"


def _costs(confirmed: list[Entry]) -> str:
    lines = [(entry.cell.name, entry.cell.chosen) for entry in confirmed]
    if missing := [name for name, line in lines if line and line.flops_inference is None]:
        raise _Found(f"not known for {missing[0]}", "compare where the data set is")
    return "a multiply-add counts 2; a layer counts its density" if lines else ""


def _matched(entries: list[Entry], levels: dict[str, list[str]], match: str) -> str:
    masked = [e for e in entries if e.member.method.reaches_density and e.cell.density is not None]

    def distribution(entry: Entry) -> str:
        return entry.settings.distribution

    _equal(masked, "initial distribution over layers", distribution,
           "search all with one, distribution=uniform or distribution=erk")  # fmt: skip
    if not levels:
        return ""
    what = "density" if match == "density" else "FLOPs of inference, within 10 %"
    names = {distribution(entry) for entry in masked}
    return f"by {what}" + (f"; {names.pop()} in all" if names else "")


def _same(entries: list[Entry]) -> str:
    _equal(entries, "data", lambda e: e.record.header["data"][:12], "search all on one data set")
    _alike(
        entries,
        lambda e: e.settings,
        {
            "network": lambda s: {**s["model"], "match_density": 0},
            "preparation of the data": lambda s: {
                key: s["data"][key] for key in ("validation", "augment", "normalize")
            },
            "epochs": lambda s: s["epochs"],
            "layers left dense": lambda s: s["dense_layers"],
        },
    )
    # In these winners may differ, where all have searched the same range: rule 1.
    _alike(entries, lambda e: e.member.settings, {
        "batches and precision": lambda s: s["train"],
        "optimizer": lambda s: {k: s["optimizer"][k] for k in ("name", "nesterov", "momentum")},
        "learning-rate schedule": lambda s: s["schedule"],
    })  # fmt: skip
    settings = entries[0].member.settings
    left = ", ".join(settings.dense_layers) or "no layer"
    return f"{settings.model.name}, {settings.epochs} epochs, {left} left dense"


def _alike(
    entries: list[Entry],
    settings: Callable[[Entry], Any],
    parts: dict[str, Callable[[dict[str, Any]], Any]],
) -> None:
    for what, of in parts.items():
        found = {entry.cell.name: of(to_dict(settings(entry))) for entry in entries}
        _equal(entries, what, lambda entry: found[entry.cell.name], _together(entries))  # noqa: B023


def _realised(confirmed: list[Entry]) -> str:
    _equal(confirmed, "what density is a share of", lambda e: e.member.settings.density_over,
           "search all with density_over=all")  # fmt: skip
    off = {}
    whole = all(entry.member.settings.density_over == "all" for entry in confirmed)
    of = "all weights" if whole else "the sparse layers' weights"
    for entry in confirmed:
        cell, smaller = entry.cell, bool(entry.member.settings.model.match_density)
        if cell.chosen is None or cell.density is None or entry.member.method.emergent:
            continue
        density = cell.chosen.density if whole or smaller else cell.chosen.density_sparse
        if density:
            off[cell.name] = density / cell.density - 1
            if abs(off[cell.name]) > (SMALL_DENSE if smaller else SLACK):
                raise _Found(
                    f"{cell.name} has {density:.4f} of {of}, {off[cell.name]:+.1%} off",
                    "leave it out, or search it at a density it can hold",
                )
    if not off:
        return ""
    worst = max(off, key=lambda name: abs(off[name]))
    return f"at most {abs(off[worst]):.1%} off ({worst}); over {of}, and per layer"


def _stopped(confirmed: list[Entry]) -> str:
    lines = [(e.cell.name, e.cell.chosen) for e in confirmed if e.cell.chosen]
    for name, line in lines:
        if line and "stopped" in line.statuses:
            raise _Found(
                f"{name}: {line.statuses.count('stopped')} runs were stopped early",
                "search and confirm it under another name",
            )
    runs = [seed for _, line in lines if line for seed in line.seeds]
    return f"none of {len(runs)} runs" if runs else ""


def _lost(entries: list[Entry], confirmed: list[Entry]) -> str:
    counts = dict.fromkeys(("stopped", "diverged", "failed"), 0)
    for tuning in {entry.cell.member: entry.cell.tuning for entry in entries}.values():
        for status in counts:
            counts[status] += tuning.trials[status]
    for entry in confirmed:
        line = entry.cell.chosen
        for status in ("failed", "diverged"):
            num = line.statuses.count(status) if line else 0
            if line and num:
                again = f"{entry.confirm} --retry-failed"
                raise _Found(
                    f"{entry.cell.name}: {num} of {len(line.seeds)} runs {status}, and a mean "
                    "over the others would flatter it",
                    again if status == "failed" else "compare the others by naming their members",
                )
    listed = ", ".join(f"{num} {status}" for status, num in counts.items())
    return f"in the searches {listed}; in the results none"


def _paired(confirmed: list[Entry]) -> str:
    seeds = {e.cell.name: tuple(e.cell.chosen.seeds) for e in confirmed if e.cell.chosen}
    if len(seeds) < 2:
        return ""
    if len(set(seeds.values())) > 1:
        raise _Found(
            "seeds differ: " + "; ".join(f"{k} {min(v)}-{max(v)}" for k, v in seeds.items()),
            f"{min(confirmed, key=_num_seeds).confirm} seeds={max(map(len, seeds.values()))}",
        )
    num = len(next(iter(seeds.values())))
    return f"{num} seeds in all" + ("" if num >= 6 else "; below 6 intervals only, no tests")


def _reported(entries: list[Entry]) -> str:
    def versions(record: journal.Record | None) -> dict[str, str]:
        found = record.header.get("versions", {}) if record else {}
        return {name: found.get(name, "?") for name in ("sparsetune", "torch")}

    _equal(entries, "versions", lambda e: versions(e.record), "search all with one version")
    _equal((e for e in entries if e.runs), "versions of confirmation", lambda e: versions(e.runs),
           "confirm all with one version")  # fmt: skip
    for method in {entry.cell.method: None for entry in entries}:
        own = [entry for entry in entries if entry.cell.method == method]
        _equal(own, f"code of {method}", lambda e: e.record.header.get("code", {}).get("method"),
               "search all with one version")  # fmt: skip
    records = [entries[0].record, *[entry.runs for entry in entries if entry.runs][:1]]
    said = [", ".join(f"{k} {v}" for k, v in versions(record).items()) for record in records]
    return "; confirmed by ".join(dict.fromkeys(said))


def _emergent(entries: list[Entry]) -> str:
    emergent = [entry for entry in entries if entry.member.method.emergent]
    for entry in emergent:
        bound = DENSITY in entry.member.settings.constraint or is_front(entry.member)
        if entry.cell.density is None and not bound:
            raise _Found(
                f"{entry.cell.name} was searched by accuracy alone",
                "give density=D, or objective=[val/accuracy,density/all]",
            )
    if not emergent:
        return ""
    over = sum(entry.cell.state == "infeasible" for entry in emergent)
    return f"{len(emergent)} searched under a bound, {over} of them infeasible"


def _gradients(entries: list[Entry]) -> str:
    need = {e.cell.space: e.cell.dense_gradient for e in entries if e.cell.method != "dense"}
    need = {space: kind for space, kind in need.items() if kind != "never"}
    return ", ".join(f"{space} {kind.replace('_', ' ')}" for space, kind in need.items())


# Helpers ------------------------------------------------------------------------------------------


def _equal(entries: Iterable[Entry], what: str, of: Callable[[Entry], Any], mend: str) -> None:
    """_Found unless all have the same."""

    def short(text: str) -> str:
        return text if len(text) <= 200 else f"{text[:200]} ..."

    groups: dict[str, list[str]] = {}
    for entry in entries:
        groups.setdefault(json.dumps(of(entry), sort_keys=True), []).append(entry.cell.name)
    if len(groups) > 1:
        (one, first), (other, second) = list(groups.items())[:2]
        raise _Found(f"{what}: {short(one)} in {first[0]}, {short(other)} in {second[0]}", mend)


def _key(values: dict[str, Any], value: Any) -> str:
    return next(key for key, each in values.items() if each == value)


def _scheduler(scheduling: Scheduling) -> list[Any]:
    own = [scheduling.grace, scheduling.reduction] if scheduling.name == "asha" else []
    return [scheduling.name, *own]


def _sampler(member: Member) -> dict[str, Any]:
    return dataclasses.asdict(member.settings.sampler)


def _start(entry: Entry) -> list[bool]:
    """Were the space's own points tried, and points from other sweeps?"""
    points = entry.member.space.start
    warm = [name for name in points if name.startswith("warm-")]
    return [len(points) > len(warm), bool(warm)]


def _shared(entry: Entry) -> dict[str, Any]:
    # Sparse Momentum's rule reads the momentum, so it is one of that method's hyperparameters.
    own = ("hp.", "variant.", "update.", "density", "optimizer.momentum")
    searched = entry.member.space.search.items()
    shared = {key: dimension.to_dict() for key, dimension in searched if not key.startswith(own)}
    settings = flatten(to_dict(entry.member.trial_settings({}, {})))
    return {key: settings[key] for key in SHARED} | shared


def _together(entries: list[Entry]) -> str:
    spaces = " ".join(dict.fromkeys(entry.member.space.name for entry in entries))
    return f"search them in one sweep: sparsetune sweep {spaces} density=... name=..."
