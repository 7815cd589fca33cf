"""What a run of pav.rl shows: page, picture, lines on a terminal and ``data_gen.show``."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_gen.inspect.show import main
from pav.core.errors import UserError
from pav.core.files import json_text
from pav.rl import live
from pav.rl.guards import Alarm, Metrics
from pav.rl.report import SHOWN, read_metrics, write_report
from pav.rl.samples import SAMPLES, Sampled, append_samples, read_samples

HOSTILE = "</td><script>alert(1)</script>\x1b[2J\u202e<img src=x onerror=alert(2)>\ud800"
ALARM = Alarm(2, "filler_steps", f"steps grow {HOSTILE}", stops=False)


def history(iterations: int) -> list[Metrics]:
    rows: list[Metrics] = [evaluation(0)]
    for i in range(1, iterations + 1):
        row = {
            "iteration": i, "samples": 8 * i, "train/accuracy": 0.1 * i, "train/outcome": 0.1 * i,
            "train/dense": -0.3, "train/dense_per_step": -0.03, "train/dense_spread": 0.2,
            "train/dead_groups": 0.5, "train/tokens": 60 + i, "train/tokens_max": 90.0,
            "train/steps": 8.5, "train/truncated": 0.0, "train/empty_steps": 0.0,
            "train/repeated_steps": 0.01, "train/alike": 0.0, "update/loss": -3.0,
            "update/gradient_norm": 12.0, "update/entropy": 0.2, "update/kl_k1": 0.001,
            "update/kl_k3": 0.001, "update/clipped": 0.0, "mismatch/mean": 3e-7,
            "mismatch/largest_ratio": 1.0, "mismatch/beyond_2": 0.0, "seconds/sample": 1.0,
            "seconds/update": 2.5, "seconds/all": 3.5,
        }  # fmt: skip
        rows.append({**row, **evaluation(i)} if i % 2 == 0 else row)
    return rows


def evaluation(iteration: int) -> Metrics:
    accuracy = 0.13 + 0.01 * iteration
    return {"iteration": iteration, "accuracy": accuracy, "accuracy_low": accuracy - 0.05,
            "accuracy_high": accuracy + 0.05, "greedy": 0.5, "pass@2": 0.3, "pass@4": 0.4,
            "held_out/tokens": 61.0}  # fmt: skip


def trace(iteration: int, text: str, truncated: bool = False) -> Sampled:
    return Sampled(
        iteration, f"p{iteration}", f"question {text}", "34", None if truncated else text,
        not truncated, truncated, iteration - 1, 1.0, [f"first {text}\n", "second\n"],
        f"tail {text}" if truncated else "", [0.21, -0.33], [0.63, -0.99],
        {"q/base": [0.1, 0.3, 0.2], "orm": [0.9, 0.8, 0.7]},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of six iterations leaves, its model a hostile one."""
    directory = tmp_path_factory.mktemp("rl")
    lines = [json_text(row, None) for row in history(6)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + '\n{"iteration": 7, "tr')
    (directory / "warnings.jsonl").write_text(json.dumps(vars(ALARM)) + "\n")
    (directory / "rl.json").write_text(json.dumps({"dense": "pav", "alpha": 3.0, "init": HOSTILE}))
    append_samples(directory, [trace(2, "harmless"), trace(4, HOSTILE), trace(4, "cut", True)])
    write_report(directory)
    return directory


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def test_what_a_model_wrote_is_text_on_a_page_that_runs_and_loads_nothing(run: Path) -> None:
    text = (run / "rl.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert page.tags.count("img") == 1  # the curves
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "default-src 'none'" in text
    assert "script-src" not in text
    # What nobody would see is shown: terminal codes, marks of direction, halves of characters.
    assert not set(text) & {"\x1b", "\u202e"}
    shown = r"first </td><script>alert(1)</script>\x1b[2J\u202e<img src=x onerror=alert(2)>\ud800"
    assert shown in page.text


def test_the_page_tells_figures_warnings_and_what_every_step_earned(run: Path) -> None:
    page = Page((run / "rl.html").read_text(encoding="utf-8"))
    at = page.text.index("held-out accuracy, best")
    assert "0.190 [0.140, 0.240] after iteration 6" in page.text[at + 1 : at + 4]
    assert "filler_steps" in page.text
    first = page.text.index("first harmless")
    row = [cell for cell in page.text[first + 1 :] if cell][:4]
    assert row == ["0.100 → 0.300", "0.900 → 0.800", "+0.210", "+0.630"]
    assert "tail cut" in page.text
    # The newest sampled iteration comes first.
    assert page.text.index("iteration 4") < page.text.index("iteration 2")


def test_the_picture_has_a_curve_in_every_panel(run: Path) -> None:
    with Image.open(run / "rl.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    colourful = (pixels.max(axis=2) - pixels.min(axis=2)) > 60
    rows, columns = np.array_split(colourful, 4, axis=0), 3
    panels = [panel for row in rows for panel in np.array_split(row, columns, axis=1)]
    assert [i for i, panel in enumerate(panels) if panel.sum() < 200] == []


def test_a_run_without_an_evaluation_or_a_single_iteration_is_shown(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    write_report(tmp_path)
    bare = {k: v for k, v in history(1)[1].items() if not k.startswith("verifier")}
    (tmp_path / "metrics.jsonl").write_text(json_text(bare | {"update/loss": float("nan")}, None))
    write_report(tmp_path)
    assert "None yet." in (tmp_path / "rl.html").read_text()
    assert live.lines(read_metrics(tmp_path))


def test_a_page_of_a_long_run_holds_its_newest_samples(tmp_path: Path) -> None:
    append_samples(tmp_path, [trace(i, f"number{i}.") for i in range(1, SHOWN + 11)])
    write_report(tmp_path)
    text = (tmp_path / "rl.html").read_text()
    assert "first number40." in text
    assert "first number11." in text
    assert "first number10." not in text


def test_samples_are_read_as_they_were_written(tmp_path: Path) -> None:
    traces = [trace(1, HOSTILE), trace(2, "cut", True)]
    append_samples(tmp_path, traces[:1])
    append_samples(tmp_path, traces[1:])
    with (tmp_path / SAMPLES).open("a") as stream:
        stream.write('{"iteration": 3, "prob')
    assert read_samples(tmp_path) == traces
    (tmp_path / SAMPLES).write_text('{"some": "thing"}\n')
    with pytest.raises(UserError, match="does not hold sample traces"):
        read_samples(tmp_path)


def test_show_prints_the_last_samples_of_a_run(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["data_gen.show", str(run)])
    main()
    out = capsys.readouterr().out
    assert "problem p4 (iteration 4), answer 34" in out
    assert "harmless" not in out
    assert "\x1b" not in out
    lines = [line.split() for line in out.splitlines()]
    assert ["2", "second", "0.20", "-0.10", "0.70", "-0.33", "-0.99"] in lines
    assert "tail cut (no whole step)" in out
    monkeypatch.setattr(sys, "argv", ["data_gen.show", str(run), "--problem", "0"])
    main()
    assert "first harmless" in capsys.readouterr().out


def test_show_refuses_a_problem_that_a_run_does_not_have(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["data_gen.show", str(run), "--problem", "p9"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "problem is 'p9'; give a number below 2" in capsys.readouterr().err


def test_the_lines_of_a_terminal_tell_the_last_iteration() -> None:
    found = live.lines(history(6), [ALARM])
    assert 4 <= len(found) <= 6
    assert found[0] == (
        "held out  0.190 [0.140, 0.240] after 6, best 0.190 after 6, greedy 0.500, pass@4 0.400"
    )
    assert found[-2] == "seconds   update 2.50, sample 1.00 (all 3.50)"
    assert found[-1] == "WARNING   filler_steps (at 2): see rl.html"
    assert live.lines(history(0)) == []
