import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from upath import UPath

from graft_pipeline.imagery import Sensor
from training.distributed import Team, join_team
from training.encoders import encode_patches, load_clip
from training.loop import TrainConfig, train

TOY = Sensor(name="toy", collection="none", bands=("R", "G", "B"), gsd_m=1.0, chip_px=64, crop_px=32)

PROGRAM = """
import json, sys
from upath import UPath
from graft_pipeline.imagery import Sensor
from training.loop import TrainConfig, train
options, folder, root, output = json.loads(sys.argv[1]), *map(UPath, sys.argv[2:])
sensor = Sensor(name="toy", collection="none", bands=("R", "G", "B"), gsd_m=1.0, chip_px=64, crop_px=32)
result = train(TrainConfig(sensor=sensor, **options), folder, root, output)
(output / f"result-{__import__('os').environ['RANK']}.json").write_text(json.dumps([result.model_id, result.best_step]))
"""


@pytest.mark.parametrize("level", ["image", "pixel"])
def test_two_processes_learn_what_one_learns(toy_world, tmp_path, level):
    options = {
        "level": level,
        "architecture": toy_world.architecture,
        "pretrained": None,
        "steps": 4,
        "batch_tiles": 16,
        "photos_per_tile": 3,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "validate_every": 2,
        "device": "cpu",
        "threads": 1,
    }
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [
        tmp_path / "program.py",
        json.dumps(options),
        toy_world.folder,
        toy_world.root,
        tmp_path / "two",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    config = TrainConfig(sensor=TOY, **options)
    alone = train(config, toy_world.folder, toy_world.root, UPath(tmp_path / "one"))
    # Sums in another order: equal but for rounding.
    theirs = json.loads((tmp_path / "two" / "history.json").read_text())
    for ours, other in zip(alone.history, theirs["history"], strict=True):
        assert other["loss"] == pytest.approx(ours["loss"], abs=1e-4)
    for ours, other in zip(alone.validations, theirs["validations"], strict=True):
        assert other["loss"] == pytest.approx(ours["loss"], abs=1e-3)
    results = [json.loads((tmp_path / "two" / f"result-{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    two = load_clip(f"local-dir:{tmp_path / 'two' / 'encoder'}")
    assert two.fingerprint() == results[0][0]
    # Features, not weights: a key's bias has no gradient but rounding, which AdamW makes whole steps of.
    chips = np.random.default_rng(0).integers(0, 256, (4, 224, 224, 3), dtype=np.uint8)
    one = load_clip(f"local-dir:{alone.folder}")
    np.testing.assert_allclose(encode_patches(two, chips), encode_patches(one, chips), atol=1e-3)


def test_a_process_alone_is_a_team():
    with join_team(torch.device("cpu")) as (team, device):
        assert team == Team(0, 1)
        assert team.is_first
        assert device.type == "cpu"
        assert team.agree({"a": 1}) == {"a": 1}
        assert team.sum(torch.tensor(2.0)) == 2
        team.wait()
