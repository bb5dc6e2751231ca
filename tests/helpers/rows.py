"""Layers of one neuron, small enough to check by eye. Weights are mostly multiples of a power of
two, exact in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsetune.methods import METHODS, update

Layers = dict[str, Tensor]


def row(*values: float) -> Tensor:
    """A layer of one neuron."""
    return torch.tensor([list(values)], dtype=torch.float32)


def first(num: int, size: int) -> Tensor:
    """A mask of one neuron: the first `num` of `size` weights are active."""
    return (torch.arange(size) < num)[None]


def padded(size: int, values: Sequence[float], absent: float = 0.0) -> Tensor:
    """`values` first, then `absent`."""
    return row(*values, *[absent] * (size - len(values)))


def active(mask: Tensor) -> list[int]:
    return mask.flatten().nonzero().flatten().tolist()


def sizes(masks: Layers) -> list[int]:
    return [int(mask.sum()) for mask in masks.values()]


def zeros_of(weight: Tensor) -> list[int]:
    return active(weight == 0)


def counting(num: int, size: int) -> Tensor:
    """1, 2, .., num, then absent ones."""
    return padded(size, list(range(1, num + 1)))


def occurrences(
    name: str, weight: Tensor, mask: Tensor, hp: dict[str, float], num: int
) -> list[int]:
    """How often each position is active after an update, over `num` updates."""
    found = torch.zeros(weight.numel(), dtype=torch.int64)
    for number in range(num):
        masks = update(METHODS[name], {"a": weight}, {"a": mask}, hp=hp, number=number)[1]
        found += masks["a"].flatten()
    return found.tolist()
