"""New weights for an engine that runs, on real vLLM: what it samples is of them, or it refuses."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pav.core.errors import UserError
from pav.core.seeds import seed_of
from pav.engine.loading import EngineConfig
from pav.engine.loop import drive
from pav.engine.pool import transport
from pav.engine.remote import Model, RemoteEngine, remote_engines
from pav.engine.vllm import VllmEngine
from pav.engine.vllm_internals import stamp_weights
from pav.engine.weights import served_shapes
from pav.policy.inference import Sampled
from pav.policy.policy import Sampler, vocabulary_size
from pav.verifier.trunk import load_trunk

LENGTH = 96
# Longer than a block of the cache, so that a second sample finds it there.
PROMPTS = [np.random.default_rng(i).integers(4, 16, 40).tolist() for i in range(4)]
SMALL = EngineConfig(kv_gib=0.02)


@dataclass
class Served:
    """An engine and the trainer's model, on which the engine's weights are."""

    engine: Any
    model: PreTrainedModel

    def sampled(self, **settings: Any) -> list[Sampled]:
        return samples(self.engine, **settings)

    def change(self) -> dict[str, Tensor]:
        """The state of the trainer's model after noise on all its weights."""
        with torch.no_grad():
            for weights in self.model.parameters():
                weights += 0.1 * weights.std() * torch.randn_like(weights)
        return self.model.state_dict()

    def load(self) -> None:
        self.engine.load_weights(self.model.state_dict(), self.engine.version + 1)

    def difference(self, found: Sequence[Sampled], temperature: float = 1.0) -> float:
        """Greatest difference to log-probabilities of the trainer's model."""
        return max(
            float(np.abs(sample.logprobs - expected).max())
            for prompt, sample in zip(PROMPTS, found, strict=True)
            for expected in [logprobs(self.model, prompt, sample.ids, temperature)]
        )


def samples(engine: Any, temperature: float = 1.0, max_tokens: int = LENGTH - 40) -> list[Sampled]:
    """One solution of every prompt, with log-probabilities."""
    sampler = Sampler(temperature=temperature)
    found: dict[int, Sampled] = {}

    async def one(i: int) -> tuple[int, Sampled]:
        return i, await engine.sample(
            PROMPTS[i], sampler, stop_ids=[0, 1], max_tokens=max_tokens, seed=seed_of(i),
            logprobs=True,
        )  # fmt: skip

    drive([engine], [partial(one, i) for i in range(len(PROMPTS))], lambda r: found.update([r]), 4)
    return [found[i] for i in range(len(PROMPTS))]


@torch.inference_mode()
def logprobs(
    model: PreTrainedModel, prompt: list[int], ids: list[int], temperature: float
) -> np.ndarray:
    """(tokens,) of ``ids`` in a forward pass of transformers."""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
    of_all = (logits / temperature).log_softmax(-1)
    chosen: np.ndarray = of_all.gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
    return chosen


@pytest.fixture(
    scope="module", params=["llama", "llama-tied", "qwen2", "qwen3", "gemma2", "gemma3"]
)
def served(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Iterator[Served]:
    path = str(tiny_model(request.param))
    assert vocabulary_size(path) >= 16
    engine = VllmEngine(path, "float32", LENGTH, config=SMALL, trained=True)
    engine.start()
    torch.manual_seed(7)
    yield Served(engine, load_trunk(path).eval())
    engine.shutdown()


def test_updated_engine_samples_with_the_trainers_log_probabilities(served: Served) -> None:
    assert served.difference(served.sampled()) < 1e-4
    for temperature in (1.0, 0.6):
        served.change()
        # The same prompts: prefixes of the old weights are cached, and would be taken.
        before = served.sampled(temperature=temperature)
        assert all(sample.cached for sample in before)
        assert served.difference(before, temperature) > 0.05
        version = served.engine.version
        assert {sample.version for sample in before} == {version}
        served.engine.load_weights(served.model.state_dict(), version + 5)
        after = served.sampled(temperature=temperature)
        assert {sample.version for sample in after} == {version + 5}
        assert not any(sample.cached for sample in after)
        assert served.difference(after, temperature) < 1e-4
        assert served.difference(served.sampled(temperature=temperature), temperature) < 1e-4


def test_later_optimiser_step_is_not_served(served: Served) -> None:
    served.load()
    pushed = deepcopy(served.model)
    optimiser = torch.optim.AdamW(served.model.parameters(), lr=0.03)
    served.model(torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    found = served.sampled()
    assert served.difference(found) > 0.05
    assert Served(served.engine, pushed).difference(found) < 1e-4


def test_weights_that_are_not_the_models_are_refused_and_the_old_ones_go_on(
    served: Served,
) -> None:
    served.load()
    version = served.engine.version
    state = served.change()
    name = "model.layers.1.self_attn.k_proj.weight"
    without = {k: v for k, v in state.items() if k != name}
    broken: list[tuple[dict[str, Tensor], str]] = [
        (without, f"lack {name!r}; send the whole state_dict"),
        ({**state, name: state[name][:-1]}, f"have {name!r} of shape"),
        ({**state, f"base_model.{name}": state[name]}, f"have 'base_model.{name}', which"),
    ]
    if "lm_head.weight" not in dict(served.model.named_parameters()):
        broken.append((dict(served.model.named_parameters()), "lack 'lm_head.weight'; named_par"))
    for weights, message in broken:
        with pytest.raises(UserError, match=message):
            served.engine.load_weights(weights, version + 1)
    found = served.sampled()
    assert {sample.version for sample in found} == {version}
    assert served.difference(found) > 0.05
    served.load()
    assert served.difference(served.sampled()) < 1e-4
    with pytest.raises(RuntimeError, match=f"version {version} come after those of {version + 1}"):
        served.engine.load_weights(served.model.state_dict(), version)


def test_weights_do_not_change_under_a_sample(served: Served) -> None:
    served.load()
    version = served.engine.version
    engine = served.engine

    async def pushed() -> Sampled:
        sampling = asyncio.ensure_future(
            engine.sample(PROMPTS[0], Sampler(), stop_ids=[], max_tokens=20, seed=0, logprobs=True)
        )
        await asyncio.sleep(0)
        engine.step()
        with pytest.raises(RuntimeError, match="1 requests are in work"):
            engine.load_weights(served.change(), version + 1)
        return await sampling

    found: list[Sampled] = []
    drive([engine], [pushed], found.append, 1)
    assert found[0].version == version and len(found[0].ids) == 20

    async def stamped() -> Sampled:
        sampling = asyncio.ensure_future(
            engine.sample(PROMPTS[0], Sampler(), stop_ids=[], max_tokens=20, seed=0)
        )
        await asyncio.sleep(0)
        engine.step()
        stamp_weights(engine._engine, version + 3)  # as if somebody went past load_weights
        return await sampling

    with pytest.raises(RuntimeError, match=rf"versions \[{version}, {version + 3}\]"):
        drive([engine], [stamped], found.append, 1)
    served.load()
    assert served.difference(served.sampled()) < 1e-4


def test_engine_that_slept_wakes_with_the_new_weights(served: Served) -> None:
    engine, version = served.engine, served.engine.version
    served.change()
    engine.sleep()
    engine.sleep()
    with pytest.raises(RuntimeError, match="asleep and has no weights; load_weights wakes it"):
        served.sampled()
    with pytest.raises(UserError, match=r"lack '.*send the whole"):
        engine.load_weights({}, version + 1)
    served.load()
    found = served.sampled()
    assert {sample.version for sample in found} == {version + 1}
    assert served.difference(found) < 1e-4


def test_engine_says_what_it_cannot_do(tmp_path: Path) -> None:
    plain = VllmEngine("nowhere", "float32", LENGTH)
    with pytest.raises(RuntimeError, match="make it with trained=True"):
        plain.load_weights({}, 1)
    asked = plain.sample([5], Sampler(top_p=0.9), stop_ids=[], max_tokens=1, seed=0, logprobs=True)
    with pytest.raises(ValueError, match="temperature 1 alone; make it with trained=True"):
        asyncio.run(asked)
    with pytest.raises(ValueError, match="a verifier of its own weights"):
        VllmEngine("nowhere", "float32", LENGTH, [20, 21], trained=True)
    pickled = VllmEngine(str(tmp_path), "float32", LENGTH, trained=True)
    with pytest.raises(UserError, match="holds no"):
        served_shapes(pickled.model)


RAY = pytest.param(
    "local", marks=pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
)


@pytest.mark.parametrize("ray", [None, RAY])
def test_worker_samples_with_the_weights_that_it_was_sent_also_after_its_death(
    ray: str | None, tiny_model: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(tiny_model("llama-tied"))
    model = Model(path, "float32", LENGTH, SMALL, trained=True)
    (engine,) = remote_engines(transport(SMALL, 1, ray), [model], 1)
    trainer = Served(engine, load_trunk(path).eval())
    torch.manual_seed(7)
    try:
        assert trainer.difference(trainer.sampled()) < 1e-4
        state = trainer.change()
        assert trainer.difference(trainer.sampled()) > 0.05
        trainer.load()
        found = trainer.sampled()
        assert {sample.version for sample in found} == {1}
        assert trainer.difference(found) < 1e-4
        name = "model.layers.0.mlp.up_proj.weight"
        with pytest.raises(UserError, match=f"have {name!r} of shape"):
            engine.load_weights({**state, name: state[name][1:]}, 2)
        if ray is None:  # a death is one for the pool, wherever it is
            worker = engine.pool._workers[0].started
            assert worker is not None
            os.kill(worker.process, signal.SIGKILL)
            found = trainer.sampled()
            assert "worker 0 died" in capfd.readouterr().err
        assert {sample.version for sample in found} == {1}
        assert trainer.difference(found) < 1e-4
    finally:
        engine.shutdown()


def test_answer_of_a_worker_with_other_weights_is_refused(tiny_model: Callable[..., Path]) -> None:
    class Late:
        """A pool whose worker has not heard of the new weights."""

        busy, jobs = False, 0

        def load(self, job: Any) -> None:
            self.jobs += 1

        def submit(self, call: Any, answered: Any, *, queue: int) -> None:
            answered(Sampled([5], False, version=0))

    path = str(tiny_model("llama-tied"))
    pool: Any = Late()
    engine = RemoteEngine(pool, [Model(path, "float32", LENGTH, SMALL, trained=True)], 0)
    ask = partial(engine.sample, [5], Sampler(), stop_ids=[], max_tokens=1, seed=0)
    assert asyncio.run(ask()).ids == [5]
    engine.load_weights(load_trunk(path).state_dict(), 4)
    assert pool.jobs == 1
    with pytest.raises(RuntimeError, match="weights of version 0, not 4"):
        asyncio.run(ask())
    pool.busy = True
    with pytest.raises(RuntimeError, match="requests are in work"):
        engine.load_weights({}, 5)
