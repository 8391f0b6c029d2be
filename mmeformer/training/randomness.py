# SPDX-License-Identifier: Apache-2.0
"""Random numbers that follow from the seed and the place in the schedule, and from nothing else.

mmengine seeds once at the start, so that what a step draws depends on everything drawn before it:
a resumed run, another number of workers or a validation in between change all that follows. Here
every sample and every step starts from numbers of its own. Nothing has to be stored for a restart,
and two processes augment the images of a batch as one process would.
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

# Keep the numbers of samples and of steps apart.
SAMPLE, STEP = 0, 1


class Draw(int):
    """An index of a data set that knows how many were drawn before it, in all processes."""

    def __new__(cls, index: int, position: int) -> Draw:
        """``index`` into the data set, the ``position``-th of the run (from 0)."""
        draw = super().__new__(cls, index)
        draw.position = position
        return draw

    def __getnewargs__(self) -> tuple[int, int]:
        # Samplers live in the main process, data sets in the workers.
        return int(self), self.position


class PositionSampler(Sampler):
    """Hands out what another sampler draws, as :class:`Draw`.

    Args:
        sampler: config of mmengine's ``DefaultSampler``, ``InfiniteSampler`` or the like, which
            deals draws out to the processes in turn.
        dataset: what to sample from.
        seed: of the sampler.
    """

    def __init__(self, sampler: dict, dataset, seed: int | None) -> None:
        self.dataset = dataset
        self.sampler = MMENGINE_DATA_SAMPLERS.build(
            sampler, default_args=dict(dataset=dataset, seed=seed)
        )
        self.rank, self.world_size = get_dist_info()
        self.drawn = 0
        if hasattr(self.sampler, "skip"):
            # mmengine looks for this method to go on where an iteration-based run stopped.
            self.skip = self._skip

    def __iter__(self) -> Iterator[Draw]:
        """Draws of this process, without end for an infinite sampler."""
        for index in self.sampler:
            yield Draw(index, self.drawn * self.world_size + self.rank)
            self.drawn += 1

    def __len__(self) -> int:
        """Draws of an epoch."""
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        self.drawn = epoch * len(self.sampler)

    def _skip(self, draws: int) -> None:
        """Go to where ``draws`` draws of this process have been handed out."""
        self.sampler.skip(draws)
        self.drawn = draws


def seed_all(*numbers: int, gpu: bool = True) -> None:
    """Seed Python, numpy and PyTorch with what the ``numbers`` (not negative) amount to.

    Args:
        gpu: seed the GPUs too; workers that load data have none.
    """
    first, second = np.random.SeedSequence(numbers).generate_state(2, np.uint32).tolist()
    random.seed(first)
    np.random.seed(second)
    if gpu:
        torch.manual_seed(first << 32 | second)
    else:
        torch.default_generator.manual_seed(first << 32 | second)


class StepSeedHook(Hook):
    """Seeds every training step by the run's seed, the process and the iteration.

    What samples proposals and drops paths then draws the same numbers after a restart as without
    one. The data have seeds of their own (:class:`mmeformer.training.data.GuardedDataset`).
    """

    priority = "VERY_HIGH"

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Seed this iteration."""
        seed_all(runner.seed, STEP, runner.rank, runner.iter)
