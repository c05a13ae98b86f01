"""Runs as user gpuwatch inside the box: one look or one step a line of standard input, answers in JSON.

`observe UNIT` · `restart UNIT SINCE_MS`; one supervisor a unit, kept, so that its connection is too.
"""

import dataclasses
import json
import sys

from gpuwatch.clock import SystemClock
from gpuwatch.errors import ServerError
from gpuwatch.records import Step
from gpuwatch.servers import SystemdSupervisor

RESTART = Step(action="restart", within_ms=60_000)


def answer(supervisor, verb, *arguments):
    now_ms = SystemClock().now_ms()
    try:
        if verb == "observe":
            return dataclasses.asdict(supervisor.observe(now_ms))
        supervisor.do(RESTART, since_ms=int(arguments[0]), now_ms=now_ms)
    except ServerError as error:
        return {"error": str(error), "permanent": error.permanent}
    return {}


supervisors = {}
for line in sys.stdin:
    verb, unit, *arguments = line.split()
    supervisor = supervisors.setdefault(unit, SystemdSupervisor(unit))
    print(json.dumps(answer(supervisor, verb, *arguments)), flush=True)
