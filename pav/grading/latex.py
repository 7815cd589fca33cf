"""Whether two answers that math-verify has read mean the same.

``math_verify.verify`` compares equations by their solutions (``x^2+1=0`` and ``x^2+2=0`` have the
same, none), numbers to six places or fifteen digits, and symbols by their assumptions. Here numbers
are compared exactly, equations as equations, and expressions by their values at a few points; words
and spelled-out products of letters are left to math-verify.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended import is_expr_of_only_symbols
from math_verify import verify
from sympy import (
    Derivative,
    Expr,
    FiniteSet,
    Float,
    Interval,
    MatrixBase,
    Rational,
    Set,
    Symbol,
    Tuple,
)
from sympy.core.function import AppliedUndef
from sympy.core.relational import Eq, Ge, Gt, Le, Lt, Ne, Relational
from sympy.logic.boolalg import And, BooleanAtom

from pav.grading.numbers import is_rounded

# Values of a formula's variables: below and above 1 in size, of both signs, no round numbers.
POINTS = (
    (Rational(1234, 1009), Rational(2857, 1013), Rational(719, 1019), Rational(3301, 1021)),
    (Rational(-839, 1031), Rational(1481, 1033), Rational(-2339, 1039), Rational(487, 1049)),
    (Rational(2711, 1051), Rational(-647, 1061), Rational(907, 1063), Rational(-1709, 1069)),
    (Rational(-3109, 1087), Rational(-577, 1091), Rational(1861, 1093), Rational(811, 1097)),
)
# Computed to DIGITS digits, equal values differ by less than this share of their size.
DIGITS, SHARE = 60, Float("1e-45", 60)
NO_LOGPROBS = Float("1e-90", 60)
PERCENT = sympy.UnevaluatedExpr(Rational(1, 100))


def same(wanted: Any, found: Any) -> bool:
    """Whether ``found`` is the answer ``wanted``, both as math-verify reads them.

    May take for ever and raise anything: to be called under limits.
    """
    wanted, found = _one_equation(wanted), _one_equation(found)
    if isinstance(wanted, BooleanAtom) or isinstance(found, BooleanAtom):
        return False
    if _is_equation(found) and not _is_relation(wanted):
        found = _right_side(found)
    elif _is_assignment(wanted) and not _is_relation(found):
        wanted = _written(wanted)[-1].rhs if isinstance(wanted, And) else wanted.rhs
    if _is_relation(wanted) or _is_relation(found):
        return _same_relation(wanted, found)
    if isinstance(wanted, MatrixBase | sympy.MatrixExpr):
        return _same_matrix(wanted, found)
    if isinstance(wanted, Set | Tuple) or isinstance(found, Set | Tuple):
        return _same_collection(wanted, found)
    if not (isinstance(wanted, Expr) and isinstance(found, Expr)):
        return False
    if isinstance(wanted, Symbol) or isinstance(found, Symbol):
        return bool(verify(wanted, found, timeout_seconds=None)) or _same_value(wanted, found)
    return _same_value(wanted, found)


def _written(expression: Any) -> Sequence[Any]:
    """Parts in the order of the text, which the parser's own classes keep aside."""
    return getattr(expression, "_unsorted_args", expression.args)


def _is_relation(expression: Any) -> bool:
    return isinstance(expression, Relational | And)


def _is_equation(expression: Any) -> bool:
    parts = expression.args if isinstance(expression, And) else [expression]
    return all(isinstance(part, Eq) for part in parts)


def _is_assignment(expression: Any) -> bool:
    if not _is_equation(expression):
        return False
    first = _written(expression)[0] if isinstance(expression, And) else expression
    return bool(is_expr_of_only_symbols(first.lhs))


def _right_side(equation: Any) -> Any:
    """The answer that an equation ends with; ``x^2-4=0`` and ``2x=6`` end with none."""
    last = _written(equation)[-1] if isinstance(equation, And) else equation
    if last.lhs.free_symbols and not _is_assignment(equation):
        unsolved = isinstance(last.lhs, Expr) and last.lhs.doit().as_coeff_Mul()[0] != 1
        if last.rhs == 0 or unsolved:
            return equation
    return last.rhs


def _one_equation(expression: Any) -> Any:
    """``x=1, x=4`` is ``x`` in a set."""
    if isinstance(expression, FiniteSet) and all(isinstance(e, Eq) for e in expression.args):
        left = {e.lhs for e in expression.args}
        if len(left) == 1 and len(expression.args) > 1 and is_expr_of_only_symbols(min(left)):
            return Eq(left.pop(), FiniteSet(*(e.rhs for e in expression.args)), evaluate=False)
    return expression


def _same_relation(wanted: Any, found: Any) -> bool:
    if not (_is_relation(wanted) and _is_relation(found)):
        if _is_equation(wanted) or _is_equation(found):
            return False
        return _same_solutions(wanted, found)
    parts, others = list(_written(wanted)), list(_written(found))
    if isinstance(wanted, And) and isinstance(found, And) and len(parts) == len(others):
        if _match(parts, others, _same_relation):
            return True
    elif _is_equation(wanted) and _is_equation(found):
        return _same_equation(_ends(wanted), _ends(found))
    elif _same_inequality(wanted, found):
        return True
    if _is_equation(wanted) or _is_equation(found):
        return False
    return _same_solutions(wanted, found)


def _ends(equation: Any) -> Any:
    """The first and the last side of a chain of equations."""
    if not isinstance(equation, And):
        return equation
    parts = _written(equation)
    return Eq(parts[0].lhs, parts[-1].rhs, evaluate=False)


def _same_equation(wanted: Any, found: Any) -> bool:
    """Whether the sides are the same, or one equation is a multiple of the other."""
    for left, right in ((found.lhs, found.rhs), (found.rhs, found.lhs)):
        if same(wanted.lhs, left) and same(wanted.rhs, right):
            return True
    if not all(isinstance(side, Expr) for side in (*wanted.args, *found.args)):
        return False
    if not (_free(wanted) and _free(found)):
        return False
    return _factor(wanted.lhs - wanted.rhs, found.lhs - found.rhs) is not None


def _free(expression: Any) -> bool:
    return bool(expression.free_symbols or expression.atoms(AppliedUndef))


def _same_inequality(wanted: Any, found: Any) -> bool:
    """Whether one inequality is a positive multiple of the other, whichever way it points."""
    kinds = {Gt: Gt, Lt: Gt, Ge: Ge, Le: Ge, Ne: Ne}
    if kinds.get(type(wanted)) is not kinds.get(type(found)) or type(wanted) not in kinds:
        return False
    a, b = (r.rhs - r.lhs if isinstance(r, Lt | Le) else r.lhs - r.rhs for r in (wanted, found))
    factor = _factor(a, b)
    return factor is not None and (isinstance(wanted, Ne) or bool(sympy.re(factor) > 0))


def _same_solutions(wanted: Any, found: Any) -> bool:
    """Whether two inequalities, or an inequality and a set, hold for the same numbers."""
    try:
        a, b = _as_set(wanted), _as_set(found)
    except (NotImplementedError, AttributeError, TypeError, ValueError):
        return False
    # All that hold never, or always, have the same solutions.
    if a.is_empty or b.is_empty or sympy.S.Reals in (a, b):
        return False
    return _same_collection(a, b)


def _as_set(expression: Any) -> Any:
    if isinstance(expression, And):
        return sympy.Intersection(*(_as_set(part) for part in expression.args))
    if isinstance(expression, FiniteSet) and all(map(_is_relation, expression.args)):
        return sympy.Union(*(_as_set(part) for part in expression.args))
    if _is_relation(expression):
        if isinstance(expression, Eq) or len(expression.free_symbols) != 1:
            raise ValueError("no inequality in one variable")
        return expression.as_set()
    if isinstance(expression, Set):
        return expression
    raise TypeError("no set")


def _same_matrix(wanted: Any, found: Any) -> bool:
    a, b = wanted.doit(), found.doit()
    if not isinstance(a, MatrixBase) or not isinstance(b, MatrixBase) or a.shape != b.shape:
        return isinstance(a, MatrixBase) is isinstance(b, MatrixBase) and a == b
    return all(map(same, a.flat(), b.flat()))


def _same_collection(wanted: Any, found: Any) -> bool:
    # An open interval and a pair look the same, and so do a set of one number and the number.
    wanted, found = _as_pair(wanted, found), _as_pair(found, wanted)
    if isinstance(wanted, Tuple) and isinstance(found, FiniteSet):
        found = Tuple(*_written(found))
    if isinstance(wanted, Tuple) and isinstance(found, Tuple):
        return len(wanted) == len(found) and all(map(same, wanted, found))
    if isinstance(wanted, FiniteSet) and not isinstance(found, Set):
        found = found if isinstance(found, Tuple) else Tuple(found)
    if isinstance(found, FiniteSet) and not isinstance(wanted, Set):
        wanted = Tuple(wanted)
    if isinstance(wanted, FiniteSet | Tuple) and isinstance(found, FiniteSet | Tuple):
        return _match(list(wanted), list(found), same)
    if isinstance(wanted, Interval) and isinstance(found, Interval):
        open_ends = (wanted.left_open, wanted.right_open) == (found.left_open, found.right_open)
        return bool(open_ends) and same(wanted.start, found.start) and same(wanted.end, found.end)
    if not (isinstance(wanted, Set) and isinstance(found, Set)):
        return False
    for one in (wanted, found):  # "x < -2 or x > 2"
        if isinstance(one, FiniteSet) and one.args and all(map(_is_relation, one.args)):
            return _same_solutions(wanted, found)
    return _same_set(wanted.doit(), found.doit())


def _as_pair(collection: Any, other: Any) -> Any:
    is_pair = isinstance(collection, Interval) and not isinstance(other, Interval | Set)
    if isinstance(other, FiniteSet) and isinstance(collection, Interval):
        is_pair = len(other) == 2
    if is_pair and collection.left_open and collection.right_open:
        return Tuple(collection.start, collection.end)
    return collection


def _same_set(a: Any, b: Any) -> bool:
    if a == b:
        return True
    if type(a) is type(b) and isinstance(a, Interval | FiniteSet):
        return _same_collection(a, b)
    both = isinstance(a, sympy.Union) and isinstance(b, sympy.Union)
    if both and _match(list(a.args), list(b.args), _same_set):
        return True
    return a.symmetric_difference(b).is_empty is True


def _match(wanted: list[Any], found: list[Any], equal: Any) -> bool:
    """Whether the members of two lists are equal in some order."""
    left = list(found)
    for one in wanted:
        at = next((i for i, other in enumerate(left) if equal(one, other)), None)
        if at is None:
            return False
        del left[at]
    return not left


def _same_value(wanted: Any, found: Any) -> bool:
    """Whether two expressions have the same value; 50% is both 50 and 1/2."""
    a, b = _ready(wanted), _ready(found)
    if wanted.has(PERCENT) is found.has(PERCENT):
        return _equal(a, b) or _is_rounded(wanted, b) or _is_rounded(found, a)
    as_percent = 100 * (a if wanted.has(PERCENT) else b)
    other = b if wanted.has(PERCENT) else a
    return _equal(a, b) or _equal(as_percent, other)


def _ready(expression: Any) -> Any:
    """Evaluated, with exact decimals; symbols go by their names and ``i`` is imaginary."""
    exact = {number: Rational(str(number)) for number in expression.atoms(Float)}
    expression = expression.xreplace(exact)
    # The derivative of a letter would be 0.
    unknown = {d for d in expression.atoms(Derivative) if isinstance(d.expr, Symbol | AppliedUndef)}
    expression = expression.xreplace({d: Symbol(str(d), real=True) for d in unknown})
    functions = {f: Symbol(str(f), real=True) for f in expression.atoms(AppliedUndef)}
    expression = expression.xreplace(functions)
    free = {s.name for s in expression.free_symbols}
    symbols = {
        s: sympy.I if s.name == "i" and "i" in free else Symbol(s.name, real=True)
        for s in expression.atoms(Symbol)
    }
    return expression.xreplace(symbols).doit()


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Rational) and isinstance(b, Rational):
        return bool(a == b)
    if a == b:
        return True
    if isinstance(a, MatrixBase) or isinstance(b, MatrixBase):
        return False
    pairs = 0
    for at_a, at_b in _values(a, b):
        if not _close(at_a, at_b):
            return False
        pairs += 1
    return pairs > 1 or bool(sympy.simplify(a - b) == 0)


def _factor(a: Any, b: Any) -> Any:
    """The number by which ``a`` is a multiple of ``b``; None if there is none, or it is 0."""
    factor = None
    for at_a, at_b in _values(_ready(a), _ready(b)):
        zeros = [_close(value, sympy.S.Zero) for value in (at_a, at_b)]
        if all(zeros):
            continue
        if any(zeros):
            return None
        ratio = (at_a / at_b).evalf(DIGITS)
        if factor is not None and not _close(factor, ratio):
            return None
        factor = ratio
    return factor


def _values(a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
    """Values of two expressions at some points; points where they have none are left out."""
    names = sorted({s.name for s in a.free_symbols | b.free_symbols})
    for point in POINTS if names else POINTS[:1]:
        # The variables beyond the fourth are multiples of those before.
        at = {
            Symbol(name, real=True): point[i % len(point)] * (1 + i // len(point))
            for i, name in enumerate(names)
        }
        values = [e.evalf(DIGITS, subs=at, maxn=1000) for e in (a, b)]
        if all(value.is_number and value.is_finite for value in values):
            yield values[0], values[1]
            if not names:  # constants
                yield values[0], values[1]


def _close(a: Any, b: Any) -> bool:
    size = max(abs(a).evalf(20), abs(b).evalf(20))
    return bool(size < NO_LOGPROBS or abs((a - b).evalf(DIGITS)).evalf(20) <= SHARE * size)


def _is_rounded(decimal: Any, value: Any) -> bool:
    """Whether a decimal number is the rounded value of what has no finite decimal form."""
    if not isinstance(decimal, Float) or value.free_symbols or not value.is_real:
        return False
    digits = str(decimal)
    if "e" in digits:
        return False
    if value.is_Rational:
        exact = Fraction(value.p, value.q)
    else:  # as good as a fraction beside it that has no finite decimal form either
        exact = Fraction(str(value.evalf(DIGITS))) + Fraction(1, 3 * 10**DIGITS)
    return is_rounded(Fraction(digits), len(digits.partition(".")[2]), exact)
