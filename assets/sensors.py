"""The satellite half of a region, one factory for every sensor: scenes, tiles, chips, pairs.

Rules are in graft_pipeline.sampling, .scenes, .chips, .pairing and .splits; imagery's clients in resources.
"""

from datetime import UTC, datetime

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc
from upath import UPath

from assets.ground import FetchConfig
from assets.keys import SOURCE_KINDS, external_collection
from assets.reporting import (
    OWNERS,
    RETRY,
    check_specs,
    measured,
    only_transient_retries,
    report_table,
    table_metadata,
)
from graft_pipeline import chips, geotiff, pairing, photos, previews, rules, sampling, scenes, schemas, sheets
from graft_pipeline.imagery import ImagerySource, Sensor, Source
from graft_pipeline.partitions import REGION_PARTITIONS
from graft_pipeline.progress import Progress, Report
from graft_pipeline.provenance import code_version
from graft_pipeline.regions import Region
from graft_pipeline.settings import Settings
from resources.storage import Storage

GROUND_TABLES = ["flickr_photos", "ground_images", "outdoor_photos"]


class TilesConfig(dg.Config):
    """What a single run may ask of `tiles`."""

    #: Choose all tiles anew instead of adding to those that the region has.
    full_refresh: bool = False


def eligible_photos(storage: Storage, region: str) -> pa.Table:
    """Photos of a region that may be paired: ok metadata, a stored image, outdoors."""
    return photos.eligible(
        storage.read(schemas.FLICKR_PHOTOS, region=region),
        storage.read(schemas.GROUND_IMAGES, region=region),
        storage.read(schemas.OUTDOOR_PHOTOS, region=region),
    )


def update_chips(
    tiles: pa.Table,
    listed: pa.Table,
    taken: pa.Table,
    sensor: Sensor,
    folder: UPath,
    world: Settings,
    imagery: ImagerySource,
    config: FetchConfig,
    report: Report,
) -> tuple[pa.Table, bool, list[rules.Finding]]:
    """Fetch the chips that tiles lack, under the deployment's settings, and hold all to the rules of chips.

    Args:
        tiles: see `chips.update`, as for the next four.
        listed: scenes.
        taken: photos, for their times.
        sensor: whose chips.
        folder: of the partition.
        world: how often a failed chip is tried.
        imagery: where pixels come from.
        config: of the run.
        report: progress.

    Returns:
        CHIPS rows, whether any file changed, and what the rules `chip_georeference` and `cloud_and_time` found.
    """
    table, changed = chips.update(
        tiles,
        listed,
        taken,
        sensor,
        folder,
        imagery.get_chip,
        concurrency=imagery.concurrency,
        max_attempts=world.max_attempts,
        today=datetime.now(UTC).date(),
        retry_now=config.retry_now,
        verify=config.verify,
        progress=report,
    )
    findings = [
        rules.chip_georeference(table, tiles, rules.read_chip(folder)),
        rules.cloud_and_time(table, tiles, taken, listed, sensor),
    ]
    return table, changed, findings


def build_sensor_assets(sensor: Sensor, source: Source = "earth_engine") -> list[dg.AssetsDefinition]:
    """The region-partitioned assets of one sensor, with the sensor's name as key prefix and group.

    Args:
        sensor: the sensor's record.
        source: where its imagery comes from.

    Returns:
        `scenes`, `tiles`, `chips`, `pairs`.
    """
    collection = external_collection(sensor, source)

    def sensor_asset(
        dataset: schemas.Dataset, *rules_of_data: str, retry_policy: dg.RetryPolicy | None = None, **options
    ):
        make = dg.asset(
            name=dataset.name,
            key_prefix=sensor.name,
            group_name=sensor.name,
            owners=OWNERS,
            partitions_def=REGION_PARTITIONS,
            metadata=table_metadata(dataset, sensor, source),
            check_specs=check_specs([sensor.name, dataset.name], *rules_of_data),
            **options,
        )
        return lambda function: make(only_transient_retries(measured(function), retry_policy))

    @sensor_asset(
        schemas.SCENES,
        deps=["regions", collection],
        code_version=code_version(scenes),
        kinds={"parquet", SOURCE_KINDS[source]},
        pool="imagery",
        retry_policy=RETRY,
    )
    def scenes_asset(
        context: dg.AssetExecutionContext,
        world: dg.ResourceParam[Settings],
        storage: dg.ResourceParam[Storage],
        imagery: dg.ResourceParam[ImagerySource],
    ) -> dg.MaterializeResult:
        """Scenes of the collection that touch the region, listed once; which serves which tile is chosen locally."""
        region = Region.parse(context.partition_key, world.grid_deg)
        table = scenes.scene_rows(imagery.list_scenes(sensor, region.bounds), sensor)
        changed = storage.write(schemas.SCENES, table, sensor=sensor.name, region=region.key)
        picture = sheets.scene_charts(table, f"{sensor.name} scenes of {region.key}")
        return report_table(schemas.SCENES, table, changed=changed, picture=picture)

    @sensor_asset(
        schemas.TILES,
        "center_spacing",
        deps=[*GROUND_TABLES],
        code_version=code_version(sampling),
        kinds={"parquet"},
    )
    def tiles_asset(
        context: dg.AssetExecutionContext,
        config: TilesConfig,
        world: dg.ResourceParam[Settings],
        storage: dg.ResourceParam[Storage],
    ) -> dg.MaterializeResult:
        """Ground squares centred on photos, never closer than half a footprint; what arrives later moves no tile."""
        region = Region.parse(context.partition_key, world.grid_deg)
        usable = eligible_photos(storage, region.key)
        known = storage.read(schemas.TILES, sensor=sensor.name, region=region.key)
        table = sampling.sample_tiles(
            usable,
            region,
            sensor,
            None if config.full_refresh else known,
            mode=world.sampling,
            seed=world.seed,
            validation_fraction=world.validation_fraction,
        )
        changed = storage.write(schemas.TILES, table, sensor=sensor.name, region=region.key)
        layers = {
            "photos": (usable["lon_deg"].to_numpy(), usable["lat_deg"].to_numpy()),
            "tiles": (table["center_lon_deg"].to_numpy(), table["center_lat_deg"].to_numpy()),
        }
        title = f"{sensor.name} tiles of {region.key}"
        findings = (
            [rules.center_spacing(table, sensor)]
            if world.sampling == "non_overlapping"
            else [rules.Finding("center_spacing", 0, f"does not apply to sampling {world.sampling!r}")]
        )
        return report_table(
            schemas.TILES,
            table,
            changed=changed,
            findings=findings,
            picture=previews.scatter_map(layers, title=title, bounds=region.bounds),
            usable_photos=usable.num_rows,
            new_tiles=table.num_rows - (0 if config.full_refresh else known.num_rows),
        )

    @sensor_asset(
        schemas.CHIPS,
        "chip_georeference",
        "cloud_and_time",
        "failure_share",
        "nodata_share",
        deps=[tiles_asset, scenes_asset, collection],
        code_version=code_version(chips, geotiff),
        kinds={"webdataset", SOURCE_KINDS[source]},
        pool="imagery",
        retry_policy=RETRY,
    )
    def chips_asset(
        context: dg.AssetExecutionContext,
        config: FetchConfig,
        world: dg.ResourceParam[Settings],
        storage: dg.ResourceParam[Storage],
        imagery: dg.ResourceParam[ImagerySource],
        progress: dg.ResourceParam[Progress],
    ) -> dg.MaterializeResult:
        """448 px images of the tiles, each one request for pixels of one scene, in tar shards with an index."""
        place = {"sensor": sensor.name, "region": context.partition_key}
        tiles, listed = storage.read(schemas.TILES, **place), storage.read(schemas.SCENES, **place)
        taken = storage.read(schemas.FLICKR_PHOTOS, region=context.partition_key)
        folder = storage.folder(schemas.CHIPS, **place)
        report = progress.task(f"{context.partition_key} {sensor.name} chips")
        table, changed, findings = update_chips(
            tiles, listed, taken, sensor, folder, world, imagery, config, report
        )
        findings += [rules.failure_share(table), rules.nodata_share(table)]
        return report_table(
            schemas.CHIPS,
            table,
            changed=changed,
            findings=findings,
            picture=sheets.chip_sheet(table, folder, seed=world.seed),
            pictures={"clouds_and_times": sheets.chip_charts(table, f"{sensor.name} chips")},
        )

    @sensor_asset(
        schemas.PAIRS,
        "footprint_membership",
        "photo_cap",
        "split_disjointness",
        "not_empty",
        deps=[tiles_asset, chips_asset, *GROUND_TABLES],
        code_version=code_version(pairing),
        kinds={"parquet"},
    )
    def pairs_asset(
        context: dg.AssetExecutionContext,
        world: dg.ResourceParam[Settings],
        storage: dg.ResourceParam[Storage],
    ) -> dg.MaterializeResult:
        """One row for each photo in a tile's footprint, with its exact pixel in the chip: the manifest."""
        region = Region.parse(context.partition_key, world.grid_deg)
        place = {"sensor": sensor.name, "region": region.key}
        tiles, made = storage.read(schemas.TILES, **place), storage.read(schemas.CHIPS, **place)
        usable = eligible_photos(storage, region.key)
        table = pairing.make_pairs(tiles, made, usable, region, sensor, world.photos_per_tile)
        changed = storage.write(schemas.PAIRS, table, **place)
        findings = [
            rules.footprint_membership(table, tiles, sensor),
            rules.photo_cap(table, world.photos_per_tile),
            rules.split_disjointness([tiles], table),
            rules.not_empty(
                table, "no photo of this region has a tile with a chip: see the reasons of chips and photos"
            ),
        ]
        return report_table(
            schemas.PAIRS,
            table,
            changed=changed,
            findings=findings,
            picture=sheets.pair_sheet(
                table,
                made,
                storage.folder(schemas.CHIPS, **place),
                storage.read(schemas.GROUND_IMAGES, region=region.key),
                storage.folder(schemas.GROUND_IMAGES, region=region.key),
                seed=world.seed,
                footprint_px=sensor.crop_px,
            ),
            caption="A chip with its footprint, and photos in it: a photo's frame has the colour of its dot.",
            pictures={"photos_and_times": sheets.pair_charts(table, f"{sensor.name} pairs")},
            tiles=pc.count_distinct(table["tile_id"]).as_py(),
            photos=pc.count_distinct(table["photo_id"]).as_py(),
            **{f"split/{name}": count for name, count in pairing.split_counts(table).items()},
        )

    return [scenes_asset, tiles_asset, chips_asset, pairs_asset]
