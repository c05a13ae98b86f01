"""How a dry run is scored: whether the problem that was left alone went away, and by whom."""

import pytest

from gpuwatch import remediation
from gpuwatch.records import (
    Alert,
    AlertState,
    Labels,
    Mode,
    Plan,
    ServerStart,
    StartOutcome,
    Transition,
)
from gpuwatch.remediation.shadow import Shadow, score

NOW = 1_800_000_000_000
MINUTE = 60_000
LABELS = Labels.of(alertname="VLLMDown", server="m")


def rehearsed():
    plan = Plan(
        id="GW-1",
        server="m",
        alert="VLLMDown",
        alert_labels=LABELS,
        steps=(),
        verify_for_ms=0,
        mode=Mode.OBSERVE,
        dry_run=True,
        policy="restart",
    )
    return remediation.begin(plan, NOW)


def over(at_ms, labels=LABELS):
    alert = Alert(
        rule="VLLMDown",
        labels=labels,
        annotations={},
        state=AlertState.RESOLVED,
        value=1.0,
        active_at_ms=NOW - 5000,
    )
    return Transition(alert=alert, was=AlertState.FIRING, now=AlertState.RESOLVED, at_ms=at_ms)


def life(began_ms, ended_ms=None, failure="", outcome=StartOutcome.HEALTHY, configuration="a", server="m"):
    return ServerStart(
        server=server,
        began_at_ms=NOW + began_ms,
        ended_at_ms=None if ended_ms is None else NOW + ended_ms,
        outcome=outcome,
        failure=failure,
        configuration=configuration,
    )


DIED = life(-MINUTE, -5000, "process_died")
OVER = over(NOW + 10 * MINUTE)
CASES = [  # (what, transitions, lives, by)
    ("the alert goes on", [], [DIED], "still"),
    ("another one's end is not its own", [over(NOW + 1, Labels.of(server="n"))], [DIED], "still"),
    ("an end before it is another's", [over(NOW - 1)], [DIED], "still"),
    ("what is not yet is not seen", [over(NOW + 61 * MINUTE)], [DIED], "still"),
    ("it was over without a new life", [OVER], [DIED], "itself"),
    ("a supervisor began it anew", [OVER], [DIED, life(5000)], "itself"),
    ("a start so late is a person's", [OVER], [DIED, life(5 * MINUTE)], "person"),
    ("so is one with other arguments", [OVER], [DIED, life(5000, configuration="b")], "person"),
    (
        "and one after a stop",
        [OVER],
        [life(-MINUTE, 4000, outcome=StartOutcome.STOPPED), life(5000)],
        "person",
    ),
    ("and one that ended what served", [OVER], [life(-MINUTE, 4000), life(5000)], "person"),
    ("a start after the end had no part in it", [OVER], [DIED, life(11 * MINUTE)], "itself"),
    ("nor had another server's", [OVER], [DIED, life(5 * MINUTE, server="n")], "itself"),
]


@pytest.mark.parametrize(("transitions", "lives", "by"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_what_became_of_a_problem_that_was_left_alone(transitions, lives, by):
    cleared_ms = None if by == "still" else 10 * MINUTE
    for order in (1, -1):
        assert score(rehearsed(), transitions, lives[::order], NOW + 60 * MINUTE) == Shadow(cleared_ms, by)
