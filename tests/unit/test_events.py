"""Xid and ECC errors as NVML tells of them."""

import pynvml
import pytest
from tests.fake_nvml import FakeNvml

from gpuwatch.errors import SourceError
from gpuwatch.sources.events import ECC_EVENTS, XID_ERRORS, XIDS, EventSource

SECOND = 1000
MINUTE = 60 * SECOND
SINGLE_BIT = pynvml.nvmlEventTypeSingleBitEccError
DOUBLE_BIT = pynvml.nvmlEventTypeDoubleBitEccError
XID = pynvml.nvmlEventTypeXidCriticalError


def counts(source, now_ms, metric, label):
    return {
        (int(s.labels.get("gpu")), s.labels.get(label)): s.value
        for s in source.read(now_ms)
        if s.labels.metric == metric
    }


def xids(source, now_ms):
    """Counts by GPU and number, those that are not 0 and those that are not in the table."""
    found = {(gpu, int(xid)): n for (gpu, xid), n in counts(source, now_ms, XID_ERRORS, "xid").items()}
    return {key: n for key, n in found.items() if n or key[1] not in XIDS}


def ecc(source, now_ms):
    return counts(source, now_ms, ECC_EVENTS, "kind")


def test_the_xids_that_matter_are_counted_from_nought():
    nvml = FakeNvml(gpus=2)
    source = EventSource(nvml)
    assert counts(source, 0, XID_ERRORS, "xid") == {(gpu, str(xid)): 0 for gpu in (0, 1) for xid in XIDS}
    nvml.xid(1, 79)
    nvml.xid(1, 79)
    nvml.xid(0, 31)
    assert xids(source, SECOND) == {(1, 79): 2, (0, 31): 1}
    assert xids(source, 2 * SECOND) == {(1, 79): 2, (0, 31): 1}


def test_another_xid_is_nought_when_it_appears_and_counts_from_the_next_read():
    nvml = FakeNvml()
    source = EventSource(nvml)
    source.read(0)
    nvml.xid(0, 137)
    nvml.xid(0, 137)
    assert xids(source, SECOND) == {(0, 137): 0}
    nvml.xid(0, 137)
    assert xids(source, 2 * SECOND) == {(0, 137): 3}


def test_ecc_errors_are_counted_from_nought_and_told_in_the_next_read():
    nvml = FakeNvml(gpus=2)
    source = EventSource(nvml)
    assert ecc(source, 0) == {(gpu, kind): 0 for gpu in (0, 1) for kind in ("single_bit", "double_bit")}
    nvml.happen(1, SINGLE_BIT, 0)
    nvml.happen(1, SINGLE_BIT, 0)
    nvml.happen(0, DOUBLE_BIT, 79)
    assert ecc(source, SECOND) == {
        (0, "single_bit"): 0,
        (0, "double_bit"): 1,
        (1, "single_bit"): 2,
        (1, "double_bit"): 0,
    }
    assert xids(source, 2 * SECOND) == {}


def test_nothing_but_xids_and_ecc_errors_is_listened_for():
    nvml = FakeNvml()
    EventSource(nvml).read(0)
    assert [events.types for events in nvml.event_sets] == [XID | SINGLE_BIT | DOUBLE_BIT]


def test_a_gpu_without_ecc_has_no_counters_of_it():
    nvml = FakeNvml()
    nvml.devices[0].event_types = XID
    source = EventSource(nvml)
    assert len(source.read(0)) == len(XIDS)
    assert [events.types for events in nvml.event_sets] == [XID]


def test_a_driver_that_cannot_say_what_it_tells_of_is_asked_for_xids():
    nvml = FakeNvml()
    nvml.unsupported = {"nvmlDeviceGetSupportedEventTypes"}
    source = EventSource(nvml)
    assert len(source.read(0)) == len(XIDS)
    nvml.xid(0, 31)
    assert xids(source, SECOND) == {(0, 31): 1}


def test_a_gpu_that_tells_of_nothing_wanted_has_no_counters():
    nvml = FakeNvml()
    nvml.devices[0].event_types = pynvml.nvmlEventTypeClock
    assert EventSource(nvml).read(0) == []
    assert all(events.freed for events in nvml.event_sets)


def test_a_gpu_that_tells_of_no_events_has_no_counters_and_is_asked_every_ten_minutes():
    nvml = FakeNvml()
    nvml.unsupported = {"nvmlDeviceRegisterEvents"}
    source = EventSource(nvml)
    for now_ms in range(0, 10 * MINUTE, SECOND):
        assert source.read(now_ms) == []
    assert nvml.calls["nvmlDeviceRegisterEvents"] == 1
    assert all(events.freed for events in nvml.event_sets)
    nvml.unsupported.clear()
    assert len(source.read(10 * MINUTE)) == len(XIDS) + 2


def test_a_gpu_that_falls_off_the_bus_is_counted_and_the_others_are_heard():
    nvml = FakeNvml(gpus=2)
    source = EventSource(nvml)
    source.read(0)
    nvml.xid(0, 79)
    nvml.devices[0].lost = True
    assert xids(source, SECOND) == {(0, 79): 1}
    nvml.xid(1, 13)
    for now_ms in (2 * SECOND, MINUTE):
        assert xids(source, now_ms) == {(0, 79): 1, (1, 13): 1}
    nvml.devices[0].lost = False
    source.read(2 * MINUTE)
    nvml.xid(0, 31)
    assert xids(source, 3 * MINUTE) == {(0, 79): 1, (0, 31): 1, (1, 13): 1}
    assert [events.freed for events in nvml.event_sets] == [True, False, False]


def test_counters_outlive_a_driver_that_goes_away():
    nvml = FakeNvml()
    source = EventSource(nvml)
    source.read(0)
    nvml.xid(0, 48)
    source.read(SECOND)
    nvml.driver_missing = True
    with pytest.raises(SourceError):
        source.read(2 * SECOND)
    nvml.driver_missing = False
    assert xids(source, 13 * SECOND) == {(0, 48): 1}
    nvml.xid(0, 48)
    assert xids(source, 14 * SECOND) == {(0, 48): 2}


def test_a_set_that_fails_is_registered_anew():
    nvml = FakeNvml()
    source = EventSource(nvml)
    source.read(0)
    nvml.fail_once["nvmlEventSetWait_v2"] = pynvml.NVML_ERROR_UNKNOWN
    source.read(SECOND)
    source.read(2 * SECOND)
    nvml.xid(0, 94)
    assert xids(source, 3 * SECOND) == {(0, 94): 1}
    assert [events.freed for events in nvml.event_sets] == [True, False]


def test_a_flood_takes_several_reads_and_nothing_of_it_is_lost():
    nvml = FakeNvml()
    source = EventSource(nvml)
    source.read(0)
    for _ in range(1000):
        nvml.xid(0, 95)
    seen = [xids(source, now_ms)[0, 95] for now_ms in range(SECOND, 6 * SECOND, SECOND)]
    assert seen[0] < 1000
    assert seen[-1] == 1000


def test_counters_of_a_gpu_whose_index_shifts_do_not_seem_to_rise():
    nvml = FakeNvml(gpus=2)
    source = EventSource(nvml)
    source.read(0)
    nvml.xid(1, 74)
    source.read(SECOND)
    nvml.devices.pop(0)
    assert xids(source, 2 * SECOND) == {(0, 74): 1}
