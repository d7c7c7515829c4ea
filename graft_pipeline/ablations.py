"""The paper's ablations as data: which variants of GRAFT there are, what each learns from, how the table looks.

A variant is trained by assets/ablations.py; what fields of a configuration mean is said in training/loop.py.
"""

import filecmp
import os
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from graft_pipeline import chips, pairing, photos, sampling, training_sets
from graft_pipeline.errors import InputError
from graft_pipeline.imagery import Sensor
from graft_pipeline.manifests import (
    is_local,
    partial_files,
    partition_file,
    partition_folder,
    publish,
    read_table,
    write_table,
)
from graft_pipeline.regions import Region
from graft_pipeline.sampling import Mode
from graft_pipeline.schemas import (
    CHIPS,
    FLICKR_PHOTOS,
    GROUND_EMBEDDINGS,
    GROUND_IMAGES,
    OUTDOOR_PHOTOS,
    PAIRS,
    SCENES,
    TILES,
    Dataset,
)

if TYPE_CHECKING:
    from upath import UPath

#: File beside a snapshot's embeddings: (P, D) float32, f_T of each photo's title and tags; zero without either.
ALT_TEXTS = "alt_text_embeddings.npy"

#: Prefix of shards that lie in the main dataset and are linked to.
_LINKED = "main-"

#: (title and tags, N of them) in, (N, D) float32 out.
Embed = Callable[[Sequence[str]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Variant:
    """One way to train a satellite encoder.

    Attributes:
        name: short name, unique.
        says: what it is, in words.
        level: `image` trains f_S^I, `pixel` f_S^P.
        sampling: how its tiles are chosen; see `sampling.sample_tiles`.
        is_outdoor_only: whether indoor photos are left out.
        fields: fields of TrainConfig that differ from the recipe's.
    """

    name: str
    says: str
    level: Literal["image", "pixel"] = "image"
    sampling: Mode = "non_overlapping"
    is_outdoor_only: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_main_data(self) -> bool:
        """Whether it learns from the sensor's own training set."""
        return self.sampling == "non_overlapping" and self.is_outdoor_only

    @property
    def data_name(self) -> str:
        """Name of what it learns from; variants that share it share tiles, chips and pairs."""
        return f"{self.sampling}-{'outdoor' if self.is_outdoor_only else 'all'}"

    @property
    def needs_alt_text(self) -> bool:
        """Whether it learns from titles and tags."""
        return bool(self.fields.get("alt_text_weight"))


#: GRAFT itself, which every other variant is compared with, and then the paper's ablations (section 4.4; 3.2
#: for photos).
VARIANTS = (
    Variant("graft", "images of outdoor photos, tiles that keep their distance"),
    Variant("random_tiles", "as many tiles, centred on photos drawn at random", sampling="random"),
    Variant(
        "alt_text",
        "titles and tags instead of images",
        fields={"photo_weight": 0.0, "alt_text_weight": 1.0},
    ),
    Variant("images_and_alt_text", "titles and tags as auxiliary loss", fields={"alt_text_weight": 0.5}),
    Variant("pixel_level", "Eq. 3 instead of Eq. 2", level="pixel"),
    Variant("all_photos", "indoor photos too", is_outdoor_only=False),
)

#: Scores of a variant, by column: which of `training.zero_shot.scoring`'s task and metric each is.
SCORES = {
    "accuracy": ("classification", "accuracy"),
    "mean_average_precision": ("retrieval", "mAP"),
    "mean_average_precision_at_20": ("retrieval", "mAP@20"),
    "segmentation_accuracy": ("segmentation", "per-class accuracy"),
    "mean_iou": ("segmentation", "mIoU"),
}


def variants_named(names: Iterable[str]) -> list[Variant]:
    """Variants by name, in the order of `VARIANTS`.

    Args:
        names: names; none: all.

    Returns:
        The variants.

    Raises:
        InputError: if there is none of a name.
    """
    wanted = set(names)
    known = [variant.name for variant in VARIANTS]
    if unknown := sorted(wanted - set(known)):
        raise InputError(f"No ablation {', '.join(unknown)}: use some of {', '.join(known)}.")
    return [variant for variant in VARIANTS if not wanted or variant.name in wanted]


def variant_root(root: "UPath", sensor: Sensor, variant: Variant) -> "UPath":
    """Storage root of what a variant learns from: the deployment's own, or one below it of the same layout.

    Args:
        root: the deployment's storage root.
        sensor: the sensor.
        variant: the variant.

    Returns:
        The root; chips of the variant's training set are relative to it.
    """
    if variant.is_main_data:
        return root
    return root / "ablations" / f"sensor={sensor.name}" / f"data={variant.data_name}"


def variant_roots(root: "UPath") -> list["UPath"]:
    """Storage roots below a deployment's own that `variant_root` names and that exist.

    Args:
        root: the deployment's storage root.

    Returns:
        The roots, of all sensors and variants, sorted.
    """
    return sorted(root.glob("ablations/sensor=*/data=*"), key=str)


def make_region(
    root: "UPath",
    region: Region,
    sensor: Sensor,
    variant: Variant,
    fetch: chips.Fetch,
    *,
    concurrency: int,
    max_attempts: int,
    photos_per_tile: int,
    seed: int,
    validation_fraction: float,
    today: date,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Make a region's tiles, chips and pairs anew for a variant, below `variant_root`; the main ones stay as they are.

    Chips of tiles that the main dataset has too are linked, not fetched; embeddings are linked.

    Args:
        root: the deployment's storage root, in which the region is collected.
        region: the region.
        sensor: the sensor.
        variant: a variant with data of its own.
        fetch: see `chips.update`.
        concurrency: see there.
        max_attempts: see there.
        photos_per_tile: see `pairing.make_pairs`.
        seed: of random tiles.
        validation_fraction: see `sampling.sample_tiles`.
        today: see `chips.update`.
        progress: called with (done, total) chips.

    Returns:
        Number of chips that the main dataset does not have.
    """
    here = variant_root(root, sensor, variant)
    place = {"sensor": sensor.name, "region": region.key}
    taken = _read(root, FLICKR_PHOTOS, region=region.key)
    outdoor = _read(root, OUTDOOR_PHOTOS, region=region.key)
    if not variant.is_outdoor_only:
        position = outdoor.schema.get_field_index("is_outdoor")
        everything = pa.array(np.ones(outdoor.num_rows, dtype=bool))
        outdoor = outdoor.set_column(position, OUTDOOR_PHOTOS.schema.field("is_outdoor"), everything)
    usable = photos.eligible(taken, _read(root, GROUND_IMAGES, region=region.key), outdoor)
    tiles = sampling.sample_tiles(
        usable,
        region,
        sensor,
        None,
        mode=variant.sampling,
        seed=seed,
        validation_fraction=validation_fraction,
    )
    write_table(partition_file(here, TILES, **place), tiles, TILES)
    linked = _link_chips(root, here, tiles, place)
    made, _ = chips.update(
        tiles,
        _read(root, SCENES, **place),
        taken,
        sensor,
        partition_folder(here, CHIPS, **place),
        fetch,
        concurrency=concurrency,
        max_attempts=max_attempts,
        today=today,
        progress=progress,
    )
    table = pairing.make_pairs(tiles, made, usable, region, sensor, photos_per_tile)
    write_table(partition_file(here, PAIRS, **place), table, PAIRS)
    for dataset in (GROUND_EMBEDDINGS, GROUND_IMAGES):
        source = partition_file(root, dataset, region=region.key)
        if source.exists():
            _link(source, partition_file(here, dataset, region=region.key))
    return int(made.num_rows) - linked


def write_alt_texts(root: "UPath", snapshot: "UPath", embed: Embed) -> int:
    """Write f_T of the titles and tags of a training set's photos beside f_G of the photos.

    Args:
        root: storage root with the photos' metadata.
        snapshot: folder of the training set.
        embed: the foundation model's text encoder, f_T.

    Returns:
        Number of photos with a title or tags.
    """
    table = training_sets.read(snapshot, ["photo_id", "region", "embedding_row"])
    matrix: npt.NDArray[np.float32] | None = None
    described = 0
    with partial_files(snapshot, ALT_TEXTS) as (partial,):
        for key in sorted(pc.unique(table["region"]).to_pylist()):
            of_region = table.filter(pc.equal(table["region"], key))
            row_of = dict(
                zip(*(of_region[name].to_pylist() for name in ("photo_id", "embedding_row")), strict=True)
            )
            metadata = _read(root, FLICKR_PHOTOS, region=key).select(["photo_id", "title", "tags"])
            texts = {
                row_of[photo["photo_id"]]: text
                for photo in metadata.to_pylist()
                if photo["photo_id"] in row_of and (text := alt_text(photo["title"], photo["tags"]))
            }
            if not texts:
                continue
            distinct = sorted(set(texts.values()))
            vectors = embed(distinct)
            if matrix is None:
                shape = (pc.max(table["embedding_row"]).as_py() + 1, vectors.shape[1])
                matrix = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
            number_of = {text: number for number, text in enumerate(distinct)}
            matrix[list(texts)] = vectors[[number_of[text] for text in texts.values()]]
            described += len(texts)
        if matrix is None:
            raise InputError(
                f"No photo of {snapshot} has a title or tags: there is no alt-text to learn from."
            )
        matrix.flush()  # type: ignore[attr-defined]
        target = snapshot / ALT_TEXTS
        is_same = is_local(target) and target.exists() and filecmp.cmp(partial, str(target), shallow=False)
        if not is_same:
            publish(partial, target)
    return described


def alt_text(title: str | None, tags: str | None) -> str:
    """The alt-text of a photo: its title and its tags, as their owner wrote them.

    Args:
        title: may be missing.
        tags: separated by spaces; may be missing.

    Returns:
        One text, empty without either.
    """
    return " ".join(part for part in (title, tags) if part)


def summarise(rows: pa.Table) -> list[dict[str, Any]]:
    """Scores of each variant over its seeds, beside those of `graft`.

    Args:
        rows: ABLATIONS rows of one sensor and setup, which names the sensor's training set too.

    Returns:
        A row for each variant, in the order of `VARIANTS`: variant, seeds, train_tiles, train_pairs and for each
        score its mean, `{score}_low` and `{score}_high` over the seeds, and `{score}_gain`, the mean over seeds that
        both have of the difference to `graft`.
    """
    by_variant = {
        variant.name: {row["seed"]: row for row in rows.to_pylist() if row["variant"] == variant.name}
        for variant in VARIANTS
    }
    base = by_variant[VARIANTS[0].name]
    summary = []
    for name, by_seed in by_variant.items():
        if not by_seed:
            continue
        first = next(iter(by_seed.values()))
        row = {"variant": name, "seeds": len(by_seed)}
        row |= {column: first[column] for column in ("train_tiles", "train_pairs")}
        for score in SCORES:
            values = [of[score] for of in by_seed.values()]
            gains = [of[score] - base[seed][score] for seed, of in by_seed.items() if seed in base]
            row |= {
                score: statistics.fmean(values),
                f"{score}_low": min(values),
                f"{score}_high": max(values),
            }
            row[f"{score}_gain"] = statistics.fmean(gains) if gains else None
        summary.append(row)
    return summary


def to_markdown(summary: Sequence[Mapping[str, Any]]) -> str:
    """The table of `summarise` for people.

    Args:
        summary: its rows.

    Returns:
        Markdown: each score as mean, (lowest to highest) and difference to `graft`.
    """

    def cell(row: Mapping[str, Any], score: str) -> str:
        gain = row[f"{score}_gain"]
        difference = "" if gain is None or row["variant"] == VARIANTS[0].name else f" **{gain:+.3f}**"
        return f"{row[score]:.3f} ({row[f'{score}_low']:.3f} to {row[f'{score}_high']:.3f}){difference}"

    says = {variant.name: variant.says for variant in VARIANTS}
    titles = ["variant", "", "seeds", "tiles", "pairs", *(score.replace("_", " ") for score in SCORES)]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in summary:
        cells = [row["variant"], says[row["variant"]], row["seeds"], row["train_tiles"], row["train_pairs"]]
        lines.append("| " + " | ".join([*map(str, cells), *(cell(row, score) for score in SCORES)]) + " |")
    return "\n".join(lines) + "\n"


def _read(root: "UPath", dataset: Dataset, **place: str) -> pa.Table:
    table = read_table(partition_file(root, dataset, **place), dataset)
    return dataset.empty() if table is None else table


def _link_chips(root: "UPath", here: "UPath", tiles: pa.Table, place: dict[str, str]) -> int:
    """Put chips that the main dataset has of these tiles into the variant's index; returns how many."""
    main = _read(root, CHIPS, **place)
    usable = pc.and_(
        pc.equal(main["status"], "ok"), pc.is_in(main["tile_id"], tiles["tile_id"].combine_chunks())
    )
    shared = main.filter(usable)
    for shard in pc.unique(shared["shard"]).to_pylist():
        folders = (partition_folder(at, CHIPS, **place) for at in (root, here))
        source, target = (
            folder / name for folder, name in zip(folders, (shard, _LINKED + shard), strict=True)
        )
        _link(source, target)
    names = pc.binary_join_element_wise(pa.scalar(_LINKED), shared["shard"], "")
    shared = shared.set_column(shared.schema.get_field_index("shard"), CHIPS.schema.field("shard"), names)
    # What an earlier call fetched, of whatever tiles, was paid for.
    known = _read(here, CHIPS, **place)
    kept = known.filter(pc.invert(pc.is_in(known["tile_id"], shared["tile_id"].combine_chunks())))
    write_table(partition_file(here, CHIPS, **place), pa.concat_tables([kept, shared]), CHIPS)
    return int(shared.num_rows)


def _link(source: "UPath", target: "UPath") -> None:
    """Give a file that is only ever replaced, never changed, a second name; object stores copy it."""
    if not is_local(target):
        target.fs.copy(source.path, target.path)
        return
    old, new = Path(str(source)), Path(str(target))
    if new.exists() and old.samefile(new):
        return
    with partial_files(target.parent, new.name) as (partial,):
        try:
            os.link(old, partial)
        except OSError:
            # Not every file system has links.
            shutil.copyfile(old, partial)
        partial.replace(new)
