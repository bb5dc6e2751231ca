"""Step time of each method against plain dense PyTorch, interleaved, and the cost of an update.

`python scripts/bench_step.py [--device cuda] [--repeats 15]`: LeNet-300-100 on MNIST-shaped random
images, batch 128, density 0.1, SGD with momentum and weight decay, one CPU thread. Each repeat
times a window of steps of every variant in turn; the ratio to that repeat's dense window is what
counts, its median is printed. On a CPU the clock is the process's CPU time (one thread), which
other programs on the machine disturb less than wall time. The plain step is nn.Linear,
torch.optim.SGD and the same resident uint8 data: no masks, no Python of ours. Needs torch alone.

`--against FOLDER`, another checkout: windows of both in turn, and how many times as fast ours are.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import against
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetune.machine import processor
from sparsetune.methods.update import update_keys, update_layers
from sparsetune.settings import ModelSettings, TrialSettings, UpdateSettings
from sparsetune.training import data, models, optim, trainer
from sparsetune.training.setup import keep_freed_memory, prepare

BATCH = 128
# What the project promises; "public" is what other code measured at density 0.1, one thread.
STEP = {"static": 1.10, "set": 1.10, "dsr": 1.10, "sm": 1.10, "rigl": 1.12, "dst": 1.60}
UPDATE_MS = {"set": 12.0, "sm": 35.0}
UPDATES = ("set", "dsr", "sm", "rigl", "gmp")


def dataset() -> data.Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60_000, 1, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (60_000,), generator=generator)
    return data.Dataset(
        "random", data.Arrays(images, labels), 10, torch.tensor([0.5]), torch.tensor([0.29]), ""
    )


def plain(source: data.Dataset, device: torch.device) -> Callable[[int], None]:
    """Dense training as one writes it in PyTorch."""
    model = models.build(ModelSettings(name="lenet300100"), (1, 28, 28), 10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    images, labels = (tensor.to(device) for tensor in source.train)
    mean, deviation = source.mean.to(device), source.deviation.to(device)
    order = torch.randperm(len(labels), device=device).split(BATCH)

    def window(steps: int) -> None:
        nn.Module.train(model)
        for index in order[:steps]:
            x = data.to_input(images[index], mean, deviation, True)
            loss = F.cross_entropy(model(x), labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return window


def ours(name: str, source: data.Dataset, device: torch.device) -> Callable[[int], None]:
    """`trainer.train_epoch` without its validation; updates lie outside the windows."""
    settings = TrialSettings(
        method=name,
        epochs=10**6,
        model=ModelSettings(name="lenet300100"),
        update=UpdateSettings(every=10**9)
        if name in ("set", "sm", "dsr", "rigl")
        else UpdateSettings(),
    )
    settings.data.validation = 0.0
    setup = prepare(settings, device, source)
    state = trainer.begin(setup)

    def window(steps: int) -> None:
        nonlocal state
        short = setup._replace(train_index=setup.train_index[: steps * BATCH])
        state, _ = trainer.train_epoch(short, state)

    return window


def update_ms(name: str, source: data.Dataset, device: torch.device, repeats: int) -> list[float]:
    setup = prepare(
        TrialSettings(method=name, model=ModelSettings(name="lenet300100")), device, source
    )
    state = trainer.begin(setup)
    grads: dict[str, Tensor] = {k: torch.randn_like(p) for k, p in state.params.items()}
    momenta = optim.momentum_of(setup.settings.optimizer, state.moments) | grads
    progress = torch.tensor(0.3, dtype=torch.float64, device=device)
    times = []
    for number in range(repeats):
        began = seconds(device)
        update_layers(
            setup.method,
            state.params,
            state.masks,
            momenta,
            grads,
            state.method,
            setup.variant,
            setup.hp,
            progress,
            update_keys(state.masks, 0, number),
            alone=True,
        )
        times.append(1e3 * (seconds(device) - began))
    return times


def seconds(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


# What runs in another checkout, whose script has these names.
SERVE = """
torch.set_num_threads(1)
keep_freed_memory()
device, source, windows = torch.device(options.device), dataset(), {}
while (message := connection.recv()) is not None:
    kind, name = message
    if kind == "update":
        connection.send(update_ms(name, source, device, 2)[1] / 1e3)
        continue
    if name not in windows:
        windows[name] = ours(name, source, device)
        windows[name](options.steps)
    began = seconds(device)
    windows[name](options.steps)
    connection.send((seconds(device) - began) / options.steps)
"""


def compare(options: argparse.Namespace, windows: dict[str, Callable[[int], None]]) -> None:
    """Prints the step and update times of this checkout, and how much faster they are."""
    device, source = torch.device(options.device), dataset()
    connection = against.start(options.against, "bench_step", SERVE, options)

    def there(kind: str, name: str) -> float:
        connection.send((kind, name))
        return float(connection.recv())

    def here(kind: str, name: str) -> float:
        if kind == "update":
            return update_ms(name, source, device, 2)[1] / 1e3
        began = seconds(device)
        windows[name](options.steps)
        return (seconds(device) - began) / options.steps

    variants = [("step", name) for name in windows] + [("update", name) for name in UPDATES]
    times: dict[tuple[str, str], list[float]] = {variant: [] for variant in variants}
    ratios: dict[tuple[str, str], list[float]] = {variant: [] for variant in variants}
    for repeat in range(options.repeats + 1):
        for variant in variants:
            before, own, after = there(*variant), here(*variant), there(*variant)
            if repeat:  # the first warms up
                times[variant].append(1e3 * own)
                ratios[variant].append((before + after) / 2 / own)
    connection.send(None)
    print(f"{options.repeats} repeats, interleaved with {options.against}; medians")
    print(f"{'variant':14} {'ms':>10} {'ratio':>6} {'range':>12}")
    for variant in variants:
        faster = ratios[variant]
        print(
            f"{' '.join(variant):14} {statistics.median(times[variant]):10.2f} "
            f"{statistics.median(faster):6.2f} {min(faster):6.2f}-{max(faster):5.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--against", default="", help="folder of another checkout to compare with")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as trials do, here for every variant, the plain one too
    device, source = torch.device(options.device), dataset()
    windows = {name: ours(name, source, device) for name in ("dense", *STEP)}
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    print(f"{hardware}; torch {torch.__version__}; batch {BATCH}, density 0.1, 1 thread")
    if options.against:
        compare(options, windows)
        return
    windows = {"plain PyTorch": plain(source, device)} | windows
    times: dict[str, list[float]] = {name: [] for name in windows}
    for repeat in range(options.repeats + 1):
        for name, window in windows.items():
            began = seconds(device)
            window(options.steps)
            took = seconds(device) - began
            if repeat:  # the first warms up
                times[name].append(took / options.steps)
    base = times["plain PyTorch"]
    print(f"{options.repeats} repeats of {options.steps} steps, interleaved; median of the ratios")
    print(f"{'variant':14} {'ms/step':>8} {'ratio':>7} {'range':>13} {'at most':>8}")
    for name, per_step in times.items():
        ratios = [a / b for a, b in zip(per_step, base, strict=True)]
        bound = f"{STEP[name]:.2f}" if name in STEP else "-"
        print(
            f"{name:14} {1e3 * statistics.median(per_step):8.2f} {statistics.median(ratios):7.2f} "
            f"{min(ratios):6.2f}-{max(ratios):5.2f} {bound:>8}"
        )
    print(f"{'update':14} {'ms':>8} {'best':>7} {'at most':>21}")
    for name in UPDATES:
        updates = update_ms(name, source, device, 2 * options.repeats)[1:]
        bound = f"{UPDATE_MS[name]:.0f}" if name in UPDATE_MS else "-"
        print(f"{name:14} {statistics.median(updates):8.1f} {min(updates):7.1f} {bound:>21}")


if __name__ == "__main__":
    main()
