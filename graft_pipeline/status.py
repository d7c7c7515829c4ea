"""What is materialised where: one row for each region, from the datasets themselves.

Dagster's own view of runs and events is in its UI; this needs no instance.
"""

from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline import schemas
from graft_pipeline.schemas import Dataset

GROUND = (
    schemas.SEARCH_LOCATIONS,
    schemas.FLICKR_PHOTOS,
    schemas.GROUND_IMAGES,
    schemas.GROUND_EMBEDDINGS,
    schemas.OUTDOOR_PHOTOS,
)
SENSOR = (schemas.SCENES, schemas.TILES, schemas.CHIPS, schemas.PAIRS, schemas.CHIP_EMBEDDINGS)


class Tables(Protocol):
    """Where tables lie (resources.storage.Storage)."""

    def partitions(self, dataset: Dataset, **fixed: str) -> list[dict[str, str]]:
        """Partition values that exist."""
        ...

    def read(self, dataset: Dataset, **values: str) -> pa.Table:
        """Rows of one partition."""
        ...


def _cell(table: pa.Table) -> str:
    """`ok/all` where rows can fail, else their number."""
    if "status" not in table.column_names:
        return f"{table.num_rows:,}"
    ok = pc.sum(pc.equal(table["status"], "ok")).as_py() or 0
    return f"{ok:,}/{table.num_rows:,}"


def region_status(storage: Tables) -> list[tuple[str, list[str], list[list[str]]]]:
    """Count the rows of every dataset in every region.

    Args:
        storage: where the tables lie.

    Returns:
        (group, column names, rows) for the ground and for each sensor; `-` where a dataset has not been
        materialised for a region.
    """
    cells: dict[tuple[str, str, str], str] = {}
    for dataset in (*GROUND, *SENSOR):
        for values in storage.partitions(dataset):
            group = values.get("sensor", "ground")
            cells[group, values["region"], dataset.name] = _cell(storage.read(dataset, **values))
    known = set(storage.read(schemas.REGIONS)["region"].to_pylist())
    regions = sorted(known | {region for _, region, _ in cells})
    groups = ["ground", *sorted({group for group, _, _ in cells} - {"ground"})] if regions else []
    tables = []
    for group in groups:
        names = [dataset.name for dataset in (GROUND if group == "ground" else SENSOR)]
        rows = [[region, *(cells.get((group, region, name), "-") for name in names)] for region in regions]
        tables.append((group, ["region", *names], rows))
    return tables
