"""Another checkout's benchmark in a process of its own, for `--against FOLDER`.

The rule to know: what is compared is the other checkout's package under its own script, so that no
path inside it matters, only the few names of the script that the code asked for uses.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

BEGIN = """
import sys
from multiprocessing.connection import Connection
import sparsetune
connection = Connection(int(sys.argv[1]))
connection.send(sparsetune.__file__)
from {script} import *
options = connection.recv()
"""


def start(folder: str, script: str, code: str, options: argparse.Namespace) -> Connection:
    """A process that has all names of the script, `options`, and a `connection` to what is
    returned, and runs `code`. It ends with the connection."""
    checkout = Path(folder).resolve()
    ours, theirs = Pipe()
    subprocess.Popen(
        [sys.executable, "-c", BEGIN.format(script=script) + code, str(theirs.fileno())],
        cwd=checkout / "scripts",
        env=os.environ | {"PYTHONPATH": str(checkout)},
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    package = Path(ours.recv())
    if not package.is_relative_to(checkout):
        raise SystemExit(f"--against: {checkout} is no checkout, {package} was imported")
    ours.send(options)
    return ours
