"""Keys of the asset graph: which asset stands for a dataset, a model, or what others produce.

What the assets do is in the other modules.
"""

import re

import dagster as dg

from graft_pipeline.imagery import Sensor, Source
from graft_pipeline.lineage import MODELS
from graft_pipeline.schemas import DATASETS

#: First part of the keys of external collections, and kind of the assets that come from them.
SOURCE_KINDS: dict[Source, str] = {"earth_engine": "earthengine", "stac": "stac", "folder": "geotiff"}

AREAS_KEY = dg.AssetKey(["areas", "registered"])
FLICKR_KEY = dg.AssetKey(["flickr", "photos_search"])
FOUNDATION_KEY = dg.AssetKey(["openclip", "foundation"])
OSM_KEY = dg.AssetKey(["openstreetmap", "extract"])
#: What the planet knows of itself. Only what evaluates may depend on the first; the second shows another planet.
PLANET_TRUTH_KEY = dg.AssetKey(["planet", "truth"])
CAPTIONED_PHOTOS_KEY = dg.AssetKey(["planet", "captioned_photos"])

_SOURCES = {"areas": AREAS_KEY, "flickr": FLICKR_KEY, "foundation": FOUNDATION_KEY, "osm": OSM_KEY}


def external_collection(sensor: Sensor, source: Source) -> dg.AssetKey:
    """Key of the external asset that stands for a sensor's collection in its source."""
    collection = sensor.collection.split("/", 1)[1] if source == "earth_engine" else sensor.collection
    return dg.AssetKey([SOURCE_KINDS[source], re.sub(r"\W+", "_", collection.lower()).strip("_") or "images"])


def asset_key(name: str, sensor: Sensor | None = None, source: Source = "earth_engine") -> dg.AssetKey:
    """Key of the asset that stands for a dataset, a model or a source of graft_pipeline.lineage.

    Args:
        name: as there.
        sensor: whose, where it has sensors.
        source: where imagery comes from.
    """
    if name in _SOURCES:
        return _SOURCES[name]
    if name in DATASETS and "sensor" not in DATASETS[name].partitions:
        return dg.AssetKey([name])
    assert sensor is not None, f"{name} is one of several sensors"
    if name in DATASETS or name in MODELS:
        return dg.AssetKey([sensor.name, name])
    return external_collection(sensor, source)
