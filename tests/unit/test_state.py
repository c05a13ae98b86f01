"""The durable state on real SQLite files: what is written stays, whatever happens to file and process."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager

import pytest
from tests.rows import REFUSED, SERVER, alert, message, remediation, unprivileged

from gpuwatch.errors import StoreError
from gpuwatch.records import (
    AlertState,
    Labels,
    Phase,
    ServerStart,
    StartOutcome,
    Transition,
)
from gpuwatch.store import state as state_module
from gpuwatch.store.ballast import Ballast
from gpuwatch.store.database import Ownership, own
from gpuwatch.store.migrations import STATE_STEPS, migrate
from gpuwatch.store.quarantine import set_aside
from gpuwatch.store.reading import leave_wish, open_read_only
from gpuwatch.store.rows import Rows
from gpuwatch.store.state import open_state
from gpuwatch.store.writing import Audit, Changes, prune_history, write_changes

NOW_MS = 1_795_252_500_000  # 2026-11-21 09:15:00 UTC
HOUR_MS = 3_600_000
MIB = 2**20


def fired(at_ms, **labels):
    return Transition(alert=alert(**labels), was=AlertState.PENDING, now=AlertState.FIRING, at_ms=at_ms)


PAUSED = Audit(at_ms=NOW_MS, who="root", what="pause", facts={"until": "12:00", "why": "ремонт"})
START = ServerStart(
    server="qwen",
    began_at_ms=NOW_MS,
    outcome=StartOutcome.FAILED,
    ended_at_ms=NOW_MS + 30_000,
    configuration="0123456789ab",
    version="0.24.0",
    arguments={"model": "qwen"},
    figures={"Worker_TP0": {"weights_bytes": 8e9, "kv_cache_bytes": 1e11}},
    kv_cache_tokens=800_000,
    max_concurrency=196.3,
    failure="memory_share_not_free",
    facts={"free_bytes": "65766686720"},
    lines=("ValueError: Free memory …",),
)
EVERYTHING = Changes(
    alerts=[alert(gpu="0"), alert("Other", value=float("inf"))],
    transitions=[fired(2000, gpu="0"), Transition(alert=alert(), was=None, now=None, at_ms=2001)],
    servers=[SERVER],
    remediations=[remediation(), remediation("old", phase=Phase.SUCCEEDED)],
    notifications=[message("n1", error="HTTP 500", attempts=2), message("n2", "dingtalk")],
    receivers={"slack": '{"failures":3}'},
    refusals=[REFUSED],
    settings={"paused": "true", "mode": "observe"},
    audit=[PAUSED],
    starts=[START],
)


def opened(folder, **more):
    return open_state(folder, now_ms=NOW_MS, busy_ms=50, **more)


@pytest.fixture
def state(tmp_path):
    found = opened(tmp_path)
    assert (found.notes, found.words_lost) == ((), False)
    with closing(found.state):
        yield found.state


@contextmanager
def mirrored(state=None):
    mirror = own(None, 0)
    migrate(mirror, STATE_STEPS)
    if state is not None:
        state.load(mirror)
    with Rows(mirror) as rows:
        yield rows


@contextmanager
def reading(folder):
    with open_read_only(folder) as rows:
        yield rows


def plain(folder, query, name="state.db"):
    with closing(sqlite3.connect(folder / name)) as connection:
        return connection.execute(query).fetchall()


def count(folder, table):
    return plain(folder, f"SELECT count(*) FROM {table}")[0][0]


# What is written comes back


def test_every_record_comes_back_as_it_was(state, tmp_path):
    state.write([EVERYTHING])
    state.close()
    with reading(tmp_path) as rows:
        assert rows.active_alerts() == list(EVERYTHING.alerts)
        assert isinstance(rows.active_alerts()[0].labels, Labels)
        assert rows.transitions() == list(enumerate(EVERYTHING.transitions, 1))
        assert rows.servers() == {"qwen": SERVER}
        assert rows.live_remediations() == [remediation()]
        assert rows.notifications() == list(EVERYTHING.notifications)[::-1]
        assert rows.receivers() == EVERYTHING.receivers
        assert rows.refusals() == [REFUSED]
        assert rows.settings() == EVERYTHING.settings
        assert rows.audit() == [PAUSED]


def test_what_is_written_twice_is_there_once(state, tmp_path):
    second = Changes(ended=[alert(gpu="0")], transitions=[fired(3000, gpu="0")], settings={"mode": None})
    state.write([EVERYTHING, second])
    before = {
        t: plain(tmp_path, f"SELECT * FROM {t}") for t in ("transition", "audit", "alert", "notification")
    }
    state.write([EVERYTHING, second])
    assert {t: plain(tmp_path, f"SELECT * FROM {t}") for t in before} == before
    assert state.settings() == {"paused": "true"}


def test_the_same_alert_may_change_twice_at_one_instant(state, tmp_path):
    other = [
        fired(1, gpu="0"),
        fired(1, gpu="1"),
        Transition(alert=alert(gpu="0"), was=None, now=None, at_ms=1),
    ]
    state.write([Changes(transitions=other)])
    with reading(tmp_path) as rows:
        assert [t for _, t in rows.transitions()] == other


def test_changes_are_written_all_or_none(state):
    broken = Changes(notifications=[message("n", created_at_ms=None)])
    with pytest.raises(StoreError):
        state.write([Changes(settings={"mode": "auto"}), broken])
    assert state.settings() == {}


def test_characters_that_no_database_takes_are_replaced(state, tmp_path):
    odd = "a\udce4b\0c"
    state.write(
        [
            Changes(
                settings={odd: odd},
                notifications=[message("n", error=odd)],
                audit=[Audit(at_ms=1, who=odd, what=odd, facts={odd: odd})],
            )
        ]
    )
    assert state.settings() == {"a?b\ufffdc": "a?b\ufffdc"}
    with reading(tmp_path) as rows:
        assert rows.notifications()[0].error == "a?b\ufffdc"
        assert rows.audit()[0].who == "a?b\ufffdc"


def test_history_keeps_the_summary_and_leaves_the_long_texts_to_the_rule_file(state, tmp_path):
    texts = {"summary": "S", "summary_zh": "显存", "description": "D" * 500, "runbook": "R" * 500}
    body = {"id": "GW-1", "annotations": texts, "labels": {}, "value": None}
    change = Transition(alert=alert(annotations=texts), was=None, now=AlertState.FIRING, at_ms=1)
    state.write(
        [
            Changes(
                alerts=[change.alert],
                transitions=[change],
                notifications=[
                    message("waits", body=json.dumps(body)),
                    message("sent", body=json.dumps(body), sent_at_ms=5),
                    message("odd", body="no JSON", sent_at_ms=5),
                ],
            )
        ]
    )
    short = {"summary": "S"}
    with reading(tmp_path) as rows:
        assert rows.transitions()[0][1].alert.annotations == short
        assert rows.active_alerts()[0].annotations == texts
        odd, sent, waits = rows.notifications()
    assert json.loads(waits.body) == body
    assert json.loads(sent.body) == {"id": "GW-1", "annotations": short}
    assert odd.body == "no JSON"


def test_a_person_reads_the_views_with_any_sqlite(state, tmp_path):
    body = json.dumps({"alert": "ServerDown", "state": "firing", "annotations": {"summary": "qwen is down"}})
    state.write([EVERYTHING, Changes(notifications=[message("n3", body=body, sent_at_ms=3000)])])
    state.close()
    assert plain(tmp_path, "SELECT rule, state, active_at, fired_at, summary FROM v_alerts") == [
        ("GpuMemoryHigh", "firing", "1970-01-01 00:00:01 UTC", "1970-01-01 00:00:02 UTC", "显存 97 %"),
        ("Other", "firing", "1970-01-01 00:00:01 UTC", "1970-01-01 00:00:02 UTC", "显存 97 %"),
    ]
    assert plain(
        tmp_path, "SELECT id, alert, phase, created_at, since FROM v_remediations WHERE id = 'r1'"
    ) == [("r1", "ServerDown", "applying", "1970-01-01 00:00:01 UTC", "1970-01-01 00:00:01 UTC")]
    assert plain(
        tmp_path, "SELECT at, rule, was, now, value, labels, summary FROM v_history WHERE id = 1"
    ) == [("1970-01-01 00:00:02 UTC", "GpuMemoryHigh", "pending", "firing", 0.97, '{"gpu":"0"}', "显存 97 %")]
    assert plain(
        tmp_path, "SELECT alert, state, summary, delivery, sent_at FROM v_notifications WHERE seq = 3"
    ) == [("ServerDown", "firing", "qwen is down", "sent", "1970-01-01 00:00:03 UTC")]
    assert plain(tmp_path, "SELECT at, who, what, facts FROM v_audit") == [
        ("2026-11-21 09:15:00 UTC", "root", "pause", '{"until":"12:00","why":"ремонт"}')
    ]


def test_a_person_reads_how_servers_started(state, tmp_path):
    state.write([EVERYTHING])
    assert plain(tmp_path, "SELECT server, began_at, outcome, healthy_at, ended_at FROM v_starts") == [
        ("qwen", "2026-11-21 09:15:00 UTC", "failed", None, "2026-11-21 09:15:30 UTC")
    ]
    assert plain(
        tmp_path, "SELECT failure, facts, version, configuration, kv_cache_tokens FROM v_starts"
    ) == [(START.failure, '{"free_bytes":"65766686720"}', "0.24.0", "0123456789ab", 800_000)]


def test_starts_are_found_by_server_the_newest_first_and_good_ones_by_configuration(state, tmp_path):
    good = dataclasses.replace(START, outcome=StartOutcome.HEALTHY, failure="", healthy_at_ms=NOW_MS)
    older, oldest, other = (
        dataclasses.replace(good, began_at_ms=NOW_MS - 1),
        dataclasses.replace(good, began_at_ms=NOW_MS - 2, configuration="ba9876543210"),
        dataclasses.replace(good, server="other"),
    )
    state.write([Changes(starts=[oldest, older]), Changes(starts=[START, other])])
    with reading(tmp_path) as rows, mirrored(state) as mirror:
        for each in (rows, mirror):
            assert each.starts("qwen") == [START, older, oldest]
            assert each.starts(limit=2) == [other, START]
            assert each.last_good_start("qwen") == older
            assert each.last_good_start("qwen", "ba9876543210") == oldest
            assert each.last_good_start("nobody") is None


def test_a_start_that_goes_on_is_one_row(state, tmp_path):
    state.write([Changes(starts=[dataclasses.replace(START, outcome=StartOutcome.STARTING)]), EVERYTHING])
    with reading(tmp_path) as rows:
        assert rows.starts() == [START]


def test_the_newest_starts_are_kept_and_the_last_good_one_of_each_configuration(state, tmp_path):
    def a_start(age, server="qwen", configuration="b"):
        outcome = StartOutcome.FAILED if age < 100 else StartOutcome.HEALTHY
        began_at_ms = NOW_MS - age
        return dataclasses.replace(
            START, server=server, began_at_ms=began_at_ms, outcome=outcome, configuration=configuration
        )

    failed = [a_start(age) for age in range(99)]
    good = [a_start(100), a_start(101), a_start(102, configuration="a"), a_start(103, configuration="")]
    many = [a_start(200 + n, "other", str(n)) for n in range(120)]
    state.write([Changes(starts=[*failed, *good, *many])])
    state.prune(0)
    with reading(tmp_path) as rows:
        kept = [NOW_MS - start.began_at_ms for start in rows.starts("qwen", 1000)]
        assert kept == [*range(50), 100, 102, 103]
        assert len(rows.starts("other", 1000)) == 50


def test_a_state_of_before_starts_were_kept_goes_on_with_all_it_had(tmp_path):
    path = tmp_path / "state.db"
    with closing(own(path, 50)) as database:
        migrate(database, STATE_STEPS[:1])
        with database.writing("as it was") as connection:
            write_changes(connection, dataclasses.replace(EVERYTHING, starts=()))
    found = opened(tmp_path)
    with closing(found.state):
        assert (found.notes, found.words_lost) == ((), False)
        found.state.write([Changes(starts=[START])])
    with reading(tmp_path) as rows:
        assert rows.active_alerts() == list(EVERYTHING.alerts)
        assert rows.starts() == [START]


def test_a_damaged_state_of_before_starts_were_kept_loses_none(tmp_path):
    path = tmp_path / "state.db"
    with closing(own(path, 50)) as database:
        migrate(database, STATE_STEPS[:1])
        with database.writing("as it was") as connection:
            write_changes(connection, dataclasses.replace(EVERYTHING, starts=()))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE server SET record = '{'")
        connection.execute("DROP VIEW v_audit")
        connection.execute("DROP TABLE audit")
        connection.execute("DELETE FROM migration")
    found = opened(tmp_path)
    with closing(found.state):
        assert "Not all could be saved of: server" in found.notes[0]
        assert "start" not in found.notes[0].partition("saved of")[2]


def test_retention_keeps_unsent_messages_and_live_remediations(state, tmp_path):
    state.write(
        [
            EVERYTHING,
            Changes(
                notifications=[message("sent", sent_at_ms=1500)], audit=[Audit(at_ms=1, who="w", what="x")]
            ),
        ]
    )
    assert state.prune(1000) == 1
    assert state.prune(5000) == 4
    with reading(tmp_path) as rows:
        assert rows.transitions() == []
        assert [r.plan.id for r in rows.remediations()] == ["r1"]
        assert [n.id for n in rows.notifications()] == ["n2", "n1"]
        assert rows.audit() == [PAUSED]


def test_an_event_takes_less_than_four_hundred_and_fifty_bytes(state, tmp_path):
    texts = {
        "summary": "GPU 0 has 1.21% of its memory free",
        "summary_zh": "GPU 0 的空闲显存只剩 1.21%",
        "description": "D" * 150,
        "description_zh": "述" * 70,
        "runbook": "R" * 200,
        "runbook_zh": "书" * 70,
    }
    for n in range(2000):
        one = alert(
            "GPUMemoryHeadroomLow", annotations=texts, gpu="0", uuid="GPU-5d3a2c1e-8f00", severity="critical"
        )
        at_ms = NOW_MS + n * 10_000
        body = {
            "id": "GW-12AB9F",
            "kind": "alert",
            "state": "firing",
            "severity": "critical",
            "host": "gpu-node-17",
            "alert": one.rule,
            "at_ms": at_ms,
            "since_ms": at_ms,
            "server": "",
            "labels": dict(one.labels),
            "value": 0.0121,
            "annotations": texts,
            "decision": None,
            "outcome_code": "",
            "outcome_facts": {},
        }
        state.write(
            [
                Changes(
                    transitions=[
                        Transition(alert=one, was=AlertState.PENDING, now=AlertState.FIRING, at_ms=at_ms)
                    ],
                    notifications=[
                        message(
                            f"GW-12AB9F/alert/firing/{at_ms}/slack",
                            created_at_ms=at_ms,
                            body=json.dumps(body, ensure_ascii=False, separators=(",", ":")),
                            sent_at_ms=at_ms + 500,
                        )
                    ],
                )
            ]
        )
    state.close()
    assert (tmp_path / "state.db").stat().st_size / 4000 < 450


# The mirror


def test_a_mirror_has_what_the_daemon_needs_in_its_order(state):
    state.write([EVERYTHING])
    with mirrored(state) as rows:
        assert rows.active_alerts() == list(EVERYTHING.alerts)
        assert rows.transitions() == []
        assert rows.servers() == {"qwen": SERVER}
        assert {r.plan.id for r in rows.remediations()} == {"r1", "old"}
        assert rows.unsent("slack") == [EVERYTHING.notifications[0]]
        assert rows.receivers() == EVERYTHING.receivers
        assert rows.refusals() == [REFUSED]
        assert rows.settings() == EVERYTHING.settings


def test_a_mirror_has_live_remediations_however_old_and_the_newest_thousand_others(state):
    over = [remediation(f"r{n}", phase=Phase.FAILED, created_at_ms=n) for n in range(100, 1200)]
    state.write([Changes(remediations=[remediation("live", created_at_ms=1), *over])])
    with mirrored(state) as rows:
        found = [r.plan.id for r in rows.remediations(limit=2000)]
    assert found == [f"r{n}" for n in range(1199, 199, -1)] + ["live"]


def test_a_mirror_has_unsent_messages_and_those_of_the_last_hour_of_sending(state):
    state.write(
        [
            Changes(
                notifications=[
                    message("old", sent_at_ms=NOW_MS - HOUR_MS - 1),
                    message("waits", created_at_ms=1),
                    message("given up", gave_up_at_ms=NOW_MS),
                    message("last hour", sent_at_ms=NOW_MS - HOUR_MS),
                    message("last", sent_at_ms=NOW_MS),
                ]
            )
        ]
    )
    with mirrored(state) as rows:
        assert [n.id for n in rows.notifications()] == ["last", "last hour", "waits"]
        assert rows.sent_since("slack", 0) == [NOW_MS - HOUR_MS, NOW_MS]


def test_a_mirror_writes_on_where_the_numbers_ended(state):
    state.write([Changes(notifications=[message("a"), message("b")])])
    with mirrored(state) as rows, rows._database.writing("go on") as connection:
        write_changes(connection, Changes(notifications=[message("0")], refusals=[REFUSED]))
        found = connection.exec_driver_sql("SELECT id FROM notification ORDER BY seq").scalars().all()
    assert found == ["a", "b", "0"]


def test_a_refill_writes_all_that_the_mirror_has(state, tmp_path):
    state.write([Changes(alerts=[alert("Over")], refusals=[REFUSED, REFUSED], settings={"mine": "1"})])
    with mirrored() as rows:
        with rows._database.writing("fill") as connection:
            write_changes(connection, EVERYTHING)
        state.refill(rows._database)
        state.refill(rows._database)
    with reading(tmp_path) as rows:
        assert rows.active_alerts() == list(EVERYTHING.alerts)
        assert [t for _, t in rows.transitions()] == list(EVERYTHING.transitions)
        assert rows.notifications() == list(EVERYTHING.notifications)[::-1]
        assert rows.refusals() == [REFUSED]
        assert rows.settings() == {**EVERYTHING.settings, "mine": "1"}
        assert rows.audit() == [PAUSED]


# Other processes


def test_a_wish_and_who_left_it_reach_the_daemon(state, tmp_path):
    state.write([Changes(settings={"mode": "auto"})])
    leave_wish(tmp_path, {"paused": "true", "mode": None}, audit=PAUSED)
    assert state.settings() == {"paused": "true"}
    with reading(tmp_path) as rows:
        assert rows.audit() == [PAUSED]


def test_a_wish_can_be_left_while_no_daemon_runs(state, tmp_path):
    state.close()
    leave_wish(tmp_path, {"paused": "true"})
    with closing(opened(tmp_path).state) as again:
        assert again.settings() == {"paused": "true"}


@pytest.mark.parametrize("opens", [open_read_only, lambda folder: leave_wish(folder, {})])
def test_no_database_is_made_by_looking_for_one(tmp_path, opens):
    with pytest.raises(StoreError, match="there is no database"):
        opens(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_cannot_write(state, tmp_path):
    with (
        reading(tmp_path) as rows,
        pytest.raises(StoreError, match="readonly") as failed,
        rows._database.writing("try") as connection,
    ):
        connection.exec_driver_sql("DELETE FROM setting")
    assert failed.value.kind == "read_only"


def test_two_daemons_cannot_own_one_folder(tmp_path):
    with closing(Ownership(tmp_path)) as held:
        with pytest.raises(StoreError, match="another gpuwatch writes") as refused:
            Ownership(tmp_path)
        assert refused.value.kind == "locked"
        held.close()
        Ownership(tmp_path).close()


def test_a_program_that_holds_the_database_is_told_and_outlived(state, tmp_path):
    with closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="end the other program") as failed:
            state.write([EVERYTHING])
        assert failed.value.kind == "locked"
        assert state.settings() == {}, "reading goes on"
    state.write([EVERYTHING])
    assert state.settings() == EVERYTHING.settings


@pytest.mark.parametrize("running", [True, False])
def test_a_reader_without_write_permission_reads_beside_the_daemon_and_after_it(foreign_folder, running):
    with closing(opened(foreign_folder).state) as state:
        state.write([EVERYTHING])
        if not running:
            state.close()
        with unprivileged(foreign_folder), reading(foreign_folder) as rows:
            assert rows.settings() == EVERYTHING.settings


def test_a_wish_without_write_permission_says_whose_permission_is_lacking(foreign_folder):
    opened(foreign_folder).state.close()
    (foreign_folder / "state.db").chmod(0o444)
    with unprivileged(foreign_folder), pytest.raises(StoreError, match="let the user") as failed:
        leave_wish(foreign_folder, {"paused": "true"})
    assert failed.value.kind == "read_only"
    assert "state.db" in str(failed.value)


def test_a_folder_that_may_not_be_written_is_told_and_no_damage(foreign_folder):
    opened(foreign_folder).state.close()
    (foreign_folder / "state.db").chmod(0o444)
    with unprivileged(foreign_folder):
        with pytest.raises(StoreError, match="this user may write there"):
            Ownership(foreign_folder)
        with pytest.raises(StoreError) as failed:
            opened(foreign_folder)
    assert failed.value.kind in {"read_only", "gone"}
    assert [path.name for path in foreign_folder.iterdir()] == ["state.db"]


# Damage


def damaged(folder, edit):
    """Apply `edit` to the bytes of state.db of a daemon that has ended."""
    path = folder / "state.db"
    data = bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)


def filled(folder, changes=(EVERYTHING,)):
    with closing(opened(folder).state) as state:
        state.write(changes)


def aside(folder):
    return sorted(path.name for path in folder.glob("*damaged*"))


def long_history():
    return Changes(transitions=[fired(n, gpu=str(n)) for n in range(2000)])


def page_of(folder, table):
    return plain(folder, f"SELECT rootpage FROM sqlite_master WHERE name = '{table}'")[0][0] - 1


def overwrite(page, with_=b"\xff"):
    def edit(data):
        data[page * 4096 : (page + 1) * 4096] = (with_ * 4096)[:4096]

    return edit


def test_a_damaged_table_costs_its_rows_alone(tmp_path):
    filled(tmp_path)
    damaged(tmp_path, overwrite(page_of(tmp_path, "server")))
    found = opened(tmp_path)
    with closing(found.state) as state, mirrored(state) as rows:
        assert rows.servers() == {}
        assert rows.active_alerts() == list(EVERYTHING.alerts)
        assert rows.unsent("slack") == [EVERYTHING.notifications[0]]
        assert rows.settings() == EVERYTHING.settings
    assert found.words_lost is False
    (note,) = found.notes
    assert "server" in note
    assert "state.db.damaged-20261121T091500Z" in note
    assert aside(tmp_path) == ["state.db.damaged-20261121T091500Z"]
    with reading(tmp_path) as rows:
        assert rows.transitions() == list(enumerate(EVERYTHING.transitions, 1))
        assert rows.audit() == [PAUSED]


@pytest.mark.parametrize(
    "ruin",
    [
        pytest.param(lambda folder: overwrite(page_of(folder, "setting")), id="settings"),
        pytest.param(lambda folder: overwrite(0), id="first page"),
        pytest.param(lambda folder: lambda data: data.clear(), id="empty file"),
        pytest.param(lambda folder: lambda data: data.__delitem__(slice(8192, None)), id="cut off"),
        pytest.param(
            lambda folder: lambda data: data.__setitem__(slice(None), b"no database " * 900), id="text"
        ),
    ],
)
def test_settings_that_cannot_be_read_are_said_to_be_lost(tmp_path, ruin):
    filled(tmp_path)
    damaged(tmp_path, ruin(tmp_path))
    found = opened(tmp_path)
    with closing(found.state) as state:
        state.write([EVERYTHING])
        assert state.settings() == EVERYTHING.settings
    assert found.words_lost
    assert "people's settings may be lost" in found.notes[0]
    assert len(aside(tmp_path)) == 1


def test_beyond_a_damaged_page_history_is_read_on(tmp_path):
    filled(tmp_path, [long_history()])
    path = tmp_path / "state.db"
    pages = [
        n
        for n in range(path.stat().st_size // 4096)
        if b'"gpu":"1000"' in path.read_bytes()[n * 4096 : n * 4096 + 4096]
    ]
    for page in pages:
        damaged(tmp_path, overwrite(page))
    opened(tmp_path).state.close()
    with reading(tmp_path) as rows:
        found = {number: t.at_ms for number, t in rows.transitions(limit=5000)}
    assert len(found) > 1900
    assert {1, 2000} <= found.keys()
    assert all(number == at_ms + 1 for number, at_ms in found.items()), "numbers stay"


def test_a_record_that_cannot_be_read_costs_only_itself(tmp_path):
    filled(tmp_path)
    with closing(sqlite3.connect(tmp_path / "state.db")) as connection, connection:
        connection.execute(
            "UPDATE alert SET record = replace(record, 'firing', 'asleep') WHERE rule = 'Other'"
        )
    found = opened(tmp_path)
    with closing(found.state) as state, mirrored(state) as rows:
        assert [a.rule for a in rows.active_alerts()] == ["GpuMemoryHigh"]
        assert rows.settings() == EVERYTHING.settings
    assert "Not all could be saved of: alert" in found.notes[0]
    assert not found.words_lost


def test_only_the_newest_damaged_file_is_kept(tmp_path):
    for second in range(3):
        filled(tmp_path)
        damaged(tmp_path, overwrite(0))
        open_state(tmp_path, now_ms=NOW_MS + second * 1000).state.close()
    assert aside(tmp_path) == ["state.db.damaged-20261121T091502Z"]


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_written_over_the_file_the_next_start_goes_well(tmp_path, seed):
    dice = random.Random(seed)
    filled(tmp_path, [EVERYTHING, long_history()])

    def edit(data):
        for _ in range(dice.randint(1, 12)):
            length = dice.choice([1, 8, 100, 4096, 4096, 20_000])
            start = dice.randrange(len(data)) // 4096 * 4096 if length >= 4096 else dice.randrange(len(data))
            end = min(start + length, len(data))
            data[start:end] = dice.randbytes(end - start)

    damaged(tmp_path, edit)
    found = opened(tmp_path)
    assert bool(found.notes) == bool(aside(tmp_path))
    with closing(found.state) as state, mirrored(state) as rows:
        rows.active_alerts(), rows.servers(), rows.remediations(), rows.refusals(), rows.notifications()
        state.write([EVERYTHING])
        state.refill(rows._database)
        assert EVERYTHING.settings.items() <= state.settings().items()
    assert opened(tmp_path).notes == (), "it is whole again"


def test_a_file_that_is_deleted_under_the_daemon_is_noticed(state, tmp_path):
    (tmp_path / "state.db").unlink()
    with pytest.raises(StoreError, match="deleted or replaced") as failed:
        state.write([EVERYTHING])
    assert failed.value.kind == "corrupt"
    state.close()
    with closing(opened(tmp_path).state) as again:
        again.write([EVERYTHING])
        assert again.settings() == EVERYTHING.settings


def test_what_a_wal_still_holds_is_saved_too(tmp_path):
    with closing(opened(tmp_path).state) as state:
        state.write([EVERYTHING])
        copy = tmp_path / "copy"
        copy.mkdir()
        for name in ("state.db", "state.db-wal"):
            shutil.copy(tmp_path / name, copy / name)
    page = page_of(copy, "server")
    damaged(copy, overwrite(page))
    with closing(opened(copy).state) as again:
        assert again.settings() == EVERYTHING.settings


def test_setting_aside_takes_the_wal_along_and_leaves_nothing_behind(tmp_path):
    for name in (
        "m.db",
        "m.db-wal",
        "m.db-shm",
        "m.db.damaged-2020",
        "m.db.damaged-2020-wal",
        "n.db.damaged-1",
    ):
        (tmp_path / name).write_text(name)
    moved = set_aside(tmp_path / "m.db", NOW_MS)
    assert moved == tmp_path / "m.db.damaged-20261121T091500Z"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        moved.name,
        f"{moved.name}-wal",
        "n.db.damaged-1",
    ]
    assert set_aside(tmp_path / "m.db", NOW_MS) is None


def test_a_file_that_cannot_be_set_aside_is_told(foreign_folder):
    path = foreign_folder / "m.db"
    path.write_text("x")
    with (
        unprivileged(foreign_folder),
        pytest.raises(StoreError, match="cannot set a damaged file aside") as failed,
    ):
        set_aside(path, NOW_MS)
    assert failed.value.kind == "read_only"


def test_a_full_disk_is_no_damage(tmp_path):
    filled(tmp_path, [long_history()])
    with closing(opened(tmp_path).state) as state:
        with state._database.reading("limit it") as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 1")
        with pytest.raises(StoreError, match=r"full.*free space") as failed:
            state.write([Changes(transitions=[fired(n, gpu="x") for n in range(5000)])])
        assert failed.value.kind == "full"
        with state._database.reading("lift it") as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
        state.write([EVERYTHING])
        assert state.settings() == EVERYTHING.settings


def test_an_error_never_shows_what_was_to_be_written(state):
    with state._database.writing("break it") as connection:
        connection.exec_driver_sql("DROP TABLE notification")
    with pytest.raises(StoreError) as failed:
        state.write([Changes(notifications=[message("n", error="hunter2")])])
    assert "hunter2" not in f"{failed.value} {failed.value.__cause__}"


# gpuwatch.db of 0.1

OLD_SCHEMA = """
CREATE TABLE migration (version INTEGER PRIMARY KEY, name TEXT NOT NULL);
INSERT INTO migration VALUES (1, 'first_schema');
CREATE TABLE series (id INTEGER PRIMARY KEY, labels TEXT NOT NULL UNIQUE, metric TEXT NOT NULL);
CREATE TABLE sample (at_ms INTEGER NOT NULL, series_id INTEGER NOT NULL, value REAL,
  PRIMARY KEY (at_ms, series_id)) WITHOUT ROWID;
CREATE TABLE tick (id INTEGER PRIMARY KEY CHECK (id = 1), at_ms INTEGER NOT NULL);
CREATE TABLE alert (rule TEXT NOT NULL, labels TEXT NOT NULL, state TEXT NOT NULL,
  active_at_ms INTEGER NOT NULL, record TEXT NOT NULL, PRIMARY KEY (rule, labels));
CREATE TABLE transition (id INTEGER PRIMARY KEY AUTOINCREMENT, at_ms INTEGER NOT NULL, rule TEXT NOT NULL,
  was TEXT, now TEXT, record TEXT NOT NULL);
CREATE TABLE server (name TEXT PRIMARY KEY, phase TEXT NOT NULL, record TEXT NOT NULL);
CREATE TABLE remediation (id TEXT PRIMARY KEY, server TEXT NOT NULL, phase TEXT NOT NULL,
  created_at_ms INTEGER NOT NULL, record TEXT NOT NULL);
CREATE TABLE notification (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
  receiver TEXT NOT NULL, created_at_ms INTEGER NOT NULL, sent_at_ms INTEGER, gave_up_at_ms INTEGER,
  record TEXT NOT NULL);
CREATE TABLE receiver (name TEXT PRIMARY KEY, record TEXT NOT NULL);
CREATE TABLE refusal (id INTEGER PRIMARY KEY, server TEXT NOT NULL, alert TEXT NOT NULL, code TEXT NOT NULL,
  record TEXT NOT NULL);
CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
OLD_ALERT = (
    '{"rule":"GpuMemoryHigh","labels":{"alertname":"GpuMemoryHigh","gpu":"0"},'
    '"annotations":{"summary":"显存 97 %"},"state":"firing","value":0.97,"active_at_ms":1000,'
    '"fired_at_ms":2000,"resolved_at_ms":null,"keep_firing_since_ms":null}'
)
OLD_MESSAGE = (
    '{"id":"n1","receiver":"slack","body":"{\\"text\\":\\"…\\"}","created_at_ms":1000,"next_attempt_at_ms":0,'
    '"attempts":2,"sent_at_ms":null,"gave_up_at_ms":null,"error":"HTTP 500"}'
)


def old_database(folder, *, wal=False):
    """As gpuwatch 0.1 left it; with `wal`, as a kill left it."""
    path = folder / "gpuwatch.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(OLD_SCHEMA)
        connection.execute("PRAGMA journal_mode = WAL")
        with connection:
            labels = '{"alertname":"GpuMemoryHigh","gpu":"0"}'
            connection.execute(
                "INSERT INTO alert VALUES ('GpuMemoryHigh', ?, 'firing', 1000, ?)", (labels, OLD_ALERT)
            )
            change = f'{{"alert":{OLD_ALERT},"was":"pending","now":"firing","at_ms":2000}}'
            connection.execute(
                "INSERT INTO transition VALUES (41, 2000, 'GpuMemoryHigh', 'pending', 'firing', ?)", (change,)
            )
            connection.execute(
                "INSERT INTO notification VALUES (7, 'n1', 'slack', 1000, NULL, NULL, ?)", (OLD_MESSAGE,)
            )
            connection.execute("INSERT INTO setting VALUES ('paused', 'true')")
            connection.executemany("INSERT INTO sample VALUES (?, 1, 1.0)", [(n,) for n in range(10_000)])
        if wal:
            for end in ("", "-wal"):
                shutil.copy(f"{path}{end}", folder / f"copy{end}")
    if wal:
        for end in ("", "-wal"):
            (folder / f"copy{end}").rename(f"{path}{end}")
    (folder / "gpuwatch.db.lock").touch()


def carried_over(found):
    with closing(found.state) as state, mirrored(state) as rows:
        assert rows.active_alerts() == [alert(gpu="0")]
        assert rows.unsent("slack") == [EVERYTHING.notifications[0]]
        assert rows.settings() == {"paused": "true"}


@pytest.mark.parametrize("wal", [False, True])
def test_state_is_carried_over_from_the_one_file_of_0_1(tmp_path, wal):
    old_database(tmp_path, wal=wal)
    found = opened(tmp_path)
    carried_over(found)
    assert not found.words_lost
    assert found.notes == (
        f"state was carried over from {tmp_path}/gpuwatch.db of gpuwatch 0.1, its samples were not",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["state.db"]
    with reading(tmp_path) as rows:
        assert rows.transitions() == [(41, fired(2000, gpu="0"))]
    assert opened(tmp_path).notes == ()


def test_an_old_daemon_that_still_runs_keeps_its_file(tmp_path):
    old_database(tmp_path)
    with (
        closing(Ownership(tmp_path, "gpuwatch.db.lock")),
        pytest.raises(StoreError, match="another gpuwatch"),
    ):
        opened(tmp_path)
    assert (tmp_path / "gpuwatch.db").exists()
    carried_over(opened(tmp_path))


def test_a_damaged_file_of_0_1_gives_what_it_can_and_is_kept(tmp_path):
    old_database(tmp_path)
    path = tmp_path / "gpuwatch.db"
    page = plain(tmp_path, "SELECT rootpage FROM sqlite_master WHERE name = 'setting'", path.name)[0][0]
    data = bytearray(path.read_bytes())
    data[(page - 1) * 4096 : page * 4096] = b"\xff" * 4096
    path.write_bytes(data)
    found = opened(tmp_path)
    with closing(found.state) as state, mirrored(state) as rows:
        assert rows.active_alerts() == [alert(gpu="0")]
        assert rows.settings() == {}
    assert found.words_lost
    assert aside(tmp_path) == ["gpuwatch.db.damaged-20261121T091500Z"]


def test_a_full_disk_leaves_the_file_of_0_1_for_the_next_try(tmp_path, monkeypatch):
    old_database(tmp_path)

    def full(*args):
        raise StoreError("full", kind="full")

    with monkeypatch.context() as patch:
        patch.setattr(state_module, "put", full)
        with pytest.raises(StoreError, match="full"):
            opened(tmp_path)
    assert not (tmp_path / "state.db.new").exists(), "its room is given back"
    carried_over(opened(tmp_path))


OPENS_AND_DIES = """
import os, sys
from pathlib import Path
from gpuwatch.store.state import open_state

left = int(sys.argv[2])
def dies(event, args):
    global left
    if event in {"os.rename", "os.remove", "sqlite3.connect", "shutil.move"}:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
sys.addaudithook(dies)
open_state(Path(sys.argv[1]), now_ms=1_795_252_500_000).state.close()
"""


def killed_at_every_step(folder, make):
    """Runs an opening that is killed at its first file operation, then at its second, until one ends well."""
    for step in range(40):
        again = folder / str(step)
        again.mkdir()
        make(again)
        ended = subprocess.run([sys.executable, "-c", OPENS_AND_DIES, str(again), str(step)], check=False)
        yield again
        if ended.returncode == 0:
            assert step > 3
            return
        assert ended.returncode == -signal.SIGKILL
    pytest.fail("it never ended")


def test_a_kill_at_any_point_of_carrying_over_loses_nothing(tmp_path):
    for folder in killed_at_every_step(tmp_path, old_database):
        found = opened(folder)
        carried_over(found)
        assert not found.words_lost
        assert opened(folder).words_lost is False


def test_a_kill_at_any_point_of_mending_loses_no_more(tmp_path):
    def damage(folder):
        filled(folder)
        damaged(folder, overwrite(page_of(folder, "server")))

    for folder in killed_at_every_step(tmp_path, damage):
        with closing(opened(folder).state) as state, mirrored(state) as rows:
            assert rows.active_alerts() == list(EVERYTHING.alerts)
            assert rows.settings() == EVERYTHING.settings
        assert len(aside(folder)) == 1


def test_a_kill_at_the_very_first_start_holds_nothing_back(tmp_path):
    for folder in killed_at_every_step(tmp_path, lambda _: None):
        assert (opened(folder).notes, opened(folder).words_lost) == ((), False)


# The ballast


def test_the_ballast_takes_real_room_and_gives_it_back(tmp_path):
    ballast = Ballast(tmp_path, 2 * MIB)
    assert ballast.drop() is False
    assert ballast.hold(0)
    assert (tmp_path / "ballast").stat().st_blocks * 512 >= 2 * MIB
    assert ballast.hold(2**62), "it is there already"
    assert ballast.drop()
    assert list(tmp_path.iterdir()) == []


def test_the_ballast_is_not_taken_from_others(tmp_path):
    assert Ballast(tmp_path).hold(2**62) is False
    assert list(tmp_path.iterdir()) == []


def test_a_ballast_that_was_cut_short_is_made_anew(tmp_path):
    (tmp_path / "ballast").write_bytes(b"x")
    assert Ballast(tmp_path, MIB).hold(0)
    assert (tmp_path / "ballast").stat().st_size == MIB


def test_a_filesystem_without_fallocate_gets_zeros(tmp_path, monkeypatch):
    def refuses(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuses)
    assert Ballast(tmp_path, MIB + 5).hold(0)
    assert (tmp_path / "ballast").read_bytes() == bytes(MIB + 5)


def test_no_folder_is_no_ballast(tmp_path):
    assert Ballast(tmp_path / "nowhere").hold(0) is False


# Kills

WRITES_FOR_EVER = """
import sys
from itertools import count
from pathlib import Path
from gpuwatch.records import Alert, AlertState, Labels, Transition
from gpuwatch.store.state import open_state
from gpuwatch.store.writing import Changes

state = open_state(Path(sys.argv[1]), now_ms=0).state
for tick in count(int(state.settings().get("tick", "0")) + 1):
    firing = AlertState.FIRING
    alert = Alert(rule="A", labels=Labels(), annotations={}, state=firing, value=1.0, active_at_ms=tick)
    change = Transition(alert=alert, was=None, now=firing, at_ms=tick)
    state.write([Changes(transitions=[change], settings={"tick": str(tick)})])
    if tick % 50 == 0:
        state.prune(tick - 200)
    print(tick, flush=True)
"""


def test_twenty_kills_lose_no_acknowledged_write(tmp_path):
    dice = random.Random(20)
    for _ in range(20):
        daemon = subprocess.Popen(
            [sys.executable, "-c", WRITES_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        with daemon:
            acknowledged = [daemon.stdout.readline() for _ in range(dice.randint(1, 60))]
            daemon.send_signal(signal.SIGKILL)
            acknowledged += daemon.stdout.read().split("\n")[:-1]
        last = int(acknowledged[-1])
        assert plain(tmp_path, "PRAGMA integrity_check") == [("ok",)]
        newest = int(plain(tmp_path, "SELECT value FROM setting")[0][0])
        assert newest in {last, last + 1}
        ticks = [at_ms for (at_ms,) in plain(tmp_path, "SELECT at_ms FROM transition ORDER BY at_ms")]
        assert ticks == list(range(ticks[0], newest + 1))


def test_without_a_url_no_driver_of_a_server_is_loaded():
    names = "[m for m in sys.modules if 'psycopg' in m or 'postgresql' in m]"
    code = f"import sys, gpuwatch.store.state, gpuwatch.store.reading; print({names})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


def test_history_of_the_mirror_is_pruned_alike():
    with mirrored() as rows, rows._database.writing("prune") as connection:
        write_changes(connection, EVERYTHING)
        assert prune_history(connection, 10**15) == 4
