"""Indoor or outdoor: zero-shot on foundation embeddings, or a ResNet-18 checkpoint on pixels.

Both give a probability; the threshold and what becomes of indoor photos are decided in
graft_pipeline/embeddings.py.
"""

import json
import logging
import tempfile
import threading
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from graft_pipeline.errors import InputError, SettingsError
from graft_pipeline.manifests import is_local
from graft_pipeline.provenance import fingerprint
from graft_pipeline.scene_header import SceneHeader
from resources.foundation import FoundationModel, prepared_batches

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

_PROMPTS = "scene_prompts.json"
_BATCH = 64
_THREADS = 4


def planet_checkpoint(models_folder: UPath) -> UPath:
    """Where the planet's own ResNet-18 lies in a storage, once torchvision/scene_classifier is materialised."""
    return models_folder / "scene_classifier" / "resnet18.safetensors"


class SceneClassifier:
    """Outdoor probabilities of photos; made by `zero_shot` or `checkpoint`.

    Attributes:
        needs_images: whether it scores pixels (`score_images`) instead of embeddings (`score`).
    """

    needs_images: bool

    @classmethod
    def zero_shot(cls, foundation: FoundationModel, prompts: Path | None = None) -> "ZeroShotSceneClassifier":
        """A classifier of the embeddings that the pipeline has anyway.

        Args:
            foundation: the model that made the embeddings.
            prompts: JSON file with lists `indoor` and `outdoor` of sentences; None: the ones beside this
                module.

        Returns:
            The classifier; nothing is loaded yet.
        """
        return ZeroShotSceneClassifier(foundation, prompts)

    @classmethod
    def checkpoint(cls, path: UPath | Path | None, device: str = "auto") -> "CheckpointSceneClassifier":
        """A torchvision ResNet-18, as in the paper (section 3.2: ResNet-18 trained on SUN397).

        Args:
            path: safetensors file of its state dict, as `python -m training scenes` writes it. What its metadata
                may say is in graft_pipeline/scene_header.py. Without any, class 1 of two is outdoor and images
                are prepared as for ImageNet; more classes, such as SUN397's 397, need at least
                `outdoor_classes`, a JSON list of class numbers.
            device: `auto` (CUDA if there is one), `cpu`, `cuda` ...

        Returns:
            The classifier; nothing is loaded yet.

        Raises:
            SettingsError: if no path is set.
        """
        if path is None:
            raise SettingsError(
                "GRAFT_SCENE_CHECKPOINT is not set: name a ResNet-18 safetensors file, or set "
                "GRAFT_SCENE_CLASSIFIER=zero_shot."
            )
        return CheckpointSceneClassifier(path, device)

    @property
    def classifier_id(self) -> str:
        """Fingerprint of whatever decides the scores: 16 hexadecimal characters."""
        raise NotImplementedError

    @property
    def embedding_model_id(self) -> str | None:
        """Fingerprint of the foundation model whose embeddings `score` takes; None for one that needs images."""
        return None

    def score(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outdoor probabilities of foundation embeddings.

        Args:
            embeddings: (N, D) float32, L2-normalised.

        Returns:
            (N,) float32, 0 to 1.

        Raises:
            InputError: if this classifier needs images, or the width is not the foundation model's.
        """
        raise InputError(f"{type(self).__name__} scores images, not embeddings: call score_images.")

    def score_images(self, images: "Iterable[bytes | Image.Image]") -> NDArray[np.float32]:
        """Outdoor probabilities of images.

        Args:
            images: encoded images or PIL images.

        Returns:
            (N,) float32, 0 to 1.

        Raises:
            DataError: if an image cannot be decoded.
        """
        raise NotImplementedError


class ZeroShotSceneClassifier(SceneClassifier):
    """Softmax over indoor and outdoor prompts at the foundation model's temperature, outdoor ones summed."""

    needs_images = False

    def __init__(self, foundation: FoundationModel, prompts: Path | None = None) -> None:
        self._foundation = foundation
        self._indoor, self._outdoor = _read_prompts(prompts)
        self._embedded: NDArray[np.float32] | None = None

    @property
    def classifier_id(self) -> str:
        """See `SceneClassifier.classifier_id`."""
        return fingerprint("zero_shot", self._foundation.model_id, self._indoor, self._outdoor)

    @property
    def embedding_model_id(self) -> str:
        """See `SceneClassifier.embedding_model_id`."""
        return self._foundation.model_id

    def score(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `SceneClassifier.score`."""
        if self._embedded is None:
            self._embedded = self._foundation.embed_texts([*self._indoor, *self._outdoor])
        if embeddings.ndim != 2 or embeddings.shape[1] != self._embedded.shape[1]:
            raise InputError(
                f"Embeddings {embeddings.shape} are not {self._embedded.shape[1]} wide as the foundation "
                "model's: materialise ground_embeddings again."
            )
        # No BLAS: its sums depend on how many rows there are, and a photo's score must not.
        logits = self._foundation.logit_scale * np.einsum("nd,pd->np", embeddings, self._embedded)
        logits -= logits.max(axis=1, keepdims=True)
        weights = np.exp(logits)
        return (weights[:, len(self._indoor) :].sum(axis=1) / weights.sum(axis=1)).astype(np.float32)

    def score_images(self, images: "Iterable[bytes | Image.Image]") -> NDArray[np.float32]:
        """See `SceneClassifier.score_images`."""
        return self.score(self._foundation.embed_images(images))


class CheckpointSceneClassifier(SceneClassifier):
    """ResNet-18 of torchvision with weights of one's own."""

    needs_images = True

    def __init__(self, path: UPath | Path, device: str = "auto") -> None:
        self._path, self._device = UPath(path), device
        self._loaded: tuple[Any, SceneHeader, str] | None = None
        self._lock = threading.Lock()

    @property
    def classifier_id(self) -> str:
        """See `SceneClassifier.classifier_id`."""
        return self._load()[2]

    def score_images(self, images: "Iterable[bytes | Image.Image]") -> NDArray[np.float32]:
        """See `SceneClassifier.score_images`; an image's score does not depend on the images beside it."""
        import torch
        from torchvision.models import ResNet18_Weights

        model, header, _ = self._load()
        device = next(model.parameters()).device
        # The preprocessing that torchvision's ResNet-18 is trained with; carries no weights.
        preprocess = ResNet18_Weights.IMAGENET1K_V1.transforms(
            crop_size=header.crop_px, resize_size=header.resize_px, mean=header.mean, std=header.std
        )
        outdoor = list(header.outdoor_classes)
        parts = [np.empty(0, dtype=np.float32)]
        with torch.inference_mode():
            for batch in prepared_batches(images, preprocess, _BATCH, _THREADS):
                # Batches of one size: other sizes may take other kernels, which round differently.
                pixels = torch.zeros((_BATCH, *batch[0].shape))
                pixels[: len(batch)] = torch.stack(batch)
                probabilities = model(pixels.to(device))[: len(batch)].softmax(dim=1)
                parts.append(probabilities[:, outdoor].sum(dim=1).cpu().numpy())
        return np.concatenate(parts)

    def _load(self) -> tuple[Any, SceneHeader, str]:
        with self._lock:
            if self._loaded is None:
                self._loaded = self._open()
            return self._loaded

    def _open(self) -> tuple[Any, SceneHeader, str]:
        import torch
        from safetensors import SafetensorError, safe_open
        from torchvision.models import resnet18

        try:
            with tempfile.TemporaryDirectory() as folder:
                local = Path(self._path.path) if is_local(self._path) else Path(folder) / self._path.name
                if not is_local(self._path):
                    local.write_bytes(self._path.read_bytes())
                with safe_open(local, framework="pt") as file:
                    metadata = file.metadata() or {}
                    weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
            model = resnet18(weights=None, num_classes=len(weights["fc.weight"]))
            model.load_state_dict(weights)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise SettingsError(
                f"{self._path} is no ResNet-18 checkpoint ({error}): GRAFT_SCENE_CHECKPOINT names a "
                "safetensors file of torchvision's resnet18, which `python -m training scenes` writes; on the planet "
                "it may be unset once torchvision/scene_classifier is materialised."
            ) from error
        try:
            header = SceneHeader.from_metadata(metadata, len(weights["fc.weight"]))
        except InputError as error:
            raise SettingsError(f"{self._path}, GRAFT_SCENE_CHECKPOINT, is not usable. {error}") from error
        device = self._device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        arrays = {name: tensor.numpy() for name, tensor in weights.items()}
        logger.info("scene classifier: %s with %d classes", self._path.name, len(header.classes))
        classifier_id = fingerprint("resnet18", arrays, header.outdoor_classes, header.preprocessing)
        return model.eval().to(device), header, classifier_id


def _read_prompts(path: Path | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    source = path or resources.files(__package__) / _PROMPTS
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        indoor, outdoor = tuple(content["indoor"]), tuple(content["outdoor"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{source} holds no scene prompts ({error!r}): it needs lists `indoor` and `outdoor`."
        ) from error
    if not indoor or not outdoor:
        raise SettingsError(f"{source} needs at least one indoor and one outdoor prompt.")
    return indoor, outdoor
