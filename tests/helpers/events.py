"""Events as drivers write them."""

from __future__ import annotations

from typing import Any


def suggest(number: int, **more: Any) -> dict[str, Any]:
    event = {
        "type": "suggest",
        "number": number,
        "params": {"hp.zeta": 0.1 + 0.2, "schedule.milestones": (0.5, 0.75)},
        "distributions": {"hp.zeta": '{"name": "FloatDistribution"}'},
        "origin": "sampler",
        "fixed": {},
        "in_study": True,
    }
    return event | more


def report(number: int, epoch: int, decision: str = "CONTINUE") -> dict[str, Any]:
    metrics = {"epoch": float(epoch), "val/accuracy": 0.5 + epoch / 10}
    event = {"type": "report", "number": number, "epoch": epoch, "metrics": metrics}
    return {**event, "decision": decision}


def end(number: int, status: str = "finished", **more: Any) -> dict[str, Any]:
    return {"type": "end", "number": number, "status": status, "attempt": 1, **more}
