"""Readings through the prefix cache, in both forms in which vLLM answers: the scripted vLLM below
knows the true log-probability of every token after every other one, and caches whole blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

from pav.core.errors import UserError
from pav.engine.loop import drive
from pav.engine.read_check import check_reads
from pav.engine.vllm import VllmEngine
from pav.policy.inference import SCORE_SCALE, Read

VOCABULARY, LENGTH = 50, 24
HEADS = [VOCABULARY, VOCABULARY + 1]
REFERENCE = VOCABULARY + 2
RNG = np.random.default_rng(0)
# Of every token: the log-probability of every token (and score row) after it.
TRUTH = RNG.normal(size=(VOCABULARY, VOCABULARY + 3)).astype(np.float32)
IDS = RNG.integers(0, VOCABULARY, LENGTH).tolist()
LOGPROBS = TRUTH[IDS[:-1], IDS[1:]]
# How vLLM's first runner (CPUs) and its second one (GPUs) answer; two that no version does.
Form = Literal["every row", "computed rows", "one row too few", "other tokens"]


@dataclass
class ScriptedVllm:
    """Answers every request in the next step; ``cached`` tokens are taken from its cache.

    Attributes:
        form: of its ``prompt_logprobs``.
        cache: request ids -> tokens that are cached; the last one never is.
        asked: ids of every request.
    """

    form: Form
    cache: Any
    asked: list[list[int]] = field(default_factory=list)
    waiting: list[Any] = field(default_factory=list)

    def add_request(self, key: str, prompt: dict[str, list[int]], parameters: Any) -> None:
        self.waiting.append((key, prompt["prompt_token_ids"], parameters))

    def step(self) -> list[Any]:
        done, self.waiting = self.waiting, []
        return [self._answer(*request) for request in done]

    def reset_prefix_cache(self) -> None:
        self.asked.clear()

    def set_weight_version(self, version: str) -> None:
        assert version == "0"

    def _answer(self, key: str, ids: list[int], parameters: Any) -> Any:
        cached = self.cache(self, ids)
        assert 0 <= cached < len(ids)
        self.asked.append(ids)
        rows = None
        if parameters.prompt_logprobs is not None:
            tokens, logprobs = ids[1:], TRUTH[ids[:-1], ids[1:]].tolist()
            # Memory that nobody has written.
            logprobs[:cached], tokens[:cached] = [9e9] * cached, [-7] * cached
            first = 0 if self.form == "every row" else cached
            if self.form == "one row too few":
                first += 1
            if self.form == "other tokens":
                tokens = [token + 1 for token in tokens]
            rows = SimpleNamespace(token_ids=tokens[first:], logprobs=logprobs[first:])
        sampled = [0, *parameters.logprob_token_ids]
        flat = SampledRow(TRUTH[ids[-1], sampled].tolist())
        completion = SimpleNamespace(
            token_ids=[0], logprobs=flat, finish_reason="length", weight_versions=None
        )
        return SimpleNamespace(
            request_id=key,
            finished=True,
            prompt_token_ids=ids,
            prompt_logprobs=rows,
            num_cached_tokens=cached,
            outputs=[completion],
        )


@dataclass
class SampledRow:
    """vLLM's flat log-probabilities of one sampled token."""

    logprobs: list[float]

    def __len__(self) -> int:
        return 1


@pytest.fixture
def engine_on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine on a scripted vLLM."""

    def make(form: Form, cache: Any) -> VllmEngine:
        scripted = ScriptedVllm(form, cache)
        monkeypatch.setattr("pav.engine.vllm.load", lambda *_: scripted)
        engine = VllmEngine("nowhere", "float32", LENGTH + 1, [*HEADS, REFERENCE])
        engine.start()
        return engine

    return make


def read(engine: VllmEngine, ids: list[int], first: int | None) -> Read:
    found: list[Read] = []
    drive([engine], [partial(engine.read, ids, logprobs_from=first)], found.append, 1)
    return found[0]


def in_blocks(size: int, most: int) -> Any:
    """A cache of whole blocks: of the first request ``most`` tokens, of later ones all it can."""

    def cached(vllm: ScriptedVllm, ids: list[int]) -> int:
        known = most if not vllm.asked else len(ids) - 1
        return min(known, len(ids) - 1) // size * size

    return cached


@pytest.mark.parametrize("form", ["every row", "computed rows"])
def test_reading_is_the_truth_whatever_is_cached_and_whoever_answers(
    form: Form, engine_on: Any
) -> None:
    heads = (TRUTH[IDS[-1], HEADS] - TRUTH[IDS[-1], REFERENCE]) * SCORE_SCALE
    for size in (1, 4, 7):
        for most in range(LENGTH):
            for first in (1, 2, LENGTH // 2, LENGTH - 1, LENGTH):
                out = read(engine_on(form, in_blocks(size, most)), IDS, first)
                np.testing.assert_array_equal(out.logprobs, LOGPROBS[first - 1 :])
                np.testing.assert_allclose(out.heads, heads, rtol=1e-6)
                computed = sum(part.computed for part in (out, *out.gaps))
                assert computed >= LENGTH - max(out.cached, first)


def test_reading_without_log_probabilities_asks_once(engine_on: Any) -> None:
    engine = engine_on("computed rows", in_blocks(4, LENGTH))
    out = read(engine, IDS, None)
    assert (out.logprobs, out.gaps, out.cached) == (None, (), 20)


@pytest.mark.parametrize("form", ["one row too few", "other tokens"])
@pytest.mark.parametrize("gap_only", [False, True])
def test_answer_that_fits_neither_form_is_refused(
    form: Form, gap_only: bool, engine_on: Any
) -> None:
    engine = engine_on(form, in_blocks(4, 8))
    if gap_only:  # of the main reading nothing is asked, of the gap's something
        first = 3
        engine._engine.form = "computed rows"
        ask = engine._engine._answer

        def answer(key: str, ids: list[int], parameters: Any) -> Any:
            engine._engine.form = "computed rows" if len(ids) == LENGTH else form
            return ask(key, ids, parameters)

        engine._engine._answer = answer
    else:
        first = LENGTH - 1
    with pytest.raises(UserError, match=r"scores would be wrong.*VLLM_USE_V2_MODEL_RUNNER=0"):
        read(engine, IDS, first)


@pytest.mark.parametrize("form", ["every row", "computed rows"])
def test_start_up_check_passes_an_engine_whose_cache_changes_nothing(
    form: Form, engine_on: Any
) -> None:
    engine = engine_on(form, in_blocks(4, 0))
    check_reads(engine)
    assert engine.usage.prefilled == engine.usage.cached == 0


def test_start_up_check_refuses_an_engine_whose_cache_changes_the_answer(engine_on: Any) -> None:
    engine = engine_on("every row", in_blocks(4, 0))
    ask = engine._engine._answer

    def shifted(key: str, ids: list[int], parameters: Any) -> Any:
        answer = ask(key, ids, parameters)
        rows = answer.prompt_logprobs
        if answer.num_cached_tokens:  # the right number of rows, named rightly, of other positions
            rows.logprobs = [rows.logprobs[-1], *rows.logprobs[:-1]]
        return answer

    engine._engine._answer = shifted
    with pytest.raises(UserError, match=r"cached.*scores would be wrong.*--surprise false"):
        check_reads(engine)


def test_engine_that_reads_on_a_gpu_begins_with_the_check(
    engine_on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[VllmEngine] = []
    monkeypatch.setattr("pav.engine.vllm.check_reads", checked.append)
    engine_on("every row", in_blocks(4, 0))
    assert not checked  # a CPU's runner is known, and the check costs a second
    monkeypatch.setattr("pav.engine.vllm.on_cpu", lambda: False)
    engine = engine_on("every row", in_blocks(4, 0))
    assert checked == [engine]


def test_engine_that_is_first_asked_inside_a_running_loop_is_checked_there(
    engine_on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_on("computed rows", in_blocks(4, 0))  # vLLM is scripted from here on
    monkeypatch.setattr("pav.engine.vllm.on_cpu", lambda: False)
    engine = VllmEngine("nowhere", "float32", LENGTH + 1, [*HEADS, REFERENCE])
    out = read(engine, IDS, 1)
    np.testing.assert_array_equal(out.logprobs, LOGPROBS)
    assert engine.usage.prefilled == LENGTH
