"""The store on real SQLite files: what is saved comes back, whatever goes wrong in between."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from gpuwatch.errors import StoreError
from gpuwatch.promql import Matcher
from gpuwatch.records import (
    STALE,
    Alert,
    AlertState,
    Labels,
    Mode,
    Notification,
    Phase,
    Plan,
    Refusal,
    Remediation,
    Sample,
    ServerPhase,
    ServerState,
    Step,
    SupervisorPhase,
    SupervisorState,
    Transition,
    is_stale,
)
from gpuwatch.store import Changes, Store, leave_wish, open_read_only

MINUTE = 60_000
DAY = 24 * 60 * MINUTE
NOTHING = Changes()
POWER = Labels.of("gpu_power_draw_watts", gpu="0")


def alert(rule="GpuMemoryHigh", value=0.97, state=AlertState.FIRING, **labels):
    return Alert(
        rule=rule,
        labels=Labels.of(alertname=rule, **labels),
        annotations={"summary": "显存 97 %"},
        state=state,
        value=value,
        active_at_ms=1000,
        fired_at_ms=2000,
    )


def remediation(name="r1", server="qwen", phase=Phase.APPLYING, created_at_ms=1000):
    plan = Plan(
        id=name,
        server=server,
        alert="ServerDown",
        alert_labels=Labels.of(server=server),
        steps=(Step(action="restart", within_ms=600_000),),
        verify_for_ms=120_000,
        mode=Mode.AUTO,
        dry_run=False,
        policy="restart",
    )
    return Remediation(
        plan=plan, phase=phase, step_index=0, since_ms=created_at_ms, created_at_ms=created_at_ms
    )


def message(name, receiver="slack", created_at_ms=1000, **more):
    return Notification(
        id=name,
        receiver=receiver,
        body='{"text":"…"}',
        created_at_ms=created_at_ms,
        next_attempt_at_ms=0,
        **more,
    )


def power(at_ms, value=300.0):
    return Sample(POWER, at_ms, value)


def points(store, labels=POWER, after_ms=-1, upto_ms=10**15):
    found = store.select([Matcher("__name__", "=", labels.metric)], after_ms, upto_ms)
    return [p for s in found if s.labels == labels for p in zip(s.at_ms, s.values, strict=True)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gpuwatch.db"


@pytest.fixture
def store(path):
    with Store(path, busy_ms=50) as opened:
        yield opened


@pytest.fixture
def reopened(store, path):
    """Closes the store and gives what a new process finds."""
    with ExitStack() as stack:

        def reopen():
            store.close()
            return stack.enter_context(Store(path))

        yield reopen


# Samples


def test_samples_are_at_hand_before_they_are_saved(store):
    store.append([power(1000), power(2000, 310.0)])
    assert points(store) == [(1000, 300.0), (2000, 310.0)]
    assert store.last(POWER.metric, 2000) == {POWER: 310.0}


def test_a_new_process_finds_the_last_minutes_in_memory(store, reopened):
    for at_ms in range(0, 20 * MINUTE, MINUTE):
        store.append([power(at_ms, float(at_ms))])
        store.save(NOTHING, at_ms)
    again = reopened()
    again.reload(19 * MINUTE)
    assert [at_ms for at_ms, _ in points(again)] == [n * MINUTE for n in range(10, 20)]


def test_values_come_back_bit_by_bit(store, reopened):
    values = [0.0, -1.5, 2.0**63, 5e-324, float("inf"), float("-inf"), 0.1]
    store.append([power(1000 + n, value) for n, value in enumerate(values)])
    store.append([power(2000, STALE)])
    store.save(NOTHING, 2000)
    again = reopened()
    again.reload(2000)
    found = [value for _, value in points(again)]
    assert found[:-1] == values
    assert is_stale(found[-1])


def test_two_values_of_one_instant_are_one_row_and_the_later_wins(store, reopened):
    store.append([power(1000, 1.0), power(1000, 2.0)])
    store.save(NOTHING, 1000)
    store.append([power(1000, 3.0)])
    store.save(NOTHING, 1001)
    again = reopened()
    again.reload(1000)
    assert points(again) == [(1000, 3.0)]


def test_series_keep_their_id_across_processes(store, reopened, path):
    store.append([power(1000)])
    store.save(NOTHING, 1000)
    again = reopened()
    again.append([power(2000), Sample(Labels.of("up"), 2000, 1.0)])
    again.save(NOTHING, 2000)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM series").fetchone() == (2,)


def test_labels_no_database_takes_do_not_keep_the_others_from_being_saved(store, reopened):
    store.append([Sample(Labels.of("process", name="vllm\udce4"), 1000, 1.0), power(1000)])
    store.save(NOTHING, 1000)
    again = reopened()
    again.reload(1000)
    assert points(again) == [(1000, 300.0)]


def test_a_store_in_memory_works_the_same():
    with Store(None) as store:
        store.append([power(1000)])
        store.save(Changes(alerts=[alert()]), 1000)
        assert store.active_alerts() == [alert()]
        assert store.last_tick_ms() == 1000


def test_retention_takes_the_old_samples_and_leaves_the_new(store, reopened):
    for hour in range(5):
        store.append([power(hour * 60 * MINUTE + n) for n in range(100)])
    store.save(NOTHING, 5 * 60 * MINUTE)
    assert store.prune(5 * 60 * MINUTE, keep_ms=3 * 60 * MINUTE) == 200
    assert store.prune(5 * 60 * MINUTE, keep_ms=3 * 60 * MINUTE) == 0
    again = reopened()
    again.reload(60 * MINUTE)
    assert points(again) == []


def test_retention_deletes_in_short_transactions_until_all_is_gone(store, path):
    series = [Labels.of("up", source=str(n)) for n in range(500)]
    for at_ms in range(50):
        store.append([Sample(labels, at_ms, 1.0) for labels in series])
    store.save(NOTHING, 50)
    assert store.prune(DAY, keep_ms=0) == 25_000
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM sample").fetchone() == (0,)


def test_retention_keeps_unsent_messages_live_remediations_and_a_month_of_history(store):
    changed = alert()
    born = Transition(alert=changed, was=None, now=AlertState.FIRING, at_ms=1000)
    store.save(
        Changes(
            transitions=[born],
            remediations=[remediation("live"), remediation("done", phase=Phase.SUCCEEDED)],
            notifications=[message("unsent"), message("sent", sent_at_ms=1500)],
        ),
        2000,
    )
    assert store.prune(29 * DAY, keep_ms=DAY) == 0
    assert store.prune(31 * DAY, keep_ms=DAY) == 3
    assert store.transitions() == []
    assert [r.plan.id for r in store.remediations()] == ["live"]
    assert [n.id for n in store.notifications()] == ["unsent"]


# Rows


def test_every_record_comes_back_as_it_was(store, reopened):
    fired = alert(gpu="0")
    server = ServerState(
        name="qwen",
        phase=ServerPhase.DOWN,
        since_ms=5,
        seen_at_ms=6,
        supervisor=SupervisorState(phase=SupervisorPhase.FAILED, pid=7, detail="exit-code"),
    )
    refused = Refusal(
        server="qwen",
        alert="ServerDown",
        alert_labels=Labels.of(server="qwen"),
        code="cooling_down",
        facts={"left": "5m"},
    )
    moved = Transition(alert=fired, was=AlertState.PENDING, now=AlertState.FIRING, at_ms=2000)
    gone = Transition(alert=fired, was=AlertState.PENDING, now=None, at_ms=2001)
    store.save(
        Changes(
            alerts=[fired],
            transitions=[moved, gone],
            servers=[server],
            remediations=[remediation()],
            notifications=[message("n1", error="HTTP 500")],
            receivers={"slack": '{"failures":3}'},
            refusals=[refused],
            settings={"paused": "true"},
        ),
        3000,
    )
    again = reopened()
    assert again.active_alerts() == [fired]
    assert isinstance(again.active_alerts()[0].labels, Labels)
    assert again.transitions() == [(1, moved), (2, gone)]
    assert again.servers() == {"qwen": server}
    assert again.live_remediations() == [remediation()]
    assert again.notifications() == [message("n1", error="HTTP 500")]
    assert again.receivers() == {"slack": '{"failures":3}'}
    assert again.refusals() == [refused]
    assert again.settings() == {"paused": "true"}
    assert again.last_tick_ms() == 3000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_alert_may_have_a_value_that_json_lacks(store, value):
    store.save(Changes(alerts=[alert(value=value)]), 1000)
    assert repr(store.active_alerts()[0].value) == repr(value)


def test_an_alert_is_one_row_by_rule_and_labels(store):
    store.save(Changes(alerts=[alert(gpu="0"), alert(gpu="1"), alert("Other", gpu="0")]), 1000)
    store.save(Changes(alerts=[alert(gpu="0", value=0.5)], ended=[alert(gpu="1")]), 2000)
    assert store.active_alerts() == [alert(gpu="0", value=0.5), alert("Other", gpu="0")]


def test_an_alert_that_ends_and_begins_in_one_tick_is_active(store):
    store.save(Changes(alerts=[alert()], ended=[alert()]), 1000)
    assert store.active_alerts() == [alert()]


def test_history_is_read_newest_first_page_or_followed_by_id(store):
    moves = [
        Transition(alert=alert(value=float(n)), was=None, now=AlertState.FIRING, at_ms=n) for n in range(5)
    ]
    store.save(Changes(transitions=moves), 1000)
    assert [number for number, _ in store.transitions(limit=2)] == [4, 5]
    assert [number for number, _ in store.transitions(limit=2, after_id=1)] == [2, 3]
    assert store.transitions(after_id=5) == []


def test_remediations_are_found_by_server_and_time_the_newest_first(store):
    store.save(
        Changes(
            remediations=[
                remediation("a", created_at_ms=1000, phase=Phase.FAILED),
                remediation("b", created_at_ms=3000),
                remediation("c", created_at_ms=2000, server="llama"),
            ]
        ),
        3000,
    )
    assert [r.plan.id for r in store.remediations()] == ["b", "c", "a"]
    assert [r.plan.id for r in store.remediations(server="qwen")] == ["b", "a"]
    assert [r.plan.id for r in store.remediations(since_ms=2000, limit=1)] == ["b"]
    assert [r.plan.id for r in store.live_remediations()] == ["c", "b"]
    store.save(Changes(remediations=[remediation("b", created_at_ms=3000, phase=Phase.SUCCEEDED)]), 4000)
    assert [r.plan.id for r in store.live_remediations()] == ["c"]


def test_a_message_that_failed_keeps_its_place_in_the_queue(store):
    store.save(Changes(notifications=[message("z"), message("a"), message("d", receiver="dingtalk")]), 1000)
    store.save(Changes(notifications=[message("z", attempts=1)]), 2000)
    assert [n.id for n in store.unsent("slack")] == ["z", "a"]
    assert [n.id for n in store.unsent("slack", limit=1)] == ["z"]
    assert store.unsent_count() == {"slack": 2, "dingtalk": 1}


def test_what_was_sent_or_given_up_is_not_sent_again(store):
    store.save(Changes(notifications=[message("a"), message("b"), message("c")]), 1000)
    store.save(Changes(notifications=[message("a", sent_at_ms=1500), message("b", gave_up_at_ms=1600)]), 2000)
    assert [n.id for n in store.unsent("slack")] == ["c"]
    assert store.sent_since("slack", 1500) == [1500]
    assert store.sent_since("slack", 1501) == []
    assert [n.id for n in store.notifications(limit=2)] == ["c", "b"]


def test_refusals_are_replaced_only_when_given(store):
    refused = Refusal(server="qwen", alert="A", alert_labels=Labels(), code="paused")
    store.save(Changes(refusals=[refused]), 1000)
    store.save(NOTHING, 2000)
    assert store.refusals() == [refused]
    store.save(Changes(refusals=[]), 3000)
    assert store.refusals() == []


def test_a_setting_of_none_is_deleted(store):
    store.save(Changes(settings={"paused": "true", "mode": "auto"}), 1000)
    store.save(Changes(settings={"paused": None, "mode": "observe"}), 2000)
    assert store.settings() == {"mode": "observe"}


def test_a_row_that_somebody_broke_by_hand_is_told_with_its_field(store, path):
    store.save(Changes(servers=[ServerState(name="q", phase=ServerPhase.DOWN, since_ms=1, seen_at_ms=1)]), 1)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE server SET record = replace(record, 'down', 'asleep')")
    with pytest.raises(StoreError, match=r"cannot read a ServerState in .*phase.*mend"):
        store.servers()


# Other processes


def test_a_person_reads_the_views_with_any_sqlite(store, path):
    store.append([power(1000), power(2000, 310.0), Sample(Labels.of("up"), 1000, 1.0)])
    store.append([Sample(Labels.of("up"), 2000, STALE)])
    store.save(Changes(alerts=[alert(value=float("inf"))], remediations=[remediation()]), 2000)
    with closing(sqlite3.connect(path)) as connection:
        last = connection.execute("SELECT metric, value, at FROM v_last").fetchall()
        alerts = connection.execute("SELECT rule, state, active_at, summary FROM v_alerts").fetchall()
        remedies = connection.execute("SELECT id, alert, phase, created_at FROM v_remediations").fetchall()
    assert last == [("gpu_power_draw_watts", 310.0, "1970-01-01 00:00:02 UTC")]
    assert alerts == [("GpuMemoryHigh", "firing", "1970-01-01 00:00:01 UTC", "显存 97 %")]
    assert remedies == [("r1", "ServerDown", "applying", "1970-01-01 00:00:01 UTC")]


def test_a_reader_sees_what_a_running_daemon_saved(store, path):
    with open_read_only(path) as reader:
        store.append([power(1000), Sample(Labels.of("up"), 1000, 1.0)])
        store.append([Sample(Labels.of("up"), 2000, STALE), Sample(Labels.of("far"), 900_000, 1.0)])
        store.save(Changes(alerts=[alert()]), 2000)
        assert reader.active_alerts() == [alert()]
        assert reader.latest(2000, lookback_ms=300_000) == {POWER: 300.0}
        assert reader.latest(2000, lookback_ms=500) == {}


def test_a_reader_cannot_write(store, path):
    with (
        open_read_only(path) as reader,
        pytest.raises(StoreError, match="readonly"),
        reader._database.writing("try") as connection,
    ):
        connection.exec_driver_sql("DELETE FROM setting")


def test_a_reader_works_after_the_daemon_has_stopped(store, path):
    store.save(Changes(settings={"mode": "auto"}), 1000)
    store.close()
    with open_read_only(path) as reader:
        assert reader.settings() == {"mode": "auto"}
        assert reader.last_tick_ms() == 1000


@pytest.fixture
def foreign_folder():
    """A folder that may be read but not written; root becomes nobody to be bound by it."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@contextmanager
def unprivileged(folder):
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_reader_without_write_permission_works_after_a_clean_stop(foreign_folder):
    path = foreign_folder / "gpuwatch.db"
    with Store(path) as store:
        store.save(Changes(settings={"mode": "auto"}), 1000)
    with unprivileged(foreign_folder), open_read_only(path) as reader:
        assert reader.settings() == {"mode": "auto"}


def test_a_reader_without_write_permission_works_beside_the_daemon(foreign_folder):
    path = foreign_folder / "gpuwatch.db"
    with Store(path) as store:
        store.save(Changes(settings={"mode": "auto"}), 1000)
        with unprivileged(foreign_folder), open_read_only(path) as reader:
            assert reader.settings() == {"mode": "auto"}


def test_a_wish_without_write_permission_says_whose_permission_is_lacking(foreign_folder):
    path = foreign_folder / "gpuwatch.db"
    Store(path).close()
    path.chmod(0o444)
    with unprivileged(foreign_folder), pytest.raises(StoreError, match="let the user") as failed:
        leave_wish(path, {"paused": "true"})
    assert str(path) in str(failed.value)


def test_a_folder_that_may_not_be_written_is_told_at_start(foreign_folder):
    with unprivileged(foreign_folder), pytest.raises(StoreError, match="this user may write there"):
        Store(foreign_folder / "gpuwatch.db")


def test_a_wish_reaches_the_running_daemon(store, path):
    store.save(Changes(settings={"mode": "auto"}), 1000)
    leave_wish(path, {"paused": "true", "mode": None})
    assert store.settings() == {"paused": "true"}
    store.save(Changes(settings={"paused": None}), 2000)
    assert store.settings() == {}


def test_a_wish_can_be_left_while_no_daemon_runs(store, path):
    store.close()
    leave_wish(path, {"paused": "true"})
    with Store(path) as again:
        assert again.settings() == {"paused": "true"}


@pytest.mark.parametrize("opened", [open_read_only, lambda path: leave_wish(path, {})])
def test_no_database_is_made_by_looking_for_one(path, opened):
    with pytest.raises(StoreError, match="there is no database"):
        opened(path)
    assert not path.exists()


def test_two_daemons_cannot_write_one_file(store, path):
    with pytest.raises(StoreError, match="another gpuwatch writes") as refused:
        Store(path)
    assert refused.value.kind == "locked"
    store.close()
    Store(path).close()


def test_odd_characters_in_a_path_are_taken_as_they_are(tmp_path):
    path = tmp_path / "a?b#c%20d.db"
    Store(path).close()
    assert path.exists()
    open_read_only(path).close()


# Faults


def limit_pages(store, pages):
    with store._database.reading("set a limit") as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")


def test_a_full_disk_loses_nothing_once_there_is_room_again(store, reopened):
    limit_pages(store, 1)
    series = [Labels.of("up", source=str(n)) for n in range(2000)]
    store.append([Sample(labels, 1000, 1.0) for labels in series])
    for at_ms in (1000, 2000):
        with pytest.raises(StoreError, match=r"full.*free space") as failed:
            store.save(Changes(alerts=[alert()]), at_ms)
        assert failed.value.kind == "full"
        assert store.active_alerts() == []
    limit_pages(store, 10**9)
    store.save(Changes(alerts=[alert()]), 3000)
    assert store.dropped_samples == 0
    again = reopened()
    again.reload(3000)
    assert len(again.last("up", 3000)) == 2000
    assert again.active_alerts() == [alert()]


def test_ids_given_in_a_transaction_that_failed_are_not_believed(store, reopened):
    store.append([power(1000)])
    too_big = Changes(notifications=[message("n", created_at_ms=2**70)])
    with pytest.raises((StoreError, OverflowError)):
        store.save(too_big, 1000)
    store.append([Sample(Labels.of("up"), 1000, 1.0)])
    store.save(NOTHING, 2000)
    again = reopened()
    again.reload(2000)
    assert points(again) == [(1000, 300.0)]
    assert points(again, Labels.of("up")) == [(1000, 1.0)]


def test_a_program_that_holds_the_database_is_told_and_outlived(store, path):
    store.append([power(1000)])
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="end the other program") as failed:
            store.save(NOTHING, 1000)
        assert failed.value.kind == "locked"
        assert store.settings() == {}, "reading goes on"
        other.execute("ROLLBACK")
    store.save(NOTHING, 2000)
    assert store.last_tick_ms() == 2000


def test_samples_the_disk_refuses_are_bounded_and_the_oldest_go_first(store, path):
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for start in range(0, 70_000, 10_000):
            store.append([power(start + n) for n in range(10_000)])
        with pytest.raises(StoreError):
            store.save(NOTHING, 1000)
        store.append([power(70_000)])
    assert store.dropped_samples == 10_001
    store.save(NOTHING, 2000)
    with closing(sqlite3.connect(path)) as other:
        kept = other.execute("SELECT count(*), min(at_ms), max(at_ms) FROM sample").fetchone()
    assert kept == (60_000, 10_001, 70_000)


def test_a_file_that_is_no_database_is_refused_and_left_alone(path):
    path.write_bytes(b"not a database, but somebody's " * 100)
    before = path.read_bytes()
    for opened in (Store, open_read_only):
        with pytest.raises(StoreError, match="move the file away") as refused:
            opened(path)
        assert refused.value.kind == "corrupt"
        assert str(path) in str(refused.value)
    assert path.read_bytes() == before


def test_a_damaged_database_is_told_from_a_passing_fault(store, path):
    store.append([Sample(Labels.of("up", source=str(n)), 1000, 1.0) for n in range(2000)])
    store.save(NOTHING, 1000)
    store.close()
    damaged = bytearray(path.read_bytes())
    damaged[4096:] = b"\xff" * (len(damaged) - 4096)
    path.write_bytes(damaged)
    with pytest.raises(StoreError) as refused, Store(path) as again:
        again.reload(1000)
    assert refused.value.kind == "corrupt"


def test_a_missing_folder_is_told_with_path_and_cure(tmp_path):
    with pytest.raises(StoreError, match=r"nowhere.*see that its folder exists"):
        Store(tmp_path / "nowhere" / "gpuwatch.db")


def test_an_error_never_shows_what_was_to_be_written(store):
    secret = message("n", error="hunter2")
    store.save(NOTHING, 1)
    with store._database.writing("break it") as connection:
        connection.exec_driver_sql("DROP TABLE notification")
    with pytest.raises(StoreError) as failed:
        store.save(Changes(notifications=[secret]), 2)
    assert "hunter2" not in f"{failed.value} {failed.value.__cause__}"


# Kills

SAVES_FOR_EVER = """
import sys
from itertools import count
from pathlib import Path
from gpuwatch.records import Labels, Sample
from gpuwatch.store import Changes, Store

store = Store(Path(sys.argv[1]))
start = (store.last_tick_ms() or 0) + 1
series = [Labels.of("up", source=str(n)) for n in range(50)]
for tick in count(start):
    store.append([Sample(labels, tick, float(tick)) for labels in series])
    store.save(Changes(settings={"tick": str(tick)}), tick)
    if tick % 50 == 0:
        store.prune(tick, keep_ms=200)
    print(tick, flush=True)
"""


def test_twenty_kills_lose_no_acknowledged_save(path):
    dice = random.Random(20)
    for _ in range(20):
        daemon = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVES_FOR_EVER), str(path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        with daemon:
            acknowledged = [daemon.stdout.readline() for _ in range(dice.randint(1, 60))]
            daemon.send_signal(signal.SIGKILL)
            acknowledged += daemon.stdout.read().split("\n")[:-1]
        last = int(acknowledged[-1])
        with closing(sqlite3.connect(path)) as found:
            assert found.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert found.execute("SELECT at_ms FROM tick").fetchone()[0] in {last, last + 1}
            ticks = dict(found.execute("SELECT at_ms, count(*) FROM sample GROUP BY at_ms"))
        assert set(ticks.values()) == {50}
        newest = max(ticks)
        assert sorted(ticks) == list(range(min(ticks), newest + 1))
        assert newest in {last, last + 1}
        assert min(ticks) <= max(1, newest - 200)
