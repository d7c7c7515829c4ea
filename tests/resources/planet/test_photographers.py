import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageOps

from resources.planet.ground import INDOOR_KINDS, OFF_TOPIC_KINDS
from resources.planet.landcover import CLASSES
from resources.planet.photographers import CELL_DEG, FLAWS, LAST_S, PHOTO_DTYPE, cell_of, distance_km
from resources.planet.world import World

REGION = (-71.75, 42.25, -71.5, 42.5)
FIRST_S = 1_451_606_400


@pytest.fixture(scope="module")
def world():
    return World(0)


@pytest.fixture(scope="module")
def photos(world):
    return world.photos_in(*REGION)


def test_a_region_has_about_as_many_photos_as_documented(photos):
    assert photos.dtype == PHOTO_DTYPE
    assert 1600 < len(photos) < 3200
    assert len(set(photos["photo_id"].tolist())) == len(photos)
    kinds = Counter(photos["kind"].tolist())
    assert all(kinds[name] >= 15 for name in CLASSES), kinds
    others = sum(kinds[name] for name in INDOOR_KINDS + OFF_TOPIC_KINDS) / len(photos)
    assert 0.1 < others < 0.2
    usable = (photos["accuracy"] == 16) & photos["has_urls"] & (photos["flaw"] == "")
    assert 0.8 < usable.mean() < 0.95


def test_photos_are_a_function_of_the_seed(world, photos):
    again = World(0).photos_in(*REGION)
    np.testing.assert_array_equal(again, photos)
    other = World(1).photos_in(*REGION)
    assert not set(other["photo_id"].tolist()) & set(photos["photo_id"].tolist())


def test_ids_lead_back_to_their_photos(world, photos):
    fresh = World(0)
    for photo in photos[::37]:
        assert photo["photo_id"].isdigit()
        assert fresh.photo(str(photo["photo_id"])) == photo


@pytest.mark.parametrize(
    "photo_id", ["", "0", "abc", "12345678901x", "-1234567890", "99999999999", "1" * 11, "²" * 11]
)
def test_ids_of_nobody(world, photo_id):
    assert world.photo(photo_id) is None
    assert world.render_photo(photo_id) is None
    assert world.photo_file(photo_id) is None


def test_rectangles_are_cut_exactly(world, photos):
    west, south, east, north = -71.687, 42.333, -71.612, 42.391
    lon, lat = photos["lon_deg"], photos["lat_deg"]
    inside = (lon >= west) & (lon <= east) & (lat >= south) & (lat <= north)
    found = world.photos_in(west, south, east, north)
    assert set(found["photo_id"].tolist()) == set(photos["photo_id"][inside].tolist())
    assert len(found)


@pytest.mark.parametrize("radius_km", [0.3, 2.0, 6.0])
@pytest.mark.parametrize(("lon", "lat"), [(-71.6123, 42.3721), (-71.6, 42.35)])
def test_searches_find_exactly_the_photos_in_their_circle(world, photos, lon, lat, radius_km):
    found = world.photos_near(lon, lat, radius_km)
    distance = distance_km(lon, lat, photos["lon_deg"], photos["lat_deg"])
    assert set(found["photo_id"].tolist()) == set(photos["photo_id"][distance <= radius_km].tolist())
    assert np.all(distance_km(lon, lat, found["lon_deg"], found["lat_deg"]) <= radius_km)


def test_distances():
    assert distance_km(0.0, 0.0, np.array([1.0]), np.array([0.0]))[0] == pytest.approx(111.195, abs=0.01)
    assert distance_km(-71.0, 42.0, np.array([-71.0]), np.array([42.0]))[0] == 0


def test_searches_across_the_antimeridian_and_near_the_poles(world):
    found = world.photos_near(180.0, 42.0, 10.0)
    assert (found["lon_deg"] > 0).any()
    assert (found["lon_deg"] < 0).any()
    assert len(world.photos_near(20.0, 89.9, 5.0)) == 0
    assert len(world.photos_in(0.0, 80.5, 1.0, 85.0)) == 0


def test_geotags_stay_in_their_cell_and_near_the_truth(world, photos):
    lon, lat = photos["lon_deg"], photos["lat_deg"]
    true_cells = [cell_of(*pair) for pair in zip(photos["true_lon_deg"], photos["true_lat_deg"], strict=True)]
    assert [cell_of(*pair) for pair in zip(lon, lat, strict=True)] == true_cells
    error_m = [
        1000 * distance_km(a, b, np.array([c]), np.array([d]))[0]
        for a, b, c, d in zip(photos["true_lon_deg"], photos["true_lat_deg"], lon, lat, strict=True)
    ]
    error_m = np.array(error_m)
    exact = photos["accuracy"] == 16
    assert 0.85 < exact.mean() < 0.95
    assert 3 < np.sqrt((error_m[exact] ** 2).mean() / 2) < 5
    assert error_m[exact].max() < 30
    assert np.median(error_m[~exact]) > 50
    assert set(photos["accuracy"].tolist()) <= set(range(3, 17))


def test_photos_show_the_class_they_were_taken_on(world, photos):
    seen = np.array(CLASSES)[world.land_cover_at(photos["true_lon_deg"], photos["true_lat_deg"])]
    is_place = np.isin(photos["kind"], CLASSES)
    assert (seen[is_place] == photos["kind"][is_place]).mean() > 0.999


def test_times(photos):
    uploaded, taken = photos["uploaded_at"], photos["taken_at_local"]
    assert uploaded.min() >= FIRST_S
    assert uploaded.max() < LAST_S
    assert taken.min() >= FIRST_S
    # The clock of the owner is five hours behind.
    assert np.all(uploaded - taken > -86_400)
    assert (photos["taken_granularity"] == 0).mean() > 0.95
    assert np.all(taken[photos["taken_unknown"]] == uploaded[photos["taken_unknown"]])


def test_bursts_and_reuploads(photos):
    by_id = {str(photo["photo_id"]): photo for photo in photos}
    bursts = photos[photos["frame"] > 0]
    copies = photos[photos["frame"] < 0]
    assert len(bursts) > 30
    assert len(copies) > 10
    for photo in bursts:
        first = by_id[str(photo["image_id"])]
        assert first["owner"] == photo["owner"]
        assert first["kind"] == photo["kind"]
        apart = distance_km(
            photo["lon_deg"], photo["lat_deg"], first["lon_deg"][None], first["lat_deg"][None]
        )
        assert apart[0] < 0.010
        if not (first["taken_unknown"] or photo["taken_unknown"]):
            assert first["taken_at_local"] // 60 == photo["taken_at_local"] // 60
    for photo in copies:
        first = by_id[str(photo["image_id"])]
        assert photo["photo_id"] != first["photo_id"]
        assert photo["uploaded_at"] >= min(first["uploaded_at"], LAST_S - 1001)


def test_hot_spots_draw_several_photos_to_a_tile(photos):
    x = np.floor(photos["true_lon_deg"] * 82_800 / 224)
    y = np.floor(photos["true_lat_deg"] * 111_100 / 224)
    counts = np.array(list(Counter(zip(x.tolist(), y.tolist(), strict=True)).values()))
    assert (counts >= 3).sum() > 150
    assert (counts == 1).sum() > 150


def test_some_cells_are_empty(world):
    west, south = 10.0, 50.0
    counts = [
        len(world.photos_in(west + (i + 0.01) * CELL_DEG, south + (j + 0.01) * CELL_DEG,
                            west + (i + 0.99) * CELL_DEG, south + (j + 0.99) * CELL_DEG))
        for i in range(10)
        for j in range(10)
    ]  # fmt: skip
    assert 0 < counts.count(0) < 15


@pytest.mark.parametrize(("size", "long_px"), [("s", 240), ("n", 320), ("m", 500), ("z", 640), ("l", 1024)])
def test_files_have_the_announced_size(world, photos, size, long_px):
    chosen = [photo for photo in photos if size in world.photo_sizes(photo) and photo["flaw"] == ""][:5]
    for photo in chosen:
        file = world.photo_file(str(photo["photo_id"]), size)
        assert file is not None
        data, media = file
        assert media == "image/jpeg"
        image = Image.open(io.BytesIO(data))
        image.load()
        assert image.size == world.photo_sizes(photo)[size]
        assert max(image.size) == long_px
        assert data == World(0).render_photo(str(photo["photo_id"]), size)


def test_sizes_beyond_the_original_are_not_offered(world, photos):
    small = next(photo for photo in photos if photo["original_px"] == 320 and photo["has_urls"])
    assert list(world.photo_sizes(small)) == ["t", "s", "n"]
    assert world.render_photo(str(small["photo_id"]), "m") is None
    without = next(photo for photo in photos if not photo["has_urls"])
    assert world.photo_sizes(without) == {}


def test_exif_orientation_turns_photos_upright(world, photos):
    turned = [photo for photo in photos if photo["exif_orientation"] == 6 and "n" in world.photo_sizes(photo)]
    data = world.render_photo(str(turned[0]["photo_id"]), "n")
    image = Image.open(io.BytesIO(data))
    assert image.getexif()[0x0112] == 6
    upright = ImageOps.exif_transpose(image)
    assert upright.size == image.size[::-1]
    assert (upright.height > upright.width) == bool(turned[0]["is_portrait"])


def test_near_duplicates_look_alike_and_others_do_not(world, photos):
    imagehash = pytest.importorskip("imagehash")

    def look(photo):
        image = Image.open(io.BytesIO(world.render_photo(str(photo["photo_id"]), "n")))
        return imagehash.phash(ImageOps.exif_transpose(image))

    by_id = {str(photo["photo_id"]): photo for photo in photos}
    offered = [photo for photo in photos if "n" in world.photo_sizes(photo) and photo["flaw"] == ""]
    again = [
        photo
        for photo in offered
        if photo["frame"] != 0 and "n" in world.photo_sizes(by_id[photo["image_id"]])
    ]
    distances = [look(photo) - look(by_id[str(photo["image_id"])]) for photo in again[:25]]
    assert np.mean(np.array(distances) <= 4) > 0.7
    hashes = [look(photo) for photo in offered if photo["frame"] == 0][:90]
    others = [hashes[i] - hashes[j] for i in range(len(hashes)) for j in range(i)]
    assert np.mean(np.array(others) <= 4) < 1e-3


def test_flaws_are_what_they_say(world):
    photos = world.photos_in(-72.0, 42.0, -71.25, 42.75)
    shares = Counter(photos["flaw"].tolist())
    assert set(shares) <= {"", *FLAWS}
    found = {}
    for photo in photos:
        if photo["flaw"] and photo["flaw"] not in found and "n" in world.photo_sizes(photo):
            found[str(photo["flaw"])] = world.photo_file(str(photo["photo_id"]), "n")
    assert set(found) == set(FLAWS)
    assert found["html"][1] == "text/html"
    assert found["html"][0].startswith(b"<!DOCTYPE html")
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(found["truncated"][0])).load()
    assert Image.open(io.BytesIO(found["cmyk"][0])).mode == "CMYK"
    animated = Image.open(io.BytesIO(found["animated"][0]))
    assert animated.n_frames == 2
    assert found["animated"][1] == "image/gif"
    assert found["huge"][0].startswith(b"\x89PNG")
    assert (
        int.from_bytes(found["huge"][0][16:20], "big") * int.from_bytes(found["huge"][0][20:24], "big")
        == 9 * 10**8
    )
