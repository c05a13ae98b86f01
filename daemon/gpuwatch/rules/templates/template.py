"""A label's or annotation's template: parsed once, expanded for each alert; reads no clock, no file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from gpuwatch.rules.templates import functions, parser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from gpuwatch.records import Labels


def _nothing(_: str) -> Iterable[tuple[Labels, float]]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a template may see beside its alert.

    `query` evaluates an instant query at the rule's own time, and raises a GpuwatchError if it cannot.
    """

    query: Callable[[str], Iterable[tuple[Labels, float]]] = _nothing
    now_ms: int = 0
    external_labels: Mapping[str, str] = field(default_factory=dict)
    external_url: str = ""


NO_CONTEXT: Final = Context()


class Template:
    """A text with actions. `name` is Prometheus' for it, told where an expansion fails.

    `tree` is the text's own body and those that it defines.
    """

    __slots__ = ("name", "text", "tree")

    def __init__(self, text: str, alert: str = "") -> None:
        """TemplateError if Prometheus would refuse the text of this alert's label or annotation."""
        self.text = text
        self.name = f"__alert_{alert}"
        self.tree = ((), {}) if self.is_constant else parser.parse(text, functions.NAMES.__contains__)

    @property
    def is_constant(self) -> bool:
        """Whether the text is itself, for every alert."""
        return "{{" not in self.text

    @property
    def labels_used(self) -> frozenset[str]:
        """The labels of the alert that the text names."""
        return self._usage()[0]

    @property
    def uses_value(self) -> bool:
        """Whether the text reads the alert's value."""
        return self._usage()[1]

    def _usage(self) -> tuple[frozenset[str], bool]:
        from gpuwatch.rules.templates import usage  # noqa: PLC0415 (only who checks rule files asks)

        return usage.usage(*self.tree)

    def expand(self, labels: Labels, value: float, context: Context = NO_CONTEXT) -> str:
        """The text for one element of the rule's result; a failure is told in the text, as in Prometheus."""
        if self.is_constant:
            return self.text
        from gpuwatch.rules.templates import expansion  # noqa: PLC0415 (no alert, no expansion)

        return expansion.expanded(self, labels, value, context)
