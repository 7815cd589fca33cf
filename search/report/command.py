"""``search.report DIR``: one page with tables, plots and the tree of every search, read offline.

The page is ``report.html``, its script and style are beside this file. What models, data sets and
users wrote goes into it as JSON alone, which the script shows as text; the page's own policy
forbids every other script and all of the network.
"""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pav.cli.directories import run_on_directories
from pav.core.errors import UserError
from pav.core.files import replace_file
from search.report.data import PROBLEMS, report_data

NAME = "report.html"
PLOTS = {
    "compare.png": "Accuracy over policy tokens",
    "compare_n.png": "Accuracy over N",
    "compare_flops.png": "Accuracy over total FLOPs",
    "optimisation.png": "Over-optimisation: found, picked and believed",
}


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html from the records of a finished run.

    Args:
        run: directory that search.compare or another search command wrote (``search.report DIR`` is
            short for ``--run DIR``).
        problems: how many problems of every search the page holds, or the ids of those it is to
            hold.
        seeds: run seeds of the searches that it holds; by default the first one.
    """

    run: str
    problems: int | list[str] = PROBLEMS
    seeds: list[int] | None = None

    def __post_init__(self) -> None:
        if self.problems in (0, []) or (isinstance(self.problems, int) and self.problems < 0):
            raise UserError(f"problems is {self.problems}; give a number above 0, or ids")


def report(config: ReportConfig) -> None:
    """Write the page (see :class:`ReportConfig`)."""
    path = write_report(Path(config.run), config.problems, config.seeds)
    print(f"report: {path}")


def write_report(
    directory: Path, problems: int | list[str] = PROBLEMS, seeds: list[int] | None = None
) -> Path:
    """Write ``report.html`` into a run directory.

    Args:
        directory: of the run.
        problems: how many of every search, or their ids.
        seeds: those to hold; by default the first.

    Raises:
        UserError: if there are no records, or not those that were asked for.
    """
    data = report_data(directory, problems, seeds)
    found = {name: directory / name for name in PLOTS if (directory / name).is_file()}
    plots = "".join(
        f'<figure><img alt="{PLOTS[name]}" src="data:image/png;base64,'
        f'{b64encode(path.read_bytes()).decode()}"><figcaption>{PLOTS[name]}</figcaption></figure>'
        for name, path in found.items()
    )
    path = directory / NAME
    replace_file(path, page(data, plots))
    return path


def page(data: dict[str, Any], plots: str) -> str:
    """The page of some data; ``plots`` is HTML of our own."""
    here = Path(__file__).with_name("report")
    style, script = (here.with_suffix(s).read_text(encoding="utf-8") for s in (".css", ".js"))
    # ASCII: neither line separators nor halves of characters are left in it.
    plain = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        plain = plain.replace(character, f"\\u{ord(character):04x}")
    text = here.with_suffix(".html").read_text(encoding="utf-8")
    parts = {
        "STYLE_HASH": _hash(style),
        "SCRIPT_HASH": _hash(script),
        "STYLE": style,
        "SCRIPT": script,
        "PLOTS": plots,
        # The last: nothing is looked for in it.
        "DATA": plain,
    }
    for name, part in parts.items():
        text = text.replace(f"{{{{{name}}}}}", part)
    return text


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def main() -> None:
    """Entry point of ``search.report``."""
    run_on_directories(report, ReportConfig, "search.report", "run")


if __name__ == "__main__":
    main()
