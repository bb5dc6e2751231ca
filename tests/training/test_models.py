"""Models: their weights, how they are scaled, and what they start from."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsetune.methods import noise
from sparsetune.settings import ModelSettings
from sparsetune.training import models

MNIST = (1, 28, 28)


def num_weights(settings: ModelSettings, input_shape: models.Shape = MNIST) -> int:
    module = models.build(settings, input_shape, 10)
    return sum(shape.numel() for shape in models.weights(module).values())


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[nn.Module]], str]:
    def register(cls: type[nn.Module]) -> str:
        module = types.ModuleType("models_of_a_user")
        setattr(module, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, "models_of_a_user", module)
        return f"models_of_a_user:{cls.__name__}"

    return register


class Norm(nn.Module):
    """A user's network with a normalisation, so with buffers, and an argument of its own."""

    def __init__(self, input_shape: models.Shape, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(input_shape[0], width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.out = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.out(self.norm(self.conv(images)).mean((2, 3)))
        return out


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ModelSettings("mlp", widths=[7]),
            {"fc1.weight": (7, 784), "fc2.weight": (10, 7)},
        ),
        (ModelSettings("mlp", widths=[]), {"fc1.weight": (10, 784)}),
        (
            ModelSettings("lenet300100", widths=[5]),  # its own widths, whatever is set
            {"fc1.weight": (300, 784), "fc2.weight": (100, 300), "fc3.weight": (10, 100)},
        ),
        (
            ModelSettings("lenet5"),
            {
                "conv1.weight": (20, 1, 5, 5),
                "conv2.weight": (50, 20, 5, 5),
                "fc1.weight": (500, 800),
                "fc2.weight": (10, 500),
            },
        ),
    ],
)
def test_weights_by_hand(settings: ModelSettings, expected: dict[str, tuple[int, ...]]) -> None:
    module = models.build(settings, MNIST, 10)
    assert {name: tuple(shape) for name, shape in models.weights(module).items()} == expected
    assert list(models.weights(module)) == list(expected)
    assert module(torch.zeros(3, *MNIST)).shape == (3, 10)


def test_lenet5_takes_other_sizes_and_refuses_small_images() -> None:
    for size in (16, 32, 33):
        module = models.build(ModelSettings("lenet5"), (3, size, size), 10)
        assert module(torch.zeros(2, 3, size, size)).shape == (2, 10)
    for shape in ((1, 8, 8), (1, 28, 15)):
        with pytest.raises(ValueError, match=f"16x16 or more, .* {shape[1]}x{shape[2]}; use mlp"):
            models.build(ModelSettings("lenet5"), shape, 10)


@pytest.mark.parametrize("name", models.MODELS)
def test_build_on_the_meta_device_allocates_nothing(name: str) -> None:
    with torch.device("meta"):
        module = models.build(ModelSettings(name, match_density=0.3), MNIST, 10)
        assert module(torch.empty(2, *MNIST)).shape == (2, 10)
    assert all(p.is_meta for p in module.parameters())


# Scaling


def test_match_density_by_hand() -> None:
    # One hidden layer of n on 4 inputs, 2 classes: 6n weights, 60 at n = 10. A quarter is 15: the
    # neighbours are n = 2 (12) and n = 3 (18), equally far; 0.27 is 16.2, closer to 18.
    settings = ModelSettings("mlp", widths=[10], match_density=0.27)
    module = models.build(settings, (1, 2, 2), 2)
    assert models.weights(module)["fc1.weight"] == (3, 4)


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 1.0])
def test_match_density_is_the_best_of_one_factor(name: str, density: float) -> None:
    full = num_weights(ModelSettings(name))
    error = abs(num_weights(ModelSettings(name, match_density=density)) - density * full)
    # No density in the neighbourhood leads to widths that would fit this one better.
    for other in (density * share for share in (0.9, 0.97, 0.99, 1.01, 1.03, 1.1)):
        if other <= 1:
            there = num_weights(ModelSettings(name, match_density=other))
            assert abs(there - density * full) >= error


def test_match_density_out_of_reach_names_the_minimum() -> None:
    # Widths of 1 on 784 inputs and 10 classes: 784 + 1 + 10 = 795 of 266,200.
    settings = ModelSettings("lenet300100", match_density=0.002)
    with pytest.raises(ValueError, match=r"match_density: 0.002 of 266200 .* still 795 \(density"):
        models.build(settings, MNIST, 10)
    with pytest.raises(ValueError, match="cannot be reached"):
        models.build(ModelSettings("mlp", widths=[], match_density=0.5), MNIST, 10)


# What a trial starts from


@pytest.mark.parametrize("name", models.MODELS)
def test_initial_params_have_pytorchs_distribution(name: str) -> None:
    settings = ModelSettings(name)
    params, buffers = models.initial_params(settings, MNIST, 10, 0)
    module = models.build(settings, MNIST, 10)
    assert list(params) == [name for name, _ in module.named_parameters()] and buffers == {}
    for name, parameter in module.named_parameters():
        default = parameter.detach()
        drawn, weight = params[name], params[name.rpartition(".")[0] + ".weight"]
        bound = math.prod(weight.shape[1:]) ** -0.5
        assert drawn.shape == default.shape and drawn.dtype == torch.float32
        assert drawn.abs().max() <= bound
        if drawn.numel() >= 300:
            assert drawn.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
            assert default.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    module.load_state_dict(params)  # the names are the module's own


def test_one_position_can_be_drawn_without_the_others() -> None:
    params, _ = models.initial_params(ModelSettings("lenet5"), MNIST, 10, 0)
    weight = params["conv2.weight"]
    number = noise.uniform(noise.key(0, "init", 0, "conv2.weight"), torch.tensor([1234]))
    value = (2 * number - 1) * models.init_bound(weight.shape)
    assert value.float() == weight.flatten()[1234]


def test_a_users_class_keeps_its_own_initialisation(user: Callable[..., str]) -> None:
    settings = ModelSettings(user(Norm), args={"width": 6})
    state = torch.get_rng_state()
    params, buffers = models.initial_params(settings, MNIST, 3, 1)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is left alone
    again, _ = models.initial_params(settings, MNIST, 3, 1)
    other, _ = models.initial_params(settings, MNIST, 3, 2)
    assert params["conv.weight"].shape == (6, 1, 3, 3) and params["out.weight"].shape == (3, 6)
    assert all(torch.equal(params[name], again[name]) for name in params)
    assert not torch.equal(params["conv.weight"], other["conv.weight"])
    assert torch.equal(params["norm.weight"], torch.ones(6))
    assert buffers["norm.num_batches_tracked"].dtype == torch.int64
    assert not any(tensor.requires_grad for tensor in (*params.values(), *buffers.values()))
    assert list(models.weights(models.build(settings, MNIST, 3))) == ["conv.weight", "out.weight"]


def test_a_users_class_gets_only_what_it_takes(user: Callable[..., str]) -> None:
    class Plain(nn.Linear):
        def __init__(self, num_classes: int) -> None:
            super().__init__(5, num_classes)

    module = models.build(ModelSettings(user(Plain)), (1, 1, 5), 3)
    assert models.weights(module) == {"weight": torch.Size([3, 5])}
    params, _ = models.initial_params(ModelSettings(user(Plain)), (1, 1, 5), 3, 0)
    assert set(params) == {"weight", "bias"}


def test_a_users_class_with_other_arguments(user: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=r"^model.args: .*Norm\(.*unexpected keyword .* 'depth'"):
        models.build(ModelSettings(user(Norm), args={"depth": 2}), MNIST, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ModelSettings("lenet"), r"^model.name: 'lenet' .* did you mean 'lenet5'\?; known: mlp,"),
        (ModelSettings("nowhere:Net"), "^model.name: module 'nowhere' cannot be imported: No mod"),
        (ModelSettings("torch.nn:Linea"), r"has no 'Linea'; did you mean 'Linear'\?"),
        (ModelSettings("math:sqrt"), "^model.name: math:sqrt is not a class of torch.nn.Module"),
        (ModelSettings("torch.nn:"), "^model.name: 'torch.nn:' is no import path; write package"),
        (ModelSettings(widths=[300, 0]), r"^model.widths: \[300, 0\] .* every width must be 1"),
        (ModelSettings(args={"a": 1}), r"^model.args: \{'a': 1\} go to a class of your own"),
        (
            ModelSettings(match_density=1.5),
            "^model.match_density: 1.5 is out of range; allowed: 0 to 1",
        ),
        (ModelSettings("torch.nn:Linear", match_density=0.5), "^model.match_density: the widths"),
    ],
)
def test_check_names_the_key_and_what_is_allowed(settings: ModelSettings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.check(settings)
