"""What README and docs show exists and works: options, settings, messages, links, commands."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest

import data_gen
import pav
import search
from pav.cli.run import run
from pav.tasks.base import Split, Task
from tests.following import SCRIPTS, follow

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
# "# NAME.yaml, read by COMMAND" begins a whole config of a command.
CONFIG = re.compile(r"# (\S+\.yaml), read by (\S+)\n")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the code blocks of a page."""
    found = []
    for indent, language, text in FENCE.findall(page.read_text()):
        found.append((language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)))
    return found


def commands(text: str) -> list[list[str]]:
    """The commands of a bash block, each as its words."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text())


def call_of(command: str) -> tuple[ModuleType, ast.Call]:
    """(module, call) with which the ``main`` of a command hands over what it does and its settings.

    It is the one that names the command: ``run(beam, BeamConfig, "search.beam")``.
    """
    module = importlib.import_module(SCRIPTS[command].partition(":")[0])
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
        if isinstance(node, ast.Call) and len(node.args) > 2:
            named = node.args[2]
            if isinstance(named, ast.Constant) and named.value == command:
                return module, node
    raise AssertionError(f"{module.__name__} does not name {command}")


@cache
def config_of(command: str) -> type:
    """The settings of a command."""
    module, call = call_of(command)
    kind: type = getattr(module, ast.unparse(call.args[1]))
    return kind


def parsed(command: str, *argv: str) -> Any:
    """The settings that a command would start with."""
    seen: list[Any] = []
    run(seen.append, config_of(command), command, list(argv))
    return seen[0]


def names_in(kind: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings of a dataclass; ``x.*`` where anything may follow."""
    for part in get_args(kind):
        yield from names_in(part, prefix)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return
    if kind is Task:
        for task in built_in_tasks():
            yield from names_in(task, prefix)
    hints = get_type_hints(kind)
    for f in fields(kind):
        yield prefix + f.name
        if "dict" in str(hints[f.name]):
            yield f"{prefix}{f.name}.*"
        yield from names_in(hints[f.name], f"{prefix}{f.name}.")


def built_in_tasks() -> list[type]:
    from pav.tasks.gsm8k import Gsm8k
    from pav.tasks.jsonl import Jsonl
    from pav.tasks.ledger import Ledger
    from pav.tasks.math import Math
    from pav.tasks.tape import Tape

    return [Tape, Ledger, Jsonl, Gsm8k, Math]


@cache
def settings_of(command: str) -> frozenset[str]:
    return frozenset(names_in(config_of(command)))


@cache
def all_settings() -> frozenset[str]:
    return frozenset().union(*map(settings_of, SCRIPTS))


def is_known(option: str, known: frozenset[str], own: frozenset[str] = frozenset()) -> bool:
    name = option.removeprefix("--").partition("=")[0].rstrip(".*").rstrip("+")
    if name in {"config", "help", "print_config", "version"} or name in known | own:
        return True
    head, _, _ = name.rpartition(".")
    return bool(head) and f"{head}.*" in known


def own_tasks(page: Path) -> frozenset[str]:
    """Settings of the tasks that a page writes itself."""
    text = "".join(text for language, text in blocks(page) if language == "python")
    return frozenset(f"task.{name}" for name in re.findall(r"^    (\w+): \w", text, re.MULTILINE))


@every_page
def test_every_option_of_a_command_that_a_page_shows_exists(page: Path) -> None:
    wrong = []
    for language, text in blocks(page):
        for words in commands(text) if language == "bash" else ():
            name = next((w for w in words if Path(w).name in SCRIPTS), None)
            for option in [w for w in words if w.startswith("--") and name]:
                if not is_known(option, settings_of(Path(str(name)).name), own_tasks(page)):
                    wrong.append(f"{name} {option}")
    for code in re.findall(r"`([^`]+)`", prose(page)):
        words = shlex.split(code.replace("'", "")) if code.startswith(tuple(SCRIPTS)) else []
        known = settings_of(words[0]) if words and words[0] in SCRIPTS else all_settings()
        for option in re.findall(r"(?<![\w-])--[a-z][\w.]*", code):
            if code.startswith(("pip ", "python ", "hf ", "srun ", "torchrun ")):
                continue
            if not is_known(option, known, own_tasks(page)):
                wrong.append(code)
    assert wrong == []


@every_page
def test_every_dotted_setting_that_a_page_names_exists(page: Path) -> None:
    rooms = {name.partition(".")[0] for name in all_settings() if "." in name}
    named = re.findall(
        r"`((?:[a-z_]+\.)+[a-z_]+)(?<!\.yaml)(?<!\.ckpt)(?<!\.png)(?<!\.json)`", prose(page)
    )
    short = {n.rpartition(".")[2] for n in all_settings()}
    wrong = [
        name
        for name in named
        if name.partition(".")[0] in rooms | {"step_rule", "prompt"}
        and name not in all_settings()
        and not (name.startswith(("step_rule.", "prompt.")) and name.rpartition(".")[2] in short)
    ]
    assert wrong == []


CONFIGS = [
    (page.name, *found.groups(), text)
    for page in PAGES
    for language, text in blocks(page)
    if language == "yaml" and (found := CONFIG.match(text))
]


@pytest.mark.parametrize(
    ("page", "name", "command", "text"), CONFIGS, ids=[f"{p}-{n}" for p, n, *_ in CONFIGS]
)
def test_every_config_that_a_page_shows_is_read_by_its_command(
    page: str, name: str, command: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    config = parsed(command, "--config", str(tmp_path / name))
    assert isinstance(config, config_of(command))


def test_every_yaml_block_says_who_reads_it() -> None:
    found = [text for page in PAGES for language, text in blocks(page) if language == "yaml"]
    assert found
    assert [text.splitlines()[0] for text in found if not CONFIG.match(text)] == []


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as the site and the repository's viewer make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"[\s]+", "-", heading) for heading in plain}


@every_page
def test_every_link_and_picture_of_a_page_exists(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


@every_page
def test_every_file_of_the_repository_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(
        r"(?<![\w/.])((?:configs|benchmarks|tests|docs|pav|search|data_gen)/[\w./-]*\w/?)",
        page.read_text(),
    )
    made = {"pav/policy", "benchmarks/results/speed_search_"}
    missing = {
        n
        for n in named
        if n not in made and not (ROOT / n).exists() and not list(ROOT.glob(f"{n}*"))
    }
    assert missing == set()


def test_every_page_is_in_the_navigation() -> None:
    shown = set(re.findall(r"(\w+\.md)", (ROOT / "mkdocs.yml").read_text()))
    assert shown == {page.name for page in DOCS.glob("*.md")}


def test_readme_is_short_and_names_what_must_pass() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert "make test" in text and "make quick" in text


def test_task_that_a_page_writes_has_problems_and_grades_them(tmp_path: Path) -> None:
    (text,) = [t for language, t in blocks(DOCS / "tasks.md") if language == "python"]
    (tmp_path / "my_mod.py").write_text(text)
    task = runpy.run_path(str(tmp_path / "my_mod.py"))["MyTask"](limit=100)
    problems = [p for split in ("train", "validation", "test") for p in task.problems(split)]
    assert len(problems) == 100
    for problem in problems:
        assert task.grade(f"Let me see.\n{problem.gold}\n", problem).correct
        assert not task.grade("", problem).correct


def said_by_the_code() -> str:
    """Every text of the code; what is filled in is ``{}``."""
    found = []
    for room in (pav, search, data_gen):
        for path in Path(str(room.__file__)).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(" ".join(text.split()) for text in found)


def test_every_error_that_troubleshooting_names_is_one_of_the_code() -> None:
    code = said_by_the_code()
    rows = re.findall(r"^\| `(.+?)` \| ", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 40
    unknown = [
        row for row in rows if not re.search(".*?".join(map(re.escape, row.split("…"))), code)
    ]
    assert unknown == []


def test_formats_names_every_column_and_field() -> None:
    from pav.labels.files import LIKELIHOOD
    from pav.labels.tables import COMPLETIONS, LABELS, TRACES
    from pav.rl.guards import Alarm
    from pav.rl.samples import Sampled
    from pav.verifier.checkpoint import VerifierMeta
    from search.run.records import Candidate, Node, Record

    named = set(re.findall(r"`(\w+)`", (DOCS / "formats.md").read_text()))
    columns = {n for s in (TRACES, LABELS, COMPLETIONS, LIKELIHOOD) for n in s.names}
    kinds = (Record, Candidate, Node, VerifierMeta, Sampled, Alarm)
    kept = {f.name for kind in kinds for f in fields(kind)}
    assert (columns | kept) - named == set()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: `make docs` does"
)
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert (tmp_path / "python_api.html").read_text().count("doc-heading") > 10


# What keeps a shown command small; later options win.
SMALL = {
    "data_gen.rollouts": ["--problems", "6", "--validation_problems", "6", "--n_traces", "2",
                          "--ignore_warnings", "true", "--engine.kv_gib", "0.05"],
    "pav.train": ["--max_epochs", "2"],
    "pav.rl": ["--iterations", "1", "--batch", "2", "--group", "2", "--eval_problems", "2",
               "--engine.kv_gib", "0.05"],
    "search.beam": ["--problems", "2", "--n", "2", "--engine.kv_gib", "0.05"],
    "search.compare": ["--problems", "2", "--n", "[1, 2]", "--seeds", "[0]",
                       "--engine.kv_gib", "0.05"],
    "search.report": ["--problems", "2"],
}  # fmt: skip
# Where a page leaves a model open; two that know what the problems of ``workplace`` are about.
OPEN = {"MODEL": "./small", "STRONGER_MODEL": "./stronger"}
SHELL = {"source", "export"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory: problems in a file, and two chat models of one tokenizer."""
    from pav.policy.policy import asset
    from pav.tasks.tape import Tape

    place = tmp_path_factory.mktemp("user")
    for asked, name in (("base", "small"), ("prover", "stronger")):
        shutil.copytree(asset(asked), place / name)
        (place / name / "chat_template.jinja").write_text(
            "{{ bos_token }}{{ messages[-1]['content'] }}"
        )
    splits: list[tuple[Split, int]] = [("train", 300), ("validation", 20), ("test", 20)]
    problems = [p for split, count in splits for p in islice(Tape(n_ops=3).problems(split), count)]
    rows = [json.dumps({"question": p.question, "answer": p.gold}) for p in problems]
    (place / "problems.jsonl").write_text("\n".join(rows))
    return place


def perform(words: list[str]) -> str:
    """Run one command as a page shows it; how it was run."""
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        return "make --dry-run"
    if words[0] in SHELL:
        return "left to the shell"
    follow([OPEN.get(word, word) for word in words], *SMALL.get(words[0], []))
    return "run"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_every_command_block_works_in_order(
    page: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    done: list[str] = []
    for language, text in blocks(ROOT / page):
        if language == "yaml":
            (found,) = re.findall(CONFIG, text)
            Path(found[0]).write_text(text)
            done.append(f"written: {found[0]}")
        elif language == "python":
            Path("shown.py").write_text(text)
            runpy.run_path("shown.py")
            done.append(f"run: {len(text.splitlines())} lines of Python")
        elif language == "bash":
            done += [f"{perform(words)}: {shlex.join(words)}" for words in commands(text)]
        else:
            assert language in {"bibtex", "text"}
    print(f"\n{page}, in order:", *done, sep="\n  ")
    assert sum(line.startswith("run: ") for line in done) >= 6
