"""Random expressions over five made-up metrics that make sense to Prometheus 2 and 3 alike.

Left out, because the two differ by intention: results that keep a name for a while (`label_replace` of
`__name__`, `or` of two metrics), native histograms, experiments. What version 2.42 has otherwise: `atan2` of
a vector and a number keeps the name, `predict_linear` of a window with `@` gives the first step of a range
alone, the deviation of one infinity is 0. What both have wrong: `timestamp` of a selector with `@` heeds no
offset. What makes much of the last digit is asked of samples alone: steps, waves, rests, changes, deviations.
"""

from tests.conformance.made_up import PAST_MS, START_MS

GAUGES = ("temperature", "power")
COUNTERS = ("requests_total", "tokens_total")
BUCKETS = ("latency_bucket",)
LABELS = ("gpu", "job")
OVER_COUNTERS = "rate increase irate resets changes".split()
OVER_ANY = "avg_over_time min_over_time max_over_time sum_over_time count_over_time last_over_time".split()
OVER_GAUGES = """avg_over_time min_over_time max_over_time sum_over_time count_over_time last_over_time
    stddev_over_time stdvar_over_time present_over_time delta idelta deriv changes""".split()
OF_NUMBERS = (
    "abs({}) sort({}) deg({}) rad({}) clamp({},-5,50) clamp_min({},3) clamp_max({},4) sqrt(abs({}))".split()
)
OF_SAMPLES = "ceil floor round sgn sin cos tan atan sinh exp ln log2 log10".split()
AGGREGATIONS = "sum avg min max count group".split()
ARITHMETIC = "+ - * / ^".split()
COMPARISONS = "== != > < >= <=".split()
WAYS = """leaf call over_subquery aggregation aggregation ranked with_number pair pair many_to_one mismatched
    either both of_samples relabelled quantile deviation rest absent signed time_of""".split()
GROUPINGS = ("", "by (gpu)", "by (job)", "by (gpu, job)", "without (gpu)", "by ()", "without ()")
MATCHERS = ("", '{gpu="gpu-0"}', '{gpu=~"gpu-.*"}', '{gpu!="gpu-1"}', '{gpu!~".*0"}', '{job=~"job-(0|1)"}')
PHIS = (-1, 0, 0.1, 0.5, 0.9, 0.99, 1, 2)


class Expressions:
    """An endless choice of texts."""

    def __init__(self, dice):
        self._dice = dice
        self.pick = dice.choice

    def one(self):
        kind = self.pick((self.vector, self.vector, self.vector, self.number))
        return kind(self._dice.randrange(1, 4))

    def vector(self, depth):
        if depth <= 0:
            return self.leaf()
        return getattr(self, self.pick(WAYS))(depth - 1)

    # ---- what reads samples

    def leaf(self, _=0):
        return self.pick((self.selector, self.over_counter, self.over_gauge))()

    def selector(self, metrics=GAUGES + COUNTERS):
        return self.pick(metrics) + self.matchers() + self.time_shift()

    def over_counter(self):
        window = f"{self.pick(COUNTERS)}{self.matchers()}[{self.span()}]{self.time_shift()}"
        return f"{self.pick(OVER_COUNTERS)}({window})"

    def over_gauge(self):
        window = f"{self.pick(GAUGES)}{self.matchers()}[{self.span()}]"
        kind = self._dice.randrange(8)
        if kind == 0:
            return f"quantile_over_time({self.pick(PHIS)}, {window}{self.time_shift()})"
        if kind == 1:
            return f"predict_linear({window} offset 1m, {self._dice.randrange(60, 7200)})"
        return f"{self.pick(OVER_GAUGES)}({window}{self.time_shift()})"

    def over_subquery(self, depth):
        """Its range is no multiple of its step, so that no step falls on the edge that version 3 opened."""
        inner = self.pick((self.leaf, self.grouped_leaf, self.over_subquery if depth > 0 else self.leaf))(
            depth - 1
        )
        step = self.pick((30, 60, 120, 300))
        span = step * self._dice.randrange(2, 12) + self.pick((11, 13, 17))
        step_text = self.pick((f"{step}s", ""))
        return f"{self.pick(OVER_ANY)}(({inner})[{span}s:{step_text}]{self.time_shift()})"

    def grouped_leaf(self, _):
        return self.grouped(self.pick(LABELS), 0)

    def matchers(self):
        gpu = self.pick(
            ('gpu="gpu-0"', 'gpu=~"gpu-.*"', 'gpu!="gpu-1"', 'gpu!~".*0"', 'job=~"job-(0|1)"', "")
        )
        return f"{{{gpu}}}" if gpu else ""

    def span(self):
        return self.pick(("90s", "2m", "5m", "10m", "31m", "1h"))

    def time_shift(self):
        """An offset, an @, both in either order, mostly neither."""
        offset = f" offset {self.pick(('1m', '5m', '23m', '-2m', '1h', '14s'))}"
        at_s = START_MS // 1000 + 60 * self._dice.randrange(20, 110) + PAST_MS // 1000
        pinned = f" @ {self.pick((at_s, 'start()', 'end()'))}"
        return self.pick(("",) * 12 + (offset, offset, pinned, offset + pinned, pinned + offset))

    # ---- what is made of vectors

    def call(self, depth):
        return self.pick(OF_NUMBERS).format(self.vector(depth))

    def of_samples(self, _):
        return f"{self.pick(OF_SAMPLES)}({self.selector(GAUGES)})"

    def aggregation(self, depth):
        return f"{self.pick(AGGREGATIONS)} {self.pick(GROUPINGS)} ({self.vector(depth)})"

    def ranked(self, _):
        """Over values of which no two are the same, for either of two equals may be picked."""
        walking = f"{self.pick(GAUGES)}{self.matchers()}"
        kind = self.pick(("topk", "bottomk", "quantile", "count_values"))
        if kind == "quantile":
            return f"quantile {self.pick(GROUPINGS)} ({self.pick((0, 0.3, 0.5, 0.9, 1))}, {walking})"
        if kind == "count_values":
            return f'count_values {self.pick(GROUPINGS)} ("value", changes({walking}[10m]))'
        return f"{kind} {self.pick(GROUPINGS)} ({self._dice.randrange(0, 4)}, {walking})"

    def with_number(self, depth):
        sides = [self.vector(depth), self.number(0)]
        self._dice.shuffle(sides)
        return self.operator(*sides, "")

    def pair(self, depth):
        """One to one, for both sides have one element a group."""
        labels = self.pick(("gpu", "job", "gpu, job"))
        left, right = (f"{self.pick(AGGREGATIONS)} by ({labels}) ({self.vector(depth)})" for _ in "lr")
        return self.operator(left, right, self.pick(("", f"on ({labels})")))

    def grouped(self, labels, depth):
        return f"{self.pick(AGGREGATIONS)} by ({labels}) ({self.vector(depth)})"

    def many_to_one(self, depth):
        one = self.grouped("gpu", depth)
        many = self.selector(GAUGES)
        if self._dice.random() < 0.5:
            return self.operator(many, one, "on (gpu) group_left ()")
        return self.operator(one, many, "ignoring (job) group_right ()")

    def mismatched(self, _):
        """Refused, unless the matchers leave one element a group."""
        side = self.pick(("", "group_left ()", "group_right ()"))
        return f"{self.selector()} {self.pick(ARITHMETIC)} on (gpu) {side} {self.selector()}"

    def operator(self, left, right, matching):
        if self._dice.random() < 0.6:
            return f"({left}) {self.pick(ARITHMETIC)} {matching} ({right})"
        compared = self.pick(COMPARISONS) + self.pick(("", " bool"))
        return f"({left}) {compared} {matching} ({right})"

    def either(self, depth):
        """Of sides without a name: where one may stand for the other, both would be called the same later."""
        labels = self.pick(("gpu", "gpu, job"))
        return f"({self.grouped(labels, depth)}) or ({self.grouped(labels, depth)})"

    def both(self, depth):
        matching = self.pick(("", "on (gpu)", "ignoring (gpu)"))
        return f"({self.vector(depth)}) {self.pick(('and', 'unless'))} {matching} ({self.vector(depth)})"

    def relabelled(self, depth):
        inner = self.vector(depth)
        return self.pick(
            (
                f'label_replace({inner}, "n", "$1", "gpu", "gpu-(.*)")',
                f'label_replace({inner}, "gpu", "", "job", "job-0")',
                f'label_join({inner}, "both", "-", "gpu", "job")',
            )
        )

    def quantile(self, _):
        by = self.pick(("by (le)", "by (le, gpu)", "without (job)"))
        buckets = f"{self.pick(('rate', 'increase'))}({BUCKETS[0]}{self.matchers()}[{self.span()}])"
        return f"histogram_quantile({self.pick(PHIS)}, sum {by} ({buckets}))"

    def deviation(self, _):
        return f"{self.pick(('stddev', 'stdvar'))} {self.pick(GROUPINGS)} ({self.selector()})"

    def rest(self, _):
        return f"{self.selector()} % {self.pick((2, 0.7, -3, 0))}"

    def absent(self, _):
        return self.pick(
            (
                'absent(nothing{gpu="7"})',
                f"absent({self.selector(GAUGES)})",
                f'absent_over_time(nothing{{job="x"}}[{self.span()}])',
            )
        )

    def signed(self, depth):
        return f"-({self.vector(depth)})"

    def time_of(self, _):
        return self.pick(
            (
                f"timestamp({self.pick(GAUGES)} offset 1m)",
                f"timestamp({self.pick(COUNTERS)} @ end())",
                f"hour({self.selector()} * 100)",
                "minute()",
                "vector(time())",
            )
        )

    # ---- numbers

    def number(self, depth):
        literal = str(self.pick((0, 1, 2, 0.5, -3, 7.25, 40)))
        if depth <= 0 or self._dice.random() < 0.6:
            return literal
        inner = self.vector(depth - 1)
        return self.pick((f"scalar({inner})", f"scalar(sum({inner})) / 3", "time() / 60", "pi()"))
