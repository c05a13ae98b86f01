"""The functions over instant vectors; ranges, selectors and time are not theirs."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

from gpuwatch.errors import QueryError
from gpuwatch.promql.arithmetic import logarithm, rounded
from gpuwatch.promql.selection import Matcher, regex
from gpuwatch.promql.values import Element, Value, Vector
from gpuwatch.records import Labels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LONGEST_LABEL: Final = 65_536
_REFERENCE: Final = re.compile(r"\$(?:(\$)|(\w+)|\{(\w+)\})", re.ASCII)
_GROUP_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,8}")


def _each(function: Callable[..., float]) -> Callable[..., Vector]:
    """The function of a vector that applies one to each value."""

    def applied(vector: Vector, *scalars: float) -> Vector:
        return [Element(e.labels, function(e.value, *scalars), drop_name=True) for e in vector]

    return applied


def _at_least(value: float, low: float) -> float:
    if math.isnan(value) or math.isnan(low):
        return math.nan
    return value + low if value == low == 0 else max(value, low)  # of 0 and -0 Go takes 0


def _at_most(value: float, high: float) -> float:
    if math.isnan(value) or math.isnan(high):
        return math.nan
    return -(-value - high) if value == high == 0 else min(value, high)  # of 0 and -0 Go takes -0


def _whole(function: Callable[[float], int]) -> Callable[[float], float]:
    return lambda value: math.copysign(function(value), value) if math.isfinite(value) else value


def _clamp(vector: Vector, low: float, high: float) -> Vector:
    if low > high:
        return []
    return _each(lambda value: _at_least(_at_most(value, high), low))(vector)


def _defined(function: Callable[[float], float]) -> Callable[[float], float]:
    """The function with Go's answers where Python raises: NaN outside its domain, infinite beyond range."""

    def applied(value: float) -> float:
        try:
            return function(value)
        except ValueError:
            return math.nan
        except OverflowError:
            return math.copysign(math.inf, value) if function is math.sinh else math.inf

    return applied


def _atanh(value: float) -> float:
    return math.copysign(math.inf, value) if abs(value) == 1 else _defined(math.atanh)(value)


def sort(vector: Vector, *, descending: bool = False) -> Vector:
    """By value; NaN comes last either way."""
    sign = -1 if descending else 1
    return sorted(vector, key=lambda e: (math.isnan(e.value), 0 if math.isnan(e.value) else sign * e.value))


def scalar(vector: Vector) -> float:
    """The value of the only element; NaN if there is not exactly one."""
    return vector[0].value if len(vector) == 1 else math.nan


def absent(found: bool, matchers: Sequence[Matcher]) -> Vector:  # noqa: FBT001 (absent(found) reads well)
    """One element of value 1 if nothing was found, with the labels that the selector asks for by `=`."""
    if found:
        return []
    wanted: dict[str, str] = {}
    for matcher in matchers:
        if matcher.name != "__name__":
            again = matcher.op != "=" or matcher.name in wanted
            wanted[matcher.name] = "" if again else matcher.value
    return [Element(Labels(wanted.items()), 1.0)]


def label_replace(vector: Vector, target: str, replacement: str, source: str, pattern: str) -> Vector:
    """Set label `target` to `replacement`, in which `$1` stands for a group, where `source` matches."""
    _check_label(target, "label_replace")
    compiled = regex(pattern)
    result: Vector = []
    for element in vector:
        match = compiled.fullmatch(element.labels.get(source))
        text = None if match is None else _expanded(replacement, match)
        result.append(element if text is None else _relabelled(element, target, text))
    return _unique(result)


def label_join(vector: Vector, target: str, separator: str, *sources: str) -> Vector:
    """Set label `target` to the values of `sources`, joined."""
    _check_label(target, "label_join")
    return _unique([_relabelled(e, target, separator.join(map(e.labels.get, sources))) for e in vector])


def _check_label(name: str, function: str) -> None:
    if not name:  # every other text is a name since Prometheus 3
        raise QueryError(f'invalid destination label name in {function}(): "{name}"')


def _relabelled(element: Element, target: str, text: str) -> Element:
    if len(text) > _LONGEST_LABEL:
        raise QueryError(
            f"a value made for label {target!r} has {len(text)} characters; at most {_LONGEST_LABEL}"
        )
    drop_name = element.drop_name and target != "__name__"
    return Element(element.labels.merged({target: text}), element.value, drop_name)


def _unique(vector: Vector) -> Vector:
    if len({e.labels for e in vector}) < len(vector):
        raise QueryError("vector cannot contain metrics with the same labelset")
    return vector


def _expanded(replacement: str, match: Any) -> str:  # noqa: ANN401 (re2 has no type information)
    groups = match.groupdict()

    def value(reference: re.Match[str]) -> str:
        dollar, plain, braced = reference.groups()
        name = plain or braced
        if dollar or name is None:
            return "$"
        if _GROUP_NUMBER.fullmatch(name):
            return (match.group(int(name)) or "") if int(name) <= len(match.groups()) else ""
        return groups.get(name) or ""

    return _REFERENCE.sub(value, replacement)


def _sign(value: float) -> float:
    return value if value == 0 or math.isnan(value) else math.copysign(1, value)


# The scalars and strings of a call follow its vector, whatever their order in PromQL.
FUNCTIONS: Final[dict[str, Callable[..., Value]]] = {
    "abs": _each(abs),
    "ceil": _each(_whole(math.ceil)),
    "floor": _each(_whole(math.floor)),
    "ln": _each(lambda value: logarithm(value, math.log)),
    "log2": _each(lambda value: logarithm(value, math.log2)),
    "log10": _each(lambda value: logarithm(value, math.log10)),
    "sgn": _each(_sign),
    "round": _each(lambda value, step=1.0: rounded(value, step)),
    "clamp": _clamp,
    "clamp_min": _each(_at_least),
    "clamp_max": _each(_at_most),
    "sort": sort,
    "sort_desc": lambda vector: sort(vector, descending=True),
    "label_replace": label_replace,
    "label_join": label_join,
    "scalar": scalar,
    "vector": lambda value: [Element(Labels(), value)],
    "pi": lambda: math.pi,
    **{
        name: _each(_defined(getattr(math, name)))
        for name in (
            *("exp", "sqrt", "sin", "cos", "tan", "asin", "acos", "atan"),
            *("sinh", "cosh", "tanh", "asinh", "acosh"),
        )
    },
    "atanh": _each(_atanh),
    "deg": _each(math.degrees),
    "rad": _each(math.radians),
    # Of native histograms, which are not stored here: of a number Prometheus has no element either.
    **{f"histogram_{name}": lambda _: [] for name in ("avg", "count", "sum", "stddev", "stdvar")},
}
