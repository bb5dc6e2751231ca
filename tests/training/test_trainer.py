"""The trainer against torch.optim, against loops written out here, and by hand.

The data are a user's function in a module made here: 300 small images of four classes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from sparsetune.methods import METHODS, update
from sparsetune.methods.contract import UpdateSchedule
from sparsetune.settings import (
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    ScheduleSettings,
    TrainSettings,
    TrialSettings,
    UpdateSettings,
)
from sparsetune.training import data, models, optim, sources, trainer
from sparsetune.training.setup import Setup, choose_device, prepare

torch.set_num_threads(1)

Layers = dict[str, Tensor]
CPU = torch.device("cpu")
MODULE = "trainer_of_a_user"
NUM_TRAIN = 284  # of which .1, 28 images, are held out: 4 batches of 64 in an epoch


def _images(side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """uint8 images whose brightest quarter tells the class, and test ones, which none may read."""
    g = torch.Generator().manual_seed(side)
    labels = torch.arange(NUM_TRAIN) % 4
    images = torch.randint(0, 120, (NUM_TRAIN, side, side), generator=g)
    half = side // 2
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = (label // 2) * half, (label % 2) * half
        image[top : top + half, left : left + half] += 60
    return images.to(torch.uint8), labels, images[:20].to(torch.uint8), labels[:20]


class Net(nn.Module):
    """Buffers and random numbers in the forward pass."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(input_shape[0], 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(4 * 6 * 6, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.drop(F.relu(self.norm(self.conv(images))))
        return self.last(x.flatten(1))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def users_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(MODULE)
    vars(module).update(small=lambda: _images(8), mnist_like=lambda: _images(28), Net=Net)
    monkeypatch.setitem(sys.modules, MODULE, module)


def trial(method: str, **changes: Any) -> TrialSettings:
    """8x8 images, an MLP of 64-16-12-4 (1264 weights), 4 steps per epoch, 3 epochs."""
    settings = TrialSettings(
        method=method,
        density=0.25,
        epochs=3,
        seed=7,
        data=DataSettings(name=f"{MODULE}:small"),
        model=ModelSettings(name="mlp", widths=[16, 12]),
        train=TrainSettings(batch_size=64),
        optimizer=OptimizerSettings(lr=0.05),
    )
    if method in ("dsr", "rigl", "gmp"):
        settings.update = UpdateSettings(every=2)
    for name, value in changes.items():
        setattr(settings, name, value)
    return settings


def begun(settings: TrialSettings) -> tuple[Setup, trainer.TrialState]:
    setup = prepare(settings, CPU)
    return setup, trainer.begin(setup)


def trained(settings: TrialSettings) -> tuple[list[trainer.TrialState], list[dict[str, float]]]:
    """States before and after each epoch, metrics of each."""
    setup, state = begun(settings)
    states, rows = [state], []
    for _ in range(settings.epochs):
        state, metrics = trainer.train_epoch(setup, state)
        states.append(state)
        rows.append({k: v for k, v in metrics.items() if k != "device_seconds"})
    return states, rows


def num_active(masks: Layers) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


# Optimizers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        (
            OptimizerSettings("sgd", momentum=0.9, weight_decay=5e-2),
            lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=5e-2),
        ),
        (
            OptimizerSettings("sgd", momentum=0.8, nesterov=True, weight_decay=1e-2),
            lambda p, lr: torch.optim.SGD(p, lr, momentum=0.8, nesterov=True, weight_decay=1e-2),
        ),
        (
            OptimizerSettings("sgd", momentum=0.0, weight_decay=0.0),
            lambda p, lr: torch.optim.SGD(p, lr),
        ),
        (
            OptimizerSettings("adamw", momentum=0.85, beta2=0.99, eps=1e-6, weight_decay=0.1),
            lambda p, lr: torch.optim.AdamW(p, lr, betas=(0.85, 0.99), eps=1e-6, weight_decay=0.1),
        ),
        (
            OptimizerSettings("adamw", weight_decay=0.0),
            lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.0),
        ),
    ],
    ids=["sgd", "nesterov", "plain", "adamw", "adamw-defaults"],
)
def test_twenty_steps_equal_those_of_torch_optim(settings: OptimizerSettings, make: Any) -> None:
    g = torch.Generator().manual_seed(0)
    start = {"w": torch.randn(5, 4, generator=g), "b": torch.randn(5, generator=g)}
    ours = {name: p.clone() for name, p in start.items()}
    theirs = {name: nn.Parameter(p.clone()) for name, p in start.items()}
    optimizer = make(list(theirs.values()), 0.1)
    moments = optim.begin(settings, ours)
    for step in range(1, 21):
        lr = 0.1 / step
        # Gradients of sum (p - target)^2 / 2, and a new target each time.
        target = {name: torch.randn(p.shape, generator=g) for name, p in start.items()}
        grads = {name: p - target[name] for name, p in ours.items()}
        for name, p in theirs.items():
            p.grad = p.detach() - target[name]
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        numbers = optim.step_numbers(
            dataclasses.replace(settings, lr=lr), ScheduleSettings("constant"), step, 20
        )
        optim.apply_step(settings, ours, grads, moments, {"w": True, "b": True}, numbers)
        for name, p in theirs.items():
            torch.testing.assert_close(ours[name], p.detach(), rtol=1e-6, atol=1e-6)


def test_weight_decay_can_spare_a_parameter() -> None:
    for name in ("sgd", "adamw"):
        settings = OptimizerSettings(name, weight_decay=0.5)
        params = {"w": torch.ones(2), "t": torch.ones(2)}
        grads = {key: torch.zeros(2) for key in params}
        moments = optim.begin(settings, params)
        numbers = optim.step_numbers(settings, ScheduleSettings("constant"), 1, 1)
        optim.apply_step(settings, params, grads, moments, {"w": True, "t": False}, numbers)
        # 1 - .1 * .5, whether coupled (first step) or not
        assert params["w"].tolist() == pytest.approx([0.95, 0.95])
        assert params["t"].tolist() == [1, 1]


def test_what_methods_call_momentum() -> None:
    moments = optim.Moments({"w": torch.tensor([3.0, -2.0])}, {"w": torch.tensor([4.0, 0.25])})
    sgd = optim.momentum_of(OptimizerSettings("sgd"), moments)
    assert sgd["w"].tolist() == [3, -2]
    # m / (sqrt(v) + eps): 3 / (2 + .5), -2 / (.5 + .5)
    adamw = optim.momentum_of(OptimizerSettings("adamw", eps=0.5), moments)
    assert adamw["w"].tolist() == pytest.approx([1.2, -2.0])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ScheduleSettings("constant"), [2.0] * 8),
        # half of 8 is 4, three quarters 6
        (ScheduleSettings("step"), [2, 2, 2, 2, 0.2, 0.2, 0.02, 0.02]),
        (ScheduleSettings("step", milestones=[0.3], gamma=0.5), [2, 2, 2, 1, 1, 1, 1, 1]),
        # 2 * (1 + cos(180 step / 8)) / 2
        (
            ScheduleSettings("cosine"),
            [2, 1.9238795, 1.7071068, 1.3826834, 1, 0.6173166, 0.2928932, 0.0761205],
        ),
    ],
)
def test_learning_rates(schedule: ScheduleSettings, expected: list[float]) -> None:
    rates = [optim.learning_rate(schedule, 2.0, step, 8) for step in range(8)]
    assert rates == pytest.approx(expected, abs=1e-7)


# Training against loops written out ---------------------------------------------------------------


def batches(setup: Setup, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images and labels of an epoch, by the documented order of batches."""
    train = setup.dataset.train
    order = data.epoch_order(len(setup.train_index), setup.settings.seed, epoch)
    for step in range(4):
        index = setup.train_index[order[64 * step : 64 * (step + 1)]]
        unit = train.images[index].double() / 255
        mean, deviation = (t.double()[:, None, None] for t in setup.dataset[3:5])
        yield ((unit - mean) / deviation).float(), train.labels[index]


def rate(settings: TrialSettings, step: int, num_steps: int) -> float:
    return settings.optimizer.lr * (1 + math.cos(math.pi * step / num_steps)) / 2


def gradients(setup: Setup, params: Layers, images: Tensor, labels: Tensor) -> Layers:
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    loss = F.cross_entropy(functional_call(setup.model, leaves, (images,)), labels)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def assert_close(got: Layers, expected: Layers) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
@pytest.mark.parametrize("method", ["dense", "static", "sm"])
def test_training_without_updates_equals_torch_optim(method: str, optimizer: str) -> None:
    settings = trial(method, epochs=1)
    settings.optimizer = OptimizerSettings(
        "adamw" if optimizer == "adamw" else "sgd", lr=0.01, nesterov=optimizer == "nesterov",
        weight_decay=0.01,
    )  # fmt: skip
    setup, state = begun(settings)
    after, _ = trainer.train_epoch(setup, state)  # one epoch: no update after the last step

    params: Layers = {name: nn.Parameter(p.clone()) for name, p in state.params.items()}
    made: torch.optim.Optimizer = (
        torch.optim.AdamW(params.values(), lr=0.01, weight_decay=0.01)
        if optimizer == "adamw"
        else torch.optim.SGD(
            params.values(), lr=0.01, momentum=0.9, weight_decay=0.01,
            nesterov=optimizer == "nesterov",
        )
    )  # fmt: skip
    for step, (images, labels) in enumerate(batches(setup, 0)):
        made.param_groups[0]["lr"] = rate(settings, step, 4)
        made.zero_grad()
        loss = F.cross_entropy(functional_call(setup.model, params, (images,)), labels)
        for p, grad in zip(
            params.values(), torch.autograd.grad(loss, list(params.values())), strict=True
        ):
            p.grad = grad
        for name, mask in state.masks.items():
            if method == "static":  # absent weights learn nothing; SM's collect momentum
                masked = params[name].grad
                assert masked is not None
                masked.mul_(mask)
        made.step()
        with torch.no_grad():
            for name, mask in state.masks.items():
                params[name].mul_(mask)
    assert_close(after.params, {name: p.detach() for name, p in params.items()})
    key = "exp_avg" if optimizer == "adamw" else "momentum_buffer"
    assert_close(after.moments.first, {name: made.state[p][key] for name, p in params.items()})
    absent = {name: after.moments.first[name][~mask] for name, mask in after.masks.items()}
    if method == "sm":
        assert all(bool((moment != 0).any()) for moment in absent.values())
    elif method == "static":
        assert not any(bool(moment.any()) for moment in absent.values())


@pytest.mark.parametrize(
    ("method", "variant"),
    [
        ("set", {}),
        ("dsr", {"growth": "gradient"}),
        ("dsr", {"growth": "momentum"}),
        ("sm", {}),
        ("sm", {"growth": "gradient"}),
        ("rigl", {}),
        ("gmp", {}),
    ],
)
def test_training_with_updates_equals_steps_and_public_updates(
    method: str, variant: dict[str, str]
) -> None:
    # 8 steps; an update after steps 3 and 6 with the dense gradients of that step's batch.
    settings = trial(method, epochs=2, variant=variant)
    settings.update = UpdateSettings(every=3, first=0.0, stop=1.0, doublings=[])
    settings.hp = {"dsr": {"threshold": 0.1}, "gmp": {"begin": 0.2}}.get(method, {})
    setup, state = begun(settings)
    half, _ = trainer.train_epoch(setup, state)
    after, _ = trainer.train_epoch(setup, half)

    params = {name: p.clone() for name, p in state.params.items()}
    buffers = {name: torch.zeros_like(p) for name, p in params.items()}
    masks, own = state.masks, state.method
    always = method == "sm" and not variant
    number = 0
    for step, (images, labels) in enumerate(itertools.chain(batches(setup, 0), batches(setup, 1))):
        dense = gradients(setup, params, images, labels)
        for name, p in params.items():
            gate = masks.get(name, torch.ones_like(p))
            grad = dense[name] if always else dense[name] * gate
            buffers[name] = 0.9 * buffers[name] + grad + 5e-4 * p
            params[name] = (p - rate(settings, step, 8) * buffers[name]) * gate
        done = step + 1
        if done in (3, 6) or (method == "gmp" and done == 8):
            params, masks, changed, own = update(
                METHODS[method], params, masks, buffers, dense, own, variant, settings.hp,
                progress=done / 8, number=number, seed=7,
            )  # fmt: skip
            assert changed is not None
            buffers = changed
            number += 1
    assert after.updates == number
    assert all(torch.equal(after.masks[name], masks[name]) for name in masks)
    assert_close(after.params, params)
    assert_close(after.moments.first, buffers)


class DstByHand:
    """One epoch of 4 steps of DST, with the gradients of methods.md 4.1 written out."""

    def __init__(self, granularity: str) -> None:
        self.scalar = granularity == "scalar"
        settings = trial("dst", epochs=1, hp={"alpha": 0.05, "threshold": 0.5})
        settings.variant = {"granularity": granularity, "threshold_init": "constant"}
        settings.optimizer = OptimizerSettings(lr=0.2, weight_decay=0.01)
        self.setup, self.state = begun(settings)
        self.names = list(self.state.masks)
        self.params = {name: p.clone() for name, p in self.state.params.items()}
        self.seen = dict(self.state.masks)  # active at any forward pass, or after the last step
        self.num_active: list[float] = []  # at each forward pass
        buffers = {name: torch.zeros_like(p) for name, p in self.params.items()}
        for step, (images, labels) in enumerate(batches(self.setup, 0)):
            self.num_active.append(sum(float(self.mask(name).sum()) for name in self.names))
            for name, grad in self.gradients(images, labels).items():
                buffers[name] = 0.9 * buffers[name] + grad + 0.01 * self.params[name]
            for name, p in self.params.items():
                self.params[name] = p - rate(settings, step, 4) * buffers[name]
            self.seen = {name: self.seen[name] | (self.mask(name) > 0) for name in self.names}

    def above(self, name: str) -> Tensor:
        t = self.params[name + ".threshold"]
        return self.params[name].abs() - (t if self.scalar else t[:, None])

    def mask(self, name: str) -> Tensor:
        return (self.above(name) > 0).float()

    def gradients(self, images: Tensor, labels: Tensor) -> Layers:
        params = self.params
        masked = {
            name: params[name] * self.mask(name) if name in self.names else params[name]
            for name in self.setup.names
        }
        g = gradients(self.setup, masked, images, labels)
        for name in self.names:
            size = self.above(name).abs()
            h = torch.where(size <= 0.4, 2 - 4 * size, torch.where(size <= 1, 0.4, 0.0))
            terms = g[name] * params[name] * h
            pull = -(terms.sum() if self.scalar else terms.sum(1))
            g[name + ".threshold"] = pull - 0.05 * torch.exp(-params[name + ".threshold"])
            g[name] = g[name] * self.mask(name) + terms * params[name].sign()
        return g


@pytest.mark.parametrize("granularity", ["neuron", "scalar"])
def test_dst_masks_at_every_step(granularity: str) -> None:
    hand = DstByHand(granularity)
    after, metrics = trainer.train_epoch(hand.setup, hand.state)
    assert_close(after.params, hand.params)
    assert max(hand.num_active) - min(hand.num_active) > 12  # masks move within the epoch
    for name in hand.names:
        assert torch.equal(after.masks[name], hand.mask(name) > 0)
        absent = ~after.masks[name]
        assert bool((after.params[name][absent] != 0).any())  # latent weights stay
    active = sum(num_active(after.masks).values())
    assert metrics["density/all"] == pytest.approx(active / 1264)


def test_dsts_cost_follows_its_density_at_every_step() -> None:
    # The forward of a layer is 2 x its weights, and a step costs 2 f_S + f_D: "f_S summed over
    # densities as they move" (issue 2, Trainer).
    hand = DstByHand("neuron")
    metrics = trainer.train_epoch(hand.setup, hand.state)[1]
    steps = [2 * 2 * num + 2 * 1264 for num in hand.num_active]
    assert metrics["flops/train"] == pytest.approx(sum(steps) / 4, rel=1e-9)


def test_dsts_weights_ever_active_are_those_of_every_step() -> None:
    hand = DstByHand("neuron")
    after, metrics = trainer.train_epoch(hand.setup, hand.state)
    assert {n: int(e.sum()) for n, e in after.ever.items()} == num_active(hand.seen)
    ever = sum(num_active(hand.seen).values())
    assert metrics["density/ever"] == pytest.approx(ever / 1264)


def test_dsts_guard_resets_momenta_in_training() -> None:
    # alpha exp(-t) lifts thresholds by lr * alpha = 5 in the first step: every layer collapses and
    # starts again at t = 0, without momentum; without the guard all weights are gone.
    for guard in ("on", "off"):
        settings = trial("dst", epochs=1, hp={"alpha": 10.0}, variant={"guard": guard})
        settings.optimizer = OptimizerSettings(lr=0.5, weight_decay=0.0)
        settings.train = TrainSettings(batch_size=256)  # one step
        setup, state = begun(settings)
        after, metrics = trainer.train_epoch(setup, state)
        for name, mask in after.masks.items():
            t, moment = (d[name + ".threshold"] for d in (after.params, after.moments.first))
            if guard == "on":
                assert not bool(t.any())
                assert not bool(moment.any())
                assert torch.equal(mask, after.params[name] != 0)
            else:
                assert float(t.min()) > 3
                assert not bool(mask.any())
        assert metrics["density/all"] == (1 if guard == "on" else 0)
        assert math.isfinite(metrics["val/loss"])


# Promises of every method -------------------------------------------------------------------------

BN = ModelSettings(name=f"{MODULE}:Net")


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_metrics(method: str) -> None:
    for model in (ModelSettings(name="mlp", widths=[16, 12]), BN):
        first, rows = trained(trial(method, model=model, epochs=2))
        torch.manual_seed(5)  # whatever the global generator does
        again, rows_again = trained(trial(method, model=model, epochs=2))
        assert rows == rows_again
        for a, b in zip(pytree.tree_leaves(first), pytree.tree_leaves(again), strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        assert trained(trial(method, model=model, epochs=2, seed=8))[1] != rows


@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_leaves_the_given_state(method: str) -> None:
    for model in (ModelSettings(name="mlp", widths=[16, 12]), BN):
        setup, state = begun(trial(method, model=model))
        state, _ = trainer.train_epoch(setup, state)
        copy = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, state)
        global_state = torch.get_rng_state()
        once, metrics = trainer.train_epoch(setup, state)
        twice, metrics_again = trainer.train_epoch(setup, state)
        assert torch.equal(torch.get_rng_state(), global_state)
        for tree, other in ((state, copy), (once, twice)):
            for a, b in zip(pytree.tree_leaves(tree), pytree.tree_leaves(other), strict=True):
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        assert (once.epoch, once.step) == (2, 8)
        assert (state.epoch, state.step) == (1, 4)
        for m in (metrics, metrics_again):
            m.pop("device_seconds")
        assert metrics == metrics_again
        assert not any(p.requires_grad for p in once.params.values())


FIXING = [name for name, method in METHODS.items() if method.reaches_density]
FIXING_CASES: list[tuple[str, dict[str, str]]] = [(name, {}) for name in FIXING] + [
    ("set", {"new_value": "zero", "prune": "magnitude"}),
    ("set", {"prune": "threshold"}),
    ("dsr", {"growth": "gradient"}),
    ("sm", {"growth": "random"}),
    ("sm", {"growth": "gradient", "regrown": "zero"}),
]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("method", "variant"), FIXING_CASES)
def test_absent_weights_are_zero_after_training(
    method: str, variant: dict[str, str], optimizer: str
) -> None:
    settings = trial(method, variant=variant, dense_layers=["last"])
    settings.optimizer = OptimizerSettings(optimizer, lr=0.02, nesterov=optimizer == "sgd")
    settings.hp = {"threshold": 0.1} if method == "dsr" else {}
    states, rows = trained(settings)
    collects = method == "sm" and not variant
    for state in states:
        assert list(state.masks) == ["fc1.weight", "fc2.weight"]
        for name, mask in state.masks.items():
            assert not bool(state.params[name][~mask].any())
            for moment in (m[name] for m in state.moments if name in m):
                assert collects or not bool(moment[~mask].any())
            assert bool((mask <= state.ever[name]).all())
    if method not in ("static", "gmp"):
        moved = [n for n, m in states[-1].masks.items() if not torch.equal(m, states[0].masks[n])]
        assert moved
    # A quarter of 1264 is 316, of which the last layer has 48: 268 of 1024 and 192.
    counts = [num_active(state.masks) for state in states]
    assert all("density/layer/fc3.weight" in row for row in rows)
    assert rows[-1]["density/layer/fc3.weight"] == 1
    if method == "sm":
        assert abs(sum(counts[-1].values()) - 268) < 12
    else:
        assert sum(counts[-1].values()) == 268
        assert rows[-1]["density/all"] == 0.25
        assert rows[-1]["density/sparse"] == pytest.approx(268 / 1216)
    if method in ("set", "static", "rigl"):
        # 268 * 1024 / 1216 = 225.7 and 42.3
        assert all(c == {"fc1.weight": 226, "fc2.weight": 42} for c in counts)
    for before, after, row in zip(states, states[1:], rows, strict=False):
        new = sum(int((after.masks[n] & ~before.masks[n]).sum()) for n in after.masks)
        if method != "static":
            assert row["method/churn"] == pytest.approx(new / sum(num_active(after.masks).values()))
        ever = sum(int(e.sum()) for e in after.ever.values())
        assert row["density/ever"] == pytest.approx(ever / 1216)


@pytest.mark.parametrize("epochs", [1, 3, 5, 7])
def test_gmp_ends_at_its_density_whatever_the_number_of_steps(epochs: int) -> None:
    # Stop .7 of 4, 12, 20 or 28 steps is 2.8, 8.4, 14 or 19.6.
    settings = trial("gmp", epochs=epochs, density=0.05)
    settings.update = UpdateSettings(every=100, stop=0.7)
    settings.optimizer.lr = 1e-30
    settings.model = ModelSettings(name="mlp", widths=[300, 100])
    states, rows = trained(settings)
    # .05 * (64 * 300 + 300 * 100 + 100 * 4) = .05 * 49600 = 960 + 1500 + 20
    assert list(num_active(states[-1].masks).values()) == [960, 1500, 20]
    assert rows[-1]["density/all"] == 0.05


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", METHODS)
def test_a_diverged_trial_is_a_result(method: str, optimizer: str) -> None:
    settings = trial(method)
    settings.optimizer = OptimizerSettings(optimizer, lr=1e30)
    settings.schedule = ScheduleSettings("constant")
    states, rows = trained(settings)
    assert [state.diverged for state in states] == [False, True, True, True]
    assert [row["diverged"] for row in rows] == [1, 1, 1]
    if method in ("set", "static", "rigl", "dsr"):
        assert sum(num_active(states[-1].masks).values()) == 316


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_that_learns_has_not_diverged(method: str) -> None:
    settings = trial(method, epochs=16, density=0.5, optimizer=OptimizerSettings(lr=0.1))
    states, rows = trained(settings)
    assert not any(state.diverged for state in states)
    assert all(row["diverged"] == 0 for row in rows)
    # Four classes that a linear layer tells apart; chance is a loss of 1.39 and .25 right.
    assert rows[-1]["train/loss"] < 0.5
    assert rows[-1]["val/accuracy"] > 0.75


# Cost ---------------------------------------------------------------------------------------------


def worked(method: str, **changes: Any) -> TrialSettings:
    """LeNet-300-100 on 28 x 28, uniform density .1: f_D = 532,400, f_S = 53,240."""
    settings = trial(
        method, density=0.1, data=DataSettings(name=f"{MODULE}:mnist_like"),
        model=ModelSettings(name="lenet300100"), epochs=2, update=UpdateSettings(), **changes,
    )  # fmt: skip
    settings.optimizer.lr = 1e-6
    return settings


@pytest.fixture
def ten_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """784-300-100-10: 266,200 weights."""
    images, labels, *test = _images(28)
    labels[:10] = torch.arange(10)
    module = sys.modules[MODULE]
    monkeypatch.setattr(module, "mnist_like", lambda: (images, labels, *test))


@pytest.mark.usefixtures("ten_classes")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param(worked("dense"), 1_597_200, id="dense"),  # 3 f_D
        pytest.param(worked("static"), 159_720, id="static"),  # 3 f_S
        pytest.param(worked("set"), 159_720, id="set"),
        pytest.param(worked("dsr"), 159_720, id="dsr"),
        pytest.param(worked("sm"), 638_880, id="sm"),  # 2 f_S + f_D
        pytest.param(worked("sm", variant={"growth": "random"}), 159_720, id="sm-random"),
        # thresholds that mask .9 of each layer: 2 f_S + f_D
        pytest.param(
            worked("dst", hp={"threshold": 0.9}, variant={"threshold_init": "constant"}),
            638_880,
            id="dst",
        ),
        pytest.param(worked("dst"), 1_597_200, id="dst-begins-dense"),
    ],
)
def test_flops_of_the_worked_case(settings: TrialSettings, expected: float) -> None:
    setup, state = begun(settings)
    state, metrics = trainer.train_epoch(setup, state)
    near = settings.method == "dst" and settings.hp  # a step of 1e-6 may move a weight over t
    assert metrics["flops/train"] == pytest.approx(expected, rel=1e-3 if near else 1e-12)
    # 4 steps of 64 images
    assert metrics["flops/total"] == pytest.approx(256 * metrics["flops/train"], rel=1e-12)
    if settings.method in ("static", "set", "dsr"):
        assert list(num_active(state.masks).values()) == [23_520, 3_000, 100]


@pytest.mark.usefixtures("ten_classes")
def test_rigls_flops_are_the_mean_over_its_interval() -> None:
    # 8 steps, updates after 2, 4 and 6 (stop .75): a dense weight gradient costs f_D - f_S more.
    settings = worked("rigl")
    settings.update = UpdateSettings(every=2)
    states, rows = trained(settings)
    assert [state.updates for state in states] == [0, 2, 3]
    assert rows[0]["flops/train"] == pytest.approx(159_720 + 479_160 / 2)
    assert rows[1]["flops/train"] == pytest.approx(159_720 + 479_160 / 4)
    assert rows[1]["flops/total"] == pytest.approx(256 * (399_300 + 279_510))


@pytest.mark.usefixtures("ten_classes")
def test_gmps_flops_follow_its_density() -> None:
    # Steps 1 to 6 dense, pruned at once after step 6 (stop .75 of 8), 7 and 8 at .1.
    settings = worked("gmp")
    settings.update = UpdateSettings(every=100)
    rows = trained(settings)[1]
    assert rows[0]["flops/train"] == pytest.approx(1_597_200)
    assert rows[1]["flops/train"] == pytest.approx((1_597_200 + 159_720) / 2)


# What is refused, and what is never read ----------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_test_set_is_never_read(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    read = sources.read

    def recorded(settings: DataSettings, part: Any, limit: int) -> tuple[Tensor, Tensor]:
        parts.append(part)
        return read(settings, part, limit)

    def forbidden(*_: Any) -> None:
        raise AssertionError("the test set was read")

    monkeypatch.setattr(sources, "read", recorded)
    monkeypatch.setattr(data, "load_test", forbidden)
    trained(trial(method, epochs=2))
    assert parts == ["train"]


def test_the_split_follows_the_seed_and_the_order_its_own() -> None:
    setup, _ = begun(trial("static"))
    assert len(setup.validation_index) == 28
    assert len(setup.train_index) == 256
    both = torch.cat([setup.train_index, setup.validation_index]).sort().values
    assert torch.equal(both, torch.arange(NUM_TRAIN))
    other, _ = begun(trial("static", seed=8))
    assert not torch.equal(other.train_index, setup.train_index)
    # Another order of batches: another loss, from the same initial state.
    rows = [trained(trial("static", epochs=1, order_seed=s))[1] for s in (None, 7, 9)]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": 0.0001}, r"density: 0\.0001 cannot be reached.*allows 0\.00237"),  # 3 / 1264
        ({"density": 1.5}, r"density: 1\.5"),
        ({"dense_layers": ["fc9"]}, r"dense_layers: 'fc9'.*fc1\.weight"),
        ({"dense_layers": ["fc1", "fc2", "fc3"]}, r"dense_layers"),
        ({"hp": {"zetta": 0.3}}, r"hp\.zetta.*did you mean 'zeta'"),
        ({"variant": {"prune": "none"}}, r"variant\.prune"),
        ({"update": UpdateSettings(every=0)}, r"update\.every"),
        ({"update": UpdateSettings(every="step")}, r"update\.every: 'step'"),
        ({"update": UpdateSettings(first=-0.5)}, r"update\.first"),
        ({"update": UpdateSettings(stop=1.5)}, r"update\.stop"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(trial("set", **changes), CPU)


def test_a_trials_schedule_replaces_the_methods_key_by_key() -> None:
    setup, _ = begun(trial("dsr", update=UpdateSettings(every=5, doublings=[0.5])))
    assert setup.schedule == UpdateSchedule(5, 0.0, 0.95, (0.5,))
    setup, _ = begun(trial("set"))
    assert setup.schedule == METHODS["set"].schedule


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu") == CPU
    with pytest.raises(ValueError, match=r"device: 'tpux'"):
        choose_device("tpux")
    if not torch.cuda.is_available():
        assert choose_device("auto") == CPU
        with pytest.raises(ValueError, match=r"device: 'cuda'"):
            choose_device("cuda")


def test_initial_weights_and_masks_follow_the_seed_alone() -> None:
    ours = begun(trial("set"))[1]
    theirs = begun(trial("rigl", optimizer=OptimizerSettings(lr=1.0)))[1]
    assert all(torch.equal(ours.params[n], theirs.params[n]) for n in ours.params)
    assert all(torch.equal(ours.masks[n], theirs.masks[n]) for n in ours.masks)
    dense = begun(trial("dense"))[1]
    for name, mask in ours.masks.items():
        assert torch.equal(ours.params[name], dense.params[name] * mask)
        # nn.Linear's bound, 1 / sqrt(inputs)
        bound = 1 / math.sqrt(dense.params[name].shape[1])
        assert bound * 0.9 < float(dense.params[name].abs().max()) <= bound
    other = begun(trial("set", seed=8))[1]
    assert not torch.equal(other.masks["fc1.weight"], ours.masks["fc1.weight"])
    assert models.weights(begun(trial("set"))[0].model).keys() == ours.masks.keys()


def test_a_schedule_without_any_update_is_refused() -> None:
    """RigL's own stop is 0.75; set may begin late, for its stop is 1."""
    late = trial("rigl", update=UpdateSettings(first=0.8))
    with pytest.raises(ValueError, match=r"update\.first: 0\.8 comes after update\.stop, 0\.75"):
        prepare(late, CPU)
    prepare(trial("set", update=UpdateSettings(first=0.8)), CPU)
