"""Early stopping whose state is the journal's: one ASHA per member, rebuilt by replaying reports.

The rule to know: a result counts once. An epoch that the journal has is dropped, so a trial may
report again whatever it is not sure about after an interruption; a new one becomes one `report`
event with the decision in it, and where it is the last of its trial, an `end` event follows.
"""

from __future__ import annotations

import logging
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from sparsetune.search.searcher import JournalSearcher
from sparsetune.search.study import MemberStudy

logger = logging.getLogger(__name__)

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP
PLAIN_METRICS = ("epoch", "device_seconds", "diverged")  # ours, though they have no "/"


@dataclass(frozen=True)
class Asha:
    """Asynchronous successive halving: at grace, grace * reduction, ... epochs, the best go on."""

    grace: int
    reduction: float  # the best 1/reduction go on


class JournalScheduler(FIFOScheduler):
    """Writes what trials report, asks ASHA (None: nobody) whether they go on, ends them."""

    def __init__(self, searcher: JournalSearcher, epochs: int, asha: Asha | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._searcher = searcher
        self._epochs = epochs
        self._arrivals: dict[str, int] = {}
        self._rungs: dict[str, Rungs] = {}
        for name, search in searcher.searches.items():
            self._end_what_is_over(search)
            if asha is not None:
                self._rungs[name] = Rungs(search, epochs, asha)
                for difference in self._rungs[name].replay():
                    logger.warning("%s; the first holds", difference)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._arrivals[trial.trial_id] = len(self._arrivals)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        # The newest first: it takes the process that has just become free, while those of older
        # trials are starting. In Ray's order an older trial takes it, its starting process is
        # ended, and another is started for the newest; trials that are shorter than the start of
        # a process then cost one each.
        pending = [t for t in tune_controller.get_live_trials() if t.status == RayTrial.PENDING]
        return max(pending, key=lambda trial: self._arrivals[trial.trial_id], default=None)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if self._searcher.error is not None:
            return CONTINUE
        try:
            return self._result(trial.config, result)
        except Exception as error:  # noqa: BLE001  Reraise raises it
            self._searcher.error = error
            return CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        # Ray calls this for every failure, also those after which it tries again. Whether it was
        # the last is told to the searcher alone.
        lines = []
        if trial.error_file is not None:  # not Trial.get_error: that looks at what was uploaded
            lines = Path(trial.error_file).read_text().strip().splitlines()
        self._searcher.failure(trial.trial_id, lines[-1] if lines else "the process died")

    def _result(self, config: dict[str, Any], result: dict[str, Any]) -> str:
        name, number = config["trial"]["member"], config["trial"]["number"]
        search = self._searcher.searches[name]
        trial = search.record.trials[number]
        attempt = int(result.get("attempt", 1))
        if trial.status != "running":
            return STOP
        if result.get("moved"):
            return STOP  # and remains open
        if result.get("failed"):
            search.end(number, "failed", attempt, str(result["failed"]))
            return STOP
        epoch = int(result["epoch"])
        answer = STOP if self._searcher.draining else CONTINUE
        if epoch <= len(trial.reports):
            return answer
        metrics = own_metrics(result)
        decision = CONTINUE
        status = self._verdict(search, config, metrics, decision)
        if status is None and name in self._rungs:
            decision = self._rungs[name].ask(number, metrics)
            status = self._verdict(search, config, metrics, decision)
        elif status == "diverged":
            decision = STOP
        search.report(number, epoch, metrics, decision)
        if status is not None:
            search.end(number, status, attempt)
        return STOP if decision == STOP else answer

    def _verdict(
        self, search: MemberStudy, config: dict[str, Any], metrics: dict[str, float], decision: str
    ) -> str | None:
        """How a trial has ended with this report, or None."""
        if metrics.get("diverged") or not search.finite(metrics):
            return "diverged"
        if metrics["epoch"] >= config.get("epochs", self._epochs):
            return "finished"
        return "stopped" if decision == STOP else None

    def _end_what_is_over(self, search: MemberStudy) -> None:
        # A driver can be killed between the last report of a trial and its end.
        for trial in list(search.record.trials.values()):
            if trial.status == "running" and trial.reports:
                _, metrics, decision = trial.reports[-1]
                status = self._verdict(search, search.config(trial), metrics, decision)
                if status is not None:
                    search.end(trial.number, status)

    def debug_string(self) -> str:
        return ""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Rungs:
    """A member's ASHA, which knows trials by our numbers."""

    def __init__(self, search: MemberStudy, epochs: int, asha: Asha) -> None:
        if len(search.member.objectives) != 1:
            raise ValueError(
                f"{search.member.name}: ASHA compares trials by one objective; "
                "with several choose scheduler.name=none"
            )
        self._search = search
        self._epochs = epochs
        self._known: set[int] = set()
        self._asha = AsyncHyperBandScheduler(
            time_attr="epoch",
            metric=search.member.objectives[0],
            mode=search.member.directions[0][:3],  # "maximize" -> "max"
            max_t=epochs,
            grace_period=asha.grace,
            reduction_factor=asha.reduction,
        )

    def ask(self, number: int, metrics: dict[str, float]) -> str:
        if metrics["epoch"] >= self._epochs:  # ASHA stops everything there
            return CONTINUE
        stand_in: Any = SimpleNamespace(trial_id=str(number))
        controller: Any = None  # ASHA has no use for it
        if number not in self._known:
            self._known.add(number)
            self._asha.on_trial_add(controller, stand_in)
        return self._asha.on_trial_result(controller, stand_in, metrics)

    def replay(self) -> list[str]:
        """Reports in the order in which they came, without those that ASHA was not asked about;
        a line for each decision that comes out otherwise, which none does."""
        record, differences = self._search.record, []
        for number, epoch in record.order:
            trial = record.trials[number]
            if trial.status in ("finished", "diverged") and epoch == len(trial.reports):
                continue
            _, metrics, decision = trial.reports[epoch - 1]
            again = self.ask(number, metrics)
            if again != decision:
                differences.append(
                    f"{self._search.member.name}: trial {number}, epoch {epoch}: ASHA said "
                    f"{decision} then and says {again} now"
                )
        return differences


def own_metrics(result: dict[str, Any]) -> dict[str, float]:
    """What the trial itself reported, without what Ray adds; nested or flat, it comes out flat."""
    return {
        key: float(value)
        for key, value in _flat(result)
        if ("/" in key or key in PLAIN_METRICS) and isinstance(value, numbers.Real)
    }


def _flat(result: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in result.items():
        if not prefix and (key == "config" or key.startswith("config/")):  # Ray repeats it
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
