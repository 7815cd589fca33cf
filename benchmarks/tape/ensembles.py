"""Do ensembles of heads, or scores lowered by their disagreement, search better?

Run first (a minute), then this (about an hour of one core)::

    data_gen.rollouts --config configs/tape/demo/rollouts.yaml
    OMP_NUM_THREADS=1 python -m benchmarks.tape.ensembles

One verifier with several sets of heads on the same frozen trunk: one trained as ``pav.train`` does,
with calibrators fitted on validation problems alone; the same heads with calibrators fitted on the
training labels too (the default); five of resampled training problems, their calibrators on
resampled validation problems. Each way of scoring steps by them is a beam search of the same width,
on validation problems that no label is of; differences are paired. Writes
``benchmarks/results/tape_ensembles.{json,csv,png}``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.tape.main import RESULTS, row, write_result
from benchmarks.verifier.fitting import trained_heads
from benchmarks.verifier.setting import HEADS
from pav.cli.run import run
from pav.core.statistics import bootstrap
from pav.engine.loading import EngineConfig
from pav.evaluate.report import first_half
from pav.labels.examples import Example, pav_examples
from pav.labels.tables import read_labels
from pav.policy.cost import Cost
from pav.policy.policy import PolicyConfig, load_policy, model_path
from pav.tasks.base import Problem
from pav.tasks.tape import Tape
from pav.train.command import new_card, save
from pav.train.config import TrainConfig
from pav.verifier.calibrate import fit_calibrator
from pav.verifier.checkpoint import load_verifier
from pav.verifier.forward import score
from pav.verifier.score import Values, step_score
from pav.verifier.trunk import HeadedTrunk, load_trunk
from search.methods.beam import BeamSettings, beam_search, with_score
from search.methods.expand import Prefix
from search.run.opening import open_session
from search.run.records import Record
from search.run.session import Session
from search.run.solve import beam_settings, context_of, searched

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.tape.ensembles"
MEMBERS = 5


@dataclass(frozen=True)
class Way:
    """A way of scoring steps.

    Attributes:
        name: what the table calls it.
        members: suffixes of the heads that are averaged.
        shrink: deviations of the members that a score is lowered by.
        prover: of every member, ``{}`` for its suffix.
    """

    name: str
    members: tuple[str, ...] = ("",)
    shrink: float = 0.0
    prover: str = "q/prover{}"


FIVE = tuple(f"@{m}" for m in range(1, MEMBERS + 1))
WAYS = [
    Way("as trained"),
    Way("mean of five", FIVE),
    Way("mean of five minus one deviation", FIVE, 1.0),
    Way("mean of five minus three deviations", FIVE, 3.0),
    Way("prover: mean of both heads", prover="q/base{0}:1,q/prover{0}:1"),
    Way("calibrated on training labels too", ("@all",)),
]


@dataclass(frozen=True)
class EnsemblesConfig:
    """Ensembles of heads in beam search.

    Args:
        labels: run of configs/tape/demo/rollouts.yaml.
        output: directory of the verifier and of the searches; searched problems are not searched
            again.
        n: beam width.
        problems: validation problems.
        skip: leave out the first so many: labels are of them.
        seeds: of the searches.
        engine: device settings.
    """

    labels: str = "runs/demo/labels"
    output: str = "runs/tape_main/ensembles"
    n: int = 4
    problems: int = 300
    skip: int = 200
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    engine: EngineConfig = field(default_factory=EngineConfig)


def ensembles(config: EnsemblesConfig) -> None:
    """Train, search and write (see the module)."""
    directory = Path(config.output)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint = directory / "ensemble.ckpt"
    if not checkpoint.exists():
        train(config, checkpoint)
    verifier = load_verifier(str(checkpoint))
    session = open_session(verifier, None, None, None, config.engine)
    scorer = session.scorer(verifier, "separate", True, None)
    session.sampling_engine(scorer)
    problems = session.problems("validation", config.problems, config.skip)
    if {p.id for p in problems} & {t.problem_id for t in read_labels([config.labels]).traces}:
        raise ValueError("labels are of problems that are searched")
    settings = beam_settings(verifier.card, config.n, 3, None, None)
    found: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        columns, tokens, oracle = [], [], []
        for seed in config.seeds:
            search = partial(_search, session, scorer, settings, way, seed)
            path = directory / f"{way.name.replace(' ', '_').replace(':', '')}-s{seed}.jsonl"
            what = f"{way.name}, seed {seed}"
            records, _ = session.run(path, problems, search, 64, what)
            columns.append([_picked_right(way, r) for r in records])
            tokens += [r.policy_tokens for r in records]
            oracle += [any(c.correct for c in r.candidates) for r in records]
        found[way.name] = np.array(columns, dtype=np.float64).T
        accuracy = bootstrap(found[way.name])
        rows.append(
            {"way": way.name, "accuracy": accuracy.mean, "low": accuracy.low,
             "high": accuracy.high, "in_final_set": np.mean(oracle),
             "policy_tokens": np.mean(tokens)}
        )  # fmt: skip
        print(rows[-1], flush=True)
    session.shutdown()
    metrics = [
        row(f"accuracy, {r['way']}, N={config.n}", r["accuracy"], [r["low"], r["high"]], None)
        for r in rows
    ]
    for way in WAYS[1:]:
        d = bootstrap(found[way.name] - found[WAYS[0].name])
        name = f"{way.name} minus {WAYS[0].name}, N={config.n}"
        metrics.append(row(name, d.mean, [d.low, d.high], None))
    manifest = {"seeds": config.seeds, "problems": config.problems}
    write_result("tape_ensembles", metrics, [_text(r) for r in rows], manifest, COMMAND)
    _plot(rows)


def _text(line: dict[str, Any]) -> dict[str, str]:
    return {k: v if isinstance(v, str) else f"{v:.6g}" for k, v in line.items()}


# -- heads -----------------------------------------------------------------------------------------


def train(config: EnsemblesConfig, checkpoint: Path) -> None:
    """All sets of heads, in one checkpoint."""
    labels, task = read_labels([config.labels]), Tape()
    settings = TrainConfig([config.labels], str(checkpoint), trunk="pav:strong", accelerator="cpu",
                           checkpoint_minutes=1e6)  # fmt: skip
    card = new_card(settings, labels, task)
    if card.heads != HEADS:
        raise ValueError(f"labels give the heads {card.heads}")
    policy = load_policy(PolicyConfig("pav:strong"), task.step_rule)
    cap = card.sampler["max_length"]
    training, validation = (
        pav_examples(labels, split, HEADS, policy, cap) for split in ("train", "validation")
    )
    trunk = load_trunk(model_path("pav:strong"), torch.float32)
    names: list[str] = []
    weights, biases = [], []
    plain: dict[str, dict[str, Any]] = {}
    surprised: dict[str, dict[str, Any]] = {}
    for member in range(MEMBERS + 1):
        rng = np.random.default_rng(member)
        drawn = resampled(training, rng) if member else training
        model = trained_heads(settings, trunk, drawn, validation, policy, member)
        half = [e for e in validation if first_half(e.problem_id)]
        judged = [(f"@{member}" if member else "", resampled(half, rng) if member else half)]
        if not member:
            judged.append(("@all", [*half, *training]))
        for suffix, examples in judged:
            scored = score(model, [replace(e) for e in examples], policy, "calibrating")
            for h, head in enumerate(HEADS):
                names.append(head + suffix)
                weights.append(model.head.weight[h])
                biases.append(model.head.bias[h])
                rows = scored.n_NH[:, h] > 0
                k, n = scored.k_NH[rows, h], scored.n_NH[rows, h]
                logit = scored.logits_NH[rows, h]
                plain[head + suffix] = asdict(fit_calibrator(logit, None, k, n))
                features = scored.surprise_NF[rows]
                surprised[head + suffix] = asdict(fit_calibrator(logit, features, k, n, member))
    whole = HeadedTrunk(trunk, len(names))
    with torch.no_grad():
        whole.head.weight.copy_(torch.stack(weights))
        whole.head.bias.copy_(torch.stack(biases))
    card = replace(card, heads=names, calibrators=plain, surprise_calibrators=surprised, pick="orm")
    save(card, whole, checkpoint)


def resampled(examples: Sequence[Example], rng: np.random.Generator) -> list[Example]:
    """Solutions of problems drawn with replacement."""
    by_problem: dict[str, list[Example]] = defaultdict(list)
    for e in examples:
        by_problem[e.problem_id].append(e)
    drawn = rng.choice(sorted(by_problem), len(by_problem))
    return [replace(e) for problem in drawn for e in by_problem[problem]]


# -- search ----------------------------------------------------------------------------------------


async def _search(
    session: Session, scorer: Any, settings: BeamSettings, way: Way, seed: int, problem: Problem
) -> Record:
    def rescore(
        places: Sequence[Prefix], children: list[tuple[int, Prefix]]
    ) -> list[tuple[int, Prefix]]:
        return [
            (i, with_score(c, _worth(way, settings, places[i].values, c.values)))
            for i, c in children
        ]

    def search(cost: Cost) -> Any:
        context = context_of(session, scorer, problem, seed, cost)
        return beam_search(context, settings, scorer, rescore=rescore)

    described = {"way": asdict(way), "pick": "orm"}
    return await searched(session, problem, "beam", settings.n, seed, described, settings.score,
                          settings.base_head, search)  # fmt: skip


def _worth(way: Way, settings: BeamSettings, before: Values, after: Values) -> float:
    return _lowered(
        way,
        [
            step_score(before, after, f"q/base{m}", way.prover.format(m), settings.alpha, "q+a")
            for m in way.members
        ],
    )


def _lowered(way: Way, values: Sequence[float]) -> float:
    return float(np.mean(values) - way.shrink * np.std(values))


def _picked_right(way: Way, record: Record) -> bool:
    """Whether the best of the final set by the way's own ORM heads is right."""
    finished = [c for c in record.candidates if c.finished]
    if not finished:
        return False
    best = max(finished, key=lambda c: _lowered(way, [c.q[f"orm{m}"][-1] for m in way.members]))
    return best.correct


def _plot(rows: Sequence[dict[str, Any]]) -> None:
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axis = figure.subplots()
    at = np.arange(len(rows))[::-1]
    accuracy = np.array([r["accuracy"] for r in rows])
    ends = np.array([[r["accuracy"] - r["low"], r["high"] - r["accuracy"]] for r in rows]).T
    axis.errorbar(accuracy, at, xerr=ends, fmt="o", capsize=3, label="picked")
    axis.plot([r["in_final_set"] for r in rows], at, "x", color="grey", label="in the final set")
    axis.set_yticks(at, [r["way"] for r in rows])
    axis.set_xlabel("accuracy of beam search, validation problems")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(RESULTS / "tape_ensembles.png", dpi=130)


if __name__ == "__main__":
    run(ensembles, EnsemblesConfig, "benchmarks.tape.ensembles")
