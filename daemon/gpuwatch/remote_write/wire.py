"""Encodes scrapes as snappy-compressed `prometheus.WriteRequest`; never sends.

Imports protobuf and cramjam, 4 MiB, so that only those load it who send samples on.

Rule 1: labels stand sorted by name, the samples of a series together and in order of time.
Rule 2: values go bit for bit, since the staleness marker is one NaN among many.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import cramjam
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from gpuwatch.records import Labels

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gpuwatch.records import Scrape

_KNOWN_SERIES: Final = 8192  # whose encoded labels are kept, about 200 bytes each; a host has some 2000

_Field: Final = descriptor_pb2.FieldDescriptorProto
# https://github.com/prometheus/prometheus/blob/main/prompb/remote.proto and types.proto, as far as we send.
_MESSAGES: Final[dict[str, list[tuple[str, int, int, str]]]] = {
    "Label": [("name", 1, _Field.TYPE_STRING, ""), ("value", 2, _Field.TYPE_STRING, "")],
    "Sample": [("value", 1, _Field.TYPE_DOUBLE, ""), ("timestamp", 2, _Field.TYPE_INT64, "")],
    "TimeSeries": [
        ("labels", 1, _Field.TYPE_MESSAGE, ".prometheus.Label"),
        ("samples", 2, _Field.TYPE_MESSAGE, ".prometheus.Sample"),
    ],
    # On the wire a message inside another is bytes, and of two in a row the fields are joined. So a
    # TimeSeries is its labels, encoded once, followed by its samples.
    "WriteRequest": [("timeseries", 1, _Field.TYPE_BYTES, "")],
}
_REPEATED: Final = frozenset({"labels", "samples", "timeseries"})


def _message_classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="gpuwatch/remote.proto", package="prometheus", syntax="proto3"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, of in fields:
            label = _Field.LABEL_REPEATED if field in _REPEATED else _Field.LABEL_OPTIONAL
            message.field.add(name=field, number=number, type=kind, label=label, type_name=of or None)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"prometheus.{name}"))
        for name in _MESSAGES
    }


_CLASSES: Final = _message_classes()
_TimeSeries: Final = _CLASSES["TimeSeries"]
_WriteRequest: Final = _CLASSES["WriteRequest"]


class Encoder:
    """Encodes for one receiver."""

    def __init__(self, external_labels: Mapping[str, str]) -> None:
        """`external_labels` are added to every series that has no label of that name."""
        self._external = dict(external_labels)
        self._encoded_labels = functools.lru_cache(_KNOWN_SERIES)(self._encode_labels)

    def encode(self, scrapes: Iterable[Scrape]) -> bytes:
        """The body of a request with all their samples."""
        series: dict[Labels, Any] = {}
        for scrape in sorted(scrapes, key=lambda scrape: scrape.at_ms):
            for labels, value in zip(scrape.labels, scrape.values, strict=True):
                one = series.get(labels)
                if one is None:
                    one = series[labels] = _TimeSeries()
                one.samples.add(value=value, timestamp=scrape.at_ms)
        encoded = [self._encoded_labels(of) + one.SerializeToString() for of, one in series.items()]
        request = _WriteRequest(timeseries=encoded).SerializeToString()
        return bytes(cramjam.snappy.compress_raw(request))

    def _encode_labels(self, labels: Labels) -> bytes:
        whole = Labels((self._external | dict(labels)).items())
        pairs = [{"name": _as_utf8(name), "value": _as_utf8(value)} for name, value in whole]
        encoded: bytes = _TimeSeries(labels=pairs).SerializeToString()
        return encoded


def _as_utf8(text: str) -> str:
    """The text with `?` for what UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()
