"""The promises of `methods/contract.py`, each over all methods and all their variants.

A new method or variant joins by being in METHODS: nothing here lists what it does, except the four
tables near the top, which say by hand what `issue 2` and `methods.md` promise.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsetune.methods import METHODS, dst, noise, update
from sparsetune.methods.contract import Method, make_hyperparameters, make_variant
from sparsetune.methods.update import Keys, activate, lifted_update, update_keys

torch.set_num_threads(1)

Layers = dict[str, Tensor]
Words = dict[str, str]
Case = tuple[str, Words]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = {
    "fc1.weight": (12, 10),
    "conv.weight": (4, 3, 3, 3),
    "fc2.weight": (5, 12),
}
SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}  # 120, 108, 60: 288


def combinations(name: str) -> list[Words]:
    fields = dataclasses.fields(METHODS[name].Variant)
    allowed = [field.metadata["allowed"] for field in fields]
    names = [field.name for field in fields]
    return [dict(zip(names, words, strict=True)) for words in itertools.product(*allowed)]


def unread(name: str, words: Words) -> dict[str, str]:
    """Words that no update reads, beside the others, replaced by the first of their choices."""
    if name == "dst":
        first = {"threshold_decay": "shared"}  # which only the optimizer's step reads
        if words["threshold_init"] == "zero":
            first["threshold_unit"] = "share"
    elif name == "set" and words["prune"] != "threshold":
        first = {"threshold_unit": "std"}
    else:
        first = {}
    return words | first


def cases(keep: Callable[[Method], bool] = lambda method: True) -> list[Any]:
    """All combinations that differ in what an update reads."""
    return [
        pytest.param((name, words), id="-".join([name, *words.values()]))
        for name, method in METHODS.items()
        if keep(method)
        for words in combinations(name)
        if unread(name, words) == words
    ]


ALL = cases()
DECIDING = cases(lambda method: method.decide is not None)
FIXING = cases(lambda method: method.reaches_density)  # absent weights are zero


def is_hard(words: Words) -> bool:
    """A decay is one factor of the rate: without it all combinations, the cosine with a few."""
    decay = words.get("decay", "none")
    few = {"regrown": "zero", "redistribution": "none", "new_value": "zero"}
    return decay == "none" or (
        decay == "cosine" and all(words.get(k, few[k]) == few[k] for k in few)
    )


HARD = [c for c in ALL if is_hard(c.values[0][1])]
EXACT = {"set", "dsr", "static", "rigl"}

# What updates are made of ------------------------------------------------------------------------


@dataclasses.dataclass
class Example:
    params: Layers
    masks: Layers
    momenta: Layers
    grads: Layers


def generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(k * 1000**i for i, k in enumerate(key)))


def example(
    seed: int = 0,
    density: float = 0.3,
    dtype: torch.dtype = torch.float32,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
) -> Example:
    """Normal weights at `density`, at least one in a layer, and something at absent positions."""
    drawn: list[Layers] = [{} for _ in range(4)]
    for number, (name, shape) in enumerate(shapes.items()):
        g = generator(seed, number)
        order = torch.rand(math.prod(shape), generator=g).argsort()
        active = order < max(1, round(density * len(order)))
        drawn[1][name] = active.view(shape)
        for which in (0, 2, 3):
            drawn[which][name] = torch.randn(shape, generator=g).to(dtype)
    return Example(*drawn)


def settings_for(name: str, slot: int = 0) -> dict[str, float]:
    """Hyperparameters that make something happen, other ones for each slot."""
    return {
        "set": {"zeta": 0.1 + 0.25 * slot, "threshold": 0.2 + 0.2 * slot},
        "dsr": {"threshold": 0.1 + 0.3 * slot, "target": 0.2 + 0.1 * slot, "gain": 2.0 + slot},
        "sm": {"prune_fraction": 0.2 + 0.2 * slot},
        "dst": {"alpha": 0.01 * (1 + slot), "threshold": 0.1 + 0.25 * slot},
        "rigl": {"prune_fraction": 0.15 + 0.25 * slot},
        "gmp": {"begin": 0.1 * slot},
        "static": {},
        "dense": {},
    }[name]


def target_hp(name: str, density: float) -> dict[str, float]:
    """GMP is told the density that it prunes to."""
    return {"density": density} if name == "gmp" else {}


def run(
    case: Case,
    given: Example,
    hp: dict[str, float] | None = None,
    state: Any = None,
    **more: Any,
) -> tuple[Layers, Layers, Layers, Any]:
    name, words = case
    params, masks, momenta, after = update(
        METHODS[name], given.params, given.masks, given.momenta, given.grads,
        state=state, variant=words, hp=hp, **more,
    )  # fmt: skip
    assert momenta is not None
    return params, masks, momenta, after


@contextmanager
def in_case(*what: object) -> Iterator[None]:
    """Says in a failure which of a loop's cases it was."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the case {what}")
        raise


def num_active(masks: Layers) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def stacked(trees: list[Any]) -> Any:
    return pytree.tree_map(lambda *tensors: torch.stack(tensors), *trees)


# Names, defaults and needs, by hand from the issue ------------------------------------------------

VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "set": {
        "prune": ("signwise", "magnitude", "threshold"),
        "new_value": ("normal", "zero"),
        "decay": ("none", "cosine"),
        "threshold_unit": ("std", "absolute"),
    },
    "dsr": {
        "growth": ("nonzero", "gradient", "momentum"),
        "threshold_mode": ("adaptive", "fixed"),
    },
    "sm": {
        "growth": ("momentum", "gradient", "random"),
        "redistribution": ("momentum", "magnitude", "nonzero", "none"),
        "regrown": ("keep", "zero"),
        "decay": ("cosine", "linear", "none"),
    },
    "dst": {
        "granularity": ("scalar", "neuron", "weight"),
        "threshold_init": ("zero", "constant", "uniform"),
        "threshold_unit": ("share", "absolute"),
        "threshold_decay": ("shared", "none"),
        "guard": ("on", "off"),
    },
    "rigl": {},
    "gmp": {},
    "static": {},
    "dense": {},
}
DEFAULT_WORDS = {
    "set": {"prune": "signwise", "new_value": "normal", "decay": "none", "threshold_unit": "std"},
    "dsr": {"growth": "nonzero", "threshold_mode": "adaptive"},
    "sm": {
        "growth": "momentum",
        "redistribution": "momentum",
        "regrown": "keep",
        "decay": "cosine",
    },
    "dst": {
        "granularity": "neuron",
        "threshold_init": "zero",
        "threshold_unit": "share",
        "threshold_decay": "shared",
        "guard": "on",
    },
}
DEFAULT_NUMBERS = {
    "set": {"zeta": 0.3, "max_prune": 0.9, "threshold": 0.3},
    "dsr": {"threshold": 1e-3, "target": 0.1, "tolerance": 0.1, "gain": 2.0},
    "sm": {"prune_fraction": 0.5},
    "dst": {"alpha": 5e-4, "threshold": 0.0},
    "rigl": {"prune_fraction": 0.3},
}


def needs_by_hand(case: Case) -> set[str]:
    """Arguments of `update` that this rule reads."""
    name, words = case
    read = set()
    if name == "rigl" or (name in ("dsr", "sm") and words["growth"] == "gradient"):
        read.add("grads")
    if name in ("dsr", "sm") and "momentum" in (words["growth"], words.get("redistribution")):
        read.add("momenta")
    return read


def dense_gradient_by_hand(case: Case) -> str:
    name, words = case
    if name == "dst" or (name == "sm" and words["growth"] == "momentum"):
        return "always"
    return (
        "at_update"
        if name == "rigl" or (name == "sm" and words["growth"] == "gradient")
        else "never"
    )


def test_the_methods_and_the_words_of_their_variants() -> None:
    assert set(METHODS) == set(VARIANTS)
    for name, method in METHODS.items():
        assert method.name == name
        fields = dataclasses.fields(method.Variant)
        assert {f.name: set(f.metadata["allowed"]) for f in fields} == {
            key: set(words) for key, words in VARIANTS[name].items()
        }


@pytest.mark.parametrize("name", DEFAULT_NUMBERS)
def test_defaults_are_those_of_the_papers(name: str) -> None:
    method = METHODS[name]
    assert dataclasses.asdict(make_variant(method, {})) == DEFAULT_WORDS.get(name, {})
    numbers = make_hyperparameters(method, {}, make_variant(method, {}))
    assert {k: float(getattr(numbers, k)) for k in DEFAULT_NUMBERS[name]} == DEFAULT_NUMBERS[name]
    assert all(t.dtype == torch.float64 and t.shape == () for t in vars(numbers).values())


@pytest.mark.parametrize(
    ("name", "variant", "hp", "message"),
    [
        ("set", {"prunes": "magnitude"}, {}, r"variant\.prunes: .*did you mean 'prune'"),
        ("set", {"prune": "size"}, {}, r"variant\.prune: 'size' .*signwise, magnitude, threshold"),
        ("dst", {"guard": 3}, {}, r"variant\.guard"),
        ("static", {"prune": "magnitude"}, {}, r"'static' has no 'prune'"),
        ("set", {}, {"zetta": 0.3}, r"hp\.zetta: .*did you mean 'zeta'"),
        ("set", {}, {"zeta": 1.5}, r"hp\.zeta: 1\.5 .*0 to 1"),
        ("sm", {}, {"prune_fraction": -0.1}, r"hp\.prune_fraction"),
        ("sm", {}, {"prune_fraction": math.nan}, r"hp\.prune_fraction"),
        ("sm", {}, {"prune_fraction": "half"}, r"hp\.prune_fraction: 'half' is no number"),
        ("sm", {}, {"prune_fraction": True}, r"hp\.prune_fraction"),
    ],
)
def test_what_a_method_does_not_have_is_refused(
    name: str, variant: dict[str, Any], hp: dict[str, Any], message: str
) -> None:
    e = example()
    with pytest.raises(ValueError, match=message):
        update(METHODS[name], e.params, e.masks, e.momenta, e.grads, variant=variant, hp=hp)


def test_yaml_reads_the_guards_words_as_booleans() -> None:
    assert make_variant(METHODS["dst"], {"guard": False}).guard == "off"
    assert make_variant(METHODS["dst"], {"guard": True}).guard == "on"


@pytest.mark.parametrize("case", HARD)
def test_a_rule_asks_for_the_momenta_and_gradients_that_it_reads(case: Case) -> None:
    name, words = case
    method, e = METHODS[name], example()
    assert method.dense_gradient(make_variant(method, words)) == dense_gradient_by_hand(case)
    for argument in ("momenta", "grads"):
        given = {"momenta": e.momenta, "grads": e.grads}
        del given[argument]
        if argument in needs_by_hand(case):
            with pytest.raises(ValueError, match=argument):
                update(method, e.params, e.masks, variant=words, **given)  # type: ignore[arg-type]
        else:
            out = update(method, e.params, e.masks, variant=words, **given)  # type: ignore[arg-type]
            assert out[1].keys() == e.masks.keys()
            assert (out[2] is None) == (argument == "momenta")


def test_tensors_that_do_not_fit_are_named() -> None:
    w, two = torch.ones(2, 3), {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}
    for argument in ("momenta", "grads"):
        given = {"momenta": two, "grads": two, argument: {"a": w}}
        method, words = METHODS["sm"], {"growth": "gradient", "redistribution": "momentum"}
        with pytest.raises(ValueError, match=rf"^{argument}: .* with b$"):
            update(method, two, two, variant=words, **given)
        given[argument] = {"a": w, "b": torch.ones(6)}
        with pytest.raises(
            ValueError, match=rf"^{argument}: 'b' has shape \[6\] and its .* \[2, 3\]"
        ):
            update(method, two, two, variant=words, **given)
    with pytest.raises(ValueError, match=r"^masks: 'c' is none of params, which has a, b"):
        update(METHODS["set"], two, {"c": w})
    with pytest.raises(ValueError, match=r"^masks: 'a' has shape"):
        update(METHODS["set"], two, {"a": torch.ones(3, 2)})


@pytest.mark.parametrize("name", ["set", "dsr", "sm", "rigl"])
def test_a_layer_without_a_weight_gives_no_nan(name: str) -> None:
    """No update empties a layer, but a user may hand one in."""
    w, mask = torch.ones(2, 3), torch.zeros(2, 3)
    out = update(METHODS[name], {"w": w}, {"w": mask}, {"w": w}, {"w": w})
    assert bool(torch.stack([t.isfinite().all() for t in out[3]]).all()), out[3]


# Lifted equals alone ------------------------------------------------------------------------------

SLOTS = 4
PROGRESS = (0.0, 0.3, 0.75, 1.0)


def lifted_noise(keys: Layers) -> Callable[[str, int], Tensor]:
    return lambda layer, num: noise.uniform(keys[layer], torch.arange(num))


def begun(
    method: Method,
    params: Layers,
    masks: Layers,
    targets: Layers,
    hp: Any,
    keys: Layers,
    words: Any,
) -> tuple[Any, Layers]:
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    shapes = {name: mask.shape for name, mask in masks.items()}
    active = activate(params, masks, zeros, zeros)
    out: tuple[Any, Layers] = method.init(active, shapes, targets, hp, lifted_noise(keys), words)
    return out


def slot_inputs(case: Case, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """One tuple of what `lifted_update` takes per slot: other weights, masks, hp, seeds."""
    name, words = case
    method, rows = METHODS[name], []
    for slot in range(SLOTS):
        e = example(slot, density=(0.05, 0.3, 0.6, 0.95)[slot], dtype=dtype)
        hp = make_hyperparameters(method, settings_for(name, slot), make_variant(method, words))
        share = 1.0 if not method.closes else 0.1 + 0.2 * slot
        targets = {
            n: torch.tensor(float(max(1, round(share * int(m.sum())))), dtype=torch.float64)
            for n, m in e.masks.items()
        }
        init_keys = {n: torch.tensor(noise.key(slot, "init", 0, n)) for n in e.masks}
        state, extra = begun(
            method, e.params, e.masks, targets, hp, init_keys, make_variant(method, words)
        )
        progress = torch.tensor(PROGRESS[slot], dtype=torch.float64)
        keys = update_keys(e.masks, seed=100 + slot, number=slot)
        rows.append(
            (
                e.params | extra,
                e.masks,
                e.momenta,
                e.grads,
                state,
                hp,
                progress,
                keys,
                targets,
                init_keys,
            )
        )
    return rows


def assert_equal_trees(got: Any, expected: Any) -> None:
    assert pytree.tree_structure(got) == pytree.tree_structure(expected)
    for a, b in zip(leaves(got), leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.dtype == torch.bool:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-12 if a.dtype == torch.float64 else 0, atol=0)


THRESHOLDED = [
    c
    for c in DECIDING
    if c.values[0][0] == "dsr"
    or (c.values[0][1].get("prune") == "threshold" and c.values[0][1]["decay"] == "none")
]
LINEAR = [c for c in DECIDING if c.values[0][1].get("decay") == "linear"]
# A linear decay with each growth; what else there is meets the others.
LIFTED = [c for c in DECIDING if c in HARD] + [
    c
    for c in LINEAR
    if (c.values[0][1]["redistribution"], c.values[0][1]["regrown"]) == ("momentum", "keep")
]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(c.values[0], torch.float32, id=str(c.id)) for c in LIFTED]
    # A threshold is float64 and weights are not: promotion must be the same, lifted or alone.
    + [
        pytest.param(c.values[0], dtype, id=f"{c.id}-{dtype}")
        for c in THRESHOLDED
        for dtype in (torch.float16, torch.bfloat16, torch.float64)
    ],
)
def test_a_lifted_update_equals_the_update_of_each_model(case: Case, dtype: torch.dtype) -> None:
    name, words = case
    method, variant = METHODS[name], make_variant(METHODS[name], words)
    rows = slot_inputs(case, dtype)

    def lifted(
        params: Any, masks: Any, momenta: Any, grads: Any, state: Any, hp: Any, done: Any, keys: Any
    ) -> Any:
        return lifted_update(method, params, masks, momenta, grads, state, variant, hp, done, keys)

    args = stacked([row[:8] for row in rows])
    new_params, new_masks, reset, new_state = torch.vmap(lifted)(*args)
    for slot, row in enumerate(rows):
        params, masks, momenta, grads, state = row[:5]
        alone = update(
            method, params, masks, momenta, grads, state=state, variant=words,
            hp=settings_for(name, slot), progress=PROGRESS[slot], number=slot, seed=100 + slot,
        )  # fmt: skip
        picked = pytree.tree_map(lambda t, k=slot: t[k], (new_params, new_masks, new_state))
        assert_equal_trees(picked, (alone[0], alone[1], alone[3]))
        assert alone[2] is not None
        for layer in masks:
            cleared = reset.get(layer, torch.zeros(SLOTS, *masks[layer].shape, dtype=torch.bool))
            assert torch.equal(momenta[layer].masked_fill(cleared[slot], 0), alone[2][layer])
        changed = [not torch.equal(alone[1][layer], masks[layer]) for layer in masks]
        assert any(changed) or PROGRESS[slot] == 1 or slot == 0  # the comparison means something


@pytest.mark.parametrize("case", HARD)
def test_lifted_init_and_metrics_equal_those_of_each_model(case: Case) -> None:
    name, words = case
    method, variant = METHODS[name], make_variant(METHODS[name], words)
    rows = slot_inputs(case, torch.float32)

    def init(params: Any, masks: Any, targets: Any, hp: Any, keys: Any) -> Any:
        state, extra = begun(method, params, masks, targets, hp, keys, variant)
        return state, extra, method.metrics(params | extra, state, hp)

    own = [{k: t for k, t in row[0].items() if k in SHAPES} for row in rows]
    inputs = [(p, row[1], row[8], row[5], row[9]) for p, row in zip(own, rows, strict=True)]
    if not dataclasses.fields(method.Hyperparameters):
        # Static and dense have no numbers, hence nothing to take apart.
        assert all(init(*args) == ((), {}, {}) for args in inputs)
        return
    got = torch.vmap(init)(*stacked(inputs))
    for slot, args in enumerate(inputs):
        picked = pytree.tree_map(lambda t, k=slot: t[k], got)
        alone = init(*args)
        assert_equal_trees(picked[:2], alone[:2])
        assert all(scalar.shape == () for scalar in alone[2].values())
        for key, scalar in alone[2].items():
            assert float(picked[2][key]) == pytest.approx(float(scalar), rel=1e-6, abs=1e-12)


# What masks, pulls back and guards reads granularity and guard alone; the others set thresholds.
DST = [
    c
    for c in ALL
    if c.values[0][0] == "dst"
    and c.values[0][1]["threshold_unit"] == "share"
    and c.values[0][1]["threshold_init"] != "constant"
]


@pytest.mark.parametrize("case", DST)
def test_dst_lifted_forward_gradients_and_guard_equal_those_of_each_model(case: Case) -> None:
    method, variant = METHODS["dst"], make_variant(METHODS["dst"], case[1])
    rows = slot_inputs(case, torch.float32)
    for name in SHAPES:  # one slot whose layers have collapsed
        rows[2][0][name + ".threshold"].fill_(50.0)

    def step(params: Any, hp: Any, grads: Any) -> Any:
        assert method.pull_back is not None
        assert method.after_step is not None
        assert method.masks_of is not None
        gates = {n: dst.gate(params[n], params[n + ".threshold"]) for n in SHAPES}
        forward = method.sparsify(params, gates, (), hp, variant)
        used_up = {n: grad.clone() for n, grad in grads.items()}
        pulled = method.pull_back(used_up, params, gates, hp, variant)
        changed, new_gates, reset = method.after_step(params, (), hp, variant)
        masks = method.masks_of(params), method.masks_of(params | changed)
        return pulled, (gates, forward, changed, new_gates, reset, masks)

    args = [(row[0], row[5], row[3]) for row in rows]
    before = pytree.tree_map(lambda t: t.clone(), args)
    grads, after = torch.vmap(step)(*stacked(args))
    for slot, row in enumerate(args):
        alone_grads, alone_after = step(*row)
        assert_equal_trees(pytree.tree_map(lambda t, k=slot: t[k], after), alone_after)
        gates, forward, changed, new_gates, reset, masks = alone_after
        for n in SHAPES:
            assert torch.equal(gates[n], masks[0][n].float())
            assert torch.equal(new_gates[n], masks[1][n].float())
            assert torch.equal(forward[n], row[0][n] * masks[0][n])
            guarded = slot == 2 and case[1]["guard"] == "on"
            t = row[0][n + ".threshold"]
            assert torch.equal(changed[n + ".threshold"], torch.zeros_like(t) if guarded else t)
            assert torch.equal(reset[n + ".threshold"], torch.full(t.shape, guarded))
            assert slot != 2 or bool((new_gates[n] == guarded).all())
        assert grads.keys() == alone_grads.keys() == row[0].keys()
        for name, grad in alone_grads.items():
            assert grad.shape == row[0][name].shape
            torch.testing.assert_close(grads[name][slot], grad, rtol=1e-5, atol=1e-6)
    assert_equal_trees(args, before)  # the grads given to pull_back were copies


# Counts -------------------------------------------------------------------------------------------

DENSITIES = (0.001, 0.02, 0.3, 0.97, 1.0)


@pytest.mark.parametrize("case", [c for c in HARD if c.values[0][0] in EXACT])
def test_counts_are_kept_exactly(case: Case) -> None:
    for density, (progress, slot) in itertools.product(DENSITIES, ((0.0, 0), (0.4, 3))):
        e = example(slot, density)
        masks = run(case, e, settings_for(case[0], slot), progress=progress)[1]
        assert sum(num_active(masks).values()) == sum(num_active(e.masks).values())
        if case[0] != "dsr":  # DSR moves weights between layers, on purpose
            assert num_active(masks) == num_active(e.masks)


@pytest.mark.parametrize("density", [0.011, 0.1, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("begin", [0.0, 0.5])
def test_gmp_ends_at_its_exact_target(density: float, begin: float) -> None:
    # Uniform: within one of density * size, 288 * density in all (.011: 3.168, one in each layer).
    e = example(0, density=1.0)
    masks = run(("gmp", {}), e, {"density": density, "begin": begin}, progress=1.0)[1]
    found = num_active(masks)
    assert sum(found.values()) == round(288 * density)
    assert all(abs(num - density * SIZES[n]) < 1 or num == 1 for n, num in found.items())


def after_training(
    given: Example, params: Layers, masks: Layers, momenta: Layers, seed: int
) -> Example:
    """The next example: grown weights have moved off zero, momenta and gradients are others."""
    other = example(seed)
    return Example(
        {n: torch.where(masks[n], params[n] + 0.1 * other.params[n], 0.0) for n in given.params},
        masks,
        {n: momenta[n] + other.momenta[n] for n in momenta},
        other.grads,
    )


@pytest.mark.parametrize("case", [c for c in HARD if c.values[0][0] == "sm"])
def test_sm_stays_within_the_number_of_layers_and_the_carried_correction(case: Case) -> None:
    for density in (0.02, 0.3):
        e, state, carried = example(3, density), None, 0.0
        baseline = sum(num_active(e.masks).values())
        for number in range(5):
            params, masks, momenta, state = run(
                case, e, {"prune_fraction": 0.4}, state, progress=number / 10, number=number
            )
            missed = sum(num_active(masks).values()) - baseline
            assert abs(missed) <= len(SHAPES) + abs(carried), (density, number)
            if case[1]["redistribution"] == "none":
                assert missed == 0  # each layer regrows what it lost
            carried = float(state.correction)
            e = after_training(e, params, masks, momenta, seed=10 + number)


# Absent weights, seeds, inputs --------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in HARD if c in DECIDING and c in FIXING])
def test_absent_weights_are_zero_and_their_momenta_where_promised(case: Case) -> None:
    e = example(1)  # whose absent positions hold something
    params, masks, momenta, _ = run(case, e, settings_for(case[0], 1) | target_hp(case[0], 0.2))
    for name, mask in masks.items():
        assert not bool(params[name][~mask].any())
        assert bool(e.params[name][~mask].any())
        kept = mask & e.masks[name]
        if dense_gradient_by_hand(case) == "always":
            assert torch.equal(momenta[name], e.momenta[name])  # SM: nothing is reset
        else:
            assert not bool(momenta[name][~mask].any())
            new = mask & ~e.masks[name]
            assert not bool(momenta[name][new].any())
            moved = momenta[name][kept] != e.momenta[name][kept]
            # Only a weight dropped and grown in the same update may have lost its momentum.
            assert not bool((momenta[name][kept][moved] != 0).any())
        survived = kept & (params[name] != 0) & (momenta[name] != 0)
        assert torch.equal(params[name][survived], e.params[name][survived])


@pytest.mark.parametrize("case", [c for c in HARD if c in DECIDING])
def test_the_seed_and_the_number_alone_decide_random_growth(case: Case) -> None:
    name, words = case
    random_growth = name in ("set", "dsr") or words.get("growth") == "random"
    hp = settings_for(name, 2) | target_hp(name, 0.3)
    e = example(2)
    first = run(case, e, hp, seed=5, number=1, progress=0.2)
    again = run(case, e, hp, seed=5, number=1, progress=0.2)
    assert_equal_trees(again, first)
    for key in ({"seed": 6, "number": 1}, {"seed": 5, "number": 2}):
        other = run(case, e, hp, progress=0.2, **key)
        same = all(torch.equal(other[1][n], first[1][n]) for n in SHAPES)
        assert same != random_growth
        # What is dropped never depends on a seed, so neither do the counts.
        assert num_active(other[1]) == num_active(first[1])


@pytest.mark.parametrize("case", [c for c in DECIDING if c.values[0][0] == "set"])
def test_set_draws_new_values_from_another_stream_than_positions(case: Case) -> None:
    # One draw for both would give the chosen, lowest uniforms a mean of -.13 (design.md 3).
    if case[1]["new_value"] != "normal":
        return
    e = example(0, density=0.2, shapes={"a": (200, 200)})
    hp = {"zeta": 1.0, "threshold": 100.0, "max_prune": 1.0}
    params, masks, _, _ = run(case, e, hp)
    new = params["a"][masks["a"] & ~e.masks["a"]].double()
    # 8,000 dropped, .8 of them grow elsewhere; deviations of mean and deviation are
    # .1 / sqrt(6400) = .00125 and .1 / sqrt(12800) = .0009.
    assert len(new) > 6000
    assert abs(float(new.mean())) < 4 * 0.00125
    assert abs(float(new.std()) - 0.1) < 4 * 0.0009


@pytest.mark.parametrize("case", HARD)
def test_nothing_passed_in_is_changed(case: Case) -> None:
    name, words = case
    hp = settings_for(name, 1) | target_hp(name, 0.2)
    e = example(1)
    params, _, _, state = run(case, e, hp)  # DST's thresholds come with it
    if name == "dst":
        e.params = params
        for layer in SHAPES:  # one collapses, so that the guard has something to reset
            e.params[layer + ".threshold"] = torch.full_like(params[layer + ".threshold"], 50.0)
    before = pytree.tree_map(lambda t: t.clone(), (vars(e), state))
    given_hp, given_words = dict(hp), dict(words)
    run(case, e, given_hp, state, progress=0.5)
    run(case, e, given_hp, state, progress=0.5, number=1)
    assert_equal_trees((vars(e), state), before)
    assert given_hp == hp
    assert given_words == words


@pytest.mark.parametrize("case", HARD)
def test_masks_of_zeros_and_ones_and_parameters_are_taken(case: Case) -> None:
    e = example(1)
    hp = settings_for(case[0], 1) | target_hp(case[0], 0.2)
    expected = run(case, e, hp)
    other = Example(
        {n: torch.nn.Parameter(p) for n, p in e.params.items()},
        {n: m.to(torch.float32) for n, m in e.masks.items()},
        e.momenta,
        e.grads,
    )
    got = run(case, other, hp)
    assert all(mask.dtype == torch.bool for mask in got[1].values())
    for mine, theirs in zip(got[:2], expected[:2], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize("case", HARD)
def test_what_is_no_sparse_layer_is_handed_through(case: Case) -> None:
    e = example(1)
    bias, buffer = torch.ones(3), torch.full((3,), 2.0)
    e.params["bias"], e.momenta["bias"], e.grads["bias"] = bias, buffer, torch.ones(3)
    params, masks, momenta, _ = run(case, e, target_hp(case[0], 0.2))
    assert masks.keys() == SHAPES.keys()
    assert torch.equal(params["bias"], torch.ones(3))
    assert torch.equal(momenta["bias"], torch.full((3,), 2.0))


def test_what_cases_leave_out_is_read_by_no_update() -> None:
    left_out = [(n, w) for n in METHODS for w in combinations(n) if unread(n, w) != w]
    assert len(left_out) == 72 - 30 + 24 - 16  # of DST's and SET's combinations
    e = example(1)
    expected: dict[str, Any] = {}
    for name, words in left_out:
        hp, same = settings_for(name, 1), unread(name, words)
        key = str((name, same))
        expected[key] = expected.get(key) or run((name, same), e, hp, progress=0.4)
        with in_case(name, words):
            assert_equal_trees(run((name, words), e, hp, progress=0.4), expected[key])
            for asked in ("needs", "dense_gradient", "growth"):
                ask = getattr(METHODS[name], asked)
                mine, theirs = (ask(make_variant(METHODS[name], w)) for w in (words, same))
                assert mine == theirs


# Hard cases ---------------------------------------------------------------------------------------

BIG = {"a": (40, 50), "b": (6, 5, 3, 3), "c": (3, 4)}  # 2000, 270 and 12 positions


def sparsest() -> Example:
    return example(4, density=0.001, shapes=BIG)  # 2, 1 and 1 weights


def one_weight_in_each_layer() -> Example:
    return example(5, density=0.0)


def full_layers() -> Example:
    return example(7, density=1.0)


def one_full_layer_and_one_of_one_weight() -> Example:
    e, full, lone = example(8), full_layers(), one_weight_in_each_layer()
    e.masks["fc2.weight"] = full.masks["fc2.weight"]
    e.masks["conv.weight"] = lone.masks["conv.weight"]
    return e


def one_absent_position() -> Example:
    e = full_layers()
    for mask in e.masks.values():
        mask.view(-1)[0] = False
    return e


def zero_momenta_and_gradients() -> Example:
    e = example(9)
    for tensor in (*e.momenta.values(), *e.grads.values()):
        tensor.zero_()
    return e


def zero_weights() -> Example:
    e = example(10)
    for weight in e.params.values():
        weight.zero_()
    return e


def equal_weights() -> Example:
    e = example(11)
    for tensor in (*e.params.values(), *e.momenta.values(), *e.grads.values()):
        tensor.fill_(0.25)
    return e


def one_network_of_one_weight() -> Example:
    return example(12, density=1.0, shapes={"a": (1, 1)})


FINITE = [
    sparsest, one_weight_in_each_layer, full_layers, one_full_layer_and_one_of_one_weight,
    one_absent_position, zero_momenta_and_gradients, zero_weights, equal_weights,
    one_network_of_one_weight,
]  # fmt: skip


def nan_weights() -> Example:
    e = example(13)
    for weight in e.params.values():
        weight.view(-1)[::3] = math.nan
    return e


def nan_everywhere() -> Example:
    e = example(14)
    for tensor in (*e.params.values(), *e.momenta.values(), *e.grads.values()):
        tensor.fill_(math.nan)
    return e


def infinities() -> Example:
    e = example(15)
    for number, tensor in enumerate((*e.params.values(), *e.momenta.values(), *e.grads.values())):
        tensor.view(-1)[number % 2 :: 4] = math.inf if number % 3 else -math.inf
    return e


BROKEN = [nan_weights, nan_everywhere, infinities]

HARSH: dict[str, list[dict[str, float]]] = {
    "set": [{"zeta": 1.0, "threshold": 100.0, "max_prune": 1.0}, {"zeta": 0.5}],
    "dsr": [{"threshold": 100.0, "gain": 100.0}, {"threshold": 0.5, "target": 0.3}],
    "sm": [{"prune_fraction": 1.0}, {"prune_fraction": 0.5}],
    "dst": [{"threshold": 100.0}, {"threshold": 0.9}],
    "rigl": [{"prune_fraction": 1.0}, {"prune_fraction": 0.5}],
    "gmp": [{"begin": 0.99}, {}],
    "static": [{}],
    "dense": [{}],
}


def check_updates(case: Case, make: Callable[[], Example], hp: dict[str, float]) -> None:
    """Counts are exact and no layer is empty after each update."""
    name, words = case
    most = METHODS[name].at_most(make_variant(METHODS[name], words))
    hp = {key: min(value, most.get(key, value)) for key, value in hp.items()}
    e, state = make(), None
    before = num_active(e.masks)
    # For GMP a tenth, or one weight in each layer where that is more.
    size = sum(mask.numel() for mask in e.masks.values())
    given = hp | target_hp(name, max(0.1, len(e.masks) / size))
    # The harshest numbers twice where that is hardest, the others once on the way.
    twice = hp != HARSH[name][-1] and make in (*FINITE[:4], *BROKEN)
    for number, progress in enumerate((0.0, 1.0) if twice else (0.5,)):
        e.params, e.masks, e.momenta, state = run(
            case, e, given, state, progress=progress, number=number
        )
        after = num_active(e.masks)
        if make in FINITE:
            assert all(bool(t.isfinite().all()) for t in leaves((e.params, e.momenta, state)))
        # Without its guard, or with NaN or nothing but zeros to compare, DST may mask a layer.
        guarded = words.get("guard") == "on" and make in FINITE and make is not zero_weights
        if name != "dst" or guarded:
            assert min(after.values()) >= 1
        if name in EXACT:
            assert sum(after.values()) == sum(before.values())
        if name in EXACT - {"dsr"} or words.get("redistribution") == "none":
            assert after == before
    numbers = make_hyperparameters(METHODS[name], hp, make_variant(METHODS[name], words))
    scalars = METHODS[name].metrics(e.params, state, numbers)
    assert make in BROKEN or all(math.isfinite(float(scalar)) for scalar in scalars.values())


TIED = [zero_momenta_and_gradients, zero_weights, equal_weights]


@pytest.mark.parametrize("case", HARD)
def test_no_layer_empties_and_nothing_is_nan(case: Case) -> None:
    harsh, *milder = HARSH[case[0]]
    for make in FINITE:
        for hp in [harsh, *(milder if make in TIED else [])]:
            with in_case(make.__name__, hp):
                check_updates(case, make, hp)


@pytest.mark.parametrize("case", HARD)
def test_a_diverged_trial_ends_its_update_with_exact_counts(case: Case) -> None:
    for make, hp in itertools.product(BROKEN, HARSH[case[0]]):
        with in_case(make.__name__, hp):
            check_updates(case, make, hp)


@pytest.mark.parametrize("case", HARD)
def test_every_float_dtype_works_and_is_kept(case: Case) -> None:
    hp = settings_for(case[0], 1) | target_hp(case[0], 0.2)
    for dtype in DTYPES:
        with in_case(dtype):
            e = example(16, dtype=dtype)
            params, masks, momenta, state = run(case, e, hp, progress=0.3)
            assert all(t.dtype == dtype for t in (*params.values(), *momenta.values()))
            assert all(bool(t.isfinite().all()) for t in leaves((params, momenta, state)))
            shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
            assert shapes == SHAPES
            assert min(num_active(masks).values()) >= 1
            if case[0] in EXACT:
                assert sum(num_active(masks).values()) == sum(num_active(e.masks).values())


@pytest.mark.parametrize("case", cases(lambda method: method.name in ("static", "dense")))
def test_the_controls_change_no_mask(case: Case) -> None:
    e = example(17)
    params, masks, momenta, _ = run(case, e, progress=0.5)
    expected = dict(e.params), dict(e.momenta)
    if case[0] == "static":  # absent weights and their momenta are zero, whatever came in
        expected = (
            {k: v * e.masks.get(k, 1) for k, v in e.params.items()},
            {k: v * e.masks.get(k, 1) for k, v in e.momenta.items()},
        )
    assert_equal_trees((params, masks, momenta), (expected[0], e.masks, expected[1]))


@pytest.mark.parametrize("case", HARD)
def test_parameters_of_a_module_leave_no_graph_behind(case: Case) -> None:
    e = example(3)
    e = dataclasses.replace(
        e,
        params={k: torch.nn.Parameter(p) for k, p in e.params.items()},
        momenta={k: m.requires_grad_() for k, m in e.momenta.items()},
    )
    params, _, momenta, state = run(case, e, progress=0.2)
    assert all(t.grad_fn is None for t in leaves((params, momenta, state)))
    assert not any(t.requires_grad for t in leaves(state))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("dense", "dst")])
def test_absent_weights_are_zero_whatever_came_in(name: str, bad: float) -> None:
    w = torch.tensor([[1.0, bad, -1.0, 0.5, bad, bad, 2.0, 3.0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1]]).bool()
    zeros = {"w": torch.zeros_like(w)}
    hp = {"density": 0.25} if name == "gmp" else {}
    params, masks, _, _ = update(
        METHODS[name], {"w": w}, {"w": mask}, zeros, zeros, hp=hp, progress=1.0
    )
    assert bool((params["w"][~masks["w"]] == 0).all())


def test_keys_name_the_layer_the_purpose_the_number_and_the_seed() -> None:
    masks = {"a": torch.ones(2, dtype=torch.bool), "b": torch.ones(2, dtype=torch.bool)}
    drawn: list[Keys] = []
    for seed, number in itertools.product((0, 1), (0, 1)):
        drawn += update_keys(masks, seed, number).values()
    every = [int(key) for keys in drawn for key in keys]
    assert len(set(every)) == len(every) == 16
