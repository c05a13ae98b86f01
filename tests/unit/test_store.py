"""The store as the daemon uses it: at hand at once, on disk soon, and there again for the next process."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import ExitStack, closing

import pytest
from tests.rows import REFUSED, SERVER, alert, message, remediation, unprivileged

from gpuwatch.config import StoreSettings
from gpuwatch.config.size import Size
from gpuwatch.errors import StoreError
from gpuwatch.frames.rowtext import HOUR_MS
from gpuwatch.promql import Matcher
from gpuwatch.records import (
    STALE,
    AlertState,
    Labels,
    Phase,
    Refusal,
    ServerPhase,
    ServerState,
    Transition,
    is_stale,
)
from gpuwatch.store import (
    METRICS_DB,
    STATE_DB,
    Audit,
    Changes,
    Disk,
    Store,
    leave_wish,
    open_history,
    open_read_only,
)

SECOND, MINUTE = 1000, 60_000
DAY = 24 * HOUR_MS
NOW_MS = 1_795_252_500_000 // HOUR_MS * HOUR_MS
NOTHING = Changes()
ALL = Matcher("__name__", "=~", ".*")
POWER = Labels.of("gpu_power_draw_watts", gpu="0")
UP = Labels.of("up")
ROOMY = StoreSettings(min_free=Size(0))


def power(store, at_ms, value=300.0):
    store.append("nvml", at_ms, [POWER], [value])


def points(store, labels=POWER, after_ms=-1, upto_ms=1 << 53):
    found = store.select([Matcher("__name__", "=", labels.metric)], after_ms, upto_ms)
    return [p for s in found if s.labels == labels for p in zip(s.at_ms, s.values, strict=True)]


def opened(folder, now_ms=NOW_MS, window_ms=HOUR_MS):
    return Store(window_ms, Disk(folder, ROOMY, "gpu-a", now_ms))


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@pytest.fixture
def store(folder):
    with closing(opened(folder)) as found:
        yield found


@pytest.fixture
def reopened(store, folder):
    """Closes the store and gives what a new process finds."""
    with ExitStack() as stack:

        def reopen(now_ms=NOW_MS):
            store.close()
            again = stack.enter_context(closing(opened(folder, now_ms)))
            again.reload(now_ms)
            return again

        yield reopen


def plain(folder, query, name=METRICS_DB):
    with closing(sqlite3.connect(folder / name)) as connection:
        return connection.execute(query).fetchall()


# Samples


def test_samples_are_at_hand_before_they_are_saved(store, folder):
    power(store, NOW_MS)
    power(store, NOW_MS + SECOND, 310.0)
    assert points(store) == [(NOW_MS, 300.0), (NOW_MS + SECOND, 310.0)]
    assert plain(folder, "SELECT count(*) FROM hot") == [(0,)]
    store.save(NOTHING, NOW_MS + SECOND)
    assert plain(folder, "SELECT count(*) FROM hot") == [(2,)]


def test_a_new_process_finds_the_window_in_memory(store, reopened):
    for minute in range(200):
        power(store, NOW_MS + minute * MINUTE, float(minute))
        store.save(NOTHING, NOW_MS + minute * MINUTE)
    again = reopened(NOW_MS + 199 * MINUTE)
    assert points(again) == [(NOW_MS + minute * MINUTE, float(minute)) for minute in range(140, 200)]
    assert again.last_tick_ms() == NOW_MS + 199 * MINUTE


def test_a_new_process_goes_on_where_the_old_one_stood(store, reopened):
    power(store, NOW_MS, 1.0)
    store.save(NOTHING, NOW_MS)
    again = reopened(NOW_MS + SECOND)
    power(again, NOW_MS - SECOND, 0.0)
    power(again, NOW_MS, 2.0)
    power(again, NOW_MS + SECOND, 3.0)
    assert points(again) == [(NOW_MS, 2.0), (NOW_MS + SECOND, 3.0)]


def test_values_come_back_bit_by_bit(store, reopened):
    values = [0.0, -1.5, 2.0**63, 5e-324, float("inf"), float("-inf"), 0.1]
    for n, value in enumerate(values):
        power(store, NOW_MS + n, value)
    power(store, NOW_MS + SECOND, STALE)
    store.save(NOTHING, NOW_MS + SECOND)
    found = [value for _, value in points(reopened(NOW_MS + SECOND))]
    assert found[:-1] == values
    assert is_stale(found[-1])


def test_of_two_scrapes_of_one_instant_the_later_wins(store, reopened):
    power(store, NOW_MS, 1.0)
    power(store, NOW_MS, 2.0)
    store.save(NOTHING, NOW_MS)
    power(store, NOW_MS, 3.0)
    store.save(NOTHING, NOW_MS + 1)
    assert points(store) == points(reopened(NOW_MS + 1)) == [(NOW_MS, 3.0)]


def test_after_a_clock_stepped_back_memory_has_what_was_measured_since(store, reopened, folder):
    for minute in range(61):
        power(store, NOW_MS + minute * MINUTE, 1.0)
    store.save(NOTHING, NOW_MS)
    back = reopened(NOW_MS + 30 * MINUTE)
    for minute in range(30, 41):
        power(back, NOW_MS + minute * MINUTE, 2.0)
    back.save(NOTHING, NOW_MS)
    back.close()
    with closing(opened(folder, NOW_MS + 45 * MINUTE)) as again:
        again.reload(NOW_MS + 45 * MINUTE)
        values = [value for _, value in points(again)]
    assert values == [1.0] * 30 + [2.0] * 11 + [1.0] * 5


def test_a_scrape_that_is_not_taken_is_not_written(store, folder):
    power(store, NOW_MS + SECOND)
    power(store, NOW_MS)
    store.save(NOTHING, NOW_MS + SECOND)
    assert plain(folder, "SELECT at_ms FROM hot") == [(NOW_MS + SECOND,)]


def test_a_source_without_series_holds_nobody_up(store, folder):
    store.append("alerts", NOW_MS, [], [])
    power(store, NOW_MS)
    store.save(NOTHING, NOW_MS)
    assert store.faults() == {STATE_DB: "", METRICS_DB: ""}
    assert plain(folder, "SELECT count(*) FROM hot") == [(2,)]


def test_what_ended_or_goes_on_is_not_silent(store):
    store.append("nvml", NOW_MS, [POWER, UP], [1.0, 1.0])
    store.append("nvml", NOW_MS + MINUTE, [UP], [STALE])
    assert store.silent_since(NOW_MS + SECOND) == [POWER]
    assert store.silent_since(NOW_MS) == []


def test_a_store_in_memory_works_the_same():
    with closing(Store()) as store:
        power(store, NOW_MS)
        store.save(Changes(alerts=[alert()], settings={"mode": "auto"}), NOW_MS)
        assert points(store) == [(NOW_MS, 300.0)]
        assert store.active_alerts() == [alert()]
        assert store.settings() == {"mode": "auto"}
        assert store.last_tick_ms() == NOW_MS
        assert store.is_saved(0)
        assert store.faults() == {STATE_DB: "", METRICS_DB: ""}
        assert (store.dropped_scrapes, store.words_lost) == (0, False)
        assert store.held_bytes() > 0
        store.reload(NOW_MS)
        assert store.seal(NOW_MS) == store.prune(NOW_MS) == 0
        assert (store.forwarder("mimir", NOW_MS), store.scrapes_after(0, 10, NOW_MS)) == ((0, None), [])


def test_a_wider_window_is_gone_by_at_once(store):
    store.go_by(ROOMY, 3 * HOUR_MS)
    for minute in range(0, 240, 5):
        power(store, NOW_MS + minute * MINUTE)
    now_ms = NOW_MS + 235 * MINUTE
    assert [at for at, _ in points(store, after_ms=now_ms - 3 * HOUR_MS)] == list(
        range(NOW_MS + 60 * MINUTE, now_ms + 1, 5 * MINUTE)
    )


def test_a_process_of_its_own_seals_while_the_daemon_writes(store, folder):
    """No rule's window is sealed; memory, rows and frames together have all there ever was."""
    store.start()
    for minute in range(5 * 60):
        power(store, NOW_MS + minute * MINUTE, float(minute))
        store.save(NOTHING, NOW_MS + minute * MINUTE)
    assert store.is_saved(30_000)
    store._writer.flush()
    now_ms = NOW_MS + 5 * HOUR_MS
    assert store.seal(now_ms) == 4
    power(store, now_ms, 300.0)
    store.save(NOTHING, now_ms)
    store._writer.flush()
    assert plain(folder, "SELECT min(at_ms), count(*) FROM hot") == [(NOW_MS + 4 * HOUR_MS, 61)]
    with open_history(folder) as history:
        (found,) = history.tracks([ALL], 0, now_ms)
    assert found.at_ms.tolist() == [NOW_MS + minute * MINUTE for minute in range(301)]
    assert found.values.tolist() == [float(minute) for minute in range(301)]


def test_samples_that_frames_hold_are_reloaded_no_more(store, reopened):
    for minute in range(5 * 60):
        power(store, NOW_MS + minute * MINUTE, float(minute))
    store.save(NOTHING, NOW_MS)
    store.seal(NOW_MS + 5 * HOUR_MS)
    again = reopened(NOW_MS + 5 * HOUR_MS - MINUTE)
    assert [at_ms for at_ms, _ in points(again)] == [NOW_MS + minute * MINUTE for minute in range(240, 300)]


# Rows


def test_every_record_comes_back_as_it_was(store, reopened):
    fired = alert(gpu="0")
    store.save(
        Changes(
            alerts=[fired],
            servers=[SERVER],
            remediations=[remediation()],
            notifications=[message("n1", error="HTTP 500")],
            receivers={"slack": '{"failures":3}'},
            refusals=[REFUSED],
            settings={"paused": "true"},
        ),
        NOW_MS,
    )
    again = reopened()
    for found in (store_in_memory_of(again), again):
        assert found.active_alerts() == [fired]
        assert isinstance(found.active_alerts()[0].labels, Labels)
        assert found.servers() == {"qwen": SERVER}
        assert found.live_remediations() == [remediation()]
        assert found.notifications() == [message("n1", error="HTTP 500")]
        assert found.receivers() == {"slack": '{"failures":3}'}
        assert found.refusals() == [REFUSED]
        assert found.settings() == {"paused": "true"}


def store_in_memory_of(store):
    """What the daemon goes by is no query of a file."""
    assert store._database.name == "the database in memory"
    return store


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_alert_may_have_a_value_that_json_lacks(store, value):
    store.save(Changes(alerts=[alert(value=value)]), NOW_MS)
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


def test_history_is_in_the_file_and_what_the_daemon_needs_is_in_memory(store, folder, reopened):
    moved = Transition(alert=alert(), was=AlertState.PENDING, now=AlertState.FIRING, at_ms=2000)
    store.save(Changes(transitions=[moved], remediations=[remediation("r", phase=Phase.FAILED)]), NOW_MS)
    with open_read_only(folder) as rows:
        assert rows.transitions() == [(1, moved)]
    again = reopened()
    assert again.transitions() == []
    assert [r.plan.id for r in again.remediations()] == ["r"]
    again.save(Changes(transitions=[moved]), NOW_MS)
    with open_read_only(folder) as rows:
        assert rows.transitions() == [(1, moved)], "written twice it is there once"


def test_changes_are_made_whole_or_not_at_all(store, reopened):
    broken = Changes(settings={"mode": "auto"}, notifications=[message("n", created_at_ms=None)])
    with pytest.raises(StoreError):
        store.save(broken, NOW_MS)
    assert store.settings() == {}
    store.save(Changes(settings={"paused": "true"}), NOW_MS)
    assert store.settings() == reopened().settings() == {"paused": "true"}


def test_an_error_never_shows_what_was_to_be_written(store):
    with store._database.writing("break it") as connection:
        connection.exec_driver_sql("DROP TABLE notification")
    with pytest.raises(StoreError) as failed:
        store.save(Changes(notifications=[message("n", error="hunter2")]), NOW_MS)
    assert "hunter2" not in f"{failed.value} {failed.value.__cause__}"


def test_a_month_of_history_is_in_memory_and_a_year_on_disk(store, folder):
    born = Transition(alert=alert(), was=None, now=AlertState.FIRING, at_ms=1000)
    store.save(
        Changes(
            transitions=[born],
            remediations=[remediation("live"), remediation("done", phase=Phase.SUCCEEDED)],
            notifications=[message("unsent"), message("sent", sent_at_ms=1500)],
        ),
        NOW_MS,
    )

    def kept(rows):
        return len(rows.transitions()), {r.plan.id for r in rows.remediations()}, rows.notifications()

    for days, in_memory, on_disk in (
        (29, True, True),
        (31, False, True),
        (364, False, True),
        (366, False, False),
    ):
        store.prune(days * DAY)
        for has_all, rows in ((in_memory, store), (on_disk, open_read_only(folder))):
            ids = {"live", "done"} if has_all else {"live"}
            assert [r.plan.id for r in rows.live_remediations()] == ["live"]
            assert kept(rows)[:2] == (int(has_all), ids), days
            assert {n.id for n in rows.notifications()} == ({"unsent", "sent"} if has_all else {"unsent"})
            if rows is not store:
                rows.close()


def test_a_row_that_somebody_broke_by_hand_is_told_with_its_field(store, folder):
    servers = [ServerState(name="q", phase=ServerPhase.DOWN, since_ms=1, seen_at_ms=1)]
    store.save(Changes(servers=servers), NOW_MS)
    with closing(sqlite3.connect(folder / STATE_DB)) as connection, connection:
        connection.execute("UPDATE server SET record = replace(record, 'down', 'asleep')")
    with (
        open_read_only(folder) as rows,
        pytest.raises(StoreError, match=r"cannot read a ServerState in .*phase.*mend"),
    ):
        rows.servers()


# Other processes


def test_a_reader_sees_what_a_running_daemon_saved(store, folder):
    with open_read_only(folder) as reader:
        assert reader.latest(NOW_MS, HOUR_MS) == {}
        assert reader.last_tick_ms() is None
        store.append("nvml", NOW_MS - SECOND, [POWER, UP], [300.0, 1.0])
        store.append("nvml", NOW_MS, [UP], [STALE])
        store.append("far", NOW_MS + HOUR_MS, [Labels.of("far")], [1.0])
        store.save(Changes(alerts=[alert()]), NOW_MS)
        assert reader.active_alerts() == [alert()]
        assert reader.latest(NOW_MS, lookback_ms=5 * MINUTE) == {POWER: 300.0}
        assert reader.latest(NOW_MS, lookback_ms=500) == {}
        assert reader.last_tick_ms() == NOW_MS + HOUR_MS


def test_a_reader_works_where_there_are_no_metrics_yet(store, folder):
    store.save(Changes(settings={"mode": "auto"}), NOW_MS)
    store.close()
    (folder / METRICS_DB).unlink()
    with open_read_only(folder) as reader:
        assert reader.settings() == {"mode": "auto"}
        assert (reader.last_tick_ms(), reader.latest(NOW_MS, HOUR_MS)) == (None, {})


def test_a_reader_cannot_write_samples(store, folder):
    with (
        open_history(folder) as history,
        pytest.raises(StoreError, match="readonly"),
        history._database.writing("try") as connection,
    ):
        connection.exec_driver_sql("DELETE FROM hot")


@pytest.mark.parametrize("running", [True, False])
def test_whoever_may_read_the_folder_may_read_the_samples(foreign_folder, running):
    store = opened(foreign_folder)
    power(store, NOW_MS)
    store.save(NOTHING, NOW_MS)
    if not running:
        store.close()
    with unprivileged(foreign_folder), open_history(foreign_folder) as history:
        assert [track.values.tolist() for track in history.tracks([ALL], 0, NOW_MS)] == [[300.0]]
    store.close()


def test_a_wish_and_who_left_it_reach_the_running_daemon(store, folder):
    store.save(Changes(settings={"mode": "auto"}), NOW_MS)
    asked = Audit(at_ms=NOW_MS, who="root", what="pause", facts={})
    leave_wish(folder, {"paused": "true", "mode": None}, audit=asked)
    assert store.settings() == {"mode": "auto"}
    store.save(NOTHING, NOW_MS + SECOND)
    assert store.settings() == {"paused": "true"}
    store.save(Changes(settings={"paused": None}), NOW_MS + 2 * SECOND)
    assert store.settings() == {}
    with open_read_only(folder) as rows:
        assert rows.audit() == [asked]


def test_a_wish_left_while_no_daemon_runs_is_found_at_the_start(store, folder):
    store.close()
    leave_wish(folder, {"paused": "true"})
    with closing(opened(folder)) as again:
        assert again.settings() == {"paused": "true"}


def test_a_wish_that_comes_with_a_tick_is_not_undone_by_it(store, folder):
    store.save(Changes(settings={"mode": "auto", "tick": "0"}), NOW_MS)
    for n in range(1, 20):
        leave_wish(folder, {"paused": str(n)})
        store.save(Changes(settings={"tick": str(n)}), NOW_MS + n * SECOND)
        store.save(NOTHING, NOW_MS + n * SECOND + 1)
        assert store.settings() == {"mode": "auto", "paused": str(n), "tick": str(n)}


def test_two_daemons_cannot_have_one_folder(store, folder):
    with pytest.raises(StoreError, match="another gpuwatch writes") as refused:
        opened(folder)
    assert refused.value.kind == "locked"
    store.close()
    opened(folder).close()


def test_odd_characters_in_a_path_are_taken_as_they_are(tmp_path):
    folder = tmp_path / "a?b#c%20d"
    folder.mkdir()
    with closing(opened(folder)) as store:
        power(store, NOW_MS)
        store.save(NOTHING, NOW_MS)
        assert store.seal(NOW_MS + 3 * HOUR_MS) == 1
    with open_history(folder) as history:
        assert len(history.tracks([ALL], 0, NOW_MS)) == 1
    assert sorted(path.name for path in folder.glob("*.db")) == [METRICS_DB, STATE_DB]


def test_a_missing_folder_is_told_with_path_and_cure(tmp_path):
    with pytest.raises(StoreError, match=r"nowhere.*see that its folder exists"):
        opened(tmp_path / "nowhere")


def test_a_folder_that_may_not_be_written_is_told_at_the_first_start(foreign_folder):
    with unprivileged(foreign_folder), pytest.raises(StoreError, match="this user may write there"):
        opened(foreign_folder)


def test_closing_twice_is_closing_once(store):
    store.close()
    store.close()


# Kills

SAVES_FOR_EVER = """
import sys
from itertools import count
from pathlib import Path
from gpuwatch.config import StoreSettings
from gpuwatch.config.size import Size
from gpuwatch.frames import sealing
from gpuwatch.records import Labels
from gpuwatch.store import Changes, Disk, Store, sealer

MINUTE = 60_000
sealer.run = lambda path, *given: list(sealing.seal(path, *given))
store = Store(3_600_000, Disk(Path(sys.argv[1]), StoreSettings(min_free=Size(0)), "gpu-a", 0))
start = (store.last_tick_ms() or 0) // MINUTE + 1
store.reload(start * MINUTE)
series = [Labels.of("up", source=str(n)) for n in range(50)]
for tick in count(start):
    store.append("own", tick * MINUTE, series, [float(tick)] * 50)
    store.save(Changes(settings={"tick": str(tick)}), tick * MINUTE)
    assert not any(store.faults().values()), store.faults()
    if tick % 20 == 0:
        store.seal(tick * MINUTE)
        store.prune(tick * MINUTE)
    print(tick, flush=True)
"""


@pytest.mark.timeout(300)
def test_twenty_kills_lose_and_double_nothing_that_was_acknowledged(folder):
    """While it saves, seals, deletes and opens."""
    dice = random.Random(20)
    for _ in range(20):
        daemon = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVES_FOR_EVER), str(folder)],
            stdout=subprocess.PIPE,
            text=True,
        )
        with daemon:
            acknowledged = [daemon.stdout.readline() for _ in range(dice.randint(1, 90))]
            daemon.send_signal(signal.SIGKILL)
            acknowledged += daemon.stdout.read().split("\n")[:-1]
        last = int(acknowledged[-1])
        for name in (METRICS_DB, STATE_DB):
            assert plain(folder, "PRAGMA integrity_check", name) == [("ok",)]
        assert int(plain(folder, "SELECT value FROM setting", STATE_DB)[0][0]) in {last, last + 1}
        with open_history(folder) as history:
            tracks = history.tracks([ALL], 0, 1 << 53)
            assert history.damaged == []
        assert len(tracks) == 50
        for track in tracks:
            ticks = [at_ms // MINUTE for at_ms in track.at_ms.tolist()]
            assert ticks == list(range(1, len(ticks) + 1))
            assert ticks[-1] in {last, last + 1}
            assert track.values.tolist() == [float(tick) for tick in ticks]
    assert plain(folder, "SELECT count(*) FROM frame")[0][0] > 3
    counts = plain(folder, "SELECT hour_ms, n FROM hourly WHERE hour_ms > 0")
    assert {n for _, n in counts} == {60}
