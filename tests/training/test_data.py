"""Data: settings that cannot work, a user's function, splits, order, inputs, augmentation."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsetune.settings import DataSettings
from sparsetune.training import data

# Settings that cannot work


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"validation": 1.0}, "^data.validation: 1.0 is out of .*; allowed: 0 or more and below 1"),
        ({"limit": -1}, "^data.limit: -1 is out of range; allowed: 0 or more"),
        ({"augment": "shft"}, r"^data.augment: 'shft' .* mean 'shift'\?; known: none, shift, crop"),
        ({"name": "mnits"}, r"^data.name: 'mnits' is unknown; did you mean 'mnist'\?; known: dig"),
        ({"name": "nowhere:get"}, "^data.name: module 'nowhere' cannot be imported: No module"),
        ({"name": "x", "path": "/no/such"}, "^data.path: '/no/such' does not exist; give a folder"),
        ({"path": "."}, "^data.path: '.' would not be read, because data.name=digits"),
    ],
)
def test_check_names_the_key_and_what_is_allowed(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.check(DataSettings(**changed))  # type: ignore[arg-type]


# A user's function

USER_MODULE = """
import numpy as np, torch
def flat():
    return np.ones((4, 5), np.float64), np.arange(4), torch.zeros(2, 5), [0, 1]
def grey():
    return torch.ones(4, 6, 7, dtype=torch.uint8), torch.arange(4), torch.zeros(2, 6, 7), [0, 1]
def color():
    return np.ones((4, 3, 6, 7), np.uint8), np.arange(4), np.ones((2, 3, 6, 7), np.uint8), [0, 1]
def channels_last():
    return np.ones((4, 6, 7, 3), np.uint8), np.arange(4), np.ones((2, 6, 7, 3), np.uint8), [0, 1]
def short():
    return np.ones((4, 5), np.uint8), np.arange(3), np.ones((4, 5), np.uint8), np.arange(4)
def three():
    return 1, 2, 3
def integers():
    return np.ones((4, 5), np.int64), np.arange(4), np.ones((4, 5), np.int64), np.arange(4)
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, which is not on the path: as a console script sees it."""
    (tmp_path / "data_of_a_user.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "data_of_a_user", raising=False)
    return "data_of_a_user"


def test_a_users_function(user_module: str) -> None:
    expected = {
        "flat": ((4, 1, 1, 5), torch.float32),
        "grey": ((4, 1, 6, 7), torch.uint8),
        "color": ((4, 3, 6, 7), torch.uint8),
    }
    for function, (shape, dtype) in expected.items():
        settings = DataSettings(name=f"{user_module}:{function}")
        data.check(settings)
        mine = data.load(settings)
        assert mine.train.images.shape == shape and mine.train.images.dtype == dtype
        assert mine.num_classes == 4 and mine.train.labels.dtype == torch.int64
        assert data.load_test(settings).labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("channels_last", r"shape \[4, 6, 7, 3\], channels last; permute"),
        ("short", r"labels of shape \[3\] for 4 images"),
        ("three", "returned 3 values; return"),
        ("integers", "torch.int64 images; uint8 or a float"),
        ("colour", "has no 'colour'; did you mean 'color'?"),
    ],
)
def test_a_users_function_that_does_not_fit(user_module: str, function: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^data.name: .*{message}"):
        data.load(DataSettings(name=f"{user_module}:{function}"))


# Splits and order


def test_split_by_hand_and_by_seed() -> None:
    train, held_out = data.split(10, 0.3, seed=1)
    assert len(held_out) == 3 and sorted([*train.tolist(), *held_out.tolist()]) == list(range(10))
    assert train.tolist() == sorted(train.tolist())
    torch.manual_seed(5)  # the global generator has no part in it
    state = torch.get_rng_state()
    assert torch.equal(data.split(10, 0.3, seed=1)[1], held_out)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(data.split(10, 0.3, seed)[1].tolist()) for seed in range(20)}) > 10


@pytest.mark.parametrize(
    ("num", "validation", "num_held_out"), [(10, 0.0, 0), (10, 0.01, 1), (3, 0.99, 2), (2, 0.5, 1)]
)
def test_split_leaves_one_on_each_side(num: int, validation: float, num_held_out: int) -> None:
    train, held_out = data.split(num, validation, seed=0)
    assert (len(train), len(held_out)) == (num - num_held_out, num_held_out)
    assert train.dtype == held_out.dtype == torch.int64


def test_one_image_cannot_be_split() -> None:
    with pytest.raises(ValueError, match=r"^data.validation: 0.1 of 1 image .* raise data.limit"):
        data.split(1, 0.1, seed=0)


def test_epoch_order_is_keyed_by_both_numbers() -> None:
    state = torch.get_rng_state()
    orders = {(s, e): data.epoch_order(50, s, e) for s in range(3) for e in range(3)}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders.values())
    assert len({tuple(order.tolist()) for order in orders.values()}) == 9
    assert torch.equal(data.epoch_order(50, 2, 1), orders[2, 1])


def test_steps_leave_out_the_incomplete_batch() -> None:
    assert [data.steps_per_epoch(n, 4) for n in (3, 4, 7, 8)] == [1, 1, 1, 2]


# Inputs and augmentation


def test_to_input_by_hand() -> None:
    # Channel 0: 0 and 255, mean 0.5, deviation 0.5 -> -1 and 1; channel 1: 51 and 51 (0.2),
    # mean 0.2, deviation 0.1 -> 0.
    images = torch.tensor([[[[0, 255]], [[51, 51]]]], dtype=torch.uint8)
    mean, deviation = torch.tensor([0.5, 0.2]), torch.tensor([0.5, 0.1])
    out = data.to_input(images, mean, deviation, normalize=True)
    torch.testing.assert_close(out, torch.tensor([[[[-1.0, 1.0]], [[0.0, 0.0]]]]))
    out = data.to_input(images, mean, deviation, normalize=False)
    torch.testing.assert_close(out, torch.tensor([[[[0.0, 1.0]], [[0.2, 0.2]]]]))
    floats = torch.tensor([[[[0.5, 1.5]], [[0.2, 0.3]]]])
    out = data.to_input(floats, mean, deviation, normalize=True)
    torch.testing.assert_close(out, torch.tensor([[[[0.0, 2.0]], [[0.0, 1.0]]]]))
    assert torch.equal(data.to_input(floats, mean, deviation, normalize=False), floats)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_training_images_have_mean_0_and_deviation_1(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randint(0, 256, (50, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    images[:, 2] = 7  # a channel that never changes becomes 0, not nan
    module = types.ModuleType("made_up")
    module.get = lambda: (images.to(dtype), torch.arange(50), images, [0])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up", module)
    made = data.load(DataSettings(name="made_up:get"))
    out = data.to_input(made.train.images, made.mean, made.deviation, normalize=True)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    deviation = out.std((0, 2, 3), correction=0)
    torch.testing.assert_close(deviation, torch.tensor([1.0, 1.0, 0.0]), atol=1e-5, rtol=0)


def offsets(rows: int, columns: int, flip: bool) -> data.Offsets:
    return data.Offsets(torch.tensor([rows]), torch.tensor([columns]), torch.tensor([flip]))


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        (offsets(0, 0, False), [[1, 2, 3], [4, 5, 6]]),
        (offsets(1, 0, False), [[4, 5, 6], [0, 0, 0]]),  # up by one
        (offsets(0, -1, False), [[0, 1, 2], [0, 4, 5]]),  # to the right by one
        (offsets(0, 0, True), [[3, 2, 1], [6, 5, 4]]),
        (offsets(-1, 1, True), [[0, 0, 0], [0, 3, 2]]),  # down, left: 2 3 0; flipped: 0 3 2
        (offsets(2, 0, False), [[0, 0, 0], [0, 0, 0]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augment_by_hand(
    drawn: data.Offsets, expected: list[list[int]], dtype: torch.dtype
) -> None:
    image = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=dtype)
    images = torch.stack([image, 10 * image])[None]  # two channels move together
    out = data.augment(images, drawn, torch.tensor([0]))
    want = torch.tensor(expected, dtype=dtype)
    assert torch.equal(out, torch.stack([want, 10 * want])[None]) and out.dtype == dtype


@pytest.mark.parametrize("kind", ["shift", "crop+flip"])
def test_a_draw_belongs_to_the_image_and_not_to_the_batch(kind: str) -> None:
    images = torch.randint(0, 256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    drawn = data.augmentation(kind, 40, order_seed=3, epoch=2, size=(16, 16))
    whole = data.augment(images, drawn, torch.arange(40))
    positions = torch.tensor([7, 31, 2])
    again = data.augmentation(kind, 40, order_seed=3, epoch=2, size=(16, 16))
    assert torch.equal(data.augment(images[positions], again, positions), whole[positions])
    other = data.augmentation(kind, 40, order_seed=3, epoch=3, size=(16, 16))
    assert not torch.equal(data.augment(images, other, torch.arange(40)), whole)


@pytest.mark.parametrize(
    ("kind", "size", "reach"),
    [
        ("shift", (28, 28), (2, 2)),
        ("shift", (8, 8), (1, 1)),
        ("crop+flip", (32, 32), (4, 4)),
        ("crop+flip", (1, 64), (0, 4)),  # a row of features stays a row
    ],
)
def test_reach(kind: str, size: tuple[int, int], reach: tuple[int, int]) -> None:
    drawn = data.augmentation(kind, 2000, 0, 0, size)
    assert drawn is not None
    for tensor, most in zip(drawn[:2], reach, strict=True):
        assert sorted(set(tensor.tolist())) == list(range(-most, most + 1))
    share: Tensor = drawn.flip.double().mean()
    assert share == 0 if kind == "shift" else 0.45 < share < 0.55


def test_none_leaves_the_images_alone() -> None:
    images = torch.ones(2, 1, 3, 3)
    assert data.augmentation("none", 2, 0, 0, (3, 3)) is None
    assert data.augment(images, None, torch.arange(2)) is images
