"""What becomes of a restart, of a wish for other arguments, and of memory that is not free."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import decisions
from tests.decisions import LIMITS, MINUTE, NOW, alert, server, serving

from gpuwatch import config, remediation
from gpuwatch.records import (
    ActionClass,
    Mode,
    Phase,
    Refusal,
    Revision,
    ServerPhase,
    ServerStart,
    Sight,
    StartOutcome,
)
from gpuwatch.remediation import Change, Decision, cure, wishes
from gpuwatch.servers.starts import failures

GIB = 2**30
H200 = {"0": 140 * GIB}
BASE = {"model": "m", "gpu_memory_utilization": 0.9, "max_model_len": 8192, "max_num_seqs": 128}
BOUNDS = {
    "gpu_memory_utilization": [0.1, 0.95],
    "max_model_len": [1024, 40960],
    "max_num_seqs": [16, 256],
    "limit_mm_per_prompt": [1, 16],
}
TOO_SMALL = {
    "max_model_len": "40960",
    "needed_bytes": str(6 * GIB),
    "available_bytes": str(3 * GIB),
    "longest_model_len": "20487",
}


def free(gib):
    return {"0": round(gib * GIB)}


# -- what becomes of a restart ------------------------------------------------------------------------------

WANTED = Revision(server="m", number=1, arguments=BASE, created_at_ms=NOW - 10**9, by="ann", why="first")
LESS = Revision(
    server="m",
    number=2,
    arguments={**BASE, "gpu_memory_utilization": 0.45},
    created_at_ms=NOW - 10**8,
    by="gpuwatch",
    why="memory_share_not_free",
    parent=1,
)
DOWN, SERVING = server(), serving()
GONE = Sight(processes=0, gpu_holders=0, free_bytes=H200, total_bytes=H200, revision=1)


def policy(*steps, **more):
    return config.Policy(name="p", match={}, steps=list(steps), **more)


KEPT = {
    "policy": policy("capture", "restart"),
    "sight": GONE,
    "revisions": [WANTED],
    "wanted": 1,
    "bounds": BOUNDS,
}


def situation(**changes):
    """Of a server whose settings gpuwatch keeps."""
    return decisions.situation(**{**KEPT, **changes})


def start(failure="", *, ended_ago_ms=MINUTE, outcome=StartOutcome.HEALTHY, revision=1, **more):
    """A life that ended, an hour long if it was healthy."""
    ended_ms = NOW - ended_ago_ms
    return ServerStart(
        server="m",
        began_at_ms=ended_ms - 3_600_000,
        healthy_at_ms=ended_ms - 3_540_000 if outcome is StartOutcome.HEALTHY else None,
        ended_at_ms=ended_ms,
        outcome=outcome,
        failure=failure,
        revision=revision,
        **more,
    )


def failed(failure, **more):
    return start(failure, outcome=StartOutcome.FAILED, **more)


def decided(**changes):
    return remediation.decide(situation(**changes), Mode.AUTO)


def actions_of(decision):
    return [step.action for step in decision.plan.steps]


@pytest.mark.parametrize(
    "starts",
    [
        [],
        [start()],
        [start("process_died")],
        [failed("unknown")],
        [failed("port_busy")],
        [failed("profiling_assert")],
        [start("runtime_oom")],
        [start("runtime_oom"), start("runtime_oom", ended_ago_ms=25 * 60 * MINUTE)],  # more than a day apart
        [failed("kv_cache_too_small", ended_ago_ms=2 * MINUTE), start()][::-1],  # which came to an end since
        [failed("memory_share_not_free")],  # whose memory is free now
    ],
)
def test_a_restart_stays_one_where_the_same_arguments_may_serve(starts):
    decision = decided(starts=starts)
    assert isinstance(decision, Decision)
    assert (decision.plan.kind, decision.plan.after, decision.revision) == (ActionClass.RESTART, None, None)


@pytest.mark.parametrize(
    ("last", "change"),
    [
        (failed("kv_cache_too_small", facts=TOO_SMALL), {"max_model_len": 20480}),
        (failed("no_memory_for_cache"), {"gpu_memory_utilization": 0.95}),
        (failed("runtime_oom"), {"gpu_memory_utilization": 0.87}),  # while it started
    ],
)
def test_a_restart_that_must_fail_again_becomes_a_change_of_arguments(last, change):
    decision = decided(starts=[last])
    plan, revision = decision.plan, decision.revision
    assert (plan.kind, plan.before, plan.after, plan.by) == (ActionClass.RECONFIGURE, 1, 2, "")
    assert revision.arguments == {**BASE, **change}
    assert (revision.number, revision.parent, revision.by, revision.why) == (2, 1, "gpuwatch", last.failure)
    assert actions_of(decision)[0] == "capture"
    assert "swap" in actions_of(decision)
    assert [c.code for c in plan.considered].count("chosen") == 1


def test_arguments_that_could_not_start_are_not_started_again_after_others_could_not_either():
    starts = [
        failed("unknown", revision=2),
        failed("kv_cache_too_small", ended_ago_ms=9 * MINUTE, facts=TOO_SMALL),
    ]
    tried = dataclasses.replace(LESS, arguments={**BASE, "max_model_len": 20480})
    decision = decided(starts=starts, revisions=[tried, WANTED])
    assert (decision.plan.before, decision.plan.after) == (1, 3)
    assert decision.revision.arguments == {**BASE, "gpu_memory_utilization": 0.93}


COULD_NOT_START = [failed("kv_cache_too_small", facts=TOO_SMALL)]


@pytest.mark.parametrize(
    ("name", "changes", "undo"),
    [
        ("it could not start", {"starts": COULD_NOT_START}, "swap"),
        ("nor did others since", {"starts": [failed("unknown", revision=2), *COULD_NOT_START]}, "swap"),
        (
            "it served before",
            {"starts": [start("runtime_oom")] * 2},
            "swap stop await_memory start canary open_door",
        ),
    ],
)
def test_a_dead_server_is_taken_back_to_a_start_only_where_that_may_serve(name, changes, undo):
    decision = decided(**changes)
    assert decision.plan.kind is ActionClass.RECONFIGURE
    assert [step.action for step in decision.plan.undo] == undo.split()


def test_a_server_that_lives_is_started_again_whatever_its_last_start_was():
    sight = dataclasses.replace(GONE, processes=3, gpu_holders=1, requests_running=40)
    decision = decided(
        alert=alert("VLLMPreempting"),
        policy=policy("reconfigure"),
        server=SERVING,
        sight=sight,
        starts=COULD_NOT_START,
    )
    assert "start" in [step.action for step in decision.plan.undo]


def test_without_revisions_such_a_restart_is_refused():
    decision = decided(
        starts=[failed("kv_cache_too_small")], revisions=[], sight=dataclasses.replace(GONE, revision=None)
    )
    assert (decision.code, decision.facts) == ("would_fail_again", {"failure": "kv_cache_too_small"})


def test_the_second_death_for_lack_of_memory_within_a_day_changes_arguments():
    deaths = [start("runtime_oom"), start("runtime_oom", ended_ago_ms=23 * 60 * MINUTE)]
    assert decided(starts=deaths).revision.arguments["gpu_memory_utilization"] == 0.87
    unkept = decided(starts=deaths, revisions=[], sight=dataclasses.replace(GONE, revision=None))
    assert unkept.plan.kind is ActionClass.RESTART  # it may serve for long again
    unbounded = decided(starts=deaths, bounds={})
    assert unbounded.plan.kind is ActionClass.RESTART
    assert {c.code for c in unbounded.plan.considered if c.option == "max_num_seqs"} == {"no_bounds"}


def test_a_server_with_images_sends_fewer_of_them_first():
    images = dataclasses.replace(WANTED, arguments={**BASE, "limit_mm_per_prompt": {"image": 8}})
    decision = decided(revisions=[images], starts=[failed("runtime_oom")])
    assert decision.revision.arguments["limit_mm_per_prompt"] == {"image": 4}


def test_a_bad_argument_leads_back_to_the_last_good_revision_or_nowhere():
    bad = dataclasses.replace(LESS, number=2, arguments={**BASE, "max_num_seqs": 0})
    now_on_bad = dataclasses.replace(GONE, revision=2)
    starts = [failed("bad_argument", revision=2), start(revision=1, ended_ago_ms=60 * MINUTE)]
    decision = decided(revisions=[bad, WANTED], sight=now_on_bad, starts=starts)
    assert (decision.plan.before, decision.plan.after, decision.revision) == (2, 1, None)
    nowhere = decided(revisions=[bad, WANTED], sight=now_on_bad, starts=starts[:1])
    assert (nowhere.code, nowhere.facts["failure"]) == ("would_fail_again", "bad_argument")


def test_the_last_good_revision_is_that_which_served_last_not_the_newest():
    bad = dataclasses.replace(LESS, number=3, arguments={**BASE, "max_num_seqs": 0})
    starts = [
        failed("bad_argument", revision=3),
        start(revision=1, ended_ago_ms=MINUTE),
        start(revision=2, ended_ago_ms=60 * MINUTE),
    ]
    decision = decided(
        revisions=[bad, LESS, WANTED], sight=dataclasses.replace(GONE, revision=3), starts=starts
    )
    assert (decision.plan.before, decision.plan.after) == (3, 1)


# -- memory that is not free --------------------------------------------------------------------------------


def rival(gib, **more):
    return dataclasses.replace(GONE, free_bytes=free(140 - gib), **{"others_growing": False, **more})


def test_a_rivals_memory_is_waited_for_before_the_share_goes_down():
    died = [start("runtime_oom", ended_ago_ms=5 * MINUTE - 1)]
    waiting = decided(starts=died, sight=rival(70))
    assert (waiting.code, waiting.facts["free_percent"], waiting.facts["wanted_percent"]) == (
        "memory_not_free",
        "50",
        "90",
    )
    died = [start("runtime_oom", ended_ago_ms=5 * MINUTE)]
    decision = decided(starts=died, sight=rival(70))
    assert decision.revision.arguments == {**BASE, "gpu_memory_utilization": 0.48}
    assert decision.revision.why == "memory_share_not_free"


def test_a_worker_that_outlives_its_memory_does_not_hide_that_a_rival_has_it():
    assert decided(starts=[start("runtime_oom")], sight=rival(70, processes=1)).code == "memory_not_free"


def test_an_operator_says_how_long_a_rivals_memory_is_waited_for():
    died = [start("runtime_oom", ended_ago_ms=20_000)]
    at_once, longer = (dataclasses.replace(LIMITS, wait_for_memory_ms=ms) for ms in (20_000, 20_001))
    assert decided(starts=died, sight=rival(70), limits=at_once).plan.after == 2
    assert decided(starts=died, sight=rival(70), limits=longer).code == "memory_not_free"


def test_the_wait_counts_from_the_first_start_that_failed_for_it():
    tries = [failed("memory_share_not_free", ended_ago_ms=n * MINUTE) for n in (1, 4, 6)]
    assert decided(starts=tries, sight=rival(70)).plan.after == 2
    assert decided(starts=tries[:2], sight=rival(70)).code == "memory_not_free"


def test_without_a_sight_of_the_gpus_the_failure_itself_says_what_was_free():
    facts = {"free_bytes": "50", "wanted_bytes": "90", "total_bytes": "100"}
    blind = dataclasses.replace(GONE, free_bytes={}, total_bytes={}, gpu_holders=None)
    fresh = failed("memory_share_not_free", facts=facts)
    assert decided(starts=[fresh], sight=blind).code == "memory_not_free"
    old = failed("memory_share_not_free", facts=facts, ended_ago_ms=6 * MINUTE)
    assert decided(starts=[old], sight=blind).revision.arguments["gpu_memory_utilization"] == 0.48


@pytest.mark.parametrize("left", [{"gpu_holders": 1}, {"processes": 2, "gpu_holders": None}])
def test_what_the_server_itself_left_behind_is_ended_by_a_restart(left):
    decision = decided(starts=[failed("memory_share_not_free")], sight=rival(70, **left))
    assert decision.plan.kind is ActionClass.RESTART


def test_memory_that_is_not_free_is_waited_for_as_long_as_nothing_may_be_changed():
    died = [start("runtime_oom", ended_ago_ms=60 * MINUTE)]
    unkept = {
        "revisions": [],
        "sight": rival(70, revision=None),
        "starts": [dataclasses.replace(*died, arguments={"model": "m"})],
    }
    for changes in ({"bounds": {}}, unkept):
        decision = decided(**{"starts": died, "sight": rival(70), **changes})
        assert isinstance(decision, Refusal)
        assert decision.code == "memory_not_free"


LIVES = st.builds(
    lambda failure, ended, ago, revision, facts: start(
        failure, outcome=ended, ended_ago_ms=ago * MINUTE, revision=revision, facts=facts, version="0.32.0"
    ),
    st.sampled_from(["", *sorted(failures.KINDS)]),
    st.sampled_from(StartOutcome),
    st.integers(0, 2000),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([{}, TOO_SMALL, {"free_bytes": "5", "wanted_bytes": "9", "total_bytes": "10"}]),
)


@given(
    starts=st.lists(LIVES, max_size=4),
    free_gib=st.none() | st.integers(0, 140),
    processes=st.sampled_from([None, 0, 2]),
    holders=st.sampled_from([None, 0, 1]),
    current=st.sampled_from([None, 1, 2]),
    steps=st.sampled_from([("restart",), ("capture", "reconfigure"), ("restart", "reconfigure"), ("drain",)]),
    label=st.sampled_from(["restart", "return"]),
)
def test_whatever_happened_a_change_is_new_bounded_and_can_be_taken_back(
    starts, free_gib, processes, holders, current, steps, label
):
    sight = Sight(
        processes=processes,
        gpu_holders=holders,
        free_bytes={} if free_gib is None else free(free_gib),
        total_bytes={} if free_gib is None else H200,
        revision=current,
    )
    decision = decided(
        alert=alert(remediation=label),
        policy=policy(*steps),
        starts=starts,
        sight=sight,
        revisions=[LESS, WANTED],
    )
    if isinstance(decision, Refusal):
        assert decision.code not in {"internal_error", "no_policy"}
        return
    plan, made = decision.plan, decision.revision
    assert (
        (plan.kind is ActionClass.RECONFIGURE) == (plan.after is not None) == ("swap" in actions_of(decision))
    )
    if plan.after is not None:
        assert plan.before == current != plan.after
        assert plan.undo[0].args["revision"] == str(current)
    if made is not None:
        failed_ones = cure.failed_arguments([LESS, WANTED], starts)
        changed = [name for name, value in made.arguments.items() if BASE.get(name) != value]
        assert made.arguments not in failed_ones
        assert all(least <= made.arguments[n] <= most for n in changed for least, most in [BOUNDS[n]])


# -- back to what was wanted, and what people ask -----------------------------------------------------------

RETURN = {
    "alert": alert("VLLMNotAsWanted", remediation="return"),
    "policy": policy("reconfigure"),
    "server": SERVING,
}


def on_less(**sight):
    return {
        **RETURN,
        "revisions": [LESS, WANTED],
        "sight": Sight(processes=3, gpu_holders=1, total_bytes=H200, revision=2, **sight),
    }


def test_the_wanted_revision_comes_back_when_its_memory_does():
    decision = decided(**on_less(free_bytes=free(66)))
    assert (decision.plan.before, decision.plan.after, decision.revision) == (2, 1, None)
    assert decision.plan.signals["why"] == "return"
    short = decided(**on_less(free_bytes=free(65)))  # with its own 63 not the 92 percent that it takes
    assert short.code == "memory_not_free"


@pytest.mark.parametrize(
    ("process_gib", "free_now_gib", "code"),
    [
        (124, 74, "chosen"),  # a rival had 14, and is gone
        (124, 65, "memory_not_free"),  # it has most of it still
        (138, 74, "failed_already"),  # nobody had any
    ],
)
def test_who_ran_out_of_memory_beside_a_rival_returns_when_the_rival_is_gone(process_gib, free_now_gib, code):
    facts = {name: str(n * GIB) for name, n in (("total", 140), ("free", 2), ("process", process_gib))}
    facts = {f"{name}_bytes": figure for name, figure in facts.items()}
    oom = {"revisions": [dataclasses.replace(LESS, why="runtime_oom"), WANTED]}
    decision = decided(
        **{**on_less(free_bytes=free(free_now_gib)), **oom}, starts=[start("runtime_oom", facts=facts)]
    )
    found = decision if isinstance(decision, Refusal) else decision.plan.considered[0]
    assert found.code == code


def test_who_cannot_tell_what_is_free_does_not_return():
    assert decided(**on_less()).code == "memory_unknown"


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("already_current", {"sight": dataclasses.replace(GONE, revision=1)}),
        ("no_revisions", {"wanted": None}),
        ("failed_already", {"revisions": [dataclasses.replace(LESS, why="no_memory_for_cache"), WANTED]}),
        ("failed_already", {"revisions": [dataclasses.replace(LESS, why="runtime_oom"), WANTED]}),
    ],
)
def test_there_is_nothing_to_return_to(code, changes):
    assert decided(**{**on_less(free_bytes=H200), **changes}).code == code


def test_preemption_lowers_the_sequences_of_a_server_that_serves():
    sight = dataclasses.replace(
        GONE, processes=3, gpu_holders=1, requests_running=40, requests_waiting=9, tokens_per_s=100.0
    )
    decision = decided(
        alert=alert("VLLMPreempting"), policy=policy("reconfigure"), server=SERVING, sight=sight
    )
    assert decision.revision.arguments["max_num_seqs"] == 30
    signals = decision.plan.signals
    assert (signals["tokens_per_s"], signals["least_tokens_per_s"]) == ("100.0", "50.0")
    assert (signals["running"], signals["waiting"], signals["kv_cache_tokens_least"]) == ("40", "9", "8192")
    assert signals["summary"] == "Server m is down"


def test_a_reconfigure_for_which_nothing_speaks_is_refused():
    decision = decided(alert=alert("GPUHot"), policy=policy("reconfigure"), server=SERVING)
    assert decision.code == "nothing_to_change"


@pytest.mark.parametrize("failure", ["port_busy", "profiling_assert", "memory_share_not_free"])
def test_what_stood_beside_the_server_and_is_gone_asks_for_the_same_arguments_again(failure):
    decision = decided(starts=[failed(failure)], policy=policy("capture", "reconfigure"), quantised_model="q")
    assert (decision.plan.kind, decision.plan.after) == (ActionClass.RESTART, None)
    assert "swap" not in actions_of(decision)


@pytest.mark.parametrize("steps", [("restart",), ("reconfigure",)])
def test_what_ended_with_other_arguments_says_nothing_of_these(steps):
    starts = [failed("kv_cache_too_small", revision=2), start()]
    decision = decided(starts=starts, revisions=[LESS, WANTED], policy=policy(*steps))
    assert (decision.plan.kind, decision.plan.after) == (ActionClass.RESTART, None)


def test_the_same_change_again_is_the_same_revision():
    made = decided(starts=[failed("no_memory_for_cache")]).revision
    again = decided(starts=[failed("no_memory_for_cache")], revisions=[made, WANTED])
    assert (again.plan.after, again.revision) == (made.number, None)


@pytest.mark.parametrize(
    ("of_policy", "of_class", "mode"),
    [
        (Mode.AUTO, Mode.APPROVE, Mode.APPROVE),  # the cure is heavier than the policy says
        (Mode.APPROVE, Mode.AUTO, Mode.APPROVE),
        (None, Mode.APPROVE, Mode.APPROVE),
        (None, Mode.OBSERVE, Mode.OBSERVE),
    ],
)
def test_a_cure_of_another_class_takes_the_stricter_mode(of_policy, of_class, mode):
    limits = dataclasses.replace(LIMITS, modes={ActionClass.RECONFIGURE: of_class})
    last = [failed("no_memory_for_cache")]
    decision = decided(starts=last, limits=limits, policy=policy("restart", mode=of_policy))
    assert (decision.plan.mode, decision.plan.dry_run) == (mode, mode is Mode.OBSERVE)
    assert (decision.revision is None) == (mode is Mode.OBSERVE)  # a rehearsal saves nothing


def asked(change, **changes):
    s = situation(alert=remediation.asked("m", change), policy=None, server=SERVING, **changes)
    return remediation.decide_change(s, change)


ANN = Change(arguments={**BASE, "max_num_seqs": 64}, by="ann", why="fewer at once", at_ms=NOW)


def test_what_a_person_asks_is_planned_whatever_the_mode():
    decision = asked(ANN)
    assert (decision.plan.mode, decision.plan.by, decision.plan.dry_run) == (Mode.AUTO, "ann", False)
    assert (decision.plan.before, decision.plan.after, decision.revision.why) == (1, 2, "fewer at once")


def test_a_persons_first_revision_needs_none_before_it():
    decision = asked(ANN, revisions=[], sight=dataclasses.replace(GONE, revision=None))
    assert (decision.plan.before, decision.plan.after) == (None, 1)
    assert "swap" in actions_of(decision)


def test_a_person_may_have_a_revision_again_though_budget_and_failures_are_against_it():
    spent = [
        dataclasses.replace(
            remediation.begin(asked(ANN).plan, NOW - n), phase=Phase.FAILED, asked_at_ms=NOW - n
        )
        for n in (1, 2, 3, 4)
    ]
    on_two = {"revisions": [LESS, WANTED], "sight": dataclasses.replace(GONE, revision=2)}
    decision = asked(Change(revision=1, by="ann"), history=spent, all_history=spent, **on_two)
    assert (decision.plan.after, decision.revision) == (1, None)


@pytest.mark.parametrize(
    ("code", "change", "changes", "waits"),
    [
        ("paused", ANN, {"paused_until_ms": NOW + 1}, True),
        ("starting", ANN, {"server": dataclasses.replace(DOWN, starting_since_ms=NOW)}, True),
        ("stale_data", ANN, {"server": dataclasses.replace(SERVING, seen_at_ms=NOW - 30_001)}, True),
        ("stopped_by_operator", ANN, {"server": dataclasses.replace(DOWN, phase=ServerPhase.STOPPED)}, True),
        ("no_supervisor", ANN, {"has_supervisor": False}, False),
        ("no_such_revision", Change(revision=9, by="ann"), {}, False),
        ("already_current", Change(revision=1, by="ann"), {}, False),
        ("already_current", Change(arguments=BASE, by="ann"), {}, False),
        ("no_revisions", ANN, {"sight": dataclasses.replace(GONE, revision=None)}, False),
    ],
)
def test_a_wish_that_cannot_be_carried_out_waits_or_is_dropped(code, change, changes, waits):
    s = dataclasses.replace(
        situation(alert=remediation.asked("m", change), policy=None, server=SERVING), **changes
    )
    decision = remediation.decide_change(s, change)
    assert decision.code == code
    assert (code in remediation.PASSING) == waits


def test_wishes_survive_their_rows():
    rows = {
        **wishes.change("m", arguments={"a": [1, False]}, by="ann", why="x|y", at_ms=5),
        **wishes.change("n", revision=3, by="bob", why="", at_ms=6),
        **wishes.resume(7, skip_backlog=True),
        "wanted:m": "4",
    }
    read = remediation.Wishes.of({name: text for name, text in rows.items() if text is not None})
    assert read.changes["m"] == Change(arguments={"a": [1, False]}, by="ann", why="x|y", at_ms=5)
    assert read.changes["n"] == Change(revision=3, by="bob", at_ms=6)
    assert (read.wanted, read.skip_until_ms, read.resumed_at_ms) == ({"m": 4}, 7, 7)
    assert wishes.granted("m", 5) == {"change:m": None, "wanted:m": "5"}


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "1", "[]", "{}", "null",
        '{"arguments": null, "revision": null, "by": "a", "why": "", "at_ms": 1}',
        '{"arguments": {}, "revision": 1, "by": "a", "why": "", "at_ms": 1}',
        '{"arguments": null, "revision": true, "by": "a", "why": "", "at_ms": 1}',
        '{"arguments": null, "revision": 1, "by": "a", "why": "", "at_ms": "soon"}',
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_no_wish(text):
    assert remediation.Wishes.of({"change:m": text, "wanted:m": "x"}).changes == {}
