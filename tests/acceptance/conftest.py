import pytest
from tests.acceptance import vllm_cpu


@pytest.fixture(scope="session")
def model():
    """A tiny model for a real vLLM server on CPUs."""
    return vllm_cpu.tiny_model()
