"""The command line. Each command is one call into the module of its name.

The rule to know: what the user got wrong ends with exit status 2 and one message, before anything
is written or started; everything else that goes wrong is a bug and shows its traceback.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import click
from rich.table import Table

WORDS = click.argument("words", nargs=-1, type=click.UNPROCESSED)
MATCH = click.option(
    "--match",
    type=click.Choice(["density", "flops"]),
    default="density",
    help="Compare at equal density, or at nearly equal FLOPs of inference.",
)


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program with status 2 where the code within finds fault with what the user gave."""
    from sparsetune.store.lock import SweepHeld
    from sparsetune.store.paths import StorageAway

    try:
        yield
    except (ValueError, SweepHeld, StorageAway) as error:
        click.echo(f"sparsetune: {error}", err=True)
        sys.exit(2)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sparsetune")
def main() -> None:
    """Search the hyperparameters of sparse training methods, and compare the methods fairly.

    Settings follow a command as key=value words: `sparsetune sweep set density=0.05 name=first`.
    """


@main.command()
@WORDS
def train(words: tuple[str, ...]) -> None:
    """Train one setting of SPACE: no search, no Ray.

    \b
    sparsetune train SPACE [start=paper|seed-text] [key=value ...]
    """
    _launch(words, "train", dry_run=False)


@main.command()
@click.option("--dry-run", is_flag=True, help="Print settings and first trials; start nothing.")
@WORDS
def sweep(words: tuple[str, ...], dry_run: bool) -> None:
    """Search the settings of one or several SPACEs in one sweep.

    \b
    sparsetune sweep SPACE [SPACE ...] [density=0.02,0.05] name=NAME [key=value ...]
    """
    _launch(words, "sweep", dry_run)


def _launch(words: tuple[str, ...], command: Literal["train", "sweep"], dry_run: bool) -> None:
    from sparsetune.cluster.tuner import check_cluster
    from sparsetune.space.member import scheduling
    from sparsetune.space.resolve import resolve
    from sparsetune.sweeps import create, warm_start

    spaces = [word for word in words if "=" not in word and word[:1] not in "+~"]
    with ExitStack() as stack:
        with user_errors():
            resolved = warm_start.warmed(
                resolve(spaces, [w for w in words if w not in spaces], command)
            )
            if dry_run:
                click.echo(_preview(resolved))
                return
            if command == "sweep":
                check_cluster(resolved.settings.ray, resolved.storage)
                click.echo(f"Early stopping: {scheduling(resolved.members).reason}.", err=True)
            create.create(resolved, command)
            members = stack.enter_context(create.opened(resolved.storage, resolved.name))
        sys.exit(_run(members, lambda: create.undo(members)))


def _run(members: list[Any], undo: Callable[[], bool] = lambda: False) -> int:
    from sparsetune.store import layout
    from sparsetune.sweeps import run as sweep

    again = layout.resume_command(members[0].folder.parent)
    return _guarded(lambda: sweep.run(members), again, undo)


def _guarded(run: Callable[[], int], again: str, undo: Callable[[], bool] = lambda: False) -> int:
    """The exit status of `run`; what ended it without being a bug is said, and how to go on.

    Where the cluster cannot be used, `undo` may have the command as if it had not been given."""
    from sparsetune.cluster.fleet import ClusterError
    from sparsetune.store.lock import SweepHeld
    from sparsetune.store.paths import CheckpointLost, StorageAway

    try:
        return run()
    except (CheckpointLost, ClusterError, SweepHeld, StorageAway) as error:
        click.echo(f"sparsetune: {error}", err=True)
        if isinstance(error, ClusterError) and undo():
            click.echo("Nothing was begun; the same command can be given again.", err=True)
        elif not isinstance(error, SweepHeld):
            click.echo(f"Go on by: {again}", err=True)
        if isinstance(error, StorageAway):
            return 130
        return 2 if isinstance(error, ClusterError) else 1


def _preview(resolved: Any) -> str:
    """The settings of each member as yaml, and the trials that would come first."""
    import optuna
    import yaml

    from sparsetune.search.sampler import make_sampler
    from sparsetune.settings import to_dict
    from sparsetune.space.member import scheduling

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lines = []
    for member in resolved.members:
        lines += [f"# {member.name}", yaml.safe_dump(to_dict(member.settings), sort_keys=False)]
        points = member.space.points()
        for number, point in enumerate(points[: member.settings.trials]):
            lines.append(
                f"# trial {number}, start point {point.name}: {point.params | point.fixed}"
            )
        sampler = make_sampler(member.settings.sampler, seed=0)
        study = optuna.create_study(directions=member.directions, sampler=sampler)
        for number in range(len(points), min(len(points) + 3, member.settings.trials)):
            lines.append(f"# trial {number}, such as: {member.space.suggest(study.ask())}")
        lines.append("")
    return "\n".join(
        [
            *lines,
            f"# Early stopping: {scheduling(resolved.members).reason}.",
            "# Dry run: nothing was started.",
        ]
    )


def _named(words: tuple[str, ...], allowed: set[str]) -> dict[str, Any]:
    """{name, storage, ...} from a name and key=value words."""
    from sparsetune.space import config

    names = [word for word in words if "=" not in word]
    given = config.parse_words([word for word in words if "=" in word])
    for key in given:
        if key not in allowed | {"name", "storage"}:
            words_allowed = ", ".join(sorted(allowed | {"name", "storage"}))
            raise ValueError(f"{key}: not a key of this command; allowed: {words_allowed}")
    names += [given["name"]] if "name" in given else []
    if len(names) > 1:
        raise ValueError(f"name: give one, not {len(names)}: {' '.join(names)}")
    if names:
        given["name"] = names[0]
        config.check_name(names[0].partition("/")[0])
    settings = config.build({key: value for key, value in given.items() if key != "name"})
    return given | {"storage": config.storage_folder(settings.storage)}


@main.command()
@click.option("--allow-wider", is_flag=True, help="Let the words widen ranges of the search.")
@click.option("--retry-failed", is_flag=True, help="Failed trials go on from their checkpoints.")
@WORDS
def resume(words: tuple[str, ...], allow_wider: bool, retry_failed: bool) -> None:
    """Go on with a sweep or one of its members, or extend it.

    \b
    sparsetune resume NAME [trials=N] [storage=FOLDER] [--retry-failed]
    sparsetune resume NAME [SPACE ...] [key=value ...] [--allow-wider]
    Where trials run may change: concurrency device engine failures ray.address resources.*
    wandb.mode.
    What else is given must be what the sweep has; ranges may become wider, with --allow-wider.
    """
    from sparsetune.store import layout
    from sparsetune.sweeps import create
    from sparsetune.sweeps import unchanged as changes

    specs = [word for word in words if "=" not in word]
    keys = {"name", "storage", "trials", *changes.PLACES}
    own = [word for word in words if word.partition("=")[0].strip() in keys]
    if not any(word.startswith("name=") for word in own):
        own, specs = specs[:1] + own, specs[1:]
    with ExitStack() as stack:
        with user_errors():
            given = _named(tuple(own), keys)
            if "name" not in given:
                known = ", ".join(layout.sweeps(given["storage"])) or "none"
                raise ValueError(f"resume: give the name of a sweep; there are: {known}")
            wanted = create.Extension(
                trials=given.get("trials"),
                places={key: given[key] for key in changes.PLACES if key in given},
                specs=specs,
                words=[word for word in words if "=" in word and word not in own],
                allow_wider=allow_wider,
                retry_failed=retry_failed,
            )
            members = stack.enter_context(create.opened(given["storage"], given["name"], wanted))
        sys.exit(_run(members))


@main.command()
@click.option("--retry-failed", is_flag=True, help="Failed runs go on from their checkpoints.")
@WORDS
def confirm(words: tuple[str, ...], retry_failed: bool) -> None:
    """Train the best of a finished search on fresh seeds, and read the winner's test accuracy.

    \b
    sparsetune confirm NAME [seeds=5] [top=3] [full=true] [multiplier=1] [density=0.02,0.05]
    top: trials that are ranked again on validation. full: the winner is trained once more per seed,
    on training and validation data. multiplier=2: twice the epochs, schedules stretched. density:
    where on a front of accuracy and density, if one was searched, the method is to be compared.
    Where runs are trained may change as with resume. Called again it goes on; more seeds are added.
    """
    from sparsetune.comparison import confirm as confirmation
    from sparsetune.sweeps import unchanged as changes
    from sparsetune.sweeps.create import Extension

    with ExitStack() as stack:
        with user_errors():
            own = [w for w in words if "=" in w and w.partition("=")[0] in confirmation.KEYS]
            asked = confirmation.parse(own)
            given = _named(tuple(w for w in words if w not in own), set(changes.PLACES))
            if "name" not in given:
                raise ValueError("confirm: give the name of a sweep, or SWEEP/MEMBER")
            places = {key: given[key] for key in changes.PLACES if key in given}
            wanted = Extension(places=places, retry_failed=retry_failed)
            confirmations = stack.enter_context(
                confirmation.begun(given["storage"], given["name"], asked, wanted)
            )
        again = confirmation.command(confirmations)
        sys.exit(_guarded(lambda: confirmation.run(confirmations), again))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@WORDS
def status(words: tuple[str, ...], as_json: bool) -> None:
    """What a sweep has done so far; without NAME, all sweeps.

    \b
    sparsetune status [NAME] [--json] [storage=FOLDER]
    """
    from sparsetune.store import layout
    from sparsetune.sweeps import status as state

    with user_errors():
        given = _named(words, set())
        if "name" in given:
            folders = layout.member_folders(given["storage"], given["name"])
            result = state.sweep_status(folders)
        else:
            result = state.all_status(given["storage"])
    if as_json:
        click.echo(json.dumps(_finite(result), indent=2))
        return
    sweeps = result.get("sweeps", [result])
    if not sweeps:
        click.echo(f"No sweeps in {given['storage']}.")
    for each in sweeps:
        if "error" in each:
            click.echo(f"{each['name']}: {each['error']}", err=True)
        else:
            state.print_members(each.get("members", [each]))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; they become null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not -1e308 < value < 1e308 else value


@main.command()
@click.option("--port", type=int, default=8080, show_default=True, help="0: any that is free.")
@WORDS
def dashboard(words: tuple[str, ...], port: int) -> None:
    """A sweep in optuna-dashboard, also while it runs; end with Ctrl-C.

    \b
    sparsetune dashboard NAME [--port 8080] [storage=FOLDER]
    Shows a copy, on this machine alone: what is done there does not reach the sweep. Needs:
    pip install 'sparsetune[dashboard]'
    """
    from sparsetune.reports import dashboard as shown

    with user_errors():
        storage, names = _names(words)
        if len(names) > 1:
            raise ValueError(f"name: give one, not {len(names)}: {' '.join(names)}")
        shown.serve(storage, names[0], port)


@main.command()
@click.option("--trial", default="best", help="A trial's number; best, as in status, by default.")
@click.option("--wandb", "to_wandb", is_flag=True, help="Also log FILE as a W&B artifact.")
@WORDS
def export(words: tuple[str, ...], trial: str, to_wandb: bool) -> None:
    """Write a trial of a member to FILE: weights, masks, configuration, metrics.

    \b
    sparsetune export NAME FILE [--trial N|best] [--wandb] [storage=FOLDER]

    \b
    It is read, here from best.pt, by:
      import torch
      from sparsetune.training.models import build
      from sparsetune.settings import ModelSettings

    \b
      saved = torch.load("best.pt", weights_only=True)
      model = build(ModelSettings(**saved["config"]["model"]), *saved["network"])
      model.load_state_dict(saved["state_dict"])

    \b
    After model.eval() it takes images in 0..1 from which saved["normalization"]["mean"] is
    subtracted, and which are then divided by saved["normalization"]["deviation"], per channel.
    """
    from sparsetune.reports import export as exporting

    with user_errors():
        own = [word for word in words if "=" not in word]
        if len(own) != 2:
            raise ValueError("export: give NAME FILE, a sweep of one member, or SWEEP/MEMBER")
        given = _named((own[0], *(w for w in words if "=" in w)), {"wandb.mode"})
        file = Path(own[1])
        member, exported = exporting.export(given["storage"], given["name"], trial, file)
        click.echo(f"{file}: trial {exported['trial']} of {member.name}")
        if to_wandb:
            mode = given.get("wandb.mode")
            click.echo(f"{file} is {exporting.to_wandb(member, exported, file, mode)}")


@main.command()
@MATCH
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--csv", "csv_file", type=click.Path(dir_okay=False), help="Also write all runs there."
)
@WORDS
def compare(
    words: tuple[str, ...],
    match: Literal["density", "flops"],
    as_json: bool,
    csv_file: str | None,
) -> None:
    """Compare confirmed sweeps, or members of them: accuracies, costs, and the rules of fairness.

    \b
    sparsetune compare NAME [NAME ...] [--match density|flops] [--json] [--csv FILE]
    Where a rule that forbids a ranking is broken there is none, but the reason and what mends it.
    """
    from sparsetune.comparison import compare as comparing
    from sparsetune.reports import runs_csv, tables

    with user_errors():
        storage, names = _names(words)
        found = comparing.compare(storage, names, match)
        if csv_file:
            runs_csv.save_csv(found, Path(csv_file))
    if as_json:
        click.echo(json.dumps(_finite(found.to_dict()), indent=2))
    else:
        tables.print_comparison(found)


def _names(words: tuple[str, ...]) -> tuple[Any, list[str]]:
    """The storage and the names, of sweeps or of members, that `compare` and `report` are given."""
    names = [word for word in words if "=" not in word]
    given = [_named((name, *(w for w in words if "=" in w)), set()) for name in names]
    if not names:
        raise ValueError("name: give one or more sweeps, or SWEEP/MEMBER")
    return given[0]["storage"], names


@main.command()
@MATCH
@click.option("--html", "html_file", metavar="FILE", type=click.Path(dir_okay=False),
              help="The page to write, NAME.html by default.")  # fmt: skip
@click.option("--wandb", "target", metavar="ENTITY/PROJECT",
              help="Save it there as a W&B report, the same one each time.")  # fmt: skip
@WORDS
def report(
    words: tuple[str, ...],
    match: Literal["density", "flops"],
    html_file: str | None,
    target: str | None,
) -> None:
    """A comparison as a page of its own, or as a W&B report.

    \b
    sparsetune report NAME [NAME ...] [--match density|flops] [--html FILE] [--wandb ENTITY/PROJECT]
    The page needs no network: one file, with tables, pictures and the rules. With --wandb alone
    there is none.
    """
    from sparsetune.comparison import compare as comparing
    from sparsetune.reports import page as html

    with user_errors():
        storage, names = _names(words)
        if target is not None:
            from sparsetune.reports import wandb_report  # ValueError without the extra `report`

            place = wandb_report.place(target)
        found = comparing.compare(storage, names, match)
        if html_file or target is None:
            file = Path(html_file or f"{'-'.join(names).replace('/', '-')}.html")
            html.write(file, found, storage)
            click.echo(f"{file.resolve()}")
        if target is not None:
            click.echo(wandb_report.save(found, storage, *place))


@main.command()
@WORDS
def methods(words: tuple[str, ...]) -> None:
    """The sparse training methods, their variants and hyperparameters."""
    from sparsetune.methods import METHODS
    from sparsetune.terminal import wide_console

    _no_name(words)

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("method", "key", "allowed", "default", "paper or meaning"):
        table.add_column(heading, overflow="fold")
    for method in METHODS.values():
        table.add_row(f"[bold]{method.name}[/bold]", "", "", "", method.paper)
        for field in dataclasses.fields(method.Variant):
            allowed = " | ".join(field.metadata["allowed"])
            table.add_row("", f"variant.{field.name}", allowed, str(field.default), "")
        for field in dataclasses.fields(method.Hyperparameters):
            bounds = field.metadata
            span = f"{bounds['low']:g} to {bounds['high']:g}"
            table.add_row("", f"hp.{field.name}", span, f"{field.default:g}", bounds["meaning"])
    wide_console().print(table)


def _no_name(words: tuple[str, ...]) -> None:
    """`storage` may stand at every command; nothing else says anything to this one."""
    with user_errors():
        if "name" in (given := _named(words, set())):
            raise ValueError(f"'{given['name']}': this command lists all and takes no name")


@main.command()
@WORDS
def spaces(words: tuple[str, ...]) -> None:
    """The search spaces that come with sparsetune: what each fixes and searches."""
    from sparsetune.space import space
    from sparsetune.terminal import wide_console

    _no_name(words)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("space", "method", "searched", "start points"):
        table.add_column(heading, overflow="fold")
    for name in space.names():
        loaded = space.load(name)
        table.add_row(name, loaded.method, " ".join(loaded.search), " ".join(loaded.start))
    wide_console().print(table)
    click.echo(f"\nFiles: {space.folder()}")


if __name__ == "__main__":
    main()
