"""Writes what NVML, a vLLM server and the host answer into a file that `recording` plays; keeps no secrets.

Rule 1: answers are written as they came, errors too; conversion is left to whoever plays the file.
Rule 2: of a command line only the words that show vLLM are kept: the rest may hold keys.
Rule 3: lines go to the disk ten ticks at a time, each time as a whole compressed stream: a kill loses
at most the last ten ticks, and what is written stays readable.
"""

from __future__ import annotations

import gzip
import json
import lzma
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, cast

import psutil

from gpuwatch.errors import SourceError
from gpuwatch.sources.events import EventSource
from gpuwatch.sources.gpus import UNKNOWN, Nvml, code_of
from gpuwatch.sources.host import HostFigures
from gpuwatch.sources.nvml import NvmlSource, NvmlStaticSource
from gpuwatch.sources.processes import ProcessIdentity, ProcessNames, PsutilNames, is_vllm, vllm_command
from gpuwatch.sources.readings import FIELD_NAMES, FIELD_VALUES, field_value
from gpuwatch.sources.recorded import VERSIONS, answer_key
from gpuwatch.sources.vllm import fetch_metrics, local_session, probe_health

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_TICKS_PER_WRITE: Final = 10
_METRICS_EVERY_TICKS: Final = 2
_STATIC_EVERY_MS: Final = 60_000
_HEALTH_TIMEOUT_S: Final = 3.0


class _Handle(NamedTuple):
    gpu: int
    inner: object


@dataclass(slots=True)
class _EventSet:
    inner: object
    gpu: int = -1


class NotingNvml:
    """NVML's module, with a note of every answer a device gave, under the key that a recording uses."""

    def __init__(self, nvml: Nvml) -> None:
        """Notes nothing until asked."""
        self.NVMLError = nvml.NVMLError
        self.NVMLLibraryMismatchError = nvml.NVMLLibraryMismatchError
        self._nvml = nvml
        self._errors = (nvml.NVMLError, nvml.NVMLLibraryMismatchError)
        self._notes: dict[int, dict[str, Any]] = {}
        self._count = 0
        self._events: list[dict[str, int]] | None = None
        self.versions: dict[str, Any] = {}
        self.failure_code = UNKNOWN

    def taken(self) -> list[dict[str, Any]]:
        """The answers since the last call, by device; none for a device that was not asked or is lost."""
        notes, self._notes = self._notes, {}
        return [notes.get(i, {}) for i in range(max([self._count, *(i + 1 for i in notes)]))]

    def taken_events(self) -> list[dict[str, int]] | None:
        """What event sets were told since the last call; None while none is registered."""
        events = self._events
        if events is not None:
            self._events = []
        return events

    def nvmlInit(self) -> None:  # noqa: N802  # NVML's name
        """As the real one."""
        self._whole(self._nvml.nvmlInit)

    def nvmlShutdown(self) -> None:  # noqa: N802  # NVML's name
        """As the real one."""
        self._nvml.nvmlShutdown()

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802  # NVML's name
        """As the real one."""
        self._count = self._whole(self._nvml.nvmlDeviceGetCount)
        return self._count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> _Handle:  # noqa: N802  # NVML's name
        """A handle that knows its index."""
        return _Handle(index, self._nvml.nvmlDeviceGetHandleByIndex(index))

    def nvmlEventSetCreate(self) -> _EventSet:  # noqa: N802  # NVML's name
        """A set that will know its GPU."""
        return _EventSet(self._nvml.nvmlEventSetCreate())

    def nvmlDeviceRegisterEvents(self, handle: _Handle, types: int, events: _EventSet) -> None:  # noqa: N802
        """As the real one, of one GPU a set."""
        self._nvml.nvmlDeviceRegisterEvents(handle.inner, types, events.inner)
        events.gpu, self._events = handle.gpu, self._events or []

    def nvmlEventSetWait_v2(self, events: _EventSet, timeout_ms: int) -> Any:  # noqa: ANN401, N802
        """The event, noted with the index of its GPU."""
        event = self._nvml.nvmlEventSetWait_v2(events.inner, timeout_ms)
        note = {"gpu": events.gpu, "eventType": int(event.eventType), "eventData": int(event.eventData)}
        self._events = [*(self._events or ()), note]
        return event

    def nvmlEventSetFree(self, events: _EventSet) -> None:  # noqa: N802  # NVML's name
        """As the real one."""
        self._nvml.nvmlEventSetFree(events.inner)

    def __getattr__(self, function: str) -> Callable[..., Any]:
        """Every other function, asked and noted; AttributeError where the binding lacks it."""
        inner = getattr(self._nvml, function)
        if not function.startswith("nvml"):
            raise AttributeError(function)
        if key := VERSIONS.get(function):
            return lambda: self.versions.setdefault(key, inner())
        return lambda handle, *arguments: self._noted(function, inner, handle, arguments)

    def _noted(
        self, function: str, inner: Callable[..., Any], handle: _Handle, arguments: tuple[Any, ...]
    ) -> Any:  # noqa: ANN401  # NVML's structs
        notes = self._notes.setdefault(handle.gpu, {})
        try:
            answer = inner(handle.inner, *arguments)
        except self._errors as error:
            self.failure_code = code_of(error)
            refusal = {"error": type(error).__name__, "code": self.failure_code}
            notes[answer_key(function, arguments)] = refusal
            raise
        if function == FIELD_VALUES:
            notes["fields"] = {FIELD_NAMES[i]: _field(f) for i, f in zip(arguments[0], answer, strict=True)}
        else:
            notes[answer_key(function, arguments)] = _plain(answer)
        return answer

    def _whole(self, call: Callable[[], Any]) -> Any:  # noqa: ANN401  # as the call
        try:
            return call()
        except self._errors as error:
            self.failure_code = code_of(error)
            raise


class NotingNames:
    """The processes that were looked up, in the shape of a recording."""

    def __init__(self, names: ProcessNames) -> None:
        """`names` looks up."""
        self._names = names
        self._notes: dict[int, dict[str, Any]] = {}

    def look_up(self, pid: int) -> ProcessIdentity | None:
        """As the inner one; of the command line only what shows vLLM is noted."""
        if seen := self._names.look_up(pid):
            command = vllm_command(seen.command_line) or seen.name
            self._notes[pid] = {"pid": pid, "ppid": seen.parent_pid, "name": seen.name, "cmdline": command}
        return seen

    def look_up_vllm(self, pid: int) -> None:
        """Note a process if it is vLLM's."""
        seen = self._names.look_up(pid)
        if seen and is_vllm(seen):
            self.look_up(pid)

    def taken(self) -> list[dict[str, Any]]:
        """The processes since the last call."""
        notes, self._notes = self._notes, {}
        return list(notes.values())


class Recorder:
    """Writes a tick whenever told, once a second if the recording is to play well."""

    def __init__(
        self,
        path: Path,
        nvml: Nvml,
        servers: Mapping[str, str],
        *,
        state_dir: Path,
        names: ProcessNames | None = None,
    ) -> None:
        """`servers`: name to URL. `path` ends in .xz, .gz or anything else; SourceError if it exists."""
        self._file = _File(path)
        self._servers = servers
        self._session = local_session()
        self._names = NotingNames(names or PsutilNames())
        self._noting = NotingNvml(nvml)
        self._noting_static = NotingNvml(nvml)
        self._noting_events = NotingNvml(nvml)
        # The protocol's members beyond the declared ones are answered by __getattr__, which mypy cannot see.
        self._nvml = NvmlSource(cast("Nvml", self._noting), names=self._names)
        self._nvml_static = NvmlStaticSource(cast("Nvml", self._noting_static))
        self._events = EventSource(cast("Nvml", self._noting_events))
        self._host = HostFigures(state_dir)
        self._state_dir = state_dir
        self._static: list[dict[str, Any]] = []
        self._static_at_ms: int | None = None
        self._ticks = 0

    def tick(self, now_ms: int) -> None:
        """Ask everything once and write it; takes up to 3 s more a server that gives no answer."""
        tick: dict[str, Any] = {"kind": "tick", "t": now_ms / 1000, "nvml_error": self._read_nvml(now_ms)}
        tick["devices"] = self._noting.taken()
        tick["events"] = self._read_events(now_ms)
        tick["processes"] = self._read_processes()
        tick["host"] = self._read_host()
        for server, url in self._servers.items():
            tick |= {self._key(key, server): value for key, value in self._ask(server, url).items()}
        self._write_static(len(tick["devices"]), now_ms)
        self._ticks += 1
        self._file.write(tick)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is still held back."""
        self._file.flush()
        self._session.close()

    def _read_nvml(self, now_ms: int) -> dict[str, int] | None:
        try:
            self._nvml.read(now_ms)
        except SourceError:
            return {"code": self._noting.failure_code}
        return None

    def _read_events(self, now_ms: int) -> list[dict[str, int]] | None:
        with suppress(SourceError):  # the tick says why
            self._events.read(now_ms)
        return self._noting_events.taken_events()

    def _read_processes(self) -> list[dict[str, Any]]:
        """Those on a GPU with their ancestors, and every vLLM process, which has no GPU while it starts."""
        for pid in psutil.pids():
            self._names.look_up_vllm(pid)
        return self._names.taken()

    def _read_host(self) -> dict[str, Any]:
        try:
            return {**self._host.read(), "disk_path": str(self._state_dir)}
        except SourceError:
            return {}

    def _write_static(self, devices: int, now_ms: int) -> None:
        """Write the static line at first, and anew each minute in case a driver or a GPU came."""
        due = self._static_at_ms is None or now_ms - self._static_at_ms >= _STATIC_EVERY_MS
        if not due and devices == len(self._static):
            return
        self._static_at_ms = now_ms
        with suppress(SourceError):  # noted as no devices; the tick says why
            self._nvml_static.read(now_ms)
        read, old = self._noting_static.taken(), self._static
        events = self._noting_events.taken()  # which of them a GPU tells of
        self._static = [
            (old[i] if i < len(old) else {}) | answers | (events[i] if i < len(events) else {})
            for i, answers in enumerate(read)
        ]
        line = {"kind": "static", "t": now_ms / 1000, "devices": self._static}
        self._file.write(line | self._noting_static.versions)

    def _ask(self, server: str, url: str) -> dict[str, Any]:
        """Null where there was no answer; no key where none was asked for."""
        answers: dict[str, Any] = {}
        if self._ticks % _METRICS_EVERY_TICKS == 0:
            try:
                answers["vllm_metrics"] = fetch_metrics(server, url, self._session)
            except SourceError as error:
                answers |= {"vllm_metrics": None, "vllm_metrics_error": str(error)}
        try:
            health = probe_health(server, url, self._session, _HEALTH_TIMEOUT_S)
            answers |= {"vllm_health": health.status, "vllm_health_error": health.error}
        except SourceError as error:
            answers |= {"vllm_health": None, "vllm_health_error": str(error)}
        return answers

    def _key(self, key: str, server: str) -> str:
        return key if len(self._servers) == 1 else f"{key}:{server}"


class _File:
    """Appends lines, some at a time; each time a whole stream, so that a kill leaves none half compressed."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            raise SourceError(f"record to {path}: the file exists; name another one")
        self._path = path
        self._lines: list[bytes] = []

    def write(self, line: Mapping[str, Any]) -> None:
        self._lines.append(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        if len(self._lines) >= _TICKS_PER_WRITE:
            self.flush()

    def flush(self) -> None:
        data, self._lines = b"".join(self._lines), []
        try:
            with self._path.open("ab") as file:
                file.write(_compressed(data, self._path.suffix))
        except OSError as error:
            raise SourceError(f"record to {self._path}: {error.strerror}; is the disk full?") from error


def _compressed(data: bytes, suffix: str) -> bytes:
    if suffix == ".xz":
        return lzma.compress(data, preset=1)
    return gzip.compress(data) if suffix == ".gz" else data


def _field(field: Any) -> Any:  # noqa: ANN401  # nvmlFieldValue_t in, JSON out
    return {"code": field.nvmlReturn} if field.nvmlReturn else field_value(field)


def _plain(answer: Any) -> Any:  # noqa: ANN401  # NVML's structs in, JSON out
    """Numbers and text as they are, structs as mappings of their fields."""
    if answer is None or isinstance(answer, int | float | str):
        return answer
    if isinstance(answer, list | tuple):
        return [_plain(item) for item in answer]
    names = [field[0] for field in getattr(answer, "_fields_", ())] or list(vars(answer))
    return {name: _plain(getattr(answer, name)) for name in names if not name.startswith("_")}
