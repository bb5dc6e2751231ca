"""A Ray cluster of several node processes on this machine, in a process and network namespace.

`run` runs a script in the namespaces, `enter` goes there; the script may `import local_cluster` and
start nodes, and whatever it started ends with it. The nodes have addresses of their own on the
loopback interface, and see the same files.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import processes

PACKAGE = str(Path(__file__).parents[2])
HEAD = "127.0.0.1"
PORT, DASHBOARD = 6379, 8265
INSIDE = """
import runpy, subprocess, sys

subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
del sys.argv[0]
sys.path.insert(0, {tests!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def permitted() -> bool:
    """May this user make namespaces here?"""
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(
            [*_unshare(), "ip", "link", "set", "lo", "up"], capture_output=True
        ).returncode
    )


def _unshare() -> list[str]:
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", *user, "--pid", "--fork", "--net", "--mount-proc", "--kill-child"]


def run(script: Path, *words: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs the script in namespaces of its own; all that it started is gone afterwards."""
    command = _inside(script, *words)
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def enter(script: Path, *words: str) -> None:
    """Becomes the script in namespaces of its own."""
    command = _inside(script, *words)
    os.execvp(command[0], command)


def _inside(script: Path, *words: str) -> list[str]:
    python = [sys.executable, "-c", INSIDE.format(tests=str(Path(__file__).parents[1]))]
    return [*_unshare(), *python, str(script), *words]


def wait_for(what: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((HEAD, port), timeout=1).close()
        return True
    return False


class LocalCluster:
    """Nodes are trees of processes; to the others, `kill_node` is what a power cut would be."""

    def __init__(self, folder: Path, cpus: int = 1) -> None:
        """The head has no CPU for engines. `folder` gets logs; what is there is seen by all."""
        self.folder, self.cpus = folder, cpus
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        # Short, because names of sockets are below it.
        self._scratch = Path(tempfile.mkdtemp(prefix="ray-"))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY", "WANDB"))}
        self.env = kept | {
            "HOME": str(self._scratch),  # of no interest to what is under the user's
            "PYTHONPATH": os.pathsep.join(filter(None, [PACKAGE, kept.get("PYTHONPATH")])),
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": str(self._scratch),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def start_head(self) -> None:
        options = ["--head", f"--port={PORT}", f"--dashboard-port={DASHBOARD}", "--num-cpus=0"]
        self._start(HEAD, [*options, f"--dashboard-host={HEAD}"])
        wait_for(lambda: _answers(DASHBOARD))

    def add_node(self, hidden: Path | None = None, **env: str) -> str:
        """Starts a node and returns its address; `wait_for_nodes` waits until it has joined.

        It does not see what is in the `hidden` folder, and `env` is in its environment.
        """
        number = len(self.nodes) + 1
        address = f"127.0.0.{number}"
        agent = f"--dashboard-agent-listen-port={52365 + number}"
        options = [f"--address={HEAD}:{PORT}", f"--num-cpus={self.cpus}", agent]
        self._start(address, options, hidden, env)
        return address

    def wait_for_nodes(self) -> None:
        logs = [self.folder / f"node-{address}" for address in self.nodes]
        wait_for(lambda: all(b"Ray runtime started" in log.read_bytes() for log in logs))

    def kill_node(self, address: str) -> None:
        for pid in (node := self.nodes[address].pid, *processes.below(node)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.nodes[address].wait()

    def submit(self, *words: str, **env_vars: str) -> subprocess.Popen[bytes]:
        """`ray job submit`; its output, with the job's, goes to the folder's `job`."""
        given = json.dumps({"env_vars": env_vars})
        submit = [*RAY, "job", "submit", f"--address=http://{HEAD}:{DASHBOARD}"]
        return self._popen("job", [*submit, f"--runtime-env-json={given}", "--", *words])

    def output(self) -> str:
        """Of all jobs so far."""
        file = self.folder / "job"
        return file.read_text() if file.exists() else ""

    def processes(self, title: str = "ray::Engine") -> dict[str, int]:
        """How many processes of Ray with such a title there are on each node that has one."""
        known = processes.living()
        found: Counter[str] = Counter()
        for process in known.values():
            raylet = known[process.parent].title if process.parent in known else ""
            if process.title.startswith(title) and "raylet" in raylet:
                found[raylet.partition("--node_ip_address=")[2].partition("\0")[0]] += 1
        return dict(found)

    def _start(
        self, address: str, options: list[str], hidden: Path | None = None, env: Any = None
    ) -> None:
        temp = self._scratch / address
        common = [f"--node-ip-address={address}", f"--temp-dir={temp}", "--block"]
        memory = ["--object-store-memory=100000000", "--disable-usage-stats"]
        command = [*RAY, "start", *options, *common, *memory]
        if hidden is not None:
            mount = 'mount -t tmpfs none "$0" && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", mount, str(hidden), *command]
        self.nodes[address] = self._popen(f"node-{address}", command, env)

    def _popen(self, name: str, command: list[str], env: Any = None) -> subprocess.Popen[bytes]:
        with (self.folder / name).open("ab") as output:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.env | (env or {}),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> LocalCluster:
        self.start_head()
        return self

    def __exit__(self, *_: Any) -> None:
        for address, process in self.nodes.items():
            if process.poll() is None:
                self.kill_node(address)
        shutil.rmtree(self._scratch, ignore_errors=True)
