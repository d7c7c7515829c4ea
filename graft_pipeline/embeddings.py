"""Tables of vectors and scores over photos and chips: what is computed anew, what is kept, and in which rows.

The models themselves are handed in as callables; they live in resources and training.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from upath import UPath

from graft_pipeline.errors import DataError
from graft_pipeline.progress import Report
from graft_pipeline.schemas import CHIP_EMBEDDINGS, GROUND_EMBEDDINGS, OUTDOOR_PHOTOS
from graft_pipeline.shards import read_member

#: Encoded images in, (N, D) float32 L2-normalised vectors out.
EmbedImages = Callable[[Sequence[bytes]], np.ndarray]

BATCH = 512


class OutdoorClassifier(Protocol):
    """A scene classifier in either of its forms (resources/scene_classifier.py)."""

    classifier_id: str
    needs_images: bool
    #: Fingerprint of the foundation model whose embeddings it scores; None for one that needs images.
    embedding_model_id: str | None

    def score(self, embeddings: np.ndarray) -> np.ndarray:
        """Outdoor probabilities (N,) of foundation embeddings (N, D)."""
        ...

    def score_images(self, contents: Sequence[bytes]) -> np.ndarray:
        """Outdoor probabilities (N,) of encoded images."""
        ...


def read_images(folder: UPath, rows: pa.Table) -> list[bytes]:
    """Read stored images or chips.

    Args:
        folder: folder of the shards.
        rows: rows with shard, offset and size_bytes.

    Returns:
        The members' bytes in the rows' order.
    """
    places = rows.select(["shard", "offset", "size_bytes"]).to_pylist()
    return [read_member(folder, place["shard"], place["offset"], place["size_bytes"]) for place in places]


def vectors_of(table: pa.Table) -> np.ndarray:
    """The (N, D) float32 matrix of a table's `embedding` column."""
    if table.num_rows == 0:
        return np.zeros((0, 0), np.float32)
    column = table["embedding"].combine_chunks()
    return np.asarray(column.flatten(), np.float32).reshape(table.num_rows, -1)


def to_column(vectors: np.ndarray) -> pa.Array:
    """The Arrow list column of an (N, D) matrix."""
    count, width = vectors.shape if vectors.size else (len(vectors), 0)
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * width)
    return pa.ListArray.from_arrays(offsets, pa.array(vectors.astype(np.float32).ravel()))


def embed_photos(
    images: pa.Table,
    known: pa.Table,
    folder: UPath,
    embed: EmbedImages,
    model_id: str,
    report: Report | None = None,
) -> pa.Table:
    """Embed the stored images that this model has not embedded yet.

    Args:
        images: GROUND_IMAGES rows of one region.
        known: GROUND_EMBEDDINGS rows of an earlier materialisation.
        folder: folder of the image shards.
        embed: the foundation model.
        model_id: its fingerprint; vectors of another model are dropped.
        report: progress.

    Returns:
        GROUND_EMBEDDINGS rows of all ok images, sorted by photo_id.
    """
    ok = images.filter(pc.equal(images["status"], "ok"))
    kept = known.filter(
        pc.and_(
            pc.equal(known["model_id"], model_id),
            pc.is_in(known["photo_id"], ok["photo_id"].combine_chunks()),
        )
    )
    todo = ok.filter(pc.invert(pc.is_in(ok["photo_id"], kept["photo_id"].combine_chunks())))
    parts = [kept]
    for start in range(0, todo.num_rows, BATCH):
        rows = todo.slice(start, BATCH)
        vectors = embed(read_images(folder, rows))
        columns = {
            "photo_id": rows["photo_id"],
            "embedding": to_column(vectors),
            "model_id": pa.array([model_id] * rows.num_rows),
        }
        parts.append(pa.table(columns).cast(GROUND_EMBEDDINGS.schema))
        if report:
            report(start + rows.num_rows, todo.num_rows)
    return pa.concat_tables(parts).sort_by("photo_id")


def score_outdoor(
    embedded: pa.Table,
    images: pa.Table,
    known: pa.Table,
    folder: UPath,
    classifier: OutdoorClassifier,
    threshold: float,
    report: Report | None = None,
) -> pa.Table:
    """Score the photos that this classifier has not scored yet, and decide which of all show the outdoors.

    Args:
        embedded: GROUND_EMBEDDINGS rows, in any order.
        images: GROUND_IMAGES rows, in any order.
        known: OUTDOOR_PHOTOS rows of an earlier materialisation; scores of another classifier are dropped.
        folder: folder of the image shards, read only for a classifier that needs pixels.
        classifier: the scene classifier.
        threshold: least score of an outdoor photo; decisions are made anew from all scores.
        report: progress.

    Returns:
        OUTDOOR_PHOTOS rows, one for each embedded photo whose image is stored, sorted by photo_id.

    Raises:
        DataError: if the classifier scores embeddings, and these are of another foundation model than its own.
    """
    ok = images.filter(pc.equal(images["status"], "ok"))
    embedded = embedded.filter(pc.is_in(embedded["photo_id"], ok["photo_id"].combine_chunks()))
    classifier_id = classifier.classifier_id
    kept = known.filter(
        pc.and_(
            pc.equal(known["classifier_id"], classifier_id),
            pc.is_in(known["photo_id"], embedded["photo_id"].combine_chunks()),
        )
    )
    todo = embedded.filter(pc.invert(pc.is_in(embedded["photo_id"], kept["photo_id"].combine_chunks())))
    models = set() if classifier.needs_images else set(pc.unique(todo["model_id"]).to_pylist())
    if others := sorted(models - {classifier.embedding_model_id}):
        raise DataError(
            f"Photos are embedded by the foundation model {', '.join(others)}, the scene classifier's is "
            f"{classifier.embedding_model_id}: materialise ground_embeddings of the region first."
        )
    parts = [kept.select(["photo_id", "outdoor_score"])]
    for start in range(0, todo.num_rows, BATCH):
        rows = todo.slice(start, BATCH)
        if classifier.needs_images:
            places = ok.take(pc.index_in(rows["photo_id"], ok["photo_id"].combine_chunks()))
            scores = classifier.score_images(read_images(folder, places))
        else:
            scores = classifier.score(vectors_of(rows))
        scored = {"photo_id": rows["photo_id"], "outdoor_score": pa.array(np.asarray(scores, np.float32))}
        parts.append(pa.table(scored).cast(parts[0].schema))
        if report:
            report(start + rows.num_rows, todo.num_rows)
    table = pa.concat_tables(parts).sort_by("photo_id")
    scores = table["outdoor_score"].to_numpy()
    columns = {
        "photo_id": table["photo_id"],
        "outdoor_score": table["outdoor_score"],
        "is_outdoor": pa.array(scores >= threshold),
        "classifier_id": pa.array([classifier_id] * table.num_rows, pa.string()),
    }
    return pa.table(columns).cast(OUTDOOR_PHOTOS.schema)


def images_where(images: pa.Table, outdoor: pa.Table, *, is_outdoor: bool) -> pa.Table:
    """Rows of GROUND_IMAGES whose photo was decided to be outdoor, or indoor."""
    chosen = outdoor.filter(pc.equal(outdoor["is_outdoor"], is_outdoor))["photo_id"].combine_chunks()
    return images.filter(pc.is_in(images["photo_id"], chosen))


def embed_chips(
    chips: pa.Table,
    tiles: pa.Table,
    known: pa.Table,
    folder: UPath,
    embed: Callable[[Iterable[bytes]], np.ndarray],
    model_id: str,
    report: Report | None = None,
) -> pa.Table:
    """Embed the stored chips that this satellite encoder has not embedded yet, or not as they are now.

    Args:
        chips: CHIPS rows of one region.
        tiles: TILES rows of the region.
        known: CHIP_EMBEDDINGS rows of an earlier materialisation.
        folder: folder of the chip shards.
        embed: the satellite encoder: encoded chips to (N, D) float32.
        model_id: its fingerprint; vectors of another encoder are dropped.
        report: progress.

    Returns:
        CHIP_EMBEDDINGS rows of all tiles' ok chips, sorted by tile_id.
    """
    ok = chips.filter(pc.equal(chips["status"], "ok"))
    known = known.filter(pc.is_in(known["tile_id"], tiles["tile_id"].combine_chunks()))
    # A chip that was fetched anew is embedded anew, and one that is no more is not kept.
    stored = ok["sha256"].take(pc.index_in(known["tile_id"], ok["tile_id"].combine_chunks()))
    is_current = pc.and_(pc.equal(known["model_id"], model_id), pc.equal(known["chip_sha256"], stored))
    kept = known.filter(pc.fill_null(is_current, False))
    todo = ok.filter(pc.invert(pc.is_in(ok["tile_id"], kept["tile_id"].combine_chunks())))
    todo = todo.select(["tile_id", "shard", "offset", "size_bytes", "sha256"]).join(
        tiles.select(["tile_id", "center_lon_deg", "center_lat_deg"]), "tile_id", join_type="inner"
    )
    todo = todo.sort_by("tile_id")
    parts = [kept]
    for start in range(0, todo.num_rows, BATCH):
        rows = todo.slice(start, BATCH)
        vectors = embed(read_images(folder, rows))
        columns = {
            "tile_id": rows["tile_id"],
            "center_lon_deg": rows["center_lon_deg"],
            "center_lat_deg": rows["center_lat_deg"],
            "embedding": to_column(vectors),
            "model_id": pa.array([model_id] * rows.num_rows),
            "chip_sha256": rows["sha256"],
        }
        parts.append(pa.table(columns).cast(CHIP_EMBEDDINGS.schema))
        if report:
            report(start + rows.num_rows, todo.num_rows)
    return pa.concat_tables(parts).sort_by("tile_id")
