"""The straight line: collect, judge, decide, act, tell; and the list of jobs that walk it.

Collecting goes on beside it, a job a source. Everything after that is `tick`, one thread, one
transaction: what changed is saved first, then done. Nothing here waits, reads a clock or knows SQL.

| to find where … is decided        | look in                 |
|-----------------------------------|-------------------------|
| what a reading is                 | `sources`               |
| whether a server is down          | `servers.phase`         |
| whether tokens still come         | `servers.progress`      |
| when a rule is evaluated          | `rules.judge`           |
| whether an alert fires            | `rules.lifecycle`       |
| whether something is done, what   | `remediation.planner`   |
| which cure a failure has          | `remediation.cure`      |
| why nothing is done               | `remediation.blockers`  |
| how far a remediation has come    | `remediation.machine`   |
| when a step is done               | `remediation.steps`     |
| how a step is asked of a server   | `servers.hands`         |
| what people are told, when        | `notify`                |
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from gpuwatch import notify, remediation, rules, servers
from gpuwatch.errors import NotifyError, ServerError, SourceError, StoreError
from gpuwatch.healing import Healing, Turn, World
from gpuwatch.promql import Limits
from gpuwatch.records import (
    CANARY,
    STALE,
    Labels,
    Refusal,
    Remediation,
    Sample,
    ServerState,
    SupervisorPhase,
    SupervisorState,
    Transition,
    is_stale,
)
from gpuwatch.sources import Trees
from gpuwatch.store import Changes
from gpuwatch.troubles import Troubles
from gpuwatch.upkeep import Job, Upkeep

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gpuwatch.config import ServerSettings, Settings
    from gpuwatch.remote_write import RemoteWriter
    from gpuwatch.sources import ProbeSource, Source
    from gpuwatch.store import Store

log = logging.getLogger(__name__)

TICK_MS: Final = 1000
TICK_GRAIN_MS: Final = 100  # a tick that comes 2 ms late must not make `for: 2s` three seconds
_FIRST_READ_WAIT_MS: Final = 15_000
_MESSAGES_A_TURN: Final = 10
_SAVED_WITHIN_MS: Final = 500
# What gpuwatch says itself; every other series comes from a source.
_OWN: Final = ("ALERTS", "gpuwatch_", "server_down", "server_phase", "server_stopping", "server_start_time")
_OF_SERVERS: Final = ("server", "progress", "start")  # targets
_UNKNOWN: Final = SupervisorState(phase=SupervisorPhase.UNKNOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the straight line is made of; what belongs to one server by the server's name."""

    settings: Settings
    store: Store
    sources: Sequence[Source]
    groups: Sequence[rules.CompiledGroup]
    supervisors: Mapping[str, servers.Supervisor]
    notifiers: Mapping[str, notify.Notifier]
    started_at_ms: int
    jitter: Callable[[], float]
    writers: Mapping[str, RemoteWriter] = field(default_factory=dict)
    limits: Callable[[], Limits] = Limits
    trees: Trees = field(default_factory=Trees)
    probes: Mapping[str, ProbeSource] = field(default_factory=dict)
    starts: Mapping[str, servers.StartWatch] = field(default_factory=dict)
    hands: Mapping[str, servers.Hands] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one tick saw and did; `summary` is the sentence of the log and of systemd's STATUS.

    `hurries`: a step was asked for that may be done long before the next second.
    """

    at_ms: int
    summary: str
    transitions: Sequence[Transition] = ()
    remediations: Sequence[Remediation] = ()
    refusals: Sequence[Refusal] = ()
    hurries: bool = False


@dataclass(frozen=True, slots=True)
class _Judged:
    servers: Mapping[str, ServerState]
    verdict: rules.Verdict


class Cycle:
    """The daemon's work, apart from when it is run and where its parts come from."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.store = parts.store
        self.settings = parts.settings
        self.last_tick_ms = parts.started_at_ms
        self._ticked_at_ms: int | None = None
        self.jumped_at_ms: int | None = None
        self.last_report = Report(at_ms=parts.started_at_ms, summary="starting")
        self._read_at_ms: dict[str, int] = {}
        self._watched_since_ms = parts.started_at_ms
        self._all_seen = False
        self._series: dict[str, set[Labels]] = {}
        self._gone: set[str] = set()  # the targets that a reload took away
        self._supervision: dict[str, SupervisorState] = {}
        figures = parts.settings.evaluation
        self.judge = rules.Judge(
            parts.groups,
            watched_until_ms=parts.store.last_tick_ms(),
            outage=rules.Outage(tolerance_ms=figures.outage_tolerance, grace_ms=figures.for_grace_period),
            terms=rules.Terms(limits=parts.limits),
        )
        self._remarked: set[str] = set()  # the rules, by key, of which it was told what PromQL remarks
        self.troubles = Troubles()
        self.healing = self._healing()

    def _healing(self) -> Healing:
        return Healing(
            self.settings,
            self.store,
            self.parts.hands,
            self.troubles,
            supervised=self.parts.supervisors,
            receivers=self.parts.notifiers,
        )

    def jobs(self) -> list[Job]:
        """The schedule as data."""
        jobs = [Job(f"collect:{s.name}", s.interval_ms, partial(self.collect, s)) for s in self.parts.sources]
        jobs += [
            Job(f"observe:{name}", TICK_MS, partial(self.observe, name)) for name in self.parts.supervisors
        ]
        # One after the other within a second: what was read is judged, and what was judged is told, at once.
        jobs += [Job("tick", TICK_MS, self.tick, offset_ms=300, worker=False)]
        jobs += [
            Job(f"tell:{name}", TICK_MS, partial(self.tell, name), offset_ms=600)
            for name in self.parts.notifiers
        ]
        return [*jobs, *self._upkeep().jobs()]

    def _upkeep(self) -> Upkeep:
        return Upkeep(
            store=self.store,
            receivers=tuple(self.parts.notifiers),
            writers=self.parts.writers,
            spool_ms=self.settings.store.spool,
            starts=self.parts.starts,
            hands=self.parts.hands,
            append=self._append,
            troubles=self.troubles,
            jitter=self.parts.jitter,
        )

    def take_over(self, old: Cycle) -> None:
        """Go on where the cycle of the old settings stood, so that a reload is no restart."""
        self.last_tick_ms = old.last_tick_ms
        self.jumped_at_ms = old.jumped_at_ms
        self.last_report = old.last_report
        self._read_at_ms = old._read_at_ms
        self._watched_since_ms = old._watched_since_ms
        self.troubles = old.troubles
        self.healing = self._healing()
        self._series = old._series
        here = {s.name for s in self.parts.sources}
        here |= {f"{kind}:{s.name}" for s in self.settings.servers for kind in _OF_SERVERS}
        self._gone = old._series.keys() - here - {"gpuwatch", "ended"}
        self._supervision = old._supervision
        self.judge.take_over(old.judge)
        for key in old.judge.keys - self.judge.keys:
            self.troubles.say(f"rule {key}", "")

    # -- collect ---------------------------------------------------------------------------------

    def collect(self, source: Source, now_ms: int) -> None:
        """Read one source into the store."""
        name, _, server = source.name.partition(":")
        try:
            samples, up = source.read(now_ms), 1.0
            self.troubles.say(source.name, "")
        except SourceError as error:
            samples, up = [], 0.0
            self.troubles.say(source.name, str(error))
        is_up = Sample(Labels.of("up", source=name, server=server), now_ms, up)
        self._append(source.name, [*samples, is_up], now_ms)
        self._read_at_ms[source.name] = now_ms

    def observe(self, name: str, now_ms: int) -> None:
        """Ask a server's supervisor what it sees."""
        try:
            self._supervision[name] = self.parts.supervisors[name].observe(now_ms)
            self.parts.trees.set_root(name, self._supervision[name].pid)
            self.troubles.say(f"supervisor of {name}", "")
        except ServerError as error:
            self._supervision[name] = SupervisorState(phase=SupervisorPhase.UNKNOWN, detail=str(error))
            self.troubles.say(f"supervisor of {name}", str(error))

    # -- tick: judge, decide, act ----------------------------------------------------------------

    def tick(self, now_ms: int) -> Report:
        """Judge, decide, save what changed in one transaction, then act."""
        now_ms = (now_ms + TICK_GRAIN_MS // 2) // TICK_GRAIN_MS * TICK_GRAIN_MS
        if now_ms == self._ticked_at_ms:
            return self.last_report  # a second row of one instant would undo what the first one ended
        self._ticked_at_ms = now_ms
        self._notice_jump(now_ms)
        if self._has_unread() and now_ms - self._watched_since_ms < _FIRST_READ_WAIT_MS:
            return self.last_report  # judging what was not yet read would end alerts that go on
        wishes = self._wishes()
        judged = self._judge(now_ms)
        turn = self.healing.turn(self._world(judged, wishes, now_ms))
        messages = notify.messages_of_tick(
            transitions=judged.verdict.transitions,
            decisions=turn.decisions,
            remediations=turn.remediations,
            before=turn.before,
            host=self.settings.host,
            now_ms=now_ms,
        )
        self._append_own_samples(now_ms)
        self.store.save(
            Changes(
                alerts=judged.verdict.alerts,
                ended=judged.verdict.ended,
                transitions=judged.verdict.transitions,
                servers=tuple(judged.servers.values()),
                remediations=turn.remediations,
                notifications=notify.outbox(messages, self.parts.notifiers, now_ms),
                refusals=turn.refusals,
                revisions=turn.revisions,
                settings=turn.settings,
            ),
            now_ms,
        )
        # Else it is asked at the next tick: first the intent, then the deed; and with the intent's saving
        # may come a pause that a person left in this second.
        if turn.asks and self.store.is_saved(_SAVED_WITHIN_MS) and self._is_heeded(wishes):
            self.healing.act(turn.asks, now_ms)
        self.last_report = self._report(judged, turn, now_ms)
        return self.last_report

    def _world(self, judged: _Judged, wishes: remediation.Wishes, now_ms: int) -> World:
        return World(
            servers=judged.servers,
            firing=judged.verdict.firing,
            wishes=wishes,
            started_at_ms=self.parts.started_at_ms,
            jumped_at_ms=self.jumped_at_ms,
            now_ms=now_ms,
        )

    def _is_heeded(self, wishes: remediation.Wishes) -> bool:
        """Whether nobody paused or stopped anything since this tick began."""
        now = self._wishes()
        return (now.paused_until_ms, now.words) == (wishes.paused_until_ms, wishes.words)

    def _has_unread(self) -> bool:
        """Whether a source was not read since the watch began, at the start or after a sleep."""
        for source in self.parts.sources:
            at_ms = self._read_at_ms.get(source.name)
            if at_ms is None or self._watched_since_ms - at_ms > source.interval_ms + rules.JUMP_MS:
                return True
        return False

    def _wishes(self) -> remediation.Wishes:
        return remediation.Wishes.of(self.store.settings())

    def _end_what_went_unseen(self, now_ms: int) -> None:
        """End the series that a reload took away and, once all sources are read, those of before the start.

        Else what ended then would live on for the five minutes that a query looks back.
        """
        while self._gone:
            self._append(self._gone.pop(), [], now_ms)
        if self._all_seen or self._has_unread():
            return
        self._all_seen = True
        silent = self.store.silent_since(self.parts.started_at_ms)
        self.judge.end_unless_written(labels for labels in silent if self.judge.writes(labels))
        gone = [
            labels for labels in silent if not (self.judge.writes(labels) or labels.metric.startswith(_OWN))
        ]
        self._append("ended", [Sample(labels, now_ms, STALE) for labels in gone], now_ms)

    def _judge(self, now_ms: int) -> _Judged:
        """Which phase each server is in, and which alerts are active."""
        states = self._judge_servers(now_ms)
        self._end_what_went_unseen(now_ms)
        verdict = self.judge.judge(self.store, self.store.active_alerts(), now_ms)
        for evaluation in verdict.evaluations.values():
            self._say_of_rules(evaluation)
        return _Judged(states, verdict)

    def _say_of_rules(self, evaluation: rules.Evaluation) -> None:
        for key in evaluation.written:
            self.troubles.say(f"rule {key}", "")
        for failure in evaluation.failures:
            if failure.bug:
                self.troubles.bug(f"rule {failure.key}", failure.bug)
            else:
                self.troubles.say(f"rule {failure.key}", failure.what)
        for key in evaluation.remarks.keys() - self._remarked:
            self._remarked.add(key)
            log.warning("rule %s: %s", key, evaluation.remarks[key])

    def _judge_servers(self, now_ms: int) -> dict[str, ServerState]:
        known = self.store.servers()
        states = {}
        for server in self.settings.servers:
            supervisor = self._supervision.get(server.name, _UNKNOWN)
            state, seen = servers.observed(server, known.get(server.name), supervisor, self.store, now_ms)
            if seen:
                self._append(f"server:{server.name}", servers.samples(state), now_ms)
            try:
                self._judge_progress(server, state, now_ms)
                self.troubles.say(f"progress of {server.name}", "")
            except Exception as error:  # noqa: BLE001 (what one server's page says must not end the watch)
                self.troubles.bug(f"progress of {server.name}", error)
            states[server.name] = state
        return states

    def _judge_progress(self, server: ServerSettings, state: ServerState, now_ms: int) -> None:
        """Whether the server works, and what it is to be asked if that cannot be told."""
        probe = self.parts.probes.get(server.name)
        every_ms = server.canary.interval if probe and server.canary.enabled else None
        evidence = servers.evidence(self.store, state, now_ms=now_ms, canary_interval_ms=every_ms)
        progress = servers.judge_progress(evidence, canary_interval_ms=every_ms)
        self._append(f"progress:{server.name}", servers.progress_samples(progress), now_ms)
        if probe:
            is_asked = self.healing.wants_canary(server.name)
            probe.ask([*progress.wants, CANARY] if is_asked else progress.wants)

    # -- tell ------------------------------------------------------------------------------------

    def tell(self, receiver: str, now_ms: int) -> None:
        """Send what is due to one receiver, oldest first, as fast as it likes."""
        notifier = self.parts.notifiers[receiver]
        for _ in range(_MESSAGES_A_TURN):
            unsent = self.store.unsent(receiver, limit=1)
            if not unsent:
                return
            state = notify.receiver_state(receiver, self.store.receivers().get(receiver))
            sent_ms = self.store.sent_since(receiver, now_ms - notifier.pace.per_ms)
            due = notify.next_due(state, unsent, sent_ms, notifier.pace, now_ms)
            if due is None:
                return
            try:
                notifier.send(notify.message_of(due))
                row, state = notify.after_success(due, state, now_ms)
                self.troubles.say(f"receiver {receiver}", "")
            except NotifyError as error:
                row, state = notify.after_failure(due, state, error, now_ms, self.parts.jitter())
                self.troubles.say(f"receiver {receiver}", str(error))
            changes = Changes(notifications=[row], receivers={receiver: notify.state_json(state)})
            self.store.save(changes, None)

    # -- the daemon's view of itself -------------------------------------------------------------

    def guarded(self, job: Job, now_ms: int) -> None:
        """Run a job; what it raises is logged once and counted, and the next run goes on."""
        try:
            job.run(now_ms)
            self.troubles.say(f"job {job.name}", "")
        except StoreError as error:
            self.troubles.say(f"job {job.name}", str(error))
        except Exception as error:  # noqa: BLE001 (a bug in one job must not end the watch)
            self.troubles.bug(f"job {job.name}", error)

    def _notice_jump(self, now_ms: int) -> None:
        gap_ms = now_ms - self.last_tick_ms
        if gap_ms > rules.JUMP_MS:
            self.jumped_at_ms = self._watched_since_ms = now_ms
            log.warning("time went on by %d s at once: the clock jumped or the host slept", gap_ms // 1000)
        self.last_tick_ms = now_ms

    def _append_own_samples(self, now_ms: int) -> None:
        own: dict[Labels, float] = {
            Labels.of("gpuwatch_rules_failing"): self.troubles.count("rule "),
            Labels.of("gpuwatch_rule_evaluations_missed_total"): self.judge.missed,
            Labels.of("gpuwatch_internal_errors_total"): self.troubles.internal_errors,
            Labels.of("gpuwatch_store_dropped_scrapes_total"): self.store.dropped_scrapes,
        }
        unsent = self.store.unsent_count()
        rows = self.store.receivers()
        for name in self.parts.notifiers:
            state = notify.receiver_state(name, rows.get(name))
            own[Labels.of("gpuwatch_receiver_broken", receiver=name)] = state.broken_since_ms is not None
            own[Labels.of("gpuwatch_notifications_unsent", receiver=name)] = unsent.get(name, 0)
        for name, fault in self.store.faults().items():
            own[Labels.of("gpuwatch_store_failing", file=name)] = bool(fault)
            self.troubles.say(f"store {name}", fault)
        self._append("gpuwatch", [Sample(k, now_ms, float(value)) for k, value in own.items()], now_ms)

    def _append(self, target: str, samples: Sequence[Sample], now_ms: int) -> None:
        """Into the store; a series that this target no longer gives ends here."""
        present = {sample.labels for sample in samples if not is_stale(sample.value)}
        ended = self._series.get(target, set()) - {sample.labels for sample in samples}
        self._series[target] = present
        given = [*samples, *(Sample(labels, now_ms, STALE) for labels in ended)]
        if given:
            self.store.append(target, now_ms, [s.labels for s in given], [s.value for s in given])

    def _report(self, judged: _Judged, turn: Turn, now_ms: int) -> Report:
        advanced, refusals = turn.remediations, turn.refusals
        before = {r.plan.id: r.phase for r in self.last_report.remediations}
        for line in notify.log_lines(judged.verdict.transitions, advanced, before):
            log.info(line)
        return Report(
            at_ms=now_ms,
            summary=notify.summary(judged.servers.values(), judged.verdict.firing, advanced, refusals),
            transitions=judged.verdict.transitions,
            remediations=advanced,
            refusals=refusals,
            hurries=any(r.since_ms == self._ticked_at_ms for r, _ in turn.asks),
        )
