"""Health of labels: ``health.json``, ``health.png`` and a few lines of text."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_gen.label_run import Run
from pav.core.files import json_text
from pav.core.printable import one_line
from pav.labels.tables import Completion, Trace, prefix_key

HEALTH = "health.json"
DASHBOARD = "health.png"
CONTAMINATED = 0.05
BINS = 5


def write_health(run: Run) -> dict[str, Any]:
    """Compute the health of a run and write ``health.json`` and ``health.png`` beside it."""
    from data_gen.inspect.dashboard import draw

    health = health_of(run)
    (run.directory / HEALTH).write_text(json_text(health))
    draw(health, run.directory / DASHBOARD)
    return health


def health_of(run: Run) -> dict[str, Any]:
    """Figures by rollout policy, of the seeds, and of the whole run, as plain data.

    ``policies.<name>.steps`` has a row per step (0 is the problem itself): prefixes, mean k/n and
    the histogram of k/n in five equal bins (k and n as in training: with own endings, where they
    count). ``label_noise`` is the expected standard deviation of
    k/n around Q: unbiased over prefixes with two rollouts and more, where all have one an upper
    limit (``label_noise_is_limit``). ``first_error`` counts, over wrong traces, the first step
    whose prefix had no right rollout.
    """
    traces = list(run.traces.values())
    by_policy: dict[str, list[Completion]] = {name: [] for name in run.policies}
    for completion in run.completions.values():
        by_policy.setdefault(completion.policy, []).append(completion)
    counts: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in by_policy}
    for (key, name), kn in run.counts.items():
        counts[name][key] = kn
    labels = sum(map(len, counts.values()))
    return {
        "problems": len({t.problem_id for t in traces}),
        "labels": labels,
        "rollouts": len(run.completions),
        "tokens": run.generated,
        "tokens_per_label": _ratio(run.generated, labels),
        "seconds": run.seconds or None,
        "seconds_per_label": _ratio(run.seconds, labels) if run.seconds else None,
        "seeds": {
            name: _seeds([t for t in traces if t.policy == name])
            for name in sorted({t.policy for t in traces})
        },
        "policies": {name: _policy(traces, own, counts[name]) for name, own in by_policy.items()},
        "base_accuracy": base_accuracy(traces, run.completions.values(), run.base),
    }


def _seeds(traces: list[Trace]) -> dict[str, Any]:
    distinct = {(t.problem_id, tuple(t.ids)) for t in traces}
    return {
        "solutions": len(traces),
        "right": _mean(t.correct for t in traces),
        "truncated": _mean(t.truncated for t in traces),
        "unparsed": _mean(t.answer is None for t in traces),
        "duplicates": 1 - _ratio(len(distinct), len(traces)),
        "steps": _mean(len(t.step_ends) for t in traces),
    }


def _policy(
    traces: list[Trace], completions: list[Completion], counts: dict[str, tuple[int, int]]
) -> dict[str, Any]:
    answers: dict[str, set[str | None]] = defaultdict(set)
    for c in completions:
        answers[c.problem_id].add(c.answer)
    noise, is_limit = label_noise(list(counts.values()))
    distinct = {(c.prefix_key, tuple(c.ids)) for c in completions}
    first_errors, without = _first_errors(traces, counts)
    return {
        "rollouts": len(completions),
        "prefixes": len(counts),
        "right": _mean(c.correct for c in completions),
        "truncated": _mean(c.truncated for c in completions),
        "unparsed": _mean(c.answer is None for c in completions),
        "duplicates": 1 - _ratio(len(distinct), len(completions)),
        "unique_answers_per_problem": _mean(len(a) for a in answers.values()),
        "label_noise": noise,
        "label_noise_is_limit": is_limit,
        "label_spread": float(np.std([k / n for k, n in counts.values()])) if counts else 0.0,
        "tokens_per_rollout": _mean(len(c.ids) for c in completions),
        "steps": _steps(traces, counts),
        "first_error": first_errors,
        "wrong_without_error_step": without,
    }


def label_noise(counts: list[tuple[int, int]]) -> tuple[float, bool]:
    """(expected standard deviation of k/n around Q, whether it is only an upper limit).

    The variance of k/n is Q(1-Q)/n; k(n-k) / (n^2 (n-1)) estimates it without bias where n > 1.
    From single rollouts it cannot be told from the spread of Q: q(1-q) of their mean q is a limit.
    """
    if not counts:
        return 0.0, False
    k, n = np.array(counts, dtype=float).T
    many = n > 1
    if many.any():
        k, n = k[many], n[many]
        return float(np.sqrt(np.mean(k * (n - k) / (n**2 * (n - 1))))), False
    q = float(k.mean())
    return float(np.sqrt(q * (1 - q))), True


def _steps(traces: list[Trace], counts: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """Values of the distinct prefixes of every length in steps."""
    seen: set[str] = set()
    values: dict[int, list[float]] = defaultdict(list)
    for trace in traces:
        for step, end in enumerate((0, *trace.step_ends)):
            key = prefix_key(trace.problem_id, trace.ids[:end])
            if key in counts and key not in seen:
                seen.add(key)
                values[step].append(counts[key][0] / counts[key][1])
    return [
        {
            "step": step,
            "prefixes": len(q),
            "mean": float(np.mean(q)),
            "histogram": np.histogram(q, bins=BINS, range=(0, 1))[0].tolist(),
        }
        for step, q in sorted(values.items())
    ]


def _first_errors(
    traces: list[Trace], counts: dict[str, tuple[int, int]]
) -> tuple[dict[str, int], float]:
    """(step -> wrong traces whose first prefix with Q = 0 it is, share of wrong seeds without)."""
    found: Counter[int] = Counter()
    wrong = 0
    for trace in traces:
        if trace.correct:
            continue
        keys = [prefix_key(trace.problem_id, trace.ids[:end]) for end in (0, *trace.step_ends)]
        known = [(step, counts[key]) for step, key in enumerate(keys) if key in counts]
        if not known:
            continue
        wrong += 1
        first = next((step for step, (k, _) in known if k == 0), None)
        if first is not None:
            found[first] += 1
    share = 1 - _ratio(found.total(), wrong) if wrong else 0.0
    return {str(step): n for step, n in sorted(found.items())}, share


def base_accuracy(
    traces: list[Trace], completions: Iterable[Completion], base: str
) -> dict[str, Any]:
    """How often the base policy solves label problems and validation problems on its own.

    From its seeds and its rollouts of step 0. ``difference`` is label minus validation problems,
    with a 95% interval (normal, over problems); where all of it is above :data:`CONTAMINATED` the
    base has probably seen the label problems.
    """
    split_of = {t.problem_id: t.split for t in traces}
    solved: dict[str, list[bool]] = defaultdict(list)
    for t in traces:
        if t.policy == base:
            solved[t.problem_id].append(t.correct)
    for c in completions:
        if c.policy == base and not c.prefix_ids:
            solved[c.problem_id].append(c.correct)
    rates: dict[str, list[float]] = {"train": [], "validation": []}
    for pid, right in solved.items():
        if pid in split_of:
            rates[split_of[pid]].append(float(np.mean(right)))
    label, held = rates["train"], rates["validation"]
    out: dict[str, Any] = {
        "label_problems": float(np.mean(label)) if label else None,
        "validation_problems": float(np.mean(held)) if held else None,
        "difference": None,
        "ci95": None,
        "contaminated": False,
    }
    if label and held:
        difference = float(np.mean(label) - np.mean(held))
        if len(label) > 1 and len(held) > 1:
            variance = np.var(label, ddof=1) / len(label) + np.var(held, ddof=1) / len(held)
            half = 1.96 * float(np.sqrt(variance))
            out["ci95"] = [difference - half, difference + half]
            # A few problems differ by chance.
            out["contaminated"] = difference - half > CONTAMINATED
        out["difference"] = difference
    return out


def print_health(health: dict[str, Any], directory: Path) -> None:
    """The figures that decide whether labels are fit for use; warnings on stderr."""
    for name, s in _named(health["seeds"]):
        print(
            f"  traces of {name}: {s['right']:.3f} of {s['solutions']} right, "
            f"{s['truncated']:.1%} truncated, {s['unparsed']:.1%} without answer, "
            f"{s['duplicates']:.1%} duplicates"
        )
    for name, p in _named(health["policies"]):
        if not p["rollouts"]:
            if p["prefixes"]:
                print(f"  {name}: endings of its solutions label {p['prefixes']} prefixes")
            continue
        limit = "at most " if p["label_noise_is_limit"] else ""
        print(
            f"  rollouts of {name}: {p['right']:.3f} of {p['rollouts']} right, "
            f"{p['truncated']:.1%} truncated, {p['unparsed']:.1%} without answer, label noise "
            f"{limit}{p['label_noise']:.2f} of a spread of {p['label_spread']:.2f}"
        )
        if p["truncated"] > 0.05:
            _warn(
                f"{p['truncated']:.1%} of the rollouts of {name} hit sampler.max_length; raise it"
            )
    a = health["base_accuracy"]
    if a["contaminated"]:
        interval = " [{:+.3f}, {:+.3f}]".format(*a["ci95"])
        _warn(
            f"labels are contaminated: the base policy solves {a['label_problems']:.3f} of the "
            f"label problems and {a['validation_problems']:.3f} of the validation problems "
            f"({a['difference']:+.3f}{interval}); label problems that it was not trained on"
        )
    print(f"  health: {directory / HEALTH}, {directory / DASHBOARD}")


def _named(by_policy: dict[str, Any]) -> list[tuple[str, Any]]:
    # A run's policies may have been named elsewhere.
    return [(one_line(name), figures) for name, figures in by_policy.items()]


def _warn(message: str) -> None:
    print(f"WARNING: {one_line(message)}", file=sys.stderr)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return float(np.mean(listed)) if listed else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
