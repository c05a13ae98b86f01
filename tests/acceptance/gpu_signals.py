"""What only a real GPU shows of readings: an Xid as it happens, and DCGM's names. CI has no GPU for it.

usage: gpu_signals.py     needs an NVIDIA driver, PyTorch and gpuwatch on PYTHONPATH
A process of its own writes where it may not, for which the driver reports an Xid and ends that process. No
setting of the GPU is changed.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = "state_dir: {state}\nhost: h200\nmetrics: {{aliases: [dcgm]}}\n"
WRITES_WHERE_IT_MAY_NOT = r"""
import torch
source = 'extern "C" __global__ void astray(long at) { *(int *)at = 1; }'
kernel = torch.cuda._compile_kernel(source, "astray")
kernel((1, 1, 1), (1, 1, 1), (4096,))
torch.cuda.synchronize()
"""
DCGM = (
    "GPU_TEMP POWER_USAGE GPU_UTIL FB_USED FB_FREE SM_CLOCK XID_ERRORS TOTAL_ENERGY_CONSUMPTION "
    "UNCORRECTABLE_REMAPPED_ROWS PCIE_REPLAY_COUNTER"
)
WITHIN_S = 20


def gpuwatch(*words):
    done = subprocess.run(
        [sys.executable, "-m", "gpuwatch", *words], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout if done.returncode == 0 else done.stderr


def asked(expression):
    """The answer as Prometheus' API gives it: labels and value."""
    text = gpuwatch("query", "--json", expression)
    try:
        return {json.dumps(one["metric"]): float(one["value"][1]) for one in json.loads(text)["result"]}
    except ValueError:
        return {text: 0.0}


def main():
    state = Path(tempfile.mkdtemp(prefix="gpuwatch-signals-"))
    settings = state / "gpuwatch.yaml"
    settings.write_text(SETTINGS.format(state=state))
    os.environ["GPUWATCH_CONFIG"] = str(settings)
    daemon = subprocess.Popen([sys.executable, "-m", "gpuwatch", "run", "--log-level", "warning"])
    try:
        time.sleep(20)
        print("gpu_recovery_action:", asked("gpu_recovery_action"))
        for name in DCGM.split():
            print(*(f"{labels} {value:.10g}" for labels, value in asked(f"DCGM_FI_DEV_{name}").items()))
        print("series of DCGM's names:", asked('count({__name__=~"DCGM_.*"})'))
        fault = subprocess.run(
            [sys.executable, "-c", WRITES_WHERE_IT_MAY_NOT], capture_output=True, text=True, check=False
        )
        ended = time.monotonic()
        print("the process that wrote astray:", fault.returncode, fault.stderr.strip().splitlines()[-1:])
        counted = {}
        while not counted and time.monotonic() < ended + WITHIN_S:
            counted = asked("increase(gpu_xid_errors_total[1m]) > 0")
        print(f"counted {time.monotonic() - ended:.1f} s after its end:", counted)
        print("firing:", asked('ALERTS{alertstate="firing"}'))
    finally:
        daemon.terminate()
        print("daemon ended with status", daemon.wait(30))


if __name__ == "__main__":
    main()
