"""The page of a run, ``rl.html``: headline, warnings, curves, settings and sample traces.

It holds no script and asks the network for nothing; its policy forbids both. What models and users
wrote is escaped, and what nobody would see in it is shown (:func:`pav.core.printable.printable`).
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from pav.core.files import json_rows, json_text, read_object, replace_file, write_whole
from pav.core.printable import printable
from pav.rl.curves import draw
from pav.rl.guards import Metrics, read_alarms
from pav.rl.live import split
from pav.rl.samples import Sampled, read_samples

METRICS = "metrics.jsonl"
SETTINGS = "rl.json"
PAGE, PICTURE = "rl.html", "rl.png"
# Sampled iterations that a page holds, the newest ones: it opens at once after thousands, too.
SHOWN = 30


def read_metrics(directory: Path) -> list[Metrics]:
    """Metrics of every iteration, oldest first; NaN for null. A torn last line is left out."""
    rows = json_rows(directory / METRICS)
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]


def write_report(directory: Path) -> None:
    """Write ``rl.png`` and ``rl.html`` of a run, which may still be going on.

    Args:
        directory: that ``pav.rl`` writes to.

    Raises:
        UserError: if its files are damaged.
    """
    history, alarms = read_metrics(directory), read_alarms(directory)
    settings: dict[str, Any] = {}
    if (directory / SETTINGS).is_file():
        settings = read_object(directory / SETTINGS, "give the command that made the run again")
    title = directory.resolve().name
    picture = directory / PICTURE
    said = ", ".join(
        f"{k} {settings[k]}" for k in ("dense", "alpha", "estimator", "lr") if k in settings
    )
    write_whole(picture, lambda stream: draw(history, alarms, stream, f"{title}: {said}"))
    page = render(
        title=title,
        headline=headline(history),
        alarms=alarms,
        picture=b64encode(picture.read_bytes()).decode(),
        settings={k: v if isinstance(v, str) else json_text(v) for k, v in settings.items()},
        iterations=_by_iteration(read_samples(directory)),
    )
    replace_file(directory / PAGE, page)


def render(**values: Any) -> str:
    """The page of these values; nothing in them becomes markup."""
    from jinja2 import Environment, StrictUndefined

    here = Path(__file__).with_name("report")
    style = here.with_suffix(".css").read_text(encoding="utf-8")
    digest = b64encode(sha256(style.encode()).digest()).decode()
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: value if hasattr(value, "__html__") else printable(value),
    )  # fmt: skip
    template = environment.from_string(here.with_suffix(".html").read_text(encoding="utf-8"))
    return template.render(
        **values, style=style, style_hash=f"sha256-{digest}", rows=step_rows
    )  # fmt: skip


def headline(history: Sequence[Metrics]) -> dict[str, str]:
    """Figures that a reader wants first: name -> value."""
    held_out = [row for row in history if "accuracy" in row]
    trained = [row for row in history if row.get("samples")]
    found = {}
    if held_out:
        start, last = held_out[0], held_out[-1]
        best = max(held_out, key=lambda row: row["accuracy"])
        for name, row in (("at the start", start), ("best", best), ("last", last)):
            found[f"held-out accuracy, {name}"] = (
                f"{row['accuracy']:.3f} [{row['accuracy_low']:.3f}, {row['accuracy_high']:.3f}] "
                f"after iteration {row['iteration']:.0f}"
            )
        passed = [k for k in last if k.startswith("pass@")]
        for name in ("greedy", *passed):
            found[f"held-out {name}"] = f"{start[name]:.3f} to {last[name]:.3f}"
    if trained:
        first, now = trained[0], trained[-1]
        seconds = sum(row.get("seconds/all") or 0.0 for row in history)
        found["iterations, traces"] = f"{now['iteration']:.0f}, {now['samples']:.0f}"
        for name, key in (("steps", "train/steps"), ("tokens", "train/tokens")):
            found[f"{name} per trace"] = f"{first[key]:.1f} to {now[key]:.1f}"
        found["hours"] = f"{seconds / 3600:.2f}"
        found["seconds of the last iteration"] = split(now)
    return found


def _by_iteration(traces: Sequence[Sampled]) -> list[tuple[int, list[Sampled]]]:
    """Sampled iterations, the newest first."""
    groups = [(i, list(own)) for i, own in groupby(traces, key=lambda trace: trace.iteration)]
    return groups[: -SHOWN - 1 : -1]


def step_rows(trace: Sampled) -> list[dict[str, Any]]:
    """A row per step: its text, Q before and after it by head, gain and credit."""
    rows = []
    for s, text in enumerate(trace.steps):
        q = [f"{a:.3f} → {b:.3f}" for a, b in (list(pairwise(v))[s] for v in trace.q.values())]
        gain = trace.gain[s] if s < len(trace.gain) else math.nan
        credit = trace.credit[s] if s < len(trace.credit) else math.nan
        rows.append({
            "step": s + 1, "text": text, "q": q, "gain": _signed(gain), "credit": _signed(credit),
            "tone": "up" if gain > 0.05 else "down" if gain < -0.05 else "",
        })  # fmt: skip
    return rows


def _signed(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.3f}"
