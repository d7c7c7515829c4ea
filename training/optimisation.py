"""What both trainings share: the optimizer, its schedule and the check that the loss is still a number.

The losses are in losses.py, the loops in loop.py and foundation.py.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from graft_pipeline.errors import TrainingError


def make_optimizer(
    parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW as CLIP uses it: weight decay on matrices, none on norms, biases and the temperature.

    Args:
        parameters: those that require a gradient are trained.
        learning_rate: peak learning rate.
        weight_decay: decoupled weight decay.
        betas: decay rates of the moments.

    Returns:
        The fused optimizer.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def one_cycle(
    optimizer: torch.optim.Optimizer, step: int, steps: int, warmup_steps: int, learning_rate: float
) -> float:
    """Set the learning rate of a step: linear warm-up, then a cosine to zero.

    Args:
        optimizer: whose groups are set.
        step: number of the step, from 0.
        steps: number of steps in all.
        warmup_steps: steps of the warm-up.
        learning_rate: peak.

    Returns:
        The learning rate of this step.
    """
    if step < warmup_steps:
        rate = learning_rate * (step + 1) / warmup_steps
    else:
        rate = (
            learning_rate
            * 0.5
            * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def check_finite(value: Tensor, step: int, what: str = "loss") -> None:
    """Stop before a broken step reaches the weights.

    Args:
        value: scalar, such as the loss or the norm of its gradient.
        step: number of the step.
        what: its name.

    Raises:
        TrainingError: if it is NaN or infinite.
    """
    if not math.isfinite(value.item()):
        raise TrainingError(
            f"The {what} of step {step} is {value.item()}: lower the learning rate, lengthen the warm-up, "
            "and look for NaN in the ground embeddings."
        )
