"""What is needed to see gpuwatch's hands at work: a person who types, clients, and patience."""

import contextlib
import itertools
import json
import threading
import time
from pathlib import Path

import pytest
import requests

from gpuwatch.errors import StoreError
from gpuwatch.records import LIVE_PHASES
from gpuwatch.store import open_read_only


def wait_for(question, within_s, every_s=0.3):
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        if found := question():
            return found
        time.sleep(every_s)
    return pytest.fail(f"not within {within_s} s: {question()}")


class Operator:
    """What a person types about server `m`, and what is answered.

    `gpuwatch(*words)` is to run a command; `state` is where the daemon keeps its rows, `settings` where the
    server's revisions lie, `url` where it answers.
    """

    state: Path
    settings: Path
    url: str

    def set(self, *pairs, why="a test"):
        self.gpuwatch("config", "set", "m", *pairs, "--why", why, "--yes")

    def rows(self):
        """Those of remediations, the newest first. A command each time would take a core."""
        with contextlib.suppress(StoreError), open_read_only(self.state) as view:
            return view.remediations()
        return []

    def last(self):
        """The row of the newest remediation; None if there is none."""
        return next(iter(self.rows()), None)

    def next_after(self, its_id):
        """The row of the remediation that came after that one; of the first of all for an empty id."""
        later = list(itertools.takewhile(lambda r: r.plan.id != its_id, self.rows()))
        return later[-1] if later else None

    def last_id(self):
        return last.plan.id if (last := self.last()) else ""

    def ended(self, after, within_s=300):
        """The remediation that came after that one, at its end, as history tells it."""
        wait_for(lambda: (r := self.next_after(after)) and r.phase not in LIVE_PHASES, within_s)
        its_id = self.next_after(after).plan.id
        (seen,) = [one for one in json.loads(self.gpuwatch("history", "m", "--json")) if one["id"] == its_id]
        print(seen["id"], seen["actions"], seen["phase"], seen["outcome"], seen["facts"], seen.get("account"))
        return seen

    def revisions(self):
        return {r["number"]: r for r in json.loads(self.gpuwatch("config", "log", "m", "--json"))}

    def current(self):
        return int((self.settings / "current.yaml").readlink().stem.removeprefix("rev-"))

    def is_healthy(self):
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.url}/health", timeout=5).status_code == 200
        return False

    def changes_under_load(self):
        """Other settings for a server that is asked all the time: proved, and all let in was answered."""
        before = self.last_id()
        with Load(self.url) as load:
            wait_for(lambda: load.whole > 3, 60)
            self.set("max_num_seqs=4")
            done = self.ended(before)
            wait_for(self.is_healthy, 60)
        print("whole", load.whole, "refused", load.refused, "away", load.turned_away, "lost", load.lost)
        assert (done["phase"], done["outcome"]) == ("succeeded", "restored")
        assert load.lost == []
        assert done["account"]["requests_aborted"] == 0
        assert load.refused > 0
        assert self.revisions()[self.current()]["arguments"]["max_num_seqs"] == 4


class Load:
    """Requests one after the other from some clients; what was let in must be answered in full.

    A server that ends closes connections that it has not read: who was not answered with a first byte was
    turned away. That nothing of that ran is for vLLM's own counts to show.
    """

    def __init__(self, url, clients=3, tokens=120):
        self.url, self.tokens = url, tokens
        self.whole, self.refused, self.turned_away, self.lost = 0, 0, 0, []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self):
        body = {"model": "m", "prompt": [5, 6, 7], "max_tokens": self.tokens, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        while not self._over.is_set():
            try:
                with requests.post(
                    f"{self.url}/v1/completions", json=body, timeout=120, stream=True
                ) as answer:
                    is_in = self._read(answer)
            except requests.RequestException as error:
                is_in = isinstance(error, requests.Timeout)
                if is_in:
                    self.lost.append(repr(error))
                else:
                    self.turned_away += 1
            if not is_in:
                self._over.wait(0.5)

    def _read(self, answer):
        """Whether it was let in."""
        if answer.status_code == 503:
            self.refused += 1
            return False
        said = b""
        try:
            said = [line for line in answer.iter_lines() if line.startswith(b"data: {")][-1]
            if json.loads(said.removeprefix(b"data: "))["usage"]["completion_tokens"] == self.tokens:
                self.whole += 1
                return True
        except (requests.RequestException, LookupError, TypeError, ValueError) as error:
            said = repr(error).encode()
        self.lost.append(f"{answer.status_code} {said[:200]}")
        return True

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for thread in self._threads:
            thread.join()
