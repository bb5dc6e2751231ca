"""Many trials on a GPU: all slots as one tensor per parameter, [K, ...], one step for all of them.

The rule to know: the step is `step.make` under `torch.vmap`, and a GPU replays it as one captured
graph that finds batches and numbers in tables on the device, so that the host waits only where a
topology is updated. K is fixed for a pool, however many slots are filled: batched kernels may round
otherwise for another K, and a slot's results must not depend on its neighbours. What an empty slot
computes is never read.

Longer than other modules: the host's half (`Lifted`) and the device's (`Stack`) are one procedure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._triton import has_triton

from sparsetune.engine.stacked import step
from sparsetune.methods.contract import Layers
from sparsetune.methods.update import update_keys, update_layers
from sparsetune.training import checkpoint, data, optim, trainer
from sparsetune.training.checkpoint import Snapshot
from sparsetune.training.setup import Batches, Setup, batches, batches_key, inputs, is_due
from sparsetune.training.trainer import Metrics, TrialState

WARM_UP = 3  # calls before a graph is captured, as in PyTorch's manual


class Held(NamedTuple):
    """Of a slot, what the host knows; the tensors of `state` are those of the last epoch's end."""

    setup: Setup
    state: TrialState


def padded(slots: int) -> int:
    """K: 1, 2, 4, ..., so that few sizes of graphs and kernels exist."""
    return 1 << (slots - 1).bit_length()


class Lifted:
    """See `pool.Backend`. `compiles`: the step is fused by Inductor; None: if Triton is there."""

    @staticmethod
    def unfit(setup: Setup) -> str:
        """Networks of our own can be lifted."""
        name = setup.settings.model.name
        if ":" not in name:
            return ""
        if step.draws(setup):
            return f"{name} draws random numbers in its forward pass, which differ in a stack"
        try:
            state = trainer.begin(setup)
            stack = Stack(1, setup, state, compiles=False)
            stack.put(0, setup, state)
            stack.begin_epoch({0: Held(setup, state)})
            stack.step()
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            return f"{name} cannot be lifted over trials by torch.vmap: {reason}"
        return ""

    def __init__(self, slots: int, compiles: bool | None = None) -> None:
        self._slots = padded(slots)
        self._compiles = has_triton() if compiles is None else compiles
        self._held: dict[int, Held] = {}
        self._stack: Stack | None = None

    def attach(self, slot: int, setup: Setup, start: Snapshot | None) -> None:
        state = trainer.begin(setup) if start is None else checkpoint.decode(setup, start)
        if self._stack is None:
            self._stack = Stack(self._slots, setup, state, self._compiles)
        self._stack.put(slot, setup, state)
        self._held[slot] = Held(setup, state)

    def advance(self) -> dict[int, Metrics]:
        if not self._held:
            return {}
        assert self._stack is not None
        began = time.perf_counter()
        self._stack.begin_epoch(self._held)
        now = {slot: held.state for slot, held in self._held.items()}
        for _ in range(next(iter(self._held.values())).setup.steps_per_epoch):
            self._stack.advance()
            now = {slot: state._replace(step=state.step + 1) for slot, state in now.items()}
            due = [s for s, held in self._held.items() if is_due(held.setup, now[s].step)]
            if due:
                self._update({slot: Held(self._held[slot].setup, now[slot]) for slot in due})
                now |= {slot: now[slot]._replace(updates=now[slot].updates + 1) for slot in due}
        results = {}
        for slot, (setup, before) in self._held.items():
            loss, *active = (self._stack.running.sums[slot] / setup.steps_per_epoch).cpu()
            state, results[slot] = trainer.end_epoch(
                setup, before, self._stack.state(slot, now[slot]), float(loss), active
            )
            if setup.moves_masks:
                self._stack.put_masks(slot, state.masks, state.ever)
            # Only its masks are read again, as those before the next epoch.
            masks = {name: mask.clone() for name, mask in state.masks.items()}
            self._held[slot] = Held(setup, state._replace(masks=masks))
        seconds = (time.perf_counter() - began) / len(results)
        return {slot: metrics | {"device_seconds": seconds} for slot, metrics in results.items()}

    def snapshot(self, slot: int) -> Snapshot:
        assert self._stack is not None
        state = self._stack.state(slot, self._held[slot].state)
        # Copies: on a CPU a snapshot would otherwise share the stack's memory.
        return checkpoint.encode(pytree.tree_map_only(Tensor, torch.clone, state))

    def detach(self, slot: int) -> None:
        del self._held[slot]

    def _update(self, due: dict[int, Held]) -> None:
        """All slots take the update and those due keep it: K is fixed here as well."""
        assert self._stack is not None
        stack, (setup, _) = self._stack, next(iter(due.values()))
        keys, progress = {}, torch.zeros(self._slots, dtype=torch.float64, device=setup.device)
        for slot, (own, state) in due.items():
            keys[slot] = update_keys(stack.masks, own.settings.seed, state.updates)
            progress[slot] = own.progress(state.step)
        some = next(iter(keys.values()))
        streams = [keys.get(slot, some) for slot in stack.range]

        def update(*args: Any) -> Any:
            params, masks, moments, eps, grads, state, hp, done, key = args
            momenta = optim.momentum_of(setup.settings.optimizer, moments, eps)
            return update_layers(
                setup.method, params, masks, momenta, grads, state, setup.variant, hp, done, key
            )

        params, masks, reset, method_state = torch.vmap(update)(
            {name: stack.running.params[name] for name in stack.masks},
            stack.masks,
            optim.Moments(stack.running.first, stack.running.second),
            stack.epsilon,
            {name: stack.raw[name] for name in stack.masks},
            stack.method,
            stack.hp,
            progress,
            pytree.tree_map(lambda *of_slots: torch.stack(of_slots), *streams),
        )
        chosen = torch.tensor([k in due for k in stack.range], device=setup.device)
        stack.take(chosen, params, masks, reset, method_state)


class Stack:
    """The tensors of K slots, each with the slot as its first axis, at fixed addresses."""

    def __init__(self, slots: int, setup: Setup, state: TrialState, compiles: bool) -> None:
        def room(tensor: Tensor) -> Tensor:
            return tensor.new_zeros((slots, *tensor.shape))

        self.range = range(slots)
        self._setup, self._compiles = setup, compiles
        gates = trainer.gates_of(setup, state)
        active = trainer.num_active(setup, gates)
        self.running: step.Running
        self.running, self.masks, self.ever, self.method, self.hp, self._active = pytree.tree_map(
            room,
            (
                step.Running(
                    state.params,
                    state.buffers,
                    *state.moments,
                    gates,
                    torch.cat([active.new_zeros(1), active]),
                ),
                state.masks,
                state.ever,
                state.method,
                step.hyperparameters(setup),
                active,
            ),
        )
        steps, size = setup.steps_per_epoch, setup.batch_size
        numbers = setup.step_numbers(1)
        self._places = torch.zeros(steps, slots, size, dtype=torch.int64, device=setup.device)
        self._numbers = torch.zeros(steps, slots, len(numbers), device=setup.device)
        self.epsilon = torch.zeros(slots, device=setup.device)
        self._step_number = torch.zeros(1, dtype=torch.int64, device=setup.device)
        self._offsets: data.Offsets | None = None
        self.raw: Layers = {}
        self._lifted: Callable[..., Any] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def put(self, slot: int, setup: Setup, state: TrialState) -> None:
        """A slot's tensors from a state's; sums are left alone."""
        gates = trainer.gates_of(setup, state)
        running = (state.params, state.buffers, *state.moments, gates)
        hp, active = step.hyperparameters(setup), trainer.num_active(setup, gates)
        theirs = (running, state.masks, state.ever, state.method, hp, active)
        ours = (tuple(self.running[:5]), self.masks, self.ever, self.method, self.hp, self._active)
        for stacked, tensor in zip(*map(pytree.tree_leaves, (ours, theirs)), strict=True):
            stacked[slot].copy_(tensor)
        self.epsilon[slot] = setup.settings.optimizer.eps

    def put_masks(self, slot: int, masks: Layers, ever: Layers) -> None:
        for stacked, theirs in ((self.masks, masks), (self.ever, ever)):
            for name, tensor in theirs.items():
                stacked[name][slot].copy_(tensor)

    def take(
        self, chosen: Tensor, params: Layers, masks: Layers, reset: Layers, state: Any
    ) -> None:
        """The outcome of an update, for the slots that are `chosen` [K]."""

        def these(tensor: Tensor) -> Tensor:
            return chosen.view(-1, *[1] * (tensor.dim() - 1))

        for name, mask in masks.items():
            for old, new in ((self.running.params[name], params[name]), (self.masks[name], mask)):
                old.copy_(torch.where(these(new), new, old))
            self.ever[name].logical_or_(self.masks[name])
            if name in self.running.gates:
                self.running.gates[name].copy_(self.masks[name])
        for moments in (self.running.first, self.running.second):
            for name in reset.keys() & moments.keys():
                moments[name].masked_fill_(reset[name] & these(reset[name]), 0)
        leaves = map(pytree.tree_leaves, (self.method, state))
        for old, new in zip(*leaves, strict=True):
            old.copy_(torch.where(these(new), new, old))
        gates = self.running.gates
        self._active.copy_(torch.vmap(lambda g: trainer.num_active(self._setup, g))(gates))

    def state(self, slot: int, counts: TrialState) -> TrialState:
        """The slot's state, of views; its numbers are those of `counts`."""
        stacked = (*self.running[:4], self.masks, self.ever, self.method)
        params, buffers, first, second, masks, ever, method = pytree.tree_map(
            lambda tensor: tensor[slot], stacked
        )
        return counts._replace(
            params=params,
            buffers=buffers,
            moments=optim.Moments(first, second),
            masks=masks,
            ever=ever,
            method=method,
        )

    def begin_epoch(self, held: dict[int, Held]) -> None:
        """Fills the tables of batches and numbers."""
        known: dict[Any, Batches] = {}
        offsets: list[data.Offsets | None] = [None for _ in self.range]
        for slot, (setup, state) in held.items():
            key = batches_key(setup, state.epoch)
            if key not in known:
                known[key] = batches(setup, state.epoch)
            self._places[:, slot].copy_(known[key].places)
            offsets[slot] = known[key].offsets
            steps = range(state.step + 1, state.step + 1 + setup.steps_per_epoch)
            numbers = [setup.step_numbers(number) for number in steps]
            self._numbers[:, slot].copy_(torch.tensor(numbers))
        self._fill_offsets(offsets)
        self.running.sums.zero_()
        self._step_number.zero_()

    def _fill_offsets(self, offsets: list[data.Offsets | None]) -> None:
        """All slots' augmentation in one table: slot k's image i is at k * num + i."""
        some = next((own for own in offsets if own is not None), None)
        if some is None:
            return
        table = data.Offsets(*map(torch.cat, zip(*(own or some for own in offsets), strict=True)))
        if self._offsets is None:
            self._offsets = table
        for old, new in zip(self._offsets, table, strict=True):
            old.copy_(new)

    def advance(self) -> None:
        """One step of all slots."""
        if self._setup.device.type != "cuda":
            self.step()
            return
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        tensors = [*pytree.tree_leaves(self.running), self._step_number]
        kept = [tensor.clone() for tensor in tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph

    @torch.no_grad()
    def step(self) -> None:
        """The same, launched operation by operation."""
        self._setup.model.train()
        places = self._places.index_select(0, self._step_number)[0]
        numbers = self._numbers.index_select(0, self._step_number)[0]
        args = (self.running, self.method, self.hp, numbers, *self._inputs(places))
        if self._lifted is None:
            self._lifted = self._chosen(args)
            if self._compiles:
                self._lifted = step.compiled(self._lifted, args)
        after, self.raw = self._lifted(*args)
        if not self._setup.moves_masks:
            after.sums[:, 1:] += self._active
        leaves = map(pytree.tree_leaves, (self.running, after))
        for old, new in zip(*leaves, strict=True):
            if new is not old:
                old.copy_(new)
        self._step_number += 1

    def _chosen(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """The step of all slots. Lifted convolutions are grouped ones, which on a GPU may be slower
        than the slots' own one after another: the faster of both, once for all epochs."""
        alone = step.make(self._setup)
        ways: list[Callable[..., Any]] = [torch.vmap(alone), torch.vmap(alone, chunk_size=1)]
        weights = self._setup.sparse | self._setup.dense
        convolves = any(len(shape) > 2 for shape in weights.values())
        if self._setup.device.type != "cuda" or not convolves:
            return ways[0]
        seconds = []
        for way in ways:
            for _ in range(WARM_UP):
                way(*args)
            torch.cuda.synchronize(self._setup.device)
            began = time.perf_counter()
            for _ in range(WARM_UP):
                way(*args)
            torch.cuda.synchronize(self._setup.device)
            seconds.append(time.perf_counter() - began)
        return ways[seconds.index(min(seconds))]

    def _inputs(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """([K, B, c, h, w], [K, B]) of the positions [K, B]."""
        num = len(self._setup.dataset.train.labels)
        first = torch.arange(len(places), device=places.device)[:, None] * num
        return inputs(self._setup, Batches(places, self._offsets), places, places + first)
