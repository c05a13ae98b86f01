"""The supervisor of a recorded server: tells what the recording saw, and can change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuwatch.errors import ServerError
from gpuwatch.records import SupervisorPhase, SupervisorState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpuwatch.records import Step


class PlayedSupervisor:
    """`has_process(now_ms)` says whether the recording shows a server process then; None: it cannot tell."""

    def __init__(self, has_process: Callable[[int], bool | None]) -> None:
        self.command: Sequence[str] = ()
        self._has_process = has_process
        self._was: bool | None = None
        self._began_ms: int | None = None

    def observe(self, now_ms: int) -> SupervisorState:
        """ACTIVE while a process is there; it began when it was first seen."""
        is_there = self._has_process(now_ms)
        if is_there and not self._was:
            self._began_ms = now_ms
        self._was = is_there
        if is_there is None:
            return SupervisorState(phase=SupervisorPhase.UNKNOWN, detail="the recording does not say")
        phase = SupervisorPhase.ACTIVE if is_there else SupervisorPhase.FAILED
        detail = "a recorded process" if is_there else "no process in the recording"
        return SupervisorState(phase=phase, started_at_ms=self._began_ms, detail=detail)

    def do(self, step: Step, *, since_ms: int, now_ms: int) -> None:  # noqa: ARG002 - of the Protocol
        """ServerError: what was recorded happens, or not, whatever is asked."""
        raise ServerError(f"{step.action}: a recording cannot be acted on", permanent=True)
