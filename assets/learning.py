"""Training sets, satellite encoders and chip embeddings of a sensor.

The learning itself is in training/ and runs without Dagster; scores are in assets/planet.py.
"""

from typing import Any

import dagster as dg
from pydantic import Field

from assets.keys import FOUNDATION_KEY
from assets.launching import Trained, Training, launch
from assets.reporting import (
    LINEAGE,
    OWNERS,
    SCHEMA,
    TYPICAL,
    check_specs,
    column_lineage,
    fields_schema,
    measured,
    report_table,
    retried,
    shown,
    table_metadata,
)
from graft_pipeline import chips, embeddings, previews, rules, schemas, sheets, training_sets
from graft_pipeline.errors import DataError
from graft_pipeline.imagery import Sensor
from graft_pipeline.lineage import MODELS
from graft_pipeline.partitions import ALL_REGIONS, REGION_PARTITIONS
from graft_pipeline.progress import Progress, Report
from graft_pipeline.provenance import code_version
from graft_pipeline.settings import Settings
from resources.foundation import FoundationModel
from resources.storage import Storage

#: Modules whose code decides what a training gives.
TRAINING_MODULES = tuple(
    f"training.{name}"
    for name in ("augment", "data", "encoders", "loop", "losses", "optimisation", "recipes")
)


class EncoderConfig(dg.Config):
    """What a single run may ask of an encoder."""

    #: Fields of training.loop.TrainConfig that differ from the recipe's: `{"steps": 1000}`.
    train_config: dict[str, Any] = Field(default_factory=dict)


def encoder_folder(storage: Storage, sensor: Sensor, level: str):
    """Where a trained encoder lies: an open_clip folder."""
    return storage.models_folder / f"sensor={sensor.name}" / f"{level}_encoder" / "encoder"


def local_model(folder, device: str = "cpu"):
    """Load an open_clip folder of the storage as training.encoders.Clip; `auto` is for steps of the pool `gpu`."""
    from training.encoders import load_clip
    from training.loop import resolve_device

    if not folder.exists():
        raise DataError(
            f"No model is in {folder} yet: materialise the asset that trains it first, image_encoder or pixel_encoder "
            "of the sensor, or openclip/foundation."
        )
    return load_clip(f"local-dir:{folder}", device=resolve_device(device))


def training_pool(settings: Settings) -> str:
    """The pool of what trains encoders: in a pod it has a GPU of its own, and steps that embed do not wait for it."""
    return "training" if settings.training_launcher == "kubernetes" else "gpu"


def build_learning_assets(sensor: Sensor, settings: Settings) -> list[dg.AssetsDefinition]:
    """The learning assets of one sensor.

    Args:
        sensor: the sensor's record.
        settings: of the deployment; they tell where encoders train.

    Returns:
        `training_set`, `image_encoder`, `pixel_encoder`, `chip_embeddings`.
    """
    options = {"key_prefix": sensor.name, "group_name": sensor.name, "owners": OWNERS}
    pool = training_pool(settings)

    @dg.asset(
        **options,
        deps=[
            dg.AssetDep([sensor.name, "pairs"], partition_mapping=ALL_REGIONS),
            dg.AssetDep("ground_embeddings", partition_mapping=ALL_REGIONS),
        ],
        code_version=code_version(training_sets),
        kinds={"parquet", "numpy"},
        metadata=table_metadata(schemas.TRAINING_PAIRS, sensor),
        check_specs=check_specs([sensor.name, "training_set"], "split_disjointness", partitioned=False),
    )
    @retried
    @measured
    def training_set(storage: dg.ResourceParam[Storage]) -> dg.MaterializeResult:
        """Snapshot of all regions' pairs with their splits and embeddings, named by its content's fingerprint."""
        made = training_sets.build_training_set(storage.root, sensor)
        table = training_sets.read(made.folder)
        tiles = [
            storage.read(schemas.TILES, **v) for v in storage.partitions(schemas.TILES, sensor=sensor.name)
        ]
        picture = previews.density_map(
            table["lon_deg"].to_numpy(),
            table["lat_deg"].to_numpy(),
            title=f"{sensor.name} pairs (paper, figure 4)",
        )
        return report_table(
            schemas.TRAINING_PAIRS,
            table,
            changed=made.is_new,
            picture=picture,
            findings=[rules.split_disjointness(tiles, table)],
            version=made.fingerprint,
            fingerprint=made.fingerprint,
            regions=len(made.regions),
            tiles=made.tiles,
            photos=made.photos,
            guard_pairs=made.guard_pairs,
            unembedded_pairs=made.unembedded_pairs,
            moved_pairs=made.moved_pairs,
            **{f"pairs/{split}": count for split, count in made.pairs_by_split.items()},
        )

    def encoder_asset(level: str, description: str) -> dg.AssetsDefinition:
        @dg.asset(
            **options,
            name=f"{level}_encoder",
            deps=[training_set, FOUNDATION_KEY],
            code_version=code_version(*TRAINING_MODULES),
            metadata={
                SCHEMA: fields_schema({MODELS[f"{level}_encoder"]: "of the model, as safetensors"}),
                LINEAGE: column_lineage(f"{level}_encoder", sensor),
            },
            description=description,
            kinds={"pytorch"},
            pool=pool,
        )
        @measured
        def encoder(
            context: dg.AssetExecutionContext,
            config: EncoderConfig,
            world: dg.ResourceParam[Settings],
            storage: dg.ResourceParam[Storage],
            foundation: dg.ResourceParam[FoundationModel],
            progress: dg.ResourceParam[Progress],
        ) -> dg.MaterializeResult:
            snapshot = training_sets.latest(storage.root, sensor)
            training = Training(
                snapshot=snapshot,
                root=storage.root,
                output=encoder_folder(storage, sensor, level).parent,
                sensor=sensor.name,
                level=level,
                recipe=world.training_recipe,
                foundation=foundation,
                seed=world.seed,
                fields=config.train_config,
            )
            report = progress.task(f"{sensor.name} {level}-level encoder")
            trained = launch(context, world, training, report)
            return training_result(trained, f"{sensor.name} {level}-level", snapshot.name)

        return encoder

    image_encoder = encoder_asset(
        "image", "f_S^I: satellite images in the foundation model's space (paper, Eq. 2)."
    )
    pixel_encoder = encoder_asset(
        "pixel", "f_S^P: satellite patches in the foundation model's space (paper, Eq. 3)."
    )

    @dg.asset(
        **options,
        deps=[image_encoder, dg.AssetDep([sensor.name, "chips"]), dg.AssetDep([sensor.name, "tiles"])],
        partitions_def=REGION_PARTITIONS,
        code_version=code_version(embeddings),
        kinds={"parquet", "pytorch"},
        pool="gpu",
        metadata=table_metadata(schemas.CHIP_EMBEDDINGS, sensor),
        check_specs=check_specs([sensor.name, "chip_embeddings"]),
    )
    @measured
    def chip_embeddings(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        progress: dg.ResourceParam[Progress],
    ) -> dg.MaterializeResult:
        """f_S^I of every chip's central crop, for search and maps."""
        report = progress.task(f"{context.partition_key} {sensor.name} chip embeddings")
        return embed_region(storage, sensor, sensor.name, context.partition_key, report)

    return [training_set, image_encoder, pixel_encoder, chip_embeddings]


def embed_region(
    storage: Storage, sensor: Sensor, kept_as: str, region: str, report: Report
) -> dg.MaterializeResult:
    """Embed one region's chips with a sensor's encoder; `kept_as` is the sensor name that they are kept under."""
    from training.encoders import encode_images

    place = {"sensor": kept_as, "region": region}
    clip = local_model(encoder_folder(storage, sensor, "image"), "auto")

    def embed(contents):
        return encode_images(clip, chips.decode_all(contents), crop_px=sensor.crop_px)

    stored, folder = storage.read(schemas.CHIPS, **place), storage.folder(schemas.CHIPS, **place)
    table = embeddings.embed_chips(
        stored,
        storage.read(schemas.TILES, **place),
        storage.read(schemas.CHIP_EMBEDDINGS, **place),
        folder,
        embed,
        clip.fingerprint(),
        report,
    )
    changed = storage.write(schemas.CHIP_EMBEDDINGS, table, **place)
    return report_table(
        schemas.CHIP_EMBEDDINGS,
        table,
        changed=changed,
        picture=sheets.typical_sheet(table, stored, folder),
        caption=TYPICAL,
        encoder=clip.fingerprint(),
    )


def training_result(trained: Trained, title: str, snapshot: str) -> dg.MaterializeResult:
    """Curves and costs of a training."""
    result = trained.result
    steps = [row["step"] for row in trained.history]
    series = {"training loss": (steps, [row["loss"] for row in trained.history])}
    validated = [row["step"] for row in trained.validations]
    metadata = {
        "training_set": snapshot,
        "model_id": result["model_id"],
        "best_step": result["best_step"],
        "train_tiles": result["train_tiles"],
        "train_pairs": result["train_photos"],
        "training_seconds": round(result["seconds"], 1),
        "loss": series["training loss"][1][-1],
    }
    pictures = {}
    if validated:
        series["validation loss"] = (validated, [row["loss"] for row in trained.validations])
        recall = {
            f"recall@{k}": (validated, [row[f"recall_at_{k}"] for row in trained.validations])
            for k in (1, 10)
        }
        pictures["retrieval"] = previews.curves(
            recall, title=f"{title}: validation retrieval", ylabel="recall"
        )
        metadata["validation_recall_at_10"] = trained.validations[-1]["recall_at_10"]
    pictures["curve"] = previews.curves(series, title=f"{title}: contrastive loss", ylabel="loss")
    return dg.MaterializeResult(
        metadata=metadata | shown(pictures), data_version=dg.DataVersion(result["model_id"])
    )
