"""Says each trouble once when it begins and once when it is over; otherwise the log is silent."""

from __future__ import annotations

import logging

log = logging.getLogger("gpuwatch")


class Troubles:
    """Present troubles by what they are about. Used from several jobs; each speaks of its own things."""

    def __init__(self) -> None:
        self.present: dict[str, str] = {}
        self.internal_errors = 0

    def say(self, about: str, trouble: str) -> None:
        """`trouble` is the text of a fault, or empty where all is well."""
        before = self.present.get(about, "")
        if trouble and not before:
            log.warning("%s: %s", about, trouble)
        if before and not trouble:
            log.info("%s: well again", about)
            del self.present[about]
        if trouble:
            self.present[about] = trouble

    def bug(self, about: str, error: Exception) -> None:
        """A fault that nobody foresaw: with its traceback once, counted always."""
        self.internal_errors += 1
        if self.present.get(about) != repr(error):
            log.error("%s: internal error", about, exc_info=error)
        self.present[about] = repr(error)

    def count(self, prefix: str) -> int:
        """How many troubles begin with `prefix`."""
        return sum(name.startswith(prefix) for name in self.present)
