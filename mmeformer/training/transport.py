# SPDX-License-Identifier: Apache-2.0
"""How data workers send their samples to the process that trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from multiprocessing.reduction import ForkingPickler

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

SMALL = 65_536
"""Bytes up to which a tensor is sent by value: what a pipe of Linux holds."""


def send_small_tensors_whole(init: Callable[[int], None] | None) -> Callable[[int], None]:
    """Init function of data workers that puts small tensors into the message itself.

    PyTorch shares the memory of each, for which both processes open a socket: a third of a
    millisecond of the process that launches the kernels, for boxes and labels of each image.

    Args:
        init: the function so far.
    """
    return partial(_init_worker, init)


def _init_worker(init: Callable[[int], None] | None, worker: int) -> None:
    # In the worker alone: elsewhere a tensor in shared memory has to stay there.
    ForkingPickler.register(Tensor, _reduce)
    if init is not None:
        init(worker)


def _reduce(tensor: Tensor) -> tuple:
    plain = tensor.device.type == "cpu" and tensor.layout == torch.strided
    if not plain or tensor.requires_grad or tensor.nbytes > SMALL:
        return reduce_tensor(tensor)
    try:
        return torch.from_numpy, (tensor.numpy(),)
    except TypeError:
        # A type that NumPy does not have.
        return reduce_tensor(tensor)
