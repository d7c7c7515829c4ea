"""Flickr's protocol, spoken by the real flickrapi client with a planet in its own process."""

import io
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import ee
import numpy as np
import pytest
import requests
from PIL import Image

from graft_pipeline.imagery import NAIP, SENTINEL2
from resources.planet.flickr_api import safety_levels
from resources.planet.world import World

MIDDLE = {"lat": 42.1, "lon": -71.8, "radius": 2}
QUARTER = {"bbox": "-71.80,42.05,-71.60,42.25"}
ALL = {"min_upload_date": "2000-01-01 00:00:00", "accuracy": 1, "safe_search": 3}
EXTRAS = "license,date_upload,date_taken,geo,tags,media,owner_name,o_dims,url_t,url_s,url_n,url_m,url_z,url_c,url_l"


@pytest.fixture
def flickr(planet: Any, connect_flickr: Callable[..., Any]) -> Any:
    return connect_flickr(planet.url)


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


def search(flickr: Any, **parameters: Any) -> dict[str, Any]:
    return flickr.photos.search(**{**ALL, **parameters})["photos"]


def everything(flickr: Any, **parameters: Any) -> list[dict[str, Any]]:
    photos, page = [], 1
    while True:
        answer = search(flickr, per_page=250, page=page, **parameters)
        photos += answer["photo"]
        if page >= answer["pages"]:
            return photos
        page += 1


# --- what is found ---


def test_a_circle_finds_exactly_the_photos_in_it(flickr: Any, world: World) -> None:
    answer = search(flickr, **MIDDLE, extras=EXTRAS, per_page=250)
    expected = world.photos_near(-71.8, 42.1, 2.0)
    assert {photo["id"] for photo in answer["photo"]} == set(expected["photo_id"].astype(str))
    assert int(answer["total"]) == len(expected) == len(answer["photo"])
    rows = {str(row["photo_id"]): row for row in expected}
    for photo in answer["photo"]:
        row = rows[photo["id"]]
        assert float(photo["latitude"]) == row["lat_deg"]
        assert float(photo["longitude"]) == row["lon_deg"]
        assert int(photo["accuracy"]) == row["accuracy"]
        assert int(photo["dateupload"]) == row["uploaded_at"]
        assert photo["license"] == row["license"]
        assert (photo["tags"], photo["title"]) == (row["tags"], row["title"])


def test_a_box_is_paged_at_250_whatever_is_asked_and_pages_add_up(flickr: Any, world: World) -> None:
    first = search(flickr, **QUARTER, per_page=500)
    assert first["perpage"] == 250
    assert len(first["photo"]) == 250
    assert first["pages"] == math.ceil(int(first["total"]) / 250)
    ids = [photo["id"] for photo in everything(flickr, **QUARTER)]
    assert len(ids) == len(set(ids)) == int(first["total"])
    assert set(ids) == set(world.photos_in(-71.80, 42.05, -71.60, 42.25)["photo_id"].astype(str))
    assert search(flickr, **QUARTER, per_page=250, page=first["pages"] + 1)["photo"] == []
    assert search(flickr, **QUARTER)["perpage"] == 100


def test_no_query_yields_more_than_four_thousand_different_photos(flickr: Any) -> None:
    wide = {"bbox": "-72.0,42.0,-71.5,42.5"}
    first = search(flickr, **wide, per_page=250)
    total = int(first["total"])
    assert total > 4500
    photos = everything(flickr, **wide)
    assert len({photo["id"] for photo in photos}) == 4000
    assert len(photos) == first["pages"] * 250
    repeated = search(flickr, **wide, per_page=250, page=17)["photo"]
    assert [photo["id"] for photo in repeated] == [photo["id"] for photo in first["photo"]]


def test_bounds_of_dates_are_inclusive_and_come_in_two_spellings(flickr: Any) -> None:
    photos = everything(flickr, **MIDDLE, extras="date_upload,date_taken", sort="date-posted-asc")
    uploads = [int(photo["dateupload"]) for photo in photos]
    low, high = uploads[10], uploads[40]
    within = everything(flickr, **MIDDLE, min_upload_date=low, max_upload_date=high, extras="date_upload")
    assert {photo["id"] for photo in within} == {
        p["id"] for p, t in zip(photos, uploads, strict=True) if low <= t <= high
    }
    moment = str(np.datetime64(low, "s")).replace("T", " ")
    spelled = everything(flickr, **MIDDLE, min_upload_date=moment, max_upload_date=high)
    assert {photo["id"] for photo in spelled} == {photo["id"] for photo in within}
    taken = everything(
        flickr,
        **MIDDLE,
        min_taken_date="2019-01-01 00:00:00",
        max_taken_date="2019-12-31 23:59:59",
        extras="date_taken",
    )
    assert {photo["id"] for photo in taken} == {
        photo["id"] for photo in photos if photo["datetaken"].startswith("2019")
    }
    assert taken


def test_orders(flickr: Any) -> None:
    for sort, key in (("date-posted", "dateupload"), ("date-taken", "datetaken")):
        rising = [
            p[key] for p in everything(flickr, **MIDDLE, sort=f"{sort}-asc", extras="date_upload,date_taken")
        ]
        falling = [
            p[key] for p in everything(flickr, **MIDDLE, sort=f"{sort}-desc", extras="date_upload,date_taken")
        ]
        assert rising == sorted(rising)
        assert falling == sorted(falling, reverse=True)
    near = everything(flickr, **MIDDLE, extras="geo")
    away = [math.hypot(float(p["latitude"]) - 42.1, (float(p["longitude"]) + 71.8) * 0.742) for p in near]
    assert np.all(np.diff(away) > -1e-4)


def test_accuracy_is_a_lower_bound_and_the_maximum_by_default(flickr: Any) -> None:
    every = everything(flickr, **QUARTER, extras="geo")
    street = flickr.photos.search(**QUARTER, min_upload_date="0", safe_search=3, per_page=1)["photos"]
    assert int(street["total"]) == sum(int(photo["accuracy"]) == 16 for photo in every) < len(every)
    rough = search(flickr, **QUARTER, accuracy=12, per_page=1)
    assert int(rough["total"]) == sum(int(photo["accuracy"]) >= 12 for photo in every)


def test_licences_tags_and_media_filter(flickr: Any) -> None:
    every = everything(flickr, **QUARTER, extras="license,tags")
    some = search(flickr, **QUARTER, license="4,5", per_page=1)
    assert int(some["total"]) == sum(photo["license"] in ("4", "5") for photo in every)
    tagged = everything(flickr, **QUARTER, tags="forest,lake", extras="tags")
    assert {p["id"] for p in tagged} == {
        p["id"] for p in every if {"forest", "lake"} & set(p["tags"].split())
    }
    assert tagged
    assert int(search(flickr, **QUARTER, media="videos")["total"]) == 0
    assert int(search(flickr, **QUARTER, content_type=2)["total"]) == 0
    assert int(search(flickr, **QUARTER, content_type=1, media="photos", per_page=1)["total"]) == len(every)


def test_safe_search_is_an_upper_bound_and_safe_by_default(flickr: Any, world: World) -> None:
    photos = world.photos_in(-71.80, 42.05, -71.60, 42.25)
    levels = safety_levels(photos)
    assert 0.98 < np.mean(levels == 1) < 1
    assert set(levels) == {1, 2, 3}
    for level in (1, 2, 3):
        found = {photo["id"] for photo in everything(flickr, **QUARTER, safe_search=level)}
        assert found == set(photos["photo_id"][levels <= level].astype(str))
    plain = flickr.photos.search(**QUARTER, min_upload_date="0", accuracy=1, per_page=1)["photos"]
    assert int(plain["total"]) == np.sum(levels == 1)


def test_without_a_limiting_agent_only_the_last_hours_are_found(flickr: Any) -> None:
    found = flickr.photos.search(**QUARTER, accuracy=1, extras="date_upload")["photos"]
    assert int(found["total"]) < 20
    assert all(int(photo["dateupload"]) > 1_704_067_200 - 12 * 3600 for photo in found["photo"])


def test_radii_in_miles(flickr: Any) -> None:
    miles = search(flickr, lat=42.1, lon=-71.8, radius=2, radius_units="mi", per_page=1)
    kilometres = search(flickr, lat=42.1, lon=-71.8, radius=3.218688, per_page=1)
    assert (
        int(miles["total"]) == int(kilometres["total"]) > int(search(flickr, **MIDDLE, per_page=1)["total"])
    )


# --- how it is said ---


def test_types_vary_as_on_the_real_site(flickr: Any) -> None:
    photos = everything(flickr, **QUARTER, extras=EXTRAS)
    for name in ("latitude", "accuracy", "datetakengranularity", "datetakenunknown", "height_n"):
        assert {type(photo[name]) for photo in photos if name in photo} >= {str}
        assert len({type(photo[name]) for photo in photos if name in photo}) == 2, name
    totals = {type(search(flickr, **QUARTER, page=page, per_page=250)["total"]) for page in range(1, 9)}
    assert totals == {int, str}


def test_every_process_answers_the_same_bytes(
    make_planet: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where Python orders sets of words in another way, as it does in each process."""
    asked = {"method": "flickr.photos.search", "format": "json", "nojsoncallback": "1", "api_key": "k"}
    asked |= {"lat": "42.1", "lon": "-71.8", "min_upload_date": "0", "per_page": "3", "license": "1,2,4,5"}
    answers = set()
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        url = f"{make_planet().url}/services/rest/"
        pages = (requests.post(url, data=asked | {"page": page}, timeout=30) for page in range(1, 9))
        answers.add(b"".join(page.content for page in pages))
    assert len(answers) == 1


def test_extras_are_given_only_when_asked_for(flickr: Any) -> None:
    plain = search(flickr, **MIDDLE)["photo"][0]
    assert set(plain) == {
        "id", "owner", "secret", "server", "farm", "title", "ispublic", "isfriend", "isfamily",
    }  # fmt: skip
    rich = search(flickr, **MIDDLE, extras=EXTRAS)["photo"]
    assert any("url_n" in photo and "width_n" in photo for photo in rich)
    assert all({"latitude", "dateupload", "datetaken", "tags", "license", "media"} <= set(p) for p in rich)


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({}, 3),
        ({"tags": "lake"}, 999),
        ({"bbox": "1,2,3"}, 999),
        ({"bbox": "10,10,5,20", "min_upload_date": "0"}, 999),
        ({"bbox": "-72,41,-69,43", "min_upload_date": "0"}, 999),
        ({"lat": 42, "lon": -71, "radius": 33, "min_upload_date": "0"}, 999),
        ({"lat": "x", "lon": -71, "min_upload_date": "0"}, 999),
        ({**QUARTER, "min_upload_date": "200", "max_upload_date": "100"}, 18),
        ({**QUARTER, "min_upload_date": "soon"}, 18),
    ],
)
def test_searches_that_cannot_be_fail_with_a_code(flickr: Any, parameters: dict[str, Any], code: int) -> None:
    import flickrapi

    with pytest.raises(flickrapi.exceptions.FlickrError) as caught:
        flickr.photos.search(**parameters)
    assert caught.value.code == code


def test_other_methods_keys_and_formats(planet: Any, flickr: Any, connect_flickr: Callable[..., Any]) -> None:
    import flickrapi

    assert flickr.test.echo(word="yes")["word"]["_content"] == "yes"
    with pytest.raises(flickrapi.exceptions.FlickrError) as caught:
        flickr.photos.getRecent()
    assert caught.value.code == 112
    with pytest.raises(flickrapi.exceptions.FlickrError, match="Invalid API Key") as caught:
        connect_flickr(planet.url, key="invalid").test.echo()
    assert caught.value.code == 100
    url = f"{planet.url}/services/rest/"
    plain = {"method": "flickr.test.echo", "api_key": "k", "format": "json"}
    assert requests.get(url, params={**plain, "nojsoncallback": "1"}, timeout=10).json()["stat"] == "ok"
    assert requests.get(url, params=plain, timeout=10).text.startswith("jsonFlickrApi({")
    keyless = {"method": "flickr.test.echo", "format": "json", "nojsoncallback": "1"}
    assert requests.post(url, data=keyless, timeout=10).json()["code"] == 100
    xml = {**plain, "format": "rest", "nojsoncallback": "1"}
    assert requests.post(url, data=xml, timeout=10).json()["code"] == 111


def test_a_signed_request_is_accepted_once(planet: Any) -> None:
    header = {
        "Authorization": 'OAuth oauth_consumer_key="k", oauth_nonce="once only", oauth_signature="x%3D"'
    }
    data = {"method": "flickr.test.echo", "format": "json", "nojsoncallback": "1"}
    url = f"{planet.url}/services/rest/"
    assert requests.post(url, data=data, headers=header, timeout=10).json()["stat"] == "ok"
    assert requests.post(url, data=data, headers=header, timeout=10).status_code == 401


# --- images ---


def local(planet: Any, url: str) -> str:
    assert url.startswith("https://live.staticflickr.com/")
    return url.replace("https://live.staticflickr.com", f"{planet.url}/static")


def test_urls_have_flickrs_form_and_lead_to_images_of_the_size_they_say(planet: Any, flickr: Any) -> None:
    photos = search(flickr, **MIDDLE, extras=EXTRAS, per_page=250)["photo"]
    photo = next(photo for photo in photos if "url_l" in photo)
    stem = f"https://live.staticflickr.com/{photo['server']}/{photo['id']}_{photo['secret']}"
    suffixes = {"t": "_t", "s": "_m", "n": "_n", "m": "", "z": "_z", "c": "_c", "l": "_b"}
    for letter, suffix in suffixes.items():
        assert photo[f"url_{letter}"] == f"{stem}{suffix}.jpg"
        answer = requests.get(local(planet, photo[f"url_{letter}"]), timeout=10)
        assert answer.headers["content-type"] == "image/jpeg"
        assert int(answer.headers["content-length"]) == len(answer.content)
        size = Image.open(io.BytesIO(answer.content)).size
        assert size == (int(photo[f"width_{letter}"]), int(photo[f"height_{letter}"]))
    assert any(
        not any(name.startswith("url_") for name in p) for p in everything(flickr, **QUARTER, extras=EXTRAS)
    )


def test_an_image_has_one_name(planet: Any, flickr: Any) -> None:
    photos = search(flickr, **MIDDLE, extras="url_n", per_page=250)["photo"]
    url = local(planet, next(photo["url_n"] for photo in photos if "url_n" in photo))
    assert requests.get(url, timeout=10).content == requests.get(url, timeout=10).content
    server, name = url.rsplit("/", 2)[1:]
    photo_id, secret, _ = name.split("_")
    for wrong in (
        f"/static/1{server}/{name}",
        f"/static/{server}/{photo_id}_{secret[::-1]}_n.jpg",
        f"/static/{server}/{photo_id}_{secret}_x.jpg",
        f"/static/{server}/12_{secret}_n.jpg",
        f"/static/{server}/{name}.exe",
        "/static/nothing",
        "/nothing",
    ):
        assert requests.get(planet.url + wrong, timeout=10).status_code == 404, wrong


def test_bad_files_are_served_as_they_are(planet: Any, world: World) -> None:
    rows = world.photos_in(-72.0, 42.0, -71.5, 42.5)
    seen = {}
    for flaw in ("html", "truncated", "huge", "animated", "cmyk"):
        row = rows[(rows["flaw"] == flaw) & rows["has_urls"]][0]
        url = f"{planet.url}/static/{row['server']}/{row['photo_id']}_{row['secret']}_n.jpg"
        answer = requests.get(url, timeout=10)
        assert answer.status_code == 200
        assert int(answer.headers["content-length"]) == len(answer.content)
        seen[flaw] = answer
    assert seen["html"].headers["content-type"].startswith("text/html")
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(seen["truncated"].content)).load()
    assert Image.open(io.BytesIO(seen["animated"].content)).n_frames > 1
    assert Image.open(io.BytesIO(seen["cmyk"].content)).mode == "CMYK"
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(seen["huge"].content))


def test_an_earlier_planet_has_the_photos_and_scenes_of_its_time_and_no_others(
    planet: Any,
    make_planet: Callable[..., Any],
    connect_flickr: Callable[..., Any],
    connect_ee: Callable[..., Any],
) -> None:
    earlier = make_planet(now=datetime(2020, 6, 1, tzinfo=UTC))
    later, before = (
        {photo["id"]: photo for photo in everything(connect_flickr(url), **QUARTER, extras=EXTRAS)}
        for url in (planet.url, earlier.url)
    )
    is_there = {key: int(photo["dateupload"]) <= 1_590_969_600 for key, photo in later.items()}
    assert {key for key, is_old in is_there.items() if is_old} == set(before) != set(later)
    assert all(before[key] == later[key] for key in before)
    urls = {
        key: photo["url_s"].replace("https://live.staticflickr.com", "/static")
        for key, photo in later.items()
        if "url_s" in photo
    }
    for old in (True, False):
        url = next(url for key, url in urls.items() if is_there[key] is old)
        assert requests.get(planet.url + url, timeout=10).ok
        assert requests.get(earlier.url + url, timeout=10).status_code == (200 if old else 404)

    where = "intersects(\"{'type': 'Point', 'coordinates': [-71.8, 42.1]}\")"
    for collection in (NAIP.collection, SENTINEL2.collection):
        listed = [
            {
                scene["id"]: scene["startTime"]
                for scene in connect_ee(url).data.listImages({"parent": collection, "filter": where})[
                    "images"
                ]
            }
            for url in (planet.url, earlier.url)
        ]
        old = {key for key, start in listed[0].items() if start <= "2020-06-01T00:00:00Z"}
        assert old == set(listed[1]) != set(listed[0])
        young = sorted(set(listed[0]) - old)[0]
        with pytest.raises(ee.EEException, match="not found"):
            connect_ee(earlier.url).data.getAsset(young)
