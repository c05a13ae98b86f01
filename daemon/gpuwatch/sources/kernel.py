"""Counts the lines of the kernel's log that tell why a server or a GPU failed; keeps none of their text.

Rule 1: it is read from /dev/kmsg where that is permitted, which costs nothing, else by asking journalctl.
Rule 2: only what the kernel itself said counts, from now on, and not what programs wrote into its log.
Rule 3: a counter is 0 in the first read, so that `increase()` sees what came since.
Rule 4: where neither may be read there is no source at all: 0 would say that nothing happened, and a source
that is down for ever would be an alert on every host without that permission.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import weakref
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from gpuwatch.errors import SourceError
from gpuwatch.records import Labels, Metric, MetricKind, Sample

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

EVENTS: Final = "host_kernel_events_total"
_OOM: Final = r"(?:(?:Memory cgroup out|Out) of memory.*?: )?Killed process \d+ \("
_CRASH: Final = "(?:segfault at|general protection|trap |unhandled exception)"
# The first that fits. Process names are the kernel's, cut to 15 characters: VLLM::EngineCor.
_SIGNS: Final = tuple(
    (kind, re.compile(sign))
    for kind, sign in (
        ("oom_kill_vllm", rf"{_OOM}(?:VLLM::|vllm\b)"),
        ("oom_kill", _OOM),
        ("gpu_lost", r"NVRM: .*has fallen off the bus"),
        ("xid_program", r"NVRM: Xid \(.*?\): (?:13|31|43|45)\b"),
        ("xid", r"NVRM: Xid \("),
        ("nvidia_error", r"(?i:NVRM: .*(?:fail|error|assert|mismatch|timed? ?out|unable|cannot|invalid))"),
        ("nvidia_error", r"nvidia-nvswitch\d+: SXid"),
        ("segfault", rf"(?:traps: )?(?:python|vllm|VLLM::|pt_)[^\[]*\[\d+\]:? {_CRASH}"),
        ("hung_task", r"INFO: task .*:\d+ .*blocked .*for more than \d+ seconds"),
        ("hung_task", r".*BUG: soft lockup|.*hard LOCKUP on cpu|rcu: INFO: rcu_\w+ .*detected.* stall"),
        ("mce", r"mce: \[Hardware Error\]: (?:Machine check events logged|CPU \d+: Machine Check)"),
        ("mce", r"EDAC \S+: \d+ [CU]E "),
        ("pcie_aer", r"\S+ [\da-f:.]+: AER: .* received"),
    )
)
KINDS: Final = tuple(dict.fromkeys(kind for kind, _ in _SIGNS))
METRICS: Final = (
    Metric(
        name=EVENTS,
        kind=MetricKind.COUNTER,
        help="Lines of the kernel's log since gpuwatch began: a process killed for want of memory "
        "(oom_kill_vllm: one of vLLM's), Xid errors (xid_program: 13, 31, 43, 45, which programs cause), a "
        "GPU fallen off the bus, other errors of NVIDIA's driver, crashes of Python or vLLM, tasks that "
        "hang, machine checks, PCIe errors.",
        labels=("kind",),
    ),
)

_MOST_LINES: Final = 2000
_RECORD_BYTES: Final = 8192  # the kernel's own bound
_PATIENCE_S: Final = 5.0
_DENIED: Final = re.compile(r"insufficient permissions|not seeing messages|No journal files")
_CURSOR: Final = "-- cursor: "


class KernelLog(Protocol):
    """Where the kernel's lines come from."""

    interval_ms: int

    def lines(self) -> Iterator[str]:
        """What came since the last call, a bounded number; SourceError if it can no longer be read."""
        ...


class KernelSource:
    """`host_kernel_events_total` of every kind."""

    name = "kernel"

    def __init__(self, kernel_log: KernelLog) -> None:
        """Reads nothing yet."""
        self.interval_ms = kernel_log.interval_ms
        self._log = kernel_log
        self._counts = Counter(dict.fromkeys(KINDS, 0))
        self._is_first = True

    def read(self, now_ms: int) -> list[Sample]:
        """SourceError if the log can no longer be read."""
        self._counts.update(filter(None, map(kind_of, self._log.lines())))
        values = dict.fromkeys(KINDS, 0) if self._is_first else self._counts
        self._is_first = False
        return [Sample(Labels.of(EVENTS, kind=kind), now_ms, float(values[kind])) for kind in KINDS]


def kind_of(line: str) -> str:
    """The kind of event that a line of the kernel's log tells of, empty if of none."""
    return next((kind for kind, sign in _SIGNS if sign.match(line)), "")


def kernel_source(
    since_s: int, kmsg: str = "/dev/kmsg", journalctl: str = "journalctl"
) -> KernelSource | None:
    """A source over what of both may be read, None if neither; the log says so. `since_s`: Unix time."""
    with suppress(OSError):
        return KernelSource(Kmsg(kmsg))
    try:
        return KernelSource(Journal(since_s, journalctl))
    except SourceError as error:
        log.info("%s; the kernel's events are not counted", error)
        return None


class Kmsg:
    """The kernel's ring buffer, from its end on; a read takes one record and never waits."""

    interval_ms = 1000

    def __init__(self, path: str, most_lines: int = _MOST_LINES) -> None:
        """OSError if it may not be read: without CAP_SYSLOG where kernel.dmesg_restrict is 1."""
        self._path = path
        self._most_lines = most_lines
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        weakref.finalize(self, os.close, self._fd)
        if not os.read(self._fd, _RECORD_BYTES):
            raise OSError(f"{path} is empty, which the kernel's log never is")  # a container's /dev/null
        with suppress(OSError):  # a pipe has no end to go to
            os.lseek(self._fd, 0, os.SEEK_END)

    def lines(self) -> Iterator[str]:
        """As `KernelLog`; what was overwritten before it was read is lost."""
        for _ in range(self._most_lines):
            try:
                record = os.read(self._fd, _RECORD_BYTES)
            except BlockingIOError:
                return
            except BrokenPipeError:  # overwritten; the next read goes on with the oldest there is
                continue
            except OSError as error:
                raise SourceError(f"read {self._path}: {error.strerror}") from error
            yield from _said_by_kernel(record.decode(errors="replace"))


def _said_by_kernel(record: str) -> Iterator[str]:
    """The text of `6,339,514090,-;TEXT` and lines of properties; 6 is facility * 8 + level, 0 its own."""
    prefix, _, text = record.partition(";")
    priority = prefix.partition(",")[0]
    if priority.isdecimal() and int(priority) >> 3 == 0:
        yield text.partition("\n")[0]


class Journal:
    """The kernel's lines that journald keeps; each look is a process that lives some milliseconds."""

    interval_ms = 10_000

    def __init__(self, since_s: int, command: str) -> None:
        """SourceError if there is no journalctl, or it may not read the system's journal."""
        self._command = command
        self._place = f"--since=@{since_s}"
        self._asked("--lines=0")

    def lines(self) -> Iterator[str]:
        """As `KernelLog`, in the order of the journal."""
        lines = self._asked(f"--lines={_MOST_LINES}", "--show-cursor", self._place).splitlines()
        if lines and lines[-1].startswith(_CURSOR):  # only the last: a process may name itself like one
            self._place = f"--after-cursor={lines.pop().removeprefix(_CURSOR)}"
        return iter(lines)

    def _asked(self, *options: str) -> str:
        kernels_own = ("_TRANSPORT=kernel", "SYSLOG_FACILITY=0")
        command = [self._command, "--system", "--no-pager", "--output=cat", *options, *kernels_own]
        try:
            done = subprocess.run(  # noqa: S603 (no shell; nothing in it is of others' making)
                command, capture_output=True, timeout=_PATIENCE_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise SourceError(
                f"ask journalctl for the kernel's lines: no answer in {_PATIENCE_S:g} s"
            ) from None
        except OSError as error:
            raise SourceError(f"run {self._command}: {error.strerror}; install systemd's journal") from error
        said = done.stderr.decode(errors="replace").strip()
        if denied := _DENIED.search(said):
            cure = "is journald running, and this user in the group systemd-journal?"
            raise SourceError(f"read the kernel's lines of the journal: {denied.group()}; {cure}")
        # Asked for its cursor, journalctl ends with 1 and without a word where no line is to be shown (252).
        if done.returncode and (said or done.stdout or done.returncode != 1):
            raise SourceError(f"ask journalctl for the kernel's lines: {said[:200] or done.returncode}")
        return done.stdout.decode(errors="replace")
