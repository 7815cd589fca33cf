"""Cost accounting: FLOPs equal a hand count and torch's counter, requests are charged once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from pav.engine.loading import EngineConfig
from pav.engine.loop import drive
from pav.policy.cost import Cost, Shape, context_of, forward_flops, shape_of
from pav.policy.inference import Read, Sampled
from pav.policy.policy import Sampler
from pav.tasks.base import Problem
from pav.verifier.checkpoint import load_verifier
from search.run.flops import record_flops
from search.run.opening import open_session
from search.run.records import Record
from search.run.solve import beam_record, beam_settings, traces_record

ENGINE = EngineConfig(kv_gib=0.02, max_num_seqs=64)
SAMPLER = Sampler(max_length=72)


def test_flops_of_a_tiny_llama_are_the_hand_count(tiny_model: Callable[..., Path]) -> None:
    shape = shape_of(str(tiny_model("llama")))
    # Two layers of hidden 64: q and o 64x64, k and v 64x32, gate, up and down 64x128.
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    assert shape == Shape(2 * layer, 2 * 2 * 32, 64, 19)
    # Three tokens see 1, 2 and 3 tokens; logits of the last one.
    by_hand = 3 * 2 * 2 * layer + 2 * 2 * (2 * 32) * 2 * (1 + 2 + 3) + 2 * 64 * 19
    assert forward_flops(shape, 3, context_of(0, 3), 1) == by_hand


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3-tied", "gemma2"])
def test_flops_are_what_torch_counts(tiny_model: Callable[..., Path], architecture: str) -> None:
    path = str(tiny_model(architecture))
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    with torch.no_grad():
        cache = model(torch.tensor([[3, 4, 5, 6, 7]]), use_cache=True).past_key_values
        counter = FlopCounterMode(display=False)
        with counter:
            # Token by token: attention over what is there, as an engine's causal mask has it.
            for token in (8, 9, 10, 11):
                cache = model(
                    torch.tensor([[token]]), past_key_values=cache, use_cache=True
                ).past_key_values
    counted = counter.get_total_flops()
    expected = forward_flops(shape_of(path), 4, context_of(5, 4), 4)
    # Rotations are matrix products of a few hundred FLOPs in transformers.
    assert counted == pytest.approx(expected, rel=0.01)
    assert counted >= expected


@given(st.integers(0, 200), st.integers(0, 50), st.integers(0, 50))
def test_context_of_two_stretches_is_that_of_the_whole(start: int, a: int, b: int) -> None:
    assert context_of(start, a) + context_of(start + a, b) == context_of(start, a + b)
    assert context_of(start, a) == sum(range(start + 1, start + a + 1))


def test_last_sampled_token_is_not_computed() -> None:
    cost = Cost()
    # A prompt of 7, 4 of them cached, and 3 tokens sampled: positions 4..8 are computed.
    cost.sampled(Sampled([5, 6, 7], True, prefilled=3, cached=4))
    assert (cost.policy_tokens, cost.policy_prefilled, cost.policy_cached) == (3, 3, 4)
    assert cost.policy_context == 5 + 6 + 7 + 8 + 9
    record = record_of(cost)
    shape = Shape(weights=100, attention=10, hidden=4, vocabulary=6)
    flops, none = record_flops(record, shape, None, 0)
    assert flops == 2 * 100 * 5 + 4 * 10 * 35 + 2 * 4 * 6 * 3
    assert none == 0.0


def test_fused_verifier_costs_its_rows_and_a_separate_one_its_pass() -> None:
    policy = Shape(weights=100, attention=10, hidden=4, vocabulary=6)
    trunk = Shape(weights=1000, attention=20, hidden=8, vocabulary=6)
    cost = Cost()
    cost.sampled(Sampled([5, 6, 7], True, prefilled=3))
    fused = replace(record_of(cost), settings={"scoring": "fused"})
    assert record_flops(fused, policy, policy, 3)[1] == 2 * 4 * 3 * 3
    # One reading of log-probabilities everywhere, one of the last position alone.
    cost.read(Read(np.zeros(2), np.zeros(4), computed=5, cached=0))
    cost.read(Read(np.zeros(2), None, computed=2, cached=5))
    separate = replace(record_of(cost), settings={"scoring": "separate"})
    context = (1 + 2 + 3 + 4 + 5) + (6 + 7)
    expected = 2 * 1000 * 7 + 4 * 20 * context + 2 * 8 * (6 + 3) * (5 + 1)
    assert record_flops(separate, policy, trunk, 3)[1] == expected


def test_flops_of_a_record_without_counts_are_unknown() -> None:
    shape = Shape(100, 10, 4, 6)
    old = replace(record_of(Cost()), policy_tokens=12)
    assert all(math.isnan(f) for f in record_flops(old, shape, None, 0))
    # Nothing sampled is no unknown cost: the prompt left no room.
    assert record_flops(record_of(Cost()), shape, None, 0) == (0.0, 0.0)


def record_of(cost: Cost) -> Record:
    return Record("p", "1+1", "2", "beam", 1, 0, {}, **vars(cost))


def test_engine_charges_every_prefix_token_once_computed_or_cached(
    tiny_model: Callable[..., Path], make_verifier: Any, tmp_path: Path
) -> None:
    make_verifier(tiny_model("llama"), tmp_path / "pav.ckpt", sampler=SAMPLER)
    verifier = load_verifier(str(tmp_path / "pav.ckpt"))
    session = open_session(verifier, None, None, None, ENGINE)
    scorer = session.scorer(verifier, "separate", False, None)
    engine = session.sampling_engine(scorer)
    problem = Problem("p", "12+23*4-15+6-7*8+19+23*4-15+6-7", "1")
    prompt = len(session.policy.encode(problem))
    assert 32 < prompt < 40
    found: list[Record] = []
    settings = beam_settings(verifier.card, 3, 2, 0.0, "q/base")
    drive(
        list(session.engines.values()),
        [
            partial(traces_record, session, None, 4, "majority", "samples", 0, problem),
            partial(beam_record, session, scorer, settings, "last", "beam", 0, problem),
        ],
        found.append,
        1,
    )
    usage = engine.usage
    samples, beam = found
    assert samples.policy_requests == 4
    assert samples.policy_prefilled + samples.policy_cached == 4 * prompt
    for name in ("generated", "prefilled", "cached"):
        record_name = {"generated": "policy_tokens"}.get(name, f"policy_{name}")
        assert getattr(usage, name) == getattr(samples, record_name) + getattr(beam, record_name)
    # Blocks of 32: the prompt's first block is computed once and then shared.
    assert usage.cached > 0
    assert beam.verifier_tokens == scorer.engine.usage.prefilled
    assert beam.verifier_cached == scorer.engine.usage.cached > 0
    # Without surprise a reading asks for one position's logits.
    assert beam.verifier_logits == scorer.engine.usage.generated
    policy = shape_of(session.policy.path)
    assert shape_of(scorer.trunk.path) == policy
    mine, its = record_flops(beam, policy, policy, len(scorer.engine.score_ids))
    assert mine > 2 * policy.weights * beam.policy_tokens
    assert its > 2 * policy.weights * beam.verifier_tokens
    session.shutdown()
