"""Exported trials: PyTorch reads them by the lines in the help, and computes what is recorded."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from click.testing import CliRunner
from helpers.check_frame import check_equal
from helpers.command import run
from helpers.logged_out import KEY, nobody  # noqa: F401 - a fixture
from helpers.real_data import real
from helpers.told_sweep import told
from helpers.wandb_files import records
from helpers.wandb_server import WandbServer

import sparsetune
from sparsetune import cli
from sparsetune.machine import versions
from sparsetune.reports import export
from sparsetune.settings import DataSettings
from sparsetune.store import journal
from sparsetune.store.paths import write_whole
from sparsetune.training import data

TOY = ["epochs=2", "data.limit=400", "model.widths=[32]", "train.batch_size=32"]
TOY += ["wandb.mode=disabled"]


def lines() -> str:
    """The lines that the command's help shows."""
    text = inspect.cleandoc(cli.export.help or "")
    code = [line[2:] for line in text.splitlines() if line.startswith("  ")]
    assert len([line for line in code if " = " in line or "load_state" in line]) == 3
    return "\n".join(code)


def check_computes_what_is_recorded(file: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    assert file.name == "best.pt"
    monkeypatch.chdir(file.parent)
    found: dict[str, Any] = {}
    exec(lines(), found)
    saved, model = found["saved"], found["model"].eval()
    settings = DataSettings(**saved["config"]["data"])
    images, labels = data.load(settings).train
    _, held_out = data.split(len(labels), settings.validation, saved["config"]["seed"])
    mean, deviation = (saved["normalization"][k][:, None, None] for k in ("mean", "deviation"))
    with torch.no_grad():
        logits = model((images[held_out] / 255 - mean) / deviation)
    accuracy = (logits.argmax(1) == labels[held_out]).sum().item() / len(held_out)
    assert accuracy == saved["metrics"]["val/accuracy"]
    active = sum(int(mask.sum()) for mask in saved["masks"].values())
    share = active / sum(mask.numel() for mask in saved["masks"].values())
    assert share == pytest.approx(saved["metrics"]["density/sparse"])
    for name, mask in saved["masks"].items():
        assert not model.state_dict()[name][~mask].any()
    return saved


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trained trial of each kind of method; its folder is the storage's parent."""
    folder = tmp_path_factory.mktemp("toy")
    words = ["set", "dst", "gmp", "dense", "density=0.3", "name=toy", "trials=1", *TOY]
    run(folder, "sweep", *words)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("member", ["set@0.3", "dst@0.3", "gmp@0.3", "dense"])
def test_the_help_reads_what_is_exported(
    member: str, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "best.pt"
    if member == "dst@0.3":  # which is not as sparse as that in two epochs, so it has no best
        done = run(toy, "export", f"toy/{member}", str(file), "--trial", "0")
        assert f"trial 0 of toy/{member}" in done.stdout
    else:
        export.export(toy / "sweeps", f"toy/{member}", "best", file)
    saved = check_computes_what_is_recorded(file, monkeypatch)
    trial = journal.load(toy / "sweeps/toy" / member).trials[0]
    assert saved["metrics"] == trial.reports[-1].metrics
    assert (saved["member"], saved["trial"]) == (f"toy/{member}", 0)
    assert saved["config"]["method"] == member.partition("@")[0]
    assert saved["versions"] == versions()
    assert saved["metrics"]["density/all"] < 1 or member == "dense"


@pytest.mark.slow
def test_the_frame_of_a_real_sweep(toy: Path) -> None:
    frame = sparsetune.load("toy", toy / "sweeps")
    for member in ("set@0.3", "dst@0.3", "gmp@0.3", "dense"):
        check_equal(frame, toy / "sweeps/toy" / member)
    best = frame[frame["epoch"] == 2].groupby(["method", "density"])["val/accuracy"].max()
    assert list(best.index) == [("dense", 1.0), ("dst", 0.3), ("gmp", 0.3), ("set", 0.3)]


@pytest.mark.slow
def test_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSETUNE_CACHE", str(tmp_path / "cache"))
    where = [f"data.path={real('mnist').path}", "data.name=mnist", "data.limit=5000"]
    words = ["model.name=lenet300100", "density=0.05", "epochs=2", "wandb.mode=disabled"]
    run(tmp_path, "train", "set", "name=m", *where, *words)
    export.export(tmp_path / "sweeps", "m", "best", tmp_path / "best.pt")
    check_computes_what_is_recorded(tmp_path / "best.pt", monkeypatch)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    told(tmp_path, ["set", "dense"], "density=0.2", "trials=2", "name=a")
    file = tmp_path / "best.pt"

    def refused(name: str, which: str = "best", to: Path = file) -> str:
        with pytest.raises(ValueError) as caught:
            export.export(tmp_path, name, which, to)
        return str(caught.value)

    assert "'a' has 2 members; give one of a/set@0.2, a/dense" in refused("a")
    assert "'7' is neither best nor a trial of a/dense, which has 2" in refused("a/dense", "7")
    assert "trial 1 of a/dense, which is finished, has no checkpoint in" in refused("a/dense")
    assert "exists already" in refused("a/dense", to=tmp_path / "a")
    told(tmp_path, ["dense"], "trials=2", "name=b", tell=lambda *_: "stopped")
    assert "of b/dense none was trained to the end" in refused("b")

    def front(one: Any, trial: Any, role: str) -> dict[str, float]:
        return {"val/accuracy": 0.5 + 0.1 * trial.number, "density/all": 0.1 + 0.1 * trial.number}

    words = ["trials=2", "name=c", "objective=[val/accuracy,density/all]"]
    told(tmp_path, ["dst"], *words, tell=front)
    assert "no one is best among 0, 1, by val/accuracy and density/all; give" in refused("c")
    assert not file.exists()
    done = CliRunner().invoke(cli.main, ["export", "a"])
    assert done.exit_code == 2 and "give NAME FILE" in done.stderr


# W&B, with its own client -------------------------------------------------------------------------


def exported(tmp_path: Path) -> tuple[Any, Any, Path]:
    told(tmp_path, ["set"], "density=0.2", "trials=1", "name=a", "wandb.mode=auto")
    from sparsetune.space.member import Member

    member = Member.from_header(journal.header(tmp_path / "a/set@0.2")["member"])
    saved = {"member": member.name, "trial": 0, "metrics": {"val/accuracy": 0.5}, "versions": {}}
    file = tmp_path / "best.pt"
    with write_whole(file) as stream:
        torch.save(saved, stream)
    return member, saved | {"config": {"method": "set"}}, file


def test_an_artifact_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    one = exported(tmp_path)
    said = export.to_wandb(*one, None)
    assert said.startswith("recorded offline; upload it by: ") and " sync " in said
    [file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert str(file.parent) in said
    found = records(file)
    [begun] = [record["run"] for record in found if record["type"] == "run"]
    assert (begun["job_type"], begun["run_group"]) == ("export", "a")
    [artifact] = [record["artifact"] for record in found if record["type"] == "artifact"]
    assert (artifact["name"], artifact["type"]) == ("a-set-0.2", "model")
    assert [entry["path"] for entry in artifact["manifest"]["contents"]] == ["best.pt"]
    with pytest.raises(ValueError, match=r"disabled for this sweep; give wandb\.mode="):
        export.to_wandb(*one, "disabled")


def test_a_server_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="the artifact was not taken"):
        export.to_wandb(*exported(tmp_path), None)


def test_an_artifact_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert export.to_wandb(*exported(tmp_path), None) == "in W&B as e/p/a-set-0.2:v0"
        [artifact] = server.artifacts
        assert (artifact["artifactTypeName"], artifact["files"]) == ("model", ["best.pt"])
        assert '"val/accuracy":0.5' in artifact["metadata"].replace(" ", "")
        [run] = server.runs.values()
        assert (run.job_type, run.group) == ("export", "a")
        wandb.teardown()
