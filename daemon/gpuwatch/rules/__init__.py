"""Rule groups in, alerts out: Prometheus' alerting rules; pure, and it tells nobody and does nothing."""

from gpuwatch.rules.compiler import CompiledGroup, CompiledRule, compile_groups
from gpuwatch.rules.evaluation import Evaluation, RuleFailure, evaluate, orphans

__all__ = [
    "CompiledGroup",
    "CompiledRule",
    "Evaluation",
    "RuleFailure",
    "compile_groups",
    "evaluate",
    "orphans",
]
