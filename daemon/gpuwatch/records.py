"""The frozen records that pass between rooms, and nothing that decides.

Instants end in `_ms`: UTC epoch milliseconds as `int`, Prometheus' own unit. Durations end in
`_ms` too. Ratios are 0 to 1, memory is in bytes.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

# Prometheus' staleness marker: the NaN with this payload ends a series at once.
_STALE_BITS: Final = b"\x02\x00\x00\x00\x00\x00\xf0\x7f"
STALE: Final[float] = struct.unpack("<d", _STALE_BITS)[0]


def is_stale(value: float) -> bool:
    """Tell the staleness marker from every other value, other NaNs included."""
    return value != value and struct.pack("<d", value) == _STALE_BITS


class Labels(tuple[tuple[str, str], ...]):
    """The identity of a series: (name, value) pairs sorted by name; `__name__` is one of them.

    An empty value means "no such label", as in Prometheus, so it is left out.
    """

    __slots__ = ()

    def __new__(cls, pairs: Iterable[tuple[str, str]] = ()) -> Self:
        """Sort the pairs and drop those without a value."""
        return super().__new__(cls, sorted((k, v) for k, v in pairs if v != ""))

    @classmethod
    def of(cls, metric: str = "", /, **labels: str) -> Self:
        """`Labels.of("gpu_memory_used_bytes", gpu="0")`."""
        return cls([("__name__", metric), *labels.items()])

    @property
    def metric(self) -> str:
        """The value of `__name__`, empty if it has none."""
        return self.get("__name__")

    def get(self, name: str) -> str:
        """The value of a label; empty if it is absent."""
        for key, value in self:
            if key == name:
                return value
        return ""

    def without(self, *names: str) -> Self:
        """The same labels less these."""
        return tuple.__new__(type(self), [pair for pair in self if pair[0] not in names])

    def only(self, *names: str) -> Self:
        """These labels alone, as far as they are there."""
        return tuple.__new__(type(self), [pair for pair in self if pair[0] in names])

    def merged(self, other: Mapping[str, str] | Iterable[tuple[str, str]]) -> Self:
        """These labels overridden by `other`; an empty value deletes."""
        return type(self)({**dict(self), **dict(other)}.items())

    def __str__(self) -> str:
        """As in PromQL: `name{a="b"}`."""
        inner = ",".join(f'{k}="{escaped(v)}"' for k, v in self if k != "__name__")
        return self.metric + (f"{{{inner}}}" if inner or not self.metric else "")


def escaped(value: str) -> str:
    """A label's value as it stands between quotes."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of one series; `STALE` ends it. Any other NaN comes of a recording rule alone."""

    labels: Labels
    at_ms: int
    value: float


@dataclass(frozen=True, slots=True)
class Scrape:
    """What one target gave at one instant: the series `labels[i]` had `values[i]`."""

    target: str
    at_ms: int
    labels: Sequence[Labels]
    values: Sequence[float]


class MetricKind(enum.StrEnum):
    """Prometheus' metric types, as far as we make them."""

    GAUGE = "gauge"
    COUNTER = "counter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A row of the catalogue: a metric that gpuwatch makes itself."""

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in a file something stands; lines and columns count from 1."""

    file: str
    line: int
    column: int = 1

    def __str__(self) -> str:
        """`file:line:column`."""
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule of a Prometheus rule file, as written: either `alert` or `record` names what it gives.

    `rules.compile_groups` checks it.
    """

    alert: str = ""
    record: str = ""
    expr: str
    for_ms: int = 0
    keep_firing_for_ms: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)  # an empty value deletes the series' label
    annotations: Mapping[str, str] = field(default_factory=dict)
    place: Place
    expr_place: Place
    text_places: Mapping[str, Place] = field(default_factory=dict)  # by "labels.x" and "annotations.x"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleGroup:
    """A group of a rule file; its rules are evaluated in order every `interval_ms`.

    `limit` is how many alerts or series a rule of it may give, 0 for any number. `query_offset_ms` is how
    far before the time of evaluation its queries look, and its series are written.
    """

    name: str
    interval_ms: int
    rules: tuple[Rule, ...]
    place: Place
    limit: int = 0
    query_offset_ms: int = 0


class AlertState(enum.StrEnum):
    """Prometheus' states, and RESOLVED for an alert that fired and is over."""

    PENDING = "pending"
    FIRING = "firing"
    RESOLVED = "resolved"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One active element of an alerting rule.

    `labels` holds `alertname` and the rule's own labels, never `__name__`. `held_by` are the marks of the
    rules of that name that find it, in the order they did; the mark of a rule that stands alone is empty.
    """

    rule: str
    labels: Labels
    annotations: Mapping[str, str]
    state: AlertState
    value: float
    active_at_ms: int
    fired_at_ms: int | None = None
    resolved_at_ms: int | None = None
    keep_firing_since_ms: int | None = None
    held_by: tuple[str, ...] = ("",)

    @property
    def identity(self) -> tuple[str, Labels]:
        """What tells it from every other active alert."""
        return self.rule, self.labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """A change of an alert's state; FIRING and RESOLVED are told to people. `was` is None at birth."""

    alert: Alert
    was: AlertState | None
    now: AlertState | None
    at_ms: int


class SupervisorPhase(enum.StrEnum):
    """What the supervisor of a server says of its process, in systemd's terms."""

    ACTIVE = "active"
    ACTIVATING = "activating"
    DEACTIVATING = "deactivating"
    AUTO_RESTART = "auto-restart"
    INACTIVE = "inactive"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorState:
    """One look at a server's supervisor. `started_at_ms` is when the last process began, also if gone."""

    phase: SupervisorPhase
    pid: int | None = None
    started_at_ms: int | None = None
    stop_asked: bool = False  # somebody asked for its stop, under way or done; it did not end by itself
    detail: str = ""


class ServerPhase(enum.StrEnum):
    """Where a vLLM server is in its life."""

    UNSEEN = "unseen"  # never answered and no process known: not ours to call down
    STARTING = "starting"  # a process is there, never healthy yet
    SERVING = "serving"  # /health answers 200
    DOWN = "down"  # was healthy and is not, or its start is overdue
    STOPPED = "stopped"  # an operator stopped it through its supervisor


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """A server as seen now; a row. `since_ms` is when it entered `phase`."""

    name: str
    phase: ServerPhase
    since_ms: int
    seen_at_ms: int  # when it last gave a sign, either way
    starting_since_ms: int | None = None  # set while its process comes up, also while DOWN
    last_healthy_ms: int | None = None
    unanswered_since_ms: int | None = None  # set while /health gives neither yes nor no
    supervisor: SupervisorState = SupervisorState(phase=SupervisorPhase.UNKNOWN)
    reason: str = ""


class StartOutcome(enum.StrEnum):
    """How far a start of a server has come, or how it ended."""

    STARTING = "starting"
    HEALTHY = "healthy"
    FAILED = "failed"  # its process ended before it was healthy
    STOPPED = "stopped"  # somebody stopped it before it was healthy
    UNKNOWN = "unknown"  # nobody watched its end


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStart:
    """One life of a server's process, as its log lines tell it; a row.

    `figures` by worker (`EngineCore`, `Worker_TP0`): `weights_bytes`, `kv_cache_bytes`, `cuda_graphs_bytes`,
    `activation_peak_bytes`, `non_torch_bytes`. `facts` are the numbers of a failure, with their units.
    """

    server: str
    began_at_ms: int  # when its process began
    outcome: StartOutcome
    healthy_at_ms: int | None = None
    ended_at_ms: int | None = None  # when the process was seen gone
    configuration: str = ""  # the same for starts of one version with the same arguments; empty: not told
    version: str = ""
    arguments: Mapping[str, str] = field(
        default_factory=dict
    )  # that are not vLLM's defaults, without secrets
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    kv_cache_tokens: int | None = None
    max_concurrency: float | None = None
    failure: str = ""  # its class, also of a process that failed after it was healthy
    facts: Mapping[str, str] = field(default_factory=dict)
    lines: tuple[str, ...] = ()  # what of the log said it


class Mode(enum.StrEnum):
    """How far remediation may go by itself."""

    OBSERVE = "observe"
    APPROVE = "approve"
    AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing to do to a server: data, not code. `within_ms` is its deadline."""

    action: str
    within_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be done, why, and how it is proved; never changed once made."""

    id: str
    server: str
    alert: str
    alert_labels: Labels
    steps: tuple[Step, ...]
    verify_for_ms: int
    mode: Mode
    dry_run: bool
    policy: str


class Phase(enum.StrEnum):
    """Phases of a remediation; the table is in `remediation.machine`."""

    PLANNED = "planned"
    AWAITING_APPROVAL = "awaiting_approval"
    APPLYING = "applying"
    VERIFYING = "verifying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    ABORTED = "aborted"
    REHEARSED = "rehearsed"  # a dry run: all was decided, nothing was touched


LIVE_PHASES: Final = frozenset({Phase.PLANNED, Phase.AWAITING_APPROVAL, Phase.APPLYING, Phase.VERIFYING})


@dataclass(frozen=True, slots=True, kw_only=True)
class Remediation:
    """A plan on its way. `asked_at_ms` is when the present step was first asked of the server.

    `outcome` is a code and `facts` its figures; `notify.wording` makes the words.
    """

    plan: Plan
    phase: Phase
    step_index: int
    since_ms: int
    created_at_ms: int
    asked_at_ms: int | None = None
    good_since_ms: int | None = None  # while verifying: since when all has been well
    outcome: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why nothing is done about an alert of a server. `code` names the blocker.

    `facts` are figures for the words, which the catalogue in `notify.wording` makes of `code`.
    """

    server: str
    alert: str
    alert_labels: Labels
    code: str
    facts: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[str, ...] = ()  # what the policy would have had done


@dataclass(frozen=True, slots=True, kw_only=True)
class Notification:
    """A row of the outbox: one message for one receiver; `body` is a `notify` message as JSON."""

    id: str
    receiver: str
    body: str
    created_at_ms: int
    next_attempt_at_ms: int
    attempts: int = 0
    sent_at_ms: int | None = None
    gave_up_at_ms: int | None = None
    error: str = ""
