"""The table, the blockers and the planner: whole state in, one event, whole state out."""

import dataclasses
import itertools

import pytest

from gpuwatch import config, remediation
from gpuwatch.records import (
    LIVE_PHASES,
    Alert,
    AlertState,
    Labels,
    Mode,
    Phase,
    Plan,
    Refusal,
    ServerPhase,
    ServerState,
    Step,
    SupervisorPhase,
    SupervisorState,
)
from gpuwatch.remediation import Event, Seen, Situation, machine

NOW = 1_800_000_000_000
LIMITS = remediation.Limits(
    cooldown_ms=300_000,
    budget_count=3,
    budget_per_ms=3_600_000,
    verify_for_ms=30_000,
    step_within_ms=600_000,
    just_started_grace_ms=60_000,
)
ALERT = Alert(
    rule="VLLMDown",
    labels=Labels.of(alertname="VLLMDown", server="m", remediation="restart"),
    annotations={},
    state=AlertState.FIRING,
    value=1.0,
    active_at_ms=NOW - 3000,
    fired_at_ms=NOW,
)
RESTART = config.DEFAULT_POLICIES[0]


def server(phase=ServerPhase.DOWN, supervisor=SupervisorPhase.INACTIVE, **more):
    state = SupervisorState(phase=supervisor, **{k: more.pop(k) for k in ("started_at_ms",) if k in more})
    return ServerState(name="m", phase=phase, since_ms=NOW, seen_at_ms=NOW, supervisor=state, **more)


def situation(**changes):
    whole = Situation(
        alert=ALERT,
        policy=RESTART,
        dry_run=False,
        server=server(),
        has_supervisor=True,
        history=[],
        limits=LIMITS,
        paused_until_ms=None,
        resumed_at_ms=0,
        started_at_ms=NOW - 3_600_000,
        jumped_at_ms=None,
        now_ms=NOW,
    )
    return dataclasses.replace(whole, **changes)


def plan(mode=Mode.AUTO, dry_run=False):
    return Plan(
        id="GW-1",
        server="m",
        alert="VLLMDown",
        alert_labels=ALERT.labels,
        steps=(Step(action="restart", within_ms=600_000),),
        verify_for_ms=30_000,
        mode=mode,
        dry_run=dry_run,
        policy="restart",
    )


def past(phase, at_ms, dry_run=False, asked=True):
    begun = remediation.begin(plan(dry_run=dry_run), at_ms)
    return dataclasses.replace(begun, phase=phase, asked_at_ms=at_ms if asked else None)


BLOCKED = [
    ("no_policy", {"policy": None}),
    ("notify_only", {"policy": config.DEFAULT_POLICIES[1]}),
    ("no_server", {"server": None}),
    ("under_way", {"history": [past(Phase.APPLYING, NOW - 1000)]}),
    ("observe_mode", {"dry_run": True, "history": [past(Phase.REHEARSED, NOW - 1000, dry_run=True)]}),
    ("paused", {"paused_until_ms": NOW + 1}),
    ("paused_open", {"paused_until_ms": remediation.FOREVER_MS}),
    ("no_supervisor", {"has_supervisor": False}),
    ("stopped_by_operator", {"server": server(ServerPhase.STOPPED)}),
    ("just_started", {"started_at_ms": NOW - 59_999}),
    ("clock_jumped", {"jumped_at_ms": NOW - 1}),
    ("stale_data", {"server": dataclasses.replace(server(), seen_at_ms=NOW - 30_001)}),
    ("supervisor_unknown", {"server": server(supervisor=SupervisorPhase.UNKNOWN)}),
    ("auto_restart", {"server": server(supervisor=SupervisorPhase.AUTO_RESTART)}),
    ("starting", {"server": server(supervisor=SupervisorPhase.ACTIVE, starting_since_ms=NOW - 1)}),
    ("starting", {"server": server(supervisor=SupervisorPhase.ACTIVATING)}),
    ("starting", {"server": server(supervisor=SupervisorPhase.DEACTIVATING)}),
    ("failed_before", {"history": [past(Phase.FAILED, NOW - 86_400_000)]}),
    ("cooling_down", {"history": [past(Phase.SUCCEEDED, NOW - 299_999)]}),
    ("budget_spent", {"history": [past(Phase.SUCCEEDED, NOW - n * 600_000) for n in (1, 2, 3)]}),
]


@pytest.mark.parametrize(("code", "changes"), BLOCKED)
def test_each_blocker_blocks(code, changes):
    decision = remediation.decide(situation(**changes), Mode.AUTO)
    assert isinstance(decision, Refusal)
    assert decision.code == code


def test_every_blocker_has_a_case_above():
    named = {blocker.__name__ for blocker in remediation.BLOCKERS}
    codes = {{"observe_mode": "rehearsed", "paused_open": "paused"}.get(code, code) for code, _ in BLOCKED}
    assert named == codes


def test_when_nothing_objects_there_is_a_plan():
    decision = remediation.decide(situation(), Mode.AUTO)
    assert isinstance(decision, Plan)
    assert [step.action for step in decision.steps] == ["restart"]
    assert decision.mode is Mode.AUTO


@pytest.mark.parametrize(
    "changes",
    [
        {"history": [past(Phase.SUCCEEDED, NOW - 300_000)]},  # the cooldown is over to the millisecond
        {"history": [past(Phase.FAILED, NOW - 600_000)], "resumed_at_ms": NOW - 1},  # a person said go on
        {
            "history": [past(Phase.ABORTED, NOW - 600_000 * n, asked=False) for n in (1, 2, 3)]
        },  # none was asked
        {"paused_until_ms": NOW},
        {"started_at_ms": NOW - 60_000},
    ],
)
def test_what_no_longer_blocks(changes):
    assert isinstance(remediation.decide(situation(**changes), Mode.AUTO), Plan)


def test_a_blocker_that_raises_blocks():
    broken = situation(limits=None)
    decision = remediation.decide(broken, Mode.AUTO)
    assert isinstance(decision, Refusal)
    assert decision.code == "internal_error"


def test_the_policy_is_the_first_whose_labels_match():
    first = config.Policy(name="mine", match={"alertname": "VLLMDown", "server": "m"})
    assert remediation.choose([first, RESTART], ALERT) is first
    assert remediation.choose([config.Policy(name="x", match={"server": "other"}), RESTART], ALERT) is RESTART
    assert remediation.choose([], ALERT) is None


def test_the_mode_of_a_policy_beats_the_general_one():
    careful = config.Policy(name="careful", match={}, steps=["restart"], mode=Mode.APPROVE)
    assert remediation.decide(situation(policy=careful), Mode.AUTO).mode is Mode.APPROVE


def seen(state=None, **changes):
    return Seen(
        server=state or server(), **{"alert_firing": True, "approval_expires_ms": 1_800_000, **changes}
    )


def at(phase, since_ms=NOW, mode=Mode.AUTO, **more):
    begun = remediation.begin(plan(mode), since_ms)
    return dataclasses.replace(begun, phase=phase, since_ms=since_ms, **more)


SERVING_ANEW = server(ServerPhase.SERVING, SupervisorPhase.ACTIVE, started_at_ms=NOW + 1)

CASES = [  # (name, remediation, seen, after, phase, asks for a step)
    ("auto acts at once", at(Phase.PLANNED), seen(), 0, Phase.APPLYING, True),
    ("approve asks first", at(Phase.PLANNED, mode=Mode.APPROVE), seen(), 0, Phase.AWAITING_APPROVAL, False),
    ("waits for a word", at(Phase.AWAITING_APPROVAL), seen(), 1000, Phase.AWAITING_APPROVAL, False),
    ("approved", at(Phase.AWAITING_APPROVAL), seen(word="approved"), 1000, Phase.APPLYING, True),
    ("denied", at(Phase.AWAITING_APPROVAL), seen(word="denied"), 1000, Phase.ABORTED, False),
    ("expired", at(Phase.AWAITING_APPROVAL), seen(), 1_800_000, Phase.ABORTED, False),
    ("nothing left to do", at(Phase.AWAITING_APPROVAL), seen(alert_firing=False), 1, Phase.ABORTED, False),
    ("asked again until seen", at(Phase.APPLYING, asked_at_ms=NOW), seen(), 9000, Phase.APPLYING, True),
    ("serving anew", at(Phase.APPLYING), seen(SERVING_ANEW), 9000, Phase.VERIFYING, False),
    (
        "healed by itself",
        at(Phase.APPLYING),
        seen(server(ServerPhase.SERVING), alert_firing=False),
        1,
        Phase.VERIFYING,
        False,
    ),
    (
        "died again",
        at(Phase.APPLYING),
        seen(server(supervisor=SupervisorPhase.FAILED, started_at_ms=NOW + 1)),
        9000,
        Phase.FAILED,
        False,
    ),
    ("late", at(Phase.APPLYING), seen(), 600_000, Phase.FAILED, False),
    ("paused", at(Phase.APPLYING), seen(paused=True), 1, Phase.ABORTED, False),
    ("aborted", at(Phase.VERIFYING), seen(SERVING_ANEW, word="abort"), 1, Phase.ABORTED, False),
    ("down again", at(Phase.VERIFYING), seen(server()), 1, Phase.FAILED, False),
    (
        "good for long enough",
        at(Phase.VERIFYING, good_since_ms=NOW),
        seen(SERVING_ANEW, alert_firing=False),
        30_000,
        Phase.SUCCEEDED,
        False,
    ),
    (
        "not good for long enough",
        at(Phase.VERIFYING, good_since_ms=NOW),
        seen(SERVING_ANEW, alert_firing=False),
        29_999,
        Phase.VERIFYING,
        False,
    ),
    ("the alert stays", at(Phase.VERIFYING), seen(SERVING_ANEW), 360_000, Phase.FAILED, False),
]


@pytest.mark.parametrize(
    ("name", "before", "look", "after_ms", "phase", "asks"), CASES, ids=[c[0] for c in CASES]
)
def test_one_cycle_of_the_machine(name, before, look, after_ms, phase, asks):
    moved, step = remediation.advance(before, look, NOW + after_ms)
    assert moved.phase is phase
    assert (step is not None) == asks
    assert bool(moved.outcome) == (phase not in LIVE_PHASES)


def test_an_alert_that_comes_back_while_verifying_starts_the_proof_anew():
    r = at(Phase.VERIFYING, good_since_ms=NOW)
    r, _ = remediation.advance(r, seen(SERVING_ANEW, alert_firing=True), NOW + 10_000)
    assert r.good_since_ms is None


def test_a_dry_run_ends_in_words():
    moved, step = remediation.advance(remediation.begin(plan(dry_run=True), NOW), seen(), NOW)
    assert (moved.phase, moved.outcome, step) == (Phase.REHEARSED, "dry_run", None)


def test_every_live_phase_can_be_aborted_and_no_ended_one_moves():
    for phase, event in itertools.product(Phase, Event):
        known = (phase, event) in machine.TRANSITIONS
        assert not known or phase in LIVE_PHASES
    assert all((phase, Event.ABORT) in machine.TRANSITIONS for phase in LIVE_PHASES)


def test_every_end_has_words():
    ends = {event for (_, event), phase in machine.TRANSITIONS.items() if phase not in LIVE_PHASES}
    assert ends == set(machine.OUTCOMES)
