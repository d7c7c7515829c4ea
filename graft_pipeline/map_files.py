"""Concept maps as files: GeoParquet, Cloud-optimised GeoTIFF, and one HTML page that needs no network.

What a map counts is in concept_maps.py; where tiles' chips lie is told by the caller.
"""

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from graft_pipeline.concept_maps import EQUAL_AREA, ConceptMaps, to_table
from graft_pipeline.errors import InputError
from graft_pipeline.geometry import transformer
from graft_pipeline.manifests import conform, parquet_bytes, remove_partial_files, write_bytes_atomic
from graft_pipeline.previews import data_uri
from graft_pipeline.schemas import CONCEPT_MAPS
from graft_pipeline.sheets import ReadRows, chips_by_id

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry
    from upath import UPath

#: Endings of the files that a map may be.
FORMS = (".parquet", ".tif", ".html")
#: What a browser draws without delay, and pixels times bands of a raster, which is made in memory.
MAX_PAGE_CELLS = 20_000
MAX_VALUES = 200_000_000
#: Pictures of a concept's best tiles on a page, and their side.
BEST_TILES = 12
PICTURE_PX = 128


class TooManyCellsError(InputError):
    """A form of a map cannot hold so many cells."""


def geoparquet(maps: ConceptMaps) -> bytes:
    """The maps as GeoParquet: CONCEPT_MAPS rows, the cells' outlines as geometry."""
    return parquet_bytes(conform(to_table(maps), CONCEPT_MAPS))


def geotiff(maps: ConceptMaps) -> bytes:
    """The maps as Cloud-optimised GeoTIFF, written by GDAL's own driver.

    Args:
        maps: the maps.

    Returns:
        The file's content: one float32 band for each concept, named after it, of the share of hits, and a last one
        of the number of tiles; NaN where no tile is. The CRS is `concept_maps.EQUAL_AREA`; squares are one pixel,
        hexagons about a hundred.

    Raises:
        InputError: if there is no cell.
        TooManyCellsError: if the raster would be too large.
    """
    import rasterio.shutil
    from rasterio.features import rasterize
    from rasterio.io import MemoryFile
    from rasterio.transform import from_origin

    _check_not_empty(maps)
    outlines, bounds = _projected(maps)
    pixel_m = maps.cells.pixel_m
    west, north = math.floor(bounds[0] / pixel_m + 1e-6), math.ceil(bounds[3] / pixel_m - 1e-6)
    width = math.ceil(bounds[2] / pixel_m - 1e-6) - west
    height = north - math.floor(bounds[1] / pixel_m + 1e-6)
    if width * height * (len(maps.concepts) + 1) > MAX_VALUES:
        raise TooManyCellsError(
            f"A GeoTIFF would be {width} x {height} pixels of {pixel_m:.0f} m: map a smaller area (one side of the "
            "antimeridian at a time), or give larger cells."
        )
    transform = from_origin(west * pixel_m, north * pixel_m, pixel_m, pixel_m)
    cell_of = rasterize(
        zip(outlines, range(len(outlines)), strict=True),
        out_shape=(height, width),
        transform=transform,
        fill=-1,
        dtype="int32",
    )
    bands = np.concatenate([maps.share, maps.tiles[None]]).astype(np.float32)
    # The last one is what cell -1, none, shows.
    bands = np.pad(bands, ((0, 0), (0, 1)), constant_values=np.nan)
    profile = {
        "driver": "GTiff",
        "width": width,
        "height": height,
        "count": len(bands),
        "dtype": "float32",
        "crs": EQUAL_AREA,
        "transform": transform,
        "nodata": math.nan,
    }
    with MemoryFile() as plain, MemoryFile(ext=".tif") as made:
        with plain.open(**profile) as file:
            for number, (name, values) in enumerate(zip((*maps.concepts, "tiles"), bands, strict=True), 1):
                file.write(values[cell_of], number)
                file.set_band_description(number, name)
            file.update_tags(
                threshold=f"{maps.threshold:g}", measure="share of tiles at or above the threshold"
            )
        options = {"COMPRESS": "DEFLATE", "PREDICTOR": "YES", "OVERVIEW_RESAMPLING": "AVERAGE"}
        rasterio.shutil.copy(plain.name, made.name, driver="COG", **options)
        return bytes(made.getbuffer())


def _projected(maps: ConceptMaps) -> "tuple[npt.NDArray[np.object_], npt.NDArray[np.float64]]":
    """Outlines in `EQUAL_AREA`, and their common bounds, metres."""
    import shapely

    to_metres = transformer("EPSG:4326", EQUAL_AREA)
    outlines = shapely.transform(
        maps.cells.outlines(maps.keys),
        lambda places: np.column_stack(to_metres.transform(places[:, 0].copy(), places[:, 1].copy())),
    )
    return outlines, shapely.total_bounds(outlines)


def page(maps: ConceptMaps, title: str, read_chips: ReadRows, area: "BaseGeometry | None" = None) -> bytes:
    """The maps as one HTML page: concepts to switch, a threshold to move, the best tiles as pictures.

    Args:
        maps: the maps.
        title: heading.
        read_chips: where the pictures come from.
        area: shapely geometry that is outlined, EPSG:4326; None: nothing is.

    Returns:
        The page, UTF-8. It asks no server for anything: its map library, data and pictures are in it.

    Raises:
        InputError: if there is no cell.
        TooManyCellsError: if there are more than a browser draws.
    """
    import shapely
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    _check_not_empty(maps)
    if len(maps.keys) > MAX_PAGE_CELLS:
        raise TooManyCellsError(
            f"A page of {len(maps.keys):,} cells is too slow: give larger cells or a smaller area, or write the "
            ".parquet or .tif, which have no such limit."
        )
    best = [maps.best_tiles(number, BEST_TILES) for number in range(len(maps.concepts))]
    shown = sorted({row for some in best for row, _ in some})
    pictures = _pictures(maps, shown, read_chips)
    places = maps.rows.take(shown).to_pylist()
    content = {
        "threshold": maps.threshold,
        "thresholds": maps.thresholds,
        "cells": [
            {"name": name, "tiles": int(tiles), "rings": _rings(outline)}
            for name, tiles, outline in zip(
                maps.cells.names(maps.keys), maps.tiles, maps.cells.outlines(maps.keys), strict=True
            )
        ],
        "concepts": [
            {
                "name": name,
                "hits": maps.counts[number].tolist(),
                "contrast": [round(float(value), 2) for value in maps.mean_contrast[number]],
                "best": [[row, round(contrast, 2)] for row, contrast in best[number]],
            }
            for number, name in enumerate(maps.concepts)
        ],
        "tiles": {
            row: {
                "id": tile["tile_id"],
                "lon": round(tile["center_lon_deg"], 5),
                "lat": round(tile["center_lat_deg"], 5),
                "day": f"{tile['acquired_at_utc']:%Y-%m-%d}",
                "picture": picture,
            }
            for row, tile, picture in zip(shown, places, pictures, strict=True)
        },
        "area": [] if area is None else [ring for part in shapely.get_parts(area) for ring in _rings(part)],
    }
    vendored = resources.files("graft_pipeline") / "web" / "static" / "vendor" / "leaflet"
    environment = Environment(loader=PackageLoader("graft_pipeline", "."), autoescape=True)
    made = environment.get_template("concept_map.html").render(
        title=title,
        concepts=maps.concepts,
        background_tiles=maps.backgrounds[0].tiles,
        tiles=int(maps.tiles.sum()),
        content=Markup(_json(content)),
        leaflet=Markup((vendored / "leaflet.js").read_text(encoding="utf-8")),
        leaflet_style=Markup((vendored / "leaflet.css").read_text(encoding="utf-8")),
    )
    return made.encode()


@dataclass(frozen=True)
class Written:
    """What became of the maps.

    Attributes:
        files: by file that holds them, whether its content changed.
        left_out: forms that cannot hold so many cells, by ending, and why.
    """

    files: "dict[UPath | Path, bool]"
    left_out: dict[str, str]


def write_maps(
    output: "UPath | Path",
    maps: ConceptMaps,
    title: str,
    read_chips: ReadRows,
    area: "BaseGeometry | None" = None,
) -> Written:
    """Write the maps as what a name says.

    Args:
        output: file that ends in `.parquet`, `.tif` or `.html`; or a folder, which gets one of each. There, a form that
            cannot hold so many cells is left out, and an earlier file of it removed.
        maps: the maps.
        title: heading of the page.
        read_chips: where the page's pictures come from.
        area: see `page`.

    Returns:
        What was written.

    Raises:
        InputError: if the name ends in something else, there is no cell, or the file cannot hold so many.
    """
    makers = (
        lambda: geoparquet(maps),
        lambda: geotiff(maps),
        lambda: page(maps, title, read_chips, area),
    )
    forms: dict[str, Callable[[], bytes]] = dict(zip(FORMS, makers, strict=True))
    check_maps_name(output)
    _check_not_empty(maps)
    if output.suffix in forms:
        return Written({output: write_bytes_atomic(output, forms[output.suffix]())}, {})
    remove_partial_files(output)
    contents: dict[str, bytes] = {}
    left_out: dict[str, str] = {}
    # All are made before one is written: files of a folder belong together.
    for suffix, make in forms.items():
        try:
            contents[suffix] = make()
        except TooManyCellsError as error:
            left_out[suffix] = str(error)
            (output / f"{CONCEPT_MAPS.name}{suffix}").unlink(missing_ok=True)
    files = {output / f"{CONCEPT_MAPS.name}{suffix}": content for suffix, content in contents.items()}
    return Written({file: write_bytes_atomic(file, content) for file, content in files.items()}, left_out)


def _check_not_empty(maps: ConceptMaps) -> None:
    if not len(maps.keys):
        raise InputError("No tile lies in that area and time: give another --area, --since or --until.")


def _rings(outline: "BaseGeometry") -> list[list[list[float]]]:
    """Outer rings of a polygon or several, as (latitude, longitude), to a metre."""
    import shapely

    return [
        [[round(lat, 5), round(lon, 5)] for lon, lat in part.exterior.coords[:-1]]
        for part in shapely.get_parts(outline)
    ]


def check_maps_name(output: "UPath | Path") -> None:
    """Refuse a name that `write_maps` would refuse, before tiles are scored.

    Args:
        output: file or folder.

    Raises:
        InputError: if it ends in something else than a map's form, and is no folder that exists.
    """
    if output.suffix not in ("", *FORMS) and not output.is_dir():
        raise InputError(f"{output} is no map: end its name in {', '.join(FORMS)}, or name a folder.")


def _pictures(maps: ConceptMaps, rows: Sequence[int], read_chips: ReadRows) -> list[str | None]:
    """The footprints of some tiles as data URIs; None for a tile whose chip is gone."""
    tiles = maps.rows.take(rows)
    found = chips_by_id(tiles["tile_id"].to_pylist(), tiles["region"].to_pylist(), read_chips)
    pictures: list[str | None] = []
    for array in found:
        if array is None:
            pictures.append(None)
            continue
        quarter = len(array) // 4
        image = Image.fromarray(array[quarter:-quarter, quarter:-quarter])
        buffer = io.BytesIO()
        image.resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BOX).save(buffer, "JPEG", quality=80)
        pictures.append(data_uri(buffer.getvalue()))
    return pictures


def _json(content: Mapping[str, Any]) -> str:
    """JSON inside a script element, which no words in it can end."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
