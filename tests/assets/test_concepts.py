"""A small area from photos and a grid to its search index and concept maps, in one deployment on the planet."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow.compute as pc
import pytest
import rasterio
import shapely
from PIL import Image
from typer.testing import CliRunner

from graft_pipeline import schemas, search_index
from graft_pipeline.cli import app
from graft_pipeline.errors import InputError
from graft_pipeline.grid import grid_sensor
from graft_pipeline.ground_images import sample_images
from graft_pipeline.imagery import NAIP
from graft_pipeline.search import Filters, SearchIndex
from resources.storage import Storage

REGION = "N42.00W071.50"
#: 5.0 x 5.5 km; a grid of 1,500 m has 9 to 16 tiles there.
AREA = (-71.45, 42.05, -71.39, 42.10)
STRIDE_M = 1500.0
CONCEPTS = ["forest", "lake", "a solar farm"]


@pytest.fixture(scope="module")
def mapped(planet: Any, deploy_for_module: Callable[..., Any]) -> Any:
    """Collected with and without a grid, indexed, mapped and scored; only read by tests.

    The encoder is the frozen foundation model: any open_clip folder is one, and what a trained one scores is not the
    point here.
    """
    deployment = deploy_for_module(
        planet_url=planet.url, concepts=CONCEPTS, concept_resolution="8", grid_stride_m={"naip": STRIDE_M}
    )
    deployment.register(*AREA)
    deployment.collect(REGION, "naip")
    models = deployment.folder / "data" / "models"
    shutil.copytree(models / "foundation", models / "sensor=naip" / "image_encoder" / "encoder")
    deployment.materialise("naip/chip_embeddings", partition=REGION)
    deployment.before_grid = deployment.contents()
    deployment.materialise("naip/grid_chips", "naip/grid_embeddings", partition=REGION)
    deployment.materialise("naip/search_index", "naip/concept_maps", "naip/concept_map_scores")
    return deployment


def read(storage: Storage, dataset: schemas.Dataset, sensor: str = "naip") -> Any:
    return storage.read(dataset, sensor=sensor, region=REGION)


def test_a_grid_covers_the_area_and_touches_nothing_else(mapped: Any) -> None:
    grid = grid_sensor(NAIP).name
    tiles, made = read(mapped.storage, schemas.TILES, grid), read(mapped.storage, schemas.CHIPS, grid)
    assert 9 <= tiles.num_rows <= 16
    assert made["status"].to_pylist() == ["ok"] * tiles.num_rows
    assert read(mapped.storage, schemas.CHIP_EMBEDDINGS, grid).num_rows == tiles.num_rows
    after = mapped.contents()
    assert {name: after[name] for name in mapped.before_grid} == mapped.before_grid
    added = {name.partition("/")[0] for name in after.keys() - mapped.before_grid.keys()}
    assert added == {"tiles", "chips", "chip_embeddings", "search_index", "concept_maps", "scores"}


def test_grid_and_photos_are_searched_together(mapped: Any) -> None:
    index = SearchIndex.open(mapped.storage.root, "naip")
    assert not index.stale
    of_photos = read(mapped.storage, schemas.CHIP_EMBEDDINGS).num_rows
    of_grid = read(mapped.storage, schemas.CHIP_EMBEDDINGS, grid_sensor(NAIP).name).num_rows
    assert index.rows == of_photos + of_grid
    found = index.search(np.ones(index.width, np.float32), index.rows, Filters())
    sensors = [tile_id.partition("-")[0] for tile_id in found["tile_id"].to_pylist()]
    assert (sensors.count("naip"), sensors.count("naip_grid")) == (of_photos, of_grid)


def test_the_index_shows_examples_and_counts(mapped: Any) -> None:
    metadata = mapped.metadata("naip/search_index")
    index = SearchIndex.open(mapped.storage.root, "naip")
    assert metadata["dagster/row_count"].value == index.rows
    assert (metadata["regions"].value, metadata["regions_made"].value) == (1, 1)
    files = sum(
        file.stat().st_size for file in search_index.index_folder(mapped.storage.root, "naip").iterdir()
    )
    assert 0 < metadata["size_bytes"].value < files
    assert "data:image/jpeg" in metadata["preview"].value


def test_the_command_line_searches_a_part_of_it(
    mapped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = shapely.box(*AREA[:2], -71.42, AREA[3])
    geopandas.GeoSeries([box], crs="EPSG:4326").to_file(tmp_path / "half.geojson")
    monkeypatch.setenv("GRAFT_ROOT", str(mapped.storage.root))
    monkeypatch.setenv("GRAFT_WORLD", "planet")

    def graft(*words: str) -> tuple[Any, Any]:
        paths = ["-o", str(tmp_path / "hits.geojson"), "--sheet", str(tmp_path / "hits.jpg")]
        done = CliRunner().invoke(app, ["search", *words, *paths], catch_exceptions=False)
        return done, geopandas.read_file(tmp_path / "hits.geojson")

    index = SearchIndex.open(mapped.storage.root, "naip")
    done, frame = graft("forest", "--area", str(tmp_path / "half.geojson"), "--top", "5")
    assert done.exit_code == 0
    assert all(tile_id in done.stdout for tile_id in frame["tile_id"])
    assert (len(frame), frame["score"].is_monotonic_decreasing) == (5, True)
    assert frame.geometry.within(box).all()
    assert (tmp_path / "hits.jpg").read_bytes()[:2] == b"\xff\xd8"
    some = frame["tile_id"][2]
    _, frame = graft("--like", some, "--top", "3", "--until", "2100-01-01")
    assert (frame["tile_id"][0], frame["score"][0]) == (some, pytest.approx(1, abs=1e-5))
    images = mapped.storage.read(schemas.GROUND_IMAGES, region=REGION)
    _, photo = sample_images(mapped.storage.folder(schemas.GROUND_IMAGES, region=REGION), images, 1)[0]
    Image.fromarray(photo).save(tmp_path / "photo.png")
    _, frame = graft("--photo", str(tmp_path / "photo.png"), "--since", "2000-01-01", "--exact")
    assert len(frame) == min(50, index.rows)
    for wrong, message in (
        (["forest", "--like", some], "Say what is searched for"),
        (["--like", "naip-nothing"], "no tile 'naip-nothing'"),
        (["forest", "--sensor", "radar"], "No sensor 'radar'"),
        (["--photo", str(tmp_path / "none.png")], "No such file"),
        (["forest", "-o", "hits.shp"], "end its name in"),
    ):
        with pytest.raises(InputError, match=message):
            CliRunner().invoke(app, ["search", *wrong], catch_exceptions=False)


def test_maps_of_the_configured_concepts_lie_in_three_forms(mapped: Any) -> None:
    folder = mapped.storage.folder(schemas.CONCEPT_MAPS, sensor="naip")
    frame = geopandas.read_parquet(folder / "concept_maps.parquet")
    index = SearchIndex.open(mapped.storage.root, "naip")
    assert set(frame["concept"]) == set(CONCEPTS)
    assert (frame.groupby("concept")["tiles"].sum() == index.rows).all()
    with rasterio.open(folder / "concept_maps.tif") as file:
        assert file.descriptions == (*CONCEPTS, "tiles")
    page = (folder / "concept_maps.html").read_text()
    assert page.count("data:image/jpeg") >= len(CONCEPTS)
    metadata = mapped.metadata("naip/concept_maps")
    assert metadata["tiles"].value == index.rows
    assert "data:image/" in metadata["preview"].value
    rows = mapped.storage.read(schemas.CONCEPT_MAPS, sensor="naip")
    assert pc.sum(pc.equal(rows["concept"], "lake")).as_py() == metadata["cells"].value


def test_scores_hold_maps_to_the_truth_and_one_model_to_itself(mapped: Any) -> None:
    metadata = mapped.metadata("naip/concept_map_scores")
    assert metadata["unscored"].value == "a solar farm"
    scores = json.loads((mapped.storage.root / "scores/sensor=naip/concept_maps.json").read_text())
    by_contender = scores["concept maps"]
    # Both are the foundation model here, seen through the index and through the chips.
    assert by_contender["image_encoder"] == pytest.approx(by_contender["foundation"])
    assert by_contender["known tiles"]["correlation"] > 0.5
    assert by_contender["chance"]["correlation"] == 0


def test_the_command_line_maps_a_part_of_it(
    mapped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = geopandas.GeoSeries([shapely.box(*AREA[:2], -71.42, AREA[3])], crs="EPSG:4326")
    half.to_file(tmp_path / "half.geojson")
    monkeypatch.setenv("GRAFT_ROOT", str(mapped.storage.root))
    # In this process, which has loaded torch already.
    words = ["map", "forest", "--area", str(tmp_path / "half.geojson"), "--cell-km", "1"]
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "west.parquet")], catch_exceptions=False)
    assert done.exit_code == 0
    assert "forest" in done.stdout
    frame = geopandas.read_parquet(tmp_path / "west.parquet")
    index = SearchIndex.open(mapped.storage.root, "naip")
    expected = index.scores(np.ones(index.width, np.float32), Filters(half.iloc[0]))
    assert 0 < frame["tiles"].sum() == expected.num_rows < index.rows
