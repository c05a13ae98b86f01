"""Commands that take longer than a call, and outlive the daemon; never runs one twice, never waits for one.

An errand is a folder, `FOLDER/KEY`: `asked.json` (what was asked), `out` (what it printed), `leader` (who
runs it) and `status` (how it ended). A shell stands above the command, in a session of its own, and writes
the last two. A shell, since all it does is wait: it takes no memory to speak of, and an upgrade of gpuwatch
cannot pull its code away from under it.

Rule 1: the folder comes whole, by a rename; whoever finds one without a leader starts the shell again.
Rule 2: the shell takes the errand by a hard link, which only one of two can make, and else does nothing: so
        no kill of the daemon, wherever it was, makes a command run twice.
Rule 3: `status` is written once, by the shell, or by whoever finds that it cannot: late, or gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from gpuwatch.errors import ServerError
from gpuwatch.records import Errand, ErrandPhase
from gpuwatch.servers import session
from gpuwatch.servers.hiding import without_secrets
from gpuwatch.servers.starts.arguments import redacted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

_KEY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,120}")
_MARK: Final = "GPUWATCH_ERRAND"
_SHELL: Final = "/bin/sh"
# $1: the folder, then the command. `$$` is the shell's own pid, which leads the session.
_SCRIPT: Final = """
folder=$1; shift; mine=$folder/leader.$$
cat "/proc/$$/stat" /proc/sys/kernel/random/boot_id >"$mine" && ln "$mine" "$folder/leader" 2>/dev/null
taken=$?; rm -f "$mine"; [ $taken = 0 ] && [ ! -e "$folder/status" ] || exit 0
"$@"
echo $? >"$folder/status.new" && ln "$folder/status.new" "$folder/status"
"""
_LATE, _GONE, _TALKATIVE = "late", "gone", "talkative"
_MOST_OUT_BYTES: Final = 16 * 2**20  # what prints more is ended: it must not fill the disk
_WHY: Final = {
    _LATE: "not done within {:g} s",
    _GONE: "it ended without a status: it was killed, or the host went down",
    _TALKATIVE: f"it printed more than {_MOST_OUT_BYTES // 2**20} MiB",
}
_TAIL_BYTES: Final = 64 * 1024
_KEEP_MS: Final = 30 * 86_400_000
_MOST_DETAIL: Final = 500
_MOST_FACTS: Final = 64


@dataclass(frozen=True, slots=True)
class _Asked:
    """`asked.json`."""

    at_ms: int
    within_ms: int
    command: tuple[str, ...]


@dataclass(kw_only=True)
class Errands:
    """The errands of one folder, which is made when the first begins; `redact` takes secrets out of text."""

    folder: Path
    redact: Callable[[str], str] = redacted
    _over: dict[str, Errand] = field(default_factory=dict, init=False, repr=False)
    _shells: set[int] = field(default_factory=set, init=False, repr=False)

    def begin(
        self, key: str, command: Sequence[str], *, within_ms: int, env: Mapping[str, str], now_ms: int
    ) -> None:
        """Start `command`, an argument list, unless `key` was begun before; `env` is its whole environment.

        What takes longer than `within_ms` is ended by whoever looks next. Ask again until `look` tells of
        it: a call that was cut off is made good by the next. What is 30 days old is forgotten. ServerError.
        """
        if not _KEY.fullmatch(key):
            raise ServerError(f"begin errand {key!r}: use letters, digits, . _ -", permanent=True)
        home = self.folder / key
        try:
            asked = self._asked(home) or self._ask(home, _Asked(now_ms, within_ms, tuple(command)))
            if not (home / "leader").exists() and now_ms < asked.at_ms + asked.within_ms:
                program = [_SHELL, "-c", _SCRIPT, _SHELL, str(home), *asked.command]
                self._shells.add(session.spawn(program, {**env, _MARK: key}, home / "out").pid)
        except OSError as error:
            raise self._trouble("begin", home, error) from error

    def look(self, now_ms: int) -> Mapping[str, Errand]:
        """All errands by key, and an end to those that are late; ServerError if the folder is unreadable."""
        self._reap()
        found = {}
        for home, asked in self._homes():
            try:
                errand = self._over.get(home.name) or self._errand(home, asked, now_ms)
            except OSError as error:
                raise self._trouble("look at", home, error) from error
            if errand.phase is not ErrandPhase.RUNNING:
                self._over[home.name] = errand
            found[home.name] = errand
        return found

    def forget(self, before_ms: int) -> None:
        """Delete those that were asked for before this instant and are over."""
        for home, asked in list(self._homes()):
            if asked.at_ms < before_ms and (home / "status").exists():
                shutil.rmtree(home, ignore_errors=True)
                self._over.pop(home.name, None)

    # -- asking ----------------------------------------------------------------------------------------

    def _ask(self, home: Path, asked: _Asked) -> _Asked:
        """Leave the folder, whole and on disk (rule 1)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f".{home.name}.new"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        with (draft / "asked.json").open("w") as file:
            json.dump({"at_ms": asked.at_ms, "within_ms": asked.within_ms, "command": asked.command}, file)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(home)
        self.forget(asked.at_ms - _KEEP_MS)
        return asked

    def _asked(self, home: Path) -> _Asked | None:
        try:
            row: dict[str, Any] = json.loads((home / "asked.json").read_bytes())
            return _Asked(int(row["at_ms"]), int(row["within_ms"]), tuple(row["command"]))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise ServerError(
                f"read {home / 'asked.json'}: {error!r}; to cure it, remove {home}", permanent=True
            ) from error

    def _homes(self) -> Iterator[tuple[Path, _Asked]]:
        """Each errand's folder with what was asked; one that cannot be read is none."""
        try:
            names = sorted(os.listdir(self.folder))  # noqa: PTH208 (each second)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._trouble("look at", self.folder, error) from error
        for name in names:
            with contextlib.suppress(ServerError, OSError):
                if _KEY.fullmatch(name) and (asked := self._asked(self.folder / name)):
                    yield self.folder / name, asked

    # -- looking ---------------------------------------------------------------------------------------

    def _errand(self, home: Path, asked: _Asked, now_ms: int) -> Errand:
        status = _text(home / "status") or self._ended(home, asked, now_ms)
        if not status:
            return Errand(phase=ErrandPhase.RUNNING, began_at_ms=asked.at_ms)
        last = _last_line(home / "out")
        facts = self._facts(last)
        said = (facts.get("error") or self.redact(last))[:_MOST_DETAIL]
        return Errand(
            phase=ErrandPhase.DONE if status == "0" else ErrandPhase.FAILED,
            began_at_ms=asked.at_ms,
            detail=_WHY[status].format(asked.within_ms / 1000) if status in _WHY else said or _exit(status),
            facts=facts,
        )

    def _ended(self, home: Path, asked: _Asked, now_ms: int) -> str:
        """The status that its shell did not write, if it cannot any more (rule 3)."""
        is_late = now_ms >= asked.at_ms + asked.within_ms
        leader = _leader(home)
        if leader is None and is_late:  # a shell that has not come to take it yet
            leader = session.find(_MARK, home.name)
        members = session.members(leader) if leader else []
        if is_late or _size(home / "out") > _MOST_OUT_BYTES:
            with contextlib.suppress(PermissionError):  # a command that became another user
                session.send(signal.SIGKILL, members)
                if members:
                    return ""  # one of them may have made another in between: it is over when none is left
            return _settled(home, _LATE if is_late else _TALKATIVE)
        if leader is None or members:
            return ""  # what nobody began yet is begun by the next `begin`
        return _settled(home, _GONE)

    def _facts(self, line: str) -> dict[str, str]:
        """The JSON object on the last line, its values as text."""
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict):
                few = dict(list(found.items())[:_MOST_FACTS])
                shown = without_secrets(few, self.redact).items()
                return {name: self.redact(_as_text(value)) for name, value in shown}
        return {}

    def _reap(self) -> None:
        """A shell that has ended stays in the list of processes until its parent has asked."""
        for pid in list(self._shells):
            with contextlib.suppress(ChildProcessError):
                if not os.waitpid(pid, os.WNOHANG)[0]:
                    continue
            self._shells.discard(pid)

    @staticmethod
    def _trouble(verb: str, what: Path, error: OSError) -> ServerError:
        return ServerError(
            f"{verb} errand {what}: {error.strerror}; to cure it, make room there or correct its owner"
        )


def _leader(home: Path) -> session.Leader | None:
    """Who took the errand, from its line of /proc/PID/stat and the boot's id."""
    stat, _, boot_id = _text(home / "leader").rpartition("\n")
    fields = stat.rpartition(")")[2].split()
    if len(fields) < 20:
        return None
    return session.Leader(pid=int(stat.split()[0]), start_ticks=int(fields[19]), boot_id=boot_id)


def _settled(home: Path, word: str) -> str:
    """What `status` says in the end: a shell that was about to write may have been sooner."""
    draft = home / "status.ours"
    draft.write_text(word)
    with contextlib.suppress(FileExistsError):
        os.link(draft, home / "status")
    return _text(home / "status")


def _exit(status: str) -> str:
    """Of a command that printed nothing."""
    return "" if status == "0" else f"exited with status {status}"


def _last_line(path: Path) -> str:
    """The last of the output that is not empty."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, _size(path) - _TAIL_BYTES))
        lines = file.read(_TAIL_BYTES).decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except FileNotFoundError:
        return ""
