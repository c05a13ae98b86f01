"""`make bench ONLY=rules`: what one evaluation of 500 rules over 3,000 series costs, here and in Prometheus.

An hour of samples every 15 s: of eight GPUs, four vLLM servers, the host as node_exporter shows it, and what
the shipped rules ask of. The rules are the shipped ones and the usual ones over other windows and thresholds,
one in four of them for all GPUs, disks and so on, the others for one. What is measured is CPU time, which is
what a clock shows on a host that has nothing else to do; of Prometheus the best of several by its own clock.
"""

import itertools
import statistics
import tempfile
import time
from bisect import bisect_right
from pathlib import Path

import numpy as np
import peers
import yaml
from series import HOUR_MS, ROOT, Day, Target

from gpuwatch import promql
from gpuwatch.config import StoreSettings
from gpuwatch.promql.ast import VectorSelector, walk
from gpuwatch.records import Labels
from gpuwatch.store import Changes, Disk, Store, open_history

RULES, SERIES = 500, 3_000
STEP_MS = 15_000
START_MS = 1_700_000_000_000 // HOUR_MS * HOUR_MS
TIMES = 15
HISTORY_TIMES = 3
GPU = {"gpu": [str(i) for i in range(8)]}
ENGINE = {"server": ["a", "b", "c", "d"], "model_name": ["qwen"]}
BOUNDS = {"le": ["0.05", "0.1", "0.25", "0.5", "1", "2.5", "5", "10", "20", "+Inf"]}
DISKS = {"device": [f"nvme{i}n1" for i in range(12)]}
MOUNTS = {"mountpoint": [f"/mnt/{i}" for i in range(12)], "fstype": ["xfs"]}
NICS = {"device": [f"eth{i}" for i in range(12)]}
CPUS = {"cpu": [str(i) for i in range(64)], "mode": ["idle", "user", "system", "iowait", "steal"]}
UNITS = {"name": [f"{i}.service" for i in range(60)], "state": ["active", "failed", "inactive"]}
METRICS = (
    (GPU, "DCGM_FI_DEV_GPU_TEMP DCGM_FI_DEV_MEMORY_TEMP DCGM_FI_DEV_POWER_USAGE DCGM_FI_DEV_GPU_UTIL"),
    (GPU, "DCGM_FI_DEV_FB_USED DCGM_FI_DEV_FB_FREE DCGM_FI_DEV_SM_CLOCK DCGM_FI_DEV_MEM_COPY_UTIL"),
    (
        GPU,
        "DCGM_FI_DEV_XID_ERRORS_total DCGM_FI_DEV_PCIE_REPLAY_COUNTER_total DCGM_FI_DEV_ECC_DBE_VOL_total",
    ),
    (ENGINE, "vllm:num_requests_running vllm:num_requests_waiting vllm:kv_cache_usage_perc"),
    (ENGINE, "vllm:num_preemptions_total vllm:prompt_tokens_total vllm:generation_tokens_total"),
    (ENGINE | BOUNDS, "vllm:e2e_request_latency_seconds_bucket vllm:time_to_first_token_seconds_bucket"),
    (ENGINE | BOUNDS, "vllm:inter_token_latency_seconds_bucket vllm:request_queue_time_seconds_bucket"),
    (CPUS, "node_cpu_seconds_total"),
    (UNITS, "node_systemd_unit_state"),
    (MOUNTS, "node_filesystem_avail_bytes node_filesystem_size_bytes node_filesystem_readonly"),
    (MOUNTS, "node_filesystem_files node_filesystem_files_free"),
    (
        NICS,
        "node_network_receive_bytes_total node_network_transmit_bytes_total node_network_receive_errs_total",
    ),
    (NICS, "node_network_transmit_errs_total node_network_receive_packets_total node_network_up"),
    (DISKS, "node_disk_read_bytes_total node_disk_written_bytes_total node_disk_io_time_seconds_total"),
    (DISKS, "node_disk_read_time_seconds_total node_disk_reads_completed_total"),
    ({}, "node_memory_MemAvailable_bytes node_memory_MemTotal_bytes node_load1 node_load5 node_time_seconds"),
)
WINDOWS = (
    "5m",
    "5m",
    "1m",
    "5m",
    "5m",
    "2m",
    "5m",
    "10m",
    "5m",
    "15m",
    "5m",
    "30m",
    "1h",
)  # 5m as in most packs
ONE = {  # of the objects that a metric is about
    "DCGM": '{{gpu="{}"}}',
    "vllm": '{{server="{}"}}',
    "node_f": '{{mountpoint="/mnt/{}"}}',
    "node_n": '{{device="eth{}"}}',
    "node_d": '{{device="nvme{}n1"}}',
}
USUAL = """
DCGM_FI_DEV_GPU_TEMP{one} > {n}
avg_over_time(DCGM_FI_DEV_GPU_UTIL{one}[{w}]) < {n}
max_over_time(DCGM_FI_DEV_MEMORY_TEMP{one}[{w}]) > {n}
avg by (gpu) (DCGM_FI_DEV_POWER_USAGE{one}) > {n}
DCGM_FI_DEV_FB_USED{one} / (DCGM_FI_DEV_FB_USED{one} + DCGM_FI_DEV_FB_FREE{one}) > 0.{n}
increase(DCGM_FI_DEV_XID_ERRORS_total{one}[{w}]) > {n}
rate(DCGM_FI_DEV_PCIE_REPLAY_COUNTER_total{one}[{w}]) > {n}
deriv(DCGM_FI_DEV_FB_USED{one}[{w}]) > {n}
predict_linear(DCGM_FI_DEV_FB_FREE{one}[{w}], 3600) < {n}
stddev_over_time(DCGM_FI_DEV_SM_CLOCK{one}[{w}]) > {n}
vllm:kv_cache_usage_perc{one} > 0.{n}
avg_over_time(vllm:num_requests_waiting{one}[{w}]) > {n}
rate(vllm:num_preemptions_total{one}[{w}]) > {n}
sum by (server) (rate(vllm:generation_tokens_total{one}[{w}])) < {n}
histogram_quantile(0.95, sum by (server, le) (rate(vllm:time_to_first_token_seconds_bucket{one}[{w}]))) > {n}
histogram_quantile(0.99, sum by (le) (rate(vllm:e2e_request_latency_seconds_bucket{one}[{w}]))) > {n}
histogram_quantile(0.5, rate(vllm:inter_token_latency_seconds_bucket{one}[{w}])) > {n}
histogram_quantile(0.9, sum by (server, le) (rate(vllm:request_queue_time_seconds_bucket{one}[{w}]))) > {n}
vllm:num_requests_waiting{one} > 2 * vllm:num_requests_running{one} and vllm:num_requests_waiting{one} > {n}
100 * (1 - avg(rate(node_cpu_seconds_total{{mode="idle"}}[{w}]))) > {n}
sum(rate(node_cpu_seconds_total{{mode="iowait"}}[{w}])) > {n}
node_systemd_unit_state{{state="failed"}} == {n}
node_filesystem_avail_bytes{one} / node_filesystem_size_bytes{one} < 0.{n}
predict_linear(node_filesystem_avail_bytes{one}[{w}], 4 * 3600) < {n} and node_filesystem_readonly{one} == 0
node_filesystem_files_free{one} / node_filesystem_files{one} * 100 < {n}
rate(node_network_receive_errs_total{one}[{w}]) / rate(node_network_receive_packets_total{one}[{w}]) > 0.{n}
rate(node_network_receive_bytes_total{one}[{w}]) + rate(node_network_transmit_bytes_total{one}[{w}]) > {n}
changes(node_network_up{one}[{w}]) > {n}
rate(node_disk_io_time_seconds_total{one}[{w}]) > 0.{n}
rate(node_disk_read_time_seconds_total{one}[{w}]) / rate(node_disk_reads_completed_total{one}[{w}]) > 0.{n}
topk(3, rate(node_disk_written_bytes_total{one}[{w}])) > {n}
node_memory_MemAvailable_bytes / node_memory_MemTotal_bytes * 100 < {n}
node_load1 > {n} unless node_load5 > {n}
max_over_time(node_load5[{w}]) > {n}
min_over_time(node_memory_MemAvailable_bytes[{w}]) < {n}
absent(node_time_seconds offset {w})
"""


# -- what is measured ----------------------------------------------------------------------------------


def rules():
    """The shipped expressions, and of the usual ones as many as are missing."""
    usual = USUAL.split("\n")[1:-1]
    found = shipped()
    for number in range(RULES - len(found)):
        variant, place = divmod(number, len(usual))
        window = WINDOWS[(variant + place) % len(WINDOWS)]
        found.append(usual[place].format(w=window, n=variant * 7 % 90 + 1, one=one_of(usual[place], variant)))
    return found


def one_of(text, variant):
    """A matcher for one of the objects that the metric of a rule is about; none in every fourth rule."""
    matcher = next((matcher for opening, matcher in ONE.items() if opening in text), "")
    name = "abcd"[variant % 4] if "server" in matcher else str(variant % 8)
    return matcher.format(name) if variant % 4 else ""


def shipped():
    todo = [yaml.safe_load(path.read_text()) for path in sorted(ROOT.glob("rules/*.yaml"))]
    groups = [group for document in todo for group in document["groups"]]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def day(texts):
    """An hour of all series, each target's an array."""
    dice = np.random.default_rng(7)
    named = [
        (Labels.of(n, **one)) for labels, names in METRICS for n in names.split() for one in product(labels)
    ]
    found = {"usual": named, "shipped": sorted(set(asked(texts)) - set(named))}
    rest = SERIES - sum(map(len, found.values()))
    found["other"] = [Labels.of(f"node_vmstat_{i}_total", cpu=str(i % 64)) for i in range(rest)]
    return Day("1 h of rules' series", tuple(target(name, labels, dice) for name, labels in found.items()))


def product(labels):
    return (dict(zip(labels, values, strict=True)) for values in itertools.product(*labels.values()))


def asked(texts):
    """Two series of each metric that a shipped rule asks of, with the labels that it asks for."""
    for text in texts[: len(shipped())]:
        for node, _ in walk(promql.parse(text)):
            if isinstance(node, VectorSelector):
                fixed = {m.name: m.value for m in node.matchers if m.op == "="}
                for gpu in {fixed.get("gpu") or str(i) for i in range(2)}:
                    yield Labels.of(fixed.pop("__name__", "m"), **{**fixed, "gpu": gpu})


def target(name, labels, dice):
    steps = HOUR_MS // STEP_MS
    at_ms = START_MS + 1 + np.arange(steps, dtype=np.int64) * STEP_MS
    values = np.round(dice.uniform(0, 100, (steps, len(labels))), 3)
    for column, one in enumerate(labels):
        if one.metric.endswith(("_total", "_bucket")):
            values[:, column] = np.cumsum(values[:, column])
    for le in range(1, len(BOUNDS["le"])):  # a histogram grows from bound to bound
        for column, one in enumerate(labels):
            if one.get("le") == BOUNDS["le"][le]:
                values[:, column] += values[:, column - 1]
    return Target(name, STEP_MS, tuple(labels), values, at_ms, at_ms)


class Lists:
    """Two lists a series; it remembers which series some matchers mean, as the store does."""

    def __init__(self, taken):
        self.read = 0
        self._meant = {}
        self._series = [
            promql.Series(labels, of.jittered_ms.tolist(), values)
            for of in taken.targets
            for labels, values in zip(of.labels, of.values.T.tolist(), strict=True)
        ]

    def select(self, matchers, after_ms, upto_ms):
        found = []
        for series in self._that(tuple(matchers)):
            first, end = bisect_right(series.at_ms, after_ms), bisect_right(series.at_ms, upto_ms)
            if first < end:
                found.append(promql.Series(series.labels, series.at_ms[first:end], series.values[first:end]))
        self.read += len(found)
        return found

    def _that(self, matchers):
        if matchers not in self._meant:
            accepted = [s for s in self._series if all(m.matches(s.labels.get(m.name)) for m in matchers)]
            self._meant[matchers] = accepted
        return self._meant[matchers]


def median_ms(trees, querier, end_ms, times=TIMES):
    """Of one evaluation of all, at instants a second apart, after one that does not count."""
    took = []
    for number in range(times + 1):
        began = time.process_time()
        for tree in trees:
            promql.evaluate(tree, querier, end_ms - number * 1000)
        took.append((time.process_time() - began) * 1000)
    return statistics.median(took[1:])


def stored(taken, folder):
    """The daemon's store with that hour, saved."""
    store = Store(HOUR_MS, Disk(folder, StoreSettings(), "bench", START_MS))
    for tick in taken.ticks():
        for scrape in tick:
            store.append(scrape.target, scrape.at_ms, scrape.labels, scrape.values)
        store.save(Changes(), tick[-1].at_ms)
    return store


def prometheus_ms(taken, texts):
    """What its own clock says of one evaluation of all; None where it is not installed."""
    peer = peers.PROMETHEUS
    if peers.shutil.which(peer.program) is None:
        print(f"skipped: {peer.program} is not installed")
        return None
    with peers._running(peer.program, peer.options) as server:
        peers._feed(server, taken, range(taken.start_ms, taken.end_ms + 1, peers.MINUTE_MS), aligned=False)
        return 1000 * sum(min(_asked_s(server, text, taken.end_ms) for _ in range(5)) for text in texts)


def _asked_s(server, text, at_ms):
    answer = server.ask("/api/v1/query", query=text, time=at_ms / 1000, stats="all").json()
    return answer["data"]["stats"]["timings"]["evalTotalTime"]


def bench(_seconds):
    texts = rules()
    taken = day(texts)
    began = time.process_time()
    trees = [promql.parse(text) for text in texts]
    parsed = (time.process_time() - began) * 1000
    lists = Lists(taken)
    yield "rules.parse_all", parsed, "ms", None, "once, when they are loaded"
    took = median_ms(trees, lists, taken.end_ms)
    read = lists.read // (TIMES + 1)
    beside = f"{len(texts)} rules over {taken.series} series of {taken.samples} samples; {read} series read"
    yield "rules.evaluate_all_memory", took, "ms", 60, beside
    with tempfile.TemporaryDirectory(prefix="gpuwatch-bench-") as name:
        store = stored(taken, Path(name))
        took = median_ms(trees, store, taken.end_ms)
        yield "rules.evaluate_all_store", took, "ms", 130, "the daemon's store: what judges"
        store.seal(taken.end_ms + 3 * HOUR_MS)
        store.close()
        with open_history(Path(name)) as history:
            files = median_ms(trees, history, taken.end_ms, HISTORY_TIMES)
        yield "rules.evaluate_all_history", files, "ms", None, "the sealed hour on disk: what a backtest asks"
    theirs = prometheus_ms(taken, texts)
    if theirs is not None:
        yield "peer.prometheus_evaluate_all", theirs, "ms", None, "by its own clock, its API not counted"
        yield "rules.store_vs_prometheus", took / theirs, "x", None, "one evaluation of all, here over there"
