"""Settings: every mistake at once, each with its file and line; nothing of YAML is a surprise."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuwatch import config
from gpuwatch.config import Duration
from gpuwatch.config.size import Size
from gpuwatch.errors import ConfigError
from gpuwatch.records import Mode

CASES = {
    "an unknown key is refused with the one that was meant": (
        "remediation:\n  mod: auto\n",
        ["2: remediation.mod: unknown key; did you mean 'mode'?"],
    ),
    "a key given twice is refused": ("host: a\nhost: b\n", ["2: host: is given twice"]),
    "yes is no number and no word": (
        "host: yes\n",
        ["1: host: 'yes' may mean true or the word; write true, false or put quotes round it"],
    ),
    "a bare number is no duration": (
        "store: {retention: 5}\n",
        ["1: store.retention: 5 is no duration; write 500ms, 30s, 5m or 1h30m"],
    ),
    "a bare number is no size": (
        "store: {max_size: 2000000000}\n",
        ["1: store.max_size: 2000000000 is no size; write 512MiB or 2GiB"],
    ),
    "limits that could keep nothing are refused": (
        "store:\n  retention: 1h\n  max_size: 1MiB\n",
        [
            "2: store.retention: must be at least 2h, which rules may look back on",
            "3: store.max_size: must be at least 64MiB",
        ],
    ),
    "a password does not belong in the settings": (
        "store:\n  state_url: postgresql+psycopg://gpuwatch:secret@db/gpuwatch\n",
        ["2: store.state_url: holds a password; put the URL in a state_url_file"],
    ),
    "a mode that is none names those there are": (
        "remediation: {mode: automatic}\n",
        ["1: remediation.mode: 'automatic' is none of observe, approve, auto"],
    ),
    "a server needs a name": (
        "servers:\n  - url: http://x\n",
        ["2: servers[0]: has no 'name', which it needs"],
    ),
    "two servers need two names": (
        "servers:\n  - name: a\n  - name: a\n",
        ["3: servers[1].name: 'a' is there already"],
    ),
    "a supervisor is one thing": (
        "servers:\n  - name: a\n    supervisor: {}\n",
        ["3: servers[0].supervisor: needs exactly one of systemd, process, docker"],
    ),
    "a receiver is one thing": (
        "receivers:\n  - name: a\n",
        ["2: receivers[0]: needs exactly one of slack, dingtalk"],
    ),
    "a step that nobody knows is refused": (
        "policies:\n  - {name: p, match: {}, steps: [reboot]}\n",
        [f"2: policies[0].steps: unknown step 'reboot'; known: {', '.join(config.ACTIONS)}"],
    ),
    "all mistakes come at once": (
        "lang: fr\nservers:\n  - name: a b\n    url: ftp://x\n",
        [
            "3: servers[0].name: 'a b': use letters, digits, . _ -",
            "4: servers[0].url: 'ftp://x' is no http URL",
            "1: lang: 'fr' is not en or zh",
        ],
    ),
}


def load(tmp_path: Path, text: str):
    path = tmp_path / "gpuwatch.yaml"
    path.write_text(text)
    return config.load_settings(path)


@pytest.mark.parametrize(("text", "mistakes"), CASES.values(), ids=CASES)
def test_a_mistake_is_told_with_its_place(tmp_path, text, mistakes):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert [m.removeprefix(f"{tmp_path}/gpuwatch.yaml:") for m in error.value.mistakes] == mistakes


def test_what_is_no_yaml_is_told_with_line_and_column(tmp_path):
    with pytest.raises(ConfigError, match=r"gpuwatch.yaml:2:\d+: is no YAML"):
        load(tmp_path, "a: [1\nb: 2\n")


def test_what_is_nested_without_end_is_refused_and_breaks_nothing(tmp_path):
    with pytest.raises(
        ConfigError, match=r"gpuwatch.yaml:1:\d+: is no YAML: it is nested deeper than 32 levels"
    ):
        load(tmp_path, "servers: " + "[" * 100_000)


def test_a_missing_file_is_told_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        config.load_settings(tmp_path / "none.yaml")


def test_an_empty_file_gives_the_defaults(tmp_path):
    settings = load(tmp_path, "")
    assert settings.remediation.mode is Mode.OBSERVE
    names = [policy.name for policy in settings.policies]
    assert names == ["restart", "reconfigure", "return", "limit", "tell"]


def test_no_setting_touches_a_server_unless_it_says_so():
    assert config.load_settings(None).remediation.mode is Mode.OBSERVE


def test_the_settings_shown_hold_no_secret_only_where_it_is(tmp_path):
    (tmp_path / "slack").write_text("https://hooks.slack.com/services/T0/B0/secret")
    settings = load(tmp_path, f"receivers:\n  - {{name: s, slack: {{url_file: {tmp_path}/slack}}}}\n")
    assert "hooks.slack.com" not in str(config.shown(settings))


@given(st.integers(min_value=0, max_value=10**13))
def test_a_duration_is_read_back_as_it_is_written(ms):
    assert Duration.parse(str(Duration(ms))) == ms


@given(st.integers(min_value=0, max_value=2**50))
def test_a_size_is_read_back_as_it_is_written(size_bytes):
    assert Size.parse(str(Size(size_bytes))) == size_bytes


def test_the_shipped_rules_are_found_and_right():
    settings = config.load_settings(None)
    assert len(config.load_rules(config.rule_paths(settings))) >= 5
