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

#: Largest contact sheet.
MAX_BYTES = 200_000
#: Pictures in metadata live in Dagster's event log, base64-coded: those of one materialisation together.
EVENT_BYTES = 130_000
#: Colours of kinds, told apart by people of any eyesight (Okabe and Ito).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#999999", "#f0e442")
#: Frames of what was decided or predicted rightly (or kept) and wrongly (or dropped).
RIGHT, WRONG = (34, 136, 51), (204, 51, 17)
WHITE = (255, 255, 255)


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
    mark_colours: Sequence[Sequence[tuple[int, int, int]]] = (),
    squares: Sequence[tuple[float, float, float, float] | None] = (),
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
        mark_colours: per image the RGB colours of its first dots; the others are red.
        squares: per image (left, top, right, bottom) of a square in its own pixels, or None.
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
        square = squares[number] if number < len(squares) else None
        if square:
            corners = [at + scale * value for at, value in zip((left, top) * 2, square, strict=True)]
            draw.rectangle(corners, outline=(255, 255, 255))
        if number < len(marks):
            colours = mark_colours[number] if number < len(mark_colours) else ()
            # Those with a colour of their own on top.
            for mark in reversed(range(len(marks[number]))):
                x, y = (
                    at + scale * value for at, value in zip((left, top), marks[number][mark], strict=True)
                )
                colour = colours[mark] if mark < len(colours) else (255, 60, 60)
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour, outline="white")
        frame = frames[number] if number < len(frames) else None
        if frame:
            draw.rectangle((left, top, left + cell_px - 1, top + cell_px - 1), outline=frame, width=3)
        if number < len(labels):
            lines = textwrap.wrap(labels[number], cell_px // 6) if label_lines > 1 else [labels[number]]
            for line, text in enumerate(lines[:label_lines]):
                draw.text((left, top + cell_px + 1 + 13 * line), text[: cell_px // 6], fill="black")
    return _jpeg(sheet)


def tile_view(
    chip: np.ndarray,
    square: tuple[float, float, float, float],
    marks: np.ndarray,
    photos: Sequence[np.ndarray | None],
    *,
    highlighted: int | None = None,
    columns: int = 4,
    cell_px: int = 132,
) -> bytes:
    """Draw one tile: its chip with the numbered positions of its photos, and the photos by their numbers beside it.

    Args:
        chip: (H, W, 3) uint8.
        square: left, top, right, bottom of the footprint in the chip, pixels.
        marks: (M, 2) column and row of each photo in the chip.
        photos: the first of them, (H, W, 3) uint8 of any size, or None for one without an image.
        highlighted: number of a photo that is shown in another colour, from 0.
        columns: photos in a row.
        cell_px: side of a photo's cell.

    Returns:
        A JPEG.
    """
    from PIL import ImageFont

    font, gap = ImageFont.load_default(12), 6
    rows = -(-len(photos) // columns)
    height = max(chip.shape[0], rows * (cell_px + gap))
    width = chip.shape[1] + gap + min(columns, len(photos)) * (cell_px + gap)
    sheet = Image.new("RGB", (width, height), "white")
    sheet.paste(Image.fromarray(chip))
    draw = ImageDraw.Draw(sheet)
    draw.rectangle(square, outline="white")

    def number(x: float, y: float, index: int) -> None:
        colour = WRONG if index == highlighted else (30, 30, 30)
        draw.ellipse((x - 9, y - 9, x + 9, y + 9), fill=colour, outline="white")
        draw.text((x, y), str(index + 1), fill="white", font=font, anchor="mm")

    # The first ones on top.
    for index in reversed(range(len(marks))):
        number(float(marks[index][0]), float(marks[index][1]), index)
    for index, photo in enumerate(photos):
        left = chip.shape[1] + gap + index % columns * (cell_px + gap)
        top = index // columns * (cell_px + gap)
        if photo is None:
            draw.rectangle((left, top, left + cell_px, top + cell_px), outline="gray")
        else:
            image = Image.fromarray(photo)
            image.thumbnail((cell_px, cell_px))
            sheet.paste(image, (left, top))
        number(left + 11, top + 11, index)
    return _jpeg(sheet)


def _jpeg(image: Image.Image, most_bytes: int = MAX_BYTES) -> bytes:
    """Encode below a size by lowering quality, then size: pictures here are for the eye, not for measurement."""
    while True:
        for quality in (88, 75, 60, 45):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= most_bytes or max(image.size) < 32:
                return buffer.getvalue()
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)))


def fit(pictures: Mapping[str, bytes], most_bytes: int = EVENT_BYTES) -> dict[str, bytes]:
    """Make the pictures of one materialisation small enough together.

    Args:
        pictures: PNG or JPEG by name.
        most_bytes: their sum.

    Returns:
        The same; the largest are encoded with less quality, and smaller, until all fit.
    """
    shown = dict(pictures)
    # Charts are small, sheets take what they leave.
    rest, left = most_bytes, len(shown)
    for name in sorted(shown, key=lambda name: (len(shown[name]), name)):
        share = rest // left
        if len(shown[name]) > share:
            with Image.open(io.BytesIO(shown[name])) as image:
                shown[name] = _jpeg(image.convert("RGB"), share)
        rest, left = rest - len(shown[name]), left - 1
    return shown


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # The object-oriented interface: no global state, no display, safe in any thread.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _literal(text: str) -> str:
    """Words of others, in which dollars are no signs of formulas to Matplotlib."""
    return text.replace("$", r"\$")


def _png(figure: Any) -> bytes:
    drawn, buffer = io.BytesIO(), io.BytesIO()
    # No Software/Date entries: the same figure gives the same bytes.
    figure.savefig(drawn, format="png", metadata={"Software": None})
    # Few colours: a palette shows the same in a third of the bytes.
    with Image.open(drawn) as image:
        palette = image.convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        palette.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def scatter_map(
    layers: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    title: str,
    bounds: tuple[float, float, float, float],
    discs_km: float | None = None,
    area: Any = None,
) -> bytes:
    """Draw points of several kinds on a plain longitude-latitude map.

    Args:
        layers: name to (longitudes, latitudes), EPSG:4326 degrees; later layers lie on top.
        title: heading.
        bounds: (west, south, east, north) of a frame, such as a region's borders.
        discs_km: radius of discs around the points of the first layer.
        area: shapely geometry of degrees that lies below all, such as the registered areas.

    Returns:
        A PNG.
    """
    from matplotlib.patches import Ellipse

    figure, axes = _figure(4.6, 5.0)
    west, south, east, north = bounds
    north_degree_km = 111.2
    shrink = max(0.1, float(np.cos(np.radians((south + north) / 2))))
    if area is not None and not area.is_empty:
        _fill(axes, area, facecolor="#eef3e6", edgecolor="#7a9a4f", label="registered areas")
    for number, (name, (lon, lat)) in enumerate(layers.items()):
        colour = COLOURS[number % len(COLOURS)]
        if number == 0 and discs_km:
            height = 2 * discs_km / north_degree_km
            for x, y in zip(lon, lat, strict=True):
                axes.add_patch(
                    Ellipse((x, y), height / shrink, height, facecolor=colour, alpha=0.15, edgecolor="none")
                )
        axes.scatter(lon, lat, s=9, color=colour, alpha=0.7, label=f"{name} ({len(lon):,})", linewidths=0)
    axes.plot([west, east, east, west, west], [south, south, north, north, south], color="0.3", lw=0.8)
    # What lies beyond the region is shown as far as a disc may reach.
    margin = (discs_km or 0) / north_degree_km + 0.02 * (north - south)
    axes.set(xlim=(west - margin / shrink, east + margin / shrink), ylim=(south - margin, north + margin))
    _as_map(axes, shrink, title)
    if layers:
        figure.legend(fontsize=8, loc="outside lower center", ncols=2, frameon=False, markerscale=2)
    return _png(figure)


def cell_frames(
    cells: Mapping[str, tuple[float, float, float, float]], area: Any, *, title: str, most_names: int = 60
) -> bytes:
    """Draw areas and the cells of the grid that they touch.

    Args:
        cells: name to (west, south, east, north), degrees.
        area: shapely geometry of the areas, degrees.
        title: heading.
        most_names: more cells than these are drawn without their names.

    Returns:
        A PNG.
    """
    figure, axes = _figure(5.6, 4.6)
    _fill(axes, area, facecolor="#cfe2b8", edgecolor="#7a9a4f")
    latitudes = [0.0]
    for name, (west, south, east, north) in cells.items():
        axes.plot([west, east, east, west, west], [south, south, north, north, south], color="0.4", lw=0.7)
        latitudes = [south, north]
        if len(cells) <= most_names:
            axes.text((west + east) / 2, (south + north) / 2, name, ha="center", va="center", fontsize=6)
    _as_map(axes, max(0.1, float(np.cos(np.radians(np.mean(latitudes))))), title)
    return _png(figure)


def _fill(axes: Any, area: Any, **style: Any) -> None:
    """Fill polygons, holes left open."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    rings = [
        np.asarray(ring.coords)[:, :2]
        for polygon in getattr(area, "geoms", [area])
        if polygon.geom_type == "Polygon"
        for ring in (polygon.exterior, *polygon.interiors)
    ]
    if rings:
        axes.add_patch(PathPatch(Path.make_compound_path(*map(Path, rings)), lw=0.8, zorder=0, **style))
        axes.autoscale_view()


def _as_map(axes: Any, shrink: float, title: str) -> None:
    """Axes in degrees, as long as wide on the ground; few ticks, so that their labels have room."""
    from matplotlib.ticker import MaxNLocator

    axes.set_aspect(1 / shrink)
    axes.set(title=title, xlabel="longitude", ylabel="latitude")
    axes.ticklabel_format(useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(6))


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
        axes.set_title(_literal(heading), fontsize=8)
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
    figure.suptitle(_literal(title), fontsize=10)
    return _png(figure)


def histograms(panels: Mapping[str, np.ndarray], *, title: str, bins: int = 40) -> bytes:
    """Draw how quantities are distributed, one beside the other.

    Args:
        panels: label of the horizontal axis, with its unit, to finite numbers; one without any says so.
        title: heading of all.
        bins: most bars of each.

    Returns:
        A PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.3 * len(panels) + 0.4, 2.7), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    for number, (label, values) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(labelsize=8)
        if not len(values):
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "no values", ha="center", va="center", transform=axes.transAxes)
            continue
        edges: Any = bins
        if np.issubdtype(np.asarray(values).dtype, np.integer) and np.ptp(values) < bins:
            # A bar for each number.
            edges = np.arange(values.min() - 0.5, values.max() + 1)
        axes.hist(values, bins=edges, color=COLOURS[0])
        axes.axvline(float(np.median(values)), color=COLOURS[3], lw=1)
        axes.set_title(f"median {np.median(values):.4g}, n = {len(values):,}", fontsize=8)
        if number == 1:
            axes.set_ylabel("count", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return _png(figure)


def counts(values: Mapping[str, int], *, title: str, most: int = 12) -> bytes:
    """Draw counts as bars with their names, longest first, such as rows by the reason why they are not ok.

    Args:
        values: name to count.
        title: heading.
        most: bars; the rest is one bar more.

    Returns:
        A PNG.
    """
    ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    if len(ordered) > most:
        ordered = [*ordered[:most], ("others", sum(count for _, count in ordered[most:]))]
    figure, axes = _figure(5.0, 0.9 + 0.28 * max(1, len(ordered)))
    names, heights = [name for name, _ in ordered][::-1], [count for _, count in ordered][::-1]
    drawn = axes.barh(names, heights, color=COLOURS[3])
    axes.bar_label(drawn, [f" {count:,}" for count in heights], fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_xlim(0, 1.15 * max([1, *heights]))
    axes.set_title(title, fontsize=10)
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
        drawn = axes.bar(
            positions, heights, width, label=_literal(contender), color=colours[number % len(colours)]
        )
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
    names = [_literal(name) for name in classes]
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
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
    axes.set(title=_literal(title), xlabel="predicted (numbers in %)", ylabel="truth")
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
