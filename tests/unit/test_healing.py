"""What a turn asks of the store, and in which order its decisions count."""

from contextlib import closing

import pytest
from tests.decisions import HOUR, NOW, alert, server

from gpuwatch import config, remediation
from gpuwatch.healing import Healing, World
from gpuwatch.records import (
    Mode,
    Plan,
)
from gpuwatch.store import Store
from gpuwatch.troubles import Troubles


class NotedStore(Store):
    """Notes what rows and what series it is asked for."""

    def __init__(self):
        self.rows_asked, self.series_asked = [], []
        super().__init__()

    def _rows(self, query):
        self.rows_asked.append(str(query.compile(compile_kwargs={"literal_binds": True})))
        return super()._rows(query)

    def select(self, matchers, after_ms, upto_ms):
        self.series_asked.append((tuple(matchers), after_ms, upto_ms))
        return super().select(matchers, after_ms, upto_ms)


@pytest.fixture
def store():
    with closing(NotedStore()) as made:
        yield made


def alerts(count):
    return [alert(f"A{n}") for n in range(count)]


def turn(store, firing):
    """One turn of a host whose server is dead."""
    settings = config.Settings(
        servers=[config.ServerSettings(name="m")],
        remediation=config.RemediationSettings(mode=Mode.AUTO),
    )
    world = World(
        servers={"m": server()},
        firing=firing,
        wishes=remediation.Wishes.of({}),
        started_at_ms=NOW - HOUR,
        jumped_at_ms=None,
        now_ms=NOW,
    )
    return Healing(settings, store, {}, Troubles(), supervised=["m"], receivers=[]).turn(world)


def test_ten_alerts_of_one_server_cost_the_store_one_look(store):
    turn(store, alerts(1))
    rows, series = list(store.rows_asked), list(store.series_asked)
    assert len(rows) == len(set(rows))
    assert {"remediation", "start", "revision"} <= {word for row in rows for word in row.split()}
    store.rows_asked.clear()
    store.series_asked.clear()
    turn(store, alerts(10))
    assert (store.rows_asked, store.series_asked) == (rows, series)


def test_what_nothing_depends_on_is_not_looked_at(store):
    turn(store, [])
    assert len(store.rows_asked) == 1  # which remediations are live
    assert store.series_asked == []


def test_a_plan_counts_for_the_alerts_that_are_decided_after_it_in_the_same_turn(store):
    decisions = list(turn(store, alerts(3)).decisions.values())
    assert isinstance(decisions[0], Plan)
    assert [(made.code, made.facts) for made in decisions[1:]] == [("under_way", {"id": decisions[0].id})] * 2
