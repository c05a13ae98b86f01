"""Finds every mistake of rule files, and what looks mistaken by what this host stores; changes nothing."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuwatch import config, rules, store
from gpuwatch.cli.lint import Inventory, lint
from gpuwatch.errors import RuleError, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from gpuwatch.records import Labels, RuleGroup
    from gpuwatch.rules import CompiledGroup


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """A rule file: its groups, or its mistakes, each `file:line:column: what`."""

    path: Path
    groups: tuple[CompiledGroup, ...] = ()
    mistakes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many rules it has."""
        return sum(len(group.rules) for group in self.groups)


def checked(path: Path) -> CheckedFile:
    """Read and compile one rule file."""
    groups, mistakes = config.read_rules(path)
    mistakes += [mistake for group in groups for mistake in _mistakes(group)]
    compiled = () if mistakes else rules.compile_groups(groups)
    return CheckedFile(path, compiled, tuple(sorted(mistakes, key=_line_and_column)))


def remarks(files: Sequence[CheckedFile], series: Iterable[Labels] | None) -> dict[Path, list[str]]:
    """What looks mistaken in each file; a metric that one file records is known to all."""
    compiled = [rule for file in files for group in file.groups for rule in group.rules]
    known = Inventory.of(series, (rule.name for rule in compiled if rule.is_recording))
    return {file.path: [str(finding) for finding in lint(file.groups, known)] for file in files}


def stored_series(folder: Path) -> tuple[list[Labels] | None, str]:
    """The labels of all series of a state folder; or None, and why they cannot be known."""
    if not (folder / store.METRICS_DB).exists():
        return None, f"there is no {folder / store.METRICS_DB}"
    try:
        with store.open_history(folder) as history:
            return history.series(), ""
    except StoreError as error:
        return None, str(error)


def _mistakes(group: RuleGroup) -> Iterable[str]:
    """Of each rule the first mistake: compiling a group stops at its first."""
    for rule in group.rules:
        try:
            rules.compile_groups([dataclasses.replace(group, rules=(rule,))])
        except RuleError as error:
            yield str(error)


def _line_and_column(mistake: str) -> tuple[int, ...]:
    place = re.search(r":(\d+):(\d+): ", mistake)
    return tuple(map(int, place.groups())) if place else ()
