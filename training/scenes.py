"""Trains the scene classifier: torchvision's ResNet-18 with two outputs, indoor and outdoor (paper, section 3.2).

SUN397 is read in sun397.py; what becomes of the scores, in graft_pipeline/embeddings.py.
"""

import logging
import math
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 -- PyTorch's own idiom
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18
from upath import UPath

from graft_pipeline.errors import InputError
from graft_pipeline.provenance import code_version, fingerprint
from graft_pipeline.scene_header import SceneHeader
from training.checkpoint import (
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    save_tensors,
    unpack_optimizer,
)
from training.loop import resolve_device
from training.optimisation import check_finite, make_optimizer, one_cycle
from training.zero_shot.metrics import Scores, score

logger = logging.getLogger(__name__)

CLASSES = ("indoor", "outdoor")
#: An image file, or a decoded image (H, W, 3) uint8 RGB.
Photo = Path | NDArray[np.uint8]

_OUTDOOR = CLASSES.index("outdoor")


@dataclass(frozen=True, eq=False)
class LabelledPhotos:
    """Photos and what they show.

    Attributes:
        photos: files or decoded images.
        labels: (N,) int64 indices into `CLASSES`.
    """

    photos: Sequence[Photo]
    labels: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """What the training of a scene classifier can be asked.

    Attributes:
        crop_px: side of the square that the network sees.
        resize_px: shorter side of an image before its central square is cut, in validation and in use.
        epochs: how often each image is seen.
        batch_size: images per step.
        learning_rate: peak of the schedule.
        warmup_share: share of the steps that warm up linearly before the cosine.
        weight_decay: of AdamW, on matrices.
        grad_clip: largest gradient norm.
        least_area: least share of an image that a random crop shows.
        weights: where it starts: `auto` (ImageNet's, if torchvision has downloaded them before, else `scratch`),
            `scratch`, or a file with a state dict of torchvision's resnet18 (.pth, .safetensors).
        device: `auto`, `cpu`, `cuda`, `cuda:1` ...
        threads: CPU threads of PyTorch; None: as they are set.
        seed: seed of weights, order, crops and flips.
    """

    crop_px: int = 224
    resize_px: int = 256
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 3e-4
    warmup_share: float = 0.1
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    least_area: float = 0.35
    weights: str = "auto"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject configurations that cannot train."""
        wrong = [name for name in ("epochs", "learning_rate", "least_area") if getattr(self, name) <= 0]
        if self.batch_size < 2:
            # Batch normalisation needs company.
            wrong.append("batch_size")
        if wrong or self.least_area > 1 or not 0 < self.crop_px <= self.resize_px:
            raise InputError(
                f"A scene classifier cannot train with {', '.join(wrong) or 'these sizes'}: epochs and learning "
                "rate must be positive, batch_size at least 2, least_area in (0, 1], crop_px at most resize_px."
            )


@dataclass(frozen=True)
class SceneResult:
    """What the training of a scene classifier gave.

    Attributes:
        path: the weights, which `SceneClassifier.checkpoint` loads.
        header: what the file says about itself.
        history: per epoch: epoch, loss, accuracy, balanced_accuracy.
        scores: of the last epoch, on the validation photos.
        unreadable: photos of either part that could not be decoded and were left out.
    """

    path: UPath
    header: SceneHeader
    history: list[dict[str, float]]
    scores: Scores
    unreadable: int


def train_scenes(
    train: LabelledPhotos,
    validation: LabelledPhotos,
    path: UPath,
    config: SceneConfig | None = None,
    *,
    facts: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SceneResult:
    """Train a scene classifier; one that was killed goes on after its last whole epoch.

    On a CPU the weights are a function of photos, configuration and seed, bit for bit, killed or not.

    Args:
        train: photos to learn from.
        validation: photos to measure on; they choose nothing.
        path: safetensors file to write; beside it, while the training runs, lies its checkpoint.
        config: size and schedule; default: ResNet-18's at 224 px.
        facts: what the file shall say about its data.
        progress: told (steps done, steps).

    Returns:
        File, curve and scores.

    Raises:
        InputError: if a part is empty or unreadable, lacks a side, or the starting weights do not fit.
        TrainingError: if the loss is no finite number any more.
    """
    config = config or SceneConfig()
    for name, part in (("training", train), ("validation", validation)):
        if len(part.photos) != len(part.labels) or set(np.unique(part.labels)) != set(range(len(CLASSES))):
            raise InputError(
                f"The {name} part has {len(part.photos)} photos and {len(part.labels)} labels of "
                f"{len(np.unique(part.labels))} sides: give each photo a label, and photos of both sides."
            )
    if config.threads:
        torch.set_num_threads(config.threads)
    start = new_network(config)
    # Convolutions of cuDNN that add in any order are left out.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        trainer = _Trainer(config, train, validation, start)
        return trainer.run(path, facts or {}, progress)


class _Trainer:
    """A network, its optimizer and its photos."""

    def __init__(
        self, config: SceneConfig, train: LabelledPhotos, validation: LabelledPhotos, start: "_Network"
    ) -> None:
        self._config, self._train, self._validation, self._start = config, train, validation, start
        self._device = resolve_device(config.device)
        self._model = start.model.to(self._device)
        self._optimizer = make_optimizer(
            self._model.parameters(), config.learning_rate, config.weight_decay, (0.9, 0.999)
        )
        self._header = SceneHeader(CLASSES, (_OUTDOOR,), config.resize_px, config.crop_px)
        self._per_epoch = math.ceil(len(train.photos) / config.batch_size)
        self._steps = self._per_epoch * config.epochs
        self._unreadable: set[str] = set()

    def run(
        self, path: UPath, facts: dict[str, Any], progress: Callable[[int, int], None] | None
    ) -> SceneResult:
        checkpoint = path.with_name(f"{path.name}.checkpoint")
        identity = fingerprint(
            {k: v for k, v in asdict(self._config).items() if k not in ("device", "threads")},
            *(part.labels for part in (self._train, self._validation)),
            *(photo if isinstance(photo, np.ndarray) else str(photo) for photo in self._train.photos),
            self._start.name,
            code_version("training.scenes", "training.optimisation"),
        )
        history = self._resume(checkpoint, identity)
        scores = None
        for epoch in range(len(history), self._config.epochs):
            loss = self._epoch(epoch, progress)
            scores = self._validate()
            history.append(
                {
                    "epoch": epoch + 1,
                    "loss": loss,
                    "accuracy": scores.accuracy,
                    "balanced_accuracy": scores.per_class_accuracy,
                }
            )
            logger.info("epoch %d of %d: %s", epoch + 1, self._config.epochs, history[-1])
            if epoch + 1 < self._config.epochs:
                state = {"identity": identity, "history": history, "unreadable": sorted(self._unreadable)}
                save_checkpoint(checkpoint, self._model.state_dict() | pack_optimizer(self._optimizer), state)
        assert scores is not None
        header = self._finished_header(scores, facts)
        save_tensors(path, self._model.state_dict(), header.to_metadata())
        checkpoint.unlink(missing_ok=True)
        if self._unreadable:
            few = ", ".join(sorted(self._unreadable)[:5])
            logger.warning("%d photos cannot be decoded and were left out: %s", len(self._unreadable), few)
        return SceneResult(path, header, history, scores, len(self._unreadable))

    def _resume(self, checkpoint: UPath, identity: str) -> list[dict[str, float]]:
        found = load_checkpoint(checkpoint)
        if found is None or found[1].get("identity") != identity:
            return []
        tensors, state = found
        self._model.load_state_dict({name: tensors[name] for name in self._model.state_dict()})
        unpack_optimizer(self._optimizer, tensors)
        self._unreadable = set(state["unreadable"])
        logger.info("goes on after epoch %d", len(state["history"]))
        return list(state["history"])

    def _finished_header(self, scores: Scores, facts: dict[str, Any]) -> SceneHeader:
        shown = {
            "train_photos": len(self._train.photos),
            "validation_photos": len(self._validation.photos),
            "unreadable_photos": len(self._unreadable),
            "started_from": self._start.name,
            "config": {
                k: v for k, v in asdict(self._config).items() if k not in ("device", "threads", "weights")
            },
        }
        return SceneHeader(
            classes=CLASSES,
            outdoor_classes=(_OUTDOOR,),
            resize_px=self._header.resize_px,
            crop_px=self._header.crop_px,
            accuracy=scores.accuracy,
            balanced_accuracy=scores.per_class_accuracy,
            facts=shown | facts,
        )

    def _epoch(self, epoch: int, progress: Callable[[int, int], None] | None) -> float:
        config, losses = self._config, []
        self._model.train()
        order = np.random.default_rng([config.seed, 0, epoch]).permutation(len(self._train.photos))

        def crop(number: int) -> NDArray[np.uint8] | None:
            rng = np.random.default_rng([config.seed, 1, epoch, number])
            image = self._open(self._train.photos[number], draft_px=2 * config.resize_px)
            return None if image is None else random_crop(image, config.crop_px, config.least_area, rng)

        for place, (chosen, pixels) in enumerate(_batches(crop, order, config.batch_size)):
            step = epoch * self._per_epoch + place
            # One image alone has no batch to be normalised in; the last batch may be one.
            if len(chosen) > 1:
                labels = torch.from_numpy(self._train.labels[chosen]).to(self._device)
                loss = F.cross_entropy(self._model(self._to_input(np.stack(pixels))), labels)
                check_finite(loss, step)
                warmup = max(1, round(config.warmup_share * self._steps))
                one_cycle(self._optimizer, step, self._steps, warmup, config.learning_rate)
                self._optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self._model.parameters(), config.grad_clip)
                self._optimizer.step()
                losses.append(loss.item())
            if progress:
                progress(step + 1, self._steps)
        if not losses:
            raise InputError("No training photo can be decoded: check the files.")
        return float(np.mean(losses))

    @torch.inference_mode()
    def _validate(self) -> Scores:
        self._model.eval()
        # What the resource does with an image: resources/scene_classifier.py.
        preprocess = ResNet18_Weights.IMAGENET1K_V1.transforms(
            crop_size=self._header.crop_px,
            resize_size=self._header.resize_px,
            mean=self._header.mean,
            std=self._header.std,
        )

        def prepare(number: int) -> Tensor | None:
            image = self._open(self._validation.photos[number])
            return None if image is None else preprocess(image)

        truth, predicted = [], []
        numbers = np.arange(len(self._validation.photos))
        for chosen, pixels in _batches(prepare, numbers, self._config.batch_size):
            if len(chosen):
                truth.append(self._validation.labels[chosen])
                predicted.append(
                    self._model(torch.stack(pixels).to(self._device)).argmax(dim=1).cpu().numpy()
                )
        if not truth:
            raise InputError("No validation photo can be decoded: check the files.")
        return score(np.concatenate(truth), np.concatenate(predicted), CLASSES)

    def _open(self, photo: Photo, draft_px: int | None = None) -> Image.Image | None:
        """The image in RGB; None, and noted, if it cannot be decoded."""
        if isinstance(photo, np.ndarray):
            return Image.fromarray(photo)
        try:
            with Image.open(photo) as image:
                if draft_px:
                    # Large JPEGs are decoded at a half, a quarter or an eighth: several times faster.
                    image.draft("RGB", (draft_px, draft_px))
                return image.convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            self._unreadable.add(str(photo))
            return None

    def _to_input(self, pixels: NDArray[np.uint8]) -> Tensor:
        mean, std = (
            torch.tensor(values, device=self._device).view(1, 3, 1, 1)
            for values in (self._header.mean, self._header.std)
        )
        images = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2)
        return (images.float() / 255 - mean) / std


def random_crop(
    image: Image.Image, side_px: int, least_area: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """A part of an image, squeezed into a square and perhaps mirrored, as ResNets are trained.

    Args:
        image: RGB.
        side_px: side of the square.
        least_area: least share of the image's area that is shown.
        rng: decides place, size, proportion (3:4 to 4:3) and mirroring.

    Returns:
        (side_px, side_px, 3) uint8.
    """
    share, proportion = rng.uniform(least_area, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    area = image.width * image.height * share
    width = min(image.width, math.sqrt(area * proportion))
    height = min(image.height, math.sqrt(area / proportion))
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    crop = np.asarray(image.resize((side_px, side_px), Image.Resampling.BILINEAR, box=box))
    return np.ascontiguousarray(crop[:, ::-1]) if rng.random() < 0.5 else crop


@dataclass(frozen=True, eq=False)
class _Network:
    """A network before its training, and the name of its weights."""

    model: nn.Module
    name: str


def new_network(config: SceneConfig) -> _Network:
    """ResNet-18 with two outputs and the weights that the configuration asks for.

    Args:
        config: its weights and seed.

    Returns:
        The network; PyTorch's global random state is as before.

    Raises:
        InputError: if a weights file is missing or is no ResNet-18.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = resnet18(weights=None, num_classes=len(CLASSES))
    if config.weights == "scratch":
        return _Network(model, "scratch")
    url = ResNet18_Weights.IMAGENET1K_V1.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if config.weights != "auto":
        file = Path(config.weights)
    elif not file.is_file():
        logger.warning(
            "ImageNet's weights are not at %s: training from scratch. To start from them, download %s and name the "
            "file with --weights.",
            file,
            url,
        )
        return _Network(model, "scratch")
    try:
        # Pickles load tensors only.
        loaded = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
        state = {name: tensor for name, tensor in loaded.items() if not name.startswith("fc.")}
        found = model.load_state_dict(state, strict=False)
    # Bytes that are no pickle fail in whatever way they lead the unpickler.
    except (
        OSError,
        RuntimeError,
        SafetensorError,
        pickle.UnpicklingError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        EOFError,
    ) as error:
        raise InputError(
            f"{file} holds no ResNet-18 ({error}): name a state dict of torchvision's resnet18, or --weights scratch."
        ) from error
    if found.unexpected_keys or {name.partition(".")[0] for name in found.missing_keys} != {"fc"}:
        raise InputError(
            f"{file} is no state dict of torchvision's resnet18: name another file, or --weights scratch."
        )
    return _Network(model, f"{file.name} {fingerprint({k: v.numpy() for k, v in state.items()})}")


def _batches(
    prepare: Callable[[int], Any], numbers: NDArray[np.int64], batch_size: int
) -> Iterator[tuple[NDArray[np.int64], list[Any]]]:
    """Prepare photos with threads, one batch ahead; a photo that gives None is left out of its batch."""
    todo = iter(numbers.tolist())
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        coming = [(n, pool.submit(prepare, n)) for n in islice(todo, batch_size)]
        while coming:
            batch = coming
            coming = [(n, pool.submit(prepare, n)) for n in islice(todo, batch_size)]
            done = [(n, future.result()) for n, future in batch]
            there = [(n, prepared) for n, prepared in done if prepared is not None]
            yield np.array([n for n, _ in there], np.int64), [prepared for _, prepared in there]
