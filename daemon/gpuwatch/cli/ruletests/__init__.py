"""Unit tests of rules as `promtool test rules` has them, on our own engine; reads no database."""

from gpuwatch.cli.ruletests.runner import Failure, Outcome, compiled, rule_paths, run, unknown_alerts

__all__ = ["Failure", "Outcome", "compiled", "rule_paths", "run", "unknown_alerts"]
