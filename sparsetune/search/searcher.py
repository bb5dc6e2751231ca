"""Optuna behind Ray's Searcher, for all members of a sweep at once, rebuilt from their journals.

The rule to know: Ray swallows an exception of a searcher and then waits for ever. So ours is kept
in `JournalSearcher.error`, and `Reraise` raises it where Ray lets it through. What is suggested
is decided in `study.py`; here only whose turn it is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune import Callback
from ray.tune.search import Searcher

from sparsetune.search.study import MemberStudy

SYNC_SECONDS = 1.0  # how late reports may reach the disk
# What Ray itself reads of a result, and we of a last result that Ray repeats.
KEPT = {"trial_id", "done", "pid", "node_ip", "training_iteration", "should_checkpoint"}
KEPT |= {"epoch", "attempt", "failed", "moved"}


class JournalSearcher(Searcher):
    """Gives Ray the open trials of all members first, then new ones, as slots become free."""

    def __init__(
        self,
        studies: list[MemberStudy],
        engines: dict[str, int],
        concurrency: int = 0,
        release: Callable[[str, str, int], None] = lambda engine, member, number: None,
        follow: Callable[[], None] = lambda: None,
        decisions: Sequence[int] = (),
    ) -> None:
        """`engines`: names and places, which may change. `concurrency` is how many trials, of all
        members together, may be under way (0: as many as there are places). `release` (engine,
        member, number) is called when Ray is done with an attempt at a trial, `follow` whenever
        Ray asks for a trial, also while it calls nothing else: to change the engines. `decisions`:
        epochs after which a trial may be stopped."""
        super().__init__()
        self.searches = {study.member.name: study for study in studies}
        self.error: BaseException | None = None
        self._concurrency = concurrency
        self._engines = engines
        self._release, self._follow = release, follow
        self._decisions = list(decisions)
        self.draining = False
        self._open: list[tuple[str, int]] | None = None
        # Ray's id of an attempt -> our trial, and the engine that it is in
        self._live: dict[str, tuple[str, int, str]] = {}
        self._failures: dict[str, str] = {}  # Ray's id -> the last error
        self._lost: Counter[tuple[str, int]] = Counter()  # our trial -> how often Ray gave it up

    @property
    def concurrency(self) -> int:
        places = sum(self._engines.values())
        return min(self._concurrency or places, places)

    def drain(self) -> None:
        """No more suggestions; the scheduler stops each trial at its next report, unended."""
        self.draining = True

    def suggest(self, trial_id: str) -> Any:
        """A configuration; None while no slot is free; FINISHED when there is no more to give."""
        if self.error is not None or self.draining:
            return Searcher.FINISHED
        try:
            self._follow()
            return self._suggest(trial_id)
        except Exception as error:  # noqa: BLE001  Reraise raises it
            self.error = error
            return Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        try:
            self._complete(trial_id, bool((result or {}).get("moved")), error)
        except Exception as bug:  # noqa: BLE001  Reraise raises it
            self.error = self.error or bug

    def _complete(self, trial_id: str, moved: bool, error: bool) -> None:
        # The slot is free from here on, and not from the `end` event on: before Ray has the
        # trial's process back, the next trial would get a new one. Without an error, a trial that
        # is open in the journal stays so for the next driver. With one, Ray has given it up, as it
        # does, however many failures it may have, where the process died before the trial began.
        name, number, engine = self._live.pop(trial_id, ("", -1, ""))
        if name:
            self._release(engine, name, number)
        if not name or self.error is not None:
            return
        search = self.searches[name]
        if search.record.trials[number].status != "running":
            return
        self._lost[name, number] += error
        if moved or (error and self._lost[name, number] < search.member.settings.failures):
            assert self._open is not None
            self._open.append((name, number))
        elif error:
            search.end(number, "failed", error=self._failures.get(trial_id))

    def failure(self, trial_id: str, text: str) -> None:
        """What to write down should Ray give this attempt up; it says so to the scheduler only."""
        self._failures[trial_id] = text

    def _suggest(self, trial_id: str) -> Any:
        if self._open is None:  # not before the scheduler had its chance to end what is over
            self._open = [
                (name, trial.number)
                for name, search in self.searches.items()
                for trial in search.record.trials.values()
                if trial.status == "running"
            ]
            self._open.sort(key=lambda entry: entry[1], reverse=True)
        wanting = [search for search in self.searches.values() if search.wants_more]
        if not self._open and not wanting:
            # Ray may give up one of those, or its engine be gone.
            return None if self._live else Searcher.FINISHED
        if len(self._live) >= self.concurrency:
            return None
        if self._open:
            name, number = self._open.pop()
            search = self.searches[name]
            trial = search.record.trials[number]
        else:
            search = self._next(wanting)
            trial = search.suggest()
        config = search.config(trial)
        taken = [engine for _, _, engine in self._live.values()]
        engine = min(self._engines, key=taken.count)
        config["trial"] |= {"engine": engine, "decisions": self._decisions}
        self._live[trial_id] = (search.member.name, trial.number, engine)
        return config

    def _next(self, wanting: list[MemberStudy]) -> MemberStudy:
        """Whose trial comes next: one group of members after another, so that the slots hold trials
        that can share a pool, and within a group whoever has the fewest; the journals know where
        that stands. A sampler that hears of no trial before a quarter of them have begun is blind,
        so the next group begins when members have that many under way."""
        busy = Counter(name for name, _, _ in self._live.values())
        able = [s for s in wanting if busy[s.member.name] < math.ceil(s.record.asked / 4)]
        groups = list(dict.fromkeys(search.group for search in self.searches.values()))
        return min(able or wanting, key=lambda s: (groups.index(s.group), len(s.record.trials)))

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        return True

    # Ray's own snapshots are never read, and the journals and the studies do not belong in them.

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Reraise(Callback):
    """Ends the run with the exception of our searcher or scheduler; keeps reports on disk.

    `tick` is called as often as Ray comes by, about ten times a second; what it raises ends the
    run, too.
    """

    def __init__(
        self,
        searcher: JournalSearcher,
        tick: Callable[[], None] = lambda: None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._searcher = searcher
        self._tick = tick
        self._begin = begin

    def setup(self, *_: Any, **info: Any) -> None:
        """`begin` is called when Tune has installed its signal handlers."""
        self._begin()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """The scheduler has had the result. Of each metric Ray would keep ten statistics and the
        last values, 70 KB a trial that nobody asks for, and write them down in the end."""
        for key in result.keys() - KEPT:
            del result[key]

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._searcher.error is not None:
            raise self._searcher.error
        for search in self._searcher.searches.values():
            search.journal.sync(older_than=SYNC_SECONDS)
        self._tick()

    def __getstate__(self) -> dict[str, Any]:
        return {}
