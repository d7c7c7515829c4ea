import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft_pipeline.errors import InputError
from training.augment import central_crops, random_crops

SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, max_shift=st.floats(0, 0.5), crop_px=st.sampled_from([32, 45, 64]))
def test_crops_lie_wholly_inside_their_chips(seed, max_shift, crop_px):
    crops = random_crops(16, 128, crop_px, np.random.default_rng(seed), max_shift=max_shift)
    corners = np.array([[0, 0], [crop_px, 0], [0, crop_px], [crop_px, crop_px]], dtype=float)
    for corner in corners:
        placed = crops.to_chip(np.tile(corner, (16, 1)), np.arange(16))
        assert (placed >= -1e-9).all()
        assert (placed <= 128 + 1e-9).all()


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS)
def test_the_inverse_transform_round_trips(seed):
    random = np.random.default_rng(seed)
    crops = random_crops(8, 128, 64, random)
    chip = random.integers(8, size=100)
    points = random.uniform(0, 64, (100, 2))
    np.testing.assert_allclose(crops.to_crop(crops.to_chip(points, chip), chip), points, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS)
def test_distances_are_kept(seed):
    crops = random_crops(1, 448, 224, np.random.default_rng(seed))
    placed = crops.to_chip(np.array([[0.0, 0.0], [224.0, 0.0], [0.0, 100.0]]), np.zeros(3, int))
    assert np.linalg.norm(placed[1] - placed[0]) == pytest.approx(224)
    assert np.linalg.norm(placed[2] - placed[0]) == pytest.approx(100)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_nothing_is_padded_and_a_position_keeps_its_ground(seed):
    # Channels 0 and 1 hold each pixel's own column and row: a sampled pixel says where it comes from.
    middle = np.arange(128) + 0.5
    columns, rows = np.meshgrid(middle, middle)
    chip = torch.from_numpy(np.stack([columns, rows, np.ones_like(rows)])).float()
    crops = random_crops(4, 128, 64, np.random.default_rng(seed))
    images = crops.sample(chip.expand(4, -1, -1, -1))
    np.testing.assert_allclose(images[:, 2], 1, atol=1e-5)
    own = np.arange(64) + 0.5
    points = np.stack([axis.ravel() for axis in np.meshgrid(own, own)], axis=1)
    for number in range(4):
        expected = crops.to_chip(points, np.full(len(points), number))
        sampled = images[number, :2].reshape(2, -1).T.numpy()
        np.testing.assert_allclose(sampled, expected, atol=2e-3)


def test_a_photo_lands_on_the_pixel_that_shows_its_ground():
    random = np.random.default_rng(3)
    points = random.integers(40, 88, (32, 2))
    chips = torch.zeros(32, 3, 128, 128)
    for chip, (column, row) in zip(chips, points, strict=True):
        chip[:, row - 1 : row + 2, column - 1 : column + 2] = 255
    crops = random_crops(32, 128, 64, random)
    images = crops.sample(chips)
    positions = crops.to_crop(points + 0.5, np.arange(32))
    inside = crops.holds(positions)
    assert inside.sum() > 8
    for image, (column, row) in zip(images[inside], positions[inside], strict=True):
        assert image[0, int(row), int(column)] > 200


def test_rotations_flips_and_shifts_cover_what_they_may():
    crops = random_crops(4000, 128, 64, np.random.default_rng(0))
    determinants = np.linalg.det(crops.matrix)
    assert abs((determinants > 0).mean() - 0.5) < 0.05
    np.testing.assert_allclose(np.abs(determinants), 1)
    angles = np.arctan2(crops.matrix[:, 1, 1], crops.matrix[:, 0, 1])
    assert np.histogram(angles, bins=8, range=(-np.pi, np.pi))[0].min() > 350
    assert np.abs(crops.center - 64).max() > 28
    still = random_crops(100, 128, 64, np.random.default_rng(0), max_shift=0.0)
    np.testing.assert_allclose(still.center, 64)


def test_central_crops_are_the_central_pixels():
    chips = torch.randint(0, 256, (3, 3, 128, 128), generator=torch.Generator().manual_seed(0)).float()
    images = central_crops(3, 128, 64).sample(chips)
    torch.testing.assert_close(images, chips[:, :, 32:96, 32:96], atol=1e-3, rtol=0)


def test_the_square_is_half_open():
    crops = central_crops(1, 128, 64)
    points = np.array([[0.0, 0.0], [63.99, 63.99], [64.0, 0.0], [0.0, 64.0], [-0.01, 5.0]])
    assert crops.holds(points).tolist() == [True, True, False, False, False]


def test_crops_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="does not fit"):
        random_crops(1, 80, 64, np.random.default_rng(0))
    with pytest.raises(InputError, match="Chips must be"):
        central_crops(2, 128, 64).sample(torch.zeros(2, 3, 64, 64))
