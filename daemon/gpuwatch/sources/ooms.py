"""Out-of-memory errors that guests left word of, in files; counts each once, then takes the file away.

Rule 1: a file is claimed when it is counted and deleted some time after that was told, when the store has it:
a gpuwatch that dies in between finds it again. One life of gpuwatch never counts a file twice.
Rule 2: a counter is 0 in the read that first gives it, so that `increase()` sees what made it appear.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

from gpuwatch.errors import SourceError
from gpuwatch.guest import client, wire
from gpuwatch.records import Metric, MetricKind
from gpuwatch.sources.guests import Bytes, Name, Uuid, Where

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

EVENTS: Final = "cuda_oom_events_total"
ASKED: Final = "cuda_oom_asked_bytes"
FREE: Final = "cuda_oom_free_bytes"
LIMIT: Final = "cuda_oom_limit_bytes"
TIME: Final = "cuda_oom_time_seconds"

METRICS: Final = tuple(
    Metric(
        name=name,
        kind=MetricKind.COUNTER if name == EVENTS else MetricKind.GAUGE,
        help=text,
        labels=("gpu", "uuid", "worker", "server"),
    )
    for name, text in (
        (EVENTS, "Out-of-memory errors that processes left word of, also in the moment before their end."),
        (ASKED, "Bytes that the last allocation to fail had asked for."),
        (FREE, "Bytes that the driver had free when the last allocation failed."),
        (LIMIT, "Bytes that the process might have had of the GPU when the last allocation failed."),
        (TIME, "Unix time at which the last allocation failed."),
    )
)

_MOST_TALLIES: Final = 256
_MOST_FILE_BYTES: Final = 4096
_KEPT_MS: Final = 5000  # how long a file stays once it was told: longer than the store takes to save


class _Oom(msgspec.Struct):
    protocol: int
    pid: int
    worker: Name
    uuid: Uuid
    count: Annotated[int, Meta(ge=1, le=1_000_000)]
    asked_bytes: Bytes
    free_bytes: Bytes
    limit_bytes: Bytes = 0
    at_ms: Annotated[int, Meta(ge=0, le=1 << 53)] = 0


@dataclass(slots=True)
class _Tally:
    """The errors of one worker on one GPU; `told` once its 0 has been given."""

    count: int = 0
    told: bool = False
    last: _Oom | None = None

    def figures(self) -> Iterator[tuple[str, float]]:
        yield EVENTS, float(self.count if self.told else 0)
        if self.last is not None:
            yield ASKED, float(self.last.asked_bytes)
            yield FREE, float(self.last.free_bytes)
        if (
            self.last is not None and self.last.limit_bytes and self.last.at_ms
        ):  # an older guest tells neither
            yield LIMIT, float(self.last.limit_bytes)
            yield TIME, self.last.at_ms / 1000


class Ooms:
    """The counters of `cuda_oom_*`, for as long as gpuwatch runs, and the files that they come from."""

    def __init__(self, folder: Path, server_of: Callable[[int], str]) -> None:
        """`server_of` names the server of a process, also of one that is gone; touches nothing."""
        self._folder = folder
        self._server_of = server_of
        self._tallies: dict[Where, _Tally] = {}
        self._claimed: dict[Path, int] = {}  # when each was counted
        self._has_begun = False

    def read(self, now_ms: int) -> None:
        """Count what is new; GuestError if the folder may not be read, SourceError if not be changed."""
        for path in [path for path, at_ms in self._claimed.items() if now_ms - at_ms >= _KEPT_MS]:
            self._delete(path)
        if not self._has_begun:
            self._has_begun = True
            for path in sorted(self._folder.glob(f"*{wire.OOM_SUFFIX}.*")):
                self._count(path, now_ms)
        for pid, path in client.listed(self._folder, wire.OOM_SUFFIX).items():
            claimed = path.with_name(f"{pid}{wire.OOM_SUFFIX}.{now_ms}")
            try:
                path.rename(claimed)
            except PermissionError as error:
                cure = f"to cure it, make this user the owner of {self._folder}"
                raise SourceError(f"take {path}: {error.strerror}; {cure}") from error
            except OSError:
                continue
            self._count(claimed, now_ms)

    def figures(self, living: Collection[Where]) -> Iterator[tuple[Where, str, float]]:
        """Of those who live, and of those who had an error; each call is one read that was given."""
        self._tallies = {where: t for where, t in self._tallies.items() if t.count or where in living}
        for where in sorted(set(living) - self._tallies.keys()):
            self._tally(where)
        for where, tally in self._tallies.items():
            for metric, value in tally.figures():
                yield where, metric, value
            tally.told = True

    def _count(self, path: Path, now_ms: int) -> None:
        try:
            event = msgspec.convert(wire.decode(_small_file(path)), _Oom)
        except (wire.WireError, OSError, msgspec.ValidationError):
            return self._delete(path)  # not what a guest leaves
        if (event.protocol, str(event.pid)) != (wire.PROTOCOL, path.name.partition(".")[0]):
            return self._delete(path)
        if not _may_be_of(event.pid, path):
            return self._delete(path)
        self._claimed[path] = now_ms
        tally = self._tally(Where(event.uuid, event.worker, self._server_of(event.pid)))
        tally.count += event.count
        tally.last = event
        return None

    def _delete(self, path: Path) -> None:
        self._claimed.pop(path, None)
        with suppress(OSError):
            path.unlink()

    def _tally(self, where: Where) -> _Tally:
        """Of names without end the oldest are forgotten."""
        if where not in self._tallies and len(self._tallies) >= _MOST_TALLIES:
            del self._tallies[next(iter(self._tallies))]
        return self._tallies.setdefault(where, _Tally())


def _may_be_of(pid: int, path: Path) -> bool:
    """Anybody may write to the folder: while a process lives, its user alone speaks for it."""
    try:
        owner = Path(f"/proc/{pid}").stat().st_uid  # root's too of one that may not be looked into
        return owner in {0, path.stat().st_uid}
    except OSError:
        return True


def _small_file(path: Path) -> bytes:
    opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise wire.WireError("no regular file")
        return os.read(opened, _MOST_FILE_BYTES + 1)
    finally:
        os.close(opened)
