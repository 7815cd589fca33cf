"""Two processes that share the layers of one model say what one process says."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pav.engine.loading import EngineConfig
from pav.engine.loop import drive
from pav.engine.vllm import VllmEngine
from pav.export.vllm import ensure_export
from pav.policy.inference import Read, Sampled
from pav.policy.policy import PolicyConfig, Sampler, load_policy
from pav.tasks.tape import Tape
from pav.verifier.checkpoint import load_verifier

TOLERANCE = 1e-4
SECONDS = 240


@pytest.fixture
def bounded() -> Iterator[None]:
    """Processes that wait for each other may wait for ever."""

    def end(*_: Any) -> None:
        raise TimeoutError(f"not done within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="needs two GPUs, or none: then two processes on cores"
)
def test_score_rows_say_the_same_at_tensor_parallel_1_and_2(
    bounded: None, tiny_model: Callable[..., Path], make_verifier: Any, tmp_path: Path
) -> None:
    trunk = tiny_model("llama")
    make_verifier(trunk, tmp_path / "pav.ckpt", heads=("q/base", "q/prover", "orm"))
    directory, score_ids = ensure_export(load_verifier(str(tmp_path / "pav.ckpt")), str(trunk))
    task = Tape()
    policy = load_policy(PolicyConfig(str(trunk)), task.step_rule)
    prompts = [policy.encode(p) for p in islice(task.problems("test"), 8)]

    async def search(engine: VllmEngine, i: int) -> tuple[int, Sampled, Read]:
        sampled = await engine.sample(
            prompts[i], Sampler(), stop_ids=policy.stepper.stop_ids, max_tokens=40, seed=i,
            scores=True,
        )  # fmt: skip
        read = await engine.read([*prompts[i], *sampled.ids], logprobs_from=1)
        return i, sampled, read

    found: dict[int, list[tuple[int, Sampled, Read]]] = {}
    for size in (1, 2):
        config = EngineConfig(kv_gib=0.02, max_num_seqs=16, tensor_parallel_size=size)
        engine = VllmEngine(str(directory), "float32", 96, score_ids, config)
        found[size] = []
        jobs = [partial(search, engine, i) for i in range(len(prompts))]
        drive([engine], jobs, found[size].append, len(jobs))
        engine.shutdown()
    for (_, one, one_read), (_, two, two_read) in zip(
        *(sorted(found[size], key=lambda entry: entry[0]) for size in (1, 2)), strict=True
    ):
        assert one.ids == two.ids
        assert one.heads is not None and two.heads is not None
        np.testing.assert_allclose(one.heads, two.heads, atol=TOLERANCE)
        np.testing.assert_allclose(one_read.heads, two_read.heads, atol=TOLERANCE)
        for a, b in ((one.logprobs, two.logprobs), (one_read.logprobs, two_read.logprobs)):
            assert a is not None and b is not None
            np.testing.assert_allclose(a, b, atol=10 * TOLERANCE)
