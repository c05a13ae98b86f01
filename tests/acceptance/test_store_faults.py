"""What a disk does to the store, on real filesystems: kills, full, power cuts, read-only, gone, damaged.

All but the kills and the damage need root and loop mounts. GPUWATCH_STORE_KILLS says how many kills.
"""

import collections
import fcntl
import os
import random
import select
import shutil
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from tests.acceptance.ticking import (
    STEP_MS,
    WIDTHS,
    at_ms,
    is_present,
    labels,
    open_store,
    save,
    tick_at,
    value,
)

from gpuwatch import remediation
from gpuwatch.errors import StoreError
from gpuwatch.promql import Matcher
from gpuwatch.store import METRICS_DB, STATE_DB, leave_wish, open_history, open_read_only

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("GPUWATCH_STORE_KILLS", "300"))
LIFE_S = (0.02, 0.8)  # an hour is sealed in a third of a second, and lasts 360 ticks
POWER_CUTS = 12
FILES = (STATE_DB, METRICS_DB)
MIB = 2**20
EVERYTHING = [Matcher("__name__", "=~", "made_up_.*")]
SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
NO_LOG_FLUSH = 2  # what is not on the disk yet never comes there
FREEZE, THAW = 0xC0045877, 0xC0045878

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(600)]
needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mkfs.ext4") is None or not Path("/dev/loop-control").exists(),
    reason="needs root, mkfs.ext4 and loop devices",
)


# -- what must hold --------------------------------------------------------------------------------


def check_whole(folder):
    for name in FILES:
        with closing(sqlite3.connect(f"file:{folder / name}?mode=ro", uri=True)) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)], name


def check_ticks(folder, end, read_from=0):
    """Exactly the ticks 0, 1, … end - 1 are there, each once; those from `read_from` are read."""
    assert set(tick_counts(folder)) <= {end}, "a scrape is lost, or both a row and in a frame"
    check_values(folder, max(0, read_from), end)


def check_ring(folder, end):
    """Of the ticks up to `end` only the newest are there, each once; gives the first of them."""
    counts = tick_counts(folder)
    assert len(counts) == len(WIDTHS)
    assert max(counts) - min(counts) <= 1  # the oldest tick may be there in part
    check_values(folder, end - min(counts), end)
    return end - min(counts)


def check_values(folder, start, end):
    with open_history(folder) as history:
        tracks = history.tracks(EVERYTHING, at_ms(start) - 1, at_ms(end) + STEP_MS)
        assert history.damaged == []
    found = {track.labels: track for track in tracks}
    ticks = np.arange(start, end)
    for target, width in WIDTHS.items():
        for column in range(width):
            present = ticks[is_present(ticks, column, width)]
            if len(present):
                track = found.pop(labels(target, column))
                np.testing.assert_array_equal(track.at_ms, at_ms(present))
                np.testing.assert_array_equal(track.values, value(present, column))
    assert not found


def tick_counts(folder):
    """Of each target how many scrapes there are, rows and those in frames."""
    counts = (
        "SELECT (SELECT count(*) FROM hot WHERE hot.target = target.id AND hot.id > sealed_id)"
        " + (SELECT coalesce(sum(n), 0) FROM frame WHERE frame.target = target.id) FROM target"
    )
    return [row[0] for row in rows(folder / METRICS_DB, counts)]


def wait_until(question):
    for _ in range(200):
        if question():
            return
        time.sleep(0.05)
    pytest.fail("not within 10 s")


def rows(path, query):
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return database.execute(query).fetchall()


def next_tick(folder):
    with open_history(folder) as history:
        span = history.span_ms()
    return 0 if span is None else tick_at(span[1]) + 1


def check_state(folder, end):
    """Each tick's alert began once, none is missing; a tick more may be there, whose scrapes are not."""
    with open_read_only(folder) as view:
        began = [tick_at(transition.at_ms) for _, transition in view.transitions(limit=1_000_000)]
        settings = view.settings()
        active = [int(alert.labels.get("tick")) for alert in view.active_alerts()]
    assert began == list(range(len(began)))
    assert len(began) in {end, end + 1}
    assert active == began[-1:]
    assert settings.get("tick") == (str(began[-1]) if began else None)


# -- a process that is killed ----------------------------------------------------------------------


class Lives:
    """Processes that save ticks in a folder, one after the other."""

    def __init__(self, folder):
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.acceptance.ticking", str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a sealing process whose reader died says so
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.server.communicate()

    def begin(self):
        self.server.stdin.write(b"live\n")
        self.server.stdin.flush()
        self.said = b""
        return psutil.Process(self.wait_for("began")[0])

    def first_and_end(self):
        """Its first tick, and the one after the last that was saved, as said until now; None for neither."""
        while select.select([self.server.stdout], [], [], 0)[0]:
            self.listen()
        first, saved = next(iter(self.numbers("first")), None), self.numbers("saved")
        assert [number - first for number in saved] == list(range(len(saved)))
        return first, saved[-1] + 1 if saved else None

    def kill(self, process):
        process.kill()
        self.wait_for("ended")

    def wait_for(self, word):
        while not self.numbers(word):
            self.listen()
        return self.numbers(word)

    def listen(self):
        self.said += os.read(self.server.stdout.fileno(), 2**16)

    def numbers(self, wanted):
        lines = [line.split() for line in self.said.decode().split("\n")[:-1]]  # the last is not whole yet
        return [int(number) for word, number in lines if word == wanted]


def test_kills_lose_no_tick_that_was_saved_and_double_none(tmp_path):
    rng, met, sealing, end = random.Random(7), collections.Counter(), [], 0
    with Lives(tmp_path) as lives:
        for _ in range(KILLS):
            process = lives.begin()
            time.sleep(rng.uniform(*LIFE_S))
            children = process.children()
            lives.kill(process)
            # As long as a sealing process reads, SQLite does not look for what was written and not yet told.
            psutil.wait_procs(children, timeout=30)
            first, saved = lives.first_and_end()
            assert first in {None, end}
            before, end = end, saved or end
            sealing += children
            met["opening"] += first is None
            met["sealing"] += bool(children)
            if not (tmp_path / METRICS_DB).exists():
                continue
            check_whole(tmp_path)
            found = next_tick(tmp_path)
            assert found in {end, end + 1}, "a saved tick is lost"  # one more: its answer was cut off
            end = found
            check_ticks(tmp_path, end, read_from=before - 400)
            met.update(part_of_sealing(tmp_path))
    check_ticks(tmp_path, end)
    check_state(tmp_path, end)
    _, alive = psutil.wait_procs(sealing, timeout=30)
    assert not alive, "a sealing process outlives the daemon that wanted it"
    frames = rows(tmp_path / METRICS_DB, "SELECT count(*) FROM frame")[0][0]
    print(f"\n{KILLS} kills, {end} ticks, {frames} frames; kills that met: {dict(met)}")
    assert met["sealing"] > KILLS / 10 or KILLS < 100


def part_of_sealing(folder):
    """By its name 1 for what a kill left half done, else 0."""
    (lowest, highest) = rows(folder / METRICS_DB, "SELECT min(sealed_id), max(sealed_id) FROM target")[0]
    sealed = "SELECT count(*) FROM hot JOIN target ON target.id = hot.target AND hot.id <= sealed_id"
    return {
        "the deletion of rows": int(rows(folder / METRICS_DB, sealed)[0][0] > 0),
        "the saving of frames": int(highest is not None and highest - lowest > len(WIDTHS)),
    }


# -- filesystems -----------------------------------------------------------------------------------


class Filesystem:
    """An ext4 of its own on a loop device."""

    def __init__(self, folder, size_mib):
        self.image, self.path = folder / "image", folder / "disk"
        self.path.mkdir()
        with self.image.open("wb") as image:
            image.truncate(size_mib * 2**20)
        run("mkfs.ext4", "-q", "-m", "0", self.image)

    def mount(self, options="rw"):
        run("mount", "-o", f"loop,{options}", self.image, self.path)

    def remount(self, options):
        run("mount", "-o", f"remount,{options}", self.path)

    def unmount(self, *options):
        run("umount", *options, self.path)

    def control(self, request, argument=0):
        """An ioctl."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, request, struct.pack("I", argument))
        finally:
            os.close(fd)

    def free_bytes(self):
        seen = os.statvfs(self.path)
        return seen.f_bavail * seen.f_frsize

    def fill(self):
        """Take all that is free, to the last block."""
        with (self.path / "filler").open("ab", buffering=0) as filler:
            for size in (2**20, 4096, 1024):
                try:
                    while filler.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue

    def empty(self):
        (self.path / "filler").unlink()


def run(*command):
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


@contextmanager
def mounted(folder, size_mib=48):
    filesystem = Filesystem(folder, size_mib)
    filesystem.mount()
    try:
        yield filesystem
    finally:
        while os.path.ismount(filesystem.path):
            filesystem.unmount("-l")


@needs_mounts
def test_a_power_cut_loses_no_tick_that_was_saved(tmp_path):
    rng, end = random.Random(11), 0
    with mounted(tmp_path) as disk, Lives(disk.path / "state") as lives:
        (disk.path / "state").mkdir()
        for _ in range(POWER_CUTS):
            process = lives.begin()
            time.sleep(rng.uniform(0.3, 1.5))
            # What is said later does not count: no process outlives a real cut.
            end = lives.first_and_end()[1] or end
            disk.control(SHUTDOWN, NO_LOG_FLUSH)
            time.sleep(0.1)
            lives.kill(process)
            unmount(disk)
            disk.mount()
            check_whole(disk.path / "state")
            found = next_tick(disk.path / "state")
            assert found >= end, "a saved tick is lost"
            end = found
            check_ticks(disk.path / "state", end)
        check_state(disk.path / "state", end)
    print(f"\n{POWER_CUTS} power cuts, {end} ticks")


def unmount(disk):
    """A sealing process may still read from it."""

    def is_done():
        with suppress(subprocess.CalledProcessError):
            disk.unmount()
        return not os.path.ismount(disk.path)

    wait_until(is_done)


# -- what the daemon does meanwhile ----------------------------------------------------------------


class Watch:
    """The daemon's line: a tick of ten seconds each time it is told to."""

    def __init__(self, store):
        self.store, self.tick = store, 0

    def go_on(self, ticks):
        """Whether the disk took each of them."""
        taken = []
        for _ in range(ticks):
            taken.append(save(self.store, self.tick))
            self.tick += 1
        self.goes_on()
        return taken

    def goes_on(self):
        """What it asks is answered, whatever the disk does."""
        last = self.tick - 1
        found = self.store.select([Matcher("__name__", "=", "made_up_host")], at_ms(last) - 1, at_ms(last))
        newest = {series.labels: series.values for series in found}
        assert newest == {
            labels("host", c): [value(last, c)]
            for c in range(WIDTHS["host"])
            if is_present(last, c, WIDTHS["host"])
        }
        assert self.store.settings()["tick"] == str(last)
        assert str(last) in {alert.labels.get("tick") for alert in self.store.active_alerts()}

    def seal(self):
        """The daemon's job, whose error is logged."""
        with suppress(StoreError):
            self.store.seal(at_ms(self.tick))

    def is_paused(self):
        wishes = remediation.Wishes.of(self.store.settings())
        return (wishes.paused_until_ms or 0) > at_ms(self.tick)

    def faults(self):
        return {name: fault for name, fault in self.store.faults().items() if fault}

    def wait_until_all_is_well(self, ticks=5):
        """It gets well by itself, and soon."""
        while self.faults():
            self.go_on(1)
            ticks -= 1
            assert ticks, self.faults()
        assert self.go_on(1) == [True]


@contextmanager
def watching(folder, **options):
    store = open_store(folder, **options)
    try:
        yield Watch(store)
    finally:
        store.close()


def check_all(folder, watch):
    """After its end: both files are whole, and not one tick is missing."""
    check_whole(folder)
    check_ticks(folder, watch.tick)
    check_state(folder, watch.tick)


def assert_told(faults, name, cause, cure):
    assert cause in faults[name], faults
    assert "to cure it, " in faults[name], faults
    assert cure in faults[name].partition("to cure it, ")[2], faults


@needs_mounts
def test_on_a_full_disk_metrics_are_a_ring_and_state_has_the_ballast(tmp_path):
    with mounted(tmp_path) as disk:
        # With the ballast given up as much is free as must stay free: metrics.db grows no more.
        with watching(disk.path, min_free=9 * MIB) as watch:
            watch.go_on(700)
            disk.fill()
            assert disk.free_bytes() == 0
            assert all(watch.go_on(1500))
            assert not (disk.path / "ballast").exists()
            disk.empty()
            assert all(watch.go_on(5))
            assert (disk.path / "ballast").stat().st_size == 8 * MIB
        check_whole(disk.path)
        kept = watch.tick - check_ring(disk.path, watch.tick)
        assert 500 < kept < 1500, "it is as long as the file was when the disk was full"
        check_state(disk.path, watch.tick)


@needs_mounts
def test_a_disk_that_another_fills_again_and_again_is_told_of_and_waited_for(tmp_path):
    with mounted(tmp_path) as disk:
        with watching(disk.path, min_free=MIB) as watch:
            watch.go_on(100)
            while len(watch.faults()) < 2:
                disk.fill()  # it takes the ballast's room too
                watch.go_on(1)
            for name in FILES:
                assert_told(watch.faults(), name, "full", "free space")
            assert not any(watch.go_on(200))
            disk.empty()
            watch.wait_until_all_is_well(ticks=2)
            watch.go_on(5)
            assert (disk.path / "ballast").exists()
            assert watch.store.dropped_scrapes == 0
        check_whole(disk.path)
        assert check_ring(disk.path, watch.tick) <= 100  # of what was written before, at most
        check_state(disk.path, watch.tick)


@needs_mounts
@pytest.mark.parametrize("fault", ["an error made it read-only", "its device is gone"])
def test_a_filesystem_that_failed_can_be_unmounted_and_is_written_again_once_it_is_back(tmp_path, fault):
    with mounted(tmp_path) as disk:
        folder = disk.path / "state"
        folder.mkdir()
        with watching(folder) as watch:
            watch.go_on(100)
            if fault == "its device is gone":
                disk.control(SHUTDOWN, NO_LOG_FLUSH)
                cause, cure = "disk I/O error", "dmesg"
            else:
                disk.remount("abort")  # as ext4 does at an error
                cause, cure = "readonly", "write to it"
            assert not any(watch.go_on(10))
            for name in FILES:
                assert_told(watch.faults(), name, cause, cure)
            disk.unmount()
            watch.go_on(10)
            disk.mount()
            watch.wait_until_all_is_well()
        check_all(folder, watch)


@needs_mounts
def test_a_start_on_a_read_only_disk_holds_remediation_until_state_can_be_read(tmp_path):
    with mounted(tmp_path) as disk:
        folder = disk.path / "state"
        folder.mkdir()
        with Lives(folder) as lives:
            process = lives.begin()
            time.sleep(1)
            leave_wish(folder, {"wish": "asked before"})
            lives.kill(process)
        end = next_tick(folder)
        for name in FILES:
            assert (folder / f"{name}-wal").stat().st_size
            (folder / f"{name}-shm").unlink()  # without it SQLite cannot read a WAL unless it may write
        disk.remount("ro")
        with watching(folder, now_ms=at_ms(end)) as watch:
            watch.tick = end
            assert watch.is_paused()
            assert not any(watch.go_on(5))
            for name in FILES:
                assert watch.faults()[name]
            assert watch.is_paused()
            disk.remount("rw")
            watch.wait_until_all_is_well()
            assert not watch.is_paused()
            assert watch.store.settings()["wish"] == "asked before"
        check_all(folder, watch)


@needs_mounts
def test_a_folder_that_was_unmounted_under_it_is_told_of_and_met_again(tmp_path):
    with mounted(tmp_path) as disk:
        folder = disk.path / "state"
        folder.mkdir()
        with watching(folder) as watch:
            watch.go_on(100)
            disk.unmount("-l")
            assert not any(watch.go_on(10))
            assert set(watch.faults()) == set(FILES)
            disk.mount()
            watch.wait_until_all_is_well()
        check_all(folder, watch)


def test_a_folder_that_was_moved_is_told_of_and_met_again(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    with watching(folder) as watch:
        watch.go_on(100)
        folder.rename(tmp_path / "elsewhere")
        assert not any(watch.go_on(10))
        assert set(watch.faults()) == set(FILES)
        assert "moved" in watch.faults()[METRICS_DB]
        (tmp_path / "elsewhere").rename(folder)
        watch.wait_until_all_is_well()
    check_all(folder, watch)


def test_files_that_were_deleted_are_begun_anew_and_so_is_the_lock(tmp_path):
    with watching(tmp_path) as watch:
        watch.go_on(100)
        for path in tmp_path.iterdir():
            path.unlink()
        assert watch.go_on(2) == [False, True]
        with pytest.raises(StoreError, match="another gpuwatch"):
            open_store(tmp_path)
        watch.go_on(10)
    check_whole(tmp_path)
    assert check_ring(tmp_path, watch.tick) == 100  # those before were in the deleted file
    check_state(tmp_path, watch.tick)


@pytest.mark.parametrize(("name", "page_of"), [(STATE_DB, "transition_once"), (METRICS_DB, "series")])
def test_a_damaged_page_costs_samples_at_most(tmp_path, caplog, name, page_of):
    with watching(tmp_path) as watch:
        watch.go_on(600)
        root = rows(tmp_path / name, f"SELECT rootpage FROM sqlite_master WHERE name = '{page_of}'")[0][0]
        while not list(tmp_path.glob("*.damaged-*")):
            with (tmp_path / name).open("r+b") as file:
                file.seek((root - 1) * 4096)
                file.write(b"\xa5" * 4096)
            leave_wish(tmp_path, {"wish": str(watch.tick)})  # so that state.db is read again
            if watch.tick % 100 == 0:
                watch.seal()
            watch.go_on(1)
            assert watch.tick < 2000, "nobody notices"
        noticed = watch.tick
        watch.wait_until_all_is_well(ticks=2)
        watch.go_on(20)
    assert f"{name} is damaged" in caplog.text
    assert "malformed" in caplog.text
    check_whole(tmp_path)
    check_state(tmp_path, watch.tick)
    if name == STATE_DB:
        check_ticks(tmp_path, watch.tick)
    else:
        assert check_ring(tmp_path, watch.tick) == noticed - 1  # that tick is in the new file


@needs_mounts
def test_a_disk_that_does_not_answer_holds_nothing_up_and_is_told_of(tmp_path):
    with mounted(tmp_path) as disk:
        with watching(disk.path) as watch:
            watch.store.start()
            watch.go_on(50)
            wait_until(lambda: next_tick(disk.path) == watch.tick)
            with frozen(disk) as is_frozen:
                watch.go_on(1)
                assert not watch.store.is_saved(100)
                watch.go_on(2)
                assert_told(watch.faults(), STATE_DB, "has not answered for 20 s", "dmesg")
                assert watch.store.is_saved(100)  # a disk that fails holds no remediation up
                watch.go_on(100)
                assert is_frozen()
            wait_until(lambda: watch.go_on(1) and not watch.faults())
            assert watch.store.is_saved(10_000)
        check_all(disk.path, watch)


@contextmanager
def frozen(disk):
    """No write to it ends, until it is thawed; which it is after 20 s even if the test hangs."""
    thawed = threading.Lock()

    def thaw():
        if thawed.acquire(blocking=False):
            disk.control(THAW)

    late = threading.Timer(20, thaw)
    disk.control(FREEZE)
    late.start()
    try:
        yield lambda: not thawed.locked()
    finally:
        late.cancel()
        thaw()
