"""The promises of `methods/contract.py`, each a function of one method with one variant.

The rule to know: a docstring says what is promised, and an AssertionError what came instead and
how to mend it. `CHECKS` at the end lists them.
"""

from __future__ import annotations

import dataclasses
import io
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sparsetune.engine.csr.backend import Csr
from sparsetune.engine.pool import Backend
from sparsetune.engine.solo import Solo
from sparsetune.methods.contract import Growth, Method, make_hyperparameters, make_variant
from sparsetune.methods.update import lifted_update
from sparsetune.settings import ModelSettings, TrainSettings, TrialSettings, UpdateSettings
from sparsetune.testing.examples import (
    DIVERGED,
    DTYPES,
    FINITE,
    SHAPES,
    SLOTS,
    Hooks,
    Words,
    difference,
    example,
    extremes,
    hooks,
    num_active,
    numbers,
    run,
    variants,
)
from sparsetune.training import checkpoint, data
from sparsetune.training.setup import Setup, prepare
from sparsetune.training.trainer import Metrics, TrialState


def _expect(holds: object, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def declarations_are_known(method: Method, words: Words) -> None:
    """What a method says of itself are words that the backends know, and fit each other."""
    variant, bounds = make_variant(method, words), numbers(method, words, 0.0)
    growth, dense, needs = (
        method.growth(variant),
        method.dense_gradient(variant),
        method.needs(variant),
    )
    _expect(dense in ("never", "at_update", "always"), f"dense_gradient gives {dense!r}")
    _expect(needs <= {"momentum", "gradient"}, f"needs gives {needs!r}")
    _expect(bounds.keys() >= method.at_most(variant).keys(), "at_most names no hyperparameter")
    if growth is None:
        mends = "give growth=lambda variant: Growth(...), or keeps_count=lambda variant: False"
        drops = method.decide is None or method.begins == "dense" or not method.keeps_count(variant)
        _expect(drops, f"nothing grows what decide drops; {mends}")
        return
    scores = {"random": {"never"}, "gradient": {"at_update"}, "momentum": set[str]()}
    known = growth.score in scores and growth.new_value in ("zero", "normal", "keep")
    _expect(
        isinstance(growth, Growth) and known, f"growth gives {growth}; see Growth for its words"
    )
    if growth.score != "random":
        _expect(growth.score in needs, f"grows by {growth.score}, which needs does not name")
        fits = dense in scores[growth.score] | {"always"}
        _expect(fits, f"grows by the {growth.score} of absent weights; dense_gradient is {dense}")


def init_makes_a_state_of_its_own(method: Method, words: Words) -> None:
    """init returns (state, extra parameters); the state is () or a NamedTuple of tensors, none of
    them one that was passed in."""
    for h in hooks(method, words):
        state = h.state
        named = state == () or (isinstance(state, tuple) and hasattr(state, "_fields"))
        _expect(named, f"the state is {type(state).__name__}; use a NamedTuple, or () for none")
        for name, value in state._asdict().items() if state else ():
            _expect(isinstance(value, Tensor), f"{name} is a {type(value).__name__}, no tensor")
        given = {t.data_ptr() for t in pytree.tree_leaves((*h.tensors()[1:3], h.hp, h.targets))}
        for path, tensor in pytree.tree_flatten_with_path(state)[0]:
            mend = "return a copy, such as hp.x.clone(), or both change together"
            name = pytree.keystr(path)
            _expect(tensor.data_ptr() not in given, f"{name} is a tensor that was given; {mend}")


def decisions_have_their_form(method: Method, words: Words) -> None:
    """decide returns keep (bool, as the values), grow (whole float64 numbers) and a state like
    init's, the same on all positions with a mask as on the active weights alone."""
    for h in hooks(method, words, slots=(1, 3)) if method.decide else ():
        dense, alone = h.active()
        made = [h.decide(dense), h.decide(alone)]
        for active, (keep, grow, state) in zip((dense, alone), made, strict=True):
            same = list(keep) == list(grow) == list(h.shapes)
            _expect(same, f"keep has {list(keep)} and grow {list(grow)}; give {list(h.shapes)}")
            for name, stays in keep.items():
                fits = stays.dtype == torch.bool and stays.shape == active[name].value.shape
                _expect(fits, f"keep[{name!r}] is {stays.dtype} {list(stays.shape)}; give bool")
                fits = grow[name].dtype == torch.float64 and grow[name].shape == ()
                _expect(fits, f"grow[{name!r}] is {grow[name].dtype}; count in float64: ops.count")
                num, left = float(grow[name]), int(stays[active[name].valid].sum())
                room = h.shapes[name].numel() - left
                fits = num == round(num) and 0 <= num <= room
                _expect(
                    fits, f"grow[{name!r}] is {num}; give whole numbers from 0 to the {room} free"
                )
            forms = [pytree.tree_map(lambda t: (t.dtype, t.shape), s) for s in (state, h.state)]
            _expect(forms[0] == forms[1], f"the state was {forms[1]}, and after decide {forms[0]}")
        (keep, *rest), (kept, *other) = made
        rows = {n: k[dense[n].valid] for n, k in keep.items()}
        wrong = difference((rows, *rest), (kept, *other))
        mend = "restrict what you sum or rank to layer.valid; take sizes from shapes"
        _expect(not wrong, f"on all positions with their mask {wrong}; {mend}")


class _Casts(TorchFunctionMode):
    """Finds calls in which a float64 number meets weights of another dtype."""

    HARMLESS = ("to", "type_as", "expand_as", "masked_fill", "masked_fill_", "copy_", "__get__")
    found = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        number = any(t.dtype == torch.float64 and t.dim() == 0 for t in given)
        weights = any(t.is_floating_point() and t.dtype != torch.float64 and t.dim() for t in given)
        name = getattr(func, "__name__", str(func))
        if number and weights and name not in self.HARMLESS and "lowest" not in str(func):
            own = [f for f in traceback.extract_stack() if not f.filename.startswith("<")][-2]
            self.found = f"{name} ({own.filename}:{own.lineno}: {own.line})"
        return func(*args, **(kwargs or {}))


def numbers_are_cast(method: Method, words: Words) -> None:
    """hp, progress and what a state remembers are float64 numbers, cast to the weights' dtype
    before they meet weights: alone PyTorch would compute in that dtype, lifted in another."""
    for h in hooks(method, words, slots=(1,)):
        with _Casts() as casts:
            h.begin(h.given.params, h.given.masks, h.targets, h.hp, h.init_keys)
            h.step(*h.tensors())
            for active in h.active() if method.decide else ():
                h.decide(active)
        mend = "write number.to(layer.value.dtype)"
        _expect(not casts.found, f"a float64 number meets float32 weights in {casts.found}; {mend}")


def lifted_updates_equal_those_alone(method: Method, words: Words) -> None:
    """An update under torch.vmap comes to what it comes to for each model alone."""
    for dtype in (torch.float32, torch.bfloat16) if method.decide else ():
        four = hooks(method, words, dtype)
        rows = [(*vars(h.given).values(), h.state, h.hp, h.progress, h.keys) for h in four]

        def lifted(
            p: Any, m: Any, v: Any, g: Any, state: Any, hp: Any, done: Any, keys: Any
        ) -> Any:
            variant = make_variant(method, words)
            return lifted_update(method, p, m, v, g, state, variant, hp, done, keys)

        args = pytree.tree_map(lambda *each: torch.stack(each), *rows)
        params, masks, reset, state = torch.vmap(lifted)(*args)
        for k, h in enumerate(four):
            alone = run(
                method, words, h.given, h.numbers, h.state,
                progress=SLOTS[k][1], number=k, seed=100 + k,
            )  # fmt: skip
            picked = pytree.tree_map(lambda t, k=k: t[k], (params, masks, reset, state))
            momenta = {
                n: m.masked_fill(picked[2].get(n, torch.zeros((), dtype=torch.bool)), 0)
                for n, m in h.given.momenta.items()
            }
            expected = {n: alone[0][n] for n in params}, alone[1], alone[2], alone[3]
            wrong = difference((*picked[:2], momenta, picked[3]), expected)
            mend = "cast numbers, read valid positions only, compare counts and not floats"
            _expect(not wrong, f"with {dtype} trial {k} has {wrong}; {mend}")


def lifted_steps_equal_those_alone(method: Method, words: Words) -> None:
    """init, sparsify, pull_back, after_step and metrics under torch.vmap come to what they come to
    for each model alone; metrics are numbers, tensors of no dimension."""
    four = hooks(method, words)
    rows = [(*h.tensors(), h.targets, h.init_keys) for h in four]

    def both(params: Any, masks: Any, grads: Any, state: Any, hp: Any, *keyed: Any) -> Any:
        begun = four[0].begin({n: params[n] for n in masks}, masks, keyed[0], hp, keyed[1])
        return begun, four[0].step(params, masks, grads, state, hp)

    lifted = torch.vmap(both)(*pytree.tree_map(lambda *each: torch.stack(each), *rows))
    for k, row in enumerate(rows):
        picked, alone = pytree.tree_map(lambda t, k=k: t[k], lifted), both(*row)
        for name, scalar in alone[1][-1].items():
            _expect(
                scalar.shape == (), f"metrics: {name} has shape {list(scalar.shape)}; give a mean"
            )
        wrong = difference(
            pytree.tree_map(torch.Tensor.double, picked),
            pytree.tree_map(torch.Tensor.double, alone),
            1e-5,
        )
        _expect(not wrong, f"trial {k} has {wrong}; cast numbers, and sum in float64")


def nothing_given_is_changed(method: Method, words: Words) -> None:
    """What is passed in stays as it is, but for the gradients that pull_back is given."""
    for h in hooks(method, words, slots=(1, 2)):
        given = (vars(h.given), h.state, h.hp, h.targets)
        before = pytree.tree_map(lambda t: t.clone(), given)
        h.step(*h.tensors())
        for active in h.active() if method.decide else ():
            h.decide(active)
        run(method, words, h.given, h.numbers, h.state, progress=0.5)
        wrong = difference(given, before)
        _expect(not wrong, f"{wrong}; leave out the underscore of methods such as mul_ and add_")


def the_number_of_weights_is_kept(method: Method, words: Words) -> None:
    """What begins sparse keeps its number of weights, unless keeps_count says otherwise, what
    closes ends at its targets, and nothing but decide and after_step moves a mask."""
    kept = method.keeps_count(make_variant(method, words))
    settings = [*extremes(method, words), *(numbers(method, words, share) for *_, share in SLOTS)]
    for density in (0.001, 0.001, 0.02, 0.02, 0.3, 0.3, 0.97, 0.97, 1.0, 1.0):
        given, hp = example(0, density), settings.pop(0)
        settings.append(hp)
        before = num_active(given.masks)
        if method.closes:
            fair = max(round(density * 288), 3)
            left = run(method, words, example(0, 1.0), hp | {"density": fair / 288}, progress=1.0)
            num = sum(num_active(left[1]).values())
            _expect(num == fair, f"at progress 1 {num} weights are left of {fair} in targets")
        after = num_active(run(method, words, given, hp, progress=0.4)[1])
        if method.decide is None and method.after_step is None:
            _expect(after == before, f"masks had {before} and have {after}")
        elif method.begins == "sparse" and kept:
            same = sum(after.values()) == sum(before.values())
            mend = "grow as many as keep drops, or give keeps_count=lambda variant: False"
            _expect(same, f"{before} weights became {after} with {hp}; {mend}")


def absent_weights_are_zero(method: Method, words: Words) -> None:
    """Weights that an update drops are zero, and so are their momenta and those of new weights,
    unless dense_gradient is always; what stays keeps both."""
    always = method.dense_gradient(make_variant(method, words)) == "always"
    for h in hooks(method, words, slots=(1, 2)) if method.reaches_density else ():
        given = h.given  # whose absent positions hold something
        given.params["fc1.weight"].view(-1)[7] = float("nan")
        params, masks, momenta, _ = run(method, words, given, h.numbers)
        for name, mask in masks.items():
            was, moved = given.momenta[name], momenta[name] != given.momenta[name]
            _expect(not bool(params[name][~mask].any()), f"{name} holds weights where it has none")
            stays = mask & given.masks[name] & (params[name] != 0) & (momenta[name] != 0)
            same = torch.equal(
                params[name][stays].nan_to_num(), given.params[name][stays].nan_to_num()
            )
            _expect(same, f"weights of {name} that stay have changed")
            clear = not bool(momenta[name][~mask | ~given.masks[name]].any())
            _expect(always or clear, f"{name} has momenta of absent or new weights")
            reset = not bool(momenta[name][moved & mask].any())
            _expect(reset and (torch.equal(momenta[name], was) or not always), f"momenta of {name}")


def seed_and_number_alone_decide_what_is_random(method: Method, words: Words) -> None:
    """The same seed and number give the same masks; others give others only where growth is
    random, and never other counts. And some setting moves a mask."""
    growth, moved = method.growth(make_variant(method, words)), method.decide is None
    for h in hooks(method, words, slots=(1, 2)) if method.decide else ():
        first, again, *others = (
            run(method, words, h.given, h.numbers, progress=0.4, seed=seed, number=number)
            for seed, number in ((5, 1), (5, 1), (6, 1), (5, 2))
        )
        wrong = difference(again, first)
        _expect(not wrong, f"called again, {wrong}; draw nothing, and remember nothing outside")
        changed = any(not torch.equal(first[1][n], h.given.masks[n]) for n in SHAPES)
        random = growth is not None and growth.score == "random"
        for other in others:
            same = difference(other[1], first[1]) == ""
            _expect(random or same, "another seed gives other masks, and growth is not random")
            few = same and changed and random and sum(num_active(h.given.masks).values()) > 20
            _expect(not few, "another seed gives the same masks, and growth is random")
            alike = num_active(other[1]) == num_active(first[1])
            _expect(alike, "another seed gives other counts; decide must not depend on it")
        moved = moved or changed
    _expect(moved, f"no update moved a mask with {[numbers(method, words, s) for *_, s in SLOTS]}")


def what_is_read_is_named(method: Method, words: Words) -> None:
    """needs names what decide and growth read: momenta and gradients are not there otherwise."""
    needs = method.needs(make_variant(method, words))
    for h in hooks(method, words, slots=(1, 2)):
        expected = run(method, words, h.given, h.numbers)
        for what, field in (("momentum", "momenta"), ("gradient", "grads")):
            zeros = {n: torch.zeros_like(t) for n, t in getattr(h.given, field).items()}
            got = run(method, words, dataclasses.replace(h.given, **{field: zeros}), h.numbers)
            wrong = what not in needs and difference(got[1], expected[1])
            _expect(not wrong, f"without the {what} {wrong}; needs gives {set(needs)}")


def hard_cases_end_well(method: Method, words: Words) -> None:
    """No update empties a layer of a method with a density or makes NaN, whatever its numbers and
    weights; and where a trial has diverged, counts stay exact."""
    low, high, *others = [*extremes(method, words), *[numbers(method, words, 0.35)] * 2][:5]
    others.append(low)
    for turn, (what, make) in enumerate((FINITE | DIVERGED).items()):
        # The upper bounds twice, and others by turns, so that all meet some of the examples.
        milder = others[turn % len(others)]
        twice, once = (high, (0.0, 1.0)), (milder, (0.5,))
        for hp, updates in (twice, once) if what in FINITE else ((high, (0.5,)),):
            given, state = make(), None
            before, fine = num_active(given.masks), what in FINITE
            for number, progress in enumerate(updates):
                step = run(method, words, given, hp, state, progress=progress, number=number)
                given.params, given.masks, given.momenta, state = step
                after, where = num_active(given.masks), f"with {what} and {hp}"
                full = min(after.values()) >= 1 or not method.reaches_density
                _expect(full, f"a layer is empty {where}: {after}; ops.keep_one keeps one")
                if method.begins == "sparse" and method.keeps_count(make_variant(method, words)):
                    same = sum(after.values()) == sum(before.values())
                    _expect(same, f"{before} became {after} {where}; ops.lowest takes NaN")
                finite = all(bool(t.isfinite().all()) for t in pytree.tree_leaves((step, state)))
                _expect(
                    finite or not fine, f"NaN or infinity {where}; clamp(min=1) before dividing"
                )
            variant = make_variant(method, words)
            scalars = method.metrics(given.params, state, make_hyperparameters(method, hp, variant))
            finite = all(bool(scalar.isfinite()) for scalar in scalars.values())
            _expect(finite or not fine, f"metrics gives {scalars} with {what} and {hp}")


def dtypes_are_kept(method: Method, words: Words) -> None:
    """Weights and momenta come out in the float dtype that they came in."""
    for dtype in DTYPES:
        h = Hooks(method, words, 1, dtype)
        params, _, momenta, _ = run(method, words, h.given, h.numbers, progress=0.3)
        kinds = {t.dtype for t in (*params.values(), *momenta.values())}
        mend = "give extra parameters the dtype of the values"
        _expect(kinds == {dtype}, f"{dtype} became {kinds}; {mend}")


def _setup(method: Method, words: Words) -> Setup:
    """A small network and data set, of which nothing is read from a disk."""
    stand_in = "static" if method.begins == "sparse" else "gmp" if method.closes else "dense"
    settings = TrialSettings(
        method=stand_in,
        density=0.3,
        epochs=3,
        model=ModelSettings(widths=[12]),
        train=TrainSettings(batch_size=20),
        update=UpdateSettings(every=3, first=0.0, stop=1.0, doublings=[]),
    )
    drawn = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (120, 1, 6, 6), generator=drawn, dtype=torch.uint8)
    labels = (images.flatten(1)[:, :3].argmax(1)).long()
    half = torch.full((1,), 0.5)
    dataset = data.Dataset("noise", data.Arrays(images, labels), 3, half, half, "")
    variant = make_variant(method, words)
    hp = make_hyperparameters(method, {}, variant)
    setup = prepare(settings, torch.device("cpu"), dataset)
    return setup._replace(method=method, variant=variant, hp=hp)


def training_goes_on_from_a_checkpoint(method: Method, words: Words) -> None:
    """A trial trains, alike by the solo trainer and on the values of truly sparse layers where
    those can, and goes on from a checkpoint as if it had not been interrupted."""
    if (
        words
        and sum(w != d for w, d in zip(words.values(), variants(method)[0].values(), strict=True))
        > 1
    ):
        return  # the defaults, and each other word beside them
    setup = _setup(method, words)
    ends: list[tuple[TrialState, Metrics]] = []
    backends: list[Backend] = [Solo(1), Solo(1), *([] if Csr.unfit(setup) else [Csr(1)])]
    for backend in backends:
        backend.attach(0, setup, None)
        for epoch in range(3):
            metrics = backend.advance()[0]
            if len(ends) == 1 and epoch == 1:
                file = io.BytesIO()
                torch.save(backend.snapshot(0), file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                backend.attach(0, setup, saved)
        metrics.pop("device_seconds")
        ends.append((checkpoint.decode(setup, backend.snapshot(0)), metrics))
    _expect(not ends[0][0].diverged, "a small network diverges with the defaults")
    wrong = difference(ends[1][0], ends[0][0])
    _expect(not wrong, f"resumed, {wrong}; what is remembered belongs into the state")
    fixed = method.closes or (method.begins == "sparse" and method.keeps_count(setup.variant))
    num, goal = sum(num_active(ends[0][0].masks).values()), sum(setup.targets.values())
    _expect(
        num == goal or not fixed, f"training ends with {num} weights, and {goal} were asked for"
    )
    for state, metrics in ends[2:]:
        wrong = difference(state.masks, ends[0][0].masks)
        same = all(abs(metrics[k] - v) <= 1e-3 * max(1, abs(v)) for k, v in ends[0][1].items())
        _expect(same and not wrong, f"truly sparse, {wrong or metrics}, and solo {ends[0][1]}")


Check = Callable[[Method, Words], None]
CHECKS: tuple[Check, ...] = (
    declarations_are_known,
    init_makes_a_state_of_its_own,
    decisions_have_their_form,
    numbers_are_cast,
    lifted_updates_equal_those_alone,
    lifted_steps_equal_those_alone,
    nothing_given_is_changed,
    the_number_of_weights_is_kept,
    absent_weights_are_zero,
    seed_and_number_alone_decide_what_is_random,
    what_is_read_is_named,
    hard_cases_end_well,
    dtypes_are_kept,
    training_goes_on_from_a_checkpoint,
)
