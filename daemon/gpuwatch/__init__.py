"""gpuwatch guards the GPUs of a host and the vLLM server on it. Start reading at `cycle.py`."""

__version__ = "0.1.0"
