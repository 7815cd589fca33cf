"""Heads ``lik/<policy>``: learned from likelihoods beside the counts, and searched with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_gen.likelihood.command import LIKELIHOOD
from pav.core.errors import UserError
from pav.engine.loading import EngineConfig
from pav.evaluate.scored_labels import MODES
from pav.labels.examples import pav_examples
from pav.labels.tables import LIKELIHOODS, prefix_key, read_labels
from pav.policy.policy import PolicyConfig, Sampler, load_policy
from pav.train.command import train
from pav.train.config import TrainConfig
from search.beam import BeamConfig, beam
from search.run.records import read
from tests.pav.label_runs import TASK, promising, write_labels

HIGH, LOW = 0.8, 0.05


def add_likelihoods(directory: str, name: str = "base", fingerprint: str = "f") -> None:
    """What data_gen.likelihood writes: here the answer is likely after digits below 5."""
    rows = {}
    for trace in read_labels([directory]).traces:
        for end in (0, *trace.step_ends[:-1]):
            ids = trace.ids[:end]
            key = prefix_key(trace.problem_id, ids)
            rows[key] = {
                "prefix_key": key, "problem_id": trace.problem_id, "policy": name,
                "policy_fingerprint": fingerprint, "answer": "A1", "answer_tokens": 3,
                "logprob": log(HIGH if promising(ids, 5) else LOW),
            }  # fmt: skip
    folder = Path(directory) / LIKELIHOODS
    folder.mkdir()
    pq.write_table(
        pa.Table.from_pylist(list(rows.values()), schema=LIKELIHOOD), folder / "part-00000.parquet"
    )


def test_likelihood_head_learns_its_table_and_serves_as_prover(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    trunk = tiny_model("llama")
    labels = write_labels(tmp_path / "labels", trunk)
    policy = load_policy(PolicyConfig(str(trunk), "base"), TASK.step_rule)
    heads = ["q/base", "q/prover", "lik/base", "orm"]
    before = pav_examples(read_labels([labels]), "train", heads, policy, 64)
    add_likelihoods(labels)

    # Counts are what they were; the likelihoods have a column of their own, the outcome included.
    after = pav_examples(read_labels([labels]), "train", heads, policy, 64)
    for was, now in zip(before, after, strict=True):
        counts = [0, 1, 3]
        assert np.array_equal(was.k_PH[:, counts], now.k_PH[:, counts])
        assert np.array_equal(was.n_PH[:, counts], now.n_PH[:, counts])
        assert not was.n_PH[:-1, 2].any()
        np.testing.assert_allclose(now.n_PH[:, 2], now.share_P1[:, 0])
        told = now.k_PH[:-1, 2] / now.n_PH[:-1, 2]
        assert np.isclose(told[:, None], [HIGH, LOW]).any(1).all()
        assert now.k_PH[-1, 2] / now.n_PH[-1, 2] in (0, 1)

    output = tmp_path / "pav.ckpt"
    card = train(TrainConfig([labels], str(output), trunk=str(trunk), max_epochs=12))
    assert card is not None and card.heads == heads
    assert (card.base_head, card.prover_head) == ("q/base", "q/prover")
    for mode in MODES:
        found = card.validation[f"lik/base/{mode}"]
        assert found["correlation"] > 0.6
        assert abs(found["mean_q"] - found["mean_right"]) < 0.1
        assert card.validation["advantage"][f"lik/base/{mode}"]["correlation"] > 0.4
    # A likelihood has no noise that a ceiling would have to allow for.
    assert card.validation["lik/base/ceiling"]["correlation"] == pytest.approx(1)
    assert "gives the reference answer" in (output.with_suffix(".export") / "README.md").read_text()

    run = BeamConfig(
        str(output), n=2, problems=2, prover="lik/base", alpha=1.0, output=str(tmp_path / "run"),
        sampler=Sampler(max_length=250),  # a random model hardly ever ends a solution
        engine=EngineConfig(kv_gib=0.02, max_num_seqs=64),
    )  # fmt: skip
    beam(run)
    records = read(tmp_path / "run" / "beam.jsonl")
    assert len(records) == 2
    for record in records:
        assert record.error is None
        assert record.settings["prover"] == "lik/base"
        assert all("lik/base" in c.q for c in record.candidates)
    scores = [score for r in records for children in r.steps for _, _, score, _ in children]
    assert scores and all(-1 <= score <= 2 for score in scores)


def test_likelihoods_alone_make_a_verifier_where_nothing_can_be_graded(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    trunk = tiny_model("llama")
    labels = write_labels(tmp_path / "labels", trunk, policies=())
    config = TrainConfig([labels], str(tmp_path / "pav.ckpt"), trunk=str(trunk), max_epochs=12)
    with pytest.raises(UserError, match="no rollouts under the base policy 'base', and no lik"):
        train(config)
    add_likelihoods(labels)
    with pytest.raises(
        UserError, match=r"loss is 'hard', which is about counts.*--loss bce or mse"
    ):
        train(replace(config, loss="hard"))
    # As a task without a grader leaves them.
    path = next((Path(labels) / "traces").glob("*.parquet"))
    rows = pq.read_table(path)
    ungraded = [r | {"answer": None, "correct": False} for r in rows.to_pylist()]
    pq.write_table(pa.Table.from_pylist(ungraded, schema=rows.schema), path)
    card = train(config)
    assert card is not None and card.heads == ["lik/base"]
    assert (card.base_head, card.prover_head, card.pick) == ("lik/base", "lik/base", "last")
    assert card.validation["lik/base/plain"]["correlation"] > 0.6

    other = write_labels(tmp_path / "other", trunk, policies=())
    add_likelihoods(other, fingerprint="g")
    with pytest.raises(UserError, match=r"likelihoods of two policies called 'base'"):
        read_labels([labels, other])
    assert json.loads((tmp_path / "pav.json").read_text())["lik/base/plain"]["rows"] > 0
