"""``pav.evaluate --verifier V --labels DIR``: how good a verifier is on the labels of any run.

Nothing is fitted but the threshold of the first error (on one half of the problems). With labels of
prefixes that a *search* visited (``data_gen.rollouts --traces_from records.jsonl``) it shows what
selection does to a verifier: search prefers prefixes whose Q is predicted too high.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.files import json_text, replace_file
from pav.core.lock import Lock, beside
from pav.core.printable import one_line
from pav.core.statistics import few
from pav.evaluate.calibration_plot import draw
from pav.labels.check import check_ids
from pav.labels.tables import LabelSet, read_labels
from pav.policy.policy import (
    Policy,
    PolicyConfig,
    load_policy,
    tokenizer_fingerprint,
    vocabulary_size,
)
from pav.policy.rendered import warn_other_prompt
from pav.tasks.base import Task
from pav.verifier.checkpoint import (
    Verifier,
    load_model,
    load_verifier,
    prompt_from,
    resolve_task,
    trunk_path,
)

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from pav.verifier.trunk import HeadedTrunk


@dataclass(frozen=True)
class EvaluateConfig:
    """Metrics of a verifier on label runs, beside the ceilings that their rollouts allow.

    Args:
        verifier: checkpoint that pav.train wrote, or ``pav:reference``.
        labels: label runs that data_gen.rollouts wrote; their problems should be none that the
            verifier was trained on.
        split: whose problems; ``all`` for every one in the labels.
        output: file to write, ending in .json; the plot goes beside it. By default
            ``<verifier>-on-<labels>.json`` in the directory of the labels.
        task: needed only where the verifier's task is not built in.
        trunk: new place of the trunk, if it moved.
        verbose: print every metric, not the short table (all are in the output).
    """

    verifier: str
    labels: list[str]
    split: Literal["train", "validation", "all"] = "validation"
    output: str | None = None
    task: Task | None = None
    trunk: str | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.output is not None and not self.output.endswith(".json"):
            raise UserError(f"output is {self.output!r}; give a file name ending in .json")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, print and write (see :class:`EvaluateConfig`); returns what is written."""
    verifier = load_verifier(config.verifier)
    labels = read_labels(config.labels)
    for warning in labels.warnings:
        print(f"WARNING: {one_line(warning)}")
    output = Path(config.output) if config.output else _beside(config.labels[0], verifier)
    with Lock(beside(output), output):
        return _evaluate(config, verifier, labels, output)


def _evaluate(
    config: EvaluateConfig, verifier: Verifier, labels: LabelSet, output: Path
) -> dict[str, Any]:
    # Not at the top: they bring torch, and --help stays fast.
    from pav.evaluate.report import first_half, label_facts, print_metrics
    from pav.evaluate.scored_labels import MODES, score_labels
    from pav.evaluate.suite import measure
    from pav.labels.examples import pav_examples
    from pav.verifier.forward import score

    task = resolve_task(verifier.card.task, config.task, f"verifier {config.verifier!r}")
    check_labels(verifier, labels, task, config)
    check_writable(output)
    path, policy = trunk_policy(verifier, task, config.trunk)
    check_ids(labels.traces, labels.completions, vocabulary_size(path), str(config.labels))
    cap = labels.manifest["sampler"]["max_length"]
    splits = ("train", "validation", "test") if config.split == "all" else (config.split,)
    examples = [
        e for s in splits for e in pav_examples(labels, s, verifier.card.heads, policy, cap)
    ]
    if not examples:
        raise UserError(
            f"labels {config.labels} hold no solutions of {config.split} problems; set split"
        )
    if warning := few(len({e.problem_id for e in examples}), config.split):
        print(f"WARNING: {warning}", file=sys.stderr)
    scored = score(load_on_device(verifier, path), examples, policy, "scoring")
    card = verifier.card
    q = {
        (head, mode): card.calibrator(head, mode == "surprise")(
            scored.logits_NH[:, h], scored.surprise_NF
        )
        for h, head in enumerate(card.heads)
        for mode in MODES
    }
    fitted = np.array([first_half(e.problem_id) for e in examples])[scored.example_N]
    everything = dict.fromkeys(card.heads, np.ones_like(fitted))
    scores = score_labels(card.heads, examples, scored, labels, policy, task)
    metrics = measure(scores, q, everything, fitted) | {"data": label_facts(labels)}
    title = f"{config.verifier} on {', '.join(config.labels)}, {config.split} problems"
    print_metrics(metrics, title, config.verbose)
    _print_shift(card.validation, metrics)
    try:
        plain = json_text(metrics).encode()
        replace_file(output, plain)
        draw(metrics, output.with_suffix(".png"), title)
    except OSError as error:
        raise UserError(
            f"output {str(output)!r} cannot be written ({error.strerror}); choose another"
        ) from error
    print(f"metrics: {output}, plot: {output.with_suffix('.png')}")
    return metrics


def check_labels(verifier: Verifier, labels: LabelSet, task: Task, config: EvaluateConfig) -> None:
    """Refuse labels that a verifier cannot read, or that are about another task.

    Raises:
        UserError: naming what differs.
    """
    card = verifier.card
    if labels.manifest["task"] != task.fingerprint:
        raise UserError(
            f"labels {config.labels[0]!r} are about another task than verifier "
            f"{config.verifier!r} (theirs: {labels.manifest['task']}, its: {task.fingerprint}); "
            "give labels of its task"
        )
    if labels.manifest["tokenizer"] != card.tokenizer:
        raise UserError(
            f"labels {config.labels[0]!r} were made with another tokenizer than verifier "
            f"{config.verifier!r} reads; give labels of its policy"
        )
    if not {h.removeprefix("q/") for h in card.heads} & {*labels.policies, "orm"}:
        raise UserError(
            f"labels {config.labels[0]!r} hold rollouts of {', '.join(labels.policies)}, verifier "
            f"{config.verifier!r} predicts {', '.join(card.heads)}; give labels of these policies"
        )


def check_writable(output: Path) -> None:
    """Find out before the work where its result cannot be written.

    Raises:
        UserError: if it cannot.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(output.parent, os.W_OK) else "no permission"
    except OSError as error:
        reason = str(error.strerror)
    if reason or output.is_dir():
        raise UserError(
            f"output {str(output)!r} cannot be written ({reason or 'a directory'}); choose another"
        )


def load_on_device(verifier: Verifier, path: str) -> HeadedTrunk:
    """The verifier in float32 on its trunk at ``path``, on a GPU if there is one."""
    import torch

    return load_model(verifier, path).to("cuda" if torch.cuda.is_available() else "cpu")


def trunk_policy(verifier: Verifier, task: Task, trunk: str | None) -> tuple[str, Policy]:
    """(path of the trunk, the trunk as a policy: prompt, tokenizer and step rule).

    Raises:
        UserError: if the trunk moved, or has another tokenizer by now.
    """
    card = verifier.card
    path = trunk_path(verifier, trunk)
    config = PolicyConfig(path, prompt=prompt_from(card.prompt))
    policy = load_policy(config, task.step_rule)
    if tokenizer_fingerprint(policy.tokenizer) != card.tokenizer:
        raise UserError(
            f"the trunk at {path!r} has another tokenizer than the one that {str(verifier.path)!r} "
            "was trained with; name the right one with --trunk"
        )
    warn_other_prompt(card.trunk_prompt, policy, f"verifier {str(verifier.path)!r}", "its trunk")
    return path, policy


def _print_shift(before: dict[str, Any], now: dict[str, Any]) -> None:
    """What changed against the verifier's own validation."""
    from pav.evaluate.report import shown

    for name, m in now.items():
        old = before.get(name)
        if name.endswith("/surprise") and isinstance(old, dict) and m["rows"]:
            auc, ece = (
                f"{shown(m, key)} here, {shown(old, key)} on its own validation"
                for key in ("auc", "calibration_error")
            )
            print(
                f"{one_line(name)}: AUC {auc}; calibration error {ece}; "
                f"mean Q {shown(m, 'mean_q')} for {shown(m, 'mean_right')} right"
            )


def _beside(labels: str, verifier: Verifier) -> Path:
    directory = Path(labels)
    return directory / f"{verifier.path.stem}-on-{directory.resolve().name}.json"


def main() -> None:
    """Entry point of ``pav.evaluate``."""
    run(evaluate, EvaluateConfig, "pav.evaluate")


if __name__ == "__main__":
    main()
