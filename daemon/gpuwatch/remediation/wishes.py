"""What people wish of remediation: pause, resume, words on single ones, other arguments; rows of the CLI.

A row that cannot be read is no wish: it stops nothing, and is never carried out in part.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from gpuwatch.records import LIVE_PHASES
from gpuwatch.remediation.situation import Change

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gpuwatch.records import Argument, Remediation

_WORD: Final = "word:"
_CHANGE: Final = "change:"
_WANTED: Final = "wanted:"


@dataclass(frozen=True, slots=True)
class Wishes:
    """`words` by remediation: (approved, denied or abort; who said it). Times are epoch milliseconds.

    `changes` and `wanted` by server: the arguments that a person asks for, and the revision that one wanted
    last. Alerts that began before `skip_until_ms` are left alone.
    """

    paused_until_ms: int | None
    resumed_at_ms: int
    words: Mapping[str, tuple[str, str]]
    skip_until_ms: int = 0
    changes: Mapping[str, Change] = field(default_factory=dict)
    wanted: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Mapping[str, str]) -> Self:
        """Read them from the rows of the table `setting`."""
        paused = settings.get("paused_until_ms")
        said = {name: text.partition("|") for name, text in _named(settings, _WORD)}
        changes = {name: _change_of(text) for name, text in _named(settings, _CHANGE)}
        return cls(
            paused_until_ms=int(paused) if paused else None,
            resumed_at_ms=int(settings.get("resumed_at_ms", "0")),
            words={remediation_id: (word, by) for remediation_id, (word, _, by) in said.items()},
            skip_until_ms=int(settings.get("skip_until_ms", "0")),
            changes={server: wish for server, wish in changes.items() if wish},
            wanted={server: int(text) for server, text in _named(settings, _WANTED) if text.isdecimal()},
        )


def pause(until_ms: int) -> dict[str, str | None]:
    """The rows of a pause."""
    return {"paused_until_ms": str(until_ms)}


def resume(now_ms: int, *, skip_backlog: bool = False) -> dict[str, str | None]:
    """The rows that end a pause, close the breaker, and let a server be remediated again after failures.

    With `skip_backlog` the alerts that are active now are left alone until they are over.
    """
    skip = {"skip_until_ms": str(now_ms)} if skip_backlog else {}
    return {"paused_until_ms": None, "resumed_at_ms": str(now_ms), **skip}


def word(remediation_id: str, what: str, by: str) -> dict[str, str | None]:
    """The row of a word on one remediation: approved, denied or abort."""
    return {_WORD + remediation_id: f"{what}|{by}"}


def change(
    server: str,
    *,
    arguments: Mapping[str, Argument] | None = None,
    revision: int | None = None,
    by: str,
    why: str,
    at_ms: int,
) -> dict[str, str | None]:
    """The row that asks for these arguments of a server, or for a revision again. The last one counts."""
    wish = {"arguments": arguments, "revision": revision, "by": by, "why": why, "at_ms": at_ms}
    return {_CHANGE + server: json.dumps(wish)}


def granted(server: str, revision: int) -> dict[str, str | None]:
    """The rows of a wish that became a plan: it is wanted from now on, and wished no more."""
    return {**dropped(server), **wants(server, revision)}


def wants(server: str, revision: int) -> dict[str, str | None]:
    """The row of what is wanted of a server: what it comes back to when what kept it from it is gone."""
    return {_WANTED + server: str(revision)}


def dropped(server: str) -> dict[str, str | None]:
    """The row of a wish that cannot be carried out, to be deleted."""
    return {_CHANGE + server: None}


def forgotten(remediations: Iterable[Remediation]) -> dict[str, str | None]:
    """The rows to delete: words on those of these remediations that are over."""
    return {_WORD + r.plan.id: None for r in remediations if r.phase not in LIVE_PHASES}


def _named(settings: Mapping[str, str], prefix: str) -> list[tuple[str, str]]:
    return [(name.removeprefix(prefix), text) for name, text in settings.items() if name.startswith(prefix)]


def _change_of(text: str) -> Change | None:
    """A wish: arguments, or a revision, and not both."""
    try:
        said = json.loads(text)
        arguments, revision = said["arguments"], said["revision"]
        by, why, at_ms = str(said["by"]), str(said["why"]), int(said["at_ms"])
    except (ValueError, TypeError, KeyError):
        return None
    if isinstance(arguments, dict) and revision is None:
        return Change(arguments=arguments, by=by, why=why, at_ms=at_ms)
    if arguments is None and type(revision) is int:
        return Change(revision=revision, by=by, why=why, at_ms=at_ms)
    return None
