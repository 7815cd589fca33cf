"""Metrics are their formulas; ceilings are what a predictor that knows Q would really reach."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from torchmetrics.functional.classification import binary_calibration_error

from data_gen.store import Store
from pav.core.errors import UserError
from pav.evaluate.ceilings import advantage_ceilings, ceilings, deconvolve, irreducible_brier
from pav.evaluate.command import EvaluateConfig, evaluate, load_on_device, trunk_policy
from pav.evaluate.first_error import first_error_metrics, first_error_threshold, halves_agree
from pav.evaluate.metrics import NAMES, Counts, advantage_metrics, auc, value_metrics
from pav.evaluate.report import verdict
from pav.evaluate.scored_labels import score_labels
from pav.evaluate.suite import measure
from pav.labels.examples import pav_examples
from pav.labels.tables import Completion, Trace, prefix_key, read_labels
from pav.policy.policy import PolicyConfig, Sampler, load_policy, tokenizer_fingerprint
from pav.tasks.base import task_spec
from pav.tasks.tape import Tape, parse
from pav.tasks.tape import apply as press
from pav.verifier.checkpoint import load_verifier
from pav.verifier.forward import score


def counts_of(k: Any, n: Any, exact: Any = False) -> Counts:
    k_N = np.asarray(k, dtype=float)
    return Counts(
        k_N, np.broadcast_to(np.asarray(n, dtype=float), k_N.shape).copy(),
        np.broadcast_to(np.asarray(exact, dtype=bool), k_N.shape).copy(),
    )  # fmt: skip


@st.composite
def scores(draw: st.DrawFn) -> tuple[np.ndarray, Counts]:
    """Predicted Qs of a few prefixes, with ties and both ends, and their counts."""
    size = draw(st.integers(2, 30))
    q = draw(
        st.lists(
            st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1),
            min_size=size,
            max_size=size,
        )
    )
    n = draw(st.lists(st.integers(1, 5), min_size=size, max_size=size))
    k = [draw(st.integers(0, most)) for most in n]
    return np.array(q, dtype=float), counts_of(k, n)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=60)
@given(scores())
def test_metrics_are_their_formulas_rollout_by_rollout(drawn: tuple[np.ndarray, Counts]) -> None:
    q, counts = drawn
    found = value_metrics(q, counts)
    each = [
        (value, 1.0 if i < k else 0.0)
        for value, k, n in zip(q, counts.k_N, counts.n_N, strict=True)
        for i in range(int(n))
    ]
    y = np.array([o for _, o in each])
    assert found["mean_right"] == pytest.approx(y.mean())
    assert found["mean_q"] == pytest.approx(np.mean([v for v, _ in each]))
    assert found["brier"] == pytest.approx(np.mean([(v - o) ** 2 for v, o in each]))
    assert found["brier_constant"] == pytest.approx(y.var())
    by_bin: dict[int, list[tuple[float, float]]] = {}
    for value, outcome in each:
        by_bin.setdefault(max(0, int(np.ceil(value * 10)) - 1), []).append((value, outcome))
    gaps = [
        (len(b) / len(each), abs(np.mean([v for v, _ in b]) - np.mean([o for _, o in b])))
        for b in by_bin.values()
    ]
    assert found["reliability"] == pytest.approx(sum(w * g**2 for w, g in gaps), abs=1e-9)
    assert found["brier"] == pytest.approx(
        found["reliability"] - found["resolution"] + found["brier_constant"]
    )
    share = counts.share_N
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a, high in zip(q, share >= 0.5, strict=True) if high
        for b, other in zip(q, share >= 0.5, strict=True) if not other
    ]  # fmt: skip
    assert found["auc"] == pytest.approx(np.mean(pairs) if pairs else np.nan, nan_ok=True, abs=1e-6)
    if np.ptp(q) > 1e-3 and np.ptp(share) > 0:
        assert found["correlation"] == pytest.approx(np.corrcoef(q, share)[0, 1], abs=1e-4)
        ranks = np.corrcoef(rankdata(q), rankdata(share))[0, 1]
        assert found["spearman"] == pytest.approx(ranks, abs=1e-4)


def test_calibration_error_is_that_of_the_bins() -> None:
    rng = np.random.default_rng(0)
    q = rng.random(2000)
    counts = counts_of(rng.binomial(3, q**2), 3)
    each = torch.tensor(np.repeat(q, 3))
    outcomes = torch.tensor([i < k for k in counts.k_N for i in range(3)]).int()
    theirs = float(binary_calibration_error(each, outcomes, n_bins=10))
    assert value_metrics(q, counts)["calibration_error"] == pytest.approx(theirs, abs=1e-5)
    assert theirs > 0.1


def test_likelihoods_are_measured_as_they_are() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(2000)
    counts = Counts(p, np.ones(2000), np.ones(2000, dtype=bool))
    found, most = value_metrics(p**2, counts), ceilings(counts)
    assert found["calibration_error"] == pytest.approx(np.mean(p - p**2), abs=0.02)
    assert found["spearman"] == pytest.approx(1)
    assert most["brier"] == pytest.approx(np.mean(p * (1 - p)))
    assert most["calibration_error"] == pytest.approx(0, abs=1e-6)


def test_nothing_to_measure_is_nan_and_no_error() -> None:
    empty = counts_of([], 1)
    assert value_metrics(np.zeros(0), empty) == pytest.approx(
        {"rows": 0} | dict.fromkeys(NAMES, np.nan), nan_ok=True
    )
    assert np.isnan(ceilings(empty)["auc"])
    assert np.isnan(irreducible_brier(empty))
    assert np.isnan(advantage_metrics(np.zeros(0), empty, empty)["sign"])
    one_sided = value_metrics(np.full(3, 0.5), counts_of([1, 1, 1], 1))
    assert np.isnan(one_sided["auc"])
    assert one_sided["brier"] == pytest.approx(0.25)


# True Qs of the shapes that occur: most prefixes doomed, two kinds of prefix, all alike.
TRUTHS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "many doomed": lambda rng, size: rng.beta(0.3, 0.9, size),
    "two kinds": lambda rng, size: np.where(
        rng.random(size) < 0.4, rng.beta(20, 4, size), rng.beta(1, 40, size)
    ),
    "two values": lambda rng, size: np.where(rng.random(size) < 0.4, 0.7, 0.02),
    "broad": lambda rng, size: rng.beta(2, 2, size),
}


@pytest.mark.parametrize("n", [2, 4, 16])
@pytest.mark.parametrize("shape", TRUTHS)
def test_ceilings_are_what_the_true_q_reaches(shape: str, n: int) -> None:
    rng = np.random.default_rng(n)
    truth = TRUTHS[shape](rng, 8000)
    counts = counts_of(rng.binomial(n, truth), n)
    reached, said = value_metrics(truth, counts), ceilings(counts)
    assert said["auc"] == pytest.approx(reached["auc"], abs=0.025 if n == 2 else 0.012)
    # Ranks of Qs that are all alike are ties, which no estimate from counts can see.
    loose = {"two values": 0.12}.get(shape, 0.06 if n == 2 else 0.04)
    assert said["spearman"] == pytest.approx(reached["spearman"], abs=loose)
    assert said["correlation"] == pytest.approx(reached["correlation"], abs=0.02)
    assert said["brier"] == pytest.approx(np.mean(truth * (1 - truth)), abs=0.005)
    assert said["reliability"] < 1e-3


def test_irreducible_brier_is_unbiased_down_to_two_rollouts_and_few_prefixes() -> None:
    rng = np.random.default_rng(0)
    truth = rng.beta(0.4, 0.8, 20)
    n = rng.integers(2, 5, 20)
    wanted = float((n * truth * (1 - truth)).sum() / n.sum())
    found = [irreducible_brier(counts_of(rng.binomial(n, truth), n)) for _ in range(2000)]
    assert np.mean(found) == pytest.approx(wanted, abs=4 * np.std(found) / len(found) ** 0.5)
    # What a score has above it is the squared error against the true Q.
    q = np.clip(truth + 0.2, 0, 1)
    above = [
        value_metrics(q, c)["brier"] - irreducible_brier(c)
        for c in (counts_of(rng.binomial(n, truth), n) for _ in range(200))
    ]
    error = float((n * (q - truth) ** 2).sum() / n.sum())
    assert np.mean(above) == pytest.approx(error, abs=4 * np.std(above) / len(above) ** 0.5)


def test_single_rollouts_have_no_ceiling_and_known_outcomes_need_none() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(500)
    single = counts_of(rng.binomial(1, truth), 1)
    assert np.isnan([ceilings(single)[name] for name in NAMES]).all()
    assert np.isnan(advantage_ceilings(single, single)["sign"])
    outcomes = replace(single, exact_N=np.ones(500, dtype=bool))
    assert ceilings(outcomes)["auc"] == 1.0
    assert ceilings(outcomes)["brier"] == 0.0
    # A few outcomes among single rollouts are not a ceiling of all of them.
    some = replace(single, exact_N=np.arange(500) < 300)
    assert np.isnan(ceilings(some)["auc"])


def test_deconvolution_finds_the_distribution_behind_the_counts() -> None:
    rng = np.random.default_rng(0)
    truth = TRUTHS["two kinds"](rng, 20_000)
    k = rng.binomial(16, truth)
    grid = np.linspace(0, 1, 41)
    from scipy.stats import binom

    likelihood = binom.pmf(np.arange(17)[:, None], 16, grid)
    share = deconvolve(likelihood, np.bincount(k, minlength=17).astype(float))
    assert share.sum() == pytest.approx(1)
    for low, high in ((0, 0.12), (0.12, 0.62), (0.62, 1.01)):
        found = share[(grid >= low) & (grid < high)].sum()
        assert found == pytest.approx(np.mean((truth >= low) & (truth < high)), abs=0.03)


def changes(kind: str, rng: np.random.Generator, before: np.ndarray) -> np.ndarray:
    size = len(before)
    if kind == "slips":
        return np.where(rng.random(size) < 0.2, 0.02, np.clip(before * 1.05, 0, 1))
    if kind == "most steps change nothing":
        return np.where(rng.random(size) < 0.6, before, before * rng.beta(0.3, 0.5, size))
    return np.clip(before + rng.normal(0, 0.15, size), 0, 1)


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("kind", ["slips", "most steps change nothing", "all sizes"])
def test_advantage_ceilings_bracket_what_the_true_advantages_reach(kind: str, n: int) -> None:
    rng = np.random.default_rng(n)
    before = rng.beta(0.5, 1, 6000) if kind != "all sizes" else rng.beta(2, 2, 6000)
    after = changes(kind, rng, before)
    labels = [counts_of(rng.binomial(n, q), n) for q in (before, after)]
    reached, said = advantage_metrics(after - before, *labels), advantage_ceilings(*labels)
    assert said["correlation"] == pytest.approx(reached["correlation"], abs=0.06)
    assert said["sign_low"] - 0.03 < reached["sign"] < said["sign"] + 0.03
    # No predictor beats them by more than chance.
    noisy = advantage_metrics(after - before + rng.normal(0, 0.1, 6000), *labels)
    assert noisy["correlation"] < said["correlation"] + 0.03


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=40)
@given(scores(), st.data())
def test_advantage_metrics_are_their_formulas(
    drawn: tuple[np.ndarray, Counts], data: st.DataObject
) -> None:
    a, before = drawn[0] - 0.5, drawn[1]
    after = counts_of([data.draw(st.integers(0, int(n))) for n in before.n_N], before.n_N)
    found = advantage_metrics(a, before, after)
    change = after.share_N - before.share_N
    hits = [
        0.5 if x == 0 else float((x > 0) == (y > 0))
        for x, y in zip(a, change, strict=True)
        if y != 0
    ]
    assert found["sign"] == pytest.approx(np.mean(hits) if hits else np.nan, nan_ok=True)
    if np.ptp(a) > 1e-3 and np.ptp(change) > 0:
        assert found["correlation"] == pytest.approx(np.corrcoef(a, change)[0, 1], abs=1e-4)


def test_first_error_is_the_first_step_below_the_threshold() -> None:
    nan = np.nan
    q = np.array([[0.9, 0.2, 0.1], [0.8, 0.7, nan], [0.9, 0.3, 0.8], [0.6, 0.9, 0.2]])
    first = np.array([2, 0, 3, 1])
    found = first_error_metrics(q, first, 0.5)
    # Found at 2, none, 2 (it was 3), 3 (it was 1).
    assert found == {"traces": 4, "error": 1 / 3, "clean": 1.0, "f1": 0.5}
    assert first_error_metrics(q, first, 0.0)["f1"] == 0.0
    assert np.isnan(first_error_metrics(q[:0], first[:0], 0.5)["f1"])


@given(st.integers(0, 2**32 - 1))
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=20)
def test_threshold_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    q = rng.random((30, 4))
    q[rng.random(30) < 0.3, 3] = np.nan
    first = rng.integers(0, 4, 30)
    first[:2] = 0, 1
    best = first_error_metrics(q, first, first_error_threshold(q, first))["f1"]
    values = np.sort(q[np.isfinite(q)])
    every = [first_error_metrics(q, first, float(t))["f1"] for t in values]
    # Of 101 quantiles of 100 values and less hardly one is left out.
    assert best >= max(every) - 0.05


def test_halves_of_many_rollouts_agree_and_of_two_they_guess() -> None:
    q = np.repeat([[0.9, 0.8, 0.005, 0.005]], 400, axis=0)
    rng = np.random.default_rng(0)
    many, few = (halves_agree(rng.binomial(n, q), np.full(q.shape, n)) for n in (32, 2))
    assert many > 0.6 > few
    assert np.isnan(halves_agree(np.zeros((3, 2)), np.ones((3, 2))))


def test_auc_of_values_that_differ_in_the_ninth_digit_is_not_a_tie() -> None:
    values = 0.5 + np.array([0.0, 1e-9, 2e-9, 3e-9])
    assert auc(values, np.array([False, False, True, True])) == 1.0


# --- on labels with a model ---------------------------------------------------------------------

TASK = Tape(n_ops=3)


def solution(rng: Random, question: str) -> str:
    """A solution, half of the time with one wrong result."""
    value, operations = parse(question)
    slip = rng.randrange(2 * len(operations))
    lines = []
    for i, (op, operand) in enumerate(operations):
        line = f"{value}{op}{operand}="
        value = (press(value, op, operand) + (rng.randint(1, 9) if i == slip else 0)) % 100
        lines.append(f"{line}{value}")
    return "\n".join([*lines, f"A{value}"])


def write_labels(directory: Path, model: Path, n: int, problems: int = 60) -> str:
    """Labels of the validation split with n rollouts; Q is .8 before a slip and .05 after it."""
    policy = load_policy(PolicyConfig(str(model), "base"), TASK.step_rule)
    manifest = {
        "format": 1,
        "task": TASK.fingerprint,
        "task_spec": task_spec(TASK),
        "tokenizer": tokenizer_fingerprint(policy.tokenizer),
        "policy": asdict(policy.config),
        "policy_fingerprint": policy.fingerprint,
        "rollout_policies": {"base": policy.fingerprint},
        "sampler": asdict(Sampler(max_length=64)),
    }
    rng = Random(0)
    with Store(directory, manifest) as store:
        for problem in islice(TASK.problems("validation"), problems):
            for seed in range(4):
                text = solution(rng, problem.question)
                ids = [
                    *policy.tokenizer.encode(text, add_special_tokens=False),
                    policy.tokenizer.eos_token_id,
                ]
                ends = policy.stepper.step_ends(ids)
                slips = [None, *TASK.slips(text.split("\n"), problem)]
                grade = TASK.grade(text, problem)
                store.add(
                    Trace(f"{problem.id}/base/{seed}", problem.id, problem.question, problem.gold,
                          "validation", "base", seed, ids, ends, grade.answer, grade.correct, False)
                )  # fmt: skip
                for slip, end in zip(slips, [0, *ends[:-1]], strict=False):
                    key = prefix_key(problem.id, ids[:end])
                    for index in range(n):
                        if (key, "base", index) not in store.completions:
                            right = rng.random() < (0.8 if slip is None else 0.05)
                            store.add(Completion(key, problem.id, "base", index, ids[:end],
                                                 [17, 4, 2], "1", right, False))  # fmt: skip
        store.seal({"base": policy.fingerprint})
    return str(directory)


@pytest.fixture(scope="module")
def trunk(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def labels(trunk: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_labels(tmp_path_factory.mktemp("metrics") / "labels", trunk, n=4)


@pytest.fixture(scope="module")
def verifier(trunk: Path, make_verifier: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("metrics") / "pav.ckpt"
    make_verifier(trunk, path, task=TASK, sampler=Sampler(max_length=64))
    return str(path)


def test_a_predictor_of_the_truth_reaches_the_ceilings_of_real_labels(
    labels: str, verifier: str
) -> None:
    found, loaded = read_labels([labels]), load_verifier(verifier)
    path, policy = trunk_policy(loaded, TASK, None)
    model = load_on_device(loaded, path)
    heads = loaded.card.heads
    examples = pav_examples(found, "validation", heads, policy, 64)
    scored = score(model, examples, policy, "scoring")
    seen = score_labels(heads, examples, scored, found, policy, TASK)
    # Counts of a prefix are whole, however many solutions it stands in.
    labelled = seen.counts["q/base"].n_N
    assert set(labelled) == {1, 4}
    assert (labelled == 1).sum() == len(examples) == seen.counts["q/base"].exact_N.sum()
    assert seen.counts["orm"].exact_N.sum() == (seen.counts["orm"].n_N > 0).sum() == len(examples)

    problems = {t.problem_id: t for t in found.traces}
    truth = np.zeros(len(scored.step_N))
    for row, (e, step) in enumerate(zip(scored.example_N, scored.step_N, strict=True)):
        example = examples[e]
        text = policy.text(example.ids[example.prompt_length :])
        trace = problems[example.problem_id]
        slips = TASK.slips(text.split("\n"), trace)  # type: ignore[arg-type]
        slipped = step > 0 and slips[step - 1] is not None
        last = step == len(example.ends)
        truth[row] = float(not slipped) if last else 0.05 if slipped else 0.8
    q = {(head, mode): truth for head in heads for mode in ("plain", "surprise")}
    everything = np.ones(len(truth), dtype=bool)
    half = scored.example_N % 2 == 0
    report = measure(seen, q, dict.fromkeys(heads, everything), half)
    reached, ceiling = report["q/base/plain"], report["q/base/ceiling"]
    distinct = {k for k, n in zip(seen.keys_N, labelled, strict=True) if n > 0}
    assert reached["rows"] == len(distinct) == ceiling["rows"]
    for name, tolerance in (("auc", 0.02), ("brier", 0.01), ("correlation", 0.02)):
        assert ceiling[name] == pytest.approx(reached[name], abs=tolerance)
    assert report["orm/plain"]["auc"] == report["orm/ceiling"]["auc"] == 1.0
    advantage = report["advantage"]
    assert advantage["q/base/ceiling"]["correlation"] == pytest.approx(
        advantage["q/base/plain"]["correlation"], abs=0.05
    )
    assert report["first_error"]["truth"] == "slips"
    assert report["first_error"]["q/base/plain"]["f1"] == 1.0
    # Not on the solutions that the threshold was settled on.
    assert report["first_error"]["q/base/plain"]["traces"] == len(examples) // 2
    assert report["slips"]["q/base/plain"]["all"] == 1.0
    steps = reached["steps"]
    assert steps["step"] == [0, 1, 2, 3, 4]
    assert sum(steps["rows"]) == reached["rows"]

    # Where the task does not know the truth, counts tell it, less surely.
    blind = replace(seen, task=Blind())
    report = measure(blind, q, dict.fromkeys(heads, everything), half)
    assert report["slips"] == {}
    assert report["first_error"]["truth"] == "counts"
    assert 0.5 < report["first_error"]["q/base/plain"]["f1"] <= 1.0
    assert 0.2 < report["first_error"]["q/base/halves"] <= 1.0


class Blind:
    """A task that knows nothing of single steps."""


def test_evaluate_prints_and_writes_metrics_of_any_label_run(
    labels: str, verifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "found.json"
    found = evaluate(EvaluateConfig(verifier, [labels], output=str(output), verbose=True))
    written = json.loads(output.read_text())
    assert written["q/base/surprise"]["auc"] == pytest.approx(found["q/base/surprise"]["auc"])
    assert written["data"]["prefixes"]["base"].keys() == {"4"}
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr()
    said = told.out
    assert "q/base/ceiling" in said
    assert f"metrics: {output}" in said
    # Every figure with its interval, and of every head whether it is worth anything.
    low, high = written["q/base/surprise"]["ci95"]["auc"]
    assert low < written["q/base/surprise"]["auc"] < high
    assert f"[{low:.2f}, {high:.2f}]".replace("0.", ".") in said
    assert written["q/base/surprise"]["problems"] == 60 and "WARNING" not in told.err
    for head in ("q/base", "orm"):
        (line,) = [line for line in said.splitlines() if line.startswith(f"{head}: ")]
        assert " than a constant" in line
    # Nothing is fitted on these labels: other labels, the same values.
    card = load_verifier(verifier).card
    assert "calibrators" not in written
    assert card.validation == {}


def test_small_split_is_warned_of_by_its_number(
    trunk: Path, verifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write_labels(tmp_path / "labels", trunk, n=2, problems=3)
    evaluate(EvaluateConfig(verifier, [few]))
    warned = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert warned == ["WARNING: 3 validation problems, fewer than 50: figures of so few say little"]


def test_verdict_follows_from_the_interval() -> None:
    def of(brier: float, low: float, high: float) -> str:
        ci95 = {"brier_gain": [low, high], "brier": [0.15, 0.25]}
        return verdict({"brier": brier, "brier_constant": 0.194, "ci95": ci95})

    assert of(0.199, -0.05, 0.04) == (
        "no better than a constant: Brier 0.199 [.15, .25] against 0.194"
    )
    assert of(0.163, 0.02, 0.042) == (
        "better than a constant by 0.031 [0.020, 0.042] (Brier 0.163 against 0.194)"
    )
    assert of(0.224, -0.06, -0.01) == (
        "worse than a constant by 0.030 [0.010, 0.060] (Brier 0.224 against 0.194)"
    )


def test_evaluate_refuses_labels_of_another_task_or_policy(
    labels: str, verifier: str, trunk: Path, make_verifier: Any, tmp_path: Path
) -> None:
    other = tmp_path / "other.ckpt"
    make_verifier(trunk, other, heads=("q/somebody",), task=TASK)
    with pytest.raises(UserError, match=r"hold rollouts of base, verifier .* predicts q/somebody"):
        evaluate(EvaluateConfig(str(other), [labels]))
    harder = tmp_path / "harder.ckpt"
    make_verifier(trunk, harder, task=Tape(n_ops=5))
    with pytest.raises(UserError, match=r"about another task than verifier .*give labels of its"):
        evaluate(EvaluateConfig(str(harder), [labels]))
    with pytest.MonkeyPatch.context() as patch:  # before the model is loaded
        patch.setattr("pav.evaluate.command.load_on_device", lambda *_: pytest.fail("loaded"))
        with pytest.raises(UserError, match=r"hold no solutions of train problems; set split"):
            evaluate(EvaluateConfig(verifier, [labels], split="train"))
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"is not writable .*; choose another"):
            evaluate(EvaluateConfig(verifier, [labels], output=str(tmp_path / "file" / "x.json")))
    with pytest.raises(UserError, match=r"output is 'x'; give a file name ending in .json"):
        EvaluateConfig(verifier, [labels], output="x")
