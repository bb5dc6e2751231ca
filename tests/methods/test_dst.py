"""DST's rule and variants on networks small enough to check by eye.

All expected values are worked out by hand from the paper, with the working beside them; none was
taken from the code.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from helpers.rows import Layers, active, first, row, sizes
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsetune.methods import METHODS, dst, update
from sparsetune.methods.contract import make_hyperparameters, make_variant
from sparsetune.testing.examples import (
    FINITE,
    difference,
    example,
    hooks,
    num_active,
    run,
    variants,
)
from sparsetune.testing.examples import SHAPES as EXAMPLES

torch.set_num_threads(1)


NAME = "w.threshold"


@pytest.mark.parametrize(
    ("x", "expected"),
    [(0, 2), (0.2, 1.2), (0.4, 0.4), (0.7, 0.4), (1, 0.4), (1.01, 0), (50, 0)],
)
def test_dsts_derivative(x: float, expected: float) -> None:
    for sign in (1, -1):
        got = dst.step_derivative(torch.tensor([sign * x], dtype=torch.float64))
        assert got.tolist() == pytest.approx([expected], abs=1e-12)


def numbers_of(hp: dict[str, float]) -> Any:
    return make_hyperparameters(METHODS["dst"], hp, make_variant(METHODS["dst"], {}))


def gates_of(params: Layers) -> Layers:
    return {name: dst.gate(params[name], t) for name, t in dst.thresholds(params).items()}


def sparsified(params: Layers) -> Layers:
    variant = make_variant(METHODS["dst"], {})
    return dst.METHOD.sparsify(params, gates_of(params), (), numbers_of({}), variant)


def pulled_back(grads: Layers, params: Layers, alpha: float) -> Layers:
    """Gradients of all that is trained; fails where params or gates are written to."""
    given = {name: grad.clone() for name, grad in grads.items()}  # which are used up
    gates = gates_of(params)
    before = [{name: t.clone() for name, t in layers.items()} for layers in (params, gates)]
    assert dst.METHOD.pull_back is not None
    out: Layers = dst.METHOD.pull_back(
        given, params, gates, numbers_of({"alpha": alpha}), make_variant(METHODS["dst"], {})
    )
    for layers, copies in zip((params, gates), before, strict=True):
        assert layers.keys() == copies.keys()
        assert all(torch.equal(layers[name], copies[name]) for name in copies)
    return out


def test_dst_masks_at_every_forward_pass() -> None:
    weight = row(0.25, -0.5, 0.75, -1, 0)
    for t, expected in [
        (0.0, [0.25, -0.5, 0.75, -1, 0]),
        (0.25, [0, -0.5, 0.75, -1, 0]),  # |w| = t is masked
        (0.6, [0, 0, 0.75, -1, 0]),
        (-0.5, [0.25, -0.5, 0.75, -1, 0]),
        (2.0, [0, 0, 0, 0, 0]),
    ]:
        params = {"w": weight, NAME: torch.tensor([t]), "bias": row(7)}
        forward = sparsified(params)
        assert forward["w"].tolist() == [expected]
        # A threshold below zero leaves the zero active.
        gate = [float(e != 0 or t < 0) for e in expected]
        assert gates_of(params)["w"].tolist() == [gate]
        assert dst.masks_of(params)["w"].tolist() == [[g == 1 for g in gate]]
        assert torch.equal(forward["bias"], row(7))
        assert torch.equal(params["w"], weight)  # the latent weight stays


def test_dsts_update_gives_the_masks_of_the_thresholds() -> None:
    # Two neurons with thresholds .25 and .5: |w| = t is masked.
    params = {
        "w": torch.tensor([[0.25, -0.5, 1], [0.25, -0.5, 1]]),
        NAME: torch.tensor([0.25, 0.5]),
    }
    before = {"w": torch.ones(2, 3, dtype=torch.bool)}
    after, masks, _, _ = update(METHODS["dst"], params, before)
    assert masks["w"].tolist() == [[False, True, True], [False, False, True]]
    assert torch.equal(after["w"], params["w"])
    assert torch.equal(after[NAME], params[NAME])
    # A threshold below zero leaves a row dense, its zeros included.
    params = {"w": row(0, 0.5), NAME: torch.tensor([-0.1])}
    _, masks, _, _ = update(METHODS["dst"], params, {"w": first(2, 2)})
    assert masks["w"].tolist() == [[True, True]]


# Every piece of H, both signs, exact zero, |w| = t; t = .5.
PIECES = [0.0, 0.5, -0.5, 0.6, -0.3, 0.95, -1.3, 1.6, -2.0]


def h_by_hand(x: float) -> float:
    return 2 - 4 * abs(x) if abs(x) <= 0.4 else 0.4 if abs(x) <= 1 else 0.0


@pytest.mark.parametrize("granularity", ["scalar", "neuron", "weight"])
@pytest.mark.parametrize("shape", [(3, 9), (3, 1, 3, 3)])
def test_dsts_gradients_are_the_closed_form(granularity: str, shape: tuple[int, ...]) -> None:
    # methods.md 4.1: dL/dW = G M + G W H(|W| - t) sign(W); dL/dt = -sum G W H(|W| - t)
    weight = torch.tensor([PIECES, PIECES[::-1], PIECES], dtype=torch.float64)
    t = {
        "scalar": torch.tensor(0.5),
        "neuron": torch.tensor([0.5, 0.1, 0.9]),
        "weight": 0.5 + 0.01 * torch.arange(27).view(3, 9),
    }[granularity].double()
    g = torch.linspace(-2, 3, 27, dtype=torch.float64).view(3, 9)
    w_grad, t_terms = torch.zeros(3, 9).double(), torch.zeros(3, 9).double()
    for i in range(3):
        for j in range(9):
            own = {"scalar": t, "neuron": t[i] if t.dim() else t, "weight": t}[granularity]
            own = own[i, j] if granularity == "weight" else own
            w, x = float(weight[i, j]), abs(float(weight[i, j])) - float(own)
            sign = (w > 0) - (w < 0)
            w_grad[i, j] = g[i, j] * (x > 0) + g[i, j] * w * h_by_hand(x) * sign
            t_terms[i, j] = -g[i, j] * w * h_by_hand(x)
    t_grad = {"scalar": t_terms.sum(), "neuron": t_terms.sum(1), "weight": t_terms}[granularity]

    params = {"w": weight.view(shape), NAME: t.view(shape) if granularity == "weight" else t}
    grads = {"w": g.view(shape), "bias": row(7)}
    # alpha * sum exp(-t) in the loss adds -alpha * exp(-t), methods.md 4.1 again
    for alpha in (0.0, 0.25):
        got = pulled_back(grads, {**params, "bias": row(1)}, alpha)
        assert got.keys() == {"w", NAME, "bias"}
        assert torch.equal(got["bias"], row(7))
        torch.testing.assert_close(got["w"], w_grad.view(shape), rtol=0, atol=1e-12)
        push = torch.tensor([math.exp(-x) for x in t.flatten()], dtype=torch.float64)
        expected = t_grad - alpha * push.view(t.shape)
        assert got[NAME].shape == params[NAME].shape
        torch.testing.assert_close(got[NAME].view(t.shape), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("granularity", ["scalar", "neuron", "weight"])
def test_dsts_gradients_are_those_of_a_straight_through_step(
    granularity: str, dtype: torch.dtype
) -> None:
    # With x = |w| - t and its value `level`: where(level > 0, w, 0) + (x - level) H(level) w has
    # the value of the masked weight and the derivative that equation 6 gives the step.
    g = torch.Generator().manual_seed(3)
    params: Layers = {"bias": torch.randn(6, generator=g, dtype=dtype)}
    of_masked: Layers = {}
    for name, shape in {"w": (6, 11), "v": (5, 3, 3, 2)}.items():
        params[name] = torch.randn(shape, generator=g, dtype=dtype)
        own = {"scalar": (), "neuron": shape[:1], "weight": shape}[granularity]
        params[name + ".threshold"] = 0.2 + 0.6 * torch.rand(own, generator=g, dtype=dtype)
        of_masked[name] = torch.randn(shape, generator=g, dtype=dtype)

    def network_loss(masked: Layers) -> Tensor:
        terms = [(masked[name].tanh() * of_masked[name]).sum() for name in of_masked]
        return torch.stack([*terms, masked["bias"].sin().sum()]).sum()

    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    masked, penalty = {"bias": leaves["bias"]}, torch.zeros((), dtype=dtype)
    for name in of_masked:
        w, t = leaves[name], leaves[name + ".threshold"]
        x = w.abs() - (t.view(-1, *[1] * (w.dim() - 1)) if granularity == "neuron" else t)
        level, size = x.detach(), x.detach().abs()
        h = torch.where(size <= 0.4, 2 - 4 * size, torch.full_like(size, 0.4) * (size <= 1))
        assert all(bool(part.any()) for part in (level > 0, level < 0, size < 0.4, size > 1))
        masked[name] = torch.where(level > 0, w, 0) + (x - level) * h * w
        penalty = penalty + 0.3 * torch.exp(-t).sum()
    loss = network_loss(masked) + penalty
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    forward = sparsified(params)
    assert all(torch.equal(forward[name], masked[name].detach()) for name in masked)
    ends = {name: forward[name].clone().requires_grad_() for name in masked}
    grads = torch.autograd.grad(network_loss(ends), list(ends.values()))
    got = pulled_back(dict(zip(ends, grads, strict=True)), params, 0.3)
    assert got.keys() == expected.keys()
    exact = dtype == torch.float64
    for name, grad in expected.items():  # dtypes and shapes too: those of the parameters
        torch.testing.assert_close(
            got[name], grad, rtol=0 if exact else 1e-5, atol=1e-12 if exact else 1e-5
        )


def test_dsts_penalty_pushes_thresholds_up() -> None:
    # -alpha exp(-t) = -.1 * (1, .5, 4), where the loss gives no gradient.
    params: Layers = {
        "w": torch.ones(2, 3).double(), "v": torch.ones(2, 2).double(), "bias": torch.ones(2),
        NAME: torch.tensor([0, math.log(2)], dtype=torch.float64),
        "v.threshold": torch.tensor(-math.log(4), dtype=torch.float64),
    }  # fmt: skip
    zeros = {name: torch.zeros_like(params[name]) for name in ("w", "v", "bias")}
    got = pulled_back(zeros, params, 0.1)
    assert got[NAME].tolist() == pytest.approx([-0.1, -0.05])
    assert float(got["v.threshold"]) == pytest.approx(-0.4)
    assert not any(bool(got[name].any()) for name in zeros)


def test_dst_brings_a_masked_weight_back() -> None:
    # L = -(masked w), so G = -1: dw = -w H(w - t), dt = w H(w - t). Steps of .5.
    weight = torch.tensor([[0.1]], dtype=torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64)
    steps = [
        # w .1, t .3: x = -.2, H = 1.2: w + .5 * .12, t - .5 * .12
        (0.0, 0.16, 0.24),
        # x = -.08, H = 1.68, w H = .2688
        (0.0, 0.2944, 0.1056),
        # active: x = .1888, H = 1.2448, w H = .36646912; dw = -1 - .36646912
        (0.2944, 0.2944 + 0.68323456, 0.1056 - 0.18323456),
    ]
    for value, next_weight, next_t in steps:
        params = {"w": weight, NAME: t}
        assert float(sparsified(params)["w"]) == pytest.approx(value, abs=1e-12)
        grads = pulled_back({"w": -torch.ones_like(weight)}, params, 0.0)
        weight, t = weight - 0.5 * grads["w"], t - 0.5 * grads[NAME]
        assert float(weight) == pytest.approx(next_weight, abs=1e-12)
        assert float(t) == pytest.approx(next_t, abs=1e-12)
    _, masks, _, _ = update(METHODS["dst"], {"w": weight, NAME: t}, {"w": first(1, 1)})
    assert active(masks["w"]) == [0]


@pytest.mark.parametrize("guard", ["on", "off"])
def test_dsts_guard_resets_a_collapsed_layer_and_its_momentum(guard: str) -> None:
    # Of 100 weights .01 .. 1.00, t = .995 leaves 1 (mean .01: collapsed), t = .985 leaves 2.
    weight = torch.arange(1, 101).view(10, 10) / 100
    params = {
        "w": weight, NAME: torch.full((10,), 0.995),
        "v": weight, "v.threshold": torch.full((10,), 0.985),
        "u": weight, "u.threshold": torch.tensor(5.0),
    }  # fmt: skip
    momenta = {name: torch.ones_like(p) for name, p in params.items()}
    masks_before = {name: torch.ones(10, 10, dtype=torch.bool) for name in "wvu"}
    after, masks, new_momenta, _ = update(
        METHODS["dst"], params, masks_before, momenta, variant={"guard": guard}
    )
    assert new_momenta is not None
    if guard == "on":
        assert not bool(after[NAME].any())
        assert float(after["u.threshold"]) == 0
        assert not bool(new_momenta[NAME].any())
        assert float(new_momenta["u.threshold"]) == 0
        assert sizes(masks) == [100, 2, 100]
    else:
        assert torch.equal(after[NAME], params[NAME])
        assert torch.equal(new_momenta[NAME], momenta[NAME])
        assert sizes(masks) == [1, 2, 0]
    for name in ("w", "v", "u"):
        assert torch.equal(after[name], weight)
        assert torch.equal(new_momenta[name], torch.ones(10, 10))
    assert torch.equal(after["v.threshold"], params["v.threshold"])
    assert torch.equal(new_momenta["v.threshold"], torch.ones(10))
    # The same by the step, with gates that say what the masks say.
    assert dst.METHOD.after_step is not None
    changed, gates, reset = dst.METHOD.after_step(
        params, (), numbers_of({}), make_variant(METHODS["dst"], {"guard": guard})
    )
    assert changed.keys() == reset.keys() == {NAME, "v.threshold", "u.threshold"}
    for name in ("w", "v", "u"):
        assert torch.equal(gates[name], masks[name].float())
        t_name = name + ".threshold"
        assert torch.equal(changed[t_name], after[t_name])
        expected = torch.full(params[t_name].shape, guard == "on" and name != "v")
        assert torch.equal(reset[t_name], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dsts_guard_counts_beyond_the_whole_numbers_of_half_floats(dtype: torch.dtype) -> None:
    # 1,001 of 100,000 are left, just above the guard's 1 %; bfloat16 cannot hold 1,001.
    weight = torch.full((100_000, 1), 0.125, dtype=dtype)
    weight[:1001] = 1
    params = {"w": weight, NAME: torch.tensor(0.5, dtype=dtype)}
    after, masks, _, _ = update(
        METHODS["dst"], params, {"w": first(1, 1).expand(100_000, 1)},
        variant={"granularity": "scalar"}, state=(),
    )  # fmt: skip
    assert float(after[NAME]) == 0.5
    assert sizes(masks) == [1001]


def test_dsts_guard_leaves_zeros_masked() -> None:
    # t = 0 masks |w| = 0 still.
    params = {"w": row(0, 0.5, -0.5), NAME: torch.tensor([9.0])}
    _, masks, _, _ = update(METHODS["dst"], params, {"w": first(3, 3)})
    assert masks["w"].tolist() == [[False, True, True]]


# 1/8 .. 10/8, in two neurons.
LADDER = torch.tensor([[1, -3, 5, -7, 9], [2, -4, 6, -8, 10]]) / 8


def dst_thresholds(variant: dict[str, str], threshold: float, seed: int = 0) -> Tensor:
    params, _, _, _ = update(
        METHODS["dst"], {"w": LADDER}, {"w": torch.ones(2, 5, dtype=torch.bool)},
        variant=variant, hp={"threshold": threshold}, seed=seed,
    )  # fmt: skip
    assert params[NAME].dtype == torch.float32
    return params[NAME]


SHAPES = {"scalar": (), "neuron": (2,), "weight": (2, 5)}


@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize(
    ("init", "unit", "threshold", "expected"),
    [
        ("zero", "share", 0.5, 0.0),
        ("zero", "absolute", 0.5, 0.0),
        ("constant", "absolute", 0.375, 0.375),
        ("constant", "share", 0.0, 0.0),
        ("constant", "share", 0.5, 0.625),  # the 5th smallest of ten
        ("constant", "share", 0.3, 0.375),
        ("constant", "share", 0.9, 1.125),
    ],
)
def test_dsts_thresholds_at_the_start(
    granularity: str, init: str, unit: str, threshold: float, expected: float
) -> None:
    variant = {"granularity": granularity, "threshold_init": init, "threshold_unit": unit}
    t = dst_thresholds(variant, threshold)
    assert tuple(t.shape) == SHAPES[granularity]
    assert set(t.flatten().tolist()) == {expected}
    masks = update(
        METHODS["dst"], {"w": LADDER, NAME: t}, {"w": torch.ones(2, 5, dtype=torch.bool)}
    )[1]
    if unit == "share" and init == "constant":
        assert sizes(masks) == [10 - round(10 * threshold)]  # the share of the layer masked


@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize(
    ("unit", "threshold", "top"), [("absolute", 0.5, 0.5), ("share", 0.5, 0.625)]
)
def test_dsts_uniform_thresholds(granularity: str, unit: str, threshold: float, top: float) -> None:
    variant = {"granularity": granularity, "threshold_init": "uniform", "threshold_unit": unit}
    drawn = torch.cat([dst_thresholds(variant, threshold, s).flatten() for s in range(60)])
    assert bool(((drawn >= 0) & (drawn < top)).all())
    assert len(set(drawn.tolist())) == len(drawn)
    # Mean top / 2, deviation top / sqrt(12 n).
    assert abs(float(drawn.mean()) - top / 2) < 4 * top / math.sqrt(12 * len(drawn))
    assert torch.equal(dst_thresholds(variant, threshold, 3), dst_thresholds(variant, threshold, 3))


def test_dst_guards_at_the_start() -> None:
    # An absolute threshold of 2 masks all ten: the guard gives 0, without it 2 stays.
    variant = {"threshold_init": "constant", "threshold_unit": "absolute"}
    assert dst_thresholds(variant, 2.0).tolist() == [0, 0]
    assert dst_thresholds({**variant, "guard": "off"}, 2.0).tolist() == [2, 2]


def test_dsts_convolutions_have_a_threshold_per_filter() -> None:
    weight = torch.arange(1, 37).view(4, 1, 3, 3) / 64
    params, masks, _, _ = update(
        METHODS["dst"], {"w": weight}, {"w": torch.ones(4, 1, 3, 3, dtype=torch.bool)}
    )
    assert params[NAME].tolist() == [0, 0, 0, 0]
    params[NAME] = torch.tensor([0.0, 0.25, 0.5, 0.0])
    # Filters hold 1..9, 10..18, 19..27, 28..36 of 64ths: above 16 are 2, above 32 none.
    masks = update(METHODS["dst"], params, masks)[1]
    assert masks["w"].flatten(1).sum(1).tolist() == [9, 2, 0, 9]


def test_dsts_weight_decay_reaches_thresholds_when_shared() -> None:
    for words, expected in (("shared", True), ("none", False)):
        variant = make_variant(METHODS["dst"], {"threshold_decay": words})
        assert METHODS["dst"].decays(NAME, variant) is expected
        assert METHODS["dst"].decays("w", variant) is True


def test_dsts_words_and_numbers_are_those_of_the_paper() -> None:
    fields = dataclasses.fields(METHODS["dst"].Variant)
    assert {f.name: f.metadata["allowed"] for f in fields} == {
        "granularity": ("neuron", "scalar", "weight"),  # the first is the default
        "threshold_init": ("zero", "constant", "uniform"),
        "threshold_unit": ("share", "absolute"),
        "threshold_decay": ("shared", "none"),
        "guard": ("on", "off"),
    }
    numbers = dataclasses.fields(METHODS["dst"].Hyperparameters)
    assert {f.name: f.default for f in numbers} == {"alpha": 5e-4, "threshold": 0.0}
    for words in variants(METHODS["dst"]):
        variant = make_variant(METHODS["dst"], words)
        assert METHODS["dst"].dense_gradient(variant) == "always"
        assert METHODS["dst"].needs(variant) == set()


def test_no_update_of_dst_reads_how_thresholds_decay_or_a_unit_of_zero() -> None:
    e, hp = example(1), {"alpha": 0.02, "threshold": 0.35}
    for words in variants(METHODS["dst"]):
        same = words | {"threshold_decay": "shared"}
        same |= {"threshold_unit": "share"} if words["threshold_init"] == "zero" else {}
        assert difference(*(run(METHODS["dst"], w, e, hp) for w in (words, same))) == ""


GUARDED = [
    words
    for words in variants(METHODS["dst"])
    if (words["threshold_unit"], words["threshold_decay"]) == ("share", "shared")
    and words["threshold_init"] != "constant"
]


@pytest.mark.parametrize("words", GUARDED, ids=lambda words: "-".join(words.values()))
def test_dsts_step_on_a_collapsed_layer_lifted_and_alone(words: dict[str, str]) -> None:
    method, four = METHODS["dst"], hooks(METHODS["dst"], words)
    for name in EXAMPLES:  # one trial whose layers have collapsed
        four[2].given.params[name + ".threshold"].fill_(50.0)

    def step(params: Any, grads: Any, hp: Any) -> Any:
        assert method.after_step is not None
        assert method.masks_of is not None
        gates = {n: dst.gate(params[n], params[n + ".threshold"]) for n in EXAMPLES}
        done = four[0].step(params, gates, grads, (), hp)
        return gates, method.masks_of(params | done[3][0]), done

    rows = [(h.given.params, h.given.grads, h.hp) for h in four]
    before = pytree.tree_map(lambda t: t.clone(), rows)
    lifted = torch.vmap(step)(*pytree.tree_map(lambda *each: torch.stack(each), *rows))
    for k, given in enumerate(rows):
        picked, alone = pytree.tree_map(lambda t, k=k: t[k], lifted), step(*given)
        gates, masks_after, (masks, forward, pulled, (changed, new_gates, reset), _) = alone
        assert difference((picked[:2], picked[2][:2], picked[2][3]), (
            alone[:2], alone[2][:2], alone[2][3]
        )) == ""  # fmt: skip
        for n in EXAMPLES:
            assert torch.equal(gates[n], masks[n].float())
            assert torch.equal(new_gates[n], masks_after[n].float())
            assert torch.equal(forward[n], given[0][n] * masks[n])
            guarded = k == 2 and words["guard"] == "on"
            t = given[0][n + ".threshold"]
            assert torch.equal(changed[n + ".threshold"], torch.zeros_like(t) if guarded else t)
            assert torch.equal(reset[n + ".threshold"], torch.full(t.shape, guarded))
            assert k != 2 or bool((new_gates[n] == guarded).all())
        assert picked[2][2].keys() == pulled.keys() == given[0].keys()
        for name, grad in pulled.items():
            assert grad.shape == given[0][name].shape
            torch.testing.assert_close(picked[2][2][name], grad, rtol=1e-5, atol=1e-6)
    assert difference(rows, before) == ""  # nothing that was given has changed


@pytest.mark.parametrize("words", GUARDED, ids=lambda words: "-".join(words.values()))
def test_dsts_update_changes_nothing_given_and_its_guard_leaves_no_layer_empty(
    words: dict[str, str],
) -> None:
    hp = {"threshold": 0.35}
    e = example(1)
    e.params = run(METHODS["dst"], words, e, hp)[0]
    for name in EXAMPLES:
        e.params[name + ".threshold"].fill_(50.0)
    before = pytree.tree_map(lambda t: t.clone(), vars(e))
    run(METHODS["dst"], words, e, hp, ())
    assert difference(vars(e), before) == ""
    for what, make in FINITE.items():
        for threshold in (0.35, 0.9):
            masks = run(METHODS["dst"], words, make(), {"threshold": threshold})[1]
            if words["guard"] == "on" and what != "weights of zero":
                assert min(num_active(masks).values()) >= 1, what
