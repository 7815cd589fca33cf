"""A policy: a causal LM directory, its tokenizer, its own prompt and how solutions are sampled."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pav.core.errors import UserError
from pav.core.hub import offline_if_unreachable
from pav.core.steps import Stepper, StepRule, compile_rule
from pav.core.text import check_text
from pav.tasks.base import Problem, Task

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Dtype = Literal["float32", "bfloat16", "float16"]
ASSET_PREFIX = "pav:"
# What chat templates take for now; a run over midnight asks alike.
STARTED = datetime.now()
CLOCK = "strftime_now"
# What transformers raises for files that are torn, or hold something else.
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError)


@dataclass(frozen=True)
class Prompt:
    """How a policy is asked. Every policy has its own; only solution ids are shared.

    Args:
        template: user text; ``{question}`` is replaced. Raw policies are fed exactly this.
        chat: wrap the text with the tokenizer's chat template (by default not; a prover or trunk
            without any setting here is asked as the policy is).
        system: system message (chat only).
        few_shot: (question, solution) pairs shown first.
        assistant_prefix: text that opens the assistant's turn (chat) or ends the prompt (raw).
        chat_template_kwargs: passed to the chat template, e.g. ``enable_thinking: false``;
            ``strftime_now: 2026-07-31`` is the date that a template takes for today.
    """

    template: str = "{question}\n"
    # None and False ask alike; only what is set makes a prompt one's own (see like).
    chat: bool | None = None
    system: str | None = None
    few_shot: list[tuple[str, str]] = field(default_factory=list)
    assistant_prefix: str = ""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "{question}" not in self.template:
            raise UserError(f"prompt.template {self.template!r} has no {{question}}; add it")
        check_text(asdict(self), "prompt")
        self.clock(STARTED)

    def clock(self, now: datetime) -> datetime:
        """What the chat template takes for now: the given date, or ``now``.

        Raises:
            UserError: if what is given is no date.
        """
        given = self.chat_template_kwargs.get(CLOCK)
        try:
            return now if given is None else datetime.fromisoformat(given)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"prompt.chat_template_kwargs.{CLOCK} is {given!r}; give a date such as 2026-07-31"
            ) from error


@dataclass(frozen=True)
class Sampler:
    """How solutions are sampled: the same for labels, search and baselines.

    Args:
        temperature: softmax temperature.
        top_p: nucleus mass.
        top_k: 0 for all tokens.
        repetition_penalty: 1 for none.
        max_length: cap on prompt + solution, in tokens; by default (0) the longest prompt and the
            task's room for a solution.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_length: int = 0

    def __post_init__(self) -> None:
        if self.max_length and self.max_length < 2:
            raise UserError(f"sampler.max_length is {self.max_length}; give at least 2 tokens")
        # The upper limit is vLLM's.
        if not 0 < self.temperature <= 2:
            raise UserError(
                f"sampler.temperature is {self.temperature}; Monte-Carlo values need sampling: "
                "give a temperature above 0, at most 2"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampler.top_p is {self.top_p}; give a mass above 0, at most 1")
        if self.top_k < 0:
            raise UserError(f"sampler.top_k is {self.top_k}; give 0 (all tokens) or more")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(
                f"sampler.repetition_penalty is {self.repetition_penalty}; give a number above 0"
            )


@dataclass(frozen=True)
class PolicyConfig:
    """Which model to sample from.

    Args:
        model: a transformers directory, a hub id, or a shipped one (``pav:base``, ``pav:prover``,
            ``pav:strong``, ``pav:ledger``).
        name: what labels and heads call it; by default the last part of ``model``.
        prompt: how it is asked.
        dtype: weights and activations; never chosen for you. A CPU without avx512_bf16 or amx_bf16
            emulates bfloat16, slowly.
    """

    model: str = "pav:base"
    name: str | None = None
    prompt: Prompt = field(default_factory=Prompt)
    dtype: Dtype = "float32"

    @property
    def label(self) -> str:
        """Name of the policy in labels and heads."""
        return self.name or self.model.removeprefix(ASSET_PREFIX).rstrip("/").rsplit("/", 1)[-1]


def asked(policy: PolicyConfig, task: Task) -> PolicyConfig:
    """The policy with the task's own template, unless it has one of its own."""
    if policy.prompt.template != Prompt.template:
        return policy
    return replace(policy, prompt=replace(policy.prompt, template=task.template))


def like(policy: PolicyConfig, other: PolicyConfig) -> PolicyConfig:
    """The policy with the prompt of ``other``, unless it has one of its own."""
    return replace(policy, prompt=other.prompt) if policy.prompt == Prompt() else policy


def settled(policy: PolicyConfig) -> PolicyConfig:
    """The policy as it is recorded: nothing of its prompt is left open."""
    return replace(policy, prompt=replace(policy.prompt, chat=bool(policy.prompt.chat)))


def asset(name: str) -> Path:
    """Path of a shipped directory or file, e.g. ``asset('base')``."""
    return Path(str(resources.files("pav") / "assets" / name))


def model_path(model: str) -> str:
    """Local path of ``model``, or the hub id itself.

    Raises:
        UserError: if a shipped model or a local path does not exist, or has pickled weights alone.
    """
    if model.startswith(ASSET_PREFIX):
        path = asset(model.removeprefix(ASSET_PREFIX))
        if not path.exists():
            shipped = sorted(p.parent.name for p in asset("").glob("*/config.json"))
            raise UserError(f"no shipped model {model!r}; there are {', '.join(shipped)}")
        return str(path)
    looks_local = model.startswith((".", "/", "~")) or model.count("/") != 1
    path = Path(model).expanduser()
    if looks_local and not (path / "config.json").exists():
        raise UserError(
            f"no model at {model!r} (no config.json there); give a transformers directory, a hub "
            "id (owner/name) or a shipped model such as pav:base"
        )
    pickled = sorted(p.name for p in path.glob("*.bin") if p.name.startswith("pytorch_model"))
    if pickled and not any(path.glob("*.safetensors")):
        raise UserError(
            f"the model at {model!r} holds pickled weights alone ({pickled[0]}), which could run "
            "code and are never read; save it as safetensors: load it in transformers where you "
            "trust it, and save_pretrained to another directory"
        )
    if (path / "config.json").exists():
        return str(path)
    offline_if_unreachable()
    return model


@dataclass(frozen=True)
class Policy:
    """A policy ready to be prompted (weights are loaded by the engine, not here)."""

    config: PolicyConfig
    path: str
    tokenizer: PreTrainedTokenizerBase
    stepper: Stepper
    # It goes with the policy to other processes, which start later.
    clock: datetime = STARTED

    def encode(self, problem: Problem) -> list[int]:
        """Prompt ids of ``problem``; no second BOS in front (``design``: "BOS rule")."""
        return encode_prompt(self.tokenizer, self.config.prompt, problem.question, self.clock)

    def text(self, ids: Sequence[int]) -> str:
        """Text of solution ids, special tokens removed."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None and not self.tokenizer.clean_up_tokenization_spaces:
            # What decode() ends in; what it does before takes twice as long.
            return str(backend.decode(list(ids), skip_special_tokens=True))
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @cached_property
    def fingerprint(self) -> str:
        """Weights, tokenizer and prompt settings: what a rollout's distribution depends on.

        Read once per load: that takes a third of a second. What a chat template makes of the
        settings is :func:`pav.policy.rendered.rendered`.
        """
        parts = [weights_digest(self.path), tokenizer_fingerprint(self.tokenizer)]
        parts.append(json.dumps(asdict(self.config.prompt), sort_keys=True))
        return hashlib.sha256("\n".join([*parts, self.config.dtype]).encode()).hexdigest()[:16]


def load_policy(config: PolicyConfig, rule: StepRule) -> Policy:
    """Load tokenizer and step rule of ``config.model``.

    Raises:
        UserError: if they cannot be loaded, or refuse the prompt.
    """
    path = model_path(config.model)
    tokenizer = load_tokenizer(path)
    config = settled(config)
    # A prompt that cannot be made is found now, and not when engines are loaded.
    encode_prompt(tokenizer, config.prompt, "?")
    return Policy(config, path, tokenizer, compile_rule(rule, tokenizer, eos_ids(path, tokenizer)))


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Tokenizer at ``path``; remote code is never run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0]
        there = "" if Path(path).is_dir() else "; give a directory that holds the model"
        raise UserError(f"cannot load a tokenizer from {path!r}: {reason}{there}") from error


def eos_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All ids that end a sequence: the tokenizer's, the model's and its generation config's."""
    from transformers import AutoConfig, GenerationConfig

    ids: set[int] = set()
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    try:
        sources: list[Any] = [AutoConfig.from_pretrained(path, trust_remote_code=False)]
        if (Path(path) / "generation_config.json").exists():
            sources.append(GenerationConfig.from_pretrained(path))
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load a config from {path!r}: {reason}") from error
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    if not ids:
        raise UserError(f"the model at {path!r} names no end-of-sequence token; set eos_token")
    return sorted(ids)


def vocabulary_size(path: str) -> int:
    """Rows of the embedding of the model at ``path``: more than the tokenizer's, if padded."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    return int(config.get_text_config().vocab_size)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, question: str, clock: datetime = STARTED
) -> list[int]:
    """Ids of a prompt: the chat template's own, or the raw text's own encoding.

    ``clock`` is what the template takes for now, unless the prompt names a date.
    """
    user = prompt.template.replace("{question}", question)
    shots = [(prompt.template.replace("{question}", q), a) for q, a in prompt.few_shot]
    if prompt.chat:
        if not tokenizer.chat_template:
            raise UserError(
                f"prompt.chat is true, but the tokenizer {tokenizer.name_or_path!r} has no chat "
                "template; set prompt.chat false and write prompt.template"
            )
        messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
        for q, a in shots:
            messages += [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        messages.append({"role": "user", "content": user})
        from jinja2 import TemplateError

        # A variable of the template hides the function of that name, which reads the real clock.
        given = {**prompt.chat_template_kwargs, CLOCK: prompt.clock(clock).strftime}
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **given
            )
        except TemplateError as error:  # Gemma's, for one, knows no system message
            raise UserError(
                f"the chat template of {tokenizer.name_or_path!r} refuses the prompt: {error}; "
                "change prompt.system, prompt.few_shot or prompt.chat_template_kwargs"
            ) from error
        # The template already holds BOS where the model wants one.
        return list(tokenizer.encode(text + prompt.assistant_prefix, add_special_tokens=False))
    text = "".join(q + a + "\n\n" for q, a in shots) + user + prompt.assistant_prefix
    ids = list(tokenizer.encode(text))
    # Some tokenizers close every encoding; a prompt must stay open.
    while ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        ids.pop()
    return ids


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that turns text into ids (vocabulary, merges, normaliser, specials)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        if backend.padding or backend.truncation:  # the last call's settings, not the tokenizer's
            from tokenizers import Tokenizer

            backend = Tokenizer.from_str(backend.to_str())
            backend.no_padding()
            backend.no_truncation()
        state = backend.to_str()
    else:
        state = json.dumps(sorted(tokenizer.get_vocab().items()), allow_nan=False)
    return hashlib.sha256(state.encode()).hexdigest()[:16]


def weights_digest(path: str) -> str:
    """Digest of a model directory's weights; big shards by size and both ends.

    A hub id that is not a local directory is its own digest.
    """
    directory = Path(path)
    files = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    if not files:
        return hashlib.sha256(path.encode()).hexdigest()[:16]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            if size <= 64 << 20:
                digest.update(stream.read())
            else:
                digest.update(stream.read(1 << 20))
                stream.seek(-(1 << 20), 2)
                digest.update(stream.read())
    return digest.hexdigest()[:16]
