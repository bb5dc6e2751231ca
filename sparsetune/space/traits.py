"""What a method is like, as a member's journal says it, so that readers need not have the method.

The rule to know: whoever reads a journal asks `Member.traits`, and only who trains or resolves
settings asks `Member.method`. A journal without traits is of one of our own methods.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from sparsetune.methods import Method


class Traits(NamedTuple):
    name: str
    begins: str  # sparse | dense
    emergent: bool
    reaches_density: bool
    # [words of a variant, never | at_update | always], the default first
    gradients: list[list[Any]]

    def dense_gradient(self, variant: Mapping[str, Any]) -> str:
        """When gradients of absent weights are needed; words that are left out have the default."""
        for words, kind in self.gradients:
            if all(words.get(key, word) == word for key, word in variant.items()):
                return str(kind)
        raise ValueError(f"variant: {dict(variant)} is none that {self.name} had")


def traits_of(method: Method) -> Traits:
    return Traits(
        method.name, method.begins, method.emergent, method.reaches_density, _gradients(method)
    )


def _gradients(method: Method) -> list[list[Any]]:
    """One row where all variants are alike; else by the words that decide."""
    allowed = {f.name: f.metadata["allowed"] for f in dataclasses.fields(method.Variant)}
    variants = [
        dict(zip(allowed, words, strict=True)) for words in itertools.product(*allowed.values())
    ]

    def kind(words: Mapping[str, str]) -> str:
        return method.dense_gradient(method.Variant(**words))

    deciding = {
        name: words
        for name, words in allowed.items()
        if any(kind(variant) != kind(variant | {name: words[0]}) for variant in variants)
    }
    return [
        [words := dict(zip(deciding, chosen, strict=True)), kind(words)]
        for chosen in itertools.product(*deciding.values())
    ]
