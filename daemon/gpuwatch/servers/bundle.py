"""Writes a bundle: one file with all that can be told of a server at an instant; touches no server.

`write` packs parts, each a function that yields text. What is slow, large or fails costs the others nothing:

Rule 1: a part has its own thread and some seconds; what it gave until then is kept, and `errors.txt` says why
        the rest is missing. All together take no more than `WITHIN_S`.
Rule 2: all text passes `redact` before it is written, a chunk at a time; a chunk of figures alone, of which
        there are megabytes, can hold no secret and is passed over.
Rule 3: the file is for its owner alone, never larger than `MOST_BYTES`, and there whole or not at all.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from gpuwatch import clock
from gpuwatch.errors import GpuwatchError, ServerError
from gpuwatch.guest import client
from gpuwatch.guest.client import GuestError
from gpuwatch.servers.hiding import without_secrets

if TYPE_CHECKING:
    from gpuwatch.records import ServerStart
    from gpuwatch.servers.starts.log import StartLog


@dataclass(frozen=True, slots=True)
class Json:
    """A value that is redacted leaf by leaf, and so stays JSON."""

    value: Any
    indent: int | None = None

    def text(self, redact: Callable[[str], str]) -> str:
        """As it is written; with `indent` a line follows."""
        said = json.dumps(
            without_secrets(self.value, redact), indent=self.indent, ensure_ascii=False, default=str
        )
        return said if self.indent is None else said + "\n"


Part = Callable[[], Iterable[str | Json]]

MOST_BYTES: Final = 50 * 2**20
MOST_KEPT: Final = 20
WITHIN_S: Final = 17.0  # of 20, for the rest of what a process does
_PART_S: Final = 8.0
_MOST_PART_BYTES: Final = 64 * 2**20
_SPARE_BYTES: Final = 2**20  # what the compressor still holds, and `errors.txt`
_SUFFIX: Final = ".tar.gz"
_FIGURES: Final = re.compile(r"(?:null|[0-9.,eE+\-\[\]\s])*")

_LOG_LINES: Final = 2000
_OF_PROC: Final = (
    *("cmdline", "status", "stat", "wchan", "oom_score", "limits", "cgroup", "io", "smaps_rollup"),
)
_MOST_PROC_BYTES: Final = 64 * 1024
_MOST_SAID_BYTES: Final = 4 * 2**20
_GUESTS_S: Final = 4.0
_NVIDIA_SMI_S: Final = 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Where the bundle is, how large, and why parts of it are missing."""

    path: Path
    size_bytes: int
    errors: tuple[str, ...]


@dataclass(slots=True)
class _Gathering:
    """What one part has given so far; its thread alone writes."""

    text: list[bytes] = field(default_factory=list)
    size_bytes: int = 0
    error: str = ""
    is_given_up: bool = False


def write(path: Path, parts: Mapping[str, Part], redact: Callable[[str], str], now_ms: int) -> Written:
    """Pack `parts` by their names into `path`, and keep the newest 20 files beside it. ServerError."""
    draft = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        with os.fdopen(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            errors = _pack(file, path.name.removesuffix(_SUFFIX), parts, redact, now_ms)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        _forget(path)
        return Written(path=path, size_bytes=path.stat().st_size, errors=tuple(errors))
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        what = f"write the bundle {path}: {error.strerror}"
        raise ServerError(f"{what}; to cure it, make room there or correct its owner") from error


def _pack(
    file: IO[bytes], name: str, parts: Mapping[str, Part], redact: Callable[[str], str], now_ms: int
) -> list[str]:
    """Every part as a member of the folder `name`; what went wrong."""
    errors: list[str] = []
    end_s = clock.monotonic_s() + WITHIN_S

    def add(member: str, data: bytes) -> None:
        info = tarfile.TarInfo(f"{name}/{member}")
        info.size, info.mode, info.mtime = len(data), 0o600, now_ms // 1000
        packed.addfile(info, io.BytesIO(data))

    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=5) as packed:
        for member, part in parts.items():
            left_s = min(_PART_S, end_s - clock.monotonic_s())
            data, error = _gathered(part, redact, left_s)
            room = MOST_BYTES - _SPARE_BYTES - file.tell()
            if len(data) > room:
                error = f"{error}; " * bool(error) + f"cut to {max(0, room)} bytes: the bundle is full"
            if error:
                errors.append(redact(f"{member}: {error}"))
            if data:
                add(member, data[: max(0, room)])
        add("errors.txt", "".join(f"{error}\n" for error in errors).encode()[: _SPARE_BYTES // 2])
    return errors


def _gathered(part: Part, redact: Callable[[str], str], within_s: float) -> tuple[bytes, str]:
    """What the part gave in time, and what was wrong with it (rule 1)."""
    if within_s <= 0:
        return b"", "no time was left for it"
    found = _Gathering()
    thread = threading.Thread(target=_gather, args=(part, redact, found), daemon=True)
    thread.start()
    thread.join(within_s)
    found.is_given_up = True
    error = (
        f"not done within {within_s:.1f} s; what came until then is here"
        if thread.is_alive()
        else found.error
    )
    return b"".join(list(found.text)), error


def _gather(part: Part, redact: Callable[[str], str], found: _Gathering) -> None:
    try:
        for chunk in part():
            data = _redacted(chunk, redact).encode("utf-8", "replace")
            if found.is_given_up:
                return
            found.size_bytes += len(data)
            if found.size_bytes > _MOST_PART_BYTES:
                found.error = f"cut off after {_MOST_PART_BYTES // 2**20} MiB"
                return
            found.text.append(data)
    except (GpuwatchError, GuestError, OSError) as error:
        found.error = str(error)
    except Exception as error:  # noqa: BLE001 (a mistake in one part must not cost the others)
        found.error = f"{type(error).__name__}: {error}"


def _redacted(chunk: str | Json, redact: Callable[[str], str]) -> str:
    if isinstance(chunk, Json):
        return chunk.text(redact)
    return chunk if _FIGURES.fullmatch(chunk) else redact(chunk)


def _forget(path: Path) -> None:
    """Delete the oldest files, of captures that were cut off too."""
    files = [*path.parent.glob(f"*{_SUFFIX}"), *path.parent.glob(f".*{_SUFFIX}.new")]
    by_age = sorted((one for one in files if one != path), key=lambda one: one.stat().st_mtime)
    for old in by_age[: max(0, len(files) - MOST_KEPT)]:
        old.unlink(missing_ok=True)


# -- parts that need nothing but the host ----------------------------------------------------------------


def log_tail(log: Callable[[], StartLog], starts: Sequence[ServerStart]) -> Iterator[str | Json]:
    """The last 2,000 lines of a server's log, of its last two lives; `starts` the newest first."""
    lines: deque[str] = deque(maxlen=_LOG_LINES)
    ends_ms: list[int | None] = [None, *(start.began_at_ms for start in starts)]
    for start, until_ms in list(zip(starts[:2], ends_ms, strict=False))[::-1]:
        lines.append(f"-- life that began at {clock.utc_text(start.began_at_ms)}")
        lines.extend(log().lines(start.began_at_ms, until_ms))
    yield "".join(f"{line}\n" for line in lines)  # at once: a secret may stand on the line after its name


def processes(pids: Sequence[int], proc: Path = Path("/proc")) -> Iterator[str | Json]:
    """What the kernel says of each process; what is denied or gone says so in its place."""
    for pid in pids:
        for name in _OF_PROC:
            try:
                with (proc / str(pid) / name).open("rb") as file:
                    said = file.read(_MOST_PROC_BYTES).decode(errors="replace").rstrip("\0\n")
            except OSError as error:
                said = f"({error.strerror})"
            yield f"== {pid} {name}\n{said.replace(chr(0), ' ')}\n"


def guests(folder: Path, pids: Sequence[int], what: str) -> Iterator[str | Json]:
    """What the guest in each process answers to `stacks` or `snapshot`, as JSON."""
    listed = client.listed(folder)
    answers = client.ask_all({pid: listed[pid] for pid in pids if pid in listed}, what, within_s=_GUESTS_S)
    told = {p: {"error": str(a)} if isinstance(a, GuestError) else a for p, a in sorted(answers.items())}
    yield pretty(told)
    if not any(pid in listed for pid in pids):
        raise ServerError(f"ask the guests in {folder}: no process of the server has one; see docs/guest.md")


def nvidia_smi(program: str = "nvidia-smi") -> Iterator[str | Json]:
    """What `nvidia-smi -q` says; ServerError where there is none."""
    import subprocess  # noqa: PLC0415 (of the process that captures alone)

    found = shutil.which(program)
    if found is None:
        raise ServerError(f"run {program}: there is no such program")
    done = subprocess.run(  # noqa: S603 (an argument list, no shell)
        [found, "-q"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_NVIDIA_SMI_S, check=False
    )
    yield done.stdout[:_MOST_SAID_BYTES].decode(errors="replace")


def tree_of(pid: int | None, proc: Path = Path("/proc")) -> list[int]:
    """A process and all that descend from it; nothing if there is none."""
    parents = {int(entry.name): _parent(entry) for entry in proc.iterdir() if entry.name.isdecimal()}
    found = [pid] if pid is not None and pid in parents else []
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def pretty(plain: Any) -> Json:  # noqa: ANN401 (whatever is JSON)
    """JSON for people."""
    return Json(plain, indent=1)


def _parent(folder: Path) -> int:
    try:
        return int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0
