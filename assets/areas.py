"""The asset that turns registered areas into region partitions.

Areas are registered with `graft areas add`; what a region is, is in graft_pipeline.regions.
"""

import dagster as dg

from assets.reporting import OWNERS, check_specs, report_table, table_schema
from graft_pipeline import areas, schemas
from graft_pipeline.errors import InputError
from graft_pipeline.partitions import REGION_PARTITIONS
from graft_pipeline.settings import Settings
from resources.storage import Storage


@dg.asset(
    group_name="areas",
    owners=OWNERS,
    kinds={"parquet"},
    metadata={"dagster/column_schema": table_schema(schemas.REGIONS)},
    check_specs=check_specs(["regions"], partitioned=False),
)
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
    return report_table(
        schemas.REGIONS,
        table,
        changed=changed,
        areas=len(registered),
        regions=len(keys),
        keys=", ".join(keys[:50]),
    )
