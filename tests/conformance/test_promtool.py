"""promtool's verdict on other projects' rule tests is ours too."""

import functools
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpuwatch.cli import main

FOLDER = Path(__file__).parents[3] / "shared/conformance/promtool"
EXPECTED = FOLDER / "expected.json"
VERDICTS = {
    name: one["3.5.3"]
    for name, one in (json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}).items()
}

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not VERDICTS, reason="the shared conformance data is not here"),
]


@functools.cache
def outcome_of(name):
    return CliRunner().invoke(main, ["rules", "test", str(FOLDER / name)])


@pytest.mark.parametrize("name", sorted(VERDICTS))
def test_the_verdict_is_that_of_promtool_3_5_3(name):
    done = outcome_of(name)
    assert ("pass" if done.exit_code == 0 else "fail") == VERDICTS[name], done.output


@pytest.mark.skipif("openshift_cmo/bz1974830.yaml" not in VERDICTS, reason="the shared data is not here")
def test_a_failure_is_the_one_that_promtool_has():
    done = outcome_of("openshift_cmo/bz1974830.yaml")
    assert done.output.count("\n    /") == 1
    assert "alert KubeDeploymentReplicasMismatch at 30m\n      expected: nothing\n      got:\n" in done.output
