"""The same examples every time and no deadlines: a busy machine is no fault of the code."""

import logging
import shutil
import tempfile
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import settings

from gpuwatch import assembly, config, sources
from gpuwatch.cli import player
from gpuwatch.clock import ManualClock
from gpuwatch.cycle import TICK_MS
from gpuwatch.records import AlertState

RECORDING = Path(__file__).parent / "recordings/h200-vllm024-incidents.jsonl.xz"

settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def logging_as_in_a_new_process():
    """Commands set up logging for their process, which here is that of all tests."""
    logging.getLogger().setLevel(logging.WARNING)


@pytest.fixture
def foreign_folder():
    """One that `rows.unprivileged` may read but not write; root becomes nobody to be bound by it."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def recorded_host(tmp_path_factory):
    """The state folder of a daemon that saw the whole recording of a real host, and what fired when."""
    given = assembly.for_recording(config.load_settings(None))
    given = msgspec.structs.replace(given, state_dir=tmp_path_factory.mktemp("state"))
    groups = assembly.compile_rules(given)
    recording = sources.open_recording(RECORDING)
    start_ms = -(-recording.start_ms // TICK_MS) * TICK_MS
    fired = []
    with closing(assembly.open_store(given, groups, start_ms)) as store:
        cycle = assembly.played(given, groups, store, start_ms, recording, {})
        for now_ms in player.walk(cycle, ManualClock(start_ms), TICK_MS):
            if cycle.last_report.at_ms == now_ms:
                fired += [t for t in cycle.last_report.transitions if t.now is AlertState.FIRING]
            if recording.ended:
                break
    return SimpleNamespace(state_dir=given.state_dir, fired=fired)
