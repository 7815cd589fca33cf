"""Labels are trained on exactly the tokens at which steps are scored in search."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pav.core.steps import Stepper, StepRule
from pav.engine.loading import EngineConfig
from pav.engine.loop import drive
from pav.engine.vllm import VllmEngine
from pav.export.vllm import export_verifier
from pav.labels.examples import Example, orm_examples, pav_examples
from pav.labels.tables import LabelSet, Trace, prefix_key
from pav.policy.inference import Read, Sampled
from pav.policy.policy import Policy, PolicyConfig, Prompt, Sampler, load_policy
from pav.tasks.base import Problem
from pav.tasks.tape import Tape
from pav.train.batches import collate
from pav.verifier.calibrate import Calibrator
from pav.verifier.checkpoint import Verifier, load_verifier
from pav.verifier.forward import score
from pav.verifier.scoring import Scorer
from search.methods.beam import BeamSettings, beam_search
from search.methods.best_of_n import sample_traces
from search.methods.context import SearchContext
from search.methods.expand import SearchResult

PROMPTS = {"tape": Prompt(), "chat": Prompt(template="{question}", chat=True)}
PROBLEM = Problem("p", "37+8")
HEAD = "q/base"
GREEDY = BeamSettings(n=1, samples=1, alpha=0.5, prover=HEAD, base_head=HEAD)
# A served head says its position; this calibrator keeps Q away from 1, so that it can be read back.
SLOPE = 0.01


@dataclass(frozen=True)
class Case:
    """A solution and where its steps end.

    Attributes:
        tokenizer: ``tape`` or ``chat``.
        tokens: the solution, token by token; ``EOS`` for the end of sequence.
        ends: exclusive ends of its steps.
        rule: how it is cut.
        capped: it never ends; search runs into the length cap.
    """

    tokenizer: str
    tokens: Sequence[str]
    ends: list[int]
    rule: StepRule = StepRule()
    capped: bool = False


CASES = {
    "tape": Case("tape", [*"37+8=45\nA45", "EOS"], [8, 12]),
    "tape, delimiter twice in a row": Case("tape", [*"37+8=45\n\n=45\nA45", "EOS"], [8, 13, 17]),
    "tape, blank lines first and last": Case("tape", [*"\n\n=37\n\n", "EOS"], [6, 8]),
    "tape, no delimiter": Case("tape", [*"A45", "EOS"], [4]),
    "tape, cut by max_tokens": Case(
        "tape", [*"37+8=45\nA45", "EOS"], [5, 8, 12], StepRule(max_tokens=5)
    ),
    "tape, cut in blank lines": Case(
        "tape", [*"\n\n\n\nA45", "EOS"], [3, 6, 8], StepRule(max_tokens=3)
    ),
    "tape, a cut step is not scored": Case(
        "tape", [*"=37\n37+8=45\n"], [4], StepRule(max_tokens=5, score_cut=False), capped=True
    ),
    "tape, short lines merged": Case(
        "tape", [*"=37\n=37\nA45", "EOS"], [8, 12], StepRule(min_tokens=5)
    ),
    "tape, length cap": Case("tape", [*"37+8=45\n", *"=45" * 8], [8], capped=True),
    "chat": Case("chat", ["a", "b", "Ċ", "c", "EOS"], [3, 5]),
    "chat, delimiter with more text": Case(
        "chat", ["a", ".Ċ", "b", "ĊĠĠ", "c", "ĊĊ", "d", "EOS"], [2, 4, 6, 8]
    ),
    "chat, blank lines": Case(
        "chat", ["ĊĊ", "a", "Ċ", "Ċ", "ĊĠĠ", "b", ".Ċ", "EOS"], [3, 7, 8]
    ),
    "chat, delimiter twice in a row": Case(
        "chat", ["a", "Ċ", "Ċ", "b", "Ċ", "c", "EOS"], [2, 5, 7]
    ),
    "chat, no delimiter": Case("chat", [*"abc", "EOS"], [4]),
    "chat, cut by max_tokens": Case(
        "chat", [*"abcdef", "Ċ", "g", "EOS"], [4, 7, 9], StepRule(max_tokens=4)
    ),
    "chat, a full stop alone is merged": Case("chat", [".Ċ", "a", "b", "Ċ", "c", "EOS"], [4, 6]),
    "chat, length cap": Case("chat", ["a", "Ċ", *"b" * 20], [2], capped=True),
}  # fmt: skip


@dataclass
class Script:
    """Stands in for an engine: "samples" a given solution and records what it is asked to read.

    Every head says the index of the token that it was read at.
    """

    prompt: list[int]
    solution: list[int]
    read_ids: list[list[int]] = field(default_factory=list)

    async def sample(
        self, ids: list[int], sampler: Sampler, *, stop_ids: list[int], max_tokens: int, seed: int,
        scores: bool = False, until: Stepper | None = None,
    ) -> Sampled:  # fmt: skip
        assert ids == [*self.prompt, *self.solution][: len(ids)]
        done = len(ids) - len(self.prompt)
        out = self.solution[done : done + max_tokens]
        stops = [i for i, t in enumerate(out) if t in stop_ids]
        out = out[: stops[0] + 1] if stops else out
        heads = np.arange(len(ids) - 1, len(ids) - 1 + len(out), dtype=np.float64)[:, None]
        return Sampled(out, bool(stops), np.zeros(len(out), np.float32), heads if scores else None)

    async def read(self, ids: list[int], *, logprobs_from: int | None = None) -> Read:
        self.read_ids.append(ids)
        logprobs = None if logprobs_from is None else np.zeros(len(ids) - logprobs_from, np.float32)
        return Read(np.array([len(ids) - 1.0]), logprobs, len(ids), 0)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def policy_of(case: Case, tiny_model: Callable[..., Path]) -> Policy:
    path = str(tiny_model("llama", case.tokenizer))
    return load_policy(PolicyConfig(path, "base", prompt=PROMPTS[case.tokenizer]), case.rule)


def solution_of(case: Case, policy: Policy) -> list[int]:
    eos = policy.tokenizer.eos_token
    ids = policy.tokenizer.convert_tokens_to_ids([eos if t == "EOS" else t for t in case.tokens])
    return list(ids)


def labels_of(ids: list[int], ends: list[int], truncated: bool) -> LabelSet:
    """One trace with a label on every prefix."""
    trace = Trace("t", PROBLEM.id, PROBLEM.question, "45", "train", "base", 0, ids, ends, None,
                  False, truncated)  # fmt: skip
    counts = {(prefix_key(PROBLEM.id, ids[:end]), "base"): (1, 2) for end in (0, *ends)}
    return LabelSet({}, [trace], counts, [])


def scorer_of(policy: Policy, engine: Any, fused: bool, make_verifier: Any, path: Path) -> Scorer:
    make_verifier(Path(policy.path), path / "pav.ckpt", heads=(HEAD, "orm"))
    verifier = load_verifier(str(path / "pav.ckpt"))
    told = Calibrator(SLOPE, 0.0, [], [], [], [], [])
    card = replace(verifier.card, heads=[HEAD], calibrators={HEAD: asdict(told)})
    bare = Verifier(verifier.path, "", card, verifier.weight[:1], verifier.bias[:1] * 0, None)
    return Scorer(bare, engine, fused, False, policy)


def positions_in(q: list[float]) -> list[int]:
    """Which positions served these values."""
    return [round(float(np.log(v / (1 - v))) / SLOPE) for v in q]


def test_training_positions_are_serving_positions(
    case: Case, tiny_model: Any, make_verifier: Any, tmp_path: Path
) -> None:
    policy = policy_of(case, tiny_model)
    prompt, solution = policy.encode(PROBLEM), solution_of(case, policy)
    sampler = Sampler(max_length=len(prompt) + len(solution))
    start = len(prompt)

    # Training: the last prompt token, then the token before each step's last one.
    ends = policy.stepper.step_ends(solution)
    assert ends == case.ends
    labels = labels_of(solution, ends, truncated=case.capped)
    (example,) = pav_examples(labels, "train", [HEAD], policy, sampler.max_length)
    assert example.ids == prompt + solution
    trained = example.positions_P.tolist()
    assert trained == [start - 1, *(start + end - 2 for end in case.ends)]
    _, rows, columns, *_ = collate([example])
    assert rows.tolist() == [0] * len(trained)
    assert columns.tolist() == trained
    if not case.capped:
        (outcome,) = orm_examples(labels, "train", policy, sampler.max_length)
        assert collate([outcome])[2].tolist() == trained[-1:]

    # Separate: what beam search asks its verifier to read ends at these tokens.
    engine = Script(prompt, solution)
    scorer = scorer_of(policy, engine, False, make_verifier, tmp_path)
    result = search_of(policy, engine, sampler, scorer)
    assert engine.read_ids == [example.ids[: p + 1] for p in trained]

    # Fused: the rows that it picks from what sampling brought are the same.
    fused = search_of(policy, engine, sampler, replace(scorer, fused=True))
    if case.capped:
        assert result.truncated == fused.truncated == 1
        return
    for found in (result, fused):
        (candidate,) = found.candidates
        assert candidate.ids == solution
        assert candidate.ends == case.ends
        assert positions_in(candidate.q[HEAD]) == trained

    # Best-of-N cuts whole solutions instead of sampling step by step.
    for fused_too in (False, True):
        scorer = replace(scorer, fused=fused_too)
        (candidate,) = asyncio.run(
            sample_traces(
                SearchContext(PROBLEM, engine, policy, sampler, 0), 1, scorer, every_step=True
            )
        )
        assert positions_in(candidate.q[HEAD]) == trained


def search_of(policy: Policy, engine: Any, sampler: Sampler, scorer: Scorer) -> SearchResult:
    return asyncio.run(
        beam_search(SearchContext(PROBLEM, engine, policy, sampler, 0), GREEDY, scorer)
    )


@pytest.mark.parametrize("tokenizer", ["tape", "chat"])
def test_values_in_search_are_those_of_the_training_forward_at_the_training_positions(
    tokenizer: str, tiny_model: Any, make_verifier: Any, tmp_path: Path
) -> None:
    # The chat model hardly ever writes a newline: most of its steps are cut.
    rule = StepRule() if tokenizer == "tape" else StepRule(max_tokens=9)
    task, sampler = Tape(step_rule=rule), Sampler(max_length=160)
    trunk, prompt = tiny_model("llama", tokenizer), PROMPTS[tokenizer]
    checkpoint = tmp_path / "pav.ckpt"
    model = make_verifier(trunk, checkpoint, task=task, prompt=prompt, sampler=sampler)
    verifier = load_verifier(str(checkpoint))
    score_ids = export_verifier(verifier, str(trunk), tmp_path / "served")
    policy = load_policy(PolicyConfig(str(trunk), "base", prompt=prompt), rule)
    engine = VllmEngine(
        str(tmp_path / "served"), "float32", 160, score_ids, EngineConfig(kv_gib=0.05)
    )
    settings = BeamSettings(n=3, samples=2, alpha=0.5, prover="bo4", base_head=HEAD)
    compared = 0
    for fused in (True, False):
        scorer = Scorer(verifier, engine, fused, True, policy)
        found: list[tuple[Problem, SearchResult]] = []

        async def one(problem: Problem, scorer: Scorer = scorer) -> tuple[Problem, SearchResult]:
            context = SearchContext(problem, engine, policy, sampler, 0)
            result = await beam_search(context, settings, scorer)
            return problem, result

        problems = islice(task.problems("validation"), 10)
        drive([engine], [lambda p=p, one=one: one(p) for p in problems], found.append, 10)
        searched = [(problem, c) for problem, result in found for c in result.candidates]
        trained = training_values(model, verifier, policy, [(p, c.ids) for p, c in searched])
        for (_, candidate), values in zip(searched, trained, strict=True):
            assert candidate.q.keys() == values.keys()
            for head, q in candidate.q.items():
                np.testing.assert_allclose(q, values[head], atol=1e-4)
            compared += len(candidate.ends)
    engine.shutdown()
    print(f"{compared} steps compared")
    assert compared > 50


def training_values(
    model: Any, verifier: Verifier, policy: Policy, solutions: list[tuple[Problem, list[int]]]
) -> list[dict[str, list[float]]]:
    """Q of every head after step 0, 1, ... by the forward pass that training calibrates on.

    All solutions go through it together, prompts and solutions of many lengths in a batch.
    """
    traces = [
        Trace(str(i), problem.id, problem.question, None, "train", "base", 0, ids,
              policy.stepper.step_ends(ids), None, False, False)
        for i, (problem, ids) in enumerate(solutions)
    ]  # fmt: skip
    heads = verifier.card.heads
    examples: list[Example] = pav_examples(
        LabelSet({}, traces, {}, []), "train", heads, policy, 160
    )
    assert len({e.prompt_length for e in examples}) > 1
    scored = score(model, examples, policy, "scoring")
    values = []
    for i, example in enumerate(examples):
        rows = scored.example_N == i
        assert scored.step_N[rows].tolist() == list(range(len(example.positions_P)))
        logits, features = scored.logits_NH[rows], scored.surprise_NF[rows]
        values.append(
            {
                head: list(verifier.card.calibrator(head, True)(logits[:, h], features))
                for h, head in enumerate(heads)
            }
        )
    return values
