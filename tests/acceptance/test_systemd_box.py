"""gpuwatch under a real systemd, with a vLLM stand-in as the unit that it keeps."""

import json
import os
import re
import shutil
import subprocess
import time

import pytest
from tests.acceptance.systemd_box import COMMAND, HERE, PROJECT, TOOL, UNIT, Box, install, needed, wait_until

pytestmark = needed


@pytest.fixture(scope="module")
def box():
    box = Box()
    booted_here = box.boot()
    box.run("systemctl", "stop", "gpuwatch", check=False)
    shutil.rmtree(box.root / "var/cache/gpuwatch", ignore_errors=True)  # what another version compiled
    install(box)
    yield box
    box.run("systemctl", "stop", "gpuwatch", UNIT, check=False)
    if booted_here:
        box.tool("stop")


@pytest.fixture
def standin(box):
    """A healthy stand-in."""
    box.run("systemctl", "reset-failed", UNIT, check=False)
    box.run("systemctl", "restart", UNIT)
    wait_until(box.is_healthy)
    return box


class Gpuwatch:
    """The supervisor of the daemon, run as its user: a line in, a line out."""

    def __init__(self, box):
        command = ["runuser", "-u", "gpuwatch", "--", "/opt/gpuwatch/bin/python", "/opt/standin/supervise.py"]
        self.process = subprocess.Popen(
            ["bash", str(TOOL), "exec", *command],
            env={**os.environ, "BOX": str(box.root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def observe(self, unit=UNIT):
        return self.ask("observe", unit)

    def restart(self, since_ms, unit=UNIT):
        return self.ask("restart", unit, since_ms)

    def until(self, action, question, unit=UNIT):
        """Ask for a step until this is so of what is seen; gives back since when it was wished."""
        since_ms = now_ms()

        def is_so():
            assert self.ask(action, unit, since_ms) == {}
            return question(self.observe(unit))

        wait_until(is_so)
        return since_ms

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


@pytest.fixture
def gpuwatch(standin):
    gpuwatch = Gpuwatch(standin)
    yield gpuwatch
    gpuwatch.close()


def now_ms():
    return time.time_ns() // 1_000_000


# The supervisor, as user gpuwatch.


def test_the_unit_files_are_in_order(box):
    assert box.run("systemd-analyze", "verify", "gpuwatch.service") == ""
    exposure = box.run("systemd-analyze", "security", "--no-pager", "gpuwatch.service").splitlines()[-1]
    assert " OK " in exposure, exposure


def test_a_running_unit_is_active_with_pid_and_start(standin, gpuwatch):
    seen = gpuwatch.observe()
    assert (seen["phase"], seen["stop_asked"]) == ("active", False)
    assert seen["pid"] == int(standin.show(UNIT, "MainPID"))
    assert abs(now_ms() - seen["started_at_ms"]) < 30_000


def test_an_engine_death_leaves_the_unit_dead_and_a_restart_heals_it(standin, gpuwatch):
    standin.kill_engine()
    wait_until(standin.is_dead)
    seen = gpuwatch.observe()
    assert (seen["phase"], seen["stop_asked"]) == ("inactive", False)
    assert seen["detail"].startswith("inactive (dead): exited with status 0")
    since_ms = now_ms()
    assert gpuwatch.restart(since_ms) == {}
    wait_until(standin.is_healthy)
    began_ms = gpuwatch.observe()["started_at_ms"]
    assert began_ms >= since_ms
    for _ in range(10):
        assert gpuwatch.restart(since_ms) == {}
    assert gpuwatch.observe()["started_at_ms"] == began_ms


def test_a_running_unit_is_restarted_once_however_often_it_is_asked(standin, gpuwatch):
    old = gpuwatch.observe()
    since_ms = now_ms()

    def is_new():
        assert gpuwatch.restart(since_ms) == {}
        return (gpuwatch.observe()["started_at_ms"] or 0) >= since_ms

    wait_until(is_new)
    new = gpuwatch.observe()
    wait_until(standin.is_healthy)
    assert gpuwatch.restart(since_ms) == {}
    assert gpuwatch.observe()["pid"] == new["pid"] != old["pid"]


def test_a_restart_that_died_again_is_not_repeated(standin, gpuwatch):
    since_ms = now_ms()
    gpuwatch.restart(since_ms)
    wait_until(lambda: gpuwatch.observe()["started_at_ms"] >= since_ms and standin.is_healthy())
    standin.kill_engine()
    wait_until(standin.is_dead)
    gpuwatch.restart(since_ms)
    assert standin.is_dead()


def test_many_restarts_do_not_meet_the_start_limit(standin, gpuwatch):
    for _ in range(8):
        since_ms = now_ms()
        wait_until(lambda: gpuwatch.restart(since_ms) == {} and gpuwatch.observe()["phase"] == "active")  # noqa: B023
        wait_until(lambda: gpuwatch.observe()["started_at_ms"] >= since_ms)  # noqa: B023
    assert standin.show(UNIT, "Result") == "success"


def test_a_stop_by_an_operator_is_told_from_a_death(standin, gpuwatch):
    standin.run("systemctl", "stop", UNIT)
    seen = gpuwatch.observe()
    assert (seen["phase"], seen["stop_asked"], seen["pid"]) == ("inactive", True, None)


def test_a_unit_that_no_rule_names_is_refused_with_the_cure(gpuwatch):
    refusal = gpuwatch.restart(now_ms(), "systemd-journald.service")
    assert refusal["permanent"]
    assert "gpuwatch.polkit.rules" in refusal["error"]


def test_a_unit_that_does_not_exist_is_an_error_for_good(gpuwatch):
    assert gpuwatch.observe("absent.service")["permanent"]
    assert "not-found" in gpuwatch.observe("absent.service")["error"]


def test_a_dead_unit_that_systemd_forgot_is_not_restarted(standin, gpuwatch):
    unit = standin.root / "etc/systemd/system/forgotten.service"
    unit.write_text("[Service]\nType=exec\nExecStart=/bin/true\n")
    standin.run("systemctl", "daemon-reload")
    standin.run("systemctl", "start", "forgotten.service")
    wait_until(lambda: gpuwatch.observe("forgotten.service")["started_at_ms"] is None)
    refusal = gpuwatch.restart(now_ms(), "forgotten.service")
    assert refusal["permanent"]
    assert "enable it" in refusal["error"]


def test_a_unit_that_waits_for_its_own_restart_is_left_to_systemd(standin, gpuwatch):
    unit = standin.root / "etc/systemd/system/looping.service"
    unit.write_text("[Service]\nType=exec\nExecStart=/bin/true\nRestart=always\nRestartSec=1h\n")
    standin.run("systemctl", "daemon-reload")
    standin.run("systemctl", "start", "looping.service")
    wait_until(lambda: gpuwatch.observe("looping.service")["phase"] == "auto-restart")
    assert gpuwatch.restart(now_ms(), "looping.service") == {}
    assert gpuwatch.observe("looping.service")["phase"] == "auto-restart"
    standin.run("systemctl", "stop", "looping.service")


def test_a_stop_and_a_start_are_steps_of_their_own(standin, gpuwatch):
    old = gpuwatch.observe()
    gpuwatch.until("stop", lambda seen: seen["phase"] == "inactive")
    stopped = gpuwatch.observe()
    assert (stopped["stop_asked"], stopped["pid"]) == (True, None)
    since_ms = gpuwatch.until("start", lambda seen: seen["phase"] == "active")
    new = gpuwatch.observe()
    for _ in range(5):
        assert gpuwatch.ask("start", UNIT, since_ms) == {}
    wait_until(standin.is_healthy)
    assert gpuwatch.observe() == new
    assert new["pid"] not in {old["pid"], None}
    assert (new["started_at_ms"] >= since_ms, new["stop_asked"]) == (True, False)


def test_a_gpuwatch_that_was_killed_between_stop_and_start_leaves_the_start_to_the_next(standin, gpuwatch):
    gpuwatch.until("stop", lambda seen: seen["phase"] == "inactive")
    gpuwatch.process.kill()
    following = Gpuwatch(standin)
    following.until("start", lambda seen: seen["phase"] == "active")
    wait_until(standin.is_healthy)
    following.close()


def test_a_start_leaves_a_unit_that_runs_as_it_is(gpuwatch):
    before = gpuwatch.observe()
    assert gpuwatch.ask("start", UNIT, now_ms()) == {}
    assert gpuwatch.observe() == before


def test_a_stop_ends_a_units_own_restarts_too(standin, gpuwatch):
    unit = standin.root / "etc/systemd/system/looping.service"
    unit.write_text("[Service]\nType=exec\nExecStart=/bin/true\nRestart=always\nRestartSec=1h\n")
    standin.run("systemctl", "daemon-reload")
    standin.run("systemctl", "start", "looping.service")
    wait_until(lambda: gpuwatch.observe("looping.service")["phase"] == "auto-restart")
    gpuwatch.until("stop", lambda seen: seen["phase"] == "inactive", "looping.service")


def test_a_unit_that_systemd_forgets_when_it_is_stopped_is_started_again(standin, gpuwatch):
    unit = standin.root / "etc/systemd/system/forgotten.service"
    unit.write_text("[Service]\nType=exec\nExecStart=/bin/sleep 600\n")
    standin.run("systemctl", "daemon-reload")
    standin.run("systemctl", "restart", "forgotten.service")
    gpuwatch.until("stop", lambda seen: seen["phase"] == "inactive", "forgotten.service")
    gpuwatch.until("start", lambda seen: seen["phase"] == "active", "forgotten.service")
    standin.run("systemctl", "stop", "forgotten.service")


# What the polkit rule allows the daemon's user, and what not.


def ask_systemd(box, method, *arguments):
    """What the manager answers to that user: empty, or its refusal."""
    manager = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
    busctl = ("busctl", "--allow-interactive-authorization=no", "--quiet", "call", *manager)
    return box.run("runuser", "-u", "gpuwatch", "--", *busctl, method, *arguments, check=False)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("RestartUnit", ("ss", UNIT, "replace")),
        ("StopUnit", ("ss", UNIT, "replace")),
        ("ResetFailedUnit", ("s", UNIT)),
    ],
)
def test_the_rule_allows(standin, method, arguments):
    assert ask_systemd(standin, method, *arguments) == ""


TRANSIENT = ("1", "ExecStart", "a(sasb)", "1", "/usr/bin/id", "1", "/usr/bin/id", "false", "0")


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("StartUnit", ("ss", UNIT, "replace")),
        ("ReloadUnit", ("ss", UNIT, "replace")),
        ("RestartUnit", ("ss", "dbus.service", "replace")),
        ("StopUnit", ("ss", "gpuwatch.service", "replace")),
        ("StopUnit", ("ss", f"a{UNIT}", "replace")),
        ("StartTransientUnit", ("ssa(sv)a(sa(sv))", UNIT, "replace", *TRANSIENT)),
        (
            "StartTransientUnit",
            ("ssa(sv)a(sa(sv))", "masked.service", "replace", *TRANSIENT),
        ),  # named, no file
        ("StartTransientUnit", ("ssa(sv)a(sa(sv))", "evil.service", "replace", *TRANSIENT)),
        ("SetUnitProperties", ("sba(sv)", UNIT, "true", "1", "MemoryMax", "t", "1000000")),
        ("KillUnit", ("ssi", UNIT, "all", "9")),
        ("DisableUnitFiles", ("asb", "1", UNIT, "false")),
        ("Reload", ()),
    ],
)
def test_the_rule_refuses(standin, method, arguments):
    before = standin.show(UNIT, "MainPID")
    answer = ask_systemd(standin, method, *arguments)
    assert re.search("authentication required|Access denied", answer), answer
    assert standin.show(UNIT, "MainPID") == before


def test_a_bus_that_was_restarted_is_met_again(standin, gpuwatch):
    before = gpuwatch.observe()
    standin.run("systemctl", "restart", "dbus.service")
    assert gpuwatch.observe()["pid"] == before["pid"]


# The daemon.


@pytest.fixture
def daemon(standin):
    """Just started; it has no history."""
    standin.configure()
    standin.run("systemctl", "stop", "gpuwatch", check=False)
    standin.run("systemctl", "reset-failed", "gpuwatch", check=False)
    shutil.rmtree(standin.root / "var/lib/gpuwatch", ignore_errors=True)
    standin.run("systemctl", "start", "gpuwatch")
    yield standin
    standin.run("systemctl", "stop", "gpuwatch", check=False)


def wait_until_seen(box, name="standin", phase="serving"):
    wait_until(lambda: f"{name} {phase}" in box.show("gpuwatch", "StatusText"), note=box.log)


def kill_engine_and_wait_for_a_new_one(box):
    old = box.show(UNIT, "MainPID")
    box.kill_engine()
    wait_until(box.is_dead)
    assert box.show(UNIT, "ExecMainStatus") == "0"
    wait_until(box.is_healthy, patience_s=60, note=box.log)
    assert box.show(UNIT, "MainPID") not in {old, "0"}


def test_the_installed_command_finds_the_shipped_rules(box):
    count = len(list((PROJECT / "rules").glob("*.yaml")))
    assert f"rules in {count} files: right." in box.run(COMMAND, "check")


def test_the_daemon_reports_ready_and_its_status(daemon):
    assert daemon.is_active()
    wait_until_seen(daemon)
    assert 'Status: "standin serving' in daemon.run("systemctl", "status", "gpuwatch")


def test_the_daemon_compiles_nothing_twice(daemon):
    folder = daemon.root / "var/cache/gpuwatch"

    def compiled():
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*.pyc")}

    wait_until_seen(daemon)
    first = compiled()
    assert any(path.match("gpuwatch/cycle.*.opt-2.pyc") for path in first)
    daemon.run("systemctl", "restart", "gpuwatch")
    wait_until_seen(daemon)
    assert first.items() <= compiled().items()  # what is rarely used may come later


def test_the_status_is_for_root_and_the_daemons_user(daemon):
    wait_until_seen(daemon)
    assert "standin" in daemon.run(COMMAND, "status")
    assert "standin" in daemon.run("runuser", "-u", "gpuwatch", "--", COMMAND, "status")
    refusal = daemon.run("runuser", "-u", "vllm", "--", COMMAND, "status", check=False)
    assert refusal.startswith(
        "gpuwatch: cannot open the database /var/lib/gpuwatch/state.db: Permission denied"
    )


def test_what_root_asks_of_the_daemon_does_not_lock_it_out(daemon):
    wait_until_seen(daemon)
    daemon.run(COMMAND, "pause")
    daemon.run(COMMAND, "resume")
    daemon.run("systemctl", "stop", UNIT)
    wait_until_seen(daemon, phase="stopped")
    assert "ERROR" not in daemon.log()


def test_hours_are_sealed_within_the_limits_of_the_unit(daemon):
    wait_until_seen(daemon)
    kept = ("Memory", "Nice", "Protect", "Restrict", "SystemCall", "User=")
    limits = [
        f"--property={line}"
        for line in (PROJECT / "systemd/gpuwatch.service").read_text().splitlines()
        if line.startswith(kept)
    ]
    everything = "9007199254740992 9007199254740992"
    seal = f"/opt/gpuwatch/bin/python -m gpuwatch.frames.sealing /var/lib/gpuwatch/metrics.db {everything}"
    command = f"set -o pipefail; {seal} | wc -c"
    sealed = daemon.run("systemd-run", "--pipe", "--wait", "--quiet", *limits, "/bin/bash", "-c", command)
    assert int(sealed) > 1000


def test_the_daemon_reads_a_secret_that_strangers_cannot(daemon):
    secret = "/etc/gpuwatch/credentials/slack"
    daemon.put(HERE / "slack.url", secret[1:])
    daemon.run("chgrp", "gpuwatch", secret)
    daemon.run("chmod", "0640", secret)
    daemon.configure(**{"receivers: []": f"receivers: [{{name: oncall, slack: {{url_file: {secret}}}}}]"})
    daemon.run("systemctl", "restart", "gpuwatch")
    wait_until_seen(daemon)
    assert "Permission denied" in daemon.run("runuser", "-u", "vllm", "--", "cat", secret, check=False)


def test_the_daemon_heals_an_engine_death(daemon):
    wait_until_seen(daemon)
    kill_engine_and_wait_for_a_new_one(daemon)
    assert daemon.show("gpuwatch", "NRestarts") == "0"
    wait_until(lambda: re.search("remediation .* verifying", daemon.log()), note=daemon.log)


def test_a_reload_takes_new_settings_up(daemon):
    pid = daemon.show("gpuwatch", "MainPID")
    wait_until_seen(daemon)
    daemon.configure(**{"name: standin": "name: renamed"})
    daemon.run("systemctl", "reload", "gpuwatch")
    wait_until_seen(daemon, name="renamed")
    assert daemon.is_active()
    assert daemon.show("gpuwatch", "MainPID") == pid


def test_a_reload_of_a_mistake_says_why_and_keeps_the_old_settings(daemon):
    pid = daemon.show("gpuwatch", "MainPID")
    wait_until_seen(daemon)
    daemon.configure(**{"mode: auto": "mode: always"})
    daemon.run("systemctl", "reload", "gpuwatch")
    wait_until(lambda: "reload refused" in daemon.log(), note=daemon.log)
    assert re.search(r"/etc/gpuwatch/gpuwatch\.yaml:2: remediation\.mode: .*always", daemon.log())
    assert daemon.is_active()
    kill_engine_and_wait_for_a_new_one(daemon)
    assert daemon.show("gpuwatch", "MainPID") == pid


def test_a_start_with_a_mistake_fails_and_says_why(daemon):
    daemon.configure(**{"mode: auto": "mode: always"})
    daemon.run("systemctl", "restart", "gpuwatch", check=False)
    assert not daemon.is_active()
    assert "remediation.mode" in daemon.run("journalctl", "-u", "gpuwatch", "-n", "20", "--no-pager")


def test_a_daemon_that_hangs_is_replaced_and_the_server_is_untouched(daemon):
    old, server = daemon.show("gpuwatch", "MainPID"), daemon.show(UNIT, "MainPID")
    daemon.run("kill", "-STOP", old)
    wait_until(
        lambda: daemon.is_active() and daemon.show("gpuwatch", "MainPID") not in {old, "0"},
        patience_s=90,
        note=daemon.log,
    )
    assert daemon.show("gpuwatch", "NRestarts") == "1"
    assert "Watchdog timeout" in daemon.run("journalctl", "-u", "gpuwatch", "-n", "30", "--no-pager")
    assert daemon.show(UNIT, "MainPID") == server
    assert daemon.is_healthy()


def test_the_daemon_does_not_answer_a_stop_by_an_operator(daemon):
    wait_until_seen(daemon)
    daemon.run("systemctl", "stop", UNIT)
    wait_until_seen(daemon, phase="stopped")
    time.sleep(20)  # a death is answered within 10
    assert daemon.is_dead(), daemon.log()
    assert "remediation" not in daemon.log()
