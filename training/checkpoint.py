"""Checkpoints: one safetensors file that holds tensors and, as its metadata, the JSON state of a run.

One file, so that tensors and state cannot belong to different steps. What goes into it is decided in loop.py.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor
from upath import UPath

from graft_pipeline.errors import DataError
from graft_pipeline.manifests import atomic_local_file, is_local, write_bytes_atomic

_OPTIMIZER = "optimizer/"


def save_checkpoint(path: UPath, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint; readers see the former one or this one, never a part.

    Args:
        path: file to write, local or on an object store.
        tensors: tensors by name.
        state: anything JSON can hold.
    """
    save_tensors(path, tensors, {"state": json.dumps(state, sort_keys=True)})


def save_tensors(path: UPath, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; readers see the former one or this one, never a part.

    Args:
        path: file to write, local or on an object store.
        tensors: tensors by name.
        metadata: one entry, since safetensors writes several in any order.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if is_local(path):
        with atomic_local_file(path) as partial:
            save_file(contiguous, partial, metadata)
    else:
        write_bytes_atomic(path, save(contiguous, metadata))


def load_checkpoint(
    path: UPath, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read a checkpoint.

    Args:
        path: file that `save_checkpoint` wrote.
        device: where the tensors go.

    Returns:
        Tensors by name and the state, or None if there is no such file.

    Raises:
        DataError: if the file is none of ours.
    """
    if not path.exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        local = Path(os.fspath(path)) if is_local(path) else Path(folder) / path.name
        if not is_local(path):
            local.write_bytes(path.read_bytes())
        try:
            with safe_open(local, framework="pt", device=str(device)) as file:
                state = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise DataError(
                f"{path} is not a checkpoint of this project ({error}): delete it to start over."
            ) from error
    return tensors, state


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimizer as flat tensors.

    Args:
        optimizer: any optimizer whose state is tensors, such as AdamW.

    Returns:
        Tensors by `optimizer/{parameter}/{key}`.
    """
    states = optimizer.state_dict()["state"]
    return {
        f"{_OPTIMIZER}{index}/{key}": value for index, state in states.items() for key, value in state.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put a packed state back; the optimizer keeps its own parameter groups.

    Args:
        optimizer: an optimizer over the same parameters in the same order.
        tensors: as `pack_optimizer` returned them; others are ignored.
    """
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(_OPTIMIZER):
            index, key = name.removeprefix(_OPTIMIZER).split("/")
            states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
