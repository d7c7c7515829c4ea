"""What cannot be had now: photos tried again on a later day or at once, steps after a while, unless terminated."""

import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import shapely

from graft_pipeline import areas, schemas
from graft_pipeline.definitions import build_defs
from graft_pipeline.errors import ServiceError
from graft_pipeline.progress import Report
from graft_pipeline.settings import load_settings
from resources.planet.world import World

REGION = "N42.00W071.50"


def failed(deployment: Any) -> pa.Table:
    table = deployment.storage.read(schemas.GROUND_IMAGES, region=REGION)
    return table.filter(pc.equal(table["status"], "failed"))


def test_failed_photos_wait_for_their_day_unless_a_run_does_not(
    planet: Any, deploy: Callable[..., Any]
) -> None:
    found = World(0).photos_in(-71.5, 42.0, -71.25, 42.25)
    broken = found[(found["flaw"] == "html") & found["has_urls"] & (found["accuracy"] == 16)][0]
    lon, lat = float(broken["lon_deg"]), float(broken["lat_deg"])
    deployment = deploy(planet_url=planet.url, search_radius_km="0.5", search_locations_per_region="1")
    deployment.register(lon - 0.001, lat - 0.001, lon + 0.001, lat + 0.001)
    deployment.materialise("search_locations", "flickr_photos", "ground_images", partition=REGION)
    first, today = failed(deployment), datetime.now(UTC).date()
    assert str(broken["photo_id"]) in first["photo_id"].to_pylist()
    assert set(first["attempts"].to_pylist()) == {1}
    assert set(first["retry_on"].to_pylist()) == {today + timedelta(days=1)}

    requests = planet.stats()["image"]
    deployment.materialise("ground_images", partition=REGION)
    assert planet.stats()["image"] == requests
    assert failed(deployment).equals(first)

    now = {"ops": {"ground_images": {"config": {"retry_now": True}}}}
    deployment.materialise("ground_images", partition=REGION, run_config=now)
    assert planet.stats()["image"] > requests
    second = failed(deployment)
    assert set(second["attempts"].to_pylist()) == {2}
    assert set(second["retry_on"].to_pylist()) == {today + timedelta(days=2)}

    folder = deployment.storage.folder(schemas.GROUND_IMAGES, region=REGION)
    (folder / "images-00000.tar").unlink()
    stored = deployment.storage.read(schemas.GROUND_IMAGES, region=REGION)
    of_shard = pc.sum(pc.equal(stored["shard"], "images-00000.tar")).as_py()
    requests = planet.stats()["image"]
    verify = {"ops": {"ground_images": {"config": {"verify": True}}}}
    deployment.materialise("ground_images", partition=REGION, run_config=verify)
    assert planet.stats()["image"] == requests + of_shard
    mended = deployment.storage.read(schemas.GROUND_IMAGES, region=REGION)
    assert mended["sha256"].equals(stored["sha256"])
    assert (folder / pc.max(mended["shard"]).as_py()).exists()


class Once:
    """Progress that does something the first time."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act, self.tasks = act, 0

    def task(self, title: str) -> Report:
        def report(done: int, total: int) -> None:
            if self.tasks == 1:
                self.act()

        self.tasks += 1
        return report


def searched(deployment: Any) -> Any:
    """A deployment with search locations of one region, without any model."""
    area = areas.Area("here", shapely.box(-71.45, 42.05, -71.35, 42.15))
    areas.register_area(deployment.storage.areas_folder, area)
    deployment.instance.add_dynamic_partitions("region", [REGION])
    deployment.materialise("search_locations", partition=REGION)
    return deployment


def test_a_run_that_is_terminated_ends(planet: Any, deploy: Callable[..., Any]) -> None:
    deployment = searched(deploy(planet_url=planet.url, sensors=[{"name": "naip"}]))
    watch = Once(lambda: os.kill(os.getpid(), signal.SIGINT))
    deployment.definitions = build_defs(load_settings(), progress=watch)
    with pytest.raises(dg.DagsterExecutionInterruptedError):
        deployment.materialise("flickr_photos", partition=REGION)
    assert watch.tasks == 1, "not tried again"


def test_a_step_that_a_service_fails_is_tried_again(
    planet: Any, deploy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ServiceError("Flickr is away: try again later.")

    deployment = searched(deploy(planet_url=planet.url, sensors=[{"name": "naip"}]))
    watch = Once(fail)
    deployment.definitions = build_defs(load_settings(), progress=watch)
    # The wait alone: half a minute.
    monkeypatch.setattr(dg.RetryPolicy, "calculate_delay", lambda self, attempt: 0.01 * attempt)
    assert deployment.materialise("flickr_photos", partition=REGION).success
    assert watch.tasks == 2
