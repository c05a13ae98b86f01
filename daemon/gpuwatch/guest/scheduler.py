"""Caps the sequences that an engine runs and the tokens of a step; never for longer than a step.

Rule 1: until a limit is first asked for, nothing of vLLM's is touched; its module is never imported.
Rule 2: a cap holds inside one call of `schedule`, on the engine's own thread. Between two steps every value
is vLLM's, so there is nothing to give back when a limit is lifted, lapses, or this code fails.
Rule 3: a cap drains. It never is below what runs: the scheduler asserts that, and the engine would die of it.
Rule 4: a scheduler that looks other than those known is left alone, and what it lacks is said.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
import weakref
from contextlib import suppress
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

from .limits import HELD, NONE

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from .limits import Limits

_MODULE: Final = "vllm.v1.core.sched.scheduler"
_ENGINE_MODULE: Final = "vllm.v1.engine.core"
_ENGINE_FILE: Final = "vllm/v1/engine/core.py"
_ENGINE_LOOP: Final = "run_busy_loop"
_MARK: Final = "of_gpuwatch"
_ADMITS: Final = "max_num_active_reqs"  # since 0.32: what may start to run, apart from what may run
_RUNS: Final = "max_num_running_reqs"
_TOKENS: Final = "max_num_scheduled_tokens"
_PAUSED: Final = {"UNPAUSED": False, "PAUSED_NEW": True, "PAUSED_ALL": True}
_NOT_HERE: Final = "no engine of vLLM runs in this process"
_NOT_YET: Final = "no step of the engine was seen yet: ask again"
_Scheduler = Any  # vLLM's, of whatever version

# The schedulers of this process that were seen, with what each lacks for a limit, by the limit's name.
_SEEN: Final[weakref.WeakKeyDictionary[_Scheduler, dict[str, str]]] = weakref.WeakKeyDictionary()


def keep(limits: Limits, *, may_have_engine: bool) -> tuple[dict[str, int], dict[str, str]]:
    """Those limits that every engine here keeps from its next step on; the others, with the reason."""
    asked = limits.asked("running", "tokens")
    if not asked:
        return {}, {}
    seen = _schedulers()
    if not seen and not may_have_engine:
        return {}, dict.fromkeys(asked, _NOT_HERE)
    lacking = _lacking(seen)
    kept = {name: value for name, value in asked.items() if name not in lacking}
    if kept and (why_not := _wrap() or ("" if seen else _NOT_YET)):
        return {}, dict.fromkeys(asked, why_not) | lacking
    return kept, {name: lacking[name] for name in asked if name in lacking}


def figures() -> dict[str, Any]:
    """`engine`: requests `running` and `waiting`, `paused`, `limits` in force; nothing if none is known."""
    try:
        seen = _schedulers()
        return {"engine": _engine(seen)} if seen else {}
    except Exception:  # noqa: BLE001 (the other figures are worth having)
        return {}


def _engine(seen: list[_Scheduler]) -> dict[str, Any]:
    counts = [_counts(scheduler) for scheduler in seen]
    paused = {_PAUSED.get(getattr(getattr(s, "_pause_state", None), "name", "")) for s in seen}
    lacking = _lacking(seen) if _is_wrapped() else {"running": "", "tokens": ""}
    kept = HELD.in_force().asked("running", "tokens")
    return {
        "running": sum(running for running, _ in counts),
        "waiting": sum(waiting for _, waiting in counts),
        "paused": paused.pop() if len(paused) == 1 else None,
        "limits": {name: value for name, value in kept.items() if name not in lacking},
    }


def _counts(scheduler: _Scheduler) -> tuple[int, int]:
    """Requests that run, and that wait."""
    counted = getattr(scheduler, "get_request_counts", None)
    running, waiting = counted() if counted else (len(scheduler.running), len(scheduler.waiting))
    return int(running), int(waiting)


# -- which schedulers there are ----------------------------------------------------------------------


def _schedulers() -> list[_Scheduler]:
    """Those that made a step under a limit, or that the main thread works for."""
    if not _SEEN and (scheduler := _of_main_thread()) is not None:
        _lacks(scheduler)
    return list(_SEEN)


def _of_main_thread() -> _Scheduler | None:
    """The scheduler of the engine whose loop the main thread is in.

    To look at the variables of another thread's frame is to copy them, and the frame keeps the copy. Only the
    loop's frame is looked at: it lives as long as the engine, and its one variable is the engine.
    """
    if _ENGINE_MODULE not in sys.modules:
        return None
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001 (documented)
    while frame is not None:
        code = frame.f_code
        if code.co_name == _ENGINE_LOOP and code.co_filename.endswith(_ENGINE_FILE):
            return getattr(frame.f_locals.get("self"), "scheduler", None)
        frame = frame.f_back
    return None


# -- what a scheduler lacks --------------------------------------------------------------------------


def _lacking(schedulers: list[_Scheduler]) -> dict[str, str]:
    """What one of them lacks, all of them lack: there is one answer for the process."""
    return {name: why for scheduler in schedulers for name, why in _lacks(scheduler).items()}


def _lacks(scheduler: _Scheduler) -> dict[str, str]:
    """Looked up once: all of it is a matter of how the server was started."""
    lacks = _SEEN.get(scheduler)
    if lacks is None:
        lacks = _SEEN[scheduler] = {name: why for name in _REFUSALS if (why := _why_not(scheduler, name))}
    return lacks


def _why_not(scheduler: _Scheduler, name: str) -> str:
    kind = type(scheduler)
    if kind.schedule is not getattr(sys.modules.get(_MODULE), "Scheduler", kind).schedule:
        return f"{kind.__name__} has a schedule() of its own"
    try:
        return _REFUSALS[name](scheduler)
    except Exception as error:  # noqa: BLE001 (it is of no version that is known)
        return f"this vLLM's scheduler is not known: {error}"


def _why_no_running(scheduler: _Scheduler) -> str:
    _running_cap(scheduler, 0)  # fails on what is not known
    return ""


def _why_no_tokens(scheduler: _Scheduler) -> str:
    """Where a request may need more tokens in one step than the cap leaves it, it would wait for ever."""
    _token_cap(scheduler, 1)  # fails on what is not known
    config = scheduler.scheduler_config
    if not config.enable_chunked_prefill:
        return "prompts are not split (chunked prefill is off): one longer than the cap would never start"
    if config.disable_chunked_mm_input and _whole(scheduler, "max_num_encoder_input_tokens"):
        return "images are not split (--disable-chunked-mm-input): one larger than the cap would never start"
    if scheduler.need_mamba_block_aligned_split:
        return "prompts are split at Mamba's blocks alone: a cap below one would hold them for ever"
    if getattr(scheduler.vllm_config.model_config, "is_diffusion", False):
        return "a diffusion model's step needs its whole canvas"
    return ""


_REFUSALS: Final = {"running": _why_no_running, "tokens": _why_no_tokens}


# -- the caps ----------------------------------------------------------------------------------------


def _running_cap(scheduler: _Scheduler, target: int) -> tuple[str, int, int]:
    if hasattr(scheduler, _ADMITS):
        most = _whole(scheduler, _ADMITS)
        return _ADMITS, most, min(most, target)
    most = _whole(scheduler, _RUNS)
    # Sessions that wait for input are counted by some versions that ask for equality, never for more.
    in_hand = len(scheduler.running) + getattr(scheduler, "num_waiting_for_streaming_input", 0)
    return _RUNS, most, min(most, max(target, in_hand))


def _token_cap(scheduler: _Scheduler, target: int) -> tuple[str, int, int]:
    most = _whole(scheduler, _TOKENS)
    decoding = len(scheduler.running) * (1 + _whole(scheduler, "num_spec_tokens"))
    # Beside them always a block of a prompt, which else would wait until all of them have ended.
    prompt = _whole(scheduler, "block_size") + getattr(scheduler, "num_prefill_lookahead", 0)
    return _TOKENS, most, min(most, max(target, decoding + prompt))


def _whole(owner: _Scheduler, name: str) -> int:
    value = getattr(owner, name)
    if type(value) is not int:
        raise TypeError(f"{name} is a {type(value).__name__}")
    return value


_CAPS: Final = {"running": _running_cap, "tokens": _token_cap}


# -- in the engine's thread --------------------------------------------------------------------------


def _is_wrapped() -> bool:
    scheduler_class = getattr(sys.modules.get(_MODULE), "Scheduler", None)
    return hasattr(getattr(scheduler_class, "schedule", None), _MARK)


def _wrap() -> str:
    """See to it that the class asks `_lower` before each step; empty, or why that cannot be."""
    scheduler_class = getattr(sys.modules.get(_MODULE), "Scheduler", None)
    schedule = getattr(scheduler_class, "schedule", None)
    if scheduler_class is None or not isinstance(schedule, FunctionType):
        return f"this process has no {_MODULE}.Scheduler with a schedule() in Python"
    if not hasattr(schedule, _MARK):
        scheduler_class.schedule = _capped(schedule)
    return ""


def _capped(schedule: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(schedule)
    def capped(self: _Scheduler, *args: object, **kwargs: object) -> object:
        limits = HELD.limits
        if limits is NONE:
            return schedule(self, *args, **kwargs)
        lowered = _lower(self, limits)
        try:
            return schedule(self, *args, **kwargs)
        finally:
            _restore(self, lowered)

    setattr(capped, _MARK, True)
    return capped


def _lower(scheduler: _Scheduler, limits: Limits) -> list[tuple[str, int, int]]:
    """What was changed: attribute, vLLM's value, ours. Raises nothing."""
    lowered: list[tuple[str, int, int]] = []
    with suppress(Exception):
        if time.monotonic() < limits.until_s:
            lacks = _lacks(scheduler)
            asked = limits.asked("running", "tokens")
            lowered += [_CAPS[name](scheduler, value) for name, value in asked.items() if name not in lacks]
        for name, _, value in lowered:
            setattr(scheduler, name, value)
    return lowered


def _restore(scheduler: _Scheduler, lowered: list[tuple[str, int, int]]) -> None:
    """Raises nothing; what vLLM itself changed meanwhile is its own."""
    with suppress(Exception):
        for name, was, value in lowered:
            if getattr(scheduler, name) == value:
                setattr(scheduler, name, was)
