"""Assets that exist only on the planet: its foundation model, the labelled benchmark, and the scores on it.

Real benchmarks are read elsewhere; no asset of the training path depends on the benchmark or the scores.
"""

import dagster as dg
import numpy as np

from assets.keys import CAPTIONED_PHOTOS_KEY, FOUNDATION_KEY, PLANET_TRUTH_KEY, external_collection
from assets.learning import encoder_folder, local_model
from assets.reporting import (
    OWNERS,
    SCHEMA,
    check_result,
    check_specs,
    fields_schema,
    measured,
    shown,
)
from graft_pipeline import previews, rules, schemas
from graft_pipeline.imagery import ImagerySource, Sensor
from graft_pipeline.lineage import SOURCES
from graft_pipeline.progress import Progress
from graft_pipeline.provenance import code_version
from graft_pipeline.report import scores_folder, write_scores
from graft_pipeline.settings import Settings
from resources.planet.benchmark import Benchmark, build_benchmark
from resources.planet.captions import captioned_photos
from resources.planet.truth_client import PlanetTruth
from resources.storage import Storage

#: The captions that the planet's CLIP learns from show another planet: no seed of a deployment reaches this far.
OTHER_PLANET = 1_000_003

#: Modules whose code decides what a score is.
SCORING_MODULES = tuple(
    f"training.zero_shot.{name}"
    for name in ("scoring", "evaluate", "classify", "retrieve", "segment", "metrics", "prompts")
)


@dg.asset(
    key=FOUNDATION_KEY,
    group_name="sources",
    owners=OWNERS,
    deps=[CAPTIONED_PHOTOS_KEY],
    code_version=code_version("training.foundation", "training.recipes", "resources.planet.captions"),
    kinds={"pytorch"},
    pool="gpu",
    metadata={SCHEMA: fields_schema(SOURCES["foundation"])},
)
@measured
def planet_foundation(
    world: dg.ResourceParam[Settings],
    storage: dg.ResourceParam[Storage],
    progress: dg.ResourceParam[Progress],
) -> dg.MaterializeResult:
    """The planet's stand-in for OpenAI's CLIP: learned from captioned ground photos of another planet, then frozen."""
    from training.foundation import train_foundation
    from training.recipes import RECIPES

    recipe = RECIPES[world.training_recipe]
    images, captions, kinds = captioned_photos(world.planet.seed + OTHER_PLANET, recipe.captioned_photos)
    report = progress.task("Foundation model")
    result = train_foundation(
        images, captions, storage.models_folder / "foundation", recipe.foundation, progress=report
    )
    sheet = previews.contact_sheet(images[:24], captions[:24], cell_px=110, columns=6)
    steps = list(range(1, len(result.losses) + 1))
    curve = previews.curves(
        {"contrastive loss": (steps, result.losses)}, title="Foundation model", ylabel="loss"
    )
    return dg.MaterializeResult(
        metadata={
            "captioned_photos": len(captions),
            "kinds": len(set(kinds)),
            "loss": result.losses[-1],
            "model_id": result.model_id,
            **shown({"preview": sheet, "curve": curve}, {"preview": "captioned photos of another planet"}),
        },
        data_version=dg.DataVersion(result.model_id),
    )


def benchmark_file(storage: Storage, sensor: Sensor):
    """Where a sensor's benchmark lies."""
    return storage.root / "benchmarks" / f"sensor={sensor.name}" / "benchmark.npz"


def build_planet_assets(sensor: Sensor) -> list[dg.AssetsDefinition]:
    """Benchmark and scores of one sensor.

    Args:
        sensor: the sensor's record.

    Returns:
        `benchmark`, `zero_shot_scores`, `segmentation_scores`.
    """
    options = {"key_prefix": sensor.name, "group_name": sensor.name, "owners": OWNERS}

    @dg.asset(
        **options,
        deps=[PLANET_TRUTH_KEY, external_collection(sensor, "earth_engine")],
        code_version=code_version("resources.planet.benchmark"),
        kinds={"numpy"},
        pool="imagery",
        check_specs=check_specs(
            [sensor.name, "benchmark"], "no_training_ground", partitioned=False, schema=False
        ),
    )
    @measured
    def benchmark(
        world: dg.ResourceParam[Settings],
        storage: dg.ResourceParam[Storage],
        imagery: dg.ResourceParam[ImagerySource],
        progress: dg.ResourceParam[Progress],
    ) -> dg.MaterializeResult:
        """Labelled crops of ground that no training tile touches; for evaluation only."""
        truth = PlanetTruth(world.planet.url)
        made = build_benchmark(
            truth,
            imagery,
            sensor,
            world.benchmark_bounds,
            seed=world.seed,
            progress=progress.task(f"{sensor.name} benchmark"),
        )
        made.save(benchmark_file(storage, sensor))
        tiles = [
            storage.read(schemas.TILES, **v) for v in storage.partitions(schemas.TILES, sensor=sensor.name)
        ]
        order = np.argsort(made.labels, kind="stable")[:: max(1, len(made.labels) // 48)]
        sheet = previews.contact_sheet(
            [made.chips[n] for n in order], [made.classes[made.labels[n]] for n in order], cell_px=90
        )
        counts = np.bincount(made.labels, minlength=len(made.classes))
        return dg.MaterializeResult(
            metadata={
                "crops": len(made.chips),
                "segmentation_crops": len(made.masks),
                **{f"crops/{name}": int(count) for name, count in zip(made.classes, counts, strict=True)},
                "left_out": ", ".join(sorted(set(made.all_classes) - set(made.classes))) or "none",
                **shown({"preview": sheet}, {"preview": "benchmark crops"}),
            },
            check_results=[check_result(rules.no_training_ground(tiles, made.squares))],
        )

    @dg.asset(
        **options,
        deps=[benchmark, [sensor.name, "image_encoder"], FOUNDATION_KEY],
        code_version=code_version(*SCORING_MODULES),
        kinds={"pytorch"},
        pool="gpu",
    )
    @measured
    def zero_shot_scores(storage: dg.ResourceParam[Storage]) -> dg.MaterializeResult:
        """Classification and retrieval of the image-level encoder beside the frozen foundation model and chance."""
        from training.zero_shot.prompts import load_prompts
        from training.zero_shot.scoring import score_images

        made = Benchmark.load(benchmark_file(storage, sensor))
        contenders = {
            "image_encoder": local_model(encoder_folder(storage, sensor, "image"), "auto"),
            "foundation": local_model(storage.models_folder / "foundation", "auto"),
        }
        prompts = load_prompts("planet").restricted_to(made.classes)
        scores = score_images(contenders, made.chips, made.labels, prompts, sensor.crop_px)
        pictures = {
            "accuracy_and_mAP": previews.bars(
                previews.by_metric(scores.metrics),
                title=f"{sensor.name}: zero-shot, image level",
                ylabel="score",
            ),
            **{
                f"confusion_{name}": previews.confusion(
                    of.confusion, made.classes, title=f"{sensor.name}: {name}"
                )
                for name, of in scores.classification.items()
            },
            **{f"top_retrievals_{name}": retrieval_sheet(made, top) for name, top in scores.top.items()},
        }
        write_scores(scores_folder(storage, sensor.name), "zero_shot", scores.metrics, pictures)
        return scores_result(scores.metrics, pictures)

    @dg.asset(
        **options,
        deps=[benchmark, [sensor.name, "pixel_encoder"], FOUNDATION_KEY],
        code_version=code_version(*SCORING_MODULES),
        kinds={"pytorch"},
        pool="gpu",
    )
    @measured
    def segmentation_scores(storage: dg.ResourceParam[Storage]) -> dg.MaterializeResult:
        """Segmentation of the pixel-level encoder beside the frozen foundation model's patches and chance."""
        from training.zero_shot.prompts import load_prompts
        from training.zero_shot.scoring import score_segmentation

        made = Benchmark.load(benchmark_file(storage, sensor))
        contenders = {
            "pixel_encoder": local_model(encoder_folder(storage, sensor, "pixel"), "auto"),
            "foundation": local_model(storage.models_folder / "foundation", "auto"),
        }
        prompts = load_prompts("planet").restricted_to(made.all_classes)
        scores = score_segmentation(contenders, made.segmentation_chips, made.masks, prompts, sensor.crop_px)
        pictures = {
            "segmentation": previews.bars(
                previews.by_metric(scores.metrics),
                title=f"{sensor.name}: zero-shot, pixel level",
                ylabel="score",
            ),
            "segmentation_overlays": overlay_sheet(made, scores.maps),
            **{
                f"segmentation_confusion_{name}": previews.confusion(
                    of.confusion, made.all_classes, title=f"{sensor.name} pixels: {name}"
                )
                for name, of in scores.by_class.items()
                if name != "chance"
            },
        }
        write_scores(scores_folder(storage, sensor.name), "segmentation", scores.metrics, pictures)
        return scores_result(scores.metrics, pictures)

    return [benchmark, zero_shot_scores, segmentation_scores]


def scores_result(
    metrics: dict[str, dict[str, dict[str, float]]], pictures: dict[str, bytes]
) -> dg.MaterializeResult:
    """Metrics as plottable numbers, pictures as Markdown."""
    numbers = {
        f"{metric}/{contender}": round(value, 4)
        for contenders in metrics.values()
        for contender, values in contenders.items()
        for metric, value in values.items()
    }
    return dg.MaterializeResult(metadata={**numbers, **shown(pictures)})


def retrieval_sheet(made: Benchmark, top: np.ndarray) -> bytes:
    """First retrievals of every class, a row each; right ones framed green, wrong ones red."""
    numbers = [(int(n), query) for query in range(len(top)) for n in top[query]]
    return previews.contact_sheet(
        [made.chips[n] for n, _ in numbers],
        [made.classes[query] for _, query in numbers],
        columns=top.shape[1],
        cell_px=72,
        frames=[previews.RIGHT if made.labels[n] == query else previews.WRONG for n, query in numbers],
    )


def overlay_sheet(made: Benchmark, maps: dict[str, np.ndarray], count: int = 10) -> bytes:
    """Crops, truth and each contender's map, a row each."""
    chosen = np.linspace(0, len(made.masks) - 1, min(count, len(made.masks))).astype(int)
    pictures, labels = [], []
    for n in chosen:
        image = made.segmentation_chips[n]
        layers = {"image": image, "truth": previews.overlay(image, made.masks[n], made.palette)}
        layers |= {name: previews.overlay(image, of[n], made.palette) for name, of in maps.items()}
        pictures += list(layers.values())
        labels += list(layers)
    return previews.contact_sheet(pictures, labels, columns=2 + len(maps), cell_px=110)
