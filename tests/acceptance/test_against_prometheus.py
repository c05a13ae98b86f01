"""A real Prometheus and gpuwatch answer alike: made-up series, the rules of packs, and random expressions.

GPUWATCH_PROMETHEUS names the program (any from 2.42 on), GPUWATCH_EXPRESSIONS how many random ones are asked,
GPUWATCH_SEED their seed. Numbers may differ by 1e-9 of themselves.
"""

import contextlib
import http.client
import json
import math
import os
import random
import shutil
import socket
import subprocess
import time
from collections import Counter
from typing import NamedTuple
from urllib.parse import urlencode

import pytest
from tests.conformance import rule_files
from tests.conformance.made_up import MINUTE_MS, PAST_MS, START_MS, Wanted, scrapes, wanted
from tests.conformance.random_expressions import BUCKETS, COUNTERS, GAUGES, Expressions
from tests.conformance.storages import Lists

from gpuwatch import promql
from gpuwatch.config import RemoteWriteSettings
from gpuwatch.errors import QueryError
from gpuwatch.records import Labels
from gpuwatch.remote_write import RemoteWriter

PROGRAM = os.environ.get("GPUWATCH_PROMETHEUS") or shutil.which("prometheus")
EXPRESSIONS = int(os.environ.get("GPUWATCH_EXPRESSIONS", "1500"))
SEED = int(os.environ.get("GPUWATCH_SEED", "1"))
START_S, END_S = 30, 15
INSTANTS_MS = [START_MS + minute * MINUTE_MS + PAST_MS for minute in (3, 47, 71, 90, 118)]
RANGE_MS = (START_MS + 20 * MINUTE_MS + PAST_MS, START_MS + 118 * MINUTE_MS + PAST_MS, 7 * MINUTE_MS)
OPTIONS = (
    "--web.enable-remote-write-receiver",
    "--storage.tsdb.retention.time=100y",
    "--storage.tsdb.min-block-duration=20000d",
    "--storage.tsdb.max-block-duration=20000d",
    "--log.level=error",
)

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]


class Reply(NamedTuple):
    status: int
    body: bytes


class Prometheus:
    """A server of its own in an empty folder, on loopback."""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        (folder / "prometheus.yml").write_text("global: {evaluation_interval: 1m}\n")
        where = (f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data")
        with (folder / "log").open("wb") as log:
            command = [PROGRAM, f"--web.listen-address={self.address}", *where, *OPTIONS]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        self._connection = http.client.HTTPConnection(self.address, timeout=60)

    def wait(self):
        until_s = time.monotonic() + START_S
        while time.monotonic() < until_s and self._process.poll() is None:
            with contextlib.suppress(OSError):
                if self._asked("GET", "/-/ready").status == 200:
                    return
            self._connection.close()
            time.sleep(0.1)
        raise RuntimeError(f"cannot start {PROGRAM}: not ready after {START_S} s")

    def stop(self):
        self._connection.close()
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def write(self, taken):
        """All scrapes of a minute at once."""
        target = RemoteWriteSettings(name="prometheus", url=f"http://{self.address}/api/v1/write")
        minutes = {}
        for scrape in taken:
            minutes.setdefault(scrape.at_ms // MINUTE_MS, []).append(scrape)
        with contextlib.closing(RemoteWriter(target)) as writer:
            for some in minutes.values():
                writer.send(some)

    def instant(self, text, at_ms):
        return self._query("query", query=text, time=at_ms / 1000)

    def range(self, text, start_ms, end_ms, step_ms):
        return self._query(
            "query_range", query=text, start=start_ms / 1000, end=end_ms / 1000, step=step_ms / 1000
        )

    def _query(self, path, **form):
        """As `comparable` has it; QueryError."""
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = json.loads(self._asked("POST", f"/api/v1/{path}", urlencode(form), headers).body)
        if answer["status"] != "success":
            raise QueryError(answer["error"])
        kind, found = answer["data"]["resultType"], answer["data"]["result"]
        if kind in {"scalar", "string"}:
            return {(): {at(found[0]): number(found[1])}}
        return {
            Labels(one["metric"].items()): {
                at(at_s): number(text) for at_s, text in one.get("values") or [one["value"]]
            }
            for one in found
        }

    def _asked(self, *request):
        self._connection.request(*request)
        answer = self._connection.getresponse()
        return Reply(answer.status, answer.read())


def at(seconds):
    return round(seconds * 1000)


def number(text):
    return float(text.replace("Inf", "inf"))


class Ours:
    """Our evaluation of the same samples."""

    def __init__(self, taken):
        samples = {}
        for scrape in taken:
            for labels, value in zip(scrape.labels, scrape.values, strict=True):
                samples.setdefault(labels, {})[scrape.at_ms] = value
        self.series, self.samples = len(samples), sum(map(len, samples.values()))
        self._lists = Lists(samples)

    def instant(self, text, at_ms):
        return comparable(promql.evaluate(promql.parse(text), self._lists, at_ms).value, at_ms)

    def range(self, text, *instants_ms):
        return comparable(promql.evaluate_range(promql.parse(text), self._lists, *instants_ms).value, None)


def comparable(value, at_ms):
    """{labels: {instant in ms: value}}; a scalar has no labels."""
    if not isinstance(value, list):
        return {(): {at_ms: value}}
    if value and isinstance(value[0], promql.Series):
        return {s.labels: dict(zip(s.at_ms, s.values, strict=True)) for s in value}
    return {labels: {at_ms: number} for labels, number in value}


def difference(theirs, ours):
    """What differs, in words; empty if nothing does."""
    if theirs.keys() != ours.keys():
        return f"series: {[str(one) for one in theirs.keys() ^ ours.keys()][:4]} are on one side only"
    for labels, points in theirs.items():
        if points.keys() != ours[labels].keys():
            return (
                f"{labels}: instants: {sorted(points.keys() ^ ours[labels].keys())[:4]} are on one side only"
            )
        for at_ms, value in points.items():
            if not same(value, ours[labels][at_ms]):
                return f"{labels}: at {at_ms} there is {value!r}, here {ours[labels][at_ms]!r}"
    return ""


def same(one, other):
    return one == other or (one != one and other != other) or math.isclose(one, other, rel_tol=1e-9)


def answer_of(ask, *question):
    try:
        return ask(*question), None
    except QueryError as error:
        return None, str(error)


def compare(prometheus, ours, texts):
    """How often both were the same and how, and what differed."""
    counts, differences = Counter(), []
    for text in texts:
        questions = [("instant", (text, at_ms)) for at_ms in INSTANTS_MS] + [("range", (text, *RANGE_MS))]
        for kind, question in questions:
            theirs, refused = answer_of(getattr(prometheus, kind), *question)
            found, error = answer_of(getattr(ours, kind), *question)
            if refused or error:
                what = (
                    ""
                    if refused and error
                    else f"there: {refused or 'an answer'}; here: {error or 'an answer'}"
                )
            else:
                what = difference(theirs, found)
            if what:
                differences.append(f"{text!r}, {kind} {question[1:]}: {what}")
            counts["different" if what else "both refused" if refused else "identical"] += 1
            counts["not empty"] += bool(theirs)
    return counts, differences


@contextlib.contextmanager
def both(folder, found):
    """A Prometheus and ours with the same made-up samples of the wanted metrics."""
    if PROGRAM is None:
        pytest.skip("prometheus is not installed")
    taken = list(scrapes(found, random.Random(SEED)))
    prometheus = Prometheus(folder)
    try:
        prometheus.wait()
        prometheus.write(taken)
        yield prometheus, Ours(taken)
    finally:
        prometheus.stop()


def told(what, count, ours, counts, differences):
    print(f"\n{what}: {count} expressions, {ours.series} series, {ours.samples} samples: {dict(counts)}")
    assert not differences, "\n".join([f"{len(differences)} differ:", *differences[:20]])


@pytest.mark.parametrize("files", [rule_files.ours, rule_files.packs], ids=lambda files: files.__name__)
def test_rules_come_out_as_in_prometheus(files, tmp_path):
    texts = rule_files.expressions(files())
    if not texts:
        pytest.skip("there are no rule packs beside the project")
    with both(tmp_path, wanted(map(promql.parse, texts))) as (prometheus, ours):
        counts, differences = compare(prometheus, ours, texts)
    told(files.__name__, len(texts), ours, counts, differences)
    assert counts["not empty"] > counts["identical"] / 4


def test_random_expressions_come_out_as_in_prometheus(tmp_path):
    expressions = Expressions(random.Random(SEED))
    texts = [expressions.one() for _ in range(EXPRESSIONS)]
    labelled = [{"gpu": f"gpu-{gpu}", "job": f"job-{job}"} for gpu in range(3) for job in range(2)]
    found = {metric: Wanted({Labels.of(metric, **one): None for one in labelled}) for metric in GAUGES}
    for metric in GAUGES:
        found[metric].is_ranked = True
    for metric in COUNTERS:
        found[metric] = Wanted({Labels.of(metric, **one): None for one in labelled}, is_counter=True)
    for metric in BUCKETS:
        bounds = ("0.1", "0.5", "1", "+Inf")
        series = {Labels.of(metric, **one, le=bound): None for one in labelled for bound in bounds}
        found[metric] = Wanted(series, is_counter=True)
    with both(tmp_path, found) as (prometheus, ours):
        counts, differences = compare(prometheus, ours, texts)
    told("random", len(texts), ours, counts, differences)
    assert counts["not empty"] > counts["identical"] / 2
    assert 0 < counts["both refused"] < counts["identical"] / 4


@pytest.mark.parametrize("ours", [{"x": {0: 1.0 + 3e-9}}, {"x": {1: 1.0}}, {"x": {}}, {"y": {0: 1.0}}, {}])
def test_a_difference_is_noticed(ours):
    assert difference({"x": {0: 1.0}}, {"x": {0: 1.0 + 5e-10}}) == ""
    assert difference({"x": {0: 1.0}}, ours) != ""
