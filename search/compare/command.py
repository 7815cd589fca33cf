"""``search.compare``: methods x N x seeds in one engine load; tables, CSV, JSON and plots."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pav.cli.run import run
from pav.core.errors import UserError
from pav.core.files import json_text
from pav.core.manifest import PROMPTS, Rendering
from pav.core.printable import one_line
from pav.core.renamed import on_disk
from pav.policy.opening import task_option
from pav.policy.policy import load_policy, settled
from pav.policy.rendered import rendered
from pav.verifier.checkpoint import Verifier, load_verifier
from search.compare.best_of_n_results import best_of_n_results, other_policy, ranker
from search.compare.efficiency import Ratio, print_ratios, ratios, said, write_ratios
from search.compare.headline import headline
from search.compare.investment import invested_flops
from search.compare.plan import CompareConfig, Investment, Method, Selectable
from search.compare.results import (
    PICKS,
    MethodResult,
    counted,
    csv_rows,
    paired,
    print_results,
    write_csv,
    write_picks,
)
from search.compare.run_searches import Comparison, prepared, search_results
from search.report.command import write_report
from search.run.opening import capped, open_session, sibling_orm, warn_few
from search.run.records import MANIFEST, open_run
from search.run.session import Session
from search.run.setup import say_opening
from search.select import Choice, choose, print_choice, write_choice
from search.select import manifest as selected

__all__ = ["CompareConfig", "Investment", "Method", "compare", "main"]


def compare(config: CompareConfig) -> None:
    """Run the comparison (see :class:`~search.compare.plan.CompareConfig`)."""
    verifiers = {m.verifier: load_verifier(m.verifier) for m in config.methods if m.verifier}
    first = next(iter(verifiers.values()))
    config = replace(config, sampler=capped(config.sampler, first.card))
    # Before anything is searched: a mistyped label run must not cost the night.
    invested = _invested(config, verifiers)
    session = open_session(
        first,
        config.task,
        None,
        config.sampler,
        config.engine,
        config.workers,
        config.grade_timeout,
        config.ray,
    )
    for verifier in verifiers.values():
        if verifier.card.policy_fingerprint != first.card.policy_fingerprint:
            raise UserError(
                f"verifiers {str(first.path)!r} and {str(verifier.path)!r} were made "
                "for different policies; compare them in two runs"
            )
    output = Path(config.output)
    problems = session.problems(config.split, config.problems, config.skip)
    warn_few(len(problems), config.split, config.problems)
    comparison = Comparison(config, verifiers, session, problems, output)
    _expect(config, session, verifiers)
    _prepare(comparison)
    digests = {name: v.digest for name, v in verifiers.items()}
    digests |= {model.config.model: model.digest for model in session.readers.values()}
    if not (output / MANIFEST).exists():
        session.check_models()
    prompts = session.prompts() | _own_policies(comparison)
    with open_run(output, manifest(config, digests) | {PROMPTS: prompts}), session:
        say_opening(session, problems, config.split)
        comparison = with_choices(comparison)
        results: list[MethodResult] = []
        for method in comparison.config.methods:
            if method.kind != "best_of_n":
                results += search_results(comparison, method)
        results += best_of_n_results(comparison, results)
        write_picks(results, [p.id for p in problems], config.seeds, output / PICKS)
        _report(config, results, invested, _following(verifiers))
        session.check()


def _expect(config: CompareConfig, session: Session, verifiers: dict[str, Verifier]) -> None:
    """Tell ``session`` which engines the methods will load."""
    for method in config.methods:
        if method.reward_model:
            session.reward_model(method.reward_model)
        scoring = method.scoring
        if method.kind == "best_of_n":
            own = method.policy and load_policy(method.policy, session.task.step_rule)
            session.expect(own or None)
            scoring = "separate"
        if method.verifier:
            session.expect_scorer(verifiers[method.verifier], scoring, None)


def _own_policies(comparison: Comparison) -> dict[str, Rendering]:
    """How the policies are asked that methods sample from in place of the verifiers' own."""
    own = [
        p for p in (other_policy(comparison, m) for m in comparison.config.methods) if p is not None
    ]
    return {f"the policy {p.config.label!r}": rendered(p) for p in own}


def _prepare(comparison: Comparison) -> None:
    """Have the session know all models; what does not fit must not cost the night either.

    Raises:
        UserError: if a method cannot be searched as it is set.
    """
    for method in comparison.config.methods:
        if method.kind != "best_of_n":
            prepared(comparison, method)
            continue
        comparison.session.sampling_engine(None, other_policy(comparison, method))
        if method.verifier or method.reward_model:
            ranker(comparison, method)


def with_choices(comparison: Comparison) -> Comparison:
    """The comparison with what its beams leave open chosen on validation problems."""
    config = comparison.config
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
            place = replace(comparison, output=comparison.output / "select" / str(len(chosen)))
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
    return replace(comparison, config=replace(config, methods=methods))


def _following(verifiers: dict[str, Verifier]) -> str:
    """A command to go on with: the first verifier of steps, and the ORM beside it."""
    for name, verifier in verifiers.items():
        if verifier.card.recipe != "pav":
            continue
        try:
            sibling_orm(verifier.path)
        except UserError:
            baseline = ""
        else:
            baseline = " --baseline orm"
        named = f"{shlex.quote(name)}{task_option(verifier.card.task)}"
        return f"search.beam --verifier {named}{baseline} --n 8"
    return "search.compare --help"


def _report(
    config: CompareConfig, results: list[MethodResult], invested: dict[str, float], following: str
) -> None:
    from search.compare.plot import plot_accuracy, plot_optimisation

    output = Path(config.output)
    order = {m.name: i for i, m in enumerate(config.methods)}
    results.sort(key=lambda p: (order[p.method], p.n))
    write_csv(results, output / "compare.csv")
    differences = paired(results)
    (output / "compare.json").write_text(json_text(differences))
    found = ratios(results, invested)
    write_ratios(found, output / "efficiency.json")
    what = counted(results, config.split)
    title = f"{config.title}: {what}" if config.title else what
    plot_accuracy(results, "policy_tokens", output / "compare.png", title)
    plot_accuracy(results, "n", output / "compare_n.png", title)
    plot_accuracy(results, "flops", output / "compare_flops.png", title)
    plot_optimisation(results, output / "optimisation.png", title)
    result = headline(csv_rows(results), differences)
    (output / "headline.txt").write_text(result + "\n", encoding="utf-8")
    page = write_report(output)
    print_results(results, differences, config.split, config.verbose)
    if config.verbose or invested:
        print_ratios(found)
    uncounted = _uncounted(config, found, invested)
    if uncounted and (config.verbose or invested):
        print(
            f"what {', '.join(uncounted)} cost to label and to train is unknown (no checkpoint "
            "holds it), so no break-even is shown; name the label runs under investments"
        )
    ns = sorted({p.n for p in results if not p.matching})
    methods = len({p.method for p in results})
    print(
        one_line(f"compared: {methods} methods at N {', '.join(map(str, ns))}: {title}"),
        one_line(f"result: {result}"),
        *([one_line(f"compute: {said(found)}")] if found else []),
        f"look at: {page} (in a browser), compare.png and optimisation.png beside it; all rows: "
        "compare.csv, compare.json, efficiency.json, or this command with --verbose true",
        one_line(f"next: {following}"),
        sep="\n",
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
    return {
        m.name: spent[m.verifier]
        for m in config.methods
        if m.verifier in spent and not m.reward_model
    }


def _uncounted(config: CompareConfig, found: list[Ratio], invested: dict[str, float]) -> list[str]:
    """What ranks in the ratios and cost an unknown amount to make."""
    compared = {name for r in found for name in (r.method, r.baseline)} - invested.keys()
    used = [m for m in config.methods if m.name in compared]
    names = [m.reward_model.model if m.reward_model else m.verifier for m in used]
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
LATER = ("score", "duplicates", "weight", "resampling", "reward_model")


def _plain(method: Method) -> dict[str, Any]:
    if method.policy is not None:
        method = replace(method, policy=settled(method.policy))
    # Later settings are absent where they are not used: runs of a version without are resumed.
    return on_disk({k: v for k, v in asdict(method).items() if k not in LATER or v is not None})


def main() -> None:
    """Entry point of ``search.compare``."""
    run(compare, CompareConfig, "search.compare")


if __name__ == "__main__":
    main()
