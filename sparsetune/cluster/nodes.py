"""What each node of a cluster must have: the same programs, the modules, the data, the storage.

The rule to know: a node is looked at before it gets an engine, and what is wrong is said with its
address. What looks there travels as code, so that it also runs, and says so, where sparsetune is
missing. A user's own modules are sent to the nodes, too; data and storage are not.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from sparsetune.names import import_object

PACKAGES = ("sparsetune", "torch", "ray")


def needs(
    token: Path,
    methods: list[str],
    models: list[dict[str, Any]],
    data: list[tuple[dict[str, Any], str]],
) -> dict[str, Any]:
    """What `looker`'s function is to find there, as plain values: a node may know no class of ours.

    `token` is a file in the sweep's folder; `data` are settings with their images' fingerprint.
    """
    return {
        "folder": str(Path.cwd()),
        "token": (str(token.resolve()), token.read_text()),
        "versions": {"python": "{}.{}".format(*sys.version_info)}
        | {package: metadata.version(package) for package in PACKAGES},
        "methods": methods,
        "models": models,
        "data": data,
    }


def looker() -> Callable[..., list[str]]:
    """A function of `needs` that says what a node lacks; defined in here, it travels as code."""

    def look(
        folder: str,
        token: tuple[str, str],
        versions: dict[str, str],
        methods: list[str],
        models: list[dict[str, Any]],
        data: list[tuple[dict[str, Any], str]],
    ) -> list[str]:
        import sys
        import uuid
        from importlib import metadata

        wrong = []
        for package, version in versions.items():
            try:
                python = "{}.{}".format(*sys.version_info)
                here = python if package == "python" else metadata.version(package)
            except metadata.PackageNotFoundError:
                here = "not installed"
            # What follows "+", as cpu or cu126, is for the node's hardware.
            if here.partition("+")[0] != version.partition("+")[0]:
                wrong.append(f"{package} is {here}, and {version} where the sweep was started")
        if wrong:
            return wrong
        from sparsetune.methods import find
        from sparsetune.names import work_in
        from sparsetune.settings import DataSettings, ModelSettings, from_dict
        from sparsetune.store.paths import place, why
        from sparsetune.training import data as our_data
        from sparsetune.training import models as our_models

        work_in(folder)
        path, fault = place(token[0]), ""
        try:
            if path.read_text() != token[1]:
                fault = "another folder"
            mine = path.with_name(f"{path.name}-{uuid.uuid4().hex}")
            mine.touch()
            mine.unlink()
        except OSError as error:
            fault = f"not to be read or written ({why(error)})"
        if fault:
            wrong.append(
                f"storage: {path.parent} is {fault} there; give a storage that all nodes share"
            )
        for name in methods:
            try:
                find(name)
            except ValueError as error:
                wrong.append(str(error))
        for settings in models:
            try:
                our_models.check(from_dict(ModelSettings, settings))
            except ValueError as error:
                wrong.append(str(error))
        for settings, fingerprint in data:
            try:
                there = our_data.load(from_dict(DataSettings, settings)).fingerprint
            except ValueError as error:
                wrong.append(str(error))
                continue
            if there != fingerprint:
                wrong.append(
                    f"data: the images of {settings['name']} are others there (fingerprint "
                    f"{there[:12]}, and {fingerprint[:12]} where the sweep was started)"
                )
        return wrong

    return look


def users_modules(paths: Iterable[str]) -> list[str]:
    """The files and packages that Ray's `py_modules` must bring to the nodes for import paths.

    Those named and what they imported from beside them; nothing that pip installed.
    """
    tops = []
    for path in paths:
        import_object(path, "model.name")
        tops.append(sys.modules[path.partition(":")[0].partition(".")[0]])
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib")}
    beside = {place.parent for top in tops for place in _places(top)} - installed
    loaded = [module for name, module in list(sys.modules.items()) if "." not in name]
    places = {place for module in loaded for place in _places(module)}
    return sorted(str(place) for place in places if place.parent in beside)


def _places(module: ModuleType) -> list[Path]:
    """The folders of a package, or the file of a module."""
    file = getattr(module, "__file__", None)
    paths = list(getattr(module, "__path__", [])) or ([file] if file else [])
    return [Path(path).resolve() for path in paths]
