"""The demo's report: one HTML page and one JSON file from what the scoring assets left in the storage.

Scores are computed in training/zero_shot; nothing is computed here.
"""

import json
from pathlib import Path
from typing import Any, Protocol

from upath import UPath

from graft_pipeline.errors import DataError
from graft_pipeline.manifests import write_bytes_atomic
from graft_pipeline.previews import data_uri


class Rooted(Protocol):
    """Something with a storage root (resources.storage.Storage)."""

    @property
    def root(self) -> UPath:
        """The root."""
        ...


def scores_folder(storage: Rooted, sensor: str) -> UPath:
    """Where the scoring assets of a sensor leave their JSON and pictures."""
    return storage.root / "scores" / f"sensor={sensor}"


def write_scores(folder: UPath, name: str, metrics: dict[str, Any], pictures: dict[str, bytes]) -> None:
    """Leave metrics and pictures of one scoring asset for the report.

    Args:
        folder: `scores_folder` of the sensor.
        name: of the asset.
        metrics: `{task: {contender: {metric: value}}}`.
        pictures: PNG or JPEG by name.
    """
    write_bytes_atomic(folder / f"{name}.json", (json.dumps(metrics, indent=2) + "\n").encode())
    for title, picture in pictures.items():
        suffix = "jpg" if picture[:2] == b"\xff\xd8" else "png"
        write_bytes_atomic(folder / f"{title}.{suffix}", picture)


def read_scores(storage: Rooted, sensor: str) -> dict[str, Any]:
    """The metrics of a sensor: `{task: {contender: {metric: value}}}`.

    Raises:
        DataError: if nothing was scored.
    """
    files = (
        sorted(scores_folder(storage, sensor).glob("*.json"))
        if scores_folder(storage, sensor).exists()
        else []
    )
    if not files:
        raise DataError(f"{sensor} has no scores: materialise its `zero_shot_scores` first.")
    tasks: dict[str, Any] = {}
    for file in files:
        tasks |= json.loads(file.read_text())
    return tasks


def encoder_of(values: dict[str, Any]) -> str | None:
    """Name of the satellite encoder among contenders."""
    return next((name for name in values if name.endswith("_encoder")), None)


def blind_of(values: dict[str, Any]) -> str:
    """Name of what sees no image among contenders: chance, or of questions the most frequent answers."""
    return "prior only" if "prior only" in values else "chance"


def write_report(folder: Path, storage: Rooted, sensors: list[str], **facts: Any) -> dict[str, Any]:
    """Write `scores.json` and `report.html`.

    Args:
        folder: where to.
        storage: where the scores are.
        sensors: which sensors were scored.
        **facts: seed, total_seconds, seconds and peak_memory_mb by stage, traffic (requests by kind).

    Returns:
        The content of scores.json.
    """
    from jinja2 import Environment, PackageLoader

    scores = {**facts, "sensors": sensors, **{sensor: read_scores(storage, sensor) for sensor in sensors}}
    write_bytes_atomic(folder / "scores.json", (json.dumps(scores, indent=2) + "\n").encode())
    environment = Environment(loader=PackageLoader("graft_pipeline", "."), autoescape=True)
    environment.filters["score"] = lambda value: "" if value is None else f"{value:.3f}"
    rows, pictures = {}, {}
    for sensor in sensors:
        rows[sensor] = [
            (
                task,
                metric,
                *(
                    contenders.get(name, {}).get(metric)
                    for name in (encoder_of(contenders), "foundation", blind_of(contenders))
                ),
            )
            for task, contenders in scores[sensor].items()
            for metric in dict.fromkeys(m for values in contenders.values() for m in values)
        ]
        files = sorted(
            file for file in scores_folder(storage, sensor).iterdir() if file.suffix in {".png", ".jpg"}
        )
        pictures[sensor] = [(f.stem, f.stem.replace("_", " "), data_uri(f.read_bytes())) for f in files]
    page = environment.get_template("report.html").render(rows=rows, pictures=pictures, **scores)
    write_bytes_atomic(folder / "report.html", page.encode())
    return scores
