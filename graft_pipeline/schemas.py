"""Every Parquet schema of the pipeline, spelled once: writers, readers, checks and the UI all use these.

How a table is written and read is in manifests.py; what the rows obey beyond their types, in assets/checks.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

UTC = pa.timestamp("ms", tz="UTC")
LOCAL = pa.timestamp("ms")

#: Values of every `status` column. `ok`: usable. `rejected`: a rule excludes it, for good. `failed`: could not be
#: had; tried again by later materialisations up to a limit. `pending` never reaches a file.
STATUSES = ("ok", "rejected", "failed")


@dataclass(frozen=True)
class Dataset:
    """One dataset of the storage root: its schema, key and order.

    Attributes:
        name: folder below the root, and the view's name in `graft query`.
        schema: column names, types, nullability; each field carries a `description`.
        key: columns that identify a row.
        order: columns that rows are sorted by on disk.
        partitions: hive partition columns, outermost first; not repeated inside the files.
    """

    name: str
    schema: pa.Schema
    key: tuple[str, ...]
    order: tuple[str, ...]
    partitions: tuple[str, ...]

    def empty(self) -> pa.Table:
        """A table of this schema without rows."""
        return self.schema.empty_table()


def _column(name: str, kind: pa.DataType, description: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": description})


def _dataset(
    name: str,
    columns: Sequence[pa.Field],
    key: Sequence[str],
    partitions: Sequence[str],
    order: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> Dataset:
    return Dataset(name, pa.schema(columns, metadata), tuple(key), tuple(order or key), tuple(partitions))


_PHOTO_ID = _column("photo_id", pa.string(), "Flickr's id of the photo")
_TILE_ID = _column("tile_id", pa.string(), "{sensor}-{center_photo_id}")
_LON = _column("lon_deg", pa.float64(), "longitude of the geotag, EPSG:4326")
_LAT = _column("lat_deg", pa.float64(), "latitude of the geotag, EPSG:4326")
#: Numbers that are never null decode in half the time.
_VECTOR = pa.list_(pa.field("element", pa.float32(), nullable=False))
_STATUS = _column("status", pa.string(), "ok, rejected (by a rule, for good) or failed (tried again)")
_REASON = _column("reason", pa.string(), "why the row is not ok", nullable=True)
_ATTEMPTS = _column("attempts", pa.int16(), "how often it was tried")
_RETRY_ON = _column(
    "retry_on", pa.date32(), "UTC day before which a failed row is not tried again", nullable=True
)


def _stored_item(what: str, prefix: str = "") -> list[pa.Field]:
    """Columns that locate one member of a tar shard."""
    return [
        _column(
            f"{prefix}shard", pa.string(), f"tar shard beside this file that holds the {what}", nullable=True
        ),
        _column(
            f"{prefix}offset", pa.int64(), "byte offset of the member's content in the shard", nullable=True
        ),
        _column(f"{prefix}size_bytes", pa.int64(), "length of the member's content", nullable=True),
        _column(
            f"{prefix}sha256", pa.string(), "SHA-256 of the member's content, hexadecimal", nullable=True
        ),
    ]


def _grid() -> list[pa.Field]:
    """Columns that place a chip: with chip_px they are its affine transform."""
    return [
        _column("epsg", pa.int32(), "EPSG code of the region's UTM zone; frame of every _m column"),
        _column("x0_m", pa.float64(), "easting of the chip's upper left corner"),
        _column("y0_m", pa.float64(), "northing of the chip's upper left corner"),
        _column("gsd_m", pa.float64(), "metres per pixel"),
        _column("chip_px", pa.int32(), "side of the chip in pixels"),
    ]


REGIONS = _dataset(
    "regions",
    [
        _column("region", pa.string(), "key: south-west corner of the grid cell, e.g. N42W072"),
        _column("area", pa.string(), "name of a registered area that touches the region"),
        _column("west_deg", pa.float64(), "western border"),
        _column("south_deg", pa.float64(), "southern border"),
        _column("east_deg", pa.float64(), "eastern border"),
        _column("north_deg", pa.float64(), "northern border"),
        _column("epsg", pa.int32(), "EPSG code of the region's one UTM zone"),
        _column("covered_pct", pa.float64(), "share of the region that the area covers"),
    ],
    key=("region", "area"),
    partitions=(),
)

SEARCH_LOCATIONS = _dataset(
    "search_locations",
    [
        _column("location_id", pa.int32(), "number of the location within its region"),
        _LON,
        _LAT,
        _column("radius_km", pa.float64(), "radius of the Flickr search around it"),
    ],
    key=("location_id",),
    partitions=("region",),
)

FLICKR_PHOTOS = _dataset(
    "flickr_photos",
    [
        _PHOTO_ID,
        _column("owner_id", pa.string(), "Flickr's id of the photographer"),
        _column("title", pa.string(), "title as its owner wrote it: part of the alt-text", nullable=True),
        _column("tags", pa.string(), "space separated tags: part of the alt-text", nullable=True),
        _column("license_id", pa.string(), "Flickr's licence id, kept as given", nullable=True),
        _LON,
        _LAT,
        _column("accuracy", pa.int8(), "Flickr's geotag accuracy, 1 (world) to 16 (street)"),
        _column("uploaded_at_utc", UTC, "when it was uploaded"),
        _column("updated_at_utc", UTC, "when its metadata changed last, as far as seen", nullable=True),
        _column("taken_at_local", LOCAL, "when it was taken, owner's clock, no zone", nullable=True),
        _column("taken_at_utc", UTC, "taken_at_local less the solar time of its longitude", nullable=True),
        _column("is_taken_exact", pa.bool_(), "whether the time taken is known to the second"),
        _column("image_url", pa.string(), "image size that is downloaded", nullable=True),
        _column("width_px", pa.int32(), "width that Flickr announces for it", nullable=True),
        _column("height_px", pa.int32(), "height that Flickr announces for it", nullable=True),
        _column("duplicate_of", pa.string(), "photo_id kept instead of this one of a burst", nullable=True),
        _STATUS,
        _REASON,
    ],
    key=("photo_id",),
    order=("uploaded_at_utc", "photo_id"),
    partitions=("region",),
)

PURGED_PHOTOS = _dataset(
    "purged_photos",
    [
        _PHOTO_ID,
        _column("reason", pa.string(), "why it was purged, in the words of whoever did"),
        _column("purged_at_utc", UTC, "when it was purged first"),
    ],
    key=("photo_id",),
    partitions=(),
)

PURGED_OWNERS = _dataset(
    "purged_owners",
    [
        _column("owner_id", pa.string(), "Flickr's id of a photographer whose photos are kept out"),
        _column("reason", pa.string(), "why they were purged, in the words of whoever did"),
        _column("purged_at_utc", UTC, "when they were purged first"),
    ],
    key=("owner_id",),
    partitions=(),
)

GROUND_IMAGES = _dataset(
    "ground_images",
    [
        _PHOTO_ID,
        _STATUS,
        _REASON,
        _ATTEMPTS,
        _RETRY_ON,
        _column(
            "request_id",
            pa.string(),
            "fingerprint of the address and the allowed hosts of an image that could not be had",
            nullable=True,
        ),
        _column("width_px", pa.int32(), "width as stored", nullable=True),
        _column("height_px", pa.int32(), "height as stored", nullable=True),
        _column("phash", pa.string(), "64-bit perceptual hash, hexadecimal", nullable=True),
        _column("duplicate_of", pa.string(), "photo_id of the near-duplicate that is kept", nullable=True),
        *_stored_item("image"),
    ],
    key=("photo_id",),
    partitions=("region",),
)

GROUND_EMBEDDINGS = _dataset(
    "ground_embeddings",
    [
        _PHOTO_ID,
        _column("embedding", _VECTOR, "f_G of the photo, L2-normalised"),
        _column("model_id", pa.string(), "fingerprint of the foundation model"),
    ],
    key=("photo_id",),
    partitions=("region",),
)

OUTDOOR_PHOTOS = _dataset(
    "outdoor_photos",
    [
        _PHOTO_ID,
        _column("outdoor_score", pa.float32(), "probability of an outdoor scene, 0 to 1"),
        _column("is_outdoor", pa.bool_(), "whether the score reaches the threshold"),
        _column("classifier_id", pa.string(), "fingerprint of the scene classifier"),
    ],
    key=("photo_id",),
    partitions=("region",),
)

SCENES = _dataset(
    "scenes",
    [
        _column("scene_id", pa.string(), "id in its source: Earth Engine asset, STAC item, or file"),
        _column("acquired_at_utc", UTC, "when it was acquired"),
        _column("cloud_pct", pa.float64(), "cloud percentage of the whole scene", nullable=True),
        _column("crs", pa.string(), "the scene's own CRS, e.g. EPSG:26919"),
        _column("x_min_m", pa.float64(), "western edge of its pixel grid, own CRS"),
        _column("y_min_m", pa.float64(), "southern edge of its pixel grid, own CRS"),
        _column("x_max_m", pa.float64(), "eastern edge of its pixel grid, own CRS"),
        _column("y_max_m", pa.float64(), "northern edge of its pixel grid, own CRS"),
        _column("footprint_wkb", pa.binary(), "polygon of valid ground, EPSG:4326"),
    ],
    key=("scene_id",),
    partitions=("sensor", "region"),
)

TILES = _dataset(
    "tiles",
    [
        _TILE_ID,
        _column("tile_index", pa.int32(), "order in which the region's tiles were chosen"),
        _column("center_photo_id", pa.string(), "photo at the tile's centre"),
        _column("center_lon_deg", pa.float64(), "longitude of the centre photo"),
        _column("center_lat_deg", pa.float64(), "latitude of the centre photo"),
        _column("center_x_m", pa.float64(), "easting of the centre photo"),
        _column("center_y_m", pa.float64(), "northing of the centre photo"),
        *_grid(),
        _column("sampling", pa.string(), "non_overlapping, random or per_quarter"),
        _column("split", pa.string(), "train, validation, or guard: touches both and is used by neither"),
    ],
    key=("tile_id",),
    order=("tile_index",),
    partitions=("sensor", "region"),
)

CHIPS = _dataset(
    "chips",
    [
        _TILE_ID,
        _STATUS,
        _REASON,
        _ATTEMPTS,
        _RETRY_ON,
        _column("scene_id", pa.string(), "scene the pixels come from", nullable=True),
        _column("acquired_at_utc", UTC, "when that scene was acquired", nullable=True),
        _column("cloud_pct", pa.float64(), "cloud percentage of that scene", nullable=True),
        _column(
            "chip_cloud_pct", pa.float64(), "cloud and shadow of the chip, by its mask band", nullable=True
        ),
        _column(
            "nodata_px", pa.int32(), "pixels without data; of a failed chip the fewest seen", nullable=True
        ),
        _column("time_difference_days", pa.float64(), "scene minus centre photo, signed", nullable=True),
        _column("scenes_tried", pa.int16(), "how many candidate scenes were requested"),
        _column(
            "request_id",
            pa.string(),
            "fingerprint of the sensor and the candidate scenes of a chip that is not ok",
            nullable=True,
        ),
        _column(
            "sensor_id",
            pa.string(),
            "fingerprint of what the sensor's record says of pixels: collection, bands, scales, mask",
            nullable=True,
        ),
        _column("raw_bands", pa.string(), "raw bands that are kept, comma separated", nullable=True),
        *_grid(),
        *_stored_item("chip"),
        *_stored_item("chip's raw bands, if they are kept", prefix="raw_"),
    ],
    key=("tile_id",),
    partitions=("sensor", "region"),
)

PAIRS = _dataset(
    "pairs",
    [
        _TILE_ID,
        _PHOTO_ID,
        _column("center_photo_id", pa.string(), "photo at the tile's centre"),
        _column("scene_id", pa.string(), "scene of the tile's chip"),
        _LON,
        _LAT,
        _column("col_px", pa.float64(), "photo's column in the chip; 0 is the left edge of the first pixel"),
        _column("row_px", pa.float64(), "photo's row in the chip; 0 is the upper edge of the first pixel"),
        _column("taken_at_utc", UTC, "when the photo was taken", nullable=True),
        _column("acquired_at_utc", UTC, "when the scene was acquired"),
        _column("time_difference_days", pa.float64(), "scene minus this photo, signed", nullable=True),
        _column("split", pa.string(), "train, validation or guard"),
    ],
    key=("tile_id", "photo_id"),
    partitions=("sensor", "region"),
)

#: The training set repeats what a trainer needs, so that it reads no other dataset: see training/data.py.
TRAINING_PAIRS = _dataset(
    "training_set",
    [
        _TILE_ID,
        _PHOTO_ID,
        _column("region", pa.string(), "region of the tile"),
        _column("split", pa.string(), "train or validation"),
        _column("col_px", pa.float64(), "photo's column in the chip"),
        _column("row_px", pa.float64(), "photo's row in the chip"),
        _column("lon_deg", pa.float64(), "longitude of the photo"),
        _column("lat_deg", pa.float64(), "latitude of the photo"),
        _column("chip_shard", pa.string(), "shard of the chip, relative to the storage root"),
        _column("chip_offset", pa.int64(), "byte offset of the chip in its shard"),
        _column("chip_size_bytes", pa.int64(), "length of the chip"),
        _column("embedding_row", pa.int64(), "row of the photo in ground_embeddings.npy beside this file"),
        _column(
            "model_id", pa.string(), "fingerprint of the foundation model that embedded it", nullable=True
        ),
    ],
    key=("tile_id", "photo_id"),
    # Queries of a split or of a region read only its row groups; those of a tile, by the key's Bloom filters.
    order=("split", "region", "tile_id", "photo_id"),
    partitions=("sensor", "snapshot"),
)

CHIP_EMBEDDINGS = _dataset(
    "chip_embeddings",
    [
        _TILE_ID,
        _column("center_lon_deg", pa.float64(), "longitude of the tile's centre"),
        _column("center_lat_deg", pa.float64(), "latitude of the tile's centre"),
        _column("embedding", _VECTOR, "f_S^I of the chip's central crop, L2-normalised"),
        _column("model_id", pa.string(), "fingerprint of the satellite encoder"),
        _column(
            "chip_sha256",
            pa.string(),
            "SHA-256 of the chip that was embedded; null in rows of earlier versions, which are embedded anew",
            nullable=True,
        ),
    ],
    key=("tile_id",),
    partitions=("sensor", "region"),
)

#: Index of a folder of GeoTIFFs, kept beside them (resources/imagery_folder.py); no dataset of the storage root.
IMAGERY_FILES = _dataset(
    "imagery_files",
    [
        _column("file", pa.string(), "path within the folder"),
        _column(
            "signature", pa.string(), "fingerprint of the file's size and time, and of what is said of it"
        ),
        _STATUS,
        _REASON,
        _column("scene_id", pa.string(), "id of the scene: the path without its extension"),
        _column("acquired_at_utc", UTC, "when it was acquired", nullable=True),
        _column("cloud_pct", pa.float64(), "cloud percentage of the whole scene", nullable=True),
        _column("crs", pa.string(), "the file's own CRS, e.g. EPSG:26919", nullable=True),
        _column("x0_m", pa.float64(), "easting of its upper left corner", nullable=True),
        _column("y0_m", pa.float64(), "northing of its upper left corner", nullable=True),
        _column("gsd_m", pa.float64(), "metres per pixel", nullable=True),
        _column("width_px", pa.int32(), "columns", nullable=True),
        _column("height_px", pa.int32(), "rows", nullable=True),
        _column("bands", pa.list_(pa.string()), "descriptions of its bands, empty where there is none"),
        _column("footprint_wkb", pa.binary(), "polygon of valid ground, EPSG:4326", nullable=True),
    ],
    key=("file",),
    partitions=(),
)

ABLATIONS = _dataset(
    "ablations",
    [
        _column("variant", pa.string(), "name in graft_pipeline.ablations"),
        _column("seed", pa.int64(), "seed of the training"),
        _column(
            "setup_id", pa.string(), "fingerprint of what all variants share: recipe, code, models, benchmark"
        ),
        _column("snapshot", pa.string(), "fingerprint of the training set"),
        _column("train_tiles", pa.int64(), "tiles of its training split"),
        _column("train_pairs", pa.int64(), "(tile, photo) pairs of it"),
        _column("best_step", pa.int64(), "step of the weights that were scored"),
        _column("training_seconds", pa.float64(), "wall time of the training"),
        _column("accuracy", pa.float64(), "zero-shot classification of the benchmark's crops"),
        _column("mean_average_precision", pa.float64(), "retrieval of them by text, mean over classes"),
        _column("mean_average_precision_at_20", pa.float64(), "the same of the first 20 retrieved"),
        _column("segmentation_accuracy", pa.float64(), "zero-shot segmentation: mean recall of the classes"),
        _column("mean_iou", pa.float64(), "zero-shot segmentation: mean intersection over union"),
    ],
    key=("setup_id", "variant", "seed"),
    partitions=("sensor",),
)

OSM_LABELS = _dataset(
    "osm_labels",
    [
        _TILE_ID,
        _column("labels", pa.list_(pa.string()), "classes of osm_classes.json in the footprint, sorted"),
        _column("shares", pa.list_(pa.float64()), "share of the footprint that each of them covers"),
        _column("single_label", pa.string(), "the class that covers most of it, if one does", nullable=True),
    ],
    key=("tile_id",),
    partitions=("sensor", "region"),
)

#: Its files are GeoParquet as they lie: the standard wants this key in a file's metadata, and means OGC:CRS84 (as
#: EPSG:4326, longitude first) where no CRS is named (geoparquet.org/releases/v1.1.0).
_GEOPARQUET = {
    "version": "1.1.0",
    "primary_column": "outline_wkb",
    "columns": {"outline_wkb": {"encoding": "WKB", "geometry_types": ["Polygon", "MultiPolygon"]}},
}

CONCEPT_MAPS = _dataset(
    "concept_maps",
    [
        _column("concept", pa.string(), "what was asked for, in words"),
        _column("cell_id", pa.string(), "H3 index, or side, row and column of a square"),
        _column("center_lon_deg", pa.float64(), "longitude of the cell's centre"),
        _column("center_lat_deg", pa.float64(), "latitude of the cell's centre"),
        _column("tiles", pa.int64(), "tiles whose centres lie in the cell, at least one"),
        _column("hits", pa.int64(), "tiles among them whose contrast reaches the threshold"),
        _column("share", pa.float64(), "hits by tiles: what maps show"),
        _column("mean_score", pa.float64(), "mean cosine of the tiles' embeddings and the words'"),
        _column(
            "mean_contrast", pa.float64(), "mean contrast: standard deviations above the sensor's mean tile"
        ),
        _column("threshold", pa.float64(), "contrast from which a tile is a hit"),
        _column("best_tile_id", pa.string(), "tile of greatest score in the cell"),
        _column("best_score", pa.float32(), "its cosine"),
        _column("outline_wkb", pa.binary(), "the cell's polygon, EPSG:4326; two across the antimeridian"),
    ],
    key=("concept", "cell_id"),
    partitions=("sensor",),
    metadata={"geo": json.dumps(_GEOPARQUET)},
)

#: What a search answers (graft_pipeline/search.py), best first; no dataset of the storage root.
SEARCH_RESULTS = _dataset(
    "search_results",
    [
        _TILE_ID,
        _column("region", pa.string(), "region of the tile"),
        _column("center_lon_deg", pa.float64(), "longitude of the tile's centre"),
        _column("center_lat_deg", pa.float64(), "latitude of the tile's centre"),
        _column("acquired_at_utc", UTC, "when the chip's scene was acquired"),
        _column("scene_id", pa.string(), "scene of the chip"),
        _column("score", pa.float32(), "cosine of the chip's embedding and the query"),
    ],
    key=("tile_id",),
    partitions=(),
)


def search_part(width: int) -> pa.Schema:
    """Schema of one region's part of a search index, an Arrow file beside the sensor's other parts.

    Args:
        width: dimensions of the embeddings.

    Returns:
        The rows of SEARCH_RESULTS without region and score, and the embedding, L2-normalised.
    """
    fields = [field for field in SEARCH_RESULTS.schema if field.name not in ("region", "score")]
    vector = pa.list_(pa.field("element", pa.float32(), nullable=False), width)
    return pa.schema(
        [*fields, _column("embedding", vector, "f_S^I of the chip's central crop, L2-normalised")]
    )


#: Every dataset that `graft query` opens as a view.
DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        REGIONS,
        SEARCH_LOCATIONS,
        FLICKR_PHOTOS,
        PURGED_PHOTOS,
        PURGED_OWNERS,
        GROUND_IMAGES,
        GROUND_EMBEDDINGS,
        OUTDOOR_PHOTOS,
        SCENES,
        TILES,
        CHIPS,
        PAIRS,
        TRAINING_PAIRS,
        CHIP_EMBEDDINGS,
        OSM_LABELS,
        ABLATIONS,
        CONCEPT_MAPS,
    )
}
