"""The words of messages, in both languages."""
# ruff: noqa: RUF001 -- fullwidth punctuation is what Chinese is written with

import math
import re
import string
import unicodedata
from dataclasses import replace
from datetime import timedelta, timezone

import pytest

from gpuwatch.errors import NotifyError
from gpuwatch.notify import Decision, Message, Tone, compose, duration, words
from gpuwatch.notify.catalogue import CATALOGUE, OUTCOMES, REFUSALS
from gpuwatch.notify.wording import clock_time, needs_person
from gpuwatch.records import AlertState, Mode, Phase, ServerPhase, StepEnd, SupervisorPhase

REFUSAL_FACTS = {
    "observe_mode": (),
    "paused": ("until",),
    "paused_open": (),
    "no_policy": (),
    "notify_only": (),
    "no_server": (),
    "no_supervisor": (),
    "cooling_down": ("left",),
    "budget_spent": ("done", "limit", "per"),
    "under_way": ("id",),
    "starting": ("since",),
    "auto_restart": (),
    "end_unread": (),
    "supervisor_unknown": ("detail",),
    "stale_data": ("age",),
    "just_started": ("left",),
    "clock_jumped": ("left",),
    "stopped_by_operator": (),
    "internal_error": (),
    "backlog_skipped": ("until",),
    "breaker_open": ("done", "limit", "per"),
    "two_failures": ("done",),
    "server_not_serving": (),
    "no_guest": (),
    "load_unknown": (),
    "others_growing": (),
    "others_unknown": (),
    "no_revisions": (),
    "would_fail_again": ("failure",),
    "memory_not_free": ("free_percent", "wanted_percent", "age"),
    "memory_unknown": (),
    "nothing_to_change": ("failure",),
    "already_current": ("revision",),
    "failed_already": (),
    "no_such_revision": ("revision",),
}
OUTCOME_FACTS = {
    "restored": ("seconds",),
    "step_late": ("seconds",),
    "died_again": ("detail",),
    "relapsed": (),
    "never_verified": ("seconds",),
    "denied": ("by",),
    "aborted_by": ("by",),
    "approval_expired": ("minutes",),
    "not_asked": ("detail",),
    "dry_run": (),
    "alert_over": (),
    "no_guest": (),
    "stopped_by_operator": (),
    "server_gone": (),
    "started_meanwhile": (),
    "step_failed": ("detail",),
    "unknown_step": (),
    "revision_refused": ("detail",),
    "new_alert": ("alerts",),
    "fewer_kv_tokens": ("tokens", "least"),
    "less_throughput": ("rate", "least"),
    "lifted": ("seconds",),
    "untouched": (),
}
DOWN = Message(
    id="GW-7F3A2C",
    kind="alert",
    state="firing",
    severity="critical",
    host="gpu-a01",
    alert="VLLMDown",
    at_ms=1_763_634_665_000,
    since_ms=1_763_634_605_000,
    server="qwen3",
    labels={"alertname": "VLLMDown", "server": "qwen3", "severity": "critical"},
    value=1.0,
    annotations={
        "summary": "vLLM server qwen3 is down",
        "summary_zh": "vLLM 服务 qwen3 已宕机",
        "description": "Its health check has failed for 3 s.",
        "description_zh": "健康检查已失败 3 秒。",
        "runbook": "Read the end of its log.",
        "runbook_zh": "查看其日志末尾。",
    },
)
RESTART = Decision(code="plan", steps=("restart",), mode="auto", remediation_id="R-1")
FIXING = replace(DOWN, kind="remediation", state="applying", decision=RESTART)


def all_text(message, lang):
    text = compose(message, lang)
    return "\n".join([text.title, *text.lines, *(f"{k} {v}" for k, v in text.fields), text.footer])


def columns(text):
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


# The catalogue


@pytest.mark.parametrize("code", sorted(REFUSAL_FACTS | OUTCOME_FACTS))
def test_every_known_code_says_its_facts_in_both_languages(code):
    facts = {name: f"<{name}>" for name in (REFUSAL_FACTS | OUTCOME_FACTS)[code]}
    en, zh = words(code, "en", **facts), words(code, "zh", **facts)
    assert en != zh
    assert code not in {en, zh}
    for value in facts.values():
        assert value in en
        assert value in zh


def test_the_catalogue_holds_the_codes_that_exist_and_no_others():
    assert set(REFUSALS) == set(REFUSAL_FACTS)
    assert set(OUTCOMES) == set(OUTCOME_FACTS)


@pytest.mark.parametrize("code", sorted(CATALOGUE))
def test_both_languages_of_a_phrase_have_the_same_fields_and_are_not_empty(code):
    en, zh = ({f for _, f, _, _ in string.Formatter().parse(text) if f} for text in CATALOGUE[code])
    assert en == zh
    assert all(CATALOGUE[code])


@pytest.mark.parametrize(
    ("group", "members"),
    [
        ("alert", AlertState),
        ("server", ServerPhase),
        ("remediation", Phase),
        ("supervisor", SupervisorPhase),
        ("mode", Mode),
        ("step_state", StepEnd),
    ],
)
def test_every_state_that_a_person_can_see_has_a_word(group, members):
    assert {f"{group}.{member}" for member in members} <= set(CATALOGUE)


def test_an_unknown_code_stands_for_itself():
    assert words("sunspots", "en", left="5") == "sunspots"
    assert words("server.melting", "zh") == "melting"


def test_a_missing_fact_leaves_a_question_mark_and_no_error():
    assert words("denied", "en") == "? said no"


def test_braces_in_a_fact_are_only_text():
    assert words("denied", "en", by="{id} {0}") == "{id} {0} said no"


@pytest.mark.parametrize(
    ("code", "facts", "part"),
    [
        ("cooling_down", {"left": "252000"}, "4 m 12 s"),
        ("cooling_down", {"left": "4m12s"}, "4m12s"),  # made human already
        ("stale_data", {"age": "0"}, "0 ms"),
        ("budget_spent", {"done": "3", "limit": "3", "per": "3600000"}, "3 of 3 remediations in 1 h"),
        ("restored", {"seconds": "45.2"}, "45 s"),
        ("approval_expired", {"minutes": "30"}, "30 m"),
    ],
)
def test_figures_are_made_human_by_the_name_of_their_fact(code, facts, part):
    assert part in words(code, "en", **facts)


def test_an_instant_is_told_as_a_time_with_its_offset():
    assert re.search(r"\d\d:\d\d:\d\d UTC", words("paused", "en", until="1763634665000"))


@pytest.mark.parametrize(
    ("ms", "en", "zh"),
    [
        (0, "0 ms", "0 毫秒"),
        (400, "400 ms", "400 毫秒"),
        (45_000, "45 s", "45 秒"),
        (60_000, "1 m", "1 分"),
        (860_000, "14 m 20 s", "14 分 20 秒"),
        (7_500_000, "2 h 5 m", "2 小时 5 分"),
        (3_601_000, "1 h", "1 小时"),  # no second where the minute is missing
        (90_000_000, "1 d 1 h", "1 天 1 小时"),
        (-5, "0 ms", "0 毫秒"),
    ],
)
def test_durations_have_their_two_largest_units(ms, en, zh):
    assert (duration(ms, "en"), duration(ms, "zh")) == (en, zh)


@pytest.mark.parametrize(
    ("minutes", "text"),
    [
        (0, "10:31:05 UTC"),
        (480, "18:31:05 UTC+8"),
        (330, "16:01:05 UTC+5:30"),
        (-210, "07:01:05 UTC-3:30"),
        (-30, "10:01:05 UTC-0:30"),
    ],
)
def test_times_carry_their_offset_from_utc(minutes, text):
    assert clock_time(1_763_634_665_000, timezone(timedelta(minutes=minutes))) == text


# Titles


@pytest.mark.parametrize(
    ("message", "en", "zh"),
    [
        (
            DOWN,
            "🔴 [CRIT] gpu-a01 · vLLM server qwen3 is down",
            "🔴 [严重] gpu-a01 · vLLM 服务 qwen3 已宕机",
        ),
        (
            replace(DOWN, state="resolved"),
            "✅ [RESOLVED] gpu-a01 · qwen3 · VLLMDown over after 1 m",
            "✅ [已恢复] gpu-a01 · qwen3 · VLLMDown 已恢复，历时 1 分",
        ),
        (
            replace(FIXING, state="awaiting_approval"),
            "🟡 [APPROVE?] gpu-a01 · qwen3 · restart waits for approval",
            "🟡 [待审批] gpu-a01 · qwen3 · 重启等待审批",
        ),
        (
            FIXING,
            "🟠 [FIXING] gpu-a01 · qwen3 · restart under way",
            "🟠 [处置中] gpu-a01 · qwen3 · 正在重启",
        ),
        (
            replace(FIXING, state="succeeded", outcome_code="restored", outcome_facts={"seconds": "45"}),
            "🟢 [FIXED] gpu-a01 · qwen3 · restart: healthy again after 45 s",
            "🟢 [已修复] gpu-a01 · qwen3 · 重启：45 秒后恢复正常",
        ),
        (
            replace(FIXING, state="failed", outcome_code="relapsed"),
            (
                "🟣 [FAILED] gpu-a01 · qwen3 · restart: the alert came back while the result was watched"
                " · a person is needed"
            ),
            "🟣 [处置失败] gpu-a01 · qwen3 · 重启：验证期间告警再次出现 · 需要人工",
        ),
        (
            replace(FIXING, state="aborted", outcome_code="denied", outcome_facts={"by": "ann"}),
            "⚪ [STOPPED] gpu-a01 · qwen3 · restart: ann said no",
            "⚪ [已中止] gpu-a01 · qwen3 · 重启：ann 已拒绝",
        ),
    ],
)
def test_the_title_alone_tells_state_host_place_and_fact(message, en, zh):
    assert compose(message, "en").title == en
    assert compose(message, "zh").title == zh


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("state", ["firing", "resolved"])
def test_the_titles_of_alerts_fit_a_phone(state, lang):
    assert columns(compose(replace(DOWN, state=state), lang).title) <= 60


@pytest.mark.parametrize(
    ("summary", "place"),
    [
        ("memory is short", " · GPU 3 · "),
        ("GPU 3 is short of memory", ""),
        ("GPU 31 is short of memory", " · GPU 3 · "),
        ("显存不足：GPU 3 仅剩 1%", ""),
    ],
)
def test_a_summary_that_does_not_name_the_gpu_is_helped(summary, place):
    message = replace(DOWN, server="", labels={"gpu": "3"}, annotations={"summary": summary})
    title = compose(message, "en").title
    assert title == f"🔴 [CRIT] gpu-a01{place or ' · '}{summary}"


def test_a_title_is_one_line_whatever_the_labels_hold():
    message = replace(DOWN, annotations={"summary": "a\n\nb\r\n c"})
    assert compose(message, "en").title.endswith("a b c")


# What gpuwatch does, or why not


@pytest.mark.parametrize(
    ("decision", "en", "zh"),
    [
        (RESTART, "gpuwatch will restart qwen3.", "gpuwatch 将重启 qwen3。"),
        (
            replace(RESTART, dry_run=True),
            "gpuwatch will restart qwen3 (dry run).",
            "gpuwatch 将重启 qwen3（演练）。",
        ),
        (
            replace(RESTART, mode="approve"),
            "gpuwatch asks to restart qwen3 and waits for approval.",
            "gpuwatch 请求重启 qwen3，等待审批。",
        ),
        (
            Decision(code="observe_mode", steps=("restart",), mode="observe"),
            "Would restart qwen3. Does not: mode is observe (set remediation.mode: auto to allow it).",
            "本应重启 qwen3，但未执行：当前为观察模式（设 remediation.mode: auto 后才会执行）。",
        ),
        (
            Decision(code="notify_only"),
            "gpuwatch does nothing: its policy is to tell people and touch nothing.",
            "gpuwatch 不处置：其策略是只通知、不改动。",
        ),
        (None, "gpuwatch has not decided yet.", "gpuwatch 尚未决定。"),
    ],
)
def test_a_firing_alert_says_what_gpuwatch_does_or_why_not(decision, en, zh):
    message = replace(DOWN, decision=decision)
    assert en in compose(message, "en").lines
    assert zh in compose(message, "zh").lines


def test_a_message_says_what_to_run_next():
    assert compose(DOWN, "en").lines[-1] == "Next: `gpuwatch status`"
    asked = replace(FIXING, state="awaiting_approval")
    assert compose(asked, "en").lines[-1] == "Next: `gpuwatch approve R-1` or `gpuwatch deny R-1`"
    assert "gpuwatch approve R-1" in compose(asked, "zh").lines[-1]


def test_a_dry_run_says_the_same_words_marked():
    dry = replace(FIXING, decision=replace(RESTART, dry_run=True))
    assert compose(dry, "en").title == compose(FIXING, "en").title + " (dry run)"
    assert compose(dry, "zh").title == compose(FIXING, "zh").title + "（演练）"


def test_a_dry_run_that_ended_says_what_would_be_done_and_why_it_was_not():
    observed = replace(RESTART, code="observe_mode", mode="observe", dry_run=True)
    text = compose(replace(FIXING, state="planned", outcome_code="dry_run", decision=observed), "en")
    assert text.title == "⚪ [DRY RUN] gpu-a01 · qwen3 · would restart, nothing was touched"
    assert text.tone is Tone.STOPPED
    assert "Would restart qwen3 (dry run). Does not: mode is observe" in "\n".join(text.lines)


def test_an_alert_in_a_dry_run_is_still_a_real_alert():
    message = replace(DOWN, decision=replace(RESTART, dry_run=True))
    assert compose(message, "en").title == compose(DOWN, "en").title


def test_chinese_annotations_are_used_where_present_and_english_ones_otherwise():
    assert "健康检查已失败 3 秒。" in compose(DOWN, "zh").lines
    english_only = replace(DOWN, annotations={"summary": "qwen3 is down", "description": "No answer."})
    text = compose(english_only, "zh")
    assert text.title == "🔴 [严重] gpu-a01 · qwen3 is down"
    assert "No answer." in text.lines


def test_bytes_are_told_in_gib():
    message = replace(DOWN, labels={"held_bytes": str(79 * 2**30)})
    assert ("held_bytes", "79.0 GiB") in compose(message, "en").fields


def test_zero_is_a_value_and_a_missing_value_is_left_out():
    assert ("Value", "0") in compose(replace(DOWN, value=0.0), "en").fields
    assert "Value" not in dict(compose(replace(DOWN, value=None), "en").fields)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_message_without_anything_but_its_name_is_still_complete(lang):
    bare = replace(DOWN, server="", labels={}, annotations={}, value=None)
    text = compose(bare, lang)
    assert "gpu-a01" in text.title
    assert "VLLMDown" in text.title
    assert text.footer.startswith("gpuwatch · GW-7F3A2C · ")


def test_there_are_never_more_than_ten_fields():
    assert len(compose(replace(DOWN, labels={f"l{i}": "x" for i in range(30)}), "en").fields) == 10


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (DOWN, True),
        (replace(DOWN, severity="warning"), False),
        (replace(DOWN, decision=RESTART), False),  # gpuwatch is at it
        (replace(DOWN, decision=replace(RESTART, mode="approve")), True),
        (replace(DOWN, decision=replace(RESTART, code="observe_mode", dry_run=True)), True),
        (replace(DOWN, state="resolved"), False),
        (FIXING, False),
        (replace(FIXING, state="awaiting_approval"), True),
        (replace(FIXING, state="failed"), True),
        (replace(FIXING, state="succeeded"), False),
    ],
)
def test_a_person_is_called_only_for_what_gpuwatch_does_not_heal(message, needed):
    assert needs_person(message) is needed


@pytest.mark.parametrize("message", [DOWN, FIXING, replace(DOWN, value=None)])
def test_a_message_survives_the_outbox(message):
    assert Message.from_json(message.to_json()) == message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_json_cannot_hold_comes_back_as_none(value):
    assert Message.from_json(replace(DOWN, value=value).to_json()).value is None
    assert "Value" not in dict(compose(replace(DOWN, value=value), "en").fields)


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"id": 1}'])
def test_a_body_that_cannot_be_read_is_a_permanent_fault(body):
    with pytest.raises(NotifyError) as caught:
        Message.from_json(body)
    assert caught.value.permanent
