"""Label runs on real vLLM: every prefix exactly n_mc times, repeatable, resumable."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from data_gen.config import RolloutsConfig
from data_gen.rollouts import rollouts
from data_gen.store import Store
from pav.core.errors import UserError
from pav.core.steps import StepRule
from pav.engine.loading import EngineConfig
from pav.labels.tables import Completion, LabelSet, Trace, prefix_key, prefixes, read_labels
from pav.policy.policy import PolicyConfig, Sampler, load_policy
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
        task=Tape(),
        ignore_warnings=True,
        policy=PolicyConfig(str(tiny_model("llama")), name="base"),
        prover=PolicyConfig(str(prover), name="prover"),
        sampler=Sampler(max_length=48),
        problems=5,
        validation_problems=2,
        n_traces=5,
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

    generous = replace(config, task=AllRight(), output=str(tmp_path / "run"), n_traces=2,
                       problems=2, grade_timeout=None)  # fmt: skip
    rollouts(generous)
    right = read_labels([generous.output])
    assert {c.correct == (not c.truncated) for c in right.completions} == {True}
    assert {t.correct == (not t.truncated) for t in right.traces} == {True}
    assert any(c.truncated for c in right.completions)
    for row in tables(generous.output)["labels"]:
        assert row["k"] == row["n"] - row["truncated"]


def test_run_that_is_no_use_stops_early_sealed_and_goes_on_where_told_to(
    config: RolloutsConfig,
    labels: LabelSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Most of what random policies write first is cut."""
    monkeypatch.setattr("data_gen.inspect.watch.LOOKS", (60,))
    monkeypatch.setattr("data_gen.labeler.REPORT_SECONDS", 0.0)
    monkeypatch.setattr("pav.core.progress.PLAIN_SECONDS", 0.0)
    strict = replace(config, output=str(tmp_path / "run"), ignore_warnings=False)
    told = r"stopped early: \d+ of \d+ finished .* cut by the length cap.* --ignore_warnings true"
    with pytest.raises(UserError, match=told):
        rollouts(strict)
    said = capsys.readouterr().out
    assert re.search(r"rollouts: 0/35 solutions, .* [\d.]+ min left, \d+ rollouts, .* cut, ", said)
    assert "next: " not in said
    part = read_labels([strict.output])
    made = len(part.traces) + len(part.completions)
    assert 60 <= made < len(labels.traces) + len(labels.completions)
    # The same command sees it before it loads an engine.
    with monkeypatch.context() as patch:
        patch.setattr("data_gen.rollouts.loaded", None)
        with pytest.raises(UserError, match=f"of {made} finished"):
            rollouts(strict)
    rollouts(replace(strict, ignore_warnings=True))
    resumed = read_labels([strict.output])

    def keys(labels: LabelSet) -> set[tuple[str, str, int]]:
        return {(c.prefix_key, c.policy, c.index) for c in labels.completions}

    assert keys(resumed) == keys(labels) and len(resumed.traces) == len(labels.traces)


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
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        while len(stops) > 1:
            with pytest.raises(KeyboardInterrupt):
                rollouts(part)
            assert not (Path(part.output) / "traces").exists()  # nothing half is sealed
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            stops.pop(0)
    finally:
        signal.signal(signal.SIGINT, before)
    rollouts(part)
    resumed = read_labels([part.output])
    assert added == len(resumed.traces) + len(resumed.completions)

    def keys(labels: LabelSet) -> set[tuple[str, str, int]]:
        return {(c.prefix_key, c.policy, c.index) for c in labels.completions}

    assert keys(resumed) == keys(labels)
    assert {t.trace_id for t in resumed.traces} == {t.trace_id for t in labels.traces}
    # A finished run has nothing to do: no engine is loaded. One of a version that knew neither
    # shards nor given seeds is as good.
    file = Path(part.output) / "manifest.json"
    old = json.loads(file.read_text())
    del old["shard"], old["seeds_from"]
    file.write_text(json.dumps(old))
    (Path(part.output) / "journal.jsonl").write_bytes(b"")
    monkeypatch.setattr("data_gen.engines.VllmEngine", None)
    rollouts(part)
    assert keys(read_labels([part.output])) == keys(labels)


def test_stopped_at_any_time_all_problems_are_labelled_to_within_one_round(
    config: RolloutsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(config, output=str(tmp_path / "run"), concurrency=6)
    add, events = Store.add, []
    monkeypatch.setattr(
        Store, "add", lambda self, record: (events.append(record), add(self, record))
    )
    rollouts(whole)
    # Writers take turns by their share.
    order = ["base/0", "prover/0", "base/1", "prover/1", "base/2"]
    traces: dict[str, Trace] = {}
    done: set[tuple[str, str, int]] = set()

    def complete_rounds(problem: str) -> int:
        for number, name in enumerate(order):
            trace = traces.get(f"{problem}/{name}")
            if trace is None or not all(
                (prefix_key(problem, ids), p, i) in done
                for ids in prefixes(trace)
                for p in ("base", "prover")
                for i in range(2)
            ):
                return number
        return len(order)

    problems = list(dict.fromkeys(e.problem_id for e in events))
    assert len(problems) == 7
    complete = dict.fromkeys(problems, 0)
    ahead = 0
    for event in events:
        if isinstance(event, Trace):
            traces[event.trace_id] = event
            number = order.index(f"{event.policy}/{event.seed_index}")
            assert number <= min(complete.values()) + 1
            ahead += number > min(complete.values())
        else:
            # No rollout of a round before every problem has all those of the rounds before. (A seed
            # that was sampled ahead and has no prefix of its own needs none.)
            asked_by = [
                number
                for number, name in enumerate(order)
                if (trace := traces.get(f"{event.problem_id}/{name}"))
                and event.prefix_ids in prefixes(trace)
            ]
            assert asked_by[0] <= min(complete.values())
            done.add((event.prefix_key, event.policy, event.index))
        complete[event.problem_id] = complete_rounds(event.problem_id)
    assert set(complete.values()) == {5}
    # The engine was not idle meanwhile: seeds of a round came while the one before was rolled out.
    assert ahead > 5


def test_run_out_of_time_is_sealed_and_the_same_command_goes_on(
    config: RolloutsConfig,
    labels: LabelSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    timed = replace(config, output=str(tmp_path / "run"), hours=100.0)
    ticks = iter([0.0] * 100)  # turns of the engine, or a few more
    monkeypatch.setattr("data_gen.labeler.monotonic", lambda: next(ticks, inf))
    rollouts(timed)
    part = read_labels([timed.output])
    assert 20 <= len(part.traces) + len(part.completions) <= 150
    said = capsys.readouterr().out
    assert re.search(r"stopped after 100.0 hours: \d of 5 rounds are complete, \d+ solutions", said)
    assert "next: pav.train" in said
    monkeypatch.undo()
    # Time is no part of the configuration.
    rollouts(replace(timed, hours=None))
    resumed = read_labels([timed.output])
    found = [(c.prefix_key, c.policy, c.index) for c in resumed.completions]
    assert Counter(found) == Counter(wanted(resumed, config.n_mc))
    assert {t.trace_id for t in resumed.traces} == {t.trace_id for t in labels.traces}


def test_dry_run_prints_the_plan_and_writes_nothing(
    config: RolloutsConfig, labels: LabelSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollouts(replace(config, output=str(tmp_path / "run"), dry_run=True))
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().out
    plan = re.search(r"plan: 7 problems, 35 traces, at most (\d+) prefixes, (\d+) rollouts", said)
    assert plan is not None, said
    assert int(plan[2]) == pytest.approx(len(labels.completions), rel=0.5)
    assert int(plan[2]) == pytest.approx(4 * int(plan[1]), abs=4)
    for figure in ("steps per trace", "tokens per step", "of the steps empty", "MB of tables"):
        assert re.search(rf"[\d.]+%? {figure}", said), figure
    assert re.search(r"[\d.]+ hours at the pilot's rate", said)
    for what in ("solutions", "rollouts"):
        ended = rf"pilot's {what}: [\d.]+% truncated, [\d.]+% right, [\d.]+% without an answer"
        assert re.search(ended, said), what
    # Two solutions in full, by both writers, line by line.
    policy = load_policy(config.policy, config.task.step_rule)
    for writer in ("base", "prover"):
        shown = re.search(
            rf"a solution of {writer}: (?:truncated|wrong), .* \d+ steps\n((?:  \| .*\n)+)", said
        )
        assert shown is not None, said
        text = shown[1].replace("  | ", "")
        assert text.rstrip("\n") in {
            policy.text(t.ids).rstrip("\n") for t in labels.traces if t.policy == writer
        }


def test_shards_are_disjoint_and_together_ask_for_what_one_run_asks_for(
    config: RolloutsConfig, labels: LabelSet, tmp_path: Path
) -> None:
    shards = [replace(config, output=str(tmp_path), shard=f"{i}/2") for i in range(2)]
    for shard in shards:
        rollouts(shard)
    names = ["shard-0-of-2", "shard-1-of-2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    parts = [read_labels([str(tmp_path / name)]) for name in names]
    found = [{t.trace_id: t.ids for t in part.traces} for part in parts]
    assert not found[0].keys() & found[1].keys()
    assert found[0] | found[1] == {t.trace_id: t.ids for t in labels.traces}
    both = read_labels([str(tmp_path / name) for name in names])
    assert {(c.prefix_key, c.policy, c.index) for c in both.completions} == wanted(both, 2)
    with pytest.raises(UserError, match="was made with another shard"):
        rollouts(replace(config, output=str(tmp_path / names[1])))


def test_solutions_that_the_user_has_are_labelled_as_they_are(
    config: RolloutsConfig, tmp_path: Path
) -> None:
    problems = list(islice(config.task.problems("train"), 2))
    policy = load_policy(config.policy, config.task.step_rule)
    texts = ["1+1=2\n2+3=5\nA5", f"=7\nA{problems[0].gold}", "4*4=16\n"]
    rows = [
        {"problem_id": problems[0].id, "text": texts[0]},
        {"question": problems[0].question, "ids": policy.tokenizer.encode(
            texts[1], add_special_tokens=False)},
        {"question": problems[1].question, "text": texts[2], "truncated": True, "policy": "human"},
    ]  # fmt: skip
    file = tmp_path / "traces.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    given = replace(config, output=str(tmp_path / "run"), traces_from=str(file), problems=2,
                    validation_problems=0)  # fmt: skip
    rollouts(given)
    found = read_labels([given.output])
    assert [policy.text(t.ids) for t in found.traces] == [texts[0], texts[2], texts[1]]
    assert [t.policy for t in found.traces] == ["given", "human", "given"]
    assert [t.correct for t in found.traces] == [False, False, True]
    assert [len(t.step_ends) for t in found.traces] == [3, 1, 2]
    assert {(c.prefix_key, c.policy, c.index) for c in found.completions} == wanted(found, 2)
    # How many seeds would have been sampled does not matter; what is in the file does.
    rollouts(replace(given, n_traces=3))
    file.write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match="was made with another traces_from"):
        rollouts(given)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: not a JSON object"),
        ('{"question": "1+1"}', "give the solution either as text or as ids"),
        ('{"question": "1+1", "text": "A2", "ids": [4]}', "either as text or as ids"),
        ('{"text": "A2"}', "question is None; give problem_id or question as text"),
        ('{"problem_id": 7, "text": "A2"}', "problem_id is 7; give problem_id as text"),
        ('{"question": "1+1", "text": "A2"}', "no problem '1\\+1' among the 1 training"),
        ('{"question": "Q", "text": "x=2"}', "the tokenizer of .+ turns the text into '=2'; give"),
        ('{"question": "Q", "ids": [4, 99]}', "ids must be token ids of the policy.+ 0 to 18"),
        ('{"question": "Q", "ids": [4, 2, 5]}', "end-of-sequence token stands inside the sol"),
        ('{"question": "Q", "ids": [4, 2], "truncated": true}', "truncated is true, but"),
        ('{"question": "Q", "text": "A2", "truncated": "no"}', "truncated is 'no'; give true or"),
        (json.dumps({"question": "Q", "text": "=2\n" * 20}), "tokens, sampler.max_length is 48"),
        ("", "holds no solutions"),
    ],
)
def test_given_solutions_that_cannot_be_used_are_named_by_line(
    config: RolloutsConfig, tmp_path: Path, row: str, said: str
) -> None:
    question = next(config.task.problems("train")).question
    file = tmp_path / "traces.jsonl"
    file.write_text(row.replace('"Q"', json.dumps(question)))
    given = replace(config, output=str(tmp_path / "run"), traces_from=str(file), problems=1,
                    validation_problems=0)  # fmt: skip
    with pytest.raises(UserError, match=said):
        rollouts(given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"shard": "2/2"}, "shard is '2/2'; give i/n with i from 0 to n-1, e.g. 0/16"),
        ({"shard": "x"}, "shard is 'x'; give i/n"),
        ({"shard": "8/9"}, "shard is '8/9', but there are 7 problems; use fewer shards"),
        ({"hours": 0.0}, "hours is 0.0; give a time above 0"),
        ({"traces_from": "nowhere.jsonl"}, "traces_from 'nowhere.jsonl' cannot be read"),
    ],
)
def test_settings_that_make_no_run_are_refused(
    config: RolloutsConfig, tmp_path: Path, setting: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        rollouts(replace(config, output=str(tmp_path / "run"), **setting))
    assert list(tmp_path.iterdir()) == []


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
                  validation_problems=0, grade_timeout=None)  # fmt: skip
    rollouts(cut)
    found = read_labels([cut.output])
    policy = load_policy(config.policy, rule)
    solutions = [(t.ids, t.correct) for t in found.traces]
    solutions += [(c.prefix_ids + c.ids, c.correct) for c in found.completions]
    assert {right for _, right in solutions} == {True, False}
    for ids, right in solutions:
        assert right == (policy.stepper.step_ends(ids)[-1:] == [len(ids)])
