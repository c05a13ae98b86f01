"""The figures of a rival on an H200: `gpu_hands.py` is on a real one, `test_h200_story.py` on a simulated."""

SECOND, MIB, GIB = 1000, 1 << 20, 1 << 30

TOTAL_BYTES, RESERVED_BYTES = 143_771 * MIB, 644_939_776  # by NVML
SHARE, LEAST_SHARE = 0.6, 0.3
RIVAL_BYTES = 80 * GIB  # more than the server leaves: it dies of it, and gets 0.40 beside it
LEAVES_BYTES = 64 * MIB  # of what is free, so that no driver runs dry
WITHIN_S = 560  # of one call of the machine

ARGUMENTS = {
    "gpu_memory_utilization": SHARE,
    "max_model_len": 16384,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 16384,
}
BOUNDS = {
    "gpu_memory_utilization": [LEAST_SHARE, SHARE],
    "max_num_seqs": [8, 64],
    "max_num_batched_tokens": [2048, 16384],
}
# In milliseconds: all an operator may shorten, and nobody should on a real host.
REMEDIATION = {
    "just_started_grace": 1 * SECOND,
    "cooldown": 1 * SECOND,
    "cooldown_most": 5 * SECOND,
    "wait_for_memory": 20 * SECOND,
    "drain_within": 20 * SECOND,
    "verify_for": 8 * SECOND,
}
BUDGET = {"count": 20, "per": 3600 * SECOND}
