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

`base.yaml` beside the shipped spaces holds what every space searches besides, unless it says
otherwise itself. Over 350 lines: a third of them are sentences for what a file got wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import optuna
import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from optuna.distributions import BaseDistribution

from sparsetune.methods import METHODS, Method
from sparsetune.methods.contract import check_number, make_variant
from sparsetune.names import suggestion
from sparsetune.settings import TrialSettings
from sparsetune.space import config
from sparsetune.space.config import KEYS

SECTIONS = ("method", "fixed", "search", "start")
WORDS = ("low", "high", "log", "step", "choices", "when")
SHORT = {name: f"optimizer.{name}" for name in ("lr", "weight_decay", "momentum")}
# Searching one of these would compare trials that cannot be compared.
SAME_FOR_ALL = ("method", "epochs", "seed", "order_seed", "density_over", "dense_layers")


class SpaceError(ValueError):
    """A space that cannot be searched; says file, key, what is allowed."""


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
            words |= ({"log": True} if self.log else {}) | (
                {"step": self.step} if self.step else {}
            )
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
        return self.fixed[key] if key in self.fixed else default(METHODS[self.method], key)

    def dotted(self, key: str) -> str | None:
        """The full name of a key, short or dotted; None where trials of this method have none."""
        return _dotted(METHODS[self.method], key)

    def own_keys(self) -> list[str]:
        """The dotted hyperparameters and variants of the method."""
        return list(_own(METHODS[self.method]).values())

    def fix(self, given: Mapping[str, Any]) -> Space:
        """The space with these dotted keys fixed, whatever it or its start points say of them."""
        method = METHODS[self.method]
        checked = {key: check_value(method, key, value) for key, value in given.items()}
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
            key = _canonical(METHODS[self.method], short, place)
            old = search[key].to_dict() if key in search else {}
            if "choices" in words:
                old = {k: v for k, v in old.items() if k == "when"}
            elif "choices" in old and words:
                raise SpaceError(
                    f"{place}: {self.file} searches it by choices ({_listed(old['choices'])}); "
                    f"give {place}.choices=[...]"
                )
            search[key] = _dimension(place, METHODS[self.method], key, old | dict(words))
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


# Files --------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where the shipped spaces are: in the installed package, or beside it in the repository."""
    package = Path(__file__).parents[1]
    inside = package / "search_spaces"
    return inside if inside.is_dir() else package.parent / "search_spaces"


def names() -> list[str]:
    """The shipped spaces."""
    return sorted(file.stem for file in folder().glob("*.yaml") if file.stem != "base")


def load(spec: str) -> Space:
    """The space of this name, or in the file at this path. SpaceError for what cannot be."""
    if spec in names():
        path, file = folder() / f"{spec}.yaml", f"search_spaces/{spec}.yaml"
    elif spec.endswith((".yaml", ".yml")) or "/" in spec:
        path, file = Path(spec), spec
        if not path.is_file():
            raise SpaceError(f"{spec}: there is no such file; shipped spaces: {', '.join(names())}")
    else:
        raise SpaceError(
            f"'{spec}' is no search space{suggestion(spec, names())}; "
            f"there are: {', '.join(names())}; or give the path of a yaml file"
        )
    given = _read(path, file)
    method = _method(given, file)
    shared = _read(folder() / "base.yaml", "search_spaces/base.yaml", allowed=("search",))
    fixed = _settings(method, given.get("fixed"), f"{file}: fixed", also=("constraint",))
    search = _search(method, given.get("search"), file)
    base = _search(method, shared.get("search"), "search_spaces/base.yaml")
    both = [key for key in fixed if key in search]
    if both:
        raise SpaceError(f"{file}: '{both[0]}' is fixed and searched; leave one of the two out")
    base = {key: dimension for key, dimension in base.items() if key not in fixed}
    start = {
        str(name): _start_point(method, values, f"{file}: start.{name}")
        for name, values in _mapping(given.get("start"), f"{file}: start").items()
    }
    search |= {key: dimension for key, dimension in base.items() if key not in search}
    return _checked(Space(path.stem, file, method.name, fixed, search, start))


def _read(path: Path, file: str, allowed: Sequence[str] = SECTIONS) -> dict[str, Any]:
    try:
        given = OmegaConf.to_container(OmegaConf.load(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise SpaceError(
            f"{file}{line}: no valid yaml: {getattr(error, 'problem', None) or error}; "
            "check indentation, colons and brackets there"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpaceError(f"{file}: cannot be read: {error}") from error
    if not given:
        raise SpaceError(f"{file}: is empty; it needs at least a line 'method: NAME'")
    if not isinstance(given, dict) or all(value is None for value in given.values()):
        raise SpaceError(f"{file}: holds no 'key: value' lines; it needs {', '.join(allowed)}")
    for name in map(str, given):
        if name not in allowed:
            near = suggestion(name, allowed)
            raise SpaceError(f"{file}: unknown '{name}'{near}; allowed: {', '.join(allowed)}")
    return {str(name): value for name, value in given.items()}


def _method(given: Mapping[str, Any], file: str) -> Method:
    name = given.get("method")
    if not isinstance(name, str) or name not in METHODS:
        what = f"unknown method '{name}'{suggestion(str(name), METHODS)}" if name else "no 'method'"
        raise SpaceError(f"{file}: {what}; there are: {', '.join(METHODS)}")
    return METHODS[name]


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
        if short.split(".")[0] in also:
            key = short
        else:
            key = _canonical(method, short, place.partition(":")[0])
        _once(key, short, settings, place)
        try:
            settings[key] = check_value(method, key, value)
        except ValueError as error:
            raise SpaceError(f"{place}: {error}") from error
    if "method" in settings:
        raise SpaceError(f"{place}: the method is named once, by 'method: {method.name}'")
    return settings


def _start_point(method: Method, given: Any, place: str) -> dict[str, Any]:
    settings = _settings(method, given, place)
    for key in settings:
        if _same_for_all(key):
            raise SpaceError(
                f"{place}: {key} cannot differ at one start point, because all trials of a search "
                f"must share it; put it under 'fixed', or write {key}=... on the command line"
            )
    return settings


def _same_for_all(key: str) -> bool:
    return key in SAME_FOR_ALL or (key.startswith("data.") and key != "data.augment")


def _once(key: str, short: str, known: Mapping[str, Any], place: str) -> None:
    if key in known:
        raise SpaceError(f"{place}: {key} stands there twice, once as '{short}'; leave one out")


def _search(method: Method, given: Any, file: str) -> dict[str, Dimension]:
    search: dict[str, Dimension] = {}
    for short, words in config.flatten(_mapping(given, f"{file}: search")).items():
        key = _canonical(method, short, file)
        _once(key, short, search, f"{file}: search")
        search[key] = _dimension(f"{file}: search.{short}", method, key, words)
    return search


# Keys and values ----------------------------------------------------------------------------------


def _own(method: Method) -> dict[str, str]:
    """Short name -> dotted key, of the method's hyperparameters and variants."""
    hp = {f.name: f"hp.{f.name}" for f in dataclasses.fields(method.Hyperparameters)}
    return hp | {f.name: f"variant.{f.name}" for f in dataclasses.fields(method.Variant)}


def _dotted(method: Method, key: str) -> str | None:
    own = _own(method)
    if key in own or key in SHORT:
        return own.get(key) or SHORT[key]
    if key.startswith(("hp.", "variant.")):
        return key if key in own.values() else None
    return key if config.is_trial_key(key) else None


def _canonical(method: Method, key: str, place: str) -> str:
    found = _dotted(method, key)
    if found is not None:
        return found
    if key in KEYS or key.startswith("constraint."):
        raise SpaceError(
            f"{place}: '{key}' is no setting of a single trial; give it on the command line, as "
            f"{key}=..."
        )
    own = [*_own(method), *SHORT]
    near = suggestion(key.rpartition(".")[2], own) or suggestion(key, KEYS)
    has = ", ".join(_own(method)) or "none of its own"
    raise SpaceError(
        f"{place}: '{key}' is no hyperparameter of {method.name}{near}{'' if near else ';'} "
        f"it has: {has}; besides: {', '.join(SHORT)}, and settings such as update.every"
    )


def default(method: Method, key: str) -> Any:
    """The value of a dotted key that nobody set; None for a key without one."""
    group, _, name = key.partition(".")
    if group in ("hp", "variant"):
        cls = method.Hyperparameters if group == "hp" else method.Variant
        return next(f.default for f in dataclasses.fields(cls) if f.name == name)
    value: Any = dataclasses.asdict(TrialSettings(method=method.name))
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def check_value(method: Method, key: str, value: Any) -> Any:
    """The value as its key's type; ValueError, opening with the key, for one not allowed."""
    group, _, name = key.partition(".")
    if group == "hp":
        return check_number(method, name, value)
    if group == "variant":
        return getattr(make_variant(method, {name: value}), name)
    return config.check_value(key, value)


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values)


# Dimensions ---------------------------------------------------------------------------------------


def _dimension(place: str, method: Method, key: str, given: Any) -> Dimension:
    """The checked range of `key`. `place` opens every message."""
    if _same_for_all(key):
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
        key = _canonical(method, short, f"{place}: when")
        values = value if isinstance(value, list) else [value]
        try:
            when[key] = tuple(check_value(method, key, each) for each in values)
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
            checked.append(check_value(method, key, value))
        except ValueError as error:
            raise SpaceError(f"{place}: {error}") from error
    if len({repr(value) for value in checked}) < len(checked):
        raise SpaceError(f"{place}: choices: {_listed(choices)}; each may stand there once")
    return tuple(checked)


def _range(
    place: str, method: Method, key: str, words: dict[str, Any], when: dict[str, tuple[Any, ...]]
) -> Dimension:
    if key.startswith("variant."):
        allowed = _listed(_allowed_words(method, key))
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
    whole = _takes_whole(key) and all(isinstance(v, int) for v in (low, high, step or 1))
    as_type = int if whole else float
    try:
        for value in (low, high):
            check_value(method, key, as_type(value))
    except ValueError as error:
        raise SpaceError(f"{place}: {error}") from error
    return Dimension(
        as_type(low), as_type(high), log, None if step is None else as_type(step), when=when
    )


def _takes_whole(key: str) -> bool:
    kind = KEYS.get(key, float)
    return kind in (int, Any) or kind == (int | None)


def _allowed_words(method: Method, key: str) -> tuple[str, ...]:
    name = key.removeprefix("variant.")
    fields = {f.name: f for f in dataclasses.fields(method.Variant)}
    allowed: tuple[str, ...] = fields[name].metadata["allowed"]
    return allowed


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
