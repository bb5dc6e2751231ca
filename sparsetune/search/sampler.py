"""What suggests settings: Optuna's samplers by the names that a sweep has for them.

The rule to know: a sampler serves one question. It is made with that question's seed, so nothing of
it needs to be saved (`study.py`).
"""

from __future__ import annotations

from typing import Any

import optuna

from sparsetune.settings import SamplerSettings
from sparsetune.space.member import Member


class NSGAII(optuna.samplers.NSGAIISampler):
    """NSGA-II whose parents come in number order.

    Optuna's come in the order of selection when they have just been selected and in number order
    when they are remembered, so its children depend on whether the study was rebuilt in between.
    """

    def get_parent_population(
        self, study: optuna.Study, generation: int
    ) -> list[optuna.trial.FrozenTrial]:
        return sorted(super().get_parent_population(study, generation), key=lambda t: t.number)


def make_sampler(settings: SamplerSettings, seed: int) -> optuna.samplers.BaseSampler:
    """A fresh sampler. None gets a constraints_func: `MemberStudy` sets constraints itself."""
    name, startup = settings.name, settings.startup
    if name == "random":
        return optuna.samplers.RandomSampler(seed)
    if name == "gp":
        return optuna.samplers.GPSampler(
            seed=seed, n_startup_trials=startup, warn_independent_sampling=False
        )
    if name == "nsga2":
        return NSGAII(seed=seed)
    return optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed, constant_liar=True)


def examples(member: Member, num: int) -> list[dict[str, Any]]:
    """Settings that the member's sampler might suggest, knowing nothing yet."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = make_sampler(member.settings.sampler, seed=0)
    study = optuna.create_study(directions=member.directions, sampler=sampler)
    return [member.space.suggest(study.ask()) for _ in range(num)]
