"""A sweep in optuna-dashboard while it runs: a copy of its studies that follows the journals.

The rule to know: the copy goes one way. It lives in this process's memory, the journals are read
and never written, and the server answers nobody but this machine, and nothing but reads.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
from optuna.trial import FrozenTrial, TrialState

from sparsetune.search.study import frozen
from sparsetune.space.member import Member, load_member
from sparsetune.store import journal
from sparsetune.store.journal import Trial
from sparsetune.store.layout import member_folders
from sparsetune.store.lines import JournalError

HOST = "127.0.0.1"
POLL_SECONDS = 2.0


class Copy:
    """A member's study. Its trials have our numbers, and what Optuna has no place for in their user
    attributes; one that failed and is tried again is a trial more, as ended ones stay as they are.
    """

    def __init__(self, folder: Path, storage: optuna.storages.InMemoryStorage) -> None:
        self._folder, self._storage = folder, storage
        member, _ = load_member(folder)
        study = optuna.create_study(
            storage=storage, study_name=member.name, directions=member.directions
        )
        experimental = optuna.exceptions.ExperimentalWarning
        with warnings.catch_warnings(category=experimental, action="ignore"):
            study.set_metric_names(member.objectives)
        self._study = study._study_id
        self._open: dict[int, int] = {}  # our number -> Optuna's id
        self._ended: dict[int, int] = {}  # our number -> how often it had failed before it ended

    def update(self) -> None:
        """Makes the copy what the journal is by now."""
        member, record = load_member(self._folder)
        for trial in record.trials.values():
            if self._ended.get(trial.number) == len(trial.failures):
                continue
            now = _described(member, record, trial)
            if trial.number in self._open:
                self._push(self._open[trial.number], now)
            else:
                self._open[trial.number] = self._storage.create_new_trial(self._study, now)
            if trial.status != "running":
                self._ended[trial.number] = len(trial.failures)
                del self._open[trial.number]

    def _push(self, number: int, now: FrozenTrial) -> None:
        known = self._storage.get_trial(number)
        for epoch in sorted(now.intermediate_values.keys() - known.intermediate_values.keys()):
            value = now.intermediate_values[epoch]
            self._storage.set_trial_intermediate_value(number, epoch, value)
        for key in now.system_attrs.keys() - known.system_attrs.keys():
            self._storage.set_trial_system_attr(number, key, now.system_attrs[key])
        if now.state != TrialState.RUNNING:
            self._storage.set_trial_state_values(number, now.state, now.values)


def _described(member: Member, record: journal.Record, trial: Trial) -> FrozenTrial:
    about = {"trial": trial.number, "origin": trial.origin, **trial.fixed}
    if not trial.in_study:  # its parameters are none of the study's
        about |= trial.params
        trial = dataclasses.replace(trial, params={})
    now = frozen(member, record, trial)
    now.user_attrs = about
    now.datetime_start = datetime.fromtimestamp(trial.suggested)
    if trial.ended is not None and now.state != TrialState.RUNNING:
        now.datetime_complete = datetime.fromtimestamp(trial.ended)
    return now


def serve(storage: Path, name: str, port: int) -> None:
    """Serves the sweep, or one member, until Ctrl-C. ValueError where it cannot."""
    try:
        from optuna_dashboard import wsgi
    except ImportError as error:
        raise ValueError(
            f"dashboard: needs optuna-dashboard ({error}); install it by: "
            "pip install 'sparsetune[dashboard]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    memory = optuna.storages.InMemoryStorage()
    copies = [Copy(folder, memory) for folder in member_folders(storage, name)]
    for copy in copies:
        copy.update()
    try:
        server = make_server(
            HOST, port, _reads_only(wsgi(memory)), server_class=_Server, handler_class=_Quiet
        )
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"port: {port} cannot be used ({error}); give another by --port"
        ) from error
    threading.Thread(target=_follow, args=(copies,), daemon=True).start()
    print(f"http://{HOST}:{server.server_port}/dashboard shows {name}; end with Ctrl-C", flush=True)
    # What starts in the background of a script ignores Ctrl-C otherwise.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _follow(copies: list[Copy]) -> None:
    said = ""
    while True:
        began = time.monotonic()
        try:
            for copy in copies:
                copy.update()
        except (OSError, JournalError) as error:  # the storage is away; it may come back
            if said != (said := str(error)):
                print(f"sparsetune: {error}", file=sys.stderr)
        # A large sweep takes longer to read: then it is read less often.
        time.sleep(max(POLL_SECONDS, 5 * (time.monotonic() - began)))


def _reads_only(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return app(environ, start)
        start("405 Method Not Allowed", [("Content-Type", "application/json")])
        return [b'{"reason": "This is a copy of the sweep, for reading."}']

    return answer


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass
