"""The shipped search spaces, what they sample, and what is said of a bad file."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml  # type: ignore[import-untyped]

from sparsetune.methods import METHODS
from sparsetune.methods.contract import make_hyperparameters, make_variant
from sparsetune.settings import DataSettings, TrialSettings
from sparsetune.space import files, keys
from sparsetune.space.keys import SpaceError
from sparsetune.space.member import Member
from sparsetune.space.resolve import resolve
from sparsetune.space.space import Dimension, Space
from sparsetune.training import data, models, trainer
from sparsetune.training.setup import layers_of, prepare, update_schedule

CPU = torch.device("cpu")
FOUR = ("set", "dsr", "sm", "dst")
SHIPPED = (
    "dense", "dsr", "dst", "gmp", "rigl", "set", "set_threshold", "sm", "small_dense", "static",
)  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load(DataSettings())


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """text -> path of a yaml file, as a user gives it."""

    def writer(text: str, name: str = "mine") -> str:
        file = tmp_path / f"{name}.yaml"
        file.write_text(text)
        return str(file)

    return writer


def member(name: str, tmp_path: Path, *words: str) -> Member:
    return resolve([name], ["name=t", f"storage={tmp_path}", *words], "sweep").members[0]


def samples(one: Space, num: int) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna warns of a range that its step does not divide
        asked = [study.ask() for _ in range(num)]
        return [one.suggest(trial) for trial in asked]


# The shipped spaces -------------------------------------------------------------------------------


def test_the_shipped_spaces() -> None:
    assert files.names() == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_space_opens_with_its_command_and_paper(name: str) -> None:
    first, *rest = (files.folder() / f"{name}.yaml").read_text().splitlines()
    assert first.startswith(f"# sparsetune sweep {name} name=")
    header = "\n".join(line for line in rest[:4] if line.startswith("#"))
    assert "Paper:" in header or "20" in header


@pytest.mark.parametrize("name", SHIPPED)
def test_the_command_of_a_space_resolves(name: str, tmp_path: Path) -> None:
    command = (files.folder() / f"{name}.yaml").read_text().splitlines()[0].split()
    words = [word for word in command[4:] if not word.startswith("name=")]
    assert member(command[3], tmp_path, *words).space.name == name


@pytest.mark.parametrize("name", SHIPPED)
def test_shared_ranges_are_the_same_for_all(name: str) -> None:
    shared = ("optimizer.lr", "optimizer.weight_decay")
    one, other = files.load(name), files.load("static")
    assert [one.search[key] for key in shared] == [other.search[key] for key in shared]
    given = yaml.safe_load((files.folder() / f"{name}.yaml").read_text())
    assert not {"lr", "weight_decay", *shared} & set(given.get("search") or {})


@pytest.mark.parametrize("name", SHIPPED)
def test_start_points(name: str) -> None:
    one = files.load(name)
    assert "paper" in one.start
    if one.method in FOUR:
        assert "seed-text" in one.start
    for values in one.start.values():  # a fair trial of a comparison: same network, data, budget
        assert not [k for k in values if k.startswith(("data.", "model.", "train.", "epochs"))]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_hundred_samples_fit_their_method(
    name: str, tmp_path: Path, digits: data.Dataset
) -> None:
    one = member(name, tmp_path, "epochs=2")
    method = METHODS[one.space.method]
    with torch.device("meta"):
        model = models.build(one.settings.model, digits.input_shape, digits.num_classes)
    for params in samples(one.space, 100):
        settings = one.trial_settings(params, {})
        make_hyperparameters(method, settings.hp, make_variant(method, settings.variant))
        update_schedule(method, settings)
        layers_of(settings, method, models.weights(model))
        assert one.trial_settings(params, {}).optimizer.lr == params["optimizer.lr"]


@pytest.mark.parametrize("name", SHIPPED)
def test_no_layer_is_empty_and_no_guard_fires_at_step_0(
    name: str, tmp_path: Path, digits: data.Dataset
) -> None:
    one = member(name, tmp_path, "density=0.05", "epochs=2")
    for params in samples(one.space, 12):
        # A guard that is off cannot fire, and what it would have seen is in the masks.
        off = {"variant.guard": "off"} if one.space.method == "dst" else {}
        state = trainer.begin(prepare(one.trial_settings(params, off), CPU, digits))
        for mask in state.masks.values():
            assert mask.sum() >= 1
            if one.space.method == "dst":
                assert mask.double().mean() > 0.01, params


@pytest.mark.parametrize("name", [*FOUR, "set_threshold"])
@pytest.mark.parametrize("point", ["paper", "seed-text"])
def test_both_start_points_train(
    name: str, point: str, tmp_path: Path, digits: data.Dataset
) -> None:
    words = [f"start={point}", f"storage={tmp_path}", "epochs=2", "train.batch_size=32"]
    one = resolve([name], words, "train").members[0]
    (start,) = one.space.points()
    assert start.name == point
    setup = prepare(one.trial_settings(start.params, start.fixed), CPU, digits)
    before = trainer.begin(setup)
    state, metrics = trainer.train_epoch(setup, before)
    assert math.isfinite(metrics["train/loss"])
    assert not state.diverged
    assert any(not torch.equal(state.masks[k], before.masks[k]) for k in state.masks) or (
        name == "dsr" and state.updates  # a first H of 1e-3 may find nothing to drop
    )


# Sampling and start points ------------------------------------------------------------------------

CONDITIONAL = """
method: set
search:
  threshold: {low: 0.1, high: 1, when: {prune: threshold}}
  zeta: {low: 0.1, high: 0.5, when: {prune: [signwise, magnitude]}}
  prune: {choices: [signwise, magnitude, threshold]}
  update.every: {low: 10, high: 30, step: 10}
  train.batch_size: {low: 16, high: 128, log: true}
  optimizer.nesterov: {choices: [true, false]}
"""


def test_conditions_hold(write: Any) -> None:
    one = files.load(write(CONDITIONAL))
    assert list(one.search).index("variant.prune") < list(one.search).index("hp.threshold")
    seen = set()
    for params in samples(one, 60):
        seen.add(params["variant.prune"])
        assert ("hp.threshold" in params) == (params["variant.prune"] == "threshold")
        assert ("hp.zeta" in params) != ("hp.threshold" in params)
        assert type(params["update.every"]) is int
        assert params["update.every"] in (10, 20, 30)
        assert type(params["train.batch_size"]) is int
        assert type(params["optimizer.nesterov"]) is bool
    assert len(seen) == 3


def test_a_condition_reads_fixed_keys_and_defaults(write: Any) -> None:
    one = files.load(write(CONDITIONAL)).fix({"variant.prune": "threshold"})
    assert all("hp.threshold" in p and "hp.zeta" not in p for p in samples(one, 5))
    text = "method: set\nsearch: {threshold: {low: 0.1, high: 1, when: {prune: threshold}}}"
    one = files.load(write(text))  # the default, signwise
    assert not any("hp.threshold" in params for params in samples(one, 5))


def test_nested_and_dotted_keys_are_the_same(write: Any) -> None:
    rest = "search: {hp: {zeta: {low: 0.1, high: 0.2}}, optimizer: {lr: {low: 0.1, high: 1}}}\n"
    nested = files.load(write(f"method: set\nfixed: {{variant: {{prune: magnitude}}}}\n{rest}"))
    rest = "search: {hp.zeta: {low: 0.1, high: 0.2}, lr: {low: 0.1, high: 1}}\n"
    assert nested == files.load(write(f"method: set\nfixed: {{prune: magnitude}}\n{rest}"))
    assert nested.search["optimizer.lr"] == Dimension(0.1, 1.0)  # a user's file may redefine it


def test_what_is_fixed_is_not_searched(write: Any) -> None:
    one = files.load(write("method: static\nfixed: {lr: 0.1}"))
    assert "optimizer.lr" not in one.search
    assert "optimizer.weight_decay" in one.search


@pytest.mark.parametrize("name", SHIPPED)
def test_a_space_comes_back_from_json(name: str) -> None:
    one = files.load(name)
    assert Space.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert samples(Space.from_dict(one.to_dict()), 3) == samples(one, 3)


START = """
method: set
fixed: {prune: signwise}
search: {zeta: {low: 0.1, high: 0.5}, lr: {low: 0.01, high: 0.1}, weight_decay: {choices: [0.0]}}
start:
  inside: {zeta: 0.3, lr: 0.1, weight_decay: 0}
  repeats: {zeta: 0.3, lr: 0.1, weight_decay: 0, prune: signwise, momentum: 0.9}
  outside: {zeta: 0.7, lr: 0.1, weight_decay: 0}
  lacking: {zeta: 0.3, weight_decay: 0}
  fixing: {zeta: 0.3, lr: 0.1, weight_decay: 0, distribution: er}
"""


def test_start_points_in_and_out_of_the_study(write: Any) -> None:
    rest = {"optimizer.lr": 0.1, "optimizer.weight_decay": 0.0}
    points = {point.name: point[1:] for point in files.load(write(START)).points()}
    assert points == {
        "inside": ({"hp.zeta": 0.3, **rest}, {}, True),
        "repeats": (
            {"hp.zeta": 0.3, **rest},
            {"variant.prune": "signwise", "optimizer.momentum": 0.9},
            True,
        ),
        "outside": (rest, {"hp.zeta": 0.7}, False),
        "lacking": ({"hp.zeta": 0.3, "optimizer.weight_decay": 0.0}, {}, False),
        "fixing": ({"hp.zeta": 0.3, **rest}, {"distribution": "er"}, False),
    }


def test_the_command_line_wins_over_start_points(write: Any) -> None:
    one = files.load(write(START)).fix({"hp.zeta": 0.2, "distribution": "erk"})
    assert "hp.zeta" not in one.search
    for point in one.points():
        assert not {"hp.zeta", "distribution"} & {*point.params, *point.fixed}
    assert [point.in_study for point in one.points()] == [True, True, True, False, True]


def test_optuna_takes_the_points_in_the_study() -> None:
    for name in SHIPPED:
        one = files.load(name)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
        for point in one.points():
            if point.in_study:
                study.enqueue_trial(point.params)
                trial = study.ask()
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    assert one.suggest(trial) == point.params


def test_ranges_are_overridden() -> None:
    one = files.load("set").search_also({"zeta": {"low": 0.2}, "new_value": {"choices": ["zero"]}})
    assert one.search["hp.zeta"] == Dimension(0.2, 0.6)
    assert one.search["variant.new_value"].choices == ("zero",)
    one = one.search_also(
        {"hp.zeta": {"choices": [0.1, 0.2]}, "update.every": {"low": 5, "high": 9}}
    )
    assert one.search["hp.zeta"].choices == (0.1, 0.2)
    assert one.search["update.every"] == Dimension(5, 9)


# What is wrong with a file ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine.yaml: is empty; it needs at least a line 'method: NAME'"),
        ("# nothing\n", "mine.yaml: is empty"),
        ("- set\n- dsr\n", "mine.yaml: holds no 'key: value' lines"),
        ("method: set\nsearch: {zeta: [1\n", "mine.yaml:3: no valid yaml: did not find expected"),
        ("method: set\n\tfixed: 1\n", "mine.yaml:2: no valid yaml: found a tab"),
        ("method: set\nmethod: dsr\n", "mine.yaml:2: no valid yaml: found duplicate key method"),
        ("search: {}\nfixed: {lr: 1}\n", "mine.yaml: no 'method'; there are: set, dsr, sm"),
        ("method: sett\n", "mine.yaml: unknown method 'sett'; did you mean 'set'?; there are: set"),
        ("method: set\nserach: {}\n", "mine.yaml: unknown 'serach'; did you mean 'search'?"),
        ("method: [set]\n", "mine.yaml: unknown method '['set']'"),
        ("method: set\nstart: {p: {epochs: 1}}\n", "start.p: epochs cannot differ at one start"),
        ("method: set\nstart: {p: {data.limit: 1}}\n", "start.p: data.limit cannot differ at one"),
        ("method: set\nsearch: {zeta: {low: 0, high: 1}, hp.zeta: {low: 0, high: 1}}\n",
         "search: hp.zeta stands there twice, once as 'hp.zeta'; leave one out"),
        ("method: set\nsearch: {data.augment: {choices: [none, foo]}}\n", "'foo' is unknown"),
        ("method: set\nfixed: [1]\n", "mine.yaml: fixed: '[1]' is no mapping"),
        ("method: set\nfixed: {epochs: 0}\n", "mine.yaml: fixed: epochs: 0 is out of range"),
        ("method: set\nfixed: {trials: 3}\n", "'trials' is no setting of a single trial"),
        ("method: set\nfixed: {method: dsr}\n", "mine.yaml: fixed: the method is named once"),
        ("method: set\nfixed: {prune: all}\n", "fixed: variant.prune: 'all' is not one of: signw"),
        ("method: set\nfixed: {zeta: 0.1}\nsearch: {zeta: {low: 0.1, high: 0.2}}\n",
         "mine.yaml: 'hp.zeta' is fixed and searched; leave one"),
        ("method: set\nstart: {paper: {zetta: 1}}\n", "mine.yaml: 'zetta' is no hyperparameter of"),
        ("method: set\nstart: {paper: {zeta: 2}}\n",
         "mine.yaml: start.paper: hp.zeta: 2 is out of range for method 'set'; allowed: 0 to 1"),
        ("method: set\nstart: {paper: {prune: some}}\n", "start.paper: variant.prune: 'some' is"),
        ("method: set\nstart: {paper: {lr: fast}}\n", "start.paper: optimizer.lr: 'fast' is no n"),
    ],
)  # fmt: skip
def test_a_bad_file(text: str, message: str, write: Any) -> None:
    with pytest.raises(SpaceError) as caught:
        files.load(write(text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("zetta: {low: 0, high: 1}",
         "mine.yaml: 'zetta' is no hyperparameter of set; did you mean 'zeta'? it has: zeta, thr"),
        ("alpha: {low: 0, high: 1}", "mine.yaml: 'alpha' is no hyperparameter of set; it has: z"),
        ("hp.alpha: {low: 0, high: 1}", "mine.yaml: 'hp.alpha' is no hyperparameter of set; it"),
        ("zeta: {low: 0.6, high: 0.1}", "search.zeta: low 0.6 is not below high 0.1"),
        ("zeta: {low: 0.1, high: 0.1}", "search.zeta: low 0.1 is not below high 0.1"),
        ("zeta: {low: 0.0, high: 0.1, log: true}", "search.zeta: log needs low above 0"),
        ("zeta: {low: 0.1, high: 0.2, log: maybe}", "log: 'maybe' is neither true nor false"),
        ("zeta: {low: 0.1, high: 0.2, log: true, step: 0.1}", "log and step do not go together"),
        ("zeta: {low: 0.1, high: 0.2, step: 1}", "step 1 does not fit 0.1 to 0.2"),
        ("zeta: {low: 0.1, high: 1.5}", "search.zeta: hp.zeta: 1.5 is out of range for method"),
        ("zeta: {low: 0.1}", "search.zeta: high is missing; write {low: A, high: B}"),
        ("zeta: {low: a, high: 1}", "search.zeta: low 'a' is no number"),
        ("zeta: {min: 0, max: 1}", "search.zeta: unknown 'min'; allowed: low, high, log, step"),
        ("zeta: {lo: 0, high: 1}", "search.zeta: unknown 'lo'; did you mean 'low'?"),
        ("zeta: 0.3", "search.zeta: '0.3' is no range; write {low: A, high: B}"),
        ("zeta: {choices: 0.3}", "search.zeta: choices: '0.3' is no list"),
        ("zeta: {choices: []}", "search.zeta: choices: '[]' is no list"),
        ("zeta: {choices: [0.1, 0.1]}", "each may stand there once"),
        ("zeta: {choices: [0.1], low: 0.1}", "has choices and low; give choices, or low and high"),
        ("zeta: {choices: [0.1, 3]}", "hp.zeta: 3 is out of range"),
        ("prune: {choices: [signwise, some]}", "variant.prune: 'some' is not one of: signwise, ma"),
        ("prune: {low: 0, high: 1}", "search.prune: takes words; write choices: [...], of signw"),
        ("model.widths: {choices: [[3], [4]]}", "choices: [3] is neither a word nor a number"),
        ("zeta: {low: 0.1, high: 0.2, when: {prun: x}}",
         "search.zeta: when: 'prun' is no hyperparameter of set; did you mean 'prune'?"),
        ("zeta: {low: 0.1, high: 0.2, when: {prune: x}}", "when: variant.prune: 'x' is not one of"),
        ("zeta: {low: 0.1, high: 0.2, when: {zeta: 1}}", "search: hp.zeta wait for each other"),
        ("optimizer.lr: {low: -1, high: 1}", "optimizer.lr: -1.0 is out of range; allowed: above"),
        ("optimizer.lrr: {low: 0.1, high: 1}", "'optimizer.lrr' is no hyperparameter of set; did"),
        ("epochs: {low: 1, high: 9}", "search.epochs: epochs cannot be searched"),
        ("data.name: {choices: [digits, mnist]}", "data.name cannot be searched"),
        ("update.every: {choices: [soon]}", "update.every: 'soon' is out of range; allowed: epoch"),
    ],
)  # fmt: skip
def test_a_bad_range(line: str, message: str, write: Any) -> None:
    with pytest.raises(SpaceError) as caught:
        files.load(write(f"method: set\nsearch:\n  {line}\n"))
    assert message in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_an_unknown_space() -> None:
    with pytest.raises(SpaceError, match=r"'sett' is no search space; did you mean 'set'\?; there"):
        files.load("sett")
    with pytest.raises(SpaceError, match=r"^nowhere/set.yaml: there is no such file; shipped sp"):
        files.load("nowhere/set.yaml")


def test_defaults_are_the_methods_and_the_trials() -> None:
    assert keys.default(METHODS["dsr"], "hp.gain") == 2.0
    assert keys.default(METHODS["dsr"], "variant.growth") == "nonzero"
    assert keys.default(METHODS["dsr"], "optimizer.lr") == TrialSettings().optimizer.lr
    assert keys.default(METHODS["dsr"], "model.args.depth") is None
