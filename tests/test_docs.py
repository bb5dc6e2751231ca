"""What the documentation says is run: every code block, every link, every command.

The blocks of a page are run in their order, in a folder of the page's own:

python  by this process, in one namespace per page. One that begins with `# NAME.py` is a reader's
        module: it is written to that file, and what comes later imports it.
yaml    is loaded as a search space; it is written to the file that its first line names.
bash    Each `sparsetune` command goes through the command line itself, with what it says, and must
        end as it should. Only training is taken out. `sweep` is tried with --dry-run, and then its
        journals are written with trials that are told instead of trained (helpers/told_sweep.py),
        so that `status`, `compare` and `report` after it are run for real; `train`, `resume` and
        `confirm` do all but train, `resume` on a copy. What would need a checkpoint, a server or
        a login (`export`, `dashboard`, `report --wandb`) is parsed by click, and its NAME must be
        there. Of other programs the files must exist, a script must know its options, pip's extras
        must be ours; `python -c` is run.
        A folder called FOLDER holds small files of MNIST's form, and s3:// is a folder, too.
text    is output and is not run. No other word may stand behind a fence.

A comment before a block changes this: `<!-- test: slow -->` has the Python block run by
`pytest -m slow` alone (it starts Ray), otherwise it is compiled only; `<!-- test: setup NAME -->`
calls a function of SETUPS, for what a page takes for granted.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from urllib.parse import urlparse

import click
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.told_sweep import accuracy, confirmed, told

import sparsetune
from sparsetune.cli import main
from sparsetune.methods import METHODS
from sparsetune.space import files
from sparsetune.space.member import Member
from sparsetune.store.journal import Trial
from sparsetune.store.layout import member_folders
from sparsetune.store.paths import place

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LINES = 170  # of the README
SHORT = ["trials=4", "epochs=2"]  # of told sweeps: the start points, and two that may be confirmed
PROGRAMS = {"bash", "export", "git", "kubectl", "pip", "pytest", "python", "ray", "sbatch", "wandb"}


class Block(NamedTuple):
    line: int  # of its first line within the page
    kind: str  # the word after the fence, or "setup"
    text: str
    slow: bool = False


def blocks(page: Path) -> Iterator[Block]:
    kind, start, inside, slow = None, 0, [], False
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.startswith("```"):
            if kind is None:
                kind, start, inside = line[3:].strip(), number + 1, []
            else:
                yield Block(start, kind, "\n".join(inside) + "\n", slow)
                kind, slow = None, False
        elif kind is not None:
            inside.append(line)
        elif comment := re.fullmatch(r"<!-- test: (slow|setup (\w+)) -->", line):
            slow = slow or comment[2] is None
            if comment[2]:
                yield Block(number, "setup", comment[2])
    assert kind is None, f"{page.name}:{start}: the block has no end"


# Running ------------------------------------------------------------------------------------------


class Reader:
    """Somebody who does what a page says, in a folder."""

    def __init__(self, page: Path, slow: bool, folder: Path) -> None:
        self.page, self.slow, self.folder = page, slow, folder
        self.namespace: dict[str, Any] = {"__name__": "__main__"}

    def do(self, block: Block) -> None:
        kinds: dict[str, Callable[[Block], None]] = {
            "python": self.python,
            "yaml": self.yaml,
            "bash": self.bash,
            "text": lambda block: None,
            "setup": lambda block: SETUPS[block.text](),
        }
        assert block.kind in kinds, f"'{block.kind}' is none of {', '.join(kinds)}"
        kinds[block.kind](block)

    def python(self, block: Block) -> None:
        code = compile(block.text, f"{self.page.name}:{block.line}", "exec")
        if file := re.match(r"# (\w+\.py)\b", block.text):
            Path(file[1]).write_text(block.text)
        elif self.slow or not block.slow:
            exec(code, self.namespace)
        else:
            for name in re.findall(r"\bsparsetune\.(\w+)\(", block.text):
                assert hasattr(sparsetune, name), f"sparsetune has no {name}"

    def yaml(self, block: Block) -> None:
        file = re.match(r"# (\w+\.yaml)\b", block.text)
        assert file, "a yaml block opens with its file's name: # mine.yaml"
        Path(file[1]).write_text(block.text)
        files.load(f"./{file[1]}")

    def bash(self, block: Block) -> None:
        for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
            words = [word for word in shlex.split(line, comments=True) if word != "&"]
            program = next((n for n, w in enumerate(words) if Path(w).name == "sparsetune"), None)
            other = words if program is None else words[:program]
            if other:
                check_program(line, [word for word in other if word != "--"])
            if program is not None:
                sparsetune_command([w.replace("s3://", "s3/") for w in words[program + 1 :]])


def check_program(line: str, words: list[str]) -> None:
    program, *rest = words
    assert program in PROGRAMS, f"{program}: not among the programs that pages may call"
    files = [word for word in rest if re.match(r"(scripts|tests|docs|search_spaces|\.ci)/", word)]
    for file in files:
        assert (ROOT / file).exists(), f"{line}: there is no {file}"
    if rest[:1] == ["-c"]:
        exec(rest[1], {})
    if program == "python" and files:
        script = (ROOT / files[0]).read_text()
        for option in (word for word in rest if word.startswith("--")):
            assert f'"{option}"' in script, f"{line}: {files[0]} has no {option}"
    if program == "pip":
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extras in re.findall(r"sparsetune\[([\w,]+)\]", line):
            assert set(extras.split(",")) <= set(known["optional-dependencies"]), line


def sparsetune_command(words: list[str]) -> None:
    command, *rest = words
    parsed = main.commands[command].make_context(command, rest.copy(), resilient_parsing=False)
    named = [word for word in parsed.params.get("words", ()) if "=" not in word]
    keys = dict(word.split("=", 1) for word in rest if "=" in word and word[0] != "-")
    storage = place(keys.get("storage", "sweeps"))
    if command in ("export", "dashboard") or parsed.params.get("target"):
        assert member_folders(storage, named[0])
    elif command == "sweep":
        invoke([*words, "--dry-run"])
        if "--dry-run" not in rest:
            told(storage, named, *(word for word in rest if "=" in word), *SHORT, tell=tell)
    else:
        before = tempfile.mkdtemp()
        if command == "resume":
            shutil.copytree(storage, before, dirs_exist_ok=True)
        with untrained():
            invoke(words)
        if command == "resume":  # what it asked for was not trained
            shutil.rmtree(storage)
            shutil.copytree(before, storage)
        shutil.rmtree(before)
        if command == "confirm":
            asked = [
                f"{k}={v}" for k, v in keys.items() if k in ("seeds", "top", "full", "density")
            ]
            sweep, _, member = named[0].partition("/")
            confirmed(storage / sweep, *asked, tell=tell, name=named[0] if member else "")


def tell(one: Member, trial: Trial, role: str) -> dict[str, float] | str:
    """Where density emerges, it is low enough for any bound of these pages."""
    metrics = accuracy(one, trial, role)
    assert isinstance(metrics, dict)
    low = {"density/all": 0.01, "density/sparse": 0.01} if one.method.emergent else {}
    return metrics | low


def invoke(words: list[str]) -> str:
    done = CliRunner().invoke(main, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, f"sparsetune {shlex.join(words)}\n{done.output}"
    return done.output


@contextmanager
def untrained() -> Iterator[None]:
    """Commands do all that they do before training, and end as if nothing had been missing."""
    with pytest.MonkeyPatch.context() as patch:
        done = {"state": "finished", "members": []}
        patch.setattr("sparsetune.sweeps.run.run", lambda members: done)
        patch.setattr("sparsetune.comparison.confirm.run", lambda confirmations: done)
        yield


def quickstart() -> None:
    """The sweep of scripts/quickstart.sh, told."""
    script = (ROOT / "scripts/quickstart.sh").read_text().replace("\\\n", " ")
    line = next(line for line in script.splitlines() if ".venv/bin/sparsetune sweep" in line)
    words = shlex.split(line.replace('"$name"', "quickstart"))
    sparsetune_command(words[words.index("sweep") :])


def mnist() -> None:
    """A finished sweep of MNIST's form."""
    told(Path("sweeps"), ["set", "dense"], "name=mnist", "density=0.02,0.05", *SHORT)


def confirmed_mnist() -> None:
    mnist()
    confirmed(Path("sweeps/mnist"))


def exported() -> None:
    """best.pt, of a network that was trained."""
    toy = ["model.widths=[16]", "data.limit=200", "train.batch_size=32", "wandb.mode=disabled"]
    invoke(["train", "set", "name=trained", "density=0.1", "epochs=1", *toy])
    invoke(["export", "trained", "best.pt"])


SETUPS: dict[str, Callable[[], None]] = {
    "quickstart": quickstart,
    "mnist": mnist,
    "confirmed": confirmed_mnist,
    "exported": exported,
}


def idx(path: Path, values: np.ndarray[Any, Any]) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a reader works: FOLDER holds data, and modules are found."""
    for name in [name for name in os.environ if name.startswith(("WANDB", "SPARSETUNE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SPARSETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("HOME", str(tmp_path))  # Tune writes to ~/ray_results
    monkeypatch.setattr(os, "fsync", lambda file: None)  # nobody pulls the plug here
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "FOLDER").mkdir()
    chance = np.random.default_rng(0)
    for stem, num in (("train", 300), ("t10k", 60)):
        images, labels = chance.integers(0, 256, (num, 28, 28)), np.arange(num) % 10
        idx(tmp_path / f"FOLDER/{stem}-images-idx3-ubyte.gz", images)
        idx(tmp_path / f"FOLDER/{stem}-labels-idx1-ubyte.gz", labels)
    for name in ("mydata", "mynet", "mymethod", "mest"):  # of other tests of this process
        sys.modules.pop(name, None)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    if (ray := sys.modules.get("ray")) is not None:
        ray.shutdown()


def follow(page: Path, slow: bool, folder: Path) -> None:
    reader = Reader(page, slow, folder)
    for block in blocks(page):
        try:
            reader.do(block)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page.name}:{block.line}: {error!r}") from error


@pytest.mark.parametrize("name", NAMES)
def test_what_a_page_says_can_be_done(name: str, folder: Path) -> None:
    follow(ROOT / name, False, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_a_page_trains_trains(name: str, folder: Path) -> None:
    """Each page in a process of its own, as its reader has one."""
    if not any(block.slow for block in blocks(ROOT / name)):
        pytest.skip("nothing here starts Ray")
    if "PAGE_ALONE" in os.environ:
        follow(ROOT / name, True, folder)
        return
    test = f"{__file__}::test_what_a_page_trains_trains[{name}]"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "slow", "-p", "no:cacheprovider", test],
        cwd=ROOT, env=os.environ | {"PAGE_ALONE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_a_wrong_option_or_key_is_noticed(folder: Path) -> None:
    for wrong in (
        "sparsetune status --jsn",
        "sparsetune sweep set name=a optimizer.lrr=0.1",
        "sparsetune status nobody",
        "bash scripts/none.sh",
        "python scripts/bench_step.py --none",
        'pip install "sparsetune[none]"',
        "rm -r sweeps",
    ):
        with pytest.raises((AssertionError, ValueError, SystemExit, click.ClickException)):
            Reader(ROOT / "README.md", False, folder).bash(Block(1, "bash", wrong))


# Links --------------------------------------------------------------------------------------------

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """The page without its code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "`code`", text)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    known: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = 0
        while (name := slug if not number else f"{slug}-{number}") in known:
            number += 1
        known.add(name)
    return known


def leads(page: Path, target: str) -> bool:
    """Is there such a file, with such a heading? Of the web only the address is looked at."""
    parts = urlparse(target)
    if parts.scheme:
        return parts.scheme == "https" and bool(parts.netloc)
    file = (page.parent / parts.path).resolve() if parts.path else page
    return file.exists() and (not parts.fragment or parts.fragment in anchors(file))


@pytest.mark.parametrize("name", [*NAMES, "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    assert [target for target in LINK.findall(prose(page)) if not leads(page, target)] == []


# What must be said --------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= LINES


def test_every_page_is_linked_to() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in LINK.findall(prose(page))
    }
    assert [name for page, name in zip(PAGES, NAMES, strict=True) if page not in linked] == [
        "README.md"
    ]


@pytest.mark.parametrize("name", main.commands)
def test_every_command_and_option_is_explained(name: str) -> None:
    text = (ROOT / "docs/commands.md").read_text()
    assert f"`sparsetune {name}" in text
    for parameter in main.commands[name].params:
        if isinstance(parameter, click.Option):
            assert all(option in text for option in parameter.opts), parameter.opts


@pytest.mark.parametrize("name", METHODS)
def test_every_hyperparameter_is_in_the_table_of_its_method(name: str) -> None:
    text = (ROOT / "docs/methods.md").read_text()
    section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert section and METHODS[name].paper in section
    for field in dataclasses.fields(METHODS[name].Hyperparameters):
        about = field.metadata
        span = f"{about['low']:g} to {about['high']:g}"
        assert f"| `hp.{field.name}` | {span} | {field.default:g} |" in section
    for field in dataclasses.fields(METHODS[name].Variant):
        words = ", ".join(f"`{word}`" for word in field.metadata["allowed"])
        assert f"| `variant.{field.name}` | {words} | `{field.default}` |" in section


def test_every_space_is_explained() -> None:
    text = (ROOT / "docs/spaces.md").read_text()
    assert [name for name in files.names() if f"`{name}`" not in text] == []


def test_a_spaces_header_says_its_command_and_what_came_out() -> None:
    """The command is its own, and its figures are those of the table of all runs."""
    tested: dict[str, dict[str, list[float]]] = {}
    seconds: dict[str, dict[str, float]] = {}
    with (ROOT / "docs/compare-mnist.csv").open() as table:
        for row in csv.DictReader(table):
            name, density = row["space"], row["density asked"]
            if row["setting"] == "chosen":
                tested.setdefault(name, {}).setdefault(density, []).append(
                    float(row["test accuracy"])
                )
            seconds.setdefault(name, {})[density] = float(row["tuning device-seconds"])
    for name in files.names():
        header, _, _ = (files.folder() / f"{name}.yaml").read_text().partition("\nmethod:")
        assert header.startswith(f"# sparsetune sweep {name} ")
        words = header.replace("\n#", "")
        means = [f"{100 * fmean(tested[name][key]):.2f}" for key in tested.get(name, {})]
        spent = [f"{value:,.0f}" for value in seconds.get(name, {}).values()]
        for figures in (means, spent):
            assert ", ".join(figures) in words, name
