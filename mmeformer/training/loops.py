# SPDX-License-Identifier: Apache-2.0
"""Training loop that resumes in the middle of an epoch."""

from __future__ import annotations

from mmengine.runner import EpochBasedTrainLoop as MMEngineEpochBasedTrainLoop


class EpochBasedTrainLoop(MMEngineEpochBasedTrainLoop):
    """mmengine's loop that, after a restart, skips the batches already trained on.

    mmengine restarts the epoch and trains on its first batches twice. This matters for checkpoints
    by iteration (``CheckpointHook(by_epoch=False)``). Arguments are those of mmengine.
    """

    def run_epoch(self) -> None:
        """Train on the rest of the epoch."""
        done = self._iter - self._epoch * len(self.dataloader)
        if not 0 <= done <= len(self.dataloader):
            self.runner.logger.warning(
                f"iteration {self._iter} is not in epoch {self._epoch + 1} of "
                f"{len(self.dataloader)} iterations: the data or the batch size have changed; "
                "restarting the epoch"
            )
            done = 0
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        if done < len(self.dataloader):
            for index, batch in enumerate(self.dataloader):
                if index >= done:
                    self.run_iter(index, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1
