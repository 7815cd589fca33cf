"""A policy: a causal LM directory, its tokenizer, its own prompt and how solutions are sampled."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pav.errors import UserError
from pav.steps import Stepper, StepRule, compile_rule
from pav.tasks.base import Problem, Task

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Dtype = Literal["float32", "bfloat16", "float16"]
ASSET_PREFIX = "pav:"


@dataclass(frozen=True)
class Prompt:
    """How a policy is asked. Every policy has its own; only solution ids are shared.

    Args:
        template: user text; ``{question}`` is replaced. Raw policies are fed exactly this.
        chat: wrap the text with the tokenizer's chat template.
        system: system message (chat only).
        few_shot: (question, solution) pairs shown first.
        assistant_prefix: text that opens the assistant's turn (chat) or ends the prompt (raw).
        chat_template_kwargs: passed to the chat template, e.g. ``enable_thinking: false``.
    """

    template: str = "{question}\n"
    chat: bool = False
    system: str | None = None
    few_shot: list[tuple[str, str]] = field(default_factory=list)
    assistant_prefix: str = ""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "{question}" not in self.template:
            raise UserError(f"prompt.template {self.template!r} has no {{question}}; add it")


@dataclass(frozen=True)
class Sampler:
    """How solutions are sampled: the same for labels, search and baselines.

    Args:
        temperature: softmax temperature.
        top_p: nucleus mass.
        top_k: 0 for all tokens.
        repetition_penalty: 1 for none.
        max_length: cap on prompt + solution, in tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_length: int = 160

    def __post_init__(self) -> None:
        if self.max_length < 2:
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
            ``pav:strong``).
        name: what labels and heads call it; by default the last part of ``model``.
        prompt: how it is asked.
        dtype: weights and activations; never chosen for you.
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


def asset(name: str) -> Path:
    """Path of a shipped directory or file, e.g. ``asset('base')``."""
    return Path(str(resources.files("pav") / "assets" / name))


def model_path(model: str) -> str:
    """Local path of ``model``, or the hub id itself.

    Raises:
        UserError: if a shipped model or a local path does not exist.
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
    return str(path) if (path / "config.json").exists() else model


@dataclass(frozen=True)
class Policy:
    """A policy ready to be prompted (weights are loaded by the engine, not here)."""

    config: PolicyConfig
    path: str
    tokenizer: PreTrainedTokenizerBase
    stepper: Stepper

    def encode(self, problem: Problem) -> list[int]:
        """Prompt ids of ``problem``; no second BOS in front (``design``: "BOS rule")."""
        return encode_prompt(self.tokenizer, self.config.prompt, problem.question)

    def text(self, ids: Sequence[int]) -> str:
        """Text of solution ids, special tokens removed."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None and not self.tokenizer.clean_up_tokenization_spaces:
            # What decode() ends in; what it does before takes twice as long.
            return str(backend.decode(list(ids), skip_special_tokens=True))
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @property
    def fingerprint(self) -> str:
        """Weights, tokenizer and prompt: what a rollout's distribution depends on."""
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
    # A prompt that cannot be made is found now, and not when engines are loaded.
    encode_prompt(tokenizer, config.prompt, "?")
    return Policy(config, path, tokenizer, compile_rule(rule, tokenizer, eos_ids(path, tokenizer)))


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Tokenizer at ``path``; remote code is never run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load a tokenizer from {path!r}: {reason}") from error


def eos_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All ids that end a sequence: the tokenizer's, the model's and its generation config's."""
    from transformers import AutoConfig, GenerationConfig

    ids: set[int] = set()
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    sources: list[Any] = [AutoConfig.from_pretrained(path, trust_remote_code=False)]
    if (Path(path) / "generation_config.json").exists():
        sources.append(GenerationConfig.from_pretrained(path))
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    if not ids:
        raise UserError(f"the model at {path!r} names no end-of-sequence token; set eos_token")
    return sorted(ids)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, question: str) -> list[int]:
    """Ids of a prompt: the chat template's own, or the raw text's own encoding."""
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

        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **prompt.chat_template_kwargs
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
        state = json.dumps(sorted(tokenizer.get_vocab().items()))
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
