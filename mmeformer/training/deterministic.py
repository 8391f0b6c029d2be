# SPDX-License-Identifier: Apache-2.0
"""Replace functions of PyTorch that have no deterministic kernel on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def cross_entropy(logits: Tensor, target: Tensor, *args, **kwargs) -> Tensor:
    """PyTorch's function with the same values; of maps by the kernel for vectors.

    Args:
        logits: (N, C, ...).
        target: labels (N, ...), or probabilities like the logits.
        *args, **kwargs: as in PyTorch.
    """
    if logits.dim() < 3 or target.is_floating_point():
        return functional.cross_entropy(logits, target, *args, **kwargs)
    losses = functional.cross_entropy(
        logits.movedim(1, -1).flatten(0, -2), target.flatten(), *args, **kwargs
    )
    return losses.view(target.shape) if losses.dim() else losses


def histc(values: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """PyTorch's function, by integers: their sums do not depend on the order."""
    if min == max:
        min, max = values.min().item(), values.max().item()
    if min == max:
        min, max = min - 1, max + 1
    inside = values[(values >= min) & (values <= max)]
    place = ((inside - min) * bins / (max - min)).long().clamp(max=bins - 1)
    return torch.bincount(place, minlength=bins).to(values.dtype)


REPLACED: Mapping[Callable, Callable] = {
    functional.cross_entropy: cross_entropy,  # the loss of segmentation
    torch.histc: histc,  # its metric
}
"""What mmdet, mmseg, mmrotate and this package call of the functions that
``torch.use_deterministic_algorithms`` refuses on a GPU."""


class _Replace(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        return REPLACED.get(func, func)(*args, **(kwargs or {}))


def deterministic_kernels() -> AbstractContextManager:
    """Context manager that replaces :data:`REPLACED` if only deterministic kernels are wanted."""
    return _Replace() if torch.are_deterministic_algorithms_enabled() else nullcontext()
