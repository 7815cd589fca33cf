"""``pav.processbench --verifier V --data DIR``: does a verifier find the first wrong step?

A step is called wrong if its score is below a threshold; the first one so called is compared with
the label. F1 is the harmonic mean of the accuracy on solutions with an error (the right step was
found) and on solutions without (no step was called wrong). Source: ProcessBench, arXiv 2412.06559.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.files import json_text
from pav.core.printable import cell, one_line
from pav.core.tables import wide_console
from pav.evaluate.command import check_writable, load_on_device, trunk_policy
from pav.evaluate.processbench_data import AnnotatedSolution, read_subsets
from pav.evaluate.processbench_f1 import UNREADABLE, Scores, f1_row, first_wrong, pick_threshold
from pav.policy.encoding import encode_steps
from pav.policy.policy import Policy
from pav.tasks.base import Problem, Task
from pav.verifier.checkpoint import VerifierMeta, load_verifier, resolve_task

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from pav.labels.examples import Example
    from pav.verifier.trunk import HeadedTrunk

Score = Literal["last", "min", "advantage"]


@dataclass(frozen=True)
class ProcessBenchConfig:
    """F1 of a verifier in finding the first wrong step, on data of ProcessBench's layout.

    Args:
        verifier: checkpoint that pav.train wrote, or ``pav:reference``.
        data: a file (JSON array or JSON lines) or a directory of them; a file is a subset.
        threshold: a step whose score is below is wrong; give this or ``pick_on``.
        pick_on: file or directory whose F1 picks the threshold (the largest F1, at the middle of
            its widest range of thresholds); the paper picks on the GSM8K subset.
        head: which head's Q; by default that of the prover, for an ORM its only one.
        score: ``last``, Q at the end of a step; ``min``, the lowest Q within a step (the step rule
            may find several in one); ``advantage``, Q at its end minus Q before it.
        surprise: use the calibrators that read the trunk's log-probabilities.
        separator: text between steps; by default the delimiter of the verifier's step rule.
        output: file to write, ending in .json; by default ``<verifier>-processbench.json`` in the
            current directory.
        task: needed only where the verifier's task is not built in.
        trunk: new place of the trunk, if it moved.
    """

    verifier: str
    data: str
    threshold: float | None = None
    pick_on: str | None = None
    head: str | None = None
    score: Score = "last"
    surprise: bool = True
    separator: str | None = None
    output: str | None = None
    task: Task | None = None
    trunk: str | None = None

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.pick_on is None):
            raise UserError(
                "threshold and pick_on: give one of them, a score below which a step is wrong, or "
                "a file whose F1 picks it"
            )
        if self.output is not None and not self.output.endswith(".json"):
            raise UserError(f"output is {self.output!r}; give a file name ending in .json")


def processbench(config: ProcessBenchConfig) -> dict[str, Any]:
    """Score, print and write (see :class:`ProcessBenchConfig`); returns what is written."""
    subsets = read_subsets("data", config.data)
    picked = {} if config.pick_on is None else read_subsets("pick_on", config.pick_on)
    verifier = load_verifier(config.verifier)
    card = verifier.card
    head = chosen_head(card, config.head)
    task = resolve_task(card.task, config.task, f"verifier {config.verifier!r}")
    separator = task.step_rule.delimiter if config.separator is None else config.separator
    if task.step_rule.delimiter not in separator:
        raise UserError(
            f"separator is {separator!r}, without the delimiter {task.step_rule.delimiter!r} of "
            "the verifier's step rule; steps would not end where it scores them"
        )
    check_writable(_output(config))
    path, policy = trunk_policy(verifier, task, config.trunk)
    # A subset to pick on is often one of those to report on: the same solution is scored once.
    everything = [s for part in (*subsets.values(), *picked.values()) for s in part]
    distinct = {_key(solution): solution for solution in everything}
    encode(policy, everything[0], separator)  # a tokenizer that cannot is found before loading
    model = load_on_device(verifier, path)
    scores = score_steps(model, policy, card, head, list(distinct.values()), config, separator)
    known = dict(zip(distinct, scores, strict=True))
    threshold = config.threshold
    if threshold is None:
        to_pick = [s for part in picked.values() for s in part]
        threshold = pick_threshold([s.label for s in to_pick], [known[_key(s)] for s in to_pick])
    rows = []
    predictions = {}
    seen = {_key(s) for part in picked.values() for s in part}
    for name, part in subsets.items():
        found = [first_wrong(known[_key(s)], threshold) for s in part]
        rows.append(
            {"subset": name}
            | f1_row([s.label for s in part], found)
            | {"threshold_picked_here": any(_key(s) in seen for s in part)}
        )
        predictions[name] = [
            {"id": s.id, "label": s.label, "predicted": None if p == UNREADABLE else p}
            | {"scores": None if (at := known[_key(s)].steps) is None else at.round(6).tolist()}
            for s, p in zip(part, found, strict=True)
        ]
    f1s = [row["f1"] for row in rows if row["f1"] is not None]
    result = {
        "verifier": config.verifier,
        "verifier_digest": verifier.digest,
        "head": head,
        "score": config.score,
        "surprise": config.surprise,
        "separator": separator,
        "threshold": threshold,
        "pick_on": config.pick_on,
        "subsets": rows,
        "average_f1": float(np.mean(f1s)) if f1s else None,
        "text_changed_by_tokenizer": sum(s.is_changed for s in known.values()),
        "predictions": predictions,
    }
    _report(result)
    _write(config, result)
    return result


def chosen_head(card: VerifierMeta, name: str | None) -> str:
    """The head to read.

    Raises:
        UserError: if the verifier has no such head.
    """
    head = name or card.prover_head or card.base_head or card.heads[0]
    if head not in card.heads:
        raise UserError(f"head is {head!r}; give one of the verifier's: {', '.join(card.heads)}")
    return head


def encode(
    policy: Policy, solution: AnnotatedSolution, separator: str
) -> tuple[Example, list[int], bool]:
    """A solution as the verifier's policy would have written it.

    Steps end where the step rule says, and where the data say (:func:`encode_steps`).

    Returns:
        (the example, index among its ends of every step's own end, whether the text changed).

    Raises:
        UserError: if the tokenizer does not tell which characters a token holds.
    """
    from pav.labels.examples import given_example

    steps = [step.strip() for step in solution.steps]
    encoded = encode_steps(policy, steps, separator)
    example, own = given_example(policy, Problem(solution.id, solution.problem), encoded)
    return example, own, encoded.is_changed


def score_steps(
    model: HeadedTrunk,
    policy: Policy,
    card: VerifierMeta,
    head: str,
    solutions: Sequence[AnnotatedSolution],
    config: ProcessBenchConfig,
    separator: str,
) -> list[Scores]:
    """Scores of every step of every solution, from one forward pass per solution."""
    from pav.verifier.forward import score

    encoded = [encode(policy, solution, separator) for solution in solutions]
    longest = getattr(model.trunk.config, "max_position_embeddings", None) or sys.maxsize
    readable = [i for i, (e, _, _) in enumerate(encoded) if len(e.ids) <= longest]
    out = [Scores(None, is_changed) for _, _, is_changed in encoded]
    if not readable:
        return out
    examples = [encoded[i][0] for i in readable]
    scored = score(model, examples, policy, "scoring", with_surprise=config.surprise)
    features = scored.surprise_NF if config.surprise else None
    q_N = card.calibrator(head, config.surprise)(
        scored.logits_NH[:, card.heads.index(head)], features
    )
    for row, i in enumerate(readable):
        example, own, is_changed = encoded[i]
        q_P = np.empty(len(example.positions_P))
        mine = scored.example_N == row
        q_P[scored.step_N[mine]] = q_N[mine]
        out[i] = Scores(_per_step(q_P, own, config.score), is_changed)
    return out


def _per_step(q_P: NDArray[np.float64], own: Sequence[int], kind: Score) -> NDArray[np.float64]:
    """Score of every given step from Q at step 0 and at every end; ``own`` indexes the ends."""
    last = q_P[np.asarray(own) + 1]
    before = q_P[[0, *(i + 1 for i in own[:-1])]]
    if kind == "advantage":
        return np.asarray(last - before)
    if kind == "min":
        # Steps may share an end: where a token holds the text of both.
        starts = [0, *(i + 1 for i in own[:-1])]
        return np.array(
            [q_P[min(a, b) + 1 : b + 2].min() for a, b in zip(starts, own, strict=True)]
        )
    return np.asarray(last)


def _key(solution: AnnotatedSolution) -> tuple[str, tuple[str, ...]]:
    return solution.problem, tuple(solution.steps)


def _report(result: dict[str, Any]) -> None:
    title = f"{result['verifier']}: {result['head']}, {result['score']} < {result['threshold']:.4g}"
    table = Table(
        "subset", "with error", "found", "without", "called right", "F1", title=cell(title)
    )
    for row in result["subsets"]:
        table.add_row(
            cell(row["subset"] + (" (threshold picked here)" * row["threshold_picked_here"])),
            str(row["n_error"]),
            _percent(row["error_accuracy"]),
            str(row["n_correct"]),
            _percent(row["correct_accuracy"]),
            _percent(row["f1"]),
        )
    table.add_row("average", "", "", "", "", _percent(result["average_f1"]))
    wide_console(120).print(table)
    unreadable = sum(row["unreadable"] for row in result["subsets"])
    if unreadable:
        _warn(f"{unreadable} solutions are longer than the trunk can read; they count as wrong")
    if result["text_changed_by_tokenizer"]:
        changed = result["text_changed_by_tokenizer"]
        _warn(f"{changed} solutions hold text that the tokenizer does not give back")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _warn(message: str) -> None:
    print(f"WARNING: {one_line(message)}", file=sys.stderr)


def _output(config: ProcessBenchConfig) -> Path:
    name = Path(config.verifier.replace("pav:", "")).stem
    return Path(config.output or f"{name}-processbench.json")


def _write(config: ProcessBenchConfig, result: dict[str, Any]) -> None:
    output = _output(config)
    try:
        output.write_text(json_text(result))
    except OSError as error:
        raise UserError(
            f"output {str(output)!r} cannot be written ({error.strerror}); choose another"
        ) from error
    print(f"rows and predictions: {output}")


def main() -> None:
    """Entry point of ``pav.processbench``."""
    run(processbench, ProcessBenchConfig, "pav.processbench")


if __name__ == "__main__":
    main()
