"""FLOPs against worked cases."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor, nn

from sparsetune.settings import ModelSettings
from sparsetune.training import flops

# Multiply-adds of the three layers, twice: 784 x 300, 300 x 100, 100 x 10.
LENET300100 = {"fc1.weight": 470_400.0, "fc2.weight": 60_000.0, "fc3.weight": 2_000.0}
TENTH = dict.fromkeys(LENET300100, 0.1)


def test_lenet300100_on_784_inputs() -> None:
    assert flops.forward_flops(ModelSettings("lenet300100"), (1, 28, 28), 10) == LENET300100


def test_lenet5_on_28x28() -> None:
    # Convolutions: output pixels x weights x 2: 24 x 24 x 500 x 2 and 8 x 8 x 25,000 x 2.
    assert flops.forward_flops(ModelSettings("lenet5"), (1, 28, 28), 10) == {
        "conv1.weight": 576_000,
        "conv2.weight": 3_200_000,
        "fc1.weight": 800_000,
        "fc2.weight": 10_000,
    }


class Mixed(nn.Module):
    """A nested layer, one used twice, one never, a weight under another name, a bare product."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.twice = nn.Linear(4, 4, bias=False)
        self.never = nn.Linear(4, 4)
        self.matrix = nn.Parameter(torch.zeros(4, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.twice(self.twice(self.body(images.flatten(1))))
        return x @ self.matrix


def test_a_users_class_and_what_belongs_to_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("flops_of_a_user")
    module.Mixed, module.Linear = Mixed, nn.Linear  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flops_of_a_user", module)
    assert flops.forward_flops(ModelSettings("flops_of_a_user:Mixed"), (1, 2, 2), 3) == {
        "matrix": 0,
        "body.0.weight": 32,
        "twice.weight": 64,
        "never.weight": 0,
        "": 24,  # the bare product, 4 x 3 x 2
    }
    # The network may be a layer itself; on rows of 4 it runs once per row.
    args = {"in_features": 4, "out_features": 3}
    alone = flops.forward_flops(ModelSettings("flops_of_a_user:Linear", args=args), (1, 2, 4), 3)
    assert alone == {"weight": 48}


@pytest.mark.parametrize(
    ("dense_gradient", "interval", "expected"),
    [
        ("never", 1, 159_720),  # SET: 3 x 53,240
        ("always", 1, 638_880),  # SM, DST: 2 x 53,240 + 532,400
        ("at_update", 1, 638_880),  # an update at every step is "always"
        ("at_update", 100, 159_720 + 4_791.6),  # RigL: (532,400 - 53,240) / 100 more
    ],
)
def test_a_step_at_density_a_tenth(dense_gradient: str, interval: int, expected: float) -> None:
    found = flops.trial_flops(LENET300100, TENTH, dense_gradient, interval)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dense_gradient", ["never", "at_update", "always"])
def test_dense_is_density_1_of_any_method(dense_gradient: str) -> None:
    ones = dict.fromkeys(LENET300100, 1.0)
    assert flops.trial_flops(LENET300100, ones, dense_gradient, 50) == 1_597_200
    assert flops.trial_flops(LENET300100, {}, dense_gradient, 50) == 1_597_200


def test_layers_count_by_their_own_density_and_the_rest_as_dense() -> None:
    # 100 x 0.5 + 10 x 1 + 1 x 1 = 61, three times.
    assert flops.trial_flops({"a": 100, "b": 10, "": 1}, {"a": 0.5, "b": 1.0}) == 183
