"""OpenAI's chat completions, as far as a search can honour them: requests, answers, errors."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pav.core.text import no_text
from pav.policy.policy import Sampler
from search.run.records import Record


class ApiError(Exception):
    """An error in OpenAI's shape.

    Args:
        status: HTTP status.
        message: one line for the user.
        param: field of the request that is to blame.
        code: OpenAI's word for it.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Chat:
    """A request that was understood.

    Attributes:
        model: name of a recipe.
        question: text of the one user message.
        seed: run seed; the same request with the same seed has the same answer.
        max_tokens: cap on one solution; None leaves the sampler's.
        stream: send the answer as events.
        include_usage: end the stream with what it cost.
    """

    model: str
    question: str
    seed: int = 0
    max_tokens: int | None = None
    stream: bool = False
    include_usage: bool = False


# Fields without an effect on the answer, and values that ask for nothing.
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "min_p": (0,),
    "logit_bias": ({},),
    "stop": ([], ""),
    "tools": ([],),
    # Without a tool, which is refused, neither says anything.
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
}


def parse_chat(body: Any, sampler: Sampler) -> Chat:
    """The request in a JSON body.

    Raises:
        ApiError: if it asks for what a search cannot give; nothing is dropped silently.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    if (found := no_text(body)) is not None:
        field, character = found
        name = re.split(r"[.\[]", field)[0]
        raise ApiError(
            400,
            f"{field} holds the lone surrogate U+{ord(character):04X}, half a character; send text "
            "that can be encoded as UTF-8",
            name if name in body else None,
        )
    given = {k: v for k, v in body.items() if v is not None and k not in _IGNORED}
    model = _take(given, "model", str, "")
    if not model:
        raise ApiError(400, "model is missing; GET /v1/models names some", "model")
    question = _question(given.pop("messages", None))
    seed = _take(given, "seed", int, 0)
    stream = _take(given, "stream", bool, False)
    options = _take(given, "stream_options", dict, {})
    caps = [_take(given, k, int, None) for k in ("max_tokens", "max_completion_tokens")]
    max_tokens = min((c for c in caps if c is not None), default=None)
    if max_tokens is not None and max_tokens < 1:
        raise ApiError(400, f"max_tokens is {max_tokens}; give at least 1", "max_tokens")
    # The verifier was made for one sampler: another would make its values wrong.
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        value, fixed = given.pop(name, None), getattr(sampler, name)
        if value is not None and value != fixed:
            raise ApiError(
                400, f"{name} is {value!r}; this verifier was made for {fixed}: leave it out", name
            )
    for name, value in given.items():
        if value not in _NEUTRAL.get(name, ()):
            raise ApiError(400, f"{name} is not supported by a search; leave it out", name)
    return Chat(
        model, question, seed, max_tokens, stream, bool(options.get("include_usage", False))
    )


def _take(given: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = given.pop(name, default)
    wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
    if value is not default and wrong:
        raise ApiError(400, f"{name} must be {kind.__name__}, not {type(value).__name__}", name)
    return value


def _question(messages: Any) -> str:
    if isinstance(messages, list):
        messages = [m for m in messages if not _says_nothing(m)]
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        raise ApiError(
            400,
            "messages must hold one user message, the question: the rest of the prompt is the "
            "verifier's own, and a search has no earlier turns",
            "messages",
        )
    role, content = messages[0].get("role"), _text(messages[0].get("content"))
    if role != "user":
        raise ApiError(400, f"the message has role {role!r}; only 'user' is known", "messages")
    if content is None or not content.strip():
        raise ApiError(400, "the message's content must be text", "messages")
    return content


def _says_nothing(message: Any) -> bool:
    """Whether it is the empty system message that some clients always send."""
    if not isinstance(message, dict) or message.get("role") not in ("system", "developer"):
        return False
    content = message.get("content")
    text = "" if content is None else _text(content)
    return text is not None and not text.strip()


def _text(content: Any) -> str | None:
    """A message's content, given whole or in parts; None if it is not text alone."""
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) else None for p in content]
        texts = [t for t in parts if isinstance(t, str)]
        return "".join(texts) if len(texts) == len(parts) else None
    return content if isinstance(content, str) else None


def completion(chat: Chat, record: Record, prompt_tokens: int) -> dict[str, Any]:
    """The answer in one piece."""
    text, reason = _answer(record)
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    return {
        **_head(chat, "chat.completion"),
        "choices": [choice],
        "usage": usage(record, prompt_tokens),
        "search": summary(record),
    }


def chunks(chat: Chat, record: Record, prompt_tokens: int) -> Iterator[dict[str, Any]]:
    """The answer as OpenAI's stream of chunks, a line of the solution each."""
    head = _head(chat, "chat.completion.chunk")
    # A client that asked for usage finds null in all chunks but the last.
    head |= {"usage": None} if chat.include_usage else {}

    def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return {**head, "choices": [choice]}

    text, reason = _answer(record)
    yield chunk({"role": "assistant", "content": ""})
    for line in text.splitlines(keepends=True):
        yield chunk({"content": line})
    yield {**chunk({}, reason), "search": summary(record)}
    if chat.include_usage:
        yield {**head, "choices": [], "usage": usage(record, prompt_tokens)}


def _head(chat: Chat, kind: str) -> dict[str, Any]:
    made = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}
    return {**made, "model": chat.model}


def _answer(record: Record) -> tuple[str, str]:
    """Text and finish reason; nothing finished within the cap is an empty answer cut by length."""
    if record.picked is None:
        return "", "length"
    return record.candidates[record.picked].text, "stop"


def usage(record: Record, prompt_tokens: int) -> dict[str, Any]:
    """Tokens as OpenAI counts them: what was sampled beside the answer is reasoning."""
    spent = record.policy_tokens
    shown = 0 if record.picked is None else len(record.candidates[record.picked].ids)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": spent,
        "total_tokens": prompt_tokens + spent,
        "completion_tokens_details": {"reasoning_tokens": max(0, spent - shown)},
    }


def summary(record: Record) -> dict[str, Any]:
    """What only a search has to say: beside OpenAI's fields, ignored by its clients."""
    picked = None if record.picked is None else record.candidates[record.picked]
    return {
        "answer": record.answer,
        "values": {} if picked is None else {h: q[-1] for h, q in picked.q.items() if q},
        "candidates": len(record.candidates),
        "truncated": record.truncated,
        "settings": {k: v for k, v in record.settings.items() if k != "trunk"},
        "policy_tokens": record.policy_tokens,
        "policy_prefilled": record.policy_prefilled,
        "policy_cached": record.policy_cached,
        "verifier_tokens": record.verifier_tokens,
        "verifier_cached": record.verifier_cached,
    }
