"""Tools on label runs: regrade, show, merge, status and health; none of them samples anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from data_gen import label_run as runs_module
from data_gen import regrade as regrade_module
from data_gen.config import RolloutsConfig
from data_gen.inspect.health import health_of, label_noise, print_health, write_health
from data_gen.inspect.show import ShowConfig, main, show
from data_gen.inspect.status import StatusConfig, status
from data_gen.label_run import Run, read_run
from data_gen.likelihood.command import write_part
from data_gen.merge import MergeConfig, merge
from data_gen.regrade import RegradeConfig, regrade
from data_gen.rollouts import _manifest
from data_gen.store import Store
from pav.core.errors import UserError
from pav.core.journal import JOURNAL, journal_line
from pav.core.steps import StepRule
from pav.labels.tables import (
    LIKELIHOODS,
    Completion,
    Trace,
    likelihood_rows,
    prefix_key,
    prefixes,
    read_labels,
)
from pav.policy.policy import Policy, PolicyConfig, Sampler, load_policy
from pav.tasks.base import Grade, Problem
from pav.tasks.tape import Tape

FINGERPRINTS = {"base": "f", "prover": "g"}


@dataclass(frozen=True)
class Buggy(Tape):
    """The tape with a bug in its grader: every even answer is wrong."""

    def grade(self, text: str, problem: Problem) -> Grade:
        grade = super().grade(text, problem)
        even = grade.answer is not None and int(grade.answer) % 2 == 0
        return replace(grade, correct=grade.correct and not even)


@pytest.fixture(scope="module")
def policy(tiny_model: Callable[..., Path]) -> Policy:
    return load_policy(PolicyConfig(str(tiny_model("llama")), name="base"), StepRule())


def run_config(policy: Policy, task: Tape = Tape(), **changes: Any) -> RolloutsConfig:  # noqa: B008
    prover = replace(policy.config, name="prover")
    return RolloutsConfig("unused", task, policy.config, prover, Sampler(max_length=64), **changes)


def manifest_of(config: RolloutsConfig, policy: Policy) -> dict[str, Any]:
    return _manifest(config, [policy]) | {"rollout_policies": FINGERPRINTS}


def records(
    policy: Policy, problems: list[Problem], task: Tape, n: int = 2, split: str = "train"
) -> list[Trace | Completion]:
    """Per problem a right and a wrong trace of three steps, n rollouts per prefix and policy.

    Rollouts finish at once: base's answer is right for every second index, prover's always.
    """

    def graded(ids: list[int], problem: Problem) -> Grade:
        return task.grade(policy.text(ids), problem)

    found: list[Trace | Completion] = []
    eos = policy.tokenizer.eos_token_id

    def encode(text: str) -> list[int]:
        return list(policy.tokenizer.encode(text, add_special_tokens=False)) + [eos]

    for problem in problems:
        answers = [int(problem.gold or 0), (int(problem.gold or 0) + 1) % 100]
        for seed, answer in enumerate(answers):
            ids = encode(f"1+{seed}=1\n={answer}\nA{answer}")
            grade = graded(ids, problem)
            trace = Trace(
                f"{problem.id}/base/{seed}", problem.id, problem.question, problem.gold, split,
                "base", seed, ids, policy.stepper.step_ends(ids), grade.answer, grade.correct,
                False,
            )  # fmt: skip
            found.append(trace)
            for prefix in prefixes(trace):
                key = prefix_key(problem.id, prefix)
                for name in FINGERPRINTS:
                    for index in range(n):
                        end = encode(f"A{answers[index % 2 if name == 'base' else 0]}")
                        g = graded(prefix + end, problem)
                        found.append(Completion(key, problem.id, name, index, prefix, end,
                                                g.answer, g.correct, False))  # fmt: skip
    return found


def write(
    directory: Path, manifest: dict[str, Any], content: list[Trace | Completion], seal: bool = True
) -> Path:
    with Store(directory, manifest) as store:
        store.announce(len([r for r in content if isinstance(r, Trace)]))
        for record in content:
            store.add(record)
        if seal:
            store.seal(FINGERPRINTS)
    return directory


def some_problems(n: int) -> list[Problem]:
    return list(islice(Tape().problems("train"), n))


@pytest.fixture
def made(policy: Policy, tmp_path: Path) -> Path:
    content = records(policy, some_problems(4), Tape())
    return write(tmp_path / "run", manifest_of(run_config(policy), policy), content)


def tables(directory: Path) -> dict[str, list[dict[str, Any]]]:
    names = ("traces", "labels", "completions")
    return {name: pq.read_table(directory / name).to_pylist() for name in names}


def test_regrading_after_a_planted_bug_gives_the_tables_of_a_run_without_it(
    policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    problems = some_problems(6)
    even = sum(int(p.gold or 0) % 2 == 0 for p in problems)
    assert 0 < even < 6
    ill = Buggy()
    manifest = manifest_of(run_config(policy, ill), policy)
    run = write(tmp_path / "run", manifest, records(policy, problems, ill))
    sound = write(tmp_path / "sound", manifest, records(policy, problems, Tape()))
    assert tables(run) != tables(sound)

    # The code of the task is mended; its settings are what they were.
    monkeypatch.setattr(Buggy, "grade", Tape.grade)
    with pytest.raises(UserError, match="which is not built in and is not imported on a file's"):
        regrade(RegradeConfig(str(run)))
    regrade(RegradeConfig(str(run), ill, None))
    assert tables(run) == tables(sound)
    said = capsys.readouterr().out
    # 5 distinct prefixes: of 10 rollouts of base 5 were wrongly graded, of prover all.
    assert f"traces: {even} grades changed ({even} wrong -> right, 0 right -> wrong), 0" in said
    assert f"rollouts: {15 * even} grades changed ({15 * even} wrong -> right, 0 right" in said
    assert f"labels: {10 * even} counts hold a changed grade" in said
    assert json.loads((run / "manifest.json").read_text()) == json.loads(json.dumps(manifest))
    regrade(RegradeConfig(str(run), ill, None))
    assert "traces: 0 grades changed" in capsys.readouterr().out
    # pav.train takes them as before, and the run goes on as before.
    assert len(read_labels([str(run), str(sound)]).traces) == 12
    with Store(run, manifest):
        pass


def test_regrading_with_another_grader_changes_the_task_that_the_labels_name(
    policy: Policy, made: Path
) -> None:
    with pytest.raises(UserError, match=r"task.step_rule is .+ regrading cannot cut steps anew"):
        regrade(RegradeConfig(str(made), Tape(step_rule=StepRule(max_tokens=9))))
    harder = Tape(n_ops=9)  # a setting that grading does not depend on
    regrade(RegradeConfig(str(made), harder))
    assert json.loads((made / "manifest.json").read_text())["task"] == harder.fingerprint


def test_death_while_regrading_is_mended_by_the_same_command(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems, ill = some_problems(6), Buggy()
    manifest = manifest_of(run_config(policy, ill), policy)
    run = write(tmp_path / "run", manifest, records(policy, problems, ill))
    sound = write(tmp_path / "sound", manifest, records(policy, problems, Tape()))
    monkeypatch.setattr(Buggy, "grade", Tape.grade)
    write_table, left = Store._write, 1

    def dying(self: Store, *arguments: Any) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        write_table(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_write", dying)
        with pytest.raises(KeyboardInterrupt):
            regrade(RegradeConfig(str(run), ill, None))
    regrade(RegradeConfig(str(run), ill, None))
    assert tables(run) == tables(sound)


def test_show_prints_counts_q_and_a_of_every_step(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = some_problems(2)[1]
    monkeypatch.setattr(sys, "argv", ["data_gen.show", str(made), "--problem", "1"])
    main()
    said = capsys.readouterr().out
    assert said.startswith(f"problem {problem.id} (train), answer {problem.gold}\n")
    assert problem.question in said
    right, wrong = said.split("\nbase ")[1:]
    assert right.startswith(f"0: right, answer {problem.gold}\n")
    rows = [line.split() for line in right.splitlines()[1:] if line]
    assert rows[0] == ["step", "text", "base", "k/n", "Q", "A", "prover", "k/n", "Q", "A"]
    assert rows[1][:1] + rows[1][3:] == ["0", "1/2", "0.50", "2/2", "1.00"]
    assert rows[2] == ["1", "1+0=1", "1/2", "0.50", "+0.00", "2/2", "1.00", "+0.00"]
    assert rows[4] == ["3", f"A{problem.gold}", "end", "1.00", "+0.50", "end", "1.00", "+0.00"]
    last = [line.split() for line in wrong.splitlines() if line][-1]
    assert last[2:] == ["end", "0.00", "-0.50", "end", "0.00", "-1.00"]
    # By id it is the same problem.
    show(ShowConfig(str(made), problem.id))
    assert capsys.readouterr().out == said
    with pytest.raises(UserError, match=r"problem is '4'; give a number below 4"):
        show(ShowConfig(str(made), "4"))


def test_show_escapes_what_a_terminal_would_obey(
    policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = replace(some_problems(1)[0], question="\x1b]0;owned\x07\x9b2J\u202e[red]1+1[/red]")
    content = records(policy, [problem], Tape())
    content = [replace(r, answer="\x1b[31m7") if isinstance(r, Trace) else r for r in content]
    run = write(tmp_path / "run", manifest_of(run_config(policy), policy), content)
    show(ShowConfig(str(run)))
    said = capsys.readouterr().out
    assert "\\x1b]0;owned\\x07\\x9b2J\\u202e[red]1+1[/red]\n" in said
    assert "right, answer \\x1b[31m7\n" in said
    assert not set(said) & set("\x1b\x07\x9b\u202e")


def test_merged_shards_read_as_the_whole_run_and_load_as_data_sets(
    policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import load_dataset

    problems = some_problems(4)
    parts = []
    for i in range(2):
        manifest = manifest_of(run_config(policy, shard=f"{i}/2"), policy)
        content = records(policy, problems[i::2], Tape())
        parts.append(str(write(tmp_path / str(i), manifest, content, seal=i == 0)))
    output = str(tmp_path / "merged")
    for _ in range(2):  # the same command once more changes nothing
        merge(MergeConfig(output, parts))
    said = capsys.readouterr().out
    assert "2 runs: 8 traces, 80 rollouts" in said
    merged = read_labels([output])
    whole = write(tmp_path / "whole", manifest_of(run_config(policy), policy),
                  records(policy, problems, Tape()))  # fmt: skip
    assert merged.counts == read_labels([str(whole)]).counts
    assert {t.trace_id: t for t in merged.traces} == read_run(whole).traces
    table = load_dataset("parquet", data_files=f"{output}/labels/*.parquet", split="train",
                         cache_dir=str(tmp_path / "cache"))  # fmt: skip
    assert len(table) == len(merged.counts) == 40
    # A run beside its own merger counts once.
    again = str(tmp_path / "again")
    merge(MergeConfig(again, [output, parts[0]]))
    assert read_labels([again]).counts == merged.counts
    assert "40 rollouts stand in several runs and count once" in capsys.readouterr().out
    # A merged run is finished: no other run may write there.
    with pytest.raises(UserError, match="was made with another"):
        Store(Path(output), manifest_of(run_config(policy), policy))


def stopped(policy: Policy, directory: Path, shard: int, labelled: int, of: int = 4) -> str:
    """Shard ``shard`` of 3 that ``--hours`` stopped: so many of its solutions are labelled."""
    problems = some_problems(3 * of // 2)[shard::3]
    content = records(policy, problems, Tape())
    done = {r.trace_id for r in [t for t in content if isinstance(t, Trace)][:labelled]}
    with Store(directory, manifest_of(run_config(policy, shard=f"{shard}/3"), policy)) as store:
        store.announce(of)
        names = {t.problem_id for t in content if isinstance(t, Trace) and t.trace_id in done}
        for record in content:
            # The others are sampled, and have no rollouts.
            if isinstance(record, Trace) or record.problem_id in names:
                store.add(record)
        store.seal(FINGERPRINTS, owed=of - labelled)
    return str(directory)


def test_merge_of_what_is_not_finished_says_what_is_missing_and_needs_partial(
    policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "merged")
    parts = [stopped(policy, tmp_path / "0", 0, 4), stopped(policy, tmp_path / "1", 1, 2)]
    lack = f"shard 2/3 is missing beside {parts[0]!r}; {parts[1]!r} has 2 of 4 solutions"
    with pytest.raises(UserError) as refused:
        merge(MergeConfig(output, parts))
    assert str(refused.value) == (
        f"labels are not complete: {lack}; let the commands that make them finish, or merge what "
        "is there with --partial true"
    )
    assert not (tmp_path / "merged").exists()
    for _ in range(2):  # the same command once more changes nothing
        merge(MergeConfig(output, parts, partial=True))
        assert f"WARNING: the merged run is partial: {lack}" in capsys.readouterr().err
    # Whoever reads the merged run, or the shards themselves, is told the same.
    assert read_labels([output]).warnings == [f"labels are not complete: {lack}"]
    assert read_labels(parts).warnings == [f"labels are not complete: {lack}"]
    status(StatusConfig([output]))
    said = capsys.readouterr().out
    assert f"{output} is partial: {lack}" in said and " partial\n" in said
    # Both shards go on; what was merged before counts as the shards that it is made of.
    stopped(policy, tmp_path / "1", 1, 4)
    last = stopped(policy, tmp_path / "2", 2, 4)
    merge(MergeConfig(str(tmp_path / "whole"), [output, parts[1], last]))
    assert read_labels([str(tmp_path / "whole")]).warnings == []
    assert len(read_run(tmp_path / "whole").traces) == 12
    # The first one is brought up to date by its own command.
    merge(MergeConfig(output, parts, partial=True))
    (said,) = read_labels([output]).warnings
    assert said == f"labels are not complete: shard 2/3 is missing beside {parts[0]!r}"


def test_run_of_a_version_that_did_not_write_down_what_is_owed_is_merged(
    policy: Policy, tmp_path: Path
) -> None:
    """What is owed is told by its solutions and rollouts; where no total is known, it is whole."""
    old = Path(stopped(policy, tmp_path / "old", 0, 2))
    entry = {"solutions": 4, "at": 0.0}
    (old / JOURNAL).write_bytes(journal_line("run", entry, 1.0))
    one = MergeConfig(str(tmp_path / "out"), [str(old)])
    with pytest.raises(UserError, match=rf"shards 1/3, 2/3 are .+; '{old}' has 2 of 4 solutions;"):
        merge(one)
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["shard"]
    (old / "manifest.json").write_text(json.dumps(manifest | {"n_mc": 0}))
    (old / JOURNAL).unlink()
    merge(one)
    assert read_labels([one.output]).warnings == []


def test_merged_runs_bring_their_likelihoods_each_once(
    policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = some_problems(2)
    parts = []
    for i, problem in enumerate(problems):
        manifest = manifest_of(run_config(policy, shard=f"{i}/2"), policy)
        part = write(tmp_path / str(i), manifest, records(policy, [problem], Tape()))
        parts.append(str(part))
        # Both know one row of the first problem.
        write_part(part / LIKELIHOODS, likely(problems[: i + 1]))
    output = tmp_path / "merged"
    for _ in range(2):  # the same command once more changes nothing
        merge(MergeConfig(str(output), parts))
    assert "  2 likelihoods" in capsys.readouterr().out
    assert likelihood_rows(output) == likely(problems)
    write_part(Path(parts[1]) / LIKELIHOODS, likely(problems[:1], fingerprint="h"))
    with pytest.raises(
        UserError, match=r"likelihoods of two policies called 'base' \(fingerprints"
    ):
        merge(MergeConfig(str(tmp_path / "other"), parts))
    # Rows of older versions do not tell the prompt; two that do must agree.
    shutil.rmtree(Path(parts[1]) / LIKELIHOODS)
    for part, prompt in zip(parts, ("x", "y"), strict=True):
        told = [row | {"prompt_ids": prompt} for row in likely(problems[:1])]
        write_part(Path(part) / LIKELIHOODS, told)
    with pytest.raises(UserError, match=r"two policies called 'base' \(prompt ids x and y\)"):
        merge(MergeConfig(str(tmp_path / "other"), parts))
    assert not (tmp_path / "other").exists()


def likely(problems: list[Problem], fingerprint: str = "g") -> list[dict[str, Any]]:
    return [
        {"prefix_key": prefix_key(p.id, []), "problem_id": p.id, "policy": "base",
         "policy_fingerprint": fingerprint, "answer": f"A{p.gold}", "answer_tokens": 3,
         "logprob": -1.5}
        for p in problems
    ]  # fmt: skip


def test_runs_that_disagree_are_not_merged(policy: Policy, made: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "merged")
    manifest = manifest_of(run_config(policy), policy)
    content = records(policy, some_problems(1), Tape())
    hot = manifest | {"sampler": {"temperature": 2.0}}
    other = str(write(tmp_path / "hot", hot, content))
    with pytest.raises(UserError, match="disagree on sampler"):
        merge(MergeConfig(output, [str(made), other]))
    twin = manifest | {"rollout_policies": FINGERPRINTS | {"prover": "h"}}
    other = str(write(tmp_path / "twin", twin, content))
    with pytest.raises(UserError, match="call two rollout policies 'prover': fingerprints h and g"):
        merge(MergeConfig(output, [str(made), other]))
    with pytest.raises(UserError, match="is one of the runs to merge"):
        merge(MergeConfig(str(made), [str(made)]))
    with pytest.raises(UserError, match="labels is empty"):
        merge(MergeConfig(output))
    with pytest.raises(UserError, match=r"has no manifest.json"):
        merge(MergeConfig(output, [str(tmp_path / "nowhere")]))
    assert not (tmp_path / "merged").exists()


def test_status_of_a_running_run_is_right_and_leaves_it_alone(
    policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = records(policy, some_problems(2), Tape())
    run = tmp_path / "run"
    with Store(run, manifest_of(run_config(policy, n_mc=2), policy)) as store:
        store.announce(8)
        for record in content:
            store.add(record)
        # What the writer is writing right now.
        with (run / JOURNAL).open("ab") as journal:
            journal.write(b'12345678 {"kind":"compl')
        before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.iterdir()}
        status(StatusConfig([str(run)]))
        assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.iterdir()} == before
        said = capsys.readouterr().out
        assert "4/8" in said
        assert "last rollout 0 s ago" in said
        assert "rollouts of base: 0.500 of 20 right, 0.0% truncated" in said
        assert "rollouts of prover: 1.000 of 20 right" in said
        os.truncate(run / JOURNAL, store._size)
        store.seal(FINGERPRINTS)
    status(StatusConfig([str(run)]))
    assert "stopped, sealed" in capsys.readouterr().out
    with pytest.raises(UserError, match="labels is empty"):
        status(StatusConfig())


def test_status_counts_solutions_whose_branches_are_owed_as_not_done(
    policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = records(policy, some_problems(1), Tape())
    line = policy.tokenizer.encode("=1\n", add_special_tokens=False)
    branched = [
        replace(r, ids=line + r.ids) if isinstance(r, Completion) and not r.prefix_ids else r
        for r in content
    ]
    for name, records_, done in (("ended", content, 2), ("branched", branched, 0)):
        config = run_config(policy, n_mc=2, branches=1)
        run = write(tmp_path / name, manifest_of(config, policy), records_, seal=False)
        status(StatusConfig([str(run)]))
        assert f" {done}/2 " in capsys.readouterr().out


def test_rates_are_those_of_the_last_ten_minutes_of_work() -> None:
    from data_gen.inspect.status import rates

    slow = [(float(t), 10) for t in range(0, 1000, 100)]
    fast = [(1000 + t / 2, 30) for t in range(1201)]
    run = Run(Path(), {}, pace=slow + fast)
    per_second, tokens = rates(run)
    assert per_second == pytest.approx(2, rel=0.01)
    assert tokens == pytest.approx(60, rel=0.01)
    assert rates(Run(Path(), {})) == (0, 0)


@given(st.floats(0.001, 0.999), st.integers(2, 12))
def test_label_noise_is_unbiased(q: float, n: int) -> None:
    k = np.arange(n + 1)
    variances = [label_noise([[int(i), n]])[0] ** 2 for i in k]
    assert float(binom.pmf(k, n, q) @ variances) == pytest.approx(q * (1 - q) / n, abs=1e-9)


def test_label_noise_of_single_rollouts_is_called_a_limit() -> None:
    assert label_noise([[1, 1], [0, 1], [0, 1], [0, 1]]) == (pytest.approx(np.sqrt(3) / 4), True)
    assert label_noise([]) == (0.0, False)
    # Prefixes with more rollouts decide where there are any.
    assert label_noise([[1, 1], [0, 1], [2, 2]]) == (0.0, False)


def test_health_counts_what_went_wrong(policy: Policy, made: Path) -> None:
    run = read_run(made)
    problem = some_problems(1)[0]
    # One more trace: an exact duplicate; two more rollouts of a known prefix: cut, and a duplicate.
    first = next(iter(run.traces.values()))
    run.traces["again"] = replace(first, trace_id="again", seed_index=9)
    old = next(c for c in run.completions.values() if c.policy == "base")
    cut = replace(old, index=5, ids=[4], answer=None, correct=False, truncated=True)
    for c in (cut, replace(old, index=6)):
        run.completions[c.prefix_key, c.policy, c.index] = c
    health = health_of(run)
    assert health["problems"] == 4
    assert health["labels"] == 4 * 5 * 2
    assert health["rollouts"] == 82
    assert health["tokens"] == sum(len(r.ids) for r in [*run.traces.values(),
                                                        *run.completions.values()])  # fmt: skip
    seeds, base, prover = health["seeds"]["base"], *health["policies"].values()
    assert seeds["solutions"] == 9
    assert seeds["duplicates"] == pytest.approx(1 / 9)
    assert seeds["right"] == pytest.approx(5 / 9)
    assert base["rollouts"] == 42
    assert base["truncated"] == base["unparsed"] == pytest.approx(1 / 42)
    assert base["duplicates"] == pytest.approx(1 / 42)
    assert prover["duplicates"] == 0.5  # its rollouts of a prefix are all alike
    assert prover["unique_answers_per_problem"] == 1
    assert [s["prefixes"] for s in base["steps"]] == [4, 8, 8]
    assert base["steps"][1]["histogram"] == [0, 0, 8, 0, 0]
    assert prover["steps"][1]["histogram"] == [0, 0, 0, 0, 8]
    assert base["first_error"] == {} and base["wrong_without_error_step"] == 1.0
    # With the rollouts of the second step of the wrong trace all wrong, the first error is there.
    wrong = next(t for t in run.traces.values() if not t.correct and t.problem_id == problem.id)
    key = prefix_key(problem.id, wrong.ids[: wrong.step_ends[1]])
    for where, c in list(run.completions.items()):
        if c.prefix_key == key and c.policy == "base":
            run.completions[where] = replace(c, correct=False)
    again = health_of(run)["policies"]["base"]
    assert again["first_error"] == {"2": 1}
    assert again["wrong_without_error_step"] == pytest.approx(3 / 4)


@pytest.mark.parametrize(("right", "contaminated"), [(52, True), (45, False), (36, False)])
def test_base_that_knows_the_label_problems_is_called_contaminated(
    policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str], right: int,
    contaminated: bool,
) -> None:  # fmt: skip
    run = Run(tmp_path, manifest_of(run_config(policy), policy))
    for split, good in (("train", right), ("validation", 30)):
        for i in range(100):
            name = f"{split}{i}/base/0"
            run.traces[name] = Trace(name, f"{split}{i}", "1+1", "2", split, "base", 0, [5, 2],
                                     [2], "2", i < good, False)  # fmt: skip
    health = write_health(run)
    accuracy = health["base_accuracy"]
    assert accuracy["difference"] == pytest.approx((right - 30) / 100)
    low, high = accuracy["ci95"]
    assert low < accuracy["difference"] < high
    # Where chance alone may have put it above the limit of 0.05 nothing is claimed.
    assert accuracy["contaminated"] == contaminated == (low > 0.05)
    print_health(health, tmp_path)
    said = capsys.readouterr()
    assert ("WARNING: labels are contaminated" in said.err) == contaminated
    assert (tmp_path / "health.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "health.json").read_text()) == json.loads(json.dumps(health))


OFFLINE = """
import os, socket, sys
def refused(*_): raise OSError("no network")
socket.socket.connect = socket.create_connection = refused
import huggingface_hub.constants
assert huggingface_hub.constants.HF_HUB_OFFLINE
from data_gen import merge, regrade
from data_gen.inspect import show, status
run, merged = sys.argv[1:]
for module, *argv in ((status, run), (show, run), (regrade, run), (merge, run, "--output", merged)):
    sys.argv = [module.__name__, *argv]
    module.main()
"""


def test_tools_need_no_hub(made: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(made), str(tmp_path / "merged")],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pav.train needs solutions of both splits" in done.stdout
    assert (tmp_path / "merged" / "labels").is_dir()


def test_tools_say_in_one_line_what_is_wrong_with_a_directory(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["data_gen.regrade", *argv])
        with pytest.raises(SystemExit) as ended:
            regrade_module.main()
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        return said

    assert "has no manifest.json; give a directory that data_gen" in refused(str(tmp_path))
    assert "give one directory, not 2" in refused(str(made), str(made))
    with Store(made, read_run(made).manifest):
        assert f"is being written by process {os.getpid()}" in refused(str(made))
    monkeypatch.setattr(runs_module, "tokenizer_fingerprint", lambda _: "other")
    assert "were made with another tokenizer than" in refused(str(made))
    (made / "manifest.json").write_text('{"task":')
    assert "manifest.json' cannot be read" in refused(str(made))
