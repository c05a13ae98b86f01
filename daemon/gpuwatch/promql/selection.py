"""What the evaluator asks of whoever holds samples: matchers in, series out; stores nothing."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from gpuwatch.errors import QueryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from gpuwatch.records import Labels


_WORDS: Final = re.compile(r"[\w:/,;@%=<> -]*(\|[\w:/,;@%=<> -]*)*", re.ASCII)  # nothing with a meaning but |
_ANYTHING: Final[Mapping[str, Callable[[str], bool]]] = {".*": lambda _: True, ".+": bool}


@dataclass(frozen=True, slots=True)
class Matcher:
    """One condition on one label: `op` is `=`, `!=`, `=~` or `!~`; an absent label has the value ""."""

    name: str
    op: str
    value: str

    def matches(self, text: str) -> bool:
        """Whether the label may have this value; regexes are anchored at both ends, in RE2's syntax."""
        if self.op in {"=", "!="}:
            return (text == self.value) == (self.op == "=")
        return test_of(self.value)(text) == (self.op == "=~")

    def __str__(self) -> str:
        """As in PromQL."""
        return f'{self.name}{self.op}"{self.value}"'


@dataclass(frozen=True, slots=True)
class Series:
    """Samples of one series in time order; a value may be `records.STALE`."""

    labels: Labels
    at_ms: Sequence[int]
    values: Sequence[float]


def metric_of(matchers: Iterable[Matcher]) -> str:
    """The metric that matchers name by `=`; empty if they name none."""
    return next((m.value for m in matchers if m.name == "__name__" and m.op == "="), "")


class Querier(Protocol):
    """Holds samples."""

    def select(self, matchers: Sequence[Matcher], after_ms: int, upto_ms: int) -> Sequence[Series]:
        """The series that all matchers accept, with their samples of `after_ms < at <= upto_ms`.

        Staleness markers are included; a series without a sample in the window may be left out.
        """
        ...


@functools.lru_cache(maxsize=1024)
def test_of(pattern: str) -> Callable[[str], bool]:
    """Whether a regex matches a whole text; QueryError if it is none.

    Most are words to choose from, which no engine is needed for: RE2 takes 2.6 MiB.
    """
    if pattern in _ANYTHING:
        return _ANYTHING[pattern]
    if _WORDS.fullmatch(pattern):
        return frozenset(pattern.split("|")).__contains__
    compiled = regex(pattern)
    return lambda text: compiled.fullmatch(text) is not None


@functools.lru_cache(maxsize=1024)
def regex(pattern: str) -> Any:  # noqa: ANN401 (re2 has no type information)
    """A compiled RE2 regex in which `.` matches a newline too; QueryError if it is none."""
    import re2  # noqa: PLC0415 (most hosts have no regex matcher and need not load the library)

    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(f"(?s:{pattern})", options)
    except re2.error as error:
        reason = error.args[0].decode(errors="replace") if error.args else "no reason given"
        raise QueryError(f"{pattern!r} is no RE2 regex: {reason}") from error
