"""What one tile shows: its chip, and the photos that were taken on it, by reference unless copies may be shown.

What tiles score is in scoring.py; how chips and images lie in storage, in shards.py.
"""

import re
import threading
from collections import OrderedDict
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline import chips
from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Grid, projection
from graft_pipeline.grid import kept_as, sensor_of
from graft_pipeline.imagery import Sensor
from graft_pipeline.manifests import partition_file, partition_folder, read_table
from graft_pipeline.schemas import CHIPS, FLICKR_PHOTOS, GROUND_IMAGES, PAIRS, Dataset
from graft_pipeline.shards import read_member
from graft_pipeline.web.licences import licence

if TYPE_CHECKING:
    from upath import UPath

#: Longer side of a photo's copy.
_PHOTO_PX = 320
#: Tables of regions that are kept.
_KEPT_TABLES = 24
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}")


class UnknownError(InputError):
    """No such tile, photo or region."""


class Tiles:
    """Reads single tiles from a storage root. Safe to share between threads.

    Args:
        root: storage root.
        sensor: whose tiles.
        shows_copies: whether copies of photos are given out. Only where the photos are nobody's, as on the planet:
            photos of real people are linked to, so that whoever takes theirs down takes them down here.
    """

    def __init__(self, root: "UPath", sensor: Sensor, *, shows_copies: bool) -> None:
        self._root, self._sensor, self.shows_copies = root, sensor, shows_copies
        self._tables: OrderedDict[str, tuple[tuple[int, float], pa.Table]] = OrderedDict()
        self._lock = threading.Lock()

    def tile(self, region: str, tile_id: str) -> dict[str, Any]:
        """A tile's record: its chip, where and when, and its photos.

        Args:
            region: its region.
            tile_id: its id.

        Returns:
            JSON.

        Raises:
            UnknownError: if there is no such tile with a stored chip.
        """
        chip = self._chip(region, tile_id)
        names = ("epsg", "x0_m", "y0_m", "gsd_m", "chip_px", "chip_px")
        grid = Grid(*(chip[name] for name in names))
        return {
            "tile_id": tile_id,
            "region": region,
            "sensor": self._sensor.name,
            "scene_id": chip["scene_id"],
            "acquired_on": chip["acquired_at_utc"].date().isoformat(),
            "cloud_pct": chip["cloud_pct"],
            "gsd_m": chip["gsd_m"],
            "chip_px": chip["chip_px"],
            "footprint_px": self._sensor.crop_px,
            "chip_ring": _ring(grid),
            "footprint_ring": _ring(self._footprint(grid)),
            "photos": self._photos(region, tile_id, chip["chip_px"]),
        }

    def _footprint(self, grid: Grid) -> Grid:
        side = self._sensor.crop_px
        edge_m = (grid.width_px - side) / 2 * grid.gsd_m
        return Grid(grid.epsg, grid.x0_m + edge_m, grid.y0_m - edge_m, grid.gsd_m, side, side)

    def chip_jpeg(self, region: str, tile_id: str, *, is_cropped: bool) -> bytes:
        """A tile's chip as JPEG.

        Args:
            region: its region.
            tile_id: its id.
            is_cropped: only the footprint in its middle, which is what the encoder sees.

        Returns:
            JPEG.

        Raises:
            UnknownError: if there is no such tile with a stored chip.
        """
        row = self._chip(region, tile_id)
        folder = partition_folder(self._root, CHIPS, sensor=self._kept_as(tile_id), region=region)
        pixels = chips.decode(read_member(folder, row["shard"], row["offset"], row["size_bytes"]))
        if is_cropped:
            edge = (pixels.shape[0] - self._sensor.crop_px) // 2
            pixels = pixels[edge : edge + self._sensor.crop_px, edge : edge + self._sensor.crop_px]
        return _jpeg(pixels)

    def photo_jpeg(self, region: str, photo_id: str) -> bytes:
        """A small copy of a photo.

        Args:
            region: the region that it was found in.
            photo_id: its id.

        Returns:
            JPEG.

        Raises:
            UnknownError: if there is no such photo, or copies are not given out.
        """
        if not self.shows_copies:
            raise UnknownError("Photos are not copied here: follow the link to the photo's own page.")
        row = self._row(GROUND_IMAGES, "photo_id", photo_id, region=region)
        if row["status"] != "ok":
            raise UnknownError(f"Photo {photo_id} has no stored image: see its status in ground_images.")
        from PIL import Image

        folder = partition_folder(self._root, GROUND_IMAGES, region=region)
        content = read_member(folder, row["shard"], row["offset"], row["size_bytes"])
        with Image.open(BytesIO(content)) as image:
            small = image.convert("RGB")
        small.thumbnail((_PHOTO_PX, _PHOTO_PX))
        return _jpeg(np.asarray(small))

    def _chip(self, region: str, tile_id: str) -> dict[str, Any]:
        row = self._row(CHIPS, "tile_id", tile_id, sensor=self._kept_as(tile_id), region=region)
        if row["status"] != "ok":
            raise UnknownError(f"Tile {tile_id} has no stored chip: see its status in chips.")
        return row

    def _kept_as(self, tile_id: str) -> str:
        """The sensor name that a tile is kept under: of a grid it has another."""
        name = sensor_of(tile_id)
        return name if name in kept_as(self._sensor.name) else self._sensor.name

    def _photos(self, region: str, tile_id: str, chip_px: int) -> list[dict[str, Any]]:
        """Records of a tile's photos, those nearest to its centre first."""
        try:
            pairs = self._table(PAIRS, sensor=self._sensor.name, region=region)
            found = self._table(FLICKR_PHOTOS, region=region)
        except UnknownError:
            return []
        of_tile = pairs.filter(pc.equal(pairs["tile_id"], tile_id)).to_pylist()
        ids = pa.array([pair["photo_id"] for pair in of_tile], pa.string())
        by_id = {row["photo_id"]: row for row in found.filter(pc.is_in(found["photo_id"], ids)).to_pylist()}
        middle = chip_px / 2
        of_tile.sort(
            key=lambda pair: (
                (pair["col_px"] - middle) ** 2 + (pair["row_px"] - middle) ** 2,
                pair["photo_id"],
            )
        )
        return [self._photo(region, pair, by_id.get(pair["photo_id"], {})) for pair in of_tile]

    def _photo(self, region: str, pair: dict[str, Any], photo: dict[str, Any]) -> dict[str, Any]:
        photo_id, owner = pair["photo_id"], photo.get("owner_id")
        page = (
            f"https://www.flickr.com/photos/{quote(owner, safe='@')}/{quote(photo_id, safe='')}/"
            if owner
            else None
        )
        taken = pair["taken_at_utc"]
        return {
            "photo_id": photo_id,
            "title": photo.get("title"),
            "tags": (photo.get("tags") or "").split(),
            "licence": licence(photo.get("license_id")),
            "taken_on": None if taken is None else taken.date().isoformat(),
            "col_px": round(pair["col_px"], 1),
            "row_px": round(pair["row_px"], 1),
            # The planet's photos have no page on the real site.
            "page_url": None if self.shows_copies else page,
            "copy_url": f"api/photo/{region}/{photo_id}.jpg" if self.shows_copies else None,
        }

    def _row(self, dataset: Dataset, key: str, value: str, **place: str) -> dict[str, Any]:
        for part in (value, place["region"]):
            if not _ID.fullmatch(part):
                raise UnknownError(f"{part[:100]!r} is no id: take one from a search.")
        table = self._table(dataset, **place)
        position = pc.index(table[key], value).as_py()
        if position < 0:
            raise UnknownError(
                f"{place['region']} has no {key.removesuffix('_id')} {value}: take an id from a search."
            )
        row: dict[str, Any] = table.slice(position, 1).to_pylist()[0]
        return row

    def _table(self, dataset: Dataset, **place: str) -> pa.Table:
        """A partition's rows, read again when its file changes: a purged photo must not live on here."""
        path = partition_file(self._root, dataset, **place)
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise UnknownError(
                f"No {dataset.name} of {place['region']} are stored: take a region from a search, or materialise them."
            ) from None
        stamp = (int(stat.st_size), float(stat.st_mtime))
        with self._lock:
            kept = self._tables.get(str(path))
            if kept is not None and kept[0] == stamp:
                self._tables.move_to_end(str(path))
                return kept[1]
        table = read_table(path, dataset)
        if table is None:
            raise UnknownError(
                f"No {dataset.name} of {place['region']} are stored: take a region from a search, or materialise them."
            )
        with self._lock:
            self._tables[str(path)] = (stamp, table)
            while len(self._tables) > _KEPT_TABLES:
                self._tables.popitem(last=False)
        return table


def _ring(grid: Grid) -> list[list[float]]:
    """The corners of a grid as [lat, lon], the order of map libraries.

    Across the antimeridian longitudes go on beyond 180 or -180, as on maps, on from those of the grid's middle.
    """
    x_min, y_min, x_max, y_max = grid.bounds_m
    lon, lat = projection(grid.epsg).inverse(
        [(x_min + x_max) / 2, x_min, x_max, x_max, x_min], [(y_min + y_max) / 2, y_min, y_min, y_max, y_max]
    )
    corners = zip(lat[1:], np.unwrap(lon, period=360)[1:], strict=True)
    return [[round(float(a), 7), round(float(b), 7)] for a, b in corners]


def _jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=86)
    return buffer.getvalue()
