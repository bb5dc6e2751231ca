"""Search spaces: yaml files <-> Optuna's distributions <-> settings of a trial.

The rule to know: a space is written with short names (`zeta`, `lr`) and is dotted from then on
(`hp.zeta`, `optimizer.lr`): in the study, the journal, W&B and a command line's overrides. Every
value that a space can give a trial is checked when it is loaded, so that no trial is refused later.

    method: set
    fixed: {prune: signwise}                   # any key of a trial, and `constraint`
    search:
      zeta: {low: 0.05, high: 0.6}             # low high log step | choices, and when
      threshold: {low: 0.05, high: 1.0, when: {prune: threshold}}
    start:
      paper: {zeta: 0.3, lr: 0.01}             # tried first

`files.py` finds and reads the files; `base.yaml` beside the shipped ones holds what every space
searches besides, unless it says otherwise itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import optuna
from optuna.distributions import BaseDistribution

from sparsetune.methods import METHODS, Method, find
from sparsetune.names import suggestion
from sparsetune.space import config, keys
from sparsetune.space.config import KEYS
from sparsetune.space.keys import SpaceError

BASE = "search_spaces/base.yaml"
SECTIONS = ("method", "fixed", "search", "start")
WORDS = ("low", "high", "log", "step", "choices", "when")


@dataclass(frozen=True)
class Dimension:
    """The range of one searched key: `low` to `high`, or `choices`."""

    low: float | None = None  # ints where the key takes whole numbers
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()
    when: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # dotted key -> its values

    def __contains__(self, value: Any) -> bool:
        if self.low is None or self.high is None:
            return any(value == each and type(value) is type(each) for each in self.choices)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        step = 1 if isinstance(self.low, int) and self.step is None else self.step
        steps = (value - self.low) / step if step else 0.0
        return self.low <= value <= self.high and abs(steps - round(steps)) < 1e-8

    def suggest(self, trial: optuna.trial.BaseTrial, key: str) -> Any:
        if self.low is None or self.high is None:
            return trial.suggest_categorical(key, self.choices)
        if isinstance(self.low, int):
            step = int(self.step or 1)
            return trial.suggest_int(key, self.low, int(self.high), step=step, log=self.log)
        return trial.suggest_float(key, self.low, self.high, step=self.step, log=self.log)

    def extremes(self) -> tuple[Any, ...]:
        return self.choices or (self.low, self.high)

    def to_dict(self) -> dict[str, Any]:
        """The words of the yaml file that are not at their default."""
        if self.choices:
            words: dict[str, Any] = {"choices": list(self.choices)}
        else:
            words = {"low": self.low, "high": self.high}
            words |= {"log": True} if self.log else {}
            words |= {"step": self.step} if self.step else {}
        when = {key: list(values) for key, values in self.when.items()}
        return words | ({"when": when} if when else {})

    @classmethod
    def from_dict(cls, words: Mapping[str, Any]) -> Self:
        """What `to_dict` gave: checked before it was written, and read where the method is not."""
        when = {key: tuple(values) for key, values in words.get("when", {}).items()}
        return cls(**{**words, "choices": tuple(words.get("choices", ())), "when": when})


class Point(NamedTuple):
    """A start point of a space: what it says of searched keys, and what it fixes besides.

    `in_study`: the trial is one that the search could have suggested, nothing fixed besides and
    every searched key that applies in its range. Only then can Optuna learn from it.
    """

    name: str
    params: dict[str, Any]
    fixed: dict[str, Any]
    in_study: bool


@dataclass(frozen=True)
class Space:
    """What is searched for one method. All keys dotted; `search` in the order of suggestion."""

    name: str  # the file's stem
    file: str
    method: str
    fixed: dict[str, Any]
    search: dict[str, Dimension]
    start: dict[str, dict[str, Any]]

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """Suggests every key that applies, those others depend on first: dotted key -> value."""
        params: dict[str, Any] = {}
        for key, dimension in self.search.items():
            if self._applies(dimension, params):
                params[key] = dimension.suggest(trial, key)
        return params

    def distributions(self, params: Mapping[str, Any]) -> dict[str, BaseDistribution]:
        """As wide as the ranges are now, of a trial that was suggested these."""
        known = optuna.trial.FixedTrial(dict(params))
        for key in params:
            self.search[key].suggest(known, key)
        return known.distributions

    def points(self) -> list[Point]:
        return [self.point(name, values) for name, values in self.start.items()]

    def point(self, name: str, values: Mapping[str, Any]) -> Point:
        params: dict[str, Any] = {}
        complete = True
        for key, dimension in self.search.items():
            if not self._applies(dimension, params):
                continue
            if key in values and values[key] in dimension:
                params[key] = values[key]
            else:
                complete = False
        fixed = {key: value for key, value in values.items() if key not in params}
        # What a point repeats of the space's own settings does not set its trial apart.
        apart = any(value != self._value(key, params) for key, value in fixed.items())
        return Point(name, params, fixed, complete and not apart)

    def _applies(self, dimension: Dimension, params: Mapping[str, Any]) -> bool:
        return all(self._value(key, params) in values for key, values in dimension.when.items())

    def _value(self, key: str, params: Mapping[str, Any]) -> Any:
        """What a trial with these params has for `key`."""
        if key in params:
            return params[key]
        return self.fixed[key] if key in self.fixed else keys.default(find(self.method), key)

    def dotted(self, key: str) -> str | None:
        """`keys.dotted` of this method."""
        return keys.dotted(find(self.method), key)

    def own_keys(self) -> list[str]:
        """The dotted hyperparameters and variants of the method."""
        return list(keys.own(find(self.method)).values())

    def fix(self, given: Mapping[str, Any]) -> Space:
        """The space with these dotted keys fixed, whatever it or its start points say of them."""
        method = find(self.method)
        checked = {key: keys.check_value(method, key, value) for key, value in given.items()}
        return _checked(
            dataclasses.replace(
                self,
                fixed=self.fixed | checked,
                search={k: v for k, v in self.search.items() if k not in checked},
                start={
                    name: {k: v for k, v in values.items() if k not in checked}
                    for name, values in self.start.items()
                },
            )
        )

    def search_also(self, given: Mapping[str, Mapping[str, Any]]) -> Space:
        """The space with these words (low, high, choices, ...) changed, by key, short or dotted."""
        search, fixed = dict(self.search), dict(self.fixed)
        for short, words in given.items():
            place = f"search.{short}"
            key = keys.canonical(find(self.method), short, place)
            old = search[key].to_dict() if key in search else {}
            if "choices" in words:
                old = {k: v for k, v in old.items() if k == "when"}
            elif "choices" in old and words:
                raise SpaceError(
                    f"{place}: {self.file} searches it by choices ({_listed(old['choices'])}); "
                    f"give {place}.choices=[...]"
                )
            search[key] = _dimension(place, find(self.method), key, old | dict(words))
            fixed.pop(key, None)
        return _checked(dataclasses.replace(self, fixed=fixed, search=search))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; `from_dict` needs no file."""
        search = {key: dimension.to_dict() for key, dimension in self.search.items()}
        return {**vars(self), "search": search}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        search = {key: Dimension.from_dict(words) for key, words in given["search"].items()}
        return cls(**{**given, "search": search})


# From yaml ----------------------------------------------------------------------------------------


def from_yaml(
    name: str, file: str, sections: Mapping[str, Any], shared: Mapping[str, Any]
) -> Space:
    """The space of a file's sections, and of what all spaces search. SpaceError, opening with the
    file, for what cannot be searched."""
    method = _method(sections, file)
    fixed = _settings(method, sections.get("fixed"), f"{file}: fixed", also=("constraint",))
    search = _search(method, sections.get("search"), file)
    base = _search(method, shared.get("search"), BASE)
    both = [key for key in fixed if key in search]
    if both:
        raise SpaceError(f"{file}: '{both[0]}' is fixed and searched; leave one of the two out")
    start = {
        str(point): _start_point(method, values, f"{file}: start.{point}")
        for point, values in _mapping(sections.get("start"), f"{file}: start").items()
    }
    search |= {k: dimension for k, dimension in base.items() if k not in {*fixed, *search}}
    return _checked(Space(name, file, str(sections["method"]), fixed, search, start))


def _method(given: Mapping[str, Any], file: str) -> Method:
    if not given.get("method"):
        raise SpaceError(f"{file}: no 'method'; there are: {', '.join(METHODS)}")
    try:
        return find(str(given["method"]))
    except ValueError as error:
        raise SpaceError(f"{file}: {str(error).removeprefix('method: ')}") from error


def _mapping(given: Any, place: str) -> dict[Any, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise SpaceError(f"{place}: '{given}' is no mapping; write it as {{key: value}}")
    return given


def _settings(method: Method, given: Any, place: str, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """Dotted key -> checked value of a `fixed` or a start point."""
    settings: dict[str, Any] = {}
    for short, value in config.flatten(_mapping(given, place)).items():
        known = short.split(".")[0] in also
        key = short if known else keys.canonical(method, short, place.partition(":")[0])
        _once(key, short, settings, place)
        try:
            settings[key] = keys.check_value(method, key, value)
        except ValueError as error:
            raise SpaceError(f"{place}: {error}") from error
    if "method" in settings:
        raise SpaceError(f"{place}: the method is named once, by 'method: {method.name}'")
    return settings


def _start_point(method: Method, given: Any, place: str) -> dict[str, Any]:
    settings = _settings(method, given, place)
    for key in settings:
        if keys.same_for_all(key):
            raise SpaceError(
                f"{place}: {key} cannot differ at one start point, because all trials of a search "
                f"must share it; put it under 'fixed', or write {key}=... on the command line"
            )
    return settings


def _once(key: str, short: str, known: Mapping[str, Any], place: str) -> None:
    if key in known:
        raise SpaceError(f"{place}: {key} stands there twice, once as '{short}'; leave one out")


def _search(method: Method, given: Any, file: str) -> dict[str, Dimension]:
    search: dict[str, Dimension] = {}
    for short, words in config.flatten(_mapping(given, f"{file}: search")).items():
        key = keys.canonical(method, short, file)
        _once(key, short, search, f"{file}: search")
        search[key] = _dimension(f"{file}: search.{short}", method, key, words)
    return search


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values)


# Dimensions ---------------------------------------------------------------------------------------


def _dimension(place: str, method: Method, key: str, given: Any) -> Dimension:
    """The checked range of `key`. `place` opens every message."""
    if keys.same_for_all(key):
        raise SpaceError(
            f"{place}: {key} cannot be searched, because all trials of a search must share it; "
            f"put it under 'fixed', or write {key}=... on the command line"
        )
    if not isinstance(given, Mapping):
        raise SpaceError(f"{place}: '{given}' is no range; write {{low: A, high: B}}")
    for word in given:
        if word not in WORDS:
            near = suggestion(str(word), WORDS)
            raise SpaceError(f"{place}: unknown '{word}'{near}; allowed: {', '.join(WORDS)}")
    words = {word: value for word, value in given.items() if value is not None}
    when = _when(place, method, words.pop("when", {}))
    if "choices" in words:
        return Dimension(choices=_choices(place, method, key, words), when=when)
    return _range(place, method, key, words, when)


def _when(place: str, method: Method, given: Any) -> dict[str, tuple[Any, ...]]:
    when = {}
    for short, value in config.flatten(_mapping(given, f"{place}: when")).items():
        key = keys.canonical(method, short, f"{place}: when")
        values = value if isinstance(value, list) else [value]
        try:
            when[key] = tuple(keys.check_value(method, key, each) for each in values)
        except ValueError as error:
            raise SpaceError(f"{place}: when: {error}") from error
    return when


def _choices(place: str, method: Method, key: str, words: dict[str, Any]) -> tuple[Any, ...]:
    if len(words) > 1:
        others = [word for word in words if word != "choices"]
        raise SpaceError(f"{place}: has choices and {others[0]}; give choices, or low and high")
    choices = words["choices"]
    if not isinstance(choices, list) or not choices:
        raise SpaceError(f"{place}: choices: '{choices}' is no list; write choices: [a, b]")
    checked = []
    for value in choices:
        if isinstance(value, (list, dict)):
            raise SpaceError(f"{place}: choices: {value} is neither a word nor a number")
        try:
            checked.append(keys.check_value(method, key, value))
        except ValueError as error:
            raise SpaceError(f"{place}: {error}") from error
    if len({repr(value) for value in checked}) < len(checked):
        raise SpaceError(f"{place}: choices: {_listed(choices)}; each may stand there once")
    return tuple(checked)


def _range(
    place: str, method: Method, key: str, words: dict[str, Any], when: dict[str, tuple[Any, ...]]
) -> Dimension:
    if key.startswith("variant."):
        words_of = {f"variant.{f.name}": f.metadata for f in dataclasses.fields(method.Variant)}
        allowed = _listed(words_of[key]["allowed"])
        raise SpaceError(f"{place}: takes words; write choices: [...], of {allowed}")
    for word in ("low", "high", "step"):
        value = words.get(word)
        if word not in words and word == "step":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            what = f"'{value}' is no number" if word in words else "is missing"
            raise SpaceError(f"{place}: {word} {what}; write {{low: A, high: B}}, or choices")
    log = words.get("log", False)
    if not isinstance(log, bool):
        raise SpaceError(f"{place}: log: '{log}' is neither true nor false")
    low, high, step = words["low"], words["high"], words.get("step")
    if not low < high:
        raise SpaceError(f"{place}: low {low} is not below high {high}; exchange or widen them")
    if log and low <= 0:
        raise SpaceError(f"{place}: log needs low above 0, and low is {low}; raise it, or drop log")
    if log and step is not None:
        raise SpaceError(f"{place}: log and step do not go together; leave one of them out")
    if step is not None and not 0 < step <= high - low:
        raise SpaceError(f"{place}: step {step} does not fit {low} to {high}")
    takes_whole = key in KEYS and KEYS[key].kind in (int, Any)
    whole = takes_whole and all(isinstance(v, int) for v in (low, high, step or 1))
    as_type = int if whole else float
    try:
        for value in (low, high):
            keys.check_value(method, key, as_type(value))
    except ValueError as error:
        raise SpaceError(f"{place}: {error}") from error
    return Dimension(
        as_type(low), as_type(high), log, None if step is None else as_type(step), when=when
    )


def _checked(space: Space) -> Space:
    """The space, its searched keys ordered so that conditions look back only."""
    ordered: dict[str, Dimension] = {}
    waiting = dict(space.search)
    while waiting:
        ready = [
            key
            for key, dimension in waiting.items()
            if not any(other in waiting for other in dimension.when)
        ]
        if not ready:
            raise SpaceError(f"{space.file}: search: {_listed(list(waiting))} wait for each other")
        ordered[ready[0]] = waiting.pop(ready[0])
    return dataclasses.replace(space, search=ordered)
