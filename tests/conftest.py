"""Which tests stay together where several processes run them (`-n 2`).

Those of a file with a fixture of its module do, as in `--dist loadfile`; all others are handed out
one by one, or a file of many minutes would be one process's, while another one waits. (With marks
for `--dist loadgroup`, xdist 3.8.0 does nothing under pytest 9.2.)
"""

from __future__ import annotations

import functools
from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    @functools.cache
    def shares(file: str) -> bool:
        return 'scope="module"' in (config.rootpath / file).read_text()

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if shares(file) else nodeid

    return Scheduling(config, log)
