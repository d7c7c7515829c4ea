"""The two losses of GRAFT (Eq. 2 and Eq. 3) on flat batches: one row per photo of any tile, no padding.

Which photos a batch holds is decided in data.py; what is encoded into the embeddings, in encoders.py.
"""

import torch
from torch import Tensor

from graft_pipeline.errors import InputError


def image_level_loss(
    tiles: Tensor,
    photos: Tensor,
    tile_of_photo: Tensor,
    temperature: float,
    others: Tensor | None = None,
    identity: Tensor | None = None,
) -> Tensor:
    """Eq. 2: a tile is close to all of its photos and far from every other photo of the batch.

    The outer mean is over tiles that have at least one photo, the inner mean over the tile's photos, and the
    denominator runs over all photos of the batch, the tile's own included, as the paper writes it. With one
    photo per tile it is the image-to-text half of CLIP's loss.

    Args:
        tiles: (B, D) float, L2-normalised, f_S^I of the tiles.
        photos: (P, D) float, L2-normalised, f_G of the photos; frozen, but gradients would flow.
        tile_of_photo: (P,) int64, row in `tiles` that each photo belongs to, in any order.
        temperature: tau.
        others: (Q, D) float, photos of the batch whose tiles another process has: in denominators only.
        identity: (P + Q,) int64, which photo each row of `photos`, then of `others`, is. Given, denominators
            count each photo once, so that a photo under two tiles of the batch is not its own negative; None
            counts every row, as the paper writes it.

    Returns:
        Scalar loss, natural logarithm.

    Raises:
        InputError: if the shapes do not fit or there is no photo.
    """
    _check(tiles, photos, tile_of_photo, others, identity)
    logits = tiles @ _all(photos, others).T / temperature
    own = logits[tile_of_photo, torch.arange(len(photos), device=logits.device)]
    denominator = _log_denominator(logits, identity)
    return _mean_over_tiles(denominator[tile_of_photo] - own, tile_of_photo, len(tiles))


def pixel_level_loss(
    pixels: Tensor,
    photos: Tensor,
    tile_of_photo: Tensor,
    tile_count: int,
    temperature: float,
    others: Tensor | None = None,
    identity: Tensor | None = None,
) -> Tensor:
    """Eq. 3: the patch that a photo was taken in is close to it and far from every other photo of the batch.

    Means and denominator are as in `image_level_loss`; other photos of the same tile are negatives here, as
    the paper writes it.

    Args:
        pixels: (P, D) float, L2-normalised, f_S^P(s)[p] at the pixel of each photo.
        photos: (P, D) float, L2-normalised, f_G of the photos.
        tile_of_photo: (P,) int64, number of the tile that each photo belongs to, in any order.
        tile_count: one more than the largest number that `tile_of_photo` may hold.
        temperature: tau.
        others: (Q, D) float, photos of the batch whose tiles another process has: in denominators only.
        identity: (P + Q,) int64, which photo each row of `photos`, then of `others`, is. Given, denominators
            count each photo once, so that a photo under two tiles of the batch is not its own negative; None
            counts every row, as the paper writes it.

    Returns:
        Scalar loss, natural logarithm.

    Raises:
        InputError: if the shapes do not fit or there is no photo.
    """
    if pixels.shape != photos.shape:
        raise InputError(
            f"Pixels {tuple(pixels.shape)} and photos {tuple(photos.shape)} must be the same shape."
        )
    _check(pixels, photos, tile_of_photo, others, identity)
    logits = pixels @ _all(photos, others).T / temperature
    per_photo = _log_denominator(logits, identity) - logits.diagonal()
    return _mean_over_tiles(per_photo, tile_of_photo, tile_count)


def _all(photos: Tensor, others: Tensor | None) -> Tensor:
    return photos if others is None else torch.cat([photos, others])


def _log_denominator(logits: Tensor, identity: Tensor | None) -> Tensor:
    """Logarithm of each row's denominator; of columns that are the same photo, the first counts."""
    if identity is not None:
        order = identity.argsort(stable=True)
        ordered = identity[order]
        is_repeat = torch.zeros_like(identity, dtype=torch.bool)
        is_repeat[order[1:]] = ordered[1:] == ordered[:-1]
        logits = logits.masked_fill(is_repeat, -torch.inf)
    return logits.logsumexp(dim=1)


def _mean_over_tiles(per_photo: Tensor, tile_of_photo: Tensor, tile_count: int) -> Tensor:
    """Mean over tiles of the mean over each tile's photos; tiles without a photo do not count."""
    photos_of_tile = torch.bincount(tile_of_photo, minlength=tile_count)
    tiles = (photos_of_tile > 0).sum()
    return (per_photo / (photos_of_tile[tile_of_photo] * tiles).to(per_photo.dtype)).sum()


def _check(
    rows: Tensor, photos: Tensor, tile_of_photo: Tensor, others: Tensor | None, identity: Tensor | None
) -> None:
    if rows.ndim != 2 or photos.ndim != 2 or rows.shape[1] != photos.shape[1]:
        raise InputError(
            f"Embeddings must be (N, D) and (P, D), got {tuple(rows.shape)} and {tuple(photos.shape)}."
        )
    if len(photos) == 0 or tile_of_photo.shape != (len(photos),):
        raise InputError(f"Each of the {len(photos)} photos needs a tile, got {tuple(tile_of_photo.shape)}.")
    columns = len(photos) + (0 if others is None else len(others))
    if identity is not None and identity.shape != (columns,):
        raise InputError(f"Each of the {columns} photos needs an identity, got {tuple(identity.shape)}.")
