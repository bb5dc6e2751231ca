"""A trial under Ray Tune: attach to an engine, report each epoch, detach.

The rule to know: this process trains nothing and needs no torch. Whatever it lost, the engine's
records and the checkpoint have, so it may report an epoch again, and the scheduler drops what the
journal has.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from sparsetune.store.paths import insist, place, write_whole

NODE_SECONDS = 15.0  # how long Ray may take to see that a node is gone whose processes are
ENGINE_SECONDS = 120.0  # how long an engine that was lost may take to come back


class Moved(Exception):
    """The trial's engine has gone with its node, or does not answer: that is no failure of the
    trial, and the searcher gives it to whichever engine has room."""


def _attempts(folder: Path, generation: int) -> list[str]:
    """The nodes of the earlier attempts at the trial under the present driver, if they live still.

    Attempts that ended with an earlier driver, or with their node, say nothing about the trial.
    """
    path = folder / "attempts.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    nodes: list[str] = known.get("nodes", []) if known.get("generation") == generation else []
    if not nodes:
        return []
    import ray

    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return [node for node in nodes if node in alive]


def _note_attempts(folder: Path, generation: int, nodes: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with write_whole(folder / "attempts.json") as file:
        file.write(json.dumps({"generation": generation, "nodes": nodes}).encode())


class EngineActor:
    """`engine.actor.Engine` as Ray sees it. Whoever gets an actor by name imports its class, so
    this one stands where there is no torch: it takes 1.3 s and 200 MB of every trial's process."""

    def __init__(self, *about: Any) -> None:
        from sparsetune.engine.actor import Engine

        self._engine = Engine(*about)

    async def attach(self, *about: Any) -> int:
        return await self._engine.attach(*about)

    async def after(self, key: str, token: int, epoch: int) -> list[dict[str, float]]:
        return await self._engine.after(key, token, epoch)

    async def detach(self, key: str, token: int = 0) -> None:
        await self._engine.detach(key, token)

    async def held(self) -> int:
        return await self._engine.held()


def sweep_trial(config: dict[str, Any]) -> None:
    """The trainable of our own sweeps.

    `config` is a trial's settings plus `trial`: member, number, engine (the actor's name), folder,
    save_every, decisions (epochs after which it may be stopped), generation of the driver,
    failures. A trial that failed so many times under one driver says so and returns; before that
    Ray tries it again.
    """
    import ray
    from ray import tune

    about = config["trial"]
    folder, failures = place(about["folder"]), about["failures"]
    node = ray.get_runtime_context().get_node_id()
    earlier = insist(lambda: _attempts(folder, about["generation"]))
    deadline = time.monotonic() + NODE_SECONDS
    while set(earlier) - {node} and time.monotonic() < deadline:
        time.sleep(0.5)  # a node that was lost must not count against the trial
        earlier = insist(lambda: _attempts(folder, about["generation"]))
    attempt = len(earlier) + 1
    insist(lambda: _note_attempts(folder, about["generation"], [*earlier, node]))
    try:
        if attempt > failures:
            raise RuntimeError(f"its process died {failures} times")
        with closing(_records(config, about, suspect=attempt > 1)) as records:
            for record in records:
                tune.report({**record, "attempt": attempt})
    except Moved:
        # Whatever became of the engine, it was not the trial.
        insist(lambda: (folder / "alone").unlink(missing_ok=True))
        insist(lambda: _note_attempts(folder, about["generation"], earlier))
        tune.report({"moved": True})
    except Exception as error:
        reason = write_error(folder, error)
        if attempt < failures:
            raise
        tune.report({"failed": reason, "attempt": attempt})


def write_error(folder: Path, error: Exception) -> str:
    """Puts the traceback into the trial's `error.txt` and returns its last line."""
    text = "".join(traceback.format_exception(error)).strip()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "error.txt").write_text(text + "\n")
    return text.splitlines()[-1]


def _records(
    config: dict[str, Any], about: dict[str, Any], suspect: bool
) -> Generator[dict[str, float], None, None]:
    """The trial's records from its engine, from the first one that its checkpoint has.

    `suspect`: the trial has failed before, so that it is tried alone first.
    """
    import ray

    settings = {key: value for key, value in config.items() if key != "trial"}
    key, epoch, token = trial_key(about["member"], about["number"]), 0, 0
    engine: Any = None
    lost_since: float | None = None
    deaths = 0  # of engines since the last record
    try:
        while epoch < settings["epochs"]:
            try:
                if engine is None:
                    engine = _engine(about["engine"])
                    suspect = suspect or deaths > 1
                    saving = [about[name] for name in ("folder", "save_every", "decisions")]
                    token = ray.get(engine.attach.remote(key, settings, *saving, suspect))
                records = ray.get(engine.after.remote(key, token, epoch))
            except (
                ray.exceptions.RayActorError,
                ray.exceptions.ActorUnschedulableError,
                KeyError,
            ) as error:
                # It was killed and starts again, without knowing anybody.
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > ENGINE_SECONDS:
                    if isinstance(error, ray.exceptions.ActorUnavailableError):
                        raise Moved from None
                    raise
                deaths += token > 0
                engine, token = None, 0
                time.sleep(0.2)
                continue
            lost_since = None
            if records:
                deaths, suspect = 0, False
            for record in records:
                yield record
                epoch = int(record["epoch"])
                if record["diverged"]:
                    return
    finally:
        if token:
            engine.detach.remote(key, token)


def _engine(name: str) -> Any:
    import ray

    try:
        return ray.get_actor(name)
    except ValueError:  # one that was killed is still known by its name, one whose node died is not
        raise Moved from None


def trial_key(member: str, number: int) -> str:
    """What a trial is called in its engine."""
    return f"{member} {number}"
