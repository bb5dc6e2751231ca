"""The W&B report of a comparison: its figures as text, and panels over the runs that W&B has.

The rule to know: curves, bars and densities come from confirmation runs alone (job type `confirm`),
pictures of the search from search runs. A report is found again by a mark in its description, which
is made of the sweeps' ids and of what is compared: any machine updates it, whatever it is called by
then, and sweeps of the same name never overwrite each other's.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb
from wandb.sdk.lib.service.service_connection import WandbApiFailedError

from sparsetune.comparison.values import Cell, Comparison, Line
from sparsetune.comparison.winners import confirmations
from sparsetune.reports.tables import by_level, markdown, ranking, sections
from sparsetune.settings import WandbSettings
from sparsetune.space.member import Member
from sparsetune.store import journal
from sparsetune.store.layout import member_folders
from sparsetune.sweeps.tracking import resolve_mode

try:
    import wandb_workspaces.expr as ws
    import wandb_workspaces.reports.v2 as wr
except ImportError as error:
    raise ValueError(
        "--wandb: wandb-workspaces is missing; get it by: pip install 'sparsetune[report]'"
    ) from error

ACCURACY = "test/accuracy"
TITLE = 128  # characters that W&B takes


@dataclass(frozen=True)
class _Source:
    """A member, and the project that its runs lie in: ENTITY/PROJECT."""

    member: Member
    sweep_id: str
    place: str
    held_out: bool  # do confirmation runs have a validation accuracy?


def place(target: str) -> tuple[str, str]:
    """Entity and project of ENTITY/PROJECT. ValueError for anything else."""
    entity, _, project = target.partition("/")
    if not entity or not project or "/" in project:
        raise ValueError(f"--wandb: '{target}' is not ENTITY/PROJECT, such as my-team/sparsetune")
    return entity, project


def save(comparison: Comparison, storage: Path, entity: str, project: str) -> str:
    """Saves the report, or updates the one of an earlier call, and returns its address.

    ValueError where W&B is away or does not take it.
    """
    if resolve_mode(WandbSettings(mode="online")) == "offline":  # the client would ask for a key
        raise ValueError(
            "--wandb: nobody is logged in to W&B here; run `wandb login`, or set WANDB_API_KEY"
        )
    try:
        return _save(comparison, storage, entity, project)
    except (wandb.Error, WandbApiFailedError) as error:
        raise ValueError(
            f"--wandb: W&B was not reached, or would not: {' '.join(str(error).split())}"
        ) from error


def _save(comparison: Comparison, storage: Path, entity: str, project: str) -> str:
    api, own = wandb.Api(), f"{entity}/{project}"
    sources = _sources(comparison, storage, api)
    mark = _mark(comparison, sources)
    try:
        known = [saved for saved in api.reports(own) if mark in (saved.description or "")]
        lacking = [*_lacking(comparison, sources, api)]
    except ValueError as error:  # the client's, where the server's answer has no such project
        places = ", ".join(dict.fromkeys(source.place for source in sources.values()))
        raise ValueError(
            f"--wandb: {api.settings['base_url']}: {error}, or you may not read it. The report "
            f"goes to {own}; the runs belong to {places}, where `wandb sync` takes those that were "
            "recorded offline"
        ) from error
    for line in lacking:
        print(line, file=sys.stderr)
    command = f"sparsetune report {' '.join(comparison.names)} --match {comparison.match}"
    about = (
        f"Made by `{command} --wandb {own}`, which, run again, replaces all of this: change a copy."
    )
    texts = [about, *lacking, *map(markdown, [ranking(comparison), *sections(comparison)])]
    report = wr.Report(
        entity=entity,
        project=project,
        # The title gets into the address.
        title=f"sparsetune {' '.join(comparison.names)}".replace("/", " ")[:TITLE],
        description=f"{command} ({mark})",
        blocks=[
            *map(wr.MarkdownBlock, texts),
            *_confirmed(comparison, sources, own),
            *_searches(sources, own),
        ],
        width="fluid",
    )
    for saved in known[:1]:
        report.id, report.title = saved.id, saved.display_name or report.title
        report._discussion_threads = saved.spec.get("discussionThreads", [])  # readers' comments
    return str(report.save().url)


def _sources(comparison: Comparison, storage: Path, api: wandb.Api) -> dict[str, _Source]:
    """The members by name."""
    sources = {}
    for folder in [path for name in comparison.names for path in member_folders(storage, name)]:
        header = journal.header(folder)
        member = Member.from_header(header["member"])
        settings = member.settings.wandb
        # As `wandb.init` finds it where the settings name none.
        entity = settings.entity or api.settings["entity"] or api.default_entity
        runs = [journal.header(path)["confirm"] for path in confirmations(folder).values()]
        held_out = any(not asked["full"] for asked in runs)
        place = f"{entity}/{settings.project}"
        sources[member.name] = _Source(member, header["sweep_id"], place, held_out)
    return sources


def _mark(comparison: Comparison, sources: dict[str, _Source]) -> str:
    compared = sorted((source.sweep_id, name) for name, source in sources.items())
    return hashlib.sha256(json.dumps([compared, comparison.match]).encode()).hexdigest()[:12]


def _lines(cells: Iterable[Cell]) -> dict[tuple[str, int], Line]:
    """What was confirmed, by the group of its runs in W&B and its trial."""
    lines = (line for cell in cells for line in (cell.chosen, cell.paper) if line is not None)
    return {(line.group, line.trial): line for line in lines}


def _groups(cells: Iterable[Cell]) -> list[str]:
    return list(dict.fromkeys(group for group, _ in _lines(cells)))


def _runs(cells: Iterable[Cell]) -> int:
    return sum(len(line.seeds) for line in _lines(cells).values())


def _lacking(comparison: Comparison, sources: dict[str, _Source], api: wandb.Api) -> Iterable[str]:
    """Where W&B has not got all confirmation runs, a sentence that says so."""
    for place in dict.fromkeys(source.place for source in sources.values()):
        cells = [cell for cell in comparison.cells if sources[cell.member].place == place]
        wanted = {"jobType": "confirm", "group": {"$in": _groups(cells)}}
        num = len(api.runs(place, wanted, per_page=1))
        if num < _runs(cells):
            yield (
                f"W&B has {num} of the {_runs(cells)} confirmation runs that belong to {place}: "
                "pictures lack the others until `wandb sync` uploads them."
            )


# Panels -------------------------------------------------------------------------------------------


def _runset(source: str, own: str, name: str, groupby: list[str], *filters: Any) -> wr.Runset:
    """Runs of a project that pass all filters.

    One of the report's own project names none, which spares a request for each.
    """
    entity, project = ("", "") if source == own else source.split("/")
    return wr.Runset(
        entity=entity,
        project=project,
        name=name if source == own else f"{name} in {source}",
        filters=ws.And(*filters),
        groupby=groupby,
    )


def _confirmed(comparison: Comparison, sources: dict[str, _Source], own: str) -> Iterable[Any]:
    """Pictures of the confirmation runs: of all, and, of those that may be compared, by level."""
    everything = comparison.cells
    if not _groups(everything):
        return
    yield wr.H1("Confirmation runs")
    density, accuracy = wr.SummaryMetric("density/all"), wr.SummaryMetric(ACCURACY)
    title = "test accuracy against density"
    against = wr.ScatterPlot(title=title, x=density, y=accuracy, log_x=True)
    yield _grid(_confirmation(everything, sources, own), [against, _bars(everything)])
    held_out = any(source.held_out for source in sources.values())
    metrics = ["train/loss", *(["val/accuracy"] if held_out else []), "density/all"]
    for title, at in by_level(comparison).items():
        if cells := [cell for cell in at if cell.state == "confirmed"]:
            layers = dict.fromkeys(k for line in _lines(cells).values() for k in line.layers)
            names = [*metrics, *(f"density/layer/{layer}" for layer in layers)]
            panels = [_bars(cells), *(_curve(name, cells) for name in names)]
            yield wr.H2(title)
            yield _grid(_confirmation(cells, sources, own), panels)


def _confirmation(cells: list[Cell], sources: dict[str, _Source], own: str) -> list[wr.Runset]:
    runsets = []
    for place in dict.fromkeys(sources[cell.member].place for cell in cells):
        groups = _groups(cell for cell in cells if sources[cell.member].place == place)
        if groups:
            filters = ws.Metric("JobType").isin(["confirm"]), ws.Metric("Group").isin(groups)
            runsets.append(_runset(place, own, "confirmation runs", ["group"], *filters))
    return runsets


def _curve(metric: str, cells: list[Cell]) -> wr.LinePlot:
    return wr.LinePlot(title=metric, x="Step", y=[metric], title_x="epoch", **_over_seeds(cells))


def _bars(cells: list[Cell]) -> wr.BarPlot:
    title, over = f"{ACCURACY}, mean and deviation over seeds", _over_seeds(cells)
    return wr.BarPlot(title=title, metrics=[ACCURACY], max_bars_to_show=_runs(cells), **over)


def _over_seeds(cells: list[Cell]) -> dict[str, Any]:
    over = {"groupby": "Group", "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    return {**over, "max_runs_to_show": _runs(cells)}


def _searches(sources: dict[str, _Source], own: str) -> Iterable[Any]:
    """Pictures of each member's search, folded up: W&B fetches what is opened."""
    yield wr.H1("Search runs")
    for name, source in sources.items():
        member = source.member
        objective, direction = member.objectives[0], member.directions[0]
        columns = [
            wr.ParallelCoordinatesPlotColumn(wr.Config(key), display_name=key, log=dimension.log)
            for key, dimension in member.space.search.items()
        ]
        columns += [
            wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(goal)) for goal in member.objectives
        ]
        history = wr.ScatterPlot(
            title="search history",
            x=wr.Config("trial"),
            y=wr.SummaryMetric(objective),
            running_ymax=direction == "maximize",
            running_ymin=direction == "minimize",
        )
        filters = (
            ws.Metric("JobType").isin([member.traits.name]),
            ws.Metric("Group").isin([name.partition("/")[0]]),
            ws.Config("member.value").isin([name]),  # so W&B's own filters call a config's key
        )
        runset = _runset(source.place, own, "search runs", [], *filters)
        panels = [
            wr.ParallelCoordinatesPlot(columns, title="searched keys"),
            wr.ParameterImportancePlot(objective),
            history,
        ]
        yield wr.H2(name, collapsed_blocks=[_grid([runset], panels)])


def _grid(runsets: list[wr.Runset], panels: list[Any]) -> wr.PanelGrid:
    for place, panel in enumerate(panels):
        panel.layout = wr.Layout(x=place % 3 * 8, y=place // 3 * 6)
    return wr.PanelGrid(runsets=runsets, panels=panels)
