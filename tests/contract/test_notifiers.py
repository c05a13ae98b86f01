"""What holds for every notifier, over real HTTP, and what Slack and DingTalk each demand."""

import json
import socket
import traceback
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.receivers import DingTalkStandIn, SlackStandIn

from gpuwatch.clock import ManualClock, SystemClock
from gpuwatch.config import DingTalkSettings, ReceiverSettings, SlackSettings
from gpuwatch.errors import ConfigError, NotifyError
from gpuwatch.notify import (
    NOTIFIERS,
    Decision,
    DingTalkNotifier,
    Message,
    SlackNotifier,
    Text,
    Tone,
    compose,
    of_settings,
    outbound_session,
)
from gpuwatch.notify.dingtalk import BODY_MAX_BYTES, as_markdown, cut, signature
from gpuwatch.notify.outbound import post
from gpuwatch.notify.slack import TOTAL_MAX, as_blocks

SECRET = "SEC0123456789abcdef0123456789abcdef"
NOW_MS = 1_763_634_665_000
MOBILE = "13800138000"
DOWN = Message(
    id="GW-7F3A2C",
    kind="alert",
    state="firing",
    severity="critical",
    host="gpu-a01",
    alert="VLLMDown",
    at_ms=NOW_MS,
    since_ms=NOW_MS - 60_000,
    server="qwen3",
    labels={"alertname": "VLLMDown", "server": "qwen3"},
    value=1.0,
    annotations={"summary": "vLLM server qwen3 is down", "summary_zh": "vLLM 服务 qwen3 已宕机"},
    decision=Decision(code="notify_only"),
)


class HandClock(ManualClock):
    """Also tells seconds, for a stand-in."""

    def __init__(self):
        super().__init__(NOW_MS)

    def seconds(self):
        return self.now_ms() / 1000


@pytest.fixture
def clock():
    return HandClock()


@pytest.fixture
def session():
    with outbound_session() as session:
        yield session


@pytest.fixture
def slack(clock):
    with SlackStandIn(clock=clock.seconds) as stand_in:
        yield stand_in


@pytest.fixture
def ding(clock):
    with DingTalkStandIn(SECRET, clock=clock.seconds) as stand_in:
        yield stand_in


def to_slack(stand_in, session, clock):
    return SlackNotifier(stand_in.url, session, "en")


def to_ding(stand_in, session, clock, **given):
    given = {"secret": SECRET, "clock": clock, **given}
    return DingTalkNotifier(stand_in.url, session, "zh", **given)


@pytest.fixture(params=sorted(NOTIFIERS))
def channel(request, session, clock):
    """(a notifier, the stand-in it talks to) of each kind."""
    kind = request.param
    make, stand_in = {"slack": (to_slack, "slack"), "dingtalk": (to_ding, "ding")}[kind]
    stand_in = request.getfixturevalue(stand_in)
    return make(stand_in, session, clock), stand_in


def failure_of(notifier, message=DOWN):
    with pytest.raises(NotifyError) as caught:
        notifier.send(message)
    return caught.value


def verdict(error):
    return {
        name: getattr(error, name)
        for name in ("permanent", "broken", "retry_after_ms", "unsure")
        if getattr(error, name)
    }


# Every channel


def test_a_message_arrives(channel):
    notifier, stand_in = channel
    notifier.send(DOWN)
    (payload,) = stand_in.received
    assert "gpu-a01" in json.dumps(payload, ensure_ascii=False)


def test_messages_arrive_in_the_order_in_which_they_are_sent(channel):
    notifier, stand_in = channel
    for number in range(5):
        notifier.send(replace(DOWN, id=f"GW-{number}"))
    shown = [json.dumps(payload) for payload in stand_in.received]
    assert [f"GW-{number}" in text for number, text in enumerate(shown)] == [True] * 5


def test_an_unavailable_service_is_a_passing_fault(channel):
    notifier, stand_in = channel
    stand_in.down = True
    assert verdict(failure_of(notifier)) == {}


def test_a_service_that_never_answers_leaves_it_unsure(channel):
    notifier, stand_in = channel
    stand_in.hangs_up = True
    assert verdict(failure_of(notifier)) == {"unsure": True}


def test_a_redirect_is_not_followed(channel, slack):
    notifier, stand_in = channel
    stand_in.redirects_to = slack.url
    assert verdict(failure_of(notifier)) == {"broken": True}
    assert slack.received == []


def test_a_refused_connection_is_a_passing_fault_and_nothing_was_sent(session, clock):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        base = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for notifier in (
            SlackNotifier(f"{base}/services/T/B/x", session),
            DingTalkNotifier(f"{base}/robot/send?access_token=x", session, secret=SECRET, clock=clock),
        ):
            error = failure_of(notifier)
            assert verdict(error) == {}
            assert "refused" in str(error)


def test_an_answer_that_comes_too_late_leaves_it_unsure(slack, session):
    slack.slow = 5.0
    with pytest.raises(NotifyError) as caught:
        post(session, slack.url, b"{}", timeout_s=(1.0, 0.1))
    assert verdict(caught.value) == {"unsure": True}


def every_fault_of(notifier, stand_in):
    for switch in ("down", "hangs_up", "gone", "busy", "over_quota", "refuses_blocks"):
        if hasattr(stand_in, switch):
            setattr(stand_in, switch, True)
            try:
                notifier.send(DOWN)
            except NotifyError as error:
                yield error
            setattr(stand_in, switch, False)


def test_no_error_holds_the_url_the_token_or_the_secret(channel):
    notifier, stand_in = channel
    errors = list(every_fault_of(notifier, stand_in))
    assert len(errors) >= 3
    for error in errors:
        shown = "".join(traceback.format_exception(error)) + repr(error.__cause__) + repr(error.__context__)
        assert "standin" not in shown.replace("StandIn", "")
        assert SECRET not in shown
        assert "sign=" not in shown


def test_no_proxy_of_the_environment_stands_before_this_very_host(channel, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    notifier, stand_in = channel
    notifier.send(DOWN)
    assert len(stand_in.received) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.slack.com/services/T/B/x?access_token=x",
        "http://10.0.0.1/services/T/B/x?access_token=x",
        "http://127.0.0.1.example.com/?access_token=x",
        "ftp://127.0.0.1/?access_token=x",
        "https:///services/T/B/x?access_token=x",
        "https://[::1/services/T/B/x?access_token=x",
        "https://a.example:x/?access_token=x",
        "https://a.example/\nhttps://b.example/?access_token=x",
        "",
    ],
)
@pytest.mark.parametrize("kind", sorted(NOTIFIERS))
def test_only_https_or_this_very_host_is_taken(kind, url, session, clock):
    given = {"clock": clock} if kind == "dingtalk" else {}
    with pytest.raises(ConfigError) as caught:
        NOTIFIERS[kind](url, session, **given)
    assert "services/T" not in str(caught.value)
    assert "https" in str(caught.value)


def test_certificates_are_always_verified_and_nothing_is_retried_behind_our_back(session):
    assert session.verify is True
    assert session.get_adapter("https://hooks.slack.com").max_retries.total == 0


SURPRISES = st.text(alphabet=st.characters(codec="utf-8"), max_size=200) | st.sampled_from(
    ["<!channel>", "@here", "&" * 5000, "碎" * 9000, "🔴" * 5000, '"' * 15_000, "\n" * 9000, "](", ""]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    summary=SURPRISES,
    description=SURPRISES,
    labels=st.dictionaries(SURPRISES, SURPRISES, max_size=12),
    host=SURPRISES,
)
def test_whatever_a_message_holds_both_receivers_take_it(
    slack, ding, session, clock, summary, description, labels, host
):
    message = replace(
        DOWN, host=host, labels=labels, annotations={"summary": summary, "description": description}
    )
    clock.advance(11 * 60_000)  # so that the robot's limit on pace stays out of it
    to_slack(slack, session, clock).send(message)
    to_ding(ding, session, clock).send(message)
    assert slack.received.pop()["blocks"]
    assert ding.received.pop()["markdown"]["title"].startswith("gpuwatch ")


# Slack


def test_slack_gets_header_section_fields_footer_and_the_title_as_text(slack, session, clock):
    to_slack(slack, session, clock).send(DOWN)
    (payload,) = slack.received
    assert [block["type"] for block in payload["blocks"]] == ["header", "section", "section", "context"]
    assert payload["text"] == payload["blocks"][0]["text"]["text"] == compose(DOWN, "en").title
    assert payload["unfurl_links"] is False
    assert "GW-7F3A2C" in payload["blocks"][3]["elements"][0]["text"]


def test_slack_that_says_too_fast_is_left_alone_as_long_as_it_says(slack, session, clock):
    slack.rate_limited(37)
    assert verdict(failure_of(to_slack(slack, session, clock))) == {"retry_after_ms": 37_000}
    clock.advance(37_000)
    to_slack(slack, session, clock).send(DOWN)


def test_a_slack_webhook_that_is_gone_is_a_broken_channel(slack, session, clock):
    slack.gone = True
    error = failure_of(to_slack(slack, session, clock))
    assert verdict(error) == {"broken": True}
    assert "no_service" in str(error)
    assert slack.requests == 1


def test_refused_blocks_are_sent_again_once_as_plain_text(slack, session, clock):
    slack.refuses_blocks = True
    to_slack(slack, session, clock).send(DOWN)
    (payload,) = slack.received
    assert slack.requests == 2
    assert "blocks" not in payload
    for part in ("vLLM server qwen3 is down", "gpuwatch does nothing", "GW-7F3A2C"):
        assert part in payload["text"]


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (200, "<html>sign in</html>", {"unsure": True}),
        (302, "", {"broken": True}),
        (400, "no_text", {"permanent": True}),
        (400, "invalid_blocks", {"permanent": True}),
        (400, "invalid_payload", {"permanent": True}),
        (403, "invalid_token", {"broken": True}),
        (404, "channel_not_found", {"broken": True}),
        (404, "no_service", {"broken": True}),
        (410, "channel_is_archived", {"broken": True}),
        (413, "", {"permanent": True}),
        (429, '{"ok":false,"error":"rate_limited"}', {"retry_after_ms": 30_000}),
        (500, "rollup_error", {}),
        (502, "", {}),
        (503, "", {}),
    ],
)
def test_each_answer_of_slack_means_one_thing(status, text, expected, slack, session, clock):
    slack.judge = lambda target, body: (status, text, {})
    assert verdict(failure_of(to_slack(slack, session, clock))) == expected


def test_nobody_is_called_by_a_label(slack, session, clock):
    summary = "<!channel> <@U123> @here @Everyone & co"
    to_slack(slack, session, clock).send(replace(DOWN, annotations={"summary": summary}))
    shown = json.dumps(slack.received, ensure_ascii=False)
    assert "<" not in shown
    assert "&lt;!channel&gt;" in shown
    assert "&amp; co" in shown
    assert "@here" not in shown
    assert "@Everyone" not in shown


def test_a_slack_message_is_cut_to_every_limit_and_never_inside_an_escape():
    text = Text(
        title="&" * 400,
        lines=("<" * 4000,),
        fields=tuple((f"f{i}", ">" * 4000) for i in range(12)),
        footer="x" * 900,
        tone=Tone.FIRING,
    )
    header, section, fields, footer = as_blocks(text)["blocks"]
    assert header["text"]["text"] == "&amp;" * 29 + "…"
    assert section["text"]["text"] == "&lt;" * 749 + "…"
    assert len(fields["fields"]) == 10
    texts = [header["text"], section["text"], *fields["fields"], *footer["elements"]]
    assert sum(len(each["text"]) for each in texts) <= TOTAL_MAX


# DingTalk


def test_the_signature_is_the_one_that_dingtalk_computes():
    assert signature("SEC000", "1700000000000") == "ltBBey5eZrWKh1cPzFIdz3v3xpkc4Tjx4lLsPSHqdtA="


def test_a_message_is_signed_when_it_is_sent_and_not_when_it_was_made(ding, session, clock):
    notifier = to_ding(ding, session, clock)
    clock.advance(30 * 24 * 3_600_000)
    notifier.send(DOWN)
    assert len(ding.received) == 1


def test_dingtalk_gets_chinese_markdown_with_the_keyword(ding, session, clock):
    to_ding(ding, session, clock).send(DOWN)
    (payload,) = ding.received
    markdown = payload["markdown"]
    assert payload["msgtype"] == "markdown"
    assert markdown["title"] == "gpuwatch 🔴 [严重] gpu-a01 · vLLM 服务 qwen3 已宕机"
    assert "gpuwatch" in markdown["text"]
    assert "不处置" in markdown["text"]


def test_chinese_goes_out_as_utf_8_and_not_as_escapes():
    body = as_markdown(compose(DOWN, "zh"))
    assert "宕机".encode() in body
    assert b"\\u" not in body


def test_lines_are_broken_by_two_spaces():
    text = as_markdown(compose(DOWN, "en")).decode()
    assert r"touch nothing.  \n" in text


def test_who_is_on_call_is_mentioned_in_the_text_too_when_needed(ding, session, clock):
    to_ding(ding, session, clock, at_mobiles=[MOBILE]).send(DOWN)
    (payload,) = ding.received
    assert payload["at"] == {"atMobiles": [MOBILE], "isAtAll": False}
    assert f"@{MOBILE}" in payload["markdown"]["text"]


def test_nobody_is_mentioned_when_it_is_over(ding, session, clock):
    to_ding(ding, session, clock, at_mobiles=[MOBILE]).send(replace(DOWN, state="resolved"))
    (payload,) = ding.received
    assert payload["at"]["atMobiles"] == []
    assert MOBILE not in payload["markdown"]["text"]


def test_a_robot_that_says_too_fast_is_left_alone_for_ten_minutes(ding, session, clock):
    notifier = to_ding(ding, session, clock)
    for _ in range(20):
        notifier.send(DOWN)
    assert verdict(failure_of(notifier)) == {"retry_after_ms": 600_000}
    clock.advance(599_000)
    failure_of(notifier)
    clock.advance(1000)
    notifier.send(DOWN)


def test_our_pace_never_makes_a_robot_silent(ding, session, clock):
    notifier, sent_ms = to_ding(ding, session, clock), []
    while len(sent_ms) < 60:
        recent = [at for at in sent_ms if at > clock.now_ms() - notifier.pace.per_ms]
        if len(recent) < notifier.pace.burst:
            notifier.send(DOWN)
            sent_ms.append(clock.now_ms())
        clock.advance(1000)
    assert len(ding.received) == 60


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"secret": "SEC-another-secret"}, "sign not match"),
        ({"secret": ""}, "invalid timestamp"),
    ],
)
def test_a_wrong_or_missing_secret_is_a_broken_channel(given, said, ding, session, clock):
    error = failure_of(to_ding(ding, session, clock, **given))
    assert verdict(error) == {"broken": True}
    assert said in str(error)
    assert "secret_file" in str(error)


def test_a_clock_that_is_off_is_told_with_its_offset(ding, session, clock):
    ahead = ManualClock(NOW_MS + 2 * 3_600_000)
    error = failure_of(to_ding(ding, session, ahead))
    assert verdict(error) == {"broken": True}
    assert "2 h ahead of DingTalk's" in str(error)


def test_an_unknown_token_is_a_broken_channel(ding, session, clock):
    notifier = DingTalkNotifier(
        ding.url.replace(ding.token, "gone"), session, "zh", secret=SECRET, clock=clock
    )
    assert verdict(failure_of(notifier)) == {"broken": True}


def test_a_url_without_a_token_is_refused_at_once(ding, session, clock):
    with pytest.raises(ConfigError, match="access_token"):
        DingTalkNotifier(ding.url.partition("?")[0], session, clock=clock)


@pytest.mark.parametrize(
    ("errcode", "expected"),
    [
        (-1, {}),
        (40035, {"permanent": True}),
        (43004, {"permanent": True}),
        (90030, {"broken": True, "retry_after_ms": 3_600_000}),
        (130101, {"retry_after_ms": 600_000}),
        (300001, {"broken": True}),
        (310000, {"broken": True}),
        (460101, {"permanent": True}),
    ],
)
def test_each_errcode_means_one_thing_whatever_its_text(errcode, expected, ding, session, clock):
    ding.judge = lambda target, body: (200, json.dumps({"errcode": errcode, "errmsg": "改了"}), {})
    assert verdict(failure_of(to_ding(ding, session, clock))) == expected


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (200, "<html>sign in</html>", {"unsure": True}),
        (200, "{}", {"unsure": True}),
        (429, "", {"retry_after_ms": 30_000}),
        (502, "", {}),
    ],
)
def test_an_answer_that_is_not_the_robots_is_no_success(status, text, expected, ding, session, clock):
    ding.judge = lambda target, body: (status, text, {})
    assert verdict(failure_of(to_ding(ding, session, clock))) == expected


def test_a_message_that_a_robot_finds_too_long_is_cut_in_half_and_sent_again_once(ding, session, clock):
    ding.body_max_bytes = 12_000
    message = replace(DOWN, annotations={"summary": "x", "description": "显存" * 5000})
    to_ding(ding, session, clock, at_mobiles=[MOBILE]).send(message)
    (payload,) = ding.received
    assert ding.requests == 2
    assert payload["markdown"]["text"].endswith(f"@{MOBILE}")  # footer and mentions are never what is cut
    assert "GW-7F3A2C" in payload["markdown"]["text"]


@pytest.mark.parametrize("filling", ["a", "显", "🔴", '"', "\\", "\n", "\x00"])
def test_a_body_is_cut_by_bytes_and_at_a_character(filling):
    message = replace(DOWN, annotations={"summary": "x", "description": filling * 30_000})
    body = as_markdown(compose(message, "zh"))
    assert BODY_MAX_BYTES - 10 <= len(body) <= BODY_MAX_BYTES
    json.loads(body)


def test_what_fits_is_not_cut():
    assert cut("显存", 6) == "显存"
    assert cut("显存存", 8) == "显…"


def test_no_label_becomes_a_link_or_an_image():
    message = replace(DOWN, labels={"x": "[click](https://evil.example) ![i](https://evil.example/i.png)"})
    assert b"](" not in as_markdown(compose(message, "zh"))


# Settings


def receivers(folder, slack_url, ding_url):
    for name, text in {"slack": slack_url, "ding": ding_url, "secret": SECRET}.items():
        (folder / name).write_text(f"{text}\n", "utf-8")
    return [
        ReceiverSettings(name="ops", slack=SlackSettings(url_file=folder / "slack")),
        ReceiverSettings(
            name="值班",
            lang="zh",
            dingtalk=DingTalkSettings(
                url_file=folder / "ding", secret_file=folder / "secret", at_mobiles=[MOBILE]
            ),
        ),
    ]


def test_receivers_of_the_settings_deliver_in_their_language(tmp_path, slack, ding, clock):
    found = of_settings(receivers(tmp_path, slack.url, ding.url), clock)
    for notifier in found.values():
        notifier.send(DOWN)
    assert list(found) == ["ops", "值班"]
    assert "is down" in slack.received[0]["text"]
    assert "已宕机" in ding.received[0]["markdown"]["title"]


def test_every_mistake_in_the_receivers_is_told_at_once_and_none_of_their_secrets(tmp_path, clock):
    given = receivers(
        tmp_path, "http://hooks.slack.com/services/T0/B0/zzz", "https://x.example/?access_token=zzz"
    )
    (tmp_path / "secret").unlink()
    with pytest.raises(ConfigError) as caught:
        of_settings(given, clock)
    ops, robot = caught.value.mistakes
    assert "ops" in ops
    assert "https" in ops
    assert str(tmp_path / "secret") in robot
    assert "zzz" not in str(caught.value)


def test_the_wall_clock_signs_for_a_robot_of_now(session):
    with DingTalkStandIn(SECRET) as robot:
        DingTalkNotifier(robot.url, session, "zh", secret=SECRET, clock=SystemClock()).send(DOWN)
        assert len(robot.received) == 1
