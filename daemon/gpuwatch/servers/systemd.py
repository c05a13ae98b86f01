"""Looks at, stops and restarts a systemd service over D-Bus; never uses StartUnit, never waits for a job.

Two reads and three verbs: `Properties.GetAll`, a job's `JobType`, `ResetFailedUnit`, `StopUnit`,
`RestartUnit`. The right to the verbs comes from a polkit rule for this one unit
(`systemd/gpuwatch.polkit.rules`). A stopped unit is started by RestartUnit, because a rule that allows
`start` opens StartTransientUnit, and with it root.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any, Final

from gpuwatch.errors import ServerError
from gpuwatch.servers import unit as units
from gpuwatch.servers.anew import Anew

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jeepney import Message
    from jeepney.io.blocking import DBusConnection

    from gpuwatch.records import Step, SupervisorState

TIMEOUT_S: Final = 2.0
_SYSTEMD: Final = "org.freedesktop.systemd1"
_MANAGER_PATH: Final = "/org/freedesktop/systemd1"
_DENIED: Final = frozenset(
    {
        "org.freedesktop.DBus.Error.AccessDenied",
        "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired",
    }
)


class SystemdSupervisor:
    """The service `unit` on the system bus, or on the bus at `bus_address`."""

    def __init__(self, unit: str, bus_address: str | None = None, *, bus: Bus | None = None) -> None:
        """Connect at the first call, not here: the bus may come up after us."""
        self.unit = unit
        self._bus = bus or Bus(bus_address or "SYSTEM")
        self._path = f"{_MANAGER_PATH}/unit/{_escaped(unit)}"
        self._anew = Anew()
        self.command: Sequence[str] = ()

    def observe(self, now_ms: int) -> SupervisorState:  # noqa: ARG002 - of the Protocol; systemd has its own clock
        """ActiveState, SubState, MainPID, ExecMain*, Result and NRestarts as a record."""
        unit = self._look()
        return units.state(unit, self._job_type(unit))

    def do(self, step: Step, *, since_ms: int, now_ms: int) -> None:  # noqa: ARG002 - of the Protocol
        """`restart`, `start`: ResetFailedUnit, then RestartUnit; `stop`: StopUnit; in mode `replace`."""
        if step.action not in {"restart", "stop", "start"}:
            raise ServerError(
                f"{step.action} of {self.unit}: systemd supervisor knows only restart, stop, start",
                permanent=True,
            )
        unit = self._look()
        if step.action == "stop":
            self._stop(unit)
        elif step.action == "restart":
            self._refuse_forgotten(unit)
            self._bring_up(unit, since_ms)
        elif unit.is_over:  # a start takes nobody's server down
            self._bring_up(unit, since_ms)

    def _refuse_forgotten(self, unit: units.Unit) -> None:
        if unit.is_forgotten:
            raise ServerError(
                f"restart {self.unit}: it is inactive and systemd has forgotten how it ended, so a stop"
                " by an operator cannot be told from a death; start it yourself, and enable it or name it"
                " in After= of gpuwatch.service",
                permanent=True,
            )

    def _stop(self, unit: units.Unit) -> None:
        # Whatever systemd is at: also a start that is under way, and the wait before its own restart.
        is_coming = unit.is_over and bool(unit.job_path)
        if (is_coming or not unit.is_over) and self._job_type(unit) != "stop":
            self._manager("StopUnit", "ss", self.unit, "replace")

    def _bring_up(self, unit: units.Unit, since_ms: int) -> None:
        mark = unit.main_start_monotonic_us
        if self._is_under_way(unit) or self._anew.began(since_ms, unit.main_start_us, mark):
            return
        self._anew.ask(since_ms, mark)
        # Our restarts count against StartLimitBurst; without the reset the last one leaves the unit failed.
        # If the reset is refused, the restart itself says what is wrong.
        with contextlib.suppress(ServerError):
            self._manager("ResetFailedUnit", "s", self.unit)
        self._manager("RestartUnit", "ss", self.unit, "replace")

    @staticmethod
    def _is_under_way(unit: units.Unit) -> bool:
        return bool(unit.job_path) or unit.active_state in {"activating", "deactivating"}

    def _look(self) -> units.Unit:
        # An empty interface asks for the properties of all: Unit and Service in one call. The path
        # loads the unit if need be.
        body = self._bus.call(
            self._path, "org.freedesktop.DBus.Properties", ("GetAll", "s", ""), f"read {self.unit}"
        )
        unit = units.Unit.of(body[0])
        self.command = unit.command
        if unit.is_over and unit.load_state in {"not-found", "masked"}:
            raise ServerError(
                f"read {self.unit}: systemd says {unit.load_state}; install or unmask the unit, or correct"
                " `supervisor.systemd` of the server",
                permanent=True,
            )
        return unit

    def _job_type(self, unit: units.Unit) -> str:
        if not unit.job_path:
            return ""
        try:
            body = self._bus.call(
                unit.job_path,
                "org.freedesktop.DBus.Properties",
                ("Get", "ss", f"{_SYSTEMD}.Job", "JobType"),
                f"read the job of {self.unit}",
            )
        except ServerError:  # it was done between the two calls
            return ""
        return str(body[0][1])

    def _manager(self, method: str, signature: str, *arguments: str) -> None:
        call = (method, signature, *arguments)
        self._bus.call(_MANAGER_PATH, f"{_SYSTEMD}.Manager", call, f"{method} {self.unit}")


class Bus:
    """A connection that is made when needed, and made anew when the bus was restarted."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._connection: DBusConnection | None = None
        self._turn = threading.Lock()  # looks come from a pool, steps from the tick: one exchange at a time

    def call(self, path: str, interface: str, call: tuple[str, ...], what: str) -> tuple[Any, ...]:
        """One method call: `call` is method, signature, arguments. `what` opens the error's text."""
        from jeepney import DBusAddress, new_method_call  # noqa: PLC0415 - hosts without systemd never load it
        from jeepney.wrappers import DBusErrorResponse, unwrap_msg  # noqa: PLC0415 - as above

        address = DBusAddress(path, bus_name=_SYSTEMD, interface=interface)
        message = new_method_call(address, call[0], call[1], call[2:])
        if not self._turn.acquire(timeout=TIMEOUT_S):
            raise ServerError(f"{what}: another call has been waiting for the bus; it is asked again")
        try:
            return tuple(unwrap_msg(self._exchanged(message)))
        except DBusErrorResponse as error:
            raise _refusal(what, error.name, str(error)) from error
        except (OSError, EOFError, ValueError) as error:  # ValueError: the bus refused our credentials
            self._drop()
            raise ServerError(
                f"{what}: no answer from the bus {self._address} within {TIMEOUT_S:.0f} s ({error!r});"
                " see `systemctl status dbus`"
            ) from error
        finally:
            self._turn.release()

    def _exchanged(self, message: Message) -> Message:
        had_one = self._connection is not None
        try:
            return self._connected().send_and_get_reply(message, timeout=TIMEOUT_S)
        except (ConnectionError, EOFError):
            if not had_one:
                raise
            self._drop()
            return self._connected().send_and_get_reply(message, timeout=TIMEOUT_S)

    def _connected(self) -> DBusConnection:
        from jeepney.io.blocking import open_dbus_connection  # noqa: PLC0415 - hosts without systemd never load it

        if self._connection is None:
            self._connection = open_dbus_connection(self._address, auth_timeout=TIMEOUT_S)
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _refusal(what: str, name: str, text: str) -> ServerError:
    if name in _DENIED:
        return ServerError(
            f"{what}: systemd denies it; install systemd/gpuwatch.polkit.rules as"
            " /etc/polkit-1/rules.d/50-gpuwatch.rules with this unit in its list",
            permanent=True,
        )
    return ServerError(f"{what}: {text}", permanent=name.endswith((".NoSuchUnit", ".UnitMasked")))


def _escaped(name: str) -> str:
    """A unit's name in an object path: every byte but [A-Za-z0-9] is `_xx`, and so is a leading digit."""
    return "".join(
        chr(byte) if chr(byte).isalnum() and byte < 128 and (i or not chr(byte).isdigit()) else f"_{byte:02x}"
        for i, byte in enumerate(name.encode())
    )
