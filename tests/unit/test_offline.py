"""The check of settings in vLLM's interpreter, with a made-up vLLM that reads files as the real one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpuwatch.servers.revisions import check_command

# What was measured of the real one: `false` and empty lists are dropped, null becomes a word, options that
# may be given several times take one value each, so that further ones become the model.
ARGPARSE = """
import argparse, json, yaml
class FlexibleArgumentParser(argparse.ArgumentParser):
    def parse_args(self, args):
        words = []
        for key, value in yaml.safe_load(open(args[2])).items():
            if isinstance(value, bool):
                words += ['--' + key] if value else []
            elif isinstance(value, list):
                words += ['--' + key, *map(str, value)] if value else []
            else:
                words += ['--' + key, json.dumps(value) if isinstance(value, dict) else str(value)]
        return super().parse_args([args[0], *(w.replace('_', '-') if w[:2] == '--' else w for w in words)])
"""
CLI_ARGS = """
import argparse, json
print('a line of the log')
def make_arg_parser(parser):
    parser.add_argument('model_tag', nargs='?')
    parser.add_argument('--model', default='default')
    parser.add_argument('--max-num-seqs', type=int)
    parser.add_argument('--max-model-len', type=lambda text: int(text.replace('k', '000')))
    parser.add_argument('--gpu-memory-utilization', type=float, default=0.92)
    parser.add_argument('--enable-prefix-caching', action=argparse.BooleanOptionalAction)
    parser.add_argument('--middleware', action='append', default=[])
    parser.add_argument('--served-model-name', nargs='+')
    parser.add_argument('--overrides', type=json.loads)
    return parser
def validate_parsed_serve_args(args):
    if args.max_num_seqs == 13:
        raise TypeError('Error: 13 needs luck')
"""
ENGINE = """
from types import SimpleNamespace as N
class AsyncEngineArgs(N):
    @classmethod
    def from_cli_args(cls, args):
        return cls(**vars(args))
    def create_engine_config(self, usage_context):
        assert usage_context == 'server'
        if self.model == 'no/device':
            raise RuntimeError('Failed to infer device type, please set it')
        if self.model == 'not/cached':
            raise OSError('offline, and nothing is cached')
        if self.model.startswith('/'):
            raise ValueError('Repo id must be in the form')
        if self.max_num_seqs == 0:
            raise ValueError('1 error\\nmax_num_seqs must be 1 or more')
        return N(
            scheduler_config=N(max_num_seqs=self.max_num_seqs or 256, max_num_batched_tokens=2048),
            model_config=N(max_model_len=self.max_model_len or 4096, dtype=complex, quantization=None),
            cache_config=N(gpu_memory_utilization=self.gpu_memory_utilization),
            parallel_config=N(),
        )
"""
PLACES = ("common", "launchers", "openai")


def make_vllm(folder, place="launchers"):
    """A package `vllm` whose parser lives where it lived in one of its versions."""
    entry = f"entrypoints/{place}"
    files = {
        "__init__.py": "__version__ = '0.32.0'\n",
        "entrypoints/__init__.py": "",
        f"{entry}/__init__.py": "",
        f"{entry}/cli_args.py": CLI_ARGS,
        "engine/__init__.py": "",
        # Names that stand beside the script too: here those of the path must win.
        "engine/arg_utils.py": "import limits, wire\nassert limits.WHOSE == wire.WHOSE == 'theirs'\n"
        + ENGINE,
        "usage/__init__.py": "",
        "usage/usage_lib.py": "class UsageContext:\n    OPENAI_API_SERVER = 'server'\n",
        "utils/__init__.py": ARGPARSE if place == "openai" else "",
    }
    if place != "openai":
        files["utils/argparse_utils.py"] = ARGPARSE
    for name, text in files.items():
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("limits", "wire"):
        (folder / f"{name}.py").write_text("WHOSE = 'theirs'\n")


@pytest.fixture
def check(tmp_path):
    make_vllm(tmp_path / "lib")
    return lambda text: checked(tmp_path, text)


def checked(folder, text, status=None):
    """The answer, which is the only line on standard output."""
    file = folder / "rev-0001.yaml"
    file.write_text(text)
    env = {"PYTHONPATH": str(folder / "lib"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = check_command(Path(sys.executable), file)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    (line,) = done.stdout.splitlines()
    answer = json.loads(line)
    assert done.returncode == (0 if answer["ok"] else 1), done.stderr
    return answer


GOOD = """\
model: m
max-num-seqs: 16
max_model_len: 2k
no-enable-prefix-caching: true
middleware: [a.B]
served-model-name: [a, b]
gpu-memory-utilization: 0.92
overrides: {"a": [1, 2.5]}
"""


@pytest.mark.parametrize("place", PLACES)
def test_good_settings_are_taken_in_every_version_with_what_vllm_makes_of_them(tmp_path, place):
    make_vllm(tmp_path / "lib", place)
    answer = checked(tmp_path, GOOD)
    assert (answer["ok"], answer["version"], "partial" in answer) == (True, "0.32.0", False)
    resolved = answer["resolved"]
    assert (resolved["max_num_seqs"], resolved["max_num_batched_tokens"]) == (16, 2048)
    assert (resolved["max_model_len"], resolved["dtype"]) == (2000, "<class 'complex'>")
    assert (resolved["quantization"], resolved["block_size"]) == (None, None)


@pytest.mark.parametrize(
    ("text", "kind", "error"),
    [
        ("model: m\nmax-num-sequences: 4\n", "bad_argument", "unrecognized arguments: --max-num-sequences"),
        (
            "model: m\nmax-num-seqs: many\n",
            "bad_argument",
            "argument --max-num-seqs: invalid int value: 'many'",
        ),
        ("model: m\nmax-num-seqs: null\n", "bad_argument", "invalid int value: 'None'"),
        ("model: m\nenable-prefix-caching: false\n", "ignored", "as they stand: enable-prefix-caching"),
        ("model: m\nmiddleware: [a.B, c.D]\n", "ignored", "as they stand: middleware"),
        ("model: m\nmiddleware: []\nserved-model-name: []\n", "ignored", "served-model-name"),
        ("model: m\nmax-num-seqs: 4\nmax_num_seqs: 5\n", "ignored", "as they stand: max-num-seqs"),
        ("model: m\nmax-num-seqs: 0\n", "bad_settings", "max_num_seqs must be 1 or more"),
        ("model: m\nmax-num-seqs: 13\n", "bad_settings", "Error: 13 needs luck"),
        ("", "bad_file", "is no mapping"),
        ("a: [\n", "bad_file", "is no YAML"),
        ("- a\n", "bad_file", "is no mapping"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_with_the_reason(check, text, kind, error):
    answer = check(text)
    assert (answer["ok"], answer["kind"]) == (False, kind)
    assert error in answer["error"]


@pytest.mark.parametrize(
    ("model", "partial"),
    [
        ("no/device", "Failed to infer device type"),
        ("not/cached", "the model cannot be read here: offline"),
        ("/nobody/sees/this", "the model cannot be read here: Repo id"),
    ],
)
def test_what_this_user_or_host_cannot_see_is_no_refusal(check, model, partial):
    answer = check(f"model: {model}\nmax-num-seqs: 4\n")
    assert (answer["ok"], answer["resolved"]) == (True, {})
    assert answer["partial"].startswith(partial)


def test_a_model_that_is_not_in_a_folder_that_is_seen_is_a_refusal(check, tmp_path):
    assert check(f"model: {tmp_path}/missing\n")["kind"] == "bad_settings"


def test_the_answer_is_the_last_line_where_all_goes_to_one_file(check, tmp_path):
    engine = tmp_path / "lib/vllm/engine/arg_utils.py"
    engine.write_text("import atexit\nprint('a log')\natexit.register(print, 'bye')\n" + engine.read_text())
    file = tmp_path / "rev-0001.yaml"
    file.write_text(GOOD)
    command = check_command(Path(sys.executable), file)
    env = {"PYTHONPATH": str(tmp_path / "lib")}
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    *before, last = done.stdout.splitlines()
    assert "a log" in before
    assert json.loads(last)["ok"]


def test_without_vllm_it_says_so(tmp_path):
    answer = checked(tmp_path, GOOD)
    assert answer["kind"] == "no_vllm"
    assert f"{sys.executable} cannot import vllm: No module named 'vllm'" in answer["error"]


def test_a_vllm_whose_parser_is_elsewhere_is_no_refusal_of_the_settings(tmp_path):
    make_vllm(tmp_path / "lib", "nowhere")
    assert checked(tmp_path, GOOD)["kind"] == "no_vllm"


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    make_vllm(tmp_path / "lib")
    command = check_command(Path(sys.executable), tmp_path / "missing.yaml")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["kind"] == "bad_file"
