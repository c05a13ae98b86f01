"""Records as JSON that a person can read, and back; never knows which table they are in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from gpuwatch.records import (
    Alert,
    Labels,
    Notification,
    Refusal,
    Remediation,
    Revision,
    ServerStart,
    ServerState,
    Transition,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R")

_LABELS: Final = msgspec.json.Decoder(dict[str, str])


def to_json(thing: DataclassInstance | Mapping[str, Any]) -> str:
    """Compact JSON; a field that has its default is left out, and NaN and the infinities are strings.

    JSON has no NaN, and SQLite's JSON functions refuse a document that does. `Labels` are an object.
    """
    return clean(
        json.dumps(thing, default=_plain, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    )


def clean(text: str) -> str:
    """The text as every database takes it; the same text but for lone surrogates and NUL.

    A name out of /proc or off a command line may hold surrogates; one odd character must not keep
    everything else from being saved.
    """
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def from_json(text: str, kind: type[R]) -> R:
    """The record; msgspec.ValidationError says which field is wrong."""
    record: R = _DECODERS[kind].decode(text)
    return record


def labels_json(labels: Labels) -> str:
    """The labels as one JSON object, the same text for the same labels."""
    return to_json(dict(labels))


def labels_of(text: str) -> Labels:
    """The labels that `labels_json` wrote, and so sorted already: a thousand series are read at once."""
    return tuple.__new__(Labels, _LABELS.decode(text).items())


def _plain(thing: object) -> dict[str, object]:
    if isinstance(thing, Mapping):
        return dict(thing)
    if not is_dataclass(thing) or isinstance(thing, type):
        raise TypeError(f"no JSON for a {type(thing).__name__}")
    values = {field: getattr(thing, field.name) for field in fields(thing)}
    return {field.name: _plain_value(v) for field, v in values.items() if not _is_default(field, v)}


def _is_default(field: Field[Any], value: object) -> bool:
    if field.default is not MISSING:
        return bool(value == field.default)
    return field.default_factory is not MISSING and bool(value == field.default_factory())


def _plain_value(value: object) -> object:
    if isinstance(value, Labels):
        return dict(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _custom(kind: type, value: Any) -> Labels:  # noqa: ANN401 - whatever the JSON held
    if kind is not Labels:
        raise NotImplementedError(kind)
    return Labels(value.items())


_DECODERS: Final[Mapping[type, msgspec.json.Decoder[Any]]] = {
    # Not strict, because only then a float may stand as "nan" or "inf".
    kind: msgspec.json.Decoder(kind, strict=False, dec_hook=_custom)
    for kind in (Alert, Transition, ServerState, ServerStart, Remediation, Revision, Refusal, Notification)
}
