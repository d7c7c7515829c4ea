"""Questions about images, with answers, in RSVQA's published format (Lobry et al., 2020): LR, HR, and the planet's.

Images are decoded when they are asked for. How answers are scored is in scoring.py; the planet's questions are made in
resources/planet/questions.py.
"""

import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile
from upath import UPath

from graft_pipeline.errors import DataError, InputError
from training.zero_shot.raster import pixel_size_m

logger = logging.getLogger(__name__)

#: Types of questions, by the kind of their answer. RSVQA asks about relations within its other types; the planet
#: marks them, so that they are scored by themselves.
KINDS = {
    "presence": "yes or no",
    "comp": "yes or no",
    "relation": "yes or no",
    "count": "count",
    "area": "area",
    "rural_urban": "rural or urban",
}
#: Area that a published image of RSVQA-HR shows, m2: 512 px of 0.1524 m. Its ranges of areas mean shares of this.
HR_IMAGE_M2 = (512 * 0.1524) ** 2
AREA_EDGES_M2 = (10.0, 100.0, 1000.0)
COUNT_EDGES = (10, 100, 1000)


@dataclass(frozen=True)
class Question:
    """A question about one image, and its answer.

    Attributes:
        question_id: as published.
        image_id: as published; also names the image's file.
        type: a key of KINDS.
        text: the question.
        answer: the answer in its kind: bool, int, m2, or `rural` and `urban`.
    """

    question_id: int
    image_id: int
    type: str
    text: str
    answer: bool | int | float | str


@dataclass(frozen=True, eq=False)
class QuestionSet:
    """Questions of one split, in the order of their images.

    Attributes:
        name: of the dataset.
        questions: those that can be asked.
        prior: questions of another split of the set, for what can be known without an image; empty if none is there.
        read: image id to (H, W, 3) uint8 RGB; raises DataError for an image that cannot be decoded.
        gsd_m: image id to metres per pixel: of its file if that has coordinates, else as published.
        has_count_ranges: whether counts are scored by range (RSVQA-LR) instead of exactly.
        area_edges_m2: upper ends of the ranges of areas above none, but for the last.
        skipped: questions that are left out, by reason.
    """

    name: str
    questions: tuple[Question, ...]
    prior: tuple[Question, ...]
    read: Callable[[int], NDArray[np.uint8]]
    gsd_m: Callable[[int], float]
    has_count_ranges: bool
    area_edges_m2: tuple[float, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of questions."""
        return len(self.questions)

    def label(self, question_type: str, value: object) -> str | None:
        """An answer as it is compared: areas, and counts where the set says so, by their range.

        Args:
            question_type: a key of KINDS.
            value: an answer.

        Returns:
            The label; None if the value is no answer to such a question.
        """
        kind = KINDS[question_type]
        if kind == "yes or no":
            return ("no", "yes")[value] if isinstance(value, bool) else None
        if kind == "rural or urban":
            return value if isinstance(value, str) and value in ("rural", "urban") else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            return None
        if kind == "area":
            return _range_label(int(value), self.area_edges_m2, "m2")
        if value != int(value):
            return None
        return _range_label(int(value), COUNT_EDGES, "") if self.has_count_ranges else str(int(value))

    def sampled(self, count: int, seed: int) -> "QuestionSet":
        """A random part of the questions, none asked twice of one image; the paper draws 500 of RSVQA-HR's.

        Args:
            count: questions wanted; 0 takes all.
            seed: of the draw.

        Returns:
            The set with those questions, in the order of their images.
        """
        unique = list({(of.image_id, of.text): of for of in self.questions}.values())
        if 0 < count < len(unique):
            rows = np.random.default_rng([seed, 0x9A]).choice(len(unique), count, replace=False)
            unique = [unique[row] for row in sorted(rows)]
        return replace(self, questions=tuple(unique))


@dataclass(frozen=True)
class Layout:
    """How a dataset of this format lies on disk.

    Attributes:
        prefix: of its JSON files: `{prefix}_split_{split}_questions.json`, `_answers.json` and `_images.json`.
        split: that is scored.
        images: folder of the images, `{id}.tif`.
        gsd_m: metres per pixel, where the image's entry does not say.
        has_count_ranges: see QuestionSet.
        source: where the dataset is to be had, and what to unpack.
    """

    prefix: str
    split: str
    images: str
    gsd_m: float
    has_count_ranges: bool
    source: str


_HR = "download the JSON files and Images.tar of RSVQA-HR (https://zenodo.org/records/6344367), unpack it to Data/"
LAYOUTS = {
    "rsvqa_lr": Layout(
        "LR",
        "test",
        "Images_LR",
        10.0,
        True,
        "download the JSON files and Images_LR.zip of RSVQA-LR (https://zenodo.org/records/6344334), unpack it to "
        "Images_LR/",
    ),
    "rsvqa_hr": Layout("USGS", "test", "Data", 0.1524, False, _HR),
    "rsvqa_hr_phili": Layout("USGS", "test_phili", "Data", 0.1524, False, _HR),
    "planet_questions": Layout(
        "PLANET", "test", "Images", 1.0, False, "materialise the `questions` asset of a planet's sensor"
    ),
}


def open_question_set(name: str, folder: Path | UPath) -> QuestionSet:
    """Read a dataset of questions.

    Args:
        name: a key of LAYOUTS.
        folder: the one with its JSON files and its folder of images.

    Returns:
        Its questions. Those of the training split, or else of the validation split, are the prior.

    Raises:
        InputError: if it is not there, or is another dataset; the message says where to get it.
    """
    layout = LAYOUTS[name]
    skipped: Counter[str] = Counter()
    entries = _read(folder, layout, layout.split, "images")
    if entries is None:
        file = f"{layout.prefix}_split_{layout.split}_images.json"
        raise InputError(f"{folder} holds no {file}: {layout.source}, and give the folder with both.")
    images = {row["id"]: row for row in entries if row.get("active")}
    known = _questions(folder, layout, layout.split, skipped)
    if known is None:
        raise InputError(f"{folder} lacks questions or answers of {layout.split}: {layout.source}.")
    asked = [of for of in known if of.image_id in images]
    if lost := len(known) - len(asked):
        skipped["image not in the list"] += lost
    if not asked:
        raise InputError(f"{folder} has no question that can be asked; left out: {dict(skipped)}.")
    prior: list[Question] = []
    for split in ("train", "val"):
        # What is wrong in another split is left out of the prior, not of the score.
        prior = prior or _questions(folder, layout, split, Counter()) or []

    def read(image_id: int) -> NDArray[np.uint8]:
        return _pixels(folder / layout.images / f"{image_id}.tif")

    def gsd_m(image_id: int) -> float:
        if own := _file_gsd_m(folder / layout.images / f"{image_id}.tif"):
            return own
        found = re.match(r"\s*(\d*\.?\d+)", str(images[image_id].get("res_x", "")))
        return (float(found[1]) if found else 0.0) or layout.gsd_m

    scale = 1.0
    if name == "planet_questions":
        # RSVQA-HR's ranges as shares of an image: its images show 78 m, a sensor's crop 224 m or 2 km.
        first = asked[0].image_id
        height, width = read(first).shape[:2]
        scale = height * width * gsd_m(first) ** 2 / HR_IMAGE_M2
    return QuestionSet(
        name=name,
        questions=tuple(sorted(asked, key=lambda of: (of.image_id, of.question_id))),
        prior=tuple(prior),
        read=read,
        gsd_m=gsd_m,
        has_count_ranges=layout.has_count_ranges,
        area_edges_m2=tuple(edge * scale for edge in AREA_EDGES_M2),
        skipped=dict(skipped),
    )


def _questions(
    folder: Path | UPath, layout: Layout, split: str, skipped: Counter[str]
) -> list[Question] | None:
    """Active questions with a usable answer; None without the files."""
    asked, answered = (_read(folder, layout, split, kind) for kind in ("questions", "answers"))
    if asked is None or answered is None:
        return None
    answers = {row["id"]: row for row in answered if row.get("active")}
    found = []
    for row in asked:
        # Entries of other splits are there as a bare id.
        if not row.get("active"):
            continue
        written = next((answers[key] for key in row.get("answers_ids") or () if key in answers), None)
        if row.get("type") not in KINDS:
            skipped[f"unknown type {row.get('type')!r}"] += 1
        elif written is None or not isinstance(row.get("question"), str):
            skipped["no question" if written else "no answer"] += 1
        elif not isinstance(row.get("img_id"), int):
            skipped["no image named"] += 1
        elif (answer := _answer(row["type"], str(written.get("answer")))) is None:
            skipped["answer of another kind"] += 1
        else:
            found.append(Question(row["id"], row["img_id"], row["type"], row["question"], answer))
    return found


def _read(folder: Path | UPath, layout: Layout, split: str, kind: str) -> list[dict[str, Any]] | None:
    """Entries of one JSON file; None if it is not there."""
    file = folder / f"{layout.prefix}_split_{split}_{kind}.json"
    if not file.exists():
        return None
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))[kind]
        if not all(isinstance(row, dict) and isinstance(row.get("id"), int) for row in rows):
            raise TypeError("its entries need an integer id")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{file} is not as published ({error!r}): {layout.source}.") from error
    return list(rows)


def _answer(question_type: str, written: str) -> bool | int | float | str | None:
    """A published answer in its kind; None if it is none."""
    kind, text = KINDS[question_type], written.strip().lower()
    if kind == "yes or no":
        return {"yes": True, "no": False}.get(text)
    if kind == "rural or urban":
        return text if text in ("rural", "urban") else None
    number = re.fullmatch(r"(\d+)\s*m2" if kind == "area" else r"(\d+)", text)
    return int(number[1]) if number else None


def _range_label(value: int, edges: Sequence[float], unit: str) -> str:
    """RSVQA's ranges: none, up to each edge, and more."""
    if value == 0:
        return f"0{unit}"
    low = 0
    for edge in edges:
        if value <= edge:
            return f"between {low:.0f}{unit} and {edge:.0f}{unit}"
        low = edge
    return f"more than {low:.0f}{unit}"


def _file_gsd_m(file: Path | UPath) -> float | None:
    """Metres per pixel of an image with coordinates: other images may lie in the place of the published ones."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with MemoryFile(file.read_bytes()) as memory, memory.open() as source:
                return max(pixel_size_m(source)) if source.crs is not None else None
    except (RasterioError, OSError):
        # That it cannot be decoded is said when it is read.
        return None


def _pixels(file: Path | UPath) -> NDArray[np.uint8]:
    try:
        # By its bytes: the planet's lie wherever a deployment's storage is.
        with MemoryFile(file.read_bytes()) as memory, memory.open() as source:
            pixels = source.read((1, 2, 3))
    except (RasterioError, IndexError, OSError) as error:
        raise DataError(f"{file} cannot be decoded ({error}): download the set again.") from error
    if pixels.dtype != np.uint8:
        raise DataError(f"{file} has {pixels.dtype} values, not bytes: download the set again.")
    return np.ascontiguousarray(np.moveaxis(pixels, 0, -1))
