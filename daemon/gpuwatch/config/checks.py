"""What types cannot say of the settings: which values make no sense; decodes nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpuwatch.config.document import PathKey
    from gpuwatch.config.settings import RemoteWriteSettings, Settings, StoreSettings, SupervisorSettings

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_LEAST_RETENTION_MS: Final = 2 * 3_600_000
_MOST_METRICS_MS: Final = 5_000
_LEAST_CANARY_MS: Final = 15_000
_MOST_CANARY_MS: Final = 3_600_000  # what is at hand of the past
_LEAST_SIZE_BYTES: Final = 64 * 2**20
_ALIASES: Final = ("dcgm",)
ACTIONS: Final = (
    "release_cache",
    "limit_admission",
    "limit_running",
    "reset_prefix_cache",
    "sleep_wake",
    "drain",
    "restart",
    "reconfigure",
    "capture",
    "run",
)
"""What the steps of a policy may be; `remediation.actions` says what each is made of."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is wrong with the value at `path`."""

    path: PathKey
    what: str


def troubles(settings: Settings) -> list[Trouble]:
    """What types cannot say."""
    found = [*_name_troubles(settings), *_server_troubles(settings), *_receiver_troubles(settings)]
    found += _store_troubles(settings.store)
    found += [
        Trouble(("metrics", "aliases", i), f"unknown names {alias!r}; known: {', '.join(_ALIASES)}")
        for i, alias in enumerate(settings.metrics.aliases)
        if alias not in _ALIASES
    ]
    for i, policy in enumerate(settings.policies):
        found += [
            Trouble(("policies", i, "steps"), f"unknown step {step!r}; known: {', '.join(ACTIONS)}")
            for step in policy.steps
            if step not in ACTIONS
        ]
        if "run" in policy.steps and not policy.command:
            found.append(Trouble(("policies", i, "command"), "is empty, and the step run needs one"))
    intervals = settings.sources.__struct_fields__
    found += [
        Trouble(("sources", name), "must be at least 100ms")
        for name in intervals
        if getattr(settings.sources, name) < 100
    ]
    if settings.sources.metrics_interval > _MOST_METRICS_MS:
        found.append(Trouble(("sources", "metrics_interval"), "must be 5s or less, to see steps come"))
    if settings.remediation.budget.count < 1:
        found.append(Trouble(("remediation", "budget", "count"), "must be 1 or more; use mode: observe"))
    if settings.remediation.breaker.count < 1:
        found.append(Trouble(("remediation", "breaker", "count"), "must be 1 or more; use mode: observe"))
    if settings.lang not in {"en", "zh"}:
        found.append(Trouble(("lang",), f"{settings.lang!r} is not en or zh"))
    return found


def _name_troubles(settings: Settings) -> list[Trouble]:
    found = []
    named: list[tuple[PathKey, list[str]]] = [
        (("servers",), [s.name for s in settings.servers]),
        (("receivers",), [r.name for r in settings.receivers]),
        (("store", "remote_write"), [w.name for w in settings.store.remote_write]),
    ]
    for key, names in named:
        for i, name in enumerate(names):
            if not _NAME.fullmatch(name):
                found.append(Trouble((*key, i, "name"), f"{name!r}: use letters, digits, . _ -"))
            if name in names[:i]:
                found.append(Trouble((*key, i, "name"), f"{name!r} is there already"))
    return found


def _store_troubles(store: StoreSettings) -> list[Trouble]:
    found = []
    if store.retention < _LEAST_RETENTION_MS:
        found.append(Trouble(("store", "retention"), "must be at least 2h, which rules may look back on"))
    if store.max_size < _LEAST_SIZE_BYTES:
        found.append(Trouble(("store", "max_size"), "must be at least 64MiB"))
    if store.state_url and store.state_url_file:
        found.append(Trouble(("store", "state_url"), "is there beside state_url_file; give one of them"))
    if re.match(r"[^/]*//[^/@]*:[^/@]*@", store.state_url):
        found.append(Trouble(("store", "state_url"), "holds a password; put the URL in a state_url_file"))
    if store.state_url and not store.state_url.startswith("postgresql+psycopg://"):
        found.append(Trouble(("store", "state_url"), "must begin with postgresql+psycopg://"))
    return found + _remote_write_troubles(store.remote_write)


def _remote_write_troubles(receivers: Sequence[RemoteWriteSettings]) -> list[Trouble]:
    found = []
    for i, receiver in enumerate(receivers):
        if not re.match(r"https?://[^/]", receiver.url):
            found.append(Trouble(("store", "remote_write", i, "url"), f"{receiver.url!r} is no http URL"))
        if receiver.username and (receiver.password_file is None or receiver.bearer_token_file):
            what = "needs a password_file and no bearer_token_file"
            found.append(Trouble(("store", "remote_write", i, "username"), what))
    return found


def _server_troubles(settings: Settings) -> list[Trouble]:
    found = []
    for i, server in enumerate(settings.servers):
        for path, what in _supervisor_troubles(server.supervisor):
            found.append(Trouble(("servers", i, "supervisor", *path), what))
        if not re.match(r"https?://[^/]", server.url):
            found.append(Trouble(("servers", i, "url"), f"{server.url!r} is no http URL"))
        if not _LEAST_CANARY_MS <= server.canary.interval <= _MOST_CANARY_MS:
            found.append(Trouble(("servers", i, "canary", "interval"), "must be between 15s and 1h"))
        if not 1000 <= server.canary.timeout <= 60_000:
            found.append(Trouble(("servers", i, "canary", "timeout"), "must be between 1s and 1m"))
        for name, bound in server.bounds.items():
            if len(bound) != 2 or bound[0] > bound[1]:
                found.append(Trouble(("servers", i, "bounds", name), "must be [least, most]"))
    return found


def _supervisor_troubles(supervisor: SupervisorSettings | None) -> Iterator[tuple[PathKey, str]]:
    if supervisor is None:
        return
    kinds = (supervisor.systemd, supervisor.process, supervisor.docker)
    if sum(kind is not None for kind in kinds) != 1:
        yield (), "needs exactly one of systemd, process, docker"
    if supervisor.systemd and not supervisor.systemd.endswith(".service"):
        yield ("systemd",), "must end in .service"
    if supervisor.process and not supervisor.process.command:
        yield ("process", "command"), "is empty"
    docker = supervisor.docker
    if docker and bool(docker.container) == bool(docker.project and docker.service):
        yield ("docker",), "needs a container, or a project and a service"


def _receiver_troubles(settings: Settings) -> list[Trouble]:
    found = []
    for i, receiver in enumerate(settings.receivers):
        if (receiver.slack is None) == (receiver.dingtalk is None):
            found.append(Trouble(("receivers", i), "needs exactly one of slack, dingtalk"))
        if receiver.lang not in {"en", "zh"}:
            found.append(Trouble(("receivers", i, "lang"), f"{receiver.lang!r} is not en or zh"))
    return found
