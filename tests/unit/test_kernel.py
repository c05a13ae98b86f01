"""The kernel's log: what its lines mean, and where they are read."""

import os
import sys

import pytest

from gpuwatch.errors import SourceError
from gpuwatch.sources.kernel import KINDS, Journal, KernelSource, Kmsg, kernel_source, kind_of

OOM = (
    "Killed process 4242 ({}) total-vm:91234567kB, anon-rss:60123456kB, file-rss:1024kB, "
    "shmem-rss:524288kB, UID:998 pgtables:130000kB oom_score_adj:0"
)
AT = "segfault at 18 ip 00007f21c0a1b2c3 sp 00007ffd1e2f3a40 error 4 in libtorch.so[7f21b0000000+2c000000]"
LINES = {
    f"Out of memory: {OOM.format('VLLM::EngineCor')}": "oom_kill_vllm",
    f"Memory cgroup out of memory: {OOM.format('VLLM::Worker_TP')}": "oom_kill_vllm",
    f"Out of memory: {OOM.format('vllm')}": "oom_kill_vllm",
    f"Out of memory: {OOM.format('postgres')}": "oom_kill",
    f"Out of memory: {OOM.format('vllmonitor')}": "oom_kill",
    f"Out of memory (oom_kill_allocating_task): {OOM.format('python3')}": "oom_kill",
    "Killed process 4242 (python), UID 998, total-vm:9123456kB, anon-rss:6012345kB, file-rss:0kB": "oom_kill",
    "oom_reaper: reaped process 4242 (python3), now anon-rss:0kB, file-rss:0kB, shmem-rss:0kB": "",
    "oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),task=python3,pid=4242,uid=998": "",
    "python3 invoked oom-killer: gfp_mask=0x140cca(GFP_HIGHUSER_MOVABLE), order=0, oom_score_adj=0": "",
    "NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=x, GPU has fallen off the bus.": "gpu_lost",
    "NVRM: GPU 0000:3b:00.0: GPU has fallen off the bus.": "gpu_lost",
    "NVRM: Xid (PCI:0000:3b:00): 48, pid=4242, name=VLLM::EngineCor, DBE (double bit error)": "xid",
    "NVRM: Xid (PCI:0000:3b:00): 119, pid=4242, name=nvidia-smi, Timeout after 6s of waiting for RPC": "xid",
    "NVRM: Xid (PCI:0000:3b:00): 13, pid=4242, name=python3, Graphics Exception: ESR": "xid_program",
    "NVRM: Xid (PCI:0000:3b:00): 31, pid=4242, name=python3, Ch 00000008, intr 00000000": "xid_program",
    "NVRM: Xid (PCI:0000:3b:00): 136, pid=4242, name=python3, link training failed": "xid",
    "NVRM: GPU 0000:3b:00.0: RmInitAdapter failed! (0x26:0x56:1474)": "nvidia_error",
    "NVRM: API mismatch: the client has the version 580.95.05, but": "nvidia_error",
    "NVRM: GPU0 nvAssertFailedNoLog: Assertion failed: 0 @ gpu_mgr.c:100": "nvidia_error",
    "nvidia-nvswitch0: SXid (PCI:0000:c1:00.0): 12028, Non-fatal, Link 32 egress error": "nvidia_error",
    "NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build": "",
    "nvidia 0000:3b:00.0: vgaarb: VGA decodes changed: olddecodes=io+mem,decodes=none": "",
    f"python3[4242]: {AT} likely on CPU 7 (core 3, socket 0)": "segfault",
    f"VLLM::EngineCor[4242]: {AT}": "segfault",
    f"pt_nccl_watchdg[4242]: {AT}": "segfault",
    f"postgres[4242]: {AT}": "",
    "traps: python3.12[4242] general protection fault ip:7f21c0a1b2c3 sp:7ffd error:0 in libc.so": "segfault",
    "traps: VLLM::Worker_TP[4242] trap invalid opcode ip:7f21 sp:7ffd error:0 in _C.abi3.so": "segfault",
    "python3[4242]: unhandled exception: DABT (lower EL), ESR 0x92000006, translation fault": "segfault",
    "INFO: task VLLM::EngineCor:4242 blocked for more than 122 seconds.": "hung_task",
    "INFO: task nvidia-smi:99 <writer> blocked on an rwsem for more than 122 seconds.": "hung_task",
    "watchdog: BUG: soft lockup - CPU#3 stuck for 26s! [python3:4242]": "hung_task",
    "rcu: INFO: rcu_preempt self-detected stall on CPU": "hung_task",
    "mce: [Hardware Error]: Machine check events logged": "mce",
    "mce: [Hardware Error]: CPU 3: Machine Check: 0 Bank 5: be00000000800400": "mce",
    "EDAC MC0: 1 CE memory read error on CPU_SrcID#0_MC#0_Chan#0_DIMM#0": "mce",
    "pcieport 0000:3a:00.0: AER: Corrected error received: 0000:3b:00.0": "pcie_aer",
    "pcieport 0000:3a:00.0: AER: Uncorrected (Fatal) error message received from 0000:3b:00.0": "pcie_aer",
    "pcieport 0000:3a:00.0: AER: device recovery successful": "",
    "usb 1-1: new high-speed USB device number 5 using xhci_hcd": "",
    "": "",
}


@pytest.mark.parametrize(("line", "kind"), LINES.items(), ids=lambda text: text[:60])
def test_a_line_of_the_kernels_log_is_of_one_kind_or_of_none(line, kind):
    assert kind_of(line) == kind


def test_every_kind_has_a_line_that_shows_it():
    assert set(KINDS) == set(LINES.values()) - {""}


def counted(source, now_ms):
    return {s.labels.get("kind"): s.value for s in source.read(now_ms) if s.value}


# -- /dev/kmsg -----------------------------------------------------------------------------------------


class Ring:
    """A pipe of packets, which gives a record a read as /dev/kmsg does."""

    def __init__(self):
        self.reader, self.writer = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
        self.path = f"/proc/self/fd/{self.reader}"
        self.write("4,0,0,-;Linux version 6.8.0")

    def write(self, record):
        os.write(self.writer, record.encode())

    def close(self):
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
def ring():
    ring = Ring()
    yield ring
    ring.close()


def test_each_record_of_the_ring_buffer_counts_once_from_nought(ring):
    source = KernelSource(Kmsg(ring.path))
    ring.write(f"6,1,10,-;Out of memory: {OOM.format('postgres')}")
    assert {s.labels.get("kind"): s.value for s in source.read(0)} == dict.fromkeys(KINDS, 0)
    assert counted(source, 1000) == {"oom_kill": 1}
    ring.write("3,2,20,-;NVRM: Xid (PCI:0000:3b:00): 95, pid=1, name=x, Uncontained\n SUBSYSTEM=pci\n")
    ring.write("4,3,30,c;NVRM: Xid (PCI:0000:3b:00): 95, pid=1, name=x, Uncontained\n")
    assert counted(source, 2000) == {"oom_kill": 1, "xid": 2}
    assert counted(source, 3000) == {"oom_kill": 1, "xid": 2}


def test_what_a_program_wrote_into_the_kernels_log_does_not_count(ring):
    source = KernelSource(Kmsg(ring.path))
    source.read(0)
    ring.write("14,1,10,-;NVRM: GPU 0000:3b:00.0: GPU has fallen off the bus.")  # facility 1: user
    ring.write("no record at all")
    assert counted(source, 1000) == {}


def test_a_flood_takes_several_reads_and_nothing_of_it_is_lost(ring):
    source = KernelSource(Kmsg(ring.path, most_lines=5))
    source.read(0)
    for _ in range(8):
        ring.write("6,1,10,-;mce: [Hardware Error]: Machine check events logged")
    assert [counted(source, at_ms) for at_ms in (1000, 2000, 3000)] == [{"mce": 5}, {"mce": 8}, {"mce": 8}]


def test_a_ring_buffer_that_is_dev_null_is_none():
    with pytest.raises(OSError, match="empty"):
        Kmsg(os.devnull)


# -- the journal -----------------------------------------------------------------------------------------

JOURNALCTL = """\
#!{python}
# Keeps a log of lines, and gives those after a cursor, which is a number of lines.
import pathlib, sys
here = pathlib.Path(__file__).parent
(here / "asked").write_text(" ".join(sys.argv[1:]))
if (here / "refusal").exists():
    sys.exit((here / "refusal").read_text())
if (here / "hint").exists():
    print((here / "hint").read_text(), file=sys.stderr)
lines = (here / "lines").read_text().splitlines()
options = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
begin = int(options.get("--after-cursor", 0))
shown = lines[begin : begin + int(options["--lines"])]
if shown:
    print("\\n".join([*shown, f"-- cursor: {{begin + len(shown)}}"]))
elif "--show-cursor" in sys.argv:  # as of systemd 252: it fails, and does not say why
    sys.exit(1)
"""


@pytest.fixture
def journal(tmp_path):
    """A folder with a journalctl that behaves, and the lines it has."""
    (tmp_path / "lines").write_text("")
    command = tmp_path / "journalctl"
    command.write_text(JOURNALCTL.format(python=sys.executable))
    command.chmod(0o755)
    return tmp_path


def test_the_journal_is_asked_from_the_start_of_gpuwatch_and_then_from_where_it_was_left(journal):
    source = KernelSource(Journal(1_700_000_000, str(journal / "journalctl")))
    (journal / "lines").write_text(f"Out of memory: {OOM.format('vllm')}\n")
    assert counted(source, 0) == {}
    assert "--since=@1700000000" in (journal / "asked").read_text()
    with (journal / "lines").open("a") as lines:
        lines.write("watchdog: BUG: soft lockup - CPU#3 stuck for 26s! [python3:4242]\n")
    assert counted(source, 10_000) == {"oom_kill_vllm": 1, "hung_task": 1}
    assert "--after-cursor=1 " in (journal / "asked").read_text()
    assert counted(source, 20_000) == {"oom_kill_vllm": 1, "hung_task": 1}


def test_a_kernel_that_has_said_nothing_is_no_failure(journal):
    source = KernelSource(Journal(0, str(journal / "journalctl")))
    assert counted(source, 0) == counted(source, 10_000) == {}


def test_a_process_that_names_itself_like_a_cursor_moves_none(journal):
    source = KernelSource(Journal(0, str(journal / "journalctl")))
    (journal / "lines").write_text(f"-- cursor: 99[7]: {AT}\npython3[7]: {AT}\n")
    source.read(0)
    assert counted(source, 10_000) == {"segfault": 1}
    assert "--after-cursor=2 " in (journal / "asked").read_text()


def test_a_journal_that_fails_later_is_an_error_and_what_was_counted_stays(journal):
    source = KernelSource(Journal(0, str(journal / "journalctl")))
    (journal / "lines").write_text("mce: [Hardware Error]: Machine check events logged\n")
    source.read(0)
    (journal / "refusal").write_text("Failed to open journal")
    with pytest.raises(SourceError, match="Failed to open journal"):
        source.read(10_000)
    (journal / "refusal").unlink()
    assert counted(source, 20_000) == {"mce": 1}


@pytest.mark.parametrize(
    "refusal",
    [
        "No journal files were opened due to insufficient permissions.",
        "Hint: You are currently not seeing messages from other users and the system.",
        "No journal files were found.",
    ],
)
def test_where_neither_log_may_be_read_there_is_no_source(journal, refusal, caplog):
    caplog.set_level("INFO")
    (journal / "hint").write_text(refusal)
    assert kernel_source(0, os.devnull, str(journal / "journalctl")) is None
    assert "systemd-journal" in caplog.text


def test_a_host_without_systemd_has_no_source(tmp_path, caplog):
    caplog.set_level("INFO")
    assert kernel_source(0, str(tmp_path / "kmsg"), str(tmp_path / "journalctl")) is None
    assert "the kernel's events are not counted" in caplog.text


def test_the_ring_buffer_is_preferred_to_the_journal(ring, journal):
    found = kernel_source(0, ring.path, str(journal / "journalctl"))
    assert found is not None
    assert found.interval_ms == Kmsg.interval_ms
    assert not (journal / "asked").exists()
    found = kernel_source(0, os.devnull, str(journal / "journalctl"))
    assert found is not None
    assert found.interval_ms == Journal.interval_ms
