"""What a step is worth to a search: Q, A or Q + alpha * A, under one prover or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal, Protocol

from pav.core.advantage import Real, best_of_k, effective_score
from pav.core.errors import UserError
from pav.core.heads import ORM

Values = dict[str, float]
# ``q``: Q of the base policy alone; ``a``: the prover's advantage alone; ``q+a``: Q + alpha * A.
Score = Literal["q+a", "q", "a"]
# Rules of the final pick (:mod:`pav.verifier.pick`).
Pick = Literal["last", "min", "pav", "orm", "vote", "orm_vote", "majority"]


class ScorerMeta(Protocol):
    """What a scorer says of itself: a verifier's card, or a third-party reward model."""

    @property
    def heads(self) -> list[str]:
        """What it gives values for."""

    @property
    def base_head(self) -> str:
        """Head of Q_base."""

    @property
    def prover_head(self) -> str:
        """Prover where none is named."""

    @property
    def alpha(self) -> float:
        """Weight of the advantage where none is given."""

    @property
    def pick(self) -> Pick:
        """Final pick where none is named."""


@lru_cache
def provers(text: str) -> tuple[tuple[str, float], ...]:
    """(prover, weight) of ``q/a`` (weight 1), ``bo4`` or ``q/a:0.5,bo4:0.5``."""
    found = []
    for part in text.split(","):
        name, colon, weight = part.strip().rpartition(":")
        try:
            found.append((name, float(weight)) if colon else (weight, 1.0))
        except ValueError:
            found.append((part.strip(), 1.0))
    return tuple(found)


def best_of(prover: str) -> int | None:
    """K of ``bo<K>``; None for a head."""
    digits = prover.removeprefix("bo")
    return int(digits) if digits != prover and digits.isdigit() else None


def check_prover(text: str, heads: Sequence[str]) -> None:
    """Refuse a prover that cannot be computed from ``heads``.

    Raises:
        UserError: if a part is neither a head nor ``bo<K>``, or a weight is not positive.
    """
    for name, weight in provers(text):
        if name not in heads and not best_of(name):
            raise UserError(
                f"prover is {text!r}; give bo<K> (e.g. bo4), one of the verifier's heads ("
                f"{', '.join(h for h in heads if h != ORM)}), or a weighted mean such as "
                "q/a:0.5,q/b:0.5"
            )
        if not 0 < weight < float("inf"):
            raise UserError(f"prover {text!r} gives {name} the weight {weight}; give one above 0")


def prover_q(text: str, base_head: str, values: Mapping[str, Real]) -> Real:
    """Q of a prover (Best-of-K in closed form), or the weighted mean of several provers' Q.

    Args:
        text: a head, ``bo<K>``, or a weighted mean of such.
        base_head: head that ``bo<K>`` is made of.
        values: Q by head, of one state or of many.
    """

    def one(name: str) -> Real:
        k = best_of(name)
        return values[name] if k is None else best_of_k(values[base_head], k)

    (first, weight), *others = provers(text)
    total = one(first) * weight
    for name, w in others:
        total = total + one(name) * w
    return total / sum(w for _, w in provers(text))


def step_score(
    before: Values, after: Values, base_head: str, prover: str, alpha: float, score: Score
) -> float:
    """Score of the step between two states (paper, Section 4)."""
    if score == "q":
        return after[base_head]
    q_before, q_after = prover_q(prover, base_head, before), prover_q(prover, base_head, after)
    if score == "a":
        return q_after - q_before
    return effective_score(after[base_head], q_before, q_after, alpha)
