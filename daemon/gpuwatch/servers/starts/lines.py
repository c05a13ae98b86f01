"""What the log of a vLLM start says, line by line, from 0.20 to 0.33; pure, reads no log.

Rule 1: lines that are read twice are as if they were read once, so a reader may begin anew anywhere.
Rule 2: the first cause counts: what comes after it in the log, the API server's last words too, follows
        from it.
Rule 3: what is said before the server is healthy is no failure of its life after that.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from gpuwatch.records import ServerStart, StartOutcome
from gpuwatch.servers.starts import failures
from gpuwatch.servers.starts.arguments import arguments_of, configuration_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_HEAD_CHARACTERS: Final = 200
_LONGEST_LINE_CHARACTERS: Final = 64 * 1024
_UNSEEN: Final = re.compile(r"\x1b\[[0-9;]*m|[\x00-\x08\x0b-\x1f\x7f]")  # colours, and what no database takes
_PROCESS: Final = re.compile(r"\(([\w.-]+) pid=\d+\) ?")
_STAMP: Final = re.compile(r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?")
_ENGINE: Final = re.compile("EngineCore|(?:Vllm)?Worker|RayWorker")
_UNNAMED: Final = "EngineCore"
_API: Final = "APIServer"

_N: Final = r"\d+(?:\.\d+)?"
_FIGURES: Final = (
    ("Model loading took", rf"took (?P<weights_gib>{_N}) G"),
    ("Available KV cache memory", rf"memory: (?P<kv_cache_gib>{_N}) GiB"),
    ("reserved", rf"reserved (?P<kv_cache_gib>{_N}) GiB memory for\s+KV Cache"),
    ("for KV cache on node", rf"\((?P<kv_cache_gib>{_N})/{_N}\) GiB for KV cache on node"),
    ("KV cache size", r"KV cache size: (?P<kv_cache_tokens>[\d,]+) tokens"),
    (
        "Maximum concurrency",
        rf"concurrency for (?P<max_model_len>[\d,]+) tokens per request: (?P<max_concurrency>{_N})x",
    ),
    ("Graph capturing finished", rf"took (?P<cuda_graphs_gib>{_N}) GiB"),
    ("CUDA graph pool memory", rf"memory: (?P<cuda_graphs_gib>{_N}) GiB \(actual\)"),
    ("CUDA graph pool memory", rf"(?P<cuda_graphs_estimated_gib>{_N}) GiB \(estimated\)"),
    # The calibration line, which says all of it once more and what the KV cache could be.
    ("--kv-cache-memory=", rf"\((?P<free_at_start_gib>{_N})/(?P<total_gib>{_N}) GiB\) on startup"),
    ("--kv-cache-memory=", rf"utilization is \({_N}, (?P<requested_gib>{_N}) GiB\)"),
    ("--kv-cache-memory=", rf"usage is (?P<weights_gib>{_N}) GiB for weight"),
    ("--kv-cache-memory=", rf"usage is (?P<consumed_gib>{_N}) GiB for consumed memory"),
    ("--kv-cache-memory=", rf"(?P<activation_peak_gib>{_N}) GiB for peak activation"),
    ("--kv-cache-memory=", rf"(?P<non_torch_gib>{_N}) GiB for non-torch memory"),
    ("--kv-cache-memory=", rf"(?P<cuda_graphs_gib>{_N}) GiB for CUDAGraph memory"),
    ("--kv-cache-memory=", r"config with `--kv-cache-memory=(?P<kv_cache_suggested_bytes>\d+)"),
    ("--kv-cache-memory=", r"or `--kv-cache-memory=(?P<kv_cache_most_bytes>\d+)"),
)
_PATTERNS: Final = tuple((needle, re.compile(pattern)) for needle, pattern in _FIGURES)
_VERSION: Final = re.compile(
    r"LLM engine \(v(?P<engine>[^)\s]+)\)|API server version (?P<server>\S+)|█\s+version (?P<banner>\S+)"
)
_VERSION_NEEDLES: Final = ("LLM engine (v", "API server version", " version ")
_ARGUMENTS: Final = "non-default args: "
_GIVEN: Final = {"port_busy": "port", "model_not_found": "model"}  # the argument that is a fact of it
_HEALTHY: Final = "Application startup complete"
_FIELD: Final = re.compile(r"[\w.]+")  # stands alone before what is wrong with it
_DETAIL: Final = re.compile(r"\s+(?:Value error, )?(?P<detail>.+?)(?: \[type=.*)?$")
_TELLING: Final = re.compile(
    "|".join(
        re.escape(needle)
        for needle in sorted(
            {*failures.NEEDLES, *_VERSION_NEEDLES, _ARGUMENTS, _HEALTHY, *(needle for needle, _ in _FIGURES)}
        )
    )
)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the log: the process that its prefix names, empty if none, and the message."""

    process: str
    text: str

    @classmethod
    def of(cls, raw: str) -> Self:
        """`(EngineCore pid=7) INFO 11-20 12:00:00 [core.py:1] text`, as far as it has these parts."""
        raw = _UNSEEN.sub("", raw[:_LONGEST_LINE_CHARACTERS])
        process = _PROCESS.search(raw, 0, _HEAD_CHARACTERS)
        stamp = _STAMP.search(raw, 0, _HEAD_CHARACTERS)
        end = max(process.end() if process else 0, stamp.end() if stamp else 0)
        return cls(process.group(1) if process else "", raw[end:])


def read(start: ServerStart, raws: Iterable[str]) -> ServerStart:
    """The start as it is known after these lines, in their order; its outcome stays as it was."""
    in_life = start.outcome is StartOutcome.HEALTHY
    wants_detail = False
    for raw in raws:
        if wants_detail:
            start, wants_detail = _with_detail(start, Line.of(raw).text)
        elif _TELLING.search(raw):
            line, known = Line.of(raw), start.failure
            in_life = in_life or line.text.rstrip(". ").endswith(_HEALTHY)
            start = _after(start, line, in_life=in_life)
            wants_detail = known != start.failure == "bad_argument" and "detail" not in start.facts
    return start


def _after(start: ServerStart, line: Line, *, in_life: bool) -> ServerStart:
    if line.text.rstrip(". ").endswith(_HEALTHY):
        return dataclasses.replace(start, failure="", facts={}, lines=())
    if _ARGUMENTS in line.text:
        return _with_arguments(start, line.text.partition(_ARGUMENTS)[2])
    version = _VERSION.search(line.text)
    if version:
        start = dataclasses.replace(start, version=next(filter(None, version.groups())))
        return _configured(start)
    figures = _figures_in(line.text)
    if figures:
        return _with_figures(start, line.process or _UNNAMED, figures)
    return _with_failure(start, line, in_life=in_life)


def _with_arguments(start: ServerStart, text: str) -> ServerStart:
    arguments = arguments_of(text)
    return _configured(dataclasses.replace(start, arguments=arguments)) if arguments else start


def _configured(start: ServerStart) -> ServerStart:
    return dataclasses.replace(start, configuration=configuration_of(start.version, start.arguments))


def _figures_in(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for needle, pattern in _PATTERNS:
        match = pattern.search(text) if needle in text else None
        if match:
            found |= {name: float(value) for name, value in failures.measured(match.groupdict()).items()}
    return found


def _with_figures(start: ServerStart, worker: str, told: Mapping[str, float]) -> ServerStart:
    of_worker = {**start.figures.get(worker, {}), **told}
    consumed = of_worker.pop("consumed_bytes", None)  # 0.33 says weights and non-torch as one
    if consumed is not None and "weights_bytes" in of_worker:
        of_worker["non_torch_bytes"] = max(0.0, consumed - of_worker["weights_bytes"])
    figures = {**start.figures, worker: of_worker}
    tokens, concurrency = _sum(figures, "kv_cache_tokens"), _sum(figures, "max_concurrency")
    return dataclasses.replace(
        start,
        figures=figures,
        kv_cache_tokens=None if tokens is None else int(tokens),
        max_concurrency=concurrency,
    )


def _sum(figures: Mapping[str, Mapping[str, float]], name: str) -> float | None:
    """Over the engines, each of which has a KV cache of its own."""
    told = [own[name] for own in figures.values() if name in own]
    return sum(told) if told else None


def _with_failure(start: ServerStart, line: Line, *, in_life: bool) -> ServerStart:
    of_engine = _ENGINE.match(line.process) is not None
    told = failures.failure_in(line.text, in_life=in_life, of_engine=of_engine)
    if told is None or (in_life and told.rank == 2 and line.process.startswith(_API)):
        return start  # a cause that the API tells may be the text of a request
    known = failures.rank_of(start.failure)
    # Of causes the first counts, of mere errors the last.
    if told.rank > known or told.rank == known == failures.rank_of(failures.UNKNOWN):
        given = _GIVEN.get(told.kind, "")
        facts = {given: start.arguments[given]} if given in start.arguments else {}
        return dataclasses.replace(
            start, failure=told.kind, facts={**facts, **told.facts}, lines=(told.line,)
        )
    return start


def _with_detail(start: ServerStart, text: str) -> tuple[ServerStart, bool]:
    """The line that says what a validation found wrong, and whether it is still to come."""
    detail = _DETAIL.match(text)
    if detail is None:
        return start, _FIELD.fullmatch(text) is not None
    facts = {**start.facts, "detail": failures.shown(detail["detail"])}
    return dataclasses.replace(start, facts=facts), False
