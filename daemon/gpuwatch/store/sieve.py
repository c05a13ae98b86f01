"""Which of a tick's changes are news to the disk; a quiet tick writes none."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final, TypeVar

from gpuwatch.store.writing import Changes

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from gpuwatch.records import Refusal, ServerState

T = TypeVar("T")

_MAX_KNOWN: Final = 10_000
_SEEN_MS: Final = 15_000


class Sieve:
    """Remembers what was handed on. A row written twice does no harm, so forgetting does none."""

    def __init__(self) -> None:
        self._known: dict[Hashable, object] = {}
        self._refusals: Sequence[Refusal] | None = None

    def news(self, changes: Changes) -> Changes | None:
        """The changes less what is on disk already; None if nothing is left."""
        if len(self._known) > _MAX_KNOWN:
            self._known.clear()
        for alert in changes.ended:
            self._known.pop(("alert", alert.rule, alert.labels), None)
        refusals = changes.refusals
        if refusals is not None and refusals == self._refusals:
            refusals = None
        self._refusals = changes.refusals if changes.refusals is not None else self._refusals
        left = dataclasses.replace(
            changes,
            alerts=self._new((("alert", a.rule, a.labels), a, a) for a in changes.alerts),
            servers=self._new((("server", s.name), _roughly(s), s) for s in changes.servers),
            remediations=self._new((("remediation", r.plan.id), r, r) for r in changes.remediations),
            refusals=refusals,
            starts=tuple(self._new((("start", s.server, s.began_at_ms), s, s) for s in changes.starts)),
        )
        return None if left == _NOTHING else left

    def _new(self, rows: Iterable[tuple[Hashable, object, T]]) -> list[T]:
        """Of (key, what is compared, record) the records that are new or changed."""
        found = []
        for key, compared, record in rows:
            if self._known.get(key) != compared:
                self._known[key] = compared
                found.append(record)
        return found


_NOTHING: Final = Changes(alerts=[], servers=[], remediations=[])


def _roughly(server: ServerState) -> ServerState:
    """That a server was seen again is no news each second."""
    return dataclasses.replace(server, seen_at_ms=server.seen_at_ms // _SEEN_MS)
