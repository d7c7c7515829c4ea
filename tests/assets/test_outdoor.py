"""Indoor or outdoor on the planet: both forms of the classifier as deployments use them, and their scores."""

from collections.abc import Callable
from typing import Any

import dagster as dg
import numpy as np
import pyarrow.compute as pc
import pytest

from graft_pipeline import schemas
from resources.planet.truth_client import PlanetTruth

Deploy = Callable[..., Any]
REGION = "N42.00W071.50"
CLASSIFIER = "torchvision/scene_classifier"
UP_TO_EMBEDDINGS = ("search_locations", "flickr_photos", "ground_images", "ground_embeddings")


@pytest.fixture(scope="module")
def scored(planet: Any, deploy_for_module: Deploy) -> Any:
    """A region scored by the planet's ResNet-18 at three thresholds, after a try without one; read by tests."""
    deployment = deploy_for_module(planet_url=planet.url, scene_classifier="checkpoint")
    deployment.register(-71.42, 42.08, -71.36, 42.14)
    deployment.materialise(*UP_TO_EMBEDDINGS, partition=REGION)
    with pytest.raises(dg.Failure, match=f"once {CLASSIFIER} is materialised"):
        deployment.materialise("outdoor_photos", partition=REGION)
    deployment.materialise(CLASSIFIER)
    deployment.by_threshold = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for threshold in (0.0, 1.0, 0.5):
            monkeypatch.setenv("GRAFT_OUTDOOR_THRESHOLD", str(threshold))
            deployment.materialise("outdoor_photos", partition=REGION)
            table = deployment.storage.read(schemas.OUTDOOR_PHOTOS, region=REGION)
            share = deployment.metadata("outdoor_photos")["outdoor_share"].value
            deployment.by_threshold[threshold] = (table, share)
        deployment.materialise("outdoor_scores")
    return deployment


def test_the_planets_own_classifier_scores_photos_and_stands_in_their_lineage(scored: Any) -> None:
    table = scored.storage.read(schemas.OUTDOOR_PHOTOS, region=REGION)
    embedded = scored.storage.read(schemas.GROUND_EMBEDDINGS, region=REGION)
    assert table["photo_id"].to_pylist() == embedded["photo_id"].to_pylist()
    metadata = scored.metadata("outdoor_photos")
    assert set(table["classifier_id"].to_pylist()) == {metadata["classifier"].value}
    graph = scored.definitions.resolve_asset_graph()
    assert dg.AssetKey(CLASSIFIER.split("/")) in graph.get(dg.AssetKey("outdoor_photos")).parent_keys
    # The truth is for evaluation: nothing is made from what read it.
    assert not graph.get(dg.AssetKey("outdoor_scores")).child_keys
    assert "data:image/" in metadata["preview"].value


def test_scores_are_those_of_both_forms_against_the_truth(scored: Any, planet: Any) -> None:
    metadata = scored.metadata("outdoor_scores")
    table = scored.storage.read(schemas.OUTDOOR_PHOTOS, region=REGION)
    _, truth = PlanetTruth(planet.url).photos(table["photo_id"].to_pylist())
    decided = np.array(table["is_outdoor"].to_pylist())
    assert metadata["photos"].value == len(truth)
    assert metadata["outdoor_photos"].value == truth.sum()
    assert metadata["accuracy/checkpoint"].value == pytest.approx((decided == truth).mean())
    for name in ("zero_shot", "checkpoint"):
        assert 0 <= metadata[f"accuracy/{name}"].value <= 1
        assert 0 <= metadata[f"best_threshold/{name}"].value <= 1
        assert "data:image/" in metadata[f"confusion/{name}"].value
    assert 0 <= metadata["agreement"].value <= 1
    for name in ("threshold_curve", "preview"):
        assert "data:image/" in metadata[name].value


def test_the_threshold_decides_and_scores_stay(scored: Any) -> None:
    for threshold, (table, share) in scored.by_threshold.items():
        scores = table["outdoor_score"]
        assert table["is_outdoor"].to_pylist() == [score >= threshold for score in scores.to_pylist()]
        assert scores.equals(scored.by_threshold[0.0][0]["outdoor_score"])
        assert share == pytest.approx(pc.mean(table["is_outdoor"]).as_py())
    assert pc.all(scored.by_threshold[0.0][0]["is_outdoor"]).as_py()
    assert not pc.any(scored.by_threshold[1.0][0]["is_outdoor"]).as_py()
