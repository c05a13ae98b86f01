"""The processes of a server: who belongs to it, what becomes of them, and how soon that is known.

A stand-in server is a tree of real processes whose command lines are those of vLLM's.
"""

import contextlib
import datetime as dt
import gc
import os
import select
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.fake_nvml import GIB, FakeNvml

from gpuwatch import config
from gpuwatch.clock import SystemClock
from gpuwatch.errors import SourceError
from gpuwatch.service import Beat, Bell, Input, Service
from gpuwatch.sources.exits import Exits
from gpuwatch.sources.lineage import local_port, port_of, serves, titled
from gpuwatch.sources.nvml import NvmlSource
from gpuwatch.sources.processes import PsutilNames
from gpuwatch.sources.procfs import Procfs, is_of_one_server, unit_of
from gpuwatch.sources.server_processes import METRICS, ProcessesSource
from gpuwatch.sources.trees import Identity, Trees
from gpuwatch.upkeep import Job

SECOND = 1000
SERVE = """
(exec -a VLLM::EngineCore bash engine) &
(exec -a python3 sleep 600) &
wait
"""
ENGINE = """
(exec -a VLLM::Worker_TP0 sleep 600) &
(exec -a VLLM::Worker_TP1 sleep 600) &
wait
"""
ALL = {"APIServer", "EngineCore", "Worker_TP0", "Worker_TP1", "helper"}


def settings(*servers):
    return [config.ServerSettings(name=name, url=url) for name, url in servers]


class Watched:
    """A source over servers `main` and `other`, read a second later each time."""

    def __init__(self, *, url="http://192.0.2.1:8000", host=None):
        self.trees = Trees()
        servers = settings(("main", url), ("other", "http://127.0.0.1:1"))
        self.source = ProcessesSource(self.trees, servers, host=host)
        self.now_ms = 0

    def read(self):
        self.now_ms += SECOND
        samples = self.source.read(self.now_ms)
        assert len({s.labels for s in samples}) == len(samples), "a series twice"
        made = {metric.name: set(metric.labels) for metric in METRICS}
        for s in samples:
            assert {name for name, _ in s.labels} <= {"__name__", *made[s.labels.metric]}
        return {
            (
                s.labels.metric.removeprefix("server_process_"),
                s.labels.get("process"),
                s.labels.get("state"),
            ): s.value
            for s in samples
            if s.labels.get("server") == "main"
        }

    def until(self, is_so):
        """The first reading that is so."""
        for _ in range(500):
            values = self.read()
            if is_so(values):
                return values
            time.sleep(0.02)
        pytest.fail(f"not within ten seconds: {values}")

    def until_all(self):
        return self.until(lambda values: {process for _, process, _ in values} == ALL)

    def pid(self, process):
        return next(m.identity.pid for m in self.trees.members("main") if m.process == process)


def state(values, process):
    """The one state that is 1."""
    (found,) = [s for (metric, p, s), value in values.items() if (metric, p) == ("state", process) and value]
    return found


@pytest.fixture
def watched():
    one = Watched()
    yield one
    one.source.close()


@pytest.fixture
def server(tmp_path):
    """Starts servers; each is the leader of its session, and all of a session is killed at the end."""
    (tmp_path / "serve").write_text(SERVE)
    (tmp_path / "engine").write_text(ENGINE)
    started = []

    def start(*arguments):
        words = ["vllm", "serve", *arguments]
        started.append(subprocess.Popen(words, executable="/bin/bash", cwd=tmp_path, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# -- who belongs to it ---------------------------------------------------------------------------------


def test_every_process_of_a_told_root_has_its_name_and_role(watched, server):
    watched.trees.set_root("main", server().pid)
    values = watched.until_all()
    roles = {m.process: m.role for m in watched.trees.members("main")}
    assert roles == {
        "APIServer": "api_server",
        "EngineCore": "engine_core",
        "Worker_TP0": "worker",
        "Worker_TP1": "worker",
        "helper": "helper",
    }
    for process in ALL:
        assert state(values, process) == "running"
        assert values["resident_memory_bytes", process, ""] > 100_000
        assert values["cpu_seconds_total", process, ""] >= 0
        assert abs(values["start_time_seconds", process, ""] - time.time()) < 60
        assert values["orphaned", process, ""] == 0
    assert {key[1]: value for key, value in values.items() if key[0] == "exits_total"} == dict.fromkeys(
        ALL - {"helper"}, 0
    )
    assert watched.trees.server_of(watched.pid("Worker_TP1")) == "main"
    assert watched.trees.server_of(os.getpid()) == ""


def test_a_server_without_supervisor_is_found_by_the_port_of_its_address(server):
    mine, _ = server("m", "--port", "18471"), server("m", "--port=18472")
    watched = Watched(url="http://localhost:18471")
    watched.now_ms = 0
    with contextlib.closing(watched.source):
        watched.until(lambda values: {p for _, p, _ in values} == ALL)
        assert watched.pid("APIServer") == mine.pid


def test_of_two_servers_of_one_port_neither_is_taken(server):
    first, second = server("--port", "18473"), server("--port", "18473")
    watched = Watched(url="http://127.0.0.1:18473")
    with contextlib.closing(watched.source):
        for _ in range(30):
            assert watched.read() == {}
        second.kill()
        second.wait()
        watched.until_all()
        assert watched.pid("APIServer") == first.pid


def test_a_supervisors_wrapper_is_no_api_server(watched, tmp_path, server):
    (tmp_path / "wrapper").write_text("bash -c 'exec -a vllm bash serve'; true\n")
    wrapper = subprocess.Popen(["/bin/bash", "wrapper"], cwd=tmp_path, start_new_session=True)
    try:
        watched.trees.set_root("main", wrapper.pid)
        watched.until_all()
        assert watched.pid("APIServer") != wrapper.pid
        os.kill(watched.pid("APIServer"), signal.SIGKILL)
        values = watched.until(lambda values: values["exits_total", "APIServer", ""] == 1)
        assert values["orphaned", "EngineCore", ""] == 1
    finally:
        os.killpg(wrapper.pid, signal.SIGKILL)
        wrapper.wait()


def test_a_wrapper_that_is_told_after_its_server_was_found_may_start_another(host):
    host.put(PID, 1, "", "sh", "-c", "vllm serve; true", name="sh")
    host.put(PID + 1, PID, "", "vllm", "serve")
    host.put(PID + 2, PID + 1, "", "VLLM::EngineCore")
    watched = Watched(url="http://127.0.0.1:8000", host=host.procfs)
    with contextlib.closing(watched.source):
        assert members(watched) == {1: False, 2: False}
        watched.trees.set_root("main", PID)
        assert members(watched) == {0: False, 1: False, 2: False}
        assert watched.pid("APIServer") == PID + 1
        host.end(PID + 1)
        host.put(PID + 3, PID, "", "vllm", "serve", started=200)
        host.put(PID + 4, PID + 3, "", "VLLM::EngineCore", started=201)
        assert members(watched) == {0: False, 2: True, 3: False, 4: False}
        assert watched.pid("APIServer") == PID + 3


def test_a_process_that_comes_later_is_a_member_too(watched, tmp_path, server):
    (tmp_path / "engine").write_text(f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done\n" + ENGINE)
    watched.trees.set_root("main", server().pid)
    watched.until(lambda values: ("orphaned", "EngineCore", "") in values)
    (tmp_path / "go").touch()
    watched.until_all()


@pytest.mark.parametrize(
    ("words", "is_server", "port"),
    [
        ("vllm serve m", True, 8000),
        ("/opt/bin/python3.12 /opt/bin/vllm serve m --port 9000", True, 9000),
        ("python3 -u -m vllm.entrypoints.openai.api_server --port=9001", True, 9001),
        ("uv run vllm serve m --port 9000", False, 9000),
        ("sudo -u llm vllm serve m", False, 8000),
        ("docker run image vllm serve m", False, 8000),
        ("python3 bench.py vllm serve", False, 8000),
        ("vllm bench serve", False, 8000),
        ("vllm serve m --port", True, 8000),
        ("", False, 8000),
    ],
)
def test_a_command_that_serves_is_told_from_one_that_starts_it(words, is_server, port):
    assert serves(tuple(words.split())) == is_server
    assert port_of(tuple(words.split())) == port


@pytest.mark.parametrize(
    ("word", "process", "role"),
    [
        ("VLLM::EngineCore_DP1", "EngineCore_DP1", "engine_core"),
        ("VLLM::Worker_DP0_TP1_EP1", "Worker_DP0_TP1_EP1", "worker"),
        ("VLLM::APIServer_0", "APIServer_0", "api_server"),
        ("VLLM::DPCoordinator", "DPCoordinator", "engine_core"),
        ("prod::Worker_TP1", "Worker_TP1", "worker"),
        ("VLLM::Workers", "helper", "helper"),
        ("std::vector", "helper", "helper"),
        ("python3", "helper", "helper"),
    ],
)
def test_a_title_says_name_and_role(word, process, role):
    assert titled(word) == (process, role)


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("http://127.0.0.1:8000/", 8000),
        ("http://localhost", 80),
        ("https://[::1]", 443),
        ("http://10.0.0.7:8000", None),
        ("http://127.0.0.1.example.org:8000", None),
        ("http://[::1", None),
        ("http://127.0.0.1:bad", None),
    ],
)
def test_only_an_address_on_this_host_has_a_port_to_look_for(url, port):
    assert local_port(url) == port


# -- what becomes of them ------------------------------------------------------------------------------


@pytest.mark.parametrize("process", ["APIServer", "EngineCore", "Worker_TP1"])
def test_a_stopped_process_is_seen_and_seen_to_go_on(watched, server, process):
    watched.trees.set_root("main", server().pid)
    watched.until_all()
    os.kill(watched.pid(process), signal.SIGSTOP)
    watched.until(lambda values: state(values, process) == "stopped")
    os.kill(watched.pid(process), signal.SIGCONT)
    watched.until(lambda values: state(values, process) == "running")


def test_an_end_wakes_at_once_and_is_counted_once(watched, server):
    watched.trees.set_root("main", server().pid)
    watched.until_all()
    assert not readable(watched.source.wakes, 0)
    os.kill(watched.pid("Worker_TP1"), signal.SIGKILL)
    assert readable(watched.source.wakes, 5)
    values = watched.until(lambda values: ("state", "Worker_TP1", "running") not in values)
    assert not readable(watched.source.wakes, 0)
    for _ in range(3):
        assert watched.read()["exits_total", "Worker_TP1", ""] == 1
    assert values["exits_total", "Worker_TP0", ""] == 0


def test_the_end_of_a_helper_is_not_counted(watched, server):
    watched.trees.set_root("main", server().pid)
    watched.until_all()
    os.kill(watched.pid("helper"), signal.SIGKILL)
    values = watched.until(lambda values: ("state", "helper", "running") not in values)
    assert not any(value for (metric, *_), value in values.items() if metric == "exits_total")


def test_who_outlives_the_main_process_is_an_orphan_and_stays_the_servers(watched, server):
    first = server()
    watched.trees.set_root("main", first.pid)
    watched.until_all()
    engine = watched.pid("EngineCore")
    first.kill()
    first.wait()
    watched.trees.set_root("main", None)
    values = watched.read()
    orphans = {key[1] for key, value in values.items() if key[0] == "orphaned" and value}
    assert orphans == ALL - {"APIServer"}
    assert values["exits_total", "APIServer", ""] == 1
    assert watched.trees.server_of(engine) == "main"
    assert watched.trees.member(engine).is_orphan


def test_a_restart_beside_orphans_goes_on_counting_and_tells_them_apart(watched, server):
    first = server()
    watched.trees.set_root("main", first.pid)
    watched.until_all()
    orphan = watched.pid("EngineCore")
    first.kill()
    first.wait()
    second = server()
    watched.trees.set_root("main", second.pid)
    watched.until(lambda _: len(watched.trees.members("main")) == 9)
    values = watched.read()
    assert values["orphaned", "APIServer", ""] == 0
    assert values["orphaned", "EngineCore", ""] == 1
    assert watched.trees.member(orphan).is_orphan
    assert [m.is_orphan for m in watched.trees.members("main") if m.role == "engine_core"] == [True, False]
    os.kill(orphan, signal.SIGKILL)
    values = watched.until(lambda _: watched.trees.member(orphan) is None)
    assert (values["exits_total", "EngineCore", ""], values["orphaned", "EngineCore", ""]) == (0, 0)
    second.kill()
    second.wait()
    assert watched.read()["exits_total", "APIServer", ""] == 2


def test_a_main_process_that_nobody_has_reaped_is_dead(watched, server):
    main = server()
    watched.trees.set_root("main", main.pid)
    watched.until_all()
    main.kill()
    values = watched.until(lambda values: state(values, "APIServer") == "zombie")
    assert (values["exits_total", "APIServer", ""], values["orphaned", "EngineCore", ""]) == (1, 1)
    values = watched.read()
    assert state(values, "APIServer") == "zombie"
    assert values["exits_total", "APIServer", ""] == 1
    assert watched.trees.server_of(main.pid) == ""
    main.wait()
    values = watched.read()
    assert ("state", "APIServer", "zombie") not in values
    assert values["exits_total", "APIServer", ""] == 1


def test_members_are_known_to_the_source_that_follows_a_reload(watched, server):
    main = server()
    watched.trees.set_root("main", main.pid)
    watched.until_all()
    main.kill()
    main.wait()
    watched.read()
    with contextlib.closing(ProcessesSource(watched.trees, settings(("main", "http://192.0.2.1")))) as after:
        orphaned = {
            s.labels.get("process"): s.value
            for s in after.read(1)
            if s.labels.metric == "server_process_orphaned"
        }
    assert orphaned == dict.fromkeys(ALL - {"APIServer"}, 1)


def test_nothing_is_left_open(server):
    gc.collect()  # what other tests left open is not closed while it is counted
    before = watching()
    watched = Watched()
    watched.trees.set_root("main", server().pid)
    watched.until_all()
    assert watching() == before + 1 + len(ALL)
    watched.source.close()
    watched.read()
    assert watching() == before


def watching():
    """How many descriptors of this process are epolls and pidfds."""
    kinds = ("anon_inode:[eventpoll]", "anon_inode:[pidfd]", "pidfd:")
    files = list(Path("/proc/self/fd").iterdir())
    return sum(str(file.readlink()).startswith(kinds) for file in files if file.is_symlink())


def test_a_pid_that_is_another_processs_by_now_wakes_nobody():
    with contextlib.closing(Exits(lambda _: False)) as exits, subprocess.Popen(["true"]) as ended:
        exits.watch([Identity(ended.pid, 1)])
        assert not readable(exits.wakes, 0.2)


def readable(descriptor, within_s):
    return bool(select.select([descriptor], [], [], within_s)[0])


# -- a made-up host ------------------------------------------------------------------------------------


class Host:
    """A folder that looks like /proc, and one that looks like /sys/fs/cgroup; its pids are nobody's."""

    def __init__(self, folder):
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        self.procfs = Procfs(str(self.proc), str(self.cgroups))
        self.put(os.getpid(), 1, "/system.slice/gpuwatch.service", "gpuwatch")

    def put(self, pid, parent, cgroup, *words, started=100, letter="S", name="a) b (c"):
        folder = self.proc / str(pid)
        folder.mkdir(parents=True, exist_ok=True)
        zeros = "0 " * 9
        stat = f"{pid} ({name}) {letter} {parent} {zeros}250 50 0 0 20 0 9 0 {started} 99 1000 0 0\n"
        (folder / "stat").write_text(stat)
        (folder / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))
        (folder / "cgroup").write_text(f"0::{cgroup}\n")

    def group(self, cgroup, *pids):
        folder = self.cgroups / cgroup.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))

    def end(self, pid):
        for file in (self.proc / str(pid)).iterdir():
            file.unlink()
        (self.proc / str(pid)).rmdir()


PID = 5_000_001  # beyond what a kernel gives
UNIT = "/system.slice/vllm.service"


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


@pytest.fixture
def on_host(host):
    one = Watched(host=host.procfs)
    yield one
    one.source.close()


def members(watched):
    watched.read()
    return {m.identity.pid - PID: m.is_orphan for m in watched.trees.members("main")}


def test_a_unit_of_its_own_holds_only_the_server_whoever_their_parents_are(host, on_host):
    host.put(PID, 1, UNIT, "vllm", "serve")
    host.put(PID + 1, 1, UNIT, "VLLM::EngineCore")
    host.put(PID + 2, 1, UNIT, "VLLM::Worker_TP0", started=99)
    host.group(UNIT, PID, PID + 1, PID + 2, PID + 3)
    on_host.trees.set_root("main", PID)
    assert members(on_host) == {0: False, 1: False, 2: True}


@pytest.mark.parametrize(
    ("cgroup", "parents"),
    [
        ("/user.slice/user-0.slice/session-3.scope", "/system.slice"),
        ("/user.slice/user-1.slice/user@1.service/init.scope", ""),
        ("/user.slice/user-1.slice/user@1.service", ""),
        ("/system.slice/docker-0123.scope", ""),
        ("/kubepods/pod1/0123", ""),
        ("/system.slice/supervisord.service", "/system.slice/supervisord.service"),
        ("/system.slice/gpuwatch.service", "/init.scope"),
        ("", ""),
    ],
)
def test_a_group_that_others_are_in_makes_nobody_a_member(host, on_host, cgroup, parents):
    host.put(PID - 1, 1, parents, "parent")
    host.put(PID, PID - 1, cgroup, "vllm", "serve")
    host.put(PID + 1, PID, cgroup, "VLLM::EngineCore")
    host.put(PID + 2, 1, cgroup, "bystander")
    host.group(cgroup, PID, PID + 1, PID + 2)
    on_host.trees.set_root("main", PID)
    assert members(on_host) == {0: False, 1: False}


def test_a_users_own_unit_is_one_servers():
    assert is_of_one_server("/user.slice/user-1.slice/user@1.service/app.slice/llm.service", ["/init.scope"])


def test_groups_of_version_1_are_read_where_systemd_keeps_them(host):
    host.put(PID, 1, "/")
    (host.proc / str(PID) / "cgroup").write_text("9:name=systemd:/system.slice/a.service\n3:cpu:/x\n0::/\n")
    host.group("/systemd/system.slice/a.service", PID)
    assert host.procfs.cgroup(PID) == "/system.slice/a.service"
    assert host.procfs.cgroup_pids("/system.slice/a.service") == [PID]


def test_a_pid_that_was_given_again_is_an_end_and_no_member(host, on_host):
    host.put(PID, 1, "", "vllm", "serve")
    host.put(PID + 1, PID, "", "VLLM::EngineCore")
    on_host.trees.set_root("main", PID)
    assert members(on_host) == {0: False, 1: False}
    host.put(PID + 1, 1, "", "VLLM::EngineCore", started=500)
    assert members(on_host) == {0: False}
    assert on_host.read()["exits_total", "EngineCore", ""] == 1


def test_an_end_is_seen_at_the_next_read_where_no_pidfd_is_had(host, on_host):
    host.put(PID, 1, "", "vllm", "serve")
    host.put(PID + 1, PID, "", "VLLM::EngineCore")
    on_host.trees.set_root("main", PID)
    on_host.read()
    host.end(PID + 1)
    assert on_host.read()["exits_total", "EngineCore", ""] == 1


@pytest.mark.parametrize(
    ("letter", "word"),
    [
        ("R", "running"),
        ("S", "running"),
        ("I", "running"),
        ("D", "blocked"),
        ("T", "stopped"),
        ("t", "stopped"),
    ],
)
def test_the_kernels_letters_are_four_states(host, on_host, letter, word):
    host.put(PID, 1, "", "vllm", "serve")
    on_host.trees.set_root("main", PID)
    on_host.read()
    host.put(PID, 1, "", "vllm", "serve", letter=letter)
    values = on_host.read()
    assert state(values, "APIServer") == word
    assert values["resident_memory_bytes", "APIServer", ""] == 1000 * os.sysconf("SC_PAGE_SIZE")
    assert values["cpu_seconds_total", "APIServer", ""] == 300 / os.sysconf("SC_CLK_TCK")


def test_processes_of_one_name_are_added_up_and_the_worst_state_counts(host, on_host):
    host.put(PID, 1, "", "vllm", "serve")
    host.put(PID + 1, PID, "", "VLLM::EngineCore", letter="T")
    host.put(PID + 2, PID, "", "VLLM::EngineCore")
    on_host.trees.set_root("main", PID)
    on_host.read()
    host.put(PID + 2, PID, "", "VLLM::EngineCore", letter="D")
    values = on_host.read()
    assert state(values, "EngineCore") == "stopped"
    assert values["resident_memory_bytes", "EngineCore", ""] == 2000 * os.sysconf("SC_PAGE_SIZE")


def test_a_title_that_is_set_late_is_taken_up(host, on_host):
    host.put(PID, 1, "", "vllm", "serve")
    host.put(PID + 1, PID, "", "vllm", "serve", name="vllm")
    on_host.trees.set_root("main", PID)
    assert {p for _, p, _ in on_host.read()} == {"APIServer", "helper"}
    host.put(PID + 1, PID, "", "VLLM::Worker", name="VLLM::Worker")
    assert {p for _, p, _ in on_host.read()} == {"APIServer", "Worker"}
    host.put(PID + 1, PID, "", "VLLM::Worker_TP0", name="VLLM::Worker_TP")
    assert {p for _, p, _ in on_host.read()} == {"APIServer", "Worker_TP0"}


def test_the_words_of_a_process_that_waits_in_the_kernel_are_not_asked_for(host, on_host):
    host.put(PID, 1, "", "vllm", "serve")
    host.put(PID + 1, PID, "", "VLLM::EngineCore", letter="D")
    on_host.trees.set_root("main", PID)
    assert state(on_host.read(), "helper") == "blocked"
    host.put(PID + 1, PID, "", "VLLM::EngineCore")
    assert state(on_host.read(), "EngineCore") == "running"


def test_who_hides_in_proc_raises_nothing(host, on_host):
    host.put(PID, 1, UNIT, "vllm", "serve")
    host.group(UNIT, PID, PID + 1)
    (host.proc / str(PID) / "cmdline").unlink()
    (host.proc / str(PID + 2)).mkdir()
    (host.proc / str(PID + 3)).mkdir()
    (host.proc / str(PID + 3) / "stat").write_text("half a line (x) S")
    on_host.trees.set_root("main", PID)
    assert members(on_host) == {0: False}


def test_a_proc_that_is_not_there_is_a_source_error(tmp_path):
    watched = Watched(host=Procfs(str(tmp_path / "absent")))
    with (
        contextlib.closing(watched.source),
        pytest.raises(SourceError, match=r"list the processes in .*absent"),
    ):
        watched.read()


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("/system.slice/train.service", "train.service"),
        ("/user.slice/user-1.slice/user@1.service/app.slice/a.service/sub", "a.service"),
        ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope"),
        (f"/system.slice/docker-{'0123456789abcdef' * 4}.scope", "docker-0123456789ab.scope"),
        ("/kubepods/besteffort/pod1/0123", ""),
        ("", ""),
    ],
)
def test_the_unit_is_the_last_of_a_groups_path(cgroup, unit):
    assert unit_of(cgroup) == unit


# -- whose memory of a GPU -----------------------------------------------------------------------------


def test_memory_is_its_servers_and_an_orphans_once_the_main_process_is_gone(watched, server):
    main = server()
    watched.trees.set_root("main", main.pid)
    watched.until_all()
    nvml = FakeNvml()
    engine = watched.pid("EngineCore")
    nvml.devices[0].processes = [(engine, "", 3 * GIB), (os.getpid(), "", GIB)]
    source = NvmlSource(nvml, names=PsutilNames(), trees=watched.trees)

    def memory():
        samples = source.read(0)
        used = [s for s in samples if s.labels.metric == "gpu_process_memory_used_bytes"]
        return {s.labels.get("owner"): s for s in used}

    labels = memory()["vllm"].labels
    assert (labels.get("server"), labels.get("user")) == ("main", "")
    foreign = memory()["foreign"].labels
    assert (foreign.get("server"), foreign.get("user")) == ("", PsutilNames().look_up(os.getpid()).user)
    assert foreign.get("user")
    main.kill()
    main.wait()
    watched.read()
    assert memory()["orphan"].labels.get("server") == "main"
    assert memory()["orphan"].value == 3 * GIB


# -- out of turn ---------------------------------------------------------------------------------------


class Waking:
    """A source that wakes for as long as something has not been read, and says when it was read."""

    name, interval_ms = "processes", 3_600_000

    def __init__(self):
        self.wakes, self.other_end = os.pipe()

    def happen(self):
        os.write(self.other_end, b"x")

    def close(self):
        os.close(self.wakes)
        os.close(self.other_end)


class Line:
    """A cycle of one waking source and the tick, both due in an hour."""

    def __init__(self, source):
        self.parts = SimpleNamespace(sources=[source])
        self.ran = []
        self.ticked = threading.Event()
        self.last_report = SimpleNamespace(summary="")

    def jobs(self):
        hour = 3_600_000
        return [
            Job(
                "collect:processes", hour, lambda _: os.read(self.parts.sources[0].wakes, 64), offset_ms=hour
            ),
            Job("tick", hour, lambda _: self.ticked.set(), offset_ms=hour, worker=False),
        ]

    def guarded(self, job, now_ms):
        self.ran.append(job.name)
        job.run(now_ms)


@pytest.fixture
def service():
    source = Waking()
    service = Service(Input())
    service.cycle, service.clock = Line(source), SystemClock()
    service._start_scheduler()
    thread = threading.Thread(target=service._wait)
    thread.start()
    yield service
    service.stopping.set()
    service.bell.ring()
    thread.join()
    service.scheduler.shutdown()
    service.bell.close()
    source.close()


def test_what_happens_is_read_and_judged_at_once_and_the_next_turn_stays_where_it_was(service):
    before = {job.id: job.next_run_time for job in service.scheduler.get_jobs()}
    for times in (1, 2):
        service.cycle.parts.sources[0].happen()
        assert service.cycle.ticked.wait(10)
        service.cycle.ticked.clear()
        assert service.cycle.ran == ["collect:processes", "tick"] * times
    after = {job.id: job.next_run_time for job in service.scheduler.get_jobs()}
    assert {name: after[name] for name in before} == before


def test_a_storm_is_read_a_few_times_a_second(service):
    until_s = time.monotonic() + 1
    while time.monotonic() < until_s:
        service.cycle.parts.sources[0].happen()
        time.sleep(0.001)
    assert 1 <= service.cycle.ran.count("tick") <= 10


def test_a_beat_keeps_in_step_after_a_run_out_of_turn():
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)

    def at(seconds):
        return start + dt.timedelta(seconds=seconds)

    beat = Beat(seconds=2, start_date=start)
    assert beat.get_next_fire_time(None, at(-5)) == start
    assert beat.get_next_fire_time(at(0), at(0)) == at(2)
    assert beat.get_next_fire_time(at(0), at(0.1)) == at(2)
    assert beat.get_next_fire_time(at(2.7), at(2.7)) == at(4)
    assert beat.get_next_fire_time(at(2), at(9.5)) == at(10)


def test_a_bell_that_was_rung_before_the_wait_ends_it_once():
    bell = Bell()
    try:
        for _ in range(100_000):
            bell.ring()
        bell.wait()
        while readable(bell._heard, 0):
            bell.wait()
        assert bell.wait(for_ms=0) == []
    finally:
        bell.close()
