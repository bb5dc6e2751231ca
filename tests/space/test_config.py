"""A command line as a sweep: its members, what overrides what, and what is said of a bad one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest

from sparsetune.search.study import MemberStudy
from sparsetune.settings import TrialSettings, to_dict
from sparsetune.space import config, files
from sparsetune.space.member import Member, Sweep, scheduling
from sparsetune.space.resolve import resolve
from sparsetune.store.journal import Journal


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default storage of these tests; nothing may be written into it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSETUNE_STORAGE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def sweep(*given: str) -> Sweep:
    specs = [word for word in given if "=" not in word]
    return resolve(specs, ["name=t", *(word for word in given if "=" in word)], "sweep")


def train(*given: str) -> Sweep:
    return resolve([given[0]], list(given[1:]), "train")


def names(one: Sweep) -> list[str]:
    return [member.name for member in one.members]


# Words --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize(
    ("word", "given"),
    [
        ("name=2024", {"name": "2024"}),
        ("name=1e3", {"name": "1e3"}),
        ("data.name=2024", {"data.name": "2024"}),
        ("data.path=", {"data.path": ""}),
        ("optimizer.lr=1e-3", {"optimizer.lr": 0.001}),
        ("optimizer.lr=1", {"optimizer.lr": 1.0}),
        ("update.stop=1", {"update.stop": 1.0}),
        ("schedule.milestones=[0, 1]", {"schedule.milestones": [0.0, 1.0]}),
        ("hp.zeta=1", {"hp.zeta": 1.0}),
        ("optimizer.nesterov=true", {"optimizer.nesterov": True}),
        ("order_seed=null", {"order_seed": None}),
        ("density=0.02,0.05", {"density": [0.02, 0.05]}),
        ("density=0.02", {"density": [0.02]}),
        ("density=[0.02, 0.05]", {"density": [0.02, 0.05]}),
        ("model.widths=300,100", {"model.widths": [300, 100]}),
        ("model.widths=[300]", {"model.widths": [300]}),
        ("model.args.depth=3", {"model.args.depth": 3}),
        ("dense_layers=last", {"dense_layers": ["last"]}),
        ("objective=val/accuracy,density/all", {"objective": ["val/accuracy", "density/all"]}),
        ("objective=[val/loss]", {"objective": ["val/loss"]}),
        ("data={name: mnist, limit: 9}", {"data.name": "mnist", "data.limit": 9}),
        ("constraint={density/all: 0.1}", {"constraint.density/all": 0.1}),
        ("constraint.density/layer/fc1.weight=1", {"constraint.density/layer/fc1.weight": 1.0}),
        ("update.every=epoch", {"update.every": "epoch"}),
        ("update.every=25", {"update.every": 25}),
        ("search.zeta.low=0.1", {"search.zeta.low": 0.1}),
        ("search.update.every.choices=[5, 9]", {"search.update.every.choices": [5, 9]}),
        ("start=seed-text", {"start": "seed-text"}),
    ],
)
def test_words(word: str, given: dict[str, Any]) -> None:
    assert config.parse_words([word]) == given
    key, value = next(iter(given.items()))
    assert type(config.parse_words([word])[key]) is type(value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("epochs", "'epochs': write key=value, such as optimizer.lr=0.1"),
        ("=3", "'=3': write key=value"),
        ("+epochs=3", "'+epochs=3': keys exist already and need no +; write epochs=3"),
        ("~epochs", "'~epochs': a key cannot be taken away"),
        ("{epochs: 3}", "'{epochs: 3}': no mapping here; write each key alone"),
        ("epochs=${trials}", "'epochs=${trials}': values cannot refer to others"),
        ("epochs=[3", "'epochs=[3': the value cannot be read: did not find expected"),
        ("epoch=3", "epoch: no such key; did you mean epochs?"),
        ("optimizer.lrr=3", "optimizer.lrr: no such key; did you mean optimizer.lr"),
        ("lr=3", "lr: no such key; did you mean optimizer.lr?"),
        ("zeta=0.3", "zeta: no such key; did you mean hp.zeta"),
        ("xyzzy=1", "xyzzy: no such key; there are: method, hp.*, variant.*, density"),
        ("data=mnist", "data: holds other keys; write data.name, data.path"),
        ("hp=3", "hp: holds other keys; write hp.NAME=..."),
        ("epochs=0", "epochs: 0 is out of range; allowed: 1 or more"),
        ("epochs=2.5", "epochs: '2.5' is no whole number"),
        ("epochs=many", "epochs: 'many' is no whole number"),
        ("epochs=true", "epochs: 'True' is no whole number"),
        ("epochs=", "epochs: 'None' is no whole number"),
        ("trials=0", "trials: 0 is out of range; allowed: 1 or more"),
        ("checkpoint.every=0", "checkpoint.every: 0 is out of range; allowed: 1 or more"),
        ("train.batch_size=0", "train.batch_size: 0 is out of range; allowed: 1 or more"),
        ("concurrency=-1", "concurrency: -1 is out of range; allowed: 0 or more"),
        ("optimizer.lr=0", "optimizer.lr: 0.0 is out of range; allowed: above 0"),
        ("optimizer.lr=nan", "optimizer.lr: nan is out of range; allowed: above 0"),
        ("optimizer.lr=inf", "optimizer.lr: inf is out of range"),
        ("optimizer.lr=fast", "optimizer.lr: 'fast' is no number"),
        ("optimizer.momentum=1", "optimizer.momentum: 1.0 is out of range; allowed: 0 or more"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay: -1.0 is out of range; allowed: 0"),
        ("optimizer.name=adam", "optimizer.name: 'adam' is unknown; did you mean 'adamw'?; known"),
        ("schedule.milestones=[2]", "schedule.milestones: [2.0] is out of range; allowed: shares"),
        ("density=0", "density: 0.0 is out of range; allowed: above 0, up to 1"),
        ("density=0.1,1.5", "density: 1.5 is out of range"),
        ("density=0.1,0.1", "'density=0.1,0.1': give each density once"),
        ("density=few", "density: 'few' is no number"),
        ("distribution=erdos", "distribution: 'erdos' is unknown; known: uniform, er, erk"),
        ("model.widths=[a]", "model.widths: '['a']' is no list of numbers; write [a, b]"),
        ("update.every=0", "update.every: 0 is out of range; allowed: epoch, or a number of steps"),
        ("update.stop=2", "update.stop: 2.0 is out of range; allowed: a share of training"),
        ("method=sett", "method: 'sett' is unknown; did you mean 'set'?; known: set, dsr"),
        ("scheduler.reduction=4", "scheduler.reduction: 4.0 is out of range; allowed: above 1, up"),
        ("sampler.name=tpee", "sampler.name: 'tpee' is unknown; did you mean 'tpe'?"),
        ("engine=fast", "engine: 'fast' is unknown; known: auto, solo, stacked, csr"),
        ("wandb.mode=on", "wandb.mode: 'on' is unknown; known: auto, online"),
        ("constraint.density/all=low", "constraint.density/all: 'low' is no bound"),
    ],
)
def test_a_bad_word(word: str, message: str, storage: Path) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(["set"], ["name=t", word], "sweep")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not storage.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["sett"], "'sett' is no search space; did you mean 'set'?; there are: dense, dsr"),
        (["nowhere.yaml"], "nowhere.yaml: there is no such file"),
        ([], "no search space given; there are: dense"),
        (["set", "set"], "'set' is given twice (search_spaces/set.yaml, search_spaces/set.yaml)"),
        (["set", "name="], "name: a sweep needs one; write name=NAME"),
        (["set", "name=a/b"], "name: 'a/b' is no name for a sweep; use up to 100 letters"),
        (["set", "name=.."], "name: '..' is no name for a sweep"),
        (["set", "name=-x"], "name: '-x' is no name for a sweep"),
        (["set", "start=paper"], "start: belongs to train"),
        (["set", "method=dsr"], "method: search_spaces/set.yaml searches set; for dsr give a"),
        (["set", "hp.zetta=1"], "'hp.zetta' is no hyperparameter of set; did you mean 'hp.zeta'?"),
        (["set", "dsr", "hp.alpha=1"], "'hp.alpha' is no hyperparameter of set, dsr"),
        (["set", "hp.zeta=2"], "hp.zeta: 2.0 is out of range for method 'set'; allowed: 0 to 1"),
        (["set", "variant.prune=all"], "variant.prune: 'all' is not one of: signwise, magnitude"),
        (["set", "search.zetta.low=0"], "search.zetta: 'zetta' is no hyperparameter of set; did"),
        (["set", "search.zeta.low=0.9"], "search.zeta: low 0.9 is not below high 0.6"),
        (["set", "search.lr.low=0"], "search.lr: log needs low above 0, and low is 0"),
        (["set", "search.zeta.high=3"], "search.zeta: hp.zeta: 3.0 is out of range"),
        (["set", "search.zeta.min=0"], "search.zeta.min: write search.KEY.low, .high"),
        (["set", "search.zeta=0"], "search.zeta: write search.KEY.low, .high"),
        (["set", "search.new_value.low=0"], "searches it by choices (normal, zero); give"),
        (["set", "search.max_prune.low=0.1"], "search.max_prune: high is missing"),
        (["set", "search.zeta.low=0.1", "hp.zeta=0.2"], "search.zeta: hp.zeta is given, too"),
        (["set", "search.epochs.choices=[1]"], "search.epochs: epochs cannot be searched"),
        (["set", "density=1e-5"], "density: 1e-05 cannot be reached; this network allows 5.98e-05"),
        (["set", "density=1e-5"], "to 1 (density_over: all, 0 weights left dense, one in each"),
        (["small_dense", "density=1e-5"], "model.match_density: 1e-05 of 50200 weights cannot"),
        (["set", "dense_layers=first", "density=0.1"], "density: 0.1 cannot be reached"),
        (["set", "dense_layers=fc9"], "dense_layers: 'fc9' is no weight of this network; allowed"),
        (["set", "search.density.low=1e-6", "search.density.high=0.1"], "1e-06 cannot be reached"),
        (["set", "data.name=mnits"], "data.name: 'mnits' is unknown; did you mean 'mnist'?"),
        (["set", "data.name=mnist", "data.path=gone"], "data.path: 'gone' does not exist"),
        (["set", "data.validation=1"], "data.validation: 1.0 is out of range"),
        (["set", "data.validation=0"], "data.validation: 0 leaves no images to measure val/accur"),
        (["set", "data.augment=flip"], "data.augment: 'flip' is unknown; did you mean"),
        (["set", "model.name=mlpp"], "model.name: 'mlpp' is unknown; did you mean 'mlp'?"),
        (["set", "model.name=lenet5"], "model.name: lenet5 needs images of 16x16 or more"),
        (["set", "device=tpuu"], "device: 'tpuu' is unknown; allowed: auto, cpu, cuda"),
        (["set", "objective=acc"], "objective: no metric 'acc'; known: val/accuracy"),
        (["set", "objective=[]"], "objective: [] names no metric"),
        (["set", "constraint.density/al=1"], "no metric 'density/al'; did you mean 'density/all'"),
        (["set", "epochs=12", "scheduler.grace=2"],
         "scheduler.grace: 2 of 12 epochs; allowed: 3 to 12, a quarter or more, because"),
        (["set", "scheduler.name=asha", "objective=val/loss,density/all"],
         "scheduler.name: asha compares trials by one objective, and there are 2; use"),
        (["set", "density=0.1,0.10000001"], "density: two members would be called 'set@0.1'"),
        (["set", "device=meta"], "device: 'meta' is unknown; allowed: auto, cpu, cuda"),
        (["set", "ray.address=auto", "device=gpu"], "device: 'gpu' is unknown"),
        (["set", "constraint.method/nope=1"], "constraint.method/nope: trials report no such met"),
        (["set", "constraint.density/layer/fc9=1"], "constraint.density/layer/fc9: trials report"),
        (["set", "objective=[[val/accuracy]]"], "objective: no metric '['val/accuracy']'"),
        (["set", "model.widths=[100000000000]"], "every width must be 1 to 1000000"),
        (["set", "optimizer.lr=1e308"], "optimizer.lr: 1e+308 is out of range; allowed: above 0"),
        (["set", "model.name=..a:b"], "model.name: '..a:b' is no import path"),
        (["set", "data.name=mnist", "data.path=~nobodyx/x"], "data.path: '~nobodyx/x' does not ex"),
        (["set", "name=" + "x" * 101], "is no name for a sweep; use up to 100 letters"),
        (["set", "storage=" + "x" * 300], "cannot be a folder"),
        (["dst", "hp.threshold=1", "variant.threshold_init=uniform"], "allowed: 0 to 0.9"),
        (["dst", "search.threshold.high=1"], "allowed: 0 to 0.9"),
        (["set", "engine=cs"], "engine: 'cs' is unknown; did you mean 'csr'?"),
        (["dst", "engine=csr"], "engine: csr cannot train this: method: dst begins dense;"),
        (["sm", "engine=csr", "variant.growth=momentum"], "needs dense gradients"),
        (["set", "storage="], "storage: an empty value is out of range; allowed: a folder's path"),
        (["dst", "constraint.density/all=nan"], "constraint.density/all: 'nan' is no bound"),
        (["dst", "constraint.density/all=inf"], "constraint.density/all: 'inf' is no bound"),
        (["set", "model.match_density=0.1"], "model.match_density: makes a small dense network"),
        (["dst", "model.match_density=0.1"], "model.match_density: makes a small dense network"),
        (["set", "resources.threads_per_engine=999"], "resources: 1 engines of 999"),
        (["set", "storage=gs://bucket"], "storage: 'gs://bucket' is no place for sweeps; give"),
    ],
)  # fmt: skip
def test_a_bad_sweep(given: list[str], message: str, storage: Path) -> None:
    with pytest.raises(ValueError) as caught:
        sweep(*given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not storage.exists()


def test_bad_storage_and_an_existing_name(tmp_path: Path, storage: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^storage: .*/file is no folder; give storage=FOLDER"):
        sweep("set", f"storage={tmp_path / 'file'}")
    (storage / "t").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^name: 't' exists already in .*sparsetune resume t st"):
        sweep("set")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no files")
def test_a_folder_without_the_right_to_write() -> None:
    # The rights there say that root may write.
    with pytest.raises(ValueError, match=r"^storage: .* cannot be written to; give storage=FOLD"):
        sweep("set", "storage=/proc/sweeps")


NETWORK = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, input_shape, num_classes, {args}):
        super().__init__()
        self.fc, self.other = nn.Linear(64, num_classes), nn.Linear(4, 4)
        {init}
    def forward(self, x):
        {forward}
"""


@pytest.mark.parametrize(
    ("init", "forward", "message"),
    [
        (
            "raise RuntimeError('no')",
            "pass",
            "model.name: making {m}:Net raised RuntimeError: no (",
        ),
        ("import sys; sys.exit(3)", "pass", "model.name: making {m}:Net raised SystemExit: 3 ("),
        ("1 / (hidden - 1)", "pass", "raised ZeroDivisionError: division by zero ("),
        ("pass", "raise KeyError('no')", "on images of shape [1, 8, 8] raised KeyError: 'no' ("),
        ("pass", "return x", "gives [2, 1, 8, 8] for 2 images; it must give [2, 10]"),
        ("pass", "return None", "gives NoneType for 2 images; it must give [2, 10]"),
        ("pass", "return self.fc(x.flatten(1))", "does not use its parameters other.weight, oth"),
        ("pass", "return self.fc(x.flatten(1)).detach()", "the backward pass raised RuntimeError"),
    ],
)
def test_a_bad_network_is_found_before_anything_starts(
    init: str, forward: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    module = f"net_{abs(hash(request.node.name))}"  # modules stay imported
    text = NETWORK.format(args="hidden=1", init=init, forward=forward)
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        sweep("set", f"model.name={module}:Net")
    assert message.format(m=module) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('no')", "data.name: {m}:f raised RuntimeError: no ("),
        ("return None", "{m}:f returned <class 'NoneType'>; return (train images"),
        ("return ['a'] * 4", "data.name: making tensors of what {m}:f returned raised"),
        ("return [np.zeros((0, 4)), np.zeros(0, int)] * 2", "{m}:f returned no image"),
        ("return [np.zeros((2, 4)), np.array([0, 10**9])] * 2", "one whole number from 0 to 99999"),
    ],
)
def test_bad_data_is_found_before_anything_starts(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    module = f"data_{abs(hash(request.node.name))}"
    (tmp_path / f"{module}.py").write_text(f"import numpy as np\ndef f():\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        sweep("set", f"data.name={module}:f")
    assert message.format(m=module) in str(caught.value)


def test_ashas_rungs_are_where_trials_may_be_stopped() -> None:
    asha = scheduling(sweep("set", "epochs=20").members)  # grace a quarter, reduction 3
    assert asha.decisions(20) == [5, 15]
    assert asha._replace(grace=2, reduction=2.5).decisions(20) == [2, 5, 13]  # 12.5: at epoch 13
    assert scheduling(sweep("dst", "epochs=20").members).decisions(20) == []


def test_a_start_points_density_is_its_own(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("method: set\nstart: {p: {density: 0.3, zeta: 0.2}, q: {zeta: 0.2}}\n")
    (one,) = sweep(str(file)).members
    assert one.name == "t/x@0.1"
    at = [one.trial_settings(p.params, p.fixed).density for p in one.space.points()]
    assert at == [0.3, 0.1]
    (given,) = sweep(str(file), "density=0.2").members
    at = [given.trial_settings(p.params, p.fixed).density for p in given.space.points()]
    assert at == [0.2, 0.2]
    (single,) = resolve([str(file)], ["start=p"], "train").members
    assert single.name.endswith("/x@0.3")
    file.write_text("method: set\nstart: {p: {density: 1.0e-9}}\n")
    with pytest.raises(ValueError, match=r"density: 1e-09 cannot be reached"):
        sweep(str(file))


# Members ------------------------------------------------------------------------------------------


def test_members_by_space_and_density() -> None:
    one = sweep("set", "dst", "dense", "small_dense", "gmp", "density=0.02,0.05", "constraint={}")
    assert names(one) == [
        "t/set@0.02", "t/set@0.05", "t/dst@0.02", "t/dst@0.05", "t/dense",
        "t/small_dense@0.02", "t/small_dense@0.05", "t/gmp@0.02", "t/gmp@0.05",
    ]  # fmt: skip
    by_name = {member.name: member.settings for member in one.members}
    assert by_name["t/set@0.02"].density == 0.02
    assert by_name["t/dst@0.02"].constraint == {"density/all": 0.02}
    assert by_name["t/dense"].density == 1
    assert by_name["t/dense"].constraint == {}
    assert by_name["t/small_dense@0.05"].model.match_density == 0.05
    assert by_name["t/small_dense@0.05"].density == 1


def test_members_without_a_density() -> None:
    assert names(sweep("set", "dst", "small_dense")) == ["t/set@0.1", "t/dst@0.1",
                                                         "t/small_dense@0.1"]  # fmt: skip


def test_a_searched_density_names_no_density() -> None:
    words = ["search.density.low=0.01", "search.density.high=0.5", "search.density.log=true"]
    assert names(sweep("set", *words)) == ["t/set"]
    with pytest.raises(ValueError, match=r"^search.density: density is given, too"):
        sweep("set", *words, "density=0.1")


def test_the_users_constraint_wins_over_the_spaces() -> None:
    one = sweep("dst", "density=0.02,0.05", "constraint.density/all=0.2").members
    assert [(m.name, m.settings.constraint) for m in one] == [("t/dst@0.2", {"density/all": 0.2})]
    (other,) = sweep("dst", "constraint.val/loss=2").members
    assert other.settings.constraint == {"density/all": 0.1, "val/loss": 2.0}


def test_a_searched_front_is_not_cut_by_the_spaces_constraint() -> None:
    (one,) = sweep("dst", "objective=val/accuracy,density/all").members
    assert (one.name, one.settings.constraint) == ("t/dst", {})
    assert one.objectives == ["val/accuracy", "density/all"]
    assert one.directions == ["maximize", "minimize"]


def test_overrides_go_where_they_apply() -> None:
    set_, dsr = sweep("set", "dsr", "hp.zeta=0.2", "search.target.high=0.2").members
    assert set_.settings.hp == {"zeta": 0.2}
    assert "hp.zeta" not in set_.space.search
    assert dsr.settings.hp == {}
    assert dsr.space.search["hp.target"].high == 0.2
    # threshold is SET's t, which set.yaml does not search, and DSR's H, which dsr.yaml does.
    set_, dsr = sweep("set", "dsr", "search.threshold.low=1e-3").members
    assert "hp.threshold" not in set_.space.search
    assert dsr.space.search["hp.threshold"].low == 1e-3


def test_a_shared_range_changes_for_all() -> None:
    members = sweep("set", "static", "search.lr.high=0.2").members
    assert [member.space.search["optimizer.lr"].high for member in members] == [0.2, 0.2]


def test_precedence_is_default_file_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("method: set\nfixed: {epochs: 7, schedule.name: step, new_value: zero}\n")
    (one,) = sweep(str(file)).members
    assert (one.settings.epochs, one.settings.schedule.name) == (7, "step")
    (one,) = sweep(str(file), "epochs=3", "variant.new_value=normal").members
    assert (one.settings.epochs, one.settings.variant) == (3, {"new_value": "normal"})
    assert one.name == "t/mine@0.1"
    with pytest.raises(ValueError, match=r"^epochs: 10 in t/set@0.1 and 7 in t/mine@0.1; a sweep"):
        sweep(str(file), "set")


def test_a_member_comes_back_from_its_header() -> None:
    for member in sweep("set", "dst", "dense", "density=0.05", "wandb.tags=a,b").members:
        again = Member.from_header(json.loads(json.dumps(member.to_header())))
        assert again == member
        assert again.space.points() == member.space.points()


def test_a_trials_configuration() -> None:
    (one,) = sweep("set", "density=0.05", "seed=3", "data.limit=500").members
    params = {"hp.zeta": 0.31, "optimizer.lr": 0.2, "variant.decay": "cosine"}
    fixed = {"distribution": "er", "schedule.milestones": [0.3]}
    nested = to_dict(one.trial_settings(params, fixed))
    assert nested["hp"] == {"zeta": 0.31}
    assert nested["variant"] == {"prune": "signwise", "decay": "cosine"}
    assert (nested["density"], nested["seed"], nested["distribution"]) == (0.05, 3, "er")
    assert nested["data"]["limit"] == 500
    assert nested["schedule"]["milestones"] == [0.3]
    assert set(nested) == set(to_dict(TrialSettings()))
    assert one.settings.hp == {}  # one trial leaves no trace in the next
    assert config.trial_settings(nested) == one.trial_settings(params, {
        "distribution": "er", "schedule.milestones": [0.3]})  # fmt: skip
    assert json.loads(json.dumps(nested)) == nested


def test_trial_settings_refuse_what_is_no_trials() -> None:
    assert config.trial_settings({"hp": {"zeta": 0.1}, "optimizer.lr": 1}).optimizer.lr == 1.0
    with pytest.raises(ValueError, match=r"^optimizer.lrr: no such key; did you mean optimizer.lr"):
        config.trial_settings({"optimizer": {"lrr": 1}})
    with pytest.raises(ValueError, match=r"^trials: belongs to a sweep, not to a trial"):
        config.trial_settings({"trials": 3})


def test_run_names() -> None:
    set_, dense, dst = sweep("set", "dense", "dst", "density=0.05", "seed=2").members
    params = {"hp.zeta": 0.3123, "optimizer.lr": 0.1}
    assert set_.run_name(params, 7) == "set-d0.05-zeta0.31-s2"
    assert dense.run_name({"optimizer.lr": 0.1234}, 7) == "dense-lr0.12-s2"
    assert dst.run_name({"hp.alpha": 5e-4}, 7) == "dst-d0.05-alpha0.0005-s2"
    (searched,) = sweep("set", "search.density.low=0.01", "search.density.high=0.5").members
    assert searched.run_name({"density": 0.0213, "hp.zeta": 0.3}, 0) == "set-d0.0213-zeta0.3-s0"


def test_the_violation_of_constraints() -> None:
    (one,) = sweep("set", "constraint={density/all: 0.1, val/loss: 2}").members
    assert one.constraint({"density/all": 0.1, "val/loss": 1}) == 0
    assert one.constraint({"density/all": 0.3, "val/loss": 3}) == pytest.approx(1.2)
    assert math.isnan(one.constraint({"density/all": 0.3}))


# Early stopping -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name", "reason"),
    [
        (["set", "static"], "asha", "the default"),
        (["set", "dense"], "none", "dense begins dense"),
        (["set", "dst"], "none", "dst begins dense"),
        (["set", "gmp"], "none", "gmp begins dense"),
        (["set", "constraint.val/loss=2"], "none", "t/set@0.1 has a constraint"),
        (["set", "objective=val/accuracy,density/all"], "none", "several objectives"),
        (["set", "scheduler.name=none"], "none", "asked for"),
        (["set", "dst", "scheduler.name=asha"], "asha", "asked for"),
    ],
)
def test_who_is_stopped_early(given: list[str], name: str, reason: str) -> None:
    stopping = scheduling(sweep(*given).members)
    assert stopping.name == name
    assert reason in stopping.reason


def test_grace_is_a_quarter_of_the_epochs() -> None:
    assert scheduling(sweep("set", "epochs=10").members)[1:3] == (3, 3.0)
    assert scheduling(sweep("set", "epochs=1").members).grace == 1
    assert scheduling(sweep("set", "epochs=12", "scheduler.grace=5").members).grace == 5


# Training one setting -----------------------------------------------------------------------------


def test_train_takes_the_paper_point(storage: Path) -> None:
    one = train("set")
    assert one.name == "train-set-1"
    (member,) = one.members
    assert member.name == "train-set-1/set@0.1"
    assert member.settings.trials == 1
    assert [point.name for point in member.space.points()] == ["paper"]
    assert [p.name for p in train("set", "start=seed-text").members[0].space.points()] == [
        "seed-text"
    ]
    (storage / "train-set-1").mkdir(parents=True)
    assert train("set").name == "train-set-2"
    assert train("set", "name=mine").name == "mine"


def test_train_without_points_takes_the_settings(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("method: set\nfixed: {zeta: 0.2}\n")
    (member,) = train("./mine.yaml").members
    ((_, params, fixed, in_study),) = member.space.points()
    assert (params, fixed, in_study) == ({}, {}, False)
    assert member.trial_settings(params, fixed).hp == {"zeta": 0.2}


def test_train_on_everything_watches_the_training_loss() -> None:
    assert train("set", "data.validation=0").members[0].objectives == ["train/loss"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["start=papre"], "start: 'papre' is no start point of search_spaces/set.yaml; did you me"),
        (["density=0.1,0.2"], "density: train takes one; for several use sweep"),
        (["trials=3"], "trials: train trains one setting; for a search use sweep"),
        (["search.zeta.low=0.1"], "search.zeta.low: train trains one setting"),
    ],
)
def test_what_train_refuses(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        train("set", *words)
    assert message in str(caught.value)


# With the searcher --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("set", "tpe"),
        ("dst", "tpe"),
        ("dsr", "tpe"),
        ("dst", "random"),
        ("dst", "gp"),
        ("dst", "nsga2"),
    ],
)
@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_member_is_searched(name: str, sampler: str, tmp_path: Path) -> None:
    words = [f"sampler.name={sampler}", "sampler.startup=3", "constraint.density/all=0.2"]
    (member,) = sweep(name, *words).members
    journal = Journal.create(tmp_path / "m", {"trials": 12, **member.to_header()})
    search = MemberStudy(member, journal, seed=0)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for number in range(8):
        trial = search.suggest()
        metrics = {"epoch": 1, "val/accuracy": number / 10, "density/all": 0.3 - number / 20}
        about = {"member": member.name, "number": number}
        assert search.config(trial)["trial"].items() >= about.items()
        search.report(number, 1, metrics, "CONTINUE")
        search.end(number, "finished")
    points = [point.name for point in member.space.points()]
    origins = [trial.origin for trial in journal.record.trials.values()]
    assert origins == [f"start:{p}" for p in points] + ["sampler"] * (8 - len(points))
    again = Member.from_header(journal.record.header)
    assert again == member
    journal.close()


def test_all_shipped_spaces_make_one_sweep() -> None:
    one = sweep(*files.names(), "density=0.02,0.05")
    assert len(names(one)) == 19
    assert scheduling(one.members).name == "none"
