"""Segmenters of the transformers library: SAM, which refines our patch scores, and CLIPSeg, the paper's baseline.

Both need the extra `segment`. Our own segmenter, and how masks are scored, is in evaluate_masks.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from graft_pipeline.errors import SettingsError
from training.zero_shot.evaluate_masks import Segmenter
from training.zero_shot.prompts import PromptSet
from training.zero_shot.segment import spread

#: Points whose masks are computed together.
_POINTS_AT_ONCE = 32


class Sam:
    """Draws patch scores to the outlines that SAM finds (paper, section 3.3).

    Of each class that is somewhere the best one, the centres of its highest-scoring patches are point prompts. Of the
    three masks that SAM answers, the one that it trusts most counts; inside, the class scores at least what its point
    scored.

    Args:
        weights: folder or hub name of a SAM of transformers, such as facebook/sam-vit-base.
        points_per_class: prompts per class and image.
        device: where SAM runs.

    Raises:
        SettingsError: if transformers is not installed, or the weights cannot be had.
    """

    def __init__(self, weights: str | Path, *, points_per_class: int = 8, device: str = "cpu") -> None:
        self._points, self._device = points_per_class, device
        self._model, self._processor = _load("SamModel", "SamProcessor", weights, device)

    def refine(
        self,
        image: NDArray[np.uint8],
        coarse: NDArray[np.float32],
        patch_px: tuple[float, float] | None = None,
    ) -> NDArray[np.float32]:
        """Draw scores to the outlines in an image.

        Args:
            image: (H, W, 3) uint8 RGB.
            coarse: (K, rows, columns) float32, scores of the patches that cover it.
            patch_px: height and width of a patch in pixels, the last ones may reach beyond the image; None: they
                tile it.

        Returns:
            (K, H, W) float32.
        """
        height, width = image.shape[:2]
        places, classes, values = best_patches(coarse, self._points)
        patch_px = patch_px or (height / coarse.shape[1], width / coarse.shape[2])
        # Centres of patches, in pixels.
        points = (places[:, ::-1] + 0.5) * np.array(patch_px[::-1])
        refined = spread(coarse, patch_px, (height, width))
        masks = self.masks(image, np.minimum(points, [width - 1, height - 1]))
        for mask, number, value in zip(masks, classes, values, strict=True):
            refined[number][mask] = np.maximum(refined[number][mask], value)
        return refined

    @torch.inference_mode()
    def masks(self, image: NDArray[np.uint8], points: NDArray[np.float64]) -> NDArray[np.bool_]:
        """The mask of each point.

        Args:
            image: (H, W, 3) uint8 RGB.
            points: (P, 2) float64, x and y in pixels; at least one.

        Returns:
            (P, H, W) bool.
        """
        found = []
        embeddings = None
        for start in range(0, len(points), _POINTS_AT_ONCE):
            some = points[start : start + _POINTS_AT_ONCE]
            inputs = self._processor(
                images=Image.fromarray(image),
                input_points=[[[point] for point in some.tolist()]],
                return_tensors="pt",
            )
            if embeddings is None:
                embeddings = self._model.get_image_embeddings(inputs["pixel_values"].to(self._device))
            answer = self._model(
                image_embeddings=embeddings, input_points=inputs["input_points"].float().to(self._device)
            )
            masks = self._processor.image_processor.post_process_masks(
                answer.pred_masks.cpu(), inputs["original_sizes"], inputs["reshaped_input_sizes"]
            )[0]
            trusted = answer.iou_scores[0].argmax(dim=-1).cpu()
            found.append(masks[torch.arange(len(some)), trusted].numpy())
        return np.concatenate(found)


class SamRefined:
    """A segmenter whose scores SAM refines.

    Args:
        base: gives the scores.
        sam: refines them.
    """

    def __init__(self, base: Segmenter, sam: Sam) -> None:
        self.name, self.patch_px = f"{base.name} + SAM", None
        self._base, self._sam = base, sam

    def prepare(self, prompts: PromptSet) -> None:
        """See `Segmenter.prepare`."""
        self._base.prepare(prompts)

    def scores(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Segmenter.scores`; at the image's own resolution."""
        return self._sam.refine(image, self._base.scores(image), self._base.patch_px)


def best_patches(
    scores: NDArray[np.float32], per_class: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The highest-scoring patches of each class, among those where it is the best class.

    Args:
        scores: (K, rows, columns) float32.
        per_class: how many at most.

    Returns:
        (P, 2) int64 rows and columns, (P,) int64 classes, (P,) float32 scores; by class, best first.
    """
    best = scores.argmax(axis=0)
    places, classes, values = [], [], []
    for number, of in enumerate(scores):
        own = np.argwhere(best == number)
        order = np.argsort(-of[own[:, 0], own[:, 1]], kind="stable")[:per_class]
        places.append(own[order])
        classes.append(np.full(len(order), number, dtype=np.int64))
        values.append(of[own[order, 0], own[order, 1]])
    return np.concatenate(places), np.concatenate(classes), np.concatenate(values)


class ClipSeg:
    """CLIPSeg (Lueddecke and Ecker, 2022): one logit per pixel and word; a class scores as its best word.

    Args:
        name: as the report shows it.
        weights: folder or hub name, such as CIDAS/clipseg-rd64-refined.
        device: where it runs.

    Raises:
        SettingsError: if transformers is not installed, or the weights cannot be had.
    """

    def __init__(self, name: str, weights: str | Path, *, device: str = "cpu") -> None:
        # An image is squeezed to the model's input as a whole.
        self.name, self.patch_px, self._device = name, None, device
        self._model, self._processor = _load(
            "CLIPSegForImageSegmentation", "CLIPSegProcessor", weights, device
        )
        self._words: list[str] = []
        self._class_of_word = np.zeros(0, np.int64)

    def prepare(self, prompts: PromptSet) -> None:
        """See `Segmenter.prepare`; words go in as they are, which is how CLIPSeg was trained."""
        pairs = [(word, number) for number, words in enumerate(prompts.classes.values()) for word in words]
        self._words = [word for word, _ in pairs]
        self._class_of_word = np.array([number for _, number in pairs])

    @torch.inference_mode()
    def scores(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Segmenter.scores`; at the model's own resolution."""
        inputs = self._processor(
            text=self._words,
            images=[Image.fromarray(image)] * len(self._words),
            padding=True,
            # As CLIP does with words that are too many.
            truncation=True,
            return_tensors="pt",
        )
        logits = self._model(**inputs.to(self._device)).logits
        maps = logits.reshape(len(self._words), *logits.shape[-2:]).cpu().numpy()
        return np.stack(
            [
                maps[self._class_of_word == number].max(axis=0)
                for number in range(self._class_of_word.max() + 1)
            ]
        ).astype(np.float32)


def _load(model: str, processor: str, weights: str | Path, device: str) -> tuple[Any, Any]:
    try:
        import transformers
    except ImportError as error:
        raise SettingsError(
            f"{model} needs the transformers library: pip install 'graft-pipeline[segment]'."
        ) from error
    try:
        loaded = getattr(transformers, model).from_pretrained(str(weights))
        prepared = getattr(transformers, processor).from_pretrained(str(weights))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise SettingsError(
            f"{weights} holds no {model} that can be loaded ({error}): give a folder with its files, or a name on the "
            "hub if this machine is online."
        ) from error
    return loaded.eval().to(device), prepared
