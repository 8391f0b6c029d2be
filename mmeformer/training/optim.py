# SPDX-License-Identifier: Apache-2.0
"""Layer-wise learning rate decay, adaptive gradient clipping, and steps of few kernels."""

from __future__ import annotations

import functools
import operator
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from timm.utils.agc import adaptive_clip_grad
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from mmeformer.backbones.base import PyramidBackbone
from mmeformer.registry import OPTIM_WRAPPER_CONSTRUCTORS


def layer_index(name: str, depths: Sequence[int]) -> int:
    """Depth of a backbone tensor: 0 for the stem, then 1, 2, ... for the blocks.

    A downsample layer has the depth of the block after it; layers after the blocks (pyramid norms)
    have ``sum(depths) + 1``.

    Args:
        name: as in ``backbone.named_parameters()``.
        depths: number of blocks of each stage.
    """
    if name.startswith("stem."):
        return 0
    if match := re.match(r"stages\.(\d+)\.(?:downsample|blocks\.(\d+))\.", name):
        stage, block = int(match[1]), int(match[2] or 0)
        return 1 + sum(depths[:stage]) + block
    return sum(depths) + 1


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor plus ``paramwise_cfg["layer_decay_rate"]``.

    A backbone tensor at depth ``d`` (:func:`layer_index`) of ``D`` has the learning rate
    ``lr * layer_decay_rate ** (D - d)``; neck and heads have ``lr``. The other keys of
    ``paramwise_cfg`` work as in mmengine; their multipliers apply as well.

    Use: ``optim_wrapper=dict(constructor="mmeformer.LayerDecayConstructor",
    paramwise_cfg=dict(layer_decay_rate=0.8))``.

    Source: Clark et al., ELECTRA (arXiv 2003.10555), appendix; Bao et al., BEiT
    (arXiv 2106.08254), appendix.

    Raises:
        ValueError: the rate is not in (0, 1], or the model has no backbone of mmeformer.
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", **kwargs) -> None:
        """Append one group per tensor to ``params``; mmengine calls it for the whole model."""
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:
            return
        rate = self.paramwise_cfg.get("layer_decay_rate")
        if rate is None or not 0 < rate <= 1:
            raise ValueError(f"paramwise_cfg needs layer_decay_rate in (0, 1], but has {rate!r}")
        multipliers = {}
        for child in module.modules():
            if isinstance(child, PyramidBackbone):
                depths = child.architecture.depths[: len(child.stages)]
                for name, parameter in child.named_parameters():
                    distance = sum(depths) + 1 - layer_index(name, depths)
                    multipliers[id(parameter)] = rate**distance
        if not multipliers:
            raise ValueError("layer_decay_rate needs a model with an mmeformer backbone")
        for group in params:
            for parameter in group["params"]:
                if id(parameter) in multipliers:
                    group["lr"] = group.get("lr", self.base_lr) * multipliers[id(parameter)]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class AdaptiveClippingConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor plus adaptive gradient clipping (AGC).

    The gradient of every output unit of a layer is clipped to ``clip_factor`` times the norm of its
    weights. ``clip_grad=dict(type="agc", clip_factor=0.01)`` of ``optim_wrapper`` turns it on, for
    every optimizer wrapper of mmengine: under mixed precision it acts on unscaled gradients.
    Other types of ``clip_grad`` stay those of mmengine.

    Sources: Brock et al. (arXiv 2102.06171), section 4; timm, ``timm/utils/agc.py``, which the
    reference trains its classifiers with.

    Raises:
        ValueError: the factor is not positive.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper of a model."""
        clipping = self.optim_wrapper_cfg.get("clip_grad") or {}
        if clipping.get("type") != "agc":
            return super().__call__(model)
        settings = {key: value for key, value in clipping.items() if key != "type"}
        settings.setdefault("clip_factor", 0.01)
        if settings["clip_factor"] <= 0:
            raise ValueError(f"clip_grad.clip_factor must be positive, but is {settings}")
        self.optim_wrapper_cfg.pop("clip_grad")
        wrapper = super().__call__(model)
        wrapper.clip_grad_kwargs = settings
        wrapper.clip_func = adaptive_clip_grad
        return wrapper


def unused_keys(model: nn.Module, paramwise: Mapping) -> list[str]:
    """Names in ``custom_keys`` that no parameter has in its own; they change nothing."""
    names = [name for name, _ in model.named_parameters()]
    return [key for key in paramwise.get("custom_keys", {}) if not any(key in n for n in names)]


FEW_KERNELS = (Adam, AdamW, SGD)
"""Optimizers whose steps can be fused, and write nothing into their groups."""


def update_in_few_kernels(optimizer: Optimizer) -> None:
    """Let each step update all parameters that share their settings at once, in place.

    mmengine makes one group per parameter as soon as ``paramwise_cfg`` is given, and PyTorch
    launches its kernels once per group: 380 times for a Mask R-CNN, a sixth of a training step on
    a GPU. Groups are joined during the step alone, so schedulers, logs and checkpoints see those of
    mmengine.
    """
    # A step of another optimizer may write into its groups, which would be lost: it gets copies.
    if type(optimizer) not in FEW_KERNELS or "step" in vars(optimizer):
        return
    plain = type(optimizer).step
    # Those of a config take many times as long to read.
    optimizer.param_groups = [{**group} for group in optimizer.param_groups]

    @functools.wraps(plain)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        groups = self.param_groups
        self.param_groups = join_groups(groups, list(self.defaults))
        try:
            return plain(self, *args, **kwargs)
        finally:
            self.param_groups = groups

    # PyTorch's schedulers wrap it in turn, and expect a method.
    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]


def join_groups(groups: list[dict[str, Any]], settings: Sequence[str]) -> list[dict[str, Any]]:
    """Groups of parameters, joined where the ``settings`` are equal, without changing them."""
    joined: dict[tuple[object, ...], dict[str, Any]] = {}
    values = operator.itemgetter(*settings)
    for group in groups:
        key = values(group)
        try:
            known = joined.get(key)
        except TypeError:
            # Settings of a config or a checkpoint may be lists.
            key = tuple(tuple(value) if isinstance(value, list) else value for value in key)
            known = joined.get(key)
        if known is not None:
            known["params"].extend(group["params"])
        else:
            joined[key] = dict(group, params=list(group["params"]))
    return list(joined.values())
