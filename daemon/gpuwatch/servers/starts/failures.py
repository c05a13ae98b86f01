"""Why a start of vLLM failed, or a server died, from one line of its log; pure, and knows no order of lines.

To add a class, add a row to `_CAUSES`; VLLMStartFailed in `rules/server.yaml` says what to do about it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from gpuwatch.servers.starts.arguments import redacted

if TYPE_CHECKING:
    from collections.abc import Mapping

_LONGEST_CHARACTERS: Final = 500
_N: Final = r"\d+(?:\.\d+)?"
_SIZE: Final = rf"{_N} (?:[KMG]iB|bytes)"
_UNITS: Final = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

UNKNOWN: Final = "unknown"
PROCESS_DIED: Final = "process_died"


@dataclass(frozen=True, slots=True)
class Cause:
    """A class of failures: lines that hold `needle` and match the first pattern; the others give more facts.

    A group is a fact: `x_gib` gives `x_bytes` of a number of GiB, `x_size` of a number with its unit.
    `in_life`: it may also end a server that was healthy.
    """

    kind: str
    needle: str
    patterns: tuple[re.Pattern[str], ...]
    in_life: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """What a line says. Of two, the one of the higher `rank` counts: 2 a cause, 1 an error, 0 a death."""

    kind: str
    line: str
    rank: int
    facts: Mapping[str, str] = field(default_factory=dict)


def _cause(kind: str, needle: str, *patterns: str, in_life: bool = False) -> Cause:
    return Cause(kind, needle, tuple(re.compile(pattern) for pattern in patterns), in_life)


_CAUSES: Final = (
    _cause(
        "memory_share_not_free",
        "Free memory on device",
        rf"Free memory on device (?:(?P<device>\S+) )?\((?P<free_gib>{_N})/(?P<total_gib>{_N}) GiB\) on "
        rf"startup is less than [^(]*\((?P<share>{_N}), (?P<wanted_gib>{_N}) GiB\)",
    ),
    _cause(
        "memory_share_not_free",
        "Available memory on node",
        rf"\((?P<free_gib>{_N})/(?P<total_gib>{_N}) GiB\) on kv cache allocation is less than "
        rf"requested memory for kv \((?P<wanted_gib>{_N}) GiB\)",
    ),
    _cause(
        "kv_cache_too_small",
        "To serve at least one request",
        rf"max seq len \((?P<max_model_len>\d+)\), \(?(?P<needed_gib>{_N}) GiB KV cache is needed, "
        rf"which is larger than the available KV cache memory \((?P<available_gib>{_N}) GiB\)",
        r"estimated maximum model length is (?P<longest_model_len>\d+)",
    ),
    _cause("no_memory_for_cache", "for the cache blocks", "No available memory for the cache blocks"),
    _cause("auto_fit_failed", "auto-fit", "Cannot auto-fit max_model_len"),
    _cause(
        "runtime_oom",
        "out of memory",
        "(?:CUDA|HIP) (?:error: )?out of memory",
        rf"Tried to allocate (?P<tried_size>{_SIZE})",
        rf"GPU (?P<gpu>\d+) has a total capacity of (?P<total_size>{_SIZE}) of which (?P<free_size>{_SIZE})",
        rf"this process has (?P<process_size>{_SIZE}) memory in use",
        rf"allocated memory (?P<allocated_size>{_SIZE}) is allocated by PyTorch",
        rf"and (?P<unallocated_size>{_SIZE}) is reserved by PyTorch but unallocated",
        r"with (?P<dummy_requests>\d+) dummy requests",
        in_life=True,
    ),
    _cause(
        "profiling_assert",
        "Error in memory profiling",
        r"Error in memory profiling",
        rf"Initial free memory (?P<free_before_gib>{_N}) GiB, current free memory (?P<free_after_gib>{_N}) ",
    ),
    _cause("bad_argument", ": error: ", r"^[\w. -]{1,60}: error: (?P<detail>.+)"),
    _cause("bad_argument", "validation error", r"ValidationError: \d+ validation errors? for (?P<of>\w+)"),
    _cause(
        "bad_argument", "Unknown quantization", r"ValueError: (?P<detail>Unknown quantization method: \S+)"
    ),
    _cause("port_busy", "ddress already in use", r"\[[Ee]rrno 98\].* ?[Aa]ddress already in use"),
    _cause(
        "engine_start_timeout",
        "imed out waiting for engine",
        r"Timed out waiting for engines? (?:core processes to start|to send initial)",
        r"Waited (?P<waited_s>\d+)s",
    ),
    _cause("engine_start_timeout", "front-end process", "Did not receive response from front-end process"),
    _cause("model_not_found", "Repo id must be", r"Repo id must .*: '(?P<model>[^']*)'"),
    _cause("model_not_found", "outgoing traffic", "outgoing traffic has been disabled"),
    _cause("model_not_found", "model identifier", "is not a (?:local folder|valid model identifier)"),
    _cause("model_not_found", "connect to 'https://", "We couldn't connect to '.*' to load"),
    _cause(
        "model_not_found", "huggingface_hub.", r"(?:RepositoryNotFound|GatedRepo|LocalEntryNotFound)Error"
    ),
    _cause("model_not_found", "model weights", "Cannot find any model weights"),
    _cause("model_not_found", "Invalid repository ID", "Invalid repository ID or local directory"),
)
KINDS: Final = frozenset({UNKNOWN, PROCESS_DIED, *(cause.kind for cause in _CAUSES)})
# What only says that something else went wrong before, in another process as a rule.
_CONSEQUENCES: Final = re.compile(
    "Engine core initialization failed|WorkerProc initialization failed|EngineDeadError|CancelledError"
    "|EngineGenerateError|Worker failed with error|please check the stack trace|Executor failed"
    "|Frontend process failed|SystemExit|KeyboardInterrupt"
)
_DEATH: Final = re.compile(r"(?:died|exited) unexpectedly|(?:Engine core|WorkerProc) initialization failed")
_DEAD_PROCESS: Final = re.compile(r"proc(?:ess)? (?P<process>[A-Z]\S*) died unexpectedly")
_EXCEPTION: Final = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Exit)\b: \S|(?:\w+\.)*\w*Error$")
NEEDLES: Final = frozenset(
    {cause.needle for cause in _CAUSES} | {"Error", "Exception", "unexpectedly", "initialization failed"}
)
"""A line without any of these says nothing of a failure."""


def failure_in(text: str, *, in_life: bool = False, of_engine: bool = True) -> Failure | None:
    """What a line says of a failure, less its prefix.

    Args:
        text: the message.
        in_life: the server was healthy before, and a mistake in a request is no failure of it.
        of_engine: the line is of an engine or a worker.

    """
    for cause in _CAUSES:
        if cause.needle in text and (cause.in_life or not in_life) and cause.patterns[0].search(text):
            return Failure(cause.kind, shown(text), 2, _facts(cause, text))
    if _DEATH.search(text):
        named = _DEAD_PROCESS.search(text)
        return Failure(PROCESS_DIED, shown(text), 0, named.groupdict() if named else {})
    if (of_engine or not in_life) and _EXCEPTION.match(text) and not _CONSEQUENCES.search(text):
        return Failure(UNKNOWN, shown(text), 1)
    return None


def rank_of(kind: str) -> int:
    """The rank of a class: -1 for none."""
    return {"": -1, PROCESS_DIED: 0, UNKNOWN: 1}.get(kind, 2)


def shown(text: str) -> str:
    """A line as it may be kept: without secrets, and short."""
    return redacted(text.strip())[:_LONGEST_CHARACTERS]


def measured(groups: Mapping[str, str | None]) -> dict[str, str]:
    """Groups as facts, sizes in bytes; what did not match is left out."""
    return dict(_fact(name, value) for name, value in groups.items() if value is not None)


def _facts(cause: Cause, text: str) -> dict[str, str]:
    facts: dict[str, str] = {}
    for pattern in cause.patterns:
        match = pattern.search(text)
        facts |= measured(match.groupdict()) if match else {}
    return facts


def _fact(name: str, value: str) -> tuple[str, str]:
    if name.endswith("_gib"):
        return name.removesuffix("_gib") + "_bytes", str(round(float(value) * 2**30))
    if name.endswith("_size"):
        number, unit = value.split(" ")
        return name.removesuffix("_size") + "_bytes", str(round(float(number) * _UNITS[unit]))
    return name, re.sub(r"(?<=\d),(?=\d)", "", value) if value[:1].isdigit() else shown(value)
