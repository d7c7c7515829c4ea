"""The training of a satellite encoder: batches in, Eq. 2 or Eq. 3 down, validated, resumable, exported.

Batches come from data.py, losses from losses.py; known-good configurations are in recipes.py.
"""

import contextlib
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from upath import UPath

from graft_pipeline.errors import DataError, InputError, TrainingError
from graft_pipeline.imagery import NAIP, Sensor
from graft_pipeline.manifests import remove_partial_files, write_bytes_atomic
from graft_pipeline.provenance import code_version, fingerprint
from training.checkpoint import load_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer
from training.data import Batch, Batches, Chips, Tiles, TrainingSet, first_tiles, validation_batch
from training.distributed import Team, join_team
from training.encoders import Clip, check_patch_tower, image_features, load_clip, patch_features, to_input
from training.export import save_encoder
from training.losses import image_level_loss, pixel_level_loss
from training.optimisation import check_finite, make_optimizer, one_cycle

logger = logging.getLogger(__name__)

RECALL_AT = (1, 10)

_LAST, _BEST = "last.safetensors", "best-{}.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a training gives.

    Attributes:
        level: `image` trains f_S^I with Eq. 2, `pixel` f_S^P with Eq. 3.
        architecture: foundation model, as in `encoders.load_clip`.
        pretrained: its weights, as in `encoders.load_clip`.
        sensor: whose chips these are; gives chip and crop size.
        epochs: passes over the training split.
        steps: optimizer steps; given, they count instead of the epochs.
        batch_tiles: N_B, tiles per step; the whole split if it is smaller.
        photos_per_tile: at most so many photos of a tile and step.
        learning_rate: peak of the schedule.
        warmup_steps: steps of linear warm-up before the cosine.
        weight_decay: of AdamW, on matrices.
        betas: of AdamW.
        grad_clip: largest gradient norm.
        temperature: tau, fixed.
        photo_weight: of the loss against f_G of the photos; with alt_text_weight, the paper's ablation of targets.
        alt_text_weight: of the same loss against f_T of the photos' titles and tags, which are added; above 0,
            photos without either are left out.
        mask_shared_photos: a photo that lies under two tiles of a batch is not its own negative; off is the
            paper.
        max_shift: largest move of a crop in x and y, as a share of its side; see `augment.random_crops`.
        validate_every: steps between validations, which are also the checkpoints.
        keep: weights that are exported: `best`, of the least validation loss; or `last`, where the validation split
            is so small that its loss says less than the end of the schedule.
        validation_tiles: at most so many tiles of the validation split are looked at.
        precision: `bf16` runs the encoder under autocast.
        accumulation_steps: parts that a step's batch is computed in, so that activations of one part are in
            memory at a time; loss and gradient stay those of the whole batch.
        grad_checkpointing: activations of a block are computed again for the gradient, instead of kept.
        compile_backend: torch.compile's backend for the encoder, such as `inductor`: faster steps after a slow first
            one; None: not compiled.
        chip_memory_gb: reduced chips are kept in memory up to this size; above it they are decoded for each
            batch.
        chip_cache: folder on a fast local disk that keeps decoded chips that do not fit into memory, 0.6 MB for
            each of 448 px, so that later epochs read them; None: decoded anew each time.
        decode_threads: threads that decode chips; None: one per core, at most eight.
        prefetch_batches: batches that are prepared ahead of the one in use.
        device: `auto`, `cpu`, `cuda`, `cuda:1` ...
        threads: CPU threads of PyTorch; None: as they are set.
        seed: seed of order, crops and drawn photos.
    """

    level: Literal["image", "pixel"]
    architecture: str = "ViT-B-16"
    pretrained: str | None = "openai"
    sensor: Sensor = NAIP
    epochs: float = 10.0
    steps: int | None = None
    batch_tiles: int = 256
    photos_per_tile: int = 25
    learning_rate: float = 1e-5
    warmup_steps: int = 500
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.98)
    grad_clip: float = 1.0
    temperature: float = 0.07
    photo_weight: float = 1.0
    alt_text_weight: float = 0.0
    mask_shared_photos: bool = False
    max_shift: float = 0.5
    validate_every: int = 500
    keep: Literal["best", "last"] = "best"
    validation_tiles: int = 512
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulation_steps: int = 1
    grad_checkpointing: bool = False
    compile_backend: str | None = None
    chip_memory_gb: float = 1.0
    chip_cache: str | None = None
    decode_threads: int | None = None
    prefetch_batches: int = 2
    device: str = "auto"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject configurations that cannot train."""
        positive = (
            "epochs",
            "steps",
            "batch_tiles",
            "photos_per_tile",
            "learning_rate",
            # 0 would scale every gradient to nothing, not leave it as it is.
            "grad_clip",
            "temperature",
            "validate_every",
            "accumulation_steps",
            "decode_threads",
            "prefetch_batches",
            "threads",
        )
        wrong = [name for name in positive if getattr(self, name) is not None and getattr(self, name) <= 0]
        if wrong:
            raise InputError(f"{', '.join(wrong)} of a TrainConfig must be positive.")
        not_negative = (
            "warmup_steps",
            "weight_decay",
            "max_shift",
            "validation_tiles",
            "chip_memory_gb",
            "seed",
        )
        wrong = [name for name in not_negative if getattr(self, name) < 0]
        if wrong:
            raise InputError(f"{', '.join(wrong)} of a TrainConfig must not be negative.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError("betas of a TrainConfig must be at least 0 and below 1.")
        if min(self.photo_weight, self.alt_text_weight) < 0 or self.photo_weight + self.alt_text_weight == 0:
            raise InputError(
                "photo_weight and alt_text_weight of a TrainConfig must not be negative nor both 0."
            )
        choices = {"level": ("image", "pixel"), "precision": ("fp32", "bf16"), "keep": ("best", "last")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} of a TrainConfig must be one of {', '.join(known)}.")


#: Fields that decide what a training costs, not what it learns: a run may go on with others of them.
COST_FIELDS = (
    "accumulation_steps",
    "grad_checkpointing",
    "compile_backend",
    "chip_memory_gb",
    "chip_cache",
    "decode_threads",
    "prefetch_batches",
    "device",
    "threads",
)


@dataclass(frozen=True)
class Validation:
    """What the encoder does on the validation split, on upright central crops.

    Attributes:
        loss: Eq. 2 or Eq. 3 over the looked-at tiles as one batch.
        recall_at_1: share of queries whose nearest photo is one of the tile's own; a query is a tile (image
            level) or a photo's pixel (pixel level).
        recall_at_10: share of queries with one of the tile's own photos among the ten nearest.
        tiles: number of tiles looked at.
        photos: (tile, photo) pairs of them.
    """

    loss: float
    recall_at_1: float
    recall_at_10: float
    tiles: int
    photos: int


@dataclass(frozen=True)
class Progress:
    """One finished step.

    Attributes:
        step: steps done.
        steps: steps in all.
        loss: training loss of the step.
        learning_rate: of the step.
        tiles: tiles of the step's batch, of all processes.
        validation: if the step ended with one.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    tiles: int
    validation: Validation | None = None


@dataclass(frozen=True)
class TrainResult:
    """What a training gave.

    Attributes:
        folder: open_clip folder of the encoder; `local-dir:{folder}` loads it.
        model_id: fingerprint of the exported model.
        history: per step: step, loss, learning_rate.
        validations: per validation: step and the fields of `Validation`; step 0 is the foundation model
            itself.
        best_step: step of the exported weights: least validation loss, or the last step if `keep` says so or
            there is no validation
            split.
        train_tiles: tiles of the training split.
        train_photos: (tile, photo) pairs of the training split.
        steps: optimizer steps of the whole run.
        tiles_per_second: tiles of all processes that this call's steps took in; the first step, which starts from
            nothing, and validations are left out. None without a second step.
        waiting_share: share of that time in which the step waited for its batch.
        seconds: wall time of this call.
        cpu_seconds: CPU time of this process in this call.
        peak_memory_gb: largest resident memory of this process so far.
        peak_device_memory_gb: largest allocated GPU memory; None on CPU.
    """

    folder: UPath
    model_id: str
    history: list[dict[str, float]]
    validations: list[dict[str, float]]
    best_step: int
    train_tiles: int
    train_photos: int
    steps: int
    tiles_per_second: float | None
    waiting_share: float | None
    seconds: float
    cpu_seconds: float
    peak_memory_gb: float
    peak_device_memory_gb: float | None


@dataclass
class _Run:
    """State of a run that a checkpoint carries besides tensors."""

    step: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    history: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)


def train(
    config: TrainConfig,
    training_set_folder: UPath,
    storage_root: UPath,
    output: UPath,
    progress: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train a satellite encoder from the foundation model's image tower.

    `output` gets `encoder/` (the open_clip folder with its model card), `history.json`, and while the
    training runs `checkpoints/`. A run that was killed goes on at its last checkpoint if configuration, data
    and foundation model are the same; on a CPU it ends with the same weights, bit for bit, as one that was
    not.

    Under `torchrun`, all of its processes call this with the same arguments and storage that they all see; each
    has an equal part of every batch, and the loss and its gradient are those of the whole batch.

    Args:
        config: what to train and how.
        training_set_folder: snapshot folder of `training_set`.
        storage_root: storage root that the chip shards' names are relative to.
        output: folder of this training; one training at a time writes there.
        progress: called after each step, in the first process only.

    Returns:
        Folder, curves and costs.

    Raises:
        SettingsError: if the foundation model cannot be loaded.
        InputError: if the training set is not there, or the tower has no patch tokens for the pixel level.
        DataError: if chips or embeddings do not fit the configuration, or the photos were embedded by another model.
        TrainingError: if the loss is no finite number any more, or memory does not suffice; the last checkpoint is
            intact.
    """
    started, started_cpu = time.perf_counter(), time.process_time()
    if config.threads:
        torch.set_num_threads(config.threads)
    with _advice_on_memory(config), join_team(resolve_device(config.device)) as (team, device):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        clip = load_clip(config.architecture, config.pretrained, device)
        foundation_id = clip.fingerprint()
        if config.level == "pixel":
            check_patch_tower(clip.model.visual)
        data = TrainingSet(training_set_folder, storage_root, alt_text=config.alt_text_weight > 0)
        _check_foundation(data, clip, foundation_id)
        trainer = _Trainer(config, clip, data, device, team)
        # The foundation model is known by its content, not by the folder that it was loaded from.
        learnt = asdict(config)
        for name in (*COST_FIELDS, "architecture", "pretrained", "batch_tiles"):
            learnt.pop(name)
        identity = fingerprint(
            learnt, data.fingerprint, foundation_id, _code_version(), trainer.batches.batch_tiles
        )
        run, pace = _run_to_the_end(
            trainer, output / "checkpoints", identity, progress if team.is_first else None
        )
        if team.is_first:
            curves = {"history": run.history, "validations": run.validations}
            write_bytes_atomic(output / "history.json", (json.dumps(curves, indent=1) + "\n").encode())
            card = model_card(
                config, data, clip, foundation_id, run.validations, run.best_step, trainer.steps
            )
            save_encoder(output / "encoder", clip, card)
            # A run without its last checkpoint starts anew and needs none of the others.
            (output / "checkpoints" / _LAST).unlink(missing_ok=True)
            _remove_best(output / "checkpoints")
        team.wait()
        is_cuda = device.type == "cuda"
        return TrainResult(
            folder=output / "encoder",
            model_id=clip.fingerprint(),
            history=run.history,
            validations=run.validations,
            best_step=run.best_step,
            train_tiles=len(trainer.tiles),
            train_photos=len(trainer.tiles.embedding_row),
            steps=trainer.steps,
            tiles_per_second=pace.tiles / pace.seconds if pace.tiles else None,
            waiting_share=pace.waiting_s / pace.seconds if pace.tiles else None,
            seconds=time.perf_counter() - started,
            cpu_seconds=time.process_time() - started_cpu,
            peak_memory_gb=peak_memory_gb(),
            peak_device_memory_gb=torch.cuda.max_memory_allocated(device) / 2**30 if is_cuda else None,
        )


@dataclass
class _Pace:
    """What the steps of one call took."""

    tiles: int = 0
    seconds: float = 0.0
    waiting_s: float = 0.0


def _run_to_the_end(
    trainer: "_Trainer", checkpoints: UPath, identity: str, progress: Callable[[Progress], None] | None
) -> tuple[_Run, _Pace]:
    """Train from the last checkpoint or the start; leaves the best weights in the tower."""
    config, team, steps = trainer.config, trainer.team, trainer.steps
    last = checkpoints / _LAST
    if team.is_first:
        remove_partial_files(checkpoints)
    run, pace = trainer.resume(last, identity), _Pace()
    if run is None:
        run = _Run()
        trainer.validate(run)
    first, asked = run.step, time.perf_counter()
    for parts in trainer.batches.stream(run.step, steps, trainer.place_parts, config.prefetch_batches):
        got = time.perf_counter()
        loss, rate = trainer.step(parts, run.step)
        if run.step > first:
            pace.tiles += trainer.batches.batch_tiles
            pace.waiting_s += got - asked
            pace.seconds += time.perf_counter() - asked
        run.step += 1
        run.history.append({"step": run.step, "loss": loss, "learning_rate": rate})
        validation = None
        if run.step % config.validate_every == 0 or run.step == steps:
            validation = trainer.validate(run)
            if team.is_first:
                best = checkpoints / _BEST.format(run.best_step)
                if run.best_step == run.step:
                    save_checkpoint(best, trainer.weights(), {"identity": identity, "step": run.step})
                # `last` names its `best`, which is there before it, and the one before until after it: a GPU may
                # find another step the best when a run that was killed in between goes on.
                save_checkpoint(last, trainer.tensors(), {"identity": identity, "run": asdict(run)})
                _remove_best(checkpoints, but=best)
                logger.info("step %d of %d: loss %.3f, validation %s", run.step, steps, loss, validation)
        if progress:
            progress(Progress(run.step, steps, loss, rate, trainer.batches.batch_tiles, validation))
        asked = time.perf_counter()
    # Only the first process validates, so only it knows which weights were the best.
    run = team.agree(run)
    trainer.restore(checkpoints / _BEST.format(run.best_step), run)
    team.wait()
    return run, pace


def _remove_best(checkpoints: UPath, but: UPath | None = None) -> None:
    """Remove the weights that were the best once."""
    for path in list(checkpoints.glob(_BEST.format("*"))):
        if but is None or path.name != but.name:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _advice_on_memory(config: TrainConfig) -> Iterator[None]:
    """Turn running out of memory, on any device, into a TrainingError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch has a class for a full GPU only; a full host is a RuntimeError of its allocator.
        words = str(error).lower()
        is_full = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
        if not (is_full or "out of memory" in words or "can't allocate memory" in words):
            raise
        raise TrainingError(
            f"Out of memory with {config.batch_tiles} tiles a step: raise accumulation_steps (now "
            f"{config.accumulation_steps}), set grad_checkpointing, or lower chip_memory_gb, and start again: the "
            "run goes on at its last checkpoint. A lower batch_tiles starts it anew."
        ) from error


class _Features(nn.Module):
    """f_S of a level as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, tower: nn.Module, level: str) -> None:
        super().__init__()
        self.tower = tower
        self._encode = image_features if level == "image" else patch_features

    def forward(self, pixels: Tensor) -> Tensor:
        return self._encode(self.tower, pixels)


@dataclass(frozen=True, eq=False)
class _Placed:
    """A batch, or a part of one, with what a step reads most on the device."""

    batch: Batch
    chips: Tensor
    photos: Tensor
    tile_of_photo: Tensor
    others: Tensor | None
    identity: Tensor | None


class _Trainer:
    """A tower, its optimizer and its data; knows one step and one validation."""

    def __init__(
        self, config: TrainConfig, clip: Clip, data: TrainingSet, device: torch.device, team: Team
    ) -> None:
        self.config, self.team, self._clip, self._device = config, team, clip, device
        self._tower = clip.model.visual
        clip.model.requires_grad_(False)
        self._tower.requires_grad_(True)
        if config.grad_checkpointing:
            self._tower.set_grad_checkpointing()
        self._features: nn.Module = _Features(self._tower, config.level)
        self._without_exchange: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        if team.size > 1:
            self._features = DistributedDataParallel(
                self._features, device_ids=[device] if device.type == "cuda" else None
            )
            self._without_exchange = self._features.no_sync
        if config.compile_backend:
            # None: those for finding faults too, such as aot_eager, which only traces.
            if config.compile_backend not in torch.compiler.list_backends(None):
                names = ", ".join(torch.compiler.list_backends())
                raise InputError(f"No compile_backend {config.compile_backend!r}: use one of {names}.")
            self._features = torch.compile(self._features, backend=config.compile_backend)
        # Batches are copied beside the step that runs on the default stream.
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._optimizer = make_optimizer(
            self._tower.parameters(), config.learning_rate, config.weight_decay, config.betas
        )
        self._side_px = round(clip.image_px * config.sensor.chip_px / config.sensor.crop_px)
        self.tiles = data.split("train")
        self.batches = Batches(
            self.tiles,
            self._chips(self.tiles, data),
            data.targets,
            crop_px=clip.image_px,
            batch_tiles=config.batch_tiles,
            photos_per_tile=config.photos_per_tile,
            max_shift=config.max_shift,
            seed=config.seed,
            rank=team.rank,
            size=team.size,
        )
        self.steps = config.steps or max(1, round(config.epochs * self.batches.per_epoch))
        if config.warmup_steps >= self.steps:
            logger.warning(
                "the warm-up of %d steps is no shorter than the run of %d: the learning rate stays below its peak",
                config.warmup_steps,
                self.steps,
            )
        seen = first_tiles(data.split("validation"), config.validation_tiles, config.seed)
        self._validation: Batch | None = None
        if not team.is_first:
            return
        if len(seen):
            self._validation = validation_batch(
                seen,
                self._chips(seen, data),
                data.targets,
                crop_px=clip.image_px,
                photos_per_tile=config.photos_per_tile,
                seed=config.seed,
            )
        else:
            logger.warning("the validation split has no tile: the last weights are kept, not the best")

    def _chips(self, tiles: Tiles, data: TrainingSet) -> Chips:
        return Chips(
            tiles,
            data.storage_root,
            chip_px=self.config.sensor.chip_px,
            side_px=self._side_px,
            memory_bytes=int(self.config.chip_memory_gb * 2**30),
            threads=self.config.decode_threads or 0,
            cache_folder=Path(self.config.chip_cache) if self.config.chip_cache else None,
        )

    def place_parts(self, batch: Batch) -> list[_Placed]:
        """The parts of a step's batch on the device, ready to use."""
        parts = batch.parts(self.config.accumulation_steps)
        if self._copies is None:
            return [self._place(part) for part in parts]
        with torch.cuda.stream(self._copies):
            placed = [self._place(part) for part in parts]
        self._copies.synchronize()
        # Freed while the step's kernels are still queued, their memory must not be taken for the next copy.
        used_on = torch.cuda.default_stream(self._device)
        for part in placed:
            for tensor in (part.chips, part.photos, part.tile_of_photo, part.others, part.identity):
                if tensor is not None:
                    tensor.record_stream(used_on)
        return placed

    def _place(self, batch: Batch) -> _Placed:
        identity = np.concatenate([batch.identity, batch.others_identity])
        return _Placed(
            batch,
            chips=self._to_device(batch.chips),
            photos=self._to_device(batch.photos),
            tile_of_photo=self._to_device(batch.tile_of_photo),
            others=self._to_device(batch.others) if len(batch.others) else None,
            identity=self._to_device(identity) if self.config.mask_shared_photos else None,
        )

    def step(self, parts: list[_Placed], step: int) -> tuple[float, float]:
        """One optimizer step.

        Args:
            parts: its batch.
            step: its number, from 0.

        Returns:
            Loss and learning rate.
        """
        config = self.config
        rate = one_cycle(self._optimizer, step, self.steps, config.warmup_steps, config.learning_rate)
        self._tower.train()
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._device)
        for number, part in enumerate(parts, start=1):
            # Processes exchange gradients once, with the last part.
            with contextlib.nullcontext() if number == len(parts) else self._without_exchange():
                loss = self._loss(self._queries(self._features, part), part) * part.batch.share
                # Gradients of several processes are averaged, but a batch's loss is the sum of their shares.
                (loss * self.team.size).backward()
            total += loss.detach()
        total = self.team.sum(total)
        check_finite(total, step)
        norm = torch.nn.utils.clip_grad_norm_(self._tower.parameters(), config.grad_clip)
        check_finite(norm, step, "gradient")
        self._optimizer.step()
        return total.item(), rate

    @torch.no_grad()
    def validate(self, run: _Run) -> Validation | None:
        """Validate, and note in the run whether this is the best so far."""
        if self._validation is None:
            run.best_step = run.step
            return None
        self._tower.eval()
        config, batch = self.config, self._validation
        # Not the distributed module: the other processes do not validate.
        features = _Features(self._tower, config.level)
        part_tiles = max(1, config.batch_tiles // config.accumulation_steps)
        parts = [
            self._queries(features, self._place(batch.part(slice(first, first + part_tiles))))
            for first in range(0, len(batch.chips), part_tiles)
        ]
        queries = torch.cat(parts)
        placed = self._place(replace(batch, chips=batch.chips[:0]))
        loss = self._loss(queries, placed)
        check_finite(loss, run.step, "validation loss")
        loss = loss.item()
        own_tile = np.arange(len(batch.chips)) if config.level == "image" else batch.tile_of_photo
        has_photo = np.isin(own_tile, batch.tile_of_photo)
        recalls = recall(
            queries[torch.from_numpy(has_photo).to(self._device)],
            placed.photos[:, : self._clip.embedding_width],
            own_tile[has_photo],
            batch.tile_of_photo,
            batch.identity,
            RECALL_AT,
        )
        validation = Validation(loss, recalls[0], recalls[1], len(batch.chips), len(batch.photos))
        run.validations.append({"step": run.step, **asdict(validation)})
        if run.step and (loss < run.best_loss or config.keep == "last"):
            run.best_step, run.best_loss = run.step, loss
        return validation

    def _queries(self, features: nn.Module, placed: _Placed) -> Tensor:
        """Embeddings of the batch's tiles (B, D), or of its photos' pixels (P, D); float32."""
        batch = placed.batch
        pixels = to_input(self._clip, batch.crops.sample(placed.chips.permute(0, 3, 1, 2).float()))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            encoded = features(pixels).float()
        if self.config.level == "image":
            return encoded
        return at_pixels(encoded, batch.position, batch.tile_of_photo, self._clip.image_px)

    def _loss(self, queries: Tensor, placed: _Placed) -> Tensor:
        if not len(placed.photos):
            # All photos left their crops: nothing to learn here, but the graph has to be there for the others.
            return queries.sum() * 0.0
        config, width = self.config, self._clip.embedding_width
        total = queries.sum() * 0.0
        for weight, first in ((config.photo_weight, 0), (config.alt_text_weight, width)):
            if weight:
                columns = slice(first, first + width)
                others = None if placed.others is None else placed.others[:, columns]
                arguments = placed.photos[:, columns], placed.tile_of_photo
                options = config.temperature, others, placed.identity
                if config.level == "image":
                    loss = image_level_loss(queries, *arguments, *options)
                else:
                    loss = pixel_level_loss(queries, *arguments, len(placed.batch.crops), *options)
                total = total + weight * loss
        return total

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._copies is None else tensor.pin_memory().to(self._device, non_blocking=True)

    def weights(self) -> dict[str, Tensor]:
        """The tower's tensors by name."""
        return {f"tower/{name}": tensor for name, tensor in self._tower.state_dict().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a run needs to go on."""
        return self.weights() | pack_optimizer(self._optimizer)

    def resume(self, path: UPath, identity: str) -> _Run | None:
        """Go on from a checkpoint of the same training; None if there is none."""
        loaded = load_checkpoint(path, self._device)
        if loaded is None or loaded[1]["identity"] != identity:
            return None
        tensors, state = loaded
        self._load_tower(tensors)
        unpack_optimizer(self._optimizer, tensors)
        run = _Run(**state["run"])
        logger.info("going on after step %d", run.step)
        return run

    def restore(self, path: UPath, run: _Run) -> None:
        """Load the best weights, unless they are the present ones."""
        if run.best_step != run.step:
            loaded = load_checkpoint(path, self._device)
            if loaded is None:
                raise TrainingError(
                    f"The best weights, of step {run.best_step}, are not at {path} any more: delete {path.parent} and "
                    "start again; one training at a time writes there."
                )
            self._load_tower(loaded[0])
        self._tower.eval()

    def _load_tower(self, tensors: dict[str, Tensor]) -> None:
        own = {
            name.removeprefix("tower/"): value for name, value in tensors.items() if name.startswith("tower/")
        }
        self._tower.load_state_dict(own)


def at_pixels(
    patches: Tensor, position: NDArray[np.float64], tile_of_photo: NDArray[np.int64], image_px: int
) -> Tensor:
    """f_S^P(s)[p]: the feature of the patch that contains each pixel.

    Args:
        patches: (B, rows, columns, D) features.
        position: (P, 2) float64, (column, row) in the image, 0 <= position < image_px.
        tile_of_photo: (P,) int64, image of each position.
        image_px: side of the images.

    Returns:
        (P, D) features.
    """
    rows, columns = patches.shape[1:3]
    column = torch.from_numpy(np.floor(position[:, 0] * columns / image_px).astype(np.int64)).to(
        patches.device
    )
    row = torch.from_numpy(np.floor(position[:, 1] * rows / image_px).astype(np.int64)).to(patches.device)
    return patches[torch.from_numpy(tile_of_photo).to(patches.device), row, column]


def recall(
    queries: Tensor,
    photos: Tensor,
    tile_of_query: NDArray[np.int64],
    tile_of_photo: NDArray[np.int64],
    identity: NDArray[np.int64],
    ks: tuple[int, ...],
) -> list[float]:
    """Recall@k: share of queries with a photo of their own tile among the k nearest photos.

    Footprints overlap: a photo under several tiles has a row for each, but is one photo, and each tile's own.

    Args:
        queries: (Q, D) L2-normalised.
        photos: (P, D) L2-normalised.
        tile_of_query: (Q,) tile of each query.
        tile_of_photo: (P,) tile of each row of `photos`.
        identity: (P,) which photo each row of `photos` is.
        ks: each k.

    Returns:
        One recall per k.
    """
    _, first, number = np.unique(identity, return_index=True, return_inverse=True)
    distinct = photos[torch.from_numpy(first).to(photos.device)]
    nearest = (queries @ distinct.T).topk(min(max(ks), len(distinct)), dim=1).indices.cpu().numpy()
    is_own = np.isin(tile_of_query[:, None] * len(distinct) + nearest, tile_of_photo * len(distinct) + number)
    return [float(is_own[:, :k].any(axis=1).mean()) for k in ks]


def model_card(
    config: TrainConfig,
    data: TrainingSet,
    clip: Clip,
    foundation_id: str,
    validations: list[dict[str, float]],
    best_step: int,
    steps: int,
) -> dict[str, Any]:
    """What model_card.json says of a satellite encoder.

    Args:
        config: how it was trained.
        data: on what.
        clip: the trained model.
        foundation_id: fingerprint of the foundation model it started from.
        validations: as in `TrainResult`.
        best_step: as in `TrainResult`.
        steps: optimizer steps of the run.

    Returns:
        The card; it holds no time of day, so that equal trainings give equal folders.
    """
    sensor = config.sensor
    by_step = {validation["step"]: validation for validation in validations}
    settings = asdict(config)
    # Where a machine keeps its weights, and on what it computes, is not the model's business.
    for name in ("sensor", "architecture", "pretrained", *COST_FIELDS):
        settings.pop(name)
    return {
        "what": f"Satellite {config.level} encoder aligned with {clip.name} through ground photos (GRAFT)",
        "level": config.level,
        "model_id": clip.fingerprint(),
        "foundation": {"name": clip.name, "model_id": foundation_id},
        "sensor": {
            "name": sensor.name,
            "collection": sensor.collection,
            "bands": list(sensor.bands),
            "gsd_m": sensor.gsd_m,
            "display_range": sensor.display_range,
            "crop_px": sensor.crop_px,
        },
        "input": {
            "image_px": clip.image_px,
            "metres_per_input_pixel": sensor.footprint_m / clip.image_px,
            "mean": list(clip.preprocess_config["mean"]),
            "std": list(clip.preprocess_config["std"]),
        },
        "training_set": {
            "fingerprint": data.fingerprint,
            "train_tiles": len(data.split("train")),
            "validation_tiles": len(data.split("validation")),
            "pairs": data.pair_count,
        },
        "training": settings | {"steps": steps, "best_step": best_step},
        "validation": by_step.get(best_step),
        # The foundation model itself, before the first step.
        "validation_before": by_step.get(0),
        "code_version": _code_version(),
        "intended_use": [
            "Zero-shot classification, retrieval and mapping of land cover and land use by text, at this "
            "sensor's resolution, in the regions and seasons that its photos cover.",
            "Scores rank; they are not calibrated probabilities. The vocabulary is the foundation model's.",
        ],
        "limits": [
            "Things that move (ships, vehicles, crowds) are not aligned: photo and scene differ in time.",
            "Biases of the foundation model and of who photographs what, where, carry over.",
            "Not for identifying or following people, and not as the sole ground of a decision about anyone.",
        ],
    }


def resolve_device(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: `auto` (CUDA if there is one, else CPU) or PyTorch's own name.

    Returns:
        The device.

    Raises:
        InputError: if PyTorch does not know it here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"Device {name!r} is not known: use auto, cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"Device {name!r} is not available on this machine: use auto or cpu.")
    return device


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _check_foundation(data: TrainingSet, clip: Clip, foundation_id: str) -> None:
    """Refuse photos in the space of another model: the encoder would be at home there, its text tower here."""
    problem = None
    if data.embeddings.shape[1] != clip.embedding_width:
        problem = f"in {data.embeddings.shape[1]} dimensions, {clip.name} has {clip.embedding_width}"
    elif data.model_id not in (None, foundation_id):
        problem = f"by model {data.model_id}, {clip.name} is {foundation_id}"
    if problem:
        raise DataError(
            f"The training set's photos were embedded {problem}: train from the model that embedded them, or "
            "materialise ground_embeddings of all regions, and the training set, again."
        )


def _code_version() -> str:
    return code_version(
        *(f"training.{name}" for name in ("augment", "data", "encoders", "loop", "losses", "optimisation"))
    )
