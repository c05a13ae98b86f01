"""kill -9 of the daemon at random moments: the database stays whole, no alert and no message is lost."""

import collections
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.receivers import DingTalkStandIn, SlackStandIn

from gpuwatch.cli.player import replay

RECORDING = Path(__file__).parents[1] / "recordings" / "h200-vllm024-incidents.jsonl.xz"
KILLS = int(os.environ.get("GPUWATCH_KILLS", "200"))
SPEED = 3
CONFIG = """\
state_dir: {state}
remediation: {{just_started_grace: 0s}}
receivers:
  - {{name: slack, slack: {{url_file: {state}/slack_url}}}}
  - {{name: dingtalk, lang: zh, dingtalk: {{url_file: {state}/ding_url, secret_file: {state}/ding_secret}}}}
"""


def daemon(config):
    command = [sys.executable, "-m", "gpuwatch", "run", "--log-level", "error", "--config", str(config)]
    return subprocess.Popen([*command, "--recording", str(RECORDING), "--speed", str(SPEED)])


def told(rows):
    return collections.Counter(rows)


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_two_hundred_kills_lose_neither_state_nor_message(tmp_path):
    rng = random.Random(7)
    with SlackStandIn() as slack, DingTalkStandIn("SEC-k", per_minute=10_000) as ding:
        (tmp_path / "slack_url").write_text(slack.url)
        (tmp_path / "ding_url").write_text(ding.url)
        (tmp_path / "ding_secret").write_text("SEC-k")
        config = tmp_path / "gpuwatch.yaml"
        config.write_text(CONFIG.format(state=tmp_path))
        kills = 0
        while kills < KILLS:
            process = daemon(config)
            try:
                process.wait(rng.uniform(0.3, 2.6))
                break  # the recording is over: the rest of the kills would find nothing to break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
        process = daemon(config)
        assert process.wait(600) == 0
        time.sleep(0.5)
    assert kills >= KILLS * 0.9, f"the recording was over after {kills} kills; play it slower"
    database = sqlite3.connect(tmp_path / "gpuwatch.db")
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    check_same_transitions(database, config)
    check_messages(database, slack, ding)


def check_same_transitions(database, config):
    """As many beginnings and ends of each alert as a run without any kill has."""
    expected = [
        (e["alert"], e["state"])
        for e in replay(RECORDING, config, ())
        if e["kind"] == "alert" and e["state"] in {"firing", "resolved"}
    ]
    query = "SELECT rule, now FROM transition WHERE now IN ('firing', 'resolved')"
    assert told(database.execute(query)) == told(expected)


def check_messages(database, slack, ding):
    rows = database.execute("SELECT count(*) FROM notification WHERE sent_at_ms IS NULL").fetchone()
    assert rows == (0,), "messages were left unsent"
    for chat, name in ((slack, "slack"), (ding, "dingtalk")):
        sent = database.execute("SELECT count(*) FROM notification WHERE receiver = ?", [name]).fetchone()[0]
        distinct = {str(payload) for payload in chat.received}
        assert len(distinct) == sent, f"{name} got {len(distinct)} different messages of {sent}"
        print(f"{name}: {sent} messages, {len(chat.received) - sent} of them twice")
