# SPDX-License-Identifier: Apache-2.0
"""Measure by real training steps how large a batch fits into the memory of a GPU."""

from __future__ import annotations

import copy
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

    Builds model and training data of a config from scratch, and steps on the first images.

    Args:
        config: of a training; stays as it is.
    """
    trial = Trial(config, torch.device("cuda"))
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] * SPARE
    limit = min(LARGEST, max(1, trial.images // FEWEST_STEPS))
    return largest_batch(trial.peak, free, limit)


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
        peak: memory in bytes of a step with a batch; raises ``torch.OutOfMemoryError``.
        free: memory in bytes.
        limit: largest batch.
    """

    def fits(batch: int) -> bool:
        try:
            return peak(batch) <= free
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return False

    batch = 1
    while batch * 2 <= limit:
        batch *= 2
    if batch > 2:
        try:
            first, second = peak(1), peak(2)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return 1
        each = max(second - first, 1.0)
        while batch > 1 and first + each * (batch - 1) > free:
            batch //= 2
    while batch > 1 and not fits(batch):
        batch //= 2
    return batch


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

    def peak(self, batch: int) -> float:
        """Memory of a step in bytes."""
        torch.cuda.reset_peak_memory_stats(self.device)
        self.step(batch)
        return float(torch.cuda.max_memory_reserved(self.device))
