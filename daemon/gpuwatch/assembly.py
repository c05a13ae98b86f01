"""Builds the straight line from the settings: which eyes, hands and voices this host has; runs nothing."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from gpuwatch import clock, config, notify, promql, remediation, remote_write, rules, servers, sources
from gpuwatch.cycle import Cycle, Parts
from gpuwatch.errors import StoreError
from gpuwatch.guest import wire
from gpuwatch.store import Changes, Disk, Store

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpuwatch.config import ServerSettings, Settings
    from gpuwatch.records import Revision
    from gpuwatch.remote_write import RemoteWriter
    from gpuwatch.sources.recording import Recording

log = logging.getLogger(__name__)

_API: Final = "api_server"
_LEAST_WINDOW_MS: Final = 3_600_000
_SPARE_MS: Final = 10_000
_SAMPLES_A_RULE: Final = 5_000_000  # at some 30 bytes each
_CPU_SECONDS_A_RULE: Final = 1.0  # of the tick that all rules share; one takes a millisecond


def load(path: Path | None) -> tuple[Settings, tuple[rules.CompiledGroup, ...]]:
    """Settings and compiled rules; ConfigError or RuleError with places."""
    settings = config.load_settings(path)
    return settings, compile_rules(settings)


def compile_rules(settings: Settings) -> tuple[rules.CompiledGroup, ...]:
    """The rule files of the settings, checked; ConfigError or RuleError with places."""
    return rules.compile_groups(config.load_rules(config.rule_paths(settings)))


def for_recording(settings: Settings) -> Settings:
    """A recording holds one server; without a configured one it is called vllm."""
    named = settings.servers[:1] or [config.ServerSettings(name="vllm")]
    return msgspec.structs.replace(settings, servers=named)


def open_store(settings: Settings, groups: Sequence[rules.CompiledGroup], now_ms: int) -> Store:
    """The databases in the state folder; StoreError if they cannot be used.

    Where a damaged state.db may have held a pause, a person must say that remediation may go on.
    """
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"state folder {settings.state_dir}: {error.strerror}; create it or set state_dir"
        raise StoreError(message) from error
    store = Store(window_ms(groups), Disk(settings.state_dir, settings.store, settings.host, now_ms))
    if store.words_lost:
        log.warning("remediation is paused: a damaged state.db may have held a pause; gpuwatch resume")
        store.save(Changes(settings=remediation.wishes.pause(remediation.FOREVER_MS)), None)
    return store


def window_ms(groups: Sequence[rules.CompiledGroup]) -> int:
    """How much of the past is at hand: an hour, or as far as a rule looks back."""
    return max([_LEAST_WINDOW_MS, *(group.window_ms for group in groups)]) + _SPARE_MS


def rule_limits() -> promql.Limits:
    """What one rule may take, from now on, in the thread that asks: a host that is busy is no fault of it."""
    end_s = clock.thread_cpu_s() + _CPU_SECONDS_A_RULE
    return promql.Limits(samples=_SAMPLES_A_RULE, is_over=lambda: clock.thread_cpu_s() > end_s)


def remote_writers(settings: Settings) -> Mapping[str, RemoteWriter]:
    """Who gets all samples; ConfigError if what that needs is not installed."""
    if not settings.store.remote_write:
        return {}
    return remote_write.of_settings(settings.store.remote_write, settings.host)


def cycle(
    settings: Settings,
    groups: Sequence[rules.CompiledGroup],
    store: Store,
    started_at_ms: int,
    trees: sources.Trees | None = None,
) -> Cycle:
    """The straight line of this host; `trees` is what was known of its servers' processes before a reload."""
    trees = trees or sources.Trees()
    probes = sources.probes_of(settings)
    supervised = [server for server in settings.servers if server.supervisor]
    supervisors = {s.name: servers.supervisor_of(s, settings.state_dir) for s in supervised}
    return Cycle(
        Parts(
            settings=settings,
            store=store,
            sources=[*sources.of_host(settings, trees), *probes.values()],
            groups=groups,
            supervisors=supervisors,
            notifiers=notify.of_settings(settings.receivers, clock.SystemClock()),
            started_at_ms=started_at_ms,
            jitter=random.random,
            writers=remote_writers(settings),
            limits=rule_limits,
            trees=trees,
            probes=probes,
            starts={s.name: servers.start_watch_of(s, settings.state_dir) for s in supervised},
            hands={s.name: _hands(s, settings, supervisors[s.name], store, trees) for s in supervised},
        )
    )


def _hands(
    server: ServerSettings,
    settings: Settings,
    supervisor: servers.Supervisor,
    store: Store,
    trees: sources.Trees,
) -> servers.Hands:
    """What can be done to a server through its supervisor, its guests and its settings."""

    def python() -> str:
        """The interpreter that has vLLM, by the settings, else by what the server runs or would run."""
        proc = sources.Procfs()
        lines = [proc.words(m.identity.pid) for m in trees.members(server.name) if m.role == _API]
        found = map(servers.interpreter_of, [*lines, supervisor.command])
        return str(server.python or next(filter(None, found), ""))

    def revision(number: int) -> Revision | None:
        return next((r for r in store.revisions(server.name) if r.number == number), None)

    return servers.Hands(
        server,
        supervisor,
        guests=Path(wire.folder()),
        errands=errands(settings.state_dir),
        revisions=servers.Revisions(server.name, server.revisions) if server.revisions else None,
        members=lambda: [member.identity.pid for member in trees.members(server.name)],
        python=python,
        revision_of=revision,
        session=sources.local_session(),
    )


def errands(state_dir: Path) -> servers.Errands:
    """What runs beside the daemon; its output, which people are told, loses whatever looks like a secret."""
    return servers.Errands(
        folder=state_dir / "errands", redact=lambda text: notify.redact(servers.redacted(text))
    )


def played(
    settings: Settings,
    groups: Sequence[rules.CompiledGroup],
    store: Store,
    started_at_ms: int,
    recording: Recording,
    voices: Mapping[str, notify.Notifier] | None = None,
) -> Cycle:
    """The straight line of a recorded host; `voices` replaces the settings' receivers."""
    name = settings.servers[0].name
    if voices is None:
        voices = notify.of_settings(settings.receivers, clock.SystemClock())
    return Cycle(
        Parts(
            settings=settings,
            store=store,
            sources=sources.aliased(recording.sources(name), settings),
            groups=groups,
            supervisors={name: servers.PlayedSupervisor(recording.has_server_process)},
            notifiers=voices,
            started_at_ms=started_at_ms,
            jitter=random.random,
            limits=rule_limits,
        )
    )
