"""Encoders: a CLIP of open_clip, and what its image tower says of satellite chips, per image and per patch.

How the tower is trained is in loop.py, how it is written in export.py; ground photos are embedded by
resources/foundation.py.
"""

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F  # noqa: N812 -- PyTorch's own idiom
from numpy.typing import NDArray
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.func import functional_call
from upath import UPath

from graft_pipeline.errors import InputError, SettingsError
from graft_pipeline.manifests import is_local
from graft_pipeline.provenance import fingerprint

logger = logging.getLogger(__name__)

#: Side of a tile in its sensor's own pixels (paper, section 3.2); the model's input shows this square.
CROP_PX = 224


@dataclass(frozen=True, eq=False)
class Clip:
    """A contrastive image-text model and what belongs to it.

    Attributes:
        model: open_clip model with `visual`, `encode_image` and `encode_text`; in eval mode.
        tokenize: texts to (N, context) int64 tokens.
        model_config: open_clip's `model_cfg`.
        preprocess_config: open_clip's `preprocess_cfg` (size, mean, std, interpolation, resize_mode).
        name: architecture and pretrained tag as given.
    """

    model: nn.Module
    tokenize: Any
    model_config: dict[str, Any]
    preprocess_config: dict[str, Any]
    name: str

    @property
    def image_px(self) -> int:
        """Side of the image tower's input in pixels."""
        size = self.preprocess_config["size"]
        return int(size if isinstance(size, int) else size[0])

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.model.parameters()).device

    @property
    def embedding_width(self) -> int:
        """Number of dimensions of the shared space."""
        return int(self.model_config["embed_dim"])

    def fingerprint(self) -> str:
        """Identity of the model by content: weights, architecture and preprocessing.

        Returns:
            16 hexadecimal characters; equal for equal weights, wherever they were loaded from.
        """
        weights = {
            name: (str(tensor.dtype), tuple(tensor.shape), _bytes_of(tensor))
            for name, tensor in self.model.state_dict().items()
        }
        preprocess = {
            key: self.preprocess_config[key] for key in ("mean", "std", "interpolation", "resize_mode")
        }
        return fingerprint(json.dumps([self.model_config, preprocess], sort_keys=True), weights)


def load_clip(architecture: str, pretrained: str | None = None, device: str | torch.device = "cpu") -> Clip:
    """Load a CLIP with its weights.

    Args:
        architecture: open_clip architecture, `local-dir:` and a folder (a path, or any URL that fsspec
            opens), or `hf-hub:owner/name`.
        pretrained: pretrained tag or checkpoint file; must be None for `local-dir:` and `hf-hub:`. A file does not
            say which GELU its weights were trained with: those of OpenAI need an architecture like
            `ViT-B-16-quickgelu`.
        device: where to put it.

    Returns:
        The model in eval mode.

    Raises:
        SettingsError: if the architecture is unknown or its weights cannot be had.
    """
    has_scheme = architecture.startswith(("local-dir:", "hf-hub:"))
    if not has_scheme and not pretrained:
        raise SettingsError(f"{architecture} needs weights: name a pretrained tag or a checkpoint file.")
    # open_clip only warns when a tag's weights were trained with QuickGELU and its architecture has plain
    # GELU (ViT-B-16 with `openai`), and is then quietly worse.
    tag = {} if has_scheme else get_pretrained_cfg(architecture.replace("/", "-"), pretrained)
    quick_gelu = bool(tag.get("quick_gelu", False))
    twin = f"{architecture.replace('/', '-')}-quickgelu"
    if not has_scheme and Path(pretrained or "").is_file() and twin in open_clip.list_models():
        logger.warning(
            "%s from a file has plain GELU: name %s if its weights were trained with QuickGELU, as OpenAI's were",
            architecture,
            twin,
        )
    try:
        with _local_folder(architecture) as local:
            model_config = open_clip.get_model_config(local if has_scheme else local.replace("/", "-"))
            model = open_clip.create_model(
                local,
                pretrained=None if has_scheme else pretrained,
                force_quick_gelu=quick_gelu,
                require_pretrained=True,
                device=device,
            )
            tokenize = open_clip.get_tokenizer(local)
    except (RuntimeError, ValueError, OSError, UnpicklingError, SafetensorError) as error:
        raise SettingsError(
            f"Cannot load {architecture} ({pretrained or 'own weights'}): {error}. "
            "Check the name, or give a local-dir: folder or a checkpoint file if this machine is offline; with a file "
            "of OpenAI's weights name ViT-B-16-quickgelu, not ViT-B-16."
        ) from error
    if quick_gelu:
        model_config["quick_gelu"] = True
    return Clip(
        model.eval(),
        tokenize,
        model_config,
        dict(model.visual.preprocess_cfg),
        architecture_name(architecture, pretrained),
    )


@contextlib.contextmanager
def _local_folder(architecture: str) -> Iterator[str]:
    """The architecture as open_clip takes it: a `local-dir:` on an object store is copied for as long."""
    if not architecture.startswith("local-dir:"):
        yield architecture
        return
    folder = UPath(architecture.removeprefix("local-dir:"))
    if is_local(folder):
        yield f"local-dir:{folder.path}"
        return
    with tempfile.TemporaryDirectory() as copied:
        for file in folder.iterdir():
            (Path(copied) / file.name).write_bytes(file.read_bytes())
        yield f"local-dir:{copied}"


def architecture_name(architecture: str, pretrained: str | None) -> str:
    """Name of a model for cards and logs.

    Args:
        architecture: as in `load_clip`.
        pretrained: as in `load_clip`.

    Returns:
        The name without any machine's folders.
    """
    if architecture.startswith("local-dir:"):
        return architecture.rstrip("/").rsplit("/", 1)[-1].removeprefix("local-dir:")
    return f"{architecture}/{pretrained.rsplit('/', 1)[-1]}" if pretrained else architecture


def reduce_chips(chips: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], side_px: int) -> NDArray[np.uint8]:
    """Reduce chips by averaging the area of each new pixel, so that nothing aliases.

    Args:
        chips: (N, H, W, 3) uint8, square.
        side_px: new side; chips of that side are returned as they are.

    Returns:
        (N, side_px, side_px, 3) uint8.

    Raises:
        InputError: if a chip is not a square RGB image.
    """
    out = np.empty((len(chips), side_px, side_px, 3), dtype=np.uint8)
    for reduced, chip in zip(out, chips, strict=True):
        if chip.dtype != np.uint8 or chip.ndim != 3 or chip.shape[0] != chip.shape[1] or chip.shape[2] != 3:
            raise InputError(f"A chip must be (H, H, 3) uint8, got {chip.shape} {chip.dtype}.")
        if len(chip) == side_px:
            reduced[:] = chip
        else:
            reduced[:] = Image.fromarray(chip).resize((side_px, side_px), Image.Resampling.BOX)
    return out


def to_input(clip: Clip, images: Tensor) -> Tensor:
    """Normalise pixels as the image tower expects them.

    Args:
        clip: the model whose mean and standard deviation apply.
        images: (N, 3, H, W) float, 0 to 255, RGB.

    Returns:
        (N, 3, H, W) float32.
    """
    config = clip.preprocess_config
    mean = torch.tensor(config["mean"], device=images.device).mul(255).view(1, 3, 1, 1)
    scale = torch.tensor(config["std"], device=images.device).mul(255).reciprocal().view(1, 3, 1, 1)
    return (images - mean) * scale


def image_features(tower: nn.Module, pixels: Tensor) -> Tensor:
    """f_S^I: one vector per image.

    Args:
        tower: image tower of a CLIP.
        pixels: (N, 3, H, W) float32, normalised.

    Returns:
        (N, D) float, L2-normalised.
    """
    features = tower(pixels)
    # Towers built with output_tokens answer (pooled, tokens).
    return F.normalize(features[0] if isinstance(features, tuple) else features, dim=-1)


def patch_features(tower: nn.Module, pixels: Tensor) -> Tensor:
    """f_S^P: one vector per patch, the patch tokens through the tower's final norm and projection.

    Images of another size than the tower's are seen with its position embeddings interpolated; gradients reach
    the tower's own.

    Args:
        tower: image tower of a CLIP: open_clip's VisionTransformer without attentional pooling.
        pixels: (N, 3, H, W) float32, normalised; H and W are multiples of the patch size.

    Returns:
        (N, H / patch, W / patch, D) float, L2-normalised.

    Raises:
        InputError: if the tower has no patch tokens in the space of its image vector, or an image is no whole
            number of patches.
    """
    check_patch_tower(tower)
    if tuple(pixels.shape[2:]) == tuple(tower.image_size):
        return F.normalize(_patch_tokens(tower, pixels), dim=-1)
    positions = {"tower.positional_embedding": position_embedding(tower, *pixels.shape[2:])}
    return F.normalize(functional_call(_PatchTokens(tower), positions, (pixels,)), dim=-1)


def _patch_tokens(tower: nn.Module, pixels: Tensor) -> Tensor:
    tokens = tower.forward_intermediates(
        pixels, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NCHW"
    )["image_intermediates"][-1]
    return tokens.permute(0, 2, 3, 1) @ tower.proj


class _PatchTokens(nn.Module):
    """`_patch_tokens` as a module, so that it can be called with other position embeddings."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        return _patch_tokens(self.tower, pixels)


def check_patch_tower(tower: nn.Module) -> None:
    """Refuse towers that patch features cannot be read from.

    Args:
        tower: image tower of a CLIP.

    Raises:
        InputError: if it is no open_clip VisionTransformer, or pools by attention.
    """
    if not isinstance(tower, VisionTransformer) or tower.attn_pool is not None or tower.proj is None:
        raise InputError(
            f"{type(tower).__name__} has no projected patch tokens: the pixel level needs an open_clip ViT "
            "without attentional pooling, such as ViT-B-16."
        )


def position_embedding(tower: nn.Module, height_px: int, width_px: int) -> Tensor:
    """A tower's position embeddings for another input size, interpolated as open_clip does (bicubic).

    Args:
        tower: open_clip VisionTransformer.
        height_px: height of the input.
        width_px: width of the input.

    Returns:
        (1 + patches, width) float, the class token's first.

    Raises:
        InputError: if the size is no whole number of patches.
    """
    patch_px = tower.patch_size[0]
    if height_px % patch_px or width_px % patch_px:
        raise InputError(
            f"An input of {height_px} x {width_px} px is not a multiple of the {patch_px} px patches."
        )
    size = (height_px // patch_px, width_px // patch_px)
    own, grid = tower.positional_embedding[:1], tower.positional_embedding[1:]
    grid = grid.reshape(1, *tower.grid_size, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([own, grid.permute(0, 2, 3, 1).flatten(0, 2).to(own.dtype)])


@torch.inference_mode()
def encode_images(
    clip: Clip, chips: NDArray[np.uint8], *, crop_px: int = CROP_PX, batch_size: int = 64
) -> NDArray[np.float32]:
    """f_S^I of the central crop of chips.

    Args:
        clip: satellite encoder, or the frozen foundation model as baseline.
        chips: (N, H, H, 3) uint8 RGB at the sensor's own resolution, H at least `crop_px` (448 for stored
            chips).
        crop_px: side of the central square that is shown.
        batch_size: images encoded at once.

    Returns:
        (N, D) float32, L2-normalised.

    Raises:
        InputError: if the chips are not square RGB images, or smaller than the crop.
    """
    batches = [
        image_features(clip.model.visual, pixels)
        for pixels in _inputs(clip, chips, crop_px, clip.image_px, batch_size)
    ]
    return _stack(batches, (0, clip.embedding_width))


@torch.inference_mode()
def encode_patches(
    clip: Clip,
    chips: NDArray[np.uint8],
    *,
    crop_px: int = CROP_PX,
    footprint_px: int = CROP_PX,
    batch_size: int = 64,
) -> NDArray[np.float32]:
    """f_S^P of the central crop of chips.

    A larger `crop_px` is shown at the same metres per pixel, so the input grows and the position embeddings
    are interpolated.

    Args:
        clip: satellite encoder, or the frozen foundation model as baseline.
        chips: (N, H, H, 3) uint8 RGB at the sensor's own resolution, H at least `crop_px`.
        crop_px: side of the central square that is shown.
        footprint_px: side of what the tower's own input shows: the sensor's crop.
        batch_size: images encoded at once.

    Returns:
        (N, rows, columns, D) float32, L2-normalised; row 0 is north.

    Raises:
        InputError: if the chips are not square RGB images, smaller than the crop, or the crop is no whole
            number of patches.
    """
    if crop_px * clip.image_px % footprint_px:
        raise InputError(
            f"A crop of {crop_px} px is no whole number of model pixels ({clip.image_px} per {footprint_px})."
        )
    side_px = crop_px * clip.image_px // footprint_px
    tower = clip.model.visual
    check_patch_tower(tower)
    batches = [patch_features(tower, pixels) for pixels in _inputs(clip, chips, crop_px, side_px, batch_size)]
    side = side_px // tower.patch_size[0]
    return _stack(batches, (0, side, side, clip.embedding_width))


@torch.inference_mode()
def encode_texts(clip: Clip, texts: Sequence[str], *, batch_size: int = 256) -> NDArray[np.float32]:
    """f_T of texts.

    Args:
        clip: any model of the shared space.
        texts: prompts.
        batch_size: texts encoded at once.

    Returns:
        (N, D) float32, L2-normalised.
    """
    batches = [
        clip.model.encode_text(
            clip.tokenize(list(texts[start : start + batch_size])).to(clip.device), normalize=True
        )
        for start in range(0, len(texts), batch_size)
    ]
    return _stack(batches, (0, clip.embedding_width))


def _inputs(
    clip: Clip, chips: NDArray[np.uint8], crop_px: int, side_px: int, batch_size: int
) -> Iterator[Tensor]:
    """Batches of the central crops as the tower expects them, (n, 3, side_px, side_px) float32."""
    if chips.ndim != 4 or chips.shape[1] < crop_px:
        raise InputError(f"Chips must be (N, H, H, 3) with H of at least {crop_px}, got {chips.shape}.")
    margin = (chips.shape[1] - crop_px) // 2
    for start in range(0, len(chips), batch_size):
        crops = chips[start : start + batch_size, margin : margin + crop_px, margin : margin + crop_px]
        images = torch.from_numpy(reduce_chips(np.ascontiguousarray(crops), side_px)).to(clip.device)
        yield to_input(clip, images.permute(0, 3, 1, 2).float())


def _stack(batches: list[Tensor], empty_shape: tuple[int, ...]) -> NDArray[np.float32]:
    if not batches:
        return np.empty(empty_shape, dtype=np.float32)
    return torch.cat([batch.float() for batch in batches]).cpu().numpy()


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
