"""A sweep of SET as one writes it by hand with Ray Tune, for `bench_sweep.py` to compare with.

`python scripts/plain_tune.py --data FOLDER [--trials 64] [--seed 0]`. One process per trial, masked
nn.Linear layers, a DataLoader over PIL images, OptunaSearch, ASHAScheduler, WandbLoggerCallback
(offline), both cores busy. It searches what `search_spaces/set.yaml` searches and trains the same
network on the same split by the same rules; prints the best validation accuracy as its last line.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

DENSITY, EPOCHS, BATCH = 0.05, 8, 128


class Mnist(Dataset[tuple[Tensor, int]]):
    """Images as PIL, one at a time, as torchvision's class gives them to its transforms."""

    def __init__(self, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[index])
        pixels = torch.from_numpy(np.array(image, np.float32)).div_(255)
        return pixels.sub_(0.1307).div_(0.3081), int(self.labels[index])


class MaskedLinear(nn.Linear):
    mask: Tensor

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out)
        mask = torch.zeros(self.weight.numel())
        mask[torch.randperm(len(mask))[: round(DENSITY * len(mask))]] = 1
        self.register_buffer("mask", mask.view_as(self.weight))
        self.weight.data *= self.mask

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)

    @torch.no_grad()
    def evolve(self, zeta: float, normal: bool, momentum: Tensor) -> None:
        """Drops the zeta weakest of each sign, regrows as many at random."""
        weight, mask = self.weight.data.view(-1), self.mask.view(-1)
        weight *= mask
        dropped = 0
        for sign in (1, -1):
            mine = ((weight * sign > 0) & (mask > 0)).nonzero().squeeze(1)
            num = round(zeta * len(mine))
            weakest = mine[weight[mine].abs().argsort()[:num]]
            mask[weakest] = 0
            dropped += num
        weight *= mask
        absent = (mask == 0).nonzero().squeeze(1)
        grown = absent[torch.randperm(len(absent))[:dropped]]
        mask[grown] = 1
        weight[grown] = 0.1 * torch.randn(len(grown)) if normal else 0.0
        momentum.view(-1)[mask == 0] = 0
        momentum.view(-1)[grown] = 0


def trainable(config: dict[str, Any]) -> None:
    from ray import tune

    torch.set_num_threads(1)
    torch.manual_seed(config["seed"])
    arrays = np.load(config["arrays"])
    data = Mnist(arrays["images"], arrays["labels"])
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = len(data) // 10
    train = DataLoader(Subset(data, order[held_out:]), BATCH, shuffle=True, drop_last=True)
    validation = DataLoader(Subset(data, order[:held_out]), 1000)
    layers = [MaskedLinear(784, 300), MaskedLinear(300, 100), MaskedLinear(100, 10)]
    model = nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config["lr"], momentum=0.9, weight_decay=config["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(train))
    for epoch in range(EPOCHS):
        model.train()
        for images, labels in train:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch < EPOCHS - 1:
            share = (1 + np.cos(np.pi * (epoch + 1) / EPOCHS)) / 2
            zeta = config["zeta"] * (share if config["decay"] == "cosine" else 1.0)
            for layer in layers:
                buffer = optimizer.state[layer.weight]["momentum_buffer"]
                layer.evolve(zeta, config["new_value"] == "normal", buffer)
        model.eval()
        with torch.no_grad():
            right = sum(int((model(x).argmax(1) == y).sum()) for x, y in validation)
        tune.report({"accuracy": right / held_out, "epoch": epoch + 1})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with the MNIST parquet files")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import io

    import ray
    from ray import tune
    from ray.air.integrations.wandb import WandbLoggerCallback
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    os.environ["WANDB_MODE"], os.environ["WANDB_SILENT"] = "offline", "true"
    with tempfile.TemporaryDirectory() as folder:
        table = pq.read_table(next(Path(options.data).glob("train*.parquet")))
        cells = (cell["bytes"] for cell in table["image"].to_pylist())
        images = np.stack([np.asarray(Image.open(io.BytesIO(cell))) for cell in cells])
        arrays = Path(folder) / "mnist.npz"
        np.savez(arrays, images=images, labels=table["label"].to_numpy())
        os.environ["WANDB_DIR"] = folder
        ray.init(address="local", include_dashboard=False, log_to_driver=False)
        space = {
            "zeta": tune.uniform(0.05, 0.6),
            "new_value": tune.choice(["normal", "zero"]),
            "decay": tune.choice(["none", "cosine"]),
            "lr": tune.loguniform(0.005, 0.5),
            "weight_decay": tune.loguniform(1e-5, 1e-2),
            "seed": options.seed,
            "arrays": str(arrays),
        }
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="accuracy",
                mode="max",
                num_samples=options.trials,
                max_concurrent_trials=os.cpu_count(),
                search_alg=OptunaSearch(seed=options.seed),
                scheduler=ASHAScheduler(
                    time_attr="epoch", max_t=EPOCHS, grace_period=2, reduction_factor=3
                ),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=folder,
                verbose=0,
                callbacks=[WandbLoggerCallback(project="plain", dir=folder)],
            ),
        )
        results = tuner.fit()
        last = [results[n].metrics or {"epoch": 0} for n in range(len(results))]
        done = [metrics for metrics in last if metrics["epoch"] == EPOCHS]
        epochs = sum(int(metrics["epoch"]) for metrics in last)
        best = max((metrics["accuracy"] for metrics in done), default=float("nan"))
        ray.shutdown()
    print(f"trials {len(results)} errors {results.num_errors} epochs {epochs} best {best:.4f}")


if __name__ == "__main__":
    main()
