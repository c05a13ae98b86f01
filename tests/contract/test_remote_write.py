"""What holds for remote write, over real HTTP, against a receiver that judges as a Prometheus does."""

import base64
import collections
import contextlib
import random
import socket
import struct
import subprocess
import sys
import traceback

import cramjam
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from tests.receivers import Handler, Loopback

import gpuwatch
from gpuwatch.config import RemoteWriteSettings
from gpuwatch.config.duration import Duration
from gpuwatch.errors import ConfigError
from gpuwatch.records import STALE, Labels, Scrape
from gpuwatch.remote_write import (
    MAX_SAMPLES,
    RemoteWriteError,
    RemoteWriter,
    WriterState,
    after_failure,
    after_success,
    after_waiting,
    is_due,
    of_settings,
    state_json,
    take,
    writer_state,
)
from gpuwatch.remote_write.delivery import (
    BACKOFF_MAX_MS,
    BACKOFF_MIN_MS,
    BROKEN_RETRY_MS,
    REFUSED_MAX,
    WAIT_MAX_MS,
)
from gpuwatch.remote_write.wire import Encoder

NOW_MS = 1_763_634_665_000
UP = Labels.of("up", server="qwen3")
USED = Labels.of("gpu_memory_used_bytes", gpu="0")
TOKEN = "token-0123456789"
LATE = (400, "out of order sample\n", {})


def scrape(at_ms=NOW_MS, target="t", **values):
    values = values or {"up": 1.0}
    return Scrape(target, at_ms, [Labels.of(name) for name in values], list(values.values()))


# -- the receiver ----------------------------------------------------------------------------------


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def fields(data):
    """(number, payload) of a protobuf message, read without protobuf, as the encoding is specified."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = varint(data, at)
            yield number, value
            continue
        if kind == 1:
            size = 8
        else:
            assert kind == 2
            size, at = varint(data, at)
        assert at + size <= len(data)
        yield number, data[at : at + size]
        at += size


def decoded(body):
    """The series of a request: ([(name, value), …], [(stamp in ms, the value's 8 bytes), …])."""
    series = []
    for number, one in fields(bytes(cramjam.snappy.decompress_raw(body))):
        assert number == 1
        labels, samples = [], []
        for part, data in fields(one):
            found = dict(fields(data))
            if part == 1:
                labels.append((found[1].decode(), found[2].decode()))
            else:
                assert part == 2
                samples.append((found.get(2, 0), found.get(1, bytes(8))))
        series.append((labels, samples))
    return series


def bits(value):
    return struct.pack("<d", value)


class PrometheusStandIn(Loopback):
    """Takes what is newer than what it has, else refuses the whole request; `plan` holds what it does first.

    A plan's step is an answer (status, text, headers) or one of: "hang", "close" the connection
    without an answer, and "lose" the answer after it took the request.
    """

    path = "/api/v1/write"

    def __init__(self):
        super().__init__(self._handler())
        self.plan = collections.deque()
        self.requests = []  # (path, headers, series)
        self.samples = {}  # series -> {stamp: 8 bytes}
        self.twice = 0  # samples that came again unchanged, and were let pass
        self.connections = 0

    def judge(self, series):
        with contextlib.suppress(IndexError):
            step = self.plan.popleft()
            if step != "lose":
                return step
            self._take(series)
            return step
        return self._take(series)

    def _take(self, series):
        taken = {key: dict(known) for key, known in self.samples.items()}
        for labels, samples in series:
            known = taken.setdefault(tuple(labels), {})
            for stamp, value in samples:
                newest = max(known, default=0)
                if stamp < newest or (stamp == newest and known[stamp] != value):
                    return LATE
                self.twice += stamp == newest
                known[stamp] = value
        self.samples = taken
        return 204, "", {}

    def _handler(stand_in):  # noqa: N805 -- `self` is the handler inside
        class Write(Handler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                stand_in.connections += 1

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                series = decoded(body)
                stand_in.requests.append((self.path, dict(self.headers), series))
                step = stand_in.judge(series)
                if step == "hang":
                    stand_in._ending.wait(10)
                if isinstance(step, str):
                    self.close_connection = True
                    return
                self.answer(*step)

        return Write


@pytest.fixture
def receiver():
    with PrometheusStandIn() as stand_in:
        yield stand_in


@pytest.fixture
def session():
    with requests.Session() as session:
        yield session


def settings_for(url, **given):
    return RemoteWriteSettings(**{"name": "prom", "url": url, "timeout": Duration(5000), **given})


@pytest.fixture
def writer(receiver, session):
    return RemoteWriter(settings_for(receiver.url), session)


def failure_of(writer, scrapes=None):
    with pytest.raises(RemoteWriteError) as caught:
        writer.send(scrapes or [scrape()])
    return caught.value


def verdict(error):
    names = ("permanent", "broken", "retry_after_ms")
    return {name: getattr(error, name) for name in names if getattr(error, name)}


# -- what is sent ----------------------------------------------------------------------------------


def test_samples_arrive_and_are_counted(receiver, writer):
    assert writer.send([scrape(up=1.0, down=0.0), scrape(NOW_MS + 1000, up=2.0)]) == 3
    assert receiver.samples == {
        (("__name__", "up"),): {NOW_MS: bits(1.0), NOW_MS + 1000: bits(2.0)},
        (("__name__", "down"),): {NOW_MS: bits(0.0)},
    }


def test_a_request_says_what_remote_write_1_0_asks_for(receiver, writer):
    writer.send([scrape()])
    ((path, headers, _),) = receiver.requests
    assert path == "/api/v1/write"
    assert headers["Content-Encoding"] == "snappy"
    assert headers["Content-Type"] == "application/x-protobuf"
    assert headers["X-Prometheus-Remote-Write-Version"] == "0.1.0"
    assert headers["User-Agent"] == f"gpuwatch/{gpuwatch.__version__}"
    assert "Authorization" not in headers


def test_scrapes_without_a_sample_make_no_request(receiver, writer):
    assert writer.send([]) == 0
    assert writer.send([Scrape("t", NOW_MS, [], [])]) == 0
    assert receiver.requests == []


def test_one_connection_carries_many_requests(receiver, writer):
    for second in range(20):
        writer.send([scrape(NOW_MS + second * 1000)])
    assert receiver.connections == 1


def test_the_staleness_marker_goes_bit_for_bit():
    ((_, samples),) = decoded(Encoder({}).encode([Scrape("t", NOW_MS, [UP], [STALE])]))
    assert samples == [(NOW_MS, bytes.fromhex("020000000000f07f"))]


def test_a_label_of_the_receiver_is_added_unless_the_series_has_it():
    encoder = Encoder({"host": "a01", "server": "other", "none": ""})
    ((labels, _),) = decoded(encoder.encode([Scrape("t", NOW_MS, [UP], [1.0])]))
    assert labels == [("__name__", "up"), ("host", "a01"), ("server", "qwen3")]


def test_samples_of_a_series_stand_together_and_in_order_of_time():
    scrapes = [Scrape("t", at_ms, [UP, USED], [at_ms, 1.0]) for at_ms in (3000, 1000, 2000)]
    series = decoded(Encoder({}).encode(scrapes))
    assert [dict(labels)["__name__"] for labels, _ in series] == ["up", "gpu_memory_used_bytes"]
    assert [stamp for stamp, _ in series[0][1]] == [1000, 2000, 3000]


def test_what_utf_8_cannot_hold_is_replaced():
    ((labels, _),) = decoded(Encoder({}).encode([Scrape("t", 1, [Labels.of("up", unit="a\udcffb")], [1.0])]))
    assert dict(labels)["unit"] == "a?b"


def test_a_value_less_than_its_series_is_a_mistake_of_ours():
    with pytest.raises(ValueError, match="zip"):
        Encoder({}).encode([Scrape("t", 1, [UP, USED], [1.0])])


NAMES = st.from_regex(r"[a-z_]{1,6}", fullmatch=True)
SERIES = st.dictionaries(NAMES, st.text(st.characters(codec="utf-8"), min_size=1, max_size=9), min_size=1)
VALUES = st.floats(allow_nan=False) | st.just(STALE)
STAMPS = st.integers(0, 2**45)


@given(st.data())
def test_whatever_scrapes_hold_is_what_is_read_back(data):
    labels = [Labels(one.items()) for one in data.draw(st.lists(SERIES, min_size=1, max_size=5))]
    labels = list(dict.fromkeys(labels))
    rows = st.lists(VALUES, min_size=len(labels), max_size=len(labels))
    made = data.draw(st.dictionaries(STAMPS, rows, min_size=1, max_size=5))
    series = decoded(Encoder({}).encode([Scrape("t", at_ms, labels, row) for at_ms, row in made.items()]))
    expected = {
        one: [(at_ms, bits(made[at_ms][column])) for at_ms in sorted(made)]
        for column, one in enumerate(labels)
    }
    assert {Labels(one): samples for one, samples in series} == expected
    assert all(one == sorted(one) for one, _ in series)


# -- secrets ---------------------------------------------------------------------------------------


def sent_authorization(receiver):
    return receiver.requests[-1][1].get("Authorization")


def test_a_token_is_read_at_each_send(receiver, session, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    writer = RemoteWriter(settings_for(receiver.url, bearer_token_file=tmp_path / "token"), session)
    writer.send([scrape()])
    assert sent_authorization(receiver) == f"Bearer {TOKEN}"
    (tmp_path / "token").write_text("another\n")
    writer.send([scrape(NOW_MS + 1)])
    assert sent_authorization(receiver) == "Bearer another"


def test_user_and_password_go_as_basic_authorization_in_utf_8(receiver, session, tmp_path):
    (tmp_path / "password").write_text("显存:x\n", "utf-8")
    target = settings_for(receiver.url, username="gpu", password_file=tmp_path / "password")
    RemoteWriter(target, session).send([scrape()])
    expected = base64.b64encode("gpu:显存:x".encode()).decode()
    assert sent_authorization(receiver) == f"Basic {expected}"


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"two words", "显存".encode()])
def test_a_secret_that_cannot_be_used_breaks_the_channel_and_nothing_is_sent(
    content, receiver, session, tmp_path
):
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    error = failure_of(RemoteWriter(settings_for(receiver.url, bearer_token_file=path), session))
    assert verdict(error) == {"broken": True}
    assert str(path) in str(error)
    assert "words" not in str(error)
    assert receiver.requests == []


def test_no_secret_of_a_netrc_goes_out(receiver, writer, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login root password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    writer.send([scrape()])
    assert sent_authorization(receiver) is None


def test_no_proxy_of_the_environment_stands_before_this_very_host(receiver, writer, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert writer.send([scrape()]) == 1


def test_a_redirect_is_not_followed_and_no_token_goes_elsewhere(receiver, session, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    with PrometheusStandIn() as elsewhere:
        receiver.plan.append((307, "", {"Location": elsewhere.url}))
        target = settings_for(receiver.url, bearer_token_file=tmp_path / "token")
        assert verdict(failure_of(RemoteWriter(target, session))) == {"broken": True}
        assert elsewhere.requests == []


def test_no_error_holds_the_query_or_the_token(receiver, session, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    target = settings_for(f"{receiver.url}?authKey=hunter2", bearer_token_file=tmp_path / "token")
    writer = RemoteWriter(target, session)
    receiver.plan.extend([(500, "", {}), (400, "", {}), (403, "", {}), "close", "lose"])
    errors = [failure_of(writer) for _ in range(5)]
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/write?authKey=hunter2"
        errors.append(
            failure_of(RemoteWriter(settings_for(url, bearer_token_file=tmp_path / "token"), session))
        )
    for error in errors:
        shown = "".join(traceback.format_exception(error)) + repr(error.__cause__) + repr(error.__context__)
        assert "http://127.0.0.1:" in shown
        assert "hunter2" not in shown
        assert TOKEN not in shown


# -- what an answer means --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "expected", "cure"),
    [
        (307, {"broken": True}, "the url that it leads to"),
        (400, {"permanent": True}, "out_of_order_time_window"),
        (401, {"broken": True}, "bearer_token_file"),
        (403, {"broken": True}, "may write"),
        (404, {"broken": True}, "--web.enable-remote-write-receiver"),
        (405, {"broken": True}, "path"),
        (408, {}, "sent again"),
        (409, {"permanent": True}, "left out"),
        (413, {"permanent": True}, "left out"),
        (415, {"broken": True}, "remote write 1.0"),
        (422, {"permanent": True}, "left out"),
        (425, {}, "sent again"),
        (429, {}, "sent again"),
        (500, {}, "sent again"),
        (503, {}, "sent again"),
    ],
)
def test_each_status_means_one_thing_and_says_what_to_do(status, expected, cure, receiver, writer):
    receiver.plan.append((status, "no <good>\nsecond line", {}))
    error = failure_of(writer)
    assert verdict(error) == expected
    assert f"cannot send 1 samples to {receiver.url}: HTTP {status} 'no <good>'; " in str(error)
    assert cure in str(error)


@pytest.mark.parametrize("status", [200, 202, 204])
def test_every_status_of_two_hundred_is_a_success(status, receiver, writer):
    receiver.plan.append((status, "", {}))
    assert writer.send([scrape()]) == 1


DATE = "Thu, 20 Nov 2025 10:44:25 GMT"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Retry-After": "7"}, 7000),
        ({"Retry-After": " 7 "}, 7000),
        ({"Retry-After": "9" * 5000}, 999_999_999_000),
        ({"Retry-After": "Thu, 20 Nov 2025 10:45:25 GMT", "Date": DATE}, 60_000),
        ({"Retry-After": "Thu, 20 Nov 2025 10:40:00 GMT", "Date": DATE}, 0),
        ({"Retry-After": "Thu, 20 Nov 2025 10:45:25 GMT"}, None),
        ({"Retry-After": "Thu, 20 Nov 2025 10:45:25", "Date": DATE}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "1.5"}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_receiver_says_how_long_to_wait_by_its_own_clock(status, headers, expected, receiver, writer):
    receiver.plan.append((status, "", headers))
    assert failure_of(writer).retry_after_ms == expected


def test_a_long_answer_is_quoted_in_part_and_on_one_line(receiver, writer):
    receiver.plan.append((500, "x" * 100_000, {}))
    error = failure_of(writer)
    assert "x" * 200 in str(error)
    assert "x" * 201 not in str(error)
    receiver.plan.append((500, "\x1b[31mred\r", {}))
    assert "\x1b" not in str(failure_of(writer))


def test_a_receiver_that_never_answers_is_a_passing_fault(receiver, session):
    receiver.plan.append("hang")
    error = failure_of(RemoteWriter(settings_for(receiver.url, timeout=Duration(200)), session))
    assert verdict(error) == {}
    assert "no answer within 0.2 s" in str(error)


def test_a_connection_that_ends_without_an_answer_is_a_passing_fault(receiver, writer):
    receiver.plan.append("close")
    error = failure_of(writer)
    assert verdict(error) == {}
    assert "without an answer" in str(error) or "reset" in str(error)
    assert writer.send([scrape()]) == 1


def test_a_refused_connection_is_a_passing_fault_with_a_text_that_stays_the_same(session):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/write"
        writer = RemoteWriter(settings_for(url), session)
        first, second = failure_of(writer), failure_of(writer)
    assert verdict(first) == {}
    assert str(first) == str(second)
    assert f"cannot send 1 samples to {url}: Connection refused; " in str(first)


def test_an_answer_that_breaks_off_after_its_status_counts_by_its_status(receiver, writer):
    receiver.plan.append((200, "cut", {"Content-Length": "1000", "Connection": "close"}))
    assert writer.send([scrape()]) == 1


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://a.example/",
        "http:///write",
        "http://[::1/write",
        "http://a.example:x/",
        "http://a b.example/",
    ],
)
def test_a_url_that_cannot_be_used_is_refused_at_once(url):
    with pytest.raises(ConfigError, match="url: "):
        RemoteWriter(settings_for(url))


def test_a_url_with_a_user_is_refused_and_its_password_not_shown():
    with pytest.raises(ConfigError, match="password_file") as caught:
        RemoteWriter(settings_for("https://gpu:hunter2@a.example/write"))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("missing", ["cramjam", "google.protobuf"])
def test_without_the_libraries_it_says_what_to_install(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "gpuwatch.remote_write.wire")
    with pytest.raises(ConfigError, match=r"install gpuwatch\[remote-write\]") as caught:
        RemoteWriter(settings_for("http://a.example/write"))
    assert missing in str(caught.value)


def test_the_libraries_are_loaded_by_those_alone_who_send_samples_on():
    code = "import sys, gpuwatch.remote_write; print({'cramjam', 'google.protobuf'} & sys.modules.keys())"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown == "set()\n"


def test_writers_of_the_settings_label_every_series_with_the_host(receiver):
    named = settings_for(receiver.url, name="named", external_labels={"host": "mine", "cluster": "lab"})
    writers = of_settings([settings_for(receiver.url), named], "gpu-a01")
    assert list(writers) == ["prom", "named"]
    for each in writers.values():
        with contextlib.closing(each):
            each.send([scrape()])
    first, second = (dict(series[0][0]) for _, _, series in receiver.requests)
    assert first == {"__name__": "up", "host": "gpu-a01"}
    assert second == {"__name__": "up", "host": "mine", "cluster": "lab"}


def test_every_mistake_in_the_settings_is_told_at_once():
    wrong = [
        settings_for("http://a.example/", name="a", external_labels={"data-centre": "x", "1st": "y"}),
        settings_for("nowhere", name="b"),
    ]
    with pytest.raises(ConfigError) as caught:
        of_settings(wrong, "gpu-a01")
    first, second, third = caught.value.mistakes
    assert first.startswith("store.remote_write: a: external_labels: 'data-centre'")
    assert "'1st'" in second
    assert third.startswith("store.remote_write: b: url: ")


# -- delivery --------------------------------------------------------------------------------------

PASSING = RemoteWriteError("503")
BROKEN = RemoteWriteError("403", broken=True)
PERMANENT = RemoteWriteError("400", permanent=True)


def rows(*ids, samples=1):
    return [
        (number, Scrape("t", NOW_MS + number * 1000, [UP] * samples, [float(number)] * samples))
        for number in ids
    ]


def failed(state, error, batch, *, jitter=0.5, now_ms=NOW_MS):
    return after_failure(state, error, batch, now_ms=now_ms, jitter=jitter)


def test_a_batch_is_as_many_rows_as_fit_and_one_at_least():
    assert take(WriterState(), []) == []
    assert take(WriterState(), rows(1, 2, 3, samples=2), max_samples=5) == rows(1, 2, samples=2)
    assert take(WriterState(), rows(1, 2, samples=9), max_samples=5) == rows(1, samples=9)
    assert len(take(WriterState(), rows(*range(1, 9000)))) == MAX_SAMPLES


def test_a_batch_in_doubt_is_sent_again_as_it_was_though_there_are_more_rows_now():
    state = failed(WriterState(cursor=4), PASSING, rows(5, 6))
    assert take(state, rows(5, 6, 7, 8)) == rows(5, 6)
    state = after_success(state, rows(5, 6))
    assert state == WriterState(cursor=6)
    assert take(state, rows(7, 8)) == rows(7, 8)


def test_a_batch_in_doubt_that_is_deleted_meanwhile_holds_nothing_up():
    state = failed(WriterState(), PASSING, rows(1, 2, 3))
    assert take(state, rows(3, 4, 5)) == rows(3)
    assert take(state, rows(4, 5)) == rows(4, 5)


def test_a_refused_batch_is_sent_row_by_row_at_once_and_only_refused_rows_are_dropped():
    state = failed(WriterState(), PERMANENT, rows(1, 2, 3, samples=4))
    assert is_due(state, NOW_MS)
    assert (state.cursor, state.dropped_samples, state.error) == (0, 0, "400")
    assert take(state, rows(1, 2, 3, 4)) == rows(1)
    state = failed(state, PERMANENT, rows(1, samples=4))
    assert (state.cursor, state.dropped_samples) == (1, 4)
    state = failed(state, PASSING, rows(2))
    assert take(state, rows(2, 3, 4)) == rows(2)
    state = after_success(state, rows(2))
    assert take(state, rows(3, 4)) == rows(3)
    state = after_success(state, rows(3))
    assert state == WriterState(cursor=3, dropped_samples=4)
    assert take(state, rows(4, 5)) == rows(4, 5)


def refusals(state, waiting):
    """Requests until all of these are dropped, each of which the receiver refuses."""
    requests = 0
    while state.cursor < waiting[-1][0]:
        batch = take(state, [row for row in waiting if row[0] > state.cursor][:200])
        state = failed(state, PERMANENT, batch)
        requests += 1
    return requests, state


def test_a_long_outage_of_which_all_is_refused_takes_few_requests_to_drop():
    requests, state = refusals(WriterState(), rows(*range(1, 2001), samples=3))
    assert requests == 1 + REFUSED_MAX + 10
    assert state == WriterState(cursor=2000, dropped_samples=6000, refused=REFUSED_MAX, error="400")
    state = after_success(state, rows(2001))
    assert state == WriterState(cursor=2001, dropped_samples=6000)
    assert failed(state, PERMANENT, rows(2002, 2003)).row_by_row


def test_refused_rows_between_others_never_make_a_batch_be_dropped():
    state = failed(WriterState(), PERMANENT, rows(*range(1, 101)))
    for number in range(1, 101):
        (row,) = take(state, rows(*range(number, 101)))
        state = failed(state, PERMANENT, [row]) if number % 2 else after_success(state, [row])
    assert state == WriterState(cursor=100, dropped_samples=50)


def test_rows_that_waited_too_long_are_dropped_and_counted_and_the_channel_stays_as_it_is():
    state = failed(WriterState(), BROKEN, rows(1, 2, 3, samples=2))
    given_up = after_waiting(state, rows(1, 2, 3, 4, samples=2), NOW_MS + 3000)
    assert (given_up.cursor, given_up.dropped_samples) == (2, 4)
    assert given_up.broken_since_ms == NOW_MS
    assert given_up.next_attempt_ms == state.next_attempt_ms
    assert take(given_up, rows(3, 4)) == rows(3)
    assert after_waiting(state, rows(1, 2), NOW_MS) == state
    assert after_waiting(state, [], NOW_MS) == state


def test_rows_given_up_end_the_doubt_about_them():
    state = failed(WriterState(), PERMANENT, rows(1, 2, 3))
    given_up = after_waiting(state, rows(1, 2, 3), NOW_MS + 60_000)
    assert take(given_up, rows(4, 5)) == rows(4, 5)
    assert not failed(given_up, PASSING, rows(4, 5)).row_by_row


def test_a_late_row_after_a_timely_one_is_not_given_up():
    # A clock that stepped back gives such rows; a cursor cannot leave one out.
    mixed = [(1, scrape(NOW_MS)), (2, scrape(NOW_MS - 60_000))]
    assert after_waiting(WriterState(), mixed, NOW_MS).cursor == 0


def test_waits_grow_from_one_second_to_one_minute():
    state, waits_ms = WriterState(), []
    for number in range(40):
        state = failed(state, PASSING, rows(1), jitter=number % 2)
        waits_ms.append(state.next_attempt_ms - NOW_MS)
    assert waits_ms[0] == BACKOFF_MIN_MS
    assert waits_ms[1] == 4 * BACKOFF_MIN_MS
    assert min(waits_ms[8:]) == BACKOFF_MAX_MS // 2
    assert max(waits_ms) == BACKOFF_MAX_MS
    assert state.failures == 40
    assert not is_due(state, state.next_attempt_ms - 1)
    assert is_due(state, state.next_attempt_ms)


@pytest.mark.parametrize(
    ("asked_ms", "expected_ms"), [(0, 1500), (1000, 1500), (37_000, 37_000), (10**12, WAIT_MAX_MS)]
)
def test_a_wait_that_is_asked_for_is_kept_within_reason(asked_ms, expected_ms):
    state = failed(WriterState(), RemoteWriteError("429", retry_after_ms=asked_ms), rows(1))
    assert state.next_attempt_ms - NOW_MS == expected_ms


def test_a_broken_channel_keeps_its_rows_and_is_tried_every_minute():
    state = failed(WriterState(), BROKEN, rows(1))
    state = failed(state, BROKEN, rows(1), now_ms=NOW_MS + 60_000)
    assert state.broken_since_ms == NOW_MS
    assert state.next_attempt_ms == NOW_MS + 60_000 + BROKEN_RETRY_MS
    assert (state.cursor, state.dropped_samples) == (0, 0)
    assert after_success(state, rows(1)).broken_since_ms is None
    assert failed(state, PERMANENT, rows(1)).broken_since_ms is None


def test_a_clock_that_steps_back_does_not_silence_us():
    state = failed(WriterState(), PASSING, rows(1))
    assert is_due(state, NOW_MS - WAIT_MAX_MS)


def test_a_state_comes_back_from_its_row_with_the_cursor_of_its_column():
    state = failed(WriterState(cursor=4, dropped_samples=7), BROKEN, rows(5, 6))
    assert writer_state(4, state_json(state)) == state
    assert writer_state(5, state_json(state)).cursor == 5


@pytest.mark.parametrize("row", [None, "", "{", "[]", '{"cursor":"x"}'])
def test_a_state_that_cannot_be_read_starts_afresh_from_the_cursor(row):
    assert writer_state(9, row) == WriterState(cursor=9)


FAULTS = [(500, "", {}), (429, "", {"Retry-After": "3"}), (403, "", {}), "close", "lose"]


@pytest.mark.parametrize("seed", range(8))
def test_whatever_goes_wrong_on_the_way_everything_arrives_once(seed, receiver, writer):
    dice = random.Random(seed)
    state, now_ms = WriterState(), NOW_MS
    written = []
    while state.cursor < 60:
        if len(written) < 60:
            written += rows(*range(len(written) + 1, min(61, len(written) + dice.randint(1, 6))))
        waiting = [row for row in written if row[0] > state.cursor]
        now_ms += 1000
        if not waiting or not is_due(state, now_ms):
            continue
        if dice.random() < 0.5:
            receiver.plan.append(dice.choice(FAULTS))
        batch = take(state, waiting[:10], max_samples=7)
        try:
            writer.send([each for _, each in batch])
            state = after_success(state, batch)
        except RemoteWriteError as error:
            state = failed(state, error, batch, now_ms=now_ms, jitter=dice.random())
        state = writer_state(state.cursor, state_json(state))  # as over a restart
    (arrived,) = receiver.samples.values()
    assert arrived == {each.at_ms: bits(each.values[0]) for _, each in written}
