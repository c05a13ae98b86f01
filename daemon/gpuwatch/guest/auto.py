"""`import gpuwatch_guest.auto` in any PyTorch program does what vLLM does by itself: begins the guest."""

from . import register

register()
