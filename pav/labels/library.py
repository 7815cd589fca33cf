"""Label runs as tables with text: what ``pav.read_labels`` returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pav.core.errors import UserError
from pav.labels import tables
from pav.labels.tables import COMPLETIONS, TRACES, LabelSet, Trace, prefix_key
from pav.policy.policy import load_tokenizer, model_path, tokenizer_fingerprint

if TYPE_CHECKING:
    from datasets import Dataset

_TEXT = pa.field("text", pa.string())
_STEPS = pa.field("steps", pa.list_(pa.string()))
_TRACES = pa.schema([*TRACES, _TEXT, _STEPS])
_PREFIXES = pa.schema(
    [
        ("prefix_key", pa.string()),
        ("problem_id", pa.string()),
        ("question", pa.string()),
        ("split", pa.string()),
        ("step", pa.int32()),
        _TEXT,
        _STEPS,
        ("policy", pa.string()),
        ("k", pa.int32()),
        ("n", pa.int32()),
        ("q", pa.float64()),
    ]
)
_COMPLETIONS = pa.schema([*COMPLETIONS, _TEXT])


@dataclass(frozen=True)
class Labels:
    """The labels of one or more runs, as tables of Hugging Face ``datasets``.

    Each table is made when it is first asked for; ``labels.prefixes.to_pandas()`` is a data frame.

    Attributes:
        labels: everything that the runs hold, as training reads it.
        text: tokens of a solution -> their text.
        delimiter: what ends a step.
    """

    labels: LabelSet
    text: Callable[[Sequence[int]], str]
    delimiter: str

    @property
    def manifest(self) -> dict[str, Any]:
        """What the (first) run is: task, policies, sampler and how labels were made."""
        return self.labels.manifest

    @property
    def warnings(self) -> list[str]:
        """A line each of what one should know: a run that is still going on, what it lacks."""
        return self.labels.warnings

    @cached_property
    def traces(self) -> Dataset:
        """One row per graded solution that was labelled.

        Columns: ``trace_id``, ``problem_id``, ``question``, ``gold``, ``split``, ``policy``,
        ``seed_index``, ``ids`` (tokens of the solution), ``step_ends`` (exclusive end of every
        step in ``ids``), ``answer``, ``correct``, ``truncated``, ``text``, and ``steps``: the text
        of every step, as :meth:`pav.LoadedVerifier.score` takes it.
        """
        rows = [
            asdict(t) | {"text": self.text(t.ids), "steps": self._steps(t, len(t.step_ends))}
            for t in self.labels.traces
        ]
        return _dataset(rows, _TRACES)

    @cached_property
    def prefixes(self) -> Dataset:
        """One row per labelled prefix of a solution and rollout policy: the labels.

        Columns: ``prefix_key``, ``problem_id``, ``question``, ``split``, ``step`` (steps that the
        prefix holds; 0 is the problem alone), ``text``, ``steps`` (the text of each), ``policy``,
        ``k`` right of ``n`` rollouts, and ``q``, their share: the Monte-Carlo estimate of Q. Equal
        prefixes of several solutions are one row. Where a run counts the endings of its solutions
        as rollouts, so do ``k`` and ``n``, as in training.
        """
        known: dict[str, tuple[Trace, int]] = {}
        for trace in self.labels.traces:
            for step, end in enumerate([0, *trace.step_ends]):
                known.setdefault(prefix_key(trace.problem_id, trace.ids[:end]), (trace, step))
        rows = []
        for (key, policy), (k, n) in self.labels.counts.items():
            trace, step = known[key]
            rows.append(
                {
                    "prefix_key": key,
                    "problem_id": trace.problem_id,
                    "question": trace.question,
                    "split": trace.split,
                    "step": step,
                    "text": self.text(trace.ids[: trace.step_ends[step - 1]]) if step else "",
                    "steps": self._steps(trace, step),
                    "policy": policy,
                    "k": k,
                    "n": n,
                    "q": k / n,
                }
            )
        return _dataset(rows, _PREFIXES)

    @cached_property
    def completions(self) -> Dataset:
        """One row per rollout.

        Columns: ``prefix_key``, ``problem_id``, ``policy``, ``index``, ``prefix_ids`` (tokens that
        it went on from), ``ids`` (tokens of the rollout), ``answer``, ``correct``, ``truncated``
        and ``text`` (of the rollout alone).
        """
        rows = [asdict(c) | {"text": self.text(c.ids)} for c in self.labels.completions]
        return _dataset(rows, _COMPLETIONS)

    def __repr__(self) -> str:
        found = self.labels
        return (
            f"<labels: {len(found.traces)} traces, {len(found.counts)} labelled prefixes, "
            f"{len(found.completions)} completions; policies {', '.join(found.policies)}>"
        )

    def _steps(self, trace: Trace, count: int) -> list[str]:
        """Texts of the first ``count`` steps of a solution, without what ends them."""
        ends = [0, *trace.step_ends[:count]]
        return [self.text(trace.ids[a:b]).removesuffix(self.delimiter) for a, b in pairwise(ends)]


def _dataset(rows: list[dict[str, Any]], schema: pa.Schema) -> Dataset:
    from datasets import Dataset, Features

    return Dataset.from_list(rows, features=Features.from_arrow_schema(schema))


def read_labels(directory: str | Path | Sequence[str | Path]) -> Labels:
    """Read a label run that data_gen.rollouts made, or is making.

    Example:
        >>> import pav
        >>> labels = pav.read_labels("runs/labels")
        >>> labels.prefixes.to_pandas().groupby("step").q.mean()

    Args:
        directory: the run's directory, or a list of such whose labels are taken together. What is
            still in the journal of an unfinished run is read, too.

    Returns:
        Its tables: ``traces``, ``prefixes`` and ``completions``.

    Raises:
        UserError: if there are no labels, they are damaged, runs disagree on task, tokenizer,
            sampler or policy, or the policy whose tokenizer they are in is gone or another one.
    """
    named = [directory] if isinstance(directory, (str, Path)) else directory
    found = tables.read_labels([str(d) for d in named])
    model = found.manifest["policy"]["model"]
    tokenizer = load_tokenizer(model_path(model))
    if tokenizer_fingerprint(tokenizer) != found.manifest["tokenizer"]:
        raise UserError(
            f"labels {str(named[0])!r} were made with another tokenizer than {model!r} has now; "
            "put the old one back"
        )
    rule = found.manifest["task_spec"]["init_args"]["step_rule"]

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    return Labels(found, text, str(rule["delimiter"]))
