"""Draws an answer's evidence on the image: what was counted or measured, what else was found, what relates them.

What counts as evidence is decided in interpreter.py; this file only shows it.
"""

import io
import textwrap

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from training.zero_shot.answering.interpreter import Answer, Detected, Image

#: Colours of concepts in the order in which they were found (Tol's "bright" scheme), readable on land.
COLOURS = ((238, 102, 119), (102, 204, 238), (204, 187, 68), (34, 136, 51), (170, 51, 119), (68, 119, 170))
#: The drawing is at least so large.
_LEAST_PX = 640
#: Objects that are drawn with a box and a number, at most; the others by their outlines alone.
_NUMBERED = 60
_FILLED, _TINTED = 0.40, 0.15
_FONT_PX, _CAPTION_PX, _MARGIN_PX = 13, 16, 8


def draw(answer: Answer, image: Image) -> NDArray[np.uint8]:
    """The image with the evidence on it.

    Objects that the answer rests on are filled, boxed and numbered with their scores; what else was found is tinted. An
    arrow leads from an object to what a relation found it at.

    Args:
        answer: of the interpreter.
        image: that was asked about.

    Returns:
        (H * k, W * k, 3) uint8 RGB, with the least whole k that makes it large enough to read.
    """
    scale = max(1, -(-_LEAST_PX // max(image.height_px, image.width_px)))
    evidence = answer.evidence
    concepts = dict.fromkeys(of.concept for of in (*evidence.objects, *evidence.others))
    colours = {concept: COLOURS[number % len(COLOURS)] for number, concept in enumerate(concepts)}
    canvas = image.pixels.astype(np.float32)
    for objects, share in ((evidence.others, _TINTED), (evidence.objects, _FILLED)):
        for of in objects:
            part = canvas[of.top : of.bottom, of.left : of.right]
            part[of.mask] += (np.array(colours[of.concept], np.float32) - part[of.mask]) * share
    picture = np.repeat(np.repeat(canvas.round().astype(np.uint8), scale, axis=0), scale, axis=1)
    for of in (*evidence.others, *evidence.objects):
        _outline(picture, of, scale, colours[of.concept])
    drawn = Picture.fromarray(picture)
    pen = ImageDraw.Draw(drawn)
    font = ImageFont.load_default(size=_FONT_PX)
    for link in evidence.links[:_NUMBERED]:
        _arrow(pen, _middle(link.one, scale), _middle(link.other, scale))
    for number, of in enumerate(evidence.objects[:_NUMBERED], start=1):
        box = (of.left * scale, of.top * scale, of.right * scale - 1, of.bottom * scale - 1)
        pen.rectangle(box, outline=colours[of.concept], width=2)
        _label(pen, font, (box[0], box[1]), f"{number} {of.concept} {of.score:.2f}", colours[of.concept])
    return np.asarray(drawn)


def to_png(answer: Answer, image: Image, question: str) -> bytes:
    """The drawing with the question, the answer and the steps below it.

    Args:
        answer: of the interpreter.
        image: that was asked about.
        question: that was asked.

    Returns:
        A PNG.
    """
    drawn = draw(answer, image)
    width = drawn.shape[1]
    # About as wide as the font's letters are on average.
    letters = max(20, int((width - 2 * _MARGIN_PX) / (_FONT_PX * 0.56)))
    lines = [*textwrap.wrap(question, letters), *textwrap.wrap(answer.text, letters, max_lines=2)]
    heads = len(lines)
    for step in answer.evidence.steps:
        lines += textwrap.wrap(f"{step.call} = {step.shown}", letters, max_lines=2)
    sheet = Picture.new("RGB", (width, drawn.shape[0] + 2 * _MARGIN_PX + _CAPTION_PX * len(lines)), "white")
    sheet.paste(Picture.fromarray(drawn), (0, 0))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=_FONT_PX)
    for number, line in enumerate(lines):
        place = (_MARGIN_PX, drawn.shape[0] + _MARGIN_PX + number * _CAPTION_PX)
        pen.text(place, line, font=font, fill="black" if number < heads else (90, 90, 90))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=False)
    return buffer.getvalue()


def _outline(picture: NDArray[np.uint8], of: Detected, scale: int, colour: tuple[int, int, int]) -> None:
    large = np.repeat(np.repeat(of.mask, scale, axis=0), scale, axis=1)
    edge = large & ~binary_erosion(large, np.ones((3, 3), bool))
    picture[of.top * scale : of.bottom * scale, of.left * scale : of.right * scale][edge] = colour


def _middle(of: Detected, scale: int) -> tuple[float, float]:
    """A pixel of the object next to its middle, x and y on the drawing."""
    rows, columns = np.nonzero(of.mask)
    middle = of.middle
    # The middle of a river's bend is not on the river.
    nearest = np.argmin((rows + of.top + 0.5 - middle[0]) ** 2 + (columns + of.left + 0.5 - middle[1]) ** 2)
    return (columns[nearest] + of.left + 0.5) * scale, (rows[nearest] + of.top + 0.5) * scale


def _arrow(pen: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float]) -> None:
    pen.line((start, end), fill="white", width=2)
    direction = np.array(end) - np.array(start)
    length = float(np.hypot(*direction))
    if length > 1:
        along = direction / length * 9
        across = np.array([-along[1], along[0]]) / 2
        back = np.array(end) - along
        pen.polygon([tuple(end), tuple(back + across), tuple(back - across)], fill="white")


def _label(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    place: tuple[int, int],
    text: str,
    colour: tuple[int, int, int],
) -> None:
    left, top, right, bottom = pen.textbbox(place, text, font=font)
    # Above the box, or within it at the upper edge of the image.
    up = 0 if place[1] < bottom - top + 4 else -(bottom - top + 4)
    pen.rectangle((left - 1, place[1] + up, right + 2, place[1] + up + bottom - top + 4), fill=colour)
    pen.text((place[0], place[1] + up + 2 - (top - place[1])), text, font=font, fill="black")
