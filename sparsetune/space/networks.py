"""What networks cost, as a member's journal says it, so that readers need neither them nor data.

The rule to know: the header lists the networks that trials of the search may have. One that is not
listed is computed where it is our own; of any other one nothing is known.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from sparsetune.names import users_code
from sparsetune.settings import DataSettings, ModelSettings, from_dict, to_dict
from sparsetune.space.member import Member
from sparsetune.training import data, models
from sparsetune.training.flops import forward_flops

MOST = 32  # networks in a header: products of many choices would fill it


class Network(NamedTuple):
    flops: dict[str, float]  # dense forward FLOPs of each layer, per sample; "": what is in none
    weights: dict[str, list[int]]  # shapes of what a density counts
    whole: int  # weights of the network that `model.match_density` made smaller, or else of itself

    @property
    def sizes(self) -> dict[str, int]:
        return {name: math.prod(shape) for name, shape in self.weights.items()}


def to_header(member: Member, dataset: data.Dataset) -> dict[str, Any]:
    """For the journal's first event; `network_of` reads it."""
    inputs, classes = dataset.input_shape, dataset.num_classes
    listed = []
    for model in itertools.islice(_possible(member), MOST):
        with contextlib.suppress(ValueError):  # trials that have it will say what is wrong
            listed.append({"model": to_dict(model), **_network(model, inputs, classes)._asdict()})
    return {"inputs": list(inputs), "classes": classes, "networks": listed}


def network_of(header: Mapping[str, Any], model: ModelSettings) -> Network | None:
    """What the member's journal says of a network; None where it does not, and nobody else can."""
    said = header.get("network", {})
    for listed in said.get("networks", []):
        if from_dict(ModelSettings, listed["model"]) == model:
            return Network(listed["flops"], listed["weights"], listed["whole"])
    if ":" in model.name:
        return None
    settings = json.dumps(header["member"]["settings"]["data"])
    images = (tuple(said["inputs"]), said["classes"]) if said else _images(settings)
    return images and _ours(json.dumps(to_dict(model)), *images)


def _possible(member: Member) -> Iterator[ModelSettings]:
    """The models of the member's trials; of a range that is searched its ends."""
    searched = {
        key: dimension.extremes()
        for key, dimension in member.space.search.items()
        if key.startswith("model.")
    }
    settings: Iterable[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        *((params, fixed) for _, params, fixed, _ in member.space.points()),
        *((dict(zip(searched, v, strict=True)), {}) for v in itertools.product(*searched.values())),
    ]
    listed = []
    for params, fixed in settings:
        model = member.trial_settings(params, fixed).model
        if model not in listed:
            listed.append(model)
            yield model


def _network(model: ModelSettings, inputs: models.Shape, classes: int) -> Network:
    weights = models.weights(models.probe(model, inputs, classes))
    whole = weights
    if model.match_density:
        whole = models.weights(models.probe(replace(model, match_density=0.0), inputs, classes))
    with users_code(f"model.name: {model.name}, counting its FLOPs,"):
        flops = forward_flops(model, inputs, classes)
    return Network(
        flops,
        {name: list(shape) for name, shape in weights.items()},
        sum(shape.numel() for shape in whole.values()),
    )


# Of journals that do not say it: as text, which can be remembered.


@cache
def _ours(model: str, inputs: models.Shape, classes: int) -> Network:
    return _network(from_dict(ModelSettings, json.loads(model)), inputs, classes)


@cache
def _images(settings: str) -> tuple[models.Shape, int] | None:
    try:
        dataset = data.load(from_dict(DataSettings, json.loads(settings)))
    except ValueError:
        return None
    return dataset.input_shape, dataset.num_classes
