"""Truly sparse trials together: a layer of all slots is ONE block-diagonal sparse matrix.

The rule to know: values are all there is. A slot's weights, biases and moments are views of flat
tensors that hold those of all slots, ordered by parameter, then slot; the index beside them is
made anew when a slot comes, goes or updates its topology. Activations are [features, batch]; slots
that see the same batches (a group) share one block of the input.

Every kernel used here computes a row, or an element, from that row or element alone and in a fixed
order, so a slot's numbers do not depend on its neighbours, to the last bit.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetune import data, models, trainer
from sparsetune.checkpoint import Snapshot
from sparsetune.engine import csr_index, csr_optim, csr_trial
from sparsetune.engine.csr_index import Scores
from sparsetune.engine.csr_trial import Trial
from sparsetune.trainer import Metrics, Setup

Batch = tuple[Tensor, Tensor]  # images [b, features] float32, labels [b]


def unfit(setup: Setup) -> str:
    """Why trials like this one cannot be trained here, in one sentence; "" where they can."""
    settings = setup.settings
    if type(setup.model) is not models.MLP:
        return f"model.name: csr trains mlp and lenet300100, not {settings.model.name}"
    if setup.method.begins != "sparse":
        return f"method: {settings.method} begins dense"
    if setup.method.dense_gradient(setup.variant) == "always":
        return f"method: {settings.method}, as set, needs dense gradients at every step"
    if settings.train.precision != "float32":
        return f"train.precision: csr computes in float32, not {settings.train.precision}"
    return ""


class Csr:
    """See `pool.Backend`."""

    def __init__(self, slots: int) -> None:
        self._trials: dict[int, Trial] = {}
        self._pack: Pack | None = None  # None: to be made

    def attach(self, slot: int, setup: Setup, start: Snapshot | None) -> None:
        trial = csr_trial.begin(setup) if start is None else csr_trial.restore(setup, start)
        self._trials[slot], self._pack = trial, None

    def snapshot(self, slot: int) -> Snapshot:
        return csr_trial.snapshot(self._trials[slot])

    def detach(self, slot: int) -> None:
        del self._trials[slot]
        self._pack = None

    @torch.no_grad()
    def advance(self) -> dict[int, Metrics]:
        began = time.perf_counter()
        trials = list(self._trials.values())
        if self._pack is None:
            self._pack = Pack(trials)
        earlier = [(trial.index(), trial.updates) for trial in trials]
        losses = self._train(self._pack)
        validation = _validate(self._pack)
        results = {}
        sizes = [trial.num_values for trial in trials]
        for k, (slot, trial) in enumerate(self._trials.items()):
            metrics = {"epoch": trial.epoch + 1, "train/loss": losses[k]} | validation[k]
            results[slot] = _ended(trial, metrics, *earlier[k])
        seconds = time.perf_counter() - began
        for metrics, size in zip(results.values(), sizes, strict=True):
            metrics["device_seconds"] = seconds * size / sum(sizes)
        return results

    def _train(self, pack: Pack) -> list[float]:
        """One epoch of steps and updates of all trials, and the mean loss of each."""
        trials, counted = pack.trials, [0] * len(pack.trials)
        for trial in trials:
            trial.active_steps = dict.fromkeys(trial.setup.sparse, 0)
        total = torch.zeros(len(trials), pack.width, dtype=torch.float64, device=pack.device)
        batches = zip(*(_training_batches(trial) for trial in pack.leaders), strict=True)
        for number, batch in enumerate(batches, start=1):
            total += pack.gradients(*zip(*batch, strict=True))
            lrs = [trial.learning_rate() for trial in trials]
            for trial in trials:
                trial.step += 1
            due = [k for k, trial in enumerate(trials) if trial.is_due()]
            # An update reads the gradients, which the optimizer's step uses up.
            grads = {k: pack.gradients_of(k) for k in due}
            pack.optimize(lrs)
            for k in due:
                trials[k].count_active(number - counted[k])
                counted[k] = number
                csr_trial.update_topology(trials[k], grads[k], pack.gradient_scores(k))
            if due:
                self._pack = pack = Pack(trials)
        steps = trials[0].setup.steps_per_epoch
        for trial, done in zip(trials, counted, strict=True):
            trial.count_active(steps - done)
        return [float(row.sum()) / (steps * pack.width) for row in total]


def _training_batches(trial: Trial) -> Iterator[Batch]:
    """The batches of the trial's next epoch, as `trainer.train_epoch` makes them."""
    setup = trial.setup
    settings, dataset = setup.settings, setup.dataset
    order = data.epoch_order(len(setup.train_index), trial.order_seed, trial.epoch)
    height, width = dataset.train.images.shape[-2:]
    offsets = data.augmentation(
        settings.data.augment,
        len(dataset.train.labels),
        trial.order_seed,
        trial.epoch,
        (height, width),
    )
    offsets = None if offsets is None else offsets.to(setup.device)
    places = order.to(setup.device).split(settings.train.batch_size)[: setup.steps_per_epoch]
    for place in places:
        index = setup.train_index[place]
        images = data.augment(dataset.train.images.index_select(0, index), offsets, index)
        yield _batch(setup, images, index)


def _validation_batches(setup: Setup, size: int) -> Iterator[Batch]:
    for index in setup.validation_index.split(size):
        yield _batch(setup, setup.dataset.train.images.index_select(0, index), index)


def _batch(setup: Setup, images: Tensor, index: Tensor) -> Batch:
    dataset, normalize = setup.dataset, setup.settings.data.normalize
    x = data.to_input(images, dataset.mean, dataset.deviation, normalize)
    return x.flatten(1), dataset.train.labels[index]


def _validate(pack: Pack) -> list[Metrics]:
    """`val/loss` and `val/accuracy` of each trial, where images are held out."""
    num = len(pack.trials[0].setup.validation_index)
    if not num:
        return [{} for _ in pack.trials]
    size = (len(pack.trials), pack.width)
    loss = torch.zeros(size, dtype=torch.float64, device=pack.device)
    right = torch.zeros(size, dtype=torch.int64, device=pack.device)
    # Groups in other epochs or orders may hold out the same images.
    splits = {leader.split_seed: leader.setup for leader in pack.leaders}
    batches = (_validation_batches(setup, pack.width) for setup in splits.values())
    for batch in zip(*batches, strict=True):
        of = dict(zip(splits, batch, strict=True))
        images, labels = zip(*(of[leader.split_seed] for leader in pack.leaders), strict=True)
        logits, target = pack.forward(images), pack.labels(labels)
        loss[:, : target.shape[1]] += cross_entropy(logits, target)
        right[:, : target.shape[1]] += logits.argmax(1) == target
    return [
        {"val/loss": float(losses.sum()) / num, "val/accuracy": float(rights.sum()) / num}
        for losses, rights in zip(loss, right, strict=True)
    ]


def _ended(
    trial: Trial, metrics: Metrics, earlier: dict[str, Tensor], updates_before: int
) -> Metrics:
    """Ends the trial's epoch: all metrics that `trainer.train_epoch` gives but the seconds."""
    setup = trial.setup
    num, batch_size = setup.steps_per_epoch, setup.settings.train.batch_size
    index = trial.index()
    metrics |= trainer.density_metrics(
        setup,
        active={name: len(at) for name, at in index.items()},
        seen=sum(map(len, trial.ever.values())),
        new=sum(csr_index.num_missing(at, earlier[name]) for name, at in index.items()),
    )
    own = setup.method.metrics(trial.params, trial.method, setup.hp)
    metrics |= {f"method/{name}": float(value) for name, value in own.items()}
    active = torch.tensor([total / num for total in trial.active_steps.values()])
    flops = trainer.epoch_flops(setup, active, trial.updates - updates_before)
    trial.epoch += 1
    trial.flops += flops * num * min(batch_size, len(setup.train_index))
    metrics |= {"flops/train": flops, "flops/total": trial.flops}
    trial.diverged = trainer.has_diverged(trial.params, metrics)
    metrics["diverged"] = float(trial.diverged)
    return metrics


# All slots as one network -------------------------------------------------------------------------


class Layer:
    """One layer of all slots. `weight`, `bias` and `grads` of the two are views of flat tensors."""

    def __init__(
        self,
        index: csr_index.Stacked,
        weight: Tensor,
        bias: Tensor,
        weight_grad: Tensor,
        bias_grad: Tensor,
    ) -> None:
        self.index, self.weight, self.bias = index, weight, bias
        self._bias_grad = bias_grad
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            self._weight_grad = torch.sparse_csr_tensor(
                index.row_starts, index.columns, weight_grad, index.shape, check_invariants=False
            )
        assert self._weight_grad.values().data_ptr() == weight_grad.data_ptr()

    def forward(self, x: Tensor) -> Tensor:
        """[rows, batch] from [columns, batch]."""
        index = self.index
        return _product(index.row_starts, index.columns, self.weight, x).add_(self.bias[:, None])

    def backward(self, dy: Tensor, x: Tensor) -> None:
        """Adds to the gradients of weight and bias, given that of the output."""
        torch.sparse.sampled_addmm(self._weight_grad, dy, x.t(), out=self._weight_grad)
        torch.sum(dy, 1, out=self._bias_grad)

    def backward_input(self, dy: Tensor) -> Tensor:
        index = self.index
        weight = self.weight.index_select(0, index.by_column)
        return _product(index.column_starts, index.rows, weight, dy)


def _product(starts: Tensor, columns: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """A sparse matrix in CSR form times a dense one. Weighted sums of an embedding's rows are the
    same thing, and run on a kernel (FBGEMM) that takes 0.4 of the time of MKL's sparse product."""
    return F.embedding_bag(
        columns, x, starts, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[K, batch] from [K, classes, batch]."""
    return -logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)


class Pack:
    """Trials as one network; to be made anew when one comes, goes or changes its topology."""

    def __init__(self, trials: list[Trial]) -> None:
        setup = trials[0].setup
        self.trials, self.device = trials, setup.device
        self.width = min(setup.settings.train.batch_size, len(setup.train_index))
        groups = list(dict.fromkeys(trial.group for trial in trials))
        self._group_of = [groups.index(trial.group) for trial in trials]
        self.leaders = [trials[self._group_of.index(g)] for g in range(len(groups))]
        self._group_index = torch.tensor(self._group_of, device=self.device)

        self._segments = [(name, trial) for name in trials[0].params for trial in trials]
        self._lengths = [trial.params[name].numel() for name, trial in self._segments]
        self._params = self._flatten("params")
        self._first, self._second = self._flatten("first"), self._flatten("second")
        self._grad = torch.zeros_like(self._params)
        self._vectors = csr_optim.Vectors(self._lengths, self.device)
        self._settings = [trial.setup.settings.optimizer for _, trial in self._segments]
        self._decays = [
            trial.setup.method.decays(name, trial.setup.variant) for name, trial in self._segments
        ]

        self._layers, columns = [], len(groups) * next(iter(trials[0].shapes.values()))[1]
        self._input = torch.zeros(columns, self.width, device=self.device)
        for number, (name, shape) in enumerate(trials[0].shapes.items()):
            blocks = range(len(trials)) if number else self._group_of
            index = csr_index.stack(
                [trial.patterns[name] for trial in trials],
                shape,
                [block * shape[1] for block in blocks],
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
        held = [(getattr(trial, kind), name) for name, trial in self._segments]
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
        return flat[start : start + sum(self._lengths[number : number + len(self.trials)])]

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Logits [K, classes, b] from each group's images [b, features]; b is at most `width`."""
        features = images[0].shape[1]
        for block, x in zip(self._input.split(features), images, strict=True):
            block[:, : len(x)] = x.t()
        self._activations = [self._input]
        for layer in self._layers[:-1]:
            self._activations.append(layer.forward(self._activations[-1]).relu_())
        logits = self._layers[-1].forward(self._activations[-1])
        return logits.view(len(self.trials), -1, self.width)[..., : len(images[0])]

    def labels(self, by_group: Sequence[Tensor]) -> Tensor:
        """[K, b] from the labels [b] of each group."""
        return torch.stack(list(by_group)).index_select(0, self._group_index)

    def gradients(self, images: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """Cross entropy [K, width] of each group's batch; the gradients of its mean are kept."""
        logits, target = self.forward(images), self.labels(labels)
        dy = logits.softmax(1)
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
        return cross_entropy(logits, target)

    def optimize(self, lrs: list[float]) -> None:
        """One step of every trial with its learning rate; the gradients are used up."""
        names = len(self._segments) // len(self.trials)
        csr_optim.apply_step(
            self._settings,
            self._vectors,
            self._params,
            self._grad,
            (self._first, self._second),
            self._decays,
            lrs * names,
            [trial.step for trial in self.trials] * names,
        )

    def gradients_of(self, k: int) -> dict[str, Tensor]:
        """Copies of trial k's gradients, by name."""
        parts = self._grad.split(self._lengths)
        return {
            name: part.clone()
            for (name, trial), part in zip(self._segments, parts, strict=True)
            if trial is self.trials[k]
        }

    def gradient_scores(self, k: int) -> Callable[[str], Scores]:
        """{layer: -|gradient|} of any weights of trial k, absent ones too, in the last batch."""

        def of_layer(name: str) -> Scores:
            shapes = self.trials[k].shapes
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
