"""An orderly end: what a driver does between events, and when it is told to stop.

The rule to know: whatever is not in a journal yet is trained again from a checkpoint, so leaving at
any moment loses nothing; an orderly end saves the time of the running epochs.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from sparsetune.store.paths import AWAY_SECONDS, StorageAway, why

PATIENCE_SECONDS = 20.0  # how long a running epoch may take to end after Ctrl-C


class Display(Protocol):
    """Where a person sees how the sweep stands."""

    def update(self) -> None:
        """Called all the time: draws when it is due."""

    def note(self, text: str) -> None: ...


class Watch:
    """What is done between events: W&B, the table, and an orderly end after a signal.

    The first SIGINT, SIGTERM or SIGUSR1 lets running trials finish their epoch, the second, or
    PATIENCE_SECONDS, leaves them at their last checkpoints. Nothing is lost either way.
    """

    def __init__(self, send: Callable[[], None], display: Display) -> None:
        """`send` brings W&B up to date."""
        self.send, self.display = send, display
        self.leaving_since: float | None = None
        self.on_leave: Callable[[], None] = lambda: None
        self._away = False

    def tick(self) -> None:
        self.send()
        if self._away:
            self._away = False
            self.display.note("storage is back")
        self._look()

    def trouble(self, error: OSError, waited: float) -> None:
        """Storage cannot be read or written: says so, and ends the sweep when it stays away."""
        if not self._away:
            self._away = True
            self.display.note(f"waiting for storage ({why(error)})")
        if waited > AWAY_SECONDS:
            raise StorageAway(
                f"storage: away for {waited:.0f} seconds ({why(error)}); nothing that is in a "
                "journal is lost"
            ) from error
        self._look()

    def _look(self) -> None:
        self.display.update()
        if self.leaving_since and time.monotonic() - self.leaving_since > PATIENCE_SECONDS:
            raise KeyboardInterrupt

    def _signal(self, number: int, frame: FrameType | None) -> None:
        if self.leaving_since is not None:
            raise KeyboardInterrupt
        self.leaving_since = time.monotonic()
        self.display.note("leaving: running epochs are being finished; again to leave at once")
        self.on_leave()

    def install(self) -> None:
        """Called again once Ray and Tune, which install handlers of their own, have started."""
        for number in _signals():
            signal.signal(number, self._signal)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Handles signals until the end of the `with`, and swallows what they raise."""
        before = {number: signal.getsignal(number) for number in _signals()}
        self.install()
        try:
            yield
        except KeyboardInterrupt:
            if self.leaving_since is None:
                raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _signals() -> tuple[signal.Signals, ...]:
    """Those that can be handled here: Python lets the main thread alone do so."""
    main = threading.current_thread() is threading.main_thread()
    return (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) if main else ()
