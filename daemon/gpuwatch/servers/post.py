"""Sends one POST to a route of a server and prints what it answered as a JSON line; a program of its own.

`python post.py URL [SECONDS]`. It needs the standard library alone and imports nothing of gpuwatch, so that
it starts at once. Exit status: 0 if the server did it, else 1 with `error` in the line.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from typing import Any, Final

_WITHIN_S: Final = 600.0
_MOST_BYTES: Final = 64 * 1024
_CURES: Final = {
    404: "; to cure it, start the server with VLLM_SERVER_DEV_MODE=1",
    401: "; the server wants a key for this route",
}


def post(url: str, within_s: float) -> dict[str, Any]:
    """`status` and what the server answered, if that is a JSON object; `error` if it did not do it."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, data=b"", method="POST")  # noqa: S310 (a setting's, checked there)
    try:
        with direct.open(request, timeout=within_s) as response:
            said = _object(response.read(_MOST_BYTES))
            status = response.status
    except urllib.error.HTTPError as error:
        told = error.read(_MOST_BYTES).decode(errors="replace").strip()[:200]
        cure = _CURES.get(error.code, "")
        return {"status": error.code, "error": f"POST {url}: HTTP {error.code} {told}{cure}"}
    except OSError as error:
        return {"error": f"POST {url}: {getattr(error, 'reason', error)}"}
    if said.get("success") is False:
        return {"status": status, **said, "error": f"POST {url}: the server could not: requests are in hand"}
    return {"status": status, **said}


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    answer = post(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else _WITHIN_S)
    print(json.dumps(answer))  # noqa: T201 (what it is for)
    sys.exit("error" in answer)
