"""Label runs on real vLLM: every prefix exactly n_mc times, repeatable, resumable."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from data_gen.rollouts import RolloutsConfig, prefixes, rollouts
from data_gen.store import Store
from pav.engine import EngineConfig
from pav.errors import UserError
from pav.labels import Completion, LabelSet, Trace, prefix_key, read_labels
from pav.policy import PolicyConfig, Sampler, load_policy
from pav.steps import StepRule
from pav.tasks.base import Grade, Problem
from pav.tasks.tape import Tape

TABLES = ("traces", "labels", "completions")


class AllRight(Tape):
    """The tape with a grader that finds everything right: only what was cut is wrong."""

    def grade(self, text: str, problem: Problem) -> Grade:
        return replace(super().grade(text, problem), correct=True)


@pytest.fixture(scope="module")
def prover(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sibling of the random Llama: same tokenizer, other output rows."""
    path = tmp_path_factory.mktemp("models") / "prover"
    shutil.copytree(tiny_model("llama"), path)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].flip(1).contiguous()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def config(
    tiny_model: Callable[..., Path], prover: Path, tmp_path_factory: pytest.TempPathFactory
) -> RolloutsConfig:
    """Two random policies; a third of their solutions are cut by the cap."""
    return RolloutsConfig(
        output=str(tmp_path_factory.mktemp("labels") / "run"),
        policy=PolicyConfig(str(tiny_model("llama")), name="base"),
        prover=PolicyConfig(str(prover), name="prover"),
        sampler=Sampler(max_length=48),
        problems=5,
        validation_problems=2,
        n_seeds=5,
        prover_share=0.4,
        n_mc=2,
        concurrency=3,
        engine=EngineConfig(kv_gib=0.02, max_num_seqs=64),
    )


@pytest.fixture(scope="module")
def labels(config: RolloutsConfig) -> LabelSet:
    rollouts(config)
    return read_labels([config.output])


def tables(directory: str) -> dict[str, list[dict[str, Any]]]:
    return {name: pq.read_table(Path(directory) / name).to_pylist() for name in TABLES}


def wanted(labels: LabelSet, n_mc: int) -> set[tuple[str, str, int]]:
    """Keys of all rollouts that the traces ask for, derived from their ids alone."""
    newline, keys = 18, set()
    for t in labels.traces:
        # A line with something on it ends a step; the end of the solution needs no rollout.
        ends, start = [0], 0
        for i, token in enumerate(t.ids):
            content = [x for x in t.ids[start:i] if x != newline]
            if token == newline and content:
                ends.append(i + 1)
                start = i + 1
        keys |= {prefix_key(t.problem_id, t.ids[:end]) for end in ends}
    return {(k, p, i) for k in keys for p in ("base", "prover") for i in range(n_mc)}


def test_every_prefix_is_labelled_n_mc_times_by_each_policy_and_identical_ones_once(
    config: RolloutsConfig, labels: LabelSet
) -> None:
    found = [(c.prefix_key, c.policy, c.index) for c in labels.completions]
    assert Counter(found) == Counter(wanted(labels, config.n_mc))
    # Step 0 of all seeds of a problem is one prefix.
    roots = {prefix_key(t.problem_id, []) for t in labels.traces}
    assert len(roots) == 7
    assert all(labels.counts[root, p][1] == 2 for root in roots for p in ("base", "prover"))
    # There were later steps, too.
    assert len({key for key, _, _ in found}) > 2 * len(roots)


def test_seeds_come_from_both_policies_by_their_share(labels: LabelSet) -> None:
    per_problem = Counter((t.problem_id, t.policy) for t in labels.traces)
    assert {policy: n for (_, policy), n in per_problem.items()} == {"base": 3, "prover": 2}
    assert len(per_problem) == 14
    assert len({tuple(t.ids) for t in labels.traces}) == len(labels.traces)
    assert Counter(t.split for t in labels.traces) == {"train": 25, "validation": 10}


def test_rollouts_are_recorded_as_they_were_sampled(
    config: RolloutsConfig, labels: LabelSet
) -> None:
    policy = load_policy(config.policy, config.task.step_rule)
    questions = {t.problem_id: t.question for t in labels.traces}
    eos, cap = policy.tokenizer.eos_token_id, config.sampler.max_length
    for c in labels.completions:
        assert c.prefix_key == prefix_key(c.problem_id, c.prefix_ids)
        ended = c.ids[-1:] == [eos]
        whole = len(policy.tokenizer.encode(questions[c.problem_id] + "\n")) + len(
            c.prefix_ids + c.ids
        )
        assert eos not in c.ids[:-1]
        # The cap is on prompt, prefix and completion together.
        assert ended or whole == cap
        assert c.truncated == (not ended)
    for t in labels.traces:
        assert t.step_ends == policy.stepper.step_ends(t.ids)
        assert t.truncated == (t.ids[-1] != eos)


def test_truncated_rollout_counts_as_truncated_and_as_a_failure(
    config: RolloutsConfig, labels: LabelSet, tmp_path: Path
) -> None:
    rows = tables(config.output)["labels"]
    cut = [c for c in labels.completions if c.truncated]
    assert sum(r["truncated"] for r in rows) == len(cut) > 0

    generous = replace(config, task=AllRight(), output=str(tmp_path / "run"), n_seeds=2, problems=2)
    rollouts(generous)
    right = read_labels([generous.output])
    assert {c.correct == (not c.truncated) for c in right.completions} == {True}
    assert {t.correct == (not t.truncated) for t in right.traces} == {True}
    assert any(c.truncated for c in right.completions)
    for row in tables(generous.output)["labels"]:
        assert row["k"] == row["n"] - row["truncated"]


def test_seeded_run_repeated_elsewhere_gives_identical_tables(
    config: RolloutsConfig, labels: LabelSet, tmp_path: Path
) -> None:
    again = replace(config, output=str(tmp_path / "again"))
    rollouts(again)
    assert tables(again.output) == tables(config.output)
    other = replace(config, output=str(tmp_path / "other"), seed=1)
    rollouts(other)
    assert tables(other.output)["traces"] != tables(config.output)["traces"]


def test_interrupted_run_resumed_by_the_same_command_asks_for_nothing_twice(
    config: RolloutsConfig, labels: LabelSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = replace(config, output=str(tmp_path / "part"))
    add, added = Store.add, 0
    stops = [20, 60, 61, 10_000]

    def stopping(self: Store, record: Trace | Completion) -> None:
        nonlocal added
        add(self, record)
        added += 1
        if added == stops[0]:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Store, "add", stopping)
    # A shell's background job, as a test run may be, starts with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while len(stops) > 1:
        with pytest.raises(KeyboardInterrupt):
            rollouts(part)
        stops.pop(0)
    rollouts(part)
    resumed = read_labels([part.output])
    assert added == len(resumed.traces) + len(resumed.completions)

    def keys(labels: LabelSet) -> set[tuple[str, str, int]]:
        return {(c.prefix_key, c.policy, c.index) for c in labels.completions}

    assert keys(resumed) == keys(labels)
    assert {t.trace_id for t in resumed.traces} == {t.trace_id for t in labels.traces}
    # A finished run has nothing to do: no engine is loaded.
    monkeypatch.setattr("data_gen.rollouts.Engine", None)
    rollouts(part)
    assert keys(read_labels([part.output])) == keys(labels)


def test_one_policy_that_is_its_own_prover_labels_once(
    config: RolloutsConfig, tmp_path: Path
) -> None:
    alone = replace(config, prover=config.policy, output=str(tmp_path / "run"), problems=1,
                    validation_problems=0, n_mc=1)  # fmt: skip
    rollouts(alone)
    found = read_labels([alone.output])
    assert found.policies == ["base"]
    assert [t.policy for t in found.traces] == ["base"] * 5


def test_prompt_that_leaves_no_room_is_truncated_not_a_crash(
    config: RolloutsConfig, tmp_path: Path
) -> None:
    short = replace(config, sampler=Sampler(max_length=8), output=str(tmp_path / "run"), problems=2,
                    validation_problems=0)  # fmt: skip
    rollouts(short)
    found = read_labels([short.output])
    assert all(t.truncated and t.ids == [] and not t.correct for t in found.traces)
    assert len(found.completions) == 2 * 2 * 2
    assert all(c.truncated and not c.correct for c in found.completions)


def solution(ids: list[int], ends: list[int], truncated: bool = False) -> Trace:
    return Trace("t", "p", "1", "1", "train", "base", 0, ids, ends, None, False, truncated)


def test_prefixes_are_step_zero_and_all_boundaries_but_the_end_of_the_solution() -> None:
    complete = solution([4, 5, 18, 6, 7, 2], [3, 6])
    assert prefixes(complete) == [[], [4, 5, 18]]
    # Cut after a boundary: that boundary is one to go on from.
    assert prefixes(solution([4, 5, 18, 6], [3], truncated=True)) == [[], [4, 5, 18]]
    assert prefixes(solution([2], [])) == [[]]


def test_provers_that_do_not_fit_the_policy_are_refused(
    config: RolloutsConfig, prover: Path, tiny_model: Callable[..., Path]
) -> None:
    stranger = PolicyConfig(str(tiny_model("llama", "chat")), name="chat")
    with pytest.raises(UserError, match="has another tokenizer than policy"):
        rollouts(replace(config, prover=stranger))
    twin = PolicyConfig(str(prover), name="base")
    with pytest.raises(UserError, match=r"both called 'base'; set prover.name"):
        rollouts(replace(config, prover=twin))


def test_steps_over_an_unscored_cut_are_failures_as_they_are_in_search(
    config: RolloutsConfig, tmp_path: Path
) -> None:
    rule = StepRule(max_tokens=6, score_cut=False)
    cut = replace(config, task=AllRight(step_rule=rule), output=str(tmp_path / "run"), problems=2,
                  validation_problems=0)  # fmt: skip
    rollouts(cut)
    found = read_labels([cut.output])
    policy = load_policy(config.policy, rule)
    solutions = [(t.ids, t.correct) for t in found.traces]
    solutions += [(c.prefix_ids + c.ids, c.correct) for c in found.completions]
    assert {right for _, right in solutions} == {True, False}
    for ids, right in solutions:
        assert right == (policy.stepper.step_ends(ids)[-1:] == [len(ids)])
