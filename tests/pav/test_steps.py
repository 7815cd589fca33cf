"""Step boundaries and scoring positions, with exact ids, on a character and a chat tokenizer."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pav.core.errors import UserError
from pav.core.steps import Stepper, StepRule, compile_rule, scoring_position
from pav.policy.policy import Prompt, encode_prompt
from pav.tasks.tape import tape_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with tokens that hold a newline and more: ``.\\n``, ``\\n\\n``, ``\\n  ``."""
    merges = [(".", "Ċ"), ("Ċ", "Ċ"), ("Ċ", "Ġ"), ("ĊĠ", "Ġ"), ("Ġ", "Ġ")]
    tokens = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [a + b for a, b in merges]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


TAPE, CHAT = tape_tokenizer(), chat_tokenizer()
TAPE_PROMPT = encode_prompt(TAPE, Prompt(), "37+8")
CHAT_PROMPT = encode_prompt(CHAT, Prompt(template="{question}", chat=True), "2*3-1?")


def stepper(tokenizer: PreTrainedTokenizerFast, **rule: object) -> Stepper:
    return compile_rule(StepRule(**rule), tokenizer, [tokenizer.eos_token_id])  # type: ignore[arg-type]


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def chat_ids(*tokens: str) -> list[int]:
    return [int(CHAT.convert_tokens_to_ids(t)) for t in tokens]


def test_tape_steps_are_scored_at_the_token_before_newline_or_eos() -> None:
    assert TAPE_PROMPT == [1, 6, 10, 13, 11, 18]
    solution = [*ids_of(TAPE, "37+8=45\nA45"), TAPE.eos_token_id]
    assert solution == [6, 10, 13, 11, 16, 7, 8, 18, 17, 7, 8, 2]
    ends = stepper(TAPE).step_ends(solution)
    assert ends == [8, 12]
    positions = [scoring_position(len(TAPE_PROMPT), end) for end in (0, *ends)]
    assert positions == [5, 12, 16]
    whole = TAPE_PROMPT + solution
    # The newline of the prompt, the last digit of the result, the last digit of the answer.
    assert [whole[p] for p in positions] == [18, 8, 8]
    assert [whole[p + 1] for p in positions[1:]] == [18, 2]


def test_step_zero_of_a_chat_is_scored_at_the_newline_that_opens_the_assistants_turn() -> None:
    assert CHAT.decode(CHAT_PROMPT).endswith("<|im_start|>assistant\n")
    position = scoring_position(len(CHAT_PROMPT), 0)
    assert position == len(CHAT_PROMPT) - 1
    assert [CHAT_PROMPT[position]] == chat_ids("Ċ")


@pytest.mark.parametrize(
    ("text", "tokens", "ends"),
    [
        ("ab\ncd\n", ["a", "b", "Ċ", "c", "d", "Ċ"], [3, 6]),
        # The token that ends the step carries more: a full stop, a blank line, an indentation.
        ("a.\nb.\n", ["a", ".Ċ", "b", ".Ċ"], [2, 4]),
        ("ab\n\ncd", ["a", "b", "ĊĊ", "c", "d"], [3]),
        ("ab\n  cd\n", ["a", "b", "ĊĠĠ", "c", "d", "Ċ"], [3, 6]),
        # Blank lines after a boundary belong to the step that follows.
        ("a.\n\nb\n", ["a", ".Ċ", "Ċ", "b", "Ċ"], [2, 5]),
        ("ab\n\n\n\ncd\n", ["a", "b", "ĊĊ", "ĊĊ", "c", "d", "Ċ"], [3, 7]),
        ("ab\n  \ncd\n", ["a", "b", "ĊĠĠ", "Ċ", "c", "d", "Ċ"], [3, 7]),
        ("\n\nab\n", ["ĊĊ", "a", "b", "Ċ"], [4]),
        # A delimiter token with content of its own is no step when it stands alone.
        (".\nab\n", [".Ċ", "a", "b", "Ċ"], [4]),
        ("no newline", list("no") + ["Ġ"] + list("newline"), []),
        ("\n\n", ["ĊĊ"], []),
        ("", [], []),
    ],
)
def test_chat_steps_end_at_the_token_that_holds_the_newline(
    text: str, tokens: list[str], ends: list[int]
) -> None:
    solution = ids_of(CHAT, text)
    assert solution == chat_ids(*tokens)
    assert stepper(CHAT).step_ends(solution) == ends


def test_delimiter_twice_in_a_row_ends_one_step_on_the_tape() -> None:
    solution = [*ids_of(TAPE, "1+2=3\n\n=3\nA3"), TAPE.eos_token_id]
    ends = stepper(TAPE).step_ends(solution)
    assert solution == [4, 13, 5, 16, 6, 18, 18, 16, 6, 18, 17, 6, 2]
    assert ends == [6, 10, 13]
    assert [scoring_position(6, end) for end in ends] == [10, 14, 17]


def test_eos_ends_a_step_also_without_any_delimiter_and_right_after_one() -> None:
    eos = CHAT.eos_token_id
    rule = stepper(CHAT)
    assert rule.step_ends([*chat_ids("a", "b"), eos]) == [3]
    after = [*chat_ids("a", "b", "Ċ"), eos]
    assert rule.step_ends(after) == [3, 4]
    # The second step has no content: it is scored at the newline, which predicts EOS.
    assert scoring_position(10, 4) == 12
    assert after[12 - 10] == chat_ids("Ċ")[0]


def test_solution_of_eos_alone_has_no_step_because_step_zero_is_scored_there() -> None:
    assert stepper(CHAT).step_ends([CHAT.eos_token_id]) == []


def test_long_step_is_cut_and_scored_on_its_last_but_one_token() -> None:
    rule = stepper(CHAT, max_tokens=4)
    solution = [*chat_ids(*"abcdefg", "Ċ", *"hi"), CHAT.eos_token_id]
    assert rule.step_ends(solution) == [4, 8, 11]
    cut = [rule.is_cut(solution[a:b]) for a, b in pairwise((0, 4, 8, 11))]
    assert cut == [True, False, False]
    assert [scoring_position(10, end) for end in (4, 8, 11)] == [12, 16, 19]


def test_nothing_after_an_unscored_cut_is_a_step() -> None:
    rule = stepper(CHAT, max_tokens=4, score_cut=False)
    assert rule.step_ends(chat_ids("a", "b", "Ċ", *"cdefg", "Ċ")) == [3]


def test_blank_lines_are_cut_at_max_tokens_too() -> None:
    rule = stepper(CHAT, max_tokens=3)
    blank = chat_ids("ĊĊ", "ĊĊ", "ĊĊ")
    assert rule.step_ends(blank) == [3]
    assert rule.is_cut(blank)


def test_min_tokens_merges_short_lines_into_the_next_step() -> None:
    rule = stepper(CHAT, min_tokens=4)
    solution = [*chat_ids("a", "Ċ", "b", "Ċ", *"cde", "Ċ", "f"), CHAT.eos_token_id]
    assert rule.step_ends(solution) == [4, 8, 10]


def test_result_part_opens_after_the_last_equals_sign() -> None:
    rule = stepper(TAPE)
    assert rule.result_start(ids_of(TAPE, "37+8=45\n")) == 5
    assert rule.result_start(ids_of(TAPE, "A45")) == 0
    assert rule.result_start(ids_of(TAPE, "37+8=")) == 0


def test_delimiter_in_no_token_is_an_error_that_names_it() -> None:
    with pytest.raises(UserError, match=r"step_rule.delimiter '§§' is in no single token"):
        stepper(CHAT, delimiter="§§")
    with pytest.raises(UserError, match=r"step_rule.delimiter is empty"):
        StepRule(delimiter="")
    with pytest.raises(UserError, match=r"step_rule.max_tokens is 3; it must exceed min_tokens"):
        StepRule(min_tokens=3, max_tokens=3)


TAPE_ALPHABET = ids_of(TAPE, "12+=\n\n\n") + [TAPE.eos_token_id]
CHAT_ALPHABET = chat_ids("a", "b", "Ġ", "Ċ", "ĊĊ", ".Ċ", "ĊĠĠ", ".", "<|im_end|>")


@st.composite
def cut_solutions(draw: st.DrawFn) -> tuple[Stepper, list[int]]:
    tokenizer, alphabet = draw(st.sampled_from([(TAPE, TAPE_ALPHABET), (CHAT, CHAT_ALPHABET)]))
    shortest = draw(st.integers(0, 5))
    longest = draw(st.none() | st.integers(max(shortest, 1) + 1, 12))
    rule = stepper(
        tokenizer, min_tokens=shortest, max_tokens=longest, score_cut=draw(st.booleans())
    )
    return rule, draw(st.lists(st.sampled_from(alphabet), max_size=40))


@given(cut_solutions(), st.integers(1, 30))
def test_steps_and_tail_make_up_the_solution_and_are_scored_in_order(
    case: tuple[Stepper, list[int]], prompt_length: int
) -> None:
    rule, ids = case
    ends = rule.step_ends(ids)
    starts = [0, *ends]
    steps = [ids[a:b] for a, b in pairwise(starts)]
    tail = ids[starts[-1] :]
    assert [t for step in [*steps, tail] for t in step] == ids
    positions = [scoring_position(prompt_length, end) for end in (0, *ends)]
    assert all(a < b for a, b in pairwise(positions))
    for step in steps:
        # Sampling token by token stops exactly where training cuts.
        assert rule.ends_step(step)
        assert not any(rule.ends_step(step[:n]) for n in range(len(step)))
        if rule.rule.max_tokens is not None:
            assert len(step) <= rule.rule.max_tokens
        assert rule.rule.score_cut or not rule.is_cut(step)
