"""Asks a server what its metrics do not tell: whether it is paused, and for one token; changes nothing.

Rule 1: it asks when it was told to, once, one thing after the other, and each takes a bounded time.
Rule 2: a canary is a request like any other: it waits its turn, and a server that refuses it because it is
        full, or for want of a key, says nothing of its engine. Who refuses is left alone for a minute.
Rule 3: an answer stands at the instant of its question. What is over is not repeated: the series have a
        sample for each question.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
from typing import TYPE_CHECKING, Final

import requests

from gpuwatch import clock
from gpuwatch.records import CANARY, Labels, Metric, MetricKind, Sample
from gpuwatch.sources.vllm import fetch_small

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

log = logging.getLogger(__name__)

_PAUSED_S: Final = 2.0
_MODELS_S: Final = 3.0
_CONNECT_S: Final = 2.0
_REFUSED_REST_MS: Final = 60_000
# The ways to have one token computed; a server of one kind of model refuses the others' so.
_WAYS: Final[tuple[tuple[str, dict[str, object]], ...]] = (
    ("/v1/completions", {"prompt": [1], "max_tokens": 1, "temperature": 0}),
    ("/pooling", {"input": [1]}),
    ("/v1/embeddings", {"input": [1]}),
)
_OTHER_KIND: Final = frozenset({400, 404, 405, 422, 501})
_NO_KEY: Final = frozenset({401, 403})

METRICS: Final = tuple(
    Metric(name=name, kind=MetricKind.GAUGE, help=text, labels=("server",))
    for name, text in (
        (
            "server_paused",
            "1 if /is_paused said so, else 0, also without an answer; asked only where nothing moves.",
        ),
        ("server_canary_ok", "1 if a request for one token was answered, 0 if not in time; seldom asked."),
        ("server_canary_seconds", "How long a request for one token took, to its answer or the time-out."),
    )
)


class _Answer(enum.Enum):
    """What became of one way to ask for a token."""

    TOKEN = enum.auto()
    LATE = enum.auto()
    OTHER_KIND = enum.auto()
    NOTHING = enum.auto()  # refused, broken off, failed: says nothing of the engine


class ProbeSource:
    """Answers to what `ask` asked for; nothing where nothing was asked."""

    def __init__(
        self,
        server: str,
        url: str,
        session: requests.Session,
        *,
        key_file: Path | None = None,
        canary_timeout_s: float = 10.0,
        interval_ms: int = 1000,
    ) -> None:
        """`url` is the server's root, `session` from `local_session`; `key_file` holds vLLM's API key."""
        self.name = f"probe:{server}"
        self.interval_ms = interval_ms
        self._server = server
        self._url = url.rstrip("/")
        self._session = session
        self._key_file = key_file
        self._canary_timeout_s = canary_timeout_s
        self._wants: frozenset[str] = frozenset()
        self._ways = list(_WAYS)
        self._rests_until_ms = 0
        self._told = ""

    def ask(self, wants: Iterable[str]) -> None:
        """What the next read should ask, of `is_paused` and `canary`; replaces what was wanted before."""
        self._wants = frozenset(wants)

    def read(self, now_ms: int) -> list[Sample]:
        """The answers, within five seconds and the canary's time-out; never a SourceError."""
        wants = self._wants
        if not wants:
            return []
        is_paused = self._is_paused()
        figures = {"server_paused": float(is_paused)}
        if CANARY in wants and not is_paused and now_ms >= self._rests_until_ms:
            figures |= self._canary(now_ms)
        self._wants = frozenset()  # what was wanted while this went on is answered by it
        found = {Labels.of(name, server=self._server): value for name, value in figures.items()}
        return [Sample(labels, now_ms, value) for labels, value in found.items()]

    def _is_paused(self) -> bool:
        """What /is_paused says.

        Nobody can pause a server outside development mode, which answers 404, and a paused one answers at
        once: who is late works, or hangs.
        """
        with contextlib.suppress(requests.RequestException, ValueError, RecursionError):
            answer = json.loads(fetch_small(self._url, "/is_paused", self._session, _PAUSED_S))
            return isinstance(answer, dict) and answer.get("is_paused") is True
        return False

    def _canary(self, now_ms: int) -> dict[str, float]:
        """Whether one token came, and after how long; empty where that could not be found out."""
        try:
            model = self._model()
            while model and self._ways:
                began_s = clock.monotonic_s()
                answer = self._answer(*self._ways[0], model)
                if answer in {_Answer.TOKEN, _Answer.LATE}:
                    seconds = clock.monotonic_s() - began_s
                    return {
                        "server_canary_ok": float(answer is _Answer.TOKEN),
                        "server_canary_seconds": seconds,
                    }
                if answer is _Answer.NOTHING:
                    break
                del self._ways[0]
        except (requests.RequestException, ValueError, RecursionError, OSError) as error:
            self._say(type(error).__name__)
        if not self._ways:
            self._say("its model gives neither tokens nor embeddings")
            self._ways = list(_WAYS)
        self._rests_until_ms = now_ms + _REFUSED_REST_MS
        return {}

    def _model(self) -> str:
        """The name of the first model served; ValueError if the page is not vLLM's."""
        page = json.loads(fetch_small(self._url, "/v1/models", self._session, _MODELS_S, self._headers()))
        try:
            return str(page["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ValueError("no model") from None

    def _answer(self, path: str, body: dict[str, object], model: str) -> _Answer:
        timeout_s = self._canary_timeout_s
        try:
            with self._session.post(
                self._url + path,
                json={"model": model, **body},
                headers=self._headers(),
                timeout=(min(_CONNECT_S, timeout_s), timeout_s),
                allow_redirects=False,
                stream=True,  # the status says enough
            ) as response:
                status = response.status_code
        except requests.ReadTimeout:
            return _Answer.LATE
        if status == requests.codes.ok:
            return _Answer.TOKEN
        if status in _OTHER_KIND:
            return _Answer.OTHER_KIND
        self._say(f"HTTP {status}" + ("; set api_key_file of the server" if status in _NO_KEY else ""))
        return _Answer.NOTHING

    def _headers(self) -> dict[str, str]:
        """OSError if the key cannot be read; it is read each time, for keys are changed."""
        if self._key_file is None:
            return {}
        return {"Authorization": f"Bearer {self._key_file.read_text('utf-8').strip()}"}

    def _say(self, what: str) -> None:
        """Once for each new trouble, and nothing of what may hold the key."""
        if what != self._told:
            self._told = what
            log.warning("canary of server %r: %s", self._server, what)
