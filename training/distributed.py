"""Several processes as one training: what `torchrun` starts, one process per GPU, or plain processes on CPUs.

Which tiles a process takes is decided in data.py, what the gradients of all of them are in loop.py.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes of one training.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of all processes' values.

        Args:
            value: tensor of the same shape everywhere.

        Returns:
            The sum; the value itself for a process alone.
        """
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def agree(self, value: T) -> T:
        """The first process's value.

        Args:
            value: anything that pickles.

        Returns:
            What the first process passed.
        """
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join_team(device: torch.device) -> Iterator[tuple[Team, torch.device]]:
    """Join the processes that `torchrun` started with this one, if it did.

    Args:
        device: device that was asked for; of several GPUs, each process takes the one of its local rank.

    Yields:
        The team, alone without `torchrun`, and this process's device.
    """
    if not dist.is_torchelastic_launched():
        yield Team(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Team(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
