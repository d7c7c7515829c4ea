import itertools
import json
import os
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from PIL import Image
from typer.testing import CliRunner
from upath import UPath

from graft_pipeline.errors import InputError
from graft_pipeline.imagery import NAIP, SENTINEL2
from training.__main__ import app, with_fields
from training.encoders import load_clip
from training.recipes import PAPER_IMAGE, PAPER_PIXEL, PLANET_IMAGE, PLANET_PIXEL, RECIPES


def test_help_needs_neither_dagster_nor_torch():
    # In a fresh process: what help imports is what every command waits for.
    program = (
        "import sys; sys.argv = ['training', '--help']\n"
        "from training.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'dagster', 'open_clip') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert "encoder" in done.stdout


def test_training_needs_no_dagster():
    program = (
        "import sys; sys.modules['dagster'] = None\n"
        "import training.loop, training.foundation, training.recipes, training.zero_shot.scoring\n"
        "assert not [name for name in sys.modules if name.startswith(('resources', 'assets'))]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_encoder_from_the_command_line(toy_world, tmp_path, monkeypatch):
    toy = {
        "name": "toy",
        "collection": "none",
        "bands": ["R", "G", "B"],
        "gsd_m": 1,
        "chip_px": 64,
        "crop_px": 32,
    }
    monkeypatch.setenv("GRAFT_SENSORS", json.dumps([toy]))
    monkeypatch.setenv("GRAFT_ENV_FILE", os.devnull)
    options = {
        "root": toy_world.root,
        "sensor": "toy",
        "level": "pixel",
        "recipe": "smoke",
        "architecture": toy_world.architecture,
        "pretrained": "",
        "steps": 3,
        "device": "cpu",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    done = CliRunner().invoke(app, ["encoder", str(toy_world.folder), str(tmp_path / "out"), *arguments])
    assert done.exit_code == 0, done.output
    assert load_clip(f"local-dir:{tmp_path / 'out' / 'encoder'}").fingerprint() in done.output


def test_fields_are_set_from_text():
    changed = with_fields(
        PLANET_IMAGE, ["temperature=0.1", "grad_clip=2", "precision=bf16", "betas=[0.8, 0.9]", "threads=3"]
    )
    assert changed == replace(
        PLANET_IMAGE, temperature=0.1, grad_clip=2.0, precision="bf16", betas=(0.8, 0.9), threads=3
    )
    # The paper's recipe has no number of steps to compare with.
    assert with_fields(PAPER_IMAGE, ["steps=7"]).steps == 7
    assert with_fields(PLANET_IMAGE, ["steps=null"]).steps is None
    wrong = ["no_such_field=1", "steps", "steps=many", "steps=1.5", "seed=true", "epochs=null", "betas=[0.9]"]
    for recipe, assignment in itertools.product((PLANET_IMAGE, PAPER_IMAGE), wrong):
        with pytest.raises(InputError, match="--set"):
            with_fields(recipe, [assignment])


def test_errors_are_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "training",
        "encoder",
        str(tmp_path),
        str(tmp_path),
        "--root",
        str(tmp_path),
    ]
    done = subprocess.run([*command, "--sensor", "mars"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No sensor 'mars'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_foundation_model_from_the_command_line(tmp_path, toy_captions):
    images, captions = toy_captions
    lines = ["file,caption"]
    for number, (image, caption) in enumerate(zip(images[:130], captions, strict=False)):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{caption}")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    folder = UPath(tmp_path / "model")
    done = CliRunner().invoke(app, ["foundation", str(tmp_path / "captions.csv"), str(folder), "--steps=1"])
    assert done.exit_code == 0, done.output
    assert load_clip(f"local-dir:{folder}").image_px == 64


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("file\na.png\n", "columns `file` and `caption`"),
        ("file,caption\na.png\n", "both in each row"),
        ("\ufefffile,caption\nabsent.png,a lake\n", "absent.png is no image"),
        ("file,caption\nbroken.png,a lake\n", "broken.png is no image"),
    ],
)
def test_captions_that_cannot_be_used_are_named(content, says, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a photo")
    if content is not None:
        (tmp_path / "captions.csv").write_text(content, encoding="utf-8")
    done = CliRunner().invoke(app, ["foundation", str(tmp_path / "captions.csv"), str(tmp_path / "model")])
    assert isinstance(done.exception, InputError)
    assert says in str(done.exception)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_recipes_are_for_any_sensor_and_model(recipe):
    config = RECIPES[recipe].encoder("pixel", SENTINEL2, "local-dir:folder", None, seed=3)
    assert (config.level, config.sensor, config.architecture, config.seed) == (
        "pixel",
        SENTINEL2,
        "local-dir:folder",
        3,
    )
    assert RECIPES[recipe].encoder("image", NAIP, "ViT-B-32", "openai").level == "image"


def test_the_papers_recipe_is_the_papers():
    for config in (PAPER_IMAGE, PAPER_PIXEL):
        assert (config.architecture, config.temperature, config.photos_per_tile) == ("ViT-B-16", 0.07, 25)
        assert (config.epochs, config.steps, config.weight_decay) == (10, None, 1e-2)
        assert not config.mask_shared_photos
    assert (PAPER_IMAGE.learning_rate, PAPER_PIXEL.learning_rate) == (1e-5, 5e-5)
    changed = {
        f.name for f in fields(PLANET_IMAGE) if getattr(PLANET_IMAGE, f.name) != getattr(PLANET_PIXEL, f.name)
    }
    assert changed == {"level"}
