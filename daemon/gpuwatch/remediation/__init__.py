"""Decision: whether something is done about an alert, what, and how far it has come. Pure."""

from gpuwatch.remediation import wishes
from gpuwatch.remediation.actions import ACTIONS
from gpuwatch.remediation.blockers import BLOCKERS, PASSING
from gpuwatch.remediation.machine import OUTCOMES, TRANSITIONS, Event, advance, refused
from gpuwatch.remediation.planner import Decision, asked, begin, choose, decide, decide_change
from gpuwatch.remediation.situation import FOREVER_MS, Change, Limits, Situation
from gpuwatch.remediation.steps import STEPS, Seen, errand_key, present
from gpuwatch.remediation.wishes import Wishes

__all__ = [
    "ACTIONS",
    "BLOCKERS",
    "FOREVER_MS",
    "OUTCOMES",
    "PASSING",
    "STEPS",
    "TRANSITIONS",
    "Change",
    "Decision",
    "Event",
    "Limits",
    "Seen",
    "Situation",
    "Wishes",
    "advance",
    "asked",
    "begin",
    "choose",
    "decide",
    "decide_change",
    "errand_key",
    "present",
    "refused",
    "wishes",
]
