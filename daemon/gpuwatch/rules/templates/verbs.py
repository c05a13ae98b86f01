"""Prints one value as one verb of Go's fmt does; knows no format string."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import msgspec

from gpuwatch.promql.arithmetic import shown
from gpuwatch.rules.templates.literals import codepoint, quote, to_bytes
from gpuwatch.rules.templates.values import Byte, Stringer, Struct, Value, go_type, is_pointer

if TYPE_CHECKING:
    from collections.abc import Mapping

_ADDRESS: Final = 0xC000012345  # where Go prints at which address a value lies: ours lie nowhere
_BASES: Final = {"d": "d", "v": "d", "b": "b", "o": "o", "O": "o", "x": "x", "X": "X"}
_PREFIXES: Final = {"b": "0b", "x": "0x", "X": "0X"}
_RUNE_ERROR: Final = "\ufffd"


class Verb(msgspec.Struct, frozen=True):
    """One `%…` of a format, such as `%-8.2f`.

    `flags` are those written; for the verb v itself, `+` is `N`, the names of fields too, and `#` is
    `S`, Go's own syntax.
    """

    letter: str = "v"
    flags: str = ""
    width: int = 0
    precision: int | None = None

    def padded(self, text: str, *, zeros: bool = True) -> str:
        """The text in its width; zeros are put to the left only."""
        if "-" in self.flags:
            return text.ljust(self.width)
        return text.rjust(self.width, "0" if zeros and "0" in self.flags else " ")

    @property
    def pads_zeros(self) -> bool:
        """Whether a number is filled up with zeros behind its sign."""
        return "0" in self.flags and "-" not in self.flags

    def sign(self, *, negative: bool) -> str:
        """The sign of a number."""
        return "-" if negative else "+" if "+" in self.flags else " " if " " in self.flags else ""


PLAIN: Final = Verb()


def show(value: Value, verb: Verb = PLAIN, depth: int = 0) -> str:
    """A value by its verb; one that the verb cannot print is told as Go tells it."""
    if value is None:
        return "<nil>" if depth else verb.padded("<nil>") if verb.letter == "v" else bad(value, verb)
    if isinstance(value, Stringer) and verb.letter in "vsxXq":
        return _string(str(value), verb)
    if isinstance(value, dict | list | Struct):
        return _composite(value, verb, depth)
    return _basic(value, verb)


def _basic(value: Value, verb: Verb) -> str:
    if isinstance(value, str):
        return _string(value, verb)
    if isinstance(value, bool):
        return verb.padded(str(value).lower()) if verb.letter in "tv" else bad(value, verb)
    if isinstance(value, int):
        return _integer(value, verb)
    return _float(value, verb) if isinstance(value, float) else bad(value, verb)


def bad(value: Value, verb: Verb) -> str:
    """A verb that does not fit the value: `%!d(string=x)`."""
    if value is None:
        return f"%!{verb.letter}(<nil>)"
    shown = (
        str(value) if isinstance(value, Stringer) else show(value, msgspec.structs.replace(verb, letter="v"))
    )
    return f"%!{verb.letter}({go_type(value)}={shown})"


# ---- texts


def _string(text: str, verb: Verb) -> str:
    letter = verb.letter
    if letter in "xX":
        return verb.padded(_hexadecimal(to_bytes(text)[: verb.precision], verb))
    if letter not in "vsq":
        return bad(text, verb)
    text = text[: verb.precision]
    if letter == "s" or (letter == "v" and "S" not in verb.flags):
        return verb.padded(text)
    if "#" in verb.flags and "`" not in text and text.replace("\t", "").isprintable():
        return verb.padded(f"`{text}`")
    return verb.padded(quote(text, ascii_only="+" in verb.flags))


def _hexadecimal(data: bytes, verb: Verb) -> str:
    prefix = "0x" if "#" in verb.flags and data else ""
    shown = prefix + (data.hex(" ").replace(" ", f" {prefix}") if " " in verb.flags else data.hex())
    return shown.upper() if verb.letter == "X" else shown


# ---- whole numbers


def _integer(value: int, verb: Verb) -> str:
    letter = verb.letter
    if letter in "cqU":
        return _character(value, verb)
    if letter not in _BASES:
        return bad(value, verb)
    if letter == "v" and "S" in verb.flags and isinstance(value, Byte):
        return verb.padded(f"{value:#x}", zeros=False)
    digits, sign = format(abs(value), _BASES[letter]), verb.sign(negative=value < 0)
    if verb.precision is not None:
        digits = digits.rjust(verb.precision, "0") if value or verb.precision else ""
        sign = sign if digits else ""
    elif verb.pads_zeros:
        digits = digits.rjust(verb.width - len(sign), "0")
    return verb.padded(sign + _prefix(digits, verb) + digits, zeros=False)


def _prefix(digits: str, verb: Verb) -> str:
    if verb.letter == "O":
        return "0o"
    if "#" not in verb.flags or not digits:
        return ""
    if verb.letter == "o":
        return "" if digits[0] == "0" else "0"
    return _PREFIXES.get(verb.letter, "")


def _character(value: int, verb: Verb) -> str:
    char = chr(value) if 0 <= value < 0xD800 or 0xDFFF < value <= 0x10FFFF else _RUNE_ERROR
    if verb.letter == "c":
        return verb.padded(char)
    if verb.letter == "q":
        return verb.padded(quote(char, "'", ascii_only="+" in verb.flags))
    shown = codepoint(char) if "#" in verb.flags and ord(char) == value else ""
    code = f"U+{value % 2**64:0{max(verb.precision or 0, 4)}X}"
    return verb.padded(code + shown[len(f"U+{ord(char):04X}") :], zeros=False)


# ---- floats


def _float(value: float, verb: Verb) -> str:
    if verb.letter not in "veEfFgGbxX":
        return bad(value, verb)
    sign = verb.sign(negative=math.copysign(1, value) < 0)
    if math.isnan(value):
        return verb.padded(verb.sign(negative=False) + "NaN", zeros=False)
    if math.isinf(value):
        return verb.padded((sign or "+") + "Inf", zeros=False)
    digits = _digits(abs(value), verb)
    if verb.pads_zeros:
        return sign + digits.rjust(verb.width - len(sign), "0")
    return verb.padded(sign + digits)


def _digits(value: float, verb: Verb) -> str:
    """A number that is finite and not negative."""
    letter, precision = verb.letter, verb.precision
    if letter in "bxX":
        return _binary(value, letter)
    if precision is None and letter in "vgG" and "#" not in verb.flags:
        return shown(value).upper() if letter == "G" else shown(value)
    kind = "g" if letter == "v" else letter
    sharp = "#" if "#" in verb.flags else ""
    return format(value, f"{sharp}.{6 if precision is None else precision}{kind}")


def _binary(value: float, letter: str) -> str:
    if letter == "b":
        fraction, exponent = math.frexp(value) if value else (0.0, -1021)
        return f"{int(fraction * 2**53)}p{exponent - 53:+d}"
    mantissa, exponent_text = value.hex().split("p")
    shown = f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}p{int(exponent_text):+03d}"
    return shown.upper() if letter == "X" else shown


# ---- what holds other values


def _composite(value: Mapping[str, Value] | list[Value] | Struct, verb: Verb, depth: int) -> str:
    if isinstance(value, Struct):
        return _struct(value, verb, depth)
    begin, between, end = ("{", ", ", "}") if "S" in verb.flags else ("[", " ", "]")
    if isinstance(value, list):
        name = go_type(value) if "S" in verb.flags else ""
        shown = [show(element, verb, depth + 1) for element in value]
    else:
        name = go_type(value) if "S" in verb.flags else "map"
        shown = [f"{show(key, verb, depth + 1)}:{show(value[key], verb, depth + 1)}" for key in sorted(value)]
    return name + begin + between.join(shown) + end


def _struct(value: Struct, verb: Verb, depth: int) -> str:
    if depth and is_pointer(value):
        return _address(value, verb)
    names = "N" in verb.flags or "S" in verb.flags
    shown = [
        (f"{name}:" if names else "") + show(field, verb, depth + 1) for name, field in value.fields.items()
    ]
    syntax = go_type(value).removeprefix("*") if "S" in verb.flags else ""
    between = ", " if "S" in verb.flags else " "
    return ("&" if is_pointer(value) else "") + syntax + "{" + between.join(shown) + "}"


def _address(value: Struct, verb: Verb) -> str:
    if verb.letter == "v":
        address = f"({go_type(value)})({_ADDRESS:#x})" if "S" in verb.flags else f"{_ADDRESS:#x}"
        return verb.padded(address, zeros=False)
    return _integer(_ADDRESS, verb) if verb.letter in "bodxX" else bad(value, verb)
