"""Which of vLLM's options to change for a class of failure: least first, one at a time. Pure; starts nothing.

Rule 1: an option is ours to change only if the operator gave it bounds, and never beyond them.
Rule 2: a set of arguments that failed is never proposed again.
Rule 3: an option is left alone whose present value is not known, or that the command line sets over the file.

The two kinds of "out of memory" need opposite cures: what is missing at a start is the share, or room in
it; what is missing in life is memory outside of it. To add a class, add a row to `LADDERS`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from gpuwatch.records import Argument, Considered

SHARE: Final = "gpu_memory_utilization"
_LENGTH: Final = "max_model_len"
_TOKENS: Final = "max_num_batched_tokens"
_SEQUENCES: Final = "max_num_seqs"
_WATERMARK: Final = "watermark"
_ITEMS: Final = "limit_mm_per_prompt"
_PROCESSOR: Final = "mm_processor_kwargs"
_PIXELS: Final = "max_pixels"
_MODEL: Final = "model"

_DEFAULT_SHARE: Final = 0.92  # of vLLM 0.20 to 0.33
_GIB: Final = 2**30
# From this size of a GPU on: batched tokens and sequences that `vllm serve` takes by itself. An A100 of 80 GB
# takes the last row, so every GPU below 100 GiB is held to be one: too low a guess only changes more.
_DEFAULTS: Final = ((160 * _GIB, 16_384, 1024), (100 * _GIB, 8192, 1024), (0, 2048, 256))
MARGIN: Final = 0.02
"""Of a GPU's memory: what is left free beside a share that was chosen by what is free."""
_SHARE_UP: Final = 0.05
_SHARE_DOWN: Final = 0.03
_LENGTH_GRAIN: Final = 16
_AUTO_FIT: Final = -1
_WATERMARK_HELD: Final = 0.02
_WATERMARK_SINCE: Final = (0, 24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What went wrong with which arguments, and what there is to go by.

    `kind` is a class of `servers.starts.failures`, or `preemption`, or `multimodal_peak`, with its `facts`.
    `arguments` are those of the revision, `ran` what the start logged, as text. Memory is of each GPU of the
    server, `free_bytes` while the server holds none of it. `failed` are sets of arguments.
    """

    kind: str
    arguments: Mapping[str, Argument]
    facts: Mapping[str, str] = field(default_factory=dict)
    ran: Mapping[str, str] = field(default_factory=dict)
    version: str = ""
    free_bytes: Mapping[str, int] = field(default_factory=dict)
    total_bytes: Mapping[str, int] = field(default_factory=dict)
    running: int | None = None
    bounds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    failed: Sequence[Mapping[str, Argument]] = ()
    quantised_model: str = ""

    def number(self, option: str) -> float | None:
        """The present value of an option, if it is a number and known."""
        value = self.arguments.get(option)
        if value is None and option not in self.arguments:
            value = _read(self.ran.get(option, ""))
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def fact(self, name: str) -> float | None:
        """A figure of the failure."""
        value = _read(self.facts.get(name, ""))
        return value if isinstance(value, int | float) else None


Updates: TypeAlias = Mapping[str, Argument]
Proposal: TypeAlias = Updates | str
"""The options to change, or the code of the reason why this one cannot."""


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to change `option`. What an operator named for this very use needs no bounds."""

    option: str
    propose: Callable[[Trouble], Proposal]
    needs_bounds: bool = True


def next_change(trouble: Trouble) -> tuple[dict[str, Argument] | None, tuple[Considered, ...]]:
    """The arguments to try next, None if there are none; and each option that was looked at, least first."""
    considered = []
    for rung in LADDERS.get(trouble.kind, ()):
        proposal = _proposal(rung, trouble)
        if isinstance(proposal, str):
            considered.append(Considered(option=rung.option, code=proposal, facts=_from(trouble, rung)))
            continue
        after = {**trouble.arguments, **proposal}
        code = _objection(rung, trouble, after) or "chosen"
        facts = {**_from(trouble, rung), "to": _said(after[rung.option])}
        considered.append(Considered(option=rung.option, code=code, facts=facts))
        if code == "chosen":
            return after, tuple(considered)
    return None, tuple(considered)


def share_of(arguments: Mapping[str, Argument]) -> float | None:
    """The share of each GPU that a server with these arguments takes; None where it does not decide."""
    if arguments.get("kv_cache_memory_bytes") is not None:
        return None
    value = arguments.get(SHARE, _DEFAULT_SHARE)
    return value if isinstance(value, int | float) else None


def free_share(free_bytes: Mapping[str, int], total_bytes: Mapping[str, int]) -> float | None:
    """The free part of that GPU which has the least of it; None if it is not known of each."""
    shares = [free_bytes[gpu] / total for gpu, total in total_bytes.items() if total and gpu in free_bytes]
    return min(shares) if shares and len(shares) == len(total_bytes) else None


def _proposal(rung: Rung, trouble: Trouble) -> Proposal:
    if rung.needs_bounds and rung.option not in trouble.bounds:
        return "no_bounds"
    if trouble.ran.get(rung.option) is not None and rung.option not in trouble.arguments:
        return "on_command_line"
    return rung.propose(trouble)


def _objection(rung: Rung, trouble: Trouble, after: Mapping[str, Argument]) -> str:
    if rung.needs_bounds:
        least, most = trouble.bounds[rung.option]
        if not all(least <= figure <= most for figure in _figures(after[rung.option])):
            return "out_of_bounds"
    return "failed_already" if any(after == failed for failed in trouble.failed) else ""


def _figures(value: Argument) -> list[float]:
    """The numbers of a value that bounds speak of: itself, counts by kind, or the most pixels."""
    if isinstance(value, Mapping):
        inner = [value[_PIXELS]] if _PIXELS in value else [_count(item) for item in value.values()]
        return [float(figure) for figure in inner if figure is not None]
    return [float(value)]


# -- how each option is changed; what is proposed is checked against bounds and failures above ---------------


def _share_that_is_free(t: Trouble) -> Proposal:
    present, free = _share(t), _free(t)
    if present is None or free is None:
        return "not_known"
    share = _hundredths(free - MARGIN)
    return {SHARE: share} if 0 < share < present else "no_change"


def _share_that_fits(t: Trouble) -> Proposal:
    """As much more as the failure says is missing; a step where it does not."""
    needed, available = t.fact("needed_bytes"), t.fact("available_bytes")
    if needed is None or available is None or not t.total_bytes:
        return _share_up(t, _SHARE_UP)
    return _share_up(t, math.ceil((needed - available) / min(t.total_bytes.values()) * 100) / 100)


def _share_step_up(t: Trouble) -> Proposal:
    return _share_up(t, _SHARE_UP)


def _share_up(t: Trouble, step: float) -> Proposal:
    present, free = _share(t), _free(t)
    if present is None or free is None:
        return "not_known"
    share = _hundredths(present + max(step, 0.01))
    return {SHARE: share} if share <= free else "share_not_free"


def _share_down(t: Trouble) -> Proposal:
    present = _share(t)
    if present is None:
        return "not_known"
    share = _hundredths(present - _SHARE_DOWN)
    return {SHARE: share} if share > 0 else "no_change"


def _length_that_fits(t: Trouble) -> Proposal:
    longest = t.fact("longest_model_len")
    wanted, needed, available = (
        t.fact("max_model_len"),
        t.fact("needed_bytes"),
        t.fact("available_bytes"),
    )
    if longest is None and wanted and needed and available is not None:
        longest = wanted * available / needed
    if longest is None:
        return "not_known"
    length = int(longest) // _LENGTH_GRAIN * _LENGTH_GRAIN
    return {_LENGTH: length} if length > 0 else "no_change"


def _length_auto(t: Trouble) -> Proposal:
    """VLLM's own fit; bounds whose least is -1 allow it."""
    return "no_change" if t.number(_LENGTH) == _AUTO_FIT else {_LENGTH: _AUTO_FIT}


def _length_halved(t: Trouble) -> Proposal:
    present = t.number(_LENGTH)
    if present is None:
        return "not_known"
    length = int(present) // 2 // _LENGTH_GRAIN * _LENGTH_GRAIN
    return {_LENGTH: length} if length > 0 else "no_change"


def _tokens_halved(t: Trouble) -> Proposal:
    """Never fewer than sequences, which vLLM refuses."""
    present, sequences = _tokens(t), _sequences(t)
    if present is None:
        return "not_known"
    tokens = max(int(present) // 2, int(sequences or 1))
    return {_TOKENS: tokens} if tokens < present else "no_change"


def _sequences_halved(t: Trouble) -> Proposal:
    present = _sequences(t)
    if present is None:
        return "not_known"
    return {_SEQUENCES: int(present) // 2} if present > 1 else "no_change"


def _sequences_of_what_ran(t: Trouble) -> Proposal:
    """Three quarters of what ran while requests were preempted."""
    present = t.number(_SEQUENCES)
    ran = present if t.running is None else t.running
    if ran is None:
        return "not_known"
    sequences = max(int(ran) * 3 // 4, 1)
    return {_SEQUENCES: sequences} if present is None or sequences < present else "no_change"


def _watermark(t: Trouble) -> Proposal:
    found = re.match(r"v?(\d+)\.(\d+)", t.version)
    if not found or (int(found[1]), int(found[2])) < _WATERMARK_SINCE:
        return "not_offered"
    return {_WATERMARK: _WATERMARK_HELD} if (t.number(_WATERMARK) or 0) < _WATERMARK_HELD else "no_change"


def _items_halved(t: Trouble) -> Proposal:
    """Images, videos and the like of one request."""
    present = t.arguments.get(_ITEMS)
    if not isinstance(present, Mapping):
        return "not_known"
    halved = {kind: _half_of(item) for kind, item in present.items()}
    return {_ITEMS: halved} if halved != dict(present) else "no_change"


def _pixels_halved(t: Trouble) -> Proposal:
    present = t.arguments.get(_PROCESSOR)
    pixels = present.get(_PIXELS) if isinstance(present, Mapping) else None
    if not isinstance(present, Mapping) or not isinstance(pixels, int):
        return "not_known"
    return {_PROCESSOR: {**present, _PIXELS: pixels // 2}}


def _quantised(t: Trouble) -> Proposal:
    """The model that the operator named, under the name that clients know."""
    present = t.arguments.get(_MODEL)
    if not t.quantised_model:
        return "not_named"
    if not isinstance(present, str):
        return "not_known"
    if present == t.quantised_model:
        return "no_change"
    return {_MODEL: t.quantised_model, "served_model_name": t.arguments.get("served_model_name") or present}


_LAST: Final = Rung(_MODEL, _quantised, needs_bounds=False)
_LESS_IN_LIFE: Final = (
    Rung(SHARE, _share_down),
    Rung(_TOKENS, _tokens_halved),
    Rung(_SEQUENCES, _sequences_halved),
    _LAST,
)
_MORE_AT_START: Final = (
    Rung(SHARE, _share_step_up),
    Rung(_LENGTH, _length_halved),
    Rung(_TOKENS, _tokens_halved),
    _LAST,
)
LADDERS: Final[Mapping[str, tuple[Rung, ...]]] = {
    "memory_share_not_free": (Rung(SHARE, _share_that_is_free),),  # which a smaller model would want as well
    "kv_cache_too_small": (
        Rung(_LENGTH, _length_that_fits),
        Rung(_LENGTH, _length_auto),
        Rung(SHARE, _share_that_fits),
        _LAST,
    ),
    "no_memory_for_cache": _MORE_AT_START,
    "auto_fit_failed": _MORE_AT_START,
    "runtime_oom": _LESS_IN_LIFE,
    "multimodal_peak": (Rung(_ITEMS, _items_halved), Rung(_PROCESSOR, _pixels_halved), *_LESS_IN_LIFE),
    "preemption": (Rung(_SEQUENCES, _sequences_of_what_ran), Rung(_WATERMARK, _watermark)),
}
"""The rungs of each class that other arguments can cure, least first."""


def _share(t: Trouble) -> float | None:
    return share_of({SHARE: t.number(SHARE) or _DEFAULT_SHARE, **t.arguments})


def _free(t: Trouble) -> float | None:
    """What is seen now; what the failure said where nothing is seen."""
    free, total = t.fact("free_bytes"), t.fact("total_bytes")
    if t.free_bytes or free is None or not total:
        return free_share(t.free_bytes, t.total_bytes)
    return free / total


def _tokens(t: Trouble) -> float | None:
    return t.number(_TOKENS) or _default(t, 1)


def _sequences(t: Trouble) -> float | None:
    return t.number(_SEQUENCES) or _default(t, 2)


def _default(t: Trouble, column: int) -> float | None:
    if not t.total_bytes:
        return None
    smallest = min(t.total_bytes.values())
    return next(row[column] for row in _DEFAULTS if smallest >= row[0])


def _hundredths(share: float) -> float:
    """Rounded down; what differs by less than arithmetic's error is the same."""
    return math.floor(round(share * 100, 6)) / 100


def _count(item: Argument) -> float | None:
    """Of `limit_mm_per_prompt`: `image: 4`, or `image: {count: 4, …}`."""
    value = item.get("count") if isinstance(item, Mapping) else item
    return value if isinstance(value, int) else None


def _half_of(item: Argument) -> Argument:
    count = _count(item)
    if count is None or count <= 1:
        return item
    half = int(count) // 2
    return {**item, "count": half} if isinstance(item, Mapping) else half


def _from(t: Trouble, rung: Rung) -> dict[str, str]:
    present = t.arguments.get(rung.option, t.ran.get(rung.option))
    return {} if present is None else {"from": _said(present)}


def _said(value: Argument) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _read(text: str) -> Argument:
    """A number as it was logged; None for anything else."""
    try:
        return json.loads(text)
    except ValueError:
        return None
