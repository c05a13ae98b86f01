r"""Reads and writes Go's literals, quoted strings and numbers; knows no template.

A text may hold bytes that are no UTF-8 (`"\xff"`, or half a character that was cut off): each is
one lone surrogate, as Python's `surrogateescape` has it.
"""

from __future__ import annotations

import math
import re
from typing import Final

_ESCAPE: Final = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|([0-7]{3})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL
)
_NO_UTF8: Final = re.compile("[\udc80-\udcff]")
_LETTERS: Final = dict(zip("abfnrtv\\", "\a\b\f\n\r\t\v\\", strict=True))
_OCTAL: Final = re.compile(r"[-+]?0[0-7_]*")
_FLOAT_MARKS: Final = frozenset(".eEpP")
_SHORT: Final = {char: "\\" + letter for letter, char in _LETTERS.items()}


def to_bytes(text: str) -> bytes:
    """The bytes that Go would hold."""
    return text.encode("utf-8", "surrogateescape")


def to_text(data: bytes) -> str:
    """The inverse of `to_bytes`."""
    return data.decode("utf-8", "surrogateescape")


def replaced(text: str) -> str:
    """The text with U+FFFD for each byte that is no UTF-8: what may leave the process."""
    return _NO_UTF8.sub("\ufffd", to_text(to_bytes(text)))


def unquote(literal: str) -> str:
    """What a literal in `"`, `'` or backquotes stands for; ValueError as Go words it."""
    mark, inner = literal[0], literal[1:-1]
    if mark == "`":
        return inner.replace("\r", "")
    if "\\" not in inner:
        return inner
    return to_text(to_bytes(_ESCAPE.sub(lambda escape: _unescaped(escape, mark), inner)))


def _unescaped(escape: re.Match[str], mark: str) -> str:
    byte, octal, short, long, letter = escape.groups()
    if letter:
        char = mark if letter == mark else _LETTERS.get(letter)
        if char is None:
            raise ValueError("invalid syntax")
        return char
    if short or long:
        code = int(short or long, 16)
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise ValueError("invalid syntax")
        return chr(code)
    code = int(byte, 16) if byte else int(octal, 8)
    if code > 0xFF:
        raise ValueError("invalid syntax")
    return to_text(bytes([code]))


def quote(text: str, mark: str = '"', *, ascii_only: bool = False) -> str:
    """The literal that stands for a text."""
    return mark + "".join(_escaped(char, mark, ascii_only=ascii_only) for char in text) + mark


def _escaped(char: str, mark: str, *, ascii_only: bool) -> str:
    if char == mark:
        return "\\" + char
    if char in _SHORT:
        return _SHORT[char]
    if char.isprintable() and (char.isascii() or not ascii_only):
        return char
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def codepoint(char: str) -> str:
    """A character as `U+0040 '@'`; without the quotes if it cannot be shown."""
    return f"U+{ord(char):04X}" + (f" '{char}'" if char.isprintable() else "")


def number(literal: str) -> float:
    """A number as Go's templates take it: a float has a point or an exponent, unless it is hexadecimal.

    A whole number may be beyond 64 bits. ValueError as Go words it; complex numbers are refused.
    """
    whole = _whole(literal)
    if whole is not None and -(2**63) <= whole < 2**64:
        return whole
    if whole is not None or not _FLOAT_MARKS.intersection(literal):
        what = "integer overflow" if literal.lstrip("+-").isdecimal() else "illegal number syntax"
        raise ValueError(f"{what}: {quote(literal)}")
    try:
        value = float.fromhex(literal.replace("_", "")) if "p" in literal.lower() else float(literal)
    except (ValueError, OverflowError):
        value = math.inf
    if math.isinf(value):
        raise ValueError(f"illegal number syntax: {quote(literal)}")
    return value


def _whole(literal: str) -> int | None:
    is_octal = _OCTAL.fullmatch(literal)
    try:
        return int(literal, 8 if is_octal else 0)
    except ValueError:
        return None


def char(literal: str) -> int:
    """The code point of a character in `'`; ValueError as Go words it."""
    text = unquote(literal)
    if len(text) != 1:
        raise ValueError(f"malformed character constant: {literal}" if text else "invalid syntax")
    return ord(text) - 0xDC00 if 0xDC80 <= ord(text) <= 0xDCFF else ord(text)
