"""Builders of small tables, shared by the tests of the domain."""

import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import settings
from upath import UPath

from graft_pipeline.schemas import FLICKR_PHOTOS

# Machines that run tests are shared: properties have no deadline.
settings.register_profile("domain", max_examples=30, deadline=None)
settings.load_profile("domain")

START = datetime(2015, 6, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="session")
def make_photos() -> Callable[..., pa.Table]:
    """Builds FLICKR_PHOTOS rows from dicts; what is left out takes a plain ok photo's value."""

    def build(rows: list[dict[str, Any]]) -> pa.Table:
        full = []
        for number, row in enumerate(rows):
            photo_id = row.get("photo_id", f"{1000 + number}")
            taken = row.get("taken_at_local", START.replace(tzinfo=None) + timedelta(hours=number))
            default = {
                **dict.fromkeys(FLICKR_PHOTOS.schema.names),
                "photo_id": photo_id,
                "owner_id": "someone@N00",
                "lon_deg": -71.6,
                "lat_deg": 42.4,
                "accuracy": 16,
                "uploaded_at_utc": START + timedelta(days=1, hours=number),
                "taken_at_local": taken,
                "taken_at_utc": taken and taken.replace(tzinfo=UTC) + timedelta(hours=5),
                "is_taken_exact": True,
                "image_url": f"https://live.staticflickr.com/1/{photo_id}_a_n.jpg",
                "status": "ok",
            }
            full.append(default | row)
        return pa.Table.from_pylist(full, schema=FLICKR_PHOTOS.schema)

    return build


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[UPath]:
    """A storage root: a local folder, then an object store without renames."""
    if request.param == "local":
        yield UPath(tmp_path / "root")
        return
    path = UPath(f"memory://{uuid.uuid4().hex}")
    yield path
    if path.exists():
        path.fs.rm(path.path, recursive=True)


@pytest.fixture
def snapshot_of() -> Callable[[UPath], dict[str, bytes]]:
    """All files below a folder with their bytes."""

    def read(folder: UPath) -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    return read
