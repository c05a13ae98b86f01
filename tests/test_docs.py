"""The documents are under test: what they name exists, and what exists is named."""

import re
from pathlib import Path

import click
import pytest

from gpuwatch import cli, config
from gpuwatch.remediation import machine

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(group=cli.main, prefix=""):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


COMMANDS = list(commands())


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_every_command_has_help_and_stands_in_the_operations_page(name, command):
    assert command.help
    assert f"gpuwatch {name}" in (ROOT / "docs/operations.md").read_text()


def test_the_example_settings_load_and_show_every_default():
    settings = config.load_settings(ROOT / "gpuwatch.example.yaml")
    assert settings.servers[0].name
    text = (ROOT / "gpuwatch.example.yaml").read_text()
    for struct in (
        config.Settings,
        config.RemediationSettings,
        config.SourceSettings,
        config.ServerSettings,
        config.StoreSettings,
        config.MetricsSettings,
        config.EvaluationSettings,
    ):
        for name in struct.__struct_fields__:
            assert re.search(rf"\b{name}:", text), f"{struct.__name__}.{name} is not in the example"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_diagram_of_remediation_is_drawn_from_the_table():
    drawn = (ROOT / "docs/remediation.md").read_text()
    rows = [f"  {was} --> {now}: {event}" for (was, event), now in machine.TRANSITIONS.items()]
    assert "\n".join(rows) in drawn, "docs/remediation.md is old; the rows are:\n" + "\n".join(rows)
