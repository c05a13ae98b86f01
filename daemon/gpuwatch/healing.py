"""The second half of a tick: whether something is done, how far it has come, and what is asked of servers.

What is decided is in `remediation`, which is pure: it is given here all that a decision may depend on, and
what comes of it is carried out. Nothing here waits, reads a clock or knows SQL.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from gpuwatch import notify, remediation, servers
from gpuwatch.errors import ServerError
from gpuwatch.records import LIVE_PHASES, Phase, Plan, Refusal, Remediation, Sight
from gpuwatch.store import Changes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gpuwatch.config import ServerSettings, Settings
    from gpuwatch.records import Alert, Errand, Labels, Revision, ServerStart, ServerState, Step
    from gpuwatch.store import Store
    from gpuwatch.troubles import Troubles

_HISTORY: Final = 100
_STARTS: Final = 50
_UNSEEN: Final = Sight()
# Alerts that tell of what a remediation does: they prove nothing against it.
_OWN_DOING: Final = frozenset({"VLLMSettingsReduced", "VLLMRestartLoop"})

Ask: TypeAlias = "tuple[Remediation, Step]"


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is so at this tick: each server, what fires, and what people wish."""

    servers: Mapping[str, ServerState]
    firing: Sequence[Alert]
    wishes: remediation.Wishes
    started_at_ms: int
    jumped_at_ms: int | None
    now_ms: int


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one server: what is seen of it, and its starts and revisions, newest first."""

    sight: Sight = _UNSEEN
    starts: Sequence[ServerStart] = ()
    revisions: Sequence[Revision] = ()


@dataclass(slots=True)
class Turn:
    """What this tick decided: to be saved before `asks` are asked.

    What it gathered for that is gathered once: `known` of each server that something depends on, and the
    `histories` by server, with that of all of them by None.
    """

    decisions: dict[tuple[str, Labels], Plan | Refusal] = field(default_factory=dict)
    before: Sequence[Remediation] = ()
    begun: list[Remediation] = field(default_factory=list)
    known: dict[str, Known] = field(default_factory=dict)
    histories: dict[str | None, Sequence[Remediation]] = field(default_factory=dict)
    remediations: list[Remediation] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    revisions: list[Revision] = field(default_factory=list)
    settings: dict[str, str | None] = field(default_factory=dict)
    asks: list[Ask] = field(default_factory=list)


class Healing:
    """Decides and acts for the servers of `settings`; `hands` are those that can be touched, by name."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        hands: Mapping[str, servers.Hands],
        troubles: Troubles,
        *,
        supervised: Iterable[str],
        receivers: Iterable[str],
    ) -> None:
        """Touch nothing yet. `supervised` are the servers that somebody could restart."""
        self._settings = settings
        self._servers: dict[str, ServerSettings] = {server.name: server for server in settings.servers}
        self._store = store
        self._hands = hands
        self._troubles = troubles
        self._supervised = frozenset(supervised)
        self._receivers = tuple(receivers)
        self._limits = remediation.Limits.of(settings.remediation)

    # -- decide ----------------------------------------------------------------------------------

    def turn(self, world: World) -> Turn:
        """For each firing alert and each wish a plan, or why none; what is live goes one tick further."""
        turn = Turn(before=self._store.live_remediations())
        for server, change in world.wishes.changes.items():
            self._grant(server, change, world, turn)
        for alert in world.firing:
            situation = self._situation(alert, world, turn)
            decision = remediation.decide(situation, self._settings.remediation.mode)
            turn.decisions[alert.identity] = self._taken(decision, turn, world.now_ms)
        turn.refusals += [made for made in turn.decisions.values() if isinstance(made, Refusal)]
        for present in [*turn.before, *turn.begun]:
            self._advance(present, world, turn)
        turn.settings |= remediation.wishes.forgotten(turn.remediations)
        return turn

    def _grant(self, server: str, change: remediation.Change, world: World, turn: Turn) -> None:
        """What a person wishes of a server's arguments: done, refused for good, or left until it can be."""
        alert = remediation.asked(server, change)
        decision = remediation.decide_change(self._situation(alert, world, turn), change)
        made = self._taken(decision, turn, world.now_ms)
        if isinstance(made, Refusal):
            turn.refusals.append(made)
            if made.code not in remediation.PASSING:
                turn.settings |= remediation.wishes.dropped(server)
        elif made.after is not None:
            turn.settings |= remediation.wishes.granted(server, made.after)

    def _taken(self, decision: remediation.Decision | Refusal, turn: Turn, now_ms: int) -> Plan | Refusal:
        """A plan begins; what it needs is saved with it."""
        if isinstance(decision, Refusal):
            return decision
        turn.begun.append(remediation.begin(decision.plan, now_ms))
        if decision.revision:
            turn.revisions.append(decision.revision)
        return decision.plan

    def _situation(self, alert: Alert, world: World, turn: Turn) -> remediation.Situation:
        state = self._server_of(alert, world.servers)
        name = state.name if state else ""
        given = self._servers.get(name)
        policy = remediation.choose(self._settings.policies, alert)
        matters = state is not None and (not alert.rule or (policy is not None and bool(policy.steps)))
        known = self._known(state, turn, world.now_ms) if state and matters else Known()
        return remediation.Situation(
            alert=alert,
            policy=policy,
            server=state,
            has_supervisor=name in self._supervised,
            history=self._history(name, turn) if matters else (),
            all_history=self._history(None, turn) if matters else (),
            limits=self._limits,
            paused_until_ms=world.wishes.paused_until_ms,
            resumed_at_ms=world.wishes.resumed_at_ms,
            skip_until_ms=world.wishes.skip_until_ms,
            started_at_ms=world.started_at_ms,
            jumped_at_ms=world.jumped_at_ms,
            sight=known.sight,
            starts=known.starts,
            revisions=known.revisions,
            wanted=world.wishes.wanted.get(name),
            bounds=given.bounds if given else {},
            quantised_model=given.quantised_model if given else "",
            now_ms=world.now_ms,
        )

    def _server_of(self, alert: Alert, states: Mapping[str, ServerState]) -> ServerState | None:
        """The server that an alert speaks of: by its label, or the only one there is."""
        name = alert.labels.get("server")
        if name:
            return states.get(name)
        return next(iter(states.values())) if len(states) == 1 else None

    def _history(self, server: str | None, turn: Turn) -> list[Remediation]:
        """Of one server or of all, the newest first: what this turn began, then what is saved."""
        if server not in turn.histories:
            turn.histories[server] = self._store.remediations(server, limit=_HISTORY)
        begun = [r for r in turn.begun if server in {None, r.plan.server}]
        return [*begun, *turn.histories[server]]

    def _known(self, state: ServerState, turn: Turn, now_ms: int) -> Known:
        """Looked at once a tick, and only where something depends on it."""
        if state.name not in turn.known:
            starts = self._store.starts(state.name, limit=_STARTS)
            turn.known[state.name] = Known(
                sight=self._sight(state, starts, now_ms),
                starts=starts,
                revisions=self._store.revisions(state.name),
            )
        return turn.known[state.name]

    def _sight(self, state: ServerState, starts: Sequence[ServerStart], now_ms: int) -> Sight:
        hands = self._hands.get(state.name)
        return servers.sight(
            self._store,
            state,
            starts=starts,
            errands=self._errands(hands, state.name) if hands else {},
            revision=hands.revision() if hands else None,
            now_ms=now_ms,
        )

    def _errands(self, hands: servers.Hands, server: str) -> Mapping[str, Errand]:
        try:
            found = hands.errands()
        except ServerError as error:
            self._troubles.say(f"errands of {server}", str(error))
            return {}
        self._troubles.say(f"errands of {server}", "")
        return found

    # -- advance ---------------------------------------------------------------------------------

    def _advance(self, present: Remediation, world: World, turn: Turn) -> None:
        """One remediation one tick further; at its end what it cost, and what of a person's wish is left."""
        seen = self._seen(present, world, turn)
        moved, step = remediation.advance(present, seen, world.now_ms)
        if moved.phase not in LIVE_PHASES:
            moved = self._accounted(moved, world.now_ms)
            turn.settings |= _unwished(moved)
        turn.remediations.append(moved)
        if step:
            turn.asks.append((moved, step))

    def _seen(self, r: Remediation, world: World, turn: Turn) -> remediation.Seen:
        plan, wishes = r.plan, world.wishes
        word, by = wishes.words.get(plan.id, ("", ""))
        state = world.servers.get(plan.server)
        if state is None or (plan.server not in self._hands and not plan.dry_run):
            word, by = "abort", "configuration"
        return remediation.Seen(
            server=state or servers.unseen(plan.server, world.now_ms),
            alert_firing=any(a.identity == (plan.alert, plan.alert_labels) for a in world.firing),
            paused=wishes.paused_until_ms is not None and world.now_ms < wishes.paused_until_ms,
            word=word,
            by=by,
            approval_expires_ms=self._settings.remediation.approval_expires,
            sight=self._known(state, turn, world.now_ms).sight if state and not plan.dry_run else _UNSEEN,
            new_alerts=_new_alerts(r, world.firing),
        )

    def _accounted(self, r: Remediation, now_ms: int) -> Remediation:
        """With what it cost and gave; a rehearsal did neither."""
        if r.plan.dry_run or r.asked_at_ms is None:
            return r
        return dataclasses.replace(r, account=servers.account(self._store, r, ended_at_ms=now_ms))

    # -- act -------------------------------------------------------------------------------------

    def act(self, asks: Iterable[Ask], now_ms: int) -> None:
        """Ask each step of its server; the intent is saved already. What is heard counts at the next tick."""
        for r, step in asks:
            what = f"step {step.action} of {r.plan.id}"
            key = remediation.errand_key(r, step)
            task = servers.Task(id=r.plan.id, key=key, since_ms=r.since_ms, alert=r.plan.alert)
            try:
                heard = self._hands[r.plan.server].do(step, task, now_ms)
            except ServerError as error:
                self._troubles.say(what, str(error))
                if error.permanent:
                    self._give_up(r, str(error), now_ms)
                continue
            except Exception as error:  # noqa: BLE001
                # An unexpected fault in a hand: touch this server no more until a person has looked.
                self._troubles.bug(what, error)
                self._give_up(r, f"internal error: {error!r}", now_ms)
                continue
            self._troubles.say(what, "")
            if heard:
                kept = dataclasses.replace(r, heard={**r.heard, **heard})
                self._store.save(Changes(remediations=[kept]), None)

    def wants_canary(self, server: str) -> bool:
        """Whether a remediation waits for the server to answer a request for one token."""
        live = (r for r in self._store.live_remediations() if r.plan.server == server)
        steps = (remediation.present(r) for r in live)
        return any(step is not None and step.action == "canary" for step in steps)

    def _give_up(self, r: Remediation, detail: str, now_ms: int) -> None:
        """A hand said no for good: what was done is taken back, or the step is left out."""
        moved = remediation.refused(r, detail, now_ms)
        messages = notify.messages_of_tick(
            transitions=(),
            decisions={},
            remediations=[moved],
            before=[r],
            host=self._settings.host,
            now_ms=now_ms,
        )
        rows = notify.outbox(messages, self._receivers, now_ms)
        self._store.save(Changes(remediations=[moved], notifications=rows), now_ms)


def _unwished(r: Remediation) -> Mapping[str, str | None]:
    """What a person wished and did not come true is wanted no more: what was wanted before, is again."""
    wanted = r.plan.signals.get("wanted", r.plan.before)
    if not r.plan.by or wanted is None or r.phase is Phase.SUCCEEDED:
        return {}
    return remediation.wishes.wants(r.plan.server, int(wanted))


def _new_alerts(r: Remediation, firing: Iterable[Alert]) -> tuple[str, ...]:
    """The rules that fire for its server since it was planned, and are not what it was planned for."""
    found = {
        alert.rule
        for alert in firing
        if alert.labels.get("server") == r.plan.server
        and alert.rule != r.plan.alert
        and alert.rule not in _OWN_DOING
        and (alert.fired_at_ms or alert.active_at_ms) > r.created_at_ms
    }
    return tuple(sorted(found))
