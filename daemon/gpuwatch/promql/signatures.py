"""The functions and aggregations of PromQL by name and types; computes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gpuwatch.promql.ast import ValueType

_SCALAR, _STRING, _VECTOR, _MATRIX = (
    ValueType.SCALAR,
    ValueType.STRING,
    ValueType.VECTOR,
    ValueType.MATRIX,
)


@dataclass(frozen=True, slots=True)
class Signature:
    """`optional` counts the last arguments that may be missing; -1: the last comes any number of times."""

    args: tuple[ValueType, ...]
    returns: ValueType = _VECTOR
    optional: int = 0

    def accepts(self, count: int) -> bool:
        """Whether a call may have this many arguments."""
        if self.optional < 0:
            return count >= len(self.args) - 1
        return len(self.args) - self.optional <= count <= len(self.args)

    def arg(self, index: int) -> ValueType:
        """The type of an argument."""
        return self.args[min(index, len(self.args) - 1)]


_OF_RANGE: Final = (
    "rate increase irate delta idelta deriv changes resets avg_over_time min_over_time max_over_time "
    "sum_over_time count_over_time last_over_time present_over_time stddev_over_time stdvar_over_time "
    "absent_over_time"
)
_OF_VECTOR: Final = (
    "abs ceil floor exp ln log2 log10 sqrt sgn sort sort_desc timestamp absent "
    "sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh deg rad "
    "histogram_avg histogram_count histogram_sum histogram_stddev histogram_stdvar"
)
_OF_TIME: Final = "minute hour day_of_week day_of_month day_of_year days_in_month month year"

FUNCTIONS: Final[dict[str, Signature]] = {
    **{name: Signature((_MATRIX,)) for name in _OF_RANGE.split()},
    **{name: Signature((_VECTOR,)) for name in _OF_VECTOR.split()},
    **{name: Signature((_VECTOR,), optional=1) for name in _OF_TIME.split()},
    "predict_linear": Signature((_MATRIX, _SCALAR)),
    "quantile_over_time": Signature((_SCALAR, _MATRIX)),
    "round": Signature((_VECTOR, _SCALAR), optional=1),
    "clamp": Signature((_VECTOR, _SCALAR, _SCALAR)),
    "clamp_min": Signature((_VECTOR, _SCALAR)),
    "clamp_max": Signature((_VECTOR, _SCALAR)),
    "histogram_quantile": Signature((_SCALAR, _VECTOR)),
    "histogram_fraction": Signature((_SCALAR, _SCALAR, _VECTOR)),
    "label_replace": Signature((_VECTOR, _STRING, _STRING, _STRING, _STRING)),
    "label_join": Signature((_VECTOR, _STRING, _STRING, _STRING), optional=-1),
    "scalar": Signature((_VECTOR,), returns=_SCALAR),
    "vector": Signature((_SCALAR,)),
    "time": Signature((), returns=_SCALAR),
    "pi": Signature((), returns=_SCALAR),
}

AGGREGATIONS: Final[dict[str, ValueType | None]] = {  # the type of their parameter
    **dict.fromkeys(("sum", "avg", "min", "max", "count", "group", "stddev", "stdvar")),
    "topk": _SCALAR,
    "bottomk": _SCALAR,
    "quantile": _SCALAR,
    "count_values": _STRING,
}

# What Prometheus has behind a feature flag: whoever writes one deserves another answer than "unknown".
_BEHIND_FLAGS: Final = (
    "double_exponential_smoothing holt_winters histogram_quantiles info mad_over_time first_over_time "
    "ts_of_first_over_time ts_of_last_over_time ts_of_max_over_time ts_of_min_over_time sort_by_label "
    "sort_by_label_desc limitk limit_ratio start end range step max_of min_of start_timestamp"
)
EXPERIMENTAL: Final = frozenset(_BEHIND_FLAGS.split())
