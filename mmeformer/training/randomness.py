# SPDX-License-Identifier: Apache-2.0
"""Random numbers that depend only on the seed and the position in the schedule.

mmengine seeds once at the start, so every random number depends on all numbers drawn before it: a
restart, another number of workers or a validation in between changes everything that follows. Here
every sample and every step has its own seed. A restart needs no stored state, and two processes
augment the images of a batch as one process would.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
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

    mmengine's samplers have one order for all processes, which take its samples in turn. With them
    this sampler can start at any sample of the order, for any number of processes, and the draw of
    a sample depends on its place in the order alone.

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
        # Not for classes derived from them, whose order may be another.
        self.has_epochs = type(self.sampler) is DefaultSampler
        self.is_stream = type(self.sampler) is InfiniteSampler
        self.drawn = 0
        self._first = 0
        self._epoch = 0
        self._slots: Sequence[int] | None = None
        if hasattr(self.sampler, "skip"):
            # mmengine tests for this method to resume an iteration-based run.
            self.skip = self._skip

    def __iter__(self) -> Iterator[Draw]:
        """Draws of this process; endless for an infinite sampler."""
        if self.has_epochs:
            slots, self._slots = self._slots, None
            if slots is None:
                slots = self.share(range(len(self.dataset)), self.rank, self.world_size)
            yield from self.draws(slots)
            return
        for index in self.sampler:
            yield Draw(index, self._first + self.drawn * self.world_size + self.rank)
            self.drawn += 1

    def __len__(self) -> int:
        """Number of draws per epoch."""
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        self._epoch = epoch
        self.drawn = epoch * len(self.sampler)

    def share(self, slots: Sequence[int], rank: int, world_size: int) -> list[int]:
        """The places in the epoch's order, out of ``slots``, that a process takes.

        As in mmengine, every process takes as many: the first samples of the epoch come a second
        time if the number does not divide.
        """
        slots = list(slots)
        if self.sampler.round_up:
            first = itertools.cycle(range(len(self.dataset)))
            slots += itertools.islice(first, -len(slots) % world_size)
        return slots[rank::world_size]

    def draws(self, slots: Sequence[int]) -> Iterator[Draw]:
        """The samples at these places in the order of the epoch."""
        whole = copy.copy(self.sampler)
        whole.rank, whole.world_size = 0, 1
        whole.num_samples = whole.total_size = len(self.dataset)
        order = list(whole)
        for slot in slots:
            yield Draw(order[slot], self._epoch * len(order) + slot)

    def slot(self, draw: Draw) -> int:
        """The place of a draw of :meth:`draws` in the order of the epoch."""
        return draw.position - self._epoch * len(self.dataset)

    def only(self, slots: Sequence[int]) -> PositionSampler:
        """A copy of this sampler, which next draws only the samples at these places."""
        sampler = copy.copy(self)
        sampler.take(slots)
        return sampler

    def take(self, slots: Sequence[int]) -> None:
        """Draw only the samples at these places of the epoch in the next iteration over it."""
        self._slots = slots

    def start_at(self, samples: int) -> None:
        """Continue an infinite order after the first ``samples`` of all processes."""
        stream = self.sampler._infinite_indices()
        self.sampler.indices = itertools.islice(stream, samples + self.rank, None, self.world_size)
        self._first, self.drawn = samples, 0

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
    # Without a GPU, `torch.manual_seed` queues a call with its traceback, at every step.
    if gpu and torch.accelerator.is_available():
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
