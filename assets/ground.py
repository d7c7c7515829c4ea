"""The ground half of a region: where Flickr is searched, its photos, their images, embeddings and outdoor scores.

Rules for photos are in graft_pipeline.photos and .ground_images; the clients in resources.
"""

from datetime import UTC, datetime

import dagster as dg
import numpy as np

from assets.keys import AREAS_KEY, FLICKR_KEY, FOUNDATION_KEY
from assets.reporting import (
    OWNERS,
    RETRY,
    TYPICAL,
    check_specs,
    measured,
    only_transient_retries,
    report_table,
    table_metadata,
)
from graft_pipeline import (
    areas,
    embeddings,
    ground_images,
    photo_search,
    photos,
    previews,
    purging,
    rules,
    sampling,
    schemas,
    sheets,
)
from graft_pipeline.partitions import REGION_PARTITIONS
from graft_pipeline.progress import Progress
from graft_pipeline.provenance import code_version
from graft_pipeline.regions import Region
from graft_pipeline.settings import Settings
from graft_pipeline.unfinished import Unfinished
from resources.flickr import FlickrClient
from resources.foundation import FoundationModel
from resources.images import ImageFetcher
from resources.scene_classifier import SceneClassifier
from resources.storage import Storage


def ground_asset(
    dataset: schemas.Dataset, *rules_of_data: str, retry_policy: dg.RetryPolicy | None = None, **options
):
    """An asset of the `ground` group, partitioned by region, whose table is `dataset`."""
    make = dg.asset(
        name=dataset.name,
        group_name="ground",
        owners=OWNERS,
        partitions_def=REGION_PARTITIONS,
        metadata=table_metadata(dataset),
        check_specs=check_specs([dataset.name], *rules_of_data),
        **options,
    )
    return lambda function: make(only_transient_retries(measured(function), retry_policy))


class FlickrPhotosConfig(dg.Config):
    """What a single run may ask of `flickr_photos`."""

    #: Ask for everything again instead of what was uploaded since the watermark.
    full_refresh: bool = False


class FetchConfig(dg.Config):
    """What a single run may ask of `ground_images` and `chips`."""

    #: Try failed and rejected rows again today, whatever the day in their `retry_on` and their attempts.
    retry_now: bool = False
    #: Read all that is stored, and fetch anew what was damaged on its disk: gone, cut or changed.
    verify: bool = False


@ground_asset(
    schemas.SEARCH_LOCATIONS,
    "not_empty",
    deps=["regions", AREAS_KEY],
    code_version=code_version(sampling),
    kinds={"parquet"},
)
def search_locations(
    context: dg.AssetExecutionContext, world: dg.ResourceParam[Settings], storage: dg.ResourceParam[Storage]
) -> dg.MaterializeResult:
    """Points sampled uniformly on the ground of the region that registered areas cover."""
    region = Region.parse(context.partition_key, world.grid_deg)
    area = areas.union(areas.list_areas(storage.areas_folder))
    table = sampling.sample_locations(
        region,
        area,
        world.search_locations_per_region,
        world.search_radius_km,
        world.seed,
    )
    changed = storage.write(schemas.SEARCH_LOCATIONS, table, region=region.key)
    picture = previews.scatter_map(
        {"search locations": (table["lon_deg"].to_numpy(), table["lat_deg"].to_numpy())},
        title=f"Search locations of {region.key}",
        bounds=region.bounds,
        discs_km=world.search_radius_km,
        area=area.intersection(region.polygon),
    )
    advice = (
        "no registered area covers this region, so nothing is searched: register one (graft areas add FILE)"
    )
    return report_table(
        schemas.SEARCH_LOCATIONS,
        table,
        changed=changed,
        findings=[rules.not_empty(table, advice)],
        picture=picture,
        caption=f"Discs are what is searched: {world.search_radius_km:g} km around each location.",
    )


@ground_asset(
    schemas.FLICKR_PHOTOS,
    "not_empty",
    deps=[search_locations, FLICKR_KEY],
    code_version=code_version(photos, photo_search),
    kinds={"parquet", "flickr"},
    pool="flickr",
    retry_policy=RETRY,
)
def flickr_photos(
    context: dg.AssetExecutionContext,
    config: FlickrPhotosConfig,
    world: dg.ResourceParam[Settings],
    storage: dg.ResourceParam[Storage],
    flickr: dg.ResourceParam[FlickrClient],
    progress: dg.ResourceParam[Progress],
) -> dg.MaterializeResult:
    """Metadata of the geotagged photos around the search locations, unique by photo_id; only what is new is asked."""
    region = Region.parse(context.partition_key, world.grid_deg)
    known = storage.read(schemas.FLICKR_PHOTOS, region=region.key)
    locations = storage.read(schemas.SEARCH_LOCATIONS, region=region.key)
    folder = storage.folder(schemas.FLICKR_PHOTOS, region=region.key)
    search = photo_search.plan(
        locations,
        known,
        photo_search.last_searched(folder),
        flickr.filters,
        uploaded_from=world.uploaded_from,
        whole_every_days=world.whole_search_every_days,
        now=datetime.now(UTC),
        full_refresh=config.full_refresh,
    )
    unfinished = Unfinished(folder)
    raw = search.records(flickr.search, unfinished, progress.task(f"{region.key} Flickr search"))
    found = photos.photo_rows(raw, region)
    wanted = purging.keep_out(
        found.table, storage.read(schemas.PURGED_PHOTOS), storage.read(schemas.PURGED_OWNERS)
    )
    table = photos.merge_photos(known, wanted, found.outside)
    changed = storage.write(schemas.FLICKR_PHOTOS, table, region=region.key)
    # Before the answers are dropped: a run that is killed in between has not to ask for all again.
    photo_search.keep_searched(folder, search.completed)
    unfinished.close()
    where = photos.by_status(table)
    advice = "Flickr has no photo around the search locations: look at their map, and at uploaded_from"
    return report_table(
        schemas.FLICKR_PHOTOS,
        table,
        changed=changed,
        findings=[rules.not_empty(table, advice)],
        picture=previews.scatter_map(where, title=f"Photos of {region.key}", bounds=region.bounds),
        searched_from=search.uploaded_from.isoformat(),
        is_whole_search=search.is_whole,
        photos_per_day=photos.upload_rate(table, search.uploaded_to),
        new_photos=table.num_rows - known.num_rows,
        outside_region=found.outside.num_rows,
        purged_records_kept_out=found.table.num_rows - wanted.num_rows,
    )


@ground_asset(
    schemas.GROUND_IMAGES,
    "failure_share",
    deps=[flickr_photos, FLICKR_KEY],
    code_version=code_version(ground_images),
    kinds={"webdataset"},
    retry_policy=RETRY,
)
def ground_images_asset(
    context: dg.AssetExecutionContext,
    config: FetchConfig,
    world: dg.ResourceParam[Settings],
    storage: dg.ResourceParam[Storage],
    images: dg.ResourceParam[ImageFetcher],
    progress: dg.ResourceParam[Progress],
) -> dg.MaterializeResult:
    """Images of the usable photos in tar shards, verified, near-duplicates marked; failures are rows, tried later."""
    key = context.partition_key
    table, changed = ground_images.update(
        storage.read(schemas.FLICKR_PHOTOS, region=key),
        storage.folder(schemas.GROUND_IMAGES, region=key),
        images.fetch,
        concurrency=images.concurrency,
        max_attempts=world.max_attempts,
        today=datetime.now(UTC).date(),
        retry_now=config.retry_now,
        verify=config.verify,
        hosts=world.image_hosts,
        progress=progress.task(f"{key} ground images"),
    )
    folder = storage.folder(schemas.GROUND_IMAGES, region=key)
    picture = sheets.image_sheet(table, folder, seed=world.seed)
    findings = [rules.failure_share(table)]
    return report_table(schemas.GROUND_IMAGES, table, changed=changed, findings=findings, picture=picture)


@ground_asset(
    schemas.GROUND_EMBEDDINGS,
    deps=[ground_images_asset, FOUNDATION_KEY],
    code_version=code_version(embeddings),
    kinds={"parquet", "pytorch"},
    pool="gpu",
)
def ground_embeddings(
    context: dg.AssetExecutionContext,
    storage: dg.ResourceParam[Storage],
    foundation: dg.ResourceParam[FoundationModel],
    progress: dg.ResourceParam[Progress],
) -> dg.MaterializeResult:
    """f_G of every stored ground image, computed once per foundation model."""
    key = context.partition_key
    images, folder = (
        storage.read(schemas.GROUND_IMAGES, region=key),
        storage.folder(schemas.GROUND_IMAGES, region=key),
    )
    table = embeddings.embed_photos(
        images,
        storage.read(schemas.GROUND_EMBEDDINGS, region=key),
        folder,
        foundation.embed_images,
        foundation.model_id,
        progress.task(f"{key} ground embeddings"),
    )
    changed = storage.write(schemas.GROUND_EMBEDDINGS, table, region=key)
    return report_table(
        schemas.GROUND_EMBEDDINGS,
        table,
        changed=changed,
        picture=sheets.typical_sheet(table, images, folder),
        caption=TYPICAL,
        foundation_model=foundation.name,
    )


@ground_asset(
    schemas.OUTDOOR_PHOTOS, deps=[ground_embeddings], code_version=code_version(embeddings), kinds={"parquet"}
)
def outdoor_photos(
    context: dg.AssetExecutionContext,
    world: dg.ResourceParam[Settings],
    storage: dg.ResourceParam[Storage],
    scene_classifier: dg.ResourceParam[SceneClassifier],
    progress: dg.ResourceParam[Progress],
) -> dg.MaterializeResult:
    """Score and decision of the indoor/outdoor classifier, each photo scored once; nothing is deleted."""
    key = context.partition_key
    folder = storage.folder(schemas.GROUND_IMAGES, region=key)
    images = storage.read(schemas.GROUND_IMAGES, region=key)
    table = embeddings.score_outdoor(
        storage.read(schemas.GROUND_EMBEDDINGS, region=key),
        images,
        storage.read(schemas.OUTDOOR_PHOTOS, region=key),
        folder,
        scene_classifier,
        world.outdoor_threshold,
        progress.task(f"{key} outdoor photos"),
    )
    changed = storage.write(schemas.OUTDOOR_PHOTOS, table, region=key)
    picture = sheets.outdoor_sheet(images, table, folder, seed=world.seed)
    scores = table["outdoor_score"].to_numpy()
    share = float(np.mean(table["is_outdoor"].to_numpy(zero_copy_only=False))) if table.num_rows else 0.0
    return report_table(
        schemas.OUTDOOR_PHOTOS,
        table,
        changed=changed,
        picture=picture,
        caption="Green frames are kept as outdoor photos, red ones are not paired.",
        pictures={"scores": previews.histograms({"outdoor score": scores}, title=f"{key}: outdoor scores")},
        outdoor_share=share,
        classifier=scene_classifier.classifier_id,
    )
