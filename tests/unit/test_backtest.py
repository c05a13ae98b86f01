"""`gpuwatch rules backtest` on real files: when rules would have fired, how often and how long."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpuwatch import rules
from gpuwatch.cli import main
from gpuwatch.cli.walk import Past, in_order, verdicts
from gpuwatch.config import StoreSettings, load_rules
from gpuwatch.config.size import Size
from gpuwatch.frames import sealing
from gpuwatch.frames.rowtext import HOUR_MS
from gpuwatch.promql import Matcher, Series
from gpuwatch.records import Labels
from gpuwatch.store import Changes, Disk, Store, open_history, sealer

SECOND, MINUTE = 1000, 60_000
NINE = 1_726_909_200_000  # 2024-09-21 09:00 UTC
LAST = NINE + 2 * HOUR_MS
HEAT = [Labels.of("gpu_temperature_celsius", gpu=gpu) for gpu in "01"]
OTHER_ALERT = Labels.of("ALERTS", alertname="Other", alertstate="firing")
OWN_ALERT = Labels.of("ALERTS", alertname="Hot", alertstate="firing", gpu="1")

HOT = """
groups:
  - name: heat
    interval: 1s
    rules:
      - alert: Hot
        expr: gpu_temperature_celsius > 80
        for: 1m
        labels: {severity: warning}
      - alert: Hotter
        expr: gpu_temperature_celsius > 89
        for: 1h
      - alert: Cold
        expr: gpu_temperature_celsius < 0
"""


def heat(at_ms):
    """GPU 0 is hot for five minutes after 9:30 and since 10:55; GPU 1 never is."""
    minute = (at_ms - NINE) / MINUTE
    return 90.0 if 30 <= minute < 35 or minute >= 115 else 60.0


@pytest.fixture(autouse=True)
def in_greenwich(monkeypatch):
    monkeypatch.delenv("GPUWATCH_CONFIG", raising=False)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two hours of a scrape every ten seconds, the first of them in a frame."""
    monkeypatch.setattr(sealer, "run", lambda path, *given: list(sealing.seal(path, *given)))
    with closing(Store(HOUR_MS, Disk(tmp_path, StoreSettings(min_free=Size(0)), "a", NINE))) as store:
        for at_ms in range(NINE, LAST + 1, 10 * SECOND):
            store.append("nvml", at_ms, HEAT, [heat(at_ms), 60.0])
            store.append("rules", at_ms, [OTHER_ALERT, OWN_ALERT], [1.0, 1.0])
        store.save(Changes(), NINE)
        assert store.seal(NINE + 2 * HOUR_MS) > 0
    return tmp_path


def asked(folder, rule_text, *given):
    """Judged every ten seconds, unless told otherwise."""
    given = given if "--step" in given or "--auto" in given else (*given, "--step", "10s")
    given = [word for word in given if word != "--auto"]
    path = folder / "rules.yaml"
    path.write_text(rule_text)
    return CliRunner().invoke(main, ["rules", "backtest", "--state-dir", str(folder), str(path), *given])


def data(folder, rule_text, *given):
    result = asked(folder, rule_text, "--json", *given)
    assert result.exit_code == 0, result.output
    return {one["alert"]: one for one in json.loads(result.stdout)["alerts"]}


def group(name, *lines):
    return f"  - name: {name}\n    interval: 1s\n    rules:\n" + "".join(
        f"      - {line}\n" for line in lines
    )


# What people see


def test_each_alert_has_a_line_and_what_fired_its_episodes(folder):
    result = asked(folder, HOT, "--since", "2h")
    assert result.exit_code == 0, result.output
    assert result.stdout.split("\n") == [
        "3 alerts from 2024-09-21 09:00:00 UTC to 2024-09-21 11:00:00 UTC, judged every 10s",
        "",
        "ALERT   FIRED                   TOTAL  LONGEST  FIRST                    LAST",
        "Hot     2                       8m     4m       2024-09-21 09:31:00 UTC  2024-09-21 10:56:00 UTC",
        "Hotter  never; pending 2 times",
        "Cold    never pending",
        "",
        "Hot",
        '  2024-09-21 09:31:00 UTC  to 2024-09-21 09:35:00 UTC  4m  {gpu="0",severity="warning"} 90',
        '  2024-09-21 10:56:00 UTC  still fires                 4m  {gpu="0",severity="warning"} 90',
        "",
    ]
    assert result.stderr == ""


def test_a_history_that_is_shorter_than_asked_is_said_and_used_as_far_as_it_goes(folder):
    result = asked(folder, HOT, "--since", "7d", "--step", "10s")
    assert "the history goes back to 2024-09-21 09:00:00 UTC only" in result.stderr
    assert result.stdout.startswith("3 alerts from 2024-09-21 09:00:00 UTC to 2024-09-21 11:00:00 UTC")


def test_many_episodes_are_cut_short_with_a_word(folder):
    flapping = "groups:\n" + group("g", "{alert: Flaps, expr: minute() % 2 == 1}")
    text = asked(folder, flapping, "--since", "2h").stdout
    assert text.count("to 2024") == 20 + 1
    assert "  and 40 more; --json has them all" in text
    assert len(data(folder, flapping, "--since", "2h")["Flaps"]["episodes"]) == 60


# What programs see


def test_json_has_every_episode(folder):
    assert data(folder, HOT, "--since", "2h")["Hot"] == {
        "alert": "Hot",
        "pending": 2,
        "fired": 2,
        "total_ms": 8 * MINUTE,
        "longest_ms": 4 * MINUTE,
        "failures": 0,
        "episodes": [
            {
                "labels": {"alertname": "Hot", "gpu": "0", "severity": "warning"},
                "value": "90",
                "active_at_ms": NINE + 30 * MINUTE,
                "start_ms": NINE + 31 * MINUTE,
                "end_ms": NINE + 35 * MINUTE,
            },
            {
                "labels": {"alertname": "Hot", "gpu": "0", "severity": "warning"},
                "value": "90",
                "active_at_ms": NINE + 115 * MINUTE,
                "start_ms": NINE + 116 * MINUTE,
                "end_ms": None,
            },
        ],
    }


def test_a_part_of_the_history_may_be_chosen(folder):
    found = data(folder, HOT, "--since", "-1h50m", "--until", "2024-09-21T10:00:00Z")
    assert [(one["start_ms"], one["end_ms"]) for one in found["Hot"]["episodes"]] == [
        (NINE + 31 * MINUTE, NINE + 35 * MINUTE)
    ]


# The life of alerts, and what rules see of one another


def test_keep_firing_for_is_kept(folder):
    kept = "groups:\n" + group("g", "{alert: Kept, expr: gpu_temperature_celsius > 80, keep_firing_for: 3m}")
    first = data(folder, kept, "--since", "2h")["Kept"]["episodes"][0]
    assert (first["start_ms"], first["end_ms"]) == (NINE + 30 * MINUTE, NINE + 38 * MINUTE)


@pytest.mark.parametrize("first", ["recorder", "reader"])
def test_what_a_rule_records_is_seen_by_rules_of_any_group(folder, first):
    recorder = group("recorder", '{record: "gpu:hottest", expr: max(gpu_temperature_celsius)}')
    reader = group("reader", '{alert: Hot, expr: "gpu:hottest > 80"}')
    text = "groups:\n" + (recorder + reader if first == "recorder" else reader + recorder)
    found = data(folder, text, "--since", "2h")["Hot"]["episodes"][0]
    assert (found["labels"], found["value"]) == ({"alertname": "Hot"}, "90")
    assert (found["start_ms"], found["end_ms"]) == (NINE + 30 * MINUTE, NINE + 35 * MINUTE)


def test_a_rule_looks_back_on_what_was_recorded_in_the_walk(folder):
    recorder = group(
        "g",
        '{record: "gpu:hottest", expr: max(gpu_temperature_celsius)}',
        '{alert: WasHot, expr: "max_over_time(gpu:hottest[10m]) > 80"}',
    )
    found = data(folder, "groups:\n" + recorder, "--since", "2h")["WasHot"]["episodes"][0]
    assert found["start_ms"] == NINE + 30 * MINUTE
    assert found["end_ms"] == NINE + 45 * MINUTE - 10 * SECOND


def test_alerts_of_the_walk_are_seen_and_those_stored_of_the_same_name_are_not(folder):
    text = "groups:\n" + group(
        "g",
        "{alert: Hot, expr: gpu_temperature_celsius > 80}",
        "{alert: OnOwn, expr: 'ALERTS{alertname=\"Hot\"}'}",
        "{alert: OnOther, expr: 'ALERTS{alertname=\"Other\"}'}",
    )
    found = data(folder, text, "--since", "2h")
    assert [one["labels"]["gpu"] for one in found["OnOwn"]["episodes"]] == ["0", "0"]
    assert found["OnOwn"]["episodes"][0]["end_ms"] == NINE + 35 * MINUTE
    assert found["OnOther"]["episodes"][0]["start_ms"] == NINE


def test_groups_that_read_in_a_circle_stay_in_their_order(tmp_path):
    text = (
        "groups:\n" + group("a", '{record: "a:a", expr: "b:b"}') + group("b", '{record: "b:b", expr: "a:a"}')
    )
    assert [one.name for one in in_order(compiled(tmp_path, text))] == ["a", "b"]


def test_a_rule_that_fails_is_told_with_its_place(folder):
    text = "groups:\n" + group(
        "g", "{alert: Bad, expr: gpu_temperature_celsius + on () gpu_temperature_celsius}"
    )
    result = asked(folder, text, "--since", "10m")
    assert result.exit_code == 0
    assert "Bad failed 61 times, first with: " in result.stderr
    assert "rules.yaml:5:9: " in result.stderr
    assert "Bad    never pending; failed 61 times\n" in result.stdout


def test_without_a_rule_there_is_nothing_to_judge(folder):
    result = asked(folder, "groups: []")
    assert result.exit_code == 1
    assert f"there is no rule in {folder}/rules.yaml" in result.stderr


def test_rules_that_only_record_have_no_table(folder):
    text = "groups:\n" + group("g", "{record: a, expr: up}")
    assert asked(folder, text, "--since", "1m").stdout.splitlines() == [
        "0 alerts from 2024-09-21 10:59:00 UTC to 2024-09-21 11:00:00 UTC, judged every 10s"
    ]


def test_a_rule_that_fails_at_times_goes_on_at_others(folder):
    """While GPU 0 is hot there are two partners for it, before and after there is nothing to match."""
    both = "(gpu_temperature_celsius > 80) + on () (gpu_temperature_celsius < 99)"
    text = "groups:\n" + group("g", f"{{alert: Bad, expr: {both}}}", "{alert: Up, expr: vector(1)}")
    found = data(folder, text, "--since", "2h")
    assert found["Bad"]["failures"] == 5 * 6 + 5 * 6 + 1
    assert (found["Up"]["failures"], found["Up"]["total_ms"]) == (0, 2 * HOUR_MS)


@pytest.mark.parametrize(
    "expr",
    [
        "gpu_temperature_celsius > 80",
        "gpu_temperature_celsius @ end() > 80",
        '{gpu="0", __name__=~"gpu_temperature_.*"} > 80',
        'gpu_temperature_celsius > 80 unless on () ALERTS{alertname="Nobody"}',
        "last_over_time(gpu_temperature_celsius[1m:10s] @ start()) > 80",
    ],
)
def test_what_can_be_evaluated_ahead_and_what_cannot_come_to_the_same(folder, expr):
    found = data(folder, "groups:\n" + group("g", f"{{alert: Hot, expr: '{expr}'}}"), "--since", "2h")
    assert [(one["start_ms"], one["end_ms"]) for one in found["Hot"]["episodes"]] == [
        (NINE + 30 * MINUTE, NINE + 35 * MINUTE),
        (NINE + 115 * MINUTE, None),
    ]


def test_a_group_whose_slots_do_not_fit_the_step_is_judged_at_its_slots(folder):
    text = HOT.replace("interval: 1s", "interval: 7s").replace("for: 1m", "for: 0s")
    (first, _) = data(folder, text, "--since", "2h")["Hot"]["episodes"]
    assert NINE + 30 * MINUTE <= first["start_ms"] < NINE + 30 * MINUTE + 20 * SECOND
    assert NINE + 35 * MINUTE <= first["end_ms"] < NINE + 35 * MINUTE + 20 * SECOND


def test_a_query_offset_moves_what_is_seen(folder):
    text = HOT.replace("interval: 1s", "interval: 1s\n    query_offset: 2m").replace("for: 1m", "for: 0s")
    first = data(folder, text, "--since", "2h")["Hot"]["episodes"][0]
    assert (first["start_ms"], first["end_ms"]) == (NINE + 32 * MINUTE, NINE + 37 * MINUTE)


# How often


def test_a_long_time_is_judged_less_often_and_a_short_one_as_often_as_the_rules_want(folder):
    assert "judged every 1s\n" in asked(folder, HOT, "--since", "10m", "--auto").stdout
    slow = HOT.replace("interval: 1s", "interval: 10s")
    assert "judged every 10s\n" in asked(folder, slow, "--since", "10m", "--auto").stdout
    assert "judged every 1m\n" in asked(folder, HOT, "--since", "30m", "--step", "1m").stdout


@pytest.mark.parametrize("step", ["2m", "0s", "100ms"])
def test_a_step_at_which_alerts_could_not_live_is_refused(folder, step):
    result = asked(folder, HOT, "--step", step)
    assert result.exit_code == 1
    assert f"--step {step}: rules are judged every 1s to 1m" in result.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--since", "yesterday"], "--since 'yesterday' is no time"),
        (["--since", "now"], "nothing lies between"),
        (["--until", "0"], "--until 0: the history begins later, at 2024-09-21 09:00:00 UTC"),
        (["--until", ""], "--until '' is no time"),
    ],
)
def test_times_between_which_there_is_nothing_are_refused(folder, given, message):
    result = asked(folder, HOT, *given)
    assert result.exit_code == 1
    assert message in result.stderr


def test_without_a_sample_there_is_nothing_to_judge(tmp_path):
    Store(HOUR_MS, Disk(tmp_path, StoreSettings(min_free=Size(0)), "a", NINE)).close()
    result = asked(tmp_path, HOT)
    assert result.exit_code == 1
    assert "there is no sample yet" in result.stderr


# The walk


def compiled(folder, text):
    path = Path(folder) / "walk.yaml"
    path.write_text(text)
    return rules.compile_groups(load_rules([path]))


class Counting:
    """A querier that counts what it is asked."""

    def __init__(self, inner):
        self.inner, self.asked = inner, []

    def select(self, matchers, after_ms, upto_ms):
        self.asked.append((tuple(matchers), after_ms, upto_ms))
        return self.inner.select(matchers, after_ms, upto_ms)


def test_the_walk_sees_what_a_judge_sees_that_reads_each_moment_anew(folder):
    groups = compiled(folder, HOT)
    instants = range(NINE, LAST + 1, 10 * SECOND)
    with open_history(folder) as history:
        walked = [t for verdict in verdicts(history, groups, instants) for t in verdict.transitions]
        judge, alerts, judged = rules.Judge(groups), (), []
        for now_ms in range(NINE + 29 * MINUTE, NINE + 36 * MINUTE, 10 * SECOND):
            verdict = judge.judge(Anew(history), alerts, now_ms)
            alerts, judged = verdict.alerts, judged + list(verdict.transitions)
    assert judged == [t for t in walked if t.at_ms < NINE + 36 * MINUTE]
    assert len(judged) == 5


class Anew:
    """A querier that forgets what is written."""

    def __init__(self, inner):
        self.select = inner.select

    def append(self, target, at_ms, labels, values):
        pass


def test_the_walk_reads_hours_at_once_and_never_shows_what_is_still_to_come(folder):
    matchers = [Matcher("__name__", "=", "gpu_temperature_celsius")]
    with open_history(folder) as history:
        counting = Counting(history)
        past = Past(counting, [])
        for now_ms in range(NINE + 10 * MINUTE, LAST, MINUTE):
            found = past.select(matchers, now_ms - 5 * MINUTE, now_ms)
            assert [series.at_ms[-1] for series in found] == [now_ms, now_ms]
            assert [series.at_ms[0] for series in found] == [now_ms - 5 * MINUTE + 10 * SECOND] * 2
        assert len(counting.asked) == 1
        assert past.select(matchers, NINE - 1, NINE)[0].at_ms == [NINE]
        assert len(counting.asked) == 2


class Nothing:
    """A querier without samples."""

    def select(self, matchers, after_ms, upto_ms):
        return []


def test_what_was_written_long_ago_is_forgotten():
    past, series = Past(Nothing(), []), Labels.of("a:b")
    for at_ms in range(5):
        past.append("rules", at_ms, [series], [float(at_ms)])
    past.append("rules", 0, [Labels.of("ended")], [1.0])
    past.forget(2)
    every = [Matcher("__name__", "!=", "")]
    (found,) = past.select(every, -1, 9)
    assert (found.labels, list(found.at_ms), list(found.values)) == (series, [3, 4], [3.0, 4.0])
    assert isinstance(found, Series)


def test_a_backtest_of_what_a_daemon_saw_finds_what_fired_when_it_fired(recorded_host):
    result = CliRunner().invoke(
        main, ["rules", "backtest", "--state-dir", str(recorded_host.state_dir), "--since", "1h", "--json"]
    )
    assert result.exit_code == 0, result.output
    found = [
        (one["alert"], episode["start_ms"])
        for one in json.loads(result.stdout)["alerts"]
        for episode in one["episodes"]
    ]
    assert sorted(found) == sorted((t.alert.rule, t.at_ms) for t in recorded_host.fired)
