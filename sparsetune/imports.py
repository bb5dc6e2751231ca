"""Names that a user writes: objects by import path, and the message for a name nobody knows."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def import_object(path: str, key: str) -> Any:
    """The object that `package.module:name` names; the working directory is searched first.

    ValueError, opening with the setting's `key`, when the module or the name does not exist.
    An error inside the module itself is the user's bug and comes out as it is.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(f"{key}: {path!r} is no import path; write package.module:name")
    # A console script, unlike `python -m`, does not search the working directory.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ValueError(
            f"{key}: module {module_name!r} cannot be imported: {error}; "
            "install it, or run from the folder that holds it"
        ) from error
    if not hasattr(module, name):
        public = [public for public in vars(module) if not public.startswith("_")]
        raise ValueError(f"{key}: module {module_name!r} has no {name!r}{suggestion(name, public)}")
    return getattr(module, name)


def suggestion(value: str, known: Iterable[str]) -> str:
    """ "; did you mean 'mnist'?", or nothing when no known name is close to `value`."""
    close = difflib.get_close_matches(value, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
