"""``search.select``: alpha and prover of a beam, chosen on the validation split and nowhere else.

The paper's procedure (Section 4 and Appendix D): alpha with beam 16 and the base policy as prover,
first by halving it from 10 until the beam beats alpha 0, then on a grid of ten steps up to there;
then, with that alpha, the prover, Best-of-K of the base policy for several K. Heads of other
policies that the verifier has compete with them.
"""

from __future__ import annotations

import csv
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.files import json_text
from pav.core.manifest import PROMPTS
from pav.core.printable import cell, csv_text, one_line
from pav.core.statistics import bootstrap
from pav.engine.loading import EngineConfig
from pav.engine.pool import check_workers
from pav.policy.opening import task_option
from pav.policy.policy import Sampler
from pav.tasks.base import Task
from pav.verifier.checkpoint import VerifierMeta
from pav.verifier.pick import Pick
from search.compare.plan import CompareConfig, Method, Selectable, Selection
from search.compare.results import MethodResult
from search.compare.run_searches import Comparison, prepared, search_results
from search.run.opening import capped, load_checked, open_session, warn_few
from search.run.records import MANIFEST, open_run
from search.run.session import Scoring
from search.run.setup import say_opening

COARSE = (10.0, 5.0, 2.5, 1.25, 0.625, 0.3125)


@dataclass(frozen=True)
class SelectConfig:
    """Choose alpha and prover on validation problems.

    Args:
        verifier: checkpoint that pav.train wrote, or ``pav:reference``.
        output: run directory; the same command resumes it.
        select: what to choose, ``alpha``, ``K`` (the prover) or both.
        selection: how.
        pick: final pick; by default the verifier's.
        samples: children per place and step (C).
        surprise: use the calibrators with surprise.
        scoring: fused, separate or auto.
        task: needed only where the verifier's task is not built in.
        sampler: another sampler than the verifier was made for (warns).
        concurrency: problems at a time, of each worker.
        workers: processes that search, each with engines of its own; they share the GPUs or cores.
        ray: address of a Ray cluster of your own that the workers run on (``auto``, ``host:port``),
            or ``local``; needs the extra ``ray``. Ray runs code for whoever reaches its ports.
        engine: device settings.
    """

    verifier: str
    output: str
    select: list[Selectable] = field(default_factory=lambda: ["alpha", "K"])
    selection: Selection = field(default_factory=Selection)
    pick: Pick | None = None
    samples: int = 3
    surprise: bool = True
    scoring: Scoring = "auto"
    task: Task | None = None
    sampler: Sampler | None = None
    concurrency: int = 32
    workers: int = 1
    ray: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        check_workers(self.workers, self.ray)
        if not self.select:
            raise UserError("select is empty; give [alpha], [K] or [alpha,K]")


@dataclass(frozen=True)
class Choice:
    """What was chosen, and every search that was tried for it.

    Attributes:
        alpha, prover: None where it was not to be chosen.
        tried: (stage, point) in the order of the search.
        notes: how sure the choice is.
    """

    alpha: float | None
    prover: str | None
    tried: list[tuple[str, MethodResult]]
    notes: tuple[str, ...] = ()


def select(config: SelectConfig) -> None:
    """Choose, write the choice and print the flags (see :class:`SelectConfig`)."""
    verifier = load_checked(config.verifier, "pav")
    config = replace(config, sampler=capped(config.sampler, verifier.card))
    session = open_session(
        verifier,
        config.task,
        None,
        config.sampler,
        config.engine,
        config.workers,
        ray=config.ray,
    )
    method = Method(
        "select",
        verifier=config.verifier,
        pick=config.pick,
        samples=config.samples,
        surprise=config.surprise,
        scoring=config.scoring,
    )
    output = Path(config.output)
    plan = CompareConfig([method], config.output, concurrency=config.concurrency)
    known = {
        "verifier_digest": verifier.digest,
        "sampler": None if config.sampler is None else asdict(config.sampler),
        "method": asdict(method),
    }
    comparison = Comparison(plan, {config.verifier: verifier}, session, [], output)
    problems = session.problems("validation", config.selection.problems)
    session.expect_scorer(verifier, config.scoring, None)
    prepared(comparison, method)
    known[PROMPTS] = session.prompts()
    if not (output / MANIFEST).exists():
        session.check_models()
    with open_run(output, known | manifest(config.select, config.selection)), session:
        say_opening(session, problems, "validation")
        choice = choose(comparison, method, config.select, config.selection)
        write_choice(choice, output)
        print_choice(choice, config.selection)
        flags = [f"--{k} {v}" for k, v in _chosen(choice).items()]
        print(
            f"results: {output}/choice.yaml, select.csv, one .jsonl per run\n"
            f"next: search.beam --verifier {shlex.quote(config.verifier)}"
            f"{task_option(verifier.card.task)} {' '.join(flags)}"
        )
        session.check()


def manifest(chosen: list[Selectable], selection: Selection) -> dict[str, Any]:
    """The settings of a choice, for a run's manifest."""
    return {"select": list(chosen), "selection": asdict(selection)}


def choose(
    comparison: Comparison, method: Method, what: list[Selectable], how: Selection
) -> Choice:
    """Choose for one beam method; only validation problems are searched.

    The most accurate value wins. Of several that are exactly as accurate the default (the method's,
    else the verifier's) is kept, where it is among them or where all that was tried is equal; else
    the first is taken: the smallest alpha, the smallest K.

    Args:
        comparison: session, verifiers and where records go; its problems are not used.
        method: the beam; its own alpha and prover are kept where they are not to be chosen.
        what: ``alpha``, ``K`` or both.
        how: problems and grids.
    """
    card = comparison.verifiers[str(method.verifier)].card
    problems = comparison.session.problems("validation", how.problems)
    warn_few(len(problems), "validation", how.problems)
    comparison = replace(
        comparison,
        config=replace(comparison.config, seeds=how.seeds, split="validation"),
        problems=problems,
    )
    comparison.output.mkdir(parents=True, exist_ok=True)
    tried: list[tuple[str, MethodResult]] = []

    def searched(stage: str, alpha: float, prover: str) -> MethodResult:
        named = replace(
            method, name=f"alpha {alpha:g}, {prover}", alpha=alpha, prover=prover, n=[how.n]
        )
        (point,) = search_results(comparison, named)
        tried.append((stage, point))
        return point

    notes = []
    alpha = card.alpha if method.alpha is None else method.alpha
    if "alpha" in what:
        alphas = how.alphas or _grid(lambda a: searched("coarse", a, "bo1").accuracy.mean)
        points = {a: searched("alpha", a, "bo1") for a in sorted(alphas)}
        alpha, note = _best(points, alpha)
        notes.append(f"alpha: {note}")
    prover = method.prover or card.prover_head
    if "K" in what:
        by_prover = {p: searched("K", alpha, p) for p in _provers(card, how)}
        prover, note = _best(by_prover, prover)
        notes.append(f"prover: {note}")
    return Choice(
        alpha if "alpha" in what else None, prover if "K" in what else None, tried, tuple(notes)
    )


def _grid(accuracy: Callable[[float], float]) -> list[float]:
    """Ten steps up to the first alpha, halved from 10, that beats alpha 0."""
    plain = accuracy(0.0)
    top = next((a for a in COARSE if accuracy(a) > plain), COARSE[-1])
    return [round(top * i / 10, 6) for i in range(11)]


def _provers(card: VerifierMeta, how: Selection) -> list[str]:
    others = [h for h in card.heads if h.startswith("q/") and h != card.base_head]
    return [*(f"bo{k}" for k in sorted(how.ks)), *others]


def _best(points: dict[Any, MethodResult], default: Any) -> tuple[Any, str]:
    """(the value of the best point, how sure that is); see :func:`choose` for equals."""
    means = {value: point.accuracy.mean for value, point in points.items()}
    best = [value for value in means if means[value] == max(means.values())]
    if len(best) > 1 and (default in best or len(best) == len(means)):
        return default, f"tie: default kept ({default}; as accurate: {_listed(best)})"
    chosen = best[0]
    if len(best) > 1:
        return chosen, f"tie: the first of {_listed(best)} is taken"
    others = [value for value in means if value != chosen]
    if not others:
        return chosen, "nothing else was tried"
    second = max(others, key=lambda value: means[value])
    ahead = bootstrap(points[chosen].correct_PS - points[second].correct_PS)
    said = "ahead of" if ahead.low > 0 else "not distinguishable from"
    return chosen, f"{said} {second}, the second best, by {ahead}"


def _listed(values: list[Any]) -> str:
    return ", ".join(map(str, values))


def _chosen(choice: Choice) -> dict[str, Any]:
    plain = {"alpha": choice.alpha, "prover": choice.prover}
    return {k: v for k, v in plain.items() if v is not None}


def write_choice(choice: Choice, output: Path) -> None:
    """``choice.yaml``, JSON that search.beam takes as --config, and ``select.csv``."""
    (output / "choice.yaml").write_text(json_text(_chosen(choice), None) + "\n")
    with (output / "select.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["stage", "alpha", "prover", "n", "accuracy", "low", "high", "settings"])
        for stage, p in choice.tried:
            a, s = p.accuracy, p.settings
            writer.writerow(
                [
                    stage,
                    s["alpha"],
                    csv_text(s["prover"]),
                    p.n,
                    a.mean,
                    a.low,
                    a.high,
                    json_text(s, None),
                ]
            )


def print_choice(choice: Choice, how: Selection) -> None:
    """A table of what was tried."""
    table = Table(title=f"{how.problems} validation problems, beam N={how.n}")
    for column in ("stage", "alpha", "prover", "accuracy [95%]"):
        table.add_column(column)
    for stage, p in choice.tried:
        table.add_row(
            stage, f"{p.settings['alpha']:g}", cell(p.settings["prover"]), str(p.accuracy)
        )
    Console(width=100).print(table)
    chosen = ", ".join(f"{k} {v}" for k, v in _chosen(choice).items())
    print("\n".join([*map(one_line, choice.notes), f"chosen on validation: {one_line(chosen)}"]))


def main() -> None:
    """Entry point of ``search.select``."""
    run(select, SelectConfig, "search.select")


if __name__ == "__main__":
    main()
