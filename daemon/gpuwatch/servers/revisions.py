"""A server's settings files: written once, numbered, chosen by a link that vLLM follows; starts nothing.

`rev-0007.yaml` never changes once it is there. `current.yaml` is a link to one of them, replaced by rename,
so whoever is killed at any line leaves either the one before or the one after.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gpuwatch import guest
from gpuwatch.errors import ConfigError, ServerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpuwatch.records import Revision

_CURRENT: Final = "current.yaml"
_FILE: Final = re.compile(r"rev-([0-9]{4,})\.yaml")
_FOLDER_MODE: Final = 0o755  # vLLM runs as another user
_FILE_MODE: Final = 0o444
_CURES: Final = {
    errno.EACCES: "let the user that gpuwatch runs as write there",
    errno.EPERM: "let the user that gpuwatch runs as write there",
    errno.EROFS: "add the folder to ReadWritePaths= of gpuwatch's unit",
    errno.ENOTDIR: "name a folder in servers[].revisions",
    errno.EEXIST: "name a folder in servers[].revisions",
    errno.ENOSPC: "make room on its filesystem",
    errno.EDQUOT: "make room on its filesystem",
}
_PASSING: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EINTR})
_INTERPRETER: Final = re.compile(r"python[0-9.]*")


class Revisions:
    """The folder of one server's settings files. Every method may raise ServerError."""

    def __init__(self, server: str, folder: Path) -> None:
        """Touches nothing yet; `folder` is made when the first revision is written."""
        self._server = server
        self._folder = folder

    def path(self, number: int) -> Path:
        """Where a revision stands, or would."""
        return self._folder / f"rev-{number:04d}.yaml"

    def write(self, revision: Revision) -> Path:
        """The file of a revision, which may be there already; ServerError if that one says other things."""
        path, text = self.path(revision.number), self._text(revision)
        with self._doing(f"write {path.name}"):
            _make_folder(self._folder)
            if not path.exists():
                _publish(path, text)
            elif path.read_bytes() != text:
                what = f"write {path}: it is there and says other things; a revision never changes"
                raise ServerError(f"{what}; move it away, or give the new one another number", permanent=True)
            _sync(self._folder)
        return path

    def current(self) -> int | None:
        """The revision that the next start reads; None if there is none, or it is not one of ours."""
        with self._doing(f"read the link {_CURRENT}"):
            try:
                found = _FILE.fullmatch(str(self._link.readlink()))
            except OSError as error:
                if error.errno not in {errno.ENOENT, errno.EINVAL}:  # EINVAL: a file, no link
                    raise
                return None
            return int(found[1]) if found and self._link.exists() else None

    def swap(self, number: int) -> None:
        """Have the next start read this revision; once it does, nothing more changes."""
        path = self.path(number)
        with self._doing(f"choose {path.name}"):
            if not path.is_file():
                raise ServerError(f"choose {path}: there is no such file", permanent=True)
            if self._link.exists() and not self._link.is_symlink():
                cure = f"take it over with `gpuwatch config set {self._server} --file`, then move it away"
                what = f"choose {path}: {_CURRENT} is a file of its own and would be lost"
                raise ServerError(f"{what}; {cure}", permanent=True)
            made = self._folder / f".{_CURRENT}.new"
            made.unlink(missing_ok=True)  # of one who was killed here
            made.symlink_to(path.name)  # relative: the folder may be seen under another name in a container
            made.replace(self._link)
            _sync(self._folder)

    @property
    def _link(self) -> Path:
        return self._folder / _CURRENT

    def _text(self, revision: Revision) -> bytes:
        from gpuwatch.servers import vllm_yaml  # noqa: PLC0415 (only who keeps settings has it)

        head = (
            f"# Revision {revision.number} of {revision.server}, written by gpuwatch and never changed.\n"
            f"# Change it with `gpuwatch config set {revision.server} KEY=VALUE`.\n"
        )
        try:
            return (head + vllm_yaml.dumped(revision.arguments)).encode()
        except ConfigError as error:
            what = f"write revision {revision.number} of {revision.server}"
            raise ServerError(f"{what}: {'; '.join(error.mistakes)}", permanent=True) from error

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            number = error.errno or 0
            cure = _CURES.get(number, "see whether the folder can be read and written")
            told = f"{what} of {self._server} in {self._folder}: {error.strerror}; to cure it, {cure}"
            raise ServerError(told, permanent=number not in _PASSING) from error


def interpreter_of(words: Sequence[str]) -> Path | None:
    """The interpreter that has vLLM, by the command line of its main process; None if that does not tell.

    `/v/bin/python3 /v/bin/vllm serve` says it, `python3 -m vllm…` does not. The link /proc/PID/exe would: it
    names the interpreter that a virtual environment was made from, which has no vLLM.
    """
    for word in words[:2]:
        path = Path(word)
        if path.is_absolute() and _INTERPRETER.fullmatch(path.name):
            return path
        if path.is_absolute() and path.name == "vllm":
            return path.with_name("python")
    return None


def check_command(python: Path, file: Path) -> list[str]:
    """What checks a settings file without starting a server: program and arguments; see `guest.offline`."""
    return [str(python), str(Path(guest.__file__).resolve().with_name("offline.py")), "--config", str(file)]


def _make_folder(folder: Path) -> None:
    """Make it and what is missing above it, so that vLLM's user can read it whatever our umask is."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        folder.chmod(_FOLDER_MODE)


def _publish(path: Path, text: bytes) -> None:
    """The whole file or none, also after a loss of power."""
    made = path.with_name(f".{path.name}.new")
    made.unlink(missing_ok=True)  # of one who was killed here; not even its owner may write to it
    file = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
    with os.fdopen(file, "wb") as opened:
        os.fchmod(file, _FILE_MODE)
        opened.write(text)
        opened.flush()
        os.fsync(file)
    made.rename(path)


def _sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
