"""A frame gives back what went in, to the bit, or says what is damaged."""

import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuwatch.frames import columns
from gpuwatch.frames.frame import MOST_CELLS, VERSION, Frame, FrameError, encode

STALE = 0x7FF0000000000002  # what Prometheus writes for a series that ended
INT64 = np.iinfo(np.int64)
EDGES = [
    0,
    1 << 63,  # -0.0
    1,  # the smallest denormal
    0x000FFFFFFFFFFFFF,  # the largest
    0x7FEFFFFFFFFFFFFF,  # the largest finite
    0x7FF0000000000000,  # infinity
    0xFFF0000000000000,
    STALE,
    0x7FF8000000000000,  # the usual NaN
    0xFFF8000000000001,
    0x7FFFFFFFFFFFFFFF,
    0xFFFFFFFFFFFFFFFF,
    0x43E0000000000000,  # 2**63, the first that is no int64
    0xC3E0000000000000,  # -2**63, which is one
    0x4340000000000000,  # 2**53
    0x4340000000000001,
    0x3FB999999999999A,  # 0.1
]
HOUR = np.arange(3600) * 1000 + 1_700_000_000_000


def bits(values):
    return np.ascontiguousarray(values, np.float64).view(np.uint64)


def same(blob, at_ms, values, present=None):
    """Whether all of it comes back, the whole frame at once and column by column."""
    frame = Frame(blob)
    assert (frame.n, frame.width) == values.shape
    assert np.array_equal(frame.at_ms(), at_ms)
    kept = np.ones(values.shape, bool) if present is None else present
    matrix, found = frame.columns()
    assert matrix.shape == values.shape
    assert np.array_equal(np.ones_like(kept) if found is None else found, kept)
    assert np.array_equal(bits(matrix)[kept], bits(values)[kept])
    for index in range(frame.width):
        column, found = frame.column(index)
        assert column.shape == at_ms.shape
        assert np.array_equal(np.ones(frame.n, bool) if found is None else found, kept[:, index])
        assert np.array_equal(bits(column)[kept[:, index]], bits(values[:, index])[kept[:, index]])
    return True


def walk(seed, rows=3600, step=5):
    return np.cumsum(np.random.default_rng(seed).integers(-step, step + 1, rows)).astype(np.float64)


def of(*series):
    return np.stack(series, axis=1)


def size_of(*series, present=None):
    return len(encode(HOUR[: len(series[0])], of(*series), present))


def head_again(blob, **changes):
    """The blob with other numbers in its head, and a checksum that fits them."""
    names = ("magic", "version", "length", "n", "width", "streams")
    head = dict(zip(names, struct.unpack_from("<3sB4I", blob), strict=True)) | changes
    start, length = struct.pack("<3sB4I", *head.values()), struct.unpack_from("<I", blob, 4)[0]
    crc = zlib.crc32(blob[24:length], zlib.crc32(start))
    return start + struct.pack("<I", crc) + blob[24:]


patterns = st.one_of(
    st.sampled_from(EDGES),
    st.integers(0, 2**64 - 1),
    st.integers(-1000, 1000).map(lambda i: int(bits([float(i)])[0])),
    st.integers(-(10**6), 10**6).map(lambda i: int(bits([i / 1000])[0])),
)


@st.composite
def frames(draw):
    rows, width = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    stamps = st.one_of(st.integers(INT64.min, INT64.max), st.integers(0, 50))
    at_ms = np.array(draw(st.lists(stamps, min_size=rows, max_size=rows)), np.int64)
    cells = []
    for _ in range(width):
        # Few distinct patterns to a column make runs, constants and columns that are alike.
        pool = draw(st.lists(patterns, min_size=1, max_size=6))
        cells.append(draw(st.lists(st.sampled_from(pool), min_size=rows, max_size=rows)))
    values = np.array(cells, np.uint64).view(np.float64).T
    flags = st.lists(st.booleans(), min_size=rows * width, max_size=rows * width)
    present = draw(st.none() | flags.map(lambda kept: np.array(kept).reshape(rows, width)))
    return at_ms, values, present


@given(frames())
def test_whatever_goes_in_comes_out_to_the_bit(given_frame):
    at_ms, values, present = given_frame
    assert same(encode(at_ms, values, present), at_ms, values, present)
    assert same(encode(at_ms, values, present, references=False), at_ms, values, present)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=200))
def test_every_pattern_of_64_bits_is_kept(cells):
    values = np.array(cells, np.uint64).view(np.float64).reshape(-1, 1)
    assert same(encode(np.arange(len(cells)), values), np.arange(len(cells)), values)


@pytest.mark.parametrize("edge", EDGES, ids=hex)
@pytest.mark.parametrize("base", [walk(1), walk(1) / 100, np.random.default_rng(1).random(3600)])
def test_one_special_cell_among_others_is_kept(edge, base):
    for row in (0, 1700, 3599):
        cells = bits(base).copy()
        cells[row] = edge
        values = of(cells.view(np.float64), base)
        assert same(encode(HOUR, values), HOUR, values)


def test_a_staleness_marker_does_not_spoil_an_integer_column():
    plain = walk(2)
    marked = bits(plain).copy()
    marked[[7, 2000]] = STALE
    assert size_of(marked.view(np.float64)) < size_of(plain) + 100


def test_a_marker_that_ends_all_series_is_written_once():
    series = [walk(seed, 600) for seed in range(40)]
    ended = [np.append(column[:-1], np.array([STALE], np.uint64).view(np.float64)) for column in series]
    assert size_of(*ended) < size_of(*series) + 40 * 8 + 100


def test_a_counter_with_a_reset_is_kept_and_stays_small():
    counter = np.arange(3600.0) * 17 + 1e12
    counter[2000:] -= counter[2000]
    assert same(encode(HOUR, of(counter)), HOUR, of(counter))
    assert size_of(counter) < 300


def test_a_negative_zero_is_no_zero():
    values = of(np.array([0.0, -0.0, 1.0, -1.0]), np.full(4, -0.0))
    matrix, _ = Frame(encode(HOUR[:4], values)).columns()
    assert np.signbit(matrix).tolist() == np.signbit(values).tolist()


def test_decimals_cost_what_integers_cost():
    assert size_of(walk(3) / 100) < size_of(walk(3)) + 50
    assert size_of(walk(3) / 1e6) < size_of(walk(3)) + 50
    assert same(encode(HOUR, of(walk(3) / 1e6)), HOUR, of(walk(3) / 1e6))


def test_a_column_that_moves_like_another_costs_next_to_nothing():
    used = walk(4) * 4096
    free, elsewhere, finer = 8e10 - used, used + 12345, walk(4)
    values = of(used, free, elsewhere, finer)
    assert same(encode(HOUR, values), HOUR, values)
    assert len(encode(HOUR, values)) < size_of(used) + 3 * 30
    assert len(encode(HOUR, values, references=False)) > 3 * size_of(used)


def test_a_column_like_another_is_read_without_all_others():
    values = of(walk(5), walk(6, step=90), 7 - walk(5))
    blob = encode(HOUR, values)
    fetched = []

    def fetch(offset, length):
        fetched.append(length)
        return blob[offset : offset + length]

    column, _ = Frame.reading(fetch, len(blob)).column(2)
    assert column.tolist() == values[:, 2].tolist()
    assert sum(fetched) - 4096 < len(blob) / 2


def test_a_head_of_many_columns_is_fetched_in_two_parts():
    values = np.random.default_rng(0).random((3, 2000))
    blob = encode(HOUR[:3], values)
    fetched = []

    def fetch(offset, length):
        fetched.append((offset, length))
        return blob[offset : offset + length]

    frame = Frame.reading(fetch, len(blob))
    assert [offset for offset, _ in fetched] == [0, 0]
    assert frame.column(1999)[0].tolist() == values[:, 1999].tolist()


def test_bytes_that_cannot_be_fetched_are_damage():
    blob = encode(HOUR, of(walk(5)))
    frame = Frame.reading(
        lambda offset, length: blob[offset : offset + length] if offset == 0 else b"", len(blob)
    )
    with pytest.raises(FrameError, match="column 0"):
        frame.column(0)


def test_absent_cells_cost_next_to_nothing():
    series = [walk(seed) for seed in range(20)]
    present = np.ones((3600, 20), bool)
    present[1000:1075] = False  # the target was away
    blob = encode(HOUR, of(*series), present)
    assert same(blob, HOUR, of(*series), present)
    assert len(blob) < size_of(*series) + 20 * 10


@pytest.mark.parametrize("junk", EDGES, ids=hex)
def test_what_an_absent_cell_holds_does_not_matter(junk):
    values, present = of(walk(7)), np.ones((3600, 1), bool)
    present[[0, 5, 3599]] = False
    other = bits(values).copy()
    other[~present] = junk
    assert encode(HOUR, other.view(np.float64), present) == encode(HOUR, values, present)


def test_a_column_of_no_sample_at_all_is_read_as_such():
    values, present = of(walk(8), walk(9)), np.ones((3600, 2), bool)
    present[:, 1] = False
    frame = Frame(encode(HOUR, values, present))
    assert not frame.column(1)[1].any()
    assert frame.column(0)[1] is None


def test_flags_that_say_all_is_present_are_as_none():
    assert encode(HOUR, of(walk(1)), np.ones((3600, 1), bool)) == encode(HOUR, of(walk(1)))


def test_one_row_is_a_frame():
    values = np.array(EDGES, np.uint64).view(np.float64).reshape(1, -1)
    assert same(encode(np.array([INT64.min]), values), np.array([INT64.min]), values)


def test_stamps_may_repeat_stand_still_run_back_and_overflow():
    for stamps in ([5, 5, 5], [9, 3, 6], [INT64.max, INT64.min, 0], [INT64.min, INT64.max, INT64.min]):
        at_ms, values = np.array(stamps), of(np.arange(3.0))
        assert same(encode(at_ms, values), at_ms, values)


def test_stamps_on_a_beat_cost_nothing_and_jitter_costs_half_a_byte():
    flat = of(np.zeros(3600))
    jitter = np.random.default_rng(0).integers(-3, 4, 3600)
    aligned = len(encode(HOUR, flat))
    assert aligned < 100
    assert len(encode(HOUR + jitter, flat)) < aligned + 1800


def test_what_is_given_is_not_changed():
    values, present = np.asfortranarray(of(walk(1), walk(2))), np.ones((3600, 2), bool)
    present[3] = False
    before = values.copy()
    encode(HOUR, values, present)
    assert np.array_equal(values, before)


def test_wanted_columns_come_in_the_order_asked_for():
    values = of(walk(1), 5 - walk(1), walk(2))
    matrix, present = Frame(encode(HOUR, values)).columns([2, 1, 2])
    assert present is None
    assert np.array_equal(matrix, values[:, [2, 1, 2]])
    assert Frame(encode(HOUR, values)).columns([])[0].shape == (3600, 0)


def test_there_is_no_column_beyond_the_last_or_before_the_first():
    frame = Frame(encode(HOUR, of(walk(1))))
    for index in (-1, 1):
        with pytest.raises(IndexError, match="1 columns"):
            frame.column(index)


def test_shapes_that_do_not_fit_are_refused():
    for at_ms, values, present in (
        (HOUR[:2], np.zeros((3, 1)), None),
        (HOUR[:3], np.zeros(3), None),
        (HOUR[:3], np.zeros((3, 0)), None),
        (HOUR[:0], np.zeros((0, 3)), None),
        (HOUR[:3], np.zeros((3, 1)), np.ones((3, 2), bool)),
    ):
        with pytest.raises(ValueError, match="values"):
            encode(at_ms, values, present)


def test_a_frame_of_a_newer_version_is_told_from_a_damaged_one():
    blob = bytearray(encode(HOUR, of(walk(1))))
    blob[3] = VERSION + 1
    with pytest.raises(FrameError, match="newer gpuwatch"):
        Frame(bytes(blob))


def corpus():
    present = np.ones((60, 6), bool)
    present[20:25] = False
    values = of(
        walk(1, 60),
        5 - walk(1, 60),
        np.full(60, 2.5),
        walk(2, 60) / 100,
        *np.random.default_rng(0).random((2, 60)),
    )
    values[7, 3] = np.nan
    at_ms = HOUR[:60] + np.random.default_rng(1).integers(0, 9, 60)
    return at_ms, values, present


def read(blob):
    """What of a frame can be read, by column, and which columns are said to be damaged."""
    frame, found, damaged = Frame(blob), {}, {}
    for index in range(frame.width):
        try:
            found[index] = frame.column(index)
        except FrameError as error:
            damaged[index] = str(error)
    try:
        found["at_ms"] = frame.at_ms()
    except FrameError as error:
        damaged["at_ms"] = str(error)
    for index, text in damaged.items():
        assert text.startswith("the time stamps: " if index == "at_ms" else f"column {index}: ")
    return found, set(damaged)


def right(found, at_ms, values, present):
    for index, answer in found.items():
        if index == "at_ms":
            assert np.array_equal(answer, at_ms)
        else:
            kept = present[:, index]
            assert np.array_equal(answer[1], kept)
            assert np.array_equal(bits(answer[0])[kept], bits(values[:, index])[kept])
    return True


def test_a_changed_byte_is_noticed_wherever_it_is():
    at_ms, values, present = corpus()
    blob = encode(at_ms, values, present)
    head = struct.unpack_from("<I", blob, 4)[0]
    for place in range(len(blob)):
        changed = bytearray(blob)
        changed[place] ^= 0x41
        if place < head:
            with pytest.raises(FrameError):
                Frame(bytes(changed))
            continue
        found, damaged = read(bytes(changed))
        assert damaged, place
        assert right(found, at_ms, values, present)


def test_a_frame_cut_short_or_too_long_is_refused():
    blob = encode(*corpus())
    for length in range(len(blob)):
        with pytest.raises(FrameError):
            Frame(blob[:length])
    with pytest.raises(FrameError, match="bytes long"):
        Frame(blob + b"\0")


def test_a_damaged_column_leaves_the_others_readable():
    values = of(walk(1), walk(2), 9 - walk(2), walk(3))
    blob = encode(HOUR, values)
    whole = Frame(blob)
    body = bytes(whole._stream(1, whole._record(1)))
    at = blob.index(body) + len(body) // 2
    found, damaged = read(blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :])
    assert damaged == {1, 2}
    assert set(found) == {0, 3, "at_ms"}
    assert all(np.array_equal(found[index][0], values[:, index]) for index in (0, 3))


def test_a_head_that_lies_is_refused_whatever_its_checksum_says():
    blob = encode(*corpus())
    for lie in (
        {"n": 0},
        {"n": 2**32 - 1},
        {"width": 0},
        {"width": 2**32 - 1},
        {"streams": 1},
        {"streams": 99},
    ):
        with pytest.raises(FrameError):
            Frame(head_again(blob, **lie))
    with pytest.raises(FrameError, match="contradicts"):
        Frame(head_again(blob, n=MOST_CELLS // 6 + 1))


@given(st.data())
def test_a_directory_that_lies_gives_an_error_or_numbers(data):
    at_ms, values, present = corpus()
    blob = encode(at_ms, values, present)
    length, n, width, streams = struct.unpack_from("<4I", blob, 4)
    table = bytearray(columns.inflate(blob[24:length], streams * 40))
    for _ in range(data.draw(st.integers(1, 3))):
        table[data.draw(st.integers(0, len(table) - 1))] = data.draw(st.integers(0, 255))
    directory = columns.deflate(bytes(table))
    forged = (
        blob[:4]
        + struct.pack("<4I", 24 + len(directory), n, width, streams)
        + bytes(4)
        + directory
        + blob[length:]
    )
    try:
        frame = Frame(head_again(forged))
    except FrameError:
        return
    for index in range(width):
        with suppress(FrameError):
            assert frame.column(index)[0].shape == (n,)
    with suppress(FrameError):
        assert frame.at_ms().shape == (n,)


@given(st.binary(max_size=60), st.integers(0, 255), st.integers(1, 30))
def test_planes_of_any_bytes_give_an_error_or_integers(body, planes, rows):
    with suppress(FrameError):
        assert columns.unpack(columns.Packed(1, 0, planes, body), rows).shape == (rows,)
