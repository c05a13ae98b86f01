"""Walks a template's tree and writes its text, as Go does; evaluates no pipeline itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gpuwatch.rules.templates import nodes
from gpuwatch.rules.templates.gofmt import MAX_TEXT, printable
from gpuwatch.rules.templates.literals import quote, replaced
from gpuwatch.rules.templates.operands import Failure, Operands
from gpuwatch.rules.templates.values import Struct, Value, truth
from gpuwatch.rules.templates.verbs import show

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gpuwatch.records import Labels
    from gpuwatch.rules.templates.nodes import Body, Node, Pipe
    from gpuwatch.rules.templates.template import Context, Template


_DATA: Final = (
    "struct { Labels map[string]string; ExternalLabels map[string]string; ExternalURL string;"
    " Value interface {} }"
)


def expanded(template: Template, labels: Labels, value: float, context: Context) -> str:
    """The text for one element of a rule's result; a failure is told in the text."""
    fields = {
        "Labels": dict(labels),
        "ExternalLabels": dict(context.external_labels),
        "ExternalURL": context.external_url,
        "Value": float(value),
    }
    try:
        text = Expansion(template, context).text(Struct(_DATA, fields))
    except Failure as failure:
        what = f"error executing template {template.name}: {failure}"
        text = f"<error expanding template: {what[:MAX_TEXT]}>"
    return text if text.isascii() else replaced(text)


class Expansion(Operands):
    """One expansion of one template; operands.Failure if it cannot be done."""

    def __init__(self, template: Template, context: Context) -> None:
        """Of a template with actions."""
        super().__init__(template.text, template.name, context)
        self._body_of_all, defined = template.tree
        self._defined = {template.name: self._body_of_all, **defined}
        self._written: list[str] = []
        self._length = 0

    def text(self, data: Struct) -> str:
        """The text about `data`, whose fields Prometheus also declares as variables."""
        names = ("$labels", "$externalLabels", "$externalURL", "$value")
        self._variables = [("$", data), *zip(names, data.fields.values(), strict=True)]
        self._body(self._body_of_all, data)
        return "".join(self._written)

    def _write(self, text: str) -> None:
        self._written.append(text)
        self._length += len(text)
        if self._length > MAX_TEXT:
            self._node = None
            raise self._failure(f"the text is longer than {MAX_TEXT} characters")

    def _body(self, body: Body, dot: Value) -> nodes.Leave | None:
        """Write a body; the `break` or `continue` that ended it, if one did."""
        self._descend()
        left = None
        for node in body:
            left = self._part(node, dot)
            if left is not None:
                break
        self._depth -= 1
        return left

    def _part(self, node: Node, dot: Value) -> nodes.Leave | None:
        match node:
            case nodes.Text():
                self._write(node.text)
            case nodes.Pipe():
                value = self._pipe(node, dot)
                if not node.variables:
                    self._write(show(printable(value)))
            case nodes.Branch():
                return self._branch(node, dot)
            case nodes.Range():
                return self._range(node, dot)
            case nodes.Include():
                self._include(node, dot)
            case nodes.Leave():
                return node
            case _:  # no other stands in a body
                pass
        return None

    def _branch(self, node: nodes.Branch, dot: Value) -> nodes.Leave | None:
        mark = len(self._variables)
        chosen, about = node.otherwise, dot
        for pipe, body in node.cases:
            value = self._pipe(pipe, dot)
            if truth(value):
                chosen, about = body, value if node.is_with else dot
                break
        left = self._body(chosen, about)
        del self._variables[mark:]
        return left

    def _range(self, node: nodes.Range, dot: Value) -> nodes.Leave | None:
        mark = len(self._variables)
        elements = self._elements(self._pipe(node.pipe, dot), node.pipe)
        inner = len(self._variables)
        is_empty, left = True, None
        for pair in elements:
            is_empty = False
            self._set_loop_variables(node.pipe, pair)
            left = self._body(node.body, pair[1])
            del self._variables[inner:]
            if left is not None and left.breaks:
                break
        left = self._body(node.otherwise, dot) if is_empty else None
        del self._variables[mark:]
        return None if left is not None and left.breaks else left

    def _elements(self, value: Value, pipe: Pipe) -> Iterable[tuple[Value, Value]]:
        """Indexes or keys, and elements."""
        if value is None:
            return ()
        if isinstance(value, list):
            return enumerate(value)
        if isinstance(value, dict):
            return sorted(value.items())
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._failure(f"range can't iterate over {show(printable(value))}")
        if len(pipe.variables) > 1:
            raise self._failure(f"can't use {value} to iterate over more than one variable")
        return ((None, type(value)(index)) for index in range(value))

    def _set_loop_variables(self, pipe: Pipe, pair: tuple[Value, Value]) -> None:
        """A single variable is the element; of two, the first is the index or key."""
        names = pipe.variables
        for place in range(-len(names), 0):
            if pipe.assigns:
                self._assign(names[place], pair[place])
            else:
                self._variables[place] = (names[place], pair[place])

    def _include(self, node: nodes.Include, dot: Value) -> None:
        self._node = node
        body = self._defined.get(node.name)
        if body is None:
            raise self._failure(f"template {quote(node.name)} not defined")
        about = None if node.pipe is None else self._pipe(node.pipe, dot)
        outer = self._variables, self._running
        self._variables, self._running = [("$", about)], node.name
        self._body(body, about)
        self._variables, self._running = outer
