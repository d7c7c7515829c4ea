"""The paper's protocol on one dataset by name: its reader, its prompts, its contenders.

The names are in catalogue.py, readers in datasets.py, mask_sets.py and answering/rsvqa.py, scores in evaluate.py,
evaluate_masks.py and answering/scoring.py.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from upath import UPath

from graft_pipeline.errors import InputError
from graft_pipeline.imagery import NAIP, SENTINEL2, Sensor
from training.encoders import Clip
from training.zero_shot.answering.detection import Masks, PixelDetector
from training.zero_shot.answering.interpreter import Interpreter
from training.zero_shot.answering.rsvqa import LAYOUTS, open_question_set
from training.zero_shot.answering.scoring import AnswerEvaluation, ProgramAnswerer, evaluate_answers
from training.zero_shot.answering.writers import Writer, with_grammar
from training.zero_shot.catalogue import DATASETS
from training.zero_shot.contenders import open_contender
from training.zero_shot.datasets import READERS, open_image_set
from training.zero_shot.evaluate import Evaluation, evaluate_images
from training.zero_shot.evaluate_masks import MaskEvaluation, PatchSegmenter, Segmenter, evaluate_masks
from training.zero_shot.mask_sets import MASK_READERS
from training.zero_shot.prompts import PromptSet, load_prompts

#: Name of the deployment's own encoder among contenders.
OURS = "GRAFT (ours)"
#: Questions that the paper draws of RSVQA-HR.
QUESTIONS = 500


class Foundation(Protocol):
    """What names a foundation model."""

    architecture: str
    pretrained: str | None


def evaluate_dataset(
    name: str,
    data: Path,
    contenders: Sequence[str],
    prompts: str | None,
    models_folder: UPath,
    *,
    sam: str | None = None,
    draws: int = 10,
    questions: int = QUESTIONS,
    writer: Writer | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation | MaskEvaluation | AnswerEvaluation:
    """Score models on a dataset as the paper does.

    Args:
        name: a key of DATASETS.
        data: where it lies, as published.
        contenders: specs as of `contenders.open_contender`, and for segmentation `NAME=clipseg:FOLDER` too; none:
            the deployment's own encoder.
        prompts: prompt set or JSON file in place of the dataset's own; of questions, the vocabulary of what images
            show besides what is asked about.
        models_folder: where the deployment's encoders lie.
        sam: folder or hub name of a SAM: segmentation and answers are scored with and without its refinement.
        draws: one-shot runs.
        questions: how many questions are drawn of a set of questions; 0 takes all.
        writer: of programs for questions; None: the grammar of RSVQA's questions.
        seed: of examples, questions and resamples.
        device: where models run.
        progress: told (images or questions done, of so many).

    Returns:
        The scores.

    Raises:
        InputError: if the dataset is unknown or not there, or there is no encoder.
    """
    if name not in DATASETS:
        raise InputError(f"No dataset {name!r}: use one of {', '.join(DATASETS)}.")
    of = DATASETS[name]
    words = load_prompts(prompts or of.prompts)
    if name in LAYOUTS:
        asked = open_question_set(name, data).sampled(questions, seed)
        sensor = {"naip": NAIP, "sentinel2": SENTINEL2}[of.sensor]
        answerers: list[ProgramAnswerer] = []
        for spec in contenders or [own_encoder(name, models_folder)]:
            answerers += _answerers(spec, words, sensor, writer or with_grammar(), sam, device)
        return evaluate_answers(answerers, asked, seed=seed, progress=progress)
    if name in READERS:
        images = open_image_set(name, data)
        specs = contenders or [own_encoder(name, models_folder)]
        models = [open_contender(spec, device) for spec in specs]
        return evaluate_images(models, images, words, draws=draws, seed=seed, progress=progress)
    masks = MASK_READERS[name](data)
    segmenters: list[Segmenter] = []
    for spec in contenders or [own_encoder(name, models_folder)]:
        segmenters += _segmenters(spec, sam, device)
    return evaluate_masks(segmenters, masks, words, seed=seed, progress=progress)


def answerer_of(
    name: str,
    clip: Clip,
    vocabulary: PromptSet,
    sensor: Sensor,
    writer: Writer | None = None,
    masks: Masks | None = None,
) -> ProgramAnswerer:
    """A model as the eyes of programs.

    Args:
        name: as the report shows it.
        clip: the model.
        vocabulary: what images show besides what is asked about.
        sensor: whose images it was trained on.
        writer: of programs; None: the grammar.
        masks: draws objects to their outlines, such as `prompted.Sam.masks`.

    Returns:
        What answers questions.
    """
    detector = PixelDetector(clip, vocabulary, sensor.gsd_m, masks=masks)
    return ProgramAnswerer(name, writer or with_grammar(), Interpreter(detector))


def _answerers(
    spec: str, vocabulary: PromptSet, sensor: Sensor, writer: Writer, sam: str | None, device: str
) -> list[ProgramAnswerer]:
    """An answerer of a spec, and the same with SAM."""
    model = open_contender(spec, device)
    if model.clip is None:
        raise InputError(f"{model.name} knows no words and cannot look for them: name CLIPs only.")
    plain = answerer_of(model.name, model.clip, vocabulary, sensor, writer)
    if sam is None:
        return [plain]
    from training.zero_shot.prompted import Sam

    masks = Sam(sam, device=device).masks
    return [plain, answerer_of(f"{model.name} + SAM", model.clip, vocabulary, sensor, writer, masks)]


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
    from training.zero_shot.prompted import Sam, SamRefined

    return [plain, SamRefined(PatchSegmenter(model.name, model.clip), Sam(sam, device=device))]


def own_encoder(name: str, models_folder: UPath) -> str:
    """The deployment's encoder that a dataset is for.

    Args:
        name: a key of DATASETS.
        models_folder: where encoders lie.

    Returns:
        Its spec.

    Raises:
        InputError: if it was not trained.
    """
    of = DATASETS[name]
    folder = models_folder / f"sensor={of.sensor}" / f"{of.level}_encoder" / "encoder"
    if not folder.exists():
        raise InputError(
            f"{folder} holds no encoder: materialise {of.sensor}/{of.level}_encoder, or name a contender."
        )
    return f"{OURS}=folder:{folder}"


def foundation_spec(foundation: Foundation) -> str:
    """The frozen foundation model as a contender.

    Args:
        foundation: the deployment's, such as resources.foundation.FoundationModel.

    Returns:
        Its spec.
    """
    architecture = foundation.architecture
    if architecture.startswith("local-dir:"):
        what = f"folder:{architecture.removeprefix('local-dir:')}"
    elif architecture.startswith("hf-hub:"):
        what = f"open_clip:{architecture}"
    else:
        what = f"open_clip:{architecture}:{foundation.pretrained or ''}"
    return f"foundation (CLIP)={what}"
