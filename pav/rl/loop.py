"""The loop: sample, score, update, serve what came of it.

One iteration, top to bottom, is :func:`iterate`; everything else here is about long runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from pav.core.errors import UserError
from pav.core.files import json_rows, json_text, replace_file
from pav.core.progress import Reporter
from pav.core.seeds import seed_of
from pav.core.signals import held_back
from pav.rl.checkpoint import LAST, State, save, save_policy, snapshot
from pav.rl.config import RlConfig
from pav.rl.credit import credit_of, is_idle, samples
from pav.rl.engines import Serving
from pav.rl.guards import WARNINGS, not_finite, read_alarms, watch
from pav.rl.learner import Learner, Reference
from pav.rl.live import lines
from pav.rl.measure import Metrics, evaluate, merit, training_metrics
from pav.rl.read import (
    floor_slope,
    sampled,
    with_best_reference,
    with_likelihood,
    with_progress,
)
from pav.rl.refresh import refresh, refreshed
from pav.rl.report import METRICS, read_metrics, write_report
from pav.rl.reward import Reward, Rewarder
from pav.rl.rollout import Actor, rollout
from pav.rl.samples import SAMPLES, Sampled, append_samples
from pav.rl.sync import check_mismatch
from pav.rl.trace import Trace
from pav.rl.update import Sums, rate, update
from pav.tasks.base import Problem


@dataclass
class Run:
    """A run in this process.

    Attributes:
        config: settings.
        directory: what it writes to.
        fabric: of the processes that train together.
        engine: serves the policy.
        actor: samples from it.
        rewarder: frozen verifiers.
        learner: the policy in training.
        wrapped: the same, as set up by ``fabric``.
        optimizer: likewise.
        reference: the start; None without a KL coefficient.
        start: its weights, where chains are sampled from it throughout.
        problems: training problems.
        held_out: validation problems.
        state: where the run is.
        seconds: of the parts of the iteration in work.
        history: metrics of every iteration so far, in the process that writes.
        loggers: take metrics, beside ``metrics.jsonl``.
    """

    config: RlConfig
    directory: Path
    fabric: Fabric
    engine: Serving
    actor: Actor
    rewarder: Rewarder
    learner: Learner
    wrapped: Any
    optimizer: Any
    reference: Reference | None
    problems: Sequence[Problem]
    held_out: Sequence[Problem]
    state: State
    seconds: dict[str, float] = field(default_factory=dict)
    history: list[Metrics] = field(default_factory=list)
    loggers: Sequence[Any] = ()
    start: dict[str, Tensor] | None = None

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count what is done inside as ``part`` of the iteration."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def slope(self) -> float:
        """What a token below the floor of chains costs."""
        if self.config.chain_floor is None:
            return 0.0
        return float(self.fabric.broadcast(floor_slope(self.history, self.config)))

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return bool(self.fabric.is_global_zero)

    def batch(self) -> list[Problem]:
        """Problems of this process in the iteration in work; a new order every epoch."""
        size, count = self.config.batch, len(self.problems)
        start = self.state.iteration * size
        order: list[int] = []
        for epoch in range(start // count, (start + size - 1) // count + 1):
            shuffled = list(range(count))
            Random(seed_of(self.config.seed, "order", epoch)).shuffle(shuffled)
            order += shuffled
        chosen = [self.problems[i] for i in order[start % count :][:size]]
        share = size // self.fabric.world_size
        return chosen[self.fabric.global_rank * share :][:share]


def iterate(run: Run) -> tuple[list[Trace], list[Reward], Metrics]:
    """One iteration: traces of the policy as it is, and an update on them."""
    config, version = run.config, run.state.iteration
    with run.timed("sync"):
        run.engine.load_weights(run.start or run.learner.served(), version)
    with run.timed("sample"):
        traces = sampled(run.actor, run.batch(), config, version)
    with run.timed("score"):
        traces = with_best_reference(run.learner, run.actor.references, traces, config)
        rewards = with_progress(run.learner, run.actor, run.rewarder(traces), traces, config)
    found = samples(run.fabric, traces, rewards, config, run.slope())
    # A group whose traces all earned the same teaches nothing but the KL divergence.
    used = found if config.kl else [s for s in found if not is_idle(s)]
    with held_back():  # from here to the new version nothing may be torn
        with run.timed("update"):
            sums = _updates(run, used)
        run.state.iteration += 1
    rewards = with_likelihood(rewards, sums.read, config)
    return traces, rewards, training_metrics(run.fabric, traces, rewards, found, sums, config)


def _updates(run: Run, used: Sequence[Any]) -> Sums:
    """The optimiser steps of an iteration; what the first one adds up."""
    config = run.config
    scale = rate(run.state.iteration, config)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak"] * scale
    # Dropout of adapters depends on the iteration alone: a resumed run draws the same.
    torch.manual_seed(seed_of(config.seed, "update", run.state.iteration) % 2**31)
    first: Sums | None = None
    for _ in range(config.updates_per_batch):
        sums = update(run.fabric, run.wrapped, run.optimizer, run.reference, used, config)
        if first is None:
            first = sums
            if run.start is None:  # else the engine samples from another policy
                check_mismatch(run.fabric, sums, config.mismatch_limit, run.engine.dtype)
    assert first is not None
    return first


def train(run: Run) -> None:
    """Iterate to the end; a signal leaves a checkpoint of the last whole iteration.

    Raises:
        UserError: if a guard ends the run: its last checkpoint is of that iteration, unless
            figures are not finite; or if the length cap cuts the start's solutions.
    """
    config, state = run.config, run.state
    if run.is_first:
        for name in (METRICS, SAMPLES, WARNINGS):
            keep_lines(run.directory / name, state.iteration)
        run.history = read_metrics(run.directory)
    saved = state.iteration
    try:
        if state.iteration == 0:
            refuse_cut(_evaluate(run, {}), config)
        with Reporter("RL", config.iterations, "iterations", not run.is_first) as reporter:
            while state.iteration < config.iterations:
                run.seconds.clear()
                news = _refresh(run) if _is_stale(run) else {}
                traces, rewards, metrics = iterate(run)
                metrics |= news
                last = state.iteration == config.iterations
                if state.iteration % config.samples_every == 0 or last:
                    _write_samples(run, traces, rewards)
                is_due = state.iteration % config.eval_every == 0 or last
                # Weights that are no numbers would take the engine down.
                if is_due and not not_finite([metrics], config):
                    metrics |= _evaluate(run, metrics)
                _log(run, metrics)
                if why := _look(run, is_due):
                    # Weights that are no numbers are nothing to go on from.
                    if not not_finite([metrics], config):
                        _save(run)
                    raise UserError(
                        f"the run ends after iteration {state.iteration}, {why}; rl.html shows it, "
                        "and the same command with --guards off goes on from the last checkpoint"
                    )
                if state.iteration % config.checkpoint_every == 0 or last:
                    _save(run)
                    saved = state.iteration
                said = lines(run.history, read_alarms(run.directory)) if run.is_first else []
                reporter.update(state.iteration, _note(metrics), said)
    except KeyboardInterrupt:
        if state.iteration > saved:
            _save(run)
        raise
    _save_policy(run, "last")


def refuse_cut(start: Metrics, config: RlConfig) -> None:
    """Refuse a length cap that cuts what the start writes, before anything is learned from it.

    Raises:
        UserError: naming the cap.
    """
    share = start.get("held_out/truncated", 0.0)
    if config.guards != "off" and not config.by_likelihood and share > config.truncation_limit:
        raise UserError(
            f"sampler.max_length cuts {share:.0%} of the start's solutions to held-out problems "
            f"(truncation_limit {config.truncation_limit:g}): nothing was trained; raise "
            "--sampler.max_length, or give a policy that comes to an end"
        )


def _is_stale(run: Run) -> bool:
    """Whether the verifier's base head is to be fitted to the policy as it is."""
    every, state = run.config.refresh_labels_every, run.state
    known = state.refreshed.version if state.refreshed else 0
    return bool(every) and state.iteration % (every or 1) == 0 and known != state.iteration


def _refresh(run: Run) -> Metrics:
    """Fit the verifier's base head to the policy as it is, on a new trace of every problem."""
    state = run.state
    with run.timed("refresh"):
        run.engine.load_weights(run.learner.served(), state.iteration)
        traces = rollout(run.actor, run.batch(), 1, ("refreshing",), state.iteration)
        verifier, count = run.rewarder.verifier, run.config.refresh_rollouts
        assert verifier is not None  # a base head is refreshed
        found = refresh(run.actor, verifier, traces, count, state.iteration)
        with held_back():
            run.rewarder = replace(run.rewarder, verifier=refreshed(verifier, found))
            state.refreshed = found
    return {
        "verifier/version": found.version,
        "verifier/staleness": found.staleness,
        "verifier/brier": found.brier,
    }


def _save(run: Run) -> None:
    with held_back():
        plain = snapshot(run.state, run.learner, run.optimizer, run.is_first)
        if run.is_first:
            save(run.directory / LAST, plain)
        run.fabric.barrier()


def _save_policy(run: Run, name: str) -> None:
    weights = run.learner.served()
    if run.is_first:
        save_policy(run.directory / name, run.learner, weights, run.actor.policy.tokenizer)


def _evaluate(run: Run, metrics: Metrics) -> Metrics:
    """Held-out figures of the policy as it is; the best one so far is kept."""
    if not run.held_out:
        return {}
    with run.timed("evaluate"):
        run.engine.load_weights(run.learner.served(), run.state.iteration)
        found = evaluate(
            run.fabric, run.actor, run.learner, run.held_out, run.state.iteration, run.config
        )
    if not metrics:
        _log(run, {"iteration": run.state.iteration, **found})
    if merit(found) > run.state.best:
        with held_back():
            run.state.best, run.state.best_iteration = merit(found), run.state.iteration
            _save_policy(run, "best")
    return found


def _look(run: Run, is_due: bool) -> str:
    """Ask the guards, and show the run where it was evaluated; why it has no future, or nothing."""
    why = ""
    if run.is_first:
        why = watch(run.directory, run.history, run.config)
        if is_due or why:
            write_report(run.directory)
    return str(run.fabric.broadcast(why))


def _log(run: Run, metrics: Metrics) -> None:
    """One line of ``metrics.jsonl``; the loggers get the same."""
    if not run.is_first:
        return
    total = sum(run.seconds.values())
    split = {f"seconds/{part}": seconds for part, seconds in run.seconds.items()}
    row = {**metrics, **split, "seconds/all": total}
    with (run.directory / METRICS).open("a", encoding="utf-8") as stream:
        stream.write(json_text(row, None) + "\n")
    run.history.append(row)
    for logger in run.loggers:
        numbers = {k: v for k, v in row.items() if isinstance(v, float | int)}
        logger.log_metrics(numbers, step=run.state.iteration)


def _note(metrics: Metrics) -> str:
    """What stands at the end of a line of progress."""
    right = metrics.get("train/accuracy")
    parts = [
        f"reward {metrics['train/outcome']:.3g}" if right is None else f"right {right:.3f}",
        f"tokens {metrics['train/tokens']:.0f}",
        f"steps {metrics['train/steps']:.1f}",
    ]
    if "accuracy" in metrics:
        parts.append(f"held out {metrics['accuracy']:.3f}")
    if "reference/perplexity" in metrics:
        parts.append(f"perplexity {metrics['reference/perplexity']:.3f}")
    return ", ".join(parts)


def _write_samples(run: Run, traces: Sequence[Trace], rewards: Sequence[Reward]) -> None:
    """The traces of the first problem of the batch, with what every step earned."""
    credits = credit_of(run.fabric, rewards, run.config)
    if not run.is_first:
        return
    text = run.actor.policy.text
    found = []
    for trace, reward, credit_S in zip(traces[: run.config.group], rewards, credits, strict=False):
        ends = [0, *trace.ends]
        found.append(
            Sampled(
                iteration=run.state.iteration,
                problem_id=trace.problem.id,
                question=trace.problem.question,
                gold=trace.problem.gold,
                answer=trace.answer,
                correct=trace.correct,
                truncated=trace.truncated,
                version=trace.version,
                verifier_version=run.state.refreshed.version if run.state.refreshed else None,
                outcome=reward.outcome,
                steps=[text(trace.ids[a:b]) for a, b in pairwise(ends)],
                tail=text(trace.ids[ends[-1] :]),
                gain=_rounded(reward.gain_S),
                credit=_rounded(run.config.alpha * credit_S),
                q={head: _rounded(q_P) for head, q_P in reward.q.items()},
            )
        )
    append_samples(run.directory, found)


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]


def keep_lines(path: Path, iteration: int) -> None:
    """Drop lines of iterations that a resumed run does again."""
    if not path.exists():
        return
    kept = [row for row in json_rows(path) if iteration and row["iteration"] <= iteration]
    replace_file(path, "".join(f"{json_text(row, None)}\n" for row in kept))
