"""The hands of one server: asks one step of it, again each tick until it is done; never decides which.

Every step may be asked any number of times, by a daemon that was killed in between too: what it asks for is a
state (a limit held, a link that points, an errand begun), and never "once more".

Rule 1: what takes longer than a moment is an errand (`errands.py`), which outlives the daemon.
Rule 2: limits are held for 30 s and renewed each tick, so that nobody's death leaves a server throttled.
Rule 3: a server that was started anew has a narrow door from its first request on: a crowd that waited must
        not meet a cold cache at once. `open_door` then widens it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import requests

from gpuwatch import clock
from gpuwatch.errors import ServerError
from gpuwatch.servers.inside import Inside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from gpuwatch.config import ServerSettings
    from gpuwatch.records import Errand, Revision, Step
    from gpuwatch.servers.errands import Errands

STAGES: Final = (4, 16, 64)
STAGE_MS: Final = 5_000
_ABORT_FROM: Final = 0.75  # of the time that a drain has
_ROUTE_S: Final = (0.2, 0.5)  # to connect to a server on this host, and to be answered
_LIMIT: Final = "limit_"
_POST: Final = Path(__file__).with_name("post.py")
# Beside a server that starts anew: on a host of two cores it would hold that up.
_CAPTURE: Final = ("nice", "-n", "15", sys.executable, "-P", "-m", "gpuwatch", "capture", "--json")
_ROUTES: Final = {
    "reset_prefix_cache": "/reset_prefix_cache",
    "sleep": "/sleep?level=1",
    "wake": "/wake_up",
}
# What a command may see of the daemon's environment: where things are, and nothing that could be a secret.
_PLAIN: Final = frozenset({"PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR"})
_OURS: Final = frozenset({"GPUWATCH_CONFIG", "GPUWATCH_GUEST_DIR", "CREDENTIALS_DIRECTORY"})
_OF_VLLM: Final = frozenset(
    {
        *(
            "HF_HOME",
            "HF_HUB_CACHE",
            "HF_HUB_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "XDG_CACHE_HOME",
            "PYTHONPATH",
        ),
        *("CUDA_HOME", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "VLLM_CACHE_ROOT", "VLLM_USE_MODELSCOPE"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a step is part of: the plan's id, its errand's key, since when it is asked, and for what alert."""

    id: str
    key: str
    since_ms: int
    alert: str


class _Supervisor(Protocol):
    """What of `servers.Supervisor` is needed here."""

    def do(self, step: Step, *, since_ms: int, now_ms: int) -> None: ...


class _Revisions(Protocol):
    """What of `revisions.Revisions` is needed here."""

    def write(self, revision: Revision) -> Path: ...
    def current(self) -> int | None: ...
    def swap(self, number: int) -> None: ...


class _Asked(NamedTuple):
    step: Step
    task: Task
    now_ms: int

    @property
    def part(self) -> float:
        """How much of the step's time has gone by."""
        return (self.now_ms - self.task.since_ms) / self.step.within_ms


Heard = dict[str, str]


class Hands:
    """What can be done to one server. Each method answers within 2 s, or raises ServerError."""

    def __init__(  # noqa: PLR0913 (a server has that many sides)
        self,
        server: ServerSettings,
        supervisor: _Supervisor | None,
        *,
        guests: Path,
        errands: Errands,
        revisions: _Revisions | None,
        members: Callable[[], Iterable[int]],
        python: Callable[[], str],
        revision_of: Callable[[int], Revision | None],
        session: requests.Session,
        capture: Sequence[str] = _CAPTURE,
        time: clock.Clock | None = None,
    ) -> None:
        """Touch nothing yet.

        `guests` is the folder of their sockets, `members` the pids of the server's processes, `python`
        vLLM's interpreter or "", `session` from `sources.local_session`. `capture` is the command that writes
        a bundle, to which `--id ID`, `--pid N` for each member and the server's name are added.
        """
        self._server = server
        self._supervisor = supervisor
        self._inside = Inside(folder=guests, members=members)
        self._errands = errands
        self._revisions = revisions
        self._members = members
        self._python = python
        self._revision_of = revision_of
        self._session = session
        self._capture_command = tuple(capture)
        self._clock = time or clock.SystemClock()
        self._aborted: dict[str, int] = {}
        self._deeds: Mapping[str, Callable[[_Asked], Heard]] = {
            "capture": self._capture,
            "run": self._run_command,
            "check": self._check,
            "drain": self._drain,
            "stop": self._supervise,
            "await_memory": self._nothing,
            "swap": self._swap,
            "start": self._start,
            "canary": self._narrow,
            "open_door": self._open_door,
            "limit_admission": self._limit,
            "limit_running": self._limit,
            "hold": self._hold,
            "lift": self._lift,
            "release_cache": self._release_cache,
            "reset_prefix_cache": self._post,
            "sleep": self._post,
            "wake": self._post,
        }

    def do(self, step: Step, task: Task, now_ms: int) -> Mapping[str, str]:
        """Ask for a step, or help it on; what was answered. ServerError, `permanent` if it cannot be done."""
        deed = self._deeds.get(step.action)
        if deed is None:
            raise self._cannot(step.action, "this gpuwatch knows no such step; is it an older one?")
        return deed(_Asked(step, task, now_ms))

    def errands(self) -> Mapping[str, Errand]:
        """All errands by key; what is late is ended. Nothing where their folder cannot be read."""
        with contextlib.suppress(ServerError):
            return self._errands.look(self._clock.now_ms())
        return {}

    def revision(self) -> int | None:
        """Which settings the next start reads; None where gpuwatch keeps none, or they cannot be read."""
        with contextlib.suppress(ServerError):
            return self._revisions.current() if self._revisions else None
        return None

    # -- the server's life -----------------------------------------------------------------------------

    def _supervise(self, asked: _Asked) -> Heard:
        if self._supervisor is None:
            raise self._cannot(asked.step.action, "it has no supervisor; name one in servers[].supervisor")
        self._supervisor.do(asked.step, since_ms=asked.task.since_ms, now_ms=asked.now_ms)
        return {}

    def _start(self, asked: _Asked) -> Heard:
        self._supervise(asked)
        return self._narrow(asked)

    def _narrow(self, asked: _Asked) -> Heard:  # noqa: ARG002 (as all deeds)
        """Rule 3; a server without a guest is started all the same."""
        with contextlib.suppress(ServerError):
            self._inside.hold(admission=STAGES[0])
        return {}

    # -- requests --------------------------------------------------------------------------------------

    def _drain(self, asked: _Asked) -> Heard:
        """Close the door; in the last quarter of the time, end what is in flight."""
        self._inside.hold(admission=0)
        key = asked.task.key
        if asked.part >= _ABORT_FROM:
            ended = self._inside.abort()
            if ended is None:
                ended = self._abort_by_route()
            self._aborted = {key: self._aborted.get(key, 0) + ended}
        return {"aborted": str(self._aborted[key])} if key in self._aborted else {}

    def _abort_by_route(self) -> int:
        """By vLLM's own route, of 0.32 and later in development mode; else the stop ends them."""
        with contextlib.suppress(requests.RequestException, ValueError, AttributeError):
            url = f"{self._server.url.rstrip('/')}/abort_requests"
            with self._session.post(url, json={}, timeout=_ROUTE_S, allow_redirects=False) as response:
                count = response.json().get("aborted") if response.ok else 0
                return count if isinstance(count, int) else 0
        return 0

    def _open_door(self, asked: _Asked) -> Heard:
        stage = max(0, asked.now_ms - asked.task.since_ms) // STAGE_MS
        self._inside.hold(admission=STAGES[stage] if stage < len(STAGES) else None)
        return {}

    def _limit(self, asked: _Asked) -> Heard:
        name = asked.step.action.removeprefix(_LIMIT)
        lacks = self._inside.hold(**{name: int(asked.step.args["limit"])}).lacks
        if name in lacks:
            # Not for good: an engine whose loop is not in its main thread is known one asking later.
            raise ServerError(f"{asked.step.action} of {self._server.name}: {lacks[name]}")
        return {}

    def _hold(self, asked: _Asked) -> Heard:
        """Renew what the step names: it may have lapsed while nobody asked."""
        named = asked.step.args.items()
        limits = {name.removeprefix(_LIMIT): int(v) for name, v in named if name.startswith(_LIMIT)}
        self._inside.hold(**limits)
        return {}

    def _lift(self, asked: _Asked) -> Heard:  # noqa: ARG002 (as all deeds)
        self._inside.lift()
        return {}

    # -- memory ----------------------------------------------------------------------------------------

    def _release_cache(self, asked: _Asked) -> Heard:
        released = self._inside.release()
        if released.refused:
            return {"failed": released.refused[0]}
        if released.silent or not released.done:
            why = released.silent[0] if released.silent else "no process of it that uses a GPU has a guest"
            raise ServerError(f"{asked.step.action} of {self._server.name}: {why}; see docs/guest.md")
        return {"done": "yes", "freed_bytes": str(released.freed_bytes)}

    def _post(self, asked: _Asked) -> Heard:
        """A route of vLLM's development mode, which may take a minute."""
        url = self._server.url.rstrip("/") + _ROUTES[asked.step.action]
        within_s = f"{asked.step.within_ms / 1000:g}"
        return self._run(asked, [sys.executable, "-P", str(_POST), url, within_s], _environment(_PLAIN))

    # -- settings --------------------------------------------------------------------------------------

    def _check(self, asked: _Asked) -> Heard:
        from gpuwatch.servers.revisions import check_command  # noqa: PLC0415 (only who keeps settings has it)

        _, path = self._written(asked)
        python = self._python()
        if not python:
            cure = "vLLM's interpreter is not known; name it in servers[].python"
            raise self._cannot("check the settings", cure)
        env = _environment(_PLAIN | _OF_VLLM) | self._env_of_settings()
        return self._run(asked, check_command(Path(python), path), env)

    def _swap(self, asked: _Asked) -> Heard:
        revisions, path = self._written(asked)
        revisions.swap(int(asked.step.args["revision"]))
        return {"file": path.name}

    def _written(self, asked: _Asked) -> tuple[_Revisions, Path]:
        """The file of the step's revision, which is written if it is not there."""
        number = int(asked.step.args["revision"])
        revision = self._revision_of(number)
        if self._revisions is None:
            raise self._cannot(
                asked.step.action, "gpuwatch keeps no settings of it; name servers[].revisions"
            )
        if revision is None:
            raise self._cannot(asked.step.action, f"there is no revision {number}; see gpuwatch config log")
        return self._revisions, self._revisions.write(revision)

    def _env_of_settings(self) -> dict[str, str]:
        supervisor = self._server.supervisor
        return dict(supervisor.process.env) if supervisor and supervisor.process else {}

    # -- commands --------------------------------------------------------------------------------------

    def _capture(self, asked: _Asked) -> Heard:
        pids = [word for pid in self._members() for word in ("--pid", str(pid))]
        command = [*self._capture_command, "--id", asked.task.id, *pids, self._server.name]
        return self._run(asked, command, _environment(_PLAIN | _OURS))

    def _run_command(self, asked: _Asked) -> Heard:
        """An operator's own."""
        try:
            command = [str(word) for word in json.loads(asked.step.args["command"])]
        except (KeyError, ValueError, TypeError) as error:
            raise self._cannot("run a command", f"the plan names none ({error!r})") from error
        told = {"SERVER": self._server.name, "ALERT": asked.task.alert, "ID": asked.task.id}
        env = _environment(_PLAIN) | {f"GPUWATCH_{name}": value for name, value in told.items()}
        return self._run(asked, command, env)

    def _run(self, asked: _Asked, command: Sequence[str], env: Mapping[str, str]) -> Heard:
        within_ms = asked.step.within_ms
        self._errands.begin(asked.task.key, command, within_ms=within_ms, env=env, now_ms=asked.now_ms)
        return {}

    def _nothing(self, asked: _Asked) -> Heard:  # noqa: ARG002 (as all deeds)
        """Others bring it about: the eyes that look, and the kernel."""
        return {}

    def _cannot(self, what: str, why: str) -> ServerError:
        return ServerError(f"{what} of {self._server.name}: {why}", permanent=True)


def _environment(names: frozenset[str]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in names}
