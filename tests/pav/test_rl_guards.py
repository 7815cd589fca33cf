"""Guard rails of pav.rl: each planted failure is seen, and a healthy run is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from pav.rl.config import RlConfig
from pav.rl.guards import Metrics, alarms, read_alarms, watch

CONFIG = RlConfig("pav:reference")
ITERATIONS = 40
EVERY = 10


def healthy() -> list[Metrics]:
    """A run on the tape that learns: figures of a real one, smoothed."""
    history: list[Metrics] = [evaluation(0, 0.13)]
    for i in range(1, ITERATIONS + 1):
        done = i / ITERATIONS
        row = {
            "iteration": i, "samples": 64 * i,
            "train/accuracy": 0.1 + 0.2 * done, "train/outcome": 0.1 + 0.2 * done,
            "train/dense": -0.43 + 0.15 * done, "train/dense_per_step": -0.05 + 0.02 * done,
            "train/dense_spread": 0.23, "train/dead_groups": 0.7 - 0.3 * done,
            "train/tokens": 67 + 5 * done, "train/tokens_max": 90, "train/steps": 8.3 + done,
            "train/truncated": 0.0, "train/empty_steps": 0.0, "train/repeated_steps": 0.01,
            "train/alike": 0.0, "update/loss": -9.0, "update/gradient_norm": 17.0,
            "update/entropy": 0.19 - 0.07 * done, "update/kl_k1": 0.01 * done,
            "update/kl_k3": 0.01 * done, "mismatch/mean": 3.4e-7, "mismatch/largest_ratio": 1.0,
            "mismatch/beyond_2": 0.0, "verifier/out_of_range": 0.04,
        }  # fmt: skip
        if i % EVERY == 0:
            row |= evaluation(i, 0.13 + 0.09 * done)
        history.append(row)
    return history


def evaluation(iteration: int, accuracy: float) -> Metrics:
    return {"iteration": iteration, "accuracy": accuracy, "accuracy_low": accuracy - 0.05,
            "accuracy_high": accuracy + 0.05, "greedy": 0.52, "pass@4": 0.5}  # fmt: skip


def plant(name: str, *values: float) -> list[Metrics]:
    """A healthy run in which one figure moves evenly from the first value to the last."""
    history = healthy()
    rows = [row for row in history if name in row]
    for number, row in enumerate(rows):
        row[name] = values[0] + (values[-1] - values[0]) * number / max(1, len(rows) - 1)
    return history


def held_out(history: list[Metrics], *accuracies: float) -> list[Metrics]:
    """The same run with these held-out accuracies."""
    rows = [row for row in history if "accuracy" in row]
    for row, accuracy in zip(rows, accuracies, strict=True):
        row.update({**evaluation(0, accuracy), "iteration": row["iteration"]})
    return history


FLAT = (0.01, 0.012, 0.01, 0.008, 0.01)
PLANTED = {
    "empty steps": ("idle_steps", plant("train/empty_steps", 0, 0.3)),
    "repeated steps": ("idle_steps", plant("train/repeated_steps", 0.01, 0.4)),
    "filler steps, as measured": ("filler_steps", held_out(plant("train/steps", 9, 31), *FLAT)),
    "steps doubled while learning": ("drift", plant("train/steps", 8, 30)),
    "traces shrink": ("drift", plant("train/tokens", 80, 10)),
    "dense up, accuracy down": (
        "gamed", held_out(plant("train/dense", -0.4, 0.9), 0.3, 0.3, 0.27, 0.23, 0.2),
    ),
    "entropy collapses": ("entropy_lost", plant("update/entropy", 0.2, 0.0)),
    "groups of one text": ("alike", plant("train/alike", 0, 1)),
    "groups of one outcome": ("dead_groups", plant("train/dead_groups", 1, 1)),
    "weights that do not arrive": ("mismatch", plant("mismatch/mean", 1e-6, 0.02)),
    "verifier out of its range": ("out_of_range", plant("verifier/out_of_range", 0.04, 0.4)),
}  # fmt: skip
ENDING = {
    "a loss that is no number": ("not_finite", plant("update/loss", float("nan"))),
    "cut from the start": ("truncated", plant("train/truncated", 0.4)[:2]),
    "cut in the end": ("truncated", plant("train/truncated", 0, 0.5)),
    "accuracy lost": ("accuracy_lost", held_out(healthy(), 0.3, 0.35, 0.3, 0.1, 0.05)),
}


def test_a_healthy_run_is_left_alone_at_every_iteration() -> None:
    history = healthy()
    for end in range(len(history) + 1):
        assert alarms(history[:end], CONFIG) == []


@pytest.mark.parametrize(("name", "history"), PLANTED.values(), ids=PLANTED)
def test_a_planted_failure_is_warned_of(name: str, history: list[Metrics]) -> None:
    found = {alarm.name: alarm for alarm in alarms(history, CONFIG)}
    assert name in found
    assert not found[name].stops
    assert "\n" not in found[name].line
    # Only the drift that comes with more steps may be said beside it.
    assert set(found) <= {name, "drift"}
    assert alarms(history, RlConfig("pav:reference", guards="off")) == []
    assert all(a.stops for a in alarms(history, RlConfig("pav:reference", guards="stop")))


@pytest.mark.parametrize(("name", "history"), ENDING.values(), ids=ENDING)
def test_what_nothing_follows_from_ends_the_run(name: str, history: list[Metrics]) -> None:
    assert [a.name for a in alarms(history, CONFIG) if a.stops] == [name]


def test_more_steps_that_come_with_more_right_answers_are_no_filler() -> None:
    history = held_out(plant("train/steps", 8, 14), 0.1, 0.15, 0.2, 0.3, 0.4)
    assert alarms(history, CONFIG) == []


def test_one_bad_evaluation_or_a_few_problems_end_no_run() -> None:
    once = held_out(healthy(), 0.3, 0.35, 0.3, 0.3, 0.05)
    assert not any(a.stops for a in alarms(once, CONFIG))
    twice = held_out(healthy(), 0.3, 0.35, 0.3, 0.1, 0.05)
    few = RlConfig("pav:reference", eval_problems=20)
    assert not any(a.stops for a in alarms(twice, few))


def test_bfloat16_that_differs_from_the_start_is_not_warned_of() -> None:
    assert alarms(plant("mismatch/mean", 0.04), CONFIG) == []


def test_a_warning_is_said_and_written_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = held_out(plant("train/steps", 9, 31), *FLAT)
    for end in range(1, len(history) + 1):
        assert watch(tmp_path, history[:end], CONFIG) == ""
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in said] == [a.name for a in read_alarms(tmp_path)]
    names = [alarm.name for alarm in read_alarms(tmp_path)]
    assert sorted(names) == ["drift", "filler_steps"]
    # The figures of the first time that it was seen, at an iteration of the run.
    first = next(a for a in read_alarms(tmp_path) if a.name == "filler_steps")
    assert 10 <= first.iteration < ITERATIONS
    assert "held-out accuracy did not rise (0.010 at iteration 0, 0.0" in first.line


def test_a_run_that_stopped_stops_again_until_its_guards_are_off(tmp_path: Path) -> None:
    history = held_out(healthy(), 0.3, 0.35, 0.3, 0.1, 0.05)
    why = watch(tmp_path, history, CONFIG)
    assert why.startswith(
        "accuracy_lost: held-out accuracy fell from 0.350 at iteration 10 to 0.050"
    )
    assert watch(tmp_path, history, CONFIG) == why
    assert [a.name for a in read_alarms(tmp_path)].count("accuracy_lost") == 1
    assert watch(tmp_path, history, RlConfig("pav:reference", guards="off")) == ""
