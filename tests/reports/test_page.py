"""The page: what it says is what the comparison says, and a browser shows all of it offline."""

from __future__ import annotations

import csv
import io
import itertools
import random
import re
import runpy
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.chromium import PROGRAM, chromium
from helpers.toy_comparison import ALL, toy

from sparsetune.cli import main
from sparsetune.comparison.intervals import mean
from sparsetune.comparison.values import Comparison
from sparsetune.reports import search_figures
from sparsetune.reports.figures import Results, look_of
from sparsetune.reports.page import OURS, html, write
from sparsetune.reports.runs_csv import write_csv
from sparsetune.reports.svg import BELOW, CROSS, PALETTE, Axis, Chart, Look, around, style
from sparsetune.reports.tables import percent

FIGURES = [
    "accuracy-against-density", "accuracy-against-flops", "learning-curves",
    "density-per-layer-over-training", "best-of-k-against-k", "search-history",
    "parallel-coordinates", "importance-of-what-was-searched",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    """A storage, and what was compared in it."""
    folder = tmp_path_factory.mktemp("toy")
    return folder, toy(folder, ("set", "dst", "static", "small_dense", "dense"), trials=12)


def drawn(made: tuple[Path, Comparison]) -> str:
    folder, comparison = made
    return html(comparison, search_figures.load(comparison, folder))


def part(page: str, anchor: str) -> str:
    (found,) = re.findall(rf'<section id="{anchor}">.*?</section>', page, re.DOTALL)
    assert isinstance(found, str)
    return found


def points(page: str, anchor: str) -> list[dict[str, str]]:
    """Attributes of the marks of a figure."""
    marks = re.findall(r"<g ([^>]*data-x[^>]*)>", part(page, anchor))
    return [dict(re.findall(r'([\w-]+)="([^"]*)"', mark)) for mark in marks]


def test_pictures_carry_the_values_of_the_csv(made: tuple[Path, Comparison]) -> None:
    file = io.StringIO()
    write_csv(made[1], file)
    file.seek(0)
    runs: dict[str, list[float]] = {}
    for row in csv.DictReader(file):
        if row["setting"] == "chosen" and row["density asked"]:
            runs.setdefault(f"{row['space']} {row['density']}", []).append(
                float(row["test accuracy"])
            )
    page = drawn(made)
    found = {
        f"{each['data-series']} {each['data-x']}": each
        for each in points(page, "accuracy-against-density")
        if "data-low" in each
    }
    assert found.keys() == runs.keys()
    assert len(found) == 3 * 4 - 1  # DST is infeasible at the lowest density
    for key, values in runs.items():
        expected = mean(values)
        assert [float(found[key][f"data-{k}"]) for k in ("y", "low", "high")] == list(expected)
        assert percent(expected) in page  # and in the tables


def test_the_ranking_is_the_comparisons(made: tuple[Path, Comparison]) -> None:
    ranking = made[1].ranking
    assert ranking is not None
    lists = re.findall(r"<ol>(.*?)</ol>", drawn(made), re.DOTALL)
    assert [re.findall(r"<b>(.*?)</b>", each) for each in lists] == list(ranking.values())
    assert "not ranked" in part(drawn(made), "ranking")
    assert "none of its" in part(drawn(made), "ranking")


def test_without_a_ranking_there_is_the_reason_and_what_mends_it(
    made: tuple[Path, Comparison],
) -> None:
    folder, comparison = made
    rules = list(comparison.rules)
    rules[3] = replace(rules[3], state="broken", figure="2 seeds", mend="sparsetune confirm toy")
    page = drawn((folder, replace(comparison, rules=rules, ranking=None)))
    (box,) = re.findall(r'<section class="box">.*?</section>', page, re.DOTALL)
    assert "Rule 4" in box
    assert "2 seeds" in box
    assert "<code>sparsetune confirm toy</code>" in box
    assert "<ol>" not in page


def test_every_figure_says_from_which_runs_it_is(made: tuple[Path, Comparison]) -> None:
    page = drawn(made)
    for anchor in FIGURES:
        figure = part(page, anchor)
        (caption,) = re.findall(r"<figcaption>(.*?)</figcaption>", figure)
        searched = FIGURES.index(anchor) > 3
        assert ("Search runs" if searched else "Confirmation runs, 5 seeds each") in caption
        assert figure.count('class="chart"') >= 1
    assert part(page, "search-history").count('class="chart"') == 3 * 4 + 1
    assert part(page, "parallel-coordinates").count('class="chart"') == 5
    for rule in made[1].rules:
        assert rule.title.replace("'", "&#39;") in page


def test_names_cannot_break_the_page(made: tuple[Path, Comparison]) -> None:
    folder, comparison = made
    cells = [
        replace(cell, space="<b>set", name=cell.name.replace("/set", "/<b>set"))
        if cell.space == "set"
        else replace(cell, note='"><script>alert(1)</script>')
        for cell in comparison.cells
    ]
    names = {old.name: new.name for old, new in zip(comparison.cells, cells, strict=True)}
    levels = {k: [names[name] for name in v] for k, v in comparison.levels.items()}
    found = search_figures.load(comparison, folder)
    about = comparison.about | {"commands": ["sparsetune sweep <b>set"]}
    odd = replace(comparison, cells=cells, levels=levels, about=about, ranking=None)
    page = html(odd, found)
    assert "<script" not in page
    assert "<b>set" not in page.replace("<b>set</b>", "")
    assert "&lt;b&gt;set" in page


def test_the_page_asks_nobody(made: tuple[Path, Comparison]) -> None:
    page = drawn(made)
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert not re.findall(r"https?://|url\(|@import|<script", page)
    # every section is in the list of contents
    assert re.findall(r'<a href="#([^"]*)"', page) == re.findall(r'<section id="([^"]*)"', page)[1:]


def test_a_comparison_without_any_result(made: tuple[Path, Comparison]) -> None:
    folder, comparison = made
    cells = [
        replace(cell, state="unconfirmed", note="do so", chosen=None, paper=None, mean=None,
                iqm=None, paper_mean=None)
        for cell in comparison.cells
    ]  # fmt: skip
    page = drawn((folder, replace(comparison, cells=cells, pairs=[], ranking=None)))
    assert "unconfirmed: do so" in page
    assert "accuracy-against-density" not in page
    assert part(page, "search-history")


def test_the_command(made: tuple[Path, Comparison], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["report", "toy", f"storage={made[0]}"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert done.output.strip() == str(tmp_path / "toy.html")
    assert OURS in (tmp_path / "toy.html").read_text()
    assert CliRunner().invoke(main, words).exit_code == 0  # our own page is written anew
    (tmp_path / "mine.html").write_text("<p>my own")
    done = CliRunner().invoke(main, [*words, "--html", "mine.html"])
    assert done.exit_code == 2
    assert "no page of sparsetune" in done.output
    assert (tmp_path / "mine.html").read_text() == "<p>my own"
    done = CliRunner().invoke(main, [*words, "--html", "none/here.html"])
    assert done.exit_code == 2
    assert "cannot be written" in done.output


def test_the_main_picture_as_a_file(
    made: tuple[Path, Comparison], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("SPARSETUNE_STORAGE", str(made[0]))
    monkeypatch.setattr(sys, "argv", ["picture.py", "toy", str(tmp_path / "toy.svg")])
    runpy.run_path(str(Path(__file__).parents[2] / "scripts/picture.py"), run_name="__main__")
    picture = ElementTree.parse(tmp_path / "toy.svg").getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert style() in (picture.findtext("{http://www.w3.org/2000/svg}style") or "")
    series = {group.get("data-series") for group in picture.iter("{http://www.w3.org/2000/svg}g")}
    assert {"set", "dst", "static", "small_dense", "dense"} <= series


def test_importance_knows_that_high_is_good(made: tuple[Path, Comparison]) -> None:
    """The best trials share one value of `wanted`, the worst one value of `useless`."""
    search = next(s for s in search_figures.load(made[1], made[0]) if s.look.name == "set")
    chance = random.Random(0)
    for trial in search.record.trials.values():
        rate = 0.1 if trial.number % 4 == 0 else chance.uniform(0.2, 0.5)
        trial.params["optimizer.lr"] = rate
        trial.in_study, trial.status = True, "finished"
        trial.params |= {"hp.zeta": chance.uniform(0.1, 0.5), "variant.new_value": "zero"}
        trial.params |= {"variant.decay": "none", "optimizer.weight_decay": 1e-4}
        trial.fixed.clear()
        accuracy = 0.9 if rate == 0.1 else 0.5 + chance.random() / 10
        trial.reports[-1].metrics["val/accuracy"] = accuracy
    shares = search_figures.importance(search)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert max(shares, key=shares.__getitem__) == "optimizer.lr"


def test_methods_that_nobody_knows_are_seen_in_every_figure(made: tuple[Path, Comparison]) -> None:
    """More of them than there are colours: each has the same colour and mark everywhere."""
    folder, comparison = made
    names = [f"own{n}" for n in range(len(PALETTE) + 2)]
    known = [cell for cell in comparison.cells if cell.space == "set"]
    cells = [
        replace(cell, **{key: getattr(cell, key).replace("set", name) for key in
                         ("name", "space", "member", "method")})
        for name in names for cell in known
    ]  # fmt: skip
    levels = {
        level: [cell.replace("set", name) for name in names for cell in at if "/set@" in cell]
        for level, at in comparison.levels.items()
    }
    cells += [cell for cell in comparison.cells if cell.space == "dense"]
    many = replace(comparison, cells=cells, levels=levels)
    loaded = [s for s in search_figures.load(comparison, folder) if s.look.name == "set"]
    searches = [replace(s, look=look_of(many, name, name)) for name in names for s in loaded]

    results = Results(many)
    figures = [results.main(), *results.figures(), *search_figures.figures(searches)]
    expected = [
        {"l", "e", "p"}, {"l", "e", "p"}, {"l", "b"}, None, {"l"}, {"l", "p"}, {"l"}, {"bar", "o"},
    ]  # fmt: skip
    light, dark = style().rsplit("@media screen and (prefers-color-scheme: dark)", 1)
    looks: dict[str, set[tuple[str, str]]] = {name: set() for name in names}
    for figure, shapes in zip(figures, expected, strict=True):
        drawn: dict[str, set[str]] = {name: set() for name in names}
        pictures = [ElementTree.fromstring(picture) for picture in figure.pictures if picture]
        for group in (group for picture in pictures for group in picture.iter("g")):
            if (name := group.get("data-series", "")) in drawn:
                drawn[name] |= {shape.get("class", "") for shape in group.iter()}
                (colour,) = re.findall(r"\bc\d+\b", group.get("class", ""))
                assert f".{colour} {{ --c: #" in light and f".{colour} {{ --c: #" in dark
                marks = {
                    path.get("d", "") for path in group.iter("path") if path.get("class") == "p"
                }
                looks[name] |= {(colour, mark) for mark in marks - {CROSS, BELOW}}
        assert not shapes or all(shapes <= seen for seen in drawn.values()), figure.title
    assert {len(seen) for seen in looks.values()} == {1}
    assert len(set.union(*looks.values())) == len(names)


# Charts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0, 10), [0, 2, 4, 6, 8, 10]),
        (Axis(0.931, 0.985), [0.94, 0.96, 0.98]),
        (Axis(0.01, 10, log=True), [0.01, 0.1, 1, 10]),
        (Axis(1, 10, log=True), [1, 2, 5, 10]),
        (Axis(90, 110, log=True), [90, 95, 100, 105, 110]),
        (Axis(5, 1), [1, 2, 3, 4, 5]),
    ],
)
def test_ticks_are_round(axis: Axis, ticks: list[float]) -> None:
    assert list(axis.ticks()) == pytest.approx(ticks)
    assert axis.share(axis.low) == 0
    assert axis.share(axis.high) == pytest.approx(1)


def test_an_axis_around_one_value_or_none() -> None:
    for values in ([], [0.5], [float("nan"), 0.5]):
        axis = around(values)
        assert axis.low < axis.high
        assert len(axis.ticks()) >= 2


def test_labels_keep_apart_and_inside() -> None:
    chart = Chart(Axis(0, 1), Axis(0, 1), names=["a"])
    for n in range(9):
        chart.label(Look(str(n), "set"), 1.0, 0.001 * n, f"series {n}")
    found = re.findall(r'<text x="[\d.]+" y="([\d.]+)" class="s">series (\d)<', chart.svg())
    heights = [float(y) for y, _ in found]
    assert [int(name) for _, name in found] == list(range(8, -1, -1))  # as their lines, from above
    assert all(b - a >= 10.9 for a, b in itertools.pairwise(heights))
    assert 0 < heights[0] < heights[-1] < chart.height


# In a browser -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="needs Debian's chromium")
def test_a_browser_shows_all_of_it(tmp_path: Path) -> None:
    """25 members of 24 trials."""
    comparison = toy(tmp_path, ALL)
    file = tmp_path / "toy.html"
    write(file, comparison, tmp_path)
    assert file.stat().st_size < 2_000_000
    with chromium() as page:
        for width, dark in ((1300, False), (1300, True), (360, False)):
            page.open(file, width, dark=dark)
            # Only tables may be wider than the screen, and they scroll by themselves.
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            # Each picture has marks, and none of its texts is outside of it or the screen.
            empty, outside, total = page.evaluate(
                """(() => {
                  const charts = [...document.querySelectorAll('svg.chart')];
                  const marks = c => [...c.querySelectorAll('.l, .p, .bar')].filter(
                      m => m.getBoundingClientRect().width + m.getBoundingClientRect().height > 0);
                  const out = c => [...c.querySelectorAll('text')].filter(t => {
                      const a = t.getBoundingClientRect(), b = c.getBoundingClientRect();
                      return a.left < b.left - 2 || a.right > b.right + 2
                          || a.top < b.top - 4 || a.bottom > b.bottom + 4; });
                  return [charts.filter(c => !marks(c).length).length,
                          charts.flatMap(out).map(t => t.textContent), charts.length]; })()"""
            )
            assert (empty, outside) == (0, [])
            assert total == 1 + 2 + 6 + 17 + 3 + 25 + 9 + 9
            back = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert back == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    told = [event.get("method") for event in page.events]
    assert not {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"} & {*told}
    asked = [e["params"]["request"]["url"] for e in page.events
             if e.get("method") == "Network.requestWillBeSent"]  # fmt: skip
    assert asked == [file.resolve().as_uri()] * 3
