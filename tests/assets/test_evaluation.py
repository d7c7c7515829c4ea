"""NAIP-OSM from an extract to a gated evaluation, in one deployment on the planet."""

import json
import shutil
from collections import Counter

import dagster as dg
import numpy as np
import pyarrow as pa
import pytest
import torch

from graft_pipeline import schemas
from graft_pipeline.errors import SettingsError
from graft_pipeline.regions import Region
from training.zero_shot.benchmarks import OURS

REGION = "N42.25W071.75"


def overpass(tiles):
    """An answer of Overpass: forest over the western half of every footprint, a lake over every third's east."""
    elements = []
    for number, row in enumerate(tiles.to_pylist()):
        lon, lat = row["center_lon_deg"], row["center_lat_deg"]
        # 0.0012 degrees are about 100 m here in longitude, and 133 m in latitude.
        for tags, (west, east) in ({"natural": "wood"}, (-0.0012, 0)), ({"natural": "water"}, (0, 0.0012)):
            if "water" in tags.values() and number % 3:
                continue
            ring = [(west, -0.0012), (east, -0.0012), (east, 0.0012), (west, 0.0012), (west, -0.0012)]
            geometry = [{"lat": lat + y, "lon": lon + x} for x, y in ring]
            elements.append({"type": "way", "id": len(elements) + 1, "tags": tags, "geometry": geometry})
    return {"version": 0.6, "elements": elements}


def test_tiles_are_labelled_evaluated_released_and_held(planet, deploy, tmp_path, monkeypatch):
    file, root = tmp_path / "overpass.json", tmp_path / "deployment-1" / "data"
    settings = {"osm_file": str(file), "evaluation_data": {"naip_osm": str(root)}}
    deployment = deploy(planet_url=planet.url, validation_fraction="0.5", **settings)
    deployment.register(-71.74, 42.26, -71.73, 42.27)
    deployment.collect(REGION, "naip")
    tiles = deployment.storage.read(schemas.TILES, sensor="naip", region=REGION)
    file.write_text(json.dumps(overpass(tiles)))
    deployment.materialise("naip/osm_labels", partition=REGION)
    labels = deployment.storage.read(schemas.OSM_LABELS, sensor="naip", region=REGION)
    assert labels.num_rows == tiles.num_rows > 3
    assert {"forest"} <= {name for row in labels["labels"].to_pylist() for name in row}
    assert deployment.metadata("naip/osm_labels")["tiles/forest"].value == tiles.num_rows

    # Any open_clip folder is an encoder; what a trained one scores is not the point here.
    models = root / "models"
    shutil.copytree(models / "foundation", models / "sensor=naip" / "image_encoder" / "encoder")
    config = {"ops": {"evaluation__naip_osm": {"config": {"release": True}}}}
    done = deployment.materialise("evaluation/naip_osm", run_config=config)
    assert [check.passed for check in done.get_asset_check_evaluations()] == [True]
    metadata = deployment.metadata("evaluation/naip_osm")
    assert metadata[f"mAP/{OURS}"].value == metadata["mAP/foundation (CLIP)"].value > 0
    splits = Counter(tiles["split"].to_pylist())
    assert metadata["images"].value == splits["validation"] > 3
    assert metadata["left_out/tile of the split train"].value == splits["train"] > 0
    report = (root / "evaluation" / "report.md").read_text()
    assert f"| {OURS} | zero-shot |  |  |" in report
    assert "NAIP-OSM mAP@20" in report

    released = root / "evaluation" / "released" / "naip_osm.json"
    content = json.loads(released.read_text())
    ours = content["metrics"]["zero-shot"][OURS]
    ours["mAP"] = dict.fromkeys(("value", "low", "high"), 1.5)
    released.write_text(json.dumps(content))
    done = deployment.materialise("evaluation/naip_osm", run_config=config)
    (check,) = done.get_asset_check_evaluations()
    assert not check.passed
    assert check.severity == dg.AssetCheckSeverity.ERROR
    assert "zero-shot mAP: 1.5000, now" in check.description
    assert json.loads(released.read_text()) == content, "a drop is not released"

    if not torch.cuda.is_available():
        # There is no GPU, though PyTorch is told so: who asks for it fails.
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        for asset, place in {"evaluation/naip_osm": None, "naip/chip_embeddings": REGION}.items():
            with pytest.raises((AssertionError, SettingsError, dg.Failure), match=r"CUDA|NVIDIA"):
                deployment.materialise(asset, partition=place)


def test_footprints_that_reach_beyond_their_region_are_labelled(deploy, tmp_path):
    file = tmp_path / "overpass.json"
    deployment = deploy(osm_file=str(file))
    deployment.instance.add_dynamic_partitions("region", [REGION])
    region = Region.parse(REGION, 0.25)
    lon, lat = region.west_deg + 1e-5, region.south_deg + 0.1
    (x,), (y,) = region.projection.forward(np.array([lon]), np.array([lat]))
    tile = {"tile_id": "border", "center_photo_id": "1", "sampling": "non_overlapping", "split": "train"}
    place = {
        "center_lon_deg": lon,
        "center_lat_deg": lat,
        "x0_m": x - 224,
        "y0_m": y + 224,
        "epsg": region.epsg,
    }
    row = dict.fromkeys(schemas.TILES.schema.names, 0) | tile | place
    table = pa.Table.from_pylist([row], schema=schemas.TILES.schema)
    deployment.storage.write(schemas.TILES, table, sensor="naip", region=REGION)
    # A wood whose eastern edge lies some metres west of the region.
    ring = [(-0.003, -0.001), (-0.0002, -0.001), (-0.0002, 0.001), (-0.003, 0.001), (-0.003, -0.001)]
    geometry = [{"lat": lat + dy, "lon": region.west_deg + dx} for dx, dy in ring]
    wood = {"type": "way", "id": 1, "tags": {"natural": "wood"}, "geometry": geometry}
    file.write_text(json.dumps({"version": 0.6, "elements": [wood]}))
    deployment.materialise("naip/osm_labels", partition=REGION)
    labels = deployment.storage.read(schemas.OSM_LABELS, sensor="naip", region=REGION)
    assert labels["labels"].to_pylist() == [["forest"]]


def test_other_words_are_another_version(deploy):
    names = ("sat4", "sat6", "satlas_naip", "satlas_sentinel2")
    graph = deploy(evaluation_data=dict.fromkeys(names, "/data")).definitions.resolve_asset_graph()
    versions = [graph.get(dg.AssetKey(["evaluation", name])).code_version for name in names]
    assert len(set(versions)) == 3
    assert versions[2] == versions[3]


def test_datasets_that_nobody_knows_are_refused(deploy):
    with pytest.raises(Exception, match="use one of eurosat"):
        deploy(evaluation_data={"imagenet": "/data"})
