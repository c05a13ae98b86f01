"""Which message goes next, and what a failure means."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuwatch.errors import NotifyError
from gpuwatch.notify import (
    Pace,
    ReceiverState,
    after_failure,
    after_success,
    expired,
    next_due,
    receiver_state,
    state_json,
)
from gpuwatch.records import Notification

NOW_MS = 1_763_634_665_000
MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
SLACK = Pace(burst=3, per_ms=3000)
FRESH = ReceiverState(name="ops")


def note(number=1, created_at_ms=NOW_MS):
    return Notification(
        id=f"N-{number}",
        receiver="ops",
        body="{}",
        created_at_ms=created_at_ms,
        next_attempt_at_ms=created_at_ms,
    )


def failed(error, state=FRESH, notification=None, now_ms=NOW_MS, jitter=1.0):
    return after_failure(notification or note(), state, error, now_ms, jitter)


# Order and pace


def test_the_oldest_message_goes_first():
    assert next_due(FRESH, [note(1), note(2)], [], SLACK, NOW_MS) == note(1)


def test_nothing_is_due_when_nothing_waits():
    assert next_due(FRESH, [], [], SLACK, NOW_MS) is None


def test_a_resting_receiver_gets_nothing_not_even_newer_messages():
    resting = replace(FRESH, not_before_ms=NOW_MS + 1)
    assert next_due(resting, [note(1), note(2)], [], SLACK, NOW_MS) is None
    assert next_due(resting, [note(1), note(2)], [], SLACK, NOW_MS + 1) == note(1)


@pytest.mark.parametrize(
    ("ago_ms", "due"),
    [
        ([], True),
        ([0, 0], True),
        ([0, 10, 20], False),
        ([2999, 10, 20], False),
        ([3000, 10, 20], True),  # the oldest has left the span
        ([-5000, -5000, -5000], True),  # sent in the future: the clock stepped back, nothing is silenced
    ],
)
def test_no_more_than_the_burst_goes_out_in_a_span(ago_ms, due):
    sent_ms = [NOW_MS - ago for ago in ago_ms]
    assert (next_due(FRESH, [note()], sent_ms, SLACK, NOW_MS) is not None) is due


def test_a_clock_that_stepped_back_silences_a_receiver_for_an_hour_at_most():
    state = replace(FRESH, not_before_ms=NOW_MS)
    assert next_due(state, [note()], [], SLACK, NOW_MS - HOUR_MS) is None
    assert next_due(state, [note()], [], SLACK, NOW_MS - 30 * 24 * HOUR_MS) == note()


# Success


def test_success_clears_what_went_wrong_before():
    state = ReceiverState(name="ops", not_before_ms=5, failures=7, broken_since_ms=3, error="HTTP 404")
    sent, fresh = after_success(replace(note(), error="HTTP 503", attempts=2), state, NOW_MS)
    assert fresh == FRESH
    assert sent == replace(note(), sent_at_ms=NOW_MS, attempts=3)


# Failure


@pytest.mark.parametrize(
    ("failures_before", "jitter", "wait_ms"),
    [
        (0, 1.0, 2000),
        (1, 1.0, 4000),
        (4, 0.5, 16_000),
        (0, 0.0, 1000),  # never sooner than a second
        (8, 1.0, 300_000),
        (5000, 1.0, 300_000),
    ],
)
def test_a_passing_fault_waits_longer_each_time_up_to_five_minutes(failures_before, jitter, wait_ms):
    tried, state = failed(NotifyError("HTTP 503"), replace(FRESH, failures=failures_before), jitter=jitter)
    assert state.not_before_ms == tried.next_attempt_at_ms == NOW_MS + wait_ms
    assert state.failures == failures_before + 1
    assert (tried.attempts, tried.error, tried.gave_up_at_ms) == (1, "HTTP 503", None)


def test_a_receiver_that_says_how_long_to_wait_is_heeded():
    _, state = failed(NotifyError("too fast", retry_after_ms=600_000), jitter=0.0)
    assert state.not_before_ms == NOW_MS + 600_000


def test_a_receiver_cannot_silence_gpuwatch_for_more_than_an_hour():
    _, state = failed(NotifyError("later", retry_after_ms=10**12))
    assert state.not_before_ms == NOW_MS + HOUR_MS


def test_a_message_that_can_never_be_delivered_is_given_up_and_the_next_goes_on():
    given_up, state = failed(NotifyError("invalid_blocks", permanent=True), replace(FRESH, failures=3))
    assert given_up.gave_up_at_ms == NOW_MS
    assert (state.failures, state.error) == (0, "invalid_blocks")
    assert next_due(state, [note(2)], [], SLACK, NOW_MS) == note(2)


def test_a_broken_channel_keeps_its_messages_and_is_tried_every_five_minutes():
    state, message, now_ms = FRESH, note(), NOW_MS
    for _ in range(20):
        message, state = failed(NotifyError("HTTP 404", broken=True), state, message, now_ms, jitter=0.1)
        assert state.broken_since_ms == NOW_MS
        assert message.gave_up_at_ms is None
        assert next_due(state, [message], [], SLACK, now_ms + 5 * MINUTE_MS - 1) is None
        now_ms += 5 * MINUTE_MS
        assert next_due(state, [message], [], SLACK, now_ms) == message


def test_a_passing_fault_does_not_end_the_time_a_channel_has_been_broken():
    broken = replace(FRESH, broken_since_ms=NOW_MS - 5)
    assert failed(NotifyError("no route"), broken)[1].broken_since_ms == NOW_MS - 5


def test_a_message_a_day_old_is_given_up():
    old = note(created_at_ms=NOW_MS - 24 * HOUR_MS)
    assert failed(NotifyError("HTTP 503"), notification=old)[0].gave_up_at_ms == NOW_MS
    assert (
        failed(NotifyError("HTTP 503"), notification=replace(old, created_at_ms=NOW_MS - 23 * HOUR_MS))[
            0
        ].gave_up_at_ms
        is None
    )


def test_messages_that_grew_old_behind_a_broken_channel_are_given_up_without_a_try():
    old, young = note(1, NOW_MS - 25 * HOUR_MS), note(2)
    (gone,) = expired([old, young], NOW_MS)
    assert (gone.id, gone.gave_up_at_ms, gone.attempts) == ("N-1", NOW_MS, 0)
    assert "24 h" in gone.error


def test_no_secret_of_an_error_reaches_a_row():
    error = NotifyError("POST https://hooks.slack.com/services/T0/B0/zzz failed")
    tried, state = failed(error)
    assert "zzz" not in tried.error + state.error


def test_the_state_of_a_receiver_survives_as_a_row():
    state = ReceiverState(name="ops", not_before_ms=5, failures=7, broken_since_ms=3, error="断")
    assert receiver_state("ops", state_json(state)) == state


@pytest.mark.parametrize("row", [None, "", "{", "[]", '{"name": 1}'])
def test_a_receiver_without_a_row_that_can_be_read_starts_afresh(row):
    assert receiver_state("ops", row) == FRESH


FAULTS = st.sampled_from(
    [
        None,
        NotifyError("passing"),
        NotifyError("unsure", unsure=True),
        NotifyError("slow down", retry_after_ms=30_000),
        NotifyError("broken", broken=True),
        NotifyError("never", permanent=True),
    ]
)


@given(st.lists(FAULTS, max_size=60), st.floats(0, 1))
def test_messages_of_one_receiver_go_out_strictly_oldest_first(faults, jitter):
    """Whatever fails and however: what is delivered is in order, and what is missing was given up."""
    state, now_ms = FRESH, NOW_MS
    unsent = [note(number) for number in range(10)]
    sent, given_up = [], []
    for fault in [*faults, *[None] * 10]:
        now_ms = max(now_ms + 1, state.not_before_ms)
        due = next_due(state, unsent, [], SLACK, now_ms)
        if due is None:
            break
        if fault is None:
            done, state = after_success(due, state, now_ms)
            sent.append(done)
        else:
            done, state = after_failure(due, state, fault, now_ms, jitter)
        given_up += [done] if done.gave_up_at_ms else []
        unsent = unsent[1:] if done.sent_at_ms or done.gave_up_at_ms else [done, *unsent[1:]]
    numbers = [int(each.id[2:]) for each in sent]
    assert numbers == sorted(numbers)
    assert len(sent) + len(given_up) == 10
