"""Every column says where it comes from, of columns that exist, and ends at a source or is said to be computed."""

import pytest

from graft_pipeline import lineage, schemas
from graft_pipeline.errors import DataError


@pytest.mark.parametrize("name", [*schemas.DATASETS, *lineage.MODELS])
def test_every_column_has_an_origin_that_exists(name: str) -> None:
    origins, computed = lineage.UPSTREAM.get(name, {}), lineage.COMPUTED.get(name, {})
    assert sorted([*origins, *computed]) == sorted(lineage.columns_of(name)), "each column once"
    for column, above in origins.items():
        assert above, column
        for origin in above:
            dataset, _, field = origin.partition(".")
            assert field in lineage.columns_of(dataset), f"{name}.{column} comes from {origin}"


@pytest.mark.parametrize("name", [*schemas.DATASETS, *lineage.MODELS])
def test_every_column_ends_at_a_source_or_is_computed(name: str) -> None:
    for column in lineage.columns_of(name):
        ends = [end.split(".") for end in lineage.ends_of(name, column)]
        assert ends, column
        for dataset, field in ends:
            assert field in {**lineage.SOURCES, **lineage.COMPUTED}[dataset]


def test_a_pair_goes_back_to_flickr_and_the_imagery() -> None:
    above = lineage.upstream("pairs")
    assert "flickr_photos.photo_id" in above["photo_id"]
    assert above["scene_id"] == ("chips.scene_id",)
    assert {"flickr.longitude", "flickr.latitude"} <= lineage.ends_of("pairs", "col_px")
    assert "imagery.id" in lineage.ends_of("pairs", "scene_id")
    assert "flickr.id" in lineage.ends_of("training_set", "tile_id")
    assert {"imagery.pixels", "flickr.image", "foundation.weights"} <= lineage.ends_of(
        "chip_embeddings", "embedding"
    )


def test_columns_of_the_same_dataset_are_followed_to_others() -> None:
    above = lineage.upstream("chips")
    assert not any(origin.startswith("chips.") for origins in above.values() for origin in origins)
    assert "scenes.footprint_wkb" in above["sha256"]
    assert above["attempts"] == ()


def test_origins_are_told_in_words() -> None:
    assert lineage.in_words("pairs", "scene_id") == "from chips.scene_id"
    assert lineage.in_words("chips", "attempts") == "computed: counts requests"


def test_an_unknown_name_is_named() -> None:
    with pytest.raises(DataError, match="'photos' is no dataset"):
        lineage.columns_of("photos")
