"""Loss and gradients of an `MLP` by hand, without the columns of a batch that are constant.

The rule to know: a pixel with one value v in all images of a batch (a third of MNIST's: the
borders) adds v * w to the first layer, whatever the image, and the gradient of its weights is v
times that of the bias. So both products of the first layer, most of the work in such networks,
are done for the other pixels alone; the result is the same but for rounding. Rows of weights are
picked much faster than columns, so the first layer lies transposed in memory (`laid_out`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.methods.contract import Layers
from sparsetune.training.models import MLP
from sparsetune.training.setup import Setup

MULTIPLE = 16  # columns are kept in such numbers, so that a row of them is whole cache lines
WORTHWHILE = 0.85  # of the columns; with more of them to keep, picking costs what it saves
BATCHES = 64  # of the data set are looked at to know how many columns vary in one


class Columns(NamedTuple):
    """A batch [B, N]: its `kept` columns, C of them, and what the others hold in every row."""

    kept: Tensor  # [B, C] float32
    which: Tensor  # [C] int64, ascending
    others: Tensor  # [N - C] int64, ascending
    value: Tensor  # [N] float32, where the column is one of the others
    place: Tensor  # [N] int64, in `which`; -1 for the others


def width(setup: Setup) -> int:
    """C for all trials like this one; 0 where leaving columns out does not pay.

    A function of the data set, so that it is the same in every process.
    """
    settings = setup.settings
    if not isinstance(setup.model, MLP) or settings.data.augment != "none":
        return 0
    size = min(settings.train.batch_size, len(setup.train_index))
    whole = setup.dataset.train.images[: BATCHES * size].flatten(1)
    most = max(int((x != x[0]).any(0).count_nonzero()) for x in whole.split(size))
    num = -(-most // MULTIPLE) * MULTIPLE
    return num if num <= WORTHWHILE * whole.shape[1] else 0


def columns(x: Tensor, num: int) -> Columns | None:
    """`x` [B, N] taken apart into `num` kept columns and others; None where more of them vary."""
    varying = (x != x[0]).any(0)
    spare = num - int(varying.count_nonzero())
    if spare < 0:
        return None
    keep = varying | ((~varying).cumsum(0) <= spare) & ~varying
    which, others = keep.nonzero().squeeze(1), (~keep).nonzero().squeeze(1)
    place = torch.where(keep, keep.cumsum(0) - 1, -1)
    return Columns(x.index_select(1, which), which, others, x[0], place)


def laid_out(tensors: Layers, name: str) -> Layers:
    """The same, with `name` [out, in] lying in memory as [in, out]."""
    if name not in tensors:
        return tensors
    return {**tensors, name: tensors[name].t().contiguous().t()}


def gradients(params: Layers, x: Columns, labels: Tensor) -> tuple[Layers, Tensor]:
    """({parameter: gradient}, cross entropy) of weights and biases in turn, first layer first."""
    names = list(params)
    layers = list(zip(names[::2], names[1::2], strict=True))
    first, bias = layers[0]
    rows = params[first].t()
    constant = (rows[x.others] * x.value[x.others, None]).sum(0)
    z = torch.mm(x.kept, rows[x.which]) + (params[bias] + constant)
    inputs = []
    for weight, bias in layers[1:]:
        inputs.append(F.relu(z))
        z = torch.addmm(params[bias], inputs[-1], params[weight].t())
    log_p = F.log_softmax(z, 1)
    loss = F.nll_loss(log_p, labels)
    grad = (log_p.exp() - F.one_hot(labels, z.shape[1])) / len(labels)
    grads: Layers = {}
    for (weight, bias), hidden in zip(layers[:0:-1], inputs[::-1], strict=True):
        grads[bias] = grad.sum(0)
        grads[weight] = torch.mm(grad.t(), hidden)
        grad = torch.mm(grad, params[weight]) * (hidden > 0)
    first, bias = layers[0]
    grads[bias] = grad.sum(0)
    kept = torch.mm(x.kept.t(), grad)
    is_kept = x.place >= 0
    grads[first] = torch.where(
        is_kept[:, None], kept[x.place.clamp(min=0)], x.value[:, None] * grads[bias]
    ).t()
    return {name: grads[name] for name in names}, loss
