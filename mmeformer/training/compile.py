# SPDX-License-Identifier: Apache-2.0
"""Compilation of a model's backbone by one line of a config."""

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
    """Compiles parts of the model with ``torch.compile``, for training, validation and testing.

    ``custom_hooks = [*_base_.custom_hooks, dict(type="mmeformer.CompileHook")]``. The heads stay as
    they are: what they do (assignment, sampling, NMS) depends on the numbers, which breaks graphs.
    mmengine's ``compile=True`` would compile them too, and again and again. A neck's convolutions
    gain nothing.

    Batches of many sizes do not make many compilations: the first size gets a graph of its own,
    one that differs in a side a graph with that side free, and then one serves all sizes.
    ``docs/finetuning.md`` counts the graphs.

    Args:
        parts: names of modules of the model; those it does not have are passed over.
        **options: of ``torch.compile``, such as ``dynamic=True`` for a graph that serves all sizes
            from the start.

    Raises:
        ValueError: the model has none of the parts.
    """

    def __init__(self, parts: Sequence[str] = ("backbone",), **options) -> None:
        self.parts = tuple(parts)
        self.options = options

    def before_run(self, runner: Runner) -> None:
        """Compile; the work itself happens in the first iterations, which may take minutes."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if isinstance(model, BaseTTAModel):
            model = model.module
        if next(model.parameters(), None) is None:
            print_log(f"nothing to compile: {type(model).__name__} has no weights", runner.logger)
            return
        found = [part for part in self.parts if getattr(model, part, None) is not None]
        if not found:
            raise ValueError(f"{type(model).__name__} has no part named {' or '.join(self.parts)}")
        if not torch.cuda.is_available():
            from torch._inductor import config

            # On a CPU it lays all maps out with channels last, but PyTorch 2.12 fails to do so to
            # those of attention with free sizes: "cannot determine truth value of Relational".
            config.layout_optimization = False
        for part in found:
            getattr(model, part).compile(**self.options)
        print_log(f"compiling {' and '.join(found)} in the first iterations", runner.logger)
