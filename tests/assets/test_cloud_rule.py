"""A region of Sentinel-2 under the cloud rule by chip, raw bands kept: as Dagster runs it, against a planet."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import dagster as dg
import numpy as np
import pyarrow.compute as pc
from rasterio.io import MemoryFile

from graft_pipeline import schemas
from graft_pipeline.geometry import Grid
from graft_pipeline.imagery import SENTINEL2
from graft_pipeline.settings import Settings
from graft_pipeline.shards import read_member
from resources.earth_engine import EarthEngine

REGION = "N42.00W071.50"


def test_chips_are_clear_where_scenes_need_not_be(planet: Any, deploy: Callable[..., Any]) -> None:
    sensor = {
        "name": "sentinel2",
        "cloud_rule": "chip",
        "raw_bands": ["B8", "B4"],
        "max_scene_cloud_pct": 60.0,
    }
    deployment = deploy(planet_url=planet.url, sensors=[sensor])
    deployment.register(-71.45, 42.05, -71.35, 42.15)
    before = planet.stats()
    deployment.collect(REGION, "sentinel2")
    place = {"sensor": "sentinel2", "region": REGION}
    listed = deployment.storage.read(schemas.SCENES, **place)
    assert pc.max(listed["cloud_pct"]).as_py() > 50
    chips = deployment.storage.read(schemas.CHIPS, **place)
    asked = planet.stats()["get_pixels"] - before["get_pixels"]
    assert asked == sum(chips["scenes_tried"].to_pylist()), "one request gives pixels, mask and raw bands"
    assert set(chips["reason"].to_pylist()) <= {None, "cloudy", "nodata"}
    ok = chips.filter(pc.equal(chips["status"], "ok"))
    assert ok.num_rows > 3
    assert pc.max(ok["chip_cloud_pct"]).as_py() < 1.0
    assert pc.max(ok["cloud_pct"]).as_py() > 1.0, "some scene that the rule by scene refuses"
    assert set(ok["nodata_px"].to_pylist()) == {0}
    records = deployment.instance.event_log_storage.get_event_records(
        dg.EventRecordsFilter(dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    )
    found = [record.event_log_entry.dagster_event.asset_check_evaluation_data for record in records]
    assert all(evaluation.passed for evaluation in found if evaluation.check_name == "cloud_and_time")
    # The same ground asked for once more, band by band.
    settings = Settings(_env_file=None, world="planet", ee_url=planet.url, ee_project="planet")
    earth_engine = EarthEngine.from_settings(settings)
    folder = deployment.storage.folder(schemas.CHIPS, **place)
    bands = replace(SENTINEL2, bands=("SCL", "B8", "B4"))
    for row in ok.slice(0, 2).to_pylist():
        grid = Grid(row["epsg"], row["x0_m"], row["y0_m"], row["gsd_m"], row["chip_px"], row["chip_px"])
        again = earth_engine.get_chip(bands, row["scene_id"], grid)
        assert 100 * np.isin(again[..., 0], (3, 9)).mean() == row["chip_cloud_pct"]
        content = read_member(folder, row["raw_shard"], row["raw_offset"], row["raw_size_bytes"])
        with MemoryFile(content) as memory, memory.open() as file:
            assert file.descriptions == ("B8", "B4")
            np.testing.assert_array_equal(np.moveaxis(file.read(), 0, -1), again[..., 1:])
