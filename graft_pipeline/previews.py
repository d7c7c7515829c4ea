"""Pictures that people look at before they read: contact sheets, maps, curves, confusion matrices, overlays.

Functions take arrays and tables and return PNG bytes; where a picture is shown is the caller's matter.
"""

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

#: Pictures in metadata live in Dagster's event log: keep them small.
MAX_BYTES = 200_000
#: Frames of what was decided or predicted rightly (or kept) and wrongly (or dropped).
RIGHT, WRONG = (34, 136, 51), (204, 51, 17)


def data_uri(picture: bytes) -> str:
    """A picture (PNG or JPEG) as a data URI."""
    kind = "jpeg" if picture[:2] == b"\xff\xd8" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def to_markdown(picture: bytes, caption: str) -> str:
    """A picture (PNG or JPEG) as Markdown, as Dagster's metadata shows it."""
    return f"![{caption}]({data_uri(picture)})"


def contact_sheet(
    images: Sequence[np.ndarray],
    labels: Sequence[str] = (),
    *,
    columns: int = 8,
    cell_px: int = 96,
    marks: Sequence[np.ndarray] = (),
    frames: Sequence[tuple[int, int, int] | None] = (),
    label_lines: int = 1,
) -> bytes:
    """Lay images out in a grid.

    Args:
        images: (H, W, 3) uint8 arrays of any size; each is fitted into its cell.
        labels: a few words under each image.
        columns: images per row.
        cell_px: side of a cell.
        marks: per image an (M, 2) array of (column, row) positions in its own pixels, drawn as dots.
        frames: per image an RGB colour of its frame, or None.
        label_lines: lines that a label may take; what is longer is cut.

    Returns:
        A JPEG. An empty sheet says so.
    """
    label_px = 13 * label_lines if labels else 0
    rows = max(1, -(-len(images) // columns))
    width = columns if len(images) >= columns else max(1, len(images))
    sheet = Image.new("RGB", (width * (cell_px + 4) + 4, rows * (cell_px + label_px + 4) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    if not len(images):
        draw.text((6, 6), "nothing to show", fill="black")
    for number, array in enumerate(images):
        left = 4 + number % columns * (cell_px + 4)
        top = 4 + number // columns * (cell_px + label_px + 4)
        image = Image.fromarray(array)
        scale = cell_px / max(image.size)
        fitted = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))),
            Image.Resampling.BILINEAR,
        )
        sheet.paste(fitted, (left, top))
        if number < len(marks):
            for column, row in marks[number]:
                x, y = left + column * scale, top + row * scale
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(255, 60, 60), outline="white")
        frame = frames[number] if number < len(frames) else None
        if frame:
            draw.rectangle((left, top, left + cell_px - 1, top + cell_px - 1), outline=frame, width=3)
        if number < len(labels):
            lines = textwrap.wrap(labels[number], cell_px // 6) if label_lines > 1 else [labels[number]]
            for line, text in enumerate(lines[:label_lines]):
                draw.text((left, top + cell_px + 1 + 13 * line), text[: cell_px // 6], fill="black")
    return _jpeg(sheet)


def _jpeg(image: Image.Image) -> bytes:
    """Encode below MAX_BYTES by lowering quality, then size: pictures here are for the eye, not for measurement."""
    while True:
        for quality in (88, 75, 60, 40):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= MAX_BYTES:
                return buffer.getvalue()
        image = image.reduce(2)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # The object-oriented interface: no global state, no display, safe in any thread.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # No Software/Date entries: the same figure gives the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def scatter_map(
    layers: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    title: str,
    bounds: tuple[float, float, float, float] | None = None,
) -> bytes:
    """Draw points of several kinds on a plain longitude-latitude map.

    Args:
        layers: name to (longitudes, latitudes), EPSG:4326 degrees; later layers lie on top.
        title: heading.
        bounds: (west, south, east, north) of a frame, such as a region's borders.

    Returns:
        A PNG.
    """
    figure, axes = _figure(5.2, 4.4)
    latitudes = [0.0]
    for number, (name, (lon, lat)) in enumerate(layers.items()):
        axes.scatter(
            lon, lat, s=5 if number == 0 else 9, alpha=0.6, label=f"{name} ({len(lon):,})", linewidths=0
        )
        latitudes = list(lat) or latitudes
    if bounds:
        west, south, east, north = bounds
        axes.plot([west, east, east, west, west], [south, south, north, north, south], color="0.3", lw=0.8)
        latitudes = [south, north]
    axes.set_aspect(1 / max(0.1, float(np.cos(np.radians(np.mean(latitudes))))))
    axes.set(title=title, xlabel="longitude", ylabel="latitude")
    axes.ticklabel_format(useOffset=False)
    if layers:
        axes.legend(fontsize=7, loc="upper right")
    return _png(figure)


def density_map(lon: np.ndarray, lat: np.ndarray, *, title: str) -> bytes:
    """Draw the frequency of pairs over the ground (paper, figure 4).

    Args:
        lon: longitudes of the pairs, degrees.
        lat: latitudes of the pairs, degrees.
        title: heading.

    Returns:
        A PNG.
    """
    figure, axes = _figure(5.6, 4.2)
    if len(lon):
        image = axes.hexbin(lon, lat, gridsize=60, bins="log", cmap="Blues", mincnt=1, linewidths=0.1)
        figure.colorbar(image, ax=axes, label="pairs")
        axes.set_aspect(1 / max(0.1, float(np.cos(np.radians(np.mean(lat))))))
    axes.set(title=title, xlabel="longitude", ylabel="latitude")
    return _png(figure)


def cell_maps(
    outlines: Sequence[np.ndarray], panels: Sequence[tuple[str, np.ndarray]], *, title: str, columns: int = 4
) -> bytes:
    """Draw values of cells, darker is more (paper, figure 5), one small map beside the other.

    Args:
        outlines: (V, 2) corners of each cell, longitude and latitude in degrees.
        panels: heading and (C,) values of each map, drawn from 0 to their greatest.
        title: heading of all.
        columns: maps in a row.

    Returns:
        A PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(1.9 * columns, 2.0 * rows + 0.4), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    corners = np.concatenate([np.zeros((0, 2)), *outlines])
    for number, (heading, values) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_title(heading, fontsize=8)
        axes.set(xticks=[], yticks=[], facecolor="#f1f1ee")
        if len(outlines):
            cells = PolyCollection(outlines, cmap="Blues", edgecolors="face", linewidths=0.2)
            cells.set_array(values)
            # A map of nothing is white, not dark.
            cells.set_clim(0, max(float(np.nanmax(values)), 1e-9))
            axes.add_collection(cells)
            axes.set(xlim=(corners[:, 0].min(), corners[:, 0].max()))
            axes.set(ylim=(corners[:, 1].min(), corners[:, 1].max()))
            axes.set_aspect(1 / max(0.1, float(np.cos(np.radians(corners[:, 1].mean())))))
    figure.suptitle(title, fontsize=10)
    # One colour ramp and black: a palette shows the same in a third of the bytes.
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(_png(figure))) as drawn:
        drawn.convert("RGB").quantize(64).save(buffer, "PNG")
    return buffer.getvalue()


def histogram(values: np.ndarray, *, title: str, unit: str) -> bytes:
    """Draw how a quantity is distributed.

    Args:
        values: finite numbers.
        title: heading.
        unit: label of the horizontal axis.

    Returns:
        A PNG.
    """
    figure, axes = _figure(4.4, 2.8)
    axes.hist(values, bins=40, color="#4477aa")
    axes.set(title=title, xlabel=unit, ylabel="count")
    return _png(figure)


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    ylabel: str,
    xlabel: str = "step",
) -> bytes:
    """Draw curves, of trainings as a rule.

    Args:
        series: name to (steps, values).
        title: heading.
        ylabel: label of the vertical axis.
        xlabel: label of the horizontal axis.

    Returns:
        A PNG.
    """
    figure, axes = _figure(5.0, 3.0)
    for name, (steps, values) in series.items():
        axes.plot(steps, values, label=name, lw=1.2, marker="o" if len(values) < 12 else None, ms=3)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _png(figure)


def bars(groups: Mapping[str, Mapping[str, float]], *, title: str, ylabel: str) -> bytes:
    """Draw grouped bars: contenders side by side for each metric.

    Args:
        groups: metric to contender to value.
        title: heading.
        ylabel: label of the vertical axis.

    Returns:
        A PNG.
    """
    figure, axes = _figure(6.0, 3.2)
    contenders = list(dict.fromkeys(name for values in groups.values() for name in values))
    colours = ["#228833", "#66ccee", "#bbbbbb", "#ee6677", "#ccbb44"]
    width = 0.8 / max(1, len(contenders))
    for number, contender in enumerate(contenders):
        heights = [groups[metric].get(contender, 0.0) for metric in groups]
        positions = np.arange(len(groups)) + number * width
        drawn = axes.bar(positions, heights, width, label=contender, color=colours[number % len(colours)])
        axes.bar_label(drawn, fmt="%.2f", fontsize=7)
    axes.set_xticks(np.arange(len(groups)) + 0.4 - width / 2, list(groups))
    axes.set(title=title, ylabel=ylabel)
    # Room for the legend above the bars.
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.legend(fontsize=8, loc="upper center", ncols=len(contenders))
    return _png(figure)


def by_metric(metrics: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Turn `{task: {contender: {metric: value}}}` into the `{metric: {contender: value}}` that `bars` draws."""
    groups: dict[str, dict[str, float]] = {}
    for contenders in metrics.values():
        for contender, values in contenders.items():
            for metric, value in values.items():
                groups.setdefault(metric, {})[contender] = value
    return groups


def confusion(matrix: np.ndarray, classes: Sequence[str], *, title: str) -> bytes:
    """Draw a confusion matrix, rows normalised.

    Args:
        matrix: (C, C) counts, rows are the truth.
        classes: C names.
        title: heading.

    Returns:
        A PNG.
    """
    figure, axes = _figure(5.0, 4.6)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Greens", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(classes)), classes, fontsize=7)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.05:
            axes.text(
                column,
                row,
                f"{share:.0%}"[:-1],
                ha="center",
                va="center",
                fontsize=6,
                color="white" if share > 0.6 else "black",
            )
    axes.set(title=title, xlabel="predicted (numbers in %)", ylabel="truth")
    return _png(figure)


def overlay(image: np.ndarray, class_map: np.ndarray, palette: np.ndarray, alpha: float = 0.55) -> np.ndarray:
    """Lay a class map over an image.

    Args:
        image: (H, W, 3) uint8.
        class_map: (H, W) class ids.
        palette: (C, 3) uint8 colours.
        alpha: weight of the map.

    Returns:
        (H, W, 3) uint8.
    """
    blended = (1 - alpha) * image + alpha * palette[class_map]
    return np.asarray(blended.round(), np.uint8)
