"""Which regions are worth a visit now, under a budget of Flickr calls, and whether new data is worth a training.

What is known about a region is read in instance.py; what is decided here, automation.py and backfills.py carry out.
"""

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

#: What a run came to no good end with is tried again after so long: by then a service may be well again.
RETRY_AFTER = timedelta(days=1)

#: What a region is taken to gain a day, at least: it may have woken up since, and none should wait for ever.
LEAST_PHOTOS_PER_DAY = 1.0


@dataclass(frozen=True)
class RegionState:
    """What is known about a region.

    Attributes:
        key: the region's key.
        searched_at: when its last search ended, UTC; None: never.
        is_whole_search: whether that search asked for more than news.
        calls: Flickr calls that it took; None: unknown.
        photos_per_day: uploads a day in the year before that search.
        failed_at: when its last run began, UTC, if that came to no good end.
        is_busy: whether a run of it is queued or in progress, or a backfill will start one.
    """

    key: str
    searched_at: datetime | None = None
    is_whole_search: bool = False
    calls: int | None = None
    photos_per_day: float = 0.0
    failed_at: datetime | None = None
    is_busy: bool = False

    @property
    def waits_since(self) -> datetime | None:
        """When it was searched or tried last, whichever is later; None: never."""
        return max((at for at in (self.searched_at, self.failed_at) if at is not None), default=None)


@dataclass(frozen=True)
class Budget:
    """What one tick may start.

    Attributes:
        calls: Flickr calls until the next tick.
        regions: regions that are busy at a time.
    """

    calls: int
    regions: int


@dataclass(frozen=True)
class Choice:
    """A region that was chosen.

    Attributes:
        key: its key.
        calls: Flickr calls that it is expected to take.
        reason: `missing`, `failed` or `stale`.
    """

    key: str
    calls: int
    reason: str


def expected_calls(states: Collection[RegionState], locations: int) -> dict[str, int]:
    """Flickr calls that the next search of each region is expected to take.

    Args:
        states: all regions.
        locations: search locations of a region; each takes a call at least.

    Returns:
        By key: as many as its last search if that asked for news too; else, for a first search, the median of
        the first searches that are known; else one for each location.
    """
    first = [state.calls for state in states if state.is_whole_search and state.calls is not None]
    of_first_search = max(locations, round(statistics.median(first))) if first else locations
    return {
        state.key: of_first_search
        if state.searched_at is None
        else max(locations, 0 if state.is_whole_search else state.calls or 0)
        for state in states
    }


def order(states: Collection[RegionState], now: datetime) -> list[RegionState]:
    """Regions by how much a visit is worth.

    Args:
        states: any regions.
        now: the present, UTC.

    Returns:
        Those that no run has tried, by key; then by the photos that are expected there since the last visit, most
        first. A region that failed before it was ever searched is expected to gain as much as the busiest one.
    """
    most = max((state.photos_per_day for state in states), default=0.0)

    def worth(state: RegionState) -> tuple[bool, float, str]:
        since = state.waits_since
        if since is None:
            return False, 0.0, state.key
        per_day = max(most if state.searched_at is None else state.photos_per_day, LEAST_PHOTOS_PER_DAY)
        return True, -per_day * ((now - since) / timedelta(days=1)), state.key

    return sorted(states, key=worth)


def why_due(state: RegionState, now: datetime, fresh: timedelta) -> str | None:
    """Why a region is due for a visit.

    Args:
        state: the region.
        now: the present, UTC.
        fresh: how long a search is good for.

    Returns:
        `missing`, `failed` or `stale`; None if it is not due, or busy.
    """
    if state.is_busy:
        return None
    if state.failed_at is not None:
        return "failed" if now - state.failed_at >= RETRY_AFTER else None
    if state.searched_at is None:
        return "missing"
    return "stale" if now - state.searched_at >= fresh else None


def choose(
    states: Collection[RegionState], budget: Budget, now: datetime, *, locations: int, fresh: timedelta
) -> list[Choice]:
    """The regions that a tick starts.

    Strictly in `order`: where the next one does not fit any more, nothing smaller goes before it, so each gets its
    turn. A region that takes more than the whole budget counts as the whole budget.

    Args:
        states: all regions.
        budget: what may be spent between two ticks. Regions that are busy, or were searched after `now` (this tick
            is being repeated), count against it.
        now: time of the tick, UTC.
        locations: search locations of a region.
        fresh: how long a search is good for.

    Returns:
        Choices, the best first; the same for the same arguments, whatever the order of `states`.
    """
    calls = {key: min(cost, budget.calls) for key, cost in expected_calls(states, locations).items()}
    spent = [s.key for s in states if s.is_busy or (s.searched_at is not None and s.searched_at > now)]
    calls_left, regions_left = budget.calls - sum(calls[key] for key in spent), budget.regions - len(spent)
    due = {state: reason for state in states if (reason := why_due(state, now, fresh)) is not None}
    chosen: list[Choice] = []
    for state in order(due, now):
        calls_left -= calls[state.key]
        if calls_left < 0 or len(chosen) >= regions_left:
            break
        chosen.append(Choice(state.key, calls[state.key], due[state]))
    return chosen


def to_backfill(
    states: Collection[RegionState],
    now: datetime,
    *,
    stale: timedelta,
    locations: int,
    limit: int | None = None,
) -> list[Choice]:
    """The regions that a backfill visits, without a budget: a person has asked for it.

    Args:
        states: the regions that are asked for.
        now: the present, UTC.
        stale: regions searched more recently are left out; failed ones are not, busy ones always.
        locations: search locations of a region.
        limit: how many at most.

    Returns:
        Choices, the best first.
    """
    calls = expected_calls(states, locations)
    chosen = []
    for state in order(states, now):
        reason = "failed" if state.failed_at and not state.is_busy else why_due(state, now, stale)
        if reason is not None:
            chosen.append(Choice(state.key, calls[state.key], reason))
    return chosen[:limit]


def why_not_now(
    current: str | None, used: str | None, last: datetime | None, now: datetime, interval: timedelta
) -> str | None:
    """Why something is not made anew from its input, in words.

    Args:
        current: fingerprint of the input as it is; None: there is none.
        used: fingerprint of the input that it was made from; None: it was not made yet, or nobody knows.
        last: when it was made last, UTC; None: never.
        now: the present, UTC.
        interval: the least time between two.

    Returns:
        The reason; None if it is time.
    """
    if current is None:
        return "there is nothing to make it from"
    if current == used:
        return "its input has not changed"
    if last is not None and now - last < interval:
        pause = f"{interval / timedelta(hours=1):g} hours"
        return f"it was made {last:%Y-%m-%d %H:%M} UTC, and not again within {pause}"
    return None


def why_not_again(run_id: str, failed_at: datetime, now: datetime) -> str | None:
    """Why something that a run failed to make is not tried again, in words.

    Args:
        run_id: of that run.
        failed_at: when it was created, UTC.
        now: the present, UTC.

    Returns:
        The reason; None if it is time.
    """
    if now - failed_at < RETRY_AFTER:
        return (
            f"run {run_id[:8]} came to no good end: see why and materialise it, or wait until "
            f"{failed_at + RETRY_AFTER:%Y-%m-%d %H:%M} UTC"
        )
    return None


def hours(choices: Sequence[Choice], calls_per_hour: int) -> float:
    """How long the searches of regions take at Flickr's pace, hours."""
    return sum(choice.calls for choice in choices) / calls_per_hour
