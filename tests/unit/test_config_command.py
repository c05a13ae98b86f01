"""`gpuwatch config` as people call it, on a real database, with and without a daemon that writes it."""

import json
import re
import time
from contextlib import closing

import pytest
from click.testing import CliRunner

from gpuwatch.cli import main
from gpuwatch.cli.config import changed, config_, difference
from gpuwatch.cli.plot import columns_of
from gpuwatch.config import StoreSettings
from gpuwatch.config.size import Size
from gpuwatch.errors import ConfigError
from gpuwatch.records import Labels, Refusal, Revision, ServerStart, StartOutcome
from gpuwatch.servers.revisions import Revisions
from gpuwatch.store import Changes, Disk, Store, open_read_only

MINUTE = 60_000
NOW = int(time.time() * 1000)
BEGAN = NOW - 120 * MINUTE
OUT = {"model": "m", "max_num_seqs": 256, "gpu_memory_utilization": 0.9}

WHYS = ("原因", "share_down", "more at once", "first")

if "config" not in main.commands:
    main.add_command(config_)


def revision(number, minutes, by="alice", why="first", **arguments):
    return Revision(
        server="vllm",
        number=number,
        arguments={**OUT, **arguments},
        created_at_ms=BEGAN + minutes * MINUTE,
        by=by,
        why=why,
        parent=number - 1 or None,
    )


def start(minutes, number, *, ended=None, failure="", **more):
    at_ms = BEGAN + minutes * MINUTE
    return ServerStart(
        server="vllm",
        began_at_ms=at_ms,
        outcome=StartOutcome.HEALTHY,
        healthy_at_ms=at_ms + MINUTE,
        ended_at_ms=None if ended is None else BEGAN + ended * MINUTE,
        failure=failure,
        revision=number,
        **more,
    )


REVISIONS = (
    revision(1, 0),
    revision(2, 30, why="more at once,\n  says sales", max_num_seqs=512),
    revision(3, 60, by="gpuwatch", why="share_down", gpu_memory_utilization=0.8, max_num_seqs=512),
)
STARTS = (
    start(0, 1, ended=30, kv_cache_tokens=100_000),
    start(30, 2, ended=35, failure="runtime_oom"),
    start(60, 3, kv_cache_tokens=80_000),
)


class Host:
    """A state folder, settings that name it, and what one types there."""

    def __init__(self, folder):
        self.folder, self.settings = folder, folder / "g.yaml"
        self.revisions = Revisions("vllm", folder / "settings")
        self.write("")

    def write(self, more, revisions=True):
        folder = f", revisions: {self.folder}/settings" if revisions else ""
        self.settings.write_text(f"state_dir: {self.folder}\nservers: [{{name: vllm{folder}}}]\n{more}")

    def save(self, at_ms=None, samples=True, **changes):
        at_ms = at_ms or int(time.time() * 1000)  # whoever was seen lately runs
        with closing(
            Store(3_600_000, Disk(self.folder, StoreSettings(min_free=Size(0)), "a", at_ms))
        ) as store:
            if samples:
                store.append("nvml", at_ms, [Labels.of("gpu_temperature_celsius", gpu="0")], [50.0])
            store.save(Changes(**changes), at_ms)

    def __call__(self, *words, status=0, typed=None):
        command = ["config", words[0], "--config", str(self.settings), *map(str, words[1:])]
        done = CliRunner().invoke(main, command, input=typed)
        assert done.exit_code == status, done.output
        return done.output

    def wish(self):
        with open_read_only(self.folder) as view:
            found = view.settings().get("change:vllm")
        return found and json.loads(found)


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.delenv("GPUWATCH_CONFIG", raising=False)
    return Host(tmp_path)


@pytest.fixture
def busy(host):
    """Three revisions; the third is in use, a person wanted the second."""
    host.save(revisions=REVISIONS, starts=STARTS, settings={"wanted:vllm": "2"})
    for each in REVISIONS:
        host.revisions.write(each)
    host.revisions.swap(3)
    return host


# ---- log, show, diff


def test_the_log_tells_of_each_revision_who_why_and_what_it_came_to(busy):
    head, third, second, first, *_ = busy("log", "vllm").splitlines()
    assert head.split()[:4] == ["REV", "MADE", "BY", "IS"]
    assert all(
        word in third for word in ("gpuwatch", "in use, last good", "80,000", "1 m", "0 of 1", "share_down")
    )
    assert all(
        word in second for word in ("alice", "wanted", "1 of 1 runtime_oom", "more at once, says sales")
    )
    assert "last good" not in first
    assert "100,000" in first


def test_in_chinese_all_that_people_read_is_chinese_and_stands_in_columns(busy):
    busy.write("lang: zh\n")
    lines = busy("log", "vllm").splitlines()
    assert "使用中, 最近可用" in lines[1]
    assert "0/1" in lines[1]
    assert {columns_of(line[: line.index(why)]) for line, why in zip(lines, WHYS, strict=False)} == {
        columns_of(lines[0][: lines[0].index(WHYS[0])])
    }
    assert lines[-1].startswith("显存")
    said = busy("show", "vllm") + busy("diff", "vllm", 2, 2) + busy("set", "vllm", "--why", "w")
    said += busy("rollback", "vllm", 2, typed="y\n") + busy("log", "vllm")
    for chinese in ("第 3 版", "内容相同", "没有变化", "提交此修改", "守护进程将在一秒内执行", "尚待执行"):
        assert chinese in said
    assert not re.search(r"\b(revision|wish|nothing|waits|by)\b", said)
    assert busy.wish()["why"] == "回到第 2 版"
    assert json.loads(busy("log", "vllm", "--json"))[0]["is"] == ["in use", "last good"]


def test_the_log_for_programs_has_the_arguments_and_the_figures(busy):
    rows = json.loads(busy("log", "vllm", "--json"))
    assert [row["number"] for row in rows] == [3, 2, 1]
    assert [row["is"] for row in rows] == [["in use", "last good"], ["wanted"], []]
    assert rows[0]["arguments"]["gpu_memory_utilization"] == 0.8
    assert rows[1]["measured"]["failures"] == 1
    assert rows[2]["measured"]["uptime_ms"] == 29 * MINUTE


def test_the_log_shows_what_the_next_start_reads_where_that_is_another(busy):
    busy.revisions.swap(1)
    assert [row["is"] for row in json.loads(busy("log", "vllm", "--json"))][2] == ["next start"]


def test_the_log_works_without_samples(host):
    host.save(revisions=REVISIONS[:1], starts=STARTS[:1], samples=False)
    (host.folder / "metrics.db").unlink()
    said = host("log", "vllm")
    assert "without what was measured" in said
    assert "100,000" in said


def test_an_empty_log_says_so(host):
    host.save()
    assert host("log", "vllm") == "there is no revision yet\n"


def test_show_prints_what_vllm_reads(busy):
    lines = busy("show", "vllm").splitlines()
    assert lines[0].startswith("# revision 3 of vllm")
    assert lines[1:] == ["gpu-memory-utilization: 0.8", "max-num-seqs: 512", 'model: "m"']
    assert "max-num-seqs: 256" in busy("show", "vllm", 1)


def test_diff_shows_what_goes_and_what_comes(busy):
    assert busy("diff", "vllm", 1, 2).splitlines() == ["- max-num-seqs: 256", "+ max-num-seqs: 512"]
    assert "+ gpu-memory-utilization: 0.8" in busy("diff", "vllm", 2)
    assert busy("diff", "vllm", 2, 2) == "revisions 2 and 2 say the same\n"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("show", "vllm", 9), "there is no revision 9; there are: 3, 2, 1"),
        (("show", "other"), "no such server in the settings; there are: vllm"),
        (("diff", "vllm", 1, 9), "there is no revision 9"),
        (("rollback", "vllm", 9), "there is no revision 9"),
        (("set", "vllm", "--why", "x", "max_num_seqs"), "max_num_seqs: write KEY=VALUE"),
        (("set", "vllm", "--why", "x", "--unset", "port"), "--unset port: it is not set"),
        (
            ("set", "vllm", "--why", "x", "enforce_eager=yes"),
            "write enforce_eager=true or enforce_eager=false",
        ),
        (("set", "vllm", "--why", "x", "middleware=[]"), "middleware: is an empty list"),
        (("set", "vllm", "--why", "x", "--unset", "model"), "model: is missing"),
    ],
)
def test_what_cannot_be_is_told_and_nothing_is_wished(busy, words, what):
    assert what in busy(*words, status=1)
    assert busy.wish() is None


# ---- set


def test_set_shows_the_difference_asks_and_leaves_the_wish(busy):
    said = busy(
        "set", "vllm", "max-num-seqs=128", "--unset", "gpu_memory_utilization", "--why", "w", typed="y\n"
    )
    assert "- max-num-seqs: 512\n+ max-num-seqs: 128" in said
    assert "- gpu-memory-utilization: 0.9" in said
    assert "[y/N]" in said
    assert "takes it up within a second" in said
    wish = busy.wish()
    assert wish["arguments"] == {"model": "m", "max_num_seqs": 128}
    assert (wish["revision"], wish["why"]) == (None, "w")
    assert wish["by"]
    assert abs(wish["at_ms"] - time.time() * 1000) < MINUTE


def test_set_goes_by_what_people_wanted_not_by_what_gpuwatch_made_of_it(busy):
    busy("set", "vllm", "seed=1", "--why", "w", "--yes")
    assert busy.wish()["arguments"]["gpu_memory_utilization"] == 0.9


@pytest.mark.parametrize("typed", ["n\n", "\n", ""])
def test_who_does_not_say_yes_wishes_nothing(busy, typed):
    busy("set", "vllm", "seed=1", "--why", "w", typed=typed, status=1)
    assert busy.wish() is None


def test_what_changes_nothing_is_no_wish(busy):
    said = busy("set", "vllm", "max-num-seqs=512", "--why", "w")
    assert "in use is revision 3: `gpuwatch config rollback vllm 2` goes back" in said
    assert busy.wish() is None


def test_a_first_file_makes_the_first_revision(host):
    host.save()
    base = host.folder / "base.yaml"
    base.write_text("model: m\nenable-prefix-caching: false\nport: null\n")
    said = host("set", "vllm", "max_num_seqs=8", "--file", base, "--why", "first", "--yes")
    assert "+ no-enable-prefix-caching: true" in said
    assert host.wish()["arguments"] == {"enable_prefix_caching": False, "max_num_seqs": 8, "model": "m"}


def test_without_a_revision_or_a_file_there_is_nothing_to_change(host):
    host.save()
    said = host("set", "vllm", "seed=1", "--why", "w", "--yes", status=1)
    assert "make the first with `gpuwatch config set vllm --file" in said


def test_a_second_wish_builds_on_one_that_waits(busy):
    busy("set", "vllm", "seed=1", "--why", "w", "--yes")
    said = busy("set", "vllm", "port=8001", "--why", "w", "--yes")
    assert "waits to be taken up" in said
    assert {"seed", "port"} <= busy.wish()["arguments"].keys()
    assert "waits to be taken up" in busy("log", "vllm")


def test_a_wish_that_is_held_up_is_told_with_the_reason(busy):
    busy("set", "vllm", "seed=1", "--why", "w", "--yes")
    held = Refusal(server="vllm", alert="", alert_labels=Labels.of(server="vllm"), code="stopped_by_operator")
    busy.save(refusals=[held])
    assert "waits to be taken up: an operator stopped the server" in busy("log", "vllm")
    status = CliRunner().invoke(main, ["status", "--config", str(busy.settings)]).output
    assert re.search("WISHED\n.* an operator stopped the server", status)


def test_without_a_daemon_the_wish_waits_and_the_command_says_so(host):
    host.save(at_ms=NOW - 10 * MINUTE, revisions=REVISIONS, starts=STARTS)
    assert "gpuwatch does not run: the wish waits" in host("set", "vllm", "seed=1", "--why", "w", "--yes")
    assert host.wish()["arguments"]["seed"] == 1


def test_in_a_pause_the_wish_waits_and_the_command_says_so(host):
    host.save(revisions=REVISIONS, settings={"paused_until_ms": str(NOW + 60 * MINUTE)})
    assert "remediation is paused: the wish waits" in host("set", "vllm", "seed=1", "--why", "w", "--yes")


def test_a_server_whose_settings_are_not_kept_cannot_be_set(busy):
    busy.write("", revisions=False)
    assert "docs/settings-of-servers.md" in busy("set", "vllm", "seed=1", "--why", "w", "--yes", status=1)
    assert "docs/settings-of-servers.md" in busy("rollback", "vllm", "--yes", status=1)
    assert "in use" in busy("log", "vllm")


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("a=true", {"a": True}),
        ("a=false", {"a": False}),
        ("no-a=true", {"a": False}),
        ("no-a=false", {"a": True}),
        ("a=4", {"a": 4}),
        ("a=0.5", {"a": 0.5}),
        ("a=2k", {"a": "2k"}),
        ("a=x=y", {"a": "x=y"}),
        ('a="true"', {"a": "true"}),
        ("a=[1, 2]", {"a": [1, 2]}),
        ('a={"image": 2}', {"a": {"image": 2}}),
        ("a=", {"a": ""}),
        ("a=null", {"a": None}),
        ("a=auto", {"a": "auto"}),
    ],
)
def test_a_value_is_json_or_a_text(pair, expected):
    assert changed({"a": "before"}, [pair], []) == expected


def test_every_pair_that_cannot_be_read_is_told():
    with pytest.raises(ConfigError) as refused:
        changed({}, ["a", "=b", "c=On", "d=1"], ["e"])
    assert len(refused.value.mistakes) == 4


def test_a_difference_is_by_name_and_empty_for_the_same():
    assert difference({"b": 1, "a": True}, {"b": 2, "c": False}) == [
        "- a: true",
        "- b: 1",
        "+ b: 2",
        "+ no-c: true",
    ]
    assert difference(OUT, dict(OUT)) == []


# ---- rollback


def test_rollback_goes_to_the_last_that_proved_good_before_the_one_in_use(busy):
    said = busy("rollback", "vllm", typed="y\n")
    assert said.startswith("revision 1, ")
    assert "+ gpu-memory-utilization: 0.9" in said
    wish = busy.wish()
    assert (wish["arguments"], wish["revision"], wish["why"]) == (None, 1, "back to 1")


def test_rollback_to_a_number_takes_that_one(busy):
    busy("rollback", "vllm", 2, "--why", "try again", "--yes")
    assert (busy.wish()["revision"], busy.wish()["why"]) == (2, "try again")


def test_rollback_to_what_is_in_use_takes_back_what_people_wanted_and_what_waits(busy):
    said = busy("rollback", "vllm", 3, "--yes")
    assert "what is in use stays" in said
    assert busy.wish()["revision"] == 3
    busy.save(settings={"wanted:vllm": "3", "change:vllm": None})
    assert "nothing changes" in busy("rollback", "vllm", 3, "--yes")
    assert busy.wish() is None


def test_where_none_proved_good_the_person_must_name_one(host):
    host.save(revisions=REVISIONS[1:], starts=STARTS[1:])
    said = host("rollback", "vllm", "--yes", status=1)
    assert "no revision before 3 has proved good" in said


def test_who_wished_for_what_is_in_the_audit(busy):
    busy("rollback", "vllm", 2, "--yes")
    with open_read_only(busy.folder) as view:
        (row,) = view.audit()
    assert (row.what, row.facts) == ("config rollback", {"server": "vllm", "why": "back to 2"})
