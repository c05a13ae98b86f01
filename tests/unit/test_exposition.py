"""What a page of Prometheus' text format becomes, and which pages are refused."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuwatch.errors import SourceError
from gpuwatch.records import Labels
from gpuwatch.sources.exposition import Exposition


def parsed(page):
    return {str(s.labels): s.value for s in Exposition(server="a").samples(page, 5)}


@pytest.mark.parametrize(
    ("line", "series", "value"),
    [
        ("up 1", 'up{server="a"}', 1),
        ("up\t1", 'up{server="a"}', 1),
        ("up 1 1700000000000", 'up{server="a"}', 1),
        ("  up   0.0  ", 'up{server="a"}', 0),
        ("up 1\r", 'up{server="a"}', 1),
        ("up{} 1", 'up{server="a"}', 1),
        ("vllm:x_total 1.5e+06", 'vllm:x_total{server="a"}', 1.5e6),
        ("x -Inf", 'x{server="a"}', -math.inf),
        ('x_bucket{le="+Inf"} +Inf', 'x_bucket{le="+Inf",server="a"}', math.inf),
        ('x{b="2",a="1",} 3', 'x{a="1",b="2",server="a"}', 3),
        ('x { a = "1" , b = "2" } 3 4', 'x{a="1",b="2",server="a"}', 3),
        (r'x{a="q\"b\\n\nz"} 3', r'x{a="q\"b\\n\nz",server="a"}', 3),
        ('x{a="}{, =#"} 3', 'x{a="}{, =#",server="a"}', 3),
        ('x{server="b"} 3', 'x{exported_server="b",server="a"}', 3),
        ('x{a=""} 3', 'x{server="a"}', 3),
    ],
)
def test_a_line_becomes_a_sample(line, series, value):
    assert parsed(f"# HELP x y\n# TYPE x gauge\n\n{line}\n") == {series: value}


def test_nan_and_created_series_are_no_samples():
    assert parsed('a NaN\nb_created 1\nc_created{x="1"} 2\nd 1') == {'d{server="a"}': 1}


def test_a_series_given_twice_is_one_sample():
    assert parsed('x{a="1",b="2"} 1\nx{b="2",a="1"} 2') == {'x{a="1",b="2",server="a"}': 2}


@pytest.mark.parametrize(
    "line",
    [
        "up",
        "up one",
        "up 1 2 3",
        "up 1_000",
        '{a="1"} 1',
        "1up 1",
        'x{a="1" 1',
        "x{a=1} 1",
        'x{a="1"b="2"} 1',
        'x{a="1",a="2"} 1',
        'x{1a="1"} 1',
        "<html><body>Not found</body></html>",
    ],
)
def test_a_malformed_line_refuses_the_page_and_is_named(line):
    with pytest.raises(SourceError, match="line 2 is not Prometheus' text format"):
        parsed(f"up 1\n{line}\n")


def test_a_malformed_line_is_malformed_also_when_seen_again():
    exposition = Exposition()
    for _ in range(2):
        with pytest.raises(SourceError):
            exposition.samples("1x 1", 0)


@given(st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True), st.text(max_size=8)))
def test_labels_come_back_as_they_were_written(labels):
    labels = {"x_" + name: value for name, value in labels.items()}
    written = Labels([("__name__", "m"), *labels.items()])
    # A line ends at a newline alone, which is escaped; other control characters stand for themselves.
    (sample,) = Exposition().samples(f"{written} 1\n", 0)
    assert sample.labels == written


@given(st.text(alphabet='ab{}",=\\ 1\n#eE+-.', max_size=40))
def test_any_text_gives_samples_or_a_source_error(text):
    try:
        assert all(s.value == s.value for s in Exposition(server="a").samples(text, 0))
    except SourceError:
        pass


def test_a_page_of_400_series_is_cheap_to_read_again():
    page = "\n".join(f'vllm:x_bucket{{engine="0",le="{i}",model_name="m"}} {i}.0' for i in range(400))
    exposition = Exposition(server="a")
    exposition.samples(page, 0)
    began_s = time.process_time()
    for _ in range(20):
        exposition.samples(page, 0)
    # Measured 0.6 ms a page; a bound that only a change of kind breaks.
    assert (time.process_time() - began_s) / 20 < 0.010
