"""What in a rule is right to Prometheus and still looks mistaken; reads no rule file and no database."""

from gpuwatch.cli.lint.findings import Finding, lint
from gpuwatch.cli.lint.inventory import Inventory

__all__ = ["Finding", "Inventory", "lint"]
