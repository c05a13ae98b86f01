"""The yardstick: Python, pynvml, and the NVML calls given as JSON, once a second; nothing else.

usage: bare_loop.py SECONDS CALLS     CALLS = [[function, [argument, …]], …]
Without a driver it makes no calls: the process is then the bare interpreter with pynvml loaded.
"""

import contextlib
import json
import sys
import time

import pynvml


def handles():
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]


def main(seconds, calls):
    gpus = handles()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for gpu in gpus:
            for function, arguments in calls:
                with contextlib.suppress(pynvml.NVMLError):
                    getattr(pynvml, function)(gpu, *arguments)
        time.sleep(1)


main(float(sys.argv[1]), json.loads(sys.argv[2]))
