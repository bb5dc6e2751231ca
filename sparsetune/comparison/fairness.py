"""The rules of a fair comparison, each checked by machine.

The rule to know: a rule holds, is broken, or does not apply, and says by what figure; where one is
broken, it also says what mends it, and 1-4 and 8-12 forbid a ranking then. Sources: 1, 2 AlgoPerf
(Dahl et al. 2023, arXiv:2306.07179); 3 Dodge et al. 2019, arXiv:1909.03004; 4, 13 Bouthillier et
al. 2021, arXiv:2103.03098; 5 Agarwal et al. 2021, arXiv:2108.13264; 6, 7 Blalock et al. 2020,
arXiv:2003.03033; 8 Sundar and Dwaraknath 2021, arXiv:2109.12508; 9 Dettmers and Zettlemoyer 2019,
arXiv:1907.04840, whose figure moves by 4 points with the layers that are left dense.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from sparsetune.comparison.cells import Source
from sparsetune.comparison.values import SLACK, Level, Rule
from sparsetune.comparison.winners import DENSITY_METRIC, accuracy_name, folder_of, is_front, role
from sparsetune.settings import to_dict
from sparsetune.space.config import flatten
from sparsetune.store.journal import Record
from sparsetune.store.layout import resume_command
from sparsetune.sweeps.status import is_done

SPREAD = 0.25  # of epochs spent in searching, the most over the fewest, less one
FLOOR, WANTED = 3, 5  # confirmation seeds
SMALL_DENSE = 0.1  # a dense network of whole neurons cannot meet every number of weights
SHARED = ("optimizer.lr", "optimizer.weight_decay", "optimizer.beta2", "optimizer.eps")
CONTROLS = ("dense", "small_dense", "static", "gmp")


class Finding(NamedTuple):
    """What a rule's check comes to. It does not apply without a figure, is broken with a mend."""

    figure: str = ""
    mend: str = ""


def rules(sources: list[Source], levels: dict[Level, list[str]], match: str) -> list[Rule]:
    """All sixteen, in their order."""
    confirmed = [source for source in sources if source.cell.state == "confirmed"]
    checks: list[tuple[str, bool, Finding]] = [  # title, does it forbid a ranking, what was found
        ("equal tuning budgets, one policy", True, _budgets(sources)),
        ("selection on validation, the test set read once", True, _selection(sources)),
        ("winners trained again on fresh seeds", True, _fresh(sources)),
        ("at least 5 seeds (3 is the floor)", True, _seeds(confirmed)),
        ("intervals, not points", False, _intervals(confirmed)),
        ("several densities, with controls", False, _controls(sources)),
        ("nonzero parameters and FLOPs", False, _costs(confirmed)),
        ("matched by one quantity, one initial distribution", True,
         _matched(sources, levels, match)),
        ("same network, data, epochs and dense layers", True, _same(sources)),
        ("realised density, measured at the end", True, _realised(confirmed)),
        ("no early-stopped run among the results", True, _stopped(confirmed)),
        ("failed, diverged and killed runs counted", True, _lost(sources, confirmed)),
        ("paired by seed, Holm's correction", False, _paired(confirmed)),
        ("spaces, costs, versions, commands are given", False, _reported(sources)),
        ("emergent density: at the density reached", False, _emergent(sources)),
        ("methods that need dense gradients are marked", False, _gradients(sources)),
    ]  # fmt: skip
    checked = []
    state: Literal["holds", "broken", "does not apply"]
    for number, (title, forbids, (figure, mend)) in enumerate(checks, start=1):
        state = "broken" if mend else "holds" if figure else "does not apply"
        checked.append(Rule(number, title, state, figure or "nothing to check", mend, forbids))
    return checked


# What each finds ----------------------------------------------------------------------------------


def _budgets(sources: list[Source]) -> Finding:
    fewest = min(sources, key=lambda s: s.cell.tuning.asked)
    served = fewest.record.asked // max(1, fewest.cell.tuning.asked)
    trials = max(source.cell.tuning.asked for source in sources) * served
    for what, of, mend in (
        ("trials per member and density", lambda s: s.cell.tuning.asked,
         f"give all the same: {resume_command(fewest.folder.parent)} trials={trials}"),
        ("maximum epochs", lambda s: s.member.settings.epochs, _together(sources)),
        ("scheduler", _scheduler, _together(sources)),
        ("sampler", lambda s: to_dict(s.member.settings.sampler), _together(sources)),
        ("seed of the search", lambda s: s.member.settings.seed, _together(sources)),
        ("start points tried first", _start, "start all warm or none: leave warm_start out, or "
         "give it for all members"),
        ("ranges of what is searched for all, or its value", _shared, "search the same for all "
         "members: search_spaces/base.yaml has it"),
    ):  # fmt: skip
        if differs := _differs(sources, what, of, mend):
            return differs
    spent = {source.cell.name: source.cell.tuning.epochs for source in sources}
    least, most = min(spent, key=spent.__getitem__), max(spent, key=spent.__getitem__)
    spread = spent[most] / spent[least] - 1 if spent[least] else float("inf")
    figure = (
        f"{sources[0].cell.tuning.asked} trials each, up to {sources[0].member.settings.epochs} "
        f"epochs; epochs spent {spent[least]} to {spent[most]} (spread {spread:.0%})"
    )
    if spread <= SPREAD:
        return Finding(figure)
    mend = (
        "trials that diverge spend less: search all without the settings at which they do, such as "
        "search.lr.high=0.1"
    )
    if any(source.scheduling.name != "none" for source in sources):
        mend = "search all without early stopping: scheduler.name=none"
    return Finding(f"{figure}: {most} has spent more than {least}", mend)


def _selection(sources: list[Source]) -> Finding:
    for source in sources:
        try:
            accuracy_name(source.member)
        except ValueError as error:
            return Finding(str(error), "search it by objective=val/accuracy")
        if source.member.settings.data.validation == 0:
            figure = f"{source.cell.name}: no images were held out to select by"
            return Finding(figure, "search it with data.validation=0.1")
        if source.runs is None:
            continue
        tested = {role(run) for run in source.runs.trials.values() if run.test is not None}
        chosen = {number for name, number in tested if name != "paper"}
        if len(chosen) > len(source.runs.header["confirm"]["candidates"]):
            figure = f"{source.cell.name}: the test set was read for {len(chosen)} settings"
            return Finding(figure, "search and confirm it under another name, too, and report both")
    shares = sorted({source.member.settings.data.validation for source in sources})
    held_out = " or ".join(f"{share:.0%}" for share in shares)
    return Finding(f"{held_out} held out; one setting each tested")


def _fresh(sources: list[Source]) -> Finding:
    for source in sources:
        cell, seed = source.cell, source.member.settings.seed
        if not any(name.startswith("val/") for name in source.member.objectives):
            continue  # rule 2 says so
        if cell.state in ("unconfirmed", "unfinished"):
            return Finding(f"{cell.name}: {cell.note}", _mend_state(source))
        if cell.chosen and seed in cell.chosen.seeds:
            return Finding(f"{cell.name}: seed {seed} is that of its search", _anew(source))
    differs = _differs(
        (source for source in sources if source.runs),
        "way of confirming",
        lambda s: {key: s.runs and s.runs.header["confirm"][key] for key in ("top", "full")},
        "search one of them under another name, and confirm both alike",
    )
    num = sum(source.cell.state == "confirmed" for source in sources)
    figure = f"{num} of {len(sources)} confirmed, {len(sources) - num} infeasible"
    return differs or Finding(figure if num else "")


def _mend_state(source: Source) -> str:
    if not is_done(source.record):
        return resume_command(source.folder.parent)
    if source.runs is None:
        return source.confirm + (" density=D,..." if is_front(source.member) else "")
    grown = source.runs.header["confirm"]["trials"] != len(source.record.trials)
    return _anew(source) if grown else source.confirm


def _anew(source: Source) -> str:
    moved = folder_of(source.folder, source.multiplier)
    return f"move {moved} out of the sweep, say so in your report, and: {source.confirm}"


def _seeds(confirmed: list[Source]) -> Finding:
    if not confirmed:
        return Finding()
    least = min(confirmed, key=_num_seeds)
    fewest = _num_seeds(least)
    if fewest < FLOOR:
        return Finding(f"{least.cell.name} has {fewest}", f"{least.confirm} seeds={WANTED}")
    below = "" if fewest >= WANTED else f", below {WANTED}: {FLOOR} is the floor"
    return Finding(f"{fewest} seeds{below}")


def _num_seeds(source: Source) -> int:
    return len(set(source.cell.chosen.seeds)) if source.cell.chosen else 0


def _intervals(confirmed: list[Source]) -> Finding:
    for source in confirmed:
        if source.cell.mean is None:
            figure = f"{source.cell.name} has fewer than 2 accuracies"
            return Finding(figure, f"{source.confirm} seeds={WANTED}")
    figure = "95 % intervals of mean, interquartile mean and probability of improvement"
    return Finding(figure if confirmed else "")


def _controls(sources: list[Source]) -> Finding:
    densities = {source.density for source in sources} - {None}
    spaces = {source.member.space.name for source in sources}
    missing = [name for name in CONTROLS if name not in spaces]
    if len(densities) < 2 or missing:
        lacking = f"; no {', '.join(missing)}" if missing else ""
        mend = f"name members at several densities, and the controls {', '.join(CONTROLS)}"
        return Finding(f"{len(densities)} densities{lacking}", mend)
    return Finding(f"{len(densities)} densities; {', '.join(CONTROLS)}")


def _costs(confirmed: list[Source]) -> Finding:
    for source in confirmed:
        if source.cell.chosen and source.cell.chosen.flops_inference is None:
            mend = "compare where the data set is"
            if ":" in source.settings.model.name:  # the user's own network
                mend = (
                    "search it again, with choices and no ranges of model.* keys: the journal then "
                    "says what its networks cost"
                )
            return Finding(f"not known for {source.cell.name}", mend)
    return Finding("a multiply-add counts 2; a layer counts its density" if confirmed else "")


def _matched(sources: list[Source], levels: dict[Level, list[str]], match: str) -> Finding:
    masked = [s for s in sources if s.member.traits.reaches_density and s.density is not None]
    names = {source.settings.distribution for source in masked}
    what = "density" if match == "density" else "FLOPs of inference, within 10 %"
    figure = f"by {what}" + (f"; {names.pop()} in all" if names else "")
    return _differs(
        masked,
        "initial distribution over layers",
        lambda source: source.settings.distribution,
        "search all with one, distribution=uniform or distribution=erk",
    ) or Finding(figure if levels else "")


def _same(sources: list[Source]) -> Finding:
    prepared, optimizer = ("validation", "augment", "normalize"), ("name", "nesterov", "momentum")
    for what, of, mend in (
        ("data", lambda s: s.record.header["data"][:12], "search all on one data set"),
        ("network", lambda s: {**to_dict(s.settings.model), "match_density": 0}, ""),
        ("preparation of the data", lambda s: _part(s.settings.data, prepared), ""),
        ("epochs", lambda s: s.settings.epochs, ""),
        ("layers left dense", lambda s: s.settings.dense_layers, ""),
        # In these winners may differ, where all have searched the same range: rule 1.
        ("batches and precision", lambda s: to_dict(s.member.settings.train), ""),
        ("optimizer", lambda s: _part(s.member.settings.optimizer, optimizer), ""),
        ("learning-rate schedule", lambda s: to_dict(s.member.settings.schedule), ""),
    ):
        if differs := _differs(sources, what, of, mend or _together(sources)):
            return differs
    settings = sources[0].member.settings
    left = ", ".join(settings.dense_layers) or "no layer"
    return Finding(f"{settings.model.name}, {settings.epochs} epochs, {left} left dense")


def _part(settings: Any, keys: Iterable[str]) -> dict[str, Any]:
    return {key: getattr(settings, key) for key in keys}


def _realised(confirmed: list[Source]) -> Finding:
    if differs := _differs(
        confirmed,
        "what density is a share of",
        lambda source: source.member.settings.density_over,
        "search all with density_over=all",
    ):
        return differs
    off = {}
    whole = all(source.member.settings.density_over == "all" for source in confirmed)
    of = "all weights" if whole else "the sparse layers' weights"
    for source in confirmed:
        cell, smaller = source.cell, bool(source.member.settings.model.match_density)
        if cell.chosen is None or cell.density is None or source.member.traits.emergent:
            continue
        density = cell.chosen.density if whole or smaller else cell.chosen.density_sparse
        if density:
            off[cell.name] = density / cell.density - 1
            if abs(off[cell.name]) > (SMALL_DENSE if smaller else SLACK):
                figure = f"{cell.name} has {density:.4f} of {of}, {off[cell.name]:+.1%} off"
                return Finding(figure, "leave it out, or search it at a density it can hold")
    if not off:
        return Finding()
    worst = max(off, key=lambda name: abs(off[name]))
    return Finding(f"at most {abs(off[worst]):.1%} off ({worst}); over {of}, and per layer")


def _stopped(confirmed: list[Source]) -> Finding:
    num = 0
    for source in confirmed:
        statuses = source.cell.chosen.statuses if source.cell.chosen else []
        num += len(statuses)
        if stopped := statuses.count("stopped"):
            figure = f"{source.cell.name}: {stopped} runs were stopped early"
            return Finding(figure, "search and confirm it under another name")
    return Finding(f"none of {num} runs" if num else "")


def _lost(sources: list[Source], confirmed: list[Source]) -> Finding:
    counts = dict.fromkeys(("stopped", "diverged", "failed"), 0)
    for tuning in {source.cell.member: source.cell.tuning for source in sources}.values():
        for status in counts:
            counts[status] += tuning.trials[status]
    for source in confirmed:
        statuses = source.cell.chosen.statuses if source.cell.chosen else []
        for status in ("failed", "diverged"):
            if num := statuses.count(status):
                figure = f"{source.cell.name}: {num} of {len(statuses)} runs {status}"
                again = f"{source.confirm} --retry-failed"
                return Finding(
                    f"{figure}, and a mean over the others would flatter it",
                    again if status == "failed" else "compare the others by naming their members",
                )
    listed = ", ".join(f"{num} {status}" for status, num in counts.items())
    return Finding(f"in the searches {listed}; in the results none")


def _paired(confirmed: list[Source]) -> Finding:
    seeds = {s.cell.name: tuple(s.cell.chosen.seeds) for s in confirmed if s.cell.chosen}
    if len(seeds) < 2:
        return Finding()
    if len(set(seeds.values())) > 1:
        listed = "; ".join(f"{name} {min(own)}-{max(own)}" for name, own in seeds.items())
        most = max(map(len, seeds.values()))
        mend = f"{min(confirmed, key=_num_seeds).confirm} seeds={most}"
        return Finding(f"seeds differ: {listed}", mend)
    num = _num_seeds(confirmed[0])
    few = "" if num >= 6 else "; below 6 intervals only, no tests"
    return Finding(f"{num} seeds in all{few}")


def _reported(sources: list[Source]) -> Finding:
    mend, confirmed = "search all with one version", [source for source in sources if source.runs]
    differs = _differs(sources, "versions", lambda s: _versions(s.record), mend)
    differs = differs or _differs(
        confirmed, "versions of confirmation", lambda s: _versions(s.runs),
        "confirm all with one version",
    )  # fmt: skip
    for method in dict.fromkeys(source.cell.method for source in sources):
        own = [source for source in sources if source.cell.method == method]
        differs = differs or _differs(
            own, f"code of {method}", lambda s: s.record.header.get("code", {}).get("method"), mend
        )
    records = [sources[0].record, *(source.runs for source in confirmed[:1])]
    said = [", ".join(map(" ".join, _versions(record).items())) for record in records]
    return differs or Finding("; confirmed by ".join(dict.fromkeys(said)))


def _versions(record: Record | None) -> dict[str, str]:
    versions = record.header.get("versions", {}) if record else {}
    return {name: versions.get(name, "?") for name in ("sparsetune", "torch")}


def _emergent(sources: list[Source]) -> Finding:
    emergent = [source for source in sources if source.member.traits.emergent]
    for source in emergent:
        bound = DENSITY_METRIC in source.member.settings.constraint or is_front(source.member)
        if source.density is None and not bound:
            figure = f"{source.cell.name} was searched by accuracy alone"
            return Finding(figure, "give density=D, or objective=[val/accuracy,density/all]")
    over = sum(source.cell.state == "infeasible" for source in emergent)
    figure = f"{len(emergent)} searched under a bound, {over} of them infeasible"
    return Finding(figure if emergent else "")


def _gradients(sources: list[Source]) -> Finding:
    need = {s.cell.space: s.cell.dense_gradient for s in sources if s.cell.method != "dense"}
    kinds = [f"{space} {kind.replace('_', ' ')}" for space, kind in need.items() if kind != "never"]
    return Finding(", ".join(kinds))


# Helpers ------------------------------------------------------------------------------------------


def _differs(
    sources: Iterable[Source], what: str, of: Callable[[Source], Any], mend: str
) -> Finding | None:
    """What two of them have, unless all have the same."""
    groups: dict[str, str] = {}  # what is had -> who has it first
    for source in sources:
        groups.setdefault(json.dumps(of(source), sort_keys=True), source.cell.name)
    if len(groups) < 2:
        return None
    values = [value if len(value) <= 200 else f"{value[:200]} ..." for value in groups]
    first, second, *_ = [f"{v} in {name}" for v, name in zip(values, groups.values(), strict=True)]
    return Finding(f"{what}: {first}, {second}", mend)


def _scheduler(source: Source) -> list[Any]:
    name, grace, reduction, _ = source.scheduling
    return [name, grace, reduction] if name == "asha" else [name]


def _start(source: Source) -> list[bool]:
    """Were the space's own points tried, and points from other sweeps?"""
    points = source.member.space.start
    warm = [name for name in points if name.startswith("warm-")]
    return [len(points) > len(warm), bool(warm)]


def _shared(source: Source) -> dict[str, Any]:
    # Sparse Momentum's rule reads the momentum, so it is one of that method's hyperparameters.
    own = ("hp.", "variant.", "update.", "density", "optimizer.momentum")
    searched = source.member.space.search.items()
    shared = {key: dimension.to_dict() for key, dimension in searched if not key.startswith(own)}
    settings = flatten(to_dict(source.member.trial_settings({}, {})))
    return {key: settings[key] for key in SHARED} | shared


def _together(sources: list[Source]) -> str:
    spaces = " ".join(dict.fromkeys(source.member.space.name for source in sources))
    return f"search them in one sweep: sparsetune sweep {spaces} density=... name=..."
