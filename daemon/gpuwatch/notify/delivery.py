"""Decides which message goes to a receiver next and what a failure means; never sends.

Rule 1: order and back-off belong to the receiver, not to the message: strictly oldest first.
Rule 2: a message that can never be delivered is given up and the next goes on; a broken channel
keeps its messages and is tried every five minutes; anything else waits with full jitter.
Rule 3: a message a day old is given up: news is worth no more then, and the outbox must end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import msgspec

from gpuwatch.notify.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuwatch.errors import NotifyError
    from gpuwatch.records import Notification

BACKOFF_BASE_MS: Final = 1000
BACKOFF_MAX_MS: Final = 300_000
BACKOFF_MIN_MS: Final = 1000
BROKEN_RETRY_MS: Final = 300_000
WAIT_MAX_MS: Final = 3_600_000  # no receiver may silence us longer, and no clock that stepped back either
GIVE_UP_AFTER_MS: Final = 86_400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """At most `burst` messages in any span of `per_ms`."""

    burst: int
    per_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiverState:
    """How it goes with a receiver; a row. `failures` counts those since the last success."""

    name: str
    not_before_ms: int = 0
    failures: int = 0
    broken_since_ms: int | None = None
    error: str = ""


def state_json(state: ReceiverState) -> str:
    """The row of a receiver's state."""
    return msgspec.json.encode(state).decode()


def receiver_state(name: str, row: str | None) -> ReceiverState:
    """A receiver's state from its row; afresh if there is none, or none that can be read."""
    try:
        return msgspec.json.decode(row or "", type=ReceiverState)
    except msgspec.DecodeError:
        return ReceiverState(name=name)  # at worst a message is tried a few minutes early


def next_due(
    state: ReceiverState,
    unsent_oldest_first: Sequence[Notification],
    sent_recently_ms: Sequence[int],
    pace: Pace,
    now_ms: int,
) -> Notification | None:
    """The message to send now, or None while the receiver rests, is paced, or none waits.

    `sent_recently_ms` are the instants at which messages went out, at least of the last `pace.per_ms`.
    """
    if 0 < state.not_before_ms - now_ms <= WAIT_MAX_MS:
        return None
    if sum(now_ms - pace.per_ms < at_ms <= now_ms for at_ms in sent_recently_ms) >= pace.burst:
        return None
    return unsent_oldest_first[0] if unsent_oldest_first else None


def expired(unsent: Sequence[Notification], now_ms: int) -> list[Notification]:
    """The messages that are a day old, given up."""
    why = "not delivered within 24 h"
    return [
        replace(each, gave_up_at_ms=now_ms, error=each.error or why)
        for each in unsent
        if _is_old(each, now_ms)
    ]


def after_success(
    notification: Notification, state: ReceiverState, now_ms: int
) -> tuple[Notification, ReceiverState]:
    """The message is sent, and the receiver starts afresh."""
    sent = replace(notification, sent_at_ms=now_ms, attempts=notification.attempts + 1, error="")
    return sent, ReceiverState(name=state.name)


def after_failure(
    notification: Notification, state: ReceiverState, error: NotifyError, now_ms: int, jitter: float
) -> tuple[Notification, ReceiverState]:
    """Both as they are after an attempt that raised `error`; `jitter` is random, 0 to 1."""
    text = redact(str(error))
    tried = replace(notification, attempts=notification.attempts + 1, error=text)
    if error.permanent:
        # It answered, so the channel works: the next message need not wait.
        return replace(tried, gave_up_at_ms=now_ms), ReceiverState(name=state.name, error=text)
    not_before_ms = now_ms + _wait_ms(state.failures + 1, error, jitter)
    tried = replace(tried, next_attempt_at_ms=not_before_ms)
    if _is_old(notification, now_ms):
        tried = replace(tried, gave_up_at_ms=now_ms)
    return tried, replace(
        state,
        not_before_ms=not_before_ms,
        failures=state.failures + 1,
        broken_since_ms=(state.broken_since_ms or now_ms) if error.broken else state.broken_since_ms,
        error=text,
    )


def _wait_ms(failures: int, error: NotifyError, jitter: float) -> int:
    ceiling_ms = min(BACKOFF_MAX_MS, BACKOFF_BASE_MS * 2 ** min(failures, 20))
    wait_ms = max(BACKOFF_MIN_MS, int(jitter * ceiling_ms))
    if error.broken:
        wait_ms = BROKEN_RETRY_MS
    return min(WAIT_MAX_MS, max(wait_ms, error.retry_after_ms or 0))


def _is_old(notification: Notification, now_ms: int) -> bool:
    return now_ms - notification.created_at_ms >= GIVE_UP_AFTER_MS
