"""What each action of a policy is made of: its class, its steps, and how they are taken back. Pure.

Never decides whether an action is taken; `steps` says how each step is judged.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from gpuwatch.records import ActionClass, Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gpuwatch.remediation.situation import Limits

_CAPTURE_WITHIN_MS: Final = 60_000
_CHECK_WITHIN_MS: Final = 120_000  # vLLM's imports take 6 s to 10 s where a core is free
_SWAP_WITHIN_MS: Final = 30_000
_CANARY_WITHIN_MS: Final = 180_000  # the first step compiles
_OPEN_WITHIN_MS: Final = 60_000
_ASK_WITHIN_MS: Final = 60_000  # what one answer of a guest or a route does
_SLEEP_WITHIN_MS: Final = 120_000  # 20 s on two H200

Steps: TypeAlias = tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What steps are made with; spans in milliseconds.

    `limit` is in requests; `command` is an operator's own, program and arguments; `before` and `after` are
    revisions, which `reconfigure` alone needs.
    """

    limits: Limits
    limit: int = 0
    command: tuple[str, ...] = ()
    command_within_ms: int = 60_000
    before: int | None = None
    after: int | None = None


Maker: TypeAlias = Callable[[Figures], Steps]


def _nothing(_: Figures) -> Steps:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What a policy may name.

    `closing` are the steps that end it, after those of all other actions of the plan: what was shut is
    opened again. `undo` takes back whatever part of `steps` was done.
    """

    kind: ActionClass
    steps: Maker
    closing: Maker = _nothing
    undo: Maker = _nothing


def expanded(actions: Sequence[str], figures: Figures) -> tuple[Steps, Steps]:
    """The steps of a plan of these actions, in their order, and its undo, which begins with the last one's.

    KeyError for an action that `config.ACTIONS` does not name; ValueError for `reconfigure` without both
    revisions.
    """
    known = [ACTIONS[name] for name in actions]
    steps = [step for action in known for step in action.steps(figures)]
    named = {step.action for step in steps}
    closing = _once(step for action in reversed(known) for step in action.closing(figures))
    undo = _once(step for action in reversed(known) for step in action.undo(figures))
    return (*steps, *(step for step in closing if step.action not in named)), undo


def kind_of(actions: Sequence[str]) -> ActionClass:
    """The class of a plan of these actions: that of the costliest."""
    return max((ACTIONS[name].kind for name in actions), key=list(ActionClass).index)


def _once(steps: Iterable[Step]) -> Steps:
    """Each step once, at its last place, with the arguments of all."""
    merged: dict[str, Step] = {}
    for step in steps:
        before = merged.pop(step.action, step)
        merged[step.action] = dataclasses.replace(step, args={**before.args, **step.args})
    return tuple(merged.values())


def _asked(action: str, within_ms: int = _ASK_WITHIN_MS) -> Maker:
    """That step alone."""
    return lambda _: (Step(action=action, within_ms=within_ms),)


_OPEN: Final = Step(action="open_door", within_ms=_OPEN_WITHIN_MS)
_CANARY: Final = Step(action="canary", within_ms=_CANARY_WITHIN_MS)


def _drain(f: Figures) -> Step:
    return Step(action="drain", within_ms=f.limits.drain_within_ms)


def _stop(f: Figures, **args: str) -> Step:
    return Step(action="stop", within_ms=f.limits.step_within_ms, args=args)


def _await_memory(f: Figures, **args: str) -> Step:
    return Step(action="await_memory", within_ms=f.limits.free_within_ms, args=args)


def _start(f: Figures, **args: str) -> Step:
    return Step(action="start", within_ms=f.limits.step_within_ms, args=args)


def _swap(revision: str) -> Step:
    return Step(action="swap", within_ms=_SWAP_WITHIN_MS, args={"revision": revision})


def _restarted(f: Figures) -> Steps:
    return _drain(f), _stop(f), _await_memory(f), _start(f), _CANARY, _OPEN


def _served_again(f: Figures) -> Steps:
    return _start(f), _OPEN


def _reconfigured(f: Figures) -> Steps:
    _, after = _revisions(f)
    check = Step(action="check", within_ms=_CHECK_WITHIN_MS, args={"revision": after})
    return check, _drain(f), _stop(f), _await_memory(f), _swap(after), _start(f), _CANARY, _OPEN


def _reverted(f: Figures) -> Steps:
    """A process that serves `before` is let run: `keep_revision`."""
    before, _ = _revisions(f)
    stop, await_memory = _stop(f, keep_revision=before), _await_memory(f, keep_revision=before)
    return _swap(before), stop, await_memory, _start(f, revision=before), _CANARY, _OPEN


def _revisions(f: Figures) -> tuple[str, str]:
    if f.before is None or f.after is None:
        raise ValueError(f"reconfigure needs two revisions, and has {f.before} and {f.after}")
    return str(f.before), str(f.after)


def _run(f: Figures) -> Steps:
    return (Step(action="run", within_ms=f.command_within_ms, args={"command": json.dumps(f.command)}),)


def _limiting(name: str) -> Action:
    """Held until its alert stays away, then lifted; `hold` names what is held, so that it can be renewed."""

    def steps(f: Figures) -> Steps:
        return (Step(action=name, within_ms=_ASK_WITHIN_MS, args={"limit": str(f.limit)}),)

    def closing(f: Figures) -> Steps:
        args = {"for_ms": str(int(f.limits.hold_for_ms)), name: str(f.limit)}
        within_ms = f.limits.hold_for_ms + f.limits.step_within_ms
        return (Step(action="hold", within_ms=within_ms, args=args), *_asked("lift")(f))

    return Action(kind=ActionClass.REVERSIBLE, steps=steps, closing=closing, undo=_asked("lift"))


def _slept(_: Figures) -> Steps:
    return tuple(Step(action=name, within_ms=_SLEEP_WITHIN_MS) for name in ("sleep", "wake"))


ACTIONS: Final[Mapping[str, Action]] = {
    "capture": Action(kind=ActionClass.REVERSIBLE, steps=_asked("capture", _CAPTURE_WITHIN_MS)),
    "release_cache": Action(kind=ActionClass.REVERSIBLE, steps=_asked("release_cache")),
    "reset_prefix_cache": Action(kind=ActionClass.REVERSIBLE, steps=_asked("reset_prefix_cache")),
    "limit_admission": _limiting("limit_admission"),
    "limit_running": _limiting("limit_running"),
    # These lose requests in hand, or nobody can tell what they do: as costly as a restart.
    "sleep_wake": Action(kind=ActionClass.RESTART, steps=_slept, undo=_asked("wake", _SLEEP_WITHIN_MS)),
    "drain": Action(
        kind=ActionClass.RESTART,
        steps=lambda f: (_drain(f),),
        closing=lambda _: (_OPEN,),
        undo=lambda _: (_OPEN,),
    ),
    "run": Action(kind=ActionClass.RESTART, steps=_run),
    "restart": Action(kind=ActionClass.RESTART, steps=_restarted, undo=_served_again),
    "reconfigure": Action(kind=ActionClass.RECONFIGURE, steps=_reconfigured, undo=_reverted),
}
"""By the names of `config.ACTIONS`."""
