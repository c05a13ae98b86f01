"""The daemon's own process: `gpuwatch run` becomes it, so that it holds nothing that only a command needs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from gpuwatch import lean


def become(config: Path | None, recording: Path | None, speed: float, log_level: str) -> NoReturn:
    """Replace this process by the daemon; the process id stays, which systemd goes by."""
    given = {
        "config": str(config) if config else None,
        "recording": str(recording) if recording else None,
        "speed": speed,
        "log_level": log_level,
    }
    # Commands that it runs, such as the one that gathers evidence, read the same settings.
    env = os.environ | ({"GPUWATCH_CONFIG": str(config.absolute())} if config else {})
    os.execve(sys.executable, [sys.executable, "-m", "gpuwatch.daemon", json.dumps(given)], env)  # noqa: S606


def main() -> None:
    """Run it with the arguments that `become` gave; what was foreseen ends it with a text and status 1."""
    lean.begin()
    from gpuwatch import service  # noqa: PLC0415 (after lean, which is the point of it)
    from gpuwatch.errors import GpuwatchError  # noqa: PLC0415

    given = json.loads(sys.argv[1])
    config, recording = (Path(given[key]) if given[key] else None for key in ("config", "recording"))
    service.set_up_logging(given["log_level"])
    try:
        service.Service(service.Input(config, recording, given["speed"])).run()
    except GpuwatchError as error:
        sys.exit(f"gpuwatch: {error}")


if __name__ == "__main__":
    main()
