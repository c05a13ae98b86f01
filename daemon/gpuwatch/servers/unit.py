"""What the D-Bus properties of a systemd service say of its process; pure, asks nothing.

Rule 1: a stop was asked for if the unit left `active` before its main process exited. A process that
        ends by itself exits first, whatever its status: vLLM exits with 0 when its engine dies.
Rule 2: what systemd ends on its own account (out of memory, watchdog, ...) is no such stop; `Result` tells.
Rule 3: a unit that is neither enabled nor named by another unit is forgotten as soon as it is inactive:
        no start time is left, and nobody can tell a stop from a death.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from gpuwatch.records import SupervisorPhase, SupervisorState

if TYPE_CHECKING:
    from collections.abc import Mapping

_PHASES: Final[Mapping[str, SupervisorPhase]] = {
    "active": SupervisorPhase.ACTIVE,
    "reloading": SupervisorPhase.ACTIVE,
    "refreshing": SupervisorPhase.ACTIVE,
    "activating": SupervisorPhase.ACTIVATING,
    "deactivating": SupervisorPhase.DEACTIVATING,
    "inactive": SupervisorPhase.INACTIVE,
    "failed": SupervisorPhase.FAILED,
}
_STOPPED_BY_SYSTEMD: Final = frozenset(
    {"oom-kill", "watchdog", "protocol", "resources", "start-limit-hit", "exec-condition"}
)
_EXITED: Final = 1  # CLD_EXITED; 2 and 3 are CLD_KILLED and CLD_DUMPED


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Properties of org.freedesktop.systemd1.Unit and .Service, named as there.

    `_us` of CLOCK_REALTIME, `_monotonic_us` of CLOCK_MONOTONIC; 0 = never.
    """

    load_state: str
    active_state: str
    sub_state: str
    result: str
    main_pid: int
    main_code: int
    main_status: int
    main_start_us: int
    main_start_monotonic_us: int
    main_exit_monotonic_us: int
    active_exit_monotonic_us: int
    restarts: int
    job_path: str
    command: tuple[str, ...] = ()  # of ExecStart: what the next start runs

    @classmethod
    def of(cls, properties: Mapping[str, tuple[str, Any]]) -> Self:
        """From the answer of `Properties.GetAll`: name to (signature, value)."""
        value = {name: variant[1] for name, variant in properties.items()}
        job_id, job_path = value.get("Job", (0, "/"))
        return cls(
            load_state=value.get("LoadState", ""),
            active_state=value.get("ActiveState", ""),
            sub_state=value.get("SubState", ""),
            result=value.get("Result", ""),
            main_pid=value.get("MainPID", 0),
            main_code=value.get("ExecMainCode", 0),
            main_status=value.get("ExecMainStatus", 0),
            main_start_us=value.get("ExecMainStartTimestamp", 0),
            main_start_monotonic_us=value.get("ExecMainStartTimestampMonotonic", 0),
            main_exit_monotonic_us=value.get("ExecMainExitTimestampMonotonic", 0),
            active_exit_monotonic_us=value.get("ActiveExitTimestampMonotonic", 0),
            restarts=value.get("NRestarts", 0),
            job_path=job_path if job_id else "",
            command=next((tuple(start[1]) for start in value.get("ExecStart", ())), ()),
        )

    @property
    def is_over(self) -> bool:
        """Neither running nor on its way up or down."""
        return self.active_state in {"inactive", "failed"}

    @property
    def is_forgotten(self) -> bool:
        """Not running, and systemd knows of no start (rule 3)."""
        return self.is_over and self.main_start_us == 0


def stop_asked(unit: Unit, job_type: str) -> bool:
    """Tell whether somebody asked for the stop that is under way or was the last (rules 1 and 2)."""
    if job_type:
        return job_type == "stop"
    if not unit.is_over or unit.main_start_us == 0 or unit.result in _STOPPED_BY_SYSTEMD:
        return False
    if unit.active_exit_monotonic_us < unit.main_start_monotonic_us:
        # It never became active: a stop cut the start short and left no failure, or the start failed.
        return unit.result == "success"
    return unit.active_exit_monotonic_us < unit.main_exit_monotonic_us


def state(unit: Unit, job_type: str) -> SupervisorState:
    """The unit as a record; `job_type` is that of its queued job, empty if none."""
    return SupervisorState(
        phase=_phase(unit, job_type),
        pid=unit.main_pid or None,
        started_at_ms=unit.main_start_us // 1000 or None,
        stop_asked=stop_asked(unit, job_type),
        detail=_detail(unit),
    )


def _phase(unit: Unit, job_type: str) -> SupervisorPhase:
    if unit.sub_state.startswith("auto-restart"):
        return SupervisorPhase.AUTO_RESTART
    if unit.is_over and job_type in {"start", "restart"}:
        return SupervisorPhase.ACTIVATING  # between the stop and the start of a restart
    return _PHASES.get(unit.active_state, SupervisorPhase.UNKNOWN)


def _detail(unit: Unit) -> str:
    """`inactive (dead): exited with status 0`, as `systemctl status` would say."""
    text = f"{unit.active_state} ({unit.sub_state})"
    if unit.is_forgotten:
        return f"{text}: not started since boot, or forgotten by systemd"
    if unit.main_pid == 0 and unit.main_code:
        how = "exited with status" if unit.main_code == _EXITED else "killed by signal"
        text += f": {how} {unit.main_status}"
    if unit.result not in {"", "success"}:
        text += f", result {unit.result}"
    return text + (f", {unit.restarts} automatic restarts" if unit.restarts else "")
