"""The blockers and the planner: a whole situation in, a plan or a refusal out."""

import dataclasses

import pytest
from tests.decisions import LIMITS, NOW, alert, server, serving, situation

from gpuwatch import config, remediation
from gpuwatch.records import (
    ActionClass,
    Mode,
    Phase,
    Plan,
    Refusal,
    ServerPhase,
    ServerStart,
    Sight,
    StartOutcome,
    Step,
    SupervisorPhase,
)
from gpuwatch.remediation import Decision

ALERT = alert()
RESTART = config.DEFAULT_POLICIES[0]


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


def past(phase, at_ms, dry_run=False, asked=True, **of_plan):
    begun = remediation.begin(dataclasses.replace(plan(dry_run=dry_run), **of_plan), at_ms)
    return dataclasses.replace(begun, phase=phase, asked_at_ms=at_ms if asked else None)


def steps(*names, **more):
    return config.Policy(name="mine", match={}, steps=list(names), **more)


SERVING = serving()
UNHELPFUL = [past(Phase.ROLLED_BACK, NOW - 7_200_000 * n) for n in (1, 2, 3)]
STARTED_BADLY = ServerStart(
    server="m",
    began_at_ms=NOW - 9000,
    ended_at_ms=NOW - 1000,
    outcome=StartOutcome.FAILED,
    failure="kv_cache_too_small",
)


UNREAD = ServerStart(server="m", began_at_ms=NOW - 9000, outcome=StartOutcome.HEALTHY)
BLOCKED = [
    ("no_policy", {"policy": None}),
    ("notify_only", {"policy": config.DEFAULT_POLICIES[-1]}),
    ("no_server", {"server": None}),
    ("under_way", {"history": [past(Phase.APPLYING, NOW - 1000)]}),
    ("under_way", {"history": [past(Phase.ROLLING_BACK, NOW - 1000)]}),
    (
        "observe_mode",
        {
            "policy": steps("restart", mode=Mode.OBSERVE),
            "history": [past(Phase.REHEARSED, NOW - 1000, dry_run=True)],
        },
    ),
    ("paused", {"paused_until_ms": NOW + 1}),
    ("paused_open", {"paused_until_ms": remediation.FOREVER_MS}),
    ("backlog_skipped", {"skip_until_ms": ALERT.active_at_ms + 1}),
    ("breaker_open", {"all_history": UNHELPFUL, "limits": dataclasses.replace(LIMITS, breaker_count=3)}),
    ("no_supervisor", {"has_supervisor": False}),
    ("stopped_by_operator", {"server": server(ServerPhase.STOPPED)}),
    ("just_started", {"started_at_ms": NOW - 59_999}),
    ("clock_jumped", {"jumped_at_ms": NOW - 1}),
    ("stale_data", {"server": dataclasses.replace(server(), seen_at_ms=NOW - 30_001)}),
    ("supervisor_unknown", {"server": server(supervisor=SupervisorPhase.UNKNOWN)}),
    ("auto_restart", {"server": server(supervisor=SupervisorPhase.AUTO_RESTART)}),
    ("end_unread", {"server": server(started_at_ms=NOW - 9000), "starts": [UNREAD]}),
    ("end_unread", {"server": server(started_at_ms=NOW - 1000), "starts": [UNREAD]}),  # of the life before
    ("starting", {"server": server(supervisor=SupervisorPhase.ACTIVE, starting_since_ms=NOW - 1)}),
    ("starting", {"server": server(supervisor=SupervisorPhase.ACTIVATING)}),
    ("starting", {"server": server(supervisor=SupervisorPhase.DEACTIVATING)}),
    ("server_not_serving", {"policy": steps("release_cache")}),
    ("no_guest", {"policy": steps("limit_admission", limit=4), "server": SERVING, "sight": Sight(guests=1)}),
    ("no_guest", {"policy": steps("limit_running", limit=4), "server": SERVING}),
    ("no_guest", {"policy": steps("release_cache"), "server": SERVING}),
    ("load_unknown", {"policy": steps("limit_running"), "server": SERVING, "sight": Sight(guests=1)}),
    (
        "others_growing",
        {
            "policy": steps("release_cache"),
            "server": SERVING,
            "sight": Sight(guests=1, others_growing=True),
        },
    ),
    ("others_unknown", {"policy": steps("release_cache"), "server": SERVING, "sight": Sight(guests=1)}),
    ("no_revisions", {"policy": steps("reconfigure")}),
    ("two_failures", {"history": UNHELPFUL[:2]}),
    ("two_failures", {"history": [past(Phase.FAILED, NOW - 86_400_000 * n) for n in (1, 9)]}),
    ("budget_spent", {"history": [past(Phase.SUCCEEDED, NOW - n * 600_000) for n in (1, 2, 3)]}),
    ("cooling_down", {"history": [past(Phase.SUCCEEDED, NOW - 299_999)]}),
    ("would_fail_again", {"starts": [STARTED_BADLY]}),
]
BLOCKER_OF = {
    "observe_mode": "rehearsed",
    "paused_open": "paused",
    "others_unknown": "others_growing",
    "would_fail_again": "no_cure",
}


@pytest.mark.parametrize(("code", "changes"), BLOCKED)
def test_each_blocker_blocks(code, changes):
    decision = remediation.decide(situation(**changes), Mode.AUTO)
    assert isinstance(decision, Refusal)
    assert decision.code == code


def test_every_blocker_has_a_case_above():
    named = {blocker.__name__ for blocker in remediation.BLOCKERS}
    assert named == {BLOCKER_OF.get(code, code) for code, _ in BLOCKED}


@pytest.mark.parametrize(("code", "changes"), BLOCKED)
def test_a_refusal_tells_of_each_blocker_that_was_asked_up_to_the_one_that_blocks(code, changes):
    decision = remediation.decide(situation(**changes), Mode.AUTO)
    told = [c for c in decision.considered if c.option.startswith("blocker:")]
    assert [c.code for c in told] == ["passed"] * (len(told) - 1) + [code]
    assert told[-1].option == f"blocker:{BLOCKER_OF.get(code, code)}"


def test_when_nothing_objects_there_is_a_plan():
    decision = remediation.decide(situation(), Mode.AUTO)
    assert isinstance(decision, Decision)
    assert decision.revision is None
    assert "start" in [step.action for step in decision.plan.steps]
    assert (decision.plan.mode, decision.plan.kind) == (Mode.AUTO, ActionClass.RESTART)
    assert (decision.plan.before, decision.plan.after, decision.plan.by) == (None, None, "")
    asked = [c.option for c in decision.plan.considered if c.code == "passed"]
    assert asked == [f"blocker:{blocker.__name__}" for blocker in remediation.BLOCKERS]


@pytest.mark.parametrize(
    "changes",
    [
        {"history": [past(Phase.SUCCEEDED, NOW - 300_000)]},  # the cooldown is over to the millisecond
        {"history": [past(Phase.FAILED, NOW - 600_000)]},  # one failure is none too many
        {"history": UNHELPFUL, "all_history": UNHELPFUL, "resumed_at_ms": NOW - 1},  # a person said go on
        {
            "history": [past(Phase.ABORTED, NOW - 600_000 * n, asked=False) for n in (1, 2, 3)]
        },  # none was asked
        {"paused_until_ms": NOW},
        {"started_at_ms": NOW - 60_000},
        {"skip_until_ms": ALERT.active_at_ms},  # it began when the person spoke
        {"history": [past(Phase.FAILED, NOW - 7_200_000 * n, by="ann") for n in (1, 2)]},  # a person's own
        {"all_history": [past(Phase.FAILED, NOW - 11_000_000 * n) for n in (1, 2, 3)]},  # too far apart
        {"all_history": [past(Phase.FAILED, NOW - n, dry_run=True) for n in (1, 2, 3)]},  # only rehearsed
    ],
)
def test_what_no_longer_blocks(changes):
    assert isinstance(remediation.decide(situation(**changes), Mode.AUTO), Decision)


def test_the_breaker_stays_open_until_a_person_resumes():
    old = [past(Phase.FAILED, NOW - 30 * 86_400_000 - n) for n in (1, 2, 3)]
    assert remediation.decide(situation(all_history=old), Mode.AUTO).code == "breaker_open"
    resumed = situation(all_history=old, resumed_at_ms=NOW - 1)
    assert isinstance(remediation.decide(resumed, Mode.AUTO), Decision)


@pytest.mark.parametrize(("ended_before", "rest_ms"), [(1, 300_000), (2, 600_000), (3, 900_000)])
def test_the_rest_doubles_with_each_remediation_of_the_span_up_to_its_most(ended_before, rest_ms):
    limits = dataclasses.replace(LIMITS, budget_count=9, cooldown_most_ms=900_000)
    for age_ms, blocked in ((rest_ms - 1, True), (rest_ms, False)):
        history = [past(Phase.SUCCEEDED, NOW - age_ms - n) for n in range(ended_before)]
        decision = remediation.decide(situation(history=history, limits=limits), Mode.AUTO)
        assert isinstance(decision, Refusal) == blocked
        assert not blocked or decision.code == "cooling_down"


def test_what_is_reversible_and_what_restarts_have_budgets_of_their_own():
    restarts = [past(Phase.SUCCEEDED, NOW - n * 600_000) for n in (1, 2, 3)]
    capture = situation(policy=steps("capture"), history=restarts)
    assert isinstance(remediation.decide(capture, Mode.AUTO), Decision)
    light = [
        dataclasses.replace(r, plan=dataclasses.replace(r.plan, kind=ActionClass.REVERSIBLE))
        for r in restarts
    ]
    assert isinstance(remediation.decide(situation(history=light), Mode.AUTO), Decision)
    assert (
        remediation.decide(situation(policy=steps("capture"), history=light), Mode.AUTO).code
        == "budget_spent"
    )


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
    assert remediation.decide(situation(policy=careful), Mode.AUTO).plan.mode is Mode.APPROVE


def test_a_class_of_actions_may_have_a_mode_of_its_own():
    limits = dataclasses.replace(LIMITS, modes={ActionClass.REVERSIBLE: Mode.AUTO})
    light = remediation.decide(situation(policy=steps("capture"), limits=limits), Mode.OBSERVE)
    heavy = remediation.decide(situation(limits=limits), Mode.OBSERVE)
    assert (light.plan.mode, light.plan.dry_run) == (Mode.AUTO, False)
    assert (heavy.plan.mode, heavy.plan.dry_run) == (Mode.OBSERVE, True)


def test_a_plan_keeps_the_summary_in_each_language_that_it_has():
    alert = dataclasses.replace(ALERT, annotations={"summary": "m is down", "summary_zh": "m 已宕机"})
    signals = remediation.decide(situation(alert=alert), Mode.AUTO).plan.signals
    assert (signals["summary"], signals["summary_zh"]) == ("m is down", "m 已宕机")
    assert "summary_zh" not in remediation.decide(situation(), Mode.AUTO).plan.signals


def test_a_plan_keeps_how_full_the_kv_cache_was():
    decision = remediation.decide(situation(sight=Sight(kv_use_ratio=0.93)), Mode.AUTO)
    assert decision.plan.signals["kv_use_ratio"] == "0.93"
    assert "kv_use_ratio" not in remediation.decide(situation(), Mode.AUTO).plan.signals


RIVALS = Sight(
    rival_bytes={("GPU-0", "a"): 5, ("GPU-0", "VLLM::Worker"): 40, ("GPU-1", "b"): 30, ("GPU-1", "c"): 20}
)


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        ("memory_share_not_free", ["GPU-0 VLLM::Worker", "GPU-1 b", "GPU-1 c"]),
        ("runtime_oom", ["GPU-0 VLLM::Worker", "GPU-1 b", "GPU-1 c"]),
        ("port_busy", []),
        ("", []),
    ],
)
def test_of_a_failure_of_memory_the_three_who_held_most_are_kept_by_name(failure, told):
    died = dataclasses.replace(STARTED_BADLY, failure=failure)
    decision = remediation.decide(situation(policy=steps("capture"), starts=[died], sight=RIVALS), Mode.AUTO)
    signals = decision.plan.signals
    kept = [name.partition(":")[2] for name in signals if name.startswith("rival_bytes:")]
    assert kept == told
    assert not told or signals["rival_bytes:GPU-0 VLLM::Worker"] == "40"
