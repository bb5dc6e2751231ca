"""The few operations that the rules of all methods are made of.

The rule to know: everything here works on one model and lifts to many with `torch.vmap`, with
equal results. Counts are float64 tensors holding whole numbers (float32 `ceil(0.3 * n)` is wrong
for one n in 23), and sums over layers are taken in the order of the layers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

SAMPLE = 1000  # scores looked at to guess where the k-th lowest lies
ROUNDING = 1e-9  # what float64 arithmetic may leave beside the number that was meant


@torch.library.custom_op("sparsetune::lowest", mutates_args=())
def lowest(score: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """The `count` positions of lowest `score` among the `eligible`, as a bool mask.

    `score` [N] of any float dtype (NaN counts as the highest), `eligible` [N] bool, `count` a
    0-d tensor; more than there are eligible means all of them. Ties go to the lower position.
    Alone, a selection by a count that the host knows; the ranks that a lifted call needs cost
    ten times as much.
    """
    scores = _finite(_among(score, eligible))
    wanted = min(int(count), len(scores))
    if wanted <= 0:
        return torch.zeros_like(eligible)
    last = _kth_lowest(scores, wanted)
    # Compared against `last`, what is not finite falls on the side where _finite puts it, unless
    # `last` itself is such a value.
    score = _finite(score) if abs(last) == torch.finfo(score.dtype).max else score
    chosen = eligible & (score <= last)
    surplus = int(chosen.count_nonzero()) - wanted
    if surplus:
        tied = (chosen & (score == last)).nonzero().squeeze(1)
        chosen[tied[len(tied) - surplus :]] = False
    return chosen


def _in_numpy(score: Tensor) -> bool:
    """NumPy picks and selects on a CPU in a quarter of the time that torch takes."""
    return score.device.type == "cpu" and score.dtype in (torch.float32, torch.float64)


def _among(score: Tensor, eligible: Tensor) -> Tensor:
    if not _in_numpy(score):
        return score[eligible]
    return torch.from_numpy(score.numpy()[eligible.numpy()])


def _kth_lowest(scores: Tensor, k: int) -> float:
    if not _in_numpy(scores):
        return float(scores.kthvalue(k).values)
    values = scores.numpy()
    if 4 * k < len(values) and len(values) > 10 * SAMPLE:
        # A sample's quantile a little above the k-th leaves few to select from. Where it turns out
        # to be below, all are taken; the result is the same.
        sample = np.sort(values[:: len(values) // SAMPLE])
        few = values[values <= sample[(5 * k * len(sample)) // (4 * len(values)) + 8]]
        values = few if len(few) >= k else values
    return float(np.partition(values, k - 1)[k - 1])


@lowest.register_fake
def _(score: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    return torch.empty_like(eligible)


def _finite(score: Tensor) -> Tensor:
    top = torch.finfo(score.dtype).max
    return score.nan_to_num(nan=top, posinf=top, neginf=-top)


def _lowest_lifted(info, in_dims, score: Tensor, eligible: Tensor, count: Tensor):  # type: ignore[no-untyped-def]
    slots = info.batch_size
    score, eligible = (
        tensor.movedim(dim, 0) if dim is not None else tensor.expand(slots, -1)
        for tensor, dim in zip((score, eligible), in_dims[:2], strict=True)
    )
    count = count if in_dims[2] is not None else count.expand(slots)
    order = _finite(score).masked_fill(~eligible, math.inf).argsort(dim=1, stable=True)
    places = torch.arange(score.shape[1], device=score.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    return eligible & (ranks < count[:, None]), 0


lowest.register_vmap(_lowest_lifted)


def snapped(amount: Tensor) -> Tensor:
    """`amount`, or the whole or half number that it was meant to be: 0.29 * 100 is 29.

    Before floor, ceil and round, so that counts are those one works out by hand.
    """
    near = torch.round(2 * amount) / 2
    return torch.where((amount - near).abs() <= ROUNDING * (1 + 1e-6 * near.abs()), near, amount)


def count(selected: Tensor) -> Tensor:
    """How many of a bool tensor are true: float64, 0-d."""
    return selected.count_nonzero().to(torch.float64)


def mean_magnitude(values: Tensor, selected: Tensor) -> Tensor:
    """Mean |value| over the `selected` positions, float64; 0 where none is selected or it is
    not finite (a diverged trial must not turn counts into NaN)."""
    total = values.abs().masked_fill(~selected, 0).sum(dtype=torch.float64)
    return (total / count(selected).clamp(min=1)).nan_to_num(nan=0.0, posinf=0.0)


def stack(per_layer: dict[str, Tensor]) -> Tensor:
    """[L] from one 0-d tensor per layer, in the order of the layers."""
    return torch.stack(list(per_layer.values()))


def total(values: Tensor) -> Tensor:
    """The sum of [L], added from the first layer to the last wherever it runs."""
    return values.cumsum(-1)[..., -1]


def below(values: Tensor, threshold: Tensor) -> Tensor:
    """|value| < threshold, bool [N]; equality as the values' dtype sees it, so that 0.7 is not
    below 0.7 in float32, alone and lifted alike (PyTorch compares in the dtype of a batched
    threshold, but not of a 0-d one)."""
    return values.abs() < threshold.to(values.dtype)


def keep_one(keep: Tensor, value: Tensor, valid: Tensor) -> Tensor:
    """`keep`, or the largest |value| of the layer where `keep` would empty it."""
    largest = lowest(-value.abs(), valid, torch.ones((), dtype=torch.float64, device=value.device))
    return keep | (largest & ~keep.any())


def annealed(kind: str, start: Tensor, end: float, progress: Tensor) -> Tensor:
    """A rate that goes from `start` to `end` as `progress` goes from 0 to 1.

    `kind` is "cosine" (half a period), "linear" (to zero) or "none".
    """
    progress = progress.clamp(0, 1)
    if kind == "cosine":
        return end + (start - end) * (1 + torch.cos(math.pi * progress)) / 2
    if kind == "linear":
        return start * (1 - progress)
    return start


def proportional(shares: Tensor, amount: Tensor, caps: Tensor) -> Tensor:
    """min(caps, x * shares) with x such that the sum is `amount`; all [L] float64.

    Layers with a share of zero get nothing. Where `amount` is more than the caps of the others
    allow, those are full and the rest is left over. Closed form: layers fill in the order of
    caps / shares, so one sort finds which are full.
    """
    fills_at = torch.where(shares > 0, caps / shares.clamp(min=1e-300), math.inf)
    order = fills_at.argsort(stable=True)
    caps_sorted, shares_sorted = caps[order], shares[order]
    full_before = caps_sorted.cumsum(0) - caps_sorted
    sharing = shares_sorted.flip(0).cumsum(0).flip(0)
    scale = (amount - full_before).clamp(min=0) / sharing.clamp(min=1e-300)
    # The first place in that order whose scale does not yet fill its own layer is the answer;
    # where there is none, every layer with a share is full.
    fits = (scale <= fills_at[order]) & (sharing > 0)
    first = torch.arange(len(shares), device=shares.device).masked_fill(~fits, len(shares)).amin()
    everything = torch.cat([scale, scale.new_full((1,), math.inf)])
    x = everything.gather(0, first[None])[0]
    return torch.where(shares > 0, torch.minimum(caps, x * shares.clamp(min=1e-300)), 0.0)


def apportion(shares: Tensor, amount: Tensor, caps: Tensor) -> Tensor:
    """Whole numbers in proportion to `shares`, none above its cap, their sum exactly `amount`.

    Largest remainders get the units that rounding down leaves, ties to the earlier layer. What
    layers with a share cannot take goes to the others in proportion to their room; where all are
    full, the sum is that of the caps. All [L] float64.
    """
    amount = torch.minimum(amount, total(caps))
    fill = proportional(shares, amount, caps)
    room = caps - fill
    fill = fill + proportional(room, amount - total(fill), room)
    whole = torch.floor(snapped(fill))
    # Rounded, or what float64 leaves of 18/7 - 2 would lose against 4/7.
    remainder = torch.where(whole < caps, fill - whole, -1.0).round(decimals=9)
    order = remainder.argsort(descending=True, stable=True)
    places = torch.arange(len(shares), device=shares.device)
    ranks = torch.zeros_like(order).scatter(0, order, places)
    return whole + (ranks < amount - total(whole)).to(torch.float64)


def water_fill(wanted: Tensor, caps: Tensor) -> Tensor:
    """min(wanted + x, caps) with the x >= 0 that hands what is above the caps to the others.

    What Sparse Momentum's published loop (`calc_growth_redistribution`) converges to: it splits
    the overflow equally over all layers until none is left, full ones bouncing theirs back.
    """
    overflow = total((wanted - caps).clamp(min=0))
    room = (caps - wanted).clamp(min=0)
    return torch.minimum(wanted, caps) + proportional(torch.ones_like(room), overflow, room)
