import json
import os
import socket
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


def torchrun(nodes):
    """Commands of torchrun for two processes: on one machine, or one on each of two that meet by TCP."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    if nodes == 1:
        return [[*command, "--standalone", "--nproc-per-node=2"]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
    # --local-addr: both nodes are this machine, whose name may resolve to nothing.
    node = [*command, "--nnodes=2", "--nproc-per-node=1", "--local-addr=127.0.0.1", *meeting]
    return [node, node]


@pytest.mark.parametrize(("level", "nodes"), [("image", 1), ("pixel", 2)])
def test_two_processes_learn_what_one_learns(toy_world, crowded, tmp_path, level, nodes):
    options = {
        "level": level,
        "architecture": toy_world.architecture,
        "pretrained": None,
        "steps": 4,
        "batch_tiles": 16,
        "photos_per_tile": 3,
        "learning_rate": 1e-3,
        "mask_shared_photos": True,
        # Two parts of each process's half: gradients are exchanged with the second.
        "accumulation_steps": 2,
        "warmup_steps": 2,
        "validate_every": 2,
        "device": "cpu",
        "threads": 1,
    }
    (tmp_path / "program.py").write_text(PROGRAM)
    arguments = [
        tmp_path / "program.py",
        json.dumps(options),
        crowded,
        toy_world.root,
        tmp_path / "two",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    started = [
        subprocess.Popen([*command, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, text=True)
        for command in torchrun(nodes)
    ]
    try:
        errors = [process.communicate(timeout=180)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * nodes, errors[0][-3000:]

    config = TrainConfig(sensor=TOY, **options | {"accumulation_steps": 1})
    alone = train(config, crowded, toy_world.root, UPath(tmp_path / "one"))
    # Sums in another order: equal but for rounding.
    theirs = json.loads((tmp_path / "two" / "history.json").read_text())
    for ours, other in zip(alone.history, theirs["history"], strict=True):
        assert other["loss"] == pytest.approx(ours["loss"], abs=1e-5)
    for ours, other in zip(alone.validations, theirs["validations"], strict=True):
        assert other["loss"] == pytest.approx(ours["loss"], abs=1e-5)
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
