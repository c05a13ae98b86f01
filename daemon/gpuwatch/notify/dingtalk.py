"""Tells a DingTalk custom robot in Markdown, signed at the moment of sending; never reads a reply.

The robot answers HTTP 200 whatever happens; `errcode` tells. Its texts were changed over the years
and come in two languages, so only the number counts.
"""

from __future__ import annotations

import base64
import bisect
import hashlib
import hmac
import itertools
import json
from typing import TYPE_CHECKING, Any, ClassVar, Final
from urllib.parse import parse_qs, urlsplit

import msgspec

from gpuwatch.errors import ConfigError, NotifyError
from gpuwatch.notify import outbound, wording
from gpuwatch.notify.delivery import Pace
from gpuwatch.notify.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Sequence

    import requests

    from gpuwatch.clock import Clock
    from gpuwatch.notify.message import Message
    from gpuwatch.notify.wording import Text

BODY_MAX_BYTES: Final = 20_000
TITLE_MAX: Final = 200
KEYWORD: Final = "gpuwatch"  # a robot may demand a word that occurs in each message

_OK: Final = 0
_TOO_LONG: Final = 460101
_CONFIG_FAULT: Final = 310000
# errcode: what it means and what to do about it, and how NotifyError says so.
_FAULTS: Final[dict[int, tuple[str, dict[str, Any]]]] = {
    -1: ("the robot's service is busy; it is tried again", {}),
    130101: ("more than 20 messages a minute; it is silent for ten minutes", {"retry_after_ms": 600_000}),
    _CONFIG_FAULT: (
        "its security settings refuse us: check secret_file, the allowed addresses and this host's clock",
        {"broken": True},
    ),
    300001: ("the robot's token does not exist; put the robot's present URL into url_file", {"broken": True}),
    90030: (
        "the month's quota of messages is used up; raise it or wait for the month to end",
        {"broken": True, "retry_after_ms": 3_600_000},
    ),
    _TOO_LONG: ("too long even when cut; it is left unsent", {"permanent": True}),
}
_UNKNOWN: Final = ("the robot does not take this message; it is left unsent", {"permanent": True})


class _Reply(msgspec.Struct):
    errcode: int
    errmsg: str = ""


class DingTalkNotifier:
    """One custom robot. It takes 20 messages a minute, and after more is silent for ten minutes."""

    pace: ClassVar[Pace] = Pace(burst=18, per_ms=60_000)

    def __init__(
        self,
        url: str,
        session: requests.Session,
        lang: str = "zh",
        *,
        secret: str = "",
        clock: Clock,
        at_mobiles: Sequence[str] = (),
    ) -> None:
        """`url` with its access_token and `secret` (SEC…, empty if the robot does not sign) are secrets.

        `clock` must be the wall clock: the robot compares. ConfigError if the URL cannot be used.
        """
        parts = urlsplit(outbound.checked_url(url, "dingtalk"))
        tokens = parse_qs(parts.query).get("access_token", [])
        if len(tokens) != 1:
            raise ConfigError(
                ["dingtalk: the URL in its url_file has no access_token; copy the robot's whole URL"]
            )
        self._url = parts._replace(query="", fragment="").geturl()
        self._token = tokens[0]
        self._session = session
        self._lang = lang
        self._secret = secret.strip()
        self._clock = clock
        self._at_mobiles = tuple(at_mobiles)

    def send(self, message: Message) -> None:
        """Deliver it, or raise NotifyError. One that is too long is cut in half and sent again at once."""
        text = wording.compose(message, self._lang)
        mobiles = self._at_mobiles if wording.needs_person(message) else ()
        body = as_markdown(text, mobiles)
        reply, answer = self._post(body)
        if reply.errcode == _TOO_LONG:
            reply, answer = self._post(as_markdown(text, mobiles, len(body) // 2))
        if reply.errcode != _OK:
            raise self._fault(reply, answer)

    def _post(self, body: bytes) -> tuple[_Reply, outbound.Answer]:
        answer = outbound.post(self._session, self._url, body, params=self._params())
        if answer.status != 200:
            raise outbound.status_fault(answer, "dingtalk")
        try:
            return msgspec.json.decode(answer.text, type=_Reply, strict=False), answer
        except msgspec.DecodeError as error:
            raise outbound.status_fault(answer, "dingtalk") from error

    def _params(self) -> dict[str, str]:
        """Plain values: `requests` encodes them, and a signature encoded twice is refused."""
        timestamp = str(self._clock.now_ms())
        signed = {"timestamp": timestamp, "sign": signature(self._secret, timestamp)} if self._secret else {}
        return {"access_token": self._token, **signed}

    def _fault(self, reply: _Reply, answer: outbound.Answer) -> NotifyError:
        what, how = _FAULTS.get(reply.errcode, _UNKNOWN)
        offset = self._clock_offset(answer) if reply.errcode == _CONFIG_FAULT else ""
        said = redact(reply.errmsg[:200])
        return NotifyError(
            f"dingtalk: message not delivered: errcode {reply.errcode} {said!r}: {what}{offset}", **how
        )

    def _clock_offset(self, answer: outbound.Answer) -> str:
        if answer.date_ms is None:
            return ""
        offset_ms = self._clock.now_ms() - answer.date_ms
        side = "ahead of" if offset_ms > 0 else "behind"
        return f" (it is {wording.duration(abs(offset_ms), 'en')} {side} DingTalk's)"


def signature(secret: str, timestamp: str) -> str:
    """Base64 of the HMAC-SHA256 that DingTalk asks for; `timestamp` in epoch milliseconds."""
    digest = hmac.new(secret.encode(), f"{timestamp}\n{secret}".encode(), hashlib.sha256).digest()
    return base64.b64encode(digest).decode()


def as_markdown(text: Text, at_mobiles: Sequence[str] = (), limit_bytes: int = BODY_MAX_BYTES) -> bytes:
    """The body, at most `limit_bytes`; what is too long is cut before the footer and the mentions."""
    # A mention works only if the number stands in the text as well.
    calls = "\n\n" + " ".join(f"@{mobile}" for mobile in at_mobiles) if at_mobiles else ""
    title, tail = f"{KEYWORD} {text.title}"[:TITLE_MAX], f"\n\n> {text.footer}{calls}"
    room = limit_bytes - len(_body(title, tail, at_mobiles))
    return _body(title, cut(_markdown(text), room) + tail, at_mobiles)


def cut(text: str, limit_bytes: int) -> str:
    """`text`, or as much of it and an ellipsis as takes `limit_bytes` inside a JSON string."""
    if _json_bytes(text) <= limit_bytes:
        return text
    ends = list(itertools.accumulate(_json_bytes(character) for character in text[:limit_bytes]))
    return text[: bisect.bisect_right(ends, limit_bytes - _json_bytes("…"))] + "…"


def _json_bytes(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")) - 2


def _markdown(text: Text) -> str:
    lines = "\n".join(text.lines).replace("\n", "  \n")  # two spaces and a newline break a line
    fields = "\n".join(f"- {name}: {value}" for name, value in text.fields)
    return _plain_links(f"### {text.title}\n{lines}\n\n{fields}")


def _plain_links(text: str) -> str:
    """No label value becomes a link or an image: their only mark is `](`."""
    return text.replace("](", "] (")


def _body(title: str, text: str, at_mobiles: Sequence[str]) -> bytes:
    payload = {
        "msgtype": "markdown",
        "markdown": {"title": title, "text": text},
        "at": {"atMobiles": list(at_mobiles), "isAtAll": False},
    }
    return json.dumps(payload, ensure_ascii=False).encode("utf-8", "replace")
