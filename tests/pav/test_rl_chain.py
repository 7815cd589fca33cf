"""Where chains end and references begin, in tokenizers of the kinds that models have."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pav.core.steps import StepRule, compile_rule
from pav.policy.policy import Policy, PolicyConfig
from pav.rl.chain import At, Tags, answer_in, chain_of, endings, reference_ids
from pav.tasks.base import Problem
from pav.tasks.jsonl import Jsonl
from pav.tasks.tape import Tape, tape_tokenizer

R1 = Tags("<answer>", "</answer>")
# How Llama 3 and Qwen 2 part text before they merge: digits by three, and one by one.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SOLUTION = "So 3*6 is 18, and we add 0.\nThat is 18.\n</think>\n<answer>18</answer>"
CORPUS = [SOLUTION, "<answer>-2.5</answer>", "<answer> $x^2$ </answer>", "an answer, 7 < 8 > 5"] * 9


def byte_level(digits: str) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS.format(digits=digits)), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    core.decoder = decoders.ByteLevel()
    return core


def gemma() -> Tokenizer:
    """Spaces are a letter, and merges know no word ends: whole tags are tokens."""
    core = Tokenizer(models.BPE(byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
    ])  # fmt: skip
    return core


def policy_of(tokenizer: Any, rule: StepRule) -> Policy:
    stepper = compile_rule(rule, tokenizer, [tokenizer.eos_token_id])
    return Policy(PolicyConfig("own"), "own", tokenizer, stepper)


def trained(core: Tokenizer, size: int) -> Policy:
    printable = [*map(chr, range(33, 127)), "▁", "\n"]
    alphabet = printable if core.normalizer else pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", clean_up_tokenization_spaces=False
    )
    return policy_of(fast, StepRule())


POLICIES = {
    "llama 3": trained(byte_level(r"\p{N}{1,3}"), 420),
    "qwen": trained(byte_level(r"\p{N}"), 420),
    "gemma, short merges": trained(gemma(), 105),
    "gemma, whole tags and answers": trained(gemma(), 125),
}
TASK = Jsonl(data="nowhere.jsonl", grader="exact")
PROBLEM = Problem("p", "What is 3*6?", "18")


@pytest.fixture(params=list(POLICIES))
def policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES[request.param]


def ids_of(policy: Policy, text: str) -> list[int]:
    return list(policy.tokenizer.encode(text, add_special_tokens=False))


def test_the_kinds_differ_where_it_matters() -> None:
    last = {name: p.tokenizer.tokenize(SOLUTION)[-6:] for name, p in POLICIES.items()}
    assert "<answer>" in SOLUTION and len(set(map(tuple, last.values()))) >= 3
    merged = POLICIES["gemma, whole tags and answers"].tokenizer.tokenize(SOLUTION)
    assert any("answer>" in token for token in merged)


@pytest.mark.parametrize("answer", ["18", "-2.5", " $x^2$ ", "a text\nof two lines"])
def test_chain_and_reference_spell_the_solution_with_the_reference_in_it(
    policy: Policy, answer: str
) -> None:
    chain = chain_of(policy, R1, ids_of(policy, SOLUTION))
    reference = reference_ids(policy, TASK, R1, PROBLEM, answer, chain)
    before = SOLUTION[: SOLUTION.index("<answer>")]
    assert chain.is_tagged
    assert policy.text([*chain.ids, *reference]) == f"{before}<answer>{answer}</answer"
    # Of the sampled answer nothing is in the chain, and of the tag what its tokens allow.
    said = policy.text(chain.ids)
    assert before.startswith(said[: len(before)]) and "<answer>".startswith(said[len(before) :])


def test_tokens_of_the_sampled_solution_are_those_of_chain_and_reference(policy: Policy) -> None:
    # The policy's own answer as reference: what is read is what was sampled, token by token.
    ids = ids_of(policy, SOLUTION)
    chain = chain_of(policy, R1, ids)
    assert ids[: len(chain.ids)] == chain.ids
    reference = reference_ids(policy, TASK, R1, PROBLEM, "18", chain)
    same = [a == b for a, b in zip(ids[len(chain.ids) :], reference, strict=False)]
    assert all(same[:-1])


def test_sampling_ends_with_the_token_that_completes_the_tag(policy: Policy) -> None:
    ids = ids_of(policy, SOLUTION)
    for end, text in zip(endings(policy, R1), ("<answer", "</answer"), strict=True):
        ended = [n for n in range(1, len(ids) + 1) if end.is_solution(ids[:n])]
        first = next(n for n in range(1, len(ids) + 1) if text in policy.text(ids[:n]))
        assert end.is_watching and ended[0] == first
    assert not At("", policy).is_watching


def test_a_chain_that_opens_no_answer_is_all_that_was_written_and_the_tag_is_forced(
    policy: Policy,
) -> None:
    ids = [*ids_of(policy, "I think it is 18.\n"), policy.tokenizer.eos_token_id]
    chain = chain_of(policy, R1, ids)
    assert not chain.is_tagged and chain.ids == ids
    reference = reference_ids(policy, TASK, R1, PROBLEM, "18", chain)
    assert policy.text(reference) == "<answer>18</answer"


def test_half_a_tag_is_completed(policy: Policy) -> None:
    chain = chain_of(policy, R1, ids_of(policy, "18\n<ans"))
    assert not chain.is_tagged
    reference = reference_ids(policy, TASK, R1, PROBLEM, "18", chain)
    assert policy.text([*chain.ids, *reference]) == "18\n<answer>18</answer"


def test_the_answer_is_read_between_the_tags(policy: Policy) -> None:
    assert answer_in(policy, R1, ids_of(policy, SOLUTION)) == "18"
    assert answer_in(policy, R1, ids_of(policy, SOLUTION[:-9])) == "18"
    assert answer_in(policy, R1, ids_of(policy, "18")) is None


def test_the_tapes_chain_ends_with_its_own_tag() -> None:
    tape = Tape()
    policy = policy_of(tape_tokenizer(), tape.step_rule)
    tags = Tags(*tape.answer_tags)
    problem = Problem("p", "12+3", "15")
    eos = policy.tokenizer.eos_token_id
    ids = [*policy.tokenizer.encode("12+3=16\nA16", add_special_tokens=False), eos]
    chain = chain_of(policy, tags, ids)
    assert policy.text(chain.ids) == "12+3=16\nA"
    reference = reference_ids(policy, tape, tags, problem, "15", chain)
    assert policy.text(reference) == "15" and reference[-1] == eos


def test_without_tags_the_last_step_is_the_answer() -> None:
    tape = Tape()
    policy = policy_of(tape_tokenizer(), tape.step_rule)
    problem, none = Problem("p", "12+3", "15"), Tags("", "")
    eos = policy.tokenizer.eos_token_id
    whole = [*policy.tokenizer.encode("12+3=16\n=16\nA16", add_special_tokens=False), eos]
    chain = chain_of(policy, none, whole)
    assert policy.text(chain.ids) == "12+3=16\n=16\n" and chain.is_tagged
    reference = reference_ids(policy, tape, none, problem, "15", chain)
    assert policy.text(reference) == "A15" and reference[-1] == eos
    cut = chain_of(policy, none, whole[:10])
    assert policy.text(cut.ids) == "12+3=16\n" and not cut.is_tagged
