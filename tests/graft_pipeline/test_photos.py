from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft_pipeline import photos
from graft_pipeline.manifests import conform
from graft_pipeline.regions import Region
from graft_pipeline.schemas import FLICKR_PHOTOS, GROUND_IMAGES, OUTDOOR_PHOTOS

REGION = Region.parse("N42W072")

RECORD: dict[str, Any] = {
    "id": "15650127345",
    "owner": "12345678@N00",
    "title": "A field",
    "tags": "field spring",
    "license": "6",
    "latitude": 42.3,
    "longitude": -71.5,
    "accuracy": 16,
    "dateupload": "1421222274",
    "datetaken": "2015-01-04 17:37:48",
    "datetakengranularity": 0,
    "datetakenunknown": 0,
    "media": "photo",
    "url_n": "https://live.staticflickr.com/1/15650127345_a_n.jpg",
    "width_n": 320,
    "height_n": 240,
    "url_z": "https://live.staticflickr.com/1/15650127345_a_z.jpg",
    "width_z": 640,
    "height_z": 480,
    "url_l": "https://live.staticflickr.com/1/15650127345_a_l.jpg",
    "width_l": 1024,
    "height_l": 768,
}


def row_of(**changes: Any) -> dict[str, Any]:
    result = photos.photo_rows([RECORD | changes], REGION)
    assert conform(result.table, FLICKR_PHOTOS).num_rows == 1
    return dict(result.table.to_pylist()[0])


def test_a_plain_record() -> None:
    row = row_of()
    assert row["status"] == "ok"
    assert row["reason"] is None
    assert row["uploaded_at_utc"] == datetime(2015, 1, 14, 7, 57, 54, tzinfo=UTC)
    assert row["taken_at_local"] == datetime(2015, 1, 4, 17, 37, 48)
    # Solar time of 71.5 W: five hours behind.
    assert row["taken_at_utc"] == datetime(2015, 1, 4, 22, 37, 48, tzinfo=UTC)
    assert row["is_taken_exact"]
    assert (row["width_px"], row["height_px"]) == (640, 480)
    assert row["image_url"].endswith("_z.jpg")


def test_every_type_that_flickr_was_seen_to_answer_gives_the_same_row() -> None:
    as_text = {
        "id": 15650127345,
        "license": 6,
        "latitude": "42.3",
        "longitude": "-71.5",
        "accuracy": "16",
        "dateupload": 1421222274,
        "datetakengranularity": "0",
        "datetakenunknown": "0",
        "title": {"_content": "A field"},
        "width_z": "640",
        "height_z": "480",
    }
    assert row_of(**as_text) == row_of()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"accuracy": 15}, "accuracy_below_16"),
        ({"accuracy": "15"}, "accuracy_below_16"),
        ({"accuracy": None}, "accuracy_below_16"),
        ({"url_n": None, "url_z": None, "url_l": None}, "no_usable_url"),
        ({"url_n": "ftp://x", "url_z": 7, "url_l": ""}, "no_usable_url"),
        ({"media": "video"}, "not_a_photo"),
        ({"content_type": "3"}, "not_a_photo"),
        ({"content_type": 2}, "screenshot"),
        ({"tags": "game screenshot"}, "screenshot"),
        ({"title": "Screenshot 2019-05-01 at 10.00"}, "screenshot"),
        ({"latitude": 0, "longitude": 0, "accuracy": 0}, "no_geotag"),
        ({"latitude": None}, "no_geotag"),
        ({"longitude": "nan"}, "no_geotag"),
        ({"dateupload": "yesterday"}, "bad_metadata"),
        ({"dateupload": 0}, "bad_metadata"),
        ({"owner": ""}, "bad_metadata"),
    ],
)
def test_what_the_rules_exclude_is_a_row_with_a_reason(changes: dict[str, Any], reason: str) -> None:
    row = row_of(**changes)
    assert (row["status"], row["reason"]) == ("rejected", reason)


@pytest.mark.parametrize(
    ("changes", "local", "utc", "exact"),
    [
        ({"datetakenunknown": "1"}, None, None, False),
        ({"datetaken": "2015-00-00 00:00:00"}, None, None, False),
        ({"datetaken": "0000-00-00 00:00:00"}, None, None, False),
        ({"datetaken": None}, None, None, False),
        ({"datetaken": "0001-01-01 00:00:00", "longitude": -71.5}, ..., ..., True),
        ({"datetaken": "2015-01-01 00:00:00", "datetakengranularity": "4"}, ..., None, False),
    ],
)
def test_times_that_are_not_known_to_the_second_do_not_pair(
    changes: dict[str, Any], local: Any, utc: Any, exact: bool
) -> None:
    row = row_of(**changes)
    assert row["status"] == "ok"
    assert row["is_taken_exact"] is exact
    assert (row["taken_at_local"] is None) == (local is None)
    assert (row["taken_at_utc"] is None) == (utc is None)


@given(lon=st.floats(-179.99, 179.99))
def test_solar_time_is_within_half_an_hour_of_the_sun(lon: float) -> None:
    region = Region.at(lon, 10.0)
    row = photos.photo_rows([RECORD | {"longitude": lon, "latitude": 10.0}], region).table.to_pylist()[0]
    offset = row["taken_at_local"].replace(tzinfo=UTC) - row["taken_at_utc"]
    assert abs(offset - timedelta(hours=lon / 15)) <= timedelta(minutes=30, seconds=1)


@pytest.mark.parametrize(
    ("sizes", "chosen"),
    [
        ({"n": (320, 256), "z": (640, 512)}, "n"),
        ({"n": (320, 255), "z": (640, 512)}, "z"),
        ({"n": (240, 320), "z": (480, 640)}, "z"),
        ({"t": (100, 75), "n": (320, 240)}, "n"),  # none suffices: the largest
        ({"q": (150, 150), "t": (100, 75)}, "t"),  # squares are crops
        ({"l": (1024, 768), "o": (6000, 4000)}, "l"),
        ({"o": (6000, 4000)}, "o"),
        ({"z": (None, None), "n": (320, 240)}, "z"),
        ({"z": ("640", "427")}, "z"),
    ],
)
def test_the_smallest_size_that_suffices_is_taken(sizes: dict[str, Any], chosen: str) -> None:
    bare = {key: value for key, value in RECORD.items() if key[:4] not in ("url_", "widt", "heig")}
    for suffix, (width, height) in sizes.items():
        bare |= {
            f"url_{suffix}": f"https://x/{suffix}.jpg",
            f"width_{suffix}": width,
            f"height_{suffix}": height,
        }
    row = photos.photo_rows([bare], REGION).table.to_pylist()[0]
    assert row["image_url"] == f"https://x/{chosen}.jpg"


def test_photos_of_other_regions_and_without_id_are_counted() -> None:
    raw = [
        RECORD,
        RECORD | {"longitude": -71.0},
        RECORD | {"id": "../x"},
        {k: v for k, v in RECORD.items() if k != "id"},
    ]
    result = photos.photo_rows(raw, REGION)
    assert (result.table.num_rows, result.outside.num_rows, result.unreadable) == (1, 1, 2)
    assert set(result.outside["reason"].to_pylist()) == {"moved"}


def test_hostile_texts_are_stored() -> None:
    row = row_of(title="\ud800 broken\x00", tags="  ")
    assert row["title"] is not None
    assert row["tags"] is None


RAW = st.dictionaries(
    st.sampled_from(sorted(RECORD)),
    st.one_of(
        st.none(),
        st.text(max_size=5),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.booleans(),
        st.lists(st.none()),
    ),
)


@given(st.lists(RAW, max_size=5))
def test_no_answer_stops_the_run(changes: list[dict[str, Any]]) -> None:
    result = photos.photo_rows([RECORD | change for change in changes], REGION)
    assert result.table.num_rows + result.outside.num_rows + result.unreadable == len(changes)
    first = conform(photos.merge_photos(None, result.table, result.outside), FLICKR_PHOTOS)
    conform(photos.merge_photos(first, result.table, result.outside), FLICKR_PHOTOS)


# --- merging -------------------------------------------------------------------------------------------------------

NOON = datetime(2015, 6, 1, 12)

#: Photos of two owners at three spots some metres apart, in three minutes, uploaded in any order: many bursts.
PHOTO = st.fixed_dictionaries(
    {
        "photo_id": st.integers(1, 30).map(str),
        "owner_id": st.sampled_from(["a", "b"]),
        "lon_deg": st.sampled_from([-71.6, -71.59995, -71.599]),
        "taken_at_local": st.integers(0, 179).map(lambda s: NOON + timedelta(seconds=s)),
        "uploaded_at_utc": st.integers(0, 20).map(
            lambda h: datetime(2020, 1, 1, tzinfo=UTC) + timedelta(hours=h)
        ),
        "is_taken_exact": st.sampled_from([True, True, True, False]),
    }
)
PHOTOS = st.lists(PHOTO, max_size=25, unique_by=lambda row: row["photo_id"])


def merge(existing: pa.Table | None, found: pa.Table) -> pa.Table:
    return conform(photos.merge_photos(existing, found), FLICKR_PHOTOS)


@given(rows=PHOTOS, seed=st.randoms(use_true_random=False))
def test_merging_ignores_order_and_repeats(
    make_photos: Callable[..., pa.Table], rows: list[Any], seed: Any
) -> None:
    table = merge(None, make_photos(rows))
    shuffled = rows + rows[: len(rows) // 2]
    seed.shuffle(shuffled)
    assert merge(None, make_photos(shuffled)).equals(table)
    assert merge(table, make_photos(rows)).equals(table)


@given(old=PHOTOS, new=PHOTOS)
def test_merging_is_append_stable(
    make_photos: Callable[..., pa.Table], old: list[Any], new: list[Any]
) -> None:
    before = merge(None, make_photos(old))
    after = merge(before, make_photos(new))
    kept = {row["photo_id"]: row for row in after.to_pylist()}
    assert all(kept[row["photo_id"]] == row for row in before.to_pylist())
    assert set(kept) == {row["photo_id"] for row in old + new}
    # One photo of a burst is ok: any rejected one names an ok one of its owner, minute and spot.
    for row in kept.values():
        if row["reason"] == "burst":
            other = kept[row["duplicate_of"]]
            assert other["status"] == "ok"
            assert other["owner_id"] == row["owner_id"]
            assert other["taken_at_local"].minute == row["taken_at_local"].minute
            assert abs(other["lon_deg"] - row["lon_deg"]) < 1e-4


@given(rows=PHOTOS, cut=st.integers(0, 20))
def test_merging_in_upload_order_equals_merging_at_once(
    make_photos: Callable[..., pa.Table], rows: list[Any], cut: int
) -> None:
    limit = datetime(2020, 1, 1, tzinfo=UTC) + timedelta(hours=cut)
    early = [row for row in rows if row["uploaded_at_utc"] < limit]
    late = [row for row in rows if row["uploaded_at_utc"] >= limit]
    stepwise = merge(merge(None, make_photos(early)), make_photos(late))
    assert stepwise.equals(merge(None, make_photos(rows)))


@given(rows=PHOTOS)
def test_no_two_kept_photos_are_a_burst(make_photos: Callable[..., pa.Table], rows: list[Any]) -> None:
    table = merge(None, make_photos(rows))
    ok = [row for row in table.to_pylist() if row["status"] == "ok" and row["is_taken_exact"]]
    keys = {(r["owner_id"], r["taken_at_local"].minute, r["lon_deg"] < -71.5995) for r in ok}
    assert len(keys) == len(ok)


def test_the_same_photo_told_in_two_ways_gives_one_row_whatever_the_order(
    make_photos: Callable[..., pa.Table],
) -> None:
    rows = [{"photo_id": "1", "title": "a"}, {"photo_id": "1", "title": "b"}]
    for row in rows:
        row["uploaded_at_utc"] = datetime(2020, 1, 1, tzinfo=UTC)  # type: ignore[assignment]
        row["taken_at_local"] = None  # type: ignore[assignment]
    assert merge(None, make_photos(rows)).equals(merge(None, make_photos(rows[::-1])))


def told(existing: pa.Table | None, *changes: dict[str, Any]) -> dict[str, Any]:
    """The one row after records of it, in this order or the reverse."""
    merged = []
    for records in (changes, changes[::-1]):
        result = photos.photo_rows([RECORD | change for change in records], REGION)
        table = conform(photos.merge_photos(existing, result.table, result.outside), FLICKR_PHOTOS)
        assert photos.merge_photos(table, result.table, result.outside).equals(table)
        merged.append(table.to_pylist())
    assert merged[0] == merged[1]
    (row,) = merged[0]
    return dict(row)


def known(**changes: Any) -> pa.Table:
    result = photos.photo_rows([RECORD | {"lastupdate": "1500000000"} | changes], REGION)
    return photos.merge_photos(None, result.table)


LATER = {"lastupdate": "1600000000"}


def test_what_owners_change_later_is_taken_over_and_what_tiles_stand_on_is_not() -> None:
    url = "https://live.staticflickr.com/2/15650127345_b_z.jpg"
    changes = {"title": "Ours", "tags": "ours", "license": "0", "url_z": url, "width_z": 500, "height_z": 400}
    row = told(known(), LATER | changes)
    assert (row["title"], row["tags"], row["license_id"]) == ("Ours", "ours", "0")
    assert (row["image_url"], row["width_px"], row["height_px"]) == (url, 500, 400)
    moved = {
        "latitude": 42.4,
        "longitude": -71.4,
        "dateupload": "1421222275",
        "owner": "2@N00",
        "accuracy": 12,
    }
    row = told(known(), LATER | moved | {"datetaken": "2015-01-04 18:00:00"})
    assert row == known().to_pylist()[0] | {"updated_at_utc": datetime(2020, 9, 13, 12, 26, 40, tzinfo=UTC)}
    earlier = told(known(), {"lastupdate": "1400000000", "title": "Old", "license": "1"})
    assert earlier == known().to_pylist()[0]


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ({"accuracy": 12, "latitude": 42.9}, "accuracy_below_16"),
        ({"owner": ""}, "bad_metadata"),
        ({"tags": "screenshot"}, "screenshot"),
        ({"url_n": None, "url_z": None, "url_l": None}, "no_usable_url"),
    ],
)
def test_photos_that_were_rejected_for_their_metadata_are_judged_again(
    before: dict[str, Any], reason: str
) -> None:
    assert known(**before)["reason"].to_pylist() == [reason]
    assert told(known(**before), LATER) == known(**LATER).to_pylist()[0]
    assert told(known(), LATER | {"tags": "screenshot"})["reason"] == "screenshot"


def test_of_a_burst_one_is_kept_also_when_the_others_are_judged_again() -> None:
    other = {"id": "2", "dateupload": "1421222200", "accuracy": 12}
    first = photos.photo_rows([RECORD, RECORD | other], REGION)
    table = photos.merge_photos(None, first.table)
    assert table["status"].to_pylist() == ["rejected", "ok"]
    again = photos.photo_rows([RECORD | other | {"accuracy": 16}], REGION)
    rows = photos.merge_photos(table, again.table).to_pylist()
    assert [(row["reason"], row["duplicate_of"]) for row in rows] == [("burst", RECORD["id"]), (None, None)]


def test_a_photo_that_moves_to_another_region_is_rejected_until_it_comes_back() -> None:
    row = told(known(), LATER | {"longitude": -70.5})
    assert (row["status"], row["reason"], row["lon_deg"]) == ("rejected", "moved", -71.5)
    assert told(known(), LATER | {"longitude": -70.5}, {"lastupdate": "1550000000"}) == row
    gone = pa.Table.from_pylist([row], schema=FLICKR_PHOTOS.schema)
    back = told(gone, {"lastupdate": "1700000000", "longitude": -71.6})
    assert (back["status"], back["lon_deg"]) == ("ok", -71.5)
    # A photo of elsewhere that is not known here is left to that region.
    result = photos.photo_rows([RECORD | {"longitude": -70.5}], REGION)
    assert photos.merge_photos(None, result.table, result.outside).num_rows == 0


def test_the_upload_rate_is_that_of_the_last_year(make_photos: Callable[..., pa.Table]) -> None:
    now = datetime(2024, 1, 1, tzinfo=UTC)
    uploads = [{"uploaded_at_utc": now - timedelta(days=days)} for days in (1, 100, 364, 366, 4000)]
    assert photos.upload_rate(make_photos(uploads), now) == 3 / 365
    assert photos.upload_rate(FLICKR_PHOTOS.empty(), now) == 0


def test_eligible_photos_are_ok_stored_and_outdoors(make_photos: Callable[..., pa.Table]) -> None:
    table = make_photos([{}, {}, {}, {"status": "rejected", "reason": "burst"}])
    ids = table["photo_id"].to_pylist()
    blank = dict.fromkeys(GROUND_IMAGES.schema.names)
    stored = [blank | {"photo_id": i, "status": "ok", "attempts": 1} for i in ids]
    stored[1]["status"] = "failed"
    outdoor = [
        {"photo_id": i, "outdoor_score": 0.9, "is_outdoor": i != ids[2], "classifier_id": "c"} for i in ids
    ]
    found = photos.eligible(
        table,
        pa.Table.from_pylist(stored, schema=GROUND_IMAGES.schema),
        pa.Table.from_pylist(outdoor, schema=OUTDOOR_PHOTOS.schema),
    )
    assert found["photo_id"].to_pylist() == ids[:1]
    assert list(photos.by_status(table)) == ["ok", "burst"]
