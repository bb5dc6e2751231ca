"""The yaml files of search spaces: the shipped ones by name, a user's by path.

The rule to know: what comes out is checked whole; every message opens with the file, and where the
yaml itself is wrong with the line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf

from sparsetune.names import suggestion
from sparsetune.space.keys import SpaceError
from sparsetune.space.space import BASE, SECTIONS, Space, from_yaml


def folder() -> Path:
    """Where the shipped spaces are: in the installed package, or beside it in the repository."""
    package = Path(__file__).parents[1]
    inside = package / "search_spaces"
    return inside if inside.is_dir() else package.parent / "search_spaces"


def names() -> list[str]:
    """The shipped spaces."""
    return sorted(file.stem for file in folder().glob("*.yaml") if file.stem != "base")


def load(spec: str) -> Space:
    """The space of this name, or in the file at this path. SpaceError for what cannot be."""
    if spec in names():
        path, file = folder() / f"{spec}.yaml", f"search_spaces/{spec}.yaml"
    elif spec.endswith((".yaml", ".yml")) or "/" in spec:
        path, file = Path(spec), spec
        if not path.is_file():
            raise SpaceError(f"{spec}: there is no such file; shipped spaces: {', '.join(names())}")
    else:
        raise SpaceError(
            f"'{spec}' is no search space{suggestion(spec, names())}; "
            f"there are: {', '.join(names())}; or give the path of a yaml file"
        )
    shared = _sections(folder() / "base.yaml", BASE, allowed=("search",))
    return from_yaml(path.stem, file, _sections(path, file), shared)


def _sections(path: Path, file: str, allowed: Sequence[str] = SECTIONS) -> dict[str, Any]:
    """What the file says under each of the words that may stand at its left edge."""
    try:
        sections = OmegaConf.to_container(OmegaConf.load(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise SpaceError(
            f"{file}{line}: no valid yaml: {getattr(error, 'problem', None) or error}; "
            "check indentation, colons and brackets there"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpaceError(f"{file}: cannot be read: {error}") from error
    if not sections:
        raise SpaceError(f"{file}: is empty; it needs at least a line 'method: NAME'")
    if not isinstance(sections, dict) or all(value is None for value in sections.values()):
        raise SpaceError(f"{file}: holds no 'key: value' lines; it needs {', '.join(allowed)}")
    for name in map(str, sections):
        if name not in allowed:
            near = suggestion(name, allowed)
            raise SpaceError(f"{file}: unknown '{name}'{near}; allowed: {', '.join(allowed)}")
    return {str(name): value for name, value in sections.items()}
