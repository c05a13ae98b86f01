"""What becomes of pending alerts after a time in which nobody watched, as in Prometheus; pure.

Nobody knows what was in that time, so it counts for nothing: a pending alert waits that much longer. After
a long one it begins anew. What fires goes on firing until its expression says otherwise.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuwatch.records import Alert, AlertState

if TYPE_CHECKING:
    from gpuwatch.records import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """How an outage counts: one longer than `tolerance_ms` makes pending alerts begin anew.

    After a shorter one an alert whose `for` is `grace_ms` or more fires no sooner than `grace_ms` from now.
    """

    tolerance_ms: int = 3_600_000
    grace_ms: int = 600_000


def restored(alert: Alert, rule: Rule, unwatched_ms: int | None, now_ms: int, outage: Outage) -> Alert | None:
    """The alert as it goes on; None if it begins anew. `unwatched_ms` is None if nobody knows."""
    if alert.state is not AlertState.PENDING:
        return alert
    if unwatched_ms is None or unwatched_ms > outage.tolerance_ms:
        return None
    active_at_ms = alert.active_at_ms + unwatched_ms
    left_ms = rule.for_ms - (now_ms - active_at_ms)
    if 0 < left_ms < outage.grace_ms <= rule.for_ms:
        active_at_ms = now_ms + outage.grace_ms - rule.for_ms
    return dataclasses.replace(alert, active_at_ms=active_at_ms)
