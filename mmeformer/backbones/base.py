# SPDX-License-Identifier: Apache-2.0
"""Base of both versions: stages, pyramid outputs, freezing, norm evaluation, checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmeformer.layers.blocks import Stem, run_checkpointed
from mmeformer.layers.graphs import in_graph
from mmeformer.variants import Architecture, find_variant

NUM_STAGES = 4

InitConfig: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
"""mmengine's ``init_cfg``."""


def to_grid(value: int | Sequence[int]) -> tuple[int, int]:
    """``7`` -> ``(7, 7)``, ``(25, 42)`` -> ``(25, 42)``; rows first.

    Raises:
        ValueError: not one or two positive whole numbers.
    """
    grid = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(grid) != 2 or any(not isinstance(side, int) or side < 1 for side in grid):
        raise ValueError(f"bias_grid must be one or two positive integers, but is {value!r}")
    return grid


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth rate of every block: ``rate * index / (total - 1)``, one list per stage."""
    total = sum(depths)
    rates = iter([rate * index / max(total - 1, 1) for index in range(total)])
    return [[next(rates) for _ in range(depth)] for depth in depths]


PRETRAINED = "mmeformer.Pretrained"
"""Type of the initializer that loads a checkpoint completely or raises."""


def strict_pretrained(init_cfg: InitConfig) -> list[dict[str, Any]]:
    """Copy ``init_cfg`` with every ``Pretrained`` made ``mmeformer.Pretrained`` and put last.

    mmengine's own loads whatever happens to fit, and only files with our names.
    """
    entries = [init_cfg] if isinstance(init_cfg, Mapping) else init_cfg or []
    pretrained, others = [], []
    for entry in entries:
        if entry["type"] in ("Pretrained", PretrainedInit):
            pretrained.append({**entry, "type": PRETRAINED})
        else:
            others.append(dict(entry))
    return [*others, *pretrained]


class Stage(nn.Module):
    """A downsample (absent in the first stage) and blocks.

    (B, C_in, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)), or (B, C, H, W) without a downsample.
    """

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, with_cp: bool = False) -> Tensor:
        return self.run_blocks(self.downsample(x), with_cp)

    def run_blocks(self, x: Tensor, with_cp: bool) -> Tensor:
        for block in self.blocks:
            x = run_block(block, with_cp, x)
        return x


def run_block(block: nn.Module, with_cp: bool, x: Tensor, *args: object) -> Tensor:
    """Call a block, keeping only its input for the backward pass if ``with_cp``."""
    if with_cp and x.requires_grad:
        return run_checkpointed(block, x, *args)
    return block(x, *args)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of a map (B, C, H, W)."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class PyramidBackbone(BaseModule):
    """Base of both backbones; see :class:`EfficientFormer` and :class:`EfficientFormerV2`.

    A subclass sets ``family`` and ``stem_act`` and builds its stages in ``build_stage``.
    """

    family: str
    stem_act: type[nn.Module]
    init_cfg: InitConfig

    def __init__(
        self,
        arch: str | Mapping[str, Any],
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float | None = None,
        layer_scale_init_value: float | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        bias_grid: int | Sequence[int] = 7,
        bias_resize: str = "displacement",
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        self.arch = arch
        self.architecture = (
            Architecture.from_mapping(arch)
            if isinstance(arch, Mapping)
            else find_variant(self.family, arch).architecture
        )
        self.out_indices = tuple(out_indices)
        if (
            not self.out_indices
            or list(self.out_indices) != sorted(set(self.out_indices))
            or not set(self.out_indices) <= set(range(NUM_STAGES))
        ):
            raise ValueError(
                f"out_indices must be increasing numbers from 0 to {NUM_STAGES - 1}, "
                f"but are {self.out_indices}"
            )
        if not -1 <= frozen_stages <= NUM_STAGES:
            raise ValueError(
                f"frozen_stages must be -1 (none), 0 (stem) or 1 to {NUM_STAGES} (stem and that "
                f"many stages), but is {frozen_stages}"
            )
        rate = self.architecture.drop_path_rate if drop_path_rate is None else drop_path_rate
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), but is {rate}")
        if layer_scale_init_value is None:
            layer_scale_init_value = self.architecture.layer_scale_init_value
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.bias_grid = to_grid(bias_grid)
        self.bias_resize = bias_resize

        widths = self.architecture.widths
        self.stem = Stem(widths[0], self.stem_act)
        rates = drop_path_rates(rate, self.architecture.depths)
        # Stages beyond the last output would be dead weight, and unused parameters under DDP.
        self.stages = nn.ModuleList(
            self.build_stage(index, in_width, rates[index], layer_scale_init_value)
            for index, in_width in zip(
                range(max(self.out_indices) + 1), (None, *widths), strict=False
            )
        )
        self.norms = nn.ModuleDict()
        self._freeze()

    def build_stage(
        self, index: int, in_width: int | None, drop_path: list[float], layer_scale: float
    ) -> Stage:
        """The stage ``index`` (0 to 3); ``in_width`` is None where there is no downsample."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Initialize as published (linear layers: normal, std 0.02), then by ``init_cfg``.

        ``dict(type="Pretrained", checkpoint=...)`` takes a local path, a URL or
        ``timm://<model>.<tag>``, in any published format, and loads all of it or raises
        (:func:`mmeformer.checkpoints.load.load_pretrained`). Its keys ``prefix`` and
        ``map_location`` are mmengine's; ``allow_partial=True`` loads what fits.

        Raises:
            mmeformer.errors.CheckpointError: the checkpoint cannot be used.
        """
        if not self.is_init:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
        configured = self.init_cfg
        self.init_cfg = strict_pretrained(configured)
        try:
            super().init_weights()
        finally:
            self.init_cfg = configured

    def _dump_init_info(self) -> None:
        """Nothing: of a backbone alone, mmengine would print three lines for each parameter."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (B, 3, H, W) -> tuple of (B, C_i, ceil(H / s_i), ceil(W / s_i)), i in ``out_indices``.

        s = 4, 8, 16, 32. Any H and W work; nothing is padded outside the layers' own padding.
        """
        if in_graph():
            # Compilers choose memory formats by themselves, and ONNX has none.
            return self.pyramid(x)
        # oneDNN and cuDNN work in channels last: they would reorder other maps in every layer.
        outputs = self.pyramid(x.contiguous(memory_format=torch.channels_last))
        # Later layers may rely on the input's format: mmcv's RoIAlign silently treats every map as
        # one of the default format.
        given = memory_format(x)
        return tuple(level.contiguous(memory_format=given) for level in outputs)

    def pyramid(self, x: Tensor) -> tuple[Tensor, ...]:
        """:meth:`forward` in the memory format of ``x``."""
        x = self.stem(x)
        outputs = []
        for index, stage in enumerate(self.stages):
            x = stage(x, self.with_cp and self.training)
            if index in self.out_indices:
                name = str(index)
                outputs.append(self.norms[name](x) if name in self.norms else x)
        return tuple(outputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PyramidBackbone:
        """Move the module; on a GPU, weights of convolutions become channels last, as the maps are.

        For others cuDNN takes slower kernels: half more time at 224 px. On a CPU they stay as they
        are, as safetensors, among others, saves contiguous tensors only.
        """
        super()._apply(fn, recurse)
        for parameter in self.parameters():
            if parameter.device.type == "cuda" and parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.stem, *list(self.stages)[: self.frozen_stages]]

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> PyramidBackbone:
        """Training mode, except that frozen stages and (``norm_eval``) batch norms stay in eval."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self
