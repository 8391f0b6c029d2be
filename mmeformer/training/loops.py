# SPDX-License-Identifier: Apache-2.0
"""Training loops that resume where the samples seen so far end.

A checkpoint records this place (``meta["place"]``): the batch size over all processes, the
iterations per epoch, and the samples seen in the current epoch. If the batch size, the number of
processes or the data have changed since, the samples decide, not the iterations.
"""

from __future__ import annotations

from mmengine.dist import get_world_size
from mmengine.runner import EpochBasedTrainLoop as MMEngineEpochBasedTrainLoop
from mmengine.runner import IterBasedTrainLoop as MMEngineIterBasedTrainLoop
from torch.utils.data import DataLoader


def total_batch_size(loader: DataLoader) -> int | None:
    """Samples per iteration in all processes; None if the batch sampler does not say."""
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return size and size * get_world_size()


class EpochBasedTrainLoop(MMEngineEpochBasedTrainLoop):
    """mmengine's loop that, after a restart, skips the samples already trained on.

    mmengine restarts the epoch and trains on its first batches twice. This matters for checkpoints
    by iteration (``CheckpointHook(by_epoch=False)``). Arguments are those of mmengine.

    Epoch ``n`` (from 0) always begins at iteration ``n * len(dataloader)``: if that length has
    changed since the checkpoint, :meth:`resume_at` renumbers the iterations.
    """

    _iter: int

    def place(self, epoch: int, iteration: int) -> dict:
        """The place to record in a checkpoint after ``iteration`` iterations."""
        length, batch = len(self.dataloader), total_batch_size(self.dataloader)
        samples = batch and (iteration - epoch * length) * batch
        return dict(batch_size=batch, epoch_length=length, samples=samples)

    def resume_at(self, place: dict | None) -> bool:
        """Go to the place of a checkpoint whose epoch and iteration are already set.

        Args:
            place: of :meth:`place`; None for a checkpoint without it (of mmengine itself).

        Returns:
            Whether iterations were renumbered.
        """
        length, batch = len(self.dataloader), total_batch_size(self.dataloader)
        begin, iteration = self._epoch * length, self._iter
        before = place or dict(batch_size=None, epoch_length=None)
        if before["epoch_length"] == length and before["batch_size"] == batch:
            return False
        if None in (*before.values(), batch):
            if iteration == begin:
                return False
            self._iter = begin
            reason = "the checkpoint does not tell how many samples of its epoch it has seen"
        else:
            full = before["samples"] >= before["batch_size"] * before["epoch_length"]
            self._iter = begin + (length if full else min(before["samples"] // batch, length))
            reason = (
                f"epochs had {before['epoch_length']} iterations of {before['batch_size']} "
                f"samples and now have {length} of {batch}"
            )
        self.runner.logger.warning(
            f"iteration {iteration} of the checkpoint becomes {self._iter}: {reason}. Epoch "
            f"{self._epoch + 1} goes on with {begin + length - self._iter} of its {length} "
            "iterations"
        )
        return True

    def run_epoch(self) -> None:
        """Train on the rest of the epoch."""
        done = self._iter - self._epoch * len(self.dataloader)
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        if done < len(self.dataloader):
            for index, batch in enumerate(self.dataloader):
                if index >= done:
                    self.run_iter(index, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


class IterBasedTrainLoop(MMEngineIterBasedTrainLoop):
    """mmengine's loop that, after a restart with another batch size, skips the samples seen.

    The iterations keep their numbers, as the schedule is in iterations. Arguments are those of
    mmengine.
    """

    _begin = 0
    """Iteration at which a run with today's batch size would have begun; may be negative."""

    def place(self, epoch: int, iteration: int) -> dict:
        """The place to record in a checkpoint after ``iteration`` iterations."""
        batch = total_batch_size(self.dataloader)
        samples = batch and (iteration - self._begin) * batch
        return dict(batch_size=batch, epoch_length=None, samples=samples)

    def resume_at(self, place: dict | None) -> bool:
        """Go to the place of a checkpoint; see :meth:`EpochBasedTrainLoop.resume_at`."""
        batch = total_batch_size(self.dataloader)
        # Samples of a checkpoint by epoch are those of the epoch, not of the run.
        if place is None or place["epoch_length"] or None in (place["batch_size"], batch):
            return False
        self._begin = self._iter - place["samples"] // batch
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
            self._skip(self._iter - self._begin)
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            self._decide_current_val_interval()
            if (
                self.runner.val_loop is not None
                and self._iter >= self.val_begin
                and (self._iter % self.val_interval == 0 or self._iter == self._max_iters)
            ):
                self.runner.val_loop.run()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def _skip(self, batches: int) -> None:
        if hasattr(self.dataloader_iterator, "skip_iter"):
            self.dataloader_iterator.skip_iter(batches)
        else:  # mmengine before 0.10.12 loads what it skips
            for _ in range(batches):
                next(self.dataloader_iterator)
