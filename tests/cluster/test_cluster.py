"""Sweeps on clusters of several nodes, which come, go and differ."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from helpers import local_cluster, s3_server
from helpers.local_cluster import LocalCluster, wait_for
from helpers.wandb_server import WandbServer

from sparsetune.cluster import fleet, nodes, trial
from sparsetune.cluster import tuner as cluster
from sparsetune.settings import DataSettings, ModelSettings, RaySettings, SweepSettings, to_dict
from sparsetune.store import journal
from sparsetune.store.layout import sweeps
from sparsetune.store.lines import exists
from sparsetune.store.paths import place
from sparsetune.training.data import load

SPARSETUNE = [sys.executable, "-m", "sparsetune.cli"]
WITHOUT_RAY = "import sys; sys.modules['ray'] = None; from sparsetune.cli import main; main()"
TRIALS = 5
EPOCHS = {"folder": 300, "s3": 60}
TOY = [
    "sweep", "set", "static", "density=0.2", "name=toy", f"trials={TRIALS}",
    "data.name=mine:images", "model.widths=[16]", "train.batch_size=32", "scheduler.name=none",
    "concurrency=4",  # each is a process, which takes two seconds of a core to start
]  # fmt: skip
MEMBERS = ["set@0.2", "static@0.2"]
MINE = """
import numpy as np
from sklearn.datasets import load_digits
from sparsetune.methods.contract import Method
import helper

METHOD = Method(name="mine", paper="none", begins="sparse")

def images():
    digits = load_digits()
    pictures = np.rint(digits.images * helper.SCALE).astype(np.uint8)
    return pictures[:200], digits.target[:200], pictures[200:], digits.target[200:]
"""


def users_folder(parent: Path) -> Path:
    folder = parent / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    (folder / "helper.py").write_text("SCALE = 255 / 16\n")
    (folder / "unused.py").write_text("")
    return folder


# In the namespace ---------------------------------------------------------------------------------


def nodes_differ_come_and_go(folder: Path, kinds: str) -> None:
    """What the tests below look at, as JSON."""
    mine, seen = users_folder(folder), dict[str, Any]()
    stranger = folder / "stranger/sparsetune-0.0.9.dist-info"
    stranger.mkdir(parents=True)
    (stranger / "METADATA").write_text("Name: sparsetune\nVersion: 0.0.9\n")
    with LocalCluster(folder) as cluster:
        first, second = cluster.add_node(hidden=mine), cluster.add_node(hidden=mine)
        other = cluster.add_node(PYTHONPATH=f"{stranger.parent}:{cluster.env['PYTHONPATH']}")
        cluster.wait_for_nodes()
        words = [*TOY, f"storage={folder / 'sweeps'}", "ray.address=auto", "wandb.mode=disabled"]
        refused = subprocess.run(
            [*SPARSETUNE, *words], cwd=mine, env=cluster.env, capture_output=True, text=True
        )
        seen["refused"] = other, refused.returncode, refused.stderr, sweeps(folder / "sweeps")
        cluster.kill_node(other)
        begin, env, storage = [first, second], dict[str, str](), folder / "sweeps"
        for kind in kinds.split():
            if kind == "s3":
                server = s3_server.S3Server()
                server.make_bucket()
                env, storage = server.environment, place(f"s3://{s3_server.BUCKET}/sweeps")
                os.environ.update(env)
            seen[kind] = a_node_goes_and_one_comes(cluster, mine, begin, storage, EPOCHS[kind], env)
            begin = list(seen[kind]["end"])
    print(json.dumps(seen))


def a_node_goes_and_one_comes(
    cluster: LocalCluster, mine: Path, nodes: list[str], storage: Path, epochs: int, env: Any
) -> dict[str, Any]:
    """A sweep by `ray job submit` on these nodes; the first of them is killed midway."""
    seen: dict[str, Any] = {"nodes": nodes}
    members = [storage / "toy" / name for name in MEMBERS]
    words = [f"storage={storage}", f"epochs={epochs}", "wandb.mode=online"]
    done = len(cluster.output())
    wait_for(lambda: not cluster.processes("ray::Engine"))
    with WandbServer() as server:
        job = cluster.submit(
            "env", "-C", str(mine), *SPARSETUNE, *TOY, *words,
            WANDB_API_KEY="k" * 40, WANDB_BASE_URL=server.url, **env,
        )  # fmt: skip

        def reports(member: Path) -> int:
            trials = journal.load(member).trials.values() if exists(member) else []
            return sum(len(trial.reports) for trial in trials)

        wait_for(lambda: all(reports(member) > 20 for member in members), 240)
        seen["begin"] = cluster.processes("ray::Engine")
        cluster.kill_node(nodes[0])
        new = cluster.add_node(hidden=mine)
        command = [sys.executable, "-c", WITHOUT_RAY, "status", "toy", "--json", words[0]]
        status = subprocess.run(command, env=cluster.env | env, capture_output=True, check=True)
        seen["state"] = json.loads(status.stdout)["state"]
        wait_for(lambda: new in cluster.processes("ray::Engine"))
        seen["end"] = cluster.processes("ray::Engine")
        seen["exit"] = job.wait(120)
        seen["steps"] = [run.steps for run in server.runs.values()]
    seen["output"] = cluster.output()[done:]
    seen["trials"] = [
        [(t.number, t.status, t.attempts, len(t.reports)) for t in record.trials.values()]
        for record in map(journal.load, members)
    ]
    return seen | {"new": new}


# Outside ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of `nodes_differ_come_and_go`: one cluster for all, as it takes a while to start."""
    if not local_cluster.permitted():
        pytest.skip("no namespaces here (unshare)")
    if importlib.util.find_spec("aiohttp_cors") is None:
        pytest.skip("needs the extra dev: ray[default]")
    folder = tmp_path_factory.mktemp("cluster")
    kinds = "folder s3" if s3_server.find() else "folder"
    words = "nodes_differ_come_and_go", str(folder), kinds
    done = local_cluster.run(Path(__file__), *words, timeout=600)
    output = (folder / "job").read_text() if (folder / "job").exists() else ""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr + output
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_a_node_that_differs_is_named_and_the_sweep_has_not_been(seen: dict[str, Any]) -> None:
    other, status, message, left = seen["refused"]
    assert status == 2
    assert f"node {other}: sparsetune is 0.0.9, and" in message
    assert message.count("node 127") == 1
    assert "Nothing was begun; the same command can be given again." in message
    assert "Traceback" not in message
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_sweep_while_nodes_come_and_go(kind: str, seen: dict[str, Any]) -> None:
    if kind not in seen:
        s3_server.python()  # skips the test
    epochs, found = EPOCHS[kind], seen[kind]
    gone, stays = found["nodes"]
    assert found["begin"] == {gone: 1, stays: 1}
    assert found["state"] == "running"
    assert found["end"] == {stays: 1, found["new"]: 1}
    assert found["exit"] == 0, found["output"]
    assert "gone with a node" in found["output"]
    trials = [[number, "finished", 1, epochs] for number in range(TRIALS)]
    assert found["trials"] == [trials] * len(MEMBERS)
    assert found["steps"] == [list(range(1, epochs + 1))] * (len(MEMBERS) * TRIALS)


class FakeRay:
    """What a fleet asks of Ray, for nodes that are only said to be there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}
        self.engines: dict[str, tuple[str, dict[str, Any], tuple[Any, ...]]] = {}
        self.wrong: list[str] = []  # what nodes say that they lack
        monkeypatch.setattr(ray, "remote", self.remote)
        monkeypatch.setattr(ray, "get", lambda answer: answer)
        monkeypatch.setattr(ray, "kill", lambda actor: self.engines.pop(actor.name))
        monkeypatch.setattr(fleet, "alive_nodes", lambda: self.nodes)
        monkeypatch.setattr(fleet, "_at", lambda node: SimpleNamespace(node_id=node))
        monkeypatch.setattr(fleet, "_known", lambda name: True)
        monkeypatch.setattr(fleet, "_answered", lambda waiting, timeout=0.0: list(waiting))
        monkeypatch.setattr(fleet, "FOLLOW_SECONDS", 0.0)

    def node(self, address: str, **resources: float) -> None:
        self.nodes[address] = {"NodeManagerAddress": address, "Resources": resources}

    def remote(self, *cls: Any, **_: Any) -> Any:
        def options(scheduling_strategy: Any, name: str = "", **options: Any) -> Any:
            def remote(*given: Any, **needs: Any) -> Any:
                if needs:
                    return self.wrong
                self.engines[name] = scheduling_strategy.node_id, options, given
                ready = SimpleNamespace(remote=lambda: True)
                return SimpleNamespace(name=name, __ray_ready__=ready)

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(options=options) if cls else lambda function: self.remote(function)


def test_an_engine_for_each_gpu_follows_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, notes, asked = FakeRay(monkeypatch), list[str](), list[bool | None]()

    def slots(on_gpu: bool | None) -> int:
        asked.append(on_gpu)
        return 64

    engines = fleet.Fleet(SweepSettings(device="cuda"), 1000, slots, {"folder": ""}, notes.append)
    fake.node("head", CPU=8)
    engines.begin()
    assert (engines.places, asked) == ({}, [])
    assert notes == ["no node has room for an engine (a GPU); waiting for one"]
    fake.node("two", CPU=8, GPU=2)
    fake.node("one", CPU=8, GPU=1)
    engines.follow()
    assert sorted(node for node, _, _ in fake.engines.values()) == ["one", "two", "two"]
    assert all(options["num_gpus"] == 1 for _, options, _ in fake.engines.values())
    assert all(given[0] == "cuda" for _, _, given in fake.engines.values())
    assert engines.places == dict.fromkeys(fake.engines, 64)
    del fake.nodes["two"]
    engines.follow()
    assert [node for node, _, _ in fake.engines.values()] == ["one"]
    assert list(engines.places) == list(fake.engines)
    assert "gone with a node: engine-" in notes[-1]
    fake.wrong = ["storage: is away"]
    fake.node("bad", CPU=8, GPU=4)
    engines.follow()
    assert (len(engines.places), notes[-1]) == (1, "not used: node bad: storage: is away")
    fake.wrong = []
    fake.node("again", CPU=8, GPU=2)
    engines.follow()
    assert sorted(node for node, _, _ in fake.engines.values()) == ["again", "again", "one"]
    assert asked == [True]


def test_no_more_engines_than_are_wanted_and_those_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, settings = FakeRay(monkeypatch), SweepSettings(concurrency=6)
    settings.resources.engines, settings.resources.threads_per_engine = 3, 2
    fake.node("a", CPU=5)
    fake.node("b", CPU=4)
    engines = fleet.Fleet(settings, 100, lambda on_gpu: 16, {"folder": ""}, print)
    engines.begin()
    assert sorted(node for node, _, _ in fake.engines.values()) == ["a", "a", "b"]
    assert {given[:4] for _, _, given in fake.engines.values()} == {("cpu", "auto", 2, 2)}
    fake.node("c", CPU=64)
    engines.follow()
    assert engines.places == dict.fromkeys(fake.engines, 2)
    assert len(fake.engines) == 3

    fake.wrong = ["torch is 1.0, and 2.0 where the sweep was started"]
    again = fleet.Fleet(settings, 100, lambda on_gpu: 16, {"folder": ""}, print)
    with pytest.raises(fleet.ClusterError, match=r"nodes are not alike:\n  node a: torch is 1.0"):
        again.begin()


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, which is left again, with what the user imported from it."""
    folder = users_folder(tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield folder
    for name in ("mine", "helper", "package.inner.net", "package.inner", "package"):
        sys.modules.pop(name, None)


def test_what_a_node_lacks_is_said(at_home: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("abc")
    data = DataSettings("mine:images")
    images = (to_dict(data), load(data).fingerprint)
    found = nodes.needs(token, ["set", "mine:METHOD"], [to_dict(ModelSettings())], [images])
    look = nodes.looker()
    assert look(**found) == []
    assert list(tmp_path.glob("token*")) == [token]

    versions = found["versions"] | {"torch": "1.0+cpu", "nosuchpackage": "2.0"}
    versions["ray"] = versions["ray"].partition("+")[0] + "+local"
    torch, missing = look(**found | {"versions": versions})
    assert torch.startswith("torch is ")
    assert missing == "nosuchpackage is not installed, and 2.0 where the sweep was started"

    [storage] = look(**found | {"token": (str(token), "of another folder")})
    assert f"storage: {tmp_path} is another folder there" in storage
    [storage] = look(**found | {"token": (str(tmp_path / "away/token"), "abc")})
    assert storage.startswith("storage: ")

    lacking = [(to_dict(DataSettings("mnist", "nowhere")), ""), (to_dict(data), "0123456789abcdef")]
    model = to_dict(ModelSettings("nosuchmodule:Net"))
    wrong = {"methods": ["mine:images", "nowhere:METHOD"], "models": [model], "data": lacking}
    no_method, no_rule, module, path, others = look(**found | wrong)
    assert "method: mine:images is no method: it is a function" in no_method
    assert "method: module 'nowhere' cannot be imported" in no_rule
    assert "module 'nosuchmodule' cannot be imported" in module
    assert "data.path: 'nowhere' does not exist" in path
    assert "mine:images are others there" in others
    assert "and 0123456789ab where the sweep was started" in others


def test_it_can_be_said_where_sparsetune_is_missing() -> None:
    code = (
        "import pickle, sys; look = pickle.load(sys.stdin.buffer); "
        "wrong = look('', ('', ''), {'sparsetuna': '1'}, [], [], []); "
        "print(wrong, [m for m in sys.modules if m.startswith('sparsetune')])"
    )
    sent = ray.cloudpickle.dumps(nodes.looker())
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    assert done.stdout.decode().strip() == (
        "['sparsetuna is not installed, and 1 where the sweep was started'] []"
    )
    assert pickle.loads(sent) is not None


def test_users_modules_are_those_that_were_imported(at_home: Path) -> None:
    package = at_home / "package/inner"
    package.mkdir(parents=True)
    (package / "net.py").write_text("class Net: pass\n")
    importlib.invalidate_caches()
    paths = ["mine:images", "package.inner.net:Net"]
    sent = [at_home / name for name in ("helper.py", "mine.py", "package")]
    assert nodes.users_modules(paths) == [str(path.resolve()) for path in sent]
    assert nodes.users_modules(["torch:Tensor"]) == []
    assert nodes.users_modules([]) == []


def test_storage_that_would_end_with_the_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(fleet.ClusterError, match=r"storage: .* ends with the job"):
        cluster.check_cluster(RaySettings(), Path("/tmp/ray/s/working_dir_files/_ray_pkg_1/sweeps"))
    with pytest.raises(fleet.ClusterError, match="RAY_ADDRESS: no cluster answers at"):
        cluster.check_cluster(RaySettings(), Path("sweeps"))


def test_attempts_that_ended_with_their_node_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = {"a": True, "b": True, "c": True}
    monkeypatch.setattr(
        ray, "nodes", lambda: [{"NodeID": key, "Alive": alive[key]} for key in alive]
    )
    folder = tmp_path / "trials/00000"
    assert trial._attempts(folder, 1) == []
    trial._note_attempts(folder, 1, ["a", "b", "a"])
    assert trial._attempts(folder, 1) == ["a", "b", "a"]
    alive["a"] = False
    assert trial._attempts(folder, 1) == ["b"]
    assert trial._attempts(folder, 2) == []  # another driver


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
