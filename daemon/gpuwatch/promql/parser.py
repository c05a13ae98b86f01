"""Reads a PromQL expression into a tree, by recursive descent with binding powers; evaluates nothing.

The language is that of a Prometheus 3 server as it is installed: what is behind one of its feature flags
is refused with a message that says so.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final, TypeVar

from gpuwatch.errors import QueryError
from gpuwatch.promql import checks
from gpuwatch.promql.ast import (
    Aggregation,
    Binary,
    Call,
    Cardinality,
    Edge,
    Expr,
    Matching,
    MatrixSelector,
    NumberLiteral,
    Paren,
    StringLiteral,
    Subquery,
    Unary,
    ValueType,
    VectorSelector,
)
from gpuwatch.promql.lexer import Kind, Token, duration_ms, number, tokens, unquoted
from gpuwatch.promql.selection import Matcher
from gpuwatch.promql.signatures import AGGREGATIONS, FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Callable

_BINDING: Final = {
    "or": 1,
    "and": 2,
    "unless": 2,
    **dict.fromkeys(checks.COMPARISONS, 3),
    "+": 4,
    "-": 4,
    "*": 5,
    "/": 5,
    "%": 5,
    "atan2": 5,
    "^": 6,
}
_T = TypeVar("_T")
_POWER: Final = _BINDING["^"]  # the only operator that binds more tightly than a sign, and from right to left
_NEVER_A_METRIC: Final = frozenset({"bool", "on", "ignoring", "group_left", "group_right"})
_FILLS: Final = frozenset({"fill", "fill_left", "fill_right"})
_CONSTANTS: Final = {"inf": float("inf"), "nan": float("nan")}


def parse(text: str) -> Expr:
    """The tree of an expression; QueryError names what is wrong and its position."""
    parser = _Parser(tokens(text))
    expr = parser.expression()
    parser.expect_end()
    checks.check_depth(expr)
    return expr


class _Parser:
    def __init__(self, found: list[Token]) -> None:
        self._tokens = found
        self._index = 0
        self._depth = 0

    # ---- tokens

    @property
    def _next(self) -> Token:
        return self._tokens[self._index]

    def _take(self) -> Token:
        token = self._tokens[self._index]
        self._index += token.kind is not Kind.END
        return token

    def _took(self, *texts: str) -> bool:
        """Take the next token if it is one of these operators or keywords."""
        token = self._next
        found = token.kind in {Kind.OPERATOR, Kind.NAME} and token.word in texts
        self._index += found
        return found

    def _expect(self, text: str, where: str) -> Token:
        token = self._next
        if not self._took(text):
            raise self._unexpected(where, f'"{text}"')
        return token

    def _unexpected(self, where: str, wanted: str = "") -> QueryError:
        token = self._next
        shown = "end of input" if token.kind is Kind.END else f'"{token.text}"'
        tail = f", expected {wanted}" if wanted else ""
        return QueryError(f"unexpected {shown} in {where}{tail}", token.position)

    def expect_end(self) -> None:
        if self._next.kind is not Kind.END:
            raise self._unexpected("expression", "an operator or the end")

    # ---- expressions

    def expression(self, binding: int = 1) -> Expr:
        """An expression whose operators all bind at least as tightly as `binding`."""
        self._depth += 1
        if self._depth > checks.MAX_DEPTH:
            message = f"the expression is nested deeper than {checks.MAX_DEPTH} levels"
            raise QueryError(message, self._next.position)
        left = self._operand()
        while self._binding_of_next() >= binding:
            left = self._binary(left)
        self._depth -= 1
        return left

    def _binding_of_next(self) -> int:
        token = self._next
        return _BINDING.get(token.word, 0) if token.kind in {Kind.OPERATOR, Kind.NAME} else 0

    def _binary(self, left: Expr) -> Expr:
        token = self._take()
        op = token.word
        return_bool = self._took("bool")
        matching = self._matching(op)
        right = self.expression(_BINDING[op] + (op != "^"))
        scalar = left.type is right.type is ValueType.SCALAR
        binary = Binary(
            position=token.position,
            type=ValueType.SCALAR if scalar else ValueType.VECTOR,
            op=op,
            left=left,
            right=right,
            return_bool=return_bool,
            matching=matching,
        )
        checks.check_binary(binary)
        return binary

    def _matching(self, op: str) -> Matching:
        matching = checks.default_matching(op)
        for word in ("on", "ignoring"):
            if self._took(word):
                labels = self._label_list(f'"{word}"')
                matching = dataclasses.replace(matching, on=word == "on", labels=labels)
                matching = self._grouping(matching)
                break
        if self._next.word in _FILLS and self._tokens[self._index + 1].text == "(":
            raise checks.experimental(f'the modifier "{self._next.text}"', self._next.position)
        return matching

    def _grouping(self, matching: Matching) -> Matching:
        sides = (("group_left", Cardinality.MANY_TO_ONE), ("group_right", Cardinality.ONE_TO_MANY))
        for word, cardinality in sides:
            if self._took(word):
                include = self._label_list(f'"{word}"') if self._next.text == "(" else ()
                return dataclasses.replace(matching, cardinality=cardinality, include=include)
        return matching

    def _operand(self) -> Expr:
        token = self._next
        if not self._took("-", "+"):
            return self._modified(self._primary())
        inner = self.expression(_POWER)
        checks.check_unary(inner, token.position)
        return Unary(position=token.position, type=inner.type, op=token.text, expr=inner)

    def _primary(self) -> Expr:
        token = self._next
        match token.kind:
            case Kind.NUMBER:
                return NumberLiteral(position=self._take().position, value=number(token))
            case Kind.DURATION:
                return NumberLiteral(position=self._take().position, value=duration_ms(token) / 1000)
            case Kind.STRING:
                return StringLiteral(position=self._take().position, value=unquoted(token))
            case Kind.NAME:
                return self._named()
            case Kind.OPERATOR | Kind.END:
                pass
        if token.text == "{":
            return self._selector("")
        self._expect("(", "expression")
        inner = self.expression()
        self._expect(")", "parentheses")
        return Paren(position=token.position, type=inner.type, expr=inner)

    def _named(self) -> Expr:
        token = self._next
        after = self._tokens[self._index + 1]
        if token.word in AGGREGATIONS and (after.text == "(" or after.word in {"by", "without"}):
            return self._aggregation()
        if token.word in _CONSTANTS:
            return NumberLiteral(position=self._take().position, value=_CONSTANTS[token.word])
        if token.word in _NEVER_A_METRIC:
            raise self._unexpected("expression")
        if after.text == "(":
            return self._call()
        self._take()
        return self._selector(token.text, token.position)

    def _call(self) -> Expr:
        token = self._take()
        if token.text not in FUNCTIONS:
            raise checks.unknown_function(token.text, token.position)
        args = self._arguments(f'call to function "{token.text}"')
        returns = FUNCTIONS[token.text].returns
        call = Call(position=token.position, type=returns, function=token.text, args=args)
        checks.check_call(call)
        return call

    def _arguments(self, where: str) -> tuple[Expr, ...]:
        return self._listed("(", ")", self.expression, where, trailing_comma=False)

    def _aggregation(self) -> Expr:
        token = self._take()
        op = token.word
        without, labels = self._clause()
        args = self._arguments(f'aggregation "{op}"')
        if without is None:
            without, labels = self._clause()
        wanted = AGGREGATIONS[op]
        count = 2 if wanted else 1
        if len(args) != count:
            what = "wrong number of arguments for aggregate expression provided"
            message = f"{what}, expected {count}, got {len(args)}"
            raise QueryError(message, token.position)
        checks.check_type(args[-1], ValueType.VECTOR, "aggregation expression")
        if wanted:
            checks.check_type(args[0], wanted, "aggregation parameter")
        return Aggregation(
            position=token.position,
            op=op,
            expr=args[-1],
            param=args[0] if wanted else None,
            labels=labels,
            without=bool(without),
        )

    def _clause(self) -> tuple[bool | None, tuple[str, ...]]:
        """`by (labels)` or `without (labels)`; None if neither is there."""
        for word in ("by", "without"):
            if self._took(word):
                return word == "without", self._label_list(f'"{word}"')
        return None, ()

    # ---- selectors

    def _selector(self, name: str, position: int | None = None) -> Expr:
        at = self._next.position if position is None else position
        matchers: tuple[Matcher, ...] = ()
        if self._next.text == "{":
            matchers = self._listed("{", "}", self._matcher, "label matching")
        selector = VectorSelector(position=at, matchers=checks.named_matchers(name, matchers, at))
        checks.check_selector(selector)
        return selector

    def _matcher(self) -> Matcher:
        token = self._next
        name = self._label("label matching")
        op = self._next.text
        if token.kind is Kind.STRING and op in {",", "}"}:
            return Matcher("__name__", "=", name)
        if not self._took("=", "!=", "=~", "!~"):
            raise self._unexpected("label matching", 'one of "=", "!=", "=~", "!~"')
        if self._next.kind is not Kind.STRING:
            raise self._unexpected("label matching", "a quoted value")
        return Matcher(name, op, unquoted(self._take()))

    def _modified(self, expr: Expr) -> Expr:
        """The expression with the ranges, offsets and times that follow it."""
        while True:
            word = self._next.word
            if word == "[":
                expr = self._ranged(expr)
            elif word == "offset":
                expr = self._offset(expr)
            elif word == "@":
                expr = self._at(expr)
            elif word in {"anchored", "smoothed"}:
                raise checks.experimental(f'the modifier "{self._next.text}"', self._next.position)
            else:
                return expr

    def _ranged(self, expr: Expr) -> Expr:
        """`expr[5m]`, or the subquery `expr[5m:1m]`."""
        bracket = self._take()
        range_ms = self._length("range")
        if self._took(":"):
            step_ms = None if self._next.text == "]" else self._length("subquery")
            self._expect("]", "subquery selector")
            return self._subquery(expr, range_ms, step_ms)
        self._expect("]", "range")
        if not isinstance(expr, VectorSelector):
            raise QueryError("ranges only allowed for vector selectors", bracket.position)
        if expr.at is not None or expr.offset_ms:
            raise QueryError("a range must follow its selector at once", bracket.position)
        return MatrixSelector(position=expr.position, selector=expr, range_ms=range_ms)

    def _subquery(self, expr: Expr, range_ms: int, step_ms: int | None) -> Subquery:
        if expr.type is not ValueType.VECTOR:
            message = f"subquery is only allowed on instant vector, got {expr.type} instead"
            raise QueryError(message, expr.position)
        return Subquery(position=expr.position, expr=expr, range_ms=range_ms, step_ms=step_ms)

    def _length(self, where: str) -> int:
        """A positive duration."""
        token = self._next
        ms = self._duration(where)
        if ms <= 0:
            raise QueryError("duration must be greater than 0", token.position)
        return ms

    def _duration(self, where: str) -> int:
        if self._next.kind in {Kind.NUMBER, Kind.DURATION}:
            return duration_ms(self._take())
        raise self._unexpected(where, "a duration")

    def _sign(self) -> int:
        if self._took("-"):
            return -1
        self._took("+")
        return 1

    def _offset(self, expr: Expr) -> Expr:
        keyword = self._take()
        offset_ms = self._sign() * self._duration("offset")
        timed = checks.timed(expr, "offset modifier", keyword.position)
        if timed.offset_ms:
            raise QueryError("offset may not be set multiple times", keyword.position)
        return _retimed(expr, offset_ms=offset_ms)

    def _at(self, expr: Expr) -> Expr:
        sign = self._take()
        timed = checks.timed(expr, "@ modifier", sign.position)
        if timed.at is not None:
            raise QueryError("@ <timestamp> may not be set multiple times", sign.position)
        return _retimed(expr, at=self._instant())

    def _instant(self) -> int | Edge:
        if self._next.word in {Edge.START, Edge.END}:
            edge = Edge(self._take().word)
            self._expect("(", "@ modifier")
            self._expect(")", "@ modifier")
            return edge
        negative = self._sign() < 0
        token = self._next
        if token.kind is Kind.DURATION:
            seconds = duration_ms(token) / 1000
        elif token.kind is Kind.NUMBER or token.word in _CONSTANTS:
            seconds = _CONSTANTS[token.word] if token.word in _CONSTANTS else number(token)
        else:
            raise self._unexpected("@ modifier", "a timestamp")
        self._take()
        return checks.instant_ms(-seconds if negative else seconds, token.position)

    # ---- lists

    def _label_list(self, where: str) -> tuple[str, ...]:
        return self._listed("(", ")", lambda: self._label(where), where)

    def _label(self, where: str) -> str:
        token = self._next
        if token.kind is Kind.STRING:
            return unquoted(self._take())
        if token.kind is not Kind.NAME or ":" in token.text:
            raise self._unexpected(where, "a label name")
        return self._take().text

    def _listed(
        self,
        opening: str,
        closing: str,
        item: Callable[[], _T],
        where: str,
        *,
        trailing_comma: bool = True,
    ) -> tuple[_T, ...]:
        """Items between brackets with commas between them."""
        self._expect(opening, where)
        items: list[_T] = []
        while not self._took(closing):
            if items:
                self._expect(",", where)
                if trailing_comma and self._took(closing):
                    break
            items.append(item())
        return tuple(items)


def _retimed(expr: Expr, **time: Any) -> Expr:  # noqa: ANN401 (fields of any type)
    """The selector or subquery at another time."""
    if isinstance(expr, MatrixSelector):
        return dataclasses.replace(expr, selector=dataclasses.replace(expr.selector, **time))
    return dataclasses.replace(expr, **time)
