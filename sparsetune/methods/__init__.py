"""The sparse training methods: `METHODS`, the ones that come with sparsetune, `find`, which finds
users' own as well, and `update`, one update to look at.

Adding a method is its file, a line here, a search space and a test (`docs/add-a-method.md`).
"""

from __future__ import annotations

from sparsetune.methods import dense, dsr, dst, gmp, rigl, set, sm, static
from sparsetune.methods.contract import Method, faults
from sparsetune.methods.update import update
from sparsetune.names import import_object, suggestion

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD for module in (set, dsr, sm, dst, rigl, gmp, static, dense)
}


def find(name: str) -> Method:
    """The method that `name` says: one of METHODS, or a user's own at `package.module:METHOD`.

    ValueError, opening with the key `method`, for what does not exist or is no method.
    """
    if name in METHODS:
        return METHODS[name]
    if ":" not in name:
        raise ValueError(
            f"method: unknown method '{name}'{suggestion(name, METHODS)}; there are: "
            f"{', '.join(METHODS)}; or give your own as package.module:METHOD"
        )
    method: Method = import_object(name, "method")
    if wrong := faults(method):
        raise ValueError(f"method: {name} is no method: {'; '.join(wrong)}")
    if method.name in METHODS:
        raise ValueError(
            f"method: {name} is called '{method.name}', as one that comes with sparsetune; give "
            "it another name"
        )
    return method


__all__ = ["METHODS", "Method", "find", "update"]
