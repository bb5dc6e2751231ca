"""From the journals to W&B: what it lacks at the start of a driver, then what comes.

The rule to know: the journals alone are read, so after any interruption the same code back-fills.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from sparsetune.settings import to_dict
from sparsetune.space.member import Member
from sparsetune.store.journal import Trial
from sparsetune.store.paths import S3Path
from sparsetune.sweeps.create import Writable
from sparsetune.sweeps.tracking import Tracker


class Recording:
    def __init__(self, members: list[Writable], folder: Path) -> None:
        header = members[0].journal.record.header
        self.tracker = Tracker(members[0].member.settings.wandb, header["sweep_id"], folder)
        self._members = members
        self._sent: dict[str, dict[int, int]] = {writable.name: {} for writable in members}
        self._first_open = {writable.name: 0 for writable in members}

    def send(self, last: bool = False) -> None:
        """As much as W&B can take for now, and the `last` time all."""
        if self.tracker.mode == "disabled":
            return
        for writable in self._members:
            record, sent = writable.record, self._sent[writable.name]
            start = self._first_open[writable.name]
            for number in range(start, len(record.trials)):
                if self.tracker.behind and not last:
                    return
                self._send_trial(writable, number, sent)
                # Ended and sent trials at the front need not be looked at again.
                if number == self._first_open[writable.name] and sent.get(number) == -1:
                    self._first_open[writable.name] += 1

    def _send_trial(self, writable: Writable, number: int, sent: dict[int, int]) -> None:
        trial, name = writable.record.trials[number], writable.name
        if sent.get(number) == -1:
            return
        about = self.about(writable, trial)
        if about is None:
            return
        if number not in sent:
            recorded = self.tracker.recorded(name, number, len(trial.failures))
            if trial.status != "running" and recorded == trial.status:
                sent[number] = -1
                return
            group, job_type = about
            self.tracker.start(
                name,
                number,
                name=writable.member.run_name(trial.params | trial.fixed, number),
                group=group,
                job_type=job_type,
                config=to_dict(writable.member.trial_settings(trial.params, trial.fixed))
                | {"member": name, "trial": number},
            )
            sent[number] = 0
        for epoch, metrics, _ in trial.reports[sent[number] :]:
            self.tracker.log(name, number, epoch, metrics)
            sent[number] = epoch
        if trial.status != "running" and self.complete(writable, trial):
            best = summary(writable.member, trial)
            self.tracker.finish(name, number, trial.status, best, len(trial.failures))
            sent[number] = -1

    def about(self, writable: Writable, trial: Trial) -> tuple[str, str] | None:
        """(group, job type) of the trial's run; None where that is not known yet."""
        return writable.name.partition("/")[0], writable.member.traits.name

    def complete(self, writable: Writable, trial: Trial) -> bool:
        """Has a trial that has ended all that its run is to hold?"""
        return True


def summary(member: Member, trial: Trial) -> dict[str, float]:
    """The best value that each objective had in any epoch of the trial, and what it does on the
    test images where they were read, for reading in W&B."""
    best = dict(trial.test or {})
    for name, direction in zip(member.objectives, member.directions, strict=True):
        values = [r.metrics[name] for r in trial.reports if math.isfinite(r.metrics[name])]
        if values:
            best[f"best/{name}"] = max(values) if direction == "maximize" else min(values)
    return best


def wandb_folder(writable: Writable) -> Path:
    """Where W&B's own files go: beside the journals, or, as W&B writes local files alone, below the
    working directory. Whoever resumes elsewhere has all epochs back-filled from the journals; so of
    several such folders upload the last one, which is complete, or rows stand twice."""
    if not isinstance(writable.folder, S3Path):
        return writable.folder.parent
    name = f"{writable.folder.parent.name}-{writable.record.header['sweep_id'][:8]}"
    folder = Path("wandb", name).absolute()
    if writable.member.settings.wandb.mode != "disabled":
        print(f"W&B's files go to {folder}.", file=sys.stderr)
    return folder
