"""A real vLLM server without GPU: its environment, its model, and what a test says that needs it."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT.parent / "shared" / "tools" / "vllm_cpu.sh"
BUILD = Path(os.environ.get("GPUWATCH_VLLM_BUILD", ROOT / "build" / "vllm"))
VENV = Path(os.environ.get("VENV", BUILD / "venv"))

needed = [
    pytest.mark.acceptance,
    pytest.mark.shared,
    pytest.mark.timeout(4000),
    pytest.mark.skipif(not TOOL.exists(), reason="needs ../shared/tools/vllm_cpu.sh"),
]


def shown_too_by(test):
    """For a test that takes long, and that GPUWATCH_BRIEF leaves out, since another shows much the same."""
    return pytest.mark.skipif("GPUWATCH_BRIEF" in os.environ, reason=f"brief: {test} shows it too")


def tiny_model():
    """The folder of the model; it and vLLM are installed first if they are not there."""
    if not (VENV / "bin" / "vllm").exists():
        VENV.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["bash", TOOL, "install", VENV], check=True, timeout=900)
    if not (BUILD / "models").exists():
        env = {**os.environ, "VENV": str(VENV)}
        subprocess.run(["bash", TOOL, "model", BUILD / "models"], check=True, timeout=300, env=env)
    return BUILD / "models" / "tiny"
