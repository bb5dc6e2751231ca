"""Training cost in floating-point operations: a multiply-add counts 2, a layer counts its density.

The rule to know: this is the cost that the method's rule implies, not what a backend spends; a
dense tensor with zeros in it costs the same seconds at every density. Element-wise work and the
topology update itself are not counted, as is usual in papers on sparse training.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode

from sparsetune.settings import ModelSettings
from sparsetune.training import models


def forward_flops(
    settings: ModelSettings, input_shape: models.Shape, num_classes: int
) -> dict[str, float]:
    """{weight name: dense forward FLOPs of its layer, per sample}.

    What is no module's `weight` (attention, functional calls) is under the key "", if there is any.
    """
    with torch.device("meta"):
        module = models.build(settings, input_shape, num_classes).eval()
        image = torch.empty(1, *input_shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(image)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    flops: dict[str, float] = {}
    for name in models.weights(module):
        owner, _, parameter = name.rpartition(".")
        # The counter names modules by path below the network's class: "MLP.fc1".
        path = ".".join(filter(None, (type(module).__name__, owner)))
        children = (f"{path}.{child}" for child, _ in module.get_submodule(owner).named_children())
        own = counts.get(path, 0) - sum(counts.get(child, 0) for child in children)
        flops[name] = float(own if parameter == "weight" else 0)
    rest = counter.get_total_flops() - sum(flops.values())
    return {**flops, "": float(rest)} if rest else flops


def trial_flops(
    forward: Mapping[str, float],
    density: Mapping[str, float],
    dense_gradient: str = "never",
    interval: float = 1,
) -> float:
    """FLOPs per sample of one training step, given each layer's forward FLOPs and density.

    Forward pass, gradient of the inputs and gradient of the weights cost the same. The last is
    dense when the method needs the gradient of absent weights: "always", or "at_update", once in
    `interval` steps. Layers without a density (the key "") are dense.
    """
    unknown = density.keys() - forward.keys()
    assert not unknown, f"densities of no layer: {sorted(unknown)}"
    dense = sum(forward.values())
    sparse = sum(flops * density.get(name, 1.0) for name, flops in forward.items())
    if dense_gradient == "always":
        return 2 * sparse + dense
    if dense_gradient == "at_update":
        return 3 * sparse + (dense - sparse) / interval
    assert dense_gradient == "never", dense_gradient
    return 3 * sparse
