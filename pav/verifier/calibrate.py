"""From what a head says to Q: calibrators, with and without the trunk's surprise.

A head's logit is a poor judge of rare slips that the trunk's own log-probabilities see. The better
calibrator therefore reads, beside the logit, how probable the trunk found the last step and the
worst step so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pav.core.steps import Stepper

if TYPE_CHECKING:
    import torch

# Of the last step, and of the worst step so far: log-probability of the whole step, of its result
# part, and of its least probable token (a choice that could not be one, such as a skipped key).
SURPRISE = ("step", "result", "token", "worst_step", "worst_result", "worst_token")
# Log-probabilities below this all mean "never".
_FLOOR = -25.0
_HIDDEN = 16
# Strength of the prior that keeps the layer's weights small, in rows: without it a few hundred rows
# are learned by heart and held-out Q is worse than without surprise.
_PRIOR = 3.0
# Inputs further from the mean of the rows of the fit than this many of their deviations are unlike
# them: on the tape 4% of the base policy's states (steps that went wrong), 75% of random text's.
# Surprise ends at its floor, 4 to 5 deviations off.
BEYOND = 4.0

Array = NDArray[np.float32]


def surprise(
    logprobs: NDArray[np.float32], ids: Sequence[int], ends: Sequence[int], stepper: Stepper
) -> Array:
    """Surprise features of every step, step 0 included.

    The last token of a step (its delimiter or EOS) is left out: it comes after the position at
    which the step is scored.

    Args:
        logprobs: (tokens,) log-probability of each solution token in the served softmax; only
            tokens before the last one of the last step are read.
        ids: solution ids.
        ends: exclusive ends of the steps.
        stepper: finds the result part.

    Returns:
        (steps + 1, F) in the order of :data:`SURPRISE`; zeros for step 0.
    """
    return surprises([logprobs], [ids], [ends], stepper)


def surprises(
    logprobs: Sequence[NDArray[np.float32]],
    ids: Sequence[Sequence[int]],
    ends: Sequence[Sequence[int]],
    stepper: Stepper,
) -> Array:
    """:func:`surprise` of many solutions, one after the other, without a loop over steps.

    Args:
        logprobs: of each solution.
        ids: likewise.
        ends: likewise.
        stepper: finds the result parts.
    """
    steps_N = np.array([len(e) for e in ends])
    rows = np.zeros((int((steps_N + 1).sum()), len(SURPRISE)), dtype=np.float32)
    if not steps_N.sum():
        return rows
    used = [(lp, i, e) for lp, i, e in zip(logprobs, ids, ends, strict=True) if e]
    none = np.zeros(1, np.float32)
    # Each solution up to its last step's end, whose own last token is in no step's surprise.
    flat_T = np.concatenate([part for lp, _, e in used for part in (lp[: e[-1] - 1], none)])
    ids_T = np.concatenate([np.asarray(i[: e[-1]]) for _, i, e in used])
    offset_N = np.cumsum([0, *(e[-1] for _, _, e in used)])
    end_S = np.concatenate(
        [np.asarray(e) + at for (*_, e), at in zip(used, offset_N, strict=False)]
    )
    start_S = np.concatenate([[0], end_S[:-1]])
    stop_S = end_S - 1
    empty_S = start_S == stop_S

    def over(reduce: np.ufunc, values_T: NDArray[Any], first_S: NDArray[Any]) -> NDArray[Any]:
        """Reduce the tokens from ``first_S`` up to the last one of every step."""
        return np.asarray(reduce.reduceat(values_T, np.stack([first_S, stop_S], 1).ravel())[::2])

    opens_T = np.where(np.isin(ids_T, list(stepper.result_ids)), np.arange(len(ids_T)), -1)
    after_S = over(np.maximum, opens_T, start_S) + 1
    result_S = np.where((after_S > start_S) & (after_S < stop_S), after_S, start_S)
    own_S3 = np.stack(
        [
            over(np.add, flat_T, start_S),
            over(np.add, flat_T, result_S),
            np.minimum(over(np.minimum, flat_T, start_S), 0),
        ],
        axis=1,
    )
    own_S3 = np.where(empty_S[:, None], 0, np.maximum(own_S3, _FLOOR))
    # A row of its own for every solution, so that its worst step so far is not another's.
    solution_S = np.repeat(np.arange(len(steps_N)), steps_N)
    step_S = np.arange(len(end_S)) - np.repeat(np.cumsum(steps_N) - steps_N, steps_N) + 1
    table = np.zeros((len(steps_N), steps_N.max() + 1, 3), dtype=np.float32)
    table[solution_S, step_S] = own_S3
    worst = np.minimum.accumulate(table, axis=1)
    row_S = solution_S + np.arange(len(end_S)) + 1
    rows[row_S, :3], rows[row_S, 3:] = own_S3, worst[solution_S, step_S]
    return rows


@dataclass(frozen=True)
class Calibrator:
    """Logit (and surprise) -> Q.

    ``q = sigmoid(temperature * logit + bias + out . tanh(inner @ x + inner_bias))`` with x the
    standardised logit and surprise; without surprise the last term is absent.
    """

    temperature: float
    bias: float
    mean: list[float]
    scale: list[float]
    inner: list[list[float]]
    inner_bias: list[float]
    out: list[float]

    @property
    def reads_surprise(self) -> bool:
        """Whether surprise features are needed."""
        return bool(self.out)

    def __call__(self, logit: Array, features: Array | None) -> NDArray[np.float64]:
        """Q of shape (...) from logits (...) and surprise (..., F)."""
        z = self.temperature * np.asarray(logit, dtype=np.float64) + self.bias
        if self.out:
            if features is None:
                raise ValueError("this calibrator reads surprise, but none was given")
            x = np.concatenate([np.asarray(logit)[..., None], features], axis=-1)
            x = (x - np.asarray(self.mean)) / np.asarray(self.scale)
            hidden = np.tanh(x @ np.asarray(self.inner).T + np.asarray(self.inner_bias))
            z = z + hidden @ np.asarray(self.out)
        return 1.0 / (1.0 + np.exp(-z))

    def is_beyond(self, logit: Array, features: Array | None) -> NDArray[np.bool_]:
        """Whether any input is unlike those of the fit (:data:`BEYOND`), of shape (...).

        False throughout without surprise: temperature and bias hold for every logit.

        Args:
            logit: (...) as :meth:`__call__` reads it.
            features: (..., F) surprise.
        """
        if not self.out or features is None:
            return np.zeros(np.shape(logit), dtype=bool)
        x = np.concatenate([np.asarray(logit)[..., None], features], axis=-1)
        far = np.abs(x - np.asarray(self.mean)) > BEYOND * np.asarray(self.scale)
        return np.asarray(far.any(axis=-1))

    def flaw(self, width: int) -> str:
        """Why this cannot be computed on ``width`` inputs (logit and surprise); empty if it can."""
        for name, value in vars(self).items():
            if not np.isfinite(np.asarray(value, dtype=np.float64)).all():
                return f"has a {name} that is no finite number"
        if not self.out:
            return ""
        shapes = {
            "mean": (width,), "scale": (width,), "inner": (len(self.out), width),
            "inner_bias": (len(self.out),), "out": (len(self.out),),
        }  # fmt: skip
        for name, shape in shapes.items():
            if np.shape(getattr(self, name)) != shape:
                return f"has {name} of shape {np.shape(getattr(self, name))}, not {shape}"
        return "" if all(self.scale) else "has a scale of 0"

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Calibrator:
        """Inverse of ``dataclasses.asdict``."""
        return cls(**plain)


def fit_calibrator(
    logit: Array, features: Array | None, k: Array, n: Array, seed: int = 0
) -> Calibrator:
    """Fit on counts by maximum likelihood; the identity where there are no rows.

    Args:
        logit: (rows,) head logits.
        features: (rows, F) surprise, or None for temperature and bias alone.
        k: (rows,) right rollouts.
        n: (rows,) rollouts, positive.
        seed: initial weights.
    """
    if not len(n):
        return Calibrator(1.0, 0.0, [], [], [], [], [])
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    x_logit = torch.as_tensor(logit, dtype=torch.float64)
    target = torch.as_tensor(np.asarray(k / n), dtype=torch.float64)
    weight = torch.as_tensor(n, dtype=torch.float64)
    weight = weight / weight.sum()
    generator = torch.Generator().manual_seed(seed)
    temperature = torch.ones(1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    parameters = [temperature, bias]
    if features is not None:
        x = np.concatenate([logit[:, None], features], axis=1).astype(np.float64)
        mean, scale = x.mean(0), x.std(0) + 1e-6
        x_t = torch.as_tensor((x - mean) / scale)
        width = x.shape[1]
        inner = (torch.randn(_HIDDEN, width, generator=generator) / width**0.5).double()
        inner.requires_grad_()
        inner_bias = torch.zeros(_HIDDEN, dtype=torch.float64, requires_grad=True)
        out = torch.zeros(_HIDDEN, dtype=torch.float64, requires_grad=True)
        parameters += [inner, inner_bias, out]

    def predict() -> torch.Tensor:
        z = temperature * x_logit + bias
        if features is not None:
            z = z + torch.tanh(x_t @ inner.T + inner_bias) @ out
        return z

    optimizer = torch.optim.LBFGS(
        parameters, max_iter=300, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(predict(), target, weight=weight, reduction="sum")
        loss = loss + 1e-5 * (temperature**2 + bias**2).sum()
        loss = loss + _PRIOR / len(n) * sum((p**2).sum() for p in parameters[2:])
        loss.backward()
        return loss

    optimizer.step(closure)
    plain: dict[str, Any] = {
        "temperature": temperature.item(),
        "bias": bias.item(),
        "mean": [],
        "scale": [],
        "inner": [],
        "inner_bias": [],
        "out": [],
    }
    if features is not None:
        plain |= {
            "mean": mean.tolist(),
            "scale": scale.tolist(),
            "inner": inner.tolist(),
            "inner_bias": inner_bias.tolist(),
            "out": out.tolist(),
        }
    return Calibrator(**plain)
