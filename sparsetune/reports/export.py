"""A trial as one file that PyTorch loads: weights, masks, settings and what was measured.

The rule to know: the weights are those of the forward pass, masks applied, so that the network by
itself, as `models.build` makes it, computes what the trainer evaluated.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from sparsetune.machine import versions
from sparsetune.settings import to_dict
from sparsetune.space.member import Member, load_member
from sparsetune.store import journal
from sparsetune.store.journal import Trial
from sparsetune.store.layout import member_folders, trial_folder
from sparsetune.store.paths import write_whole
from sparsetune.sweeps.status import front
from sparsetune.sweeps.unchanged import check_unchanged, datasets
from sparsetune.training import checkpoint, models, trainer
from sparsetune.training.setup import setup_of

Exported = dict[str, Any]
"""state_dict of the network; masks {weight: bool tensor}; config, the trial's settings, nested;
network (input shape, number of classes); normalization {mean, deviation} [c] of images in 0..1 (the
user's arrays of floats as they are); metrics of the exported epoch; member, trial, versions."""


def export(storage: Path, name: str, which: str, file: Path) -> tuple[Member, Exported]:
    """Writes the newest checkpoint of a trial to `file`; `which`: its number, or best as in status.

    ValueError where there is no such trial, or `file` is there already.
    """
    if os.path.lexists(file):
        raise ValueError(f"'{file}' exists already; give another name, or move it away")
    folders = member_folders(storage, name)
    if len(folders) > 1:
        members = ", ".join(f"{name}/{folder.name}" for folder in folders)
        raise ValueError(f"name: '{name}' has {len(folders)} members; give one of {members}")
    member, record = load_member(folders[0])
    trial = _chosen(member, record, which)
    exported = _exported(member, record, trial, trial_folder(folders[0], trial.number))
    try:
        with write_whole(file) as stream:
            torch.save(exported, stream)
    except OSError as error:
        raise ValueError(f"'{file}' cannot be written ({error.strerror})") from error
    return member, exported


def _chosen(member: Member, record: journal.Record, which: str) -> Trial:
    if which != "best":
        if not which.isdecimal() or int(which) not in record.trials:
            raise ValueError(
                f"trial: '{which}' is neither best nor a trial of {member.name}, which has "
                f"{len(record.trials)}, counted from 0"
            )
        return record.trials[int(which)]
    best = front(member, record)
    if len(best) != 1:
        numbers = ", ".join(str(trial.number) for trial in best)
        why = (
            f"no one is best among {numbers}, by {' and '.join(member.objectives)}"
            if best
            else "none was trained to the end within its bounds"
        )
        raise ValueError(f"trial: of {member.name} {why}; give one by --trial N")
    return best[0]


def _exported(member: Member, record: journal.Record, trial: Trial, folder: Path) -> Exported:
    if not checkpoint.saved_epochs(folder):
        raise ValueError(
            f"trial: trial {trial.number} of {member.name}, which is {trial.status}, has no "
            f"checkpoint in {folder}; give another by --trial N"
        )
    check_unchanged(member, record.header, datasets([member])[0].fingerprint)
    settings = member.trial_settings(trial.params, trial.fixed)
    setup = setup_of(settings, "cpu")
    state, records = checkpoint.restore(setup, folder)
    gates = trainer.gates_of(setup, state)
    params = setup.method.sparsify(state.params, gates, state.method, setup.hp, setup.variant)
    shape, num_classes = setup.dataset.input_shape, setup.dataset.num_classes
    network = models.build(settings.model, shape, num_classes)
    # Not strict: a method's thresholds are no parameters of the network.
    network.load_state_dict(params | state.buffers, strict=False)
    mean, deviation = setup.dataset.mean, setup.dataset.deviation
    if not settings.data.normalize:
        mean, deviation = torch.zeros_like(mean), torch.ones_like(deviation)
    return {
        "state_dict": network.state_dict(),
        "masks": state.masks,
        "config": to_dict(settings),
        "network": (list(shape), num_classes),
        "normalization": {"mean": mean, "deviation": deviation},
        "metrics": records[-1],
        "member": member.name,
        "trial": trial.number,
        "versions": versions(),
    }


def to_wandb(member: Member, exported: Exported, file: Path, mode: str | None) -> str:
    """Logs the file as an artifact by a run of its own, of job type export; says where it is."""
    from sparsetune.sweeps.tracking import log_file

    wandb = member.settings.wandb
    settings = dataclasses.replace(wandb, mode=mode or wandb.mode)
    about = {key: exported[key] for key in ("member", "trial", "metrics", "versions")}
    run = {
        "job_type": "export",
        "group": member.name.partition("/")[0],
        "name": f"{member.name} trial {exported['trial']}",
        "config": exported["config"],
    }
    return log_file(settings, Path.cwd(), file, member.name, about, run)
