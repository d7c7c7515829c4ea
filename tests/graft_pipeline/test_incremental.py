"""Which regions a tick starts: never beyond its budget, the same each time, and each gets its turn."""

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft_pipeline.incremental import (
    RETRY_AFTER,
    Budget,
    RegionState,
    choose,
    expected_calls,
    order,
    to_backfill,
    why_not_again,
    why_not_now,
)

NOW = datetime(2024, 5, 1, 12, tzinfo=UTC)
FRESH = timedelta(days=7)
LOCATIONS = 10
moments = st.none() | st.integers(-400, 3).map(lambda days: NOW + timedelta(days=days))
states = st.lists(
    st.builds(
        RegionState,
        key=st.integers(0, 99).map(lambda number: f"N{number:02d}E000"),
        searched_at=moments,
        is_whole_search=st.booleans(),
        calls=st.none() | st.integers(0, 500),
        photos_per_day=st.floats(0, 1000),
        failed_at=moments,
        is_busy=st.booleans(),
    ),
    max_size=40,
    unique_by=lambda state: state.key,
)
budgets = st.builds(Budget, calls=st.integers(0, 2000), regions=st.integers(1, 30))


def chosen(some: list[RegionState], budget: Budget) -> list[str]:
    return [choice.key for choice in choose(some, budget, NOW, locations=LOCATIONS, fresh=FRESH)]


@given(states, budgets)
def test_no_tick_goes_beyond_its_budget(some: list[RegionState], budget: Budget) -> None:
    choices = choose(some, budget, NOW, locations=LOCATIONS, fresh=FRESH)
    costs = expected_calls(some, LOCATIONS)
    spent = [s.key for s in some if s.is_busy or (s.searched_at and s.searched_at > NOW)]
    if choices:
        assert (
            sum(min(costs[key], budget.calls) for key in spent) + sum(c.calls for c in choices)
            <= budget.calls
        )
        assert len(spent) + len(choices) <= budget.regions


@given(states, budgets)
def test_what_is_busy_or_fresh_or_failed_just_now_is_left_alone(
    some: list[RegionState], budget: Budget
) -> None:
    by_key = {state.key: state for state in some}
    for key in chosen(some, budget):
        state = by_key[key]
        assert not state.is_busy
        assert state.failed_at is None or NOW - state.failed_at >= RETRY_AFTER
        assert state.failed_at or state.searched_at is None or NOW - state.searched_at >= FRESH


@given(states, budgets, st.randoms())
def test_the_choice_does_not_depend_on_the_order_of_the_states(
    some: list[RegionState], budget: Budget, dice: random.Random
) -> None:
    shuffled = list(some)
    dice.shuffle(shuffled)
    assert chosen(some, budget) == chosen(shuffled, budget)


@given(states, budgets)
def test_a_tick_that_is_repeated_starts_nothing_beyond_the_budget_of_one(
    some: list[RegionState], budget: Budget
) -> None:
    """The first evaluation's runs are queued, some are over already."""
    first = chosen(some, budget)
    later = [
        replace(
            state,
            is_busy=state.is_busy or (state.key in first and index % 2 == 0),
            searched_at=NOW + timedelta(seconds=9) if state.key in first and index % 2 else state.searched_at,
            failed_at=None if state.key in first else state.failed_at,
        )
        for index, state in enumerate(some)
    ]
    assert not set(chosen(later, budget)) & set(first)
    before = sum(s.is_busy or bool(s.searched_at and s.searched_at > NOW) for s in some)
    assert before > budget.regions or len(first) + len(chosen(later, budget)) + before <= budget.regions


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 20), st.integers(1, 300), st.sampled_from(["well", "well", "fails"])),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 200),
)
def test_every_region_is_picked_again_and_again(regions: list[tuple[float, int, str]], calls: int) -> None:
    """Neither busy places, nor dear ones, nor those that always fail starve another."""
    known = [RegionState(f"N{n:02d}E000", photos_per_day=rate) for n, (rate, _, _) in enumerate(regions)]
    picked = dict.fromkeys((state.key for state in known), 0)
    now = NOW
    # A pick resets what is expected; the rarest wins at last, after some ticks for each photo that others gain more.
    for _ in range(25 * len(regions) + 60):
        for choice in choose(known, Budget(calls, regions=3), now, locations=1, fresh=timedelta(hours=12)):
            picked[choice.key] += 1
            index = int(choice.key[1:3])
            _, cost, outcome = regions[index]
            known[index] = (
                replace(known[index], searched_at=now, is_whole_search=False, calls=cost, failed_at=None)
                if outcome == "well"
                else replace(known[index], failed_at=now)
            )
        now += timedelta(days=1)
    assert min(picked.values()) >= 2


def test_missing_regions_come_first_then_those_with_most_news() -> None:
    ago = {days: NOW - timedelta(days=days) for days in (10, 20, 40)}
    some = [
        RegionState("N01E000", searched_at=ago[10], photos_per_day=30),
        RegionState("N02E000", searched_at=ago[40], photos_per_day=5),
        RegionState("N03E000"),
        RegionState("N04E000", searched_at=ago[20], photos_per_day=20),
    ]
    assert [s.key[:3] for s in order(some, NOW)] == ["N03", "N04", "N01", "N02"]


def test_a_first_search_costs_what_others_did_and_a_later_one_what_the_last_did() -> None:
    some = [
        RegionState("N01E000", searched_at=NOW, is_whole_search=True, calls=300),
        RegionState("N02E000", searched_at=NOW, is_whole_search=True, calls=500),
        RegionState("N03E000", searched_at=NOW, calls=17),
        RegionState("N04E000"),
    ]
    assert list(expected_calls(some, LOCATIONS).values()) == [LOCATIONS, LOCATIONS, 17, 400]
    assert expected_calls(some[3:], LOCATIONS) == {"N04E000": LOCATIONS}


def test_a_backfill_takes_missing_failed_and_stale_regions_but_no_busy_ones() -> None:
    some = [
        RegionState("N01E000"),
        RegionState("N02E000", is_busy=True),
        RegionState("N03E000", searched_at=NOW - timedelta(days=40)),
        RegionState("N04E000", searched_at=NOW - timedelta(days=20)),
        RegionState("N05E000", searched_at=NOW - timedelta(days=2), failed_at=NOW - timedelta(hours=1)),
    ]
    choices = to_backfill(some, NOW, stale=timedelta(days=30), locations=LOCATIONS)
    assert {c.key[:3]: c.reason for c in choices} == {"N01": "missing", "N03": "stale", "N05": "failed"}
    assert to_backfill(some, NOW, stale=timedelta(days=30), locations=LOCATIONS, limit=2) == choices[:2]


@pytest.mark.parametrize(
    ("current", "used", "hours_ago", "words"),
    [
        (None, None, None, "nothing to make it from"),
        ("a", "a", 99, "has not changed"),
        ("b", "a", 1, "not again within 24 hours"),
        ("b", "a", 25, None),
        ("a", None, None, None),
    ],
)
def test_training_waits_for_changed_input_and_its_interval(
    current: str | None, used: str | None, hours_ago: int | None, words: str | None
) -> None:
    last = None if hours_ago is None else NOW - timedelta(hours=hours_ago)
    reason = why_not_now(current, used, last, NOW, timedelta(hours=24))
    assert reason is None if words is None else words in str(reason)


def test_what_failed_is_tried_again_after_a_day() -> None:
    assert "run 01234567 " in str(why_not_again("0123456789", NOW, NOW + RETRY_AFTER / 2))
    assert why_not_again("0123456789", NOW, NOW + RETRY_AFTER) is None
