"""The check of settings in a real vLLM: what our files say arrives, and what it would not take is refused."""

import json
import subprocess

import pytest
from tests.acceptance import vllm_cpu

from gpuwatch.records import Revision
from gpuwatch.servers.revisions import Revisions, check_command

pytestmark = vllm_cpu.needed

GOOD = {
    "load_format": "dummy",
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "max_num_seqs": 16,
    "max_model_len": "1k",
    "max_logprobs": -1,
    "gpu_memory_utilization": 0.85,
    "middleware": ["a.B"],
    "served_model_name": ["m", "模型 \U0001f600"],
    "hf_overrides": {"rms_norm_eps": 1e-06, "use_cache": False},
    "allowed_origins": '["*"]',  # this option takes JSON
}


@pytest.fixture(scope="module")
def model():
    return str(vllm_cpu.tiny_model())


def answer_to(file):
    command = check_command(vllm_cpu.VENV / "bin" / "python", file)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    (line,) = done.stdout.splitlines()
    answer = json.loads(line)
    assert done.returncode == (0 if answer["ok"] else 1), done.stderr[-3000:]
    return answer


def test_what_a_revision_says_arrives(tmp_path, model):
    made = Revision(
        server="vllm", number=1, arguments={"model": model, **GOOD}, created_at_ms=0, by="a", why="good"
    )
    answer = answer_to(Revisions("vllm", tmp_path).write(made))
    print(answer)
    assert answer["ok"], answer
    assert "partial" not in answer
    resolved = answer["resolved"]
    assert (resolved["max_num_seqs"], resolved["max_model_len"]) == (16, 1000)
    assert (resolved["enable_prefix_caching"], resolved["gpu_memory_utilization"]) == (False, 0.85)


@pytest.mark.parametrize(
    ("text", "kind", "error"),
    [
        ("max-num-sequences: 4", "bad_argument", "unrecognized arguments: --max-num-sequences"),
        ("max-num-seqs: many", "bad_argument", "invalid int value: 'many'"),
        ("enable-prefix-caching: false", "ignored", "enable-prefix-caching"),
        ("middleware: [a.B, c.D]", "ignored", "middleware"),
        ("max-model-len: 99999", "bad_settings", "greater than the derived max_model_len"),
        ("max-num-seqs: 0", "bad_settings", "max_num_seqs: Input should be greater than or equal to 1"),
        ("quantization: nonsense", "bad_settings", "Unknown quantization method: nonsense"),
        ("gpu-memory-utilization: 1.5", "bad_settings", "less than or equal to 1"),
    ],
)
def test_what_it_would_not_take_is_refused(tmp_path, model, text, kind, error):
    file = tmp_path / "rev-0001.yaml"
    file.write_text(f"model: {model}\nload-format: dummy\n{text}\n")
    answer = answer_to(file)
    print(answer)
    assert (answer["ok"], answer["kind"]) == (False, kind)
    assert error in answer["error"]


def test_a_model_of_the_hub_that_is_not_here_is_no_refusal(tmp_path):
    file = tmp_path / "rev-0001.yaml"
    file.write_text("model: nobody/has-this-here\n")
    answer = answer_to(file)
    assert answer["ok"]
    assert "the model cannot be read here" in answer["partial"]
