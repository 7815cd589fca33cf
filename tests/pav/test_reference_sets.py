"""Data sets without a grader, and the likelihood paper's settings on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pav.cli.run import run
from pav.rl.command import rl
from pav.rl.config import RlConfig
from pav.tasks.reference_sets import Alpaca, NuminaProof, without_links

CONFIGS = Path("configs/likelihood")
ROWS: dict[str, list[dict[str, Any]]] = {
    "math": [{"problem": f"{n}+1", "solution": rf"\boxed{{{n + 1}}}"} for n in range(99)],
    "deepscaler": [{"problem": f"{n}+1", "answer": str(n + 1)} for n in range(99)],
    "alpaca": [{"instruction": f"{n}", "input": "+1", "output": f"{n + 1}"} for n in range(99)],
    "numinaproof": [
        {"problem": f"{n}+1", "solution": f"{n + 1}", "question_type": "proof"} for n in range(99)
    ],
}


def written(rows: list[dict[str, Any]], path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("model", ["llama32_3b", "qwen25_3b"])
@pytest.mark.parametrize("name", list(ROWS))
def test_the_papers_settings_run_on_a_tiny_model(
    tiny_model: Callable[..., Path], tmp_path: Path, model: str, name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    policy = tiny_model({"llama32_3b": "llama", "qwen25_3b": "qwen2"}[model], "chat")
    data = written(ROWS[name], tmp_path / "data.jsonl")
    run(rl, RlConfig, "pav.rl",
        ["--config", str(CONFIGS / model / f"{name}.yaml"), "--policy.model", str(policy),
         "--policy.dtype", "float32", "--policy.prompt.system", "1", "--task.data", data,
         *(["--task.test", "null"] if name == "math" else []), "--sampler.max_length", "128",
         "--output", str(tmp_path / "rl"), "--batch", "2", "--group", "2", "--eval_problems", "2",
         "--truncation_limit", "1", "--precision", "32-true", "--dry_run"])  # fmt: skip
    said = capsys.readouterr().out
    assert "dry run: one iteration of 2 x 2 traces" in said and "reward: logprob" in said
    assert not (tmp_path / "rl").exists()


def test_an_instruction_has_its_input_below_it_and_rows_without_output_are_left_out(
    tmp_path: Path,
) -> None:
    rows = ROWS["alpaca"] + [{"instruction": "Say nothing.", "input": "", "output": " "}]
    rows += [{"instruction": "Name a colour.", "input": "", "output": "Red"}]
    task = Alpaca(data=written(rows, tmp_path / "data.jsonl"))
    splits = ("train", "validation", "test")
    found = {p.question: p.gold for split in splits for p in task.problems(split)}  # type: ignore[arg-type]
    assert not task.is_graded and len(found) == 100
    assert found["7\n\n+1"] == "8" and found["Name a colour."] == "Red"


def test_proofs_alone_are_taken_and_lose_their_links(tmp_path: Path) -> None:
    rows = ROWS["numinaproof"] + [
        {"problem": "What is 1+1?", "solution": "2", "question_type": "math-word-problem"},
        {"problem": "Show it.", "solution": "", "question_type": "proof"},
    ]
    task = NuminaProof(data=written(rows, tmp_path / "data.jsonl"))
    problems = [p for split in ("train", "validation", "test") for p in task.problems(split)]  # type: ignore[arg-type]
    assert len(problems) == 99
    text = "By [Jensen](https://a.b/c?d=1) and ![](http://x.y/z.png), see www.q.org/x for more."
    assert without_links(text) == "By Jensen and , see  for more."
