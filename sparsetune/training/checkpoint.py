"""A trial on disk: its `TrialState` and the records of its epochs so far, nothing else.

The rule to know: what is zero wherever a mask is false is stored as (flat index int64, value), so
that a checkpoint is as sparse as the trial and any backend can go on from it; everything else is
stored whole. This form of a state is a `Snapshot`, which a truly sparse backend makes without ever
making a `TrialState`. Files hold tensors, numbers and strings only and load with
`weights_only=True`.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsetune.store.paths import write_whole
from sparsetune.training import optim, trainer
from sparsetune.training.setup import Setup
from sparsetune.training.trainer import Metrics, TrialState

FORMAT = 1
Snapshot = dict[str, Any]
"""format; index, ever {layer: sorted flat positions int64}; params, first, second {name: {"value":
values at the layer's index} or {"whole": tensor}}; buffers, method {name: tensor}; counts {epoch,
step, updates, flops, diverged}. All on the CPU."""
FILE_NAME = re.compile(r"e(\d{4,})\.pt")


def _pack(tensors: dict[str, Tensor], indices: dict[str, Tensor]) -> dict[str, Any]:
    packed: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name in indices:
            values = tensor.flatten()[indices[name]]
            if int(values.count_nonzero()) == int(tensor.count_nonzero()):
                packed[name] = {"value": values.cpu()}
                continue
        packed[name] = {"whole": tensor.cpu()}
    return packed


def _unpack(packed: dict[str, Any], indices: dict[str, Tensor], setup: Setup) -> dict[str, Tensor]:
    tensors = {}
    for name, entry in packed.items():
        if "whole" in entry:
            tensors[name] = entry["whole"].to(setup.device)
            continue
        shape, value = setup.sparse[name], entry["value"]
        flat = torch.zeros(shape.numel(), dtype=value.dtype)
        tensors[name] = flat.scatter_(0, indices[name], value).view(shape).to(setup.device)
    return tensors


def encode(state: TrialState) -> Snapshot:
    """The state as nested dicts of tensors, numbers and strings."""
    indices = {name: mask.flatten().nonzero().squeeze(1) for name, mask in state.masks.items()}
    return snapshot(
        index={name: index.cpu() for name, index in indices.items()},
        ever={k: m.flatten().nonzero().squeeze(1).cpu() for k, m in state.ever.items()},
        params=_pack(state.params, indices),
        first=_pack(state.moments.first, indices),
        second=_pack(state.moments.second, indices),
        buffers={name: tensor.cpu() for name, tensor in state.buffers.items()},
        state=state,
    )


def snapshot(*, state: Any, **tensors: dict[str, Any]) -> Snapshot:
    """A `Snapshot` of these tensors and of what any backend's `state` has besides: the method's
    own state and the counts."""
    return {
        "format": FORMAT,
        **tensors,
        "method": {k: t.cpu() for k, t in state.method._asdict().items()} if state.method else {},
        "counts": {k: getattr(state, k) for k in ("epoch", "step", "updates", "flops", "diverged")},
    }


def method_state(fresh: Any, saved: Snapshot, device: torch.device) -> Any:
    """The method's own state as it was saved, of the type that a `fresh` one has."""
    return fresh and fresh._replace(**{k: t.to(device) for k, t in saved["method"].items()})


def check_format(saved: Snapshot) -> None:
    """ValueError where it was written by a version with another form of snapshots."""
    if saved["format"] != FORMAT:
        raise ValueError(
            f"checkpoint format {saved['format']}; this version of sparsetune reads {FORMAT}"
        )


def decode(setup: Setup, saved: Snapshot) -> TrialState:
    """The state that `encode` was given, on the setup's device."""
    check_format(saved)

    def mask(name: str, index: Tensor) -> Tensor:
        flat = torch.zeros(setup.sparse[name].numel(), dtype=torch.bool)
        flat[index] = True
        return flat.view(setup.sparse[name]).to(setup.device)

    index = saved["index"]
    params = _unpack(saved["params"], index, setup)
    masks = {name: mask(name, positions) for name, positions in index.items()}
    fresh, _ = trainer.begin_method(setup, params, masks)
    return TrialState(
        params=params,
        buffers={name: tensor.to(setup.device) for name, tensor in saved["buffers"].items()},
        moments=optim.Moments(
            _unpack(saved["first"], index, setup), _unpack(saved["second"], index, setup)
        ),
        masks=masks,
        ever={name: mask(name, positions) for name, positions in saved["ever"].items()},
        method=method_state(fresh, saved, setup.device),
        **saved["counts"],
    )


def save(folder: Path, snapshot: Snapshot, records: list[Metrics]) -> Path:
    """Writes `e0008.pt` into the trial's folder: whole or not at all, then drops older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    epoch = snapshot["counts"]["epoch"]
    path = folder / f"e{epoch:04d}.pt"
    with write_whole(path) as file:
        torch.save({**snapshot, "records": records}, file)
    for older in saved_epochs(folder):
        if older < epoch:
            (folder / f"e{older:04d}.pt").unlink(missing_ok=True)
    return path


def saved_epochs(folder: Path) -> list[int]:
    """Epochs of which the trial's folder holds a checkpoint, ascending."""
    if not folder.is_dir():
        return []
    matches = (FILE_NAME.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def newest(folder: Path) -> tuple[Snapshot | None, list[Metrics]]:
    """The newest checkpoint in the trial's folder, or (None, []) where there is none."""
    epochs = saved_epochs(folder)
    if not epochs:
        return None, []
    path = folder / f"e{epochs[-1]:04d}.pt"
    try:
        with path.open("rb") as file:
            saved = torch.load(file, map_location="cpu", weights_only=True)
        return saved, saved.pop("records")
    except (EOFError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path}: no readable checkpoint ({str(error).splitlines()[0][:200]}); delete the "
            "file, and the trial is trained again from its beginning"
        ) from error


def restore(setup: Setup, folder: Path) -> tuple[TrialState, list[Metrics]]:
    """The state of the newest checkpoint in the trial's folder and its records, or the beginning
    and none."""
    snapshot, records = newest(folder)
    return (trainer.begin(setup) if snapshot is None else decode(setup, snapshot)), records
