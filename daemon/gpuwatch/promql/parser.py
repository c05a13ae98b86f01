"""Reads a PromQL expression into a tree, by recursive descent with binding powers; evaluates nothing.

Whatever is PromQL of Prometheus 3.x but beyond the subset is refused with a message that says so.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final, TypeVar

from gpuwatch.errors import QueryError
from gpuwatch.promql import checks
from gpuwatch.promql.ast import (
    Aggregation,
    Binary,
    Call,
    Cardinality,
    Expr,
    Matching,
    MatrixSelector,
    NumberLiteral,
    Paren,
    StringLiteral,
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
_POWER: Final = 6  # the only operator that binds more tightly than a sign, and from right to left
_NEVER_A_METRIC: Final = frozenset({"bool", "on", "ignoring", "group_left", "group_right"})
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
        if self._next.word in {"fill", "fill_left", "fill_right"}:
            message = f'"{self._next.text}" is PromQL, but gpuwatch does not have it yet'
            raise QueryError(message, self._next.position)
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
        if inner.type not in {ValueType.SCALAR, ValueType.VECTOR}:
            allowed = "expressions of type scalar or instant vector"
            message = f"unary expression only allowed on {allowed}, got {inner.type}"
            raise QueryError(message, token.position)
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
        """The expression with the range and the offset that follow it."""
        if self._next.text == "[":
            expr = self._ranged(expr)
        while self._next.kind is Kind.NAME and self._next.word == "offset":
            expr = self._offset(expr)
        if self._next.text == "[":
            raise QueryError("a range must follow its selector at once", self._next.position)
        self._refuse_what_is_later()
        return expr

    def _refuse_what_is_later(self) -> None:
        token = self._next
        if token.text == "@" or token.word in {"anchored", "smoothed"}:
            raise QueryError(f'"{token.text}" is PromQL, but gpuwatch does not have it yet', token.position)

    def _ranged(self, expr: Expr) -> Expr:
        bracket = self._take()
        if self._next.kind not in {Kind.NUMBER, Kind.DURATION}:
            raise self._unexpected("range", "a duration")
        token = self._take()
        range_ms = duration_ms(token)
        if self._next.text.startswith(":"):
            raise QueryError("subqueries are PromQL, but gpuwatch does not have them yet", bracket.position)
        self._expect("]", "range")
        if not isinstance(expr, VectorSelector):
            raise QueryError("ranges only allowed for vector selectors", bracket.position)
        if range_ms <= 0:
            raise QueryError("duration must be greater than 0", token.position)
        return MatrixSelector(position=expr.position, selector=expr, range_ms=range_ms)

    def _offset(self, expr: Expr) -> Expr:
        keyword = self._take()
        sign = -1 if self._took("-") else 1
        if self._next.kind not in {Kind.NUMBER, Kind.DURATION}:
            raise self._unexpected("offset", "a duration")
        offset_ms = sign * duration_ms(self._take())
        selector = expr.selector if isinstance(expr, MatrixSelector) else expr
        if not isinstance(selector, VectorSelector):
            message = (
                "offset modifier must be preceded by an instant vector selector or range vector selector"
            )
            raise QueryError(message, keyword.position)
        if selector.offset_ms:
            raise QueryError("offset may not be set multiple times", keyword.position)
        moved = dataclasses.replace(selector, offset_ms=offset_ms)
        if isinstance(expr, MatrixSelector):
            return dataclasses.replace(expr, selector=moved)
        return moved

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
