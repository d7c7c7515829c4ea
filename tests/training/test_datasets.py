"""Every set is written to disk in the files its authors publish, with pixels that tell which image was read."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
from PIL import Image
from scipy.io import savemat
from upath import UPath

from graft_pipeline.chips import encode
from graft_pipeline.errors import DataError, InputError
from graft_pipeline.geometry import Grid
from graft_pipeline.manifests import partition_file, write_table
from graft_pipeline.schemas import CHIPS, OSM_LABELS, TILES
from graft_pipeline.shards import ShardWriter
from training.zero_shot.datasets import (
    EUROSAT_CLASSES,
    SAT_CLASSES,
    bigearthnet_nomenclature,
    open_image_set,
    read_bigearthnet,
    read_eurosat,
    read_osm_labels,
    read_sat,
)
from training.zero_shot.prompts import load_prompts


def write_tiff(path, bands):
    """(count, H, W) array as GeoTIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = bands.shape
    transform = rasterio.Affine(10, 0, 500_000, 0, -10, 4_700_000)
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=bands.dtype,
        crs="EPSG:32633", transform=transform,
    ) as file:  # fmt: skip
        file.write(bands)


# --- EuroSAT ---


def eurosat_rgb(root, classes=EUROSAT_CLASSES, each=2):
    for place, name in enumerate(classes):
        for number in range(1, each + 1):
            path = root / name / f"{name}_{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (20 * place, 10 * number, 200)).save(path, quality=95)
    return root


@pytest.mark.parametrize("inside", ["", "2750", "EuroSAT_RGB"])
def test_eurosat_is_read_from_its_class_folders(tmp_path, inside):
    eurosat_rgb(tmp_path / inside)
    made = read_eurosat(tmp_path)
    assert made.classes == EUROSAT_CLASSES == load_prompts("eurosat").names
    assert len(made) == 20
    assert not made.is_multi_label
    assert (made.labels.sum(axis=1) == 1).all()
    for number, name in enumerate(made.ids):
        own, count = name.split("_")
        assert made.classes[made.labels[number].argmax()] == own
        image = made.read(number)
        assert image.shape == (64, 64, 3)
        expected = [20 * EUROSAT_CLASSES.index(own), 10 * int(count), 200]
        assert np.abs(image.astype(int) - expected).max() <= 4


def test_eurosats_thirteen_bands_are_shown_as_our_chips_are(tmp_path):
    bands = np.zeros((13, 64, 64), np.uint16)
    bands[1], bands[2], bands[3] = 300, 1500, 3000
    write_tiff(tmp_path / "EuroSAT_MS" / "River" / "River_1.tif", bands)
    made = read_eurosat(tmp_path)
    assert made.classes[made.labels[0].argmax()] == "River"
    assert (made.read(0) == [255, 128, 26]).all()
    assert made.skipped == {"class without images": 9}


def test_eurosat_with_strange_folders_and_a_broken_image_counts_them(tmp_path):
    root = eurosat_rgb(tmp_path / "2750", EUROSAT_CLASSES[:3])
    (root / "Volcano").mkdir()
    Image.new("RGB", (64, 64)).save(root / "Volcano" / "Volcano_1.jpg")
    (root / "Forest" / "Forest_1.jpg").write_bytes(b"\xff\xd8\xff\xe0 not an image")
    made = read_eurosat(tmp_path)
    assert made.skipped == {"label not in the table": 1, "class without images": 7}
    assert len(made) == 6
    broken = made.ids.index("Forest_1")
    with pytest.raises(DataError, match=r"Forest_1\.jpg cannot be decoded"):
        made.read(broken)


# --- BigEarthNet ---


def bigearthnet_patch(folder, value):
    for band, scale in (("B04", 1), ("B03", 2), ("B02", 3)):
        write_tiff(folder / f"{folder.name}_{band}.tif", np.full((1, 120, 120), value * scale, np.uint16))


def bigearthnet_1(root, patches):
    """Patches by name: labels, or None for a label file that is cut."""
    for number, (name, labels) in enumerate(patches.items(), start=1):
        bigearthnet_patch(root / name, 100 * number)
        text = json.dumps(
            {"labels": labels, "coordinates": {"ulx": 0}, "acquisition_date": "2017-06-13 10:10:31"}
        )
        (root / name / f"{name}_labels_metadata.json").write_text(text if labels is not None else text[:20])


PATCHES = {
    "S2A_MSIL2A_20170613T101031_0_45": ["Olive groves", "Vineyards", "Water bodies"],
    "S2A_MSIL2A_20170613T101031_0_46": ["Airports"],
    "S2A_MSIL2A_20170613T101031_0_47": None,
    "S2A_MSIL2A_20170613T101031_0_48": ["Sea and ocean", "Atlantis"],
    "S2A_MSIL2A_20170613T101031_0_49": ["Coniferous forest", "Airports"],
    "S2A_MSIL2A_20170613T101031_0_50": ["Pastures"],
}


def labels_of(made):
    return {
        name: {made.classes[n] for n in np.flatnonzero(row)}
        for name, row in zip(made.ids, made.labels, strict=True)
    }


def test_bigearthnet_1_in_19_classes(tmp_path):
    bigearthnet_1(tmp_path / "BigEarthNet-v1.0", PATCHES)
    (tmp_path / "patches_with_seasonal_snow.csv").write_text("S2A_MSIL2A_20170613T101031_0_50\n")
    made = read_bigearthnet(tmp_path)
    assert made.classes == load_prompts("bigearthnet").names
    assert made.is_multi_label
    assert labels_of(made) == {
        "S2A_MSIL2A_20170613T101031_0_45": {"Permanent crops", "Inland waters"},
        "S2A_MSIL2A_20170613T101031_0_49": {"Coniferous forest"},
    }
    assert made.skipped == {
        "snow or cloud": 1,
        "no label of these classes": 1,
        "unreadable labels": 1,
        "label not in the table": 1,
    }
    # 100, 200, 300 of the display range 0..3000.
    assert made.read(0).shape == (120, 120, 3)
    assert (made.read(0) == [9, 17, 26]).all()


def test_bigearthnet_1_in_43_classes_and_a_split(tmp_path):
    root = tmp_path / "BigEarthNet-v1.0"
    bigearthnet_1(root, PATCHES)
    (root / "splits").mkdir()
    (root / "splits" / "test.csv").write_text("\n".join(list(PATCHES)[:2]))
    made = read_bigearthnet(root, classes=43)
    assert set(made.classes) == set(load_prompts("bigearthnet43").names)
    assert labels_of(made) == {
        "S2A_MSIL2A_20170613T101031_0_45": {"Olive groves", "Vineyards", "Water bodies"},
        "S2A_MSIL2A_20170613T101031_0_46": {"Airports"},
    }


def test_the_nomenclature_is_bigearthnets():
    tables = bigearthnet_nomenclature()
    assert len(tables["classes_43"]) == len(set(tables["classes_43"])) == 43
    assert len(tables["classes_19"]) == 19
    # Sumbul et al. (2021) leave eleven classes out.
    assert len(tables["from_43"]) == 43 - 11


def test_bigearthnet_2(tmp_path):
    scene = "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP"
    rows = []
    for number, (split, snow, labels) in enumerate(
        [
            ("test", False, ["Arable land", "Mixed forest"]),
            ("test", True, ["Arable land"]),
            ("train", False, ["Pastures"]),
            ("test", False, ["Lava"]),
        ]
    ):
        patch = f"{scene}_51_{80 + number}"
        bigearthnet_patch(tmp_path / "BigEarthNet-S2" / scene / patch, 100 * (number + 1))
        rows.append(
            {
                "patch_id": patch,
                "labels": labels,
                "split": split,
                "country": "Austria",
                "s1_name": "S1B",
                "s2v1_name": "S2A",
                "contains_seasonal_snow": snow,
                "contains_cloud_or_shadow": False,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    made = read_bigearthnet(tmp_path)
    assert labels_of(made) == {f"{scene}_51_80": {"Arable land", "Mixed forest"}}
    assert made.skipped == {"snow or cloud": 1, "label not in the table": 1}
    assert (made.read(0) == [9, 17, 26]).all()
    with pytest.raises(InputError, match="19 classes"):
        read_bigearthnet(tmp_path, classes=43)


# --- SAT-4 and SAT-6 ---


def sat(path, classes, count=12):
    images = np.zeros((28, 28, 4, count), np.uint8)
    images[:, :, 0], images[:, :, 3] = np.arange(count), 99
    images[0, :, 1] = 200
    labels = np.zeros((classes, count), np.float64)
    labels[np.arange(count) % classes, np.arange(count)] = 1
    savemat(path, {"test_x": images, "test_y": labels, "train_x": images[..., :4], "train_y": labels[:, :4]})
    return path


@pytest.mark.parametrize("classes", [4, 6])
def test_sat_is_read_from_its_matlab_file(tmp_path, classes):
    made = read_sat(sat(tmp_path / f"sat-{classes}-full.mat", classes))
    assert made.name == f"sat{classes}"
    assert made.classes == SAT_CLASSES[classes] == load_prompts(made.name).names
    assert (made.labels.argmax(axis=1) == np.arange(12) % classes).all()
    for number in range(12):
        image = made.read(number)
        assert image.shape == (28, 28, 3)
        assert (image[..., 0] == number).all()
        # The first axis is rows.
        assert (image[0, :, 1] == 200).all()
        assert (image[1:, :, 1] == 0).all()
    assert len(read_sat(tmp_path, split="train")) == 4


def test_sat_leaves_out_images_without_one_label(tmp_path):
    path = sat(tmp_path / "sat-4-full.mat", 4, count=4)
    images = np.zeros((28, 28, 4, 3), np.uint8)
    labels = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]).T
    savemat(path, {"test_x": images, "test_y": labels})
    made = read_sat(path)
    assert (made.ids, made.skipped) == (("test-0",), {"not one label": 2})


def test_sat_files_that_are_none(tmp_path):
    (tmp_path / "cut.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    for path in (tmp_path / "cut.mat", tmp_path / "missing.mat", tmp_path):
        with pytest.raises(InputError, match="download"):
            read_sat(path)
    savemat(tmp_path / "odd.mat", {"test_x": np.zeros((28, 28, 3, 2), np.uint8), "test_y": np.eye(4)[:, :2]})
    with pytest.raises(DataError, match="28, 28, 4"):
        read_sat(tmp_path / "odd.mat")


# --- NAIP-OSM ---


def naip_osm(root, splits):
    """A region's tiles by split (None: labelled once, and no tile any more); their chips' grey is their number."""
    place = {"sensor": "naip", "region": "N42W072"}
    rows = {dataset: [] for dataset in (TILES, CHIPS, OSM_LABELS)}
    folder = partition_file(root, CHIPS, **place).parent
    folder.mkdir(parents=True)
    with ShardWriter(folder, "chips-00000.tar") as shard:
        for number, split in enumerate(splits):
            tile = {"tile_id": f"tile-{number}"}
            chip = encode(
                np.full((448, 448, 3), number, np.uint8), Grid(32619, 500_000, 4_700_000, 1.0, 448, 448)
            )
            at = shard.add(f"{tile['tile_id']}.tif", chip)
            held = {"shard": "chips-00000.tar", "offset": at.offset, "size_bytes": at.size_bytes}
            rows[CHIPS].append(tile | held | {"status": "ok"})
            labels = ["forest", "water"] if number % 2 else ["forest"]
            rows[OSM_LABELS].append(tile | {"labels": labels, "single_label": "forest"})
            if split is not None:
                rows[TILES].append(tile | {"split": split})
    for dataset, of in rows.items():
        nothing = {
            field.name: None if field.nullable else "" if pa.types.is_string(field.type) else 0
            for field in dataset.schema
        } | ({"shares": []} if dataset is OSM_LABELS else {})
        full = [nothing | row for row in of]
        write_table(
            partition_file(root, dataset, **place), pa.Table.from_pylist(full, schema=dataset.schema), dataset
        )


def test_naip_osm_is_what_the_encoders_have_not_learned(tmp_path):
    splits = ["train", "validation", "guard", "validation", "train", None]
    naip_osm(UPath(tmp_path), splits)
    for name in ("naip_osm", "naip_osm_single"):
        made = open_image_set(name, tmp_path)
        assert made.ids == ("tile-1", "tile-3")
        assert made.skipped == {
            "tile of the split train": 2,
            "tile of the split guard": 1,
            "no tile any more": 1,
        }
        assert made.read(1).shape == (224, 224, 3)
        assert (made.read(1) == 3).all()


def test_naip_osm_of_training_tiles_alone_is_refused(tmp_path):
    naip_osm(UPath(tmp_path), ["train", "train"])
    with pytest.raises(InputError, match=r"validation split .*'tile of the split train': 2"):
        read_osm_labels(tmp_path)


# --- by name ---


@pytest.mark.parametrize("name", ["eurosat", "bigearthnet", "bigearthnet43", "sat4", "sat6"])
def test_an_absent_set_says_where_it_is_to_be_had(tmp_path, name):
    with pytest.raises(InputError, match=r"download .*https://"):
        open_image_set(name, tmp_path)


def test_sets_are_opened_by_name(tmp_path):
    path = sat(tmp_path / "sat-6-full.mat", 6)
    assert open_image_set("sat6", path).name == "sat6"
    with pytest.raises(InputError, match="holds sat6, not sat4"):
        open_image_set("sat4", path)
    # They are published in one archive, and lie in one folder.
    sat(tmp_path / "sat-4-full.mat", 4)
    assert [open_image_set(name, tmp_path).name for name in ("sat4", "sat6")] == ["sat4", "sat6"]
    with pytest.raises(InputError, match="use one of eurosat"):
        open_image_set("imagenet", path)
