"""Evaluation on published datasets: labels of tiles from OpenStreetMap, and one asset per dataset with a release gate.

They exist where settings name the data. Protocol and tables are in training/zero_shot; the planet's own benchmark is in
assets/planet.py.
"""

import math
from pathlib import Path

import dagster as dg

from assets.keys import FOUNDATION_KEY, OSM_KEY
from assets.planet import scores_result
from assets.reporting import (
    OWNERS,
    check_specs,
    measured,
    only_transient_retries,
    report_table,
    table_metadata,
)
from graft_pipeline import osm_labels, schemas
from graft_pipeline.errors import SettingsError
from graft_pipeline.imagery import Sensor
from graft_pipeline.partitions import ALL_REGIONS, REGION_PARTITIONS
from graft_pipeline.progress import Progress
from graft_pipeline.provenance import code_version, fingerprint
from graft_pipeline.regions import Region
from graft_pipeline.settings import Settings
from resources.foundation import FoundationModel
from resources.osm import read_osm
from resources.storage import Storage
from training.zero_shot.catalogue import DATASETS
from training.zero_shot.prompts import load_prompts

CHECK = "no_score_dropped"
#: What scores come from, besides encoders, data and prompts.
MODULES = tuple(
    f"training.zero_shot.{name}"
    for name in (
        *("benchmarks", "classify", "datasets", "evaluate", "evaluate_masks", "mask_sets", "metrics"),
        *("retrieve", "segment", "windows"),
        *(f"answering.{name}" for name in ("detection", "grammar", "interpreter", "rsvqa", "scoring")),
    )
)


class EvaluationConfig(dg.Config):
    """What a single run may ask of an evaluation."""

    #: Make this evaluation the one that later ones are held against, if no score dropped.
    release: bool = False


def build_evaluation_assets(settings: Settings) -> list[dg.AssetsDefinition]:
    """Assets of the datasets that a deployment has.

    Args:
        settings: name the OpenStreetMap extract and the datasets' folders.

    Returns:
        `{sensor}/osm_labels` of every sensor if there is an extract, and `evaluation/{dataset}`.
    """
    assets = [build_osm_labels(sensor) for sensor in settings.sensor_records.values() if settings.osm_file]
    return assets + [build_evaluation(name, folder) for name, folder in settings.evaluation_data.items()]


def build_osm_labels(sensor: Sensor) -> dg.AssetsDefinition:
    """`osm_labels` of one sensor."""

    @dg.asset(
        name=schemas.OSM_LABELS.name,
        key_prefix=sensor.name,
        group_name="evaluation",
        owners=OWNERS,
        deps=[[sensor.name, "tiles"], OSM_KEY],
        partitions_def=REGION_PARTITIONS,
        # The table of classes is as much a cause of labels as the code.
        code_version=fingerprint(code_version(osm_labels, "resources.osm"), osm_labels.osm_classes())[:12],
        kinds={"parquet"},
        metadata=table_metadata(schemas.OSM_LABELS, sensor),
        check_specs=check_specs([sensor.name, schemas.OSM_LABELS.name]),
    )
    @only_transient_retries
    @measured
    def labels(
        context: dg.AssetExecutionContext,
        world: dg.ResourceParam[Settings],
        storage: dg.ResourceParam[Storage],
        progress: dg.ResourceParam[Progress],
    ) -> dg.MaterializeResult:
        """Classes that OpenStreetMap gives each tile's footprint; for evaluation only."""
        region = Region.parse(context.partition_key, world.grid_deg)
        place = {"sensor": sensor.name, "region": region.key}
        if world.osm_file is None:
            raise SettingsError("No OpenStreetMap extract: set GRAFT_OSM_FILE.")
        tiles = storage.read(schemas.TILES, **place)
        report = progress.task(f"{region.key} {sensor.name} OpenStreetMap labels")
        features = read_osm(world.osm_file, reach(region, sensor))
        table = osm_labels.label_tiles(tiles, features, sensor, region.epsg, report)
        changed = storage.write(schemas.OSM_LABELS, table, **place)
        counts = {f"tiles/{name}": count for name, count in osm_labels.count_labels(table).items()}
        return report_table(schemas.OSM_LABELS, table, changed=changed, **counts)

    return labels


def reach(region: Region, sensor: Sensor) -> tuple[float, float, float, float]:
    """West, south, east and north of a region and of all footprints around photos in it, degrees."""
    west, south, east, north = region.bounds
    # A whole footprint is twice what is needed, and covers the angle between grid north and true north.
    lat_deg = sensor.footprint_m / 110_000
    lon_deg = lat_deg / math.cos(math.radians(min(max(abs(south), abs(north)), 89)))
    return west - lon_deg, south - lat_deg, east + lon_deg, north + lat_deg


def build_evaluation(name: str, folder: Path) -> dg.AssetsDefinition:
    """`evaluation/{name}`: our encoder and the frozen foundation model on one dataset."""
    if name not in DATASETS:
        raise SettingsError(f"GRAFT_EVALUATION_DATA names {name!r}: use one of {', '.join(DATASETS)}.")
    of = DATASETS[name]
    deps = [dg.AssetDep([of.sensor, f"{of.level}_encoder"]), dg.AssetDep(FOUNDATION_KEY)]
    if name.startswith("naip_osm"):
        deps.append(dg.AssetDep([of.sensor, "osm_labels"], partition_mapping=ALL_REGIONS))

    @dg.asset(
        name=name,
        key_prefix="evaluation",
        group_name="evaluation",
        owners=OWNERS,
        deps=deps,
        code_version=fingerprint(code_version(*MODULES), load_prompts(of.prompts))[:12],
        kinds={"pytorch"},
        pool="gpu",
        check_specs=[
            dg.AssetCheckSpec(
                CHECK,
                asset=dg.AssetKey(["evaluation", name]),
                description="No score of ours is below the last released one by more than its noise.",
            )
        ],
    )
    @only_transient_retries
    @measured
    def evaluation(
        config: EvaluationConfig,
        world: dg.ResourceParam[Settings],
        storage: dg.ResourceParam[Storage],
        foundation: dg.ResourceParam[FoundationModel],
        progress: dg.ResourceParam[Progress],
    ) -> dg.MaterializeResult:
        """Scores on a published dataset by the paper's protocol, beside the frozen foundation model and chance."""
        from training.loop import resolve_device
        from training.zero_shot import benchmarks, tables

        models = storage.models_folder
        specs = [benchmarks.own_encoder(name, models), benchmarks.foundation_spec(foundation)]
        report = progress.task(f"evaluation {name}")
        made = benchmarks.evaluate_dataset(
            name,
            folder,
            specs,
            None,
            models,
            seed=world.seed,
            device=str(resolve_device("auto")),
            progress=report,
        )
        reports = storage.root / "evaluation"
        released = tables.read_released(reports, name)
        pictures = tables.save_evaluation(reports, made)
        tables.write_evaluation_report(reports)
        now = tables.read_evaluations(reports)[name]
        dropped = tables.drops(now, released, contenders=[benchmarks.OURS]) if released else []
        if config.release and not dropped:
            tables.release(reports, name)
        values = {
            task: {who: {metric: of.value for metric, of in some.items()} for who, some in contenders.items()}
            for task, contenders in made.metrics.items()
        }
        shown = scores_result(values, pictures)
        return dg.MaterializeResult(
            metadata={
                **(shown.metadata or {}),
                "images": made.images,
                **{f"left_out/{reason}": count for reason, count in made.skipped.items()},
            },
            check_results=[dropped_result(dropped, has_release=released is not None)],
        )

    return evaluation


def dropped_result(
    dropped: list[tuple[str, str, str, float, float]], *, has_release: bool
) -> dg.AssetCheckResult:
    """The release gate as Dagster shows it."""
    lines = [f"{task} {metric}: {before:.4f}, now {now:.4f}" for _, task, metric, before, now in dropped]
    nothing = "no score dropped beyond its noise" if has_release else "nothing is released yet"
    return dg.AssetCheckResult(
        passed=not dropped,
        check_name=CHECK,
        severity=dg.AssetCheckSeverity.ERROR,
        description="; ".join(lines) or nothing,
        metadata={"dropped": len(dropped)},
    )
