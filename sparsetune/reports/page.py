"""A comparison and its searches as one HTML page: opened from a file, without a network or scripts.

The rule to know: what a user named may be anything, so the template escapes all text; only
pictures, which escape their own, are marked as safe.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from sparsetune.comparison.compare import Match, compare
from sparsetune.comparison.values import Comparison
from sparsetune.reports import search_figures, tables
from sparsetune.reports.figures import Figure, Results, sparsity
from sparsetune.reports.search_figures import Search
from sparsetune.reports.svg import style
from sparsetune.reports.tables import Column, Section, Table, best_first, percent
from sparsetune.space.words import storage_folder
from sparsetune.terminal import settings_shown, short, shown

OURS = '<meta name="generator" content="sparsetune report">'


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
            html(comparison, search_figures.load(comparison, storage)), encoding="utf-8"
        )
    except OSError as error:
        raise ValueError(f"html: '{file}' cannot be written ({error.strerror})") from error


def html(comparison: Comparison, searches: list[Search]) -> str:
    results, ranking = Results(comparison), comparison.ranking or {}
    parts: list[Figure | Section] = [results.main(), *_tables(comparison), *results.figures()]
    parts += [*search_figures.figures(searches), _winners(results)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"anchor": _anchor, "percent": percent}
    return environment.get_template("page.html.jinja").render(
        style=style(),
        comparison=comparison,
        names=" and ".join(comparison.names),
        newest=datetime.fromtimestamp(comparison.about["newest"], UTC),
        results=results,
        ranking={results.level(level): best_first(results.at(level)) for level in ranking},
        parts=[p for p in parts if (any(p.pictures) if isinstance(p, Figure) else p.tables)],
        **_about(comparison),
    )


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _tables(comparison: Comparison) -> list[Section]:
    """The sections of the terminal, with notes beside their cells, and pairs by density."""
    parts = []
    for title, cells in tables.by_level(comparison).items():
        section = tables.at_level(title, cells)
        notes = [f"{cell.name}, {cell.state}: {cell.note}" for cell in cells if cell.note]
        parts.append(section._replace(notes=[*notes, *section.notes]))
    if comparison.pairs:
        pairs = tables.pairs(comparison)
        parts.append(pairs._replace(tables=pairs.tables[0].split(), css="grid pairs"))
    rules = tables.rules(comparison)
    noted = {f"{cell.name}: {cell.note}" for cell in comparison.cells}
    parts.append(rules._replace(notes=[note for note in rules.notes if note not in noted]))
    return [part._replace(title=part.title[0].upper() + part.title[1:]) for part in parts]


def _winners(results: Results) -> Section:
    made = []
    for look, cells in results.series.items():
        lines = [cell.chosen for cell in cells if cell.chosen]
        densities = [cell.density for cell in cells if cell.chosen]
        head = [Column("" if d is None else sparsity(d)) for d in densities]
        rows = [["trial", *(str(line.trial) for line in lines)]]
        for key in dict.fromkeys(key for line in lines for key in line.config):
            values = [shown(line.config[key]) if key in line.config else "" for line in lines]
            rows.append([short(key), *values])
        made += [Table([Column(look.name, "left"), *head], rows)] if lines else []
    lead = (
        "By the mean validation accuracy of their ranking on fresh seeds, by sparsity; what is "
        "not named is as in the search space below."
    )
    return Section("Configuration of the winners", made, css="grid", lead=lead)


def _about(comparison: Comparison) -> dict[str, Any]:
    about = comparison.about
    spaces: dict[str, list[dict[str, Any]]] = {}  # of each density
    for name, space in about["spaces"].items():
        spaces.setdefault(name.partition("@")[0], []).append(space)
    fixed = [space["fixed"] for same in spaces.values() for space in same]
    common = {
        key: value
        for key, value in fixed[0].items()
        if len(spaces) > 1 and all(other.get(key) == value for other in fixed)
    }
    facts = {
        "commands": "\n".join(about["commands"]),
        "hardware": "; ".join(map(str, about["hardware"])),
        "search": f"{about['sampler']}, seed {about['seed']}, {about['epochs']} epochs",
        "early stopping": str(about["scheduler"]),
        "matched by": comparison.match,
        "confirmation seeds": ", ".join(map(str, comparison.seeds)),
        "fixed for all": settings_shown(common),
    }
    return {
        "facts": {name: value for name, value in facts.items() if value},
        "spaces": [_space(name, same, common) for name, same in spaces.items()],
    }


def _space(name: str, spaces: list[dict[str, Any]], common: dict[str, Any]) -> Table:
    """A search space, which may fix something else at each density."""
    first = spaces[0]
    rows = [[short(key), _range(words)] for key, words in first["search"].items()]
    for key in (key for key in first["fixed"] if key not in common):
        values = [shown(space["fixed"].get(key)) or "none" for space in spaces]
        rows.append([short(key), f"fixed: {' or '.join(dict.fromkeys(values))}"])
    rows += [[f"start: {point}", settings_shown(of)] for point, of in first["start"].items()]
    return Table([Column(name, "left"), Column("searched", "left")], rows)


def _range(words: dict[str, Any]) -> str:
    if "choices" in words:
        values = ", ".join(shown(choice) for choice in words["choices"])
    else:
        values = f"{words['low']:g} to {words['high']:g}" + (", log" if words.get("log") else "")
        values += f", step {words['step']:g}" if words.get("step") else ""
    when = words.get("when", {})
    also = [f"{short(key)} is {' or '.join(map(shown, of))}" for key, of in when.items()]
    return values + (f" (where {' and '.join(also)})" if also else "")
