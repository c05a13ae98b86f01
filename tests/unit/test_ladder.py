"""The ladder of vLLM's options: what is changed for a class of failure, least first, never beyond bounds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuwatch.remediation.ladder import LADDERS, Trouble, next_change
from gpuwatch.servers.starts import failures

GIB = 2**30
H200 = {"0": 140 * GIB}
BOUNDS = {
    "gpu_memory_utilization": [0.1, 0.95],
    "max_model_len": [1024, 40960],
    "max_num_batched_tokens": [512, 16384],
    "max_num_seqs": [16, 256],
    "watermark": [0.0, 0.1],
    "limit_mm_per_prompt": [1, 16],
    "mm_processor_kwargs": [65536, 16_777_216],
}
BASE = {"model": "m", "gpu_memory_utilization": 0.9, "max_model_len": 8192, "max_num_seqs": 128}
TOO_SMALL = {
    "max_model_len": "40960",
    "needed_bytes": str(6 * GIB),
    "available_bytes": str(3 * GIB),
    "longest_model_len": "20487",
}


def trouble(kind, arguments=BASE, **more):
    figures = {"bounds": BOUNDS, "total_bytes": H200, "free_bytes": H200, **more}
    return Trouble(kind=kind, arguments=arguments, **figures)


def change_of(found):
    """The options that the next arguments change, and their values."""
    after, considered = next_change(found)
    assert after is None or considered[-1].code == "chosen"
    return {name: after[name] for name in after or {} if after[name] != found.arguments.get(name)}


def free(gib):
    return {"0": round(gib * GIB)}


def without(*names):
    return {name: bound for name, bound in BOUNDS.items() if name not in names}


IMAGES = {
    **BASE,
    "limit_mm_per_prompt": {"image": 8, "video": {"count": 1}},
    "mm_processor_kwargs": {"max_pixels": 1_000_000},
}
RUNGS = [  # (what, trouble, what is changed)
    (
        "the share goes down to what is free",
        trouble("memory_share_not_free", free_bytes=free(78.77)),
        {"gpu_memory_utilization": 0.54},
    ),
    (
        "by the failure where no GPU can be read",
        trouble(
            "memory_share_not_free",
            free_bytes={},
            total_bytes={},
            facts={"free_bytes": "50", "total_bytes": "100"},
        ),
        {"gpu_memory_utilization": 0.48},
    ),
    (
        "the length goes down to what fits",
        trouble("kv_cache_too_small", facts=TOO_SMALL),
        {"max_model_len": 20480},
    ),
    (
        "by proportion where the log names none",
        trouble("kv_cache_too_small", facts={**TOO_SMALL, "longest_model_len": ""}),
        {"max_model_len": 20480},
    ),
    (
        "vLLM fits the length itself where -1 is in bounds",
        trouble("kv_cache_too_small", bounds={**BOUNDS, "max_model_len": [-1, 4096]}, facts=TOO_SMALL),
        {"max_model_len": -1},
    ),
    (
        "else the share goes up by what is missing",
        trouble(
            "kv_cache_too_small",
            {**BASE, "gpu_memory_utilization": 0.5},
            bounds=without("max_model_len"),
            facts=TOO_SMALL,
        ),
        {"gpu_memory_utilization": 0.53},
    ),
    (
        "no cache: the share goes up",
        trouble("no_memory_for_cache", {**BASE, "gpu_memory_utilization": 0.5}),
        {"gpu_memory_utilization": 0.55},
    ),
    (
        "no share to be had: the length goes down",
        trouble("no_memory_for_cache", free_bytes=free(120)),
        {"max_model_len": 4096},
    ),
    (
        "then the batch",
        trouble("auto_fit_failed", {**BASE, "max_model_len": -1}, free_bytes=free(120)),
        {"max_num_batched_tokens": 4096},
    ),
    ("out of memory in life: the share goes down", trouble("runtime_oom"), {"gpu_memory_utilization": 0.87}),
    (
        "then the batch, from what vLLM takes by itself",
        trouble("runtime_oom", bounds=without("gpu_memory_utilization")),
        {"max_num_batched_tokens": 4096},
    ),
    (
        "never fewer tokens than sequences",
        trouble(
            "runtime_oom",
            {**BASE, "max_num_batched_tokens": 150},
            bounds={"max_num_batched_tokens": [1, 9999]},
        ),
        {"max_num_batched_tokens": 128},
    ),
    ("then the sequences", trouble("runtime_oom", bounds={"max_num_seqs": [16, 256]}), {"max_num_seqs": 64}),
    ("preempted: three quarters of what ran", trouble("preemption", running=40), {"max_num_seqs": 30}),
    (
        "then a watermark",
        trouble("preemption", running=40, version="0.24.0", bounds=without("max_num_seqs")),
        {"watermark": 0.02},
    ),
    (
        "images: fewer in a request",
        trouble("multimodal_peak", IMAGES),
        {"limit_mm_per_prompt": {"image": 4, "video": {"count": 1}}},
    ),
    (
        "then smaller ones",
        trouble("multimodal_peak", IMAGES, bounds=without("limit_mm_per_prompt")),
        {"mm_processor_kwargs": {"max_pixels": 500_000}},
    ),
    (
        "last, the quantised model under the old name",
        trouble("runtime_oom", bounds={}, quantised_model="m-fp8"),
        {"model": "m-fp8", "served_model_name": "m"},
    ),
    (
        "the default share where none is given",
        trouble("runtime_oom", {"model": "m"}),
        {"gpu_memory_utilization": 0.89},
    ),
    ("a busy port asks for no change", trouble("port_busy"), {}),
    ("nor does memory freed while it measured", trouble("profiling_assert"), {}),
]


@pytest.mark.parametrize(("found", "change"), [r[1:] for r in RUNGS], ids=[r[0] for r in RUNGS])
def test_the_next_change_is_the_least_that_is_left(found, change):
    assert change_of(found) == change


OBJECTIONS = [  # (code of the first option that was looked at, trouble)
    ("no_bounds", trouble("runtime_oom", bounds={})),
    ("out_of_bounds", trouble("runtime_oom", bounds={"gpu_memory_utilization": [0.88, 0.95]})),
    ("failed_already", trouble("runtime_oom", failed=[{**BASE, "gpu_memory_utilization": 0.87}])),
    ("on_command_line", trouble("runtime_oom", {"model": "m"}, ran={"gpu_memory_utilization": "0.9"})),
    ("not_known", trouble("runtime_oom", {**BASE, "kv_cache_memory_bytes": 1})),
    ("not_known", trouble("memory_share_not_free", free_bytes={}, quantised_model="q")),
    ("not_known", trouble("kv_cache_too_small")),
    ("no_change", trouble("preemption", running=400)),
    ("no_change", trouble("memory_share_not_free")),
    ("share_not_free", trouble("no_memory_for_cache", free_bytes=free(100))),
    ("no_change", trouble("multimodal_peak", {**BASE, "limit_mm_per_prompt": {"image": 1}})),
]


@pytest.mark.parametrize(("code", "found"), OBJECTIONS)
def test_an_option_that_is_not_taken_says_why(code, found):
    _, considered = next_change(found)
    assert considered[0].code == code


def test_a_watermark_is_offered_from_0_24_on():
    for version, code in (
        ("0.23.1", "not_offered"),
        ("", "not_offered"),
        ("0.24.0", "chosen"),
        ("0.33.0", "chosen"),
    ):
        _, considered = next_change(trouble("preemption", running=400, version=version))
        assert considered[-1].code == code


def test_each_rung_is_tried_once_those_before_it_have_failed():
    """A server that runs out of memory whatever is done ends with nothing left, never with a set twice."""
    arguments, failed, options = dict(BASE), [], []
    while arguments is not None:
        failed.append(arguments)
        arguments, considered = next_change(
            trouble("runtime_oom", arguments, failed=failed, quantised_model="q")
        )
        options += [c.option for c in considered if c.code == "chosen"]
        assert arguments not in failed
    assert options == sorted(
        options, key=["gpu_memory_utilization", "max_num_batched_tokens", "max_num_seqs", "model"].index
    )
    assert {"max_num_batched_tokens", "max_num_seqs", "model"} < set(options)


@given(
    kind=st.sampled_from(sorted(failures.KINDS | LADDERS.keys())),
    share=st.floats(0.05, 0.99).map(lambda x: round(x, 2)),
    length=st.integers(-1, 200_000),
    sequences=st.integers(1, 2000),
    free_gib=st.floats(0, 140),
    running=st.none() | st.integers(0, 3000),
    longest=st.none() | st.integers(0, 200_000),
)
def test_whatever_is_seen_the_arguments_stay_within_bounds(
    kind, share, length, sequences, free_gib, running, longest
):
    before = {"gpu_memory_utilization": share, "max_model_len": length, "max_num_seqs": sequences}
    facts = {"longest_model_len": str(longest)} if longest is not None else {}
    found = trouble(kind, before, free_bytes=free(free_gib), running=running, facts=facts)
    after, considered = next_change(found)
    changed = {name for name in after or {} if after[name] != before.get(name)}
    assert len(changed) == (after is not None)
    for name in changed:
        least, most = BOUNDS[name]
        assert least <= after[name] <= most
        assert math.isclose(after[name], round(after[name], 2))
    assert [c.code for c in considered].count("chosen") == len(changed)
