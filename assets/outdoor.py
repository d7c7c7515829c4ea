"""Assets that exist only on the planet: its scene classifier, and how both forms of one agree with the truth.

The form that a deployment uses is chosen by its settings; no asset of the training path depends on the scores.
"""

import dagster as dg
import numpy as np
import pyarrow as pa

from assets.keys import CAPTIONED_PHOTOS_KEY, FOUNDATION_KEY, PLANET_TRUTH_KEY
from assets.planet import OTHER_PLANET
from assets.reporting import OWNERS, measured, shown
from graft_pipeline import embeddings, previews, schemas, sheets
from graft_pipeline.errors import DataError
from graft_pipeline.outdoor_scores import THRESHOLDS, Accuracy, Agreement, accuracy, agreement, errors_by_kind
from graft_pipeline.partitions import ALL_REGIONS
from graft_pipeline.progress import Progress
from graft_pipeline.provenance import code_version
from graft_pipeline.settings import Settings
from resources.foundation import FoundationModel
from resources.planet.captions import captioned_photos
from resources.planet.ground import is_outdoor
from resources.planet.truth_client import PlanetTruth
from resources.scene_classifier import SceneClassifier, planet_checkpoint
from resources.storage import Storage

SCENE_CLASSIFIER_KEY = dg.AssetKey(["torchvision", "scene_classifier"])


@dg.asset(
    key=SCENE_CLASSIFIER_KEY,
    group_name="sources",
    owners=OWNERS,
    deps=[CAPTIONED_PHOTOS_KEY],
    code_version=code_version("training.scenes", "training.recipes", "resources.planet.captions"),
    kinds={"pytorch"},
    pool="gpu",
)
@measured
def planet_scene_classifier(
    world: dg.ResourceParam[Settings],
    storage: dg.ResourceParam[Storage],
    progress: dg.ResourceParam[Progress],
) -> dg.MaterializeResult:
    """The planet's stand-in for a ResNet-18 of SUN397: learned from labelled ground photos of another planet."""
    from training.recipes import RECIPES
    from training.scenes import LabelledPhotos, train_scenes

    recipe = RECIPES[world.training_recipe]
    photos, _, kinds = captioned_photos(world.planet.seed + OTHER_PLANET, recipe.scene_photos)
    labels = np.array([is_outdoor(kind) for kind in kinds], np.int64)
    held_out = len(photos) // 5
    parts = [LabelledPhotos(list(photos[p]), labels[p]) for p in (slice(held_out, None), slice(held_out))]
    result = train_scenes(
        *parts,
        planet_checkpoint(storage.models_folder),
        recipe.scenes,
        facts={"data": "captioned photos of another planet"},
        progress=progress.task("Scene classifier"),
    )
    frames = [previews.RIGHT if label else previews.WRONG for label in labels[:32]]
    sheet = previews.contact_sheet(photos[:32], kinds[:32], cell_px=84, frames=frames)
    epochs = [row["epoch"] for row in result.history]
    series = {
        name: (epochs, [row[name] for row in result.history]) for name in ("accuracy", "balanced_accuracy")
    }
    curve = previews.curves(series, title="Scene classifier: held-out photos", ylabel="share", xlabel="epoch")
    return dg.MaterializeResult(
        metadata={
            "labelled_photos": len(photos),
            "held_out_photos": held_out,
            "accuracy": result.scores.accuracy,
            "balanced_accuracy": result.scores.per_class_accuracy,
            **shown(
                {"preview": sheet, "curve": curve},
                {"preview": "labelled photos: outdoors green, indoors red"},
            ),
        },
        data_version=dg.DataVersion(SceneClassifier.checkpoint(result.path).classifier_id),
    )


def scored_by_planet_scenes(outdoor_photos: dg.AssetsDefinition) -> dg.AssetsDefinition:
    """The asset with the planet's scene classifier in its lineage."""
    return outdoor_photos.map_asset_specs(lambda spec: spec.merge_attributes(deps=[SCENE_CLASSIFIER_KEY]))


@dg.asset(
    group_name="ground",
    owners=OWNERS,
    deps=[
        dg.AssetDep("ground_embeddings", partition_mapping=ALL_REGIONS),
        dg.AssetDep("ground_images", partition_mapping=ALL_REGIONS),
        SCENE_CLASSIFIER_KEY,
        FOUNDATION_KEY,
        PLANET_TRUTH_KEY,
    ],
    code_version=code_version("graft_pipeline.outdoor_scores", "resources.scene_classifier"),
    kinds={"pytorch"},
    pool="gpu",
)
@measured
def outdoor_scores(
    world: dg.ResourceParam[Settings],
    storage: dg.ResourceParam[Storage],
    foundation: dg.ResourceParam[FoundationModel],
    progress: dg.ResourceParam[Progress],
) -> dg.MaterializeResult:
    """Both forms of the scene classifier against the truth and each other, all regions; for evaluation only."""
    forms = {
        "zero_shot": SceneClassifier.zero_shot(foundation),
        "checkpoint": SceneClassifier.checkpoint(planet_checkpoint(storage.models_folder)),
    }
    tables = {
        name: score_regions(storage, classifier, world.outdoor_threshold, progress)
        for name, classifier in forms.items()
    }
    ids = tables["zero_shot"]["photo_id"].to_pylist()
    if not ids:
        raise DataError("No region has embedded photos: materialise ground_embeddings of a region first.")
    kinds, truth = PlanetTruth(world.planet.url).photos(ids)
    scores = {name: table["outdoor_score"].to_numpy() for name, table in tables.items()}
    found = {name: accuracy(truth, values, world.outdoor_threshold) for name, values in scores.items()}
    both = agreement(truth, *scores.values(), world.outdoor_threshold)
    wrong = {n: errors_by_kind(kinds, truth, values, world.outdoor_threshold) for n, values in scores.items()}
    picture = disagreement_sheet(storage, tables, both, truth)
    return outdoor_result(found, both, wrong, picture, truth, world.outdoor_threshold)


def score_regions(
    storage: Storage, classifier: SceneClassifier, threshold: float, progress: Progress
) -> pa.Table:
    """OUTDOOR_PHOTOS rows of all regions by one classifier, with their region; nothing is written."""
    parts = [schemas.OUTDOOR_PHOTOS.empty().append_column("region", pa.array([], pa.string()))]
    for place in storage.partitions(schemas.GROUND_EMBEDDINGS):
        scored = embeddings.score_outdoor(
            storage.read(schemas.GROUND_EMBEDDINGS, **place),
            storage.read(schemas.GROUND_IMAGES, **place),
            schemas.OUTDOOR_PHOTOS.empty(),
            storage.folder(schemas.GROUND_IMAGES, **place),
            classifier,
            threshold,
            progress.task(f"{place['region']} {type(classifier).__name__}"),
        )
        parts.append(
            scored.append_column("region", pa.array([place["region"]] * scored.num_rows, pa.string()))
        )
    return pa.concat_tables(parts)


def disagreement_sheet(
    storage: Storage, tables: dict[str, pa.Table], both: Agreement, truth: np.ndarray
) -> bytes:
    """Photos that the forms decide differently, widest gap first, labelled with both scores."""
    chosen = both.disagreeing[:32]
    rows = tables["zero_shot"].take(pa.array(chosen))
    pictures = sheets.photos_by_id(
        rows["photo_id"].to_pylist(),
        rows["region"].to_pylist(),
        lambda region: (
            storage.read(schemas.GROUND_IMAGES, region=region),
            storage.folder(schemas.GROUND_IMAGES, region=region),
        ),
    )
    first, second = (table["outdoor_score"].to_numpy()[chosen] for table in tables.values())
    labels = [f"{a:.2f} {b:.2f}" for a, b in zip(first, second, strict=True)]
    frames = [previews.RIGHT if truth[n] else previews.WRONG for n in chosen]
    return previews.contact_sheet(pictures, labels, cell_px=84, frames=frames)


def outdoor_result(
    found: dict[str, Accuracy],
    both: Agreement,
    wrong: dict[str, dict[str, tuple[int, int]]],
    disagreements: bytes,
    truth: np.ndarray,
    threshold: float,
) -> dg.MaterializeResult:
    """Numbers, confusion matrices, curve and pictures of `outdoor_scores`."""
    metadata = {
        "photos": len(truth),
        "outdoor_photos": int(truth.sum()),
        "threshold": threshold,
        "agreement": both.share,
        "kappa": both.kappa,
        "disagreements": len(both.disagreeing),
        "disagreements/checkpoint_is_right": both.second_is_right,
    }
    series, pictures = {}, {"preview": disagreements}
    for name, of in found.items():
        numbers = {
            f: getattr(of, f) for f in ("accuracy", "indoor_recall", "outdoor_recall", "best_threshold")
        }
        metadata |= {f"{field}/{name}": value for field, value in numbers.items()}
        metadata[f"wrong_by_kind/{name}"] = ", ".join(f"{k} {n} of {m}" for k, (n, m) in wrong[name].items())
        pictures[f"confusion/{name}"] = previews.confusion(
            of.confusion, ["indoor", "outdoor"], title=f"{name} at {threshold:g}"
        )
        series[f"{name}: accuracy"] = (THRESHOLDS.tolist(), of.curve.tolist())
        series[f"{name}: photos kept"] = (THRESHOLDS.tolist(), of.kept_curve.tolist())
    pictures["threshold_curve"] = previews.curves(
        series, title="Whatever the threshold", ylabel="share", xlabel="threshold"
    )
    caption = "zero-shot score, checkpoint score; frame: outdoors green, indoors red"
    metadata |= shown(pictures, {"preview": caption})
    # NaN is no number that Dagster keeps.
    return dg.MaterializeResult(
        metadata={k: v for k, v in metadata.items() if not (isinstance(v, float) and np.isnan(v))}
    )
