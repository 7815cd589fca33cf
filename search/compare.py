"""``search.compare``: methods x N x seeds in one engine load; tables, CSV, JSON and plots."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pav.cli import run
from pav.errors import UserError
from pav.verifier import Verifier, load_verifier
from search.efficiency import Ratio, print_ratios, ratios, write_ratios
from search.investment import invested_flops
from search.plan import CompareConfig, Investment, Method, Selectable
from search.points import PICKS, Point, paired, print_points, write_csv, write_picks
from search.records import open_run
from search.report import write_report
from search.sampled import other_policy, ranker, sample_points
from search.select import Choice, choose, print_choice, write_choice
from search.select import manifest as selected
from search.session import open_session
from search.sweep import Sweep, prepared, search_points

__all__ = ["CompareConfig", "Investment", "Method", "compare", "main"]


def compare(config: CompareConfig) -> None:
    """Run the comparison (see :class:`~search.plan.CompareConfig`)."""
    verifiers = {m.verifier: load_verifier(m.verifier) for m in config.methods if m.verifier}
    first = next(iter(verifiers.values()))
    # Before anything is searched: a mistyped label run must not cost the night.
    invested = _invested(config, verifiers)
    session = open_session(first, config.task, None, config.sampler, config.engine, config.workers)
    for verifier in verifiers.values():
        if verifier.card.policy_fingerprint != first.card.policy_fingerprint:
            raise UserError(
                f"verifiers {str(first.path)!r} and {str(verifier.path)!r} were made "
                "for different policies; compare them in two runs"
            )
    output = Path(config.output)
    problems = session.problems(config.split, config.problems, config.skip)
    sweep = Sweep(config, verifiers, session, problems, output)
    _prepare(sweep)
    digests = {name: v.digest for name, v in verifiers.items()}
    digests |= {model.config.model: model.digest for model in session.readers.values()}
    open_run(output, manifest(config, digests))
    sweep = with_choices(sweep)
    points: list[Point] = []
    for method in sweep.config.methods:
        if method.kind != "best_of_n":
            points += search_points(sweep, method)
    points += sample_points(sweep, points)
    session.shutdown()
    write_picks(points, [p.id for p in problems], config.seeds, output / PICKS)
    _report(config, points, invested)
    session.check()


def _prepare(sweep: Sweep) -> None:
    """Have the session know all models; what does not fit must not cost the night either.

    Raises:
        UserError: if a method cannot be searched as it is set.
    """
    for method in sweep.config.methods:
        if method.kind != "best_of_n":
            prepared(sweep, method)
            continue
        sweep.session.sampling_engine(None, other_policy(sweep, method))
        if method.verifier or method.orm:
            ranker(sweep, method)


def with_choices(sweep: Sweep) -> Sweep:
    """The comparison with what its beams leave open chosen on validation problems."""
    config = sweep.config
    chosen: dict[str, Choice] = {}
    methods = []
    for method in config.methods:
        left_open: list[Selectable] = [
            what
            for what in config.select
            if (method.alpha if what == "alpha" else method.prover) is None
        ]
        if method.kind not in ("beam", "dvts") or not left_open:
            methods.append(method)
            continue
        # Beams that differ in name and widths alone share a choice.
        key = json.dumps(asdict(replace(method, name="", n=None)), sort_keys=True)
        if key not in chosen:
            place = replace(sweep, output=sweep.output / "select" / str(len(chosen)))
            choice = choose(place, method, left_open, config.selection)
            write_choice(choice, place.output)
            print_choice(choice, config.selection)
            chosen[key] = choice
        alpha, prover = chosen[key].alpha, chosen[key].prover
        methods.append(
            replace(
                method,
                alpha=method.alpha if alpha is None else alpha,
                prover=method.prover if prover is None else prover,
            )
        )
    return replace(sweep, config=replace(config, methods=methods))


def _report(config: CompareConfig, points: list[Point], invested: dict[str, float]) -> None:
    from search.plot import plot_accuracy, plot_optimisation

    output = Path(config.output)
    order = {m.name: i for i, m in enumerate(config.methods)}
    points.sort(key=lambda p: (order[p.method], p.n))
    write_csv(points, output / "compare.csv")
    differences = paired(points)
    (output / "compare.json").write_text(json.dumps(differences, indent=1))
    found = ratios(points, invested)
    write_ratios(found, output / "efficiency.json")
    count, seeds = points[0].correct_PS.shape
    counted = f"{count} {config.split} problems, {seeds} seed(s)"
    title = f"{config.title} ({counted})" if config.title else counted
    plot_accuracy(points, "policy_tokens", output / "compare.png", title)
    plot_accuracy(points, "n", output / "compare_n.png", title)
    plot_accuracy(points, "flops", output / "compare_flops.png", title)
    plot_optimisation(points, output / "optimisation.png", title)
    page = write_report(output)
    print_points(points, differences, config.split)
    print_ratios(found)
    if uncounted := _uncounted(config, found, invested):
        print(
            f"what {', '.join(uncounted)} cost to label and to train is unknown (no checkpoint "
            "holds it), so no break-even is shown; name the label runs under investments"
        )
    print(
        f"results: {output}/compare.csv, compare.json, efficiency.json, compare.png, "
        "compare_n.png, compare_flops.png, optimisation.png, one .jsonl per run\n"
        f"report: {page}\n"
        f"next: search.beam --verifier {config.methods[0].verifier or 'pav:reference'} "
        "--baseline orm --n 8"
    )


def _invested(config: CompareConfig, verifiers: dict[str, Verifier]) -> dict[str, float]:
    """Method -> FLOPs that went into its verifier, where they are known."""
    if not config.investments:
        return {}
    spent: dict[str | None, float] = {None: 0.0}
    spent |= {
        i.verifier: invested_flops(i, verifiers[i.verifier], config.task)
        for i in config.investments
    }
    return {m.name: spent[m.verifier] for m in config.methods if m.verifier in spent and not m.orm}


def _uncounted(config: CompareConfig, found: list[Ratio], invested: dict[str, float]) -> list[str]:
    """What ranks in the ratios and cost an unknown amount to make."""
    compared = {name for r in found for name in (r.method, r.baseline)} - invested.keys()
    used = [m for m in config.methods if m.name in compared]
    names = [m.orm.model if m.orm else m.verifier for m in used]
    return list(dict.fromkeys(name for name in names if name))


def manifest(config: CompareConfig, digests: dict[str, str]) -> dict[str, Any]:
    """What a run directory is about: everything that changes records, what scores by digest."""
    plain = {
        "methods": [_plain(m) for m in config.methods],
        "verifiers": digests,
        "n": config.n,
        "seeds": config.seeds,
        "problems": config.problems,
        "skip": config.skip,
        "split": config.split,
        "sampler": None if config.sampler is None else asdict(config.sampler),
        "max_traces": config.max_traces,
    }
    # Absent where nothing is chosen: runs of a version without it are resumed.
    return plain | selected(config.select, config.selection) if config.select else plain


# Settings of a method that came later than its first runs.
LATER = ("score", "duplicates", "weight", "resampling", "orm")


def _plain(method: Method) -> dict[str, Any]:
    # Later settings are absent where they are not used: runs of a version without are resumed.
    return {k: v for k, v in asdict(method).items() if k not in LATER or v is not None}


def main() -> None:
    """Entry point of ``search.compare``."""
    run(compare, CompareConfig, "search.compare")


if __name__ == "__main__":
    main()
