"""The graph as people read it: descriptions, lineage to what others produce, severity of checks, freshness."""

from datetime import timedelta
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.freshness import TimeWindowFreshnessPolicy

from assets.keys import CAPTIONED_PHOTOS_KEY, PLANET_TRUTH_KEY, asset_key
from graft_pipeline import rules, schemas
from graft_pipeline.definitions import build_defs
from graft_pipeline.settings import Settings

KEYS = {"flickr_key": "k", "flickr_secret": "s", "ee_project": "p"}


@pytest.fixture(scope="module", params=["planet", "production"])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The asset graph of a deployment with everything that settings can add."""
    folder = tmp_path_factory.mktemp("graph")
    settings = Settings(
        _env_file=None,
        world=request.param,
        concepts=("farmland",),
        osm_file=folder / "extract.osm.pbf",
        evaluation_data={"eurosat": folder},
        grid_stride_m={"naip": 2000},
        **(KEYS if request.param == "production" else {}),
    )
    return build_defs(settings).resolve_asset_graph()


def test_everything_is_described(graph: Any) -> None:
    for node in graph.asset_nodes:
        assert node.description, node.key
        assert node.kinds, node.key
        if node.is_materializable:
            assert node.code_version, f"{node.key} does not say what code makes it"
            assert node.owners, node.key
        else:
            assert node.key.path[0] == "planet" or {"url", "path", "file", "folder"} & node.metadata.keys()
        schema = node.metadata.get("dagster/column_schema")
        for column in schema.columns if schema else ():
            assert column.description, f"{node.key}: {column.name}"
    for key in graph.asset_check_keys:
        assert graph.get(key).description


def test_every_asset_goes_back_to_what_others_produce(graph: Any) -> None:
    for node in graph.asset_nodes:
        above = {
            key for key in graph.get_ancestor_asset_keys(node.key) if not graph.get(key).is_materializable
        }
        assert above or not node.is_materializable, f"{node.key} comes from nowhere"


def test_nothing_that_is_trained_depends_on_the_truth(graph: Any) -> None:
    for node in graph.asset_nodes:
        if node.key.path[-1] in ("pairs", "training_set", "image_encoder", "pixel_encoder", "search_index"):
            above = graph.get_ancestor_asset_keys(node.key)
            assert PLANET_TRUTH_KEY not in above
            assert (
                CAPTIONED_PHOTOS_KEY in above
                or not graph.has(CAPTIONED_PHOTOS_KEY)
                or node.key.path[-1] == "pairs"
            )


def test_columns_name_columns_of_assets_above(graph: Any) -> None:
    found = 0
    for node in graph.asset_nodes:
        lineage = node.metadata.get("dagster/column_lineage")
        for column, origins in lineage.deps_by_column.items() if lineage else ():
            for origin in origins:
                assert origin.asset_key in graph.get_ancestor_asset_keys(node.key), (node.key, column)
                above = graph.get(origin.asset_key).metadata["dagster/column_schema"]
                assert origin.column_name in {of.name for of in above.columns}, (node.key, column)
                found += 1
    assert found > 200
    pairs = graph.get(dg.AssetKey(["naip", "pairs"])).metadata["dagster/column_lineage"].deps_by_column
    assert set(pairs) == set(schemas.PAIRS.schema.names)
    assert dg.TableColumnDep(asset_key("flickr_photos"), "photo_id") in pairs["photo_id"]


def test_what_is_collected_is_fresh_as_long_as_a_search_is_good_for() -> None:
    graph = build_defs(Settings(_env_file=None, schedule_fresh_days=3.0)).resolve_asset_graph()
    policies = {
        node.key.path[-1]: node.freshness_policy for node in graph.asset_nodes if node.freshness_policy
    }
    assert set(policies) == {"flickr_photos", "scenes", "pairs"}
    policy = policies["pairs"]
    assert isinstance(policy, TimeWindowFreshnessPolicy)
    assert policy.warn_window
    assert policy.warn_window.to_timedelta() == timedelta(days=3)
    assert policy.fail_window.to_timedelta() == timedelta(days=6)


def test_only_rules_that_warn_do_not_block(graph: Any) -> None:
    names = {key.name: graph.get(key).blocking for key in graph.asset_check_keys}
    assert {name for name, blocking in names.items() if not blocking} - rules.WARNINGS <= {"no_score_dropped"}
    assert not any(names[name] for name in rules.WARNINGS)


@pytest.mark.parametrize("launcher", ["subprocess", "kubernetes"])
def test_only_what_trains_on_this_machine_keeps_its_gpu(launcher: str) -> None:
    pod = {"training_launcher": launcher, "kubernetes": {"image": "graft"}}
    graph = build_defs(Settings(_env_file=None, **pod)).resolve_asset_graph()
    names = ("naip/pixel_encoder", "naip/ablations", "ground_embeddings")
    pools = {name: graph.get(dg.AssetKey(name.split("/"))).pools for name in names}
    assert pools["ground_embeddings"] == {"gpu"}
    for name in ("naip/pixel_encoder", "naip/ablations"):
        assert pools[name] == ({"gpu"} if launcher == "subprocess" else {"training"})
