"""The code that results depend on besides the settings: a user's modules, and a method's own.

The rule to know: nothing is imported or run here. A module's imports are followed as far as its own
folder has them (of an installed one: its package), which leaves out the standard library and what
is installed. Comments and blank lines may change, whatever else differs is a change.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sparsetune.names import search_here

LONGEST = 100_000  # characters; of a longer text the hash alone is kept
SHOWN = 40  # lines of a diff
PACKAGE = "sparsetune"
HASHED = "sha256 "


def users(paths: Iterable[str]) -> dict[str, str]:
    """File -> its text, of the modules in `package.module:name` paths and of what they import."""
    texts: dict[str, str] = {}
    for path in paths:
        module, colon, _ = path.partition(":")
        if colon:
            texts |= _texts(module, f"{module.partition('.')[0]}." if _installed(module) else "")
    return {file: text if len(text) <= LONGEST else _hashed(text) for file, text in texts.items()}


def of_method(name: str) -> dict[str, str]:
    """File -> hash of its text, of our modules that hold the rule of a method, unless it is a
    user's, and apply it."""
    package = f"{PACKAGE}.methods."
    texts = {} if ":" in name else _texts(package + name, package)
    texts |= _texts(f"{package}update", package)
    return {file: _hashed(text) for file, text in texts.items()}


def changes(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs, line by line where the old text is known; "" where nothing does."""
    lines: list[str] = []
    for file in sorted({*then, *now}):
        old, new = then.get(file), now.get(file)
        if old is None or new is None:
            lines.append(f"{file} is {'new' if old is None else 'not there any more'}")
        elif old.startswith(HASHED) or new.startswith(HASHED):
            hashes = (text if text.startswith(HASHED) else _hashed(text) for text in (old, new))
            if len(set(hashes)) > 1:
                lines.append(f"{file} differs")
        elif not _equal(old, new):
            texts = old.splitlines(), new.splitlines()
            lines += difflib.unified_diff(*texts, f"{file} then", f"{file} now", lineterm="", n=1)
    more = [f"... and {len(lines) - SHOWN} lines more"] if len(lines) > SHOWN else []
    return "\n".join(lines[:SHOWN] + more)


def _equal(old: str, new: str) -> bool:
    try:
        return old == new or ast.dump(ast.parse(old)) == ast.dump(ast.parse(new))
    except SyntaxError:
        return False


def _hashed(text: str) -> str:
    return HASHED + hashlib.sha256(text.encode()).hexdigest()


def _folder(module: str) -> Path | None:
    """The folder that holds the module's package, or the module itself."""
    search_here()
    spec = importlib.util.find_spec(module.partition(".")[0])
    if spec is None:
        return None
    inside = list(spec.submodule_search_locations or [])
    place = inside[0] if inside else spec.origin
    return Path(place).resolve().parent if place else None


def _installed(module: str) -> bool:
    folder = _folder(module)
    return folder is not None and folder.name in ("site-packages", "dist-packages")


def _texts(module: str, within: str) -> dict[str, str]:
    """File below the module's folder -> text, of it and of the modules that begin with `within`."""
    folder = _folder(module)
    texts: dict[str, str] = {}
    waiting, seen = [module], set()
    while folder is not None and waiting:
        name = waiting.pop()
        # Whoever works in a clone of this repository finds our own package beside their module.
        ours = not within and name.partition(".")[0] == PACKAGE
        if name in seen or ours or not (name == module or name.startswith(within)):
            continue
        seen.add(name)
        place = folder.joinpath(*name.split("."))
        file = place / "__init__.py"
        file = file if file.exists() else place.with_suffix(".py")
        if not file.exists():
            continue
        text = file.read_text(errors="replace")
        texts[file.relative_to(folder).as_posix()] = text
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        waiting += filter(None, [package, *_imported(text, package)])
    return texts


def _imported(text: str, package: str) -> Iterator[str]:
    """Names of all modules that the text may import, wherever in it."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -node.level + 1 or None] if node.level else []
            base = ".".join([*filter(None, above), *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names)
