"""Whether a server's processes and GPUs compute, from the last seconds of their series; pure."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import TYPE_CHECKING, Final

from gpuwatch.promql import Matcher
from gpuwatch.servers.look import is_fresh
from gpuwatch.servers.progress import Hardware

if TYPE_CHECKING:
    from gpuwatch.promql import Series
    from gpuwatch.servers.look import Look

# The first is less than any span that makes a stall: what came before still belongs to a step. The second,
# where too little was seen in it, reaches over a restart of gpuwatch.
_SPANS_MS: Final = (5_000, 30_000)
_LEAST_SPAN_MS: Final = 3_000
_HOUR_MS: Final = 3_600_000
_IDLE_CORES: Final = 0.1
_IDLE_RATIO: Final = 0.02
_FULL_RATIO: Final = 0.98
# A lost partner leaves an H200 at 100 % with 127 W of 700, some 10 to 50 % above what it draws at rest.
_COLD_OF_LIMIT: Final = 0.25
_COLD_OF_LEAST: Final = 1.5

_UTILIZATION: Final = "gpu_utilization_ratio"
_POWER: Final = "gpu_power_draw_watts"
_LIMIT: Final = "gpu_power_limit_watts"


def hardware(look: Look) -> Hardware:
    """What the server's engines, workers and helpers, and the GPUs that it holds memory on, do now."""
    found = (_over(look, span_ms) for span_ms in _SPANS_MS)
    return next((known for known in found if known is not Hardware.UNKNOWN), Hardware.UNKNOWN)


def _over(look: Look, span_ms: int) -> Hardware:
    """The same, over a span."""
    cores = _cores(look, span_ms)
    if cores is None:
        return Hardware.UNKNOWN
    if _has_blocked(look, span_ms):
        return Hardware.WORKING
    held = look.at("gpu_process_memory_used_bytes", span_ms)
    uuids = {series.labels.get("uuid") for series in held}
    figures = _figures(look, span_ms)
    if not uuids:  # a server on CPUs alone, or GPUs of which nobody can tell whose they are
        has_gpus = figures or look.of_host(_UTILIZATION, _HOUR_MS)
        return Hardware.UNKNOWN if has_gpus else _of_cpu(cores)
    gpus = {uuid: _of_gpu(look, uuid, figures.get(uuid, {})) for uuid in sorted(uuids)}
    for worse in (Hardware.UNKNOWN, Hardware.WORKING):
        if worse in gpus.values():
            return worse
    if Hardware.SPINNING not in gpus.values():
        return _of_cpu(cores)
    # Who spins may wait for one whose GPU rests because it compiles or loads.
    late = {
        s.labels.get("process").rpartition(":")[2]
        for s in held
        if gpus[s.labels.get("uuid")] is Hardware.IDLE
    }
    its = _cores(look, span_ms, Matcher("process", "=~", "|".join(sorted({"helper", *late}))))
    return Hardware.WORKING if its is not None and its >= _IDLE_CORES else Hardware.SPINNING


def _has_blocked(look: Look, span_ms: int) -> bool:
    """Whether a process waited for a disk or the driver: it uses no CPU, and rests as little."""
    blocked = Matcher("state", "=", "blocked"), Matcher("role", "!=", "api_server")
    return any(1.0 in series.values for series in look.at("server_process_state", span_ms, *blocked))


def _of_cpu(cores: float) -> Hardware:
    return Hardware.IDLE if cores < _IDLE_CORES else Hardware.WORKING


def _cores(look: Look, span_ms: int, *more: Matcher) -> float | None:
    """How many cores all but the API use; None if that cannot be told.

    The API answers health checks and scrapes also where no token comes.
    """
    found = look.at("server_process_cpu_seconds_total", span_ms, Matcher("role", "!=", "api_server"), *more)
    fresh = [series for series in found if is_fresh(series, look.now_ms) and len(series.at_ms) > 1]
    if not fresh or max(series.at_ms[-1] - series.at_ms[0] for series in fresh) < _LEAST_SPAN_MS:
        return None
    # Of processes of one name the sum falls where one ends: only what it rose by is work.
    rises = ((sum(b - a for a, b in pairwise(s.values) if b > a), s.at_ms[-1] - s.at_ms[0]) for s in fresh)
    return sum(1000 * rise / span for rise, span in rises)


def _figures(look: Look, span_ms: int) -> dict[str, dict[str, Series]]:
    """Use and power by GPU and metric."""
    found: dict[str, dict[str, Series]] = {}
    for series in look.of_host(f"{_UTILIZATION}|{_POWER}|{_LIMIT}", span_ms):
        if is_fresh(series, look.now_ms):
            found.setdefault(series.labels.get("uuid"), {})[series.labels.metric] = series
    return found


def _of_gpu(look: Look, uuid: str, figures: dict[str, Series]) -> Hardware:
    use = figures.get(_UTILIZATION)
    if use is None or use.at_ms[-1] - use.at_ms[0] < _LEAST_SPAN_MS:
        return Hardware.UNKNOWN
    if max(use.values) <= _IDLE_RATIO:
        return Hardware.IDLE
    is_full = min(use.values) >= _FULL_RATIO
    return Hardware.SPINNING if is_full and _is_cold(look, uuid, figures) else Hardware.WORKING


def _is_cold(look: Look, uuid: str, figures: dict[str, Series]) -> bool:
    """Whether a GPU draws little for its board, and about the least that it drew within the hour."""
    power, limit = figures.get(_POWER), figures.get(_LIMIT)
    if power is None or limit is None or max(power.values) > _COLD_OF_LIMIT * limit.values[-1]:
        return False
    hour = look.of_host(_POWER, _HOUR_MS, Matcher("uuid", "=", uuid))
    drawn = chain.from_iterable(series.values for series in hour)
    return max(power.values) <= _COLD_OF_LEAST * min(watts for watts in drawn if watts == watts)
