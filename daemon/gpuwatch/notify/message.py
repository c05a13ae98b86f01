"""The event that a receiver is told of, free of any language; never the words, which `wording` makes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

import msgspec

from gpuwatch.errors import NotifyError

if TYPE_CHECKING:
    from gpuwatch.records import Notification

Kind = Literal["alert", "remediation"]
Severity = Literal["critical", "warning", "info"]
State = Literal[
    "firing",
    "resolved",
    "planned",
    "awaiting_approval",
    "applying",
    "verifying",
    "rolling_back",
    "succeeded",
    "rolled_back",
    "failed",
    "aborted",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What gpuwatch does about an alert, or why it does nothing.

    `code` is "plan" when a plan was made, "notify_only" when the policy is only to tell, else the
    code of the refusal. `steps` are the actions of the plan, or of the one that was refused.
    """

    code: str
    facts: dict[str, str] = field(default_factory=dict)
    steps: tuple[str, ...] = ()
    mode: str = ""
    dry_run: bool = False
    remediation_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One event. `id` is the incident's, so that all messages of one incident carry the same.

    `value` is the alert's, None if there is none (JSON has no NaN or infinity either). `since_ms` is
    when the alert or the remediation began, `at_ms` when this happened.
    """

    id: str
    kind: Kind
    state: State
    severity: Severity
    host: str
    alert: str
    at_ms: int
    since_ms: int
    server: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    value: float | None = None
    annotations: dict[str, str] = field(default_factory=dict)
    decision: Decision | None = None
    outcome_code: str = ""
    outcome_facts: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The body of a row of the outbox."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a body back; a permanent NotifyError if it is none, so that the next goes on."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise NotifyError(
                f"read message from outbox: {error}; another version of gpuwatch wrote it, it is left unsent",
                permanent=True,
            ) from error


def message_of(notification: Notification) -> Message:
    """The message in a row of the outbox; a permanent NotifyError if it cannot be read."""
    return Message.from_json(notification.body)
