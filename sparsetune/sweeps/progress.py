"""The one live table of a sweep: trials done and running, the best so far, the time left.

The rule to know: it looks at the journals' records whenever it is called, and remembers nothing of
them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Self

from rich.live import Live
from rich.table import Table

from sparsetune.space.member import Member
from sparsetune.store import journal
from sparsetune.sweeps.status import front
from sparsetune.terminal import shown, wide_console

EVERY_SECONDS = 0.5  # between two drawings in a terminal
EVERY_SECONDS_IN_FILE = 30.0  # between two lines where output is no terminal
SHARE = 0.02  # of the driver's time at most: a drawing looks at all trials, and there may be many


class Progress:
    """Draws the state of the records while a sweep runs; a line now and then in a file."""

    def __init__(self, records: Mapping[str, tuple[Member | None, journal.Record]]) -> None:
        """{name: (member, its record)}; without a member no trial of it is called the best."""
        self._records = records
        self._console = wide_console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._began = time.monotonic()
        self._due = 0.0
        self._note = ""
        self._epochs_before = self._epochs_done()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def note(self, text: str) -> None:
        """A line below the table."""
        self._note = text
        if not self._console.is_terminal:
            self._console.print(text)
        self._due = 0.0

    def epoch(self, member: str, metrics: dict[str, float], epochs: int) -> None:
        """A line for each epoch of the one trial that `sparsetune train` trains."""
        parts = [f"{member} epoch {int(metrics['epoch'])}/{epochs}"]
        for key in ("train/loss", "val/loss", "val/accuracy", "density/all"):
            if key in metrics:
                parts.append(f"{key} {metrics[key]:.4f}")
        self._console.print("  ".join([*parts, f"{metrics['device_seconds']:.1f} s"]))

    def update(self) -> None:
        """Draws, if the last time was long enough ago."""
        terminal = self._console.is_terminal
        began = time.monotonic()
        if began < self._due:
            return
        if terminal:
            self._live.update(self._table(), refresh=True)
        else:
            self._console.print(self._line())
        now = time.monotonic()
        every = EVERY_SECONDS if terminal else EVERY_SECONDS_IN_FILE
        self._due = now + max(every, (now - began) / SHARE)

    def _epochs_done(self) -> int:
        return sum(len(record.order) for _, record in self._records.values())

    def _trials(self) -> list[journal.Trial]:
        return [t for _, record in self._records.values() for t in record.trials.values()]

    def _asked(self) -> int:
        return sum(record.asked for _, record in self._records.values())

    def _left(self) -> str:
        """Time left at the pace of this driver; a trial is taken to cost what ended ones did."""
        elapsed = time.monotonic() - self._began
        ended = [trial for trial in self._trials() if trial.status != "running"]
        epochs = self._epochs_done()
        new = epochs - self._epochs_before
        if not ended or not new:
            return "time left: ?"
        expected = self._asked() * sum(len(trial.reports) for trial in ended) / len(ended)
        seconds = max(0.0, expected - epochs) * elapsed / new
        return f"time left: about {int(seconds // 60)}:{int(seconds % 60):02d}"

    def _line(self) -> str:
        trials = self._trials()
        running = sum(trial.status == "running" for trial in trials)
        done = f"{len(trials) - running}/{self._asked()}"
        return f"trials {done} done, {running} running; {self._left()}"

    def _table(self) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for heading in ("member", "done", "running", "stopped", "best", "trial"):
            table.add_column(heading, justify="left" if heading == "member" else "right")
        for name, (member, record) in self._records.items():
            trials = list(record.trials.values())
            running = sum(trial.status == "running" for trial in trials)
            best = front(member, record) if member is not None else []
            value = "-"
            if best and member is not None:
                last = best[0].reports[-1].metrics
                value = " / ".join(shown(last[objective]) for objective in member.objectives)
            table.add_row(
                name,
                f"{len(trials) - running}/{record.asked}",
                str(running),
                str(sum(trial.status == "stopped" for trial in trials)),
                value,
                str(best[0].number) if best else "-",
            )
        elapsed = int(time.monotonic() - self._began)
        table.caption = f"{elapsed // 60}:{elapsed % 60:02d} elapsed, {self._left()}  {self._note}"
        table.caption_justify = "left"
        return table
