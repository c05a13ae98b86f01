"""A simulated GPU and a vLLM server on it: memory that comes back late, starts that fail, requests.

Its log has what the real reader of starts looks for, and its series have the names of the real sources, so
that the real rules, the real judge of progress and the real look at a server see it. It decides nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpuwatch.errors import ServerError, SourceError
from gpuwatch.records import Labels, Sample
from gpuwatch.sources.trees import Identity, Member

if TYPE_CHECKING:
    from tests.fake_nvml import FakeGpu
    from tests.world import World

SECOND = 1000
MIB, GIB = 1 << 20, 1 << 30
SERVER = "qwen"
RIVAL_PID = 77

WEIGHTS_BYTES = 15 * GIB
NON_TORCH_BYTES = GIB
KV_BYTES_PER_TOKEN = GIB // 4096
LEAST_LENGTH = 512  # what a length that is fitted by itself must reach
FITTING_BATCH = 256
REQUEST_MS = 6 * SECOND
TOKENS_A_SECOND = 30
BURST_EVERY_MS = 6 * SECOND
DEFAULTS: dict[str, Any] = {
    "model": "sim/14B",
    "gpu_memory_utilization": 0.85,
    "max_model_len": 32768,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 8192,
}
# An option that this vLLM has; another is a bad argument.
KNOWN = {
    *DEFAULTS,
    "watermark",
    "limit_mm_per_prompt",
    "mm_processor_kwargs",
    "quantization",
    "served_model_name",
}


@dataclass
class SimGpu:
    """The memory of one GPU: who holds it by pid, and what the driver has not got back yet."""

    device: FakeGpu
    holders: dict[int, tuple[str, int]] = field(default_factory=dict)
    returning: list[tuple[int, int]] = field(default_factory=list)  # until then, so much

    def __post_init__(self) -> None:
        self.device.memory_total = 48 * GIB
        self.show(0)

    @property
    def total(self) -> int:
        return self.device.memory_total

    @property
    def free(self) -> int:
        return self.total - self.device.memory_reserved - self.device.used

    def take(self, pid: int, name: str, size: int) -> None:
        self.holders[pid] = name, size
        self.show(0)

    def give(self, pid: int, *, at_ms: int) -> None:
        """The process is gone now; its memory is free at `at_ms`."""
        if pid in self.holders:
            self.returning.append((at_ms, self.holders.pop(pid)[1]))

    def show(self, now_ms: int) -> None:
        """What NVML tells from now on."""
        self.returning = [each for each in self.returning if each[0] > now_ms]
        self.device.processes = [(pid, name, size) for pid, (name, size) in self.holders.items()]
        self.device.memory_used = sum(size for _, _, size in self.device.processes) + sum(
            size for _, size in self.returning
        )


@dataclass(frozen=True)
class Shape:
    """What a set of arguments comes to on a GPU of `total` bytes."""

    arguments: dict[str, Any]
    total: int

    def __getattr__(self, name: str) -> Any:
        return {**DEFAULTS, **self.arguments}[name]

    @property
    def images(self) -> int:
        return int(self.arguments.get("limit_mm_per_prompt", {}).get("image", 0))

    @property
    def image_bytes(self) -> int:
        pixels = self.arguments.get("mm_processor_kwargs", {}).get("max_pixels", 4 << 20)
        return self.images * pixels * 192

    @property
    def weights(self) -> int:
        return (
            WEIGHTS_BYTES // 2 if self.arguments.get("quantization") or "AWQ" in self.model else WEIGHTS_BYTES
        )

    @property
    def requested(self) -> int:
        return int(self.gpu_memory_utilization * self.total)

    @property
    def activation_peak(self) -> int:
        """What profiling sees."""
        return self.max_num_batched_tokens * MIB // 4

    @property
    def burst(self) -> int:
        """What work takes beside that: outside of the share, where nothing keeps it free."""
        return self.max_num_batched_tokens * MIB // 6 + self.max_num_seqs * 2 * MIB + self.image_bytes

    @property
    def kv_cache(self) -> int:
        return self.requested - self.weights - NON_TORCH_BYTES - self.activation_peak

    @property
    def kv_tokens(self) -> int:
        return max(self.kv_cache, 0) // KV_BYTES_PER_TOKEN

    @property
    def longest(self) -> int:
        return self.kv_tokens // 16 * 16

    def mistake(self) -> str:
        """What the parser, or the offline check, says of these arguments; empty if it takes them."""
        unknown = sorted(set(self.arguments) - KNOWN)
        if unknown:
            return f"unrecognized arguments: --{unknown[0].replace('_', '-')}"
        if not 0 < self.gpu_memory_utilization <= 1:
            return f"argument --gpu-memory-utilization: {self.gpu_memory_utilization} is not in (0, 1]"
        if self.max_num_seqs < 1 or self.max_num_batched_tokens < self.max_num_seqs:
            return f"argument --max-num-batched-tokens: less than max_num_seqs {self.max_num_seqs}"
        return ""


def failing_lines(shape: Shape, free: int) -> tuple[str, ...]:
    """Why a start with this much free memory fails, as its log has it; nothing if it goes well."""
    engine = "(EngineCore pid=2) ERROR 11-20 12:00:00 [core.py:1] "
    if free < shape.requested:
        has = f"{free / GIB:.2f}/{shape.total / GIB:.2f} GiB"
        share = f"{shape.gpu_memory_utilization}, {shape.requested / GIB:.2f} GiB"
        said = f"Free memory on device cuda:0 ({has}) on startup is less than the share ({share})."
        return (f"{engine}ValueError: {said}",)
    if shape.kv_cache <= 0:
        return (f"{engine}ValueError: No available memory for the cache blocks.",)
    if shape.max_model_len == -1:
        return (
            () if shape.longest >= LEAST_LENGTH else (f"{engine}ValueError: Cannot auto-fit max_model_len.",)
        )
    needed = shape.max_model_len * KV_BYTES_PER_TOKEN
    if needed > shape.kv_cache:
        said = (
            f"To serve at least one request with max seq len ({shape.max_model_len}), "
            f"({needed / GIB:.2f} GiB KV cache is needed, which is larger than the available KV cache memory "
            f"({shape.kv_cache / GIB:.2f} GiB); the estimated maximum model length is {shape.longest}."
        )
        return (f"{engine}ValueError: {said}",)
    return ()


def loading_lines(shape: Shape) -> tuple[str, ...]:
    """What a start tells once its memory is laid out."""
    engine = "(EngineCore pid=2) INFO 11-20 12:00:00 [core.py:1] "
    return (
        f"{engine}Model loading took {shape.weights / GIB:.2f} GiB",
        f"{engine}Available KV cache memory: {shape.kv_cache / GIB:.2f} GiB",
        f"{engine}GPU KV cache size: {shape.kv_tokens:,} tokens",
    )


@dataclass
class Work:
    """What clients want of a server that serves, and what became of it, second by second."""

    clients: int = 2  # each sends its next request when it has the answer to the last
    tokens_per_request: int = 4096
    running: deque[int] = field(default_factory=deque)  # when each ends
    waiting: int = 0
    steps: int = 0
    tokens: int = 0
    finished: int = 0
    aborted: int = 0
    refused: int = 0
    preempted: int = 0
    kv_use: float = 0.0

    def go_on(self, shape: Shape, now_ms: int, elapsed_ms: int, *, most: int, door: int | None) -> None:
        before = len(self.running)
        self.running = deque(end_ms for end_ms in self.running if end_ms > now_ms)
        self.finished += before - len(self.running)
        wanted = self.clients
        if door is not None:
            wanted = min(self.clients, max(door, len(self.running)))
            self.refused += self.clients - wanted
        places = min(wanted, most)
        while len(self.running) < places:
            self.running.append(now_ms + REQUEST_MS + 100 * len(self.running))
        self.waiting = max(0, wanted - len(self.running))
        fits = max(1, shape.kv_tokens // max(1, self.tokens_per_request))
        self.kv_use = min(1.0, len(self.running) / fits)
        seconds = elapsed_ms / SECOND
        self.preempted += int(max(0, len(self.running) - fits) * seconds)
        if self.running:
            self.steps += int(20 * seconds)
            self.tokens += int(TOKENS_A_SECOND * min(len(self.running), fits) * seconds)

    def drop(self) -> None:
        """Every request in hand ends here."""
        self.aborted += len(self.running)
        self.running.clear()
        self.waiting = 0


@dataclass
class SimServer:
    """A vLLM server: starts slowly or not at all, serves, runs out of memory, dies with status 0, hangs."""

    world: World
    startup_ms: int = 20 * SECOND
    started_at_ms: int | None = None
    died_at_ms: int | None = None
    busy_since_ms: int | None = None  # alive and well, and too busy to answer /health in time
    wedged: bool = False  # /health answers 503
    stalled: bool = False  # /health answers 200, and no token comes
    asleep: bool = False
    failing_starts: int = 0  # so many next starts die half-way
    port_busy: bool = False  # when it is down somebody else listens there, and says nothing
    stopped_by_operator: bool = False
    stop_asked: bool = False
    has_guest: bool = True
    is_stubborn: bool = False  # an orphan of it outlives KILL: it waits in the driver
    bytes_back_after_ms: int = 2 * SECOND
    orphans_until_ms: int | None = None  # its engine lives on when its main process is killed, so long
    arguments: dict[str, Any] = field(default_factory=dict)  # where no revisions are kept
    revision: int | None = None  # that it was started with
    detail: str = ""
    work: Work = field(default_factory=Work)
    lines: list[str] = field(default_factory=list)  # of the present life
    limits: dict[str, tuple[int, int]] = field(default_factory=dict)  # by name: how many, and until when
    lives: int = 0
    exits: int = 0
    cpu_s: float = 0.0
    shape: Shape = field(init=False)
    loaded: bool = False
    burst_at_ms: int = 0  # when a long prompt comes next, which takes memory outside of the share
    orphan_pid: int | None = None
    _seen_ms: int = 0

    def __post_init__(self) -> None:
        self.shape = Shape(dict(self.arguments), self.world.gpu.total)

    @property
    def busy(self) -> bool:
        return self.busy_since_ms is not None

    @property
    def alive(self) -> bool:
        return self.started_at_ms is not None and self.died_at_ms is None

    @property
    def up(self) -> bool:
        return self.alive and self.loaded and self.world.now_ms - self.started_at_ms >= self.startup_ms

    @property
    def well(self) -> bool:
        """Whether it serves; whether tokens come is another question."""
        return self.up and not self.wedged

    @property
    def works(self) -> bool:
        return self.well and not self.stalled and not self.asleep

    @property
    def pid(self) -> int:
        return 5000 + 2 * self.lives

    @property
    def engine_pid(self) -> int:
        return self.pid + 1

    def limit(self, name: str) -> int | None:
        """The limit in force: it lapses where nobody renews it."""
        value, until_ms = self.limits.get(name, (0, 0))
        return value if self.up and until_ms > self.world.now_ms else None

    # -- what is done to it -----------------------------------------------------------------------

    def start(self) -> None:
        self.lives += 1
        self.started_at_ms, self.died_at_ms = self.world.now_ms, None
        self.busy_since_ms = None
        self.wedged = self.stalled = self.asleep = self.loaded = False
        self.stopped_by_operator = self.stop_asked = False
        self.limits.clear()
        revisions = self.world.revisions
        self.revision = revisions.current()
        given = revisions.arguments() if self.revision is not None else self.arguments
        self.shape = Shape(dict(given), self.world.gpu.total)
        self.lines = [
            "(APIServer pid=1) INFO 11-20 12:00:00 [api.py:1] vLLM API server version 0.32.0",
            f"(APIServer pid=1) INFO 11-20 12:00:00 [api.py:1] non-default args: {dict(given)!r}",
        ]
        self._seen_ms = self.world.now_ms

    def die(self, detail: str = "exited with status 0") -> None:
        """Its main process is gone; its engine goes with it, or stays as an orphan."""
        if not self.alive:
            return
        now_ms = self.world.now_ms
        self.died_at_ms, self.detail = now_ms, detail
        self.work.drop()
        self.exits += 1
        if self.orphans_until_ms is not None and self.loaded:
            self.orphan_pid = self.engine_pid
        else:
            self.world.gpu.give(self.engine_pid, at_ms=now_ms + self.bytes_back_after_ms)

    def end_orphan(self) -> None:
        if self.orphan_pid is not None:
            self.world.gpu.give(self.orphan_pid, at_ms=self.world.now_ms + self.bytes_back_after_ms)
            self.orphan_pid = self.orphans_until_ms = None

    def stop_by_operator(self) -> None:
        self.die("killed by signal 15")
        self.stopped_by_operator = self.stop_asked = True

    # -- what becomes of it -----------------------------------------------------------------------

    def go_on(self, now_ms: int) -> None:
        """What happened since the last look."""
        elapsed_ms, self._seen_ms = min(now_ms - self._seen_ms, 60 * SECOND), now_ms
        self.world.gpu.show(now_ms)
        if self.orphans_until_ms is not None and now_ms >= self.orphans_until_ms:
            self.end_orphan()
        if self.alive and not self.loaded:
            self._load(now_ms)
        if self.up:
            if self.lines[-1] != _HEALTHY:
                self.lines.append(_HEALTHY)
            if not self.stalled and not self.asleep and not self.wedged:
                self._serve(now_ms, elapsed_ms)
        self.world.gpu.show(now_ms)
        device = self.world.gpu.device
        device.utilization = 90 if self.works and self.work.running else 0

    def _load(self, now_ms: int) -> None:
        age_ms = now_ms - self.started_at_ms
        mistake = self.shape.mistake()
        if mistake and age_ms >= 2 * SECOND:
            self._fail((f"vllm serve: error: {mistake}",), "exited with status 2")
        elif self.port_busy and age_ms >= 2 * SECOND:
            line = "(APIServer pid=1) OSError: [Errno 98] port 8000: address already in use"
            self._fail((line,), "exited with status 1")
        elif age_ms >= self.startup_ms // 2:
            if self.failing_starts:
                self.failing_starts -= 1
                self._fail((), "exited with status 0")
                return
            lines = failing_lines(self.shape, self.world.gpu.free)
            if lines:
                self._fail(lines, "exited with status 1")
                return
            self.loaded = True
            self.burst_at_ms = self.started_at_ms + self.startup_ms + BURST_EVERY_MS
            self.lines += loading_lines(self.shape)
            self.world.gpu.take(self.engine_pid, "VLLM::EngineCore", self.shape.requested)

    def _fail(self, lines: tuple[str, ...], detail: str) -> None:
        self.lines += lines
        self.die(detail)

    def _serve(self, now_ms: int, elapsed_ms: int) -> None:
        running = self.limit("running")
        most = self.shape.max_num_seqs if running is None else min(running, self.shape.max_num_seqs)
        self.work.go_on(self.shape, now_ms, elapsed_ms, most=most, door=self.limit("admission"))
        self.cpu_s += elapsed_ms / SECOND if self.work.running else 0.0
        if self.work.running and now_ms >= self.burst_at_ms:
            self.burst_at_ms = now_ms + BURST_EVERY_MS
            if self.world.gpu.free < self.shape.burst:
                self._run_out()

    def _run_out(self) -> None:
        gpu = self.world.gpu
        line = (
            "(EngineCore pid=2) ERROR 11-20 12:00:00 [core.py:1] torch.OutOfMemoryError: CUDA out of memory. "
            f"Tried to allocate {self.shape.burst / GIB:.2f} GiB. GPU 0 has a total capacity of "
            f"{gpu.total / GIB:.2f} GiB of which {gpu.free / GIB:.2f} GiB is free; this process has "
            f"{self.shape.requested / GIB:.2f} GiB memory in use."
        )
        self._fail((line,), "exited with status 0")


_HEALTHY = "(APIServer pid=1) INFO:     Application startup complete."


@dataclass
class SimLog:
    """The log of a server, life by life, as the supervisor keeps it."""

    server: SimServer

    def lines(self, began_at_ms: int, until_ms: int | None):
        if began_at_ms == self.server.started_at_ms:
            yield from tuple(self.server.lines)


# -- sources ---------------------------------------------------------------------------------------


@dataclass
class SimHealth:
    world: World
    name: str = f"health:{SERVER}"
    interval_ms: int = 1000
    hangs: bool = False

    def read(self, now_ms: int) -> list[Sample]:
        server = self.world.server
        if self.hangs:
            raise SourceError("health: the reader hangs")
        timeout = server.busy if server.up else server.port_busy
        figures = {"server_health_timeout": float(timeout)}
        if not timeout:
            figures["server_health_ok"] = float(server.well)
        return _samples(figures, now_ms)


@dataclass
class SimMetrics:
    """The metrics page. It stands still while no token comes, as the real one does."""

    world: World
    name: str = f"metrics:{SERVER}"
    interval_ms: int = 2000

    def read(self, now_ms: int) -> list[Sample]:
        server, work = self.world.server, self.world.server.work
        if not server.up or server.wedged:
            raise SourceError("metrics: connection refused")
        figures = {
            "vllm:num_requests_running": len(work.running),
            "vllm:num_requests_waiting": work.waiting,
            "vllm:kv_cache_usage_perc": work.kv_use,
            "vllm:num_preemptions_total": work.preempted,
            "vllm:iteration_tokens_total_count": work.steps,
            "vllm:generation_tokens_total": work.tokens,
        }
        samples = _samples(figures, now_ms, engine="0")
        for reason, count in (("stop", work.finished), ("abort", work.aborted)):
            figure = {"vllm:request_success_total": count}
            samples += _samples(figure, now_ms, engine="0", finished_reason=reason)
        states = {"awake": not server.asleep, "weights_offloaded": server.asleep, "discard_all": False}
        for state, is_so in states.items():
            samples += _samples({"vllm:engine_sleep_state": is_so}, now_ms, engine="0", sleep_state=state)
        return samples


@dataclass
class SimProcesses:
    """The server's processes, as the source of that name shows them, and the trees that others ask."""

    world: World
    name: str = "processes"
    interval_ms: int = 1000

    def read(self, now_ms: int) -> list[Sample]:
        server = self.world.server
        samples, members = [], []
        main = Identity(server.pid, 1)
        if server.alive:
            members.append(Member(main, "APIServer", "api_server", main))
            if server.loaded:
                engine = Identity(server.engine_pid, 1)
                members.append(Member(engine, "EngineCore", "engine_core", main))
        if server.orphan_pid is not None:
            orphan = Identity(server.orphan_pid, 1)
            members.append(Member(orphan, "EngineCore", "engine_core", main, is_orphan=True))
        self.world.trees.replace(SERVER, members)
        for process, role in (("APIServer", "api_server"), ("EngineCore", "engine_core")):
            own = [m for m in members if m.process == process]
            who = {"process": process, "role": role}
            if server.lives:
                samples += _samples({"server_process_exits_total": server.exits}, now_ms, **who)
            if own:
                for state in ("running", "stopped", "blocked", "zombie"):
                    is_so = {"server_process_state": state == "running"}
                    samples += _samples(is_so, now_ms, **who, state=state)
                figures = {
                    "server_process_cpu_seconds_total": server.cpu_s,
                    "server_process_orphaned": any(m.is_orphan for m in own),
                }
                samples += _samples(figures, now_ms, **who)
        return samples


@dataclass
class SimGuests:
    """What the guests in its processes tell of its door and its limits."""

    world: World
    name: str = "allocator"
    interval_ms: int = 1000

    def read(self, now_ms: int) -> list[Sample]:
        server = self.world.server
        if not (server.up and server.has_guest):
            return []
        in_hand = {"server_requests_in_flight": len(server.work.running) + server.work.waiting}
        samples = _samples(in_hand, now_ms, source="admission")
        samples += _samples({"server_admission_refused_total": server.work.refused}, now_ms)
        samples += _samples({"server_guest_paused": 0.0}, now_ms)
        for part, count in (("door", 1), ("guest", 2)):
            samples += _samples({"server_guests": count}, now_ms, part=part)
        for name in ("admission", "running"):
            limit = server.limit(name)
            if limit is not None:
                samples += _samples({"server_limit": limit}, now_ms, limit=name)
        return samples


@dataclass
class SimProbe:
    """Asks the server what it was told to ask: whether it is paused, and for one token."""

    world: World
    name: str = f"probe:{SERVER}"
    interval_ms: int = 1000
    wants: frozenset[str] = frozenset()

    def ask(self, wants) -> None:
        self.wants = frozenset(wants)

    def read(self, now_ms: int) -> list[Sample]:
        wants, self.wants = self.wants, frozenset()
        server = self.world.server
        if not wants:
            return []
        figures = {"server_paused": 0.0}
        if "canary" in wants and server.up:
            figures["server_canary_ok"] = float(server.works and not server.busy)
        return _samples(figures, now_ms)


def _samples(figures: dict[str, float], now_ms: int, **labels: str) -> list[Sample]:
    return [
        Sample(Labels.of(name, server=SERVER, **labels), now_ms, float(value))
        for name, value in figures.items()
    ]


# -- settings --------------------------------------------------------------------------------------


@dataclass
class SimRevisions:
    """Settings files in memory: written once, swapped at once; a disk that fails says so."""

    are_kept: bool = True  # else it is no business of gpuwatch's
    files: dict[int, dict[str, Any]] = field(default_factory=dict)
    in_use: int | None = None
    fails: bool = False

    def write(self, revision) -> None:
        self._use_disk("write")
        kept = self.files.setdefault(revision.number, dict(revision.arguments))
        if kept != dict(revision.arguments):
            raise ServerError(f"revision {revision.number} is there with other arguments", permanent=True)

    def swap(self, number: int) -> None:
        self._use_disk("swap")
        if number not in self.files:
            raise ServerError(f"revision {number}: no such file", permanent=True)
        self.in_use = number

    def current(self) -> int | None:
        return self.in_use

    def arguments(self) -> dict[str, Any]:
        return self.files[self.in_use]

    def _use_disk(self, what: str) -> None:
        if not self.are_kept:
            raise ServerError(f"{what} revision: none are kept; name servers[].revisions", permanent=True)
        if self.fails:
            raise ServerError(f"{what} revision: No space left on device; free some")
