"""Comparisons: what is compared, and when there is no ranking. Trials are told, not trained."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.told_sweep import accuracy, confirmed, told

from sparsetune import load
from sparsetune.comparison import intervals, winners
from sparsetune.comparison.compare import compare
from sparsetune.comparison.values import Cell, Comparison, Level
from sparsetune.reports import search_figures, tables
from sparsetune.reports.runs_csv import save_csv, write_csv
from sparsetune.search.study import MemberStudy
from sparsetune.space.member import Member
from sparsetune.store import journal
from sparsetune.store.journal import Journal, Trial
from sparsetune.sweeps.create import opened

SETTLED = ["density=0.2", "trials=4"]


def broken(comparison: Comparison) -> set[int]:
    """Rules that forbid a ranking and are broken."""
    return {rule.number for rule in comparison.rules if rule.forbids and rule.state == "broken"}


def cell(comparison: Comparison, space: str) -> Cell:
    return next(each for each in comparison.cells if each.space == space)


@pytest.fixture(scope="module")
def fair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with the sweep `fair`, two densities, confirmed over six seeds."""
    folder = tmp_path_factory.mktemp("fair")
    spaces = ["set", "static", "sm", "dense", "small_dense", "gmp"]
    words = ["density=0.2,0.5", "trials=4", "name=fair"]
    confirmed(told(folder, spaces, *words), "seeds=6", "top=2")
    return folder


def test_a_fair_comparison_ranks(fair: Path) -> None:
    found = compare("fair", storage=fair)
    assert broken(found) == set()
    assert [rule.number for rule in found.rules] == list(range(1, 17))
    assert found.rules[14].state == "does not apply"  # no emergent density
    assert found.ranking is not None
    # told_sweep.accuracy: SET has 0.02 more than static, the others 0.01
    assert list(found.ranking) == [Level(0.2), Level(0.5)]
    assert found.ranking[Level(0.2)][0] == "set"
    assert found.ranking[Level(0.2)][-1] == "static"
    assert found.seeds == list(range(1001, 1007))
    assert len(found.levels[Level(0.2)]) == 5  # dense has no density and stands apart
    one = cell(found, "set")
    assert one.chosen is not None
    # 0.8 + 0.1 * 0.2 + 0.02 - 0.01 of the test set, and 0.001 * (seed % 7): 1001 is 7 * 143
    assert one.chosen.test == pytest.approx([0.83, 0.831, 0.832, 0.833, 0.834, 0.835])
    assert one.mean == pytest.approx(intervals.mean([v for v in one.chosen.test if v]))
    assert one.mean is not None
    assert one.mean.value == pytest.approx(0.8325)
    # 64 * 32 + 32 * 16 + 16 * 10 = 2720 weights, a fifth of them, 2 FLOPs each
    assert one.chosen.parameters == pytest.approx(544)
    assert one.chosen.flops_inference == pytest.approx(1088)
    assert one.tuning.epochs == 4 * 2
    assert one.tuning.device_seconds == pytest.approx(4 * 2 * 0.5)
    assert len(one.tuning.best_of) == 4
    assert set(one.chosen.curves) >= {"train/loss", "val/accuracy", "density/layer/fc1.weight"}
    assert len(one.chosen.curves["val/accuracy"]) == 6


def test_pairs_are_told_apart_by_seed(fair: Path) -> None:
    found = compare("fair", storage=fair)
    (pair,) = [p for p in found.pairs if (p.a, p.b, p.density) == ("set", "static", 0.2)]
    # Every seed moves both alike, so the difference is 0.02 in each of them.
    assert pair.difference == pytest.approx((0.02, 0.02, 0.02))
    assert pair.improvement.value == 1.0
    assert pair.p == pytest.approx(0.0, abs=1e-9)
    assert pair.different is True
    assert len([p for p in found.pairs if p.density == 0.2]) == 5 * 4 / 2


def test_a_small_dense_network_counts_as_a_share_of_the_whole(fair: Path) -> None:
    one = cell(compare("fair", storage=fair), "small_dense")
    assert one.chosen is not None
    assert one.chosen.density_sparse == 1.0
    assert one.chosen.density == pytest.approx(0.2, rel=0.1)
    assert one.chosen.parameters == pytest.approx(2720 * one.chosen.density)


def test_levels_by_flops(fair: Path) -> None:
    found = compare("fair", match="flops", storage=fair)
    assert broken(found) == set()
    # Every layer has the same density here, so equal density is equal FLOPs.
    assert {name.partition("@")[0] for name in found.levels[Level(0.2)]} >= {
        "fair/set",
        "fair/static",
    }


def test_json_and_csv_have_every_run(fair: Path, tmp_path: Path) -> None:
    found = compare("fair", storage=fair)
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert list(told["levels"]) == list(told["ranking"]) == ["0.2", "0.5"]
    with (tmp_path / "runs.csv").open("w", newline="") as file:
        write_csv(found, file)
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    chosen = [row for row in rows if row["setting"] == "chosen"]
    assert len(chosen) == 11 * 6
    mine = [row for row in chosen if row["cell"] == "fair/set@0.2"]
    assert [float(row["test accuracy"]) for row in mine] == cell(found, "set").chosen.test  # type: ignore[union-attr]
    assert {row["tuning epochs"] for row in mine} == {"8"}


def test_no_other_file_is_overwritten(fair: Path, tmp_path: Path) -> None:
    found, file = compare("fair", storage=fair), tmp_path / "runs.csv"
    save_csv(found, file)
    before = file.read_bytes()
    save_csv(found, file)
    assert file.read_bytes() == before
    with pytest.raises(ValueError, match="is no table of sparsetune"):
        save_csv(found, fair / "fair/dense/journal.jsonl")
    assert journal.load(fair / "fair/dense").asked == 4


def test_members_alone_are_compared_too(fair: Path) -> None:
    found = compare("fair/set@0.2", "fair/static@0.2", storage=fair)
    assert [each.name for each in found.cells] == ["fair/set@0.2", "fair/static@0.2"]
    assert found.ranking == {Level(0.2): ["set", "static"]}
    with pytest.raises(ValueError, match="names a member twice"):
        compare("fair", "fair/set@0.2", storage=fair)
    with pytest.raises(ValueError, match="there is no sweep 'other'"):
        compare("other", storage=fair)


# Each rule that forbids a ranking, broken alone ---------------------------------------------------


def two(
    folder: Path, own: list[str], seeds: tuple[str, str] = ("seeds=3", "seeds=3"), **tell: Any
) -> Comparison:
    """SET in sweep `a`, static in sweep `b` whose words differ, both confirmed."""
    for name, space, more, num in (("a", "set", [], seeds[0]), ("b", "static", own, seeds[1])):
        words = [*SETTLED, f"name={name}", *more]
        confirmed(told(folder, [space], *words, **tell), num, "top=1", **tell)
    return compare("a", "b", storage=folder)


@pytest.mark.parametrize(
    ("number", "own", "says", "mends"),
    [
        (1, ["trials=5"], "4 in a/set@0.2, 5 in b/static@0.2", "sparsetune resume a storage="),
        (1, ["sampler.name=tpe"], "sampler: ", "in one sweep: sparsetune sweep set static"),
        (1, ["search.lr.high=0.4"], "ranges of what is searched", "base.yaml"),
        (1, ["scheduler.name=none"], 'scheduler: ["asha"', "in one sweep"),
        (8, ["distribution=erk"], '"uniform" in a/set@0.2, "erk" in b', "distribution=uniform"),
        (9, ["dense_layers=[fc3.weight]", "density=0.3"], "layers left dense", "in one sweep"),
        (9, ["data.augment=shift"], "preparation of the data", "in one sweep"),
        (9, ["model.widths=[16,32]"], "network: ", "in one sweep"),
        (9, ["data.limit=1000"], "data: ", "one data set"),
        (10, ["density_over=sparse"], '"all" in a/set@0.2, "sparse" in b', "density_over=all"),
    ],
)
def test_a_setting_that_forbids_a_ranking(
    tmp_path: Path, number: int, own: list[str], says: str, mends: str
) -> None:
    found = two(tmp_path, own)
    assert broken(found) == {number}
    assert found.ranking is None
    rule = found.rules[number - 1]
    assert says in rule.figure
    assert mends in rule.mend


def test_learning_rates_that_were_given(tmp_path: Path) -> None:
    """Not searched by anybody, and not the same."""
    for name, space, rate in (("a", "set", 0.1), ("b", "static", 0.01)):
        words = [*SETTLED, f"name={name}", f"optimizer.lr={rate}", "optimizer.weight_decay=1e-4"]
        confirmed(told(tmp_path, [space], *words), "seeds=3", "top=1")
    found = compare("a", "b", storage=tmp_path)
    assert broken(found) == {1}
    assert '"optimizer.lr": 0.1' in found.rules[0].figure


def test_winners_that_differ_in_what_all_have_searched(tmp_path: Path) -> None:
    """Rule 8 is about the winners' distributions, not what their members would have."""

    def tell(one: Member, trial: Trial, role: str) -> Any:
        found = accuracy(one, trial, role)
        assert isinstance(found, dict)
        erk = trial.params.get("distribution") == "erk"
        best = 0.1 if erk == (one.space.name == "set") else 0.0
        return found | {"val/accuracy": 0.8 + best + 0.001 * trial.number}

    words = ["density=0.2", "trials=12", "search.distribution.choices=[uniform,erk]", "name=a"]
    confirmed(told(tmp_path, ["set", "static"], *words, tell=tell), "top=1", tell=tell)
    found = compare("a", storage=tmp_path)
    assert broken(found) == {8}
    assert '"erk" in a/set@0.2, "uniform" in a/static@0.2' in found.rules[7].figure


def test_members_that_were_confirmed_in_different_ways(tmp_path: Path) -> None:
    confirmed(told(tmp_path, ["set"], *SETTLED, "name=a"), "seeds=3", "top=1")
    confirmed(told(tmp_path, ["static"], *SETTLED, "name=b"), "seeds=3", "top=1", "full=false")
    found = compare("a", "b", storage=tmp_path)
    assert broken(found) == {3}
    assert "way of confirming" in found.rules[2].figure


def test_longer_training_stands_at_a_level_of_its_own(tmp_path: Path) -> None:
    path = told(tmp_path, ["set", "static"], *SETTLED, "name=a")
    confirmed(path, "seeds=3")
    confirmed(path, "seeds=3", "multiplier=2", name="a/set@0.2")
    found = compare("a", storage=tmp_path)
    assert found.levels == {
        Level(0.2): ["a/set@0.2", "a/static@0.2"],
        Level(0.2, 2): ["a/set@0.2 2x"],
    }
    assert found.ranking == {Level(0.2): ["set", "static"], Level(0.2, 2): ["set 2x"]}
    assert [(pair.a, pair.b) for pair in found.pairs] == [("set", "static")]
    titles = [each.title for each in tables.sections(found)]
    assert titles[:2] == ["80 % sparse (density 0.2)", "80 % sparse (density 0.2, 2x epochs)"]
    # Folders that were moved aside within the member are no confirmations.
    for name in ("confirm-1", "confirm-2", "confirm.old", "confirm-1x", "confirm-x"):
        shutil.copytree(path / "set@0.2/confirm", path / "set@0.2" / name)
    assert compare("a", storage=tmp_path).levels == found.levels
    assert set(load("a", storage=tmp_path)["kind"]) == {"search", "confirm", "confirm-2x"}


def told_twice(path: Path) -> None:
    """Another setting than the winner was tried on the test set."""
    with_runs = Journal.open(path / "static@0.2/confirm")
    trial = next(iter(with_runs.record.trials.values()))
    number = len(with_runs.record.trials)
    with_runs.append({"type": "extend", "trials": number + 1})
    event = {"type": "suggest", "number": number, "params": {}, "distributions": {}}
    event |= {"origin": "start:final 2", "fixed": trial.fixed, "in_study": False}
    with_runs.append(event)
    metrics = trial.reports[-1].metrics | {"epoch": 1.0}
    report = {"type": "report", "number": number, "epoch": 1, "metrics": metrics}
    with_runs.append(report | {"decision": "CONTINUE"})
    with_runs.append({"type": "end", "number": number, "status": "finished"})
    with_runs.append({"type": "test", "number": number, "metrics": {"test/accuracy": 0.9}})
    with_runs.close()


def test_a_test_set_that_was_read_for_two_settings(tmp_path: Path) -> None:
    two(tmp_path, [])
    told_twice(tmp_path / "b")
    found = compare("a", "b", storage=tmp_path)
    assert broken(found) == {2}
    assert "the test set was read for 2 settings" in found.rules[1].figure


def test_a_search_that_was_not_by_validation(tmp_path: Path) -> None:
    confirmed(told(tmp_path, ["set"], *SETTLED, "name=a"), "seeds=3")
    path = told(tmp_path, ["static"], *SETTLED, "name=b", "objective=train/loss")
    found = compare("a", "b", storage=tmp_path)
    assert broken(found) == {2}
    assert "b/static@0.2 was searched by train/loss" in found.rules[1].figure
    with pytest.raises(ValueError, match="objective=val/accuracy"):
        confirmed(path)


def test_what_is_not_confirmed(tmp_path: Path) -> None:
    confirmed(told(tmp_path, ["set"], *SETTLED, "name=a"), "seeds=3")
    path = told(tmp_path, ["static"], *SETTLED, "name=b")
    found = compare("a", "b", storage=tmp_path)
    assert broken(found) == {3}
    assert found.rules[2].mend == f"sparsetune confirm b storage={tmp_path}"
    assert cell(found, "static").state == "unconfirmed"
    confirmed(path, "seeds=3")
    assert broken(compare("a", "b", storage=tmp_path)) == set()
    # A search that went on makes the confirmation one of another search.
    with journal_of(path / "static@0.2") as writer:
        writer.append({"type": "extend", "trials": 5})
    found = compare("a", "b", storage=tmp_path)
    assert cell(found, "static").state == "unfinished"
    assert "4 of 5 trials of its search have ended" in cell(found, "static").note
    told_more(path)
    found = compare("a", "b", storage=tmp_path)
    assert cell(found, "static").state == "unconfirmed"
    moved = f"move {path / 'static@0.2/confirm'} out of the sweep, say so in your report, and: "
    assert found.rules[2].mend == f"{moved}sparsetune confirm b storage={tmp_path}"


def told_more(path: Path) -> None:
    """The trials that a search was extended by, in its first member."""
    with opened(path.parent, path.name) as members:
        (one,) = members
        search = MemberStudy(one.member, one.journal, 0)
        while search.wants_more:
            trial = search.suggest()
            metrics = dict(one.journal.record.trials[0].reports[-1].metrics)
            for epoch in (1, 2):
                search.report(trial.number, epoch, metrics | {"epoch": float(epoch)}, "CONTINUE")
            search.end(trial.number, "finished")


def journal_of(folder: Path) -> Any:
    from contextlib import closing

    return closing(Journal.open(folder))


def test_too_few_seeds(tmp_path: Path) -> None:
    found = two(tmp_path, [], ("seeds=3", "seeds=2"))
    assert broken(found) == {4}
    assert found.rules[3].mend == f"sparsetune confirm b storage={tmp_path} seeds=5"
    assert found.rules[12].mend == f"sparsetune confirm b storage={tmp_path} seeds=3"
    assert found.rules[12].state == "broken"  # not paired, and so without differences
    assert all(pair.difference is None for pair in found.pairs)


def differing(role: str, **values: float) -> Callable[[Member, Trial, str], Any]:
    def tell(one: Member, trial: Trial, now: str) -> Any:
        found = accuracy(one, trial, now)
        assert isinstance(found, dict)
        other = {"density/all": values["density"]} if values else {}
        return found | (other if now == role and one.space.name == "static" else {})

    return tell


def test_density_over_the_sparse_layers_is_judged_by_them(tmp_path: Path) -> None:
    words = ["density=0.2", "trials=4", "density_over=sparse", "dense_layers=[fc3.weight]"]

    def tell(one: Member, trial: Trial, role: str) -> Any:
        found = accuracy(one, trial, role)
        assert isinstance(found, dict)
        return found | {"density/all": 0.247, "density/sparse": 0.2}

    confirmed(told(tmp_path, ["set", "static"], *words, "name=a", tell=tell), "seeds=3", tell=tell)
    found = compare("a", storage=tmp_path)
    assert broken(found) == set()
    assert "over the sparse layers' weights" in found.rules[9].figure


def test_a_density_that_was_not_kept(tmp_path: Path) -> None:
    found = two(tmp_path, [], tell=differing("final", density=0.22))
    assert broken(found) == {10}
    assert "b/static@0.2 has 0.2200 of all weights, +10.0% off" in found.rules[9].figure


@pytest.mark.parametrize(("status", "number"), [("stopped", 11), ("diverged", 12), ("failed", 12)])
def test_runs_that_did_not_end_well(tmp_path: Path, status: str, number: int) -> None:
    def tell(one: Member, trial: Trial, role: str) -> Any:
        bad = role == "final" and one.space.name == "static" and trial.fixed["seed"] == 1002
        return status if bad else accuracy(one, trial, role)

    found = two(tmp_path, [], ("seeds=4", "seeds=4"), tell=tell)
    assert broken(found) == {number}
    rule = found.rules[number - 1]
    assert "b/static@0.2: 1 " in rule.figure
    line = cell(found, "static").chosen
    assert line is not None
    assert line.test[1] is None
    assert len([value for value in line.test if value is not None]) == 3
    if status == "failed":
        assert rule.mend == f"sparsetune confirm b storage={tmp_path} --retry-failed"


def test_a_wide_spread_of_epochs_forbids_a_ranking(tmp_path: Path) -> None:
    def tell(one: Member, trial: Trial, role: str) -> Any:
        # static: three of four trials are stopped after one of two epochs: 5 epochs against 8
        bad = role == "search" and one.space.name == "static" and trial.number < 3
        return "stopped" if bad else accuracy(one, trial, role)

    found = two(tmp_path, [], tell=tell)
    assert broken(found) == {1}
    assert "epochs spent 5 to 8 (spread 60%)" in found.rules[0].figure
    assert "scheduler.name=none" in found.rules[0].mend


# Emergent density ---------------------------------------------------------------------------------


def dst(densities: dict[str, float]) -> Callable[[Member, Trial, str], Any]:
    """DST's trials end at these densities, by role."""

    def tell(one: Member, trial: Trial, role: str) -> Any:
        found = accuracy(one, trial, role)
        assert isinstance(found, dict)
        if one.space.name == "dst":
            found["density/all"] = densities[role] + 0.01 * trial.number * (role == "search")
        return found

    return tell


@pytest.mark.parametrize(
    ("search", "final", "state", "note"),
    [
        (0.15, 0.19, "confirmed", ""),
        (0.185, 0.20, "confirmed", ""),  # trials 2, 3 end at .205, .215: within 5 % of the bound
        (0.25, 0.0, "infeasible", "lowest density 0.2500"),
        (0.15, 0.22, "infeasible", "10.0% above the density that was asked for"),
    ],
)
def test_infeasible_members_are_listed_and_not_ranked(
    tmp_path: Path, search: float, final: float, state: str, note: str
) -> None:
    tell = dst({"search": search, "rank": final, "final": final, "paper": final})
    path = told(tmp_path, ["set", "dst"], *SETTLED, "name=a", tell=tell)
    confirmed(path, "seeds=3", "top=1", tell=tell)
    found = compare("a", storage=tmp_path)
    one = cell(found, "dst")
    assert one.state == state
    assert note in one.note
    assert broken(found) == set()
    ranked = (found.ranking or {})[Level(0.2)]
    assert ("dst" in ranked) == (state == "confirmed")
    assert found.rules[14].state == "holds"
    assert one.dense_gradient == "always"


def test_one_search_serves_several_densities(tmp_path: Path) -> None:
    """With density as an objective and thrice the trials, DST stands at three densities."""

    def tell(one: Member, trial: Trial, role: str) -> Any:
        found = accuracy(one, trial, role)
        assert isinstance(found, dict)
        if one.space.name == "dst":
            number = trial.number
            if role in ("rank", "final"):
                number = int(trial.origin.rpartition(" ")[2])
            # from trial 2 on: .05, .10, .15, ...; the denser, the better
            found["density/all"] = 0.05 * (number - 1) if number > 1 else 0.9
            found["val/accuracy"] = 0.5 + found["density/all"] / 2
        return found

    words = ["density=0.1,0.2,0.22", "trials=4", "name=a", "scheduler.name=none"]
    confirmed(told(tmp_path, ["set"], *words), "seeds=3", "top=1")
    words = ["trials=12", "name=b", "objective=[val/accuracy,density/all]", "scheduler.name=none"]
    front = told(tmp_path, ["dst"], *words, tell=tell)
    with pytest.raises(ValueError, match="say where on it the method is to be compared"):
        confirmed(front, "seeds=3", tell=tell)
    confirmed(front, "seeds=3", "top=1", "density=0.1,0.2,0.22", tell=tell)
    runs = journal.load(front / "dst/confirm")
    # In W&B a run belongs to all densities that it serves: trial 5 has .2, and 6 has .25.
    one = Member.from_header(journal.header(front / "dst")["member"])
    roles = {winners.role(trial) for trial in runs.trials.values()}
    assert {role: winners.group_of(one, runs, role) for role in roles} == {
        ("final", 3): "b/dst@0.1",
        ("final", 5): "b/dst@0.2,0.22",
        ("paper", 0): "b/dst paper",
    }
    found = compare("a", "b", storage=tmp_path)
    assert broken(found) == set()
    assert found.levels == {
        Level(0.1): ["a/set@0.1", "b/dst@0.1"],
        Level(0.2): ["a/set@0.2", "b/dst@0.2"],
        Level(0.22): ["a/set@0.22", "b/dst@0.22"],
    }
    dst = {c.density: c.chosen for c in found.cells if c.space == "dst" and c.chosen}
    assert {density: (line.trial, line.group) for density, line in dst.items()} == {
        0.1: (3, "b/dst@0.1"),
        0.2: (5, "b/dst@0.2,0.22"),
        0.22: (5, "b/dst@0.2,0.22"),
    }
    assert {each.tuning.asked for each in found.cells} == {4}
    # Best of k at .1: trials 2 and 3 alone are within it, and the better one has .5 + .1 / 2.
    best = {c.density: c.tuning.best_of[-1] for c in found.cells if c.space == "dst"}
    assert best == pytest.approx({0.1: 0.55, 0.2: 0.6, 0.22: 0.6})


def test_spaces_of_two_sweeps_are_told_apart(tmp_path: Path) -> None:
    """Where both have a space, it is called by its sweep; where one has, by its own name."""
    confirmed(told(tmp_path, ["set", "static"], *SETTLED, "name=a"), "seeds=3", "top=1")
    confirmed(told(tmp_path, ["set", "rigl"], *SETTLED, "name=b"), "seeds=3", "top=1")
    found = compare("a", "b", storage=tmp_path)
    assert {c.name: c.space for c in found.cells} == {
        "a/set@0.2": "a/set",
        "a/static@0.2": "static",
        "b/set@0.2": "b/set",
        "b/rigl@0.2": "rigl",
    }
    assert sorted((found.ranking or {})[Level(0.2)]) == ["a/set", "b/set", "rigl", "static"]
    assert ("a/set", "b/set") in {(pair.a, pair.b) for pair in found.pairs}
    looks = [search.look for search in search_figures.load(found, tmp_path)]
    assert [look.name for look in looks] == ["a/set", "static", "b/set", "rigl"]
    assert [look.dashed for look in looks] == [False, False, True, False]


def test_start_points_that_change_what_is_shared_are_no_candidates(tmp_path: Path) -> None:
    def tell(one: Member, trial: Trial, role: str) -> Any:
        found = accuracy(one, trial, role)
        assert isinstance(found, dict)
        best = trial.origin == "start:paper" and role == "search"
        return found | ({"val/accuracy": 0.99} if best else {})

    # SET's paper point has a schedule and a distribution of its own, static's has not.
    confirmed(told(tmp_path, ["set", "static"], *SETTLED, "name=a", tell=tell), "top=1", tell=tell)
    found = compare("a", storage=tmp_path)
    chosen, paper = cell(found, "set").chosen, cell(found, "set").paper
    assert chosen is not None and paper is not None
    assert chosen.trial != 0
    assert paper.trial == 0
    static = cell(found, "static")
    assert static.chosen is static.paper or static.chosen == static.paper
    assert static.chosen is not None
    assert static.chosen.trial == 0
    assert journal.load(tmp_path / "a/static@0.2/confirm").asked == 5  # not trained twice


def test_an_infeasible_member_with_a_lost_run_forbids_nothing(tmp_path: Path) -> None:
    """It stands in no ranking anyway."""
    emerging = dst({"search": 0.15, "rank": 0.3, "final": 0.3, "paper": 0.3})

    def tell(one: Member, trial: Trial, role: str) -> Any:
        lost = one.space.name == "dst" and role == "final" and trial.fixed["seed"] == 1002
        return "diverged" if lost else emerging(one, trial, role)

    path = told(tmp_path, ["set", "dst"], *SETTLED, "name=a", tell=tell)
    confirmed(path, "seeds=3", "top=1", tell=tell)
    found = compare("a", storage=tmp_path)
    assert cell(found, "dst").state == "infeasible"
    assert broken(found) == set()


# Messy input --------------------------------------------------------------------------------------


def test_a_method_whose_trials_all_diverged(tmp_path: Path) -> None:
    def tell(one: Member, trial: Trial, role: str) -> Any:
        return "diverged" if one.space.name == "static" else accuracy(one, trial, role)

    confirmed(told(tmp_path, ["set", "static"], *SETTLED, "name=a", tell=tell), "seeds=3")
    found = compare("a", storage=tmp_path)
    assert broken(found) == set()
    assert "a/static@0.2: none of its trials was trained to the end (4 diverged)" in found.notes
    assert found.ranking == {Level(0.2): ["set"]}
    assert found.rules[11].figure.startswith("in the searches 0 stopped, 4 diverged, 0 failed")


def test_a_density_that_one_method_lacks(tmp_path: Path) -> None:
    words = ["trials=4", "name=a", "density=0.2,0.5"]
    confirmed(told(tmp_path, ["set"], *words), "seeds=3")
    confirmed(told(tmp_path, ["static"], *SETTLED, "name=b"), "seeds=3")
    found = compare("a", "b", storage=tmp_path)
    assert "static was not searched at density 0.5" in found.notes
    assert found.ranking == {Level(0.2): ["set", "static"], Level(0.5): ["set"]}


def test_other_versions_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    confirmed(told(tmp_path, ["set"], *SETTLED, "name=a"), "seeds=3")
    monkeypatch.setattr("sparsetune.sweeps.create.versions", lambda: {"sparsetune": "0.0.9"})
    confirmed(told(tmp_path, ["static"], *SETTLED, "name=b"), "seeds=3")
    rule = compare("a", "b", storage=tmp_path).rules[13]
    assert rule.state == "broken"
    assert '"0.0.9"' in rule.figure
    assert rule.mend == "search all with one version"


def test_confirmations_by_different_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    confirmed(told(tmp_path, ["set"], *SETTLED, "name=a"), "seeds=3")
    path = told(tmp_path, ["static"], *SETTLED, "name=b")
    monkeypatch.setattr("sparsetune.comparison.confirm.versions", lambda: {"sparsetune": "0.0.9"})
    confirmed(path, "seeds=3")
    found = compare("a", "b", storage=tmp_path)
    assert found.rules[13].state == "broken"
    assert "versions of confirmation" in found.rules[13].figure
    assert {"sparsetune": "0.0.9"} in found.about["versions"]


def test_a_search_that_is_not_finished(tmp_path: Path) -> None:
    confirmed(told(tmp_path, ["set"], *SETTLED, "name=a"), "seeds=3")
    path = told(tmp_path, ["static"], *SETTLED, "name=b")
    with journal_of(path / "static@0.2") as writer:
        writer.append({"type": "extend", "trials": 6})
    found = compare("a", "b", storage=tmp_path)
    assert broken(found) == {1, 3}
    assert found.rules[2].mend == f"sparsetune resume b storage={tmp_path}"
    assert found.ranking is None
