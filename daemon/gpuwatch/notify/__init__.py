"""The voice: takes a message to the people who want to know; never decides what is worth telling.

A receiver of another kind is a module with a class like these and a line in `NOTIFIERS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from gpuwatch.errors import ConfigError
from gpuwatch.notify.delivery import (
    Pace,
    ReceiverState,
    after_failure,
    after_success,
    expired,
    next_due,
    receiver_state,
    state_json,
)
from gpuwatch.notify.dingtalk import DingTalkNotifier
from gpuwatch.notify.events import (
    about_alert,
    about_remediation,
    incident_id,
    log_lines,
    messages_of_tick,
    outbox,
    summary,
)
from gpuwatch.notify.message import Decision, Message, message_of
from gpuwatch.notify.outbound import outbound_session
from gpuwatch.notify.redaction import RedactSecrets, redact
from gpuwatch.notify.slack import SlackNotifier
from gpuwatch.notify.wording import Text, Tone, compose, duration, refused, words

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import requests

    from gpuwatch.clock import Clock
    from gpuwatch.config import ReceiverSettings

__all__ = [
    "NOTIFIERS",
    "Decision",
    "DingTalkNotifier",
    "Message",
    "Notifier",
    "Pace",
    "ReceiverState",
    "RedactSecrets",
    "SlackNotifier",
    "Text",
    "Tone",
    "about_alert",
    "about_remediation",
    "after_failure",
    "after_success",
    "compose",
    "duration",
    "expired",
    "incident_id",
    "log_lines",
    "message_of",
    "messages_of_tick",
    "next_due",
    "of_settings",
    "outbound_session",
    "outbox",
    "receiver_state",
    "redact",
    "refused",
    "state_json",
    "summary",
    "words",
]


class Notifier(Protocol):
    """Delivers messages to one receiver, in one language."""

    @property
    def pace(self) -> Pace:
        """How fast the receiver takes messages."""
        ...

    def send(self, message: Message) -> None:
        """Deliver it within about 13 s, or raise NotifyError; a return means the receiver has it."""
        ...


NOTIFIERS: Final[dict[str, type[Notifier]]] = {
    "slack": SlackNotifier,
    "dingtalk": DingTalkNotifier,
}


def of_settings(receivers: Iterable[ReceiverSettings], clock: Clock) -> dict[str, Notifier]:
    """A notifier for each receiver, by name; `clock` must be the wall clock. Opens no connection.

    ConfigError with every file that cannot be read and every URL that cannot be used.
    """
    session, found, mistakes = outbound_session(), dict[str, Notifier](), list[str]()
    for receiver in receivers:
        try:
            found[receiver.name] = _of_receiver(receiver, session, clock)
        except ConfigError as error:
            mistakes += [f"receivers: {receiver.name}: {mistake}" for mistake in error.mistakes]
    if mistakes:
        raise ConfigError(mistakes)
    return found


def _of_receiver(receiver: ReceiverSettings, session: requests.Session, clock: Clock) -> Notifier:
    if receiver.slack:
        return SlackNotifier(_secret(receiver.slack.url_file), session, receiver.lang)
    if receiver.dingtalk is None:
        raise ConfigError(["has no kind; write one of " + ", ".join(NOTIFIERS)])
    robot = receiver.dingtalk
    return DingTalkNotifier(
        _secret(robot.url_file),
        session,
        receiver.lang,
        secret=_secret(robot.secret_file) if robot.secret_file else "",
        clock=clock,
        at_mobiles=robot.at_mobiles,
    )


def _secret(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError([f"{path}: cannot read it: {cause}; see that it is there and ours"]) from None
