"""Which assets are made together: the jobs a data engineer starts, backfills or schedules.

What an asset does is in assets/; which assets exist is put together in definitions.py.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import dagster as dg

GROUND = ("search_locations", "flickr_photos", "ground_images", "ground_embeddings", "outdoor_photos")
PER_REGION = ("scenes", "tiles", "chips", "pairs")
LEARNING = ("training_set", "image_encoder", "pixel_encoder")
SCORES = ("benchmark", "zero_shot_scores", "segmentation_scores", "questions", "question_scores")


def keys_of(sensors: Iterable[str], names: Sequence[str]) -> list[dg.AssetKey]:
    """Keys of assets that every sensor has."""
    return [dg.AssetKey([sensor, name]) for sensor in sensors for name in names]


def region_keys(sensors: Iterable[str]) -> list[dg.AssetKey]:
    """Everything that one region is collected with, from search locations to the pairs of every sensor."""
    return [*(dg.AssetKey(name) for name in GROUND), *keys_of(sensors, PER_REGION)]


def build_jobs(sensors: Iterable[str], *, has_scores: bool, has_maps: bool) -> list[Any]:
    """The deployment's jobs.

    Args:
        sensors: names of the deployment's sensors.
        has_scores: whether there is a benchmark, and so scores.
        has_maps: whether there are concepts, and so maps.

    Returns:
        `register_regions`, `collect_region` (from search to pairs, all sensors: one run a partition), `learn`
        (training sets and encoders), `index_region` (chip embeddings), `update_index` (search
        indexes), `map_concepts` and, on the planet, `score`
        and `ablate`.
    """
    names = list(sensors)
    select = dg.AssetSelection.assets
    jobs = [
        dg.define_asset_job("register_regions", select("regions"), description="Areas to region partitions."),
        dg.define_asset_job(
            "collect_region",
            select(*region_keys(names)),
            description="One region from Flickr search to the pair manifests of every sensor.",
        ),
        dg.define_asset_job(
            "learn",
            select(*keys_of(names, LEARNING)),
            description="Training sets of all regions, and the satellite encoders.",
        ),
        dg.define_asset_job(
            "index_region",
            select(*keys_of(names, ["chip_embeddings"])),
            description="Embeddings of one region's chips, for search and maps.",
        ),
        dg.define_asset_job(
            "update_index",
            select(*keys_of(names, ["search_index"])),
            description="Search indexes over all regions: those that were embedded since are indexed anew.",
        ),
    ]
    if has_maps:
        jobs.append(
            dg.define_asset_job(
                "map_concepts",
                select(*keys_of(names, ["concept_maps", *(["concept_map_scores"] if has_scores else [])])),
                description="Maps of the deployment's concepts, and on the planet what they are worth.",
            )
        )
    if has_scores:
        jobs += [
            dg.define_asset_job(
                "score",
                select(*keys_of(names, SCORES)),
                description="Zero-shot scores on ground that no training tile touches.",
            ),
            dg.define_asset_job(
                "ablate",
                select(*keys_of(names, ["ablations"])),
                description="The paper's ablations of every sensor: variants trained with several seeds, a table.",
            ),
        ]
    return jobs
