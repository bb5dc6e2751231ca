"""Data sets as tensors that stay resident, and which images are in which batch of which epoch.

The rule to know: everything random here is a function of its arguments (a seed, an epoch, a
position in the data set), never of the global generator or of what ran before. And a search never
reads the test set: `load` opens the training files alone, `load_test` the test files alone.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from sparsetune.settings import DataSettings, check_group
from sparsetune.training import sources


class Arrays(NamedTuple):
    images: Tensor  # [n, c, h, w], uint8; float32 for a user's arrays of floats
    labels: Tensor  # [n] int64


class Dataset(NamedTuple):
    name: str
    train: Arrays
    num_classes: int
    mean: Tensor  # [c] float32, of the training images; uint8 counts as 0..1, floats as they are
    deviation: Tensor  # [c] float32, likewise; 1 for a channel that never changes
    fingerprint: str  # of the training images and labels: equal exactly when they are equal

    @property
    def input_shape(self) -> tuple[int, int, int]:
        c, h, w = self.train.images.shape[1:]
        return c, h, w


def load(settings: DataSettings) -> Dataset:
    """The training images, validation share included; the test files are not opened."""
    images, labels = sources.read(settings, "train", settings.limit)
    train = Arrays(images, labels[: len(images)])
    mean, deviation = _moments(images)
    digest = hashlib.blake2b(repr((images.dtype, images.shape)).encode(), digest_size=16)
    for tensor in train:
        digest.update(tensor.contiguous().numpy().data)
    # Counted over all labels, so that a small `limit` does not lose a class.
    num_classes = int(labels.max()) + 1
    return Dataset(settings.name, train, num_classes, mean, deviation, digest.hexdigest())


def load_test(settings: DataSettings) -> Arrays:
    """The test images, all of them (`limit` is about training)."""
    return Arrays(*sources.read(settings, "test", 0))


def check(settings: DataSettings) -> None:
    """ValueError for settings that cannot work, without decoding or downloading anything."""
    check_group("data", settings)
    sources.check_source(settings)


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel, each [c] float32."""
    if images.dtype == torch.uint8:
        # A histogram is exact and spares a float64 copy, eight times the size of the images.
        channels = (images[:, channel].flatten() for channel in range(images.shape[1]))
        counts = torch.stack([torch.bincount(c, minlength=256) for c in channels]).double()
        shares = counts / counts.sum(1, keepdim=True)
        levels = torch.arange(256, dtype=torch.float64) / 255
        mean = shares @ levels
        variance = (shares * (levels - mean[:, None]).square()).sum(1)
    else:
        variance, mean = torch.var_mean(images.double(), dim=(0, 2, 3), correction=0)
    deviation = variance.sqrt()
    return mean.float(), torch.where(deviation > 0, deviation, 1.0).float()


# Order and splits ---------------------------------------------------------------------------------


def split(num: int, validation: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted positions [int64] of the images to train on and of those held out.

    At least one image is on each side when `validation` > 0, and none is held out when it is 0.
    """
    if validation == 0:
        return torch.arange(num), torch.empty(0, dtype=torch.int64)
    if num < 2:
        raise ValueError(
            f"data.validation: {validation} of {num} image leaves nothing to train on; "
            "raise data.limit, or set data.validation=0"
        )
    num_held_out = min(max(round(num * validation), 1), num - 1)
    shuffled = torch.randperm(num, generator=_generator("split", seed))
    return shuffled[num_held_out:].sort().values, shuffled[:num_held_out].sort().values


def epoch_order(num: int, order_seed: int, epoch: int) -> Tensor:
    """The order [num] int64 in which an epoch visits `num` images."""
    return torch.randperm(num, generator=_generator("order", order_seed, epoch))


def steps_per_epoch(num: int, batch_size: int) -> int:
    """Full batches in an epoch, at least one (which then has `num` images).

    The incomplete last batch is left out (other images every epoch, since the order changes):
    stacked and graph-captured training need every batch to have one shape.
    """
    return max(num // batch_size, 1)


def _generator(purpose: str, *key: int) -> torch.Generator:
    """A CPU generator keyed by all of its arguments; hashed, so that near keys are unrelated."""
    text = repr((purpose, *(int(number) for number in key))).encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
    return torch.Generator().manual_seed(seed)


# From stored images to a network's input ----------------------------------------------------------


def to_input(images: Tensor, mean: Tensor, deviation: Tensor, normalize: bool) -> Tensor:
    """float32 [n, c, h, w]: uint8 becomes 0..1, then (x - mean) / deviation if `normalize`."""
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    if not normalize:
        return images.to(torch.float32) / unit
    # One multiply-add over the images; the divisions are done once per channel.
    scale, shift = 1 / (deviation * unit), -mean / deviation
    return torch.addcmul(shift[:, None, None], images.to(torch.float32), scale[:, None, None])


class Offsets(NamedTuple):
    """What augmentation does to each image of a data set in one epoch; `to` moves it."""

    rows: Tensor  # [num] int64: the image's content moves up by so many pixels
    columns: Tensor  # [num] int64: and to the left, before a flip
    flip: Tensor  # [num] bool: left and right are exchanged

    def to(self, device: torch.device | str) -> Offsets:
        return Offsets._make(tensor.to(device) for tensor in self)


def augmentation(
    kind: str, num: int, order_seed: int, epoch: int, size: tuple[int, int]
) -> Offsets | None:
    """One epoch's draws for a data set of `num` images of `size` (height, width); "none": None.

    Drawn for the whole data set at once: an image's draw then depends on its position in the data
    set and not on the batch that it is in. "shift" reaches 2 pixels, "crop+flip" 4; less on small
    images, so that most of the content stays (8x8: 1 and 2), and a single row is not moved.
    """
    if kind == "none":
        return None
    generator = _generator("augment", order_seed, epoch)

    def moves(pixels: int) -> Tensor:
        reach = min(2, pixels // 8) if kind == "shift" else min(4, pixels // 4)
        return torch.randint(-reach, reach + 1, (num,), generator=generator)

    rows, columns = moves(size[0]), moves(size[1])
    flip = torch.rand(num, generator=generator) < (0.5 if kind == "crop+flip" else 0.0)
    return Offsets(rows, columns, flip)


def augment(images: Tensor, offsets: Offsets | None, positions: Tensor) -> Tensor:
    """The images [n, c, h, w] moved and flipped, zeros where nothing was; dtype and device kept.

    `positions` [n] says which image of the data set each of them is.
    """
    if offsets is None:
        return images
    height, width = images.shape[-2:]
    y, x = (torch.arange(size, device=images.device) for size in (height, width))
    rows = y + offsets.rows[positions, None]  # [n, h], the row that each row is taken from
    columns = torch.where(offsets.flip[positions, None], width - 1 - x, x)
    columns = columns + offsets.columns[positions, None]
    rows_inside = (rows >= 0) & (rows < height)
    columns_inside = (columns >= 0) & (columns < width)
    inside = rows_inside[:, :, None] & columns_inside[:, None, :]
    # Each pixel's source as one number, the same for all channels; outside ones read any pixel.
    source = rows[:, :, None] * width + columns[:, None, :]
    source = source.clamp(0, height * width - 1).flatten(1)[:, None, :]
    moved = images.flatten(2).gather(2, source.expand(-1, images.shape[1], -1))
    return moved.view(images.shape) * inside[:, None]
