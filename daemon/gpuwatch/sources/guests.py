"""Asks the guests in the watched processes, and believes what has the form of an answer; makes no samples.

Rule 1: a guest that does not answer in time is passed over, and left in peace for a while.
Rule 2: what a guest says is checked before it is believed: whose it is, names, numbers, sizes.
Rule 3: the snapshot of an allocator is asked for so rarely that its process spends next to nothing on it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from gpuwatch.guest import client
from gpuwatch.guest.client import GuestError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gpuwatch.sources.trees import Trees

_MOST_GUESTS: Final = 128
_MOST_KNOWN: Final = 4096
_MOST_ANSWER_BYTES: Final = 64 * 1024
_REST_MS: Final = 5000
_SNAPSHOT_MS: Final = 30_000
_SHARE: Final = 2000  # a snapshot of 50 ms is asked for each 100 s at most

Bytes = Annotated[int, Meta(ge=0, le=1 << 60)]
Count = Annotated[int, Meta(ge=0, le=1 << 40)]
Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_.:-]{1,48}\Z")]
Uuid = Annotated[str, Meta(pattern=r"\A((GPU|MIG)-[A-Za-z0-9/-]{1,64})?\Z")]
_Index = Annotated[int, Meta(ge=0, le=1023)]
_T = TypeVar("_T")


class Where(NamedTuple):
    """Whose allocator: processes of one name on one GPU are one. `server` is empty where nobody knows."""

    uuid: str
    worker: str
    server: str = ""


class SleepPool(msgspec.Struct):
    """What vLLM's sleep mode holds under one tag; `unknown` of a vLLM that notes neither."""

    tag: Name
    state: Literal["mapped", "asleep", "unknown"]
    bytes: Bytes


class Device(msgspec.Struct):
    """Torch's own figures (`torch.cuda.memory_stats`) of one GPU."""

    uuid: Uuid
    device: _Index
    stats: dict[str, Bytes]
    sleep_pools: Annotated[list[SleepPool], Meta(max_length=32)] = []


class Admission(msgspec.Struct):
    """Requests that an API process holds, may hold, and has refused."""

    in_flight: Count
    refused: Count
    limit: Count | None = None


class Engine(msgspec.Struct):
    """The scheduler of an engine; `limits` by name (`running`, `tokens`), those that are in force."""

    paused: bool | None = None
    limits: Annotated[dict[Name, Count], Meta(max_length=16)] = {}


class Figures(msgspec.Struct):
    """What one process answers each second."""

    pid: int
    worker: Name
    devices: Annotated[list[Device], Meta(max_length=32)]
    admission: Admission | None = None
    engine: Engine | None = None


class Summary(msgspec.Struct):
    """The pools of one GPU; an older guest does not tell all of it, and is not believed."""

    uuid: Uuid
    inactive_bytes: Bytes
    largest_free_block_bytes: Bytes
    releasable_bytes: Bytes
    private_reserved_bytes: Bytes
    private_inactive_bytes: Bytes


class Snapshot(msgspec.Struct):
    """What one process answers rarely."""

    pid: int
    devices: Annotated[list[Summary], Meta(max_length=32)]
    took_ms: Annotated[float, Meta(ge=0, le=60_000)] = 0.0


class Guests:
    """The guests of this host, whatever they are asked for."""

    def __init__(self, folder: Path, trees: Trees, *, within_s: float) -> None:
        """`folder` need not exist; `within_s` bounds each asking, whatever the guests do."""
        self._folder = folder
        self._trees = trees
        self._within_s = within_s
        self._rest_until_ms: dict[int, int] = {}
        self._servers: dict[int, str] = {}
        self._snapshots: dict[int, Snapshot] = {}
        self._snapshot_at_ms: dict[int, int] = {}

    def figures(self, now_ms: int) -> list[Figures]:
        """What those say that answer; GuestError if the folder may not be read."""
        sockets = client.listed(self._folder)
        self._rest_until_ms = {pid: at for pid, at in self._rest_until_ms.items() if at > now_ms}
        # Who is late is not gone: forgotten, it would be asked for a snapshot at once.
        self._snapshots = {pid: it for pid, it in self._snapshots.items() if pid in sockets}
        self._snapshot_at_ms = {pid: at for pid, at in self._snapshot_at_ms.items() if pid in sockets}
        awake = [pid for pid in sorted(sockets) if pid not in self._rest_until_ms][:_MOST_GUESTS]
        found = []
        for pid, answer in self._ask({pid: sockets[pid] for pid in awake}, "figures").items():
            try:
                found.append(_believed(answer, Figures))
            except GuestError as error:
                self._pass_over(pid, sockets[pid], error, now_ms)
        for pid in awake:
            self._learn(pid)
        self._ask_snapshots({f.pid: sockets[f.pid] for f in found if f.devices}, now_ms)
        return found

    def summaries(self, pid: int) -> dict[str, Summary]:
        """What the pools of a process looked like when it was last asked, by the GPU's UUID."""
        snapshot = self._snapshots.get(pid)
        return {} if snapshot is None else {device.uuid: device for device in snapshot.devices}

    def server_of(self, pid: int) -> str:
        """The server of a process, also of one that is gone; empty if nobody knew."""
        return self._trees.server_of(pid) or self._servers.get(pid, "")

    def _ask(self, sockets: Mapping[int, Path], what: str) -> dict[int, dict[str, Any] | GuestError]:
        return client.ask_all(dict(sockets), what, within_s=self._within_s, most_bytes=_MOST_ANSWER_BYTES)

    def _ask_snapshots(self, sockets: Mapping[int, Path], now_ms: int) -> None:
        """Of those that use a GPU, as far as it is time; one that fails is asked again in its turn."""
        due = {pid: path for pid, path in sockets.items() if self._snapshot_at_ms.get(pid, now_ms) <= now_ms}
        for pid, answer in (self._ask(due, "snapshot") if due else {}).items():
            # Who gave none in time may have spent all of it, and more, with the allocator's lock in hand.
            self._snapshot_at_ms[pid] = now_ms + max(_SNAPSHOT_MS, int(_SHARE * 1000 * self._within_s))
            with suppress(GuestError):
                self._snapshots[pid] = snapshot = _believed(answer, Snapshot)
                self._snapshot_at_ms[pid] = now_ms + max(_SNAPSHOT_MS, int(_SHARE * snapshot.took_ms))

    def _pass_over(self, pid: int, path: Path, error: GuestError, now_ms: int) -> None:
        """A socket that nobody listens at is what a killed process left."""
        if error.is_gone:
            with suppress(OSError):
                path.unlink()
        else:
            self._rest_until_ms[pid] = now_ms + _REST_MS

    def _learn(self, pid: int) -> None:
        """While it lives: an error that ends it is counted when it is gone."""
        server = self._trees.server_of(pid)
        if server and self._servers.get(pid) != server:
            if len(self._servers) >= _MOST_KNOWN:
                del self._servers[next(iter(self._servers))]
            self._servers[pid] = server


def _believed(answer: dict[str, Any] | GuestError, form: type[_T]) -> _T:
    if isinstance(answer, GuestError):
        raise answer
    try:
        return msgspec.convert(answer, form)
    except msgspec.ValidationError as error:
        raise GuestError(f"guest {answer['pid']}: {client.printable(error)}") from None
