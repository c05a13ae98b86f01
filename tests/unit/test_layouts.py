"""Which column a series has: kept while it can be, widened where it must be, forgotten each hour."""

from gpuwatch.frames.rowtext import HOUR_MS
from gpuwatch.records import Labels
from gpuwatch.store.layouts import Shape, is_absent

A, B, C = (Labels.of("up", source=name) for name in "abc")


def gaps(row):
    return [None if is_absent(value) else value for value in row]


def test_the_same_series_keep_one_layout():
    shape = Shape("nvml")
    shape.fit(0, [A, B], [1.0, 2.0])
    first = shape.layout
    assert shape.fit(1000, [A, B], [3.0, 4.0]) == [3.0, 4.0]
    assert shape.fit(2000, [B, A], [5.0, 6.0]) == [6.0, 5.0]
    assert gaps(shape.fit(3000, [B], [7.0])) == [None, 7.0]
    assert shape.layout is first


def test_a_new_series_widens_the_layout_and_an_hour_later_what_is_gone_is_forgotten():
    shape = Shape("nvml")
    shape.fit(0, [A], [1.0])
    assert gaps(shape.fit(1000, [B], [2.0])) == [None, 2.0]
    assert shape.layout.labels == (A, B)
    assert shape.fit(HOUR_MS, [B], [3.0]) == [3.0]
    assert shape.layout.labels == (B,)


def test_a_target_with_new_series_at_every_scrape_does_not_grow_as_their_square():
    shape = Shape("vllm")
    cells = 0
    for n in range(1000):
        shape.fit(n * 1000, [A, Labels.of("request", id=str(n))], [1.0, 2.0])
        cells += len(shape.layout.labels)
    assert cells < 5 * 1000
    assert gaps(shape.fit(1_000_000, [A, B, C], [1.0, 2.0, 3.0])) == [1.0, 2.0, 3.0]
