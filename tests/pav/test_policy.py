"""Prompts: one encoding per problem, exactly the template's own; errors that name the fix."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from pav.core.errors import UserError
from pav.core.steps import StepRule
from pav.policy.policy import (
    PolicyConfig,
    Prompt,
    Sampler,
    encode_prompt,
    load_policy,
    load_tokenizer,
    tokenizer_fingerprint,
)
from pav.tasks.base import Problem

CHARACTERS = sorted(set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 +-*=?.:\n"))
# The template writes BOS itself, as Llama's does; the post-processor would add one more.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' and no_system is defined %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if think is defined %}hm\n{% endif %}{% endif %}"
)


def tokenizer(chat: bool = True, close: bool = False) -> PreTrainedTokenizerFast:
    """A character tokenizer that opens every encoding with BOS and may close it with EOS."""
    tokens = ["<pad>", "<s>", "</s>", *CHARACTERS]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if close else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATE if chat else None,
        clean_up_tokenization_spaces=False,
    )


CHAT = tokenizer()


def encoded(text: str) -> list[int]:
    return list(CHAT.encode(text, add_special_tokens=False))


def test_chat_prompt_is_the_templates_own_encoding_with_one_bos() -> None:
    prompt = Prompt(template="Q: {question}", chat=True, system="Be brief.")
    ids = encode_prompt(CHAT, prompt, "1+1?")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q: 1+1?"},
    ]
    own = CHAT.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == own
    assert ids.count(CHAT.bos_token_id) == 1
    # The post-processor would have doubled it.
    assert CHAT.encode(CHAT.decode(ids)).count(CHAT.bos_token_id) == 2


def test_raw_prompt_is_the_texts_own_encoding_and_stays_open() -> None:
    raw = Prompt(template="{question}=")
    assert encode_prompt(tokenizer(chat=False), raw, "1+1") == [1, *encoded("1+1=")]
    assert encode_prompt(tokenizer(chat=False, close=True), raw, "1+1") == [1, *encoded("1+1=")]


def test_few_shot_examples_are_turns_of_a_chat_and_paragraphs_of_a_raw_prompt() -> None:
    shots = [("2+2?", "2+2=4\n4"), ("3?", "3")]
    chat = encode_prompt(CHAT, Prompt(template="Q {question}", chat=True, few_shot=shots), "1?")
    assert CHAT.decode(chat) == (
        "<s>user:Q 2+2?\nassistant:2+2=4\n4\nuser:Q 3?\nassistant:3\nuser:Q 1?\nassistant:"
    )
    raw = encode_prompt(CHAT, Prompt(template="{question}\n", few_shot=shots), "1?")
    assert CHAT.decode(raw) == "<s>2+2?\n2+2=4\n4\n\n3?\n3\n\n1?\n"


def test_assistant_prefix_opens_the_answer() -> None:
    chat = Prompt(template="{question}", chat=True, assistant_prefix="Well: ")
    assert CHAT.decode(encode_prompt(CHAT, chat, "1?")) == "<s>user:1?\nassistant:Well: "
    raw = Prompt(template="{question}\n", assistant_prefix="A")
    assert CHAT.decode(encode_prompt(CHAT, raw, "1?")) == "<s>1?\nA"


def test_chat_template_kwargs_reach_the_template() -> None:
    prompt = Prompt(template="{question}", chat=True, chat_template_kwargs={"think": True})
    assert CHAT.decode(encode_prompt(CHAT, prompt, "1?")) == "<s>user:1?\nassistant:hm\n"


def test_braces_in_a_question_are_text() -> None:
    prompt = Prompt(template="a {question} b")
    assert encode_prompt(CHAT, prompt, "1 + 1") == [1, *encoded("a 1 + 1 b")]
    assert encode_prompt(CHAT, prompt, "{question}") == [1, *CHAT.encode("a {question} b")[1:]]


def model_directory(path: Path, chat: bool = True) -> str:
    """A directory with config and tokenizer; weights are the engine's business."""
    made = tokenizer(chat)
    made.save_pretrained(path)
    LlamaConfig(vocab_size=len(made), bos_token_id=1, eos_token_id=2).save_pretrained(path)
    return str(path)


def test_loaded_policy_encodes_problems_and_knows_where_steps_end(tmp_path: Path) -> None:
    config = PolicyConfig(
        model_directory(tmp_path / "tiny"), prompt=Prompt(template="{question}", chat=True)
    )
    policy = load_policy(config, StepRule())
    assert config.label == "tiny"
    assert policy.encode(Problem("id", "1?")) == [1, *encoded("user:1?\nassistant:")]
    assert policy.stepper.stop_ids == [CHAT.eos_token_id, *encoded("\n")]
    assert policy.text([*encoded("1\n"), 2]) == "1\n"


def test_fingerprint_of_a_policy_changes_with_its_prompt(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "tiny")
    one, two, three = (
        load_policy(PolicyConfig(path, prompt=Prompt(template=t)), StepRule()).fingerprint
        for t in ("{question}\n", "{question}\n", "{question}?")
    )
    assert one == two != three


def test_fingerprint_of_a_tokenizer_does_not_depend_on_how_it_was_last_called() -> None:
    made = tokenizer()
    before = tokenizer_fingerprint(made)
    made(["1", "1+1"], padding=True, truncation=True, max_length=8)
    assert tokenizer_fingerprint(made) == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", r"no model at './nowhere' \(no config.json there\); give a transformers dir"),
        ("runs/policies/mine", "no model at 'runs/policies/mine'"),
        ("pav:bas", "no shipped model 'pav:bas'; there are"),
    ],
)
def test_missing_model_is_one_line_that_names_the_fix(model: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_policy(PolicyConfig(model), StepRule())
    assert "\n" not in str(error.value)


def test_model_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot load a tokenizer from") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_chat_without_chat_template_is_an_error() -> None:
    with pytest.raises(UserError, match=r"has no chat template; set prompt.chat false"):
        encode_prompt(tokenizer(chat=False), Prompt(template="{question}", chat=True), "1?")


def test_prompt_that_the_chat_template_refuses_is_an_error() -> None:
    prompt = Prompt(
        template="{question}", chat=True, system="x", chat_template_kwargs={"no_system": True}
    )
    with pytest.raises(UserError, match=r"System role not supported; change prompt.system"):
        encode_prompt(CHAT, prompt, "1?")


def test_template_without_question_is_an_error() -> None:
    with pytest.raises(UserError, match=r"prompt.template 'Solve it.' has no \{question\}; add it"):
        Prompt(template="Solve it.")


def test_sampler_refuses_what_cannot_be_sampled() -> None:
    with pytest.raises(UserError, match=r"sampler.temperature is 0.*give a temperature above 0"):
        Sampler(temperature=0)
    with pytest.raises(UserError, match=r"sampler.max_length is 1; give at least 2"):
        Sampler(max_length=1)


def test_delimiter_that_no_token_contains_is_an_error(tmp_path: Path) -> None:
    config = PolicyConfig(model_directory(tmp_path))
    with pytest.raises(UserError, match=r"step_rule.delimiter '\\n\\n' is in no single token"):
        load_policy(config, StepRule(delimiter="\n\n"))
