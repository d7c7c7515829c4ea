"""Who takes photos on the planet, where and when, and what becomes of them: every row a Flickr search can return.

The drawings themselves are in ground.py; the API that serves these rows is flickr_api.py's business.

Photos are made lazily per cell of 0.05 degrees, from the seed and the cell alone. A photo's reported place always
lies in its cell, and its id says which cell that is, so nothing has to be remembered.
"""

import calendar
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from resources.planet.frames import Axes, from_plane, home_zone, to_plane
from resources.planet.ground import INDOOR_KINDS, OFF_TOPIC_KINDS
from resources.planet.landcover import CLASS_NAMES, CLASSES, Land
from resources.planet.noise import hashes, salt, uniforms

#: Side of the cells that photos are made by, degrees.
CELL_DEG = 0.05
_CELLS_EAST = 7200
_SERIALS = 2000
_LATITUDE_LIMIT = 80.0

#: Mean number of photos per square kilometre, bad ones included: about 2300 per quarter degree at 42 degrees.
PHOTOS_PER_KM2 = 4.0
#: Share of cells nobody has ever taken a photo in.
_EMPTY_SHARE = 0.03
#: Share of photos taken at hot-spots, and how many a hot-spot has on average.
_HOT_SHARE = 0.84
_HOT_MEAN = 8.0
#: How much each class draws people, per place that has it: balances the classes among the photos.
_POPULARITY = {"lake": 1.2, "river": 1.15, "beach": 1.35, "forest": 1.0, "farmland": 1.0, "meadow": 1.0}
_POPULARITY |= {
    "residential": 0.75,
    "industrial": 1.0,
    "highway": 1.5,
    "baseball": 1.7,
    "desert": 1.2,
    "orchard": 1.0,
}

_OFF_TOPIC_SHARE = 0.15
_COARSE_SHARE = 0.09
_BURST_SHARE = 0.045
_REUPLOAD_SHARE = 0.02
#: Flaws of the image files, and how often each occurs.
FLAWS = {"html": 0.002, "truncated": 0.002, "huge": 0.001, "animated": 0.0015, "cmyk": 0.002}
_NO_URL_SHARE = 0.01
_SCREENSHOT_SHARE = 0.004

_FIRST_S = calendar.timegm((2016, 1, 1, 0, 0, 0))
#: No photo is ever uploaded later, Unix seconds.
LAST_S = calendar.timegm((2023, 12, 31, 0, 0, 0))
_DAY_S = 86_400

#: Long side in pixels of the sizes that Flickr offers, by the letter of their `url_*` extra.
SIZES_PX = {"t": 100, "s": 240, "n": 320, "w": 400, "m": 500, "z": 640, "c": 800, "l": 1024, "h": 1600}

#: One row per photo. `kind` is what it shows; `image_id` the photo whose drawing it shows (its own id but for
#: re-uploads); `frame` counts through a burst; true_* is where it was taken, lon/lat what its geotag says.
PHOTO_DTYPE = np.dtype(
    [
        ("photo_id", "U11"),
        ("owner", "U12"),
        ("owner_name", "U20"),
        ("secret", "U10"),
        ("server", "U5"),
        ("title", "U60"),
        ("tags", "U80"),
        ("license", "U2"),
        ("lon_deg", "f8"),
        ("lat_deg", "f8"),
        ("accuracy", "i1"),
        ("uploaded_at", "i8"),
        ("taken_at_local", "i8"),
        ("taken_granularity", "i1"),
        ("taken_unknown", "?"),
        ("original_px", "i4"),
        ("is_portrait", "?"),
        ("exif_orientation", "i1"),
        ("has_urls", "?"),
        ("flaw", "U9"),
        ("views", "i4"),
        ("kind", "U11"),
        ("ahead", "U11"),
        ("true_lon_deg", "f8"),
        ("true_lat_deg", "f8"),
        ("image_id", "U11"),
        ("frame", "i1"),
    ]
)

_IDS = 90_000_000_000
_ID_BASE = 10_000_000_000
# Coprime to _IDS: ids of neighbouring photos look unrelated, as Flickr's do, and can be taken apart again.
_ID_STEP = 38_196_601_277
_ID_STEP_INVERSE = pow(_ID_STEP, -1, _IDS)

_FIRST_NAMES = (
    "ada",
    "bo",
    "chris",
    "dana",
    "eli",
    "fran",
    "gus",
    "hana",
    "ivo",
    "jo",
    "kim",
    "lee",
    "mara",
    "noor",
)
_LAST_NAMES = (
    "fields",
    "brook",
    "stone",
    "marsh",
    "hill",
    "woods",
    "ford",
    "lane",
    "rivers",
    "dale",
    "moore",
    "west",
)
_PLAIN_TITLES = (
    "Untitled",
    "",
    "day trip",
    "with the family",
    "Sunday",
    "on the way",
    "happy",
    "weekend",
    "look!",
)
_PLAIN_TAGS = (
    "",
    "",
    "canon",
    "nikon",
    "iphone",
    "2019",
    "travel",
    "usa square",
    "family friends",
    "instagramapp",
)
_MOODS = (
    "{} at dusk",
    "The {}",
    "{} in the morning",
    "Old {}",
    "{} walk",
    "Quiet {}",
    "{} again",
    "Near the {}",
)


def cell_of(lon_deg: float, lat_deg: float) -> tuple[int, int]:
    """Column and row of the cell of a place; longitudes beyond 180 degrees are wrapped."""
    lon = (lon_deg + 180.0) % 360.0
    return min(int(lon / CELL_DEG), _CELLS_EAST - 1), int((lat_deg + 90.0) / CELL_DEG)


class Photographers:
    """All photos of one planet."""

    def __init__(self, seed: int, land: Callable[[int], Land]) -> None:
        """Take note of the planet.

        Args:
            seed: the planet's seed.
            land: land cover of a UTM zone.
        """
        self._seed = seed
        self._land = land
        self._id_shift = salt(seed, "photo ids") % _IDS
        self._cell = lru_cache(maxsize=600)(self._make_cell)

    # --- ids ---

    def _photo_ids(self, column: int, row: int, count: int) -> list[str]:
        first = (row * _CELLS_EAST + column) * _SERIALS
        return [str(_ID_BASE + ((first + k) * _ID_STEP + self._id_shift) % _IDS) for k in range(count)]

    def _place_of_id(self, photo_id: str) -> tuple[int, int, int] | None:
        """(column, row, serial) that an id was made from; None if it cannot be one of ours."""
        if not (photo_id.isascii() and photo_id.isdigit()) or len(photo_id) != 11:
            return None
        number = (int(photo_id) - _ID_BASE - self._id_shift) * _ID_STEP_INVERSE % _IDS
        cell, serial = divmod(number, _SERIALS)
        row, column = divmod(cell, _CELLS_EAST)
        return (column, row, serial) if 0 <= row < _CELLS_EAST // 2 else None

    # --- queries ---

    def photo(self, photo_id: str) -> np.void | None:
        """One photo's row.

        Args:
            photo_id: Flickr's id of it.

        Returns:
            The row, of `PHOTO_DTYPE`; None if there is no such photo.
        """
        place = self._place_of_id(photo_id)
        if place is None:
            return None
        photos = self._cell(place[0], place[1])
        return photos[place[2]] if place[2] < len(photos) else None

    def within(self, west: float, south: float, east: float, north: float) -> NDArray[np.void]:
        """Photos whose geotags lie in a rectangle, its sides included.

        Args:
            west: degrees; greater than `east` if the rectangle crosses the 180th meridian.
            south: degrees.
            east: degrees.
            north: degrees.

        Returns:
            (N,) rows of `PHOTO_DTYPE`, ordered by cell and serial.
        """
        if west > east:
            return np.concatenate(
                [self.within(west, south, 180.0, north), self.within(-180.0, south, east, north)]
            )
        south, north = max(south, -_LATITUDE_LIMIT), min(north, _LATITUDE_LIMIT)
        if south > north:
            return np.empty(0, PHOTO_DTYPE)
        first_column, first_row = max(0, int((west + 180) / CELL_DEG)), int((south + 90) / CELL_DEG)
        last_column = min(int((east + 180) / CELL_DEG), _CELLS_EAST - 1)
        last_row = int((north + 90) / CELL_DEG)
        parts = [np.empty(0, PHOTO_DTYPE)]
        for row in range(first_row, last_row + 1):
            for column in range(first_column, last_column + 1):
                photos = self._cell(column, row)
                lon, lat = photos["lon_deg"], photos["lat_deg"]
                parts.append(photos[(lon >= west) & (lon <= east) & (lat >= south) & (lat <= north)])
        return np.concatenate(parts)

    def near(self, lon_deg: float, lat_deg: float, radius_km: float) -> NDArray[np.void]:
        """Photos whose geotags lie within a radius (great circle).

        Args:
            lon_deg: longitude of the middle, EPSG:4326.
            lat_deg: latitude of the middle.
            radius_km: radius in kilometres.

        Returns:
            (N,) rows of `PHOTO_DTYPE`, ordered by cell and serial.
        """
        reach = radius_km / 111.19 + 1e-6
        widest = min(abs(lat_deg) + reach, 89.9)
        across = min(reach / np.cos(np.radians(widest)), 180.0)
        west, east = lon_deg - across, lon_deg + across
        west, east = (west + 180) % 360 - 180, (east + 180) % 360 - 180
        if across >= 180.0:
            west, east = -180.0, 180.0
        photos = self.within(float(west), lat_deg - reach, float(east), lat_deg + reach)
        return photos[distance_km(lon_deg, lat_deg, photos["lon_deg"], photos["lat_deg"]) <= radius_km]

    # --- making a cell ---

    def _make_cell(self, column: int, row: int) -> NDArray[np.void]:
        west, south = round(column * CELL_DEG - 180, 2), round(row * CELL_DEG - 90, 2)
        middle_lat = south + CELL_DEG / 2
        cell_salt = salt(self._seed, "photographers", column, row)
        if abs(middle_lat) > _LATITUDE_LIMIT or uniforms(cell_salt, 0)[0] < _EMPTY_SHARE:
            return np.empty(0, PHOTO_DTYPE)
        rng = np.random.default_rng(cell_salt)
        area_km2 = (CELL_DEG * 111.19) ** 2 * np.cos(np.radians(middle_lat))
        busy = np.exp(0.35 * rng.standard_normal() - 0.06)
        count = min(int(rng.poisson(PHOTOS_PER_KM2 * area_km2 * busy / 1.09)), 1200)
        if count == 0:
            return np.empty(0, PHOTO_DTYPE)
        zone = int(home_zone(west + CELL_DEG / 2))
        photos, x, y = self._walk(rng, zone, (west, south), count)
        self._look(rng, zone, photos, x, y)
        self._date(rng, photos, west)
        self._describe(rng, photos)
        photos = self._repeat(rng, photos)
        self._tag(rng, zone, photos, (west, south))
        self._file(rng, photos, column, row)
        photos.flags.writeable = False
        return photos

    def _walk(
        self, rng: np.random.Generator, zone: int, corner: tuple[float, float], count: int
    ) -> tuple[NDArray[np.void], NDArray[np.float64], NDArray[np.float64]]:
        """Where photos are taken: around hot-spots, and anywhere."""
        west, south = corner
        land = self._land(zone)
        corners_x, corners_y = to_plane(
            zone,
            west + np.array([0, 0, 1, 1, 0.5]) * CELL_DEG,
            south + np.array([0, 1, 0, 1, 0.5]) * CELL_DEG,
        )
        step = 20.0
        axis_x = (
            np.arange(np.floor(corners_x.min() / step), np.ceil(corners_x.max() / step)) * step + 0.5 * step
        )
        axis_y = (
            np.arange(np.ceil(corners_y.max() / step), np.floor(corners_y.min() / step), -1) * step
            - 0.5 * step
        )
        classes = land.cover(Axes(axis_x, axis_y, step)).classes

        photos = np.zeros(count, PHOTO_DTYPE)
        spot = np.full(count, -1)
        order = rng.permutation(count)
        hot = order[: int(rng.binomial(count, _HOT_SHARE))]
        spots = max(1, round(len(hot) / _HOT_MEAN))
        attraction = np.array([_POPULARITY[name] for name in CLASSES])
        attraction *= np.bincount(classes.reshape(-1), minlength=len(CLASSES)) >= 12
        spot_class = rng.choice(len(CLASSES), size=spots, p=attraction / attraction.sum())
        spot_x, spot_y = np.empty(spots), np.empty(spots)
        for k, value in enumerate(spot_class):
            pixels = np.flatnonzero(classes.reshape(-1) == value)
            pixel = int(pixels[rng.integers(len(pixels))])
            spot_y[k], spot_x[k] = axis_y[pixel // len(axis_x)], axis_x[pixel % len(axis_x)]
        weight = rng.lognormal(0.0, 0.6, spots)
        spot[hot] = rng.choice(spots, size=len(hot), p=weight / weight.sum())
        spread = rng.uniform(60, 150, spots)

        # Some candidates each: most people at a hot-spot stand where its attraction is.
        tries = 5
        at_spot = spot >= 0
        x = np.where(
            at_spot[:, None],
            spot_x[spot][:, None] + rng.standard_normal((count, tries)) * spread[spot][:, None],
            rng.uniform(corners_x.min(), corners_x.max(), (count, tries)),
        )
        y = np.where(
            at_spot[:, None],
            spot_y[spot][:, None] + rng.standard_normal((count, tries)) * spread[spot][:, None],
            rng.uniform(corners_y.min(), corners_y.max(), (count, tries)),
        )
        lon, lat = from_plane(zone, x.reshape(-1), y.reshape(-1))
        margin = 2e-5
        inside = (
            (lon > west + margin)
            & (lon < west + CELL_DEG - margin)
            & (lat > south + margin)
            & (lat < south + CELL_DEG - margin)
        )
        seen = land.classes_at(x.reshape(-1), y.reshape(-1)).reshape(count, tries)
        inside = inside.reshape(count, tries)
        wanted = inside & at_spot[:, None] & (seen == spot_class[spot][:, None])
        is_drawn = (rng.random(count) < 0.7) & wanted.any(axis=1)
        choice = np.where(is_drawn, wanted.argmax(axis=1), inside.argmax(axis=1))
        # Whoever would stand outside the cell whatever they try, stands in its middle's surroundings instead.
        is_lost = ~inside.any(axis=1)
        each = np.arange(count)
        x, y, seen = x[each, choice], y[each, choice], seen[each, choice]
        x[is_lost] = corners_x[4] + rng.uniform(-400, 400, int(is_lost.sum()))
        y[is_lost] = corners_y[4] + rng.uniform(-400, 400, int(is_lost.sum()))
        seen[is_lost] = land.classes_at(x[is_lost], y[is_lost])
        photos["kind"] = np.array(CLASSES)[seen]
        photos["true_lon_deg"], photos["true_lat_deg"] = from_plane(zone, x, y)

        # Owners: a few regulars per hot-spot, anybody elsewhere.
        person = np.where(
            at_spot,
            spot * 8 + np.minimum(rng.geometric(0.35, count), 8),
            100_000 + rng.integers(0, 1 << 20, count),
        )
        owner_salt = salt(self._seed, "owners", *corner)
        draw = hashes(owner_salt, person)
        photos["owner"] = [
            f"{10_000_000 + int(d % np.uint64(89_999_999))}@N0{int(d >> np.uint64(40)) % 8}" for d in draw
        ]
        photos["owner_name"] = [
            f"{_FIRST_NAMES[int(d >> np.uint64(8)) % 14]}{_LAST_NAMES[int(d >> np.uint64(16)) % 12]}"
            for d in draw
        ]
        return photos, x, y

    def _look(
        self, rng: np.random.Generator, zone: int, photos: NDArray[np.void], x: NDArray, y: NDArray
    ) -> None:
        """What the photos show: the class they are taken on before the class 150 m ahead, or something else."""
        count = len(photos)
        heading = rng.standard_normal((2, count))
        heading *= 150.0 / np.hypot(*heading)
        ahead = self._land(zone).classes_at(x + heading[0], y + heading[1])
        photos["ahead"] = np.array(CLASSES)[ahead]
        is_other = rng.random(count) < _OFF_TOPIC_SHARE
        others = np.array(INDOOR_KINDS + OFF_TOPIC_KINDS)
        photos["kind"] = np.where(is_other, others[rng.integers(0, len(others), count)], photos["kind"])
        photos["is_portrait"] = rng.random(count) < 0.2
        turned = rng.random(count) < 0.04
        photos["exif_orientation"] = np.where(turned, rng.choice([3, 6, 8], count), 1)
        photos["original_px"] = rng.choice(
            [240, 320, 640, 1024, 1600, 2048, 4000], count, p=[0.01, 0.02, 0.04, 0.13, 0.2, 0.2, 0.4]
        )

    def _date(self, rng: np.random.Generator, photos: NDArray[np.void], west: float) -> None:
        count = len(photos)
        day = np.floor(rng.uniform(1, (LAST_S - _FIRST_S) / _DAY_S - 12, count))
        # More photos in summer: a winter day is drawn again half of the time.
        season = np.abs((day % 365.25) / 365.25 - 0.54)
        again = (season > 0.25) & (rng.random(count) < 0.5)
        day[again] = np.floor(rng.uniform(1, (LAST_S - _FIRST_S) / _DAY_S - 12, int(again.sum())))
        clock = np.clip(rng.normal(14, 3.2, count), 6, 21.5)
        taken = _FIRST_S + (day * _DAY_S).astype(np.int64) + (clock * 3600).astype(np.int64)
        lag = rng.exponential(4 * _DAY_S, count) + 600
        is_late = rng.random(count) < 0.15
        lag[is_late] = rng.uniform(30 * _DAY_S, 500 * _DAY_S, int(is_late.sum()))
        taken_utc = taken - round(west / 15) * 3600
        uploaded = taken_utc + lag.astype(np.int64)
        too_late = uploaded >= LAST_S
        uploaded[too_late] = LAST_S - rng.integers(1, 5 * _DAY_S, int(too_late.sum()))
        photos["taken_at_local"], photos["uploaded_at"] = taken, np.maximum(uploaded, taken_utc + 60)
        unknown = rng.random(count) < 0.015
        photos["taken_unknown"] = unknown
        photos["taken_at_local"] = np.where(unknown, photos["uploaded_at"], photos["taken_at_local"])
        vague = rng.random(count)
        photos["taken_granularity"] = np.where(vague < 0.005, 6, np.where(vague < 0.02, 4, 0))

    def _describe(self, rng: np.random.Generator, photos: NDArray[np.void]) -> None:
        count = len(photos)
        informative = rng.random(count) < 0.3
        is_screenshot = rng.random(count) < _SCREENSHOT_SHARE
        draw = rng.integers(0, 1 << 30, (count, 4))
        titles, tags = [], []
        for k in range(count):
            kind = str(photos["kind"][k])
            a, b, c, d = (int(value) for value in draw[k])
            if is_screenshot[k]:
                titles.append(f"Screenshot_{b % 10000:04d}")
                tags.append("screenshot")
            elif informative[k]:
                names = CLASS_NAMES.get(kind, (kind,))
                name = names[a % len(names)]
                titles.append(_MOODS[b % len(_MOODS)].format(name).capitalize())
                extra = (
                    ("outdoors nature", "landscape", "summer", "", "walk")[c % 5]
                    if kind in CLASS_NAMES
                    else "home"
                )
                tags.append(f"{name.replace(' ', '')} {extra}".strip())
            else:
                camera = (f"IMG_{b % 10000:04d}", f"DSC{b % 100000:05d}", f"P{b % 10000000:07d}")
                titles.append(camera[a % 3] if c % 3 else _PLAIN_TITLES[b % len(_PLAIN_TITLES)])
                tags.append(_PLAIN_TAGS[d % len(_PLAIN_TAGS)])
        photos["title"], photos["tags"] = titles, tags
        photos["license"] = rng.choice(
            ["0", "1", "2", "4", "5", "6", "9", "10"],
            count,
            p=[0.62, 0.06, 0.06, 0.08, 0.05, 0.05, 0.05, 0.03],
        )
        photos["views"] = rng.geometric(0.01, count)

    def _repeat(self, rng: np.random.Generator, photos: NDArray[np.void]) -> NDArray[np.void]:
        """Bursts (same minute, same spot) and re-uploads (same file, another id) of some photos."""
        count = len(photos)
        source, frame = [np.arange(count)], [np.zeros(count, np.int64)]
        first = np.flatnonzero(rng.random(count) < _BURST_SHARE)
        length = rng.integers(1, 3, len(first))
        for number in (1, 2):
            source.append(first[length >= number])
            frame.append(np.full(int((length >= number).sum()), number))
        again = np.flatnonzero(rng.random(count) < _REUPLOAD_SHARE)
        source.append(again)
        frame.append(np.full(len(again), -1))
        index, number = np.concatenate(source), np.concatenate(frame)
        whole = photos[index]
        whole["frame"] = number
        burst = number > 0
        seconds = whole["taken_at_local"] // 60 * 60
        whole["taken_at_local"] = np.where(burst, seconds + 20 + 9 * number, whole["taken_at_local"])
        whole["uploaded_at"] += np.where(burst, 15 * number, 0)
        copy = number < 0
        later = rng.integers(1, 240 * _DAY_S, len(whole))
        whole["uploaded_at"] = np.where(
            copy, np.minimum(whole["uploaded_at"] + later, LAST_S - 1 - later % 1000), whole["uploaded_at"]
        )
        whole["uploaded_at"] = np.minimum(whole["uploaded_at"], LAST_S - 1)
        # A re-upload has lost its EXIF: its date taken is its date of upload.
        whole["taken_unknown"] |= copy
        whole["taken_at_local"] = np.where(
            whole["taken_unknown"], whole["uploaded_at"], whole["taken_at_local"]
        )
        whole["title"] = np.where(copy, "repost", whole["title"])
        # Until ids exist: which row each drawing is of.
        whole["image_id"] = index.astype("U11")
        return whole

    def _tag(
        self, rng: np.random.Generator, zone: int, photos: NDArray[np.void], corner: tuple[float, float]
    ) -> None:
        """Geotags: the true place with the error of its accuracy, kept inside the cell."""
        count = len(photos)
        source = photos["image_id"].astype(np.int64)
        accuracy = np.where(rng.random(count) < _COARSE_SHARE, rng.integers(3, 16, count), 16)
        error_m = np.array(
            [0, 0, 0, 5e4, 4e4, 3e4, 2e4, 1e4, 6e3, 4e3, 2.5e3, 1.2e3, 500.0, 250.0, 100.0, 40.0, 4.0]
        )
        noise = rng.standard_normal((2, count))
        # Bursts are one stop of one walk: same accuracy, same error. Re-uploads keep the place, roughly.
        accuracy, noise = accuracy[source], noise[:, source]
        wobble = rng.standard_normal((2, count)) * np.where(photos["frame"] > 0, 1.0, 0.0)
        x, y = to_plane(zone, photos["true_lon_deg"], photos["true_lat_deg"])
        lon, lat = from_plane(
            zone, x + noise[0] * error_m[accuracy] + wobble[0], y + noise[1] * error_m[accuracy] + wobble[1]
        )
        west, south = corner
        photos["accuracy"] = accuracy
        photos["lon_deg"] = np.round(_folded(lon, west), 6)
        photos["lat_deg"] = np.round(_folded(lat, south), 6)

    def _file(self, rng: np.random.Generator, photos: NDArray[np.void], column: int, row: int) -> None:
        """Ids, secrets, flaws."""
        count = len(photos)
        ids = self._photo_ids(column, row, count)
        photos["photo_id"] = ids
        source = photos["image_id"].astype(np.int64)
        photos["image_id"] = np.array(ids)[source]
        secret = rng.integers(0, 1 << 40, count)
        photos["secret"] = [f"{int(value):010x}" for value in secret]
        photos["server"] = (rng.integers(0, 1000, count) + 65000).astype("U5")
        photos["has_urls"] = rng.random(count) >= _NO_URL_SHARE
        draw, level = rng.random(count), 0.0
        for flaw, share in FLAWS.items():
            photos["flaw"] = np.where((draw >= level) & (draw < level + share), flaw, photos["flaw"])
            level += share


def _folded(degrees: NDArray[np.float64], low: float) -> NDArray[np.float64]:
    """Degrees reflected at the sides of a cell until they lie in it, a hair away from the sides."""
    margin = 1e-5
    span = CELL_DEG - 2 * margin
    phase = np.mod(degrees - low - margin, 2 * span)
    return low + margin + np.where(phase > span, 2 * span - phase, phase)


def distance_km(
    lon_deg: float, lat_deg: float, other_lon_deg: NDArray[np.float64], other_lat_deg: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Great-circle distance on a sphere of 6371.0088 km.

    Args:
        lon_deg: longitude of one place.
        lat_deg: latitude of it.
        other_lon_deg: (N,) longitudes of others.
        other_lat_deg: (N,) latitudes of others.

    Returns:
        (N,) float64, kilometres.
    """
    lat, other_lat = np.radians(lat_deg), np.radians(other_lat_deg)
    across = np.sin(np.radians(other_lon_deg - lon_deg) / 2)
    along = np.sin((other_lat - lat) / 2)
    square = along * along + np.cos(lat) * np.cos(other_lat) * across * across
    return 2 * 6371.0088 * np.arcsin(np.sqrt(np.minimum(square, 1.0)))
