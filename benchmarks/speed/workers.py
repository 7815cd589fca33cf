"""Whether a run over several workers says what one process says: two label runs compared.

    data_gen.rollouts --policy pav:base --problems 60 --validation_problems 0 --n_seeds 2 \\
        --n_mc 2 --output runs/speed/one
    data_gen.rollouts <the same> --workers 2 --output runs/speed/two
    python -m benchmarks.speed.workers

The requests are the same; vLLM's rounding depends on what else is in a batch, so that a sampled
token may differ. Writes ``benchmarks/results/speed_workers.{json,csv}``.
"""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import beta, norm

from benchmarks.speed.results import metric, write
from data_gen.runs import Run, read_run
from pav.cli import run
from pav.errors import UserError
from pav.labels import prefix_key

COMMAND = "python -m benchmarks.speed.workers"


@dataclass(frozen=True)
class WorkersConfig:
    """Compare two label runs that differ in ``workers`` alone.

    Args:
        one: run of one process.
        two: run of several workers.
    """

    one: str = "runs/speed/one"
    two: str = "runs/speed/two"


def compare(config: WorkersConfig) -> None:
    """Measure and write (see the module)."""
    one, two = read_run(config.one), read_run(config.two)
    if one.manifest != two.manifest:
        raise UserError(f"{config.one!r} and {config.two!r} differ in more than workers")
    answers = [_answers(r) for r in (one, two)]
    # A seed solution that differs has other prefixes: what only one run asked for is left out.
    both = sorted(answers[0].keys() & answers[1].keys())
    different = sum(answers[0][key] != answers[1][key] for key in both)
    n = len(both)
    low = float(beta.ppf(0.025, different, n - different + 1)) if different else 0.0
    high = float(beta.ppf(0.975, different + 1, n - different))
    right = [
        (sum(c.correct for c in r.completions.values()), len(r.completions)) for r in (one, two)
    ]
    (k1, n1), (k2, n2) = right
    pooled = (k1 + k2) / (n1 + n2)
    z = (k1 / n1 - k2 / n2) / (pooled * (1 - pooled) * (1 / n1 + 1 / n2)) ** 0.5
    alone = len(answers[0].keys() ^ answers[1].keys())
    write(
        "workers",
        [
            metric("two workers against one: share of samples that differ", different / n,
                   ("<=", 0.001), (low, high)),
            metric("two workers against one: requests that only one of them made, share",
                   alone / (n + alone)),
            metric("two workers against one: |z| of the rollouts' success rates", abs(z),
                   ("<=", float(norm.ppf(0.975)))),
        ],
        [{"run": name, "traces": len(r.traces), "rollouts": m, "right": k, "tokens": r.generated}
         for name, r, (k, m) in zip(("one", "two"), (one, two), right, strict=True)],
        [one.manifest["seed"]],
        len({t.problem_id for t in one.traces.values()}),
        COMMAND,
    )  # fmt: skip


def _answers(labels: Run) -> dict[tuple[str, str, int], list[int]]:
    """Sampled ids by request; seed solutions stand at index -1 - seed index."""
    found = {key: c.ids for key, c in labels.completions.items()}
    for t in labels.traces.values():
        found[prefix_key(t.problem_id, []), t.policy, -1 - t.seed_index] = t.ids
    return found


if __name__ == "__main__":
    run(compare, WorkersConfig, "benchmarks.speed.workers")
