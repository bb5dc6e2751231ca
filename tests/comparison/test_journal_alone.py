"""Readers need the journals alone: no method, network or data of anybody's, and no Ray."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.told_sweep import confirmed, told

from sparsetune import load
from sparsetune.cli import main
from sparsetune.comparison.compare import compare
from sparsetune.methods import METHODS
from sparsetune.space.member import Member
from sparsetune.space.traits import traits_of
from sparsetune.store import journal
from sparsetune.store.lines import decode, encode, exists

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, input_shape, num_classes, hidden=32):
        super().__init__()
        channels, height, width = input_shape
        self.fc1 = nn.Linear(channels * height * width, hidden)
        self.fc2 = nn.Linear(hidden, 16)
        self.fc3 = nn.Linear(16, num_classes)

    def forward(self, images):
        return self.fc3(self.fc2(self.fc1(images.flatten(1)).relu()).relu())
"""


def rewritten(folder: Path, change: Any) -> None:
    """The journals below a folder, each event as `change` has it."""
    for path in folder.rglob("journal.jsonl"):
        events = [decode(line) for line in path.read_bytes().splitlines()]
        path.write_bytes(b"".join(encode(change(event)) for event in events))


def test_compare_loads_no_ray() -> None:
    code = "import sys, sparsetune.comparison.compare; print({'ray', 'wandb'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", METHODS)
def test_traits_say_what_the_method_says(name: str) -> None:
    method = METHODS[name]
    told = type(traits_of(method))(**json.loads(json.dumps(traits_of(method)._asdict())))
    assert (told.begins, told.emergent) == (method.begins, method.emergent)
    assert told.reaches_density == method.reaches_density
    assert told.dense_gradient({}) == method.dense_gradient(method.Variant())
    for variant in ({"growth": "random"}, {"growth": "gradient"}) if name == "sm" else ():
        expected = method.dense_gradient(method.Variant(**variant))
        assert told.dense_gradient(variant) == expected


def test_nothing_of_the_users_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is gone, and so are the method and the data that the journals name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "nets_of_mine.py").write_text(NET)
    importlib.invalidate_caches()
    words = ["density=0.2", "trials=4", "name=a", "model.name=nets_of_mine:Net"]
    words += ["search.model.args.hidden.choices=[32,64]"]
    confirmed(told(tmp_path, ["set", "static"], *words), "seeds=3", "top=1")
    before = compare("a", storage=tmp_path)
    (tmp_path / "nets_of_mine.py").unlink()
    del sys.modules["nets_of_mine"]

    def gone(event: dict[str, Any]) -> dict[str, Any]:
        if event["type"] == "sweep":
            for part in ("settings", "space"):
                if event["member"][part]["method"] == "set":
                    event["member"][part]["method"] = "rules_of_mine:METHOD"
            event["member"]["settings"]["data"]["name"] = "images_of_mine:load"
        return event

    rewritten(tmp_path, gone)
    after = compare("a", storage=tmp_path)
    lines = {cell.space: cell.chosen for cell in after.cells}
    assert {cell.space: cell.chosen for cell in before.cells} == lines
    for line in lines.values():
        assert line is not None
        hidden = line.config["model.args.hidden"]
        # A fifth of all weights, 2 FLOPs each, in a network that was searched, too.
        assert line.parameters == pytest.approx((64 * hidden + hidden * 16 + 16 * 10) / 5)
        assert line.flops_inference == pytest.approx(2 * line.parameters)
    assert after.rules == before.rules
    assert set(load("a", storage=tmp_path)["method"]) == {"set", "static"}
    for command in (["status"], ["compare"], ["report"]):
        done = CliRunner().invoke(main, [*command, "a", f"storage={tmp_path}"])
        assert done.exit_code == 0, done.output
    assert "a/set@0.2" in (tmp_path / "a.html").read_text()


def test_a_network_that_no_journal_tells_of(tmp_path: Path) -> None:
    """Of the user's, searched before journals did: a dash, and a sentence why."""
    words = ["density=0.2", "trials=4", "name=a"]
    confirmed(told(tmp_path, ["set", "static"], *words), "seeds=3", "top=1")

    def before(event: dict[str, Any]) -> dict[str, Any]:
        event.pop("network", None)
        if event["type"] == "sweep":
            event["member"]["settings"]["model"]["name"] = "nets_of_mine:Net"
            event["member"]["space"]["fixed"]["model.name"] = "nets_of_mine:Net"
        return event

    ours = compare("a", storage=tmp_path)
    rewritten(tmp_path, before)
    theirs = compare("a", storage=tmp_path)
    assert [cell.mean for cell in theirs.cells] == [cell.mean for cell in ours.cells]
    for cell in theirs.cells:
        assert cell.chosen is not None
        assert cell.chosen.parameters is cell.chosen.flops_inference is None
        assert f"{cell.name}: its journal does not say what its network costs" in theirs.notes
    assert theirs.rules[6].state == "broken"
    assert theirs.ranking == ours.ranking


def test_a_header_holds_the_costs_of_all_networks_searched(tmp_path: Path) -> None:
    words = ["search.model.match_density.low=0.1", "search.model.match_density.high=0.5"]
    path = told(tmp_path, ["small_dense"], "trials=4", "name=a", *words)
    (folder,) = [each for each in path.iterdir() if exists(each)]
    header = journal.header(folder)
    network = header["network"]
    assert (network["inputs"], network["classes"]) == ([1, 8, 8], 10)
    shares = {each["model"]["match_density"] for each in network["networks"]}
    assert {0.1, 0.5} <= shares
    assert {each["whole"] for each in network["networks"]} == {2720}
    assert Member.from_header(header["member"]).traits == traits_of(METHODS["dense"])
