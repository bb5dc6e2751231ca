"""Going on with a sweep: what may change, what is refused and how, and what begins from another.

Toy trials here are formulas: `ended` writes what a driver would, so that most tests need no Ray.
The command line is the real one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import optuna
import pytest
from helpers.wandb_files import read_runs
from optuna.trial import TrialState

from sparsetune.cli import main
from sparsetune.search.study import MemberStudy
from sparsetune.space.resolve import resolve
from sparsetune.space.words import split
from sparsetune.store import journal
from sparsetune.store.lines import FILE
from sparsetune.store.lock import holder
from sparsetune.sweeps import run as sweep
from sparsetune.sweeps import source_code
from sparsetune.sweeps.create import Extension, Writable, created, opened

TOY = [
    "epochs=2",
    "data.limit=100",
    "model.widths=[16]",
    "train.batch_size=32",
    "wandb.mode=disabled",
    "trials=4",
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, where users have their modules and ./sweeps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSETUNE_STORAGE", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(*words: str, status: int = 0) -> str:
    """What the command prints; its exit status is checked."""
    done = click.testing.CliRunner().invoke(main, list(words))
    assert done.exit_code == status, (done.output, done.exception)
    assert "Traceback" not in done.output
    return done.output


def begun(*words: str) -> Path:
    """The folder of the sweep that `sparsetune sweep WORDS` makes, before its first trial."""
    with created(resolve(*split(words), "sweep"), "sweep", words) as members:
        return members[0].folder.parent


def value(params: dict[str, Any], number: int) -> float:
    return 1 - abs(params.get("hp.zeta", 0.3) - 0.3) - number / 1e3


def ended(
    name: str,
    ends: Callable[[int], str] = lambda number: "finished",
    wanted: Extension | None = None,
) -> None:
    """Gives the open trials of a sweep reports and the end that `ends` says, in number order."""
    with opened(Path("sweeps"), name, wanted) as members:
        for one in members:
            search = search_of(one)
            record = one.journal.record
            for number in range(record.asked):
                trial = record.trials[number] if number in record.trials else search.suggest()
                if trial.status != "running":
                    continue
                status = ends(number)
                epochs = 2 if status == "finished" else 1
                for epoch in range(len(trial.reports) + 1, epochs + 1):
                    search.report(number, epoch, metrics(trial, epoch), "CONTINUE")
                search.end(number, status, error="Boom" if status == "failed" else None)


def metrics(trial: journal.Trial, epoch: int) -> dict[str, float]:
    return {
        "epoch": float(epoch),
        "val/accuracy": value(trial.params, trial.number),
        "density/all": 0.2,
        "device_seconds": 0.0,
    }


def search_of(one: Writable) -> MemberStudy:
    return MemberStudy(one.member, one.journal, one.member.settings.seed)


def contents(folder: Path) -> dict[str, bytes]:
    """Of all journals below it."""
    return {str(path): path.read_bytes() for path in folder.rglob(FILE)}


def refused(*words: str) -> str:
    """What is said of a command that must be refused with status 2 and write nothing."""
    before = contents(Path("sweeps"))
    said = run(*words, status=2)
    assert contents(Path("sweeps")) == before
    return said


# Code ---------------------------------------------------------------------------------------------

NET = """import torch

from layers import layer  # a module of our own


class Net(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = layer(64, num_classes)

    def forward(self, x):
        return self.fc(x.flatten(1))
"""


def test_changed_code_of_users_is_refused_with_its_lines(here: Path) -> None:
    net, layers = here / "resumednet.py", here / "layers.py"
    net.write_text(NET)
    layers.write_text("import torch\nlayer = torch.nn.Linear\n")
    toy = [word for word in TOY if not word.startswith("model")]
    folder = begun("static", "name=a", "model.name=resumednet:Net", *toy)
    code = journal.header(folder / "static@0.1")["code"]
    assert code["users"] == {"resumednet.py": NET, "layers.py": layers.read_text()}
    assert next(iter(code["method"])) == "sparsetune/methods/static.py"
    ended("a")
    run("resume", "a")

    net.write_text(NET.replace("  # a module of our own", "").replace("\n\n\n", "\n"))
    run("resume", "a")  # comments and blank lines are no code
    net.write_text(NET.replace("x.flatten(1)", "2 * x.flatten(1)"))
    said = refused("resume", "a")
    assert "code: your modules have changed since 'a/static@0.1' began" in said
    assert "--- resumednet.py then\n+++ resumednet.py now\n@@" in said
    assert (
        "-        return self.fc(x.flatten(1))\n+        return self.fc(2 * x.flatten(1))" in said
    )
    assert "put the old code back, or begin a sweep under another name; warm_start=a" in said
    assert "  @@" not in said and "import torch" not in said

    net.write_text(NET)
    layers.write_text("import torch\nlayer = torch.nn.Bilinear\n")
    assert "-layer = torch.nn.Linear\n+layer = torch.nn.Bilinear" in refused("resume", "a")
    layers.unlink()
    assert "layers.py is not there any more" in refused("resume", "a")
    run("status", "a")


def test_changed_code_of_a_method_is_refused_with_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun("set", "name=a", "density=0.2", *TOY)
    ended("a")
    files = source_code.of_method("set")
    assert {Path(file).stem for file in files} >= {"set", "ops", "update"}
    assert "dsr" not in {Path(file).stem for file in files}
    new = files | {"sparsetune/methods/set.py": source_code.HASHED + "0"}
    monkeypatch.setattr(source_code, "of_method", lambda name: new)
    said = refused("resume", "a")
    assert "sparsetune's own set has changed since 'a/set@0.2' began with version" in said
    assert "\nsparsetune/methods/set.py differs\ninstall that version, or begin" in said


def test_a_changed_method_of_the_users_is_refused_with_its_lines(here: Path) -> None:
    text = (Path(__file__).parents[2] / "examples/mest.py").read_text()
    rule, file = here / "resumedmest.py", here / "spaces/own.yaml"
    file.parent.mkdir()
    rule.write_text(text)
    file.write_text("method: resumedmest:METHOD\nsearch: {prune_fraction: {low: 0.1, high: 0.5}}\n")
    folder = begun(str(file), "name=a", "density=0.2", *TOY)
    code = journal.header(folder / "own@0.2")["code"]
    assert code["users"] == {"resumedmest.py": text}
    files = {Path(file).stem for file in code["method"]}  # ours, which apply it
    assert files >= {"update", "ops", "noise"} and not files & {"set", "rigl", "resumedmest"}
    ended("a")
    run("resume", "a")
    rule.write_text(text.replace("  # share of each layer that the last update dropped", ""))
    run("resume", "a")
    rule.write_text(text.replace("score = layer.value.abs()", "score = layer.value.square()"))
    said = refused("resume", "a")
    assert "code: your modules have changed since 'a/own@0.2' began" in said
    assert "-        score = layer.value.abs()\n+        score = layer.value.square()" in said
    rule.unlink()
    assert "resumedmest.py is not there any more" in refused("resume", "a")


def test_which_modules_are_the_users_own(here: Path) -> None:
    package = here / "theirs"
    (package / "nets").mkdir(parents=True)
    (here / "data").mkdir()  # no package: what is meant is data.py
    files = {
        "theirs/__init__.py": "",
        "theirs/nets/__init__.py": "from . import blocks\n",
        "theirs/nets/deep.py": "from .blocks import one\nfrom .. import common as c\nimport json\n",
        "theirs/nets/blocks.py": "def f():\n    import torch, data\n",
        "theirs/common.py": "import sparsetune, numpy.linalg\n",
        "data.py": "x = 1\n",
        "json.txt": "",
        "unused.py": "",
    }
    for name, text in files.items():
        (here / name).write_text(text)
    found = source_code.users(["theirs.nets.deep:Net", "mlp", ""])
    assert sorted(found) == sorted({*files} - {"json.txt", "unused.py"})
    assert next(iter(source_code.users(["click.core:Command"]))) == "click/core.py"
    assert all(file.startswith("click/") for file in source_code.users(["click.core:Command"]))
    assert source_code.users(["nowhere.atall:Net"]) == {}
    (here / "unused.py").write_text("#" * 200_000)
    (long,) = source_code.users(["unused:Net"]).values()
    assert long.startswith(source_code.HASHED)
    assert source_code.changes({"unused.py": long}, {"unused.py": "1"}) == "unused.py differs"


def test_changed_data_is_refused(here: Path) -> None:
    (here / "mydata.py").write_text(
        "import pathlib, torch\n"
        "def digits():\n"
        "    g = torch.Generator().manual_seed(int(pathlib.Path('seed').read_text()))\n"
        "    x = torch.randint(0, 255, (60, 1, 8, 8), dtype=torch.uint8, generator=g)\n"
        "    y = torch.arange(60) % 10\n"
        "    return x.numpy(), y.numpy(), x.numpy(), y.numpy()\n"
    )
    (here / "seed").write_text("1")
    begun("static", "name=a", "data.name=mydata:digits", *TOY)
    ended("a")
    run("resume", "a")
    (here / "seed").write_text("2")
    said = refused("resume", "a")
    assert "data: the images of mydata:digits have changed since 'a/static@0.1' began" in said


# Space, method, settings --------------------------------------------------------------------------

SET = ["set", "name=a", "density=0.2,0.3", *TOY]


def test_the_words_of_the_sweep_may_be_repeated() -> None:
    folder = begun(*SET)
    ended("a")
    before = {path: len(journal.read(folder / path)) for path in ("set@0.2", "set@0.3")}
    run("resume", *SET[1:])
    run("resume", "a/set@0.3", "epochs=2")
    run("resume", "a", "epochs=2", "density=0.2,0.3", "search.zeta.low=0.05", "engine=solo")
    for path, events in before.items():  # a `driver` event each time, and nothing else
        new = journal.read(folder / path)[events:]
        assert {event["type"] for event in new} == {"driver"}


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["epochs=3"], ["epochs: 2 -> 3", "leave them as they were, or begin a sweep"]),
        (["hp.zeta=0.3"], ["hp.zeta: - -> 0.3", "search.hp.zeta.low: 0.05 -> -"]),
        (["search.lr.high=0.02"], ["search.optimizer.lr.high: 0.5 -> 0.02"]),
        (["search.lr.log=false"], ["search.optimizer.lr.log: True -> -"]),
        (["search.zeta.step=0.05"], ["search.hp.zeta.step: - -> 0.05"]),
        (["search.zeta.choices=[0.1,0.2]"], ["Optuna cannot search other choices in a study that"]),
        (["search.momentum.low=0", "search.momentum.high=0.9"], ["optimizer.momentum.low: - -> 0"]),
        (["objective=val/loss"], ["objective: val/accuracy -> val/loss"]),
        (["density=0.1"], ["density: the members of this sweep have 0.2, 0.3; for others begin"]),
        (["set"], ["resume: 'set': a sweep goes on with the spaces that it began with; give its"]),
        (["dsr", "density=0.2"], ["resume: 'dsr': a sweep goes on with the spaces that it began"]),
        (["train.batch_size=16"], ["train.batch_size: 32 -> 16"]),
        (["search.zetta.low=0.1"], ["'zetta' is no hyperparameter of set; did you mean"]),
        (["search.zeta.high=2"], ["search.zeta: "]),
    ],
)
def test_other_words_are_refused_with_what_was_and_would_be(
    words: list[str], lines: list[str]
) -> None:
    begun(*SET)
    for more in ([], ["--allow-wider"]):
        said = refused("resume", "a", *words, *more)
        for line in lines:
            assert line in said, said


def test_a_sweep_goes_on_without_the_file_of_its_space(here: Path) -> None:
    file = here / "mine.yaml"
    file.write_text("method: set\nsearch: {zeta: {low: 0.1, high: 0.6}}\nstart: {a: {zeta: 0.2}}\n")
    begun("./mine.yaml", "name=a", "density=0.2", *TOY)
    ended("a")
    assert "resume: './mine.yaml': a sweep goes on with" in refused("resume", "a", "./mine.yaml")
    assert "resume: 'mine': a sweep goes on" in refused("resume", "mine", "name=a")
    file.unlink()
    run("resume", "a")  # the journal knows the space


def test_wider_ranges_go_into_the_journal_and_the_study() -> None:
    words = ["name=a", "density=0.2", "search.zeta.high=0.31", "trials=12", *TOY[:-1]]
    folder = begun("set", *words)
    ended("a", ends=lambda number: "failed" if number == 5 else "finished")
    wide = ["search.zeta.high=0.6", "search.lr.low=0.0001"]
    said = refused("resume", "a", *wide)
    assert "search.hp.zeta.high: 0.31 -> 0.6" in said
    assert "ranges may become wider: add --allow-wider, or leave them as they were" in said
    run("resume", "a", *wide, "--allow-wider", status=1)  # a trial has failed
    assert journal.load(folder / "set@0.2").header["member"]["space"]["search"]["hp.zeta"] == {
        "low": 0.05,
        "high": 0.6,
    }
    run("resume", "a", *wide, status=1)  # this is what the sweep has now
    extensions = [e for e in journal.read(folder / "set@0.2") if e["type"] == "extend"]
    assert [event["trials"] for event in extensions] == [12]
    assert "0.6 -> 0.31" in refused("resume", "a", "search.zeta.high=0.31", "--allow-wider")

    before = journal.load(folder / "set@0.2")
    with opened(Path("sweeps"), "a", Extension(trials=20)) as [one]:
        search = search_of(one)
        # Optuna's TPE leaves a key whose ranges differ out of what it searches jointly; here the
        # old trials count as trials of the wider space.
        trials = [t for t in search.study.get_trials() if t.state == TrialState.COMPLETE]
        assert {t.distributions["hp.zeta"].high for t in trials} == {0.6}  # type: ignore[attr-defined]
        joint = optuna.search_space.IntersectionSearchSpace().calculate(search.study)
        assert {"hp.zeta", "optimizer.lr"} <= set(joint)
    ended("a")
    record = journal.load(folder / "set@0.2")
    for number, old in before.trials.items():
        assert record.trials[number] == old
    new = [record.trials[number].params["hp.zeta"] for number in range(12, 20)]
    assert max(new) > 0.31
    assert journal.load(folder / "set@0.2").widened
    run("status", "a")


# More trials, and failed ones once more -----------------------------------------------------------


def test_a_sweep_with_failed_and_diverged_trials_is_extended() -> None:
    folder = begun("set", "static", "name=a", "density=0.2", *TOY)
    ends = {0: "finished", 1: "diverged", 2: "failed"}
    ended("a", ends=lambda number: ends.get(number, "stopped"))
    before = {name: journal.load(folder / name) for name in ("set@0.2", "static@0.2")}
    assert "trials: a/set@0.2 was asked for 4 already; give trials=4 or more" in refused(
        "resume", "a", "trials=3"
    )
    ended("a", wanted=Extension(trials=7))
    for name, old in before.items():
        record = journal.load(folder / name)
        assert (record.asked, list(record.trials)) == (7, list(range(7)))
        assert {n: record.trials[n] for n in old.trials} == old.trials
        assert [record.trials[n].status for n in range(7)] == [
            "finished", "diverged", "failed", "stopped", *["finished"] * 3,
        ]  # fmt: skip


def test_failed_trials_are_tried_again_where_they_were() -> None:
    folder = begun("set", "name=a", "density=0.2", *TOY)
    ended("a", ends=lambda number: "failed" if number in (1, 3) else "finished")
    assert "sparsetune resume a --retry-failed" in run("resume", "a", status=1)
    before = journal.load(folder / "set@0.2")
    with opened(Path("sweeps"), "a", Extension(retry_failed=True)) as [one]:
        record = one.journal.record
        assert [t.number for t in record.trials.values() if t.status == "running"] == [1, 3]
        retried = record.trials[1]
        assert (retried.attempts, retried.error, retried.failures) == (1, None, ["Boom"])
        assert retried.reports == before.trials[1].reports
        states = [trial.state for trial in search_of(one).study.get_trials()]
        assert states.count(TrialState.RUNNING) == sum(record.trials[n].in_study for n in (1, 3))
        assert TrialState.FAIL not in states
    ended("a", ends=lambda number: "failed" if number == 3 else "finished")
    record = journal.load(folder / "set@0.2")
    assert [t.status for t in record.trials.values()] == ["finished"] * 3 + ["failed"]
    assert [report.epoch for report in record.trials[1].reports] == [1, 2]
    kinds = [(e["type"], e.get("status")) for e in journal.read(folder / "set@0.2")]
    assert kinds.count(("end", "failed")) == 3  # the history keeps each failure
    status = json.loads(run("status", "a", "--json"))
    assert status["trials"]["failed"] == 1 and status["trials"]["finished"] == 3
    ended("a", wanted=Extension(retry_failed=True))
    assert journal.load(folder / "set@0.2").trials[3].failures == ["Boom", "Boom"]
    run("resume", "a", "--retry-failed")  # nothing has failed: nothing to do


FLAKY = """import pathlib, torch
class Net(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = torch.nn.Linear(64, num_classes)
        self.steps = 0
    def forward(self, x):
        if x.device.type != "meta" and torch.is_grad_enabled():
            self.steps += 1
            path = pathlib.Path("broken")
            if path.exists() and self.steps > int(path.read_text()):
                raise RuntimeError("a file is there")
        return self.fc(x.flatten(1))
"""


def test_a_retried_trial_is_one_continuous_run(here: Path) -> None:
    (here / "flaky.py").write_text(FLAKY)
    (here / "broken").write_text("6")
    words = ["static", "name=a", "model.name=flaky:Net", "epochs=4", "data.limit=100"]
    words += ["train.batch_size=32", "wandb.mode=offline"]
    assert "RuntimeError: a file is there" in run("train", *words, status=1)
    [folder] = here.glob("sweeps/a/static*")
    assert len(journal.load(folder).trials[0].reports) == 3  # two steps an epoch
    [one] = read_runs(here / "sweeps/a")
    assert (one.summary["status"], one.steps) == ("failed", [1, 2, 3])
    run("resume", "a", status=1)  # it has failed, and nobody asked for more
    (here / "broken").write_text("0")
    run("resume", "a", "--retry-failed", status=1)
    [one] = read_runs(here / "sweeps/a")
    assert (one.summary["status"], one.steps) == ("failed", [1, 2, 3])
    (here / "broken").unlink()
    run("resume", "a", "--retry-failed")
    record = journal.load(folder)
    assert [report.epoch for report in record.trials[0].reports] == [1, 2, 3, 4]
    assert len(record.trials[0].failures) == 2
    [one] = read_runs(here / "sweeps/a")
    assert (one.summary["status"], one.steps) == ("finished", [1, 2, 3, 4])


# From another sweep -------------------------------------------------------------------------------


def test_the_best_of_another_sweep_are_start_points(monkeypatch: pytest.MonkeyPatch) -> None:
    begun("set", "name=old", "density=0.2,0.5", "trials=12", *TOY[:-1])
    ended("old", ends=lambda number: "finished" if number % 2 == 0 else "failed")
    words = ["set", "name=new", "density=0.1,0.4", "warm_start=old", *TOY]
    run("sweep", *words, "--dry-run")
    monkeypatch.setattr(sweep, "run", lambda members: {"state": "finished", "members": []})
    run("sweep", *words)
    for density, source in ((0.1, 0.2), (0.4, 0.5)):  # the nearest one that was searched
        earlier = journal.load(Path(f"sweeps/old/set@{source}")).trials.values()
        finished = [t for t in earlier if t.status == "finished" and t.in_study]
        best = sorted(finished, key=lambda t: -t.reports[-1].metrics["val/accuracy"])[:5]
        space = journal.header(Path(f"sweeps/new/set@{density}"))["member"]["space"]
        assert [k for k in space["start"] if k.startswith("warm-")] == [
            f"warm-{n}" for n in range(1, 6)
        ]
        assert [space["start"][f"warm-{n}"] for n in range(1, 6)] == [t.params for t in best]
    shutil.rmtree("sweeps/old")  # not needed any more
    with opened(Path("sweeps"), "new") as members:
        searches = [search_of(one) for one in members]
        assert [len(search.study.get_trials()) for search in searches] == [0, 0]
        origins = [searches[0].suggest().origin for _ in range(4)]
        assert origins == ["start:paper", "start:seed-text", "start:warm-1", "start:warm-2"]
        assert members[0].journal.record.trials[2].in_study
    assert json.loads(run("status", "new", "--json"))["members"][0]["best"] is None
    run("resume", "new", *words[2:])
    assert "warm_start: old -> -" in refused("resume", "new", "warm_start=")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["dsr", "warm_start=old"], "'old' searched set, and new/dsr@0.1 is about dsr; name a"),
        (["set", "warm_start=old", "objective=val/loss"], "old/set@0.2 was searched for val/acc"),
        (["set", "warm_start=none"], "there is no sweep 'none'"),
        (["set", "warm_start=old/set@0.9"], "there is no sweep 'old/set@0.9'"),
        (["set", "warm_start=empty"], "empty/set@0.2 has 0 finished trials that keep its const"),
        (
            ["set", "warm_start=old", "search.zeta.low=0.9", "search.zeta.high=0.95"],
            "old/set@0.2 has 4 f",
        ),
    ],
)
def test_a_warm_start_that_cannot_be_is_refused(words: list[str], why: str) -> None:
    begun("set", "name=old", "density=0.2", *TOY)
    ended("old")
    begun("set", "name=empty", "density=0.2", *TOY)
    ended("empty", ends=lambda number: "stopped")
    said = refused("sweep", *words, "name=new", *TOY)
    assert f"warm_start: {why}" in said.replace("name: there", "there"), said
    assert not Path("sweeps/new").exists()
    assert "train trains one setting" in refused("train", "set", "warm_start=old", *TOY[:-1])


# Journals that something has happened to ----------------------------------------------------------


def torn_tail(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def torn_middle(file: Path) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][: len(lines[2]) // 2] + b"\n"
    file.write_bytes(b"".join(lines))


def missing_line(file: Path) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2] + lines[3:]))


def wrong_checksum(file: Path) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], b"00000000" + lines[2][8:], *lines[3:]]))


def unknown_version(file: Path) -> None:
    first, *lines = file.read_bytes().splitlines(keepends=True)
    text = json.dumps(json.loads(first[9:]) | {"format": 99}).encode()
    file.write_bytes(b"".join([b"%08x %s\n" % (zlib.crc32(text), text), *lines]))


def unreadable_header(file: Path) -> None:
    file.write_bytes(b"\0" * 100 + file.read_bytes()[100:])


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (torn_middle, "{file}:3: the checksum does not fit the line, and events follow"),
        (missing_line, "{file}:3: event 3 where 2 should be"),
        (wrong_checksum, "{file}:3: the checksum does not fit the line"),
        (unknown_version, "{file}:1: journal format 99; this version of sparsetune reads 1"),
        (unreadable_header, "{file}:1: the checksum does not fit the line"),
        (Path.unlink, "{file}: no journal here, and the sweep has this member; restore"),
    ],
)
def test_a_broken_journal_is_refused_with_file_and_line(
    fault: Callable[[Path], Any], said: str
) -> None:
    begun("set", "static", "name=a", "density=0.2", *TOY)
    ended("a")
    file = Path("sweeps/a/static@0.2/journal.jsonl")
    fault(file)
    for command in (["resume", "a"], ["resume", "a", "trials=9"], ["status", "a"]):
        answer = refused(*command)
        assert said.format(file=file) in answer, answer
        assert "from a copy" in answer or "format 99" in answer
    run("status")  # of all sweeps; this one says why it cannot be read
    run("status", "a/set@0.2")
    run("resume", "a/set@0.2")


def test_a_torn_tail_is_recovered() -> None:
    begun("set", "static", "name=a", "density=0.2", *TOY)
    ended("a")
    file = Path("sweeps/a/static@0.2/journal.jsonl")
    torn_tail(file)  # of the last trial's end
    before = file.read_bytes()
    status = json.loads(run("status", "a", "--json"))
    assert (status["state"], status["members"][1]["trials"]["running"]) == ("interrupted", 1)
    assert file.read_bytes() == before
    ended("a")
    run("resume", "a")
    assert json.loads(run("status", "a", "--json"))["state"] == "finished"


# With Ray -----------------------------------------------------------------------------------------

DRIVER = """import sys
from sparsetune.{module} import {cls}
from sparsetune.cli import main

real, calls = {cls}.{hook}, 0

def broken(*given, **named):
    global calls
    calls += 1
    if calls > {after}:
        raise ZeroDivisionError("a bug of ours")
    return real(*given, **named)

{cls}.{hook} = broken
main()
"""


def environment() -> dict[str, str]:
    """Without what this process has told wandb, whose service works in another folder."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    return env | {"PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "cls", "hook", "after"),
    [
        ("search.study", "MemberStudy", "suggest", 2),  # the searcher
        ("search.study", "MemberStudy", "report", 3),  # the scheduler
        ("cluster.watch", "Watch", "tick", 5),  # a callback
    ],
)
def test_a_bug_of_ours_ends_the_sweep_with_its_traceback(
    here: Path, module: str, cls: str, hook: str, after: int
) -> None:
    (here / "driver.py").write_text(DRIVER.format(module=module, cls=cls, hook=hook, after=after))
    words = ["sweep", "set", "name=a", "density=0.2", "epochs=6", *TOY[1:]]
    done = subprocess.run(
        [sys.executable, "driver.py", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" in done.stderr and "ZeroDivisionError: a bug of ours" in done.stderr
    assert 'driver.py", line 11, in broken' in done.stderr
    record = journal.load("sweeps/a/set@0.2")  # whole, and nobody holds it
    assert holder("sweeps/a") is None
    if hook == "suggest":
        assert len(record.trials) == 2


@pytest.mark.slow
def test_a_sweep_with_failures_is_retried_widened_and_extended(here: Path) -> None:
    """In one go, by the real command line in processes of its own."""
    (here / "flaky.py").write_text(FLAKY)
    words = ["static", "set", "name=a", "density=0.5", "model.name=flaky:Net", "epochs=100"]
    words += ["data.limit=100", "train.batch_size=32", "wandb.mode=offline", "trials=2"]
    folders = [here / "sweeps/a" / name for name in ("static@0.5", "set@0.5")]

    def start(*given: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "sparsetune.cli", *given, "scheduler.name=none"]
        return subprocess.Popen(command, env=environment())

    def trials() -> list[journal.Trial]:
        return [trial for one in folders for trial in journal.load(one).trials.values()]

    def under_way(folder: Path) -> bool:
        found = journal.load(folder).trials.values() if folder.exists() else []
        return any(trial.status == "running" and trial.reports for trial in found)

    process = start("sweep", *words)
    deadline = time.monotonic() + 100
    while not all(map(under_way, folders)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    (here / "broken").write_text("0")
    assert process.wait(100) == 1
    before = trials()
    failed = [trial for trial in before if trial.status == "failed"]
    assert len(before) == 4 and any(0 < len(trial.reports) < 100 for trial in failed)
    assert {trial.attempts for trial in failed} == {3}
    (here / "broken").unlink()
    more = ["trials=3", "--retry-failed", "search.zeta.high=0.7", "--allow-wider"]
    assert start("resume", "a", *more).wait(200) == 0
    after = trials()
    assert [trial.number for trial in after] == [0, 1, 2] * 2
    assert {trial.status for trial in after} == {"finished"}
    again = [trial for trial in after if trial.failures]
    for old, new in zip(failed, again, strict=True):
        assert new.number == old.number and new.failures == [old.error]
        assert new.reports[: len(old.reports)] == old.reports
    runs = read_runs(here / "sweeps/a")
    assert len(runs) == 6
    assert all(one.steps == list(range(1, 101)) for one in runs)
    assert {one.summary["status"] for one in runs} == {"finished"}
