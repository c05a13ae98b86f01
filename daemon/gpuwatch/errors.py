"""Every error raised on purpose. Its text names operation, object, cause and cure, and no secret.

People see the text as it is. Anything else that is raised is a bug: it is logged with its
traceback and counted, and the daemon goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuwatch.records import Place


class GpuwatchError(Exception):
    """Something failed in a way that was foreseen."""


class ConfigError(GpuwatchError):
    """The configuration cannot be used. Carries every mistake found, a line each."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        """Join the mistakes, each already `file:line: path: what`."""
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(self.mistakes))


class RuleError(GpuwatchError):
    """A rule cannot be used; says file, line and column."""

    def __init__(self, place: Place, what: str) -> None:
        """`what` says which rule and why."""
        self.place = place
        self.what = what
        super().__init__(f"{place}: {what}")


class QueryError(GpuwatchError):
    """A PromQL expression cannot be parsed or evaluated; `position` counts characters from 0."""

    def __init__(self, what: str, position: int = 0) -> None:
        """`position` is an offset into the expression."""
        self.what = what
        self.position = position
        super().__init__(what)


class SourceError(GpuwatchError):
    """A source could not be read this time; the next time may succeed."""


class StoreError(GpuwatchError):
    """The database cannot be used; `kind` tells which way.

    `full`, `locked`, `corrupt`, `newer`, `read_only`, `gone` (no file, no folder, no server), `other`.
    """

    def __init__(self, what: str, *, kind: str = "other") -> None:
        """Keep the kind, which callers act on."""
        self.kind = kind
        super().__init__(what)


class ServerError(GpuwatchError):
    """A step could not be asked of a server, or its state not be read."""

    def __init__(self, what: str, *, permanent: bool = False) -> None:
        """`permanent`: asking again cannot help."""
        self.permanent = permanent
        super().__init__(what)


class NotifyError(GpuwatchError):
    """A message was not delivered.

    `permanent`: this message can never be delivered. `broken`: the channel itself refuses us, so
    no message can. `retry_after_ms`: the receiver said how long to wait. `unsure`: it may have
    arrived.
    """

    def __init__(
        self,
        what: str,
        *,
        permanent: bool = False,
        broken: bool = False,
        retry_after_ms: int | None = None,
        unsure: bool = False,
    ) -> None:
        """All four default to a passing fault."""
        self.permanent = permanent
        self.broken = broken
        self.retry_after_ms = retry_after_ms
        self.unsure = unsure
        super().__init__(what)
