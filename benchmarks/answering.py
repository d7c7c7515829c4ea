"""Questions on the planet: accuracy by type beside the frozen CLIP and what needs no image, and what an answer costs.

`python benchmarks/answering.py [--folder demo] [--seeds 3] [--json FILE]`. The encoder is that of a finished demo
(`make demo`); each seed asks other questions about other places of its benchmark ground.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import _path  # noqa: F401 -- before the package `training`
import numpy as np
from rich.console import Console
from rich.table import Table
from upath import UPath

from graft_pipeline.demo import BENCHMARK_BOUNDS
from graft_pipeline.settings import Settings
from resources.imagery import open_imagery
from resources.planet.questions import build_questions
from resources.planet.truth_client import PlanetTruth
from resources.world import open_world
from training.encoders import load_clip
from training.zero_shot.answering.rsvqa import open_question_set
from training.zero_shot.answering.scoring import TASK, AnswerEvaluation, evaluate_answers
from training.zero_shot.benchmarks import answerer_of
from training.zero_shot.prompts import load_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="of a finished demo")
    parser.add_argument("--sensor", default="naip", help="whose pixel-level encoder answers")
    parser.add_argument("--seeds", type=int, default=3, help="sets of questions")
    parser.add_argument("--images", type=int, default=128, help="images of each set")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    models = options.folder / "data" / "models"
    encoder = models / f"sensor={options.sensor}" / "pixel_encoder" / "encoder"
    if not encoder.exists():
        raise SystemExit(f"{encoder} holds no encoder: run `make demo` first, or name its folder.")
    made: list[AnswerEvaluation] = []
    costs: dict[str, float] = dict.fromkeys(("building", "building, CPU", "answering", "answering, CPU"), 0.0)
    planet_seed = seed_of(options.folder)
    with open_world(Settings(_env_file=None, world="planet", planet={"seed": planet_seed})) as world:
        sensor, imagery = world.sensor_records[options.sensor], open_imagery(world)
        contenders = {"pixel_encoder": encoder, "foundation": models / "foundation"}
        answerers = [
            answerer_of(name, load_clip(f"local-dir:{folder}"), load_prompts("planet"), sensor)
            for name, folder in contenders.items()
        ]
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                started, cpu = time.perf_counter(), cpu_s()
                truth = PlanetTruth(str(world.planet.url))
                questions = build_questions(
                    truth, imagery, sensor, BENCHMARK_BOUNDS, images=options.images, seed=seed
                )
                questions.write(UPath(folder), sensor)
                costs["building"] += time.perf_counter() - started
                costs["building, CPU"] += cpu_s() - cpu
                started, cpu = time.perf_counter(), cpu_s()
                made.append(
                    evaluate_answers(
                        answerers, open_question_set("planet_questions", UPath(folder)), seed=seed
                    )
                )
                costs["answering"] += time.perf_counter() - started
                costs["answering, CPU"] += cpu_s() - cpu
    asked = sum(sum(of.questions.values()) for of in made)
    results = {
        "accuracy": accuracies(made),
        "questions": asked,
        "count errors": {name: dict(sorted(errors_of(made, name).items())) for name in contenders},
        "seconds": {name: round(value, 2) for name, value in costs.items()},
        "CPU milliseconds an answer": 1000 * costs["answering, CPU"] / (asked * len(contenders)),
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }
    show(results, options.seeds)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def seed_of(folder: Path) -> int:
    """The planet of a demo."""
    lines = (folder / "settings.env").read_text().splitlines()
    return int(dict(line.split("=", 1) for line in lines).get("GRAFT_PLANET__SEED", "0"))


def cpu_s() -> float:
    """CPU seconds of this process, all threads, and of its children that ended."""
    return sum(os.times()[:4])


def accuracies(made: list[AnswerEvaluation]) -> dict[str, dict[str, tuple[float, float]]]:
    """Type to answerer to mean and standard deviation over the sets."""
    first = made[0].metrics[TASK]
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for of in next(iter(first.values())):
        for name in first:
            values = [each.metrics[TASK][name][of].value for each in made if of in each.metrics[TASK][name]]
            found.setdefault(of, {})[name] = (float(np.mean(values)), float(np.std(values)))
    return found


def errors_of(made: list[AnswerEvaluation], name: str) -> dict[int, int]:
    """Counting errors over all sets."""
    total: dict[int, int] = {}
    for each in made:
        for error, count in each.count_errors[name].items():
            total[error] = total.get(error, 0) + count
    return total


def show(results: dict[str, object], seeds: int) -> None:
    """Print the table and the costs."""
    table = Table(
        title=f"{results['questions']} questions in {seeds} sets: accuracy in %, and its deviation over the sets",
        title_justify="left",
    )
    accuracy = results["accuracy"]
    assert isinstance(accuracy, dict)
    table.add_column("type")
    for name in next(iter(accuracy.values())):
        table.add_column(name, justify="right")
    for of, values in accuracy.items():
        table.add_row(of, *(f"{100 * mean:.1f} ± {100 * spread:.1f}" for mean, spread in values.values()))
    console = Console(width=110)
    console.print(table)
    for name in ("count errors", "seconds", "CPU milliseconds an answer", "peak MB"):
        console.print(f"{name}: {results[name]}")


if __name__ == "__main__":
    main()
