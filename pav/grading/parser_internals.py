"""What is used of the LaTeX parser below math-verify beyond its documented API, all of it.

``CHECKED`` says with which versions of latex2sympy2_extended.
"""

from __future__ import annotations

from typing import Any

CHECKED = ">=1.10,<1.12"


def parse_in_two_stages() -> None:
    """Make the LaTeX parser below math-verify about four times as fast; its results are the same.

    ANTLR's advice: predict with a parser's local context (SLL) first, and only where that finds a
    syntax error with the whole (LL). What SLL parses, LL parses to the same tree.

    Raises:
        ImportError, AttributeError: if this version has another parser.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended import latex2sympy2

    class TwoStage(latex2sympy2._Latex2Sympy):
        mode = PredictionMode.SLL

        def create_parser(self, latex: str) -> Any:
            parser = super().create_parser(latex)
            parser._interp.predictionMode = self.mode
            return parser

        def parse(self, latex: str) -> Any:
            try:
                return super().parse(latex)
            except Exception:
                self.mode = PredictionMode.LL
                return super().parse(latex)

    latex2sympy2._Latex2Sympy = TwoStage
