"""A method by name or import path, and what is said of what is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsetune.methods import METHODS, Method, find
from sparsetune.space import space
from sparsetune.space.config import trial_settings

MINE = """
from sparsetune.methods.contract import Method

METHOD = Method(name="mine", paper="none", begins="sparse")
TAKEN = METHOD._replace(name="set")
WRONG = METHOD._replace(begins="empty", schedule=3)
LIST = [METHOD]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with a method in a file and one in a package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "foundmine.py").write_text(MINE)
    (tmp_path / "foundpackage/inner").mkdir(parents=True)
    (tmp_path / "foundpackage/inner/rule.py").write_text(MINE)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("found")]:
        del sys.modules[name]


def test_methods_are_found_by_name_and_by_import_path(here: Path) -> None:
    assert all(find(name) is method for name, method in METHODS.items())
    for path in ("foundmine:METHOD", "foundpackage.inner.rule:METHOD"):
        method = find(path)
        assert isinstance(method, Method)
        assert method.name == "mine"
        assert find(path) is method
        assert trial_settings({"method": path}).method == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sett", r"unknown method 'sett'; did you mean 'set'\?; there are: set, dsr, .*:METHOD"),
        (
            "foundmine",
            r"unknown method 'foundmine'; there are: .*give your own as package\.module:",
        ),
        ("", r"unknown method ''; there are"),
        ("foundmine:", r"'foundmine:' is no import path; write package\.module:name"),
        (
            "nowhere:METHOD",
            r"module 'nowhere' cannot be imported: .*run from the folder that holds",
        ),
        ("foundmine:METHODS", r"module 'foundmine' has no 'METHODS'; did you mean 'METHOD'"),
        (
            "foundmine:LIST",
            r"foundmine:LIST is no method: it is a list without name, paper, begins",
        ),
        ("foundmine:Method", r"foundmine:Method is no method: it is a type; write METHOD = Method"),
        (
            "foundmine:WRONG",
            r"foundmine:WRONG is no method: begins: 'empty'; allowed: sparse, dense; schedule: 3;",
        ),
        ("foundmine:TAKEN", r"foundmine:TAKEN is called 'set', as one that comes with sparsetune"),
    ],
)
def test_what_is_no_method_is_refused(here: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^method: {message}"):
        find(name)


def test_a_space_anywhere_names_a_method_of_the_working_directory(
    here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path_factory.mktemp("elsewhere") / "own.yaml"
    file.write_text("method: foundmine:METHOD\nsearch:\n  density: {low: 0.1, high: 0.5}\n")
    one = space.load(str(file))
    assert (one.name, one.method) == ("own", "foundmine:METHOD")
    assert list(one.search)[:1] == ["density"]
    # Whoever only reads what was written of it needs no such module.
    monkeypatch.chdir("/")
    del sys.modules["foundmine"]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(here)])
    assert space.Space.from_dict(one.to_dict()) == one
    with pytest.raises(space.SpaceError, match=r"own\.yaml: module 'foundmine' cannot be imported"):
        space.load(str(file))
