"""What others produce: external assets, so that lineage reaches Flickr, imagery and the foundation model.

They are never materialised here; the planet's own foundation model is an asset of assets/planet.py.
"""

from pathlib import Path
from typing import Any

import dagster as dg

from assets.keys import (
    AREAS_KEY,
    CAPTIONED_PHOTOS_KEY,
    FLICKR_KEY,
    FOUNDATION_KEY,
    OSM_KEY,
    PLANET_TRUTH_KEY,
    SOURCE_KINDS,
    external_collection,
)
from assets.reporting import SCHEMA, fields_schema
from graft_pipeline.imagery import Sensor, Source
from graft_pipeline.lineage import SOURCES
from graft_pipeline.settings import Settings

SOURCE_NAMES: dict[Source, str] = {
    "earth_engine": "Earth Engine collection",
    "stac": "STAC collection",
    "folder": "Folder of GeoTIFFs",
}


def build_external_assets(settings: Settings) -> list[dg.AssetSpec]:
    """Specs of the sources of a deployment.

    Args:
        settings: which sensors, foundation model and data it has.

    Returns:
        One spec for the registered areas, one for Flickr, one for each sensor's collection; one for the foundation
        model if it is not trained here, or else those of what the planet knows; and one for an OpenStreetMap extract.
    """
    areas_folder = f"{settings.root.rstrip('/')}/areas"
    specs = [
        _source(
            AREAS_KEY,
            "Areas of interest: vector files that were registered with `graft areas add FILE`.",
            "geojson",
            fields="areas",
            folder=dg.MetadataValue.path(areas_folder),
        ),
        _source(
            FLICKR_KEY,
            "Geotagged photos of Flickr (flickr.photos.search). Their owners keep their rights: each row keeps its "
            "licence, and photos that disappear there are to be removed here (`graft photos purge`).",
            "flickr",
            fields="flickr",
            url=dg.MetadataValue.url("https://www.flickr.com/services/api/flickr.photos.search.html"),
            terms=dg.MetadataValue.url("https://www.flickr.com/help/terms/api"),
        ),
    ]
    for sensor in settings.sensor_records.values():
        name = SOURCE_NAMES[settings.imagery]
        specs.append(
            _source(
                external_collection(sensor, settings.imagery),
                f"{name} {sensor.collection}, {sensor.gsd_m:g} m per pixel.",
                SOURCE_KINDS[settings.imagery],
                fields="imagery",
                **_place(sensor, settings),
                bands=", ".join(sensor.bands),
            )
        )
    if not settings.is_planet:
        specs.append(
            _source(
                FOUNDATION_KEY,
                f"Frozen CLIP {settings.foundation_architecture}, {settings.foundation_pretrained}.",
                "pytorch",
                fields="foundation",
                url=dg.MetadataValue.url("https://github.com/mlfoundations/open_clip"),
            )
        )
    else:
        specs += [
            _source(
                PLANET_TRUTH_KEY,
                "What the planet knows of its own ground: land cover, labels, what photos show. For evaluation only: "
                "nothing that is trained depends on it.",
                "planet",
            ),
            _source(
                CAPTIONED_PHOTOS_KEY,
                "Ground photos of another planet with captions: what the planet's own models learn from.",
                "planet",
            ),
        ]
    if settings.osm_file:
        specs.append(
            _source(
                OSM_KEY,
                "OpenStreetMap extract that tiles are labelled from, for NAIP-OSM.",
                "openstreetmap",
                fields="osm",
                file=dg.MetadataValue.path(str(settings.osm_file)),
            )
        )
    return list({spec.key: spec for spec in specs}.values())


def _source(
    key: dg.AssetKey, description: str, kind: str, *, fields: str | None = None, **metadata: Any
) -> dg.AssetSpec:
    """Spec of an external asset; `fields` names its entry in graft_pipeline.lineage.SOURCES."""
    if fields:
        metadata[SCHEMA] = fields_schema(SOURCES[fields])
    return dg.AssetSpec(key, group_name="sources", description=description, kinds={kind}, metadata=metadata)


def _place(sensor: Sensor, settings: Settings) -> dict[str, dg.MetadataValue]:
    """Where a sensor's collection can be looked at."""
    if settings.imagery == "folder":
        return {"path": dg.MetadataValue.path(str((settings.imagery_folder or Path()) / sensor.collection))}
    if settings.imagery == "stac":
        return {"url": dg.MetadataValue.url(f"{settings.stac_url}/collections/{sensor.collection}")}
    page = sensor.collection.replace("/", "_")
    return {
        "url": dg.MetadataValue.url(f"https://developers.google.com/earth-engine/datasets/catalog/{page}")
    }
