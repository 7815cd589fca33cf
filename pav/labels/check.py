"""Do labels fit the model that is to read them?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from pav.core.errors import UserError
from pav.labels.tables import Completion, Trace


def check_ids(
    traces: Iterable[Trace], completions: Iterable[Completion], vocabulary: int, labels: str
) -> None:
    """Refuse token ids that a model's embedding has no row for, and steps outside their solution.

    Args:
        traces: solutions.
        completions: rollouts.
        vocabulary: rows of the embedding.
        labels: where they lie, for the error.

    Raises:
        UserError: naming the solution and the id.
    """

    def check(what: str, ids: Sequence[int]) -> None:
        wrong = [i for i in (min(ids, default=0), max(ids, default=0)) if not 0 <= i < vocabulary]
        if wrong:
            raise UserError(
                f"labels {labels} hold the token {wrong[0]} in {what}, but the model knows "
                f"{vocabulary} tokens; they are damaged or another model's: restore them"
            )

    for completion in completions:
        what = f"a rollout by {completion.policy} of {completion.problem_id}"
        check(what, completion.prefix_ids)
        check(what, completion.ids)
    for t in traces:
        check(f"solution {t.trace_id}", t.ids)
        if any(not a < b for a, b in pairwise([0, *t.step_ends, len(t.ids) + 1])):
            raise UserError(
                f"labels {labels} end the steps of solution {t.trace_id}, {len(t.ids)} tokens, at "
                f"{t.step_ends}; they are damaged: restore them"
            )
