"""A method of one's own, outside of the package: everything that ours have, and nothing needs it to
read what it left."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command import check_complete, environment, run, start, wait_for_reports

EXAMPLES = Path(__file__).parents[1] / "examples"
PAGE = Path(__file__).parents[1] / "docs/add-a-method.md"
TOY = ["epochs=2", "data.limit=200", "model.widths=[16]", "train.batch_size=32"]
TOY += ["wandb.mode=disabled", "scheduler.name=none", "trials=3"]
TOY += ["concurrency=3"]  # each is a process, which takes a while to start
MEMBERS = ["mest@0.2", "rigl@0.2"]


def test_the_page_about_it_shows_the_examples_and_what_it_says_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (_, rule), (_, check), (_, by_hand), (_, space), _ = blocks
    assert rule == "# mest.py\n" + (EXAMPLES / "mest.py").read_text()
    assert space == "# mest.yaml\n" + (EXAMPLES / "mest.yaml").read_text()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names: dict[str, object] = {}
    try:
        exec(check + by_hand, names)
    finally:
        sys.modules.pop("mest", None)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's folder after a sweep that was killed and resumed, and its confirmation."""
    folder = tmp_path_factory.mktemp("mine")
    shutil.copy(EXAMPLES / "mest.py", folder)
    (folder / "spaces").mkdir()
    shutil.copy(EXAMPLES / "mest.yaml", folder / "spaces")
    words = ["sweep", "spaces/mest.yaml", "rigl", "density=0.2", "name=own", *TOY]
    process = start(folder, *words)
    wait_for_reports(folder, process, 3)
    process.kill()
    process.wait()
    assert len((folder / "sweeps/own/mest@0.2/journal.jsonl").read_bytes().splitlines()) > 1
    run(folder, "resume", "own")
    run(folder, "confirm", "own", "seeds=2", "top=1")
    return folder


def test_it_is_swept_packed_beside_one_of_ours_and_survives_a_kill(swept: Path) -> None:
    for member in MEMBERS:
        record = check_complete(swept / "sweeps/own" / member, trials=3, epochs=2)
        assert record.generation == 2  # drivers: one was killed
    assert "Engine for own/mest@0.2, own/rigl@0.2: csr" in (swept / "out").read_text()
    record = check_complete(swept / "sweeps/own/mest@0.2", trials=3, epochs=2)
    assert record.header["code"]["users"] == {"mest.py": (swept / "mest.py").read_text()}
    rates = [t.reports[0].metrics["method/rate"] for t in record.trials.values()]
    assert len(set(rates)) == 3  # at the first epoch's update, half of each trial's fraction
    assert max(rates) < 0.3
    first = record.trials[0]  # the start point of mest.yaml
    assert first.params["hp.gradient_weight"] == 0.01
    assert first.reports[0].metrics["method/rate"] == pytest.approx(0.15, rel=0.01)


def elsewhere(swept: Path, folder: Path) -> list[str]:
    """Words for commands in `folder`, where there is no such method."""
    code = "import sparsetune.names, mest"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert "No module named 'mest'" in done.stderr
    return [f"storage={swept / 'sweeps'}"]


def test_status_and_compare_need_the_journal_alone(swept: Path, tmp_path: Path) -> None:
    words = elsewhere(swept, tmp_path)
    found = json.loads(run(tmp_path, "status", "own", "--json", *words).stdout)
    assert [member["name"] for member in found["members"]] == [f"own/{m}" for m in MEMBERS]
    here, there = (
        run(*where).stdout.partition("No ranking")[0]
        for where in ((swept, "compare", "own"), (tmp_path, "compare", "own", *words))
    )
    assert here == there
    assert re.search(r"^mest +\d", there, re.MULTILINE)
    assert "mest:METHOD" not in there


def test_the_page_has_a_line_for_it(swept: Path, tmp_path: Path) -> None:
    run(tmp_path, "report", "own", "--html", "page.html", *elsewhere(swept, tmp_path))
    page = (tmp_path / "page.html").read_text()
    for anchor in ("accuracy-against-density", "learning-curves", "best-of-k-against-k"):
        [figure] = re.findall(rf'<section id="{anchor}">.*?</section>', page, re.DOTALL)
        mine, ours = (
            set(re.findall(rf'<g class="(\w+)[^"]*" data-series="{name}"', figure))
            for name in ("mest", "rigl")
        )
        assert len(mine) == len(ours) == 1 and mine != ours
        for look in mine | ours:  # and the style sheet knows its colour
            assert re.search(rf"\.{look} {{ --c: #[0-9a-f]{{6}}", page), look


def test_frames_need_the_journal_alone(swept: Path, tmp_path: Path) -> None:
    code = (
        f"import sparsetune; f = sparsetune.load('own', storage={str(swept / 'sweeps')!r}); "
        "print(sorted(set(zip(f['space'], f['method'], f['kind']))), len(f))"
    )
    elsewhere(swept, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for space in ("mest", "rigl"):
        for kind in ("search", "confirm"):
            assert str((space, space, kind)) in done.stdout


def test_a_resume_elsewhere_says_what_is_missing(swept: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "resume", "own", *elsewhere(swept, tmp_path), "trials=5", check=2)
    assert "mest.py is not there any more" in done.stderr
    assert "Traceback" not in done.stderr
