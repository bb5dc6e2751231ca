"""The launch files of clusters: what Slurm sees of the one, and schemas for the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

FOLDER = Path(__file__).parents[2] / "scripts/cluster"
RECORD = Path(__file__).with_name("slurm_record.txt")
# Each writes its name and words into one file; srun runs its command once for each node.
STUBS = {
    "scontrol": 'echo "scontrol $*" >> "$RECORD"; [ "$1" != show ] || printf "n1\\nn2\\n"',
    "getent": 'echo "10.0.0.1 STREAM $2"',
    "od": "echo 0123abcd",
    "srun": (
        'echo "srun ${*//$HOME/HOME}" >> "$RECORD"; while [ "$1" != bash ]; do shift; done\n'
        'SLURM_NODEID=0 "$@"; SLURM_NODEID=1 SLURM_GPUS_ON_NODE=4 "$@"; exec sleep 60'
    ),
    "ray": '[ "$1" = status ] || echo "ray $*" >> "$RECORD"',
    "sparsetune": (
        'count() { grep -c "^$1" "$RECORD"; }\n'  # of lines; both nodes have started
        'until [ "$(count "ray start")" = $((2 * $(count "scontrol show"))) ]; do sleep 0.1; done\n'
        'echo "sparsetune ${*//$HOME/HOME} $RAY_AUTH_MODE=$RAY_AUTH_TOKEN" >> "$RECORD"\n'
        'trap "echo sparsetune was told to end >> $RECORD; exit 130" USR1\n'
        'if [ "$1" = sweep ]; then while :; do sleep 0.05; done; fi'
    ),
}


def slurm(home: Path, told: bool) -> int:
    """Runs the batch script as slurmd would; `told`: the signal that comes before the time is up.

    Its exit status. What it called is in `record` in the folder.
    """
    programs = home / "sparsetune/.venv/bin"
    programs.mkdir(parents=True, exist_ok=True)
    for name, text in STUBS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    record = home / "record"
    env = os.environ | {
        "HOME": str(home), "RECORD": str(record), "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8",
        "PATH": f"{programs}:{os.environ['PATH']}",
    }  # fmt: skip
    job = subprocess.Popen(["bash", str(FOLDER / "slurm.sh")], env=env)
    deadline = time.monotonic() + 30
    while told and not (record.exists() and "\nsparsetune sweep" in record.read_text()):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    if told:
        time.sleep(0.2)  # until the stub has its trap
        job.send_signal(signal.SIGUSR1)
    return job.wait(30)


def test_slurm_runs_a_sweep_comes_again_and_resumes_it(tmp_path: Path) -> None:
    assert slurm(tmp_path, told=True) == 130
    (tmp_path / "sweeps/mnist").mkdir(parents=True)
    assert slurm(tmp_path, told=False) == 0
    options = [
        line for line in (FOLDER / "slurm.sh").read_text().splitlines() if line[:7] == "#SBATCH"
    ]
    seen = "\n".join(options) + "\n" + (tmp_path / "record").read_text()
    assert seen == RECORD.read_text()


@pytest.mark.parametrize("name", ["ray-aws", "ray-gcp"])
def test_ray_up_files_fit_rays_schema(name: str) -> None:
    schema = json.loads(
        Path(ray.__file__).with_name("autoscaler").joinpath("ray-schema.json").read_text()
    )
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    jsonschema.validate(config, schema)
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert config["max_workers"] >= sum(each.get("min_workers", 0) for each in types.values())


def test_a_rayjob_is_what_the_operator_reads() -> None:
    """By hand: the operator's schema is in no package, so this checks what its pages document."""
    job = yaml.safe_load((FOLDER / "kuberay-rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert all(isinstance(value, str) for value in job["metadata"]["annotations"].values())
    spec = job["spec"]
    assert set(spec) <= {
        "entrypoint", "submissionMode", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
        "backoffLimit", "runtimeEnvYAML", "activeDeadlineSeconds", "rayClusterSpec",
    }  # fmt: skip
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    cluster = spec["rayClusterSpec"]
    assert set(cluster) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["rayVersion"] == ray.__version__
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    [workers] = cluster["workerGroupSpecs"]
    assert set(workers) == {
        "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"
    }  # fmt: skip
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (cluster["headGroupSpec"], workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod: dict[str, Any] = group["template"]["spec"]
        [container] = pod["containers"]
        assert container["image"] == job["metadata"]["annotations"]["sparsetune/image"]
        sizes = container["resources"]
        assert sizes["requests"] == sizes["limits"]
        assert all(isinstance(value, str) for value in sizes["limits"].values())
        [mount], [volume] = container["volumeMounts"], pod["volumes"]
        assert mount["name"] == volume["name"]
        assert spec["entrypoint"].count(mount["mountPath"] + "/") == 3


@pytest.mark.parametrize("file", sorted(FOLDER.iterdir()), ids=lambda file: file.name)
def test_a_launch_file_has_one_block_to_edit(file: Path) -> None:
    text = file.read_text()
    assert text.count("---- Edit this block") == 1
    assert text.index("---- Edit this block") < text.index("---- The rest can stay")
