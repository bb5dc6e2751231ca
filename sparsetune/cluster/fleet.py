"""The engines of a sweep, one for each GPU or CPU core of nodes that come and go.

The rule to know: an engine belongs to its node. Where it is killed Ray starts it there again; where
its node has gone, so has it, with its places, and its trials are given to others by the searcher.
On a cluster a node is looked at before it gets an engine, and an engine has places when it runs.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sparsetune.cluster.nodes import looker
from sparsetune.cluster.trial import EngineActor, trial_key
from sparsetune.settings import SweepSettings

FEW = 4  # places of an engine that are filled whatever the search would rather know first
START_SECONDS = 30.0  # how long an engine may well take to start
FOLLOW_SECONDS = 2.0  # between two looks at which nodes there are


class ClusterError(ValueError):
    """A cluster that cannot be used; says what to do."""


class _Engine(NamedTuple):
    node: str
    actor: Any


class Fleet:
    """Starts engines, as many as there is room for and `follow` finds room for later.

    But unless `concurrency` says so, not more than a quarter of the `trials` at a time (and FEW for
    each engine): the others are what the first ones teach, and each place is a process that takes
    two seconds to start. `places` has the engines that trials may go to, with their slots.
    """

    def __init__(
        self,
        settings: SweepSettings,
        trials: int,
        default_slots: Callable[[bool | None], int],
        needs: dict[str, Any],
        note: Callable[[str], None],
    ) -> None:
        """`default_slots` says how many an engine does well with, on a GPU or not (None: as on this
        machine). `needs` is what nodes are looked at for; empty: the one node is this machine.
        `note` tells the user."""
        self.places: dict[str, int] = {}
        self._settings, self._trials, self._default_slots = settings, trials, default_slots
        self._needs, self._note = needs, note
        self._threads = max(1, settings.resources.threads_per_engine)
        self._gpu, self._slots = False, 1
        self._looks: dict[str, Any] = {}  # node -> what it lacks, when known
        self._good: dict[str, bool] = {}  # nodes that were looked at
        self._engines: dict[str, _Engine] = {}
        self._starting: dict[str, Any] = {}  # engine -> an answer, when it runs
        self._numbers = itertools.count()
        self._next, self._late = 0.0, time.monotonic() + START_SECONDS
        self._noted = ""

    def begin(self) -> None:
        """Engines on all nodes that there are; ClusterError where something is wrong with one."""
        nodes = alive_nodes()
        if wrong := self._look(nodes, wait=True):
            raise ClusterError("the cluster's nodes are not alike:\n  " + "\n  ".join(wrong))
        self._start(nodes)
        wanted = max(1, self._settings.resources.engines)
        if not self._needs and len(self._engines) < wanted:
            gpu = " and a GPU" if self._gpu else ""
            raise ClusterError(
                f"resources: {wanted} engines of {self._threads} threads{gpu} "
                f"need more than this machine has, which is room for {len(self._engines)}; give "
                "resources.engines=N, resources.threads_per_engine=N"
            )

    def follow(self) -> None:
        """Takes note of nodes that have come or gone; may be called as often as one likes."""
        import ray

        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + FOLLOW_SECONDS
        nodes = alive_nodes()
        gone = [n for n, e in self._engines.items() if e.node not in nodes or not _known(n)]
        for name in gone:
            ray.kill(self._engines.pop(name).actor)
            self.places.pop(name, None)
            self._starting.pop(name, None)
        if gone:
            self._tell(f"gone with a node: {', '.join(gone)}; their trials go on elsewhere")
        for line in self._look(nodes, wait=False):
            self._tell(f"not used: {line}")
        self._start(nodes)
        for name in _answered(self._starting):
            try:
                ray.get(self._starting.pop(name))
            except ray.exceptions.RayError:
                if _known(name):  # it is started again, or its node is about to be gone
                    self._starting[name] = self._engines[name].actor.__ray_ready__.remote()
                elif self._engines[name].node in alive_nodes():
                    raise
            else:
                self.places[name] = self._slots
        if self._engines and not self.places and time.monotonic() > self._late:
            self._tell("engines wait until others give the cluster's cores or GPUs back")

    def detach(self, engine: str, member: str, number: int) -> None:
        """Frees a trial's place, should its process have died without doing so."""
        if engine in self._engines:
            self._engines[engine].actor.detach.remote(trial_key(member, number))

    def _look(self, nodes: dict[str, dict[str, Any]], wait: bool) -> list[str]:
        """Looks at nodes that are new; returns what the nodes that have answered lack."""
        import ray

        for node in nodes:
            if node in self._good or node in self._looks:
                continue
            if self._needs:
                # One call: the process ends then, with the data that it read.
                look = ray.remote(num_cpus=0, max_calls=1)(looker())
                self._looks[node] = look.options(scheduling_strategy=_at(node)).remote(
                    **self._needs
                )
            else:
                self._good[node] = True
        wrong = []
        for node in _answered(self._looks, None if wait else 0.0):
            try:
                lacks = ray.get(self._looks.pop(node))
            except ray.exceptions.RayError as error:
                lacks = [str(error).strip().splitlines()[-1]]
                nodes = alive_nodes()
            self._good[node] = not lacks
            if node in nodes:
                wrong += [f"node {nodes[node]['NodeManagerAddress']}: {what}" for what in lacks]
        return wrong

    def _start(self, nodes: dict[str, dict[str, Any]]) -> None:
        """Starts the engines that are wanted and not there, where most is free."""
        import ray

        settings = self._settings
        usable = {node: nodes[node]["Resources"] for node in nodes if self._good.get(node)}
        if not self._engines:
            some_gpu = any(has.get("GPU", 0) >= 1 for has in usable.values())
            waits = settings.device.startswith("cuda") and bool(self._needs)
            self._gpu = waits or (settings.device != "cpu" and some_gpu)
        here = Counter(engine.node for engine in self._engines.values())
        room = {
            node: int(has.get("GPU", 0) if self._gpu else has.get("CPU", 0) // self._threads)
            for node, has in usable.items()
        }
        total = sum(room.values())
        first = max(math.ceil(self._trials / 4), FEW * total)
        at_once = settings.concurrency or min(self._trials, first)
        wanted = settings.resources.engines or max(1, min(total, at_once))
        if total and not self._engines:
            on_gpu = self._gpu if self._needs else None
            slots = settings.resources.slots or self._default_slots(on_gpu)
            self._slots = max(1, min(slots, math.ceil(at_once / max(1, min(wanted, total)))))
        new: list[str] = []
        while len(self._engines) + len(new) < wanted and total > here.total() + len(new):
            new.append(max(room, key=lambda node: room[node] - here[node] - new.count(node)))
        device = settings.device  # of a cluster's node Ray shows an engine its own GPU alone
        if self._needs:
            device = "cuda" if self._gpu else "cpu"
        options = {"max_restarts": -1, "num_cpus": self._threads, "num_gpus": int(self._gpu)}
        for node in new:
            name = f"engine-{next(self._numbers)}"
            share = 0.8 if self._gpu else 0.8 / (here[node] + new.count(node))
            about = (device, settings.engine, self._slots, self._threads, share, str(Path.cwd()))
            remote = ray.remote(EngineActor).options(
                name=name, scheduling_strategy=_at(node), **options
            )
            self._engines[name] = _Engine(node, remote.remote(*about))
            self._starting[name] = self._engines[name].actor.__ray_ready__.remote()
            if not self._needs:
                self.places[name] = self._slots  # trials' processes start at the same time
        if not self._engines and self._needs:
            what = "a GPU" if self._gpu else f"{self._threads} CPU"
            self._tell(f"no node has room for an engine ({what}); waiting for one")

    def _tell(self, line: str) -> None:
        if line != self._noted:
            self._noted = line
            self._note(line)


def alive_nodes() -> dict[str, dict[str, Any]]:
    import ray

    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _at(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _known(name: str) -> bool:
    import ray

    try:
        ray.get_actor(name)
    except ValueError:  # it could not be started again
        return False
    return True


def _answered(waiting: dict[str, Any], timeout: float | None = 0.0) -> list[str]:
    """The keys of answers that have come."""
    import ray

    if not waiting:
        return []
    refs = list(waiting.values())
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout)
    return [key for key, ref in waiting.items() if ref in done]
