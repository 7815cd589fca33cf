"""What a comparison prints: the sentence, the short tables, cells that are no formulas."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pav.core.tables import EXPLAINED
from search.compare.efficiency import ratios, said
from search.compare.headline import headline
from search.compare.plot import plot_accuracy, plot_optimisation
from search.compare.results import MethodResult, csv_rows, paired, print_results, write_csv
from search.report.data import _tables
from tests.search.test_efficiency import point


def right(share: float) -> Any:
    """100 problems, so many of them right."""
    return (np.arange(100) < round(100 * share))[:, None]


@pytest.fixture
def points() -> list[MethodResult]:
    """A beam at N 2 and 4, and two methods that pick from samples, also at its tokens."""
    found = [point("beam", n, right(a), beam=True) for n, a in ((2, 0.5), (4, 0.8))]
    for name, rule, shares in (
        ("orm", "orm", (0.3, 0.4, 0.5)),
        ("[b]vote", "majority", (0.2,) * 3),
    ):
        for n, a in zip((2, 4, 12), shares, strict=True):
            p = point(name, n, right(a), beam=False)
            matched = 4 if n == 12 else None
            found.append(replace(p, settings={"pick": rule}, matched=matched, matching=n == 12))
    return found


def test_headline_is_of_the_widest_beam_against_the_orm_at_its_tokens(
    points: list[MethodResult],
) -> None:
    sentence = headline(csv_rows(points), paired(points))
    assert sentence.startswith(
        "beam (N=4) is right on .800 of 100 problems, orm with as many policy tokens (N=12) on "
        ".500; difference +.300 [+.2"
    )
    assert sentence.endswith("]: beam is better")
    # An interval that holds 0 is no verdict, one below it is one against the beam.
    for share, verdict in (
        (0.79, "100 problems do not tell which is better"),
        (1.0, "orm is better"),
    ):
        other = [
            replace(p, correct_PS=right(share).astype(float)) if p.matching else p for p in points
        ]
        assert headline(csv_rows(other), paired(other)).endswith(f": {verdict}")
    # Without a beam there is no pair: every method at its largest N.
    alone = [p for p in points if not p.is_beam]
    assert headline(csv_rows(alone), paired(alone)).startswith(
        "of 100 problems are right: orm (N=12) .500 [."
    )


def test_short_tables_hold_a_row_per_method_and_explain_their_columns(
    points: list[MethodResult], capsys: pytest.CaptureFixture[str]
) -> None:
    print_results(points, paired(points), "test", False)
    short = capsys.readouterr().out
    rows = [
        [c.strip() for c in line.split("│")[1:-1]] for line in short.splitlines() if "│" in line
    ]
    assert [r[:3] for r in rows[:3]] == [
        ["beam", "0.500", "0.800"], ["orm", "0.300", "0.400"], ["[b]vote", "0.200", "0.200"]
    ]  # fmt: skip
    assert short.startswith("accuracy, 100 test problems, 1 seed ") and "seed(s)" not in short
    for column in ("N=...", "95% at the last", "tokens there", "difference", "p"):
        assert f"  {column}: {EXPLAINED[column]}"[:60] in short
    print_results(points, paired(points), "test", True)
    verbose = capsys.readouterr().out
    assert verbose.count("│") > 2 * short.count("│")
    assert "12 (tokens of beam 4)" in verbose and "believed" in verbose


def test_what_a_ratio_says_names_both_costs(points: list[MethodResult]) -> None:
    sentence = said(ratios(points))
    assert sentence.startswith("to be as good as orm at its best (.500), beam needs >= ")
    assert "times fewer policy tokens and" in sentence and "times fewer total FLOPs" in sentence
    worse = [replace(p, correct_PS=p.correct_PS * 0) if p.is_beam else p for p in points]
    assert said(ratios(worse)) == "beam is nowhere as good as orm at its best (.500)"
    assert said([]) == ""


def test_method_that_is_a_formula_is_text_in_the_csv_and_itself_in_the_report(
    points: list[MethodResult], tmp_path: Path
) -> None:
    evil = [replace(p, method="=1+1") if p.method == "orm" else p for p in points]
    write_csv(evil, tmp_path / "compare.csv")
    with (tmp_path / "compare.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [r["method"] for r in rows if r["method"] not in ("beam", "[b]vote")] == ["'=1+1"] * 3
    # Numbers below 0 are numbers.
    assert all(not v.startswith("'") for r in rows for k, v in r.items() if k != "method")
    (tmp_path / "compare.json").write_text(json.dumps(paired(evil)))
    tables = _tables(tmp_path, [], {})
    assert {r["method"] for r in tables["results"]} == {"beam", "=1+1", "[b]vote"}
    assert "=1+1 with as many policy tokens (N=12)" in tables["headline"]
    assert set(tables["explained"]) <= set(EXPLAINED)


def test_plots_over_n_hold_what_was_asked_for_and_scores_have_a_panel_of_their_own(
    points: list[MethodResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot as plt

    figures: list[Any] = []
    monkeypatch.setattr(plt, "close", figures.append)
    plot_accuracy(points, "n", tmp_path / "n.png", "$x$ \\frac")
    plot_accuracy(points, "policy_tokens", tmp_path / "tokens.png", "")
    plot_optimisation(points, tmp_path / "optimisation.png", "")
    over_n, over_tokens, optimisation = figures
    counts = {
        line.get_label(): line.get_xdata() for c in over_n.axes[0].containers for line in c[:1]
    }
    assert all(max(x) == 4 for x in counts.values())
    assert max(max(c[0].get_xdata()) for c in over_tokens.axes[0].containers) == 120
    # Whoever lies on another has another marker and is thinner, so that both are seen.
    beam, orm, vote = [c[0] for c in over_tokens.axes[0].containers]
    assert len({line.get_marker() for line in (beam, orm, vote)}) == 3
    assert orm.get_linewidth() > vote.get_linewidth() and orm.get_zorder() < vote.get_zorder()
    assert orm.get_markersize() > vote.get_markersize()
    (oracle,) = [x for x in over_tokens.axes[0].lines if "independent samples" in x.get_label()]
    assert list(oracle.get_ydata()) == [0.3, 0.4, 0.5]
    by_label = {
        c.get_label(): axes.get_ylabel() for axes in optimisation.axes for c in axes.containers
        if axes.get_ylabel()
    }  # fmt: skip
    assert by_label == {
        "a right answer in the final set": "share of problems",
        "accuracy of the pick": "share of problems",
        "verifier's mean score of the pick": "score, 0 to 1",
    }
    monkeypatch.undo()
    plt.close("all")
