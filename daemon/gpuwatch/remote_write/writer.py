"""One POST of samples to a remote write receiver and what its answer means; never retries or follows.

Secrets are read from their files at each send, so that they may be changed under way.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import ipaddress
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import msgspec
import requests

import gpuwatch
from gpuwatch.errors import ConfigError
from gpuwatch.remote_write.delivery import RemoteWriteError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from urllib.parse import SplitResult

    from gpuwatch.config import RemoteWriteSettings
    from gpuwatch.records import Scrape
    from gpuwatch.remote_write.wire import Encoder

_HEADERS: Final = {
    "Content-Encoding": "snappy",
    "Content-Type": "application/x-protobuf",
    "X-Prometheus-Remote-Write-Version": "0.1.0",
    "User-Agent": f"gpuwatch/{gpuwatch.__version__}",
}
_CONNECT_S: Final = 3.0
_ANSWER_MAX_BYTES: Final = 1024
_QUOTE_MAX: Final = 200
_DEEPEST: Final = 8  # requests holds urllib3's exception, and that the system's
_LABEL_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NO_PROXY: Final = {"http": "", "https": "", "all": ""}
_PASSING: Final = frozenset({408, 425, 429})
_MISDIRECTED: Final = {  # the address or we are wrong, not the samples
    401: "see that its bearer_token_file or password_file holds what the receiver asks for",
    403: "see that whom its bearer_token_file or username names may write",
    404: "see to the url's path; a Prometheus must run with --web.enable-remote-write-receiver",
    405: "see to the url's path",
    407: "see to the proxy's user and password in the environment",
    410: "see to the url's path",
    415: "see that the url is one that takes remote write 1.0",
}
_WAITS: Final = "the samples wait on disk and are sent again"
_REFUSED: Final = "what is refused is left out; Prometheus takes late samples by out_of_order_time_window"


class RemoteWriter:
    """One receiver of samples. For one thread at a time; keeps its connection."""

    def __init__(self, target: RemoteWriteSettings, session: requests.Session | None = None) -> None:
        """ConfigError if `gpuwatch[remote-write]` is not installed or what is set cannot be used."""
        self._target = target
        self._parts = _checked(target)
        self._shown_url = _shown(self._parts)
        self._encoder = _encoder(target.external_labels)
        self._session = session or requests.Session()

    def send(self, scrapes: Sequence[Scrape]) -> int:
        """Send all their samples in one request and say how many; RemoteWriteError if they were not taken.

        Takes about `timeout` at most: no retry, and no redirect is followed.
        """
        samples = sum(len(scrape.values) for scrape in scrapes)
        if not samples:
            return 0
        fault = self._post(
            self._encoder.encode(scrapes), f"cannot send {samples} samples to {self._shown_url}"
        )
        if fault:
            # Raised out here, so that not even its context is an exception that holds URL or token.
            raise fault
        return samples

    def close(self) -> None:
        """Close the connection, if one is open; the next send opens another."""
        self._session.close()

    def _post(self, body: bytes, what: str) -> RemoteWriteError | None:
        authorization = self._authorization()
        timeout_s = self._target.timeout / 1000

        def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
            if authorization:
                request.headers["Authorization"] = authorization
            return request

        try:
            with self._session.post(
                self._target.url,
                data=body,
                headers=_HEADERS,
                auth=sign,  # also without a secret: else one from .netrc would go out
                timeout=(min(_CONNECT_S, timeout_s), timeout_s),
                allow_redirects=False,
                proxies=_NO_PROXY if _is_loopback(self._parts) else None,
                stream=True,
            ) as response:
                return _fault_of(response, what)
        except requests.RequestException as error:
            cause = _cause(error, timeout_s)
        return RemoteWriteError(f"{what}: {cause}; {_WAITS}; see that the receiver runs and can be reached")

    def _authorization(self) -> str:
        """The header's value; empty without a secret."""
        target = self._target
        if target.bearer_token_file:
            token = _secret(target.bearer_token_file)
            if not re.fullmatch(r"[!-~]+", token):
                raise RemoteWriteError(
                    f"cannot read a token in {target.bearer_token_file}: it is not one word of ASCII;"
                    " put the token alone on its one line",
                    broken=True,
                )
            return f"Bearer {token}"
        if target.username and target.password_file:
            pair = f"{target.username}:{_secret(target.password_file)}"
            return f"Basic {base64.b64encode(pair.encode()).decode()}"
        return ""


def of_settings(receivers: Iterable[RemoteWriteSettings], host: str) -> dict[str, RemoteWriter]:
    """A writer for each receiver, by name, that labels every series with `host`. Opens no connection.

    ConfigError with all that cannot be used.
    """
    found, mistakes = dict[str, RemoteWriter](), list[str]()
    for receiver in receivers:
        labelled = msgspec.structs.replace(
            receiver, external_labels={"host": host} | receiver.external_labels
        )
        try:
            found[receiver.name] = RemoteWriter(labelled)
        except ConfigError as error:
            mistakes += [f"store.remote_write: {receiver.name}: {mistake}" for mistake in error.mistakes]
    if mistakes:
        raise ConfigError(mistakes)
    return found


def _encoder(external_labels: Mapping[str, str]) -> Encoder:
    try:
        from gpuwatch.remote_write.wire import Encoder  # noqa: PLC0415 (4 MiB, for those who need it)
    except ImportError as error:
        raise ConfigError(
            [f"cannot import {error.name}, which encodes samples; install gpuwatch[remote-write]"]
        ) from None
    return Encoder(external_labels)


def _checked(target: RemoteWriteSettings) -> SplitResult:
    mistakes = [
        f"external_labels: {name!r} is no label name; use letters, digits and _"
        for name in target.external_labels
        if not _LABEL_NAME.fullmatch(name)
    ]
    parts = _split(target.url)
    if parts is None:
        mistakes.append("url: is no http or https URL; write it as http://host:9090/api/v1/write")
    elif parts.username is not None:
        mistakes.append("url: holds a user; put it in username and the password in a password_file")
    if mistakes or parts is None:
        raise ConfigError(mistakes)
    return parts


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
        return parts if usable and url.isprintable() and " " not in url else None
    except ValueError:
        return None


def _shown(parts: SplitResult) -> str:
    """The URL without user and query, which may hold secrets."""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _is_loopback(parts: SplitResult) -> bool:
    host = parts.hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _secret(path: Path) -> str:
    try:
        text = path.read_text("utf-8").strip()
        cause = "" if text else "it is empty"
    except (OSError, UnicodeDecodeError) as error:
        text, cause = "", getattr(error, "strerror", None) or "it is not UTF-8 text"
    if cause:
        raise RemoteWriteError(f"cannot read {path}: {cause}; put the secret there for gpuwatch", broken=True)
    return text


def _fault_of(response: requests.Response, what: str) -> RemoteWriteError | None:
    """None for a success. Reads the answer's body, without which the connection cannot be kept."""
    body = b""
    # The status has come, and it alone decides.
    with contextlib.suppress(requests.RequestException):
        body = next(response.iter_content(_ANSWER_MAX_BYTES), b"")
    status = response.status_code
    if 200 <= status < 300:
        return None
    said = body.decode("utf-8", "replace").strip().partition("\n")[0][:_QUOTE_MAX]
    what = f"{what}: HTTP {status} {said!r}"
    if status in _PASSING or status >= 500:
        return RemoteWriteError(f"{what}; {_WAITS}", retry_after_ms=_retry_after_ms(response.headers))
    if status < 400:
        return RemoteWriteError(f"{what}; put the url that it leads to into the settings", broken=True)
    if cure := _MISDIRECTED.get(status):
        return RemoteWriteError(f"{what}; {cure}", broken=True)
    return RemoteWriteError(f"{what}; {_REFUSED}", permanent=True)


def _retry_after_ms(headers: Mapping[str, str]) -> int | None:
    after = headers.get("Retry-After", "").strip()
    if after.isascii() and after.isdigit():
        return int(after[:9]) * 1000
    try:
        until = email.utils.parsedate_to_datetime(after)
        # A date is the receiver's, so it is told from the receiver's own clock.
        now = email.utils.parsedate_to_datetime(headers.get("Date", ""))
        return max(0, round((until - now).total_seconds() * 1000))
    except (ValueError, TypeError, OverflowError):
        return None


def _cause(error: requests.RequestException, timeout_s: float) -> str:
    """What the system says, without the URL that the libraries put around it."""
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection within {min(_CONNECT_S, timeout_s):g} s"
    if isinstance(error, requests.Timeout):
        return f"no answer within {timeout_s:g} s"
    inner: BaseException | None = error
    for _ in range(_DEEPEST):
        if isinstance(inner, OSError) and inner.strerror:
            return str(inner.strerror)
        inner = _within(inner)
    return "the connection ended without an answer"


def _within(error: BaseException | None) -> BaseException | None:
    if error is None:
        return None
    candidates = (error.__cause__, getattr(error, "reason", None), *reversed(error.args), error.__context__)
    return next((one for one in candidates if isinstance(one, BaseException)), None)
