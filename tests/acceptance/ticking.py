"""A made-up host whose every value is a function of the tick, and a process that saves it until it is killed.

    python -m tests.acceptance.ticking FOLDER

begins a process for each line that it reads, and prints what that saves.
"""

import os
import sys
import threading
from pathlib import Path
from types import MappingProxyType

from gpuwatch.config import StoreSettings
from gpuwatch.errors import StoreError
from gpuwatch.records import Alert, AlertState, Labels, Transition
from gpuwatch.store import Changes, Disk, Store

START_MS = 1_800_000_000_000  # a full hour
STEP_MS = 10_000
WINDOW_MS = 120_000
WIDTHS = MappingProxyType({"gpu": 20, "vllm": 60, "host": 30})


def at_ms(tick):
    return START_MS + tick * STEP_MS


def tick_at(instant_ms):
    return (instant_ms - START_MS) // STEP_MS


def value(tick, column):
    """Of numbers, and of arrays of them."""
    return (tick * 7919 + column * 104_729) % 1000 / 8


def is_present(tick, column, width):
    """Each series in its turn is absent for a hundred ticks."""
    return tick // 100 % width != column


def labels(target, column):
    return Labels.of(f"made_up_{target}", column=str(column))


def scrapes(tick):
    """(target, labels, values) of each target."""
    for target, width in WIDTHS.items():
        columns = [column for column in range(width) if is_present(tick, column, width)]
        yield target, [labels(target, c) for c in columns], [value(tick, c) for c in columns]


def changes(tick, active):
    """Each tick something happens: an alert begins, and those before it are over."""
    born = Alert(
        rule="MadeUp",
        labels=Labels.of(alertname="MadeUp", tick=str(tick)),
        annotations={},
        state=AlertState.FIRING,
        value=float(tick),
        active_at_ms=at_ms(tick),
    )
    return Changes(
        alerts=[born],
        ended=active,
        transitions=[Transition(alert=born, was=None, now=AlertState.FIRING, at_ms=at_ms(tick))],
        settings={"tick": str(tick)},
    )


def open_store(folder, now_ms=START_MS, *, min_free=0, window_ms=WINDOW_MS):
    """The real store, on a folder."""
    settings = StoreSettings(min_free=min_free)
    return Store(window_ms, Disk(folder, settings, "made-up", now_ms))


def save(store, tick):
    """A tick of the daemon; whether the disk took all of it."""
    for target, series, values in scrapes(tick):
        store.append(target, at_ms(tick), series, values)
    store.save(changes(tick, store.active_alerts()), at_ms(tick))
    return store.is_saved(0) and not any(store.faults().values())


def run(folder):
    """Save tick after tick for ever, and say which was the first, and each that was saved."""
    store = open_store(folder)
    store.reload(store.last_tick or START_MS)
    tick = 0 if store.last_tick is None else tick_at(store.last_tick) + 1
    say("first", tick)
    threading.Thread(target=lambda: seal_for_ever(store, lambda: at_ms(tick)), daemon=True).start()
    while True:
        if save(store, tick):
            say("saved", tick)
        tick += 1


def seal_for_ever(store, now_ms):
    """As the daemon's job does, beside the ticks."""
    never = threading.Event()
    while not never.wait(0.01):
        try:
            store.seal(now_ms())
        except StoreError as error:  # it is tried again
            print(error, file=sys.stderr)


def say(word, number):
    os.write(1, f"{word} {number}\n".encode())  # whole, or not at all: a pipe takes short lines at once


def main():
    """For each line that is read: a process that runs until it is killed. Forked, for a quick start."""
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            run(Path(sys.argv[1]))
        say("began", child)
        os.waitpid(child, 0)
        say("ended", child)


if __name__ == "__main__":
    main()
