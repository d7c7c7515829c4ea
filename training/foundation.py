"""Trains the planet's small CLIP on captioned photos: the stand-in for a pretrained foundation model.

Where photos and captions come from is the caller's business; satellite encoders are trained in loop.py.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F  # noqa: N812 -- PyTorch's own idiom
from numpy.typing import NDArray
from open_clip.transformer import PatchDropout
from PIL import Image
from torch import Tensor
from upath import UPath

from graft_pipeline.errors import InputError
from training.encoders import Clip, to_input
from training.export import save_encoder
from training.optimisation import check_finite, make_optimizer, one_cycle

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FoundationConfig:
    """Size and schedule of the small CLIP.

    Attributes:
        image_px: side of the images.
        patch_px: side of the vision tower's patches.
        width: width of both towers and of the shared space.
        head_width: width of an attention head.
        vision_layers: blocks of the vision tower.
        text_layers: blocks of the text tower.
        context: tokens of a caption, start and end included.
        steps: optimizer steps.
        batch_size: captioned images per step.
        learning_rate: peak of the schedule.
        warmup_steps: steps of linear warm-up before the cosine.
        weight_decay: of AdamW, on matrices.
        grad_clip: largest gradient norm.
        patch_dropout: share of an image's patches that a step leaves out (Li et al., 2023, FLIP): a third less
            time at the same accuracy. The saved model leaves none out.
        seed: seed of weights, order, flips and dropped patches.
    """

    image_px: int = 64
    patch_px: int = 8
    width: int = 96
    head_width: int = 32
    vision_layers: int = 3
    text_layers: int = 2
    context: int = 24
    steps: int = 200
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    patch_dropout: float = 0.5
    seed: int = 0

    def model_config(self) -> dict[str, Any]:
        """open_clip's `model_cfg` of this size."""
        return {
            "embed_dim": self.width,
            "vision_cfg": {
                "image_size": self.image_px,
                "patch_size": self.patch_px,
                "width": self.width,
                "head_width": self.head_width,
                "layers": self.vision_layers,
            },
            "text_cfg": {
                "context_length": self.context,
                "vocab_size": 49408,
                "width": self.width,
                "heads": self.width // self.head_width,
                "layers": self.text_layers,
            },
        }


@dataclass(frozen=True)
class FoundationResult:
    """What the training of the small CLIP gave.

    Attributes:
        folder: the open_clip folder; `local-dir:{folder}` loads it.
        losses: loss of each step.
        model_id: fingerprint of the model.
    """

    folder: UPath
    losses: tuple[float, ...]
    model_id: str


def train_foundation(
    images: Sequence[NDArray[np.uint8]],
    captions: Sequence[str],
    folder: UPath,
    config: FoundationConfig | None = None,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FoundationResult:
    """Train a small CLIP from scratch (Radford et al., 2021: symmetric loss, learned temperature).

    Args:
        images: RGB uint8 images (H, W, 3) of any size; their central squares are used.
        captions: one caption each.
        folder: open_clip folder to write.
        config: size and schedule; default: the planet's.
        threads: CPU threads of PyTorch; None: as they are set.
        progress: told (steps done, steps).

    Returns:
        Folder, losses and fingerprint.

    Raises:
        InputError: if there are fewer captioned images than a batch, or their numbers differ.
        TrainingError: if the loss is no finite number any more.
    """
    config = config or FoundationConfig()
    if len(images) != len(captions) or len(images) < config.batch_size:
        raise InputError(
            f"{len(images)} images and {len(captions)} captions: give one caption per image and at least "
            f"{config.batch_size} of them."
        )
    if threads:
        torch.set_num_threads(threads)
    clip = new_clip(config)
    model = clip.model.train()
    if config.patch_dropout:
        model.visual.patch_dropout = PatchDropout(config.patch_dropout)
    pixels = torch.from_numpy(square_images(images, config.image_px)).permute(0, 3, 1, 2)
    unique, caption_of_image = np.unique(np.asarray(captions, dtype=object).astype(str), return_inverse=True)
    tokens = clip.tokenize(unique.tolist())
    optimizer = make_optimizer(model.parameters(), config.learning_rate, config.weight_decay, (0.9, 0.98))

    losses: list[float] = []
    per_epoch = len(images) // config.batch_size
    for step in range(config.steps):
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([config.seed, 0, epoch]).permutation(len(images))
        chosen = order[place * config.batch_size : (place + 1) * config.batch_size]
        batch = pixels[chosen].float()
        is_flipped = np.random.default_rng([config.seed, 1, step]).random(len(chosen)) < 0.5
        batch[is_flipped] = batch[is_flipped].flip(-1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng([config.seed, 2, step]).integers(2**31)))
            image = model.encode_image(to_input(clip, batch), normalize=True)
        text = _encode_captions(model, tokens, caption_of_image[chosen])
        loss = clip_loss(image, text, model.logit_scale)
        check_finite(loss, step)
        one_cycle(optimizer, step, config.steps, config.warmup_steps, config.learning_rate)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        with torch.no_grad():
            # CLIP's own bound on the learned temperature.
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
        if progress:
            progress(step + 1, config.steps)
    model.eval()
    model.visual.patch_dropout = torch.nn.Identity()
    logger.info("foundation model: loss %.3f after %d steps", losses[-1], config.steps)
    return FoundationResult(save_encoder(folder, clip), tuple(losses), clip.fingerprint())


def new_clip(config: FoundationConfig) -> Clip:
    """A small CLIP with random weights.

    Args:
        config: its size and seed.

    Returns:
        The model; PyTorch's global random state is as before.
    """
    model_config = config.model_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = open_clip.CLIP(**model_config)
    preprocess = {
        "size": config.image_px,
        "mean": list(open_clip.OPENAI_DATASET_MEAN),
        "std": list(open_clip.OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    tokenize = open_clip.SimpleTokenizer(context_length=config.context)
    return Clip(model.eval(), tokenize, model_config, preprocess, "small-clip")


def square_images(images: Sequence[NDArray[np.uint8]], side_px: int) -> NDArray[np.uint8]:
    """Central squares of images at one size, as CLIP's preprocessing cuts them.

    Args:
        images: RGB uint8 images (H, W, 3) of any size.
        side_px: side of the squares.

    Returns:
        (N, side_px, side_px, 3) uint8.
    """
    out = np.empty((len(images), side_px, side_px, 3), dtype=np.uint8)
    for square, image in zip(out, images, strict=True):
        height, width = image.shape[:2]
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        crop = image[top : top + side, left : left + side]
        if side != side_px:
            crop = Image.fromarray(crop).resize((side_px, side_px), Image.Resampling.BICUBIC)
        square[:] = crop
    return out


def clip_loss(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric contrastive loss.

    Args:
        images: (B, D) float, L2-normalised.
        texts: (B, D) float, L2-normalised, row i belongs to image i.
        logit_scale: logarithm of the inverse temperature.

    Returns:
        Scalar loss.
    """
    logits = logit_scale.exp() * images @ texts.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _encode_captions(model: torch.nn.Module, tokens: Tensor, chosen: NDArray[np.int64]) -> Tensor:
    """Embeddings of the batch's captions; a caption that several images share is encoded once."""
    unique, row = np.unique(chosen, return_inverse=True)
    return model.encode_text(tokens[torch.from_numpy(unique)], normalize=True)[torch.from_numpy(row)]
