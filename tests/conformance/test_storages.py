"""The storages that the scripts run over hold the same samples, each in its own way."""

import math
import sqlite3
import struct
from contextlib import closing

import pytest
from tests.conformance.storages import STORAGES, scrapes, write

from gpuwatch.promql import Matcher
from gpuwatch.records import STALE, Labels
from gpuwatch.store import METRICS_DB

MINUTE_MS = 60_000
POWER, HEAT = Labels.of("power", gpu="0"), Labels.of("heat", gpu="0")
SAMPLES = {
    POWER: {minute * MINUTE_MS: float(minute) for minute in range(200) if minute % 7},
    HEAT: {
        0: 1.0,
        MINUTE_MS: STALE,
        90 * MINUTE_MS: math.nan,
        91 * MINUTE_MS: -math.inf,
        92 * MINUTE_MS: 5e-324,
    },
}


@pytest.mark.parametrize("store", STORAGES)
@pytest.mark.parametrize(("after", "upto"), [(-1, 200), (-300, 0), (59, 121), (199, 300), (88, 91)])
def test_every_sample_of_a_window_comes_back_to_the_bit(store, after, upto):
    after_ms, upto_ms = after * MINUTE_MS, upto * MINUTE_MS
    with STORAGES[store](SAMPLES) as querier:
        series = querier.select([Matcher("gpu", "=", "0")], after_ms, upto_ms)
    found = {s.labels: bits(zip(s.at_ms, s.values, strict=True)) for s in series}
    held = {
        labels: bits((at_ms, value) for at_ms, value in points.items() if after_ms < at_ms <= upto_ms)
        for labels, points in SAMPLES.items()
    }
    assert found == {labels: points for labels, points in held.items() if points}


def bits(points):
    return [(at_ms, struct.pack("<d", value)) for at_ms, value in points]


def test_full_hours_lie_in_frames_and_the_last_one_in_rows(tmp_path):
    write(tmp_path, list(scrapes(SAMPLES)))
    with closing(sqlite3.connect(tmp_path / METRICS_DB)) as connection:
        (frames,) = connection.execute("SELECT count(*) FROM frame").fetchone()
        (first_ms,) = connection.execute("SELECT min(at_ms) FROM hot").fetchone()
    assert frames == 3
    assert first_ms >= 180 * MINUTE_MS
