"""What of its alert a template reads, told from its tree; expands nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gpuwatch.rules.templates import nodes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from gpuwatch.rules.templates.nodes import Body, Node

_GIVEN: Final = {"$labels": ("Labels",), "$value": ("Value",), "$": ()}


def usage(body: Body, defined: Mapping[str, Body]) -> tuple[frozenset[str], bool]:
    """The labels that are named, and whether the value is read; a `define` is taken to be about the alert."""
    paths = {path for each in (body, *defined.values()) for path in _paths(each, is_alert=True)}
    labels = {path[1] for path in paths if path[0] == "Labels" and len(path) > 1}
    return frozenset(labels), any(path[0] in {"", "Value"} for path in paths)


def _paths(part: object, *, is_alert: bool) -> Iterator[tuple[str, ...]]:
    """What is read below a part: ("Labels", "gpu"), ("Value",), or ("",) for all.

    `is_alert`: `.` is the alert.
    """
    match part:
        case tuple():
            for piece in part:
                yield from _paths(piece, is_alert=is_alert)
        case nodes.Branch(is_with=True):
            for pipe, body in part.cases:
                yield from _paths(pipe, is_alert=is_alert)
                yield from _paths(body, is_alert=False)
            yield from _paths(part.otherwise, is_alert=is_alert)
        case nodes.Range():
            yield from _paths((part.pipe, part.otherwise), is_alert=is_alert)
            yield from _paths(part.body, is_alert=False)
        case nodes.Node():
            yield from _own(part, is_alert=is_alert)
            for name in part.__struct_fields__:
                yield from _paths(getattr(part, name), is_alert=is_alert)
        case _:  # a name or a position
            pass


def _own(node: Node, *, is_alert: bool) -> Iterable[tuple[str, ...]]:
    match node:
        case nodes.Variable() | nodes.Field() | nodes.Dot():
            return [_path(node, is_alert=is_alert)]
        case nodes.Command(args=[nodes.Word(name="index"), of, nodes.Literal(value=str(label))]):
            return [(*_path(of, is_alert=is_alert), label)]
        case nodes.Chain():
            return [(*_path(node.of, is_alert=is_alert), *node.names)]
        case _:
            return ()


def _path(node: Node, *, is_alert: bool) -> tuple[str, ...]:
    """The path from the alert on; ("other",) for what does not come from it."""
    match node:
        case nodes.Variable(name=name) if name in _GIVEN:
            return (*_GIVEN[name], *node.names) or ("",)
        case nodes.Pipe(commands=[nodes.Command(args=[only])]):  # parentheses
            return _path(only, is_alert=is_alert)
        case nodes.Field() if is_alert:
            return node.names
        case nodes.Dot() if is_alert:
            return ("",)
        case _:
            return ("other",)
