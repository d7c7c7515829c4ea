"""The planet's NAIP: digital orthophoto quarter quads, which of them were flown when, and their pixel grids.

Every scene is decoded from its id alone, so the catalogue keeps no state; how a scene looks is world.py.
"""

import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache

import numpy as np
import shapely

from graft_pipeline.geometry import projection
from graft_pipeline.imagery import NAIP
from resources.planet.catalog import Band, Bounds, Footprint, Scene
from resources.planet.noise import hashes, salt, uniforms

#: Conterminous United States, degrees: west, south, east, north. NAIP flies nowhere else.
COVERAGE: Bounds = (-125.0, 24.0, -66.0, 50.0)
#: Quarter quads per degree: 3.75 minutes each.
PER_DEGREE = 16
#: Ground that every image shows around its quarter quad (NAIP metadata), metres.
BUFFER_M = 300.0
FIRST_YEAR, LAST_YEAR = 2012, 2022
#: Share of the scenes with a lost strip inside the footprint, so that nodata happens, and its width.
LOST_SHARE = 0.02
LOST_M = 150

_BANDS = ("R", "G", "B", "N")
_NAME = re.compile(r"m_(\d\d)(\d{3})(\d\d)_(n|s)(e|w)_(\d\d)_1_(\d{8})")


@lru_cache(maxsize=4096)
def years_flown(seed: int, block_lon: int, block_lat: int) -> tuple[int, ...]:
    """Years in which a one-degree block was flown: every second or third, as states are.

    Args:
        seed: the planet's seed.
        block_lon: western border of the block, whole degrees.
        block_lat: southern border.

    Returns:
        Years in ascending order.
    """
    year = FIRST_YEAR + int(uniforms(salt("naip first year", seed), block_lon, block_lat)[0] < 0.5)
    years = []
    while year <= LAST_YEAR:
        years.append(year)
        year += 2 + int(uniforms(salt("naip step", seed, year), block_lon, block_lat)[0] < 0.5)
    return tuple(years)


class NaipScenes:
    """The collection `USDA/NAIP/DOQQ` of a planet.

    Args:
        seed: the planet's seed.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def find(self, scene_id: str) -> Scene | None:
        """The scene of an id, or None when such a quarter quad was not flown on that day."""
        match = _NAME.fullmatch(scene_id.removeprefix(f"{NAIP.collection}/"))
        if match is None:
            return None
        lat, lon, quad, north, east, _, day = match.groups()
        number = int(quad) - 1
        if not 0 <= number < 64:
            return None
        # The id names the block by its south-east corner and counts quads from the north-west.
        i = (-int(lon) - 1) * PER_DEGREE + (number % 8) * 2 + (east == "e")
        j = int(lat) * PER_DEGREE + (7 - number // 8) * 2 + (north == "n")
        for scene in self._scenes(np.array([i]), np.array([j]), int(day[:4])):
            if scene.scene_id == scene_id:
                return scene
        return None

    def within(self, bounds: Bounds) -> Iterator[Scene]:
        """Every scene whose buffered quarter quad may touch `bounds`, degrees."""
        west, south, east, north = bounds
        # A hair more than the buffer at 50 degrees north.
        spare = 0.01
        i = np.arange(
            int(np.floor((west - spare) * PER_DEGREE)), int(np.floor((east + spare) * PER_DEGREE)) + 1
        )
        j = np.arange(
            int(np.floor((south - spare) * PER_DEGREE)), int(np.floor((north + spare) * PER_DEGREE)) + 1
        )
        yield from self._scenes(np.repeat(i, len(j)), np.tile(j, len(i)))

    def _scenes(self, i: np.ndarray, j: np.ndarray, only_year: int | None = None) -> Iterator[Scene]:
        """Scenes of quarter quads (i, j), counted in sixteenths of a degree from (0, 0)."""
        west, south, east, north = (edge * PER_DEGREE for edge in COVERAGE)
        is_flown = (i >= west) & (i < east) & (j >= south) & (j < north)
        i, j = i[is_flown], j[is_flown]
        zones = np.floor((i + 0.5) / PER_DEGREE / 6).astype(int) + 31
        for zone in np.unique(zones):
            chosen = zones == zone
            yield from self._scenes_of_zone(int(zone), i[chosen], j[chosen], only_year)

    def _scenes_of_zone(
        self, zone: int, i: np.ndarray, j: np.ndarray, only_year: int | None
    ) -> Iterator[Scene]:
        boxes, grids = _footprints(zone, i, j)
        for column, row, box, (x_min, y_min, x_max, y_max) in zip(i, j, boxes, grids, strict=True):
            column, row = int(column), int(row)
            years = years_flown(self._seed, column // PER_DEGREE, row // PER_DEGREE)
            footprint = None
            for year in years:
                if only_year not in (None, year):
                    continue
                footprint = footprint or Footprint(box)
                yield self._scene(
                    zone, column, row, year, footprint, x_min, y_max, x_max - x_min, y_max - y_min
                )

    def _scene(
        self,
        zone: int,
        i: int,
        j: int,
        year: int,
        footprint: Footprint,
        x0: float,
        y0: float,
        width: int,
        height: int,
    ) -> Scene:
        # One flight line serves four columns of quads; flights are from June to August.
        flight = uniforms(salt("naip day", self._seed, year), i // 4, j // PER_DEGREE)[0]
        day = date(year, 6, 1) + timedelta(days=int(flight * 92))
        started = datetime(day.year, day.month, day.day, tzinfo=UTC)
        name = f"{_quad_name(i, j)}_{zone:02d}_1_{day:%Y%m%d}"
        lost = None
        if uniforms(salt("naip lost", self._seed, year), i, j)[0] < LOST_SHARE:
            left = x0 + int(uniforms(salt("naip lost where", self._seed, year), i, j)[0] * (width - LOST_M))
            lost = (float(left), float(left + LOST_M))
        return Scene(
            scene_id=f"{NAIP.collection}/{name}",
            started=started,
            ended=started + timedelta(days=1),
            crs=f"EPSG:{26900 + zone}",
            x0_m=float(x0),
            y0_m=float(y0),
            bands=tuple(Band(band, "uint8", 1.0, int(width), int(height)) for band in _BANDS),
            footprint=footprint,
            properties={"system:index": name, "RESOLUTION": 1, "NUMBER_OF_BANDS": len(_BANDS), "YEAR": year},
            key=int(hashes(salt("naip key", self._seed, year), i, j)[0] >> np.uint64(33)),
            lost_m=lost,
        )


def _quad_name(i: int, j: int) -> str:
    """`m_{latitude}{longitude}{quad}_{quarter}` of a quarter quad, as the USDA names it."""
    number = (7 - (j % PER_DEGREE) // 2) * 8 + (i % PER_DEGREE) // 2 + 1
    quarter = ("n" if j % 2 else "s") + ("e" if i % 2 else "w")
    return f"m_{j // PER_DEGREE:02d}{-(i // PER_DEGREE) - 1:03d}{number:02d}_{quarter}"


def _footprints(zone: int, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Buffered quads as (N,) polygons in degrees, and (N, 4) whole metres: xmin, ymin, xmax, ymax."""
    south, west = j / PER_DEGREE, i / PER_DEGREE
    # 110,500 m is less than a degree of latitude anywhere here: the buffer is never short of BUFFER_M.
    spare_lat = np.full(len(j), BUFFER_M / 110_500)
    spare_lon = spare_lat / np.cos(np.radians(south + 1 / PER_DEGREE))
    w, e = west - spare_lon, west + 1 / PER_DEGREE + spare_lon
    s, n = south - spare_lat, south + 1 / PER_DEGREE + spare_lat
    # Parallels are curved in UTM: walk along the edges, not only the corners.
    steps = np.linspace(0, 1, 9)
    along_lon = w[:, None] + (e - w)[:, None] * steps
    along_lat = s[:, None] + (n - s)[:, None] * steps
    lon = np.concatenate(
        [along_lon, along_lon, np.repeat(w[:, None], 9, 1), np.repeat(e[:, None], 9, 1)], axis=1
    )
    lat = np.concatenate(
        [np.repeat(s[:, None], 9, 1), np.repeat(n[:, None], 9, 1), along_lat, along_lat], axis=1
    )
    x, y = projection(32600 + zone).forward(lon, lat)
    grids = np.stack(
        [np.floor(x.min(1)), np.floor(y.min(1)), np.ceil(x.max(1)), np.ceil(y.max(1))], axis=1
    ).astype(np.int64)
    return shapely.box(w, s, e, n), grids
