"""Looks at, stops and starts a container of Docker or Compose; never makes or removes one, never waits.

The engine's own `stop` is used, not its `kill`: of `stop` alone Docker documents that it sets the restart
policy aside, and it sends the container's own stop signal first. It lasts as long as the container takes to
end, and engines 23.0.0 to 24.0.2 kill at once when the caller hangs up (moby #45731). So `stop` and `start`
run in a short-lived thread each, which holds the line; the next look says what came of it. Where the engine's
own KILL does not come, since its `stop` was lost with an older gpuwatch, `kill` follows after the same time.

Whoever may use the engine's socket is root on this host.
"""

from __future__ import annotations

import json
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar
from urllib.parse import quote

from gpuwatch.errors import ServerError
from gpuwatch.servers import container as containers
from gpuwatch.servers.anew import Anew
from gpuwatch.servers.container import Container, Event

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from docker import APIClient

    from gpuwatch.records import Step, SupervisorState

TIMEOUT_S: Final = 2.0
_START_WITHIN_MS: Final = 120_000
_GRACE_MS: Final = 5_000  # from when the engine's own KILL is due to ours
_MOST_BYTES: Final = 4 * 2**20
_BAD: Final = 400
_ABSENT: Final = 404
_CONFLICT: Final = 409
_MOST_NAMES: Final = 10
_LABEL: Final = "com.docker.compose"
_T = TypeVar("_T")
_End: TypeAlias = "tuple[str, int]"  # a container's id, and when it ended


@dataclass(frozen=True, slots=True)
class Target:
    """Which container: by its name, or as the only one of a Compose project's service."""

    container: str
    project: str = ""
    service: str = ""

    def __str__(self) -> str:
        """For messages."""
        return self.container or f"service {self.service} of project {self.project}"


class DockerSupervisor:
    """The container `target` of the engine; `stop_timeout_ms` from TERM to KILL."""

    def __init__(self, target: Target, engine: Engine, *, stop_timeout_ms: int = 60_000) -> None:
        """Connect at the first call, not here: the engine may come up after us."""
        self.target = target
        self.stop_timeout_ms = stop_timeout_ms
        self.command: Sequence[str] = ()  # its paths would be those inside the container
        self._engine = engine
        self._call: _Call | None = None
        self._anew = Anew()
        self._verdict: tuple[_End, bool] | None = None  # of the end that was seen last

    def observe(self, now_ms: int) -> SupervisorState:
        """`State` of the container as a record, and of the engine's events whether a stop was asked for."""
        container = self._engine.find(self.target)
        return containers.state(container, self._stop_asked(container, now_ms))

    def do(self, step: Step, *, since_ms: int, now_ms: int) -> None:
        """`stop`: the engine's, and a kill where that does not help; `start`; `restart`: both in turn."""
        if step.action not in {"restart", "stop", "start"}:
            raise ServerError(
                f"{step.action} of {self.target}: docker supervisor knows only restart, stop, start",
                permanent=True,
            )
        if self._is_busy():
            return
        container = self._engine.find(self.target)
        if step.action == "stop":
            self._stop(container, since_ms, now_ms)
        elif self._anew.began(since_ms, container.started_us, container.started_us):
            return
        elif container.is_over:
            self._start(container, since_ms, now_ms, is_restart=step.action == "restart")
        elif step.action == "restart" and container.status != "restarting":
            self._stop(container, since_ms, now_ms)

    def _is_busy(self) -> bool:
        """Whether the last call is still under way; ServerError, once, if it failed."""
        call = self._call
        if call is None or call.is_under_way():
            return call is not None
        self._call = None
        if call.error is not None:
            raise call.error
        return False

    def _stop(self, container: Container, since_ms: int, now_ms: int) -> None:
        if container.is_over:
            return
        within_ms = self.stop_timeout_ms + _GRACE_MS
        asked_at_ms = containers.asked_at_ms(container, self._events(container, now_ms))
        if asked_at_ms is None or asked_at_ms < since_ms - within_ms:  # it swallowed that one
            self._begin("stop", container, {"t": round(self.stop_timeout_ms / 1000)}, within_ms)
        elif now_ms - asked_at_ms >= within_ms:
            self._begin("kill", container, {"signal": "SIGKILL"}, within_ms)

    def _start(self, container: Container, since_ms: int, now_ms: int, *, is_restart: bool) -> None:
        if is_restart and container.finished_us < since_ms * 1000:
            self._refuse_unknown(container, now_ms)
        self._anew.ask(since_ms, container.started_us)
        self._begin("start", container, {}, _START_WITHIN_MS)

    def _refuse_unknown(self, container: Container, now_ms: int) -> None:
        if self._stop_asked(container, now_ms) is None:
            raise ServerError(
                f"restart {self.target}: the engine's events no longer reach back to its end, so a stop by an"
                " operator cannot be told from a death; start it yourself",
                permanent=True,
            )

    def _begin(self, verb: str, container: Container, options: dict[str, Any], within_ms: int) -> None:
        path, what = f"/containers/{container.id}/{verb}", f"{verb} {self.target}"
        timeout_s = within_ms / 1000 + TIMEOUT_S
        self._call = _Call(lambda: self._engine.post(path, what, options, timeout_s=timeout_s), what)

    def _events(self, container: Container, now_ms: int) -> list[Event]:
        return self._engine.events(container, now_ms) if container.status in {"running", "exited"} else []

    def _stop_asked(self, container: Container, now_ms: int) -> bool | None:
        """As `containers.stop_asked`; an end is judged once, for the engine's events pass."""
        end = container.id, container.finished_us
        if container.status == "exited" and self._verdict is not None and self._verdict[0] == end:
            return self._verdict[1]
        events = self._events(container, now_ms)
        asked = containers.stop_asked(container, events, within_ms=self.stop_timeout_ms, now_ms=now_ms)
        if container.status == "exited" and asked is not None:
            self._verdict = end, asked
        return asked


class Engine:
    """Docker's engine behind its Unix socket; each answer within 2 s, of 4 MiB at most."""

    def __init__(self, path: Path) -> None:
        """Connect to the socket `path` at the first call."""
        self._path = path
        self._client: APIClient | None = None

    def find(self, target: Target) -> Container:
        """The container as it is now; ServerError, with what there is, unless it is exactly one."""
        what = f"look at {target}"
        name = target.container or self._only_one(target, what)
        status, told = self._answer("GET", f"/containers/{quote(name, safe='')}/json", what, {})
        if status == _ABSENT:
            raise self._not_one(what, [])
        self._check(status, told, what)
        return _made(Container.of, told, what)

    def events(self, container: Container, now_ms: int) -> list[Event]:
        """What was noted of its signals and its end since its last start, oldest first."""
        what = f"read the engine's events of {container.name}"
        filters = {"container": [container.id], "type": ["container"], "event": ["kill", "stop", "die"]}
        # Without an end the engine would go on telling; this millisecond is not over yet.
        span = {"since": instant(container.started_us), "until": instant((now_ms + 1) * 1000)}
        told = self.get("/events", what, {**span, "filters": json.dumps(filters)})
        return [_made(Event.of, line, what) for line in told.splitlines() if line]

    def get(self, path: str, what: str, options: dict[str, Any]) -> bytes:
        """What it answers, cut at 4 MiB; `what` opens the error's text."""
        status, told = self._answer("GET", path, what, options)
        self._check(status, told, what)
        return told

    def post(self, path: str, what: str, options: dict[str, Any], *, timeout_s: float) -> None:
        """Ask for something; that it is so already is as good. It may last `timeout_s`."""
        status, told = self._answer("POST", path, what, options, timeout_s)
        ended_meanwhile = status == _CONFLICT and path.endswith("/kill")
        if not ended_meanwhile:
            self._check(status, told, what)

    def _only_one(self, target: Target, what: str) -> str:
        labels = [f"{_LABEL}.project={target.project}", f"{_LABEL}.service={target.service}"]
        found = [told for told in self._all(what, labels) if _is_of_service(told)]
        if len(found) != 1:
            raise self._not_one(what, found)
        return str(found[0]["Id"])

    def _all(self, what: str, labels: list[str]) -> list[dict[str, Any]]:
        options = {"all": "1", "filters": json.dumps({"label": labels})}
        return _made(list, self.get("/containers/json", what, options), what)

    def _not_one(self, what: str, found: list[dict[str, Any]]) -> ServerError:
        if found:
            return ServerError(
                f"{what}: it has {len(found)} containers, {_names(found)}; gpuwatch watches one: name it as"
                " `supervisor.docker.container`"
            )
        return ServerError(
            f"{what}: there is no such container; found {_names(self._all(what, [])) or 'none at all'};"
            " create it, or correct `supervisor.docker` of the server"
        )

    def _answer(
        self, verb: str, path: str, what: str, options: dict[str, Any], timeout_s: float = TIMEOUT_S
    ) -> tuple[int, bytes]:
        """Status and body of one exchange; ServerError if there was none."""
        try:
            client = self._connected()
            url = f"{client.base_url}/v{client.api_version}{path}"
            timeouts_s = TIMEOUT_S, timeout_s
            with client.request(verb, url, params=options, timeout=timeouts_s, stream=True) as answer:
                body = bytes(answer.raw.read(_MOST_BYTES, decode_content=True))
        except ImportError as error:
            raise ServerError(
                f"{what}: the package docker is not installed; pip install 'gpuwatch[docker]'", permanent=True
            ) from error
        except Exception as error:  # docker's own wraps whatever it met
            self._drop()
            raise self._trouble(what, _root(error)) from error
        return answer.status_code, body

    @staticmethod
    def _check(status: int, told: bytes, what: str) -> None:
        if status >= _BAD:
            raise ServerError(f"{what}: the engine says {status}: {_message(told)}")

    def _connected(self) -> APIClient:
        """A client that speaks the newest version that both know."""
        from docker import APIClient  # noqa: PLC0415 - hosts without Docker never load it

        if self._client is None:
            # The package leaves a socket open that it cannot connect; ours is closed, and its error is plain.
            with socket.socket(socket.AF_UNIX) as line:
                line.settimeout(TIMEOUT_S)
                line.connect(str(self._path))
            self._client = APIClient(f"unix://{self._path}", version="auto", timeout=TIMEOUT_S)
        return self._client

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _trouble(self, what: str, root: BaseException) -> ServerError:
        cures: dict[type[BaseException], str] = {
            PermissionError: "add gpuwatch's user to the socket's group, docker (docs/operations.md)",
            FileNotFoundError: "start Docker, or correct `supervisor.docker.socket` of the server",
        }
        cure = cures.get(type(root), "see `systemctl status docker`")
        return ServerError(
            f"{what}: no answer from the engine at {self._path} ({root!r}); {cure}",
            permanent=isinstance(root, PermissionError),
        )


class _Call:
    """An exchange that may last, in a thread of its own; its error is kept for whoever asks next."""

    def __init__(self, call: Callable[[], None], name: str) -> None:
        self.error: ServerError | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), name=name, daemon=True)
        self._thread.start()

    def is_under_way(self) -> bool:
        return self._thread.is_alive()

    def _run(self, call: Callable[[], None]) -> None:
        try:
            call()
        except ServerError as error:
            self.error = error


def instant(at_us: int) -> str:
    """As the engine's options have it: seconds, and a fraction of nine digits."""
    return f"{at_us // 1_000_000}.{at_us % 1_000_000:06}000"


def _is_of_service(told: dict[str, Any]) -> bool:
    """Not one of `docker compose run`, which bears the labels of its service too."""
    return bool((told.get("Labels") or {}).get(f"{_LABEL}.oneoff", "False") == "False")


def _names(found: list[dict[str, Any]]) -> str:
    names = sorted(name.lstrip("/") for told in found for name in told["Names"])
    return ", ".join([*names[:_MOST_NAMES], *(["..."] if len(names) > _MOST_NAMES else [])])


def _made(make: Callable[[Any], _T], told: bytes, what: str) -> _T:
    """What this makes of the engine's JSON."""
    try:
        return make(json.loads(told))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServerError(f"{what}: the engine's answer is not as Docker's: {told[:200]!r}") from error


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def _root(error: BaseException) -> BaseException:
    """What it began with, under all that libraries wrapped around it."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error
