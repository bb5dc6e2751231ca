"""The networks, as plain nn.Modules, and how their parameters start.

The rule to know: a weight is a parameter with at least two dimensions. Weights are what becomes
sparse and what density counts; biases and normalisation parameters stay dense and are not counted.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetune.methods import noise
from sparsetune.names import import_object, suggestion, users_code
from sparsetune.settings import ModelSettings, check_group

Shape = tuple[int, int, int]  # channels, height, width of one image

LENET300100_WIDTHS = (300, 100)
LENET5_WIDTHS = (20, 50, 500)


class MLP(nn.Module):
    """Images flattened, then linear layers fc1, fc2, ... with ReLU between them."""

    def __init__(self, input_shape: Shape, num_classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        sizes = [math.prod(input_shape), *widths, num_classes]
        for number, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes), start=1):
            self.add_module(f"fc{number}", nn.Linear(fan_in, fan_out))

    def forward(self, images: Tensor) -> Tensor:
        *hidden, last = self.children()
        x = images.flatten(1)
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)  # type: ignore[no-any-return]


class LeNet5(nn.Module):
    """LeNet-5 as in Caffe, and ReLU after the convolutions too, as sparse training papers have it.

    `widths`: channels of the two 5x5 convolutions, then neurons of the hidden layer.
    """

    def __init__(self, input_shape: Shape, num_classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        channels, *size = input_shape
        # A convolution takes 4 pixels off each axis, its pooling halves what is left.
        height, width = (((pixels - 4) // 2 - 4) // 2 for pixels in size)
        if min(height, width) < 1:
            raise ValueError(
                f"model.name: lenet5 needs images of 16x16 or more, and these are "
                f"{size[0]}x{size[1]}; use mlp, or other data"
            )
        first, second, hidden = widths
        self.conv1 = nn.Conv2d(channels, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(second * height * width, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(images), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))  # type: ignore[no-any-return]


MODELS: dict[str, type[MLP] | type[LeNet5]] = {"mlp": MLP, "lenet300100": MLP, "lenet5": LeNet5}


def check(settings: ModelSettings) -> None:
    """ValueError for settings that cannot work, as far as can be told without the data."""
    named = ":" in settings.name
    if named:
        cls = import_object(settings.name, "model.name")
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise ValueError(f"model.name: {settings.name} is not a class of torch.nn.Module")
    elif settings.name not in MODELS:
        raise ValueError(
            f"model.name: {settings.name!r} is unknown{suggestion(settings.name, MODELS)}; "
            f"known: {', '.join(MODELS)}; or give your own as package.module:Class"
        )
    elif settings.args:
        raise ValueError(
            f"model.args: {settings.args} go to a class of your own (model.name=package.module:"
            f"Class); {settings.name} takes none"
        )
    check_group("model", settings)
    if settings.match_density and named:
        raise ValueError(
            f"model.match_density: the widths of {settings.name} are not known here; "
            "scale it by its own model.args"
        )


def build(settings: ModelSettings, input_shape: Shape, num_classes: int) -> nn.Module:
    """The network, initialised by PyTorch; trials start from `initial_params` instead.

    A user's class gets `input_shape` and `num_classes` as keywords, each if it takes it.
    """
    check(settings)
    if ":" in settings.name:
        return _build_users(settings, input_shape, num_classes)
    cls = MODELS[settings.name]
    widths = {"mlp": settings.widths, "lenet300100": LENET300100_WIDTHS, "lenet5": LENET5_WIDTHS}
    chosen: Sequence[int] = widths[settings.name]
    if settings.match_density:

        def num_weights(widths: Sequence[int]) -> int:
            with torch.device("meta"):
                module = cls(input_shape, num_classes, widths)
            return sum(shape.numel() for shape in weights(module).values())

        chosen = _scaled_widths(chosen, settings.match_density, num_weights)
    return cls(input_shape, num_classes, chosen)


def probe(settings: ModelSettings, input_shape: Shape, num_classes: int) -> nn.Module:
    """The network on the meta device, tried there: forward and backward of two images.

    ValueError where that fails, gives no [2, num_classes], or leaves a parameter without gradient.
    """
    with torch.device("meta"):
        module = build(settings, input_shape, num_classes)
        images = torch.empty(2, *input_shape)
    if ":" not in settings.name:
        return module
    doing = f"model.name: {settings.name} on images of shape {list(input_shape)}"
    with users_code(doing):
        logits = module(images)
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{doing} gives {got} for 2 images; it must give [2, {num_classes}]")
    named = dict(module.named_parameters())
    if not weights(module):
        raise ValueError(f"{doing} has no weight (a parameter of two dimensions or more)")
    with users_code(f"{doing}: the backward pass"):
        grads = torch.autograd.grad(logits.sum(), list(named.values()), allow_unused=True)
    unused = [name for name, grad in zip(named, grads, strict=True) if grad is None]
    if unused:
        raise ValueError(
            f"{doing} does not use its parameters {', '.join(unused)}; take them out of the module"
        )
    return module


def weights(module: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of the weights, in the module's order."""
    return {name: p.shape for name, p in module.named_parameters() if p.dim() >= 2}


def initial_params(
    settings: ModelSettings, input_shape: Shape, num_classes: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters (float32) and buffers of a new trial, on the CPU, keyed by its seed.

    Our own networks take parameter number i (flat order) from `noise.uniform` of position i and
    `init_bound`, so that a truly sparse backend can draw the positions that it holds and no others.
    A user's class initialises itself from PyTorch's CPU generator, seeded by `seed`.
    """
    if ":" in settings.name:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            # Not torch.manual_seed: it would also seed the GPUs, which are not forked here.
            torch.default_generator.manual_seed(seed)
            module = build(settings, input_shape, num_classes)
        params = {name: p.detach().float().clone() for name, p in module.named_parameters()}
        return params, {name: b.detach().clone() for name, b in module.named_buffers()}
    with torch.device("meta"):
        module = build(settings, input_shape, num_classes)
    params = {}
    for layer_name, layer in module.named_children():
        bound = init_bound(layer.get_parameter("weight").shape)
        for name, parameter in layer.named_parameters(prefix=layer_name):
            stream, places = noise.key(seed, "init", 0, name), torch.arange(parameter.numel())
            drawn = noise.uniform(stream, places)
            params[name] = initial_values(drawn, bound).reshape(parameter.shape)
    return params, {}


def init_bound(weight_shape: torch.Size) -> float:
    """PyTorch's default for Linear and Conv2d: weight and bias in U(-bound, bound)."""
    return 1 / math.sqrt(math.prod(weight_shape[1:]))


def initial_values(drawn: Tensor, bound: float) -> Tensor:
    """float32 in U(-bound, bound) from uniform float64 in [0, 1)."""
    return ((2 * drawn - 1) * bound).float()


def _build_users(settings: ModelSettings, input_shape: Shape, num_classes: int) -> nn.Module:
    cls = import_object(settings.name, "model.name")
    signature = inspect.signature(cls)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    offered = {"input_shape": input_shape, "num_classes": num_classes}
    taken = {k: v for k, v in offered.items() if takes_any or k in signature.parameters}
    arguments = {**taken, **settings.args}  # args win, so that a user can override either
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"model.args: {settings.name}{signature}: {error}") from error
    with users_code(f"model.name: making {settings.name}"):
        module: nn.Module = cls(**arguments)
        weights(module)
    return module


def _scaled_widths(
    widths: Sequence[int], density: float, num_weights: Callable[[Sequence[int]], int]
) -> list[int]:
    """The widths times the one factor that brings `num_weights` closest to `density` of its own."""

    def scaled(factor: float) -> list[int]:
        return [max(1, math.floor(factor * width + 0.5)) for width in widths]

    target = density * num_weights(widths)
    minimum = num_weights(scaled(0.0))
    if target < minimum or not widths:
        raise ValueError(
            f"model.match_density: {density} of {num_weights(widths)} weights cannot be reached; "
            f"with every hidden width at 1 there are still {minimum} "
            f"(density {minimum / num_weights(widths):.4g})"
        )
    # Bisection closes in on the factor at which the count jumps over the target; what lies on
    # either side of the jump are the two candidates.
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if num_weights(scaled(middle)) <= target:
            low = middle
        else:
            high = middle
    return min(scaled(low), scaled(high), key=lambda w: abs(num_weights(w) - target))
