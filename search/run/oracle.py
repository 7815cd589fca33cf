"""Oracle pass@N: the chance that N samples hold a right answer, the upper line of every ranker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pav.core.advantage import best_of_k_from_counts
from search.run.records import Record


def pass_at(records: Sequence[Record], n: int) -> NDArray[np.float64]:
    """(problems,) unbiased estimates from at least ``n`` independent samples of each problem.

    A failed search counts as wrong.

    Raises:
        UserError: if a problem has fewer samples.
    """
    found = np.zeros(len(records))
    for i, record in enumerate(records):
        if record.error is None:
            right = sum(c.correct for c in record.candidates)
            found[i] = best_of_k_from_counts(right, len(record.candidates), n)
    return found


def by_oracle(record: Record) -> Record:
    """The record as if the final pick knew the answer."""
    return replace(record, correct=any(c.correct for c in record.candidates))
