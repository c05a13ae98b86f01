"""The frozen records that pass between rooms, and nothing that decides.

Instants end in `_ms`: UTC epoch milliseconds as `int`, Prometheus' own unit. Durations end in
`_ms` too. Ratios are 0 to 1, memory is in bytes.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self, TypeAlias

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

    @property
    def has_ended(self) -> bool:
        """Whether there is no process of it; the supervisor may be about to start one."""
        return self.is_dead or self.phase is SupervisorPhase.AUTO_RESTART

    @property
    def is_dead(self) -> bool:
        """Whether its process has ended, and nothing will start it by itself."""
        return self.phase in {SupervisorPhase.INACTIVE, SupervisorPhase.FAILED}


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
    revision: int | None = None  # of its settings, where gpuwatch keeps them


Argument: TypeAlias = Any
"""The value of one of vLLM's options as JSON has it: a truth, a number, a text, a list, a mapping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """One set of a server's arguments; a row and a file, never changed once made.

    `arguments` by vLLM's long option name with underscores (`max_model_len`); `by` is who made it, `gpuwatch`
    or a person; `why` is a sentence of theirs, or the code of the cure; `parent` is what it was made from.
    """

    server: str
    number: int  # counts from 1
    arguments: Mapping[str, Argument]
    created_at_ms: int
    by: str
    why: str = ""
    parent: int | None = None


IS_PAUSED: Final = "is_paused"
CANARY: Final = "canary"
"""What a server may be asked where its metrics leave a doubt: whether it is paused, and for one token."""


class Mode(enum.StrEnum):
    """How far remediation may go by itself."""

    OBSERVE = "observe"
    APPROVE = "approve"
    AUTO = "auto"


class ActionClass(enum.StrEnum):
    """What an action costs those who use the server: what is allowed by itself differs by it."""

    REVERSIBLE = "reversible"  # lapses or is lifted; no request is lost
    RESTART = "restart"  # the same server anew
    RECONFIGURE = "reconfigure"  # anew with other arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing to do to a server: data, not code. `within_ms` is its deadline."""

    action: str
    within_ms: int
    args: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """An option that was looked at: `code` says why it was not taken, or `chosen`."""

    option: str
    code: str
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be done, why, and how it is proved; never changed once made.

    `undo` takes back what the steps did, as far as they came. `before` and `after` are revisions, of a plan
    that changes arguments. `signals` are what was seen when it was made; `by` is who asked, if a person.
    """

    id: str
    server: str
    alert: str
    alert_labels: Labels
    steps: tuple[Step, ...]
    verify_for_ms: int
    mode: Mode
    dry_run: bool
    policy: str
    kind: ActionClass = ActionClass.RESTART
    actions: tuple[str, ...] = ()  # that the steps are made of, as policies name them
    undo: tuple[Step, ...] = ()
    before: int | None = None
    after: int | None = None
    considered: tuple[Considered, ...] = ()
    signals: Mapping[str, str] = field(default_factory=dict)
    by: str = ""


class Phase(enum.StrEnum):
    """Phases of a remediation; the table is in `remediation.machine`."""

    PLANNED = "planned"
    AWAITING_APPROVAL = "awaiting_approval"
    APPLYING = "applying"
    VERIFYING = "verifying"
    ROLLING_BACK = "rolling_back"
    SUCCEEDED = "succeeded"
    ROLLED_BACK = "rolled_back"  # it did not help, and the server serves as it did before
    FAILED = "failed"
    ABORTED = "aborted"
    REHEARSED = "rehearsed"  # a dry run: all was decided, nothing was touched


LIVE_PHASES: Final = frozenset(
    {Phase.PLANNED, Phase.AWAITING_APPROVAL, Phase.APPLYING, Phase.VERIFYING, Phase.ROLLING_BACK}
)


class StepEnd(enum.StrEnum):
    """How a step ended."""

    DONE = "done"
    LATE = "late"
    FAILED = "failed"
    CALLED_OFF = "called_off"  # cut short, by a person or by what happened meanwhile


@dataclass(frozen=True, slots=True, kw_only=True)
class PastStep:
    """A step that is over. `detail` is why it failed, if that was told; `is_undo`: it took something back."""

    action: str
    began_at_ms: int
    ended_at_ms: int
    end: StepEnd
    is_undo: bool = False
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remediation:
    """A plan on its way. `asked_at_ms` is when it first touched the server.

    `is_cut` says that its steps may have ended a process of the server, or have begun one.

    `step_index` counts in `plan.steps`, and in what is undone while it is rolled back; `since_ms` is when the
    present step, or the phase, began. `outcome` is a code and `facts` its figures; `notify.wording` makes the
    words. `heard` is what the present step was answered, `course` the steps before it, those of the undo
    too. `account` is what it cost and gave, at its end.
    """

    plan: Plan
    phase: Phase
    step_index: int
    since_ms: int
    created_at_ms: int
    asked_at_ms: int | None = None
    is_cut: bool = False
    good_since_ms: int | None = None  # while verifying: since when all has been well
    outcome: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    heard: Mapping[str, str] = field(default_factory=dict)
    course: tuple[PastStep, ...] = ()
    account: Mapping[str, float] = field(default_factory=dict)


class ErrandPhase(enum.StrEnum):
    """How far a command has come that takes longer than one call."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """A command that runs beside the daemon and outlives it. `detail` is why it failed, or its last line."""

    phase: ErrandPhase
    began_at_ms: int
    detail: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What can be seen of a server for the steps of a remediation; None where it cannot be told.

    `in_flight` counts requests in the API, by the doors of its guests; `gpu_holders` are processes of the
    server, also those that outlived it, that NVML lists on a GPU; `rival_bytes` is what others hold there,
    by the GPU's UUID and the name of the process; `errands` by `PLAN_ID-STEP`.
    """

    requests_running: int | None = None
    requests_waiting: int | None = None
    in_flight: int | None = None
    kv_use_ratio: float | None = None  # of the KV cache of its fullest engine
    doors: int = 0  # API processes whose guest has a door
    guests: int = 0  # processes whose guest answers
    admission_limit: int | None = None  # in force now; None: none
    running_limit: int | None = None
    processes: int | None = None  # of the server, that live
    gpu_holders: int | None = None
    free_bytes: Mapping[str, int] = field(default_factory=dict)  # of each GPU that the server uses
    total_bytes: Mapping[str, int] = field(default_factory=dict)
    free_steady_since_ms: int | None = None
    rival_bytes: Mapping[tuple[str, str], int] = field(default_factory=dict)
    others_growing: bool | None = None  # whether a process that is not the server's takes more and more
    asleep: bool = False
    verdict: str = ""  # of `server_progress`
    canary_ok_at_ms: int | None = None  # when a request for one token was answered last
    tokens_per_s: float | None = None
    start: ServerStart | None = None  # the last
    revision: int | None = None  # that the next start will read
    errands: Mapping[str, Errand] = field(default_factory=dict)


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
    considered: tuple[Considered, ...] = ()


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
