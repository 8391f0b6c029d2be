# SPDX-License-Identifier: Apache-2.0
"""Checks at the start of a run that need both the model and the data set."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmeformer.checks.classes import require_count
from mmeformer.registry import HOOKS
from mmeformer.segmentation.settings import (
    plain_model,
    require_ignore_index_of_metrics,
    require_ignore_index_of_model,
    require_windows,
)


@HOOKS.register_module()
class SegNumClassCheckHook(Hook):
    """Check, before anything runs, that model, data set and metric fit each other.

    Compares ``num_classes`` of the heads with the classes of the data set
    (:func:`mmeformer.checks.classes.require_count`), and checks ``ignore_index`` and the windows of
    testing (:mod:`mmeformer.segmentation.settings`).

    Raises:
        ValueError: they do not fit; the message names the settings and their values.
    """

    def before_train(self, runner: Runner) -> None:
        """Check the model and the training set; one class alone is an error too."""
        dataset = runner.train_dataloader.dataset
        self._check(runner, dataset)
        require_ignore_index_of_model(dataset, runner.model)
        if len(classes := dataset.metainfo["classes"]) == 1:
            raise ValueError(
                f"the data set has the one class {classes[0]!r}, which competes with nothing, so "
                "the loss is always 0: name what is not this class as well, such as "
                f"classes=('background', {classes[0]!r}), with num_classes=2"
            )
        if runner.val_loop is not None:
            self.before_val(runner)

    def before_val(self, runner: Runner) -> None:
        """Check the model, the validation set and its metrics."""
        dataset = runner.val_dataloader.dataset
        self._check(runner, dataset)
        require_ignore_index_of_metrics(dataset, runner.val_evaluator.metrics, "val_evaluator")

    def before_test(self, runner: Runner) -> None:
        """Check the model, the test set and its metrics."""
        dataset = runner.test_dataloader.dataset
        self._check(runner, dataset)
        require_ignore_index_of_metrics(dataset, runner.test_evaluator.metrics, "test_evaluator")

    @staticmethod
    def _check(runner: Runner, dataset) -> None:
        model = plain_model(runner.model)
        require_windows(model)
        require_count(model, dataset.metainfo["classes"])
