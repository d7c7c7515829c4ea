"""Real pixels and real places through the same clients: a NAIP file of North Dakota from search to pairs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import rasterio
from rasterio.warp import Resampling, reproject

from graft_pipeline import areas, schemas
from graft_pipeline.chips import decode
from graft_pipeline.embeddings import read_images
from graft_pipeline.geometry import Grid

REGION = "N47.00W099.25"
BOX = (-99.186, 47.004, -99.124, 47.037)
SENSOR = {
    "name": "naip5m",
    "bands": ["R", "G", "B"],
    "gsd_m": 5.0,
    "chip_px": 224,
    "crop_px": 112,
}


def all_chips_are_rasterios_own_reprojection(deployment: Any, file: Path, scene_id: str) -> None:
    place = {"sensor": "naip5m", "region": REGION}
    chips = deployment.storage.read(schemas.CHIPS, **place)
    ok = chips.filter(pc.equal(chips["status"], "ok"))
    assert ok.num_rows >= 1
    assert set(ok["scene_id"].to_pylist()) == {scene_id}
    contents = read_images(deployment.storage.folder(schemas.CHIPS, **place), ok)
    with rasterio.open(file) as scene:
        for row, content in zip(ok.to_pylist(), contents, strict=True):
            grid = Grid(row["epsg"], row["x0_m"], row["y0_m"], row["gsd_m"], row["chip_px"], row["chip_px"])
            expected = np.zeros((3, grid.height_px, grid.width_px), np.uint8)
            reproject(
                rasterio.band(scene, [1, 2, 3]),
                expected,
                dst_transform=grid.affine,
                dst_crs=grid.crs,
                resampling=Resampling.nearest,
            )
            assert np.array_equal(decode(content), expected.transpose(1, 2, 0))
    pairs = deployment.storage.read(schemas.PAIRS, **place)
    assert set(pairs["tile_id"].to_pylist()) == set(ok["tile_id"].to_pylist())


def test_every_chip_of_a_real_scene_is_rasterios_own_reprojection(
    real_data: Path, deploy: Callable[..., Any]
) -> None:
    file = real_data / "naip_5m_2020.tif"
    deployment = deploy(
        sensors=[{**SENSOR, "collection": "USDA/NAIP/DOQQ"}],
        planet__mounts={"USDA/NAIP/DOQQ": [str(file)]},
        search_locations_per_region="12",
    )
    deployment.register(*BOX)
    deployment.collect(REGION, "naip5m")
    all_chips_are_rasterios_own_reprojection(deployment, file, "USDA/NAIP/DOQQ/naip_5m_2020")


def test_a_folder_of_real_files_gives_the_same_chips(
    real_data: Path, tmp_path: Path, planet: Any, deploy: Callable[..., Any]
) -> None:
    """Photos of the planet on a real scene of North Dakota, which is the registered area."""
    file = real_data / "naip_5m_2020.tif"
    (tmp_path / "images" / "doqq").mkdir(parents=True)
    shutil.copy(file, tmp_path / "images" / "doqq")
    deployment = deploy(
        planet_url=planet.url,
        imagery="folder",
        imagery_folder=str(tmp_path / "images"),
        sensors=[{**SENSOR, "collection": "doqq"}],
        search_locations_per_region="12",
    )
    deployment.register(*BOX)
    state = areas.read_area(real_data / "us_states.geojson", where="name = 'North Dakota'")
    areas.register_area(deployment.storage.areas_folder, state)
    deployment.materialise("regions")
    regions = deployment.storage.read(schemas.REGIONS)
    assert REGION in regions.filter(pc.equal(regions["area"], state.name))["region"].to_pylist()
    deployment.collect(REGION, "naip5m")
    all_chips_are_rasterios_own_reprojection(deployment, file, "doqq/naip_5m_2020")
    assert deployment.metadata("naip5m/chips")["imagery_requests"].value >= 1
    keys = deployment.definitions.resolve_asset_graph().get_all_asset_keys()
    assert {"/".join(key.path) for key in keys} >= {"geotiff/doqq", "naip5m/chips"}
