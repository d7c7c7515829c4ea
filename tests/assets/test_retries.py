"""Photos that cannot be had now: tried again on a later day, or at once if a run asks for it."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline import schemas
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
