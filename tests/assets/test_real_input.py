"""Real pixels and real places through the same clients: a NAIP file of North Dakota from search to pairs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import rasterio
from rasterio.warp import Resampling, reproject

from graft_pipeline import schemas
from graft_pipeline.chips import decode
from graft_pipeline.embeddings import read_images
from graft_pipeline.geometry import Grid

REGION = "N47.00W099.25"
SENSOR = {
    "name": "naip5m",
    "collection": "USDA/NAIP/DOQQ",
    "bands": ["R", "G", "B"],
    "gsd_m": 5.0,
    "chip_px": 224,
    "crop_px": 112,
}


def test_every_chip_of_a_real_scene_is_rasterios_own_reprojection(
    real_data: Path, deploy: Callable[..., Any]
) -> None:
    file = real_data / "naip_5m_2020.tif"
    deployment = deploy(
        sensors=[SENSOR],
        planet__mounts={"USDA/NAIP/DOQQ": [str(file)]},
        search_locations_per_region="12",
    )
    deployment.register(-99.186, 47.004, -99.124, 47.037)
    deployment.collect(REGION, "naip5m")
    place = {"sensor": "naip5m", "region": REGION}
    chips = deployment.storage.read(schemas.CHIPS, **place)
    ok = chips.filter(pc.equal(chips["status"], "ok"))
    assert ok.num_rows >= 1
    assert set(ok["scene_id"].to_pylist()) == {"USDA/NAIP/DOQQ/naip_5m_2020"}
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
