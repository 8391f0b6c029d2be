# SPDX-License-Identifier: Apache-2.0
"""Measure by real training steps how large a batch fits into the memory of a GPU."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope

from mmeformer.configs import drop_pretrained

LARGEST = 32
"""Larger batches need other recipes."""
SPARE = 0.85
"""Share of the free memory to use; the rest is for larger inputs and other programs."""
FEWEST_STEPS = 8
"""Steps of an epoch at least: of fewer images a smaller batch is better."""


def measure_batch(config: Config) -> int:
    """Largest power of two, up to :data:`LARGEST`, whose training step fits into the free memory.

    Builds model and training data of a config from scratch, and steps on the first images. What a
    training of several GPUs needs beside (a copy of the gradients), averaged weights, and larger
    images must fit into the rest.

    Args:
        config: of a training; stays as it is.
    """
    trial = Trial(config, torch.device("cuda"))
    try:
        trial.fill_optimizer()
        trial.step(1)  # cuDNN and cuBLAS get their workspaces.
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return 1
    torch.cuda.empty_cache()
    # What this process holds counts in the peaks too.
    free = (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) * SPARE
    limit = min(LARGEST, max(1, trial.images // FEWEST_STEPS))
    batch = largest_batch(trial.peak, free, limit)
    del trial
    torch.cuda.empty_cache()
    return batch


def measure_seconds(config: Config) -> float:
    """Seconds of one training step of a config here: of the second one, as the first allocates.

    Args:
        config: of a training; stays as it is.
    """
    trial = Trial(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    batch = config.train_dataloader.batch_size
    trial.step(batch)
    started = time.perf_counter()
    # Returns the loss as a number, for which a GPU has to be done.
    trial.step(batch)
    return time.perf_counter() - started


def largest_batch(peak: Callable[[int], float], free: float, limit: int) -> int:
    """Largest power of two up to ``limit`` whose step fits.

    Memory grows with the batch, so two small steps tell where to try; a step of that size decides.

    Args:
        peak: memory in bytes of a step with a batch; raises an error as PyTorch does if it does
            not fit; see :func:`is_out_of_memory`.
        free: memory in bytes.
        limit: largest batch.
    """

    def needed(batch: int) -> float:
        try:
            return peak(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return math.inf

    batch = 1
    while batch * 2 <= limit:
        batch *= 2
    if batch > 2:
        first, second = needed(1), needed(2)
        if math.isinf(second):
            return 1
        each = max(second - first, 1.0)
        while batch > 1 and first + each * (batch - 1) > free:
            batch //= 2
    while batch > 1 and needed(batch) > free:
        batch //= 2
    return batch


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch, CUDA, cuBLAS or cuDNN got no memory; only the first has a class for that."""
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "out of memory" in text
        or "ALLOC_FAILED" in text
    )


class Trial:
    """Model, optimizer and data of a config, for single training steps.

    Args:
        config: of a training; stays as it is.
        device: to train on.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        config = copy.deepcopy(config)
        init_default_scope(config.get("default_scope", "mmengine"))
        # What it costs does not depend on the weights.
        drop_pretrained(config.model)
        self.device = device
        self.model = MODELS.build(config.model).to(device).train()
        self.data = DATASETS.build(config.train_dataloader.dataset)
        wrapper = config.optim_wrapper
        if device.type != "cuda":
            wrapper.type = "OptimWrapper"
        self.optimizer = build_optim_wrapper(self.model, wrapper)

    @property
    def images(self) -> int:
        """Number of training images."""
        return len(self.data)

    def step(self, batch: int) -> float:
        """One training step on the first images, repeated if there are fewer; returns the loss."""
        samples = [self.data[index % self.images] for index in range(batch)]
        with self.optimizer.optim_context(self.model):
            inputs = self.model.data_preprocessor(pseudo_collate(samples), True)
            loss, _ = self.model.parse_losses(self.model(**inputs, mode="loss"))
        self.optimizer.update_params(loss)
        return float(loss.detach())

    def fill_optimizer(self) -> None:
        """Let the optimizer allocate its state, which the first steps of AMP may skip."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.optimizer.step()
        self.optimizer.zero_grad()

    def peak(self, batch: int) -> float:
        """Memory in bytes that PyTorch takes from the GPU for a step, with that of the model."""
        # Else the peak begins at what a larger step before has left in PyTorch's cache.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self.step(batch)
        return float(torch.cuda.max_memory_reserved(self.device))
