"""What a remediation cost and gave, counted out of the series of its time; a figure not known is left out.

Rule 1: a counter begins anew with each life of the server's API; what it had then is an increase too.
Rule 2: requests that were in hand when a life was read last, and that life has ended, were aborted.
Rule 3: vLLM answers what it refuses itself with 503, and what ends in error with 500: neither counts twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from itertools import dropwhile, pairwise
from typing import TYPE_CHECKING, Final

from gpuwatch.promql import Matcher
from gpuwatch.records import StepEnd
from gpuwatch.servers.look import HELD, RUNNING, TOKENS, WAITING, Look, finite, is_fresh, last, present, rate

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gpuwatch.promql import Querier, Series
    from gpuwatch.records import PastStep, Remediation

_BASE_MS: Final = 60_000  # how far back the value is looked for that a counter had at the beginning
_BEFORE_MS: Final = 300_000  # the same, of a server that may be down since a while
_MINUTE_MS: Final = 60_000
_GAP_MS: Final = 30_000  # nobody looked

_SUCCESS: Final = "vllm:request_success_total"
_HTTP: Final = "http_requests_total"
_REJECTED: Final = "vllm:admission_rejections_total"
_REFUSED: Final = "server_admission_refused_total"
_REQUESTS: Final = f"{_SUCCESS}|{_HTTP}|{_REJECTED}|{_REFUSED}|{RUNNING}|{WAITING}"
_API: Final = Matcher("role", "=", "api_server")


def account(querier: Querier, remediation: Remediation, *, ended_at_ms: int) -> Mapping[str, float]:
    """Requests, seconds without service, and memory and throughput before and after.

    Keys: `requests_finished`, `requests_aborted`, `requests_refused`, `seconds_without_service`,
    `memory_before_bytes`, `memory_after_bytes`, `tokens_per_s_before`, `tokens_per_s_after`.
    """
    look = Look(querier, remediation.plan.server, ended_at_ms, 0)
    began_ms = remediation.created_at_ms
    before = Look(querier, remediation.plan.server, began_ms, 0)
    known = {
        **_requests(look, began_ms),
        "seconds_without_service": _seconds_without_service(look, began_ms, _asleep(remediation)),
        "memory_before_bytes": _memory_bytes(_as_read_last(before, HELD)),
        "memory_after_bytes": _memory_bytes(look),
        "tokens_per_s_before": _tokens_per_s(_as_read_last(before, TOKENS)),
        "tokens_per_s_after": _tokens_per_s(look),
    }
    return {name: value for name, value in known.items() if value is not None}


# -- requests --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Span:
    """The time of a remediation; `births_ms` says when each life of the API began, as far as it is known."""

    began_ms: int
    ended_ms: int
    births_ms: Sequence[int]

    def life(self, at_ms: int) -> int:
        """The number of the life that an instant lies in."""
        return bisect_right(self.births_ms, at_ms)

    def is_of_new_life(self, at_ms: int) -> bool:
        """Whether the life that an instant lies in began within the span."""
        life = self.life(at_ms)
        return life > 0 and self.births_ms[life - 1] >= self.began_ms

    def increase(self, series: Series, page_from_ms: int) -> float:
        """What a counter rose by; one that came to a page that was read before it began at 0."""
        samples = finite(series)
        first = max(bisect_right(samples, self.began_ms, key=lambda sample: sample[0]) - 1, 0)
        if not samples[first:]:
            return 0.0
        at_ms, value = samples[first]
        is_new = at_ms > self.began_ms and (at_ms > page_from_ms or self.is_of_new_life(at_ms))
        grown = value if is_new else 0.0
        for (was_ms, was), (at_ms, value) in pairwise(samples[first:]):
            is_reset = value < was or self.life(at_ms) != self.life(was_ms)
            grown += value if is_reset else value - was
        return grown

    def lost(self, in_hand: Series) -> float:
        """Rule 2, of one gauge."""
        by_life = {self.life(at_ms): value for at_ms, value in finite(in_hand) if at_ms > self.began_ms}
        if is_fresh(in_hand, self.ended_ms):
            by_life.pop(self.life(self.ended_ms), None)
        return sum(by_life.values())


def _requests(look: Look, began_ms: int) -> dict[str, float | None]:
    found: defaultdict[str, list[Series]] = defaultdict(list)
    for series in look.at(_REQUESTS, look.now_ms - began_ms + _BASE_MS):
        found[series.labels.metric].append(series)
    span = _Span(began_ms, look.now_ms, _births_ms(look, began_ms))
    ended = _by_reason(span, found[_SUCCESS])
    failing = [series for series in found[_HTTP] if series.labels.get("status").startswith("5")]
    rejected = _increase(span, found[_REJECTED], found[_SUCCESS])
    refused = _increase(span, found[_REFUSED], found[_REFUSED])
    failed = max(0.0, (_increase(span, failing, found[_SUCCESS]) or 0.0) - (rejected or 0.0))
    lost = sum(span.lost(series) for series in (*found[RUNNING], *found[WAITING]))
    told = [one for one in (rejected, refused) if one is not None]
    aborted = ended.pop("abort", 0.0) + max(ended.pop("error", 0.0), failed) + lost
    is_known = bool(found[_SUCCESS])
    return {
        "requests_finished": sum(ended.values()) if is_known else None,
        "requests_aborted": aborted if is_known else None,
        "requests_refused": sum(told) if told else None,
    }


def _births_ms(look: Look, began_ms: int) -> list[int]:
    """When each process of the API began that was seen in the span."""
    span_ms = look.now_ms - began_ms + _BASE_MS
    found = look.at("server_process_start_time_seconds", span_ms, _API)
    return sorted({int(value) * 1000 for series in found for _, value in finite(series)})


def _by_reason(span: _Span, found: Iterable[Series]) -> dict[str, float]:
    """The requests that came to an end, by vLLM's reason."""
    by_reason: defaultdict[str, list[Series]] = defaultdict(list)
    series = list(found)
    for one in series:
        by_reason[one.labels.get("finished_reason")].append(one)
    return {reason: _increase(span, its, series) or 0.0 for reason, its in by_reason.items()}


def _increase(span: _Span, found: Sequence[Series], page: Sequence[Series]) -> float | None:
    """Of all together; `page` are series of the page that they stand on. None if there are none."""
    page_from_ms = min((series.at_ms[0] for series in page), default=span.ended_ms)
    return sum(span.increase(series, page_from_ms) for series in found) if found else None


# -- service, memory, throughput -------------------------------------------------------------------------


def _asleep(remediation: Remediation) -> Sequence[PastStep]:
    """From when the server was put to sleep to its waking: it serves nobody, though `/health` says 200."""
    since = dropwhile(lambda past: (past.action, past.end) != ("sleep", StepEnd.DONE), remediation.course)
    return [past for past in since if past.action in {"sleep", "wake"}]


def _seconds_without_service(look: Look, began_ms: int, asleep: Sequence[PastStep]) -> float | None:
    """How long the server slept or was in another phase than `serving`; both at once count once.

    Time that nobody watched counts if it ended without service.
    """
    span_ms = look.now_ms - began_ms + _GAP_MS
    serving = look.at("server_phase", span_ms, Matcher("phase", "=", "serving"))
    samples = sorted(sample for series in serving for sample in finite(series))
    if not samples:
        return None
    lasting = [*samples, (look.now_ms, samples[-1][1])]
    without_ms = 0
    for (from_ms, is_serving), (until_ms, then) in pairwise(lasting):
        if is_serving:
            spans = [(max(from_ms, past.began_at_ms), min(until_ms, past.ended_at_ms)) for past in asleep]
        else:
            spans = [(from_ms, until_ms)] if until_ms - from_ms <= _GAP_MS or not then else []
        without_ms += sum(max(0, until - max(begin, began_ms)) for begin, until in spans)
    return without_ms / 1000


def _as_read_last(look: Look, metric: str) -> Look | None:
    """The look at the instant at which the server last had this metric, if that is not long ago."""
    instants = [sample[0] for series in look.at(metric, _BEFORE_MS) if (sample := last(series))]
    return Look(look.querier, look.server, max(instants), look.since_ms) if instants else None


def _memory_bytes(look: Look | None) -> float | None:
    """What the server's processes hold on all GPUs together."""
    found = look.at(HELD, _MINUTE_MS) if look else ()
    values = [value for s in found if look and (value := present(s, look.now_ms)) is not None]
    return sum(values) if values else None


def _tokens_per_s(look: Look | None) -> float | None:
    """Over the last minute."""
    return rate(look.at(TOKENS, _MINUTE_MS), look.now_ms) if look else None
