"""PromQL: what is parsed, what is refused and where, what comes out."""

import calendar
import datetime as dt
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuwatch import promql
from gpuwatch.cli.memory import Memory
from gpuwatch.errors import QueryError
from gpuwatch.promql import dates, selection, signatures
from gpuwatch.promql.ast import Aggregation, Binary, Edge, Unary, ValueType
from gpuwatch.records import STALE, Labels

MINUTE = 60_000


def memory(**series):
    """One series a name, a value a minute from 0 on; None is a gap."""
    made = Memory()
    for name, values in series.items():
        for index, value in enumerate(values):
            if value is not None:
                made.add(Labels.of(name, gpu="0"), index * MINUTE, float(value))
    return made


def ask(query, querier=None, at_ms=0):
    result = promql.evaluate(promql.parse(query), querier or Memory(), at_ms).value
    return result if isinstance(result, float) else {str(labels): value for labels, value in result}


def refusal(query):
    with pytest.raises(QueryError) as caught:
        promql.parse(query)
    return caught.value


# ---- parsing


@pytest.mark.parametrize(
    ("query", "value"),
    [
        ("1 + 2 * 3", 7),
        ("2 ^ 3 ^ 2", 512),  # from the right
        ("-2 ^ 2", -4),  # a power binds more tightly than a sign
        ("2 ^ -1", 0.5),
        ("10 - 4 - 3", 3),
        ("7 % 4 * 2", 6),
        ("1 + 1 == bool 2", 1),
        ("1e3", 1000),
        ("0x1F", 31),
        ("017", 15),
        ("1_000", 1000),
        (".5", 0.5),
        ("5m", 300),
        ("1h30m", 5400),
        ("Inf", math.inf),
        ("1 / 0", math.inf),
        ("-1 / 0", -math.inf),
        ("(1 # a comment\n + 1)", 2),
    ],
)
def test_scalars_are_worked_out_as_prometheus_does(query, value):
    assert ask(query) == value


def test_a_comparison_binds_more_tightly_than_and_and_and_more_than_or():
    expr = promql.parse("a or b and c > 1")
    assert isinstance(expr, Binary)
    assert (expr.op, expr.right.op, expr.right.right.op) == ("or", "and", ">")


def test_a_sign_takes_the_whole_selector_with_its_offset():
    expr = promql.parse("-a offset 5m")
    assert isinstance(expr, Unary)
    assert expr.expr.offset_ms == 5 * MINUTE


def test_grouping_may_stand_before_or_after_what_is_grouped():
    before, after = promql.parse("sum by (gpu) (a)"), promql.parse("sum(a) by (gpu)")
    assert isinstance(before, Aggregation)
    assert before.labels == after.labels == ("gpu",)


def test_keywords_may_be_metrics_and_labels():
    assert [m.value for m in promql.parse("sum").matchers] == ["sum"]
    assert promql.parse("sum by (by, on) (offset)").labels == ("by", "on")


@pytest.mark.parametrize(
    ("query", "position", "words"),
    [
        ("", 0, "unexpected end of input"),
        ("sum(a", 5, 'expected ","'),
        ("a + ", 4, "unexpected end of input"),
        ("a{gpu=0}", 6, "a quoted value"),
        ('a{gpu=~"("}', 0, "no RE2 regex"),
        ("{}", 0, "at least one non-empty matcher"),
        ('{gpu=~".*"}', 0, "at least one non-empty matcher"),
        ("a[5m] + 1", 0, "only scalar and instant vector"),
        ("1 > 2", 2, "must use BOOL modifier"),
        ("a and 1", 2, "not allowed in binary scalar"),
        ("a + bool 1", 2, "only be used on comparison"),
        ("rate(a)", 5, "expected type range vector"),
        ("abs()", 0, "expected 1 argument(s)"),
        ("nonsense(a)", 0, "unknown function"),
        ("a[5x]", 2, "bad number or duration"),
        ("a[1s1m]", 2, "not a valid duration"),
        ("a[0s]", 2, "greater than 0"),
        ("a & b", 2, "unexpected character"),
        ("'open", 0, "does not end"),
        ("a * on (x) group_left (x) b", 2, "ON and GROUP"),
        ("a b", 2, "expected an operator or the end"),
        ("1e309", 0, "value out of range"),
        ("0x" + "f" * 99, 0, "value out of range"),
        ("0x_", 0, "bad number or duration"),
        ("a[" + "9" * 5000 + "s]", 2, "duration out of range"),
        ("a offset " + "9" * 5000, 9, "value out of range"),
    ],
)
def test_a_mistake_is_told_with_its_position(query, position, words):
    error = refusal(query)
    assert words in error.what
    assert error.position == position


@pytest.mark.parametrize(
    ("query", "position"),
    [
        ("first_over_time(a[5m])", 0),
        ("a + on (x) fill(0) b", 11),
        ("a[5m] smoothed", 6),
        ("limitk(1, a)", 0),
        ("sum(sort_by_label(a, 'gpu'))", 4),
    ],
)
def test_what_prometheus_has_behind_a_flag_is_refused_as_such(query, position):
    error = refusal(query)
    assert "experimental in Prometheus" in error.what
    assert error.position == position


@pytest.mark.parametrize(
    ("query", "position", "words"),
    [
        ("a[5m][5m:1m]", 0, "subquery is only allowed on instant vector"),
        ("1[5m:1m]", 0, "subquery is only allowed on instant vector"),
        ("a[5m:0s]", 5, "greater than 0"),
        ("a @ 1 @ 2", 6, "multiple times"),
        ("a offset 1m offset 2m", 12, "multiple times"),
        ("(a) @ 1", 4, "must be preceded by"),
        ("a @ 1e300", 4, "out of bounds"),
        ("a @ b", 4, "expected a timestamp"),
    ],
)
def test_a_mistake_in_time_is_told_with_its_position(query, position, words):
    error = refusal(query)
    assert words in error.what
    assert error.position == position


def test_time_may_be_set_and_moved_in_either_order():
    assert promql.parse("a @ 60 offset 5m").offset_ms == 5 * MINUTE
    subquery = promql.parse("a[1h:] offset -5m @ end()")
    assert (subquery.range_ms, subquery.step_ms, subquery.offset_ms) == (60 * MINUTE, None, -5 * MINUTE)
    assert subquery.at is Edge.END
    assert promql.parse("fill + start").left.matchers[0].value == "fill"


@pytest.mark.parametrize(
    "query",
    [
        "(" * 5000 + "1",
        "-" * 5000 + "1",
        "+".join(["1"] * 5000),
        "abs(" * 3000,
        "a" * 100_000,
        "1^" * 2000 + "1",
    ],
    ids=["parentheses", "signs", "a chain", "calls", "length", "powers"],
)
def test_a_hostile_expression_is_refused_and_breaks_nothing(query):
    assert isinstance(refusal(query), QueryError)


@given(st.text(alphabet="ab(){}[],=~!\"'`\\+-*/^%<> \n#019.emsx:@_offsetbyonrate", max_size=40))
def test_any_text_is_parsed_or_refused(text):
    position = 0
    try:
        promql.parse(text)
    except QueryError as error:
        position = error.position
    assert 0 <= position <= len(text)


def test_the_window_reaches_as_far_back_as_the_farthest_selector():
    assert promql.window_ms(promql.parse("a + rate(b[10m] offset 1h)")) == 70 * MINUTE
    assert promql.window_ms(promql.parse("a")) == promql.LOOKBACK_MS
    assert promql.window_ms(promql.parse("max_over_time(rate(a[2m])[1h:] offset 3m)")) == 65 * MINUTE


@pytest.mark.parametrize("name", sorted(signatures.FUNCTIONS))
def test_every_function_that_is_parsed_is_evaluated(name):
    kinds = {
        ValueType.SCALAR: "0.5",
        ValueType.STRING: "'gpu'",
        ValueType.VECTOR: "a",
        ValueType.MATRIX: "a[5m]",
    }
    args = ", ".join(kinds[kind] for kind in signatures.FUNCTIONS[name].args)
    assert ask(f"{name}({args})", memory(a=[0.5, 0.5, 0.5]), 2 * MINUTE) is not None


# ---- matchers


@pytest.mark.parametrize(
    ("op", "value", "text", "matches"),
    [
        ("=", "a", "a", True),
        ("!=", "a", "", True),
        ("=~", "a", "ab", False),  # anchored at both ends
        ("=~", "a|b", "b", True),
        ("=~", "(?i)A.c", "a\nc", True),  # a dot takes a newline too
        ("!~", "a.*", "ba", True),
        ("=~", "46|48|", "48", True),
        ("=~", "46|48|", "", True),
        ("=~", "46|48", "4", False),
        ("=~", ".*", "", True),
        ("=~", ".+", "", False),
        ("=~", "a.c|d", "abc", True),
    ],
)
def test_matchers_match_the_whole_value(op, value, text, matches):
    assert promql.Matcher("x", op, value).matches(text) is matches


# ---- selecting


def test_the_last_sample_of_five_minutes_counts_and_older_ones_do_not():
    series = memory(a=[7])
    assert ask("a", series, 5 * MINUTE - 1) == {'a{gpu="0"}': 7}
    assert ask("a", series, 5 * MINUTE) == {}  # the window is open on the left


def test_a_staleness_marker_ends_a_series_at_once_and_ranges_pass_over_it():
    series = memory(a=[1, 2, STALE])
    assert ask("a", series, 2 * MINUTE) == {}
    assert ask("count_over_time(a[5m])", series, 2 * MINUTE) == {'{gpu="0"}': 2}


def test_an_offset_looks_back_and_a_negative_one_ahead():
    series = memory(a=[1, 2, 3])
    assert ask("a offset 1m", series, 2 * MINUTE) == {'a{gpu="0"}': 2}
    assert ask("a offset -1m", series, MINUTE) == {'a{gpu="0"}': 3}


def test_nan_is_a_value_that_no_comparison_keeps():
    series = memory(a=[math.nan])
    assert len(ask("a", series)) == 1
    assert ask("a > 0 or a <= 0", series) == {}


# ---- functions


def test_a_rate_makes_up_for_a_reset_and_reaches_to_the_edges_of_its_window():
    series = memory(a=[0, 60, 120, 30, 90])
    assert ask("increase(a[4m])", series, 4 * MINUTE) == {'{gpu="0"}': pytest.approx(200)}
    assert ask("rate(a[4m])", series, 4 * MINUTE) == {'{gpu="0"}': pytest.approx(200 / 240)}


def test_a_counter_that_is_born_is_not_traced_back_below_zero():
    series = memory(a=[None, None, 1, 61, 121])
    assert ask("increase(a[10m])", series, 4 * MINUTE) == {'{gpu="0"}': pytest.approx(121)}


def test_one_sample_has_no_rate():
    assert ask("rate(a[5m])", memory(a=[1])) == {}


def test_a_line_is_followed_into_the_future():
    assert ask("predict_linear(a[5m], 60)", memory(a=[1, 2, 3]), 2 * MINUTE) == {
        '{gpu="0"}': pytest.approx(4)
    }


def test_averages_withstand_what_overflows():
    assert ask("avg_over_time(a[5m])", memory(a=[1e308, 1e308]), MINUTE) == {'{gpu="0"}': 1e308}


@pytest.mark.parametrize(
    ("query", "value"),
    [
        ("ceil(vector(-0.5))", -0.0),
        ("floor(vector(-0.0))", -0.0),
        ("clamp_min(vector(-0.0), 0)", 0.0),
        ("clamp_max(vector(0), -0.0)", -0.0),
        ("clamp_max(vector(0), 0)", 0.0),
    ],
)
def test_zeros_keep_their_sign_as_in_go(query, value):
    (result,) = ask(query).values()
    assert math.copysign(1, result) == math.copysign(1, value)
    assert result == 0


def test_absent_speaks_with_the_labels_that_were_asked_for():
    assert ask('absent(a{gpu="1", x=~"y"})') == {'{gpu="1"}': 1}
    assert ask("absent(a)", memory(a=[0])) == {}


def test_functions_drop_the_name_and_comparisons_keep_it():
    series = memory(a=[4])
    assert ask("sqrt(a)", series) == {'{gpu="0"}': 2}
    assert ask("a > 3", series) == {'a{gpu="0"}': 4}
    assert ask("a > bool 3", series) == {'{gpu="0"}': 1}


def test_a_quantile_of_a_histogram_is_interpolated():
    made = Memory()
    for le, count in (("1", 2), ("2", 4), ("+Inf", 4)):
        made.add(Labels.of("h_bucket", le=le), 0, float(count))
    assert ask("histogram_quantile(0.75, h_bucket)", made) == {"{}": 1.5}


# ---- matching


def two_gpus():
    made = Memory()
    for gpu, used, total in (("0", 1, 4), ("1", 3, 4)):
        made.add(Labels.of("used", gpu=gpu, uuid="u" + gpu), 0, float(used))
        made.add(Labels.of("total", gpu=gpu, uuid="u" + gpu), 0, float(total))
        made.add(Labels.of("process", gpu=gpu, process="p"), 0, float(used))
        made.add(Labels.of("process", gpu=gpu, process="q"), 0, 0.0)
    return made


def test_elements_with_the_same_labels_meet():
    assert ask("used / total", two_gpus()) == {'{gpu="0",uuid="u0"}': 0.25, '{gpu="1",uuid="u1"}': 0.75}


def test_many_may_meet_one_if_it_is_said():
    result = ask("process / on (gpu) group_left (uuid) total", two_gpus())
    assert result['{gpu="1",process="p",uuid="u1"}'] == 0.75
    assert len(result) == 4


def test_many_that_meet_one_unsaid_are_an_error():
    with pytest.raises(QueryError, match="many-to-one matching must be explicit"):
        ask("process / on (gpu) total", two_gpus())
    with pytest.raises(QueryError, match="many-to-many matching not allowed"):
        ask("total / on (gpu) process", two_gpus())


def test_elements_that_come_out_alike_are_an_error():
    with pytest.raises(QueryError, match="same labelset"):
        ask('{__name__=~"used|total"} * 2', two_gpus())


def test_and_or_unless_look_at_labels_only():
    series = two_gpus()
    assert list(ask("used and on (gpu) (process > 1)", series)) == ['used{gpu="1",uuid="u1"}']
    assert list(ask("used unless on (gpu) (process > 1)", series)) == ['used{gpu="0",uuid="u0"}']
    assert len(ask("used or total", series)) == 2  # the name is no label to tell them apart


def test_topk_keeps_elements_whole():
    assert ask("topk(1, used)", two_gpus()) == {'used{gpu="1",uuid="u1"}': 3}


WORDS = st.text(alphabet="ab|0-:/ ", max_size=12)


@given(WORDS, st.text(alphabet="ab|0-:/ ", max_size=4))
def test_words_to_choose_from_match_as_the_regex_does(pattern, text):
    assert selection.test_of(pattern)(text) == (selection.regex(pattern).fullmatch(text) is not None)


# ---- other times


def test_at_asks_for_one_instant_whenever_it_is_asked():
    series = memory(a=range(10))
    for minute in (0, 4, 9):
        assert ask("a @ 180", series, minute * MINUTE) == {'a{gpu="0"}': 3}
        assert ask("a @ 180 offset 1m", series, minute * MINUTE) == {'a{gpu="0"}': 2}
        assert ask("sum_over_time(a[2m] @ 180)", series, minute * MINUTE) == {'{gpu="0"}': 5}


def test_start_and_end_are_those_of_the_whole_query():
    answer = over("a @ end() - a @ start() + 0 * a", memory(a=range(10)), range(2, 9, 3))
    assert answer == {'{gpu="0"}': [(2, 6), (5, 6), (8, 6)]}


def test_a_subquery_asks_at_the_multiples_of_its_step_in_a_window_open_to_the_left():
    series = memory(a=range(10))
    at_ms = 9 * MINUTE + 30_000
    assert ask("count_over_time(a[4m:1m])", series, at_ms) == {'{gpu="0"}': 4}  # at 6, 7, 8 and 9 minutes
    assert ask("sum_over_time(a[4m:2m])", series, at_ms) == {'{gpu="0"}': 14}  # at 6 and 8
    assert ask("sum_over_time(a[4m:2m] offset 1m)", series, 9 * MINUTE) == {'{gpu="0"}': 14}
    assert ask("max_over_time(rate(a[2m])[6m:1m] @ 540)", series) == {'{gpu="0"}': pytest.approx(1 / 60)}


def test_a_subquery_without_a_step_takes_the_evaluation_interval():
    limits = promql.Limits(subquery_step_ms=2 * MINUTE)
    answer = promql.evaluate(promql.parse("count_over_time(a[6m:])"), memory(a=range(10)), 9 * MINUTE, limits)
    assert answer.value == [(Labels.of(gpu="0"), 3)]


def test_a_range_vector_is_answered_with_its_samples():
    (series,) = promql.evaluate(promql.parse("a[2m]"), memory(a=[1, 2, STALE, 4]), 3 * MINUTE).value
    assert (list(series.at_ms), list(series.values)) == ([3 * MINUTE], [4])


def test_a_text_is_a_text():
    assert promql.evaluate(promql.parse("('a')"), Memory(), 0).value == "a"


# ---- range queries


def over(query, querier, minutes):
    """A range query at these minutes: the points of each series, (minute, value)."""
    first, last = minutes[0] * MINUTE, minutes[-1] * MINUTE
    answer = promql.evaluate_range(promql.parse(query), querier, first, last, minutes.step * MINUTE)
    return {
        str(s.labels): [(at_ms // MINUTE, value) for at_ms, value in zip(s.at_ms, s.values, strict=True)]
        for s in answer.value
    }


QUERIES = (
    "a",
    "rate(a[3m])",
    "a offset 2m > 3",
    "sum_over_time(rate(a[2m])[4m:1m])",
    "a @ 300 + b",
    "timestamp(a)",
    "absent(b)",
    "topk(1, {gpu='0'})",
    "time() * 2",
)


@pytest.mark.parametrize("query", QUERIES)
def test_a_range_query_is_an_instant_query_at_each_step(query):
    series = memory(a=range(20), b=[None, 3, None, None, None, None, None, None, 7])
    expected = {}
    for minute in range(0, 18, 2):
        result = ask(query, series, minute * MINUTE)
        for labels, value in result.items() if isinstance(result, dict) else [("{}", result)]:
            expected.setdefault(labels, []).append((minute, value))
    assert over(query, series, range(0, 18, 2)) == expected


def test_a_long_query_reads_in_parts_and_each_sample_of_a_dense_one_about_once():
    class Counting(Memory):
        asked = ()

        def select(self, matchers, after_ms, upto_ms):
            self.asked = (*self.asked, (after_ms, upto_ms))
            return super().select(matchers, after_ms, upto_ms)

    hours = 48
    series = Counting()
    for minute in range(hours * 60):
        series.add(Labels.of("a"), minute * MINUTE, float(minute))
    points = over("a", series, range(hours * 60))
    assert points == {"a": [(minute, minute) for minute in range(hours * 60)]}
    assert len(series.asked) > 4
    assert sum(upto_ms - after_ms for after_ms, upto_ms in series.asked) < 1.1 * hours * 60 * MINUTE


def test_only_scalars_and_instant_vectors_have_a_range_query():
    for query in ("a[5m]", "'text'"):
        with pytest.raises(QueryError, match="must be Scalar or instant Vector"):
            over(query, Memory(), range(2))


# ---- remarks


@pytest.mark.parametrize(
    ("query", "warnings", "infos"),
    [
        ("rate(a_total[5m])", [], []),
        (
            "1 +\n rate(a[5m])",
            [],
            [
                (
                    "PromQL info: metric might not be a counter, name does not end in "
                    '_total/_sum/_count/_bucket: "a" (2:7)'
                )
            ],
        ),
        (
            "quantile(-1, a)",
            ["PromQL warning: quantile value should be between 0 and 1, got -1 (1:10)"],
            [],
        ),
        (
            "quantile(12345678.9, a)",
            ["PromQL warning: quantile value should be between 0 and 1, got 1.23456789e+07 (1:10)"],
            [],
        ),
        (
            "histogram_quantile(0.5, a)",
            [
                (
                    'PromQL warning: bucket label "le" is missing or has a malformed value of "" '
                    'for metric name "a" (1:25)'
                )
            ],
            [],
        ),
    ],
)
def test_what_is_doubtful_is_remarked_with_its_place(query, warnings, infos):
    answer = promql.evaluate(promql.parse(query), memory(a=[1, 2], a_total=[1, 2]), MINUTE)
    assert [remark.located(query) for remark in answer.warnings] == warnings
    assert [remark.located(query) for remark in answer.infos] == infos


def test_buckets_that_fall_are_repaired_and_that_is_told_once_for_all_steps():
    made = Memory()
    for le, count in (("1", 4), ("2", 2), ("+Inf", 8)):
        for minute in range(3):
            made.add(Labels.of("h_bucket", le=le), minute * MINUTE, float(count))
    expr = promql.parse("histogram_quantile(0.5, h_bucket)")
    answer = promql.evaluate_range(expr, made, 0, 2 * MINUTE, MINUTE)
    assert list(answer.value[0].values) == [1, 1, 1]
    (info,) = answer.infos
    assert info.endswith('#histogram_quantile) for metric name "h_bucket"')
    assert info.detail == (
        ", from buckets 2 to 2, with a max diff of 2, over 3 samples "
        "from 1970-01-01T00:00:00Z to 1970-01-01T00:02:00Z"
    )


@pytest.mark.parametrize(
    ("replacement", "expected"),
    [("$1", "b"), ("${2}x", "cx"), ("$01", ""), ("$3", ""), ("$" + "9" * 5000, ""), ("$$1", "$1")],
)
def test_a_replacement_names_groups_as_in_go(replacement, expected):
    made = Memory()
    made.add(Labels.of("a", source="bc"), 0, 1.0)
    query = f'label_replace(a, "made", "{replacement}", "source", "(b)(c)")'
    [(labels, _)] = promql.evaluate(promql.parse(query), made, 0).value
    assert labels.get("made") == expected


def test_sorting_a_range_query_is_remarked():
    answer = promql.evaluate_range(promql.parse("sort(a)"), memory(a=[1, 2]), 0, MINUTE, MINUTE)
    assert "sort is ineffective for range queries" in answer.warnings[0]


# ---- limits


@pytest.mark.parametrize(
    "query", ["sum_over_time(a[10m])", "sum_over_time(a[10m:1s])", "count_over_time(a[10y:1ms])"]
)
def test_a_query_that_takes_too_many_samples_is_refused(query):
    limits = promql.Limits(samples=5)
    with pytest.raises(QueryError, match="more than 5 samples"):
        promql.evaluate(promql.parse(query), memory(a=range(10)), 9 * MINUTE, limits)


def test_a_query_that_takes_too_long_is_refused():
    asked = iter(range(100))
    limits = promql.Limits(is_over=lambda: next(asked) == 50)
    with pytest.raises(QueryError, match="takes too long"):
        promql.evaluate(
            promql.parse("sum_over_time((a + 1)[5h:1s])"), memory(a=range(10)), 9 * MINUTE, limits
        )


# ---- dates


@given(st.integers(min_value=-62_135_596_800, max_value=253_402_300_799))
def test_dates_are_those_of_the_calendar(seconds):
    at = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(seconds=seconds)
    expected = {
        "minute": at.minute,
        "hour": at.hour,
        "day_of_week": at.isoweekday() % 7,
        "day_of_month": at.day,
        "day_of_year": at.timetuple().tm_yday,
        "days_in_month": calendar.monthrange(at.year, at.month)[1],
        "month": at.month,
        "year": at.year,
    }
    assert {name: part(float(seconds)) for name, part in dates.PARTS.items()} == expected
