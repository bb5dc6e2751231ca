"""The W&B report, saved by the real client to a loopback server, and its spec read there."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import wandb_workspaces.reports.v2 as reports
from click.testing import CliRunner, Result
from helpers.told_sweep import confirmed, told
from helpers.wandb_server import ServerRun, WandbServer

from sparsetune.cli import main
from sparsetune.comparison import confirm
from sparsetune.comparison.values import (
    Cell,
    Comparison,
    Interval,
    Level,
    Line,
    Pair,
    Rule,
    Tuning,
)
from sparsetune.reports import wandb_report
from sparsetune.space.resolve import resolve
from sparsetune.store import journal
from sparsetune.store.journal import Journal
from sparsetune.sweeps.create import Extension, created, opened
from sparsetune.sweeps.recording import Recording

MEAN = Interval(0.9731, 0.971, 0.9752)
RULES = [
    Rule(1, "equal tuning", "holds", "2 trials each", "", forbids=True),
    Rule(4, "seeds", "broken", "2 of them", "sparsetune confirm toy seeds=5", forbids=False),
]


def line(trial: int, group: str, seeds: tuple[int, ...] = (1001, 1002)) -> Line:
    return Line(
        trial=trial,
        group=group,
        config={"hp.zeta": 0.3},
        seeds=list(seeds),
        statuses=["finished"] * len(seeds),
        test=[0.97] * len(seeds),
        validation=[],
        density=0.05,
        density_sparse=0.05,
        layers={"0.weight": 0.04, "2.weight": 0.2},
        parameters=13300.0,
        flops_train=2.5e9,
        flops_inference=26600.0,
        device_seconds=3.0,
    )


def cell(name: str, density: float | None = 0.05, **given: Any) -> Cell:
    sweep, _, stem = name.partition("/")
    space = stem.partition("@")[0]
    trials = {"finished": 1, "stopped": 0, "diverged": 1, "failed": 0, "running": 0}
    words: dict[str, Any] = {
        "name": name, "space": space, "sweep": sweep, "member": name, "method": space,
        "density": density,
        "state": "confirmed", "note": "", "dense_gradient": "at_update", "begins": "sparse",
        "tuning": Tuning(2, trials, 6, 1.5, [0.9, 0.95]), "chosen": line(1, name),
        "paper": line(0, f"{name} paper"),
        "mean": MEAN, "iqm": MEAN, "paper_mean": Interval(0.96, 0.95, 0.97),
    }  # fmt: skip
    return Cell(**words | given)


def toy(**given: Any) -> Comparison:
    """Two methods at a density, a control without one, and a method of another sweep."""
    cells = [
        cell("toy/set@0.05"),
        cell("toy/rigl@0.05", paper=None, mean=Interval(0.98, 0.97, 0.99)),
        cell("other/dst@0.05", state="infeasible", paper=None, mean=None, paper_mean=None),
        cell("toy/dense", None, paper=line(1, "toy/dense")),  # the start point itself did best
    ]  # fmt: skip
    words: dict[str, Any] = {
        "names": ["toy", "other/dst@0.05"], "match": "density", "seeds": [1001, 1002],
        "cells": cells, "levels": {Level(0.05): [each.name for each in cells[:3]]},
        "pairs": [Pair(0.05, "set", "rigl", Interval(0.2, 0.1, 0.3), None, None, None)],
        "rules": RULES, "ranking": {Level(0.05): ["rigl", "set"]},
        "notes": ["other/dst@0.05: none of its trials is <within> its bounds"], "about": {},
    }  # fmt: skip
    return Comparison(**words | given)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweeps of `toy()`, of which nothing was trained yet."""
    folder = tmp_path_factory.mktemp("storage")
    words = [f"storage={folder}", "density=0.05", "trials=2", "epochs=3", "data.limit=200"]
    ours = ["name=toy", "wandb.entity=ent", "wandb.project=ours"]
    theirs = ["name=other", "wandb.project=theirs"]  # of the default entity
    for spaces, own in ((["set", "rigl", "dense"], ours), (["dst"], theirs)):
        with created(resolve(spaces, [*words, *own], "sweep"), "sweep", [*spaces, *words, *own]):
            pass
    return folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    wandb.teardown()
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        server.projects = {"ent/ours", "ent/theirs"}
        yield server
    wandb.teardown()


def save(storage: Path, comparison: Comparison | None = None) -> str:
    return wandb_report.save(comparison or toy(), storage, "ent", "ours")


def blocks(view: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The report's blocks of a kind, those that are folded up as well."""
    top = json.loads(view["spec"])["blocks"]
    folded = [inner for block in top for inner in block.get("collapsedChildren", [])]
    return [block for block in [*top, *folded] if block["type"] == kind]


def text(view: dict[str, Any]) -> str:
    return "\n".join(block["content"] for block in blocks(view, "markdown-block"))


def filters(runset: dict[str, Any]) -> dict[str, list[str]]:
    """What a runset's filters ask for, all of it; run attribute or config key -> its values."""
    found = runset["filters"]["filters"]
    assert {each.get("connector", "AND") for each in found} == {"AND"}
    assert {each["op"] for each in found} == {"IN"}
    assert not any(each["disabled"] for each in found)
    return {f"{each['key']['section']}.{each['key']['name']}": each["value"] for each in found}


def panels(grid: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = grid["metadata"]["panelBankSectionConfig"]["panels"]
    return [(panel["viewType"], panel["config"]) for panel in found]


def test_what_is_saved(server: WandbServer, storage: Path) -> None:
    url = save(storage)
    (view,) = server.reports.values()
    assert url == f"{server.url}/ent/ours/reports/sparsetune-toy-other-dst@0.05--{view['id']}"
    everything, level, apart, *searches = blocks(view, "panel-grid")

    # Confirmation runs alone, by group; those that are no result at their level stand in no level.
    groups = ["toy/set@0.05", "toy/set@0.05 paper", "toy/rigl@0.05"]
    ours, theirs = everything["metadata"]["runSets"]
    (at_level,), (alone,) = (grid["metadata"]["runSets"] for grid in (level, apart))
    expected = [(ours, [*groups, "toy/dense"]), (theirs, ["other/dst@0.05"])]
    for runset, names in [*expected, (at_level, groups), (alone, ["toy/dense"])]:
        assert filters(runset)["run.jobType"] == ["confirm"]
        assert sorted(filters(runset)["run.group"]) == sorted(names)
        assert runset["grouping"] == [{"section": "run", "name": "group"}]
        # The report's own project is not named.
        assert "project" not in runset or runset is theirs
    assert (theirs["project"]["entityName"], theirs["project"]["name"]) == ("ent", "theirs")
    (scatter, axes), (bars, bar) = panels(everything)
    assert (scatter, bars) == ("Scatter Plot", "Bar Chart")
    assert (axes["xAxis"], axes["yAxis"]) == ("summary:density/all", "summary:test/accuracy")
    assert bar["metrics"] == ["test/accuracy"]
    (_, bar), *curves = panels(level)
    assert {kind for kind, _ in curves} == {"Run History Line Plot"}
    layers = ["density/layer/0.weight", "density/layer/2.weight"]
    assert [curve["metrics"] for _, curve in curves] == [
        [name] for name in ("train/loss", "density/all", *layers)
    ]
    for panel in [bar, *(curve for _, curve in curves)]:
        assert (panel["groupBy"], panel["groupAgg"], panel["groupArea"]) == (
            "group",
            "mean",
            "stddev",
        )
        assert panel["aggregate"]
        assert panel["limit"] == 6  # two settings of SET and one of RigL on two seeds

    # Each member's search runs, where its journal says that they are.
    names = ["toy/set@0.05", "toy/rigl@0.05", "toy/dense", "other/dst@0.05"]
    for grid, name in zip(searches, names, strict=True):
        (runset,) = grid["metadata"]["runSets"]
        sweep, method = name.split("/")
        asked = {"run.jobType": [method.partition("@")[0]], "run.group": [sweep]}
        assert filters(runset) == asked | {"config.member.value": [name]}
        assert runset["grouping"] == []
        (parallel, columns), (importance, target), (history, axes) = panels(grid)
        assert (parallel, importance, history) == (
            "Parallel Coordinates Plot",
            "Parameter Importance",
            "Scatter Plot",
        )
        accessors = [column["accessor"] for column in columns["columns"]]
        assert "config:optimizer.value.lr" in accessors
        assert accessors[-1] == "summary:val/accuracy"
        assert target["targetKey"] == "val/accuracy"
        assert (axes["xAxis"], axes["yAxis"]) == ("config:trial.value", "summary:val/accuracy")
        assert axes["showMaxYAxisLine"]
    project = searches[-1]["metadata"]["runSets"][0]["project"]
    assert (project["entityName"], project["name"]) == ("ent", "theirs")
    assert "project" not in searches[0]["metadata"]["runSets"][0]

    # The figures that `compare` prints.
    assert "At density 0.05: 1. rigl 98.00, 2. set 97.31" in text(view)
    assert "| set | 97.31 ±0.21 | 97.31 ±0.21 | 96.00 ±1.00 |" in text(view)
    assert "| dst | - | 97.31 ±0.21 | - | 0.0500 | 0.0500 | 13.3 k | infeasible |" in text(view)
    assert "| 0.05 | set - rigl | - | 0.20 [0.10, 0.30] | - |" in text(view)
    assert "| 4 | seeds | broken | 2 of them |" in text(view)
    assert "none of its trials is \\<within\\> its bounds" in text(view)

    loaded = reports.Report.from_url(url)
    assert [type(block) for block in loaded.blocks].count(reports.PanelGrid) == 3
    assert loaded.id == view["id"]


def test_a_refusal_has_its_reason_and_what_mends_it(server: WandbServer, storage: Path) -> None:
    rules = [dataclasses.replace(RULES[1], forbids=True)]
    save(storage, toy(rules=rules, ranking=None))
    (view,) = server.reports.values()
    verdict = text(view)[text(view).index("## No ranking") :]
    assert "Rule 4, seeds, is broken: 2 of them" in verdict
    assert "Mend it: sparsetune confirm toy seeds=5" in verdict
    assert "At density" not in text(view)


def test_saved_again_it_is_the_same_report(server: WandbServer, storage: Path) -> None:
    url = save(storage)
    (view,) = server.reports.values()
    view["displayName"] = "Which is best?"  # on W&B's site, where somebody comments on it, too
    spec = json.loads(view["spec"])
    view["spec"] = json.dumps(spec | {"discussionThreads": [{"id": "why?"}]})
    again = save(storage, toy(ranking={Level(0.05): ["set", "rigl"]}))
    assert list(server.reports) == [view["id"]]
    assert again == url.replace("sparsetune-toy-other-dst@0.05", "Which-is-best?")
    assert "1. set 97.31, 2. rigl 98.00" in text(view)
    assert json.loads(view["spec"])["discussionThreads"] == [{"id": "why?"}]
    # What compares something else is another one.
    assert save(storage, toy(match="flops")) not in (url, again)
    assert len(server.reports) == 2


def test_it_says_which_runs_were_not_uploaded(
    server: WandbServer, storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(7):
        server.runs[str(number)] = ServerRun(str(number), "toy/set@0.05", "confirm")
    save(storage)
    (view,) = server.reports.values()
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("W&B has 7 of the 8 confirmation runs that belong to ent/ours: ")
    assert said[1].startswith("W&B has 0 of the 2 confirmation runs that belong to ent/theirs: ")
    assert all(line in text(view) for line in said)
    for number, group in enumerate(["toy/dense", "other/dst@0.05", "other/dst@0.05"], 7):
        server.runs[str(number)] = ServerRun(str(number), group, "confirm")
    server.runs["10"] = ServerRun("10", "toy/dense", "rank")
    save(storage)
    assert capsys.readouterr().err == ""
    assert "confirmation runs that belong" not in text(view)


def test_validation_curves_where_images_were_held_out(
    server: WandbServer, storage: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(storage, tmp_path / "copy"))
    header = journal.header(copy / "toy/set@0.05") | {"confirm": {"full": False}}
    Journal.create(copy / "toy/set@0.05/confirm", header).close()
    save(copy)
    (view,) = server.reports.values()
    metrics = [config["metrics"] for _, config in panels(blocks(view, "panel-grid")[1])]
    assert metrics[1:4] == [["train/loss"], ["val/accuracy"], ["density/all"]]


# As a command -------------------------------------------------------------------------------------


def report(storage: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["report", "toy", f"storage={storage}", *words])


def test_the_command(server: WandbServer, storage: Path) -> None:
    """On a sweep that was not trained yet: unfinished members, no ranking."""
    done = report(storage, "--wandb", "ent/ours")
    assert done.exit_code == 0, done.output
    (view,) = server.reports.values()
    assert done.stdout == f"{server.url}/ent/ours/reports/sparsetune-toy--{view['id']}\n"
    assert done.stderr == ""
    assert "unfinished" in text(view)
    assert len(blocks(view, "panel-grid")) == 3  # searches alone


@pytest.mark.slow
def test_its_filters_find_the_runs(server: WandbServer, tmp_path: Path) -> None:
    """A sweep and its confirmation, sent by the real client; then what each runset selects."""
    words = ["density=0.2,0.5", "trials=4", "name=toy", "wandb.project=ours"]
    path = confirmed(told(tmp_path, ["set"], *words), "seeds=2", "top=2")
    online = Extension(places={"wandb.mode": "online"})
    with opened(tmp_path, "toy", online) as members:
        send(Recording(members, path))
    with confirm.begun(tmp_path, "toy", confirm.Asked(), online) as confirmations:
        send(confirm._Recording(confirmations))
    done = report(tmp_path, "--wandb", "ent/ours")
    assert done.exit_code == 0
    assert done.stderr == ""  # W&B has all confirmation runs
    (view,) = server.reports.values()
    everything, *levels, first, second = blocks(view, "panel-grid")
    jobs = [run.job_type for run in server.runs.values()]
    assert {job: jobs.count(job) for job in jobs} == {"set": 8, "rank": 8, "confirm": 8}
    assert [len(selected(server, grid)) for grid in levels] == [4, 4]
    assert selected(server, everything) == selected(server, levels[0]) | selected(server, levels[1])
    for name in selected(server, everything):
        run = server.runs[name]
        assert run.job_type == "confirm"
        assert run.summary["test/accuracy"] > 0.8
        assert {"train/loss", "density/all", "density/layer/fc1.weight"} <= set(run.history[0])
    for grid, density in ((first, 0.2), (second, 0.5)):
        runs = [server.runs[name] for name in selected(server, grid)]
        assert len(runs) == 4
        assert {run.job_type for run in runs} == {"set"}
        assert {run.config["density"]["value"] for run in runs} == {density}
        (_, parallel), _, (_, history) = panels(grid)
        accessors = [column["accessor"] for column in parallel["columns"]]
        for accessor in [*accessors, history["xAxis"], history["yAxis"]]:
            assert any(value(run, accessor) is not None for run in runs), accessor


def value(run: ServerRun, accessor: str) -> Any:
    """What W&B has of the run under config:KEY.value.INNER_KEY or summary:NAME."""
    section, _, key = accessor.partition(":")
    if section == "summary":
        return run.summary.get(key)
    found: Any = run.config
    for part in key.split("."):
        found = (found or {}).get(part)
    return found


def send(recording: Recording) -> None:
    recording.send(last=True)
    assert recording.tracker.close() is None
    assert recording.tracker.problems == []


def selected(server: WandbServer, grid: dict[str, Any]) -> set[str]:
    """Ids of the runs that the grid's one runset shows."""
    (runset,) = grid["metadata"]["runSets"]
    wanted = filters(runset)

    def has(run: ServerRun) -> dict[str, Any]:
        member = run.config["member"]["value"]
        found = {"run.jobType": run.job_type, "run.group": run.group}
        return found | {"config.member.value": member}

    runs = server.runs.values()
    return {run.name for run in runs if all(has(run)[key] in wanted[key] for key in wanted)}


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("logged out", "nobody is logged in to W&B here; run `wandb login`, or set WANDB_API_KEY"),
        ("away", "W&B was not reached, or would not: Failed to verify credentials"),
        ("denied", "W&B was not reached, or would not: .*permission denied"),
        ("unknown", "Project ours does not exist under entity ent, .* belong to ent/ours"),
        ("elsewhere", "Could not find project theirs, .* `wandb sync`"),
        ("no project", "--wandb: 'ent' is not ENTITY/PROJECT"),
        ("no extra", "wandb-workspaces is missing; get it by: pip install 'sparsetune.report.'"),
    ],
)
def test_what_goes_wrong_is_a_sentence(
    what: str, said: str, server: WandbServer, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, target = [], "ent/ours"
    if what == "logged out":
        monkeypatch.delenv("WANDB_API_KEY")
    elif what == "away":
        monkeypatch.setattr(wandb.Api, "_HTTP_TIMEOUT", 1)
        server.away = True
    elif what == "denied":
        server.denied = "permission denied"
    elif what == "unknown":
        server.projects = {"ent/theirs"}
    elif what == "elsewhere":
        server.projects, names = {"ent/ours"}, ["other"]
    elif what == "no project":
        target = "ent"
    else:
        monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
        monkeypatch.delitem(sys.modules, "sparsetune.reports.wandb_report")
        monkeypatch.delattr(sys.modules["sparsetune.reports"], "wandb_report")
    done = report(storage, *names, "--wandb", target)
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit)
    (line,) = done.stderr.splitlines()
    assert line.startswith("sparsetune: --wandb: ")
    assert re.search(said, line), line
    assert server.reports == {}
