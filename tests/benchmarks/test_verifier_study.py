"""The verifier study: subsets of a pool are what a smaller label run would have been."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import betabinom

from benchmarks.verifier.figures import figures_of, resampled, weights
from benchmarks.verifier.fitting import values_of
from benchmarks.verifier.heads import beta_binomial
from benchmarks.verifier.pool import Part, encode, shifted, subset
from benchmarks.verifier.rows import DEFAULT, rows
from benchmarks.verifier.setting import HEADS, Study
from pav.evaluate.metrics import auc as plain_auc
from pav.evaluate.report import first_half
from pav.evaluate.scored_labels import MODES
from pav.labels.tables import read_labels
from pav.policy.policy import PolicyConfig, load_policy, model_path
from tests.pav.label_runs import TASK, write_labels


def test_a_row_of_the_study_learns_from_its_part_of_the_pool(tmp_path: Path) -> None:
    labels = read_labels([write_labels(tmp_path / "labels", Path(model_path("pav:base")))])
    policy = load_policy(PolicyConfig(), TASK.step_rule)
    study = Study(labels, {"validation": labels}, policy, TASK, tmp_path)

    half, tokens = subset(labels, Part(2, 0, n_mc=1))
    assert {t.seed_index for t in half.traces} == {0, 1}
    assert {n for _, n in half.counts.values()} == {1}
    assert {c.index for c in half.completions} == {0}
    assert tokens == sum(len(x.ids) for x in (*half.traces, *half.completions))

    # States are those of the solution that is asked for, and one token later where that is meant.
    examples = study.examples(half, "train")
    found = encode("pav:base", 2, 1, examples, policy)
    again = encode("pav:base", 2, 0, shifted(examples[:3], 1), policy)
    torch.testing.assert_close(
        found.hidden_ND[torch.as_tensor(found.rows(examples[:3]))], again.hidden_ND
    )

    row = replace(DEFAULT, trunk="pav:base", part=Part(4, 0, n_mc=2))
    values = values_of(study, row, [0])
    judged = study.judged["validation"]
    # Also where the trunk's states are there already.
    again_SHMN = values_of(study, row, [0])["validation"]
    np.testing.assert_array_equal(again_SHMN, values["validation"])
    assert values["validation"].shape == (1, len(HEADS), len(MODES), len(judged.keys_N))
    held = ~np.array([first_half(e.problem_id) for e in judged.examples])[judged.scored.example_N]
    figures = figures_of(judged, held)
    for head in ("q/base", "q/prover"):
        auc = figures[f"AUC {head}"]
        q = values["validation"][0, HEADS.index(head), 0]
        assert auc.of(q, np.ones(len(auc.rows))) > 0.8
        assert auc.of(-q, np.ones(len(auc.rows))) < 0.2
    owner = judged.scored.example_N
    # A resample by weights is one by copies.
    counts = judged.counts[auc.head]
    for w, draw in zip(weights(owner, auc.rows), resampled(owner, auc.rows), strict=True):
        assert w.sum() > 0 and np.isin(draw, auc.rows).all()
        copies = np.repeat(auc.rows, w.astype(int))
        high = counts.share_N[copies] >= 0.5
        assert auc.of(q, w) == pytest.approx(plain_auc(q[copies], high), abs=1e-5)
    # A head and a loss of the study's own learn as well.
    for other in (replace(row, head="mlp"), replace(row, loss="beta_binomial")):
        q = values_of(study, other, [0])["validation"][0, HEADS.index(auc.head), 0]
        assert auc.of(q, np.ones(len(auc.rows))) > 0.8
    assert len({row.key for row in rows()}) == len(rows())
    assert all(
        row.like is None or row.like in {(r.group, r.name) for r in rows()} for row in rows()
    )


counts = st.integers(1, 20).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(st.floats(-5, 5), counts, st.floats(-1, 5), st.integers(1, 9))
def test_beta_binomial_is_scipys_however_many_traces_share_a_prefix(
    logit: float, counts: tuple[int, int], spread: float, traces: int
) -> None:
    k, n = counts
    mean, size = 1 / (1 + math.exp(-logit)), math.exp(spread)
    expected = -betabinom.logpmf(k, n, mean * size, (1 - mean) * size) + math.log(math.comb(n, k))
    share = 1 / traces
    cells = [torch.full((1, 1), v) for v in (logit, k * share, n * share, share, n * share)]
    loss = traces * beta_binomial(*cells, torch.tensor([spread])).item()
    assert loss == pytest.approx(expected, rel=1e-3, abs=2e-3)
