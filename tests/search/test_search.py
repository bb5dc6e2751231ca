"""The search: rebuilt from its journals it goes on as if nothing had happened.

Most tests drive searcher and scheduler as Ray would, in this process, with trials that are a
formula; the last ones run Ray Tune.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import ray
from optuna.trial import TrialState
from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from sparsetune.search import sampler
from sparsetune.search.scheduler import Asha, JournalScheduler, own_metrics
from sparsetune.search.searcher import JournalSearcher, Reraise
from sparsetune.search.study import MemberStudy
from sparsetune.space import config
from sparsetune.space.member import Member
from sparsetune.space.space import Dimension, Space
from sparsetune.store.journal import Journal, load, read

EPOCHS = 4
ASHA = Asha(grace=1, reduction=2)


class Killed(BaseException):
    """The driver dies here; nothing may catch it."""


def measure(config: dict[str, Any], epoch: int) -> dict[str, Any]:
    """A trial of the toy method: the best zeta is 0.3, and a high rate diverges."""
    accuracy = 1 - abs(config["hp"]["zeta"] - 0.3) - 0.3 / epoch
    accuracy -= config["hp"].get("threshold", 0.0) / 10
    metrics = {"epoch": epoch, "val/accuracy": accuracy, "density/all": config["hp"]["zeta"]}
    if config["optimizer"]["lr"] > 0.5 and epoch > 1:
        return {**metrics, "val/accuracy": float("nan"), "diverged": True}
    return metrics


SEARCH = {
    "hp.zeta": Dimension(0.05, 0.95),
    "optimizer.lr": Dimension(1e-3, 1.0, log=True),
    "variant.prune": Dimension(choices=("signwise", "threshold")),
    "hp.threshold": Dimension(0.05, 1.0, step=0.05, when={"variant.prune": ("threshold",)}),
}
PAPER = {"hp.zeta": 0.3, "optimizer.lr": 0.1, "variant.prune": "signwise", "seed": 7}
HOT = PAPER | {"optimizer.lr": 0.9}
OUTSIDE = {"hp.zeta": 0.99, "optimizer.lr": 0.1}
START = {"paper": PAPER, "seed-text": OUTSIDE}


class Broken(Space):
    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        raise ZeroDivisionError("in the space")


@pytest.fixture(autouse=True)
def small_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "NSGAII", functools.partial(sampler.NSGAII, population_size=4))


OPENED: list[Journal] = []


@pytest.fixture(autouse=True)
def closed_journals() -> Iterator[None]:
    """The kernel closes the files of a killed driver; here many are killed in one process."""
    yield
    while OPENED:
        OPENED.pop().close()


def study_at(
    folder: Path,
    trials: int = 12,
    search: dict[str, Dimension] = SEARCH,
    start: dict[str, Any] = START,
    space: type[Space] = Space,
    group: str = "",
    **settings: Any,
) -> MemberStudy:
    """The member in `folder`, begun there or found there."""
    if (folder / "journal.jsonl").exists():
        journal = Journal.open(folder)
    else:
        journal = Journal.create(folder, {"trials": trials})
    OPENED.append(journal)
    toy = space(folder.name, "toy.yaml", "set", {"seed": 7}, search, start)
    settings = {"epochs": EPOCHS, "seed": 7, "sampler.startup": 3} | settings
    name = f"{folder.parent.name}/{folder.name}"
    member = Member(name, toy, config.build(settings), None)
    return MemberStudy(member, journal, seed=5, group=group)


def drive(
    studies: list[MemberStudy],
    concurrency: int = 1,
    asha: Asha | None = ASHA,
    after_result: Callable[[], None] = lambda: None,
) -> JournalSearcher:
    """Ray Tune, in short: asks while it gets trials, runs one epoch of each, listens."""
    searcher = JournalSearcher(studies, engines={"engine-0": concurrency})
    scheduler = JournalScheduler(searcher, EPOCHS, asha)
    running: dict[str, tuple[dict[str, Any], int]] = {}
    for attempt in itertools.count():
        config = searcher.suggest(str(attempt))
        if searcher.error is not None:
            raise searcher.error
        if isinstance(config, dict):
            record = searcher.searches[config["trial"]["member"]].record
            known = len(record.trials[config["trial"]["number"]].reports)
            running[str(attempt)] = (config, max(known, 1))  # from its last checkpoint
            continue
        if not running:
            assert config == Searcher.FINISHED
            return searcher
        for key, (config, epoch) in list(running.items()):
            trial = SimpleNamespace(config=config, trial_id=key)
            decision = scheduler.on_trial_result(None, trial, measure(config, epoch))
            if searcher.error is not None:
                raise searcher.error
            after_result()
            running[key] = (config, epoch + 1)
            if decision == TrialScheduler.STOP or epoch == EPOCHS:
                searcher.on_trial_complete(key, {})
                del running[key]
    raise AssertionError


def events(folder: Path) -> list[dict[str, Any]]:
    """What must not depend on interruptions: everything but times."""
    return [
        {key: value for key, value in json.loads(text).items() if key != "time"}
        for text in (json.dumps(event) for event in read(folder))
    ]


def same(first: Path, second: Path) -> bool:
    return repr(events(first)) == repr(events(second))  # repr, because nan is not nan


def states(searcher: JournalSearcher, name: str) -> list[TrialState]:
    return [trial.state for trial in searcher.searches[name].study.get_trials()]


EXPECTED = {
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "diverged": TrialState.FAIL,
    "failed": TrialState.FAIL,
}


def described(study: optuna.study.Study) -> list[Any]:
    """A study without its times."""
    return [
        (
            trial.number,
            trial.state,
            trial.values,
            trial.params,
            list(trial.distributions.items()),
            str(trial.intermediate_values),
            trial.constraints,
        )
        for trial in study.get_trials()
    ]


def test_a_search_ends_with_the_truth_in_journal_and_study(tmp_path: Path) -> None:
    searcher = drive([study_at(tmp_path / "toy" / "set@0.05", trials=20)])
    member = load(tmp_path / "toy" / "set@0.05")
    trials = list(member.trials.values())
    assert len(trials) == 20
    assert {trial.status for trial in trials} == {"finished", "stopped", "diverged"}
    for trial in trials:
        epochs = [report.epoch for report in trial.reports]
        assert epochs == list(range(1, len(epochs) + 1))
        decisions = [report.decision for report in trial.reports]
        assert decisions[:-1] == ["CONTINUE"] * (len(epochs) - 1)
        assert decisions[-1] == ("CONTINUE" if trial.status == "finished" else "STOP")
        assert (len(epochs) == EPOCHS) or trial.status != "finished"
        assert (trial.reports[-1].metrics.get("diverged") == 1.0) is (trial.status == "diverged")
    assert [trial.origin for trial in trials[:3]] == ["start:paper", "start:seed-text", "sampler"]
    assert trials[0].fixed == {"seed": 7}
    # Trial 1 does not fit the space: it counts, and Optuna does not know of it.
    assert not trials[1].in_study
    assert trials[1].distributions == {}
    in_study = [trial for trial in trials if trial.in_study]
    assert len(in_study) == 19
    told = searcher.searches["toy/set@0.05"].study.get_trials()
    assert [trial.state for trial in told] == [EXPECTED[trial.status] for trial in in_study]
    for ours, theirs in zip(in_study, told, strict=True):
        assert theirs.params == ours.params
        if ours.status != "diverged":
            last = ours.reports[-1].metrics["val/accuracy"]
            assert theirs.value == last
            assert list(theirs.intermediate_values) == [report.epoch for report in ours.reports]


# NSGA-II without ASHA, as with several objectives: only finished trials make generations.
@pytest.mark.parametrize(("name", "asha"), [("tpe", ASHA), ("nsga2", None)])
@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_a_killed_search_suggests_what_the_uninterrupted_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, asha: Asha | None, every: int
) -> None:
    straight, killed = tmp_path / "a" / "set", tmp_path / "b" / "set"
    drive([study_at(straight, **{"sampler.name": name})], asha=asha)

    append, count = Journal.append, 0

    def dying(journal: Journal, event: dict[str, Any], durable: bool = True) -> None:
        nonlocal count
        append(journal, event, durable)
        count += 1
        if count % every == 0:
            raise Killed

    monkeypatch.setattr(Journal, "append", dying)
    generations = 0
    while True:
        generations += 1
        try:
            searcher = drive([study_at(killed, **{"sampler.name": name})], asha=asha)
            break
        except Killed:
            continue
    assert generations > 60 / every / 2
    assert same(straight, killed)
    assert TrialState.RUNNING not in states(searcher, "b/set")


def test_a_rebuilt_study_equals_the_one_that_lived_through_it(tmp_path: Path) -> None:
    folder = tmp_path / "toy" / "set"

    changes: dict[str, Any] = {"constraint.density/all": 0.2}
    lived = JournalSearcher([study_at(folder, **changes)], engines={"engine-0": 3})
    scheduler = JournalScheduler(lived, EPOCHS, ASHA)
    configs = [lived.suggest(str(number)) for number in range(3)]
    assert lived.suggest("3") is None
    for number, epochs in ((0, 4), (2, 2)):
        for epoch in range(1, epochs + 1):
            trial = SimpleNamespace(config=configs[number], trial_id=str(number))
            scheduler.on_trial_result(None, trial, measure(configs[number], epoch))
        lived.on_trial_complete(str(number), {})
    configs.append(lived.suggest("3"))
    metrics = own_metrics(measure(configs[3], 1))
    lived.searches["toy/set"].report(3, 1, metrics, "CONTINUE")
    assert lived.error is None
    rebuilt = JournalSearcher([study_at(folder, **changes)], engines={"engine-0": 3})
    studies = [searcher.searches["toy/set"].study for searcher in (lived, rebuilt)]
    assert described(studies[0]) == described(studies[1])
    assert states(rebuilt, "toy/set") == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.RUNNING,
    ]
    assert studies[1].get_trials()[0].constraints == {"constraint": pytest.approx(0.1)}
    # Open trials come first, in number order, with the configuration they had.
    assert [rebuilt.suggest("0"), rebuilt.suggest("1")] == [configs[1], configs[3]]
    assert rebuilt.suggest("2")["trial"]["number"] == 4


def test_members_progress_together(tmp_path: Path) -> None:
    folders = [tmp_path / "toy" / name for name in ("dense", "set@0.05", "dsr@0.05")]
    searcher = drive([study_at(folder, trials=8) for folder in folders], concurrency=4)
    for folder in folders:
        member = load(folder)
        assert len(member.trials) == 8
        assert all(trial.status != "running" for trial in member.trials.values())
        assert TrialState.RUNNING not in states(searcher, f"toy/{folder.name}")
    suggestions = sorted(
        (event["time"], folder.name, event["number"])
        for folder in folders
        for event in read(folder)
        if event["type"] == "suggest"
    )
    assert [number for _, _, number in suggestions] == [n for n in range(8) for _ in folders]
    assert [name for _, name, _ in suggestions] == [folder.name for folder in folders] * 8


def test_a_search_with_several_at_a_time_survives_kills(tmp_path: Path) -> None:
    folders = [tmp_path / "toy" / name for name in ("set", "dsr")]
    count = 0

    def die() -> None:
        nonlocal count
        count += 1
        if count % 11 == 0:
            raise Killed

    while True:
        try:
            searcher = drive([study_at(f, trials=10) for f in folders], 5, after_result=die)
            break
        except Killed:
            continue
    for folder in folders:
        trials = load(folder).trials
        assert len(trials) == 10
        assert all(trial.status != "running" for trial in trials.values())
        assert TrialState.RUNNING not in states(searcher, f"toy/{folder.name}")


def test_extending_goes_on_from_the_history(tmp_path: Path) -> None:
    longer, shorter = tmp_path / "a" / "set", tmp_path / "b" / "set"
    drive([study_at(longer, trials=10)])
    drive([study_at(shorter, trials=6)])
    study = study_at(shorter)
    study.journal.append({"type": "extend", "trials": 10})
    drive([study])
    parts = [
        [event for event in events(folder) if event["type"] != "extend"][1:]
        for folder in (longer, shorter)
    ]
    for event in itertools.chain(*parts):
        del event["seq"]
    assert repr(parts[0]) == repr(parts[1])


def test_a_last_report_without_its_end_is_ended_by_the_next_driver(tmp_path: Path) -> None:
    folder = tmp_path / "toy" / "set"
    searcher = JournalSearcher([study_at(folder)], engines={"engine-0": 3})
    search = searcher.searches["toy/set"]
    for number in range(3):
        searcher.suggest(str(number))
    final = own_metrics(measure(search.config(search.record.trials[0]), EPOCHS))
    for epoch in range(1, EPOCHS + 1):
        search.report(0, epoch, {**final, "epoch": epoch}, "CONTINUE")
    search.report(1, 1, {**final, "epoch": 1}, "STOP")
    search.report(2, 1, {"epoch": 1, "val/accuracy": float("inf")}, "STOP")

    again = JournalSearcher([study_at(folder)], engines={"engine-0": 3})
    JournalScheduler(again, EPOCHS, ASHA)
    statuses = [trial.status for trial in load(folder).trials.values()]
    assert statuses == ["finished", "stopped", "diverged"]
    place = {"member": "toy/set", "number": 3, "engine": "engine-0"}
    assert place.items() <= again.suggest("0")["trial"].items()


def test_trials_go_where_most_places_are_free_and_places_are_released(tmp_path: Path) -> None:
    released = []
    searcher = JournalSearcher(
        [study_at(tmp_path / "toy" / "set")], engines={"a": 2, "b": 2},
        release=lambda *place: released.append(place),
    )  # fmt: skip
    assert [searcher.suggest(x)["trial"]["engine"] for x in "1234"] == ["a", "b", "a", "b"]
    assert searcher.suggest("5") is None
    searcher.on_trial_complete("2")
    assert searcher.suggest("5")["trial"]["engine"] == "b"
    assert released == [("b", "toy/set", 1)]


def test_a_trial_whose_engine_is_gone_moves_to_another(tmp_path: Path) -> None:
    engines = {"a": 1, "b": 1}
    folder, followed = tmp_path / "toy" / "set", []
    searcher = JournalSearcher(
        [study_at(folder, trials=2)], engines=engines, follow=lambda: followed.append(1)
    )
    scheduler = JournalScheduler(searcher, EPOCHS, None)
    trials = [SimpleNamespace(config=searcher.suggest(key), trial_id=key) for key in ("0", "1")]
    assert searcher.suggest("2") is None  # not FINISHED: one of them may have to move
    scheduler.on_trial_result(None, trials[0], measure(trials[0].config, 1))
    del engines["a"]
    assert scheduler.on_trial_result(None, trials[0], {"moved": True}) == "STOP"
    searcher.on_trial_complete("0", {"moved": True})
    assert load(folder).trials[0].status == "running"
    assert searcher.suggest("3") is None  # b has no second place
    engines["c"] = 1
    again = searcher.suggest("4")["trial"]
    assert (again["number"], again["engine"]) == (0, "c")
    assert len(followed) == 5
    for key, trial in (("4", trials[0]), ("1", trials[1])):
        for epoch in range(1, EPOCHS + 1):
            scheduler.on_trial_result(None, trial, measure(trial.config, epoch))
        searcher.on_trial_complete(key, {})
    assert searcher.suggest("5") == Searcher.FINISHED


def test_asha_is_rebuilt_and_a_contradiction_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "toy" / "set"
    searcher = JournalSearcher([study_at(folder)], engines={"engine-0": 2})
    scheduler = JournalScheduler(searcher, EPOCHS, ASHA)
    trials = [SimpleNamespace(config=searcher.suggest(key), trial_id=key) for key in ("0", "1")]
    # The bad trial comes first and nothing is known yet; had it come second, it were stopped.
    for trial in reversed(trials):
        assert scheduler.on_trial_result(None, trial, measure(trial.config, 1)) == "CONTINUE"
    again = JournalSearcher([study_at(folder)], engines={"engine-0": 2})
    JournalScheduler(again, EPOCHS, ASHA)
    assert caplog.text == ""
    # The rungs are there: a third trial as bad as the second is stopped.
    again = JournalSearcher([study_at(folder)], engines={"engine-0": 3})
    scheduler = JournalScheduler(again, EPOCHS, ASHA)
    config = [again.suggest(key) for key in ("0", "1", "2")][2]
    bad = {"epoch": 1, "val/accuracy": -0.5, "density/all": 1.0}
    third = SimpleNamespace(config=config, trial_id="2")
    assert scheduler.on_trial_result(None, third, bad) == "STOP"

    # Somebody edits the settings of ASHA: what was decided holds, and is said.
    again = JournalSearcher([study_at(folder)], engines={"engine-0": 2})
    JournalScheduler(again, EPOCHS, Asha(grace=2, reduction=2))
    assert "trial 2, epoch 1: ASHA said STOP then and says CONTINUE now" in caplog.text


def test_a_known_epoch_is_dropped_and_a_gap_ends_the_sweep(tmp_path: Path) -> None:
    folder = tmp_path / "toy" / "set"
    searcher = JournalSearcher([study_at(folder)], engines={"engine-0": 1})
    scheduler = JournalScheduler(searcher, EPOCHS, None)
    trial = SimpleNamespace(config=searcher.suggest("0"), trial_id="0")
    for epoch in (1, 1, 2, 1, 2):
        assert scheduler.on_trial_result(None, trial, measure(trial.config, epoch)) == "CONTINUE"
    assert [report.epoch for report in load(folder).trials[0].reports] == [1, 2]
    scheduler.on_trial_result(None, trial, measure(trial.config, 4))
    with pytest.raises(ValueError, match="trial 0 reports epoch 4 after 2"):
        Reraise(searcher).on_step_end(0, [])
    assert searcher.suggest("1") == Searcher.FINISHED
    assert len(load(folder).trials[0].reports) == 2


def test_exceptions_of_a_space_reach_the_caller(tmp_path: Path) -> None:
    study = study_at(tmp_path / "toy" / "set", space=Broken, start={})
    searcher = JournalSearcher([study], engines={"engine-0": 1})
    assert searcher.suggest("0") == Searcher.FINISHED
    with pytest.raises(ZeroDivisionError, match="in the space"):
        Reraise(searcher).on_step_end(0, [])


def test_failures_are_failed_not_bad_settings(tmp_path: Path) -> None:
    folder = tmp_path / "toy" / "set"
    searcher = JournalSearcher([study_at(folder)], engines={"engine-0": 2})
    scheduler = JournalScheduler(searcher, EPOCHS, ASHA)
    trials = [
        SimpleNamespace(config=searcher.suggest(key), trial_id=key, error_file=tmp_path / "error")
        for key in ("0", "1")
    ]
    # The trial counted its attempts and gives up; Ray lost the other one for good.
    scheduler.on_trial_result(None, trials[0], {"failed": "OSError: no data", "attempt": 3})
    (tmp_path / "error").write_text("Traceback\nBoom: b\n")
    scheduler.on_trial_error(None, trials[1])
    assert load(folder).trials[1].status == "running"  # Ray may try again
    searcher.on_trial_complete("0", {})
    searcher.on_trial_complete("1", error=True)
    for key in ("1 again", "and again"):
        assert load(folder).trials[1].status == "running"
        config = searcher.suggest(key)
        assert config["trial"]["number"] == 1
        scheduler.on_trial_error(None, SimpleNamespace(trial_id=key, error_file=tmp_path / "error"))
        searcher.on_trial_complete(key, error=True)
    first, second = load(folder).trials.values()
    assert (first.status, first.attempts, first.error) == ("failed", 3, "OSError: no data")
    assert (second.status, second.error) == ("failed", "Boom: b")
    assert states(searcher, "toy/set") == [TrialState.FAIL]
    assert searcher.suggest("2") is not None
    assert searcher.suggest("3") is not None  # both slots are free again
    assert searcher.suggest("4") is None


def test_draining_stops_trials_without_ending_them(tmp_path: Path) -> None:
    folder = tmp_path / "toy" / "set"
    searcher = JournalSearcher([study_at(folder)], engines={"engine-0": 1})
    scheduler = JournalScheduler(searcher, EPOCHS, None)
    trial = SimpleNamespace(config=searcher.suggest("0"), trial_id="0")
    searcher.drain()
    assert searcher.suggest("1") == Searcher.FINISHED
    assert scheduler.on_trial_result(None, trial, measure(trial.config, 1)) == "STOP"
    searcher.on_trial_complete("0", {})
    record = load(folder).trials[0]
    assert (record.status, record.reports[-1].decision) == ("running", "CONTINUE")


def test_duplicates_are_asked_again_and_accepted_when_nothing_is_left(tmp_path: Path) -> None:
    folder, few = tmp_path / "toy" / "set", {"hp.zeta": Dimension(0.1, 0.4, step=0.1)}
    searcher = drive([study_at(folder, trials=8, search=few, start={})], asha=None)
    zetas = [trial.params["hp.zeta"] for trial in load(folder).trials.values()]
    assert len(zetas) == 8
    assert len(set(zetas[:4])) >= 3  # four draws out of four: 10 % are all different
    completed = [s for s in states(searcher, "toy/set") if s == TrialState.COMPLETE]
    assert len(completed) == 8

    # Nothing to search: every trial repeats the setting, and no time is lost on it.
    search = study_at(folder.parent / "dense", trials=2, start={}, search={})
    assert [search.suggest().params, search.suggest().params] == [{}, {}]
    assert len(search.study.get_trials()) == 2


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", ["random", "tpe", "gp", "nsga2"])
def test_duplicates_are_replaced_by_each_sampler_and_after_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Questions that were asked again are in the living study and not in the rebuilt one."""

    few = {"hp.zeta": Dimension(0.1, 0.3, step=0.1), "variant.prune": SEARCH["variant.prune"]}
    asked = 0
    ask, append = optuna.Study.ask, Journal.append

    def counted(study: optuna.Study, *given: Any, **named: Any) -> optuna.trial.Trial:
        nonlocal asked
        asked += 1
        return ask(study, *given, **named)

    def dying(journal: Journal, event: dict[str, Any], durable: bool = True) -> None:
        append(journal, event, durable)
        if journal.path.parent.parent.name == "killed" and event["type"] == "end":
            raise Killed

    monkeypatch.setattr(optuna.Study, "ask", counted)
    monkeypatch.setattr(Journal, "append", dying)
    changes: dict[str, Any] = {"search": few, "start": {}, "sampler.name": name, "trials": 6}
    folders = [tmp_path / name / "set" for name in ("straight", "killed")]
    for folder in folders:
        while True:
            try:
                searcher = drive([study_at(folder, **changes)], asha=None)
                break
            except Killed:
                continue
    assert asked > 2 * 6  # some were repeated
    assert same(*folders)
    settings = [json.dumps(trial.params) for trial in load(folders[0]).trials.values()]
    assert len(settings) == 6
    assert len(set(settings)) >= 5  # the sixth may take more draws of six
    assert TrialState.RUNNING not in states(searcher, "killed/set")


def test_several_objectives_give_a_front(tmp_path: Path) -> None:
    folder = tmp_path / "toy" / "set"
    changes: dict[str, Any] = {
        "objective": ["val/accuracy", "density/all"],
        "sampler.name": "nsga2",
    }
    searcher = drive([study_at(folder, **changes)], asha=None)
    study = searcher.searches["toy/set"].study
    finished = [t for t in load(folder).trials.values() if t.status == "finished" and t.in_study]
    assert [t.values for t in study.get_trials(states=(TrialState.COMPLETE,))] == [
        [t.reports[-1].metrics["val/accuracy"], t.reports[-1].metrics["density/all"]]
        for t in finished
    ]
    with pytest.raises(ValueError, match=r"scheduler\.name=none"):
        JournalScheduler(searcher, EPOCHS, ASHA)


def test_own_metrics_come_flat_and_without_rays() -> None:
    result = {
        "val": {"accuracy": 0.9, "name": "x"},
        "density/layer": {"fc1": 0.05},
        "epoch": 3,
        "diverged": False,
        "device_seconds": 1.5,
        "training_iteration": 3,
        "config": {"hp": {"zeta": 0.3}},
        "config/hp/zeta": 0.3,
        "trial_id": "abc",
    }
    assert own_metrics(result) == {
        "val/accuracy": 0.9,
        "density/layer/fc1": 0.05,
        "epoch": 3.0,
        "diverged": 0.0,
        "device_seconds": 1.5,
    }


def test_a_free_process_goes_to_the_newest_trial(tmp_path: Path) -> None:
    searcher = JournalSearcher([study_at(tmp_path / "toy" / "set")], engines={"engine-0": 3})
    scheduler = JournalScheduler(searcher, EPOCHS, None)
    trials = [
        SimpleNamespace(trial_id=str(number), status=status)
        for number, status in enumerate(["RUNNING", "PENDING", "PENDING"])
    ]
    for trial in trials:
        scheduler.on_trial_add(None, trial)
    # Trial 1 waits for a process that is starting; Ray's own order would waste it.
    controller = SimpleNamespace(get_live_trials=lambda: trials)
    assert scheduler.choose_trial_to_run(controller) is trials[2]
    trials[2].status = trials[1].status = "RUNNING"
    assert scheduler.choose_trial_to_run(controller) is None


def test_snapshots_hold_nothing(tmp_path: Path) -> None:
    searcher = JournalSearcher([study_at(tmp_path / "toy" / "set")], engines={"engine-0": 1})
    scheduler = JournalScheduler(searcher, EPOCHS, ASHA)
    for each in (searcher, scheduler, Reraise(searcher)):
        assert vars(copy.copy(each)) == {}
    searcher.save_to_dir(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "100000")
        patch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        patch.setenv("TUNE_MAX_PENDING_TRIALS_PG", "2")
        patch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
        patch.setenv("RAY_AIR_NEW_OUTPUT", "0")
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]
        ray.init(num_cpus=2, address="local", include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]


def trainable(config: dict[str, Any]) -> None:
    number = config["trial"]["number"]
    for epoch in range(1, config["epochs"] + 1):
        if number == 3 and config["model"]["args"].get("poison") == "report":
            tune.report({"failed": "OSError: no data", "attempt": 3})
            return
        if number == 3 and config["model"]["args"].get("poison") == "raise":
            raise OSError("no data")
        metrics = measure(config, epoch)
        tune.report(metrics)
        if metrics.get("diverged"):
            return


class Dies(tune.Callback):
    """Ends the driver's loop after so many results, with whatever is under way."""

    def __init__(self, results: int) -> None:
        self._left = results

    def on_trial_result(self, *args: Any, **info: Any) -> None:
        self._left -= 1

    def on_step_end(self, *args: Any, **info: Any) -> None:
        if self._left <= 0:
            raise Killed


def run_tune(
    storage: Path, studies: list[MemberStudy], concurrency: int, *callbacks: tune.Callback
) -> JournalSearcher:
    searcher = JournalSearcher(studies, engines={"engine-0": concurrency})
    tuner = tune.Tuner(
        # Little, because the actors of a run that died stay until the session ends.
        tune.with_resources(trainable, {"cpu": 0.25}),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=JournalScheduler(searcher, EPOCHS, ASHA),
            num_samples=-1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            storage_path=str(storage),
            verbose=0,
            callbacks=[Reraise(searcher), *callbacks],
        ),
    )
    tuner.fit()
    return searcher


def test_ray_tune_interrupted_writes_the_journal_of_the_uninterrupted_search(
    tmp_path: Path, ray_session: None
) -> None:
    formula, tuned = tmp_path / "a" / "set", tmp_path / "b" / "set"
    drive([study_at(formula, trials=8)])
    with pytest.raises(Killed):
        run_tune(tmp_path / "ray", [study_at(tuned, trials=8)], 1, Dies(results=9))
    assert [trial.status for trial in load(tuned).trials.values()].count("running") == 1
    searcher = run_tune(tmp_path / "ray", [study_at(tuned)], 1)
    assert same(formula, tuned)
    assert set(states(searcher, "b/set")) == {
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
    }


def test_ray_tune_runs_several_members_and_tells_optuna_the_truth(
    tmp_path: Path, ray_session: None
) -> None:
    sweep, start = tmp_path / "toy", START | {"hot": HOT}
    studies = [
        study_at(sweep / name, trials, start=start, **{"model.args.poison": how})
        for name, trials, how in (("set", 10, "report"), ("dsr", 4, "raise"))
    ]
    searcher = run_tune(tmp_path / "ray", studies, 2)
    for name, asked in (("set", 10), ("dsr", 4)):
        trials = load(sweep / name).trials
        assert len(trials) == asked
        assert [trials[number].status for number in (0, 2, 3)] == ["finished", "diverged", "failed"]
        assert trials[3].error == "OSError: no data"
        in_study = [trial for trial in trials.values() if trial.in_study]
        assert states(searcher, f"toy/{name}") == [EXPECTED[trial.status] for trial in in_study]


def test_ray_tune_ends_with_the_exception_of_a_searcher(tmp_path: Path, ray_session: None) -> None:
    study = study_at(tmp_path / "toy" / "set", trials=3, space=Broken)
    with pytest.raises(ZeroDivisionError, match="in the space"):
        run_tune(tmp_path / "ray", [study], 1)


@pytest.mark.parametrize(
    "place",
    [
        (JournalSearcher, "_complete"),
        (JournalSearcher, "failure"),
        (JournalScheduler, "_result"),
        (JournalScheduler, "on_trial_add"),
        (JournalScheduler, "choose_trial_to_run"),
        (Reraise, "on_trial_result"),
        (Reraise, "on_step_end"),
    ],
    ids=lambda place: f"{place[0].__name__}.{place[1]}",
)
def test_ray_tune_ends_with_the_exception_of_any_hook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None, place: tuple[Any, str]
) -> None:
    def broken(*given: Any, **named: Any) -> Any:
        raise ZeroDivisionError("in a hook")

    monkeypatch.setattr(*place, broken)
    how = "raise" if place[1] == "failure" else ""
    study = study_at(
        tmp_path / "toy" / "set",
        trials=4,
        **{"model.args.poison": how},
    )
    with pytest.raises(Exception, match="in a hook"):
        run_tune(tmp_path / "ray", [study], 1)


def test_members_that_can_share_a_pool_come_together(tmp_path: Path) -> None:
    """Of 16 trials each, a quarter of a member's may be under way; then the next group begins."""
    groups = {"a": "one", "b": "two", "c": "one"}
    studies = [study_at(tmp_path / "m" / n, trials=16, group=g) for n, g in groups.items()]
    searcher = JournalSearcher(studies, engines={"engine-0": 12})
    order = [searcher.suggest(f"t{number}")["trial"]["member"] for number in range(12)]
    assert order == ["m/a", "m/c"] * 4 + ["m/b"] * 4
