"""Lets the runner of Prometheus' own test scripts drive gpuwatch's PromQL, over each kind of storage.

    python runner.py --engine tests.conformance.engine:GpuwatchEngine [--engine-arg store=sqlite] data

Remarks are given as the scripts of Prometheus 3.14 have them, less their place in the expression; with
`remarks=located` as a server prints them and as later scripts have them, to be run with `--positions strict`.
`runner` is that very program: it stands beside the project, and whoever imports this has imported it.
"""

from contextlib import ExitStack
from dataclasses import fields, is_dataclass, replace

from runner import QueryError, Result, Stale
from tests.conformance.storages import STORAGES

from gpuwatch import errors, promql
from gpuwatch.promql.ast import Call, Subquery, VectorSelector, walk
from gpuwatch.records import STALE, Labels

CALENDAR = frozenset("days_in_month day_of_month day_of_week day_of_year hour minute month year".split())
OF_THEIR_INSTANT = CALENDAR | {"predict_linear", "time", "timestamp"}  # whatever `@` says of their arguments


class GpuwatchEngine:
    """Of the runner's shape; what was loaded is stored when it is first asked for."""

    capabilities = frozenset({"utf8_names", "delayed_name_removal", "annotations", "type_and_unit"})

    def __init__(self, store="memory", remarks="bare"):
        self._storage = STORAGES[store]
        self._remark = REMARKS[remarks]
        self._open = ExitStack()
        self.reset()

    def reset(self):
        self.close()
        self._samples = {}

    def close(self):
        self._open.close()
        self._querier = None

    def load(self, series):
        self.close()
        for one in series:
            points = self._samples.setdefault(Labels(one.labels), {})
            points.update((at_ms, plain(value)) for at_ms, value in one.samples)

    def instant(self, expr, ts_ms):
        return self._ask(expr, promql.evaluate, ts_ms)

    def range(self, expr, start_ms, end_ms, step_ms):
        return self._ask(expr, promql.evaluate_range, start_ms, end_ms, step_ms)

    def _ask(self, expr, evaluate, *instants_ms):
        if self._querier is None:
            self._querier = self._open.enter_context(self._storage(self._samples))
        try:
            tree = expr.tree if isinstance(expr, Pinned) else promql.parse(expr)
            answer = evaluate(tree, self._querier, *instants_ms)
        except errors.QueryError as error:
            raise QueryError(str(error)) from error
        warnings, infos = ([self._remark(remark, expr) for remark in some] for some in answer[1:])
        return Result(*shaped(answer.value), warnings, infos)

    @staticmethod
    def at_variants(expr, ts_ms):
        """Its selectors pinned to the instant by `@`, it comes out the same whenever it is asked."""
        try:
            tree = promql.parse(expr)
        except errors.QueryError:
            return []
        if any(isinstance(node, Call) and node.function in OF_THEIR_INSTANT for node, _ in walk(tree)):
            return []
        asked_ms = (-10 * ts_ms, 0, ts_ms // 5, ts_ms, 10 * ts_ms) if ts_ms else (-1000, 0, 1000)
        return [(Pinned(expr, pinned(tree, ts_ms)), at_ms) for at_ms in asked_ms]


class Pinned(str):
    """An expression that was parsed already, and changed since."""

    __slots__ = ("tree",)

    def __new__(cls, text, tree):
        made = super().__new__(cls, text)
        made.tree = tree
        return made


def pinned(node, at_ms):
    """The tree with `@ at_ms` on what reads samples, but for what stands in a subquery, which has it then."""
    if isinstance(node, VectorSelector | Subquery):
        return node if isinstance(node.at, int) else replace(node, at=at_ms)
    if isinstance(node, tuple):
        return tuple(pinned(part, at_ms) for part in node)
    if not is_dataclass(node):
        return node
    parts = {field.name: pinned(getattr(node, field.name), at_ms) for field in fields(node)}
    return replace(node, **parts)


def plain(value):
    return STALE if isinstance(value, Stale) else float(value)


def shaped(value):
    if isinstance(value, str):
        return "string", value
    if not isinstance(value, list):
        return "scalar", value
    if value and isinstance(value[0], promql.Series):
        return "matrix", [(tuple(s.labels), list(zip(s.at_ms, s.values, strict=True))) for s in value]
    return "vector", [(tuple(labels), number) for labels, number in value]


REMARKS = {"bare": lambda remark, _: str(remark), "located": lambda remark, expr: remark.located(expr)}
