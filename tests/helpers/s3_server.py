"""An S3 server process for tests: moto, in the environment that `setup_moto` makes.

It listens on the loopback interface and ends when whoever started it closes its input or dies.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
BUCKET = "sweeps"


def find() -> Path | None:
    """Python of the environment that has moto."""
    given = os.environ.get("SPARSETUNE_MOTO_PYTHON")
    found = Path(given) if given else Path(__file__).parents[2] / ".venv-moto/bin/python"
    return found if found.exists() else None


def python() -> Path:
    """The same; skips the test where there is none."""
    if not (found := find()):
        pytest.skip("no S3 server: `. scripts/setup.sh; setup_moto` makes .venv-moto")
    return found


class S3Server:
    """One bucket, `BUCKET`; `environment` is what its clients need."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [python(), "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.endpoint = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self) -> None:
        from pyarrow import fs

        client = fs.S3FileSystem(
            endpoint_override=self.endpoint, region="us-east-1", allow_bucket_creation=True,
            access_key="test", secret_key="test",
        )  # fmt: skip
        client.create_dir(BUCKET)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
