"""`sparsetune settings`: every key is there, with what stands at its field."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from sparsetune.cli import main
from sparsetune.reports import settings_table
from sparsetune.reports.settings_table import Row
from sparsetune.space import config

DOCS = Path(__file__).parents[2] / "docs/settings.md"


def printed(*words: str, status: int = 0) -> str:
    done = CliRunner().invoke(main, ["settings", *words])
    assert done.exit_code == status, done.output
    return done.output


def test_the_committed_table_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSETUNE_STORAGE", "elsewhere")  # no default is this machine's
    header, _, table = DOCS.read_text().partition("\n| key ")
    assert header.startswith("# Settings\n") and header.count("\n") < 8
    wanted = printed("--markdown")
    assert f"| key {table}" == wanted, "sparsetune settings --markdown prints another table"


def test_every_key_is_there_once_and_explained() -> None:
    rows = settings_table.rows()
    assert [row.key.removesuffix(".NAME") for row in rows] == list(config.KEYS)
    assert all(row.meaning for row in rows)
    known = {row.key: row for row in rows}
    assert known["optimizer.name"].allowed == "sgd | adamw"
    assert known["optimizer.lr"][1:3] == ("number, above 0, up to 1e30", "0.1")
    assert known["order_seed"][1:3] == ("whole number, 0 or more, or null", "null")
    assert known["model.widths"].default == "[300, 100]"


def test_a_key_or_a_group() -> None:
    one = printed("optimizer.lr")
    assert one.startswith("optimizer.lr: learning rate")
    assert "above 0, up to 1e30" in one and "a space may search it, as lr" in one
    assert "the same for all trials of a search" in printed("epochs")
    assert "resume may change it" in printed("device")
    group = printed("scheduler")
    assert group.startswith("Early stopping.")
    assert "scheduler.grace" in group and "optimizer" not in group
    assert [row.key for row in settings_table.rows("schedule")] == [
        "schedule.name",
        "schedule.milestones",
        "schedule.gamma",
    ]


def test_what_methods_and_users_name_themselves() -> None:
    assert Row(
        "hp.zeta", "number, 0 to 1", "0.3", "set: share of each sign dropped, section Methods"
    ) in settings_table.rows("hp.zeta")
    assert {row.meaning for row in settings_table.rows("variant.growth")} == {"dsr", "sm"}
    assert [row.key for row in settings_table.rows("constraint.density/all")] == ["constraint.NAME"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lr", "lr: no such key; did you mean optimizer.lr?"),
        ("hp.zetta", "hp.zetta: no such key; did you mean hp.zeta?"),
        ("optimizer.lrr", "optimizer.lrr: no such key; did you mean optimizer.lr"),
        ("xyzzy", "xyzzy: no such key; there are: method, hp.*"),
    ],
)
def test_an_unknown_key(key: str, message: str) -> None:
    assert f"sparsetune: {message}" in printed(key, status=2)
