"""What others produce: external assets, so that lineage reaches Flickr, imagery and the foundation model.

They are never materialised here; the planet's own foundation model is an asset of assets/planet.py.
"""

from pathlib import Path

import dagster as dg

from assets.sensors import SOURCE_KINDS, external_collection
from graft_pipeline.imagery import Sensor, Source
from graft_pipeline.settings import Settings

SOURCE_NAMES: dict[Source, str] = {
    "earth_engine": "Earth Engine collection",
    "stac": "STAC collection",
    "folder": "Folder of GeoTIFFs",
}
FOUNDATION_KEY = dg.AssetKey(["openclip", "foundation"])


def build_external_assets(settings: Settings) -> list[dg.AssetSpec]:
    """Specs of the sources of a deployment.

    Args:
        settings: which sensors and which foundation model it has.

    Returns:
        One spec for Flickr, one for each sensor's collection, and one for the foundation model if it is not
        trained here.
    """
    specs = [
        dg.AssetSpec(
            dg.AssetKey(["flickr", "photos_search"]),
            group_name="sources",
            description="Geotagged photos of Flickr (flickr.photos.search). Their owners keep their rights: each row "
            "keeps its licence, and photos that disappear there are to be removed here.",
            kinds={"flickr"},
            metadata={
                "url": dg.MetadataValue.url("https://www.flickr.com/services/api/flickr.photos.search.html")
            },
        )
    ]
    for sensor in settings.sensor_records.values():
        name = SOURCE_NAMES[settings.imagery]
        specs.append(
            dg.AssetSpec(
                external_collection(sensor, settings.imagery),
                group_name="sources",
                description=f"{name} {sensor.collection}, {sensor.gsd_m:g} m per pixel.",
                kinds={SOURCE_KINDS[settings.imagery]},
                metadata={**_place(sensor, settings), "bands": ", ".join(sensor.bands)},
            )
        )
    if not settings.is_planet:
        specs.append(
            dg.AssetSpec(
                FOUNDATION_KEY,
                group_name="sources",
                description=f"Frozen CLIP {settings.foundation_architecture}, {settings.foundation_pretrained}.",
                kinds={"pytorch"},
            )
        )
    return list({spec.key: spec for spec in specs}.values())


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
