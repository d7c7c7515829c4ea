"""How well questions are answered: accuracy by type with intervals, counting errors, and what no image is needed for.

Questions are read in rsvqa.py and answered by programs (interpreter.py); how the numbers are shown is in ../tables.py.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from graft_pipeline.errors import DataError, InputError
from training.zero_shot.answering.interpreter import Answer, Image, Interpreter, Unknown
from training.zero_shot.answering.language import ProgramError, parse
from training.zero_shot.answering.rsvqa import KINDS, Question, QuestionSet
from training.zero_shot.answering.writers import Writer
from training.zero_shot.evaluate import Measure

logger = logging.getLogger(__name__)

#: Answers without an image: the most frequent of the question's type, and that of the very same question.
PRIOR, WORDS = "prior only", "question only"
TASK = "questions"
#: Mean of the types' accuracies, and accuracy over all questions.
AVERAGE, OVERALL = "average", "overall"
NO_ANSWER = "no answer"
#: Pictures of each type that a report shows of an answerer, right and wrong ones.
_SHOWN = 2


class Answerer(Protocol):
    """What answers questions about images."""

    name: str

    def answer(self, question: str, image: Image) -> Answer:
        """The answer; raises InputError for a question that it cannot answer."""
        ...


@dataclass(frozen=True)
class ProgramAnswerer:
    """Writes a program for a question and runs it.

    Attributes:
        name: as the report shows it.
        writer: of programs.
        interpreter: runs them.
    """

    name: str
    writer: Writer
    interpreter: Interpreter

    def answer(self, question: str, image: Image) -> Answer:
        """See `Answerer.answer`."""
        return self.interpreter.run(parse(self.writer(question)), image)


@dataclass(frozen=True, eq=False)
class Example:
    """A question as it was answered, for the eye.

    Attributes:
        question: with its true answer.
        image: that was looked at.
        answer: with its evidence.
        truth: label of the true answer.
        answered: label of the answer.
    """

    question: Question
    image: Image
    answer: Answer
    truth: str
    answered: str

    @property
    def is_right(self) -> bool:
        """Whether the labels agree."""
        return self.truth == self.answered


@dataclass(frozen=True, eq=False)
class AnswerEvaluation:
    """What answerers reach on one set of questions.

    Attributes:
        dataset: name of the set.
        images: images that were asked about.
        questions: questions that were asked, by type.
        metrics: task (`questions`) to answerer to accuracy: of each type, their mean (`average`) and of all questions
            (`overall`). `prior only` and `question only` see no image.
        confusion: per answerer and type: labels, and (L, L) counts with the truth in rows.
        count_errors: per answerer: answered less true count, to number of questions.
        unanswered: per answerer: questions without an answer, which are counted as wrong, by reason.
        examples: per answerer: some right and wrong answers of each type.
        has_prior: whether another split says what is frequent; else the asked questions themselves do, which can only
            flatter `prior only` and `question only`.
        skipped: questions that were not asked, by reason.
    """

    dataset: str
    images: int
    questions: dict[str, int]
    metrics: dict[str, dict[str, dict[str, Measure]]]
    confusion: dict[str, dict[str, tuple[tuple[str, ...], NDArray[np.int64]]]]
    count_errors: dict[str, dict[int, int]]
    unanswered: dict[str, dict[str, int]]
    examples: dict[str, list[Example]] = field(repr=False)
    has_prior: bool
    skipped: dict[str, int]


def evaluate_answers(
    answerers: Sequence[Answerer],
    questions: QuestionSet,
    *,
    resamples: int = 200,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> AnswerEvaluation:
    """Answer the questions of a set, and compare with its answers.

    Each image is decoded once. One that cannot be decoded is left out with its questions, and counted. A question that
    an answerer cannot answer is counted against it.

    Args:
        answerers: what answers; names must differ.
        questions: the set.
        resamples: bootstrap resamples of the images.
        seed: of the resamples.
        progress: told (questions done, questions).

    Returns:
        The scores.

    Raises:
        InputError: if names repeat, or no image can be decoded.
    """
    names = [answerer.name for answerer in answerers]
    if len({*names, PRIOR, WORDS}) < len(names) + 2 or not names:
        raise InputError(
            f"Answerers need names of their own other than {PRIOR!r} and {WORDS!r}, got {names}."
        )
    skipped: Counter[str] = Counter(questions.skipped)
    asked: list[Question] = []
    labels: dict[str, list[str]] = {name: [] for name in names}
    errors: dict[str, Counter[int]] = {name: Counter() for name in names}
    unanswered: dict[str, Counter[str]] = {name: Counter() for name in names}
    examples: dict[str, list[Example]] = {name: [] for name in names}
    done = 0
    for image_id, of_image in _by_image(questions.questions).items():
        done += len(of_image)
        try:
            image = Image(questions.read(image_id), questions.gsd_m(image_id))
        except DataError as error:
            logger.warning("%s", error)
            skipped["image cannot be decoded"] += len(of_image)
            continue
        asked += of_image
        for answerer in answerers:
            for question in of_image:
                label = NO_ANSWER
                try:
                    answer = answerer.answer(question.text, image)
                except InputError as error:
                    reason = "program refused" if isinstance(error, ProgramError) else "no program"
                    logger.info("%s: %r is not answered: %s", answerer.name, question.text, error)
                    unanswered[answerer.name][reason] += 1
                else:
                    label = questions.label(question.type, answer.value) or NO_ANSWER
                    if label == NO_ANSWER:
                        is_unknown = isinstance(answer.value, Unknown)
                        reason = "nothing there to answer about" if is_unknown else "answer of another kind"
                        unanswered[answerer.name][reason] += 1
                    elif question.type == "count":
                        errors[answerer.name][int(answer.value) - int(question.answer)] += 1
                    truth = str(questions.label(question.type, question.answer))
                    _keep(examples[answerer.name], Example(question, image, answer, truth, label))
                labels[answerer.name].append(label)
        if progress:
            progress(done, len(questions))
    if not asked:
        raise InputError(f"No question of {questions.name} can be asked; left out: {dict(skipped)}.")
    truths = [str(questions.label(of.type, of.answer)) for of in asked]
    by_type, by_words = _frequent(questions, questions.prior or asked)
    labels[PRIOR] = [by_type.get(of.type, NO_ANSWER) for of in asked]
    labels[WORDS] = [by_words.get(of.text, by_type.get(of.type, NO_ANSWER)) for of in asked]
    types = tuple(name for name in KINDS if any(of.type == name for of in asked))
    numbers = np.unique([of.image_id for of in asked], return_inverse=True)[1]
    kinds = np.array([types.index(of.type) for of in asked])
    random = np.random.default_rng([seed, 0xA5])
    images = int(numbers.max()) + 1
    rows = [random.integers(images, size=images) for _ in range(resamples)]
    return AnswerEvaluation(
        dataset=questions.name,
        images=images,
        questions={name: int((kinds == number).sum()) for number, name in enumerate(types)},
        metrics={
            TASK: {
                name: _measured(np.array(some) == truths, numbers, kinds, types, rows)
                for name, some in labels.items()
            }
        },
        confusion={
            name: {
                of: _confusion(
                    [
                        pair
                        for pair, q in zip(zip(truths, labels[name], strict=True), asked, strict=True)
                        if q.type == of
                    ]
                )
                for of in types
            }
            for name in names
        },
        count_errors={name: dict(sorted(of.items())) for name, of in errors.items()},
        unanswered={name: dict(of) for name, of in unanswered.items()},
        examples=examples,
        has_prior=bool(questions.prior),
        skipped=dict(skipped),
    )


def _by_image(questions: Iterable[Question]) -> dict[int, list[Question]]:
    found: dict[int, list[Question]] = {}
    for question in questions:
        found.setdefault(question.image_id, []).append(question)
    return found


def _frequent(questions: QuestionSet, known: Iterable[Question]) -> tuple[dict[str, str], dict[str, str]]:
    """The most frequent label of each type, and of each wording."""
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    by_words: dict[str, Counter[str]] = defaultdict(Counter)
    for of in known:
        label = str(questions.label(of.type, of.answer))
        by_type[of.type][label] += 1
        by_words[of.text][label] += 1

    def first(counts: Counter[str]) -> str:
        # Of equally frequent ones the first by name: the same everywhere.
        return min(counts, key=lambda label: (-counts[label], label))

    return (
        {name: first(counts) for name, counts in by_type.items()},
        {text: first(counts) for text, counts in by_words.items()},
    )


def _measured(
    is_right: NDArray[np.bool_],
    images: NDArray[np.int64],
    kinds: NDArray[np.int64],
    types: Sequence[str],
    rows: Sequence[NDArray[np.int64]],
) -> dict[str, Measure]:
    """Accuracies with their bootstrap intervals over images: questions of one image hang together."""
    cell = images * len(types) + kinds
    shape = (int(images.max()) + 1, len(types))
    total = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
    right = np.bincount(cell, weights=is_right, minlength=shape[0] * shape[1]).reshape(shape)

    def values(right: NDArray[np.float64], total: NDArray[np.int64]) -> NDArray[np.float64]:
        """Per type, their mean, overall; (T + 2,)."""
        with np.errstate(invalid="ignore"):
            by_type = right / total
        average = np.nanmean(by_type) if total.any() else np.nan
        return np.array([*by_type, average, right.sum() / max(1, total.sum())])

    found = values(right.sum(axis=0), total.sum(axis=0))
    draws = np.array([values(right[some].sum(axis=0), total[some].sum(axis=0)) for some in rows])
    ends = np.nanpercentile(draws, (2.5, 97.5), axis=0) if len(draws) else np.stack([found, found])
    return {
        name: Measure(float(value), float(low), float(high))
        for name, value, low, high in zip((*types, AVERAGE, OVERALL), found, *ends, strict=True)
    }


def _confusion(pairs: Sequence[tuple[str, str]]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Labels by frequency of the truth, and counts of (truth, answer)."""
    names = tuple(sorted({label for pair in pairs for label in pair}, key=_label_order))
    matrix = np.zeros((len(names), len(names)), np.int64)
    for truth, answered in pairs:
        matrix[names.index(truth), names.index(answered)] += 1
    return names, matrix


def _label_order(label: str) -> tuple[bool, int, str]:
    """Ranges by their upper end, no answer last."""
    digits = "".join(letter if letter.isdigit() else " " for letter in label.replace("m2", "")).split()
    high = int(digits[-1]) if digits else 0
    return label == NO_ANSWER, high + label.startswith("more than"), label


def _keep(kept: list[Example], example: Example) -> None:
    """Keep the first right and wrong answers of each type, of images that differ where they can."""
    alike = [
        of for of in kept if of.question.type == example.question.type and of.is_right == example.is_right
    ]
    if len(alike) < _SHOWN and all(of.image is not example.image for of in alike):
        kept.append(example)
