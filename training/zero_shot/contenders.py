"""Models that are compared: CLIPs, whose texts ask, and image backbones, which need one example per class.

What they are compared on is in datasets.py, how in evaluate.py; our own encoders are CLIPs like any other.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 -- PyTorch's own idiom
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from graft_pipeline.errors import InputError, SettingsError
from training.encoders import Clip, encode_texts, image_features, load_clip, to_input

#: What torchvision's and most of timm's backbones expect.
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
#: What Satlas's expect: 0 to 1 (https://github.com/allenai/satlas/blob/main/Normalization.md).
_SATLAS = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
_KIND = "(folder|open_clip|timm|torchvision)"
#: A name may hold `=`, and so may a path: only before a kind does it end a name.
_SPEC = re.compile(rf"(?:(?!{_KIND}:)(?P<name>.+?)=)?(?P<kind>{_KIND}):(?P<what>.+)")
#: Prefixes under which Satlas keeps the backbone: Swin or ResNet, for single images or for series of them.
_SATLAS_PREFIXES = (
    "backbone.backbone.backbone.", "backbone.backbone.resnet.", "backbone.backbone.", "backbone.resnet.",
)  # fmt: skip
#: Prefixes of other published checkpoints (MoCo, SeCo and CACo, Lightning, DataParallel).
_PREFIXES = ("module.encoder_q.", "encoder_q.", "backbone.", "model.", "module.", "encoder.", "0.")
#: Parts of a ResNet by their number in a Sequential of its children, as which SeCo and CACo keep it.
_RESNET_PARTS = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


@dataclass(frozen=True, eq=False)
class Contender:
    """A model that turns images into vectors, and texts too if it is a CLIP.

    Attributes:
        name: as the report shows it.
        image_px: side of its input.
        clip: the CLIP, if it is one.
        backbone: the image model, if it is none; images to (N, D) features.
        mean: of the backbone's input, RGB, 0 to 1.
        std: of the backbone's input.
    """

    name: str
    image_px: int
    clip: Clip | None = None
    backbone: nn.Module | None = None
    mean: tuple[float, float, float] = _IMAGENET["mean"]
    std: tuple[float, float, float] = _IMAGENET["std"]

    @classmethod
    def of_clip(cls, name: str, clip: Clip) -> "Contender":
        """A CLIP as contender."""
        return cls(name, clip.image_px, clip=clip)

    @property
    def has_text(self) -> bool:
        """Whether it can be asked in words."""
        return self.clip is not None

    def prepare(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize an image as CLIP's preprocessing does: shorter side to the input's, central square.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            (image_px, image_px, 3) uint8.
        """
        height, width = image.shape[:2]
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        square = image[top : top + side, left : left + side]
        if side == self.image_px:
            return square
        resized = Image.fromarray(square).resize((self.image_px, self.image_px), Image.Resampling.BICUBIC)
        return np.asarray(resized)

    @torch.inference_mode()
    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Vectors of prepared images.

        Args:
            images: (N, image_px, image_px, 3) uint8 RGB.

        Returns:
            (N, D) float32, L2-normalised.
        """
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        if self.clip is not None:
            vectors = image_features(self.clip.model.visual, to_input(self.clip, pixels.to(self.clip.device)))
        else:
            assert self.backbone is not None
            mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
            device = next(self.backbone.parameters()).device
            features = self.backbone(((pixels / 255 - mean) / std).to(device))
            vectors = F.normalize(features.flatten(1), dim=-1)
        return vectors.float().cpu().numpy()

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """f_T of texts.

        Args:
            texts: prompts.

        Returns:
            (N, D) float32, L2-normalised.

        Raises:
            InputError: if it is no CLIP.
        """
        if self.clip is None:
            raise InputError(f"{self.name} knows no words: it can only be scored from one example per class.")
        return encode_texts(self.clip, texts)


def open_contender(spec: str, device: str = "cpu") -> Contender:
    """Load a contender.

    Args:
        spec: `NAME=KIND:WHAT[:WEIGHTS]`, NAME and `=` may be left out. KIND is `folder` (an open_clip folder, such
            as our encoders'), `open_clip` (architecture and pretrained tag or checkpoint file, or
            `hf-hub:owner/name`: CLIP, RemoteCLIP, CLIP-RSICD, GeoRSCLIP), `timm` or `torchvision` (architecture and
            checkpoint file: SeCo, CACo, Satlas).
        device: where to put it.

    Returns:
        The model in eval mode.

    Raises:
        InputError: if the spec is malformed.
        SettingsError: if the model or its weights cannot be had.
    """
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise InputError(
            f"{spec!r} names no model: write NAME=folder:PATH, NAME=open_clip:ViT-B-32:openai, "
            "NAME=timm:resnet50:weights.pth or NAME=torchvision:swin_v2_b:weights.pth."
        )
    name, kind, what = found["name"] or spec, found["kind"], found["what"]
    if kind == "folder":
        return Contender.of_clip(name, load_clip(f"local-dir:{what}", device=device))
    if kind == "open_clip" and what.startswith(("hf-hub:", "local-dir:")):
        return Contender.of_clip(name, load_clip(what, device=device))
    architecture, _, weights = what.partition(":")
    if kind == "open_clip":
        return Contender.of_clip(name, load_clip(architecture, weights or None, device))
    build = _timm if kind == "timm" else _torchvision
    return build(name, architecture, Path(weights) if weights else None, device)


def _timm(name: str, architecture: str, weights: Path | None, device: str) -> Contender:
    import timm

    try:
        model = timm.create_model(architecture, pretrained=weights is None, num_classes=0)
    except (RuntimeError, ValueError, OSError) as error:
        raise SettingsError(
            f"timm has no {architecture}, or its weights cannot be had ({error}): name a checkpoint file."
        ) from error
    config = model.pretrained_cfg
    own = {key: tuple(config[key]) for key in ("mean", "std")}
    is_satlas = weights is not None and load_backbone_weights(model, weights)
    return Contender(
        name,
        int(config["input_size"][-1]),
        backbone=model.eval().to(device),
        **(_SATLAS if is_satlas else own),
    )


def _torchvision(name: str, architecture: str, weights: Path | None, device: str) -> Contender:
    from torchvision.models import get_model

    try:
        model = get_model(architecture, weights=None if weights else "DEFAULT")
    except (RuntimeError, ValueError, OSError) as error:
        raise SettingsError(
            f"torchvision has no {architecture}, or its weights cannot be had ({error}): name a checkpoint file."
        ) from error
    # The classifier on top is not part of the backbone.
    for head in ("fc", "head", "classifier", "heads"):
        if hasattr(model, head):
            setattr(model, head, nn.Identity())
            break
    is_satlas = weights is not None and load_backbone_weights(model, weights)
    return Contender(name, 224, backbone=model.eval().to(device), **(_SATLAS if is_satlas else _IMAGENET))


def load_backbone_weights(model: nn.Module, file: Path) -> bool:
    """Load a backbone's weights from a published checkpoint, whatever it is wrapped in.

    Args:
        model: without its classifier.
        file: safetensors, or a PyTorch file of tensors: a state dict, or a dictionary that has one under
            `state_dict`, `model` or `teacher`. It is loaded without running code of the file.

    Returns:
        Whether they lay there as Satlas's do, whose models want pixels from 0 to 1 and no other normalisation.

    Raises:
        SettingsError: if it cannot be read, or holds not every weight of the model.
    """
    try:
        content = _tensors(file)
    except (OSError, RuntimeError, UnpicklingError, SafetensorError, EOFError, KeyError) as error:
        raise SettingsError(
            f"{file} holds no weights that can be read ({error}): download it again; if it holds more than tensors, "
            "save its state_dict alone."
        ) from error
    wanted = model.state_dict()
    best: dict[str, Tensor] = {}
    is_satlas = False
    for prefix in ("", *_PREFIXES, *_SATLAS_PREFIXES):
        inside = {
            key.removeprefix(prefix): tensor for key, tensor in content.items() if key.startswith(prefix)
        }
        for named in (inside, {_by_name(key): tensor for key, tensor in inside.items()}):
            fits = {
                key: tensor
                for key, tensor in named.items()
                if key in wanted and wanted[key].shape == tensor.shape
            }
            if len(fits) > len(best):
                best, is_satlas = fits, prefix in _SATLAS_PREFIXES
    missing = [key for key in wanted if key not in best and not key.endswith("num_batches_tracked")]
    if missing:
        raise SettingsError(
            f"{file} lacks {len(missing)} of {len(wanted)} weights of {type(model).__name__}, {missing[0]} first: "
            "name the architecture that it was made for."
        )
    model.load_state_dict(best, strict=False)
    return is_satlas


def _by_name(key: str) -> str:
    """`layer1.0.conv1.weight` of `4.0.conv1.weight`; other keys as they are."""
    part, dot, rest = key.partition(".")
    return _RESNET_PARTS.get(part, part) + dot + rest


def _tensors(file: Path) -> Mapping[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    content: Any = torch.load(file, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}
