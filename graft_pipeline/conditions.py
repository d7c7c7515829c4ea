"""What assets carry for Dagster's automation: conditions under which they are made anew, and freshness policies.

The sensor that evaluates the conditions is in automation.py, with what starts runs in other ways.
"""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import dagster as dg

from graft_pipeline.settings import Settings

#: Steps that other steps' changed data makes anew. Not what asks Flickr or lists scenes (`collect_stale_regions` keeps
#: their budget), not what is trained (`train_on_change` keeps its interval).
CARRIED = (
    "ground_images",
    "ground_embeddings",
    "outdoor_photos",
    "tiles",
    "chips",
    "pairs",
    "chip_embeddings",
    "grid_embeddings",
)
#: As well, but once an hour: they read all regions.
OF_ALL_REGIONS = ("search_index", "concept_maps")
#: What a schedule keeps fresh.
COLLECTED = ("flickr_photos", "scenes", "pairs")


def with_conditions(assets: Iterable[Any]) -> list[Any]:
    """Give assets that follow their inputs the condition under which `carry_changes` makes them anew.

    Args:
        assets: all assets of the deployment.

    Returns:
        The same, those of `CARRIED` and `OF_ALL_REGIONS` with a condition.
    """
    assets = list(assets)
    made = [spec for item in assets if isinstance(item, dg.AssetsDefinition) for spec in item.specs]
    inputs = {spec.key: {dep.asset_key for dep in spec.deps} for spec in made}

    def conditioned(spec: dg.AssetSpec) -> dg.AssetSpec:
        if spec.key.path[-1] not in (*CARRIED, *OF_ALL_REGIONS):
            return spec
        nearest = dg.AssetSelection.assets(*_nearest_inputs(spec.key, inputs))
        return spec.replace_attributes(automation_condition=on_changed_data(spec.key.path[-1], nearest))

    return list(dg.map_asset_specs(conditioned, assets))


def _nearest_inputs(key: dg.AssetKey, inputs: Mapping[dg.AssetKey, set[dg.AssetKey]]) -> list[dg.AssetKey]:
    """Inputs whose changes do not reach the asset through another input anyway; external ones left out.

    Dagster evaluates, and keeps, each condition of each input: at 20,000 partitions that is most of a tick.
    """

    def before(other: dg.AssetKey) -> set[dg.AssetKey]:
        if other.path[-1] not in CARRIED:
            return set()
        return inputs[other].union(*(before(earlier) for earlier in inputs[other] if earlier in inputs))

    known = {other for other in inputs[key] if other in inputs}
    return sorted(known - set().union(*(before(other) for other in known)))


def on_changed_data(name: str, nearest: dg.AssetSelection) -> dg.AutomationCondition[Any]:
    """When an asset is made anew: the data version of an input changed, or an input is about to be made anew.

    So one run makes everything in a region that lies downstream of the change.

    Args:
        name: of the asset, without its sensor.
        nearest: the inputs to look at.

    Returns:
        The condition.
    """
    condition = dg.AutomationCondition
    changed = condition.any_deps_match(condition.data_version_changed()).allow(nearest)
    # What changes between a request and the next evaluation comes with the request, which must not cover it.
    requested = condition.newly_requested()
    if name in OF_ALL_REGIONS:
        # Some region is always in progress somewhere: not at rest, but once an hour.
        return (
            changed.since(requested & ~changed)
            & condition.cron_tick_passed("0 * * * *")
            & ~condition.in_progress()
        ).with_label("on_changed_data_hourly")
    follows = condition.any_deps_match(condition.data_version_changed() | condition.will_be_requested())
    # Within a region's own run assets follow their inputs already.
    handled = requested | condition.newly_updated()
    if name == "ground_embeddings" or not name.endswith("_embeddings"):
        return (follows.allow(nearest).since(handled) & ~condition.in_progress()).with_label(
            "on_changed_data"
        )
    # Embeddings of satellite images are not part of a region's own run, and wait for its end. What was embedded while
    # its encoder was being replaced has to be embedded once more.
    encoder = dg.AssetSelection.key_substring("image_encoder")
    replaced = condition.any_deps_match(condition.data_version_changed()).allow(encoder & nearest)
    return (
        (follows.allow(nearest - encoder).since(handled) | replaced.since(requested & ~replaced))
        & ~condition.any_deps_missing().allow(nearest)
        & ~condition.any_deps_in_progress().allow(nearest)
        & ~condition.in_progress()
    ).with_label("on_changed_data")


def with_freshness(assets: Iterable[Any], settings: Settings) -> list[Any]:
    """Give what is collected a freshness policy, so that the UI says when no region was looked at for too long.

    Dagster judges an asset by its latest materialisation, of whatever region; which regions are stale is the
    schedule's matter.

    Args:
        assets: all assets of the deployment.
        settings: how long a search is good for; twice as long is a failure.

    Returns:
        The same, those of `COLLECTED` with a policy.
    """
    good_for = max(timedelta(days=settings.schedule_fresh_days), timedelta(minutes=1))
    policy = dg.FreshnessPolicy.time_window(fail_window=2 * good_for, warn_window=good_for)

    def judged(spec: dg.AssetSpec) -> dg.AssetSpec:
        return spec.replace_attributes(freshness_policy=policy) if spec.key.path[-1] in COLLECTED else spec

    return list(dg.map_asset_specs(judged, assets))
