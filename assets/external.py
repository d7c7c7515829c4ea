"""What others produce: external assets, so that lineage reaches Flickr, Earth Engine and the foundation model.

They are never materialised here; the planet's own foundation model is an asset of assets/planet.py.
"""

import dagster as dg

from assets.sensors import external_collection
from graft_pipeline.settings import Settings

FOUNDATION_KEY = dg.AssetKey(["openclip", "foundation"])


def build_external_assets(settings: Settings) -> list[dg.AssetSpec]:
    """Specs of the sources of a deployment.

    Args:
        settings: which sensors and which foundation model it has.

    Returns:
        One spec for Flickr, one for each Earth Engine collection, and one for the foundation model if it is not
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
        page = f"https://developers.google.com/earth-engine/datasets/catalog/{sensor.collection.replace('/', '_')}"
        specs.append(
            dg.AssetSpec(
                external_collection(sensor),
                group_name="sources",
                description=f"Earth Engine collection {sensor.collection}, {sensor.gsd_m:g} m per pixel.",
                kinds={"earthengine"},
                metadata={"url": dg.MetadataValue.url(page), "bands": ", ".join(sensor.bands)},
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
