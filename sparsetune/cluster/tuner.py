"""The Ray that a sweep runs on: reaching it, its engines, one Tuner over all trials.

The rule to know: the Tuner is new each time and its snapshots are scratch. Trials are light
processes that need no CPU; the engines (`fleet.py`) hold the places where trials train.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetune.cluster.fleet import ClusterError, Fleet
from sparsetune.cluster.trial import sweep_trial
from sparsetune.cluster.watch import Watch
from sparsetune.search.study import MemberStudy
from sparsetune.settings import RaySettings
from sparsetune.space.member import Scheduling

if TYPE_CHECKING:
    from ray.tune import Tuner

    from sparsetune.search.scheduler import JournalScheduler
    from sparsetune.search.searcher import JournalSearcher

PROCESSES = 40  # of trials and engines that one machine may well have
TRIAL_BYTES = 120_000_000  # of memory that a trial's process needs
ANSWER_SECONDS = 5.0  # how long a cluster's head may take to answer
QUIET = {
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # the journal is the truth; a snapshot costs 13 ms
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # tried again, or in the trial's error.txt
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # users' relative paths and modules go on meaning the same
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # our py_modules are added to what a job was given
    "TUNE_MAX_PENDING_TRIALS_PG": "1000000",  # the searcher knows how many there may be
}


def check_cluster(settings: RaySettings, storage: Path) -> None:
    """ClusterError where the cluster that is asked for does not answer, or would lose the sweep."""
    import ray

    if ray.is_initialized():
        raise ClusterError("ray: this process uses a Ray already; call ray.shutdown() before")
    key, address = "ray.address" if settings.address else "RAY_ADDRESS", settings.cluster
    if not address:
        return
    if "working_dir_files" in storage.resolve().parts:
        raise ClusterError(
            f"storage: {storage} is in Ray's copy of the job's folder, which ends with the job; "
            "give storage=FOLDER that all nodes share"
        )
    place = address
    if address == "auto":
        place = os.environ.get("RAY_ADDRESS") or _running_here()
        if not place:
            raise ClusterError(
                f"{key}: auto finds no cluster on this machine; start one by `ray start --head`, "
                "give ray.address=HOST:PORT, or leave it out to use this machine alone"
            )
    host, _, port = place.strip().rpartition(":")
    try:
        # Ray itself would try for minutes.
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"{key}: no cluster answers at '{place}' ({error}); write HOST:PORT of a head "
            "that runs, or leave it out to use this machine alone"
        ) from error


def _running_here() -> str:
    """The cluster that a node on this machine belongs to, as Ray itself looks for it."""
    known = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    if known.exists():
        return known.read_text()
    for process in Path("/proc").glob("[0-9]*"):  # of a node with a --temp-dir of its own
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            raylet = re.match(r"[^\s\0]*/raylet\0.*?--gcs-address=([^\s\0]+)", command, re.DOTALL)
            if raylet:
                return raylet[1]
    return ""


def tune_all(
    studies: list[MemberStudy],
    stopping: Scheduling,
    default_slots: Callable[[bool | None], int],
    needs: dict[str, Any],
    runtime_env: dict[str, Any],
    watch: Watch,
) -> None:
    """All open and new trials of all members in one Tuner.

    `default_slots` and `needs` (of a cluster's nodes) are the fleet's; `runtime_env` is what Ray
    brings to the nodes.
    """
    settings = studies[0].member.settings
    with tempfile.TemporaryDirectory() as scratch, _ray(settings.ray.cluster, runtime_env):
        from sparsetune.search.scheduler import Asha, JournalScheduler
        from sparsetune.search.searcher import JournalSearcher

        fleet = Fleet(settings, _open_trials(studies), default_slots, needs, watch.display.note)
        fleet.begin()
        searcher = JournalSearcher(
            studies,
            fleet.places,
            settings.concurrency,
            fleet.detach,
            fleet.follow,
            stopping.decisions(settings.epochs),
        )
        asha = Asha(stopping.grace, stopping.reduction) if stopping.name == "asha" else None
        scheduler = JournalScheduler(searcher, settings.epochs, asha)
        watch.on_leave = searcher.drain
        if watch.leaving_since is None:  # no signal came while Ray started
            memory = TRIAL_BYTES if settings.ray.cluster else 1
            _tuner(searcher, scheduler, watch, memory, scratch).fit()
        if searcher.error is not None:
            raise searcher.error


def _open_trials(studies: list[MemberStudy]) -> int:
    """How many have not ended, of those that were asked for."""
    ended = [trial.status != "running" for s in studies for trial in s.record.trials.values()]
    return sum(study.record.asked for study in studies) - sum(ended)


@contextmanager
def _ray(address: str, runtime_env: dict[str, Any]) -> Iterator[None]:
    """Within it this process uses the cluster at `address`, or else a Ray of its own."""
    # Ray prints a warning at four times as many processes as it starts at once.
    at_once = max(os.cpu_count() or 1, PROCESSES // 4)
    ours = {"RAY_worker_maximum_startup_concurrency": str(at_once)} | os.environ | QUIET
    theirs = dict(os.environ)  # of a notebook, say, that has a Tuner of its own besides
    os.environ.update(ours)
    # What failed is tried again, or told at the end; Tune would print its traceback each time.
    logger = logging.getLogger("ray.tune.execution.tune_controller")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    import ray

    try:
        try:
            _start(address, runtime_env)
        except (OSError, RuntimeError, ray.exceptions.RayError) as error:
            if not address:
                raise
            raise ClusterError(
                f"ray.address: the cluster at '{address}' answers, but cannot be used from here "
                f"({' '.join(str(error).split())[:500]}); start sweeps on one of its nodes, or by "
                "`ray job submit`"
            ) from error
        yield
    finally:
        ray.shutdown()
        logger.setLevel(level)
        for key in [key for key in os.environ if key.startswith(("RAY_", "TUNE_"))]:
            del os.environ[key]  # Tune leaves some of its own and complains of them the next time
        os.environ.update({key: value for key, value in theirs.items() if key not in os.environ})


def _start(address: str, runtime_env: dict[str, Any]) -> None:
    import ray

    def init() -> None:
        ray.init(
            address=address or "local",  # plain init joins a dead cluster's stale address
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=None if address else False,
            runtime_env=runtime_env or None,
        )

    try:
        init()
    except RuntimeError as error:
        # On a busy machine a Ray of our own now and then misses its own time limit for starting.
        if address or "Timed out" not in str(error):
            raise
        ray.shutdown()
        init()


def _tuner(
    searcher: JournalSearcher, scheduler: JournalScheduler, watch: Watch, memory: int, scratch: str
) -> Tuner:
    from ray import tune

    from sparsetune.search.searcher import Reraise

    # Tune refuses a trial that asks for nothing, and the engines have all the cores. All trials'
    # processes are on one node as far as it has what they ask for.
    return tune.Tuner(
        tune.with_resources(sweep_trial, tune.PlacementGroupFactory([{"memory": memory}])),
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
