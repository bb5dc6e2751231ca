"""The words of a command line: names and `key=value`, taken apart and put together.

The rule to know: Python's arguments become words, too. So there is one way into the package, and
what stands in a journal can be typed again, wherever a sweep was started from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from sparsetune.space import config


def split(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """The words that are names, and the others, which are settings."""
    words = list(words)
    names = [word for word in words if "=" not in word and not word.startswith(("+", "~"))]
    return names, [word for word in words if word not in names]


def named(words: Iterable[str], allowed: Collection[str] | None = ()) -> tuple[str, dict[str, Any]]:
    """("mnist/set@0.05" or "", {key: value}) of a command that takes one name and these keys.

    Besides `name` and `storage`, which always comes out, as a folder; None allows all keys.
    """
    names, settings = split(words)
    values = config.parse_words(settings)
    if allowed is not None:
        allowed = sorted({*allowed, "name", "storage"})
        for key in values:
            if key not in allowed:
                raise ValueError(f"{key}: not a key of this command; allowed: {', '.join(allowed)}")
    names += [values.pop("name")] if "name" in values else []
    if len(names) > 1:
        raise ValueError(f"name: give one, not {len(names)}: {' '.join(names)}")
    if names:
        config.check_name(names[0].partition("/")[0])
    return "".join(names), values | {"storage": storage_folder(values.get("storage"))}


def storage_folder(storage: str | Path | None) -> Path:
    """The folder or s3:// prefix that holds the sweeps; None: as a command without storage=."""
    settings = config.build({} if storage is None else {"storage": str(storage)})
    return config.storage_folder(settings.storage)


def said(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a caller gave, where None says nothing."""
    return {key: value for key, value in settings.items() if value is not None}


def as_words(*names: str | Path, **settings: Any) -> list[str]:
    """["set", "name=a", "optimizer.lr=0.1"] of ("set", name="a", optimizer={"lr": 0.1}).

    Settings may be nested or dotted, `**{"search.zeta.low": 0.1}`.
    """
    values = config.flatten(settings)
    values |= dict(_ranges("search", values.pop("search", None) or {}))
    words = [
        f"{key}={_text(key, value)}"
        for key, value in values.items()
        if value is not None or not _is_text(key)  # where text is asked for, None says nothing
    ]
    named = [str(Path(name).expanduser()) if "/" in str(name) else str(name) for name in names]
    for name in named:
        if "=" in name:
            raise ValueError(f"'{name}' reads as a setting; a space's path must be without '='")
    return named + words


def _ranges(key: str, words: Any) -> Iterator[tuple[str, Any]]:
    """("search.zeta.low", 0.1) and so on, of mappings in mappings or dotted keys."""
    if not isinstance(words, Mapping):
        yield key, words
        return
    for word, value in words.items():
        yield from _ranges(f"{key}.{word}", value)


def _text(key: str, value: Any) -> str:
    if hasattr(value, "tolist"):  # numpy's
        value = value.tolist()
    is_text = _is_text(key)
    if isinstance(value, Path) or (is_text and not isinstance(value, bool | int | float)):
        value = str(value)
    if isinstance(value, str):
        return value if is_text or _is_plain(value) else json.dumps(value, ensure_ascii=False)
    if key == "density" and isinstance(value, Iterable):
        return ",".join(_text("", number) for number in value)
    try:
        return json.dumps(
            value, separators=(",", ":"), default=_builtin, ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError):
        raise ValueError(
            f"{key}: {value!r} is no setting; give finite numbers, words, lists or dicts of them"
        ) from None


def _is_text(key: str) -> bool:
    return key in config.KEYS and config.KEYS[key].kind is str


def _is_plain(text: str) -> bool:
    """Does yaml take it for itself, and not for true, null, or the like?"""
    word = re.fullmatch(r"[A-Za-z_][\w./:@-]*", text)
    return word is not None and isinstance(yaml.safe_load(text), str)


def _builtin(value: Any) -> Any:
    """What json does not know: numpy's numbers and arrays, paths, other mappings, ranges, sets."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    return dict(value) if isinstance(value, Mapping) else list(value)
