"""The paper's protocol on one dataset by name: its reader, its prompts, its contenders.

The names are in catalogue.py, readers in datasets.py, mask_sets.py and answering/rsvqa.py, scores in evaluate.py,
evaluate_masks.py and answering/scoring.py.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from upath import UPath

from graft_pipeline.errors import InputError
from training.zero_shot.answering.rsvqa import open_question_set
from training.zero_shot.answering.scoring import AnswerEvaluation, ProgramAnswerer, evaluate_answers
from training.zero_shot.answering.writers import Writer
from training.zero_shot.catalogue import DATASETS
from training.zero_shot.contenders import open_contender
from training.zero_shot.datasets import READERS, open_image_set
from training.zero_shot.evaluate import Evaluation, evaluate_images
from training.zero_shot.evaluate_masks import MaskEvaluation, PatchSegmenter, Segmenter, evaluate_masks
from training.zero_shot.mask_sets import MASK_READERS
from training.zero_shot.prompts import load_prompts

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
        prompts: prompt set or JSON file in place of the dataset's own.
        models_folder: where the deployment's encoders lie.
        sam: folder or hub name of a SAM: patch segmenters are scored with and without its refinement.
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
    if of.prompts is None:
        asked = open_question_set(name, data).sampled(questions, seed)
        specs = contenders or [own_encoder(name, models_folder)]
        answerers = [_answerer(spec, prompts, writer, device) for spec in specs]
        return evaluate_answers(answerers, asked, seed=seed, progress=progress)
    words = load_prompts(prompts or of.prompts)
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


def _answerer(spec: str, prompts: str | None, writer: Writer | None, device: str) -> ProgramAnswerer:
    """A model of a spec as the eyes of programs."""
    from training.zero_shot.answering.detection import PatchDetector
    from training.zero_shot.answering.interpreter import Interpreter
    from training.zero_shot.answering.writers import with_grammar

    model = open_contender(spec, device)
    if model.clip is None:
        raise InputError(f"{model.name} knows no words and cannot look for them: name CLIPs only.")
    return ProgramAnswerer(model.name, writer or with_grammar(), Interpreter(PatchDetector(model.clip)))


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
    folder = foundation.architecture.removeprefix("local-dir:")
    what = (
        f"folder:{folder}"
        if folder != foundation.architecture
        else f"open_clip:{foundation.architecture}:{foundation.pretrained or ''}"
    )
    return f"foundation (CLIP)={what}"
