"""Prometheus' own PromQL scripts come out as they say, over plain lists, the store's memory and its files.

The scripts and their runner stand beside the project.
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "shared/conformance/promql"
FILES = sorted(SCRIPTS.glob("data/*.test"))
STORAGES = ("memory", "recent", "sqlite")

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def runner():
    """The program beside the project; also what `from runner import ...` means from now on."""
    if not FILES:
        pytest.skip("there are no scripts beside the project")
    if "runner" not in sys.modules:
        spec = importlib.util.spec_from_file_location("runner", SCRIPTS / "runner.py")
        sys.modules["runner"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["runner"])
    return sys.modules["runner"]


@pytest.fixture(scope="module")
def engine_class(runner):
    from tests.conformance.engine import GpuwatchEngine

    return GpuwatchEngine


def outcomes(runner, engine, path, **options):
    """What became of each case, but for those that need what gpuwatch does not offer."""
    commands, needs_ok = runner.parse_file(str(path)), runner.missing_capabilities(engine)
    try:
        return runner.run_commands(commands, engine, positions="strict", needs_ok=needs_ok, **options)
    finally:
        engine.close()


@pytest.mark.parametrize("store", STORAGES)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_case_comes_out_as_its_script_says(path, store, runner, engine_class):
    engine = engine_class(store)
    found = outcomes(runner, engine, path, at_variants=engine.at_variants)
    failed = [f"{o.case.case_id}: {o.case.expr}: {o.reason}" for o in found if o.status == "fail"]
    assert not failed, "\n".join(failed)


# ---- the proof of the proof: an engine that is wrong is found out


def one_series_less(result):
    return replace(result, value=result.value[:-1]) if isinstance(result.value, list) else result


def one_label_more(result):
    if not isinstance(result.value, list):
        return result
    return replace(result, value=[((*labels, ("zzz", "more")), found) for labels, found in result.value])


def slightly_more(result):
    if result.type == "scalar":
        return replace(result, value=more(result.value))
    if result.type == "vector":
        return replace(result, value=[(labels, more(value)) for labels, value in result.value])
    if result.type == "matrix":
        series = [(labels, [(at, more(value)) for at, value in points]) for labels, points in result.value]
        return replace(result, value=series)
    return result


def more(value):
    return value * (1 + 1e-5)


def without_remarks(result):
    return replace(result, warnings=[], infos=[])


def other_words(result):
    warnings, infos = ([f"{text}!" for text in some] for some in (result.warnings, result.infos))
    return replace(result, warnings=warnings, infos=infos)


def remarked_more(result):
    return replace(result, warnings=["PromQL warning: x"], infos=["PromQL info: x"])


def wants_remarks(case):
    return case.has("warn") or case.has("info")


def wants_words(case):
    return any(expected.mode == "msg" for expected in (*case.has("warn"), *case.has("info")))


def wants_none(case):
    return case.has("no_warn") or case.has("no_info")


def everything(_):
    return True


def spoiling(engine_class, damage):
    """An engine whose every answer is damaged; `spoilt` are the questions that it changes the answer to."""

    class Spoiling(engine_class):
        def __init__(self):
            self.spoilt, self.epoch = set(), -2  # one reset here, one before the first case
            super().__init__()

        def reset(self):
            self.epoch += 1
            super().reset()

        def instant(self, expr, ts_ms):
            return self.spoil((expr, ts_ms), super().instant(expr, ts_ms))

        def range(self, expr, *instants_ms):
            return self.spoil((expr, *instants_ms), super().range(expr, *instants_ms))

        def spoil(self, question, result):
            damaged = damage(result)
            if repr(damaged) != repr(result):  # a NaN is like another here
                self.spoilt.add((self.epoch, *question))
            return damaged

    return Spoiling()


def question(case):
    instants_ms = (case.start, case.end, case.step) if case.is_range else (case.eval_ts,)
    return (case.epoch, case.expr, *instants_ms)


@pytest.mark.parametrize(
    ("damage", "counts"),
    [
        (one_series_less, everything),
        (one_label_more, everything),
        (slightly_more, everything),
        (without_remarks, wants_remarks),
        (other_words, wants_words),
        (remarked_more, wants_none),
    ],
    ids=lambda part: part.__name__,
)
def test_an_engine_that_is_wrong_is_found_out(damage, counts, runner, engine_class):
    damaged, unnoticed = 0, []
    for path in FILES:
        engine = spoiling(engine_class, damage)
        found = outcomes(runner, engine, path, range_check=False)
        spoilt = [o for o in found if question(o.case) in engine.spoilt and counts(o.case)]
        damaged += len(spoilt)
        unnoticed += [f"{o.case.case_id}: {o.case.expr}" for o in spoilt if o.status == "pass"]
    assert damaged > 5
    assert not unnoticed, "\n".join(unnoticed)
