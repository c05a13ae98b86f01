"""Room on the disk that is held to be given up; never holds it where others need it.

A database with a WAL cannot free its own pages on a full disk. A file that is deleted then lets it.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_NO_FALLOCATE: Final = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})
_CHUNK: Final = bytes(2**16)


class Ballast:
    """The file `ballast` of a state folder."""

    def __init__(self, folder: Path, size_bytes: int = 8 * 2**20) -> None:
        """Nothing is made yet."""
        self._path = folder / "ballast"
        self._size_bytes = size_bytes

    def hold(self, free_at_least_bytes: int) -> bool:
        """Whether it is there; it is made if the filesystem has that much free beside it."""
        try:
            if self._path.exists() and self._path.stat().st_size == self._size_bytes:
                return True
            seen = os.statvfs(self._path.parent)
            if seen.f_bavail * seen.f_frsize - self._size_bytes < free_at_least_bytes:
                return False
            self._make()
        except OSError:  # no room after all, or no folder; whoever writes there says why
            self.drop()
            return False
        return True

    def _make(self) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            try:
                os.posix_fallocate(fd, 0, self._size_bytes)
            except OSError as error:
                if error.errno not in _NO_FALLOCATE:
                    raise
                self._fill(fd)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _fill(self, fd: int) -> None:
        left_bytes = self._size_bytes
        while left_bytes:
            left_bytes -= os.write(fd, _CHUNK[:left_bytes])

    def drop(self) -> bool:
        """Give the room up; whether there was any."""
        try:
            self._path.unlink()
        except OSError:  # not there, or not ours to delete: no room is won either way
            return False
        return True
