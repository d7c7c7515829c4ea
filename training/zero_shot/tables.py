"""Evaluations on disk, and the report over them: the paper's tables with our rows beside them, and pictures.

Numbers are computed in evaluate.py, evaluate_masks.py and answering/scoring.py; here are percentages alone.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from graft_pipeline import previews
from graft_pipeline.errors import DataError, InputError
from graft_pipeline.manifests import write_bytes_atomic
from training.zero_shot.answering.pictures import answer_pictures
from training.zero_shot.answering.scoring import AnswerEvaluation
from training.zero_shot.evaluate import CHANCE, Evaluation
from training.zero_shot.evaluate_masks import MaskEvaluation
from training.zero_shot.mask_sets import UNLABELLED
from training.zero_shot.raster import PALETTE

_CELL_PX = 88
_RELEASED = "released"
_UNLABELLED_COLOUR = (255, 255, 255)
#: Frames of retrieved images.
_RIGHT, _WRONG = (30, 150, 60), (210, 60, 50)


def save_evaluation(folder: UPath, made: Evaluation | MaskEvaluation | AnswerEvaluation) -> dict[str, bytes]:
    """Write one evaluation in place of an earlier one: `DATASET.json`, and pictures in `DATASET/`.

    Args:
        folder: of the report.
        made: the evaluation.

    Returns:
        The pictures by name, PNG or JPEG.
    """
    if isinstance(made, Evaluation):
        pictures = _image_pictures(made)
        facts = {"classes": made.classes, "average_precision": made.average_precision}
    elif isinstance(made, MaskEvaluation):
        pictures = _mask_pictures(made)
        recall = {name: scores.recall for name, scores in made.by_class.items()}
        facts = {"classes": made.classes, "recall": recall}
    else:
        pictures = answer_pictures(made)
        facts = {
            "questions": made.questions,
            "count_errors": made.count_errors,
            "unanswered": made.unanswered,
            "has_prior": made.has_prior,
        }
    content = {
        "dataset": made.dataset,
        "images": made.images,
        "skipped": made.skipped,
        "metrics": {
            task: {
                name: {metric: asdict(measure) for metric, measure in values.items()}
                for name, values in contenders.items()
            }
            for task, contenders in made.metrics.items()
        },
        **facts,
    }
    written = set()
    for name, picture in pictures.items():
        suffix = "jpg" if picture[:2] == b"\xff\xd8" else "png"
        write_bytes_atomic(folder / made.dataset / f"{name}.{suffix}", picture)
        written.add(f"{name}.{suffix}")
    # Those of models that are compared no more.
    for file in [file for file in (folder / made.dataset).glob("*") if file.name not in written]:
        file.unlink()
    # Last: an evaluation with its JSON is complete.
    write_bytes_atomic(folder / f"{made.dataset}.json", (json.dumps(content, indent=1) + "\n").encode())
    return pictures


def read_evaluations(folder: UPath) -> dict[str, dict[str, Any]]:
    """The evaluations of a folder.

    Args:
        folder: of the report.

    Returns:
        Content of each `DATASET.json`, by dataset.

    Raises:
        DataError: if a file is no evaluation.
    """
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            found[str(content["dataset"])] = content
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{file} is no evaluation ({error!r}): delete it and evaluate again.") from error
    return found


def release(folder: UPath, dataset: str) -> None:
    """Make an evaluation the one that later ones are held against.

    Args:
        folder: of the report.
        dataset: which evaluation.
    """
    write_bytes_atomic(folder / _RELEASED / f"{dataset}.json", (folder / f"{dataset}.json").read_bytes())


def read_released(folder: UPath, dataset: str) -> dict[str, Any] | None:
    """The released evaluation of a dataset; None if there is none yet.

    Args:
        folder: of the report.
        dataset: which.

    Returns:
        Its content, as of `read_evaluations`.
    """
    return read_evaluations(folder / _RELEASED).get(dataset)


def paper_tables() -> dict[str, dict[str, Any]]:
    """The paper's Tables 1 to 4: title, columns (dataset, metric, heading), rows (model, task, percentages), note."""
    text = (resources.files(__package__) / "paper_tables.json").read_text(encoding="utf-8")
    tables: dict[str, dict[str, Any]] = json.loads(text)
    return tables


def table_rows(
    table: Mapping[str, Any], evaluations: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, str, list[str]]]:
    """A table of the paper with our rows below it.

    Args:
        table: one of `paper_tables`.
        evaluations: as of `read_evaluations`.

    Returns:
        (model, task, cells); ours in percent with half the width of the 95 % interval (one-shot: with the standard
        deviation over the draws), empty where nothing was evaluated.
    """
    columns = table["columns"]
    rows = [
        (f"{model} (paper)", task, ["" if value is None else f"{value:.2f}" for value in values])
        for model, task, values in table["rows"]
    ]
    entered: dict[tuple[str, str], list[str]] = {}
    for place, (dataset, metric, _) in enumerate(columns):
        for task, contenders in evaluations.get(dataset, {}).get("metrics", {}).items():
            for name, values in contenders.items():
                if metric in values:
                    cells = entered.setdefault((name, task), [""] * len(columns))
                    measure = values[metric]
                    half = (measure["high"] - measure["low"]) / 2
                    cells[place] = f"{100 * measure['value']:.2f} ± {100 * half:.2f}"
    ours = sorted(entered.items(), key=lambda entry: (entry[0][0] == CHANCE, entry[0][1] != "zero-shot"))
    return rows + [(name, task, cells) for (name, task), cells in ours]


def write_evaluation_report(folder: UPath) -> str:
    """Write `report.md` and `report.html` over all evaluations of a folder.

    Args:
        folder: where `save_evaluation` wrote.

    Returns:
        The Markdown.

    Raises:
        InputError: if nothing was evaluated.
    """
    from jinja2 import Environment, PackageLoader

    evaluations = read_evaluations(folder)
    if not evaluations:
        raise InputError(f"{folder} holds no evaluation: evaluate a dataset first.")
    tables = {
        name: (
            table["title"],
            [heading for *_, heading in table["columns"]],
            table_rows(table, evaluations),
            table.get("note", ""),
        )
        for name, table in paper_tables().items()
        if any(dataset in evaluations for dataset, *_ in table["columns"])
    }
    pictures = {
        dataset: [
            (file.stem.replace("_", " "), f"{dataset}/{file.name}", previews.data_uri(file.read_bytes()))
            for file in sorted((folder / dataset).glob("*.*"))
            if file.suffix in {".png", ".jpg"}
        ]
        for dataset in evaluations
    }
    facts = {"tables": tables, "evaluations": evaluations, "pictures": pictures}
    environment = Environment(
        loader=PackageLoader("training.zero_shot", "."), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda measure: f"{100 * measure['value']:.2f}"
    markdown = environment.get_template("report.md.txt").render(**facts)
    environment.autoescape = True
    write_bytes_atomic(folder / "report.md", markdown.encode())
    write_bytes_atomic(
        folder / "report.html", environment.get_template("evaluation.html").render(**facts).encode()
    )
    return markdown


def drops(
    now: Mapping[str, Any], released: Mapping[str, Any], *, contenders: Iterable[str]
) -> list[tuple[str, str, str, float, float]]:
    """Scores that fell below the last released ones by more than the noise.

    Args:
        now: one evaluation, as of `read_evaluations`.
        released: the released evaluation of the same dataset.
        contenders: which models are judged.

    Returns:
        (contender, task, metric, released value, value now) of each score whose interval's upper end lies below the
        released value, and whose value lies below the released interval's lower end.
    """
    fallen = []
    for name in contenders:
        for task, of in now["metrics"].items():
            before = released["metrics"].get(task, {}).get(name, {})
            for metric, measure in of.get(name, {}).items():
                old = before.get(metric)
                if old and measure["high"] < old["value"] and measure["value"] < old["low"]:
                    fallen.append((name, task, metric, old["value"], measure["value"]))
    return fallen


def _image_pictures(made: Evaluation) -> dict[str, bytes]:
    pictures = {
        f"confusion_{_file_name(name)}": previews.confusion(
            of.confusion, made.classes, title=f"{made.dataset}: {name}"
        )
        for name, of in made.confusion.items()
    }
    for name in made.best:
        pictures[f"retrieved_first_{_file_name(name)}"] = _sheet(
            made.read, made.classes, list(made.best[name]), list(made.is_right[name])
        )
        pictures[f"retrieved_last_of_the_class_{_file_name(name)}"] = _sheet(
            made.read, made.classes, made.worst[name]
        )
    return pictures


def _sheet(
    read: Callable[[int], NDArray[np.uint8]],
    classes: tuple[str, ...],
    rows: list[NDArray[np.int64]],
    is_right: Sequence[NDArray[np.bool_]] = (),
) -> bytes:
    """Images of each class, a row each, those that are right in a green frame and the others in a red one."""
    width = max(len(row) for row in rows)
    images: list[NDArray[np.uint8]] = []
    labels: list[str] = []
    frames: list[tuple[int, int, int] | None] = []
    blank = np.full((_CELL_PX, _CELL_PX, 3), 255, np.uint8)
    for number, (name, row) in enumerate(zip(classes, rows, strict=True)):
        empty = width - len(row)
        images += [read(int(image)) for image in row] + [blank] * empty
        labels += [name] + [""] * (width - 1)
        frames += (
            [_RIGHT if of else _WRONG for of in is_right[number]] if len(is_right) else [None] * len(row)
        )
        frames += [None] * empty
    return previews.contact_sheet(
        images, labels, columns=width, cell_px=_CELL_PX, frames=frames, label_lines=2
    )


def _mask_pictures(made: MaskEvaluation) -> dict[str, bytes]:
    palette = np.array([PALETTE[n % len(PALETTE)] for n in range(len(made.classes))], np.uint8)
    table = np.zeros((UNLABELLED + 1, 3), np.uint8)
    table[: len(palette)], table[UNLABELLED] = palette, _UNLABELLED_COLOUR
    images, labels = [], []
    for image, truth, maps in made.shown:
        for name, of in (("image", None), ("truth", truth), *maps.items()):
            if of is None:
                images.append(image)
            else:
                full = np.kron(of, np.ones(np.array(image.shape[:2]) // of.shape, np.uint8))
                images.append(previews.overlay(image, full, table))
            labels.append(name)
    pictures = {
        "overlays": previews.contact_sheet(
            images, labels, columns=len(images) // len(made.shown), cell_px=2 * _CELL_PX
        ),
        "colours_of_the_classes": previews.contact_sheet(
            [np.full((8, 8, 3), colour, np.uint8) for colour in palette],
            made.classes,
            columns=len(palette),
            cell_px=_CELL_PX,
        ),
    }
    return pictures | {
        f"confusion_{_file_name(name)}": previews.confusion(
            of.confusion, made.classes, title=f"{made.dataset}: {name}"
        )
        for name, of in made.by_class.items()
        if name != CHANCE
    }


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)
