"""Decides which rows go to a receiver next and what a failure means; never sends.

Rule 1: rows go in their order. A batch in doubt is sent again as it was, never longer: a receiver that has
it already refuses the whole request, and with it what is new.
Rule 2: a batch that is refused is sent again row by row, and only the rows that are refused are dropped;
after 64 in a row whole batches are, until something is taken, for a long outage may leave 100 000 too old.
Rule 3: a channel that refuses us keeps its rows and is tried every minute; anything else waits from one
second to one minute, or as long as the receiver says.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import msgspec

from gpuwatch.errors import GpuwatchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gpuwatch.records import Scrape

MAX_SAMPLES: Final = 5_000  # of a request: about 100 KB before compression
BACKOFF_MIN_MS: Final = 1_000
BACKOFF_MAX_MS: Final = 60_000
BROKEN_RETRY_MS: Final = 60_000
REFUSED_MAX: Final = 64  # more than was sent and not saved as sent when we were killed: seconds of rows
WAIT_MAX_MS: Final = 600_000  # the spool ends in hours; nor may a clock that stepped back silence us


class RemoteWriteError(GpuwatchError):
    """Samples were not taken; they may have arrived unless the receiver answered.

    `permanent`: these samples can never be delivered. `broken`: the channel itself refuses us, so none
    can. `retry_after_ms`: the receiver said how long to wait.
    """

    def __init__(
        self,
        what: str,
        *,
        permanent: bool = False,
        broken: bool = False,
        retry_after_ms: int | None = None,
    ) -> None:
        """All three default to a passing fault."""
        self.permanent = permanent
        self.broken = broken
        self.retry_after_ms = retry_after_ms
        super().__init__(what)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterState:
    """How far a receiver has come and how it goes; a row. `failures` counts those since the last answer.

    `cursor` is the id of the last row that is done with; rows up to `doubtful_id` have been tried.
    `refused` counts rows that were dropped as refused since one was taken.
    """

    cursor: int = 0
    failures: int = 0
    next_attempt_ms: int = 0
    dropped_samples: int = 0
    broken_since_ms: int | None = None
    doubtful_id: int = 0
    row_by_row: bool = False
    refused: int = 0
    error: str = ""


def state_json(state: WriterState) -> str:
    """The row of a receiver's state."""
    return msgspec.json.encode(state).decode()


def writer_state(cursor: int, row: str | None) -> WriterState:
    """A receiver's state from its row; afresh from `cursor` if there is none, or none that can be read."""
    try:
        return replace(msgspec.json.decode(row or "", type=WriterState), cursor=cursor)
    except msgspec.DecodeError:
        return WriterState(cursor=cursor)


def is_due(state: WriterState, now_ms: int) -> bool:
    """Whether the receiver may be tried now."""
    return not 0 < state.next_attempt_ms - now_ms <= WAIT_MAX_MS


def take(
    state: WriterState, rows: Sequence[tuple[int, Scrape]], max_samples: int = MAX_SAMPLES
) -> Sequence[tuple[int, Scrape]]:
    """The first of these rows, ids ascending and all after the cursor, that make the next request.

    At most `max_samples` samples, but one row at least; none if there are no rows.
    """
    doubtful = [row for row in rows if row[0] <= state.doubtful_id]
    if doubtful:
        return doubtful[:1] if state.row_by_row else doubtful
    samples = 0
    for count, (_, scrape) in enumerate(rows):
        samples += len(scrape.values)
        if samples > max_samples and count:
            return rows[:count]
    return rows


def after_waiting(state: WriterState, rows: Sequence[tuple[int, Scrape]], oldest_ms: int) -> WriterState:
    """The state once the first rows are given up that were scraped before `oldest_ms`."""
    late = list(itertools.takewhile(lambda row: row[1].at_ms < oldest_ms, rows))
    if not late:
        return state
    return replace(
        state,
        cursor=late[-1][0],
        dropped_samples=state.dropped_samples + _samples(late),
        row_by_row=state.row_by_row and late[-1][0] < state.doubtful_id,
    )


def after_success(state: WriterState, batch: Sequence[tuple[int, Scrape]]) -> WriterState:
    """The state once the receiver has this batch."""
    return replace(_answered(state, batch[-1][0]), refused=0)


def after_failure(
    state: WriterState,
    error: RemoteWriteError,
    batch: Sequence[tuple[int, Scrape]],
    *,
    now_ms: int,
    jitter: float,
) -> WriterState:
    """The state after an attempt that raised `error`; `jitter` is random, 0 to 1."""
    text = str(error)
    doubtful_id = max(state.doubtful_id, batch[-1][0])
    if error.permanent:
        return replace(_after_refusal(state, batch, doubtful_id), error=text)
    failures = state.failures + 1
    return replace(
        state,
        failures=failures,
        next_attempt_ms=now_ms + _wait_ms(failures, error, jitter),
        broken_since_ms=(state.broken_since_ms or now_ms) if error.broken else state.broken_since_ms,
        doubtful_id=doubtful_id,
        error=text,
    )


def _after_refusal(state: WriterState, batch: Sequence[tuple[int, Scrape]], doubtful_id: int) -> WriterState:
    if len(batch) > 1 and state.refused < REFUSED_MAX:
        return replace(_answered(state, state.cursor), doubtful_id=doubtful_id, row_by_row=True)
    refused = min(REFUSED_MAX, state.refused + len(batch))
    past = replace(
        _answered(state, batch[-1][0]),
        dropped_samples=state.dropped_samples + _samples(batch),
        refused=refused,
    )
    return replace(past, doubtful_id=0, row_by_row=False) if refused == REFUSED_MAX else past


def _answered(state: WriterState, cursor: int) -> WriterState:
    """The receiver has said what it thinks of the rows up to `cursor`: the channel works, the next may go."""
    rest = cursor < state.doubtful_id
    return WriterState(
        cursor=cursor,
        dropped_samples=state.dropped_samples,
        doubtful_id=state.doubtful_id if rest else 0,
        row_by_row=state.row_by_row and rest,
        refused=state.refused,
    )


def _samples(rows: Iterable[tuple[int, Scrape]]) -> int:
    return sum(len(scrape.values) for _, scrape in rows)


def _wait_ms(failures: int, error: RemoteWriteError, jitter: float) -> int:
    ceiling_ms = min(BACKOFF_MAX_MS, BACKOFF_MIN_MS * 2 ** min(failures, 20))
    wait_ms = BROKEN_RETRY_MS if error.broken else int(ceiling_ms * (1 + jitter) / 2)
    return min(WAIT_MAX_MS, max(wait_ms, error.retry_after_ms or 0))
