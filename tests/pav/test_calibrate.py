"""Calibrators recover planted relations; surprise is what one computes by hand."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pav.core.steps import Stepper, StepRule, compile_rule
from pav.tasks.tape import tape_tokenizer
from pav.verifier.calibrate import (
    SURPRISE,
    Calibrator,
    fit_calibrator,
    surprise,
    surprises,
)

TAPE = tape_tokenizer()
EOS = TAPE.eos_token_id


def stepper(**rule: int) -> Stepper:
    return compile_rule(StepRule(**rule), TAPE, [EOS])  # type: ignore[arg-type]


def encoded(text: str) -> list[int]:
    return list(TAPE.encode(text, add_special_tokens=False))


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def cross_entropy(q: np.ndarray, truth: np.ndarray) -> float:
    return float(-(truth * np.log(q) + (1 - truth) * np.log(1 - q)).mean())


def test_surprise_of_a_step_is_that_of_its_content_its_result_and_its_least_probable_token() -> (
    None
):
    ids = [*encoded("3+4=7\n=7\nA8"), EOS]
    logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32) / 10
    rows = surprise(logprobs, ids, [6, 9, 12], stepper())
    assert SURPRISE == ("step", "result", "token", "worst_step", "worst_result", "worst_token")
    np.testing.assert_allclose(
        rows,
        [
            [0, 0, 0, 0, 0, 0],
            # 3 + 4 = 7: tokens 1 to 5, the result is the fifth; the newline is not seen yet.
            [-(0.1 + 0.2 + 0.3 + 0.4 + 0.5), -0.5, -0.5, -1.5, -0.5, -0.5],
            # = 7: tokens 7 and 8.
            [-(0.7 + 0.8), -0.8, -0.8, -1.5, -0.8, -0.8],
            # A 8: no token opens a result, so the whole of it is.
            [-(1.0 + 1.1), -2.1, -1.1, -2.1, -2.1, -1.1],
        ],
        rtol=1e-6,
    )


def test_worst_step_so_far_stays_after_better_ones() -> None:
    ids = [*encoded("=1\n=2\n=3\nA4"), EOS]
    logprobs = np.zeros(len(ids), np.float32)
    logprobs[4] = -3.0
    rows = surprise(logprobs, ids, [3, 6, 9, 12], stepper())
    for feature in range(3):
        np.testing.assert_array_equal(rows[:, feature], [0, 0, -3, 0, 0])
        np.testing.assert_array_equal(rows[:, 3 + feature], [0, 0, -3, -3, -3])


def test_cut_step_is_scored_before_its_last_token_like_any_other() -> None:
    ids = [*encoded("37+8=45\nA4"), EOS]
    rule = stepper(max_tokens=5)
    ends = rule.step_ends(ids)
    assert ends == [5, 8, 11]
    logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32)
    rows = surprise(logprobs, ids, ends, rule)
    # "37+8" without "="; the token that was cut off is in no step's surprise.
    np.testing.assert_array_equal(rows[1], [-10, -10, -4, -10, -10, -4])
    # "45", then the newline is left out.
    np.testing.assert_array_equal(rows[2], [-13, -13, -7, -13, -13, -7])
    np.testing.assert_array_equal(rows[3], [-19, -19, -10, -19, -19, -10])


def test_step_of_eos_alone_brings_no_surprise_of_its_own() -> None:
    ids = [*encoded("=7\n"), EOS]
    rows = surprise(np.array([-1, -2, -4, -8], np.float32), ids, [3, 4], stepper())
    np.testing.assert_array_equal(rows[1], [-3, -2, -2, -3, -2, -2])
    np.testing.assert_array_equal(rows[2], [0, 0, 0, -3, -2, -2])


def test_impossible_tokens_are_floored_not_infinite() -> None:
    ids = [*encoded("=7\nA7"), EOS]
    logprobs = np.array([-np.inf, 0, 0, -100, 0, 0], np.float32)
    rows = surprise(logprobs, ids, [3, 6], stepper())
    assert np.isfinite(rows).all()
    np.testing.assert_array_equal(rows[1:, 0], [-25, -25])


def test_surprise_reads_nothing_after_the_scoring_position() -> None:
    ids = [*encoded("3+4=7\nA7"), EOS]
    logprobs = np.full(len(ids), -0.5, np.float32)
    whole = surprise(logprobs, ids, [6, 9], stepper())
    # A separate verifier has read no further than the token before the last one.
    np.testing.assert_array_equal(surprise(logprobs[:8], ids, [6, 9], stepper()), whole)
    np.testing.assert_array_equal(surprise(logprobs[:5], ids[:6], [6], stepper()), whole[:2])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from([*encoded("12+=\n\n"), EOS]), min_size=1, max_size=40),
    st.data(),
)
def test_surprise_of_a_prefix_is_a_prefix_of_the_surprise(
    ids: list[int], data: st.DataObject
) -> None:
    rule = stepper()
    ends = rule.step_ends(ids)
    logprobs = np.array([data.draw(st.floats(-30, 0, width=32)) for _ in ids], dtype=np.float32)
    rows = surprise(logprobs, ids, ends, rule)
    assert rows.shape == (len(ends) + 1, len(SURPRISE))
    assert (rows <= 0).all()
    assert (np.diff(rows[:, 3:], axis=0) <= 0).all()
    for j, end in enumerate(ends, 1):
        part = surprise(logprobs[: end - 1], ids[:end], ends[:j], rule)
        np.testing.assert_array_equal(part, rows[: j + 1])


@settings(max_examples=15, deadline=None)
@given(st.floats(0.2, 3.0), st.floats(-2.0, 2.0), st.integers(0, 2**32 - 1))
def test_temperature_and_bias_are_recovered(temperature: float, bias: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logit = rng.normal(size=20_000).astype(np.float32)
    n = rng.integers(1, 5, size=len(logit)).astype(np.float32)
    k = rng.binomial(n.astype(int), sigmoid(temperature * logit + bias)).astype(np.float32)
    found = fit_calibrator(logit, None, k, n)
    assert not found.reads_surprise
    assert abs(found.temperature - temperature) < 0.15
    assert abs(found.bias - bias) < 0.15


def planted(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    """Logits that miss rare slips, which surprise sees: (logit, features, k, n, true q)."""
    logit = rng.normal(size=rows).astype(np.float32)
    slipped = rng.random(rows) < 0.2
    step = np.where(slipped, rng.uniform(-9, -5, rows), rng.uniform(-3, 0, rows))
    worst = np.minimum(step, rng.uniform(-3, 0, rows))
    features = np.stack([step, step, step, worst, worst, worst], axis=1).astype(np.float32)
    q = np.where(slipped, 0.03, sigmoid(logit + 0.5))
    n = np.full(rows, 2.0, np.float32)
    return logit, features, rng.binomial(2, q).astype(np.float32), n, q


def test_surprise_recovers_what_the_head_does_not_see() -> None:
    rng = np.random.default_rng(0)
    logit, features, k, n, _ = planted(rng, 6000)
    held_logit, held_features, _, _, truth = planted(rng, 6000)
    plain = fit_calibrator(logit, None, k, n)
    full = fit_calibrator(logit, features, k, n)
    assert full.reads_surprise
    q_plain, q_full = plain(held_logit, None), full(held_logit, held_features)
    assert np.abs(q_full - truth).mean() < 0.03
    assert np.abs(q_plain - truth).mean() > 0.1
    best = cross_entropy(truth, truth)
    assert cross_entropy(q_full, truth) - best < 0.1 * (cross_entropy(q_plain, truth) - best)
    # Both are right on average, as maximum likelihood is.
    assert abs(q_full.mean() - truth.mean()) < 0.02
    assert abs(q_plain.mean() - truth.mean()) < 0.02


@pytest.mark.parametrize("rows", [200, 1000, 4000])
def test_surprise_that_says_nothing_does_no_harm_however_few_rows_there_are(rows: int) -> None:
    rng = np.random.default_rng(1)
    logit = rng.normal(size=rows + 5000).astype(np.float32)
    features = rng.uniform(-5, 0, size=(len(logit), len(SURPRISE))).astype(np.float32)
    truth = sigmoid(0.7 * logit - 0.5)
    n = np.ones(rows, np.float32)
    k = rng.binomial(1, truth[:rows]).astype(np.float32)
    fitted = fit_calibrator(logit[:rows], features[:rows], k, n)
    q, held = fitted(logit[rows:], features[rows:]), truth[rows:]
    constant = np.full_like(held, held.mean())
    assert cross_entropy(q, held) < cross_entropy(constant, held)


def test_rows_weigh_by_their_number_of_rollouts() -> None:
    rng = np.random.default_rng(2)
    logit = rng.normal(size=3000).astype(np.float32)
    n = np.full(3000, 3.0, np.float32)
    k = rng.binomial(3, sigmoid(2 * logit)).astype(np.float32)
    # Each rollout as a row of its own says the same.
    apart = fit_calibrator(
        np.repeat(logit, 3), None,
        np.concatenate([[1.0] * int(r) + [0.0] * (3 - int(r)) for r in k]), np.ones(9000),
    )  # fmt: skip
    together = fit_calibrator(logit, None, k, n)
    assert apart.temperature == pytest.approx(together.temperature, abs=1e-3)
    assert apart.bias == pytest.approx(together.bias, abs=1e-3)


def test_constant_features_and_one_sided_labels_fit_without_trouble() -> None:
    logit = np.linspace(-1, 1, 50, dtype=np.float32)
    features = np.zeros((50, len(SURPRISE)), np.float32)
    n = np.ones(50, np.float32)
    for k in (np.zeros(50, np.float32), np.ones(50, np.float32)):
        for read in (None, features):
            q = fit_calibrator(logit, read, k, n)(logit, read)
            assert np.isfinite(q).all()
            assert np.abs(q - k).max() < 0.1


def test_fit_is_the_same_every_time() -> None:
    logit, features, k, n, _ = planted(np.random.default_rng(3), 500)
    assert fit_calibrator(logit, features, k, n) == fit_calibrator(logit, features, k, n)


@given(st.booleans(), st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_calibrator_survives_its_plain_form(with_surprise: bool, seed: int) -> None:
    logit, features, k, n, _ = planted(np.random.default_rng(seed), 300)
    read = features if with_surprise else None
    fitted = fit_calibrator(logit, read, k, n)
    again = Calibrator.from_plain(json.loads(json.dumps(asdict(fitted))))
    assert again == fitted
    np.testing.assert_array_equal(again(logit, read), fitted(logit, read))
    # One row at a time, as search asks.
    one = again(logit[0], None if read is None else read[0])
    assert float(one) == pytest.approx(float(fitted(logit, read)[0]), abs=1e-12)


def test_calibrator_with_surprise_refuses_to_guess_it() -> None:
    logit, features, k, n, _ = planted(np.random.default_rng(4), 300)
    with pytest.raises(ValueError, match="reads surprise, but none was given"):
        fit_calibrator(logit, features, k, n)(logit, None)


def one_by_one(logprobs: np.ndarray, ids: list[int], ends: list[int], rule: Stepper) -> np.ndarray:
    """Surprise by its definition, step by step."""
    rows = np.zeros((len(ends) + 1, len(SURPRISE)), dtype=np.float32)
    start = 0
    for row, end in enumerate(ends, 1):
        content = logprobs[start : end - 1]
        result = rule.result_start(ids[start : end - 1])
        own = (content.sum(), content[result:].sum(), content.min(initial=0.0))
        rows[row, :3] = np.maximum(own, -25)
        rows[row, 3:] = np.minimum(rows[row, :3], rows[row - 1, 3:])
        start = end
    return rows


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_surprise_of_many_solutions_is_that_of_each_by_its_definition(data: st.DataObject) -> None:
    rule = stepper()
    token = st.sampled_from(encoded("12=+\n") + [EOS])
    solutions = data.draw(st.lists(st.lists(token, max_size=14), min_size=1, max_size=5))
    ends = [rule.step_ends(ids) for ids in solutions]
    seed = data.draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    logprobs = [(-12 * rng.random(len(ids))).astype(np.float32) for ids in solutions]
    found = surprises(logprobs, solutions, ends, rule)
    parts = zip(logprobs, solutions, ends, strict=True)
    expected = np.concatenate([one_by_one(*part, rule) for part in parts])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
