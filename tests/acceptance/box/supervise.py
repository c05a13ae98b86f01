"""Runs as user gpuwatch inside the box: one look or one step a line of standard input, answers in JSON.

`observe UNIT` · `restart|stop|start UNIT SINCE_MS`; one supervisor a unit, which is kept.
"""

import dataclasses
import json
import sys

from gpuwatch.clock import SystemClock
from gpuwatch.errors import ServerError
from gpuwatch.records import Step
from gpuwatch.servers import SystemdSupervisor


def answer(supervisor, verb, *arguments):
    now_ms = SystemClock().now_ms()
    try:
        if verb == "observe":
            return dataclasses.asdict(supervisor.observe(now_ms))
        step = Step(action=verb, within_ms=60_000)
        supervisor.do(step, since_ms=int(arguments[0]), now_ms=now_ms)
    except ServerError as error:
        return {"error": str(error), "permanent": error.permanent}
    return {}


supervisors = {}
for line in sys.stdin:
    verb, unit, *arguments = line.split()
    supervisor = supervisors.setdefault(unit, SystemdSupervisor(unit))
    print(json.dumps(answer(supervisor, verb, *arguments)), flush=True)
