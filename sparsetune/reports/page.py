"""A comparison and its searches as one HTML page: opened from a file, without a network or scripts.

The rule to know: what a user named may be anything, so all text goes through `escape`.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sparsetune.comparison.compare import Match, compare
from sparsetune.comparison.values import Comparison, Interval
from sparsetune.reports import search_figures
from sparsetune.reports.figures import Results, section, sparsity
from sparsetune.reports.search_figures import short
from sparsetune.reports.svg import Look, swatch
from sparsetune.reports.tables import Section, by_level, percent, sections
from sparsetune.space.words import storage_folder
from sparsetune.terminal import settings_shown, shown

OURS = '<meta name="generator" content="sparsetune report">'
BAD = ("broken", "infeasible", "unconfirmed", "unfinished")


def report(
    *names: str,
    html: str | Path | None = None,
    match: Match = "density",
    storage: str | Path | None = None,
) -> Path:
    """Writes a comparison as a page of its own, as `sparsetune report` does; where it is.

    `html`: the file, NAME.html by default. ValueError for one that is there and is no page of ours.
    """
    comparison = compare(*names, match=match, storage=storage)
    file = Path(html or f"{'-'.join(names).replace('/', '-')}.html")
    write(file, comparison, storage_folder(storage))
    return file.resolve()


def write(file: Path, comparison: Comparison, storage: Path) -> None:
    """ValueError for a file that is there and is no page of ours."""
    try:
        if file.exists() and OURS.encode() not in file.read_bytes()[:400]:
            raise ValueError(f"html: '{file}' is no page of sparsetune; give another --html FILE")
        file.write_text(
            page(comparison, search_figures.load(comparison, storage)), encoding="utf-8"
        )
    except OSError as error:
        raise ValueError(f"html: '{file}' cannot be written ({error.strerror})") from error


def page(comparison: Comparison, found: list[search_figures.Search]) -> str:
    names, results = " and ".join(comparison.names), Results(comparison)
    tables = [_tables(results, each) for each in sections(comparison)[:-1]]  # without the ranking
    parts = [results.main(), *tables, *results.figures(), *search_figures.figures(found)]
    rest = "".join([*parts, _winners(results), _about(comparison)])
    body = _head(comparison, names) + _verdict(results) + _contents(rest) + rest
    style = (Path(__file__).parent / "page.css").read_text()
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{OURS}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(names)}: a comparison</title>\n<style>\n{style}</style></head>\n"
        f"<body><main>\n{body}</main></body></html>\n"
    )


def _contents(body: str) -> str:
    found = re.findall(r'<section id="([^"]*)"><h2>(.*?)</h2>', body)
    links = " ".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in found)
    return f"<nav>{links}</nav>\n"


def _head(comparison: Comparison, names: str) -> str:
    about = comparison.about
    newest = datetime.fromtimestamp(about["newest"], UTC)
    versions = "; ".join(
        ", ".join(f"{key} {value}" for key, value in each.items()) for each in about["versions"]
    )
    said = [f"{about['network']} on {about['data']}, {about['epochs']} epochs"]
    said += [f"newest run {newest:%Y-%m-%d %H:%M} UTC", versions]
    lines = "".join(f"<p>{escape(line)}</p>" for line in filter(None, said))
    return f"<header><h1>{escape(names)}</h1>{lines}</header>\n"


def _verdict(results: Results) -> str:
    comparison, parts = results.comparison, []
    if comparison.ranking is None:
        for rule in comparison.rules:
            if rule.forbids and rule.state == "broken":
                parts.append(
                    f"<p>Rule {rule.number}, {escape(rule.title)}, is broken: "
                    f"{escape(rule.figure)}.</p><p>Mend it: <code>{escape(rule.mend)}</code></p>"
                )
        return f'<section class="box"><h2>No ranking</h2>{"".join(parts)}</section>\n'
    for level in comparison.ranking:
        items, out = "", ""
        for cell in sorted(
            results.at(level), key=lambda cell: -cell.mean.value if cell.mean else 0
        ):
            look = results.looks[cell.name]
            named = f"{swatch(look)}<b>{escape(look.name)}</b>"
            if cell in results.dense:
                out = f"<p>beside them: {named} {_interval(cell.mean)}</p>{out}"
            elif cell.state == "confirmed":
                items += f"<li>{named} {_interval(cell.mean)}</li>"
            else:
                out += f"<p>not ranked: {named}, {cell.state}: {escape(cell.note)}</p>"
        parts.append(f"<div><h3>{results.level(level)}</h3><ol>{items}</ol>{out}</div>")
    tested = [pair for pair in comparison.pairs if pair.different is not None]
    apart = sum(bool(pair.different) for pair in tested)
    told = (
        f"{apart} of {len(tested)} pairs are told apart (Holm-adjusted tests)."
        if tested
        else "Below 6 seeds no test can tell two methods apart: neighbours whose intervals "
        "overlap may stand in either order."
    )
    broken = [str(r.number) for r in comparison.rules if r.state == "broken"]
    if broken:
        told += f" Broken, without forbidding a ranking: rule {', '.join(broken)}."
    said = f"Test accuracy in %, mean over seeds with its 95 % interval. {told}"
    return section("Ranking", f'<p>{said}</p><div class="grid ranks">{"".join(parts)}</div>')


def _interval(mean: Interval | None) -> str:
    value, _, interval = percent(mean).partition(" ")
    return f"{value} <small>{interval}</small>"


def _tables(results: Results, found: Section) -> str:
    """A section of the terminal's, as one of the page's."""
    tables, css = [_plain(table) for table in found.tables], ""
    if tables[0][0][0] == ("density", "right"):  # the pairs: a table for each density
        (head, rows), css = tables[0], "grid pairs"
        title, *rest = head[1:]
        tables = [
            ([(f"{title[0]} at {level}", title[1]), *rest], [r[1:] for r in rows if r[0] == level])
            for level in dict.fromkeys(row[0] for row in rows)
        ]
    cells = by_level(results.comparison).get(found.title, [])
    notes = [f"{cell.name}, {cell.state}: {cell.note}" for cell in cells if cell.note]
    noted = {f"{cell.name}: {cell.note}" for cell in results.comparison.cells}
    notes += [line for line in found.lines if line not in noted]
    body = f'<div class="{css}">{"".join(_table(*t, results.by_space) for t in tables)}</div>'
    body += "".join(f"<p>{escape(line)}</p>" for line in notes)
    return section(found.title[0].upper() + found.title[1:], body)


Head = list[tuple[str, str]]  # (heading, "left" or "right")


def _plain(table: Table) -> tuple[Head, list[list[str]]]:
    columns = [
        [Text.from_markup(str(cell)).plain for cell in column.cells] for column in table.columns
    ]
    head = [(str(column.header), str(column.justify)) for column in table.columns]
    return head, [list(row) for row in zip(*columns, strict=True)]


def _table(head: Head, rows: list[list[str]], looks: dict[str, Look] | None = None) -> str:
    """`looks`: of what stands in a column "method"."""
    top = "".join(f'<th class="{side}">{escape(heading)}</th>' for heading, side in head)
    body = ""
    for row in rows:
        body += "<tr>"
        for (heading, side), content in zip(head, row, strict=True):
            css = side + " bad" * (content in BAD) + " wrap" * (len(content) > 28)
            look = (looks or {}).get(content) if heading == "method" else None
            mark = swatch(look) if look else ""
            body += f'<td class="{css}">{mark}{escape(content)}</td>'
        body += "</tr>\n"
    prose = ' class="prose"' if ' wrap"' in body else ""
    table = f"<table{prose}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'  # scrolls by itself where it is too wide


def _winners(results: Results) -> str:
    parts = []
    for look, cells in results.series.items():
        found = [(cell.density, cell.chosen) for cell in cells if cell.chosen]
        lines = [line for _, line in found]
        head = [("" if d is None else sparsity(d), "right") for d, _ in found]
        rows = [["trial", *(str(line.trial) for line in lines)]]
        for key in dict.fromkeys(key for line in lines for key in line.config):
            values = [shown(line.config[key]) if key in line.config else "" for line in lines]
            rows.append([short(key), *values])
        parts += [_table([(look.name, "left"), *head], rows)] if found else []
    said = (
        "<p>By the mean validation accuracy of their ranking on fresh seeds, by sparsity; what is "
        "not named is as in the search space below.</p>"
    )
    grid = f'{said}<div class="grid">{"".join(parts)}</div>'
    return section("Configuration of the winners", grid) if parts else ""


def _about(comparison: Comparison) -> str:
    about = comparison.about
    spaces: dict[str, list[dict[str, Any]]] = {}  # of each density
    for name, space in about["spaces"].items():
        spaces.setdefault(name.partition("@")[0], []).append(space)
    fixed = [space["fixed"] for each in spaces.values() for space in each]
    common = {
        key: value
        for key, value in fixed[0].items()
        if len(spaces) > 1 and all(other.get(key) == value for other in fixed)
    }
    said = {
        "commands": "\n".join(about["commands"]),
        "hardware": "; ".join(map(str, about["hardware"])),
        "search": f"{about['sampler']}, seed {about['seed']}, {about['epochs']} epochs",
        "early stopping": str(about["scheduler"]),
        "matched by": comparison.match,
        "confirmation seeds": ", ".join(map(str, comparison.seeds)),
        "fixed for all": settings_shown(common),
    }
    rows = "".join(
        f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in said.items() if value
    )
    tables = "".join(_space(name, found, common) for name, found in spaces.items())
    return section(
        "About", f'<dl>{rows}</dl><h3>Search spaces</h3><div class="grid">{tables}</div>'
    )


def _space(name: str, found: list[dict[str, Any]], common: dict[str, Any]) -> str:
    """A search space, which may fix something else at each density."""
    first = found[0]
    rows = [[short(key), _range(words)] for key, words in first["search"].items()]
    for key in (key for key in first["fixed"] if key not in common):
        values = [shown(each["fixed"].get(key)) or "none" for each in found]
        rows.append([short(key), f"fixed: {' or '.join(dict.fromkeys(values))}"])
    rows += [[f"start: {point}", settings_shown(of)] for point, of in first["start"].items()]
    return _table([(name, "left"), ("searched", "left")], rows)


def _range(words: dict[str, Any]) -> str:
    if "choices" in words:
        said = ", ".join(shown(choice) for choice in words["choices"])
    else:
        said = f"{words['low']:g} to {words['high']:g}" + (", log" if words.get("log") else "")
        said += f", step {words['step']:g}" if words.get("step") else ""
    when = words.get("when", {})
    also = [f"{short(key)} is {' or '.join(map(shown, values))}" for key, values in when.items()]
    return said + (f" (where {' and '.join(also)})" if also else "")
