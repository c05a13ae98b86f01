"""Decision: whether something is done about an alert, what, and how far it has come. Pure."""

from gpuwatch.remediation import wishes
from gpuwatch.remediation.blockers import BLOCKERS, FOREVER_MS, Limits, Situation
from gpuwatch.remediation.machine import TRANSITIONS, Event, Seen, advance, refused
from gpuwatch.remediation.planner import begin, choose, decide
from gpuwatch.remediation.wishes import Wishes

__all__ = [
    "BLOCKERS",
    "FOREVER_MS",
    "TRANSITIONS",
    "Event",
    "Limits",
    "Seen",
    "Situation",
    "Wishes",
    "advance",
    "begin",
    "choose",
    "decide",
    "refused",
    "wishes",
]
