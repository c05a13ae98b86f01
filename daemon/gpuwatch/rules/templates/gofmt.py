"""Prints as Go's fmt does, with and without a format; knows no template."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from gpuwatch.rules.templates.values import Fault, Struct, Value, go_type
from gpuwatch.rules.templates.verbs import Verb, bad, show

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_TEXT: Final = 65_536  # characters
_MAX_NUMBER: Final = 1_000_000  # the largest width that Go takes
_PERCENT: Final = re.compile(
    r"%(?P<flags>[-+# 0]*)(?P<index>\[[^]]{0,9}\])?(?P<width>\*|\d{1,7})?"
    r"(?P<point>\.(?P<point_index>\[[^]]{0,9}\])?(?P<precision>\*|\d{0,7}))?"
    r"(?P<last_index>\[[^]]{0,9}\])?(?P<verb>.)?",
    re.DOTALL | re.ASCII,
)
_OF_V: Final = str.maketrans("+#", "NS")


def sprint(*values: Value) -> str:
    """Go's `Sprint`: a space between two values of which neither is a string."""
    pieces: list[str] = []
    for index, value in enumerate(values):
        if index and not isinstance(value, str) and not isinstance(values[index - 1], str):
            pieces.append(" ")
        pieces.append(show(value))
    return joined(pieces)


def sprintln(*values: Value) -> str:
    """Go's `Sprintln`: a space between any two values, and a line's end."""
    return joined(piece for value in values for piece in (" ", show(value)))[1:] + "\n"


def printable(value: Value) -> Value:
    """What an action prints of a value: a pointer stands for what it points to."""
    if isinstance(value, Struct):
        return Struct(go_type(value).removeprefix("*"), value.fields)
    return "<no value>" if value is None else value


def printf(form: str, *values: Value) -> str:
    """Go's `Sprintf`; what does not fit is told in the text, as Go does."""
    return joined(_Printf(values).pieces(form))


def joined(pieces: Iterable[str]) -> str:
    """The pieces as one text; Fault as soon as it grows too long."""
    taken, length = [], 0
    for piece in pieces:
        taken.append(piece)
        length += len(piece)
        if length > MAX_TEXT:
            raise Fault(f"the text is longer than {MAX_TEXT} characters")
    return "".join(taken)


class _Printf:
    """One pass over a format; `_at` is the argument that comes next."""

    def __init__(self, values: Sequence[Value]) -> None:
        self._values = values
        self._at = 0
        self._is_ordered = True
        self._is_index_good = True

    def pieces(self, form: str) -> Iterable[str]:
        at = 0
        for match in _PERCENT.finditer(form):
            yield form[at : match.start()]
            yield from self._verb(match)
            at = match.end()
        yield form[at:]
        yield self._extra()

    def _verb(self, match: re.Match[str]) -> Iterable[str]:
        self._is_index_good = True
        self._seek(match["index"])
        width = self._number(match["width"])
        if match["width"] and width is None:
            yield "%!(BADWIDTH)"
        self._refuse_index_before(
            match["index"], match["width"] != "*" and (match["width"] or match["point"])
        )
        self._seek(match["point_index"])
        precision = self._number(match["precision"] or "0") if match["point"] else None
        if match["point"] and (precision is None or precision < 0):
            precision = None
            yield "%!(BADPREC)"
        self._refuse_index_before(match["point_index"], match["precision"] not in {"*", ""})
        self._seek(match["last_index"])
        flags, width = match["flags"], width or 0
        if width < 0:
            flags, width = flags.replace("0", "") + "-", -width
        yield self._argument(Verb(match["verb"] or "", flags, width, precision))

    def _seek(self, index: str | None) -> None:
        """Go on with the argument that `[2]` names."""
        if index is None:
            return
        self._is_ordered = False
        number = int(index[1:-1]) if index[1:-1].isdecimal() else 0
        if 0 < number <= len(self._values):
            self._at = number - 1
        else:
            self._is_index_good = False

    def _refuse_index_before(self, index: str | None, follows: object) -> None:
        if index is not None and follows:  # as in %[3]2d
            self._is_index_good = False

    def _number(self, written: str | None) -> int | None:
        """A width or precision; `*` takes it from the arguments."""
        if written != "*":
            return int(written) if written else None
        self._at += 1
        value = self._values[self._at - 1] if self._at <= len(self._values) else None
        is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MAX_NUMBER
        return value if is_number else None

    def _argument(self, verb: Verb) -> str:
        if verb.letter in {"", "%"}:
            return verb.letter or "%!(NOVERB)"
        if not self._is_index_good:
            return f"%!{verb.letter}(BADINDEX)"
        if self._at >= len(self._values):
            return f"%!{verb.letter}(MISSING)"
        if max(verb.width, verb.precision or 0) > MAX_TEXT:
            raise Fault(f"the text is longer than {MAX_TEXT} characters")
        self._at += 1
        return _argument(self._values[self._at - 1], verb)

    def _extra(self) -> str:
        rest = self._values[self._at :]
        if not rest or not self._is_ordered:
            return ""
        shown = ("<nil>" if value is None else f"{go_type(value)}={show(value)}" for value in rest)
        return f"%!(EXTRA {', '.join(shown)})"


def _argument(value: Value, verb: Verb) -> str:
    if verb.letter == "T":
        return Verb("s", verb.flags, verb.width, verb.precision).padded(go_type(value))
    if verb.letter == "w":
        return bad(value, verb)
    if verb.letter == "v":
        verb = Verb("v", verb.flags.translate(_OF_V), verb.width, verb.precision)
    return show(value, verb)
