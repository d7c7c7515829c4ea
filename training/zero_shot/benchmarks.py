"""The benchmarks of the paper by name: which reader, which prompts, and which of our encoders each one is for.

Reading is in datasets.py and mask_sets.py, scoring in evaluate.py and evaluate_masks.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from upath import UPath

from graft_pipeline.errors import InputError
from training.zero_shot.contenders import open_contender
from training.zero_shot.datasets import READERS, open_image_set
from training.zero_shot.evaluate import Evaluation, evaluate_images
from training.zero_shot.evaluate_masks import MaskEvaluation, PatchSegmenter, Segmenter, evaluate_masks
from training.zero_shot.mask_sets import MASK_READERS
from training.zero_shot.prompts import load_prompts


@dataclass(frozen=True)
class BenchmarkDataset:
    """A dataset that encoders are scored on.

    Attributes:
        sensor: whose encoder it is for.
        level: of the encoder.
        prompts: prompt set that goes with it.
    """

    sensor: str
    level: Literal["image", "pixel"]
    prompts: str


DATASETS = {
    "eurosat": BenchmarkDataset("sentinel2", "image", "eurosat"),
    "bigearthnet": BenchmarkDataset("sentinel2", "image", "bigearthnet"),
    "bigearthnet43": BenchmarkDataset("sentinel2", "image", "bigearthnet43"),
    "sat4": BenchmarkDataset("naip", "image", "sat4"),
    "sat6": BenchmarkDataset("naip", "image", "sat6"),
    "naip_osm": BenchmarkDataset("naip", "image", "naip_osm"),
    "naip_osm_single": BenchmarkDataset("naip", "image", "naip_osm"),
    "satlas_naip": BenchmarkDataset("naip", "pixel", "satlas"),
    "satlas_sentinel2": BenchmarkDataset("sentinel2", "pixel", "satlas"),
}


def evaluate_dataset(
    name: str,
    data: Path,
    contenders: Sequence[str],
    prompts: str | None,
    models_folder: UPath,
    *,
    sam: str | None = None,
    draws: int = 10,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation | MaskEvaluation:
    """Score models on a dataset as the paper does.

    Args:
        name: a key of DATASETS.
        data: where it lies, as published.
        contenders: specs as of `contenders.open_contender`, and for segmentation `NAME=clipseg:FOLDER` too; none:
            the deployment's own encoder.
        prompts: prompt set or JSON file in place of the dataset's own.
        models_folder: where the deployment's encoders lie.
        sam: folder or hub name of a SAM: patch segmenters are scored with and without its refinement.
        draws: one-shot runs.
        seed: of examples and resamples.
        device: where models run.
        progress: told (images done, images).

    Returns:
        The scores.

    Raises:
        InputError: if the dataset is unknown or not there, or there is no encoder.
    """
    if name not in DATASETS:
        raise InputError(f"No dataset {name!r}: use one of {', '.join(DATASETS)}.")
    of = DATASETS[name]
    words = load_prompts(prompts or of.prompts)
    if name in READERS:
        images = open_image_set(name, data)
        specs = contenders or [_own_encoder(of, models_folder)]
        models = [open_contender(spec, device) for spec in specs]
        return evaluate_images(models, images, words, draws=draws, seed=seed, progress=progress)
    masks = MASK_READERS[name](data)
    segmenters: list[Segmenter] = []
    for spec in contenders or [_own_encoder(of, models_folder)]:
        segmenters += _segmenters(spec, sam, device)
    return evaluate_masks(segmenters, masks, words, seed=seed, progress=progress)


def _segmenters(spec: str, sam: str | None, device: str) -> list[Segmenter]:
    """A segmenter of a spec, and its refinement."""
    name, separator, what = spec.partition("=clipseg:")
    if separator:
        from training.zero_shot.prompted import ClipSeg

        return [ClipSeg(name, what, device=device)]
    model = open_contender(spec, device)
    if model.clip is None:
        raise InputError(f"{model.name} knows no words and cannot segment by them: name CLIPs only.")
    plain = PatchSegmenter(model.name, model.clip)
    if sam is None:
        return [plain]
    from training.zero_shot.prompted import SamRefined

    return [plain, SamRefined(PatchSegmenter(model.name, model.clip), sam, device=device)]


def _own_encoder(of: BenchmarkDataset, models_folder: UPath) -> str:
    """Spec of the deployment's own encoder."""
    folder = models_folder / f"sensor={of.sensor}" / f"{of.level}_encoder" / "encoder"
    if not folder.exists():
        raise InputError(
            f"{folder} holds no encoder: materialise {of.sensor}/{of.level}_encoder, or name a contender."
        )
    return f"GRAFT {of.level} encoder (ours)=folder:{folder}"
