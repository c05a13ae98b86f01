"""What Docker's engine says of a container and its process; pure, asks nothing.

Rule 1: a stop was asked for if the engine sent a signal that ends, or noted a `stop`, before the container
        died. A process that ends by itself leaves a `die` alone. A container that is paused or being removed
        is somebody's wish too.
Rule 2: the engine remembers 256 events of all containers, and none from before its own start. Where even the
        `die` is gone, the restart policy may tell: what the engine always restarts rests only if somebody
        stopped it.
Rule 3: where that does not tell either, the phase is UNKNOWN: who cannot tell a stop from a death must not
        act.
Rule 4: a stop is under way for as long as it may take; who swallowed the signal is ACTIVE again.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Self

from gpuwatch.records import SupervisorPhase, SupervisorState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ENDING: Final = frozenset({signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGKILL})
_NEVER_RESTS: Final = frozenset({"always", "unless-stopped"})
_BY_SIGNAL: Final = 128  # above it, an exit code is that and the signal
_DEFAULT_STOP_MS: Final = 10_000
_PHASES: Final[Mapping[str, SupervisorPhase]] = {
    "created": SupervisorPhase.INACTIVE,
    "running": SupervisorPhase.ACTIVE,
    "paused": SupervisorPhase.ACTIVE,
    "restarting": SupervisorPhase.AUTO_RESTART,
    "removing": SupervisorPhase.DEACTIVATING,
    "dead": SupervisorPhase.INACTIVE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """Of the answer of `GET /containers/ID/json`; `_us` of the wall clock, 0 = never."""

    id: str
    name: str
    status: str
    pid: int  # as the host numbers it
    started_us: int
    finished_us: int
    exit_code: int
    out_of_memory: bool
    error: str  # why the engine could not start it
    restarts: int  # by the engine itself
    restart_policy: str
    stop_signal: str
    stop_timeout_ms: int
    has_terminal: bool

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Self:
        """From the engine's JSON."""
        state, config = told["State"], told["Config"]
        timeout_s = config.get("StopTimeout")
        return cls(
            id=told["Id"],
            name=told["Name"].lstrip("/"),
            status=state["Status"],
            pid=state["Pid"],
            started_us=_us(state["StartedAt"]),
            finished_us=_us(state["FinishedAt"]),
            exit_code=state["ExitCode"],
            out_of_memory=state.get("OOMKilled", False),
            error=state.get("Error", ""),
            restarts=told.get("RestartCount", 0),
            restart_policy=told["HostConfig"]["RestartPolicy"]["Name"],
            stop_signal=config.get("StopSignal") or "SIGTERM",
            stop_timeout_ms=_DEFAULT_STOP_MS if timeout_s is None else timeout_s * 1000,
            has_terminal=config.get("Tty", False),
        )

    @property
    def is_over(self) -> bool:
        """Neither running nor about to be."""
        return self.status in {"created", "exited", "dead"}


@dataclass(frozen=True, slots=True)
class Event:
    """What the engine noted of a container: `kill`, `stop` or `die`."""

    action: str
    at_us: int
    signal: str = ""  # of a kill

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Self:
        """From a line of `GET /events`."""
        attributes = told.get("Actor", {}).get("Attributes", {})
        return cls(told["Action"], told["timeNano"] // 1000, attributes.get("signal", ""))


def asked_at_ms(container: Container, events: Sequence[Event]) -> int | None:
    """When somebody last asked for its end, of those events."""
    return max((event.at_us // 1000 for event in events if _ends(event, container)), default=None)


def stop_asked(container: Container, events: Sequence[Event], *, within_ms: int, now_ms: int) -> bool | None:
    """Whether somebody asked for the stop that is under way or was the last; None: nobody can tell.

    `events` are those since its last start; a stop may take `within_ms`.
    """
    if container.status in {"paused", "removing", "dead"}:
        return True
    if container.status in {"created", "restarting"}:
        return False
    is_over = container.status == "exited"
    end_us = container.finished_us if is_over else now_ms * 1000
    first_us = end_us - max(within_ms, container.stop_timeout_ms) * 1000
    if any(_ends(event, container) and event.at_us >= first_us for event in events):
        return True
    if not is_over or any(event.action == "die" for event in events):
        return False
    rests_by_wish = container.restart_policy in _NEVER_RESTS and not container.error
    return True if rests_by_wish else None


def state(container: Container, asked: bool | None) -> SupervisorState:  # noqa: FBT001 - it may be None
    """The container as a record; `asked` is what `stop_asked` says."""
    return SupervisorState(
        phase=_phase(container, asked),
        pid=container.pid or None,
        started_at_ms=container.started_us // 1000 or None,
        stop_asked=bool(asked),
        detail=_detail(container, asked),
    )


def _phase(container: Container, asked: bool | None) -> SupervisorPhase:  # noqa: FBT001
    if container.status != "exited":
        phase = _PHASES.get(container.status, SupervisorPhase.UNKNOWN)
        is_stopping = container.status == "running" and asked
        return SupervisorPhase.DEACTIVATING if is_stopping else phase
    if asked is None:
        return SupervisorPhase.UNKNOWN
    is_clean = asked or (container.exit_code == 0 and not container.error)
    return SupervisorPhase.INACTIVE if is_clean else SupervisorPhase.FAILED


def _detail(container: Container, asked: bool | None) -> str:  # noqa: FBT001
    """`exited: exited with status 0`, and what else is known."""
    text = container.status
    if container.status in {"exited", "restarting"}:
        text += f": {_how_it_ended(container.exit_code)}"
    if container.out_of_memory:
        text += ", out of the host's memory"
    if container.error:
        text += f", the engine says: {container.error}"
    if container.restarts:
        text += f", {container.restarts} automatic restarts"
    if asked is None:
        text += "; the engine's events no longer reach back, so a stop cannot be told from a death"
    return text


def _how_it_ended(exit_code: int) -> str:
    by_signal = exit_code - _BY_SIGNAL
    if 0 < by_signal < signal.NSIG:
        return f"killed by signal {by_signal}"
    return f"exited with status {exit_code}"


def _ends(event: Event, container: Container) -> bool:
    """Tell a wish that it end from a signal that has another meaning, such as HUP."""
    if event.action != "kill":
        return event.action == "stop"
    return _number(event.signal) in {*_ENDING, _number(container.stop_signal)}


def _number(name: str) -> int:
    """Of a signal as Docker writes it: `15`, `TERM` or `SIGTERM`; 0 if there is none such."""
    if name.isdigit():
        return int(name)
    found = signal.Signals.__members__.get(f"SIG{name.upper().removeprefix('SIG')}")
    return found.value if found else 0


def _us(text: str) -> int:
    """The engine's RFC 3339 with nanoseconds; its year 1 is never."""
    instant = datetime.fromisoformat(text)
    return 0 if instant.year == 1 else round(instant.timestamp() * 1_000_000)
