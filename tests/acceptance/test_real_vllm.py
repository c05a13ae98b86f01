"""A real vLLM server without GPU, as a plain process of gpuwatch: it is back when its engine has died."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import requests
from tests.receivers import DingTalkStandIn, SlackStandIn

ROOT = Path(__file__).parents[2]
TOOL = ROOT.parent / "shared" / "tools" / "vllm_cpu.sh"
BUILD = Path(os.environ.get("GPUWATCH_VLLM_BUILD", ROOT / "build" / "vllm"))
PORT = 18231
CONFIG = """\
state_dir: {state}
remediation: {{mode: auto, just_started_grace: 2s, verify_for: 10s}}
servers:
  - name: m
    url: http://127.0.0.1:{port}
    start_deadline: 5m
    supervisor:
      process:
        command: [bash, {tool}, serve, {model}, --port, "{port}"]
        env: {{VENV: {venv}}}
receivers:
  - {{name: slack, slack: {{url_file: {state}/slack_url}}}}
  - {{name: dingtalk, lang: zh, dingtalk: {{url_file: {state}/ding_url, secret_file: {state}/ding_secret}}}}
"""

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.shared,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not TOOL.exists(), reason="needs ../shared/tools/vllm_cpu.sh"),
]


@pytest.fixture(scope="module")
def vllm():
    venv, model = BUILD / "venv", BUILD / "models"
    if not (venv / "bin" / "vllm").exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        subprocess.run(["bash", TOOL, "install", venv], check=True, timeout=900)
    if not model.exists():
        subprocess.run(
            ["bash", TOOL, "model", model], check=True, timeout=300, env={**os.environ, "VENV": str(venv)}
        )
    return venv, model / "tiny"


def gpuwatch(*words, config):
    command = [sys.executable, "-m", "gpuwatch", *words, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def wait_for(what, within_s, question):
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if question():
            return
        time.sleep(0.5)
    pytest.fail(f"{what}: not within {within_s} s")


def healthy():
    try:
        return requests.get(f"http://127.0.0.1:{PORT}/health", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def engines(state):
    pid = json.loads((state / "process-m.json").read_text())["pid"]
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if child.name().startswith("VLLM::EngineCor")]


def test_an_engine_that_is_killed_is_back_through_gpuwatch_and_both_chats_know(vllm, tmp_path):
    venv, model = vllm
    with SlackStandIn() as slack, DingTalkStandIn("SEC-v") as ding:
        (tmp_path / "slack_url").write_text(slack.url)
        (tmp_path / "ding_url").write_text(ding.url)
        (tmp_path / "ding_secret").write_text("SEC-v")
        config = tmp_path / "gpuwatch.yaml"
        config.write_text(CONFIG.format(state=tmp_path, port=PORT, tool=TOOL, model=model, venv=venv))
        daemon = subprocess.Popen([sys.executable, "-m", "gpuwatch", "run", "--config", str(config)])
        try:
            tell_the_story(tmp_path, config, slack, ding)
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)
            assert healthy(), "gpuwatch took the server down with itself"
            end_server(tmp_path)


def tell_the_story(state, config, slack, ding):
    gpuwatch("server", "start", "m", config=config)
    time.sleep(10)
    assert slack.received == [], "a server that is starting is not down"
    wait_for("healthy after its start", 240, healthy)
    body = {"model": "m", "prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": True}
    assert requests.post(f"http://127.0.0.1:{PORT}/v1/completions", json=body, timeout=60).ok
    wait_for("serving in `gpuwatch status`", 20, lambda: server(config)["phase"] == "serving")
    (engine,) = engines(state)
    engine.send_signal(signal.SIGKILL)
    wait_for("the alarm", 15, lambda: any("VLLMDown" in json.dumps(p) for p in slack.received))
    wait_for(
        "healthy again", 300, lambda: healthy() and engines(state) and engines(state)[0].pid != engine.pid
    )
    wait_for("success told", 60, lambda: any("FIXED" in json.dumps(p) for p in slack.received))
    wait_for(
        "DingTalk told", 60, lambda: any("已修复" in json.dumps(p, ensure_ascii=False) for p in ding.received)
    )


def server(config):
    return json.loads(gpuwatch("status", "--json", config=config))["servers"][0]


def end_server(state):
    """Ours alone: the process group that gpuwatch started for this test."""
    pid = json.loads((state / "process-m.json").read_text())["pid"]
    group = [p for p in psutil.process_iter() if p.pid == pid or pid in {q.pid for q in p.parents()}]
    for process in group:
        process.kill()
    psutil.wait_procs(group, timeout=30)
