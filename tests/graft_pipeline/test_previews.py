"""Pictures open, show what they are given, and stay small enough for an event log."""

import io

import numpy as np
import shapely
from PIL import Image

from graft_pipeline import previews


def opened(picture: bytes) -> Image.Image:
    return Image.open(io.BytesIO(picture)).convert("RGB")


def test_a_sheet_shows_every_image_in_its_cell() -> None:
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    sheet = opened(
        previews.contact_sheet([np.full((20, 30, 3), c, np.uint8) for c in colours], columns=2, cell_px=40)
    )
    cell = 44
    for number, colour in enumerate(colours):
        x, y = 4 + number % 2 * cell + 20, 4 + number // 2 * cell + 10
        assert np.abs(np.array(sheet.getpixel((x, y))) - colour).max() < 25


def test_marks_stand_where_they_are_put() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    sheet = opened(previews.contact_sheet([image], cell_px=100, marks=[np.array([[50.0, 25.0]])]))
    assert sheet.getpixel((54, 29))[0] > 150
    assert sheet.getpixel((54, 79))[0] < 60


def test_an_empty_sheet_is_a_picture_too() -> None:
    assert opened(previews.contact_sheet([])).width > 10


def test_noise_that_hardly_compresses_stays_below_the_limit() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (112, 112, 3), dtype=np.uint8) for _ in range(48)]
    assert len(previews.contact_sheet(images, cell_px=112)) <= previews.MAX_BYTES


def test_plots_are_pictures_and_the_same_twice() -> None:
    lon, lat = np.array([-71.0, -70.9]), np.array([42.0, 42.1])
    calls = [
        lambda: previews.scatter_map({"photos": (lon, lat)}, title="t", bounds=(-71.1, 41.9, -70.8, 42.2)),
        lambda: previews.density_map(lon, lat, title="t"),
        lambda: previews.density_map(lon[:0], lat[:0], title="nothing"),
        lambda: previews.scatter_map(
            {"searched": (lon, lat)},
            title="t",
            bounds=(-71.1, 41.9, -70.8, 42.2),
            discs_km=2.0,
            area=shapely.box(-71.2, 41.8, -71, 42).union(shapely.box(-70.9, 41.8, -70, 42)),
        ),
        lambda: previews.cell_frames(
            {"N42W071": (-71.0, 42.0, -70.0, 43.0)}, shapely.box(-71.2, 41.8, -71, 42), title="t"
        ),
        lambda: previews.histograms({"cloud, %": np.arange(10.0), "days": np.zeros(0)}, title="t"),
        lambda: previews.histograms({"photos": np.array([1, 1, 2])}, title="t"),
        lambda: previews.counts({f"reason {n}": n for n in range(20)}, title="t"),
        lambda: previews.counts({}, title="nothing"),
        lambda: previews.curves({"loss": ([1, 2], [3.0, 2.0])}, title="t", ylabel="loss"),
        lambda: previews.bars({"accuracy": {"encoder": 0.8, "chance": 0.1}}, title="t", ylabel="score"),
        lambda: previews.confusion(np.eye(3, dtype=int), ["a", "b", "c"], title="t"),
    ]
    for call in calls:
        first = call()
        assert opened(first).width > 100
        assert call() == first


def test_words_of_others_are_no_formulas() -> None:
    words, square = '$\\frac$ "<b>" é', np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    for picture in (
        previews.cell_maps([square], [(words, np.ones(1))], title=words),
        previews.bars({"accuracy": {words: 0.8}}, title="t", ylabel="score"),
        previews.confusion(np.eye(2, dtype=int), [words, "a"], title=words),
        previews.contact_sheet([np.zeros((8, 8, 3), np.uint8)], [words]),
    ):
        assert opened(picture).width > 100


def test_pictures_of_one_event_are_made_to_fit_together() -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (112, 112, 3), dtype=np.uint8) for _ in range(24)]
    chart = previews.counts({"burst": 3}, title="t")
    pictures = {"first": previews.contact_sheet(noise), "chart": chart, "last": previews.contact_sheet(noise)}
    fitted = previews.fit(pictures)
    assert sum(map(len, pictures.values())) > previews.EVENT_BYTES >= sum(map(len, fitted.values()))
    assert list(fitted) == list(pictures)
    assert fitted["chart"] == chart
    assert opened(fitted["last"]).width > 300


def test_a_dot_has_the_colour_of_its_photo_and_the_footprint_is_drawn() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    sheet = opened(
        previews.contact_sheet(
            [image],
            cell_px=100,
            marks=[np.array([[30.0, 30.0], [70.0, 70.0]])],
            mark_colours=[[(0, 0, 255)]],
            squares=[(10, 10, 90, 90)],
        )
    )
    assert sheet.getpixel((34, 34))[2] > 150 > sheet.getpixel((34, 34))[0]
    assert sheet.getpixel((74, 74))[0] > 150
    assert min(sheet.getpixel((14, 54))) > 120


def test_overlay_mixes_image_and_palette() -> None:
    image, palette = np.zeros((2, 2, 3), np.uint8), np.array([[0, 0, 0], [100, 200, 50]], np.uint8)
    mixed = previews.overlay(image, np.array([[0, 1], [1, 0]]), palette, alpha=0.5)
    assert mixed[0, 1].tolist() == [50, 100, 25]
    assert mixed[0, 0].tolist() == [0, 0, 0]


def test_markdown_carries_the_picture() -> None:
    text = previews.to_markdown(previews.contact_sheet([]), "a sheet")
    assert text.startswith("![a sheet](data:image/jpeg;base64,")
