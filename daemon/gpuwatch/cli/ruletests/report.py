"""Tells how the unit tests of rules went: as text for people, and as JUnit's XML for CI; judges nothing."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from gpuwatch.cli.memory import Memory
    from gpuwatch.cli.ruletests import Failure, Outcome


def lines(path: Path, outcomes: Sequence[Outcome], *, diff: bool) -> Iterator[str]:
    """A line for a file whose tests pass; for others also what was expected and what came."""
    failed = [outcome for outcome in outcomes if outcome.failures]
    if not failed:
        yield f"{path}: SUCCESS, {_count(len(outcomes))}"
        return
    yield f"{path}: FAILED, {len(failed)} of {_count(len(outcomes))}"
    for outcome in failed:
        yield f"  {outcome.test.name}"
        for failure in outcome.failures:
            yield from _failure_lines(failure, diff=diff)


def dump(memory: Memory) -> Iterator[str]:
    """Every series with its samples, as `value @[seconds]`."""
    for series in sorted(memory.select((), -(2**63), 2**63), key=lambda series: series.labels):
        yield str(series.labels)
        yield from (
            f"  {value!r} @[{at / 1000:g}]" for at, value in zip(series.at_ms, series.values, strict=True)
        )


def junit(suites: Mapping[Path, Sequence[Outcome] | str]) -> bytes:
    """All files as JUnit's XML; a text instead of outcomes says why a file's tests could not be run."""
    root = ET.Element("testsuites")
    for path, outcomes in suites.items():
        cases = [] if isinstance(outcomes, str) else [_case(outcome) for outcome in outcomes]
        failures = sum(len(case) > 0 for case in cases)
        figures: dict[str, str] = {"tests": str(len(cases)), "failures": str(failures)}
        suite = ET.SubElement(root, "testsuite", {"name": str(path), "errors": "0", **figures})
        suite.extend(cases)
        if isinstance(outcomes, str):
            suite.set("errors", "1")
            case = ET.SubElement(suite, "testcase", name="load", classname=str(path))
            ET.SubElement(case, "error").text = _xml(outcomes)
    ET.indent(root)
    text: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return text


def _count(number: int) -> str:
    return f"{number} test{'' if number == 1 else 's'}"


def _case(outcome: Outcome) -> ET.Element:
    case = ET.Element("testcase", name=_xml(outcome.test.name), classname=outcome.test.place.file)
    for failure in outcome.failures:
        told = ET.SubElement(case, "failure", message=_xml(f"{failure.place}: {failure.what}"))
        told.text = _xml("\n".join(_failure_lines(failure, diff=False)))
    return case


def _failure_lines(failure: Failure, *, diff: bool) -> Iterator[str]:
    yield f"    {failure.place}: {failure.what}"
    if failure.expected == failure.got:  # it could not be compared at all
        return
    if diff:
        marked = difflib.ndiff(failure.expected, failure.got)
        yield "      - expected, + got:"
        yield from _indented(line.rstrip() for line in marked)
        return
    yield "      expected:" if failure.expected else "      expected: nothing"
    yield from _indented(failure.expected)
    yield "      got:" if failure.got else "      got: nothing"
    yield from _indented(failure.got)


def _indented(texts: Iterable[str]) -> Iterator[str]:
    return (f"        {text}" for text in texts)


def _xml(text: str) -> str:
    """The text less what XML cannot hold."""
    return "".join(
        c if c in "\t\n" or (c >= " " and not "\ud800" <= c <= "\udfff") else "\ufffd" for c in text
    )
