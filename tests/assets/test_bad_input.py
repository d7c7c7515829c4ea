"""What a data engineer gets wrong, as Dagster shows it: a message that says what to do, and no half-written file."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from graft_pipeline import schemas
from graft_pipeline.definitions import build_defs
from graft_pipeline.partitions import REGION_PARTITIONS
from graft_pipeline.settings import load_settings
from resources.earth_engine import EarthEngine

Deploy = Callable[..., Any]
REGION = "N42.00W071.50"
SMALL = (-71.45, 42.05, -71.35, 42.15)


def failure_of(result: dg.ExecuteInProcessResult) -> str:
    """The error of the one step that failed, with its causes."""
    assert not result.success
    (event,) = result.get_step_failure_events()
    return str(event.event_specific_data.error.to_string())


def test_a_key_that_is_no_region_fails_alone(planet: Any, deploy: Deploy) -> None:
    deployment = deploy(planet_url=planet.url)
    deployment.register(*SMALL)
    with pytest.raises(dg.DagsterError, match="N10"):
        deployment.materialise("search_locations", partition="N10.00E010.00")
    # The UI lets people add partitions by hand.
    deployment.instance.add_dynamic_partitions(REGION_PARTITIONS.name, ["bogus", "N42W072"])
    files = deployment.files()
    for key in ("bogus", "N42W072"):
        result = deployment.materialise("search_locations", partition=key, raise_on_error=False)
        assert f"{key!r} is no " in failure_of(result)
        assert "write" in failure_of(result)
    assert deployment.files() == files
    deployment.materialise("search_locations", partition=REGION)
    assert deployment.storage.read(schemas.SEARCH_LOCATIONS, region=REGION).num_rows == 4


@pytest.mark.parametrize(
    ("asset", "partition", "missing"),
    [
        ("ground_embeddings", REGION, "openclip/foundation"),
        ("naip/search_index", None, "image_encoder"),
    ],
)
def test_a_model_that_was_not_trained_yet_is_asked_for_by_its_asset(
    planet: Any, deploy: Deploy, asset: str, partition: str | None, missing: str
) -> None:
    deployment = deploy(planet_url=planet.url, sensors=[{"name": "naip"}])
    deployment.instance.add_dynamic_partitions(REGION_PARTITIONS.name, [REGION])
    result = deployment.materialise(asset, partition=partition, raise_on_error=False)
    assert re.search(f"materialise [^:]*{missing}", failure_of(result))


def test_a_refused_earth_engine_project_stops_scenes_and_says_where_to_look(
    planet: Any, deploy: Deploy
) -> None:
    deployment = deploy(planet_url=planet.url)
    deployment.register(*SMALL)
    files = deployment.files()
    refused = EarthEngine(project="forbidden", url=planet.url, is_anonymous=True)
    deployment.definitions = build_defs(load_settings(), imagery=refused)
    failure = failure_of(deployment.materialise("naip/scenes", partition=REGION, raise_on_error=False))
    assert "GRAFT_EE_PROJECT" in failure
    assert "code.earthengine.google.com/register" in failure
    assert deployment.files() == files


def test_a_full_disk_stops_a_step_and_leaves_nothing_half_written(
    planet: Any, deploy: Deploy, small_disk: Path
) -> None:
    deployment = deploy(
        planet_url=planet.url, root=str(small_disk / "data"), search_locations_per_region="1500"
    )
    deployment.register(*SMALL)
    before = {path for path in small_disk.rglob("*") if path.is_file()}
    ballast = small_disk / "ballast"
    # A page stays free: enough for the probe when a run starts, not for the table.
    free = int(subprocess.check_output(["df", "--output=avail", "-B1", small_disk]).split()[-1])
    ballast.write_bytes(bytes(free - 24 * 1024))
    result = deployment.materialise("search_locations", partition=REGION, raise_on_error=False)
    assert "Disk full" in failure_of(result)
    assert "free space and start the run again" in failure_of(result)
    assert {path for path in small_disk.rglob("*") if path.is_file()} == before | {ballast}
    ballast.unlink()
    deployment.materialise("search_locations", partition=REGION)
    assert deployment.storage.read(schemas.SEARCH_LOCATIONS, region=REGION).num_rows == 1500
