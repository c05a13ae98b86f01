"""Lets the runner of Prometheus' own test scripts drive our engine; used where that runner is present."""

from tests.promtool import Memory

from gpuwatch import promql
from gpuwatch.errors import QueryError
from gpuwatch.promql.ast import unwrapped
from gpuwatch.records import STALE, Labels


def engine(runner):
    """An engine of the runner's shape, made with the runner's own classes."""

    class Engine:
        capabilities = frozenset({"utf8_names", "delayed_name_removal"})

        def __init__(self):
            self.reset()

        def reset(self):
            self.memory = Memory()

        def load(self, series):
            for one in series:
                for at_ms, value in one.samples:
                    stale = isinstance(value, runner.Stale)
                    self.memory.add(Labels(one.labels), at_ms, STALE if stale else float(value))

        def instant(self, expr, ts_ms):
            value = self._value(expr, ts_ms)
            if isinstance(value, list):
                return runner.Result("vector", [(tuple(labels), v) for labels, v in value])
            return runner.Result("string" if isinstance(value, str) else "scalar", value)

        def range(self, expr, start_ms, end_ms, step_ms):
            points = {}
            for at_ms in range(start_ms, end_ms + 1, step_ms):
                value = self._value(expr, at_ms)
                for labels, v in value if isinstance(value, list) else [((), value)]:
                    points.setdefault(tuple(labels), []).append((at_ms, v))
            return runner.Result("matrix", sorted(points.items(), key=lambda p: runner.labels_key(p[0])))

        def _value(self, expr, at_ms):
            try:
                parsed = promql.parse(expr)
                if isinstance(text := unwrapped(parsed), promql.StringLiteral):
                    return text.value
                return promql.evaluate(parsed, self.memory, at_ms).value
            except QueryError as error:
                raise runner.QueryError(f"{error.what}") from error

    return Engine
