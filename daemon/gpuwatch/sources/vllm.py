"""Samples from a vLLM server's `/metrics` and `/health`; asks, never changes anything there.

Rule 1: a refused or reset connection and a status other than 200 are "not healthy".
Rule 2: no answer in time is not: a busy server answers late, and must not be called down for it.
Rule 3: what says nothing about the server, such as a name that does not resolve, is a SourceError.
"""

from __future__ import annotations

import builtins
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import requests

from gpuwatch import clock
from gpuwatch.errors import SourceError
from gpuwatch.records import Labels, Metric, MetricKind, Sample
from gpuwatch.sources.exposition import Exposition

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_MOST_BYTES: Final = 16 * 1024 * 1024
_CHUNK_BYTES: Final = 64 * 1024
_SMALL_BYTES: Final = 256 * 1024
_CONNECT_S: Final = 3.0
_METRICS_S: Final = 5.0
_LOAD_S: Final = 1.0
_LOAD_REST_MS: Final = 60_000
_IDLE_LOADS: Final = 3  # one may be of an instant when the last request had ended
_TEXT_FORMAT: Final = {"Accept": "text/plain; version=0.0.4"}

METRICS: Final = tuple(
    Metric(name=name, kind=MetricKind.GAUGE, help=text, labels=("server",))
    for name, text in (
        (
            "server_health_ok",
            "1 if /health answered 200, 0 if it refused or said otherwise; none if it timed out.",
        ),
        ("server_health_timeout", "1 if /health gave no answer in time, else 0."),
        ("server_health_seconds", "How long /health took to answer, to refuse or to time out."),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthAnswer:
    """What GET /health came to. `status` None: none came, and `error` is the exception's name."""

    status: int | None
    error: str = ""
    seconds: float | None = None


class MetricsSource:
    """Everything on a server's `/metrics`, verbatim, with label `server`, and the count of `/load`."""

    def __init__(self, server: str, url: str, session: requests.Session, *, interval_ms: int = 2000) -> None:
        """`url` is the server's root; `session` comes from `local_session`."""
        self.name = f"metrics:{server}"
        self.interval_ms = interval_ms
        self._server = server
        self._url = url
        self._session = session
        self._exposition = Exposition(server=server)
        self._load_rests_until_ms = 0
        self._idle_loads = 0

    def read(self, now_ms: int) -> list[Sample]:
        """SourceError if there is no page, or it is malformed or larger than 16 MiB."""
        samples = self._exposition.samples(fetch_metrics(self._server, self._url, self._session), now_ms)
        return samples + self._load(now_ms, is_busy=any(map(_shows_work, samples)))

    def _load(self, now_ms: int, *, is_busy: bool) -> list[Sample]:
        """Nothing for a minute after a server at work said 0 again and again: it does not count."""
        if now_ms < self._load_rests_until_ms:
            return []
        in_flight = probe_load(self._url, self._session)
        self._idle_loads = self._idle_loads + 1 if is_busy and not in_flight else 0
        if in_flight is None or self._idle_loads >= _IDLE_LOADS:
            self._load_rests_until_ms = now_ms + _LOAD_REST_MS
            return []
        labels = Labels.of("server_requests_in_flight", server=self._server, source="load")
        return [Sample(labels, now_ms, float(in_flight))]


class HealthSource:
    """Whether a server's `/health` answers 200, which vLLM's does for as long as its engine lives."""

    def __init__(
        self,
        server: str,
        url: str,
        session: requests.Session,
        *,
        interval_ms: int = 1000,
        timeout_s: float = 10.0,
    ) -> None:
        """`url` is the server's root; `session` comes from `local_session`."""
        self.name = f"health:{server}"
        self.interval_ms = interval_ms
        self._server = server
        self._url = url
        self._session = session
        self._timeout_s = timeout_s

    def read(self, now_ms: int) -> list[Sample]:
        """SourceError if what happened says nothing about the server."""
        answer = probe_health(self._server, self._url, self._session, self._timeout_s)
        return health_samples(self._server, answer, now_ms)


def local_session() -> requests.Session:
    """A session for a server on this host: no proxy, no .netrc, a connection of its own each time.

    A kept connection that the server closed in between would look like a reset.
    """
    session = requests.Session()
    session.trust_env = False
    # To pack a page would cost the server milliseconds, and loopback nothing.
    session.headers.update({"Connection": "close", "Accept-Encoding": "identity"})
    return session


def fetch_metrics(server: str, url: str, session: requests.Session) -> str:
    """The text of `/metrics`; SourceError says why there is none, without the URL's credentials."""
    where = f"read /metrics of server {server!r} at {_shown(url)}"
    try:
        with _get(session, url, "/metrics", _METRICS_S) as response:
            if response.status_code != requests.codes.ok:
                raise SourceError(f"{where}: HTTP {response.status_code}; is this vLLM's address?")
            return b"".join(_bounded(response, where)).decode()
    except UnicodeDecodeError:
        raise SourceError(f"{where}: the page is not UTF-8") from None
    except requests.RequestException as error:
        raise SourceError(f"{where}: {_cause(error)}") from None


def _shows_work(sample: Sample) -> bool:
    return sample.value > 0 and sample.labels.metric == "vllm:num_requests_running"


def probe_health(server: str, url: str, session: requests.Session, timeout_s: float) -> HealthAnswer:
    """GET /health once. SourceError if what happened says nothing about the server."""
    began_s = clock.monotonic_s()
    status, name = None, ""
    try:
        with _get(session, url, "/health", timeout_s) as response:
            status = response.status_code
    except requests.Timeout as error:
        name = type(error).__name__
    except requests.RequestException as error:
        broken = _broken_connection(error)
        if broken is None:
            message = f"ask /health of server {server!r} at {_shown(url)}: {_cause(error)}; check its url"
            raise SourceError(message) from None
        name = type(broken).__name__
    return HealthAnswer(status=status, error=name, seconds=clock.monotonic_s() - began_s)


def probe_load(url: str, session: requests.Session) -> int | None:
    """The requests that the API holds by GET /load; None if it does not say.

    0 for ever unless vLLM was started with --enable-server-load-tracking.
    """
    try:
        answer = json.loads(fetch_small(url, "/load", session, _LOAD_S))
    except (requests.RequestException, ValueError, RecursionError):
        return None
    load = answer.get("server_load") if isinstance(answer, dict) else None
    return load if type(load) is int and load >= 0 else None


def fetch_small(
    url: str,
    path: str,
    session: requests.Session,
    timeout_s: float,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """A page of up to 256 KiB, in twice `timeout_s` at most; RequestException, also for any but a 200."""
    until_s, body = clock.monotonic_s() + timeout_s, bytearray()
    with _get(session, url, path, timeout_s, headers) as response:
        if response.status_code != requests.codes.ok:
            raise requests.HTTPError(f"HTTP {response.status_code}")
        for byte in response.iter_content(1):  # more at once would wait for all of it, however slow it drips
            body += byte
            if len(body) > _SMALL_BYTES or clock.monotonic_s() > until_s:
                raise requests.HTTPError("an answer without end")
    return bytes(body)


def health_samples(server: str, answer: HealthAnswer, now_ms: int) -> list[Sample]:
    """`server_health_ok` is left out after a timeout: it is not known."""
    timed_out = answer.status is None and "timeout" in answer.error.lower()
    figures = {"server_health_timeout": float(timed_out)}
    if not timed_out:
        figures["server_health_ok"] = float(answer.status == requests.codes.ok)
    if answer.seconds is not None:
        figures["server_health_seconds"] = answer.seconds
    return [Sample(Labels.of(name, server=server), now_ms, value) for name, value in figures.items()]


def _get(
    session: requests.Session,
    url: str,
    path: str,
    timeout_s: float,
    headers: Mapping[str, str] | None = None,
) -> requests.Response:
    return session.get(
        url.rstrip("/") + path,
        headers=_TEXT_FORMAT if headers is None else headers,
        timeout=(min(_CONNECT_S, timeout_s), timeout_s),
        allow_redirects=False,
        stream=True,
    )


def _bounded(response: requests.Response, where: str) -> Iterator[bytes]:
    """The body in pieces; SourceError once it is too large or drips in too slowly."""
    size, until_s = 0, clock.monotonic_s() + _METRICS_S
    for chunk in response.iter_content(_CHUNK_BYTES):
        size += len(chunk)
        if size > _MOST_BYTES:
            raise SourceError(f"{where}: the page is larger than 16 MiB; is this vLLM's address?")
        if clock.monotonic_s() > until_s:
            raise SourceError(f"{where}: the page was not complete after {_METRICS_S:g} s")
        yield chunk


def _cause(error: requests.RequestException) -> str:
    """In a few words; never the exception's own text, which may hold the URL."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    match _broken_connection(error):
        case ConnectionRefusedError():
            return "connection refused; the server is not running, or still loading its model"
        case None:
            return type(error).__name__
        case broken:
            return f"the connection broke ({type(broken).__name__})"


def _broken_connection(error: BaseException) -> builtins.ConnectionError | None:
    """The operating system's refusal or reset at the root of an error, if that is what it was."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, builtins.ConnectionError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _shown(url: str) -> str:
    """A URL without user, password and query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "a malformed URL"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
