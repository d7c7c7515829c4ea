"""The foundation model (f_G, f_T): a frozen CLIP of open_clip that embeds ground photos and texts.

Which photos are embedded is decided in graft_pipeline/embeddings.py; satellite encoders live in training/.
"""

import contextlib
import io
import itertools
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from upath import UPath

from graft_pipeline.errors import DataError, SettingsError
from graft_pipeline.manifests import is_local
from graft_pipeline.provenance import fingerprint
from graft_pipeline.settings import Settings
from graft_pipeline.shards import MEND

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Loaded:
    """What open_clip gives for one model."""

    model: Any
    tokenize: Any
    preprocess: Callable[[Image.Image], "torch.Tensor"]
    model_id: str
    width: int


class FoundationModel:
    """A CLIP that is loaded when it is first asked for something, and never trained.

    Attributes:
        name: architecture and weights, without a machine's folders.
    """

    def __init__(
        self,
        architecture: str,
        pretrained: str | None = None,
        *,
        device: str = "auto",
        batch_size: int = 64,
        decode_threads: int = 0,
    ) -> None:
        """Name a model; nothing is loaded yet.

        Args:
            architecture: open_clip architecture, `local-dir:/folder` or `hf-hub:owner/name`.
            pretrained: pretrained tag or checkpoint file; None for `local-dir:` and `hf-hub:`.
            device: `auto` (CUDA if there is one), `cpu`, `cuda` ...
            batch_size: images or texts encoded at once.
            decode_threads: threads that decode and resize images; 0: one per core, at most eight.
        """
        self.architecture, self.pretrained = architecture, pretrained
        own_name = architecture.rstrip("/").rsplit("/", 1)[-1].removeprefix("local-dir:")
        self.name = f"{own_name}/{pretrained.rsplit('/', 1)[-1]}" if pretrained else own_name
        self._device, self._batch_size = device, batch_size
        self._threads = decode_threads or min(8, os.cpu_count() or 1)
        self._loaded: _Loaded | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_folder(cls, folder: UPath, **kwargs: Any) -> "FoundationModel":
        """A model saved as an open_clip folder, local or on an object store.

        Args:
            folder: folder with open_clip_config.json and weights; need not exist yet.
            **kwargs: as for the constructor.

        Returns:
            The model, not loaded yet.
        """
        return cls(f"local-dir:{folder}", None, **kwargs)

    @classmethod
    def of_deployment(cls, settings: Settings, models_folder: UPath) -> "FoundationModel":
        """The model that the settings name, or the planet's own.

        Args:
            settings: of the deployment.
            models_folder: where the planet's own lies.

        Returns:
            The model, not loaded yet.
        """
        named = settings.foundation_architecture
        if settings.is_planet and named == Settings.model_fields["foundation_architecture"].default:
            return cls.from_folder(models_folder / "foundation")
        return cls(named, settings.foundation_pretrained)

    @property
    def model_id(self) -> str:
        """Fingerprint of weights, architecture and preprocessing: 16 hexadecimal characters.

        Raises:
            SettingsError: if the model cannot be loaded.
        """
        return self._load().model_id

    @property
    def width(self) -> int:
        """D, dimensions of an embedding.

        Raises:
            SettingsError: if the model cannot be loaded.
        """
        return self._load().width

    @property
    def logit_scale(self) -> float:
        """Inverse temperature that the model was trained with.

        Raises:
            SettingsError: if the model cannot be loaded.
        """
        return float(self._load().model.logit_scale.exp())

    def embed_images(self, images: Iterable[bytes | Image.Image]) -> NDArray[np.float32]:
        """f_G of images; the next batch is decoded by threads while one is encoded.

        Every batch is filled up to one size: the last bits of an embedding depend on the size of its batch, and a
        photo that comes later than others must not be another one for that.

        Args:
            images: encoded images (JPEG, PNG ...) or PIL images.

        Returns:
            (N, D) float32, L2-normalised.

        Raises:
            DataError: if an image cannot be decoded.
            SettingsError: if the model cannot be loaded.
        """
        import torch

        loaded = self._load()
        device = next(loaded.model.parameters()).device
        parts = []
        with torch.inference_mode():
            for batch in prepared_batches(images, loaded.preprocess, self._batch_size, self._threads):
                pixels = torch.zeros((self._batch_size, *batch[0].shape))
                pixels[: len(batch)] = torch.stack(batch)
                features = loaded.model.encode_image(pixels.to(device), normalize=True)[: len(batch)]
                parts.append(features.float().cpu().numpy())
        return np.concatenate(parts) if parts else np.empty((0, loaded.width), dtype=np.float32)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """f_T of texts.

        Args:
            texts: prompts.

        Returns:
            (N, D) float32, L2-normalised.

        Raises:
            SettingsError: if the model cannot be loaded.
        """
        import torch

        loaded = self._load()
        device = next(loaded.model.parameters()).device
        parts = [np.empty((0, loaded.width), dtype=np.float32)]
        with torch.inference_mode():
            for first in range(0, len(texts), self._batch_size):
                tokens = loaded.tokenize(list(texts[first : first + self._batch_size])).to(device)
                parts.append(loaded.model.encode_text(tokens, normalize=True).float().cpu().numpy())
        return np.concatenate(parts)

    def _load(self) -> _Loaded:
        with self._lock:
            if self._loaded is None:
                self._loaded = self._open()
            return self._loaded

    def _open(self) -> _Loaded:
        # Seconds to import, and not needed to load the definitions.
        import open_clip
        import torch
        from open_clip.pretrained import get_pretrained_cfg
        from open_clip.transform import PreprocessCfg, image_transform_v2
        from safetensors import SafetensorError

        architecture = self.architecture
        has_scheme = architecture.startswith(("local-dir:", "hf-hub:"))
        if not has_scheme and not self.pretrained:
            raise SettingsError(
                f"{architecture} needs weights: GRAFT_FOUNDATION_PRETRAINED names a tag or a checkpoint file."
            )
        tag = {} if has_scheme else get_pretrained_cfg(architecture.replace("/", "-"), self.pretrained)
        # open_clip only warns when a tag's weights want QuickGELU and its architecture has plain GELU.
        quick_gelu = bool(tag.get("quick_gelu", False))
        twin = f"{architecture.replace('/', '-')}-quickgelu"
        if not has_scheme and Path(self.pretrained or "").is_file() and twin in open_clip.list_models():
            logger.warning(
                "%s from a file has plain GELU: name %s if its weights were trained with QuickGELU, as OpenAI's were",
                architecture,
                twin,
            )
        device = self._device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            with _local_folder(architecture) as local:
                config = open_clip.get_model_config(local if has_scheme else local.replace("/", "-"))
                model = open_clip.create_model(
                    local,
                    pretrained=None if has_scheme else self.pretrained,
                    force_quick_gelu=quick_gelu,
                    require_pretrained=True,
                    device=device,
                )
                tokenize = open_clip.get_tokenizer(local)
        except (RuntimeError, ValueError, OSError, UnpicklingError, SafetensorError) as error:
            raise SettingsError(
                f"The foundation model {self.name} cannot be loaded: {error}. The planet's own is there once you "
                "materialise openclip/foundation. For another, check GRAFT_FOUNDATION_ARCHITECTURE and "
                "GRAFT_FOUNDATION_PRETRAINED; offline, name a local-dir: folder or a checkpoint file; with a file of "
                "OpenAI's weights name ViT-B-16-quickgelu, not ViT-B-16."
            ) from error
        if quick_gelu:
            config["quick_gelu"] = True
        model.eval().requires_grad_(False)
        preprocess = model.visual.preprocess_cfg
        # The same formula as training.encoders.Clip.fingerprint: one model, one id.
        shown = {key: preprocess[key] for key in ("mean", "std", "interpolation", "resize_mode")}
        model_id = fingerprint(json.dumps([config, shown], sort_keys=True), _weights_of(model))
        logger.info("foundation model %s is %s on %s", self.name, model_id, device)
        transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
        return _Loaded(model, tokenize, transform, model_id, int(config["embed_dim"]))


def prepared_batches(
    images: Iterable[bytes | Image.Image],
    preprocess: Callable[[Image.Image], "torch.Tensor"],
    batch_size: int,
    threads: int,
) -> Iterator[list["torch.Tensor"]]:
    """Decode and preprocess images with threads, one batch ahead of its consumer.

    Args:
        images: encoded images or PIL images.
        preprocess: PIL image to tensor.
        batch_size: images per batch.
        threads: number of threads.

    Yields:
        Lists of up to `batch_size` tensors, in order.

    Raises:
        DataError: if an image cannot be decoded.
    """

    def prepare(image: bytes | Image.Image) -> "torch.Tensor":
        if isinstance(image, Image.Image):
            return preprocess(image)
        try:
            with Image.open(io.BytesIO(image)) as opened:
                return preprocess(opened.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"A stored image cannot be decoded ({error}): {MEND}.") from error

    iterator = iter(images)
    with ThreadPoolExecutor(threads) as pool:
        coming = [pool.submit(prepare, image) for image in itertools.islice(iterator, batch_size)]
        while coming:
            batch = coming
            coming = [pool.submit(prepare, image) for image in itertools.islice(iterator, batch_size)]
            yield [future.result() for future in batch]


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


def _weights_of(model: Any) -> dict[str, tuple[str, tuple[int, ...], NDArray[np.uint8]]]:
    """Weights by name as (dtype, shape, bytes)."""
    import torch

    return {
        name: (
            str(tensor.dtype),
            tuple(tensor.shape),
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(),
        )
        for name, tensor in model.state_dict().items()
    }
