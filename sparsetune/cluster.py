"""The Ray that a sweep runs on: reaching it, its engines, one Tuner over all trials.

The rule to know: the Tuner is new each time and its snapshots are scratch. Trials are light
processes that need no CPU; the engines, one for each device, hold the places where trials train.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetune.config import SweepSettings
from sparsetune.member import Scheduling
from sparsetune.search.study import SearchMember
from sparsetune.trial import EngineActor, sweep_trial, trial_key
from sparsetune.watch import Watch

FEW = 4  # places of an engine that are filled whatever the search would rather know first
PROCESSES = 40  # of trials and engines that one machine may well have
ANSWER_SECONDS = 5.0  # how long a cluster's head may take to answer
QUIET = {
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # the journal is the truth; a snapshot costs 13 ms
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # tried again, or in the trial's error.txt
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # users' relative paths and modules go on meaning the same
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


class ClusterError(ValueError):
    """A cluster that cannot be used; says what to do."""


def check_address(address: str) -> None:
    """ClusterError where nobody answers there; Ray itself would try for minutes."""
    if not address:
        return
    place = address.removeprefix("ray://")
    if address == "auto":
        known = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
        place = os.environ.get("RAY_ADDRESS") or (known.read_text() if known.exists() else "")
        if not place:
            raise ClusterError(
                "ray.address: auto finds no cluster on this machine; start one by `ray start "
                "--head`, give ray.address=HOST:PORT, or leave it out to use this machine alone"
            )
    host, _, port = place.strip().rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"ray.address: no cluster answers at '{place}' ({error}); write HOST:PORT of a head "
            "that runs, or leave it out to use this machine alone"
        ) from error


@dataclass
class Fleet:
    """The engines of a sweep: the names of their actors, and places for trials in each."""

    actors: dict[str, Any]
    slots: int

    def detach(self, engine: str, member: str, number: int) -> None:
        """Frees a trial's place, should its process have died without doing so."""
        self.actors[engine].detach.remote(trial_key(member, number))


def start_engines(settings: SweepSettings, default_slots: int, trials: int) -> Fleet:
    """Engines on the GPUs of the cluster, or on its CPU cores where it has none.

    As many engines and slots as there is room for. But unless `concurrency` says so, not more than
    a quarter of the `trials` at a time (and FEW for each engine): the others are what the first
    ones teach, and each place is a process that takes two seconds to start. ClusterError where a
    node cannot hold an engine.
    """
    import ray

    resources = settings.resources
    threads = max(1, resources.threads_per_engine)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = 0 if settings.device == "cpu" else int(sum(has.get("GPU", 0) for has in nodes))
    room = gpus or sum(int(has.get("CPU", 0)) // threads for has in nodes)
    at_once = settings.concurrency or min(trials, max(-(-trials // 4), FEW * room))
    wanted = max(1, min(room, at_once))
    num = resources.engines or wanted
    if not 0 < num <= room:
        raise ClusterError(
            f"resources: {max(num, 1)} engines of {threads} threads need more than this cluster "
            f"has ({len(nodes)} nodes, {gpus} GPUs, room for {room}); give resources.engines=N, "
            "resources.threads_per_engine=N"
        )
    slots = max(1, min(resources.slots or default_slots, -(-at_once // num)))
    actor = ray.remote(EngineActor)
    actors = {}
    for number in range(num):
        options = {"name": f"engine-{number}", "num_cpus": threads, "max_restarts": -1}
        options |= {"num_gpus": 1} if gpus else {}
        actors[f"engine-{number}"] = actor.options(**options).remote(
            settings.device,
            settings.engine,
            slots,
            threads,
            0.8 if gpus else 0.8 * len(nodes) / num,
            str(Path.cwd()),
        )
    return Fleet(actors, slots)


def tune_all(
    members: list[SearchMember],
    settings: SweepSettings,
    scheduling: Scheduling,
    default_slots: int,
    watch: Watch,
) -> None:
    """All open and new trials of all members in one Tuner."""
    os.environ.update(QUIET)
    # Ray prints a warning at four times as many processes as it starts at once.
    at_once = max(os.cpu_count() or 1, PROCESSES // 4)
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(at_once))
    import ray
    from ray import tune

    from sparsetune.search.scheduler import Asha, JournalScheduler
    from sparsetune.search.searcher import JournalSearcher, Reraise

    address = settings.ray.address or "local"  # plain init joins a dead cluster's stale address
    open_trials = sum(
        member.record.asked - sum(t.status != "running" for t in member.record.trials.values())
        for member in members
    )
    with watch.signals(), tempfile.TemporaryDirectory() as scratch:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False if address == "local" else None,
        )
        try:
            fleet = start_engines(settings, default_slots, open_trials)
            searcher = JournalSearcher(
                members,
                settings.seed,
                dict.fromkeys(fleet.actors, fleet.slots),
                settings.concurrency,
                fleet.detach,
            )
            os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(searcher.concurrency)
            asha = (
                Asha(scheduling.grace, scheduling.reduction) if scheduling.name == "asha" else None
            )
            scheduler = JournalScheduler(searcher, settings.epochs, asha)
            watch.on_leave = searcher.drain
            if watch.leaving_since is not None:  # the signal came while Ray started
                return
            tuner = tune.Tuner(
                # Tune refuses a trial that asks for nothing, and the engines have all the cores.
                tune.with_resources(sweep_trial, tune.PlacementGroupFactory([{"memory": 1}])),
                tune_config=tune.TuneConfig(
                    search_alg=searcher, scheduler=scheduler, num_samples=-1, reuse_actors=True
                ),
                run_config=tune.RunConfig(
                    name="scratch",
                    storage_path=scratch,
                    callbacks=[Reraise(searcher, watch.tick, watch.install)],
                    failure_config=tune.FailureConfig(max_failures=-1),
                    verbose=0,
                ),
            )
            tuner.fit()
            if searcher.error is not None:
                raise searcher.error
        finally:
            ray.shutdown()
