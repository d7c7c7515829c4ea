"""`python -m training`: train satellite encoders, small CLIPs and scene classifiers from files, without Dagster.

Only arguments are handled here; the work is in loop.py, foundation.py and scenes.py.
"""

import csv
import json
import logging
import os
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_type_hints

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import track
from upath import UPath

from graft_pipeline.errors import GraftError, InputError
from training.reporting import open_reporter

if TYPE_CHECKING:
    from training.loop import TrainConfig

app = typer.Typer(
    help="Train satellite encoders, small CLIPs and scene classifiers, from files and without Dagster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class Level(StrEnum):
    """Levels of understanding."""

    image = "image"
    pixel = "pixel"


class RecipeName(StrEnum):
    """Names of recipes.RECIPES."""

    paper = "paper"
    planet = "planet"
    smoke = "smoke"


@app.command()
def encoder(
    training_set: Annotated[
        str, typer.Argument(help="Snapshot folder: .../training_set/sensor=.../snapshot=...")
    ],
    output: Annotated[str, typer.Argument(help="Folder that gets encoder/, history.json and checkpoints/.")],
    root: Annotated[str, typer.Option(help="Storage root that chip shards are relative to.")],
    level: Annotated[Level, typer.Option(help="f_S^I (Eq. 2) or f_S^P (Eq. 3).")] = Level.image,
    sensor: Annotated[str, typer.Option(help="naip, sentinel2, or one of GRAFT_SENSORS.")] = "naip",
    recipe: Annotated[RecipeName, typer.Option(help="Hyper-parameters to start from.")] = RecipeName.paper,
    architecture: Annotated[
        str, typer.Option(help="open_clip architecture or local-dir:/folder.")
    ] = "ViT-B-16",
    pretrained: Annotated[
        str | None, typer.Option(help="Tag or checkpoint file; '' for local-dir:.")
    ] = "openai",
    steps: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    batch_tiles: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Instead of the recipe's.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads of PyTorch.")] = None,
    seed: int = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other field of TrainConfig; repeatable."),
    ] = None,
) -> None:
    """Train a satellite encoder on a training set; goes on where a killed run stopped; also under torchrun."""
    from graft_pipeline.settings import load_settings

    with open_reporter() as reporter:
        sensors = load_settings().sensor_records
        if sensor not in sensors:
            raise InputError(f"No sensor {sensor!r}: use one of {', '.join(sensors)}.")
        from training.loop import train
        from training.recipes import RECIPES

        config = RECIPES[recipe].encoder(level.value, sensors[sensor], architecture, pretrained or None, seed)
        given = {"steps": steps, "batch_tiles": batch_tiles, "learning_rate": learning_rate}
        given = {name: value for name, value in given.items() if value is not None}
        config = with_fields(replace(config, device=device, threads=threads, **given), set_ or [])
        result = train(config, UPath(training_set), UPath(root), UPath(output), reporter.progress)
        reporter.result(result)
    if reporter.is_heard or os.environ.get("RANK", "0") != "0":
        # Dagster shows the result; of several processes of torchrun the first speaks for all.
        return
    best = [row for row in result.validations if row["step"] == result.best_step]
    console = Console()
    console.print(
        f"{result.folder} (model {result.model_id}, step {result.best_step}) in {result.seconds:.0f} s"
    )
    for row in best:
        console.print({name: round(value, 4) for name, value in row.items()})


def with_fields(config: "TrainConfig", assignments: list[str]) -> "TrainConfig":
    """A configuration with some of its fields set from text.

    Args:
        config: the configuration.
        assignments: `name=value` each; a value is JSON, or text if it is none.

    Returns:
        The changed configuration.

    Raises:
        InputError: if there is no such field, or its value is of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    types, changes = get_type_hints(type(config)), {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator or name not in types:
            raise InputError(f"--set {assignment}: write NAME=VALUE, NAME being one of {', '.join(types)}.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        try:
            changes[name] = TypeAdapter(types[name]).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            (problem, *_) = error.errors(include_url=False)
            raise InputError(f"--set {assignment}: {problem['msg']}; give such a value.") from None
    return replace(config, **changes)


@app.command()
def foundation(
    captions: Annotated[Path, typer.Argument(help="CSV with columns `file` (relative to it) and `caption`.")],
    output: Annotated[str, typer.Argument(help="open_clip folder to write.")],
    steps: Annotated[int, typer.Option(min=1)] = 200,
    seed: int = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads of PyTorch.")] = None,
) -> None:
    """Train a small CLIP from scratch on captioned photos."""
    from training.foundation import FoundationConfig, train_foundation

    try:
        # Spreadsheets put a byte order mark before the first column's name.
        with captions.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{captions} cannot be read ({error}): give a CSV file in UTF-8.") from None
    if not rows or not all(row.get("file") and row.get("caption") for row in rows):
        raise InputError(f"{captions} needs the columns `file` and `caption`, and both in each row.")
    images = []
    for row in track(rows, description="Reading photos"):
        try:
            with Image.open(captions.parent / row["file"]) as image:
                images.append(np.asarray(image.convert("RGB")))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{row['file']} is no image ({error}): correct or leave out its row.") from None
    config = FoundationConfig(steps=steps, seed=seed)
    result = train_foundation(
        images, [row["caption"] for row in rows], UPath(output), config, threads=threads
    )
    Console().print(f"{result.folder} (model {result.model_id}), loss {result.losses[-1]:.3f}")


@app.command()
def scenes(
    output: Annotated[
        str, typer.Argument(help="Safetensors file to write; GRAFT_SCENE_CHECKPOINT names it.")
    ],
    sun397: Annotated[
        Path,
        typer.Option(help="Folder with SUN397/, Partitions/ and hierarchy_three_levels/, each as published."),
    ],
    split: Annotated[int, typer.Option(help="Official split, 1 to 10.")] = 1,
    partitions: Annotated[Path | None, typer.Option(help="Folder of Training_01.txt and so on.")] = None,
    hierarchy: Annotated[
        Path | None, typer.Option(help="three_levels.xlsx, or its sheet SUN397 exported as CSV.")
    ] = None,
    weights: Annotated[
        str,
        typer.Option(help="auto: ImageNet's if they are on this machine; scratch; or a state dict's file."),
    ] = "auto",
    image_px: Annotated[int, typer.Option(help="Side of what the network sees.")] = 224,
    epochs: int = 10,
    batch_size: int = 64,
    learning_rate: float = 3e-4,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads of PyTorch.")] = None,
    seed: int = 0,
) -> None:
    """Train the indoor/outdoor classifier on SUN397; goes on after the last whole epoch of a killed run."""
    from rich.progress import Progress

    from training.scenes import LabelledPhotos, SceneConfig, train_scenes
    from training.sun397 import read_sun397

    found = read_sun397(sun397, split, partitions=partitions, hierarchy=hierarchy)
    config = SceneConfig(
        crop_px=image_px,
        # torchvision's own proportion, 256 to 224.
        resize_px=round(image_px * 8 / 7),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weights=weights,
        device=device,
        threads=threads,
        seed=seed,
    )
    facts = {
        "data": "SUN397",
        "split": split,
        "scene_classes": len(found.classes),
        "ambiguous_classes": list(found.ambiguous),
        "absent_photos": found.absent,
    }
    train, test = (LabelledPhotos(part.images, part.labels) for part in (found.train, found.test))
    console = Console()
    with Progress(console=console) as bar:
        task = bar.add_task("Training")
        result = train_scenes(
            train,
            test,
            UPath(output),
            config,
            facts=facts,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    scores = result.scores
    console.print(
        f"{output}: accuracy {scores.accuracy:.4f} on {int(scores.confusion.sum())} images of Testing_{split:02d} "
        f"(indoor {scores.recall['indoor']:.4f}, outdoor {scores.recall['outdoor']:.4f})"
    )
    console.print(
        f"Left out: {result.unreadable} images that cannot be decoded, {found.absent} absent ones, "
        f"{len(found.ambiguous)} classes on both sides."
    )


def main() -> None:
    """Run the command line; errors of ours become one line, without a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    try:
        app()
    except GraftError as error:
        Console(stderr=True).print(f"[red]{type(error).__name__}:[/red] {error}")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
