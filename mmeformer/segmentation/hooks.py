# SPDX-License-Identifier: Apache-2.0
"""Checks at the start of a run that need both the model and the data set."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmeformer.registry import HOOKS


@HOOKS.register_module()
class SegNumClassCheckHook(Hook):
    """Compare ``num_classes`` of the heads with the classes of the data set, as mmdet's hook does.

    Without it, a head with too few classes fails in an assertion on the GPU, and a head with too
    many trains outputs that no label uses.

    Raises:
        ValueError: the numbers differ; the message names the head and both numbers.
    """

    def before_train(self, runner: Runner) -> None:
        """Compare with the training set, and require something to tell apart.

        Raises:
            ValueError: the numbers differ, or there is only one class.
        """
        dataset = runner.train_dataloader.dataset
        self._check(runner, dataset)
        if len(classes := dataset.metainfo["classes"]) == 1:
            raise ValueError(
                f"the data set has the one class {classes[0]!r}, which competes with nothing, so "
                "the loss is always 0: name what is not this class as well, such as "
                f"classes=('background', {classes[0]!r}), with num_classes=2"
            )

    def before_val(self, runner: Runner) -> None:
        """Compare with the validation set."""
        self._check(runner, runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        """Compare with the test set."""
        self._check(runner, runner.test_dataloader.dataset)

    @staticmethod
    def _check(runner: Runner, dataset) -> None:
        classes = dataset.metainfo["classes"]
        model = runner.model
        # DDP and test-time augmentation keep the model in `module`.
        while hasattr(model, "module"):
            model = model.module
        for name, module in model.named_modules():
            count = getattr(module, "num_classes", None)
            if name and count is not None and count != len(classes):
                raise ValueError(
                    f"model.{name} has num_classes={count}, but the data set has "
                    f"{len(classes)} classes: {list(classes)}; make both agree in the config"
                )
