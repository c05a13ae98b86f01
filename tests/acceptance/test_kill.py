"""kill -9 of the daemon at random moments: both files stay whole, no alert and no message is lost."""

import collections
import itertools
import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.receivers import DingTalkStandIn, SlackStandIn

from gpuwatch import notify
from gpuwatch.cli.player import replay
from gpuwatch.errors import StoreError
from gpuwatch.notify.dingtalk import as_markdown
from gpuwatch.notify.slack import as_blocks
from gpuwatch.notify.wording import clock_time
from gpuwatch.records import Alert, AlertState
from gpuwatch.store import METRICS_DB, STATE_DB, open_read_only

RECORDING = Path(__file__).parents[1] / "recordings" / "h200-vllm024-incidents.jsonl.xz"
KILLS = int(os.environ.get("GPUWATCH_KILLS", "200"))
SPEED = min(10.0, 600 / KILLS)  # so that the kills are spread over the whole recording
LIFE_S = (0.05, 2.7)  # a start takes about one second: a third of the kills meet it
ANSWER_S = 1.0  # the chats take their time, so that some kills come between a message and its answer
SHIFT_MS = 5_000 + int(500 * SPEED)  # an evaluation interval, and half a second in which a start saw nothing
TOLD = {AlertState.FIRING, AlertState.RESOLVED}
CONFIG = """\
state_dir: {state}
remediation: {{just_started_grace: 0s}}
receivers:
  - {{name: slack, slack: {{url_file: {state}/slack_url}}}}
  - {{name: dingtalk, lang: zh, dingtalk: {{url_file: {state}/ding_url, secret_file: {state}/ding_secret}}}}
"""


@dataclass(frozen=True)
class Left:
    """What a kill left behind."""

    tick_ms: int | None = None
    transition_id: int = 0
    alerts: tuple[Alert, ...] = ()
    unsent: dict[str, str] = field(default_factory=dict)  # bodies by id; once sent they are cut short


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_kills_lose_neither_state_nor_message(tmp_path):
    began_s = time.time()
    # The robot counts its 20 messages a minute in the recording's minutes, as the daemon does.
    robots_clock = lambda: began_s + (time.time() - began_s) * SPEED  # noqa: E731
    with SlackStandIn() as slack, DingTalkStandIn("SEC-k", clock=robots_clock) as ding:
        slack.slow = ding.slow = ANSWER_S
        config = write_config(tmp_path, slack, ding)
        with (tmp_path / "log").open("w") as log:
            lefts = kill_again_and_again(config, log, random.Random(7))
            assert start(config, log).wait(600) == 0
    said = (tmp_path / "log").read_text()
    assert not said, said
    ticking = sum(a.tick_ms != b.tick_ms for a, b in itertools.pairwise([Left(), *lefts]))
    span = [left.tick_ms for left in lefts if left.tick_ms]
    print(
        f"\n{len(lefts)} kills, {ticking} of them while it ticked,"
        f" over {(span[-1] - span[0]) / 1000:.0f} s of the recording, in {time.time() - began_s:.0f} s"
    )
    assert len(lefts) * 0.2 < ticking < len(lefts) * 0.8, "the kills met only one part of its life"
    for name in (STATE_DB, METRICS_DB):
        check_database(tmp_path / name)
    with open_read_only(tmp_path) as view:
        history = view.transitions(limit=10_000)
    check_nothing_was_forgotten(history, lefts)
    events = list(replay(RECORDING, config, ()))
    check_as_without_kills(history, events)
    whole = {number: body for left in lefts for number, body in left.unsent.items()}
    for name, chat in (("slack", slack), ("dingtalk", ding)):
        check_messages(name, chat.received, rows_of(tmp_path / STATE_DB, name), whole, events)


def write_config(folder, slack, ding):
    (folder / "slack_url").write_text(slack.url)
    (folder / "ding_url").write_text(ding.url)
    (folder / "ding_secret").write_text("SEC-k")
    config = folder / "gpuwatch.yaml"
    config.write_text(CONFIG.format(state=folder))
    return config


def start(config, log):
    command = [sys.executable, "-m", "gpuwatch", "run", "--log-level", "error", "--config", str(config)]
    return subprocess.Popen(
        [*command, "--recording", str(RECORDING), "--speed", str(SPEED)], stdout=log, stderr=log
    )


def kill_again_and_again(config, log, rng):
    lefts = []
    while len(lefts) < KILLS:
        process = start(config, log)
        try:
            process.wait(rng.uniform(*LIFE_S))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        else:
            pytest.fail(f"it ended by itself, with status {process.returncode}, after {len(lefts)} kills")
        lefts.append(left_behind(config.parent))
    return lefts


def left_behind(folder):
    try:
        with open_read_only(folder) as view:
            last = view.transitions(limit=1)
            unsent = {row.id: row.body for row in view.notifications(1000) if row.sent_at_ms is None}
            return Left(view.last_tick_ms(), last[-1][0] if last else 0, tuple(view.active_alerts()), unsent)
    except StoreError:  # killed before it had made its tables
        return Left()


def check_database(path):
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []


def check_nothing_was_forgotten(history, lefts):
    """Each alert goes on from where it was, and began when it began, however often the daemon died."""
    lefts = iter(sorted(lefts, key=lambda left: left.transition_id))
    left, active = next(lefts), {}
    for number, t in [*history, (float("inf"), None)]:
        while left and left.transition_id < number:
            assert all(goes_on(active[identity(a)], a) for a in left.alerts)
            assert {identity(a): a.state for a in left.alerts} == {k: a.state for k, a in active.items()}
            left = next(lefts, None)
        if t is None:
            return
        before = active.pop(identity(t.alert), None)
        assert t.was is (before and before.state), f"{t.alert.rule} went on from {t.was}, was {before}"
        assert before is None or goes_on(before, t.alert), f"{t.alert.rule} began anew"
        if t.now in {AlertState.PENDING, AlertState.FIRING}:
            active[identity(t.alert)] = t.alert


def check_as_without_kills(history, events):
    """The same beginnings and ends of each alert, at about the same times, as a run without any kill."""
    killed, whole, born_ms = collections.defaultdict(list), collections.defaultdict(list), {}
    for _, t in history:
        if t.was is None:
            born_ms[identity(t.alert)] = t.alert.active_at_ms
        if t.now in TOLD:
            waited_ms = t.alert.active_at_ms - born_ms[identity(t.alert)] if t.now is AlertState.FIRING else 0
            killed[t.alert.rule].append((str(t.now), t.at_ms - waited_ms))
    for event in events:
        if event["kind"] == "alert" and event["state"] in TOLD:
            whole[event["alert"]].append((event["state"], round(event["t"] * 1000)))
    assert {k: [now for now, _ in v] for k, v in killed.items()} == {
        k: [now for now, _ in v] for k, v in whole.items()
    }
    shifts = [
        (at_ms - whole_ms, rule, now)
        for rule in whole
        for (now, at_ms), (_, whole_ms) in zip(killed[rule], whole[rule], strict=True)
    ]
    first, last = min(shifts), max(shifts)
    print(f"{len(shifts)} beginnings and ends, between {first} and {last} ms later than without kills")
    assert -SHIFT_MS <= first[0] <= last[0] <= SHIFT_MS


def goes_on(before, after):
    """A pending alert waits for the time that nobody saw, as if it had begun that much later."""
    later_ms = after.active_at_ms - before.active_at_ms
    return later_ms == 0 or (later_ms > 0 and before.state is AlertState.PENDING)


def identity(alert):
    return alert.rule, alert.labels


def rows_of(path, receiver):
    """The outbox of one receiver: the id of each message, and what is kept of it once it was sent."""
    query = "SELECT id, body, sent_at_ms FROM notification WHERE receiver = ? ORDER BY seq"
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute(query, [receiver]).fetchall()
    assert all(sent is not None for _, _, sent in rows), f"{receiver}: messages were left unsent"
    return [(number, json.loads(body)) for number, body, _ in rows]


def check_messages(name, received, rows, whole, events):
    """Each is there in its order; one that comes twice comes at once again, and unchanged."""
    told = collections.Counter((e["alert"], e["state"]) for e in events if e["kind"] == "notification")
    assert collections.Counter((body["alert"], body["state"]) for _, body in rows) == told
    payloads = [payload for payload, _ in itertools.groupby(received)]
    assert len({json.dumps(payload) for payload in payloads}) == len(payloads), "two messages read alike"
    seen = 0
    for payload, (number, body) in zip(payloads, rows, strict=True):
        assert f"gpuwatch · {body['id']} · {clock_time(body['at_ms'])}" in json.dumps(
            payload, ensure_ascii=False
        )
        if number in whole:  # a kill left it unsent, so that all of it is known
            seen += 1
            assert payload == as_payload(name, notify.Message.from_json(whole[number]))
    print(
        f"{name}: {len(rows)} messages, {len(received) - len(rows)} of them came again,"
        f" {seen} were unsent at a kill"
    )
    assert seen or KILLS < 100


def as_payload(name, message):
    if name == "slack":
        return as_blocks(notify.compose(message, "en"))
    return json.loads(as_markdown(notify.compose(message, "zh")))
