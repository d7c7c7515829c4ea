import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from graft_pipeline.errors import InputError
from training.losses import image_level_loss, pixel_level_loss

COUNTS = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def batch(counts, seed=0, width=7):
    generator = torch.Generator().manual_seed(seed)

    def vectors(n):
        return F.normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=1)

    photos = sum(counts)
    tile_of_photo = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return vectors(len(counts)), vectors(photos), vectors(photos), tile_of_photo


def literal(query_of, photos, tile_of_photo, tile_count, tau, counted=None):
    """Eq. 2 and Eq. 3 as printed: query_of(i, j) is f_S(s_i), or f_S(s_i)[p_i^j]; `counted`: only these rows."""
    total = 0.0
    counted = range(len(photos)) if counted is None else counted
    for i in range(tile_count):
        own = [j for j in range(len(photos)) if tile_of_photo[j] == i]
        inner = 0.0
        for j in own:
            query = query_of(i, j)
            denominator = sum(torch.exp(query @ photos[b] / tau) for b in counted)
            inner = inner - torch.log(torch.exp(query @ photos[j] / tau) / denominator)
        total = total + inner / len(own)
    return total / tile_count


@settings(max_examples=15, deadline=None)
@given(counts=COUNTS, tau=st.floats(0.05, 1.0))
def test_image_loss_and_gradient_are_those_of_the_printed_equation(counts, tau):
    tiles, _, photos, tile_of_photo = batch(counts)
    ours, theirs = tiles.clone().requires_grad_(), tiles.clone().requires_grad_()
    loss = image_level_loss(ours, photos, tile_of_photo, tau)
    expected = literal(lambda i, j: theirs[i], photos, tile_of_photo, len(counts), tau)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(counts=COUNTS, tau=st.floats(0.05, 1.0))
def test_pixel_loss_and_gradient_are_those_of_the_printed_equation(counts, tau):
    _, pixels, photos, tile_of_photo = batch(counts)
    ours, theirs = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
    loss = pixel_level_loss(ours, photos, tile_of_photo, len(counts), tau)
    expected = literal(lambda i, j: theirs[j], photos, tile_of_photo, len(counts), tau)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 1000))
def test_losses_do_not_depend_on_the_order_of_tiles_and_photos(counts, seed):
    tiles, pixels, photos, tile_of_photo = batch(counts)
    random = np.random.default_rng(seed)
    photo_order = torch.from_numpy(random.permutation(len(photos)))
    tile_order = torch.from_numpy(random.permutation(len(tiles)))
    place_of_tile = torch.argsort(tile_order)
    moved = place_of_tile[tile_of_photo][photo_order]
    torch.testing.assert_close(
        image_level_loss(tiles[tile_order], photos[photo_order], moved, 0.07),
        image_level_loss(tiles, photos, tile_of_photo, 0.07),
    )
    torch.testing.assert_close(
        pixel_level_loss(pixels[photo_order], photos[photo_order], moved, len(tiles), 0.07),
        pixel_level_loss(pixels, photos, tile_of_photo, len(tiles), 0.07),
    )


def test_one_photo_per_tile_is_the_image_to_text_half_of_clip():
    tiles, _, photos, tile_of_photo = batch([1] * 6)
    expected = F.cross_entropy(tiles @ photos.T / 0.07, torch.arange(6))
    torch.testing.assert_close(image_level_loss(tiles, photos, tile_of_photo, 0.07), expected)
    torch.testing.assert_close(pixel_level_loss(tiles, photos, tile_of_photo, 6, 0.07), expected)


def test_every_tile_counts_alike_however_many_photos_it_has():
    # Two tiles, orthogonal to all photos: each photo's term is log P, so must be the mean.
    photos = torch.eye(8, dtype=torch.float64)[:5]
    tiles = torch.eye(8, dtype=torch.float64)[6:]
    loss = image_level_loss(tiles, photos, torch.tensor([0, 0, 0, 0, 1]), 0.07)
    assert loss.item() == pytest.approx(math.log(5))
    tiles = torch.stack([photos[0], tiles[1]])
    first, second = (
        image_level_loss(tiles, photos, torch.tensor(owner), 1.0).item()
        for owner in ([0, 0, 0, 0, 1], [0, 1, 1, 1, 1])
    )
    # By hand: the first tile's photos are at cosine 1, 0, 0, 0; the second tile's all at 0.
    log_denominator = math.log(math.e + 4)
    assert first == pytest.approx(((log_denominator - 0.25) + math.log(5)) / 2)
    assert second == pytest.approx(((log_denominator - 1.0) + math.log(5)) / 2)


def test_tiles_without_photos_do_not_count():
    tiles, _, photos, tile_of_photo = batch([2, 3])
    padded = torch.cat([tiles, tiles[:1]])
    torch.testing.assert_close(
        image_level_loss(padded, photos, tile_of_photo, 0.07),
        image_level_loss(tiles, photos, tile_of_photo, 0.07),
    )


def test_large_logits_stay_finite():
    vectors = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert torch.isfinite(image_level_loss(vectors, vectors, torch.arange(4), 1e-3))


def test_shapes_that_do_not_fit_are_refused():
    tiles, pixels, photos, tile_of_photo = batch([1, 2])
    with pytest.raises(InputError, match="needs a tile"):
        image_level_loss(tiles, photos, tile_of_photo[:-1], 0.07)
    with pytest.raises(InputError, match="same shape"):
        pixel_level_loss(pixels[:-1], photos, tile_of_photo, 2, 0.07)
    with pytest.raises(InputError, match="Embeddings"):
        image_level_loss(tiles[:, :3], photos, tile_of_photo, 0.07)
    with pytest.raises(InputError, match="needs a tile"):
        image_level_loss(tiles, photos[:0], tile_of_photo[:0], 0.07)


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(1, 5), min_size=2, max_size=6), cut=st.integers(1, 5))
def test_shares_of_a_batch_add_up_to_the_whole(counts, cut):
    # What two processes compute: own tiles as queries, all photos in the denominators.
    tiles, pixels, photos, tile_of_photo = batch(counts)
    cut = min(cut, len(counts) - 1)
    image_parts, pixel_parts = 0.0, 0.0
    for rows in (slice(0, cut), slice(cut, len(counts))):
        own = (tile_of_photo >= rows.start) & (tile_of_photo < rows.stop)
        share = len(counts[rows]) / len(counts)
        owner = tile_of_photo[own] - rows.start
        arguments = photos[own], owner
        image_parts += share * image_level_loss(tiles[rows], *arguments, 0.07, photos[~own])
        pixel_parts += share * pixel_level_loss(
            pixels[own], *arguments, len(counts[rows]), 0.07, photos[~own]
        )
    torch.testing.assert_close(image_parts, image_level_loss(tiles, photos, tile_of_photo, 0.07))
    whole = pixel_level_loss(pixels, photos, tile_of_photo, len(counts), 0.07)
    torch.testing.assert_close(pixel_parts, whole)


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(1, 5), min_size=2, max_size=5), seed=st.integers(0, 1000))
def test_a_photo_under_several_tiles_is_not_its_own_negative_if_asked(counts, seed):
    tiles, pixels, distinct, tile_of_photo = batch(counts)
    # A photo is at most once under a tile, as in a training set, but under any number of tiles.
    random = np.random.default_rng(seed)
    identity = torch.from_numpy(np.concatenate([random.permutation(len(distinct))[:n] for n in counts]))
    photos = distinct[identity]
    rows = identity.tolist()
    once = [b for b in range(len(rows)) if rows[b] not in rows[:b]]

    def image(queries, identity=None):
        return image_level_loss(queries, photos, tile_of_photo, 0.2, None, identity)

    def pixel(queries, identity=None):
        return pixel_level_loss(queries, photos, tile_of_photo, len(counts), 0.2, None, identity)

    for loss, queries, row in ((image, tiles, lambda i, j: i), (pixel, pixels, lambda i, j: j)):
        ours, theirs = queries.clone().requires_grad_(), queries.clone().requires_grad_()
        got = loss(ours, identity)
        each = list(theirs)
        expected = literal(
            lambda i, j, each=each, row=row: each[row(i, j)], photos, tile_of_photo, len(counts), 0.2, once
        )
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        got.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
        # Where no photo is under two tiles, it is the printed equation again.
        torch.testing.assert_close(loss(queries, torch.arange(len(photos))), loss(queries))


def test_another_process_may_hold_the_same_photo():
    tiles, pixels, photos, tile_of_photo = batch([2, 2, 1])
    photos = photos[[0, 1, 1, 2, 0]]
    identity = torch.tensor([0, 1, 1, 2, 0])
    image_parts, pixel_parts = 0.0, 0.0
    for rows in (slice(0, 1), slice(1, 3)):
        own = (tile_of_photo >= rows.start) & (tile_of_photo < rows.stop)
        count = rows.stop - rows.start
        options = {"others": photos[~own], "identity": torch.cat([identity[own], identity[~own]])}
        arguments = photos[own], tile_of_photo[own] - rows.start
        image_parts += count / 3 * image_level_loss(tiles[rows], *arguments, 0.07, **options)
        pixel_parts += count / 3 * pixel_level_loss(pixels[own], *arguments, count, 0.07, **options)
    torch.testing.assert_close(
        image_parts, image_level_loss(tiles, photos, tile_of_photo, 0.07, None, identity)
    )
    torch.testing.assert_close(
        pixel_parts, pixel_level_loss(pixels, photos, tile_of_photo, 3, 0.07, None, identity)
    )
    with pytest.raises(InputError, match="needs an identity"):
        image_level_loss(tiles, photos, tile_of_photo, 0.07, None, identity[:-1])
