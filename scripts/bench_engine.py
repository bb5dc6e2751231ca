"""Trials trained together against trials trained one by one: trial-epochs per second, interleaved.

`python scripts/bench_engine.py [--data FOLDER] [--slots 16 32] [--density 0.1 0.05 0.02]
[--groups 1] [--method set] [--model lenet300100] [--repeats 5] [--limit 0]`: MNIST (FOLDER holds
its parquet files; without it random images of that shape), batch 128, SGD with momentum and weight
decay, another learning rate in each slot.

Two processes of one thread each, which stand for the two cores of a small machine, train whole
epochs at the same time, with topology updates and validation: first a solo trial each
(`trainer.train_epoch`), then, in turn, a pool of each backend with so many slots each. The ratio is
that of trial-epochs per second within one repeat; its median and range are printed. Needs torch
and this repository alone.

`--against FOLDER`, another checkout: its trial-epochs per second before and after ours, variant by
variant, and how many times as fast ours are.

On a GPU: `--device cuda --processes 1 --beside 10 --backends stacked --slots 1 64 512`. A pool of
one slot is solo with CUDA graphs; `--beside` adds so many solo trainers side by side.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import against
import torch

from sparsetune.engine.pool import Backend, choose
from sparsetune.machine import processor
from sparsetune.settings import DataSettings, ModelSettings, OptimizerSettings, TrialSettings
from sparsetune.training import data
from sparsetune.training.setup import keep_freed_memory, prepare

BACKENDS = ("solo", "csr", "stacked")
AIM = {("csr", 0.1): (3.5, 4.5), ("csr", 0.05): (5.5, 7.0), ("csr", 0.02): (9.0, 12.0)}


class Variant(NamedTuple):
    backend: str
    slots: int
    density: float
    processes: int


def dataset(options: argparse.Namespace) -> data.Dataset:
    if options.data:
        settings = DataSettings(name="mnist", path=options.data, limit=options.limit)
        return data.load(settings)
    generator = torch.Generator().manual_seed(0)
    shape = (options.limit or 60_000, 1, 28, 28)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, shape[:1], generator=generator)
    mean, deviation = torch.tensor([0.5]), torch.tensor([0.29])
    return data.Dataset("random", data.Arrays(images, labels), 10, mean, deviation, "")


def filled(variant: Variant, options: argparse.Namespace, source: data.Dataset) -> Backend:
    """The backend with all slots taken; a trial's order seed says which group it is in."""
    setups = []
    for slot in range(variant.slots):
        settings = TrialSettings(
            method=options.method,
            density=variant.density,
            epochs=10**4,
            order_seed=slot % options.groups,
            model=ModelSettings(name=options.model),
            optimizer=OptimizerSettings(lr=0.05 + 0.001 * slot),
        )
        setups.append(prepare(settings, torch.device(options.device), source))
    backend = choose(variant.backend, setups[0]).make(variant.slots)
    for slot, setup in enumerate(setups):
        backend.attach(slot, setup, None)
    return backend


def serve(connection: Connection, options: argparse.Namespace) -> None:
    """A process that trains one epoch of the variant it is asked for, and says how long it took."""
    torch.set_num_threads(1)
    keep_freed_memory()
    source = dataset(options)
    pools: dict[Variant, Backend] = {}
    while (variant := connection.recv()) is not None:
        if variant not in pools:
            pools[variant] = filled(variant, options, source)
            pools[variant].advance()  # warms up
        connection.send("ready")
        connection.recv()
        began = time.perf_counter()
        pools[variant].advance()
        connection.send(time.perf_counter() - began)


# Here and in another checkout, whose script has these names. On a CPU the clock is the process's
# CPU time (one thread), which other programs on the machine disturb less than wall time.
SERVE = """
import time
if options.device == "cpu":
    time.perf_counter = time.process_time
serve(connection, options)
"""


def trial_epochs_per_second(everybody: list[Connection], variant: Variant) -> float:
    connections = everybody[: variant.processes]
    for connection in connections:
        connection.send(variant)
    for connection in connections:
        connection.recv()
    for connection in connections:
        connection.send("go")
    return sum(variant.slots / connection.recv() for connection in connections)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="", help="folder of MNIST's parquet files")
    parser.add_argument("--backends", nargs="+", default=["csr"], choices=BACKENDS)
    parser.add_argument("--slots", nargs="+", type=int, default=[16, 32], help="of each process")
    parser.add_argument("--density", nargs="+", type=float, default=[0.1, 0.05, 0.02])
    parser.add_argument("--groups", type=int, default=1, help="orders of batches in a pool")
    parser.add_argument("--method", default="set")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=int, default=0, help="training images; 0: all")
    parser.add_argument("--model", default="lenet300100", choices=["lenet300100", "lenet5"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--beside", type=int, default=0, help="solo trainers to compare with, too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--against", default="", help="folder of another checkout to compare with")
    options = parser.parse_args()
    options.data = options.data and str(Path(options.data).resolve())

    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    others: list[Connection] = []
    for _ in range(max(options.processes, options.beside)):
        if options.against:
            here = str(Path(__file__).parents[1])
            connections.append(against.start(here, "bench_engine", SERVE, options))
            others.append(against.start(options.against, "bench_engine", SERVE, options))
            continue
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, options), daemon=True))
        processes[-1].start()
        connections.append(ours)
    rates: dict[Variant, list[float]] = {}
    ratios: dict[Variant, list[float]] = {}
    for _ in range(options.repeats):
        for density in options.density:
            solo = Variant("solo", 1, density, options.processes)
            packed = [
                Variant(b, slots, density, options.processes)
                for b in options.backends
                for slots in options.slots
            ]
            if options.beside:
                packed.append(Variant("solo", 1, density, options.beside))
            if others:
                for variant in (solo, *packed):
                    before = trial_epochs_per_second(others, variant)
                    rate = trial_epochs_per_second(connections, variant)
                    after = trial_epochs_per_second(others, variant)
                    ratios.setdefault(variant, []).append(rate / ((before + after) / 2))
                    rates.setdefault(variant, []).append(rate)
                continue
            base = trial_epochs_per_second(connections, solo)
            rates.setdefault(solo, []).append(base)
            for variant in packed:
                rate = trial_epochs_per_second(connections, variant)
                # The machine's speed drifts: solo before and after.
                after = trial_epochs_per_second(connections, solo)
                ratios.setdefault(variant, []).append(rate / ((base + after) / 2))
                rates.setdefault(variant, []).append(rate)
                base = after
    for connection in (*connections, *others):
        connection.send(None)
    for process in processes:
        process.join()

    images = f"{options.limit or 60_000} images{'' if options.data else ' (random)'}"
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else processor()
    print(f"{where}, {os.cpu_count()} cores; torch {torch.__version__}")
    print(
        f"{options.model}, {images} less a tenth held out, batch 128, {options.method}; "
        f"{options.groups} group(s) of batches; median of {options.repeats} repeats"
    )
    print(
        f"{'backend':8} {'processes':>9} {'slots':>5} {'density':>7} {'trial-epochs/s':>14} "
        f"{'ratio':>6} {'range':>13}"
        + (f" (to {options.against})" if others else f" {'at least':>8} {'aim':>5}")
    )
    for variant in sorted(rates, key=lambda v: (-v.density, v.processes, v.slots)):
        line = (
            f"{variant.backend:8} {variant.processes:9} {variant.slots:5} {variant.density:7g} "
            f"{statistics.median(rates[variant]):14.2f}"
        )
        if variant in ratios:
            measured = ratios[variant]
            line += f" {statistics.median(measured):6.2f} {min(measured):6.2f}-{max(measured):6.2f}"
            if not others:
                least, aim = AIM.get((variant.backend, variant.density), ("-", "-"))
                line += f" {least:>8} {aim:>5}"
        print(line)


if __name__ == "__main__":
    main()
