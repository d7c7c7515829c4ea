"""SUN397 as its authors publish it: image folders, official splits, and which classes are indoors or outdoors.

Nothing is learned here; scenes.py trains on what this module reads. Xiao, Hays, Ehinger, Oliva, Torralba: SUN
Database, CVPR 2010.
"""

import csv
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from graft_pipeline.errors import InputError

logger = logging.getLogger(__name__)

#: Numbers of the two sides, as a scene classifier's outputs.
INDOOR, OUTDOOR = 0, 1
#: Columns of the first level of the authors' hierarchy, and the side that each is.
_LEVEL_1 = {"indoor": INDOOR, "outdoor, natural": OUTDOOR, "outdoor, man-made": OUTDOOR}
_CATEGORY = "category"
#: Sheet of the workbook; its other one has all 908 categories of the SUN database.
_SHEET = "SUN397"
_SPLITS = range(1, 11)


@dataclass(frozen=True, eq=False)
class LabelledFiles:
    """Images and their sides.

    Attributes:
        images: files.
        labels: (N,) int64, INDOOR or OUTDOOR.
    """

    images: tuple[Path, ...]
    labels: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sun397:
    """One of the ten official splits.

    Attributes:
        train: images to learn from.
        test: images to validate on.
        classes: classes that are used.
        ambiguous: classes that the hierarchy puts on both sides; their images are left out.
        absent: images that the split lists and the folder lacks.
    """

    train: LabelledFiles
    test: LabelledFiles
    classes: tuple[str, ...]
    ambiguous: tuple[str, ...]
    absent: int


def read_sun397(
    folder: Path, split: int = 1, *, partitions: Path | None = None, hierarchy: Path | None = None
) -> Sun397:
    """Read one split.

    Args:
        folder: holds `SUN397/` (the extracted SUN397.tar.gz: `SUN397/a/abbey/sun_....jpg`), or is that folder.
        split: 1 to 10: `Training_01.txt` and `Testing_01.txt` to `_10`.
        partitions: folder of the extracted Partitions.zip; default: `Partitions` in `folder`.
        hierarchy: the authors' three_levels.xlsx, or its sheet SUN397 exported as CSV; default: either of them in
            `hierarchy_three_levels` in `folder`.

    Returns:
        Images and sides.

    Raises:
        InputError: if a folder or file is missing or not in SUN397's format, a class is unknown, or no image is
            there.
    """
    if split not in _SPLITS:
        raise InputError(f"SUN397 has no split {split}: choose 1 to 10.")
    images = _images_folder(folder)
    partitions = partitions or _beside(folder, images, "Partitions")
    hierarchy = hierarchy or _hierarchy_file(_beside(folder, images, "hierarchy_three_levels"))
    sides = read_hierarchy(hierarchy)
    names = _read_lines(_first_file(partitions / "ClassName.txt", images / "ClassName.txt"))
    known = {f"/{name.strip('/')}" for name in names}
    without_side = sorted(known - set(sides))
    if without_side:
        raise InputError(
            f"{hierarchy} puts {_few(without_side)} of ClassName.txt on no side: use the file that belongs to SUN397."
        )
    listed = [
        _read_split(partitions / f"{kind}_{split:02d}.txt", images, known) for kind in ("Training", "Testing")
    ]
    used = {name for part in listed for _, name in part}
    ambiguous = tuple(sorted(name for name in used if len(sides[name]) != 1))
    if ambiguous:
        logger.info("%d classes are on both sides and left out: %s", len(ambiguous), _few(ambiguous))
    parts, absent = [], 0
    for part in listed:
        clear = [(file, min(sides[name])) for file, name in part if len(sides[name]) == 1]
        there = [(file, side) for file, side in clear if file.is_file()]
        absent += len(clear) - len(there)
        if not there:
            raise InputError(
                f"None of the {len(part)} images of split {split} is in {images}: extract SUN397.tar.gz there."
            )
        parts.append(
            LabelledFiles(tuple(file for file, _ in there), np.array([side for _, side in there], np.int64))
        )
    if absent:
        logger.warning("%d images of split %d are not in %s and left out", absent, split, images)
    return Sun397(*parts, classes=tuple(sorted(used - set(ambiguous))), ambiguous=ambiguous, absent=absent)


def read_hierarchy(path: Path) -> dict[str, frozenset[int]]:
    """The sides of every class, from the first level of the authors' hierarchy.

    Above the header `category`, `indoor`, `outdoor, natural`, `outdoor, man-made` (and the second level's columns)
    lies a row of titles; classes are quoted: `'/a/abbey'`. Of the official 397 classes some are both natural and
    man-made; a few are indoors and outdoors.

    Args:
        path: three_levels.xlsx, or its sheet SUN397 as CSV.

    Returns:
        INDOOR, OUTDOOR or both by class, such as `/a/abbey`.

    Raises:
        InputError: if the file is missing, or not in that format.
    """
    if not path.is_file():
        raise InputError(
            f"There is no hierarchy at {path}: extract hierarchy_three_levels.zip of the SUN database, or name the "
            "file with --hierarchy."
        )
    rows = iter(_csv_rows(path) if path.suffix.lower() == ".csv" else _xlsx_rows(path))
    for row in rows:
        header = [str(cell or "").strip().lower() for cell in row]
        if _CATEGORY in header:
            break
    else:
        header = []
    missing = [name for name in (_CATEGORY, *_LEVEL_1) if name not in header]
    if missing:
        raise InputError(f"{path} has no column {_few(missing)}: use three_levels.xlsx of the SUN database.")
    place = {name: header.index(name) for name in (_CATEGORY, *_LEVEL_1)}
    sides: dict[str, frozenset[int]] = {}
    for row in rows:
        cells = [*row, *[None] * len(header)]
        name = str(cells[place[_CATEGORY]] or "").strip().strip("'\"").strip("/")
        # Below the classes a sheet may have empty rows and sums.
        if "/" not in name:
            continue
        sides[f"/{name}"] = frozenset(
            side for level, side in _LEVEL_1.items() if _is_set(cells[place[level]])
        )
    sides = {name: found for name, found in sides.items() if found}
    if not sides:
        raise InputError(f"{path} puts no class on a side: use three_levels.xlsx of the SUN database.")
    return sides


def _is_set(cell: object) -> bool:
    return str(cell).strip() in {"1", "1.0", "True", "TRUE"}


def _csv_rows(path: Path) -> list[list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is no CSV file ({error}): export the sheet SUN397 again, as UTF-8."
        ) from error


def _xlsx_rows(path: Path) -> list[tuple[object, ...]]:
    from zipfile import BadZipFile

    try:
        from openpyxl import load_workbook
        from openpyxl.utils.exceptions import InvalidFileException
    except ImportError:
        raise InputError(
            f"{path} needs openpyxl: install graft-pipeline[sun397], or export its sheet SUN397 as CSV."
        ) from None
    try:
        book = load_workbook(path, read_only=True, data_only=True)
    except (InvalidFileException, BadZipFile, KeyError, ValueError) as error:
        raise InputError(f"{path} is no Excel workbook ({error}): use three_levels.xlsx.") from error
    try:
        sheet = book[_SHEET] if _SHEET in book.sheetnames else book.worksheets[0]
        return list(sheet.iter_rows(values_only=True))
    finally:
        book.close()


def _images_folder(folder: Path) -> Path:
    for images in (folder / "SUN397", folder):
        if (images / "a").is_dir():
            return images
    raise InputError(
        f"{folder} holds no SUN397: name the folder in which SUN397.tar.gz was extracted, with SUN397/a/abbey and "
        "so on."
    )


def _beside(folder: Path, images: Path, name: str) -> Path:
    """A folder beside or inside the images' one, whichever is there."""
    return next((place / name for place in (folder, images) if (place / name).is_dir()), folder / name)


def _hierarchy_file(folder: Path) -> Path:
    names = ("three_levels.xlsx", "three_levels.csv")
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def _first_file(*files: Path) -> Path:
    return next((file for file in files if file.is_file()), files[0])


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(
            f"There is no {path}: extract SUN397's Partitions.zip, or name its folder with --partitions."
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text file ({error}): extract Partitions.zip again.") from error
    return [line.strip() for line in lines if line.strip()]


def _read_split(path: Path, images: Path, known: set[str]) -> list[tuple[Path, str]]:
    """(file, class) of every line, such as `/a/apartment_building/outdoor/sun_axxx.jpg`."""
    found = []
    for line in _read_lines(path):
        relative = line.strip("/")
        name = f"/{relative.rpartition('/')[0]}"
        if name not in known:
            raise InputError(f"{path}: {line} is of the unknown class {name}: compare it with ClassName.txt.")
        found.append((images / relative, name))
    if not found:
        raise InputError(f"{path} lists no image: extract Partitions.zip again.")
    return found


def _few(names: Sequence[str] | Iterable[str], count: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
