"""The paper's ablations of one sensor: each variant trained with several seeds, and scored on the one benchmark.

Which variants there are and what each learns from is in graft_pipeline/ablations.py.
"""

from datetime import UTC, datetime
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from upath import UPath

from assets.keys import FOUNDATION_KEY
from assets.launching import Trained, Training, launch
from assets.learning import TRAINING_MODULES, local_model, training_pool
from assets.planet import benchmark_file
from assets.reporting import OWNERS, check_specs, measured, report_table, table_metadata
from graft_pipeline import ablations as rules_of_ablations
from graft_pipeline import previews, schemas, training_sets
from graft_pipeline.ablations import SCORES, Variant
from graft_pipeline.imagery import ImagerySource, Sensor
from graft_pipeline.partitions import ALL_REGIONS
from graft_pipeline.progress import Progress
from graft_pipeline.provenance import code_version, fingerprint
from graft_pipeline.regions import Region
from graft_pipeline.settings import Settings
from resources.foundation import FoundationModel
from resources.planet.benchmark import Benchmark
from resources.storage import Storage

#: Modules whose code decides what a training gives and how it is scored.
LEARNING_MODULES = (*TRAINING_MODULES, "training.zero_shot.scoring")


class AblationsConfig(dg.Config):
    """What a single run may ask of `ablations`."""

    #: Names in graft_pipeline.ablations.VARIANTS; none: all.
    variants: list[str] = Field(default_factory=list)
    #: Trainings of each variant, with the seeds 0, 1 ...
    seeds: int = Field(3, gt=0)
    #: Fields of training.loop.TrainConfig that differ from the recipe's, for all variants: `{"steps": 1000}`.
    train_config: dict[str, Any] = Field(default_factory=dict)


def build_ablations(sensor: Sensor, settings: Settings) -> dg.AssetsDefinition:
    """The asset `ablations` of one sensor.

    Args:
        sensor: the sensor's record.
        settings: of the deployment; they tell where encoders train.

    Returns:
        The asset; its table has a row for each variant and seed.
    """

    @dg.asset(
        key_prefix=sensor.name,
        group_name=sensor.name,
        owners=OWNERS,
        deps=[
            [sensor.name, "training_set"],
            [sensor.name, "benchmark"],
            FOUNDATION_KEY,
            *(
                dg.AssetDep(key, partition_mapping=ALL_REGIONS)
                for key in ("outdoor_photos", [sensor.name, "chips"])
            ),
        ],
        code_version=code_version(rules_of_ablations),
        kinds={"pytorch", "parquet"},
        pool=training_pool(settings),
        metadata=table_metadata(schemas.ABLATIONS, sensor),
        check_specs=check_specs([sensor.name, "ablations"], partitioned=False),
    )
    @measured
    def ablations(
        context: dg.AssetExecutionContext,
        config: AblationsConfig,
        world: dg.ResourceParam[Settings],
        storage: dg.ResourceParam[Storage],
        foundation: dg.ResourceParam[FoundationModel],
        imagery: dg.ResourceParam[ImagerySource],
        progress: dg.ResourceParam[Progress],
    ) -> dg.MaterializeResult:
        """Every variant of the paper's ablations, trained and scored; what was trained before is not trained again."""
        made = Benchmark.load(benchmark_file(storage, sensor))
        setup_id = fingerprint(
            *(world.training_recipe, config.train_config, foundation.model_id),
            # Variants are made from the same regions: scores of before these changed are not beside those of after.
            training_sets.latest(storage.root, sensor).name,
            *(made.chips, made.labels, made.segmentation_chips, made.masks),
            code_version(rules_of_ablations, *LEARNING_MODULES),
        )
        table, changed = storage.read(schemas.ABLATIONS, sensor=sensor.name), False
        for variant in rules_of_ablations.variants_named(config.variants):
            snapshot = prepare(variant, sensor, world, storage, foundation, imagery, progress)
            for seed in range(config.seeds):
                decided = {
                    "setup_id": setup_id,
                    "variant": variant.name,
                    "seed": seed,
                    "snapshot": snapshot.name.removeprefix("snapshot="),
                }
                if decided in table.select(list(decided)).to_pylist():
                    continue
                training = training_of(variant, seed, snapshot, sensor, config, world, storage, foundation)
                report = progress.task(f"{sensor.name} {variant.name}, seed {seed}")
                trained = launch(context, world, training, report)
                table = with_row(table, decided | results(trained, made, training.output, sensor.crop_px))
                changed |= storage.write(schemas.ABLATIONS, table, sensor=sensor.name)
        table = storage.read(schemas.ABLATIONS, sensor=sensor.name)
        table = table.filter(pc.equal(table["setup_id"], setup_id))
        summary = rules_of_ablations.summarise(table)
        text = rules_of_ablations.to_markdown(summary)
        means = {name: {of["variant"]: of[name] for of in summary} for name in list(SCORES)[:3]}
        return report_table(
            schemas.ABLATIONS,
            table,
            changed=changed,
            picture=previews.bars(means, title=f"{sensor.name}: ablations", ylabel="score"),
            setup_id=setup_id,
            scores=dg.MetadataValue.md(text),
            **{f"accuracy/{of['variant']}": round(of["accuracy"], 4) for of in summary},
        )

    return ablations


def prepare(
    variant: Variant,
    sensor: Sensor,
    world: Settings,
    storage: Storage,
    foundation: FoundationModel,
    imagery: ImagerySource,
    progress: Progress,
) -> UPath:
    """Make what a variant learns from, if it is not the sensor's own training set; returns the snapshot's folder."""
    if not variant.is_main_data:
        for place in storage.partitions(schemas.TILES, sensor=sensor.name):
            rules_of_ablations.make_region(
                storage.root,
                Region.parse(place["region"], world.grid_deg),
                sensor,
                variant,
                imagery.get_chip,
                concurrency=imagery.concurrency,
                max_attempts=world.max_attempts,
                photos_per_tile=world.photos_per_tile,
                seed=world.seed,
                validation_fraction=world.validation_fraction,
                today=datetime.now(UTC).date(),
                progress=progress.task(f"{place['region']} {sensor.name} chips of {variant.name}"),
            )
        here = rules_of_ablations.variant_root(storage.root, sensor, variant)
        return training_sets.build_training_set(here, sensor, photos_root=storage.root).folder
    snapshot = training_sets.latest(storage.root, sensor)
    if variant.needs_alt_text:
        rules_of_ablations.write_alt_texts(storage.root, snapshot, foundation.embed_texts)
    return snapshot


def training_of(
    variant: Variant,
    seed: int,
    snapshot: UPath,
    sensor: Sensor,
    config: AblationsConfig,
    world: Settings,
    storage: Storage,
    foundation: FoundationModel,
) -> Training:
    """The training of a variant with one seed."""
    models = storage.models_folder / f"sensor={sensor.name}" / "ablations"
    return Training(
        snapshot=snapshot,
        root=rules_of_ablations.variant_root(storage.root, sensor, variant),
        output=models / variant.name / f"seed={seed}",
        sensor=sensor.name,
        level=variant.level,
        recipe=world.training_recipe,
        foundation=foundation,
        seed=seed,
        fields={**config.train_config, **variant.fields},
    )


def results(trained: Trained, made: Benchmark, output: UPath, crop_px: int) -> dict[str, Any]:
    """Costs and scores of a trained encoder by column of the table."""
    from training.zero_shot.prompts import load_prompts
    from training.zero_shot.scoring import score_images, score_segmentation

    encoder = {"encoder": local_model(output / "encoder", "auto")}
    prompts = load_prompts("planet")
    images = score_images(encoder, made.chips, made.labels, prompts.restricted_to(made.classes), crop_px)
    classes = prompts.restricted_to(made.all_classes)
    segmented = score_segmentation(encoder, made.segmentation_chips, made.masks, classes, crop_px)
    metrics = images.metrics | segmented.metrics
    return {
        "train_tiles": trained.result["train_tiles"],
        "train_pairs": trained.result["train_photos"],
        "best_step": trained.result["best_step"],
        "training_seconds": trained.result["seconds"],
        **{column: metrics[task]["encoder"][metric] for column, (task, metric) in SCORES.items()},
    }


def with_row(table: pa.Table, new: dict[str, Any]) -> pa.Table:
    """The table with a row added, or put in the place of that of the same key."""
    kept = [old for old in table.to_pylist() if any(old[name] != new[name] for name in schemas.ABLATIONS.key)]
    return pa.Table.from_pylist([*kept, new], schema=schemas.ABLATIONS.schema)
