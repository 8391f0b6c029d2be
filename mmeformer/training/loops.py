# SPDX-License-Identifier: Apache-2.0
"""An epoch that goes on where a checkpoint was saved in the middle of it."""

from __future__ import annotations

from mmengine.runner import EpochBasedTrainLoop as MMEngineEpochBasedTrainLoop


class EpochBasedTrainLoop(MMEngineEpochBasedTrainLoop):
    """mmengine's loop, which after a restart leaves out the batches already trained on.

    mmengine's own would begin the epoch anew and train on its first images twice. Matters for
    checkpoints by iterations (``CheckpointHook(by_epoch=False)``); arguments are those of mmengine.
    """

    def run_epoch(self) -> None:
        """Train on what is left of the epoch."""
        done = self._iter - self._epoch * len(self.dataloader)
        if not 0 <= done <= len(self.dataloader):
            self.runner.logger.warning(
                f"iteration {self._iter} is not in epoch {self._epoch + 1} of "
                f"{len(self.dataloader)} iterations: the data or the batch size have changed, and "
                "the epoch begins anew"
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
