from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from upath import UPath

from graft_pipeline import schemas
from graft_pipeline.errors import DataError
from graft_pipeline.status import region_status
from resources.storage import Storage


def test_every_region_has_its_counts(root: UPath, make_photos: Callable[..., pa.Table]) -> None:
    storage = Storage(root)
    assert region_status(storage) == []
    refused: dict[str, Any] = {"status": "rejected", "reason": "no_geotag"}
    storage.write(schemas.FLICKR_PHOTOS, make_photos([{}, {}, refused]), region="N42W072")
    storage.write(schemas.FLICKR_PHOTOS, schemas.FLICKR_PHOTOS.empty(), region="N42W073")
    storage.write(schemas.TILES, schemas.TILES.empty(), sensor="naip", region="N42W072")
    (ground, names, rows), (sensor, of_sensor, rows_of_sensor) = region_status(storage)
    assert (ground, sensor) == ("ground", "naip")
    column = names.index("flickr_photos")
    assert [(row[0], row[column], row[1]) for row in rows] == [
        ("N42W072", "2/3", "-"),
        ("N42W073", "0/0", "-"),
    ]
    assert [row[of_sensor.index("tiles")] for row in rows_of_sensor] == ["0", "-"]


def test_a_damaged_file_is_named(root: UPath, make_photos: Callable[..., pa.Table]) -> None:
    storage = Storage(root)
    storage.write(schemas.FLICKR_PHOTOS, make_photos([{}]), region="N42W072")
    (storage.folder(schemas.FLICKR_PHOTOS, region="N42W072") / "flickr_photos.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="flickr_photos"):
        region_status(storage)
