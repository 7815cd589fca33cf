"""``data_gen.import_labels``: public data sets of labelled steps as a label run for ``pav.train``.

A step's label becomes k of n = 1 at the prefix that ends with it, under a pseudo-policy named after
the data set: the head ``q/<name>`` then predicts such labels. Solutions have the tokens in which
the policy would have written them (:mod:`pav.policy.encoding`), and are cut into steps as its own
would be. What was labelled is what the data set's authors meant: in PRM800K that a step is
correct, which is no chance of finishing right.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data_gen.importers.formats import Format, ImportedSolution, read_solutions
from data_gen.importers.traces import digest
from data_gen.inspect.card import write_data_card
from data_gen.inspect.health import print_health, write_health
from data_gen.label_run import Run, print_train_command
from data_gen.store import Store
from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.files import replace_file
from pav.core.manifest import PROMPTS
from pav.core.printable import one_line
from pav.core.signals import interruptible
from pav.core.steps import StepRule
from pav.grading.kinds import Grader, reference
from pav.labels.tables import Completion, Trace, prefix_key
from pav.policy.encoding import encode_steps
from pav.policy.policy import Policy, PolicyConfig, Sampler, load_policy, tokenizer_fingerprint
from pav.policy.rendered import refuse_clock, rendered
from pav.tasks.base import Problem, problem_id, split_of, task_spec
from pav.tasks.jsonl import Jsonl

PROBLEMS = "problems.jsonl"
# Nothing is sampled here, and no step is cut for want of room that a model has.
MAX_LENGTH = 2048


@dataclass(frozen=True)
class ImportConfig:
    """Public data sets of labelled steps as a label run that pav.train reads.

    Problems are split by a hash of their text; what belongs to the test split is left out.

    Args:
        format: layout of the file: ``math_shepherd``, ``prm800k`` or ``trl`` (``prompt``,
            ``completions``, ``labels``).
        data: the file: ``.jsonl``, ``.jsonl.gz`` or ``.parquet``.
        output: directory of the label run.
        policy: the policy whose search the verifier will guide; its tokenizer and prompt are used.
        name: what labels and heads call whoever made the labels; by default the format.
        sampler: how the policy will sample in a search; solutions above its max_length are left
            out.
        step_rule: how solutions are cut into steps.
        grader: how answers of these problems are read (see pav.tasks.jsonl); by default ``math``,
            for ``trl``, which has no answers, ``none``.
        limit: rows to read; all of them are kept in memory (some kB each).
        skip_bad_rows: leave out rows that are not of the layout, and count them; otherwise the
            first one ends the import.
    """

    format: Format
    data: str
    output: str
    policy: PolicyConfig
    name: str | None = None
    sampler: Sampler = field(default_factory=lambda: Sampler(max_length=MAX_LENGTH))
    step_rule: StepRule = field(default_factory=StepRule)
    grader: Grader | None = None
    limit: int | None = None
    skip_bad_rows: bool = False


def import_labels(config: ImportConfig) -> None:
    """Write the label run (see :class:`ImportConfig`); says what was left out and why."""
    output = Path(config.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {config.output!r} is not empty; choose another directory")
    name = config.name or config.format
    if not config.sampler.max_length:
        config = replace(config, sampler=replace(config.sampler, max_length=MAX_LENGTH))
    policy = load_policy(config.policy, config.step_rule)
    refuse_clock(policy)
    bad: list[str] | None = [] if config.skip_bad_rows else None
    rows = read_solutions(config.data, config.format, config.limit, bad)
    solutions = [s for row in rows for s in row]
    if not solutions:
        why = f" ({len(bad)} bad rows, the first: {bad[0]})" if bad else ""
        raise UserError(f"data {config.data!r} holds no solutions{why}; give another file")
    traces, completions, left_out = encode(solutions, policy, name, config.sampler.max_length)
    if bad:
        left_out["bad rows"] = len(bad)
        print(
            f"WARNING: {len(bad)} bad rows are skipped; the first: {one_line(bad[0])}",
            file=sys.stderr,
        )
    if not traces:
        reasons = ", ".join(f"{n} {why}" for why, n in left_out.items())
        raise UserError(f"data {config.data!r}: no solution can be used ({reasons})")
    problems = _problems(config, solutions)
    path = (output / PROBLEMS).resolve()
    with TemporaryDirectory() as scratch:
        # What the labels are about is named by the content of the problems, not by their place.
        copy = Path(scratch) / PROBLEMS
        copy.write_text(problems, encoding="utf-8")
        grader = _grader(config)
        fingerprint = Jsonl(config.step_rule, data=str(copy), grader=grader).fingerprint
    manifest: dict[str, Any] = {
        "format": 1,
        "imported": {"format": config.format, "data": digest(config.data)},
        "task": fingerprint,
        "task_spec": task_spec(Jsonl(config.step_rule, data=str(path), grader=grader)),
        "tokenizer": tokenizer_fingerprint(policy.tokenizer),
        "policy": asdict(replace(policy.config, name=name)),
        "policy_fingerprint": policy.fingerprint,
        "rollout_policies": {name: digest(config.data)},
        # By its own name, too: labels that it made itself must have been asked alike.
        PROMPTS: dict.fromkeys((name, config.policy.label), rendered(policy)),
        "sampler": asdict(config.sampler),
        "n_mc": 1,
    }
    with interruptible(), Store(output, manifest) as store:
        replace_file(path, problems.encode())
        store.traces.update({t.trace_id: t for t in traces})
        store.completions.update({(c.prefix_key, c.policy, c.index): c for c in completions})
        store.seal(manifest["rollout_policies"], changed=True, owed=0)
        records = Run(output, manifest, store.traces, store.completions)
        print(
            f"{len(traces)} solutions with {len(completions)} labels before their ends in "
            f"{output}; left out: "
            + (", ".join(f"{n} {why}" for why, n in left_out.items()) or "none")
        )
        print_health(write_health(records), output)
        write_data_card(records)
    print_train_command(records)


def encode(
    solutions: Sequence[ImportedSolution], policy: Policy, name: str, max_length: int
) -> tuple[list[Trace], list[Completion], Counter[str]]:
    """(traces, labels, how many solutions or labels were left out by reason)."""
    traces: dict[str, Trace] = {}
    completions: list[Completion] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    index: Counter[str] = Counter()
    counts_by_problem: Counter[str] = Counter()
    delimiter = policy.stepper.rule.delimiter
    for solution in solutions:
        pid = problem_id(solution.question)
        split = split_of(pid)
        if split == "test":
            left_out["of the test split"] += 1
            continue
        texts = [step.text for step in solution.steps]
        encoded = encode_steps(policy, texts, delimiter, solution.complete)
        ids = encoded.ids
        closed = any(i in policy.stepper.eos_ids for i in ids[: -1 if solution.complete else None])
        if encoded.is_changed or closed:
            left_out["that the tokenizer changes"] += 1
            continue
        key = prefix_key(pid, ids)
        if key in seen:
            left_out["repeated"] += 1
            continue
        prompt = policy.encode(Problem(pid, solution.question))
        if len(prompt) + len(ids) > max_length:
            left_out["longer than sampler.max_length"] += 1
            continue
        seen.add(key)
        last = solution.steps[-1]
        boundaries = policy.stepper.step_ends(ids)
        trace = Trace(
            trace_id=f"{pid}/{name}/{counts_by_problem[pid]}",
            problem_id=pid,
            question=solution.question,
            gold=solution.gold,
            split=split,
            policy=name,
            seed_index=counts_by_problem[pid],
            ids=ids,
            step_ends=boundaries,
            answer=solution.gold if solution.complete and last.label else None,
            correct=solution.complete and bool(last.label),
            truncated=not solution.complete,
        )
        counts_by_problem[pid] += 1
        traces[trace.trace_id] = trace
        for step, end in zip(solution.steps, encoded.ends, strict=True):
            if step.label is None or (solution.complete and end == len(ids)):
                continue  # the end of a complete solution is its outcome
            if end not in boundaries:
                left_out["labels inside a step of the step rule"] += 1
                continue
            prefix = ids[:end]
            where = prefix_key(pid, prefix)
            completions.append(
                Completion(where, pid, name, index[where], prefix, [], None, step.label, False)
            )
            index[where] += 1
    return list(traces.values()), completions, left_out


def _grader(config: ImportConfig) -> Grader:
    return config.grader or ("none" if config.format == "trl" else "math")


def _problems(config: ImportConfig, solutions: Sequence[ImportedSolution]) -> str:
    """The problems with a known answer, as lines of JSON, so that a verifier can search on them.

    Without a grader the reference is the text of a right solution.
    """
    grader = _grader(config)
    answers: dict[str, str] = {}
    for s in solutions:
        text = s.gold
        if grader == "none" and s.complete and s.steps[-1].label:
            text = config.step_rule.delimiter.join(step.text for step in s.steps)
        if text and s.question not in answers and reference(grader, text) is not None:
            answers[s.question] = text
    if not answers:
        raise UserError(
            f"data {config.data!r} tells no answer that grader {grader!r} can read; set grader"
        )
    rows = [{"question": q, "answer": a} for q, a in answers.items()]
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def main() -> None:
    """Entry point of ``data_gen.import_labels``."""
    run(import_labels, ImportConfig, "data_gen.import_labels")


if __name__ == "__main__":
    main()
