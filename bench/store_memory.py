"""What the store adds to a process that has all the rest of the daemon; prints JSON. For bench/store.py.

usage: store_memory.py FOLDER [warm]     FOLDER/rows.jsonl: target, at_ms, labels, values; a line a scrape
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

from gpuwatch import lean

lean.begin()

import apscheduler.schedulers.background

import gpuwatch.notify
import gpuwatch.remediation
import gpuwatch.rules
import gpuwatch.servers
import gpuwatch.sources
from gpuwatch.config import StoreSettings
from gpuwatch.records import Labels


def rss():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def scrapes(folder):
    interned = {}
    with (folder / "rows.jsonl").open() as lines:
        for line in lines:
            target, at_ms, names, values = json.loads(line)
            key = str(names)
            if key not in interned:
                interned[key] = [Labels(map(tuple, name)) for name in names]
            yield target, at_ms, interned[key], values


def main():
    folder = Path(sys.argv[1])
    known = list(dict.fromkeys(labels for _, _, some, _ in scrapes(folder) for labels in some))
    before = rss()
    from gpuwatch.store import Changes, Disk, Store

    (folder / "state").mkdir(exist_ok=True)
    first = next(scrapes(folder))[1]
    store = Store(3_600_000, Disk(folder / "state", StoreSettings(), "bench", first))
    nothing, tick = Changes(), 0
    for target, at_ms, labels, values in scrapes(folder):
        if at_ms // 1000 != tick:
            tick = at_ms // 1000
            store.save(nothing, at_ms)
        store.append(target, at_ms, labels, values)
        if len(sys.argv) > 2 and tick > first // 1000 + 10:
            break
    added = rss() - before
    assert "numpy" not in sys.modules
    print(json.dumps({"added": added, "held": store.held_bytes(), "series": len(known)}))


main()
