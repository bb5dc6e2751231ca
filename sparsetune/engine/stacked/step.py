"""One training step of one trial as a function of tensors, which an engine compiles and lifts.

The rule to know: it is `trainer.train_step` without its topology update, nothing is changed in
place, and what may differ between the trials of a pool comes in as a tensor. So one text serves a
slot alone, compiled, and under `torch.vmap` all slots of a GPU at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad_and_value
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from sparsetune.methods.contract import Layers
from sparsetune.training import models, optim
from sparsetune.training.setup import Setup
from sparsetune.training.trainer import num_active


class Running(NamedTuple):
    """What a step changes. The gates are those of the next step."""

    params: Layers
    buffers: Layers
    first: Layers
    second: Layers
    gates: Layers
    sums: Tensor
    """[1 + L] float64, over the epoch's steps so far: the loss, and each layer's active weights
    where every step moves them. No 0-d tensor: Inductor loses changes to float64 ones on a CPU."""


Step = Callable[[Running, Any, Any, Tensor, Tensor, Tensor], tuple[Running, Layers]]
"""(running, method state, hp, `optim.step_numbers` float32, images [B, c, h, w], labels [B])
-> running after the step, and the loss's gradients at the weights of the forward pass."""


def hyperparameters(setup: Setup) -> Any:
    """As the step takes them: a tree of tensors, which an object without any is not."""
    return setup.hp if dataclasses.fields(setup.hp) else ()


def make(setup: Setup) -> Step:
    """The step of all trials that share the structure of this one."""
    method, variant, optimizer = setup.method, setup.variant, setup.settings.optimizer
    model, names, moves = setup.model, setup.names, setup.moves_masks
    masks_gradients, fixes_weights = setup.masks_gradients, setup.fixes_weights
    half = setup.settings.train.precision == "bfloat16" and setup.device.type == "cuda"

    def loss_of(
        params: Layers, buffers: Layers, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Layers]:
        # BatchNorm changes its buffers in place, which a transform allows for its own copies only.
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        # The cache of weights cast to bfloat16 would outlive a captured step.
        with torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False):
            logits = functional_call(model, params | buffers, (images,))
        return F.cross_entropy(logits.float(), labels), buffers

    def step(
        running: Running, state: Any, hp: Any, numbers: Tensor, images: Tensor, labels: Tensor
    ) -> tuple[Running, Layers]:
        params, gates = running.params, running.gates
        used = method.sparsify(params, gates, state, hp, variant)
        used = {name: used[name] for name in names}
        raw, (loss, buffers) = grad_and_value(loss_of, has_aux=True)(
            used, running.buffers, images, labels
        )
        grads = raw
        if method.pull_back is not None:
            grads = method.pull_back(dict(raw), params, gates, hp, variant)
        if masks_gradients:
            grads = {k: g * gates[k] if k in gates else g for k, g in grads.items()}
        params, first, second = dict(params), dict(running.first), dict(running.second)
        for name, p in running.params.items():
            params[name], first[name], moment = optim.stepped(
                optimizer,
                p,
                grads[name],
                first[name],
                second.get(name),
                method.decays(name, variant),
                numbers,
            )
            if moment is not None:
                second[name] = moment
        if fixes_weights and not masks_gradients:
            params |= {name: params[name] * gate for name, gate in gates.items()}
        if method.after_step is not None:
            changed, gates, reset = method.after_step(params, state, hp, variant)
            params |= changed
            for moments in (first, second):
                moments |= {k: moments[k].masked_fill(reset[k], 0) for k in reset if k in moments}
        # Gates that no step moves are counted by whoever updates the topology.
        active = num_active(setup, running.gates) if moves else torch.zeros_like(running.sums[1:])
        sums = running.sums + torch.cat([loss.to(torch.float64)[None], active])
        return Running(params, buffers, first, second, gates, sums), raw

    return step


def compiled(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    """`function` of trees of tensors of the shapes in `args`, compiled whole.

    Not by torch.compile, which would look at every call for what cannot differ in a pool (a tenth
    of a small network's step), and refuses a function after eight pools of different structure.
    """
    leaves, spec = pytree.tree_flatten(args)
    outer: list[pytree.TreeSpec] = []

    def flat(*leaves: Tensor) -> list[Tensor]:
        results, structure = pytree.tree_flatten(function(*pytree.tree_unflatten(leaves, spec)))
        outer.append(structure)
        return results

    with torch.no_grad():
        code = torch._inductor.compile(make_fx(flat, tracing_mode="fake")(*leaves), leaves)

    def run(*args: Any) -> Any:
        return pytree.tree_unflatten(code(*pytree.tree_leaves(args)), outer[0])

    return run


@functools.cache
def has_compiler() -> bool:
    """Can torch make code for this CPU: is there a C++ compiler, and does it work?"""
    try:
        compiled(torch.add, (torch.ones(16), torch.ones(16)))
    except (RuntimeError, OSError):  # Inductor's own errors are RuntimeErrors
        return False
    return True


def draws(setup: Setup) -> bool:
    """Does the network draw random numbers (dropout)? Compiled or lifted, they would be others."""
    shape, num_classes = setup.dataset.input_shape, setup.dataset.num_classes
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = models.build(setup.settings.model, shape, num_classes)
        before = torch.get_rng_state()
        model(torch.zeros(2, *shape))
        return not torch.equal(torch.get_rng_state(), before)
