"""The asset that turns registered areas into region partitions.

Areas are registered with `graft areas add`; what a region is, is in graft_pipeline.regions.
"""

import dagster as dg

from assets.keys import AREAS_KEY
from assets.reporting import (
    OWNERS,
    check_specs,
    measured,
    report_table,
    retried,
    table_metadata,
)
from graft_pipeline import areas, previews, schemas
from graft_pipeline import regions as grid
from graft_pipeline.errors import InputError
from graft_pipeline.partitions import REGION_PARTITIONS
from graft_pipeline.provenance import code_version
from graft_pipeline.settings import Settings
from resources.storage import Storage


@dg.asset(
    group_name="areas",
    owners=OWNERS,
    deps=[AREAS_KEY],
    code_version=code_version(areas, grid),
    kinds={"parquet"},
    metadata=table_metadata(schemas.REGIONS),
    check_specs=check_specs(["regions"], partitioned=False),
)
@retried
@measured
def regions(
    context: dg.AssetExecutionContext, world: dg.ResourceParam[Settings], storage: dg.ResourceParam[Storage]
) -> dg.MaterializeResult:
    """Cells of the lon/lat grid that the registered areas touch; adds their keys to the region partitions."""
    registered = areas.list_areas(storage.areas_folder)
    if not registered:
        raise InputError(
            "No area is registered: run `graft areas add FILE` with any vector file of polygons."
        )
    table = areas.regions_table(registered, world.grid_deg)
    changed = storage.write(schemas.REGIONS, table)
    keys = sorted(set(table["region"].to_pylist()))
    context.instance.add_dynamic_partitions(REGION_PARTITIONS.name, keys)
    cells = {key: grid.Region.parse(key, world.grid_deg).bounds for key in keys}
    return report_table(
        schemas.REGIONS,
        table,
        changed=changed,
        picture=previews.cell_frames(
            cells,
            areas.union(registered),
            title=f"Regions: {len(keys):,}, registered areas: {len(registered):,}",
        ),
        areas=len(registered),
        regions=len(keys),
        keys=", ".join(keys[:50]),
    )
