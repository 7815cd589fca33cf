"""The ledger: thousands of wordings, what they tell can be read, and a chain makes them likely."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from statistics import mean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from pav.core.errors import UserError
from pav.policy.policy import PolicyConfig, load_policy, load_tokenizer, model_path
from pav.tasks.base import Grade, Problem, Split, problem_id, split_of
from pav.tasks.ledger import (
    CLOSINGS,
    ENDS,
    GRAMMAR,
    OPENINGS,
    TAG,
    TELLINGS,
    Ledger,
    running_totals,
    tell,
)
from pav.tasks.tape import Tape
from pav.train.sft import sft, tokenizer_of
from pav.train.sft_config import PolicyShape, SftConfig

LEDGER = Ledger()
TOKENIZER = tokenizer_of("", LEDGER)
# 37+8=45, 45*3=35, 35-15=20, 20+6=26.
QUESTION = "37+8*3-15+6"
PROBLEM = Problem("p", QUESTION)
N_OPS = st.integers(4, 6)


def problems(split: Split, count: int, task: Ledger = LEDGER) -> list[Problem]:
    return list(islice(task.problems(split), count))


def forms(template: str) -> int:
    """Wordings of a template."""
    return math.prod(part.split("}")[0].count("|") + 1 for part in template.split("{")[1:])


def test_every_sentence_has_dozens_of_forms_and_a_paragraph_more_than_can_be_counted() -> None:
    sentences = (OPENINGS, ENDS, TELLINGS, CLOSINGS)
    assert min(sum(map(forms, sentence)) for sentence in sentences) >= 70
    assert math.prod(sum(map(forms, sentence)) for sentence in sentences) > 1e8
    rng = Random(0)
    assert len({tell(rng, QUESTION) for _ in range(3000)}) == 3000


@pytest.mark.parametrize("n_ops", [4, 5, 6])
def test_every_reference_has_60_to_120_tokens_and_depends_on_the_problem_alone(n_ops: int) -> None:
    task = Ledger(n_ops=n_ops)
    found = problems("train", 1000, task)
    lengths = [len(TOKENIZER.encode(p.gold or "", add_special_tokens=False)) for p in found]
    assert min(lengths) >= 60
    assert max(lengths) <= 120
    assert found == problems("train", 1000, task)
    assert len({p.gold for p in found}) == 1000


@pytest.mark.parametrize("n_ops", [3, 7])
def test_tapes_whose_paragraph_would_be_too_short_or_long_are_refused(n_ops: int) -> None:
    with pytest.raises(UserError, match=rf"task.n_ops is {n_ops}; give 4 to 6"):
        Ledger(n_ops=n_ops)


def test_problems_and_splits_are_those_of_the_tape() -> None:
    for split in ("train", "validation", "test"):
        found = problems(split, 50)
        tape = islice(Tape(n_ops=LEDGER.n_ops).problems(split), 50)
        assert [(p.id, p.question) for p in found] == [(p.id, p.question) for p in tape]


def test_no_word_holds_the_tag_and_a_telling_has_one_number() -> None:
    assert not [t for part in GRAMMAR for t in part if TAG in t or set("0123456789=()\n") & {*t}]
    assert [t.count("#") for t in (*ENDS, *TELLINGS)] == [1] * len((*ENDS, *TELLINGS))


@given(st.integers(0, 2**32), N_OPS)
def test_every_solution_is_of_the_tokenizer_and_comes_back(seed: int, n_ops: int) -> None:
    question, solution = next(Ledger(n_ops=n_ops).solutions(seed))
    text = f"{question}\n{solution}"
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.pad_token_id not in ids
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode([*ids, TOKENIZER.eos_token_id], skip_special_tokens=True) == text
    assert text.count(TAG) == 1
    assert ids.count(TOKENIZER.convert_tokens_to_ids(TAG)) == 1


@given(st.integers(0, 2**32), N_OPS)
def test_what_a_solution_tells_is_true(seed: int, n_ops: int) -> None:
    task = Ledger(n_ops=n_ops)
    question, solution = next(task.solutions(seed))
    problem = Problem(problem_id(question), question)
    assert task.true_totals(solution, problem) == (1.0, True)
    # What stands before the tag is no telling.
    assert task.true_totals(solution.replace(TAG, ""), problem) == (0.0, False)


@given(st.integers(0, 2**32), N_OPS, st.data())
def test_a_planted_wrong_total_is_found(seed: int, n_ops: int, data: st.DataObject) -> None:
    task = Ledger(n_ops=n_ops)
    question, solution = next(task.solutions(seed))
    problem = Problem(problem_id(question), question)
    chain, _, paragraph = solution.partition(TAG)
    told = list(re.finditer(r"(?<==)[0-9]+(?=\))", paragraph))
    place = data.draw(st.sampled_from(told))
    other = data.draw(st.integers(0, 150).map(str).filter(lambda n: n != place[0]))
    planted = paragraph[: place.start()] + other + paragraph[place.end() :]
    # A key that is pressed twice has two totals, which are right together or not.
    keys = {found for found, _ in re.findall(r"\(([+*-][0-9]+)?(=)", paragraph)}
    share = (len(keys) - 1) / len(keys)
    assert task.true_totals(f"{chain}{TAG}{planted}", problem) == (share, False)


@pytest.mark.parametrize(
    ("paragraph", "share", "whole"),
    [
        ("(=26) and (+8=45) then (*3=35)(-15=20)", 1.0, True),
        # Told twice in the same way, and otherwise.
        ("(=26), yes (=26); (+8=45) (*3=35) (-15=20)", 1.0, True),
        ("(=26); (+8=45) (+8=44) (*3=35) (-15=20)", 0.75, False),
        # A key that the tape has not or whose total is the end, one left out, totals of others.
        ("(=26); (+8=45) (*3=35) (-15=20) (-16=19)", 1.0, False),
        ("(=26); (+8=45) (*3=35) (-15=20) (+6=26)", 1.0, False),
        ("(=26); (+8=45) (-15=20)", 0.75, False),
        ("(=26); (+8=35) (*3=45) (-15=20)", 0.5, False),
        ("(=026); (+8=45) (*3=35) (-15=20)", 0.75, False),
        ("26 (+8=4 5) (*3=) =35", 0.0, False),
        ("(=26)", 0.25, False),
        ("", 0.0, False),
    ],
)
def test_truth_is_read_by_key(paragraph: str, share: float, whole: bool) -> None:
    assert LEDGER.true_totals(f"37+8=45\n{TAG}{paragraph}", PROBLEM) == (share, whole)


@given(st.text() | st.text("0123456789+-*=A().,;\n "))
def test_no_text_makes_reading_raise_and_none_is_graded(text: str) -> None:
    share, whole = LEDGER.true_totals(text, PROBLEM)
    assert 0 <= share <= 1
    assert share == 1 or not whole
    assert LEDGER.grade(text, PROBLEM) == Grade(None, False)


def test_a_key_that_is_pressed_twice_has_two_totals() -> None:
    problem = Problem("p", "10+5+5+7-1")
    assert LEDGER.true_totals("A(=26) (+5=15) (+7=27) (+5=20)", problem) == (1.0, True)
    assert LEDGER.true_totals("A(=26) (+5=15) (+7=27)", problem) == (2 / 3, False)


def test_chains_of_the_solutions_are_whole_cut_or_left_out_and_right() -> None:
    drawn = list(islice(LEDGER.solutions(0), 2000))
    kinds = Counter(chain_of(question, solution) for question, solution in drawn)
    assert 0.65 < kinds["right"] / 2000 < 0.75
    assert kinds["cut"] > 100
    assert kinds["none"] > 300
    assert kinds.total() == kinds["right"] + kinds["cut"] + kinds["none"]
    assert {split_of(problem_id(question)) for question, _ in drawn} == {"train"}
    assert drawn[:9] == list(islice(LEDGER.solutions(0), 9)) != list(islice(LEDGER.solutions(1), 9))


def test_policy_of_the_ledger_is_trained_from_scratch_and_reads_its_words(tmp_path: Path) -> None:
    config = SftConfig(
        output=str(tmp_path / "policy"),
        task=LEDGER,
        shape=PolicyShape(hidden=32, layers=1, heads=1, mlp=32),
        steps=2,
        batch=4,
        eval_problems=0,
    )
    sft(config)
    policy = load_policy(PolicyConfig(config.output), LEDGER.step_rule)
    (problem,) = problems("test", 1)
    answer = LEDGER.forced_answer(problem)
    ids = policy.tokenizer.encode(answer, add_special_tokens=False)
    assert policy.text(ids) == answer
    with pytest.raises(UserError, match="nothing is graded in task 'ledger'; set eval_problems 0"):
        sft(SftConfig(output=str(tmp_path / "other"), task=LEDGER))


def test_a_policy_of_the_tape_keeps_what_it_knows_and_learns_the_words(tmp_path: Path) -> None:
    config = SftConfig(
        output=str(tmp_path / "policy"), task=LEDGER, init="pav:base", steps=1, batch=2, lr=1e-9,
        lr_rest=1e-9, warmup=0, eval_problems=0,
    )  # fmt: skip
    sft(config)
    base, grown = (load_file(Path(model_path(m)) / "model.safetensors")
                   for m in ("pav:base", config.output))  # fmt: skip
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(grown[name]) == len(TOKENIZER) > len(base[name])
        assert torch.allclose(grown[name][: len(base[name])], base[name], atol=1e-6)


def test_shipped_policy_knows_the_words_and_a_good_chain_makes_its_reference_likely() -> None:
    assert load_tokenizer(model_path("pav:ledger")).get_vocab() == TOKENIZER.get_vocab()
    found = problems("test", 100)
    samples, without = written("pav:ledger", found)
    kinds = Counter(sample.chain for sample in samples)
    # What configs/ledger/policy.yaml says, with room for 100 samples.
    assert 0.3 < kinds["right"] / 100 < 0.65
    assert kinds["wrong"] > 10
    assert kinds["none"] + kinds["cut"] > 10
    gain = {kind: mean(s.logprob - w for s, w in zip(samples, without, strict=True)
                       if s.chain == kind) for kind in ("right", "wrong")}  # fmt: skip
    assert gain["right"] > 10
    assert gain["wrong"] < gain["right"] - 10
    assert not [s for s, p in zip(samples, found, strict=True) if LEDGER.forced_answer(p) in s.text]
    truths = [LEDGER.true_totals(s.text, p) for s, p in zip(samples, found, strict=True)]
    assert sum(truth.whole for truth in truths) > 1


def chain_of(question: str, solution: str) -> str:
    """Kind of the chain: none, wrong, cut (no slip, but not at the end) or right."""
    chain = solution.partition(TAG)[0].rstrip("\n")
    if not chain:
        return "none"
    lines = chain.split("\n")
    last = f"{TAG}{running_totals(question)[-1]}"
    *slips, end = Tape().slips([*lines, last], Problem("p", question))
    return "wrong" if slips[-1] else "cut" if end else "right"


@dataclass(frozen=True)
class Written:
    """One sample: its text, the kind of its chain, and the reference's log-probability after it."""

    text: str
    chain: str
    logprob: float


def written(
    model: str, problems: list[Problem], seed: int = 0
) -> tuple[list[Written], list[float]]:
    """A sample for every problem, and the reference's log-probability after no chain."""
    network = AutoModelForCausalLM.from_pretrained(model_path(model), dtype=torch.float32).eval()
    torch.manual_seed(seed)
    pad = TOKENIZER.pad_token_id
    prompts = [TOKENIZER.encode(f"{p.question}\n") for p in problems]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    with torch.inference_mode():
        out = network.generate(
            ids, attention_mask=(ids != pad).long(), do_sample=True, top_k=0, max_length=224
        )
    texts = TOKENIZER.batch_decode(out[:, width:], skip_special_tokens=True)
    chains = [text.partition(TAG)[0] for text in texts]
    after = reference_logprobs(network, problems, chains)
    without = reference_logprobs(network, problems, [""] * len(problems))
    return [
        Written(text, chain_of(p.question, text), logprob)
        for p, text, logprob in zip(problems, texts, after, strict=True)
    ], without


@torch.inference_mode()
def reference_logprobs(
    network: PreTrainedModel, problems: list[Problem], chains: list[str]
) -> list[float]:
    """log pi(tag, reference, EOS | prompt, chain) of every problem."""
    found = []
    for problem, chain in zip(problems, chains, strict=True):
        before = TOKENIZER.encode(f"{problem.question}\n{chain}")
        answer = TOKENIZER.encode(LEDGER.forced_answer(problem), add_special_tokens=False)
        ids = torch.tensor([[*before, *answer, TOKENIZER.eos_token_id]])
        logprobs = network(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
        found.append(float(logprobs.gather(1, ids[0, len(before) :, None]).sum()))
    return found
