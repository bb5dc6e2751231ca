"""From the words of a command line to the members of a sweep, with all that can be wrong.

The rule to know: `resolve` finds everything a user got wrong, with the data at hand and the network
on the meta device, and writes nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from sparsetune.engine.pool import Choice, choose
from sparsetune.methods import find
from sparsetune.methods.contract import make_hyperparameters, make_variant
from sparsetune.names import suggestion
from sparsetune.settings import SweepSettings, TrialSettings
from sparsetune.space import config, files
from sparsetune.space.member import DENSITY_BOUND, Member, Sweep
from sparsetune.space.space import WORDS, Space
from sparsetune.store.paths import S3Path, why
from sparsetune.training import data, models
from sparsetune.training.setup import choose_device, layers_of, prepare, update_schedule
from sparsetune.training.trainer import begin

Command = Literal["train", "sweep"]


def resolve(space_specs: list[str], words: list[str], command: Command) -> Sweep:
    """The sweep that a command line asks for. ValueError, one clear message, for what is wrong."""
    asked = config.parse_words(words)
    spaces = [files.load(spec) for spec in space_specs]
    _check_stems(spaces)
    start, densities = asked.pop("start", None), asked.pop("density", [])
    if command == "train":
        spaces = [_only_point(spaces, asked, start, densities)]
        asked = _train_defaults(spaces[0], asked) | asked
        if "warm_start" in asked:
            raise ValueError("warm_start: train trains one setting; for a search use sweep")
    elif start is not None:
        raise ValueError("start: belongs to train; a sweep tries all start points first")
    if densities and any(key.startswith("search.density.") for key in asked):
        raise ValueError("search.density: density is given, too; leave one out")
    common = {k: v for k, v in asked.items() if not k.startswith(("search.", "hp.", "variant."))}
    spaces = _overridden(spaces, asked, common)
    name, storage = common.get("name", ""), config.build(common).storage
    folder = config.storage_folder(storage)
    _check_place(name, folder)
    single = command == "train"
    members = [m for space in spaces for m in _members(space, common, densities, single)]
    named = [member.name for member in members]
    if twice := [name for name in dict.fromkeys(named) if named.count(name) > 1]:
        raise ValueError(
            f"density: two members would be called '{twice[0].partition('/')[2]}'; give densities "
            "that differ in their first six digits"
        )
    check_members(members)
    return Sweep(name, folder, members)


def reworded(members: list[Member], asked: Mapping[str, Any]) -> list[Member]:
    """The members as these keys would have them: all else stays as it is, whatever the spaces'
    files say by now."""
    asked = dict(asked)
    densities = asked.pop("density", None)
    has = list(dict.fromkeys(member.density for member in members))
    if densities is not None and densities != [density for density in has if density is not None]:
        raise ValueError(
            f"density: the members of this sweep have {', '.join(f'{d:g}' for d in has if d)}; "
            "for others begin a sweep under another name"
        )
    common = {k: v for k, v in asked.items() if not k.startswith(("search.", "hp.", "variant."))}
    spaces = _overridden([member.space for member in members], asked, common)
    new = []
    for member, own in zip(members, spaces, strict=True):
        fixed = {k: v for k, v in own.fixed.items() if config.is_trial_key(k)}
        settings = config.replaced(member.settings, {**fixed, **common})
        new.append(dataclasses.replace(member, space=own, settings=settings))
    check_members(new)
    return new


def _check_stems(spaces: list[Space]) -> None:
    if not spaces:
        raise ValueError(f"no search space given; there are: {', '.join(files.names())}")
    by_name: dict[str, str] = {}
    for space in spaces:
        if space.name in by_name:
            raise ValueError(
                f"'{space.name}' is given twice ({by_name[space.name]}, {space.file}); members are "
                "named by the file, so leave one out or rename it"
            )
        if not config.NAME.fullmatch(space.name):
            raise ValueError(
                f"{space.file}: members are named by the file; use letters, digits, '.', '_' and "
                "'-'"
            )
        by_name[space.name] = space.file


def _only_point(
    spaces: list[Space], asked: Mapping[str, Any], start: str | None, densities: list[float]
) -> Space:
    """The space with the start point to train, or with an empty one: its settings alone."""
    if len(spaces) > 1:
        raise ValueError("train takes one search space; to train several use sweep")
    if len(densities) > 1:
        raise ValueError("density: train takes one; for several use sweep")
    for key in asked:
        if key == "trials" or key.startswith("search."):
            raise ValueError(f"{key}: train trains one setting; for a search use sweep")
    space = spaces[0]
    if start is None:
        start = "paper" if "paper" in space.start else ""
    elif start not in space.start:
        raise ValueError(
            f"start: '{start}' is no start point of {space.file}{suggestion(start, space.start)}; "
            f"it has: {', '.join(space.start) or 'none'}"
        )
    return dataclasses.replace(space, start={start or "settings": space.start.get(start, {})})


def _train_defaults(space: Space, asked: Mapping[str, Any]) -> dict[str, Any]:
    common = {k: v for k, v in asked.items() if k == "storage"}
    storage = config.storage_folder(config.build(common).storage)
    stem = f"train-{space.name}"
    number = next(n for n in itertools.count(1) if not (storage / f"{stem}-{n}").exists())
    defaults = {"name": f"{stem}-{number}", "trials": 1, "scheduler.name": "none"}
    # Training on everything measures no accuracy, and nothing is chosen by it either.
    if asked.get("data.validation", space.fixed.get("data.validation")) == 0:
        defaults["objective"] = "train/loss"
    return defaults


def _overridden(
    spaces: list[Space], asked: Mapping[str, Any], common: Mapping[str, Any]
) -> list[Space]:
    """The spaces with the command line's ranges and fixed keys, each where it applies."""
    ranges = _ranges(asked)
    own = {k: v for k, v in asked.items() if k.startswith(("hp.", "variant."))}
    for key in (*ranges, *own):
        if not any(space.dotted(key) for space in spaces):
            _refuse(spaces, key, f"search.{key}" if key in ranges else key)
    trial = {k: v for k, v in common.items() if config.is_trial_key(k)}
    method = trial.pop("method", None)
    overridden = []
    for space in spaces:
        if method not in (None, space.method):
            raise ValueError(
                f"method: {space.file} searches {space.method}; for {method} give a space of that "
                "method"
            )
        fixed = trial | {k: v for k, v in own.items() if space.dotted(k)}
        # A range is changed where it is searched; where none of the spaces has it, it is new.
        changed = {
            key: words
            for key, words in ranges.items()
            if space.dotted(key) in space.search
            or (
                space.dotted(key) and not any(other.dotted(key) in other.search for other in spaces)
            )
        }
        for key in changed:
            if space.dotted(key) in fixed:
                raise ValueError(f"search.{key}: {space.dotted(key)} is given, too; leave one out")
        overridden.append(space.fix(fixed).search_also(changed))
    return overridden


def _ranges(asked: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{key as written: {word: value}} of search.KEY.WORD."""
    ranges: dict[str, dict[str, Any]] = {}
    for key, value in asked.items():
        if not key.startswith("search."):
            continue
        searched, _, word = key.removeprefix("search.").rpartition(".")
        if not searched or word not in WORDS or word == "when":
            raise ValueError(
                f"{key}: write search.KEY.low, .high, .log, .step or .choices, such as "
                "search.zeta.low=0.1"
            )
        ranges.setdefault(searched, {})[word] = value
    return ranges


def _refuse(spaces: list[Space], key: str, place: str) -> None:
    own = dict.fromkeys(name for space in spaces for name in space.own_keys())
    short = {name.rpartition(".")[2]: name for name in own}
    near = suggestion(key, own) or suggestion(key.rpartition(".")[2], short)
    methods = ", ".join(dict.fromkeys(space.method for space in spaces))
    raise ValueError(
        f"{place}: '{key}' is no hyperparameter of {methods}{near}{'' if near else ';'} "
        f"there are: {', '.join(own) or 'none'}"
    )


def _members(
    space: Space, common: Mapping[str, Any], densities: list[float], single: bool
) -> list[Member]:
    method, keep_points = find(space.method), False
    bounds = {k: v for k, v in common.items() if k.startswith("constraint.")}
    key, values = "density", list(densities)
    if space.fixed.get("model.match_density"):
        key = "model.match_density"
        values = values or [space.fixed[key]]
    elif method.emergent:
        key = DENSITY_BOUND
        space, values = _emergent(space, common, values)
    elif not method.reaches_density:
        values = []
    elif key not in space.search and not values:
        # Nobody gave one, so start points keep theirs; a single setting is called by it.
        point = next(iter(space.start.values()), {}) if single else {}
        values = [point.get(key, space.fixed.get(key, TrialSettings().density))]
        space, keep_points = dataclasses.replace(space, fixed=space.fixed | {key: values[0]}), True
    members = []
    named: list[float | None] = [*values] or [None]
    for density in named:
        # Emergent density has no setting; the one asked for is recorded where others have theirs.
        keys = (key, "density") if key == DENSITY_BOUND else (key,)
        own = space
        if density is not None and not keep_points:
            own = space.fix(dict.fromkeys(keys, density))
        settings = config.build({**common, **own.fixed, **bounds, "method": space.method})
        name = f"{common.get('name', '')}/{space.name}"
        members.append(
            Member(name if density is None else f"{name}@{density:g}", own, settings, density)
        )
    return members


def _emergent(
    space: Space, common: Mapping[str, Any], densities: list[float]
) -> tuple[Space, list[float]]:
    """Density as a constraint: the user's, else as asked for, else the space's own."""
    if DENSITY_BOUND in common:
        return space, [common[DENSITY_BOUND]]
    objective = common.get("objective", "")
    if densities or DENSITY_BOUND not in space.fixed:
        return space, densities
    if "density/all" in (objective if isinstance(objective, list) else [objective]):
        # Where the density is searched for, the file's bound would only cut the front off.
        fixed = {key: value for key, value in space.fixed.items() if key != DENSITY_BOUND}
        return dataclasses.replace(space, fixed=fixed), []
    return space, [space.fixed[DENSITY_BOUND]]


def _check_place(name: str, storage: Path) -> None:
    if not name:
        raise ValueError("name: a sweep needs one; write name=NAME, such as name=mnist-1")
    config.check_name(name)
    folder = storage / name
    if isinstance(storage, S3Path):
        _check_writable(storage)
        taken = folder.exists()
    else:
        taken = os.path.lexists(folder)
    if taken:
        where = "" if storage == Path("sweeps") else f" storage={storage}"
        raise ValueError(
            f"name: '{name}' exists already in {storage}; go on with `sparsetune resume "
            f"{name}{where}`, or take another name"
        )
    if isinstance(storage, S3Path):
        return
    above = next(path for path in folder.absolute().parents if os.path.lexists(path))
    if not above.is_dir() or not _writable(above):
        what = "cannot be written to" if above.is_dir() else "is no folder"
        raise ValueError(f"storage: {above} {what}; give storage=FOLDER, or set SPARSETUNE_STORAGE")


def _check_writable(storage: S3Path) -> None:
    probe = storage / f".sparsetune-{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"storage: {storage} cannot be written to ({why(error)}); the bucket must exist, and "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL say who may"
        ) from error


def _writable(folder: Path) -> bool:
    """Tried, because the rights do not tell of a read-only disk, and root has them all."""
    try:
        Path(tempfile.mkdtemp(prefix=".sparsetune-", dir=folder)).rmdir()
    except OSError:
        return False
    return True


def check_members(members: list[Member]) -> None:
    datasets: dict[str, data.Dataset] = {}
    for member in members:
        settings = member.settings
        try:
            config.check(settings)
            check_machine(settings)
            data.check(settings.data)
            models.check(settings.model)
            dataset = datasets.get(repr(settings.data)) or data.load(settings.data)
            datasets[repr(settings.data)] = dataset
            for params, fixed in _corners(member):
                trial = member.trial_settings(params, fixed)
                _check_trial(trial, dataset)
                if settings.engine not in ("auto", "solo"):
                    engine_choice(member, dataset, settings=trial)
            _check_constraint(member, dataset)
        except ValueError as error:
            raise ValueError(f"{error} [{member.name}]") from error
        if settings.epochs != members[0].settings.epochs:
            raise ValueError(
                f"epochs: {settings.epochs} in {member.name} and {members[0].settings.epochs} in "
                f"{members[0].name}; a sweep has one number, write epochs=N"
            )


def _check_constraint(member: Member, dataset: data.Dataset) -> None:
    """ValueError for a bound on a metric of layers or of the method that trials do not report."""
    asked = [k for k in member.settings.constraint if k.startswith(("density/layer/", "method/"))]
    if not asked:
        return
    setup = prepare(member.trial_settings({}, {}), torch.device("cpu"), dataset)
    state = begin(setup)
    known = [f"density/layer/{name}" for name in setup.sparse | setup.dense]
    known += [f"method/{k}" for k in setup.method.metrics(state.params, state.method, setup.hp)]
    if setup.method.decide is not None or setup.method.emergent:
        known.append("method/churn")
    for name in asked:
        if name not in known:
            raise ValueError(
                f"constraint.{name}: trials report no such metric{suggestion(name, known)}; "
                f"there are: {', '.join(known)}"
            )


def engine_choice(
    member: Member,
    dataset: data.Dataset,
    on_gpu: bool | None = None,
    settings: TrialSettings | None = None,
) -> Choice:
    """What `engine` comes to, for these settings or those all trials share; on a GPU or not.

    None: as on this machine. ValueError where the engine that was asked for cannot train them.
    """
    if on_gpu is None:
        asked = "auto" if member.settings.ray.cluster else member.settings.device
        on_gpu = choose_device(asked).type == "cuda"
    setup = prepare(settings or member.trial_settings({}, {}), torch.device("cpu"), dataset)
    # This process needs no GPU to know what one would do, and a cluster's head may have none.
    device = torch.device("cuda" if on_gpu else "cpu")
    return choose(member.settings.engine, setup._replace(device=device))


def check_machine(settings: SweepSettings) -> None:
    """ValueError where engines need more than this machine has: they would wait for ever."""
    if settings.ray.cluster:
        return  # the cluster's nodes are another matter
    choose_device(settings.device)
    cores, resources = os.cpu_count() or 1, settings.resources
    threads, engines = max(1, resources.threads_per_engine), max(1, resources.engines)
    if engines * threads > cores:
        raise ValueError(
            f"resources: {engines} engines of {threads} threads, and this machine has {cores} "
            "cores; give fewer by resources.engines=N, resources.threads_per_engine=N, or the "
            "ray.address of a cluster"
        )


def _corners(member: Member) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    """Settings between which all trials lie, as far as a network can refuse them."""
    yield {}, {}
    for _, params, fixed, _ in member.space.points():
        yield params, fixed
    for key, dimension in member.space.search.items():
        if key == "density" or key.startswith(("model.", "variant.")):
            for value in dimension.extremes():
                yield {key: value}, {}
        elif key.startswith("hp."):
            applies = {other: values[0] for other, values in dimension.when.items()}
            for value in dimension.extremes():
                yield applies | {key: value}, {}


def _check_trial(settings: TrialSettings, dataset: data.Dataset) -> None:
    method = find(settings.method)
    make_hyperparameters(method, settings.hp, make_variant(method, settings.variant))
    update_schedule(method, settings)
    if settings.model.match_density and (method.reaches_density or method.emergent):
        raise ValueError(
            f"model.match_density: makes a small dense network, and {settings.method} is sparse "
            "already; use it with the space small_dense, or give density=D"
        )
    model = models.probe(settings.model, dataset.input_shape, dataset.num_classes)
    layers_of(settings, method, models.weights(model))
    data.split(len(dataset.train.labels), settings.data.validation, settings.seed)
