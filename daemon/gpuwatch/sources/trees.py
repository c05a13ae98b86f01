"""Which process belongs to which vLLM server, for whoever asks; looks at no process itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Identity(NamedTuple):
    """A process: its pid, and when it began in the kernel's ticks, since a pid is given again."""

    pid: int
    start_ticks: int


class Member(NamedTuple):
    """A process of a server. `process` is vLLM's title less `VLLM::`, `main` the process it lives by.

    `role` is api_server, engine_core, worker or helper. `is_orphan` once `main` is gone.
    """

    identity: Identity
    process: str
    role: str
    main: Identity
    is_orphan: bool = False


class Trees:
    """Members by server and servers by pid; shared by all who read, told by the one that looks.

    Any thread may call it: what is read whole is replaced whole, never changed.
    """

    def __init__(self) -> None:
        """Knows nobody."""
        self._roots: dict[str, int | None] = {}
        self._members: dict[str, tuple[Member, ...]] = {}
        self._by_pid: dict[int, tuple[str, Member]] = {}

    def set_root(self, server: str, pid: int | None) -> None:
        """What a server's supervisor says of its main process; None if it knows of none."""
        self._roots[server] = pid

    def root(self, server: str) -> int | None:
        """The main process that a supervisor told; None if it told none."""
        return self._roots.get(server)

    def members(self, server: str) -> tuple[Member, ...]:
        """The processes that live, orphans among them, when they were last looked at."""
        return self._members.get(server, ())

    def member(self, pid: int) -> Member | None:
        """The member that has this pid; None if it is no server's."""
        return self._by_pid.get(pid, ("", None))[1]

    def server_of(self, pid: int) -> str:
        """The server that a process belongs to; empty if to none, or nobody knows."""
        return self._by_pid.get(pid, ("", None))[0]

    def replace(self, server: str, members: Iterable[Member]) -> None:
        """The members of a server from now on; one thread's."""
        self._members = self._members | {server: tuple(members)}
        self._by_pid = {m.identity.pid: (name, m) for name, its in self._members.items() for m in its}
