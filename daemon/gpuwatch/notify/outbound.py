"""One bounded HTTPS POST and what its answer is worth; never retries, follows redirects or names a URL."""

from __future__ import annotations

import email.utils
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import NewConnectionError

from gpuwatch.errors import ConfigError, NotifyError
from gpuwatch.notify.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Mapping
    from urllib.parse import SplitResult

TIMEOUT_S: Final = (3.0, 10.0)  # to connect; between two bytes of the answer
_ANSWER_MAX_BYTES: Final = 4096
_DEFAULT_RETRY_AFTER_MS: Final = 30_000
_NO_PROXY: Final = {"http": "", "https": "", "all": ""}
_UNFIT: Final = frozenset({400, 413, 422})  # what was sent is wrong, not the channel
_PASSING: Final = frozenset({408, 425})


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back. `text` is the body's first 4096 bytes; `date_ms` the server's own clock, if told."""

    status: int
    text: str
    retry_after_ms: int | None = None
    date_ms: int | None = None


def outbound_session() -> requests.Session:
    """A session for receivers on the internet: proxies of the environment count, certificates always do."""
    session = requests.Session()
    session.headers["User-Agent"] = "gpuwatch"
    # Messages are rare. A kept connection that the other end has dropped would leave one in doubt.
    session.headers["Connection"] = "close"
    return session


def checked_url(url: str, kind: str) -> str:
    """The URL without blanks around it; ConfigError unless it is https, or http to this very host."""
    url = url.strip()
    parts = _split(url)
    if parts and parts.hostname and parts.scheme in ({"http", "https"} if _is_loopback(parts) else {"https"}):
        return url
    raise ConfigError(
        [f"{kind}: its url_file holds no https URL; put the webhook's whole URL, https://…, on its one line"]
    )


def post(
    session: requests.Session,
    url: str,
    body: bytes,
    *,
    params: Mapping[str, str] | None = None,
    timeout_s: tuple[float, float] = TIMEOUT_S,
) -> Answer:
    """POST a JSON body; NotifyError if no whole answer came, `unsure` if the message may have arrived."""
    parts = urlsplit(url)
    try:
        with session.post(
            url,
            data=body,
            params=params,
            headers={"Content-Type": "application/json; charset=utf-8"},
            timeout=timeout_s,
            allow_redirects=False,  # the URL is a secret; nobody may send it elsewhere
            proxies=_NO_PROXY if _is_loopback(parts) else None,
            stream=True,
            verify=True,
        ) as response:
            return _answer(response)
    except requests.RequestException as error:
        fault = _fault(error, parts.hostname or "")
    # Raised out here, so that not even its context is the exception that holds the URL.
    raise fault


def status_fault(answer: Answer, kind: str) -> NotifyError:
    """What an answer that is no success means for the message and the channel."""
    what = f"{kind}: message not delivered: HTTP {answer.status} {redact(answer.text[:200])!r}"
    if answer.status == 429:
        wait_ms = answer.retry_after_ms
        return NotifyError(what, retry_after_ms=_DEFAULT_RETRY_AFTER_MS if wait_ms is None else wait_ms)
    if answer.status >= 500 or answer.status in _PASSING:
        return NotifyError(f"{what}; it is tried again")
    if answer.status < 300:
        return NotifyError(f"{what}; is something between that answers in its place?", unsure=True)
    if answer.status in _UNFIT:
        return NotifyError(f"{what}; the message is left unsent", permanent=True)
    return NotifyError(
        f"{what}; the webhook is gone or refuses us: make a new one and put its URL into url_file",
        broken=True,
    )


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        return parts if url.isprintable() and " " not in url and parts.port != 0 else None
    except ValueError:
        return None


def _is_loopback(parts: SplitResult) -> bool:
    host = parts.hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _answer(response: requests.Response) -> Answer:
    body = next(response.iter_content(_ANSWER_MAX_BYTES), b"")
    after = response.headers.get("Retry-After", "")
    date = email.utils.parsedate_tz(response.headers.get("Date", ""))
    return Answer(
        status=response.status_code,
        text=body.decode("utf-8", "replace").strip(),
        retry_after_ms=int(after) * 1000 if after.isascii() and after.isdigit() else None,
        date_ms=email.utils.mktime_tz(date) * 1000 if date else None,
    )


def _fault(error: requests.RequestException, host: str) -> NotifyError:
    reason = getattr(error.args[0], "reason", None) if error.args else None
    never_sent = isinstance(reason, NewConnectionError) or isinstance(
        error, requests.ConnectTimeout | requests.exceptions.SSLError | requests.exceptions.ProxyError
    )
    cause = redact(str(reason)) if reason else type(error).__name__
    if never_sent:
        return NotifyError(f"connect to {host}: {cause}; check network, proxy and certificates")
    return NotifyError(f"wait for {host}'s answer: {cause}; the message may have arrived", unsure=True)
