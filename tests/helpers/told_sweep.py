"""Sweeps whose trials are told instead of trained, with the journals that training would write."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from sparsetune.comparison import confirm, winners
from sparsetune.search.study import MemberStudy
from sparsetune.space.member import Member
from sparsetune.space.resolve import resolve
from sparsetune.store.journal import Journal, Trial
from sparsetune.sweeps.create import Extension, created

EPOCHS = 2
WORDS = ["model.name=mlp", "model.widths=[32,16]", f"epochs={EPOCHS}", "wandb.mode=disabled"]
WORDS += ["sampler.name=random"]
# (member, trial, what it is for: search, rank, final, paper) -> what differs in its last metrics,
# or how it ends: diverged, failed, stopped
Tell = Callable[[Member, Trial, str], dict[str, float] | str]


def accuracy(one: Member, trial: Trial, role: str) -> dict[str, float] | str:
    """Higher at greater density and for later trials; a little else for every seed."""
    seed = trial.fixed.get("seed", 0)
    value = 0.8 + 0.1 * (one.density or 1.0) + 0.001 * (seed % 7)
    value += {"set": 0.02, "static": 0.0}.get(one.space.name, 0.01)
    value += 0.0001 * trial.number if role == "search" else 0.0
    return {"val/accuracy": value, "test/accuracy": value - 0.01}


def told(folder: Path, spaces: Iterable[str], *words: str, tell: Tell = accuracy) -> Path:
    """The folder of a sweep that has ended."""
    spaces, words = list(spaces), (*WORDS, f"storage={folder}", *words)
    resolved = resolve(spaces, [*words], "sweep")
    with created(resolved, "sweep", [*spaces, *words]) as members:
        for one in members:
            search = MemberStudy(one.member, one.journal, 0)
            for _ in range(one.journal.record.asked):
                _train(one.journal, search, search.suggest(), "search", one.member, tell)
    return resolved.storage / resolved.name


def confirmed(path: Path, *words: str, tell: Tell = accuracy, name: str = "") -> Path:
    """The same sweep, confirmed (or one member)."""
    asked = confirm.parse(words)
    with confirm.begun(path.parent, name or path.name, asked, Extension()) as all_:
        for one in all_:
            while one.header["candidates"] and confirm._extend(one):
                runs = confirm._wanted(one)
                search = MemberStudy(one.runs.member, one.runs.journal, 0, runs)
                while len(one.runs.journal.record.trials) < one.runs.journal.record.asked:
                    trial, writer = search.suggest(), one.runs.journal
                    role = winners.role(trial)[0]
                    _train(writer, search, trial, role, one.search.member, tell)
            for trial in confirm._tested(one):
                found = tell(one.search.member, trial, winners.role(trial)[0])
                if trial.test is None and isinstance(found, dict):
                    metrics = {"test/accuracy": found["test/accuracy"], "test/loss": 0.1}
                    event = {"type": "test", "number": trial.number, "metrics": metrics}
                    one.runs.journal.append(event)
    return path


def _train(
    writer: Journal, search: MemberStudy, trial: Trial, role: str, one: Member, tell: Tell
) -> None:
    found = tell(one, trial, role)
    epochs = search.config(trial)["epochs"]
    for epoch in range(1, epochs + 1):
        metrics = layers(one) | {"epoch": float(epoch), "train/loss": 1 / epoch, "diverged": 0.0}
        metrics |= {"device_seconds": 0.5, "flops/total": 1e6 * epoch, "flops/train": 1e3}
        if isinstance(found, dict):
            metrics |= {k: v for k, v in found.items() if not k.startswith("test/")}
        if trial.fixed.get("data.validation") == 0:
            metrics.pop("val/accuracy", None)
        else:
            metrics.setdefault("val/accuracy", 0.1)
        if found == "diverged" and epoch == epochs:
            metrics |= {"train/loss": float("nan"), "diverged": 1.0}
        search.report(trial.number, epoch, metrics, "STOP" if found == "stopped" else "CONTINUE")
        if found == "stopped":
            break
    search.end(trial.number, found if isinstance(found, str) else "finished")


def layers(one: Member) -> dict[str, float]:
    """Densities of the three layers of the network: all the same, as asked for."""
    dense = one.method.name == "dense" or one.density is None
    density = 1.0 if dense else float(one.density or 1.0)
    metrics = {f"density/layer/{name}.weight": density for name in ("fc1", "fc2", "fc3")}
    return metrics | {"density/all": density, "density/sparse": density}
