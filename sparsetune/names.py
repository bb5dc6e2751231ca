"""Names that a user writes: objects by import path, and the message for a name nobody knows."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def import_object(path: str, key: str) -> Any:
    """The object that `package.module:name` names; the working directory is searched first.

    ValueError, opening with the setting's `key`, when there is no such module or name, or when
    importing the module fails.
    """
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *name.split("."))):
        raise ValueError(f"{key}: {path!r} is no import path; write package.module:name")
    search_here()
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ValueError(
            f"{key}: module {module_name!r} cannot be imported: {error}; "
            "install it, or run from the folder that holds it"
        ) from error
    except (Exception, SystemExit) as error:
        raise _their_error(f"{key}: importing module {module_name!r}", error) from error
    if not hasattr(module, name):
        public = [public for public in vars(module) if not public.startswith("_")]
        raise ValueError(f"{key}: module {module_name!r} has no {name!r}{suggestion(name, public)}")
    return getattr(module, name)


def search_here() -> None:
    """A console script, unlike `python -m`, does not search the working directory by itself."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def work_in(folder: str) -> None:
    """Makes relative paths and users' modules mean what they mean in `folder`, if it is there."""
    if Path(folder).is_dir():
        os.chdir(folder)
    sys.path.append(folder)


@contextmanager
def users_code(doing: str) -> Iterator[None]:
    """Makes of whatever a user's code raises within a ValueError that opens with `doing`."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise _their_error(doing, error) from error


def _their_error(doing: str, error: BaseException) -> ValueError:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return ValueError(
        f"{doing} raised {type(error).__name__}: {text} ({where.filename}:{where.lineno})"
    )


def suggestion(value: str, known: Iterable[str]) -> str:
    """ "; did you mean 'mnist'?", or nothing when no known name is close to `value`."""
    close = difflib.get_close_matches(value, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
