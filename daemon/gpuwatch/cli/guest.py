"""`gpuwatch guest`: puts the guest where vLLM finds it, and shows what those that live say; changes none."""

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
from gpuwatch.errors import SourceError
from gpuwatch.guest import client, wire
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
_COLUMNS: Final = "{:>8}  {:<20} {:<12} {:<10} {:>12} {:>12} {:>8} {:>6}"
_HEADINGS: Final = ("PID", "PROCESS", "ROLE", "DEVICE", "ALLOCATED", "RESERVED", "RETRIES", "OOMS")
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
    """Look into vLLM's processes: install the guest, list those that live, show stacks."""


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
    """Show the processes that have a guest, and what torch's allocator holds in each."""
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
        if not answer["devices"]:
            return [_COLUMNS.format(pid, name, role, "no CUDA", "", "", "", "").rstrip()]
        return [_row(pid, name, role, device) for device in answer["devices"]]
    except (KeyError, TypeError, ValueError) as error:
        return [f"{pid:>8}  not an answer: {type(error).__name__}"]


def _row(pid: int, name: str, role: str, device: dict[str, Any]) -> str:
    stats = device["stats"]
    held = (
        f"{int(stats[f'{what}_bytes.all.current']) / 2**20:.0f} MiB" for what in ("allocated", "reserved")
    )
    counts = (int(stats[what]) for what in ("num_alloc_retries", "num_ooms"))
    return _COLUMNS.format(pid, name, role, f"cuda:{int(device['device'])}", *held, *counts)


def _stack_lines(threads: list[dict[str, Any]]) -> list[str]:
    lines = []
    for thread in threads:
        lines.append(f"{client.printable(thread['name'])} ({client.printable(thread['native_id'])})")
        lines += [f"    {client.printable(frame)}" for frame in thread["frames"]]
    return lines


def _install(folder: Path) -> None:
    """Written beside and moved into place, the entry point last: a start in between finds all or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
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
