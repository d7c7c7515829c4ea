"""Real GeoTIFFs served as scenes of a collection."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import requests
import shapely
from rasterio.io import MemoryFile
from rasterio.warp import Resampling, reproject

from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Projection
from graft_pipeline.imagery import NAIP, SENTINEL2
from resources.planet.mounts import mounted_scenes

X0, Y0 = 282_003.0, 4_660_007.0


def write_tif(path: Path, *, count: int = 4, size: int = 300, gsd: float = 2.0, **options: Any) -> Path:
    rng = np.random.default_rng(count)
    pixels = rng.integers(1, 255, (count, size, size))
    profile = {
        "driver": "GTiff",
        "dtype": "uint8",
        "crs": "EPSG:26919",
        "transform": rasterio.Affine(gsd, 0, X0, 0, -gsd, Y0),
        "nodata": 0,
        **options,
    }
    pixels[:, :5] = 0
    with rasterio.open(path, "w", width=size, height=size, count=count, **profile) as file:
        file.write(pixels.astype(profile["dtype"]))
    return path


def chip(
    ee: Any, scene_id: str, crs: str, affine: rasterio.Affine, size: int, bands: list[str]
) -> np.ndarray:
    content = ee.data.getPixels(
        {
            "assetId": scene_id,
            "fileFormat": "GEO_TIFF",
            "bandIds": bands,
            "grid": {
                "dimensions": {"width": size, "height": size},
                "crsCode": crs,
                "affineTransform": dict(
                    zip(
                        ("scaleX", "shearX", "translateX", "shearY", "scaleY", "translateY"),
                        tuple(affine)[:6],
                        strict=True,
                    )
                ),
            },
        }
    )
    with MemoryFile(content) as memory, memory.open() as file:
        return file.read()


def by_rasterio(path: Path, crs: str, affine: rasterio.Affine, size: int, bands: list[int]) -> np.ndarray:
    with rasterio.open(path) as file:
        out = np.zeros((len(bands), size, size), file.dtypes[0])
        reproject(
            rasterio.band(file, bands), out, dst_transform=affine, dst_crs=crs, resampling=Resampling.nearest
        )
    return out


def around(path: Path) -> str:
    """A filter on the middle of a file."""
    with rasterio.open(path) as file:
        epsg = file.crs.to_epsg()
        x, y = file.xy(file.height // 2, file.width // 2)
    lon, lat = Projection(epsg).inverse(x, y)
    return f"intersects(\"{{'type': 'Point', 'coordinates': [{float(lon)}, {float(lat)}]}}\")"


def test_a_mount_is_a_scene_and_hides_the_procedural_ones_over_its_ground(
    tmp_path: Path, make_planet: Callable[..., Any], connect_ee: Callable[..., Any], planet: Any
) -> None:
    path = write_tif(tmp_path / "town_2019.tif")
    where = around(path)
    ee = connect_ee(planet.url)
    procedural = ee.data.listImages({"parent": NAIP.collection, "filter": where})["images"]
    assert procedural
    ee = connect_ee(make_planet(mounts={"naip": [str(path)]}).url)
    listed = ee.data.listImages({"parent": NAIP.collection, "filter": where})["images"]
    assert [scene["id"] for scene in listed] == [f"{NAIP.collection}/town_2019"]
    scene = listed[0]
    assert scene["startTime"] == "2019-07-01T00:00:00Z"
    assert [band["id"] for band in scene["bands"]] == ["R", "G", "B", "N"]
    assert scene["bands"][0]["grid"]["crsCode"] == "EPSG:26919"
    assert scene["bands"][0]["grid"]["affineTransform"]["scaleX"] == 2
    assert ee.data.getAsset(scene["id"])["bands"] == scene["bands"]
    with pytest.raises(ee.EEException, match="not found"):
        ee.data.getAsset(procedural[0]["id"])
    elsewhere = "intersects(\"{'type': 'Point', 'coordinates': [-80.1, 40.1]}\")"
    assert ee.data.listImages({"parent": NAIP.collection, "filter": elsewhere})["images"]
    assert len(ee.data.listImages({"parent": SENTINEL2.collection, "filter": where})["images"]) > 100


def test_chips_are_rasterios_own_reprojection(
    tmp_path: Path, make_planet: Callable[..., Any], connect_ee: Callable[..., Any]
) -> None:
    path = write_tif(tmp_path / "town_2019.tif")
    ee = connect_ee(make_planet(mounts={"naip": [str(path)]}).url)
    scene_id = f"{NAIP.collection}/town_2019"
    x, y = Projection(32618).forward(*(float(v) for v in Projection(32619).inverse(X0 + 300, Y0 - 300)))
    grids = [
        ("EPSG:26919", rasterio.Affine(1, 0, X0 + 100, 0, -1, Y0 - 100)),
        ("EPSG:32619", rasterio.Affine(1, 0, X0 + 101, 0, -1, Y0 - 100)),
        ("EPSG:32619", rasterio.Affine(1, 0, X0 - 50, 0, -1, Y0 + 50)),
        ("EPSG:32618", rasterio.Affine(1, 0, float(x) - 60, 0, -1, float(y) + 60)),
        ("EPSG:4326", rasterio.Affine(1e-5, 0, -71.64, 0, -1e-5, 42.065)),
        ("EPSG:26919", rasterio.Affine(1, 0, X0 + 90_000, 0, -1, Y0)),
    ]
    for crs, affine in grids:
        got = chip(ee, scene_id, crs, affine, 128, ["R", "G", "B"])
        np.testing.assert_array_equal(got, by_rasterio(path, crs, affine, 128, [1, 2, 3]))
    inside = chip(ee, scene_id, *grids[0], 128, ["N"])
    np.testing.assert_array_equal(inside, by_rasterio(path, *grids[0], 128, [4]))
    assert inside.min() > 0
    assert not chip(ee, scene_id, *grids[-1], 128, ["R"]).any()


def test_real_naip_pixels_are_served_unchanged(
    real_data: Path, make_planet: Callable[..., Any], connect_ee: Callable[..., Any]
) -> None:
    path = real_data / "naip_5m_2020.tif"
    ee = connect_ee(make_planet(mounts={"naip": [str(path)]}).url)
    where = around(path)
    (scene,) = ee.data.listImages({"parent": NAIP.collection, "filter": where})["images"]
    assert scene["startTime"].startswith("2020")
    with rasterio.open(path) as file:
        x, y = file.xy(300, 400)
        native = file.read([1, 2, 3], window=((300, 364), (400, 464)))
        corner = file.transform @ (400, 300)
    affine = rasterio.Affine(5, 0, corner[0], 0, -5, corner[1])
    np.testing.assert_array_equal(chip(ee, scene["id"], "EPSG:26914", affine, 64, ["R", "G", "B"]), native)
    affine = rasterio.Affine(1, 0, float(int(x)), 0, -1, float(int(y)))
    got = chip(ee, scene["id"], "EPSG:32614", affine, 448, ["R", "G", "B"])
    np.testing.assert_array_equal(got, by_rasterio(path, "EPSG:32614", affine, 448, [1, 2, 3]))


def test_names_dates_and_collections(tmp_path: Path) -> None:
    write_tif(tmp_path / "a_20180203_b.tif")
    write_tif(tmp_path / "plain.tif")
    write_tif(tmp_path / "five_2021.tif", count=5)
    tagged = write_tif(tmp_path / "tagged.tif", count=2)
    with rasterio.open(tagged, "r+") as file:
        file.descriptions = ("X", "Y")
        file.update_tags(TIFFTAG_DATETIME="2017:05:06 01:02:03", CLOUDY_PIXEL_PERCENTAGE="0.25")
    scenes = mounted_scenes(
        {
            "naip": [str(tmp_path / "a_20180203_b.tif"), str(tmp_path / "five_2021.tif")],
            "sentinel2": [str(tagged)],
            "OTHER/THING": [str(tmp_path / "plain.tif")],
        }
    )
    day, five = scenes[NAIP.collection]
    assert day.asset()["startTime"] == "2018-02-03T00:00:00Z"
    assert [band.name for band in five.bands] == ["R", "G", "B", "N", "B5"]
    (sentinel,) = scenes[SENTINEL2.collection]
    assert [band.name for band in sentinel.bands] == ["X", "Y"]
    assert sentinel.asset()["startTime"] == "2017-05-06T01:02:03Z"
    assert sentinel.properties["CLOUDY_PIXEL_PERCENTAGE"] == 0.25
    (plain,) = scenes["OTHER/THING"]
    assert plain.scene_id == "OTHER/THING/plain"
    assert plain.asset()["startTime"] == "2020-07-01T00:00:00Z"
    assert shapely.box(*plain.footprint.polygon.bounds).area < 0.001


def test_a_collection_of_ones_own_is_listed(tmp_path: Path, make_planet: Callable[..., Any]) -> None:
    path = write_tif(tmp_path / "plain.tif", dtype="uint16")
    planet = make_planet(mounts={"OTHER/THING": [path]})
    where = around(path)
    url = f"{planet.url}/v1/projects/earthengine-public/assets/OTHER/THING:listAssets"
    assets = requests.get(url, params={"filter": where}, timeout=10).json()["assets"]
    assert [asset["id"] for asset in assets] == ["OTHER/THING/plain"]


def test_what_cannot_be_mounted_says_so_at_the_start(tmp_path: Path, make_planet: Callable[..., Any]) -> None:
    good = write_tif(tmp_path / "good.tif")
    text = tmp_path / "text.tif"
    text.write_text("no raster")
    half = tmp_path / "half.tif"
    half.write_bytes(good.read_bytes()[:50])
    flat = write_tif(tmp_path / "flat.tif", crs=None)
    turned = write_tif(tmp_path / "turned.tif", transform=rasterio.Affine(1, 0.5, X0, 0.5, -1, Y0))
    double = write_tif(tmp_path / "double.tif", dtype="float64")
    alike = write_tif(tmp_path / "alike.tif")
    with rasterio.open(alike, "r+") as file:
        file.set_band_description(3, "R")
    for mounts, message in (
        ({"naip": [alike]}, "two of its bands alike"),
        ({"naip": [tmp_path / "missing.tif"]}, "No file"),
        ({"naip": [tmp_path]}, "No file"),
        ({"naip": [text]}, "Cannot read"),
        ({"naip": [half]}, "Cannot read"),
        ({"naip": [flat]}, "no CRS"),
        ({"naip": [turned]}, "north-up"),
        ({"naip": [double]}, "float64"),
        ({"landsat": [good]}, "Cannot mount on 'landsat'"),
        ({"naip": [good, good]}, "Two files"),
    ):
        with pytest.raises(InputError, match=message):
            mounted_scenes({name: [str(path) for path in paths] for name, paths in mounts.items()})
    with pytest.raises(InputError, match="Cannot read"):
        make_planet(mounts={"naip": [str(text)]})
