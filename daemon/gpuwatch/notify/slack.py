"""Tells a Slack incoming webhook in Block Kit; never the Web API, so no message is changed afterwards.

Limits are Slack's for blocks, but for the whole, which it refuses at about 13 200 characters
without documenting it: https://github.com/slackapi/bolt-js/issues/2509.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, ClassVar, Final

from gpuwatch.notify import outbound, wording
from gpuwatch.notify.delivery import Pace

if TYPE_CHECKING:
    import requests

    from gpuwatch.notify.message import Message
    from gpuwatch.notify.wording import Text

HEADER_MAX: Final = 150
SECTION_MAX: Final = 3000
FIELDS_MAX: Final = 10
FIELD_MAX: Final = 2000
FOOTER_MAX: Final = 500
TOTAL_MAX: Final = 10_000

_ESCAPES: Final = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_CUT_ESCAPE: Final = re.compile(r"&[a-z]{0,3}$")
_CALLS: Final = re.compile(r"@(?=(?:here|channel|everyone)\b)", re.IGNORECASE)
_DEFUSED: Final = "@\u200b"  # a zero-width space: reads the same, calls nobody
_BLOCKS_REFUSED: Final = ("invalid_blocks", "invalid_payload", "msg_blocks_too_long")


class SlackNotifier:
    """One incoming webhook. Slack allows a message a second and short bursts."""

    pace: ClassVar[Pace] = Pace(burst=3, per_ms=3000)

    def __init__(self, url: str, session: requests.Session, lang: str = "en") -> None:
        """`url` is the webhook's, a secret; ConfigError unless https or loopback. `lang`: en or zh."""
        self._url = outbound.checked_url(url, "slack")
        self._session = session
        self._lang = lang

    def send(self, message: Message) -> None:
        """Deliver it, or raise NotifyError. Refused blocks are sent again at once, as plain text."""
        text = wording.compose(message, self._lang)
        answer = self._post(as_blocks(text))
        if answer.status == 400 and answer.text.startswith(_BLOCKS_REFUSED):
            answer = self._post(as_plain(text))
        if (answer.status, answer.text) != (200, "ok"):
            raise outbound.status_fault(answer, "slack")

    def _post(self, payload: dict[str, Any]) -> outbound.Answer:
        body = json.dumps(payload, ensure_ascii=False).encode("utf-8", "replace")
        return outbound.post(self._session, self._url, body)


def as_blocks(text: Text) -> dict[str, Any]:
    """The payload in Block Kit: header, section, fields, footer."""
    title = fit(text.title, HEADER_MAX)
    lines = fit("\n".join(text.lines), SECTION_MAX)
    footer = fit(text.footer, FOOTER_MAX)
    blocks: list[dict[str, Any]] = [
        {"type": "header", "text": {"type": "plain_text", "text": title, "emoji": True}}
    ]
    if lines:
        blocks.append({"type": "section", "text": _mrkdwn(lines)})
    if fields := _fields(text, TOTAL_MAX - len(title) - len(lines) - len(footer)):
        blocks.append({"type": "section", "fields": fields})
    blocks.append({"type": "context", "elements": [_mrkdwn(footer)]})
    return {"text": title, "blocks": blocks, "unfurl_links": False}


def as_plain(text: Text) -> dict[str, Any]:
    """The payload without blocks, for a workspace that refuses them."""
    fields = [f"{name}: {value}" for name, value in text.fields]
    whole = "\n".join([text.title, *text.lines, *fields, text.footer])
    return {"text": fit(whole, SECTION_MAX), "unfurl_links": False}


def fit(text: str, limit: int) -> str:
    """Escaped, calling nobody, at most `limit` characters; what is cut ends in an ellipsis."""
    escaped = _CALLS.sub(_DEFUSED, text).translate(_ESCAPES)
    if len(escaped) <= limit:
        return escaped
    return _CUT_ESCAPE.sub("", escaped[: limit - 1]) + "…"


def _fields(text: Text, room: int) -> list[dict[str, str]]:
    fields = text.fields[:FIELDS_MAX]
    limit = min(FIELD_MAX, room // max(1, len(fields)))
    return [_mrkdwn(fit(f"*{name}*\n{value}", limit)) for name, value in fields]


def _mrkdwn(text: str) -> dict[str, str]:
    return {"type": "mrkdwn", "text": text}
