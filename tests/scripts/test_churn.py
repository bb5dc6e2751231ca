"""Many short trials, stopped, diverged and killed: `scripts/churn.py` at a small size."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsetune.store.journal import Record, Report, Trial
from sparsetune.sweeps.status import front


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_every_trial_ends_once_and_no_slot_stays_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import churn

    words = ["epochs=4", "sampler.name=random", "wandb.mode=disabled", "resources.engines=1"]
    words += ["resources.slots=6", "concurrency=6"]
    result = churn.sweep(tmp_path, words, trials=60, kills=4, seed=4)
    assert result.wrong() == [], result.output
    assert result.status == 0, result.output
    assert sum(result.killed.values()) == 4
    assert sum(result.ended.values()) == 60
    assert set(result.ended) == {"finished", "stopped", "diverged"}


def test_the_front_is_what_no_other_trial_beats() -> None:
    rng = random.Random(0)
    values = [[float(rng.randrange(8)) for _ in range(3)] for _ in range(200)]
    names = ["a", "b", "c"]
    member: Any = SimpleNamespace(
        objectives=names, directions=["maximize", "minimize", "maximize"], constraint=lambda m: 0.0
    )
    trials = {
        number: Trial(
            number, {}, {}, "sampler", {}, True, 0.0, status="finished",
            reports=[Report(1, dict(zip(names, value, strict=True)), "CONTINUE")],
        )
        for number, value in enumerate(values)
    }  # fmt: skip

    def beats(one: list[float], other: list[float]) -> bool:
        signed = [(s * a, s * b) for s, a, b in zip((1, -1, 1), one, other, strict=True)]
        return one != other and all(a >= b for a, b in signed)

    expected = [n for n, v in enumerate(values) if not any(beats(other, v) for other in values)]
    found = front(member, Record({}, len(trials), trials))
    assert [trial.number for trial in found] == expected
    member.objectives, member.directions = ["b"], ["minimize"]
    assert [t.number for t in front(member, Record({}, len(trials), trials))] == [
        min(range(200), key=lambda n: (values[n][1], n))
    ]
