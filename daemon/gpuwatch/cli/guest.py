"""`gpuwatch guest`: puts the guest where vLLM finds it, asks those that live, never acts by itself."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import click

import gpuwatch
from gpuwatch.cli.options import duration_ms
from gpuwatch.errors import SourceError
from gpuwatch.guest import client, limits, wire
from gpuwatch.guest.client import GuestError

_PACKAGE: Final = "gpuwatch_guest"
_SOURCE: Final = Path(client.__file__).parent
_METADATA: Final = """\
Metadata-Version: 2.1
Name: gpuwatch-guest
Version: {version}
Summary: Tells gpuwatch of torch's CUDA allocator from inside the processes of vLLM.
License: Apache-2.0
Requires-Python: >=3.10
"""
_ENTRY_POINTS: Final = f"[vllm.general_plugins]\ngpuwatch = {_PACKAGE}:register\n"
_COLUMNS: Final = "{:>8}  {:<20} {:<12} {:<10} {:>12} {:>12} {:>8} {:>6} {:>10}  {}"
_HEADINGS: Final = (
    *("PID", "PROCESS", "ROLE", "DEVICE", "ALLOCATED", "RESERVED", "RETRIES", "OOMS"),
    *("IN FLIGHT", "LIMITS"),
)
_LIMITS: Final = ("running", "tokens", "admission")
_LIMIT_COLUMNS: Final = "{:>8}  {:<20} {:>10} {:>10} {:>10}"
_VLLM: Final = ("api_server", "engine_core", "worker")
_folder_option = click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    envvar=wire.FOLDER_VARIABLE,
    default=wire.DEFAULT_FOLDER,
    show_default=True,
    help="Where the guests' sockets lie.",
)


@click.group()
def guest() -> None:
    """Look into vLLM's processes: install the guest, list those that live, show stacks, limit a server."""


@guest.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
def install(folder: Path) -> None:
    """Put the guest into DIR, for PYTHONPATH; a running vLLM takes it up when it is started anew."""
    folder = folder.resolve()
    try:
        _install(folder)
    except OSError as error:
        cure = "to cure it, name a folder that may be written"
        raise SourceError(f"install the guest in {folder}: {error.strerror}; {cure}") from error
    click.echo(f"{folder}: to vLLM's unit add `Environment=PYTHONPATH={folder}`, then restart it")


@guest.command(name="list")
@_folder_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_(folder: Path, as_json: bool) -> None:  # noqa: FBT001
    """Show the processes that have a guest: what torch's allocator holds, requests in flight, limits."""
    answers = _asked(folder)
    if as_json:
        shown = {pid: {"error": str(a)} if isinstance(a, GuestError) else a for pid, a in answers.items()}
        click.echo(json.dumps(shown))
        return
    if not answers:
        click.echo(f"no guest lives in {folder}; docs/guest.md says how to install one")
        return
    click.echo(_COLUMNS.format(*_HEADINGS))
    for pid, answer in answers.items():
        for line in _rows(pid, answer):
            click.echo(line)


@guest.command()
@click.argument("pid", type=click.IntRange(min=1))
@_folder_option
def stacks(pid: int, folder: Path) -> None:
    """Show where each Python thread of process PID is, innermost frame first."""
    try:
        answer = client.ask(folder / f"{pid}{wire.SOCKET_SUFFIX}", "stacks", within_s=5)
        lines = _stack_lines(answer["threads"])
    except GuestError as error:
        raise SourceError(f"{error}; see gpuwatch guest list for those that live") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"guest {pid}: not an answer: {type(error).__name__}") from error
    click.echo("\n".join(lines))


@guest.command()
@click.argument("pid", type=click.IntRange(min=1))
@_folder_option
@click.option("--running", type=click.IntRange(min=0), help="Requests that each engine runs at once.")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens of each engine's step.")
@click.option("--admission", type=click.IntRange(min=0), help="Requests in the API; further ones get 503.")
@click.option("--for", "duration", default="5m", show_default=True, help="When they end by themselves.")
@click.option("--lift", is_flag=True, help="End all limits now.")
def limit(pid: int, folder: Path, duration: str, lift: bool, **asked: int | None) -> None:  # noqa: FBT001
    """Limit the server that process PID belongs to, in place of all limits that it has.

    What runs goes on: a limit on running requests is reached as they end, and those above it wait in vLLM. No
    request that is in the API is cut off.
    """
    for_ms = duration_ms(duration)
    if lift == any(value is not None for value in asked.values()):
        raise click.UsageError("name at least one limit, or --lift and none")
    if not 0 < for_ms <= limits.LONGEST_S * 1000:
        raise click.UsageError(f"--for: more than 0 and at most {limits.LONGEST_S // 60}m")
    members = _members(pid, _asked(folder))
    answers = _told(folder, members, asked, for_ms / 1000)
    try:
        lines, missed = _limit_lines(answers), _missed(asked, answers)
    except (KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"limit the server of process {pid}: no answer: {type(error).__name__}") from error
    click.echo("\n".join(lines))
    if missed:
        raise SourceError(f"limit the server of process {pid}: {'; '.join(missed)}")
    click.echo("no limit is left" if lift else f"for {duration}, unless asked again")


def _asked(folder: Path) -> dict[int, dict[str, Any] | GuestError]:
    try:
        return dict(sorted(client.ask_all(client.listed(folder), "figures").items()))
    except GuestError as error:
        raise SourceError(str(error)) from error


def _rows(pid: int, answer: dict[str, Any] | GuestError) -> list[str]:
    """A line for each device, or one that says why there is none."""
    if isinstance(answer, GuestError):
        return [f"{pid:>8}  {answer}"]
    try:
        name, role = client.printable(answer["process"], 20), client.printable(answer["role"], 12)
        work = (_in_flight(answer), _limits_of(answer))
        if not answer["devices"]:
            return [_COLUMNS.format(pid, name, role, "no CUDA", "", "", "", "", *work).rstrip()]
        return [_row(pid, name, role, device, work).rstrip() for device in answer["devices"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"{pid:>8}  not an answer: {type(error).__name__}"]


def _row(pid: int, name: str, role: str, device: dict[str, Any], work: tuple[str, str]) -> str:
    stats = device["stats"]
    held = (_shown(stats, f"{what}_bytes.all.current", 2**20, " MiB") for what in ("allocated", "reserved"))
    counts = (_shown(stats, what) for what in ("num_alloc_retries", "num_ooms"))
    return _COLUMNS.format(pid, name, role, f"cuda:{int(device['device'])}", *held, *counts, *work)


def _shown(stats: dict[str, Any], name: str, unit: int = 1, suffix: str = "") -> str:
    """A figure, or a dash where torch told none that could be believed."""
    return f"{int(stats[name]) / unit:.0f}{suffix}" if name in stats else "-"


def _in_flight(answer: dict[str, Any]) -> str:
    """Requests in the API, or those that run and those that wait in the engine."""
    if engine := answer.get("engine"):
        return f"{int(engine['running'])}+{int(engine['waiting'])}"
    return str(int(answer["admission"]["in_flight"])) if "admission" in answer else ""


def _limits_of(answer: dict[str, Any]) -> str:
    """Such as `running 2, tokens 64`."""
    held = {**answer.get("engine", {}).get("limits", {})}
    held["admission"] = answer.get("admission", {}).get("limit")
    return ", ".join(f"{name} {int(held[name])}" for name in _LIMITS if held.get(name) is not None)


# -- limits ------------------------------------------------------------------------------------------


def _members(pid: int, answers: dict[int, dict[str, Any] | GuestError]) -> dict[int, dict[str, Any]]:
    """What the guests said of the server that `pid` is a process of; SourceError if there are none.

    The server begins at the topmost of vLLM's processes above `pid`, and is all that descends from it.
    """
    said = {member: answer for member, answer in answers.items() if not isinstance(answer, GuestError)}
    root = pid
    while said.get(above := _parent(root), {}).get("role") in _VLLM:
        root = above
    members = {member: answer for member, answer in said.items() if root in _line_of(member)}
    if not members:
        cure = "see gpuwatch guest list for those that have one"
        raise SourceError(f"limit the server of process {pid}: no process of it has a guest; {cure}")
    return members


def _line_of(pid: int) -> list[int]:
    """A process and those above it."""
    line = [pid]
    while (above := _parent(line[-1])) > 1 and above not in line:
        line.append(above)
    return line


def _parent(pid: int) -> int:
    """0 for one that is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _told(
    folder: Path, members: dict[int, dict[str, Any]], asked: dict[str, int | None], for_s: float
) -> dict[int, dict[str, Any] | GuestError]:
    """What each answers that is asked to keep the limits, or its share of them."""
    doors = [pid for pid, answer in members.items() if "admission" in answer] or list(members)
    shares = client.shares(asked["admission"], doors)
    answers: dict[int, dict[str, Any] | GuestError] = {}
    for pid in members:
        own = {**asked, "admission": shares.get(pid), "for_s": for_s}
        paths = {pid: folder / f"{pid}{wire.SOCKET_SUFFIX}"}
        answers |= client.ask_all(paths, "limit", more=own)
    return answers


def _limit_lines(answers: dict[int, dict[str, Any] | GuestError]) -> list[str]:
    """A heading, and a line for each process of what it keeps now, or why it did not answer."""
    lines = [_LIMIT_COLUMNS.format("PID", "PROCESS", *(name.upper() for name in _LIMITS))]
    for pid, answer in answers.items():
        if isinstance(answer, GuestError):
            lines.append(f"{pid:>8}  {answer}")
        else:
            cells = (client.printable(answer["applied"].get(name, ""), 10) for name in _LIMITS)
            name = client.printable(answer["process"], 20)
            lines.append(_LIMIT_COLUMNS.format(pid, name, *cells).rstrip())
    return lines


def _missed(asked: dict[str, int | None], answers: dict[int, dict[str, Any] | GuestError]) -> list[str]:
    """A sentence for each limit that no process keeps."""
    said = [answer for answer in answers.values() if not isinstance(answer, GuestError)]
    missed = []
    for name, value in asked.items():
        if value is None or any(name in answer["applied"] for answer in said):
            continue
        whys = {str(answer["role"]): answer["lacks"][name] for answer in said if name in answer["lacks"]}
        why = whys.get("engine_core") or next(iter(whys.values()), "no answer")
        missed.append(f"{name}: {client.printable(why)}")
    return missed


def _stack_lines(threads: list[dict[str, Any]]) -> list[str]:
    lines = []
    for thread in threads:
        lines.append(f"{client.printable(thread['name'])} ({client.printable(thread['native_id'])})")
        lines += [f"    {client.printable(frame)}" for frame in thread["frames"]]
    return lines


def _install(folder: Path) -> None:
    """Written beside and moved into place, the entry point last: a start in between finds all or nothing."""
    for made in [path for path in (folder, *folder.parents) if not path.exists()][::-1]:
        made.mkdir(exist_ok=True)
        made.chmod(0o755)
    info = f"{_PACKAGE}-{gpuwatch.__version__}.dist-info"
    with tempfile.TemporaryDirectory(prefix=f".{_PACKAGE}-", dir=folder) as name:
        draft = Path(name)
        files = {f"{_PACKAGE}/{path.name}": path.read_bytes() for path in sorted(_SOURCE.glob("*.py"))}
        files |= {
            f"{info}/METADATA": _METADATA.format(version=gpuwatch.__version__).encode(),
            f"{info}/entry_points.txt": _ENTRY_POINTS.encode(),
            f"{info}/INSTALLER": b"gpuwatch\n",
        }
        files[f"{info}/RECORD"] = _record(files, info)
        for path, content in files.items():
            _write(draft / path, content)
        (draft / "old").mkdir()
        for old in (*folder.glob(f"{_PACKAGE}-*.dist-info"), folder / _PACKAGE):
            if old.exists():
                old.rename(draft / "old" / old.name)
        for new in (_PACKAGE, info):
            (draft / new).rename(folder / new)
        shutil.rmtree(draft / "old")


def _write(path: Path, content: bytes) -> None:
    """Readable for vLLM's user, whatever the umask."""
    path.parent.mkdir(exist_ok=True)
    path.parent.chmod(0o755)
    path.write_bytes(content)
    path.chmod(0o644)


def _record(files: dict[str, bytes], info: str) -> bytes:
    lines = []
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(content)}")
    return "\n".join([*lines, f"{info}/RECORD,,", ""]).encode()
