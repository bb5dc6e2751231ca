"""What this machine is, for readers of headers and benchmarks."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path

import torch


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()


def hardware() -> str:
    """Cores, processor and GPUs."""
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return ", ".join([f"{os.cpu_count()} cores, {processor()}", *gpus])


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    known = {"python": sys.version.split()[0]}
    for package in ("sparsetune", "torch", "ray", "optuna", "wandb"):
        with contextlib.suppress(PackageNotFoundError):
            known[package] = version(package)
    return known
