"""What vLLM serves is what transformers computes: heads and log-probabilities, token by token."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pav.core.errors import UserError
from pav.core.seeds import seed_of
from pav.core.steps import scoring_position
from pav.engine.loading import EngineConfig
from pav.engine.loop import drive
from pav.engine.read_check import check_reads
from pav.engine.vllm import VllmEngine
from pav.export.vllm import export_verifier
from pav.policy.inference import Read, Sampled
from pav.policy.policy import Policy, PolicyConfig, Sampler, load_policy
from pav.tasks.tape import Tape
from pav.verifier.checkpoint import load_verifier
from pav.verifier.trunk import HeadedTrunk, load_trunk

T = TypeVar("T")
HEADS = ("q/base", "q/prover", "orm")
LENGTH = 64
SMALL = EngineConfig(kv_gib=0.05, max_num_seqs=64)
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Served:
    """An exported verifier in vLLM, and in transformers.

    Attributes:
        model: trunk and heads in transformers, in the dtype that is served.
        engine: the export in vLLM.
        policy: tokenizer and step rule.
        trunk: directory of the trunk.
        export: directory of the export.
        prompts: ids of each prompt.
        others: more engines, shut down with ``engine``: the first shutdown in a process ends all.
    """

    model: HeadedTrunk
    engine: VllmEngine
    policy: Policy
    trunk: Path
    export: Path
    prompts: list[list[int]]
    others: list[VllmEngine] = field(default_factory=list)

    def sample(
        self, *, scores: bool, seed: int = 0, sampler: Sampler | None = None
    ) -> list[Sampled]:
        """One solution of every prompt."""
        sample = partial(_sample, self.engine, self.policy, scores, seed, sampler)
        return run(self.engine, [partial(sample, ids) for ids in self.prompts])

    @torch.inference_mode()
    def forward(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Head logits without bias (T, H), log-probabilities (T-1,), next tokens (T,)."""
        batch = torch.tensor([ids])
        hidden = self.model.hidden(batch)
        heads = self.model.head_logits(hidden) - self.model.head.bias
        logits = self.model.trunk.get_output_embeddings()(hidden)
        logprobs = self.model.token_logprobs(hidden, batch)
        return heads[0].float().numpy(), logprobs[0].numpy(), logits[0].argmax(-1).numpy()


async def _sample(
    engine: VllmEngine,
    policy: Policy,
    scores: bool,
    seed: int,
    sampler: Sampler | None,
    ids: list[int],
) -> Sampled:
    return await engine.sample(
        ids,
        sampler or Sampler(max_length=LENGTH),
        stop_ids=sorted(policy.stepper.eos_ids),
        max_tokens=LENGTH - len(ids),
        seed=seed_of(seed, *ids),
        scores=scores,
    )


def run(engine: VllmEngine, jobs: list[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
    """Results of ``jobs``, in their order; all are in flight together."""
    found: dict[int, T] = {}

    async def numbered(i: int) -> tuple[int, T]:
        return i, await jobs[i]()

    drive(
        [engine],
        [partial(numbered, i) for i in range(len(jobs))],
        lambda pair: found.update([pair]),
        concurrency=len(jobs),
    )
    return [found[i] for i in range(len(jobs))]


def serve(trunk: Path, directory: Path, make_verifier: Any, dtype: Any) -> Served:
    model = make_verifier(trunk, directory / "pav.ckpt", heads=HEADS, dtype=dtype)
    export = directory / "served"
    score_ids = export_verifier(load_verifier(str(directory / "pav.ckpt")), str(trunk), export)
    policy = load_policy(PolicyConfig(str(trunk), dtype=dtype), Tape().step_rule)
    prompts = [policy.encode(p) for p in islice(Tape().problems("test"), 8)]
    engine = VllmEngine(str(export), dtype, LENGTH, score_ids, SMALL)
    return Served(model.to(getattr(torch, dtype)), engine, policy, trunk, export, prompts)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "qwen3-tied", "gemma2"])
def served(
    request: pytest.FixtureRequest, tiny_model: Any, make_verifier: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:  # fmt: skip
    directory = tmp_path_factory.mktemp(f"served-{request.param}")
    made = serve(tiny_model(request.param), directory, make_verifier, "float32")
    yield made
    for engine in (made.engine, *made.others):
        engine.shutdown()


def test_separate_scores_are_those_of_transformers_at_every_step(served: Served) -> None:
    solutions = served.sample(scores=False)
    # Step ends and all kinds of request. By then much of it lies in the prefix cache,
    # which keeps no log-probabilities.
    places = [
        (prompt + out.ids, scoring_position(len(prompt), end), first)
        for prompt, out in zip(served.prompts, solutions, strict=True)
        for end in (0, *served.policy.stepper.step_ends(out.ids))
        for first in (None, 1, len(prompt) + max(0, end - 5))
    ]
    assert len(places) > 3 * len(solutions)
    reads: list[Read] = run(
        served.engine,
        [
            partial(served.engine.read, ids[: at + 1], logprobs_from=first)
            for ids, at, first in places
        ],
    )
    head_gap = logprob_gap = 0.0
    assert any(read.gaps for read in reads) and any(read.cached for read in reads)
    for (ids, at, first), read in zip(places, reads, strict=True):
        heads, logprobs, _ = served.forward(ids)
        head_gap = max(head_gap, np.abs(read.heads - heads[at]).max())
        assert (read.logprobs is None) == (first is None)
        if read.logprobs is not None:
            expected = logprobs[first - 1 : at]
            assert read.logprobs.shape == expected.shape
            logprob_gap = max(logprob_gap, np.abs(read.logprobs - expected).max(initial=0))
    print(f"heads off by {head_gap:.1e}, log-probabilities by {logprob_gap:.1e}")
    assert head_gap <= TOLERANCE
    assert logprob_gap <= TOLERANCE


def test_fused_scores_are_those_of_transformers_at_every_token(served: Served) -> None:
    head_gap = logprob_gap = 0.0
    for prompt, out in zip(served.prompts, served.sample(scores=True), strict=True):
        assert out.heads is not None
        assert out.logprobs is not None
        assert out.heads.shape == (len(out.ids), len(HEADS))
        heads, logprobs, _ = served.forward(prompt + out.ids)
        head_gap = max(head_gap, np.abs(out.heads - heads[len(prompt) - 1 : -1]).max())
        logprob_gap = max(logprob_gap, np.abs(out.logprobs - logprobs[len(prompt) - 1 :]).max())
    print(f"heads off by {head_gap:.1e}, log-probabilities by {logprob_gap:.1e}")
    assert head_gap <= TOLERANCE
    assert logprob_gap <= TOLERANCE


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_bfloat16_scores_are_near_those_of_transformers(
    architecture: str, tiny_model: Any, make_verifier: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    served = serve(tiny_model(architecture), tmp_path, make_verifier, "bfloat16")
    greedy = served.sample(scores=True, sampler=Sampler(top_k=1, max_length=LENGTH))
    sampled = served.sample(scores=True)
    served.engine.shutdown()
    head_gap = 0.0
    agreed: list[bool] = []
    for outs in (greedy, sampled):
        for prompt, out in zip(served.prompts, outs, strict=True):
            heads, _, best = served.forward(prompt + out.ids)
            head_gap = max(head_gap, np.abs(out.heads - heads[len(prompt) - 1 : -1]).max())
            if outs is greedy:
                agreed += list(best[len(prompt) - 1 : -1] == out.ids)
    with capsys.disabled():
        print(f"\nbfloat16 {architecture}: head logits off by at most {head_gap:.3f}, greedy top-1 "
              f"agreement {np.mean(agreed):.3f} of {len(agreed)} tokens")  # fmt: skip
    assert head_gap < 0.5
    assert np.mean(agreed) > 0.9


def test_untied_gemma_2_is_refused(tiny_model: Any) -> None:
    trunk = load_trunk(str(tiny_model("gemma2-untied")))
    with pytest.raises(UserError, match=r"Gemma 2 with untied embeddings.*use a tied Gemma 2"):
        HeadedTrunk(trunk, 1)


@pytest.mark.parametrize("served", ["llama"], indirect=True)
def test_sampled_ids_with_heads_are_those_of_the_plain_policy(served: Served) -> None:
    plain = VllmEngine(str(served.trunk), "float32", LENGTH, config=SMALL)
    served.others.append(plain)
    for seed in range(4):
        with_heads, without, policy_alone = (
            [out.ids for out in outs]
            for outs in (
                served.sample(scores=True, seed=seed),
                served.sample(scores=False, seed=seed),
                replace(served, engine=plain).sample(scores=False, seed=seed),
            )
        )
        assert with_heads == without == policy_alone


@pytest.mark.parametrize("served", ["llama"], indirect=True)
def test_start_up_check_of_readings_passes_on_this_device(served: Served) -> None:
    check_reads(served.engine)


@pytest.mark.parametrize("served", ["llama"], indirect=True)
def test_score_ids_are_never_sampled(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    first_score_id = len(served.policy.tokenizer)

    def largest(seed: int) -> int:
        hot = Sampler(temperature=2.0, max_length=LENGTH)
        return max(t for out in served.sample(scores=True, seed=seed, sampler=hot) for t in out.ids)

    assert max(map(largest, range(8))) == first_score_id - 1
    # They would be, if requests did not carry the bias.
    monkeypatch.setattr("pav.engine.vllm.SCORE_BIAS", 0.0)
    assert max(map(largest, range(8))) >= first_score_id


@pytest.mark.parametrize("served", ["llama"], indirect=True)
def test_scored_and_unscored_requests_in_one_batch_do_not_influence_each_other(
    served: Served,
) -> None:
    alone = served.sample(scores=True)
    jobs = [
        partial(_sample, served.engine, served.policy, scores, 0, None, p)
        for p in served.prompts
        for scores in (True, False)
    ]
    mixed = run(served.engine, jobs)
    for before, scored, unscored in zip(alone, mixed[::2], mixed[1::2], strict=True):
        assert scored.ids == unscored.ids == before.ids
        assert unscored.heads is None and unscored.logprobs is None
        np.testing.assert_allclose(scored.heads, before.heads, atol=TOLERANCE)
        np.testing.assert_allclose(scored.logprobs, before.logprobs, atol=TOLERANCE)


@pytest.mark.parametrize("served", ["llama"], indirect=True)
def test_transformers_never_samples_a_score_id_from_an_exported_directory(served: Served) -> None:
    model = AutoModelForCausalLM.from_pretrained(served.export, dtype=torch.float32)
    first_score_id = len(served.policy.tokenizer)
    assert model.config.vocab_size == first_score_id + len(HEADS) + 1
    torch.manual_seed(0)
    ids = torch.tensor(served.prompts[:1] * 64)
    out = model.generate(ids, do_sample=True, top_k=0, temperature=2.0, max_length=LENGTH)
    assert out.max() < first_score_id
    # It would, if the exported generation config did not say so.
    model.generation_config.suppress_tokens = None
    out = model.generate(ids, do_sample=True, top_k=0, temperature=2.0, max_length=LENGTH)
    assert out.max() >= first_score_id
