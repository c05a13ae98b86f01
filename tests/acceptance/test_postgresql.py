"""State in a real PostgreSQL server, on a Unix socket of its own: the same rows, and nothing that hangs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from gpuwatch.errors import StoreError
from gpuwatch.records import (
    Alert,
    AlertState,
    Labels,
    Mode,
    Notification,
    Phase,
    Plan,
    Refusal,
    Remediation,
    ServerPhase,
    ServerState,
    Step,
    Transition,
)
from gpuwatch.store.database import own
from gpuwatch.store.migrations import STATE_STEPS, migrate
from gpuwatch.store.postgresql import schema_of
from gpuwatch.store.reading import leave_wish, open_read_only
from gpuwatch.store.rows import Rows
from gpuwatch.store.state import open_state
from gpuwatch.store.writing import Audit, Changes, write_changes

BIN = Path("/usr/lib/postgresql/15/bin")
NOW_MS = 1_795_252_500_000
pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(not BIN.exists(), reason="PostgreSQL 15 is not installed"),
]

ALERT = Alert(
    rule="GpuMemoryHigh",
    labels=Labels.of(alertname="GpuMemoryHigh", gpu="0"),
    annotations={"summary": "显存 97 % {gpu}"},
    state=AlertState.FIRING,
    value=float("inf"),
    active_at_ms=NOW_MS,
    fired_at_ms=NOW_MS + 1000,
)
CHANGE = Transition(alert=ALERT, was=AlertState.PENDING, now=AlertState.FIRING, at_ms=NOW_MS + 1000)
PAUSED = Audit(at_ms=NOW_MS, who="root", what="pause", facts={"until": "12:00"})


def remediation(name="r1", phase=Phase.APPLYING, created_at_ms=NOW_MS):
    plan = Plan(
        id=name,
        server="qwen",
        alert="ServerDown",
        alert_labels=Labels.of(server="qwen"),
        steps=(Step(action="restart", within_ms=600_000),),
        verify_for_ms=120_000,
        mode=Mode.AUTO,
        dry_run=False,
        policy="restart",
    )
    return Remediation(
        plan=plan, phase=phase, step_index=0, since_ms=created_at_ms, created_at_ms=created_at_ms
    )


def message(name, **more):
    body = json.dumps({"alert": "ServerDown", "state": "firing", "annotations": {"summary": "it's down"}})
    return Notification(
        id=name, receiver="slack", body=body, created_at_ms=NOW_MS, next_attempt_at_ms=NOW_MS, **more
    )


EVERYTHING = Changes(
    alerts=[ALERT],
    transitions=[CHANGE],
    servers=[ServerState(name="qwen", phase=ServerPhase.DOWN, since_ms=5, seen_at_ms=NOW_MS)],
    remediations=[remediation(), remediation("old", Phase.SUCCEEDED)],
    notifications=[message("n1", error="HTTP 500\0"), message("n2")],
    receivers={"slack": '{"failures":3}'},
    refusals=[Refusal(server="qwen", alert="A", alert_labels=Labels.of(server="qwen"), code="paused")],
    settings={"paused": "true", "mode": "observe"},
    audit=[PAUSED],
)


class Server:
    """One PostgreSQL server that only listens on a socket in its own folder."""

    def __init__(self, folder):
        self.folder = folder
        self.data = folder / "data"
        self.process = None

    def run(self, *command):
        # PostgreSQL refuses to be run by root.
        as_nobody = (
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
        )
        return [*as_nobody, str(BIN / command[0]), *command[1:]]

    def make(self):
        command = self.run(
            "initdb", "-D", str(self.data), "-U", "gpuwatch", "--auth=trust", "-E", "UTF8", "--locale=C"
        )
        subprocess.run(command, check=True, capture_output=True, cwd=self.folder)

    def start(self):
        options = [
            "-c",
            "listen_addresses=",
            "-c",
            f"unix_socket_directories={self.folder}",
            "-c",
            "fsync=off",
        ]
        self.process = subprocess.Popen(
            self.run("postgres", "-D", str(self.data), *options),
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
        )
        for _ in range(200):
            said = subprocess.run([BIN / "pg_isready", "-q", "-h", self.folder], check=False, cwd=self.folder)
            if said.returncode == 0:
                return
            time.sleep(0.05)
        pytest.fail("PostgreSQL does not start")

    def stop(self, how=signal.SIGQUIT):
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(20)
            self.process = None

    def sql(self, text):
        command = [BIN / "psql", "-h", self.folder, "-U", "gpuwatch", "-d", "postgres", "-Atc", text]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    @property
    def url(self):
        return f"postgresql+psycopg://gpuwatch:hunter2@/postgres?host={self.folder}"


@pytest.fixture(scope="module")
def made():
    folder = Path(tempfile.mkdtemp(prefix="gw-pg-"))
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
    server = Server(folder)
    try:
        server.make()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


@pytest.fixture
def server(made):
    if made.process is None:
        made.start()
    made.sql("DROP SCHEMA IF EXISTS gpuwatch_node_1 CASCADE; DROP SCHEMA IF EXISTS gpuwatch_node_2 CASCADE")
    return made


@contextmanager
def opened(server, folder, host="node-1"):
    with closing(open_state(folder, url=server.url, host=host, now_ms=NOW_MS).state) as state:
        yield state


def reading(server, folder):
    return open_read_only(folder, url=server.url, host="node-1")


def test_every_record_comes_back_as_it_was(server, tmp_path):
    with opened(server, tmp_path) as state:
        state.write([EVERYTHING])
        with reading(server, tmp_path) as rows:
            assert rows.active_alerts() == [ALERT]
            assert rows.transitions() == [(1, CHANGE)]
            assert rows.transitions(after_id=1) == []
            assert rows.servers() == {"qwen": EVERYTHING.servers[0]}
            assert rows.live_remediations() == [remediation()]
            assert len(rows.remediations("qwen", since_ms=NOW_MS, limit=5)) == 2
            assert rows.refusals() == EVERYTHING.refusals
            assert [n.id for n in rows.unsent("slack")] == ["n1", "n2"]
            assert rows.unsent("slack")[0].error == "HTTP 500\ufffd"
            assert rows.unsent_count() == {"slack": 2}
            assert rows.sent_since("slack", NOW_MS) == []
            assert rows.receivers() == EVERYTHING.receivers
            assert rows.settings() == EVERYTHING.settings
            assert rows.audit() == [PAUSED]


def test_what_is_written_twice_is_there_once(server, tmp_path):
    with opened(server, tmp_path) as state:
        state.write([EVERYTHING])
        state.write([EVERYTHING, Changes(ended=[ALERT], settings={"mode": None})])
        with reading(server, tmp_path) as rows:
            assert rows.transitions() == [(1, CHANGE)]
            assert rows.active_alerts() == []
            assert len(rows.notifications()) == 2
            assert len(rows.refusals()) == 1
            assert rows.audit() == [PAUSED]
        assert state.settings() == {"paused": "true"}


def test_a_mirror_is_loaded_from_it_and_written_back_to_it(server, tmp_path):
    mirror = own(None, 0)
    migrate(mirror, STATE_STEPS)
    with Rows(mirror) as rows, opened(server, tmp_path) as state:
        state.write([EVERYTHING])
        state.load(mirror)
        assert rows.active_alerts() == [ALERT]
        assert [n.id for n in rows.unsent("slack")] == ["n1", "n2"]
        assert rows.settings() == EVERYTHING.settings
        with mirror.writing("go on") as connection:
            write_changes(connection, Changes(ended=[ALERT], transitions=[CHANGE], settings={"more": "1"}))
        state.refill(mirror)
        state.refill(mirror)
        assert state.settings() == {**EVERYTHING.settings, "more": "1"}
        with reading(server, tmp_path) as read:
            assert read.active_alerts() == []
            assert len(read.transitions()) == 1


def test_history_is_pruned(server, tmp_path):
    with opened(server, tmp_path) as state:
        state.write([EVERYTHING, Changes(notifications=[message("n1", sent_at_ms=NOW_MS)])])
        assert state.prune(NOW_MS) == 0
        assert state.prune(NOW_MS + 5000) == 4


def test_people_read_the_same_views(server, tmp_path):
    with opened(server, tmp_path) as state:
        state.write([EVERYTHING])
    said = "SET search_path = gpuwatch_node_1; SELECT "
    views = {
        "rule, value, active_at, summary FROM v_alerts":
            "GpuMemoryHigh|inf|2026-11-21 09:15:00 UTC|显存 97 % {gpu}",
        "id, at, was, now, labels FROM v_history":
            '1|2026-11-21 09:15:01 UTC|pending|firing|{"gpu":"0"}',
        "id, alert, mode, created_at, since FROM v_remediations WHERE id = 'r1'":
            "r1|ServerDown|auto|2026-11-21 09:15:00 UTC|2026-11-21 09:15:00 UTC",
        "alert, state, summary, delivery, sent_at FROM v_notifications WHERE seq = 2":
            "ServerDown|firing|it's down|waiting|",
        "at, who, what, facts FROM v_audit": '2026-11-21 09:15:00 UTC|root|pause|{"until":"12:00"}',
    }  # fmt: skip
    for query, row in views.items():
        assert server.sql(said + query) == f"SET\n{row}", query


def test_a_fleet_shares_a_database(server, tmp_path):
    with opened(server, tmp_path) as one, opened(server, tmp_path, "node-2") as other:
        one.write([EVERYTHING])
        assert other.settings() == {}
    assert schema_of("Node-1.example.org") == "gpuwatch_node_1_example_org"
    assert len(schema_of("x" * 100)) == 63
    assert schema_of("") == "gpuwatch"


def test_one_host_has_one_owner(server, tmp_path):
    with opened(server, tmp_path):
        with pytest.raises(
            StoreError, match="another gpuwatch writes to the schema gpuwatch_node_1"
        ) as refused:
            open_state(tmp_path, url=server.url, host="node-1", now_ms=NOW_MS)
        assert refused.value.kind == "locked"
    with opened(server, tmp_path) as state:
        assert state.settings() == {}


def test_a_wish_and_who_left_it_reach_the_daemon(server, tmp_path):
    with opened(server, tmp_path) as state:
        leave_wish(tmp_path, {"paused": "true"}, audit=PAUSED, url=server.url, host="node-1")
        assert state.settings() == {"paused": "true"}


def test_a_reader_cannot_write_and_makes_no_schema(server, tmp_path):
    with pytest.raises(StoreError, match="start the daemon"):
        reading(server, tmp_path)
    assert server.sql("SELECT count(*) FROM pg_namespace WHERE nspname = 'gpuwatch_node_1'") == "0"
    with opened(server, tmp_path), reading(server, tmp_path) as rows:
        with (
            pytest.raises(StoreError, match="grant this user") as failed,
            rows._database.writing("try") as connection,
        ):
            connection.exec_driver_sql("DELETE FROM setting")
        assert failed.value.kind == "read_only"


def test_a_connection_that_died_is_opened_again_by_the_next_use(server, tmp_path):
    with opened(server, tmp_path) as state:
        state.write([EVERYTHING])
        server.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'gpuwatch'"
        )
        with pytest.raises(StoreError, match="goes on by itself") as failed:
            state.settings()
        assert failed.value.kind == "gone"
        assert state.settings() == EVERYTHING.settings
        with pytest.raises(StoreError, match="another gpuwatch"):
            open_state(tmp_path, url=server.url, host="node-1", now_ms=NOW_MS)


def test_a_server_that_is_away_is_gone_until_it_is_back(server, tmp_path):
    with opened(server, tmp_path) as state:
        state.write([EVERYTHING])
        server.stop()
        for _ in range(3):
            with pytest.raises(StoreError) as failed:
                state.write([EVERYTHING])
            assert failed.value.kind == "gone"
            assert "hunter2" not in f"{failed.value} {failed.value.__cause__}"
        with pytest.raises(StoreError) as failed:
            open_state(tmp_path, url=server.url, host="node-2", now_ms=NOW_MS)
        assert failed.value.kind == "gone"
        server.start()
        state.write([EVERYTHING])
        with reading(server, tmp_path) as rows:
            assert rows.transitions() == [(1, CHANGE)]


def test_rows_that_somebody_holds_do_not_hold_the_daemon(server, tmp_path):
    with opened(server, tmp_path) as state:
        state.write([EVERYTHING])
        holding = "BEGIN; LOCK TABLE gpuwatch_node_1.setting; SELECT pg_sleep(30)"
        other = subprocess.Popen(
            [BIN / "psql", "-h", server.folder, "-U", "gpuwatch", "-d", "postgres", "-qc", holding],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            waiting = "SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND granted"
            while server.sql(f"{waiting} AND relation = 'gpuwatch_node_1.setting'::regclass") == "0":
                time.sleep(0.05)
            with pytest.raises(StoreError, match="pg_stat_activity") as failed:
                state.write([EVERYTHING])
            assert failed.value.kind == "locked"
        finally:
            other.terminate()
            other.wait(10)
            server.sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_sleep%'"
                " AND pid <> pg_backend_pid()"
            )
        state.write([EVERYTHING])


def test_an_error_shows_neither_password_nor_message(server, tmp_path):
    with opened(server, tmp_path) as state:
        with pytest.raises(StoreError) as failed:
            state.write([Changes(notifications=[message("n", error="s3cret", attempts=None)])])
        assert "s3cret" not in f"{failed.value} {failed.value.__cause__}"
        assert "null value" in str(failed.value)
        assert state.settings() == {}
    for url in ("postgresql+psycopg://u:hunter2@h:port/db", "hunter2", "sqlite:///hunter2"):
        with pytest.raises(StoreError, match="write state_url as") as failed:
            open_state(tmp_path, url=url, now_ms=NOW_MS)
        assert "hunter2" not in f"{failed.value} {failed.value.__cause__}"
    nobody = server.url.replace("gpuwatch:", "stranger:")
    with pytest.raises(StoreError, match='role "stranger" does not exist') as failed:
        open_state(tmp_path, url=nobody, now_ms=NOW_MS)
    assert "hunter2" not in f"{failed.value} {failed.value.__cause__}"


def test_state_that_stays_behind_in_a_folder_is_said(server, tmp_path):
    open_state(tmp_path, now_ms=NOW_MS).state.close()
    found = open_state(tmp_path, url=server.url, host="node-1", now_ms=NOW_MS)
    found.state.close()
    assert found.notes == (
        f"{tmp_path}/state.db is not used, because state_url is set; what people wished there does not count",
    )


def test_a_record_that_somebody_broke_is_left_out_and_said(server, tmp_path):
    with opened(server, tmp_path) as state:
        state.write([EVERYTHING])
    server.sql("UPDATE gpuwatch_node_1.alert SET record = replace(record, 'firing', 'asleep')")
    found = open_state(tmp_path, url=server.url, host="node-1", now_ms=NOW_MS)
    mirror = own(None, 0)
    migrate(mirror, STATE_STEPS)
    with closing(found.state) as state, Rows(mirror) as rows:
        state.load(mirror)
        assert rows.active_alerts() == []
        assert rows.settings() == EVERYTHING.settings
    assert "1 rows of alert" in found.notes[0]
    assert not found.words_lost


WRITES_FOR_EVER = """
import sys
from itertools import count
from pathlib import Path
from gpuwatch.store.state import open_state
from gpuwatch.store.writing import Changes

state = open_state(Path("."), url=sys.argv[1], host="node-1", now_ms=0).state
for tick in count(int(state.settings().get("tick", "0")) + 1):
    state.write([Changes(settings={"tick": str(tick)})])
    print(tick, flush=True)
"""


def test_a_daemon_that_was_killed_can_be_started_at_once(server, tmp_path):
    for _ in range(5):
        daemon = subprocess.Popen(
            [sys.executable, "-c", WRITES_FOR_EVER, server.url], stdout=subprocess.PIPE, text=True
        )
        with daemon:
            acknowledged = [daemon.stdout.readline() for _ in range(20)]
            daemon.kill()
            acknowledged += daemon.stdout.read().split("\n")[:-1]
        for _ in range(100):
            if server.sql("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == "0":
                break
            time.sleep(0.05)
        last = int(acknowledged[-1])
        assert int(server.sql("SELECT value FROM gpuwatch_node_1.setting")) in {last, last + 1}
