"""Pictures of an evaluation of questions: answers by type, counting errors, and right and wrong answers with evidence.

Numbers come from scoring.py, evidence is drawn in evidence.py; nothing is computed here.
"""

from collections.abc import Mapping

import numpy as np

from graft_pipeline import previews
from training.zero_shot.answering.evidence import draw
from training.zero_shot.answering.rsvqa import KINDS
from training.zero_shot.answering.scoring import AnswerEvaluation, Example

_CELL_PX = 240
_MOST_LABELS = 24
#: Counting errors beyond this are one bar.
_FARTHEST = 5


def answer_pictures(made: AnswerEvaluation) -> dict[str, bytes]:
    """Pictures of each answerer: confusion matrices of counts and areas, counting errors, examples.

    Args:
        made: the evaluation.

    Returns:
        PNG or JPEG by name.
    """
    pictures: dict[str, bytes] = {}
    for name, of_types in made.confusion.items():
        for of, (labels, matrix) in of_types.items():
            # Of two answers, the accuracy says nearly all; of very many, nobody reads a matrix.
            if KINDS[of] in ("count", "area") and len(labels) <= _MOST_LABELS:
                title = f"{made.dataset}, {of}: {name}"
                pictures[f"answers_{of}_{_file_name(name)}"] = previews.confusion(matrix, labels, title=title)
    if any(made.count_errors.values()):
        pictures["counting_errors"] = count_error_bars(made.count_errors, made.dataset)
    for name, examples in made.examples.items():
        if examples:
            pictures[f"examples_{_file_name(name)}"] = example_sheet(examples)
    return pictures


def count_error_bars(errors: Mapping[str, Mapping[int, int]], dataset: str) -> bytes:
    """How far counts are off, as shares of the counted questions.

    Args:
        errors: per answerer: answered less true count, to number of questions.
        dataset: named in the title.

    Returns:
        A PNG.
    """
    groups: dict[str, dict[str, float]] = {}
    for number in range(-_FARTHEST, _FARTHEST + 1):
        label = f"{number:+d}" if number else "0"
        label = {-_FARTHEST: f"≤{label}", _FARTHEST: f"≥{label}"}.get(number, label)
        groups[label] = {
            name: sum(
                questions
                for error, questions in of.items()
                if int(np.clip(error, -_FARTHEST, _FARTHEST)) == number
            )
            / max(1, sum(of.values()))
            for name, of in errors.items()
        }
    return previews.bars(groups, title=f"{dataset}: counted less true", ylabel="share of questions")


def example_sheet(examples: list[Example]) -> bytes:
    """Images with evidence, question and answer; right ones framed green, wrong ones red.

    Args:
        examples: the answers.

    Returns:
        A JPEG.
    """
    order = sorted(examples, key=lambda of: (of.question.type, not of.is_right))
    return previews.contact_sheet(
        [draw(of.answer, of.image) for of in order],
        [f"{of.question.text} {of.answered}" + ("" if of.is_right else f", not {of.truth}") for of in order],
        cell_px=_CELL_PX,
        columns=4,
        label_lines=3,
        frames=[previews.RIGHT if of.is_right else previews.WRONG for of in order],
    )


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)
