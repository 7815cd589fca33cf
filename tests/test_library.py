"""The library: ten lines of a notebook, alone, in a running event loop, and beside the commands."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import pav
from pav.core.journal import JOURNAL, journal_line
from pav.labels.tables import prefix_key
from pav.tasks.tape import Tape
from search.beam import BeamConfig, beam
from search.best_of_n import BestOfNConfig, best_of_n
from search.compare.command import compare
from search.compare.plan import CompareConfig, Kind, Method
from search.run.records import Record, read

ROOT = Path(__file__).resolve().parents[1]
N, COUNT = 3, 4
QUESTIONS = [problem.question for problem in islice(Tape().problems("test"), COUNT)]
TEN_LINES = """
import pav
v = pav.load_verifier("pav:reference")
scores = v.score("37+8*3-15", ["37+8=45", "45*3=36"])
assert scores.score.shape == scores.advantage.shape == (2,)
assert scores.advantage[0] > 0 > scores.advantage[1]
labels = pav.read_labels("runs/labels")
assert len(labels.prefixes) and "q" in labels.prefixes.to_pandas()
with pav.Search(v) as search:
    found = search.beam("37+8*3-15", n=8)
assert (found.answer, found.text.splitlines()[-1]) == ("20", "A20")
assert found.tree[0][0].kept and found.cost.policy_tokens > 0
"""


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # Without what an engine has set in this process.
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "TORCH_"))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300,
        check=False, env=plain,
    )  # fmt: skip


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which the notebook was executed; labels are in ``runs/labels``."""
    directory = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / "quickstart.ipynb", as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(directory / ".jupyter"))
        # Raises where a cell does.
        NotebookClient(
            notebook,
            timeout=300,
            kernel_name="python3",
            resources={"metadata": {"path": str(directory)}},
        ).execute()
    nbformat.write(notebook, directory / "executed.ipynb")
    return directory


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    """Records of every kind of search of the first test problems, by the commands."""
    out = tmp_path_factory.mktemp("commands")
    beam(BeamConfig("pav:reference", n=N, problems=COUNT, output=str(out / "beam")))
    best_of_n(BestOfNConfig("pav:reference", n=N, problems=COUNT, output=str(out / "best_of_n")))
    trees: list[Kind] = ["dvts", "smc"]
    methods = [Method(name=kind, kind=kind, verifier="pav:reference") for kind in trees]
    compare(CompareConfig(methods, str(out / "compare"), n=[N], problems=COUNT))
    found = {name: read(out / name / f"{name}.jsonl") for name in ("beam", "best_of_n")}
    for kind in trees:
        (file,) = (out / "compare").glob(f"{kind}*.jsonl")
        found[kind] = read(file)
    return found


@pytest.fixture(scope="module")
def search(commands: object) -> Iterator[pav.Search]:
    """After the commands: they end their engines, and with them all of this process."""
    with pav.Search("pav:reference", quiet=True) as opened:
        yield opened


def test_importing_pav_loads_no_model_library_and_changes_nothing(tmp_path: Path) -> None:
    done = python(
        """
import os, sys, warnings, logging
before, filters = dict(os.environ), list(warnings.filters)
import pav
assert pav.__dir__() and set(pav.__all__) <= set(dir(pav))
assert dict(os.environ) == before and list(warnings.filters) == filters
from pav import Search, load_verifier, read_labels
assert dict(os.environ) == before
assert not {"torch", "vllm", "transformers"} & set(sys.modules)
v = load_verifier("pav:reference_fused")
v.score("2+3+4", ["2+3=5"])
import torch
# Torch sets one itself.
assert {k for k in os.environ if k not in before} <= {"TORCHINDUCTOR_CACHE_DIR"}
assert not torch._dynamo.config.disable
try:
    pav.serch
except AttributeError as error:
    print(error)
""",
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "module 'pav' has no attribute 'serch'\n"


def test_every_public_name_is_there_and_documented() -> None:
    for name in pav.__all__:
        assert getattr(pav, name).__doc__


def test_ten_lines_work_as_they_are_written(
    executed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(executed)
    Path("ten_lines.py").write_text(TEN_LINES)
    runpy.run_path("ten_lines.py")
    assert capfd.readouterr().out == ""


def test_the_notebook_runs_in_its_kernels_loop_and_finds_the_answer(executed: Path) -> None:
    text = json.dumps(json.loads((executed / "executed.ipynb").read_text()))
    assert "20 ['9', '60'] 20" in text


def test_labels_are_tables_with_text(executed: Path) -> None:
    labels = pav.read_labels(executed / "runs" / "labels")
    assert labels.warnings == []
    traces = {t["trace_id"]: t for t in labels.traces}
    assert len(traces) == len(labels.labels.traces)
    for trace in traces.values():
        assert "\n".join(trace["steps"]) == trace["text"].removesuffix("\n")
    rows = labels.prefixes.to_list()
    assert {(r["prefix_key"], r["policy"]): (r["k"], r["n"]) for r in rows} == labels.labels.counts
    keys = {
        prefix_key(t["problem_id"], t["ids"][:end]): (t["question"], s)
        for t in traces.values()
        for s, end in enumerate([0, *t["step_ends"]])
    }
    for row in rows:
        assert keys[row["prefix_key"]] == (row["question"], row["step"])
        assert len(row["steps"]) == row["text"].count("\n") == row["step"]
        assert row["q"] == row["k"] / row["n"]
    right = labels.completions.to_pandas().groupby(["prefix_key", "policy"]).correct.sum()
    assert right.to_dict() == {key: k for key, (k, _) in labels.labels.counts.items()}


def test_labels_of_an_unfinished_run_are_read_from_its_journal(
    executed: Path, tmp_path: Path
) -> None:
    whole = pav.read_labels(executed / "runs" / "labels")
    manifest = (executed / "runs" / "labels" / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(manifest)
    entries = [("trace", asdict(t)) for t in whole.labels.traces]
    entries += [("completion", asdict(c)) for c in whole.labels.completions]
    (tmp_path / JOURNAL).write_bytes(b"".join(journal_line(k, r, 1.0) for k, r in entries))
    found = pav.read_labels(str(tmp_path))
    assert found.prefixes.to_list() == whole.prefixes.to_list()
    assert any("not sealed" in warning for warning in found.warnings)


@pytest.mark.parametrize("method", ["beam", "dvts", "smc", "best_of_n"])
def test_a_search_finds_what_the_command_of_its_name_finds(
    search: pav.Search, commands: dict[str, list[Record]], method: str
) -> None:
    found = getattr(search, method)(QUESTIONS, n=N)
    by_question = {r.question: r for r in commands[method]}
    for one, record in zip(found, (by_question[q] for q in QUESTIONS), strict=True):
        assert one.error is None
        assert (one.answer, one.picked) == (record.answer, record.picked)
        assert [c.ids for c in one.candidates] == [c.ids for c in record.candidates]
        assert one.text == record.candidates[record.picked or 0].text
        assert [[(c.parent, c.kept, c.score, c.text) for c in r] for r in one.tree] == record.steps
        assert asdict(one.cost) == {k: getattr(record, k) for k in asdict(one.cost)}
        # The question came without its answer.
        assert not one.correct


def test_scores_are_those_that_search_records(commands: dict[str, list[Record]]) -> None:
    v = pav.load_verifier("pav:reference")
    candidates = [(r.question, c) for r in commands["beam"] for c in r.candidates if c.finished]
    steps = [c.text.split("\n") for _, c in candidates]
    scores = v.score([question for question, _ in candidates], steps, complete=True)
    assert len(scores) == len(candidates) > COUNT
    for found, (question, candidate) in zip(scores, candidates, strict=True):
        for head, q_P in candidate.q.items():
            np.testing.assert_allclose(found.q[head], q_P, atol=1e-3)
        assert found.score is not None and found.advantage is not None
        assert found.score[-1] == pytest.approx(candidate.score, abs=1e-3)
        base_P, prover_P = found.q["q/base"], found.q["q/prover"]
        np.testing.assert_allclose(found.advantage, np.diff(prover_P))
        np.testing.assert_allclose(found.score, base_P[1:] + 0.5 * found.advantage)
        # Prefixes of it, with and without the line end, alone: the same scores.
        prefix = v.score(question, [s + "\n" for s in found.steps[:2]])
        for head, q_P in prefix.q.items():
            np.testing.assert_allclose(q_P, found.q[head][:3], atol=1e-4)
    (nothing,) = v.score([QUESTIONS[0]], [[]])
    assert nothing.q["q/base"].shape == (1,) and nothing.advantage.shape == (0,)


def test_a_search_works_inside_a_running_loop_which_goes_on(search: pav.Search) -> None:
    async def notebook() -> tuple[pav.Found, str]:
        beside = asyncio.ensure_future(asyncio.sleep(0, "beside"))
        loop = asyncio.get_running_loop()
        found = search.beam(QUESTIONS[0], n=2)
        assert asyncio.get_running_loop() is loop
        return found, await beside

    found, beside = asyncio.run(notebook())
    assert beside == "beside"
    alone = search.beam(QUESTIONS[0], n=2)
    assert (found.text, found.tree) == (alone.text, alone.tree)


def test_ctrl_c_ends_a_search_and_the_next_one_finds_the_same(search: pav.Search) -> None:
    before = search.beam(QUESTIONS[0], n=2)
    many = [problem.question for problem in islice(Tape().problems("test"), 400)]
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        search.beam(many, n=16)
    after = search.beam(QUESTIONS[0], n=2)
    assert (after.text, after.tree, after.cost) == (before.text, before.tree, before.cost)


def test_a_problem_brings_its_answer_along(
    search: pav.Search, commands: dict[str, list[Record]]
) -> None:
    problems = list(islice(Tape().problems("test"), COUNT))
    found = search.best_of_n(problems, n=N)
    right = {r.question: r.correct for r in commands["best_of_n"]}
    assert [one.correct for one in found] == [right[problem.question] for problem in problems]
    assert any(one.correct for one in found)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda s: s.beam("  "), "question is '  '; give its text"),
        (lambda s: s.beam("2+3+4", n=0), "n is 0; give a positive number"),
        (lambda s: s.beam(["2+3+4", "1" * 200]), "is a prompt of 202 tokens"),
        (lambda s: s.smc("2+3+4", head="q/none"), "head is 'q/none'"),
        (lambda s: s.dvts("2+3+4", prover="q/none"), "prover is 'q/none'"),
        (lambda s: s.verifier.score("2+3+4", "2+3=5"), "give a list of texts"),
        (lambda s: s.verifier.score("2+3+4", ["2+3=5", "\n"]), "step 2 of solution 0 is"),
        (lambda s: s.verifier.score(["2+3+4"], []), "1 problems and steps 0 solutions"),
        (lambda s: s.verifier.score("2+3+4", ["2+3=5"] * 200), "give fewer steps"),
    ],
)
def test_what_cannot_be_asked_is_refused_and_the_search_goes_on(
    search: pav.Search, ask: object, said: str
) -> None:
    with pytest.raises(pav.UserError) as refused:
        ask(search)  # type: ignore[operator]
    assert said in str(refused.value)


def test_a_search_that_is_closed_ends_none_that_is_open(search: pav.Search) -> None:
    before = search.beam(QUESTIONS[1], n=2)
    with pav.Search("pav:reference_orm", quiet=True) as other:
        assert other.best_of_n(QUESTIONS[1], n=2).candidates
        with pytest.raises(pav.UserError, match="recipe 'orm'"):
            other.beam(QUESTIONS[1])
    with pytest.raises(pav.UserError, match="closed"):
        other.best_of_n(QUESTIONS[1])
    assert search.beam(QUESTIONS[1], n=2).text == before.text


def test_an_orm_has_no_advantage() -> None:
    found = pav.load_verifier("pav:reference_orm").score("2+3+4", ["2+3=5", "5+4=9"])
    assert set(found.q) == {"orm"} and found.advantage is None and found.score is None
