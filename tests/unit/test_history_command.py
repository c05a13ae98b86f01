"""What `gpuwatch history` and `gpuwatch why` tell of what was done, and of what was not."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from contextlib import closing

import pytest
from click.testing import CliRunner

from gpuwatch.cli.history import history, why
from gpuwatch.errors import ConfigError
from gpuwatch.notify import incident_id
from gpuwatch.records import (
    ActionClass,
    Alert,
    AlertState,
    Considered,
    Labels,
    Mode,
    PastStep,
    Phase,
    Plan,
    Refusal,
    Remediation,
    Step,
    StepEnd,
    Transition,
)
from gpuwatch.store.state import open_state
from gpuwatch.store.writing import Audit, Changes

AT_MS = 1_795_252_500_000
SECOND, MINUTE = 1000, 60_000
GIB = 2**30
DOWN = Labels.of(alertname="VLLMDown", severity="critical", server="qwen")
RESTART = ("drain", "stop", "await_memory", "start", "canary", "open_door")
RECONFIGURE = ("check", "drain", "stop", "await_memory", "swap", "start", "canary", "open_door")
ACCOUNT = {
    "requests_finished": 12.0,
    "requests_aborted": 3.0,
    "requests_refused": 0.0,
    "seconds_without_service": 42.0,
    "memory_before_bytes": 118.0 * GIB,
    "memory_after_bytes": 100.5 * GIB,
    "tokens_per_s_before": 850.0,
}


def steps(*names, **args):
    return tuple(Step(action=name, within_ms=MINUTE, args=args.get(name, {})) for name in names)


def course(*ends, began_ms=0, is_undo=False):
    """Steps one after another, each with its name, its end and how many seconds it took."""
    for action, end, seconds in ends:
        at_ms, began_ms = AT_MS + began_ms, began_ms + seconds * SECOND
        yield PastStep(
            action=action, began_at_ms=at_ms, ended_at_ms=AT_MS + began_ms, end=end, is_undo=is_undo
        )


def done(count, names=RECONFIGURE, **more):
    return course(*((name, StepEnd.DONE, 5) for name in names[:count]), **more)


def plan(name="GW-AAAAAA", actions=RESTART, **more):
    filled = {
        "server": "qwen",
        "alert": "VLLMDown",
        "alert_labels": DOWN,
        "verify_for_ms": 2 * MINUTE,
        "mode": Mode.AUTO,
        "dry_run": False,
        "policy": "restart",
        **more,
    }
    named = ("reconfigure",) if "swap" in actions else ("restart",)
    return Plan(id=name, actions=named, steps=steps(*actions), **filled)


def remediation(the_plan, phase=Phase.SUCCEEDED, *, after_ms=0, lasted_ms=63 * SECOND, step=0, **more):
    created_ms = AT_MS + after_ms
    return Remediation(
        plan=the_plan,
        phase=phase,
        step_index=step,
        since_ms=created_ms + lasted_ms,
        created_at_ms=created_ms,
        **more,
    )


def firing(labels=DOWN, annotations=None):
    return Alert(
        rule="VLLMDown",
        labels=labels,
        annotations=annotations or {},
        state=AlertState.FIRING,
        value=1,
        active_at_ms=AT_MS,
        fired_at_ms=AT_MS,
    )


@pytest.fixture
def gpuwatch(tmp_path):
    """Writes rows, then runs a command on them."""
    settings = tmp_path / "g.yaml"
    settings.write_text(f"state_dir: {tmp_path}\nservers:\n  - name: qwen\n    url: http://127.0.0.1:8000\n")

    def run(command, *words, lang="en", **rows):
        with closing(open_state(tmp_path, now_ms=AT_MS).state) as state:
            state.write([Changes(**rows)])
        if lang != "en":
            settings.write_text(settings.read_text() + f"lang: {lang}\n")
        return (
            CliRunner()
            .invoke(command, [*words, "--config", os.fspath(settings)], catch_exceptions=False)
            .output
        )

    return run


# -- history ---------------------------------------------------------------------------------------------


def test_before_anything_was_done_it_says_so(gpuwatch):
    assert gpuwatch(history) == "nothing has been done yet\n"


def test_each_remediation_tells_why_how_long_and_what_it_cost_the_newest_first(gpuwatch):
    older = remediation(plan(), outcome="restored", facts={"seconds": "42"}, account=ACCOUNT)
    newer = remediation(plan("GW-BBBBBB"), Phase.FAILED, after_ms=MINUTE, outcome="relapsed")
    text = gpuwatch(history, remediations=[older, newer])
    newest, oldest = text.split("\n\n")
    assert newest.startswith("GW-BBBBBB  ")
    assert "failed: the alert came back" in newest
    head, circumstances, cost = oldest.rstrip().splitlines()
    assert head.startswith("GW-AAAAAA  2026-11-2")
    assert head.endswith("qwen  restart  succeeded: healthy again after 42 s")
    assert "VLLMDown" in circumstances
    assert "gpuwatch" in circumstances
    assert "1 m 3 s" in circumstances
    for figure in (" 42 s", " 12", " 3", " 0", "118 GiB → 100.5 GiB", "850/s → ?"):
        assert figure in cost


def test_the_longest_step_is_told_with_how_long_it_took(gpuwatch):
    walked = course(("drain", StepEnd.DONE, 3), ("start", StepEnd.DONE, 40), ("open_door", StepEnd.DONE, 15))
    row = remediation(plan(), course=tuple(walked))
    assert "took 1 m 3 s · longest step start 40 s" in gpuwatch(history, remediations=[row])
    (found,) = json.loads(gpuwatch(history, "--json"))
    assert found["longest_step"] == {"action": "start", "took_ms": 40 * SECOND}
    at_once = remediation(plan(), course=tuple(course(("drain", StepEnd.DONE, 0))))
    assert "longest" not in gpuwatch(history, remediations=[at_once])


def test_a_change_of_arguments_tells_which_person_made_it_and_why_and_the_revisions(gpuwatch):
    wished = plan(
        actions=RECONFIGURE,
        alert="",
        by="alice",
        before=3,
        after=4,
        kind=ActionClass.RECONFIGURE,
        signals={"why": "longer prompts"},
    )
    text = gpuwatch(history, remediations=[remediation(wished, Phase.ROLLED_BACK)])
    assert "because longer prompts · by alice" in text
    assert "reconfigure" in text
    assert "restart" not in text
    assert "alice" in text
    assert "3 → 4" in text


def test_a_person_s_reason_is_told_once_and_in_one_line(gpuwatch):
    wished = plan(actions=RECONFIGURE, alert="", by="alice", signals={"why": "longer\nprompts"})
    found = cells(gpuwatch(why, "GW-AAAAAA", remediations=[remediation(wished)]))
    assert found["because"] == ["longer prompts"]
    assert not {"alert", "seen"} & found.keys()


def test_who_wants_a_change_without_saying_why_is_not_given_a_cause(gpuwatch):
    row = remediation(plan(actions=RECONFIGURE, alert="", by="alice"), Phase.FAILED)
    assert "because" not in gpuwatch(history, remediations=[row])


def test_a_server_s_history_is_its_own_and_as_long_as_asked(gpuwatch):
    rows = [remediation(plan(f"GW-{n}"), after_ms=n) for n in range(3)]
    rows.append(remediation(plan("GW-X", server="other"), after_ms=9))
    found = json.loads(gpuwatch(history, "qwen", "-n", "2", "--json", remediations=rows))
    assert [one["id"] for one in found] == ["GW-2", "GW-1"]


def test_a_server_that_nobody_knows_is_refused_with_those_there_are(gpuwatch):
    with pytest.raises(ConfigError, match=r"history quen: no such server.*qwen"):
        gpuwatch(history, "quen")


def test_programs_are_given_every_figure_and_no_words(gpuwatch):
    (found,) = json.loads(gpuwatch(history, "--json", remediations=[remediation(plan(), account=ACCOUNT)]))
    assert found["account"] == ACCOUNT
    assert (found["created_at_ms"], found["ended_at_ms"], found["took_ms"]) == (AT_MS, AT_MS + 63_000, 63_000)
    assert (found["phase"], found["actions"], found["mode"]) == ("succeeded", ["restart"], "auto")


def test_what_lives_has_not_ended_and_tells_its_step(gpuwatch):
    rows = [remediation(plan(), Phase.APPLYING, step=1)]
    (found,) = json.loads(gpuwatch(history, "--json", remediations=rows))
    assert (found["ended_at_ms"], found["step"], found["since_ms"]) == (None, "stop", AT_MS + 63_000)
    assert found["took_ms"] >= 0
    assert "stop (since " in gpuwatch(history)


def test_a_dry_run_tells_what_became_of_the_problem(gpuwatch):
    dry = remediation(plan(dry_run=True, mode=Mode.OBSERVE), Phase.REHEARSED, lasted_ms=0, outcome="dry_run")
    over = Transition(
        alert=firing(), was=AlertState.FIRING, now=AlertState.RESOLVED, at_ms=AT_MS + 5 * MINUTE
    )
    other = remediation(plan("GW-BBBBBB", dry_run=True), Phase.REHEARSED, after_ms=6 * MINUTE, lasted_ms=0)
    text = gpuwatch(history, remediations=[dry, other], transitions=[over])
    still, itself = text.split("\n\n")
    assert "5 m" in itself
    assert "5 m" not in still
    found = json.loads(gpuwatch(history, "--json"))
    assert [one["left_alone"]["by"] for one in found] == ["still", "itself"]


def test_in_chinese_the_words_that_are_there_are_chinese(gpuwatch):
    rows = [remediation(plan(), outcome="restored", facts={"seconds": "42"})]
    assert "重启  已修复: 42 秒后恢复正常" in gpuwatch(history, lang="zh", remediations=rows)


def test_names_of_strangers_do_not_command_the_terminal(gpuwatch):
    rows = [remediation(plan(by="eve\x1b[2J"), Phase.ABORTED, outcome="aborted_by", facts={"by": "e\x07\n"})]
    for command, words in ((history, ()), (why, ("GW-AAAAAA",))):
        text = gpuwatch(command, *words, remediations=rows)
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "eve\ufffd[2J" in text


@pytest.mark.parametrize(("command", "said"), [(history, "尚未做过任何处置"), (why, "当前没有未执行的处置")])
def test_in_chinese_nothing_is_told_in_chinese(gpuwatch, command, said):
    assert gpuwatch(command, lang="zh") == f"{said}\n"


# -- why -------------------------------------------------------------------------------------------------


def cells(text):
    """The values by label, of the lines below the headline."""
    found, label = {}, ""
    for line in text.splitlines()[1:]:
        name, _, rest = line[2:].partition("  ")
        label = name or label
        found.setdefault(label, []).append(rest.strip())
    return found


DECIDED = plan(
    actions=RECONFIGURE,
    mode=Mode.APPROVE,
    before=3,
    after=4,
    undo=steps("swap", "stop", "start"),
    considered=(
        Considered(option="gpu_memory_utilization", code="no_bounds"),
        Considered(option="max_num_seqs", code="chosen", facts={"from": "256", "to": "128"}),
        Considered(option="blocker:paused", code="passed"),
        Considered(option="blocker:starting", code="passed"),
    ),
    signals={"value": "1", "verdict": "stalled", "free_bytes:GPU-0": str(2 * GIB), "summary": "qwen is down"}
    | {"tokens_per_s": "136.39434570210997"},
)


def test_a_decision_tells_what_was_seen_and_considered_and_who_said_yes(gpuwatch):
    audit = [
        Audit(at_ms=AT_MS, who="bob", what="approve", facts={"remediation": "GW-AAAAAA"}),
        Audit(at_ms=AT_MS, who="eve", what="deny", facts={"remediation": "GW-OTHER"}),
    ]
    applying = remediation(DECIDED, Phase.APPLYING, step=2, account=ACCOUNT)
    text = gpuwatch(why, "gw-aaaaaa", remediations=[applying], audit=audit)
    found = cells(text)
    assert found["alert"] == ['VLLMDown{server="qwen",severity="critical"}']
    ends = ("1", "stalled", "GPU-0 2 GiB", "qwen is down", "tokens/s 136.394")
    assert all(seen.endswith(end) for seen, end in zip(found["seen"], ends, strict=True))
    considered = found["considered"]
    assert considered[0].startswith("gpu_memory_utilization: ")
    assert considered[1].startswith("max_num_seqs: ")
    assert "256" in considered[1]
    assert "128" in considered[1]
    assert "paused, starting" in text
    assert "bob" in text
    assert "eve " not in text


def told(gpuwatch, row):
    (found,) = json.loads(gpuwatch(why, row.plan.id, "--json", remediations=[row]))
    return found["steps"], found["undo"]


def test_in_chinese_a_decision_is_told_in_chinese(gpuwatch):
    signals = {"summary": "qwen is down", "summary_zh": "qwen 已宕机", "kv_use_ratio": "0.93", "wanted": "3"}
    signals["rival_bytes:GPU-0 train.py"] = str(40 * GIB)
    its_plan = dataclasses.replace(
        DECIDED, signals=signals, undo=steps("swap", "stop", swap={"revision": "3"})
    )
    row = remediation(its_plan, Phase.APPLYING, step=1, course=tuple(done(1)))
    found = cells(gpuwatch(why, "GW-AAAAAA", lang="zh", remediations=[row]))
    assert found["所见"] == [
        "摘要 qwen 已宕机",
        "KV缓存占用 93 %",
        "期望的版本 3",
        "其他进程占用 GPU-0 train.py 40 GiB",
    ]
    assert found["考虑过"][1] == "max_num_seqs: 选中 (由 256, 改为 128)"
    assert re.split(r"\s{2,}", found["步骤"][0]) == ["步骤", "开始时间", "耗时", "限时", "结果"]
    assert [line.split()[-1] for line in found["步骤"][1:4]] == ["已完成", "进行中", "未到达"]
    assert found["回退"][0].startswith("切换配置 (第 3 版)")
    assert "summary_zh" not in gpuwatch(why, "GW-AAAAAA")


def test_in_english_a_summary_is_in_english(gpuwatch):
    signals = {"summary": "qwen is down", "summary_zh": "qwen 已宕机"}
    row = remediation(dataclasses.replace(DECIDED, signals=signals))
    assert cells(gpuwatch(why, "GW-AAAAAA", remediations=[row]))["seen"] == ["summary qwen is down"]


def states(gpuwatch, row):
    return tuple([step["state"] for step in walk] for walk in told(gpuwatch, row))


UNDO = ("swap", "stop", "start")


def test_steps_tell_how_far_it_has_come(gpuwatch):
    applying = remediation(DECIDED, Phase.APPLYING, step=2, course=tuple(done(2)))
    walk, undo = states(gpuwatch, applying)
    assert walk == ["done", "done", "under_way", *["open"] * 5]
    assert undo == ["open"] * 3
    verifying = remediation(DECIDED, Phase.VERIFYING, step=7, course=tuple(done(8)))
    assert states(gpuwatch, verifying)[0] == ["done"] * 8
    assert states(gpuwatch, remediation(DECIDED, Phase.AWAITING_APPROVAL))[0] == ["open"] * 8


def test_each_step_tells_when_it_began_and_when_it_was_over(gpuwatch):
    walked = (("check", StepEnd.DONE, 9), ("drain", StepEnd.LATE, 60), ("stop", StepEnd.FAILED, 2))
    row = remediation(
        DECIDED, Phase.ROLLING_BACK, lasted_ms=71 * SECOND, course=tuple(course(*walked)), is_cut=True
    )
    walk, undo = told(gpuwatch, row)
    spans = [(step["state"], step["began_at_ms"], step["ended_at_ms"]) for step in (*walk[:4], *undo[:2])]
    assert spans == [
        ("done", AT_MS, AT_MS + 9 * SECOND),
        ("late", AT_MS + 9 * SECOND, AT_MS + 69 * SECOND),
        ("failed", AT_MS + 69 * SECOND, AT_MS + 71 * SECOND),
        ("open", None, None),
        ("under_way", AT_MS + 71 * SECOND, None),
        ("open", None, None),
    ]


def test_people_read_the_steps_as_a_table(gpuwatch):
    walked = [
        *course(("check", StepEnd.DONE, 9), ("drain", StepEnd.LATE, 60)),
        *course(("swap", StepEnd.CALLED_OFF, 1), began_ms=69 * SECOND, is_undo=True),
    ]
    walked[1] = dataclasses.replace(walked[1], detail="17 in hand")
    found = cells(gpuwatch(why, "GW-AAAAAA", remediations=[remediation(DECIDED, course=tuple(walked))]))
    table = [re.split(r"\s{2,}", line) for line in (*found["steps"][:3], found["undo"][0])]
    assert table[0] == ["step", "began", "took", "within", "how it ended"]
    assert [(row[0], *row[2:]) for row in table[1:]] == [
        ("check the settings", "9 s", "1 m", "done"),
        ("drain", "1 m", "1 m", "not done in time: 17 in hand"),
        ("change the settings", "1 s", "1 m", "called off"),
    ]
    assert all(re.match(r"2026-11-2\d \d\d:\d\d:\d\d ", row[1]) for row in table[1:])


def test_a_step_that_failed_is_told_and_how_far_it_was_taken_back(gpuwatch):
    failed = (*done(5), *course(("start", StepEnd.FAILED, 9)))
    undone = (*failed, *done(1, UNDO, is_undo=True))
    rolling = remediation(DECIDED, Phase.ROLLING_BACK, step=1, course=undone, is_cut=True)
    walk, undo = states(gpuwatch, rolling)
    assert walk == [*["done"] * 5, "failed", "open", "open"]
    assert undo == ["done", "under_way", "open"]
    back = remediation(
        DECIDED, Phase.ROLLED_BACK, step=2, course=(*failed, *done(3, UNDO, is_undo=True)), is_cut=True
    )
    assert states(gpuwatch, back)[1] == ["done"] * 3


def test_how_far_it_came_is_unknown_where_no_row_tells(gpuwatch):
    older = remediation(DECIDED, Phase.ROLLED_BACK, step=2, asked_at_ms=AT_MS)
    assert states(gpuwatch, older)[0] == ["unknown"] * 8


def test_a_command_s_secrets_are_not_shown(gpuwatch):
    command = json.dumps(["/opt/page", "--token", "s3cret"])
    its_plan = plan(actions=("run",))
    its_plan = dataclasses.replace(its_plan, steps=steps("run", run={"command": command}))
    row = remediation(its_plan)
    assert "/opt/page" in gpuwatch(why, "GW-AAAAAA", remediations=[row])
    assert "s3cret" not in gpuwatch(why, "GW-AAAAAA") + gpuwatch(why, "GW-AAAAAA", "--json")


def test_of_a_server_that_was_left_dead_the_settings_alone_are_told_to_be_taken_back(gpuwatch):
    swapped_back = (*done(5), *done(1, UNDO, is_undo=True))
    called_off = remediation(
        DECIDED, Phase.ABORTED, outcome="aborted_by", asked_at_ms=AT_MS, course=swapped_back
    )
    assert states(gpuwatch, called_off) == ([*["done"] * 5, "open", "open", "open"], ["done"])
    (found,) = json.loads(gpuwatch(why, "GW-AAAAAA", "--json"))
    assert [step["action"] for step in found["undo"]] == ["swap"]


def test_the_bundle_is_named_if_it_is_there(gpuwatch, tmp_path):
    assert ".tar.gz" not in gpuwatch(why, "GW-AAAAAA", remediations=[remediation(DECIDED)])
    bundle = tmp_path / "bundles" / "GW-AAAAAA.tar.gz"
    bundle.parent.mkdir()
    bundle.touch()
    assert cells(gpuwatch(why, "GW-AAAAAA"))["bundle"] == [str(bundle)]


REFUSAL = Refusal(
    server="qwen",
    alert="VLLMDown",
    alert_labels=DOWN,
    code="stale_data",
    facts={"age": "61000"},
    steps=("capture", "restart"),
    considered=(
        Considered(option="blocker:paused", code="passed"),
        Considered(option="blocker:stale_data", code="stale_data", facts={"age": "61000"}),
    ),
)


def test_without_a_name_all_that_is_not_done_is_told_with_its_reason(gpuwatch):
    text = gpuwatch(why, refusals=[REFUSAL], alerts=[firing(annotations={"summary": "qwen is down"})])
    assert text.startswith("VLLMDown  qwen\n")
    found = cells(text)
    assert found["because"] == ["the newest reading is 1 m 1 s old, too old to act on"]
    assert found["passed"] == ["paused"]
    assert [seen.partition(" ")[2] for seen in found["seen"]] == ["1", "qwen is down"]
    assert "restart" in text


def test_where_nothing_is_refused_it_says_so(gpuwatch):
    assert gpuwatch(why) == "nothing is refused at present\n"


@pytest.mark.parametrize("what", ["VLLMDown", incident_id(firing())])
def test_an_alert_is_asked_about_by_its_name_or_by_the_id_of_its_messages(gpuwatch, what):
    rows = {"refusals": [REFUSAL], "alerts": [firing()], "remediations": [remediation(plan())]}
    (found,) = json.loads(gpuwatch(why, what, "--json", **rows))
    assert found["refusal"] == "stale_data"


def test_an_alert_about_which_something_is_done_leads_to_the_newest_remediation(gpuwatch):
    rows = [remediation(plan()), remediation(plan("GW-BBBBBB"), Phase.APPLYING, after_ms=1)]
    assert gpuwatch(why, "VLLMDown", remediations=rows).startswith("GW-BBBBBB")


def test_what_nobody_knows_is_refused_with_what_there_is(gpuwatch):
    with pytest.raises(ConfigError, match=r"why GW-1: no such remediation.*GW-AAAAAA"):
        gpuwatch(why, "GW-1", remediations=[remediation(plan())])
