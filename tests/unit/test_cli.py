"""The command line on a real database, with a recording as the host."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpuwatch import store
from gpuwatch.cli import main
from gpuwatch.errors import StoreError

RECORDING = Path(__file__).parents[1] / "recordings" / "h200-vllm024-incidents.jsonl.xz"
START_S = 1795177020.79
DOWN_MS = int((START_S + 340) * 1000)  # from 334 s on its server is down for good


def gpuwatch(*words, ok=True):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert (result.exit_code == 0) == ok, result.output
    return result.output


@pytest.fixture(scope="module")
def events():
    lines = gpuwatch("replay", RECORDING, "--json").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def moments(events, alert, state):
    return [
        e["t"] - START_S for e in events if (e["kind"], e.get("alert"), e["state"]) == ("alert", alert, state)
    ]


def test_nothing_fires_before_the_first_incident(events):
    firing = [e for e in events if e["kind"] == "alert" and e["state"] == "firing"]
    assert min(e["t"] for e in firing) - START_S > 117


def test_a_server_that_was_healthy_is_down_within_3_s_and_until_it_is_healthy_again(events):
    assert 274 <= moments(events, "VLLMDown", "firing")[0] <= 277.1
    assert 318 <= moments(events, "VLLMDown", "resolved")[0] <= 320


def test_each_alert_that_fires_is_told_with_what_is_done_or_why_nothing_is(events):
    told = [e for e in events if e["kind"] == "notification" and e["state"] == "firing"]
    assert {e["alert"] for e in told} >= {"VLLMDown", "VLLMKVCacheFull", "GPUMemoryHeadroomLow"}
    for event in told:
        assert any(line.startswith(("Would ", "gpuwatch ")) for line in event["lines"]), event
    down = next(e for e in told if e["alert"] == "VLLMDown")
    assert any("(dry run)" in line and "mode is observe" in line for line in down["lines"])


def test_a_replay_rehearses_and_touches_nothing(events):
    assert {e["phase"] for e in events if e["kind"] == "remediation"} == {"rehearsed"}


def test_own_rules_take_the_place_of_the_shipped_ones(tmp_path):
    (tmp_path / "hot.yaml").write_text(
        "groups: [{name: g, rules: [{alert: Hot, expr: gpu_temperature_celsius > 50}]}]\n"
    )
    lines = gpuwatch("replay", RECORDING, "--rules", tmp_path, "--json").splitlines()
    assert {json.loads(line)["alert"] for line in lines} == {"Hot"}


def test_a_wrong_rule_is_refused_with_file_line_and_column(tmp_path):
    rules = tmp_path / "bad.yaml"
    rules.write_text("groups:\n  - name: g\n    rules:\n      - alert: A\n        expr: rate(x[5m]) >> 1\n")
    assert f"{rules}:5:28" in gpuwatch("check", "--rules", rules, ok=False)


def test_check_shows_the_settings_in_force(tmp_path):
    settings = tmp_path / "g.yaml"
    settings.write_text("remediation: {cooldown: 7m}\n")
    shown = gpuwatch("check", "--config", settings)
    assert "cooldown: 7m" in shown
    assert "mode: observe" in shown


@pytest.fixture
def played(tmp_path):
    """A state folder in which a real daemon played the recording until its server was down for good."""
    settings = tmp_path / "g.yaml"
    settings.write_text(f"state_dir: {tmp_path}\n")
    run = [sys.executable, "-m", "gpuwatch", "run", "--config", settings, "--recording", RECORDING]
    daemon = subprocess.Popen([*run, "--speed", "60", "--log-level", "error"])
    deadline = time.monotonic() + 40
    while last_tick_ms(tmp_path) < DOWN_MS and time.monotonic() < deadline:
        time.sleep(0.05)
    fired = firing(tmp_path)
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(20) == 0
    assert fired, "VLLMDown never fired"
    return settings


def last_tick_ms(folder):
    try:
        with store.open_read_only(folder) as view:
            return view.last_tick_ms() or 0
    except StoreError:  # the daemon has not made it yet
        return 0


def firing(folder):
    try:
        with store.open_read_only(folder) as view:
            return "VLLMDown" in {a.rule for a in view.active_alerts() if a.state == "firing"}
    except StoreError:  # the daemon has not made it yet
        return False


def test_status_tells_of_a_daemon_that_is_down_and_how_things_stood(played):
    text = gpuwatch("status", "--config", played)
    assert "NOT RUNNING" in text
    assert "NVIDIA H200" in text
    assert "VLLMDown" in text
    seen = json.loads(gpuwatch("status", "--config", played, "--json"))
    assert seen["running"] is False
    assert seen["servers"][0]["phase"] == "down"
    assert seen["gpus"][0]["memory_total_bytes"] == 150754820096
    alert = next(a for a in seen["alerts"] if a["alert"] == "VLLMDown")
    assert alert["remediation"] or alert["refusal"]


def test_alerts_shows_the_newest_change_first(played):
    changes = json.loads(gpuwatch("alerts", "--config", played, "--json"))["changes"]
    assert [c["at_ms"] for c in changes] == sorted((c["at_ms"] for c in changes), reverse=True)


def test_a_pause_is_a_row_and_status_shows_it_until_it_is_ended(played):
    assert "paused" in gpuwatch("pause", "--config", played)
    assert "PAUSED" in gpuwatch("status", "--config", played)
    gpuwatch("resume", "--config", played)
    assert "PAUSED" not in gpuwatch("status", "--config", played)


def test_a_word_on_an_unknown_remediation_is_refused_with_those_there_are(played):
    assert "there are: none" in gpuwatch("approve", "GW-000000", "--config", played, ok=False)


def test_a_pause_for_no_duration_is_refused(played):
    assert "'soon' is no duration" in gpuwatch("pause", "--for", "soon", "--config", played, ok=False)


def test_status_without_a_database_says_so_without_a_traceback(tmp_path):
    text = gpuwatch("status", "--state-dir", tmp_path / "none", ok=False)
    assert "Traceback" not in text
    assert f"there is no database {tmp_path}/none/state.db" in text


def test_a_running_daemon_has_loaded_nothing_that_only_commands_need(tmp_path):
    settings = tmp_path / "g.yaml"
    settings.write_text(f"state_dir: {tmp_path}\n")
    run = [sys.executable, "-m", "gpuwatch", "run", "--config", settings, "--recording", RECORDING]
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}  # it outlives the exec of the daemon
    daemon = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 40
        while not last_tick_ms(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(2)  # of its work
        mapped = Path(f"/proc/{daemon.pid}/maps").read_text()
    finally:
        daemon.terminate()
        said = daemon.communicate(timeout=20)[1]
    assert last_tick_ms(tmp_path)
    imported = {line.rpartition("|")[2].strip() for line in said.splitlines() if line.startswith("import")}
    assert "sqlite3" in mapped
    assert {"gpuwatch.service", "gpuwatch.store.disk"} <= imported
    for name in ("numpy", "pyarrow", "google.protobuf", "psycopg", "torch", "vllm", "rich"):
        assert f"/{name.replace('.', '/')}/" not in mapped
        assert not {each for each in imported if each == name or each.startswith(f"{name}.")}
