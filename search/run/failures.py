"""What went wrong in a run of searches, said loudly: problems that raised, candidates cut short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pav.core.errors import UserError
from search.run.records import Record

# Above the second the results say more about the cap than about the search.
TRUNCATION_WARNING, TRUNCATION_ERROR = 0.05, 0.2
# Above this share of failed problems, or of answers that could not be graded, neither do they.
FAILURE_ERROR = 0.05
NAMED = 3
# Tracebacks of all that failed, beside the records.
ERRORS = "errors.log"


def troubles(records: Sequence[Record], path: Path, max_length: int) -> list[str]:
    """Warnings about the finished run whose records are in ``path``.

    Raises:
        UserError: if every problem failed.
    """
    said, log = [], path.parent / ERRORS
    failed = [r for r in records if r.error is not None]
    if failed:
        named = "; ".join(f"{r.problem_id}: {r.error}" for r in failed[:NAMED])
        more = "; ..." if len(failed) > NAMED else ""
        summary = f"{len(failed)} of {len(records)} problems failed ({named}{more})"
        if len(failed) == len(records):
            raise UserError(f"{summary}; mend the cause and start the same command again")
        said.append(
            f"{summary}. They count as wrong; {str(path)!r} holds each error, {log} tracebacks; "
            "the same command tries them again"
        )
    ungraded = [r for r in records if r.ungraded]
    if ungraded:
        named = ", ".join(r.problem_id for r in ungraded[:NAMED])
        more = ", ..." if len(ungraded) > NAMED else ""
        said.append(
            f"the grader failed for {sum(r.ungraded for r in ungraded)} answers to "
            f"{len(ungraded)} of {len(records)} problems ({named}{more}), which count as wrong; "
            f"tracebacks: {log}; mend it and give the same command again"
        )
    share = truncated_share(records)
    if share > TRUNCATION_WARNING:
        said.append(
            f"{share:.1%} of what was sampled hit sampler.max_length ({max_length}) and counts as "
            "wrong; raise it"
        )
    return said


def check_truncation(shares: Mapping[str, float], max_length: int) -> None:
    """Refuse results that say more about the cap; to be called when they are written and shown.

    Args:
        shares: search -> share of what it sampled that was cut.
        max_length: the cap.

    Raises:
        UserError: if a share is above :data:`TRUNCATION_ERROR`.
    """
    over = {what: share for what, share in shares.items() if share > TRUNCATION_ERROR}
    if not over:
        return
    worst = max(over, key=lambda what: over[what])
    others = f" (and more than {TRUNCATION_ERROR:.0%} in {len(over) - 1} more)" * (len(over) > 1)
    raise UserError(
        f"{worst}: {over[worst]:.1%} of what was sampled hit sampler.max_length ({max_length}) and "
        f"counts as wrong{others}; above {TRUNCATION_ERROR:.0%} results say more about the cap "
        "than about the search. They are written all the same; raise sampler.max_length and choose "
        "another output"
    )


def failed_shares(records: Sequence[Record]) -> dict[str, float]:
    """Shares of the problems that failed, and of the answers that could not be graded."""
    answers = sum(len(r.candidates) for r in records)
    return {
        "problems failed": sum(r.error is not None for r in records) / len(records),
        "answers could not be graded": sum(r.ungraded for r in records) / max(1, answers),
    }


def check_failures(shares: Mapping[str, Mapping[str, float]]) -> None:
    """Refuse results that failures decided; to be called when they are written and shown.

    Args:
        shares: search -> what failed -> share of it.

    Raises:
        UserError: if a share is above :data:`FAILURE_ERROR`.
    """
    for search, parts in shares.items():
        for what, share in parts.items():
            if share > FAILURE_ERROR:
                raise UserError(
                    f"{search}: {share:.1%} of the {what} and count as wrong; above "
                    f"{FAILURE_ERROR:.0%} that decides results. They are written all the same; "
                    f"mend the cause ({ERRORS} beside the records) and give the same command again"
                )


def truncated_share(records: Sequence[Record]) -> float:
    """Share of the drawn steps (of the solutions, in best-of-N) that were cut by the length cap."""
    truncated = sum(r.truncated for r in records)
    drawn = truncated + sum(
        r.merged + sum(map(len, r.steps)) if r.steps else sum(c.finished for c in r.candidates)
        for r in records
    )
    return truncated / drawn if drawn else 0.0
