"""What people wish of remediation: pause, resume, words on single ones; rows that the CLI leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from gpuwatch.records import LIVE_PHASES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gpuwatch.records import Remediation

_WORD: Final = "word:"


@dataclass(frozen=True, slots=True)
class Wishes:
    """`words` by remediation: (approved, denied or abort; who said it). Times are epoch milliseconds."""

    paused_until_ms: int | None
    resumed_at_ms: int
    words: Mapping[str, tuple[str, str]]

    @classmethod
    def of(cls, settings: Mapping[str, str]) -> Self:
        """Read them from the rows of the table `setting`."""
        paused = settings.get("paused_until_ms")
        said = {n.removeprefix(_WORD): v.partition("|") for n, v in settings.items() if n.startswith(_WORD)}
        return cls(
            paused_until_ms=int(paused) if paused else None,
            resumed_at_ms=int(settings.get("resumed_at_ms", "0")),
            words={remediation_id: (word, by) for remediation_id, (word, _, by) in said.items()},
        )


def pause(until_ms: int) -> dict[str, str | None]:
    """The rows of a pause."""
    return {"paused_until_ms": str(until_ms)}


def resume(now_ms: int) -> dict[str, str | None]:
    """The rows that end a pause, and let a server be remediated again on which a remediation failed."""
    return {"paused_until_ms": None, "resumed_at_ms": str(now_ms)}


def word(remediation_id: str, what: str, by: str) -> dict[str, str | None]:
    """The row of a word on one remediation: approved, denied or abort."""
    return {_WORD + remediation_id: f"{what}|{by}"}


def forgotten(remediations: Iterable[Remediation]) -> dict[str, str | None]:
    """The rows to delete: words on those of these remediations that are over."""
    return {_WORD + r.plan.id: None for r in remediations if r.phase not in LIVE_PHASES}
