"""The csr backend against the solo trainer, and its own promises: a slot's numbers do not depend on
its neighbours, and nothing of a layer's size is made."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsetune.engine.csr import index
from sparsetune.engine.csr.backend import Csr
from sparsetune.engine.csr.slot import begin, restore, snapshot, update_topology
from sparsetune.engine.solo import Solo
from sparsetune.methods import noise
from sparsetune.methods.distribution import random_masks
from sparsetune.methods.ops import lowest
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
DATASET = data.load(DataSettings(limit=400))  # 8x8 digits; 360 to train on, 5 batches of 64
CASES: list[tuple[str, dict[str, str]]] = [
    *(
        ("set", {"prune": prune, "new_value": new_value})
        for prune in ("signwise", "magnitude", "threshold")
        for new_value in ("normal", "zero")
    ),
    *(("dsr", {"growth": growth}) for growth in ("nonzero", "gradient", "momentum")),
    ("static", {}),
    ("sm", {"growth": "random"}),
    ("sm", {"growth": "random", "redistribution": "magnitude", "regrown": "zero"}),
    ("sm", {"growth": "gradient"}),
    ("sm", {"growth": "gradient", "redistribution": "none"}),
    ("rigl", {}),
]
NAMES = ["-".join([method, *variant.values()]) for method, variant in CASES]
OPTIMIZERS = {
    "sgd": OptimizerSettings(lr=0.05),
    "nesterov": OptimizerSettings(lr=0.05, nesterov=True),
    "adamw": OptimizerSettings(name="adamw", lr=0.002, weight_decay=0.01),
}
HP = {
    "set": {"zeta": 0.3},
    "dsr": {"threshold": 0.02},
    "sm": {"prune_fraction": 0.3},
    "rigl": {"prune_fraction": 0.3},
    "static": {},
    "dst": {},
}


def settings(method: str = "set", number: int = 0, **changes: Any) -> TrialSettings:
    """Trial `number` of a pool: the same structure, other numbers; seeds 0, 0, 1, 1, ..."""
    optimizer = changes.pop("optimizer", OPTIMIZERS["sgd"])
    trial = TrialSettings(
        method=method,
        hp={name: value * (1 + 0.2 * number) for name, value in HP[method].items()},
        density=0.1 + 0.08 * number,
        epochs=4 + number % 2,
        seed=number // 2,
        order_seed=7,
        data=DataSettings(limit=400),
        model=ModelSettings(name="mlp", widths=[24, 16]),
        train=TrainSettings(batch_size=64),
        optimizer=dataclasses.replace(
            optimizer,
            lr=optimizer.lr * (1 + 0.3 * number),
            momentum=0.9 - 0.1 * number,
            weight_decay=optimizer.weight_decay * number,
        ),
        schedule=ScheduleSettings(name=("cosine", "constant", "step")[number % 3]),
        update=UpdateSettings(every="epoch" if number % 2 else 3, first=0.0, stop=1.0),
    )
    return dataclasses.replace(trial, **changes)


def prepared(trial: TrialSettings) -> Setup:
    return prepare(trial, CPU, DATASET)


def slots(method: str, num: int = 5, **changes: Any) -> list[Setup]:
    return [prepared(settings(method, number, **changes)) for number in range(num)]


def attached(backend: Any, setups: list[Setup], starts: list[Snapshot] | None = None) -> Any:
    for slot, setup in enumerate(setups):
        backend.attach(slot, setup, starts[slot] if starts else None)
    return backend


def without_time(metrics: Metrics) -> Metrics:
    return {k: v for k, v in metrics.items() if k != "device_seconds"}


def same(a: Any, b: Any) -> bool:
    """Are two snapshots, or parts of them, equal to the last bit and in their types?"""
    if isinstance(a, Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.nan_to_num(), b.nan_to_num())
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and (a == b or (a != a and b != b))


def difference(a: Snapshot, b: Snapshot, setup: Setup) -> float:
    """Largest difference of a weight, bias or moment."""
    one, other = checkpoint.decode(setup, a), checkpoint.decode(setup, b)
    return max(
        float((x[name] - y[name]).abs().max())
        for x, y in zip((one.params, *one.moments), (other.params, *other.moments), strict=True)
        for name in x
    )


# The same as solo ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "variant"), CASES, ids=NAMES)
def test_a_trial_begins_as_the_trainers(method: str, variant: dict[str, str]) -> None:
    setup = prepared(settings(method, 1, variant=variant, optimizer=OPTIMIZERS["adamw"]))
    solo, csr = attached(Solo(1), [setup]), attached(Csr(1), [setup])
    assert same(solo.snapshot(0), csr.snapshot(0))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("method", "variant"), CASES, ids=NAMES)
def test_one_update_gives_the_trainers_state(
    method: str, variant: dict[str, str], optimizer: str
) -> None:
    for number in range(3):
        setup = prepared(settings(method, number, variant=variant, optimizer=OPTIMIZERS[optimizer]))
        state, _ = trainer.train_epoch(setup, trainer.begin(setup))
        if setup.method.decide is None:
            continue
        g = torch.Generator().manual_seed(number)
        # Rounded, so that there are ties.
        grads = {
            name: (torch.randn(shape, generator=g) * 4).round()
            for name, shape in setup.sparse.items()
        }
        slot = restore(setup, checkpoint.encode(state))
        flat = {name: grad.flatten() for name, grad in grads.items()}
        update_topology(
            slot,
            {name: flat[name][at] for name, at in slot.index().items()},
            lambda name, flat=flat: lambda start, stop: -flat[name][start:stop].abs(),  # type: ignore[misc]
        )
        after = trainer.topology_update(setup, state, grads)
        assert same(snapshot(slot), checkpoint.encode(after))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("method", "variant"), CASES, ids=NAMES)
def test_epochs_are_the_trainers(method: str, variant: dict[str, str], optimizer: str) -> None:
    """Five slots with other numbers each, two of them in a group, updates in mid-epoch too."""
    setups = slots(method, variant=variant, optimizer=OPTIMIZERS[optimizer])
    solo, csr = attached(Solo(5), setups), attached(Csr(5), setups)
    for epoch in range(3):
        expected, got = solo.advance(), csr.advance()
        for slot, setup in enumerate(setups):
            a, b = solo.snapshot(slot), csr.snapshot(slot)
            assert list(got[slot]) == list(expected[slot])
            assert a["counts"].keys() == b["counts"].keys()
            for name, at in a["index"].items():
                assert len(at) == len(b["index"][name])
                # A position that differs is absent from one of the masks: two in the whole.
                missing = index.num_missing(at, b["index"][name])
                assert 2 * missing <= 0.005 * setup.sparse[name].numel()
            if epoch == 0:
                assert without_time(got[slot]) == pytest.approx(
                    without_time(expected[slot]), rel=1e-4, abs=1e-4
                )
                assert difference(a, b, setup) < 1e-4


def test_a_trial_moves_from_solo_to_csr_and_back() -> None:
    for optimizer in OPTIMIZERS.values():
        setups = slots("sm", 3, variant={"growth": "random"}, optimizer=optimizer)
        solo = attached(Solo(3), setups)
        solo.advance()
        starts = [solo.snapshot(slot) for slot in range(3)]
        csr = attached(Csr(3), setups, starts)
        for slot, setup in enumerate(setups):
            assert same(csr.snapshot(slot), starts[slot])
            decoded = checkpoint.decode(setup, csr.snapshot(slot))
            assert isinstance(decoded, TrialState)
            assert same(checkpoint.encode(decoded), starts[slot])
        csr.advance()
        back = attached(Solo(3), setups, [csr.snapshot(slot) for slot in range(3)])
        solo.advance()
        expected, got = solo.advance(), back.advance()
        for slot in range(3):
            assert without_time(got[slot]) == pytest.approx(
                without_time(expected[slot]), rel=1e-3, abs=1e-3
            )


@pytest.mark.parametrize("dense_layers", [["first"], ["last"], ["fc2"], ["first", "last"]])
def test_layers_left_dense(dense_layers: list[str]) -> None:
    setups = [
        prepared(settings("set", number, dense_layers=dense_layers, density=0.95 - 0.05 * number))
        for number in range(2)
    ]
    solo, csr = attached(Solo(2), setups), attached(Csr(2), setups)
    expected, got = solo.advance(), csr.advance()
    for slot, setup in enumerate(setups):
        assert without_time(got[slot]) == pytest.approx(without_time(expected[slot]), abs=1e-4)
        a, b = solo.snapshot(slot), csr.snapshot(slot)
        assert same(a["index"], b["index"]) and difference(a, b, setup) < 1e-4
        for kind in ("params", "first", "second"):
            shapes = {name: (list(e), next(iter(e.values())).shape) for name, e in a[kind].items()}
            assert shapes == {
                name: (list(e), next(iter(e.values())).shape) for name, e in b[kind].items()
            }


@pytest.mark.parametrize("method", ["set", "dsr", "rigl", "sm"])
@pytest.mark.parametrize(("density", "widths"), [(0.001, [24, 16]), (0.003, [20, 4])])
def test_hardly_any_weights(method: str, density: float, widths: list[int]) -> None:
    """Three weights of 2,080: one in each layer. Then 4 of 1,400."""
    variant = {"growth": "random"} if method == "sm" else {}
    trial = settings(method, 1, density=density, variant=variant, update=UpdateSettings(every=2))
    # No more than the three that are needed, rounded up.
    trial.density = max(
        trial.density, 3.001 / (64 * widths[0] + widths[0] * widths[1] + widths[1] * 10)
    )
    trial.model.widths = widths
    setup = prepared(trial)
    solo, csr = attached(Solo(1), [setup]), attached(Csr(1), [setup])
    assert min(map(len, csr.snapshot(0)["index"].values())) == 1
    for _ in range(3):
        expected, got = solo.advance()[0], csr.advance()[0]
        assert without_time(got) == pytest.approx(without_time(expected), rel=1e-4, abs=1e-4)
        assert same(solo.snapshot(0)["index"], csr.snapshot(0)["index"])


def test_groups_in_other_epochs_and_orders() -> None:
    """Slots with other splits, other orders of batches and other epochs, with augmentation."""
    changes = [{"seed": 0}, {"seed": 3}, {"seed": 0, "order_seed": None}, {"seed": 3}]
    setups = [prepared(settings("set", k, **change)) for k, change in enumerate(changes)]
    for setup in setups:
        setup.settings.data.augment = "shift"
    solo, csr = Solo(4), Csr(4)
    for slot, setup in enumerate(setups):
        solo.attach(slot, setup, None)
        csr.attach(slot, setup, None)
        expected, got = solo.advance(), csr.advance()
        assert list(got) == list(expected)
        for place, metrics in got.items():
            assert without_time(metrics) == pytest.approx(
                without_time(expected[place]), rel=1e-3, abs=1e-3
            )
    assert [csr.snapshot(slot)["counts"]["epoch"] for slot in range(4)] == [4, 3, 2, 1]


def test_without_validation_and_with_one_short_batch() -> None:
    setup = prepared(settings("set", data=DataSettings(limit=400, validation=0.0)))
    setup.settings.train.batch_size = 1000
    assert setup.steps_per_epoch == 1
    expected, got = attached(Solo(1), [setup]).advance(), attached(Csr(1), [setup]).advance()
    assert list(got[0]) == list(expected[0]) and "val/loss" not in got[0]
    assert without_time(got[0]) == pytest.approx(without_time(expected[0]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["set", "dsr", "rigl"])
def test_layers_of_2000(method: str) -> None:
    changes: dict[str, Any] = {"model": ModelSettings(name="mlp", widths=[2000, 2000])}
    setups = [prepared(settings(method, k, density=0.02 + 0.03 * k, **changes)) for k in range(2)]
    solo, csr = attached(Solo(2), setups), attached(Csr(2), setups)
    for _ in range(2):
        expected, got = solo.advance(), csr.advance()
    for slot, setup in enumerate(setups):
        assert without_time(got[slot]) == pytest.approx(without_time(expected[slot]), rel=1e-3)
        a, b = solo.snapshot(slot)["index"], csr.snapshot(slot)["index"]
        for name, at in a.items():
            assert len(at) == len(b[name])
            missing = index.num_missing(at, b[name])
            assert 2 * missing <= 0.005 * setup.sparse[name].numel()


# A slot and its neighbours ------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [64, 37])
@pytest.mark.parametrize(
    ("method", "optimizer"), [("set", "sgd"), ("dsr", "nesterov"), ("rigl", "adamw")]
)
def test_a_slot_does_not_depend_on_its_neighbours(
    method: str, optimizer: str, batch_size: int
) -> None:
    """A trial alone; in slot 2 of 5 with neighbours that are there, join late, leave or diverge."""
    train = TrainSettings(batch_size=batch_size)
    setups = slots(method, 5, optimizer=OPTIMIZERS[optimizer], train=train)
    wild = settings(method, 4, optimizer=OPTIMIZERS[optimizer], train=train)
    wild.optimizer.lr = 1e30
    alone, among = Csr(1), Csr(5)
    alone.attach(0, setups[2], None)
    among.attach(0, setups[0], None)
    among.attach(2, setups[2], None)
    among.attach(4, prepared(wild), None)
    for epoch in range(4):
        if epoch == 1:
            among.attach(1, setups[1], None)  # two epochs at once from here
        if epoch == 2:
            among.detach(0)
            among.attach(3, setups[3], None)
        if epoch == 3:
            among.detach(4)
        expected, got = alone.advance()[0], among.advance()
        assert without_time(got[2]) == without_time(expected)
        assert same(alone.snapshot(0), among.snapshot(2))
        if epoch < 3:
            assert got[4]["diverged"] == 1.0
        assert all(got[slot]["diverged"] == 0.0 for slot in got if slot != 4)


@pytest.mark.parametrize(("method", "variant"), CASES, ids=NAMES)
def test_updates_of_a_diverged_trial_keep_their_counts(
    method: str, variant: dict[str, str]
) -> None:
    trial = settings(method, 2, variant=variant, update=UpdateSettings(every=1))
    trial.optimizer.lr = 1e30
    setup = prepared(trial)
    csr = attached(Csr(1), [setup])
    for _ in range(2):
        assert csr.advance()[0]["diverged"] == 1.0
        state = checkpoint.decode(setup, csr.snapshot(0))
        total = sum(int(mask.count_nonzero()) for mask in state.masks.values())
        slack = 3 if method == "sm" else 0  # a weight per layer, and what it carries
        assert abs(total - sum(setup.targets.values())) <= slack


def test_seconds_of_the_slots_add_up() -> None:
    csr = attached(Csr(3), slots("set", 3))
    began = time.perf_counter()
    got = csr.advance()
    took = time.perf_counter() - began
    seconds = [metrics["device_seconds"] for metrics in got.values()]
    assert 0.5 * took < sum(seconds) <= took
    assert seconds == sorted(seconds)  # the denser, the more


def test_a_snapshot_of_another_format_is_refused() -> None:
    setup = prepared(settings())
    snapshot = attached(Csr(1), [setup]).snapshot(0) | {"format": 99}
    with pytest.raises(ValueError, match="checkpoint format 99"):
        Csr(1).attach(0, setup, snapshot)


def test_what_csr_cannot_train() -> None:
    assert Csr.unfit(prepared(settings("set"))) == ""
    assert Csr.unfit(prepared(settings("sm", variant={"growth": "gradient"}))) == ""
    assert "every step" in Csr.unfit(prepared(settings("sm")))
    assert "begins dense" in Csr.unfit(prepared(settings("dst")))
    half = settings("set", train=TrainSettings(precision="bfloat16"))
    assert "bfloat16" in Csr.unfit(prepared(half))
    big = DATASET._replace(
        train=data.Arrays(torch.zeros(400, 1, 28, 28, dtype=torch.uint8), DATASET.train.labels)
    )
    lenet = settings("set", model=ModelSettings(name="lenet5"))
    assert "lenet5" in Csr.unfit(prepare(lenet, CPU, big))


# Positions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 100, 1 << 18])
@pytest.mark.parametrize("num", [0, 1, 30, 200, 900, 2000])
def test_a_streamed_choice_is_that_of_the_dense_draw(
    chunk: int, num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "CHUNK", chunk)
    size, stream = 1000, noise.key(3, "choose", 1, f"layer{chunk}")
    excluded = (
        torch.randperm(size, generator=torch.Generator().manual_seed(num))[:100].sort().values
    )
    eligible = torch.ones(size, dtype=torch.bool)
    eligible[excluded] = False
    drawn = noise.uniform(stream, torch.arange(size))
    expected = lowest(drawn, eligible, torch.tensor(float(num), dtype=torch.float64))
    got = index.random_positions(stream, size, excluded, num, CPU)
    assert torch.equal(got, expected.nonzero().squeeze(1))


@pytest.mark.parametrize("chunk", [7, 100, 1 << 18])
def test_a_streamed_choice_with_ties_and_nan(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "CHUNK", chunk)
    g = torch.Generator().manual_seed(0)
    for num in range(0, 400, 23):
        score = torch.randint(-3, 4, (400,), generator=g).float()
        score[torch.randint(400, (90,), generator=g)] = float("nan")
        score[torch.randint(400, (30,), generator=g)] = float("-inf")
        score[torch.randint(400, (30,), generator=g)] = float("inf")
        excluded = torch.randperm(400, generator=g)[:50].sort().values
        eligible = torch.ones(400, dtype=torch.bool)
        eligible[excluded] = False
        expected = lowest(score, eligible, torch.tensor(float(num), dtype=torch.float64))
        got = index.lowest_positions(lambda a, b, s=score: s[a:b], 400, excluded, num)  # type: ignore[misc]
        assert torch.equal(got, expected.nonzero().squeeze(1))


def test_initial_positions_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "CHUNK", 50)
    setup = prepared(settings("set", 1))
    slot = begin(setup)
    masks = random_masks(setup.sparse, setup.targets, setup.settings.seed)
    for name, mask in masks.items():
        assert torch.equal(slot.index()[name], mask.flatten().nonzero().squeeze(1))


def test_growth_by_gradient_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows that begin and end in the middle of one choose as one block does, but for
    gradients that a product of another size rounds differently."""
    setups = slots("rigl", 2, update=UpdateSettings(every=2))
    results = []
    for chunk in (1 << 18, 37):
        monkeypatch.setattr(index, "CHUNK", chunk)
        csr = attached(Csr(2), setups)
        csr.advance()
        results.append([csr.snapshot(slot)["index"] for slot in range(2)])
    for slot in range(2):
        for name, at in results[0][slot].items():
            assert len(at) == len(results[1][slot][name])
            missing = index.num_missing(at, results[1][slot][name])
            assert 2 * missing <= 0.005 * setups[slot].sparse[name].numel()


def test_sets_of_positions() -> None:
    a, b, none = torch.tensor([1, 4, 9]), torch.tensor([4, 5, 9, 11]), torch.tensor([]).long()
    assert index.union(a, b).tolist() == [1, 4, 5, 9, 11]
    assert index.union(none, b).tolist() == b.tolist()
    assert index.union(a, none).tolist() == a.tolist()
    assert index.num_missing(a, b) == 1 and index.num_missing(b, a) == 2
    assert index.num_missing(b, none) == 4 and index.num_missing(none, b) == 0


# Size ---------------------------------------------------------------------------------------------

BIG = """
    import sys, tempfile, torch
    from pathlib import Path
    from sparsetune.engine.csr.backend import Csr
    from sparsetune.settings import ModelSettings, TrialSettings, UpdateSettings
    from sparsetune.training import checkpoint, data
    from sparsetune.training.setup import keep_freed_memory, prepare

    method, optimizer = sys.argv[1:]
    torch.set_num_threads(1)
    keep_freed_memory()
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (570, 1, 28, 28), dtype=torch.uint8, generator=g)
    arrays = data.Arrays(images, torch.randint(0, 10, (570,), generator=g))
    source = data.Dataset("random", arrays, 10, torch.tensor([0.5]), torch.tensor([0.3]), "")
    # Uniform, 0.001 of each layer: 15,680 weights, 400,000 in the middle, 200 in the last.
    trial = TrialSettings(
        method=method,
        density=0.001,
        hp={"threshold": 0.001} if method == "dsr" else {},
        epochs=3,
        model=ModelSettings(name="mlp", widths=[20000, 20000]),
        update=UpdateSettings(every=2),
    )
    trial.optimizer.name = optimizer
    trial.optimizer.lr = 0.001
    setup = prepare(trial, torch.device("cpu"), source)
    assert setup.targets == {
        "fc1.weight": 15680, "fc2.weight": 400000, "fc3.weight": 200
    }, setup.targets
    csr = Csr(1)
    csr.attach(0, setup, None)
    with tempfile.TemporaryDirectory() as folder:
        first = csr.advance()[0]
        checkpoint.save(Path(folder), csr.snapshot(0), [first])
        snapshot, records = checkpoint.newest(Path(folder))
    again = Csr(1)
    again.attach(0, setup, snapshot)
    expected, got = csr.advance()[0], again.advance()[0]
    for metrics in (first, expected, got):
        metrics.pop("device_seconds")
    assert expected == got, (expected, got)
    assert got["method/churn"] > 0 and got["density/ever"] > got["density/sparse"]
    num = sum(map(len, again.snapshot(0)["index"].values()))
    assert num == 415880, num
    # The peak of resident memory, in kB.
    status = Path("/proc/self/status").read_text()
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux")
@pytest.mark.parametrize(
    ("method", "optimizer"), [("set", "sgd"), ("dsr", "sgd"), ("rigl", "adamw")]
)
def test_400_million_positions_stay_below_a_gigabyte_and_a_half(
    method: str, optimizer: str
) -> None:
    """Where one dense tensor of the middle layer would take 1.6 GB."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BIG), method, optimizer],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.5e6  # kB
