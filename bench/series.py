"""The samples that the store and its peers are given: a generated day and the H200 recording; never measures.

The generator stands beside the project, in ../shared/tools; where it is absent there is no generated day.
"""

import functools
import heapq
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpuwatch.errors import SourceError
from gpuwatch.records import Labels, Scrape
from gpuwatch.sources import open_recording

ROOT = Path(__file__).resolve().parent.parent
GENERATOR = ROOT.parent / "shared/tools/series_gen.py"
RECORDING = ROOT / "tests/recordings/h200-vllm024-incidents.jsonl.xz"
HOUR_MS = 3_600_000
TICK_MS = 1000


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """What is read at once: `values[i, k]` is series `labels[k]` at scrape i, NaN where it was absent.

    `jittered_ms[i]` is when scrape i was taken, `aligned_ms[i]` the tick it belongs to. Both rise.
    """

    name: str
    interval_ms: int
    labels: tuple[Labels, ...]
    values: npt.NDArray[np.float64]
    jittered_ms: npt.NDArray[np.int64]
    aligned_ms: npt.NDArray[np.int64]

    def stamps(self, *, aligned: bool) -> npt.NDArray[np.int64]:
        """The instants of the scrapes."""
        return self.aligned_ms if aligned else self.jittered_ms

    def scrapes(self, *, aligned: bool = False) -> Iterator[Scrape]:
        """One after another; series that were absent are left out, and a scrape without any is none."""
        every = list(self.labels)
        for at_ms, row in zip(self.stamps(aligned=aligned).tolist(), self.values, strict=True):
            values, labels = row.tolist(), every
            if np.isnan(row).any():
                labels = [series for series, value in zip(every, values, strict=True) if value == value]
                values = [value for value in values if value == value]
            if values:
                yield Scrape(self.name, at_ms, labels, values)


@dataclass(frozen=True, eq=False)  # no slots: a cached property needs a place
class Day:
    """Targets over one stretch of time."""

    what: str
    targets: tuple[Target, ...]

    @functools.cached_property
    def samples(self) -> int:
        """How many values are there, absent ones not counted."""
        return sum(_present(target.values) for target in self.targets)

    @property
    def series(self) -> int:
        """How many series there are."""
        return sum(len(target.labels) for target in self.targets)

    @property
    def start_ms(self) -> int:
        """The first tick."""
        return min(int(target.aligned_ms[0]) for target in self.targets)

    @property
    def end_ms(self) -> int:
        """The last scrape."""
        return max(int(target.jittered_ms[-1]) for target in self.targets)

    def scrapes(self, *, aligned: bool = False) -> Iterator[Scrape]:
        """The scrapes of all targets in order of time."""
        each = [target.scrapes(aligned=aligned) for target in self.targets]
        return heapq.merge(*each, key=lambda scrape: scrape.at_ms)

    def ticks(self, *, aligned: bool = False) -> Iterator[list[Scrape]]:
        """The scrapes of each second."""
        scrapes = self.scrapes(aligned=aligned)
        for _, tick in itertools.groupby(scrapes, key=lambda scrape: scrape.at_ms // TICK_MS):
            yield list(tick)

    def first(self, hours: float) -> "Day":
        """The same targets over their first hours; the day itself where it is no longer than that."""
        end_ms = self.start_ms + hours * HOUR_MS
        if end_ms > self.end_ms:
            return self
        return Day(f"first {hours:g} h of {self.what}", tuple(_upto(t, end_ms) for t in self.targets))


@functools.cache
def generated(hours: float, folder: Path | None = None) -> Day | None:
    """A day of an eight-GPU host, at 1,160 series 3.3 M samples an hour; None without the generator.

    `folder` may hold one that was generated before; without it the files go when the process ends.
    """
    if folder is None:
        folder = Path(_scratch().name) / f"{hours:g}h"
    if not (folder / "meta.json").exists():
        if not GENERATOR.exists():
            print(f"skipped: no generated series, for there is no {GENERATOR}")
            return None
        command = [sys.executable, str(GENERATOR), "--hours", str(hours), "--out", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    meta = json.loads((folder / "meta.json").read_text())
    if meta["hours"] != hours:
        raise ValueError(f"cannot use {folder}: it holds {meta['hours']:g} h, not {hours:g} h; give another")
    return Day(f"{hours:g} h generated", tuple(_generated_target(folder, group) for group in meta["groups"]))


@functools.cache
def recorded() -> Day:
    """The 435 s that were recorded on an H200, each source a target, read each at its own interval."""
    recording = open_recording(RECORDING)
    sources = recording.sources("qwen")
    found: dict[str, list[tuple[int, int, dict[Labels, float]]]] = {source.name: [] for source in sources}
    for tick in itertools.count():
        now_ms = recording.start_ms + tick * TICK_MS
        recording.seek(now_ms + TICK_MS // 2)  # it was recorded a few ms before or after its tick
        for source in sources:
            if tick * TICK_MS % source.interval_ms:
                continue
            try:
                values = {sample.labels: sample.value for sample in source.read(now_ms)}
            except SourceError:
                continue  # the server was down
            found[source.name].append((recording.present_ms, now_ms, values))
        if recording.ended:
            break
    return Day(
        f"{(recording.present_ms - recording.start_ms) / 1000:.0f} s recorded",
        tuple(_recorded_target(s.name, s.interval_ms, found[s.name]) for s in sources if any(found[s.name])),
    )


@functools.cache
def _scratch():
    return tempfile.TemporaryDirectory(prefix="gpuwatch-bench-")


def _generated_target(folder, group):
    name = group["name"]
    labels = tuple(Labels.of(series["name"], **series["labels"]) for series in group["series"])
    values, jittered, aligned = (
        np.load(folder / f"{name}_{part}.npy", mmap_mode="r") for part in ("v", "ts", "tsa")
    )
    return Target(name, group["interval_ms"], labels, values, jittered, aligned)


def _recorded_target(name, interval_ms, taken):
    labels = tuple(dict.fromkeys(series for _, _, values in taken for series in values))
    matrix = np.array([[values.get(series, np.nan) for series in labels] for _, _, values in taken])
    read_ms, tick_ms, _ = zip(*taken, strict=True)
    return Target(name, interval_ms, labels, matrix, np.array(read_ms), np.array(tick_ms))


def _upto(target, end_ms):
    n = int(np.searchsorted(target.aligned_ms, end_ms))
    return replace(
        target,
        values=target.values[:n],
        jittered_ms=target.jittered_ms[:n],
        aligned_ms=target.aligned_ms[:n],
    )


def _present(values):
    slices = range(0, len(values), 4096)
    return sum(int(np.isfinite(values[at : at + 4096]).sum()) for at in slices)
