"""What the series of the last minutes say of a server's progress; asks a `Querier` alone, judges nothing.

Rule 1: what happened while nobody looked is not counted: a span ends where samples lie far apart.
Rule 2: what came before the server began to serve was another life of it.
Rule 3: anything that a step changes on the metrics page is a sign of one. The chunks of a long prompt make
        no output, so that the count of steps stands still; the use of the KV cache does not.
Rule 4: what costs most, hardware and the longest step of the last hour, is looked at where nothing moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gpuwatch.promql import Matcher
from gpuwatch.records import ServerPhase
from gpuwatch.servers.hardware import hardware
from gpuwatch.servers.look import (
    CANARY,
    EXITS,
    IN_FLIGHT,
    KV_USE,
    LIMIT,
    RUNNING,
    SLEEP,
    STATE,
    WAITING,
    Look,
    is_fresh,
    last,
    present,
    run_began_ms,
)
from gpuwatch.servers.progress import Engine, Evidence, Hardware, Process

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gpuwatch.promql import Querier, Series
    from gpuwatch.records import ServerState

_LOOKBACK_MS: Final = 300_000
_HOUR_MS: Final = 3_600_000
_HELD_LOOKBACK_MS: Final = 35_000
_HARDWARE_FROM_MS: Final = 4_000
_LONG_STEP_FROM_MS: Final = 30_000

_STEPS: Final = "vllm:iteration_tokens_total_count"
_BY_REASON: Final = "vllm:num_requests_waiting_by_reason"
_SIGNS: Final = (_STEPS, RUNNING, WAITING, KV_USE)
_ROLES: Final = Matcher("role", "=~", "api_server|engine_core|worker")


def evidence(
    querier: Querier,
    state: ServerState,
    *,
    now_ms: int,
    has_own_pause: bool = False,
    canary_interval_ms: int | None = None,
) -> Evidence:
    """All that is known now of a server in `state`, from what `querier` holds of the last hour."""
    look = Look(querier, state.name, now_ms, state.since_ms)
    if state.phase is not ServerPhase.SERVING:
        return Evidence(
            server=state.name,
            at_ms=now_ms,
            phase=state.phase,
            serving_ms=now_ms - state.since_ms,
            is_coming_up=state.starting_since_ms is not None,
        )
    pages = _pages(look)
    engines = tuple(_engine(look, name, page) for name, page in pages.items())
    scraped_at_ms = max((page.at_ms for page in pages.values()), default=None)
    stepped_at_ms = None
    if scraped_at_ms is not None:
        stepped_at_ms = scraped_at_ms - min(engine.flat_ms for engine in engines)
    in_flight, in_flight_ms = _in_flight(look)
    answers = _answers(look, stepped_at_ms, max(_LOOKBACK_MS, canary_interval_ms or 0))
    in_doubt = answers.unanswered_ms is not None or any(
        engine.requests and engine.flat_ms >= _HARDWARE_FROM_MS for engine in engines
    )
    return Evidence(
        server=state.name,
        at_ms=now_ms,
        phase=state.phase,
        serving_ms=now_ms - state.since_ms,
        is_stopping=state.supervisor.stop_asked,
        has_own_pause=has_own_pause or answers.is_held,
        is_paused=answers.is_paused,
        paused_asked_ms=answers.paused_asked_ms,
        sleep=next((page.sleep for page in pages.values() if page.sleep), ""),
        scraped_ms=None if scraped_at_ms is None else now_ms - scraped_at_ms,
        engines=engines,
        processes=_held(look),
        died=_died(look),
        in_flight=in_flight,
        in_flight_ms=in_flight_ms,
        hardware=hardware(look) if in_doubt else Hardware.UNKNOWN,
        canary_asked_ms=answers.canary_asked_ms,
        unanswered_ms=answers.unanswered_ms,
    )


# -- engines -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Page:
    """What the metrics page says of one engine: the series by metric, and when it was read last."""

    series: Mapping[str, Series]
    at_ms: int
    deferred: int
    sleep: str


def _pages(look: Look) -> dict[str, _Page]:
    """The page by engine; those without a sample in the look-back are left out."""
    found: dict[str, dict[str, Series]] = {}
    for series in look.at("|".join((*_SIGNS, _BY_REASON, SLEEP)), _LOOKBACK_MS):
        labels = series.labels
        key = labels.get("sleep_state") or labels.get("reason") or labels.metric
        found.setdefault(labels.get("engine"), {})[key] = series
    return {name: page for name, by_key in sorted(found.items()) if (page := _page(by_key)) is not None}


def _page(by_key: Mapping[str, Series]) -> _Page | None:
    newest = [sample for metric in _SIGNS if (sample := last(by_key.get(metric))) is not None]
    if not newest:
        return None
    deferred = last(by_key.get("deferred"))
    return _Page(by_key, max(at for at, _ in newest), int(deferred[1]) if deferred else 0, _sleep(by_key))


def _sleep(by_key: Mapping[str, Series]) -> str:
    """The sleep state, empty while awake; `scheduling` is level 0, a pause that vLLM calls sleep."""
    awake = last(by_key.get("awake"))
    if awake is None or awake[1]:
        return ""
    states = ("weights_offloaded", "discard_all")
    return next((s for s in states if (sample := last(by_key.get(s))) and sample[1]), "scheduling")


def _engine(look: Look, name: str, page: _Page) -> Engine:
    steps = last(page.series.get(_STEPS))
    counts = [last(page.series.get(metric)) for metric in (RUNNING, WAITING)]
    requests = sum(int(sample[1]) for sample in counts if sample)
    signs = [page.series[metric] for metric in _SIGNS if metric in page.series]
    queue = page.series.get(WAITING)
    moved_at_ms = max(_unchanged_since_ms(series, is_queue=series is queue) for series in signs)
    flat_ms = max(page.at_ms - moved_at_ms, 0)
    is_long = requests > 0 and flat_ms >= _LONG_STEP_FROM_MS
    return Engine(
        name=name,
        requests=requests,
        deferred=page.deferred,
        flat_ms=flat_ms,
        has_moved=moved_at_ms == page.at_ms > min(series.at_ms[0] for series in signs),
        has_stepped=steps is not None and steps[1] > 0,
        longest_step_ms=_longest_step_ms(look, name) if is_long else 0,
    )


def _unchanged_since_ms(series: Series, *, is_queue: bool) -> int:
    """Since when a series has had the value that it has; 0 if it has none.

    Of a queue, whether it is empty: clients make it longer, not steps.
    """
    newest = last(series)
    if newest is None:
        return 0
    value = newest[1]
    same = (lambda v: (v > 0) == (value > 0)) if is_queue else (lambda v: v == value)
    return run_began_ms(series, same) or 0


def _longest_step_ms(look: Look, engine: str) -> int:
    """The longest span of the last hour from one sign of a step to the next, requests in hand all the while.

    What has not ended is no step yet.
    """
    by_metric = {
        series.labels.metric: dict(zip(series.at_ms, series.values, strict=True))
        for series in look.at(f"{_STEPS}|{RUNNING}|{WAITING}", _HOUR_MS, Matcher("engine", "=", engine))
    }
    running, waiting = by_metric.get(RUNNING, {}), by_metric.get(WAITING, {})
    longest_ms, began_ms, steps = 0, 0, -1.0
    for at_ms, now_steps in by_metric.get(_STEPS, {}).items():
        if now_steps > steps >= 0 and began_ms:
            longest_ms = max(longest_ms, at_ms - began_ms)
        has_requests = running.get(at_ms, 0) + waiting.get(at_ms, 0) > 0
        if now_steps != steps or not has_requests:
            began_ms = at_ms if has_requests else 0
        steps = now_steps
    return longest_ms


# -- processes -----------------------------------------------------------------------------------------


def _held(look: Look) -> tuple[Process, ...]:
    """The processes that are stopped or blocked."""
    found: dict[str, dict[str, int]] = {}
    states = Matcher("state", "=~", "stopped|blocked")
    for series in look.at(STATE, _HELD_LOOKBACK_MS, _ROLES, states):
        began_ms = run_began_ms(series, lambda value: value == 1.0) if is_fresh(series, look.now_ms) else None
        if began_ms is not None:
            state = series.labels.get("state")
            found.setdefault(series.labels.get("process"), {})[f"{state}_ms"] = look.now_ms - began_ms
    return tuple(Process(name=name, **spans) for name, spans in sorted(found.items()))


def _died(look: Look) -> tuple[str, ...]:
    """The processes whose exits have risen since the server serves, and of whose name none lives."""
    exits = look.at(EXITS, _LOOKBACK_MS, _ROLES)
    ended = {
        series.labels.get("process")
        for series in exits
        if is_fresh(series, look.now_ms) and series.values[-1] > min(v for v in series.values if v == v)
    }
    if not ended:
        return ()
    states = look.at(STATE, _HELD_LOOKBACK_MS, Matcher("state", "!=", "zombie"))
    alive = {s.labels.get("process") for s in states if present(s, look.now_ms)}
    return tuple(sorted(ended - alive))


# -- requests in the API, and what was answered ----------------------------------------------------------


def _in_flight(look: Look) -> tuple[int | None, int]:
    """How many requests the API holds, and for how long it has held any; None if nobody can tell.

    `load` is 0 for ever where vLLM does not count: it is believed once it was seen above.
    """
    found = [s for s in look.at(IN_FLIGHT, _LOOKBACK_MS) if is_fresh(s, look.now_ms)]
    known = [s for s in found if s.labels.get("source") == "admission" or any(v > 0 for v in s.values)]
    began = [began for s in known if (began := run_began_ms(s, lambda value: value > 0)) is not None]
    most = max((int(s.values[-1]) for s in known), default=None)
    return most, look.now_ms - min(began) if began else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answers:
    is_paused: bool | None
    paused_asked_ms: int | None
    is_held: bool
    canary_asked_ms: int | None
    unanswered_ms: int | None


def _answers(look: Look, stepped_at_ms: int | None, lookback_ms: int) -> _Answers:
    """What was asked of the server, and answered after its last step, which makes older answers void."""
    by_metric: dict[str, Series] = {}
    for series in look.at(
        f"server_paused|server_guest_paused|{LIMIT}|{CANARY}",
        lookback_ms,
        Matcher("limit", "=~", "|running"),
    ):
        by_metric[series.labels.metric] = series
    limit = by_metric.get(LIMIT)
    told = [last(by_metric.get(metric)) for metric in ("server_paused", "server_guest_paused")]
    asked = max((answer for answer in told if answer is not None), default=None)
    counts = asked is not None and stepped_at_ms is not None and asked[0] > stepped_at_ms
    canaries = _canaries(by_metric.get(CANARY))
    return _Answers(
        is_paused=bool(asked[1]) if asked and counts else None,
        paused_asked_ms=look.now_ms - asked[0] if asked else None,
        is_held=limit is not None and present(limit, look.now_ms) == 0,
        canary_asked_ms=look.now_ms - canaries[-1][0] if canaries else None,
        unanswered_ms=_unanswered_ms(canaries, stepped_at_ms, look.now_ms),
    )


def _canaries(series: Series | None) -> Sequence[tuple[int, float]]:
    """Each canary: when it was asked, and whether it was answered."""
    if series is None:
        return ()
    return [(at_ms, ok) for at_ms, ok in zip(series.at_ms, series.values, strict=True) if ok == ok]


def _unanswered_ms(
    canaries: Iterable[tuple[int, float]], stepped_at_ms: int | None, now_ms: int
) -> int | None:
    """How long ago the first of the canaries was asked that neither an answer nor a step came after."""
    first_ms = None
    for at_ms, is_ok in canaries:
        is_lost = not is_ok and (stepped_at_ms is None or at_ms >= stepped_at_ms)
        first_ms = (first_ms or at_ms) if is_lost else None
    return None if first_ms is None else now_ms - first_ms
