"""Where the active weights of sparse layers are, as sorted flat positions; nothing of a layer's
size is ever made.

The rule to know: a draw or a score over all positions of a layer is taken in chunks, of which only
the lowest so far are kept, so the choice equals that from the whole and needs a chunk's memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetune.methods import noise
from sparsetune.methods.ops import lowest

CHUNK = 1 << 18  # positions looked at together

Scores = Callable[[int, int], Tensor]  # (start, stop) -> scores of these positions, any float dtype


class Pattern(NamedTuple):
    """One layer [out, in] of one slot: its n active positions by row, and by column where the
    gradient of the layer's input is needed."""

    positions: Tensor  # [n] int64, sorted, row * in + column
    columns: Tensor  # [n] int32
    ends: Tensor  # [out] int32, active weights up to the end of each row
    by_column: Tensor  # [n] int32, places in `positions`, in the order of the columns
    rows: Tensor  # [n] int32, in that order
    column_ends: Tensor  # [in] int32


def pattern(index: Tensor, shape: torch.Size, with_columns: bool) -> Pattern:
    rows, columns = index // shape[1], index % shape[1]
    nothing = torch.empty(0, dtype=torch.int32, device=index.device)
    by_column, sorted_rows, column_ends = nothing, nothing, nothing
    if with_columns:
        order = columns.argsort(stable=True)
        by_column, sorted_rows = order.int(), rows[order].int()
        column_ends = _ends(columns, shape[1])
    return Pattern(index, columns.int(), _ends(rows, shape[0]), by_column, sorted_rows, column_ends)


def _ends(places: Tensor, num: int) -> Tensor:
    return torch.bincount(places, minlength=num).cumsum(0).int()


class Blocks(NamedTuple):
    """One layer of all slots as a block-diagonal matrix of `rows` x `columns`, int32 indices."""

    shape: tuple[int, int]
    row_starts: Tensor  # [rows + 1]
    columns: Tensor  # [n]
    by_column: Tensor  # [n], or [0] where the input's gradient is not needed, as the next two
    column_starts: Tensor  # [columns + 1]
    rows: Tensor  # [n]


def blocks(
    patterns: list[Pattern], shape: torch.Size, first_columns: list[int], columns: int
) -> Blocks:
    """The slots' patterns of a layer of `shape`, slot k's first column at `first_columns[k]`."""
    begins = [0]
    for layer in patterns:
        begins.append(begins[-1] + len(layer.positions))
    zero = torch.zeros(1, dtype=torch.int32, device=patterns[0].positions.device)
    slots = range(len(patterns))
    return Blocks(
        (len(patterns) * shape[0], columns),
        torch.cat([zero, *(patterns[k].ends + begins[k] for k in slots)]),
        torch.cat([patterns[k].columns + first_columns[k] for k in slots]),
        torch.cat([patterns[k].by_column + begins[k] for k in slots]),
        torch.cat([zero, *(patterns[k].column_ends + begins[k] for k in slots)]),
        torch.cat([patterns[k].rows + k * shape[0] for k in slots]),
    )


# Choosing positions -------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _uniform_chunk(stream: int, device: torch.device, start: int, stop: int) -> Tensor:
    """`noise.uniform` of a layer's positions. The newest chunks are remembered: trials of one seed,
    as all trials of a search are, draw the same."""
    return noise.uniform(stream, torch.arange(start, stop, device=device))


def lowest_positions(
    scores: Scores, size: int, excluded: Tensor, num: int, guess: float = float("inf")
) -> Tensor:
    """The `num` positions of lowest score among `size`, but for the sorted `excluded`: sorted
    int64. As `ops.lowest`: ties go to the lower position, NaN counts as the highest; where there
    are fewer than `num`, all. `guess`: a score that the answer is probably below, to save time.
    """
    num = min(num, size - len(excluded))
    if num <= 0:
        return excluded[:0]
    # One piece of memory for what is found: small ones, left behind between the chunks, would keep
    # the allocator from using the chunks' memory again.
    room = min(2 * num + CHUNK, size)
    positions = torch.empty(room, dtype=torch.int64, device=excluded.device)
    values = torch.empty(0, device=excluded.device)
    bound, used = guess, 0
    for start in range(0, size, CHUNK):
        chunk = scores(start, min(start + CHUNK, size))
        if not start:
            values = chunk.new_empty(room)
        places = _open_places(chunk, start, excluded, bound)
        torch.add(places, start, out=positions[used : used + len(places)])
        torch.index_select(chunk, 0, places, out=values[used : used + len(places)])
        used += len(places)
        # Not at every chunk: a choice among many costs more than looking at a chunk.
        if used > 2 * num:
            best = _lowest(values[:used], num)
            positions[:num], values[:num] = positions[:used][best], values[:used][best]
            bound, used = float(values[:num].nan_to_num(nan=float("inf")).max()), num
    if used < num:
        return lowest_positions(scores, size, excluded, num)
    return positions[:used][_lowest(values[:used], num)]


def _open_places(chunk: Tensor, start: int, excluded: Tensor, bound: float) -> Tensor:
    """Places in a chunk of scores that are not excluded and below the bound."""
    is_open = torch.ones(len(chunk), dtype=torch.bool, device=chunk.device)
    ends = torch.tensor([start, start + len(chunk)], device=excluded.device)
    first, last = torch.searchsorted(excluded, ends).tolist()
    is_open[excluded[first:last] - start] = False
    if bound < float("inf"):
        # Strictly: an equal score at a higher position loses.
        is_open &= chunk < bound
    return is_open.nonzero().squeeze(1)


def _lowest(scores: Tensor, num: int) -> Tensor:
    eligible = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    return lowest(scores, eligible, torch.tensor(float(num), dtype=torch.float64))


def random_positions(
    stream: int, size: int, excluded: Tensor, num: int, device: torch.device
) -> Tensor:
    """`num` random positions among `size` without the sorted `excluded`: sorted int64."""
    share = (num + 4 * num**0.5 + 4) / max(size - len(excluded), 1)
    scores = functools.partial(_uniform_chunk, stream, device)
    return lowest_positions(scores, size, excluded, num, guess=share)


# Sets of positions, as sorted tensors -------------------------------------------------------------


def find(positions: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """(where each position is in the sorted `among`, whether it is there at all)."""
    places = torch.searchsorted(among, positions)
    if not len(among):
        return places, torch.zeros_like(positions, dtype=torch.bool)
    places = places.clamp(max=len(among) - 1)
    return places, among[places] == positions


def merge(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(both together, sorted, and their order in `torch.cat([first, second])`)."""
    both = torch.cat([first, second])
    if both.device.type == "cpu":
        # NumPy sees that there are two sorted runs: a tenth of torch's time.
        order = torch.from_numpy(both.numpy().argsort(kind="stable"))
    else:
        order = both.argsort(stable=True)
    return both[order], order


def union(first: Tensor, second: Tensor) -> Tensor:
    return merge(first, second)[0].unique_consecutive()


def num_missing(positions: Tensor, among: Tensor) -> int:
    """How many of the positions are not among the others."""
    return len(union(positions, among)) - len(among)
