"""How many weights each layer gets, and where: exact counts, masks drawn from the trial's seed.

The rule to know: counts are whole numbers that add up to the asked total exactly, at least one in
every layer. They are computed on the host, once per trial, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from sparsetune.methods import noise
from sparsetune.methods.contract import Layers, Shapes
from sparsetune.methods.ops import apportion, lowest, proportional


def _raw(shape: torch.Size, distribution: str) -> float:
    """A layer's density up to the common factor, before it is clipped to 1."""
    if distribution == "uniform":
        return 1.0
    # er: Mocanu et al. 2018, equation 1, (in + out) / (in * out); erk adds the kernel's sides
    # (Evci et al. 2020, appendix A).
    sides = shape if distribution == "erk" else shape[:2]
    return sum(sides) / float(torch.Size(sides).numel())


def counts(shapes: Shapes, total: int, distribution: str) -> dict[str, int]:
    """Active weights per layer, {name: count}, adding up to `total` exactly.

    The density of a layer is a common factor times its distribution's term, clipped at 1; layers
    that are full hand the rest to the others. Every layer gets at least one weight. ValueError
    where `total` is below the number of layers or above their size.
    """
    sizes = torch.tensor([shape.numel() for shape in shapes.values()], dtype=torch.float64)
    if not len(shapes) <= total <= int(sizes.sum()):
        raise ValueError(
            f"{total} weights do not fit {len(shapes)} sparse layers of {int(sizes.sum())} "
            "positions: at least one for each layer"
        )
    raw = torch.tensor([_raw(s, distribution) for s in shapes.values()], dtype=torch.float64)
    amount = torch.tensor(float(total), dtype=torch.float64)
    share = raw * sizes
    single = torch.zeros_like(share, dtype=torch.bool)
    # Layers that would get less than one weight get one, and the others share what is left; that
    # may bring another one below one, but each round settles a layer.
    while bool((few := ~single & (_shared(share, amount, sizes, single) < 1)).any()):
        single |= few
    open_sizes = sizes.masked_fill(single, 0)
    shared = apportion(share.masked_fill(single, 0), amount - single.sum(), open_sizes)
    whole = torch.where(single, 1.0, shared)
    return {name: int(num) for name, num in zip(shapes, whole, strict=True)}


def _shared(share: Tensor, amount: Tensor, sizes: Tensor, single: Tensor) -> Tensor:
    """Weights of the layers that are not `single`, not yet rounded, [L]."""
    open_sizes = sizes.masked_fill(single, 0)
    return proportional(share.masked_fill(single, 0), amount - single.sum(), open_sizes)


def split_layers(weights: Shapes, dense_layers: Iterable[str]) -> tuple[Shapes, Shapes]:
    """(sparse, dense) weights, from names and the presets first, last and conv.

    A name may leave out its ".weight". ValueError names what is unknown and what there is.
    """
    names = list(weights)
    dense = set()
    for word in dense_layers:
        if word in ("first", "last"):
            dense.add(names[0 if word == "first" else -1])
        elif word == "conv":
            dense.update(name for name, shape in weights.items() if len(shape) > 2)
        elif word in weights or f"{word}.weight" in weights:
            dense.add(word if word in weights else f"{word}.weight")
        else:
            raise ValueError(
                f"dense_layers: '{word}' is no weight of this network; allowed: first, last, "
                f"conv, {', '.join(names)}"
            )
    sparse = {name: shape for name, shape in weights.items() if name not in dense}
    return sparse, {name: shape for name, shape in weights.items() if name in dense}


def total_for(sparse: Shapes, dense: Shapes, density: float, over: str) -> int:
    """Active weights in the sparse layers for `density` over all weights, or over sparse ones.

    ValueError with the smallest density that can be reached: dense layers whole, one weight in
    each sparse layer.
    """
    size = sum(shape.numel() for shape in sparse.values())
    whole = sum(shape.numel() for shape in dense.values()) if over == "all" else 0
    asked = round(density * (size + whole)) - whole
    if asked < len(sparse) or density > 1:
        # Rounded up, so that what the message says can be used.
        least = math.ceil(1e7 * (len(sparse) + whole) / (size + whole)) / 1e7
        raise ValueError(
            f"density: {density:g} cannot be reached; this network allows {least:.7g} "
            f"to 1 (density_over: {over}, {whole} weights left dense, one in each sparse layer)"
        )
    return asked


def random_masks(shapes: Shapes, num: dict[str, int], seed: int) -> Layers:
    """Bool masks of the layers' shapes, `num[name]` random positions true in each."""
    masks = {}
    for name, shape in shapes.items():
        size = shape.numel()
        drawn = noise.uniform(noise.key(seed, "mask", 0, name), torch.arange(size))
        everywhere = torch.ones(size, dtype=torch.bool)
        masks[name] = lowest(drawn, everywhere, _count(num[name])).view(shape)
    return masks


def _count(num: int) -> Tensor:
    return torch.tensor(float(num), dtype=torch.float64)
