"""`make demo`: gpuwatch on an H200's recorded incidents, at speed, with stand-ins for Slack and DingTalk.

What is shown is real but for the host: the recording was made on a real GPU beside a real vLLM, the
rules are the shipped ones, the database is SQLite, the messages go over HTTP to servers on loopback.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.receivers import DingTalkStandIn, SlackStandIn  # noqa: E402

RECORDING = ROOT / "tests/recordings/h200-vllm024-incidents.jsonl.xz"
STATE = ROOT / "demo-state"
SPEED = 20
GPUWATCH = [sys.executable, "-m", "gpuwatch"]
CONFIG = """\
state_dir: {state}
host: gpu-a01
receivers:
  - {{name: slack, slack: {{url_file: {state}/slack_url}}}}
  - {{name: dingtalk, lang: zh, dingtalk: {{url_file: {state}/ding_url, secret_file: {state}/ding_secret}}}}
"""


def main():
    shutil.rmtree(STATE, ignore_errors=True)
    STATE.mkdir()
    secret = "SEC-demo"
    with SlackStandIn() as slack, DingTalkStandIn(secret) as dingtalk:
        (STATE / "slack_url").write_text(slack.url)
        (STATE / "ding_url").write_text(dingtalk.url)
        (STATE / "ding_secret").write_text(secret)
        settings = STATE / "gpuwatch.yaml"
        settings.write_text(CONFIG.format(state=STATE))
        title(f"gpuwatch run --recording {RECORDING.name} --speed {SPEED}     (7 minutes of an H200 in 22 s)")
        run = [*GPUWATCH, "run", "--config", str(settings), "--recording", str(RECORDING)]
        daemon = subprocess.Popen([*run, "--speed", str(SPEED)], cwd=ROOT)
        shown = 0
        while daemon.poll() is None:
            time.sleep(0.2)
            shown = show_new(slack.received, shown)
        show_new(slack.received, shown)
        title("what DingTalk was sent (Chinese)")
        for payload in dingtalk.received:
            print(payload["markdown"]["text"].replace("  \n", "\n"), end="\n\n")
        if daemon.returncode:
            sys.exit(f"gpuwatch ended with {daemon.returncode}")
    title("gpuwatch status")
    subprocess.run([*GPUWATCH, "status", "--config", str(settings)], check=True, cwd=ROOT)
    title("gpuwatch alerts --limit 12")
    subprocess.run([*GPUWATCH, "alerts", "--limit", "12", "--config", str(settings)], check=True, cwd=ROOT)
    print(f"\nThe databases are in {STATE}; the next demo begins with new ones.")


def show_new(received, shown):
    for payload in received[shown:]:
        print("\n  ┌─ Slack")
        for line in slack_lines(payload):
            print(f"  │ {line}")
    sys.stdout.flush()
    return len(received)


def slack_lines(payload):
    for block in payload.get("blocks", []):
        texts = [block["text"]] if "text" in block else block.get("fields", []) + block.get("elements", [])
        for text in texts:
            yield from re.sub(r"&(lt|gt|amp);", unescape, text["text"]).replace("*", "").splitlines()


def unescape(match):
    return {"lt": "<", "gt": ">", "amp": "&"}[match[1]]


def title(text):
    print(f"\n\033[1m── {text} {'─' * max(0, 90 - len(text))}\033[0m", flush=True)


if __name__ == "__main__":
    main()
