import json

import numpy as np
import open_clip
import torch
from upath import UPath

from training.encoders import encode_images, load_clip
from training.export import read_card, save_encoder
from training.foundation import FoundationConfig, new_clip

SMALL = FoundationConfig(image_px=32, width=32, head_width=16, vision_layers=1, text_layers=1, context=16)


def test_folders_load_with_open_clip_alone(tmp_path):
    clip = new_clip(SMALL)
    clip.preprocess_config["mean"] = [0.5, 0.4, 0.3]
    folder = save_encoder(UPath(tmp_path / "encoder"), clip, {"level": "image"})
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    torch.testing.assert_close(model.state_dict(), clip.model.state_dict())
    assert preprocess.transforms[-1].mean == [0.5, 0.4, 0.3]
    assert open_clip.get_tokenizer(f"local-dir:{folder}")(["a lake"]).shape == (1, 16)
    assert read_card(folder) == {"level": "image"}
    assert load_clip(f"local-dir:{folder}").fingerprint() == clip.fingerprint()


def test_people_read_what_the_card_says(tmp_path):
    card = {
        "what": "Satellite image encoder",
        "level": "image",
        "sensor": {"bands": ["R", "G", "B"], "gsd_m": 0.1 + 0.2, "display_range": None},
        "intended_use": ["Ranking, not measuring."],
    }
    text = (save_encoder(UPath(tmp_path / "encoder"), new_clip(SMALL), card) / "README.md").read_text()
    assert "# Satellite image encoder\n" in text
    assert "| level | image |" in text
    assert "## Sensor\n\n| | |\n|---|---|\n| bands | R, G, B |\n| gsd m | 0.3 |" in text
    assert "## Intended use\n\n- Ranking, not measuring.\n" in text


def test_saving_again_replaces_the_folder_whole(tmp_path):
    clip = new_clip(SMALL)
    folder = UPath(tmp_path / "encoder")
    save_encoder(folder, clip, {"version": 1})
    save_encoder(folder, clip)
    assert sorted(file.name for file in folder.iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["encoder"]


def test_object_stores_get_the_same_files(tmp_path):
    clip = new_clip(SMALL)
    remote = save_encoder(UPath("memory://models/encoder"), clip, {"level": "pixel"})
    local = save_encoder(UPath(tmp_path / "encoder"), clip, {"level": "pixel"})
    for file in local.iterdir():
        assert (remote / file.name).read_bytes() == file.read_bytes()
    loaded = load_clip(f"local-dir:{remote}")
    chips = np.zeros((1, 224, 224, 3), dtype=np.uint8)
    np.testing.assert_allclose(encode_images(loaded, chips), encode_images(clip, chips), atol=1e-6)


def test_a_model_trained_at_another_size_keeps_it(tmp_path):
    clip = new_clip(FoundationConfig(image_px=48, width=32, head_width=16, vision_layers=1, text_layers=1))
    folder = save_encoder(UPath(tmp_path / "encoder"), clip)
    assert load_clip(f"local-dir:{folder}").image_px == 48
    assert (
        json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]["image_size"]
        == 48
    )
