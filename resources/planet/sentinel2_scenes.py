"""The planet's Sentinel-2: its grid of tiles, its revisits, cloud percentages and swath edges.

Every scene is decoded from its id alone, so the catalogue keeps no state; how a scene looks is world.py.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date
from functools import lru_cache

import numpy as np
import shapely

from graft_pipeline.geometry import projection
from graft_pipeline.imagery import SENTINEL2
from resources.planet.catalog import Band, Bounds, Footprint, Scene
from resources.planet.noise import hashes, salt, uniforms

FIRST_DAY, LAST_DAY = date(2017, 3, 28), date(2023, 12, 31)
REVISIT_DAYS = 5
#: Latitudes beyond which the planet has no Sentinel-2, degrees.
MAX_LAT_DEG = 80.0
SQUARE_M = 100_000
TILE_M = 109_800
#: Share of the tiles that lie at a swath's edge; every other scene of theirs, on average, is cut by it.
EDGE_SHARE = 0.45
#: Share of the scenes with a lost strip inside the footprint, so that nodata happens, and its width.
LOST_SHARE = 0.02
LOST_M = 3000

#: World band order of the 10 m bands; SCL is Sen2Cor's scene classification, 20 m.
BANDS_10M = ("B2", "B3", "B4", "B8")
_BANDS = (
    *(Band(name, "uint16", 10.0, TILE_M // 10, TILE_M // 10) for name in BANDS_10M),
    Band("SCL", "uint8", 20.0, TILE_M // 20, TILE_M // 20),
)
_COLUMN_LETTERS = ("STUVWXYZ", "ABCDEFGH", "JKLMNPQR")
_ROW_LETTERS = "ABCDEFGHJKLMNPQRSTUV"
_LATITUDE_LETTERS = "CDEFGHJKLMNPQRSTUVWX"
_NAME = re.compile(r"(\d{8}T\d{6})_\1_T(\d\d)([C-X])([A-Z])([A-Z])")
#: Slant of a descending orbit's edge: metres east per metre north.
_SLOPE = 0.2
_CUT_LEVELS = 8


@dataclass(frozen=True)
class _Squares:
    """The 100 km squares of one hemisphere, alike in every zone; longitudes count from the central meridian.

    Arrays of length N: `column` 1..8 and `row` (easting and northing of the square's corner / 100 km), the
    band letter of its centre, and the bounds of the 109.8 km tile in degrees.
    """

    column: np.ndarray
    row: np.ndarray
    letter: np.ndarray
    west: np.ndarray
    south: np.ndarray
    east: np.ndarray
    north: np.ndarray


@lru_cache(maxsize=2)
def _squares(is_south: bool) -> _Squares:
    column, row = (axis.ravel() for axis in np.meshgrid(np.arange(1, 9), np.arange(100), indexing="ij"))
    frame = projection(_epsg(31, is_south))
    inner = np.linspace(0, 1, 5)

    def bounds(x: np.ndarray, y: np.ndarray, size: float) -> tuple[np.ndarray, ...]:
        steps_x, steps_y = (axis.ravel() * size for axis in np.meshgrid(inner, inner))
        lon, lat = frame.inverse(x[:, None] + steps_x, y[:, None] + steps_y)
        return lon.min(1) - 3, lat.min(1), lon.max(1) - 3, lat.max(1)

    x, y = column * float(SQUARE_M), row * float(SQUARE_M)
    west, south, east, north = bounds(x, y, SQUARE_M)
    _, centre = frame.inverse(x + SQUARE_M / 2, y + SQUARE_M / 2)
    # A tile serves its zone when its square reaches into the zone's six degrees.
    serves = (west < 3) & (east > -3) & (np.abs(centre) <= MAX_LAT_DEG) & ((centre < 0) == is_south)
    column, row = column[serves], row[serves]
    x0, y0 = _corner(column, row)
    west, south, east, north = bounds(x0.astype(float), y0.astype(float) - TILE_M, TILE_M)
    letter = np.array(list(_LATITUDE_LETTERS))[np.floor((centre[serves] + 80) / 8).astype(int).clip(0, 19)]
    return _Squares(column, row, letter, west, south, east, north)


def _corner(column: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Upper left corner of tiles, metres: snapped to 60 m, as ESA snaps it for its 10, 20 and 60 m bands."""
    return column * SQUARE_M // 60 * 60, -(-(row + 1) * SQUARE_M // 60) * 60


def _epsg(zone: int, is_south: bool) -> int:
    return (32700 if is_south else 32600) + zone


class Sentinel2Scenes:
    """The collection `COPERNICUS/S2_SR_HARMONIZED` of a planet.

    Args:
        seed: the planet's seed.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def find(self, scene_id: str) -> Scene | None:
        """The scene of an id, or None when that tile was not passed at that second."""
        match = _NAME.fullmatch(scene_id.removeprefix(f"{SENTINEL2.collection}/"))
        if match is None:
            return None
        moment, zone_digits, band, column_letter, row_letter = match.groups()
        zone, is_south = int(zone_digits), band < "N"
        if not 1 <= zone <= 60:
            return None
        squares = _squares(is_south)
        for column, row in zip(
            squares.column[squares.letter == band], squares.row[squares.letter == band], strict=True
        ):
            if _square_name(zone, int(column), int(row)) == column_letter + row_letter:
                tile = _tile(self._seed, zone, is_south, int(column), int(row), band)
                passes = np.flatnonzero(tile.moments == moment)
                return tile.scene(int(passes[0])) if len(passes) else None
        return None

    def within(self, bounds: Bounds) -> Iterator[Scene]:
        """Every scene whose tile may touch `bounds`, degrees."""
        west, south, east, north = bounds
        for is_south in (False, True):
            squares = _squares(is_south)
            for zone in range(1, 61):
                meridian = zone * 6 - 183
                if not west - 20 < meridian < east + 20:
                    continue
                near = (squares.west + meridian <= east) & (squares.east + meridian >= west)
                near &= (squares.south <= north) & (squares.north >= south)
                for index in np.flatnonzero(near):
                    column, row = int(squares.column[index]), int(squares.row[index])
                    tile = _tile(self._seed, zone, is_south, column, row, str(squares.letter[index]))
                    yield from (tile.scene(number) for number in range(len(tile.moments)))


def _square_name(zone: int, column: int, row: int) -> str:
    """The two letters of a 100 km square (military grid reference system)."""
    shift = 0 if zone % 2 else 5
    return _COLUMN_LETTERS[zone % 3][column - 1] + _ROW_LETTERS[(row + shift) % 20]


@lru_cache(maxsize=512)
def _tile(seed: int, zone: int, is_south: bool, column: int, row: int, band: str) -> "_Tile":
    return _Tile(seed, zone, is_south, column, row, band)


class _Tile:
    """All passes over one tile; arrays of length P, in the order of time."""

    def __init__(self, seed: int, zone: int, is_south: bool, column: int, row: int, band: str) -> None:
        self._epsg = _epsg(zone, is_south)
        self._frame = projection(self._epsg)
        self._meridian = zone * 6 - 183
        self._name = f"T{zone:02d}{band}{_square_name(zone, column, row)}"
        x0, y0 = _corner(np.array(column), np.array(row))
        self._x0, self._y0 = float(x0), float(y0)

        def chance(what: str, number: np.ndarray | int = 0) -> np.ndarray:
            return uniforms(salt("sentinel2", what, seed, self._epsg), column * 100 + row, number)

        first = np.datetime64(FIRST_DAY) + int(chance("phase")[0] * REVISIT_DAYS)
        days = np.arange(first, np.datetime64(LAST_DAY) + 1, REVISIT_DAYS)
        passes = np.arange(len(days))
        # The satellites cross at half past ten, local solar time; the date stays the pass's own.
        lon, _ = self._frame.inverse(self._x0 + TILE_M / 2, self._y0 - TILE_M / 2)
        seconds = (37_800 - float(lon) * 240 + chance("second", passes) * 600 - 300).astype(np.int64) % 86_400
        self._times = days.astype("datetime64[s]") + seconds
        self.moments = np.array([text.replace("-", "").replace(":", "") for text in self._times.astype(str)])
        self._cloud_pct = np.round(_cloud_pct(chance("sky", passes), chance("amount", passes)), 6)
        self._keys = hashes(salt("sentinel2 key", seed, self._epsg), column * 100 + row, passes) >> np.uint64(
            33
        )
        side = 1 if chance("side")[0] < 0.5 else -1
        is_cut = (chance("edge")[0] < EDGE_SHARE) & (chance("cut", passes) < 0.5)
        level = (chance("level", passes) * _CUT_LEVELS).astype(np.int64)
        #: 0: whole; otherwise the side that is kept times one more than the level of the cut.
        self._cuts = np.where(is_cut, side * (1 + level), 0)
        self._is_lost = chance("lost", passes) < LOST_SHARE
        self._lost_left = self._x0 + 10 * np.floor(chance("lost where", passes) * ((TILE_M - LOST_M) // 10))
        self._footprints: dict[int, Footprint] = {}

    def scene(self, number: int) -> Scene:
        """The scene of one pass."""
        moment, cut = str(self.moments[number]), int(self._cuts[number])
        started = self._times[number].item().replace(tzinfo=UTC)
        cloud_pct = float(self._cloud_pct[number])
        name, satellite = f"{moment}_{moment}_{self._name}", "2A" if number % 2 else "2B"
        footprint = self._footprint(cut)
        lost = None
        if self._is_lost[number]:
            left = float(self._lost_left[number])
            lost = (left, left + LOST_M)
        return Scene(
            scene_id=f"{SENTINEL2.collection}/{name}",
            started=started,
            ended=started,
            crs=f"EPSG:{self._epsg}",
            x0_m=self._x0,
            y0_m=self._y0,
            bands=_BANDS,
            footprint=footprint,
            properties={
                "system:index": name,
                "CLOUDY_PIXEL_PERCENTAGE": cloud_pct,
                "MGRS_TILE": self._name[1:],
                "SPACECRAFT_NAME": f"Sentinel-{satellite}",
                "PRODUCT_ID": f"S{satellite}_MSIL2A_{moment}_N9999_R000_{self._name}_{moment}",
            },
            key=int(self._keys[number]),
            cloud_pct=cloud_pct,
            swath=_swath(cut, self._x0),
            lost_m=lost,
        )

    def _footprint(self, cut: int) -> Footprint:
        if cut not in self._footprints:
            x0, y0 = self._x0, self._y0
            ground = shapely.box(x0, y0 - TILE_M, x0 + TILE_M, y0)
            swath = _swath(cut, x0)
            if swath is not None:
                side, x, slope = swath
                # 50 m inside the edge: the polygon never promises a pixel that is not there.
                top, bottom = x - side * 50, x - side * 50 - slope * TILE_M
                far = x0 - TILE_M if side > 0 else x0 + 2 * TILE_M
                ground = ground.intersection(
                    shapely.Polygon([(top, y0), (bottom, y0 - TILE_M), (far, y0 - TILE_M), (far, y0)])
                )
            # Straight in UTM is curved in degrees: a vertex every few kilometres.
            dense = shapely.segmentize(ground, TILE_M / 6)
            points = shapely.get_coordinates(dense)
            lon, lat = self._frame.inverse(points[:, 0], points[:, 1])
            # Across the antimeridian they go on beyond 180: else the polygon would turn inside out.
            lon = self._meridian + (lon - self._meridian + 180) % 360 - 180
            # Seven decimals are a centimetre; they keep listings small.
            self._footprints[cut] = Footprint(shapely.Polygon(np.round(np.column_stack([lon, lat]), 7)))
        return self._footprints[cut]


def _swath(cut: int, x0: float) -> tuple[float, float, float] | None:
    """The half-plane of a cut, as in `Scene.swath`: the edge leaves 30 to 80 % of the tile."""
    if cut == 0:
        return None
    side = 1 if cut > 0 else -1
    kept = 0.3 + 0.5 * (abs(cut) - 1) / (_CUT_LEVELS - 1)
    # A western part leans on its right edge, which moves west going south; an eastern part mirrors it.
    x = (
        x0 + kept * TILE_M + _SLOPE * TILE_M / 2
        if side > 0
        else x0 + (1 - kept) * TILE_M + _SLOPE * TILE_M / 2
    )
    return float(side), x, _SLOPE


def _cloud_pct(sky: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Cloud percentages: 38 % of the scenes below 1 (four in ten of them exactly 0), the rest mostly cloudy.

    Args:
        sky: uniform numbers in [0, 1) that decide between clear, thin and thick.
        amount: uniform numbers in [0, 1), same shape.

    Returns:
        Percentages, same shape, float64.
    """
    thin = np.clip(0.001 * 1000**amount, 0.001, 0.999)
    thick = 1 + 99 * (0.5 - 0.5 * np.cos(np.pi * amount))
    return np.where(sky < 0.15, 0.0, np.where(sky < 0.38, thin, thick))
