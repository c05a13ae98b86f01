"""Settings as revisions: the file that vLLM reads, the link that chooses it, and what each came to."""

import itertools
import json
import os
import stat
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gpuwatch.errors import ConfigError, ServerError
from gpuwatch.records import Labels, Revision, ServerStart, StartOutcome
from gpuwatch.servers import revisions, vllm_yaml
from gpuwatch.servers.measured import last_good, measured
from gpuwatch.servers.revisions import Revisions, check_command, interpreter_of
from gpuwatch.servers.vllm_yaml import canonical, dumped, loaded
from gpuwatch.store import Store

MINUTE, HOUR = 60_000, 3_600_000
NOON = 1_790_000_000_000


def revision(number, **arguments):
    return Revision(
        server="vllm",
        number=number,
        arguments={"model": "m", **arguments},
        created_at_ms=NOON,
        by="alice",
        why="to see",
    )


# ---- the file


def as_vllm_passes_it_on(text):
    """The words that vLLM makes of a file: the facts that were measured on 0.20 to 0.33."""
    words = []
    for key, value in yaml.safe_load(text).items():
        if value is True:
            words.append(f"--{key}")
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)] if value else []
        elif isinstance(value, dict):
            words += [f"--{key}", json.dumps(value)]
        elif value is not False:
            words += [f"--{key}", str(value)]
    return words


def test_false_is_written_as_the_negative_option_since_vllm_drops_it():
    text = dumped({"model": "m", "enable_prefix_caching": False, "enforce_eager": True})
    assert text == 'no-enable-prefix-caching: true\nenforce-eager: true\nmodel: "m"\n'
    assert "--no-enable-prefix-caching" in as_vllm_passes_it_on(text)


def test_null_is_left_out_since_vllm_makes_a_word_of_it():
    assert canonical({"model": "m", "max-num-seqs": None}) == {"model": "m"}


def test_dashes_and_underscores_and_the_negative_option_are_one_name():
    given_ = {"model": "m", "max-num-seqs": 4, "no-enable-prefix-caching": True, "max_model_len": "2k"}
    expected = {"enable_prefix_caching": False, "max_model_len": "2k", "max_num_seqs": 4, "model": "m"}
    assert canonical(given_) == expected
    assert list(canonical(given_)) == sorted(expected)


@pytest.mark.parametrize(
    ("given_", "what"),
    [
        ({"model": "m", "max-num-seqs": 1, "max_num_seqs": 1}, "max_num_seqs: is given twice"),
        ({"model": "m", "x": True, "no-x": True}, "no-x: is given twice"),
        ({"model": "m", "no-x": False}, "no-x: is dropped by vLLM unless it is true; write x: true"),
        ({"model": "m", "no-x": 3}, "no-x: is dropped by vLLM unless it is true"),
        ({"max-num-seqs": 1}, "model: is missing"),
        ({"model": "m", "config": "x.yaml"}, "config: is the file itself"),
        ({"model": "m", "compilation-config.level": 3}, "write `compilation-config: {level: …}`"),
        ({"model": "m", "--port": 3}, "without the dashes before it"),
        ({"model": "m", "middleware": []}, "an empty list, which vLLM drops"),
        ({"model": "m", "middleware": [True]}, "write anything else as a text that holds JSON"),
        ({"model": "m", "lora-modules": [{"name": "a"}]}, "write anything else as a text that holds JSON"),
        ({"model": "m", "cpu-offload-gb": -0.5}, "-0.5 cannot stand"),
        ({"model": "m", "cpu-offload-gb": float("nan")}, "nan cannot stand"),
        ({"model": "m", "override": {"a": [float("inf")]}}, "infinity"),
        ({"model": "-m"}, "begins with a dash"),
        ({"model": "m", "served-model-name": ["a", "-b"]}, "begins with a dash"),
        ({"model": "m", "api-key": "sesame"}, "api-key: holds a secret"),
        ({"model": "m", "load": {"hf_token": "x"}}, "load: holds a secret"),
        ({"model": "https://me:sesame@host/m"}, "model: holds a secret"),
    ],
)
def test_what_a_file_cannot_say_is_refused(given_, what):
    with pytest.raises(ConfigError) as refused:
        canonical(given_)
    assert what in str(refused.value)
    assert "sesame" not in str(refused.value)


def test_a_rerankers_words_for_yes_and_no_are_no_secret():
    overrides = {"classifier_from_token": ["no", "yes"], "is_original_qwen3_reranker": True}
    assert '"classifier_from_token": ["no", "yes"]' in dumped({"model": "m", "hf_overrides": overrides})
    with pytest.raises(ConfigError, match="holds a secret"):
        dumped({"model": "m", "hf_overrides": {**overrides, "classifier_token": "sesame"}})


def test_every_mistake_of_a_file_is_told_with_its_line(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text("model: m\nmiddleware: []\nenable-x: yes\nno-y: false\nport: 1\nport: 2\n")
    with pytest.raises(ConfigError) as refused:
        loaded(path)
    told = sorted(line.removeprefix(f"{path}:")[0] for line in refused.value.mistakes)
    assert told == ["2", "3", "4", "6"]


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text("- model\n")
    with pytest.raises(ConfigError, match=r"base.yaml:1: is no mapping"):
        loaded(path)


texts = st.text(max_size=8).filter(lambda text: not text.startswith("-"))
fractions = st.floats(min_value=0, allow_infinity=False)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
values = (
    st.booleans()
    | st.integers(-1, 2**40)
    | fractions
    | texts
    | st.lists(texts | st.integers(-1, 99) | fractions, min_size=1, max_size=3)
    | st.dictionaries(st.text(max_size=4), json_values, max_size=3)
)
names = st.from_regex(r"[a-z][a-z0-9]{0,4}(_[a-z0-9]{1,4}){0,2}", fullmatch=True).filter(
    lambda name: not name.startswith("no_") and name not in {"config", "help"}
)


@given(st.dictionaries(names, values, max_size=4))
def test_whatever_is_written_is_read_back_the_same_by_us_and_by_yaml(tmp_path_factory, arguments):
    wanted = {"model": "m", **arguments}
    try:
        text = dumped(wanted)
    except ConfigError as refused:
        assert "holds a secret" in str(refused)  # noqa: PT017 (what random texts may look like)
        return
    assert text.isascii()
    path = tmp_path_factory.mktemp("any") / "x.yaml"
    path.write_text(text)
    assert loaded(path) == canonical(wanted)
    assert dumped(loaded(path)) == text
    by_yaml = {key.replace("-", "_"): value for key, value in yaml.safe_load(text).items()}
    expected = {f"no_{k}" if v is False else k: v is False or v for k, v in wanted.items()}
    assert by_yaml == expected


def test_a_small_fraction_stays_a_number_in_yaml():
    text = dumped({"model": "m", "hf_overrides": {"rms_norm_eps": 1e-06}})
    assert yaml.safe_load(text)["hf-overrides"] == {"rms_norm_eps": 1e-06}


# ---- the folder


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "settings" / "vllm"


def test_a_revision_is_a_file_that_all_may_read_and_none_may_write(folder):
    before = os.umask(0o077)
    try:
        path = Revisions("vllm", folder).write(revision(7, max_num_seqs=64))
    finally:
        os.umask(before)
    assert path == folder / "rev-0007.yaml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert {stat.S_IMODE(each.stat().st_mode) for each in (folder, folder.parent)} == {0o755}
    assert loaded(path) == {"max_num_seqs": 64, "model": "m"}
    assert path.read_text().startswith("# Revision 7 of vllm")


def test_a_revision_is_written_once_and_never_changed(folder):
    kept = Revisions("vllm", folder)
    path = kept.write(revision(1))
    first = path.stat()
    assert kept.write(revision(1)) == path
    assert path.stat().st_ino == first.st_ino
    with pytest.raises(ServerError, match="a revision never changes") as refused:
        kept.write(revision(1, max_num_seqs=9))
    assert refused.value.permanent
    assert loaded(path) == {"model": "m"}


def test_what_vllm_would_not_read_is_not_written(folder):
    with pytest.raises(ServerError, match="write revision 1 of vllm: x: is an empty list") as refused:
        Revisions("vllm", folder).write(revision(1, x=[]))
    assert refused.value.permanent
    assert not folder.exists()


def test_the_link_chooses_and_stays_right_when_the_folder_moves(folder):
    kept = Revisions("vllm", folder)
    assert kept.current() is None
    for number in (1, 2, 12345):
        kept.write(revision(number))
    for number in (1, 2, 2, 12345, 1):
        kept.swap(number)
        assert kept.current() == number
    moved = folder.rename(folder.parent / "elsewhere")
    assert Revisions("vllm", moved).current() == 1
    assert (moved / "current.yaml").readlink().as_posix() == "rev-0001.yaml"


def test_a_revision_that_is_not_there_is_not_chosen(folder):
    kept = Revisions("vllm", folder)
    kept.write(revision(1))
    kept.swap(1)
    with pytest.raises(ServerError, match="there is no such file") as refused:
        kept.swap(2)
    assert refused.value.permanent
    assert kept.current() == 1


def test_a_persons_own_file_is_not_overwritten_and_their_link_is_no_revision(folder):
    kept = Revisions("vllm", folder)
    kept.write(revision(1))
    own = folder / "current.yaml"
    own.write_text("model: theirs\n")
    assert kept.current() is None
    with pytest.raises(ServerError, match="config set vllm --file"):
        kept.swap(1)
    assert own.read_text() == "model: theirs\n"
    own.rename(folder / "base.yaml")
    own.symlink_to("base.yaml")
    assert kept.current() is None
    kept.swap(1)
    assert kept.current() == 1


def test_a_link_to_a_revision_that_is_gone_is_none(folder):
    kept = Revisions("vllm", folder)
    kept.write(revision(1))
    kept.swap(1)
    kept.path(1).unlink()
    assert kept.current() is None


def test_a_folder_that_is_none_is_told_with_its_cure(tmp_path):
    (tmp_path / "file").write_text("")
    kept = Revisions("vllm", tmp_path / "file" / "vllm")
    asks = (lambda: kept.write(revision(1)), kept.current, lambda: kept.swap(1))
    for ask in asks[:2]:
        with pytest.raises(ServerError, match=r"name a folder in servers\[\].revisions") as refused:
            ask()
        assert refused.value.permanent
    with pytest.raises(ServerError, match="there is no such file"):
        asks[2]()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_told_with_its_cure(folder):
    kept = Revisions("vllm", folder)
    kept.write(revision(1))
    folder.chmod(0o555)
    for ask in (lambda: kept.write(revision(2)), lambda: kept.swap(1)):
        with pytest.raises(ServerError, match="let the user that gpuwatch runs as write there") as refused:
            ask()
        assert refused.value.permanent
    folder.chmod(0o755)


class Killed(BaseException):
    """As if the process ended here."""


def killed_at(nth, deed):
    """Do a deed and be killed before the nth line of revisions.py; whether it came so far."""
    lines = itertools.count(1)

    def trace(frame, event, _):
        if frame.f_code.co_filename != revisions.__file__:
            return None
        if event == "line" and next(lines) == nth:
            raise Killed
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        deed()
    except Killed:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.filterwarnings(  # who is killed closes no file
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_whoever_is_killed_at_any_line_leaves_one_of_two_revisions_and_goes_on(tmp_path):
    for nth in itertools.count(1):
        folder = tmp_path / str(nth) / "vllm"
        kept = Revisions("vllm", folder)
        kept.write(revision(1))
        kept.swap(1)

        def change(kept=kept):
            kept.write(revision(2))
            kept.swap(2)

        was_killed = killed_at(nth, change)
        assert kept.current() in {1, 2}
        chosen = folder / "current.yaml"
        assert loaded(chosen) == {"model": "m"}, "never half a file"
        change()
        assert kept.current() == 2
        assert sorted(path.name for path in folder.iterdir()) == [
            "current.yaml",
            "rev-0001.yaml",
            "rev-0002.yaml",
        ]
        if not was_killed:
            break
    assert nth > 30


def test_what_a_kill_left_half_written_is_thrown_away(folder):
    kept = Revisions("vllm", folder)
    folder.mkdir(parents=True)
    half = folder / ".rev-0001.yaml.new"
    half.write_text("model: ha")
    half.chmod(0o444)
    (folder / ".current.yaml.new").symlink_to("rev-0009.yaml")
    kept.write(revision(1))
    kept.swap(1)
    assert kept.current() == 1
    assert loaded(folder / "current.yaml") == {"model": "m"}
    assert not half.exists()


# ---- the interpreter


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/opt/vllm/bin/python3", "/opt/vllm/bin/vllm", "serve"], "/opt/vllm/bin/python3"),
        (["/opt/v/bin/python3.12", "-m", "vllm.entrypoints.openai.api_server"], "/opt/v/bin/python3.12"),
        (["python3", "/opt/vllm/bin/vllm", "serve"], "/opt/vllm/bin/python"),
        (["/opt/vllm/bin/vllm", "serve"], "/opt/vllm/bin/python"),
        (["python3", "-m", "vllm.entrypoints.cli.main"], None),
        (["VLLM::APIServer_0"], None),
        (["/usr/bin/docker", "run", "/opt/vllm/bin/vllm"], None),
        ([], None),
    ],
)
def test_vllms_interpreter_is_told_by_the_command_line(words, expected):
    found = interpreter_of(words)
    assert (found and str(found)) == expected


def test_the_check_runs_a_script_that_is_there(tmp_path):
    python, script, option, file = check_command(tmp_path / "python", tmp_path / "rev-0001.yaml")
    assert (python, option, file) == (str(tmp_path / "python"), "--config", str(tmp_path / "rev-0001.yaml"))
    assert Path(script).is_absolute()
    assert Path(script).is_file()


# ---- what each came to


def start(began_min, number=1, healthy_min=None, ended_min=None, **more):
    outcome = StartOutcome.FAILED if healthy_min is None else StartOutcome.HEALTHY
    at_ms = lambda minute: None if minute is None else NOON + minute * MINUTE  # noqa: E731
    return ServerStart(
        server="vllm",
        began_at_ms=at_ms(began_min),
        outcome=more.pop("outcome", outcome),
        healthy_at_ms=at_ms(healthy_min),
        ended_at_ms=at_ms(ended_min),
        revision=number,
        **more,
    )


def came_to(*starts, now_min=120, querier=None):
    return measured("vllm", starts, querier, NOON + now_min * MINUTE, good_after_ms=10 * MINUTE)


def test_a_revision_that_served_ten_minutes_is_good_and_one_that_died_sooner_is_not():
    found = came_to(start(0, 1, 2, 12), start(20, 2, 22, 31))
    assert (found[1].good_until_ms is None, found[1].uptime_ms) == (False, 10 * MINUTE)
    assert (found[2].good_until_ms, found[2].uptime_ms) == (None, 9 * MINUTE)
    assert last_good(found) == 1


def test_a_revision_that_serves_now_is_good_at_once():
    assert came_to(start(0, 1, 2), now_min=3)[1].good_until_ms
    starting = start(0, 1, outcome=StartOutcome.STARTING)
    assert came_to(starting, now_min=3)[1].good_until_ms is None


def test_a_life_whose_end_nobody_saw_ended_when_the_next_began():
    found = came_to(start(0, 1, 2), start(7, 2, 9))
    assert (found[1].good_until_ms, found[1].uptime_ms) == (None, 5 * MINUTE)


def test_failures_are_counted_before_and_after_health_and_the_newest_is_named():
    found = came_to(
        start(0, 3, ended_min=1, failure="bad_argument"),
        start(2, 3, 4, 6, failure="engine_died"),
        start(7, 3, 9, 40),
    )
    assert (found[3].starts, found[3].failures, found[3].failure) == (3, 2, "engine_died")


def test_the_last_good_one_before_another_is_told_and_none_where_none_was():
    found = came_to(start(0, 1, 2, 30), start(31, 2, 33, 60), start(61, 3, 63))
    assert [last_good(found, before=n) for n in (4, 3, 2, 1)] == [3, 2, 1, None]
    assert last_good({}) is None


def test_the_last_good_one_is_that_which_served_last_not_the_newest():
    assert last_good(came_to(start(0, 2, 2, 30), start(31, 1, 33, 60), start(61, 3, 63, 64))) == 1


def test_starts_without_a_revision_count_for_none():
    assert came_to(start(0, None, 2, 30)) == {}


@pytest.fixture
def series():
    """Two hours: 10 tokens/s, then 100 tokens/s in the last ten minutes; each request took 0.2 to 0.3 s."""
    store = Store(window_ms=3 * HOUR)
    at = {"server": "vllm"}
    memory = [Labels.of("gpu_process_memory_used_bytes", **at, gpu=gpu, process="w") for gpu in "01"]
    tokens = Labels.of("vllm:generation_tokens_total", **at)
    buckets = [
        Labels.of("vllm:time_to_first_token_seconds_bucket", **at, le=le) for le in ("0.2", "0.3", "+Inf")
    ]
    total = 0.0
    for second in range(0, 7200, 10):
        total += 10 * (100 if second >= 6600 else 10)
        used = [50e9 if second == 5000 else 40e9, 20e9]
        values = [*used, total, 0.0, float(second), float(second)]
        store.append("vllm", NOON + second * 1000, [*memory, tokens, *buckets], values)
    yield store
    store.close()


def test_figures_are_of_the_last_hour_that_a_revision_served(series):
    one = came_to(start(0, 1, 1, kv_cache_tokens=5000), now_min=119, querier=series)[1]
    assert one.kv_cache_tokens == 5000
    assert one.healthy_after_ms == MINUTE
    assert one.peak_memory_bytes == 70_000_000_000
    assert one.best_minute_tokens_per_s == pytest.approx(100, rel=0.02)
    assert one.first_token_p95_s == pytest.approx(0.295)


def test_figures_of_a_revision_that_is_over_are_not_those_of_the_next(series):
    found = came_to(start(0, 1, 1, 60), start(60, 2, 61), now_min=119, querier=series)
    assert found[1].peak_memory_bytes == 60_000_000_000
    assert found[1].best_minute_tokens_per_s == pytest.approx(10, rel=0.02)
    assert found[2].best_minute_tokens_per_s == pytest.approx(100, rel=0.02)


def test_what_nothing_told_is_none(series):
    none = came_to(start(0, 1, 1), now_min=1, querier=series)[1]
    assert (none.peak_memory_bytes, none.first_token_p95_s) == (None, None)
    short = came_to(start(0, 1, 1), now_min=2, querier=series)[1]
    assert (short.peak_memory_bytes, short.best_minute_tokens_per_s) == (60_000_000_000, None)
    elsewhere = measured("other", [start(0, 1, 1)], series, NOON + HOUR, good_after_ms=HOUR)[1]
    assert (elsewhere.peak_memory_bytes, elsewhere.first_token_p95_s) == (None, None)


def test_one_line_says_an_argument():
    assert vllm_yaml.line("max_num_seqs", 64) == "max-num-seqs: 64"
    assert vllm_yaml.line("enforce_eager", False) == "no-enforce-eager: true"
