from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest
from upath import UPath

from graft_pipeline import photo_search
from graft_pipeline.errors import InputError, ServiceError
from graft_pipeline.photo_search import Search, Searched
from graft_pipeline.schemas import FLICKR_PHOTOS, SEARCH_LOCATIONS
from graft_pipeline.unfinished import Unfinished

FIRST = datetime(2004, 2, 10, tzinfo=UTC)
LATEST = datetime(2021, 5, 5, tzinfo=UTC)
NOW = datetime(2024, 5, 1, 12, tzinfo=UTC)


def locations(count: int = 3) -> pa.Table:
    rows = [{"location_id": i, "lon_deg": float(i), "lat_deg": 42.0, "radius_km": 2.0} for i in range(count)]
    return pa.Table.from_pylist(rows, schema=SEARCH_LOCATIONS.schema)


def plan(
    known: pa.Table,
    last: Searched | None = None,
    *,
    uploaded_from: str = "2004-02-10",
    whole_every_days: int = 30,
    now: datetime = NOW,
    full_refresh: bool = False,
    count: int = 3,
    **filters: str,
) -> Search:
    return photo_search.plan(
        locations(count),
        known,
        last or Searched(),
        filters,
        uploaded_from=uploaded_from,
        whole_every_days=whole_every_days,
        now=now,
        full_refresh=full_refresh,
    )


@pytest.fixture
def known(make_photos: Callable[..., pa.Table]) -> pa.Table:
    return make_photos([{"uploaded_at_utc": LATEST}, {"uploaded_at_utc": FIRST}])


def test_searches_go_on_from_the_watermark(known: pa.Table) -> None:
    first = plan(known)
    assert (first.uploaded_from, first.uploaded_to, first.is_whole) == (FIRST, NOW, True)
    next_one = plan(known, first.completed)
    assert (next_one.uploaded_from, next_one.is_whole) == (LATEST - photo_search.OVERLAP, False)
    assert next_one.completed == first.completed
    late = plan(known, plan(known, uploaded_from="2021-05-04").completed, uploaded_from="2021-05-04")
    assert (late.uploaded_from, late.is_whole) == (datetime(2021, 5, 4, tzinfo=UTC), False)
    with pytest.raises(InputError, match="YYYY-MM-DD"):
        plan(known, uploaded_from="May")


@pytest.mark.parametrize(
    "other", [{"full_refresh": True}, {"count": 2}, {"license": "4"}, {"uploaded_from": "2004-02-11"}]
)
def test_everything_is_asked_for_where_the_watermark_says_nothing(
    known: pa.Table, other: dict[str, Any]
) -> None:
    search = plan(known, Searched(plan(known).completed.scope, date(2024, 4, 30)), **other)
    assert search.is_whole
    assert search.uploaded_from <= FIRST + timedelta(days=1)
    assert search.completed.whole_on == NOW.date()


def test_a_region_without_photos_is_searched_whole_each_time() -> None:
    last = plan(FLICKR_PHOTOS.empty()).completed
    search = plan(FLICKR_PHOTOS.empty(), last, now=NOW + timedelta(days=3))
    assert (search.uploaded_from, search.is_whole, search.completed) == (FIRST, True, last)


@pytest.mark.parametrize(
    ("every_days", "passed_days", "is_whole"), [(30, 29, False), (30, 30, True), (0, 3000, False)]
)
def test_whole_searches_come_back(known: pa.Table, every_days: int, passed_days: int, is_whole: bool) -> None:
    last = plan(known).completed
    search = plan(known, last, whole_every_days=every_days, now=NOW + timedelta(days=passed_days))
    assert search.is_whole == is_whole
    assert (search.completed.whole_on == search.uploaded_to.date()) == is_whole


def test_what_was_searched_is_remembered(root: UPath) -> None:
    assert photo_search.last_searched(root) == Searched()
    for searched in (Searched("a", date(2024, 5, 1)), Searched("b")):
        photo_search.keep_searched(root, searched)
        assert photo_search.last_searched(root) == searched


def test_every_location_is_searched_once_even_if_the_search_is_interrupted(root: UPath) -> None:
    seen: list[tuple[int, int]] = []
    asked: list[tuple[float, datetime]] = []
    is_down = True

    def ask(lon: float, lat: float, radius: float, since: datetime, until: datetime) -> list[dict[str, Any]]:
        assert (lat, radius, since) == (42.0, 2.0, FIRST)
        if is_down and lon == 2.0:
            raise ServiceError("Flickr is down. Wait.")
        asked.append((lon, until))
        return [{"id": str(lon), "title": "Käse\ud800"}] * 2

    def run(now: datetime, **filters: str) -> list[dict[str, Any]]:
        def report(done: int, total: int) -> None:
            seen.append((done, total))

        search = plan(FLICKR_PHOTOS.empty(), now=now, **filters)
        return list(search.records(ask, Unfinished(root), report))

    with pytest.raises(ServiceError):
        run(NOW)
    is_down = False
    found = run(NOW + timedelta(days=9))
    assert [record["id"] for record in found] == ["0.0", "0.0", "1.0", "1.0", "2.0", "2.0"]
    assert {record["title"] for record in found} == {"Käse\ud800"}
    assert asked == [(0.0, NOW), (1.0, NOW), (2.0, NOW)], "the end of the window is that of the first run"
    assert seen[-3:] == [(1, 3), (2, 3), (3, 3)]
    assert len(run(NOW, license="4")) == 6
    assert len(asked) == 6, "other filters, another search"
