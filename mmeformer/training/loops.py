# SPDX-License-Identifier: Apache-2.0
"""Training loops that resume where the samples seen so far end.

A checkpoint records this place (``meta["place"]``): the batch size over all processes, the
iterations per epoch, the samples seen in the current epoch, and its ``parts``: with how many
processes and samples of each they were seen. If any of it has changed since, the samples decide,
not the iterations: those of the epoch that were not seen yet follow, in their order, each once.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from mmengine.dist import get_rank, get_world_size
from mmengine.runner import EpochBasedTrainLoop as MMEngineEpochBasedTrainLoop
from mmengine.runner import IterBasedTrainLoop as MMEngineIterBasedTrainLoop
from torch.utils.data import BatchSampler, DataLoader

from mmeformer.training.randomness import PositionSampler


def batch_size(loader: DataLoader) -> int | None:
    """Samples per iteration of this process; None if the batch sampler does not say."""
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)


def total_batch_size(loader: DataLoader) -> int | None:
    """Samples per iteration in all processes; None if the batch sampler does not say."""
    size = batch_size(loader)
    return size and size * get_world_size()


class EpochBasedTrainLoop(MMEngineEpochBasedTrainLoop):
    """mmengine's loop that, after a restart, goes on with the samples not yet trained on.

    mmengine restarts the epoch and trains on its first batches twice. This matters for checkpoints
    within an epoch. Arguments are those of mmengine.

    Epoch ``n`` (from 0) always ends at iteration ``(n + 1) * len(dataloader)``: if that length has
    changed since the checkpoint, :meth:`resume_at` renumbers the iterations.
    """

    _iter: int
    validated = True
    """Whether the validation that follows the current iteration is done, if there is one."""
    _parts: Sequence[dict] = ()
    """How the current epoch was trained on before this process goes on with it."""
    _start = 0
    """Iteration at which its last part begins, that with today's processes and batch size."""
    _slots: Sequence[int] | None = None
    """Places in the order of the epoch that are left for this process; None before all others."""

    def run(self):
        """Train; begin with the validation that the killed run did not end."""
        self.runner.call_hook("before_train")
        if not self.validated and self._epoch and self._iter == self._epoch * len(self.dataloader):
            _validate(self, self._epoch, self._max_epochs)
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            _validate(self, self._epoch, self._max_epochs)
        self.runner.call_hook("after_train")
        return self.runner.model

    def place(self, epoch: int, iteration: int) -> dict:
        """The place to record in a checkpoint after ``iteration`` iterations."""
        length, size = len(self.dataloader), batch_size(self.dataloader)
        in_epoch = epoch == self._epoch
        parts = [*self._parts] if in_epoch else []
        start = self._start if in_epoch else iteration
        if iteration > start:
            parts.append(
                dict(processes=get_world_size(), batch_size=size, batches=iteration - start)
            )
        samples = size and sum(
            part["processes"] * part["batch_size"] * part["batches"] for part in parts
        )
        return dict(
            batch_size=total_batch_size(self.dataloader),
            epoch_length=length,
            samples=samples,
            parts=parts,
        )

    def resume_at(self, place: dict | None) -> bool:
        """Go to the place of a checkpoint whose epoch and iteration are already set.

        Args:
            place: of :meth:`place`; None for a checkpoint without it (of mmengine itself).

        Returns:
            Whether iterations were renumbered.
        """
        length, batch = len(self.dataloader), total_batch_size(self.dataloader)
        begin, iteration = self._epoch * length, self._iter
        self._start = begin
        before: dict[str, Any] = place or dict(batch_size=None, epoch_length=None)
        same = before["epoch_length"] == length and before["batch_size"] == batch
        sampler = _sampler(self.dataloader)
        if None in (before["batch_size"], before["epoch_length"], batch):
            if same or iteration == begin:
                return False
            self._iter = begin
            reason = "the checkpoint does not tell how many samples of its epoch it has seen"
        else:
            reason = (
                f"epochs had {before['epoch_length']} iterations of {before['batch_size']} "
                f"samples and now have {length} of {batch}"
            )
            full = iteration - self._epoch * before["epoch_length"] >= before["epoch_length"]
            if full:
                self._iter = begin + length
            elif isinstance(sampler, PositionSampler) and sampler.has_epochs:
                self._skip_seen(sampler, _parts(before, same))
            elif not same:
                self._iter = begin + min(before["samples"] // batch, length)
        if self._iter == iteration and before["epoch_length"] == length:
            return False
        self.runner.logger.warning(
            f"iteration {iteration} of the checkpoint becomes {self._iter}: {reason}. Epoch "
            f"{self._epoch + 1} goes on with {begin + length - self._iter} of its {length} "
            "iterations"
        )
        return True

    def _skip_seen(self, sampler: PositionSampler, parts: list[dict]) -> None:
        """Leave out the samples that were seen in ``parts``."""
        sampler.set_epoch(self._epoch)
        size: Any = batch_size(self.dataloader)
        now = get_world_size()
        done = 0
        if parts and (parts[-1]["processes"], parts[-1]["batch_size"]) == (now, size):
            done = parts.pop()["batches"]
        left: Sequence[int] = range(len(sampler.dataset))
        for part in parts:
            seen = {
                slot
                for rank in range(part["processes"])
                for slot in self._seen(sampler, left, rank, part)
            }
            left = [slot for slot in left if slot not in seen]
        part = dict(processes=now, batch_size=size, batches=done)
        # Counted, as a process may take the first samples of the epoch a second time.
        taken = Counter(self._seen(sampler, left, get_rank(), part))
        self._slots = []
        for slot in sampler.share(left, get_rank(), now):
            if taken[slot]:
                taken[slot] -= 1
            else:
                self._slots.append(slot)
        drop = getattr(self.dataloader.batch_sampler, "drop_last", False)
        batches = len(self._slots) // size if drop else -(-len(self._slots) // size)
        self._iter = (self._epoch + 1) * len(self.dataloader) - batches
        self._parts, self._start = parts, self._iter - done

    def _seen(
        self, sampler: PositionSampler, left: Sequence[int], rank: int, part: dict
    ) -> Iterator[int]:
        """Places in the epoch's order of the samples that a process has seen in a part of it."""
        # What the batch sampler makes of these samples: it may batch them by their shape.
        batches: Any = copy.copy(self.dataloader.batch_sampler)
        vars(batches).update(
            {key: copy.deepcopy(old) for key, old in vars(batches).items() if type(old) is list},
            sampler=sampler.only(sampler.share(left, rank, part["processes"])),
            batch_size=part["batch_size"],
        )
        for batch in islice(batches, part["batches"]):
            yield from map(sampler.slot, batch)

    def run_epoch(self) -> None:
        """Train on the rest of the epoch."""
        done = self._iter - self._epoch * len(self.dataloader)
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        if done < len(self.dataloader):
            batches: Iterator[tuple[int, Any]]
            slots, self._slots = self._slots, None
            if slots is not None:
                _sampler(self.dataloader).take(slots)
                batches = enumerate(self.dataloader, done)
            else:
                # Of another sampler, whose first batches are loaded and not used.
                batches = islice(enumerate(self.dataloader), done, None)
            for index, batch in batches:
                self.run_iter(index, batch)
        self._parts, self._start, self._slots = (), self._iter, None
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


class IterBasedTrainLoop(MMEngineIterBasedTrainLoop):
    """mmengine's loop that, after a restart with another batch size, skips the samples seen.

    The iterations keep their numbers, as the schedule is in iterations. Arguments are those of
    mmengine.
    """

    dataloader_iterator: Any
    validated = True
    """Whether the validation that follows the current iteration is done, if there is one."""
    _start, _samples = 0, 0
    """Iteration at which this process began, and the samples that were seen before it."""

    def place(self, epoch: int, iteration: int) -> dict:
        """The place to record in a checkpoint after ``iteration`` iterations."""
        batch = total_batch_size(self.dataloader)
        samples = batch and self._samples + (iteration - self._start) * batch
        return dict(batch_size=batch, epoch_length=None, samples=samples)

    def resume_at(self, place: dict | None) -> bool:
        """Go to the place of a checkpoint; see :meth:`EpochBasedTrainLoop.resume_at`."""
        batch = total_batch_size(self.dataloader)
        self._start = self._iter
        # Samples of a checkpoint by epoch are those of the epoch, not of the run.
        if place is None or place["epoch_length"] or None in (place["batch_size"], batch):
            self._samples = self._iter * (batch or 1)
            return False
        self._samples = place["samples"]
        if place["batch_size"] != batch:
            self.runner.logger.warning(
                f"the checkpoint was trained with {place['batch_size']} samples per iteration, now "
                f"{batch}: the data go on after the {place['samples']} samples seen, the schedule "
                f"at iteration {self._iter} of {self._max_iters}"
            )
        return False

    def run(self):
        """Train on the rest of the iterations; as in mmengine but for what is skipped."""
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        if not getattr(self, "fast_forward_on_resume", False):
            self._skip()
        if not self.validated and self._iter:
            _validate(self, self._iter, self._max_iters)
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            _validate(self, self._iter, self._max_iters)
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def _skip(self) -> None:
        """Leave out the samples seen."""
        if not self._samples:
            return
        sampler = _sampler(self.dataloader)
        batch = total_batch_size(self.dataloader) or 1
        iterator = self.dataloader_iterator
        if isinstance(sampler, PositionSampler) and sampler.is_stream and _plain(self.dataloader):
            sampler.start_at(self._samples)
            self.dataloader_iterator = type(iterator)(self.dataloader)
        elif hasattr(iterator, "skip_iter"):
            iterator.skip_iter(self._samples // batch)
        else:  # mmengine before 0.10.12 loads what it skips
            for _ in range(self._samples // batch):
                next(iterator)


def _validate(loop, done: int, total: int) -> None:
    """Validate if it is due after ``done`` epochs or iterations of ``total``."""
    loop._decide_current_val_interval()
    if (
        loop.runner.val_loop is not None
        and done >= loop.val_begin
        and (done % loop.val_interval == 0 or done == total)
    ):
        loop.runner.val_loop.run()


def _sampler(loader: DataLoader) -> Any:
    """The sampler of single indices."""
    return getattr(loader.batch_sampler, "sampler", None) or loader.sampler


def _plain(loader: DataLoader) -> bool:
    """Whether batches have the indices in the order of the sampler."""
    return type(loader.batch_sampler) is BatchSampler


def _parts(place: dict, same: bool) -> list[dict]:
    """Parts of the current epoch; those of older checkpoints are not recorded."""
    if "parts" in place:
        return [dict(part) for part in place["parts"]]
    batch = place["batch_size"]
    world = get_world_size() if same else 1
    size = batch // world
    return [dict(processes=world, batch_size=size, batches=place["samples"] // batch)]
