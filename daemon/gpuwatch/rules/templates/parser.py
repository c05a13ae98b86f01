"""Builds the tree of a template; refuses what Prometheus refuses when it loads one, and evaluates nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from gpuwatch.rules.templates import lexer, nodes
from gpuwatch.rules.templates.literals import quote, unquote
from gpuwatch.rules.templates.pipelines import PipelineParser, TemplateError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gpuwatch.rules.templates.nodes import Body, Node, Pipe

MAX_LENGTH: Final = 32_768  # the longest text in 2,800 public rules has about 3,000 characters


def parse(text: str, knows: Callable[[str], bool]) -> tuple[Body, Mapping[str, Body]]:
    """The text's own body, and those that it defines; TemplateError at the first mistake.

    `knows` tells which functions there are.
    """
    if len(text) > MAX_LENGTH:
        raise TemplateError(f"the template is longer than {MAX_LENGTH} characters: shorten it", MAX_LENGTH)
    return _Parser(tuple(lexer.tokens(text)), knows).whole()


class _Parser(PipelineParser):
    """Reads texts and control structures. `_ending` is the word that ended the last body."""

    _ending = ""
    _ranges = 0  # how many are open
    _action_at = 0

    def whole(self) -> tuple[Body, Mapping[str, Body]]:
        self._bodies: dict[str, Body] = {}
        body: list[Node] = []
        while self._next.kind != "eof":
            if self._next.kind == "begin" and self._tokens[self._index + 1].kind == "define":
                self._define()
            elif node := self._node():
                body.append(node)
            else:
                raise TemplateError(f"unexpected {self._ending}", self._action_at)
        return tuple(body), self._bodies

    def _define(self) -> None:
        self._action_at = self._take().position
        self._take()
        name = self._name("define clause")
        self._expect("close", "define clause")
        self._named(name, "define clause")

    def _named(self, name: str, context: str) -> None:
        """The body of a `define` or `block`, which sees none of the variables around it."""
        at, outer = self._action_at, (self._variables, self._ranges)
        self._variables, self._ranges = ["$"], 0
        body = self._body()
        self._variables, self._ranges = outer
        if self._ending != "{{end}}":
            raise TemplateError(f"unexpected {self._ending} in {context}", self._action_at)
        if _is_empty(self._bodies.get(name, ())):
            self._bodies[name] = body
        elif not _is_empty(body):
            raise TemplateError(f"template: multiple definition of template {quote(name)}", at)

    def _name(self, context: str) -> str:
        token = self._expect("string", context)
        try:
            return unquote(token.text)
        except ValueError as error:
            raise TemplateError(str(error), token.position) from error

    def _body(self) -> Body:
        """Everything up to an `end` or `else`."""
        self._deeper()
        body: list[Node] = []
        while self._next.kind != "eof":
            node = self._node()
            if node is None:
                self._nesting -= 1
                return tuple(body)
            body.append(node)
        raise TemplateError("unexpected EOF", self._next.position)

    def _node(self) -> Node | None:
        """A text or an action; None at an `end` or `else`."""
        token = self._take()
        if token.kind == "text":
            return nodes.Text(token.position, token.text)
        if token.kind != "begin":
            self._unexpected(token, "input")
        self._action_at = token.position
        position = self._next.position
        control = self._CONTROLS.get(self._next.kind)
        if control is None:
            return self._pipe("command")
        self._take()
        return control(self, position)

    def _end(self, _: int) -> None:
        self._expect("close", "end")
        self._ending = "{{end}}"

    def _else(self, _: int) -> None:
        if self._next.kind not in {"if", "with"}:
            self._expect("close", "else")
        self._ending = "{{else}}"

    def _if(self, position: int) -> Node:
        return nodes.Branch(position, False, *self._cases("if"))

    def _with(self, position: int) -> Node:
        return nodes.Branch(position, True, *self._cases("with"))

    def _cases(self, word: str) -> tuple[tuple[tuple[Pipe, Body], ...], Body]:
        """`else if` is read in a loop: chains of fifty are in use, and nest nothing."""
        mark = len(self._variables)
        cases = [(self._pipe(word), self._body())]
        while self._ending == "{{else}}" and self._next.kind == word:
            self._take()
            cases.append((self._pipe(word), self._body()))
        otherwise = self._otherwise()
        del self._variables[mark:]
        return tuple(cases), otherwise

    def _otherwise(self) -> Body:
        if self._ending == "{{end}}":
            return ()
        body = self._body()
        if self._ending != "{{end}}":
            raise TemplateError("expected end; found {{else}}", self._action_at)
        return body

    def _range(self, position: int) -> Node:
        mark = len(self._variables)
        pipe = self._pipe("range")
        self._ranges += 1
        body = self._body()
        self._ranges -= 1
        otherwise = self._otherwise()
        del self._variables[mark:]
        return nodes.Range(position, pipe, body, otherwise)

    def _break(self, position: int) -> Node:
        self._leave("{{break}}")
        return nodes.Leave(position, breaks=True)

    def _continue(self, position: int) -> Node:
        self._leave("{{continue}}")
        return nodes.Leave(position, breaks=False)

    def _leave(self, action: str) -> None:
        self._expect("close", action)
        if not self._ranges:
            raise TemplateError(f"{action} outside {{{{range}}}}", self._action_at)

    def _template(self, _: int) -> Node:
        position = self._next.position
        name = self._name("template clause")
        if self._next.kind == "close":
            self._take()
            return nodes.Include(position, name, None)
        return nodes.Include(position, name, self._pipe("template clause"))

    def _block(self, _: int) -> Node:
        position = self._next.position
        name = self._name("block clause")
        pipe = self._pipe("block clause")
        self._named(name, "block clause")
        return nodes.Include(position, name, pipe)

    _CONTROLS: ClassVar[Mapping[str, Callable[[_Parser, int], Node | None]]] = {
        "block": _block,
        "break": _break,
        "continue": _continue,
        "else": _else,
        "end": _end,
        "if": _if,
        "range": _range,
        "template": _template,
        "with": _with,
    }


def _is_empty(body: Body) -> bool:
    """Whether a body is nothing but space, and so may be defined once more."""
    return all(isinstance(node, nodes.Text) and not node.text.strip() for node in body)
