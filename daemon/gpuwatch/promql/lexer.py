"""Cuts a PromQL expression into tokens with positions; knows no grammar."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final

from gpuwatch.errors import QueryError

MAX_LENGTH: Final = 16_384  # the longest expression in 2,600 public rules has about 2,000 characters
_MAX_DURATION_MS: Final = 2**63 // 1_000_000  # Prometheus counts durations in 63 bits of nanoseconds


class Kind(enum.Enum):
    """What a token is."""

    NUMBER = enum.auto()
    DURATION = enum.auto()
    STRING = enum.auto()
    NAME = enum.auto()
    OPERATOR = enum.auto()
    END = enum.auto()


@dataclass(frozen=True, slots=True)
class Token:
    """`text` as written; `position` counts characters from 0."""

    kind: Kind
    text: str
    position: int

    @property
    def word(self) -> str:
        """The text as a keyword: these know no case."""
        return self.text.lower()


_TOKEN: Final = re.compile(
    r"""
    (?P<space> [ \t\r\n]+ | \#[^\n]* )
  | (?P<DURATION> (?>(?:[0-9]++(?:ms|[smhdwy]))+) (?![A-Za-z0-9_.]) )
  | (?P<NUMBER> (?>0[xX]_*+[0-9a-fA-F][0-9a-fA-F_]*+
                 | (?:[0-9][0-9_]*+\.?+[0-9_]*+ | \.[0-9][0-9_]*+)(?:[eE][+-]?+[0-9]++)?+)
      (?![A-Za-z0-9_.]) )
  | (?P<NAME> [A-Za-z_:][A-Za-z0-9_:]* )
  | (?P<STRING> "(?:[^"\\\n]|\\.)*+" | '(?:[^'\\\n]|\\.)*+' | `[^`]*+` )
  | (?P<OPERATOR> == | =~ | != | !~ | >= | <= | [-+*/%^()\[\]{},=<>@:] )
    """,
    re.VERBOSE,
)
_DURATION_PARTS: Final = re.compile(
    r"(?:(\d+)y)?(?:(\d+)w)?(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?(?:(\d+)ms)?", re.ASCII
)
_PART_MS: Final = (31_536_000_000, 604_800_000, 86_400_000, 3_600_000, 60_000, 1000, 1)
_MOST_DIGITS: Final = 64
_MOST_WHOLE: Final = 2**64
_ESCAPE: Final = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.))")
_SIMPLE_ESCAPES: Final = dict(zip(b"abfnrtv\\", b"\a\b\f\n\r\t\v\\", strict=True))


def tokens(text: str) -> list[Token]:
    """All tokens, the last of kind END; QueryError at the first thing that is none."""
    if len(text) > MAX_LENGTH:
        raise QueryError(
            f"the expression has {len(text)} characters; at most {MAX_LENGTH} are taken", MAX_LENGTH
        )
    found: list[Token] = []
    position, in_range = 0, False
    while position < len(text):
        if in_range and text[position] == ":":  # elsewhere a name may begin with it
            found.append(Token(Kind.OPERATOR, ":", position))
            position += 1
            continue
        match = _TOKEN.match(text, position)
        if match is None:
            raise QueryError(_complaint(text, position), position)
        if match.lastgroup and match.lastgroup != "space":
            found.append(Token(Kind[match.lastgroup], match.group(), position))
        in_range = match.group() == "[" or (in_range and match.group() != "]")
        position = match.end()
    return [*found, Token(Kind.END, "", position)]


def _complaint(text: str, position: int) -> str:
    character = text[position]
    if character in "\"'`":
        return "this string does not end"
    word = re.match(r"[\w.]+", text[position:])
    if word:
        return f"bad number or duration syntax: {word.group()!r}"
    return f"unexpected character {character!r}"


def number(token: Token) -> float:
    """The value of a NUMBER: decimal, hexadecimal, or octal after a leading 0, as Prometheus reads them."""
    text = token.text.replace("_", "")
    if text[:2] in {"0x", "0X"} or re.fullmatch(r"0[0-7]+", text):
        whole = int(text, 16 if text[1] in "xX" else 8) if len(text) <= _MOST_DIGITS else _MOST_WHOLE
        value = float(whole) if whole < _MOST_WHOLE else float("inf")
    else:
        value = float(text)
    if value == float("inf"):
        raise QueryError(f"error parsing number {_cut(token.text)}: value out of range", token.position)
    return value


def duration_ms(token: Token) -> int:
    """The length of a DURATION, or of a NUMBER of seconds."""
    if token.kind is Kind.NUMBER:
        return _in_range(number(token) * 1000, token)
    match = _DURATION_PARTS.fullmatch(token.text)
    if match is None:
        raise QueryError(
            f"not a valid duration: {_cut(token.text)}; units go down: y w d h m s ms", token.position
        )
    counts = [float(count) if count else 0.0 for count in match.groups()]  # no int takes digits without end
    return _in_range(sum(count * unit for count, unit in zip(counts, _PART_MS, strict=True)), token)


def _in_range(ms: float, token: Token) -> int:
    if ms > _MAX_DURATION_MS:
        raise QueryError("duration out of range", token.position)
    return round(ms)


def _cut(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def unquoted(token: Token) -> str:
    """The text of a STRING, with Go's escapes resolved; back-quoted text has none."""
    quote, inner = token.text[0], token.text[1:-1]
    if quote == "`":
        return inner

    def resolved(match: re.Match[bytes]) -> bytes:
        byte, short, long, octal, simple = match.groups()
        if byte or octal:
            code = int(byte, 16) if byte else int(octal, 8)
            return bytes([code]) if code < 256 else b"\xff"
        if short or long:
            return chr(int(short or long, 16)).encode()
        if simple == quote.encode():
            return simple
        return bytes([_SIMPLE_ESCAPES[simple[0]]])

    try:
        return _ESCAPE.sub(resolved, inner.encode()).decode()
    except (KeyError, ValueError, OverflowError) as error:
        raise QueryError(f"the string {token.text} has an unknown escape sequence", token.position) from error
