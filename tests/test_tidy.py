"""What the code itself must keep to, beyond what ruff, mypy and import-linter check."""

import ast
import re
from pathlib import Path

import pytest

from gpuwatch import catalogue

ROOT = Path(__file__).parent.parent
CODE = sorted((ROOT / "daemon").rglob("*.py"))
LONGEST, LONGEST_OF = 400, {"records.py": 540, "settings.py": 500, "cycle.py": 520}
UNITS = """
_bytes _ratio _celsius _watts _total _hertz _seconds _ok _down _phase _info up _active _reasons
_pending _guests _revision _failed _action _orphaned _stopping _paused _progress _in_flight _limit _tokens
_rows _generation _width _state _load1 _timeout _broken _failing _unsent _generation_max _width_max _hertz_max
_watts_min _watts_max
""".split()


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT / "daemon")))
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= LONGEST_OF.get(path.name, LONGEST)


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT / "daemon")))
def test_a_module_opens_with_its_promise(path):
    promise = ast.get_docstring(ast.parse(path.read_text()))
    assert promise, "no docstring"
    assert promise.splitlines()[0].endswith((".", ":"))


def test_every_room_stands_in_the_architecture():
    text = (ROOT / "docs/architecture.md").read_text()
    rooms = {p.stem if p.is_file() else p.name for p in (ROOT / "daemon/gpuwatch").iterdir()}
    missing = {room for room in rooms if not room.startswith("_") and f"`{room}`" not in text}
    assert missing == set()


def test_every_metric_has_help_and_a_unit_last():
    for metric in catalogue.METRICS:
        assert metric.help.endswith("."), metric.name
        assert any(metric.name.endswith(unit) for unit in UNITS), f"{metric.name}: which unit?"


def test_there_is_no_loose_end_in_the_code():
    for path in CODE:
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text()), path


def test_the_project_speaks_of_itself_alone():
    hosts = "py" + "pi.org|python" + "hosted.org|npm" + "js.org"
    for path in [*ROOT.glob("*.*"), *(ROOT / "docs").rglob("*.md"), *CODE]:
        if path.is_file() and path.suffix in {".md", ".toml", ".txt", ".py", ".yaml"}:
            assert not re.search(hosts, path.read_text()), path


def test_every_shipped_rule_file_is_in_the_wheel():
    text = (ROOT / "pyproject.toml").read_text()
    for path in (ROOT / "rules").glob("*.yaml"):
        assert f'"rules/{path.name}" = "gpuwatch/_rules/{path.name}"' in text
