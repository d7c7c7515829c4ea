"""What lies in the cells of a map and in the footprints of tiles, by the planet's truth; for evaluation only.

No asset of the training path reads this module; how maps compare with it is computed in training/zero_shot.
"""

from collections.abc import Callable

import numpy as np

from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Grid, projection, transformer, utm_epsg
from resources.planet.truth_client import PlanetTruth

#: Pixels that cells and footprints are counted in; the planet's narrowest classes are about as wide.
GSD_M = 28.0
#: Pixels that one request for truth asks for, at most.
MAX_SIDE_PX = 3000


def cell_shares(
    truth: PlanetTruth,
    outlines: np.ndarray,
    tiles_lon_deg: np.ndarray,
    tiles_lat_deg: np.ndarray,
    cell_of: np.ndarray,
    footprint_m: float,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the land-cover classes.

    Args:
        truth: the planet's truth.
        outlines: (C,) shapely polygons of cells, EPSG:4326, of at most some 80 km.
        tiles_lon_deg: (N,) longitudes of tiles' centres, degrees.
        tiles_lat_deg: latitudes.
        cell_of: (N,) number of each tile's cell.
        footprint_m: side of a tile's footprint, metres.
        progress: told (done, total) cells.

    Returns:
        (C, K) float64 share of each class in each cell, and (N, K) in each tile's footprint; rows sum to 1.

    Raises:
        InputError: if a cell is too large or lies on the antimeridian.
        ServiceError: if the planet does not answer.
    """
    import shapely
    from rasterio.features import geometry_mask

    count = len(truth.classes)
    of_cells, of_tiles = np.zeros((len(outlines), count)), np.zeros((len(tiles_lon_deg), count))
    half = footprint_m / 2
    for number, outline in enumerate(outlines):
        center = outline.centroid
        own = projection(utm_epsg(center.x, center.y))
        to_metres = transformer("EPSG:4326", own.crs)
        shape = shapely.transform(
            outline, lambda places, to=to_metres: np.column_stack(to.transform(*places.T.copy()))
        )
        tiles = np.flatnonzero(cell_of == number)
        x, y = own.forward(tiles_lon_deg[tiles], tiles_lat_deg[tiles])
        grid = _grid_around(shape.bounds, own.epsg, half)
        cover = truth.land_cover(grid)
        inside = ~geometry_mask([shape], cover.shape, grid.affine)
        of_cells[number] = _shares(cover[inside], count)
        for tile, column, row in zip(tiles, *grid.to_pixel(x, y), strict=True):
            reach = half / GSD_M
            rows = slice(round(row - reach), round(row + reach))
            of_tiles[tile] = _shares(cover[rows, round(column - reach) : round(column + reach)], count)
        if progress:
            progress(number + 1, len(outlines))
    return of_cells, of_tiles


def _grid_around(bounds: tuple[float, float, float, float], epsg: int, margin_m: float) -> Grid:
    west, south, east, north = bounds
    width, height = (int(np.ceil((side + 2 * margin_m) / GSD_M)) + 2 for side in (east - west, north - south))
    if max(width, height) > MAX_SIDE_PX:
        raise InputError(
            f"A cell of {east - west:.0f} m is too large to be compared with the truth: set a finer "
            "GRAFT_CONCEPT_RESOLUTION."
        )
    return Grid(epsg, west - margin_m - GSD_M, north + margin_m + GSD_M, GSD_M, width, height)


def _shares(classes: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(classes.ravel(), minlength=count)[:count] / max(1, classes.size)
