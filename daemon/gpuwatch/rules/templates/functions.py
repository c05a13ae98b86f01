"""Which functions a template may call; those that it does call are loaded then, rare ones by themselves.

They are Go's and those of Prometheus 3.5, the release with long support: a template that loads here loads
there. What came later (`now`, `toDuration`, `urlQueryEscape`) is refused as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gpuwatch.rules.templates.values import Function

_OF_OPERATORS: Final = frozenset(
    {
        *("and", "call", "eq", "ge", "gt", "index", "le", "len", "lt", "ne", "not", "or", "print", "printf"),
        *("println", "slice"),
    }
)
_OF_HUMANIZE: Final = frozenset(
    {
        *("args", "first", "humanize", "humanize1024", "humanizeDuration", "humanizePercentage", "label"),
        *("query", "sortByLabel", "strvalue", "value"),
    }
)
_OF_TIMES: Final = frozenset(["humanizeTimestamp", "parseDuration", "toTime"])
_OF_TEXTS: Final = frozenset(
    {
        *("externalURL", "graphLink", "html", "js", "match", "pathPrefix", "reReplaceAll", "safeHtml"),
        *("stripDomain", "stripPort", "tableLink", "title", "toLower", "toUpper", "urlquery"),
    }
)
NAMES: Final = _OF_OPERATORS | _OF_HUMANIZE | _OF_TIMES | _OF_TEXTS


def function(name: str) -> Function:
    """One of `NAMES`."""
    if name in _OF_OPERATORS:
        from gpuwatch.rules.templates import operators  # noqa: PLC0415 (no alert, no call)

        return operators.FUNCTIONS[name]
    if name in _OF_HUMANIZE:
        from gpuwatch.rules.templates import humanize  # noqa: PLC0415 (no alert, no call)

        return humanize.FUNCTIONS[name]
    if name in _OF_TIMES:
        from gpuwatch.rules.templates import times  # noqa: PLC0415 (few templates use it)

        return times.FUNCTIONS[name]
    from gpuwatch.rules.templates import texts  # noqa: PLC0415 (few templates use it)

    return texts.FUNCTIONS[name]
