"""The command line. Each command is one call into one of the rooms below.

The rule to know: what the user got wrong ends with exit status 2 and one message, before anything
is written or started; everything else that goes wrong is a bug and shows its traceback.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

import click
from rich.table import Table

WORDS = click.argument("words", nargs=-1, type=click.UNPROCESSED)
CREATED = click.Path(dir_okay=False)
MATCH = click.option(
    "--match",
    type=click.Choice(["density", "flops"]),
    default="density",
    help="Compare at equal density, or at nearly equal FLOPs of inference.",
)


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program with status 2 where the code within finds fault with what the user gave."""
    from sparsetune.store.paths import StorageAway

    try:
        yield
    except (ValueError, StorageAway) as error:
        click.echo(f"sparsetune: {error}", err=True)
        sys.exit(2)


def _drive(command: Callable[..., dict[str, Any]], *args: Any, **options: bool) -> NoReturn:
    """Ends the program as the command does that trains: 0 done, 1 trials failed, 130 interrupted.

    What ended it without being a bug is said, and how to go on; 2 where it was refused."""
    from sparsetune.cluster.fleet import ClusterError
    from sparsetune.store.lock import SweepHeld
    from sparsetune.store.paths import CheckpointLost, StorageAway
    from sparsetune.sweeps.launch import Refused

    try:
        result = command(*args, **options)
    except (Refused, CheckpointLost, ClusterError, SweepHeld, StorageAway) as error:
        click.echo("\n".join([f"sparsetune: {error}", *getattr(error, "__notes__", [])]), err=True)
        refused = isinstance(error, Refused | ClusterError)
        sys.exit(2 if refused else 130 if isinstance(error, StorageAway) else 1)
    failed = any(member["trials"]["failed"] for member in result.get("members", [result]))
    sys.exit(130 if result["state"] == "interrupted" else int(failed))


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
    from sparsetune.sweeps import launch

    _drive(launch.begin, "train", words)


@main.command()
@click.option("--dry-run", is_flag=True, help="Print settings and first trials; start nothing.")
@WORDS
def sweep(words: tuple[str, ...], dry_run: bool) -> None:
    """Search the settings of one or several SPACEs in one sweep.

    \b
    sparsetune sweep SPACE [SPACE ...] [density=0.02,0.05] name=NAME [key=value ...]
    """
    from sparsetune.sweeps import launch

    if dry_run:
        with user_errors():
            click.echo(launch.preview(words))
    else:
        _drive(launch.begin, "sweep", words)


@main.command()
@click.option("--allow-wider", is_flag=True, help="Let the words widen ranges of the search.")
@click.option("--retry-failed", is_flag=True, help="Failed trials go on from their checkpoints.")
@WORDS
def resume(words: tuple[str, ...], allow_wider: bool, retry_failed: bool) -> None:
    """Go on with a sweep or one of its members, or extend it.

    \b
    sparsetune resume NAME [trials=N] [storage=FOLDER] [--retry-failed]
    sparsetune resume NAME search.KEY.high=B [search.KEY.low=A] --allow-wider
    Where trials run may change: concurrency device engine failures ray.address resources.*
    wandb.mode.
    What else is given must be what the sweep has; ranges may become wider, with --allow-wider.
    """
    from sparsetune.sweeps import launch

    _drive(launch.go_on, words, retry_failed=retry_failed, allow_wider=allow_wider)


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
    from sparsetune.comparison import launch

    _drive(launch.carry_out, words, retry_failed=retry_failed)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@WORDS
def status(words: tuple[str, ...], as_json: bool) -> None:
    """What a sweep has done so far; without NAME, all sweeps.

    \b
    sparsetune status [NAME] [--json] [storage=FOLDER]
    """
    from sparsetune.space.words import named
    from sparsetune.store.layout import member_folders
    from sparsetune.sweeps.status import all_status, print_members, sweep_status

    with user_errors():
        name, values = named(words)
        storage = values["storage"]
        result = sweep_status(member_folders(storage, name)) if name else all_status(storage)
    if as_json:
        click.echo(json.dumps(_finite(result), indent=2))
        return
    sweeps = result.get("sweeps", [result])
    if not sweeps:
        click.echo(f"No sweeps in {storage}.")
    for sweep in sweeps:
        if "error" in sweep:
            click.echo(f"{sweep['name']}: {sweep['error']}", err=True)
        else:
            print_members(sweep.get("members", [sweep]))


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
    from sparsetune.reports.dashboard import serve
    from sparsetune.space.words import named

    with user_errors():
        name, values = named(words)
        if not name:
            raise ValueError("name: give a sweep, or SWEEP/MEMBER")
        serve(values["storage"], name, port)


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
    from sparsetune.space.words import named, split

    with user_errors():
        names, settings = split(words)
        if len(names) != 2:
            raise ValueError("export: give NAME FILE, a sweep of one member, or SWEEP/MEMBER")
        name, values = named([names[0], *settings], {"wandb.mode"})
        file = Path(names[1])
        member, exported = exporting.export(values["storage"], name, trial, file)
        click.echo(f"{file}: trial {exported['trial']} of {member.name}")
        if to_wandb:
            mode = values.get("wandb.mode")
            click.echo(f"{file} is {exporting.to_wandb(member, exported, file, mode)}")


@main.command()
@MATCH
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--csv", "csv_file", type=CREATED, help="Also write all runs there.")
@WORDS
def compare(
    words: tuple[str, ...], match: Literal["density", "flops"], as_json: bool, csv_file: str | None
) -> None:
    """Compare confirmed sweeps, or members of them: accuracies, costs, and the rules of fairness.

    \b
    sparsetune compare NAME [NAME ...] [--match density|flops] [--json] [--csv FILE]
    Where a rule that forbids a ranking is broken there is none, but the reason and what mends it.
    """
    from sparsetune.comparison.compare import compare
    from sparsetune.reports import runs_csv, tables

    with user_errors():
        names, storage = _names(words)
        comparison = compare(*names, match=match, storage=storage)
        if csv_file:
            runs_csv.save_csv(comparison, Path(csv_file))
    if as_json:
        click.echo(json.dumps(_finite(comparison.to_dict()), indent=2))
    else:
        tables.print_comparison(comparison)


def _names(words: tuple[str, ...]) -> tuple[list[str], Path]:
    """The sweeps or members that `compare` and `report` are given, and the storage."""
    from sparsetune.space.words import named, split

    names, settings = split(words)
    name, values = named(settings)
    return [*names, *([name] if name else [])], values["storage"]


@main.command()
@MATCH
@click.option("--html", "html_file", metavar="FILE", type=CREATED,
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
    from sparsetune.comparison.compare import compare
    from sparsetune.reports import page

    with user_errors():
        names, storage = _names(words)
        if target is not None:
            from sparsetune.reports import wandb_report  # ValueError without the extra `report`

            place = wandb_report.place(target)
        if html_file or target is None:
            click.echo(page.report(*names, html=html_file, match=match, storage=storage))
        if target is not None:
            comparison = compare(*names, match=match, storage=storage)
            click.echo(wandb_report.save(comparison, storage, *place))


@main.command()
@WORDS
def methods(words: tuple[str, ...]) -> None:
    """The sparse training methods, their variants and hyperparameters."""
    from sparsetune.methods import METHODS

    rows = []
    for method in METHODS.values():
        rows.append((f"[bold]{method.name}[/bold]", "", "", "", method.paper))
        for field in dataclasses.fields(method.Variant):
            allowed = " | ".join(field.metadata["allowed"])
            rows.append(("", f"variant.{field.name}", allowed, str(field.default), ""))
        for field in dataclasses.fields(method.Hyperparameters):
            bounds = field.metadata
            span = f"{bounds['low']:g} to {bounds['high']:g}"
            rows.append(("", f"hp.{field.name}", span, f"{field.default:g}", bounds["meaning"]))
    _print_all(words, ("method", "key", "allowed", "default", "paper or meaning"), rows)


def _print_all(
    words: tuple[str, ...], headings: Iterable[str], rows: Iterable[tuple[str, ...]]
) -> None:
    """The table of a command that takes no name; `storage` may stand at it, as at every one."""
    from sparsetune.space.words import named
    from sparsetune.terminal import wide_console

    with user_errors():
        name, _ = named(words)
        if name:
            raise ValueError(f"'{name}': this command lists all and takes no name")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    wide_console().print(table)


@main.command()
@click.argument("key", default="")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the table as Markdown.")
def settings(key: str, as_markdown: bool) -> None:
    """What can be set by key=value: allowed values, defaults, meanings.

    \b
    sparsetune settings [KEY] [--markdown]
    KEY is one of them, such as optimizer.lr, or a group: optimizer.
    """
    from sparsetune.reports import settings_table

    with user_errors():
        if as_markdown:
            click.echo(settings_table.markdown(key))
        else:
            settings_table.print_settings(key)


@main.command()
@WORDS
def spaces(words: tuple[str, ...]) -> None:
    """The search spaces that come with sparsetune: what each fixes and searches."""
    from sparsetune.space import files

    loaded = {name: files.load(name) for name in files.names()}
    rows = [(k, s.method, " ".join(s.search), " ".join(s.start)) for k, s in loaded.items()]
    _print_all(words, ("space", "method", "searched", "start points"), rows)
    click.echo(f"\nFiles: {files.folder()}")


if __name__ == "__main__":
    main()
