"""PromQL: what is parsed, what is refused and where, what comes out; against Prometheus' own scripts too."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conformance_engine import engine
from tests.promtool import Memory

from gpuwatch import promql
from gpuwatch.errors import QueryError
from gpuwatch.promql import functions, ranges, signatures
from gpuwatch.promql.ast import Aggregation, Binary, Unary
from gpuwatch.records import STALE, Labels

SCRIPTS = Path(__file__).parents[3] / "shared/conformance/promql"
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
    ],
)
def test_a_mistake_is_told_with_its_position(query, position, words):
    error = refusal(query)
    assert words in error.what
    assert error.position == position


@pytest.mark.parametrize(
    ("query", "position"),
    [("a[5m:1m]", 1), ("a @ 5", 2), ("sin(a)", 0), ("histogram_fraction(0, 1, a)", 0)],
)
def test_promql_beyond_the_subset_is_refused_as_such(query, position):
    error = refusal(query)
    assert "is PromQL" in error.what or "are PromQL" in error.what
    assert error.position == position


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


def test_every_function_that_is_known_is_there():
    special = {"time", "timestamp", "absent", "absent_over_time"}
    assert set(signatures.FUNCTIONS) == set(functions.FUNCTIONS) | set(ranges.RANGES) | special


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


# ---- Prometheus' own scripts


@pytest.mark.shared
@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("data/*.test")), ids=lambda path: path.stem)
def test_prometheus_own_cases_come_out_the_same(path):
    spec = importlib.util.spec_from_file_location("promqltest_runner", SCRIPTS / "runner.py")
    runner = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = runner  # its dataclasses look themselves up
    spec.loader.exec_module(runner)
    under_test = engine(runner)()
    commands = runner.parse_file(str(path))
    for command in commands:
        if isinstance(command, runner.Eval):  # annotations are not made yet
            annotations = {"warn", "info", "no_warn", "no_info"}
            command.expects = [e for e in command.expects if e.kind not in annotations]
    outcomes = runner.run_commands(commands, under_test, needs_ok=runner.missing_capabilities(under_test))
    failed = [f"{o.case.case_id}: {o.reason}" for o in outcomes if o.status == "fail"]
    assert [what for what in failed if "gpuwatch does not have" not in what] == []
