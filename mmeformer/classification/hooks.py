# SPDX-License-Identifier: Apache-2.0
"""Check at the start of a run that model and data set have the same classes."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmeformer.checks.classes import require_count
from mmeformer.registry import HOOKS


@HOOKS.register_module()
class ClassNumCheckHook(Hook):
    """Compare ``num_classes`` of head, loss and data preprocessor with the classes of the data set.

    mmpretrain's own hook fails at losses without ``num_classes``.

    Raises:
        ValueError: they differ; the message names the settings and their values.
    """

    def before_train(self, runner: Runner) -> None:
        """Check the training and validation sets; one class alone is an error too."""
        dataset = runner.train_dataloader.dataset
        self._check(runner, dataset)
        if len(classes := dataset.metainfo["classes"]) == 1:
            raise ValueError(
                f"the data set has the one class {classes[0]!r}, so the loss is always 0: add a "
                "folder of images that are not of this class"
            )
        if runner.val_loop is not None:
            self.before_val(runner)

    def before_val(self, runner: Runner) -> None:
        """Check the validation set."""
        self._check(runner, runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        """Check the test set."""
        self._check(runner, runner.test_dataloader.dataset)

    @staticmethod
    def _check(runner: Runner, dataset: Any) -> None:
        require_count(runner.model, dataset.metainfo["classes"])
