"""`gpuwatch db` as people call it, on real files, with and without a daemon that has them."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from contextlib import closing

import pytest
from click.testing import CliRunner

from gpuwatch.cli import main
from gpuwatch.config import StoreSettings
from gpuwatch.config.size import Size
from gpuwatch.frames import sealing
from gpuwatch.frames.rowtext import HOUR_MS
from gpuwatch.promql import Matcher
from gpuwatch.records import STALE, Labels
from gpuwatch.store import METRICS_DB, STATE_DB, Changes, Disk, Store, open_history, open_read_only, sealer

SECOND, MINUTE = 1000, 60_000
NOW_MS = 1_795_252_500_000 // HOUR_MS * HOUR_MS
ALL = Matcher("__name__", "=~", ".*")
POWER = Labels.of("gpu_power_draw_watts", gpu="0")
HEAT = Labels.of("gpu_temperature_celsius", gpu="0")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("GPUWATCH_CONFIG", raising=False)
    found = tmp_path / "state"
    found.mkdir()
    return found


@pytest.fixture
def store(folder, monkeypatch):
    """A daemon's, with four hours of samples, two of them in frames."""
    monkeypatch.setattr(sealer, "run", lambda path, *given: list(sealing.seal(path, *given)))
    with closing(Store(HOUR_MS, Disk(folder, StoreSettings(min_free=Size(0)), "gpu-a", NOW_MS))) as found:
        for at_ms in range(NOW_MS, NOW_MS + 4 * HOUR_MS, MINUTE):
            found.append("nvml", at_ms, [POWER, HEAT], [float(at_ms // SECOND % 977) / 7, 60.0])
        found.save(Changes(settings={"mode": "auto"}), NOW_MS)
        assert found.seal(NOW_MS + 3 * HOUR_MS) == 2
        yield found


@pytest.fixture(params=["beside the daemon", "after it"])
def either_way(request, store):
    if request.param == "after it":
        store.close()


def db(folder, *given):
    return CliRunner().invoke(main, ["db", given[0], "--state-dir", str(folder), *map(str, given[1:])])


def change(folder, statement, *values, name=METRICS_DB):
    with closing(sqlite3.connect(folder / name)) as connection, connection:
        connection.execute(statement, values)


def tracks(folder):
    with open_history(folder) as history:
        return {t.labels: (t.at_ms.tolist(), t.values.tolist()) for t in history.tracks([ALL], 0, 1 << 53)}


# info


@pytest.mark.usefixtures("either_way")
def test_info_says_how_large_the_files_are_and_what_is_in_them(folder):
    shown = db(folder, "info")
    assert shown.exit_code == 0, shown.output
    assert "2 series of 1 targets" in shown.output
    assert "2026-11-21 09:00:00" in shown.output
    found = db(folder, "info", "--json")
    metrics, state = json.loads(found.output)
    assert metrics["path"] == str(folder / METRICS_DB)
    assert (metrics["schema"], state["schema"]) == (1, 3)
    assert metrics["rows"]["count"] == 120
    assert (metrics["rows"]["first_ms"], metrics["rows"]["last_ms"]) == (
        NOW_MS + 2 * HOUR_MS,
        NOW_MS + 4 * HOUR_MS - MINUTE,
    )
    assert (metrics["frames"]["count"], metrics["frames"]["cells"]) == (2, 240)
    assert metrics["frames"]["first_ms"] == NOW_MS
    assert metrics["hourly"] == {
        "count": 4,
        "bytes": 180,
        "first_ms": NOW_MS,
        "last_ms": NOW_MS + HOUR_MS,
    }
    assert metrics["bytes"] >= metrics["free_bytes"] + metrics["frames"]["bytes"]
    assert state["rows"]["setting"] == 1


def test_info_of_an_empty_folder_says_where_there_is_no_database(folder):
    shown = db(folder, "info")
    assert shown.exit_code == 1
    assert f"there is no database {folder / METRICS_DB}" in shown.output
    assert list(folder.iterdir()) == []


def test_info_of_files_without_a_sample(folder):
    Store(HOUR_MS, Disk(folder, StoreSettings(min_free=Size(0)), "gpu-a", NOW_MS)).close()
    shown = db(folder, "info")
    assert shown.exit_code == 0, shown.output
    assert "none" in shown.output
    assert json.loads(db(folder, "info", "--json").output)[0]["frames"]["bytes_per_cell"] is None


# check


@pytest.mark.usefixtures("either_way")
def test_check_finds_nothing_in_whole_files(folder):
    shown = db(folder, "check")
    assert shown.exit_code == 0, shown.output
    assert shown.output.splitlines() == [f"{folder / METRICS_DB}: whole", f"{folder / STATE_DB}: whole"]


def frame_bytes(folder):
    with closing(sqlite3.connect(folder / METRICS_DB)) as connection:
        return connection.execute("SELECT data FROM frame WHERE id = 1").fetchone()[0]


@pytest.mark.parametrize("where", range(0, 100, 7))
def test_check_finds_a_damaged_frame_wherever_it_is_damaged(store, folder, where):
    data = bytearray(frame_bytes(folder))
    data[len(data) * where // 100] ^= 0x41
    change(folder, "UPDATE frame SET data = ? WHERE id = 1", bytes(data))
    shown = db(folder, "check")
    assert shown.exit_code == 1
    assert f"{folder / METRICS_DB}: frame 1: " in shown.output
    assert f"{folder / METRICS_DB}: DAMAGED" in shown.output
    assert f"{folder / STATE_DB}: whole" in shown.output
    assert "left out when it is read" in shown.output


def test_check_finds_damaged_time_stamps(store, folder):
    import numpy as np

    from gpuwatch.frames.frame import Frame, encode

    stamps = NOW_MS + np.random.default_rng(3).integers(0, HOUR_MS, 60)
    data = bytearray(encode(np.sort(stamps), np.full((60, 2), 60.0)))
    whole = Frame(bytes(data))
    body = bytes(whole._stream(2, whole._record(2)))
    data[data.index(body) + len(body) // 2] ^= 1
    change(folder, "UPDATE frame SET data = ? WHERE id = 2", bytes(data))
    shown = db(folder, "check")
    assert shown.exit_code == 1
    assert "frame 2: the time stamps" in shown.output


@pytest.mark.parametrize("text", ["[1,", "no", b"\xff"])
def test_check_finds_a_row_that_cannot_be_read(store, folder, text):
    change(folder, "UPDATE hot SET vals = ? WHERE id = 200", text)
    shown = db(folder, "check")
    assert shown.exit_code == 1
    assert "row 200 of hot: " in shown.output


@pytest.mark.parametrize("name", [METRICS_DB, STATE_DB])
@pytest.mark.parametrize("page", [1, 2, 5])
def test_check_finds_a_damaged_page(store, folder, name, page):
    store.close()
    with (folder / name).open("r+b") as file:
        file.seek(page * 4096)
        file.write(b"\xff" * 4096)
    shown = db(folder, "check")
    assert shown.exit_code == 1
    assert f"{folder / name}: DAMAGED" in shown.output
    other = {METRICS_DB: STATE_DB, STATE_DB: METRICS_DB}[name]
    assert f"{folder / other}: whole" in shown.output


def test_check_of_a_file_that_is_no_database(store, folder):
    store.close()
    (folder / METRICS_DB).write_bytes(b"no database at all" * 1000)
    shown = db(folder, "check")
    assert shown.exit_code == 1
    assert "not a database" in shown.output
    assert f"{folder / STATE_DB}: whole" in shown.output


# compact


def test_compact_writes_the_files_anew_without_their_free_pages(store, folder):
    before = tracks(folder)
    store.close()
    change(folder, "CREATE TABLE junk AS SELECT randomblob(1000000) AS data")
    change(folder, "DROP TABLE junk")
    size = (folder / METRICS_DB).stat().st_size
    shown = db(folder, "compact")
    assert shown.exit_code == 0, shown.output
    assert (folder / METRICS_DB).stat().st_size < size - 900_000
    assert f"{folder / STATE_DB}: " in shown.output
    assert tracks(folder) == before
    assert db(folder, "check").exit_code == 0


def test_compact_refuses_while_a_daemon_has_the_files(store, folder):
    shown = db(folder, "compact")
    assert shown.exit_code == 1
    assert "another gpuwatch writes" in shown.output
    store.append("nvml", NOW_MS + 5 * HOUR_MS, [POWER], [1.0])
    store.save(Changes(), NOW_MS + 5 * HOUR_MS)
    assert store.faults() == {STATE_DB: "", METRICS_DB: ""}


def test_compact_makes_no_database_by_looking_for_one(folder):
    shown = db(folder, "compact")
    assert shown.exit_code == 1
    assert "gpuwatch: " in shown.output
    assert not list(folder.glob("*.db"))


# backup


@pytest.mark.usefixtures("either_way")
def test_a_backup_is_a_copy_as_of_now(folder, tmp_path):
    copies = tmp_path / "deep" / "copies"
    shown = db(folder, "backup", copies)
    assert shown.exit_code == 0, shown.output
    assert sorted(path.name for path in copies.iterdir()) == [METRICS_DB, STATE_DB]
    assert tracks(copies) == tracks(folder)
    with open_read_only(copies) as rows:
        assert rows.settings() == {"mode": "auto"}
    assert db(copies, "check").exit_code == 0


def test_a_daemon_goes_on_from_a_backup(store, folder, tmp_path):
    copies = tmp_path / "copies"
    assert db(folder, "backup", copies).exit_code == 0
    with closing(Store(HOUR_MS, Disk(copies, StoreSettings(min_free=Size(0)), "gpu-a", NOW_MS))) as again:
        assert again.settings() == {"mode": "auto"}
        again.append("nvml", NOW_MS + 5 * HOUR_MS, [POWER], [1.0])
        again.save(Changes(), NOW_MS + 5 * HOUR_MS)
        assert again.faults() == {STATE_DB: "", METRICS_DB: ""}
    assert len(tracks(copies)[POWER][0]) == 241


def test_a_backup_overwrites_no_other(store, folder, tmp_path):
    copies = tmp_path / "copies"
    assert db(folder, "backup", copies).exit_code == 0
    shown = db(folder, "backup", copies)
    assert shown.exit_code == 1
    assert "is there already" in shown.output
    assert shown.output.startswith("gpuwatch: ")


def test_a_backup_that_was_cut_short_is_begun_again(store, folder, tmp_path):
    copies = tmp_path / "copies"
    copies.mkdir()
    (copies / f"{METRICS_DB}.partial").write_bytes(b"half of it")
    assert db(folder, "backup", copies).exit_code == 0
    assert tracks(copies) == tracks(folder)


def test_a_backup_to_where_there_can_be_no_folder_is_told(store, folder, tmp_path):
    (tmp_path / "file").write_text("")
    shown = db(folder, "backup", tmp_path / "file" / "copies")
    assert shown.exit_code == 1
    assert shown.output.startswith("gpuwatch: cannot copy it to")


def test_a_backup_of_nothing_makes_nothing(folder, tmp_path):
    shown = db(folder, "backup", tmp_path / "copies")
    assert shown.exit_code == 1
    assert shown.output.startswith("gpuwatch: ")
    assert not list(tmp_path.rglob("*.db*"))


# export


@pytest.mark.usefixtures("either_way")
def test_an_export_has_what_was_asked_for(folder, tmp_path):
    file = tmp_path / "out.csv"
    shown = db(folder, "export", file, "--match", 'gpu_power_draw_watts{gpu="0"}', "--since", "3h")
    assert shown.exit_code == 0, shown.output
    assert "180 samples" in shown.stderr
    lines = list(csv.DictReader(io.StringIO(file.read_text())))
    assert len(lines) == 180
    assert {line["metric"] for line in lines} == {POWER.metric}
    instants, values = tracks(folder)[POWER]
    assert [int(line["at_ms"]) for line in lines] == instants[-180:]
    assert [float(line["value"]) for line in lines] == values[-180:]


def test_an_export_goes_to_standard_output(store, folder):
    store.append("nvml", NOW_MS + 4 * HOUR_MS, [POWER], [STALE])
    store.save(Changes(), NOW_MS + 4 * HOUR_MS)
    shown = db(folder, "export", "-", "--since", "90s")
    lines = shown.stdout.splitlines()
    assert lines[0] == "time,at_ms,metric,labels,value"
    assert len(lines) == 4
    assert [line for line in lines if line.endswith(",60.0")]
    assert any(line.endswith(",stale") for line in lines)


def test_an_export_as_parquet_goes_by_the_ending_of_the_file(store, folder, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    assert db(folder, "export", tmp_path / "out.parquet").exit_code == 0
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 480


def test_an_export_tells_what_it_had_to_leave_out(store, folder, tmp_path):
    change(folder, "UPDATE frame SET data = x'00' WHERE id = 1")
    shown = db(folder, "export", tmp_path / "out.csv")
    assert shown.exit_code == 0
    assert "left out: frame 1" in shown.stderr
    assert "360 samples" in shown.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--match", "up{"], "--match"),
        (["--match", "rate(up[5m])"], "is no selector"),
        (["--since", "soon"], "--since"),
    ],
)
def test_an_export_of_something_else_is_refused_before_the_file_is_made(store, folder, tmp_path, given, said):
    shown = db(folder, "export", tmp_path / "out.csv", *given)
    assert shown.exit_code == 1
    assert said in shown.output
    assert not (tmp_path / "out.csv").exists()


def test_an_export_of_nothing_says_what_to_do(folder, tmp_path):
    Store(HOUR_MS, Disk(folder, StoreSettings(min_free=Size(0)), "gpu-a", NOW_MS)).close()
    shown = db(folder, "export", tmp_path / "out.csv")
    assert shown.exit_code == 1
    assert "there is no sample yet" in shown.output


@pytest.mark.parametrize("name", ["nowhere/out.csv", "nowhere/out.parquet"])
def test_an_export_to_where_no_file_can_be_is_told(store, folder, tmp_path, name):
    shown = db(folder, "export", tmp_path / name)
    assert shown.exit_code == 1
    assert shown.output.startswith(f"gpuwatch: cannot write {tmp_path / name}")
