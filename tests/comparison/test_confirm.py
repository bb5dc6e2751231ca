"""Confirmation: which runs there are, that they are trained as said, and survive a kill."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import TOY, reports, run, start
from helpers.told_sweep import EPOCHS, accuracy, confirmed, told
from helpers.wandb_files import Run, read_runs

from sparsetune.comparison import confirm, winners
from sparsetune.space.member import Member
from sparsetune.store import journal
from sparsetune.store.journal import Trial
from sparsetune.store.lines import encode, exists
from sparsetune.sweeps.create import Extension
from sparsetune.training import checkpoint, data, trainer
from sparsetune.training.setup import prepare

SETTLED = ["density=0.2", "trials=5", "name=a"]


def runs(path: Path, member: str = "static@0.2", folder: str = "confirm") -> list[tuple[Any, ...]]:
    """(what for, trial, seed, share held out, whether tested) of each run."""
    record = journal.load(path / member / folder)
    return [
        (*winners.role(t), t.fixed["seed"], t.fixed.get("data.validation"), t.test is not None)
        for t in record.trials.values()
    ]


def test_which_runs_there_are(tmp_path: Path) -> None:
    # accuracy() says that later trials are better: 4, 3 are the best two of five.
    path = confirmed(told(tmp_path, ["static"], *SETTLED), "seeds=2", "top=2")
    ranks = [("rank", n, seed, None, False) for seed in (1001, 1002) for n in (4, 3)]
    finals = [(name, n, seed, 0.0, True) for seed in (1001, 1002)
              for name, n in (("final", 3), ("paper", 0))]  # fmt: skip
    # By rank accuracies, which are equal, the lower number wins.
    assert runs(path) == ranks + finals


def test_seeds_that_are_added_are_the_winners(tmp_path: Path) -> None:
    path = confirmed(told(tmp_path, ["static"], *SETTLED), "seeds=2", "top=2")
    before = runs(path)
    confirmed(path, "seeds=3")
    assert runs(path) == [*before, ("final", 3, 1003, 0.0, True), ("paper", 0, 1003, 0.0, True)]
    confirmed(path)
    assert len(runs(path)) == len(before) + 2


def test_without_full_the_ranked_runs_serve(tmp_path: Path) -> None:
    path = confirmed(told(tmp_path, ["static"], *SETTLED), "seeds=2", "top=2", "full=false")
    ranks = [("rank", n, seed, None, n == 3) for seed in (1001, 1002) for n in (4, 3)]
    assert runs(path) == [*ranks, *(("paper", 0, seed, None, True) for seed in (1001, 1002))]
    confirmed(path, "seeds=3")
    assert runs(path)[-2:] == [("rank", 3, 1003, None, True), ("paper", 0, 1003, None, True)]


def test_one_candidate_needs_no_ranking(tmp_path: Path) -> None:
    path = confirmed(told(tmp_path, ["static"], *SETTLED), "seeds=2", "top=1")
    assert {name for name, *_ in runs(path)} == {"final", "paper"}


def test_the_winner_is_the_best_over_fresh_seeds(tmp_path: Path) -> None:
    def tell(one: Member, trial: Trial, role: str) -> Any:
        found = accuracy(one, trial, role)
        assert isinstance(found, dict)
        if role == "rank":
            number, seed = winners.role(trial)[1], trial.fixed["seed"]
            if number == 4 and seed == 1002:
                return "diverged"  # however good it was on the other seed
            found["val/accuracy"] = {4: 0.99, 3: 0.7, 2: 0.8}[number]
        return found

    path = confirmed(told(tmp_path, ["static"], *SETTLED), "seeds=2", "top=3", tell=tell)
    assert {n for name, n, *_ in runs(path) if name == "final"} == {2}


def test_seeds_that_were_asked_for_and_not_begun(tmp_path: Path) -> None:
    """Interrupted when the journal knew how many runs there shall be, and none was begun."""
    path = confirmed(told(tmp_path, ["static"], *SETTLED), "seeds=2", "top=2")
    before = runs(path)
    with begun(path, "seeds=4") as (one,):
        assert confirm._extend(one)
        assert confirm.command([one]) == f"sparsetune confirm a storage={tmp_path} seeds=4"
    assert journal.load(path / "static@0.2/confirm").header["confirm"]["num_seeds"] == 4
    confirmed(path)
    added = [(name, n, seed, 0.0, True) for seed in (1003, 1004)
             for name, n in (("final", 3), ("paper", 0))]  # fmt: skip
    assert runs(path) == before + added
    assert {t.origin for t in journal.load(path / "static@0.2/confirm").trials.values()} == {
        "start:rank 4", "start:rank 3", "start:final 3", "start:paper 0"
    }  # fmt: skip


def test_seeds_that_were_asked_for_of_version_0_1_0(tmp_path: Path) -> None:
    """Its journals say how many runs there shall be, and not by how many seeds."""
    path = confirmed(told(tmp_path, ["static"], *SETTLED), "seeds=2", "top=2")
    before, file = runs(path), path / "static@0.2/confirm/journal.jsonl"
    events = journal.read(file.parent)
    events[0]["confirm"].pop("num_seeds")
    events.append({"seq": len(events), "time": 0.0, "type": "extend", "trials": len(before) + 4})
    file.write_bytes(b"".join(map(encode, events)))
    confirmed(path)
    assert [run[2] for run in runs(path)[len(before) :]] == [1003, 1003, 1004, 1004]


def test_rankings_are_not_tried_again_once_the_test_images_were_read(tmp_path: Path) -> None:
    """Without full, the runs that ranked a setting may win by a second try, and be tested, too."""

    def tell(one: Member, trial: Trial, role: str) -> Any:
        lost = trial.origin in ("start:rank 4", "start:rank 3") and trial.fixed["seed"] == 1002
        return "failed" if lost else accuracy(one, trial, role)

    path = told(tmp_path, ["static"], *SETTLED)
    confirmed(path, "seeds=2", "top=2", "full=false", tell=tell)
    failed = [t for t in journal.load(path / "static@0.2/confirm").trials.values()
              if t.status == "failed"]  # fmt: skip
    assert sorted(winners.role(t) for t in failed) == [("rank", 3), ("rank", 4)]
    with begun(path, retry=True) as (one,):  # 3, the winner, alone
        assert one.runs.journal.record.trials[failed[0].number].status == "failed"
        assert one.runs.journal.record.trials[failed[1].number].status == "running"


def begun(path: Path, *words: str, retry: bool = False) -> Any:
    wanted = Extension(retry_failed=retry)
    return confirm.begun(path.parent, path.name, confirm.parse(words), wanted)


def test_a_refused_confirmation_has_written_nothing(tmp_path: Path) -> None:
    two = told(tmp_path, ["static", "set"], "density=0.2", "trials=5", "name=two")
    confirmed(two, "seeds=2", "top=2", name="two/set@0.2")
    with pytest.raises(ValueError, match="with top=2; leave it out"), begun(two, "top=3"):
        pass
    with pytest.raises(ValueError, match="it is for a search for a front"):
        begun(two, "density=0.5").__enter__()
    clash = told(tmp_path, ["static"], "density=0.2", "trials=5", "name=clash", "seed=1008")
    confirmed(clash, "seeds=2", "top=1")
    with pytest.raises(ValueError, match=r"1008, by which clash/static@0.2 was .* most seeds=7"):
        begun(clash, "seeds=8").__enter__()
    assert not (two / "static@0.2/confirm").exists()
    assert len(runs(clash)) == 4
    for value in ("nan", "0", "-1", "2"):
        with pytest.raises(ValueError, match="out of range; allowed: each above 0, up to 1"):
            confirm.parse([f"density={value}"])


def test_an_infeasible_member_can_be_searched_further(tmp_path: Path) -> None:
    def tell(one: Member, trial: Trial, role: str) -> Any:
        found = accuracy(one, trial, role)
        assert isinstance(found, dict)
        return found | {"density/all": 0.5}

    path = told(tmp_path, ["dst"], *SETTLED, tell=tell)
    with pytest.raises(ValueError, match="there is no trial of a that could be confirmed"):
        begun(path).__enter__()
    assert not (path / "dst@0.2/confirm").exists()


@pytest.mark.parametrize("name", ["s", "parse", "confirm"])
def test_the_command_to_go_on_has_any_name(tmp_path: Path, name: str) -> None:
    path = told(tmp_path, ["static", "set"], "density=0.2", "trials=4", f"name={name}")
    wanted = Extension()
    with confirm.begun(tmp_path, f"{name}/set@0.2", confirm.parse(["seeds=2"]), wanted) as all_:
        said = f"sparsetune confirm {name}/set@0.2 storage={tmp_path}"
        assert confirm.command(all_) == said
    assert exists(path / "set@0.2/confirm")


def test_twice_the_epochs_are_a_confirmation_of_their_own(tmp_path: Path) -> None:
    path = told(tmp_path, ["static"], *SETTLED)
    confirmed(path, "seeds=2", "top=1", "multiplier=2")
    record = journal.load(path / "static@0.2/confirm-2x")
    assert {len(t.reports) for t in record.trials.values()} == {2 * EPOCHS}
    assert not (path / "static@0.2/confirm").exists()


def test_what_cannot_be_confirmed(tmp_path: Path) -> None:
    storage = f"storage={tmp_path}"
    path = confirmed(told(tmp_path, ["static"], *SETTLED), "seeds=2", "top=2")
    refusals = [
        (["a", "top=3"], "top: a/static@0.2 is being confirmed with top=2; leave it out"),
        (["a", "full=false"], "full: a/static@0.2 is being confirmed with full=True"),
        (["a", "seeds=1"], "seeds: 1 is out of range; allowed: 2 or more"),
        (["a", "full=perhaps"], "full: 'perhaps' is neither true nor false"),
        (["a", "trials=7"], "trials: not a key of this command"),
        (["b"], "there is no sweep 'b'"),
        ([], "give the name of a sweep"),
        (["a/static@0.2/confirm"], "is neither a sweep nor a member"),
    ]
    for words, says in refusals:
        done = run(tmp_path, "confirm", *words, storage, check=2)
        assert says in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    with_more = journal.Journal.open(path / "static@0.2")
    with_more.append({"type": "extend", "trials": 6})
    with_more.close()
    done = run(tmp_path, "confirm", "a", storage, check=2)
    assert (
        "a/static@0.2 has 5 of 6 trials; finish the search by: sparsetune resume a" in done.stderr
    )


@pytest.mark.slow
def test_a_killed_confirmation_goes_on(tmp_path: Path) -> None:
    """Real runs: killed twice, each run is there once, and its figures are its checkpoint's."""
    run(tmp_path, "sweep", "set", "dense", "density=0.3", "name=toy", "trials=4", *TOY)
    before = reports(tmp_path)
    words = ["confirm", "toy", "seeds=2", "top=2"]
    for kills in (1, 2):
        process = start(tmp_path, *words)
        while reports(tmp_path) < before + 8 * kills and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = run(tmp_path, *words)
    assert "Compare by: sparsetune compare toy" in done.stdout
    folder = tmp_path / "sweeps/toy/set@0.3/confirm"
    record = journal.load(folder)
    roles = [winners.role(t) for t in record.trials.values()]
    assert [name for name, _ in roles] == ["rank"] * 4 + ["final", "paper"] * 2
    header = record.header["member"]
    member = Member.from_header(header)
    for trial in record.trials.values():
        assert trial.status == "finished"
        settings = member.trial_settings(trial.params, trial.fixed)
        setup = prepare(settings, torch.device("cpu"))
        state, records = checkpoint.restore(setup, folder / f"trials/{trial.number:05d}")
        assert [record["epoch"] for record in records] == [r.epoch for r in trial.reports]
        name, _ = winners.role(trial)
        assert len(setup.train_index) == (200 if name != "rank" else 180)
        if name == "rank":
            assert trial.test is None
            continue
        loss, share = trainer.evaluate(setup, state, data.load_test(settings.data))
        assert trial.test == {"test/accuracy": share, "test/loss": loss}
    text = run(tmp_path, "compare", "toy", "--json").stdout
    assert '"state": "confirmed"' in text
    groups: dict[tuple[str, str], list[Run]] = {}
    for one in read_runs(tmp_path / "sweeps/toy"):
        if one.job_type in ("confirm", "rank"):
            groups.setdefault((one.group, one.job_type), []).append(one)
    assert {key: len(found) for key, found in groups.items()} == {
        ("toy/set@0.3", "rank"): 4,
        ("toy/set@0.3", "confirm"): 2,
        ("toy/set@0.3 paper", "confirm"): 2,
        ("toy/dense", "rank"): 4,
        ("toy/dense", "confirm"): 2,
        ("toy/dense paper", "confirm"): 2,
    }
    names = sorted(one.name.rpartition("-")[2] for one in groups["toy/set@0.3", "confirm"])
    assert names == ["s1001", "s1002"]
    for one in groups["toy/set@0.3", "confirm"]:
        assert one.steps == [1, 2, 3]
        assert one.summary["test/accuracy"] in [
            t.test["test/accuracy"] for t in record.trials.values() if t.test
        ]
