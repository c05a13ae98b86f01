"""Templates against the texts that a real Prometheus made of them, errors included."""

import json
from pathlib import Path

import pytest

from gpuwatch.records import Labels
from gpuwatch.rules.templates import Context, Template, TemplateError

GOLDEN = Path(__file__).parents[3] / "shared/conformance/templates/golden.json"
ANSWERS = {"a:1": 1.0, "b:2": 0.0, "c:3": 1.0}

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not GOLDEN.exists(), reason="the developers' shared folder is not here"),
]


def query(expression):
    """The series that the oracle held: three of `up`."""
    a, b, c = ((Labels.of("up", instance=name, job="j"), value) for name, value in ANSWERS.items())
    return {
        "up": [a, b, c],
        "up{instance='a:1'}": [a],
        "sort(up)": [b, a, c],
        "sum(up)": [(Labels(), 2.0)],
        "count_values('__value__', up)": [(Labels([("__value__", "1")]), 2.0)],
    }.get(expression, [])


def told(case, external_url):
    """What gpuwatch makes of a case: a text, or what Prometheus says of a template that it refuses."""
    name = f"T{case['id']}"
    labels = Labels([("__name__", "golden"), ("case", str(case["id"])), *case["labels"].items()])
    try:
        template = Template(case["template"], name)
    except TemplateError as error:
        line = case["template"].count("\n", 0, error.position) + 1
        return f"template: __alert_{name}:{line}: {error.what}"
    return template.expand(labels, float(case["value"]), Context(query=query, external_url=external_url))


def test_every_text_is_the_one_that_prometheus_makes_to_the_letter():
    golden = json.loads(GOLDEN.read_text())
    cases = golden["cases"]
    different = [
        (case["template"], text, case.get("expected", case.get("parse_error")))
        for case in cases
        if (text := told(case, golden["external_url"])) != case.get("expected", case.get("parse_error"))
    ]
    assert different == []
    assert len(cases) > 2000
