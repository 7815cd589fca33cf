"""Progress of long work: a bar on a terminal, one plain line a minute where output is a file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pav.core.printable import cell, one_line

PLAIN_SECONDS = 60.0


class Reporter:
    """Reports ``done`` of ``total`` units with rate and time left. Use as a context manager.

    Args:
        what: the work.
        total: units of it.
        unit: what is counted.
        quiet: report nothing.
    """

    def __init__(self, what: str, total: int, unit: str, quiet: bool = False) -> None:
        self.what, self.total, self.unit = one_line(what), total, unit
        self.start = self.last = time.monotonic()
        self.first: int | None = None
        self.bar: Progress | None = None
        self.lines: Sequence[str] = ()
        self.quiet = quiet
        if not quiet and Console().is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]} min left"),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self.task = self.bar.add_task(self.what, total=total, note="", left="?")
            bar = self.bar
            self.live = Live(get_renderable=lambda: Group(bar, *map(cell, self.lines)))

    def __enter__(self) -> Reporter:
        if self.bar:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar:
            self.live.stop()

    def update(
        self, done: int, note: str = "", lines: Sequence[str] = (), left: float | None = None
    ) -> None:
        """Say how far it is.

        Args:
            done: counts from the start of the work, resumed parts included.
            note: stands at the end of the line.
            lines: stand below the bar; on a terminal only.
            left: expected minutes; by default from the rate so far.
        """
        if self.quiet:
            return
        if self.first is None:
            self.first = done
        note, self.lines = one_line(note), lines
        now = time.monotonic()
        rate = (done - self.first) / max(now - self.start, 1e-9)
        if left is None and rate > 0:
            left = (self.total - done) / rate / 60
        minutes = "?" if left is None else f"{left:.1f}"
        if self.bar:
            self.bar.update(self.task, completed=done, note=note, left=minutes)
            return
        if now - self.last < PLAIN_SECONDS and done < self.total:
            return
        self.last = now
        print(
            f"{self.what}: {done}/{self.total} {self.unit}, {rate:.2f}/s, {minutes} min left"
            + (f", {note}" if note else ""),
            flush=True,
        )
