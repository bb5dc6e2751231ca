"""Random numbers that are functions of (seed, purpose, number, layer, position).

The rule to know: there is no generator and no state. A number is a hash of its key and its
position, so it is the same on a CPU and a GPU, in a slot or alone, for a whole layer or for the
few positions that a truly sparse layer asks for. The hash is SplitMix64 (Steele, Lea & Flood
2014, "Fast splittable pseudorandom number generators", figure 13; constants copied from there).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The int64 with the same 64 bits: torch has no arithmetic on uint64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def key(seed: int, purpose: str, number: int = 0, layer: str = "") -> int:
    """The int64 that stands for one stream of random numbers, from a hash of its four names."""
    text = f"{seed}/{purpose}/{number}/{layer}".encode()
    return _signed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))


def _shift(z: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask makes it the logical shift of the paper.
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _bits(stream: Tensor | int, positions: Tensor) -> Tensor:
    z = (positions + 1) * _signed(GOLDEN) + stream
    # In place: a fresh tensor for each operation costs three times as much on a CPU.
    z.bitwise_xor_(_shift(z, 30)).mul_(_signed(MIX_1))
    z.bitwise_xor_(_shift(z, 27)).mul_(_signed(MIX_2))
    return z.bitwise_xor_(_shift(z, 31))


def uniform(stream: Tensor | int, positions: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64, one for each of the int64 `positions`, any shape."""
    return _shift(_bits(stream, positions), 11).to(torch.float64).mul_(2.0**-53)


def normal(stream: Tensor | int, positions: Tensor) -> Tensor:
    """Standard normal numbers, float64, one for each of the int64 `positions` (Box-Muller)."""
    radius = torch.sqrt(-2.0 * torch.log1p(-uniform(stream, 2 * positions)))
    return radius * torch.cos(2.0 * math.pi * uniform(stream, 2 * positions + 1))


@torch.library.custom_op("sparsetune::normal_where", mutates_args=())
def normal_where(stream: Tensor, where: Tensor) -> Tensor:
    """`normal` at the positions where `where` [N] is true, zero elsewhere; float64 [N].

    Few positions grow in an update; alone, only those are drawn. Lifted over slots their numbers
    differ, so all positions are drawn and the rest is set to zero: equal results.
    """
    out = torch.zeros(where.shape, dtype=torch.float64, device=where.device)
    positions = where.nonzero().squeeze(1)
    out[positions] = normal(stream, positions)
    return out


@normal_where.register_fake
def _(stream: Tensor, where: Tensor) -> Tensor:
    return torch.empty(where.shape, dtype=torch.float64, device=where.device)


def _normal_where_lifted(info, in_dims, stream: Tensor, where: Tensor):  # type: ignore[no-untyped-def]
    slots = info.batch_size
    stream = stream.movedim(in_dims[0], 0) if in_dims[0] is not None else stream.expand(slots)
    where = where.movedim(in_dims[1], 0) if in_dims[1] is not None else where.expand(slots, -1)
    positions = torch.arange(where.shape[1], device=where.device)
    return torch.where(where, normal(stream[:, None], positions), 0.0), 0


normal_where.register_vmap(_normal_where_lifted)
