"""Where every column comes from: for each dataset, the columns of other datasets, models and sources behind it.

What a column means is in schemas.py; how its lineage looks in Dagster, in assets/reporting.py.
"""

from collections.abc import Iterator, Mapping

from graft_pipeline.errors import DataError
from graft_pipeline.schemas import DATASETS

#: What others produce, with the fields that are taken from it.
SOURCES: dict[str, dict[str, str]] = {
    "areas": {
        "name": "name of a registered area",
        "geometry": "its polygons, EPSG:4326",
    },
    "flickr": {
        "id": "id of a photo",
        "owner": "id of its owner",
        "title": "title as its owner wrote it",
        "tags": "space separated tags",
        "license": "id of its licence",
        "longitude": "of its geotag",
        "latitude": "of its geotag",
        "accuracy": "of its geotag, 1 to 16",
        "dateupload": "when it was uploaded",
        "lastupdate": "when its metadata changed last",
        "datetaken": "when it was taken, owner's clock, with its granularity",
        "media": "photo or video, content type",
        "url": "addresses and pixels of its sizes",
        "image": "content of one size",
    },
    "imagery": {
        "id": "id of a scene",
        "acquired": "when it was acquired",
        "cloud": "its cloud percentage",
        "grid": "its CRS and pixel grid",
        "footprint": "polygon of its valid ground",
        "pixels": "its bands",
        "mask": "its band of clouds and shadows",
    },
    "foundation": {"weights": "f_G and f_T, frozen"},
    "osm": {"ways": "tagged objects of an OpenStreetMap extract"},
}

#: Models that are trained here, as datasets of one column.
MODELS = {"image_encoder": "weights", "pixel_encoder": "weights"}

#: Columns that are computed from nothing but settings, time and chance: what from. All others have columns upstream.
COMPUTED: dict[str, dict[str, str]] = {
    "search_locations": {
        "location_id": "counts the draws",
        "radius_km": "the setting search_radius_km",
    },
    "purged_photos": {
        "photo_id": "given to `graft photos purge`",
        "reason": "given to `graft photos purge`",
        "purged_at_utc": "the clock",
    },
    "purged_owners": {
        "owner_id": "given to `graft photos purge`",
        "reason": "given to `graft photos purge`",
        "purged_at_utc": "the clock",
    },
    "ground_images": {"attempts": "counts requests", "retry_on": "the clock and the attempts"},
    "tiles": {
        "gsd_m": "the sensor's record",
        "chip_px": "the sensor's record",
        "sampling": "the setting sampling",
    },
    "chips": {
        "attempts": "counts requests",
        "retry_on": "the clock and the attempts",
        "sensor_id": "the sensor's record",
        "raw_bands": "the sensor's record",
    },
    "ablations": {
        "variant": "name of a variant",
        "seed": "asked for in the run",
        "training_seconds": "the clock",
    },
    "concept_maps": {
        "concept": "the setting concepts",
        "threshold": "asked for, or the standard one",
    },
}

_GEOTAG = ("flickr_photos.lon_deg", "flickr_photos.lat_deg")
_CENTER = ("tiles.center_x_m", "tiles.center_y_m")
_USABLE = ("flickr_photos.status", "ground_images.status", "outdoor_photos.is_outdoor")
_SCENE = (
    "scenes.scene_id",
    "scenes.acquired_at_utc",
    "scenes.cloud_pct",
    "scenes.footprint_wkb",
    "flickr_photos.taken_at_utc",
)
_PIXELS = ("imagery.pixels", "chips.scene_id", "tiles.x0_m", "tiles.y0_m")
_IMAGE = ("flickr.image", "flickr_photos.image_url")
_BY_TILE = ("chip_embeddings.embedding", "foundation.weights")


def _same(dataset: str, *columns: str) -> dict[str, tuple[str, ...]]:
    """Columns that are taken over as they are."""
    return {column: (f"{dataset}.{column}",) for column in columns}


#: Column to the columns that it is made from, `dataset.column`. A dataset may name columns of its own that other
#: columns of it decide, such as `chips.scene_id`.
UPSTREAM: dict[str, dict[str, tuple[str, ...]]] = {
    "regions": {
        "region": ("areas.geometry",),
        "area": ("areas.name",),
        **dict.fromkeys(("west_deg", "south_deg", "east_deg", "north_deg", "epsg"), ("regions.region",)),
        "covered_pct": ("areas.geometry",),
    },
    "search_locations": dict.fromkeys(("lon_deg", "lat_deg"), ("regions.region", "areas.geometry")),
    "flickr_photos": {
        "photo_id": ("flickr.id",),
        "owner_id": ("flickr.owner",),
        "title": ("flickr.title",),
        "tags": ("flickr.tags",),
        "license_id": ("flickr.license",),
        "lon_deg": ("flickr.longitude",),
        "lat_deg": ("flickr.latitude",),
        "accuracy": ("flickr.accuracy",),
        "uploaded_at_utc": ("flickr.dateupload",),
        "updated_at_utc": ("flickr.lastupdate",),
        "taken_at_local": ("flickr.datetaken",),
        "taken_at_utc": ("flickr.datetaken", "flickr.longitude"),
        "is_taken_exact": ("flickr.datetaken",),
        **dict.fromkeys(("image_url", "width_px", "height_px"), ("flickr.url",)),
        "duplicate_of": ("flickr.owner", "flickr.datetaken", "flickr.longitude", "flickr.latitude"),
        "status": ("flickr_photos.reason",),
        "reason": (
            "flickr.media",
            "flickr.title",
            "flickr.tags",
            "flickr.accuracy",
            "flickr.url",
            "flickr.longitude",
            "flickr.latitude",
            "flickr_photos.duplicate_of",
        ),
    },
    "ground_images": {
        **_same("flickr_photos", "photo_id"),
        **dict.fromkeys(
            ("status", "reason", "width_px", "height_px", "phash", "shard", "offset", "size_bytes", "sha256"),
            _IMAGE,
        ),
        "request_id": ("flickr_photos.image_url",),
        "duplicate_of": ("ground_images.phash",),
    },
    "ground_embeddings": {
        **_same("ground_images", "photo_id"),
        "embedding": ("ground_images.sha256", "foundation.weights"),
        "model_id": ("foundation.weights",),
    },
    "outdoor_photos": {
        **_same("ground_embeddings", "photo_id"),
        # Zero-shot on the embedding, or a ResNet-18 on the image, as the settings choose.
        "outdoor_score": ("ground_embeddings.embedding", "ground_images.sha256", "foundation.weights"),
        "is_outdoor": ("outdoor_photos.outdoor_score",),
        "classifier_id": ("foundation.weights",),
    },
    "scenes": {
        "scene_id": ("imagery.id",),
        "acquired_at_utc": ("imagery.acquired",),
        "cloud_pct": ("imagery.cloud",),
        **dict.fromkeys(("crs", "x_min_m", "y_min_m", "x_max_m", "y_max_m"), ("imagery.grid",)),
        "footprint_wkb": ("imagery.footprint",),
    },
    "tiles": {
        "tile_id": ("tiles.center_photo_id",),
        "tile_index": ("flickr_photos.uploaded_at_utc", "flickr_photos.photo_id"),
        "center_photo_id": ("flickr_photos.photo_id", "flickr_photos.uploaded_at_utc", *_GEOTAG, *_USABLE),
        "center_lon_deg": ("flickr_photos.lon_deg",),
        "center_lat_deg": ("flickr_photos.lat_deg",),
        "center_x_m": _GEOTAG,
        "center_y_m": _GEOTAG,
        "epsg": ("regions.epsg",),
        "x0_m": _CENTER,
        "y0_m": _CENTER,
        "split": ("tiles.x0_m", "tiles.y0_m"),
    },
    "chips": {
        **_same("tiles", "tile_id", "epsg", "x0_m", "y0_m", "gsd_m", "chip_px"),
        "scene_id": _SCENE,
        **_same("scenes", "acquired_at_utc", "cloud_pct"),
        "chip_cloud_pct": ("imagery.mask", "chips.scene_id", "tiles.x0_m", "tiles.y0_m"),
        "time_difference_days": ("scenes.acquired_at_utc", "flickr_photos.taken_at_utc"),
        **dict.fromkeys(("scenes_tried", "request_id"), _SCENE),
        **dict.fromkeys(
            ("status", "reason", "nodata_px", "shard", "offset", "size_bytes", "sha256"),
            _PIXELS,
        ),
        **dict.fromkeys(("raw_shard", "raw_offset", "raw_size_bytes", "raw_sha256"), _PIXELS),
    },
    "pairs": {
        **_same("tiles", "tile_id", "center_photo_id", "split"),
        "photo_id": ("flickr_photos.photo_id", *_USABLE),
        **_same("chips", "scene_id", "acquired_at_utc"),
        **_same("flickr_photos", "lon_deg", "lat_deg", "taken_at_utc"),
        "col_px": (*_GEOTAG, "chips.epsg", "chips.x0_m", "chips.gsd_m"),
        "row_px": (*_GEOTAG, "chips.epsg", "chips.y0_m", "chips.gsd_m"),
        "time_difference_days": ("chips.acquired_at_utc", "flickr_photos.taken_at_utc"),
    },
    "training_set": {
        **_same("pairs", "tile_id", "photo_id", "split", "col_px", "row_px", "lon_deg", "lat_deg"),
        "region": ("regions.region",),
        "chip_shard": ("chips.shard",),
        "chip_offset": ("chips.offset",),
        "chip_size_bytes": ("chips.size_bytes",),
        "embedding_row": ("ground_embeddings.photo_id", "ground_embeddings.embedding"),
        "model_id": ("ground_embeddings.model_id",),
    },
    **{
        model: {
            "weights": (
                "training_set.chip_shard",
                "training_set.chip_offset",
                "training_set.embedding_row",
                "training_set.split",
                "foundation.weights",
                *(("training_set.col_px", "training_set.row_px") if model == "pixel_encoder" else ()),
            )
        }
        for model in MODELS
    },
    "chip_embeddings": {
        **_same("tiles", "tile_id", "center_lon_deg", "center_lat_deg"),
        "embedding": ("chips.sha256", "image_encoder.weights"),
        "model_id": ("image_encoder.weights",),
        "chip_sha256": ("chips.sha256",),
    },
    "osm_labels": {
        **_same("tiles", "tile_id"),
        **dict.fromkeys(
            ("labels", "shares", "single_label"), ("osm.ways", "tiles.center_x_m", "tiles.center_y_m")
        ),
    },
    "ablations": {
        **dict.fromkeys(
            (
                "setup_id",
                "best_step",
                "accuracy",
                "mean_average_precision",
                "mean_average_precision_at_20",
                "segmentation_accuracy",
                "mean_iou",
            ),
            ("ablations.snapshot", "foundation.weights"),
        ),
        "snapshot": ("training_set.tile_id", "training_set.photo_id", "training_set.embedding_row"),
        "train_tiles": ("training_set.tile_id", "training_set.split"),
        "train_pairs": ("training_set.photo_id", "training_set.split"),
    },
    "concept_maps": {
        **dict.fromkeys(
            ("cell_id", "center_lon_deg", "center_lat_deg", "tiles", "outline_wkb"),
            ("chip_embeddings.center_lon_deg", "chip_embeddings.center_lat_deg"),
        ),
        **dict.fromkeys(("mean_score", "mean_contrast", "best_score"), _BY_TILE),
        **dict.fromkeys(("hits", "share"), (*_BY_TILE, "concept_maps.threshold")),
        "best_tile_id": ("chip_embeddings.tile_id", *_BY_TILE),
    },
}


def columns_of(name: str) -> tuple[str, ...]:
    """Columns of a dataset, a model or a source.

    Args:
        name: as in UPSTREAM or SOURCES.

    Raises:
        DataError: if there is none of that name.
    """
    if name in DATASETS:
        return tuple(DATASETS[name].schema.names)
    if name in MODELS:
        return (MODELS[name],)
    if name in SOURCES:
        return tuple(SOURCES[name])
    raise DataError(f"{name!r} is no dataset, model or source: use a name of graft_pipeline/lineage.py.")


def upstream(name: str) -> Mapping[str, tuple[str, ...]]:
    """Each column of a dataset with the columns of others that it is made from.

    Args:
        name: of a dataset or a model.

    Returns:
        Column to `dataset.column` names, sorted. Columns of the dataset itself are followed until others are
        reached; a column that is computed from none has none.
    """
    return {column: tuple(sorted(set(_beyond(name, column, ())))) for column in columns_of(name)}


def _beyond(name: str, column: str, seen: tuple[str, ...]) -> Iterator[str]:
    for origin in UPSTREAM.get(name, {}).get(column, ()):
        dataset, _, above = origin.partition(".")
        if dataset != name:
            yield origin
        elif above not in seen:
            yield from _beyond(name, above, (*seen, column))


def in_words(name: str, column: str) -> str:
    """Where a column comes from, for people.

    Args:
        name: of a dataset or a model.
        column: of it.

    Returns:
        `from chips.scene_id`, or `computed: the clock`.
    """
    if column in COMPUTED.get(name, {}):
        return f"computed: {COMPUTED[name][column]}"
    above = upstream(name)[column]
    return f"from {', '.join(above)}" if above else "computed"


def ends_of(name: str, column: str) -> set[str]:
    """Where the lineage of a column ends.

    Args:
        name: of a dataset or a model.
        column: of it.

    Returns:
        Fields of sources, `flickr.id`, and columns that are computed from nothing, `tiles.gsd_m`.
    """
    found: set[str] = set()
    waiting, seen = [f"{name}.{column}"], set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        dataset, _, field = current.partition(".")
        if dataset in SOURCES or field in COMPUTED.get(dataset, {}):
            found.add(current)
        else:
            waiting += UPSTREAM[dataset][field]
    return found
