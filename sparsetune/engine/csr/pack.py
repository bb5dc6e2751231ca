"""All slots of the csr backend as one network: a layer is ONE block-diagonal sparse matrix.

The rule to know: values are all there is. A slot's weights, biases and moments are views of flat
tensors that hold those of all slots, ordered by parameter, then slot; the index beside them is
made anew when a slot comes, goes or updates its topology. Activations are [features, batch]; slots
that see the same batches (a group) share one block of the input.

Every kernel used here computes a row, or an element, from that row or element alone and in a fixed
order, so a slot's numbers do not depend on its neighbours, to the last bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune.engine.csr.index import Blocks, Scores, blocks
from sparsetune.engine.csr.slot import Slot
from sparsetune.training import optim


class Layer:
    """One layer of all slots. Weights, biases and their gradients are parts of flat tensors."""

    def __init__(
        self, index: Blocks, weight: Tensor, bias: Tensor, weight_grad: Tensor, bias_grad: Tensor
    ) -> None:
        self.index, self.weight, self.bias = index, weight, bias
        self._bias_grad = bias_grad
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            self._weight_grad = torch.sparse_csr_tensor(
                index.row_starts, index.columns, weight_grad, index.shape, check_invariants=False
            )
        # The product below writes into the flat gradient, not into a copy.
        assert self._weight_grad.values().data_ptr() == weight_grad.data_ptr()

    def forward(self, x: Tensor) -> Tensor:
        """[rows, batch] from [columns, batch]."""
        index = self.index
        return _product(index.row_starts, index.columns, self.weight, x).add_(self.bias[:, None])

    def backward(self, dy: Tensor, x: Tensor) -> None:
        """Adds the weights' gradient to theirs (zeros: what is there is never ignored) and sets
        that of the biases, given the gradient [rows, batch] of the output."""
        torch.sparse.sampled_addmm(self._weight_grad, dy, x.t(), out=self._weight_grad)
        torch.sum(dy, 1, out=self._bias_grad)

    def backward_input(self, dy: Tensor) -> Tensor:
        """The gradient [columns, batch] of `x`."""
        index = self.index
        weight = self.weight.index_select(0, index.by_column)
        return _product(index.column_starts, index.rows, weight, dy)


def _product(starts: Tensor, columns: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """A sparse matrix in CSR form times a dense one [columns, batch].

    Weighted sums of an embedding's rows are the same thing, and run on a kernel (FBGEMM) that took
    0.4 of the time of MKL's sparse product, LeNet-300-100, torch 2.13, an EPYC with AVX-512.
    """
    return F.embedding_bag(
        columns, x, starts, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def nll(log_share: Tensor, labels: Tensor) -> Tensor:
    """-log of the share of the right class, [K, batch], from [K, classes, batch]."""
    return -log_share.gather(1, labels[:, None]).squeeze(1)


class Vectors:
    """A number of each trial as one number per value, made again only when it has changed.

    The first of `optim.step_numbers` is another one for segments that weight decay spares.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        owners: Sequence[int],
        decays: Sequence[bool],
        no_decay: float,
        device: torch.device,
    ) -> None:
        """Of each segment: values, which trial's it is, and whether weight decay applies to it."""
        repeats = torch.tensor(lengths, device=device)
        owner = torch.tensor(owners, device=device)
        spared = torch.tensor(decays, device=device).logical_not()
        self._no_decay, self._made = no_decay, dict[int, tuple[tuple[float, ...], Tensor]]()
        # Those that are spared have the number after the last trial's.
        self._decay_owner = owner.masked_fill(spared, max(owners) + 1).repeat_interleave(repeats)
        self._owner = owner.repeat_interleave(repeats)

    def __call__(self, numbers: Sequence[Sequence[float]]) -> list[Tensor]:
        """float32 [n] for each of the numbers, which are given by trial."""
        device = self._owner.device
        for place, of in enumerate(zip(*numbers, strict=True)):
            if place not in self._made or self._made[place][0] != of:
                few = torch.tensor([*of, self._no_decay], dtype=torch.float32, device=device)
                owner = self._owner if place else self._decay_owner
                self._made[place] = of, few.index_select(0, owner)
        return [vector for _, vector in self._made.values()]


class Pack:
    """Trials as one network; to be made anew when one comes, goes or changes its topology."""

    def __init__(self, slots: list[Slot]) -> None:
        setup = slots[0].setup
        self.slots, self.device = slots, setup.device
        self.width = setup.batch_size
        groups = list(dict.fromkeys(slot.group for slot in slots))
        self._group_of = [groups.index(slot.group) for slot in slots]
        self.leaders = [slots[self._group_of.index(g)] for g in range(len(groups))]
        self._group_index = torch.tensor(self._group_of, device=self.device)

        self._segments = [(name, slot) for name in slots[0].params for slot in slots]
        self._lengths = [slot.params[name].numel() for name, slot in self._segments]
        self._params = self._flatten("params")
        self._first, self._second = self._flatten("first"), self._flatten("second")
        self._grad = torch.zeros_like(self._params)
        self._optimizer = setup.settings.optimizer
        self._vectors = Vectors(
            self._lengths,
            [*range(len(slots))] * len(slots[0].params),
            [slot.setup.method.decays(name, slot.setup.variant) for name, slot in self._segments],
            optim.no_decay(self._optimizer),
            self.device,
        )

        self._layers, columns = [], len(groups) * next(iter(slots[0].shapes.values()))[1]
        self._input = torch.zeros(columns, self.width, device=self.device)
        for number, (name, shape) in enumerate(slots[0].shapes.items()):
            block_of = range(len(slots)) if number else self._group_of
            index = blocks(
                [slot.patterns[name] for slot in slots],
                shape,
                [block * shape[1] for block in block_of],
                columns,
            )
            bias = name.removesuffix("weight") + "bias"
            parts = (self._all(t, n) for t in (self._params, self._grad) for n in (name, bias))
            self._layers.append(Layer(index, *parts))
            columns = index.shape[0]
        self._activations: list[Tensor] = []
        self._upstream: list[Tensor] = []

    def _flatten(self, kind: str) -> Tensor:
        """The trials' params or moments as one tensor, of which the trials get views; empty where
        they have none."""
        held = [(getattr(slot, kind), name) for name, slot in self._segments]
        held = [(tensors, name) for tensors, name in held if name in tensors]
        if not held:
            return torch.empty(0, device=self.device)
        flat = torch.cat([tensors[name] for tensors, name in held])
        for (tensors, name), view in zip(held, flat.split(self._lengths), strict=True):
            tensors[name] = view
        return flat

    def _all(self, flat: Tensor, name: str) -> Tensor:
        """The part of a flat tensor that holds one parameter of all trials."""
        number = [segment for segment, _ in self._segments].index(name)
        start = sum(self._lengths[:number])
        return flat[start : start + sum(self._lengths[number : number + len(self.slots)])]

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Logits [K, classes, b] from each group's images [b, features]; b is at most `width`."""
        features = images[0].shape[1]
        for block, x in zip(self._input.split(features), images, strict=True):
            block[:, : len(x)] = x.t()
        self._activations = [self._input]
        for layer in self._layers[:-1]:
            self._activations.append(layer.forward(self._activations[-1]).relu_())
        logits = self._layers[-1].forward(self._activations[-1])
        return logits.view(len(self.slots), -1, self.width)[..., : len(images[0])]

    def labels(self, by_group: Sequence[Tensor]) -> Tensor:
        """[K, b] from the labels [b] of each group."""
        return torch.stack(list(by_group)).index_select(0, self._group_index)

    def gradients(self, images: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """Cross entropy [K, width] of each group's batch; the gradients of its mean are kept."""
        logits, target = self.forward(images), self.labels(labels)
        log_share = logits.log_softmax(1)
        losses = nll(log_share, target)
        # Not softmax, whose last bits depend on the slot where two threads share the work.
        dy = log_share.exp_()
        dy.scatter_add_(1, target[:, None], dy.new_full((), -1.0).expand_as(target[:, None]))
        dy = dy.div_(self.width).view(-1, self.width)
        self._grad.zero_()
        self._upstream = [dy]
        for number in reversed(range(len(self._layers))):
            layer, x = self._layers[number], self._activations[number]
            layer.backward(dy, x)
            if number:
                dy = layer.backward_input(dy)
                torch.ops.aten.threshold_backward.grad_input(dy, x, 0, grad_input=dy)
                self._upstream.insert(0, dy)
        return losses

    def optimize(self) -> None:
        """The optimizer's step that every trial's `step` counts; the gradients are used up."""
        numbers = self._vectors([slot.setup.step_numbers(slot.step) for slot in self.slots])
        optim.step_in_place(
            self._optimizer, self._params, self._grad, self._first, self._second, numbers
        )

    def gradients_of(self, k: int) -> dict[str, Tensor]:
        """Copies of trial k's gradients, by name."""
        parts = self._grad.split(self._lengths)
        return {
            name: part.clone()
            for (name, slot), part in zip(self._segments, parts, strict=True)
            if slot is self.slots[k]
        }

    def gradient_scores(self, k: int) -> Callable[[str], Scores]:
        """{layer: -|gradient|} of any weights of trial k, absent ones too, in the last batch."""

        def of_layer(name: str) -> Scores:
            shapes = self.slots[k].shapes
            number = list(shapes).index(name)
            rows, columns = shapes[name]
            block = k if number else self._group_of[k]
            # Copies: a matrix product may depend on where in memory its operands begin.
            dy = self._upstream[number][k * rows : (k + 1) * rows].clone()
            x = self._activations[number][block * columns : (block + 1) * columns].clone()

            def scores(start: int, stop: int) -> Tensor:
                first, last = start // columns, -(-stop // columns)
                grad = (dy[first:last] @ x.t()).flatten()
                return -grad[start - first * columns : stop - first * columns].abs()

            return scores

        return of_layer
