"""Speed of online RL's parts: ``OMP_NUM_THREADS=1 python -m benchmarks.speed.rl``.

In one process, on the same traces, by turns:

``sample``
    :func:`pav.rl.rollout.rollout` against the same requests given to vLLM at once (tokens).
``score``
    the frozen verifier's Q of every step against a bare forward pass of its trunk over the same
    batches of whole traces.
``update``
    :func:`pav.rl.update.update` against a bare PyTorch loop: forward, log-softmax, backward, clip,
    step, on the same micro-batches.
``sync``
    new weights into the engine, as a share of the iteration.

Ratios are of processor seconds, bare by ours, means over turns with t intervals. Writes
``benchmarks/results/speed_rl.{json,csv}``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from scipy.stats import t as student_t

from benchmarks.speed.results import in_process, metric, seconds, write
from pav.cli.run import run
from pav.core.seeds import seed_of
from pav.engine.vllm import VllmEngine
from pav.grading.sandbox import GuardedGrader
from pav.rl.command import assembled, opened, problems_of
from pav.rl.config import RlConfig
from pav.rl.credit import samples
from pav.rl.loop import Run
from pav.rl.rollout import Actor, rollout
from pav.rl.trace import Trace
from pav.rl.update import Sample, update
from pav.verifier.forward import batches, pad
from pav.verifier.trunk import load_trunk

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.speed.rl"


@dataclass(frozen=True)
class RlSpeedConfig:
    """Speed of online RL's parts.

    Args:
        verifier: scores steps; its base policy is trained.
        batch: problems of an iteration.
        group: traces of each.
        turns: how often each part is measured, after one that is not counted.
    """

    verifier: str = "pav:reference"
    batch: int = 64
    group: int = 4
    turns: int = 5


def speed(config: RlSpeedConfig) -> None:
    """Measure and write (see the module)."""
    settings = RlConfig(
        config.verifier, batch=config.batch, group=config.group, kl=0.0, lr=1e-6, eval_problems=0
    )
    rewarder, policy, task, sampler = opened(settings)
    problems, _ = problems_of(settings, task)
    fabric = Fabric(accelerator="auto", devices=1)
    fabric.launch()
    engine = VllmEngine(policy.path, policy.config.dtype, sampler.max_length, trained=True)
    rows: list[dict[str, Any]] = []
    with GuardedGrader(task) as grader:
        engine.start()
        assert rewarder.references is not None
        actor = Actor(engine, policy, sampler, grader, rewarder.references, 0)
        made = assembled(settings, fabric, engine, actor, rewarder, problems, [])
        bare_policy = load_trunk(policy.path).to(fabric.device)
        bare_optimizer = torch.optim.AdamW(bare_policy.parameters(), lr=1e-6)
        for turn in range(config.turns + 1):
            row = _turn(made, bare_policy, bare_optimizer, turn)
            print(f"turn {turn}: " + ", ".join(f"{k} {v:.2f}" for k, v in row.items()))
            if turn:
                rows.append({"turn": turn, **{k: round(v, 4) for k, v in row.items()}})
        engine.shutdown()
    ratios: list[tuple[str, str, str, tuple[str, float]]] = [
        ("sampling, raw vLLM's seconds by ours", "raw sample", "sample", (">=", 0.9)),
        ("scoring, our seconds by a bare forward's", "score", "bare score", ("<=", 1.3)),
        ("update, a bare loop's seconds by ours", "bare update", "update", (">=", 0.9)),
        ("sync, share of an iteration", "sync", "iteration", ("<=", 0.01)),
    ]
    metrics = [_ratio(f"RL: {what}", rows, a, b, target) for what, a, b, target in ratios]
    write("rl", metrics, rows, [0], config.batch, COMMAND)
    for row in metrics:
        print(f"{row['metric']}: {row['value']:.3f} {row['ci95']}")


def _ratio(
    name: str, rows: Sequence[dict[str, Any]], above: str, below: str, target: tuple[str, float]
) -> dict[str, Any]:
    """Mean over turns of a ratio, with a t interval."""
    values = np.array([row[above] / row[below] for row in rows])
    half = student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    mean = float(values.mean())
    return metric(name, mean, target, [mean - half, mean + half])


def _turn(
    made: Run, bare_policy: Any, bare_optimizer: torch.optim.Optimizer, turn: int
) -> dict[str, float]:
    """Processor seconds (with a GPU: seconds) of every part, ours and bare."""
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = seconds()
        out = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found[name] = seconds() - start
        return out

    engine, config = in_process(made.engine), made.config
    state = made.learner.served()
    timed("sync", lambda: engine.load_weights(state, turn))
    chosen = made.problems[turn * config.batch :][: config.batch]
    key = ("speed", turn)
    traces: list[Trace] = timed(
        "sample", lambda: rollout(made.actor, chosen, config.group, key, turn)
    )
    engine.reset_prefix_cache()
    timed("raw sample", lambda: _raw(made, traces, key))
    rewards = timed("score", lambda: made.rewarder(traces))
    timed("bare score", lambda: _bare_score(made, traces))
    found_samples = samples(made.fabric, traces, rewards, config)
    ours = (made.fabric, made.wrapped, made.optimizer, None, found_samples, config)
    timed("update", lambda: update(*ours))
    timed("bare update", lambda: _bare_update(bare_policy, bare_optimizer, found_samples, config))
    found["iteration"] = sum(found[part] for part in ("sync", "sample", "score", "update"))
    return found


def _raw(made: Run, traces: Sequence[Trace], key: tuple[object, ...]) -> None:
    """The requests of ``traces``, all given to vLLM at once."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, most = in_process(made.engine)._engine, made.actor.sampler.max_length
    for number, trace in enumerate(traces):
        parameters = SamplingParams(
            temperature=made.actor.sampler.temperature,
            seed=seed_of(made.actor.seed, *key, trace.problem.id, trace.index),
            max_tokens=most - len(trace.prompt),
            stop_token_ids=sorted(made.actor.policy.stepper.eos_ids),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = {"prompt_token_ids": trace.prompt}
        engine.add_request(f"raw-{key}-{number}", prompt, parameters)
    tokens = 0
    while engine.has_unfinished_requests():
        tokens += sum(len(o.outputs[0].token_ids) for o in engine.step() if o.finished)
    if tokens != sum(len(t.ids) for t in traces):
        raise RuntimeError("raw vLLM sampled other tokens on the same requests")


@torch.inference_mode()
def _bare_score(made: Run, traces: Sequence[Trace]) -> None:
    verifier = made.rewarder.reading
    assert verifier is not None
    trunk = verifier.model.trunk
    nothing = np.zeros(0)
    whole = [Sample([*t.prompt, *t.ids], len(t.prompt), t.sampled_T, nothing, 0.0) for t in traces]
    for batch in batches(whole, None):
        trunk(input_ids=pad(batch).to(trunk.device), use_cache=False)


def _bare_update(
    policy: Any, optimizer: torch.optim.Optimizer, found: Sequence[Sample], config: RlConfig
) -> None:
    optimizer.zero_grad()
    for batch in batches(found, None, config.tokens_per_batch):
        ids = pad(batch).to(policy.device)
        logits = policy(input_ids=ids, use_cache=False).logits[:, :-1].float()
        logprob = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        weight = torch.zeros_like(logprob)
        for row, sample in zip(weight, batch, strict=True):
            start = sample.prompt_length - 1
            row[start : start + len(sample.weight_T)] = torch.as_tensor(
                sample.weight_T * sample.coefficient
            )
        (-(weight * logprob).sum()).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    optimizer.step()


if __name__ == "__main__":
    run(speed, RlSpeedConfig, "benchmarks.speed.rl")
