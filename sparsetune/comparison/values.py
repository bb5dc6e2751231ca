"""What `compare` finds out, as plain values: `compare.py` makes them, reports read them.

The rule to know: accuracies are shares of the test images, densities shares of all weights, costs
in FLOPs and device-seconds; only what is printed for readers is in percent or says sparsity. A
value that is not known is None, and never a zero or a NaN.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

State = Literal["confirmed", "infeasible", "unconfirmed", "unfinished"]
SLACK = 0.05  # how far, relatively, a density that emerges may be above the one asked for


def called(name: str, multiplier: int) -> str:
    """What is confirmed over so many times the epochs: mnist/set@0.05, or mnist/set@0.05 2x."""
    return name if multiplier == 1 else f"{name} {multiplier}x"


class Level(NamedTuple):
    """Where cells stand that may be compared with each other."""

    density: float
    multiplier: int = 1  # how many times the search's epochs

    def __str__(self) -> str:
        return called(f"{self.density:g}", self.multiplier)


def told_apart(places: list[tuple[str, str]]) -> list[str]:
    """What each (sweep, space) is called: by its sweep, too, where several sweeps have it."""
    sweeps: dict[str, set[str]] = {}
    for sweep, space in places:
        sweeps.setdefault(space, set()).add(sweep)
    return [f"{sweep}/{space}" if len(sweeps[space]) > 1 else space for sweep, space in places]


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """One setting, trained once per confirmation seed. Lists are in the order of `seeds`."""

    trial: int  # its number in the search
    group: str  # of its runs in W&B
    config: dict[str, Any]  # dotted key -> value: what sets it apart in its member
    seeds: list[int]
    statuses: list[str]  # finished | diverged | failed | running, of each seed's run
    test: list[float | None]  # accuracy; None where the run gave none
    validation: list[float | None]  # accuracy while candidates were ranked; empty if they were not
    density: float | None  # of all weights at the end of training, the mean over the seeds
    density_sparse: float | None  # of the sparse layers' weights
    layers: dict[str, float]  # of each layer with weights
    parameters: float | None  # nonzero weights; biases and normalisation are not counted
    flops_train: float | None  # of the whole training of one seed
    flops_inference: float | None  # per image
    device_seconds: float  # of all runs of this setting here, rankings included
    # Metric -> one list of epochs per seed: test runs where they have it, else ranking runs.
    # train/loss, val/accuracy (where images were held out), density/all, density/layer/<name>.
    curves: dict[str, list[list[float]]] = field(default_factory=dict)

    @property
    def accuracies(self) -> list[float]:
        return [value for value in self.test if value is not None]


@dataclass(frozen=True)
class Tuning:
    """What the search of a member has spent and found."""

    asked: int
    trials: dict[str, int]  # finished, stopped, diverged, failed, running -> how many
    epochs: int
    device_seconds: float
    best_of: list[float]  # expected best validation accuracy of 1, 2, 3, ... of its trials


@dataclass(frozen=True)
class Cell:
    """A method at a density: a member of a sweep, and where its search serves several densities,
    one of those."""

    name: str  # "mnist/set@0.05"; with a multiplier "mnist/set@0.05 2x"
    space: str  # "set": how tables and pictures call it; "set 2x"; "mnist/set" if sweeps share it
    sweep: str
    member: str  # whose search it comes from: "mnist/set@0.05"
    method: str
    density: float | None  # that was asked for; None: the network as it is (dense)
    state: State
    note: str  # one sentence where it is not confirmed
    dense_gradient: Literal["never", "at_update", "always"]
    begins: Literal["sparse", "dense"]
    tuning: Tuning
    chosen: Line | None
    paper: Line | None  # the start point `paper`, untuned
    mean: Interval | None = None  # of chosen.test
    iqm: Interval | None = None
    paper_mean: Interval | None = None
    multiplier: int = 1  # how many times its search's epochs the runs are trained


@dataclass(frozen=True)
class Pair:
    """Two cells at one density; `difference` is a's accuracy minus b's, seed by seed."""

    density: float  # the level that both stand at
    a: str  # Cell.space
    b: str
    improvement: Interval  # the probability that a run of a is better than one of b
    difference: Interval | None  # None where the seeds are not the same
    p: float | None  # of the paired test, Holm-adjusted; None below 6 seeds
    different: bool | None  # None below 6 seeds


@dataclass(frozen=True)
class Rule:
    """One rule of a fair comparison, checked."""

    number: int
    title: str
    state: Literal["holds", "broken", "does not apply"]
    figure: str  # what was found, with its numbers
    mend: str  # the command or change that mends it, where it is broken
    forbids: bool  # no ranking where it is broken


@dataclass(frozen=True)
class Comparison:
    names: list[str]  # as given
    match: Literal["density", "flops"]
    seeds: list[int]
    cells: list[Cell]
    levels: dict[Level, list[str]]  # Cell.name of those that stand there, by density or FLOPs
    pairs: list[Pair]
    rules: list[Rule]
    ranking: dict[Level, list[str]] | None  # Cell.space, best first; None: forbidden
    notes: list[str]  # sentences a reader must know, such as what was left out and why
    about: dict[str, Any]  # versions, hardware, commands, epochs, network, data, spaces, samplers

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: levels as their text, 0.05 or 0.05 2x."""
        own: dict[str, Any] = {"levels": {str(level): at for level, at in self.levels.items()}}
        if self.ranking is not None:
            own["ranking"] = {str(level): best for level, best in self.ranking.items()}
        return asdict(self) | own
