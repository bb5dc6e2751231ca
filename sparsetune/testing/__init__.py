"""The contract's tests of one method, ours or a user's own; each failure says how to mend it.

    from sparsetune.testing import check_method

    check_method(METHOD)

The rule to know: it needs no Ray and takes some seconds, whatever the method.
"""

from __future__ import annotations

import traceback

from sparsetune.methods.contract import Method, faults
from sparsetune.testing.examples import variants
from sparsetune.testing.promises import CHECKS, Check


def check_method(method: Method) -> None:
    """AssertionError with all promises of the contract that the method breaks, and why."""
    if wrong := faults(method):
        raise AssertionError("no method: " + "; ".join(wrong))
    broken = [text for check in CHECKS if (text := broken_promise(method, check))]
    if broken:
        head = (
            f"{method.name} breaks {len(broken)} of {len(CHECKS)} promises of methods/contract.py"
        )
        raise AssertionError("\n\n".join([head, *broken]))


def broken_promise(method: Method, check: Check) -> str:
    """What one of `CHECKS` has to say of the method, over all its variants; "" for nothing."""
    said: dict[str, list[str]] = {}
    for words in variants(method):
        try:
            check(method, words)
        except Exception as error:  # noqa: BLE001 - whatever an author's function raises
            shown = ", ".join(f"{name}: {word}" for name, word in words.items())
            said.setdefault(_said(error), []).append(shown)
    promise = " ".join((check.__doc__ or "").split())
    lines = [f"{check.__name__}: {promise}"] if said else []
    for text, where in said.items():
        more = f" (and {len(where) - 1} more variants)" if where[1:] else ""
        lines.append(f"  {text}" + (f"\n    variant {where[0]}{more}" if where[0] else ""))
    return "\n".join(lines)


def _said(error: Exception) -> str:
    if isinstance(error, AssertionError) and str(error):
        return str(error)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    text = f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}: {error}"
    lifted = "vmap" in str(error) or "data-dependent" in str(error)
    return text + "; no .item(), branch on a tensor or boolean index: use torch.where" * lifted
