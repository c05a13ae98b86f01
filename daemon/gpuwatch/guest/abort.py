"""Ends the requests that an API process holds, as if each had finished; touches none unasked.

vLLM's own `abort` does it, on vLLM's own event loop: clients get what came so far, finish_reason "abort" and
the stream's end. The application is known by the requests that came through the door, and held weakly.

Rule 1: nothing is called but what is there: a vLLM of another shape is told of, not guessed at.
Rule 2: requests for several answers (`n`) are aborted by their parents: vLLM forgets both together.
"""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping

_WITHIN_S: Final = 0.4  # the other end is waiting, and so is who asks next
_NO_APP: Final = "no application of vLLM's was seen here: start it with the door, and let it serve first"


class _Seen:
    """The application that the door stands before; the event loop alone writes, the guest's thread reads."""

    def __init__(self) -> None:
        self._app: weakref.ref[Any] | None = None

    def note(self, scope: MutableMapping[str, Any]) -> None:
        """Costs one comparison once it is known; raises nothing."""
        app = scope.get("app")
        if app is None or (self._app is not None and self._app() is app):
            return
        try:
            self._app = weakref.ref(app)
        except TypeError:  # of a kind that cannot be held so
            self._app = None

    def engine(self) -> Any:  # noqa: ANN401 (vLLM's)
        """Its engine client; RuntimeError if there is none."""
        app = self._app() if self._app is not None else None
        client = getattr(getattr(app, "state", None), "engine_client", None)
        if client is None:
            raise RuntimeError(_NO_APP)
        return client


SEEN: Final = _Seen()


def abort() -> dict[str, Any]:
    """`aborted`: how many requests were in flight here and have been ended; for the guest's thread.

    RuntimeError or AttributeError: this vLLM is of another shape. TimeoutError: its event loop is busy, and
    does it when it comes to it.
    """
    import asyncio  # noqa: PLC0415 (only an API process has it, and has it loaded)
    from concurrent import futures  # noqa: PLC0415 (as above)

    client = SEEN.engine()
    loop = client.output_handler.get_loop()  # the task that hands out what the engine gave
    asked = asyncio.run_coroutine_threadsafe(_abort_all(client), loop)
    futures.wait([asked], _WITHIN_S)
    if not asked.done():
        raise TimeoutError(f"the API's event loop did not come to it within {_WITHIN_S:g} s")
    return {"aborted": asked.result()}


async def _abort_all(client: Any) -> int:  # noqa: ANN401 (vLLM's)
    ids = list(_ids(client.output_processor))
    if ids:
        takes = inspect.signature(client.abort).parameters
        await client.abort(ids, **({"internal": True} if "internal" in takes else {}))
    return len(ids)


def _ids(processor: Any) -> Iterator[str]:  # noqa: ANN401 (vLLM's)
    """The engine's own names of the requests in flight (rule 2)."""
    parents = getattr(processor, "parent_requests", {})
    children = {child for parent in parents.values() for child in parent.child_requests}
    yield from parents
    yield from (one for one in processor.request_states if one not in children)
