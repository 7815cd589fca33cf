"""Forward FLOPs that went into a verifier before the first search: its labels and its training."""

from __future__ import annotations

from pav.labels.tables import LabelSet, read_labels
from pav.policy.cost import Shape, context_of, forward_flops, shape_of
from pav.policy.policy import load_policy, model_path
from pav.tasks.base import Problem, Task
from pav.verifier.checkpoint import Verifier, resolve_task, trunk_path
from search.compare.plan import Investment


def invested_flops(investment: Investment, verifier: Verifier, task: Task | None) -> float:
    """FLOPs of the label runs and of training, from the tokens in the label tables.

    Every solution and rollout is counted as if its prompt and prefix were computed anew: an
    upper limit where the prefix cache served them. A frozen trunk reads every training solution
    once; each epoch of a trained one costs three forward passes (one, and two for the gradient).

    Raises:
        UserError: if the label runs or a model cannot be read.
    """
    labels = read_labels(investment.labels)
    card = verifier.card
    source = f"verifier {str(verifier.path)!r}"
    policy = load_policy(card.policy_config(), resolve_task(card.task, task, source).step_rule)
    base = shape_of(policy.path)
    shapes = {name: shape_of(model_path(m)) for name, m in investment.models.items()}
    questions = {t.problem_id: t.question for t in labels.traces}
    prompts = {i: len(policy.encode(Problem(i, q))) for i, q in questions.items()}
    labelling = sum(
        _generated(shapes.get(name, base), prompts[problem] + prefix, tokens)
        for problem, name, prefix, tokens in _rollouts(labels, investment.rollouts)
    )
    trunk = shape_of(trunk_path(verifier))
    reading = sum(
        _generated(trunk, prompts[problem] + prefix, tokens)
        for problem, _, prefix, tokens in _rollouts(
            # A PAV learns from the solutions, an ORM from every graded one.
            labels,
            investment.rollouts and card.recipe == "orm",
        )
    )
    return labelling + reading * (1.0 if card.frozen else 3.0 * investment.epochs)


def _rollouts(labels: LabelSet, from_prefixes: bool) -> list[tuple[str, str, int, int]]:
    """(problem, policy, prefix tokens, sampled tokens) of solutions and rollouts."""
    found = [(t.problem_id, t.policy, 0, len(t.ids)) for t in labels.traces]
    if from_prefixes:
        found += [
            (c.problem_id, c.policy, len(c.prefix_ids), len(c.ids)) for c in labels.completions
        ]
    return found


def _generated(shape: Shape, prefix: int, tokens: int) -> float:
    computed = max(0, prefix + tokens - 1)
    return forward_flops(shape, computed, context_of(0, computed), tokens)
