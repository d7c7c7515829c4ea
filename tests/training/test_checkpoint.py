import pytest
import torch
from upath import UPath

from graft_pipeline.errors import DataError
from training.checkpoint import load_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer
from training.optimisation import make_optimizer


def stepped(seed, steps):
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 3)
    optimizer = make_optimizer(model.parameters(), 1e-2, 0.1, (0.9, 0.98))
    for step in range(steps):
        model(torch.full((2, 4), float(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_tensors_and_state_come_back(tmp_path, scheme):
    path = (
        UPath(tmp_path / "sub" / "last.safetensors")
        if scheme == "local"
        else UPath("memory://run/last.safetensors")
    )
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(3)}
    state = {"step": 7, "history": [{"loss": 1.5}], "best": float("inf")}
    save_checkpoint(path, tensors, state)
    loaded, loaded_state = load_checkpoint(path)
    assert loaded_state == state
    torch.testing.assert_close(loaded, tensors)
    save_checkpoint(path, {"a": torch.zeros(1)}, {"step": 8})
    assert load_checkpoint(path)[1] == {"step": 8}


def test_nothing_is_left_beside_the_file(tmp_path):
    save_checkpoint(UPath(tmp_path / "last.safetensors"), {"a": torch.zeros(1)}, {})
    assert [file.name for file in tmp_path.iterdir()] == ["last.safetensors"]


def test_an_absent_checkpoint_is_none(tmp_path):
    assert load_checkpoint(UPath(tmp_path / "none.safetensors")) is None


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = UPath(tmp_path / "last.safetensors")
    path.write_bytes(b"half a file")
    with pytest.raises(DataError, match="delete it"):
        load_checkpoint(path)


def test_an_optimizer_goes_on_as_if_never_stopped():
    _, optimizer = stepped(0, 5)
    fresh_model, fresh = stepped(0, 0)
    model, _ = stepped(0, 5)
    fresh_model.load_state_dict(model.state_dict())
    unpack_optimizer(fresh, pack_optimizer(optimizer))
    fresh_model(torch.ones(2, 4)).square().sum().backward()
    fresh.step()
    straight, straight_optimizer = stepped(0, 5)
    straight(torch.ones(2, 4)).square().sum().backward()
    straight_optimizer.step()
    torch.testing.assert_close(fresh_model.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_weight_decay_spares_vectors():
    torch.manual_seed(0)
    model = torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)
    parameters = [*model[0].parameters(), *model[1].parameters()]
    groups = make_optimizer(parameters, 1e-3, 0.3, (0.9, 0.98)).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(model[1].weight)}
