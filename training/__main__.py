"""`python -m training`: train satellite encoders and small CLIPs from files, without Dagster.

Only arguments are handled here; the work is in loop.py and foundation.py.
"""

import csv
import json
import logging
import os
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    help="Train satellite encoders, and small CLIPs for them, from files and without Dagster.",
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
        InputError: if there is no such field, or its value is of another type than the present one.
    """
    changes = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator or name not in vars(config):
            raise InputError(
                f"--set {assignment}: write NAME=VALUE, NAME being one of {', '.join(vars(config))}."
            )
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        present = getattr(config, name)
        value = tuple(value) if isinstance(present, tuple) and isinstance(value, list) else value
        value = float(value) if isinstance(present, float) and type(value) is int else value
        if present is not None and value is not None and type(value) is not type(present):
            raise InputError(f"--set {assignment}: {name} is of type {type(present).__name__}.")
        changes[name] = value
    return replace(config, **changes)


@app.command()
def foundation(
    captions: Annotated[Path, typer.Argument(help="CSV with columns `file` (relative to it) and `caption`.")],
    output: Annotated[str, typer.Argument(help="open_clip folder to write.")],
    steps: int = 200,
    seed: int = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads of PyTorch.")] = None,
) -> None:
    """Train a small CLIP from scratch on captioned photos."""
    from training.foundation import FoundationConfig, train_foundation

    with captions.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"file", "caption"} <= set(rows[0]):
        raise InputError(f"{captions} needs the columns `file` and `caption`.")
    images = []
    for row in track(rows, description="Reading photos"):
        with Image.open(captions.parent / row["file"]) as image:
            images.append(np.asarray(image.convert("RGB")))
    config = FoundationConfig(steps=steps, seed=seed)
    result = train_foundation(
        images, [row["caption"] for row in rows], UPath(output), config, threads=threads
    )
    Console().print(f"{result.folder} (model {result.model_id}), loss {result.losses[-1]:.3f}")


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
