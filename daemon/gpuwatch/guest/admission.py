"""A door before vLLM's API: counts the requests that work the engine, and turns away those above the limit.

For `vllm serve --middleware gpuwatch_guest.admission.Admission`. A request that was let in is touched by
`abort` alone; health, metrics, management and tokenizers always pass.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from . import SWITCH, abort
from .limits import HELD

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    from .limits import Limits

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Message, Receive, Send], Awaitable[None]]

# The first word of a path whose POST works the engine, and the last of one that does not for all that.
_WORK: Final = {
    *("v1", "v2", "inference", "cohere", "invocations", "generate", "generative_scoring"),
    *("pooling", "embed", "embeddings", "classify", "score", "rerank"),
}
_NO_WORK: Final = {
    *("tokenize", "detokenize", "render", "derender", "count_tokens", "cancel"),
    *("load_lora_adapter", "unload_lora_adapter"),
}
_RETRY_S: Final = 5
_TRY_AGAIN_LATER: Final = 1013
_NO_DOOR: Final = "no API here was started with `--middleware gpuwatch_guest.admission.Admission`"
_BODY: Final = json.dumps(
    {
        "error": {
            "message": f"The server takes no more requests for now; try again in {_RETRY_S} seconds.",
            "type": "ServiceUnavailableError",
            "param": None,
            "code": 503,
        }
    }
).encode()
_REFUSAL: Final[tuple[Message, ...]] = (
    {
        "type": "http.response.start",
        "status": 503,
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(_BODY)).encode()),
            (b"retry-after", str(_RETRY_S).encode()),
        ],
    },
    {"type": "http.response.body", "body": _BODY},
)


@dataclass(slots=True)
class _Door:
    """The process's: written by the API's event loop alone, read by the guest's thread."""

    is_there: bool = False
    in_flight: int = 0
    refused: int = 0

    def enter(self) -> bool:
        """Whether there is room, which is taken then."""
        limit = HELD.in_force().admission
        if limit is not None and self.in_flight >= limit:
            self.refused += 1
            return False
        self.in_flight += 1
        return True

    def leave(self) -> None:
        """The response is complete, or nobody waits for it any more."""
        self.in_flight -= 1


_DOOR: Final = _Door()


class Admission:
    """ASGI middleware; lets everything through, and counts nothing, where the guest is switched off."""

    def __init__(self, app: App) -> None:
        """`app` is what the requests are for."""
        self._app = app
        self._is_off = os.environ.get(SWITCH) == "0"
        _DOOR.is_there |= not self._is_off

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Raises what the app raises, and nothing of its own."""
        if not self._is_off:
            abort.SEEN.note(scope)
        if self._is_off or not _works_the_engine(scope):
            await self._app(scope, receive, send)
        elif _DOOR.enter():
            try:
                await self._app(scope, receive, send)
            finally:
                _DOOR.leave()
        else:
            with suppress(Exception):  # such as that the client is gone
                await _refuse(scope, receive, send)


def keep(limits: Limits) -> tuple[dict[str, int], dict[str, str]]:
    """The limit, if there is one and a door to keep it; else the reason why not."""
    asked = limits.asked("admission")
    return (asked, {}) if _DOOR.is_there else ({}, dict.fromkeys(asked, _NO_DOOR))


def end_all() -> dict[str, Any]:
    """`aborted`: how many requests in flight were ended; RuntimeError and others where it cannot."""
    if not _DOOR.is_there:
        raise RuntimeError(_NO_DOOR)
    return abort.abort()


def figures() -> dict[str, Any]:
    """`admission` with `in_flight`, `limit` (or null) and `refused`; nothing where there is no door."""
    if not _DOOR.is_there:
        return {}
    limit = HELD.in_force().admission
    return {"admission": {"in_flight": _DOOR.in_flight, "limit": limit, "refused": _DOOR.refused}}


def _works_the_engine(scope: Message) -> bool:
    if scope["type"] != "websocket" and (scope["type"], scope.get("method")) != ("http", "POST"):
        return False
    path = str(scope.get("path", "")).removeprefix(str(scope.get("root_path", "")))
    words = path.strip("/").split("/")
    return words[0] in _WORK and words[-1] not in _NO_WORK


async def _refuse(scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": _TRY_AGAIN_LATER})
        return
    for message in _REFUSAL:
        await send(dict(message))
