"""A scheduler in place of vLLM's: its gates and its assertions, as old and as new versions have them.

`install()` puts it where vLLM's stands, so that the guest finds it there. Nothing of vLLM is imported.
"""

import enum
import sys
import types

PauseState = enum.IntEnum("PauseState", [("UNPAUSED", 0), ("PAUSED_NEW", 1), ("PAUSED_ALL", 2)])


class Request:
    """`prompt` tokens to compute, then one token a step until there are `most`."""

    def __init__(self, prompt=1, most=3):
        self.todo, self.left = prompt, most


class _Config:
    max_num_batched_tokens = 8192
    enable_chunked_prefill = True
    disable_chunked_mm_input = False


class Scheduler:
    """As of 0.20 to 0.24: one number is the gate and is asserted; the gate asks for equality."""

    def __init__(self, most=8, tokens=8192):
        self.running, self.waiting, self.finished = [], [], []
        self.max_num_running_reqs = most
        self.max_num_scheduled_tokens = tokens
        self.num_waiting_for_streaming_input = 0
        self.num_spec_tokens = 0
        self.block_size = 16
        self.max_num_encoder_input_tokens = 0
        self.need_mamba_block_aligned_split = False
        self.scheduler_config = _Config()
        self.vllm_config = types.SimpleNamespace(model_config=types.SimpleNamespace())
        self._pause_state = PauseState.UNPAUSED

    def add(self, *requests):
        self.waiting += requests

    def may_admit(self):
        return len(self.running) != self.max_num_running_reqs

    def schedule(self, throttle_prefills=False):
        """The tokens that each request is given."""
        budget, given = self.max_num_scheduled_tokens, {}
        for request in self.running:
            budget -= self._give(request, budget, given)
        while self.waiting and budget > 0 and self.may_admit():
            self.running.append(self.waiting.pop(0))
            budget -= self._give(self.running[-1], budget, given)
        assert sum(given.values()) <= self.max_num_scheduled_tokens
        assert len(self.running) <= self.max_num_running_reqs
        return given

    def _give(self, request, budget, given):
        given[request] = min(max(request.todo, 1 + self.num_spec_tokens), budget)
        return given[request]

    def step(self):
        """One of the engine's steps; the tokens that were computed in it."""
        given = self.schedule(throttle_prefills=False)
        for request, tokens in given.items():
            request.todo -= min(tokens, request.todo)
            request.left -= not request.todo and tokens > 0
        self.finished += [request for request in self.running if request.left <= 0]
        self.running = [request for request in self.running if request.left > 0]
        return sum(given.values())


class ApartScheduler(Scheduler):
    """As of 0.32: what may start is a number of its own."""

    def __init__(self, most=8, tokens=8192):
        super().__init__(most, tokens)
        self.max_num_active_reqs = most

    def may_admit(self):
        return len(self.running) + self.num_waiting_for_streaming_input < self.max_num_active_reqs

    def get_request_counts(self):
        return len(self.running), len(self.waiting)


def install(scheduler_class=Scheduler):
    """Where vLLM has its own; the module."""
    for name in ("vllm", "vllm.v1", "vllm.v1.core", "vllm.v1.core.sched"):
        sys.modules.setdefault(name, types.ModuleType(name))
    module = sys.modules["vllm.v1.core.sched.scheduler"] = types.ModuleType("vllm.v1.core.sched.scheduler")
    module.Scheduler = scheduler_class
    return module
