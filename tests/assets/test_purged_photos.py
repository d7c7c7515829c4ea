"""Photos that a data engineer purges by command, between two materialisations of a region."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline import schemas

REGION = "N42.00W071.50"


def graft(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "graft_pipeline.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_purged_photos_do_not_come_back(planet: Any, deploy: Callable[..., Any]) -> None:
    deployment = deploy(planet_url=planet.url)
    deployment.register(-71.42, 42.08, -71.39, 42.11)
    deployment.collect(REGION, "naip")
    storage, place = deployment.storage, {"sensor": "naip", "region": REGION}
    tiles = storage.read(schemas.TILES, **place)
    photos = storage.read(schemas.FLICKR_PHOTOS, region=REGION)
    centre = tiles["center_photo_id"][0].as_py()
    owner = photos.filter(pc.equal(photos["photo_id"], tiles["center_photo_id"][1]))["owner_id"][0].as_py()
    gone = {centre, *photos.filter(pc.equal(photos["owner_id"], owner))["photo_id"].to_pylist()}
    files = deployment.files()

    counted = graft("photos", "purge", centre, "--owner", owner, "--dry-run")
    assert (counted.returncode, deployment.files() == files) == (0, True), counted.stderr
    done = graft("photos", "purge", centre, "--owner", owner, "--reason", "deleted on Flickr")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == counted.stdout.splitlines()[1:], "what was announced was done"
    left = storage.read(schemas.FLICKR_PHOTOS, region=REGION)
    assert set(left["photo_id"].to_pylist()) == set(photos["photo_id"].to_pylist()) - gone

    refresh = {"ops": {"flickr_photos": {"config": {"full_refresh": True}}}}
    deployment.materialise("flickr_photos", partition=REGION, run_config=refresh)
    assert deployment.metadata("flickr_photos")["purged_records_kept_out"].value >= len(gone)
    # The checks of the rules block whatever is wrong: that it runs to its end says that nothing is.
    deployment.materialise("naip/tiles", "naip/chips", "naip/pairs", partition=REGION)
    for dataset in (schemas.FLICKR_PHOTOS, schemas.GROUND_IMAGES, schemas.OUTDOOR_PHOTOS):
        assert not gone & set(storage.read(dataset, region=REGION)["photo_id"].to_pylist())
    assert storage.read(schemas.FLICKR_PHOTOS, region=REGION).num_rows == left.num_rows
    after = storage.read(schemas.TILES, **place)
    assert not gone & set(after["center_photo_id"].to_pylist())
    kept = tiles.filter(pc.invert(pc.is_in(tiles["center_photo_id"], pa.array(sorted(gone)))))
    assert after.slice(0, kept.num_rows).equals(kept)
    pairs = storage.read(schemas.PAIRS, **place)
    assert pairs.num_rows
    assert not gone & set(pairs["photo_id"].to_pylist() + pairs["center_photo_id"].to_pylist())
