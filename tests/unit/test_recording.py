"""A recording is played as if it were the host, and one that we write plays back what was read."""

import gzip
import json
import lzma
import shutil
from pathlib import Path

import pynvml
import pytest
from tests.fake_nvml import GIB, FakeNvml

from gpuwatch.errors import SourceError
from gpuwatch.sources import NvmlSource, NvmlStaticSource
from gpuwatch.sources.record import Recorder
from gpuwatch.sources.recording import Recording

H200 = Path(__file__).parents[1] / "recordings" / "h200-vllm024-incidents.jsonl.xz"
SECOND = 1000


@pytest.fixture
def h200():
    return Recording(H200)


def source(recording, name):
    return next(s for s in recording.sources("qwen") if s.name == name)


def values(samples, metric, label=""):
    return {s.labels.get(label): s.value for s in samples if s.labels.metric == metric}


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def small(**tick):
    device = {"nvmlDeviceGetTemperature(0)": 40}
    static = {"kind": "static", "t": 100.0, "devices": [{"nvmlDeviceGetUUID": "GPU-1"}]}
    return [static, {"kind": "tick", "t": 100.0, "devices": [device], **tick}]


# -- the H200's seven minutes ------------------------------------------------------------------------


def test_a_recording_starts_at_its_first_tick_and_ends_at_its_last(h200):
    assert h200.start_ms == 1_795_177_020_810
    assert not h200.ended
    h200.seek(h200.start_ms + 1000 * SECOND)
    assert h200.ended
    assert h200.fault == ""
    assert h200.present_ms == h200.start_ms + 434 * SECOND


def test_seeking_goes_to_the_last_tick_that_is_not_later(h200):
    h200.seek(h200.start_ms + 70 * SECOND + 900)
    assert h200.present_ms == h200.start_ms + 70 * SECOND
    assert h200.notes == ("load: 8 clients",)
    h200.seek(h200.start_ms)
    assert h200.present_ms == h200.start_ms + 70 * SECOND


def test_reading_moves_the_recording(h200):
    now_ms = h200.start_ms + 100 * SECOND
    source(h200, "nvml").read(now_ms)
    assert now_ms - SECOND < h200.present_ms <= now_ms


def test_the_real_nvml_source_reads_the_recorded_gpu(h200):
    samples = source(h200, "nvml").read(h200.start_ms + 255 * SECOND)
    assert values(samples, "up") == {"": 1}
    assert values(samples, "gpu_memory_total_bytes") == {"": 150_754_820_096}
    assert values(samples, "gpu_memory_temperature_celsius")[""] > 30
    assert not values(samples, "gpu_memory_reserved_bytes")
    owners = values(samples, "gpu_process_memory_used_bytes", "owner")
    assert owners["vllm"] == pytest.approx(24_150 << 20, rel=0.01)
    assert owners["foreign"] > 80 * GIB


def test_what_does_not_change_comes_from_the_static_line(h200):
    samples = source(h200, "nvml_static").read(h200.start_ms)
    assert values(samples, "gpu_temperature_threshold_celsius", "threshold")["slowdown"] == 89
    (info,) = [s.labels for s in samples if s.labels.metric == "gpu_info"]
    assert info.get("name") == "NVIDIA H200"
    assert info.get("driver_version") == "580.159.04"


def test_the_power_cap_counts_seconds(h200):
    nvml = source(h200, "nvml")

    def capped_s(second):
        samples = nvml.read(h200.start_ms + second * SECOND)
        return values(samples, "gpu_violation_seconds_total", "policy")["power"]

    assert capped_s(360) + 40 == pytest.approx(capped_s(400), abs=2)


def test_health_and_metrics_follow_the_server(h200):
    health, metrics = source(h200, "health:qwen"), source(h200, "metrics:qwen")
    seen = []
    for second in (0, 100, 290, 325, 360):
        now_ms = h200.start_ms + second * SECOND
        ok = values(health.read(now_ms), "server_health_ok", "server")["qwen"]
        seen.append(ok)
        if ok:
            assert values(metrics.read(now_ms), "vllm:kv_cache_usage_perc", "server").keys() == {"qwen"}
        else:
            with pytest.raises(SourceError, match="ConnectionRefusedError"):
                metrics.read(now_ms)
    assert seen == [0, 1, 0, 1, 0]


def test_the_allocator_is_told_by_rank_and_is_gone_with_its_process(h200):
    allocator = source(h200, "allocator")
    samples = allocator.read(h200.start_ms + 100 * SECOND)
    assert values(samples, "cuda_allocator_reserved_bytes", "worker") == {"rank0": 24_335_351_808}
    assert values(samples, "cuda_allocator_ooms_total", "gpu") == {"0": 0}
    assert values(samples, "cuda_allocator_ooms_total", "uuid").keys() == {
        "GPU-00000000-0000-0000-0000-000000000000"
    }
    assert allocator.read(h200.start_ms + 290 * SECOND) == []


def test_the_host_is_the_recorded_one(h200):
    samples = source(h200, "host").read(h200.start_ms)
    assert values(samples, "host_memory_total_bytes") == {"": 135_148_564_480}
    assert 0 <= values(samples, "host_cpu_ratio")[""] <= 1


def test_a_server_process_is_there_from_its_start_to_its_death(h200):
    seconds = (0, 10, 100, 290, 300, 340)
    there = [h200.has_server_process(h200.start_ms + s * SECOND) for s in seconds]
    assert there == [False, True, True, True, True, False]


def test_nothing_is_made_up_after_the_end(h200):
    nvml = source(h200, "nvml")
    with pytest.raises(SourceError, match="nothing for this moment"):
        nvml.read(h200.start_ms + 1000 * SECOND)
    assert h200.has_server_process(h200.start_ms + 1000 * SECOND) is None


# -- files that are not as they should be ----------------------------------------------------------


@pytest.mark.parametrize("suffix", [".xz", ".gz", ""])
def test_a_truncated_recording_plays_up_to_the_break_and_says_so(tmp_path, suffix):
    with lzma.open(H200) as file:
        plain = file.read(6_000_000)
    data = {".xz": lzma.compress(plain, preset=0), ".gz": gzip.compress(plain), "": plain}[suffix]
    path = tmp_path / f"cut.jsonl{suffix}"
    path.write_bytes(data[: len(data) * 9 // 10])
    recording = Recording(path)
    recording.seek(recording.start_ms + 1000 * SECOND)
    assert recording.ended
    assert recording.present_ms > recording.start_ms + 50 * SECOND
    assert "broken off after line" in recording.fault
    with pytest.raises(SourceError, match="broken off after line"):
        source(recording, "nvml").read(recording.start_ms + 1000 * SECOND)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jsonl", b""),
        ("empty.jsonl.xz", b""),
        ("text.jsonl", b"hello\n"),
        ("binary.jsonl", b"\xff\xfe\x00\x01" * 100),
        ("plain.jsonl.xz", b'{"kind": "static", "devices": []}\n'),
        ("plain.jsonl.gz", b'{"kind": "static", "devices": []}\n'),
        ("list.jsonl", b"[]\n"),
        ("only-static.jsonl", b'{"kind": "static", "devices": []}\n'),
        ("tick-first.jsonl", b'{"kind": "tick", "t": 1, "devices": []}\n'),
        ("tick-without-time.jsonl", b'{"kind": "static", "devices": []}\n{"kind": "tick", "devices": []}\n'),
    ],
)
def test_a_file_that_is_no_recording_is_a_source_error(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SourceError, match="is it a file that gpuwatch record wrote"):
        Recording(path)


def test_a_missing_file_is_a_source_error(tmp_path):
    with pytest.raises(SourceError, match="No such file"):
        Recording(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    "tick",
    [
        {"host": None},
        {"host": {"load1": "high"}},
        {"torch": {"7": {}}},
        {"processes": [{"pid": "x"}]},
        {"vllm_metrics": "<html>"},
        {"vllm_metrics": 7},
        {"vllm_health": None, "vllm_health_error": "gaierror"},
        {"devices": [7, 8]},
        {"devices": [{"nvmlDeviceGetMemoryInfo": {"total": 1}}]},
    ],
)
def test_answers_that_no_host_would_give_are_source_errors(tmp_path, tick):
    recording = Recording(written(tmp_path / "odd.jsonl", small(**tick)))
    failed = 0
    for played in recording.sources("qwen"):
        try:
            played.read(recording.start_ms)
        except SourceError:
            failed += 1
    assert failed


def test_a_timeout_of_health_is_no_verdict(tmp_path):
    lines = small(vllm_health=None, vllm_health_error="ReadTimeout")
    samples = source(Recording(written(tmp_path / "r.jsonl", lines)), "health:qwen").read(100_000)
    assert {s.labels.metric: s.value for s in samples} == {"server_health_timeout": 1}


def test_what_a_tick_did_not_ask_is_the_last_answer(tmp_path):
    lines = small(vllm_metrics="x 1\n")
    lines += [{**lines[1], "t": 101.0}, {**lines[1], "t": 102.0}]
    del lines[2]["vllm_metrics"]
    metrics = source(Recording(written(tmp_path / "r.jsonl", lines)), "metrics:qwen")
    assert [s.value for s in metrics.read(101_000)] == [1]


# -- recording and playing --------------------------------------------------------------------------


def played_seconds(nvml, path, now_ms, seconds, incident=lambda second: None):
    """What was read each second, and what is read when the recording of it is played."""
    live = [NvmlSource(nvml, names=nvml), NvmlStaticSource(nvml)]
    with Recorder(path, nvml, {}, state_dir=path.parent, names=nvml) as recorder:
        was = []
        for second in range(seconds):
            incident(second)
            recorder.tick(now_ms + second * SECOND)
            was.append([read(s, now_ms + second * SECOND) for s in live])
    eyes = {s.name: s for s in Recording(path).sources()}
    played = [eyes["nvml"], eyes["nvml_static"]]
    return was, [[read(s, now_ms + second * SECOND) for s in played] for second in range(seconds)]


def read(live, now_ms):
    try:
        return {(str(s.labels), s.at_ms): s.value for s in live.read(now_ms)}
    except SourceError as error:
        return str(error).partition(": ")[2].removeprefix("the recording: ")


@pytest.mark.parametrize("suffix", [".xz", ".gz", ""])
@pytest.mark.parametrize("memory_v2", [True, False])
def test_what_is_recorded_plays_back_as_it_was_read(tmp_path, suffix, memory_v2):
    nvml = FakeNvml(gpus=2, memory_v2=memory_v2)
    nvml.unsupported = {"nvmlDeviceGetPowerUsage"}
    nvml.devices[0].processes = [(7, "VLLM::EngineCore", 3 * GIB), (8, "python3", GIB), (9, "odd", None)]

    def incident(second):
        nvml.devices[0].temperature = 40 + second
        if second == 5:
            nvml.fail_once["nvmlDeviceGetTemperature"] = pynvml.NVML_ERROR_UNKNOWN

    was, is_now = played_seconds(nvml, tmp_path / f"r.jsonl{suffix}", 1_000_000, 25, incident)
    # The one call that fails reaches the recorder, which asks first, and not the source beside it.
    seen = is_now[5][0]
    assert len(seen) == len(was[5][0]) - 1
    was[5] = is_now[5]
    assert is_now == was


def test_a_gpu_that_is_lost_and_comes_back_plays_so(tmp_path):
    nvml = FakeNvml(gpus=2)

    def incident(second):
        nvml.devices[1].lost = 3 <= second < 30

    was, is_now = played_seconds(nvml, tmp_path / "r.jsonl", 1_000_000, 60, incident)
    assert [len(nvml_values) for nvml_values, _ in is_now] == [len(nvml_values) for nvml_values, _ in was]


def test_a_driver_that_is_missing_at_first_plays_so(tmp_path):
    nvml = FakeNvml()

    def incident(second):
        nvml.driver_missing = second < 5

    was, is_now = played_seconds(nvml, tmp_path / "r.jsonl", 1_000_000, 30, incident)
    assert "driver is not loaded" in was[0][0]
    assert "driver is not loaded" in is_now[0][0]
    assert is_now[25] == was[25]


def test_a_recording_of_two_servers_keeps_them_apart(tmp_path):
    lines = small(**{"vllm_health:a": 200, "vllm_health:b": 503})
    eyes = {s.name: s for s in Recording(written(tmp_path / "r.jsonl", lines)).sources("a", "b")}
    assert values(eyes["health:a"].read(100_000), "server_health_ok", "server") == {"a": 1}
    assert values(eyes["health:b"].read(100_000), "server_health_ok", "server") == {"b": 0}


def test_a_recorder_that_is_killed_loses_ten_ticks_at_most(tmp_path):
    nvml, path = FakeNvml(), tmp_path / "r.jsonl.xz"
    recorder = Recorder(path, nvml, {}, state_dir=tmp_path, names=nvml)
    for second in range(35):
        recorder.tick(second * SECOND)
    copy = shutil.copy(path, tmp_path / "killed.jsonl.xz")
    recorder.close()
    killed = Recording(Path(copy))
    killed.seek(60 * SECOND)
    assert killed.fault == ""
    assert killed.present_ms >= 24 * SECOND


def test_a_recorder_overwrites_nothing(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("precious")
    with pytest.raises(SourceError, match="the file exists"):
        Recorder(path, FakeNvml(), {}, state_dir=tmp_path)
    assert path.read_text() == "precious"


def test_a_recording_holds_no_word_of_a_command_line_but_vllms(tmp_path):
    from gpuwatch.sources.processes import ProcessIdentity

    class Names:
        def look_up(self, pid):
            return ProcessIdentity("python3", "python3 /bin/vllm serve m --api-key sk-secret", 0)

    nvml, path = FakeNvml(), tmp_path / "r.jsonl"
    nvml.devices[0].processes = [(7, "python3", GIB)]
    with Recorder(path, nvml, {}, state_dir=tmp_path, names=Names()) as recorder:
        recorder.tick(0)
    text = path.read_text()
    assert "vllm serve" in text
    assert "sk-secret" not in text
    assert values(source(Recording(path), "nvml").read(0), "gpu_process_memory_used_bytes", "owner") == {
        "vllm": GIB
    }
