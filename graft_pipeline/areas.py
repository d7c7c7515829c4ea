"""Areas of interest: reading a vector file with suspicion, registering areas in storage, their regions.

The grid of regions itself is in regions.py.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft_pipeline.errors import InputError
from graft_pipeline.geometry import UTM_LATITUDES_DEG
from graft_pipeline.manifests import write_bytes_atomic
from graft_pipeline.regions import regions_touching

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from shapely.geometry.base import BaseGeometry
    from upath import UPath

logger = logging.getLogger(__name__)

_GEOJSON = {".geojson", ".json"}


@dataclass(frozen=True)
class Area:
    """A registered area.

    Attributes:
        name: lower-case letters, digits, `-` and `_`.
        geometry: shapely Polygon or MultiPolygon, valid, EPSG:4326.
    """

    name: str
    geometry: "BaseGeometry"


def area_name(text: str) -> str:
    """What an area is called in file names and tables.

    Args:
        text: a name as people write it, e.g. `Rhode Island`.

    Returns:
        Lower-case letters, digits, `-` and `_`, e.g. `rhode_island`.

    Raises:
        InputError: if nothing is left.
    """
    name = re.sub(r"[^a-z0-9-]+", "_", text.lower()).strip("_-")
    if not name:
        raise InputError(f"{text!r} cannot name an area: give a name with letters or digits.")
    return name


def read_area(path: "str | Path | UPath", name: str | None = None, where: str | None = None) -> Area:
    """Read an area from any vector file that geopandas opens; its features are united.

    Args:
        path: GeoJSON, GeoPackage, Shapefile, ...
        name: the area's name; the file's without its extension if None.
        where: which features, as an SQL condition on their properties: `name = 'Rhode Island'`.

    Returns:
        The area, in EPSG:4326, repaired where it crossed itself.

    Raises:
        InputError: if the file is missing, unreadable or empty, has no CRS (only GeoJSON may be silent, it is
            EPSG:4326 by its standard), holds other than polygons, crosses the antimeridian, reaches beyond
            UTM's latitudes, or if no feature fulfils `where`.
    """
    import geopandas
    import shapely
    from pyogrio.errors import DataSourceError  # type: ignore[import-untyped]
    from pyproj.exceptions import ProjError

    file = Path(str(path))
    if not file.is_file():
        raise InputError(f"There is no file {path}: correct the path of the area.")
    try:
        frame = geopandas.read_file(file, engine="pyogrio", where=where)
    # pyogrio reports a bad `where` as ValueError, GEOS a broken ring as its own exception.
    except (DataSourceError, ValueError, shapely.errors.GEOSException) as error:
        hint = f" or the condition {where!r}" if where else ""
        # GDAL's own advice, to prefix the path with a driver, is of no use here.
        problem = str(error).partition("; It might help")[0].rstrip(".")
        raise InputError(
            f"{path} cannot be read as a vector file ({problem}): correct the file{hint}."
        ) from error
    if not isinstance(frame, geopandas.GeoDataFrame):
        raise InputError(f"{path} has no geometry: give a file of polygons.")
    if where and frame.empty:
        raise InputError(f"No feature of {path} fulfils {where!r}: correct the condition.")
    frame = frame[~(frame.geometry.isna() | frame.geometry.is_empty)]
    if frame.empty:
        raise InputError(f"{path} has no feature with a geometry: give a file of polygons.")
    others = sorted(set(frame.geom_type) - {"Polygon", "MultiPolygon"})
    if others:
        raise InputError(
            f"{path} holds {', '.join(others)}: an area is made of polygons, remove or buffer the rest."
        )
    if frame.crs is None:
        if file.suffix.lower() not in _GEOJSON:
            raise InputError(f"{path} names no CRS: add one (a .prj file, or ogr2ogr -a_srs EPSG:4326).")
        frame = frame.set_crs("EPSG:4326")
    try:
        frame = frame.to_crs("EPSG:4326")
    except ProjError as error:
        raise InputError(f"{path} cannot be projected to EPSG:4326 ({error}): correct its CRS.") from error
    geometry = _valid_polygons(shapely.force_2d(frame.geometry.to_numpy()), str(path))
    return Area(area_name(name or file.stem), geometry)


def _valid_polygons(parts: Any, source: str) -> "BaseGeometry":
    import numpy as np
    import shapely

    bounds = shapely.bounds(parts)
    if not np.isfinite(bounds).all():
        raise InputError(f"{source} has coordinates that are not finite in EPSG:4326: correct its CRS.")
    west, south, east, north = bounds[:, 0].min(), bounds[:, 1].min(), bounds[:, 2].max(), bounds[:, 3].max()
    # Bounds of single polygons: a multipolygon may well lie on both sides.
    widths = np.diff(shapely.bounds(shapely.get_parts(parts))[:, [0, 2]], axis=1)
    if west >= -360 and east <= 360 and (west < -180 or east > 180 or (widths > 180).any()):
        raise InputError(f"{source} crosses the antimeridian: split its polygons at longitude 180.")
    if west < -180 or east > 180 or south < -90 or north > 90:
        raise InputError(
            f"{source} reaches from ({west:g}, {south:g}) to ({east:g}, {north:g}), which are no "
            "longitudes and latitudes: correct its CRS."
        )
    # Refused here, where it is one area; as regions it would stop those of every other area.
    if south < UTM_LATITUDES_DEG[0] or north > UTM_LATITUDES_DEG[1]:
        raise InputError(
            f"{source} reaches from latitude {south:g} to {north:g}, beyond UTM's {UTM_LATITUDES_DEG[0]:g} to "
            f"{UTM_LATITUDES_DEG[1]:g}: cut its polygons to that range."
        )
    if not shapely.is_valid(parts).all():
        logger.warning("%s crosses itself in places; repaired", source)
        parts = shapely.make_valid(parts)
    united = shapely.union_all(parts)
    polygons = [part for part in shapely.get_parts(united) if part.geom_type == "Polygon" and part.area > 0]
    if not polygons:
        raise InputError(f"{source} has no polygon with an area: give a file of polygons.")
    geometry = polygons[0] if len(polygons) == 1 else shapely.MultiPolygon(polygons)
    return shapely.normalize(geometry)


def register_area(folder: "UPath", area: Area) -> "UPath":
    """Store an area; one of the same name is replaced.

    Args:
        folder: folder of areas in the storage root.
        area: the area.

    Returns:
        Its GeoJSON file; same area, same bytes.
    """
    import shapely

    path = folder / f"{area_name(area.name)}.geojson"
    feature = {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "properties": {"name": area.name},
                "geometry": shapely.geometry.mapping(area.geometry),
            }
        ],
    }
    write_bytes_atomic(path, json.dumps(feature).encode())
    return path


def list_areas(folder: "UPath") -> list[Area]:
    """The registered areas.

    Args:
        folder: folder of areas in the storage root; need not exist.

    Returns:
        Areas sorted by name.

    Raises:
        InputError: if a file there is not one of `register_area`.
    """
    import shapely

    areas: list[Area] = []
    if not folder.exists():
        return areas
    for path in sorted(folder.glob("*.geojson"), key=lambda path: path.name):
        try:
            feature = json.loads(path.read_bytes())["features"][0]
            area = Area(str(feature["properties"]["name"]), shapely.geometry.shape(feature["geometry"]))
        except (ValueError, KeyError, IndexError, TypeError, shapely.errors.ShapelyError) as error:
            raise InputError(
                f"{path} is no registered area ({error!r}): remove it and add the area again."
            ) from error
        areas.append(area)
    return areas


def areas_fingerprint(folder: "UPath") -> str | None:
    """What tells one state of the registered areas from another.

    Args:
        folder: folder of areas in the storage root; need not exist.

    Returns:
        Hash of the files' names and contents; None without areas.
    """
    from graft_pipeline.provenance import fingerprint

    files = {path.name: path.read_bytes() for path in folder.glob("*.geojson")} if folder.exists() else {}
    return fingerprint(files) if files else None


def union(areas: Sequence[Area]) -> "BaseGeometry":
    """The ground that areas cover together.

    Args:
        areas: registered areas.

    Returns:
        Shapely (multi)polygon, EPSG:4326; empty without areas.
    """
    import shapely

    return shapely.union_all([area.geometry for area in areas])


def regions_table(areas: Sequence[Area], grid_deg: float = 1.0) -> "pa.Table":
    """The regions that registered areas touch.

    Args:
        areas: registered areas.
        grid_deg: side of the grid's cells, degrees.

    Returns:
        Table of `schemas.REGIONS`: one row per region and area, sorted.

    Raises:
        InputError: if an area leaves the globe or UTM's latitudes.
    """
    import numpy as np
    import pyarrow as pa
    import shapely

    from graft_pipeline.schemas import REGIONS

    def equal_area(lon_lat: "npt.NDArray[np.float64]") -> "npt.NDArray[np.float64]":
        # Lambert's cylindrical projection: areas on the sphere, up to a factor.
        return np.column_stack([lon_lat[:, 0], np.degrees(np.sin(np.radians(lon_lat[:, 1])))])

    rows = []
    for area in areas:
        for region in regions_touching(area.geometry, grid_deg):
            west, south, east, north = region.bounds
            shared = shapely.transform(shapely.intersection(area.geometry, region.polygon), equal_area)
            share = shared.area / shapely.transform(region.polygon, equal_area).area
            rows.append(
                {
                    "region": region.key,
                    "area": area.name,
                    "west_deg": west,
                    "south_deg": south,
                    "east_deg": east,
                    "north_deg": north,
                    "epsg": region.epsg,
                    "covered_pct": float(min(100.0, 100.0 * share)),
                }
            )
    rows.sort(key=lambda row: (row["region"], row["area"]))
    return pa.Table.from_pylist(rows, schema=REGIONS.schema)
