"""How far a remediation has come: each step's judge, the table of phases, walks, and any order of events."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.decisions import LIMITS, MINUTE, NOW, SECOND, server, serving

from gpuwatch import config, remediation
from gpuwatch.records import (
    LIVE_PHASES,
    ActionClass,
    Errand,
    ErrandPhase,
    Labels,
    Mode,
    Phase,
    Plan,
    Remediation,
    ServerPhase,
    ServerStart,
    Sight,
    StartOutcome,
    Step,
    StepEnd,
    SupervisorPhase,
)
from gpuwatch.remediation import ACTIONS, STEPS, Event, Seen, machine
from gpuwatch.remediation.actions import Figures, expanded, kind_of
from gpuwatch.remediation.steps import Failed, Look, judged, walked
from gpuwatch.store.codec import from_json, to_json

BEFORE, AFTER = 6, 7
FIGURES = Figures(limits=LIMITS, limit=4, before=BEFORE, after=AFTER)


def life(began_at_ms=NOW - MINUTE, revision=None, **more):
    return ServerStart(
        server="m", began_at_ms=began_at_ms, outcome=StartOutcome.HEALTHY, revision=revision, **more
    )


def seen(state=None, sight=None, **changes):
    more = {"alert_firing": True, "approval_expires_ms": 30 * MINUTE, **changes}
    return Seen(server=state or server(), sight=sight or Sight(), **more)


def plan(*actions, mode=Mode.AUTO, dry_run=False, **more):
    steps, undo = expanded(actions, FIGURES)
    changes = "reconfigure" in actions
    return Plan(
        id="GW-1",
        server="m",
        alert="VLLMDown",
        alert_labels=Labels.of(alertname="VLLMDown", server="m"),
        steps=steps,
        kind=kind_of(actions),
        before=BEFORE if changes else None,
        after=AFTER if changes else None,
        verify_for_ms=LIMITS.verify_for_ms,
        mode=mode,
        dry_run=dry_run,
        policy="p",
        **{"undo": undo, **more},
    )


def at(phase, *actions, step="", touched=True, mode=Mode.AUTO, row=None, **more):
    """A remediation that came to `phase` now, in a walk to the step of that name."""
    its = remediation.begin(plan(*(actions or ("restart",)), mode=mode, **more), NOW)
    its = dataclasses.replace(its, phase=phase, asked_at_ms=NOW if touched else None, is_cut=touched)
    index = [s.action for s in walked(its)].index(step) if step else 0
    return dataclasses.replace(its, **{"step_index": index, **(row or {})})


# -- what actions are made of ----------------------------------------------------------------------------

RESTART = "drain stop await_memory start canary open_door"
RECONFIGURE = "check drain stop await_memory swap start canary open_door"
REVERT = "swap stop await_memory start canary open_door"
WALKS = [
    ("capture", "capture", ""),
    ("run", "run", ""),
    ("release_cache", "release_cache", ""),
    ("reset_prefix_cache", "reset_prefix_cache", ""),
    ("limit_admission", "limit_admission hold lift", "lift"),
    ("limit_running", "limit_running hold lift", "lift"),
    ("limit_admission limit_running", "limit_admission limit_running hold lift", "lift"),
    ("limit_admission release_cache", "limit_admission release_cache hold lift", "lift"),
    ("sleep_wake", "sleep wake", "wake"),
    ("drain", "drain open_door", "open_door"),
    ("drain release_cache", "drain release_cache open_door", "open_door"),
    ("restart", RESTART, "start open_door"),
    ("capture restart", f"capture {RESTART}", "start open_door"),
    ("drain restart", f"drain {RESTART}", "start open_door"),
    ("reconfigure", RECONFIGURE, REVERT),
    ("reconfigure restart", f"{RECONFIGURE} {RESTART}", REVERT),
    ("limit_admission reconfigure", f"limit_admission {RECONFIGURE} hold lift", f"{REVERT} lift"),
]


@pytest.mark.parametrize(("actions", "steps", "undo"), WALKS, ids=[w[0] for w in WALKS])
def test_the_steps_of_a_plan_and_what_takes_them_back(actions, steps, undo):
    walk, back = expanded(actions.split(), FIGURES)
    assert [step.action for step in walk] == steps.split()
    assert [step.action for step in back] == undo.split()


def test_every_action_that_a_policy_may_name_is_known_and_so_is_each_of_its_steps():
    assert set(ACTIONS) == set(config.ACTIONS)
    made = [step for name in ACTIONS for walk in expanded([name], FIGURES) for step in walk]
    assert {step.action for step in made} == set(STEPS)
    assert all(step.within_ms > 0 for step in made)


def test_a_plan_is_of_the_class_of_its_costliest_action():
    assert kind_of(["capture", "limit_admission"]) is ActionClass.REVERSIBLE
    assert kind_of(["restart", "capture"]) is ActionClass.RESTART
    assert kind_of(["reconfigure", "restart"]) is ActionClass.RECONFIGURE


def test_a_revision_is_reverted_to_the_one_before_and_a_process_that_serves_it_is_kept():
    _, undo = expanded(["reconfigure"], FIGURES)
    args = {step.action: dict(step.args) for step in undo}
    assert args["swap"] == {"revision": "6"}
    assert args["stop"] == args["await_memory"] == {"keep_revision": "6"}
    assert args["start"] == {"revision": "6"}


def test_what_is_held_can_be_renewed_from_the_step_alone():
    steps, _ = expanded(["limit_admission", "limit_running"], FIGURES)
    hold = next(step for step in steps if step.action == "hold")
    assert hold.args == {"for_ms": "600000", "limit_admission": "4", "limit_running": "4"}


def test_the_command_of_a_run_is_part_of_its_step():
    (step,), _ = expanded(["run"], dataclasses.replace(FIGURES, command=("/opt/cool", "--now")))
    assert (step.args, step.within_ms) == ({"command": '["/opt/cool", "--now"]'}, MINUTE)


def test_a_reconfiguration_without_both_revisions_cannot_be_made():
    with pytest.raises(ValueError, match="two revisions"):
        expanded(["reconfigure"], Figures(limits=LIMITS, after=7))


# -- how each step is judged -----------------------------------------------------------------------------

ANEW = server(ServerPhase.SERVING, SupervisorPhase.ACTIVE, started_at_ms=NOW + 1)
DEAD_ANEW = server(supervisor=SupervisorPhase.FAILED, started_at_ms=NOW + 1)
DEAD_WITHIN_GRAIN = server(supervisor=SupervisorPhase.FAILED, started_at_ms=NOW - 60)
AS_TOLD = {"ended_at_ms": NOW + 2, "failure": "kv_cache_too_small"}
TOLD = life(NOW + 1, **AS_TOLD)
UNTOLD = life(NOW + 1, ended_at_ms=NOW + 2, failure="unknown")
SAID_OF_BEFORE = life(NOW - MINUTE, ended_at_ms=NOW - SECOND, failure="runtime_oom")
COMING_AGAIN = server(supervisor=SupervisorPhase.AUTO_RESTART, started_at_ms=NOW + 1)
STOPPING = serving(stop_asked=True)
SHUT = Sight(doors=1, admission_limit=0, requests_running=0, requests_waiting=0, in_flight=0)
GONE = {"heard": {"died_ms": str(NOW)}}
KEPT, UNDONE = {"keep_revision": "6"}, Phase.ROLLING_BACK


def errand(phase, key, **more):
    return Sight(errands={key: Errand(phase=phase, began_at_ms=NOW, detail="no luck")}, **more)


def sees(**changes):
    return Sight(**changes)


DONE, RUNNING, BAD = ErrandPhase.DONE, ErrandPhase.RUNNING, ErrandPhase.FAILED

# (step, args, server, sight, age in seconds, what else of the row, what is found: True, False or a code)
JUDGED = [
    ("capture", {}, None, sees(), 0, {}, False),
    ("capture", {}, None, errand(RUNNING, "GW-1-capture"), 5, {}, False),
    ("capture", {}, None, errand(DONE, "GW-1-capture"), 5, {}, True),
    ("capture", {}, None, errand(BAD, "GW-1-capture"), 5, {}, "step_failed"),
    ("capture", {}, server(), errand(RUNNING, "GW-1-capture", processes=0), 1, {}, True),
    (
        "capture",
        {},
        server(),
        errand(RUNNING, "GW-1-capture", processes=2),
        1,
        {},
        False,
    ),
    ("capture", {}, server(), sees(processes=0), 1, {}, False),
    ("capture", {}, None, sees(), 60, {}, "step_late"),
    ("capture", {}, None, sees(), 0, {"heard": {"failed": "no disk"}}, "step_failed"),
    ("run", {}, None, errand(DONE, "GW-1-run"), 5, {}, True),
    ("run", {}, None, errand(DONE, "GW-2-run"), 5, {}, False),
    ("run", {}, None, errand(BAD, "GW-1-run"), 5, {}, "step_failed"),
    ("run", {}, None, errand(RUNNING, "GW-1-run"), 60, {}, "step_late"),
    ("check", {}, None, errand(RUNNING, "GW-1-check"), 5, {}, False),
    ("check", {}, None, errand(DONE, "GW-1-check"), 5, {}, True),
    ("check", {}, None, errand(BAD, "GW-1-check"), 5, {}, "revision_refused"),
    ("check", {}, None, sees(), 60, {}, "step_late"),
    ("drain", {}, serving(), sees(), 0, {}, True),  # no door
    ("drain", {}, serving(), sees(doors=1, requests_running=0), 0, {}, False),  # whoever comes is let in
    ("drain", {}, serving(), SHUT, 1, {}, True),
    ("drain", {}, serving(), dataclasses.replace(SHUT, requests_running=1), 1, {}, False),
    ("drain", {}, serving(), dataclasses.replace(SHUT, requests_waiting=1), 1, {}, False),
    ("drain", {}, serving(), dataclasses.replace(SHUT, in_flight=1), 1, {}, False),
    ("drain", {}, serving(), sees(doors=1, admission_limit=0), 1, {}, True),  # nothing else is known
    ("drain", {}, serving(), dataclasses.replace(SHUT, in_flight=1), 60, {}, "step_late"),
    ("drain", {}, serving(), sees(doors=1, in_flight=3, verdict="stalled"), 0, {}, True),
    ("drain", {}, server(), sees(doors=1, in_flight=3), 0, {}, True),
    ("stop", {}, server(), sees(processes=0), 0, {}, True),
    ("stop", {}, server(), sees(), 0, {}, True),
    ("stop", {}, server(), sees(processes=1), 0, {}, False),  # an orphan
    ("stop", {}, server(supervisor=SupervisorPhase.FAILED), sees(processes=0), 0, {}, True),
    ("stop", {}, COMING_AGAIN, sees(processes=0), 0, {}, False),
    ("stop", {}, STOPPING, sees(processes=3), 59, {}, False),
    ("stop", {}, STOPPING, sees(processes=3), 60, {}, "step_late"),
    ("stop", KEPT, serving(), sees(start=life(revision=6)), 0, {}, True),
    ("stop", KEPT, serving(), sees(start=life(revision=7)), 0, {}, False),
    ("stop", KEPT, STOPPING, sees(start=life(revision=6)), 0, {}, False),
    ("stop", KEPT, serving(), sees(start=life(NOW - 9 * MINUTE, revision=6)), 0, {}, False),  # a life before
    ("await_memory", {}, None, sees(gpu_holders=0), 0, {}, True),
    ("await_memory", {}, None, sees(gpu_holders=1), 0, {}, False),
    ("await_memory", {}, None, sees(gpu_holders=0, free_steady_since_ms=NOW - 2_999), 0, {}, False),
    ("await_memory", {}, None, sees(gpu_holders=0, free_steady_since_ms=NOW - 3_000), 0, {}, True),
    ("await_memory", {}, None, sees(processes=1), 0, {}, False),
    ("await_memory", {}, None, sees(gpu_holders=0, processes=1), 0, {}, True),
    ("await_memory", {}, None, sees(), 0, {}, True),
    ("await_memory", {}, None, sees(gpu_holders=1), 60, {}, "step_late"),
    ("await_memory", KEPT, serving(), sees(gpu_holders=1, start=life(revision=6)), 0, {}, True),
    ("swap", {"revision": "7"}, None, sees(revision=7), 0, {}, True),
    ("swap", {"revision": "7"}, None, sees(revision=6), 0, {}, False),
    ("swap", {"revision": "7"}, None, sees(), 60, {}, "step_late"),
    ("start", {}, ANEW, sees(), 5, {}, True),
    ("start", {}, serving(), sees(), 5, {}, False),  # the one before
    ("start", {}, serving(NOW - 60), sees(), 5, {}, True),  # within the grain of a tick's instant
    ("start", {}, DEAD_ANEW, sees(start=TOLD), 0, {}, "died_again"),
    ("start", {}, DEAD_ANEW, sees(start=UNTOLD), 4, GONE, False),  # its last lines may still come
    ("start", {}, DEAD_ANEW, sees(start=UNTOLD), 5, GONE, "died_again"),
    ("start", {}, DEAD_ANEW, sees(start=SAID_OF_BEFORE), 4, GONE, False),
    ("start", {}, DEAD_ANEW, sees(start=life(NOW + 1)), 4, GONE, False),  # its end is not read
    ("start", {}, DEAD_ANEW, sees(), 5, GONE, "died_again"),
    ("start", {}, COMING_AGAIN, sees(), 5, {}, False),
    ("start", {}, DEAD_WITHIN_GRAIN, sees(start=life(NOW - 60, **AS_TOLD)), 5, {}, "died_again"),
    ("start", {}, server(), sees(), 60, {}, "step_late"),
    ("start", {}, serving(), sees(), 5, {"phase": UNDONE}, True),
    ("start", {}, STOPPING, sees(), 5, {"phase": UNDONE}, False),
    ("start", {"revision": "6"}, serving(), sees(start=life(revision=6)), 5, {"phase": UNDONE}, True),
    ("start", {"revision": "6"}, serving(), sees(start=life(revision=7)), 5, {"phase": UNDONE}, False),
    ("start", {"revision": "6"}, serving(), sees(), 5, {"phase": UNDONE}, False),
    ("start", {"revision": "6"}, ANEW, sees(), 5, {"phase": UNDONE}, True),
    ("canary", {}, ANEW, sees(), 5, {}, False),
    ("canary", {}, ANEW, sees(canary_ok_at_ms=NOW - 1), 5, {}, False),
    ("canary", {}, ANEW, sees(canary_ok_at_ms=NOW), 5, {}, True),
    ("canary", {}, ANEW, sees(verdict="working"), 2, {}, False),  # of before
    ("canary", {}, ANEW, sees(verdict="working"), 3, {}, True),
    ("canary", {}, ANEW, sees(verdict="idle"), 59, {}, False),
    ("canary", {}, ANEW, sees(), 60, {}, "step_late"),
    ("canary", {}, DEAD_ANEW, sees(start=TOLD), 0, {}, "died_again"),
    ("canary", {}, DEAD_ANEW, sees(start=UNTOLD), 4, GONE, False),  # its last lines may still come
    ("canary", {}, DEAD_ANEW, sees(start=UNTOLD), 5, GONE, "died_again"),
    ("canary", {}, DEAD_ANEW, sees(start=SAID_OF_BEFORE), 4, GONE, False),
    ("canary", {}, DEAD_ANEW, sees(start=life(NOW + 1)), 4, GONE, False),  # its end is not read
    ("canary", {}, DEAD_ANEW, sees(), 5, GONE, "died_again"),
    ("open_door", {}, ANEW, sees(), 0, {}, True),
    ("open_door", {}, ANEW, sees(doors=1), 14, {}, False),
    ("open_door", {}, ANEW, sees(doors=1), 15, {}, True),
    ("open_door", {}, ANEW, sees(doors=1, admission_limit=64), 15, {}, False),
    ("open_door", {}, ANEW, sees(doors=1, admission_limit=64), 60, {}, "step_late"),
    ("limit_admission", {"limit": "4"}, serving(), sees(doors=1, admission_limit=4), 0, {}, True),
    ("limit_admission", {"limit": "4"}, serving(), sees(doors=2, admission_limit=8), 0, {}, True),
    ("limit_admission", {"limit": "4"}, serving(), sees(doors=1, admission_limit=8), 0, {}, False),
    ("limit_admission", {"limit": "4"}, serving(), sees(doors=1), 60, {}, "step_late"),
    ("limit_admission", {"limit": "4"}, serving(), sees(guests=1), 9, {}, False),
    ("limit_admission", {"limit": "4"}, serving(), sees(guests=1), 10, {}, "no_guest"),
    ("limit_running", {"limit": "4"}, serving(), sees(guests=1, running_limit=4), 0, {}, True),
    ("limit_running", {"limit": "4"}, serving(), sees(guests=1), 59, {}, False),
    ("limit_running", {"limit": "4"}, serving(), sees(), 10, {}, "no_guest"),
    ("hold", {"for_ms": "9000"}, serving(), sees(), 8, {}, False),
    ("hold", {"for_ms": "9000"}, serving(), sees(), 8, {"good_since_ms": NOW - 1001}, True),
    ("hold", {"for_ms": "9000"}, serving(), sees(), 60, {}, "step_late"),
    ("lift", {}, serving(), sees(admission_limit=4), 0, {}, False),
    ("lift", {}, serving(), sees(running_limit=4), 0, {}, False),
    ("lift", {}, serving(), sees(), 0, {}, True),
    ("lift", {}, serving(), sees(running_limit=4), 60, {}, "step_late"),
    ("release_cache", {}, serving(), sees(), 0, {}, False),
    ("release_cache", {}, serving(), sees(), 0, {"heard": {"done": "yes"}}, True),
    ("release_cache", {}, serving(), sees(), 0, {"heard": {"failed": "busy"}}, "step_failed"),
    ("reset_prefix_cache", {}, serving(), errand(RUNNING, "GW-1-reset_prefix_cache"), 0, {}, False),
    ("reset_prefix_cache", {}, serving(), errand(DONE, "GW-1-reset_prefix_cache"), 0, {}, True),
    ("sleep", {}, serving(), sees(asleep=True), 0, {}, False),
    ("sleep", {}, serving(), errand(DONE, "GW-1-sleep"), 0, {}, True),
    ("sleep", {}, serving(), errand(BAD, "GW-1-sleep"), 0, {}, "step_failed"),
    ("wake", {}, serving(), sees(), 0, {}, False),  # that it is awake may be old news
    ("wake", {}, serving(), errand(DONE, "GW-1-wake"), 0, {}, True),
    ("wake", {}, serving(), errand(DONE, "GW-1-wake"), 0, {"phase": UNDONE}, False),
    ("wake", {}, serving(), errand(DONE, "GW-1-undo-wake"), 0, {"phase": UNDONE}, True),
    ("restart", {}, serving(), sees(), 0, {}, "unknown_step"),  # a row of an older version
]


@pytest.mark.parametrize(
    ("step", "args", "state", "sight", "age_s", "row", "expected"),
    JUDGED,
    ids=[f"{i}-{case[0]}-{case[-1]}" for i, case in enumerate(JUDGED)],
)
def test_how_a_step_is_judged(step, args, state, sight, age_s, row, expected):
    its = dataclasses.replace(at(Phase.APPLYING), **row)
    present = Step(action=step, within_ms=MINUTE, args=args)
    look = Look(step=present, remediation=its, seen=seen(state, sight), now_ms=NOW)
    if step == "await_memory":  # what has lasted until now began before
        look = dataclasses.replace(look, remediation=dataclasses.replace(its, since_ms=NOW - age_s * SECOND))
    else:
        look = dataclasses.replace(look, now_ms=NOW + age_s * SECOND)
    found = judged(look)
    assert (found.code if isinstance(found, Failed) else found) == expected


def test_every_step_is_judged_above_as_done_and_as_not_yet():
    for step in STEPS:
        found = {case[-1] for case in JUDGED if case[0] == step}
        assert {True, False} <= found, step


def test_a_process_that_died_again_says_of_what():
    r, _ = remediation.advance(at(Phase.APPLYING, step="start"), seen(DEAD_ANEW, sees(start=TOLD)), NOW + 500)
    assert r.facts == {"step": "start", "detail": "gone", "failure": "kv_cache_too_small"}


def test_a_process_that_died_again_and_never_says_of_what_is_waited_for_five_seconds():
    r, outcomes = at(Phase.APPLYING, step="start"), []
    for second in range(1, 7):
        r, _ = remediation.advance(r, seen(DEAD_ANEW, sees(start=SAID_OF_BEFORE)), NOW + second * SECOND)
        outcomes.append(r.outcome)
    assert outcomes == [""] * 5 + ["died_again"]
    assert r.facts["failure"] == ""


def test_a_process_that_dies_once_more_in_the_same_step_is_waited_for_anew():
    r = at(Phase.APPLYING, step="canary")
    r, _ = remediation.advance(r, seen(DEAD_ANEW, sees(start=UNTOLD)), NOW + SECOND)
    assert r.heard == {"died_ms": str(NOW + SECOND)}
    coming = server(supervisor=SupervisorPhase.ACTIVE, started_at_ms=NOW + 2)
    r, _ = remediation.advance(r, seen(coming), NOW + 3 * SECOND)
    assert r.heard == {}
    r, _ = remediation.advance(r, seen(DEAD_ANEW, sees(start=UNTOLD)), NOW + 9 * SECOND)
    assert (r.outcome, r.heard) == ("", {"died_ms": str(NOW + 9 * SECOND)})


# -- one cycle of the machine ----------------------------------------------------------------------------

OVER = {"alert_firing": False}
HAS_DOOR = sees(doors=1)
LIMITED = sees(doors=1, admission_limit=4)
UNCUT = {"is_cut": False}
NO_WAY_BACK = (Step(action="swap", within_ms=MINUTE, args={"revision": str(BEFORE)}),)

CASES = [  # (name, remediation, seen, after ms, phase, step that is asked, outcome)
    ("auto acts at once", at(Phase.PLANNED), seen(serving(), HAS_DOOR), 0, Phase.APPLYING, "drain", ""),
    (
        "steps whose effect is there are passed",
        at(Phase.PLANNED),
        seen(server(), sees(gpu_holders=0)),
        0,
        Phase.APPLYING,
        "start",
        "",
    ),
    (
        "approve asks first",
        at(Phase.PLANNED, mode=Mode.APPROVE),
        seen(),
        0,
        Phase.AWAITING_APPROVAL,
        "",
        "",
    ),
    (
        "observe touches nothing",
        at(Phase.PLANNED, mode=Mode.OBSERVE),
        seen(),
        0,
        Phase.REHEARSED,
        "",
        "dry_run",
    ),
    ("a dry run ends in words", at(Phase.PLANNED, dry_run=True), seen(), 0, Phase.REHEARSED, "", "dry_run"),
    (
        "paused before it began",
        at(Phase.PLANNED),
        seen(paused=True),
        0,
        Phase.ABORTED,
        "",
        "aborted_by",
    ),
    ("waits for a word", at(Phase.AWAITING_APPROVAL), seen(), 1000, Phase.AWAITING_APPROVAL, "", ""),
    ("approved", at(Phase.AWAITING_APPROVAL), seen(word="approved"), 1000, Phase.APPLYING, "start", ""),
    ("denied", at(Phase.AWAITING_APPROVAL), seen(word="denied"), 1000, Phase.ABORTED, "", "denied"),
    (
        "expired",
        at(Phase.AWAITING_APPROVAL),
        seen(),
        30 * MINUTE,
        Phase.ABORTED,
        "",
        "approval_expired",
    ),
    (
        "nothing left to approve",
        at(Phase.AWAITING_APPROVAL),
        seen(**OVER),
        1,
        Phase.ABORTED,
        "",
        "alert_over",
    ),
    (
        "asked again until seen",
        at(Phase.APPLYING, step="stop"),
        seen(serving()),
        9000,
        Phase.APPLYING,
        "stop",
        "",
    ),
    (
        "healed by itself before a deed",
        at(Phase.APPLYING, "capture", "restart", touched=False),
        seen(serving(), **OVER),
        1,
        Phase.ABORTED,
        "",
        "alert_over",
    ),
    (
        "came back by itself while its memory was awaited",
        at(Phase.APPLYING, step="await_memory", touched=False),
        seen(serving(), **OVER),
        1,
        Phase.ABORTED,
        "",
        "alert_over",
    ),
    (
        "healed by itself while it was drained: the door opens again",
        at(Phase.APPLYING, step="drain"),
        seen(serving(), HAS_DOOR, **OVER),
        1,
        Phase.ROLLING_BACK,
        "open_door",
        "alert_over",
    ),
    (
        "once its stop was asked nothing is over",
        at(Phase.APPLYING, step="stop"),
        seen(serving(), **OVER),
        1,
        Phase.APPLYING,
        "stop",
        "",
    ),
    (
        "what a person wants needs no alert",
        at(Phase.APPLYING, "reconfigure", step="drain", touched=False, by="ann"),
        seen(serving(), HAS_DOOR, **OVER),
        1,
        Phase.APPLYING,
        "drain",
        "",
    ),
    (
        "a failure before any deed",
        at(Phase.APPLYING, "reconfigure", step="check", touched=False),
        seen(serving(), errand(BAD, "GW-1-check")),
        1,
        Phase.FAILED,
        "",
        "revision_refused",
    ),
    (
        "a failure after a deed is taken back",
        at(Phase.APPLYING, "reconfigure", step="start"),
        seen(DEAD_ANEW, sees(revision=7, start=TOLD)),
        9000,
        Phase.ROLLING_BACK,
        "swap",
        "died_again",
    ),
    (
        "a failure with nothing to undo",
        at(Phase.APPLYING, "run"),
        seen(serving(), errand(BAD, "GW-1-run")),
        1,
        Phase.FAILED,
        "",
        "step_failed",
    ),
    (
        "late",
        at(Phase.APPLYING, step="start"),
        seen(),
        10 * MINUTE,
        Phase.ROLLING_BACK,
        "start",
        "step_late",
    ),
    (
        "an unknown step",
        dataclasses.replace(
            at(Phase.APPLYING), plan=dataclasses.replace(plan("run"), steps=(Step(action="x", within_ms=1),))
        ),
        seen(),
        1,
        Phase.FAILED,
        "",
        "unknown_step",
    ),
    (
        "paused before a deed",
        at(Phase.APPLYING, "capture", "restart", touched=False),
        seen(paused=True),
        1,
        Phase.ABORTED,
        "",
        "aborted_by",
    ),
    (
        "paused in the middle cleans up",
        at(Phase.APPLYING, step="await_memory"),
        seen(server(stop_asked=True), paused=True),
        1,
        Phase.ROLLING_BACK,
        "start",
        "aborted_by",
    ),
    (
        "aborted while it stops: it is started again, not called stopped by hand",
        at(Phase.APPLYING, step="stop"),
        seen(STOPPING, word="abort"),
        1,
        Phase.ROLLING_BACK,
        "start",
        "aborted_by",
    ),
    (
        "aborted with nothing to take back",
        at(Phase.APPLYING, "run"),
        seen(serving(), word="abort"),
        1,
        Phase.ABORTED,
        "",
        "aborted_by",
    ),
    (
        "an operator stops it while it is drained",
        at(Phase.APPLYING, step="drain"),
        seen(STOPPING, HAS_DOOR),
        1,
        Phase.ABORTED,
        "",
        "stopped_by_operator",
    ),
    (
        "our own stop is nobody else's",
        at(Phase.APPLYING, step="await_memory"),
        seen(server(ServerPhase.STOPPED, stop_asked=True), sees(gpu_holders=1)),
        1,
        Phase.APPLYING,
        "await_memory",
        "",
    ),
    (
        "until a process began",
        at(Phase.APPLYING, step="start"),
        seen(server(ServerPhase.STOPPED, stop_asked=True, started_at_ms=NOW - MINUTE)),
        1,
        Phase.APPLYING,
        "start",
        "",
    ),
    (
        "our second stop is ours too",
        at(Phase.APPLYING, "restart", "restart", row={"step_index": 8}),
        seen(server(ServerPhase.STOPPED, stop_asked=True), sees(gpu_holders=1)),
        1,
        Phase.APPLYING,
        "await_memory",
        "",
    ),
    (
        "what is taken back is started though its memory does not come back",
        at(Phase.ROLLING_BACK, "reconfigure", step="await_memory", row={"outcome": "step_late"}),
        seen(server(ServerPhase.STOPPED, stop_asked=True), sees(gpu_holders=1)),
        10 * MINUTE,
        Phase.ROLLING_BACK,
        "start",
        "step_late",
    ),
    (
        "an operator stops it while it starts",
        at(Phase.APPLYING, step="start"),
        seen(server(ServerPhase.STOPPED, stop_asked=True, started_at_ms=NOW + 1)),
        1,
        Phase.ABORTED,
        "",
        "stopped_by_operator",
    ),
    (
        "an operator stops it while the result is watched",
        at(Phase.VERIFYING, "reconfigure"),
        seen(server(ServerPhase.STOPPED, stop_asked=True)),
        1,
        Phase.ABORTED,
        "",
        "stopped_by_operator",
    ),
    (
        "an operator stops it after it was started again",
        at(Phase.ROLLING_BACK, step="open_door"),
        seen(server(ServerPhase.STOPPED, stop_asked=True), HAS_DOOR),
        1,
        Phase.ABORTED,
        "",
        "stopped_by_operator",
    ),
    (
        "an operator stops it before its approval",
        at(Phase.AWAITING_APPROVAL),
        seen(STOPPING, word="approved"),
        1,
        Phase.ABORTED,
        "",
        "stopped_by_operator",
    ),
    (
        "its supervisor restarts it by itself: waited for",
        at(Phase.APPLYING, step="start"),
        seen(COMING_AGAIN),
        9000,
        Phase.APPLYING,
        "start",
        "",
    ),
    (
        "limits end with their server",
        at(Phase.APPLYING, "limit_admission", step="hold"),
        seen(server()),
        1,
        Phase.ABORTED,
        "",
        "server_gone",
    ),
    (
        "evidence is kept of a server that is down",
        at(Phase.APPLYING, "capture", touched=False),
        seen(server(), errand(DONE, "GW-1-capture")),
        1,
        Phase.SUCCEEDED,
        "",
        "untouched",
    ),
    (
        "limits are held while the alert fires",
        at(Phase.APPLYING, "limit_admission", step="hold"),
        seen(serving(), LIMITED),
        MINUTE,
        Phase.APPLYING,
        "hold",
        "",
    ),
    (
        "limits are lifted when it stayed away",
        at(Phase.APPLYING, "limit_admission", step="hold", row={"good_since_ms": NOW}),
        seen(serving(), LIMITED, **OVER),
        10 * MINUTE,
        Phase.APPLYING,
        "lift",
        "",
    ),
    (
        "limits that were lifted helped",
        at(Phase.APPLYING, "limit_admission", step="lift"),
        seen(serving(), HAS_DOOR, **OVER),
        1,
        Phase.SUCCEEDED,
        "",
        "lifted",
    ),
    (
        "limits that did not help",
        at(Phase.VERIFYING, "limit_admission"),
        seen(serving(), HAS_DOOR),
        6 * MINUTE,
        Phase.ROLLED_BACK,
        "",
        "never_verified",
    ),
    (
        "a pause lifts limits",
        at(Phase.APPLYING, "limit_admission", step="hold"),
        seen(serving(), LIMITED, paused=True),
        1,
        Phase.ROLLING_BACK,
        "lift",
        "aborted_by",
    ),
    (
        "a restart that was done is not taken back",
        at(Phase.VERIFYING),
        seen(serving(), word="abort"),
        1,
        Phase.ABORTED,
        "",
        "aborted_by",
    ),
    (
        "other arguments are, until they are proved",
        at(Phase.VERIFYING, "reconfigure"),
        seen(serving(), sees(revision=7), word="abort"),
        1,
        Phase.ROLLING_BACK,
        "swap",
        "aborted_by",
    ),
    (
        "called off before a dead server was started: nothing is asked",
        at(Phase.APPLYING, "reconfigure", step="swap", row=UNCUT),
        seen(server(), sees(revision=BEFORE), paused=True),
        1,
        Phase.ABORTED,
        "",
        "aborted_by",
    ),
    (
        "called off while a dead server was to be started, and was not: its settings are set back",
        at(Phase.APPLYING, "reconfigure", step="start", row=UNCUT),
        seen(server(), sees(revision=AFTER), paused=True),
        1,
        Phase.ROLLING_BACK,
        "swap",
        "aborted_by",
    ),
    (
        "which is all",
        at(Phase.ROLLING_BACK, "reconfigure", step="swap", row={**UNCUT, "outcome": "aborted_by"}),
        seen(server(), sees(revision=BEFORE), paused=True),
        1,
        Phase.ABORTED,
        "",
        "aborted_by",
    ),
    (
        "called off while the remains of a dead server are ended: it is not started",
        at(Phase.APPLYING, "reconfigure", step="await_memory", row=UNCUT),
        seen(server(stop_asked=True), sees(revision=BEFORE, gpu_holders=1), word="abort"),
        1,
        Phase.ABORTED,
        "",
        "aborted_by",
    ),
    (
        "remains of a dead server that cannot be ended: it is not started",
        at(Phase.APPLYING, "reconfigure", step="stop", row=UNCUT),
        seen(server(stop_asked=True), sees(revision=BEFORE, processes=1)),
        10 * MINUTE,
        Phase.FAILED,
        "",
        "step_late",
    ),
    (
        "called off once a dead server was started: that is taken back",
        at(Phase.APPLYING, "reconfigure", step="start", row=UNCUT),
        seen(
            server(supervisor=SupervisorPhase.ACTIVE, started_at_ms=NOW + 1),
            sees(revision=AFTER),
            paused=True,
        ),
        SECOND,
        Phase.ROLLING_BACK,
        "swap",
        "aborted_by",
    ),
    (
        "a dead server that was started, and died again: it is started with the revision before",
        at(Phase.APPLYING, "reconfigure", step="start", row=UNCUT),
        seen(DEAD_ANEW, sees(revision=BEFORE, start=TOLD)),
        9000,
        Phase.ROLLING_BACK,
        "start",
        "died_again",
    ),
    (
        "called off while it is drained: the door opens, and nothing else is asked",
        at(Phase.APPLYING, "reconfigure", step="drain", row=UNCUT),
        seen(serving(), sees(revision=BEFORE, doors=1), word="abort"),
        1,
        Phase.ROLLING_BACK,
        "open_door",
        "aborted_by",
    ),
    (
        "neither revision starts: the settings are set back",
        at(Phase.APPLYING, "reconfigure", step="start", undo=NO_WAY_BACK),
        seen(DEAD_ANEW, sees(revision=AFTER, start=TOLD)),
        9000,
        Phase.ROLLING_BACK,
        "swap",
        "died_again",
    ),
    (
        "and nothing is started",
        at(Phase.ROLLING_BACK, "reconfigure", undo=NO_WAY_BACK, row={"outcome": "died_again"}),
        seen(DEAD_ANEW, sees(revision=BEFORE, start=TOLD)),
        1,
        Phase.FAILED,
        "",
        "died_again",
    ),
    (
        "what lives is not ended for arguments that could not start: called off",
        at(Phase.VERIFYING, "reconfigure", undo=NO_WAY_BACK),
        seen(serving(), sees(revision=AFTER), paused=True),
        1,
        Phase.ABORTED,
        "",
        "aborted_by",
    ),
    (
        "what lives is not ended for arguments that could not start: not proved",
        at(Phase.VERIFYING, "reconfigure", undo=NO_WAY_BACK),
        seen(serving(), sees(revision=AFTER)),
        6 * MINUTE,
        Phase.FAILED,
        "",
        "never_verified",
    ),
    ("down again", at(Phase.VERIFYING), seen(server()), 1, Phase.FAILED, "", "relapsed"),
    (
        "down again with other arguments",
        at(Phase.VERIFYING, "reconfigure"),
        seen(server(), sees(revision=7)),
        1,
        Phase.ROLLING_BACK,
        "swap",
        "relapsed",
    ),
    (
        "good for long enough",
        at(Phase.VERIFYING, row={"good_since_ms": NOW}),
        seen(serving(), **OVER),
        30_000,
        Phase.SUCCEEDED,
        "",
        "restored",
    ),
    (
        "not good for long enough",
        at(Phase.VERIFYING, row={"good_since_ms": NOW}),
        seen(serving(), **OVER),
        29_999,
        Phase.VERIFYING,
        "",
        "",
    ),
    (
        "not good at the last moment",
        at(Phase.VERIFYING, row={"good_since_ms": NOW}),
        seen(serving()),
        30_000,
        Phase.VERIFYING,
        "",
        "",
    ),
    ("the alert stays", at(Phase.VERIFYING), seen(serving()), 360_000, Phase.FAILED, "", "never_verified"),
    (
        "taken back",
        at(Phase.ROLLING_BACK, step="open_door", row={"outcome": "died_again"}),
        seen(serving()),
        1,
        Phase.ROLLED_BACK,
        "",
        "died_again",
    ),
    (
        "taken back, and the server does not serve",
        at(Phase.ROLLING_BACK, step="open_door", row={"outcome": "died_again"}),
        seen(server()),
        1,
        Phase.FAILED,
        "",
        "died_again",
    ),
    (
        "taking back fails",
        at(Phase.ROLLING_BACK, "reconfigure", step="start", row={"outcome": "less_throughput"}),
        seen(DEAD_ANEW, sees(start=TOLD)),
        1,
        Phase.FAILED,
        "",
        "less_throughput",
    ),
    (
        "a pause does not stop taking back",
        at(Phase.ROLLING_BACK, step="start", row={"outcome": "died_again"}),
        seen(paused=True, word="abort"),
        1,
        Phase.ROLLING_BACK,
        "start",
        "died_again",
    ),
]


@pytest.mark.parametrize(
    ("name", "before", "look", "after_ms", "phase", "asked", "outcome"), CASES, ids=[c[0] for c in CASES]
)
def test_one_cycle_of_the_machine(name, before, look, after_ms, phase, asked, outcome):
    moved, step = remediation.advance(before, look, NOW + after_ms)
    assert (moved.phase, step.action if step else "", moved.outcome) == (phase, asked, outcome)


def test_the_first_failure_is_kept_and_that_of_the_undo_stands_beside_it():
    row = {"outcome": "died_again", "facts": {"step": "start", "detail": "first"}}
    r = at(Phase.ROLLING_BACK, "reconfigure", step="start", row=row)
    r, _ = remediation.advance(r, seen(DEAD_ANEW, sees(start=TOLD)), NOW + 1)
    assert (r.phase, r.outcome, r.facts["detail"]) == (Phase.FAILED, "died_again", "first")
    assert (r.facts["undo_step"], r.facts["undo_code"]) == ("start", "died_again")


def test_who_approved_is_remembered_to_the_end():
    r, _ = remediation.advance(at(Phase.AWAITING_APPROVAL), seen(word="approved", by="ann"), NOW)
    assert r.facts == {"approved_by": "ann"}
    r = dataclasses.replace(r, phase=Phase.VERIFYING, good_since_ms=NOW)
    r, _ = remediation.advance(r, seen(serving(), **OVER), NOW + MINUTE)
    assert (r.phase, r.facts["approved_by"]) == (Phase.SUCCEEDED, "ann")


def test_an_alert_that_comes_back_while_verifying_starts_the_proof_anew():
    r = at(Phase.VERIFYING, row={"good_since_ms": NOW})
    r, _ = remediation.advance(r, seen(serving()), NOW + 10_000)
    assert r.good_since_ms is None


def test_what_was_heard_of_a_step_is_forgotten_with_it():
    r = at(Phase.APPLYING, "sleep_wake", step="sleep", row={"heard": {"done": "yes"}})
    r, step = remediation.advance(r, seen(serving()), NOW + 1)
    assert (step.action, r.heard) == ("wake", {})


@pytest.mark.parametrize(
    ("asked", "expected"), [("capture", None), ("start", NOW + 5), ("await_memory", None)]
)
def test_the_first_deed_is_marked_and_nothing_that_only_looks(asked, expected):
    r = at(Phase.APPLYING, "capture", "restart", step=asked, touched=False)
    r, step = remediation.advance(r, seen(server(), sees(gpu_holders=1)), NOW + 5)
    assert (step.action, r.asked_at_ms) == (asked, expected)


def test_a_hand_that_refuses_for_good_fails_the_step():
    r = remediation.refused(at(Phase.APPLYING, step="stop"), "access denied", NOW + 1)
    assert (r.phase, r.outcome) == (Phase.ROLLING_BACK, "not_asked")
    assert r.facts == {"step": "stop", "detail": "access denied"}
    r = remediation.refused(r, "access denied", NOW + 2)
    assert (r.phase, r.outcome, r.facts["undo_code"]) == (Phase.FAILED, "not_asked", "not_asked")
    assert remediation.refused(r, "again", NOW + 3) == r


def test_a_hand_that_cannot_capture_holds_up_no_restart():
    r = remediation.refused(at(Phase.APPLYING, "capture", "restart"), "no disk", NOW + 1)
    assert r.phase is Phase.APPLYING
    _, step = remediation.advance(r, seen(), NOW + 1)
    assert step.action == "start"


# -- the proof -------------------------------------------------------------------------------------------

SIGNALS = {"kv_cache_tokens_least": "8192", "tokens_per_s": "900", "least_tokens_per_s": "450"}
FEW = sees(start=life(kv_cache_tokens=8191))
SLOW = sees(requests_waiting=1, tokens_per_s=449.0)
SHORT = [
    ("new_alert", {}, {"new_alerts": ("GPUHot",)}, sees(), 30),
    ("fewer_kv_tokens", SIGNALS, {}, FEW, 30),
    ("less_throughput", SIGNALS, {}, SLOW, 90),
]


@pytest.mark.parametrize(("code", "signals", "what", "sight", "after_s"), SHORT)
def test_what_falls_short_for_long_enough_is_a_relapse(code, signals, what, sight, after_s):
    r = at(Phase.VERIFYING, "reconfigure", signals=signals)
    look = seen(serving(), sight, alert_firing=False, **what)
    for second in range(after_s):
        r, _ = remediation.advance(r, look, NOW + second * SECOND)
        assert (r.phase, r.good_since_ms) == (Phase.VERIFYING, None)
    r, step = remediation.advance(r, look, NOW + after_s * SECOND)
    assert (r.phase, r.outcome, step.action) == (Phase.ROLLING_BACK, code, "swap")


@pytest.mark.parametrize(("code", "signals", "what", "sight", "after_s"), SHORT)
def test_what_falls_short_for_a_moment_starts_the_proof_anew(code, signals, what, sight, after_s):
    r = at(Phase.VERIFYING, "reconfigure", signals=signals, row={"good_since_ms": NOW})
    bad = seen(serving(), sight, alert_firing=False, **what)
    r, _ = remediation.advance(r, bad, NOW + 20 * SECOND)
    r, _ = remediation.advance(r, seen(serving(), alert_firing=False), NOW + 21 * SECOND)
    assert (r.phase, r.good_since_ms, r.heard) == (Phase.VERIFYING, NOW + 21 * SECOND, {})


@pytest.mark.parametrize(
    "sight",
    [
        sees(start=life(kv_cache_tokens=8192)),
        sees(requests_waiting=0, tokens_per_s=1.0),  # nobody wants more
        sees(requests_waiting=9, tokens_per_s=450.0),
        sees(requests_waiting=9),  # nobody knows
        sees(start=life()),
    ],
)
def test_what_does_not_fall_short(sight):
    r = at(Phase.VERIFYING, "reconfigure", signals=SIGNALS, row={"good_since_ms": NOW})
    r, _ = remediation.advance(r, seen(serving(), sight, alert_firing=False), NOW + 30 * SECOND)
    assert (r.phase, r.outcome) == (Phase.SUCCEEDED, "restored")


# -- the table -------------------------------------------------------------------------------------------


def test_every_live_phase_can_be_called_off_and_no_ended_one_moves():
    assert all((phase, Event.CALLED_OFF) in machine.TRANSITIONS for phase in LIVE_PHASES)
    assert {phase for phase, _ in machine.TRANSITIONS} == LIVE_PHASES
    assert set(Phase) - LIVE_PHASES <= set(machine.TRANSITIONS.values())


# -- whole walks on a small host -------------------------------------------------------------------------


@dataclass
class Host:
    """A server that stops in 3 s, gives its memory back 2 s later, loads for 5 s, and has a door.

    `bad` are revisions whose process dies after 4 s. It does what it is asked, in its own time.
    """

    revision: int = BEFORE  # that the next start reads
    bad: frozenset[int] = frozenset()
    now_ms: int = NOW
    process: tuple[int, int] | None = (NOW - 10 * MINUTE, BEFORE)  # when it began, with which revision
    last_began_ms: int = NOW - 10 * MINUTE
    stop_asked_ms: int | None = None
    stopped_by_hand: bool = False
    gone_ms: int = 0
    limit: int | None = None
    in_hand: int = 3
    errands: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)

    def pass_a_second(self):
        self.now_ms += SECOND
        if self.limit == 0 and self.process:
            self.in_hand = max(self.in_hand - 1, 0)
        if self.process is None:
            return
        began_ms, revision = self.process
        stopped = self.stop_asked_ms is not None and self.now_ms - self.stop_asked_ms >= 3 * SECOND
        if stopped or (revision in self.bad and self.now_ms - began_ms >= 4 * SECOND):
            self.process, self.gone_ms, self.limit = None, self.now_ms, None

    def look(self, **more):
        began_ms, revision = self.process or (self.last_began_ms, None)
        loaded = self.process is not None and self.now_ms - began_ms >= 5 * SECOND
        phase = SupervisorPhase.ACTIVE if self.process else SupervisorPhase.INACTIVE
        state = server(
            ServerPhase.SERVING if loaded else ServerPhase.DOWN,
            phase,
            started_at_ms=began_ms,
            stop_asked=self.stop_asked_ms is not None,
        )
        holds = self.process is not None or self.now_ms - self.gone_ms < 2 * SECOND
        sight = Sight(
            doors=int(self.process is not None),
            in_flight=self.in_hand if self.process else None,
            admission_limit=self.limit,
            processes=int(self.process is not None),
            gpu_holders=int(holds),
            canary_ok_at_ms=self.now_ms if loaded else None,
            start=life(began_ms, revision),
            revision=self.revision,
            errands=self.errands,
        )
        return seen(state, sight, **{"alert_firing": not loaded, **more})

    def do(self, r, step):
        self.asked.append(step.action)
        match step.action:
            case "check" | "capture":
                self.errands[remediation.errand_key(r, step)] = Errand(phase=DONE, began_at_ms=self.now_ms)
            case "drain":
                self.limit = 0
            case "stop" if self.process:
                self.stop_asked_ms = self.stop_asked_ms or self.now_ms
            case "swap":
                self.revision = int(step.args["revision"])
            case "start" if not self.process and self.last_began_ms < r.since_ms:
                self.stop_asked_ms, self.last_began_ms = None, self.now_ms
                self.process = self.now_ms, self.revision
            case "open_door":
                self.limit = None

    @property
    def serves(self):
        return self.process is not None and self.now_ms - self.process[0] >= 5 * SECOND


def walk(host, r, *, killed_at=(), aborted_at=None, stopped_at=None, over_at=None):
    """Tick until it ends. In a tick of `killed_at` the daemon dies between the row and the deed.

    In `stopped_at` an operator stops the server, and from `over_at` on its alert is over.
    """
    for tick in range(900):
        if tick == stopped_at and host.process and host.stop_asked_ms is None:
            host.stop_asked_ms, host.stopped_by_hand = host.now_ms, True
        word = "abort" if aborted_at is not None and tick >= aborted_at else ""
        firing = {} if over_at is None else {"alert_firing": tick < over_at}
        r, step = remediation.advance(r, host.look(word=word, **firing), host.now_ms)
        r = from_json(to_json(r), Remediation)
        if r.phase not in LIVE_PHASES:
            return r
        if step and tick not in killed_at:
            host.do(r, step)
        host.pass_a_second()
    raise AssertionError(f"still {r.phase} at step {r.step_index}")


def wished(*actions):
    return remediation.begin(plan(*actions, by="ann"), NOW)


def test_a_reconfiguration_walks_through_and_is_proved():
    host = Host()
    r = walk(host, wished("capture", "reconfigure"))
    assert (r.phase, r.outcome, host.process[1], host.limit) == (Phase.SUCCEEDED, "restored", AFTER, None)
    assert list(dict.fromkeys(host.asked)) == ["capture", *RECONFIGURE.replace(" canary", "").split()]


def course(r, *, is_undo=False):
    return [(past.action, past.end) for past in r.course if past.is_undo is is_undo]


def test_the_times_of_all_steps_are_kept_and_leave_no_gap():
    r = walk(Host(), wished("capture", "reconfigure"))
    assert course(r) == [(name, StepEnd.DONE) for name in ("capture", *RECONFIGURE.split())]
    assert r.course[0].began_at_ms == NOW
    assert [p.ended_at_ms for p in r.course[:-1]] == [p.began_at_ms for p in r.course[1:]]
    spans = {past.action: past.ended_at_ms - past.began_at_ms for past in r.course}
    assert spans["start"] >= 5 * SECOND  # it loads so long
    assert spans["open_door"] == 15 * SECOND


def test_a_step_that_failed_is_kept_with_its_reason_and_so_are_those_of_the_undo():
    r = walk(Host(bad=frozenset({AFTER})), wished("reconfigure"))
    assert course(r)[-2:] == [("swap", StepEnd.DONE), ("start", StepEnd.FAILED)]
    assert next(past.detail for past in r.course if past.end is StepEnd.FAILED) == r.facts["detail"]
    assert course(r, is_undo=True) == [(name, StepEnd.DONE) for name in REVERT.split()]


def test_a_step_that_was_cut_short_is_kept_as_called_off():
    r = walk(Host(), wished("restart"), aborted_at=2)
    assert course(r) == [("drain", StepEnd.CALLED_OFF)]
    assert course(r, is_undo=True) == [("open_door", StepEnd.DONE)]


def test_what_could_not_be_done_and_was_passed_over_is_kept_as_it_ended():
    r, _ = remediation.advance(wished("capture", "restart"), seen(serving()), NOW)
    r = remediation.refused(r, "no space left", NOW)
    busy = sees(doors=1, in_flight=3)
    r, _ = remediation.advance(r, seen(serving(), busy), NOW + SECOND)
    r, _ = remediation.advance(r, seen(serving(), busy), NOW + 61 * SECOND)
    assert course(r) == [("capture", StepEnd.FAILED), ("drain", StepEnd.LATE)]
    assert [past.detail for past in r.course] == ["no space left", ""]


def test_the_drain_loses_no_request_that_was_in_hand():
    host = Host()
    walk(host, wished("restart"))
    assert host.in_hand == 0
    assert host.asked.index("stop") == 3  # drained until the three in hand had ended


def test_arguments_that_cannot_start_are_taken_back():
    host = Host(bad=frozenset({AFTER}))
    r = walk(host, wished("reconfigure"))
    assert (r.phase, r.outcome) == (Phase.ROLLED_BACK, "died_again")
    assert (host.process[1], host.revision, host.serves, host.limit) == (BEFORE, BEFORE, True, None)


def test_arguments_that_cannot_start_any_more_end_in_a_failure():
    host = Host(bad=frozenset({BEFORE, AFTER}))
    r = walk(host, wished("reconfigure"))
    assert (r.phase, r.outcome, host.revision) == (Phase.FAILED, "died_again", BEFORE)


@pytest.mark.parametrize("tick", range(60))
def test_killed_at_any_tick_a_reconfiguration_goes_on(tick):
    host = Host()
    r = walk(host, wished("reconfigure"), killed_at=range(tick, tick + 3))
    assert (r.phase, host.process[1], host.revision) == (Phase.SUCCEEDED, AFTER, AFTER)
    assert course(r) == [(name, StepEnd.DONE) for name in RECONFIGURE.split()]


@pytest.mark.parametrize("tick", range(60))
def test_aborted_at_any_tick_a_reconfiguration_ends_as_it_was(tick):
    host = Host()
    r = walk(host, wished("reconfigure"), aborted_at=tick)
    assert r.phase in {Phase.ABORTED, Phase.ROLLED_BACK, Phase.SUCCEEDED}
    host_is_at = (host.process[1], host.revision, host.serves, host.limit)
    proved = r.phase is Phase.SUCCEEDED
    assert host_is_at == (AFTER if proved else BEFORE, AFTER if proved else BEFORE, True, None)


@pytest.mark.parametrize("tick", range(30))
def test_aborted_at_any_tick_a_restart_ends_with_a_server_that_serves(tick):
    host = Host()
    r = walk(host, wished("restart"), aborted_at=tick, killed_at={tick, tick + 1})
    assert r.phase in {Phase.ABORTED, Phase.ROLLED_BACK}
    assert (host.serves, host.limit) == (True, None)


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("tick", range(30))
def test_a_change_of_a_dead_server_that_is_called_off_starts_it_only_if_it_had_been_started(tick, killed):
    whole = Host(process=None)
    walk(whole, wished("reconfigure"))
    started_at = (whole.last_began_ms - NOW) // SECOND
    host = Host(process=None)
    r = walk(host, wished("reconfigure"), aborted_at=tick, killed_at=range(tick - killed, tick))
    assert (host.revision, host.limit) == (BEFORE, None)
    if tick <= started_at + killed:
        assert (r.phase, host.process, host.last_began_ms < NOW) == (Phase.ABORTED, None, True)
    else:
        assert (r.phase, host.process[1], host.serves) == (Phase.ROLLED_BACK, BEFORE, True)


def test_a_dead_server_that_starts_with_neither_revision_is_started_once_and_has_that_of_before():
    host = Host(process=None, bad=frozenset({BEFORE, AFTER}))
    r = walk(host, remediation.begin(plan("reconfigure", by="ann", undo=NO_WAY_BACK), NOW))
    assert (r.phase, r.outcome, host.revision, host.process) == (Phase.FAILED, "died_again", BEFORE, None)
    began = NOW + SECOND * host.asked.index("start")
    assert host.last_began_ms == began


@pytest.mark.parametrize("bad", [frozenset(), frozenset({AFTER})], ids=["good", "bad"])
@pytest.mark.parametrize("tick", range(0, 80, 2))
def test_a_server_that_an_operator_stops_at_any_tick_stays_stopped(tick, bad):
    host = Host(bad=bad)
    r = walk(host, wished("reconfigure"), stopped_at=tick)
    for _ in range(10):
        host.pass_a_second()
    if host.stopped_by_hand:
        assert (r.phase, r.outcome, host.process) == (Phase.ABORTED, "stopped_by_operator", None)
    else:
        assert host.serves


@pytest.mark.parametrize("tick", range(8))
def test_a_server_whose_alert_is_over_in_time_is_not_stopped(tick):
    host = Host()
    r = walk(host, remediation.begin(plan("restart"), NOW), over_at=tick)
    assert (host.serves, host.limit) == (True, None)
    drained_for = 3
    assert ("stop" in host.asked) == (tick > drained_for)
    assert r.phase is (
        Phase.SUCCEEDED if tick > drained_for else Phase.ROLLED_BACK if tick else Phase.ABORTED
    )


# -- any order of events ---------------------------------------------------------------------------------

INSTANTS = st.sampled_from([None, NOW - MINUTE, NOW, NOW + 20 * SECOND, NOW + 5 * MINUTE])
COUNTS = st.sampled_from([None, 0, 1, 4])
LOOKS = st.builds(
    Seen,
    server=st.builds(
        server,
        st.sampled_from(ServerPhase),
        st.sampled_from(SupervisorPhase),
        started_at_ms=INSTANTS,
        stop_asked=st.sampled_from([False, False, False, True]),
    ),
    alert_firing=st.booleans(),
    paused=st.sampled_from([False, False, False, True]),
    word=st.sampled_from(["", "", "", "approved", "denied", "abort"]),
    by=st.just("ann"),
    approval_expires_ms=st.just(30 * MINUTE),
    sight=st.builds(
        Sight,
        requests_running=COUNTS,
        in_flight=COUNTS,
        requests_waiting=COUNTS,
        doors=st.sampled_from([0, 1]),
        guests=st.sampled_from([0, 1]),
        admission_limit=COUNTS,
        running_limit=COUNTS,
        processes=COUNTS,
        gpu_holders=COUNTS,
        free_steady_since_ms=INSTANTS,
        verdict=st.sampled_from(["", "working", "stalled"]),
        canary_ok_at_ms=INSTANTS,
        tokens_per_s=st.sampled_from([None, 1.0, 900.0]),
        start=st.builds(
            life, INSTANTS.map(lambda ms: ms or NOW), revision=st.sampled_from([None, BEFORE, AFTER])
        ),
        revision=st.sampled_from([None, BEFORE, AFTER]),
        errands=st.dictionaries(
            st.sampled_from([f"GW-1-{undo}{step}" for undo in ("", "undo-") for step in STEPS]),
            st.builds(Errand, phase=st.sampled_from(ErrandPhase), began_at_ms=st.just(NOW)),
            max_size=6,
        ),
    ),
    new_alerts=st.sampled_from([(), (), ("GPUHot",)]),
)
HEARD = st.sampled_from([{}, {}, {"done": "yes"}, {"failed": "no"}, None])  # None: refused for good
TICKS = st.lists(
    st.tuples(LOOKS, HEARD, st.sampled_from([1, SECOND, 20 * SECOND, 20 * MINUTE])), min_size=1, max_size=40
)
PLANS = st.builds(
    lambda actions, mode, dry_run, more: plan(*actions, mode=mode, dry_run=dry_run, **more),
    st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=3),
    st.sampled_from([Mode.AUTO, Mode.AUTO, Mode.APPROVE, Mode.OBSERVE]),
    st.sampled_from([False, False, True]),
    st.sampled_from([{}, {"signals": SIGNALS}, {"undo": NO_WAY_BACK}]),
)


def check_row(was, r, step, look):
    """What holds of any row after any tick."""
    is_over = r.phase not in LIVE_PHASES
    steps = walked(r)
    assert 0 <= r.step_index < max(len(r.plan.steps), len(r.plan.undo))
    assert (step is None) == (not steps)
    assert step is None or step == steps[r.step_index]
    assert (r.outcome in machine.OUTCOMES) == (is_over or r.phase is Phase.ROLLING_BACK)
    if step and STEPS[step.action].is_deed:
        assert r.asked_at_ms is not None
        assert r.plan.mode is not Mode.OBSERVE
        assert not r.plan.dry_run
        assert not look.paused or r.phase is Phase.ROLLING_BACK
    check_course(r)
    if was.phase not in LIVE_PHASES:
        assert r == was


def check_course(r):
    """What is over is the beginning of each walk, up to the present step, without a gap."""
    for steps, is_undo in ((r.plan.steps, False), (r.plan.undo, True)):
        names = [past.action for past in r.course if past.is_undo is is_undo]
        assert names == [step.action for step in steps[: len(names)]]
        if r.phase is (Phase.ROLLING_BACK if is_undo else Phase.APPLYING):
            assert len(names) == r.step_index
    assert all(past.began_at_ms <= past.ended_at_ms <= r.since_ms for past in r.course)
    undone = [past.is_undo for past in r.course]
    assert undone == sorted(undone)


@given(PLANS, TICKS)
def test_whatever_is_seen_in_whatever_order(its_plan, ticks):
    r, now_ms, swapped = remediation.begin(its_plan, NOW), NOW, False
    for look, heard, later_ms in ticks:
        was = r
        r, step = remediation.advance(was, look, now_ms)
        check_row(was, r, step, look)
        assert remediation.advance(r, look, now_ms) == (r, step)  # level, not edge
        assert from_json(to_json(r), Remediation) == r
        swapped |= look.sight.revision == BEFORE and Phase.ROLLING_BACK in {was.phase, r.phase}
        if r.phase is Phase.ROLLING_BACK and r.plan.before and step.action == "start":
            assert swapped, "started before the settings were those of before"
        if step is not None and heard is None:
            r = remediation.refused(r, "no", now_ms)
        elif step is not None:
            r = dataclasses.replace(r, heard=heard)
        now_ms += later_ms


@given(PLANS, LOOKS)
def test_whatever_is_seen_for_ever_it_ends(its_plan, look):
    r, now_ms = remediation.begin(its_plan, NOW), NOW
    for _ in range(len(its_plan.steps) + len(its_plan.undo) + 5):
        r, _ = remediation.advance(r, look, now_ms)
        now_ms += 31 * MINUTE
    assert r.phase not in LIVE_PHASES
