# SPDX-License-Identifier: Apache-2.0
"""Compile parts of a model with one line of a config."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner

from mmeformer.registry import HOOKS


@HOOKS.register_module()
class CompileHook(Hook):
    """Compile parts of the model with ``torch.compile`` for training, validation and testing.

    ``custom_hooks = [*_base_.custom_hooks, dict(type="mmeformer.CompileHook")]``. Heads are not
    compiled: assignment, sampling and NMS depend on values, which breaks graphs, and mmengine's
    ``compile=True`` recompiles them repeatedly. Necks gain nothing.

    Batches of many sizes need few graphs: the first size gets its own, the next size one in which
    the side that differs is dynamic, and then one graph covers all sizes. ``docs/finetuning.md``
    has the numbers.

    Args:
        parts: names of modules of the model. Those that it does not have are skipped.
        **options: options of ``torch.compile``, such as ``dynamic=True`` for one graph for all
            sizes from the start.

    Raises:
        ValueError: the model has none of the modules.
    """

    def __init__(self, parts: Sequence[str] = ("backbone",), **options) -> None:
        self.parts = tuple(parts)
        self.options = options

    def before_run(self, runner: Runner) -> None:
        """Mark the modules for compilation, which takes minutes in the first iterations."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if isinstance(model, BaseTTAModel):
            model = model.module
        if next(model.parameters(), None) is None:
            print_log(f"nothing to compile: {type(model).__name__} has no weights", runner.logger)
            return
        found = [part for part in self.parts if getattr(model, part, None) is not None]
        if not found:
            raise ValueError(f"{type(model).__name__} has no module {' or '.join(self.parts)}")
        if not torch.cuda.is_available():
            from torch._inductor import config

            # On a CPU this option makes all maps channels last, at which PyTorch 2.12 fails for
            # attention with dynamic sizes: "cannot determine truth value of Relational".
            config.layout_optimization = False
        for part in found:
            getattr(model, part).compile(**self.options)
        print_log(f"compiling {' and '.join(found)} in the first iterations", runner.logger)
