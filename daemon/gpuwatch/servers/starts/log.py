"""Where a server's log lines come from: a plain process's file, the journal, Docker's engine; judges no line.

Each look reads what is new of one life, 4 MiB of it at most, and the newest of it if there is more. Some
lines may come twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any, Final, Protocol

from gpuwatch.errors import ServerError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from gpuwatch.servers.docker import Engine, Target

MOST_BYTES: Final = 4 * 2**20
_LONGEST_LINE_BYTES: Final = 64 * 1024
_MARK: Final = re.compile(rb"gpuwatch: life of .{1,200} begins, (\d{1,15})$")
_MOST_LINES: Final = 20_000
_FRACTION: Final = re.compile(r"\.(\d{1,9})")


class StartLog(Protocol):
    """The log of one server."""

    def lines(self, began_at_ms: int, until_ms: int | None) -> Iterator[str]:
        """What the life that began then wrote since the last call for it; all of it the first time.

        `until_ms`: when the life after it began; None while it is the newest. ServerError, also after some
        lines: the next call gives them all.
        """
        ...


def mark(server: str, began_at_ms: int) -> str:
    """The line that stands before each life in the file of a plain process."""
    return f"gpuwatch: life of {server} begins, {began_at_ms}\n"


class FileLog:
    """A file that several lives append to, each after its `mark`; it may be truncated at any time."""

    def __init__(self, path: Path) -> None:
        """Nothing is opened before it is read."""
        self._path = path
        self._began_at_ms: int | None = None
        self._inode = 0
        self._offset_bytes = 0

    def lines(self, began_at_ms: int, until_ms: int | None) -> Iterator[str]:  # noqa: ARG002 - marks say it
        """As the Protocol says; where no mark stands, the whole file is of this life."""
        if began_at_ms != self._began_at_ms:
            self._began_at_ms, self._inode = began_at_ms, 0
        try:
            with self._path.open("rb") as file:
                self._go_on_in(file, began_at_ms)
                yield from self._read(file, began_at_ms)
        except OSError as error:
            raise ServerError(
                f"read the log {self._path}: {error.strerror}; to cure it, let gpuwatch's user read that file"
            ) from error

    def _go_on_in(self, file: IO[bytes], began_at_ms: int) -> None:
        """Stand where the last look ended, or where the life begins if the file is another one."""
        seen = os.fstat(file.fileno())
        is_same = seen.st_ino == self._inode and seen.st_size >= self._offset_bytes
        first = max(self._offset_bytes if is_same else 0, seen.st_size - MOST_BYTES)
        file.seek(first)
        self._inode = seen.st_ino
        self._offset_bytes = first if is_same else _begin_of_life(file, began_at_ms)
        file.seek(self._offset_bytes)

    def _read(self, file: IO[bytes], began_at_ms: int) -> Iterator[str]:
        end = self._offset_bytes
        for line, end_of_line in _whole_lines(file):
            if _began_of(line, 0) > began_at_ms:
                break
            yield line.decode(errors="replace")
            end = end_of_line
        self._offset_bytes = end


def _whole_lines(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Each line without its end, and where the next begins; one that is still being written comes later."""
    while line := file.readline(_LONGEST_LINE_BYTES):
        if not line.endswith(b"\n") and len(line) < _LONGEST_LINE_BYTES:
            return
        yield line.rstrip(b"\r\n"), file.tell()


def _begin_of_life(file: IO[bytes], began_at_ms: int) -> int:
    """Where the last mark ends that is not of a later life; here if there is none."""
    begin = file.tell()
    for line, end in _whole_lines(file):
        if _began_of(line, began_at_ms + 1) <= began_at_ms:
            begin = end
    return begin


def _began_of(line: bytes, otherwise_ms: int) -> int:
    """The instant in a mark."""
    found = _MARK.search(line)  # a process that was killed may leave half a line before it
    return int(found[1]) if found else otherwise_ms


class JournalLog:
    """What systemd's journal has of a unit, by `journalctl`, which runs only while it is asked."""

    def __init__(self, unit: str, program: str = "journalctl", within_s: float = 10.0) -> None:
        """`program`: a name to be found in PATH, or a path; it must have answered within `within_s`."""
        self._unit = unit
        self._program = program
        self._within_s = within_s
        self._began_at_ms: int | None = None
        self._since_us = 0

    def lines(self, began_at_ms: int, until_ms: int | None) -> Iterator[str]:
        """As the Protocol says; at most 20 000 entries."""
        if began_at_ms != self._began_at_ms:
            self._began_at_ms, self._since_us = began_at_ms, began_at_ms * 1000
        said = self._said(self._command(until_ms))
        words, newest_us = [], self._since_us
        while said:
            raw = said.pop()  # the newest came first
            entry = _entry(raw)
            if entry is None:
                words.append(raw.decode(errors="replace"))
                continue
            newest_us = int(entry.get("__REALTIME_TIMESTAMP", newest_us))
            yield from _message(entry).splitlines()
        if newest_us == self._since_us:
            self._complain(words)
        self._since_us = newest_us

    def _command(self, until_ms: int | None) -> list[str]:
        command = [self._program, "--unit", self._unit, "--output=json", "--output-fields=MESSAGE", "--all"]
        command += ["--no-pager", "--reverse", f"--lines={_MOST_LINES}", "--since", _at(self._since_us)]
        return command if until_ms is None else [*command, "--until", _at(until_ms * 1000)]

    def _said(self, command: list[str]) -> list[bytes]:
        """The lines of its answer, cut at 4 MiB; ServerError if it cannot be asked, or takes too long."""
        import subprocess  # noqa: PLC0415 (only where a start is under way)

        environment = {"LC_ALL": "C.UTF-8", "PATH": os.environ.get("PATH", os.defpath)}
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(  # noqa: S603 - an argument list, no shell
                command, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise self._trouble(f"{self._program}: {error.strerror}") from error
        with process, _ended_within(process, self._within_s) as late:
            said = process.stdout.read(MOST_BYTES) if process.stdout else b""
            process.kill()
        if late:
            raise self._trouble(f"{self._program} gave no whole answer within {self._within_s:g} s")
        return said[: said.rfind(b"\n") + 1].splitlines()

    def _complain(self, words: list[str]) -> None:
        """Raise if journalctl says that it may not read, or cannot."""
        told = [word for word in reversed(words) if word.strip() and not word.startswith("-- ")]
        if told:
            raise self._trouble(told[0])

    def _trouble(self, why: str) -> ServerError:
        return ServerError(
            f"read the journal of {self._unit}: {why}; to cure it, add gpuwatch's user to the group"
            " systemd-journal (docs/operations.md)"
        )


class DockerLog:
    """What Docker's engine keeps of a container's output; needs a logging driver that can be read."""

    def __init__(self, target: Target, engine: Engine) -> None:
        """Nothing is asked before it is read."""
        self._target = target
        self._engine = engine
        self._began_at_ms: int | None = None
        self._since = ""

    def lines(self, began_at_ms: int, until_ms: int | None) -> Iterator[str]:
        """As the Protocol says; at most 20 000 lines."""
        if began_at_ms != self._began_at_ms:
            self._began_at_ms, self._since = began_at_ms, f"{began_at_ms / 1000:.3f}000000"
        container = self._engine.find(self._target)
        options = {"stdout": 1, "stderr": 1, "timestamps": 1, "tail": _MOST_LINES, "since": self._since}
        if until_ms is not None:
            options["until"] = f"{until_ms / 1000:.3f}000000"
        said = self._engine.get(
            f"/containers/{container.id}/logs", f"read the log of {self._target}", options
        )
        for line in (said if container.has_terminal else _unframed(said)).splitlines():
            at, _, text = line.decode(errors="replace").partition(" ")
            yield text
            self._since = _seconds(at) or self._since


def _unframed(said: bytes) -> bytes:
    """Without the 8 bytes before each piece, the last four being its length; half a piece is dropped."""
    pieces, begin = [], 8
    while begin <= len(said):
        end = begin + int.from_bytes(said[begin - 4 : begin])
        pieces.append(said[begin:end] if end <= len(said) else b"")
        begin = end + 8
    return b"".join(pieces)


def _seconds(at: str) -> str:
    """The engine's RFC 3339 with nanoseconds as its options have it; empty for what is none."""
    try:
        whole_s = int(datetime.fromisoformat(at).timestamp())
    except ValueError:
        return ""
    nanoseconds = _FRACTION.search(at)
    return f"{whole_s}.{nanoseconds[1] if nanoseconds else '':0<9}"


def _at(at_us: int) -> str:
    return f"@{at_us // 1_000_000}.{at_us % 1_000_000:06}"


def _entry(raw: bytes) -> dict[str, Any] | None:
    """One entry of the journal; None for words of journalctl itself."""
    try:
        entry = json.loads(raw)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _message(entry: dict[str, Any]) -> str:
    """Its text; the journal gives what is not plain text, as with colours in it, as a list of bytes."""
    message = entry.get("MESSAGE")
    if isinstance(message, list):
        return bytes(byte & 255 for byte in message if isinstance(byte, int)).decode(errors="replace")
    return message if isinstance(message, str) else ""


@contextlib.contextmanager
def _ended_within(process: subprocess.Popen[bytes], within_s: float) -> Iterator[list[bool]]:
    """End a process after this time; the list is not empty then."""
    late: list[bool] = []

    def end() -> None:
        late.append(True)
        process.kill()

    timer = threading.Timer(within_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
