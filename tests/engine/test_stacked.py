"""The stacked backend against the solo trainer, on both of its ways: turns and lifted."""

from __future__ import annotations

import math
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetune.engine.pool import Backend
from sparsetune.engine.stacked import step
from sparsetune.engine.stacked.lifted import Lifted, padded
from sparsetune.engine.stacked.step import has_compiler
from sparsetune.engine.stacked.turns import Turns
from sparsetune.methods import METHODS
from sparsetune.settings import (
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    ScheduleSettings,
    TrainSettings,
    TrialSettings,
    UpdateSettings,
)
from sparsetune.training import checkpoint, data, trainer
from sparsetune.training.checkpoint import Snapshot
from sparsetune.training.setup import Setup, prepare
from sparsetune.training.trainer import Metrics, TrialState

torch.set_num_threads(1)

CPU = torch.device("cpu")
MODULE = "networks_of_a_user"
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WAYS: dict[str, Callable[[int], Backend]] = {
    "turns": lambda slots: Turns(slots, compiles=False),
    "lifted": lambda slots: Lifted(slots, compiles=False),
}
COMPILED: dict[str, Callable[[int], Backend]] = {
    "turns": lambda slots: Turns(slots, compiles=True),
    "lifted": lambda slots: Lifted(slots, compiles=True),
}
OPTIMIZERS = {
    "sgd": OptimizerSettings(momentum=0.9),
    "nesterov": OptimizerSettings(momentum=0.9, nesterov=True),
    "adamw": OptimizerSettings(name="adamw", lr=0.002),
}
VARIANTS: dict[str, list[dict[str, str]]] = {
    "set": [{}, {"prune": "magnitude", "new_value": "zero"}],
    "dsr": [{}, {"growth": "gradient"}],
    "sm": [{}, {"growth": "gradient", "redistribution": "magnitude"}],
    "dst": [{}, {"granularity": "scalar"}, {"granularity": "weight", "threshold_decay": "none"}],
}
CASES = [
    pytest.param(name, variant, optimizer, id=f"{name}-{'-'.join(variant.values())}-{optimizer}")
    for name in METHODS
    for variant in VARIANTS.get(name, [{}])
    for optimizer in OPTIMIZERS
]
COMPILED_CASES = [case for n, case in enumerate(CASES) if n % 3 == n // 3 % 3]  # one optimizer each


class ConvNet(nn.Module):
    """Buffers: BatchNorm."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.conv = nn.Conv2d(channels, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(4 * (height - 2) * (width - 2), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(images)))
        return self.last(x.flatten(1))  # type: ignore[no-any-return]


class Dropping(ConvNet):
    """Random numbers in the forward pass."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(F.dropout(images, 0.2, self.training))


def _large_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """400 of the digits at 16x16, for LeNet-5."""
    images, labels = (t[:400] for t in data.load(DataSettings()).train)
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, 0]
    return images, labels, images[:10], labels[:10]


@pytest.fixture(autouse=True)
def users_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(MODULE)
    vars(module).update(ConvNet=ConvNet, Dropping=Dropping, large_digits=_large_digits)
    monkeypatch.setitem(sys.modules, MODULE, module)


def trial(method: str, number: int = 0, **changes: Any) -> TrialSettings:
    """Trial `number` of a pool on the 8x8 digits: other numbers and schedules, same structure."""
    optimizer = changes.pop("optimizer", OPTIMIZERS["sgd"])
    own = OptimizerSettings(**vars(optimizer))
    own.lr *= 1 + 0.3 * number
    own.weight_decay = 1e-4 * number
    own.momentum -= 0.1 * (number % 2)
    settings = TrialSettings(
        method=method,
        density=0.15 + 0.05 * number,
        epochs=3 + number % 3,
        seed=number // 2,
        order_seed=None if number == 4 else 7,
        data=DataSettings(limit=700),
        model=ModelSettings(name="mlp", widths=[24, 16]),
        train=TrainSettings(batch_size=64),
        optimizer=own,
        schedule=ScheduleSettings(name=("cosine", "step", "constant")[number % 3]),
        # Within an epoch of 9 steps, at its end, and elsewhere for other slots.
        update=UpdateSettings(every=(4, "epoch", 3)[number % 3], stop=1.0, doublings=[]),
    )
    for name, value in changes.items():
        setattr(settings, name, value)
    return settings


def begun(settings: TrialSettings) -> tuple[Setup, TrialState]:
    setup = prepare(settings, CPU)
    return setup, trainer.begin(setup)


def alone(settings: TrialSettings, epochs: int) -> list[tuple[TrialState, Metrics]]:
    setup, state = begun(settings)
    rows = []
    for _ in range(epochs):
        state, metrics = trainer.train_epoch(setup, state)
        rows.append((state, metrics))
    return rows


def packed(
    backend: Backend, trials: list[TrialSettings], epochs: int
) -> list[list[tuple[TrialState, Metrics]]]:
    """[epoch][slot]: the state and metrics."""
    setups = [prepare(settings, CPU) for settings in trials]
    for slot, setup in enumerate(setups):
        backend.attach(slot, setup, None)
    rows = []
    for _ in range(epochs):
        metrics = backend.advance()
        rows.append(
            [
                (checkpoint.decode(setup, backend.snapshot(slot)), metrics[slot])
                for slot, setup in enumerate(setups)
            ]
        )
    return rows


def distance(a: TrialState, b: TrialState) -> float:
    """Of weights and buffers, the largest."""
    pairs = [(a.params, b.params), (a.buffers, b.buffers)]
    return max(
        float((x[name].double() - y[name].double()).abs().max()) for x, y in pairs for name in y
    )


def differing(a: TrialState, b: TrialState) -> float:
    """Share of positions at which masks differ."""
    size = sum(mask.numel() for mask in b.masks.values())
    return sum(int((a.masks[k] != b.masks[k]).sum()) for k in b.masks) / max(size, 1)


def leaves(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"{k}.{path}", leaf) for k, v in value.items() for path, leaf in leaves(v)]
    return [("", value)]


def assert_same(a: Snapshot, b: Snapshot) -> None:
    """To the last bit, NaN equal to NaN."""
    for (path, x), (other, y) in zip(leaves(a), leaves(b), strict=True):
        assert path == other
        if isinstance(x, Tensor):
            assert x.dtype == y.dtype and torch.equal(x.nan_to_num(7e7), y.nan_to_num(7e7)), path
        else:
            assert x == y or (math.isnan(x) and math.isnan(y)), path


def check_equal_to_solo(make: Callable[[int], Backend], trials: list[TrialSettings]) -> None:
    rows = packed(make(len(trials)), trials, 3)
    for slot, settings in enumerate(trials):
        for epoch, (state, metrics) in enumerate(alone(settings, 3)):
            mine, reported = rows[epoch][slot]
            assert reported.keys() == metrics.keys()
            assert (mine.step, mine.updates) == (state.step, state.updates)
            if epoch == 0:
                assert distance(mine, state) < 1e-4
                for name in ("train/loss", "val/loss"):
                    assert reported[name] == pytest.approx(metrics[name], abs=1e-4)
            assert differing(mine, state) <= 0.005
            for name in metrics.keys() - {"device_seconds"}:
                exact = "density/" in name and settings.method != "dst" and "ever" not in name
                assert reported[name] == pytest.approx(metrics[name], abs=0 if exact else 0.02), (
                    name
                )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("method", "variant", "optimizer"), CASES)
def test_slots_are_what_the_trainer_makes_of_them(
    way: str, method: str, variant: dict[str, str], optimizer: str
) -> None:
    trials = [
        trial(method, number, variant=variant, optimizer=OPTIMIZERS[optimizer])
        for number in range(5)
    ]
    check_equal_to_solo(WAYS[way], trials)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("way", COMPILED)
@pytest.mark.parametrize(("method", "variant", "optimizer"), COMPILED_CASES)
def test_compiled_slots_are_what_the_trainer_makes_of_them(
    way: str, method: str, variant: dict[str, str], optimizer: str
) -> None:
    trials = [
        trial(method, number, variant=variant, optimizer=OPTIMIZERS[optimizer])
        for number in range(5)
    ]
    check_equal_to_solo(COMPILED[way], trials)


@pytest.mark.parametrize("method", METHODS)
def test_turns_that_are_not_compiled_are_the_trainer_to_the_last_bit(method: str) -> None:
    trials = [trial(method, number) for number in range(5)]
    rows = packed(Turns(5, compiles=False), trials, 2)
    for slot, settings in enumerate(trials):
        for epoch, (state, metrics) in enumerate(alone(settings, 2)):
            assert_same(checkpoint.encode(rows[epoch][slot][0]), checkpoint.encode(state))
            mine = {k: v for k, v in rows[epoch][slot][1].items() if k != "device_seconds"}
            assert mine == {k: v for k, v in metrics.items() if k != "device_seconds"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].decide])
def test_one_update_from_one_state_gives_the_same_masks(way: str, method: str) -> None:
    """A state whose last step before an update is the epoch's first: nothing can drift apart."""
    settings = trial(method, 1, update=UpdateSettings(every=10, stop=1.0, doublings=[]))
    [*_, (state, _)] = alone(settings, 1)
    setup = prepare(settings, CPU)
    backend = WAYS[way](4)
    backend.attach(2, setup, checkpoint.encode(state))
    backend.advance()
    mine = checkpoint.decode(setup, backend.snapshot(2))
    after, _ = trainer.train_epoch(setup, state)
    assert after.updates == mine.updates == 1
    assert differing(after, state) > 0 and differing(mine, after) == 0


def every_way() -> list[Any]:
    compiled = [
        pytest.param(make, id=f"{way}, compiled", marks=[pytest.mark.slow, needs_compiler])
        for way, make in COMPILED.items()
    ]
    return [pytest.param(make, id=way) for way, make in WAYS.items()] + compiled


@pytest.mark.parametrize("make", every_way())
@pytest.mark.parametrize("method", ["set", "sm", "dst", "rigl"])
@pytest.mark.parametrize("network", ["mlp", f"{MODULE}:ConvNet"])
def test_a_slot_is_the_same_whatever_its_neighbours(
    make: Callable[[int], Backend], method: str, network: str
) -> None:
    """Alone in slot 0; in slot 3 beside others that join late, leave, and turn NaN."""
    model = ModelSettings(name=network, widths=[24, 16])
    setups = [prepare(trial(method, n, model=model), CPU) for n in range(4)]
    setups[2].settings.optimizer.lr = 1e30
    by_itself, beside = make(6), make(6)
    by_itself.attach(0, setups[0], None)
    beside.attach(1, setups[1], None)
    beside.attach(2, setups[2], None)
    beside.advance()
    beside.attach(3, setups[0], None)
    for epoch in range(3):
        if epoch == 1:
            beside.detach(1)
            beside.attach(5, setups[3], None)
        expected, got = by_itself.advance()[0], beside.advance()
        assert got[2]["diverged"] == 1.0 and got[3]["diverged"] == 0.0
        for name in expected.keys() - {"device_seconds"}:
            assert got[3][name] == expected[name], name
        assert_same(by_itself.snapshot(0), beside.snapshot(3))


@pytest.mark.parametrize("make", every_way())
@pytest.mark.parametrize("method", METHODS)
def test_a_trial_moves_between_solo_and_slots(make: Callable[[int], Backend], method: str) -> None:
    settings = trial(method, 1)
    states = [state for state, _ in alone(settings, 3)]
    setup = prepare(settings, CPU)
    backend = make(2)
    backend.attach(1, setup, checkpoint.encode(states[0]))
    assert_same(backend.snapshot(1), checkpoint.encode(states[0]))
    backend.advance()
    middle = backend.snapshot(1)
    kept = checkpoint.encode(checkpoint.decode(setup, middle))
    backend.advance()
    assert_same(middle, kept)  # a snapshot does not change with its slot
    state, _ = trainer.train_epoch(setup, checkpoint.decode(setup, middle))
    assert (state.epoch, state.step, state.updates) == (3, states[2].step, states[2].updates)
    assert distance(state, states[2]) < 1e-3 and differing(state, states[2]) <= 0.005


@pytest.mark.parametrize("make", every_way())
@pytest.mark.parametrize("network", ["lenet5", f"{MODULE}:ConvNet"])
def test_convolutions_and_buffers(make: Callable[[int], Backend], network: str) -> None:
    """Dense enough that no filter is all zero, where BatchNorm divides rounding by sqrt(eps); and
    slow enough that an activation that rounds to the other side of zero does not lead elsewhere."""
    trials = [
        trial(
            "sm",
            number,
            density=0.6 + 0.05 * number,
            optimizer=OptimizerSettings(lr=0.02),
            data=DataSettings(name=f"{MODULE}:large_digits", limit=300),
            model=ModelSettings(name=network),
        )
        for number in range(3)
    ]
    check_equal_to_solo(make, trials)


@pytest.mark.parametrize("make", every_way())
@pytest.mark.parametrize("augment", ["shift", "crop+flip"])
def test_slots_of_several_epochs_and_orders_are_augmented_alike(
    make: Callable[[int], Backend], augment: str
) -> None:
    """Slots 0 and 1 share an order, two epochs apart; slot 2 has another, and another split."""
    trials = [trial("set", n, data=DataSettings(limit=300, augment=augment)) for n in (0, 1, 4)]
    setups = [prepare(settings, CPU) for settings in trials]
    backend = make(3)
    backend.attach(0, setups[0], None)
    backend.advance()
    backend.advance()
    for slot in (1, 2):
        backend.attach(slot, setups[slot], None)
    backend.advance()
    for slot, epochs in ((0, 3), (1, 1), (2, 1)):
        state, _ = alone(trials[slot], epochs)[-1]
        mine = checkpoint.decode(setups[slot], backend.snapshot(slot))
        assert mine.epoch == epochs and distance(mine, state) < 1e-4


@pytest.mark.parametrize("make", every_way())
def test_the_collapse_guard_opens_one_slot_alone(make: Callable[[int], Backend]) -> None:
    """A weight of alpha = 10 drives all thresholds of slot 1 over its weights at once."""
    trials = [trial("dst", 0, epochs=3), trial("dst", 1, epochs=3, hp={"alpha": 10.0})]
    trials[1].optimizer.lr = 0.5
    rows = packed(make(2), trials, 1)
    for slot, settings in enumerate(trials):
        [(state, _)] = alone(settings, 1)
        mine = rows[0][slot][0]
        assert distance(mine, state) < 1e-4 and differing(mine, state) <= 0.005
    setup, state = begun(trials[1])
    unguarded = prepare(trials[1], CPU)._replace(
        variant=type(setup.variant)(**{**vars(setup.variant), "guard": "off"})
    )
    assert not any(mask.any() for mask in trainer.train_epoch(unguarded, state)[0].masks.values())


@pytest.mark.parametrize("way", WAYS)
def test_seconds_of_the_slots_add_up(way: str) -> None:
    backend = WAYS[way](3)
    for slot in range(3):
        backend.attach(slot, prepare(trial("set", slot), CPU), None)
    began = time.perf_counter()
    metrics = backend.advance()
    seconds = time.perf_counter() - began
    # Up to what the clock itself and the call take.
    assert sum(m["device_seconds"] for m in metrics.values()) == pytest.approx(seconds, abs=0.01)


def test_networks_with_dropout() -> None:
    """In turns they are the trainer's to the last bit; a stack says why it cannot."""
    model = ModelSettings(name=f"{MODULE}:Dropping")
    trials = [trial("set", number, model=model) for number in range(3)]
    backend = Turns(3)
    for slot, row in enumerate(packed(backend, trials, 1)[0]):
        assert_same(checkpoint.encode(row[0]), checkpoint.encode(alone(trials[slot], 1)[0][0]))
    setup = prepare(trials[0], CPU)
    assert Turns.unfit(setup) == "" and step.draws(setup)
    assert "draws random numbers" in Lifted.unfit(setup)
    assert not step.draws(prepare(trial("set"), CPU))


def test_graphs_come_in_few_sizes() -> None:
    assert [padded(slots) for slots in (1, 3, 8, 9, 33, 64)] == [1, 4, 8, 16, 64, 64]


# On a GPU -----------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("network", ["mlp", f"{MODULE}:ConvNet"])
@pytest.mark.parametrize("method", METHODS)
def test_a_gpus_slots_are_what_the_trainer_makes_of_them(method: str, network: str) -> None:
    device = torch.device("cuda")
    model = ModelSettings(name=network, widths=[24, 16])
    trials = [trial(method, number, model=model) for number in range(3)]
    backend = Lifted(3)
    setups = [prepare(settings, device) for settings in trials]
    for slot, setup in enumerate(setups):
        assert Lifted.unfit(setup) == ""
        backend.attach(slot, setup, None)
    states = [trainer.begin(setup) for setup in setups]
    for epoch in range(3):
        metrics = backend.advance()
        for slot, setup in enumerate(setups):
            states[slot], expected = trainer.train_epoch(setup, states[slot])
            mine = checkpoint.decode(setup, backend.snapshot(slot))
            assert differing(mine, states[slot]) <= 0.005
            if epoch == 0:
                assert distance(mine, states[slot]) < 1e-4
                assert metrics[slot]["train/loss"] == pytest.approx(
                    expected["train/loss"], abs=1e-4
                )
