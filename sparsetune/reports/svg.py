"""Pictures as SVG for a page: axes, lines, bands, points and labels that keep apart.

The rule to know: a picture is 360 units wide whatever the screen, so that its text is readable on a
phone; colours and sizes of text are the page's, by class (`style`), and every mark carries its
values, in `data-` attributes at full precision and as a `<title>` that a pointer shows.

Own code, because plotly.js alone is 4.8 MB, and matplotlib is 75 MB to install and needs its texts,
colours, widths and values put in afterwards.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import NamedTuple

WIDTH = 360.0
LETTER, LINE = 5.6, 11.0  # width and height of text, at the size that the page gives it
PALETTE = [  # by order of appearance: colour on white, colour on black, mark of unit size
    ("#567cfd", "#4997fd", "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z"),
    ("#f05905", "#fcab01", "M-.9-.9h1.8v1.8h-1.8z"),
    ("#114a07", "#4ff9a2", "M0-1.2L1.1.8h-2.2z"),
    ("#a94c6b", "#d91c62", "M0-1.3L1.1 0 0 1.3-1.1 0z"),
    ("#1a15b0", "#5e59fe", "M0 1.2L1.1-.8h-2.2z"),
    ("#51196c", "#b734aa", "M-.4-1.2h.8v.8h.8v.8h-.8v.8h-.8v-.8h-.8v-.8h.8z"),
    ("#b48153", "#867119", "M-1.2-.5h2.4v1h-2.4z"),
    ("#7c84b6", "#eab8fe", "M-.5-1.2h1v2.4h-1z"),
    ("#00b49c", "#00c0b4", "M1.2 0L-.8-1.1v2.2z"),
    ("#786000", "#f0f000", "M-1-1.1h2L-1 1.1h2z"),
    ("#8400e4", "#fc7878", "M-1.2 0L.8-1.1v2.2z"),
    ("#00609c", "#18a800", "M-1.2.6a1.2 1.2 0 0 1 2.4 0z"),
]
PENTAGON = "M0-1.2L1.1-.4.7.9h-1.4L-1.1-.4z"
CROSS, BELOW = "M-1-1L1 1M1-1L-1 1", "M-1-.6L0 .6 1-.6"


class Look(NamedTuple):
    """How a series looks everywhere: `colour` is a class of the page's css; dashed where another
    series has the same colour and mark."""

    name: str
    colour: str
    mark: str = PENTAGON
    dashed: bool = False

    @property
    def css(self) -> str:
        return self.colour + " dashed" * self.dashed


def looks(place: int) -> tuple[str, str]:
    """Colour class and mark of the series that appears at this place. After the last colour they
    begin again, each with the next mark, and dotted lines."""
    again, colour = divmod(place, len(PALETTE))
    return f"c{colour}" + " dotted" * (again > 0), PALETTE[(colour + again) % len(PALETTE)][2]


def style() -> str:
    """The css of a page, with the colours of all series."""
    light, dark = (
        "".join(f".c{place} {{ --c: {colour}; }}\n" for place, colour in enumerate(colours))
        for colours in list(zip(*PALETTE, strict=True))[:2]
    )
    own = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    return f"{own}{light}@media screen and (prefers-color-scheme: dark) {{\n{dark}}}\n"


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, which may be the smaller one."""

    low: float
    high: float
    label: str = ""
    log: bool = False
    form: Callable[[float], str] = "{:g}".format
    at: Sequence[float] = ()  # ticks; without any, round numbers

    def share(self, value: float) -> float:
        if self.log:
            if value <= 0:
                return -math.inf
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, about: int = 4) -> Sequence[float]:
        low, high = sorted((self.low, self.high))
        if self.at:
            return self.at
        if self.log:
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                ticks = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
                if 2 <= len(ticks) <= about + 2:
                    return ticks
            if len(ticks) > 2:
                return ticks[:: math.ceil(len(ticks) / about)]
        raw = (high - low) / about
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.8)
        first = math.ceil(low / step - 1e-9)
        count = math.floor(high / step + 1e-9) - first + 1
        return [round((first + n) * step, 12) for n in range(count)]


def around(
    values: Iterable[float], label: str = "", log: bool = False,
    form: Callable[[float], str] = "{:g}".format, room: float = 0.06,
) -> Axis:  # fmt: skip
    """An axis with some room beside the values."""
    known = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
    low, high = min(known), max(known)
    if log:
        factor = (high / low) ** room if high > low else 1.5
        return Axis(low / factor, high * factor, label, True, form)
    gap = (high - low) * room or max(abs(high) * 0.05, 1e-3)
    return Axis(low - gap, high + gap, label, False, form)


def digits(value: float) -> str:
    """A coordinate of the picture."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def attributes(**values: object) -> str:
    return "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in values.items()
        if value is not None
    )


def group(look: Look, kind: str = "", **data: object) -> str:
    """The tag that begins a mark of the series; `</g>` ends it."""
    return f"<g{attributes(class_=f'{look.css} {kind}'.strip(), data_series=look.name, **data)}>"


def text(x: float, y: float, content: str, css: str = "", anchor: str = "") -> str:
    where = attributes(x=digits(x), y=digits(y), class_=css or None, text_anchor=anchor or None)
    return f"<text{where}>{escape(content)}</text>"


@dataclass
class Chart:
    x: Axis
    y: Axis
    title: str = ""
    names: Sequence[str] = ()  # what labels will say, for their room on the right
    height: float = 230.0
    width: float = WIDTH
    back: list[str] = field(default_factory=list)  # clipped at the axes
    front: list[str] = field(default_factory=list)
    labels: list[tuple[float, float, str, str]] = field(default_factory=list)
    below: bool = False  # does a point stand below the picture?

    def __post_init__(self) -> None:
        self.left = 12 + LETTER * max(len(self.y.form(tick)) for tick in self.y.ticks())
        self.left += 12 if self.y.label else 0
        right = 12 + LETTER * min(18, max(map(len, self.names), default=0))
        self.top, self.end = 20.0 if self.title else 8.0, self.width - right
        self.edge = self.height - (34.0 if self.x.label else 20.0)

    def px(self, value: float) -> float:
        return self.left + self.x.share(value) * (self.end - self.left)

    def py(self, value: float) -> float:
        share = max(-9.0, min(9.0, self.y.share(value)))  # far out is far enough
        return self.edge - share * (self.edge - self.top)

    def _kept(self, num: int) -> list[int]:
        """Of so many points of a line those that are drawn: one every four units at most."""
        step = max(1, math.ceil(4 * num / self.width))
        return [n for n in range(num) if n % step == 0 or n == num - 1]

    def line(
        self, look: Look, xs: Sequence[float], ys: Sequence[float], kind: str = "",
        label: str = "", shift: float = 0.0,
    ) -> None:  # fmt: skip
        """`label` stands beside its end."""
        points = [(xs[n], ys[n]) for n in self._kept(len(xs)) if math.isfinite(ys[n])]
        if not points:
            return
        path = "L".join(f"{digits(self.px(x) + shift)} {digits(self.py(y))}" for x, y in points)
        values = attributes(
            data_x=" ".join(f"{x:.6g}" for x, _ in points),
            data_y=" ".join(f"{y:.6g}" for _, y in points),
        )
        self.back.append(f'{group(look, kind)}<path class="l" d="M{path}"{values}/></g>')
        if label:
            self.label(look, *points[-1], label)

    def label(self, look: Look, x: float, y: float, content: str) -> None:
        content = content if len(content) <= 18 else f"{content[:17]}\N{HORIZONTAL ELLIPSIS}"
        self.labels.append((self.px(x), self.py(y), content, look.css))

    def band(self, look: Look, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float],
             **data: object) -> None:  # fmt: skip
        kept = [n for n in self._kept(len(xs)) if math.isfinite(lows[n] + highs[n])]
        there = [f"{digits(self.px(xs[n]))} {digits(self.py(highs[n]))}" for n in kept]
        again = [f"{digits(self.px(xs[n]))} {digits(self.py(lows[n]))}" for n in reversed(kept)]
        if kept:
            path = "L".join(there + again)
            self.back.insert(0, f'{group(look, "", **data)}<path class="b" d="M{path}z"/></g>')

    def point(
        self, look: Look, x: float, y: float, says: str, kind: str = "", size: float = 3.2,
        low: float | None = None, high: float | None = None, shift: float = 0.0, mark: str = "",
    ) -> None:  # fmt: skip
        """A mark, with its interval. One that is below the picture stands at its lower edge."""
        left, top = self.px(x) + shift, self.py(y)
        if top > self.edge + 0.1:
            mark, top, kind, self.below = BELOW, self.edge - 4, f"{kind} beyond".strip(), True
        elif low is not None and high is not None:
            ends = [max(self.top, min(self.edge, self.py(v))) for v in (low, high)]
            bar = f"M{digits(left)} {digits(ends[0])}V{digits(ends[1])}"
            self.front.append(f'{group(look, kind)}<path class="e" d="{bar}"/></g>')
        place = f"translate({digits(left)} {digits(top)}) scale({digits(size)})"
        self.front.append(
            f"{group(look, kind, data_x=x, data_y=y, data_low=low, data_high=high)}"
            f'<title>{escape(says)}</title><path class="p" d="{mark or look.mark}" '
            f'transform="{place}"/></g>'
        )

    def svg(self) -> str:
        size = self.end - self.left, self.edge - self.top
        x, y, w, h = map(digits, (self.left, self.top, *size))
        clip = f'<svg x="{x}" y="{y}" width="{w}" height="{h}" viewBox="{x} {y} {w} {h}">'
        parts = [*self._grid(), clip, *self.back, "</svg>", *self.front, *self._spread()]
        return _svg(self.width, self.height, self.title, parts)

    def _grid(self) -> Iterable[str]:
        if self.title:
            yield text(0, 11, self.title, "t")
        for tick in self.y.ticks():
            y = self.py(tick)
            yield f'<path class="g" d="M{digits(self.left)} {digits(y)}H{digits(self.end)}"/>'
            yield text(self.left - 4, y + 3.5, self.y.form(tick), "k", "end")
        yield f'<path class="a" d="M{digits(self.left)} {digits(self.edge)}H{digits(self.end)}"/>'
        for tick in self.x.ticks():
            x = self.px(tick)
            yield f'<path class="a" d="M{digits(x)} {digits(self.edge)}v3"/>'
            yield text(x, self.edge + 13, self.x.form(tick), "k", "middle")
        if self.x.label:
            yield text((self.left + self.end) / 2, self.height - 5, self.x.label, "k", "middle")
        if self.y.label:
            turned = f"translate(9 {digits((self.top + self.edge) / 2)}) rotate(-90)"
            yield f'<text class="k" text-anchor="middle" transform="{turned}">'
            yield f"{escape(self.y.label)}</text>"

    def _spread(self) -> Iterable[str]:
        """Labels from top to bottom, each at the end of its line or as near as there is room."""
        labels = sorted(self.labels, key=lambda label: label[1])
        places = [max(self.top + 2, min(self.edge - 2, y)) for _, y, _, _ in labels]
        for n in range(1, len(places)):
            places[n] = max(places[n], places[n - 1] + LINE)
        limit = self.edge + 6
        for n in reversed(range(len(places))):
            places[n] = limit = min(places[n], limit)
            limit -= LINE
        for (x, y, content, css), place in zip(labels, places, strict=True):
            y = max(self.top, min(self.edge, y))
            way = f"M{digits(x + 4)} {digits(y)}L{digits(self.end + 7)} {digits(place)}"
            yield f'<g class="{css}"><path class="w" d="{way}"/>'
            yield text(self.end + 8, place + 3.5, content, "s") + "</g>"


def _svg(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    size = f"0 0 {digits(width)} {digits(height)}"
    label = attributes(aria_label=title or None)
    return f'<svg class="chart" viewBox="{size}" role="img"{label}>{"".join(parts)}</svg>\n'


def bars(look: Look, rows: dict[str, list[tuple[str, float]]]) -> str:
    """One bar per row, the mean of its values in 0..1, which are the points on it."""
    left = 8 + LETTER * max(map(len, rows), default=0)
    wide = WIDTH - left - 44
    parts = [text(0, 11, look.name, "t")]
    for n, (name, values) in enumerate(rows.items()):
        mean = statistics.fmean(value for _, value in values)
        y = 24 + n * 16
        parts.append(text(left - 5, y + 8, name, "k", "end"))

        shape = f"M{digits(left)} {y}h{digits(wide * mean)}v10H{digits(left)}z"
        begin = group(look, data_row=name, data_y=mean)
        parts.append(f'{begin}<path class="bar" d="{shape}"/>')
        for says, value in values:
            x, said = left + wide * value, escape(f"{says}: {value:.2f}")
            parts.append(f"<g{attributes(data_y=value)}><title>{said}</title>")
            parts.append(f'<circle class="o" cx="{digits(x)}" cy="{y + 5}" r="2.2"/></g>')
        beyond = left + wide * max(value for _, value in values) + 6
        parts += ["</g>", text(beyond, y + 8.5, f"{mean:.2f}", "k")]
    return _svg(WIDTH, 28 + 16 * len(rows), look.name, parts)


def parallel(
    title: str, axes: list[Axis], lines: list[tuple[Look, list[float | None], str, str]]
) -> str:
    """Parallel coordinates, the axes one below the other, so that their names never collide.

    Each line has its value on each axis (None: it has none there), its kind and what it says.
    """
    row, left, right = 42.0, 14.0, WIDTH - 14.0
    parts = [text(0, 11, title, "t")]
    heights = [38 + n * row for n in range(len(axes))]
    for place, (look, values, kind, says) in enumerate(lines):
        pieces: list[list[str]] = [[]]
        for axis, y, value in zip(axes, heights, values, strict=True):
            if value is None:
                pieces.append([])
                continue
            x = left + max(0.0, min(1.0, axis.share(value))) * (right - left)
            if axis.at:  # choices: lines would hide each other, so each has one of 13 places there
                x += (place * 7 % 13 - 6) * 1.6
            pieces[-1].append(f"{digits(x)} {digits(y)}")
        path = "".join(f"M{'L'.join(piece)}" for piece in pieces if len(piece) > 1)
        shown = " ".join("" if v is None else f"{v:.6g}" for v in values)
        parts.append(f"{group(look, kind, data_y=shown)}<title>{escape(says)}</title>")
        parts.append(f'<path class="l" d="{path}"/></g>')
    for axis, y in zip(axes, heights, strict=True):
        parts.append(f'<path class="a" d="M{digits(left)} {digits(y)}H{digits(right)}"/>')
        parts.append(text(left, y - 6, axis.label, "s halo"))
        for tick in axis.at or [axis.low, axis.high]:
            x = left + axis.share(tick) * (right - left)
            anchor = "middle" if axis.at else "start" if tick == axis.low else "end"
            parts.append(f'<path class="a" d="M{digits(x)} {digits(y - 3)}v6"/>')
            parts.append(text(x, y + 13, axis.form(tick), "k halo", anchor))
    return _svg(WIDTH, heights[-1] + 20, title, parts)
