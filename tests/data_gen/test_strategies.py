"""How rollouts are spent: allocation as pure functions, then on real policies, also killed."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom

from data_gen.config import RolloutsConfig
from data_gen.inspect.show import ShowConfig, show
from data_gen.inspect.status import StatusConfig, status
from data_gen.rollouts import rollouts
from data_gen.strategies import (
    Plan,
    Strategy,
    adaptive,
    allocate,
    gain,
    next_rollouts,
    plan_of,
    spread,
)
from pav.core.errors import UserError
from pav.core.journal import JOURNAL
from pav.core.steps import Stepper, StepRule
from pav.engine.loading import EngineConfig
from pav.labels.tables import (
    Completion,
    Key,
    LabelSet,
    Trace,
    count,
    prefix_key,
    prefixes,
    read_labels,
)
from pav.policy.policy import PolicyConfig, Sampler, load_policy
from pav.tasks.tape import Tape
from tests.data_gen.test_crash import Driver, acknowledged

POLICIES = ("base", "prover")
# Two tokens a step: something, then 1; 2 ends a solution.
STEPPER = Stepper(StepRule(), frozenset([1]), frozenset(), frozenset(), frozenset([2]))


def solution(steps: int, correct: bool, problem: str = "p", seed: int = 0) -> Trace:
    ids = [x for step in range(steps) for x in (10 + seed * 100 + step, 1)]
    ids[-1] = 2
    ends = list(range(2, 2 * steps + 1, 2))
    return Trace(f"{problem}/{seed}", problem, "1", "1", "train", "base", seed, ids, ends, "1",
                 correct, False)  # fmt: skip


class World:
    """Outcomes of all rollouts that there could be, drawn once and for all."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def rollout(self, key: str, prefix: list[int], policy: str, index: int) -> Completion:
        rng = Random(f"{self.seed}/{key}/{policy}")
        q = rng.choice([0.0, rng.random(), rng.random(), 1.0])
        rng = Random(f"{self.seed}/{key}/{policy}/{index}")
        right = rng.random() < q
        ids = [50 + rng.randrange(3), 1, 60, 2]
        return Completion(key, "p", policy, index, prefix, ids, "1", right, False)


def play(
    plan: Plan, traces: list[Trace], world: World, done: Mapping[Key, Completion] | None = None
) -> dict[Key, Completion]:
    """Work on solutions, one after the other, until none wants more."""
    finished = dict(done or {})
    for trace in traces:
        while requests := next_rollouts(plan, trace, finished, STEPPER):
            assert len({(r.key, r.policy, r.index) for r in requests}) == len(requests)
            for r in requests:
                where = (r.key, r.policy, r.index)
                assert where not in finished
                finished[where] = world.rollout(r.key, r.prefix, r.policy, r.index)
    return finished


plans = st.builds(
    Plan,
    st.just(POLICIES),
    st.integers(0, 6),
    st.sampled_from(["all_prefixes", "first_pit", "adaptive"]),
    st.sampled_from([None, 2, 3, 5]),
)
strategies_: list[Strategy] = ["all_prefixes", "first_pit", "adaptive"]


@settings(deadline=None, max_examples=40)
@given(plans, st.integers(0, 10**6), st.data())
def test_requests_do_not_depend_on_when_a_run_was_killed_or_on_the_order_of_solutions(
    plan: Plan, seed: int, data: st.DataObject
) -> None:
    world = World(seed)
    traces = [solution(data.draw(st.integers(1, 9)), data.draw(st.booleans()), seed=i)
              for i in range(3)]  # fmt: skip
    if plan.n_mc and plan.strategy == "all_prefixes":
        plan = replace(plan, branches=data.draw(st.integers(0, plan.n_mc)))
    whole = play(plan, traces, world)
    # Killed at any moment: any part of what is asked for may be there.
    kept = data.draw(st.sets(st.sampled_from(sorted(whole)))) if whole else set()
    assert play(plan, traces, world, {key: whole[key] for key in kept}) == whole
    assert play(plan, traces[::-1], world) == whole
    # A solution alone asks for its part of it.
    assert play(plan, traces[:1], world).items() <= whole.items()


@settings(deadline=None, max_examples=60)
@given(plans, st.integers(0, 10**6), st.integers(1, 12), st.booleans())
def test_no_strategy_exceeds_the_budget_and_labels_skip_no_number(
    plan: Plan, seed: int, steps: int, correct: bool
) -> None:
    trace = solution(steps, correct)
    done = play(plan, [trace], World(seed))
    labelled = spread(steps, plan.max_labelled_prefixes)
    for policy in POLICIES:
        own: dict[str, list[int]] = {}
        for key, name, index in done:
            if name == policy:
                own.setdefault(key, []).append(index)
        assert all(sorted(v) == list(range(len(v))) for v in own.values())
        assert sum(map(len, own.values())) <= plan.n_mc * len(labelled)
        if plan.strategy == "adaptive":
            # The writer's own ending is the first label; the others have one rollout each.
            if policy != trace.policy:
                assert len(own) == (len(labelled) if plan.n_mc else 0)
        else:
            assert {len(v) for v in own.values()} <= {plan.n_mc}
            # All policies label the same prefixes.
            assert own.keys() == {key for key, _, _ in done}
    everything = play(replace(plan, strategy="all_prefixes"), [trace], World(seed))
    assert {key for key, _, _ in done} <= {key for key, _, _ in everything}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0, 1), st.integers(1, 80)), min_size=1,
                max_size=10), st.integers(1, 12), st.booleans())  # fmt: skip
def test_adaptive_adds_where_a_token_teaches_most_and_more_than_in_a_new_solution(
    cells: list[tuple[int, float, int]], n_mc: int, own: bool
) -> None:
    n = np.array([n for n, _, _ in cells])
    k = np.array([round(n * share) for n, share, _ in cells])
    left = np.array([left for _, _, left in cells])
    made = n - int(own)
    more = adaptive(k, n, made, n_mc, left)
    assert set(more) <= {0, 1}
    assert made.sum() + more.sum() <= max(made.sum(), n_mc * len(n))
    # Jeffreys' prior has a variance of 1/8, and half of it is left after a rollout. A new solution
    # labels all its prefixes for its own tokens.
    new = len(n) / 16 / left.max()
    a, b = k + 0.5, n - k + 0.5
    variance = a * b / ((a + b) ** 2 * (a + b + 1))
    worth = variance / (a + b + 1) / left
    assert (worth[more > 0] > new).all()
    if more.any() and made.sum() + more.sum() < n_mc * len(n):
        assert (more > 0).sum() == (worth > new).sum()
    if more.any() and (more == 0).any():
        assert worth[more > 0].min() >= worth[more == 0].max()


@given(st.integers(0, 30), st.integers(0, 30))
def test_gain_is_the_expected_fall_of_the_variance_of_q(k: int, other: int) -> None:
    n, a, b = k + other, k + 0.5, other + 0.5
    q = a / (a + b)
    after = q * beta(a + 1, b).var() + (1 - q) * beta(a, b + 1).var()
    assert gain(np.array([k]), np.array([n]))[0] == pytest.approx(beta(a, b).var() - after)


def test_adaptive_repeats_short_rollouts_and_leaves_long_ones_for_new_solutions() -> None:
    left = np.array([70, 60, 50, 40, 30, 20, 10, 3])
    zero = np.zeros(8, int)
    assert adaptive(zero, zero, zero, 4, left).tolist() == [1] * 8
    assert not adaptive(zero, zero, zero, 0, left).any()
    # The solution's own ending is there: no first round.
    once = zero + 1
    left[7] = 2
    assert adaptive(zero, once, zero, 4, left).tolist() == [0] * 7 + [1]
    # A run without a budget for more has n_mc 0.
    assert not adaptive(zero, once, zero, 0, left).any()
    # Repeated until it is known; longer where the outcomes differ.
    left[7], n = 1, np.array([1] * 7 + [3])
    assert adaptive(np.array([0] * 7 + [1]), n, n - 1, 4, left)[7] == 1
    assert adaptive(np.array([0] * 7 + [3]), n, n - 1, 4, left)[7] == 0


def test_optional_stopping_leaves_the_sum_of_k_minus_n_q_without_bias() -> None:
    q, n_mc, left = [0.3, 0.9, 0.6], 4, np.array([40, 3, 2])

    def expected(ending: int, k: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, float]:
        """(sum of k - n Q over what was sampled, mean of k/n), over all courses from here."""
        more = adaptive(k + ending, n + 1, n, n_mc, left)
        if not more.any():
            return k - n * q, float(((k + ending) / (n + 1)).mean())
        total, mean = np.zeros(3), 0.0
        for drawn in np.ndindex(*(more + 1)):
            chance = float(np.prod(binom.pmf(drawn, more, q)))
            score, value = expected(ending, k + drawn, n + more)
            total, mean = total + chance * score, mean + chance * value
        return total, mean

    zero, means = np.zeros(3, int), []
    for ending in (0, 1):
        score, mean = expected(ending, zero, zero)
        np.testing.assert_allclose(score, 0, atol=1e-12)
        means.append(mean)
    assert means[0] < np.mean(q) < means[1]


@given(st.integers(1, 60), st.integers(2, 20))
def test_labelled_prefixes_are_spread_evenly_with_both_ends(count: int, most: int) -> None:
    chosen = spread(count, most)
    assert len(chosen) == min(count, most) == len(set(chosen))
    assert chosen[0] == 0 and chosen[-1] == count - 1
    gaps = np.diff(chosen)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
    assert spread(count, None) == list(range(count))


def test_first_pit_walks_wrong_solutions_to_the_first_prefix_without_a_right_rollout() -> None:
    plan = Plan(POLICIES, 3, "first_pit")
    for seed in range(40):
        world = World(seed)
        right, wrong = solution(9, True), solution(9, False)
        assert len(play(plan, [right], world)) == 9 * 3 * 2
        done = play(plan, [wrong], world)
        keys = [prefix_key("p", ids) for ids in prefixes(wrong)]
        value = [any(world.rollout(key, [], p, i).correct for p in POLICIES for i in range(3))
                 for key in keys]  # fmt: skip
        pit = value.index(False) if False in value else 8
        assert {key for key, _, _ in done} == set(keys[: pit + 1])
    k, n = np.array([[2, 0], [1, 0]]), np.array([[3, 3], [3, 3]])
    # One policy with a right rollout is enough to walk on.
    assert allocate("first_pit", k[:, :1], n[:, :1], 3, False).tolist() == [[0], [0]]
    assert not allocate("first_pit", k, n, 3, False).any()
    k = np.array([[0, 0], [1, 0]])
    assert allocate("first_pit", k, n * [1, 0], 3, False).tolist() == [[0, 3], [0, 3]]


def test_branches_label_the_next_steps_of_the_bases_rollouts_and_of_no_other() -> None:
    plan = Plan(POLICIES, 4, branches=2)
    trace, world = solution(3, True), World(1)
    done = play(plan, [trace], world)
    own = {prefix_key("p", ids): ids for ids in prefixes(trace)}
    children = {
        prefix_key("p", ids + world.rollout(key, ids, "base", index).ids[:2])
        for key, ids in own.items()
        for index in range(2)
    }
    assert {key for key, _, _ in done} == own.keys() | children
    assert len(done) == len(own.keys() | children) * 4 * 2
    # Another writer's solution is no sample of the base's steps.
    assert len(play(plan, [replace(trace, policy="prover")], world)) == 3 * 4 * 2


def test_old_manifests_and_merged_ones_name_their_plan() -> None:
    old = {"rollout_policies": {"base": "f", "prover": "g"}, "n_mc": 3}
    assert plan_of(old) == Plan(POLICIES, 3)
    merged = {"rollout_policies": {"base": "f"}, "merged": [
        {"n_mc": 2, "strategy": "adaptive"}, {"n_mc": 4}]}  # fmt: skip
    assert plan_of(merged) == Plan(("base",), 4, "adaptive")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"max_labelled_prefixes": 1}, r"max_labelled_prefixes is 1; give 2 .+ or more"),
        ({"branches": 2, "n_mc": 1}, r"branches is 2; give a number from 0 to n_mc \(1\)"),
        ({"branches": 1, "n_mc": 4, "strategy": "adaptive"}, "needs strategy all_prefixes"),
        ({"n_mc": -1}, "n_mc is -1; give at least one trace, and no negative number"),
    ],
)
def test_plans_that_cannot_be_are_refused(setting: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        RolloutsConfig("unused", **setting)  # type: ignore[arg-type]


def asked_for(labels: LabelSet, plan: Plan, stepper: Stepper) -> set[Key]:
    """Replays every solution on what is stored: all requests that it leads to."""
    stored = {(c.prefix_key, c.policy, c.index): c for c in labels.completions}
    keys: set[Key] = set()
    for trace in labels.traces:
        seen: dict[Key, Completion] = {}
        while requests := next_rollouts(plan, trace, seen, stepper):
            seen |= {(w := (r.key, r.policy, r.index)): stored[w] for r in requests}
        keys |= seen.keys()
    return keys


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RolloutsConfig:
    """The tape's own base policy; some labels are certain, some are not."""
    return RolloutsConfig(
        output=str(tmp_path_factory.mktemp("labels") / "run"),
        policy=PolicyConfig("pav:base"),
        sampler=Sampler(max_length=128),
        problems=4,
        validation_problems=1,
        n_traces=2,
        n_mc=4,
        concurrency=8,
        engine=EngineConfig(kv_gib=0.05, max_num_seqs=64),
    )


def test_strategies_on_the_tapes_base_policy_ask_for_what_their_plan_says(
    config: RolloutsConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stepper = load_policy(config.policy, config.task.step_rule).stepper
    found: dict[str, LabelSet] = {}
    for strategy in strategies_:
        run = replace(config, strategy=strategy, output=str(tmp_path / strategy),
                      max_labelled_prefixes=6)  # fmt: skip
        rollouts(run)
        labels = found[strategy] = read_labels([run.output])
        keys = {(c.prefix_key, c.policy, c.index) for c in labels.completions}
        assert keys == asked_for(labels, run.plan, stepper)
        assert plan_of(labels.manifest) == run.plan
        capsys.readouterr()
        status(StatusConfig([run.output]))
        said = capsys.readouterr().out
        assert "10/10" in said and "finished" in said
        with pytest.raises(UserError, match="was made with another strategy"):
            rollouts(replace(run, strategy="first_pit" if strategy == "adaptive" else "adaptive",
                             max_labelled_prefixes=6))  # fmt: skip
    capsys.readouterr()
    sizes = {name: len(labels.completions) for name, labels in found.items()}
    assert sizes["adaptive"] <= sizes["all_prefixes"]
    assert sizes["first_pit"] < sizes["all_prefixes"]
    adaptively = found["adaptive"]
    n = [n for _, n in adaptively.counts.values()]
    assert min(n) == 1 < max(n)
    # Endings are labels, too: step 0 has one of every solution beside what was sampled.
    sampled = {k for k in count(adaptively.completions, [])}
    assert sampled < set(adaptively.counts)
    for trace in adaptively.traces:
        for prefix in prefixes(trace):
            assert adaptively.counts[prefix_key(trace.problem_id, prefix), "base"][1] >= 1
    # At most six prefixes of a solution, step 0 and the last one among them.
    for trace in found["all_prefixes"].traces:
        keys = [prefix_key(trace.problem_id, ids) for ids in prefixes(trace)]
        there = [(key, "base") in found["all_prefixes"].counts for key in keys]
        assert there[0] and there[-1]
        assert len(keys) <= 6 or sum(there) < len(keys)
    rollouts(replace(config, strategy="adaptive", output=str(tmp_path / "plan"), dry_run=True))
    assert "plan: 5 problems, 10 traces" in capsys.readouterr().out


def test_endings_alone_label_solutions_and_all_tools_count_them(
    config: RolloutsConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = replace(config, strategy="adaptive", n_mc=0, n_traces=3, output=str(tmp_path / "run"))
    rollouts(run)
    said = capsys.readouterr().out
    labels = read_labels([run.output])
    assert not labels.completions
    through: Counter[str] = Counter()
    for trace in labels.traces:
        through.update(prefix_key(trace.problem_id, ids) for ids in prefixes(trace))
    assert {key: n for (key, _), (_, n) in labels.counts.items()} == dict(through)
    first = labels.traces[0].problem_id
    right = sum(t.correct for t in labels.traces if t.problem_id == first)
    assert labels.counts[prefix_key(first, []), "base"] == (right, 3)
    assert f"base: endings of its solutions label {len(labels.counts)} prefixes" in said
    assert "next: pav.train" in said
    health = json.loads((tmp_path / "run" / "health.json").read_text())
    assert health["labels"] == len(labels.counts)
    assert health["policies"]["base"]["steps"][0]["prefixes"] == 5
    show(ShowConfig(run.output, problem=first))
    assert re.search(rf"\(the problem\) +{right}/3 ", capsys.readouterr().out)
    # Read beside a run of another strategy they still count, and only they.
    other = replace(config, strategy="all_prefixes", n_mc=1, n_traces=1, output=str(tmp_path / "o"))
    rollouts(other)
    both = read_labels([run.output, other.output])
    assert sum(n for _, n in both.counts.values()) == sum(through.values()) + len(both.completions)


def test_adaptive_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    arguments = [
        "--policy.model", "pav:base", "--policy.name", "base", "--sampler.max_length", "128",
        "--prover.model", "pav:prover", "--prover.name", "prover",
        "--problems", "12", "--validation_problems", "4", "--n_traces", "2", "--n_mc", "4",
        "--strategy", "adaptive", "--concurrency", "4",
        "--engine.kv_gib", "0.05", "--engine.max_num_seqs", "32",
    ]  # fmt: skip
    drive, random = Driver(tmp_path / "run", arguments), Random(3)
    before: list[str] = []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        drive(random.randrange(5_000, 12_000), number)
        after = acknowledged(drive.output / JOURNAL)
        assert after[: len(before)] == before
        before = after
    code, printed = drive()
    assert code == 0, printed
    drive.close()
    assert len(before) > 20
    labels = read_labels([str(drive.output)])
    assert len(labels.traces) == 32
    keys = [(c.prefix_key, c.policy, c.index) for c in labels.completions]
    assert len(set(keys)) == len(keys)
    stepper = load_policy(PolicyConfig("pav:base"), Tape().step_rule).stepper
    # The run without a death asks for exactly this: a strategy replayed on the same outcomes.
    assert set(keys) == asked_for(labels, Plan(("base", "prover"), 4, "adaptive"), stepper)
