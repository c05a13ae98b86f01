"""Cuts a template into text and the tokens of its actions; knows no grammar."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import msgspec

from gpuwatch.rules.templates.literals import codepoint, quote

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

KEYWORDS: Final = frozenset(
    ["block", "break", "continue", "define", "else", "end", "if", "nil", "range", "template", "with"]
)
_SPACES: Final = " \t\r\n"
_ACTION: Final = re.compile(r"\{\{(?P<trim>-[ \t\r\n])?(?P<comment>/\*)?")
_COMMENT_END: Final = re.compile(r"\*/(?P<close>(?P<trim>[ \t\r\n]-)?\}\})?")
_TOKEN: Final = re.compile(
    r"""
    (?P<close> (?P<trim>[ \t\r\n]-)? \}\} )
  | (?P<space> [ \t\r\n]+? (?= [ \t\r\n]-\}\} ) | [ \t\r\n]+ )
  | (?P<string> "(?:[^"\\\n]|\\[^\n])*+" | `[^`]*` )
  | (?P<char> '(?:[^'\\\n]|\\[^\n])*+' )
  | (?P<variable> \$\w* )
  | (?P<field> \.(?![0-9])\w+ )
  | (?P<dot> \.(?![0-9]) )
  | (?P<number> (?=[-+.0-9]) [-+]? (?: 0[xX][0-9a-fA-F_]*(?:\.[0-9a-fA-F_]*)?(?:[pP][-+]?[0-9_]*)?
                                      | 0[oO][0-7_]*(?:\.[0-7_]*)? | 0[bB][01_]*(?:\.[01_]*)?
                                      | [0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9_]*)? ) i? )
  | (?P<word> \w+ )
  | (?P<declare> := ) | (?P<assign> = ) | (?P<pipe> \| ) | (?P<open> \( ) | (?P<shut> \) )
  | (?P<mark> (?!["'`:])[!-~] )
    """,
    re.VERBOSE,
)
_NAME_ENDS: Final = re.compile(r"[ \t\r\n.,|:)(]|\}\}|\Z")
_NUMBER_GOES_ON: Final = re.compile(r"\w|[-+][0-9_.]*")
_UNFINISHED: Final = {
    '"': "unterminated quoted string",
    "`": "unterminated raw quoted string",
    "'": "unterminated character constant",
    ":": "expected :=",
}


class Token(msgspec.Struct, frozen=True):
    """A piece of a template.

    `kind` is text, begin (`{{`), close (`}}`), eof, word, variable, field, dot, number, char, string,
    declare, assign, pipe, open, shut, mark, a keyword itself, or error: then `text` says what is wrong.
    `position` counts characters from 0. `spaced`: spaces stand before it in the action.
    """

    kind: str
    text: str
    position: int
    spaced: bool = False

    def __str__(self) -> str:
        """The token as Go shows it in an error."""
        if self.kind in {"eof", "error"}:
            return "EOF" if self.kind == "eof" else self.text
        if self.kind in KEYWORDS or self.kind == "dot":
            return f"<{self.text}>"
        return quote(self.text) if len(self.text) <= 10 else quote(self.text[:10]) + "..."


def tokens(text: str) -> Iterator[Token]:
    """All tokens; an `eof` or an `error` is the last one."""
    at, trim = 0, False
    while begin := _ACTION.search(text, at):
        yield from _text(text[at : begin.start()], at, left=trim, right=bool(begin["trim"]))
        end = yield from (_comment if begin["comment"] else _action)(text, begin)
        if end is None:
            return
        at, trim = end.end(), bool(end["trim"])
    yield from _text(text[at:], at, left=trim, right=False)
    yield Token("eof", "", len(text))


def _text(text: str, at: int, *, left: bool, right: bool) -> Iterator[Token]:
    text = text.lstrip(_SPACES) if left else text
    text = text.rstrip(_SPACES) if right else text
    if text:
        yield Token("text", text, at)


def _comment(text: str, begin: re.Match[str]) -> Generator[Token, None, re.Match[str] | None]:
    """No token but an error; the match of the comment's end is returned."""
    end = _COMMENT_END.search(text, begin.end())
    if end is not None and end["close"]:
        return end
    what = "comment ends before closing delimiter" if end else "unclosed comment"
    yield Token("error", what, begin.start())
    return None


def _action(text: str, begin: re.Match[str]) -> Generator[Token, None, re.Match[str] | None]:
    """The tokens from `{{` to `}}`, whose match is returned; None after an error."""
    yield Token("begin", "{{", begin.start())
    at, depth, spaced = begin.end(), 0, False
    while token := _TOKEN.match(text, at):
        kind, at = token.lastgroup or "", token.end()
        if kind == "space":
            spaced = True
            continue
        depth += (kind == "open") - (kind == "shut")
        wrong = _mistake(text, token, kind, depth)
        if wrong:
            yield Token("error", wrong, begin.start() if kind == "close" else token.start())
            return None
        if kind == "word" and token.group() in KEYWORDS:
            kind = token.group()
        yield Token(kind, token.group(), token.start(), spaced)
        if kind == "close":
            return token
        spaced = False
    yield Token("error", _unknown(text, at), at if at < len(text) else begin.start())
    return None


def _mistake(text: str, token: re.Match[str], kind: str, depth: int) -> str:
    """What is wrong with a token where it stands; empty if nothing is."""
    if kind in {"variable", "field", "dot", "word"} and not _NAME_ENDS.match(text, token.end()):
        return f"bad character {codepoint(text[token.end()])}"
    if kind == "number" and (more := _NUMBER_GOES_ON.match(text, token.end())):
        return f"bad number syntax: {quote(token.group() + more.group())}"
    if kind == "close" and depth > 0:
        return "unclosed left paren"
    return "unexpected right paren" if depth < 0 else ""


def _unknown(text: str, at: int) -> str:
    if at >= len(text):
        return "unclosed action"
    return _UNFINISHED.get(text[at]) or f"unrecognized character in action: {codepoint(text[at])}"
