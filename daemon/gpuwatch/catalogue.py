"""Every metric that gpuwatch makes itself, with kind, help and labels; vLLM's own stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gpuwatch.records import Metric, MetricKind
from gpuwatch.servers.starts import watch
from gpuwatch.sources import allocator, events, host, kernel, nvml, probe, server_processes, vllm

if TYPE_CHECKING:
    from collections.abc import Mapping


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(name=name, kind=MetricKind.GAUGE, help=text, labels=labels)


_OWN: Final = (
    _gauge(
        "up", "1 if the source, or this GPU of it, could be read, else 0.", "source", "server", "gpu", "uuid"
    ),
    _gauge(
        "server_down", "1 while a server that was healthy is not, or its start is overdue, else 0.", "server"
    ),
    _gauge(
        "server_progress",
        "1 for whether the server works, and why it is thought so; one series a server at a time.",
        "server",
        "verdict",
        "reason",
    ),
    _gauge("server_stopping", "1 while its supervisor stops it because it was asked to, else 0.", "server"),
    _gauge("server_revision", "The revision of its settings that the next start reads.", "server"),
    _gauge("server_wanted_revision", "The revision of its settings that a person wanted last.", "server"),
    _gauge("server_phase", "1 for the phase that the server is in.", "server", "phase"),
    _gauge(
        "server_start_time_seconds",
        "Unix time at which the process that is coming up began; none once it is healthy.",
        "server",
    ),
    _gauge("gpuwatch_receiver_broken", "1 while a receiver refuses every message, else 0.", "receiver"),
    _gauge("gpuwatch_notifications_unsent", "Messages that wait to be sent.", "receiver"),
    _gauge("gpuwatch_rules_failing", "Rules that could not be evaluated."),
    Metric(
        name="gpuwatch_rule_evaluations_missed_total",
        kind=MetricKind.COUNTER,
        help="Evaluations of rule groups that were left out because a tick came late.",
    ),
    _gauge("gpuwatch_remote_write_failing", "1 while a receiver of samples takes none, else 0.", "receiver"),
    Metric(
        name="gpuwatch_remote_write_dropped_samples_total",
        kind=MetricKind.COUNTER,
        help="Samples that a receiver refused, or that waited for it too long.",
        labels=("receiver",),
    ),
    _gauge("gpuwatch_store_failing", "1 while this file takes nothing that is to be saved, else 0.", "file"),
    Metric(
        name="gpuwatch_store_dropped_scrapes_total",
        kind=MetricKind.COUNTER,
        help="Scrapes that were given up because no disk took them.",
    ),
    Metric(
        name="gpuwatch_internal_errors_total",
        kind=MetricKind.COUNTER,
        help="Errors that nobody foresaw: bugs. The log has their tracebacks.",
    ),
)

METRICS: Final = (
    *_OWN,
    *nvml.METRICS,
    *events.METRICS,
    *kernel.METRICS,
    *allocator.METRICS,
    *host.METRICS,
    *server_processes.METRICS,
    *vllm.METRICS,
    *probe.METRICS,
    *watch.METRICS,
)
CATALOGUE: Final[Mapping[str, Metric]] = {metric.name: metric for metric in METRICS}
