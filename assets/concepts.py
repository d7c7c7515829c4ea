"""Maps of the concepts that a deployment names, and on the planet what they are worth beside its true land cover.

What a map counts is in graft_pipeline/concept_maps.py. Only the scores read the truth; nothing that is trained does.
"""

from collections.abc import Callable
from functools import partial

import dagster as dg
import numpy as np
import pyarrow.compute as pc
import shapely

from assets.keys import FOUNDATION_KEY, PLANET_TRUTH_KEY
from assets.learning import encoder_folder, local_model
from assets.planet import scores_result
from assets.reporting import OWNERS, check_specs, measured, report_table, table_metadata
from graft_pipeline import chips, concept_maps, embeddings, grid, map_files, previews, schemas
from graft_pipeline.concept_maps import Background, ConceptMaps, Hexagons, map_concepts, map_vectors
from graft_pipeline.errors import DataError
from graft_pipeline.imagery import Sensor
from graft_pipeline.partitions import ALL_REGIONS
from graft_pipeline.progress import Progress
from graft_pipeline.provenance import code_version
from graft_pipeline.report import scores_folder, write_scores
from graft_pipeline.search import SearchIndex
from graft_pipeline.settings import Settings
from resources.planet.cell_truth import cell_shares
from resources.planet.truth_client import PlanetTruth
from resources.storage import Storage

ENCODER, FOUNDATION, KNOWN = "image_encoder", "foundation", "known tiles"


def build_concept_assets(sensor: Sensor, settings: Settings, *, has_truth: bool) -> list[dg.AssetsDefinition]:
    """The concept maps of one sensor.

    Args:
        sensor: the sensor's record.
        settings: name the concepts.
        has_truth: whether the planet knows what its tiles show.

    Returns:
        `concept_maps` if there are concepts, and on the planet `concept_map_scores`.
    """
    if not settings.concepts and not has_truth:
        return []
    options = {"key_prefix": sensor.name, "group_name": sensor.name, "owners": OWNERS, "pool": "gpu"}

    @dg.asset(
        **options,
        name=schemas.CONCEPT_MAPS.name,
        deps=[[sensor.name, "search_index"], [sensor.name, "image_encoder"]],
        code_version=code_version(concept_maps, map_files),
        kinds={"parquet", "geotiff"},
        metadata=table_metadata(schemas.CONCEPT_MAPS, sensor),
        check_specs=check_specs([sensor.name, schemas.CONCEPT_MAPS.name], partitioned=False),
    )
    @measured
    def concept_maps_asset(
        world: dg.ResourceParam[Settings],
        storage: dg.ResourceParam[Storage],
        progress: dg.ResourceParam[Progress],
    ) -> dg.MaterializeResult:
        """Where words apply: density of the tiles that answer each concept best, over hexagons (paper, figure 5)."""
        maps = maps_now(storage, sensor, world, progress)
        folder = storage.folder(schemas.CONCEPT_MAPS, sensor=sensor.name)
        read = partial(stored_chips, storage, sensor)
        with storage.explained():
            written = map_files.write_maps(folder, maps, f"Concepts by {sensor.name}", read)
        table = storage.read(schemas.CONCEPT_MAPS, sensor=sensor.name)
        shares = list(zip(maps.concepts, maps.share, strict=True))
        return report_table(
            schemas.CONCEPT_MAPS,
            table,
            changed=any(written.files.values()),
            picture=draw(maps, shares, f"{sensor.name}: share of tiles that are hits, darker is more"),
            cells=len(maps.keys),
            tiles=int(maps.tiles.sum()),
            folder=dg.MetadataValue.path(str(folder)),
            **{f"left_out/{suffix}": reason for suffix, reason in written.left_out.items()},
            **{f"hits/{name}": int(hits.sum()) for name, hits in zip(maps.concepts, maps.hits, strict=True)},
        )

    @dg.asset(
        **options,
        deps=[
            concept_maps_asset,
            FOUNDATION_KEY,
            PLANET_TRUTH_KEY,
            dg.AssetDep([sensor.name, "chips"], partition_mapping=ALL_REGIONS),
        ],
        code_version=code_version("training.zero_shot.map_scores", "resources.planet.cell_truth"),
        kinds={"pytorch"},
    )
    @measured
    def concept_map_scores(
        world: dg.ResourceParam[Settings],
        storage: dg.ResourceParam[Storage],
        progress: dg.ResourceParam[Progress],
    ) -> dg.MaterializeResult:
        """Maps beside the true land cover of their cells, and maps of the frozen foundation model; evaluation only."""
        from training.zero_shot.map_scores import score_maps

        maps = maps_now(storage, sensor, world, progress)
        truth = PlanetTruth(world.planet.url)
        scored, classes = known_concepts(maps.concepts, truth.classes)
        report = progress.task(f"{sensor.name} true land cover of cells")
        of_cells, of_tiles = true_shares(truth, maps, sensor, report)
        known = np.zeros((len(maps.keys), of_tiles.shape[1]))
        np.add.at(known, maps.cell_of, of_tiles)
        contenders = {
            ENCODER: maps.share[scored],
            FOUNDATION: foundation_maps(storage, sensor, maps, progress).share[scored],
            # What a perfect eye would map from the same tiles: photos are not taken evenly.
            KNOWN: (known / maps.tiles[:, None]).T[classes],
        }
        names = [maps.concepts[number] for number in scored]
        made = score_maps(contenders, of_cells.T[classes], maps.tiles, names)
        panels = [
            (f"{name}{of}", values[number])
            for number, name in enumerate(names)
            for of, values in (("", maps.share[scored]), (": truth", of_cells.T[classes]))
        ]
        pictures = {"concept_maps": draw(maps, panels, f"{sensor.name}: maps beside the truth", columns=6)}
        write_scores(scores_folder(storage, sensor.name), "concept_maps", made.metrics, pictures)
        result = scores_result(made.metrics, pictures)
        values = {
            f"{metric}/{who}/{name}": round(value, 4)
            for who, some in made.by_concept.items()
            for name, of in some.items()
            for metric, value in of.items()
            if who in (ENCODER, FOUNDATION)
        }
        unscored = ", ".join(sorted(set(maps.concepts) - set(names))) or "none"
        return result._replace(
            metadata={**(result.metadata or {}), **values, "cells": made.cells, "unscored": unscored}
        )

    return [concept_maps_asset, *([concept_map_scores] if has_truth else [])]


def concepts_of(settings: Settings) -> tuple[str, ...]:
    """What is mapped: the settings' concepts, on the planet by default its classes."""
    from training.zero_shot.prompts import load_prompts

    return settings.concepts or tuple(words[0] for words in load_prompts("planet").classes.values())


def known_concepts(concepts: tuple[str, ...], classes: list[str]) -> tuple[list[int], list[int]]:
    """Numbers of the concepts that are words of the planet's classes, and of those classes."""
    from training.zero_shot.prompts import load_prompts

    class_of = {
        word: name for name, words in load_prompts("planet").classes.items() for word in (name, *words)
    }
    found = [(number, class_of[name]) for number, name in enumerate(concepts) if name in class_of]
    return [number for number, _ in found], [classes.index(name) for _, name in found]


def maps_now(storage: Storage, sensor: Sensor, settings: Settings, progress: Progress) -> ConceptMaps:
    """The maps of the index as it is."""
    from training.zero_shot.queries import text_vector

    clip = local_model(encoder_folder(storage, sensor, "image"))
    with storage.explained():
        index = SearchIndex.open(storage.root, sensor.name)
        index.check_model(clip.fingerprint())
        vectors = {concept: text_vector(clip, concept) for concept in concepts_of(settings)}
        report = progress.task(f"{sensor.name} concept maps")
        return map_vectors(index, vectors, Hexagons(settings.concept_resolution), progress=report)


def foundation_maps(storage: Storage, sensor: Sensor, maps: ConceptMaps, progress: Progress) -> ConceptMaps:
    """The same maps by the frozen foundation model, from the same chips."""
    from training.encoders import encode_images
    from training.zero_shot.queries import text_vector

    clip = local_model(storage.models_folder / "foundation")
    tiles, vectors = maps.rows, np.zeros((maps.rows.num_rows, clip.embedding_width), np.float32)
    regions = np.array(tiles["region"].to_pylist())
    report = progress.task(f"{sensor.name} chips by the foundation model")
    for region in np.unique(regions):
        table, folder = stored_chips(storage, sensor, str(region))
        table = table.filter(pc.equal(table["status"], "ok"))
        numbers = np.flatnonzero(regions == region)
        places = pc.index_in(tiles["tile_id"].take(numbers), table["tile_id"].combine_chunks())
        if places.null_count:
            raise DataError(
                f"{region}: {places.null_count} tiles of the search index have no stored chip any more: materialise "
                f"{sensor.name}/search_index, then the maps again."
            )
        for batch in np.array_split(np.arange(len(numbers)), -(-len(numbers) // embeddings.BATCH)):
            some, wanted = numbers[batch], table.take(places.take(batch))
            images = chips.decode_all(embeddings.read_images(folder, wanted))
            vectors[some] = encode_images(clip, images, crop_px=sensor.crop_px)
            report(int(some[-1]) + 1, len(regions))
    scores = {concept: vectors @ text_vector(clip, concept) for concept in maps.concepts}
    backgrounds = {concept: Background.of(values) for concept, values in scores.items()}
    return map_concepts(tiles, scores, backgrounds, maps.cells)


def true_shares(
    truth: PlanetTruth, maps: ConceptMaps, sensor: Sensor, report: Callable[[int, int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the classes in the maps' cells, and in their tiles' footprints."""
    lon, lat = (maps.rows[name].to_numpy() for name in ("center_lon_deg", "center_lat_deg"))
    outlines = maps.cells.outlines(maps.keys)
    return cell_shares(truth, outlines, lon, lat, maps.cell_of, sensor.footprint_m, report)


def stored_chips(storage: Storage, sensor: Sensor, region: str) -> tuple:
    """A region's CHIPS rows, grid tiles included, and the folder that their shards are named from."""
    with storage.explained():
        return grid.stored_chips(storage.root, sensor.name, region)


def draw(maps: ConceptMaps, panels: list[tuple[str, np.ndarray]], title: str, columns: int = 4) -> bytes:
    """Maps as a picture."""
    polygons = [
        max(shapely.get_parts(outline), key=lambda part: part.area)
        for outline in maps.cells.outlines(maps.keys)
    ]
    outlines = [np.array(polygon.exterior.coords) for polygon in polygons]
    return previews.cell_maps(outlines, panels, title=title, columns=columns)
