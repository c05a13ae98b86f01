"""A subset of Go's templates, as alerts' labels and annotations use it; reads no data but its arguments.

`{{ $labels.gpu }}`, `{{ $labels }}`, `{{ $value }}`, literals, parentheses, and pipelines through
humanize, humanize1024, humanizePercentage, humanizeDuration and printf. Whatever else Prometheus
would take is refused when the rule is loaded.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, TypeAlias

from gpuwatch.errors import GpuwatchError
from gpuwatch.rules import gofmt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpuwatch.records import Labels
    from gpuwatch.rules.gofmt import Value

Expand: TypeAlias = "Callable[[Labels, float], Value]"

_TOKEN: Final = re.compile(
    r"""
    (?P<space> \s+ )
  | (?P<label> (?:\$labels|\.Labels)\.(?P<name>[A-Za-z_][A-Za-z0-9_]*) (?![\w.]) )
  | (?P<labels> \$labels (?![\w.]) )
  | (?P<value> (?:\$value|\.Value) (?![\w.]) )
  | (?P<float> [-+]?\d+\.\d* (?:[eE][-+]?\d+)? | [-+]?\d+[eE][-+]?\d+ )
  | (?P<int> [-+]?\d+ (?![\w.]) )
  | (?P<string> "(?:[^"\\\n]|\\["\\nt])*" )
  | (?P<raw> `[^`]*` )
  | (?P<function> [A-Za-z_]\w* )
  | (?P<pipe> \| ) | (?P<open> \( ) | (?P<close> \) )
    """,
    re.VERBOSE,
)
_ACTION: Final = re.compile(
    r"""\{\{(?P<left>-\s)?(?P<inner>(?:"(?:[^"\\]|\\.)*"|`[^`]*`|(?!\}\}).)*?)(?P<right>\s-)?\}\}""",
    re.DOTALL,
)
_COMMENT: Final = re.compile(r"\s*/\*.*\*/\s*", re.DOTALL)
_ESCAPE: Final = re.compile(r"\\.")
_ESCAPES: Final = {r"\"": '"', r"\\": "\\", r"\n": "\n", r"\t": "\t"}
_HUMANIZE: Final[dict[str, Callable[[float], str]]] = {
    "humanize": gofmt.humanize,
    "humanize1024": gofmt.humanize1024,
    "humanizePercentage": gofmt.humanize_percentage,
    "humanizeDuration": gofmt.humanize_duration,
}
_KNOWN: Final = ", ".join([*_HUMANIZE, "printf"])


class TemplateError(GpuwatchError):
    """A template that cannot be used; `position` counts characters from 0."""

    def __init__(self, what: str, position: int) -> None:
        """`what` names the cause and the cure."""
        self.what = what
        self.position = position
        super().__init__(what)


class Template:
    """A text with actions, parsed once and expanded for each alert."""

    def __init__(self, text: str) -> None:
        """TemplateError if the text has an action that is not of the subset."""
        self._parts = _parts(text)

    @property
    def is_constant(self) -> bool:
        """Whether the text is the same for every alert."""
        return all(isinstance(part, str) for part in self._parts)

    def expand(self, labels: Labels, value: float) -> str:
        """The text for one element of the rule's result; a failure is told in the text, as in Prometheus."""
        try:
            return "".join(
                part if isinstance(part, str) else gofmt.text(part(labels, value)) for part in self._parts
            )
        except ValueError as error:
            return f"<error expanding template: {error}>"


def _parts(text: str) -> list[str | Expand]:
    parts: list[str | Expand] = []
    at, trim = 0, False
    for action in _ACTION.finditer(text):
        before = text[at : action.start()]
        _refuse_stray(before, at)
        before = before.lstrip() if trim else before
        parts.append(before.rstrip() if action["left"] else before)
        if not _COMMENT.fullmatch(action["inner"]):
            parts.append(_Parser(text, action.start("inner"), action.end("inner")).whole())
        at, trim = action.end(), bool(action["right"])
    _refuse_stray(text[at:], at)
    parts.append(text[at:].lstrip() if trim else text[at:])
    return parts


def _refuse_stray(text: str, offset: int) -> None:
    if "{{" in text:
        raise TemplateError('this "{{" has no "}}"', offset + text.index("{{"))


class _Parser:
    """Reads one action into a function of labels and value."""

    def __init__(self, text: str, start: int, end: int) -> None:
        self._tokens: list[re.Match[str]] = []
        self._end = end
        self._index = 0
        while start < end:
            token = _TOKEN.match(text, start, end)
            if token is None:
                word = text[start:end].split(maxsplit=1)[0]
                raise TemplateError(f"{word!r} is beyond the templates that gpuwatch expands", start)
            if token.lastgroup != "space":
                self._tokens.append(token)
            start = token.end()

    def whole(self) -> Expand:
        pipeline = self._pipeline()
        if self._index < len(self._tokens):
            raise TemplateError(f"unexpected {self._tokens[self._index].group()!r}", self._position)
        return pipeline

    @property
    def _position(self) -> int:
        return self._tokens[self._index].start() if self._index < len(self._tokens) else self._end

    @property
    def _kind(self) -> str:
        return self._tokens[self._index].lastgroup or "" if self._index < len(self._tokens) else ""

    def _pipeline(self) -> Expand:
        result = self._command(None)
        while self._kind == "pipe":
            self._index += 1
            result = self._command(result)
        return result

    def _command(self, piped: Expand | None) -> Expand:
        if self._kind == "function":
            return self._call(piped)
        if piped is not None:
            raise TemplateError(f"a value can be piped into a function only: {_KNOWN}", self._position)
        return self._operand()

    def _call(self, piped: Expand | None) -> Expand:
        position, token = self._position, self._tokens[self._index]
        name = token.group()
        self._index += 1
        args: list[Expand] = []
        first = self._tokens[self._index] if self._kind in {"string", "raw"} else None
        while self._kind not in {"", "pipe", "close"}:
            args.append(self._operand())
        args += [] if piped is None else [piped]
        if name == "printf":
            return _printf(first, args, position)
        if name not in _HUMANIZE:
            raise TemplateError(
                f"the function {name!r} is none of those that gpuwatch has: {_KNOWN}", position
            )
        if len(args) != 1:
            raise TemplateError(f"{name} takes one value, not {len(args)}", position)
        return _humanized(name, args[0])

    def _operand(self) -> Expand:
        if self._kind == "open":
            self._index += 1
            inner = self._pipeline()
            if self._kind != "close":
                raise TemplateError('expected ")"', self._position)
            self._index += 1
            return inner
        if self._kind not in {"label", "labels", "value", "float", "int", "string", "raw"}:
            raise TemplateError("expected $labels.name, $value or a literal", self._position)
        token = self._tokens[self._index]
        self._index += 1
        return _simple(token)


def _simple(token: re.Match[str]) -> Expand:
    """What a label, the value or a literal yields."""
    if token.lastgroup == "label":
        name = token["name"]
        return lambda labels, _: labels.get(name)
    if token.lastgroup == "labels":
        return lambda labels, _: f"map[{' '.join(f'{k}:{v}' for k, v in labels)}]"
    if token.lastgroup == "value":
        return lambda _, value: value
    literal = _literal(token)
    return lambda _labels, _value: literal


def _literal(token: re.Match[str]) -> Value:
    text = token.group()
    if token.lastgroup == "float":
        return float(text)
    if token.lastgroup == "int":
        return int(text)
    inner = text[1:-1]
    return inner if token.lastgroup == "raw" else _ESCAPE.sub(lambda e: _ESCAPES[e.group()], inner)


def _printf(first: re.Match[str] | None, args: Sequence[Expand], position: int) -> Expand:
    if first is None:
        raise TemplateError("printf needs its format first, in quotes", position)
    form = str(_literal(first))
    for verb, at in gofmt.verbs(form):
        if verb not in gofmt.VERBS or not verb:
            shown = form[at : at + 2]
            raise TemplateError(f"printf's {shown!r} is not supported: take one of {_verbs()}", first.start())
    rest = args[1:]
    return lambda labels, value: gofmt.printf(form, *(arg(labels, value) for arg in rest))


def _verbs() -> str:
    return " ".join(f"%{verb}" for verb in sorted(gofmt.VERBS))


def _humanized(name: str, arg: Expand) -> Expand:
    function = _HUMANIZE[name]
    return lambda labels, value: function(_float(arg(labels, value), name))


def _float(value: Value, function: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"{function} needs a number, not {value!r}") from error
