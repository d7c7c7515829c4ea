"""Labelled image sets of the paper's Tables 1 and 2, as published: EuroSAT, BigEarthNet, SAT-4, SAT-6, NAIP-OSM.

Pixels are decoded when they are asked for. Masks for segmentation are in mask_sets.py; scores in evaluate.py.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import rasterio
from numpy.typing import NDArray
from PIL import Image
from rasterio.errors import RasterioError

from graft_pipeline.chips import decode, to_uint8
from graft_pipeline.errors import DataError, InputError
from graft_pipeline.imagery import SENTINEL2
from graft_pipeline.manifests import partition_folder, read_table
from graft_pipeline.schemas import CHIPS, OSM_LABELS, TILES
from graft_pipeline.shards import read_member

logger = logging.getLogger(__name__)

EUROSAT_CLASSES = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
    "Residential", "River", "SeaLake",
)  # fmt: skip
SAT_CLASSES = {
    4: ("barren land", "trees", "grassland", "none"),
    6: ("building", "barren land", "trees", "grassland", "road", "water"),
}
#: Red, green and blue in the 13-band files of EuroSAT: B01, B02, B03, B04 ...
_EUROSAT_BANDS = (4, 3, 2)
_BIGEARTHNET_BANDS = ("B04", "B03", "B02")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with labels, decoded one at a time.

    Attributes:
        name: of the set; also of the prompt set that goes with it.
        classes: class names in order.
        ids: one id per image.
        labels: (N, K) bool; exactly one per row unless the set is multi-label.
        read: image number to (H, W, 3) uint8 RGB; raises DataError for an image that cannot be decoded.
        is_multi_label: whether an image may have several classes.
        skipped: samples left out while the labels were read, by reason.
    """

    name: str
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    labels: NDArray[np.bool_]
    read: Callable[[int], NDArray[np.uint8]]
    is_multi_label: bool
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ids)


def read_eurosat(folder: Path) -> ImageSet:
    """EuroSAT (Helber et al., 2019), RGB or multispectral: one folder per class.

    Args:
        folder: `2750`, `EuroSAT`, `EuroSAT_RGB`, `EuroSAT_MS`, or the folder that holds it. JPEG files are the RGB
            version; 13-band GeoTIFFs are read as B04, B03, B02 in the display range of Sentinel-2.

    Returns:
        The set; folders that are no class of EuroSAT, and classes without a folder, are counted in `skipped`.

    Raises:
        InputError: if no class folder is found.
    """
    root = _holding(folder, EUROSAT_CLASSES)
    if root is None:
        raise InputError(
            f"{folder} holds no EuroSAT: download EuroSAT_RGB.zip or EuroSAT_MS.zip "
            "(https://zenodo.org/records/7711810), unpack it, and give the folder with AnnualCrop/, Forest/ ..."
        )
    files: list[Path] = []
    numbers: list[int] = []
    skipped: Counter[str] = Counter()
    for place in sorted(path for path in root.iterdir() if path.is_dir()):
        found = sorted(file for file in place.iterdir() if file.suffix.lower() in {".jpg", ".tif"})
        if place.name not in EUROSAT_CLASSES:
            skipped["label not in the table"] += len(found)
            continue
        files += found
        numbers += [EUROSAT_CLASSES.index(place.name)] * len(found)
    absent = [name for name in EUROSAT_CLASSES if EUROSAT_CLASSES.index(name) not in set(numbers)]
    if absent:
        logger.warning("EuroSAT in %s has no image of %s", root, ", ".join(absent))
        skipped["class without images"] = len(absent)

    def read(number: int) -> NDArray[np.uint8]:
        file = files[number]
        return _rgb_file(file) if file.suffix.lower() == ".jpg" else _reflectance(file, _EUROSAT_BANDS)

    labels = np.eye(len(EUROSAT_CLASSES), dtype=bool)[numbers]
    return ImageSet(
        "eurosat", EUROSAT_CLASSES, tuple(file.stem for file in files), labels, read, False, dict(skipped)
    )


def read_bigearthnet(
    folder: Path, *, classes: Literal[19, 43] = 19, split: str | None = "test", threads: int = 8
) -> ImageSet:
    """BigEarthNet-S2, version 1 (Sumbul et al., 2019) or 2 (Clasen et al., 2024), whichever is there.

    Version 1: folders `S2A_MSIL2A_..._0_45/` with one GeoTIFF per band and `*_labels_metadata.json`, labels in 43
    classes of CORINE, made 19 by the nomenclature of Sumbul et al. (2021). Version 2: `BigEarthNet-S2/TILE/PATCH/`
    and `metadata.parquet`, labels in 19 classes. Patches that the metadata, or the lists of version 1 beside the
    folder, mark as snowy or clouded are left out, as its authors advise.

    Args:
        folder: `BigEarthNet-v1.0`, or the folder with `BigEarthNet-S2` and `metadata.parquet`.
        classes: 19 or 43; version 2 has 19.
        split: `train`, `validation`, `test`, or None for all. Version 1 needs `splits/test.csv` (one patch name
            a line) beside or inside the folder; without it all patches are read.
        threads: threads that read label files.

    Returns:
        The multi-label set; `skipped` counts snow and cloud, labels not in the table, patches without a label.

    Raises:
        InputError: if there is no such set, or version 2 is asked for 43 classes.
    """
    for root in (folder, folder / "BigEarthNet-v1.0", folder / "BigEarthNet"):
        if (root / "metadata.parquet").exists():
            if classes != 19:
                raise InputError(
                    "BigEarthNet version 2 has labels of 19 classes: ask for 19, or give version 1."
                )
            return _bigearthnet_2(root, split)
        if root.is_dir() and next(root.glob("*/*_labels_metadata.json"), None):
            return _bigearthnet_1(root, classes, split, threads)
    raise InputError(
        f"{folder} holds no BigEarthNet-S2: download version 1 or 2 (https://bigearth.net) and give the folder "
        "of the patches (version 1), or the one with BigEarthNet-S2/ and metadata.parquet (version 2)."
    )


def read_sat(
    file: Path, *, classes: Literal[4, 6] | None = None, split: Literal["test", "train"] = "test"
) -> ImageSet:
    """SAT-4 or SAT-6 (Basu et al., 2015), as its MATLAB file.

    Args:
        file: `sat-4-full.mat` or `sat-6-full.mat`, or the folder that holds it; (28, 28, 4, N) uint8 images with
            red, green, blue and infrared, and (K, N) one-hot labels.
        classes: of a folder, which of the two; None: the one that is there.
        split: `test` (paper) or `train`.

    Returns:
        The set.

    Raises:
        InputError: if there is no such file, or it is no SAT file.
        DataError: if its arrays do not fit each other.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    found = sorted(file.glob(f"sat-{classes or '?'}-full.mat")) if file.is_dir() else [file]
    if len(found) != 1 or not found[0].exists():
        raise InputError(
            f"{file} is no SAT-4 or SAT-6 file: download sat-4-full.mat or sat-6-full.mat "
            "(https://csc.lsu.edu/~saikat/deepsat/) and name one of them."
        )
    try:
        # Only this split: the other one takes a gigabyte.
        content = loadmat(found[0], variable_names=[f"{split}_x", f"{split}_y"])
        images, one_hot = content[f"{split}_x"], content[f"{split}_y"]
    except (MatReadError, ValueError, KeyError, NotImplementedError, OSError) as error:
        raise InputError(
            f"{found[0]} is no file of SAT-4 or SAT-6 ({error!r}): download it again; it needs {split}_x and {split}_y."
        ) from error
    count, labelled = images.shape[-1], one_hot.shape[-1]
    if images.shape[:3] != (28, 28, 4) or len(one_hot) not in SAT_CLASSES or count != labelled:
        raise DataError(
            f"{found[0]} has images {images.shape} and labels {one_hot.shape}, not (28, 28, 4, N) and (4 or 6, N): "
            "download it again."
        )
    classes = SAT_CLASSES[len(one_hot)]
    is_single = one_hot.sum(axis=0) == 1
    rows = np.flatnonzero(is_single)

    def read(number: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(images[:, :, :3, rows[number]])

    skipped = {"not one label": int(count - len(rows))} if len(rows) < count else {}
    ids = tuple(f"{split}-{row}" for row in rows)
    labels = one_hot.T[rows].astype(bool)
    return ImageSet(f"sat{len(classes)}", classes, ids, labels, read, False, skipped)


def read_osm_labels(
    root: Path, *, sensor: str = "naip", is_multi_label: bool = True, crop_px: int = 224
) -> ImageSet:
    """NAIP-OSM: tiles of a deployment labelled from OpenStreetMap (paper, appendix C.2), the footprint of each.

    Only tiles of the validation split: the deployment's encoders have learned the images of the others.

    Args:
        root: storage root in which `osm_labels` was materialised.
        sensor: whose tiles.
        is_multi_label: all labels of a footprint, or only footprints that one class dominates.
        crop_px: side of the footprint in chip pixels.

    Returns:
        The set, over all regions that have labels; tiles of other splits are counted in `skipped`.

    Raises:
        InputError: if no tile of the validation split has labels and a chip.
    """
    samples: list[tuple[Path, dict[str, Any]]] = []
    written: list[list[str]] = []
    skipped: Counter[str] = Counter()
    for file in sorted(
        (root / OSM_LABELS.name / f"sensor={sensor}").glob(f"region=*/{OSM_LABELS.name}.parquet")
    ):
        place = {"sensor": sensor, "region": file.parent.name.removeprefix("region=")}
        folder = partition_folder(root, CHIPS, **place)
        chips = read_table(folder / f"{CHIPS.name}.parquet", CHIPS)
        places = (
            {}
            if chips is None
            else {row["tile_id"]: row for row in chips.to_pylist() if row["status"] == "ok"}
        )
        tiles = read_table(partition_folder(root, TILES, **place) / f"{TILES.name}.parquet", TILES)
        splits = (
            {}
            if tiles is None
            else dict(zip(*tiles.select(["tile_id", "split"]).to_pydict().values(), strict=True))
        )
        labels = read_table(file, OSM_LABELS)
        for row in [] if labels is None else labels.to_pylist():
            own = row["labels"] if is_multi_label else [name for name in [row["single_label"]] if name]
            split = splits.get(row["tile_id"])
            if split != "validation":
                skipped["no tile any more" if split is None else f"tile of the split {split}"] += 1
            elif not own:
                skipped["no label" if is_multi_label else "no class dominates"] += 1
            elif row["tile_id"] not in places:
                skipped["no chip"] += 1
            else:
                samples.append((folder, places[row["tile_id"]]))
                written.append(own)
    if not samples:
        raise InputError(
            f"{root} has no labelled tiles of {sensor} in the validation split (left out: {dict(skipped)}): download "
            "an OpenStreetMap extract (https://download.geofabrik.de), name it as GRAFT_OSM_FILE, materialise "
            "osm_labels, and give the storage root."
        )
    classes = tuple(sorted({name for own in written for name in own}))

    def read(number: int) -> NDArray[np.uint8]:
        folder, row = samples[number]
        chip = decode(read_member(folder, row["shard"], row["offset"], row["size_bytes"]))
        margin = (len(chip) - crop_px) // 2
        return chip[margin : margin + crop_px, margin : margin + crop_px]

    return ImageSet(
        "naip_osm" if is_multi_label else "naip_osm_single",
        classes,
        tuple(row["tile_id"] for _, row in samples),
        np.array([[name in own for name in classes] for own in written]),
        read,
        is_multi_label,
        dict(skipped),
    )


#: Readers by the name of the set, as `graft evaluate` takes it.
READERS: dict[str, Callable[[Path], ImageSet]] = {
    "eurosat": read_eurosat,
    "bigearthnet": read_bigearthnet,
    "bigearthnet43": lambda folder: read_bigearthnet(folder, classes=43),
    "sat4": lambda file: read_sat(file, classes=4),
    "sat6": lambda file: read_sat(file, classes=6),
    "naip_osm": read_osm_labels,
    "naip_osm_single": lambda root: read_osm_labels(root, is_multi_label=False),
}


def open_image_set(name: str, folder: Path) -> ImageSet:
    """Read a set by name.

    Args:
        name: a key of READERS.
        folder: where it lies.

    Returns:
        The set.

    Raises:
        InputError: if the name is unknown, or another set lies there.
    """
    if name not in READERS:
        raise InputError(f"No image set {name!r}: use one of {', '.join(READERS)}.")
    made = READERS[name](folder)
    if made.name != name:
        raise InputError(f"{folder} holds {made.name}, not {name}: name the other file.")
    return made


def _holding(folder: Path, classes: Sequence[str]) -> Path | None:
    """The folder itself, or the one below it, that has a folder of a class."""
    below = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    for root in (folder, *below):
        if any((root / name).is_dir() for name in classes):
            return root
    return None


def _rgb_file(file: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{file} cannot be decoded ({error}): download the set again.") from error


def _reflectance(file: Path, bands: tuple[int, int, int]) -> NDArray[np.uint8]:
    try:
        with rasterio.open(file) as source:
            pixels = source.read(bands)
    except (RasterioError, IndexError) as error:
        raise DataError(f"{file} cannot be decoded ({error}): download the set again.") from error
    return to_uint8(np.moveaxis(pixels, 0, -1), SENTINEL2)


def _bigearthnet_pixels(folder: Path) -> NDArray[np.uint8]:
    bands = []
    for band in _BIGEARTHNET_BANDS:
        file = folder / f"{folder.name}_{band}.tif"
        try:
            with rasterio.open(file) as source:
                bands.append(source.read(1))
        except RasterioError as error:
            raise DataError(f"{file} cannot be decoded ({error}): download the set again.") from error
    return to_uint8(np.stack(bands, axis=-1), SENTINEL2)


def bigearthnet_nomenclature() -> dict[str, Any]:
    """The 43 classes of BigEarthNet, the 19 they are made, and which belong to which.

    Returns:
        `classes_43` and `classes_19` (lists of names) and `from_43` (class of the 43 to class of the 19; classes
        that the 19 leave out are missing).
    """
    content = (resources.files(__package__) / "bigearthnet_nomenclature.json").read_text(encoding="utf-8")
    merged: dict[str, list[str]] = json.loads(content)
    from_43 = {old: new for new, olds in merged.items() if new for old in olds}
    return {
        "classes_43": [old for olds in merged.values() for old in olds],
        "classes_19": [new for new in merged if new],
        "from_43": from_43,
    }


def _bigearthnet_1(root: Path, classes: int, split: str | None, threads: int) -> ImageSet:
    tables = bigearthnet_nomenclature()
    names = tuple(tables["classes_19"] if classes == 19 else tables["classes_43"])
    renamed = tables["from_43"] if classes == 19 else {name: name for name in names}
    listed = _listed(root, f"splits/{split}.csv") if split else None
    if split and listed is None:
        logger.warning("%s has no splits/%s.csv: all patches are read", root, split)
    shunned = {
        patch
        for name in ("patches_with_seasonal_snow.csv", "patches_with_cloud_and_shadow.csv")
        for patch in _listed(root, name) or ()
    }
    skipped: Counter[str] = Counter()
    folders = []
    for place in sorted(root.iterdir()):
        if not place.is_dir() or (listed is not None and place.name not in listed) or place.name == "splits":
            continue
        if place.name in shunned:
            skipped["snow or cloud"] += 1
        else:
            folders.append(place)

    def labels_of(place: Path) -> list[str] | None:
        try:
            content = json.loads((place / f"{place.name}_labels_metadata.json").read_text(encoding="utf-8"))
            return [str(label) for label in content["labels"]]
        except (OSError, json.JSONDecodeError, KeyError, TypeError):
            return None

    with ThreadPoolExecutor(threads) as pool:
        written = list(pool.map(labels_of, folders))
    known = set(tables["classes_43"])
    return _multi_label(
        "bigearthnet" if classes == 19 else "bigearthnet43", names, folders, written, known, renamed, skipped
    )


def _bigearthnet_2(root: Path, split: str | None) -> ImageSet:
    names = tuple(bigearthnet_nomenclature()["classes_19"])
    columns = ["patch_id", "labels", "split", "contains_seasonal_snow", "contains_cloud_or_shadow"]
    try:
        rows = pq.read_table(root / "metadata.parquet", columns=columns).to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{root / 'metadata.parquet'} is not BigEarthNet's ({error}): it needs the columns {columns}."
        ) from error
    skipped: Counter[str] = Counter()
    folders, written = [], []
    for row in sorted(rows, key=lambda row: row["patch_id"]):
        if split and row["split"] != split:
            continue
        if row["contains_seasonal_snow"] or row["contains_cloud_or_shadow"]:
            skipped["snow or cloud"] += 1
            continue
        patch = row["patch_id"]
        folders.append(root / "BigEarthNet-S2" / patch.rsplit("_", 2)[0] / patch)
        written.append(row["labels"])
    return _multi_label(
        "bigearthnet", names, folders, written, set(names), {name: name for name in names}, skipped
    )


def _multi_label(
    name: str,
    classes: tuple[str, ...],
    folders: Sequence[Path],
    written: Iterable[list[str] | None],
    known: set[str],
    renamed: Mapping[str, str],
    skipped: Counter[str],
) -> ImageSet:
    """A set of BigEarthNet from patches and the labels written for them."""
    number_of = {label: number for number, label in enumerate(classes)}
    kept, rows = [], []
    for place, labels in zip(folders, written, strict=True):
        if labels is None:
            skipped["unreadable labels"] += 1
            continue
        unknown = [label for label in labels if label not in known]
        if unknown:
            skipped["label not in the table"] += 1
            continue
        own = {number_of[renamed[label]] for label in labels if label in renamed}
        if not own:
            skipped["no label of these classes"] += 1
            continue
        kept.append(place)
        rows.append(np.isin(np.arange(len(classes)), list(own)))
    labels_of = np.stack(rows) if rows else np.zeros((0, len(classes)), bool)
    return ImageSet(
        name,
        classes,
        tuple(place.name for place in kept),
        labels_of,
        lambda number: _bigearthnet_pixels(kept[number]),
        True,
        dict(skipped),
    )


def _listed(root: Path, name: str) -> set[str] | None:
    """Patch names in a file of one name a line, inside a folder or beside it; None without one."""
    for file in (root / name, root.parent / name):
        if file.exists():
            return {line.split(",")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()} - {
                ""
            }
    return None
