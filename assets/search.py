"""The search index over all regions of a sensor.

What it consists of is in graft_pipeline/search_index.py; the vectors come from `chip_embeddings`.
"""

from functools import partial

import dagster as dg

from assets.concepts import concepts_of, stored_chips
from assets.learning import encoder_folder, local_model
from assets.reporting import OWNERS, measured, shown
from graft_pipeline import search_index, sheets, shortlist
from graft_pipeline.imagery import Sensor
from graft_pipeline.partitions import ALL_REGIONS
from graft_pipeline.progress import Progress
from graft_pipeline.provenance import code_version, fingerprint
from graft_pipeline.search import SearchIndex
from graft_pipeline.settings import Settings
from resources.storage import Storage

#: Example searches of the preview, and hits of each.
EXAMPLES, HITS = 5, 6


def build_search_assets(sensor: Sensor, settings: Settings) -> list[dg.AssetsDefinition]:
    """The search assets of one sensor.

    Args:
        sensor: the sensor's record.
        settings: say whether it has a grid.

    Returns:
        `search_index`.
    """

    @dg.asset(
        name="search_index",
        key_prefix=sensor.name,
        group_name=sensor.name,
        owners=OWNERS,
        deps=[
            dg.AssetDep([sensor.name, "image_encoder"]),
            *(
                dg.AssetDep([sensor.name, name], partition_mapping=ALL_REGIONS)
                for name in (
                    "chip_embeddings",
                    *(["grid_embeddings"] if sensor.name in settings.grid_stride_m else []),
                )
            ),
        ],
        code_version=code_version(search_index, shortlist),
        kinds={"arrow", "faiss"},
        # One writer at a time.
        pool=f"{sensor.name}_search_index",
    )
    @measured
    def index_asset(
        world: dg.ResourceParam[Settings],
        storage: dg.ResourceParam[Storage],
        progress: dg.ResourceParam[Progress],
    ) -> dg.MaterializeResult:
        """All regions' chip embeddings, to be searched; only regions that changed are indexed anew."""
        clip = local_model(encoder_folder(storage, sensor, "image"))
        report = progress.task(f"{sensor.name} search index")
        with storage.explained():
            made = search_index.update(
                storage.root, sensor.name, model_id=clip.fingerprint(), progress=report
            )
        manifest = made.manifest
        metadata = {
            "dagster/row_count": manifest.rows,
            "is_changed": made.is_changed,
            "encoder": manifest.model_id,
            "regions": len(manifest.parts),
            "regions_made": len(made.made),
            "regions_removed": len(made.removed),
            "regions_left_out": len(manifest.left_out),
            "tiles_without_chip": made.without_chip,
            "has_shortlist": manifest.shortlist is not None,
            "size_bytes": search_index.size_bytes(storage.root, sensor.name, manifest),
        }
        if manifest.left_out:
            metadata["left_out"] = dg.MetadataValue.md(
                "\n".join(f"- {why}" for why in manifest.left_out.values())
            )
        if manifest.rows:
            sheet = example_searches(storage, sensor, clip, concepts_of(world)[:EXAMPLES])
            metadata |= shown({"preview": sheet}, {"preview": "example searches"})
        return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion(fingerprint(manifest)))

    return [index_asset]


def example_searches(storage: Storage, sensor: Sensor, clip, words: tuple[str, ...]) -> bytes:
    """The best tiles for a few words, a row for each, as a contact sheet."""
    from training.zero_shot.queries import text_vector

    read = partial(stored_chips, storage, sensor)
    with storage.explained():
        index = SearchIndex.open(storage.root, sensor.name)
        found = {some: index.search(text_vector(clip, some), HITS) for some in words}
        return sheets.search_sheet(found, read, crop_px=sensor.crop_px, columns=HITS)
