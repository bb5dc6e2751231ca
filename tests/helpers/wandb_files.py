"""Reads what the W&B client wrote to disk, with W&B's own inspector: not with our reader."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.util import get_core_path


@dataclass
class Run:
    """A run, merged over its files in the order in which they were begun."""

    id: str
    group: str = ""
    job_type: str = ""
    name: str = ""
    project: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)  # rows; the step is `_step`
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None  # of the last file; None: it was never finished
    files: list[Path] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.history]


def read_runs(folder: Path) -> list[Run]:
    """The runs below `folder` (where `wandb/` is), ordered by id."""
    runs: dict[str, Run] = {}
    for file in sorted(folder.glob("wandb/*run-2*/run-*.wandb"), key=begun):
        read_file(file, runs)
    return [runs[key] for key in sorted(runs)]


def begun(file: Path) -> str:
    times = [record["run"]["start_time"] for record in records(file) if record["type"] == "run"]
    return times[0] if times else ""


def records(file: Path) -> list[dict[str, Any]]:
    """The whole records of a `.wandb` file; a torn end is left out."""
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file"]
    if file.stat().st_size <= 7:  # the file's own header: nothing was written
        return []
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 or "incomplete" in done.stderr, done
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def read_file(file: Path, runs: dict[str, Run]) -> None:
    run = None
    for record in records(file):
        content = record.get(record["type"]) or {}
        if record["type"] == "run":
            run = runs.setdefault(content["run_id"], Run(content["run_id"]))
            run.group, run.job_type = content.get("run_group", ""), content.get("job_type", "")
            run.name, run.project = content.get("display_name", ""), content.get("project", "")
            run.tags, run.exit_code = content.get("tags", []), None
            run.files.append(file)
            update = content.get("config", {}).get("update", {})
            run.config |= {key: value for key, value in update.items() if key != "_wandb"}
        elif run is not None and record["type"] == "history":
            run.history.append(content["item"])
        elif run is not None and record["type"] == "summary":
            run.summary |= content.get("update", {})
        elif run is not None and record["type"] == "exit":
            run.exit_code = content.get("exit_code", 0)
