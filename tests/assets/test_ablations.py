"""The ablations of one region as Dagster runs them: a table, kept rows, the main data as they were."""

from collections.abc import Callable
from typing import Any

import pytest

from graft_pipeline import schemas
from graft_pipeline.ablations import SCORES
from graft_pipeline.manifests import connect

REGION = "N42.00W071.50"
JOB = "naip/ablations"


@pytest.fixture
def scored(planet: Any, deploy: Callable[..., Any]) -> Any:
    """A deployment with one region, its training set and a small benchmark."""
    deployment = deploy(
        planet_url=planet.url, validation_fraction="0.3", benchmark_bounds="[-70.5, 43.0, -70.3, 43.2]"
    )
    deployment.register(-71.45, 42.05, -71.35, 42.15)
    deployment.collect(REGION, "naip")
    deployment.materialise("naip/training_set", "naip/benchmark")
    return deployment


def ablate(deployment: Any, **config: Any) -> Any:
    config = {"seeds": 1, "train_config": {"steps": 1, "device": "cpu"}} | config
    return deployment.materialise(JOB, run_config={"ops": {"naip__ablations": {"config": config}}})


def test_variants_are_trained_scored_and_kept(scored: Any) -> None:
    main = {
        name: of for name, of in scored.files().items() if not name.startswith(("models", "training_set"))
    }
    chosen = ["random_tiles", "images_and_alt_text"]
    ablate(scored, variants=chosen)
    rows = scored.storage.read(schemas.ABLATIONS, sensor="naip").to_pylist()
    by_name = {row["variant"]: row for row in rows}
    assert set(by_name) == set(chosen)
    assert all(0 <= row[score] <= 1 for row in rows for score in SCORES)
    main_set = scored.metadata("naip/training_set")["fingerprint"].value
    assert [by_name[name]["snapshot"] == main_set for name in chosen] == [False, True]
    assert {name: of for name, of in scored.files().items() if name in main} == main
    assert "| random_tiles |" in scored.metadata(JOB)["scores"].value
    with connect(scored.storage.root) as database:
        (count,) = database.execute("SELECT count(*) FROM ablations WHERE sensor = 'naip'").fetchone()
    assert count == len(chosen)

    files = scored.files()
    ablate(scored, variants=chosen)
    assert scored.files() == files, "what was trained is not trained again"

    # The sensor's training set changes: scores of before are kept, and stand in no table beside those of now.
    pairs = scored.storage.read(schemas.PAIRS, sensor="naip", region=REGION)
    scored.storage.write(schemas.PAIRS, pairs.slice(1), sensor="naip", region=REGION)
    scored.materialise("naip/training_set")
    assert scored.metadata("naip/training_set")["fingerprint"].value != main_set
    ablate(scored, variants=["images_and_alt_text"])
    assert "| random_tiles |" not in scored.metadata(JOB)["scores"].value
    kept = scored.storage.read(schemas.ABLATIONS, sensor="naip")["setup_id"].to_pylist()
    assert sorted(kept.count(setup) for setup in set(kept)) == [1, 2]
