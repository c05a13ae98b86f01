"""Whatever is asked: an answer, or a QueryError that says why, in bounded time and memory."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conformance import rule_files

from gpuwatch import promql
from gpuwatch.errors import QueryError
from gpuwatch.records import STALE, Labels

WITHIN_S = 20  # of wall time: what takes longer hangs
ASKER = """
import json, math, resource, sys, time
from gpuwatch import promql
from gpuwatch.errors import QueryError
from gpuwatch.records import Labels

HELD = list(range(0, 3_600_000, 15_000))

class Host:
    '''Three series of an hour, one of their labels a text that backtracking regexes choke on.'''

    def select(self, matchers, after_ms, upto_ms):
        made = [Labels.of("a", gpu=str(i), x="a" * 50 + "!" * i) for i in range(3)]
        found = [one for one in made if all(m.matches(one.get(m.name)) for m in matchers)]
        at_ms = [at for at in HELD if after_ms < at <= upto_ms]
        return [promql.Series(one, at_ms, [at / 1e6 for at in at_ms]) for one in found if at_ms]

class Vast:
    '''Sixty million samples in sixty series, which share the memory of one.'''

    def select(self, matchers, after_ms, upto_ms):
        at_ms, values = range(0, 3_600_000, 3), list(map(float, range(1_200_000)))
        return [promql.Series(Labels.of("a", gpu=str(i)), at_ms, values) for i in range(60)]

text, querier, instants_ms = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_AS, (768 * 2**20,) * 2)
over_s = time.monotonic() + 1
limits = promql.Limits(is_over=lambda: time.monotonic() > over_s)
evaluate = promql.evaluate if len(instants_ms) == 1 else promql.evaluate_range
try:
    answer = evaluate(promql.parse(text), {"host": Host, "vast": Vast}[querier](), *instants_ms, limits)
    print(json.dumps(["answered", repr(answer.value)[:200]]))
except QueryError as error:
    print(json.dumps(["refused", str(error)]))
"""


def ask(text, querier="host", instants_ms=(3_600_000,)):
    """What a process of its own, of 768 MiB at most, makes of a query that may take a second."""
    done = subprocess.run(
        [sys.executable, "-c", ASKER],
        input=json.dumps([text, querier, instants_ms]),
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcome, said = json.loads(done.stdout)
    return outcome, said


def replaced(times):
    """A label that grows to twice its length each time."""
    text = "a"
    for _ in range(times):
        text = f'label_replace({text}, "x", "$1$1", "x", "(.*)")'
    return text


def joined(times):
    text = "a"
    for _ in range(times):
        text = f'label_join({text}, "x", "", "x", "x", "x", "x")'
    return text


def nested(opening, inner, closing, times):
    return opening * times + inner + closing * times


REFUSED = {
    "parentheses": nested("(", "1", ")", 10_000),
    "open parentheses": "(" * 10_000,
    "signs": "-" * 10_000 + "1",
    "signs in parentheses": nested("-(", "a", ")", 10_000),
    "a chain of sums": "+".join(["1"] * 10_000),
    "a chain of powers": "^".join(["1"] * 10_000),
    "a chain of ors": " or ".join(["a"] * 10_000),
    "calls": nested("abs(", "a", ")", 10_000),
    "aggregations": nested("sum by (gpu) (", "a", ")", 10_000),
    "subqueries": "a" + "[1h:1m]" * 10_000,
    "subqueries of calls": nested("max_over_time(", "a", "[1h:1m])", 10_000),
    "a long name": "a" * 1_000_000,
    "a long text": '"' + "a" * 1_000_000 + '"',
    "a long list of labels": f"sum by ({','.join(['gpu'] * 250_000)}) (a)",
    "a long list of matchers": "a{" + ",".join(['x="a"'] * 200_000) + "}",
    "a long space": " " * 1_000_000 + "a",
    "a long comment": "#" * 1_000_000 + "\na",
    "a subquery of ten years by the millisecond": "max_over_time(a[10y:1ms])",
    "steps that multiply": nested("max_over_time(", "a", "[1d:1s])", 6),
    "a regex that repeats a repetition": 'a{x=~"((a{1000}){1000}){1000}"}',
    "a regex that is none": 'a{x=~"(a+"}',
    "a regex that looks back": r'a{x=~"(a)\\1"}',
    "a range of digits": f"a[{'9' * 5_000}s]",
    "an offset of digits": f"a offset {'9' * 5_000}s",
    "a range beyond 64 bits": "a[99999999999y]",
    "an offset beyond 64 bits": "a offset 99999999999y",
    "an instant beyond 64 bits": "a @ 1e300",
    "an instant before them": "a @ -1e300",
    "an instant that is none": "a @ NaN",
    "a range that never ends": "a[Inf]",
    "labels that double": replaced(60),
    "labels that quadruple": joined(40),
    "labels out of a long pattern": f'label_replace(a, "x", "{"$1" * 100_000}", "x", "(.*)")',
    "a number of digits": "9" * 5_000,
    "a hexadecimal number of digits": "0x" + "f" * 5_000,
    "an exponent of digits": "1e" + "9" * 5_000,
    "a lone surrogate": "a\ud800",
    "a lone surrogate in a value": 'a{x="\ud800"}',
    "a lone surrogate in a regex": 'a{x=~"\ud800("}',
    "a NUL": "a\0",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused_with_the_reason(name):
    outcome, said = ask(REFUSED[name])
    assert outcome == "refused"
    assert 10 < len(said) < 500


ANSWERED = {
    "a regex that backtracks": 'a{x=~"(a+)+$"}',
    "a regex that cannot match": 'a{x!~"(a|aa)+b", gpu=~"(.*)*(.*)*1"}',
    "a NUL in a value": 'a{x="\\x00"} or count_values("x", a)',
    "a label a value": 'count_values("gpu", a)',
    "each instant of an hour": 'count(count_values("x", count_over_time(a[1h:15s])))',
    "more than there are": "topk(1e300, a) or bottomk(1e300, a)",
    "none of them": "topk(-1e300, a)",
    "powers beyond all numbers": "10 ^ 308 * 10 + 2 ^ 1e308 + 0 ^ -1 + (-8) ^ 0.5",
    "divisions by nothing": "1 / 0 + 1 % 0 + Inf % 2 + -Inf % 0",
    "numbers of many digits": "9" * 300 + " + 0." + "9" * 5_000 + " + 0x7" + "f" * 15 + " + 1e-999999999",
    "functions beyond their domains": "exp(vector(1e9)) + cosh(vector(1e9)) + ln(vector(-1))"
    " + sqrt(vector(-1)) + acosh(vector(0)) + atanh(vector(2)) + asin(vector(2)) + log2(vector(0))"
    " + log10(vector(-0)) + sin(vector(Inf)) + tan(vector(-Inf))",
    "days of no year": "year(vector(1e300)) + month(vector(-1e300)) + hour(vector(NaN))"
    " + day_of_week(vector(Inf)) + days_in_month(vector(1e18)) + day_of_year(vector(-1e18))"
    " + minute(vector(9e15))",
    "quantiles beyond them": "quantile(1e300, a) + quantile_over_time(-Inf, a[1h]) + quantile(NaN, a)",
    "rounding to next to nothing": "round(a, 5e-324) + round(a, 1e308) + round(a, 0) + clamp(a, NaN, Inf)",
    "far away": "a offset 200y or a offset -200y or a @ 1e12 or predict_linear(a[1h], 1e308)",
}


@pytest.mark.parametrize("name", ANSWERED)
def test_what_is_odd_and_can_be_meant_is_answered(name):
    outcome, said = ask(ANSWERED[name])
    assert outcome == "answered", said


@pytest.mark.parametrize("query", ["a[1h]", "sum_over_time(a[1h])", "quantile_over_time(0.5, a[1h]) + 1"])
def test_a_query_over_sixty_million_samples_is_refused(query):
    outcome, said = ask(query, "vast")
    assert outcome == "refused"
    assert "50000000 samples" in said


@pytest.mark.parametrize(
    "query", ["1", "a", "rate(a[5m])", 'a or label_replace(a, "x", "$1", "gpu", "(.*)")']
)
def test_a_range_of_ten_years_by_the_millisecond_is_refused(query):
    outcome, said = ask(query, instants_ms=(0, 315_360_000_000, 1))
    assert outcome == "refused"
    assert 10 < len(said) < 500


# ---- tokens in any order


WORDS = """
    a gpu x sum avg count min max topk bottomk quantile count_values stddev by without on ignoring group_left
    group_right bool and or unless atan2 offset @ start() end() rate increase delta abs absent clamp scalar
    vector time() timestamp label_replace label_join histogram_quantile predict_linear sort
    round avg_over_time
    ( ) ( ) { } [ ] [5m] [1h:5m] [1h:] , = != =~ !~ == > < >= <= + - * / % ^ : . "x" "gpu" "(.*)" "$1" 'a'
    0 1 2.5 1e3 0x1f Inf NaN 5m 1h30m .5 -1 # ; ! ~ & | \\ \n \t é \0
""".split(" ")
SOUP = st.lists(st.sampled_from([word.strip("\n") or " " for word in WORDS]), max_size=25).map(" ".join)
CALLS = "abs ceil exp ln sqrt sgn absent sort count sum avg max stddev group scalar timestamp".split()
RANGES = "rate increase delta irate changes resets deriv avg_over_time max_over_time count_over_time".split()


def calls(inner):
    vector = st.builds("{}({})".format, st.sampled_from(CALLS), inner)
    over = st.builds(
        "{}(({})[{}])".format, st.sampled_from(RANGES), inner, st.sampled_from(("1h:", "10m:30s"))
    )
    signs = st.sampled_from("+ - * / % ^ == != > < and or unless atan2".split())
    return vector | over | st.builds("({}) {} ({})".format, inner, signs, inner)


SENSE = st.recursive(
    st.sampled_from(
        ['a{gpu!="1"}', "a offset 5m", "a @ 1800", "1", "NaN", "rate(a[5m])", "vector(0)", "time()"]
    ),
    calls,
)


class Hour:
    """Two series with a gap, a NaN, an infinity and a marker."""

    def select(self, matchers, after_ms, upto_ms):
        found = []
        for gpu, values in (("0", [1.0, float("nan"), 3.0, STALE]), ("1", [0.0, float("inf"), -1.0, 5e-324])):
            labels = Labels.of("a", gpu=gpu)
            kept = [
                (at, values[at // 60_000 % 4])
                for at in range(0, 3_600_000, 60_000)
                if after_ms < at <= upto_ms
            ]
            if kept and all(m.matches(labels.get(m.name)) for m in matchers):
                found.append(promql.Series(labels, [at for at, _ in kept], [value for _, value in kept]))
        return found


def refusal(text):
    """None if it is answered, at an instant and over a range."""
    try:
        expr = promql.parse(text)
        promql.evaluate(expr, Hour(), 3_600_000)
        promql.evaluate_range(expr, Hour(), 3_000_000, 3_600_000, 60_000)
    except QueryError as error:
        return error
    return None


def says_where(error, text):
    return error is None or (str(error) and 0 <= error.position <= len(text))


@settings(max_examples=500)
@given(SOUP)
def test_words_in_any_order_are_answered_or_refused(text):
    assert says_where(refusal(text), text)


@settings(max_examples=300)
@given(st.text(max_size=60))
def test_any_text_is_answered_or_refused(text):
    assert says_where(refusal(text), text)


@settings(max_examples=300)
@given(SENSE)
def test_what_makes_sense_is_answered_or_refused(text):
    assert says_where(refusal(text), text)


# ---- what people wrote


def refused(paths):
    """Those of their expressions that are, and how many there are."""
    texts = rule_files.expressions(paths)
    return [text for text in texts if not parses(text)], len(texts)


def parses(text):
    try:
        promql.parse(text)
    except QueryError:
        return False
    return True


def test_every_shipped_rule_is_parsed():
    texts, count = refused(rule_files.ours())
    assert texts == []
    assert count > 10


@pytest.mark.shared
@pytest.mark.skipif(not rule_files.packs(), reason="there are no rule packs beside the project")
def test_every_rule_of_the_packs_is_parsed():
    texts, count = refused(rule_files.packs())
    assert texts == []
    assert count > 300
