import numpy as np
import pytest

from resources.planet.captions import (
    INDOOR_PROMPTS,
    OTHER_NAMES,
    OTHER_SHARE,
    OUTDOOR_PROMPTS,
    captioned_photos,
)
from resources.planet.ground import INDOOR_KINDS, OFF_TOPIC_KINDS, Dice, render_scene
from resources.planet.landcover import CLASS_NAMES, CLASSES

KINDS = CLASSES + INDOOR_KINDS + OFF_TOPIC_KINDS


@pytest.fixture(scope="module")
def captioned():
    return captioned_photos(5, 900)


def test_dice_repeat_themselves():
    first, second = Dice(1), Dice(1)
    values = [first.one() for _ in range(500)]
    assert values == [second.one() for _ in range(500)]
    assert len(set(values)) == 500
    assert min(values) >= 0
    assert max(values) < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(160, 120), (120, 160), (85, 64)])
def test_scenes_are_functions_of_their_dice(kind, size):
    picture = render_scene(kind, 3, *size, ahead="forest")
    assert picture.shape == (size[1], size[0], 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 8
    np.testing.assert_array_equal(picture, render_scene(kind, 3, *size, ahead="forest"))
    assert np.abs(picture.astype(int) - render_scene(kind, 4, *size, ahead="forest")).mean() > 5


def test_kinds_can_be_told_apart(captioned):
    pictures, _, kinds = captioned
    small = pictures.reshape(len(pictures), 8, 8, 8, 8, 3).mean(axis=(2, 4)).reshape(len(pictures), -1)
    names = np.array(kinds)
    half = len(pictures) // 2
    means = {name: small[:half][names[:half] == name].mean(axis=0) for name in set(kinds)}
    order = list(means)
    distance = np.stack([np.square(small[half:] - means[name]).sum(axis=1) for name in order])
    hit = np.array(order)[distance.argmin(axis=0)] == names[half:]
    # Chance is 5 %; this is blind to all detail.
    assert hit.mean() > 0.4


def test_captions(captioned):
    pictures, captions, kinds = captioned
    assert pictures.shape == (900, 64, 64, 3)
    assert pictures.dtype == np.uint8
    assert len(captions) == len(kinds) == 900
    assert set(kinds) == set(KINDS)
    assert np.isclose(np.mean([kind not in CLASSES for kind in kinds]), OTHER_SHARE, atol=0.06)
    names = CLASS_NAMES | OTHER_NAMES
    for caption, kind in zip(captions, kinds, strict=True):
        assert caption == caption.lower()
        is_named = any(name in caption for name in names[kind])
        assert is_named or caption in (*OUTDOOR_PROMPTS, *INDOOR_PROMPTS)
        assert ("indoors" not in caption) or kind not in CLASSES
        assert ("outdoors" not in caption) or kind in CLASSES
    words = {word for caption in captions for word in caption.replace(",", "").split()}
    for text in (*OUTDOOR_PROMPTS, *INDOOR_PROMPTS, *(name for some in names.values() for name in some)):
        assert set(text.split()) <= words


def test_captioned_photos_repeat_and_differ_by_seed():
    first, again, other = captioned_photos(5, 40), captioned_photos(5, 40), captioned_photos(6, 40)
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1:] == again[1:]
    assert first[2] != other[2]
    longer = captioned_photos(5, 60)
    np.testing.assert_array_equal(longer[0][:40], first[0])


def test_captioned_photos_of_another_size():
    pictures, _, _ = captioned_photos(5, 4, size_px=96)
    assert pictures.shape == (4, 96, 96, 3)
