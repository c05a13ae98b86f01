"""Rule groups in, alerts and series out, as Prometheus' rules; pure: it tells nobody and does nothing."""

from gpuwatch.rules.compiler import CompiledGroup, CompiledRule, compile_groups
from gpuwatch.rules.evaluation import Evaluation, RuleFailure, Terms, evaluate
from gpuwatch.rules.judge import JUMP_MS, Judge, Verdict
from gpuwatch.rules.overlay import Overlay
from gpuwatch.rules.restore import Outage

__all__ = [
    "JUMP_MS",
    "CompiledGroup",
    "CompiledRule",
    "Evaluation",
    "Judge",
    "Outage",
    "Overlay",
    "RuleFailure",
    "Terms",
    "Verdict",
    "compile_groups",
    "evaluate",
]
