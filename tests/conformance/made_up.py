"""Made-up series that given expressions find something in, the same for the same dice.

Two things keep Prometheus 2 and 3 from differing over them by the edges of windows, which version 3 opened on
the left: no sample is stamped at a full second, and expressions are asked 7 s past a full minute. A third
keeps them from differing over how far a young counter reaches back: no counter ever comes near zero.
"""

import itertools
import re
from dataclasses import dataclass, field

from gpuwatch.promql.ast import Aggregation, Binary, Call, MatrixSelector, NumberLiteral, VectorSelector, walk
from gpuwatch.records import STALE, Labels, Scrape

START_MS = 1_700_000_000_000 // 3_600_000 * 3_600_000
MINUTE_MS = 60_000
STEP_MS = 30_000
STEPS = 240  # two hours
PAST_MS = 7_000
TARGETS = 6
MOST_OF_A_METRIC = 24
BOUNDS = ("0.1", "0.5", "1", "2.5", "+Inf")
COUNTERS = frozenset("rate increase irate resets".split())
FLOOR = 1e5  # more than grows in two hours, and not so much more that a deviation drowns in rounding


@dataclass
class Wanted:
    """What the expressions expect of one metric: its series, the numbers it is compared with, its kind."""

    series: dict = field(default_factory=dict)  # in the order found
    numbers: set = field(default_factory=set)
    is_counter: bool = False
    is_ranked: bool = False  # by topk or bottomk, which pick either of two equals


def wanted(trees):
    """By metric."""
    found = {}
    for tree in trees:
        nodes = [node for node, _ in walk(tree)]
        mentioned = labels_mentioned(nodes)
        numbers = {node.value for node in nodes if isinstance(node, NumberLiteral)}
        counted = {id(window.selector) for window in windows_of_counters(nodes)}
        is_ranked = any(isinstance(n, Aggregation) and n.op in {"topk", "bottomk"} for n in nodes)
        for node in nodes:
            metric = isinstance(node, VectorSelector) and metric_of(node)
            if not metric:
                continue
            one = found.setdefault(metric, Wanted())
            one.is_counter |= id(node) in counted or metric.endswith("_bucket")
            one.is_ranked |= is_ranked
            one.numbers |= numbers
            for labels in series_of(node, metric, mentioned):
                if len(one.series) < MOST_OF_A_METRIC:
                    one.series.setdefault(labels)
    return found


def labels_mentioned(nodes):
    found = []
    for node in nodes:
        if isinstance(node, Aggregation):
            found += node.labels
        elif isinstance(node, Binary):
            found += (*node.matching.labels, *node.matching.include)
    return list(dict.fromkeys(name for name in found if name not in {"le", "__name__"}))


def windows_of_counters(nodes):
    calls = (node for node in nodes if isinstance(node, Call) and node.function in COUNTERS)
    return [arg for call in calls for arg in call.args if isinstance(arg, MatrixSelector)]


def metric_of(selector):
    """Its name; an example of one where it is a regex."""
    return next((example(m) for m in selector.matchers if m.name == "__name__"), None)


def series_of(selector, metric, mentioned):
    """What it selects, twice over for up to three of the labels that the expression mentions."""
    fixed = {m.name: example(m) for m in selector.matchers if m.name != "__name__"}
    le = ["le"] if metric.endswith("_bucket") else []
    free = [name for name in mentioned if name not in fixed][:3]
    pools = [*([f"{name}-{i}" for i in range(2)] for name in free), *(BOUNDS for _ in le)]
    for values in itertools.product(*pools):
        yield Labels.of(metric, **{**fixed, **dict(zip([*free, *le], values, strict=True))})


def example(matcher):
    """A value that a matcher accepts; empty if none is found."""
    if matcher.op == "=":
        return matcher.value
    parts = [re.sub(r"\.[+*]|\[[^]]*\][+*]?", "v", part.strip("^$()")) for part in matcher.value.split("|")]
    candidates = ["v", *parts, *(part.replace(".", "0").replace("\\", "") for part in parts), "eth0", "500"]
    return next((text for text in candidates if matcher.matches(text)), "")


# ---- samples


def scrapes(found, dice):
    """Two hours of scrapes of all these metrics in order of time."""
    targets = [f"target-{number}" for number in range(TARGETS)]
    columns = {target: [] for target in targets}
    for metric, one in sorted(found.items()):
        columns[dice.choice(targets)] += made(metric, one, dice)
    stamped = [
        scrape for target in targets for scrape in of_target(target, columns[target], dice) if scrape.values
    ]
    return sorted(stamped, key=lambda scrape: scrape.at_ms)


def of_target(target, columns, dice):
    """Every half minute, two seconds early or late, with one gap of minutes."""
    gap = range(first := dice.randrange(20, STEPS), first + dice.randrange(2, 25))
    for step in range(STEPS):
        at_ms = START_MS + step * STEP_MS + dice.choice((-1000, 0, 1000)) + dice.randrange(1, 1000)
        present = [(labels, values[step]) for labels, values in columns if values[step] is not None]
        if step not in gap:
            yield Scrape(target, at_ms, [labels for labels, _ in present], [value for _, value in present])


def made(metric, one, dice):
    """The columns of a metric: (labels, a value a step, None where there is no sample)."""
    if metric.endswith("_bucket"):
        return histograms(one.series, dice)
    making = counter if one.is_counter else walking if one.is_ranked else gauge
    return [(labels, with_an_end(making(one.numbers, dice), dice)) for labels in one.series]


def counter(_, dice):
    """Grows, stands still at times, and is reset twice: to half, as no real one is."""
    value, values, resets = FLOOR * dice.uniform(1, 4), [], dice.sample(range(STEPS), 2)
    for step in range(STEPS):
        value = value / 2 if step in resets else value + dice.choice((0, 1, 10)) * dice.random()
        values.append(value)
    return values


def walking(_, dice):
    """No two values are the same."""
    value, values = dice.uniform(1, 100), []
    for _ in range(STEPS):
        value += dice.gauss(0, 1)
        values.append(value)
    return values


def gauge(numbers, dice):
    """Stays for minutes at one of the numbers that it is compared with, or beside it, or anywhere."""
    levels = [0.0, 1.0, dice.uniform(0, 100), *(n * by for n in sorted(numbers) for by in (0.5, 1, 1.5))]
    value, values = dice.choice(levels), []
    for _ in range(STEPS):
        value = dice.choice(levels) if dice.random() < 0.02 else value
        values.append(value + (dice.random() if dice.random() < 0.02 else 0))
    return values


def with_an_end(values, dice):
    """One in eight series ends with a marker and comes back some time later."""
    if dice.random() > 1 / 8:
        return values
    first = dice.randrange(1, STEPS - 1)
    until = min(STEPS, first + dice.randrange(1, 60))
    return [*values[:first], STALE, *[None] * (until - first - 1), *values[until:]]


def histograms(series, dice):
    """The buckets of each histogram, which grow and end together."""
    grouped = {}
    for labels in series:
        grouped.setdefault(labels.without("le"), []).append(labels)
    columns = []
    for buckets in grouped.values():
        buckets.sort(key=lambda labels: float(labels.get("le")))
        totals, rows = [FLOOR * (n + 1) for n in range(len(buckets))], []
        for _ in range(STEPS):
            added = itertools.accumulate(dice.choice((0, 3)) * dice.random() for _ in buckets)
            totals = [total + more for total, more in zip(totals, added, strict=True)]
            rows.append(totals)
        mask = with_an_end([1.0] * STEPS, dice)
        for labels, column in zip(buckets, zip(*rows, strict=True), strict=True):
            columns.append((labels, [v if m == 1.0 else m for v, m in zip(column, mask, strict=True)]))
    return columns
