# SPDX-License-Identifier: Apache-2.0
"""Random numbers that depend only on the seed and the position in the schedule.

mmengine seeds once at the start, so every random number depends on all numbers drawn before it: a
restart, another number of workers or a validation in between changes everything that follows. Here
every sample and every step has its own seed. A restart needs no stored state, and two processes
augment the images of a batch as one process would.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.runner import Runner
from torch.utils.data import Sampler

# Separate the seeds of samples from those of steps.
SAMPLE, STEP = 0, 1


class Draw(int):
    """An index of a data set, with the number of draws before it in all processes."""

    position: int

    def __new__(cls, index: int, position: int) -> Draw:
        """Make the draw of ``index`` at ``position`` (from 0) of the run."""
        draw = super().__new__(cls, index)
        draw.position = position
        return draw

    def __reduce__(self) -> tuple[type[Draw], tuple[int, int]]:
        # For pickling: samplers run in the main process, data sets in workers.
        return Draw, (int(self), self.position)


class PositionSampler(Sampler):
    """Wrapper of a sampler that returns each index as a :class:`Draw`.

    Args:
        sampler: config of a sampler that distributes indices to the processes in turn, such as
            mmengine's ``DefaultSampler`` or ``InfiniteSampler``.
        dataset: data set to sample from.
        seed: seed of the sampler.
    """

    def __init__(self, sampler: dict, dataset, seed: int | None) -> None:
        self.dataset = dataset
        self.sampler = MMENGINE_DATA_SAMPLERS.build(
            sampler, default_args=dict(dataset=dataset, seed=seed)
        )
        self.rank, self.world_size = get_dist_info()
        self.drawn = 0
        if hasattr(self.sampler, "skip"):
            # mmengine tests for this method to resume an iteration-based run.
            self.skip = self._skip

    def __iter__(self) -> Iterator[Draw]:
        """Draws of this process; endless for an infinite sampler."""
        for index in self.sampler:
            yield Draw(index, self.drawn * self.world_size + self.rank)
            self.drawn += 1

    def __len__(self) -> int:
        """Number of draws per epoch."""
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        self.drawn = epoch * len(self.sampler)

    def _skip(self, draws: int) -> None:
        """Continue after the first ``draws`` draws of this process."""
        self.sampler.skip(draws)
        self.drawn = draws


def seed_all(*numbers: int, gpu: bool = True) -> None:
    """Seed Python, numpy and PyTorch with a hash of ``numbers`` (not negative).

    Args:
        gpu: seed the GPUs too; data workers use none.
    """
    first, second = np.random.SeedSequence(numbers).generate_state(2, np.uint32).tolist()
    random.seed(first)
    np.random.seed(second)
    if gpu:
        torch.manual_seed(first << 32 | second)
    else:
        torch.default_generator.manual_seed(first << 32 | second)


class StepSeedHook(Hook):
    """Seed every training step with the run's seed, the process and the iteration.

    Proposal sampling and stochastic depth then draw the same numbers after a restart. Samples have
    their own seeds (:class:`mmeformer.training.data.GuardedDataset`).
    """

    priority = "VERY_HIGH"

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Seed this iteration."""
        seed_all(runner.seed, STEP, runner.rank, runner.iter)
