"""A toy world of coloured squares: photos and chips whose colour is their class, and captions that say so."""

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
from rasterio.io import MemoryFile
from upath import UPath

from graft_pipeline.imagery import Sensor
from graft_pipeline.schemas import TRAINING_PAIRS
from graft_pipeline.shards import ShardWriter
from training.foundation import FoundationConfig, train_foundation

TOY = Sensor(name="toy", collection="none", bands=("R", "G", "B"), gsd_m=1.0, chip_px=64, crop_px=32)
COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 200), "yellow": (220, 210, 40)}
SMALL = FoundationConfig(
    image_px=16,
    patch_px=8,
    width=32,
    head_width=16,
    vision_layers=1,
    text_layers=1,
    context=12,
    steps=40,
    batch_size=32,
    learning_rate=3e-3,
    warmup_steps=5,
)


def coloured(names, side_px, random):
    """Noisy squares of the named colours, (N, side_px, side_px, 3) uint8."""
    base = np.array([COLOURS[name] for name in names], dtype=float)[:, None, None]
    noisy = base + random.normal(0, 25, (len(names), side_px, side_px, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def tiff(image):
    """Bytes of a lossless RGB GeoTIFF."""
    profile = {
        "driver": "GTiff",
        "width": image.shape[1],
        "height": image.shape[0],
        "count": 3,
        "dtype": "uint8",
    }
    transform = rasterio.Affine(1, 0, 500_000, 0, -1, 4_700_000)
    with MemoryFile() as memory:
        with memory.open(**profile, crs="EPSG:32619", transform=transform, compress="deflate") as file:
            file.write(image.transpose(2, 0, 1))
        return memory.read()


@dataclass
class ToyWorld:
    """Where things lie, and what they show.

    Attributes:
        root: storage root.
        folder: snapshot folder of the training set.
        foundation: open_clip folder of the small CLIP.
        photo_class: colour name by photo id.
        positions: (column, row) in the chip by (tile id, photo id).
    """

    root: UPath
    folder: UPath
    foundation: UPath
    photo_class: dict
    positions: dict

    @property
    def architecture(self):
        return f"local-dir:{self.foundation}"


def write_training_set(root, folder, tiles, embed, model_id, seed=0):
    """Tiles are (id, split, [(photo id, colour, column, row)]); their chips show a quadrant per colour."""
    random = np.random.default_rng(seed)
    rows, photos = [], []
    (root / "chips").mkdir(parents=True)
    with ShardWriter(root / "chips", "chips-00000.tar") as shard:
        for tile_id, split, tile_photos in tiles:
            chip = coloured([tile_photos[0][1]], TOY.chip_px, random)[0]
            for _, colour, column, row in tile_photos:
                top, left = int(row) // 32 * 32, int(column) // 32 * 32
                chip[top : top + 32, left : left + 32] = coloured([colour], 32, random)[0]
            place = shard.add(f"{tile_id}.tif", tiff(chip))
            for photo_id, colour, column, row in tile_photos:
                photos.append((photo_id, colour))
                rows.append(
                    {
                        "tile_id": tile_id,
                        "photo_id": photo_id,
                        "region": "N42W072",
                        "split": split,
                        "col_px": float(column),
                        "row_px": float(row),
                        "lon_deg": -71.0,
                        "lat_deg": 42.0,
                        "chip_shard": "chips/chips-00000.tar",
                        "chip_offset": place.offset,
                        "chip_size_bytes": place.size_bytes,
                        "model_id": model_id,
                    }
                )
    ids = sorted(photo_id for photo_id, _ in photos)
    colour_of = dict(photos)
    images = coloured([colour_of[photo_id] for photo_id in ids], 24, random)
    folder.mkdir(parents=True)
    buffer = io.BytesIO()
    np.save(buffer, embed(list(images)).astype(np.float32))
    (folder / "ground_embeddings.npy").write_bytes(buffer.getvalue())
    for row in rows:
        row["embedding_row"] = ids.index(row["photo_id"])
    table = pa.Table.from_pylist(rows, schema=TRAINING_PAIRS.schema)
    with (folder / "training_set.parquet").open("wb") as file:
        pq.write_table(table, file)
    return colour_of


@pytest.fixture(scope="session")
def paint():
    """Noisy squares of named colours, see `coloured`."""
    return coloured


@pytest.fixture(scope="session")
def toy_captions():
    random = np.random.default_rng(7)
    names = random.choice(list(COLOURS), 256)
    return list(coloured(names, 24, random)), [f"a photo of {name}" for name in names]


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory, toy_captions):
    from PIL import Image

    from resources.foundation import FoundationModel

    root = UPath(tmp_path_factory.mktemp("storage"))
    foundation = root / "models" / "foundation"
    train_foundation(*toy_captions, foundation, SMALL)
    model = FoundationModel.from_folder(foundation, device="cpu")
    random = np.random.default_rng(1)
    tiles, positions = [], {}
    for number in range(60):
        tile_id = f"toy-{number:03d}"
        photos = []
        colours = random.choice(list(COLOURS), 4)
        for place in range(1 + number % 5):
            # Photos lie in the footprint, the central half of the chip; each quadrant has one colour.
            column, row = random.uniform(16, 48, 2)
            quadrant = int(column) // 32 + 2 * (int(row) // 32)
            photos.append((f"p{number:03d}{place}", str(colours[quadrant]), column, row))
            positions[tile_id, photos[-1][0]] = (column, row)
        tiles.append((tile_id, "validation" if number % 6 == 0 else "train", photos))
    folder = root / "training_set" / "sensor=toy" / "snapshot=0123456789abcdef"
    photo_class = write_training_set(
        root,
        folder,
        tiles,
        lambda images: model.embed_images([Image.fromarray(image) for image in images]),
        model.model_id,
    )
    return ToyWorld(root, folder, foundation, photo_class, positions)


@pytest.fixture(scope="session")
def crowded(toy_world, tmp_path_factory):
    """The toy training set, but photos lie under several tiles, as a version that named no model wrote it."""
    folder = UPath(tmp_path_factory.mktemp("crowded") / "snapshot=crowded")
    folder.mkdir()
    table = pq.read_table(str(toy_world.folder / "training_set.parquet"))
    column = table.schema.get_field_index("embedding_row")
    shared = pa.array(np.asarray(table["embedding_row"]) % 40, pa.int64())
    table = table.set_column(column, table.schema.field(column), shared)
    pq.write_table(table.drop_columns(["model_id"]), str(folder / "training_set.parquet"))
    (folder / "ground_embeddings.npy").write_bytes((toy_world.folder / "ground_embeddings.npy").read_bytes())
    texts = np.load(str(folder / "ground_embeddings.npy"))[:, ::-1]
    np.save(str(folder / "alt_text_embeddings.npy"), texts)
    return folder
