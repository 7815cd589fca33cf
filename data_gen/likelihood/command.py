"""``data_gen.likelihood DIR``: log-probability of the reference answer at every step.

A label where rollouts are too dear or answers cannot be checked: how likely the policy finds the
task's forced answer (``Task.forced_answer``), were it to answer at once. Progress of a step is the
change that it makes. The rows are a table of their own, ``likelihood``, beside the counts and never
mixed with them: a log-probability is no chance of success.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_gen.label_run import (
    Run,
    policy_config,
    print_train_command,
    read_run,
    task_of,
    warn_unfinished,
)
from data_gen.store import Store
from pav.cli.directories import run_on_directories
from pav.core.errors import UserError
from pav.core.files import replace_file
from pav.core.printable import one_line
from pav.core.progress import Reporter
from pav.core.signals import interruptible
from pav.grading.sandbox import DEFAULT_TIMEOUT, GRADER_LOG, guarded
from pav.labels.check import check_ids
from pav.labels.files import LIKELIHOOD, PROMPT_IDS, two_askers
from pav.labels.tables import LIKELIHOODS, Trace, likelihood_rows, prefix_key, prefixes
from pav.policy.opening import task_option
from pav.policy.policy import (
    Policy,
    PolicyConfig,
    asked,
    like,
    load_policy,
    tokenizer_fingerprint,
    vocabulary_size,
)
from pav.policy.rendered import refuse_clock, rendered
from pav.tasks.base import Problem, Task

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pav.verifier.forced_answer import Scorer

# Solutions between two parts of the table: what a death costs.
PART = 256


@dataclass(frozen=True)
class LikelihoodConfig:
    """Log-probability of the reference answer after every step of the solutions of a label run.

    Args:
        labels: directory of the run (``data_gen.likelihood DIR`` is short for ``--labels DIR``).
            One made with ``data_gen.rollouts --n_mc 0`` (and ``--traces_from``) holds solutions
            alone.
        policy: the model that is asked; by default the run's base policy. Its tokenizer must be the
            run's; it is asked as the base policy was, unless it has a prompt of its own.
        task: the run's task, where it is not built in.
        contrast: wrong answers that the reference is weighed against, those that the run's
            solutions gave most often to the problem. The label is then the reference's share of its
            own probability and theirs, under the policy's name and ``-vs<contrast>``; problems to
            which nobody answered wrongly get none.
        device: where it runs; ``auto`` takes a GPU if there is one.
    """

    labels: str
    policy: PolicyConfig | None = None
    task: Task | None = None
    contrast: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if self.contrast < 0:
            raise UserError(f"contrast is {self.contrast}; give 0 or more wrong answers")


def likelihood(config: LikelihoodConfig) -> None:
    """Write the table of likelihoods (see :class:`LikelihoodConfig`); the same command resumes."""
    run = read_run(config.labels)
    task = task_of(run, config.task)
    base = policy_config(run.manifest)
    given = config.policy or base
    if config.contrast:
        given = replace(given, name=f"{given.label}-vs{config.contrast}")
    policy = load_policy(asked(like(given, base), task), task.step_rule)
    if tokenizer_fingerprint(policy.tokenizer) != run.manifest["tokenizer"]:
        raise UserError(
            f"policy {policy.config.model!r} has another tokenizer than labels {config.labels!r}; "
            "choose one of the same tokenizer"
        )
    check_ids(run.traces.values(), [], vocabulary_size(policy.path), repr(config.labels))
    warn_unfinished(run)
    done = {key for key, name in _known(run, policy) if name == policy.config.label}
    owed = [t for t in run.traces.values() if any(key not in done for key, _ in _boundaries(t))]
    rivals = _rivals(run, config.contrast)
    if config.contrast:
        owed = [t for t in owed if rivals.get(t.problem_id)]
        if not (owed or done):
            raise UserError(
                f"contrast is {config.contrast}, and no solution in {config.labels!r} gave a wrong "
                "answer; leave it out, or label more solutions"
            )
    # The store is opened for its lock alone.
    with interruptible(), Store(run.directory, run.manifest):
        if owed:
            _check(task, run, owed[0])
            _check_lengths(task, policy, owed)
            model = _load(policy, config.device)
            _write(run, task, policy, model, owed, done, rivals)
    _summary(run, policy)


def _rivals(run: Run, count: int) -> dict[str, list[str]]:
    """Problem id -> the wrong answers that its solutions gave, most often given first."""
    given: dict[str, Counter[str]] = {}
    for trace in run.traces.values():
        if count and trace.answer is not None and not trace.correct:
            given.setdefault(trace.problem_id, Counter())[trace.answer] += 1
    return {pid: [answer for answer, _ in c.most_common(count)] for pid, c in given.items()}


def _known(run: Run, policy: Policy) -> dict[tuple[str, str], float]:
    """What the table holds; a name must stand for one policy and one prompt."""
    name, asked = policy.config.label, rendered(policy)["ids"]
    own = [row for row in likelihood_rows(run.directory) if row["policy"] == name]
    now = {"policy_fingerprint": policy.fingerprint, PROMPT_IDS.name: asked}
    for row in own:
        if said := two_askers(row, now):
            raise UserError(
                f"labels {str(run.directory)!r} hold likelihoods of another policy called "
                f"{name!r}, or under another prompt ({said} now); put back the model and its chat "
                f"template, set policy.name, or remove {LIKELIHOODS}/ there"
            )
    if not own:
        refuse_clock(policy)
    return read_likelihood(run.directory)


def read_likelihood(directory: Path) -> dict[tuple[str, str], float]:
    """(prefix key, policy name) -> log-probability of the forced answer; empty without a table."""
    rows = likelihood_rows(directory)
    return {(row["prefix_key"], row["policy"]): row["logprob"] for row in rows}


def _boundaries(trace: Trace) -> Iterator[tuple[str, int]]:
    """(prefix key, solution tokens) of every boundary at which a solution could end at once."""
    for ids in prefixes(trace):
        yield prefix_key(trace.problem_id, ids), len(ids)


def _check(task: Task, run: Run, trace: Trace) -> None:
    """The forced answer must be right by the task's own grader, where it grades at all."""
    problem = Problem(trace.problem_id, trace.question, trace.gold)
    if problem.gold is None:
        return  # answer_ids says so
    text = task.forced_answer(problem)
    grades = any(t.answer is not None for t in run.traces.values())
    if not grades:
        return
    with guarded(task, run.directory / GRADER_LOG, DEFAULT_TIMEOUT) as grader:
        grade = grader.grade(text, problem)
    if not grade.correct:
        raise UserError(
            f"the forced answer {text[:60]!r} of problem {problem.id} is wrong by the grader of "
            f"task {task.name!r}; define forced_answer(problem) in the task as its solutions end"
        )


def _load(policy: Policy, device: str) -> PreTrainedModel:
    import torch

    from pav.verifier.trunk import load_trunk

    model = load_trunk(policy.path, getattr(torch, policy.config.dtype)).eval()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device is {device!r}, which cannot be used: {reason}") from error


def _write(
    run: Run,
    task: Task,
    policy: Policy,
    model: PreTrainedModel,
    owed: list[Trace],
    done: set[str],
    rivals: dict[str, list[str]],
) -> None:
    from pav.verifier.forced_answer import answer_ids, one_by_one, scorer_for

    folder = run.directory / LIKELIHOODS
    scorer: Scorer | None = None
    rows: list[dict[str, Any]] = []
    asked = rendered(policy)["ids"]
    with Reporter("likelihood", len(owed), "solutions") as reporter:
        for number, trace in enumerate(owed, 1):
            problem = Problem(trace.problem_id, trace.question, trace.gold)
            answer = answer_ids(task, policy, problem)
            new = [(key, end) for key, end in _boundaries(trace) if key not in done]
            prompt = policy.encode(problem)
            if new:
                ids = prompt + trace.ids
                cuts = [len(prompt) + end for _, end in new]
                if scorer is None:
                    scorer = scorer_for(model, ids, cuts, answer)
                    if scorer is one_by_one:
                        model_name = one_line(policy.config.model)
                        print(f"{model_name} cannot read boundaries together; one by one")
                values = scorer(model, ids, cuts, answer)
                if others := rivals.get(problem.id):
                    wrong = [answer_ids(task, policy, replace(problem, gold=o)) for o in others]
                    all_RB = np.stack([values, *(scorer(model, ids, cuts, w) for w in wrong)])
                    values = values - np.logaddexp.reduce(all_RB, axis=0)
                rows += [
                    {
                        "prefix_key": key,
                        "problem_id": problem.id,
                        "policy": policy.config.label,
                        "policy_fingerprint": policy.fingerprint,
                        "answer": policy.text(answer),
                        "answer_tokens": len(answer),
                        "logprob": float(value),
                        PROMPT_IDS.name: asked,
                    }
                    for (key, _), value in zip(new, values, strict=True)
                ]
                done.update(key for key, _ in new)
            reporter.update(number)
            if rows and (number % PART == 0 or number == len(owed)):
                write_part(folder, rows)
                rows = []


def _check_lengths(task: Task, policy: Policy, owed: list[Trace]) -> None:
    """Refuse what the model cannot read, before it is loaded."""
    from transformers import AutoConfig

    from pav.verifier.forced_answer import answer_ids

    config = AutoConfig.from_pretrained(policy.path, trust_remote_code=False)
    longest = getattr(config, "max_position_embeddings", None)
    around: dict[str, int] = {}
    for trace in owed:
        if (pid := trace.problem_id) not in around:
            problem = Problem(pid, trace.question, trace.gold)
            around[pid] = len(policy.encode(problem)) + len(answer_ids(task, policy, problem))
        tokens = around[pid] + max(end for _, end in _boundaries(trace))
        if longest is not None and tokens > longest:
            raise UserError(
                f"prompt, solution and answer of problem {pid} are {tokens} tokens, the model "
                f"knows {longest} positions; choose a model of longer context, or shorter "
                "reference answers"
            )


def write_part(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of the table as one more file.

    Raises:
        UserError: if it cannot be written.
    """
    folder.mkdir(exist_ok=True)
    number = 1 + max((int(p.stem.split("-")[1]) for p in folder.glob("part-*.parquet")), default=-1)
    sink = pa.BufferOutputStream()
    told = any(PROMPT_IDS.name in row for row in rows)
    schema = LIKELIHOOD.append(PROMPT_IDS) if told else LIKELIHOOD
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
    target = folder / f"part-{number:05d}.parquet"
    try:
        replace_file(target, sink.getvalue().to_pybytes())
    except OSError as error:
        raise UserError(
            f"{str(target)!r} cannot be written ({error.strerror}); what is finished is safe: make "
            "room there, then give the same command again"
        ) from error


def _summary(run: Run, policy: Policy) -> None:
    found = read_likelihood(run.directory)
    name = policy.config.label
    traces = list(run.traces.values())
    print(
        f"{sum(policy == name for _, policy in found)} likelihoods under {one_line(name)} of the "
        f"prefixes of {len(traces)} solutions in {run.directory / LIKELIHOODS}"
    )
    for label, chosen in (
        ("right", [t for t in traces if t.correct]),
        ("wrong", [t for t in traces if not t.correct]),
    ):
        ends = [[found[key, name] for key, _ in _boundaries(t) if (key, name) in found]
                for t in chosen]  # fmt: skip
        ends = [values for values in ends if values]
        if ends:
            first = np.mean([values[0] for values in ends])
            last = np.mean([values[-1] for values in ends])
            print(f"  {len(ends)} {label} solutions: {first:.2f} at step 0, {last:.2f} at the last")
    option = task_option(run.manifest["task_spec"])
    print(f"next: data_gen.show {shlex.quote(str(run.directory))}{option}")
    print_train_command(run)


def main() -> None:
    """Entry point of ``data_gen.likelihood``."""
    run_on_directories(likelihood, LikelihoodConfig, "data_gen.likelihood")


if __name__ == "__main__":
    main()
