# SPDX-License-Identifier: Apache-2.0
"""Record the training passes of the backbone as CUDA graphs, with one line of a config."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmeformer.registry import HOOKS
from mmeformer.training.schedule import wrappers

Levels = tuple[Tensor, ...]


@HOOKS.register_module()
class CudaGraphHook(Hook):
    """Replay forward and backward pass of the backbone as CUDA graphs, for batches of one size.

    ``custom_hooks = [*_base_.custom_hooks, dict(type="mmeformer.CudaGraphHook")]``. A backbone
    launches hundreds of short kernels, for which the host often takes longer than the GPU; a graph
    launches all of them at once. Unlike compilation it needs no time at the start and changes no
    number. The first batch decides about the size; batches of other sizes, such as those of a
    detector with images of many sizes, run as before, as does a second call of the backbone in one
    step. The graph keeps the memory of all maps.

    Nothing is recorded without a GPU, with several processes, accumulated gradients, ``with_cp`` or
    a compiled backbone; the log says so.
    """

    def before_train(self, runner: Runner) -> None:
        """Record in the first iteration."""
        reason = None
        if not torch.cuda.is_available():
            reason = "there is no GPU"
        elif is_model_wrapper(runner.model):
            reason = "there are several processes"
        elif any(item._accumulative_counts > 1 for item in wrappers(runner.optim_wrapper)):
            reason = "gradients are accumulated (optim_wrapper.accumulative_counts)"
        elif getattr(runner.model, "backbone", None) is None:
            reason = f"{type(runner.model).__name__} has no backbone"
        elif getattr(runner.model.backbone, "with_cp", False):
            # The recomputed pass would draw other random numbers.
            reason = "blocks are recomputed (backbone.with_cp)"
        elif runner.model.backbone._compiled_call_impl is not None:
            reason = "the backbone is compiled (mmeformer.CompileHook)"
        if reason is not None:
            print_log(f"no CUDA graphs: {reason}", runner.logger)
            return
        backbone = runner.model.backbone
        if not isinstance(getattr(backbone, "forward", None), Recorded):
            backbone.forward = Recorded(backbone)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        """Let the next call replay the graph."""
        recorded = getattr(getattr(runner.model, "backbone", None), "forward", None)
        if isinstance(recorded, Recorded):
            recorded.start_step()


class Recorded:
    """The forward pass of a backbone, which is recorded when it trains for the first time.

    It is replayed once per step (:meth:`start_step`): a second call would overwrite the maps that
    the backward pass of the first one needs, so it runs as before.

    Args:
        backbone: takes images (B, 3, H, W) and returns its levels.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self.eager: Callable[[Tensor], Levels] = backbone.forward
        self.replay: Callable[[Tensor], Levels] | None = None
        self.recorded: tuple[object, ...] | None = None
        self.replayed = False

    def start_step(self) -> None:
        """Let the next call replay the graph."""
        self.replayed = False

    def __call__(self, images: Tensor) -> Levels:
        if not (self.backbone.training and torch.is_grad_enabled()) or images.requires_grad:
            return self.eager(images)
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = (images.shape, images.dtype, images.is_contiguous(), autocast)
        if self.recorded is None:
            self.recorded = key
            self.replay = record(self.backbone, self.eager, images)
            print_log(
                f"the backbone's passes are replayed as CUDA graphs for batches of "
                f"{' x '.join(map(str, images.shape))}",
                "current",
            )
        if self.replay is None or key != self.recorded or self.replayed:
            return self.eager(images)
        self.replayed = True
        return self.replay(images)


def record(
    backbone: nn.Module, eager: Callable[[Tensor], Levels], images: Tensor
) -> Callable[[Tensor], Levels]:
    """Record forward and backward pass for images like these; weights and statistics stay.

    Args:
        backbone: in training mode, on a GPU.
        eager: its forward pass.
        images: (B, 3, H, W).

    Returns:
        A function that replays both passes for images of this size. Its results are overwritten by
        its next call.
    """
    buffers = [buffer.clone() for buffer in backbone.buffers()]
    random = torch.cuda.get_rng_state(images.device)
    recorded = backbone.forward
    backbone.forward = eager
    try:
        with (
            # Autocast keeps its casts until the context ends, which a graph cannot know.
            torch.autocast(
                "cuda",
                torch.get_autocast_dtype("cuda"),
                enabled=torch.is_autocast_enabled("cuda"),
                cache_enabled=False,
            ),
            # Other threads, such as those that load images into pinned memory, go on meanwhile.
            patch.object(
                torch.cuda, "graph", partial(torch.cuda.graph, capture_error_mode="thread_local")
            ),
        ):
            torch.cuda.make_graphed_callables(backbone, (images.detach().clone(),))
        replay = backbone.forward
    finally:
        backbone.forward = recorded
        with torch.no_grad():
            for buffer, before in zip(backbone.buffers(), buffers, strict=True):
                buffer.copy_(before)
        torch.cuda.set_rng_state(random, images.device)
    return replay
