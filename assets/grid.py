"""Chips and embeddings on a regular grid over the registered areas, for search and maps of ground without photos.

They exist for sensors that GRAFT_GRID_STRIDE_M names. Where grid tiles lie is decided in graft_pipeline/grid.py; no
asset of the training path depends on them.
"""

import dagster as dg

from assets.ground import FetchConfig
from assets.keys import external_collection
from assets.learning import embed_region
from assets.reporting import (
    OWNERS,
    check_specs,
    measured,
    report_table,
    retried,
    table_schema,
)
from assets.sensors import update_chips
from graft_pipeline import areas, chips, embeddings, geotiff, grid, schemas, sheets
from graft_pipeline.imagery import ImagerySource, Sensor
from graft_pipeline.partitions import REGION_PARTITIONS
from graft_pipeline.progress import Progress
from graft_pipeline.provenance import code_version
from graft_pipeline.regions import Region
from graft_pipeline.settings import Settings
from resources.storage import Storage


def build_grid_assets(sensor: Sensor, settings: Settings) -> list[dg.AssetsDefinition]:
    """The grid of one sensor.

    Args:
        sensor: the sensor's record.
        settings: name the stride.

    Returns:
        `grid_chips` and `grid_embeddings` if the sensor has a grid.
    """
    if sensor.name not in settings.grid_stride_m:
        return []
    kept_as = grid.grid_sensor(sensor)
    options = {
        "key_prefix": sensor.name,
        "group_name": sensor.name,
        "owners": OWNERS,
        "partitions_def": REGION_PARTITIONS,
    }

    @dg.asset(
        **options,
        deps=["regions", [sensor.name, "scenes"], external_collection(sensor, settings.imagery)],
        code_version=code_version(grid, chips, geotiff),
        kinds={"webdataset"},
        pool="imagery",
        metadata={"dagster/column_schema": table_schema(schemas.CHIPS)},
        check_specs=check_specs([sensor.name, "grid_chips"], "chip_georeference", "cloud_and_time"),
    )
    @retried
    @measured
    def grid_chips(
        context: dg.AssetExecutionContext,
        config: FetchConfig,
        world: dg.ResourceParam[Settings],
        storage: dg.ResourceParam[Storage],
        imagery: dg.ResourceParam[ImagerySource],
        progress: dg.ResourceParam[Progress],
    ) -> dg.MaterializeResult:
        """Images of grid tiles over the region's share of the registered areas; no photo is paired with them."""
        region = Region.parse(context.partition_key, world.grid_deg)
        place = {"sensor": kept_as.name, "region": region.key}
        area = areas.union(areas.list_areas(storage.areas_folder))
        tiles = grid.grid_tiles(region, area, kept_as, world.grid_stride_m[sensor.name])
        storage.write(schemas.TILES, tiles, **place)
        listed = storage.read(schemas.SCENES, sensor=sensor.name, region=region.key)
        folder, nobody = storage.folder(schemas.CHIPS, **place), schemas.FLICKR_PHOTOS.empty()
        report = progress.task(f"{region.key} {sensor.name} grid chips")
        table, changed, findings = update_chips(
            tiles, listed, nobody, kept_as, folder, world, imagery, config, report
        )
        return report_table(
            schemas.CHIPS,
            table,
            changed=changed,
            findings=findings,
            picture=sheets.chip_sheet(table, folder, seed=world.seed),
            stride_m=world.grid_stride_m[sensor.name],
        )

    @dg.asset(
        **options,
        deps=[grid_chips, dg.AssetDep([sensor.name, "image_encoder"])],
        code_version=code_version(embeddings),
        kinds={"parquet", "pytorch"},
        pool="gpu",
        metadata={"dagster/column_schema": table_schema(schemas.CHIP_EMBEDDINGS)},
        check_specs=check_specs([sensor.name, "grid_embeddings"]),
    )
    @measured
    def grid_embeddings(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        progress: dg.ResourceParam[Progress],
    ) -> dg.MaterializeResult:
        """f_S^I of every grid chip's central crop; the search index takes them in beside those of photos' tiles."""
        report = progress.task(f"{context.partition_key} {sensor.name} grid embeddings")
        return embed_region(storage, sensor, kept_as.name, context.partition_key, report)

    return [grid_chips, grid_embeddings]
