"""Several provers in one run, and which of them to choose: statistics against exact values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import binom

from benchmarks.planted.mdp import Mdp
from data_gen.config import RolloutsConfig
from data_gen.inspect.show import ShowConfig, show
from data_gen.inspect.status import StatusConfig, status
from data_gen.label_run import Run, read_run
from data_gen.provers.command import (
    SelectProverConfig,
    best_of,
    candidates,
    recommend,
    select_prover,
)
from data_gen.provers.statistics import (
    State,
    States,
    covariance,
    of_best_of_k,
    of_policy,
    states_of,
)
from data_gen.rollouts import rollouts
from data_gen.strategies import next_prefix
from pav.cli.run import run as run_command
from pav.core.advantage import alignment, best_of_k, distinguishability
from pav.core.errors import UserError
from pav.core.steps import Stepper, StepRule
from pav.engine.loading import EngineConfig
from pav.labels.tables import Completion, Trace, prefix_key, prefixes, read_labels
from pav.policy.policy import PolicyConfig, Sampler, load_policy
from pav.tasks.tape import Tape
from pav.train.command import TrainConfig, new_card

NAMES = ["base", "prover", "other"]


@pytest.fixture(scope="module")
def siblings(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Three random Llamas with one tokenizer."""
    paths = {"base": tiny_model("llama")}
    for name, columns in (("prover", 1), ("other", 0)):
        path = paths[name] = tmp_path_factory.mktemp("models") / name
        shutil.copytree(paths["base"], path)
        weights = load_file(path / "model.safetensors")
        weights["lm_head.weight"] = weights["lm_head.weight"].flip(columns).contiguous()
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return paths


@pytest.fixture(scope="module")
def pilot(siblings: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> RolloutsConfig:
    """A small run under three policies, two draws in every state."""
    policies = {name: PolicyConfig(str(path), name=name) for name, path in siblings.items()}
    config = RolloutsConfig(
        output=str(tmp_path_factory.mktemp("labels") / "pilot"),
        task=Tape(),
        ignore_warnings=True,
        policy=policies["base"],
        prover=[policies["prover"], policies["other"]],
        sampler=Sampler(max_length=48),
        problems=3,
        validation_problems=1,
        n_traces=4,
        prover_share=0.75,
        n_mc=4,
        branches=1,
        engine=EngineConfig(kv_gib=0.02, max_num_seqs=64),
    )
    rollouts(config)
    return config


def test_three_policies_label_the_same_prefixes_in_one_run(
    pilot: RolloutsConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = read_labels([pilot.output])
    assert labels.policies == sorted(NAMES)
    assert list(labels.manifest["rollout_policies"]) == NAMES
    assert len(set(labels.manifest["rollout_policies"].values())) == 3
    by_policy = {name: {key for key, p in labels.counts if p == name} for name in NAMES}
    assert by_policy["base"] == by_policy["prover"] == by_policy["other"]
    assert {n for _, n in labels.counts.values()} == {4}
    wanted = {prefix_key(t.problem_id, ids) for t in labels.traces for ids in prefixes(t)}
    stepper = load_policy(pilot.policy, pilot.task.step_rule).stepper
    of_base = {prefix_key(t.problem_id, ids) for t in labels.traces for ids in prefixes(t)
               if t.policy == "base"}  # fmt: skip
    branches = {
        prefix_key(c.problem_id, child)
        for c in labels.completions
        if c.policy == "base" and c.index == 0 and c.prefix_key in of_base
        and (child := next_prefix(c, stepper)) is not None
    }  # fmt: skip
    assert by_policy["base"] == wanted | branches > wanted
    # Three quarters of the seeds are the provers', in equal parts as far as that goes.
    per_problem = [t.policy for t in labels.traces if t.problem_id == labels.traces[0].problem_id]
    assert sorted(per_problem) == ["base", "other", "prover", "prover"]

    status(StatusConfig([pilot.output]))
    show(ShowConfig(pilot.output))
    said = capsys.readouterr().out
    for name in NAMES:
        assert f"rollouts of {name}: " in said
        assert f"{name} k/n" in said
    health = json.loads((Path(pilot.output) / "health.json").read_text())
    assert list(health["policies"]) == NAMES
    card = new_card(TrainConfig([pilot.output], trunk=pilot.policy.model), labels, pilot.task)
    assert card.heads == ["q/base", "q/other", "q/prover", "orm"]


def test_provers_are_named_on_a_command_line_one_or_several() -> None:
    seen: list[RolloutsConfig] = []
    for argv in (
        ["--prover", "pav:prover"],
        ["--prover.model", "pav:prover", "--prover.prompt.template", "P {question}"],
        ["--prover", "[{model: pav:prover}, {model: pav:strong, name: s}]"],
        ["--prover=[{model: pav:prover}]"],
    ):
        run_command(seen.append, RolloutsConfig, "x", ["--output", "x", *argv])
    names = [[policy.label for policy in config.policies] for config in seen]
    assert names == [["base", "prover"]] * 2 + [["base", "prover", "s"], ["base", "prover"]]
    assert seen[1].policies[1].prompt.template == "P {question}"


def test_policies_of_one_name_or_another_tokenizer_are_refused(
    pilot: RolloutsConfig, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    one, other = pilot.prover  # type: ignore[misc]
    for provers, said in (
        ([one, replace(other, name="prover")], r"prover '.+' and prover are both called 'prover'"),
        ([one, replace(other, name="base")], "policy and prover are both called 'base'; set prov"),
        ([one, one], "are both called 'prover'; set prover.name"),
        ([one, PolicyConfig(str(tiny_model("llama", "chat")), name="x")], "another tokenizer"),
    ):
        with pytest.raises(UserError, match=said):
            rollouts(replace(pilot, prover=provers, output=str(tmp_path / "run")))
    with pytest.raises(UserError, match="was made with another rollout_policies"):
        rollouts(replace(pilot, prover=one))


def test_pilot_of_three_policies_ends_in_a_recommendation(
    pilot: RolloutsConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    select_prover(SelectProverConfig(pilot.output))
    said = capsys.readouterr().out
    result = json.loads((Path(pilot.output) / "select_prover.json").read_text())
    assert [c["name"] for c in result["candidates"]] == [*NAMES, "bo2"]
    assert result["recommended"] in ("prover", "other", "bo2")
    assert f"recommended: {result['recommended']}: the largest" in said
    assert result["covered"] == 1.0
    assert (Path(pilot.output) / "select_prover.png").stat().st_size > 10_000
    base = result["candidates"][0]
    assert base["distinguishability"] == base["alignment"]
    with pytest.raises(UserError, match=r"best_of holds 4: .+ the labels have 4; give K from 2"):
        select_prover(SelectProverConfig(pilot.output, best_of=[4]))


# Three steps, Q of prover and policy after them, and the policy.
Q_PROVER, Q_BASE, CHANCE = np.array([[0.3, 0.2, 0.8], [0.1, 0.5, 0.9], [0.5, 0.3, 0.2]])


def exact(x: np.ndarray, y: np.ndarray) -> float:
    return float(CHANCE @ (x * y) - (CHANCE @ x) * (CHANCE @ y))


def test_statistics_of_a_state_have_no_bias_though_draws_repeat_and_rollouts_are_shared() -> None:
    n, total = 4, np.zeros((3, 2))
    plug_in = 0.0
    for drawn in product(range(3), repeat=3):
        steps = sorted(set(drawn))
        draws = np.array([drawn.count(a) for a in steps], dtype=float)
        for counts in product(range(n + 1), repeat=len(steps)):
            right = np.array(counts, dtype=float)
            own = np.prod(CHANCE[list(drawn)]) * np.prod(binom.pmf(right, n, Q_BASE[steps]))
            # The prover's counts are independent of the base's; their expectation is enough.
            state = State("p", 1, draws, {"base": right, "prover": n * Q_PROVER[steps]})
            agreement = of_policy(state, "prover", "base", n)[1]
            spread = of_policy(state, "base", "base", n)
            assert spread[0] == spread[1]
            total += own * np.array([[spread[0], agreement], of_best_of_k(state, 1, "base", n),
                                     of_best_of_k(state, 2, "base", n)])  # fmt: skip
            each = np.repeat(right / n, draws.astype(int))
            plug_in += own * each.var(ddof=1)
    best = 1 - (1 - Q_BASE) ** 2
    wanted = [[exact(Q_BASE, Q_BASE), exact(Q_PROVER, Q_BASE)], [exact(Q_BASE, Q_BASE)] * 2,
              [exact(best, best), exact(best, Q_BASE)]]  # fmt: skip
    np.testing.assert_allclose(total, wanted, atol=1e-12)
    assert plug_in > 1.2 * exact(Q_BASE, Q_BASE)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0, 1), st.floats(0, 1)), min_size=2,
                max_size=5))  # fmt: skip
def test_covariance_of_known_values_is_that_of_the_draws(
    steps: list[tuple[int, float, float]],
) -> None:
    draws, x, y = (np.array(column, dtype=float) for column in zip(*steps, strict=True))
    times = draws.astype(int)
    plain = np.cov(np.repeat(x, times), np.repeat(y, times))[0, 1]
    assert covariance(draws, x, y, x * y) == pytest.approx(plain, abs=1e-12)


def test_more_rollouts_than_there_are_cannot_be_asked_for() -> None:
    assert best_of(None, 64) == list(range(2, 33))
    assert best_of(None, 8) == [2, 3, 4]
    assert best_of([4, 2, 4], 8) == [2, 4]
    for k in (1, 5):
        with pytest.raises(UserError, match=rf"best_of holds {k}: .+ give K from 2 to 4"):
            best_of([k], 8)
    state = State("p", 1, np.ones(2), {"base": np.array([1.0, 2.0])})
    with pytest.raises(UserError, match="best-of-10 needs at least 10 rollouts"):
        of_best_of_k(state, 5, "base", 8)


# Four states, three steps; the last position decides. Steps of the policy and of two provers.
MDP = Mdp(np.array([[0, 1, 2], [1, 3, 0], [2, 0, 3], [3, 3, 1]]), np.array([0.0, 1, 0, 1]), 4)
POLICY_SA = np.array([[0.6, 0.1, 0.3], [0.2, 0.2, 0.6], [0.4, 0.4, 0.2], [0.3, 0.1, 0.6]])
PROVERS = {
    "good": np.array([[0.3, 0.6, 0.1], [0.3, 0.6, 0.1], [0.1, 0.1, 0.8], [0.5, 0.4, 0.1]]),
    "bad": np.array([[0.2, 0.0, 0.8], [0.0, 0.0, 1.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]]),
}
STEPPER = Stepper(StepRule(), frozenset([1]), frozenset(), frozenset(), frozenset([2]))


def solution_ids(actions: list[int]) -> list[int]:
    """Two tokens a step, the last one ends the solution."""
    ids = [x for a in actions for x in (10 + a, 1)]
    if len(actions) == MDP.horizon:
        ids[-1] = 2
    return ids


def simulated(problems: int, n: int, branches: int) -> Run:
    """A pilot in the process above: a solution per problem, labelled as ``data_gen`` would."""
    rng = np.random.default_rng(0)
    values = {name: MDP.values(pi) for name, pi in (("base", POLICY_SA), *PROVERS.items())}
    manifest: dict[str, Any] = {
        "rollout_policies": dict.fromkeys(values, "f"),
        "policy": asdict(PolicyConfig(name="base")),
        "n_mc": n,
        "branches": branches,
    }
    run = Run(Path(), manifest)

    def end(state: int, actions: list[int]) -> tuple[list[int], bool]:
        actions = list(actions)
        while len(actions) < MDP.horizon:
            actions.append(int(rng.choice(3, p=POLICY_SA[state])))
            state = int(MDP.next_SA[state, actions[-1]])
        return actions, bool(MDP.reward_S[state])

    def label(pid: str, state: int, actions: list[int]) -> None:
        prefix = solution_ids(actions)
        key = prefix_key(pid, prefix)
        for name, value in values.items():
            for index in range(n):
                if (key, name, index) in run.completions:
                    continue
                if name == "base" and index < branches:
                    whole, right = end(state, actions)
                    ids = solution_ids(whole)[len(prefix) :]
                else:
                    right, ids = bool(rng.random() < value.v[len(actions), state]), [9, 2]
                run.completions[key, name, index] = Completion(
                    key, pid, name, index, prefix, ids, "1", right, False
                )

    for number in range(problems):
        pid = f"p{number}"
        actions, correct = end(0, [])
        ids = solution_ids(actions)
        ends = list(range(2, len(ids) + 1, 2))
        run.traces[pid] = Trace(pid, pid, "q", "1", "train", "base", 0, ids, ends, "1", correct,
                                False)  # fmt: skip
        state = 0
        for step in range(MDP.horizon):
            label(pid, state, actions[:step])
            key = prefix_key(pid, solution_ids(actions[:step]))
            for index in range(branches):
                child = next_prefix(run.completions[key, "base", index], STEPPER)
                if child is not None:
                    action = child[-2] - 10
                    label(pid, int(MDP.next_SA[state, action]), [*actions[:step], action])
            state = int(MDP.next_SA[state, actions[step]])
    return run


def test_estimates_from_a_pilot_hold_the_exact_values_of_a_tabular_case() -> None:
    run = simulated(problems=250, n=8, branches=2)
    states = states_of(run, STEPPER)
    assert states.covered == 1.0
    found = {c.name: c for c in candidates(run, states, [2, 4], seed=0)}
    base, visits = MDP.values(POLICY_SA), MDP.visits(POLICY_SA)
    q = {"base": base.q} | {name: MDP.values(pi).q for name, pi in PROVERS.items()}
    q |= {f"bo{k}": best_of_k(base.q, k) for k in (2, 4)}
    assert q.keys() == found.keys()
    for name, q_HSA in q.items():
        wanted = {
            "distinguishability": sum(
                distinguishability(q_HSA[h], POLICY_SA, visits[h]) for h in range(4)
            ) / 4,
            "alignment": sum(
                alignment(q_HSA[h], base.a[h], POLICY_SA, visits[h]) for h in range(4)
            ) / 4,
        }  # fmt: skip
        for statistic, value in wanted.items():
            error = found[name].resampled[statistic].std()
            assert abs(found[name].values[statistic] - value) < 3 * error, (name, statistic)
            assert error < 0.15 * abs(wanted["distinguishability"]) + 0.004
    # Squares of k/n would have told another story.
    for name in ("base", "good"):
        each = [
            s.visits * np.repeat(s.right_C[name] / 8, s.draws_C.astype(int)).var(ddof=1)
            for s in states.states
        ]
        assert sum(each) / states.visits > 1.1 * found[name].values["distinguishability"]
    assert found["base"].success == pytest.approx(base.success, abs=0.05)
    assert found["bo4"].success == pytest.approx(1 - (1 - base.success) ** 4, abs=0.05)
    name, reason = recommend([*found.values()], "base")
    sums = {n: c.values["sum"] for n, c in found.items() if n != "base"}
    assert sums[name] == max(sums.values())
    assert "Theorem 3.1" in reason and "its lead over" in reason


def test_states_with_one_draw_are_left_out_and_that_is_said() -> None:
    run = simulated(problems=20, n=4, branches=0)
    states = states_of(run, STEPPER)
    assert (states.states, states.covered) == ([], 0.0)
    # A second solution of the problem draws once more in the states that both pass through.
    first = run.traces["p0"]
    run.traces["again"] = replace(first, trace_id="again", seed_index=1)
    states = states_of(run, STEPPER)
    assert [s.problem_id for s in states.states] == ["p0"] * 4
    assert states == States(states.states, 4, 84)
    assert states.covered == pytest.approx(8 / 84)
    # Another writer's draws are no draws of the base.
    run.traces["again"] = replace(first, trace_id="again", policy="good")
    assert states_of(run, STEPPER).states == []


def test_run_without_two_draws_anywhere_says_what_pilot_is_needed(
    pilot: RolloutsConfig, tmp_path: Path
) -> None:
    shutil.copytree(pilot.output, tmp_path / "run")
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"branches": None, "n_mc": 1}
    path.write_text(json.dumps(manifest))
    assert read_run(tmp_path / "run").base == "base"
    with pytest.raises(UserError, match="label a pilot with n_mc of 4 or more and branches of 1"):
        select_prover(SelectProverConfig(str(tmp_path / "run")))
