"""Whether a process began since its start was asked for; remembers what was there then, asks nothing.

Its start is read from the wall clock, as `since_ms` is. If that clock is stepped back in between, the new
process seems older than the wish; so the mark of the last process at the moment of asking is remembered
too, and one of another mark is a new process.
"""

from __future__ import annotations


class Anew:
    """Of one server; a mark is an instant that differs for each of its processes, 0 where there was none."""

    def __init__(self) -> None:
        self._asked: tuple[int, int] | None = None  # since when, and the mark that was there then

    def ask(self, since_ms: int, mark: int) -> None:
        """It is asked for now, since `since_ms`, and the last process is that of this mark."""
        self._asked = since_ms, mark

    def began(self, since_ms: int, started_us: int, mark: int) -> bool:
        """Whether the last process, which the wall clock says began at `started_us`, came since then."""
        if self._asked is not None and self._asked[0] == since_ms:
            return mark not in {0, self._asked[1]}
        return started_us >= since_ms * 1000
