"""Earth Engine's protocol, spoken by the real earthengine-api client with a planet in its own process."""

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import rasterio
import requests
import shapely
from rasterio.io import MemoryFile

from graft_pipeline.geometry import Projection
from graft_pipeline.imagery import NAIP, SENTINEL2

RING = [[-71.9, 42.1], [-71.8, 42.1], [-71.8, 42.2], [-71.9, 42.2], [-71.9, 42.1]]
BOX = f"{{'type': 'Polygon', 'coordinates': [{RING}]}}"
WHERE = f'intersects("{BOX}")'
Affine6 = tuple[float, float, float, float, float, float]


@pytest.fixture
def ee(planet: Any, connect_ee: Callable[..., Any]) -> Any:
    return connect_ee(planet.url)


def scenes(ee: Any, collection: str, more: str = "", **options: Any) -> list[dict[str, Any]]:
    return ee.data.listImages({"parent": collection, "filter": f"{WHERE}{more}", **options})["images"]


def naip_scene(ee: Any) -> dict[str, Any]:
    """The newest scene in zone 19 around the middle of the box."""
    middle = "intersects(\"{'type': 'Point', 'coordinates': [-71.85, 42.15]}\")"
    found = ee.data.listImages({"parent": NAIP.collection, "filter": middle})["images"]
    return max(found, key=lambda scene: scene["startTime"])


def sentinel2_scene(ee: Any, low: float = 0.0, high: float = 1.0, zone: str = "19") -> dict[str, Any]:
    more = f" AND properties.CLOUDY_PIXEL_PERCENTAGE >= {low} AND properties.CLOUDY_PIXEL_PERCENTAGE < {high}"
    box = shapely.geometry.shape({"type": "Polygon", "coordinates": [RING]})
    for scene in scenes(ee, SENTINEL2.collection, more):
        covers = shapely.geometry.shape(scene["geometry"]).contains(box)
        if covers and scene["bands"][0]["grid"]["crsCode"] == f"EPSG:326{zone}":
            return scene
    raise AssertionError("no such scene")


def grid(crs: str, x0: float, y0: float, gsd: float, width: int, height: int | None = None) -> dict[str, Any]:
    return {
        "dimensions": {"width": width, "height": height or width},
        "crsCode": crs,
        "affineTransform": {"scaleX": gsd, "translateX": x0, "scaleY": -gsd, "translateY": y0},
    }


def pixels(ee: Any, scene: dict[str, Any], where: dict[str, Any], bands: list[str]) -> np.ndarray:
    content = ee.data.getPixels(
        {"assetId": scene["id"], "fileFormat": "GEO_TIFF", "bandIds": bands, "grid": where}
    )
    with MemoryFile(content) as memory, memory.open() as file:
        assert file.crs == rasterio.crs.CRS.from_user_input(where["crsCode"])
        affine = where["affineTransform"]
        assert file.transform.a == affine["scaleX"]
        assert (file.transform.c, file.transform.f) == (affine["translateX"], affine["translateY"])
        return file.read()


def place(crs: str, gsd: float) -> tuple[float, float]:
    x, y = Projection(int(crs.replace("EPSG:269", "EPSG:326")[5:])).forward(-71.85, 42.15)
    return float(x) // gsd * gsd, float(y) // gsd * gsd


# --- connecting ---


def test_the_client_connects_with_three_requests(
    make_planet: Callable[..., Any], connect_ee: Callable[..., Any]
) -> None:
    planet = make_planet(seed=0)
    connect_ee(planet.url)
    stats = planet.stats()
    assert stats["discovery"] == 2
    assert stats["algorithms"] == 1


def test_a_forbidden_project_is_refused_as_google_refuses(
    planet: Any, connect_ee: Callable[..., Any]
) -> None:
    import ee

    with pytest.raises(ee.EEException, match="does not have required permission to use project forbidden"):
        connect_ee(planet.url, project="forbidden")
    answer = requests.get(f"{planet.url}/v1/projects/forbidden/algorithms", timeout=10)
    assert answer.status_code == 403
    assert answer.json()["error"]["status"] == "PERMISSION_DENIED"


# --- listing ---


def test_filters_select_by_time_property_and_place(ee: Any) -> None:
    every = scenes(ee, SENTINEL2.collection)
    assert len(every) > 400
    box = shapely.geometry.shape({"type": "Polygon", "coordinates": [RING]})
    assert all(shapely.geometry.shape(scene["geometry"]).intersects(box) for scene in every)
    clear = scenes(ee, SENTINEL2.collection, " AND properties.CLOUDY_PIXEL_PERCENTAGE < 1")
    expected = [scene["id"] for scene in every if scene["properties"]["CLOUDY_PIXEL_PERCENTAGE"] < 1]
    assert [scene["id"] for scene in clear] == expected
    assert expected
    year = scenes(
        ee,
        SENTINEL2.collection,
        ' AND startTime >= "2020-01-01T00:00:00Z" AND startTime < "2021-01-01T00:00:00Z"',
    )
    assert {scene["startTime"][:4] for scene in year} == {"2020"}
    assert len(year) == sum(scene["startTime"].startswith("2020") for scene in every)
    tile = every[0]["properties"]["MGRS_TILE"]
    same = scenes(ee, SENTINEL2.collection, f' AND properties.MGRS_TILE = "{tile}"')
    assert {scene["properties"]["MGRS_TILE"] for scene in same} == {tile}


def test_the_clients_own_keywords_become_a_filter(ee: Any) -> None:
    found = ee.data.listImages(
        {
            "parent": NAIP.collection,
            "startTime": "2018-01-01T00:00:00Z",
            "endTime": "2020-01-01T00:00:00Z",
            "region": "POLYGON((-71.9 42.1,-71.8 42.1,-71.8 42.2,-71.9 42.2,-71.9 42.1))",
        }
    )["images"]
    assert found
    assert {scene["startTime"][:4] for scene in found} <= {"2018", "2019"}
    assert all(scene["endTime"] > scene["startTime"] for scene in found)


def test_pages_add_up_and_a_page_size_is_a_cap(ee: Any) -> None:
    whole = [scene["id"] for scene in scenes(ee, SENTINEL2.collection)]
    pages, token = [], None
    while True:
        options = {"pageToken": token} if token else {}
        page = ee.data.listImages(
            {"parent": SENTINEL2.collection, "filter": WHERE, "pageSize": 190, **options}
        )
        pages.append([scene["id"] for scene in page["images"]])
        token = page.get("nextPageToken")
        if not token:
            break
    assert [scene_id for page in pages for scene_id in page] == whole
    assert all(len(page) == 190 for page in pages[:-1])


def test_a_full_page_has_at_most_a_thousand_scenes(planet: Any, ee: Any) -> None:
    url = f"{planet.url}/v1/projects/earthengine-public/assets/{SENTINEL2.collection}:listAssets"
    where = 'intersects("POLYGON((-72 42,-71 42,-71 43,-72 43,-72 42))")'
    page = requests.get(url, params={"filter": where, "pageSize": 5000}, timeout=30).json()
    assert len(page["assets"]) == 1000
    assert page["nextPageToken"]
    basic = requests.get(url, params={"filter": where, "view": "BASIC"}, timeout=30).json()
    assert len(basic["assets"]) > 1000
    assert set(basic["assets"][0]) == {"type", "name", "id"}


def test_field_masks_are_honoured(ee: Any) -> None:
    found = scenes(
        ee,
        SENTINEL2.collection,
        fields="assets(id,startTime,properties/CLOUDY_PIXEL_PERCENTAGE,bands/grid),nextPageToken",
    )
    assert set(found[0]) == {"id", "startTime", "properties", "bands"}
    assert set(found[0]["properties"]) == {"CLOUDY_PIXEL_PERCENTAGE"}
    assert set(found[0]["bands"][0]) == {"grid"}


def test_a_long_filter_comes_as_a_post(planet: Any, ee: Any) -> None:
    ring = [[-71.85 + 0.05 * np.cos(a), 42.15 + 0.05 * np.sin(a)] for a in np.linspace(0, 2 * np.pi, 120)]
    ring[-1] = ring[0]
    circle = {"type": "Polygon", "coordinates": [[[float(x), float(y)] for x, y in ring]]}
    found = ee.data.listImages({"parent": NAIP.collection, "filter": f'intersects("{circle}")'})["images"]
    assert len(str(circle)) > 2048
    assert {scene["id"] for scene in found} <= {scene["id"] for scene in scenes(ee, NAIP.collection)}
    assert found


@pytest.mark.parametrize(
    ("parent", "filters", "message"),
    [
        ("MODIS/061/MOD13A1", WHERE, "not found"),
        (NAIP.collection, "cloud < 1", "Invalid filter"),
        (NAIP.collection, "", "intersects"),
        (NAIP.collection, 'intersects("POLYGON((-120 25,-70 25,-70 49,-120 49,-120 25))")', "square degrees"),
    ],
)
def test_listings_that_cannot_be_are_refused(ee: Any, parent: str, filters: str, message: str) -> None:
    with pytest.raises(ee.EEException, match=message):
        ee.data.listImages({"parent": parent, "filter": filters})


def test_an_asset_is_got_by_its_id(ee: Any) -> None:
    for collection in (NAIP.collection, SENTINEL2.collection):
        scene = scenes(ee, collection)[3]
        got = ee.data.getAsset(scene["id"])
        assert {**got, "id": scene["id"]} == scene
        assert ee.data.getAsset(collection)["type"] == "IMAGE_COLLECTION"
    with pytest.raises(ee.EEException, match="not found"):
        ee.data.getAsset(f"{NAIP.collection}/m_0000000_ne_00_1_20200101")


# --- pixels ---


def test_overlapping_chips_agree_bit_for_bit(ee: Any) -> None:
    scene = naip_scene(ee)
    crs = scene["bands"][0]["grid"]["crsCode"]
    x, y = place(crs, 1)
    a = pixels(ee, scene, grid(crs, x, y, 1, 448), ["R", "G", "B"])
    b = pixels(ee, scene, grid(crs, x + 101, y - 57, 1, 448), ["R", "G", "B"])
    assert a.dtype == np.uint8
    assert a.shape == (3, 448, 448)
    assert a.std() > 1
    np.testing.assert_array_equal(a[:, 57:, 101:], b[:, : 448 - 57, : 448 - 101])
    assert not np.array_equal(a, b)


def test_nad83_and_wgs84_name_the_same_pixels(ee: Any) -> None:
    scene = naip_scene(ee)
    assert scene["bands"][0]["grid"]["crsCode"] == "EPSG:26919"
    x, y = place("EPSG:26919", 1)
    a = pixels(ee, scene, grid("EPSG:26919", x, y, 1, 128), ["R", "N"])
    b = pixels(ee, scene, grid("EPSG:32619", x, y, 1, 128), ["R", "N"])
    np.testing.assert_array_equal(a, b)


def test_other_grids_take_the_nearest_native_pixel(ee: Any) -> None:
    scene = sentinel2_scene(ee)
    crs = scene["bands"][0]["grid"]["crsCode"]
    x, y = place(crs, 10)
    native = pixels(ee, scene, grid(crs, x, y, 10, 64), ["B4", "B3", "B2"])
    assert native.dtype == np.uint16
    # Half a pixel and a bit aside, and at a finer size: every pixel is the native one that its centre lies in.
    shifted = pixels(ee, scene, grid(crs, x + 14, y - 13, 10, 60), ["B4", "B3", "B2"])
    np.testing.assert_array_equal(shifted, native[:, 1:61, 1:61])
    fine = pixels(ee, scene, grid(crs, x, y, 2.5, 64), ["B4", "B3", "B2"])
    np.testing.assert_array_equal(fine, np.repeat(np.repeat(native, 4, 1), 4, 2)[:, :64, :64])
    # In degrees: look up each centre by hand.
    size = 1e-4
    lon, lat = -71.85, 42.15
    degrees = pixels(ee, scene, grid("EPSG:4326", lon, lat, size, 40), ["B4"])[0]
    cols, rows = np.meshgrid(np.arange(40) + 0.5, np.arange(40) + 0.5)
    px, py = Projection(int(crs[5:])).forward(lon + cols * size, lat - rows * size)
    wide = pixels(ee, scene, grid(crs, x - 200, y + 200, 10, 128), ["B4"])[0]
    expected = wide[((y + 200 - py) // 10).astype(int), ((px - x + 200) // 10).astype(int)]
    np.testing.assert_array_equal(degrees, expected)


def test_a_neighbouring_zones_grid_is_served(ee: Any) -> None:
    scene = sentinel2_scene(ee)
    x, y = place("EPSG:32618", 10)
    a = pixels(ee, scene, grid("EPSG:32618", x, y, 10, 48), ["B4", "B8"])
    b = pixels(ee, scene, grid("EPSG:32618", x + 80, y, 10, 40), ["B4", "B8"])
    assert a.min() > 0
    np.testing.assert_array_equal(a[:, :40, 8:], b[:, :, :40])


def test_coarse_grids_agree_in_every_window(ee: Any) -> None:
    scene = naip_scene(ee)
    crs = scene["bands"][0]["grid"]["crsCode"]
    x, y = place(crs, 16)
    a = pixels(ee, scene, grid(crs, x, y, 16, 40), ["R"])
    b = pixels(ee, scene, grid(crs, x + 160, y - 160, 16, 20), ["R"])
    np.testing.assert_array_equal(a[:, 10:30, 10:30], b)


def test_outside_of_a_scene_everything_is_zero(ee: Any) -> None:
    scene = naip_scene(ee)
    affine = scene["bands"][0]["grid"]["affineTransform"]
    where = grid("EPSG:26919", affine["translateX"] - 20, affine["translateY"] + 10, 1, 64)
    chip = pixels(ee, scene, where, ["R", "G", "B"])
    assert not chip[:, :10].any()
    assert not chip[:, :, :20].any()
    assert chip[:, 10:, 20:].min() > 0
    far = pixels(ee, scene, grid("EPSG:32731", 500_000, 5_000_000, 1, 16), ["R"])
    assert not far.any()


def test_pixels_beyond_the_swath_are_zero_and_within_the_footprint_are_not(ee: Any) -> None:
    listed = scenes(ee, SENTINEL2.collection, ' AND startTime < "2018-01-01T00:00:00Z"')
    by_shape = {str(scene["geometry"]): scene for scene in listed}
    cut = 0
    for scene in list(by_shape.values())[:8]:
        native = scene["bands"][0]["grid"]
        affine = native["affineTransform"]
        polygon = shapely.geometry.shape(scene["geometry"])
        # Two lines across the tile, of SCL: it is 0 where the pixels are, and cheap to draw.
        for south in (11_200, 80_000):
            where = grid(native["crsCode"], affine["translateX"], affine["translateY"] - south, 640, 171, 1)
            drawn = pixels(ee, scene, where, ["SCL"])[0, 0] > 0
            lon, lat = Projection(int(native["crsCode"][5:])).inverse(
                affine["translateX"] + (np.arange(171) + 0.5) * 640,
                np.full(171, affine["translateY"] - south - 320),
            )
            promised = shapely.contains_xy(polygon, lon, lat)
            # A few scenes lost a strip of 3 km inside of their footprint.
            assert np.sum(promised & ~drawn) <= 6
            assert np.sum(drawn & ~promised) <= 2
            cut += drawn.mean() < 0.9
    assert cut >= 4


def test_clouds_cover_as_much_as_the_catalogue_says(ee: Any) -> None:
    for low, high in ((0, 0.01), (30, 60), (80, 101)):
        scene = sentinel2_scene(ee, low, high)
        native = scene["bands"][0]["grid"]
        affine = native["affineTransform"]
        where = grid(native["crsCode"], affine["translateX"], affine["translateY"], 1280, 85)
        classes = pixels(ee, scene, where, ["SCL"])[0]
        assert set(np.unique(classes)) <= {0, 3, 4, 9}
        share = 100 * np.mean(classes[classes > 0] == 9)
        assert share == pytest.approx(scene["properties"]["CLOUDY_PIXEL_PERCENTAGE"], abs=8)


def test_formats_hold_the_same_pixels(ee: Any) -> None:
    scene = naip_scene(ee)
    x, y = place("EPSG:26919", 1)
    where = grid("EPSG:26919", x, y, 1, 50, 40)
    tiff = pixels(ee, scene, where, ["R", "G", "B"])
    assert tiff.shape == (3, 40, 50)
    ask = {"assetId": scene["id"], "bandIds": ["R", "G", "B"], "grid": where}
    table = ee.data.getPixels({**ask, "fileFormat": "NUMPY_NDARRAY"})
    assert table.dtype.names == ("R", "G", "B")
    np.testing.assert_array_equal(np.stack([table[name] for name in "RGB"]), tiff)
    from PIL import Image

    png = np.asarray(Image.open(io.BytesIO(ee.data.getPixels({**ask, "fileFormat": "PNG"}))))
    np.testing.assert_array_equal(png.transpose(2, 0, 1), tiff)
    stretched = sentinel2_scene(ee)
    x, y = place("EPSG:32619", 10)
    png = ee.data.getPixels(
        {
            "assetId": stretched["id"],
            "bandIds": ["B4", "B3", "B2"],
            "fileFormat": "PNG",
            "grid": grid("EPSG:32619", x, y, 10, 30),
            "visualizationOptions": {"ranges": [{"min": 0, "max": 3000}]},
        }
    )
    raw = pixels(ee, stretched, grid("EPSG:32619", x, y, 10, 30), ["B4", "B3", "B2"])
    expected = np.clip(raw * (255 / 3000) + 0.5, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))).transpose(2, 0, 1), expected)


def test_bands_of_two_sizes_share_one_file(ee: Any) -> None:
    scene = sentinel2_scene(ee)
    x, y = place("EPSG:32619", 20)
    both = pixels(ee, scene, grid("EPSG:32619", x, y, 10, 32), ["SCL", "B2"])
    assert both.dtype == np.uint16
    classes = pixels(ee, scene, grid("EPSG:32619", x, y, 20, 16), ["SCL"])
    assert classes.dtype == np.uint8
    np.testing.assert_array_equal(both[0], np.repeat(np.repeat(classes[0], 2, 0), 2, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bandIds": ["R", "X"]}, "did not match any bands"),
        (
            {"grid": grid("EPSG:26919", 0, 0, 1, 5000, 5000)},
            r"Total request size \(75000000 bytes\) must be less than",
        ),
        (
            {"grid": grid("EPSG:26919", 0, 0, 1, 40_000, 1)},
            r"Pixel grid dimensions \(40000x1\) must be less than",
        ),
        ({"grid": grid("EPSG:26919", 0, 0, 0, 10)}, "not invertible"),
        ({"grid": grid("EPSG:26919", 0, 0, 1, 0, -1)}, "must be positive"),
        ({"grid": {"crsCode": "EPSG:26919"}}, "Invalid grid"),
        ({"grid": grid("EPSG:999999", 0, 0, 1, 10)}, "could not be parsed"),
        ({"grid": grid("nowhere", 0, 0, 1, 10)}, "could not be parsed"),
        ({"fileFormat": "BMP"}, "fileFormat"),
        ({"fileFormat": "PNG", "bandIds": ["R", "G"]}, "8-bit"),
    ],
)
def test_pixels_that_cannot_be_are_refused(ee: Any, change: dict[str, Any], message: str) -> None:
    scene = naip_scene(ee)
    ask = {
        "assetId": scene["id"],
        "bandIds": ["R", "G", "B"],
        "fileFormat": "GEO_TIFF",
        "grid": grid("EPSG:26919", 0, 0, 1, 10),
    }
    with pytest.raises(ee.EEException, match=message):
        ee.data.getPixels({**ask, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"fileFormat": ["GEO_TIFF"]},
        {"visualizationOptions": "ranges"},
        {"visualizationOptions": {"ranges": [{"min": 0, "max": 10**400}]}},
        {"visualizationOptions": {"ranges": [{"min": float("nan"), "max": 1}]}},
        {"grid": grid("EPSG:26919", 0, 0, 10**400, 10)},
        {"grid": grid("EPSG:26919", 0, 0, 1, float("inf"))},  # type: ignore[arg-type]
        # Rasterio parses both; no way leads from there to a scene.
        {"grid": grid("IAU_2015:30100", 0, 0, 1, 10)},
        {"grid": grid('LOCAL_CS["site",UNIT["m",1]]', 0, 0, 1, 10)},
        "[" * 100_000,
    ],
)
def test_what_no_client_sends_is_refused_too(planet: Any, ee: Any, change: Any) -> None:
    scene = naip_scene(ee)
    ask = {"bandIds": ["R"], "fileFormat": "GEO_TIFF", "grid": grid("EPSG:26919", 0, 0, 1, 10)}
    body = change if isinstance(change, str) else json.dumps(ask | change)
    answer = requests.post(f"{planet.url}/v1/{scene['name']}:getPixels", data=body, timeout=30)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["status"] == "INVALID_ARGUMENT"


def test_pixels_larger_than_a_scene_are_none_of_it(ee: Any) -> None:
    scene = naip_scene(ee)
    for scale in (1e9, 1e300):
        assert not pixels(ee, scene, grid("EPSG:26919", 0, 0, scale, 2), ["R"]).any()


def test_an_unknown_image_is_not_found(planet: Any) -> None:
    url = (
        f"{planet.url}/v1/projects/earthengine-public/assets/{NAIP.collection}/m_1_ne_19_1_20200101:getPixels"
    )
    answer = requests.post(url, json={}, timeout=10)
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "code": 404,
        "message": f"Image asset '{NAIP.collection}/m_1_ne_19_1_20200101' not found "
        "(does not exist or caller does not have access).",
        "status": "NOT_FOUND",
    }
    for body in (b"{", b"[]", b'"x"'):
        assert requests.post(url, data=body, timeout=10).status_code == 400
    assert requests.get(f"{planet.url}/v1/x:computePixels", timeout=10).status_code == 404


def test_two_seeds_are_two_worlds(planet: Any, make_planet: Callable[..., Any]) -> None:
    other = make_planet(seed=1)
    where = {"filter": WHERE}
    path = f"/v1/projects/earthengine-public/assets/{NAIP.collection}:listAssets"
    first = requests.get(planet.url + path, params=where, timeout=30)
    again = requests.get(planet.url + path, params=where, timeout=30)
    second = requests.get(other.url + path, params=where, timeout=30)
    assert first.content == again.content
    assert first.json() != second.json()
