"""Hears of the end of processes at once, through pidfds in one epoll; signals and reaps none."""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gpuwatch.sources.trees import Identity


@runtime_checkable
class Waking(Protocol):
    """A source that says when it must not wait for its turn: `wakes` can be read until it has been read."""

    name: str
    wakes: int

    def close(self) -> None:
        """Give `wakes` and all behind it back."""
        ...


class Exits:
    """Watches processes. `wakes` is a descriptor that is readable as long as one that ended is still watched.

    Where the kernel refuses pidfds nothing is heard: who looks each second sees it then.
    """

    def __init__(self, is_alive: Callable[[Identity], bool]) -> None:
        """`is_alive` is asked once a pidfd is open, for the pid may be another's by then."""
        self._is_alive = is_alive
        self._epoll = select.epoll()
        self.wakes = self._epoll.fileno()
        self._descriptors: dict[Identity, int] = {}
        self._turn = threading.Lock()

    def watch(self, living: Iterable[Identity]) -> None:
        """These from now on and no others; nothing once closed."""
        wanted = set(living)
        with self._turn:
            for identity in self._descriptors.keys() - wanted:
                os.close(self._descriptors.pop(identity))  # which takes it out of the epoll too
            if not self._epoll.closed:
                for identity in wanted - self._descriptors.keys():
                    self._open(identity)

    def close(self) -> None:
        """Give all descriptors back; also while another thread calls `watch`."""
        with self._turn:
            self._epoll.close()
        self.watch(())

    def _open(self, identity: Identity) -> None:
        with suppress(OSError, AttributeError):  # a Python of older headers lacks the function
            self._descriptors[identity] = descriptor = os.pidfd_open(identity.pid)
            if self._is_alive(identity):
                self._epoll.register(descriptor, select.EPOLLIN)
