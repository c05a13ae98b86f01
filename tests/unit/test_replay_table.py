"""The pack over a recorded H200: docs/alerts.md says what happened when, and when it was told."""

import json
import lzma
import re
from itertools import pairwise
from pathlib import Path

from click.testing import CliRunner

from gpuwatch import cli
from gpuwatch.sources.exposition import Exposition

ROOT = Path(__file__).parents[2]
RECORDING = ROOT / "tests/recordings/h200-vllm024-incidents.jsonl.xz"
# What is no longer apart is one incident: requests end and come in bursts.
BURSTS_S = {"VLLMKVCacheFull": 3, "VLLMPreempting": 14, "VLLMTimeToFirstTokenHigh": 14}
LEAST_S = {"GPUMemoryExhaustionPredicted": 5}  # what is taken in one step is no trend


def ticks():
    with lzma.open(RECORDING, "rt") as lines:
        return [tick for tick in map(json.loads, lines) if tick["kind"] == "tick"]


def memory(tick, member):
    return tick["devices"][0]["nvmlDeviceGetMemoryInfo"][member]


def foreign_bytes(tick):
    names = {p["pid"]: p["name"] for p in tick["processes"]}
    held = tick["devices"][0]["nvmlDeviceGetComputeRunningProcesses"]
    return sum(p["usedGpuMemory"] for p in held if not names.get(p["pid"], "VLLM").startswith("VLLM"))


def page(tick):
    text = tick["vllm_metrics"]
    return {s.labels: s.value for s in Exposition().samples(text, 0)} if text else {}


def figure(tick, metric, **labels):
    found = [v for k, v in page(tick).items() if k.metric == metric and labels.items() <= dict(k).items()]
    return found[0] if found else 0.0


def slow_first_tokens(tick):
    metric = "vllm:time_to_first_token_seconds"
    return figure(tick, f"{metric}_count") - figure(tick, f"{metric}_bucket", le="10.0")


# What an alert speaks of, as the recording itself shows it from one second to the next, without any rule.
TRUE = {
    "VLLMKVCacheFull": lambda _, now: figure(now, "vllm:kv_cache_usage_perc") > 0.9,
    "VLLMPreempting": lambda was, now: (
        figure(now, "vllm:num_preemptions_total") > figure(was, "vllm:num_preemptions_total")
    ),
    "VLLMTimeToFirstTokenHigh": lambda was, now: slow_first_tokens(now) > slow_first_tokens(was),
    "GPUMemoryForeignProcess": lambda _, now: foreign_bytes(now) > 0.02 * memory(now, "total"),
    "GPUMemoryExhaustionPredicted": lambda was, now: foreign_bytes(now) > foreign_bytes(was) + 2**30,
    "GPUMemoryHeadroomLow": lambda _, now: memory(now, "free") < 0.02 * memory(now, "total"),
    "VLLMDown": lambda _, now: now["vllm_health"] != 200,
}


def spans(alert, recorded):
    """[first, last] second of each time that it was so; the last is None if it still is at the end."""
    found = []
    for was, now in pairwise(recorded):
        if TRUE[alert](was, now):
            second = round(now["t"] - recorded[0]["t"])
            if found and second - found[-1][1] <= BURSTS_S.get(alert, 1):
                found[-1][1] = second
            else:
                found.append([second, second])
    end = round(recorded[-1]["t"] - recorded[0]["t"])
    lasting = [(first, last) for first, last in found if last - first >= LEAST_S.get(alert, 0)]
    return [(first, None if last == end else last) for first, last in lasting]


def has_served(recorded):
    """The ticks with the health of a server that was never healthy made good: it is not down."""
    first = next(i for i, tick in enumerate(recorded) if tick["vllm_health"] == 200)
    return [tick | {"vllm_health": 200} for tick in recorded[:first]] + recorded[first:]


def told(start_s):
    """[alert, second it fired, second it was over or None], in the order of firing."""
    done = CliRunner().invoke(cli.main, ["replay", str(RECORDING), "--rules", str(ROOT / "rules"), "--json"])
    assert done.exit_code == 0, done.output
    found = []
    for line in filter(lambda line: line.startswith("{"), done.output.splitlines()):
        event = json.loads(line)
        if event["kind"] == "alert" and event["state"] == "firing":
            found.append([event["alert"], int(event["t"] - start_s), None])
        if event["kind"] == "alert" and event["state"] == "resolved":
            (open_,) = (one for one in found if one[0] == event["alert"] and one[2] is None)
            open_[2] = int(event["t"] - start_s)
    return found


def rows():
    recorded = has_served(ticks())
    true = {alert: spans(alert, recorded) for alert in TRUE}
    table = []
    for alert, fired, over in told(recorded[0]["t"]):
        first, last = true[alert].pop(0)
        assert fired >= first, f"{alert} was told before it happened"
        table.append((alert, f"{first} to {last or 'end'}", str(fired), str(over or "never")))
    assert not any(true.values()), f"happened and was not told: {true}"
    return table


def test_the_recorded_incidents_of_a_real_gpu_are_told_as_the_table_says_and_nothing_else():
    section = (ROOT / "docs/alerts.md").read_text(encoding="utf-8").partition("## Over a recorded H200")[2]
    drawn = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE)
    seen = rows()
    assert drawn == seen, "docs/alerts.md is old; it is:\n" + "\n".join(map(str, seen))
