"""What the guests in one server's processes are asked to do; believes what has the form of an answer.

Rule 1: limits lapse by themselves after `FOR_S`: whoever asked and died leaves no server throttled.
Rule 2: a guest replaces all its limits at each asking, so those that are to stay are asked for again.
Rule 3: every asking ends in time, whatever a guest does; all of them together within two seconds.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from gpuwatch.errors import ServerError
from gpuwatch.guest import client
from gpuwatch.guest.client import GuestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

FOR_S: Final = 30
_NAMES: Final = ("running", "tokens", "admission")
_FIGURES_S: Final = 0.5
_LIMIT_S: Final = 0.7
_ABORT_S: Final = 0.6  # a guest waits 0.4 s for vLLM's event loop
_RELEASE_S: Final = 1.8
_MOST_ANSWER_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Kept:
    """What an asking for limits came to: doors that were asked, and why a limit is kept by nobody."""

    doors: int = 0
    lacks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Released:
    """Bytes given back to the driver, how many processes did, and why others did not."""

    freed_bytes: int
    done: int
    refused: tuple[str, ...]
    silent: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Inside:
    """The guests of the processes that `members` names, in the folder of sockets."""

    folder: Path
    members: Callable[[], Iterable[int]]

    def hold(self, **wanted: int | None) -> Kept:
        """Keep `admission` and `running` for `FOR_S`, None to lift one; what is not named stays as it is.

        `admission` is shared out among the doors. ServerError if the folder cannot be read.
        """
        paths = self._paths()
        held = {pid: _limits(a) for pid, a in _heard(paths, "figures", within_s=_FIGURES_S).items()}
        doors = [pid for pid, limits in held.items() if "door" in limits]
        shares = client.shares(wanted.get("admission"), doors)
        asked: dict[tuple[tuple[str, int | None], ...], dict[int, Path]] = defaultdict(dict)
        for pid, had in held.items():
            own = {name: had.get(name) for name in _NAMES} | wanted
            if "admission" in wanted:
                own["admission"] = shares.get(pid)
            if any(value is not None for value in own.values()) or any(
                had.get(name) is not None for name in _NAMES
            ):
                asked[tuple(own.items())][pid] = paths[pid]
        answers = [answer for own, some in asked.items() for answer in _told(some, dict(own))]
        return Kept(len(doors), _lacking(wanted, answers))

    def lift(self) -> None:
        """End both limits at once."""
        self.hold(admission=None, running=None)

    def abort(self) -> int | None:
        """End all requests in flight cleanly; how many, or None if no guest here can."""
        answers = _heard(self._paths(), "abort", within_s=_ABORT_S).values()
        counts = [answer["aborted"] for answer in answers if type(answer.get("aborted")) is int]
        return sum(counts) if counts else None

    def release(self) -> Released:
        """Have torch's allocators give back what they cache."""
        paths = self._paths()
        answers = client.ask_all(paths, "release", within_s=_RELEASE_S, most_bytes=_MOST_ANSWER_BYTES)
        failed = [answer for answer in answers.values() if isinstance(answer, GuestError)]
        freed = [_freed(answer) for answer in answers.values() if not isinstance(answer, GuestError)]
        return Released(
            freed_bytes=sum(filter(None, freed)),
            done=sum(found is not None for found in freed),
            refused=tuple(str(error) for error in failed if error.is_refusal),
            silent=tuple(str(error) for error in failed if not error.is_refusal),
        )

    def _paths(self) -> dict[int, Path]:
        try:
            listed = client.listed(self.folder)
        except GuestError as error:
            raise ServerError(str(error)) from error
        return {pid: listed[pid] for pid in self.members() if pid in listed}


def _heard(
    paths: dict[int, Path], what: str, *, within_s: float, more: Mapping[str, Any] | None = None
) -> dict[int, dict[str, Any]]:
    """What those answered that did."""
    answers = client.ask_all(paths, what, more=more, within_s=within_s, most_bytes=_MOST_ANSWER_BYTES)
    return {pid: answer for pid, answer in answers.items() if not isinstance(answer, GuestError)}


def _told(paths: dict[int, Path], limits: Mapping[str, int | None]) -> list[dict[str, Any]]:
    return list(_heard(paths, "limit", within_s=_LIMIT_S, more={**limits, "for_s": FOR_S}).values())


def _limits(figures: Mapping[str, Any]) -> dict[str, int]:
    """The limits in force by the figures of a guest, and `door` if it has one."""
    door, engine = figures.get("admission"), figures.get("engine")
    found = {"door": 1} if isinstance(door, dict) else {}
    told = (
        dict(engine["limits"]) if isinstance(engine, dict) and isinstance(engine.get("limits"), dict) else {}
    )
    told["admission"] = door.get("limit") if isinstance(door, dict) else None
    return found | {name: told[name] for name in _NAMES if type(told.get(name)) is int}


def _lacking(wanted: Mapping[str, int | None], answers: list[dict[str, Any]]) -> dict[str, str]:
    """Why nobody keeps a limit, by its name; the engine's word counts for more than that of others."""
    lacking = {}
    for name in [name for name, value in wanted.items() if value is not None]:
        if any(name in _mapping(answer, "applied") for answer in answers):
            continue
        whys = [
            (answer.get("role") != "engine_core", _mapping(answer, "lacks").get(name, ""))
            for answer in answers
        ]
        lacking[name] = (
            client.printable(min(whys)[1]) if whys else "no process of it has a guest that answers"
        )
    return lacking


def _mapping(answer: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = answer.get(name)
    return found if isinstance(found, dict) else {}


def _freed(answer: Mapping[str, Any]) -> int | None:
    """Bytes that one process gave back; None for one without CUDA."""
    devices = answer.get("devices")
    if answer.get("cuda") is not True or not isinstance(devices, list):
        return None
    found = [device.get("released_bytes") for device in devices if isinstance(device, dict)]
    return sum(size for size in found if type(size) is int)
