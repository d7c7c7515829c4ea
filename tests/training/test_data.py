import threading

import numpy as np
import pytest
import torch
from upath import UPath

from graft_pipeline.errors import DataError, InputError
from training.augment import central_crops
from training.data import Batches, Chips, TrainingSet, assemble, first_tiles, validation_batch
from training.encoders import image_features, load_clip, patch_features, to_input
from training.loop import at_pixels
from training.losses import image_level_loss, pixel_level_loss


@pytest.fixture(scope="module")
def data(toy_world):
    return TrainingSet(toy_world.folder, toy_world.root)


def chips_of(data, tiles, **changes):
    options = {"chip_px": 64, "side_px": 32, "memory_bytes": 10**9} | changes
    return Chips(tiles, data.storage_root, **options)


def batches_of(data, **changes):
    tiles = data.split("train")
    options = {"crop_px": 16, "batch_tiles": 8, "photos_per_tile": 3, "max_shift": 0.5, "seed": 5} | changes
    return Batches(tiles, chips_of(data, tiles), data.embeddings, **options)


def test_splits_hold_the_table_as_it_was_written(data, toy_world):
    seen = {}
    for split, count in (("train", 50), ("validation", 10)):
        tiles = data.split(split)
        assert len(tiles) == count
        rows, owner = tiles.photos_of(np.arange(len(tiles)))
        assert rows.tolist() == list(range(len(tiles.embedding_row)))
        ids = sorted(toy_world.photo_class)
        for row, tile in zip(rows, owner, strict=True):
            seen[tiles.tile_id[tile], ids[tiles.embedding_row[row]]] = tuple(tiles.position[row])
    assert seen == toy_world.positions
    assert data.fingerprint == "0123456789abcdef"
    assert data.pair_count == len(toy_world.positions)


def test_photos_of_some_tiles_in_any_order(data):
    tiles = data.split("train")
    chosen = np.array([7, 2, 7])
    rows, owner = tiles.photos_of(chosen)
    expected = [
        (row, place) for place, t in enumerate(chosen) for row in range(*tiles.first_photo[t : t + 2])
    ]
    assert list(zip(rows.tolist(), owner.tolist(), strict=True)) == expected


def test_chips_on_disk_equal_chips_in_memory(data):
    tiles = data.split("train")
    held, read = chips_of(data, tiles), chips_of(data, tiles, memory_bytes=0, threads=2)
    assert held.is_in_memory
    assert not read.is_in_memory
    chosen = np.array([5, 1, 40])
    np.testing.assert_array_equal(held.take(chosen), read.take(chosen))
    whole = chips_of(data, tiles, side_px=64).take(chosen)
    # 64 to 32 px: each new pixel is the mean of four, rounded once per axis.
    means = whole.reshape(3, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(held.take(chosen), means, atol=1.01)


def test_batches_depend_on_seed_and_step_alone(data):
    first, second = batches_of(data), batches_of(data)
    first.draw(0)
    ours, theirs = first.draw(9), second.draw(9)
    np.testing.assert_array_equal(ours.chips, theirs.chips)
    np.testing.assert_array_equal(ours.position, theirs.position)
    np.testing.assert_array_equal(ours.photos, theirs.photos)
    assert not np.array_equal(batches_of(data, seed=6).draw(9).position, ours.position)
    for step, batch in enumerate(first.stream(3, 6, lambda batch: batch), start=3):
        np.testing.assert_array_equal(batch.position, second.draw(step).position)


def test_an_epoch_shows_each_tile_once(data):
    batches = batches_of(data, photos_per_tile=100, max_shift=0.0)
    assert batches.per_epoch == 6
    tiles = data.split("train")
    owner = np.repeat(np.arange(len(tiles)), np.diff(tiles.first_photo))
    for epoch in range(2):
        drawn = [batches.draw(epoch * 6 + place) for place in range(6)]
        per_batch = [set(owner[batch.photo_row]) for batch in drawn]
        assert sum(len(some) for some in per_batch) == len(set.union(*per_batch))


def test_photos_of_a_batch_are_inside_their_crops_capped_and_their_own(data):
    tiles = data.split("train")
    batches = batches_of(data, batch_tiles=50, photos_per_tile=2)
    owner = np.repeat(np.arange(len(tiles)), np.diff(tiles.first_photo))
    drawn = set()
    for step in range(20):
        batch = batches.draw(step)
        assert np.bincount(batch.tile_of_photo).max() <= 2
        assert (np.diff(batch.tile_of_photo) >= 0).all()
        assert batch.crops.holds(batch.position).all()
        back = batch.crops.to_chip(batch.position, batch.tile_of_photo) * 2
        np.testing.assert_allclose(back, tiles.position[batch.photo_row], atol=1e-6)
        np.testing.assert_array_equal(batch.photos, data.embeddings[tiles.embedding_row[batch.photo_row]])
        same_tile = owner[batch.photo_row][:, None] == owner[batch.photo_row]
        np.testing.assert_array_equal(same_tile, batch.tile_of_photo[:, None] == batch.tile_of_photo)
        drawn |= set(batch.photo_row.tolist())
    # The cap draws anew each time: every photo has its turn.
    assert len(drawn) == len(tiles.embedding_row)


def test_photos_that_leave_the_crop_drop_out(data):
    tiles = data.split("train")
    chips = chips_of(data, tiles)
    crops = central_crops(len(tiles), 32, 4)
    batch = assemble(
        tiles, chips, data.embeddings, np.arange(len(tiles)), crops, 100, np.random.default_rng(0)
    )
    inside = (np.abs(tiles.position - 32) < 4).all(axis=1)
    assert sorted(batch.photo_row) == np.flatnonzero(inside).tolist()


def test_the_validation_batch_has_all_tiles_and_photos(data):
    tiles = data.split("validation")
    batch = validation_batch(
        tiles, chips_of(data, tiles), data.embeddings, crop_px=16, photos_per_tile=25, seed=0
    )
    assert len(batch.chips) == 10
    assert len(batch.photos) == len(tiles.embedding_row)


def test_a_part_of_a_split_keeps_its_photos(data):
    tiles = data.split("train")
    part = first_tiles(tiles, 12, seed=0)
    assert len(part) == 12
    for number, tile_id in enumerate(part.tile_id):
        whole = int(np.flatnonzero(tiles.tile_id == tile_id)[0])
        ours, theirs = (
            slice(*part.first_photo[number : number + 2]),
            slice(*tiles.first_photo[whole : whole + 2]),
        )
        np.testing.assert_array_equal(part.position[ours], tiles.position[theirs])
        assert part.offset[number] == tiles.offset[whole]
    assert first_tiles(tiles, 1000, seed=0) is tiles


def test_chips_of_another_size_are_refused(data):
    tiles = data.split("train")
    with pytest.raises(DataError, match="not 448 px"):
        chips_of(data, tiles, chip_px=448)


def test_a_folder_without_a_training_set_is_refused(tmp_path):
    with pytest.raises(InputError, match="Materialise training_set"):
        TrainingSet(UPath(tmp_path), UPath(tmp_path))


def test_an_empty_split_is_refused_for_training(data):
    tiles = data.split("train")
    empty = type(tiles)(*(getattr(tiles, name)[:0] for name in tiles.__dataclass_fields__))
    with pytest.raises(DataError, match="0 tiles for 1"):
        Batches(
            empty, None, data.embeddings, crop_px=16, batch_tiles=2, photos_per_tile=2, max_shift=0, seed=0
        )


def test_processes_share_a_batch_without_loss(data):
    whole = batches_of(data).draw(4)
    parts = [batches_of(data, rank=rank, size=2).draw(4) for rank in range(2)]
    np.testing.assert_array_equal(np.concatenate([part.chips for part in parts]), whole.chips)
    np.testing.assert_array_equal(np.concatenate([part.photos for part in parts]), whole.photos)
    np.testing.assert_array_equal(np.concatenate([part.position for part in parts]), whole.position)
    np.testing.assert_array_equal(parts[0].others, parts[1].photos)
    np.testing.assert_array_equal(parts[1].others, parts[0].photos)
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert whole.share == 1
    assert whole.others.shape == (0, 32)
    with pytest.raises(DataError, match="for 51 processes"):
        batches_of(data, size=51)
    with pytest.raises(InputError, match=r"A batch of 1 tiles .* raise batch_tiles"):
        batches_of(data, batch_tiles=1, size=2)


@pytest.mark.parametrize("level", ["image", "pixel"])
def test_parts_of_a_batch_add_up_to_its_loss_and_gradient(data, toy_world, level):
    # What accumulation computes, in float64: one part after the other, gradients summed.
    clip = load_clip(toy_world.architecture)
    tower = clip.model.visual.double()
    whole = batches_of(data, batch_tiles=20).draw(2)

    def loss_and_gradient(parts):
        tower.zero_grad()
        total = 0.0
        for part in (some for some in parts if len(some.photos)):
            chips = torch.from_numpy(part.chips).permute(0, 3, 1, 2).double()
            pixels = to_input(clip, part.crops.sample(chips))
            photos = torch.from_numpy(part.photos).double()
            others = torch.from_numpy(part.others).double()
            owner = torch.from_numpy(part.tile_of_photo)
            if level == "image":
                loss = image_level_loss(image_features(tower, pixels), photos, owner, 0.07, others)
            else:
                queries = at_pixels(patch_features(tower, pixels), part.position, part.tile_of_photo, 16)
                loss = pixel_level_loss(queries, photos, owner, len(part.crops), 0.07, others)
            (loss * part.share).backward()
            total += loss.item() * part.share
        return total, torch.cat([p.grad.flatten() for p in tower.parameters()])

    expected = loss_and_gradient([whole])
    for count in (2, 3, 20):
        loss, gradient = loss_and_gradient(whole.parts(count))
        assert loss == pytest.approx(expected[0], rel=1e-12)
        torch.testing.assert_close(gradient, expected[1], rtol=1e-9, atol=1e-12)
    assert len(whole.parts(100)) == 20
    assert whole.parts(1)[0] is whole


def test_parts_know_which_photos_are_the_same(data):
    whole = batches_of(data, batch_tiles=20).draw(2)
    for part in whole.parts(3):
        everyone = np.concatenate([part.identity, part.others_identity])
        assert sorted(everyone) == sorted(whole.identity)
        np.testing.assert_array_equal(data.embeddings[part.identity], part.photos)
        np.testing.assert_array_equal(data.embeddings[part.others_identity], part.others)


def test_no_more_batches_are_prepared_than_asked_for(data):
    placed = []
    ahead = threading.Semaphore(0)

    def place(batch):
        placed.append(batch)
        ahead.release()
        return batch

    stream = batches_of(data).stream(0, 9, place, prefetch=2)
    next(stream)
    # The one in use and two ahead.
    assert all(ahead.acquire(timeout=30) for _ in range(3))
    assert not ahead.acquire(timeout=0.2)
    stream.close()
    assert len(placed) == 3


def test_decoded_chips_are_kept_and_damaged_ones_decoded_again(data, tmp_path):
    tiles = data.split("train")
    expected = chips_of(data, tiles).take(np.arange(8))
    options = {"memory_bytes": 0, "cache_folder": tmp_path, "threads": 2}
    for _ in range(2):
        np.testing.assert_array_equal(chips_of(data, tiles, **options).take(np.arange(8)), expected)
    (kept,) = tmp_path.glob("*.chips")
    with kept.open("r+b") as file:
        file.seek(3 * 32 * 32 * 3 + 100)
        file.write(bytes(50))
    np.testing.assert_array_equal(chips_of(data, tiles, **options).take(np.arange(8)), expected)
    # Another size, or other tiles, have files of their own.
    chips_of(data, tiles, **options, side_px=64).take(np.arange(2))
    chips_of(data, first_tiles(tiles, 5, seed=0), **options).take(np.arange(5))
    assert len(list(tmp_path.glob("*.chips"))) == 3


def test_a_cache_on_a_full_disk_keeps_what_it_has(data, small_disk, caplog):
    tiles = data.split("train")
    chosen = np.arange(len(tiles))
    expected = chips_of(data, tiles).take(chosen)
    (small_disk / "ballast").write_bytes(bytes(16 * 2**20 - 40_000))
    for _ in range(2):
        cached = chips_of(data, tiles, memory_bytes=0, cache_folder=small_disk, threads=1)
        np.testing.assert_array_equal(cached.take(chosen), expected)
    assert "the chips that it lacks are decoded each time" in caplog.text
    (kept,) = small_disk.glob("*.chips")
    held = np.fromfile(kept, np.uint8).reshape(-1, *expected.shape[1:])
    assert (held[0] == expected[0]).all()
    assert not (held == expected).all()
