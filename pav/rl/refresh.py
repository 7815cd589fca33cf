"""Refreshed labels: the base head learns Q of the policy as it has become.

The paper keeps its verifier fixed while the policy moves, and names that as a limit (Section 7).
Here rollouts of the current policy from prefixes of its own traces are new labels of the head of
the base policy, and with it of every Best-of-K prover made of it. The trunk stays as it is.

Axes: N scored prefixes, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pav.engine.loop import drive
from pav.labels.examples import Example, unlabelled
from pav.rl.rollout import Actor
from pav.rl.trace import Trace
from pav.verifier.calibrate import fit_calibrator
from pav.verifier.forward import Scored, score
from pav.verifier.library import LoadedVerifier

# Pull of the row towards what it was, in rows of labels, as in the calibrators' fit.
_PRIOR = 3.0


@dataclass(frozen=True)
class Refreshed:
    """The base head as it was fitted last.

    Attributes:
        version: of the policy whose Q it is.
        weight_D: its row.
        bias: its bias.
        plain: its calibrator.
        surprised: its calibrator with surprise.
        staleness: mean of (Q before - right rollouts / rollouts): what was wrong with the one
            before.
        brier: mean squared difference of the same.
    """

    version: int
    weight_D: Tensor
    bias: float
    plain: dict[str, Any]
    surprised: dict[str, Any]
    staleness: float
    brier: float


def refresh(
    actor: Actor, verifier: LoadedVerifier, traces: Sequence[Trace], rollouts: int, version: int
) -> Refreshed:
    """Label every prefix of ``traces`` and fit the base head on it.

    The row is fitted on one half of the traces, its calibrators on the other.

    Args:
        actor: samples from the policy of ``version``.
        verifier: as it is.
        traces: of that policy.
        rollouts: from every prefix; the end of a whole trace is known.
        version: names the seeds.
    """
    examples = label(actor, verifier, traces, rollouts, version)
    card = verifier.checkpoint.card
    h = card.heads.index(card.base_head)
    scored = score(verifier.model, examples, verifier.trunk, "refreshing", quiet=True)
    k_N, n_N = scored.k_NH[:, 0], scored.n_NH[:, 0]
    logit_N = scored.logits_NH[:, h]
    before = card.calibrator(card.base_head, verifier.surprise)(
        logit_N, scored.surprise_NF if verifier.surprise else None
    )
    wrong_N = before - k_N / n_N
    half_N = scored.example_N % 2 == 0
    row = verifier.model.head.weight.detach()[h].float().cpu()
    bias = float(verifier.model.head.bias.detach()[h])
    weight_D, moved = fit_row(scored, logit_N, half_N, row)
    after_N = logit_N + (scored.hidden_ND @ (weight_D - row)).numpy() + moved
    seen, other = scored.surprise_NF[~half_N], ~half_N
    plain = fit_calibrator(after_N[other], None, k_N[other], n_N[other])
    surprised = fit_calibrator(after_N[other], seen, k_N[other], n_N[other])
    return Refreshed(
        version, weight_D, bias + moved, asdict(plain), asdict(surprised),
        float(wrong_N.mean()), float((wrong_N**2).mean()),
    )  # fmt: skip


def label(
    actor: Actor, verifier: LoadedVerifier, traces: Sequence[Trace], rollouts: int, version: int
) -> list[Example]:
    """Examples with counts of right rollouts at step 0 and after every step."""
    counts = [np.zeros((2, len(t.ends) + 1), dtype=np.float32) for t in traces]

    def add(found: tuple[int, int, bool]) -> None:
        trace, state, correct = found
        counts[trace][:, state] += (correct, 1)

    async def one(trace: int, state: int, index: int) -> tuple[int, int, bool]:
        given = traces[trace]
        prefix = given.ids[: [0, *given.ends][state]]
        key = ("refresh", version, trace, state)
        done = await actor.trace(given.problem, index, key, version, prefix=prefix)
        return trace, state, done.correct

    jobs = []
    for number, trace in enumerate(traces):
        states = len(trace.ends) + 1
        if not trace.truncated:
            states -= 1
            add((number, states, trace.correct))
        jobs += [
            (lambda n=number, s=state, i=i: one(n, s, i))
            for state in range(states)
            for i in range(rollouts)
        ]
    drive([actor.engine], jobs, add, max(1, len(jobs)))
    return [
        replace(
            unlabelled(verifier.trunk, t.problem, t.ids, t.ends),
            k_PH=right_total[0][:, None], n_PH=right_total[1][:, None],
        )
        for t, right_total in zip(traces, counts, strict=True)
    ]  # fmt: skip


def fit_row(
    scored: Scored, logit_N: NDArray[np.float32], rows_N: NDArray[np.bool_], row: Tensor
) -> tuple[Tensor, float]:
    """(row, change of the bias) that fits counts best, near the row that was."""
    hidden = scored.hidden_ND[torch.as_tensor(rows_N)].double()
    mean, scale = hidden.mean(0), hidden.std(0) + 1e-6
    z_ND = (hidden - mean) / scale
    start = torch.as_tensor(logit_N[rows_N], dtype=torch.float64)
    n_N = torch.as_tensor(scored.n_NH[rows_N, 0], dtype=torch.float64)
    target = torch.as_tensor(scored.k_NH[rows_N, 0], dtype=torch.float64) / n_N
    change = torch.zeros(z_ND.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([change], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logit = start + z_ND @ change[:-1] + change[-1]
        weight = n_N / n_N.sum()
        loss = binary_cross_entropy_with_logits(logit, target, weight, reduction="sum")
        loss = loss + _PRIOR / len(n_N) * change[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    moved = (change[:-1] / scale).detach()
    return row + moved.float(), float(change[-1].detach() - moved @ mean)


def refreshed(verifier: LoadedVerifier, found: Refreshed) -> LoadedVerifier:
    """The verifier with this base head; it takes over the trunk of the one that was given."""
    card = verifier.checkpoint.card
    h, head = card.heads.index(card.base_head), card.base_head
    weight, bias = verifier.checkpoint.weight.clone(), verifier.checkpoint.bias.clone()
    weight[h], bias[h] = found.weight_D, found.bias
    card = replace(
        card,
        calibrators={**card.calibrators, head: found.plain},
        surprise_calibrators={**card.surprise_calibrators, head: found.surprised},
    )
    checkpoint = replace(verifier.checkpoint, card=card, weight=weight, bias=bias)
    made = replace(verifier, checkpoint=checkpoint)
    # The trunk is in memory already.
    vars(made)["model"] = verifier.model
    with torch.no_grad():
        made.model.head.weight[h].copy_(found.weight_D)
        made.model.head.bias[h].fill_(found.bias)
    return made
