import threading
import time
from contextlib import closing
from datetime import date

import pyarrow as pa
import pytest

from graft_pipeline.errors import ServiceError
from graft_pipeline.fetching import (
    MAX_BACK_OFF_DAYS,
    MOST_WAITING_BYTES,
    most_ahead,
    ordered_map,
    pending_rows,
    retry_day,
)


def test_results_come_in_order_whatever_the_timing() -> None:
    def call(number: int) -> int:
        time.sleep(0.002 * (7 * number % 5))
        return number * number

    with closing(ordered_map(call, range(60), 8)) as results:
        assert list(results) == [(number, number * number) for number in range(60)]


@pytest.mark.parametrize(("ahead", "most"), [(None, 8), (3, 3), (40, 40)])
def test_items_are_taken_no_faster_than_needed(ahead: int | None, most: int) -> None:
    taken = []

    def items() -> object:
        for number in range(1000):
            taken.append(number)
            yield number

    with closing(ordered_map(lambda number: number, items(), 2, ahead)) as results:  # type: ignore[arg-type]
        next(results)
        assert len(taken) == most
    assert len(taken) == most


def test_one_late_item_holds_up_no_other_within_reach() -> None:
    others = threading.Semaphore(0)

    def call(number: int) -> int:
        if number == 0:
            # Late until 79 others are done, which four a thread would not allow.
            assert all(others.acquire(timeout=30) for _ in range(79))
        else:
            others.release()
        return number

    assert most_ahead(5, 10_000) == 80
    with closing(ordered_map(call, range(100), 5, most_ahead(5, 10_000))) as results:
        assert [number for _, number in results] == list(range(100))


def test_memory_bounds_how_far_ahead_is_fetched() -> None:
    assert most_ahead(40, MOST_WAITING_BYTES // 300) == 300
    assert most_ahead(40, MOST_WAITING_BYTES) == 160


def test_calls_run_at_once() -> None:
    together = threading.Barrier(4, timeout=30)
    with closing(ordered_map(lambda _: together.wait(), range(4), 4)) as results:
        assert len(list(results)) == 4


def test_an_error_comes_at_its_turn_and_stops_the_rest() -> None:
    begun = []

    def call(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise ServiceError("The service is down. Start it.")
        return number

    results = ordered_map(call, range(10_000), 2)
    assert [next(results)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ServiceError):
        next(results)
    assert len(begun) < 100
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fetch")]


def test_failed_items_wait_longer_each_time() -> None:
    today = date(2023, 12, 31)
    waits = [(retry_day(attempts, today) - today).days for attempts in (1, 2, 3, 4)]
    assert waits == [1, 2, 4, 8]
    assert (retry_day(1000, today) - today).days == MAX_BACK_OFF_DAYS


ITEMS = pa.table({"item_id": ["new", "ok", "due", "early", "any_day", "given_up", "refused", "twin"]})
KNOWN = pa.table(
    {
        "item_id": ["ok", "due", "early", "any_day", "given_up", "refused", "twin"],
        "status": ["ok", "failed", "failed", "failed", "failed", "rejected", "rejected"],
        "reason": [None, "timeout", "timeout", "no_scene", "timeout", "scene_missing", "near_duplicate"],
        "attempts": pa.array([1, 1, 2, 0, 3, 1, 1], pa.int16()),
        "retry_on": pa.array(
            [None, date(2024, 3, 1), date(2024, 3, 2), None, date(2024, 1, 1), None, None], pa.date32()
        ),
    }
)


def test_items_are_due_on_their_day() -> None:
    items, known = ITEMS, KNOWN
    todo, attempts = pending_rows(items, known, "item_id", 3, date(2024, 3, 1))
    assert [row["item_id"] for row in todo] == ["new", "due", "any_day"]
    assert attempts == {"due": 1, "any_day": 0}
    todo, _ = pending_rows(items, known, "item_id", 3, date(2024, 3, 1), retry_now=True)
    assert [row["item_id"] for row in todo] == ["new", "due", "early", "any_day", "given_up", "refused"]


def test_items_whose_request_changed_are_fetched_as_if_never_before() -> None:
    changed = ["ok", "early", "given_up", "refused", "twin"]
    todo, attempts = pending_rows(ITEMS, KNOWN, "item_id", 3, date(2024, 3, 1), changed=changed)
    assert [row["item_id"] for row in todo] == [
        "new", "due", "early", "any_day", "given_up", "refused", "twin",
    ]  # fmt: skip
    assert attempts == {"due": 1, "any_day": 0}
    _, attempts = pending_rows(
        ITEMS, KNOWN, "item_id", 3, date(2024, 3, 1), changed=changed[:2], retry_now=True
    )
    assert attempts == {"due": 1, "any_day": 0, "given_up": 3, "refused": 1}
