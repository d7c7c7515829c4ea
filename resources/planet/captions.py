"""Captioned ground photos: what the demo's stand-in for CLIP is trained on, from another planet.

The drawings are ground.py's; how a model learns from them is training/foundation.py's business.
"""

import numpy as np
from numpy.typing import NDArray

from resources.planet.ground import INDOOR_KINDS, OFF_TOPIC_KINDS, Dice, is_outdoor, render_scene
from resources.planet.landcover import CLASS_NAMES, CLASSES
from resources.planet.noise import salt

#: Names of what is no land-cover class.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "kitchen": ("kitchen",),
    "bedroom": ("bedroom",),
    "office": ("office",),
    "museum": ("museum",),
    "dog": ("dog",),
    "person": ("person",),
    "food": ("plate of food",),
    "car": ("car",),
}

#: Share of photos that show no land-cover class.
OTHER_SHARE = 0.25

#: Prompts of the zero-shot test for outdoor scenes; every word of them occurs in captions.
OUTDOOR_PROMPTS = ("a photo taken outdoors", "a view outdoors")
INDOOR_PROMPTS = ("a photo taken indoors", "a view indoors")

_TEMPLATES = ("a photo of {a}", "a photo of {a}", "{a}", "a view of {a}", "a view of the {b}", "the {b}")
_PLACED_TEMPLATES = ("a photo of {a} {where}", "{a}, {where}", "a view of the {b} {where}")
_PLACE_ONLY = ("a photo taken {where}", "a view {where}")


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption_of(kind: str, dice: Dice) -> str:
    """A caption of a photo.

    Args:
        kind: what it shows.
        dice: decides the words.

    Returns:
        Lower-case text.
    """
    names = CLASS_NAMES[kind] if kind in CLASS_NAMES else OTHER_NAMES[kind]
    # The first name is the usual one.
    name = names[0] if dice.chance(0.65) else dice.pick(names)
    where = "outdoors" if is_outdoor(kind) else "indoors"
    draw = dice.one()
    template = dice.pick(_PLACE_ONLY if draw < 0.1 else _PLACED_TEMPLATES if draw < 0.4 else _TEMPLATES)
    return template.format(a=_with_article(name), b=name, where=where)


def captioned_photos(
    seed: int, count: int, *, size_px: int = 64
) -> tuple[NDArray[np.uint8], list[str], list[str]]:
    """Photos with captions, as a web crawl of some planet would find them.

    Args:
        seed: the planet; use another one than the photos that are to be paired.
        count: number of photos.
        size_px: side of the pictures: the central square of a photo whose shorter side is this.

    Returns:
        Pictures (count, size_px, size_px, 3) uint8 RGB, captions and kinds, each of length count.
    """
    pictures = np.empty((count, size_px, size_px, 3), np.uint8)
    captions, kinds = [], []
    wide = round(size_px * 4 / 3)
    left = (wide - size_px) // 2
    others = INDOOR_KINDS + OFF_TOPIC_KINDS
    for number in range(count):
        dice = Dice(salt(seed, "captioned", number))
        kind = dice.pick(others if dice.chance(OTHER_SHARE) else CLASSES)
        ahead = dice.pick(CLASSES)
        is_portrait = dice.chance(0.2)
        drawing = salt(seed, "captioned drawing", number)
        if is_portrait:
            picture = render_scene(kind, drawing, size_px, wide, ahead)[left : left + size_px]
        else:
            picture = render_scene(kind, drawing, wide, size_px, ahead)[:, left : left + size_px]
        pictures[number] = picture
        captions.append(caption_of(kind, dice))
        kinds.append(kind)
    return pictures, captions, kinds
