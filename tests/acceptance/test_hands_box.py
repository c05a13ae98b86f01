"""A real vLLM as the unit of a real systemd, under steady load: each of its faults, and what gpuwatch does.

What is measured is printed (`-s`). GPUWATCH_ROUNDS is how often the time to healthy is taken beside a start.
"""

import contextlib
import os
import shutil
import socket
import statistics
import time

import psutil
import pytest
from tests.acceptance import vllm_cpu
from tests.acceptance.hands import Load, Operator, wait_for
from tests.acceptance.systemd_box import COMMAND, HERE, LACKING, UNIT, Box, install

from gpuwatch.records import LIVE_PHASES

PORT = 18371
URL = f"http://127.0.0.1:{PORT}"
SERVER = "vllm.service"
ROUNDS = int(os.environ.get("GPUWATCH_ROUNDS", "5"))
STATE, SETTINGS = "var/lib/gpuwatch", "var/lib/gpuwatch-servers/m"
CONFIG = """\
state_dir: /var/lib/gpuwatch
remediation:
  mode: auto
  just_started_grace: 1s
  cooldown: 0s
  verify_for: 5s
  good_after: 10s
  budget: {count: 100, per: 1h}
  breaker: {count: 100, per: 1h}
servers:
  - name: m
    url: http://127.0.0.1:18371
    start_deadline: 5m
    revisions: /var/lib/gpuwatch-servers/m
    bounds: {max_model_len: [256, 1024], max_num_seqs: [1, 16]}
    supervisor: {systemd: vllm.service}
receivers: []
"""
BASE = """\
model: /opt/models/tiny
port: 18371
load-format: dummy
enforce-eager: true
max-model-len: 1024
max-num-seqs: 8
kv-cache-memory-bytes: 1073741824
served-model-name: m
middleware: [gpuwatch_guest.admission.Admission]
"""
VLLM = """\
#!/opt/vllm/bin/python
import sys

from vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
"""

pytestmark = [
    *vllm_cpu.needed,
    pytest.mark.skipif(bool(LACKING), reason="; ".join(LACKING)),
]


class Host(Operator):
    """The box, and in it systemd, gpuwatch and vLLM, each as it is shipped."""

    def __init__(self, model):
        (packages,) = (vllm_cpu.VENV / "lib").glob("python*/site-packages")
        self.box = Box(
            f"{packages.resolve()}:/opt/vllm/lib/{packages.parent.name}/site-packages",
            f"{model}:/opt/models/tiny",
        )
        enabled = self.box.root / "etc/systemd/system/multi-user.target.wants" / SERVER
        enabled.unlink(missing_ok=True)  # left by a run that was cut short, it would start with the box
        self.state, self.settings, self.url = self.box.root / STATE, self.box.root / SETTINGS, URL
        self.box.boot()
        python = self.box.run("python3", "-c", "import sys; print('python%d.%d' % sys.version_info[:2])")
        if python != packages.parent.name:
            pytest.skip(f"the box has {python}, and vLLM's packages are for {packages.parent.name}")
        self.box.run("systemctl", "stop", "gpuwatch", SERVER, UNIT, check=False)
        for folder in (STATE, SETTINGS, "var/cache/gpuwatch"):
            shutil.rmtree(self.box.root / folder, ignore_errors=True)
        install(self.box)
        self.box.run("systemctl", "stop", UNIT)
        self.install_vllm()
        self.box.run(COMMAND, "guest", "install", "/opt/gpuwatch/guest")
        (self.box.root / "etc/gpuwatch/gpuwatch.yaml").write_text(CONFIG)
        (self.box.root / "root/base.yaml").write_text(BASE)

    def install_vllm(self):
        """The packages of the host's vLLM, run by the box's own Python."""
        if not (self.box.root / "opt/vllm/bin/python").exists():
            self.box.run("python3", "-m", "venv", "--without-pip", "/opt/vllm")
        script = self.box.root / "opt/vllm/bin/vllm"
        script.write_text(VLLM)
        script.chmod(0o755)
        for numa in ("/usr/lib/x86_64-linux-gnu/libnuma.so.1", "/usr/lib/aarch64-linux-gnu/libnuma.so.1"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(numa, self.box.root / numa.lstrip("/"))
        shutil.copy(HERE / SERVER, self.box.root / "etc/systemd/system" / SERVER)
        self.box.run("systemctl", "daemon-reload")
        self.box.run("systemctl", "enable", "-q", SERVER)

    def gpuwatch(self, *words):
        return self.box.run(COMMAND, *words)

    def process(self, name):
        """One of the server's, as the host sees it."""
        (found,) = [p for p in psutil.process_iter(["cmdline"]) if name in " ".join(p.info["cmdline"] or [])]
        return found

    def ctl(self, verb):
        self.box.run("systemctl", verb, SERVER)

    def uses(self, number):
        """As somebody does by hand who knows better: that revision, and a restart."""
        link = self.settings / "by-hand"
        link.symlink_to(f"rev-{number:04}.yaml")
        link.replace(self.settings / "current.yaml")
        self.ctl("restart")

    def healthy_after_s(self, began_s):
        wait_for(self.is_healthy, 120, every_s=0.05)
        return time.monotonic() - began_s

    def start_s(self):
        """What vLLM itself takes from the start of its unit until it is healthy."""
        self.ctl("stop")
        began_s = time.monotonic()
        self.ctl("start")
        return self.healthy_after_s(began_s)

    def rests(self):
        """The id of the newest remediation, once all is well and nothing is under way."""
        wait_for(self.is_healthy, 120)
        wait_for(lambda: self.last().phase not in LIVE_PHASES, 120)
        return self.last_id()


@pytest.fixture(scope="module")
def host(model):
    host = Host(model)
    try:
        host.box.run("systemctl", "start", "gpuwatch")
        host.gpuwatch("config", "set", "m", "--file", "/root/base.yaml", "--why", "as it was", "--yes")
        assert host.ended("")["phase"] == "succeeded", host.box.log()
        yield host
        print(host.box.log())
    finally:
        host.box.run("systemctl", "stop", "gpuwatch", SERVER, check=False)
        host.box.run("systemctl", "disable", "-q", SERVER)  # it is nothing to other tests of the box
        host.box.tool("stop")


def test_it_is_healthy_again_about_as_soon_as_vllm_can_be(host):
    own_s, healed_s = [], []
    for _ in range(ROUNDS):
        last = host.rests()
        own_s.append(host.start_s())
        time.sleep(5)  # gpuwatch has seen that it serves
        with Load(URL):
            time.sleep(2)
            began_s = time.monotonic()
            host.process("VLLM::EngineCore").kill()
            wait_for(lambda: not host.is_healthy(), 20, every_s=0.05)
            healed_s.append(host.healthy_after_s(began_s))
            assert host.ended(last)["phase"] == "succeeded"
    own, healed = statistics.median(own_s), statistics.median(healed_s)
    print(f"start of vLLM {own:.1f} s, from death to healthy {healed:.1f} s: {healed / own:.3f}")
    print([f"{s:.1f}" for s in own_s], [f"{s:.1f}" for s in healed_s])


WORKER = pytest.param("VLLM::Worker", marks=vllm_cpu.shown_too_by("the death of the engine"))


@pytest.mark.parametrize("name", [WORKER, "bin/vllm serve"])
def test_a_process_that_dies_takes_the_server_with_it_and_it_is_back(host, name):
    last, revision = host.rests(), host.current()
    with Load(URL):
        time.sleep(2)
        host.process(name).kill()
        done = host.ended(last)
    assert (done["phase"], done["alert"]) == ("succeeded", "VLLMDown")
    assert done["actions"] == ["capture", "restart"]
    wait_for(lambda: list((host.state / "bundles").glob(f"{done['id']}*.tar.gz")), 30)
    assert host.current() == revision
    assert host.is_healthy()


def test_an_engine_that_hangs_under_load_is_restarted(host):
    last = host.rests()
    with Load(URL):
        time.sleep(2)
        host.process("VLLM::EngineCore").suspend()
        done = host.ended(last)
    assert (done["phase"], done["actions"]) == ("succeeded", ["capture", "restart"])
    assert done["alert"] == "VLLMEngineHung"
    assert host.is_healthy()


@vllm_cpu.shown_too_by("test_hands_vllm.py")
def test_other_settings_come_under_load_and_no_request_that_ran_is_lost(host):
    host.rests()
    host.changes_under_load()


def test_settings_without_room_for_one_request_are_taken_back_and_by_hand_made_to_fit(host):
    """The cache is too small for the longest request, which no check without the model can know."""
    last, revision = host.rests(), host.current()
    host.set("kv_cache_memory_bytes=393216")
    done = host.ended(last)
    assert (done["phase"], done["outcome"]) == ("rolled_back", "died_again")
    assert done["facts"]["failure"] == "kv_cache_too_small"
    assert host.current() == revision
    last = host.rests()
    host.uses(max(host.revisions()))
    done = host.ended(last)
    assert (done["phase"], done["actions"][-1]) == ("succeeded", "reconfigure")
    assert 256 <= host.revisions()[host.current()]["arguments"]["max_model_len"] <= 768
    host.gpuwatch("config", "rollback", "m", str(revision), "--yes")
    assert host.ended(done["id"])["phase"] == "succeeded"


def test_a_mistake_in_the_settings_touches_nothing_and_by_hand_gives_way_to_what_served(host):
    last, revision = host.rests(), host.current()
    host.set("max_num_sequences=4")
    done = host.ended(last)
    assert (done["phase"], done["outcome"]) == ("failed", "revision_refused")
    assert host.current() == revision
    assert host.is_healthy()
    host.uses(max(host.revisions()))
    done = host.ended(done["id"])
    assert (done["phase"], done["actions"][-1]) == ("succeeded", "reconfigure")
    assert host.current() == revision


@vllm_cpu.shown_too_by("test_settings_without_room, all but the port,")
def test_a_port_that_is_taken_is_waited_for(host):
    last, revision = host.rests(), host.current()
    host.process("VLLM::EngineCore").kill()
    wait_for(lambda: not host.is_healthy(), 20, every_s=0.05)
    taken = wait_for(lambda: listener(PORT), 20, every_s=0.01)
    done = host.ended(last)
    taken.close()
    assert (done["phase"], done["facts"]["failure"]) == ("failed", "port_busy")
    assert host.ended(done["id"])["phase"] == "succeeded"
    assert host.current() == revision


def listener(port):
    with contextlib.suppress(OSError):
        return socket.create_server(("127.0.0.1", port))
    return None
