"""What is materialised where: one row for each region, from the datasets themselves.

Dagster's own view of runs and events is in its UI; this needs no instance.
"""

from contextlib import closing
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from graft_pipeline import schemas
from graft_pipeline.manifests import connect
from graft_pipeline.schemas import Dataset

if TYPE_CHECKING:
    from upath import UPath

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

    @property
    def root(self) -> "UPath":
        """Folder of all datasets."""
        ...

    def partitions(self, dataset: Dataset, **fixed: str) -> list[dict[str, str]]:
        """Partition values that exist."""
        ...

    def read(self, dataset: Dataset, **values: str) -> pa.Table:
        """Rows of one partition."""
        ...


def region_status(storage: Tables) -> list[tuple[str, list[str], list[list[str]]]]:
    """Count the rows of every dataset in every region; embeddings and the like are not read for it.

    Args:
        storage: where the tables lie.

    Returns:
        (group, column names, rows) for the ground and for each sensor: `ok/all` where rows can fail, else their
        number; `-` where a dataset has not been materialised for a region.

    Raises:
        DataError: if a file is damaged.
        ServiceError: if a file cannot be read.
    """
    cells: dict[tuple[str, str, str], str] = {}
    with closing(connect(storage.root, (*GROUND, *SENSOR))) as database:
        for dataset in (*GROUND, *SENSOR):
            can_fail = "status" in dataset.schema.names
            for values in storage.partitions(dataset):
                # A file without rows is in no group.
                place = values.get("sensor", "ground"), values["region"], dataset.name
                cells[place] = "0/0" if can_fail else "0"
            sensor = "sensor" if "sensor" in dataset.partitions else "'ground'"
            ok = "count(*) FILTER (status = 'ok')" if can_fail else "NULL"
            counted = database.execute(
                f"SELECT {sensor}, region, {ok}, count(*) FROM {dataset.name} GROUP BY ALL"
            )
            for group, region, good, rows in counted.fetchall():
                shown = f"{rows:,}" if good is None else f"{good:,}/{rows:,}"
                cells[group, region, dataset.name] = shown
    known = set(storage.read(schemas.REGIONS)["region"].to_pylist())
    regions = sorted(known | {region for _, region, _ in cells})
    groups = ["ground", *sorted({group for group, _, _ in cells} - {"ground"})] if regions else []
    tables = []
    for group in groups:
        names = [dataset.name for dataset in (GROUND if group == "ground" else SENSOR)]
        rows = [[region, *(cells.get((group, region, name), "-") for name in names)] for region in regions]
        tables.append((group, ["region", *names], rows))
    return tables
