"""Errands with real processes: whatever is killed, and when, a command runs once and its end is told."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from tests.guests import ROOT, wait_for

from gpuwatch import assembly
from gpuwatch.errors import ServerError
from gpuwatch.records import ErrandPhase
from gpuwatch.servers import session
from gpuwatch.servers.errands import Errands

ENV = {"PATH": os.environ["PATH"]}
KEY = f"a{os.getpid()}"  # an errand is found host-wide by it
RUNNING, DONE, FAILED = ErrandPhase.RUNNING, ErrandPhase.DONE, ErrandPhase.FAILED


@pytest.fixture
def errands(tmp_path):
    made = Errands(folder=tmp_path / "errands")
    yield made
    for key in made.look(1 << 60):  # ends what still runs
        ended(made, key, 1 << 60)
    wait_for(lambda: not made._shells or (made.look(1 << 60) and not made._shells))


def begin(errands, script, key=KEY, within_ms=60_000, now_ms=1000, env=ENV):
    command = ["sh", "-c", script, "sh"]
    errands.begin(key, command, within_ms=within_ms, env=env, now_ms=now_ms)


def ended(errands, key=KEY, now_ms=2000):
    return wait_for(lambda: (e := errands.look(now_ms)[key]).phase is not RUNNING and e)


def test_a_command_is_done_when_it_exits_with_0_and_its_last_line_is_told(errands):
    begin(errands, "echo one; echo; echo two; echo")
    errand = ended(errands)
    assert (errand.phase, errand.detail, errand.began_at_ms, errand.facts) == (DONE, "two", 1000, {})


def test_a_json_object_on_the_last_line_becomes_facts(errands):
    begin(errands, """echo noise; echo '{"ok": true, "n": 3, "name": "x", "sizes": {"a": 1.5}}'""")
    assert ended(errands).facts == {"ok": "true", "n": "3", "name": "x", "sizes": '{"a": 1.5}'}


def test_one_that_fails_says_why_by_its_error_its_last_line_or_its_status(errands):
    begin(errands, """echo '{"ok": false, "error": "unknown flag"}'; exit 1""", "json")
    begin(errands, "echo progress; echo no such thing >&2; exit 3", "line")
    begin(errands, "exit 4", "status")
    errands.begin("program", ["/no/program"], within_ms=9000, env=ENV, now_ms=0)
    told = {key: ended(errands, key) for key in ("json", "line", "status", "program")}
    assert {errand.phase for errand in told.values()} == {FAILED}
    assert (told["json"].detail, told["line"].detail) == ("unknown flag", "no such thing")
    assert told["status"].detail == "exited with status 4"
    assert "/no/program" in told["program"].detail


def test_no_secret_that_it_prints_is_told(errands):
    begin(errands, """echo '{"error": "--api-key s3cret", "token": "bearer: password=s3cret"}'; exit 1""")
    begin(errands, "echo password=s3cret", "plain")
    assert "s3cret" not in repr([ended(errands), ended(errands, "plain")])


SECRETS = [
    "password=s3cret",
    "Authorization: Bearer s3cret",
    "curl: (22) https://hooks.slack.com/services/T0AB/B0CD/s3cret said 404",
    "POST /robot/send?access_token=s3cret",
    '{"page": {"api_key": "s3cret"}, "token": "s3cret", "argv": ["--token", "s3cret"]}',
    '{"error": "no answer from https://ann:s3cret@proxy/", "hook": "https://hooks.slack.com/x/T/s3cret"}',
]


@pytest.mark.parametrize("said", SECRETS)
def test_as_the_daemon_makes_them_they_tell_no_secret_of_any_kind(tmp_path, said):
    made = assembly.errands(tmp_path)
    begin(made, 'echo "$SAID"; exit 1', env={**ENV, "SAID": said})
    told = ended(made)
    assert told.detail
    assert "s3cret" not in repr(told)
    wait_for(lambda: made.look(2000) and not made._shells)


def test_its_environment_is_what_was_given_and_a_mark(errands):
    begin(
        errands,
        "env | grep -v -e ^PWD= -e ^_= -e ^SHLVL= -e ^OLDPWD= | sort | tr '\\n' ' '",
        env={**ENV, "A": "b c"},
    )
    assert ended(errands).detail == f"A=b c GPUWATCH_ERRAND={KEY} PATH={ENV['PATH']}"


def test_begun_again_and_again_it_runs_once(errands, tmp_path):
    script = f"echo x >>{tmp_path}/ran; sleep 0.3"
    others = [Errands(folder=errands.folder) for _ in range(3)]
    for one in (errands, *others, *others, errands):
        begin(one, script)
    ended(errands)
    begin(errands, script)
    wait_for(lambda: [one.look(2000) for one in others] and not any(one._shells for one in others))
    assert (tmp_path / "ran").read_text() == "x\n"


def test_what_was_asked_but_not_started_is_started_by_the_next_call(errands, tmp_path):
    """The daemon was killed between the folder and the shell."""
    begin(errands, "echo fine")
    ended(errands)
    for name in ("leader", "status", "status.new", "out"):
        (errands.folder / KEY / name).unlink()
    after = Errands(folder=errands.folder)
    assert after.look(2000)[KEY].phase is RUNNING
    begin(after, "echo something else", now_ms=5000)
    assert ended(after).detail == "fine", "what was asked first is what runs"
    assert ended(after).began_at_ms == 1000
    after._reap()


def test_a_folder_that_was_being_made_is_made_anew(errands):
    (errands.folder / ".a.new").mkdir(parents=True)
    (errands.folder / ".a.new" / "asked.json").write_text("{half")
    assert errands.look(2000) == {}
    begin(errands, "echo whole")
    assert ended(errands).detail == "whole"


KILLED = """
import os, sys
from pathlib import Path
from gpuwatch.servers import errands, session
real, at = session.spawn, sys.argv[2]
def spawn(*args):
    if at == "before": os.kill(os.getpid(), 9)
    leader = real(*args)
    os.kill(os.getpid(), 9)
session.spawn = spawn
made = errands.Errands(folder=Path(sys.argv[1]))
path = {"PATH": os.environ["PATH"]}
made.begin(sys.argv[4], ["sh", "-c", sys.argv[3]], within_ms=60_000, env=path, now_ms=1000)
"""


@pytest.mark.parametrize("at", ["before", "after"])
def test_a_daemon_that_is_killed_while_it_begins_runs_it_once(errands, tmp_path, at):
    script = f"echo x >>{tmp_path}/ran; sleep 0.2; echo end"
    command = [sys.executable, "-c", KILLED, str(errands.folder), at, script, KEY]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT / "daemon")}, check=False)
    assert done.returncode == -signal.SIGKILL
    for _ in range(5):
        errands.begin(KEY, ["sh", "-c", script], within_ms=60_000, env=ENV, now_ms=1500)
    assert ended(errands).detail == "end"
    assert (tmp_path / "ran").read_text() == "x\n"


def members(folder, key=KEY):
    leader = wait_for(lambda: session.find("GPUWATCH_ERRAND", key))
    return session.members(leader)


def test_one_that_is_late_is_ended_with_all_that_it_started_by_whoever_looks(errands):
    begin(errands, "sleep 1000 & (sleep 1000; echo) & wait", within_ms=5000)
    pids = wait_for(lambda: len(found := members(errands)) >= 4 and found)
    assert errands.look(5999)[KEY].phase is RUNNING
    errand = ended(Errands(folder=errands.folder), now_ms=6000)
    assert (errand.phase, errand.detail) == (FAILED, "not done within 5 s")
    wait_for(lambda: not set(pids) & alive())
    assert Errands(folder=errands.folder).look(9999)[KEY] == errand


def alive():
    return {stat.pid for stat in session._stats()}


def test_one_that_was_killed_is_told_as_gone_and_not_begun_again(errands, tmp_path):
    begin(errands, f"echo x >>{tmp_path}/ran; sleep 1000")
    wait_for((tmp_path / "ran").exists)
    for pid in members(errands):
        os.kill(pid, signal.SIGKILL)
    errand = ended(errands)
    assert (errand.phase, errand.detail.partition(":")[0]) == (FAILED, "it ended without a status")
    begin(errands, f"echo x >>{tmp_path}/ran")
    assert Errands(folder=errands.folder).look(2000)[KEY].phase is FAILED
    assert (tmp_path / "ran").read_text() == "x\n"


def test_one_of_an_earlier_boot_is_gone(errands):
    begin(errands, "echo fine")
    ended(errands)
    home = errands.folder / KEY
    (home / "status").unlink()
    leader = home / "leader"
    text = leader.read_text().replace(leader.read_text().split("\n")[1], "00000000-another-boot")
    leader.unlink()
    leader.write_text(text)
    assert Errands(folder=errands.folder).look(2000)[KEY].phase is FAILED


def test_one_that_nobody_could_start_in_time_has_failed_and_is_started_no_more(errands):
    begin(errands, "echo fine")
    ended(errands)
    for name in ("leader", "status", "out"):
        (errands.folder / KEY / name).unlink()
    after = Errands(folder=errands.folder)
    begin(after, "echo fine", now_ms=99_000)
    assert after.look(99_000)[KEY].detail == "not done within 60 s"
    assert not (errands.folder / KEY / "leader").exists()


def test_one_that_prints_without_end_is_ended(errands):
    begin(errands, "yes")
    assert ended(errands).detail == "it printed more than 16 MiB"
    wait_for(lambda: session.find("GPUWATCH_ERRAND", KEY) is None)
    assert (errands.folder / KEY / "out").stat().st_size < 2**31


def test_it_outlives_who_began_it(errands, tmp_path):
    script = f"sleep 0.3; echo alive >{tmp_path}/ran"
    source = KILLED.replace("session.spawn = spawn", "")
    done = subprocess.run(
        [sys.executable, "-c", source, str(errands.folder), "", script, KEY],
        env={**os.environ, "PYTHONPATH": str(ROOT / "daemon")},
        check=False,
    )
    assert done.returncode == 0
    assert errands.look(2000)[KEY].phase in {RUNNING, DONE}
    assert ended(errands).phase is DONE
    assert (tmp_path / "ran").read_text() == "alive\n"


def zombies():
    return {p.pid for p in psutil.Process().children() if p.status() == psutil.STATUS_ZOMBIE}


def test_no_shell_of_ours_is_left_as_a_zombie(errands):
    before = zombies()  # of other tests in this process, whose daemons died
    for key in "abc":
        begin(errands, "true", key)
        begin(errands, "true", key)
    for key in "abc":
        ended(errands, key)
    wait_for(lambda: errands.look(2000) and not errands._shells)
    assert zombies() <= before


def test_the_old_are_forgotten_and_those_that_run_are_not(errands):
    begin(errands, "true", "old", now_ms=1000)
    begin(errands, "true", "new", now_ms=5000)
    begin(errands, "sleep 1000", "runs", now_ms=1000)
    ended(errands, "old", 6000)
    ended(errands, "new", 6000)
    errands.forget(5000)
    assert errands.look(6000).keys() == {"new", "runs"}


def test_a_key_that_is_no_name_and_a_folder_that_cannot_be_made_are_errors_with_a_cure(errands, tmp_path):
    with pytest.raises(ServerError, match="letters, digits"):
        begin(errands, "true", "../up")
    (tmp_path / "file").write_text("")
    with pytest.raises(ServerError, match="to cure it"):
        begin(Errands(folder=tmp_path / "file" / "below"), "true")
    assert Errands(folder=tmp_path / "nothing").look(0) == {}
