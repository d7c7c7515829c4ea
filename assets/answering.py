"""Questions on the planet, and how well they are answered: assets for evaluation only.

RSVQA's published questions are evaluated in assets/evaluation.py; how a question is answered is in
training/zero_shot/answering.
"""

from importlib.resources import files

import dagster as dg
import numpy as np
from upath import UPath

from assets.keys import FOUNDATION_KEY, PLANET_TRUTH_KEY, external_collection
from assets.learning import encoder_folder, local_model
from assets.planet import scores_result
from assets.reporting import OWNERS, check_result, check_specs, measured, shown
from graft_pipeline import previews, rules, schemas
from graft_pipeline.imagery import ImagerySource, Sensor
from graft_pipeline.progress import Progress
from graft_pipeline.provenance import code_version, fingerprint
from graft_pipeline.report import scores_folder, write_scores
from graft_pipeline.settings import Settings
from resources.planet.questions import PlanetQuestions, build_questions
from resources.planet.truth_client import PlanetTruth
from resources.storage import Storage


class QuestionsConfig(dg.Config):
    """What a single run may ask of the questions."""

    #: Images that are asked about, at most; a quarter of them is for what can be known without looking.
    images: int = 128
    #: Test questions of each type, at most.
    per_type: int = 120


def questions_folder(storage: Storage, sensor: Sensor) -> UPath:
    """Where a sensor's questions and their images lie, in RSVQA's format."""
    return storage.root / "questions" / f"sensor={sensor.name}"


def answers_version() -> str:
    """Version of what answers come from: code, words that stand for concepts, words of the classes."""
    modules = ("grammar", "phrases", "language", "concepts", "interpreter", "detection", "rsvqa", "scoring")
    words = (
        files("training.zero_shot.answering") / "concepts.json",
        files("training.zero_shot") / "prompt_sets" / "planet.json",
    )
    return fingerprint(
        code_version(*(f"training.zero_shot.answering.{name}" for name in modules)),
        *(file.read_text(encoding="utf-8") for file in words),
    )[:12]


def build_answering_assets(sensor: Sensor) -> list[dg.AssetsDefinition]:
    """Questions of one sensor, and their scores.

    Args:
        sensor: the sensor's record.

    Returns:
        `questions`, `question_scores`.
    """
    options = {"key_prefix": sensor.name, "group_name": sensor.name, "owners": OWNERS}

    @dg.asset(
        **options,
        deps=[PLANET_TRUTH_KEY, external_collection(sensor, "earth_engine")],
        code_version=code_version("resources.planet.questions"),
        kinds={"json"},
        pool="imagery",
        check_specs=check_specs(
            [sensor.name, "questions"], "no_training_ground", partitioned=False, schema=False
        ),
    )
    @measured
    def questions(
        config: QuestionsConfig,
        world: dg.ResourceParam[Settings],
        storage: dg.ResourceParam[Storage],
        imagery: dg.ResourceParam[ImagerySource],
        progress: dg.ResourceParam[Progress],
    ) -> dg.MaterializeResult:
        """Questions with known answers about ground that no training tile touches, in RSVQA's published format."""
        made = build_questions(
            PlanetTruth(world.planet.url),
            imagery,
            sensor,
            world.benchmark_bounds,
            images=config.images,
            per_type=config.per_type,
            seed=world.seed,
            progress=progress.task(f"{sensor.name} questions"),
        )
        made.write(questions_folder(storage, sensor), sensor)
        tiles = [
            storage.read(schemas.TILES, **v) for v in storage.partitions(schemas.TILES, sensor=sensor.name)
        ]
        counts = {
            f"{split}/{kind}": sum(
                of.type == kind and made.splits[of.image] == split for of in made.questions
            )
            for split in sorted(set(made.splits))
            for kind in dict.fromkeys(of.type for of in made.questions)
        }
        return dg.MaterializeResult(
            metadata={
                "images": len(made.pixels),
                "questions": len(made.questions),
                **counts,
                **shown({"preview": question_sheet(made)}, {"preview": "questions"}),
            },
            check_results=[check_result(rules.no_training_ground(tiles, made.squares))],
        )

    @dg.asset(
        **options,
        deps=[questions, [sensor.name, "pixel_encoder"], FOUNDATION_KEY],
        code_version=answers_version(),
        kinds={"pytorch"},
        pool="gpu",
    )
    @measured
    def question_scores(
        world: dg.ResourceParam[Settings],
        storage: dg.ResourceParam[Storage],
        progress: dg.ResourceParam[Progress],
    ) -> dg.MaterializeResult:
        """Answers of the pixel-level encoder, beside the frozen foundation model's and what needs no image."""
        from training.zero_shot.answering.pictures import answer_pictures
        from training.zero_shot.answering.rsvqa import open_question_set
        from training.zero_shot.answering.scoring import evaluate_answers
        from training.zero_shot.benchmarks import answerer_of
        from training.zero_shot.prompts import load_prompts

        contenders = {
            "pixel_encoder": local_model(encoder_folder(storage, sensor, "pixel"), "auto"),
            "foundation": local_model(storage.models_folder / "foundation", "auto"),
        }
        made = evaluate_answers(
            [answerer_of(name, clip, load_prompts("planet"), sensor) for name, clip in contenders.items()],
            open_question_set("planet_questions", questions_folder(storage, sensor)),
            seed=world.seed,
            progress=progress.task(f"{sensor.name} question scores"),
        )
        metrics = {
            task: {who: {name: of.value for name, of in some.items()} for who, some in of_task.items()}
            for task, of_task in made.metrics.items()
        }
        pictures = {
            "accuracy_of_answers": previews.bars(
                previews.by_metric(metrics), title=f"{sensor.name}: questions", ylabel="accuracy"
            ),
            **answer_pictures(made),
        }
        write_scores(scores_folder(storage, sensor.name), "questions", metrics, pictures)
        scored = scores_result(metrics, pictures)
        return dg.MaterializeResult(
            metadata={
                **(scored.metadata or {}),
                "accuracy": dg.MetadataValue.md(accuracy_table(made.metrics["questions"], made.questions)),
                "images": made.images,
                "questions": sum(made.questions.values()),
                **{
                    f"unanswered/{who}/{reason}": count
                    for who, of in made.unanswered.items()
                    for reason, count in of.items()
                },
                **{f"left_out/{reason}": count for reason, count in made.skipped.items()},
            }
        )

    return [questions, question_scores]


def accuracy_table(measures: dict[str, dict[str, object]], counts: dict[str, int]) -> str:
    """Accuracies in percent with their 95 % intervals as Markdown, a row per type."""
    rows = ["| type | questions | " + " | ".join(measures) + " |", "|---|--:|" + "--:|" * len(measures)]
    for name in next(iter(measures.values())):
        cells = [
            f"{100 * of[name].value:.1f} ({100 * of[name].low:.1f} to {100 * of[name].high:.1f})"
            for of in measures.values()
        ]
        rows.append(f"| {name} | {counts.get(name, sum(counts.values()))} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def question_sheet(made: PlanetQuestions, count: int = 16) -> bytes:
    """Some questions with their images and answers."""
    chosen = np.linspace(0, len(made.questions) - 1, min(count, len(made.questions))).astype(int)
    asked = [made.questions[n] for n in chosen]
    return previews.contact_sheet(
        [made.pixels[of.image] for of in asked],
        [f"{of.text} {of.answer}" for of in asked],
        cell_px=180,
        columns=4,
        label_lines=3,
    )
