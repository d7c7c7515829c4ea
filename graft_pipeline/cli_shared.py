"""What commands share: the storage of the settings, tables on a terminal, a deployment's encoders.

The commands are in cli.py and cli_encoders.py.
"""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graft_pipeline.imagery import Sensor
    from graft_pipeline.search import SearchIndex
    from graft_pipeline.settings import Settings
    from resources.storage import Storage
    from training.encoders import Clip


#: Characters that a column of a table needs at least, its border included.
_LEAST_COLUMN_WIDTH = 8


def open_storage() -> "Storage":
    """The storage of the settings, nothing of a world opened."""
    from graft_pipeline.settings import load_settings
    from resources.storage import Storage

    return Storage(load_settings().root)


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print rows as a table on stdout, column by column where it is too wide; None shows nothing."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A pipe has no width of its own: give it room instead of 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 200)
    # Not the table's own title, which is broken to the table's width.
    console.print(Text(title, style="table.title"), soft_wrap=True)
    if console.width < _LEAST_COLUMN_WIDTH * len(columns):
        # A table would lose what its cells hold.
        for row in rows:
            lines = [
                f"{name}: {value}" for name, value in zip(columns, row, strict=True) if value is not None
            ]
            console.print(Text("\n".join(["", *lines])), soft_wrap=True)
        return
    table = Table()
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*["" if value is None else Text(str(value)) for value in row])
    console.print(table)


def check_output(output: Path, *inputs: str | Path | None, is_folder: bool = False) -> None:
    """Make sure, before the work, that its result can be written where it was asked for.

    Args:
        output: file to write, or folder to write into; what is above it is made.
        inputs: what the result is made from: no file that it may replace.
        is_folder: whether it is a folder.

    Raises:
        InputError: if it cannot be written, or is one of the inputs.
    """
    from graft_pipeline.errors import InputError

    if any(
        path is not None and Path(path).exists() and output.exists() and output.samefile(path)
        for path in inputs
    ):
        raise InputError(f"{output} is what is read, and would be lost: name another file to write.")
    folder = output if is_folder else output.parent
    try:
        if output.is_dir() and not is_folder:
            raise IsADirectoryError(None, "Is a directory")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}): name another place.") from error


def sensor_record(settings: "Settings", name: str) -> "Sensor":
    """A sensor of the deployment.

    Raises:
        InputError: if there is none of that name.
    """
    from graft_pipeline.errors import InputError

    if name not in settings.sensor_records:
        raise InputError(f"No sensor {name!r}: use one of {', '.join(settings.sensor_records)}.")
    return settings.sensor_records[name]


def image_clip(storage: "Storage", index: "SearchIndex") -> "Clip":
    """The image-level encoder that an index was made with, whose text tower makes its queries.

    Raises:
        DataError: if the deployment's encoder is another one by now, or gone.
    """
    from graft_pipeline.errors import DataError
    from training.encoders import load_clip

    folder = storage.models_folder / f"sensor={index.sensor}" / "image_encoder" / "encoder"
    if not folder.exists():
        raise DataError(
            f"{folder} holds no encoder any more: materialise {index.sensor}/image_encoder, and what follows."
        )
    clip = load_clip(f"local-dir:{folder}")
    index.check_model(clip.fingerprint())
    return clip


def pixel_clip(
    storage: "Storage", sensor: str, encoder: str | None, pretrained: str | None, device: str = "cpu"
) -> "Clip":
    """The deployment's pixel-level encoder of a sensor, or the one that was named.

    Args:
        storage: of the deployment.
        sensor: whose encoder.
        encoder: folder of another one, or any open_clip ViT; None: the deployment's.
        pretrained: open_clip tag or checkpoint of that ViT.
        device: where it runs.

    Raises:
        InputError: if there is none.
    """
    from graft_pipeline.errors import InputError
    from training.encoders import load_clip

    folder = storage.models_folder / f"sensor={sensor}" / "pixel_encoder" / "encoder"
    if encoder is None and not folder.exists():
        raise InputError(
            f"{folder} holds no encoder: materialise {sensor}/pixel_encoder, or name one with --encoder."
        )
    named = encoder or f"local-dir:{folder}"
    return load_clip(f"local-dir:{named}" if Path(named).is_dir() else named, pretrained, device)
