"""Plays a recording as if it were the host, tick by tick as time goes on; never goes back and writes nothing.

The file is JSON lines, plain, .gz or .xz. A line of kind `static` holds what does not change, a line of
kind `tick` what was read in one second: NVML's answers by function name, the text of `/metrics`, the
status of `/health`, PyTorch's allocator figures, and figures of host and processes.
"""

from __future__ import annotations

import gzip
import json
import lzma
import threading
import zlib
from typing import IO, TYPE_CHECKING, Any, Final

from gpuwatch.errors import SourceError
from gpuwatch.sources.processes import is_vllm, recorded_processes
from gpuwatch.sources.recorded import recorded_sources

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gpuwatch.sources import Source

_BROKEN: Final = (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError)
# What a recorder asks less often than once a tick: a tick without the key repeats the last answer.
_CARRIED: Final = "vllm_"
_OLDEST_MS: Final = 10_000


class Recording:
    """A recording, open at its first tick. Holds one tick and the next; safe to seek from several threads."""

    def __init__(self, path: Path) -> None:
        """SourceError if the file cannot be read or does not begin as a recording does."""
        self.path = path
        self.fault = ""
        self._static: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._ticks = self._read_ticks()
        first = next(self._ticks, None)
        if first is None:
            cause = self.fault or "there is no tick in it"
            raise SourceError(f"open recording {path}: {cause}; is it a file that gpuwatch record wrote?")
        self.present = first
        self.events = _events(first)  # of every tick up to the present one, with their times
        self._next = next(self._ticks, None)
        self.start_ms = self.present_ms

    @property
    def static(self) -> dict[str, Any]:
        """The static line that holds at the present tick."""
        static: dict[str, Any] = self.present["static"]
        return static

    @property
    def present_ms(self) -> int:
        """When the present tick was recorded."""
        return _at_ms(self.present)

    @property
    def ended(self) -> bool:
        """Whether the present tick is the last one; `fault` then says if the file broke off there."""
        return self._next is None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the people who recorded say was done at the present tick."""
        return tuple(self.present.get("notes", ()))

    def seek(self, now_ms: int) -> None:
        """Go on to the last tick that is not after `now_ms`; an earlier time changes nothing."""
        with self._lock:
            while self._next is not None and _at_ms(self._next) <= now_ms:
                carried = {key: value for key, value in self.present.items() if key.startswith(_CARRIED)}
                self.present = carried | self._next
                self.events += _events(self._next)
                self._next = next(self._ticks, None)

    def has_server_process(self, now_ms: int) -> bool | None:
        """Whether a vLLM process is there at `now_ms`; None where the recording does not say."""
        self.seek(now_ms)
        if not self.covers(now_ms) or "processes" not in self.present:
            return None
        return any(map(is_vllm, recorded_processes(self.present["processes"]).values()))

    def covers(self, now_ms: int) -> bool:
        """Whether the present tick is young enough to speak for `now_ms`."""
        return now_ms - self.present_ms <= _OLDEST_MS

    def sources(self, *servers: str) -> list[Source]:
        """The sources of the recorded host, with its servers under these names; reading them seeks."""
        return recorded_sources(self, servers)

    def of_server(self, key: str, server: str) -> Any:  # noqa: ANN401  # text, a number or None
        """What was recorded of a server; a recording of a single one does not name it."""
        return self.present.get(f"{key}:{server}", self.present.get(key))

    def _read_ticks(self) -> Iterator[dict[str, Any]]:
        lines_read = 0
        try:
            with _open(self.path) as lines:
                for line in lines:
                    yield from self._take(json.loads(line))
                    lines_read += 1
        except _BROKEN as error:
            self.fault = f"broken off after line {lines_read}: {type(error).__name__}: {error}"

    def _take(self, line: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401  # whatever JSON holds
        """A tick, or nothing for another kind of line; ValueError if it is no line of a recording."""
        if not isinstance(line, dict) or not isinstance(line.get("devices"), list):
            raise ValueError("not a line of a recording")  # noqa: TRY004  # it is the file that is wrong
        if line.get("kind") == "static":
            self._static = line
        elif not self._static or not isinstance(line.get("t"), int | float):
            raise ValueError("a tick without its time, or before the static line")
        else:
            yield line | {"static": self._static}


def _open(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _events(tick: dict[str, Any]) -> list[tuple[int, Any]]:
    events = tick.get("events")
    return [(_at_ms(tick), event) for event in events] if isinstance(events, list) else []


def _at_ms(tick: dict[str, Any]) -> int:
    return round(float(tick["t"]) * 1000)
