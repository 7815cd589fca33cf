"""Forward FLOPs of a search."""

from __future__ import annotations

import math

from pav.policy.cost import Shape, forward_flops, rows_flops
from search.run.records import Record


def record_flops(
    record: Record, policy: Shape, trunk: Shape | None, rows: int
) -> tuple[float, float]:
    """Forward FLOPs of (policy, verifier) in one search.

    NaN where the record is of a version that did not count what they depend on.

    Args:
        record: the search.
        policy: the model that sampled.
        trunk: the verifier's; None where there is no verifier.
        rows: score rows of the verifier's heads. Fused, they are all that it costs.
    """
    unknown = record.policy_tokens > 0 and record.policy_prefilled == 0
    # The last token of a request is sampled, not computed; its logits come from the one before.
    computed = record.policy_prefilled + record.policy_tokens - record.policy_requests
    mine = forward_flops(policy, computed, record.policy_context, record.policy_tokens)
    if trunk is None:
        its = 0.0
    elif record.settings.get("scoring") == "fused":
        its = rows_flops(policy, rows, record.policy_tokens)
    else:
        unknown |= record.verifier_tokens > 0 and record.verifier_logits == 0
        logits = record.verifier_logits
        its = forward_flops(trunk, record.verifier_tokens, record.verifier_context, logits)
        its += rows_flops(trunk, rows, logits)
    return (math.nan, math.nan) if unknown else (mine, its)
