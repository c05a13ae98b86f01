"""`gpuwatch query` as people call it, on real files, with and without a daemon that writes them."""

from __future__ import annotations

import csv
import io
import json
import math
import sqlite3
import time
from contextlib import closing

import pytest
from click.testing import CliRunner

from gpuwatch.cli import answers, main
from gpuwatch.cli.query import instant_ms, pointed
from gpuwatch.config import StoreSettings
from gpuwatch.config.size import Size
from gpuwatch.errors import ConfigError, QueryError, StoreError
from gpuwatch.frames import sealing
from gpuwatch.frames.rowtext import HOUR_MS
from gpuwatch.promql import Matcher
from gpuwatch.records import STALE, Labels
from gpuwatch.store import METRICS_DB, Changes, Disk, Store, database, open_history, sealer
from gpuwatch.store.history import History

SECOND, MINUTE = 1000, 60_000
NINE = 1_726_909_200_000  # 2024-09-21 09:00 UTC
LAST = NINE + 4 * HOUR_MS - MINUTE
GIB = 2**30


def used(gpu, host="a"):
    return Labels.of("gpu_memory_used_bytes", gpu=gpu, host=host)


HEAT = Labels.of("gpu_temperature_celsius", gpu="0")


@pytest.fixture(autouse=True)
def far_east(monkeypatch):
    """People here have a clock eight hours ahead."""
    monkeypatch.delenv("GPUWATCH_CONFIG", raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TZ", "CST-8")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A daemon's, with four hours of a scrape a minute, two of them in frames."""
    monkeypatch.setattr(sealer, "run", lambda path, *given: list(sealing.seal(path, *given)))
    with closing(Store(HOUR_MS, Disk(tmp_path, StoreSettings(min_free=Size(0)), "a", NINE))) as found:
        for n, at_ms in enumerate(range(NINE, NINE + 4 * HOUR_MS, MINUTE)):
            found.append("nvml", at_ms, [used("0"), used("1"), HEAT], [float(n * GIB), 1.5 * GIB, 61.0])
        found.save(Changes(), NINE)
        assert found.seal(NINE + 3 * HOUR_MS) == 2
        yield found


@pytest.fixture(params=["beside the daemon", "after it"])
def folder(request, store, tmp_path):
    if request.param == "after it":
        store.close()
    return tmp_path


def asked(folder, *given):
    return CliRunner().invoke(main, ["query", "--state-dir", str(folder), *given])


def told(folder, *given):
    result = asked(folder, *given)
    assert result.exit_code == 0, result.output
    return result.stdout


def data(folder, *given):
    return json.loads(told(folder, *given, "--json"))


# What people see


def test_a_vector_is_a_table_of_the_labels_that_differ(folder):
    assert told(folder, "gpu_memory_used_bytes").split("\n") == [
        '2024-09-21 20:59:00 CST  gpu_memory_used_bytes{host="a"}',
        "GPU  VALUE",
        "0    256624295936  239 GiB",
        "1    1610612736    1.5 GiB",
        "",
    ]


def test_one_element_is_named_on_the_first_line(folder):
    assert told(folder, "gpu_temperature_celsius").split("\n") == [
        '2024-09-21 20:59:00 CST  gpu_temperature_celsius{gpu="0"}',
        "VALUE",
        "61     61 °C",
        "",
    ]


def test_metrics_of_several_names_have_a_column_for_them(folder):
    text = told(folder, '{gpu="0"}')
    assert text.split("\n")[0] == '2024-09-21 20:59:00 CST  {gpu="0"}'
    assert text.split("\n")[1].split() == ["METRIC", "HOST", "VALUE"]


def test_a_scalar_and_a_string_are_what_they_are(folder):
    assert told(folder, "0.1 + 0.2") == "0.30000000000000004\n"
    assert told(folder, "1e9") == "1000000000\n"
    assert told(folder, '"显存"') == "显存\n"


def test_a_range_shows_each_series_with_its_times(folder):
    assert told(folder, "gpu_temperature_celsius", "--range", "2m", "--step", "1m").split("\n") == [
        'gpu_temperature_celsius{gpu="0"}',
        "  2024-09-21 20:57:00 CST  61  61 °C",
        "  2024-09-21 20:58:00 CST  61  61 °C",
        "  2024-09-21 20:59:00 CST  61  61 °C",
        "",
    ]


def test_a_range_vector_shows_the_samples_as_they_are_stored(folder):
    text = told(folder, "gpu_temperature_celsius[2m]", "--at", "2024-09-21T10:00:30Z")
    assert [line.split()[1] for line in text.split("\n")[1:-1]] == ["17:59:00", "18:00:00"]


def test_nothing_found_is_said_and_is_no_error(folder):
    result = asked(folder, "nothing_of_this_name")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no series has a value then (2024-09-21 20:59:00 CST)" in result.stderr


def test_nothing_found_in_a_range_is_said_with_both_its_ends(folder):
    result = asked(folder, "nothing_of_this_name", "--range", "1m")
    assert "(2024-09-21 20:58:00 CST to 2024-09-21 20:59:00 CST)" in result.stderr


@pytest.mark.parametrize("given", [[], ["--range", "1m", "--step", "1m"], ["--plot"]])
def test_a_label_cannot_command_the_terminal(folder, given):
    named = 'label_replace(vector({0}), "process", "{0}\\u001b]0;pwned\\a", "", "")'
    text = told(folder, f"{named.format(1)} or {named.format(2)}", *given)
    assert "2\ufffd]0;pwned\ufffd" in text
    assert text.replace("\n", "").isprintable()


def test_remarks_go_to_standard_error_with_their_place(folder):
    result = asked(folder, "rate(gpu_memory_used_bytes[5m])", "--json")
    assert json.loads(result.stdout)["resultType"] == "vector"
    assert "PromQL info: metric might not be a counter" in result.stderr
    assert "(1:6)" in result.stderr


def test_a_chart_is_as_wide_as_the_terminal_and_shows_the_last_hour(folder):
    text = told(folder, 'gpu_memory_used_bytes{gpu="0"}', "--plot")
    assert "2024-09-21 19:59:00 to 20:59:00 CST" in text
    assert "⣿ gpu_memory_used_bytes" in text
    assert "last 239 GiB" in text
    assert max(map(len, text.split("\n"))) <= 60


def test_a_chart_in_ascii_has_no_other_characters(folder):
    text = told(folder, "gpu_memory_used_bytes", "--plot", "--ascii", "--range", "4h")
    assert text.isascii()
    assert '+ {gpu="1"}  last 1.5 GiB' in text


def test_a_terminal_without_utf_8_gets_ascii(folder):
    result = CliRunner(charset="latin-1").invoke(
        main, ["query", "--state-dir", str(folder), "gpu_memory_used_bytes", "--plot"]
    )
    assert result.exit_code == 0
    assert "* {gpu=" in result.stdout


def test_a_character_that_the_terminal_lacks_is_replaced(folder):
    result = CliRunner(charset="ascii").invoke(main, ["query", "--state-dir", str(folder), '"显存 free"'])
    assert (result.exit_code, result.stdout) == (0, "?? free\n")


# What programs see


@pytest.mark.parametrize("charset", ["utf-8", "latin-1", "ascii"])
def test_programs_get_every_character_whatever_the_terminal_has(folder, charset):
    asked_for = [
        "query",
        "--state-dir",
        str(folder),
        'label_replace(vector(1), "x", "显存", "", "")',
        "--at",
        "5",
    ]
    as_json, as_csv = (
        CliRunner(charset=charset).invoke(main, [*asked_for, form]).stdout_bytes
        for form in ("--json", "--csv")
    )
    assert json.loads(as_json)["result"][0]["metric"] == {"x": "显存"}
    assert as_csv.decode() == "time,x,value\n1970-01-01T00:00:05.000Z,显存,1\n"


def test_json_has_the_shape_of_prometheus_api(folder):
    assert data(folder, 'gpu_memory_used_bytes{gpu="1"}') == {
        "resultType": "vector",
        "result": [{"metric": dict(used("1")), "value": [LAST // 1000, "1610612736"]}],
    }
    assert data(folder, "gpu_temperature_celsius", "--range", "1m", "--step", "30s") == {
        "resultType": "matrix",
        "result": [
            {"metric": dict(HEAT), "values": [[LAST // 1000 - back, "61"] for back in (60, 30, 0)]},
        ],
    }
    assert data(folder, "gpu_temperature_celsius[1m]") == {
        "resultType": "matrix",
        "result": [{"metric": dict(HEAT), "values": [[LAST // 1000, "61"]]}],
    }
    assert data(folder, "1/0", "--at", "5.25") == {"resultType": "scalar", "result": [5.25, "+Inf"]}
    assert data(folder, '"text"', "--at", "5") == {"resultType": "string", "result": [5, "text"]}
    assert data(folder, "nothing") == {"resultType": "vector", "result": []}
    assert data(folder, "nothing", "--range", "1m") == {"resultType": "matrix", "result": []}
    assert data(folder, "1", "--range", "1s", "--step", "1s")["result"][0]["metric"] == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"),
        (-0.0, "-0"),
        (1e-6, "0.000001"),
        (1e-7, "1e-07"),
        (123456789012345680000.0, "123456789012345680000"),
        (1e21, "1e+21"),
        (0.1, "0.1"),
        (math.nan, "NaN"),
        (math.inf, "+Inf"),
        (-math.inf, "-Inf"),
    ],
)
def test_values_are_written_as_prometheus_api_does(value, text):
    assert answers.value_text(value) == text


def test_csv_has_a_column_for_each_label_and_a_line_for_each_sample(folder):
    text = told(folder, "gpu_memory_used_bytes", "--range", "1m", "--step", "1m", "--csv")
    found = list(csv.reader(io.StringIO(text)))
    assert found[0] == ["time", "__name__", "gpu", "host", "value"]
    assert found[1] == ["2024-09-21T12:58:00.000Z", "gpu_memory_used_bytes", "0", "a", "255550554112"]
    assert len(found) == 5
    assert told(folder, "42", "--at", "0", "--csv") == "time,value\n1970-01-01T00:00:00.000Z,42\n"
    assert told(folder, '"x"', "--at", "0", "--csv") == "time,value\n1970-01-01T00:00:00.000Z,x\n"


# When


def test_without_a_time_it_is_the_newest_scrape_and_an_old_one_is_said(folder):
    result = asked(folder, "time()")
    assert result.stdout == f"{LAST // 1000}\n"
    assert result.stderr == (
        "the newest scrape is of 2024-09-21 12:59:00 UTC; gpuwatch has not written since\n"
    )
    assert asked(folder, "time()", "--at", "-0").stderr == ""


@pytest.mark.parametrize(
    ("text", "at_ms"),
    [
        ("2024-09-21T09:00:00Z", NINE),
        ("2024-09-21T17:00:00+08:00", NINE),
        ("2024-09-21T17:00:00", NINE),
        ("2024-09-21 17:00", NINE),
        ("1726909200", NINE),
        ("1726909200.5", NINE + 500),
        ("-1h30m", LAST - 90 * MINUTE),
        ("0", 0),
    ],
)
def test_a_time_may_be_written_in_many_ways(text, at_ms):
    assert instant_ms(text, "--at", LAST) == at_ms


@pytest.mark.parametrize(
    "text", ["yesterday", "", "nan", "inf", "1e30", "-5", "-70y", "9999-12-31T23:59:59-23:00"]
)
def test_what_is_no_time_is_an_error_that_names_the_option(text):
    with pytest.raises(ConfigError, match="--at"):
        instant_ms(text, "--at", LAST)


def times(folder, *given):
    found = data(folder, "gpu_temperature_celsius", *given)["result"][0]["values"]
    return found[0][0], found[-1][0], found[1][0] - found[0][0]


def test_a_range_ends_with_the_newest_scrape_unless_told(folder):
    nine, last = NINE // 1000, LAST // 1000
    assert times(folder, "--range", "1h") == (last - 3600, last, 15)
    assert times(folder, "--range", "1h", "--to", "-1h") == (last - 7200, last - 3600, 15)
    assert times(folder, "--from", "2024-09-21T09:00:00Z", "--step", "1m") == (nine, last, 60)
    assert times(folder, "--from", str(nine), "--to", str(nine + 4), "--step", "2s") == (nine, nine + 4, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--range", "1h", "--from", "0"], "--range and --from"),
        (["--range", "1h", "--at", "0"], "--at is for one instant"),
        (["--to", "0"], "name --range or --from"),
        (["--step", "1s"], "name --range or --from"),
        (["--from", "now"], "--from now: it is later than the end"),
        (["--range", "11000s", "--step", "1s"], "--step 1s: a series may have 11000 points"),
        (["--range", "1h", "--step", "0s"], "--step 0s"),
        (["--at", ""], "--at '' is no time"),
        (["--from", ""], "--from '' is no time"),
        (["--plot", "--range", ""], "--range: '' is no duration"),
        (["--range", "an hour"], "--range: 'an hour' is no duration"),
    ],
)
def test_times_that_make_no_range_are_refused_with_a_reason(folder, given, message):
    result = asked(folder, "up", *given)
    assert result.exit_code != 0
    assert message in result.stderr


# What goes wrong


def test_a_mistake_is_shown_with_a_caret_under_it(folder):
    result = asked(folder, 'sum(up{gpu="0"}) by (gpu')
    assert result.exit_code == 1
    message, line, caret = result.stderr.rstrip("\n").split("\n")
    assert message.startswith("gpuwatch: ")
    assert line == '  sum(up{gpu="0"}) by (gpu'
    assert caret == " " * (2 + len('sum(up{gpu="0"}) by (gpu')) + "^"


def test_the_caret_stands_in_the_right_line_and_under_the_right_column():
    text = 'up{a="显存"}\n\t+ bad(x)\n+ 1'
    assert pointed(text, QueryError("unknown function", text.index("bad"))) == (
        "unknown function\n      + bad(x)\n        ^"
    )
    assert pointed('{a="显存"} + bad(x)', QueryError("what", 11)) == (
        'what\n  {a="显存"} + bad(x)\n  ' + " " * 13 + "^"
    )


def test_a_range_of_range_vectors_is_refused(folder):
    result = asked(folder, "up[5m]", "--range", "1h")
    assert result.exit_code == 1
    assert "range vector" in result.stderr


def test_a_query_that_takes_too_long_is_ended(folder):
    result = asked(folder, "gpu_memory_used_bytes", "--range", "4h", "--timeout", "0")
    assert result.exit_code == 1
    assert "time" in result.stderr


def test_a_folder_without_a_database_is_an_error_with_a_cure(tmp_path):
    result = asked(tmp_path, "up")
    assert result.exit_code == 1
    assert "metrics.db" in result.stderr


def test_a_database_without_a_sample_is_an_error_with_a_cure(tmp_path):
    Store(HOUR_MS, Disk(tmp_path, StoreSettings(min_free=Size(0)), "a", NINE)).close()
    result = asked(tmp_path, "up")
    assert result.exit_code == 1
    assert "there is no sample yet" in result.stderr


# Too much is refused before it is read


def test_too_many_samples_in_frames_are_refused_before_any_frame_is_read(store, tmp_path):
    """Not even a damaged frame is looked at."""
    with closing(sqlite3.connect(tmp_path / METRICS_DB)) as connection, connection:
        connection.execute("UPDATE frame SET data = x'00'")
    with closing(database.read(tmp_path / METRICS_DB)) as opened:
        history = History(opened, max_samples=2 * 60 * 3 - 1)
        with pytest.raises(StoreError, match=r"more than 359 samples"):
            history.tracks([Matcher("gpu", "!=", "")], NINE - 1, NINE + 2 * HOUR_MS - 1)
        assert history.damaged == []


def test_too_many_samples_in_rows_are_refused_before_any_row_is_read(store, tmp_path):
    with closing(sqlite3.connect(tmp_path / METRICS_DB)) as connection, connection:
        connection.execute("UPDATE hot SET vals = 'no row'")
    with closing(database.read(tmp_path / METRICS_DB)) as opened:
        history = History(opened, max_samples=2 * 60 * 3 - 1)
        with pytest.raises(StoreError, match=r"more than 359 samples"):
            history.tracks([Matcher("gpu", "!=", "")], NINE + 2 * HOUR_MS - 1, LAST)
        assert history.damaged == []


def test_what_is_just_within_the_limit_is_read(store, tmp_path):
    with closing(database.read(tmp_path / METRICS_DB)) as opened:
        history = History(opened, max_samples=4 * 60 * 3)
        found = history.tracks([Matcher("gpu", "!=", "")], NINE - 1, LAST)
    assert [len(track.at_ms) for track in found] == [240, 240, 240]


def test_the_newest_scrape_is_the_one_written_last_or_the_end_of_the_frames(store, tmp_path):
    with open_history(tmp_path) as history:
        assert history.newest_ms() == LAST
    store.close()
    with closing(sqlite3.connect(tmp_path / METRICS_DB)) as connection, connection:
        connection.execute("DELETE FROM hot")
    with open_history(tmp_path) as history:
        assert history.newest_ms() == NINE + 2 * HOUR_MS - MINUTE


def test_series_of_the_same_instants_share_them(store, tmp_path):
    store.append("own", LAST, [Labels.of("up")], [STALE])
    store.save(Changes(), LAST)
    with open_history(tmp_path) as history:
        found = history.select([Matcher("__name__", "!=", "")], NINE, LAST)
    assert len({id(series.at_ms) for series in found}) == 2
