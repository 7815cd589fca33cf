"""Scores of steps that are given as text: what ``pav.load_verifier`` returns."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray

from pav.core.errors import UserError
from pav.core.heads import ORM
from pav.labels.examples import Example, given_example
from pav.policy.encoding import Encoded, encode_steps
from pav.policy.opening import positions
from pav.policy.policy import Dtype, Policy, PolicyConfig, load_policy
from pav.policy.rendered import warn_other_prompt
from pav.tasks.base import Problem, Task, problem_id
from pav.verifier import checkpoint
from pav.verifier.checkpoint import Verifier, prompt_from, resolve_task, trunk_path
from pav.verifier.score import check_prover, step_score

if TYPE_CHECKING:
    from pav.verifier.trunk import HeadedTrunk

# Fewer solutions than these are scored in seconds.
SHOWN = 256


@dataclass(frozen=True)
class StepScores:
    """What a verifier says of one solution.

    Axes: S steps, P = S + 1 states. State 0 is the problem before any step, state s the solution
    after step s. Step s leads from state s - 1 to state s.

    Attributes:
        question: the problem.
        steps: (S,) texts of the steps.
        q: head -> (P,) Q of every state, between 0 and 1: the chance that the head's policy
            finishes right from there.
        advantage: (S,) A of every step: the prover's Q after it minus before it. None for an ORM,
            which has no Q of a policy.
        score: (S,) what search ranks a step by: Q of the base policy after it, plus ``alpha``
            times the advantage. None for an ORM.
        base_head: head of the base policy's Q; empty for an ORM.
        prover: whose advantage it is: a head, ``bo<K>``, or a weighted mean of such.
        alpha: weight of the advantage in ``score``.
    """

    question: str
    steps: list[str]
    q: dict[str, NDArray[np.float64]]
    advantage: NDArray[np.float64] | None
    score: NDArray[np.float64] | None
    base_head: str
    prover: str
    alpha: float


@dataclass(frozen=True)
class LoadedVerifier:
    """A verifier that scores solutions which are given as text; see :func:`load_verifier`.

    Its weights are loaded at the first score, in transformers.

    Attributes:
        checkpoint: the file that pav.train wrote, and what it remembers (``checkpoint.card``).
        task: the task that it was made for.
        trunk: the trunk as it is asked: its tokenizer, prompt and step rule.
        surprise: whether the calibrators that read the trunk's log-probabilities are used.
        device: where it computes, such as ``cuda`` or ``cpu``.
        dtype: in which the trunk computes; heads compute in float32.
    """

    checkpoint: Verifier
    task: Task
    trunk: Policy
    surprise: bool
    device: str
    dtype: Dtype = "float32"

    def __repr__(self) -> str:
        heads = ", ".join(self.heads)
        return f"<verifier {str(self.checkpoint.path)!r}: heads {heads}; task {self.task.name}>"

    @property
    def heads(self) -> list[str]:
        """Names of the heads, such as ``q/base``; each has a Q in :attr:`StepScores.q`."""
        return list(self.checkpoint.card.heads)

    @cached_property
    def model(self) -> HeadedTrunk:
        """Trunk and heads in transformers, on ``device``."""
        import torch
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = checkpoint.load_model(self.checkpoint, self.trunk.path)
            model.trunk.to(dtype=getattr(torch, self.dtype))
            return model.to(self.device)
        finally:
            if shown:
                logging.enable_progress_bar()

    @overload
    def score(
        self,
        question: str,
        steps: Sequence[str],
        *,
        complete: bool = ...,
        prover: str | None = ...,
        alpha: float | None = ...,
    ) -> StepScores: ...

    @overload
    def score(
        self,
        question: list[str] | tuple[str, ...],
        steps: Sequence[Sequence[str]],
        *,
        complete: bool = ...,
        prover: str | None = ...,
        alpha: float | None = ...,
    ) -> list[StepScores]: ...

    def score(
        self,
        question: str | list[str] | tuple[str, ...],
        steps: Sequence[str] | Sequence[Sequence[str]],
        *,
        complete: bool = False,
        prover: str | None = None,
        alpha: float | None = None,
    ) -> StepScores | list[StepScores]:
        """Score every step of a solution, or of each solution of a batch.

        Scores agree with those of a search (its engine computes in the dtype that the verifier is
        served in, this in float32).

        Args:
            question: a problem, or a list of problems.
            steps: texts of its steps in their order, or a list of such for each problem. The text
                that ends a step (the step rule's delimiter, mostly a line end) may be left out. No
                step at all scores the problem alone.
            complete: whether the last step ends the solution: an end-of-sequence token then stands
                in the place of its delimiter.
            prover: whose advantage is taken: a head such as ``q/prover``, ``bo4`` for Best-of-4 of
                the base policy, or a weighted mean such as ``q/a:0.5,q/b:0.5``; by default the
                verifier's.
            alpha: weight of the advantage; by default the verifier's.

        Returns:
            The scores; a list of them where ``question`` is a list.

        Raises:
            UserError: if the two lists differ in length, a step is empty, a solution is longer than
                what the trunk reads, or the prover is none of this verifier's.
        """
        card = self.checkpoint.card
        chosen = prover or card.prover_head
        if card.base_head:
            check_prover(chosen, card.heads)
        weight = card.alpha if alpha is None else alpha
        questions = [question] if isinstance(question, str) else list(question)
        given = [steps] if isinstance(question, str) else list(steps)
        if len(questions) != len(given):
            raise UserError(
                f"question lists {len(questions)} problems and steps {len(given)} solutions; give "
                "a list of steps for each problem"
            )
        texts = [self._texts(s, number) for number, s in enumerate(given)]
        q = self._q(questions, texts, complete)
        found = []
        for number, solution in enumerate(texts):
            advantage = score = None
            if card.base_head:
                states = [
                    {head: float(q_P[p]) for head, q_P in q[number].items()}
                    for p in range(len(solution) + 1)
                ]
                steps_of = list(pairwise(states))
                advantage, score = (
                    np.array(
                        [step_score(a, b, card.base_head, chosen, weight, by) for a, b in steps_of],
                        dtype=np.float64,
                    )
                    for by in ("a", "q+a")
                )
            scores = (q[number], advantage, score, card.base_head, chosen, weight)
            found.append(StepScores(questions[number], solution, *scores))
        return found[0] if isinstance(question, str) else found

    def _texts(self, steps: object, number: int) -> list[str]:
        """Steps of a solution without their delimiters."""
        if isinstance(steps, str) or not isinstance(steps, Iterable):
            raise UserError(
                f"steps of solution {number} is {steps!r}; give a list of texts, one for each step"
            )
        delimiter = self.trunk.stepper.rule.delimiter
        found = []
        for index, step in enumerate(steps, 1):
            text = step.removesuffix(delimiter) if isinstance(step, str) else ""
            if not text.strip():
                raise UserError(
                    f"step {index} of solution {number} is {step!r}; give the text of the step, or "
                    "leave it out"
                )
            found.append(text)
        return found

    def _example(
        self, question: str, steps: list[str], complete: bool
    ) -> tuple[Example, list[int]]:
        """A solution in tokens, and where in its scored positions each state is."""
        encoded = Encoded([], [], False)
        if steps:
            encoded = encode_steps(self.trunk, steps, self.trunk.stepper.rule.delimiter, complete)
        if encoded.is_changed:
            warnings.warn(
                f"the tokenizer of {self.trunk.path!r} does not keep the text of a solution to "
                f"{question[:60]!r}; the scores are of what it makes of it",
                stacklevel=4,
            )
        problem = Problem(problem_id(question), question)
        example, own = given_example(self.trunk, problem, encoded)
        longest = positions(self.trunk.path)
        if longest is not None and len(example.ids) > longest:
            raise UserError(
                f"question {question[:60]!r} and its {len(steps)} steps have {len(example.ids)} "
                f"tokens; the trunk {self.checkpoint.card.trunk!r} reads {longest}; give fewer "
                "steps"
            )
        return example, [0, *(index + 1 for index in own)]

    def _q(
        self, questions: Sequence[str], solutions: Sequence[list[str]], complete: bool
    ) -> list[dict[str, NDArray[np.float64]]]:
        """Q of every state of every solution, by head."""
        encoded = [
            self._example(question, steps, complete)
            for question, steps in zip(questions, solutions, strict=True)
        ]
        found = self.judged([example for example, _ in encoded], quiet=len(encoded) < SHOWN)
        return [
            {head: q_P[states] for head, q_P in q.items()}
            for (q, _), (_, states) in zip(found, encoded, strict=True)
        ]

    def judged(
        self, examples: Sequence[Example], quiet: bool = True
    ) -> list[tuple[dict[str, NDArray[np.float64]], NDArray[np.bool_]]]:
        """What the verifier says of solutions in tokens, at every scored position.

        Returns:
            For each solution, in their order: head -> (P,) Q; and (P,) whether the state is unlike
            those that the Qs were calibrated on.
        """
        from pav.verifier.forward import score

        if not examples:
            return []
        scored = score(
            self.model,
            examples,
            self.trunk,
            "scoring",
            with_surprise=self.surprise,
            quiet=quiet,
        )
        features = scored.surprise_NF if self.surprise else None
        card = self.checkpoint.card
        q_N = {
            head: card.calibrator(head, self.surprise)(scored.logits_NH[:, h], features)
            for h, head in enumerate(card.heads)
        }
        # An ORM's is calibrated on ends alone, which most states are unlike.
        beyond_NH = [
            card.calibrator(head, self.surprise).is_beyond(scored.logits_NH[:, h], features)
            for h, head in enumerate(card.heads)
            if head != ORM
        ]
        beyond_N = np.any([np.zeros(len(scored.example_N), dtype=bool), *beyond_NH], axis=0)
        # Batches are by length; the rows of one solution are in the order of its steps.
        order = np.argsort(scored.example_N, kind="stable")
        rows = np.split(order, np.cumsum([len(e.positions_P) for e in examples])[:-1])
        return [
            ({head: values[mine] for head, values in q_N.items()}, beyond_N[mine]) for mine in rows
        ]


def load_verifier(
    name: str | Path,
    *,
    task: Task | None = None,
    trunk: str | None = None,
    surprise: bool = True,
    device: str | None = None,
    dtype: Dtype = "float32",
) -> LoadedVerifier:
    """Load a verifier that scores steps; nothing but tensors and plain data is read from the file.

    Example:
        >>> import pav
        >>> v = pav.load_verifier("pav:reference")
        >>> found = v.score("37+8*3-15", ["37+8=45", "45*3=36"])
        >>> found.q["q/base"].shape
        (3,)

    Args:
        name: a checkpoint that pav.train wrote, or a shipped one such as ``pav:reference``.
        task: needed only where the verifier's task is not built in.
        trunk: new place of the trunk, if it moved.
        surprise: use the calibrators that read the trunk's log-probabilities; they are better and
            need logits over the vocabulary.
        device: where to compute; by default a GPU if there is one, else the CPU.
        dtype: in which the trunk computes.

    Returns:
        The verifier; its :meth:`~LoadedVerifier.score` scores, and ``pav.Search`` searches with it.

    Raises:
        UserError: if it is no verifier, is damaged, its trunk is gone or its task is not known.
    """
    found = checkpoint.load_verifier(str(name))
    card = found.card
    where = f"verifier {str(found.path)!r}"
    resolved = resolve_task(card.task, task, where)
    config = PolicyConfig(trunk_path(found, trunk), prompt=prompt_from(card.prompt))
    policy = load_policy(config, resolved.step_rule)
    warn_other_prompt(card.trunk_prompt, policy, where, "its trunk")
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedVerifier(found, resolved, policy, surprise, device, dtype)
